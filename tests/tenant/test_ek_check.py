"""Keylime's `ek_check_script`: its environment, the tenant's file, many hosts and little time; as a
command, and as Keylime itself runs it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from evidence_factory import VM
from helpers import FakeQuoter, command, make_answer, make_evidence, server_on_port
from http_server_helpers import make_server
from ima_helpers import GOOD as FILE_GOOD
from ima_helpers import line
from ima_helpers import text as listed
from link_claims import EK, OTHER_EK, claims_bytes
from listed_tpms import ListedTpm
from tenant_of_keylime import KEYLIME_REFUSES, keylime_tenant

from provider_proxy import VtpmLink, ek_digest
from provider_proxy.common.files import demand_ours
from provider_proxy.errors import (
    EkNotLinkedError,
    HostError,
    LogError,
    NotConfirmedError,
    NotFoundError,
    OverloadedError,
    PolicyError,
    ProviderProxyError,
    ReplyError,
    SignatureError,
    UsageError,
    VmNotRunningError,
    WrongVmError,
)
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.model import QuoteRequest, Tenant, mask_of
from provider_proxy.evidence.policy import PcrPolicy, UnsafeAcceptAny
from provider_proxy.evidence.query import parse_quote_query
from provider_proxy.evidence.tpm_keys import parse_public
from provider_proxy.host.batching.batcher import Batcher
from provider_proxy.host.batching.queue import BatchSettings
from provider_proxy.host.config.tables import DEFAULT_ISOLATED
from provider_proxy.host.metrics import Metrics
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.ek_check import (
    MAX_VARIABLE_CHARS,
    GoodAgent,
    check_agent,
    read_environment,
)
from provider_proxy.tenant.hosts_file import HostEntry, load_link_map, parse_link_map
from provider_proxy.tenant.policies import LogRules
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.pins import PinStore

GOOD, REFUSED, USAGE, ENVIRONMENT = 0, 1, 2, 3
AGENT = "d432fbb3-d2f1-4a97-9ef7-75bd81c00000"
FIRMWARE = sha256(b"firmware").digest()

ISOLATED = mask_of(DEFAULT_ISOLATED)


def pem_of(public: bytes) -> str:
    key = parse_public(public).public_key
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


# --- the environment --------------------------------------------------------------------------------

ENVIRON = {"AGENT_UUID": AGENT, "EK_TPM": base64.b64encode(EK).decode(), "EK": pem_of(EK)}


def test_the_environment_of_keylime_is_read() -> None:
    assert read_environment(ENVIRON) == (AGENT, ek_digest(EK))
    rest = {"EK": "", "EK_CERT": "?", "PROVKEYS": "?", "TPM_CERT_STORE": "/nonexistent"}
    assert read_environment(ENVIRON | rest) == (AGENT, ek_digest(EK))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"AGENT_UUID": ""}, UsageError),
        ({"EK_TPM": ""}, UsageError),
        ({"EK_TPM": "A" * (MAX_VARIABLE_CHARS + 1)}, UsageError),
        ({"EK": "A" * (MAX_VARIABLE_CHARS + 1)}, UsageError),
        ({"EK_TPM": "AAAA"}, EkNotLinkedError),
        ({"EK_TPM": "\udcff"}, EkNotLinkedError),
        ({"EK_TPM": "A A="}, EkNotLinkedError),
        ({"EK_TPM": "A" * 8000}, EkNotLinkedError),
        ({"EK_TPM": base64.b64encode(EK + b"\0").decode()}, EkNotLinkedError),
        ({"EK_TPM": base64.b64encode(OTHER_EK).decode()}, EkNotLinkedError),  # not the PEM's
        ({"EK": "not a public key in PEM"}, EkNotLinkedError),
        ({"EK": "\udcff"}, EkNotLinkedError),
        ({"EK": pem_of(OTHER_EK)}, EkNotLinkedError),
    ],
    ids=lambda value: str(value)[:50].encode("ascii", "replace").decode(),
)
def test_a_hostile_environment_is_refused(changes: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error):
        read_environment(ENVIRON | changes)


# --- the tenant's file ------------------------------------------------------------------------------

MAP: dict[str, Any] = {
    "pins": "pins",
    "hosts": {
        "alpha": {"url": "https://alpha:8890", "tpm_policy": "alpha.json", "ca": "/etc/ca.pem"},
        "beta": {"url": "http://127.0.0.1:1", "insecure_any_state": True, "pinned": "old-beta"},
        "gamma": {"url": "https://gamma", "claims": "never", "tpm_policy": "gamma.json"},
    },
    "agents": {
        AGENT: {
            "vm": str(VM),
            "hosts": ["beta", "alpha"],
            "least": "confirmed",
            "ek_issuer": "tpm",
        },
        str(VM): {"hosts": ["alpha"]},
    },
}


def test_a_map_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    """It decides alone which VM is whose."""
    path = tmp_path / "map"
    path.write_text('pins = "pins"\n[hosts]\n[agents]\n')
    load_link_map(path)
    path.chmod(0o666)
    with pytest.raises(HostError, match="everybody can write it"):
        load_link_map(path)


def test_the_map_is_read() -> None:
    known = parse_link_map(MAP, Path("/base"))
    assert known.pins == Path("/base/pins")
    entry = known.agent(AGENT)
    assert (entry.vm, entry.least, entry.ek_issuer) == (VM, "confirmed", "tpm")
    assert [host.pinned for host in entry.hosts] == ["old-beta", "alpha"]
    assert entry.hosts[1].tpm_policy == Path("/base/alpha.json")
    assert entry.hosts[1].ca == Path("/etc/ca.pem")
    assert entry.is_linked
    assert known.limit_s == 60
    own = known.agent(str(VM))
    assert (own.vm, own.least, own.ek_issuer) == (VM, "claimed", None)


@pytest.mark.parametrize("agent", ["", "x", AGENT.upper(), AGENT + "\n", "../pins", "\udcff"])
def test_an_agent_that_is_not_there_is_refused(agent: str) -> None:
    with pytest.raises(WrongVmError):
        parse_link_map(MAP, Path("/base")).agent(agent)


def changed(path: str, value: object) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(MAP))
    *outer, last = path.split(".")
    target = values
    for name in outer:
        target = target[name]
    target[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pins", None),
        ("pins", 1),
        ("pins", "a\0b"),
        ("pin", "pins"),
        ("limit_s", 0),
        ("limit_s", 601),
        ("limit_s", True),
        ("limit_s", "60"),
        ("hosts", None),
        ("hosts", []),
        ("agents", None),
        ("hosts.alpha", "https://alpha"),
        ("hosts.alpha.url", None),
        ("hosts.alpha.url", "alpha"),
        ("hosts.alpha.url", "file:///etc/passwd"),
        ("hosts.alpha.url", "https://" + "x" * 3000),
        ("hosts.alpha.cert", "cert.pem"),
        ("hosts.alpha.pinned", "../alpha"),
        ("hosts.alpha.tpm_policy", None),
        ("hosts.alpha.insecure_any_state", True),
        ("hosts.beta.insecure_any_state", 1),
        ("hosts.alpha.claims", "always"),
        ("hosts.alpha.claim", "never"),
        ("hosts.gamma.tpm_policy", None),
        (f"agents.{AGENT}.vm", "web"),
        (f"agents.{AGENT}.hosts", []),
        (f"agents.{AGENT}.hosts", "alpha"),
        (f"agents.{AGENT}.hosts", ["alpha", "alpha"]),
        (f"agents.{AGENT}.hosts", ["delta"]),
        (f"agents.{AGENT}.hosts", [["alpha"]]),
        (f"agents.{AGENT}.hosts", ["alpha", "gamma"]),
        (f"agents.{VM}.least", "attested"),
        (f"agents.{AGENT}.ek_issuer", "me"),
        (f"agents.{AGENT}.ek", "x"),
        ("agents.not-a-uuid", {"hosts": ["alpha"]}),
        ("agents.", {"vm": str(VM), "hosts": ["alpha"]}),
    ],
)
def test_a_bad_map_is_refused(path: str, value: object) -> None:
    values = changed(path, value)
    with pytest.raises(UsageError) as caught:
        parse_link_map(values, Path("/base"))
    assert path.split(".")[-1] in str(caught.value) or "insecure_any_state" in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff", b"pins = ", b"[hosts]\n[hosts]\n"])
def test_a_map_that_is_no_toml_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "map").write_bytes(data)
    with pytest.raises(UsageError):
        load_link_map(tmp_path / "map")


@pytest.mark.parametrize("demand", [{"least": "registered"}, {"ek_issuer": "tpm"}])
def test_hosts_without_claims_cannot_be_asked_for_a_link(demand: dict[str, object]) -> None:
    values = changed(f"agents.{VM}", {"hosts": ["gamma"]})
    assert parse_link_map(values, Path()).agent(str(VM)).is_linked is False
    values["agents"][str(VM)] |= demand
    with pytest.raises(UsageError, match="apply only to hosts that prove the link"):
        parse_link_map(values, Path())


# --- hosts, and time --------------------------------------------------------------------------------

Answer = Callable[[SoftTpm, QuoteRequest], httpx.Response | None]


def claiming(**changes: object) -> Answer:
    def answer(tpm: SoftTpm, request: QuoteRequest) -> httpx.Response:
        claims = claims_bytes(**changes) if request.vm else None
        return httpx.Response(
            200, content=b"".join(make_answer(tpm, request, claims=claims).body())
        )

    return answer


def status(code: int, *, retry_after: int | None = None) -> Answer:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return lambda _tpm, _request: httpx.Response(code, headers=headers)


def nobody(_tpm: SoftTpm, _request: QuoteRequest) -> None:
    return None


class Site:
    """Proxies that answer one after the other what they are told, the last of it for ever."""

    def __init__(self, folder: Path, claims: str = "link", /, **hosts: list[Answer]) -> None:
        self.answers = hosts
        self.tpms = {name: SoftTpm(pcrs={0: b"firmware"}) for name in hosts}
        self.asked: list[tuple[str, float]] = []
        self.closed: list[str] = []
        for name, tpm in self.tpms.items():
            PinStore(folder / "pins").pin(name, tpm.ak_public)
        entry = {"tpm_policy": "policy.json", "claims": claims}
        self.values: dict[str, Any] = {
            "pins": "pins",
            "hosts": {name: {"url": f"https://{name}", **entry} for name in hosts},
            "agents": {AGENT: {"vm": str(VM), "hosts": list(hosts)}},
        }
        self.folder = folder

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = request.url.host
        self.asked.append((name, trio.current_time()))
        asked = parse_quote_query(request.url.query.decode("ascii"))
        answers = self.answers[name]
        answer = (answers.pop(0) if len(answers) > 1 else answers[0])(self.tpms[name], asked)
        if answer is None:
            raise httpx.ConnectError("nobody is there")
        return answer

    @asynccontextmanager
    async def open_proxy(self, host: HostEntry) -> AsyncIterator[ProxyClient]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(self)) as http:
            yield ProxyClient(http, host.url)
        self.closed.append(host.name)

    async def check(self, ek: bytes = EK) -> GoodAgent:
        return await check_agent(
            parse_link_map(self.values, self.folder),
            AGENT,
            ek_digest(ek),
            policy_of=lambda _host: PcrPolicy({0: [FIRMWARE]}),
            open_proxy=self.open_proxy,
        )

    async def refused(self, kind: type[ProviderProxyError], message: str | None = None) -> None:
        with pytest.raises(kind, match=message) as caught:
            await self.check()
        assert type(caught.value) is kind
        assert sorted(self.closed) == sorted(self.answers)


async def test_one_host_proves_the_link_whatever_the_others_say(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    site = Site(
        tmp_path,
        liar=[claiming(running=False)],
        dead=[nobody],
        off=[status(404)],
        good=[claiming()],
    )
    good = await site.check()
    assert [proven.host.name for proven in good.hosts] == ["good"]
    assert isinstance(good.link, VtpmLink)
    assert good.hosts[0].quote.pcrs == {0: FIRMWARE}
    assert trio.current_time() < 1  # and keep nobody waiting
    assert sorted(site.closed) == ["dead", "good", "liar", "off"]


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        ([[status(404)], [status(404)]], VmNotRunningError, "asked: h0, h1"),
        ([[status(404)], [claiming(running=False)]], VmNotRunningError, "does not run"),
        ([[claiming(eks=[])], [claiming(vm=str(uuid.UUID(int=1)))]], EkNotLinkedError, None),
        ([[nobody], [claiming(confirmed=False)]], NotConfirmedError, None),
        ([[nobody], [status(404)]], ReplyError, "h0: no proof within 20 s: .*nobody is there"),
        ([[status(403)], [status(404)]], ReplyError, "h0: .*answered 403"),
        ([[status(503, retry_after=3600)]], ReplyError, "h0: .*answered 503"),
    ],
)
async def test_whatever_is_not_proven_in_time_refuses(
    autojump_clock: trio.testing.MockClock,
    tmp_path: Path,
    answers: list[list[Answer]],
    kind: type[ProviderProxyError],
    message: str | None,
) -> None:
    site = Site(tmp_path, **{f"h{i}": given for i, given in enumerate(answers)})
    site.values["limit_s"] = 20
    least = "confirmed" if kind is NotConfirmedError else "claimed"
    site.values["agents"][AGENT]["least"] = least
    await site.refused(kind, message)
    assert trio.current_time() <= 20


async def test_what_another_try_may_change_is_tried_with_growing_waits(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    passing = [nobody, *map(status, (408, 429, 500, 502, 503)), status(504, retry_after=10)]
    site = Site(tmp_path, one=[*passing, claiming()])
    await site.check()
    times = [at for _, at in site.asked]
    waits = [b - a for a, b in itertools.pairwise(times)]
    assert len(waits) == len(passing)
    for wait, base in zip(waits, (0.5, 1, 2, 4, 8, 8), strict=False):
        assert base * 0.499 < wait < base * 1.001
    assert waits[-1] > 9.99  # what the proxy asked for


async def test_a_proxy_that_never_ends_its_answer(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    site = Site(tmp_path, one=[claiming()])

    class Endless(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await trio.sleep_forever()
            raise AssertionError

    @asynccontextmanager
    async def open_proxy(host: HostEntry) -> AsyncIterator[ProxyClient]:
        async with httpx.AsyncClient(transport=Endless()) as http:
            yield ProxyClient(http, host.url)
        site.closed.append(host.name)

    site.open_proxy = open_proxy  # type: ignore[method-assign]
    await site.refused(ReplyError, "no proof within 60 s: no answer")
    assert trio.current_time() == 60


async def test_hosts_without_claims_must_all_be_good(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    site = Site(tmp_path, "never", one=[claiming()], two=[status(503), claiming()])
    good = await site.check(OTHER_EK)  # any EK: nobody says whose it is
    assert [proven.host.name for proven in good.hosts] == ["one", "two"]
    assert good.link is None
    site.closed.clear()
    site.tpms["two"].extend(0, b"another firmware")
    site.answers["one"] = [nobody]
    await site.refused(PolicyError, "PCR 0")
    assert trio.current_time() < 2  # one refusal settles it
    site.answers["one"] = [claiming()]
    for last, kind in ((nobody, ReplyError), (status(404), ReplyError)):
        site.closed.clear()
        site.answers["two"] = [last]
        await site.refused(kind, "two: no proof")


async def test_the_logs_of_a_host_are_judged(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    lines = [line("boot_aggregate"), line("/usr/bin/sh")]
    sent: dict[str, object] = {}

    def answer(tpm: SoftTpm, asked: QuoteRequest) -> httpx.Response:
        values = json.loads(make_evidence(tpm, asked))
        values["results"] |= sent
        return httpx.Response(200, json=values)

    site = Site(tmp_path, "never", one=[answer])
    tpm = ListedTpm(lines)
    PinStore(tmp_path / "pins2").pin("one", tpm.ak_public)
    site.tpms["one"], site.values["pins"] = tpm, "pins2"
    policy = {"digests": {"boot_aggregate": [FILE_GOOD], "/usr/bin/sh": [FILE_GOOD]}}
    (tmp_path / "runtime.json").write_text(json.dumps(policy))
    site.values["hosts"]["one"] |= {"runtime_policy": "runtime.json"}
    sent |= {"ima_measurement_list": listed(lines), "ima_measurement_list_entry": 0}
    policy_of = lambda _host: UnsafeAcceptAny()  # noqa: E731
    known = parse_link_map(site.values, tmp_path)

    async def check() -> GoodAgent:
        return await check_agent(
            known, AGENT, ek_digest(EK), policy_of=policy_of, open_proxy=site.open_proxy
        )

    good = await check()
    assert good.hosts[0].quote.pcrs.keys() == {10}
    sent.clear()
    with pytest.raises(LogError, match="no IMA list"):
        await check()
    sent |= {"ima_measurement_list": "", "ima_measurement_list_entry": 0}
    tpm.lines = []
    with pytest.raises(LogError, match=r"does not lead|never extended"):
        await check()
    tpm.lines = lines
    sent |= {"ima_measurement_list": listed(lines)}
    del policy["digests"]["/usr/bin/sh"]
    (tmp_path / "runtime.json").write_text(json.dumps(policy))
    with pytest.raises(LogError, match="/usr/bin/sh is not in"):
        await check()


@pytest.mark.parametrize(
    ("keys", "rules"),
    [
        ({"ima": True}, LogRules(ima=True)),
        ({"uefi": True}, LogRules(uefi_mask=0xFF)),
        (
            {"uefi": True, "uefi_pcrs": [0, 7], "boot_policy": "b"},
            LogRules(uefi_mask=0x81, boot_policy=Path("/base/b")),
        ),
        (
            {"runtime_policy": "r", "runtime_policy_key": "k", "ima_violations": "count"},
            LogRules(
                runtime_policy=Path("/base/r"),
                runtime_policy_key=Path("/base/k"),
                violations=Violations.COUNT,
            ),
        ),
    ],
)
def test_what_a_host_s_logs_must_be(keys: dict[str, Any], rules: LogRules) -> None:
    values = changed("hosts.alpha.tpm_policy", "p")
    del values["hosts"]["alpha"]["tpm_policy"]
    values["hosts"]["alpha"] |= keys
    assert parse_link_map(values, Path("/base")).agent(str(VM)).hosts[0].logs == rules


@pytest.mark.parametrize(
    "keys",
    [
        {"uefi_pcrs": [0]},
        {"boot_policy": "b"},
        {"runtime_policy_key": "k"},
        {"ima_violations": "x"},
    ],
)
def test_keys_about_logs_that_do_not_go_together(keys: dict[str, Any]) -> None:
    values = changed("hosts.alpha.ca", "x")
    values["hosts"]["alpha"] |= keys
    with pytest.raises(ProviderProxyError, match=next(iter(keys))):
        parse_link_map(values, Path("/base"))


async def test_another_host_s_proxy_in_its_place(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    site = Site(tmp_path, one=[claiming()])
    site.tpms["one"] = SoftTpm(pcrs={0: b"firmware"})
    await site.refused(SignatureError)


async def test_a_host_that_is_not_pinned_is_said_at_once(tmp_path: Path) -> None:
    site = Site(tmp_path, one=[claiming()])
    site.values["hosts"]["one"]["pinned"] = "elsewhere"
    with pytest.raises(UsageError, match="elsewhere"):
        await site.check()
    assert not site.asked


async def test_a_disk_that_takes_nothing_refuses(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise HostError("the disk is full")

    site = Site(tmp_path, one=[claiming()])
    monkeypatch.setattr("provider_proxy.trust.pins.write_private", full)
    await site.refused(HostError, "disk is full")


# --- whose files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o622])
def test_a_file_that_others_can_change_decides_nothing(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.touch(0o644)
    demand_ours(path)
    demand_ours(tmp_path)
    path.chmod(mode)
    with pytest.raises(HostError, match="other users can change it"):
        demand_ours(path)


def test_a_place_that_others_can_change_decides_nothing(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.mkdir()
    path = mine / "file"
    path.touch(0o644)
    link.symlink_to(mine)
    mine.chmod(0o1777)  # as /tmp: nobody else can replace what is in it
    demand_ours(path)
    with pytest.raises(HostError, match="other users can change it"):
        demand_ours(mine)  # but add to it
    mine.chmod(0o777)
    for way in (path, link / "file"):
        with pytest.raises(HostError, match="other users can change it"):
            demand_ours(way)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_another_s_file_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(HostError, match="other users can change it"):
        demand_ours(path)


def test_what_is_no_file_decides_nothing(tmp_path: Path) -> None:
    circle, pipe = tmp_path / "circle", tmp_path / "pipe"
    circle.symlink_to(circle)
    os.mkfifo(pipe)
    for path in (circle, pipe, tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(HostError):
            demand_ours(path)


# --- as Keylime runs it, against a server -------------------------------------------------------------


class Hosts:
    """Servers of two hosts, and a tenant's file about them. `claims` says what each claims."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claims: dict[str, bytes | None] = {"alpha": claims_bytes(), "beta": None}
        self.tpms = {name: SoftTpm(pcrs={0: b"firmware"}) for name in self.claims}
        self.busy = 0
        self.ports: dict[str, int] = {}
        self.asked: list[str] = []
        for name, tpm in self.tpms.items():
            PinStore(folder / "pins").pin(name, tpm.ak_public)
        policy = json.dumps({"0": [sha256(b"firmware").hexdigest()]})
        (folder / "policy.json").write_text(policy)

    def claims_of(self, name: str) -> Callable[[Tenant, QuoteRequest], bytes]:
        def claims(_tenant: Tenant, _request: QuoteRequest) -> bytes:
            self.asked.append(name)
            if self.busy:
                self.busy -= 1
                raise OverloadedError("busy", retry_after_s=0.1)
            found = self.claims[name]
            if found is None:
                raise NotFoundError("no VM of yours with this UUID runs on this host")
            return found

        return claims

    def write_map(
        self, ports: dict[str, int], *, agent: str = "", limit_s: float = 20, more: str = ""
    ) -> None:
        lines = ['pins = "pins"', f"limit_s = {limit_s}"]
        for name, port in ports.items():
            lines += [f"[hosts.{name}]", f'url = "http://127.0.0.1:{port}"']
            lines += ['tpm_policy = "policy.json"', more]
        names = ", ".join(f'"{name}"' for name in reversed(ports))
        lines += [f'[agents."{AGENT}"]', f'vm = "{VM}"', f"hosts = [{names}]", agent]
        (self.folder / "map.toml").write_text("\n".join(lines))

    async def run(self, **environ: str) -> tuple[int, str]:
        """The command as a program: exit code and all that it said."""
        done = await trio.run_process(
            command("ek-check", "--config", "map.toml"),
            env={**os.environ, **ENVIRON, **environ},
            cwd=self.folder,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout.decode()


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    made = Hosts(tmp_path)
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        ports = made.ports
        for name, tpm in made.tpms.items():
            batcher = Batcher(
                FakeQuoter(tpm),
                BatchSettings(isolate_mask=ISOLATED, window_s=0),
                Metrics(),
                claims=made.claims_of(name),
            )
            nursery.start_soon(batcher.run)
            address = await stack.enter_async_context(server_on_port(make_server(batcher.submit)))
            ports[name] = int(address.rpartition(":")[2])
        made.write_map(ports)
        yield made
        nursery.cancel_scope.cancel()


@pytest.mark.real
async def test_an_agent_is_linked_where_its_vm_runs(hosts: Hosts) -> None:
    hosts.busy = 1  # the first answer is 503
    hosts.claims["beta"] = claims_bytes(running=False)  # a hostile host must not be in the way
    code, said = await hosts.run()
    assert code == GOOD, said
    assert f"linked: VM {VM} runs on alpha" in said
    assert sorted(set(hosts.asked)) == ["alpha", "beta"]
    assert "alpha: good: fresh quote of PCRs 0, as policy.json allows" in said


@pytest.mark.real
async def test_an_agent_that_is_not_linked_is_refused(hosts: Hosts) -> None:
    """Each exit code; the causes are above."""
    code, said = await hosts.run(AGENT_UUID=str(uuid.uuid4()))
    assert (code, "WrongVmError" in said) == (REFUSED, True)
    assert hosts.asked == []
    code, said = await hosts.run(EK_TPM=base64.b64encode(OTHER_EK).decode(), EK="")
    assert (code, "EkNotLinkedError" in said) == (REFUSED, True)
    hosts.write_map({"alpha": 1}, limit_s=0.5)  # nobody there
    code, said = await hosts.run()
    assert (code, "Traceback" in said) == (ENVIRONMENT, False)
    hosts.write_map(hosts.ports, more="claims = 7")
    code, said = await hosts.run()
    assert (code, "claims must be" in said) == (USAGE, True)


@pytest.mark.real
async def test_hosts_without_claims_are_judged_by_state_and_it_says_so(hosts: Hosts) -> None:
    hosts.write_map(hosts.ports, more='claims = "never"')
    code, said = await hosts.run(EK_TPM=base64.b64encode(OTHER_EK).decode(), EK="")
    assert code == GOOD, said
    assert f"NOT linked: nothing proves that the VM {VM} runs on beta, alpha" in said
    hosts.tpms["beta"].extend(0, b"another firmware")
    code, said = await hosts.run()
    assert (code, "beta: refused: PolicyError" in said) == (REFUSED, True)


@pytest.mark.real
@pytest.mark.parametrize("name", ["map.toml", "policy.json", "pins", "pins/beta.json"])
async def test_files_that_others_can_change_refuse(hosts: Hosts, name: str) -> None:
    path = hosts.folder / name
    path.chmod(path.stat().st_mode | 0o020)
    code, said = await hosts.run()
    assert (code, hosts.asked) == (ENVIRONMENT, [])
    assert f"{name}: other users can change it" in said


@pytest.mark.real
async def test_keylime_s_own_tenant_runs_it(hosts: Hosts) -> None:
    words = ("ek-check", "--config", str(hosts.folder / "map.toml"))
    code, said = await keylime_tenant(hosts.folder, AGENT, EK, *words)
    assert code == 0, said
    assert "ek_check output: " in said
    assert "alpha: good: fresh quote of PCRs 0, as policy.json allows\nlinked: VM" in said
    hosts.claims["alpha"] = claims_bytes(running=False)
    code, said = await keylime_tenant(hosts.folder, AGENT, EK, *words)
    assert code == KEYLIME_REFUSES, said
    assert "failed to validate EK" in said
    assert "VmNotRunningError: the VM does not run on this host" in said
