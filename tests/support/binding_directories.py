"""The two directories of bindings for the contract tests: a fake one, and one over a registrar."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Protocol

import httpx
from fake_registrar import FakeRegistrar
from keylime_helpers import Registrar
from soft_ek import SoftHost


class Book(Protocol):
    """A registrar, seen from a host: what the contract test runs over."""

    @property
    def url(self) -> str: ...

    def client(self) -> httpx.AsyncClient: ...

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, object]]: ...


@dataclass
class FakeBook:
    fake: FakeRegistrar = field(default_factory=FakeRegistrar)
    url = FakeRegistrar.url

    def client(self) -> httpx.AsyncClient:
        return self.fake.client()

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, object]]:
        answer = self.fake.handle(method, path, body)
        return answer.status_code, answer.json() if answer.content else {}


@dataclass
class RealBook:
    registrar: Registrar

    @property
    def url(self) -> str:
        return self.registrar.https_url

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self.registrar.client_context(), trust_env=False)

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, object]]:
        request = urllib.request.Request(self.url + path, data=body or None, method=method)
        if body:
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(
                request, context=self.registrar.client_context(), timeout=20
            ) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as exc:
            content = exc.read()
            return exc.code, json.loads(content) if content else {}


def register(directory: Book, agent_id: str, host: SoftHost, *, activate: bool = True) -> None:
    """Take a host through registration, the credential opened in software."""
    status, answer = directory.ask("POST", f"/v2.6/agents/{agent_id}", host.body())
    assert status == 200, answer
    results = answer["results"]
    assert isinstance(results, dict)
    if activate:
        tag = host.answer(base64.b64decode(results["blob"]), agent_id)
        status, answer = directory.ask(
            "PUT", f"/v2.6/agents/{agent_id}", json.dumps({"auth_tag": tag}).encode()
        )
        assert status == 200, answer
