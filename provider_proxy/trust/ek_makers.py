"""Who makes TPMs, and how a virtual one is recognised: in a chip's certificate, and in a CA's.

A virtual TPM is a program; root on the machine that runs it reads its keys. Its maker's CA is genuine
all the same, and public collections have it beside those of chips. This module lists what is known by
name; the mark 2.23.133.20.1 of a host's own vTPM CA and a tenant's own marks are checked as well.
Source: TCG TPM Vendor ID Registry; TCG EK Credential Profile 2.5, section 3.2.9.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID, ObjectIdentifier

from provider_proxy.evidence.vtpm_ca import OID_CERTIFY
from provider_proxy.trust.ek_certificate import TpmCertificate

MANUFACTURER = ObjectIdentifier("2.23.133.2.1")
MODEL = ObjectIdentifier("2.23.133.2.2")
VERSION = ObjectIdentifier("2.23.133.2.3")
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Maker:
    """A maker of hardware TPMs.

    Attributes:
        vendor_id: the four characters of the TCG's registry.
        in_names: what the organisation or common name of its CAs holds.
    """

    name: str
    vendor_id: str
    in_names: str


MAKERS = (
    Maker("AMD", "AMD", r"advanced micro devices|\bamdtpm\b"),
    Maker("Infineon", "IFX", r"infineon"),
    Maker("Intel", "INTC", r"\bintel\b"),
    Maker("Microsoft", "MSFT", r"microsoft"),
    Maker("Nationz", "NTZ", r"nationz"),
    Maker("NSING", "NSG", r"\bnsing\b"),
    Maker("Nuvoton", "NTC", r"nuvoton|\bntc tpm\b"),
    Maker("STMicroelectronics", "STM", r"stmicroelectronics"),
    Maker("Atmel", "ATML", r"\batmel\b"),
    Maker("Qualcomm", "QCOM", r"qualcomm"),
    Maker("Google", "CROS", r"\bgoogle\b"),
    Maker("GlobalSign, for others", "", r"globalsign"),
    Maker("VeriSign, for others", "", r"verisign"),
)

VIRTUAL_IDS = {
    "00001014": "IBM's software TPM, swtpm",
    "49424D00": "IBM's software TPM",
    "58434720": "the TCG's reference code",
    "564D5700": "VMware's virtual TPM",
    "564D5741": "VMware's virtual TPM",
    "414D5A4E": "Amazon's NitroTPM",
}
"""tpmManufacturer "id:…" of TPMs that are programs."""

VIRTUAL_MODEL_RE = re.compile(
    r"\bv-?tpm|\bsw[ _-]?tpm|swtpm|virtual|nitro|simulator|libtpms|qemu|vmware|xcg ftpm|\bsoftware\b",
    re.IGNORECASE,
)
VIRTUAL_CA_RE = re.compile(
    r"swtpm|v-?tpm\b|virtual tpm|aliyun|alibaba|tpm_ek_v1_cloud|ek/ak ca|google cloud|nitro ?tpm"
    r"|vmware|tencent|huawei ?cloud|\bamazon|o=ibm\b",
    re.IGNORECASE,
)


def chip_facts(leaf: TpmCertificate) -> dict[str, str]:
    """What an EK certificate says of its chip: manufacturer, model and version, where present."""
    found = dict(_chip_attributes(leaf))
    names = {MANUFACTURER: "manufacturer", MODEL: "model", VERSION: "version"}
    return {name: found[oid] for oid, name in names.items() if oid in found}


def maker_of_chip(leaf: TpmCertificate) -> str:
    """The maker that an EK certificate names; its vendor id where that is not one of `MAKERS`."""
    found = chip_facts(leaf).get("manufacturer", "")
    vendor_id = _vendor_id(found)
    for maker in MAKERS:
        if maker.vendor_id and maker.vendor_id == vendor_id:
            return maker.name
    return found.removeprefix("id:") or maker_of_ca(leaf.issuer_name)


def maker_of_ca(name: str) -> str:
    """The maker whose CA has this name; "unknown" for an unknown name."""
    for maker in MAKERS:
        if re.search(maker.in_names, name, re.IGNORECASE):
            return maker.name
    return UNKNOWN


def why_virtual_chip(leaf: TpmCertificate) -> str | None:
    """What in an EK certificate shows that its TPM is a program; None where nothing does."""
    for oid, text in _chip_attributes(leaf):
        if oid == MANUFACTURER:
            known = VIRTUAL_IDS.get(text.upper().removeprefix("ID:"))
            if known is not None:
                return f"its manufacturer {text} is {known}"
        elif VIRTUAL_MODEL_RE.search(text):
            return f"it names {text[:50]!r}"
    return None


def why_virtual_ca(authority: TpmCertificate) -> str | None:
    """What in a CA's certificate says that it is for virtual TPMs; None where nothing does."""
    if any(extension.oid == OID_CERTIFY for extension in authority.parsed.extensions):
        return f"it carries {OID_CERTIFY.dotted_string}, the mark of a host's vTPM CA"
    for name in (authority.name, authority.issuer_name):
        if VIRTUAL_CA_RE.search(name):
            return "its name is that of a maker of virtual TPMs"
    return None


def _vendor_id(text: str) -> str:
    digits = text.removeprefix("id:")
    try:
        return bytes.fromhex(digits).decode("ascii").strip("\0 ")
    except ValueError:
        return ""


def _chip_attributes(leaf: TpmCertificate) -> Iterator[tuple[ObjectIdentifier, str]]:
    """The attributes of the directory names in the SAN, and the subject's common names."""
    names = [leaf.parsed.subject]
    try:
        san = leaf.parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names += san.get_values_for_type(x509.DirectoryName)
    except x509.ExtensionNotFound:
        pass
    for number, name in enumerate(names):
        for attribute in name:
            # The subject's common name is a serial number or a host's name, not the chip's.
            if isinstance(attribute.value, str) and (
                number or attribute.oid != NameOID.COMMON_NAME
            ):
                yield attribute.oid, attribute.value
