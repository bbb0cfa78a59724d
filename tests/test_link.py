"""The tenant's check of a vTPM's link: the library as a tenant calls it, its file of agents, the command
as people and as Keylime run it. What claims and deep quotes must look like stands in the vectors."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from evidence_factory import VM, FixedTpm, SealedBatch, ec_key, request_number
from helpers import FakeQuoter, command, make_answer
from hypothesis import given
from hypothesis import strategies as st
from keylime_helpers import PYTHON, keylime_environment
from test_server import make_door

import provider_proxy
from provider_proxy import VtpmLink, ask_host, deep_verify, ek_digest, new_deep_question
from provider_proxy.attestation_key import parse_ak, parse_public
from provider_proxy.batcher import Batcher
from provider_proxy.cli import main as cli
from provider_proxy.cli.verify_link import MAX_VARIABLE_CHARS, read_environment
from provider_proxy.errors import (
    EkNotLinkedError,
    LinkClaimsError,
    LinkError,
    NonceSpentError,
    NotFoundError,
    OverloadedError,
    StaleEvidenceError,
    UsageError,
    WrongVmError,
)
from provider_proxy.link import parse_claims
from provider_proxy.link_map import LinkMap, load_link_map, parse_link_map
from provider_proxy.metrics import Metrics
from provider_proxy.model import HashAlg, Nonce, PcrMask, QuoteRequest, Tenant, TrustedHost
from provider_proxy.pins import PinStore
from provider_proxy.policy import UnsafeAcceptAny
from provider_proxy.request_file import RequestRecord, encode_request
from provider_proxy.soft_tpm import SoftTpm, encode_public
from provider_proxy.verify import MemoryHistory
from provider_proxy.waiting_room import BatchSettings
from provider_proxy.wire import encode_quote

GOOD, REFUSED, USAGE, ENVIRONMENT = 0, 1, 2, 3
AGENT = "d432fbb3-d2f1-4a97-9ef7-75bd81c00000"
EK_ATTRIBUTES = 0x000300B2  # an EK's of the TCG's template: restricted, decrypt
EK = encode_public(ec_key("ek").public_key(), EK_ATTRIBUTES)
OTHER_EK = encode_public(ec_key("other ek").public_key(), EK_ATTRIBUTES)
LINK = VtpmLink(vm=VM, ek=ek_digest(EK))
CLAIMS: dict[str, Any] = {
    "vm": str(VM),
    "eks": [{"alg": "p256", "spki_sha256": ek_digest(EK).hex()}],
    "running": True,
    "confirmed": False,
    "issuer": "delegate",
    "migrated": False,
    "generation": 1,
    "registered_at": 1_790_000_000,
}


def claims_bytes(**changes: object) -> bytes:
    return json.dumps(CLAIMS | changes).encode()


def pem_of(public: bytes) -> str:
    key = parse_public(public).public_key
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


# --- the library ------------------------------------------------------------------------------------


def test_without_claims_nothing_is_linked() -> None:
    with pytest.raises(LinkClaimsError):
        parse_claims(None)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(CLAIMS)), JSON_VALUES))
def test_whatever_is_claimed_links_or_is_a_link_error(changes: dict[str, object]) -> None:
    with contextlib.suppress(LinkError):
        LINK.judge(parse_claims(CLAIMS | changes))
        assert "eks" not in changes or changes["eks"] == CLAIMS["eks"]
        assert changes.get("running", True) is True


def test_an_ek_is_given_by_its_digest() -> None:
    with pytest.raises(UsageError):
        VtpmLink(vm=VM, ek=EK)
    with pytest.raises(EkNotLinkedError):
        ek_digest(b"\x00\x04nope")


class Deep:
    """A tenant between a vTPM and a host."""

    def __init__(self) -> None:
        self.vtpm = SoftTpm(pcrs={0: b"guest"})
        self.host = SoftTpm()
        self.history = MemoryHistory()
        self.question = new_deep_question(now_s=100.0)
        self.quote = self.vtpm.quote(self.question.nonce, HashAlg.SHA256, 1)
        self.challenge = ask_host(
            self.question, self.quote, link=LINK, mask=1, history=self.history
        )
        answer = make_answer(self.host, self.challenge.request, claims=claims_bytes())
        self.body = b"".join(answer.body())

    def verify(self, *, now_s: float = 101.0, link: VtpmLink = LINK) -> dict[int, bytes]:
        verified = deep_verify(
            self.body,
            self.challenge,
            TrustedHost(ak=self.host.ak),
            self.history,
            nonce=self.question.nonce,
            vtpm_quote=self.quote,
            vak=parse_ak(self.vtpm.ak_public),
            vtpm_policy=UnsafeAcceptAny(),
            host_policy=UnsafeAcceptAny(),
            link=link,
            now_s=now_s,
        )
        assert verified.host.claims == CLAIMS
        return dict(verified.vtpm.pcrs)


def test_a_deep_quote_verifies_once() -> None:
    deep = Deep()
    assert deep.verify() == {0: sha256(b"guest").digest()}
    with pytest.raises(NonceSpentError):
        deep.verify()


def test_a_deep_quote_is_as_old_as_the_vtpm_s_nonce() -> None:
    deep = Deep()
    with pytest.raises(StaleEvidenceError):
        deep.verify(now_s=161.0)


def test_a_deep_quote_about_another_vm_was_never_asked_for() -> None:
    deep = Deep()
    with pytest.raises(UsageError):
        deep.verify(link=VtpmLink(vm=uuid.uuid4(), ek=ek_digest(EK)))


DOC = (Path(__file__).parent.parent / "docs/vtpm.md").read_text(encoding="utf-8")


def test_the_documented_code_runs() -> None:
    vtpm, host = SoftTpm(pcrs={0: b"guest"}), SoftTpm()

    def ask_the_proxy(request: QuoteRequest) -> bytes:
        return b"".join(make_answer(host, request, claims=claims_bytes(confirmed=True)).body())

    names: dict[str, Any] = vars(provider_proxy) | {
        "time": time,
        "ordered": VM,
        "ek_tpm": EK,
        "host": TrustedHost(ak=host.ak),
        "history": MemoryHistory(),
        "vak": vtpm.ak,
        "host_pcrs": UnsafeAcceptAny(),
        "guest_pcrs": UnsafeAcceptAny(),
        "ask_the_proxy": ask_the_proxy,
        "ask_the_agent": lambda nonce: vtpm.quote(nonce, HashAlg.SHA256, 1),
    }
    blocks = re.findall(r"^```python\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["quote"].claims["confirmed"] is True
    assert dict(names["both"].vtpm.pcrs) == {0: sha256(b"guest").digest()}


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
        ({"EK": "no PEM"}, EkNotLinkedError),
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
        "gamma": {"url": "https://gamma", "claims": "never"},
    },
    "agents": {
        AGENT: {"vm": str(VM), "hosts": ["beta", "alpha"], "confirmed": True, "ek_issuer": "tpm"},
        str(VM): {"hosts": ["alpha"]},
    },
}


def test_the_map_is_read() -> None:
    known = parse_link_map(MAP, Path("/base"))
    assert known.pins == Path("/base/pins")
    entry = known.agent(AGENT)
    assert (entry.vm, entry.confirmed, entry.ek_issuer) == (VM, True, "tpm")
    assert [host.pinned for host in entry.hosts] == ["old-beta", "alpha"]
    assert entry.hosts[1].tpm_policy == Path("/base/alpha.json")
    assert entry.hosts[1].ca == Path("/etc/ca.pem")
    own = known.agent(str(VM))
    assert (own.vm, own.confirmed, own.ek_issuer) == (VM, False, None)


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
        (f"agents.{AGENT}.vm", "web"),
        (f"agents.{AGENT}.hosts", []),
        (f"agents.{AGENT}.hosts", "alpha"),
        (f"agents.{AGENT}.hosts", ["alpha", "alpha"]),
        (f"agents.{AGENT}.hosts", ["delta"]),
        (f"agents.{AGENT}.hosts", [["alpha"]]),
        (f"agents.{AGENT}.confirmed", "yes"),
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


def test_a_host_that_is_marked_needs_no_policy() -> None:
    assert isinstance(parse_link_map(changed("hosts.gamma.pinned", "x"), Path()), LinkMap)


# --- saved evidence ---------------------------------------------------------------------------------


class Saved:
    """A tenant's files, all good: evidence with claims, and a vTPM's quote that its nonce holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = FixedTpm()
        vtpm = FixedTpm(ec_key("vak"))
        quote = vtpm.quote(b"tenant-nonce-0123456789", HashAlg.SHA256, 1)
        self.put("vtpm-quote", encode_quote(quote).encode())
        self.put("vak", base64.b64encode(vtpm.ak_public))
        self.put("ak", self.host.ak_public)
        self.put("ek", base64.b64encode(EK))
        self.put("other-ek", OTHER_EK)
        self.put("policy.json", json.dumps({"0": [sha256(b"firmware").hexdigest()]}).encode())
        self.ask(request_number(7, mask=0x1, vm=VM))
        # The nonce that `fetch --vtpm-quote` takes, from the text of the format.
        joined = b"provider-proxy/deep/1\0" + bytes([23]) + b"tenant-nonce-0123456789"
        joined += sha256(quote.attest).digest() + sha256(quote.signature).digest()
        self.deep = QuoteRequest(
            nonce=Nonce(sha256(joined).hexdigest().encode()), mask=PcrMask(1), vm=VM
        )

    def put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def ask(self, request: QuoteRequest, **claims: object) -> None:
        batch = SealedBatch(tpm=self.host, requests=(request,), claims=(claims_bytes(**claims),))
        body = batch.body(0)
        record = RequestRecord(
            request=request,
            made_at_s=0.0,
            answered_after_s=1.0,
            evidence_sha256=sha256(body).digest(),
        )
        self.put("evidence", body)
        self.put("request", encode_request(record))

    def run(self, words: str, *more: str) -> int:
        line = f"{words} evidence --request request --ak-tpm ak --tpm-policy policy.json"
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            return cli.run([*line.split(), *more])
        finally:
            os.chdir(before)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


OWN_LINK = ("--vm", str(VM), "--ek", "ek")
DEEP = ("--vtpm-quote", "vtpm-quote", "--vtpm-nonce", "tenant-nonce-0123456789", "--vak", "vak")
ANY = "--insecure-any-vtpm-state"


@pytest.mark.parametrize("words", ["verify-link files", "verify"])
def test_saved_evidence_is_linked(
    saved: Saved, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved.run(words, *OWN_LINK) == GOOD
    said = capsys.readouterr()
    assert f"linked: VM {VM} runs on the host" in said.out
    assert "claimed, not confirmed" in said.out
    assert saved.run(words, *OWN_LINK, "--json") == GOOD
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    values = values.get("link", values)
    assert values["ek"] == ek_digest(EK).hex()
    assert values["confirmed"] is False


def test_verify_says_that_claims_were_not_judged(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved.run("verify") == GOOD
    assert "not judged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--vm", str(uuid.uuid4()), "--ek", "ek"), "WrongVmError"),
        (("--vm", str(VM), "--ek", "other-ek"), "EkNotLinkedError"),
        ((*OWN_LINK, "--confirmed"), "NotConfirmedError"),
        ((*OWN_LINK, "--ek-issuer", "tpm"), "LinkIssuerError"),
        ((*OWN_LINK, *DEEP, ANY), "DeepNonceError"),
    ],
)
def test_saved_evidence_is_refused(
    saved: Saved, more: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved.run("verify-link files", *more) == REFUSED
    assert error in capsys.readouterr().err


def test_saved_evidence_of_a_vm_that_is_off(
    saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.ask(request_number(7, mask=0x1, vm=VM), running=False)
    assert saved.run("verify-link files", *OWN_LINK) == REFUSED
    assert "VmNotRunningError" in capsys.readouterr().err
    saved.ask(request_number(7, mask=0x1))
    assert saved.run("verify-link files", *OWN_LINK) == REFUSED  # claims that were not asked for


def test_saved_deep_quote(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    saved.ask(saved.deep)
    assert saved.run("verify-link files", *OWN_LINK, *DEEP, ANY, "--json") == GOOD
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["vtpm_pcrs"] == {"0": sha256(b"firmware").hexdigest()}
    assert saved.run("verify-link files", *OWN_LINK, *DEEP, "--vtpm-policy", "policy.json") == GOOD
    (saved.folder / "policy2.json").write_text(json.dumps({"0": ["00" * 32]}))
    assert (
        saved.run("verify-link files", *OWN_LINK, *DEEP, "--vtpm-policy", "policy2.json") == REFUSED
    )
    assert "VtpmQuoteError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        OWN_LINK[:2],
        OWN_LINK[2:],
        ("--vm", "web", "--ek", "ek"),
        ("--vm", str(VM), "--ek", "policy.json"),
        (*OWN_LINK, *DEEP),
        (*OWN_LINK, ANY),
        (*OWN_LINK, *DEEP[:4], ANY),
        (*OWN_LINK, *DEEP[2:], ANY),
        (*OWN_LINK, *DEEP[2:], ANY, "--vtpm-quote", "policy.json"),
    ],
)
def test_half_a_link_is_a_usage_error(saved: Saved, more: tuple[str, ...]) -> None:
    code: object
    try:
        code = saved.run("verify-link files", *more)
    except SystemExit as exc:  # argparse's own
        code = exc.code
    assert code == USAGE


# --- as Keylime runs it, against a door -------------------------------------------------------------


class Hosts:
    """Doors of two hosts, and a tenant's file about them. `claims` says what each claims."""

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
                raise NotFoundError("no such VM runs here for you")
            return found

        return claims

    def write_map(self, ports: dict[str, int], *, agent: str = "", **more: str) -> None:
        lines = ['pins = "pins"']
        for name, port in ports.items():
            lines += [f"[hosts.{name}]", f'url = "http://127.0.0.1:{port}"']
            lines += ['tpm_policy = "policy.json"', more.get(name, "")]
        names = ", ".join(f'"{name}"' for name in reversed(ports))
        lines += [f'[agents."{AGENT}"]', f'vm = "{VM}"', f"hosts = [{names}]", agent]
        (self.folder / "map.toml").write_text("\n".join(lines))

    async def run(self, **environ: str) -> tuple[int, str]:
        """The command as a program: exit code and all that it said."""
        done = await trio.run_process(
            command("verify-link", "agent", "--map", "map.toml"),
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
    async with trio.open_nursery() as nursery:
        ports = made.ports
        for name, tpm in made.tpms.items():
            batcher = Batcher(
                FakeQuoter(tpm),
                BatchSettings(window_s=0),
                Metrics(),
                claims=made.claims_of(name),
            )
            nursery.start_soon(batcher.run)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            ports[name] = listeners[0].socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, make_door(batcher.submit).serve, listeners)
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
    assert hosts.asked[:2] == ["beta", "beta"]  # asked first, and again; its claims are refused
    assert "alpha" in hosts.asked
    assert "VmNotRunningError" in said


@pytest.mark.real
async def test_an_agent_that_is_not_linked_is_refused(hosts: Hosts) -> None:
    ports = hosts.ports
    code, said = await hosts.run(AGENT_UUID=str(uuid.uuid4()))
    assert (code, "WrongVmError" in said) == (REFUSED, True)
    assert hosts.asked == []
    code, said = await hosts.run(EK_TPM=base64.b64encode(OTHER_EK).decode(), EK="")
    assert (code, "EkNotLinkedError" in said) == (REFUSED, True)
    hosts.claims["alpha"] = None
    code, said = await hosts.run()
    assert (code, "VmNotRunningError" in said) == (REFUSED, True)
    hosts.claims["alpha"] = claims_bytes()
    hosts.write_map(ports, agent="confirmed = true")
    code, said = await hosts.run()
    assert (code, "NotConfirmedError" in said) == (REFUSED, True)
    hosts.asked.clear()
    hosts.claims["alpha"] = None
    hosts.write_map(ports, beta='claims = "never"')
    code, said = await hosts.run()
    assert (code, "ClaimsNeverError" in said, hosts.asked) == (REFUSED, True, ["alpha"])
    hosts.claims["alpha"] = claims_bytes()
    hosts.write_map({"alpha": 1})  # nobody there
    code, said = await hosts.run()
    assert (code, "Traceback" in said) == (ENVIRONMENT, False)
    hosts.write_map({"alpha": ports["beta"]})  # another host's proxy answers in its place
    hosts.claims["beta"] = claims_bytes()
    code, said = await hosts.run()
    assert (code, "SignatureError" in said) == (REFUSED, True)
    hosts.write_map({"alpha": ports["alpha"]})
    hosts.tpms["alpha"].extend(0, b"another firmware")
    code, said = await hosts.run()
    assert (code, "PolicyError" in said) == (REFUSED, True)


CALL_SCRIPT = """
import os, sys
from keylime import cert_utils
sys.exit(0 if cert_utils.verify_ek_script(sys.argv[1], dict(os.environ), sys.argv[2]) else 7)
"""


@pytest.mark.real
async def test_keylime_s_own_call_of_the_script(hosts: Hosts, tmp_path: Path) -> None:
    script = tmp_path / "check"
    words = " ".join(command("verify-link", "agent", "--map", str(hosts.folder / "map.toml")))
    script.write_text(f"#!/bin/sh\nexec {words}\n")
    script.chmod(0o755)
    environment = keylime_environment(tmp_path) | ENVIRON | {"PROVKEYS": "{}", "EK_CERT": ""}
    for claims, code in ((claims_bytes(), 0), (claims_bytes(running=False), 7)):
        hosts.claims["alpha"] = claims
        done = await trio.run_process(
            [PYTHON, "-c", CALL_SCRIPT, script, tmp_path],
            env=environment,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert done.returncode == code, done.stderr.decode()
