"""A TPM's properties: TPM2_GetCapability, called a bounded number of times whatever it answers."""

from __future__ import annotations

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import TPM2_CAP

from provider_proxy.evidence.model import HashAlg

ALL_PROPERTIES = 256
FIXED_PROPERTIES = 0x100
VARIABLE_PROPERTIES = 0x200
NV_BUFFER_MAX = 0x12C
MANUFACTURER = 0x105
FIRST_PERSISTENT = 0x81000000
FIRST_NV = 0x01000000


def properties(context: ESAPI) -> dict[int, int]:
    """Property tags to values, fixed and variable ones. Call it inside `tss_errors`."""
    found: dict[int, int] = {}
    for group in (FIXED_PROPERTIES, VARIABLE_PROPERTIES):
        start, more = group, True
        while more:
            more, data = context.get_capability(TPM2_CAP.TPM_PROPERTIES, start, ALL_PROPERTIES)
            part = {int(p.property): int(p.value) for p in data.data.tpmProperties}
            found |= part
            start = max(part, default=group) + 1
            more = bool(more) and bool(part) and start < group + ALL_PROPERTIES
    return found


def one_property(context: ESAPI, tag: int, default: int) -> int:
    """One property; the default where the TPM does not list it. Call it inside `tss_errors`."""
    _, data = context.get_capability(TPM2_CAP.TPM_PROPERTIES, tag, 1)
    return next((int(p.value) for p in data.data.tpmProperties if int(p.property) == tag), default)


def algorithms(context: ESAPI) -> tuple[str, ...]:
    """The algorithms that matter here, by their names. Call it inside `tss_errors`."""
    _, data = context.get_capability(TPM2_CAP.ALGS, 0, ALL_PROPERTIES)
    numbers = {int(entry.alg) for entry in data.data.algorithms}
    names = {0x0001: "rsa", 0x0023: "ecc", 0x0014: "rsassa", 0x0018: "ecdsa"}
    names |= {int(alg): alg.label for alg in HashAlg}
    return tuple(name for number, name in sorted(names.items()) if number in numbers)


def handles(context: ESAPI, first: int) -> tuple[int, ...]:
    """All handles of one kind, starting at `first`. Call it inside `tss_errors`."""
    found: list[int] = []
    more = True
    while more:
        start = found[-1] + 1 if found else first
        more, data = context.get_capability(TPM2_CAP.HANDLES, start, ALL_PROPERTIES)
        part = [int(h) for h in data.data.handles if int(h) >> 24 == first >> 24]
        found += part
        more = bool(more) and bool(part)
    return tuple(found)


def banks(context: ESAPI) -> tuple[str, ...]:
    """The active PCR banks: "sha256", or "0x0012" for one without a name. Inside `tss_errors`."""
    _, data = context.get_capability(TPM2_CAP.PCRS, 0, ALL_PROPERTIES)
    names = {int(alg): alg.label for alg in HashAlg}
    return tuple(
        names.get(int(bank.hash), f"{int(bank.hash):#06x}")
        for bank in data.data.assignedPCR
        if any(bytes(bank.pcrSelect))
    )
