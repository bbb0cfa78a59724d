"""A tenant's bindings: the same contract over the fake registrar and the real one, the cache, the pins,
and the hosts that lie. Each test runs on trio and on asyncio."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint
from binding_directories import Book, FakeBook, RealBook, register
from cryptography.hazmat.primitives.asymmetric import ec
from fake_registrar import FakeRegistrar, envelope
from helpers import HOST_UUID, make_evidence, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from keylime_helpers import running_registrar
from places import DOCS
from soft_ek import NOW, Authority, SoftHost, ek_certificate, rsa_ek

from provider_proxy.bench import bindings as bench
from provider_proxy.errors import (
    BindingError,
    ConfigError,
    NotRegisteredError,
    PinChangedError,
    ProviderProxyError,
    ReplyError,
    UntrustedAkError,
    UntrustedEkError,
    UsageError,
)
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.evidence.tpm_writer import AK_ATTRIBUTES, EK_ATTRIBUTES, encode_public
from provider_proxy.evidence.verify import Verifier, new_challenge
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust import bindings
from provider_proxy.trust import registrar as agent_records
from provider_proxy.trust.bindings import (
    Binding,
    RegistrarBindings,
    ttl_from_environment,
)
from provider_proxy.trust.ek_judges import KnownEk, UnsafeAnyEk
from provider_proxy.trust.ek_store import EkStore
from provider_proxy.trust.pins import PinStore

RESTRICTED, FIXED_TPM, DECRYPT = 1 << 16, 1 << 1, 1 << 17
TTL_S = 300.0
CALLERS = 10
VENDOR = Authority("vendor")
Body = Callable[[], Awaitable[None]]
Run = Callable[[Body], None]


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
def directory(request: pytest.FixtureRequest) -> Book:
    if request.param == "fake":
        return FakeBook()
    found: RealBook = request.getfixturevalue("real")
    return found


@pytest.fixture
def fake() -> FakeRegistrar:
    return FakeRegistrar()


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs an async function on each backend, twenty seconds at most."""

    def go(function: Body) -> None:
        async def bounded() -> None:
            with anyio.fail_after(20):
                await function()

        anyio.run(bounded, backend=request.param)

    return go


def vouched_host(number: int = 0) -> SoftHost:
    """A host whose EK a vendor vouches for."""
    ek = rsa_ek(number)
    return SoftHost(ek=ek, ek_cert=ek_certificate(VENDOR, ek))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBook]:
    with running_registrar(tmp_path_factory.mktemp("registrar")) as registrar:
        yield RealBook(registrar)


class Tenant:
    """A tenant with a clock of its own, a directory of pins and one of CAs."""

    def __init__(self, directory: Path) -> None:
        self.now_s = 1000.0
        self.pins = PinStore(directory / "pins")
        cas = directory / "cas"
        cas.mkdir(exist_ok=True)
        (cas / "vendor.pem").write_bytes(VENDOR.pem())
        self.eks = EkStore(cas, now=lambda: NOW, clock=lambda: self.now_s)

    def bindings(self, http: httpx.AsyncClient, url: str, **options: object) -> RegistrarBindings:
        arguments: dict[str, object] = {
            "pins": self.pins,
            "eks": self.eks,
            "ttl_s": TTL_S,
            "clock": lambda: self.now_s,
        }
        return RegistrarBindings(http, url, **(arguments | options))  # type: ignore[arg-type]


@pytest.fixture
def tenant(tmp_path: Path) -> Tenant:
    return Tenant(tmp_path)


def with_fake(fake: FakeRegistrar, tenant: Tenant, **options: object) -> RegistrarBindings:
    """Bindings over the fake; its client has no connections that would have to be closed."""
    return tenant.bindings(fake.client(), fake.url, **options)


# --- the contract: the fake and the real registrar --------------------------------------------------


def test_contract(
    directory: Book, tenant: Tenant, run: Run, request: pytest.FixtureRequest
) -> None:
    backend = request.node.callspec.params["run"]
    agent_id = f"contract-{backend}.example"
    host = vouched_host()

    async def body() -> None:
        async with directory.client() as http:
            source = agent_records.AgentRecords(http, directory.url)
            with pytest.raises(NotRegisteredError):
                await source.fetch(agent_id)
            register(directory, agent_id, host, activate=False)
            with pytest.raises(NotRegisteredError):
                await source.fetch(agent_id)
            register(directory, agent_id, host)
            record = await source.fetch(agent_id)
            assert (record.ek_public, record.ek_cert, record.ak_public) == (
                host.ek_public,
                host.ek_cert,
                host.ak_public,
            )
            # Anybody may knock a record out by posting it again,
            register(directory, agent_id, host, activate=False)
            with pytest.raises(NotRegisteredError):
                await source.fetch(agent_id)
            # or by answering for it wrongly,
            wrong = json.dumps({"auth_tag": "00"}).encode()
            assert directory.ask("PUT", f"/v2.6/agents/{agent_id}", wrong)[0] == 400
            assert directory.ask("PUT", f"/v2.6/agents/{agent_id}", wrong)[0] == 404
            # and then have another TPM there.
            other = vouched_host(1)
            register(directory, agent_id, other)
            assert (await source.fetch(agent_id)).ek_public == other.ek_public
            assert directory.ask("POST", f"/v2.6/agents/{agent_id}", host.body())[0] == 403
            assert directory.ask("DELETE", f"/v2.6/agents/{agent_id}")[0] == 200
            with pytest.raises(NotRegisteredError):
                await source.fetch(agent_id)
            # A version that it does not have is asked for once, and found out.
            source._version = "2.9"
            with pytest.raises(NotRegisteredError):
                await source.fetch(agent_id)
            assert source._version == "2.6"

    run(body)


def test_a_software_key_passes_the_registrar_and_is_refused_here(
    directory: Book, tenant: Tenant, run: Run, request: pytest.FixtureRequest
) -> None:
    """No TPM anywhere: the credential is opened in software, the attributes are what they should be."""
    agent_id = f"software-{request.node.callspec.params['run']}.example"
    own = Authority("the host's own CA", key=rsa_ek(3))
    hosts = {
        "no certificate": (SoftHost(ek=rsa_ek(2)), UntrustedEkError),
        "a certificate of its own making": (
            SoftHost(ek=rsa_ek(2), ek_cert=ek_certificate(own, rsa_ek(2))),
            UntrustedEkError,
        ),
        "a genuine vendor's name": (
            SoftHost(ek=rsa_ek(2), ek_cert=ek_certificate(Authority("vendor"), rsa_ek(2))),
            UntrustedEkError,
        ),
    }

    async def body() -> None:
        for number, (what, (host, error)) in enumerate(hosts.items()):
            name = f"{agent_id}-{number}"
            register(directory, name, host)  # the registrar is content
            async with directory.client() as http:
                judge = tenant.bindings(http, directory.url)
                with pytest.raises(error):
                    await judge.check(name, host.ek_cert, host.ak_public)
                with pytest.raises(error):
                    await judge.get(name)
                assert not tenant.pins.has(name), what

    run(body)


@pytest.mark.parametrize(
    "attributes",
    [AK_ATTRIBUTES & ~RESTRICTED, AK_ATTRIBUTES & ~FIXED_TPM, AK_ATTRIBUTES | DECRYPT],
    ids=["unrestricted", "exportable", "decrypts"],
)
def test_an_ak_whose_attributes_are_wrong_passes_the_registrar_and_is_refused_here(
    directory: Book, tenant: Tenant, run: Run, request: pytest.FixtureRequest, attributes: int
) -> None:
    """A genuine EK, and beside it a key that signs whatever it is given."""
    agent_id = request.node.callspec.id.replace("[", "-")
    key = ec.generate_private_key(ec.SECP256R1())
    host = replace(vouched_host(), ak_public=encode_public(key.public_key(), attributes))

    async def body() -> None:
        register(directory, agent_id, host)
        async with directory.client() as http:
            for eks in (tenant.eks, UnsafeAnyEk()):
                with pytest.raises(UntrustedAkError):
                    await tenant.bindings(http, directory.url, eks=eks).check(
                        agent_id, host.ek_cert, host.ak_public
                    )
        assert not tenant.pins.has(agent_id)

    run(body)


def test_a_lie_about_the_attributes_with_no_ek_chain(
    directory: Book, tenant: Tenant, run: Run, request: pytest.FixtureRequest
) -> None:
    """The public area says "restricted, fixedTPM"; the key lies in a file. Only the EK's chain tells."""
    agent_id = f"lie-{request.node.callspec.params['run']}"
    host = SoftHost(tpm=SoftTpm(), ek=rsa_ek(2))

    async def body() -> None:
        register(directory, agent_id, host)
        async with directory.client() as http:
            with pytest.raises(UntrustedEkError):
                await tenant.bindings(http, directory.url).check(agent_id, None, host.ak_public)
            # What the way round costs: this passes, and it is a key in a file.
            unsafe = tenant.bindings(http, directory.url, eks=UnsafeAnyEk())
            binding = await unsafe.check(agent_id, None, host.ak_public)
            assert binding.host.ak.name == host.tpm.ak.name
        async with directory.client() as http:  # pinned, but not believed without the way round
            with pytest.raises(UntrustedEkError):
                await tenant.bindings(http, directory.url).get(agent_id)

    run(body)


def test_from_the_registrar_to_a_verified_quote(
    directory: Book, tenant: Tenant, run: Run, request: pytest.FixtureRequest
) -> None:
    agent_id = f"good-{request.node.callspec.params['run']}"
    host = vouched_host()

    async def body() -> None:
        register(directory, agent_id, host)
        async with directory.client() as http:
            judge = tenant.bindings(http, directory.url)
            binding = await judge.get(agent_id)
            challenge = new_challenge(mask=1, now_s=time.monotonic(), history=binding.history)
            answer = make_evidence(host.tpm, challenge.request)
            binding = await judge.check(agent_id, host.ek_cert, host.ak_public)
            quote = Verifier(UnsafeAcceptAny()).verify(
                answer, challenge, binding.host, binding.history, now_s=time.monotonic()
            )
            assert quote.ak_name == host.tpm.ak.name
            # The pin's file was written by that; the binding is as good as before.
            assert (await judge.get(agent_id)).history is binding.history

    run(body)


@pytest.mark.real
def test_a_registrar_that_was_restarted(real: RealBook, tenant: Tenant, run: Run) -> None:
    """The pooled connection is dead, the next question is answered all the same."""
    registrar = real.registrar
    context = registrar.client_context()

    async def body() -> None:
        async with Relay(registrar.tls_port) as relay, httpx.AsyncClient(verify=context) as http:
            source = agent_records.AgentRecords(http, f"https://127.0.0.1:{relay.port}")
            for _ in range(3):
                with pytest.raises(NotRegisteredError):
                    await source.fetch("nobody")
            opened = relay.opened
            await relay.cut()
            with pytest.raises(NotRegisteredError):
                await source.fetch("nobody")
            assert relay.opened == opened + 1

    run(body)


class Relay:
    """Passes bytes on, so that connections can be cut; counts them."""

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._scopes: list[anyio.CancelScope] = []
        self.opened = 0

    async def __aenter__(self) -> Relay:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        self.port: int = self._listener.extra(anyio.abc.SocketAttribute.local_port)
        self._tasks.start_soon(self._listener.serve, self._serve)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)
        await self._listener.aclose()

    async def cut(self) -> None:
        for scope in self._scopes:
            scope.cancel()
        for _ in range(20):
            await checkpoint()

    async def _serve(self, client: anyio.abc.SocketStream) -> None:
        self.opened += 1
        async with client, await anyio.connect_tcp("127.0.0.1", self._to_port) as server:
            async with anyio.create_task_group() as tasks:
                self._scopes.append(tasks.cancel_scope)
                tasks.start_soon(self._pass, client, server, tasks.cancel_scope)
                tasks.start_soon(self._pass, server, client, tasks.cancel_scope)

    async def _pass(
        self,
        source: anyio.abc.SocketStream,
        sink: anyio.abc.SocketStream,
        scope: anyio.CancelScope,
    ) -> None:
        try:
            async for data in source:
                await sink.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        scope.cancel()


def test_the_documented_program(
    fake: FakeRegistrar, tenant: Tenant, run: Run, tmp_path: Path
) -> None:
    """The Python block of docs/bindings.md, run as it stands."""
    text = (DOCS / "bindings.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    program: dict[str, Any] = {}
    exec(block, program)
    host = vouched_host()
    register(FakeBook(fake), "host", host)
    (tmp_path / "tpm-cas").mkdir()
    (tmp_path / "tpm-cas/vendor.pem").write_bytes(VENDOR.pem())

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/verifier/identity":
            keys = {"ak_tpm": host.ak_public, "ek_tpm": host.ek_public, "ek_cert": host.ek_cert}
            results = {k: base64.b64encode(v or b"").decode() for k, v in keys.items()}
            return envelope(200, {**results, "host_uuid": str(HOST_UUID), "software": True})
        asked = parse_quote_query(request.url.query.decode())
        return httpx.Response(200, content=make_evidence(host.tpm, asked))

    async def body() -> None:
        judge = program["make_bindings"](fake.client(), fake.url, tmp_path)
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            proxy = ProxyClient(http, "https://proxy.example:8890")
            for _ in range(3):
                quote = await program["attest"](judge, proxy, Verifier(UnsafeAcceptAny()), "host")
                assert quote.ak_name == host.tpm.ak.name
        assert len(fake.calls) == 2

    run(body)


# --- questions saved --------------------------------------------------------------------------------


def test_a_cold_start_is_two_questions_whoever_asks(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    host = vouched_host()
    register(FakeBook(fake), "host", host)

    async def body() -> None:
        fake.before = checkpoint
        judge, got = with_fake(fake, tenant), list[Binding]()

        async def ask() -> None:
            got.append(await judge.check("host", host.ek_cert, host.ak_public))

        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(ask)
        assert fake.calls == ["/version", "/v2.6/agents/host"]
        assert len(got) == CALLERS
        for _ in range(CALLERS):
            await ask()
        assert len(fake.calls) == 2
        tenant.now_s += TTL_S
        await ask()
        assert fake.calls[2:] == ["/v2.6/agents/host"]

    run(body)


def test_what_is_at_hand_is_compared_though_the_record_is_cached(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    host, other = vouched_host(), vouched_host(1)
    register(FakeBook(fake), "host", host)

    async def body() -> None:
        judge = with_fake(fake, tenant)
        await judge.get("host")
        for ek_cert, ak_public in (
            (host.ek_cert, other.ak_public),
            (other.ek_cert, host.ak_public),
            (None, host.ak_public),
            (host.ek_cert, b""),
            (host.ek_cert, host.ak_public + b"\0"),
        ):
            with pytest.raises(BindingError, match="than it registered"):
                await judge.check("host", ek_cert, ak_public)
        assert len(fake.calls) == 2  # and a hostile host cannot make us ask all the time
        await judge.check("host", host.ek_cert, host.ak_public)

    run(body)


def test_a_record_that_does_not_fit_any_more_is_asked_for_again_but_not_all_the_time(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    """A host got a new AK and a person pinned it again, while the old record was cached."""
    host = vouched_host()
    renewed = replace(host, tpm=SoftTpm(), ak_public=b"")
    register(FakeBook(fake), "host", host)

    async def body() -> None:
        judge = with_fake(fake, tenant)
        await judge.get("host")
        fake.handle("DELETE", "/v2.6/agents/host")
        register(FakeBook(fake), "host", renewed)
        tenant.pins.pin("host", renewed.ak_public, ek_public=renewed.ek_public, replace=True)
        tenant.now_s += bindings.LOOK_S
        with pytest.raises(PinChangedError):
            await judge.get("host")
        assert len(fake.calls) == 2
        tenant.now_s += bindings.NEGATIVE_TTL_S
        assert (await judge.get("host")).host.ak.name == renewed.tpm.ak.name
        assert len(fake.calls) == 3
        with pytest.raises(BindingError):
            await judge.check("host", host.ek_cert, host.ak_public)

    run(body)


def test_negative_answers_and_silence_are_cached_briefly(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    async def body() -> None:
        judge = with_fake(fake, tenant)
        for _ in range(3):
            with pytest.raises(NotRegisteredError):
                await judge.get("host")
        assert fake.calls == ["/version", "/v2.6/agents/host"]
        register(FakeBook(fake), "host", vouched_host())
        tenant.now_s += bindings.NEGATIVE_TTL_S
        await judge.get("host")

        async def away() -> None:
            raise httpx.ConnectError("refused")

        fake.before = away
        tenant.now_s += TTL_S
        calls = len(fake.calls)
        for _ in range(3):
            with pytest.raises(ReplyError, match="refused"):
                await judge.get(
                    "host"
                )  # past its time nothing is served, registrar or no registrar
        assert len(fake.calls) == calls + 1
        fake.before = None
        tenant.now_s += bindings.UNREACHABLE_TTL_S
        await judge.get("host")

    run(body)


def test_a_registrar_that_changed_its_mind_about_versions(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    register(FakeBook(fake), "host", vouched_host())

    async def body() -> None:
        judge = with_fake(fake, tenant)
        await judge.get("host")
        fake.versions = ("2.0", "2.1")
        tenant.now_s += TTL_S
        await judge.get("host")
        assert fake.calls[2:] == ["/v2.6/agents/host", "/version", "/v2.1/agents/host"]
        tenant.now_s += TTL_S
        await judge.get("host")
        assert len(fake.calls) == 6
        fake.versions = ("3.0",)
        tenant.now_s += TTL_S
        with pytest.raises(ReplyError, match=r"none of the API versions 2\.6"):
            await judge.get("host")

    run(body)


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError])
def test_a_stale_connection_is_tried_once_more_and_only_once(
    fake: FakeRegistrar, tenant: Tenant, run: Run, error: type[httpx.TransportError]
) -> None:
    register(FakeBook(fake), "host", vouched_host())

    async def body() -> None:
        judge = with_fake(fake, tenant)
        failures = 1

        async def breaks() -> None:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise error("gone")

        fake.before = breaks
        await judge.get("host")
        failures, tenant.now_s = 2, tenant.now_s + TTL_S
        with pytest.raises(ReplyError, match="gone"):
            await judge.get("host")

    run(body)


def test_a_registrar_that_drips_is_given_up(
    fake: FakeRegistrar, tenant: Tenant, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_records, "CALL_LIMIT_S", 0.05)
    got: list[Exception] = []

    async def body() -> None:
        fake.before = anyio.sleep_forever
        judge = with_fake(fake, tenant)

        async def ask() -> None:
            with pytest.raises(ReplyError, match="within") as caught:
                await judge.get("host")
            got.append(caught.value)

        async with anyio.create_task_group() as tasks:
            for _ in range(CALLERS):
                tasks.start_soon(ask)
        assert len(got) == CALLERS
        assert len(fake.calls) == 1

    run(body)


# --- what a registrar, or who replaces its records, may say -----------------------------------------


def results_of(host: SoftHost) -> dict[str, object]:
    values: dict[str, object] = json.loads(host.body())
    return {"agent_id": "host", **values, "regcount": 1}


KEYS = st.sampled_from(
    ["results", "ek_tpm", "aik_tpm", "ekcert", "agent_id", "supported_versions", "x"]
)
LIES: dict[str, tuple[Callable[[dict[str, object]], object], type[ProviderProxyError]]] = {
    "no EK": (lambda v: v.update(ek_tpm=None), BindingError),
    "no AK": (lambda v: v.pop("aik_tpm"), BindingError),
    "an AK of text": (lambda v: v.update(aik_tpm="!"), BindingError),
    "an AK of nothing": (lambda v: v.update(aik_tpm=""), BindingError),
    "a long AK": (lambda v: v.update(aik_tpm="A" * 4000), BindingError),
    "another's record": (lambda v: v.update(agent_id="another"), BindingError),
    "a number as certificate": (lambda v: v.update(ekcert=1), BindingError),
    "an invalid certificate": (lambda v: v.update(ekcert="AAAA"), UntrustedEkError),
    "half a character": (lambda v: v.update(mtls_cert="\ud800"), BindingError),
    "a number as TLS certificate": (lambda v: v.update(mtls_cert=1), BindingError),
    "no certificate": (lambda v: v.update(ekcert=None), UntrustedEkError),
    "an EK that signs": (lambda v: v.update(ek_tpm=v["aik_tpm"]), UntrustedEkError),
    "an AK that opens": (lambda v: v.update(aik_tpm=v["ek_tpm"]), UntrustedAkError),
    "another's EK": (
        lambda v: v.update(ek_tpm=base64.b64encode(vouched_host(1).ek_public).decode()),
        UntrustedEkError,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(fake: FakeRegistrar, tenant: Tenant, run: Run, lie: str) -> None:
    change, error = LIES[lie]
    values = results_of(vouched_host())
    change(values)
    fake.override = lambda request: (
        None if request.url.path == "/version" else envelope(200, values)
    )

    async def body() -> None:
        with pytest.raises(error):
            await with_fake(fake, tenant).get("host")
        assert not tenant.pins.has("host")

    run(body)


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        (EK_ATTRIBUTES | 1 << 18, "attributes"),
        (EK_ATTRIBUTES & ~RESTRICTED, "attributes"),
        (EK_ATTRIBUTES & ~FIXED_TPM, "attributes"),
        (EK_ATTRIBUTES & ~DECRYPT, "attributes"),
    ],
)
def test_what_is_no_ek_is_refused_whoever_vouches(
    fake: FakeRegistrar, tenant: Tenant, run: Run, attributes: int, match: str
) -> None:
    host = vouched_host()
    changed = host.ek_public[:6] + attributes.to_bytes(4, "big") + host.ek_public[10:]
    values = results_of(host) | {"ek_tpm": base64.b64encode(changed).decode()}
    fake.override = lambda request: (
        None if request.url.path == "/version" else envelope(200, values)
    )

    async def body() -> None:
        for eks in (tenant.eks, UnsafeAnyEk(), KnownEk(changed)):
            with pytest.raises(UntrustedEkError, match=match):
                await with_fake(fake, tenant, eks=eks).get("host")

    run(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_answered_ends_in_an_error_of_ours(body: bytes) -> None:
    with pytest.raises(BindingError):
        agent_records._parse_record(body, "host")
    with pytest.raises(ReplyError):
        agent_records._best_version(body)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200),
        httpx.Response(200, text="[]"),
        httpx.Response(200, text='{"results": {"supported_versions": "2.6"}}'),
        httpx.Response(200, json={"results": {"supported_versions": ["2.6"] * 100}}),
        httpx.Response(200, json={"results": {"supported_versions": ["9.9"]}}),
        httpx.Response(200, content=b"x" * (agent_records.MAX_ANSWER_BYTES + 1)),
        httpx.Response(302, headers={"location": "https://elsewhere.example/version"}),
        httpx.Response(500),
    ],
)
def test_answers_of_no_registrar(
    fake: FakeRegistrar, tenant: Tenant, run: Run, answer: httpx.Response
) -> None:
    fake.override = lambda request: httpx.Response(
        answer.status_code, headers=answer.headers, content=answer.content
    )

    async def body() -> None:
        with pytest.raises(ReplyError):
            await with_fake(fake, tenant).get("host")

    run(body)


def test_a_stranger_who_replaced_the_record_meets_the_pin(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    """His TPM is genuine, his AK is one, his EK has a certificate; it is not the host's."""
    host, stranger = vouched_host(), vouched_host(1)
    same_ek = replace(host, tpm=SoftTpm(), ak_public=b"")
    register(FakeBook(fake), "host", host)

    async def body() -> None:
        await with_fake(fake, tenant).get("host")
        for other in (stranger, same_ek, replace(stranger, ak_public=host.ak_public)):
            fake.handle("DELETE", "/v2.6/agents/host")
            register(FakeBook(fake), "host", other)
            judge = with_fake(fake, tenant)
            for _ in range(2):
                with pytest.raises(PinChangedError):
                    await judge.check("host", other.ek_cert, other.ak_public)
        tenant.pins.pin(
            "host", stranger.ak_public, ek_public=stranger.ek_public, replace=True
        )  # a person's word
        fake.handle("DELETE", "/v2.6/agents/host")
        register(FakeBook(fake), "host", stranger)
        await with_fake(fake, tenant).check("host", stranger.ek_cert, stranger.ak_public)

    run(body)


def test_a_pin_that_changes_while_the_record_is_cached(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    host, other = vouched_host(), vouched_host(1)
    register(FakeBook(fake), "host", host)

    async def body() -> None:
        judge = with_fake(fake, tenant)
        first = await judge.get("host")
        tenant.pins.pin("host", other.ak_public, ek_public=other.ek_public, replace=True)
        await judge.get("host")  # within LOOK_S
        tenant.now_s += bindings.LOOK_S
        for _ in range(2):
            with pytest.raises(PinChangedError):
                await judge.get("host")
        with pytest.raises(PinChangedError):
            first.history.newest()
        tenant.pins.remove("host")
        tenant.now_s += bindings.LOOK_S
        await judge.get("host")  # first trust once more
        assert tenant.pins.load("host").ek_public == host.ek_public

    run(body)


def test_an_ak_pinned_alone_gets_its_ek_at_first_sight(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    host = vouched_host()
    register(FakeBook(fake), "host", host)
    tenant.pins.pin("host-17", host.ak_public)

    async def body() -> None:
        binding = await with_fake(fake, tenant).get("host", label="host-17")
        assert binding.host.label == "host-17"
        assert tenant.pins.load("host-17").ek_public == host.ek_public
        assert tenant.pins.labels() == ["host-17"]

    run(body)


def test_an_ek_that_a_person_vouched_for_needs_no_certificate(
    fake: FakeRegistrar, tenant: Tenant, run: Run
) -> None:
    host, other = SoftHost(ek=rsa_ek(2)), SoftHost(ek=rsa_ek(1))
    register(FakeBook(fake), "host", host)
    register(FakeBook(fake), "other", other)

    async def body() -> None:
        judge = with_fake(fake, tenant)
        with pytest.raises(UntrustedEkError):
            await judge.get("host")
        for label, said in (("host", host), ("other", host)):
            ak = host.ak_public if label == "host" else other.ak_public
            tenant.pins.pin(label, ak, ek_public=said.ek_public, ek_by_hand=True)
        await judge.check("host", None, host.ak_public)
        with pytest.raises(PinChangedError, match="another EK"):
            await judge.get("other")

    run(body)


def test_a_ca_that_was_taken_out_ends_the_cached_binding(
    fake: FakeRegistrar, tenant: Tenant, run: Run, tmp_path: Path
) -> None:
    register(FakeBook(fake), "host", vouched_host())

    async def body() -> None:
        judge = with_fake(fake, tenant)
        await judge.get("host")
        (tmp_path / "cas/vendor.pem").write_bytes(Authority("another").pem())
        tenant.now_s += 10
        with pytest.raises(UntrustedEkError):
            await judge.get("host")
        assert len(fake.calls) == 2

    run(body)


def test_the_number_of_hosts_is_bounded(fake: FakeRegistrar, tenant: Tenant, run: Run) -> None:
    host = vouched_host()
    for name in ("a", "b", "c"):
        register(FakeBook(fake), name, host)

    async def body() -> None:
        judge = with_fake(fake, tenant, max_entries=2)
        for name in ("a", "b", "a", "c", "a", "b"):
            await judge.get(name)
        asked = [path[-1] for path in fake.calls[1:]]
        assert asked == ["a", "b", "c", "b"]
        assert len(judge._records) == len(judge._bound) == 2

    run(body)


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "agent_id", ["", "a/b", "../x", ".", "a?b", "a#b", "a b", "ä", "-a", "a\n", "x" * 81]
)
async def test_what_is_no_agent_id(fake: FakeRegistrar, tenant: Tenant, agent_id: str) -> None:
    with pytest.raises(UsageError):
        await with_fake(fake, tenant).get(agent_id)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("300", 300), ("0.5", 0.5), ("86400", 86400), ("007", 7)]
)
def test_the_time_to_live_from_the_environment(text: str, seconds: float) -> None:
    assert ttl_from_environment({bindings.TTL_VARIABLE: text}) == seconds
    assert ttl_from_environment({}) == bindings.DEFAULT_TTL_S == 300


@pytest.mark.parametrize(
    "text", ["", " 1", "1 ", "-1", "+1", "1e9", "86401", "99999", "nan", "inf", "0x10", "٣", "1_0"]
)
def test_a_hostile_time_to_live(
    text: str, monkeypatch: pytest.MonkeyPatch, fake: FakeRegistrar, tenant: Tenant
) -> None:
    monkeypatch.setenv(bindings.TTL_VARIABLE, text)
    with pytest.raises(ConfigError, match=bindings.TTL_VARIABLE):
        with_fake(fake, tenant, ttl_s=None)
    with_fake(fake, tenant)  # who says it himself does not read the environment


@pytest.mark.parametrize("ttl_s", [-1, float("nan"), float("inf"), 86401])
def test_a_wrong_time_to_live(fake: FakeRegistrar, tenant: Tenant, ttl_s: float) -> None:
    with pytest.raises(ConfigError):
        with_fake(fake, tenant, ttl_s=ttl_s)


@pytest.mark.parametrize(
    "url",
    ["", "registrar:8891", "http://registrar.example:8890", "ftp://x", "https://", "https://[::1"],
)
def test_a_wrong_url(fake: FakeRegistrar, tenant: Tenant, url: str) -> None:
    with pytest.raises(UsageError):
        tenant.bindings(fake.client(), url)


def test_the_way_round_says_so(caplog: pytest.LogCaptureFixture) -> None:
    UnsafeAnyEk()
    assert "software TPM is accepted" in caplog.text


# --- `pin add --registrar` --------------------------------------------------------------------------


@pytest.mark.real
def test_a_pin_from_the_registrar(real: RealBook, tmp_path: Path) -> None:
    registrar = real.registrar
    good, software = vouched_host(), SoftHost(ek=rsa_ek(2))
    register(real, "cli.example", good)
    register(real, "soft.example", software)
    (tmp_path / "cas").mkdir()
    (tmp_path / "cas/vendor.pem").write_bytes(VENDOR.pem())
    (tmp_path / "ek").write_bytes(software.ek_public)
    (tmp_path / "ak").write_bytes(good.ak_public)
    tls: list[str | Path] = ["--registrar", registrar.https_url, "--registrar-ca", registrar.ca]
    tls += ["--registrar-cert", registrar.client_cert, "--registrar-key", registrar.client_key]

    def pin(label: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return run_here("pin", "add", label, "--pins", "pins", *words, cwd=tmp_path)

    done = pin("h1", *tls, "--agent-id", "cli.example", "--ek-ca", "cas", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["ak_name"] == good.ak_name.hex()
    assert values["ek_name"] == parse_public(good.ek_public).name.hex()
    listed = json.loads(run_here("pin", "list", "--pins", "pins", "--json", cwd=tmp_path).stdout)
    assert listed["hosts"][0]["ek_name"] == values["ek_name"]
    done = pin("cli.example", *tls, "--ek-ca", "cas")  # the label is the agent's id
    assert done.returncode == 0
    assert done.stdout == (
        f"cli.example {good.ak_name.hex()} with its EK\nits EK is Infineon's, under CN=vendor\n"
    )

    for words, code, text in (
        (["--ek-ca", "cas"], 1, "UntrustedEkError: the registrar has no EK certificate"),
        (["--ek-ca", "nowhere"], 3, "nowhere"),
        ([], 2, "it decides whether the EK is the host's"),
        (["--ek-ca", "cas", "--insecure-no-ek"], 2, "it decides whether the EK is the host's"),
    ):
        done = pin("soft.example", *tls, *words)
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    done = pin("nobody.example", *tls, "--ek-ca", "cas")
    assert done.returncode == 1
    assert "NotRegisteredError: the registrar has no active record" in done.stderr
    assert pin("soft.example", *tls, "--ek-tpm", "ek").returncode == 0
    assert PinStore(tmp_path / "pins").load("soft.example").ek_by_hand
    done = pin("cli2", *tls, "--agent-id", "cli.example", "--ek-tpm", "ek")
    assert done.returncode == 1
    assert "another EK than the one that a person vouched for" in done.stderr
    done = pin("h1", *tls, "--agent-id", "soft.example", "--insecure-no-ek")
    assert done.returncode == 1
    assert "PinChangedError" in done.stderr
    done = pin("h1", *tls, "--agent-id", "soft.example", "--insecure-no-ek", "--replace")
    assert done.returncode == 0
    assert not PinStore(tmp_path / "pins").load("h1").ek_by_hand

    done = pin("x", *tls[:2], "--ek-ca", "cas")  # a CA that we do not know
    assert done.returncode == 3
    assert "the registrar gave no answer" in done.stderr
    done = pin("x", "--registrar", registrar.http_url.replace("127.0.0.1", "r"), "--ek-ca", "cas")
    assert done.returncode == 2
    done = pin("x", "--ak-tpm", "ak", "--ek-ca", "cas")
    assert done.returncode == 2
    assert "go with --registrar" in done.stderr
    assert pin("x", "--ak-tpm", "ak", "--ek-tpm", "ek").returncode == 0


# --- bench bindings ---------------------------------------------------------------------------------


@pytest.mark.real
def test_the_bench_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small: every way verifies everything, and the figures have their names."""
    small = {"CALL_S": 0.002, "ROUNDS": 1, "NEW_CLIENT_COUNT": 2, "WARM_CHUNKS": 2}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    figures = bench.run(1, lambda text: None)
    wanted = {"speedup_vs_pooled_cached_300", "warm_ratio_vs_no_registrar", "cold_start_ratio"}
    wanted |= {"verifications_per_s", "new_client_per_s"}
    for count in (300, 1000):
        for way in ("pooled_cached", "ours", "no_registrar"):
            wanted.add(f"{way}_{count}_per_s")
    assert wanted <= set(figures)
    for name in wanted:
        bounds = figures[f"{name}_range"]
        assert isinstance(bounds, list)
        assert 0 < bounds[0] <= bounds[1]
