"""What OpenSSL says of a certificate: the judge that our own reading is held against."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.trust.ek_certificate import parse_certificate

NAME_RE = re.compile(r"(\s*(?:Subject: |Issuer: |DirName:)/?)(.*)")


def openssl_text(data: bytes) -> list[str]:
    """Its reading, but for serial number and signature; the parts of a multi-valued RDN in order."""
    command = ["openssl", "x509", "-inform", "DER", "-noout", "-text", "-nameopt", "RFC2253"]
    command += ["-certopt", "no_serial,no_signame,no_sigdump"]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    lines = []
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        name = NAME_RE.fullmatch(line)
        if name is not None:
            line = name[1] + "+".join(sorted(re.split("[+]", name[2])))
        # How many CAs may be below who is no CA means nothing.
        lines.append(line.replace("CA:FALSE, pathlen:0", "CA:FALSE"))
    return lines


def check_same_as_openssl(data: bytes) -> None:
    """Key, names, validity and extensions are those that OpenSSL reads of the original bytes."""
    read = parse_certificate(data)
    copy = read.parsed.public_bytes(Encoding.DER)
    assert openssl_text(copy) == openssl_text(read.der)
    command = ["openssl", "x509", "-inform", "DER", "-noout", "-pubkey"]
    done = subprocess.run(command, input=read.der, capture_output=True, check=True)
    pem = read.parsed.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert done.stdout == pem


def openssl_verifies(data: bytes, anchors_pem: bytes, folder: Path) -> bool:
    """Whether `openssl verify -partial_chain` accepts a certificate, DER, under these anchors."""
    command = ["openssl", "x509", "-inform", "DER"]
    leaf = subprocess.run(command, input=data, check=True, capture_output=True).stdout
    return openssl_verifies_each([leaf], anchors_pem, folder)[0]


def openssl_verifies_each(leaves: Sequence[bytes], anchors_pem: bytes, folder: Path) -> list[bool]:
    """The same of several certificates, PEM.

    Critical extensions are ignored: OpenSSL does not know a directory name in a subjectAltName.
    """
    (folder / "anchors.pem").write_bytes(anchors_pem)
    paths = [folder / f"leaf-{number}.pem" for number in range(len(leaves))]
    for path, leaf in zip(paths, leaves, strict=True):
        path.write_bytes(leaf)
    command = ["openssl", "verify", "-ignore_critical", "-partial_chain"]
    command += ["-CAfile", str(folder / "anchors.pem"), *map(str, paths)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return [f"{path}: OK" in done.stdout for path in paths]


VERIFY_CERT = """
import sys
from keylime import cert_utils
der = open(sys.argv[1], "rb").read()
sys.exit(0 if cert_utils.verify_ek(der, sys.argv[2]) else 7)
"""
