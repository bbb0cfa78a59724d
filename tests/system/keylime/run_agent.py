"""Starts Keylime 6.6.0's own agent against a registrar of 7.14; run by .venv-keylime-agent's Python.

The agent is the package's, unchanged. Between the two versions three things moved, and they are put
right from outside: the registrar wants a content type and the EK with every registration, and takes
no word in the place of an EK certificate.
Environment: TEST_IMA_LIST and TEST_UEFI_LOG name the host's logs.
"""

import json
import os

import requests
from keylime import config

config.IMA_ML = os.environ["TEST_IMA_LIST"]
config.MEASUREDBOOT_ML = os.environ["TEST_UEFI_LOG"]
config.MOUNT_SECURE = False

from keylime import registrar_client  # noqa: E402  # reads the configuration when imported
from keylime.cmd import agent  # noqa: E402

ek = ""
register = registrar_client.doRegisterAgent
send = requests.Session.request


def do_register(ip, port, agent_id, ek_tpm, *args, **kwargs):
    global ek
    ek = ek_tpm.decode() if isinstance(ek_tpm, bytes) else ek_tpm
    return register(ip, port, agent_id, ek_tpm, *args, **kwargs)


def request(self, method, url, **kwargs):
    kwargs["headers"] = {"Content-Type": "application/json"} | dict(kwargs.get("headers") or {})
    if method == "POST" and "/agents/" in url and isinstance(kwargs.get("data"), str):
        body = json.loads(kwargs["data"])
        body["ek_tpm"] = ek
        if body.get("ekcert") == "emulator":
            body["ekcert"] = None
        kwargs["data"] = json.dumps(body)
    return send(self, method, url, **kwargs)


registrar_client.doRegisterAgent = do_register
requests.Session.request = request
agent.main()
