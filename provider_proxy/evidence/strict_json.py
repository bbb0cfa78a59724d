"""JSON that others wrote, read strictly: no repeated key, no NaN, a bounded number of parts and depth.

Two readers of one text with a repeated key see two documents, so such a text is refused.
`parse_json_object` reads what came over a network; `parse_own_json` reads the files of the person who
runs the program, with larger limits.

Does not check: the size in bytes; the caller, which reads the bytes, knows the limit.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from provider_proxy.errors import EvidenceFormatError, UsageError

MAX_PARTS = 100_000  # a registrar's list of 50,000 agents; a tenth of a second to read
MAX_OWN_PARTS = 20_000_000  # a runtime policy of 256 MB: two digests and a name are 150 bytes
MAX_DEPTH = 100  # ten times what a policy has; how deep Python itself goes depends on its release
SHOWN_CHARS = 80
_STRING_RE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
BOM = b"\xef\xbb\xbf"


class _RefusedError(ValueError):
    """Python's parser accepts it, this module does not; never leaves this module."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"has the key {twice[:SHOWN_CHARS]!a} twice in one object")
    return result


def _no_constant(name: str) -> object:
    raise _RefusedError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _RefusedError(f"holds the number {text[:SHOWN_CHARS]}, which is too large")
    return value


def _has_more_parts(text: str, most: int) -> bool:
    """Whether there are more values than that. Text in quotes, however long, is one."""
    if sum(map(text.count, "[{,")) < most:
        return False
    return sum(map(_STRING_RE.sub("", text).count, "[{,")) >= most


def _is_deep(text: str, value: object) -> bool:
    """Whether objects and lists are nested deeper than `MAX_DEPTH`."""
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)  # type: ignore[attr-defined]
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _read(data: bytes | str, most: int) -> dict[str, object]:
    """Raises: _RefusedError with the rest of a sentence that begins with what was read."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise _RefusedError(f"is not JSON in UTF-8: byte {exc.start}") from exc
    # A small body can become a hundred times its size in objects, and take seconds.
    if _has_more_parts(text, most):
        raise _RefusedError("has too many parts")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError as exc:
        raise _RefusedError("is nested too deeply") from exc
    except _RefusedError:
        raise
    except ValueError as exc:  # a JSONDecodeError says where; an integer may have too many digits
        raise _RefusedError(f"is not JSON in UTF-8: {exc}") from exc
    if not isinstance(value, dict):
        raise _RefusedError("is not a JSON object")
    if _is_deep(text, value):
        raise _RefusedError("is nested too deeply")
    return value


def parse_json_object(data: bytes, what: str) -> dict[str, object]:
    """Read one JSON object, untrusted bytes.

    Args:
        what: it is, for messages: "the registrar's answer".

    Raises:
        EvidenceFormatError: anything else, another encoding than UTF-8, too many parts, too deep.
    """
    try:
        return _read(data, MAX_PARTS)
    except _RefusedError as exc:
        raise EvidenceFormatError(f"{what} {exc}") from exc


def parse_own_json(data: bytes | str, what: str) -> dict[str, Any]:
    """Read one JSON object of a file that the person who runs the program wrote: a policy.

    Args:
        what: it is, for messages: "the boot policy".

    Raises:
        UsageError: it is not a JSON object in UTF-8, or a key stands twice in one object.
    """
    if data[:3] == BOM or data[:1] == "\ufeff":
        raise UsageError(f"{what} begins with a byte order mark: save it as UTF-8 without one")
    try:
        return _read(data, MAX_OWN_PARTS)
    except _RefusedError as exc:
        raise UsageError(f"{what} {exc}") from exc


class Fields:
    """Typed access to a parsed JSON object; a missing or mistyped key is a format error."""

    __slots__ = ("_values", "_what")

    def __init__(self, values: Mapping[str, object], what: str) -> None:
        self._values = values
        self._what = what

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, limit: int) -> str:
        value = self._values.get(key)
        if not isinstance(value, str) or len(value) > limit:
            raise EvidenceFormatError(
                f"{self._what}.{key} is not text of at most {limit} characters"
            )
        return value

    def integer(self, key: str, limit: int) -> int:
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            raise EvidenceFormatError(f"{self._what}.{key} is not a number in 0..{limit}")
        return value

    def number(self, key: str) -> float:
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise EvidenceFormatError(f"{self._what}.{key} is not a number")
        if not 0 <= value < 1e12:  # json reads 1e999 as infinity
            raise EvidenceFormatError(f"{self._what}.{key} is out of bounds")
        return float(value)

    def fields(self, key: str) -> Fields:
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise EvidenceFormatError(f"{self._what}.{key} is not an object")
        return Fields(value, f"{self._what}.{key}")

    def objects(self, key: str, most: int) -> tuple[Fields, ...]:
        value = self._list(key, most)
        if not all(isinstance(item, dict) for item in value):
            raise EvidenceFormatError(f"{self._what}.{key} holds something that is not an object")
        return tuple(Fields(item, f"{self._what}.{key}") for item in value)

    def integers(self, key: str, most: int, limit: int) -> tuple[int, ...]:
        value = self._list(key, most)
        for item in value:
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= limit:
                raise EvidenceFormatError(
                    f"{self._what}.{key} holds something that is not a number in 0..{limit}"
                )
        return tuple(value)

    def _list(self, key: str, most: int) -> list[Any]:
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) > most:
            raise EvidenceFormatError(f"{self._what}.{key} is not a list of at most {most} entries")
        return value

    def hex(self, key: str, limit: int) -> bytes:
        return _from_hex(self._values.get(key), limit, f"{self._what}.{key}")

    def base64(self, key: str, limit: int) -> bytes:
        data = from_base64(self.text(key, limit * 4 // 3 + 4), f"{self._what}.{key}")
        if len(data) > limit:
            raise EvidenceFormatError(f"{self._what}.{key} is longer than {limit} bytes")
        return data

    def hex_list(self, key: str, most: int, size: int) -> tuple[bytes, ...]:
        value = self._list(key, most)
        return tuple(_from_hex(item, size, f"{self._what}.{key}") for item in value)


def _from_hex(value: object, limit: int, what: str) -> bytes:
    # bytes.fromhex alone would skip white space: two texts for one value.
    if not isinstance(value, str) or len(value) > 2 * limit or not value.isalnum():
        raise EvidenceFormatError(f"{what} is not hex of at most {limit} bytes")
    try:
        return bytes.fromhex(value)
    except ValueError as exc:
        raise EvidenceFormatError(f"{what} is not hex") from exc


def from_base64(text: str, what: str) -> bytes:
    """Standard base64 with padding, in its one canonical form.

    Raises:
        EvidenceFormatError: anything else.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise EvidenceFormatError(f"{what} is not base64") from exc
    if base64.b64encode(data).decode("ascii") != text:
        raise EvidenceFormatError(f"{what} is not canonical base64")
    return data
