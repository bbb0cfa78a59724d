"""The command that Keylime's tenant runs to judge an EK certificate, run as Keylime runs it."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import trio
from helpers import command
from keylime_helpers import PYTHON, keylime_environment

KEYLIME_REFUSES = 7  # of KEYLIME_TENANT, below

# What Keylime's tenant does between the VM's quote and the hand-over of V. The quote is not ours to test.
KEYLIME_TENANT = """
import json, logging, sys
from keylime import keylime_logging
from keylime.common import algorithms
from keylime.tenant import Tenant
logging.basicConfig(stream=sys.stdout, level=logging.INFO, force=True)
tenant = Tenant.__new__(Tenant)
tenant.agent_uuid, tenant.agent_fid_str, tenant.nonce = sys.argv[1], "the agent", "nonce"
tenant.agent_api_version = "2.6"
tenant.registrar_data = json.loads(sys.argv[2])
tenant.tpm_instance = type("Checked", (), {"check_quote": lambda *_, **__: None})()
sys.exit(0 if tenant.validate_tpm_quote("key", "quote", algorithms.Hash("sha256")) else 7)
"""
TENANT_CONFIG = """\
[tenant]
version = 2.6
require_ek_cert = False
ek_check_script = {script}
tpm_cert_store = {folder}
"""


async def keylime_tenant(folder: Path, agent: str, ek: bytes, *words: str) -> tuple[int, str]:
    """Keylime's own tenant with these words of ours as its script; its exit code and its log."""
    script = folder / "check"
    script.write_text(f"#!/bin/sh\nexec {' '.join(command(*words))}\n")
    script.chmod(0o755)
    config = folder / "tenant.conf"
    config.write_text(TENANT_CONFIG.format(script=script, folder=folder))
    record = {"aik_tpm": "", "ek_tpm": base64.b64encode(ek).decode(), "ekcert": None, "regcount": 1}
    done = await trio.run_process(
        [PYTHON, "-c", KEYLIME_TENANT, agent, json.dumps(record)],
        env=keylime_environment(folder) | {"KEYLIME_TENANT_CONFIG": str(config)},
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout.decode()
