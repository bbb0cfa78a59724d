"""What holds for a whole run: the number of skipped tests is printed and bounded."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-skipped",
        type=int,
        default=None,
        metavar="N",
        help="fail a run that skips more than N tests; the summary names each reason",
    )


def skipped_in(session: pytest.Session) -> int:
    """How many tests this run has skipped so far."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", ())) if reporter is not None else 0


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    limit = session.config.getoption("max_skipped")
    if limit is not None and exitstatus == pytest.ExitCode.OK and skipped_in(session) > limit:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    limit = terminalreporter.config.getoption("max_skipped")
    if limit is None:
        return
    skipped = len(terminalreporter.stats.get("skipped", ()))
    verdict = "too many" if skipped > limit else "within the bound"
    terminalreporter.write_line(f"skipped tests: {skipped} of at most {limit}: {verdict}")
