"""HAProxy and nginx as they are documented, before the daemon: two tenants over shared connections,
headers that tenants make up, and clients' addresses by the PROXY protocol."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from helpers import (
    LIMIT_S,
    Certs,
    FakeQuoter,
    Reply,
    connect,
    daemon_with,
    get,
    get_bytes,
    make_certs,
)
from places import DOCS

from provider_proxy.host.config.tables import Admin, Config, Listen, TenantRules
from provider_proxy.host.daemon import Started
from provider_proxy.host.status.recent import FRESH_S

pytestmark = pytest.mark.real

ROUNDS = 10
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")


def blocks(language: str) -> list[str]:
    text = (DOCS / "fronts.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[str]:
    """A front as a process of its own; its address."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the front ended"
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)


@contextlib.contextmanager
def haproxy(folder: Path, certs: Certs, daemon: str, block: str) -> Iterator[str]:
    """HAProxy with one block of the documentation."""
    pem = folder / "server.pem"
    pem.touch(mode=0o600)
    pem.write_bytes(certs.cert.read_bytes() + certs.key.read_bytes())
    port = free_port()
    text = (
        block.replace("/etc/haproxy/server.pem", str(pem))
        .replace("/etc/haproxy/tenants-ca.crt", str(certs.ca_file))
        .replace("bind :8890", f"bind 127.0.0.1:{port}")
        .replace("unix@/run/provider-proxy-front.sock", f"unix@{daemon.removeprefix('unix:')}")
        .replace("127.0.0.1:8889", daemon)
        .replace("192.0.2.1:8892", daemon)
        .replace("/etc/haproxy/servers-ca.crt", str(certs.ca_file))
        .replace("host1.example.org", "localhost")
        .replace("/etc/haproxy/front.pem", str(folder / "front.pem"))
        .replace(" check", "")
    )
    path = folder / "haproxy.cfg"
    path.write_text("global\n    nbthread 2\n" + text)
    with running(["haproxy", "-db", "-q", "-f", str(path)], port) as address:
        yield address


@contextlib.contextmanager
def nginx(folder: Path, certs: Certs, daemon: str, block: str) -> Iterator[str]:
    port = free_port()
    text = (
        block.replace("/etc/nginx/nginx-client-cert.conf", str(DOCS / "nginx-client-cert.conf"))
        .replace("/etc/nginx/server.crt", str(certs.cert))
        .replace("/etc/nginx/server.key", str(certs.key))
        .replace("/etc/nginx/tenants-ca.crt", str(certs.ca_file))
        .replace("listen 8890", f"listen 127.0.0.1:{port}")
        .replace("127.0.0.1:8889", daemon)
        .replace("unix:/run/provider-proxy-front.sock", daemon)
    )
    paths = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = text.replace("http {\n", f"http {{\n    access_log off;\n{paths}", 1)
    user = "user root root;\n" if os.geteuid() == 0 else ""
    if block.startswith("stream"):
        user += f"load_module {STREAM_MODULE};\n"
    head = f"daemon off;\n{user}pid {folder}/pid;\nerror_log {folder}/log warn;\nevents {{}}\n"
    path = folder / "nginx.conf"
    path.write_text(head + text)
    with running(["nginx", "-p", str(folder), "-c", str(path), "-e", f"{folder}/log"], port) as at:
        yield at


class Tenants:
    """Two of them, each with a certificate of the tenants' CA, and one of another CA."""

    def __init__(self, folder: Path) -> None:
        self.certs = make_certs(folder)
        self.one, self.two = (self._context(self.certs, folder, name) for name in ("one", "two"))
        (folder / "other").mkdir()
        foreign = make_certs(folder / "other")
        self.stranger = self.certs.client()
        self.stranger.load_cert_chain(foreign.client_cert, foreign.client_key)

    def front(self, folder: Path) -> None:
        """The certificate that a front shows to the daemon."""
        leaf = self.certs.ca.issue_cert("front.example.org")
        path = folder / "front.pem"
        path.touch(mode=0o600)
        leaf.private_key_and_cert_chain_pem.write_to_path(str(path))

    def _context(self, certs: Certs, folder: Path, name: str) -> ssl.SSLContext:
        leaf = certs.ca.issue_cert(f"{name}@example.org", common_name=name)
        path = folder / f"{name}.pem"
        path.touch(mode=0o600)
        leaf.private_key_and_cert_chain_pem.write_to_path(str(path))
        context = certs.client()
        context.load_cert_chain(path)
        return context


@asynccontextmanager
async def behind(tenants: Tenants, folder: Path, **listen: object) -> AsyncIterator[Started]:
    certs = tenants.certs
    config = Config(
        state_dir=folder,
        listen=Listen(
            address=("127.0.0.1:0",),
            tls_cert=certs.cert,
            tls_key=certs.key,
            client_ca=certs.ca_file,
            **listen,  # type: ignore[arg-type]
        ),
        admin=Admin(address=("127.0.0.1:0",)),
        tenant_defaults=TenantRules(accept_unlisted=True),
    )
    async with daemon_with(FakeQuoter(), config) as started:
        yield started


async def ask(address: str, context: ssl.SSLContext, *headers: str) -> Reply:
    async with connect(address.replace("127.0.0.1", "localhost"), context) as wire:
        await wire.send(get_bytes("/version", *headers))
        with trio.fail_after(LIMIT_S):
            return await wire.reply()


async def counts(started: Started) -> dict[str, int]:
    await trio.sleep(FRESH_S)
    results = (await get(started.admin_addresses[0], "/status")).envelope()["results"]
    assert isinstance(results, dict)
    return {row["name"]: row["answered"] for row in results["tenants"]["listed"]}


FRONTS = {"haproxy": (haproxy, "haproxy"), "nginx": (nginx, "nginx")}


@pytest.mark.parametrize(("name", "tcp"), [("haproxy", False), ("haproxy", True), ("nginx", False)])
async def test_tenants_behind_a_front(tmp_path: Path, name: str, tcp: bool) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    start, language = FRONTS[name]
    tenants = Tenants(tmp_path)
    listen: dict[str, tuple[str, ...]] = {
        "front": ("127.0.0.1:0" if tcp else f"unix:{tmp_path}/front",),
        "front_peers": ("dns:front.example.org" if tcp else f"uid:{os.geteuid()}",),
    }
    async with behind(tenants, tmp_path, **listen) as started:
        (daemon,) = started.front_addresses
        with contextlib.ExitStack() as stack:
            block = blocks(language)[0]
            if tcp:
                tenants.front(tmp_path)
                block = block.partition("\nbackend ")[0] + "\n" + blocks(language)[1]
            front = start(tmp_path, tenants.certs, daemon, block)
            address = await trio.to_thread.run_sync(stack.enter_context, front)
            for _ in range(ROUNDS):  # over connections that the front shares among them
                for context in (tenants.one, tenants.two):
                    assert (await ask(address, context)).status == 200
            # What a tenant makes up never arrives.
            made_up = "Client-Cert: :AAAA:"
            assert (await ask(address, tenants.one, "Client-Cert-Chain: x")).status == 200
            assert (await ask(address, tenants.one, made_up)).status == 200
            assert (await ask(address, tenants.one, made_up, made_up)).status == 200
            with contextlib.suppress(trio.BrokenResourceError, AssertionError, OSError):
                assert (await ask(address, tenants.stranger)).status == 400  # nginx says so in HTTP
            assert await counts(started) == {
                "email:one@example.org": ROUNDS + 3,
                "email:two@example.org": ROUNDS,
            }


@pytest.mark.parametrize("version", ["send-proxy-v2", "send-proxy", "nginx"])
async def test_addresses_by_the_proxy_protocol(tmp_path: Path, version: str) -> None:
    name = "nginx" if version == "nginx" else "haproxy"
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "nginx" and not STREAM_MODULE.exists():
        pytest.skip("nginx has no stream module (libnginx-mod-stream)")
    tenants = Tenants(tmp_path)
    async with behind(tenants, tmp_path, proxy_protocol_from=("127.0.0.0/8",)) as started:
        daemon = started.addresses[0]
        with contextlib.ExitStack() as stack:
            if name == "nginx":
                front = nginx(tmp_path, tenants.certs, daemon, blocks("nginx")[1])
            else:
                block = blocks("haproxy")[2].replace("send-proxy-v2", version)
                front = haproxy(tmp_path, tenants.certs, daemon, block)
            address = await trio.to_thread.run_sync(stack.enter_context, front)
            for context in (tenants.one, tenants.two):
                assert (await ask(address, context)).status == 200
            with pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
                await ask(daemon, tenants.one)  # past the proxy, from its address
            assert set(await counts(started)) == {"email:one@example.org", "email:two@example.org"}
