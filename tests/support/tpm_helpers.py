"""What the tests of a TPM under stress share: a swtpm that can be killed and put back, a plan of
faults that a test writes as it goes, other users of the chip, the daemon in this process."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from helpers import (
    LIMIT_S,
    Asker,
    Reply,
    Wire,
    get,
    quote_target,
    until_answered,
    wait_until,
)
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_SE
from tpm2_pytss.types import TPM2B_SENSITIVE_CREATE, TPMT_SYM_DEF

from provider_proxy.evidence import attestation, inclusion
from provider_proxy.evidence.model import (
    AttestationKey,
    HashAlg,
    InclusionProof,
    Quote,
    QuoteRequest,
    VerifiedQuote,
    pcrs_of,
)
from provider_proxy.evidence.wire import EvidenceEncoder
from provider_proxy.host import daemon
from provider_proxy.host.batching import merkle
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.config.tables import Admin, BatchTable, Config, Limits, Listen, Logs
from provider_proxy.host.daemon import Started
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import local_tpm
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.tpm.chip import OpenContext
from provider_proxy.host.tpm.chip import open_context as open_undisturbed
from provider_proxy.testing.broker import Broker
from provider_proxy.testing.disturb import Action, refusal
from provider_proxy.testing.faulty import FaultyContext
from provider_proxy.testing.ima import extend

T = TypeVar("T")

QUALIFYING = b"abcdefghijklmnopqrstuvwxyz234567"
AK_HANDLE = 0x81000100
EK_HANDLE = 0x81010001
NOWHERE = Path("/nonexistent")
MOST_TAKEN = 100  # a TPM has 64 sessions and 3 slots
ASK_S = 0.05  # between two questions while waiting: below a tenant's rate
SERVICE_BACK_S = 5.0  # after the faults end; a requirement

# TPM_CC: TPM 2.0 Part 2, section 6.5.2
CC_CREATE_PRIMARY = 0x131
CC_ACTIVATE_CREDENTIAL = 0x147
CC_POLICY_SECRET = 0x151
CC_QUOTE = 0x158
CC_FLUSH_CONTEXT = 0x165
CC_READ_PUBLIC = 0x173
CC_START_AUTH_SESSION = 0x176
CC_GET_CAPABILITY = 0x17A
CC_PCR_READ = 0x17E

FIRST_LOADED_SESSION = 0x02000000
FIRST_SAVED_SESSION = 0x03000000
FIRST_TRANSIENT = 0x80000000
FIRST_PERSISTENT = 0x81000000


# --- faults -----------------------------------------------------------------------------------------


class Faults:
    """A plan that a test writes while it runs; any thread may ask it.

    Attributes:
        seen: every command that came by.
        times: when each did.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[int, deque[Action]] = {}
        self._always: dict[int, Action] = {}
        self._every: Action | None = None
        self.seen: list[int] = []
        self.times: list[float] = []

    def __call__(self, command: int) -> Action | None:
        with self._lock:
            self.seen.append(command)
            self.times.append(time.monotonic())
            queue = self._next.get(command)
            if queue:
                return queue.popleft()
            return self._always.get(command, self._every)

    def next(self, command: int, *actions: Action) -> None:
        """What happens to the next ones of a command."""
        with self._lock:
            self._next.setdefault(command, deque()).extend(actions)

    def always(self, command: int, action: Action) -> None:
        """What happens to a command until `clear`."""
        with self._lock:
            self._always[command] = action

    def every(self, action: Action) -> None:
        """What happens to every command until `clear`."""
        with self._lock:
            self._every = action

    def clear(self) -> None:
        with self._lock:
            self._next.clear()
            self._always.clear()
            self._every = None

    @property
    def pending(self) -> int:
        """How many of `next` have not happened yet."""
        with self._lock:
            return sum(map(len, self._next.values()))

    def count(self, command: int) -> int:
        return self.seen.count(command)

    @property
    def open_context(self) -> OpenContext:
        """For `open_quoter`."""
        return partial(FaultyContext, plan=self)


class Hold(threading.Event):
    """For `Action.hold`: a hang that ends by itself, so that a test that fails does not hang too."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(LIMIT_S if timeout is None else timeout)


class FakeTime:
    """Stands in for a module's `time`: `monotonic` that a test can put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


def errors_counted(metrics: Metrics) -> dict[tuple[str, str], int]:
    """(code, step) to how many."""
    return {
        (sample.labels["code"], sample.labels["step"]): int(sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "provider_proxy_tpm_errors_total"
    }


def sample(metrics: Metrics, name: str, labels: Mapping[str, str] | None = None) -> float:
    """The value of a metric; 0 where it was never set."""
    found = metrics.registry.get_sample_value(f"provider_proxy_{name}", dict(labels or {}))
    return found or 0.0


# --- chips ------------------------------------------------------------------------------------------


class Swtpm:
    """A swtpm that nobody starts again but the test, always at the same address.

    Attributes:
        state: its state directory.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="provider-proxy-"))
        self._path = self._folder / "tpm"
        self.tcti = f"swtpm:path={self._path}"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        assert self._process is None
        control = self._path.with_name("tpm.ctrl")
        for path in (self._path, control):
            path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.state}"),
                *("--flags", "not-need-init,startup-clear"),
                *("--server", f"type=unixio,path={self._path}"),
                *("--ctrl", f"type=unixio,path={control}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: _answers(control), "the swtpm's start")

    def stop(self) -> None:
        """In order: it writes its state."""
        if self._process is not None:
            self._process.terminate()
            self._reap()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def _reap(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder)


def _answers(control: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(LIMIT_S)
        try:
            probe.connect(str(control))
            probe.sendall(b"\0\0\0\1")  # CMD_GET_CAPABILITY, swtpm_ioctls(3)
            return bool(probe.recv(64))
        except OSError:
            return False


@contextlib.contextmanager
def swtpm_at(state: Path) -> Iterator[Swtpm]:
    """A running swtpm."""
    made = Swtpm(state)
    try:
        made.start()
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def raw_tpm(state: Path, faults: Faults | None = None) -> Iterator[Broker]:
    """A bare TPM device with room for several programs, and nobody between them."""
    with swtpm_at(state) as made, Broker(made.tcti, faults) as broker:
        yield broker


def tool(tcti: str, *words: str | Path, cwd: Path | None = None) -> str:
    """Run one of tpm2-tools; what it prints."""
    return tool_bytes(tcti, *words, cwd=cwd).decode()


def tool_bytes(tcti: str, *words: str | Path, cwd: Path | None = None) -> bytes:
    """As `tool`, for output that is not text."""
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "TPM2TOOLS_TCTI": tcti},
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# --- other users of a chip --------------------------------------------------------------------------


def handles(context: ESAPI, first: int) -> list[int]:
    """Handles of one kind that the TPM holds, of any owner."""
    _, data = context.get_capability(TPM2_CAP.HANDLES, first, 128)
    return [int(handle) for handle in data.data.handles]


def flush(tcti: str, handle: int) -> None:
    """TPM2_FlushContext of anybody's session or object, past tpm2-tss, which knows its own alone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(tcti.removeprefix("swtpm:path="))
        sock.sendall(struct.pack(">HIII", 0x8001, 14, CC_FLUSH_CONTEXT, handle))
        answer = sock.recv(64)
    assert answer == refusal(0), answer.hex()


def start_session(context: ESAPI) -> ESYS_TR:
    return context.start_auth_session(
        ESYS_TR.NONE,
        ESYS_TR.NONE,
        TPM2_SE.POLICY,
        TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
        TPM2_ALG.SHA256,
    )


def until_refused(take: Callable[[], T], code: int) -> list[T]:
    """Take something again and again until the TPM answers this code."""
    taken: list[T] = []
    while len(taken) < MOST_TAKEN:
        try:
            taken.append(take())
        except TSS2_Exception as exc:
            if int(exc.error) != code:
                raise
            return taken
    raise AssertionError("the TPM has no end of it")


def take_loaded_sessions(context: ESAPI) -> list[ESYS_TR]:
    """Until the TPM has no memory for one more: SESSION_MEMORY."""
    return until_refused(lambda: start_session(context), 0x903)


def take_session_handles(context: ESAPI) -> int:
    """Start sessions and put them aside, until there is no handle for one more: SESSION_HANDLES."""
    return len(until_refused(lambda: context.context_save(start_session(context)), 0x905))


def take_object_slots(context: ESAPI) -> list[ESYS_TR]:
    """Until the TPM has no memory for one more object: OBJECT_MEMORY."""

    def take() -> ESYS_TR:
        return context.create_primary(TPM2B_SENSITIVE_CREATE(), "ecc", ESYS_TR.OWNER)[0]

    return until_refused(take, 0x902)


# --- quoters ----------------------------------------------------------------------------------------


def open_quoter(
    tcti: str,
    state_dir: Path,
    *,
    metrics: Metrics | None = None,
    faults: Faults | None = None,
    max_duty: float = 1.0,
    ak_algorithm: str = "ecc",
) -> AbstractAsyncContextManager[EsysQuoter]:
    """A quoter on a chip; with faults, its own connection is what is disturbed."""
    settings = Tpm(tcti=tcti, max_duty=max_duty, ak_algorithm=ak_algorithm)
    if faults is None:
        return local_tpm.open_quoter(settings, state_dir, metrics or Metrics())
    return local_tpm.open_quoter(
        settings, state_dir, metrics or Metrics(), open_context=faults.open_context
    )


def check(
    quote: Quote,
    ak: AttestationKey,
    *,
    qualifying: bytes = QUALIFYING,
    bank: HashAlg = HashAlg.SHA256,
    mask: int = 1,
) -> None:
    """As a tenant would: signed, over this, and with the values of these PCRs."""
    attest = attestation.parse_attest(quote.attest)
    attestation.check_signature(quote.attest, attestation.parse_signature(quote.signature), ak)
    attestation.check_pcrs(attest, quote.pcrs, ak.signature_hash)
    assert attest.extra_data == qualifying
    assert (attest.bank, attest.mask) == (bank, mask)
    assert [pcr for pcr, _ in quote.pcrs.values] == list(pcrs_of(mask))


async def move_pcr(quoter: EsysQuoter, pcr: int = 0) -> None:
    """Extend a PCR, so that its value is not the known one and the next quote reads it."""
    with trio.fail_after(LIMIT_S):
        await quoter.on_chip(lambda opened: extend(opened.context, pcr))


async def quote_once(quoter: EsysQuoter, *, mask: int = 1, limit_s: float = LIMIT_S) -> Quote:
    """A quote that is good, within a limit."""
    with trio.fail_after(limit_s):
        quote = await quoter.quote(QUALIFYING, HashAlg.SHA256, mask)
    check(quote, quoter.ak, mask=mask)
    return quote


async def answer_of(quoter: EsysQuoter, request: QuoteRequest) -> bytes:
    """What a daemon over this quoter would answer to one request."""
    salt = bytes(range(16))
    leaf = inclusion.leaf_input(
        salt=salt, nonce=request.nonce, mask=request.mask, bank=request.bank, claims=b""
    )
    tree = merkle.build_tree([leaf, bytes(32)])
    qualifying = inclusion.qualifying_data(tree.root, tree.size)
    with trio.fail_after(LIMIT_S):
        quote = await quoter.quote(qualifying, request.bank, request.mask)
    encoder = EvidenceEncoder(
        quote,
        ak_name=quoter.ak.name,
        hash_alg=quoter.ak.signature_hash,
        enc_alg=quoter.ak.enc_alg,
        sign_alg=quoter.ak.sign_alg,
        quote_ms=1.0,
    )
    proof = InclusionProof(leaf_index=0, tree_size=tree.size, path=tree.paths[0], salt=salt)
    return b"".join(encoder.encode(proof))


async def attested(quoter: EsysQuoter, asker: Asker) -> VerifiedQuote:
    """A tenant's round, without a socket. Raises: VerificationError."""
    challenge = asker.challenge()
    return asker.verify(await answer_of(quoter, challenge.request), challenge)


# --- the daemon, in this process ---------------------------------------------------------------------


def plain_config(
    state_dir: Path,
    tcti: str = "embedded",
    *,
    max_duty: float = 1.0,
    hang_limit_s: float = 120.0,
    limits: Limits | None = None,
    window_ms: float = 1.0,
) -> Config:
    """Loopback, plaintext, an admin listener."""
    return Config(
        state_dir=state_dir,
        listen=Listen(address=("127.0.0.1:0",), insecure_plaintext=True),
        admin=Admin(address=("127.0.0.1:0",)),
        tpm=Tpm(tcti=tcti, max_duty=max_duty, hang_limit_s=hang_limit_s),
        batch=BatchTable(window_ms=window_ms),
        limits=limits or Limits(),
        logs=Logs(ima=NOWHERE, uefi=NOWHERE),
    )


@asynccontextmanager
async def daemon_over(
    config: Config, faults: Faults | None = None, *, metrics: list[Metrics] | None = None
) -> AsyncIterator[Started]:
    """The real daemon with a real TPM, disturbed by plan; its metrics are put into `metrics`."""
    open_context = open_undisturbed if faults is None else faults.open_context
    async with daemon_over_context(config, open_context, metrics=metrics) as started:
        yield started


@asynccontextmanager
async def daemon_over_context(
    config: Config, open_context: OpenContext, *, metrics: list[Metrics] | None = None
) -> AsyncIterator[Started]:
    """The same with any way to open a tpm2-tss string."""

    def opened(config: Config, made: Metrics) -> AbstractAsyncContextManager[EsysQuoter]:
        if metrics is not None:
            metrics.append(made)
        return local_tpm.open_quoter(config.tpm, config.state_dir, made, open_context=open_context)

    thresholds = gc.get_threshold()
    try:
        async with trio.open_nursery() as nursery:
            run = partial(daemon.run, config, open_quoter=opened)
            with trio.fail_after(LIMIT_S):
                started: Started = await nursery.start(run)
            yield started
            nursery.cancel_scope.cancel()
    finally:
        gc.unfreeze()  # the daemon tunes it for a process of its own
        gc.set_threshold(*thresholds)


async def ask(wire: Wire, asker: Asker, mask: int = 1, *, timeout_ms: int | None = None) -> Reply:
    """One request; an answer of 200 is verified before it is believed."""
    challenge = asker.challenge(mask, timeout_ms=timeout_ms)
    reply = await wire.get(quote_target(challenge))
    if reply.status == 200:
        asker.verify(reply.body, challenge)
    return reply


def check_refusal(reply: Reply, *known: int, retry_after: bool = False) -> None:
    """A typed refusal: Keylime's envelope, one of these statuses, nothing of a quote in it."""
    assert reply.status in known, reply.body
    envelope = reply.envelope()
    assert envelope["results"] == {}
    assert envelope["status"]
    after = reply.header("Retry-After")
    assert after is None or int(after) >= 1
    if retry_after:
        assert after is not None


async def is_ready(started: Started) -> bool:
    """What /readyz says."""
    reply = await get(started.admin_addresses[0], "/readyz")
    assert reply.status in (200, 503)
    return reply.status == 200


async def until_ready(started: Started, *, ready: bool = True) -> None:
    async def as_wanted() -> bool:
        await trio.sleep(ASK_S)
        return await is_ready(started) == ready

    await until_answered(as_wanted, f"readiness {ready}")


async def until_served(wire: Wire, asker: Asker, *, timeout_ms: int | None = None) -> float:
    """Ask until an answer verifies; whatever comes before is a typed refusal.

    Returns:
        How long it took, in seconds.
    """
    begin = time.monotonic()

    async def served() -> bool:
        reply = await ask(wire, asker, timeout_ms=timeout_ms)
        if reply.status != 200:
            check_refusal(reply, 503, 504)
            await trio.sleep(ASK_S)
        return reply.status == 200

    await until_answered(served, "a quote")
    return time.monotonic() - begin
