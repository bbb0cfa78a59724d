"""The registry of vTPMs: what each word changes, what survives, what it never holds."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vtpm_helpers import OTHER_VM, VM, certificate_request, ecc_key, rsa_key

from provider_proxy.errors import HostError, NotFoundError, VtpmError
from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, QuoteRequest, Tenant
from provider_proxy.host.vtpm import entries
from provider_proxy.host.vtpm.claims import Claims, encode_claims
from provider_proxy.host.vtpm.entries import CLAIMED, CONFIRMED, Ek, Entry, ek_of
from provider_proxy.host.vtpm.registry import PRUNE_AFTER_S, CloneError, Registry, RunningError

RSA = ek_of(rsa_key())
ECC = ek_of(ecc_key())


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], Registry]]:
    """Opens the registry anew, as after a restart."""
    made: list[Registry] = []

    def open_again() -> Registry:
        for registry in made:
            registry.close()
        made.append(Registry(tmp_path / "vtpm.sqlite", max_vms=3, now=clock))
        return made[-1]

    yield open_again
    for registry in made:
        registry.close()


@pytest.fixture
def registry(opened: Callable[[], Registry]) -> Registry:
    return opened()


def make(registry: Registry, vm: uuid.UUID = VM, number: int = 0) -> Entry:
    """What swtpm_setup does: RSA, platform, ECC."""
    for key, kind in ((rsa_key(number), "ek"), (rsa_key(number), "platform")):
        registry.register(certificate_request(key, vm=vm, kind=kind), issuer="delegate")
    return registry.register(certificate_request(ecc_key(number), vm=vm), issuer="delegate")


def start(registry: Registry, vm: uuid.UUID = VM) -> Entry:
    entry = registry.happened(vm, "web", "started")
    assert entry is not None
    return entry


def keys(number: int = 0) -> tuple[Ek, ...]:
    return (ek_of(rsa_key(number)), ek_of(ecc_key(number)))


# --- the words --------------------------------------------------------------------------------------


def test_an_ek_s_name_and_digest() -> None:
    assert (RSA.alg, ECC.alg) == ("rsa2048", "p384")
    assert (RSA.family, ECC.family, ek_of(ecc_key(0, "secp256r1")).alg) == ("rsa", "p", "p256")
    assert len(RSA.spki_sha256) == 64


def test_a_vtpm_is_made(registry: Registry, clock: Clock) -> None:
    entry = make(registry)
    assert entry == Entry(
        vm=VM,
        name="web",
        eks=tuple(sorted((RSA, ECC), key=lambda ek: ek.alg)),
        state=CLAIMED,
        making=True,
        generation=1,
        issuer="delegate",
        registered_at=int(clock.now),
        changed_at=int(clock.now),
    )


def test_the_same_again_changes_nothing(registry: Registry, clock: Clock) -> None:
    first = make(registry)
    clock.now += 10
    assert make(registry) == first


def test_another_key_is_another_vtpm(registry: Registry, clock: Clock) -> None:
    make(registry)
    clock.now += 10
    entry = make(registry, number=1)
    assert set(entry.eks) == set(keys(1))
    assert (entry.generation, entry.registered_at) == (2, int(clock.now))


def test_a_key_that_comes_after_the_start_is_not_of_the_same_making(registry: Registry) -> None:
    registry.register(certificate_request(rsa_key()), issuer="delegate")
    start(registry)
    registry.happened(VM, "web", "stopped")
    entry = registry.register(certificate_request(ecc_key()), issuer="delegate")
    assert (entry.eks, entry.generation) == ((ECC,), 2)


def test_a_running_vm_is_made_no_other_vtpm(registry: Registry) -> None:
    make(registry)
    before = start(registry)
    with pytest.raises(RunningError):
        registry.register(certificate_request(rsa_key(1)), issuer="delegate")
    assert registry.get(VM) is before
    registry.register(certificate_request(rsa_key()), issuer="delegate")  # its own, again
    assert registry.get(VM) is before


@pytest.mark.parametrize("event", sorted(entries.STARTS))
def test_it_runs(registry: Registry, event: str) -> None:
    make(registry)
    entry = registry.happened(VM, "web", event)
    assert entry is not None
    assert (entry.running, entry.making) == (True, False)


@pytest.mark.parametrize("event", sorted(entries.STOPS))
def test_it_runs_no_more(registry: Registry, event: str) -> None:
    make(registry)
    start(registry)
    entry = registry.happened(VM, "web", event)
    assert entry is not None
    assert not entry.running
    assert set(entry.eks) == {RSA, ECC}


@pytest.mark.parametrize("event", sorted(entries.STOPS))
def test_the_stop_of_an_unknown_vm_is_nothing(registry: Registry, event: str) -> None:
    assert registry.happened(VM, "web", event) is None
    assert registry.all() == ()


def test_confirmed_is_what_was_read_back(registry: Registry) -> None:
    make(registry)
    entry = registry.read_back(start(registry), keys())
    assert entry is not None
    assert (entry.state, entry.generation, entry.issuer) == (CONFIRMED, 1, "delegate")


def test_a_start_has_it_read_again(registry: Registry) -> None:
    make(registry)
    registry.read_back(start(registry), keys())
    registry.happened(VM, "web", "reconnect")
    assert registry.all()[0].state == CONFIRMED  # libvirtd's restart is not the VM's
    registry.happened(VM, "web", "stopped")
    assert start(registry).state == CLAIMED


def test_a_key_that_is_not_there_is_taken_out(registry: Registry) -> None:
    make(registry)
    entry = registry.read_back(start(registry), [RSA])
    assert entry is not None
    assert (entry.eks, entry.state, entry.generation) == ((RSA,), CONFIRMED, 1)


def test_a_false_claim_is_corrected(registry: Registry, clock: Clock) -> None:
    make(registry, number=1)
    seen = start(registry)
    clock.now += 5
    entry = registry.read_back(seen, keys())
    assert entry is not None
    assert set(entry.eks) == {RSA, ECC}
    assert (entry.state, entry.generation, entry.issuer) == (CONFIRMED, 2, "unknown")
    assert entry.registered_at == int(clock.now)


def test_a_vm_that_was_there_before_the_hooks(registry: Registry) -> None:
    entry = registry.read_back(start(registry), keys())
    assert entry is not None
    assert (entry.generation, entry.issuer, entry.migrated) == (1, "unknown", False)


def test_what_was_read_of_a_vtpm_that_is_no_more_says_nothing(registry: Registry) -> None:
    make(registry)
    seen = start(registry)
    registry.happened(VM, "web", "stopped")
    assert registry.read_back(seen, keys()) is None
    make(registry, number=1)
    start(registry)
    assert registry.read_back(seen, keys()) is None
    entry = registry.get(VM)
    assert entry is not None
    assert set(entry.eks) == set(keys(1))
    assert entry.state == CLAIMED


def test_a_vm_comes_in(registry: Registry) -> None:
    make(registry)  # was here, long ago
    registry.happened(VM, "web", "migrate")
    seen = start(registry)
    assert (seen.eks, seen.migrated, seen.generation) == ((), True, 2)
    entry = registry.read_back(seen, keys(1))
    assert entry is not None
    assert (set(entry.eks), entry.state) == (set(keys(1)), CONFIRMED)
    assert (entry.generation, entry.migrated, entry.issuer) == (2, True, "unknown")


def test_nothing_comes_in_over_a_vm_that_runs(registry: Registry) -> None:
    make(registry)
    before = start(registry)
    assert registry.happened(VM, "web", "migrate") is before


def test_a_vtpm_made_here_is_not_migrated(registry: Registry) -> None:
    registry.happened(VM, "web", "migrate")
    entry = make(registry)
    assert (entry.migrated, entry.generation) == (False, 2)


# --- copies -----------------------------------------------------------------------------------------


def test_an_ek_of_another_vm_is_not_registered(registry: Registry) -> None:
    make(registry)
    with pytest.raises(CloneError):
        registry.register(certificate_request(rsa_key(), vm=OTHER_VM), issuer="delegate")
    assert registry.get(OTHER_VM) is None


def test_a_copy_of_a_running_vtpm_has_no_link(registry: Registry) -> None:
    make(registry)
    registry.read_back(start(registry), keys())
    before = registry.get(VM)
    with pytest.raises(CloneError, match=str(VM)):
        registry.read_back(start(registry, OTHER_VM), keys())
    copy = registry.get(OTHER_VM)
    assert copy is not None
    assert (copy.eks, copy.state) == ((), CLAIMED)
    assert registry.get(VM) is before


def test_a_vtpm_that_moved_to_another_vm_is_the_other_s(
    registry: Registry, opened: Callable[[], Registry]
) -> None:
    make(registry)
    entry = registry.read_back(start(registry, OTHER_VM), keys())
    assert entry is not None
    assert set(entry.eks) == {RSA, ECC}
    again = opened()
    old = again.get(VM)
    assert old is not None
    assert old.eks == ()
    assert again.get(OTHER_VM) == entry


# --- limits -----------------------------------------------------------------------------------------


def test_claims_of_the_swtpm_user_cannot_fill_the_registry(
    registry: Registry, clock: Clock
) -> None:
    """VMs that are always being made, and never start, must not keep out those that do."""
    for number in range(3):
        clock.now += 1
        registry.register(
            certificate_request(ecc_key(number), vm=uuid.UUID(int=number)), issuer="delegate"
        )
    clock.now += 1
    assert registry.happened(VM, "web", "started") is not None
    assert registry.get(uuid.UUID(int=0)) is None  # the oldest went
    assert len(registry.all()) == 3
    clock.now += 1
    registry.happened(VM, "web", "stopped")
    registry.register(certificate_request(ecc_key(4), vm=OTHER_VM), issuer="delegate")
    assert registry.get(VM) is None  # what does not run and is not being made goes first


def test_the_oldest_that_does_not_run_makes_room(registry: Registry, clock: Clock) -> None:
    vms = [uuid.UUID(int=number) for number in range(1, 5)]
    for number, vm in enumerate(vms[:3]):
        clock.now += 1
        make(registry, vm, number)
        start(registry, vm)
    with pytest.raises(VtpmError, match="max_vms = 3"):
        make(registry, vms[3], 3)
    registry.happened(vms[1], "", "stopped")
    make(registry, vms[3], 3)
    assert {entry.vm for entry in registry.all()} == {vms[0], vms[2], vms[3]}
    registry.happened(vms[0], "", "stopped")
    registry.register(certificate_request(rsa_key(1), vm=vms[1]), issuer="delegate")  # it is free


def test_a_vm_without_its_vtpm_is_forgotten(registry: Registry, clock: Clock) -> None:
    make(registry)
    make(registry, OTHER_VM, 1)
    start(registry, OTHER_VM)
    assert registry.prune(lambda vm: False) == []  # too early: its folder may be on its way
    clock.now += PRUNE_AFTER_S + 1
    assert registry.prune(lambda vm: True) == []
    assert [entry.vm for entry in registry.prune(lambda vm: False)] == [VM]
    assert [entry.vm for entry in registry.all()] == [OTHER_VM]


def test_what_runs_at_the_start(registry: Registry) -> None:
    make(registry)
    start(registry)
    make(registry, OTHER_VM, 1)
    new = uuid.UUID(int=7)
    changed = registry.reconcile({OTHER_VM, new, uuid.UUID(int=8)})
    assert {entry.vm for entry in registry.all() if entry.running} >= {OTHER_VM}
    assert len(registry.all()) == 3  # and no more
    entry = registry.get(VM)
    assert entry is not None
    assert not entry.running
    assert len(changed) == 3


def test_a_vm_about_which_something_was_heard_meanwhile_goes_on(registry: Registry) -> None:
    make(registry)
    seen = start(registry)
    registry.happened(VM, "web", "stopped")
    start(registry)
    assert registry.stop([seen]) == []
    now = registry.get(VM)
    assert now is not None
    assert now.running
    assert [entry.vm for entry in registry.stop([now])] == [VM]


# --- the file ---------------------------------------------------------------------------------------


def test_it_survives(registry: Registry, opened: Callable[[], Registry]) -> None:
    make(registry)
    registry.read_back(start(registry), keys())
    make(registry, OTHER_VM, 1)
    registry.happened(uuid.UUID(int=5), "in", "migrate")
    before = sorted(registry.all(), key=lambda entry: entry.vm)
    again = opened()
    assert sorted(again.all(), key=lambda entry: entry.vm) == before
    with pytest.raises(CloneError):
        again.register(certificate_request(rsa_key(1)), issuer="delegate")


def test_the_file_is_for_its_owner_alone(registry: Registry, tmp_path: Path) -> None:
    make(registry)
    for path in tmp_path.glob("vtpm.sqlite*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no database at all" * 100),
        lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 9").connection.close(),
        lambda path: (path.unlink(missing_ok=True), path.mkdir()),
        lambda path: path.symlink_to("elsewhere"),
    ],
)
def test_a_file_that_is_none_of_ours(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "vtpm.sqlite"
    spoil(path)
    with pytest.raises(HostError, match="registry of vTPMs"):
        Registry(path, max_vms=3)


def test_what_cannot_be_written_has_not_happened(registry: Registry) -> None:
    before = make(registry)
    registry._db.execute("PRAGMA query_only = ON")
    with pytest.raises(HostError, match="cannot write"):
        start(registry)
    assert registry.get(VM) is before
    registry._db.execute("PRAGMA query_only = OFF")
    assert start(registry).running


KILLED = """
import os, sys
sys.path[:0] = sys.argv[2].split(":")
from pathlib import Path
from vtpm_helpers import VM, certificate_request, ecc_key
from provider_proxy.host.vtpm.registry import Registry
request = certificate_request(ecc_key())

def live(folder, die_at):
    registry = Registry(folder / "vtpm.sqlite", max_vms=10)
    steps = 0
    def count(statement):
        nonlocal steps
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), 9)
    registry._db.set_trace_callback(count)
    registry.register(request, issuer="delegate")
    (folder / "registered").touch()
    registry.happened(VM, "web", "started")
    (folder / "started").touch()
    os._exit(0)

for step in range(1, 40):
    folder = Path(sys.argv[1], str(step))
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        live(folder, step)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(status, flush=True)
    if status == 0:
        break
"""


def test_kill_9_at_every_statement_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), ":".join(sys.path)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    ends = list(map(int, done.stdout.split()))
    assert ends[-1] == 0
    assert set(ends[:-1]) == {-9}
    assert len(ends) > 8  # begin, delete, insert, insert, commit, twice
    for step in range(1, len(ends) + 1):
        folder = tmp_path / str(step)
        again = Registry(folder / "vtpm.sqlite", max_vms=10)
        entry = again.get(VM)
        again.close()
        if (folder / "registered").exists():
            assert entry is not None
            assert len(entry.eks) == 1
        if (folder / "started").exists():
            assert entry is not None
            assert entry.running
    assert (folder / "started").exists()


# --- claims -----------------------------------------------------------------------------------------


def request(vm: uuid.UUID = VM) -> QuoteRequest:
    return QuoteRequest(
        nonce=Nonce(b"0123456789abcdef"), mask=PcrMask(1), bank=HashAlg.SHA256, vm=vm
    )


def tenant(*vms: uuid.UUID) -> Tenant:
    return Tenant(name="acme", pcr_allow=0xFFFFFF, vms=frozenset(vms))


def test_claims(registry: Registry, clock: Clock) -> None:
    make(registry)
    registry.read_back(start(registry), keys())
    claims = json.loads(Claims(registry.get)(tenant(VM), request()))
    assert claims == {
        "vm": str(VM),
        "eks": [
            {"alg": "p384", "spki_sha256": ECC.spki_sha256},
            {"alg": "rsa2048", "spki_sha256": RSA.spki_sha256},
        ],
        "running": True,
        "confirmed": True,
        "issuer": "delegate",
        "migrated": False,
        "generation": 1,
        "registered_at": int(clock.now),
    }


def test_no_claims_have_one_reason(registry: Registry) -> None:
    make(registry)
    start(registry)
    make(registry, OTHER_VM, 1)  # does not run
    without_ek = uuid.UUID(int=3)
    start(registry, without_ek)
    claims = Claims(registry.get)
    assert claims(tenant(VM), request())
    own = tenant(VM, OTHER_VM, without_ek, uuid.UUID(int=4))
    reasons = set()
    for who, vm in (
        (tenant(OTHER_VM), VM),  # foreign
        (tenant(), VM),
        (own, OTHER_VM),  # stopped
        (own, without_ek),
        (own, uuid.UUID(int=4)),  # unknown
        (tenant(), uuid.UUID(int=4)),
    ):
        with pytest.raises(NotFoundError) as caught:
            claims(who, request(vm))
        reasons.add(str(caught.value))
    assert len(reasons) == 1


def test_claims_fit_their_limit(registry: Registry) -> None:
    entry = dataclasses.replace(make(registry), generation=2**63 - 1, registered_at=2**40)
    assert len(encode_claims(entry)) < 600


# --- any order of words -----------------------------------------------------------------------------

WORDS = st.lists(
    st.one_of(
        st.tuples(st.just("register"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("event"), st.sampled_from(sorted(entries.EVENTS)), st.none()),
        st.tuples(st.just("read"), st.integers(0, 2), st.booleans()),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(WORDS)
def test_whatever_is_said_the_entry_is_sound(words: list[tuple[str, object, object]]) -> None:
    entry: Entry | None = None
    generation = 0
    for word, what, more in words:
        if word == "register":
            key = keys(int(str(what)))[int(bool(more))]
            if entry is None or not entry.running:
                entry = entries.registered(entry, VM, "web", key, issuer="delegate")
        elif word == "event":
            entry = entries.happened(entry, VM, "web", str(what))
        elif entry is not None and entry.running:
            found = keys(int(str(what)))[: 1 if more else 2]
            entry = entries.read_back(entry, found)
            assert (set(entry.eks), entry.state) == (set(found), CONFIRMED)
        if entry is None:
            continue
        assert len({ek.family for ek in entry.eks}) == len(entry.eks) <= 2
        assert entry.generation >= generation
        assert entry.eks or entry.state == CLAIMED
        assert not (entry.running and entry.making)
        generation = entry.generation


def test_the_database_is_not_world_readable_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Registry(tmp_path / "a" / "vtpm.sqlite", max_vms=1).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "vtpm.sqlite").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
