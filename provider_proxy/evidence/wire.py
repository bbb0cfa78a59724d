"""JSON and Keylime's quote string to and from the model: strict, bounded, versioned.

`parse_*` takes untrusted bytes and raises a typed error for anything that it does not read exactly;
`encode_*` writes what `parse_*` reads. A reader ignores result keys that it does not know; a
change of a known key's meaning needs another `format`.
Keylime's quote string and PCR blob: docs/evidence-format.md, section "The quote string".
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping

from provider_proxy.errors import EvidenceFormatError
from provider_proxy.evidence.model import (
    ALL_PCRS,
    HASH_BYTES,
    MASK_RE,
    MAX_CLAIMS_BYTES,
    MAX_TREE_SIZE,
    SALT_BYTES,
    AkName,
    ClockState,
    Evidence,
    HashAlg,
    HostLogs,
    InclusionProof,
    PcrMask,
    PcrValues,
    Quote,
    Timing,
    pcrs_of,
)
from provider_proxy.evidence.strict_json import Fields, from_base64, parse_json_object

FORMAT = 1
MAX_EVIDENCE_BYTES = 64 * 1024  # a quote, 24 SHA-512 PCRs, a path of 20 and claims make 35 kB
MAX_EVIDENCE_WITH_LOGS_BYTES = 10 * 1024 * 1024  # 7 MiB of IMA list, 1 MiB of event log in base64
MAX_MISSING_CHARS = 200
MAX_QUOTE_STRING = 16 * 1024
MAX_UINT32 = (1 << 32) - 1
MAX_UINT64 = (1 << 64) - 1
PATH_LIMIT = MAX_TREE_SIZE.bit_length() - 1

_BLOB_BANKS = 16  # tpm2-tools' TPML_PCR_SELECTION has 16 places whatever is used
_BLOB_LIST = 8  # digests in one TPML_DIGEST
_BLOB_BUFFER = 64
_SELECTION = struct.Struct("<HB4sx")  # hash, sizeofSelect, pcrSelect[4], a pad byte


def clock_values(state: ClockState) -> dict[str, int]:
    """A clock state as a JSON object."""
    return {
        "reset_count": state.reset_count,
        "restart_count": state.restart_count,
        "clock_ms": state.clock_ms,
    }


def parse_clock(fields: Fields) -> ClockState:
    """Read what `clock_values` writes. Raises: EvidenceFormatError."""
    return ClockState(
        reset_count=fields.integer("reset_count", MAX_UINT32),
        restart_count=fields.integer("restart_count", MAX_UINT32),
        clock_ms=fields.integer("clock_ms", MAX_UINT64),
    )


def encode_pcr_blob(pcrs: PcrValues) -> bytes:
    """The PCR values as `tpm2_quote -o` writes them on a little-endian machine."""
    selected = pcrs.mask.to_bytes(4, "little")
    parts = [
        struct.pack("<I", 1),
        _SELECTION.pack(pcrs.bank, 3, selected),
        bytes(_SELECTION.size * (_BLOB_BANKS - 1)),
    ]
    digests = [digest for _, digest in pcrs.values]
    chunks = [digests[at : at + _BLOB_LIST] for at in range(0, len(digests), _BLOB_LIST)]
    parts.append(struct.pack("<I", len(chunks)))
    for chunk in chunks:
        parts.append(struct.pack("<I", len(chunk)))
        for digest in chunk:
            parts.append(struct.pack("<H", len(digest)) + digest.ljust(_BLOB_BUFFER, b"\0"))
        parts.append(bytes((2 + _BLOB_BUFFER) * (_BLOB_LIST - len(chunk))))
    return b"".join(parts)


def parse_pcr_blob(data: bytes) -> PcrValues:
    """Read what `encode_pcr_blob` writes, and nothing else: one bank, ascending PCRs.

    Raises:
        EvidenceFormatError: any other structure.
    """
    head = 4 + _SELECTION.size * _BLOB_BANKS + 4
    if len(data) < head:
        raise EvidenceFormatError("the PCR blob ends early")
    alg, size, selected = _SELECTION.unpack_from(data, 4)
    mask = int.from_bytes(selected, "little")
    try:
        bank = HashAlg(alg)
    except ValueError:
        raise EvidenceFormatError("the PCR blob is of an unknown bank") from None
    if size != 3 or not 0 < mask <= ALL_PCRS:
        raise EvidenceFormatError("the PCR blob's selection is not of PCRs 0 to 23")
    width = bank.digest_bytes
    numbers = pcrs_of(mask)
    values = []
    for place, pcr in enumerate(numbers):
        chunk, slot = divmod(place, _BLOB_LIST)
        start = head + chunk * (4 + _BLOB_LIST * (2 + _BLOB_BUFFER)) + 4
        start += slot * (2 + _BLOB_BUFFER) + 2
        values.append((pcr, data[start : start + width]))
    pcrs = PcrValues(bank=bank, values=tuple(values))
    if encode_pcr_blob(pcrs) != data:  # counts, sizes, padding: one form only
        raise EvidenceFormatError("the PCR blob is not in its one canonical form")
    return pcrs


def encode_quote(quote: Quote) -> str:
    """Keylime's quote string: `r` base64(TPMS_ATTEST) `:` base64(TPMT_SIGNATURE) `:` base64(blob)."""
    parts = (quote.attest, quote.signature, encode_pcr_blob(quote.pcrs))
    return "r" + ":".join(base64.b64encode(part).decode("ascii") for part in parts)


def parse_quote(text: str) -> Quote:
    """Raises: EvidenceFormatError where this is not a quote string of three parts."""
    parts = text.split(":")
    if not text.startswith("r") or len(parts) != 3:
        raise EvidenceFormatError("the quote is not r<attest>:<signature>:<pcrs>")
    attest, signature, blob = (
        from_base64(part, what)
        for part, what in zip(
            (parts[0][1:], *parts[1:]), ("attest", "signature", "pcrs"), strict=True
        )
    )
    return Quote(attest=attest, signature=signature, pcrs=parse_pcr_blob(blob))


def parse_evidence(body: bytes) -> Evidence:
    """Read the body of an answer to `GET /verifier/quote` (Keylime's envelope, format 1).

    Raises:
        EvidenceFormatError: too large, not this format, or a value out of its bounds.
    """
    if len(body) > MAX_EVIDENCE_WITH_LOGS_BYTES:
        raise EvidenceFormatError("the reply is too large")
    fields = Fields(parse_json_object(body, "the reply"), "reply").fields("results")
    if fields.integer("format", MAX_UINT32) != FORMAT:
        raise EvidenceFormatError("the evidence is of a format that this version does not read")
    merkle = fields.fields("merkle")
    try:
        hash_alg = HashAlg.from_label(fields.text("hash_alg", 16))
        bank = HashAlg.from_label(fields.text("bank", 16))
    except KeyError:
        raise EvidenceFormatError("hash_alg or bank is unknown") from None
    mask = fields.text("mask", 10)
    if not MASK_RE.fullmatch(mask):
        raise EvidenceFormatError("mask is not 0x and hex digits")
    return Evidence(
        quote=parse_quote(fields.text("quote", MAX_QUOTE_STRING)),
        proof=InclusionProof(
            leaf_index=merkle.integer("leaf_index", MAX_TREE_SIZE),
            tree_size=merkle.integer("tree_size", MAX_TREE_SIZE),
            path=merkle.hex_list("path", PATH_LIMIT, HASH_BYTES),
            salt=merkle.hex("salt", SALT_BYTES),
        ),
        bank=bank,
        mask=PcrMask(int(mask, 16)),
        ak_name=AkName(fields.hex("ak_name", 66)),
        hash_alg=hash_alg,
        enc_alg=fields.text("enc_alg", 16),
        sign_alg=fields.text("sign_alg", 16),
        claims=fields.base64("claims", MAX_CLAIMS_BYTES) if "claims" in fields else None,
        boottime=fields.integer("boottime", 1 << 62) if "boottime" in fields else None,
        logs=_parse_logs(fields),
        timing=_parse_timing(fields.fields("timing")) if "timing" in fields else None,
    )


def _parse_logs(fields: Fields) -> HostLogs:
    limit = MAX_EVIDENCE_WITH_LOGS_BYTES
    ima = "ima_measurement_list" in fields
    return HostLogs(
        ima=fields.text("ima_measurement_list", limit) if ima else None,
        ima_entry=fields.integer("ima_measurement_list_entry", 1 << 40) if ima else 0,
        uefi=fields.base64("mb_measurement_list", limit)
        if "mb_measurement_list" in fields
        else None,
        ima_missing=_missing(fields, "ima_measurement_list_missing"),
        uefi_missing=_missing(fields, "mb_measurement_list_missing"),
    )


def _missing(fields: Fields, key: str) -> str | None:
    return fields.text(key, MAX_MISSING_CHARS) if key in fields else None


def _parse_timing(fields: Fields) -> Timing:
    return Timing(queued_ms=fields.number("queued_ms"), quote_ms=fields.number("quote_ms"))


def encode_envelope(code: int, status: str, results: Mapping[str, object]) -> bytes:
    """Keylime's envelope, which every answer of the server has."""
    return json.dumps(
        {"code": code, "status": status, "results": results}, separators=(",", ":")
    ).encode("utf-8")


def escape_text(text: str) -> bytes:
    """Text as JSON has it between the quotes."""
    return json.dumps(text).encode("ascii")[1:-1]


LogsPart = tuple[bytes, ...]
"""Logs as a part of an answer, in pieces, so that megabytes are not copied again."""


def encode_logs(logs: HostLogs, *, ima: tuple[int, LogsPart] | None = None) -> LogsPart | None:
    """Logs as a part of an answer; None where there are no logs and no reason for that.

    Args:
        ima: the IMA list's first entry and its text from there on, each piece through `escape_text`; in
            the place of `logs.ima`.
    """
    if logs.ima is not None:
        ima = logs.ima_entry, (escape_text(logs.ima),)
    parts: list[bytes] = []
    if ima is not None:
        entry, pieces = ima
        parts += [b',"ima_measurement_list":"', *pieces, b'"']
        parts.append(b',"ima_measurement_list_entry":%d' % entry)
    if logs.uefi is not None:
        parts += [b',"mb_measurement_list":"', base64.b64encode(logs.uefi), b'"']
    for key, missing in (
        (b"ima_measurement_list_missing", logs.ima_missing),
        (b"mb_measurement_list_missing", logs.uefi_missing),
    ):
        if missing is not None:
            parts.append(b',"%b":"%b"' % (key, escape_text(missing)))
    return tuple(parts) or None


class EvidenceEncoder:
    """Writes the answers of one batch: what they share is encoded once.

    Args:
        quote: the batch's one quote.
        quote_ms: how long it took.
        ak_name, hash_alg, enc_alg, sign_alg: of the AK that signed it.
        boottime: seconds since the epoch, as Keylime's agent; None where unknown.
    """

    def __init__(
        self,
        quote: Quote,
        *,
        ak_name: AkName,
        hash_alg: HashAlg,
        enc_alg: str,
        sign_alg: str,
        quote_ms: float,
        boottime: int | None = None,
    ) -> None:
        shared: dict[str, object] = {
            "format": FORMAT,
            "quote": encode_quote(quote),
            "bank": quote.pcrs.bank.label,
            "hash_alg": hash_alg.label,
            "enc_alg": enc_alg,
            "sign_alg": sign_alg,
            "mask": hex(quote.pcrs.mask),
            "ak_name": ak_name.hex(),
        }
        if boottime is not None:
            shared["boottime"] = boottime
        head = encode_envelope(200, "Success", shared)
        self._head = head[:-2]  # without the braces that close results and the envelope
        self._quote_ms = round(quote_ms, 3)

    def encode(
        self,
        proof: InclusionProof,
        *,
        claims: bytes | None = None,
        logs: LogsPart | None = None,
        queued_ms: float = 0.0,
    ) -> tuple[bytes, ...]:
        """One answer's body, in parts to be sent one after the other.

        Args:
            logs: of `encode_logs`; the same pieces for all answers with the same logs.
        """
        path = b"".join(proof.path).hex(",", -HASH_BYTES).replace(",", '","')
        tail = (
            f',"merkle":{{"leaf_index":{proof.leaf_index},"tree_size":{proof.tree_size},'
            f'"path":["{path}"],"salt":"{proof.salt.hex()}"}},'
            f'"timing":{{"queued_ms":{queued_ms:.3f},"quote_ms":{self._quote_ms}}}'
        )
        if not proof.path:
            tail = tail.replace('"path":[""]', '"path":[]')
        if claims is not None:
            tail += f',"claims":"{base64.b64encode(claims).decode("ascii")}"'
        if logs is None:
            return (self._head + tail.encode("ascii") + b"}}",)
        return (self._head + tail.encode("ascii"), *logs, b"}}")
