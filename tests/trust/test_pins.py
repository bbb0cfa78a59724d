"""Pinned hosts: the files, several processes at once, the clock rule of a tenant that pins, and a real
TPM that is reset, resumed and rolled back."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from helpers import LIMIT_S, make_evidence, wait_until
from tpm_helpers import Swtpm, answer_of, open_quoter, swtpm_at, tool

from provider_proxy.errors import (
    ClockError,
    EvidenceFormatError,
    HostError,
    NonceSpentError,
    PinChangedError,
    ProviderProxyError,
    UntrustedAkError,
    UsageError,
)
from provider_proxy.evidence.model import ClockState, VerifiedQuote
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.tpm_writer import AK_ATTRIBUTES, encode_ek, encode_public
from provider_proxy.evidence.verify import Challenge, Verifier, new_challenge
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.pins import PinnedHost, PinStore

LABEL = "host-17"


def state(clock_ms: int, *, resets: int = 1, restarts: int = 0) -> ClockState:
    return ClockState(reset_count=resets, restart_count=restarts, clock_ms=clock_ms)


@pytest.fixture
def store(tmp_path: Path) -> PinStore:
    return PinStore(tmp_path / "pins")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pins" / f"{LABEL}.json"


@pytest.fixture(scope="module")
def tpm() -> SoftTpm:
    return SoftTpm()


# --- the files --------------------------------------------------------------------------------------


def test_a_pin_is_kept(store: PinStore, tpm: SoftTpm) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    assert pinned.host.ak.name == tpm.ak.name
    assert pinned.host.label == LABEL
    assert pinned.newest() is None
    again = store.load(LABEL)
    assert again.host == pinned.host
    assert again.newest() is None
    assert store.labels() == [LABEL]


def test_a_file_is_its_owners_alone_and_says_what_it_is(
    store: PinStore, file: Path, tpm: SoftTpm
) -> None:
    store.pin(LABEL, tpm.ak_public).accept(state(5, resets=7, restarts=3))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    values = json.loads(file.read_bytes())
    assert values["format"] == "provider-proxy/pin/1"
    assert values["ak_name"] == tpm.ak.name.hex()
    assert values["newest"] == {"reset_count": 7, "restart_count": 3, "clock_ms": 5}


def test_the_newest_state_outlives_the_process(store: PinStore, tpm: SoftTpm) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    for accepted in (state(5), state(9), state(7), state(2, resets=2), state(99)):
        pinned.accept(accepted)
    assert pinned.newest() == store.load(LABEL).newest() == state(2, resets=2)


def test_pinning_the_same_again_changes_nothing(store: PinStore, file: Path, tpm: SoftTpm) -> None:
    store.pin(LABEL, tpm.ak_public).accept(state(5))
    before = file.read_bytes()
    assert store.pin(LABEL, tpm.ak_public).newest() == state(5)
    assert file.read_bytes() == before


def test_a_change_is_refused_until_a_person_pins_anew(
    store: PinStore, file: Path, tpm: SoftTpm
) -> None:
    store.pin(LABEL, tpm.ak_public).accept(state(5))
    before = file.read_bytes()
    other = SoftTpm()
    with pytest.raises(PinChangedError) as caught:
        store.pin(LABEL, other.ak_public)
    assert tpm.ak.name.hex() in str(caught.value)
    assert other.ak.name.hex() in str(caught.value)
    assert file.read_bytes() == before
    pinned = store.pin(LABEL, other.ak_public, replace=True)
    assert pinned.host.ak.name == other.ak.name
    assert pinned.newest() is None  # another chip, another clock
    assert store.load(LABEL).host.ak.name == other.ak.name


def test_the_same_key_with_other_attributes_is_a_change(store: PinStore, tpm: SoftTpm) -> None:
    """A name is over the whole public area."""
    other = encode_public(tpm.ak.public_key, AK_ATTRIBUTES | 1 << 10)
    store.pin(LABEL, tpm.ak_public)
    with pytest.raises(PinChangedError):
        store.pin(LABEL, other)


@pytest.mark.parametrize(
    ("attributes", "error"),
    [(AK_ATTRIBUTES & ~(1 << 16), UntrustedAkError), (AK_ATTRIBUTES | 1 << 17, UntrustedAkError)],
    ids=["not restricted", "decrypts"],
)
def test_what_is_no_ak_is_not_pinned(
    store: PinStore, tpm: SoftTpm, attributes: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        store.pin(LABEL, encode_public(tpm.ak.public_key, attributes))
    assert store.labels() == []


@pytest.mark.parametrize("data", [b"", b"garbage", b"\0" * 100])
def test_what_is_no_key_is_not_pinned(store: PinStore, data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        store.pin(LABEL, data)
    assert store.labels() == []


# --- the EK -----------------------------------------------------------------------------------------

EK, OTHER_EK = (encode_ek(ec.generate_private_key(ec.SECP256R1()).public_key()) for _ in range(2))


def test_an_ek_is_pinned_with_the_ak(store: PinStore, file: Path, tpm: SoftTpm) -> None:
    pinned = store.pin(LABEL, tpm.ak_public, ek_public=EK)
    assert (pinned.ek_public, pinned.ek_by_hand) == (EK, False)
    pinned.accept(state(5))
    assert store.load(LABEL).ek_public == EK
    assert store.pin(LABEL, tpm.ak_public).ek_public == EK  # who names no EK changes none
    pinned.demand(tpm.ak_public, EK)
    for ak_public, ek_public in ((tpm.ak_public, OTHER_EK), (SoftTpm().ak_public, EK)):
        with pytest.raises(PinChangedError):
            pinned.demand(ak_public, ek_public)
        before = file.read_bytes()
        with pytest.raises(PinChangedError):
            store.pin(LABEL, ak_public, ek_public=ek_public)
        assert file.read_bytes() == before
    assert store.pin(LABEL, tpm.ak_public, ek_public=OTHER_EK, replace=True).ek_public == OTHER_EK
    assert store.pin(LABEL, tpm.ak_public, replace=True).ek_public is None


def test_an_ek_is_added_and_the_clock_goes_on(store: PinStore, tpm: SoftTpm) -> None:
    first = store.pin(LABEL, tpm.ak_public)
    first.accept(state(5))
    assert store.pin(LABEL, tpm.ak_public, ek_public=EK).newest() == state(5)
    first.accept(state(6))  # by who loaded it before: the EK stays
    again = store.load(LABEL)
    assert (again.ek_public, again.newest()) == (EK, state(6))


def test_a_person_s_word_for_an_ek_is_kept(store: PinStore, file: Path, tpm: SoftTpm) -> None:
    store.pin(LABEL, tpm.ak_public, ek_public=EK).accept(state(5))
    assert store.pin(LABEL, tpm.ak_public, ek_public=EK, ek_by_hand=True).ek_by_hand
    again = store.pin(LABEL, tpm.ak_public, ek_public=EK)
    assert (again.ek_by_hand, again.newest()) == (True, state(5))
    values = json.loads(file.read_bytes())
    assert values["ek_by"] == "person"
    for bad in ("me", None):
        file.write_text(json.dumps({**values, "ek_by": bad}))
        with pytest.raises(HostError, match="damaged"):
            store.load(LABEL)


def test_a_pin_is_current_until_its_keys_change(store: PinStore, file: Path, tpm: SoftTpm) -> None:
    pinned = store.pin(LABEL, tpm.ak_public, ek_public=EK)
    assert pinned.is_current()
    pinned.accept(state(5))
    store.load(LABEL).accept(state(6))
    assert pinned.is_current()
    store.pin(LABEL, tpm.ak_public, ek_public=OTHER_EK, replace=True)
    for _ in range(2):
        assert not pinned.is_current()
    with pytest.raises(PinChangedError, match="another EK"):
        pinned.accept(state(7))
    assert store.load(LABEL).newest() is None
    store.pin(LABEL, tpm.ak_public, ek_public=EK, replace=True)
    assert pinned.is_current()
    file.write_bytes(b"{")
    with pytest.raises(HostError, match="damaged"):
        pinned.is_current()
    store.remove(LABEL)
    assert not pinned.is_current()
    assert not store.has(LABEL)


@pytest.mark.parametrize("data", [b"", b"garbage"])
def test_what_is_no_ek_is_not_pinned(store: PinStore, tpm: SoftTpm, data: bytes) -> None:
    with pytest.raises(EvidenceFormatError):
        store.pin(LABEL, tpm.ak_public, ek_public=data)
    assert store.labels() == []


GOOD_LABELS = ["h", "0", "Host-1.example.org", "a_b", "x" * 101]
BAD_LABELS = ["", ".", "..", ".h", "-h", "_h", "a/b", "../a", "a b", "a\n", "ä", "a\0", "x" * 102]


@pytest.mark.parametrize("label", GOOD_LABELS)
def test_labels(store: PinStore, tpm: SoftTpm, label: str) -> None:
    store.pin(label, tpm.ak_public)
    assert store.labels() == [label]
    assert store.load(label).host.label == label
    store.remove(label)
    assert store.labels() == []


@pytest.mark.parametrize("label", BAD_LABELS)
def test_what_is_no_label(store: PinStore, tmp_path: Path, tpm: SoftTpm, label: str) -> None:
    act: Callable[[], object]
    for act in (
        lambda: store.pin(label, tpm.ak_public),
        lambda: store.load(label),
        lambda: store.remove(label),
    ):
        with pytest.raises(UsageError):
            act()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_hosts_are_listed_in_order_and_nothing_else_is(store: PinStore, tpm: SoftTpm) -> None:
    for label in ("b", "a", "c.json", "A"):
        store.pin(label, tpm.ak_public)
        store.load(label).accept(state(3))
    store.remove("b")
    assert store.labels() == ["A", "a", "c.json"]


@pytest.mark.parametrize("spoiled", ["the file", "the directory"])
def test_what_everybody_can_write_is_no_pin(
    store: PinStore, file: Path, tpm: SoftTpm, spoiled: str
) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    (file if spoiled == "the file" else file.parent).chmod(0o777)
    for use in (
        lambda: store.load(LABEL),
        lambda: pinned.accept(state(1)),
        lambda: store.pin(LABEL, tpm.ak_public),
    ):
        with pytest.raises(HostError, match="everybody can write"):
            use()


def test_an_unknown_host(store: PinStore, tpm: SoftTpm) -> None:
    store.pin("another", tpm.ak_public)
    for act in (store.load, store.remove):
        with pytest.raises(UsageError, match="not pinned"):
            act(LABEL)


def good_values(tpm: SoftTpm, file: Path, store: PinStore) -> dict[str, Any]:
    store.pin(LABEL, tpm.ak_public).accept(state(5))
    values = json.loads(file.read_bytes())
    assert isinstance(values, dict)
    return values


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda v: v.update(format="provider-proxy/pin/2"),
    "no format": lambda v: v.pop("format"),
    "no key": lambda v: v.pop("ak_tpm"),
    "a key that is not base64": lambda v: v.update(ak_tpm="!"),
    "half a state": lambda v: v["newest"].pop("clock_ms"),
    "a state of text": lambda v: v["newest"].update(clock_ms="5"),
    "a negative clock": lambda v: v["newest"].update(clock_ms=-1),
    "no state at all": lambda v: v.update(newest=None),
    "a counter beyond 32 bits": lambda v: v["newest"].update(reset_count=1 << 32),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pin_is_told_and_trusts_nobody(
    store: PinStore, file: Path, tpm: SoftTpm, damage: str
) -> None:
    """A pin that lost its clock must not pass for a fresh one."""
    values = good_values(tpm, file, store)
    DAMAGES[damage](values)
    file.write_text(json.dumps(values))
    with pytest.raises(HostError, match="damaged"):
        store.load(LABEL)
    with pytest.raises(HostError, match="damaged"):
        store.pin(LABEL, tpm.ak_public)
    assert json.loads(file.read_bytes()) == values


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null", b'{"a":1,"a":2}'])
def test_a_pin_that_is_no_json(store: PinStore, file: Path, tpm: SoftTpm, data: bytes) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    file.write_bytes(data)
    with pytest.raises(HostError, match="damaged"):
        store.load(LABEL)
    with pytest.raises(HostError, match="damaged"):
        pinned.accept(state(5))
    assert file.read_bytes() == data
    assert (
        store.pin(LABEL, tpm.ak_public, replace=True).newest() is None
    )  # a person's word repairs it


# --- whole or not at all ----------------------------------------------------------------------------


def test_a_state_that_is_not_newer_writes_nothing(
    store: PinStore, file: Path, tpm: SoftTpm
) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    pinned.accept(state(5))
    before = file.stat()
    for old in (state(5), state(4), state(0, restarts=0), state(99, resets=0)):
        pinned.accept(old)
        store.load(LABEL).accept(old)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_write_that_fails_leaves_the_old_pin(
    store: PinStore, file: Path, tpm: SoftTpm, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    pinned.accept(state(5))
    before = file.read_bytes()
    real_open = os.open

    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    def no_part(path: Any, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(".part"):
            raise OSError(28, "No space left on device")
        return real_open(path, flags, mode)

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", full)
        elif step == "replace":
            patch.setattr(Path, "replace", full)
        else:
            patch.setattr(os, "open", no_part)
        with pytest.raises(HostError, match="No space left"):
            pinned.accept(state(6))
    assert file.read_bytes() == before
    assert store.load(LABEL).newest() == state(5)
    assert store.labels() == [LABEL]
    store.load(LABEL).accept(state(7))
    assert store.load(LABEL).newest() == state(7)


ACCEPT_FOR_EVER = """
import sys
from pathlib import Path
from provider_proxy.evidence.model import ClockState
from provider_proxy.trust.pins import PinStore
pinned = PinStore(Path(sys.argv[1])).load(sys.argv[2])
first, step, last = map(int, sys.argv[3:])
stop = Path(sys.argv[1]).with_name("stop")
for clock in range(first, last, step):
    if stop.exists():
        break
    pinned.accept(ClockState(reset_count=1, restart_count=0, clock_ms=clock))
    print(clock, flush=True)
"""


@contextlib.contextmanager
def accepting(folder: Path, first: int, step: int, last: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that accepts states of the same host; says which it has accepted."""
    with subprocess.Popen(
        [sys.executable, "-c", ACCEPT_FOR_EVER, folder, LABEL, *map(str, (first, step, last))],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def last_line(process: subprocess.Popen[str]) -> int:
    out, _ = process.communicate(timeout=LIMIT_S)
    return int(out.splitlines()[-1])


def test_a_process_killed_while_it_writes_loses_nothing_accepted(
    store: PinStore, file: Path, tpm: SoftTpm
) -> None:
    store.pin(LABEL, tpm.ak_public)
    with accepting(file.parent, 1, 1, 1 << 30) as process:
        wait_until(lambda: (store.load(LABEL).newest() or state(0)) > state(20), "some states")
        process.send_signal(signal.SIGKILL)
        said = last_line(process)
    kept = store.load(LABEL).newest()
    assert kept is not None
    assert said <= kept.clock_ms <= said + 1
    assert store.labels() == [LABEL]
    pinned = store.pin(LABEL, tpm.ak_public)  # its lock went with it
    pinned.accept(state(1 << 40))
    assert store.load(LABEL).newest() == state(1 << 40)


def test_several_processes_at_once_keep_the_newest_of_all(
    store: PinStore, file: Path, tpm: SoftTpm
) -> None:
    """A reader meanwhile finds a whole file, and a clock that does not go back."""
    store.pin(LABEL, tpm.ak_public)
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(accepting(file.parent, first, 3, 1 << 30)) for first in (1, 2, 3)
        ]
        for process in processes:  # each has begun
            assert process.stdout is not None
            assert process.stdout.readline()
        seen = [state(0)]

        def look() -> bool:
            seen.append(store.load(LABEL).newest() or state(0))
            return len(set(seen)) > 20

        wait_until(look, "states of all")
        file.parent.with_name("stop").touch()
        last = max(last_line(process) for process in processes)
        assert [process.wait(LIMIT_S) for process in processes] == [0, 0, 0]
    assert seen == sorted(seen)
    assert store.load(LABEL).newest() == state(last)


def test_two_in_one_process_keep_the_newest_of_both(store: PinStore, tpm: SoftTpm) -> None:
    store.pin(LABEL, tpm.ak_public)
    one, two = store.load(LABEL), store.load(LABEL)
    one.accept(state(10))
    two.accept(state(7))
    assert store.load(LABEL).newest() == state(10)
    two.accept(state(12))
    one.accept(state(11))
    assert store.load(LABEL).newest() == state(12)


def test_what_another_process_accepted_counts_for_the_next_nonce(
    store: PinStore, tpm: SoftTpm
) -> None:
    """A watcher runs for weeks; meanwhile a command verified the same host. A rollback to a state
    between the two is noticed by both."""
    store.pin(LABEL, tpm.ak_public)
    watcher = store.load(LABEL)
    watcher.accept(state(10))
    store.load(LABEL).accept(state(100))
    challenge = ask(watcher)
    assert challenge.baseline == state(100)
    with pytest.raises(ClockError):
        judge(answer(tpm, challenge, state(50)), challenge, watcher)


def test_a_pin_made_anew_is_not_undone_by_who_still_has_the_old_one(
    store: PinStore, tpm: SoftTpm
) -> None:
    """A person's word stands against a process that verified a last answer of the old AK."""
    old = store.pin(LABEL, tpm.ak_public)
    other = SoftTpm()
    store.pin(LABEL, other.ak_public, replace=True)
    with contextlib.suppress(ProviderProxyError):
        old.accept(state(5))
    assert store.load(LABEL).host.ak.name == other.ak.name
    assert store.load(LABEL).newest() is None  # the clock of another chip


def test_a_pin_that_was_removed_stays_removed(store: PinStore, tpm: SoftTpm) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    store.remove(LABEL)
    with contextlib.suppress(ProviderProxyError):
        pinned.accept(state(5))
    assert store.labels() == []


# --- the clock rule ---------------------------------------------------------------------------------


def ask(pinned: PinnedHost) -> Challenge:
    return new_challenge(mask=1, now_s=0.0, history=pinned)


def answer(tpm: SoftTpm, challenge: Challenge, clock: ClockState | None = None) -> bytes:
    if clock is not None:
        tpm.clock = clock
    return make_evidence(tpm, challenge.request)


def judge(body: bytes, challenge: Challenge, pinned: PinnedHost) -> VerifiedQuote:
    return Verifier(UnsafeAcceptAny()).verify(body, challenge, pinned.host, pinned, now_s=1.0)


@pytest.mark.parametrize(
    ("clock", "passes", "was_reset"),
    [
        (state(100, resets=5, restarts=2), True, False),  # equal: two nonces, one quote
        (state(101, resets=5, restarts=2), True, False),
        (state(0, resets=5, restarts=3), True, False),  # resumed
        (state(0, resets=6), True, True),  # a reboot may lower the rest
        (state(99, resets=5, restarts=2), False, False),
        (state(500, resets=5, restarts=1), False, False),
        (state(500, resets=4, restarts=9), False, False),
        (state(0, resets=0), False, False),
    ],
)
def test_the_clock_rule_holds_over_a_restart_of_the_tenant(
    store: PinStore, tpm: SoftTpm, clock: ClockState, passes: bool, was_reset: bool
) -> None:
    store.pin(LABEL, tpm.ak_public).accept(state(100, resets=5, restarts=2))
    pinned = store.load(LABEL)
    challenge = ask(pinned)
    body = answer(tpm, challenge, clock)
    if passes:
        quote = judge(body, challenge, pinned)
        assert quote.clock == clock  # what the evidence carries, as it was signed
        assert quote.was_reset is was_reset
        assert store.load(LABEL).newest() == clock
    else:
        with pytest.raises(ClockError):
            judge(body, challenge, pinned)
        assert store.load(LABEL).newest() == state(100, resets=5, restarts=2)


def test_honest_answers_may_overtake_each_other(store: PinStore, tpm: SoftTpm) -> None:
    """Several nonces are under way at once; the answers come in any order."""
    store.pin(LABEL, tpm.ak_public)
    for number, order in enumerate(itertools.permutations(range(4))):
        pinned = store.load(LABEL)
        challenges = [ask(pinned) for _ in range(4)]
        first = 1000 * (number + 1)
        bodies = [answer(tpm, one, state(first + n)) for n, one in enumerate(challenges)]
        for n in order:
            assert judge(bodies[n], challenges[n], pinned).clock == state(first + n)
        assert pinned.newest() == state(first + 3)
    assert store.load(LABEL).newest() == state(first + 3)


def test_a_reboot_between_two_answers_may_be_overtaken_too(store: PinStore, tpm: SoftTpm) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    pinned.accept(state(1000))
    before, after = ask(pinned), ask(pinned)
    early = answer(tpm, before, state(1001))
    late = answer(tpm, after, state(3, resets=2))
    assert judge(late, after, pinned).was_reset
    assert not judge(early, before, pinned).was_reset
    assert pinned.newest() == state(3, resets=2)
    following = ask(pinned)
    with pytest.raises(ClockError):  # from now on the time before the reboot is the past
        judge(answer(tpm, following, state(1002)), following, pinned)


def test_a_quote_taken_before_the_nonce_was_sent_is_not_honest(
    store: PinStore, tpm: SoftTpm
) -> None:
    """The baseline is what was accepted before the question, not before the verdict."""
    pinned = store.pin(LABEL, tpm.ak_public)
    first = ask(pinned)
    judge(answer(tpm, first, state(50)), first, pinned)
    second = ask(pinned)
    with pytest.raises(ClockError):
        judge(answer(tpm, second, state(49)), second, pinned)
    assert judge(answer(tpm, second, state(50)), second, pinned).clock == state(50)


def test_open_nonces_end_with_the_process(store: PinStore, tpm: SoftTpm) -> None:
    challenge = ask(store.pin(LABEL, tpm.ak_public))
    with pytest.raises(NonceSpentError):
        judge(answer(tpm, challenge), challenge, store.load(LABEL))


def test_a_refused_answer_is_not_remembered(store: PinStore, tpm: SoftTpm) -> None:
    """A state that somebody made up must not lock the host out."""
    pinned = store.pin(LABEL, tpm.ak_public)
    challenge = ask(pinned)
    forged = answer(SoftTpm(), challenge, state(1 << 60, resets=1 << 30))
    with pytest.raises(ProviderProxyError):
        judge(forged, challenge, pinned)
    assert store.load(LABEL).newest() is None
    judge(answer(tpm, challenge, state(5)), challenge, pinned)
    assert store.load(LABEL).newest() == state(5)


def test_another_chip_is_refused_whatever_its_clock(store: PinStore, tpm: SoftTpm) -> None:
    pinned = store.pin(LABEL, tpm.ak_public)
    challenge = replace(ask(pinned), baseline=None)
    with pytest.raises(ProviderProxyError):
        judge(answer(SoftTpm(), challenge), challenge, pinned)


# --- a real TPM -------------------------------------------------------------------------------------


class Host:
    """A host with a swtpm, and a tenant that pins it."""

    def __init__(self, folder: Path, tpm: Swtpm) -> None:
        self._folder = folder
        self.tpm = tpm
        self.store = PinStore(folder / "pins")

    async def pin(self) -> None:
        async with open_quoter(self.tpm.tcti, self._folder / "s") as quoter:
            self.store.pin(LABEL, quoter.identity.ak_public, replace=True)

    async def attest(self, count: int = 1) -> VerifiedQuote:
        """A daemon starts, a tenant asks, with what it remembers in files alone."""
        async with open_quoter(self.tpm.tcti, self._folder / "s") as quoter:
            for _ in range(count):
                pinned = self.store.load(LABEL)
                challenge = ask(pinned)
                quote = judge(await answer_of(quoter, challenge.request), challenge, pinned)
        return quote

    async def reset(self) -> None:
        await trio.to_thread.run_sync(self.tpm.stop)
        await trio.to_thread.run_sync(self.tpm.start)

    async def put_back(self, copy: Path) -> None:
        """Somebody restores the state directory of some time ago."""
        await trio.to_thread.run_sync(self.tpm.stop)
        await trio.to_thread.run_sync(shutil.rmtree, self.tpm.state)
        await trio.to_thread.run_sync(shutil.copytree, copy, self.tpm.state)
        await trio.to_thread.run_sync(self.tpm.start)

    async def copy(self) -> Path:
        await trio.to_thread.run_sync(self.tpm.stop)
        copy: Path = await trio.to_thread.run_sync(
            shutil.copytree, self.tpm.state, self._folder / "copy"
        )
        await trio.to_thread.run_sync(self.tpm.start)
        return copy

    async def tool(self, *words: str) -> str:
        return await trio.to_thread.run_sync(tool, self.tpm.tcti, *words)


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with swtpm_at(tmp_path / "chip") as made:
        yield made


@pytest.mark.real
async def test_a_reset_passes_and_is_reported_once(tmp_path: Path, chip: Swtpm) -> None:
    host = Host(tmp_path, chip)
    await host.pin()
    first = await host.attest(2)
    assert not first.was_reset
    for number in (1, 2):
        await host.reset()
        quote = await host.attest()
        assert quote.was_reset
        assert quote.clock.reset_count == first.clock.reset_count + number
        assert not (await host.attest()).was_reset
    assert host.store.load(LABEL).newest() >= quote.clock  # type: ignore[operator]


@pytest.mark.real
async def test_the_evidence_carries_the_chips_own_counters(tmp_path: Path, chip: Swtpm) -> None:
    """Reset by power, restarted after a suspend: as tpm2_readclock says."""
    host = Host(tmp_path, chip)
    await host.pin()
    seen: list[ClockState] = []
    for suspend in (False, True, False, True):
        if suspend:
            await host.tool("tpm2_shutdown")  # TPM2_Shutdown(STATE): a restart follows, no reset
        await host.reset()
        quote = await host.attest()
        clock = quote.clock
        told = dict(
            line.strip().split(": ")
            for line in (await host.tool("tpm2_readclock")).splitlines()[2:5]
        )
        assert int(told["reset_count"]) == clock.reset_count
        assert int(told["restart_count"]) == clock.restart_count
        assert int(told["clock"]) >= clock.clock_ms
        assert quote.was_reset is (not suspend and bool(seen))
        seen.append(clock)
    assert seen == sorted(seen)
    assert [b.reset_count - a.reset_count for a, b in itertools.pairwise(seen)] == [0, 1, 0]


@pytest.mark.real
async def test_a_tpm_put_back_to_an_old_state_is_refused(tmp_path: Path, chip: Swtpm) -> None:
    """Same key, good signature, fresh nonce; only the clock tells. Until a person pins again."""
    host = Host(tmp_path, chip)
    await host.pin()
    await host.attest()
    old = await host.copy()
    await host.attest()
    await host.reset()
    newest = (await host.attest()).clock
    await host.put_back(old)
    for _ in range(2):
        with refused(ClockError):
            await host.attest()
    assert host.store.load(LABEL).newest() == newest
    await host.pin()
    assert not (await host.attest()).was_reset


@contextlib.contextmanager
def refused(error: type[Exception]) -> Iterator[None]:
    """An error that comes out of nurseries."""
    try:
        yield
    except BaseExceptionGroup as group:
        matched, rest = group.split(error)
        assert matched is not None
        assert rest is None
    else:
        raise AssertionError(f"no {error.__name__}")
