"""A machine for the guides' commands: folders in place of /etc and /var, a swtpm in place of the chip,
a `systemctl` that knows one service, and a `systemd-run`.

The commands of a page run as they stand, one block after the other, in one shell. What is replaced is
listed in `Machine.adapted`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from helpers import free_port
from places import ROOT
from tpm_helpers import raw_tpm

FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HOST = "host7.example.org"  # the guides' host, 127.0.0.1 here
SESSION_LIMIT_S = 120.0

# `provider-proxy` that looks for its configuration in the machine's folder.
COMMAND = """\
#!{python}
from pathlib import Path
from provider_proxy.cli import arguments
arguments.DEFAULT_CONFIG = Path({etc!r}) / "provider-proxy.toml"
from provider_proxy.cli.main import main
main()
"""
# start, stop, restart and reload of provider-proxy.service, with the credentials, and with what systemd
# waits for. Nothing happens to other services.
SYSTEMCTL = """\
#!{python}
import os, pathlib, shutil, signal, socket, subprocess, sys, time
root = pathlib.Path({root!r})
pid_file, where = root / "daemon.pid", str(root / "notify")
def until_ready(act, alive):
    pathlib.Path(where).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(where)
        sock.settimeout(0.2)
        act()
        while True:
            try:
                if b"READY=1" in sock.recv(4096):
                    return
            except TimeoutError:
                if not alive():
                    sys.exit("Job for provider-proxy.service failed.")
def start():
    credentials = pathlib.Path(os.environ["CREDENTIALS_DIRECTORY"])
    credentials.mkdir(exist_ok=True)
    for secret in (root / "etc/provider-proxy/secrets").iterdir():
        shutil.copy(secret, credentials / f"secret_{{secret.name}}")
    with open(root / "journal", "ab") as log:
        child = subprocess.Popen(["provider-proxy", "serve"], stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, env={{**os.environ, "NOTIFY_SOCKET": where}})
    pid_file.write_text(str(child.pid))
    return child
def stop():
    with __import__("contextlib").suppress(FileNotFoundError, ProcessLookupError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        while pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.05)
words = [w for w in sys.argv[1:] if w != "--now"]
if words == ["reboot"]:
    words = ["restart", "provider-proxy"]
if words[1].removesuffix(".service") != "provider-proxy":
    sys.exit()
if words[0] in ("stop", "restart", "disable"):
    stop()
if words[0] in ("start", "restart", "enable"):
    children = []
    until_ready(lambda: children.append(start()), lambda: children[0].poll() is None)
if words[0] == "reload":
    pid = int(pid_file.read_text())
    until_ready(lambda: os.kill(pid, signal.SIGHUP), lambda: True)
"""
# A command with the unit's credentials, and as this user.
SYSTEMD_RUN = """\
#!/bin/sh
while [ "$1" != provider-proxy ]; do shift; done
for secret in {etc}/secrets/*; do cp "$secret" "$CREDENTIALS_DIRECTORY/secret_${{secret##*/}}"; done
exec "$@"
"""


def guide_blocks(page: str) -> list[str]:
    """The shell blocks of a page, in their order."""
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


class Machine:
    """Where a guide's commands run.

    Attributes:
        folder: the working directory of the commands.
        etc, state: in place of /etc/provider-proxy, as the package makes it, and /var/lib/provider-proxy.
    """

    def __init__(self, root: Path, tcti: str) -> None:
        self.root, self.folder, self._bin = root, root / "here", root / "bin"
        self.etc, self.state = root / "etc/provider-proxy", root / "var/lib/provider-proxy"
        self._server, self._admin = free_port(), free_port()
        for path in (self.folder, self._bin, self.etc / "secrets", self.state.parent):
            path.mkdir(parents=True)
        self.add_command("provider-proxy", COMMAND.format(python=sys.executable, etc=str(self.etc)))
        self.add_command("systemctl", SYSTEMCTL.format(python=sys.executable, root=str(root)))
        self.add_command("systemd-run", SYSTEMD_RUN.format(etc=self.etc))
        self.environment = {
            **os.environ,
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PROVIDER_PROXY_STATE_DIR": str(self.state),
            "PROVIDER_PROXY_TPM_TCTI": tcti,
            "TPM2TOOLS_TCTI": tcti,
            "CREDENTIALS_DIRECTORY": str(root / "credentials"),
            "COLUMNS": "200",
        }

    def add_command(self, name: str, text: str) -> None:
        """A program on the machine's path."""
        path = self._bin / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def adapted(self, script: str) -> str:
        """The page's commands with this machine's folders, ports and name."""
        for old, new in (
            ("/etc/provider-proxy", str(self.etc)),
            (" -C /etc ", f" -C {self.etc.parent} "),
            ("/var/lib/provider-proxy", str(self.state)),
            ("0.0.0.0:8890", f"127.0.0.1:{self._server}"),
            (f"{HOST}:8890", f"localhost:{self._server}"),
            ("127.0.0.1:8890", f"127.0.0.1:{self._server}"),
            ("127.0.0.1:8895", f"127.0.0.1:{self._admin}"),
            (f"--host {HOST}", "--host localhost"),
            ("sleep 1", "sleep 0.1"),
            (
                "sleep 5",
                "until provider-proxy registrations | grep -qw registered; do sleep 0.1; done",
            ),
        ):
            script = script.replace(old, new)
        return script

    def run(
        self, *blocks: str, replace: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run blocks in one shell that ends at the first command that fails."""
        script = "\n".join(blocks)
        for old, new in (replace or {}).items():
            assert old in script, old
            script = script.replace(old, new)
        script = self.adapted(script)
        process = subprocess.Popen(
            ["sh", "-ec", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        try:
            output, _ = process.communicate(timeout=SESSION_LIMIT_S)
        finally:
            if process.poll() is None:  # the group is this script's alone
                os.killpg(process.pid, signal.SIGTERM)
                process.communicate()
        return subprocess.CompletedProcess(script, process.returncode, output, output)

    def journal(self) -> str:
        path = self.root / "journal"
        return path.read_text(encoding="utf-8") if path.exists() else ""


@contextlib.contextmanager
def machine(root: Path) -> Iterator[Machine]:
    """A machine with a TPM that several programs may use; its daemon ends with it."""
    with raw_tpm(root / "chip") as broker:
        made = Machine(root, broker.tcti)
        try:
            yield made
        finally:
            made.run("systemctl stop provider-proxy.service")
