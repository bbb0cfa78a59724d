"""What real Keylime and a bridge are tried with: hosts that lie, files that run, policies, waiting."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio
from evidence_factory import VM
from keylime_helpers import keylime_environment, keylime_program
from keylime_rig import Keylime, Running
from link_claims import EK
from plain_proxy import PlainProxy
from real_host import File
from watch_helpers import link

from provider_proxy.evidence.model import ClockState, QuoteRequest
from provider_proxy.testing.soft_tpm import SoftTpm

FIRMWARE = json.dumps({"0": [sha256(b"firmware").hexdigest()]})
FILES: list[File] = [
    ("boot_aggregate", b"boot"),
    ("/usr/bin/one", b"one"),
    ("/usr/bin/two", b"two"),
]
MORE: list[File] = [(f"/opt/{number}", b"%d" % number) for number in range(40)]


def runtime_policy(files: list[File]) -> str:
    """Keylime's runtime policy that lists these files."""
    return json.dumps(
        {
            "meta": {"version": 1, "generator": 1},
            "release": 0,
            "digests": {path: [sha256(content).hexdigest()] for path, content in files},
            "excludes": [],
            "keyrings": {},
            "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
            "ima-buf": {},
            "verification-keys": "",
        }
    )


async def start(bridge: Running) -> dict[str, str]:
    """Start a bridge; its agents' ids."""
    await trio.to_thread.run_sync(bridge.start)
    ids: dict[str, str] = await trio.to_thread.run_sync(bridge.ids)
    return ids


async def until_said(bridge: Running, name: str, last: str) -> None:
    """Wait until the bridge says so of a host's last poll."""
    end = time.monotonic() + 30
    while bridge.status()["hosts"][name]["last"] != last:
        assert time.monotonic() < end, bridge.status()
        await trio.sleep(0.05)


def make_refstate(keylime: Keylime, log: Path, path: Path) -> None:
    """What Keylime's own tool makes of a good boot's log, for its measured-boot policy "example"."""
    site = keylime.registrar.site
    program = [*map(str, keylime_program("keylime-policy", site))]
    words = ("create", "measured-boot", "--without-secureboot", "-e", str(log), "-o", str(path))
    environment = keylime_environment(keylime.folder, site)
    subprocess.run([*program, *words], env=environment, check=True, capture_output=True, timeout=60)
    assert json.loads(path.read_text())["kernels"][0]["grub_authcode_sha256"]


# --- hosts that lie ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lie:
    """What a host does, and what Keylime must say."""

    tell: Callable[[PlainProxy], None]
    reason: str


def change_pcr(proxy: PlainProxy) -> None:
    proxy.fake.tpm.extend(0, b"evil")


def roll_back(proxy: PlainProxy) -> None:
    clock = proxy.fake.tpm.clock
    proxy.fake.tpm.clock = ClockState(
        reset_count=clock.reset_count, restart_count=0, clock_ms=clock.clock_ms - 5
    )


def change_ak(proxy: PlainProxy) -> None:
    proxy.fake.tpm = SoftTpm(pcrs={0: b"firmware"})


def replay(proxy: PlainProxy) -> None:
    kept = proxy.fake.good(proxy.fake.asked[-1][1])
    proxy.fake.answer = lambda request: kept


def tampered(proxy: PlainProxy, change: Callable[[dict[str, Any]], None]) -> None:
    good = proxy.fake.good

    def answer(request: QuoteRequest) -> bytes:
        _, _, body = good(request).partition(b"\r\n\r\n")
        values = json.loads(body)
        change(values["results"])
        body = json.dumps(values).encode()
        return b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    proxy.fake.answer = answer


def another_salt(results: dict[str, Any]) -> None:
    results["merkle"]["salt"] = "00" * 16


def another_path(results: dict[str, Any]) -> None:
    results["merkle"]["path"] = ["00" * 32] * len(results["merkle"]["path"])


def another_value(results: dict[str, Any]) -> None:
    attest, signature, blob = results["quote"].split(":")
    values = bytearray(base64.b64decode(blob))
    values[132 + 4 + 4 + 2] ^= 1  # the first byte of the first digest
    results["quote"] = ":".join((attest, signature, base64.b64encode(values).decode()))


def unlink(proxy: PlainProxy) -> None:
    link(proxy.fake, eks=[])


def crash(proxy: PlainProxy) -> None:
    proxy.fake.tpm.clock_safe = False


def link_to_a_vm(proxy: PlainProxy, folder: Path) -> dict[str, object]:
    """Answer with the link of a VM; what the watcher's file says of it."""
    link(proxy.fake)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vm.ek"
    path.write_bytes(EK)
    return {"vm": str(VM), "vm_ek": str(path)}


LIES = {
    "pcr": Lie(change_pcr, ""),  # true evidence of another state: Keylime's own policy says so
    "clock": Lie(roll_back, "refused: ClockError: "),
    "ak": Lie(change_ak, "refused: SignatureError: "),
    "link": Lie(unlink, "refused: EkNotLinkedError: "),
    "crash": Lie(
        crash, "refused: ClockError: the TPM marks its clock as unsafe"
    ),  # after_crash: refuse
    "replay": Lie(replay, "refused: QualifyingDataError: "),
    "salt": Lie(partial(tampered, change=another_salt), "refused: QualifyingDataError: "),
    "path": Lie(partial(tampered, change=another_path), "refused: QualifyingDataError: "),
    "value": Lie(partial(tampered, change=another_value), "refused: PcrDigestError: "),
}
