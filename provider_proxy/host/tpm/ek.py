"""The host's endorsement key: found at its handle or made there, with its own certificate.

A chip may have certificates at several NV indices, one for each kind of EK, and an EK at the handle that
another program made. The certificate for the key at the handle is used; an index that cannot be read,
or holds something else, is logged and skipped. A handle that holds something else is refused, never
overwritten; a new key is made persistent only after it has matched the certificate.
Source: TCG EK Credential Profile 2.5, sections 2.2.1.4 to 2.2.1.5.2 (indices) and annex B (templates).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import TPM2B_PUBLIC
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from provider_proxy.errors import EvidenceFormatError, HostError, TpmError
from provider_proxy.evidence import tpm_keys
from provider_proxy.host.tpm import capabilities
from provider_proxy.host.tpm.chip import ek_auth_of, tss_errors
from provider_proxy.host.tpm.keys import Auths, EkInfo, find, read_public, transient
from provider_proxy.host.tpm.nv import NvReader, UnreadableIndexError
from provider_proxy.host.tpm.response_codes import LAYER_SHIFT
from provider_proxy.trust.ek_certificate import TpmCertificate, parse_certificate
from provider_proxy.trust.ek_chain import MAX_HELPER_BYTES, MAX_HELPERS
from provider_proxy.trust.ek_files import read_certificates

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EkKind:
    """A kind of EK that the profile has an index for.

    Attributes:
        template: its name in tpm2-pytss.
        key: of the key itself, as `kind_of_key` has it.
    """

    name: str
    template: str
    cert_index: int
    key: str


EK_KINDS = (
    EkKind("RSA-2048", "EK-RSA2048", 0x01C00002, "RSA-2048"),
    EkKind("P-256", "EK-ECC256", 0x01C0000A, "P-256"),
    EkKind("RSA-2048 (high range)", "EK-HIGH-RSA2048", 0x01C00012, "RSA-2048"),
    EkKind("P-256 (high range)", "EK-HIGH-ECC256", 0x01C00014, "P-256"),
    EkKind("P-384", "EK-HIGH-ECC384", 0x01C00016, "P-384"),
    EkKind("RSA-3072", "EK-HIGH-RSA3072", 0x01C0001C, "RSA-3072"),
    EkKind("P-521", "EK-HIGH-ECC521", 0x01C00018, "P-521"),
    EkKind("RSA-4096", "EK-HIGH-RSA4096", 0x01C0001E, "RSA-4096"),
)
"""In the order of choice for a new EK: kinds that all registrars support come first."""

EK_HANDLES = range(0x81010001, 0x81010100)  # of EKs: TCG Registry of Reserved TPM 2.0 Handles
CHAIN_INDICES = range(0x01C00100, 0x01C00200)  # for chips with an on-chip issuing CA
MARSHALLING_LAYER = 0x9  # tpm2-tss could not parse a structure: the index does not hold a template
CURVE_NAMES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


@dataclass(frozen=True, slots=True)
class EkCertificates:
    """A chip's EK certificates.

    Attributes:
        found: kind to certificate, in the order of `EK_KINDS`.
        passed_over: skipped index to the reason.
        chain: the CAs at the chain's indices, DER.
    """

    found: Mapping[EkKind, TpmCertificate]
    passed_over: Mapping[int, str]
    chain: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFiles:
    """The certificate and chain in the operator's files.

    Attributes:
        cert: the file's bytes; None if none is configured.
    """

    cert: bytes | None = None
    chain: tuple[bytes, ...] = field(default=())


def read_ek_certificates(nv: NvReader) -> EkCertificates:
    """Read all EK certificates in NV, and the chain.

    Raises:
        TpmError: the TPM fails.
    """
    found: dict[EkKind, TpmCertificate] = {}
    passed_over: dict[int, str] = {}
    for kind in EK_KINDS:
        try:
            data = nv.read(kind.cert_index)
            if data is not None:
                found[kind] = parse_certificate(data)
        except (UnreadableIndexError, EvidenceFormatError) as exc:
            passed_over[kind.cert_index] = f"EK certificate {kind.name}: {exc}"
    return EkCertificates(found, passed_over, _read_chain(nv, passed_over))


def _read_chain(nv: NvReader, passed_over: dict[int, str]) -> tuple[bytes, ...]:
    """The CAs of the chip's own chain: concatenated, over as many indices as needed."""
    data = b""
    for index in sorted(nv.defined.intersection(CHAIN_INDICES)):
        try:
            data += nv.read(index) or b""
        except UnreadableIndexError as exc:
            passed_over[index] = f"EK chain: {exc}"
            break  # bytes after a gap cannot be a certificate
        if len(data) > MAX_HELPER_BYTES:
            break
    found = []
    for certificate in read_certificates(data) if data else ():
        try:
            found.append(parse_certificate(certificate).der)
        except EvidenceFormatError as exc:
            passed_over[CHAIN_INDICES.start] = f"EK chain, certificate {len(found) + 1}: {exc}"
            break
    return fitting(found)


def fitting(chain: Iterable[bytes]) -> tuple[bytes, ...]:
    """As many CAs of a chain as a tenant takes."""
    kept: list[bytes] = []
    for certificate in chain:
        if len(kept) == MAX_HELPERS or sum(map(len, kept)) + len(certificate) > MAX_HELPER_BYTES:
            log.warning("the EK's chain has more CAs than tenants accept: the others are left out")
            break
        kept.append(certificate)
    return tuple(kept)


def kind_of_key(key: object) -> str:
    """ "RSA-2048", "P-384" and the like; "unknown" for others."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return CURVE_NAMES.get(key.curve.name, key.curve.name)
    return "unknown"


def find_or_make_ek(
    context: ESAPI, handle: int, auths: Auths, files: OwnFiles = OwnFiles()
) -> EkInfo:
    """The EK at `handle`; if empty, made there from the certificate's template or the TCG default.

    Raises:
        HostError: the handle holds something that is not an EK, or not the certificate's.
        TpmError: the TPM refused, because of a wrong authorisation for example.
    """
    nv = NvReader(context, auths.owner)
    certificates = read_ek_certificates(nv)
    for index, why in certificates.passed_over.items():
        log.warning("skipping NV index %#010x: %s", index, why)
    own = _own_certificate(files)
    found = find(context, handle)
    if found is None:
        return _make(context, handle, auths, nv, certificates, own, files)
    public = read_public(context, found)
    try:
        info = _info(found, public, handle, certificates, own, files, auths, made=False)
    except _WrongKeyError as exc:
        raise HostError(f"{exc}; it was left unchanged. {_way_out(context, exc.wanted)}") from exc
    return info


class _WrongKeyError(HostError):
    """The key at the handle does not match any of the certificates (`wanted`)."""

    def __init__(self, message: str, wanted: Iterable[TpmCertificate]) -> None:
        super().__init__(message)
        self.wanted = tuple(wanted)


def _way_out(context: ESAPI, wanted: Collection[TpmCertificate]) -> str:
    """Which tpm.ek_handle to set: one that holds a certificate's key already, or a free one."""
    keys = [certificate.parsed.public_key() for certificate in wanted]
    with tss_errors("looking for the certificate's EK at other handles"):
        taken = capabilities.handles(context, capabilities.FIRST_PERSISTENT)
    for handle in taken:
        found = find(context, handle) if handle in EK_HANDLES else None
        if found is None:
            continue
        try:
            key = tpm_keys.parse_public(read_public(context, found)).public_key
        except EvidenceFormatError:
            continue
        if key in keys:
            return f"The certificate's EK is at {handle:#x}: set tpm.ek_handle to this handle"
    free = next(handle for handle in EK_HANDLES if handle not in taken)
    return f"Set tpm.ek_handle to a free handle, {free:#x}: the certificate's EK will be made there"


def _own_certificate(files: OwnFiles) -> TpmCertificate | None:
    if files.cert is None:
        return None
    listed = read_certificates(files.cert)
    try:
        return parse_certificate(listed[0] if listed else b"")
    except EvidenceFormatError as exc:
        raise HostError(f"tpm.ek_cert_file does not hold a certificate: {exc}") from exc


def _info(
    found: ESYS_TR,
    public: bytes,
    handle: int,
    certificates: EkCertificates,
    own: TpmCertificate | None,
    files: OwnFiles,
    auths: Auths,
    *,
    made: bool,
) -> EkInfo:
    key = _check_ek(public, handle)
    cert = _certificate_of(key, handle, certificates, own)
    return EkInfo(
        handle=found,
        public=public,
        auth=ek_auth_of(key, f"the EK at handle {handle:#x}", auths.endorsement),
        cert=cert.der if cert is not None else None,
        chain=fitting(files.chain or certificates.chain),
        made=made,
    )


def _check_ek(public: bytes, handle: int) -> tpm_keys.TpmPublic:
    """Raises: HostError where a key is not an EK."""
    try:
        key = tpm_keys.parse_public(public)
    except EvidenceFormatError as exc:
        raise HostError(f"handle {handle:#x} does not hold an RSA or EC key: {exc}") from exc
    wanted = tpm_keys.FIXED_TPM | tpm_keys.RESTRICTED | tpm_keys.DECRYPT
    if key.attributes & wanted != wanted or key.attributes & tpm_keys.SIGN:
        raise HostError(f"handle {handle:#x} holds a key that is not an EK; it was left unchanged")
    return key


def _certificate_of(
    key: tpm_keys.TpmPublic,
    handle: int,
    certificates: EkCertificates,
    own: TpmCertificate | None,
) -> TpmCertificate | None:
    """The certificate for this key.

    Raises:
        HostError: there are certificates, but none is for this key.
    """
    if own is not None:
        if own.parsed.public_key() != key.public_key:
            raise HostError(
                f"tpm.ek_cert_file is for another key ({kind_of_key(own.parsed.public_key())}) than "
                f"the EK at handle {handle:#x} ({kind_of_key(key.public_key)})"
            )
        return own
    for certificate in certificates.found.values():
        if certificate.parsed.public_key() == key.public_key:
            return certificate
    if certificates.found:
        kinds = ", ".join(kind.name for kind in certificates.found)
        raise _WrongKeyError(
            f"handle {handle:#x} holds a key ({kind_of_key(key.public_key)}) other than the one in the "
            f"TPM's EK certificate ({kinds})",
            certificates.found.values(),
        )
    if certificates.passed_over:
        log.warning(
            "there is no EK certificate for the EK at %#x: tenants get no certificate, and have to "
            "vouch for the key themselves",
            handle,
        )
    return None


# --- making -------------------------------------------------------------------------------------------


def _make(
    context: ESAPI,
    handle: int,
    auths: Auths,
    nv: NvReader,
    certificates: EkCertificates,
    own: TpmCertificate | None,
    files: OwnFiles,
) -> EkInfo:
    """Make the EK of the first certificate that a template reproduces, and make it persistent."""
    wrong = []
    for kind, certificate in _candidates(certificates, own):
        template = _template(kind, nv)
        context.tr_set_auth(ESYS_TR.ENDORSEMENT, auths.endorsement)
        with tss_errors(f"making the EK, {kind.name}"):
            primary = context.create_primary(None, template, ESYS_TR.ENDORSEMENT)[0]
        with transient(context, primary):
            public = read_public(context, primary)
            key = _check_ek(public, handle)
            if certificate is not None and certificate.parsed.public_key() != key.public_key:
                log.warning(
                    "the EK template does not produce the key of the certificate %s", kind.name
                )
                wrong.append(kind.name)
                continue
            context.tr_set_auth(ESYS_TR.OWNER, auths.owner)
            with tss_errors(f"keeping the EK at handle {handle:#x}"):
                kept = context.evict_control(ESYS_TR.OWNER, primary, handle)
        if kind.key not in ("RSA-2048", "P-256"):
            log.warning(
                "the EK is %s, because there is no certificate of a more common kind: some registrars do "
                "not support it (Keylime 7.14 does)",
                kind.name,
            )
        return _info(kept, public, handle, certificates, own, files, auths, made=True)
    raise HostError(
        f"no template produces the key of the TPM's EK certificate ({', '.join(wrong)}): no EK was made. "
        "Read the maker's notes on its EK template, or make the EK yourself at tpm.ek_handle"
    )


def _candidates(
    certificates: EkCertificates, own: TpmCertificate | None
) -> list[tuple[EkKind, TpmCertificate | None]]:
    """The kinds to try, with the certificate that the key must match."""
    if own is not None:
        wanted = kind_of_key(own.parsed.public_key())
        return [(kind, own) for kind in EK_KINDS if kind.key == wanted]
    found = list(certificates.found.items())
    return [*found] if found else [(EK_KINDS[0], None)]


def _template(kind: EkKind, nv: NvReader) -> TPM2B_PUBLIC:
    """The template in NV, if one can be read; otherwise the profile's."""

    def read(index: int) -> bytes:
        if index == kind.cert_index:
            return (
                b"\0"  # only the template is wanted, but tpm2-pytss checks for a certificate first
            )
        data = nv.read(index)
        if data is None:
            raise NoSuchIndex(index)
        return data

    readers: tuple[Callable[[int], bytes], ...] = (read, lambda index: _none_but(kind, index))
    for reader in readers:
        try:
            with tss_errors(f"reading the EK template {kind.name}"):
                _, template = create_ek_template(kind.template, reader)
        except (UnreadableIndexError, ValueError, RuntimeError, TpmError) as exc:
            if isinstance(exc, TpmError) and exc.code >> LAYER_SHIFT != MARSHALLING_LAYER:
                raise
            log.warning("skipping the EK template %s in NV: %s", kind.name, exc)
            continue
        return template
    raise HostError(f"there is no template for the EK {kind.name}")


def _none_but(kind: EkKind, index: int) -> bytes:
    if index == kind.cert_index:
        return b"\0"
    raise NoSuchIndex(index)
