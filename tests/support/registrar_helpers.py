"""What tests of a registrar share."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from keylime_helpers import Registrar

from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.trust.registration.client import http_client, tls_context
from provider_proxy.trust.registration.registration import Registration
from provider_proxy.trust.registration.round import TpmIdentity


def certificate(key: ec.EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "EK")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )


def tls(registrar: Registrar, **changes: Any) -> RegistrarTable:
    table = RegistrarTable(
        url=registrar.https_url,
        ca=registrar.ca,
        client_cert=registrar.client_cert,
        client_key=registrar.client_key,
    )
    return replace(table, **changes)


def make(table: RegistrarTable, agent_id: str, tpm: TpmIdentity) -> Registration:
    context = tls_context("registrars.one", table)
    return Registration("one", table, agent_id, tpm, open_http=partial(http_client, context))


def record_of(registrar: Registrar, agent_id: str) -> dict[str, Any] | None:
    """As the tenant reads it; None where there is no active one."""
    with httpx.Client(verify=registrar.client_context()) as http:
        answer = http.get(f"{registrar.https_url}/v2.6/agents/{agent_id}")
    if answer.status_code == 404:
        return None
    return cast("dict[str, Any]", answer.json()["results"])


def delete(registrar: Registrar, agent_id: str) -> None:
    with httpx.Client(verify=registrar.client_context()) as http:
        http.delete(f"{registrar.https_url}/v2.6/agents/{agent_id}").raise_for_status()
