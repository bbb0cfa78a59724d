"""Certificates as chips in the field carry them: signed by their CA in an encoding that is not DER.

A certificate is taken apart, edited, put together and signed again, so that the oddity is inside what
the CA signed. `ODD` names each kind; OpenSSL reads all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from soft_ek import Key

from provider_proxy.evidence import der

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, NULL = 0x01, 0x02, 0x03, 0x04, 0x05
PRINTABLE, T61, UTF8 = 0x13, 0x14, 0x0C
SEQUENCE, SET, EXTENSIONS = 0x30, 0x31, 0xA3
SAN, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE = (
    der.encode_oid(f"2.5.29.{n}")[2:] for n in (17, 19, 37)
)
COMMON_NAME, COUNTRY = der.encode_oid("2.5.4.3")[2:], der.encode_oid("2.5.4.6")[2:]
RSA_SHA256 = der.encode_oid("1.2.840.113549.1.1.11")[2:]


@dataclass
class Node:
    """An element: its contents as bytes, or as elements where it is constructed."""

    tag: int
    value: bytes | list[Node]
    long_length: bool = False

    @property
    def parts(self) -> list[Node]:
        assert isinstance(self.value, list)
        return self.value

    @property
    def data(self) -> bytes:
        assert isinstance(self.value, bytes)
        return self.value

    def encode(self) -> bytes:
        content = (
            self.value if isinstance(self.value, bytes) else b"".join(map(Node.encode, self.value))
        )
        if self.long_length:
            return bytes((self.tag, 0x84)) + len(content).to_bytes(4, "big") + content
        return der.encode(self.tag, content)


def parse(data: bytes) -> Node:
    """The element that the bytes are, in DER."""
    node, rest = _parse(data)
    assert not rest
    return node


def _parse(data: bytes) -> tuple[Node, bytes]:
    tag, size, start = data[0], data[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(data[2:start], "big")
    content, rest = data[start : start + size], data[start + size :]
    if not tag & 0x20:
        return Node(tag, content), rest
    parts: list[Node] = []
    while content:
        node, content = _parse(content)
        parts.append(node)
    return Node(tag, parts), rest


class Certificate:
    """A certificate that is edited; `signed` puts it together.

    Attributes:
        algorithm: the outer AlgorithmIdentifier; the inner one is `field(2)`.
    """

    def __init__(self, data: bytes) -> None:
        self.tbs, self.algorithm, self.signature = parse(data).parts

    def field(self, number: int) -> Node:
        """0 version, 1 serial, 2 algorithm, 3 issuer, 4 validity, 5 subject, 6 key, 7 extensions."""
        return self.tbs.parts[number]

    @property
    def extensions(self) -> list[Node]:
        return self.field(7).parts[0].parts

    def extension(self, oid: bytes) -> Node:
        """One extension: its OID, critical where it is, value."""
        return next(node for node in self.extensions if node.parts[0].value == oid)

    def signed(self, key: Key) -> bytes:
        """Signed again, by the same algorithm."""
        tbs = self.tbs.encode()
        if isinstance(key, ec.EllipticCurvePrivateKey):
            signature = key.sign(tbs, ec.ECDSA(hashes.SHA256()))
        else:
            signature = key.sign(tbs, padding.PKCS1v15(), hashes.SHA256())
        self.signature = Node(BIT_STRING, b"\0" + signature)
        return self.encode()

    def encode(self) -> bytes:
        """As it is, its signature the one that it had."""
        return Node(SEQUENCE, [self.tbs, self.algorithm, self.signature]).encode()


def edited(data: bytes, edit: Callable[[Certificate], None], key: Key) -> bytes:
    """A certificate with an oddity that its CA has signed."""
    certificate = Certificate(data)
    edit(certificate)
    return certificate.signed(key)


# --- the kinds ----------------------------------------------------------------------------------------


def _attribute(oid: bytes, tag: int, text: bytes) -> Node:
    return Node(SEQUENCE, [Node(der.OID, oid), Node(tag, text)])


def multi_valued(text: str) -> Node:
    """A name of one RDN with three parts that are not in the order of DER."""
    organisation = der.encode_oid("2.5.4.10")[2:]
    parts = [
        _attribute(COMMON_NAME, PRINTABLE, text.encode()),
        _attribute(organisation, PRINTABLE, b"Maker"),
        _attribute(COUNTRY, PRINTABLE, b"TW"),
    ]
    return Node(SEQUENCE, [Node(SET, sorted(parts, key=Node.encode, reverse=True)[0:3])])


def unordered_subject(certificate: Certificate) -> None:
    certificate.tbs.parts[5] = multi_valued("unordered")


def unordered_san(certificate: Certificate) -> None:
    """The chip's maker, model and version as one RDN, out of order, inside the SAN."""
    value = certificate.extension(SAN).parts[-1]
    names = parse(value.data)
    directory = names.parts[0].parts[0]
    attributes = [rdn.parts[0] for rdn in directory.parts]
    attributes.sort(key=Node.encode, reverse=True)
    directory.value = [Node(SET, attributes)]
    value.value = names.encode()


def critical_false(certificate: Certificate) -> None:
    certificate.extension(EXTENDED_KEY_USAGE).parts.insert(1, Node(BOOLEAN, b"\0"))


def critical_one(certificate: Certificate) -> None:
    """TRUE as 1: BER, not DER."""
    certificate.extension(BASIC_CONSTRAINTS).parts[1].value = b"\1"


def ca_false(certificate: Certificate) -> None:
    """BasicConstraints with its default written out."""
    value = certificate.extension(BASIC_CONSTRAINTS).parts[-1]
    value.value = Node(SEQUENCE, [Node(BOOLEAN, b"\0")]).encode()


def key_usage_bits(certificate: Certificate) -> None:
    """Bits that do not count are set: BER, not DER."""
    value = certificate.extension(der.encode_oid("2.5.29.15")[2:]).parts[-1]
    bits = bytearray(value.data)
    assert bits[:2] == b"\3\2"
    assert bits[2]
    bits[3] |= 1
    value.value = bytes(bits)


def pathlen_of_no_ca(certificate: Certificate) -> None:
    value = certificate.extension(BASIC_CONSTRAINTS).parts[-1]
    value.value = Node(SEQUENCE, [Node(INTEGER, b"\0")]).encode()


def half_key_identifier(certificate: Certificate) -> None:
    """An authorityKeyIdentifier that names the issuer and no serial number."""
    name = Node(0xA4, [certificate.field(3)])  # its CA is self-signed
    value = Node(SEQUENCE, [Node(0xA1, [name])]).encode()
    oid = Node(der.OID, der.encode_oid("2.5.29.35")[2:])
    certificate.extensions.append(Node(SEQUENCE, [oid, Node(OCTET_STRING, value)]))


def null_parameters(certificate: Certificate) -> None:
    for algorithm in (certificate.field(2), certificate.algorithm):
        algorithm.parts.append(Node(NULL, b""))


def no_parameters(certificate: Certificate) -> None:
    """Neither the signature's algorithm nor the key's has the NULL that RSA has."""
    for algorithm in (certificate.field(2), certificate.algorithm, certificate.field(6).parts[0]):
        del algorithm.parts[1:]


def wrong_string(certificate: Certificate) -> None:
    """PrintableStrings of characters that there are none of, and a T61String."""
    certificate.tbs.parts[5] = Node(
        SEQUENCE,
        [
            Node(SET, [_attribute(COMMON_NAME, PRINTABLE, b"chip_1 @ maker & sons")]),
            Node(SET, [_attribute(der.encode_oid("2.5.4.11")[2:], T61, b"M\xfcnchen")]),
        ],
    )


def long_lengths(certificate: Certificate) -> None:
    certificate.tbs.long_length = True
    certificate.field(4).long_length = True


def long_serial(certificate: Certificate) -> None:
    certificate.field(1).value = bytes(range(1, 33))


def negative_serial(certificate: Certificate) -> None:
    certificate.field(1).value = bytes.fromhex("e9baeb65d9d54492")


def zero_serial(certificate: Certificate) -> None:
    certificate.field(1).value = b"\0"


ODD_ANY = {
    "half a key identifier": half_key_identifier,
    "key usage with bits behind it": key_usage_bits,
    "pathlen of no CA": pathlen_of_no_ca,
    "critical=FALSE": critical_false,
    "critical=1": critical_one,
    "unordered subject": unordered_subject,
    "unordered SAN": unordered_san,
    "cA=FALSE": ca_false,
    "wrong strings": wrong_string,
    "long lengths": long_lengths,
    "long serial": long_serial,
    "negative serial": negative_serial,
    "serial 0": zero_serial,
}
ODD_EC = {"NULL with ECDSA": null_parameters}
ODD_RSA = {"no NULL with RSA": no_parameters}
