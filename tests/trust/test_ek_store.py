"""A tenant's store of CAs: what can be used is used, what cannot is named, and a change is noticed."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import anyio
import odd_certificates as odd
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from soft_ek import NOW, START, Authority, ek_certificate, rsa_ek

from provider_proxy.errors import HostError, UntrustedEkError, UsageError
from provider_proxy.evidence.tpm_writer import encode_ek
from provider_proxy.trust import ek_files, ek_store
from provider_proxy.trust.ek_chain import EndorsementKey, Verdict, check_chain
from provider_proxy.trust.ek_files import LoadedStore
from provider_proxy.trust.ek_store import EkStore, utc_now

ROOT = Authority("vendor root")
ISSUING = Authority("vendor issuing", ROOT, pathlen=0)
RSA_KEY = rsa_ek()
GOOD = ek_certificate(ISSUING, RSA_KEY)


# --- the directory ----------------------------------------------------------------------------------


class Clocks:
    def __init__(self) -> None:
        self.now = NOW
        self.seconds = 100.0

    def store(self, *paths: Path) -> EkStore:
        return EkStore(*paths, now=lambda: self.now, clock=lambda: self.seconds)


EK_PUBLIC = encode_ek(RSA_KEY.public_key())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "bundle.pem").write_bytes(ISSUING.pem() + ROOT.pem())
    return tmp_path


def look(store: EkStore, ek_cert: bytes | None = GOOD) -> Verdict:
    return store.check(EndorsementKey(EK_PUBLIC, ek_cert, RSA_KEY.public_key()))


def test_a_directory_of_pem_and_der(tmp_path: Path) -> None:
    (tmp_path / "root.DER").write_bytes(ROOT.certificate.public_bytes(Encoding.DER))
    (tmp_path / "issuing.crt").write_bytes(ISSUING.pem())
    (tmp_path / "README").write_bytes(b"not looked at")
    look(Clocks().store(tmp_path))


def test_a_verdict_is_remembered_and_equality_is_not(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: object, **options: object) -> Verdict:
        calls.append(args)
        return check_chain(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ek_store, "check_chain", counted)
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
    with pytest.raises(UntrustedEkError, match="expired on"):
        look(store)


def test_a_ca_that_was_taken_out_is_no_longer_believed(directory: Path) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    look(store)
    (directory / "bundle.pem").write_bytes(ROOT.pem())
    look(store)  # within LOOK_AGAIN_S
    clocks.seconds += ek_store.LOOK_AGAIN_S
    for _ in range(2):
        with pytest.raises(UntrustedEkError):
            look(store)
    (directory / "issuing.pem").write_bytes(ISSUING.pem())
    clocks.seconds += ek_store.LOOK_AGAIN_S
    look(store)


def test_a_directory_that_goes_away_lets_nothing_pass(directory: Path) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    look(store)
    os.rename(directory / "bundle.pem", directory / "bundle.txt")
    clocks.seconds += ek_store.LOOK_AGAIN_S
    for _ in range(2):
        with pytest.raises(UsageError, match="no CA certificate"):
            look(store)


def test_a_directory_that_everybody_can_write_vouches_for_nothing(directory: Path) -> None:
    clocks = Clocks()
    (directory / "below").mkdir()
    store = clocks.store(directory)
    for part in (directory, directory / "below"):
        part.chmod(0o777)
        with pytest.raises(HostError, match="everybody can write"):
            clocks.store(directory)
        clocks.seconds += ek_store.LOOK_AGAIN_S
        with pytest.raises(HostError, match="everybody can write"):
            look(store)
        part.chmod(0o755)


def test_no_certificate_no_trust(directory: Path) -> None:
    with pytest.raises(UntrustedEkError, match="no EK certificate"):
        look(Clocks().store(directory), None)


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        Clocks().store(tmp_path / "missing")
    with pytest.raises(UsageError, match="no CA certificate"):
        Clocks().store(tmp_path)
    (tmp_path / "bad.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nnot\n")
    with pytest.raises(
        UsageError, match=r"no CA certificate.*bad\.pem: a PEM block in it has no end"
    ):
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
    everything = EkStore(root, issuer, now=lambda: now)
    virtual = EkStore(root, issuer, insecure_virtual=True, now=lambda: now)
    root_alone = EkStore(root, insecure_virtual=True, now=lambda: now)
    made = sorted((tmp_path / "out").iterdir())
    assert len(made) == 2
    for path in made:
        key = x509.load_der_x509_certificate(path.read_bytes()).public_key()
        assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey)
        ek = EndorsementKey(b"", path.read_bytes(), key)
        with pytest.raises(
            UntrustedEkError, match="is that of a virtual TPM: its manufacturer id:00001014"
        ):
            everything.check(ek)
        assert virtual.check(ek).anchor.certificate.name == "CN=swtpm-localca"
        with pytest.raises(UntrustedEkError, match="no CA named"):
            root_alone.check(ek)


# --- a store that survives its files ----------------------------------------------------------------


def run_openssl(*words: str | Path, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *words], input=data, capture_output=True, check=True).stdout


def unusable(folder: Path) -> dict[str, str]:
    """Writes one file of each kind that is of no use; name to what is said of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    builder = x509.CertificateRevocationListBuilder().issuer_name(ROOT.certificate.subject)
    crl = builder.last_update(START).next_update(NOW).sign(ROOT.key, hashes.SHA256())
    (folder / "plain.pem").write_bytes(ROOT.pem())
    files = {
        "empty.pem": (b"", "it is empty"),
        "blank.der": (b" \n", "it is empty"),
        "text.crt": (b"see the maker's page", "begins with 73656520"),
        "half.pem": (ROOT.pem()[:200], "has no end"),
        "broken.pem": (ROOT.pem().replace(b"MII", b"M!I", 1), "not base64"),
        "crl.pem": (crl.public_bytes(Encoding.PEM), "a CRL"),
        "crl.der": (crl.public_bytes(Encoding.DER), "a CRL"),
        "key.pem": (pkcs8, "a private key"),
        "public.pem": (public, "a public key"),
        "chain.p7.pem": (
            run_openssl("crl2pkcs7", "-nocrl", "-certfile", folder / "plain.pem"),
            "PKCS #7",
        ),
        "chain.der": (
            run_openssl(
                "crl2pkcs7", "-nocrl", "-outform", "DER", "-certfile", folder / "plain.pem"
            ),
            "PKCS #7",
        ),
        "trusted.pem": (
            run_openssl("x509", "-trustout", "-addreject", "emailProtection", data=ROOT.pem()),
            "TRUSTED CERTIFICATE",
        ),
        "ek.der": (GOOD, "may not sign certificates"),
        "web.pem": (
            Authority("w", purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)).pem(),
            "its purposes do not include EK certificates",
        ),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "plain.pem").unlink()
    (folder / "link.pem").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.pem")
    (folder / "open.pem").write_bytes(ROOT.pem())
    (folder / "open.pem").chmod(0o666)
    (folder / "large.pem").write_bytes(b"")
    os.truncate(folder / "large.pem", ek_files.MAX_FILE_BYTES + 1)
    others = {
        "link.pem": "No such file",
        "pipe.pem": "not a plain file",
        "open.pem": "everybody can write it",
        "large.pem": "is larger than",
    }
    return {name: why for name, (_, why) in files.items()} | others


@pytest.mark.real
def test_what_cannot_be_used_is_named_and_the_rest_is_used(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = unusable(directory)
    store = Clocks().store(directory)
    found = {Path(skipped.source).name: skipped.why for skipped in store.loaded.skipped}
    assert found.keys() == expected.keys()
    for name, why in expected.items():
        assert why in found[name], name
    assert len(store.loaded.anchors) == 2
    assert look(store).anchor.certificate.name == "CN=vendor issuing"
    assert sum("is not used" in record.message for record in caplog.records) == len(expected)


@pytest.mark.real
def test_a_file_of_no_use_that_appears_later_takes_nothing_away(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    look(store)
    unusable(directory)
    clocks.seconds += ek_store.LOOK_AGAIN_S
    look(store)
    warned = len(caplog.records)
    assert warned > 10
    # What was said once is not said again,
    (directory / "new.pem").write_bytes(b"")
    clocks.seconds += ek_store.LOOK_AGAIN_S
    look(store)
    assert len(caplog.records) == warned + 1
    # and a file that was being copied counts when it is whole.
    (directory / "half.pem").write_bytes(Authority("third").pem())
    clocks.seconds += ek_store.LOOK_AGAIN_S
    look(store)
    assert len(store.loaded.anchors) == 3


def test_an_odd_certificate_in_the_store(directory: Path) -> None:
    """The kind that made a whole directory fail: Nuvoton's, its name's parts out of order."""
    maker = Authority("odd maker")
    data = odd.edited(maker.der(), odd.unordered_subject, maker.key)
    (directory / "odd.der").write_bytes(data)
    store = Clocks().store(directory)
    assert store.loaded.skipped == ()
    look(store)


def test_bundles_directories_and_several_of_them(tmp_path: Path) -> None:
    far = tmp_path / "a" / "b" / "c"
    far.mkdir(parents=True)
    (far / "issuing.pem").write_bytes(ISSUING.pem())
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
    bundle = tmp_path / "bundle.txt"  # named, so its suffix does not matter
    bundle.write_bytes(b"# our makers\n" + ROOT.pem() + b"\n" + Authority("third").pem())
    store = Clocks().store(tmp_path / "a", bundle)
    assert len(store.loaded.anchors) == 3
    look(store)
    with pytest.raises(HostError, match="No such file"):
        Clocks().store(tmp_path / "a", tmp_path / "missing.pem")


def test_too_deep_and_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path.joinpath(*["d"] * (ek_files.MAX_DEPTH + 2))
    deep.mkdir(parents=True)
    with pytest.raises(UsageError, match="directories deep"):
        Clocks().store(tmp_path)
    (tmp_path / "e").mkdir()
    for number in range(4):
        (tmp_path / "e" / f"{number}.pem").write_bytes(ROOT.pem())
    monkeypatch.setattr(ek_files, "MAX_FILES", 3)
    with pytest.raises(UsageError, match="more than 3 files"):
        Clocks().store(tmp_path / "e")
    monkeypatch.setattr(ek_files, "MAX_CERTIFICATES", 3)
    (tmp_path / "many.pem").write_bytes(ROOT.pem() * 4)
    with pytest.raises(UsageError, match="more than 3 certificates"):
        Clocks().store(tmp_path / "many.pem")


def test_a_bundle_of_ten_thousand(tmp_path: Path) -> None:
    """Distinct certificates of one key: the same signature work as of different ones."""
    many = []
    certificate = odd.Certificate(ROOT.der())
    for number in range(10_000):
        certificate.field(1).value = b"\1" + number.to_bytes(4, "big")
        text = base64.encodebytes(certificate.encode())
        many.append(b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n")
    (tmp_path / "many.pem").write_bytes(b"".join(many) + ISSUING.pem())
    store = Clocks().store(tmp_path)
    assert len(store.loaded.anchors) == 10_001
    look(store)


def test_the_directory_virtual_marks_what_is_below_it(directory: Path) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    look(store)
    (directory / "virtual").mkdir()
    (directory / "virtual" / "cloud.pem").write_bytes(ISSUING.pem())
    clocks.seconds += ek_store.LOOK_AGAIN_S
    with pytest.raises(UntrustedEkError, match="the store marks it as virtual"):
        look(store)
    EkStore(directory, insecure_virtual=True, now=lambda: NOW).check(
        EndorsementKey(EK_PUBLIC, GOOD, RSA_KEY.public_key())
    )
    # A mark that cannot be read must not pass for none.
    (directory / "virtual" / "cloud.pem").write_bytes(ISSUING.pem()[:100])
    clocks.seconds += ek_store.LOOK_AGAIN_S
    for _ in range(2):
        with pytest.raises(UsageError, match="marks a CA as virtual, cannot be used"):
            look(store)


async def test_the_store_is_read_again_off_the_event_loop(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks()
    store = clocks.store(directory)
    threads = []
    real = ek_files.load_store

    def noted(paths: Sequence[Path]) -> LoadedStore:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(paths)

    monkeypatch.setattr(ek_store, "load_store", noted)
    (directory / "third.pem").write_bytes(Authority("third").pem())
    await store.freshen()
    assert threads == []
    clocks.seconds += ek_store.LOOK_AGAIN_S
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(store.freshen)
    look(store)
    assert threads == [False]
    assert len(store.loaded.anchors) == 3
