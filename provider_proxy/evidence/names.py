"""X.509 names, compared as RFC 5280 says: by value, not by the bytes that a CA happened to write.

A CA may write its name as a UTF8String in its own certificate and as a PrintableString in those that it
signs, with other capitals or spaces, and the parts of a multi-valued RDN in any order. Two such names
are the same name. Equality of names finds an issuer; only the signature shows that it signed.
Source: RFC 5280, section 7.1; RFC 4518, sections 2.2 to 2.6.
"""

from __future__ import annotations

import re
import unicodedata

from cryptography import x509

ComparableName = tuple[frozenset[tuple[str, str | bytes]], ...]
"""A name as a value: RDN by RDN, in order; the parts of an RDN have no order."""

SPACES_RE = re.compile(r"\s+")
# RFC 4518, 2.2: soft hyphens, joiners, variation selectors and the like are mapped to nothing.
NOTHING_RE = re.compile(
    "[\u00ad\u034f\u1806\u180b-\u180d\u200b-\u200f\u2060-\u2063\ufe00-\ufe0f\ufeff\ufffc]"
)


def comparable(name: x509.Name) -> ComparableName:
    """A name as it is compared: `==` and `hash` on what this returns.

    Args:
        name: parsed; no string in it is trusted.
    """
    return tuple(
        frozenset((part.oid.dotted_string, _prepared(part.value)) for part in rdn)
        for rdn in name.rdns
    )


def _prepared(value: str | bytes) -> str | bytes:
    if isinstance(value, bytes):  # a BIT STRING
        return value
    folded = unicodedata.normalize("NFKC", NOTHING_RE.sub("", value).casefold())
    return SPACES_RE.sub(" ", folded.casefold()).strip()
