"""The host's side of the link with a real libvirt and QEMU: `make test-libvirt`, as root. No guest boots
here; test_vtpm_guest.py has the whole chain with one that does."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import get, serving, trusted_ak, wait_until
from libvirt_helpers import OPT_IN, LibvirtHost, libvirt_host, run, virsh

from provider_proxy.evidence.model import TrustedHost
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.verify import MemoryHistory, Verifier, new_challenge

pytestmark = OPT_IN

VM = uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c3b")
NAME = "trial:1"
DOMAIN = f"""<domain type='qemu'>
  <name>{NAME}</name><uuid>{VM}</uuid><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>
</domain>
"""


@pytest.fixture
def host() -> Iterator[LibvirtHost]:
    with libvirt_host() as made:
        yield made


def config_of(host: LibvirtHost) -> str:
    return host.toml(
        f'[tenants.acme]\nidentities = ["uid:0"]\nvms = ["{VM}"]\n',
        listen=f'address = "unix:{host.folder}/tenants"\ninsecure_plaintext = true\n',
    )


async def claims_of(host: LibvirtHost) -> dict[str, Any] | None:
    """What a tenant verifies; None where there are no claims."""
    address = f"unix:{host.folder}/tenants"
    history = MemoryHistory()
    trusted = TrustedHost(ak=await trusted_ak(address))
    challenge = new_challenge(mask=1, vm=VM, now_s=time.monotonic(), history=history)
    reply = await get(address, f"/verifier/quote?{encode_quote_query(challenge.request)}")
    if reply.status == 404:
        return None
    quote = Verifier(UnsafeAcceptAny()).verify(
        reply.body, challenge, trusted, history, now_s=time.monotonic()
    )
    assert quote.claims is not None
    return dict(quote.claims)


async def test_a_domain_s_life(host: LibvirtHost) -> None:
    """define, start, save, restore, kill -9 of the daemon, libvirtd's restart, destroy, a new vTPM."""
    domain = host.folder / "domain.xml"
    domain.write_text(DOMAIN)
    with host.libvirtd(), host.helper():
        async with serving(host.folder, config_of(host)) as serve:
            await run("define", domain)
            await run("start", NAME)
            first = await host.until_confirmed(VM)
            assert (first["name"], first["generation"], first["migrated"]) == (NAME, 1, False)
            claims = await claims_of(host)
            assert claims is not None
            assert (claims["confirmed"], claims["eks"]) == (True, first["eks"])
            assert len(first["eks"]) == 2
            await run("save", NAME, host.folder / "saved")
            assert await claims_of(host) is None
            await run("restore", host.folder / "saved")
            assert (await host.until_confirmed(VM))["eks"] == first["eks"]
            serve.process.kill()
        async with serving(host.folder, config_of(host)):
            assert (await host.until_confirmed(VM))["eks"] == first["eks"]
            await run("destroy", NAME)
            assert await claims_of(host) is None
            await run("start", NAME)
            assert (await host.until_confirmed(VM))["generation"] == 1
            await run("destroy", NAME)
            await run("undefine", NAME)
            await run("define", domain)
            await run("start", NAME)
            second = await host.until_confirmed(VM)
            assert second["generation"] == 2
            assert not {str(ek) for ek in first["eks"]} & {str(ek) for ek in second["eks"]}
    async with serving(host.folder, config_of(host)):
        with host.helper(), host.libvirtd():
            assert (await host.until_confirmed(VM))["eks"] == second["eks"]
            wait_until(lambda: "running" in virsh("domstate", NAME), "the domain's reconnection")
            await run("destroy", NAME)
            assert await claims_of(host) is None
