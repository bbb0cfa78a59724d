"""The guides' commands run as they stand: quick start, operator's guide, migration."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from guide_helpers import HOST, Machine, guide_blocks, machine
from keylime_helpers import Registrar, running_registrar

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
]

AGENT = "d432fbb3-d2f1-4a97-9ef7-75bd81c00000"  # as in the guide
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


def with_agent_files(host: Machine) -> None:
    """What the guide on an agent says is there: certificates, keys among the secrets, CAs of EKs."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(host.etc / "registrar-ca.crt"))
    (host.etc / "ek-ca").mkdir()
    ca.cert_pem.write_to_path(str(host.etc / "ek-ca/ca.pem"))
    for name in ("agent", "registrar"):
        issued = ca.issue_cert(f"{name}.example")
        issued.cert_chain_pems[0].write_to_path(str(host.etc / f"{name}-client.crt"))
        key = host.etc / f"secrets/{name}.key"
        key.touch(mode=0o600)
        issued.private_key_pem.write_to_path(str(key))


def test_quick_start_on_a_laptop(host: Machine) -> None:
    (block,) = (b for b in guide_blocks(QUICKSTART) if "trial.toml" in b)
    del host.environment["PROVIDER_PROXY_TPM_TCTI"], host.environment["PROVIDER_PROXY_STATE_DIR"]
    done = host.run("set +e", block)  # whatever fails, the last line stops the daemon
    assert done.returncode == 0, done.stdout
    assert "verified: signed by AK 000b" in done.stdout
    assert "PCR  7 sha256" in done.stdout
    assert "INFO stopped" in done.stdout


def test_a_host_from_the_quick_start_to_the_operators_guide(
    host: Machine, registrar: Registrar
) -> None:
    """One host, in the order in which its operator reads: quick start, migration, operator's guide."""
    with_agent_files(host)
    blocks = [b for b in guide_blocks(QUICKSTART) if "trial.toml" not in b]
    # A swtpm has no certificate of a vendor's.
    replace = {"--ek-ca tpm-cas": "--insecure-no-ek"} | with_registrar(host, registrar)
    done = host.run(*blocks, replace=replace)
    assert done.returncode == 0, done.stdout + host.journal()
    assert re.search(r"\bregistered\b", done.stdout)
    assert "verified: signed by AK 000b" in done.stdout

    done = host.run(*other_pages(), replace=OTHERS | replace)
    assert done.returncode == 0, done.stdout + host.journal()
    assert done.stdout.count("verified: signed by AK 000b") == 1

    agent_record = register_an_agent(host, registrar)
    host.add_command("keylime_tenant", f'#!/bin/sh\necho "$*" >> {host.root}/asked\n')
    through_agent, *replacing_it = guide_blocks(MIGRATING)
    registrars = "/etc/provider-proxy/conf.d/acme.toml"  # way A has none
    done = host.run(f"mv {registrars} .", through_agent, f"mv acme.toml {registrars}")
    assert done.returncode == 0, done.stdout + host.journal()
    assert re.search(r'quoter.kind = "keylime-agent"', done.stdout)
    done = host.run(*replacing_it)
    assert done.returncode == 0, done.stdout + host.journal()
    assert (host.root / "asked").read_text() == f"-c regdelete -u {AGENT}\n"
    assert record_of(registrar, AGENT) == agent_record  # the proxy left it alone
    own = record_of(registrar, HOST)
    assert own["ek_tpm"] == agent_record["ek_tpm"]
    assert own["aik_tpm"] != agent_record["aik_tpm"]

    before = ak_name(host)
    done = host.run(*guide_blocks(OPERATING))
    assert done.returncode == 0, done.stdout + host.journal()
    assert "tenants.beta" in done.stdout
    assert "pki/crl.pem" in done.stdout
    assert ak_name(host) != before  # the page makes a new one
    tenant = [line for line in blocks[-1].splitlines() if re.search(r" (fetch|verify) ", line)]
    done = host.run("set +e", *tenant)  # the tenant has pinned the old one
    assert (done.returncode, "SignatureError" in done.stdout) == (1, True), done.stdout


# The other pages' hosts, registrars and certificates are this machine's.
OTHERS = {
    "https://registrar.example:8891": "https://registrar.acme.example:8891",
    "--registrar-cert client.crt --registrar-key client.pem": (
        "--registrar-cert client-cert.crt --registrar-key client-private.pem"
    ),
    "--agent-id host-17.example": f"--agent-id {HOST}",
    "https://host:8890 --ca provider-ca.crt": (
        f"https://{HOST}:8890 --ca provider-ca.crt --cert acme.crt --key acme.key"
    ),
    "unix:/run/provider-proxy/admin": "127.0.0.1:8895",
}


def other_pages() -> list[str]:
    """Short blocks of other pages that want a daemon and a registrar."""
    pin_and_verify, import_eks = guide_blocks("docs/bindings.md")
    (vms,) = (block for block in guide_blocks("docs/vtpm.md") if "provider-proxy vms" in block)
    return [
        "provider-proxy tpm ak export --out ak.b64",
        f"""echo '{{"0": ["{"00" * 32}"]}}' > policy.json""",
        pin_and_verify.splitlines()[0],
        "provider-proxy fetch https://host:8890 --ca provider-ca.crt --pcrs 0,7"
        " --pinned host-17 --pins pins",
        *(pin_and_verify.splitlines()[1], *guide_blocks("docs/monitoring.md"), vms),
        *(f"echo another,{'00' * 32} > eks.csv", import_eks),
    ]


def ak_name(host: Machine) -> str:
    shown = host.run("provider-proxy tpm ak show --json")
    name: str = json.loads(shown.stdout.splitlines()[-1])["ak_name"]
    return name


def register_an_agent(host: Machine, registrar: Registrar) -> dict[str, Any]:
    """What an agent on the host has left in the registrar: the same EK, with an AK of its own."""
    config = host.root / "agent.toml"
    config.write_text(
        f"""
[listen]
insecure_plaintext = true
[tpm]
ak_handle = 0x81000200
[registrars.agent]
url = "{registrar.https_url}"
ca = "{registrar.ca}"
client_cert = "{registrar.client_cert}"
client_key = "{registrar.client_key}"
agent_id = "{AGENT}"
"""
    )
    state = f"PROVIDER_PROXY_STATE_DIR={host.root}/agent"
    done = host.run(f"{state} provider-proxy register --config {config}")
    assert done.returncode == 0, done.stdout
    return record_of(registrar, AGENT)


def record_of(registrar: Registrar, agent_id: str) -> dict[str, Any]:
    with httpx.Client(verify=registrar.client_context(), trust_env=False) as http:
        reply = http.get(f"{registrar.https_url}/v2.6/agents/{agent_id}")
    assert reply.status_code == 200, reply.text
    results: dict[str, Any] = reply.json()["results"]
    return results
