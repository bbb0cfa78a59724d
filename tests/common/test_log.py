"""The log: one line stays one line, whatever a tenant calls itself; both forms; and no nonces."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import Asker, connect, get_bytes, plain_toml, quote_target, serving, trusted_ak
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.common import log as journal
from provider_proxy.common.log import (
    PRIORITIES,
    Event,
    JsonFormatter,
    StderrHandler,
    TextFormatter,
    escaped,
    is_journal,
    set_up,
)

FORGED = "acme\n<2>INFO batch=1 outcome=ok\r\x1b[2J\x85\u2028\u202e"


def record(message: object, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("provider_proxy.x", level, "x.py", 1, message, args, None)


def failed(message: str) -> logging.LogRecord:
    """A record with a traceback whose exception holds a message."""
    try:
        raise ValueError(message)
    except ValueError:
        made = record("it broke", level=logging.ERROR)
        made.exc_info = sys.exc_info()
        return made


@given(st.text())
def test_escaped_text_has_one_line_and_no_controls(text: str) -> None:
    found = escaped(text)
    assert len(found.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f]", found)
    assert escaped(found) == found
    found.encode("utf-8")


def test_what_is_harmless_stays() -> None:
    assert escaped('Größe 5 "x" → \\n') == 'Größe 5 "x" → \\n'


@given(st.text(), st.text())
def test_an_event_is_one_line_that_can_be_read_again(text: str, other: str) -> None:
    line = str(Event("x", {"a": text, "n": 5, "b": other}))
    found = re.fullmatch(r'a=(".*?(?<!\\)(?:\\\\)*"|\S+) n=5 b=(".*"|\S+)', line, re.ASCII)
    assert found, line
    values = [json.loads(part) if part.startswith('"') else part for part in found.groups()]
    assert values == [text, other]


def test_an_event_s_numbers() -> None:
    assert str(Event("x", {"ms": 12.345, "n": 1, "mask": "0x1"})) == "ms=12.3 n=1 mask=0x1"
    with pytest.raises(AssertionError):
        Event("x", {"time": 1})


def test_text_says_the_level_and_escapes() -> None:
    line = TextFormatter(prefixes=False).format(record("tenant %s", FORGED))
    assert line == (r"INFO tenant acme\n<2>INFO batch=1 outcome=ok\r\x1b[2J\x85\u2028\u202e")


@pytest.mark.parametrize(("level", "number"), PRIORITIES.items())
def test_the_journal_s_priorities_stand_before_each_line(level: int, number: int) -> None:
    line = TextFormatter(prefixes=True).format(record("stopped", level=level))
    assert line == f"<{number}>stopped"


def test_a_traceback_cannot_forge_a_line() -> None:
    lines = TextFormatter(prefixes=True).format(failed("x\n<6>batch=9")).split("\n")
    assert lines[0] == "<3>it broke"
    assert all(line.startswith("<3>    ") for line in lines[1:])
    assert "<3>    <6>batch=9" in lines
    plain = TextFormatter(prefixes=False).format(failed("x\nINFO batch=9")).split("\n")
    assert all(line.startswith("    ") for line in plain[1:])


def test_json_is_one_object_a_line() -> None:
    line = JsonFormatter().format(record("tenant %s", FORGED))
    assert "\n" not in line
    assert line.isascii()
    values = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", values.pop("time"))
    assert values == {"level": "info", "logger": "provider_proxy.x", "msg": f"tenant {FORGED}"}


def test_json_has_an_event_s_fields_beside() -> None:
    values = json.loads(JsonFormatter().format(record(Event("batch", {"batch": 7, "bank": "x"}))))
    assert (values["msg"], values["batch"], values["bank"]) == ("batch", 7, "x")
    assert "ValueError: x\n" in json.loads(JsonFormatter().format(failed("x\ny")))["exception"]


def test_the_journal_is_known_by_its_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "f").open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert is_journal(stream)
        for other in ("", "1", f"{status.st_dev}:{status.st_ino + 1}", f":{status.st_ino}"):
            monkeypatch.setenv("JOURNAL_STREAM", other)
            assert not is_journal(stream)


def test_set_up_leaves_others_logging_alone() -> None:
    root = logging.getLogger()
    before = list(root.handlers)  # pytest's
    set_up("debug", journal.JSON)
    assert root.handlers == before


def test_set_up_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        set_up("info")
        set_up("error", journal.JSON)
        (handler,) = root.handlers
        assert isinstance(handler, StderrHandler)
        assert isinstance(handler.formatter, JsonFormatter)
        assert root.level == logging.ERROR
        assert logging.getLogger("httpx").level == logging.WARNING
    finally:
        root.setLevel(level)


# --- a real daemon under load ----------------------------------------------------------------------

TABLES = '[admin]\naddress = "127.0.0.1:0"\n[batch]\nwindow_ms = 1\n'


@pytest.mark.real
@pytest.mark.parametrize("form", journal.FORMATS)
async def test_no_nonce_salt_or_key_gets_into_the_log(tmp_path: Path, form: str) -> None:
    """Debug level, good and bad requests; whatever was secret or a tenant's is looked for."""
    toml = plain_toml(tmp_path / "s", tables=TABLES)
    toml += f'[log]\nformat = "{form}"\nlevel = "debug"\n'
    secrets: list[str] = []
    async with serving(tmp_path, toml) as serve:
        asker = Asker(await trusted_ak(serve.address))
        async with connect(serve.address) as wire:
            for number in range(30):
                challenge = asker.challenge(1 << number % 8)
                secrets.append(challenge.request.nonce.decode())
                reply = await wire.get(quote_target(challenge))
                asker.verify(reply.body, challenge)
                results: dict[str, Any] = reply.results()
                secrets.append(results["merkle"]["salt"])
            for target in (
                "/verifier/quote?nonce=SECRETsecretSECRETsecret&mask=0x0",
                "/verifier/quote?nonce=SECRETsecret!!!!!&mask=0x1",
                "/SECRETsecret%0a<2>forged",
            ):
                assert (await wire.get(target)).status in (400, 404)
        async with connect(serve.address) as wire:
            await wire.send(get_bytes("/x", "Content-Length: 12", method="POST") + b"SECRETsecret")
            await wire.rest()
        await serve.stop(15)
        log = serve.log
    stored = json.loads((tmp_path / "s" / "ak.json").read_text())
    secrets += [value for value in stored.values() if isinstance(value, str) and len(value) > 15]
    assert len(secrets) > 60
    for secret in (*secrets, "SECRETsecret"):
        raw = secret.encode()
        for shape in (secret, raw.hex(), base64.b64encode(raw).decode().rstrip("=")):
            assert shape not in log
    lines = log.splitlines()
    if form == journal.JSON:
        values = [json.loads(line) for line in lines]
        assert all({"time", "level", "logger", "msg"} <= set(value) for value in values)
        batches = [value for value in values if value["msg"] == "batch"]
        assert [value["batch"] for value in batches] == list(range(1, len(batches) + 1))
    else:
        assert all(re.match(r"(DEBUG|INFO|WARNING) ", line) for line in lines)
        batches = [line for line in lines if " batch=" in line]
    assert len(batches) == 30


@pytest.mark.real
async def test_stderr_at_the_journal_gets_priorities(tmp_path: Path) -> None:
    """systemd names its stream in the environment; here it is the log's own file."""
    toml = plain_toml(tmp_path / "s", tables=TABLES)
    launcher = ["sh", "-c", 'JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2) exec "$@"', "sh"]
    async with serving(tmp_path, toml, launcher=launcher) as serve:
        await serve.stop(15)
        lines = serve.log.splitlines()
    assert all(re.match(r"<[2-7]>\S", line) for line in lines)
    assert "<6>stopped" in lines
    assert any(line.startswith("<4>the TPM is an embedded swtpm") for line in lines)
