"""EK certificates and their chains: what vendors make passes, and what is slightly off fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from soft_ek import DAY, FOREVER, NOW, Authority, ek_certificate, key_usage, rsa_ek

from provider_proxy.errors import HostError, UntrustedEkError, UsageError
from provider_proxy.testing.soft_tpm import encode_ek
from provider_proxy.trust import ek_chain
from provider_proxy.trust.ek_chain import EK_PURPOSE, EkStore, EndorsementKey, check_chain, utc_now

ROOT = Authority("vendor root")
ISSUING = Authority("vendor issuing", ROOT, pathlen=0)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa_ek()
GOOD = ek_certificate(ISSUING, RSA_KEY)


def check(
    ek_cert: bytes = GOOD,
    *authorities: Authority,
    at: datetime = NOW,
    key: ek_chain.PublicKey | None = None,
) -> datetime:
    certificates = [a.certificate for a in authorities or (ROOT, ISSUING)]
    return check_chain(ek_cert, key or RSA_KEY.public_key(), certificates, at)


def refused(ek_cert: bytes, *authorities: Authority, match: str, at: datetime = NOW) -> None:
    with pytest.raises(UntrustedEkError, match=match):
        check(ek_cert, *authorities, at=at)


def test_a_vendor_s_chain_is_good_until_its_first_certificate_ends() -> None:
    assert check() == ISSUING.certificate.not_valid_after_utc
    assert check(ek_certificate(ROOT, RSA_KEY), ROOT) == ROOT.certificate.not_valid_after_utc


@pytest.mark.parametrize("order", [(ROOT, ISSUING), (ISSUING, ROOT)])
def test_the_order_of_the_directory_does_not_matter(order: Sequence[Authority]) -> None:
    check(GOOD, *order)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_ec_eks_and_rsa_cas(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    root = Authority("rsa root", key=RSA_KEY)
    check(ek_certificate(root, key), root, key=key.public_key())
    check(ek_certificate(root, key, digest=hashes.SHA384()), root, key=key.public_key())


def test_an_ek_certificate_without_an_end() -> None:
    forever = Authority("forever", ends=FOREVER)
    assert check(ek_certificate(forever, RSA_KEY), forever).year == 9999


def test_cross_signed_cas_of_one_name_are_all_tried() -> None:
    """Two certificates for one key, the one expired; and another CA that only has the name."""
    key = ec.generate_private_key(ec.SECP256R1())
    old = Authority("twice", ROOT, key=key, ends=NOW - DAY)
    new = Authority("twice", ROOT, key=key)
    stranger = Authority("twice", ROOT)
    check(ek_certificate(new, RSA_KEY), stranger, old, new, ROOT)


def test_as_many_cas_as_are_allowed_and_one_more() -> None:
    line = [Authority("0")]
    for number in range(1, ek_chain.MAX_ISSUERS + 1):
        line.append(Authority(str(number), line[-1]))
    check(ek_certificate(line[-2], RSA_KEY), *line)
    refused(ek_certificate(line[-1], RSA_KEY), *line, match="longer than 5")


def test_cas_that_sign_each_other_in_a_circle_lead_nowhere() -> None:
    a_key, b_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    a_root, b_root = Authority("a", key=a_key), Authority("b", key=b_key)
    a, b = Authority("a", b_root, key=a_key), Authority("b", a_root, key=b_key)
    refused(ek_certificate(a, RSA_KEY), a, b, match="no trusted root")


def test_many_cas_of_one_name_cost_a_bounded_time() -> None:
    crowd = [Authority("crowd", ROOT) for _ in range(ek_chain.MAX_SIGNATURE_CHECKS + 1)]
    refused(ek_certificate(Authority("crowd"), RSA_KEY), *crowd, ROOT, match="too many CAs")


# --- what is not an EK's certificate ----------------------------------------------------------------


def test_another_key() -> None:
    with pytest.raises(UntrustedEkError, match="another key"):
        check(key=rsa_ek(1).public_key())
    with pytest.raises(UntrustedEkError, match="another key"):
        check(key=EC_KEY.public_key())


def test_no_ca_for_it() -> None:
    refused(GOOD, ROOT, match="no CA for its issuer")
    refused(GOOD, ISSUING, match="own issuer is not in the directory")
    refused(ek_certificate(Authority("vendor issuing"), RSA_KEY), ROOT, ISSUING, match="signature")


def test_a_self_signed_certificate_vouches_for_nobody() -> None:
    own = Authority("own", key=RSA_KEY)
    refused(ek_certificate(own, RSA_KEY), ROOT, ISSUING, match="no CA for its issuer")


def test_one_bit_of_the_signature() -> None:
    refused(GOOD[:-1] + bytes([GOOD[-1] ^ 1]), ROOT, ISSUING, match="certificate")


@pytest.mark.parametrize(
    ("ek_cert", "why"),
    [
        (ek_certificate(ISSUING, RSA_KEY, purposes=()), "not meant for an EK"),
        (
            ek_certificate(ISSUING, RSA_KEY, purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)),
            "not meant for an EK",
        ),
        (
            ek_certificate(
                ISSUING, RSA_KEY, purposes=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)
            ),
            "not meant for an EK",
        ),
        (ek_certificate(ISSUING, RSA_KEY, is_ca=True), "is a CA's"),
        (
            ek_certificate(ISSUING, RSA_KEY, usage=key_usage(digital_signature=True)),
            "key usage that no EK has",
        ),
        (
            ek_certificate(
                ISSUING, RSA_KEY, usage=key_usage(key_encipherment=True, key_cert_sign=True)
            ),
            "key usage that no EK has",
        ),
        (ek_certificate(ISSUING, RSA_KEY, ends=NOW - DAY), "valid from 2020-01-01"),
        (ek_certificate(ISSUING, RSA_KEY, starts=NOW + DAY), "valid from"),
        (
            ek_certificate(ISSUING, RSA_KEY, critical=(x509.InhibitAnyPolicy(0),)),
            "critical extension 2.5.29.54",
        ),
    ],
)
def test_what_is_off_in_the_certificate(ek_cert: bytes, why: str) -> None:
    refused(ek_cert, ROOT, ISSUING, match=why)


NAMES = x509.NameConstraints([x509.DNSName("example.org")], None)


@pytest.mark.parametrize(
    ("authority", "why"),
    [
        (Authority("x", ROOT, is_ca=False), "basicConstraints"),
        (Authority("x", ROOT, is_ca=None), "basicConstraints"),
        (Authority("x", ROOT, may_sign=False), "keyUsage"),
        (Authority("x", ROOT, ends=NOW - DAY), "valid from"),
        (Authority("x", ROOT, starts=NOW + DAY), "valid from"),
        (Authority("x", ROOT, purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)), "other purposes"),
        (Authority("x", ROOT, critical=(NAMES,)), "critical extension 2.5.29.30"),
        (Authority("x", ISSUING), "pathlen"),
        (Authority("x", ROOT, key=ec.generate_private_key(ec.SECP192R1())), "weak"),
    ],
)
def test_what_is_off_in_a_ca(authority: Authority, why: str) -> None:
    refused(ek_certificate(authority, RSA_KEY), ROOT, ISSUING, authority, match=why)


def test_what_is_off_in_a_root() -> None:
    expired = Authority("expired", ends=NOW - DAY)
    refused(ek_certificate(expired, RSA_KEY), expired, match="valid from")
    short = Authority("short", pathlen=0)
    between = Authority("between", short)
    refused(ek_certificate(between, RSA_KEY), short, between, match="pathlen")


def test_cas_for_eks_may_say_so() -> None:
    for purpose in (EK_PURPOSE, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE):
        good = Authority("good", ROOT, purposes=(purpose,), may_sign=None)
        check(ek_certificate(good, RSA_KEY), ROOT, good)


def test_a_weak_hash_is_refused() -> None:
    refused(ek_certificate(ISSUING, RSA_KEY, digest=hashes.SHA224()), ROOT, ISSUING, match="weak")


@pytest.mark.parametrize("data", [b"", b"0", b"garbage", GOOD[:-1], GOOD + b"\0", b"\x30" * 20000])
def test_what_is_no_certificate(data: bytes) -> None:
    refused(data, ROOT, ISSUING, match="cannot be read|longer")


def test_any_change_of_a_byte_is_refused() -> None:
    """Each byte once: whatever parses is refused by one check or another, and nothing else escapes."""
    for position in range(len(GOOD)):
        data = bytearray(GOOD)
        data[position] ^= 0x41
        with pytest.raises(UntrustedEkError):
            check(bytes(data))


# --- the directory ----------------------------------------------------------------------------------


class Clocks:
    def __init__(self) -> None:
        self.now = NOW
        self.seconds = 100.0

    def store(self, directory: Path) -> EkStore:
        return EkStore(directory, now=lambda: self.now, clock=lambda: self.seconds)


EK_PUBLIC = encode_ek(RSA_KEY.public_key())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "bundle.pem").write_bytes(ISSUING.pem() + ROOT.pem())
    return tmp_path


def look(store: EkStore, ek_cert: bytes | None = GOOD) -> None:
    store.check(EndorsementKey(EK_PUBLIC, ek_cert, RSA_KEY.public_key()))


def test_a_directory_of_pem_and_der(tmp_path: Path) -> None:
    (tmp_path / "root.DER").write_bytes(ROOT.certificate.public_bytes(Encoding.DER))
    (tmp_path / "issuing.crt").write_bytes(ISSUING.pem())
    (tmp_path / "README").write_bytes(b"not looked at")
    look(Clocks().store(tmp_path))


def test_a_verdict_is_remembered_and_equality_is_not(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: object) -> datetime:
        calls.append(args)
        return check_chain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ek_chain, "check_chain", counted)
    store = Clocks().store(directory)
    for _ in range(3):
        look(store)
    assert len(calls) == 1
    other = rsa_ek(1).public_key()
    with pytest.raises(UntrustedEkError, match="another key"):
        store.check(EndorsementKey(encode_ek(other), GOOD, other))
    for _ in range(2):
        with pytest.raises(UntrustedEkError):
            look(store, GOOD[:-1])
    assert len(calls) == 4


def test_a_verdict_ends_with_the_chain(directory: Path) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    look(store)
    clocks.now = ISSUING.certificate.not_valid_after_utc + timedelta(seconds=1)
    with pytest.raises(UntrustedEkError, match="valid from"):
        look(store)


def test_a_ca_that_was_taken_out_is_no_longer_believed(directory: Path) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    look(store)
    (directory / "bundle.pem").write_bytes(ISSUING.pem())
    look(store)  # within LOOK_AGAIN_S
    clocks.seconds += ek_chain.LOOK_AGAIN_S
    for _ in range(2):
        with pytest.raises(UntrustedEkError):
            look(store)
    (directory / "root.pem").write_bytes(ROOT.pem())
    clocks.seconds += ek_chain.LOOK_AGAIN_S
    look(store)


def test_a_directory_that_goes_away_lets_nothing_pass(directory: Path) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    look(store)
    os.rename(directory / "bundle.pem", directory / "bundle.txt")
    clocks.seconds += ek_chain.LOOK_AGAIN_S
    for _ in range(2):
        with pytest.raises(UsageError, match="no CA certificate"):
            look(store)


@pytest.mark.parametrize("name", ["bundle.pem", "."])
def test_what_everybody_can_write_vouches_for_nothing(directory: Path, name: str) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    (directory / name).chmod(0o777)
    with pytest.raises(HostError, match="everybody can write"):
        clocks.store(directory)
    clocks.seconds += ek_chain.LOOK_AGAIN_S
    with pytest.raises(HostError, match="everybody can write"):
        look(store)


def test_no_certificate_no_trust(directory: Path) -> None:
    with pytest.raises(UntrustedEkError, match="no EK certificate"):
        look(Clocks().store(directory), None)


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        Clocks().store(tmp_path / "missing")
    with pytest.raises(UsageError, match="no CA certificate"):
        Clocks().store(tmp_path)
    (tmp_path / "bad.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nnot\n")
    with pytest.raises(UsageError, match=r"bad\.pem is no certificate"):
        Clocks().store(tmp_path)


@pytest.mark.real
def test_what_swtpm_s_own_ca_makes(tmp_path: Path) -> None:
    """Certificates that are not of our making: an RSA-2048 and a P-384 EK, an intermediate, a root."""
    for name in ("state", "ca", "out"):
        (tmp_path / name).mkdir()
    ca = tmp_path / "ca"
    files = {"signingkey": "signkey.pem", "issuercert": "issuer.pem", "certserial": "serial"}
    lines = [f"statedir = {ca}", *(f"{key} = {ca / name}" for key, name in files.items())]
    (tmp_path / "ca.conf").write_text("\n".join(lines) + "\n")
    (tmp_path / "ca.options").write_text("--platform-manufacturer tests\n")
    tool = shutil.which("swtpm_localca")
    assert tool is not None, "swtpm-tools is missing"
    (tmp_path / "setup.conf").write_text(
        f"create_certs_tool = {tool}\ncreate_certs_tool_config = {tmp_path / 'ca.conf'}\n"
        f"create_certs_tool_options = {tmp_path / 'ca.options'}\n"
    )
    command: list[str | Path] = [
        "swtpm_setup",
        "--tpm2",
        "--tpmstate",
        tmp_path / "state",
        "--create-ek-cert",
    ]
    command += ["--write-ek-cert-files", tmp_path / "out", "--config", tmp_path / "setup.conf"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    now = utc_now() + timedelta(seconds=5)
    root, issuer = ca / "swtpm-localca-rootca-cert.pem", ca / "issuer.pem"
    stores = []
    for number, certificates in enumerate(([root, issuer], [root])):
        directory = tmp_path / f"cas-{number}"
        directory.mkdir()
        for certificate in certificates:
            shutil.copy(certificate, directory)
        stores.append(EkStore(directory, now=lambda: now, clock=lambda: 0.0))
    everything, root_alone = stores
    made = sorted((tmp_path / "out").iterdir())
    assert len(made) == 2
    for path in made:
        key = x509.load_der_x509_certificate(path.read_bytes()).public_key()
        assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
        everything.check(EndorsementKey(b"", path.read_bytes(), key))
        with pytest.raises(UntrustedEkError, match="no CA for its issuer"):
            root_alone.check(EndorsementKey(b"", path.read_bytes(), key))
