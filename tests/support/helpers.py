"""What several test files use: a threadless fake quoter, evidence made by hand, a raw HTTP client, the
real daemon as a subprocess, and a certificate authority."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import os
import re
import secrets
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import trio
import trustme

from provider_proxy.cli.main import main
from provider_proxy.common.streams import SocketStream
from provider_proxy.errors import ProviderProxyError
from provider_proxy.evidence import inclusion
from provider_proxy.evidence.model import (
    AttestationKey,
    HashAlg,
    HostLogs,
    InclusionProof,
    Quote,
    QuoteRequest,
    TrustedHost,
    VerifiedQuote,
)
from provider_proxy.evidence.policy import Policy, UnsafeAcceptAny
from provider_proxy.evidence.query import encode_quote_query
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier, new_challenge
from provider_proxy.evidence.wire import EvidenceEncoder
from provider_proxy.host import daemon
from provider_proxy.host.assembly import OpenQuoter
from provider_proxy.host.batching import merkle
from provider_proxy.host.batching.batch import Answer
from provider_proxy.host.config.tables import Config
from provider_proxy.host.daemon import Started
from provider_proxy.host.http.listeners import describe, open_listeners
from provider_proxy.host.http.server import HttpServer
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.quoters.tpm_opener import HostIdentity
from provider_proxy.host.tpm.state import ChipState
from provider_proxy.testing.soft_tpm import SoftTpm

LIMIT_S = 20.0  # nothing that a test waits for takes a second; a slow machine gets a few
POLL_S = 0.005
HOST_UUID = uuid.UUID("0ddba11c-0ffe-4bad-8bad-00000c0ffee0")
FAKE_EK = b"\x00\x04fake"
MASK = 0x0001  # PCR 0
NO_LOGS = '[logs]\nima = "/nonexistent/ima"\nuefi = "/nonexistent/uefi"\n'


async def until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Wait for a condition, at most `LIMIT_S`."""
    with trio.move_on_after(LIMIT_S):
        while not condition():  # noqa: ASYNC110  # of another process, mostly
            await trio.sleep(POLL_S)
        return
    raise AssertionError(f"{what} did not come true in {LIMIT_S} s")


async def until_answered(
    condition: Callable[[], Awaitable[bool]], what: str = "the condition"
) -> None:
    """The same where somebody has to be asked."""
    with trio.move_on_after(LIMIT_S):
        while not await condition():  # noqa: ASYNC110
            await trio.sleep(POLL_S)
        return
    raise AssertionError(f"{what} did not come true in {LIMIT_S} s")


def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """The same for synchronous tests."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {LIMIT_S} s"
        time.sleep(POLL_S)


def is_alive(pid: int) -> bool:
    """True while a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def children_of(pid: int) -> list[int]:
    """The process ids of a process's children."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, path.read_text().split())
    return found


# --- quoters and evidence ---------------------------------------------------------------------------


class FakeQuoter:
    """A `batcher.Quoter` over a `SoftTpm`, without threads: a quote takes `delay_s` of trio's clock.

    Attributes:
        quotes: what was asked: qualifying data, bank, mask.
        error: raised instead of quoting, where set.
        trouble: why the chip gives no quote.
    """

    def __init__(
        self, tpm: SoftTpm | None = None, *, delay_s: float = 0.0, pause_s: float = 0.0
    ) -> None:
        self.tpm = tpm or SoftTpm()
        self.ak: AttestationKey = self.tpm.ak
        self.delay_s = delay_s
        self.pause_s = pause_s
        self.quotes: list[tuple[bytes, HashAlg, int]] = []
        self.error: ProviderProxyError | None = None
        self.trouble: str | None = None
        self._one = trio.Semaphore(1)
        self._rested_at = 0.0
        self.identity = HostIdentity(
            ak_public=self.tpm.ak_public,
            ek_public=FAKE_EK,
            ek_cert=None,
            host_uuid=HOST_UUID,
            software=True,
        )

    @property
    def state(self) -> ChipState:
        return ChipState(expected_s=self.delay_s, pause_s=self.pause_s, trouble=self.trouble)

    async def ready(self) -> None:
        while True:
            if not self._one.value:
                async with self._one:  # wait our turn
                    pass
            elif trio.current_time() < self._rested_at:
                await trio.sleep_until(self._rested_at)
            else:
                await trio.lowlevel.checkpoint()
                return

    async def quote(self, qualifying: bytes, bank: HashAlg, mask: int) -> Quote:
        async with self._one:
            if trio.current_time() < self._rested_at:
                await trio.sleep_until(self._rested_at)
            self.quotes.append((qualifying, bank, mask))
            await trio.sleep(self.delay_s)
            self._rested_at = trio.current_time() + self.pause_s
            if self.error is not None:
                raise self.error
            return self.tpm.quote(qualifying, bank, mask)


def open_fake(quoter: FakeQuoter) -> OpenQuoter:
    """What `daemon.run` takes as `open_quoter`."""

    @asynccontextmanager
    async def opened(_config: Config, _metrics: Metrics) -> AsyncIterator[EsysQuoter]:
        yield cast(EsysQuoter, quoter)

    return opened


def make_answer(
    tpm: SoftTpm, request: QuoteRequest, *, claims: bytes | None = None, mask: int | None = None
) -> Answer:
    """A good answer to one request in a tree of two."""
    salt = bytes(range(16))
    leaf = inclusion.leaf_input(
        salt=salt, nonce=request.nonce, mask=request.mask, bank=request.bank, claims=claims or b""
    )
    tree = merkle.build_tree([leaf, bytes(32)])
    quote = tpm.quote(
        inclusion.qualifying_data(tree.root, tree.size), request.bank, mask or request.mask
    )
    encoder = EvidenceEncoder(
        quote,
        ak_name=tpm.ak.name,
        hash_alg=tpm.ak.signature_hash,
        enc_alg=tpm.ak.enc_alg,
        sign_alg=tpm.ak.sign_alg,
        quote_ms=1.0,
    )
    proof = InclusionProof(leaf_index=0, tree_size=tree.size, path=tree.paths[0], salt=salt)
    return Answer(encoder=encoder, proof=proof, claims=claims, logs=None, queued_s=0.0)


def logs_in(part: tuple[bytes, ...] | None) -> HostLogs | None:
    """The logs of an answer's part, as a tenant reads them; None for an answer without logs."""
    if part is None:
        return None
    values = json.loads(b"{" + b"".join(part)[1:] + b"}")
    uefi = values.pop("mb_measurement_list", None)
    read = HostLogs(
        ima=values.pop("ima_measurement_list", None),
        ima_entry=values.pop("ima_measurement_list_entry", 0),
        uefi=None if uefi is None else base64.b64decode(uefi, validate=True),
        ima_missing=values.pop("ima_measurement_list_missing", None),
        uefi_missing=values.pop("mb_measurement_list_missing", None),
    )
    assert not values
    return read


def make_evidence(tpm: SoftTpm, request: QuoteRequest) -> bytes:
    """The body of a good answer."""
    return b"".join(make_answer(tpm, request).body())


class Asker:
    """A tenant: makes challenges, remembers, verifies what comes back."""

    def __init__(self, ak: AttestationKey, policy: Policy | None = None) -> None:
        self.host = TrustedHost(ak=ak)
        self.history = MemoryHistory()
        self._verifier = Verifier(policy or UnsafeAcceptAny())

    def challenge(
        self, mask: int = MASK, *, bank: HashAlg = HashAlg.SHA256, timeout_ms: int | None = None
    ) -> Challenge:
        return new_challenge(
            mask=mask,
            now_s=time.monotonic(),
            history=self.history,
            bank=bank,
            timeout_ms=timeout_ms,
        )

    def verify(self, body: bytes, challenge: Challenge) -> VerifiedQuote:
        return self._verifier.verify(
            body, challenge, self.host, self.history, now_s=time.monotonic()
        )


def quote_target(challenge: Challenge) -> str:
    """The target that asks for a challenge's quote."""
    return f"/verifier/quote?{encode_quote_query(challenge.request)}"


# --- a raw HTTP client ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A response as it came over the wire."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    head: bytes

    def header(self, name: str) -> str | None:
        """The one value of a header; None without it."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None

    @property
    def closes(self) -> bool:
        return (self.header("Connection") or "").lower() == "close"

    def envelope(self) -> dict[str, object]:
        """The body as Keylime's envelope; its code is the status."""
        values = json.loads(self.body)
        assert sorted(values) == ["code", "results", "status"]
        assert values["code"] == self.status
        return cast("dict[str, object]", values)

    def results(self) -> dict[str, object]:
        return cast("dict[str, object]", self.envelope()["results"])


class Wire:
    """A client's end of a connection: sends raw bytes, reads replies."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        with trio.fail_after(LIMIT_S):
            await self.stream.send_all(data)

    async def get(self, target: str) -> Reply:
        """One GET on this connection."""
        await self.send(get_bytes(target))
        return await self.reply()

    async def _more(self) -> bytes:
        data = bytes(await self.stream.receive_some(65536))
        self._buffer += data
        return data

    async def reply(self, *, to_head: bool = False) -> Reply:
        """The next response.

        Args:
            to_head: it answers a HEAD, so that no body follows.
        """
        with trio.fail_after(LIMIT_S):
            while b"\r\n\r\n" not in self._buffer:
                assert await self._more(), f"the connection ended with {self._buffer!r}"
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            lines = head.decode("ascii").split("\r\n")
            version, status, reason = lines[0].split(" ", 2)
            assert version == "HTTP/1.1"
            headers = tuple(
                (name, value.strip()) for name, _, value in (n.partition(":") for n in lines[1:])
            )
            partial = Reply(status=int(status), reason=reason, headers=headers, body=b"", head=head)
            length = 0 if to_head else int(partial.header("Content-Length") or 0)
            while len(self._buffer) < length:
                assert await self._more(), "the connection ended within a body"
            body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Reply(status=int(status), reason=reason, headers=headers, body=body, head=head)

    async def rest(self) -> bytes:
        """What comes until the other side closes."""
        with trio.fail_after(LIMIT_S):
            while await self._more():
                pass
        return self._buffer

    async def is_closed(self) -> bool:
        """True where nothing more comes before the end; waits for the end."""
        try:
            return await self.rest() == b""
        except trio.BrokenResourceError:
            return True


def get_bytes(target: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    """A request without body."""
    lines = (f"{method} {target} HTTP/{version}", "Host: localhost", *headers, "", "")
    return "\r\n".join(lines).encode("ascii")


@asynccontextmanager
async def connect(
    address: str, context: ssl.SSLContext | None = None, *, name: str = "localhost"
) -> AsyncIterator[Wire]:
    """Connect to "host:port", "[ipv6]:port" or "unix:/path"."""
    stream: trio.abc.Stream
    with trio.fail_after(LIMIT_S):
        if address.startswith("unix:"):
            stream = await trio.open_unix_socket(address[5:])
        else:
            host, _, port = address.rpartition(":")
            stream = await trio.open_tcp_stream(host.strip("[]"), int(port))
    if context is not None:
        stream = trio.SSLStream(stream, context, server_hostname=name, https_compatible=True)
    try:
        yield Wire(stream)
    finally:
        await trio.aclose_forcefully(stream)


@asynccontextmanager
async def server_on_port(
    server: HttpServer, context: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server on a port of loopback; gives its address."""
    (listener,) = open_listeners("a test", ["127.0.0.1:0"], context)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, server.serve)
        yield describe([listener])[0]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(server: HttpServer) -> AsyncIterator[Wire]:
    """A client on one end of a pair of unix sockets, a server on the other: no delay of a network's, so
    that it fits the autojump clock."""
    ours, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, SocketStream(theirs))
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            yield Wire(stream)
        nursery.cancel_scope.cancel()


async def get(address: str, target: str, context: ssl.SSLContext | None = None) -> Reply:
    """One GET on a connection of its own."""
    async with connect(address, context) as wire:
        return await wire.get(target)


async def quote_over(wire: Wire, asker: Asker, mask: int = MASK) -> VerifiedQuote:
    """Ask for a quote and verify it."""
    challenge = asker.challenge(mask)
    reply = await wire.get(quote_target(challenge))
    assert reply.status == 200, reply.body
    return asker.verify(reply.body, challenge)


async def trusted_ak(address: str, context: ssl.SSLContext | None = None) -> AttestationKey:
    """The AK that a server names: trust on first use, which is good enough for a test."""
    results = (await get(address, "/verifier/identity", context)).results()
    return parse_ak(base64.b64decode(cast(str, results["ak_tpm"])))


# --- TLS --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Certs:
    """Files of a server's TLS, and contexts for its clients."""

    ca: trustme.CA
    ca_file: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path

    def client(self, *, with_cert: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if with_cert:
            context.load_cert_chain(self.client_cert, self.client_key)
        return context

    def toml(self) -> str:
        """The `[listen]` keys of a server that demands clients' certificates."""
        return f'tls_cert = "{self.cert}"\ntls_key = "{self.key}"\nclient_ca = "{self.ca_file}"\n'


def make_certs(folder: Path) -> Certs:
    """A CA, a server's certificate for localhost and a client's."""
    ca = trustme.CA()
    server = ca.issue_cert("localhost", "127.0.0.1", "::1")
    client = ca.issue_cert("tenant@example.org", common_name="tenant")
    files = Certs(
        ca=ca,
        ca_file=folder / "ca.pem",
        cert=folder / "cert.pem",
        key=folder / "key.pem",
        client_cert=folder / "client.pem",
        client_key=folder / "client-key.pem",
    )
    ca.cert_pem.write_to_path(str(files.ca_file))
    server.cert_chain_pems[0].write_to_path(str(files.cert))
    client.cert_chain_pems[0].write_to_path(str(files.client_cert))
    for path, leaf in ((files.key, server), (files.client_key, client)):
        path.touch(mode=0o600)
        leaf.private_key_pem.write_to_path(str(path))
    return files


# --- the daemon -------------------------------------------------------------------------------------


@asynccontextmanager
async def daemon_with(quoter: FakeQuoter, config: Config) -> AsyncIterator[Started]:
    """The daemon in this very process, over a fake quoter."""
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[Started]) -> None:
            await daemon.run(config, open_quoter=open_fake(quoter), task_status=task_status)

        thresholds = gc.get_threshold()
        try:
            with trio.fail_after(LIMIT_S):
                started: Started = await nursery.start(serve)
            yield started
        finally:
            nursery.cancel_scope.cancel()
            gc.unfreeze()  # the daemon tunes it for a process of its own
            gc.set_threshold(*thresholds)


def plain_toml(state_dir: Path, *, tables: str = "", listen: str = "127.0.0.1:0") -> str:
    """A configuration on loopback, plaintext, with an embedded TPM."""
    return (
        f'state_dir = "{state_dir}"\n'
        f'[listen]\naddress = "{listen}"\ninsecure_plaintext = true\n'
        f'[tpm]\ntcti = "embedded"\n{NO_LOGS}{tables}'
    )


class NotifySocket:
    """Stands in for the service manager: what `sd_notify` sends to.

    Attributes:
        alive: how often the watchdog was heard.
        status: the lines for `systemctl status`, and when they came (monotonic).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.alive = 0
        self.status: list[tuple[str, float]] = []
        self.sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    async def open(self) -> None:
        await self.sock.bind(str(self.path))

    async def next(self) -> str:
        """The next message; the watchdog's and the status lines are counted, and left out."""
        with trio.fail_after(LIMIT_S):
            while True:
                message = (await self.sock.recv(4096)).decode("utf-8")
                if message == "WATCHDOG=1":
                    self.alive += 1
                elif message.startswith("STATUS="):
                    self.status.append((message.removeprefix("STATUS="), time.monotonic()))
                else:
                    return message

    async def ping(self) -> None:
        """Wait for the watchdog's next message; nothing but status lines may come before it."""
        while True:
            message = (await self.sock.recv(4096)).decode("utf-8")
            if message == "WATCHDOG=1":
                return
            assert message.startswith("STATUS="), message


@dataclass(slots=True, kw_only=True)
class Serving:
    """A `provider-proxy serve` that runs."""

    process: trio.Process
    notify: NotifySocket
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def addresses(self) -> list[str]:
        return re.findall(r"\blistening on ([^\s\"]+)", self.log)

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def admin(self) -> str:
        return str(re.findall(r"\badmin API on ([^\s\"]+)", self.log)[0])

    @property
    def swtpm(self) -> int:
        (pid,) = children_of(self.process.pid)
        return pid

    async def wait(self) -> int:
        """The exit code."""
        with trio.fail_after(LIMIT_S):
            return await self.process.wait()

    async def stop(self, number: int) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        return await self.wait()


def command(*words: str | Path) -> list[str]:
    """The command line of `provider-proxy`."""
    return [sys.executable, "-m", "provider_proxy", *map(str, words)]


def run_command(
    *words: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `provider-proxy` to its end."""
    return subprocess.run(
        command(*words),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def run_here(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which is faster; for synchronous tests."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    sys.argv = ["provider-proxy", *map(str, words)]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else -1
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


@asynccontextmanager
async def serving(
    folder: Path,
    toml: str,
    *,
    launcher: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    lazy: bool = False,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Serving]:
    """Run the real daemon until the block ends; it has said READY.

    Args:
        folder: for its configuration, its log and the notification socket; short paths only.
        launcher: a command that starts the daemon's.
        pass_fds: file descriptors that it inherits.
        lazy: the launcher starts the daemon later; READY is not waited for.
    """
    config, notify, log_path = _files_of(folder, toml)
    await notify.open()
    with contextlib.ExitStack() as stack:
        stack.callback(notify.sock.close)
        log = stack.enter_context(log_path.open("wb"))
        process = await trio.lowlevel.open_process(
            [*launcher, *command("serve", "--config", config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=pass_fds,
            env={**os.environ, **(env or {}), "NOTIFY_SOCKET": str(notify.path)},
        )
        serve = Serving(process=process, notify=notify, log_path=log_path)
        try:
            if not lazy:
                await _until_ready(serve)
            yield serve
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


def _files_of(folder: Path, toml: str) -> tuple[Path, NotifySocket, Path]:
    stem = f"d{len(list(folder.glob('*.toml')))}"
    config = folder / f"{stem}.toml"
    config.write_text(toml)
    return config, NotifySocket(folder / f"{stem}.notify"), folder / f"{stem}.log"


async def _until_ready(serve: Serving) -> None:
    async with trio.open_nursery() as nursery:

        async def died() -> None:
            code = await serve.process.wait()
            raise AssertionError(f"the daemon ended with {code}: {serve.log}")

        nursery.start_soon(died)
        assert await serve.notify.next() == "READY=1"
        nursery.cancel_scope.cancel()


@contextlib.contextmanager
def listening_socket() -> Iterator[tuple[socket.socket, int]]:
    """A TCP port of 127.0.0.1 that is taken."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock, sock.getsockname()[1]


EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A TCP port that nobody has, in neither family, and that nobody gets by asking for any port.

    A port that the kernel handed out is in its range for outgoing connections: one of another test's
    may take it before the program that it is for does.
    """
    first_ephemeral = int(EPHEMERAL.read_text().split()[0])
    for _ in range(1000):
        port = secrets.randbelow(first_ephemeral - 10_000) + 10_000
        with contextlib.ExitStack() as stack:
            try:
                for family, any_address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
                    sock = stack.enter_context(socket.socket(family))
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    sock.bind((any_address, port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port was found")
