"""Whether the host's IMA uses the chip, and how long its extends take because of the kernel.

IMA extends a PCR before a new or changed file is used, and stops the program until the TPM has done so.
Reads only the kernel's files; it distinguishes an unreadable file from a missing one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from provider_proxy.common.files import is_there, read_file
from provider_proxy.errors import HostError, UsageError
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.tpm.pace import capped_duty

IMA_FOLDER = Path("/sys/kernel/security/ima")
INTEGRITY_SWITCH = Path("/sys/module/tpm/parameters/disable_pcr_integrity")
BOOT_CONFIG = "/boot/config-{release}"
ENCRYPTED_SINCE = (6, 10)  # the kernel puts each extend into an HMAC session: CONFIG_TCG_TPM2_HMAC
SWITCH_SINCE = (6, 12)  # tpm.disable_pcr_integrity
MAX_BYTES = 1024 * 1024


def is_measuring(folder: Path = IMA_FOLDER) -> bool | None:
    """True where an IMA policy is active: more than the boot aggregate was measured.

    Returns:
        None where that cannot be read; assume an active policy then.
    """
    try:
        if not is_there(folder):
            return False
        return int(read_file(folder / "runtime_measurements_count", MAX_BYTES)) > 1
    except (HostError, UsageError, OSError, ValueError):
        return None


def wait_bound_s(ima_wait_ms: float, folder: Path = IMA_FOLDER) -> float | None:
    """The limit of IMA's mean wait for our commands on this host, in seconds; None for no limit.

    Args:
        ima_wait_ms: `tpm.ima_wait_ms`; 0 for no limit.
    """
    if not ima_wait_ms or is_measuring(folder) is False:
        return None
    return ima_wait_ms / 1000


def advice(
    settings: Tpm, quote_ms: Mapping[str, float], command_ms: Mapping[str, float]
) -> Iterator[str]:
    """How long IMA waits on this host, in sentences.

    Args:
        quote_ms: kind of AK to the time of a quote.
        command_ms: "extend" to the time of an extend; missing if it could not be measured.
    """
    slow = slow_extends()
    if slow is not None:
        yield slow
    measures = is_measuring()
    if measures is False or "extend" not in command_ms:
        return
    if measures is None:
        yield "Cannot read whether IMA measures files on this host; assuming that it does."
    bound_s = settings.ima_wait_ms / 1000 or None
    for kind, ms in quote_ms.items():
        duty = capped_duty(settings.max_duty, ms / 1000, bound_s)
        mean_ms = command_ms["extend"] + duty * ms / 2
        yield (
            f"IMA's extend takes {command_ms['extend']:.0f} ms. Beside quotes of an {kind} key at a "
            f"duty of {duty:.2f} a new program waits {mean_ms:.0f} ms for it on average, and "
            f"{command_ms['extend'] + ms:.0f} ms at most."
        )


def slow_extends(
    release: str | None = None,
    *,
    switch: Path = INTEGRITY_SWITCH,
    boot_config: str = BOOT_CONFIG,
) -> str | None:
    """Why this kernel's extends take longer than the chip needs; None if they do not.

    Args:
        release: of the kernel; the running one where None.
    """
    release = os.uname().release if release is None else release
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (version := (int(found[1]), int(found[2]))) < ENCRYPTED_SINCE:
        return None
    if _text(Path(boot_config.format(release=release)), "# CONFIG_TCG_TPM2_HMAC is not set"):
        return None
    if _text(switch, "Y") or _text(switch, "1"):
        return None
    slow = (
        f"Kernel {release} protects each PCR extend with an HMAC session, which takes several TPM "
        "commands: IMA waits longer than the extend time measured here."
    )
    if version >= SWITCH_SINCE:
        return f"{slow} To turn this off, boot with tpm.disable_pcr_integrity=1."
    return f"{slow} From kernel 6.12 on, tpm.disable_pcr_integrity=1 turns this off."


def _text(path: Path, line: str) -> bool:
    """True if a file has this line; False if it has not, is missing or cannot be read."""
    try:
        return line in read_file(path, MAX_BYTES).decode("utf-8", "replace").splitlines()
    except (HostError, UsageError):
        return False
