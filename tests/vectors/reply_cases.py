"""Vectors: the JSON reply, field by field."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from evidence_factory import (
    FixedTpm,
    pcr_blob,
    rsa_key,
    seal,
)

from provider_proxy.evidence.model import HashAlg, PcrValues
from vectors.cases import MISSING, Base, Case, flip

FORMAT = "EvidenceFormatError"
SIGNATURE = "SignatureError"
CLAIMS = "ClaimsError"
INCLUSION = "InclusionError"
QUALIFYING = "QualifyingDataError"
SELECTION = "PcrSelectionError"
DIGEST = "PcrDigestError"


def base_case() -> Base:
    """The good answer that all of these are made from."""
    return Base(seal(FixedTpm(), 8), 3)


def json_cases() -> Iterator[Case]:
    base = base_case()
    yield base.case("unchanged: what the next are made from", "Batch")
    yield from _documents(base)
    yield from _unsigned(base)


def field_cases() -> Iterator[Case]:
    base = base_case()
    yield base.case("unchanged: what the next are made from", "Batch")
    yield from _fields(base)
    yield from _labels(base)


def quote_cases() -> Iterator[Case]:
    base = base_case()
    yield base.case("unchanged: what the next are made from", "Batch")
    yield from _quote_strings(base)
    yield from _blobs(base)


def _documents(base: Base) -> Iterator[Case]:
    body = base.body
    nested = b'"merkle":' + b"[" * 3000 + b"]" * 3000 + b',"unused":'
    for comment, flags, changed in (
        ("empty body", "Format", b""),
        ("not JSON", "Format", b"code=200"),
        ("cut short", "Format", body[:-1]),
        ("text after the document", "Format", body + b"{}"),
        ("two documents", "Format", body + b"\n" + body),
        ("a list around it", "Format", b"[" + body + b"]"),
        ("null", "Format", b"null"),
        ("results without their envelope", "Format", json.dumps(base.results).encode()),
        ("results missing", "Format", b'{"code":200,"status":"Success"}'),
        ("results null", "Format", b'{"code":200,"status":"Success","results":null}'),
        ("results a list", "Format", b'{"code":200,"status":"Success","results":[]}'),
        ("a byte order mark", "Encoding", b"\xef\xbb\xbf" + body),
        ("UTF-16", "Encoding", body.decode().encode("utf-16")),
        ("not UTF-8", "Encoding", base.replaced(b"Success", b"Succ\xe9s")),
        ("overlong UTF-8", "Encoding", base.replaced(b"Success", b"\xc0\xaf")),
        ("a comment", "Json", base.replaced(b'{"code"', b'{/**/"code"')),
        ("a trailing comma", "Json", body[:-1] + b",}"),
        ("results twice", "Json", body[:-1] + b',"results":{}}'),
        ("format twice, alike", "Json", base.replaced(b'"format":1', b'"format":1,"format":1')),
        (
            "format twice, first other",
            "Json",
            base.replaced(b'"format":1', b'"format":2,"format":1'),
        ),
        ("leaf_index twice", "Json", base.replaced(b'"merkle":{', b'"merkle":{"leaf_index":0,')),
        (
            "a key twice, once escaped",
            "Json",
            base.replaced(b'"bank"', b'"\\u0062ank":"sha1","bank"'),
        ),
        ("a key twice in an unknown object", "Json", body[:-2] + b',"x":{"a":1,"a":1}}}'),
        ("NaN", "Json", base.replaced(b'"queued_ms":0.0', b'"queued_ms":NaN')),
        ("Infinity", "Json", base.replaced(b'"queued_ms":0.0', b'"queued_ms":Infinity')),
        ("-Infinity in an unknown key", "Json", body[:-2] + b',"x":-Infinity}}'),
        (
            "a float beyond a double",
            "Json",
            base.replaced(b'"queued_ms":0.0', b'"queued_ms":1e999'),
        ),
        (
            "a number of 5000 digits",
            "Json",
            base.replaced(b'"format":1', b'"format":' + b"1" * 5000),
        ),
        ("5000 digits in an unknown key", "Json", body[:-2] + b',"x":' + b"1" * 5000 + b"}}"),
        ("3000 lists deep", "Json", base.replaced(b'"merkle":', nested)),
    ):
        yield base.case(comment, flags, FORMAT, body=changed)


def _fields(base: Base) -> Iterator[Case]:
    for key in (
        *(
            "format",
            "quote",
            "bank",
            "hash_alg",
            "enc_alg",
            "sign_alg",
            "mask",
            "ak_name",
            "merkle",
        ),
        *("merkle.leaf_index", "merkle.tree_size", "merkle.path", "merkle.salt"),
        *("timing.queued_ms", "timing.quote_ms"),
    ):
        yield base.case(f"{key} missing", "Field", FORMAT, body=base.edited(key, MISSING))
        yield base.case(f"{key} null", "Field", FORMAT, body=base.edited(key, None))
        wrong: object = [1] if key != "merkle.path" else "00"
        yield base.case(f"{key} of another type", "Field", FORMAT, body=base.edited(key, wrong))
    table: tuple[tuple[str, object], ...] = (
        ("format", 0), ("format", 2), ("format", -1), ("format", "1"), ("format", 1.0),
        ("format", True), ("format", 1 << 64),
        ("bank", "SHA256"), ("bank", "sm3_256"), ("bank", ""), ("bank", "sha256 "),
        ("hash_alg", "SHA256"), ("hash_alg", "sha256\x00"), ("hash_alg", "md5"),
        ("enc_alg", "e" * 17), ("sign_alg", "e" * 17),
        ("mask", "131"), ("mask", "83"), ("mask", "0x"), ("mask", "0x000000083"), ("mask", "-0x83"),
        ("mask", "0x8_3"), ("mask", "0x83\n"), ("mask", 131),
        ("ak_name", ""), ("ak_name", "000b0"), ("ak_name", "zz"), ("ak_name", "00" * 67),
        ("merkle.leaf_index", -1), ("merkle.leaf_index", 8), ("merkle.leaf_index", 1 << 64),
        ("merkle.leaf_index", 10**400), ("merkle.leaf_index", 3.0), ("merkle.leaf_index", "3"),
        ("merkle.leaf_index", True),
        ("merkle.tree_size", 0), ("merkle.tree_size", -8), ("merkle.tree_size", 8.0),
        ("merkle.tree_size", (1 << 20) + 1), ("merkle.tree_size", 1 << 21),
        ("merkle.tree_size", "8"),
        ("merkle.salt", "00" * 15), ("merkle.salt", "00" * 17), ("merkle.salt", ""),
        ("merkle.salt", "0" * 31), ("merkle.salt", "0g" * 16), ("merkle.salt", "00 " * 10),
        ("timing", []), ("timing", None), ("timing.queued_ms", -1), ("timing.queued_ms", True),
        ("timing.quote_ms", "1"),
        ("boottime", "now"), ("boottime", -1), ("boottime", 1 << 63),
        ("ima_measurement_list", 1), ("ima_measurement_list", "10 ..."),
        ("ima_measurement_list_entry", None),
        ("mb_measurement_list", "%"), ("mb_measurement_list", None),
    )  # fmt: skip
    for key, value in table:
        shown = json.dumps(value)
        shown = shown if len(shown) < 40 else shown[:37] + "..."
        body = base.edited(key, value)
        if key == "ima_measurement_list_entry":
            body = base.edited("ima_measurement_list", "")  # an entry number must stand beside it
            shown = "missing beside a list"
        yield base.case(f"{key} {shown}", "Field", FORMAT, body=body)


def _quote_strings(base: Base) -> Iterator[Case]:
    text = base.results["quote"]
    attest, signature, blob = text[1:].split(":")
    assert blob.endswith("A=")  # two spare bits, which a lax decoder drops
    for comment, changed in (
        ("no r before it", text[1:]),
        ("Keylime's deep quote, d", "d" + text[1:]),
        ("capital R", "R" + text[1:]),
        ("two parts", f"r{attest}:{signature}"),
        ("four parts", text + ":"),
        ("an empty TPMS_ATTEST", f"r:{signature}:{blob}"),
        ("an empty TPMT_SIGNATURE", f"r{attest}::{blob}"),
        ("an empty PCR blob", f"r{attest}:{signature}:"),
        (
            "zlib as in API 1.0",
            "r" + base64.b64encode(b"x\x9c\x03\x00\x00\x00\x00\x01").decode() + "::",
        ),
        ("longer than 16 kB", text + "A" * 16384),
    ):
        yield base.case(f"quote: {comment}", "Field", FORMAT, body=base.edited("quote", changed))
    for comment, changed in (
        ("spare bits set", text[:-2] + "B="),
        ("no padding", text.rstrip("=")),
        ("too much padding", text + "="),
        ("a newline inside", f"r{attest[:8]}\n{attest[8:]}:{signature}:{blob}"),
        ("a space at the end", text + " "),
        ("not an alphabet's letter", f"r*{attest[1:]}:{signature}:{blob}"),
        ("URL-safe alphabet", f"r_{attest[1:]}:{signature}:{blob}"),
        ("not ASCII", f"r\u00e9{attest[1:]}:{signature}:{blob}"),
        ("a lone surrogate", f"r\ud800{attest[1:]}:{signature}:{blob}"),
    ):
        yield base.case(
            f"quote, base64: {comment}", "Encoding", FORMAT, body=base.edited("quote", changed)
        )


def _blobs(base: Base) -> Iterator[Case]:
    pcrs = base.quote.pcrs
    blob = pcr_blob(pcrs)
    first = 4 + 8 * 16 + 4 + 4  # the first TPM2B_DIGEST
    for comment, changed in (
        ("cut short", blob[:-1]),
        ("a byte more", blob + b"\0"),
        ("only its head", blob[:100]),
        ("two banks", flip(blob, 0, 3)),
        ("no bank", flip(blob, 0, 1)),
        ("an unknown bank", flip(blob, 4, 0x12 ^ 0x0B)),
        ("sizeofSelect 4", flip(blob, 6, 7)),
        ("PCR 24", flip(blob, 10)),
        ("its padding byte set", flip(blob, 11)),
        ("no PCR", blob[:7] + bytes(3) + blob[10:]),
        ("no PCR and no list", blob[:7] + bytes(3) + blob[10:132] + bytes(4)),
        ("an unused selection filled", flip(blob, 12)),
        ("two lists of digests announced", flip(blob, first - 8, 3)),
        ("four digests announced", flip(blob, first - 4, 7)),
        ("a digest of 31 bytes", flip(blob, first, 0x3F)),
        ("a digest's padding filled", flip(blob, first + 2 + 63)),
        ("an unused digest filled", flip(blob, -1)),
        ("a PCR more than values", flip(blob, 7, 0x04)),
        ("a PCR less than values", flip(blob, 7, 0x02)),
    ):
        yield base.case(f"PCR blob: {comment}", "PcrBlob", FORMAT, body=base.requoted(blob=changed))
    values = dict(pcrs.values)

    def blob_of(numbers: dict[int, bytes], bank: HashAlg = HashAlg.SHA256) -> bytes:
        return pcr_blob(PcrValues(bank=bank, values=tuple(sorted(numbers.items()))))

    changed_value = blob_of(values | {1: flip(values[1], 0)})
    swapped = blob_of(values | {0: values[7], 7: values[0]})
    moved = blob_of({0: values[0], 1: values[1], 8: values[7]})
    fewer = blob_of({0: values[0], 1: values[1]})
    more = blob_of(values | {8: bytes(32)})
    sha1 = blob_of({pcr: value[:20] for pcr, value in values.items()}, HashAlg.SHA1)
    for comment, flags, error, body in (
        ("a value changed", "PcrBlob", DIGEST, base.requoted(blob=changed_value)),
        ("two values exchanged", "PcrBlob", DIGEST, base.requoted(blob=swapped)),
        ("PCR 7 shown as 8", "PcrBlob Selection", SELECTION, base.requoted(blob=moved)),
        ("and mask too", "PcrBlob Selection", SELECTION, base.requoted(blob=moved, mask="0x103")),
        ("PCR 7 left out", "PcrBlob Selection", SELECTION, base.requoted(blob=fewer)),
        ("and mask too", "PcrBlob Selection", SELECTION, base.requoted(blob=fewer, mask="0x3")),
        ("PCR 8 added", "PcrBlob Selection", SELECTION, base.requoted(blob=more)),
        ("and mask too", "PcrBlob Selection", SELECTION, base.requoted(blob=more, mask="0x183")),
        ("shown as SHA-1's", "PcrBlob Bank", SELECTION, base.requoted(blob=sha1)),
        ("and bank too", "PcrBlob Bank", SELECTION, base.requoted(blob=sha1, bank="sha1")),
    ):  # fmt: skip
        yield base.case(f"PCR blob: {comment}", flags, error, body=body)


def _labels(base: Base) -> Iterator[Case]:
    other = FixedTpm(rsa_key()).ak.name.hex()
    table: tuple[tuple[str, object, str], ...] = (
        ("bank", "sha1", SELECTION),
        ("bank", "sha384", SELECTION),
        ("mask", "0x0", SELECTION),
        ("mask", "0x3", SELECTION),
        ("mask", "0x183", SELECTION),
        ("mask", "0xff000083", SELECTION),
        ("hash_alg", "sha384", SIGNATURE),
        ("hash_alg", "sha1", SIGNATURE),
        ("sign_alg", "rsassa", SIGNATURE),
        ("sign_alg", "ECDSA", SIGNATURE),
        ("sign_alg", "", SIGNATURE),
        ("enc_alg", "rsa", SIGNATURE),
        ("enc_alg", "", SIGNATURE),
        ("ak_name", other, SIGNATURE),
        ("ak_name", "00", SIGNATURE),
    )
    for key, value, error in table:
        yield base.case(f"{key} {value!r}", "Label", error, body=base.edited(key, value))


def _unsigned(base: Base) -> Iterator[Case]:
    body = base.body
    logs: dict[str, Any] = {"ima_measurement_list": "10 ...\n", "ima_measurement_list_entry": 5}
    for comment, changed in (
        ("timing changed", base.edited("timing", {"queued_ms": 5, "quote_ms": 1e3})),
        ("timing left out", base.edited("timing", MISSING)),
        ("code and status changed", base.replaced(b'200,"status":"Success"', b'500,"status":"No"')),
        ("boottime given", base.edited("boottime", 1_700_000_000)),
        ("an IMA list", base.requoted(**logs)),
        ("a firmware log", base.edited("mb_measurement_list", "AAAA")),
    ):
        yield base.case(comment, "UnsignedField", body=changed)
    for key in ("ak_name", "merkle.salt", "merkle.path"):
        yield base.case(f"{key} in capitals", "Hex", body=base.edited(key, base.capitals(key)))
    yield base.case("zeros before the mask", "Hex", body=base.edited("mask", "0x00000083"))
    for comment, changed in (
        ("an unknown key", body[:-2] + b',"x":{"y":[1.5,null]}}}'),
        ("an unknown key in merkle", base.edited("merkle.x", 1)),
        ("an unknown key beside results", body[:-1] + b',"x":1}'),
        ("keys in another order", _reordered(base)),
        ("white space between tokens", json.dumps(json.loads(body), indent=1).encode()),
    ):
        yield base.case(comment, "Extensible", body=changed)


def _reordered(base: Base) -> bytes:
    envelope = json.loads(base.body)
    envelope["results"] = dict(reversed(envelope["results"].items()))
    return json.dumps(dict(reversed(envelope.items()))).encode()
