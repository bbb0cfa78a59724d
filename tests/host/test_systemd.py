"""systemd's protocols: notification over real sockets, socket activation of real processes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    LIMIT_S,
    Asker,
    Certs,
    command,
    connect,
    free_port,
    get_bytes,
    is_alive,
    make_certs,
    plain_toml,
    quote_over,
    serving,
    trusted_ak,
    until,
)

from provider_proxy.common import systemd

SO_ACCEPTCON = 1 << 16  # the flag of a listening socket in /proc/net/unix: proc(5)

# --- notification -----------------------------------------------------------------------------------


@contextlib.contextmanager
def notify_socket(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(LIMIT_S)
        yield sock


def test_notify_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with notify_socket(path) as sock:
        systemd.notify("READY=1")
        systemd.notify("STOPPING=1\nSTATUS=drän")
        assert sock.recv(100) == b"READY=1"
        assert sock.recv(100) == "STOPPING=1\nSTATUS=drän".encode()


def _hangs(*_: object) -> None:
    raise AssertionError("it waits for a manager that does not read")


def test_a_manager_that_does_not_read_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with notify_socket(path) as sock:
        unread = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 2
        before = signal.signal(signal.SIGALRM, _hangs)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            for number in range(unread):
                systemd.notify_status(f"{number}")
            systemd.notify("WATCHDOG=1", limit_s=0)
            systemd.notify("STOPPING=1", limit_s=0.01)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert sock.recv(100) == b"STATUS=0"


def test_notify_by_abstract_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"provider-proxy-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
    with notify_socket("\0" + name) as sock:
        systemd.notify("READY=1")
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "value", [None, "", "relative", "vsock:2:1234", "/none/there", "@none-there"]
)
def test_without_a_manager_it_is_silent(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    systemd.notify("READY=1")


# --- activation -------------------------------------------------------------------------------------

# Stands in for the service manager: puts file descriptors where sd_listen_fds(3) says they are.
ACTIVATE = """
import fcntl, os, sys
fds, pid, count, *command = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds.split(",") if fd]
for fd in fds.split(","):
    os.close(int(fd))
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place, inheritable=True)
os.environ["LISTEN_PID"] = pid.replace("SELF", str(os.getpid()))
os.environ["LISTEN_FDS"] = count
os.environ["LISTEN_FDNAMES"] = "server"
os.execv(command[0], command)
"""
# What it starts: takes the sockets and tells about them.
TELL = """
import json, os, subprocess, sys
from provider_proxy.common.systemd import take_listen_sockets
sockets = take_listen_sockets()
child = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
print(json.dumps({
    "names": [s.getsockname() for s in sockets],
    "fds": [s.fileno() for s in sockets],
    "sockets_in_child": child.stdout.count("socket:"),
    "environ": sorted(key for key in os.environ if key.startswith("LISTEN_")),
    "again": len(take_listen_sockets()),
}))
"""


def emulated(
    fds: Sequence[int], words: Sequence[str], *, pid: str = "SELF", count: str | None = None
) -> list[str]:
    """A command line that starts `words` as a service manager would."""
    listed = ",".join(map(str, fds))
    number = str(len(fds)) if count is None else count
    return [sys.executable, "-c", ACTIVATE, listed, pid, number, *words]


def tell(sockets: Sequence[socket.socket], **kwargs: Any) -> dict[str, Any]:
    fds = [sock.fileno() for sock in sockets]
    done = subprocess.run(
        emulated(fds, [sys.executable, "-c", TELL], **kwargs),
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[list[socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(str(tmp_path / "server"))
        unix.listen()
        yield [tcp, unix]


def test_sockets_are_taken_in_their_order(sockets: list[socket.socket], tmp_path: Path) -> None:
    told = tell(sockets)
    assert told["names"] == [list(sockets[0].getsockname()), str(tmp_path / "server")]
    assert told["fds"] == [3, 4]
    assert told["environ"] == []  # a child must not take them for its own
    assert told["sockets_in_child"] == 0  # nor get them
    assert told["again"] == 0


@pytest.mark.parametrize("pid", ["", "1", "SELF0", "-1", "x"])
def test_sockets_of_another_process_are_left(sockets: list[socket.socket], pid: str) -> None:
    told = tell(sockets, pid=pid)
    assert told["names"] == []
    assert told["environ"] == []


@pytest.mark.parametrize("count", ["", "0", "-1", "x", "1.0", "\u0661"])
def test_a_count_that_is_none(sockets: list[socket.socket], count: str) -> None:
    assert tell(sockets, count=count)["names"] == []


def test_without_a_manager_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert systemd.take_listen_sockets() == []


# --- the daemon on sockets of systemd's -------------------------------------------------------------


def inherited(sock: socket.socket) -> tuple[list[str], tuple[int, ...]]:
    """A launcher that hands over one socket, and the file descriptors that it needs itself."""
    return emulated([sock.fileno()], []), (sock.fileno(),)


def run_inherited(
    sock: socket.socket, config: Path, *, name: str = "server"
) -> subprocess.CompletedProcess[str]:
    """Run the daemon on a socket that it will refuse."""
    launcher, fds = inherited(sock)
    launcher = [word.replace('"server"', f'"{name}"') for word in launcher]
    return subprocess.run(
        [*launcher, *command("serve", "--config", config)],
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    return make_certs(tmp_path_factory.mktemp("certs"))


@pytest.mark.real
async def test_an_inherited_unix_socket_is_served_and_left(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        launcher, fds = inherited(sock)
        toml = plain_toml(tmp_path / "s")
        async with serving(tmp_path, toml, launcher=launcher, pass_fds=fds) as serve:
            assert serve.addresses == [f"unix:{path}"]  # and not the configured one
            asker = Asker(await trusted_ak(f"unix:{path}"))
            async with connect(f"unix:{path}") as wire:
                await quote_over(wire, asker)
            assert await serve.stop(signal.SIGTERM) == 0
    assert path.is_socket()


@pytest.mark.real
async def test_inherited_sockets_speak_tls_where_it_is_set(tmp_path: Path, certs: Certs) -> None:
    toml = f'state_dir = "{tmp_path / "s"}"\n[listen]\n{certs.toml()}[tpm]\ntcti = "embedded"\n'
    with socket.create_server(("127.0.0.1", 0)) as sock:
        launcher, fds = inherited(sock)
        async with serving(tmp_path, toml, launcher=launcher, pass_fds=fds) as serve:
            address = "{}:{}".format(*sock.getsockname())
            assert serve.addresses == [address]
            client = certs.client(with_cert=True)
            asker = Asker(await trusted_ak(address, client))
            async with connect(address, client) as wire:
                await quote_over(wire, asker)


def listens(path: Path) -> bool:
    """True where a unix socket listens; asked of the kernel, for a connection would count."""
    fields = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(line[-1] == str(path) and int(line[3], 16) & SO_ACCEPTCON for line in fields[1:])


@pytest.mark.real
async def test_started_by_the_first_connection(tmp_path: Path) -> None:
    """By systemd's own tool, which waits with the sockets and hands them over."""
    path, port = tmp_path / "server", free_port()
    listen = ["-l", str(path), "-l", f"127.0.0.1:{port}", "--fdname=server:more"]
    launcher = ["systemd-socket-activate", "-E", "NOTIFY_SOCKET", *listen]
    toml = plain_toml(tmp_path / "s")
    async with serving(tmp_path, toml, launcher=launcher, lazy=True) as serve:
        await until(lambda: listens(path), "the socket")
        async with connect(f"unix:{path}") as wire:
            assert (await wire.get("/version")).status == 200  # it waited for the daemon
            assert await serve.notify.next() == "READY=1"
            assert serve.addresses == [f"unix:{path}", f"127.0.0.1:{port}"]
            asker = Asker(await trusted_ak(f"127.0.0.1:{port}"))
            await quote_over(wire, asker)
            async with connect(f"127.0.0.1:{port}") as other:
                await quote_over(other, asker)
        assert await serve.stop(signal.SIGTERM) == 0
        assert await serve.notify.next() == "STOPPING=1"
    assert path.is_socket()


@pytest.mark.real
async def test_a_front_s_socket_by_its_name(tmp_path: Path, certs: Certs) -> None:
    """It takes certificates in headers; the other one does not."""
    front, port = tmp_path / "front.sock", free_port()
    listen = ["-l", str(front), "-l", f"127.0.0.1:{port}", "--fdname=front:provider-proxy.socket"]
    launcher = ["systemd-socket-activate", "-E", "NOTIFY_SOCKET", *listen]
    der = ssl.PEM_cert_to_DER_cert(certs.client_cert.read_text())
    header = f"Client-Cert: :{base64.b64encode(der).decode()}:"
    keys = f'front = "unix:{tmp_path}/elsewhere"\nfront_peers = ["uid:{os.geteuid()}"]\n'
    toml = plain_toml(tmp_path / "s").replace("insecure_plaintext = true\n", certs.toml() + keys)
    async with serving(tmp_path, toml, launcher=launcher, lazy=True) as serve:
        await until(lambda: listens(front), "the socket")
        async with connect(f"unix:{front}") as wire:
            await wire.send(get_bytes("/version", header))
            assert (await wire.reply()).status == 200
        assert await serve.notify.next() == "READY=1"
        async with connect(f"unix:{front}") as wire:
            assert (await wire.get("/version")).status == 400
        async with connect(f"localhost:{port}", certs.client(with_cert=True)) as wire:
            assert (await wire.get("/version")).status == 200
        assert await serve.stop(signal.SIGTERM) == 0
    assert front.is_socket()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.real
def test_a_front_s_socket_needs_a_front(tmp_path: Path) -> None:
    """A name alone makes nobody a front."""
    config = tmp_path / "c.toml"
    config.write_text(plain_toml(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "x"))
        sock.listen()
        done = run_inherited(sock, config, name="front")
    assert done.returncode == 2
    assert "listen.front is not set" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
async def test_a_reload_is_told_with_its_time(tmp_path: Path) -> None:
    """As Type=notify-reload demands: RELOADING with the clock's time, then READY."""
    async with serving(tmp_path, plain_toml(tmp_path / "s")) as serve:
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        serve.process.send_signal(signal.SIGHUP)
        first, _, second = (await serve.notify.next()).partition("\n")
        assert first == "RELOADING=1"
        name, _, usec = second.partition("=")
        assert name == "MONOTONIC_USEC"
        assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert await serve.notify.next() == "READY=1"


@pytest.mark.real
def test_no_plaintext_on_an_inherited_socket_that_others_reach(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(plain_toml(tmp_path / "s"))
    with socket.create_server(("0.0.0.0", 0)) as sock:
        done = run_inherited(sock, config)
    assert done.returncode == 2
    assert "listen.insecure_plaintext is for loopback and unix sockets only" in done.stderr
    assert "0.0.0.0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
def test_a_connection_in_place_of_a_listener_is_refused(tmp_path: Path) -> None:
    """What systemd hands over with Accept=yes."""
    config = tmp_path / "c.toml"
    config.write_text(plain_toml(tmp_path / "s"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = run_inherited(theirs, config)
    assert done.returncode == 2
    assert "Accept=no" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("file", "is not a socket: the .socket unit may have only ListenStream="),
        (
            "datagram",
            "cannot use: the .socket unit must have ListenStream=",
        ),
        ("pipe", "is not a socket"),
    ],
)
def test_what_is_no_listening_socket_is_refused(tmp_path: Path, kind: str, words: str) -> None:
    """ListenFIFO=, ListenSpecial= and ListenDatagram= in the .socket unit."""
    config = tmp_path / "c.toml"
    config.write_text(plain_toml(tmp_path / "s"))
    with contextlib.ExitStack() as stack:
        held: Any
        if kind == "file":
            held = stack.enter_context(config.open("rb"))
        elif kind == "pipe":
            read, write = os.pipe()
            held = stack.enter_context(os.fdopen(read, "rb"))
            stack.enter_context(os.fdopen(write, "wb"))
        else:
            held = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        done = run_inherited(held, config)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real
async def test_a_unix_socket_of_our_own_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "server"
    toml = plain_toml(tmp_path / "s", listen=f"unix:{path}")
    async with serving(tmp_path, toml) as serve:
        asker = Asker(await trusted_ak(f"unix:{path}"))
        async with connect(f"unix:{path}") as wire:
            await quote_over(wire, asker)
        assert await serve.stop(signal.SIGTERM) == 0
    assert path.name not in os.listdir(tmp_path)


@pytest.mark.real
async def test_what_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server"
    toml = plain_toml(tmp_path / "s", listen=f"unix:{path}")
    async with serving(tmp_path, toml) as serve:
        swtpm = serve.swtpm
        assert await serve.stop(signal.SIGKILL) == -signal.SIGKILL
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    await until(lambda: not is_alive(swtpm), "the end of its swtpm")
    async with serving(tmp_path, toml), connect(f"unix:{path}") as wire:
        assert (await wire.get("/version")).status == 200
