"""Examines a TPM for the proxy: its make, limits, handles, speed of quotes, and what follows.

Reads only, except that it makes, measures and flushes two transient keys in the NULL hierarchy; nothing
persistent changes and no authorisation is needed. A hardware TPM needs many seconds to make an RSA key.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR
from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE

from provider_proxy.errors import HostError, TpmError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.tpm_keys import PublicKey, parse_public
from provider_proxy.evidence.vtpm_link import spki_digest
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.tpm import capabilities, ima, progress
from provider_proxy.host.tpm.chip import Chip, flush, tss_errors
from provider_proxy.host.tpm.ek import EkCertificates, read_ek_certificates
from provider_proxy.host.tpm.ek_urls import certificate_url, issuer_urls
from provider_proxy.host.tpm.keys import AK_ATTRIBUTES, AK_TEMPLATES, find, read_public
from provider_proxy.host.tpm.measure import measure_small_commands
from provider_proxy.host.tpm.nv import NvReader
from provider_proxy.host.tpm.response_codes import LAYER_SHIFT, SOFTWARE_LAYERS

T = TypeVar("T")

QUOTES_MEASURED = 5  # one chip's times hardly vary (TPMScan: p99/p50 = 1.02)
PT = {
    "family": 0x100,
    "revision": 0x102,
    "manufacturer": 0x105,
    "vendor_1": 0x106,
    "firmware_1": 0x10B,
    "firmware_2": 0x10C,
    "sessions_max": 0x111,
    "context_gap_max": 0x114,
    "response_max_bytes": 0x11F,
    "digest_max_bytes": 0x120,
    "lockout_counter": 0x20E,
    "lockout_limit": 0x20F,
    "sessions_loaded": 0x203,
    "sessions_loaded_free": 0x204,
    "sessions_active": 0x205,
    "sessions_active_free": 0x206,
    "transient_free": 0x207,
    "persistent": 0x208,
    "persistent_free": 0x209,
}
"""Property tags: TPM 2.0 Library Part 2, section 6.13."""
SHOWN_OTHERWISE = ("family", "revision", "manufacturer", "vendor_1", "firmware_1", "firmware_2")
DEFAULT_EK_HANDLE = 0x81010001
SOFTWARE = "IBM"  # the author of libtpms, the software TPM of swtpm
SLOW_MS = 150.0  # above it, consider the other kind of AK
RC_COMMAND_CODE = 0x143
FORMAT_ONE = range(0x80, 0xC0)  # codes about a parameter: Part 2, section 6.6.2
SMALL_GAP = 255  # 10 of 11 AMD fTPMs, 6 of 33 Nuvotons (TPMScan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The results.

    Attributes:
        command_ms: median times of small commands, see `measure_small_commands`.
        quote_ms: key kind ("ecc", "rsa") to the median time of a quote; absent where the chip
            has no such keys.
        pcr_banks: active banks.
        ek_certificates: kinds of EK that have a certificate in NV.
        ek_passed_over: NV indices without a usable certificate, and why.
        ek_chain: number of certificates in the chip's own chain in NV.
        ek_sha256: SHA-256 of the EK's SubjectPublicKeyInfo, hex; None where there is no EK yet.
        failures: steps that failed, and why.
        consequences: what follows for a configuration, in sentences.
        todo: what to do next, in sentences.
    """

    manufacturer: str
    vendor: str
    firmware: str
    revision: float
    limits: dict[str, int]
    pcr_banks: tuple[str, ...]
    algorithms: tuple[str, ...]
    persistent: tuple[int, ...]
    ek_certificates: tuple[str, ...]
    ek_passed_over: tuple[str, ...]
    ek_chain: int
    ek_sha256: str | None
    quote_ms: dict[str, float]
    failures: tuple[str, ...]
    consequences: tuple[str, ...]
    todo: tuple[str, ...]
    command_ms: dict[str, float] = field(default_factory=dict)


def examine(
    context: ESAPI, ek_handle: int = DEFAULT_EK_HANDLE, settings: Tpm | None = None
) -> Report:
    """Examine an open TPM; a step that fails does not stop the others.

    Args:
        ek_handle: the handle of the EK, which may be empty.
        settings: of the daemon on this host, to predict IMA's wait; the defaults where None.

    Raises:
        TpmError: it does not answer at all.
    """
    failures: list[str] = []

    def attempt(doing: str, ask: Callable[[], T], otherwise: T) -> T:
        try:
            with tss_errors(doing):
                return ask()
        except (TpmError, HostError) as exc:
            failures.append(str(exc))
            return otherwise

    no_values: dict[int, int] = {}
    no_times: dict[str, float] = {}
    no_names: tuple[str, ...] = ()
    no_handles: tuple[int, ...] = ()
    values = attempt("reading properties", lambda: capabilities.properties(context), no_values)
    algorithms = attempt("reading algorithms", lambda: capabilities.algorithms(context), no_names)
    persistent = attempt(
        "listing persistent handles",
        lambda: capabilities.handles(context, capabilities.FIRST_PERSISTENT),
        no_handles,
    )
    banks: tuple[str, ...] | None = attempt(
        "reading PCR banks", lambda: capabilities.banks(context), None
    )
    if not values and banks is None:
        raise TpmError(failures[0])
    manufacturer = _text(values.get(PT["manufacturer"], 0))
    no_certificates = EkCertificates({}, {})
    certificates = attempt(
        "reading its EK certificates",
        lambda: read_ek_certificates(NvReader(context)),
        no_certificates,
    )
    ek = attempt("reading the EK", lambda: _key_at(context, ek_handle), None)
    limits = {name: values[tag] for name, tag in PT.items() if tag in values}
    quote_ms = {}
    unsupported = set()
    bank = _bank_to_measure(banks or ())
    for kind in AK_TEMPLATES:
        if bank is None:
            break
        try:
            quote_ms[kind] = _measure(context, kind, bank)
        except _UnsupportedError:
            unsupported.add(kind)
        except _NotNowError:
            continue
        except TpmError as exc:
            failures.append(str(exc))
    command_ms = attempt("small commands", lambda: measure_small_commands(context), no_times)
    consequences = list(_consequences(manufacturer, limits, banks or (), quote_ms, unsupported))
    if manufacturer != SOFTWARE:
        consequences += ima.advice(settings or Tpm(), quote_ms, command_ms)
    return Report(
        manufacturer=manufacturer,
        vendor="".join(_text(values.get(PT["vendor_1"] + n, 0)) for n in range(4)).strip(),
        firmware=_firmware(values),
        revision=values.get(PT["revision"], 0) / 100,
        limits=limits,
        pcr_banks=banks or (),
        algorithms=algorithms,
        persistent=persistent,
        ek_certificates=tuple(kind.name for kind in certificates.found),
        ek_passed_over=tuple(
            f"{index:#010x}: {why}" for index, why in certificates.passed_over.items()
        ),
        ek_chain=len(certificates.chain),
        ek_sha256=spki_digest(ek).hex() if ek is not None else None,
        quote_ms=quote_ms,
        failures=tuple(failures),
        consequences=tuple(consequences),
        todo=tuple(advice(manufacturer, banks, certificates, ek, failures)),
        command_ms=command_ms,
    )


def _key_at(context: ESAPI, handle: int) -> PublicKey | None:
    found = find(context, handle)
    return None if found is None else parse_public(read_public(context, found)).public_key


def _bank_to_measure(banks: Collection[str]) -> HashAlg | None:
    """SHA-256 if it is active; otherwise another one, because a quote takes as long over it."""
    usable = [bank for bank in HashAlg if bank.label in banks]
    return HashAlg.SHA256 if HashAlg.SHA256 in usable else next(iter(usable), None)


def advice(
    manufacturer: str,
    banks: Collection[str] | None,
    certificates: EkCertificates,
    ek: PublicKey | None,
    failures: Collection[str],
) -> Iterator[str]:
    """What to do, in sentences; at least one.

    Args:
        banks: None where they could not be read.
        ek: the key at tpm.ek_handle; None if the handle is empty.
    """
    if banks is not None and "sha256" not in banks:
        yield "Activate the SHA-256 bank: tpm2_pcrallocate sha256:all, then reboot."
        others = [bank.label for bank in HashAlg if bank.label in banks and bank != HashAlg.SHA1]
        if others:
            yield f'Or serve another one: tpm.banks = ["{others[0]}"].'
        elif "sha1" in banks:
            yield (
                'Or serve SHA-1, which can be forged: tpm.banks = ["sha1"] and '
                "tpm.insecure_sha1_bank = true."
            )
    if ek is None:
        yield "Make the EK and the AK: provider-proxy tpm ak create."
    yield from _advice_for_ek(manufacturer, certificates, ek)
    if certificates.passed_over:
        yield "Check the NV indices that were skipped, listed above."
    if failures:
        yield "Check the failures above; if the chip does not answer at all, power the host off and on."


def _advice_for_ek(
    manufacturer: str, certificates: EkCertificates, ek: PublicKey | None
) -> Iterator[str]:
    own = None if ek is None else spki_digest(ek)
    for kind, certificate in certificates.found.items():
        key = certificate.parsed.public_key()
        is_own = isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey) and (
            own is None or spki_digest(key) == own
        )
        if is_own:
            where = " or ".join(issuer_urls(certificate)) or "see the TPM maker's web site"
            yield (
                f"Tenants need the CA {certificate.issuer_name!r} of the EK certificate {kind.name}: "
                f"{where}."
            )
            return
    if ek is None:
        return
    url = certificate_url(manufacturer, ek)
    if url is not None:
        yield (
            f"The chip has no certificate of its EK, but its maker publishes it: fetch {url}, set "
            "tpm.ek_cert_file to that file, and tpm.ek_chain_file to the CAs above it."
        )
    yield (
        "If there is no certificate, tenants vouch for the EK themselves: provider-proxy pin add "
        f"--ek-sha256 {spki_digest(ek).hex()}."
    )


class _UnsupportedError(Exception):
    """The chip does not support such keys."""


class _NotNowError(Exception):
    """The chip cannot make a key now: it is full, busy or locked."""


def _text(value: int) -> str:
    return value.to_bytes(4, "big").decode("ascii", "replace").strip("\0 ")


def _firmware(values: dict[int, int]) -> str:
    first, second = values.get(PT["firmware_1"], 0), values.get(PT["firmware_2"], 0)
    return f"{first >> 16}.{first & 0xFFFF}.{second >> 16}.{second & 0xFFFF}"


def _measure(context: ESAPI, kind: str, bank: HashAlg) -> float:
    """Median milliseconds of a quote with a transient key of this kind.

    Raises:
        _UnsupportedError: the chip does not support such keys.
        _NotNowError: it cannot make one now.
        TpmError: it makes one but cannot quote with it.
    """
    template = TPM2B_PUBLIC.parse(AK_TEMPLATES[kind], objectAttributes=AK_ATTRIBUTES)
    try:
        with progress.announced(f"making a key to measure, {kind}"):
            key = context.create_primary(TPM2B_SENSITIVE_CREATE(), template, ESYS_TR.NULL)[0]
    except TSS2_Exception as exc:
        code = int(exc.error)
        if code >> LAYER_SHIFT in SOFTWARE_LAYERS:
            raise TpmError(f"TPM2_CreatePrimary: {exc}", code=code) from exc
        if code == RC_COMMAND_CODE or code in FORMAT_ONE:  # the algorithm is not supported
            raise _UnsupportedError from exc
        raise _NotNowError from exc
    times = []
    with tss_errors("TPM2_Quote"):
        try:
            chip = Chip(context, ek=ESYS_TR.NONE, ak=key)
            for _ in range(QUOTES_MEASURED):
                begin = time.monotonic()
                chip.quote(secrets.token_bytes(16), bank, 1, HashAlg.SHA256)
                times.append((time.monotonic() - begin) * 1000)
        finally:
            flush(context, key)
    return statistics.median(times)


def _consequences(
    manufacturer: str,
    limits: dict[str, int],
    banks: tuple[str, ...],
    quote_ms: dict[str, float],
    unsupported: Collection[str] = (),
) -> Iterator[str]:
    """What follows from the results; the facts and their sources are in docs/tpm.md."""
    if manufacturer == SOFTWARE:
        yield "This is a software TPM (swtpm): root on this machine can read its keys."
    if "sha256" not in banks:
        yield "No SHA-256 bank is active: the default tpm.banks cannot be served."
    if "ecc" in quote_ms and "rsa" in quote_ms:
        ratio = quote_ms["rsa"] / quote_ms["ecc"]
        if ratio > 1 and quote_ms["rsa"] > SLOW_MS:
            yield f'ak_algorithm = "ecc" quotes {ratio:.1f} times as fast as "rsa" here.'
    elif "ecc" in unsupported:
        yield 'The chip makes no P-256 key: set ak_algorithm = "rsa".'
    slowest = max(quote_ms.values(), default=0.0)
    if slowest:
        rate = 1000 / slowest
        yield f"One after the other, it makes at most {rate:.1f} quotes a second."
    if limits.get("context_gap_max", SMALL_GAP + 1) <= SMALL_GAP:
        yield "A small context gap: a session that is held while others are used becomes unusable."
    if not limits.get("sessions_loaded_free", 1):
        yield "Every session is in use: quotes work, but registrations wait."
    if not limits.get("transient_free", 1):
        yield "Every object slot is in use: on a TPM without a resource manager, quotes wait."
    if limits.get("lockout_counter", 0) >= limits.get("lockout_limit", 1):
        yield "The TPM is in lockout: keys that are subject to the lockout cannot be used."
    if limits.get("digest_max_bytes", 64) == HashAlg.SHA256.digest_bytes:
        yield "qualifyingData holds 34 bytes: enough for the 32 characters of the evidence."
