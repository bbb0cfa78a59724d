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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vtpm_helpers import OTHER_VM, VM, certificate_request, ecc_key, rsa_key, sighting

from provider_proxy.errors import HostError, NotFoundError, VtpmError
from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, QuoteRequest, Tenant
from provider_proxy.host.vtpm import entries
from provider_proxy.host.vtpm.claims import Claims, encode_claims
from provider_proxy.host.vtpm.entries import CLAIMED, CONFIRMED, REGISTERED, Ek, Entry, ek_of
from provider_proxy.host.vtpm.registry import PRUNE_AFTER_S, CloneError, Registry
from provider_proxy.host.vtpm.sightings import Reading

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
    """Opens the registry again, as after a restart."""
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


def start(registry: Registry, vm: uuid.UUID = VM, *, run: str = "b/1/1", **more: Any) -> Entry:
    """It is seen to run."""
    return registry.saw(sighting(vm=vm, run=run, **more))


def read(
    registry: Registry, eks: Sequence[Ek], vm: uuid.UUID = VM, *, run: str = "b/1/1", **more: Any
) -> Entry:
    """Its vTPM was read while it runs."""
    return registry.saw(sighting(vm=vm, run=run, eks=eks, **more))


def entry_of(registry: Registry, vm: uuid.UUID = VM) -> Entry:
    entry = registry.get(vm)
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
        state=REGISTERED,
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
    registry.stop([VM])
    entry = registry.register(certificate_request(ecc_key()), issuer="delegate")
    assert (entry.eks, entry.generation) == ((ECC,), 2)


def test_a_running_vm_is_made_no_other_vtpm(registry: Registry) -> None:
    make(registry)
    before = start(registry)
    with pytest.raises(VtpmError, match="is running"):
        registry.register(certificate_request(rsa_key(1)), issuer="delegate")
    assert registry.get(VM) is before


def test_it_runs_waits_and_stops(registry: Registry) -> None:
    make(registry)
    entry = start(registry)
    assert (entry.running, entry.making, entry.run) == (True, False, "b/1/1")
    assert not start(registry, runs=False).running
    assert start(registry).running
    assert [changed.running for changed in registry.stop([VM, OTHER_VM])] == [False]
    assert registry.stop([VM]) == []
    assert set(entry_of(registry).eks) == {RSA, ECC}


def test_what_waits_changes_nothing_of_what_is_known(registry: Registry) -> None:
    """A VM that may be about to come in, or about to be restored: nobody knows yet."""
    make(registry)
    read(registry, keys())
    registry.stop([VM])
    before = entry_of(registry)
    assert start(registry, run="b/2/2", runs=False, origin="unknown") is before


def test_confirmed_is_what_was_read(registry: Registry) -> None:
    make(registry)
    assert start(registry).state == REGISTERED
    entry = read(registry, keys())
    assert (entry.state, entry.generation, entry.issuer) == (CONFIRMED, 1, "delegate")
    assert entry.running


def test_each_life_has_it_read_again(registry: Registry) -> None:
    make(registry)
    confirmed = read(registry, keys())
    assert start(registry) is confirmed  # a helper that was started again has not read it yet
    registry.stop([VM])
    entry = start(registry, run="b/2/2")
    assert (entry.state, set(entry.eks)) == (REGISTERED, {RSA, ECC})


@pytest.mark.parametrize("reading", ["encrypted", "failed"])
def test_what_can_no_longer_be_read_is_no_longer_confirmed(
    registry: Registry, reading: Reading
) -> None:
    make(registry)
    read(registry, keys())
    assert start(registry, reading=reading).state == REGISTERED


def test_what_was_only_ever_read_is_claimed_where_it_cannot_be_read(registry: Registry) -> None:
    read(registry, keys())  # made before the hooks were there
    assert start(registry, reading="failed").state == CLAIMED


def test_a_key_that_is_not_there_is_taken_out(registry: Registry) -> None:
    make(registry)
    start(registry)
    entry = read(registry, [RSA])
    assert (entry.eks, entry.state, entry.generation) == ((RSA,), CONFIRMED, 1)


def test_a_false_claim_is_corrected(registry: Registry, clock: Clock) -> None:
    make(registry, number=1)
    start(registry)
    clock.now += 5
    entry = read(registry, keys())
    assert set(entry.eks) == {RSA, ECC}
    assert (entry.state, entry.generation, entry.issuer) == (CONFIRMED, 2, "unknown")
    assert entry.registered_at == int(clock.now)


def test_a_vm_that_was_there_before_the_hooks(registry: Registry) -> None:
    start(registry)
    entry = read(registry, keys())
    assert (entry.generation, entry.issuer, entry.migrated) == (1, "unknown", False)


def test_a_vm_comes_in(registry: Registry) -> None:
    """A vTPM that was here before, under the same UUID, is not what has come in."""
    make(registry)
    read(registry, keys())
    registry.stop([VM])
    waiting = start(registry, run="b/2/2", runs=False, origin="unknown")
    assert not waiting.running
    seen = start(registry, run="b/2/2", origin="elsewhere")
    assert (seen.eks, seen.state, seen.migrated, seen.generation) == ((), CLAIMED, True, 2)
    entry = read(registry, keys(1), run="b/2/2", origin="elsewhere")
    assert (set(entry.eks), entry.state) == (set(keys(1)), CONFIRMED)
    assert (entry.generation, entry.migrated, entry.issuer) == (2, True, "unknown")


def test_an_encrypted_vm_that_comes_in_has_no_ek(registry: Registry) -> None:
    make(registry)
    registry.stop([VM])
    entry = start(registry, run="b/2/2", origin="elsewhere", reading="encrypted")
    assert (entry.eks, entry.state) == ((), CLAIMED)


def test_a_life_whose_beginning_nobody_saw_forgets_what_was_registered(registry: Registry) -> None:
    make(registry)
    entry = start(registry, origin="unknown", reading="encrypted")
    assert (entry.eks, entry.state, entry.generation) == ((), CLAIMED, 1)


def test_a_vtpm_made_here_is_not_migrated(registry: Registry) -> None:
    start(registry, origin="elsewhere")
    registry.stop([VM])
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
    before = read(registry, keys())
    start(registry, OTHER_VM, run="b/2/2")
    with pytest.raises(CloneError, match=str(VM)):
        read(registry, keys(), OTHER_VM, run="b/2/2")
    copy = entry_of(registry, OTHER_VM)
    assert (copy.eks, copy.state) == ((), CLAIMED)
    assert registry.get(VM) is before


def test_a_vtpm_that_moved_to_another_vm_is_the_other_s(
    registry: Registry, opened: Callable[[], Registry]
) -> None:
    make(registry)
    entry = read(registry, keys(), OTHER_VM)
    assert set(entry.eks) == {RSA, ECC}
    again = opened()
    assert entry_of(again).eks == ()
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
    start(registry)
    assert registry.get(uuid.UUID(int=0)) is None  # the oldest went
    assert len(registry.all()) == 3
    clock.now += 1
    registry.stop([VM])
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
    registry.stop([vms[1]])
    make(registry, vms[3], 3)
    assert {entry.vm for entry in registry.all()} == {vms[0], vms[2], vms[3]}
    registry.stop([vms[0]])
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


# --- the file ---------------------------------------------------------------------------------------


def test_it_survives(registry: Registry, opened: Callable[[], Registry]) -> None:
    make(registry)
    read(registry, keys())
    make(registry, OTHER_VM, 1)
    start(registry, uuid.UUID(int=5), origin="elsewhere")
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
from vtpm_helpers import VM, certificate_request, ecc_key, sighting
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
    registry.saw(sighting())
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
    read(registry, keys())
    claims = json.loads(Claims(registry.get)(tenant(VM), request()))
    assert claims == {
        "vm": str(VM),
        "eks": [
            {"alg": "p384", "spki_sha256": ECC.spki_sha256},
            {"alg": "rsa2048", "spki_sha256": RSA.spki_sha256},
        ],
        "running": True,
        "state": "confirmed",
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

    def running(vm: uuid.UUID) -> Entry | None:
        entry = registry.get(vm)
        return entry if entry is not None and entry.running else None

    claims = Claims(running)
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
        st.tuples(
            st.just("saw"), st.integers(0, 2), st.sampled_from(["here", "elsewhere", "unknown"])
        ),
        st.tuples(st.just("read"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("lowered"), st.none(), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(WORDS)
def test_whatever_is_said_the_entry_is_sound(words: list[tuple[str, Any, Any]]) -> None:
    entry: Entry | None = None
    generation = 0
    for word, what, more in words:
        if word == "register":
            key = keys(what)[int(more)]
            entry = entries.registered(entry, VM, "web", key, issuer="delegate")
        elif word == "saw":
            run = f"b/{what}/1"
            is_new = entry is None or entry.run != run
            entry = entries.saw(entry, VM, "web", run=run, origin=more)
            assert not (is_new and entry.state == CONFIRMED)
            assert not (is_new and more != "here" and entry.eks)
            assert not entry.making
        elif entry is not None and word == "lowered":
            entry = entries.lowered(entry)
            assert entry.state != CONFIRMED
        elif entry is not None:
            found = keys(what)[: 1 if more else 2]
            entry = entries.read_back(entry, found)
            assert (set(entry.eks), entry.state) == (set(found), CONFIRMED)
        if entry is None:
            continue
        assert len({ek.family for ek in entry.eks}) == len(entry.eks) <= 2
        assert entry.generation >= generation
        assert entry.eks or entry.state == CLAIMED
        generation = entry.generation


def test_a_registry_of_version_1_is_read(tmp_path: Path) -> None:
    """Its EKs could be registered at any time: none of them is "registered" for that."""
    path = tmp_path / "vtpm.sqlite"
    registry = Registry(path, max_vms=3)
    make(registry)
    registry.close()
    old = sqlite3.connect(path)
    old.executescript(
        "ALTER TABLE vms DROP COLUMN run; ALTER TABLE eks DROP COLUMN spire;"
        "UPDATE vms SET state = 'claimed'; PRAGMA user_version = 1"
    )
    old.close()
    for _ in range(2):
        registry = Registry(path, max_vms=3)
        entry = entry_of(registry)
        assert (entry.run, entry.state, set(entry.eks)) == ("", CLAIMED, {RSA, ECC})
        registry.close()
    registry = Registry(path, max_vms=3)
    assert start(registry).state == CLAIMED
    registry.close()


def test_the_database_is_not_world_readable_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Registry(tmp_path / "a" / "vtpm.sqlite", max_vms=1).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "vtpm.sqlite").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
