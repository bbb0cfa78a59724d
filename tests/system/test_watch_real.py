"""The watcher as a whole: real daemons, a PCR that is extended, webhooks, restarts, TLS, signals."""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from docs_helpers import fenced
from helpers import connect, free_port, make_certs, until
from ima_helpers import HOST, text
from tpm_helpers import daemon_over, plain_config, swtpm_at, tool

from provider_proxy.cli import watch as cli_watch
from provider_proxy.cli.main import run as command
from provider_proxy.errors import HostError
from provider_proxy.host.config.tables import Listen, Logs, TenantRules
from provider_proxy.tenant.watch.config import load_watch_config
from provider_proxy.tenant.watch.reports import SIGNATURE_HEADER, TIMESTAMP_HEADER, sign
from provider_proxy.tenant.watch.states import State
from provider_proxy.tenant.watch.watcher import Watcher
from provider_proxy.testing.broker import Broker
from provider_proxy.trust.pins import PinStore

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
]

SECRET = "a shared secret of the tests"
ZERO = "00" * 32
ONCE = (sys.executable, "-m", "provider_proxy", "watch", "--once")
DETECTION_S = 1.0 + 0.2  # a requirement: one interval plus a second


class Lines:
    """Collects what the watcher writes."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def __call__(self, lines: bytes) -> None:
        self.reports += map(json.loads, lines.splitlines())

    def states(self) -> list[str]:
        return [r["state"] for r in self.reports if r["kind"] == "verdict"]


class Receiver:
    """A webhook's receiver on loopback; fails the first post, to be tried again."""

    def __init__(self) -> None:
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.port = 0

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._answer, listeners)

    async def _answer(self, stream: trio.SocketStream) -> None:
        data = b""
        while data.count(b"\r\n\r\n") < 1:
            data += await stream.receive_some(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.decode().split("\r\n")[1:])
        }
        while len(body) < int(headers["content-length"]):
            body += await stream.receive_some(65536)
        self.posts.append((headers, body))
        status = b"500 No" if len(self.posts) == 1 else b"204 Good"
        await stream.send_all(b"HTTP/1.1 %s\r\nConnection: close\r\n\r\n" % status)
        await stream.aclose()


async def pin(directory: Path, address: str, *, context: ssl.SSLContext | None = None) -> None:
    """Trust the AK that a daemon names, in the watcher's pins."""
    async with connect(address, context) as wire:
        results = (await wire.get("/verifier/identity")).results()
    PinStore(directory / "pins").pin("h", base64.b64decode(str(results["ak_tpm"])))


def write_config(directory: Path, address: str, *, host: str = "", more: str = "") -> Path:
    (directory / "policy.json").write_text(json.dumps({"0": [ZERO], "23": [ZERO]}))
    port = address.rpartition(":")[2]
    path = directory / "watch.toml"
    path.write_text(
        f"""
state_dir = "state"
pins = "pins"
save_interval_s = 0.05
[hosts.h]
provider_ip = "127.0.0.1"
provider_port = {port}
insecure_plaintext = true
interval_s = 0.2
max_retries = 1
retry_interval_s = 0.1
tpm_policy = "policy.json"
{host}
{more}
"""
    )
    return path


@asynccontextmanager
async def watching(path: Path, lines: Lines) -> AsyncIterator[Watcher]:
    """A running watcher; ends in order."""
    watcher = Watcher(load_watch_config(path), write=lines)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(watcher.run, partial(load_watch_config, path)))
        yield watcher
        os.kill(os.getpid(), signal.SIGTERM)


async def test_an_extended_pcr_is_told_of_in_time_and_by_webhook(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "secret").chmod(0o600)
    receiver, lines = Receiver(), Lines()
    with swtpm_at(tmp_path / "tpm") as chip, Broker(chip.tcti) as broker:
        async with (
            daemon_over(plain_config(tmp_path / "daemon", broker.tcti)) as started,
            trio.open_nursery() as nursery,
        ):
            await nursery.start(receiver.serve)
            await pin(tmp_path, started.addresses[0])
            more = f"""
[webhook]
url = "http://127.0.0.1:{receiver.port}/x"
secret_file = "secret"
retry_interval_s = 0.1
[metrics]
textfile = "watch.prom"
interval_s = 0.1
"""
            path = write_config(tmp_path, started.addresses[0], more=more)
            async with watching(path, lines):
                await until(lambda: lines.states() == ["TRUSTED"], "TRUSTED")
                await trio.to_thread.run_sync(
                    partial(tool, broker.tcti, "tpm2_pcrextend", f"23:sha256={'11' * 32}")
                )
                with trio.fail_after(DETECTION_S * 4):  # four times, on a busy machine
                    await until(lambda: len(lines.states()) == 2, "INVALID_QUOTE")
                await until(lambda: len(receiver.posts) >= 3, "the webhook's posts")
                prom = tmp_path / "watch.prom"
                await until(lambda: 'host_trusted{host="h"} 0.0' in prom.read_text(), "the metrics")
            nursery.cancel_scope.cancel()
    assert lines.states() == ["TRUSTED", "INVALID_QUOTE"]
    report = lines.reports[-1]
    assert (report["error"], report["check"]) == ("PolicyError", 7)
    assert "PCR 23 is" in report["reason"]
    told = []
    for headers, body in receiver.posts:
        expected = sign(SECRET.encode(), headers[TIMESTAMP_HEADER.lower()], body)
        assert hmac.compare_digest(headers[SIGNATURE_HEADER.lower()], expected)
        told.append(json.loads(body))
    assert {r["id"] for r in told} == {r["id"] for r in lines.reports}


async def test_resets_are_told_of_and_rollbacks_refused_over_restarts(tmp_path: Path) -> None:
    with swtpm_at(tmp_path / "tpm") as chip:

        async def watched() -> list[dict[str, Any]]:
            """What a new watcher, with the old one's memory, says of the host as it is now."""
            lines = Lines()
            async with daemon_over(plain_config(tmp_path / "daemon", chip.tcti)) as started:
                if not (tmp_path / "pins").exists():
                    await pin(tmp_path, started.addresses[0])
                async with watching(write_config(tmp_path, started.addresses[0]), lines):
                    await until(lambda: bool(lines.states()), "a verdict")
            return lines.reports

        def reboot() -> None:
            chip.stop()
            chip.start()

        assert [report["kind"] for report in await watched()] == ["verdict"]
        chip.stop()
        shutil.copytree(chip.state, tmp_path / "snapshot")  # its AK included
        chip.start()
        for _ in range(2):
            reports = await watched()
            assert [report["kind"] for report in reports] == ["reset", "verdict"]
            assert reports[-1]["state"] == "TRUSTED"
            reboot()
        chip.stop()
        shutil.rmtree(chip.state)
        shutil.copytree(tmp_path / "snapshot", chip.state)
        chip.start()
        (report,) = await watched()
        assert (report["state"], report["error"]) == ("INVALID_QUOTE", "ClockError")


async def test_the_ima_list_of_a_real_daemon(tmp_path: Path) -> None:
    log = tmp_path / "ima"
    log.write_text("")
    with swtpm_at(tmp_path / "tpm") as chip, Broker(chip.tcti) as broker:
        config = plain_config(tmp_path / "daemon", broker.tcti)
        config = replace(
            config,
            logs=Logs(ima=log, uefi=Path("/nonexistent")),
            tenant_defaults=TenantRules(pcr_allow=0xFFFFFF),
        )
        async with daemon_over(config) as started:
            await pin(tmp_path, started.addresses[0])
            path = write_config(tmp_path, started.addresses[0], host="ima = true")
            lines = Lines()
            async with watching(path, lines):
                # Nothing was measured yet: a list that is empty fits, and says nothing.
                await until(lambda: lines.states() == ["INVALID_QUOTE"], "INVALID_QUOTE")
                assert "never extended" in lines.reports[-1]["reason"]
                for count in (2, 4):  # the kernel lists first, and extends then
                    log.write_text(text(HOST[:count]))
                    for one in HOST[count - 2 : count]:
                        digest = sha256(one.data).hexdigest()
                        await trio.to_thread.run_sync(
                            partial(tool, broker.tcti, "tpm2_pcrextend", f"10:sha256={digest}")
                        )
                await until(lambda: lines.states()[-1] == "TRUSTED", "TRUSTED")
                await trio.to_thread.run_sync(
                    partial(tool, broker.tcti, "tpm2_pcrextend", f"10:sha256={'22' * 32}")
                )
                await until(lambda: lines.states()[-1] == "INVALID_QUOTE", "INVALID_QUOTE")
    assert lines.reports[-1]["error"] == "LogError"


async def test_sighup_takes_hosts_up_and_drops_them(tmp_path: Path) -> None:
    async with daemon_over(plain_config(tmp_path / "daemon")) as started:
        await pin(tmp_path, started.addresses[0])
        path = write_config(tmp_path, started.addresses[0])
        extra = tmp_path / "hosts.d"
        extra.mkdir()
        port = started.addresses[0].rpartition(":")[2]
        second = f"""
[hosts.second]
provider_ip = "127.0.0.1"
provider_port = {port}
insecure_plaintext = true
pin = "h"
uuid = "d432fbb3-d2f1-4a97-9ef7-75bd81c00000"
insecure_any_state = true
"""
        lines = Lines()
        async with watching(path, lines) as watcher:
            await until(lambda: len(lines.reports) == 1, "the first host")
            (extra / "second.toml").write_text(second + "unknown = 1\n")
            os.kill(os.getpid(), signal.SIGHUP)
            await trio.sleep(0.3)
            assert sorted(watcher.hosts) == ["h"]
            (extra / "second.toml").write_text(second)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: len(lines.reports) == 2, "the second host")
            assert lines.reports[1]["uuid"] == "d432fbb3-d2f1-4a97-9ef7-75bd81c00000"
            (extra / "second.toml").unlink()
            (tmp_path / "policy.json").write_text(json.dumps({"0": ["11" * 32]}))
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: len(lines.reports) == 3, "the new policy")
            assert sorted(watcher.hosts) == ["h"]
            assert lines.reports[2]["state"] == "INVALID_QUOTE"


async def test_nothing_of_a_crash_is_lost_but_the_last_interval(tmp_path: Path) -> None:
    """The state is on disk while the watcher runs, not only at its end."""
    async with daemon_over(plain_config(tmp_path / "daemon")) as started:
        await pin(tmp_path, started.addresses[0])
        path = write_config(tmp_path, started.addresses[0])
        file = tmp_path / "state" / "hosts.json"
        async with watching(path, Lines()):
            await until(file.exists, "the state")
            first = json.loads(file.read_text())["hosts"]["h"]["newest"]["clock_ms"]
            await until(
                lambda: json.loads(file.read_text())["hosts"]["h"]["newest"]["clock_ms"] > first,
                "a newer state",
            )
            second = Watcher(load_watch_config(path))
            with pytest.raises(HostError, match="another watcher"):
                await second.once()


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    certs = make_certs(tmp_path)
    config = replace(
        plain_config(tmp_path / "daemon"),
        listen=Listen(
            address=("127.0.0.1:0",),
            tls_cert=certs.cert,
            tls_key=certs.key,
            client_ca=certs.ca_file,
        ),
    )
    async with daemon_over(config) as started:
        context = certs.client(with_cert=True)
        await pin(tmp_path, started.addresses[0], context=context)
        path = write_config(tmp_path, started.addresses[0])
        plain = "insecure_plaintext = true"
        tls = f'tls_ca = "{certs.ca_file}"\ntls_name = "localhost"'
        own = f'\ntls_cert = "{certs.client_cert}"\ntls_key = "{certs.client_key}"'
        text = path.read_text()
        for setting, state, why in (
            (tls + own, State.TRUSTED, ""),
            (tls, State.FAILED, "no connection|closed|requires a client certificate"),
            (tls.replace("localhost", "other.example") + own, State.FAILED, "certificate"),
            (own, State.FAILED, "certificate"),
        ):
            path.write_text(text.replace(plain, setting))
            host = (await Watcher(load_watch_config(path)).once())["h"]
            assert host.verdict is state
            assert re.search(why, str(host.error)), host.error


# --- the command --------------------------------------------------------------------------------------


async def test_once_and_its_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def once(*words: str) -> tuple[int, str]:
        done = await trio.run_process(
            [*ONCE, "--config", str(path), *words],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert b"Traceback" not in done.stderr
        return done.returncode, done.stdout.decode()

    async with daemon_over(plain_config(tmp_path / "daemon")) as started:
        await pin(tmp_path, started.addresses[0])
        listed = '[hosts.other]\nprovider_ip = "192.0.2.1"\nneed_provider_quote = false\n'
        listed += "insecure_any_state = true\n"
        path = write_config(tmp_path, started.addresses[0], more=listed)
        assert await once() == (0, "h      TRUSTED\nother  not asked\n")
        (tmp_path / "policy.json").write_text(json.dumps({"0": ["11" * 32]}))
        status, out = await once("--json")
        assert status == 1
        summary = json.loads(out)
        assert (summary["trusted"], summary["refused"], summary["failed"]) == (0, 1, 0)
        assert summary["hosts"]["h"]["error"] == "PolicyError"
        assert summary["hosts"]["other"]["state"] is None
    status, out = await once()
    assert status == 3
    assert out.startswith("h      FAILED  ReplyError: no connection")


def test_wrong_files_are_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, "x:1")
    (tmp_path / "policy.json").write_text("{}")
    assert command(["watch", "--config", str(path)]) == 2
    assert "policy.json" in capsys.readouterr().err
    assert command(["watch", "--config", str(tmp_path / "none")]) == 3


def test_open_files_are_enough_or_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: asked.append(pair))
    cli_watch.allow_connections(10)
    cli_watch.allow_connections(2000)
    assert set(asked) == {(4096, 4096)}
    with pytest.raises(HostError, match="4000 hosts need 4100 open files, and the limit is 4096"):
        cli_watch.allow_connections(4000)


def test_the_five_minutes_run(tmp_path: Path) -> None:
    (script,) = fenced("docs/watch.md", "sh")
    script = script.replace("8890", str(free_port())).replace("sleep 1", "sleep 0.1")
    script = script.replace("[hosts.trial]", f"[hosts.trial]\nprovider_port = {_port_in(script)}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["sh", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
    assert "trial  TRUSTED" in output, output
    assert process.returncode == 0, output


def _port_in(script: str) -> str:
    return script.partition('address = "127.0.0.1:')[2].partition('"')[0]
