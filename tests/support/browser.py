"""A page in a real Chromium as a person meets it: light and dark, wide and narrow, by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import LIMIT_S
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium is not installed"
)
FOREIGN = "rebound.example"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1",
)
# Relative luminance and contrast, WCAG 2.2, of a text's colour on what is behind it.
CONTRASTS = """
const lum = (c) => c.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const found = [];
for (const e of document.querySelectorAll("main *, header *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!own || !e.checkVisibility() || e.closest(".skip")) continue;
  const style = getComputedStyle(e), inSvg = e instanceof SVGElement;
  const front = parse(inSvg ? style.fill : style.color);
  const back = behind(inSvg ? e.closest("svg").parentElement : e);
  const [a, b] = [lum(front.slice(0, 3)), lum(back.slice(0, 3))].sort((x, y) => y - x);
  found.push([(a + .05) / (b + .05), e.textContent.trim().slice(0, 40)]);
}
return found;
"""


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """A browser for as long as the context lasts."""
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    made.set_page_load_timeout(LIMIT_S)
    try:
        yield made
    finally:
        made.quit()


class BrowserPage:
    """What a person sees and does."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.media("light")
        self.size(1180)

    def media(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def size(self, width: int, height: int = 900) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def run(self, script: str, *args: object) -> Any:
        return self.driver.execute_script(script, *args)

    def text(self, name: str) -> str:
        return str(self.run("return document.getElementById(arguments[0]).textContent", name))

    def rows(self, name: str) -> list[list[str]]:
        """The cells of a table's body."""
        rows: list[list[str]] = self.run(
            "return [...document.getElementById(arguments[0]).rows]"
            ".map((row) => [...row.cells].map((cell) => cell.textContent))",
            name,
        )
        return rows

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def active(self, script: str) -> Any:
        return self.run(f"return document.activeElement.{script}")

    def errors(self) -> list[str]:
        """What the console holds, but for notes."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")  # type: ignore[no-untyped-call]
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def contrasts(self) -> list[tuple[float, str]]:
        return [(ratio, text) for ratio, text in self.run(CONTRASTS)]
