"""Every date in one place: warnings, readiness, metrics, status."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from provider_proxy.common.dates import EXPIRED, GOOD, NOT_YET, SOON, Calendar, Dated

NOW = datetime(2026, 11, 28, 9, 0, tzinfo=UTC)
DAY = timedelta(days=1)


def dated(end: datetime, *, name: str = "listen.tls_cert", vital: bool = False) -> Dated:
    return Dated(
        name=name, path=Path("/c"), not_before=NOW - DAY, not_after=end, vital=vital, means="X"
    )


@pytest.mark.parametrize(
    ("end", "state", "words"),
    [
        (NOW + 15 * DAY, GOOD, None),
        (NOW + 13.5 * DAY, SOON, "listen.tls_cert: /c expires in 13 days, on 2026-12-11 21:00 UTC"),
        (NOW + 1.5 * DAY, SOON, "listen.tls_cert: /c expires tomorrow, on 2026-11-29"),
        (NOW + DAY / 2, SOON, "listen.tls_cert: /c expires today, on 2026-11-28 21:00 UTC; then X"),
        (NOW - DAY / 2, EXPIRED, "listen.tls_cert: /c expired on 2026-11-27 21:00 UTC: X"),
        (datetime.max.replace(tzinfo=UTC), GOOD, None),
    ],
)
def test_warnings(end: datetime, state: str, words: str | None) -> None:
    one = dated(end)
    assert one.state(NOW) == state
    assert (one.warning(NOW) or "").startswith(words or "")
    assert (one.warning(NOW) is None) == (words is None)
    assert (one.problem(NOW) is None) == (state in (GOOD, SOON))


def test_a_clock_that_is_behind() -> None:
    one = dated(NOW + 99 * DAY)
    assert one.state(NOW - 2 * DAY) == NOT_YET
    assert "is the clock of this machine right?" in (one.problem(NOW - 2 * DAY) or "")


def test_each_is_logged_once_a_day(caplog: pytest.LogCaptureFixture) -> None:
    time = [NOW]
    soon, good = dated(NOW + 3 * DAY), dated(NOW + 99 * DAY, name="listen.client_ca")
    calendar = Calendar([soon, good], now=lambda: time[0])
    for hours in (0, 1, 23, 24.5):
        time[0] = NOW + timedelta(hours=hours)
        calendar.warn()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    time[0] = NOW + 4 * DAY
    calendar.warn()
    assert caplog.records[-1].levelno == logging.ERROR
    assert "expired on" in caplog.text
    calendar.replace([dated(NOW + 5 * DAY)])  # a renewed one is another
    calendar.warn()
    assert len(caplog.records) == 4


def test_only_what_is_vital_makes_a_daemon_not_ready() -> None:
    time = [NOW]
    registrar = dated(NOW + DAY, name="registrars.acme.client_cert")
    server = dated(NOW + 2 * DAY, vital=True)
    calendar = Calendar([registrar, server], now=lambda: time[0])
    assert calendar.not_ready() is None
    time[0] = NOW + 1.5 * DAY
    assert calendar.not_ready() is None
    time[0] = NOW + 3 * DAY
    assert (calendar.not_ready() or "").startswith("listen.tls_cert: /c expired on")


def test_a_status_has_the_next_to_end_first() -> None:
    shown: list[list[str]] = []
    calendar = Calendar(
        [dated(NOW + 99 * DAY), dated(NOW + DAY, name="listen.client_crl")],
        show=lambda dates: shown.append([each.name for each in dates]),
        now=lambda: NOW,
    )
    values = calendar.values()
    assert [value["what"] for value in values] == ["listen.client_crl", "listen.tls_cert"]
    assert [value["state"] for value in values] == ["soon", "good"]
    assert values[1]["not_after"] == int((NOW + 99 * DAY).timestamp())
    calendar.replace([])
    assert shown == [["listen.tls_cert", "listen.client_crl"], []]
