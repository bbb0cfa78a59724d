"""Takes secrets and names out of text that leaves the host: a support bundle.

Secrets do not get into the log or the configuration, which names them by path. They are searched for
all the same, in every part, because an operator may have put one where it does not belong. Tenants'
names become "tenant-1" and so on, the same in all parts, so that one can still be followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from provider_proxy.common.log import escaped

HIDDEN = "[hidden]"
# Every repetition has a bound: the text may come from outside.
_PEM = re.compile(
    r"-----BEGIN (?P<what>[A-Z0-9 ]{0,40}PRIVATE KEY[A-Z0-9 ]{0,40})-----"
    r".*?(?:-----END (?P=what)-----|\Z)",
    re.DOTALL,
)
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,20}://)[^/\s\"'@]{0,1000}@")
_QUERY = re.compile(r"(?P<url>[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s\"'?#]{0,1000})\?[^\s\"']{0,4000}")
_NONCE = re.compile(r"(?P<key>\bnonce[\"']?\s{0,8}[=:]\s{0,8}[\"']?)[A-Za-z0-9._~-]{1,200}")
_BEARER = re.compile(r"(?P<key>\b(?:Bearer|Basic)\s{1,8})[A-Za-z0-9._~+/=-]{4,4000}", re.IGNORECASE)
# A key that says that its value is secret. Its value stays where it only says where the secret is.
_SECRET = re.compile(
    r"(?P<key>(?:password|passwd|passphrase|secret|token|auth_?value|api[_-]?key|authorization)"
    r"[\w.-]{0,40}[\"']?\s{0,8}[=:]\s{0,8})"
    r"(?P<value>\"(?:[^\"\\]|\\.){0,4000}\"|'[^']{0,4000}'|[^\s,;}#]{1,4000})",
    re.IGNORECASE,
)
_WHERE = re.compile(r"[\"']?(?:/|credential:|\[hidden\]|null\b|true\b|false\b)")


class Redactor:
    """Knows what must not be seen.

    Args:
        names: what to replace, by its replacement's kind: {"tenant": ["acme", "spiffe://acme"]}. Names
            that belong together are given as one tuple.
    """

    def __init__(self, names: Mapping[str, Iterable[tuple[str, ...]]]) -> None:
        self._replacement = {
            spelt.lower(): f"{kind}-{number}"
            for kind, groups in names.items()
            for number, group in enumerate(groups, 1)
            for name in group
            if name
            for spelt in _spellings(name)
        }

    def hide(self, text: str) -> str:
        """The text without secrets and names."""
        text = _PEM.sub("[a private key]", text)
        text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
        text = _QUERY.sub(rf"\g<url>?{HIDDEN}", text)
        text = _NONCE.sub(rf"\g<key>{HIDDEN}", text)
        text = _BEARER.sub(rf"\g<key>{HIDDEN}", text)
        text = _SECRET.sub(_hide_value, text)
        return self._hide_names(text)

    def _hide_names(self, text: str) -> str:
        lower = text.lower()
        present = [name for name in self._replacement if name in lower]  # of thousands, a few
        if not present:
            return text
        words = "|".join(map(re.escape, sorted(present, key=len, reverse=True)))
        pattern = rf"(?<![A-Za-z0-9_])(?:{words})(?![A-Za-z0-9_])"
        return re.sub(
            pattern,
            lambda match: self._replacement.get(match[0].lower(), HIDDEN),
            text,
            flags=re.IGNORECASE,
        )


def _spellings(name: str) -> set[str]:
    """A name as it stands in plain text, in JSON and in the log."""
    quoted = {json.dumps(name, ensure_ascii=flag)[1:-1] for flag in (True, False)}
    return {name, escaped(name), *quoted}


def _hide_value(match: re.Match[str]) -> str:
    if _WHERE.match(match["value"]):
        return match[0]
    return f"{match['key']}{HIDDEN}"
