"""An exclude that backtracks for ever on a host's name is a refusal, and holds nothing up."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator

import pytest
from ima_helpers import extended, line, text

from provider_proxy.errors import LogError
from provider_proxy.evidence.logs.judge import LogJudge, LogPolicy
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import AkName, ClockState, HashAlg, HostLogs, VerifiedQuote
from provider_proxy.tenant.step_limit import bounded

RUNTIME = parse_runtime_policy(
    json.dumps({"digests": {}, "excludes": ["boot_aggregate", r"/(a+)+$"]}).encode()
)


def quote(pcr10: bytes) -> VerifiedQuote:
    return VerifiedQuote(
        bank=HashAlg.SHA256,
        pcrs={10: pcr10},
        clock=ClockState(reset_count=1, restart_count=0, clock_ms=1),
        clock_safe=True,
        firmware_version=1,
        was_reset=False,
        ak_name=AkName(b""),
        claims=None,
    )


def test_an_exclude_that_takes_for_ever_is_a_refusal() -> None:
    lines = [line("boot_aggregate"), line("/" + "a" * 60 + "!"), line("/aaa")]
    logs = HostLogs(ima=text(lines))
    judge = LogJudge(LogPolicy(runtime=RUNTIME), HashAlg.SHA256)
    with pytest.raises(LogError, match="excludes take too long"):
        list(bounded(judge.judge(quote(extended(lines, "sha256")), logs), 0.05))
    assert judge.ima_ml_entry == 0
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    good = [lines[0], lines[2]]
    logs = HostLogs(ima=text(good))
    assert list(bounded(judge.judge(quote(extended(good, "sha256")), logs)))[-1] is True


def numbers() -> Iterator[int]:
    yield 1
    yield 2
    raise LogError("at the end")


def test_steps_and_errors_come_as_they_are() -> None:
    steps = bounded(numbers())
    for number in (1, 2):
        assert next(steps) == number
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)  # not between the steps
    with pytest.raises(LogError, match="at the end"):
        next(steps)


def test_a_program_that_has_the_signal_keeps_it() -> None:
    def own(_number: int, _frame: object) -> None: ...

    before = signal.signal(signal.SIGVTALRM, own)
    try:
        steps = bounded(numbers())
        assert next(steps) == 1
        assert signal.getsignal(signal.SIGVTALRM) is own
    finally:
        signal.signal(signal.SIGVTALRM, before)


def test_other_threads_judge_without_a_timer() -> None:
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(next(bounded(numbers()))))
    thread.start()
    thread.join(10)
    assert got == [1]
