"""The real Keylime registrar and verifier on loopback, for tests.

They run from `.venv-keylime` (`make keylime`), each in a directory and a process group of its own.
Keylime's registrar cannot do without TLS on its second port; the first one is plain HTTP.
"""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from helpers import free_port
from places import ROOT, SYSTEM

PYTHON = ROOT / ".venv-keylime/bin/python"
HERE = SYSTEM / "keylime"
START_S = 60.0  # about 4 s on an idle machine

CA_CONFIG = """\
[ca]
version = 2.6
password = default
cert_country = US
cert_ca_name = Test Certificate Authority
cert_state = MA
cert_locality = Boston
cert_organization = provider-proxy tests
cert_org_unit = 1
cert_ca_lifetime = 3650
cert_lifetime = 365
cert_bits = 2048
cert_crl_dist = http://localhost:38080/crl
"""
REGISTRAR_CONFIG = """\
[registrar]
version = 2.6
ip = 127.0.0.1
port = {port}
tls_port = {tls_port}
tls_dir = default
server_key = default
server_key_password =
server_cert = default
trusted_client_ca = default
database_url = sqlite
database_pool_sz_ovfl = 5,10
max_workers = 1
auto_migrate_db = True
tpm_identity = default
malformed_cert_action = warn
durable_attestation_import =
"""
VERIFIER_CONFIG = """\
[verifier]
version = 2.6
uuid = default
ip = 127.0.0.1
port = {port}
registrar_ip = 127.0.0.1
registrar_port = {registrar_port}
enable_agent_mtls = False
tls_dir = default
server_key = default
server_key_password =
server_cert = default
cert_subject_alternative_names =
trusted_client_ca = default
client_key = default
client_key_password =
client_cert = default
trusted_server_ca = default
authorization_provider = simple
database_url = sqlite
database_pool_sz_ovfl = 5,10
auto_migrate_db = True
num_workers = 1
max_workers = 1
exponential_backoff = False
retry_interval = 1
max_retries = 3
quote_interval = 1
max_upload_size = 104857600
request_timeout = 60.0
measured_boot_policy_name = accept-all
measured_boot_imports = []
measured_boot_evaluate = once
severity_labels = ["info", "notice", "warning", "error", "critical", "alert", "emergency"]
severity_policy = [{{"event_id": ".*", "severity_label": "emergency"}}]
ignore_tomtou_errors = False
durable_attestation_import =
persistent_store_url =
transparency_log_url =
time_stamp_authority_url =
time_stamp_authority_certs_path =
persistent_store_format = json
persistent_store_encoding =
transparency_log_sign_algo = sha256
signed_attributes =
require_allow_list_signatures = False
mode = pull
challenge_lifetime = 1800
verification_timeout = 0
session_create_rate_limit_per_ip = 50
session_create_rate_limit_window_ip = 60
session_create_rate_limit_per_agent = 15
session_create_rate_limit_window_agent = 60
session_lifetime = 180
extend_token_on_attestation = True
auto_recover_attestation_failures = False
shutdown_drain_timeout = 10
[revocations]
enabled_revocation_notifications = []
zmq_ip = 127.0.0.1
zmq_port = 8992
webhook_url =
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registrar:
    """A running registrar. `directory` keeps its database and CA over a restart; `site` is where
    another release of Keylime than that of `.venv-keylime` is installed."""

    directory: Path
    port: int
    tls_port: int
    site: Path | None = None

    @property
    def http_url(self) -> str:
        """Registration and /version."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def https_url(self) -> str:
        """Registration too, and with a client certificate reading, listing and deleting."""
        return f"https://127.0.0.1:{self.tls_port}"

    @property
    def ca(self) -> Path:
        return self.directory / "cv_ca/cacert.crt"

    @property
    def client_cert(self) -> Path:
        return self.directory / "cv_ca/client-cert.crt"

    @property
    def client_key(self) -> Path:
        return self.directory / "cv_ca/client-private.pem"

    def client_context(self) -> ssl.SSLContext:
        """TLS as a client of the registrar's with its client certificate."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.client_cert, self.client_key)
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class KeylimeVerifier:
    """A running verifier; HTTPS only, with the CA of its registrar."""

    port: int
    ca: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"


def keylime_environment(directory: Path, site: Path | None = None) -> dict[str, str]:
    """The environment of a Keylime program that keeps everything inside `directory`.

    Args:
        site: of another release.
    """
    assert PYTHON.exists(), "the real Keylime is missing: make keylime"
    config = directory / "ca.conf"
    config.write_text(CA_CONFIG)
    (directory / "run").mkdir(exist_ok=True)
    return {
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "HOME": str(directory),
        "LANG": "C.UTF-8",
        "PYTHONPATH": ":".join(map(str, filter(None, (site, HERE / "stub")))),
        "KEYLIME_DIR": str(directory),
        "KEYLIME_CA_CONFIG": str(config),
        "XDG_RUNTIME_DIR": str(directory / "run"),
    }


def keylime_program(name: str, site: Path | None = None) -> list[Path]:
    """The command of a Keylime program: "keylime_verifier"."""
    return [PYTHON, site / "bin" / name] if site is not None else [PYTHON.parent / name]


def make_keylime_ca(directory: Path) -> None:
    """Keylime's CA with a server's and a client's certificate, in `directory`/cv_ca; once."""
    if not (directory / "cv_ca/server-cert.crt").exists():
        (directory / "cv_ca").mkdir(exist_ok=True)
        subprocess.run(
            [PYTHON, HERE / "make_ca.py", directory / "cv_ca"],
            env=keylime_environment(directory),
            check=True,
            capture_output=True,
            timeout=120,
        )


@contextmanager
def running_registrar(
    directory: Path,
    *,
    port: int | None = None,
    tls_port: int | None = None,
    site: Path | None = None,
) -> Iterator[Registrar]:
    """A registrar on loopback; the same directory and ports again are the same registrar restarted."""
    registrar = Registrar(
        directory=directory,
        port=port or free_port(),
        tls_port=tls_port or free_port(),
        site=site,
    )
    make_keylime_ca(directory)
    config = directory / "registrar.conf"
    config.write_text(REGISTRAR_CONFIG.format(port=registrar.port, tls_port=registrar.tls_port))
    environment = keylime_environment(directory, site)
    environment |= {"KEYLIME_REGISTRAR_CONFIG": str(config)}
    program = keylime_program("keylime_registrar", site)
    with running_keylime(program, directory, environment, registrar.http_url):
        yield registrar


@contextmanager
def running_verifier(
    registrar: Registrar,
    *,
    port: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[KeylimeVerifier]:
    """The tenant's own unmodified verifier, in the registrar's directory and of its release.

    Args:
        settings: lines of its configuration that are other than `VERIFIER_CONFIG`.
    """
    verifier = KeylimeVerifier(port=port or free_port(), ca=registrar.ca)
    config = registrar.directory / "verifier.conf"
    text = VERIFIER_CONFIG.format(port=verifier.port, registrar_port=registrar.tls_port)
    for key, value in (settings or {}).items():
        text, count = re.subn(rf"(?m)^{key} =.*$", f"{key} = {value}", text)
        assert count == 1, key
    config.write_text(text)
    environment = keylime_environment(registrar.directory, registrar.site)
    environment |= {"KEYLIME_VERIFIER_CONFIG": str(config)}
    program = keylime_program("keylime_verifier", registrar.site)
    context = _trusting()
    context.load_cert_chain(registrar.client_cert, registrar.client_key)
    with running_keylime(program, registrar.directory, environment, verifier.url, context=context):
        yield verifier


@contextmanager
def running_keylime(
    command: Sequence[Path],
    directory: Path,
    environment: dict[str, str],
    url: str,
    *,
    context: ssl.SSLContext | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A Keylime program in its own process group, up when `url`/version answers."""
    log_path = directory / f"{command[-1].stem}.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _await_version(process, url, log_path, context or _trusting())
            yield process
        finally:
            stop_group(process)


def _trusting() -> ssl.SSLContext:
    return ssl._create_unverified_context()  # is somebody there? nothing is believed


def _await_version(
    process: subprocess.Popen[bytes], url: str, log_path: Path, context: ssl.SSLContext
) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/version", timeout=2, context=context).close()
        except urllib.error.HTTPError:
            return  # a verifier in push mode has no such page
        except OSError:
            assert process.poll() is None, log_path.read_text()[-4000:]
            assert time.monotonic() < deadline, log_path.read_text()[-4000:]
            time.sleep(0.1)
        else:
            return


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Stop a program and its workers: TERM to the parent alone leaves Keylime's running."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
