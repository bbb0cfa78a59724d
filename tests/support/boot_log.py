"""A boot of Linux by shim and GRUB without Secure Boot, as firmware and boot loaders measure it.

Whole enough for Keylime's measured-boot policy "example" and its `keylime-policy create measured-boot`.
Source: TCG PC Client Platform Firmware Profile 1.06, section 10.
"""

from __future__ import annotations

import struct
import uuid

Event = tuple[int, int, bytes, bytes]
"""PCR, type, data, and the bytes whose digests it has."""
COMMAND_LINE = "kernel_cmdline: "  # GRUB measures what follows

S_CRTM_VERSION, SEPARATOR, IPL = 0x08, 0x04, 0x0D
VARIABLE_DRIVER_CONFIG, SERVICES_APPLICATION = 0x8000_0001, 0x8000_0003
EFI_ACTION, FIRMWARE_BLOB = 0x8000_0007, 0x8000_0008
GLOBAL_VARIABLE = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
SECURITY_DATABASE = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")


def _variable(guid: uuid.UUID, name: str, data: bytes) -> Event:
    text = name.encode("utf-16-le")
    body = guid.bytes_le + struct.pack("<QQ", len(name), len(data)) + text + data
    return 7, VARIABLE_DRIVER_CONFIG, body, body


def _application(path: str, mark: bytes) -> Event:
    """An image that was loaded; `mark` stands for its content."""
    text = f"{path}\0".encode("utf-16-le")
    device = struct.pack("<BBH", 4, 4, 4 + len(text)) + text + b"\x7f\xff\x04\x00"
    place = int.from_bytes(mark[:4].ljust(4, b"\0"), "little")
    body = struct.pack("<QQQQ", place, 4096, 0, len(device)) + device
    return 4, SERVICES_APPLICATION, body, body


def _ipl(pcr: int, text: str) -> Event:
    data = text.encode() + b"\0"
    measured = data
    if text.startswith(COMMAND_LINE):
        measured = text.removeprefix(COMMAND_LINE).encode()
    return pcr, IPL, data, measured


def _plain(pcr: int, kind: int, data: bytes) -> Event:
    return pcr, kind, data, data


def boot_events(grub: bytes = b"grub") -> list[Event]:
    """The events.

    Args:
        grub: of the boot loader's image; other bytes are another one.
    """
    return [
        _plain(0, S_CRTM_VERSION, "v1.0\0".encode("utf-16-le")),
        _plain(0, FIRMWARE_BLOB, struct.pack("<QQ", 0x82_0000, 0xE_0000)),
        _variable(GLOBAL_VARIABLE, "SecureBoot", b"\0"),
        *(_variable(GLOBAL_VARIABLE, name, b"") for name in ("PK", "KEK")),
        *(_variable(SECURITY_DATABASE, name, b"") for name in ("db", "dbx")),
        *(_plain(pcr, SEPARATOR, bytes(4)) for pcr in range(8)),
        _plain(4, EFI_ACTION, b"Calling EFI Application from Boot Option"),
        _application("\\EFI\\debian\\shimx64.efi", b"shim"),
        _application("\\EFI\\debian\\grubx64.efi", grub),
        _ipl(14, "MokList"),
        _ipl(9, "/boot/vmlinuz-6.1"),
        _ipl(8, f"{COMMAND_LINE}/boot/vmlinuz-6.1 root=/dev/vda1 ro"),
        _ipl(9, "/boot/initrd.img-6.1"),
    ]
