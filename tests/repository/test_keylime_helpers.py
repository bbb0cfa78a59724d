"""The real registrar comes up, speaks the versions that we rely on, and goes with all its workers."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from keylime_helpers import running_registrar

pytestmark = pytest.mark.real


def test_the_registrar_runs_twice_in_one_directory(tmp_path: Path) -> None:
    with running_registrar(tmp_path) as registrar:
        answer = json.loads(urllib.request.urlopen(f"{registrar.http_url}/version").read())
        assert "2.6" in answer["results"]["supported_versions"]
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{registrar.http_url}/version")
    with running_registrar(tmp_path, port=registrar.port, tls_port=registrar.tls_port) as again:
        url = f"{again.https_url}/v2.6/agents/"
        listed = json.loads(urllib.request.urlopen(url, context=again.client_context()).read())
        assert listed["results"]["uuids"] == []
