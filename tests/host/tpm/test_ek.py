"""Chips as makers and owners leave them, way by way: which EK and certificate are used, what is said.

Each way is a real swtpm, provisioned with tpm2-tools; RSA-4096, which swtpm 0.7 lacks, is a scripted TPM.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key
from manufactured import CERT_INDEX, manufacture, provision, write_index
from soft_ek import Authority, ek_certificate, rsa_ek
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import TPMA_NV
from tpm_helpers import swtpm_at, tool

from provider_proxy.errors import HostError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.tpm_keys import PublicKey, parse_public
from provider_proxy.evidence.tpm_writer import encode_ek
from provider_proxy.host.tpm import capabilities, ek, keys
from provider_proxy.host.tpm.chip import (
    Chip,
    EkAuth,
    close_context,
    endorsement_policy,
    open_context,
)
from provider_proxy.host.tpm.ek import OwnFiles, find_or_make_ek
from provider_proxy.host.tpm.keys import Auths, EkInfo
from provider_proxy.trust.ek_certificate import parse_certificate

HANDLE = 0x81010001
LOW_RSA, LOW_ECC, CHAIN = "0x01c00002", "0x01c0000a", "0x01c00100"
P384, RSA3072, P521, HIGH_RSA, HIGH_ECC = (
    *("0x01c00016", "0x01c0001c", "0x01c00018"),
    *("0x01c00012", "0x01c00014"),
)
NO_EK = f"tpm2_evictcontrol -Q -C o -c {HANDLE:#x}\n"
NO_LOW, NO_P384 = f"tpm2_nvundefine -C p {LOW_RSA}\n", f"tpm2_nvundefine -C p {P384}\n"
TAKE_LOW = f"tpm2_nvread {LOW_RSA} > c.der\n{NO_LOW}"
MAKER = Authority("maker", key=rsa_ek(1))


@pytest.fixture(scope="module")
def manufactured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manufacture(tmp_path_factory.mktemp("made"))


class Way:
    """A chip that is provisioned, and then looked at by the daemon's own code."""

    def __init__(self, tcti: str, folder: Path) -> None:
        self.tcti = tcti
        self.folder = folder

    def prepare(self, script: str) -> None:
        provision(self.tcti, script, self.folder)

    def certify(self, kind: str, index: str) -> None:
        """Put a certificate for this chip's EK of a kind into an index."""
        self.prepare(
            f"tpm2_createek -Q -c e.ctx -G {kind} -u e.pub\n"
            "tpm2_readpublic -Q -c e.ctx -f der -o e.der\n"
        )
        key = load_der_public_key((self.folder / "e.der").read_bytes())
        holder = cast(Any, SimpleNamespace(public_key=lambda: key))
        (self.folder / "cc.der").write_bytes(ek_certificate(MAKER, holder))
        self.prepare(write_index(index, "cc.der"))

    def find(self, handle: int = HANDLE, files: OwnFiles | None = None) -> EkInfo:
        """What the daemon uses; and the EK works: a key is made under it, a credential opened with it."""
        context = open_context(self.tcti)
        try:
            found = find_or_make_ek(context, handle, Auths(), files or OwnFiles())
            ak = keys.find_or_make_ak(
                context, 0x81000100, "ecc", found, Auths(), lambda made: b"auth"
            )
            # As a registrar challenges it.
            blob, secret = context.make_credential(found.handle, b"challenge", ak.key.name)
            chip = Chip(context, ek=found.handle, ak=ak.handle, ek_auth=found.auth)
            assert chip.activate_credential(blob.marshal(), secret.marshal()) == b"challenge"
            assert capabilities.handles(context, 0x80000000) == ()
            return found
        finally:
            close_context(context)

    def persistent(self) -> list[str]:
        return tool(self.tcti, "tpm2_getcap", "handles-persistent").split()[1::2]


@pytest.fixture
def way(manufactured: Path, tmp_path: Path) -> Iterator[Way]:
    shutil.copytree(manufactured, tmp_path / "state")
    with swtpm_at(tmp_path / "state") as made:
        yield Way(made.tcti, tmp_path)


def kind_of(info: EkInfo) -> str:
    return ek.kind_of_key(parse_public(info.public).public_key)


def check_own(info: EkInfo) -> None:
    """The certificate is cut, and for the very key."""
    assert info.cert is not None
    read = parse_certificate(info.cert)
    assert read.der == info.cert
    assert read.parsed.public_key() == parse_public(info.public).public_key


# --- where a certificate is, and how ----------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    "script",
    [
        TAKE_LOW + "cp c.der p.der\nhead -c 600 /dev/zero | tr '\\0' '\\377' >> p.der\n",
        TAKE_LOW + "cp c.der p.der\nhead -c 600 /dev/zero >> p.der\n",
        TAKE_LOW
        + "size=$(($(stat -c %s c.der) + 2))\n"
        + "printf '\\020\\001\\000' > p.der\n"
        + 'printf "\\\\$(printf %o $((size / 256)))\\\\$(printf %o $((size % 256)))" >> p.der\n'
        + "printf '\\020\\002' >> p.der\ncat c.der >> p.der\n",
    ],
    ids=["padded with 0xff", "padded with 0", "behind a TCG header"],
)
def test_padding_and_headers_are_cut(way: Way, script: str) -> None:
    way.prepare(script + write_index(LOW_RSA, "p.der"))
    info = way.find()
    check_own(info)
    assert info.cert == (way.folder / "c.der").read_bytes()


@pytest.mark.real
def test_an_index_that_the_owner_alone_may_read(way: Way) -> None:
    attributes = CERT_INDEX.replace("authread|", "")
    way.prepare(TAKE_LOW + write_index(LOW_RSA, "c.der", attributes=attributes))
    check_own(way.find())


PASSED_OVER = {
    "never written": (
        f'{NO_LOW}tpm2_nvdefine -Q -C p -s 900 -a "{CERT_INDEX}" {LOW_RSA}\n',
        "was never written",
    ),
    "zeros": (
        f"{NO_LOW}head -c 900 /dev/zero > p.der\n{write_index(LOW_RSA, 'p.der')}",
        "no certificate was written",
    ),
    "garbage": (
        f"{NO_LOW}printf 'no certificate' > p.der\n{write_index(LOW_RSA, 'p.der')}",
        "begins with 6e6f2063",
    ),
    "for the platform alone": (
        TAKE_LOW + write_index(LOW_RSA, "c.der", attributes="ppread|ppwrite|no_da|platformcreate"),
        "only the platform",
    ),
}


@pytest.mark.real
@pytest.mark.parametrize("name", PASSED_OVER)
def test_an_index_that_is_of_no_use_is_named_and_passed_over(
    way: Way, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    script, why = PASSED_OVER[name]
    way.prepare(NO_P384 + script)
    info = way.find()
    assert info.cert is None
    assert f"skipping NV index {LOW_RSA}: EK certificate RSA-2048: " in caplog.text
    assert why in caplog.text
    assert "vouch for the key themselves" in caplog.text


@pytest.mark.real
def test_a_chip_without_any_certificate(way: Way) -> None:
    way.prepare(NO_P384 + NO_LOW + NO_EK)
    info = way.find()
    assert (kind_of(info), info.cert, info.made) == ("RSA-2048", None, True)


# --- kinds ------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("tools_kind", "index", "key", "auth"),
    [
        ("rsa", LOW_RSA, "RSA-2048", EkAuth(True, HashAlg.SHA256)),
        ("ecc", LOW_ECC, "P-256", EkAuth(True, HashAlg.SHA256)),
        ("ecc384", P384, "P-384", EkAuth(False, HashAlg.SHA384)),
        ("rsa3072", RSA3072, "RSA-3072", EkAuth(False, HashAlg.SHA384)),
        ("ecc521", P521, "P-521", EkAuth(False, HashAlg.SHA512)),
    ],
)
def test_the_ek_of_the_only_certificate_is_made_and_used(
    way: Way, tools_kind: str, index: str, key: str, auth: EkAuth
) -> None:
    way.prepare(NO_EK + NO_LOW + NO_P384)
    way.certify(tools_kind, index)
    info = way.find()
    assert (kind_of(info), info.auth, info.made) == (key, auth, True)
    check_own(info)
    again = way.find()
    assert (again.public, again.cert, again.made) == (info.public, info.cert, False)


@pytest.mark.real
def test_a_p_384_certificate_alone_is_said(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    way.prepare(NO_EK + NO_LOW)
    info = way.find()
    assert kind_of(info) == "P-384"
    check_own(info)
    assert "the EK is P-384, because there is no certificate of a more common kind" in caplog.text


@pytest.mark.real
def test_an_ek_of_another_kind_at_the_handle_has_its_own_certificate(way: Way) -> None:
    """Both low certificates are there, and somebody made the P-256 EK: not the first one's."""
    way.prepare(NO_EK)
    way.certify("ecc", LOW_ECC)
    way.prepare(f"tpm2_createek -Q -c {HANDLE:#x} -G ecc -u e.pub\n")
    info = way.find()
    assert (kind_of(info), info.made) == ("P-256", False)
    check_own(info)
    check_own(way.find(0x81010016))  # the one that swtpm_setup made, P-384


@pytest.mark.real
def test_an_ek_that_no_certificate_is_for_is_left_and_the_way_out_is_named(way: Way) -> None:
    way.prepare(NO_EK + f"tpm2_createek -Q -c {HANDLE:#x} -G ecc -u e.pub\n")
    before = way.persistent()
    with pytest.raises(HostError, match=r"\(P-256\) other than the one.*RSA-2048, P-384") as failed:
        way.find()
    assert "EK is at 0x81010016: set tpm.ek_handle to this handle" in str(failed.value)
    way.prepare("tpm2_evictcontrol -Q -C o -c 0x81010016\n")
    with pytest.raises(HostError, match="a free handle, 0x81010002"):
        way.find()
    assert way.persistent() == before[:1]
    check_own(way.find(0x81010002))


@pytest.mark.real
@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("tpm2_createprimary -Q -C o -c p.ctx\n", "other than the one in the TPM's EK certificate"),
        (
            "tpm2_createprimary -Q -C o -c p.ctx -G ecc256:ecdsa -a "
            "'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign'\n",
            "a key that is not an EK; it was left",
        ),
    ],
    ids=["a storage key", "a signing key"],
)
def test_what_is_no_ek_is_left_as_it_is(way: Way, script: str, match: str) -> None:
    way.prepare(NO_EK + script + f"tpm2_evictcontrol -Q -C o -c p.ctx {HANDLE:#x}\n")
    before = way.persistent()
    with pytest.raises(HostError, match=match):
        way.find()
    assert way.persistent() == before


@pytest.mark.real
def test_an_ek_with_a_policy_of_its_own(way: Way) -> None:
    way.prepare(
        NO_EK + NO_LOW + NO_P384 + "head -c 32 /dev/urandom > pol\n"
        "tpm2_createprimary -Q -C e -G rsa2048:null:aes128cfb -g sha256 -L pol -c p.ctx -a "
        "'fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy|restricted|decrypt'\n"
        f"tpm2_evictcontrol -Q -C o -c p.ctx {HANDLE:#x}\n"
    )
    with pytest.raises(HostError, match=r"has a policy .*free handle"):
        way.find()


def test_the_policies_of_the_profile() -> None:
    """Policy A of the EK Credential Profile, annex B.6.2, for SHA-256."""
    assert endorsement_policy(HashAlg.SHA256).hex() == (
        "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"
    )


# --- templates --------------------------------------------------------------------------------------


@pytest.mark.real
def test_a_template_and_a_nonce_in_nv(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    way.prepare(NO_EK + NO_P384 + "head -c 32 /dev/urandom > n\n" + write_index("0x01c00003", "n"))
    with pytest.raises(HostError, match=r"no template produces the key.*RSA-2048.*no EK was made"):
        way.find()  # the certificate was made without this nonce
    assert f"{HANDLE:#x}" not in way.persistent()
    way.prepare(
        "tpm2_nvundefine -C p 0x01c00003\nhead -c 40 /dev/urandom > t\n"
        + write_index("0x01c00004", "t")
    )
    caplog.clear()
    check_own(way.find())
    assert "skipping the EK template RSA-2048 in NV" in caplog.text


@pytest.mark.real
def test_the_template_in_nv_is_what_the_key_is_made_of(way: Way) -> None:
    """A template that is the profile's but for its unique field: another key comes out."""
    way.prepare(NO_EK + NO_P384 + NO_LOW + "tpm2_createek -Q -c e.ctx -G rsa -u ek.pub\n")
    area = (way.folder / "ek.pub").read_bytes()[2:]
    (way.folder / "t").write_bytes(area[:-256] + b"\x01" * 256)
    way.prepare(write_index("0x01c00004", "t"))
    made = way.find()
    assert made.public != (way.folder / "ek.pub").read_bytes()
    assert made.cert is None


# --- the chain, and the operator's files ------------------------------------------------------------


@pytest.mark.real
def test_the_chain_that_a_chip_carries(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """One CA over two indices and another behind it, as Intel's chips have theirs."""
    chip_ca = Authority("the chip's own", MAKER)
    data = chip_ca.der() + MAKER.der()
    for number, part in enumerate((data[:300], data[300:])):
        (way.folder / "part").write_bytes(part)
        way.prepare(write_index(f"0x01c0010{number}", "part"))
    assert way.find().chain == (chip_ca.der(), MAKER.der())
    (way.folder / "part").write_bytes(b"garbage")
    way.prepare(f"tpm2_nvundefine -C p {CHAIN}\n" + write_index(CHAIN, "part"))
    assert way.find().chain == ()
    assert "EK chain, certificate 1: it begins with 67617262" in caplog.text


@pytest.mark.real
def test_the_operator_s_certificate_and_chain(way: Way) -> None:
    chip_ca = Authority("the chip's own", MAKER)
    key = parse_public(way.find().public).public_key
    holder = cast(Any, SimpleNamespace(public_key=lambda: key))
    cert = ek_certificate(chip_ca, holder)
    info = way.find(files=OwnFiles(cert=cert, chain=(chip_ca.der(),)))
    assert (info.cert, info.chain) == (cert, (chip_ca.der(),))
    other = ek_certificate(chip_ca, rsa_ek(2))
    with pytest.raises(HostError, match=r"tpm\.ek_cert_file is for another key"):
        way.find(files=OwnFiles(cert=other))
    with pytest.raises(
        HostError, match=r"tpm\.ek_cert_file does not hold a certificate: it begins"
    ):
        way.find(files=OwnFiles(cert=b"garbage"))


def test_a_chain_that_is_too_long_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    many = [MAKER.der()] * 9
    assert ek.fitting(many) == tuple(many[:8])
    assert ek.fitting([bytes(9000), bytes(9000)]) == (bytes(9000),)
    assert "more CAs than tenants accept" in caplog.text


# --- a scripted TPM ---------------------------------------------------------------------------------


class ScriptedTpm:
    """Answers what the search for an EK asks: NV indices, and a primary of the kind that it has.

    Attributes:
        kept: what was made persistent.
    """

    def __init__(self, indices: dict[int, bytes], key: PublicKey) -> None:
        self.indices = indices
        self.key = key
        self.kept: list[int] = []
        self.templates: list[Any] = []

    def get_capability(self, group: int, first: int, count: int) -> tuple[bool, Any]:
        data = SimpleNamespace(handles=sorted(self.indices), tpmProperties=[])
        return False, SimpleNamespace(data=data)

    def tr_from_tpmpublic(self, handle: int) -> int:
        if handle not in self.indices:
            raise TSS2_Exception(0x18B)
        return handle

    def nv_read_public(self, index: int) -> tuple[Any, None]:
        attributes = TPMA_NV.WRITTEN | TPMA_NV.AUTHREAD
        area = SimpleNamespace(attributes=attributes, dataSize=len(self.indices[index]))
        return SimpleNamespace(nvPublic=area), None

    def nv_read(self, index: int, size: int, offset: int, *, auth_handle: int) -> bytes:
        assert auth_handle == index
        assert size <= 512
        return self.indices[index][offset : offset + size]

    def tr_set_auth(self, handle: int, auth: bytes) -> None:
        pass

    def create_primary(self, sensitive: object, template: object, hierarchy: int) -> tuple[int]:
        self.templates.append(template)
        return (0x80000000,)

    def read_public(self, handle: int) -> tuple[Any, None, None]:
        high = 0x300F2
        data = encode_ek(self.key)
        data = data[:6] + high.to_bytes(4, "big") + data[10:]
        return SimpleNamespace(marshal=lambda: data), None, None

    def evict_control(self, hierarchy: int, found: int, handle: int) -> int:
        self.kept.append(handle)
        return handle

    def flush_context(self, handle: int) -> None:
        pass


@pytest.fixture(scope="module")
def rsa_4096() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 4096)


def test_rsa_4096(rsa_4096: rsa.RSAPrivateKey) -> None:
    cert = ek_certificate(MAKER, rsa_4096)
    chip = ScriptedTpm({0x01C0001E: cert + b"\xff" * 300}, rsa_4096.public_key())
    info = find_or_make_ek(cast(ESAPI, chip), HANDLE, Auths())
    assert (kind_of(info), info.cert, info.made) == ("RSA-4096", cert, True)
    assert info.auth.by_policy is False
    assert int(chip.templates[0].publicArea.parameters.rsaDetail.keyBits) == 4096
    assert chip.kept == [HANDLE]


def test_a_key_that_is_not_the_certificate_s_is_not_kept(rsa_4096: rsa.RSAPrivateKey) -> None:
    cert = ek_certificate(MAKER, rsa_4096)
    chip = ScriptedTpm({0x01C0001E: cert}, rsa_ek(3).public_key())
    with pytest.raises(HostError, match="no EK was made"):
        find_or_make_ek(cast(ESAPI, chip), HANDLE, Auths())
    assert chip.kept == []


def test_every_index_is_looked_at() -> None:
    """High-range RSA-2048 and P-256, too; the first kind that is usual comes first."""
    key = ec.generate_private_key(ec.SECP256R1())
    indices = {
        0x01C00014: ek_certificate(MAKER, key),
        0x01C0001E: b"garbage",
        0x01C00018: bytes(100),
    }
    chip = ScriptedTpm(indices, key.public_key())
    info = find_or_make_ek(cast(ESAPI, chip), HANDLE, Auths())
    assert info.cert == indices[0x01C00014]
    listed = {kind.cert_index for kind in ek.EK_KINDS}
    assert listed == {0x01C00002, 0x01C0000A, *range(0x01C00012, 0x01C00020, 2)} - {0x01C0001A}


def test_an_index_that_never_ends() -> None:
    """The TPM says that an index is larger than what it gives."""

    class Short(ScriptedTpm):
        def nv_read(self, index: int, size: int, offset: int, *, auth_handle: int) -> bytes:
            return (
                super().nv_read(index, size, offset, auth_handle=auth_handle) if not offset else b""
            )

    key = rsa_ek(3)
    chip = Short({0x01C00002: ek_certificate(MAKER, key)}, key.public_key())
    assert find_or_make_ek(cast(ESAPI, chip), HANDLE, Auths()).cert is None
