"""The real daemon, `provider-proxy serve`, as a subprocess over an embedded swtpm."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from helpers import (
    LIMIT_S,
    NO_LOGS,
    Asker,
    Certs,
    Reply,
    Serving,
    Wire,
    connect,
    get,
    get_bytes,
    is_alive,
    listening_socket,
    make_certs,
    plain_toml,
    quote_over,
    quote_target,
    run_command,
    serving,
    trusted_ak,
    until,
    until_answered,
)

from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.verify import Challenge
from provider_proxy.evidence.wire import parse_evidence
from provider_proxy.host.tpm.embedded import EmbeddedTpm

pytestmark = pytest.mark.real

ADMIN = '[admin]\naddress = "127.0.0.1:0"\n'
SOON = "[batch]\nwindow_ms = 1\n"
LATE = "[batch]\nwindow_ms = 20000\n"  # longer than any wait of a test: only a drain seals


@asynccontextmanager
async def tenants(serve: Serving, count: int) -> AsyncIterator[tuple[Asker, list[Wire]]]:
    """One asker, and so many connections."""
    asker = Asker(await trusted_ak(serve.address))
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connect(serve.address)) for _ in range(count)]
        yield asker, wires


async def send(wire: Wire, asker: Asker, mask: int = 1, timeout_ms: int | None = None) -> Challenge:
    """Ask, and do not wait for the answer."""
    challenge = asker.challenge(mask, timeout_ms=timeout_ms)
    await wire.send(get_bytes(quote_target(challenge)))
    return challenge


async def metric(serve: Serving, name: str) -> float:
    text = (await get(serve.admin, "/metrics")).body.decode()
    (line,) = [n for n in text.splitlines() if n.startswith(f"provider_proxy_{name} ")]
    return float(line.split()[1])


async def until_waiting(serve: Serving, count: int) -> None:
    """So many requests wait for a batch."""

    async def waiting() -> bool:
        return await metric(serve, "queue") == count

    await until_answered(waiting, f"{count} requests in the queue")


async def until_served(wire: Wire, asker: Asker) -> None:
    """Quotes are answered (again)."""

    async def served() -> bool:
        return (await wire.get(quote_target(asker.challenge()))).status == 200

    await until_answered(served, "a quote")


def check_error(reply: Reply, *statuses: int) -> None:
    assert reply.status in statuses, reply.body
    assert reply.envelope()["results"] == {}
    assert reply.header("Content-Type") == "application/json"


# --- serving ----------------------------------------------------------------------------------------


async def test_fetch_and_verify_and_again_after_a_restart(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON + ADMIN)
    seen = []
    for _ in range(2):
        async with serving(tmp_path, toml) as serve:
            identity = (await get(serve.address, "/verifier/identity")).results()
            asker = Asker(await trusted_ak(serve.address))
            assert identity["ak_name"] == asker.host.ak.name.hex()
            assert identity["software"] is True
            async with connect(serve.address) as wire:
                for mask in (0x1, 0xFF, 0xFFFFFF & ~(1 << 10)):
                    quote = await quote_over(wire, asker, mask)
                    assert sum(1 << pcr for pcr in quote.pcrs) == mask
            seen.append((identity["ak_name"], identity["host_uuid"], identity["ek_tpm"]))
            resets = quote.clock.reset_count
            assert (await get(serve.admin, "/healthz")).status == 200
            assert (await get(serve.admin, "/readyz")).status == 200
            assert await metric(serve, "selfcheck_failures_total") == 0
            assert (await get(serve.address, "/metrics")).status == 404
            assert await serve.stop(signal.SIGTERM) == 0
            assert await serve.notify.next() == "STOPPING=1"
            assert "Traceback" not in serve.log
    assert seen[0] == seen[1]
    assert resets >= 1


async def test_many_tenants_share_a_batch(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=ADMIN + "[batch]\nwindow_ms = 500\nmax_leaves = 20\n")
    async with serving(tmp_path, toml) as serve, tenants(serve, 20) as (asker, wires):
        challenges = [await send(wire, asker) for wire in wires]
        quotes = set()
        for wire, challenge in zip(wires, challenges, strict=True):
            reply = await wire.reply()
            asker.verify(reply.body, challenge)
            quotes.add(str(reply.results()["quote"]))
        assert len(quotes) == 1
        assert await metric(serve, "batch_leaves_sum") == 20


async def test_banks_and_logs_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "ima").write_text("10 line one\n10 line two\n")
    (tmp_path / "uefi").write_bytes(b"Spec ID Event03")
    toml = plain_toml(tmp_path / "s").replace(
        NO_LOGS,
        f'banks = ["sha256", "sha1"]\ninsecure_sha1_bank = true\n'
        f'[logs]\nima = "{tmp_path}/ima"\nuefi = "{tmp_path}/uefi"\n',
    )
    toml += f"{SOON}[tenant_defaults]\npcr_allow = {list(range(24))}\n"
    async with serving(tmp_path, toml) as serve, tenants(serve, 1) as (asker, (wire,)):
        challenge = asker.challenge(0x401, bank=HashAlg.SHA1)
        reply = await wire.get(quote_target(challenge) + "&ima_ml_entry=1")
        assert reply.status == 200, reply.body
        assert asker.verify(reply.body, challenge).bank is HashAlg.SHA1
        logs = parse_evidence(reply.body).logs
        assert (logs.ima, logs.ima_entry, logs.uefi) == ("10 line two\n", 1, b"Spec ID Event03")
        refused = await wire.get(quote_target(asker.challenge(1, bank=HashAlg.SHA384)))
        assert refused.results() == {"parameter": "bank"}


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    toml = tls_toml(tmp_path, certs)
    async with serving(tmp_path, toml) as serve:
        client = certs.client(with_cert=True)
        asker = Asker(await trusted_ak(serve.address, client))
        async with connect(serve.address, client) as wire:
            for _ in range(3):
                await quote_over(wire, asker)
        async with connect(serve.address, certs.client()) as stranger:
            try:
                await stranger.send(get_bytes("/version"))
                answer = await stranger.rest()
            except trio.BrokenResourceError:
                answer = b""
            assert answer == b""
        assert await serve.stop(signal.SIGTERM) == 0
        assert "Traceback" not in serve.log


def tls_toml(folder: Path, certs: Certs) -> str:
    return (
        f'state_dir = "{folder / "s"}"\n[listen]\naddress = "127.0.0.1:0"\n{certs.toml()}'
        f'[tpm]\ntcti = "embedded"\n{NO_LOGS}{SOON}'
    )


GARBAGE = (
    b"",
    b"\x00" * 100,
    b"\x16\x03\x01\x02\x00\x01",
    b"GET /verifier/quote?nonce=",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1000,
    b"POST /verifier/quote HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc",
    get_bytes("/version") * 20,
    b"\r\n" * 100,
)


async def test_a_good_tenant_among_garbage(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON)
    async with serving(tmp_path, toml) as serve, AsyncExitStack() as stack:
        asker = Asker(await trusted_ak(serve.address))
        for number in range(200):
            wire = await stack.enter_async_context(connect(serve.address))
            await wire.send(GARBAGE[number % len(GARBAGE)])
        async with connect(serve.address) as good:
            for _ in range(5):
                with trio.fail_after(5):
                    await quote_over(good, asker)
        assert "Traceback" not in serve.log


async def test_the_log_holds_no_secret(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON)
    async with serving(tmp_path, toml) as serve, tenants(serve, 1) as (asker, (wire,)):
        challenge = await send(wire, asker)
        assert (await wire.reply()).status == 200
        await wire.get("/verifier/quote?nonce=s3cret-s3cret-s3cret&mask=7")
        assert await serve.stop(signal.SIGTERM) == 0
        auth = json.loads(read_text(tmp_path / "s" / "ak.json"))["auth"]
        for secret in (challenge.request.nonce.decode(), "s3cret", auth):
            assert secret not in serve.log
        assert "batch=1 leaves=1 " in serve.log  # one line a batch


def read_text(path: Path) -> str:
    return path.read_text()


async def test_the_watchdog_is_heard(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s")
    async with serving(tmp_path, toml, env={"WATCHDOG_USEC": "100000"}) as serve:
        before = time.monotonic()
        with trio.fail_after(LIMIT_S):
            for _ in range(5):
                await serve.notify.ping()
        assert time.monotonic() - before < 2  # several times in each 100 ms that systemd waits


# --- starting ---------------------------------------------------------------------------------------


def fails(
    folder: Path, toml: str, code: int, *words: str, env: dict[str, str] | None = None
) -> None:
    """`serve` ends with this exit code and these words."""
    (folder / "c.toml").write_text(toml)
    done = run_command("serve", "--config", folder / "c.toml", env=env)
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tcti", ["device:/nonexistent/tpm", "swtpm:path=/nonexistent", "nonsense"])
def test_no_tpm(tmp_path: Path, tcti: str) -> None:
    toml = plain_toml(tmp_path / "s").replace('"embedded"', f'"{tcti}"')
    fails(tmp_path, toml, 3, "cannot open the TPM", tcti)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with listening_socket() as (_, port):
        address = f"127.0.0.1:{port}"
        fails(
            tmp_path,
            plain_toml(tmp_path / "s", listen=address),
            3,
            "listen.address",
            address,
            "in use",
        )
        admin = f'[admin]\naddress = "{address}"\n'
        fails(
            tmp_path,
            plain_toml(tmp_path / "s", tables=admin),
            3,
            "admin.address",
            address,
            "in use",
        )


def test_a_missing_key_file(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    certs.key.unlink()
    fails(tmp_path, tls_toml(tmp_path, certs), 3, "listen.tls_key", str(certs.key))
    assert not (tmp_path / "s").exists()  # said before the TPM is touched


def test_a_key_file_for_everybody(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    certs.key.chmod(0o644)
    fails(
        tmp_path, tls_toml(tmp_path, certs), 3, "listen.tls_key", "must not be readable by others"
    )


def test_a_secret_for_everybody(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text("x")
    (tmp_path / "auth").chmod(0o644)
    toml = plain_toml(tmp_path / "s").replace(
        '"embedded"\n', f'"embedded"\nowner_auth_file = "{tmp_path}/auth"\n'
    )
    fails(tmp_path, toml, 3, "tpm.owner_auth_file")


def test_no_swtpm(tmp_path: Path) -> None:
    fails(tmp_path, plain_toml(tmp_path / "s"), 3, "apt install swtpm", env={"PATH": str(tmp_path)})


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"")
    fails(tmp_path, plain_toml(tmp_path / "s"), 3, str(tmp_path / "s"))


def test_a_missing_place_for_a_unix_socket(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", listen=f"unix:{tmp_path}/none/server")
    fails(tmp_path, toml, 3, "listen.address", f"unix:{tmp_path}/none/server")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[batch]\nwindow_ms = -1\n", "batch.window_ms must be >= 0"),
        ("[batch]\nwindow = 1\n", "batch.window is not a key"),
        ("[limits]\nmax_timeout_ms = 1\n", "limits.default_timeout_ms must be <= "),
        ("[batch\n", "c.toml"),
    ],
)
def test_a_bad_configuration(tmp_path: Path, table: str, message: str) -> None:
    fails(tmp_path, plain_toml(tmp_path / "s", tables=table), 2, message)
    assert not (tmp_path / "s").exists()


async def test_two_daemons_on_one_state(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON)
    async with serving(tmp_path, toml) as serve:
        await trio.to_thread.run_sync(fails, tmp_path, toml, 3, "swtpm did not start")
        async with connect(serve.address) as wire:
            await quote_over(wire, Asker(await trusted_ak(serve.address)))


async def test_a_failed_start_leaves_no_process(tmp_path: Path) -> None:
    with listening_socket() as (_, port):
        toml = plain_toml(tmp_path / "s", listen=f"127.0.0.1:{port}")
        await trio.to_thread.run_sync(fails, tmp_path, toml, 3, "in use")
    async with serving(tmp_path, plain_toml(tmp_path / "s")):
        pass  # the state is free


# --- stopping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_who_waits_at_a_signal_is_answered(tmp_path: Path, number: int) -> None:
    toml = plain_toml(tmp_path / "s", tables=ADMIN + LATE)
    async with serving(tmp_path, toml) as serve, tenants(serve, 8) as (asker, wires):
        asked = [
            (wire, await send(wire, asker, mask))
            for wire, mask in zip(wires, [0x1] * 5 + [0x10001] * 3, strict=True)  # two batches
        ]
        await until_waiting(serve, 8)
        swtpm = serve.swtpm
        serve.process.send_signal(number)
        for wire, challenge in asked:
            reply = await wire.reply()
            assert reply.status == 200, reply.body
            asker.verify(reply.body, challenge)
        assert await serve.wait() == 0
        assert await serve.notify.next() == "STOPPING=1"
        assert "Traceback" not in serve.log
        assert not is_alive(swtpm)


async def test_a_new_request_during_the_drain_is_turned_away(tmp_path: Path) -> None:
    """The chip is held still, so that the drain lasts for as long as the test looks at it."""
    toml = plain_toml(tmp_path / "s", tables=ADMIN + LATE)
    async with serving(tmp_path, toml) as serve, tenants(serve, 2) as (asker, (first, kept)):
        assert (await kept.get("/version")).status == 200
        swtpm = serve.swtpm
        os.kill(swtpm, signal.SIGSTOP)
        try:
            challenge = await send(first, asker)
            await until_waiting(serve, 1)
            serve.process.send_signal(signal.SIGTERM)
            assert await serve.notify.next() == "STOPPING=1"
            refused = await kept.get(quote_target(asker.challenge()))
            check_error(refused, 503)
            assert refused.closes
            assert await kept.is_closed()
            ready = await get(serve.admin, "/readyz")
            assert (ready.status, ready.envelope()["status"]) == (503, "draining")
            async with connect(serve.address) as late:
                refused = await late.get(quote_target(asker.challenge()))
                check_error(refused, 503)
                assert refused.closes
        finally:
            os.kill(swtpm, signal.SIGCONT)
        reply = await first.reply()
        assert reply.status == 200
        asker.verify(reply.body, challenge)
        assert await serve.wait() == 0
        await until(lambda: not is_alive(swtpm), "the swtpm's end")


async def test_a_drain_has_an_end(tmp_path: Path) -> None:
    """A chip that does not answer: waiting requests are refused after drain_ms, and the daemon ends."""
    tables = f"{ADMIN}{LATE}[limits]\ndrain_ms = 200\n"
    async with serving(tmp_path, plain_toml(tmp_path / "s", tables=tables)) as serve:
        async with tenants(serve, 4) as (asker, wires):
            swtpm = serve.swtpm
            os.kill(swtpm, signal.SIGSTOP)
            try:
                for wire, mask in zip(wires, (0x1, 0x1, 0x10001, 0x10001), strict=True):
                    await send(wire, asker, mask)  # the first two are sealed, the others never
                await until_waiting(serve, 4)
                serve.process.send_signal(signal.SIGTERM)
                for wire in wires:
                    reply = await wire.reply()
                    check_error(reply, 503)
                    assert reply.closes
            finally:
                os.kill(swtpm, signal.SIGCONT)
            assert await serve.wait() == 0
        assert "Traceback" not in serve.log


def kill(pid: int) -> None:
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)


async def test_idle_and_dawdling_clients_do_not_hold_up_a_stop(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, plain_toml(tmp_path / "s")) as serve,
        tenants(serve, 2) as (
            _,
            (idle, half),
        ),
    ):
        assert (await idle.get("/version")).status == 200
        await half.send(b"GET /version HTTP/1.1\r\nHost")
        before = time.monotonic()
        assert await serve.stop(signal.SIGTERM) == 0
        assert time.monotonic() - before < 10
        assert await idle.is_closed()


async def test_a_killed_daemon_takes_its_swtpm_along(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON)
    async with serving(tmp_path, toml) as serve:
        swtpm = serve.swtpm
        name = (await trusted_ak(serve.address)).name
        assert await serve.stop(signal.SIGKILL) == -signal.SIGKILL
        await until(lambda: not is_alive(swtpm), "the swtpm's end")
    async with serving(tmp_path, toml) as serve:  # its state is as good as before
        assert (await trusted_ak(serve.address)).name == name
        async with connect(serve.address) as wire:
            await quote_over(wire, Asker(await trusted_ak(serve.address)))


# --- a TPM in trouble -------------------------------------------------------------------------------


async def test_a_killed_embedded_tpm_comes_back(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON)
    async with serving(tmp_path, toml) as serve, tenants(serve, 10) as (asker, wires):
        await quote_over(wires[0], asker)
        swtpm = serve.swtpm
        os.kill(swtpm, signal.SIGKILL)
        asked = [(wire, await send(wire, asker)) for wire in wires]
        for wire, challenge in asked:
            reply = await wire.reply()
            if reply.status == 200:
                asker.verify(reply.body, challenge)
            else:
                check_error(reply, 503)
        await until_served(wires[0], asker)
        await quote_over(wires[0], asker)
        assert await serve.stop(signal.SIGTERM) == 0


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[EmbeddedTpm]:
    """A TPM that is not the daemon's child: nobody starts it again."""
    tpm = EmbeddedTpm(tmp_path / "chip")
    tpm.start()
    yield tpm
    tpm.stop()


async def test_a_tpm_that_is_gone(tmp_path: Path, chip: EmbeddedTpm) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON + ADMIN).replace("embedded", chip.tcti)
    async with serving(tmp_path, toml) as serve, tenants(serve, 10) as (asker, wires):
        await quote_over(wires[0], asker)
        assert chip.pid is not None
        os.kill(chip.pid, signal.SIGKILL)
        for _ in range(2):
            for wire in wires:
                await send(wire, asker)
            for wire in wires:
                reply = await wire.reply()
                check_error(reply, 503)
                assert int(reply.header("Retry-After") or 0) >= 1
        assert (await get(serve.address, "/version")).status == 200
        assert (await get(serve.admin, "/readyz")).status == 503
        assert (await get(serve.admin, "/healthz")).status == 200
        assert await serve.stop(signal.SIGTERM) == 0
        assert "Traceback" not in serve.log


async def test_a_hung_tpm_is_answered_with_504(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON + ADMIN)
    async with serving(tmp_path, toml) as serve, tenants(serve, 3) as (asker, wires):
        await quote_over(wires[0], asker)
        swtpm = serve.swtpm
        os.kill(swtpm, signal.SIGSTOP)
        try:
            for wire in wires:
                await send(wire, asker, timeout_ms=300)
            for wire in wires:
                check_error(await wire.reply(), 504)
            assert (await wires[0].get("/version")).status == 200  # the connection goes on
        finally:
            os.kill(swtpm, signal.SIGCONT)
        await until_served(wires[0], asker)
        await quote_over(wires[0], asker)  # and so does the chip
        assert await serve.stop(signal.SIGTERM) == 0


async def test_a_hung_tpm_does_not_keep_the_daemon_from_ending(tmp_path: Path) -> None:
    toml = plain_toml(tmp_path / "s", tables=SOON + "[limits]\ndrain_ms = 100\n")
    async with serving(tmp_path, toml) as serve, tenants(serve, 1) as (asker, (wire,)):
        swtpm = serve.swtpm
        os.kill(swtpm, signal.SIGSTOP)
        try:
            await send(wire, asker, timeout_ms=200)
            check_error(await wire.reply(), 504)
            assert await serve.stop(signal.SIGTERM) == 0
            await until(lambda: not is_alive(swtpm), "the swtpm's end")
        finally:
            kill(swtpm)


async def test_a_command_that_hangs_for_too_long_ends_the_process(tmp_path: Path) -> None:
    """A thread in a driver cannot be ended; systemd starts the process again."""
    toml = plain_toml(tmp_path / "s", tables=SOON)
    toml = toml.replace('"embedded"\n', '"embedded"\nhang_limit_s = 1\n')
    async with serving(tmp_path, toml) as serve, tenants(serve, 1) as (asker, (wire,)):
        swtpm = serve.swtpm
        os.kill(swtpm, signal.SIGSTOP)
        try:
            await send(wire, asker)
            assert await serve.wait() == 3
            assert "has not returned" in serve.log
        finally:
            kill(swtpm)
