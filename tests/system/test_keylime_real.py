"""Stock Keylime beside us, all of it real: registrar, verifier and tenant from PyPI, a daemon on a swtpm
that registers itself, and our commands: `keylime-check`, `ek-check`, and docs/tenants.md as it stands."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

import httpx
import keylime_trial
import pytest
import trio
from docs_helpers import code, fenced, read, rows
from evidence_factory import VM
from helpers import LIMIT_S, command, free_port, make_certs, until_answered
from keylime_helpers import KeylimeVerifier as RealVerifier
from keylime_helpers import Registrar, running_registrar, running_verifier
from keylime_rig import Keylime
from link_claims import EK
from tenant_of_keylime import KEYLIME_REFUSES, keylime_tenant
from tpm_helpers import daemon_over, plain_config, swtpm_at, tool

from provider_proxy.common.settings.values import IDENTITY_RE, read_identities
from provider_proxy.errors import (
    KeylimeRefusedError,
    LogError,
    PolicyError,
    SignatureError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence.model import HashAlg, TrustedHost, VerifiedQuote
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import MemoryHistory, Verifier
from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.host.config.tables import Config, Logs, TenantRules
from provider_proxy.tenant import ek_check, hosts_file
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.keylime import (
    KeylimePolicies,
    KeylimeVerifier,
    RegisteredHost,
    check_host,
)
from provider_proxy.tenant.watch.tables import BridgeTable
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.pins import PinStore

pytestmark = pytest.mark.real

GOOD, REFUSED, USAGE, ENVIRONMENT = 0, 1, 2, 3
IMA_LINES = [("/usr/bin/one", b"one"), ("/usr/bin/two", b"two")]
AGENT_ID = "host-17"


def text(values: object) -> str:
    return json.dumps(values)


# --- the real verifier ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A tenant's Keylime."""

    registrar: Registrar
    verifier: RealVerifier


@pytest.fixture(scope="module")
def tenant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    with (
        running_registrar(tmp_path_factory.mktemp("keylime")) as registrar,
        running_verifier(registrar, settings={"enable_agent_mtls": "True"}) as verifier,
    ):
        yield Tenant(registrar=registrar, verifier=verifier)


def ima_entry(path: str, content: bytes) -> tuple[str, bytes]:
    """A line of an ima-ng list, and what the kernel extends PCR 10's SHA-256 bank with."""
    digest = b"sha256:\0" + sha256(content).digest()
    name = path.encode() + b"\0"
    template = struct.pack("<I", len(digest)) + digest + struct.pack("<I", len(name)) + name
    line = f"10 {sha1(template).hexdigest()} ima-ng sha256:{sha256(content).hexdigest()} {path}\n"
    return line, sha256(template).digest()


def runtime_policy(entries: list[tuple[str, bytes]]) -> str:
    return text(
        {
            "meta": {"version": 1, "generator": 0},
            "release": 0,
            "digests": {path: [sha256(content).hexdigest()] for path, content in entries},
            "excludes": [],
            "keyrings": {},
            "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
            "ima-buf": {},
            "verification-keys": "",
        }
    )


@asynccontextmanager
async def host(tmp_path: Path) -> AsyncIterator[tuple[str, dict[int, str]]]:
    """A daemon on a swtpm whose kernel has run two programs; its URL and its PCRs."""
    ima = tmp_path / "ima"
    with swtpm_at(tmp_path / "tpm") as chip:
        with ima.open("w") as lines:
            for path, content in IMA_LINES:
                line, digest = ima_entry(path, content)
                lines.write(line)
                tool(chip.tcti, "tpm2_pcrextend", f"10:sha256={digest.hex()}")
        tool(chip.tcti, "tpm2_pcrextend", f"4:sha256={'ab' * 32}")
        values = {4: sha256(bytes(32) + b"\xab" * 32).hexdigest(), 0: "00" * 32}
        config = replace(
            plain_config(tmp_path / "state", chip.tcti),
            logs=Logs(ima=ima, uefi=tmp_path / "none"),
            tenant_defaults=TenantRules(pcr_allow=0xFFFFFF),
        )
        async with daemon_over(config) as started:
            yield f"http://{started.addresses[0]}", values


async def judged(
    tenant: Tenant, url: str, policies: KeylimePolicies, *, ak_public: bytes | None = None
) -> VerifiedQuote:
    async with (
        httpx.AsyncClient(trust_env=False) as http,
        httpx.AsyncClient(
            verify=tenant.registrar.client_context(), trust_env=False, timeout=30
        ) as keylime,
    ):
        proxy = ProxyClient(http, url)
        identity = await proxy.identity()
        ak_public = ak_public or identity.ak_public
        with trio.fail_after(LIMIT_S):
            return await check_host(
                proxy,
                RegisteredHost(
                    host=TrustedHost(ak=parse_ak(ak_public)),
                    history=MemoryHistory(),
                    ek_public=identity.ek_public,
                    ak_public=ak_public,
                ),
                Verifier(UnsafeAcceptAny()),
                KeylimeVerifier(keylime, tenant.verifier.url),
                policies,
            )


async def test_the_real_verifier_and_the_policies_that_it_has(
    tenant: Tenant, tmp_path: Path
) -> None:
    async with host(tmp_path) as (url, values):
        tpm = text({str(pcr): [value] for pcr, value in values.items()})
        verified = await judged(tenant, url, KeylimePolicies(tpm=tpm))
        assert verified.pcrs[4].hex() == values[4]
        assert verified.bank is HashAlg.SHA256

        wrong = text({"4": ["00" * 32]})
        with pytest.raises(KeylimeRefusedError, match="invalid_pcr_4") as refused:
            await judged(tenant, url, KeylimePolicies(tpm=wrong))
        assert isinstance(refused.value, VerificationError)
        assert refused.value.check == PolicyError.check

        good = KeylimePolicies(tpm=tpm, runtime=runtime_policy(IMA_LINES))
        assert 10 in (await judged(tenant, url, good)).pcrs
        # Ours judges the list first, and reads the policy before anybody is asked.
        with pytest.raises(LogError, match="is not in the runtime policy"):
            await judged(tenant, url, KeylimePolicies(runtime=runtime_policy(IMA_LINES[:1])))
        with pytest.raises(UsageError, match="does not know it"):
            KeylimePolicies(runtime='{"no": "policy"}')
        # A part that is missing allows nothing here; Keylime does not take such a policy.
        digests = json.loads(runtime_policy(IMA_LINES))["digests"]
        with pytest.raises(KeylimeRefusedError, match="Quote validation failed"):
            await judged(tenant, url, KeylimePolicies(runtime=text({"digests": digests})))

        with pytest.raises(SignatureError):
            await judged(tenant, url, good, ak_public=SoftTpm().ak_public)


# --- keylime-check ----------------------------------------------------------------------------------


class Checked:
    """A host that has registered itself, another that has not, and the tenant's commands."""

    def __init__(self, tenant: Tenant, folder: Path, url: str, other_url: str) -> None:
        self.tenant = tenant
        self.folder = folder
        self.url = url
        self.other_url = other_url
        self.policy("good.json", "00" * 32)
        self.policy("wrong.json", "11" * 32)

    def policy(self, name: str, value: str) -> None:
        (self.folder / name).write_text(text({"0": [value]}))

    async def run(
        self, url: str, *more: str, policy: str = "good.json", agent: str = AGENT_ID, ca: str = ""
    ) -> tuple[int, list[str]]:
        """`keylime-check`; its exit code and its lines, of both streams."""
        registrar, verifier = self.tenant.registrar, self.tenant.verifier
        words: list[str | Path] = [
            *("keylime-check", url, "--pinned", agent, "--pins", "pins"),
            *("--registrar", registrar.https_url, "--registrar-ca", registrar.ca),
            *("--registrar-cert", registrar.client_cert, "--registrar-key", registrar.client_key),
            *("--verifier", verifier.url, "--verifier-ca", ca or verifier.ca),
            *("--insecure-no-ek", "--tpm-policy", policy),
        ]
        with trio.fail_after(LIMIT_S):
            done = await trio.run_process(
                command(*words, *more),
                cwd=self.folder,
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return done.returncode, done.stdout.decode().splitlines()


@asynccontextmanager
async def registered(tenant: Tenant, tmp_path: Path) -> AsyncIterator[Checked]:
    """Two daemons; the first has registered itself at the tenant's registrar."""
    mine = tenant.registrar
    table = RegistrarTable(
        url=mine.https_url,
        ca=mine.ca,
        client_cert=mine.client_cert,
        client_key=mine.client_key,
        agent_id=AGENT_ID,
    )
    config = replace(plain_config(tmp_path / "one"), registrars={"acme": table})
    async with httpx.AsyncClient(verify=mine.client_context(), trust_env=False) as http:

        async def is_registered() -> bool:
            await trio.sleep(0.05)
            answer = await http.get(f"{mine.https_url}/v2.6/agents/{AGENT_ID}")
            return answer.status_code == 200

        # The tenants' session on the page registers another TPM under this id, and leaves it.
        await http.delete(f"{mine.https_url}/v2.6/agents/{AGENT_ID}")
        try:
            async with two_daemons(config, plain_config(tmp_path / "two")) as (url, other_url):
                await until_answered(is_registered, "the registration")
                yield Checked(tenant, tmp_path, url, other_url)
        finally:
            # Once the daemon has ended: it would register itself again.
            await http.delete(f"{mine.https_url}/v2.6/agents/{AGENT_ID}")


@asynccontextmanager
async def two_daemons(first: Config, second: Config) -> AsyncIterator[tuple[str, str]]:
    async with daemon_over(first) as one, daemon_over(second) as two:
        yield f"http://{one.addresses[0]}", f"http://{two.addresses[0]}"


@asynccontextmanager
async def tampering(url: str, spoil: Callable[[Any], None]) -> AsyncIterator[str]:
    """A proxy in between, which changes the results of each answer."""

    async def serve(stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some(4096)
        target = head.split(b" ")[1].decode("ascii")
        async with httpx.AsyncClient(trust_env=False) as http:
            values = (await http.get(url + target)).json()
        spoil(values["results"])
        body = json.dumps(values).encode()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")
        await stream.send_all(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


def spoil_path(results: Any) -> None:
    first = results["merkle"]["path"][0]
    results["merkle"]["path"][0] = f"{int(first[0], 16) ^ 1:x}{first[1:]}"


async def test_one_verdict_of_two_judges(tenant: Tenant, tmp_path: Path) -> None:
    async with registered(tenant, tmp_path) as checked:
        code, lines = await checked.run(checked.url)
        assert (code, lines[-3:]) == (
            GOOD,
            [
                "ours:    good: fresh quote of PCRs 0, signed by the registered AK",
                "keylime: good",
                "verdict: good",
            ],
        )
        assert "no EK certificate is checked" in lines[0]

        code, lines = await checked.run(checked.url, "--pcrs", "7", policy="wrong.json")
        assert code == REFUSED
        assert lines[-3] == "ours:    good: fresh quote of PCRs 0, 7, signed by the registered AK"
        assert lines[-2].startswith("keylime: refused: pcr_validation.invalid_pcr_0: {")
        assert lines[-1] == "verdict: refused"

        async with tampering(checked.url, spoil_path) as between:
            code, lines = await checked.run(between)
        assert code == REFUSED
        assert lines[-3].startswith("ours:    refused: QualifyingDataError: ")
        assert lines[-2:] == ["keylime: not asked", "verdict: refused"]

        code, lines = await checked.run(checked.other_url, "--json")
        values = json.loads(lines[-1])
        assert (code, values["verdict"]) == (REFUSED, "refused")
        assert values["ours"]["error"] == "SignatureError"
        assert values["keylime"] == {"state": "not asked", "error": None, "reasons": []}
        assert values["agent_id"] == AGENT_ID

        code, lines = await checked.run(checked.url, agent="nobody")
        assert code == REFUSED
        assert lines[-3].startswith("ours:    refused: NotRegisteredError: ")
        assert PinStore(tmp_path / "pins").labels() == [AGENT_ID]


async def test_without_both_words_there_is_no_verdict(tenant: Tenant, tmp_path: Path) -> None:
    async with registered(tenant, tmp_path) as checked:
        code, lines = await checked.run("http://127.0.0.1:1")
        assert code == ENVIRONMENT
        assert lines[-3].startswith("ours:    no answer: ")
        assert lines[-2:] == ["keylime: not asked", "verdict: none"]
        (tmp_path / "other").mkdir()
        other = make_certs(tmp_path / "other").ca_file
        code, lines = await checked.run(checked.url, ca=str(other))
        assert code == ENVIRONMENT
        assert lines[-3].startswith("ours:    good")
        assert "its certificate is not valid" in lines[-2]
        assert lines[-1] == "verdict: none"
        code, lines = await checked.run(checked.url, "--ek-ca", "pins")
        assert (code, "it decides whether the EK is the host's" in lines[-1]) == (USAGE, True)


# --- ek-check -----------------------------------------------------------------------------------------


async def test_keylime_s_tenant_asks_about_a_real_host(tmp_path: Path) -> None:
    """A host without claims: its state alone is judged, before V would be handed over."""
    async with daemon_over(plain_config(tmp_path / "state")) as started:
        url = f"http://{started.addresses[0]}"
        async with httpx.AsyncClient(trust_env=False) as http:
            ak_public = (await ProxyClient(http, url).identity()).ak_public
        PinStore(tmp_path / "pins").pin("gamma", ak_public)
        (tmp_path / "tenant.toml").write_text(
            f'pins = "pins"\n[hosts.gamma]\nurl = "{url}"\nclaims = "never"\n'
            f'tpm_policy = "gamma.json"\n[agents.{VM}]\nhosts = ["gamma"]\n'
        )
        words = ("ek-check", "--config", str(tmp_path / "tenant.toml"))
        for value, code, word in (
            ("00", 0, "NOT linked"),
            ("11", KEYLIME_REFUSES, "PolicyError"),
        ):
            (tmp_path / "gamma.json").write_text(text({"0": [value * 32]}))
            got, said = await keylime_tenant(tmp_path, str(VM), EK, *words)
            assert (got, word in said) == (code, True), said


# --- docs/tenants.md ----------------------------------------------------------------------------------

DOC = "docs/tenants.md"


def test_documented_session_runs(tenant: Tenant, tmp_path: Path) -> None:
    registrar = tenant.registrar
    with httpx.Client() as http:
        keylime = Keylime(registrar.directory, registrar, tenant.verifier, http, "v2.6")
        keylime_trial.put_beside(keylime, tmp_path)
    script = "".join(block for block in fenced(DOC, "sh") if ".example" not in block)
    ports = {"8890": free_port(), "8895": free_port(), "8891": registrar.tls_port}
    first_port = next(port for port in iter(free_port, 0) if port < BridgeTable().last_port)
    ports |= {"8897": free_port(), "20000": first_port}
    for port, ours in {**ports, "8881": tenant.verifier.port}.items():
        script = script.replace(port, str(ours))
    script = script.replace("sleep 1", "sleep 0.1")
    process = subprocess.Popen(
        ["sh", "-c", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:  # the group is this script's alone
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
    assert process.returncode == 0, output
    shown = [block for block in fenced(DOC, "") if not block.startswith("#!")]
    assert len(shown) == 5
    at = 0
    for block in shown:
        assert block in output[at:], output
        at = output.index(block, at)


def test_documented_forms_of_identities_are_the_code_s() -> None:
    listed = rows(DOC, "Form", "From", "Example")
    examples = [code(row[2]) for row in listed]
    assert list(read_identities("key", examples)) == examples
    assert [code(row[0]) for row in listed] == [
        f"{re.split('[:]', example)[0]}:{'//' if '//' in example else ''}…" for example in examples
    ]
    assert {example.partition(":")[0] for example in examples} == set(
        re.findall(r"(\w+):", IDENTITY_RE.pattern)
    )


def test_documented_retries_are_the_code_s() -> None:
    *most, last = map(str, ek_check.PASSING)
    text_ = read(DOC)
    assert f"the statuses {', '.join(most)} and {last}" in text_
    assert f"`limit_s` ({hosts_file.DEFAULT_LIMIT_S:g} s where" in text_
