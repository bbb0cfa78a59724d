"""What is wrong before a program starts, as `check-config` shows it: everything, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from provider_proxy.common.dates import SOON, Dated, utc_now
from provider_proxy.errors import ProviderProxyError

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or will be.

    Attributes:
        level: `ERROR` where the start would fail or nobody would be served, `WARNING` for all else.
        text: begins with the key of the setting.
    """

    level: str
    text: str


def attempt(call: Callable[[], object]) -> Iterator[Finding]:
    """A finding where a call raises an error of ours."""
    try:
        call()
    except ProviderProxyError as exc:
        yield Finding(level=ERROR, text=str(exc))


def warned(call: Callable[[], object]) -> Iterator[Finding]:
    """As `attempt`, where a start would go on."""
    for finding in attempt(call):
        yield Finding(level=WARNING, text=finding.text)


def of_dates(read: Callable[[], Iterable[Dated]]) -> Iterator[Finding]:
    """What has expired or soon will. Files that cannot be read are left to the code that loads them."""
    try:
        dates = tuple(read())
    except ProviderProxyError:
        return
    now = utc_now()
    for dated in dates:
        warning = dated.warning(now)
        if warning is not None:
            fatal = dated.vital and dated.state(now) != SOON
            yield Finding(level=ERROR if fatal else WARNING, text=warning)
