"""The status page in a real Chromium: what it shows, light and dark, by keyboard, without an error."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from browser import FOREIGN, BrowserPage, chromium, needs_chromium
from cryptography.hazmat.primitives.serialization import Encoding
from helpers import wait_until
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from status_helpers import (
    CHIP,
    HOSTILE,
    NONCE,
    TROUBLED,
    Site,
    count_crowd,
    make_batch,
    make_board,
    make_past,
)

from provider_proxy.host import pki
from provider_proxy.host.batching.batcher import Queue
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.status.recent import Recent

pytestmark = [pytest.mark.real, needs_chromium]
STRANGER = pki.new_authority(datetime.now(UTC)).certificate.public_bytes(Encoding.DER)
LOOK_S = 2.0  # between two looks of the page
BUSY_QUEUE = Queue(waiting=14, lines=2, oldest_s=0.131)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


class Page(BrowserPage):
    """The page, and what it is told."""

    def __init__(self, driver: webdriver.Chrome, site: Site) -> None:
        super().__init__(driver)
        self.site = site

    def open(self, status: Callable[[], Mapping[str, object]]) -> None:
        """Load it, and wait for its first answer."""
        self.site.status = status
        self.driver.get(self.site.url)
        wait_until(lambda: self.text("state") != "asking", "the first answer")


@pytest.fixture
def page(driver: webdriver.Chrome, site: Site) -> Iterator[Page]:
    made = Page(driver, site)
    made.errors()  # forget another test's
    yield made
    assert made.errors() == []


def busy() -> Callable[[], Mapping[str, object]]:
    recent = make_past(120)
    count_crowd(recent)
    return make_board(recent, chip=dataclasses.replace(CHIP, duty=0.47), queue=BUSY_QUEUE).results


def out_of_order() -> Callable[[], Mapping[str, object]]:
    metrics = Metrics()
    metrics.tpm_errors.labels("FAILURE", "fatal").inc()
    chip = TROUBLED
    return make_board(make_past(30), chip=chip, metrics=metrics).results


def empty() -> Callable[[], Mapping[str, object]]:
    recent = Recent(monotonic=lambda: 0.0)
    return make_board(recent, chip=dataclasses.replace(CHIP, duty=0.0), software=True).results


SCENES = {"busy": busy, "out of order": out_of_order, "empty": empty}


def test_a_busy_proxy_is_explained(page: Page) -> None:
    page.open(busy())
    assert page.text("state") == "Ready"
    why = page.text("why")
    assert re.search(r"[\d,]+ requests were answered with 119 quotes", why)
    assert re.search(r"waits 2\d\d ms on average: 50 ms for its window, and 1\d\d ms until", why)
    assert "tpm.max_duty (now 0.5)" in page.text("advice")
    assert (page.text("duty"), page.text("cap")) == ("47 %", "of at most 50 %")
    assert (page.text("learnt"), page.text("waiting")) == ("188 ms", "14")
    bars = page.run("return document.querySelectorAll('#chart g.bar').length")
    assert 40 < bars <= 72
    meter = "return document.querySelector('[role=meter]').getAttribute('aria-valuetext')"
    assert page.run(meter) == "47 %, cap 50 %"


def test_stacks_are_as_long_as_the_times(page: Page) -> None:
    recent = Recent(clock=lambda: 2e9, monotonic=lambda: 0.0)
    recent.batch_done(make_batch(1, leaves=5, wait_s=0.15, quote_s=0.2, opened=0.0))
    page.open(make_board(recent).results)
    height = "return +document.querySelector(`#chart .${arguments[0]}`).getAttribute('height')"
    window, chip, quote = (page.run(height, name) for name in ("window", "chip", "quote"))
    # A pixel is left between two parts.
    assert window == pytest.approx(chip / 2, abs=1.5)
    assert quote == pytest.approx(2 * chip, abs=2.5)


def test_who_was_turned_away(page: Page) -> None:
    recent = make_past(3)
    page.open(make_board(recent).results)
    hidden = "return document.getElementById('away-card').hidden"
    assert page.run(hidden) is True
    recent.turned_away.shaken("bad_certificate", "192.0.2.7", "certificate has expired")
    recent.turned_away.note(HOSTILE, "192.0.2.8:4711", STRANGER)
    page.open(make_board(recent).results)
    assert page.run(hidden) is False
    newest, oldest = page.rows("away")
    assert oldest[1:] == [
        "192.0.2.7",
        "its certificate was refused: certificate has expired",
        "none",
    ]
    assert newest[1] == "192.0.2.8:4711"
    assert newest[2].startswith("<img src=x")  # as text
    assert re.fullmatch(r"CN=provider-proxy CA [0-9a-f]{8}SHA-256 [0-9a-f]{16}…", newest[3])
    assert page.run("return document.querySelector('#away img')") is None


def test_tenants_and_why_they_were_refused(page: Page) -> None:
    page.open(busy())
    rows = page.rows("tenants")
    assert rows[0] == [
        "globex",
        "912",
        "318\u00d7 over a limit of its own2\u00d7 a parameter was wrong or not allowed",
    ]
    assert HOSTILE in [row[0] for row in rows]  # as text
    assert page.run("return document.querySelector('#tenants img')") is None
    assert NONCE not in page.driver.page_source


def test_a_tpm_out_of_order(page: Page) -> None:
    page.open(out_of_order())
    assert page.text("state") == "Not serving"
    assert page.text("why") == "No tenant gets a quote now: the TPM is out of order."
    assert "FAILURE 1\u00d7" in page.text("tpm")


def test_nobody_has_asked(page: Page) -> None:
    page.open(empty())
    assert page.text("why") == "The proxy is ready. No tenant has asked for a quote yet."
    assert "No batches yet" in page.text("chart")
    assert "software, for trials" in page.text("tpm")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("scene", SCENES)
def test_text_can_be_read(page: Page, scene: str, scheme: str) -> None:
    page.media(scheme)
    page.open(SCENES[scene]())
    ratios = page.contrasts()
    assert len(ratios) > 20
    assert [found for found in ratios if found[0] < 4.5] == []  # WCAG 2.2, 1.4.3
    back = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) < 120) == (scheme == "dark")


def test_the_keyboard_reaches_everything(page: Page) -> None:
    page.open(busy())
    seen = []
    for _ in range(8):
        page.press(Keys.TAB)
        seen.append(
            page.active(
                "id || document.activeElement.className.baseVal || document.activeElement.tagName"
            )
        )
    assert seen[0] == "A"  # to skip to the batches
    assert "pause" in seen
    assert "SUMMARY" in seen
    assert sum("bar" in name for name in seen) == 1  # the chart is one stop
    page.run("document.querySelector('#chart g[tabindex=\"0\"]').focus()")
    newest = int(page.active("dataset.number"))
    assert f"Batch {newest}" in page.text("detail")
    page.press(Keys.ARROW_LEFT)
    assert int(page.active("dataset.number")) == newest - 1
    assert "chosen" in page.active("getAttribute('class')")
    assert f"Batch {newest - 1}, sealed at" in page.text("detail")
    assert f"Batch {newest - 1}, sealed at" in page.active("getAttribute('aria-label')")
    page.press(Keys.HOME)
    assert int(page.active("dataset.number")) < newest - 40
    page.press(Keys.ARROW_LEFT)  # nowhere to go
    page.press(Keys.END)
    assert int(page.active("dataset.number")) == newest


def test_the_choice_and_the_focus_outlive_an_update(page: Page) -> None:
    recent = make_past(50)
    page.open(make_board(recent).results)
    page.run("document.querySelector('#chart g[tabindex=\"0\"]').focus()")
    page.press(Keys.ARROW_LEFT)
    chosen = page.active("dataset.number")
    recent.batch_done(make_batch(9999))
    newest = "return document.querySelector('#chart g.bar:last-of-type').dataset.number"
    wait_until(lambda: bool(page.run(newest) == "9999"), "the next look")
    assert page.active("dataset.number") == chosen
    assert f"Batch {chosen}" in page.text("detail")


def test_the_table_says_the_same(page: Page) -> None:
    page.open(busy())
    page.run("document.querySelector('#as-table summary').click()")
    wait_until(lambda: page.text("rows") != "", "the table")
    rows = page.rows("rows")
    status: Any = page.site.status()
    assert [row[0] for row in rows] == [str(b["number"]) for b in reversed(status["batches"])]
    failed = next(row for row in rows if row[-1] != "answered")
    assert "TPM_RC_RETRY" in failed[-1]
    assert rows[0][7] in ("0\u20137", "0\u20137, 11")


@pytest.mark.parametrize("width", [320, 700, 1180])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.size(width)
    page.open(busy())
    widths = "return [document.documentElement.scrollWidth, innerWidth]"
    scroll, window = page.run(widths)
    assert window == width
    assert scroll <= width
    assert page.run("return document.querySelectorAll('#chart g.bar').length") >= 12


def test_pause_stops_asking(page: Page) -> None:
    asked: list[int] = []
    inner = empty()

    def counted() -> Mapping[str, object]:
        asked.append(1)
        return inner()

    page.open(counted)
    page.run("document.getElementById('pause').click()")
    assert page.text("pause") == "Resume"
    assert page.run("return document.getElementById('pause').ariaPressed") == "true"
    before = len(asked)
    time.sleep(LOOK_S + 0.3)
    assert len(asked) == before
    page.run("document.getElementById('pause').click()")
    wait_until(lambda: len(asked) > before, "another look")


def test_the_policy_stops_what_is_not_the_page_s(driver: webdriver.Chrome, site: Site) -> None:
    """A script that got in would not run, and the page may not talk to others."""
    page = Page(driver, site)
    page.open(empty())
    page.run(
        "const s = document.createElement('script'); s.append('window.bad = 1'); document.body.append(s)"
    )
    assert page.run("return window.bad === undefined")
    page.run("window.seen = 0; fetch('http://127.0.0.1:9/').catch(() => { window.seen = 1 })")
    wait_until(lambda: page.run("return window.seen") == 1, "the refusal")
    refused = json.dumps(page.errors())
    assert "Content Security Policy" in refused
    assert "connect-src" in refused


def test_a_daemon_that_goes_away_is_said(driver: webdriver.Chrome) -> None:
    own = Site()
    try:
        page = Page(driver, own)
        page.open(busy())
        own.close()
        wait_until(lambda: "does not answer" in page.text("lost"), "the notice")
        assert "is old" in page.text("lost")
        assert page.text("state") == "Ready"  # what was last known stays
        page.errors()  # the browser itself notes the connection
    finally:
        own.close()


def test_a_name_that_was_pointed_at_us_reads_nothing(driver: webdriver.Chrome, site: Site) -> None:
    """DNS rebinding: the browser believes that a foreign name is this machine."""
    page = Page(driver, site)
    site.status = busy()
    for path in ("", "status"):
        driver.get(site.url.replace("127.0.0.1", FOREIGN) + path)
        assert "globex" not in driver.page_source
        assert '"code":421' in driver.page_source
    page.errors()
