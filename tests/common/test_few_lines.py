"""Lines that strangers can cause are few, and what was left out is said."""

from __future__ import annotations

from provider_proxy.common.few_lines import FewLines


def test_so_many_a_minute_and_how_many_more() -> None:
    now = [0.0]
    lines = FewLines(2, now=lambda: now[0])
    assert [lines.take() for _ in range(5)] == ["", "", None, None, None]
    now[0] = 59.0
    assert lines.take() is None
    now[0] = 60.0
    assert [lines.take(), lines.take(), lines.take()] == [" (4 more were not written)", "", None]
