"""The host's side of the link as a whole: the real daemon, swtpm_setup as libvirt runs it, the two hooks,
running vTPMs. Needs root, as libvirt does: it runs swtpm as another user, and so does this."""

from __future__ import annotations

import datetime
import hashlib
import json
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from helpers import (
    FakeQuoter,
    Serving,
    connect,
    open_fake,
    quote_target,
    run_command,
    serving,
    trusted_ak,
    until,
    until_answered,
)
from tpm_helpers import tool
from vtpm_helpers import (
    OTHER_VM,
    VM,
    ask,
    certify,
    ecc_key,
)
from vtpm_host import (
    NV_ECC,
    NV_PLATFORM,
    NV_RSA,
    SWTPM_USER,
    Host,
    certificate_in,
    host,
    in_thread,
    localca,
    pytestmark,
    until_stopped,
)

from provider_proxy.evidence.model import TrustedHost
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.verify import MemoryHistory, Verifier, new_challenge
from provider_proxy.host import daemon
from provider_proxy.host.config.load import parse_config
from provider_proxy.host.vtpm.helper import readback
from provider_proxy.host.vtpm.requests import CertificateRequest

__all__ = ["host", "localca", "pytestmark"]  # fixtures, and what must be here to run

NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
SWTPM = ("setpriv", f"--reuid={SWTPM_USER}", "--clear-groups", f"--regid={SWTPM_USER}")
CAP_DAC_READ_SEARCH = 2  # capability.h


def eks_of(tcti: str) -> set[str]:
    """SHA-256 of the SPKI of both EKs, as the VM sees them."""
    found = set()
    for handle in ("0x81010001", "0x81010016"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ek.pem"
            tool(tcti, "tpm2_readpublic", "-c", handle, "-f", "pem", "-o", str(path))
            key = serialization.load_pem_public_key(path.read_bytes())
        found.add(digest(key))
    return found


def digest(key: Any) -> str:
    spki = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def digests(vm: dict[str, Any]) -> set[str]:
    return {ek["spki_sha256"] for ek in vm["eks"]}


# --- the whole, with swtpm_localca's certificates ---------------------------------------------------


async def ask_with_vm(host: Host, vm: uuid.UUID) -> tuple[int, dict[str, Any]]:
    """A tenant's quote with claims, verified; status and claims."""
    ak = await trusted_ak(host.address)
    history = MemoryHistory()
    challenge = new_challenge(mask=1, vm=vm, now_s=time.monotonic(), history=history)
    async with connect(host.address) as wire:
        reply = await wire.get(quote_target(challenge))
    if reply.status != 200:
        return reply.status, reply.envelope()
    quote = Verifier(UnsafeAcceptAny()).verify(
        reply.body, challenge, TrustedHost(ak=ak), history, now_s=time.monotonic()
    )
    assert quote.claims is not None
    return reply.status, dict(quote.claims)


def beside_the_state(host: Host) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in host.libvirt.state(VM).glob("*.crt")}


def in_nv(tcti: str) -> dict[str, bytes]:
    """The EKs' certificates in the vTPM, by the names that their copies have."""
    return {
        name: certificate_in(tcti, index).public_bytes(serialization.Encoding.DER)
        for name, index in (("ek-rsa2048.crt", NV_RSA), ("ek-secp384r1.crt", NV_ECC))
    }


async def test_from_the_first_start_to_the_tenant_s_leaf(host: Host) -> None:
    async with serving(host.folder, host.toml()) as serve:
        with host.helper():
            made = await in_thread(host.make_vtpm)
            assert made.returncode == 0, made.stdout
            listed = (await host.listed())[str(VM)]
            assert (listed["state"], listed["running"], listed["name"]) == (
                "registered",
                False,
                "web",
            )
            nowhere = await ask_with_vm(host, VM)  # it does not run
            assert nowhere[0] == 404
            with host.libvirt.running(VM, user=SWTPM_USER) as tcti:
                listed = await host.until_confirmed()
                in_vm = eks_of(tcti)
                assert digests(listed) == in_vm
                assert beside_the_state(host) == in_nv(tcti)  # swtpm_localca's
                for index, key in ((NV_RSA, rsa.RSAPublicKey), (NV_ECC, ec.EllipticCurvePublicKey)):
                    certificate = certificate_in(tcti, index)
                    assert isinstance(certificate.public_key(), key)
                    assert digest(certificate.public_key()) in in_vm
                status, claims = await ask_with_vm(host, VM)
                assert status == 200
                assert {ek["spki_sha256"] for ek in claims["eks"]} == in_vm
                assert {k: claims[k] for k in claims if k not in ("eks", "registered_at")} == {
                    "vm": str(VM),
                    "running": True,
                    "state": "confirmed",
                    "confirmed": True,
                    "issuer": "delegate",
                    "migrated": False,
                    "generation": 1,
                }
                await shown(host)
                # unknown, foreign and stopped are one answer
                assert await ask_with_vm(host, OTHER_VM) == nowhere
                assert await ask_with_vm(host, uuid.UUID(int=1)) == nowhere
                await refused_while_it_runs(host, in_vm)
            await until_stopped(host)
            assert await ask_with_vm(host, VM) == nowhere
        assert f"uid {pwd.getpwnam('nobody').pw_uid} may not connect" in serve.log
        assert "-----" not in serve.log


async def shown(host: Host) -> None:
    shown = run_command("vms", f"unix:{host.folder}/admin")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "confirmed" in shown.stdout
    as_json = json.loads(
        run_command("vms", f"unix:{host.folder}/admin", "--json").stdout.splitlines()[-1]
    )
    assert as_json["vms"][0]["vm"] == str(VM)


async def refused_while_it_runs(host: Host, in_vm: set[str]) -> None:
    """What the swtpm user, and others, can say of a VM that runs: nothing."""
    assert ask(host.socket, certify(ecc_key()), launcher=NOBODY) == {}
    host.socket.chmod(0o666)  # not the file's mode alone keeps them out
    assert ask(host.socket, certify(ecc_key()), launcher=NOBODY) == {}
    false = ask(host.socket, certify(ecc_key()), launcher=SWTPM)
    assert "being made now" in false["error"]
    # The swtpm user takes away what is its own: nothing of that is what presence rests on.
    for path in (host.libvirt.root / "run").glob("*.pid"):
        path.rename(path.with_suffix(".away"))
    assert "being made now" in ask(host.socket, certify(ecc_key()), launcher=SWTPM)["error"]
    listed = (await host.listed())[str(VM)]
    assert (digests(listed), listed["running"]) == (in_vm, True)


async def test_in_root_s_window_the_tool_s_word_is_held_against_the_state(host: Host) -> None:
    """Between `prepare` and `start`, a process of the swtpm user that says what the state does not."""
    async with serving(host.folder, host.toml()):
        with host.helper():
            assert "being made now" in ask(host.socket, certify(ecc_key()))["error"]
            host.event("prepare", "begin")
            early = ask(host.socket, certify(ecc_key()), launcher=SWTPM)
            assert "cannot be read" in early["error"]  # nothing has been made yet
            made = await in_thread(host.setup_vtpm, VM)
            assert made.returncode == 0, made.stdout
            listed = (await host.listed())[str(VM)]
            false = ask(host.socket, certify(ecc_key()), launcher=SWTPM)
            assert "does not hold this EK" in false["error"]
            assert (await host.listed())[str(VM)] == listed
            host.event("start", "begin")
            assert "being made now" in ask(host.socket, certify(ecc_key()))["error"]
            host.event("prepare", "begin")  # its next start: it has a vTPM
            assert "being made now" in ask(host.socket, certify(ecc_key()))["error"]


async def test_a_copy_an_encrypted_one_and_one_that_was_there_before(host: Host) -> None:
    """Clones, libvirt's state encryption, and a vTPM that was made without the hooks."""
    secret = host.folder / "secret"
    secret.write_text("vtpm-password")
    encrypted = uuid.UUID(int=0xE)
    async with serving(host.folder, host.toml()) as serve:
        with host.helper():
            assert (await in_thread(host.make_vtpm)).returncode == 0
            made = await in_thread(
                host.make_vtpm, encrypted, "--pwdfile", str(secret), "--cipher", "aes-256-cbc"
            )
            assert made.returncode == 0, made.stdout
            shutil.copytree(host.libvirt.state(VM), host.libvirt.state(OTHER_VM))
            for path in host.libvirt.state(OTHER_VM).iterdir():
                shutil.chown(path, SWTPM_USER)
            with host.libvirt.running(VM, user=SWTPM_USER) as tcti:
                original = await host.until_confirmed()
                with (
                    host.libvirt.qemu(OTHER_VM, name="copy"),
                    host.libvirt.qemu(encrypted, name="encrypted"),
                ):

                    async def all_read() -> bool:
                        return "copy of the vTPM of" in serve.log and "is encrypted" in serve.log

                    await until_answered(all_read, "both were read")
                    listed = await host.listed()
                    assert listed[str(VM)] == original
                    assert listed[str(OTHER_VM)]["eks"] == []
                    assert listed[str(encrypted)]["state"] == "registered"
                    assert len(listed[str(encrypted)]["eks"]) == 2
                    assert (await ask_with_vm(host, OTHER_VM))[0] == 404
                # What the guest puts at an EK's handle is not taken for an EK.
                await in_thread(plant, tcti, host.folder / "planted")
            await until_stopped(host)
            with host.libvirt.running(VM, user=SWTPM_USER):
                now = await host.until_confirmed()
                assert [ek["alg"] for ek in now["eks"]] == ["rsa2048"]
    assert not list(host.libvirt.root.rglob(readback.COPY_PREFIX + "*"))


async def test_a_state_that_is_written_is_read_again(host: Host) -> None:
    """Another vTPM under the running VM's nose: the link follows, and says that it was another."""
    async with serving(host.folder, host.toml()) as serve:
        with host.helper():
            assert (await in_thread(host.make_vtpm)).returncode == 0
            assert (await in_thread(host.make_vtpm, OTHER_VM)).returncode == 0
            with host.libvirt.running(VM, user=SWTPM_USER):
                first = await host.until_confirmed()
                state = host.libvirt.state(VM) / readback.STATE_FILE
                copy = state.with_name("copy")
                shutil.copy(host.libvirt.state(OTHER_VM) / readback.STATE_FILE, copy)
                shutil.chown(copy, SWTPM_USER)
                copy.replace(state)

                async def changed() -> bool:
                    return digests((await host.listed())[str(VM)]) != digests(first)

                await until_answered(changed, "the second reading")
                now = (await host.listed())[str(VM)]
                assert (now["generation"], now["issuer"]) == (2, "unknown")
                assert "corrected" in serve.log


def plant(tcti: str, folder: Path) -> None:
    """What a guest's owner can: another key, whose private part it knows, at an EK's handle."""
    folder.mkdir()
    for words in (
        "tpm2_evictcontrol -C o -c 0x81010016",
        "openssl ecparam -name secp384r1 -genkey -noout -out k.pem",
        "tpm2_createprimary -C o -c p.ctx",
        "tpm2_import -C p.ctx -G ecc:aes128cfb -i k.pem -u k.pub -r k.priv"
        " -a restricted|decrypt|userwithauth",
        "tpm2_flushcontext -t",
        "tpm2_load -C p.ctx -u k.pub -r k.priv -c k.ctx",
        "tpm2_evictcontrol -C o -c k.ctx 0x81010016",
    ):
        tool(tcti, *words.split(), cwd=folder)


def test_not_even_a_daemon_of_roots_parses_foreign_state_as_root() -> None:
    """Without capabilities root still owns the host's files."""
    command = readback._command(0)
    program = command.index(str(shutil.which("swtpm")))
    said = subprocess.run([*command[:program], "id", "-u"], capture_output=True, check=True)
    assert said.stdout.strip() == b"65534"


async def test_a_daemon_without_any_right_and_a_helper_with_one(host: Host) -> None:
    """As under systemd: users of their own; the helper may read every file, and nothing else."""
    user, work = "daemon", host.libvirt.root / "work"
    work.mkdir()
    shutil.chown(work, user)
    # Root without capabilities: its files are its own, and the swtpm user's are closed to it.
    bare = ["setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    may_read = "+dac_read_search"
    launcher = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    launcher += [f"--inh-caps={may_read}", f"--ambient-caps={may_read}"]
    launcher.append(f"--bounding-set=-all,{may_read}")
    host.libvirt.root.chmod(0o777)  # where the helper makes its socket; systemd's is made for it
    async with serving(host.folder, host.toml(), launcher=bare) as serve:
        assert "CapPrm:\t0000000000000000" in Path(f"/proc/{serve.process.pid}/status").read_text()
        with host.helper(launcher) as helper:
            (host.libvirt.root / "helper").chmod(0o666)
            status = Path(f"/proc/{helper.pid}/status").read_text()
            assert f"CapPrm:\t{1 << CAP_DAC_READ_SEARCH:016x}" in status
            assert (await in_thread(host.make_vtpm)).returncode == 0
            assert host.socket.stat().st_mode & 0o777 == 0o660  # an ACL: see acl(5)
            with host.libvirt.running(VM, user=SWTPM_USER) as tcti:
                assert digests(await host.until_confirmed()) == eks_of(tcti)
            assert ask(host.socket, certify(ecc_key()), launcher=NOBODY) == {}


# --- kill -9 ----------------------------------------------------------------------------------------


async def kill(serve: Serving) -> None:
    assert await serve.stop(signal.SIGKILL) == -signal.SIGKILL


async def test_kill_9_between_any_two_steps_loses_no_vm(host: Host) -> None:
    """Daemon and helper die before, while and after swtpm_setup runs, around the start, and the stop."""
    folders = iter(host.folder / f"d{n}" for n in range(9))

    @asynccontextmanager
    async def up() -> AsyncIterator[Serving]:
        folder = next(folders)
        folder.mkdir()
        with host.helper() as helper:
            async with serving(folder, host.toml()) as serve:
                yield serve
                helper.kill()

    async with up() as serve:
        await kill(serve)
    results: list[subprocess.CompletedProcess[str]] = []
    async with trio.open_nursery() as nursery:

        async def make() -> None:
            results.append(await in_thread(host.make_vtpm))

        nursery.start_soon(make)  # root's hook needs nobody; the EK's finds nobody, and waits
        await trio.sleep(0.5)
        async with up() as serve:

            async def registered() -> bool:
                return str(VM) in await host.listed()

            await until_answered(registered, "the first EK")
            await kill(serve)  # the platform's or the second EK's hook meets this, or waits again
        async with up() as serve:
            await until(lambda: bool(results), "the end of swtpm_setup")
            assert results[0].returncode == 0, results[0].stdout
            first = (await host.listed())[str(VM)]
            assert len(first["eks"]) == 2
            await kill(serve)
    with host.libvirt.running(VM, user=SWTPM_USER) as tcti:  # nobody sees it begin
        async with up() as serve:
            listed = await host.until_confirmed()
            assert (digests(listed), listed["generation"]) == (eks_of(tcti), 1)
            assert listed["registered_at"] == first["registered_at"]
            await kill(serve)
        async with up() as serve:
            listed = await host.until_confirmed()
            assert (listed["running"], listed["eks"]) == (True, first["eks"])
            assert (await ask_with_vm(host, VM))[0] == 200
            await kill(serve)
    async with up():  # nor end
        listed = (await host.listed())[str(VM)]
        assert (listed["running"], listed["eks"]) == (False, first["eks"])
        assert (await ask_with_vm(host, VM))[0] == 404


# --- the host's own certificates --------------------------------------------------------------------


class FakeIssuer:
    """Certifies with a key of its own; the real one is the CA in the host's TPM."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.requests: list[CertificateRequest] = []

    async def issue(self, request: CertificateRequest) -> bytes:
        self.requests.append(request)
        now = datetime.datetime.now(datetime.UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, request.vmid)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(request.public_key)
            .serial_number(len(self.requests))
            .not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.DER)


async def test_certificates_of_the_host_end_in_the_vtpm(host: Host) -> None:
    issuer = FakeIssuer()
    config = parse_config(tomllib.loads(host.toml(more='issuer = "tpm"\n')))

    async def open_issuer(*_: object) -> FakeIssuer:
        return issuer

    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(
                daemon.run, config, open_quoter=open_fake(FakeQuoter()), open_issuer=open_issuer
            )
        )
        with host.helper():
            made = await in_thread(host.make_vtpm)
        assert made.returncode == 0, made.stdout
        listed = (await host.listed())[str(VM)]
        assert listed["issuer"] == "tpm"
        nursery.cancel_scope.cancel()
    assert [request.kind for request in issuer.requests] == ["ek", "platform", "ek"]
    with host.libvirt.running(VM, user=SWTPM_USER) as tcti:
        in_vm = eks_of(tcti)
        assert beside_the_state(host) == in_nv(tcti)
        for number, index in enumerate((NV_RSA, NV_PLATFORM, NV_ECC), 1):
            certificate = certificate_in(tcti, index)
            assert certificate.serial_number == number
            assert digest(certificate.public_key()) in in_vm
            issuer.key.public_key().verify(
                certificate.signature, certificate.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256())
            )
    assert digests(listed) == in_vm


async def test_a_vm_s_start_fails_in_words(host: Host) -> None:
    """Without a daemon, as libvirt's log of the VM then has it."""
    host.config.write_text(host.config.read_text() + "limit_s = 0.3\n")
    made = await in_thread(host.make_vtpm)
    assert made.returncode != 0
    assert f"provider-proxy-ekhook: VM web:{VM} gets no EK certificate" in made.stdout
