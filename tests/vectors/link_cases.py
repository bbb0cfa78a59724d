"""Vectors: a host's claims about a VM under a tenant's `VtpmLink`; two quotes that belong together."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from evidence_factory import (
    OTHER_VM,
    VM,
    FixedTpm,
    SealedBatch,
    ec_key,
    ecdsa_signature,
    pcr_blob,
    quote_text,
    request_number,
    rsa_key,
)

from provider_proxy.evidence.model import HashAlg, Nonce, PcrMask, Quote, QuoteRequest
from vectors.cases import MISSING, flip

CLAIMS = "ClaimsError"
FORM = "LinkClaimsError"

LINK_NOTES = {
    "Absent": "What the tenant wants is not what the host claims.",
    "Extensible": "A reader ignores keys that it does not know.",
    "Form": "One key left out, of another type, or out of bounds.",
    "Json": "JSON that readers could understand in two ways, or none at all.",
    "Link": "What a tenant may demand of a link.",
}
DEEP_NOTES = {
    "Deep": "The vTPM's quote, then the host's over its digest.",
    "Order": "The host's nonce does not hold this quote of the vTPM.",
    "Vtpm": "The vTPM's own quote; `cause` is the class of the check that refuses it.",
    "Host": "The host's evidence.",
    "Link": "The claims in the host's evidence.",
}


def spki_sha256(key: Any) -> str:
    """Hex SHA-256 of a key's SubjectPublicKeyInfo."""
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return sha256(spki).hexdigest()


RSA_EK = spki_sha256(rsa_key())
ECC_EK = spki_sha256(ec_key("ek"))
OTHER_EK = spki_sha256(ec_key("other ek"))
GOOD: dict[str, Any] = {
    "vm": str(VM),
    "eks": [
        {"alg": "rsa2048", "spki_sha256": RSA_EK},
        {"alg": "p384", "spki_sha256": ECC_EK},
    ],
    "running": True,
    "confirmed": True,
    "issuer": "delegate",
    "migrated": False,
    "generation": 3,
    "registered_at": 1_790_000_000,
}
WANTED: dict[str, Any] = {"vm": str(VM), "ek": RSA_EK, "least": "claimed", "issuer": None}


def claims_bytes(values: object = GOOD) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCase:
    """Claims, what the tenant wants, and the class that must be raised (empty: accepted)."""

    comment: str
    flags: tuple[str, ...]
    claims: bytes
    wanted: dict[str, Any]
    error: str = ""


def _case(comment: str, flags: str, error: str = "", **other: Any) -> LinkCase:
    fields = {"claims": claims_bytes(), "wanted": WANTED} | other
    return LinkCase(comment=comment, flags=tuple(flags.split()), error=error, **fields)


def _with(**changes: object) -> bytes:
    values = GOOD | changes
    return claims_bytes({key: value for key, value in values.items() if value is not MISSING})


def _ek(**changes: object) -> bytes:
    entry = {
        key: value for key, value in (GOOD["eks"][0] | changes).items() if value is not MISSING
    }
    return _with(eks=[entry, GOOD["eks"][1]])


def link_cases() -> Iterator[LinkCase]:
    yield _case("the EK is the first of two", "Link")
    yield _case("the EK is the second of two", "Link", wanted=WANTED | {"ek": ECC_EK})
    yield _case("claimed only, and no more is demanded", "Link", claims=_with(confirmed=False))
    yield _case("confirmed, as demanded", "Link", wanted=WANTED | {"least": "confirmed"})
    registered = _with(state="registered", confirmed=False)
    for least in ("claimed", "registered"):
        wanted = WANTED | {"least": least}
        yield _case(f"registered, {least} demanded", "Link", claims=registered, wanted=wanted)
    yield _case("confirmed by state and flag", "Link", claims=_with(state="confirmed"))
    yield _case("the issuer that is demanded", "Link", wanted=WANTED | {"issuer": "delegate"})
    yield _case("migrated here", "Link", claims=_with(migrated=True))
    yield _case("registered within a second", "Link", claims=_with(registered_at=1.5))
    yield _case("a key that nobody knows", "Extensible", claims=_with(color="green"))
    yield _case("a key that nobody knows at an EK", "Extensible", claims=_ek(color="green"))
    yield from _absent()
    yield from _forms()
    yield from _documents()


def _absent() -> Iterator[LinkCase]:
    unconfirmed = _with(confirmed=False)
    for comment, error, other in (
        ("another VM was ordered", "WrongVmError", {"wanted": WANTED | {"vm": str(OTHER_VM)}}),
        ("an EK that is not there", "EkNotLinkedError", {"wanted": WANTED | {"ek": OTHER_EK}}),
        ("no EK at all", "EkNotLinkedError", {"claims": _with(eks=[])}),
        (
            "one bit of the EK's digest",
            "EkNotLinkedError",
            {"claims": _ek(spki_sha256=_flip(RSA_EK))},
        ),
        ("not running", "VmNotRunningError", {"claims": _with(running=False)}),
        (
            "not confirmed, as demanded",
            "NotConfirmedError",
            {"claims": unconfirmed, "wanted": WANTED | {"least": "confirmed"}},
        ),
        (
            "registered, confirmed demanded",
            "NotConfirmedError",
            {
                "claims": _with(state="registered", confirmed=False),
                "wanted": WANTED | {"least": "confirmed"},
            },
        ),
        (
            "claimed, registered demanded",
            "NotConfirmedError",
            {"claims": unconfirmed, "wanted": WANTED | {"least": "registered"}},
        ),
        ("another issuer", "LinkIssuerError", {"wanted": WANTED | {"issuer": "tpm"}}),
        (
            "another EK, and not running: the EK comes first",
            "EkNotLinkedError",
            {"claims": _with(running=False), "wanted": WANTED | {"ek": OTHER_EK}},
        ),
    ):
        yield _case(comment, "Absent", error, **other)


def _flip(digest: str) -> str:
    return digest[:-1] + f"{int(digest[-1], 16) ^ 1:x}"


def _forms() -> Iterator[LinkCase]:
    bad: dict[str, tuple[object, ...]] = {
        "eks": (MISSING, None, {}, "", [None], [[]], [{}], [GOOD["eks"][0]] * 2, _many(17)),
        "running": (MISSING, None, 1, 0, "true", []),
        "confirmed": (MISSING, None, 1, "true"),
        # A state that nobody knows, and one that contradicts the flag, which is true here.
        "state": (None, 1, "", "attested", "CONFIRMED", "registered", "claimed", ["confirmed"]),
        "issuer": (MISSING, None, 1, "x" * 33, ["delegate"]),
        "migrated": (MISSING, None, 0, "false"),
        "generation": (MISSING, None, True, -1, 1.5, "3", 1 << 53),
        "registered_at": (MISSING, None, True, -1, "1", 1e300),
    }
    for key, values in bad.items():
        for value in values:
            yield _case(f"{key}: {_name(value)}", "Form", FORM, claims=_with(**{key: value}))
    yield _case(
        "a state that nobody knows, not confirmed",
        "Form",
        FORM,
        claims=_with(state="attested", confirmed=False),
    )
    digests = (MISSING, None, 1, "", RSA_EK[:-2], RSA_EK + "00", RSA_EK.upper(), "g" + RSA_EK[1:])
    for digest in digests:
        yield _case(f"digest: {_name(digest)}", "Form", FORM, claims=_ek(spki_sha256=digest))
    for alg in (MISSING, None, 1, "x" * 33):
        yield _case(f"alg: {_name(alg)}", "Form", FORM, claims=_ek(alg=alg))


def _many(count: int) -> list[dict[str, str]]:
    return [{"alg": "p256", "spki_sha256": f"{number:064x}"} for number in range(count)]


def _name(value: object) -> str:
    return "missing" if value is MISSING else json.dumps(value)[:48]


def _documents() -> Iterator[LinkCase]:
    good = claims_bytes()
    for comment, claims in (
        ("running twice, alike", good.replace(b'"running":true', b'"running":true,"running":true')),
        ("running twice", good.replace(b'"running":true', b'"running":false,"running":true')),
        ("an EK's digest twice", good.replace(b'"alg":"rsa2048"', b'"spki_sha256":"","alg":""', 1)),
        ("cut short", good[:-1]),
        ("text behind it", good + b"{}"),
        ("a list", b"[" + good + b"]"),
        ("NaN", good.replace(b"1790000000", b"NaN")),
        ("empty", b""),
        ("about another VM than was asked", _with(vm=str(OTHER_VM))),
        ("a VM in capitals", _with(vm=str(VM).upper())),
        ("without a VM", _with(vm=MISSING)),
        ("the VM a number", _with(vm=VM.int)),
    ):
        yield _case(comment, "Json", CLAIMS, claims=claims)


# --- two quotes -------------------------------------------------------------------------------------

NONCE = b"tenant-nonce-0123456789"
VTPM_MASK = 0x81


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepCase:
    """The vTPM's quote, the host's evidence, and the class that must be raised (empty: accepted).

    Attributes:
        cause: of `VtpmQuoteError`.
    """

    comment: str
    flags: tuple[str, ...]
    nonce: bytes
    vak: bytes
    vtpm_quote: str
    host_nonce: bytes
    evidence: bytes
    error: str = ""
    cause: str = ""


def vtpm(label: str = "vak") -> FixedTpm:
    return FixedTpm(ec_key(label))


def host_nonce(nonce: bytes, attest: bytes, signature: bytes) -> bytes:
    """The deep nonce, from the text of the format."""
    joined = struct.pack("B", len(nonce)) + nonce + sha256(attest).digest()
    joined += sha256(signature).digest()
    return sha256(b"provider-proxy/deep/1\x00" + joined).hexdigest().encode()


def _answer(nonce: bytes, claims: bytes) -> bytes:
    """What the host's proxy answers to this nonce, about `VM`."""
    request = QuoteRequest(nonce=Nonce(nonce), mask=PcrMask(0x83), vm=VM)
    batch = SealedBatch(
        tpm=FixedTpm(),
        requests=(request_number(30_000), request),
        claims=(None, claims),
        seed=3,
    )
    return batch.body(1)


def _text(quote: Quote, **parts: bytes) -> str:
    fields = {"attest": quote.attest, "signature": quote.signature, "blob": pcr_blob(quote.pcrs)}
    fields |= parts
    return quote_text(fields["attest"], fields["signature"], fields["blob"])


def deep_cases() -> Iterator[DeepCase]:
    own = vtpm()
    quote = own.quote(NONCE, HashAlg.SHA256, VTPM_MASK)
    asked = host_nonce(NONCE, quote.attest, quote.signature)
    good = DeepCase(
        comment="the host's quote after the vTPM's",
        flags=("Deep",),
        nonce=NONCE,
        vak=own.ak_public,
        vtpm_quote=_text(quote),
        host_nonce=asked,
        evidence=_answer(asked, claims_bytes()),
    )

    def bad(comment: str, flag: str, error: str, **changes: Any) -> DeepCase:
        return replace(good, comment=comment, flags=(flag,), error=error, **changes)

    def bad_vtpm(comment: str, cause: str, changed: Quote, **changes: Any) -> DeepCase:
        asked = host_nonce(NONCE, changed.attest, changed.signature)
        fields = {
            "vtpm_quote": _text(changed),
            "host_nonce": asked,
            "evidence": _answer(asked, claims_bytes()),
        }
        return bad(comment, "Vtpm", "VtpmQuoteError", cause=cause, **(fields | changes))

    yield good
    yield from _vtpm_cases(own, quote, bad_vtpm)
    later = own.attest(NONCE, HashAlg.SHA256, VTPM_MASK, safe=0)
    again = Quote(attest=later, signature=own.sign(later), pcrs=quote.pcrs)
    asked_again = host_nonce(NONCE, again.attest, again.signature)
    yield replace(
        good,
        comment="another quote of the vTPM, and the host's after it",
        vtpm_quote=_text(again),
        host_nonce=asked_again,
        evidence=_answer(asked_again, claims_bytes()),
    )
    yield bad(
        "another quote of the vTPM than the host's is over",
        "Order",
        "DeepNonceError",
        vtpm_quote=_text(again),
    )
    r, s = _numbers(quote.signature)
    twin = ecdsa_signature(r, N_P256 - s)
    yield bad(
        "the other of two ECDSA signatures",
        "Order",
        "DeepNonceError",
        vtpm_quote=_text(quote, signature=twin),
    )
    for comment, nonce in (
        ("the tenant's nonce itself", NONCE),
        ("a digest without the label", _bare(NONCE, quote)),
        ("a digest without the length", _no_length(NONCE, quote)),
        ("in capitals", asked.upper()),
    ):
        yield bad(
            f"host nonce: {comment}",
            "Order",
            "DeepNonceError",
            host_nonce=nonce,
            evidence=_answer(nonce, claims_bytes()),
        )
    yield bad(
        "evidence for another nonce",
        "Host",
        "QualifyingDataError",
        evidence=_answer(asked_again, claims_bytes()),
    )
    yield bad("evidence of another host", "Host", "SignatureError", evidence=_foreign(asked))
    yield bad(
        "the VM does not run there",
        "Link",
        "VmNotRunningError",
        evidence=_answer(asked, _with(running=False)),
    )
    yield bad(
        "another EK", "Link", "EkNotLinkedError", evidence=_answer(asked, _ek(spki_sha256=OTHER_EK))
    )


def _vtpm_cases(own: FixedTpm, quote: Quote, bad: Callable[..., DeepCase]) -> Iterator[DeepCase]:
    yield bad(
        "a bit of TPMS_ATTEST", "SignatureError", replace(quote, attest=flip(quote.attest, -1))
    )
    yield bad(
        "a bit of the signature",
        "SignatureError",
        replace(quote, signature=flip(quote.signature, -1)),
    )
    yield bad("another vAK", "SignatureError", quote, vak=vtpm("another").ak_public)
    other = own.quote(b"another-nonce-0123456789", HashAlg.SHA256, VTPM_MASK)
    yield bad("over another nonce", "QualifyingDataError", other)
    for comment, cause, fields in (
        ("not from inside a TPM", "NotAQuoteError", {"magic": 0xFF544348}),
        ("not a quote", "NotAQuoteError", {"kind": 0x8017}),
        ("another digest", "PcrDigestError", {"pcr_digest": bytes(32)}),
    ):
        attest = own.attest(NONCE, HashAlg.SHA256, VTPM_MASK, **fields)
        yield bad(comment, cause, Quote(attest=attest, signature=own.sign(attest), pcrs=quote.pcrs))
    wider = replace(quote, pcrs=own.read(HashAlg.SHA256, 0x83))
    yield bad("values of other PCRs", "PcrSelectionError", wider)
    narrow = own.quote(NONCE, HashAlg.SHA256, 0x1)
    yield bad("not the PCRs that the policy reads", "MaskNotCoveredError", narrow)


N_P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def _numbers(signature: bytes) -> tuple[int, int]:
    return int.from_bytes(signature[6:38], "big"), int.from_bytes(signature[40:72], "big")


def _bare(nonce: bytes, quote: Quote) -> bytes:
    joined = bytes([len(nonce)]) + nonce + sha256(quote.attest).digest()
    return sha256(joined + sha256(quote.signature).digest()).hexdigest().encode()


def _no_length(nonce: bytes, quote: Quote) -> bytes:
    joined = b"provider-proxy/deep/1\x00" + nonce + sha256(quote.attest).digest()
    return sha256(joined + sha256(quote.signature).digest()).hexdigest().encode()


def _foreign(nonce: bytes) -> bytes:
    request = QuoteRequest(nonce=Nonce(nonce), mask=PcrMask(0x83), vm=VM)
    batch = SealedBatch(
        tpm=FixedTpm(ec_key("another host")), requests=(request,), claims=(claims_bytes(),), seed=4
    )
    results = batch.results(0) | {"ak_name": FixedTpm().ak.name.hex()}
    return json.dumps({"code": 200, "status": "Success", "results": results}).encode()
