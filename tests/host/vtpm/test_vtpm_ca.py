"""The host's vTPM CA: certificates of the profile, the tenant's check of each of their fields, and the
key in a TPM. OpenSSL and Keylime judge what the real one makes."""

from __future__ import annotations

import base64
import datetime
import json
import struct
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from evidence_factory import OTHER_VM, VM, FixedTpm, ec_key, rsa_key
from helpers import connected, run_here
from http_server_helpers import make_server
from keylime_helpers import PYTHON, keylime_environment
from openssl_helpers import VERIFY_CERT
from tpm_helpers import AK_HANDLE, EK_HANDLE, Faults, Swtpm, open_quoter, swtpm_at, tool

from provider_proxy.common.files import FileLock
from provider_proxy.errors import (
    EkCertificateError,
    EvidenceFormatError,
    HostError,
    SelfCheckError,
    UntrustedCaError,
)
from provider_proxy.evidence import der, tpm_keys
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.tpm_writer import encode_public
from provider_proxy.evidence.vtpm_ca import (
    CA_MUST_HAVE,
    CA_QUALIFYING,
    MAX_CA_BYTES,
    OID_CERTIFY,
    VtpmCa,
    check_ca_certificate,
    check_vtpm_certificate,
    key_usage,
    parse_certify,
)
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.quoters import ca_signer
from provider_proxy.host.quoters.ca_signer import open_ca_signer
from provider_proxy.host.quoters.tpm_opener import OPEN_LOCK
from provider_proxy.host.vtpm import ca as vtpm_ca
from provider_proxy.host.vtpm import profile
from provider_proxy.host.vtpm.ca import CERTIFICATE_FILE, HostCa, open_host_ca
from provider_proxy.host.vtpm.requests import CertificateRequest
from provider_proxy.testing.disturb import Action

HOST = uuid.UUID("11111111-2222-4333-8444-555555555555")
CA_HANDLE = 0x81000101
CC_CERTIFY, CC_SIGN = 0x148, 0x15D  # TPM 2.0 Part 2, section 6.5.2
CA_ATTRIBUTES = sum(CA_MUST_HAVE.values()) | 1 << 6  # userWithAuth
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
EK_P384 = ec.derive_private_key(384, ec.SECP384R1()).public_key()
AK = FixedTpm()


def request_for(
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey | None = None, **changes: Any
) -> CertificateRequest:
    fields: dict[str, Any] = {
        "kind": "ek",
        "public_key": key or rsa_key().public_key(),
        "vm": VM,
        "vmid": f"web:{VM}",
        "spec_family": "2.0",
        "spec_level": 0,
        "spec_revision": 164,
        "manufacturer": "id:00001014",
        "model": "swtpm",
        "version": "id:20191023",
    }
    return CertificateRequest(**(fields | changes))


def certify_attest(
    name: bytes, qualifying: bytes = CA_QUALIFYING, *, magic: int = 0xFF544347, kind: int = 0x8017
) -> bytes:
    """A TPMS_ATTEST of TPM2_Certify, from the text of the specification."""

    def tpm2b(data: bytes) -> bytes:
        return struct.pack(">H", len(data)) + data

    clock = struct.pack(">QIIB", 1000, 1, 0, 1) + bytes(8)
    head = struct.pack(">IH", magic, kind) + tpm2b(bytes(34)) + tpm2b(qualifying)
    return head + clock + tpm2b(name) + tpm2b(bytes(34))


class SoftSigner:
    """A `vtpm.ca.Signer` of software, certified by `AK`."""

    def __init__(
        self, label: str = "vtpm ca", attributes: int = CA_ATTRIBUTES, ak: FixedTpm = AK
    ) -> None:
        self.key = ec_key(label)
        self.public = encode_public(self.key.public_key(), attributes)
        self.name = tpm_keys.parse_public(self.public).name
        self.ak = ak
        self.signed = 0
        self.certified = 0

    async def sign(self, digest: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        self.signed += 1
        return _tpm_signature(self.key, digest)

    async def certify(self, qualifying: bytes) -> tuple[bytes, bytes]:
        await trio.lowlevel.checkpoint()
        self.certified += 1
        attest = certify_attest(self.name, qualifying)
        return attest, self.ak.sign(attest)


def _tpm_signature(key: ec.EllipticCurvePrivateKey, digest: bytes) -> bytes:
    numbers = decode_dss_signature(key.sign(digest, ec.ECDSA(Prehashed(hashes.SHA256()))))
    parts = (struct.pack(">H", 32) + number.to_bytes(32, "big") for number in numbers)
    return struct.pack(">HH", 0x18, 0x0B) + b"".join(parts)


async def open_soft(folder: Path, signer: SoftSigner | None = None) -> HostCa:
    return await open_host_ca(
        signer or SoftSigner(), AK.ak, folder, host_uuid=HOST, now=lambda: NOW
    )


# --- DER --------------------------------------------------------------------------------------------


def test_der_is_written_as_openssl_writes_it() -> None:
    assert der.encode_oid("2.23.133.2.16").hex() == "06056781050210"
    assert der.encode_integer(0).hex() == "020100"
    assert der.encode_integer(164).hex() == "020200a4"
    assert der.encode_integer(127).hex() == "02017f"
    for size in (0, 1, 127, 128, 255, 256, 65535):
        content = bytes(size)
        made = der.encode(der.OCTET_STRING, content)
        assert der.parse(made, der.OCTET_STRING, "x") == content
        with pytest.raises(EvidenceFormatError):
            der.parse(made + b"\0", der.OCTET_STRING, "x")
        with pytest.raises(EvidenceFormatError):
            der.parse(made[:-1], der.OCTET_STRING, "x")


@pytest.mark.parametrize(
    "text", ["", "04", "0400", "0480", "048100", "04810161", "0482000161", "0483000001", "3080"]
)
def test_what_is_no_der_is_refused(text: str) -> None:
    tag = der.SEQUENCE if text != "0400" else der.SET
    for wanted in (tag, der.OCTET_STRING):
        if text == "0400" and wanted == der.OCTET_STRING:
            continue
        with pytest.raises(EvidenceFormatError):
            der.parse(bytes.fromhex(text), wanted, "x")


# --- what is issued ---------------------------------------------------------------------------------


async def test_the_ca_is_made_once(tmp_path: Path) -> None:
    signer = SoftSigner()
    ca = await open_soft(tmp_path, signer)
    checked = check_ca_certificate(ca.certificate, AK.ak)
    assert checked.name == signer.name
    assert str(HOST) in checked.subject
    assert (signer.certified, signer.signed) == (1, 1)
    again = await open_soft(tmp_path, signer)
    assert again.certificate == ca.certificate
    assert (signer.certified, signer.signed) == (1, 1)
    assert checked.certificate.not_valid_before_utc == NOW - vtpm_ca.BACKDATED


async def test_an_rsa_ak_certifies_as_well(tmp_path: Path) -> None:
    ak = FixedTpm(rsa_key())
    ca = await open_host_ca(SoftSigner(ak=ak), ak.ak, tmp_path, host_uuid=HOST)
    check_ca_certificate(ca.certificate, ak.ak)
    with pytest.raises(UntrustedCaError):
        check_ca_certificate(ca.certificate, AK.ak)


@pytest.mark.parametrize("spoil", ["other key", "damaged", "too large", "other ak", "other host"])
async def test_a_certificate_that_does_not_fit_is_made_anew(tmp_path: Path, spoil: str) -> None:
    signer = SoftSigner()
    path = tmp_path / CERTIFICATE_FILE
    old = await open_soft(tmp_path, signer)
    host, ak = HOST, AK
    if spoil == "other key":
        signer = SoftSigner("another key")
    elif spoil == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif spoil == "too large":
        path.write_bytes(bytes(MAX_CA_BYTES + 1))
    elif spoil == "other ak":
        ak = signer.ak = FixedTpm(ec_key("another ak"))
    else:
        host = uuid.uuid4()
    ca = await open_host_ca(signer, ak.ak, tmp_path, host_uuid=host)
    assert ca.certificate != old.certificate
    new = check_ca_certificate(ca.certificate, ak.ak)
    assert path.read_bytes() == ca.certificate
    same = spoil in ("damaged", "too large", "other ak")  # one key, one host: one subject
    assert (new.subject == check_ca_certificate(old.certificate, AK.ak).subject) == same


KEYS: dict[str, rsa.RSAPublicKey | ec.EllipticCurvePublicKey] = {
    "rsa2048": rsa_key().public_key(),
    "p256": ec_key("ek").public_key(),
    "p384": EK_P384,
}


@pytest.mark.parametrize("kind", ["ek", "platform"])
@pytest.mark.parametrize("key", KEYS)
async def test_certificates_are_of_the_profile(tmp_path: Path, key: str, kind: Any) -> None:
    ca = await open_soft(tmp_path)
    checked = check_ca_certificate(ca.certificate, AK.ak)
    made = await ca.issue(request_for(KEYS[key], kind=kind))
    cert = check_vtpm_certificate(made, checked, key=KEYS[key], vm=VM, kind=kind)
    assert len(made) <= 2048
    assert cert.serial_number.bit_length() == 159
    text = openssl_text(made)
    assert "Not After : Dec 31 23:59:59 9999 GMT" in text
    assert f"Subject: CN=web:{VM}" in text
    assert "X509v3 Subject Alternative Name: critical" in text
    assert "X509v3 Basic Constraints: critical\n                CA:FALSE" in text
    usage = "Key Encipherment" if key.startswith("rsa") else "Key Agreement"
    assert f"X509v3 Key Usage: critical\n                {usage}\n" in text
    if kind == "ek":
        assert "2.23.133.8.1" in text
        named = "DirName:/2.23.133.2.1=id:00001014/2.23.133.2.2=swtpm/2.23.133.2.3=id:20191023"
        assert named in text
        # As swtpm_localca writes tPMSpecification {"2.0", 0, 164}: recorded.
        assert bytes.fromhex("3019301706056781050210310E300C0C03322E30020100020200A4") in made
    else:
        assert "2.23.133.8.2" in text
        assert "/2.23.133.5.1.1=provider-proxy/2.23.133.5.1.4=QEMU/2.23.133.5.1.5=1" in text


# What OpenSSL 3.5 says where older ones have numbers.
NAMES_OF_OPENSSL = {
    "Endorsement Key Certificate": "2.23.133.8.1",
    "Platform Attribute Certificate": "2.23.133.8.2",
    "tcg-at-tpmManufacturer=": "2.23.133.2.1=",
    "tcg-at-tpmModel=": "2.23.133.2.2=",
    "tcg-at-tpmVersion=": "2.23.133.2.3=",
    "tcg-at-platformManufacturerStr=": "2.23.133.5.1.1=",
    "tcg-at-platformModel=": "2.23.133.5.1.4=",
    "tcg-at-platformVersion=": "2.23.133.5.1.5=",
}


def openssl_text(data: bytes) -> str:
    # One form of names, whatever the release of OpenSSL.
    command = ["openssl", "x509", "-inform", "der", "-noout", "-text", "-nameopt", "RFC2253"]
    done = subprocess.run(command, input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    for name, oid in NAMES_OF_OPENSSL.items():
        text = text.replace(name, oid)
    return text


async def test_two_certificates_have_two_serial_numbers(tmp_path: Path) -> None:
    ca = await open_soft(tmp_path)
    one, two = [x509.load_der_x509_certificate(await ca.issue(request_for())) for _ in range(2)]
    assert one.serial_number != two.serial_number


@pytest.mark.parametrize("name", ["x" * 27, "x" * 28, "x" * 255, "a:b", "näme"])
async def test_a_long_name_is_cut_and_the_uuid_is_not(tmp_path: Path, name: str) -> None:
    ca = await open_soft(tmp_path)
    made = await ca.issue(request_for(vmid=f"{name}:{VM}"))
    cert = x509.load_der_x509_certificate(made)
    (common,) = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert str(common.value) == f"{name[:27]}:{VM}"


@pytest.mark.parametrize(
    ("name", "kept"), [("機" * 12, "機" * 9), ("a" + "é" * 250, "a" + "é" * 13)]
)
async def test_a_name_is_cut_by_its_bytes(tmp_path: Path, name: str, kept: str) -> None:
    """The limit of a common name counts bytes; the builder raises where it is longer."""
    made = await (await open_soft(tmp_path)).issue(request_for(vmid=f"{name}:{VM}"))
    (common,) = x509.load_der_x509_certificate(made).subject.get_attributes_for_oid(
        NameOID.COMMON_NAME
    )
    assert str(common.value) == f"{kept}:{VM}"


async def test_a_signature_that_is_none_is_not_sent(tmp_path: Path) -> None:
    signer = SoftSigner()
    ca = await open_soft(tmp_path, signer)
    signer.key = ec_key("somebody else's")
    with pytest.raises(SelfCheckError):
        await ca.issue(request_for())
    with pytest.raises(SelfCheckError):
        await open_soft(tmp_path / "new", SoftSigner(ak=FixedTpm(ec_key("another ak"))))


# --- the tenant's check of the CA -------------------------------------------------------------------


@dataclass
class CaParts:
    """A CA's certificate, to be spoilt before it is made."""

    signer: SoftSigner
    attest: bytes
    signature: bytes
    area: bytes
    change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder] = lambda builder: builder
    key: Any = None
    signing_key: Any = None
    end: datetime.datetime | None = None
    drop: x509.ObjectIdentifier | None = None

    def make(self) -> bytes:
        builder = profile.ca_builder(
            self.key or self.signer.key.public_key(),
            host_uuid=HOST,
            not_before=NOW,
            serial=1,
            attest=self.attest,
            signature=self.signature,
            public_area=self.area,
        )
        if self.drop is not None:
            builder = without(builder, self.drop)
        if self.end is not None:
            builder._not_valid_after = self.end.replace(tzinfo=None)
        builder = self.change(builder)
        return builder.sign(self.signing_key or self.signer.key, hashes.SHA256()).public_bytes(
            Encoding.DER
        )


def parts(signer: SoftSigner | None = None, **attest: Any) -> CaParts:
    signer = signer or SoftSigner()
    made = certify_attest(signer.name, **attest)
    return CaParts(signer, made, signer.ak.sign(made), signer.public[2:])


def without(
    builder: x509.CertificateBuilder, oid: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    builder._extensions = [e for e in builder._extensions if e.oid != oid]
    return builder


def swapped(extension: x509.ExtensionType, *, critical: bool) -> Callable[..., Any]:
    def change(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        return without(builder, extension.oid).add_extension(extension, critical=critical)

    return change


def test_a_good_ca_passes() -> None:
    made = parts()
    ca = check_ca_certificate(made.make(), AK.ak)
    assert ca.name == made.signer.name
    assert parse_certify(made.attest) == (made.signer.name, CA_QUALIFYING)
    assert x509.load_pem_x509_certificate(ca.pem) == ca.certificate


def of_attributes(value: int) -> CaParts:
    return parts(SoftSigner(attributes=value))


def spoilt(**changes: Any) -> CaParts:
    made = parts()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def about_rsa(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    builder._public_key = rsa_key().public_key()
    return builder


OTHER = SoftSigner("another ca")
GOOD_CA = parts()
CA_OIDS = {
    "basicConstraints": x509.BasicConstraints.oid,
    "keyUsage": x509.KeyUsage.oid,
    "subjectKeyIdentifier": x509.SubjectKeyIdentifier.oid,
    "certify": OID_CERTIFY,
}
P384 = ec.derive_private_key(5, ec.SECP384R1())
BAD_CAS: dict[str, Callable[[], CaParts]] = {
    **{
        f"not {name}": partial(of_attributes, CA_ATTRIBUTES & ~bit)
        for name, bit in CA_MUST_HAVE.items()
    },
    "decrypts": lambda: of_attributes(CA_ATTRIBUTES | tpm_keys.DECRYPT),
    "restricted": lambda: of_attributes(CA_ATTRIBUTES | tpm_keys.RESTRICTED),
    "another AK": lambda: parts(SoftSigner(ak=FixedTpm(ec_key("another ak")))),
    "a bit of the attest": lambda: spoilt(attest=GOOD_CA.attest[:-1] + b"\1"),
    "a bit of the signature": lambda: spoilt(signature=GOOD_CA.signature[:-1] + b"\0"),
    "another key's statement": lambda: spoilt(
        attest=certify_attest(OTHER.name), signature=AK.sign(certify_attest(OTHER.name))
    ),
    "a statement about another key": lambda: spoilt(
        attest=certify_attest(OTHER.name),
        signature=AK.sign(certify_attest(OTHER.name)),
        area=OTHER.public[2:],
    ),
    "attributes that are another's": lambda: spoilt(
        area=of_attributes(CA_ATTRIBUTES | 1 << 10).area
    ),
    "for something else": lambda: parts(qualifying=sha256(b"something else").digest()),
    "for nothing": lambda: parts(qualifying=b""),
    "not from inside a TPM": lambda: parts(magic=0xFF544346),
    "a quote": lambda: parts(kind=0x8018),
    "text behind the statement": lambda: spoilt(
        attest=GOOD_CA.attest + b"\0", signature=AK.sign(GOOD_CA.attest + b"\0")
    ),
    "an empty statement": lambda: spoilt(attest=b"", signature=AK.sign(b"")),
    "a huge public area": lambda: spoilt(area=bytes(1200)),
    "signed by another key": lambda: spoilt(signing_key=ec_key("another ca")),
    "about a P-384 key": lambda: spoilt(key=P384.public_key(), signing_key=P384),
    "about an RSA key": lambda: spoilt(change=about_rsa, signing_key=rsa_key()),
    "ends in 9998": lambda: spoilt(end=profile.WITHOUT_END.replace(year=9998)),
    "no CA": lambda: spoilt(
        change=swapped(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    ),
    "a CA of CAs": lambda: spoilt(
        change=swapped(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    ),
    "constraints not critical": lambda: spoilt(
        change=swapped(x509.BasicConstraints(ca=True, path_length=0), critical=False)
    ),
    "usage of an EK": lambda: spoilt(change=swapped(key_usage(), critical=True)),
    "another key identifier": lambda: spoilt(
        change=swapped(x509.SubjectKeyIdentifier(bytes(20)), critical=False)
    ),
    "no statement at all": lambda: spoilt(
        change=swapped(x509.UnrecognizedExtension(OID_CERTIFY, b"\x05\x00"), critical=False)
    ),
    **{f"without {name}": partial(spoilt, drop=oid) for name, oid in CA_OIDS.items()},
}


@pytest.mark.parametrize("name", BAD_CAS)
def test_a_bad_ca_is_refused(name: str) -> None:
    with pytest.raises(UntrustedCaError):
        check_ca_certificate(BAD_CAS[name]().make(), AK.ak)


@pytest.mark.parametrize("data", [b"", b"\0", b"\x30\x00", bytes(MAX_CA_BYTES + 1)])
def test_what_is_no_certificate_is_no_ca(data: bytes) -> None:
    with pytest.raises(UntrustedCaError):
        check_ca_certificate(data, AK.ak)


def test_any_byte_of_a_ca_changed_gives_a_refusal_and_nothing_else() -> None:
    made = GOOD_CA.make()
    for at in range(len(made)):
        with pytest.raises(UntrustedCaError):
            check_ca_certificate(made[:at] + bytes([made[at] ^ 0x55]) + made[at + 1 :], AK.ak)
    for end in range(0, len(made), 7):
        with pytest.raises(UntrustedCaError):
            check_ca_certificate(made[:end], AK.ak)


# --- the tenant's check of a vTPM's certificate -----------------------------------------------------

CHECKED = check_ca_certificate(GOOD_CA.make(), AK.ak)


def issue(
    change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder] = lambda builder: builder,
    *,
    request: CertificateRequest | None = None,
    ca: VtpmCa = CHECKED,
    key: Any = None,
) -> bytes:
    builder = profile.vtpm_builder(
        request or request_for(), ca.certificate, not_before=NOW, serial=2
    )
    made = change(builder).sign(key or GOOD_CA.signer.key, hashes.SHA256())
    return made.public_bytes(Encoding.DER)


def ended(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    builder._not_valid_after = profile.WITHOUT_END.replace(year=2100, tzinfo=None)
    return builder


def renamed(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    builder._subject_name = x509.Name([])
    return builder


NO_NAME = x509.SubjectAlternativeName([x509.DNSName("vm.example.org")])
SHORT_NAME = x509.SubjectAlternativeName(
    [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))]
)
BAD_CERTIFICATES: dict[str, bytes] = {
    "another EK": issue(request=request_for(EK_P384)),
    "another VM": issue(request=request_for(vm=OTHER_VM, vmid=f"web:{OTHER_VM}")),
    "a platform's": issue(request=request_for(kind="platform")),
    "signed by another": issue(key=ec_key("another ca")),
    "ends": issue(ended),
    "without a name": issue(renamed),
    "a CA": issue(swapped(x509.BasicConstraints(ca=True, path_length=0), critical=True)),
    "usage of a CA": issue(swapped(key_usage(cert_sign=True), critical=True)),
    "usage of an EC key": issue(swapped(key_usage(key=EK_P384), critical=True)),
    "usage not critical": issue(swapped(key_usage(key=rsa_key().public_key()), critical=False)),
    "for servers": issue(
        swapped(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    ),
    "another authority": issue(
        swapped(x509.AuthorityKeyIdentifier(bytes(20), None, None), critical=False)
    ),
    "a DNS name": issue(swapped(NO_NAME, critical=True)),
    "another directory name": issue(swapped(SHORT_NAME, critical=True)),
    "one extension more": issue(
        lambda builder: builder.add_extension(x509.OCSPNoCheck(), critical=False)
    ),
    "one extension less": issue(lambda builder: without(builder, x509.ExtendedKeyUsage.oid)),
    "empty": b"",
    "too long": issue() + bytes(2048),
}


@pytest.mark.parametrize("name", BAD_CERTIFICATES)
def test_a_bad_certificate_is_refused(name: str) -> None:
    with pytest.raises(EkCertificateError):
        check_vtpm_certificate(BAD_CERTIFICATES[name], CHECKED, key=rsa_key().public_key(), vm=VM)


def test_another_ek_of_the_same_kind_is_refused() -> None:
    key, other = ec_key("ek").public_key(), ec_key("other ek").public_key()
    made = issue(request=request_for(key))
    check_vtpm_certificate(made, CHECKED, key=key, vm=VM)
    with pytest.raises(EkCertificateError, match="another EK"):
        check_vtpm_certificate(made, CHECKED, key=other, vm=VM)


def test_any_byte_of_a_certificate_changed_gives_a_refusal_and_nothing_else() -> None:
    made = issue()
    check_vtpm_certificate(made, CHECKED, key=rsa_key().public_key(), vm=VM)
    for at in range(0, len(made), 3):
        changed = made[:at] + bytes([made[at] ^ 0x55]) + made[at + 1 :]
        with pytest.raises(EkCertificateError):
            check_vtpm_certificate(changed, CHECKED, key=rsa_key().public_key(), vm=VM)


# --- the command ------------------------------------------------------------------------------------


def test_the_command_checks_saved_certificates(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(CHECKED.pem)
    (tmp_path / "ak").write_bytes(AK.ak_public)
    (tmp_path / "other-ak").write_bytes(FixedTpm(ec_key("another ak")).ak_public)
    (tmp_path / "ek.cert").write_bytes(issue())
    (tmp_path / "ek").write_bytes(
        base64.b64encode(encode_public(rsa_key().public_key(), 0x000300B2))
    )
    check = ("vtpm-ca", "check", "ca.pem", "--ak-tpm")
    of_ek = ("--ek-cert", "ek.cert", "--ek", "ek", "--vm")
    done = run_here(*check, "ak", *of_ek, str(VM), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["key_name"] == GOOD_CA.signer.name.hex()
    for words, code, error in (
        (("ak",), 0, ""),
        (("other-ak",), 1, "UntrustedCaError"),
        (("ak", *of_ek, str(OTHER_VM)), 1, "EkCertificateError"),
        (("ak", *of_ek, "web"), 2, "UUID"),
        (("ak", *of_ek[:2]), 2, "belong together"),
    ):
        done = run_here(*check, *words, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert error in done.stderr
    (tmp_path / "ca.pem").write_bytes(b"-----BEGIN nothing")
    assert run_here(*check, "ak", cwd=tmp_path).returncode == 2


async def test_the_route_gives_the_certificate() -> None:
    async def no_submit(*_args: object, **_kwargs: object) -> Any:
        raise AssertionError("nothing is asked here")

    async with connected(make_server(no_submit, vtpm_ca=b"der")) as wire:
        results = (await wire.get("/verifier/vtpm-ca")).results()
        assert results == {"ca_cert": base64.b64encode(b"der").decode()}


# --- in a TPM ---------------------------------------------------------------------------------------


async def open_real(
    made: Swtpm, folder: Path, work: Callable[[HostCa, Any], Any], **more: Any
) -> None:
    """Open a CA over a swtpm, as the daemon does."""
    async with open_quoter(made.tcti, folder, **more) as quoter:
        settings = Tpm(tcti=made.tcti)
        signer = await open_ca_signer(quoter, settings, folder, CA_HANDLE)
        ca = await open_host_ca(signer, quoter.ak, folder, host_uuid=HOST)
        await work(ca, quoter)


EVICT = ("tpm2_evictcontrol", "-C", "o", "-c", hex(CA_HANDLE))
SIGNING = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"


@pytest.mark.real
async def test_a_ca_in_a_tpm(tmp_path: Path) -> None:
    found: dict[str, bytes] = {}
    with swtpm_at(tmp_path / "tpm") as made:

        async def work(ca: HostCa, quoter: Any) -> None:
            checked = check_ca_certificate(ca.certificate, quoter.ak)
            for name, key in KEYS.items():
                found[name] = await ca.issue(request_for(key))
                check_vtpm_certificate(found[name], checked, key=key, vm=VM)
            found["ca"] = ca.certificate
            found["pem"] = checked.pem
            found["ak"] = quoter.identity.ak_public

        await open_real(made, tmp_path / "state", work)
        # Again, as after a restart: the same key, the same certificate.
        before = found["ca"]
        faults = Faults()
        await open_real(made, tmp_path / "state", work, faults=faults)
        assert found["ca"] == before
        assert faults.count(CC_CERTIFY) == 0
        assert faults.count(CC_SIGN) == 3
        attributes = tool(made.tcti, "tpm2_readpublic", "-c", hex(CA_HANDLE))
        assert "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|sign" in attributes
    # The certificates stand without the TPM: OpenSSL's and Keylime's own judgement.
    store = tmp_path / "store"
    store.mkdir()
    (store / "ca.pem").write_bytes(found["pem"])
    for name in KEYS:
        path = tmp_path / f"{name}.cert"
        path.write_bytes(found[name])
        pem = x509.load_der_x509_certificate(found[name]).public_bytes(Encoding.PEM)
        (tmp_path / f"{name}.pem").write_bytes(pem)
        words = ("openssl", "verify", "-x509_strict", "-CAfile", store / "ca.pem")
        await trio.run_process([*words, tmp_path / f"{name}.pem"], capture_stdout=True)
        await trio.run_process(
            [PYTHON, "-c", VERIFY_CERT, path, store], env=keylime_environment(tmp_path)
        )
    check_ca_certificate(found["ca"], parse_ak(found["ak"]))


@pytest.mark.real
async def test_the_ca_s_key_outlives_faults_and_is_never_overwritten(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with swtpm_at(tmp_path / "tpm") as made:
        faults = Faults()

        async def work(ca: HostCa, quoter: Any) -> None:
            faults.next(CC_SIGN, Action(code=0x922), Action(code=0x902))  # RETRY, OBJECT_MEMORY
            with trio.fail_after(20):
                await ca.issue(request_for())
            assert quoter.state.trouble is None
            tool(made.tcti, *EVICT)
            with pytest.raises(HostError, match="no longer holds"):
                await ca.issue(request_for())
            words = ("tpm2_createprimary", "-C", "o", "-G", "ecc:ecdsa-sha256:null", "-c")
            tool(made.tcti, *words, "k.ctx", "-a", SIGNING, cwd=tmp_path)
            tool(made.tcti, *EVICT[:3], "-c", "k.ctx", hex(CA_HANDLE), cwd=tmp_path)
            with pytest.raises(HostError, match="no longer holds"):
                await ca.issue(request_for())
            tool(made.tcti, *EVICT)
            assert quoter.state.trouble is None  # quotes go on

        await open_real(made, state, work, faults=faults)
        async with open_quoter(made.tcti, state) as quoter:
            with pytest.raises(HostError, match="no longer holds the vTPM CA's key"):
                await open_ca_signer(quoter, Tpm(tcti=made.tcti), state, CA_HANDLE)
        (state / ca_signer.KEY_FILE).unlink()
        for handle, words in ((AK_HANDLE, "is not a vTPM CA's"), (EK_HANDLE, "is not a vTPM CA's")):
            (state / ca_signer.KEY_FILE).write_text(json.dumps({"auth": "00" * 32}))
            (state / ca_signer.KEY_FILE).chmod(0o600)
            async with open_quoter(made.tcti, state) as quoter:
                with pytest.raises(HostError, match=words):
                    await open_ca_signer(quoter, Tpm(tcti=made.tcti), state, handle)


@pytest.mark.real
async def test_two_starts_take_turns_at_the_ca_s_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the authValue on the disk is that of the key in the chip."""
    with swtpm_at(tmp_path / "chip") as made:
        state = tmp_path / "s"
        async with open_quoter(made.tcti, state) as quoter:
            lock = FileLock(state / OPEN_LOCK)
            assert lock.take()
            monkeypatch.setattr(ca_signer, "OPEN_LIMIT_S", 0.3)
            with pytest.raises(HostError, match=f"another process holds {state / OPEN_LOCK}"):
                await open_ca_signer(quoter, Tpm(tcti=made.tcti), state, CA_HANDLE)
            assert not (state / ca_signer.KEY_FILE).exists()
            lock.release()
            monkeypatch.setattr(ca_signer, "OPEN_LIMIT_S", 60.0)
            await open_ca_signer(quoter, Tpm(tcti=made.tcti), state, CA_HANDLE)
            assert lock.take()
            lock.release()
