"""What a tenant's `import provider_proxy` brings along: `cryptography`, and nothing of the host's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from package_modules import CRYPTOGRAPHY, NAMED, brought_by

FORBIDDEN = (
    "trio",
    "httpx",
    "anyio",
    "h11",
    "merklelib",
    "tpm2_pytss",
    "prometheus_client",
    "rich",
    "matplotlib",
)


@pytest.mark.parametrize(
    "module",
    [
        "provider_proxy",
        *(f"provider_proxy.{name}" for name in NAMED if name.startswith(("errors", "evidence"))),
        "provider_proxy.trust.pins",
        "provider_proxy.trust.ek_chain",
        "provider_proxy.host.audit.records",
        "provider_proxy.cli.verify",
    ],
)
def test_tenants_modules_bring_cryptography_alone(module: str) -> None:
    brought = brought_by(module)
    assert "provider_proxy" in brought
    assert not brought & set(FORBIDDEN)
    assert brought <= {"provider_proxy"} | CRYPTOGRAPHY


def test_the_command_itself_brings_no_more() -> None:
    # Subcommands are imported when they run: `provider-proxy verify` works with the base install.
    assert brought_by("provider_proxy.cli.main") <= {"provider_proxy"} | CRYPTOGRAPHY


def test_the_watcher_brings_nothing_of_the_host_s() -> None:
    brought = brought_by("provider_proxy.cli.watch")
    assert {"trio", "httpx", "h11", "prometheus_client"} <= brought
    assert not brought & {"merklelib", "tpm2_pytss", "matplotlib"}  # httpx looks for rich


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("provider_proxy.host.batching.merkle", "merklelib"),
        ("provider_proxy.tenant.client", "httpx"),
        ("provider_proxy.host.tpm.chip", "tpm2_pytss"),
        ("provider_proxy.host.metrics", "prometheus_client"),
    ],
)
def test_the_probe_sees_what_is_brought(module: str, package: str) -> None:
    assert package in brought_by(module)


CHECK_CONFIG = """
import sys
from provider_proxy.cli import main
code = main.run(["check-config", "--config", sys.argv[1]])
loaded = {name.partition(".")[0] for name in sys.modules}
print(code, *sorted(loaded & {"trio", "merklelib", "tpm2_pytss"}))
"""


def test_check_config_loads_no_daemon(tmp_path: Path) -> None:
    """It runs where the host's packages are not installed, and at once."""
    config = tmp_path / "provider-proxy.toml"
    config.write_text("[listen]\ninsecure_plaintext = true\n")
    done = subprocess.run(
        [sys.executable, "-c", CHECK_CONFIG, config], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0"
