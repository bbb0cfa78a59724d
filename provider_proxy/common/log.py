"""What the log looks like: key=value text or a JSON object a line, and systemd's priorities.

An `Event` is a log message made of fields; both forms are written from it. Whatever a message holds,
a tenant's name or a certificate's subject, it stays on its own line and cannot pass for another
one: control characters are escaped, and the lines of a traceback are indented.

Nothing here decides what is logged. Nonces, salts, secrets and keys are never given to a logger.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TextIO

from provider_proxy.common.log_writer import LineWriter, write_to

TEXT = "text"
JSON = "json"
FORMATS = (TEXT, JSON)
LEVELS = ("debug", "info", "warning", "error")
RESERVED = ("time", "level", "logger", "msg", "exception")
# Syslog's numbers, sd-daemon(3): the priority that journald gives a line.
PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
QUIET = ("httpx", "httpcore")  # they log each request at INFO

# C0, DEL and C1; line and paragraph separators; marks that turn the direction of text; surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BARE = re.compile(r"[A-Za-z0-9._:/@%+,-]+", re.ASCII)


def escaped(text: str) -> str:
    """Text that stays on its line and holds no control characters: `\\n` for a line feed."""

    def escape(match: re.Match[str]) -> str:
        return match[0].encode("unicode_escape").decode("ascii")

    return _UNSAFE.sub(escape, text)


class Event:
    """A log message made of fields; give it to a logger as the message.

    Args:
        name: what happened, in a word: "batch".
        fields: values are numbers, flags or text; text is quoted where it is more than a word.
    """

    __slots__ = ("fields", "name")

    def __init__(self, name: str, fields: Mapping[str, object]) -> None:
        assert not set(fields) & set(RESERVED)  # one object holds them all
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return " ".join(f"{key}={_value(value)}" for key, value in self.fields.items())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


class TextFormatter(logging.Formatter):
    """`LEVEL message`; for the journal the level is a prefix that it takes off: `<6>message`."""

    def __init__(self, *, prefixes: bool) -> None:
        super().__init__()
        self._prefixes = prefixes

    def format(self, record: logging.LogRecord) -> str:
        """One line, and those of a traceback below it."""
        head = f"<{PRIORITIES.get(record.levelno, 6)}>" if self._prefixes else ""
        level = "" if self._prefixes else f"{record.levelname} "
        lines = [level + escaped(record.getMessage())]
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            lines += ["    " + escaped(line) for line in trace.split("\n")]
        return "\n".join(head + line for line in lines)


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, msg, and an event's fields beside them. ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, a traceback included."""
        moment = datetime.fromtimestamp(record.created, UTC)
        values: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        message: object = record.msg
        if isinstance(message, Event):
            values |= {"msg": message.name, **message.fields}
        else:
            values["msg"] = record.getMessage()
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.writer: LineWriter | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, at once or in the background; nothing where stderr is closed (None)."""
        if sys.stderr is None:
            return
        if self.writer is None:
            super().emit(record)
            return
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  # a record that cannot be formatted fails nobody's request
            self.writer.dropped += 1
            return
        self.writer.put(line.encode("utf-8", "backslashreplace") + b"\n")

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where it goes."""
        return sys.stderr


def write_last_lines() -> None:
    """Write what `in_background` has not written yet, for a second at the most: the process ends now."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StderrHandler) and handler.writer is not None:
            handler.writer.close()


def dropped_lines() -> int:
    """How many lines were dropped since `in_background` began, because their reader was too slow."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StderrHandler) and handler.writer is not None:
            return handler.writer.dropped
    return 0


@contextmanager
def in_background() -> Iterator[None]:
    """Within it, no log line waits for the log's reader: see `dropped_lines`.

    Lines are written by a thread, see `log_writer`. At the end what is left is written, for a second at
    the most. It changes nothing where the program's caller has set up logging.
    """
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, StderrHandler)]
    if not handlers or sys.stderr is None:
        yield
        return
    (handler,) = handlers
    number = sys.stderr.fileno()

    def say(count: int) -> bytes:
        text = "the log's reader was too slow: %d lines were dropped"
        record = logging.LogRecord(__name__, logging.ERROR, "", 0, text, (count,), None)
        return handler.format(record).encode("utf-8") + b"\n"

    writer = LineWriter(partial(write_to, number), say)
    writer.start()
    handler.writer = writer
    try:
        yield
    finally:
        handler.writer = None
        writer.close()


def is_journal(stream: TextIO | None) -> bool:
    """True where a stream goes to systemd's journal: $JOURNAL_STREAM, systemd.exec(5).

    A program that was started with its stderr closed has None for a stream.
    """
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    if stream is None:
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def set_up(level: str, form: str = TEXT) -> None:
    """Log to stderr; a second call replaces the first. Logging that the caller has set up stays.

    Args:
        level: one of `LEVELS`.
        form: one of `FORMATS`.
    """
    root = logging.getLogger()
    if any(not isinstance(handler, StderrHandler) for handler in root.handlers):
        return
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handler = StderrHandler()
    handler.setFormatter(
        JsonFormatter() if form == JSON else TextFormatter(prefixes=is_journal(sys.stderr))
    )
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
