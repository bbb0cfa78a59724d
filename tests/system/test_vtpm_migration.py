"""Claims on the move: two hosts with a real libvirt and QEMU each. `make test-libvirt`, as root.

Live, cold and offline migrations, some aborted, some with a QEMU or a libvirtd killed on either side. An
observer looks at both hosts all the time, and holds every claim against what QEMU itself says. The last
test does things in random order, for SOAK_SECONDS (30 by default; SOAK_SEED repeats an order).
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from helpers import wait_until
from libvirt_helpers import OPT_IN
from two_hosts import Domain, Host, passphrase, two_hosts

from provider_proxy.errors import VtpmError
from provider_proxy.host.vtpm.helper.readback import STATE_FILE, StateSource
from provider_proxy.host.vtpm.helper.status import StatePlace

pytestmark = OPT_IN
if "TEST_LIBVIRT" not in os.environ:
    pytest.skip("opt-in: make test-libvirt", allow_module_level=True)

PLAIN = Domain(name="plain", vm=uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c01"))
OTHER = Domain(name="other", vm=uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c02"))
SHARED = Domain(
    name="shared",
    vm=uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c03"),
    secret=uuid.UUID("aaaaaaaa-0000-4000-8000-00000000000a"),
)
PRIVATE = Domain(
    name="private",
    vm=uuid.UUID("0b8c5f0e-8f5a-4b7e-9d3c-2a1f6e5d4c04"),
    secret=uuid.UUID("aaaaaaaa-0000-4000-8000-00000000000b"),
)
BACK_S = 10.0  # claims are back so soon after the guest goes on at the destination
OVERSHOOT_S = 1.0  # longer than a busy machine takes to hear of a change
SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
SLOW = ("--bandwidth", "1")
CATCH_UP_S = 60.0


class KnownSecret(StateSource):
    """Reads encrypted states with the passphrase that this test has chosen, private or not."""

    async def _key(self, stack: ExitStack, secret: uuid.UUID | None) -> int:
        name = next(domain.name for domain in (SHARED, PRIVATE) if domain.secret == secret)
        ours, theirs = os.pipe()
        os.write(theirs, passphrase(name).encode("ascii"))
        os.close(theirs)
        stack.callback(os.close, ours)
        return ours


def true_eks(host: Host, domain: Domain) -> frozenset[str]:
    """What the vTPM on a host holds, read without the helper."""
    source = KnownSecret(
        root=host.folder / "var/lib/libvirt/swtpm",
        uid=pwd.getpwnam("tss").pw_uid,
        work=host.folder,
    )
    for _ in range(20):
        try:
            eks = trio.run(source.read_eks, domain.vm, StatePlace(), domain.secret)
            return frozenset(ek.spki_sha256 for ek in eks)
        except VtpmError:
            time.sleep(0.1)
    raise AssertionError(f"{domain.name} on {host.name} has no vTPM that can be read")


@dataclass
class Observer:
    """Looks at both hosts all the time.

    Attributes:
        wrong: what must never be.
        overshoot_s: the longest that a claim outlived the guest's running.
        known: the EKs of each VM's vTPM, where the test knows them.
        states: those in which each VM's EKs were claimed.
    """

    hosts: tuple[Host, Host]
    domains: tuple[Domain, ...]
    wrong: list[str] = field(default_factory=list)
    overshoot_s: float = 0.0
    samples: int = 0
    known: dict[str, frozenset[str] | None] = field(default_factory=dict)
    states: dict[str, set[str]] = field(default_factory=dict)
    _since: dict[tuple[str, str], float] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        for domain in self.domains:
            before = [host.runs(domain) for host in self.hosts]
            a, b = self.hosts
            claims = [a.eks(domain), b.eks(domain)]
            again = a.eks(domain)
            after = [host.runs(domain) for host in self.hosts]
            if claims[0] and claims[1] and again:
                self.wrong.append(f"{domain.name}: claimed on both hosts")
            for host, eks, ran, runs in zip(self.hosts, claims, before, after, strict=True):
                self._judge(host, domain, eks, runs=ran or runs)
            self.samples += 1

    def _judge(self, host: Host, domain: Domain, eks: frozenset[str] | None, *, runs: bool) -> None:
        key = (host.name, domain.name)
        if eks is None or runs:
            self._since.pop(key, None)
        else:
            since = self._since.setdefault(key, time.monotonic())
            self.overshoot_s = max(self.overshoot_s, time.monotonic() - since)
            if time.monotonic() - since > OVERSHOOT_S:
                self.wrong.append(f"{domain.name}: claimed on {host.name}, where it does not run")
        if eks is not None:
            claim = host.claim(domain)
            self.states.setdefault(domain.name, set()).update({claim["state"]} if claim else ())
        known = self.known.get(domain.name)
        if eks is not None and known is not None and eks != known:
            self.wrong.append(f"{domain.name}: {host.name} claims an EK that is not its vTPM's")

    def _run(self) -> None:
        while not self._ended.is_set():
            self.look()
            time.sleep(0.01)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
        assert self.samples > 0
        assert self.wrong == []


@dataclass
class Scene:
    """The two hosts and who looks at them."""

    a: Host
    b: Host
    observer: Observer

    def learn(self, host: Host, domain: Domain) -> frozenset[str]:
        """Wait for claims, and have the observer hold all others against what is true now."""
        host.until_claimed(domain, CATCH_UP_S)
        eks = true_eks(host, domain)
        assert host.eks(domain) == eks
        self.observer.known[domain.name] = eks
        return eks

    def start_new(self, host: Host, domain: Domain) -> frozenset[str]:
        self.observer.known[domain.name] = None
        host.define(domain)
        host.virsh("start", domain.name)
        return self.learn(host, domain)

    def forget(self, host: Host, domain: Domain) -> None:
        host.try_virsh("destroy", domain.name)
        host.virsh("undefine", domain.name)
        host.until_silent(domain)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with two_hosts() as (a, b):
        observer = Observer(hosts=(a, b), domains=(PLAIN, OTHER))
        try:
            with observer.at_work():
                yield Scene(a, b, observer)
        except BaseException:
            print(a.log(), b.log(), sep="\n")
            raise


def finish(migration: subprocess.Popen[str], *, good: bool = True) -> None:
    said, _ = migration.communicate(timeout=120)
    assert (migration.returncode == 0) == good, said


def move(scene: Scene, source: Host, to: Host, domain: Domain, *more: str) -> float:
    """Migrate live; how long after the guest's going on its claims were back, in seconds."""
    migration = source.migration(domain, to, *more)
    wait_for(lambda: to.runs(domain) or migration.poll() is not None)
    back_s = to.until_claimed(domain, BACK_S) if to.runs(domain) else -1.0
    finish(migration)
    source.until_silent(domain)
    return back_s


def wait_for(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_live_there_and_back_with_another_vtpm_in_between(scene: Scene) -> None:
    """The old vTPM's state still lies on a: its EK is claimed by nobody."""
    a, b = scene.a, scene.b
    first = scene.start_new(a, PLAIN)
    back_s = move(scene, a, b, PLAIN)  # leaves the definition, and the state, on a
    print(f"\nclaims were back {back_s:.2f} s after the guest went on")
    assert b.eks(PLAIN) == first
    claim = b.claim(PLAIN)
    assert claim is not None
    assert (claim["migrated"], claim["confirmed"], claim["issuer"]) == (True, True, "unknown")
    assert (a.folder / f"var/lib/libvirt/swtpm/{PLAIN.vm}/tpm2/{STATE_FILE}").exists()
    scene.forget(b, PLAIN)
    second = scene.start_new(b, PLAIN)
    assert not first & second
    # Slow: while it is copied, a has the old state, and a QEMU that waits.
    migration = b.migration(PLAIN, a, "--undefinesource", *SLOW)
    wait_for(lambda: a.qemu_pid(PLAIN) is not None)
    looks = 0
    while not a.runs(PLAIN):
        claimed = a.eks(PLAIN)
        if not a.runs(PLAIN):  # it did not begin to, meanwhile
            assert claimed is None
            looks += 1
    assert looks > 3
    a.until_claimed(PLAIN, BACK_S)
    finish(migration)
    assert a.eks(PLAIN) == second


def test_a_migration_that_fails_or_is_given_up_changes_nothing(scene: Scene) -> None:
    a, b = scene.a, scene.b
    eks = scene.start_new(a, PLAIN)

    def begin() -> subprocess.Popen[str]:
        migration = a.migration(PLAIN, b, *SLOW)
        wait_for(lambda: b.qemu_pid(PLAIN) is not None)
        time.sleep(0.5)
        return migration

    migration = begin()
    a.virsh("domjobabort", "plain")
    finish(migration, good=False)
    assert (a.eks(PLAIN), b.eks(PLAIN)) == (eks, None)

    migration = begin()
    pid = b.qemu_pid(PLAIN)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    finish(migration, good=False)
    assert (a.eks(PLAIN), b.eks(PLAIN)) == (eks, None)

    for host in (b, a):  # the destination's libvirtd, then the source's
        migration = begin()
        host.kill("libvirtd")
        finish(migration, good=False)
        host.start("libvirtd")
        wait_until(lambda: a.eks(PLAIN) == eks, "the claims on a")
        wait_for(lambda: b.qemu_pid(PLAIN) is None)
        assert b.eks(PLAIN) is None
    pid = a.qemu_pid(PLAIN)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)  # and the source's QEMU, which is the VM
    a.until_silent(PLAIN)


def test_daemons_and_helpers_that_are_killed_meanwhile(scene: Scene) -> None:
    a, b = scene.a, scene.b
    eks = scene.start_new(a, PLAIN)
    for what in ("helper", "daemon"):
        b.kill(what)
        move_blindly(a, b)
        assert b.eks(PLAIN) is None
        b.start(what)
        b.until_claimed(PLAIN, BACK_S)
        assert b.eks(PLAIN) == eks
        a.kill(what)
        a.start(what)
        assert a.eks(PLAIN) is None
        move(scene, b, a, PLAIN)
        assert a.eks(PLAIN) == eks


def move_blindly(source: Host, to: Host) -> None:
    finish(source.migration(PLAIN, to))
    source.until_silent(PLAIN)


def test_cold_and_offline(scene: Scene) -> None:
    """Cold, as Nova does it: the folder of the vTPM goes along. Offline, as libvirt does it: nothing."""
    a, b = scene.a, scene.b
    eks = scene.start_new(a, PLAIN)
    a.virsh("destroy", "plain")
    a.until_silent(PLAIN)
    state = Path("var/lib/libvirt/swtpm") / str(PLAIN.vm)
    (b.folder / state.parent).mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", a.folder / state, b.folder / state.parent], check=True)
    names = {path.name for path in (b.folder / state / "tpm2").glob("*.crt")}
    assert names == {"ek-rsa2048.crt", "ek-secp384r1.crt"}  # they travel along
    a.virsh("undefine", "plain")
    b.define(PLAIN)
    b.virsh("start", "plain")
    b.until_claimed(PLAIN)
    assert b.eks(PLAIN) == eks
    b.virsh("destroy", "plain")
    b.until_silent(PLAIN)
    scene.observer.known[PLAIN.name] = None
    words = ("--offline", "--persistent", "--undefinesource", "plain", "qemu+tcp://hosta/system")
    b.virsh("migrate", *words)
    assert (a.eks(PLAIN), b.eks(PLAIN)) == (None, None)
    a.virsh("start", "plain")
    assert not scene.learn(a, PLAIN) & eks  # libvirt 9.0 has made a new vTPM


def with_secrets(scene: Scene) -> None:
    """Both hosts know the two secrets, and answer for the one that is not private."""
    for host in (scene.a, scene.b):
        host.secret(SHARED, private=False)
        host.secret(PRIVATE, private=True)
        host.give_secrets()


def test_encrypted_on_the_move(scene: Scene) -> None:
    """A secret that libvirt gives: as with a plain state. A private one: what came in has no claims."""
    a, b = scene.a, scene.b
    with_secrets(scene)
    for domain in (SHARED, PRIVATE):
        a.define(domain)
        a.virsh("start", domain.name)
    wait_for(lambda: (a.claim(SHARED) or {}).get("state") == "confirmed")
    a.until_claimed(PRIVATE)
    claim = a.claim(PRIVATE)
    assert claim is not None
    assert (claim["state"], claim["confirmed"]) == ("registered", False)
    eks = a.eks(SHARED)
    move(scene, a, b, SHARED)
    claim = b.claim(SHARED)
    assert claim is not None
    assert (b.eks(SHARED), claim["state"], claim["migrated"]) == (eks, "confirmed", True)
    finish(a.migration(PRIVATE, b))
    wait_for(lambda: b.runs(PRIVATE))
    time.sleep(3)
    assert (a.claim(PRIVATE), b.claim(PRIVATE)) == (None, None)
    for host in (a, b):
        assert "passphrase of" not in host.log()
        assert not list((host.folder / "work").iterdir())


# --- in random order ----------------------------------------------------------------------------------


class Chaos:
    """Does things to VMs on two hosts, and waits after each until all is told as it is."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene = scene
        self.random = random.Random(seed)
        self.done: dict[str, int] = {}

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.scene.a, self.scene.b

    def where(self, domain: Domain) -> Host | None:
        return next((host for host in self.hosts if host.runs(domain)), None)

    def step(self) -> None:
        domain = self.random.choice(self.scene.observer.domains)
        host = self.where(domain)
        if host is None:
            self._do("start", self.start, domain)
        else:
            ways = {
                "migrate": self.migrate,
                "abort": self.abort,
                "kill the waiting QEMU": self.kill_waiting,
                "kill the QEMU": self.kill_qemu,
                "kill a libvirtd": self.kill_libvirtd,
                "kill a helper": lambda d, h: self.kill(d, "helper"),
                "kill a daemon": lambda d, h: self.kill(d, "daemon"),
                "destroy": lambda d, h: h.virsh("destroy", d.name),
                "save and restore": self.save,
                "suspend and resume": self.suspend,
                "copy a state": self.copy,
                "a new vTPM": self.anew,
            }
            if domain is PRIVATE:
                # Nobody can read what was laid under a private secret while the VM was off: a claim
                # about it is then "claimed", the word of before.
                del ways["copy a state"]
            name = self.random.choice(list(ways))
            self._do(name, ways[name], domain, host)
        self.settle()

    def _do(self, name: str, way: Callable[..., object], *what: object) -> None:
        print(
            f"  {name}: {', '.join(str(getattr(each, 'name', each)) for each in what)}", flush=True
        )
        self.done[name] = self.done.get(name, 0) + 1
        way(*what)

    def settle(self) -> None:
        """What runs is claimed, with what it holds; what does not is not."""
        for host in self.hosts:
            for domain in self.scene.observer.domains:
                if host.runs(domain) and domain is PRIVATE:  # may have no claims: it came in
                    self.scene.observer.known[domain.name] = true_eks(host, domain)
                elif host.runs(domain):
                    eks = self.scene.learn(host, domain)
                    assert host.eks(domain) == eks
                else:
                    host.until_silent(domain)

    def start(self, domain: Domain) -> None:
        host = self.random.choice(self.hosts)
        for each in self.hosts:
            each.try_virsh("destroy", domain.name)
        self.scene.observer.known[domain.name] = (
            None  # another state may lie there than on the other
        )
        host.define(domain)
        host.virsh("start", domain.name)

    def other(self, host: Host) -> Host:
        return self.scene.b if host is self.scene.a else self.scene.a

    def migrate(self, domain: Domain, host: Host) -> None:
        more = ("--undefinesource",) if self.random.random() < 0.5 else ()
        finish(host.migration(domain, self.other(host), *more))

    def begin(self, domain: Domain, host: Host) -> subprocess.Popen[str]:
        migration = host.migration(domain, self.other(host), *SLOW)
        wait_for(
            lambda: self.other(host).qemu_pid(domain) is not None or migration.poll() is not None
        )
        time.sleep(self.random.random())
        return migration

    def abort(self, domain: Domain, host: Host) -> None:
        migration = self.begin(domain, host)
        host.try_virsh("domjobabort", domain.name)
        migration.communicate(timeout=120)

    def kill_waiting(self, domain: Domain, host: Host) -> None:
        migration = self.begin(domain, host)
        pid = self.other(host).qemu_pid(domain)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        migration.communicate(timeout=120)

    def kill_qemu(self, domain: Domain, host: Host) -> None:
        pid = host.qemu_pid(domain)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: host.qemu_pid(domain) is None)

    def kill_libvirtd(self, domain: Domain, host: Host) -> None:
        migration = self.begin(domain, host)
        victim = self.random.choice(self.hosts)
        victim.kill("libvirtd")
        migration.communicate(timeout=120)
        victim.start("libvirtd")
        wait_for(
            lambda: self.where(domain) is None or self.other_is_gone(domain), limit_s=CATCH_UP_S
        )

    def other_is_gone(self, domain: Domain) -> bool:
        host = self.where(domain)
        return host is None or self.other(host).qemu_pid(domain) is None

    def kill(self, domain: Domain, what: str) -> None:
        victim = self.random.choice(self.hosts)
        victim.kill(what)
        time.sleep(self.random.random())
        victim.start(what)

    def save(self, domain: Domain, host: Host) -> None:
        path = host.lines / f"{domain.name}.save"
        host.virsh("save", domain.name, path)
        host.until_silent(domain)
        host.virsh("restore", path)

    def suspend(self, domain: Domain, host: Host) -> None:
        host.virsh("suspend", domain.name)
        time.sleep(0.2)
        host.virsh("resume", domain.name)

    def copy(self, domain: Domain, host: Host) -> None:
        """The state of a VM that runs, laid where the other host may find it."""
        state = Path("var/lib/libvirt/swtpm") / str(domain.vm)
        there = self.other(host).folder / state.parent
        there.mkdir(exist_ok=True)
        shutil.rmtree(there / state.name, ignore_errors=True)
        subprocess.run(["cp", "-a", host.folder / state, there], check=True)

    def anew(self, domain: Domain, host: Host) -> None:
        self.scene.forget(host, domain)
        self.scene.start_new(host, domain)


def test_in_random_order(scene: Scene) -> None:
    seed = int(os.environ.get("SOAK_SEED", str(random.randrange(10**6))))
    print(f"\nmigrations: SOAK_SEED={seed} SOAK_SECONDS={SECONDS:g}", flush=True)
    with_secrets(scene)
    scene.observer.domains = (PLAIN, OTHER, SHARED, PRIVATE)
    chaos = Chaos(scene, seed)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        chaos.step()
        assert scene.observer.wrong == []
    print(f"  done: {chaos.done}")
    print(
        f"  claimed as: { {name: sorted(states) for name, states in scene.observer.states.items()} }"
    )
    assert "confirmed" not in scene.observer.states.get(PRIVATE.name, set())
    print(
        f"  {scene.observer.samples} looks at both hosts; never on both, never another EK; "
        f"a claim outlived its guest's running by {scene.observer.overshoot_s:.2f} s at most"
    )
