"""A tenant's whole Keylime on loopback, a bridge beside it, and hosts behind the bridge.

Registrar, verifier and `keylime_tenant` are real, and so is the bridge: the command, in a process of its
own. Hosts are real daemons, or proxies over a `SoftTpm` that can be made to lie.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trio
from keylime_helpers import (
    KeylimeVerifier,
    Registrar,
    keylime_environment,
    keylime_program,
    running_registrar,
    running_verifier,
)
from real_host import RealHost

from provider_proxy.tenant.client import ProxyClient
from provider_proxy.trust.pins import PinStore

TENANT_CONFIG = """\
[tenant]
version = 2.6
verifier_ip = 127.0.0.1
verifier_port = {verifier_port}
registrar_ip = 127.0.0.1
registrar_port = {registrar_port}
tls_dir = default
enable_agent_mtls = True
client_key = default
client_key_password =
client_cert = default
trusted_server_ca = default
tpm_cert_store = {store}
max_payload_size = 1048576
accept_tpm_hash_algs = ['sha512', 'sha384', 'sha256']
accept_tpm_encryption_algs = ['ecc', 'rsa']
accept_tpm_signing_algs = ['ecschnorr', 'rsassa']
exponential_backoff = False
retry_interval = 1
max_retries = 3
request_timeout = 60
require_ek_cert = True
ek_check_script =
mb_refstate =
"""
QUICK = {
    "enable_agent_mtls": "True",
    "quote_interval": "0.25",
    "retry_interval": "0.5",
    "max_retries": "8",
}
"""Settings of a verifier that is in a hurry."""

GET_QUOTE, FAILED, INVALID_QUOTE = 3, 7, 9
STATES_OF_GETTING = (1, GET_QUOTE, 4, 5)  # start, retry, and a moment after the first quote
START_S = 60.0


def port_outside_the_ephemeral(count: int = 1) -> int:
    """The first of `count` free ports below those that the kernel gives to connections."""
    for first in range(20_000 + os.getpid() % 6000, 32_000, max(1, count)):
        try:
            for port in range(first, first + count):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@dataclass
class Keylime:
    """A tenant's registrar and verifier. `api` is what the verifier's paths begin with."""

    folder: Path
    registrar: Registrar
    verifier: KeylimeVerifier
    http: httpx.Client
    api: str

    @property
    def store(self) -> Path:
        """Keylime's tpm_cert_store."""
        return self.folder / "tpm_cert_store"

    @property
    def log(self) -> str:
        """What the verifier has said."""
        return (self.folder / "keylime_verifier.log").read_text(errors="replace")

    async def tenant(self, *words: str | Path) -> tuple[int, str]:
        """`keylime_tenant`: exit code and output."""
        site = self.registrar.site
        (self.folder / "tenant.conf").write_text(
            TENANT_CONFIG.format(
                verifier_port=self.verifier.port,
                registrar_port=self.registrar.tls_port,
                store=self.store,
            )
        )
        environment = keylime_environment(self.folder, site)
        environment |= {"KEYLIME_TENANT_CONFIG": str(self.folder / "tenant.conf")}
        done = await trio.run_process(
            [*map(str, keylime_program("keylime_tenant", site)), *map(str, words)],
            env=environment,
            cwd=self.folder,
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    async def add(self, agent_id: str, *words: str | Path) -> None:
        """`keylime_tenant -c add`, which must succeed."""
        code, said = await self.tenant("-c", "add", "-u", agent_id, *words)
        assert code == 0, said

    def status(self, agent_id: str) -> Mapping[str, Any]:
        """What the verifier knows of an agent; empty where it knows none."""
        answer = self.http.get(f"{self.verifier.url}/{self.api}/agents/{agent_id}")
        found: Mapping[str, Any] = answer.json().get("results", {})
        return found if answer.status_code == 200 else {}

    def state(self, agent_id: str) -> int | None:
        """Its operational state."""
        found: int | None = self.status(agent_id).get("operational_state")
        return found

    async def until(self, agent_id: str, *states: int, limit_s: float = 30.0) -> Mapping[str, Any]:
        """Wait for a state."""
        end = time.monotonic() + limit_s
        while True:
            status = await trio.to_thread.run_sync(self.status, agent_id)
            if status.get("operational_state") in states:
                return status
            assert time.monotonic() < end, (status, self.log[-3000:])
            await trio.sleep(0.1)

    async def until_attested(self, agent_id: str, times: int, limit_s: float = 60.0) -> None:
        """Wait for so many more good attestations; the state must be that of getting quotes."""
        goal = int(self.status(agent_id)["attestation_count"]) + times
        end = time.monotonic() + limit_s
        while True:
            status = await trio.to_thread.run_sync(self.status, agent_id)
            assert status["operational_state"] in STATES_OF_GETTING, (status, self.log[-3000:])
            if int(status["attestation_count"]) >= goal:
                return
            assert time.monotonic() < end, status
            await trio.sleep(0.1)


@contextmanager
def running_tenant(
    folder: Path, *, site: Path | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[Keylime]:
    """Registrar and verifier, in a hurry where `settings` do not say otherwise."""
    with ExitStack() as stack:
        registrar = stack.enter_context(running_registrar(folder, site=site))
        yield stack.enter_context(verifier_of(registrar, settings=settings))


@contextmanager
def verifier_of(
    registrar: Registrar,
    *,
    verifier_port: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Keylime]:
    """A verifier beside a registrar."""
    folder = registrar.directory
    (folder / "tpm_cert_store").mkdir(exist_ok=True)
    given = QUICK | dict(settings or {})
    with (
        running_verifier(registrar, port=verifier_port, settings=given) as verifier,
        httpx.Client(verify=registrar.client_context(), trust_env=False, timeout=30) as http,
    ):
        answer = http.get(f"{verifier.url}/version")
        newest = (
            "2.6"  # API 3.0 tells nothing of agents, and is the newest of a verifier in push mode
        )
        if answer.status_code == 200 and given.get("mode") != "push":
            newest = answer.json()["results"]["current_version"]
        yield Keylime(folder, registrar, verifier, http, f"v{newest}")


# --- the bridge --------------------------------------------------------------------------------------


@dataclass
class Running:
    """A bridge in a process of its own.

    Attributes:
        hosts: the tables of the file, by name.
    """

    folder: Path
    keylime: Keylime
    hosts: dict[str, dict[str, Any]]
    first_port: int
    admin_port: int
    options: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.folder / "bridge.toml"

    @property
    def log(self) -> str:
        return (self.folder / "bridge.log").read_text(errors="replace")

    def pin(self, name: str, ak_public: bytes) -> None:
        """Trust a host's AK."""
        PinStore(self.folder / "pins").pin(name, ak_public, replace=True)

    def write(self) -> None:
        """The file, as `hosts` are now."""
        registrar = self.keylime.registrar
        bridge = {
            "registrar": "mine",
            "client_ca": str(registrar.ca),
            "first_port": self.first_port,
            "last_port": self.first_port + 999,
            "admin": f"127.0.0.1:{self.admin_port}",
            "verifier_url": self.keylime.verifier.url,
            "verifier_ca": str(registrar.ca),
            "verifier_cert": str(registrar.client_cert),
            "verifier_key": str(registrar.client_key),
            "register_interval_s": 10,
            **self.options,
        }
        mine = {
            "url": registrar.https_url,
            "ca": str(registrar.ca),
            "cert": str(registrar.client_cert),
            "key": str(registrar.client_key),
            "insecure_no_ek": True,
        }
        lines = ['state_dir = "state"', 'pins = "pins"', "save_interval_s = 0.1"]
        tables = {"bridge": bridge, "registrars.mine": mine}
        tables |= {f"hosts.{name}": rules for name, rules in self.hosts.items()}
        for table, values in tables.items():
            lines.append(f"[{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.config.write_text("\n".join(lines) + "\n")

    def command(self, *words: str) -> Sequence[str]:
        return (sys.executable, "-m", "provider_proxy", "bridge", *words)

    def start(self) -> None:
        """Start it; up when it is ready."""
        self.write()
        with (self.folder / "bridge.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command("run", "--config", str(self.config))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.await_ready()
        ek_ca = self.folder / "state/bridge/ek-ca.pem"
        (self.keylime.store / "bridge.pem").write_bytes(ek_ca.read_bytes())

    def await_ready(self) -> None:
        end = time.monotonic() + START_S
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log[-4000:]
            try:
                answer = httpx.get(f"http://127.0.0.1:{self.admin_port}/readyz", trust_env=False)
                if answer.status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < end, self.log[-4000:]
            time.sleep(0.1)

    def reload(self) -> None:
        """Let it read its file again."""
        self.write()
        assert self.process is not None
        before = self.log.count("reloaded: ")
        self.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + START_S
        while self.log.count("reloaded: ") == before:
            assert time.monotonic() < end, self.log[-2000:]
            time.sleep(0.05)
        self.await_ready()

    def stop(self, *, kill: bool = False) -> None:
        """End it; its exit code must be 0 where it was not killed."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        code = process.wait(30)
        assert kill or code == 0, self.log[-4000:]

    def status(self) -> Mapping[str, Any]:
        """What `bridge status --json` prints, without its start."""
        answer = httpx.get(f"http://127.0.0.1:{self.admin_port}/status", trust_env=False)
        found: Mapping[str, Any] = answer.raise_for_status().json()
        return found

    async def cli(self, *words: str) -> str:
        """`provider-proxy bridge …`, which must succeed; what it prints."""
        done = await trio.run_process(
            [*self.command(*words, "--config", str(self.config))],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def ids(self) -> dict[str, str]:
        """The agents' ids, by the hosts' names."""
        return {name: host["agent_id"] for name, host in self.status()["hosts"].items()}


@contextmanager
def running_bridge(
    keylime: Keylime, folder: Path, hosts: dict[str, dict[str, Any]], **options: Any
) -> Iterator[Running]:
    """A bridge; pins must be made before it starts: see `Running.start`."""
    folder.mkdir(parents=True, exist_ok=True)
    first = port_outside_the_ephemeral(len(hosts) + 8)
    bridge = Running(folder, keylime, hosts, first, first + len(hosts) + 7, options)
    try:
        yield bridge
    finally:
        if bridge.process is not None:
            bridge.process.kill()
            bridge.process.wait(10)


def reason_in(text: str, agent_id: str) -> list[str]:
    """The refusals that a verifier's log holds for an agent."""
    return re.findall(rf"{agent_id}[^\n]*(refused: \w+: [^\n]*)", text)


SETTINGS = {
    "enabled_revocation_notifications": '["agent"]',
    "measured_boot_evaluate": "always",
    "measured_boot_policy_name": "example",
}


async def ak_of(host: RealHost) -> bytes:
    async with httpx.AsyncClient(trust_env=False) as http:
        proxy = ProxyClient(http, f"http://127.0.0.1:{host.port}")
        ak_public: bytes = (await proxy.identity()).ak_public
        return ak_public
