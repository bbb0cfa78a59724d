"""The whole chain with a real libvirt and guests that boot: `make test-libvirt`, as root.

From a key that a guest makes in its vTPM up to the host's TPM, each link by the tenant's own commands,
and each refused once it is broken. It tells what it does; run it with -s to read along. The host's
TPM is the daemon's embedded swtpm: the one link that this cannot try is the vendor's certificate.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from guest_helpers import (
    EK_ECC,
    EK_RSA,
    MEASURED_PCR,
    NV_ECC,
    NV_RSA,
    Guest,
    GuestTpm,
    Keys,
    make_boot_files,
    measured,
)
from helpers import LIMIT_S, get, make_certs, serving, until_answered
from keylime_helpers import PYTHON, Registrar, keylime_environment, running_registrar
from libvirt_helpers import OPT_IN, LibvirtHost, libvirt_host, run
from openssl_helpers import VERIFY_CERT
from registrar_helpers import delete, make, record_of, tls
from tenant_of_keylime import KEYLIME_REFUSES, keylime_tenant
from vtpm_helpers import OTHER_VM, VM
from vtpm_host import TenantAt

from provider_proxy.evidence.vtpm_link import ek_digest
from provider_proxy.trust.registration.state import State

pytestmark = OPT_IN

GOOD, REFUSED, USAGE, AWAY = 0, 1, 2, 3
ALPHA = "alpha"  # the host's id at the tenant's registrar, and the name of its pin
PINNED = "--pinned alpha --pins pins"
ZEROS = "00" * 32
LOG_SHOWN = 8000


class Tale:
    """Tells what happens, and how long it took."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def part(self, title: str) -> None:
        print(f"\n{time.monotonic() - self._began:6.1f} s  {title}", flush=True)

    def say(self, text: str) -> None:
        for line in text.strip().splitlines():
            print(f"          {line}", flush=True)

    def refused(self, why: str, said: str) -> None:
        (line,) = [line for line in said.splitlines() if "refused" in line][-1:] or [said.strip()]
        print(f"       x  {why}\n          {line.strip()}", flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All who take part."""

    tale: Tale
    host: LibvirtHost
    tenant: TenantAt
    registrar: Registrar
    web: Guest
    other: Guest

    def file(self, name: str) -> Path:
        return self.tenant.folder / name

    async def refused(self, why: str, line: str, error: str, *, code: int = REFUSED) -> None:
        """A command that must be refused, for this reason and no other."""
        said = await self.tenant.run(line, code=code)
        assert error in said, said
        self.tale.refused(why, said)


@pytest.fixture
def host() -> Iterator[LibvirtHost]:
    with libvirt_host() as made:
        make_boot_files(made.lines)
        yield made


@asynccontextmanager
async def scene_of(host: LibvirtHost, folder: Path) -> AsyncIterator[Scene]:
    """libvirtd, the tenant's registrar, the daemon."""
    certs = make_certs(folder)
    (folder / "registrar").mkdir()
    registrar_folder = folder / "registrar"
    with host.libvirtd(), host.helper(), running_registrar(registrar_folder) as registrar:
        config = host.toml(
            f'[tenants.acme]\nidentities = ["email:tenant@example.org"]\nvms = ["{VM}"]\n'
            f'[registrars.acme]\nurl = "{registrar.https_url}"\nca = "{registrar.ca}"\n'
            f'client_cert = "{registrar.client_cert}"\nclient_key = "{registrar.client_key}"\n'
            f'agent_id = "{ALPHA}"\n',
            listen=f'address = "127.0.0.1:0"\n{certs.toml()}',
            vtpm='issuer = "tpm"\n',
        )
        async with serving(host.folder, config) as serve:
            scene = Scene(
                tale=Tale(),
                host=host,
                tenant=TenantAt(folder, f"https://{serve.address}", certs),
                registrar=registrar,
                web=Guest(name="web", vm=VM, folder=host.lines),
                other=Guest(name="other", vm=OTHER_VM, folder=host.lines),
            )
            try:
                yield scene
            except BaseException:
                scene.tale.part("failed; the end of the daemon's log")
                scene.tale.say(serve.log[-LOG_SHOWN:])
                raise


async def test_the_whole_chain_of_a_guest_that_boots(host: LibvirtHost, tmp_path: Path) -> None:
    async with scene_of(host, tmp_path) as scene:
        await pin_the_host(scene)
        await boot(scene)
        await bind_the_vak(scene)
        await check_certificates(scene)
        await check_link(scene)
        await check_what_is_broken(scene)
        await save_and_restart(scene)
        await make_anew(scene)
        scene.tale.part("done")


# --- the host ---------------------------------------------------------------------------------------


async def pin_the_host(scene: Scene) -> None:
    scene.tale.part("the host's AK: registered by the daemon, activated, pinned by the tenant")

    async def registered() -> bool:
        return record_of(scene.registrar, ALPHA) is not None

    await until_answered(registered, "the host's registration")
    context = scene.tenant.certs.client(with_cert=True)
    address = scene.tenant.url.removeprefix("https://")
    identity = (await get(address, "/verifier/identity", context)).results()
    # Stands for the EK that a tenant was told by other means: there is no vendor's certificate here.
    scene.file("host.ek").write_text(str(identity["ek_tpm"]))
    scene.tale.say(await scene.tenant.run(f"{pin_line(scene, ALPHA)} --ek-tpm host.ek"))
    scene.file("host.json").write_text(json.dumps({"0": [ZEROS]}))  # nobody has booted with it
    scene.file("other-host.json").write_text(json.dumps({"0": ["11" * 32]}))


def pin_line(scene: Scene, name: str) -> str:
    registrar = scene.registrar
    return (
        f"pin add {name} --pins pins --agent-id {ALPHA} --registrar {registrar.https_url}"
        f" --registrar-ca {registrar.ca} --registrar-cert {registrar.client_cert}"
        f" --registrar-key {registrar.client_key}"
    )


# --- the guests -------------------------------------------------------------------------------------


async def boot(scene: Scene) -> None:
    scene.tale.part("libvirt defines and starts two VMs; both boot")
    async with trio.open_nursery() as nursery:
        for guest in (scene.web, scene.other):
            path = scene.file(f"{guest.name}.xml")
            path.write_text(guest.domain)
            await run("define", path)
            await run("start", guest.name)
            nursery.start_soon(up, scene, guest)
    for guest in (scene.web, scene.other):
        await save_keys(scene, guest)
    policy = {str(MEASURED_PCR): [measured()]}
    scene.file("guest.json").write_text(json.dumps(policy))
    scene.file("other-guest.json").write_text(json.dumps({str(MEASURED_PCR): [ZEROS]}))


async def up(scene: Scene, guest: Guest) -> None:
    await guest.until_up()
    uptime, _ = await guest.clock()
    entry = await scene.host.until_confirmed(guest.vm)
    scene.tale.part(f"{guest.name} is up, by its own clock for {uptime} s; its EKs are confirmed")
    digests = {ek["spki_sha256"] for ek in entry["eks"]}
    found = {ek_digest(await guest.ask("ek", handle)).hex() for handle in (EK_RSA, EK_ECC)}
    assert digests == found  # what the guest finds in its TPM is what the host says
    scene.tale.say(f"generation {entry['generation']}, EKs {', '.join(d[:16] for d in found)} …")


async def save_keys(scene: Scene, guest: Guest) -> None:
    """The vAK is made at the first call, and is in the vTPM from then on."""
    for what, data in (
        ("vak", await guest.ask("ak")),
        ("ek", await guest.ask("ek", EK_RSA)),
        ("ek2", await guest.ask("ek", EK_ECC)),
        ("cert", await guest.ask("nvread", NV_RSA)),
        ("cert2", await guest.ask("nvread", NV_ECC)),
    ):
        scene.file(f"{guest.name}.{what}").write_bytes(data)


def keys_of(scene: Scene, *, ak: Guest, ek: Guest) -> Keys:
    return Keys(
        ak_public=scene.file(f"{ak.name}.vak").read_bytes(),
        ek_public=scene.file(f"{ek.name}.ek").read_bytes(),
        ek_cert=scene.file(f"{ek.name}.cert").read_bytes(),
    )


async def register(scene: Scene, agent_id: str, tpm: GuestTpm) -> State:
    report = await make(tls(scene.registrar), agent_id, tpm).once()
    for step in report.steps:
        scene.tale.say(f"{step.name}: {step.text}")
    return report.state


async def bind_the_vak(scene: Scene) -> None:
    scene.tale.part(
        "vAK -> EK of the vTPM: credential activation, by Keylime's registrar, in the guest"
    )
    for guest in (scene.web, scene.other):
        tpm = GuestTpm(guest=guest, identity=keys_of(scene, ak=guest, ek=guest))
        assert await register(scene, str(guest.vm), tpm) is State.REGISTERED
        take_record(scene, guest)
    for agent_id, why, ak, ek in (
        ("mixed-1", "web's vAK with the other VM's EK", scene.web, scene.other),
        ("mixed-2", "web's EK with the other VM's vAK", scene.other, scene.web),
    ):
        scene.tale.part(f"broken: {why}, registered from within web")
        tpm = GuestTpm(guest=scene.web, identity=keys_of(scene, ak=ak, ek=ek))
        # libtpms 0.9 answers FAILURE to what is encrypted for another RSA key, and goes on.
        assert await register(scene, agent_id, tpm) in (State.WRONG_CHALLENGE, State.NO_TPM)
        assert record_of(scene.registrar, agent_id) is None


def take_record(scene: Scene, guest: Guest) -> None:
    """From here on the tenant's files are what its registrar has activated."""
    record = record_of(scene.registrar, str(guest.vm))
    assert record is not None
    for what, key in (("ek", "ek_tpm"), ("vak", "aik_tpm")):
        data = base64.b64decode(record[key])
        assert data == scene.file(f"{guest.name}.{what}").read_bytes()
        scene.file(f"{guest.name}.{what}").write_bytes(data)


# --- certificates -----------------------------------------------------------------------------------


async def check_certificates(scene: Scene) -> None:
    tenant, tale = scene.tenant, scene.tale
    tale.part("the EK certificates in the guest's NV memory, by the CA in the host's TPM")
    store = scene.file("store")
    if not store.exists():
        said = await tenant.run(f"vtpm-ca fetch URL {PINNED} --out", store / "ca.pem")
        tale.say(said)
    for cert, ek in (("cert", "ek"), ("cert2", "ek2")):
        line = f"vtpm-ca check store/ca.pem {PINNED} --ek-cert web.{cert} --ek web.{ek} --vm {VM}"
        tale.say((await tenant.run(line)).splitlines()[-1])
        pem = x509.load_der_x509_certificate(scene.file(f"web.{cert}").read_bytes())
        scene.file("web.pem").write_bytes(pem.public_bytes(Encoding.PEM))
        words = ("openssl", "verify", "-x509_strict", "-CAfile", store / "ca.pem")
        done = await trio.run_process([*words, scene.file("web.pem")], capture_stdout=True)
        tale.say(f"openssl verify: {done.stdout.decode().rpartition(': ')[2].strip()}")
        await trio.run_process(
            [PYTHON, "-c", VERIFY_CERT, scene.file(f"web.{cert}"), store],
            env=keylime_environment(tenant.folder),
            capture_stderr=True,
        )
        tale.say("Keylime's cert_utils.verify_ek: good")
    check = f"vtpm-ca check store/ca.pem {PINNED}"
    await scene.refused(
        "certificate: the other VM's, for this EK",
        f"{check} --ek-cert other.cert --ek web.ek --vm {VM}",
        "EkCertificateError",
    )
    await scene.refused(
        "certificate: the other VM's with its EK, for this VM",
        f"{check} --ek-cert other.cert --ek other.ek --vm {VM}",
        "EkCertificateError",
    )
    await scene.refused(
        "CA: under another AK",
        f"vtpm-ca check store/ca.pem --ak-tpm web.vak --ek-cert web.cert --ek web.ek --vm {VM}",
        "UntrustedCaError",
    )


# --- link and deep quote ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Deep:
    """What judges a deep quote; each part can be another's."""

    nonce: str
    quote: str = "web.quote"
    evidence: str = "evidence.json"
    request: str = "request.json"
    vm: str = str(VM)
    ek: str = "web.ek"
    vak: str = "web.vak"
    host: str = PINNED
    host_policy: str = "host.json"
    guest_policy: str = "guest.json"

    @property
    def asked(self) -> str:
        return f"--vtpm-quote {self.quote} --vtpm-nonce {self.nonce}"

    @property
    def line(self) -> str:
        return (
            f"verify-link files {self.evidence} --request {self.request} {self.host}"
            f" --tpm-policy {self.host_policy} --vm {self.vm} --ek {self.ek} --least confirmed"
            f" --ek-issuer tpm {self.asked} --vak {self.vak} --vtpm-policy {self.guest_policy}"
        )


async def vtpm_quote(scene: Scene, guest: Guest) -> str:
    """A quote of the guest's over a fresh nonce, in a file; the nonce."""
    nonce = secrets.token_hex(20)
    scene.file(f"{guest.name}.quote").write_bytes(await guest.ask("quote", nonce))
    return nonce


async def ask_the_host(scene: Scene, deep: Deep, *, code: int = GOOD) -> str:
    return await scene.tenant.run(f"fetch URL --pcrs 0 {PINNED} --vm {VM} {deep.asked}", code=code)


async def deep_quote(scene: Scene) -> Deep:
    """The guest's quote, the host's over it, and both judged."""
    deep = Deep(nonce=await vtpm_quote(scene, scene.web))
    await ask_the_host(scene, deep)
    scene.tale.say(await scene.tenant.run(deep.line))
    return deep


async def by_keylime_s_tenant(scene: Scene, word: str, *, good: bool = True) -> None:
    """Keylime's own tenant, with `ek-check` as its script, before it hands over V."""
    scene.file("policy.json").write_text(scene.file("host.json").read_text())
    scene.tenant.write_map()
    folder, ek = scene.tenant.folder, scene.file("web.ek").read_bytes()
    words = ("ek-check", "--config", str(scene.file("map.toml")))
    with trio.fail_after(3 * LIMIT_S):
        code, said = await keylime_tenant(folder, str(VM), ek, *words)
    assert (code, word in said) == (GOOD if good else KEYLIME_REFUSES, True), said
    (line,) = [line for line in said.splitlines() if word in line][-1:]
    if good:
        scene.tale.say(f"Keylime's own tenant: {line}")
    else:
        scene.tale.refused("Keylime's own tenant", line)


async def check_link(scene: Scene) -> None:
    scene.tale.part("guest's quote -> vAK -> EK -> claims -> leaf -> host's quote, PCRs of both")
    await deep_quote(scene)
    await by_keylime_s_tenant(scene, "linked: VM")


async def check_what_is_broken(scene: Scene) -> None:
    scene.tale.part("the same with one link broken")
    nonce = await vtpm_quote(scene, scene.web)
    deep = Deep(nonce=nonce)
    change = partial(Deep, nonce=nonce)
    await scene.refused("host's quote: from before the guest's", deep.line, "DeepNonceError")
    await ask_the_host(scene, deep)
    await scene.tenant.run(deep.line)
    alter_claims(scene)
    altered = change(evidence="altered.json", request="altered-request.json", ek="other.ek")
    for why, broken, error in (
        ("guest's PCR 8", change(guest_policy="other-guest.json"), "VtpmQuoteError"),
        ("guest's quote: another vAK's", change(vak="other.vak"), "VtpmQuoteError"),
        ("guest's quote: for another nonce", Deep(nonce=secrets.token_hex(20)), "VtpmQuoteError"),
        ("EK: the other VM's", change(ek="other.ek"), "EkNotLinkedError"),
        ("claims: the other VM's EK written in", altered, "QualifyingDataError"),
        ("host's PCR 0", change(host_policy="other-host.json"), "PolicyError"),
        ("host's AK: the vAK in its place", change(host="--ak-tpm web.vak"), "SignatureError"),
    ):
        await scene.refused(why, broken.line, error)
    stranger = change(vm=str(OTHER_VM))
    await scene.refused("VM: another than was asked for", stranger.line, "not asked", code=USAGE)
    await scene.refused(
        "host's EK: a vTPM's in its place",
        f"{pin_line(scene, 'beta')} --ek-tpm web.ek",
        "UntrustedEkError",
    )
    relayed = Deep(
        nonce=await vtpm_quote(scene, scene.other),
        quote="other.quote",
        ek="other.ek",
        vak="other.vak",
    )
    await ask_the_host(scene, relayed)
    await scene.refused(
        "relay: the other VM answers with its own vTPM", relayed.line, "EkNotLinkedError"
    )
    line = f"fetch URL --pcrs 0 {PINNED} --vm {OTHER_VM}"
    await scene.refused("claims: about a VM that is not the tenant's", line, "404", code=AWAY)


def alter_claims(scene: Scene) -> None:
    """What a hostile proxy could have answered: the other VM's EK in the place of this one's."""
    evidence = json.loads(scene.file("evidence.json").read_text())
    claims = base64.b64decode(evidence["results"]["claims"]).decode()
    ours, theirs = (
        ek_digest(scene.file(f"{name}.ek").read_bytes()).hex() for name in ("web", "other")
    )
    assert ours in claims
    evidence["results"]["claims"] = base64.b64encode(claims.replace(ours, theirs).encode()).decode()
    body = json.dumps(evidence).encode()
    scene.file("altered.json").write_bytes(body)
    request = json.loads(scene.file("request.json").read_text())
    request["evidence_sha256"] = hashlib.sha256(body).hexdigest()
    scene.file("altered-request.json").write_text(json.dumps(request))


# --- a VM's life ------------------------------------------------------------------------------------


async def refused_while_off(scene: Scene) -> None:
    line = f"fetch URL --pcrs 0 {PINNED} --vm {VM}"
    await scene.refused("claims: the VM does not run", line, "404", code=AWAY)
    await by_keylime_s_tenant(scene, "VmNotRunningError", good=False)


async def save_and_restart(scene: Scene) -> None:
    scene.tale.part("managed save")
    before, boot_id = await scene.web.clock()
    await run("managedsave", "web")
    await refused_while_off(scene)
    scene.tale.part("start: the guest goes on where it was")
    await run("start", "web")
    await scene.host.until_confirmed(VM)
    after, again = await scene.web.clock()
    assert again == boot_id
    scene.tale.say(f"the same boot; its clock: {before} s before, {after} s after")
    await deep_quote(scene)

    scene.tale.part("destroy")
    await run("destroy", "web")
    await refused_while_off(scene)
    scene.tale.part("start: it boots again, with the same vTPM, vAK and EK")
    await run("start", "web")
    await up(scene, scene.web)
    assert (await scene.web.clock())[1] != boot_id
    assert await scene.web.ask("ak") == scene.file("web.vak").read_bytes()
    assert (await scene.host.listed())[VM]["generation"] == 1
    await deep_quote(scene)
    await by_keylime_s_tenant(scene, "linked: VM")

    scene.tale.part("something more is measured into the guest's PCR 8")
    await scene.web.ask("extend", "22" * 32)
    deep = Deep(nonce=await vtpm_quote(scene, scene.web))
    await ask_the_host(scene, deep)
    await scene.refused("the guest's PCRs", deep.line, "VtpmQuoteError")


async def make_anew(scene: Scene) -> None:
    scene.tale.part("undefine, define, start: another vTPM under the same UUID")
    await run("destroy", "web")
    await run("undefine", "web")
    await run("define", scene.file("web.xml"))
    await run("start", "web")
    await up(scene, scene.web)
    assert (await scene.host.listed())[VM]["generation"] == 2
    for what in ("ek", "vak", "cert"):
        shutil.copy(scene.file(f"web.{what}"), scene.file(f"old.{what}"))
    await save_keys(scene, scene.web)
    deep = Deep(nonce=await vtpm_quote(scene, scene.web))
    await ask_the_host(scene, deep)
    old_ek = Deep(nonce=deep.nonce, ek="old.ek")
    await scene.refused(
        "the EK that the registrar activated before", old_ek.line, "EkNotLinkedError"
    )
    old_vak = Deep(nonce=deep.nonce, vak="old.vak")
    await scene.refused(
        "the vAK that the registrar activated before", old_vak.line, "VtpmQuoteError"
    )
    check = f"vtpm-ca check store/ca.pem {PINNED} --ek-cert old.cert --ek web.ek --vm {VM}"
    await scene.refused("the certificate of the old EK for the new", check, "EkCertificateError")

    scene.tale.part(
        "the registrar keeps the old record until the tenant deletes it; then all is new"
    )
    tpm = GuestTpm(guest=scene.web, identity=keys_of(scene, ak=scene.web, ek=scene.web))
    assert await register(scene, str(VM), tpm) is State.CONFLICT
    delete(scene.registrar, str(VM))
    assert await register(scene, str(VM), tpm) is State.REGISTERED
    take_record(scene, scene.web)
    await check_certificates(scene)
    await deep_quote(scene)
    await by_keylime_s_tenant(scene, "linked: VM")
    for name in ("web", "other"):
        await run("destroy", name)
    await refused_while_off(scene)
