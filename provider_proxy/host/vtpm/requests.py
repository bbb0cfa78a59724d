"""Certificate requests of swtpm_setup, as values: a VM's EK or platform, and its TPM's properties.

The hooks' server makes a `CertificateRequest` from a hook's message, and an `Issuer`, where there
is one, answers it with a certificate. Nothing is read, signed or written here.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

CertificateKind = Literal["ek", "platform"]
EkPublicKey = RSAPublicKey | EllipticCurvePublicKey

MAX_CERTIFICATE_BYTES: Final = 2048  # swtpm_setup refuses a file of 2049 (tried with swtpm 0.7.1)
MAX_VMID_CHARS: Final = 512  # libvirt: a domain's name is at most a file name (255 bytes)
MAX_NUMBER: Final = 2**32 - 1  # TPM_PT_LEVEL and TPM_PT_REVISION are UINT32
_WORD_RE = re.compile(r"[\x20-\x7e]{1,64}")
_ID_RE = re.compile(r"id:[0-9A-Fa-f]{8}")  # TCG EK Credential Profile 2.x: hex of a UINT32
_VERSION_RE = re.compile(r"id:[0-9A-Fa-f]{1,16}")  # a firmware version has up to 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRequest:
    """A certificate that swtpm_setup asks for while it makes a vTPM.

    Attributes:
        kind: "ek", or "platform", which binds the same EK to the platform.
        public_key: the EK: RSA, P-256 or P-384.
        vm: UUID of the VM; the end of `vmid`.
        vmid: `name:uuid`, as libvirt gives it; the name may hold any printable character, also ':'.
        spec_family: of the TPM library specification, "2.0".
        spec_level: its level.
        spec_revision: its revision, 164 for example.
        manufacturer: "id:" and 8 hex digits.
        model: "swtpm", for example.
        version: "id:" and hex digits.

    Raises:
        ValueError: a value is not valid; all of them become part of a certificate.
    """

    kind: CertificateKind
    public_key: EkPublicKey
    vm: uuid.UUID
    vmid: str
    spec_family: str
    spec_level: int
    spec_revision: int
    manufacturer: str
    model: str
    version: str

    def __post_init__(self) -> None:
        if self.kind not in ("ek", "platform"):
            raise ValueError('kind must be "ek" or "platform"')
        if not self.vmid.isprintable() or not 36 <= len(self.vmid) <= MAX_VMID_CHARS:
            raise ValueError(f"vmid must be printable and have at most {MAX_VMID_CHARS} characters")
        if self.vmid.rpartition(":")[2].lower() != str(self.vm):
            raise ValueError("vmid must end with the VM's UUID")
        if not _WORD_RE.fullmatch(self.spec_family) or not _WORD_RE.fullmatch(self.model):
            raise ValueError("spec_family and model must be short texts")
        if not _ID_RE.fullmatch(self.manufacturer) or not _VERSION_RE.fullmatch(self.version):
            raise ValueError('manufacturer and version must be "id:" and hex digits')
        if not 0 <= self.spec_level <= MAX_NUMBER or not 0 <= self.spec_revision <= MAX_NUMBER:
            raise ValueError("spec_level and spec_revision must be 32-bit numbers")


class Issuer(Protocol):
    """Signs certificates of vTPMs: the host's own CA, with `vtpm.issuer = "tpm"`."""

    async def issue(self, request: CertificateRequest) -> bytes:
        """A certificate, DER, at most `MAX_CERTIFICATE_BYTES`.

        Raises:
            HostError, ServiceError: no certificate can be issued now.
        """
        ...
