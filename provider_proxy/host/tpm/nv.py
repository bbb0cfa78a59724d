"""Reads NV indices of a TPM; an index that cannot be read gives a reason and does not stop the others.

Source: TPM 2.0 Library Part 3, section 31.13 (TPM2_NV_Read); Part 2, section 13.4 (TPMA_NV).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tpm2_pytss import ESAPI, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPMA_NV

from provider_proxy.host.tpm import capabilities
from provider_proxy.host.tpm.chip import tss_errors

DEFAULT_BUFFER_BYTES = 512  # every TPM can read this much at once
MAX_INDEX_BYTES = 16 * 1024  # a certificate with all its padding has 2 kB


class UnreadableIndexError(Exception):
    """An index exists but cannot be read; the text says why. Raised only inside `host.tpm`."""


@dataclass(slots=True)
class NvReader:
    """Reads indices, each once.

    Args:
        owner_auth: authorisation of the owner hierarchy, for an index that only the owner may read.

    Attributes:
        defined: all indices that the TPM has.
    """

    context: ESAPI
    owner_auth: bytes = b""
    defined: frozenset[int] = field(init=False)
    _buffer_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        with tss_errors("listing the TPM's NV indices"):
            self.defined = frozenset(capabilities.handles(self.context, capabilities.FIRST_NV))
            listed = capabilities.one_property(
                self.context, capabilities.NV_BUFFER_MAX, DEFAULT_BUFFER_BYTES
            )
        self._buffer_bytes = max(16, min(listed, 2048))

    def read(self, index: int) -> bytes | None:
        """What an index holds; None where it is not defined.

        Raises:
            UnreadableIndexError: it was never written, is too large, or must not be read.
            TpmError: the TPM fails.
        """
        if index not in self.defined:
            return None
        with tss_errors(f"reading NV index {index:#010x}"):
            try:
                return self._read(index)
            except TSS2_Exception as exc:
                if int(exc.error) not in PASSED_OVER:
                    raise
                raise UnreadableIndexError(PASSED_OVER[int(exc.error)]) from exc

    def _read(self, index: int) -> bytes:
        handle = self.context.tr_from_tpmpublic(index)
        public, _ = self.context.nv_read_public(handle)
        attributes, size = public.nvPublic.attributes, int(public.nvPublic.dataSize)
        if not attributes & TPMA_NV.WRITTEN:
            raise UnreadableIndexError("it is defined but was never written")
        if size > MAX_INDEX_BYTES:
            raise UnreadableIndexError(f"it is too large: {size} bytes")
        if attributes & TPMA_NV.AUTHREAD:
            auth = handle
        elif attributes & TPMA_NV.OWNERREAD:
            auth = ESYS_TR.OWNER
            self.context.tr_set_auth(ESYS_TR.OWNER, self.owner_auth)
        else:
            raise UnreadableIndexError(
                "only the platform, or a session that meets its policy, may read it"
            )
        data = b""
        while len(data) < size:
            part = bytes(
                self.context.nv_read(
                    handle, min(self._buffer_bytes, size - len(data)), len(data), auth_handle=auth
                )
            )
            if not part:
                raise UnreadableIndexError("the TPM returns fewer bytes than the index has")
            data += part
        return data


PASSED_OVER = {
    0x08B: "it no longer exists",  # HANDLE
    0x08E: "its authorisation is not empty",  # AUTH_FAIL
    0x0A2: "it needs the owner's authorisation (tpm.owner_auth_file)",  # BAD_AUTH
    0x12F: "it has an authorisation that cannot be used",  # AUTH_UNAVAILABLE
    0x148: "it is locked for reading",  # NV_LOCKED
    0x149: "reading it is not authorised",  # NV_AUTHORIZATION
    0x14A: "it was never written",  # NV_UNINITIALIZED
    0x146: "it is smaller than its public area says",  # NV_RANGE
    0x085: "its hierarchy is disabled",  # HIERARCHY
}
"""Response codes that are about one index, and what they mean: Part 2, section 6.6."""
