"""The whole chain on one machine, by commands alone: swtpm_setup makes a vTPM with certificates of the CA
in the host's TPM; a tenant checks CA, link and deep quote, Keylime's code the certificate. Needs root."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding
from helpers import Certs, make_certs, serving
from keylime_helpers import PYTHON, keylime_environment
from openssl_helpers import VERIFY_CERT
from tenant_of_keylime import KEYLIME_REFUSES, keylime_tenant
from tpm_helpers import tool
from vtpm_helpers import VM
from vtpm_host import (
    GOOD,
    NV_ECC,
    NV_PLATFORM,
    NV_RSA,
    REFUSED,
    SWTPM_USER,
    Host,
    TenantAt,
    certificate_in,
    host,
    in_thread,
    localca,
    pytestmark,
    until_stopped,
)

__all__ = ["host", "localca", "pytestmark"]  # fixtures, and what must be here to run

NONCE = "tenant-nonce-0123456789"


def config_of(host: Host, certs: Certs) -> str:
    """The host's daemon with mutual TLS and the CA in its TPM."""
    plain = f'address = "{host.address}"\ninsecure_plaintext = true\n'
    toml = host.toml(more='issuer = "tpm"\n')
    assert plain in toml
    toml = toml.replace(plain, f'address = "127.0.0.1:0"\n{certs.toml()}')
    return toml.replace('"uid:0"', '"email:tenant@example.org"')


def vtpm_quote(tcti: str, folder: Path) -> None:
    """The VM's agent: a vAK, and a quote over the tenant's nonce as a Keylime string."""
    tool(tcti, "tpm2_createek", "-c", "ek.ctx", "-G", "rsa", "-u", "again.pub", cwd=folder)
    tool(
        *(tcti, "tpm2_createak", "-C", "ek.ctx", "-c", "ak.ctx", "-G", "ecc", "-g", "sha256"),
        *("-s", "ecdsa", "-u", "vak", "-f", "tss"),
        cwd=folder,
    )
    for kind in ("-t", "-l", "-s"):
        tool(tcti, "tpm2_flushcontext", kind)
    tool(
        *(tcti, "tpm2_quote", "-c", "ak.ctx", "-l", "sha256:0,7", "-q", NONCE.encode().hex()),
        *("-m", "q.attest", "-s", "q.sig", "-o", "q.pcrs", "-g", "sha256"),
        cwd=folder,
    )
    parts = [
        base64.b64encode((folder / f"q.{end}").read_bytes()) for end in ("attest", "sig", "pcrs")
    ]
    (folder / "vtpm.quote").write_bytes(b"r" + b":".join(parts))


async def test_the_whole_chain(host: Host, tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    async with serving(host.folder, config_of(host, certs)) as serve:
        tenant = TenantAt(tmp_path, f"https://{serve.address}", certs)
        with host.helper():
            made = await in_thread(host.make_vtpm)
            assert made.returncode == 0, made.stdout
            with host.libvirt.running(VM, user=SWTPM_USER) as tcti:
                await host.until_confirmed()
                for handle, name in (("0x81010001", "ek"), ("0x81010016", "ek2")):
                    tool(tcti, "tpm2_readpublic", "-c", handle, "-f", "tss", "-o", tmp_path / name)
                await tenant.run("identity URL --save-ak ak")
                await tenant.run("pin add alpha --pins pins --ak-tpm ak")
                await _check_ca(tenant, tcti)
                await _check_link(tenant)
                await in_thread(vtpm_quote, tcti, tmp_path)
                await _check_deep(tenant)
                await _check_agent(tenant, GOOD, "linked: VM")
            await until_stopped(host)
            await _check_agent(tenant, REFUSED, "VmNotRunningError")


async def _check_ca(tenant: TenantAt, tcti: str) -> None:
    store = tenant.folder / "store"
    pinned = "--pinned alpha --pins pins"
    said = await tenant.run(f"vtpm-ca fetch URL {pinned} --out", store / "ca.pem")
    assert "is in the TPM of the trusted AK" in said
    for index, ek, kind in (
        (NV_RSA, "ek", "ek"),
        (NV_ECC, "ek2", "ek"),
        (NV_PLATFORM, "ek", "platform"),
    ):
        certificate = certificate_in(tcti, index)
        path = tenant.folder / "vtpm.cert"
        path.write_bytes(certificate.public_bytes(Encoding.DER))
        line = f"vtpm-ca check store/ca.pem {pinned} --ek-cert vtpm.cert --ek {ek} --kind {kind}"
        assert "signed by it, for this EK" in await tenant.run(line, "--vm", str(VM))
        if kind == "ek":
            await trio.run_process(
                [PYTHON, "-c", VERIFY_CERT, path, store], env=keylime_environment(tenant.folder)
            )
    (tenant.folder / "vtpm.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    words = ("openssl", "verify", "-x509_strict", "-CAfile", store / "ca.pem")
    await trio.run_process([*words, tenant.folder / "vtpm.pem"], capture_stdout=True)


async def _check_link(tenant: TenantAt) -> None:
    said = await tenant.run("fetch URL --pcrs 0 --pinned alpha --pins pins --vm", str(VM))
    assert "not verified yet" in said
    values = json.dumps({"0": ["00" * 32]})  # a swtpm that nobody has booted with
    (tenant.folder / "policy.json").write_text(values)
    judge = "evidence.json --request request.json --pinned alpha --pins pins"
    judge += f" --tpm-policy policy.json --vm {VM} --least confirmed --ek-issuer tpm"
    assert "(confirmed)" in await tenant.run(f"verify {judge} --ek ek")
    await tenant.run(f"verify-link files {judge} --ek ek2")  # the VM's other EK


async def _check_deep(tenant: TenantAt) -> None:
    deep = f"--vtpm-quote vtpm.quote --vtpm-nonce {NONCE}"
    judge = "verify-link files evidence.json --request request.json --pinned alpha --pins pins"
    judge += f" --tpm-policy policy.json --vm {VM} --ek ek {deep} --vak vak"
    judge += " --insecure-any-vtpm-state"
    said = await tenant.run(judge, code=REFUSED)  # the evidence from before the vTPM's quote
    assert "DeepNonceError" in said
    await tenant.run(f"fetch URL --pcrs 0 --pinned alpha --pins pins --vm {VM} {deep}")
    assert "linked" in await tenant.run(judge)


async def _check_agent(tenant: TenantAt, code: int, word: str) -> None:
    """Keylime's own tenant, before it hands over V."""
    tenant.write_map()
    ek = (tenant.folder / "ek").read_bytes()
    words = ("ek-check", "--config", str(tenant.folder / "map.toml"))
    got, said = await keylime_tenant(tenant.folder, str(VM), ek, *words)
    assert (got, word in said) == (KEYLIME_REFUSES if code else GOOD, True), said


@pytest.mark.real
async def test_a_host_without_a_ca_says_so(host: Host, tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    toml = config_of(host, certs).replace('issuer = "tpm"', 'issuer = "delegate"')
    async with serving(host.folder, toml) as serve:
        tenant = TenantAt(tmp_path, f"https://{serve.address}", certs)
        await tenant.run("identity URL --save-ak ak")
        said = await tenant.run("vtpm-ca fetch URL --ak-tpm ak --out got.pem", code=3)
        assert "404" in said
        assert not (tmp_path / "got.pem").exists()
