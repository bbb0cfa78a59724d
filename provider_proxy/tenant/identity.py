"""What a proxy says about its host's keys, read from `GET /verifier/identity`. Unsigned and untrusted."""

from __future__ import annotations

import re
from dataclasses import dataclass

from provider_proxy.errors import EvidenceFormatError
from provider_proxy.evidence.strict_json import Fields, parse_json_object

PATH = "/verifier/identity"
MAX_IDENTITY_BYTES = 64 * 1024
MAX_CHAIN = 8  # certificates between the EK's and its maker's
MAX_REGISTRATIONS = 100  # a tenant has one registrar, or a few
NAME_RE = re.compile(r"[A-Za-z0-9._-]{1,80}", re.ASCII)
MAX_CERTIFICATE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedRegistration:
    """The host in one of the tenant's own registrars, as the proxy says.

    Attributes:
        registrar: the provider's name for it.
        agent_id: the host's id there.
        state: "registered", for example; docs/registration.md has them all.
    """

    registrar: str
    agent_id: str
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedIdentity:
    """What a proxy *says* about its host's keys. Unsigned: compare it with the registrar's record.

    Attributes:
        ak_public, ek_public: TPM2B_PUBLIC, unparsed.
        ek_cert: DER; None where the TPM has none.
        ek_chain: CAs that may stand between `ek_cert` and its maker's, DER.
        registrations: those of the tenant that asked.
    """

    ak_public: bytes
    ek_public: bytes
    ek_cert: bytes | None
    host_uuid: str
    software: bool
    ek_chain: tuple[bytes, ...] = ()
    registrations: tuple[ClaimedRegistration, ...] = ()


def parse_identity(body: bytes) -> ClaimedIdentity:
    """Read the answer.

    Args:
        body: untrusted bytes, at most `MAX_IDENTITY_BYTES`.

    Raises:
        EvidenceFormatError: not an identity.
    """
    values = parse_json_object(body, "identity")
    results = Fields(values, "identity").fields("results")
    raw = values["results"]
    has_cert = isinstance(raw, dict) and raw.get("ek_cert") is not None
    if not isinstance(raw, dict) or not isinstance(raw.get("software"), bool):
        raise EvidenceFormatError("identity.results.software is not true or false")
    host_uuid = results.text("host_uuid", 36)
    if not NAME_RE.fullmatch(host_uuid):
        raise EvidenceFormatError("identity.results.host_uuid is not a valid UUID")
    return ClaimedIdentity(
        ak_public=results.base64("ak_tpm", 1024),
        ek_public=results.base64("ek_tpm", 1024),
        ek_cert=results.base64("ek_cert", MAX_CERTIFICATE_BYTES) if has_cert else None,
        host_uuid=host_uuid,
        software=bool(raw["software"]),
        ek_chain=_parse_chain(raw.get("ek_chain", [])),
        registrations=_parse_registrations(raw.get("registrations", [])),
    )


def _parse_chain(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > MAX_CHAIN:
        raise EvidenceFormatError(
            f"identity.results.ek_chain is not a list of at most {MAX_CHAIN} entries"
        )
    return tuple(
        Fields({"certificate": item}, "identity.results.ek_chain").base64(
            "certificate", MAX_CERTIFICATE_BYTES
        )
        for item in value
    )


def _parse_registrations(value: object) -> tuple[ClaimedRegistration, ...]:
    if not isinstance(value, list) or len(value) > MAX_REGISTRATIONS:
        raise EvidenceFormatError(
            f"identity.results.registrations is not a list of at most {MAX_REGISTRATIONS} entries"
        )
    found = []
    for item in value:
        fields = Fields(item if isinstance(item, dict) else {}, "identity.results.registrations")
        texts = {name: fields.text(name, 80) for name in ("registrar", "agent_id", "state")}
        if not all(map(NAME_RE.fullmatch, texts.values())):
            raise EvidenceFormatError(
                "identity.results.registrations has a name or state that is not valid"
            )
        found.append(ClaimedRegistration(**texts))
    return tuple(found)
