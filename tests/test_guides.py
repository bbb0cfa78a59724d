"""The guides' commands run as they stand: quick start, operator's guide, migration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from guide_helpers import Machine, guide_blocks, machine
from keylime_helpers import Registrar, running_registrar

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
]

QUICKSTART, OPERATING, MIGRATING = (
    f"docs/{name}.md" for name in ("quickstart", "operating", "migrating")
)


@pytest.fixture(scope="module")
def registrar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registrar]:
    with running_registrar(tmp_path_factory.mktemp("registrar")) as made:
        yield made


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as made:
        yield made


def with_registrar(host: Machine, registrar: Registrar) -> dict[str, str]:
    """The tenant's files beside the commands, and its registrar under the guides' name."""
    for file in (registrar.ca, registrar.client_cert, registrar.client_key):
        shutil.copy(file, host.folder)
    return {"registrar.acme.example:8891": f"127.0.0.1:{registrar.tls_port}"}


def test_quick_start_on_a_laptop(host: Machine) -> None:
    (block,) = (b for b in guide_blocks(QUICKSTART) if "trial.toml" in b)
    del host.environment["PROVIDER_PROXY_TPM_TCTI"], host.environment["PROVIDER_PROXY_STATE_DIR"]
    done = host.run("set +e", block)  # whatever fails, the last line stops the daemon
    assert done.returncode == 0, done.stdout
    assert "verified: signed by AK 000b" in done.stdout
    assert "PCR  7 sha256" in done.stdout
    assert "INFO stopped" in done.stdout


def test_quick_start_and_operators_guide_on_a_host(host: Machine, registrar: Registrar) -> None:
    blocks = [b for b in guide_blocks(QUICKSTART) if "trial.toml" not in b]
    # A swtpm has no certificate of a vendor's.
    replace = with_registrar(host, registrar) | {"--ek-ca tpm-cas": "--insecure-no-ek"}
    done = host.run(*blocks, replace=replace)
    assert done.returncode == 0, done.stdout + host.journal()
    assert "acme: registered" in done.stdout
    assert "verified: signed by AK 000b" in done.stdout
    before = ak_name(host)
    done = host.run(*guide_blocks(OPERATING))
    assert done.returncode == 0, done.stdout + host.journal()
    assert "tenants.beta" in done.stdout
    assert "pki/crl.pem" in done.stdout
    assert ak_name(host) != before  # the page makes a new one
    (verify,) = (line for b in blocks for line in b.splitlines() if " verify " in line)
    (fetch,) = (line for b in blocks for line in b.splitlines() if " fetch " in line)
    done = host.run("set +e", fetch, verify)  # the tenant has pinned the old one
    assert (done.returncode, "SignatureError" in done.stdout) == (1, True), done.stdout


def ak_name(host: Machine) -> str:
    shown = host.run("provider-proxy tpm ak show --json")
    name: str = json.loads(shown.stdout.splitlines()[-1])["ak_name"]
    return name
