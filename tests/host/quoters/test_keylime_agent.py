"""The quoter over a Keylime agent: its errors, its logs, what it refuses; and the real agent's ways."""

from __future__ import annotations

import gc
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import trio
from agent_helpers import Agent, binding_of, running_agent
from cryptography.hazmat.primitives.asymmetric import rsa
from helpers import LIMIT_S, Asker, logs_in, until
from keylime_helpers import Registrar, running_registrar
from tpm_helpers import errors_counted, tool

from provider_proxy.errors import AkChangedError, HostError, QuoteError
from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import (
    ClockState,
    HashAlg,
    HostLogs,
    QuoteRequest,
    Tenant,
    parse_mask,
    parse_nonce,
)
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.wire import encode_quote
from provider_proxy.host import daemon
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.chip_tables import KeylimeAgent, QuoterTable, Tpm
from provider_proxy.host.config.tables import Config, Listen
from provider_proxy.host.logs import ima_list
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import agent_binding, agent_http, circuit, keylime_agent
from provider_proxy.host.quoters.agent_http import AgentClient, AgentError, AgentReply
from provider_proxy.host.quoters.keylime_agent import AgentBinding, AgentLogs, AgentQuoter
from provider_proxy.host.quoters.tpm_opener import HostIdentity, uuid_of_ek
from provider_proxy.host.tpm import response_codes
from provider_proxy.host.tpm.response_codes import Step
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.pins import PinStore

QUALIFYING = b"abcdefghijklmnopqrstuvwxyz234567"
SHA256 = HashAlg.SHA256
RSA = rsa.generate_private_key(65537, 2048)
IMA_PCR = 10
OK = 200

Answer = Callable[[httpx.Request], httpx.Response]


def envelope(status: int, text: str = "Success", **results: object) -> httpx.Response:
    return httpx.Response(status, json={"code": status, "status": text, "results": results})


class FakeAgent:
    """An agent as its API says, over a software TPM. `next` answers what comes, in order, instead.

    Attributes:
        paths: of the requests that came.
        ima: lines of the host's IMA list.
    """

    def __init__(self) -> None:
        self.tpm = SoftTpm(key=RSA, pcrs={0: b"boot"})
        self.paths: list[str] = []
        self.next: list[Answer | Exception] = []
        self.ima: list[str] = []
        self.versions: dict[str, object] = {"supported_version": "2.1"}
        self.client_count = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.raw_path.decode("ascii"))
        if request.url.path == "/version":
            return envelope(200, "Success", **self.versions)
        if self.next:
            answer = self.next.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer(request)
        return self.quote(request)

    def quote(self, request: httpx.Request, **more: object) -> httpx.Response:
        params = request.url.params
        quote = self.tpm.quote(
            params["nonce"].encode("ascii"), SHA256, int(params["mask"], 16) | 1 << 16
        )
        results: dict[str, object] = {"quote": encode_quote(quote), "hash_alg": "sha256"}
        entry = int(params["ima_ml_entry"])
        if self.ima:
            entry = entry if entry <= len(self.ima) else 0
            results["ima_measurement_list"] = "".join(self.ima[entry:])
            results["ima_measurement_list_entry"] = entry
        return envelope(200, "Success", **(results | more))

    async def bind(self) -> AgentBinding:
        self.client_count += 1
        return AgentBinding(
            ak=self.tpm.ak,
            identity=HostIdentity(
                ak_public=self.tpm.ak_public,
                ek_public=b"",
                ek_cert=None,
                host_uuid=uuid.UUID(int=1),
                software=True,
            ),
            client=AgentClient("https://agent.example", None, transport=httpx.MockTransport(self)),
        )


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> FakeAgent:
    monkeypatch.setattr(circuit, "PROBE_S", 0.01)
    for step in (Step.AGAIN, Step.CLEAN, Step.SLOW):
        monkeypatch.setitem(response_codes.FIRST_WAIT_S, step, 0.001)
        monkeypatch.setitem(response_codes.LONGEST_WAIT_S, step, 0.002)
    return FakeAgent()


@asynccontextmanager
async def opened(agent: FakeAgent, metrics: Metrics | None = None) -> AsyncIterator[AgentQuoter]:
    with trio.fail_after(LIMIT_S):
        async with keylime_agent.open_quoter(agent.bind, 1.0, metrics or Metrics()) as quoter:
            yield quoter


# --- the request ------------------------------------------------------------------------------------


async def test_what_is_asked(agent: FakeAgent) -> None:
    async with opened(agent) as quoter:
        agent.paths.clear()
        quote = await quoter.quote(QUALIFYING, SHA256, 0x401)
    assert agent.paths == [
        "/v2.1/quotes/integrity?nonce=abcdefghijklmnopqrstuvwxyz234567&mask=0x401&partial=1&ima_ml_entry=0"
    ]
    attest = attestation.parse_attest(quote.attest)
    assert attest.extra_data == QUALIFYING
    assert attest.mask == 0x10401


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({"supported_version": "2.1"}, "2.1"),
        ({"supported_version": "2.6", "supported_versions": ["2.1", "2.2", "2.6"]}, "2.6"),
        ({"supported_version": "3.0", "supported_versions": ["2.4", "3.0", "2.3"]}, "2.4"),
        ({"supported_version": "2.2", "supported_versions": [None, 7, "x"]}, "2.2"),
    ],
)
async def test_the_newest_version_that_both_speak(
    agent: FakeAgent, versions: dict[str, object], chosen: str
) -> None:
    agent.versions = versions
    async with opened(agent):
        assert agent.paths[1].startswith(f"/v{chosen}/")


async def test_no_version_in_common(agent: FakeAgent) -> None:
    agent.versions = {"supported_version": "1.0", "supported_versions": ["1.0", "9.9"]}
    with pytest.raises(HostError, match="supports none of the API versions"):
        async with opened(agent):
            pass


async def test_an_agent_that_was_replaced_is_asked_its_version_again(agent: FakeAgent) -> None:
    async with opened(agent) as quoter:
        agent.versions = {"supported_version": "2.5"}
        agent.next = [lambda _: envelope(400, "API version not supported: v2.1")]
        await quoter.quote(QUALIFYING, SHA256, 1)
    assert agent.paths[-2:][0] == "/version"
    assert agent.paths[-1].startswith("/v2.5/")


async def test_another_bank_is_refused_before_it_is_asked_for(agent: FakeAgent) -> None:
    async with opened(agent) as quoter:
        agent.paths.clear()
        with pytest.raises(QuoteError):
            await quoter.quote(QUALIFYING, HashAlg.SHA1, 1)
    assert agent.paths == []


# --- errors -----------------------------------------------------------------------------------------

PASSING: dict[str, tuple[Answer | Exception, str, Step]] = {
    "408": (lambda _: envelope(408, "timeout"), "HTTP_408", Step.AGAIN),
    "500": (lambda _: envelope(500, "Unable to retrieve quote"), "HTTP_500", Step.AGAIN),
    "503": (lambda _: envelope(503, "busy"), "HTTP_503", Step.SLOW),
    "429": (lambda _: envelope(429, "slowly"), "HTTP_429", Step.SLOW),
    "connection": (httpx.ConnectError("refused"), "IO", Step.CLEAN),
    "cut": (httpx.RemoteProtocolError("cut"), "IO", Step.CLEAN),
    "late": (httpx.ReadTimeout("late"), "IO", Step.CLEAN),
    "location": (httpx.InvalidURL("mailto:x"), "IO", Step.CLEAN),
    "punycode": (UnicodeError("http://xn--/"), "IO", Step.CLEAN),
    "no json": (lambda _: httpx.Response(200, content=b"<html>"), "UNREADABLE", Step.CLEAN),
    "no quote": (lambda _: envelope(200, quote="r:"), "UNREADABLE", Step.CLEAN),
    "no results": (lambda _: httpx.Response(200, json={"results": []}), "UNREADABLE", Step.CLEAN),
}


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("name", PASSING)
async def test_what_passes_is_not_told(agent: FakeAgent, name: str, times: int) -> None:
    answer, cause, step = PASSING[name]
    metrics = Metrics()
    async with opened(agent, metrics) as quoter:
        agent.next = [answer] * times
        quote = await quoter.quote(QUALIFYING, SHA256, 1)
        assert attestation.parse_attest(quote.attest).extra_data == QUALIFYING
        assert quoter.state.trouble is None
    assert errors_counted(metrics) == {(cause, step.value): times}


def tampered(agent: FakeAgent, request: httpx.Request, change: str) -> httpx.Response:
    params = request.url.params
    nonce, mask = params["nonce"].encode("ascii"), int(params["mask"], 16)
    tpm = SoftTpm(key=rsa.generate_private_key(65537, 2048)) if change == "key" else agent.tpm
    quote = tpm.quote(
        nonce[::-1] if change == "nonce" else nonce,
        SHA256,
        2 if change == "mask" else mask,
    )
    if change == "signature":
        quote = replace(quote, signature=quote.signature[:-1] + bytes([quote.signature[-1] ^ 1]))
    return envelope(200, quote=encode_quote(quote))


FATAL: dict[str, Callable[[FakeAgent], Answer]] = {
    "403": lambda _: lambda _: envelope(403, "who are you"),
    "404": lambda _: lambda _: envelope(404, "nothing here"),
    "400": lambda _: lambda _: envelope(400, "Nonce is too long (max size 64): 65"),
    **{
        change: lambda agent, change=change: lambda request: tampered(agent, request, change)  # type: ignore[misc]
        for change in ("key", "nonce", "mask", "signature")
    },
}


@pytest.mark.parametrize("name", FATAL)
async def test_what_does_not_pass_opens_the_circuit_until_a_probe_succeeds(
    agent: FakeAgent, name: str
) -> None:
    async with opened(agent) as quoter:
        answer = FATAL[name](agent)
        agent.next = [answer, answer]  # the tenant's, then the first probe's
        with pytest.raises(QuoteError):
            await quoter.quote(QUALIFYING, SHA256, 1)
        assert quoter.state.trouble == "the Keylime agent is out of order"
        with pytest.raises(QuoteError):  # at once
            await quoter.quote(QUALIFYING, SHA256, 1)
        await quoter.ready()
        await until(lambda: quoter.state.trouble is None)
        await quoter.quote(QUALIFYING, SHA256, 1)
    assert agent.client_count == 3


async def test_pcrs_that_moved_between_reading_and_quoting_are_asked_for_again(
    agent: FakeAgent,
) -> None:
    def stale(request: httpx.Request) -> httpx.Response:
        nonce = request.url.params["nonce"].encode("ascii")
        before = agent.tpm.quote(nonce, SHA256, 1)
        agent.tpm.extend(0, b"moved")
        return envelope(
            200, quote=encode_quote(replace(agent.tpm.quote(nonce, SHA256, 1), pcrs=before.pcrs))
        )

    metrics = Metrics()
    async with opened(agent, metrics) as quoter:
        agent.next = [stale]
        await quoter.quote(QUALIFYING, SHA256, 1)
    assert errors_counted(metrics) == {("PCRS", "again"): 1}


async def test_an_agent_with_another_ak_is_not_served(
    agent: FakeAgent, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(agent) as quoter:
        name = quoter.ak.name
        agent.tpm = SoftTpm(key=rsa.generate_private_key(65537, 2048))
        with pytest.raises(QuoteError):
            await quoter.quote(QUALIFYING, SHA256, 1)
        with pytest.raises(AkChangedError):
            await quoter.probe()
        await until(lambda: "still out of order" in caplog.text)
        assert quoter.state.trouble is not None
        assert quoter.ak.name == name
    assert any(record.levelno == logging.CRITICAL for record in caplog.records)


async def test_an_answer_without_end_is_given_up(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(agent) as quoter:
        monkeypatch.setattr("provider_proxy.host.quoters.agent_http.MAX_QUOTE_BYTES", 1000)
        with pytest.raises(QuoteError) as caught:
            await quoter.quote(QUALIFYING, SHA256, 1)
        cause = caught.value.__cause__
        assert isinstance(cause, AgentError)
        assert cause.cause == "TOO_LARGE"


async def test_an_agent_that_gives_nothing_at_the_start_ends_the_start(agent: FakeAgent) -> None:
    agent.next = [lambda _: envelope(500, "Unable to retrieve quote")] * 100
    with pytest.raises(HostError, match="Unable to retrieve quote"):
        async with opened(agent):
            pass


async def never(_request: httpx.Request) -> httpx.Response:
    await trio.sleep_forever()


class Trickle(httpx.AsyncByteStream):
    """A byte each time that a reader is about to give up."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await trio.sleep(agent_http.ANSWER_S / 2)
            yield b" "


async def test_an_answer_that_trickles_has_a_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = AgentClient(
        "https://agent.example",
        None,
        transport=httpx.MockTransport(lambda _: httpx.Response(200, stream=Trickle())),
    )
    with pytest.raises(AgentError, match="no complete answer") as caught:
        await client.quote("n", 1, 0)
    assert trio.current_time() == agent_http.ANSWER_S
    assert caught.value.step is Step.CLEAN


@pytest.mark.parametrize("at", ["registrar", "agent"])
async def test_the_start_has_a_deadline(
    agent: FakeAgent, at: str, autojump_clock: trio.testing.MockClock
) -> None:
    async def bind() -> AgentBinding:
        if at == "registrar":
            await trio.sleep_forever()
        await trio.sleep(keylime_agent.WHOLE_LIMIT_S / 2)
        bound = await agent.bind()
        return replace(
            bound,
            client=AgentClient("https://agent.example", None, transport=httpx.MockTransport(never)),
        )

    with pytest.raises(HostError, match="within 180 s"):
        async with keylime_agent.open_quoter(bind, 1.0, Metrics()):
            pass
    assert trio.current_time() == keylime_agent.WHOLE_LIMIT_S


async def test_a_probe_has_a_deadline(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(agent) as quoter:
        monkeypatch.setattr(keylime_agent, "WHOLE_LIMIT_S", 0.05)
        monkeypatch.setattr(quoter, "_bind", trio.sleep_forever)
        with pytest.raises(HostError, match="did not answer again within"):
            await quoter.probe()


async def test_the_duty_is_kept(agent: FakeAgent) -> None:
    async with keylime_agent.open_quoter(agent.bind, 0.25, Metrics()) as quoter:
        assert quoter.state.pause_s == pytest.approx(3 * quoter.state.expected_s)


# --- logs -------------------------------------------------------------------------------------------


def reply(ima: str | None, entry: int = 0, uefi: bytes | None = None) -> AgentReply:
    quote = SoftTpm().quote(QUALIFYING, SHA256, 1)
    return AgentReply(quote=quote, ima=ima, ima_entry=entry, uefi=uefi)


def request_for(mask: int, entry: int = 0) -> QuoteRequest:
    return QuoteRequest(
        nonce=parse_nonce("n" * 32), mask=parse_mask(hex(mask)), bank=SHA256, ima_ml_entry=entry
    )


async def read(logs: AgentLogs, mask: int, entry: int = 0) -> tuple[str | None, int, bytes | None]:
    (part,) = await logs.read((request_for(mask, entry),))
    found = logs_in(part)
    return (found.ima, found.ima_entry, found.uefi) if found is not None else (None, 0, None)


async def test_a_window_brings_its_new_lines_only(agent: FakeAgent) -> None:
    agent.ima = ["one\n", "two\n"]
    async with opened(agent) as quoter:
        assert quoter.logs.next_entry == 2
        agent.ima.append("three\n")
        await quoter.quote(QUALIFYING, SHA256, 1 << IMA_PCR)
        assert agent.paths[-1].endswith("&ima_ml_entry=2")
        assert await read(quoter.logs, 1 << IMA_PCR) == ("one\ntwo\nthree\n", 0, None)
        assert await read(quoter.logs, 1 << IMA_PCR, 2) == ("three\n", 2, None)
        assert await read(quoter.logs, 1) == (None, 0, None)


async def test_a_reboot_begins_the_logs_anew(agent: FakeAgent) -> None:
    """The new boot's list may be longer than what we know of the old one: it must not be joined."""
    agent.ima = ["old\n"]
    metrics = Metrics()
    async with opened(agent, metrics) as quoter:
        agent.tpm.clock = ClockState(reset_count=2, restart_count=0, clock_ms=1)
        agent.ima = ["new 1\n", "new 2\n"]
        await quoter.quote(QUALIFYING, SHA256, 1 << IMA_PCR)
        assert await read(quoter.logs, 1 << IMA_PCR) == ("new 1\nnew 2\n", 0, None)
    assert errors_counted(metrics) == {("REBOOT", "again"): 1}


async def test_a_list_that_does_not_join_is_fetched_whole(agent: FakeAgent) -> None:
    agent.ima = ["one\n", "two\n"]
    async with opened(agent) as quoter:
        agent.next = [
            lambda request: agent.quote(
                request, ima_measurement_list="nine\n", ima_measurement_list_entry=9
            )
        ]
        await quoter.quote(QUALIFYING, SHA256, 1 << IMA_PCR)
        assert agent.paths[-1].endswith("&ima_ml_entry=0")
        assert await read(quoter.logs, 1 << IMA_PCR) == ("one\ntwo\n", 0, None)


async def test_logs() -> None:
    logs = AgentLogs()
    assert await read(logs, 1 << IMA_PCR | 1) == (None, 0, None)
    assert logs.take(reply("a\nb\n", 0, b"uefi"))
    assert await read(logs, 1 << IMA_PCR) == ("a\nb\n", 0, None)
    assert await read(logs, 1) == (None, 0, b"uefi")
    assert logs.take(reply(None))
    assert logs.take(reply("", 2))
    assert logs.next_entry == 2
    assert not logs.take(reply("d\n", 3))
    assert logs.take(reply("x\n", 0)), "the whole list, because the agent forgot"
    assert await read(logs, 1 << IMA_PCR) == ("x\n", 0, None)
    logs.forget()
    assert logs.next_entry == 0
    assert await read(logs, 1 << IMA_PCR | 1) == (None, 0, None)


async def test_a_list_above_the_limit_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ima_list, "MAX_LIST_BYTES", 4)
    logs = AgentLogs()
    for entry in (0, 3):
        assert logs.take(reply("a\nb\nc\n", entry))
        assert logs.next_entry == entry + 3, "it is not fetched again and again"
        (part,) = await logs.read((request_for(1 << IMA_PCR),))
        assert logs_in(part) == HostLogs(ima_missing="too long")
    assert len(caplog.records) == 1
    assert logs.take(reply("a\n", 0)), "another boot's"
    assert await read(logs, 1 << IMA_PCR) == ("a\n", 0, None)


# --- the real agent ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registrar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registrar]:
    with running_registrar(tmp_path_factory.mktemp("registrar")) as running:
        yield running


@pytest.fixture(scope="module", params=[True, False], ids=["mtls", "plain"])
def real(
    request: pytest.FixtureRequest,
    registrar: Registrar,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("agent")
    with running_agent(folder, registrar, mtls=request.param) as running:
        yield running


@pytest.mark.real
async def test_tenants_of_a_batch_over_the_real_agent(real: Agent, registrar: Registrar) -> None:
    """Ten tenants, one quote of the agent's; every answer verifies; the logs come along."""
    real.ima_list.write_text("10 aa ima-ng sha256:bb /bin/one\n")
    tenant = Tenant(name="t", pcr_allow=0xFFFFFF)
    with trio.fail_after(LIMIT_S):
        async with keylime_agent.open_quoter(binding_of(real, registrar), 1.0, Metrics()) as quoter:
            batcher = Batcher(
                quoter,
                BatchSettings(window_s=0.05, max_leaves=64, isolate_mask=1 << 10, max_queue=64),
                Metrics(),
                logs=quoter.logs,
            )
            bodies: dict[int, dict[str, object]] = {}

            async def one(number: int) -> None:
                asker = Asker(quoter.ak)
                challenge = asker.challenge(mask=0x401)
                answer = await batcher.submit(challenge.request, tenant, timeout_s=LIMIT_S)
                body = b"".join(answer.body())
                asker.verify(body, challenge)
                bodies[number] = json.loads(body)["results"]

            async with trio.open_nursery() as nursery:
                nursery.start_soon(batcher.run)
                async with trio.open_nursery() as tenants:
                    for number in range(10):
                        tenants.start_soon(one, number)
                first = dict(bodies)
                with real.ima_list.open("a") as more:
                    more.write("10 cc ima-ng sha256:dd /bin/two\n")
                await one(10)
                nursery.cancel_scope.cancel()
    assert len({str(results["quote"]) for results in first.values()}) == 1
    assert {results["ima_measurement_list"] for results in first.values()} == {
        "10 aa ima-ng sha256:bb /bin/one\n"
    }
    assert bodies[10]["ima_measurement_list"] == (
        "10 aa ima-ng sha256:bb /bin/one\n10 cc ima-ng sha256:dd /bin/two\n"
    )
    assert first[0]["mb_measurement_list"]


@pytest.mark.real
async def test_a_pcr_of_the_real_agents_chip(real: Agent, registrar: Registrar) -> None:
    async with keylime_agent.open_quoter(binding_of(real, registrar), 1.0, Metrics()) as quoter:
        before = dict((await quoter.quote(QUALIFYING, SHA256, 1 << 9)).pcrs.values)
        tool(real.tcti, "tpm2_pcrextend", f"9:sha256={'ab' * 32}")
        after = dict((await quoter.quote(QUALIFYING, SHA256, 1 << 9)).pcrs.values)
    assert before[9] != after[9]


def settings_of(agent: Agent, registrar: Registrar) -> KeylimeAgent:
    return KeylimeAgent(
        url=agent.url,
        agent_id=str(agent.agent_id),
        client_cert=registrar.client_cert if agent.mtls else None,
        client_key=registrar.client_key if agent.mtls else None,
        registrar_url=registrar.https_url,
        registrar_ca=registrar.ca,
        registrar_cert=registrar.client_cert,
        registrar_key=registrar.client_key,
        insecure_no_ek=True,  # a swtpm without certificate
    )


@pytest.mark.real
async def test_the_registrar_says_whose_ak_it_is(
    real: Agent, registrar: Registrar, tmp_path: Path
) -> None:
    settings = settings_of(real, registrar)

    async def quote(settings: KeylimeAgent, banks: tuple[HashAlg, ...] = (SHA256,)) -> AgentQuoter:
        with trio.fail_after(LIMIT_S):
            async with agent_binding.open_quoter(
                settings, tmp_path, Metrics(), banks=banks, max_duty=1.0
            ) as quoter:
                await quoter.quote(QUALIFYING, SHA256, 1)
                return quoter

    quoter = await quote(settings)
    assert quoter.identity.software
    assert quoter.identity.host_uuid == uuid_of_ek(quoter.identity.ek_public)
    await quote(settings)  # pinned now
    with pytest.raises(HostError, match=r"quotes the bank sha256 only"):
        await quote(settings, (HashAlg.SHA384,))
    with pytest.raises(HostError, match="no active record"):
        await quote(replace(settings, agent_id="nobody"))
    (tmp_path / "cas").mkdir()
    (tmp_path / "cas/another.pem").write_bytes(registrar.ca.read_bytes())
    with pytest.raises(HostError, match="the agent's record"):
        await quote(replace(settings, insecure_no_ek=False, ek_ca=(tmp_path / "cas",)))
    with pytest.raises(HostError, match="registrar_cert"):
        await quote(replace(settings, registrar_cert=tmp_path / "none"))
    pin = PinStore(tmp_path / agent_binding.PINS)
    pin.pin(settings.agent_id or "", SoftTpm().ak_public, replace=True)
    with pytest.raises(AkChangedError):
        await quote(settings)


@pytest.mark.real
async def test_the_daemon_over_a_real_agent(
    real: Agent, registrar: Registrar, tmp_path: Path
) -> None:
    """From the configuration to a verified answer; about VMs it says nothing, and registers nowhere."""
    config = Config(
        state_dir=tmp_path,
        listen=Listen(address=("127.0.0.1:0",), insecure_plaintext=True),
        quoter=QuoterTable(kind="keylime-agent"),
        keylime_agent=settings_of(real, registrar),
        tpm=Tpm(max_duty=1.0),
    )
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT_S):
            started: daemon.Started = await nursery.start(daemon.run, config)
        async with httpx.AsyncClient(trust_env=False) as http:
            url = f"http://{started.addresses[0]}"
            proxy = ProxyClient(http, url)
            identity = await proxy.identity()
            asker = Asker(parse_ak(identity.ak_public))
            challenge = asker.challenge(mask=0x3)
            verified = asker.verify(await proxy.fetch(challenge.request), challenge)
            assert set(verified.pcrs) == {0, 1}
            vm = await http.get(f"{url}/verifier/quote?nonce={'n' * 32}&mask=0x1&vm={uuid.uuid4()}")
            assert vm.status_code == 404
            assert identity.software
        nursery.cancel_scope.cancel()
    gc.unfreeze()  # the daemon tunes it for a process of its own
    gc.set_threshold(700, 10, 10)


@pytest.mark.real
async def test_a_real_agent_that_comes_back_with_another_ak_is_not_served(
    registrar: Registrar, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This agent makes an AK at each start. While it is away the batch's deadline decides."""
    async with AsyncExitStack() as stack:
        with running_agent(tmp_path, registrar) as first:
            bind = binding_of(first, registrar)
            quoter = await stack.enter_async_context(
                keylime_agent.open_quoter(bind, 1.0, Metrics())
            )
            await quoter.quote(QUALIFYING, SHA256, 1)
        with trio.move_on_after(0.5) as scope:
            await quoter.quote(QUALIFYING, SHA256, 1)
        assert scope.cancelled_caught
        assert quoter.state.trouble is None, "it may be back in a moment"
        async with httpx.AsyncClient(verify=registrar.client_context()) as http:
            url = f"{registrar.https_url}/v2.6/agents/{first.agent_id}"
            (await http.delete(url)).raise_for_status()
        with running_agent(tmp_path, registrar, again=first):
            with pytest.raises(QuoteError):
                await quoter.quote(QUALIFYING, SHA256, 1)
            await until(lambda: "and now has" in caplog.text)
            with pytest.raises(QuoteError):
                await quoter.quote(QUALIFYING, SHA256, 1)
            async with keylime_agent.open_quoter(bind, 1.0, Metrics()) as restarted:
                quote = await restarted.quote(QUALIFYING, SHA256, 1)
            assert attestation.parse_attest(quote.attest).extra_data == QUALIFYING
