"""Starts end, one way or another: each wait has a limit and says what for, each failure what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from helpers import LIMIT_S
from manufactured import manufacture
from tpm2_pytss import ESAPI
from tpm_helpers import (
    CC_CREATE_PRIMARY,
    CC_GET_CAPABILITY,
    CC_QUOTE,
    Faults,
    Hold,
    Swtpm,
    raw_tpm,
    swtpm_at,
    tool,
)

from provider_proxy.common.files import FileLock
from provider_proxy.errors import HostError, TpmError
from provider_proxy.evidence.model import HashAlg
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import local_tpm, tpm_opener
from provider_proxy.host.quoters.tpm_opener import OPEN_LOCK
from provider_proxy.host.tpm import progress
from provider_proxy.host.tpm.chip import OpenContext, open_context, tss_errors
from provider_proxy.host.tpm.response_codes import HINTS, hint_for
from provider_proxy.testing.disturb import Action

CC_EVICT_CONTROL = 0x120
CC_NV_READ = 0x14E
FAILURE = 0x101


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    with swtpm_at(tmp_path / "chip") as made:
        yield made


async def start(
    tcti: str,
    state_dir: Path,
    faults: Faults | None = None,
    *,
    limit_s: float = 60.0,
    **keys: object,
) -> HostError:
    """Why a start failed."""
    settings = Tpm(tcti=tcti, max_duty=1.0, hang_limit_s=limit_s, **keys)  # type: ignore[arg-type]
    opener = faults.open_context if faults is not None else open_context
    with trio.fail_after(LIMIT_S), pytest.raises(HostError) as failed:
        async with local_tpm.open_quoter(settings, state_dir, Metrics(), open_context=opener):
            pass
    return failed.value


# --- a chip that fails, and one that hangs ----------------------------------------------------------


@pytest.mark.real
async def test_a_tpm_in_failure_mode_ends_the_start_at_once(
    chip: Swtpm, tmp_path: Path, faults: Faults
) -> None:
    faults.every(Action(code=FAILURE))
    error = await start(chip.tcti, tmp_path / "s", faults)
    assert "failure mode: power the host off and on" in str(error)
    assert len(faults.seen) < 20
    assert not (tmp_path / "s" / "ak.json").exists()


@pytest.mark.real
@pytest.mark.parametrize(
    ("command", "what"),
    [
        (CC_GET_CAPABILITY, "reading the PCR banks"),
        (CC_CREATE_PRIMARY, "making the EK, RSA-2048"),
        (CC_EVICT_CONTROL, "keeping the EK at handle 0x81010001"),
        (CC_QUOTE, "TPM2_Quote"),
    ],
)
async def test_a_command_that_hangs_ends_the_start_at_the_limit(
    chip: Swtpm, tmp_path: Path, faults: Faults, command: int, what: str
) -> None:
    hold = Hold()
    faults.next(command, Action(hold=hold))
    try:
        error = await start(chip.tcti, tmp_path / "s", faults, limit_s=1.0)
    finally:
        hold.set()
    assert f"gave up waiting for the TPM after 1 s (tpm.hang_limit_s): {what}" in str(error)


@pytest.mark.real
async def test_a_chip_that_is_always_busy_ends_the_start(
    chip: Swtpm, tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    faults.always(CC_QUOTE, Action(code=0x922))
    error = await start(chip.tcti, tmp_path / "s", faults, limit_s=2.0)
    assert "TPM" in str(error)
    assert "again" in caplog.text


async def test_a_long_wait_is_said_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "SAY_AFTER_S", 0.05)
    monkeypatch.setattr(progress, "POLL_S", 0.02)
    waiting = threading.Event()

    async def work() -> str:
        def command() -> str:
            with tss_errors("reading something"):
                waiting.wait(LIMIT_S)
            return "done"

        return await trio.to_thread.run_sync(command)

    async with trio.open_nursery() as nursery:

        async def until_said() -> None:
            with trio.fail_after(LIMIT_S):
                while "waiting for the TPM" not in caplog.text:  # noqa: ASYNC110  # of a logger
                    await trio.sleep(0.01)
            waiting.set()

        nursery.start_soon(until_said)
        assert await local_tpm._within(LIMIT_S, work) == "done"
    assert "reading something" in caplog.text


def test_a_command_without_an_event_loop_has_the_limit_too() -> None:
    never = threading.Event()

    def hang() -> None:
        with tss_errors("reading something"):
            never.wait(LIMIT_S)

    with pytest.raises(
        HostError, match=r"gave up waiting for the TPM after 0\.3 s.*reading something"
    ):
        progress.run_within(hang, 0.3)
    never.set()
    assert progress.run_within(lambda: 7, 1.0) == 7
    with pytest.raises(ZeroDivisionError):
        progress.run_within(lambda: 1 / 0, 1.0)


def test_the_limit_is_for_each_step() -> None:
    def steps() -> None:
        for number in range(6):
            with tss_errors(f"step {number}"):
                time.sleep(0.1)

    progress.run_within(steps, 0.5)


@pytest.mark.real
@pytest.mark.parametrize(
    "words",
    [("tpm", "ak", "create"), ("tpm", "ak", "show"), ("tpm", "doctor"), ("register",), ("serve",)],
)
def test_commands_end_on_a_tpm_in_failure_mode(tmp_path: Path, words: tuple[str, ...]) -> None:
    """As people run them: an exit code and a sentence, within seconds."""
    faults = Faults()
    with raw_tpm(tmp_path / "chip", faults) as broker:
        (tmp_path / "c.toml").write_text(
            f'state_dir = "{tmp_path}/s"\n[listen]\naddress = "127.0.0.1:0"\n'
            f'insecure_plaintext = true\n[tpm]\ntcti = "{broker.tcti}"\nhang_limit_s = 10\n'
            '[registrars.a]\nurl = "http://127.0.0.1:1"\ninsecure_plaintext = true\n'
        )
        faults.every(Action(code=FAILURE))
        done = subprocess.run(
            [sys.executable, "-m", "provider_proxy", *words, "--config", tmp_path / "c.toml"],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert done.returncode == 3, done.stderr
    assert "failure mode: power the host off and on" in done.stderr
    assert "Traceback" not in done.stderr


# --- banks ------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("banks", "ways"),
    [
        ("sha384", ("tpm2_pcrallocate sha256:all, then reboot", 'tpm.banks = ["sha384"]')),
        ("sha1", ("tpm2_pcrallocate sha256:all", "tpm.insecure_sha1_bank = true")),
    ],
)
async def test_no_sha_256_bank(tmp_path: Path, banks: str, ways: tuple[str, ...]) -> None:
    """Before any key is made: nothing is left in the chip or on the disk."""
    with swtpm_at(manufacture(tmp_path, "--createek", banks=banks)) as made:
        tool(made.tcti, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "0x81010001")
        before = tool(made.tcti, "tpm2_getcap", "handles-persistent")
        error = await start(made.tcti, tmp_path / "s")
        for way in (*ways, f"active: {banks}"):
            assert way in str(error)
        assert tool(made.tcti, "tpm2_getcap", "handles-persistent") == before
        assert not (tmp_path / "s").exists()
        # The way out that was named is one.
        settings = Tpm(tcti=made.tcti, max_duty=1.0, banks=(HashAlg.from_label(banks),))
        async with local_tpm.open_quoter(settings, tmp_path / "s", Metrics()) as quoter:
            quote = await quoter.quote(b"0123456789abcdef", settings.banks[0], 1)
        assert quote.pcrs.bank.label == banks


# --- hints fit the failure --------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("script", "words"),
    [
        (("tpm2_changeauth", "-Q", "-c", "owner", "secret"), ("tpm.owner_auth_file",)),
        (
            ("tpm2_hierarchycontrol", "-Q", "-C", "p", "ehEnable", "clear"),
            ("hierarchy is disabled",),
        ),
        (
            ("tpm2_hierarchycontrol", "-Q", "-C", "p", "shEnable", "clear"),
            ("hierarchy is disabled",),
        ),
    ],
    ids=["a password", "no endorsement hierarchy", "no owner hierarchy"],
)
async def test_hints_of_a_real_chip(
    chip: Swtpm, tmp_path: Path, script: tuple[str, ...], words: tuple[str, ...]
) -> None:
    tool(chip.tcti, *script)
    message = str(await start(chip.tcti, tmp_path / "s"))
    for word in words:
        assert word in message
    assert ("auth_file" in message) == ("auth_file" in words[0])


@pytest.mark.real
@pytest.mark.parametrize(
    ("command", "code", "hint"),
    [
        (CC_EVICT_CONTROL, 0x14B, "NV memory is full"),
        (CC_EVICT_CONTROL, 0x14C, "start again"),
        (CC_CREATE_PRIMARY, 0x921, "in lockout"),
        (CC_CREATE_PRIMARY, 0x143, "does not support this command"),
    ],
)
async def test_hints_by_code(
    chip: Swtpm, tmp_path: Path, faults: Faults, command: int, code: int, hint: str
) -> None:
    faults.always(command, Action(code=code))
    message = str(await start(chip.tcti, tmp_path / "s", faults))
    assert hint in message
    assert "auth_file" not in message


def test_hints_are_for_the_chip_s_codes_alone() -> None:
    assert hint_for(0xA000A) == hint_for(0x9FFFF) == hint_for(0) == ""
    assert hint_for(0xB0101) == f"; {HINTS[0x101]}"  # the kernel's resource manager passes it on
    assert all("; " in hint_for(code) for code in HINTS)


# --- two first starts on one state directory --------------------------------------------------------


@pytest.mark.real
async def test_two_first_starts_agree_on_one_key(chip: Swtpm, tmp_path: Path) -> None:
    """The second process finds the first one's key, and its authValue in ak.json."""
    state = tmp_path / "s"
    names: list[bytes] = []

    async def one() -> None:
        settings = Tpm(tcti=chip.tcti, max_duty=1.0)
        async with local_tpm.open_quoter(settings, state, Metrics(), open_context=shared) as quoter:
            names.append(quoter.ak.name)

    # A raw swtpm serves one connection at a time, as a chip without a resource manager does.
    turns = threading.Lock()
    shared = _taking_turns(turns)
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
    assert len(set(names)) == 1
    assert json.loads(await trio.Path(state / "ak.json").read_text())["name"] == names[0].hex()


def _taking_turns(turns: threading.Lock) -> OpenContext:
    def opened(tcti: str) -> ESAPI:
        assert turns.acquire(timeout=LIMIT_S)
        context = open_context(tcti)
        close = context.close

        def closed() -> None:
            close()
            turns.release()

        context.close = closed
        return context

    return opened


@pytest.mark.real
async def test_a_lock_that_is_held_is_waited_for_and_said(chip: Swtpm, tmp_path: Path) -> None:
    state = tmp_path / "s"
    lock = FileLock(state / OPEN_LOCK)
    assert lock.take()
    try:
        error = await start(chip.tcti, state, limit_s=1.0)
        assert f"another process holds {state / OPEN_LOCK}" in str(error)
        assert not (state / "ak.json").exists()
    finally:
        lock.release()
    async with local_tpm.open_quoter(Tpm(tcti=chip.tcti, max_duty=1.0), state, Metrics()):
        pass


def test_nothing_is_written_before_the_chip_is_there(tmp_path: Path) -> None:
    settings = Tpm(tcti="swtpm:path=/nonexistent")
    opener = tpm_opener.TpmOpener(
        settings, tmp_path / "s", host_uuid=None, open_context=open_context
    )
    with pytest.raises(TpmError):
        opener.open()
    assert list(tmp_path.iterdir()) == []
