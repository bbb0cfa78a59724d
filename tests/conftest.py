"""What holds for a whole run: one environment everywhere, and a bound on the number of skipped tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# What tests, and the commands that they start, get of the caller's environment. With anything else
# (Python's own switches, proxies, certificates, a service manager's sockets) they would pass here and
# fail there.
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TERM", "VIRTUAL_ENV", "CI")
# And how a run is asked for more than usual.
KEPT_PREFIXES = (
    "FUZZ_",
    "TEST_",
    "SOAK_",
    "PYTEST_",
    "HYPOTHESIS_",
    "OPENBLAS_",
    "COVERAGE_",
    "KEYLIME_BRIDGE",
    "KEYLIME_RELEASES",
    "PROVIDER_PROXY_CORPUS",
)
for name in list(os.environ):
    if name not in KEPT and not name.startswith(KEPT_PREFIXES):
        del os.environ[name]
# Servers that tests start are there, and an ordinary user's PATH leaves it out.
os.environ["PATH"] = ":".join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# How long an example takes is the machine's affair, so no test has a deadline.
settings.register_profile("provider-proxy", deadline=None)
settings.load_profile("provider-proxy")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have hypothesis make its tables of characters, which takes it seconds in a fresh checkout.

    Else the first test that asks for text would make them, and fail as too slow in making its data.
    """
    if any(
        getattr(getattr(item, "obj", None), "is_hypothesis_test", False) for item in session.items
    ):

        @given(st.text(), st.floats())
        @settings(max_examples=1, database=None, suppress_health_check=list(HealthCheck))
        def draw(_text: str, _number: float) -> None:
            pass

        draw()


# What only some tests need; `make test` goes on where one of these cannot be installed.
OPTIONAL = (
    *("chromium", "PostgreSQL", "promtool", "haproxy", "nginx"),
    *("mandoc", "zsh", "fish"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-skipped",
        type=int,
        default=None,
        metavar="N",
        help="fail a run that skips more than N tests, beside those of optional programs that are"
        " not installed; the summary names each reason",
    )


def skipped_in(session: pytest.Session) -> tuple[int, dict[str, int]]:
    """How many tests this run has skipped so far, and how many more for want of which program."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    count = 0
    missing: dict[str, int] = {}
    for report in reporter.stats.get("skipped", ()) if reporter is not None else ():
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        program = reason.removesuffix(" is not installed")
        if program in OPTIONAL:
            missing[program] = missing.get(program, 0) + 1
        else:
            count += 1
    return count, missing


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    limit = session.config.getoption("max_skipped")
    if limit is not None and exitstatus == pytest.ExitCode.OK and skipped_in(session)[0] > limit:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    limit = terminalreporter.config.getoption("max_skipped")
    if limit is None or terminalreporter._session is None:
        return
    skipped, missing = skipped_in(terminalreporter._session)
    verdict = "too many" if skipped > limit else "within the bound"
    terminalreporter.write_line(f"skipped tests: {skipped} of at most {limit}: {verdict}")
    if missing:
        listed = ", ".join(f"{program} ({count})" for program, count in sorted(missing.items()))
        terminalreporter.write_line(f"skipped besides, because these are not installed: {listed}")
