"""The real agent of Keylime 6.6.0 on a swtpm of its own, for tests.

It runs from `.venv-keylime-agent` (`make keylime`), in a directory and a process group of its own.
"""

from __future__ import annotations

import base64
import ssl
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from helpers import free_port
from keylime_helpers import (
    HERE,
    Registrar,
    keylime_environment,
    running_keylime,
)
from places import ROOT
from tpm_helpers import Swtpm

from provider_proxy.common.tls import TlsFiles, pinned_context
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.host.quoters.agent_http import AgentClient
from provider_proxy.host.quoters.keylime_agent import AgentBinding, Bind
from provider_proxy.host.quoters.tpm_opener import HostIdentity

PYTHON = ROOT / ".venv-keylime-agent/bin/python"

AGENT_CONFIG = """\
[agent]
version = 2.0
uuid = {agent_id}
ip = 127.0.0.1
port = {port}
contact_ip = 127.0.0.1
contact_port = {port}
registrar_ip = 127.0.0.1
registrar_port = {registrar_port}
tls_dir = default
server_key = default
server_key_password =
server_cert = default
trusted_client_ca = ['{client_ca}']
enable_agent_mtls = {mtls}
enc_keyname = derived_tci_key
dec_payload_file = decrypted_payload
secure_size = 1m
tpm_ownerpassword = keylime
extract_payload_zip = False
enable_revocation_notifications = False
revocation_notification_ip = 127.0.0.1
revocation_notification_port = 18992
revocation_cert = default
revocation_actions =
payload_script =
enable_insecure_payload = False
measure_payload_pcr = -1
exponential_backoff = True
retry_interval = 2
max_retries = 2
tpm_hash_alg = sha256
tpm_encryption_alg = rsa
tpm_signing_alg = rsassa
ek_handle = generate
run_as =
"""
LOGGING_CONFIG = """\
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = line
[formatter_line]
format = %(levelname)s %(message)s
[logger_root]
level = INFO
handlers = console
[handler_console]
class = StreamHandler
level = INFO
formatter = line
args = (sys.stderr,)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """A running agent, registered at a registrar. Its logs are plain files that a test may write."""

    agent_id: uuid.UUID
    port: int
    tcti: str
    swtpm: Swtpm
    ima_list: Path
    uefi_log: Path
    mtls: bool

    @property
    def url(self) -> str:
        return f"{'https' if self.mtls else 'http'}://127.0.0.1:{self.port}"


@contextmanager
def running_agent(
    directory: Path, registrar: Registrar, *, mtls: bool = True, again: Agent | None = None
) -> Iterator[Agent]:
    """An agent that has registered and serves quotes.

    Args:
        again: the agent that ran in this directory before, to be started once more.

    Its clients show the certificate of the registrar's CA: `registrar.client_cert`.
    """
    assert PYTHON.exists(), "the real Keylime agent is missing: make keylime"
    environment = keylime_environment(directory)
    swtpm = Swtpm(directory / "swtpm")
    agent = Agent(
        agent_id=again.agent_id if again else uuid.uuid4(),
        port=again.port if again else free_port(),
        tcti=swtpm.tcti,
        swtpm=swtpm,
        ima_list=directory / "ima",
        uefi_log=directory / "uefi",
        mtls=mtls,
    )
    agent.ima_list.touch()
    agent.uefi_log.write_bytes(b"not a real firmware log")
    config = directory / "agent.conf"
    config.write_text(
        AGENT_CONFIG.format(
            agent_id=agent.agent_id,
            port=agent.port,
            registrar_port=registrar.port,
            client_ca=registrar.ca,
            mtls=mtls,
        )
    )
    logging = directory / "logging.conf"
    logging.write_text(LOGGING_CONFIG)
    environment |= {
        "KEYLIME_AGENT_CONFIG": str(config),
        "KEYLIME_LOGGING_CONFIG": str(logging),
        "TPM2TOOLS_TCTI": agent.tcti,
        "TEST_IMA_LIST": str(agent.ima_list),
        "TEST_UEFI_LOG": str(agent.uefi_log),
    }
    context = registrar.client_context() if mtls else None
    if context is not None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # self-signed; what tests need is its first answer
    swtpm.start()
    try:
        with running_keylime(
            [PYTHON, HERE / "run_agent.py"], directory, environment, agent.url, context=context
        ):
            yield agent
    finally:
        swtpm.close()


def binding_of(agent: Agent, registrar: Registrar) -> Bind:
    """The registrar's record of an agent, believed: for tests of what comes after."""

    async def bind() -> AgentBinding:
        async with httpx.AsyncClient(verify=registrar.client_context()) as http:
            answer = await http.get(f"{registrar.https_url}/v2.6/agents/{agent.agent_id}")
        record = answer.raise_for_status().json()["results"]
        context = None
        if agent.mtls:
            context = pinned_context(
                record["mtls_cert"].encode("ascii"),
                TlsFiles(
                    cert=registrar.client_cert, key=registrar.client_key, names=("", "cert", "key")
                ),
            )
        ak_public = base64.b64decode(record["aik_tpm"])
        return AgentBinding(
            ak=parse_ak(ak_public),
            identity=HostIdentity(
                ak_public=ak_public,
                ek_public=base64.b64decode(record["ek_tpm"]),
                ek_cert=None,
                host_uuid=agent.agent_id,
                software=True,
            ),
            client=AgentClient(agent.url, context),
        )

    return bind
