"""docs/mistakes.md: what check-config, the daemon and the tenant's command say to each mistake.

    python tests/support/mistakes_page.py > docs/mistakes.md        (`make docs`; needs root)

Each mistake of `mistakes` is made in a folder of its own, and the programs run over it as they are: in
children of this process, so that the package is imported once. The daemon's chip is a fake one. The
children may not read what its mode forbids, though they are root's: two capabilities are taken away.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Container, Iterator
from pathlib import Path

from helpers import FakeQuoter, open_fake
from mistakes import GROUPS, Mistake, Scene

from provider_proxy.cli import main as cli
from provider_proxy.host import daemon

LIMIT_S = 30.0
VERSION_3 = 0x20080522  # capget(2)
DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 1, 1 << 2
NOTHING, STARTS, SAME = "-", "starts", "the same"
HEAD = """# What the programs say to mistakes

Generated (`make docs`): each mistake was made, and the three programs were run.
`check-config` says before a restart what `serve` would say; where it says nothing (-), the mistake
cannot be seen from there. A tenant's mistake is checked in the file of `watch`
(`check-config --for watch`), and the daemon's column has what its log says of the visitor.
The tenant's command is `provider-proxy fetch`. "The same": the same message, without the file and
line that `check-config` puts before it.
"""


def give_up_rights() -> None:
    """From here on modes count, for root too. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("<Ii", VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable, twice
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    effective, *others = struct.unpack("<6I", sets.raw)
    gone = DAC_OVERRIDE | DAC_READ_SEARCH
    others[0] &= ~gone  # access(2) looks at what is permitted
    kept = struct.pack("<6I", effective & ~gone, *others)
    if libc.capset(header, ctypes.create_string_buffer(kept, 24)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def replace_chip() -> None:
    """The daemon's default is a fake chip, from here on."""
    defaults = daemon.run.__kwdefaults__
    assert defaults is not None
    defaults["open_quoter"] = open_fake(FakeQuoter())


def spawn(words: list[str], scene: Scene, out: Path, *, real_chip: bool = False) -> int:
    """Start a command as a child; its stdout and stderr go to a file."""
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(os.open("/dev/null", os.O_RDWR), 0)
            os.dup2(os.open("/dev/null", os.O_RDWR), 1)
            os.dup2(fd, 2)
            os.environ.update(scene.environ)
            os.chdir(scene.folder)
            sys.argv = ["provider-proxy", *words]
            if not real_chip:
                replace_chip()
            give_up_rights()
            cli.main()
        except SystemExit as exc:
            code = int(exc.code or 0)
        except BaseException:  # noqa: BLE001  # nothing of the parent's goes on in here
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(fd)
    return child


def wait(child: int) -> int:
    """Its exit code. It is killed where it takes too long."""
    end = time.monotonic() + LIMIT_S
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def said(out: Path) -> list[str]:
    """Messages for people, without the program's name and the log's other lines."""
    found = []
    for line in out.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            values = json.loads(line)
            if values["level"] in ("warning", "error"):
                found.append(values["msg"])
        elif line.startswith(("usage:", "       ", "INFO ")):
            continue
        else:
            level, _, rest = line.partition(" ")
            text = rest if level in ("WARNING", "ERROR") else line
            found.append(re.sub(r"^provider-proxy(?: [a-z-]+)?: ", "", text))
    return found


def run(words: list[str], scene: Scene) -> list[str]:
    out = scene.folder.parent / "out"
    code = wait(spawn(words, scene, out))
    lines = said(out)
    assert code != 0 or "fetch" not in words or not lines, lines
    return [
        f"{line} (exit code {code})" if n == len(lines) - 1 else line
        for n, line in enumerate(lines)
    ]


@contextlib.contextmanager
def served(scene: Scene, *, real_chip: bool) -> Iterator[list[str]]:
    """The daemon while it runs, or what it said instead."""
    out = scene.folder.parent / "serve"
    child = spawn(
        ["serve", "--config", str(scene.folder / "proxy.toml")], scene, out, real_chip=real_chip
    )
    end = time.monotonic() + LIMIT_S
    try:
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                child = 0
                lines = said(out)
                lines[-1] += f" (exit code {os.waitstatus_to_exitcode(status)})"
                yield lines
                return
            if "listening on" in out.read_text(errors="replace"):
                yield [STARTS]
                return
            time.sleep(0.01)
        raise TimeoutError(out.read_text())
    finally:
        if child:
            os.kill(child, signal.SIGTERM)
            wait(child)


def ready(scene: Scene) -> list[str]:
    """What `/readyz` adds."""
    link = http.client.HTTPConnection("127.0.0.1", scene.admin, timeout=LIMIT_S)
    try:
        link.request("GET", "/readyz")
        answer = link.getresponse()
        return [] if answer.status == 200 else [f"`/readyz` answers {answer.status}"]
    finally:
        link.close()


def look(mistake: Mistake, base: Container[str]) -> tuple[list[str], list[str], list[str]]:
    """The three columns.

    Args:
        base: what `check-config` says where there is no mistake.
    """
    with tempfile.TemporaryDirectory() as top:
        scene = Scene(Path(top) / "p")
        scene.environ["PROVIDER_PROXY_LIMITS_DRAIN_MS"] = "100"
        mistake.make(scene)
        scene.write("proxy.toml", scene.config, scene.config_mode)
        scene.write("watch.toml", scene.watch)
        program, name = ("watch", "watch.toml") if mistake.of_tenant else ("serve", "proxy.toml")
        words = ["check-config", "--for", program, "--config", str(scene.folder / name)]
        checked = run(words, scene)
        options = [word for pair in scene.options.items() for word in pair]
        ask = ["fetch", scene.url, "--pcr", "0", *options]
        if mistake.watches:
            ask = ["watch", "--once", "--config", str(scene.folder / "watch.toml")]
        with served(scene, real_chip=mistake.real_chip) as lines:
            tenant = run(ask, scene)
            if lines == [STARTS]:
                lines += [*ready(scene), *said(scene.folder.parent / "serve")]
        for held in scene.held:
            held.shutdown(socket.SHUT_RDWR)  # the thread that accepts there wakes up
            held.close()
        if mistake.of_tenant:
            lines = [line for line in lines if "turned away" in line]
        columns = [
            [clean(line, scene) for line in each if line == STARTS or bare(line) not in base]
            for each in (checked, lines, tenant)
        ]
        return columns[0], columns[1], columns[2]


def bare(line: str) -> str:
    """What is the same of a line wherever and whenever it is said."""
    return re.sub(r"/(?:tmp/\w+/p|etc/pp)|\(exit code \d+\)|[0-9:. -]{10,}", "", line).strip()


def clean(line: str, scene: Scene) -> str:
    """Without what differs from one run to the next."""
    line = line.replace(str(scene.folder), "/etc/pp")
    line = line.replace(str(scene.port), "8890").replace(str(scene.admin), "8895")
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", line)
    line = re.sub(r"sha256=[0-9a-f]{64}", "sha256=…", line)
    line = re.sub(r"provider-proxy CA [0-9a-f]{8}", "provider-proxy CA", line)
    line = re.sub(r"is in use: \S*python\S* .*?( \(exit|$)", r"is in use: another-program\1", line)
    line = re.sub(r"address=127\.0\.0\.1:\d+", "address=127.0.0.1:PORT", line)
    return line.replace("x" * 100, "…").replace("xx…", "…")


GOOD = [
    Mistake(name="none", make=lambda scene: None, of_tenant=of_tenant)
    for of_tenant in (False, True)
]


def told(line: str) -> str:
    """A message without the place that `check-config` puts before it, and the exit code."""
    return re.sub(r"^(?:error|warning): (?:/etc/pp/\w+\.toml:\d+: )?| \(exit code \d\)$", "", line)


def cell(lines: list[str]) -> str:
    return "<br>".join(line.replace("|", "\\|").replace("<", "&lt;") for line in lines) or NOTHING


def page() -> str:
    """The whole page. Needs root."""
    cli.build_parser()  # imports all
    columns = [column for good in GOOD for column in look(good, ())]
    base = {bare(line) for column in columns for line in column}
    parts = [HEAD]
    for group, mistakes in GROUPS.items():
        parts.append(
            f"\n## {group}\n\n| Mistake | `check-config` | The daemon | The tenant's command |\n"
            "|---|---|---|---|\n"
        )
        for mistake in mistakes:
            checked, served, asked = look(mistake, base)
            if served and list(map(told, checked)) == list(map(told, served)):
                served = [SAME]
            cells = " | ".join(map(cell, (checked, served, asked)))
            parts.append(f"| {mistake.name} | {cells} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
