"""Messages between the daemon and provider-proxy-vtpm: one JSON object a line, parsed strictly.

The daemon opens a connection and sends one line, `watch` or `check`. `watch` is answered with a line
for each VM that is here, another for each change, `gone`, and `alive` at least every `HEARTBEAT_S`;
the first `alive` ends the first list. `check` is answered with one line. In both directions every field
has a form and a bound, and unknown keys are refused. Uses no sockets.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, get_args

from provider_proxy.errors import EvidenceFormatError, VtpmError
from provider_proxy.evidence.strict_json import Fields, parse_json_object
from provider_proxy.host.vtpm.entries import Ek, Origin

VERSION: Final = 1
HEARTBEAT_S: Final = 1.0
LEASE_S: Final = 5.0  # without a heartbeat for this long, earlier messages do not count
MAX_QUESTION_BYTES: Final = 256
MAX_LINE_BYTES: Final = 16 * 1024
MAX_NAME_CHARS: Final = 512
MAX_RUN_CHARS: Final = 96
MAX_WORD_CHARS: Final = 36
MAX_WHY_CHARS: Final = 300
MAX_EKS: Final = 4
_DIGEST_RE = re.compile(r"[0-9a-f]{64}")
_ALG_RE = re.compile(r"(rsa|p)[0-9]{3,4}")
_RUN_RE = re.compile(r"[0-9a-f/-]{1,96}")

T = TypeVar("T", bound=str)

Reading = Literal["unread", "read", "encrypted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holds:
    """The result of reading a vTPM's state.

    Attributes:
        reading: "read", with `eks`; "encrypted"; "failed", with `why`; "unread" before the first reading.
        eks: the EKs in it, at most one RSA and one ECC key.
    """

    reading: Reading = "unread"
    eks: tuple[Ek, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A VM with a vTPM whose QEMU is here.

    Attributes:
        run: identifies this life of the VM's QEMU process.
        runs: the guest is here and nowhere else.
        origin: "here" if this life began on this host, "elsewhere" if it came from another; it counts
            once the VM runs.
        holds: its vTPM's state, read while it ran.
    """

    vm: uuid.UUID
    name: str
    run: str
    runs: bool
    origin: Origin
    holds: Holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """A VM is no longer here."""

    vm: uuid.UUID


@dataclass(frozen=True, slots=True)
class Alive:
    """A heartbeat: all earlier messages still hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Whether swtpm_setup is making a VM's vTPM now, and what it has made so far.

    Attributes:
        open: root's hook has reported that libvirt prepares the VM and has no vTPM for it yet, and no
            QEMU of the VM runs.
    """

    open: bool
    holds: Holds


Question = Literal["watch"] | uuid.UUID
Word = Sighting | Gone | Alive


def encode_question(question: Question) -> bytes:
    """The line that the daemon sends: "watch", or the VM to check."""
    if question == "watch":
        return _line({"version": VERSION, "op": "watch"})
    return _line({"version": VERSION, "op": "check", "vm": str(question)})


def parse_question(line: bytes) -> Question:
    """Raises: VtpmError."""
    values, fields = _object(line, MAX_QUESTION_BYTES)
    try:
        if fields.integer("version", 100) != VERSION:
            raise VtpmError(
                f"the question is not of version {VERSION}; use programs of one release"
            )
        op = fields.text("op", MAX_WORD_CHARS)
        if op == "watch":
            _only(values, {"version", "op"})
            return "watch"
        if op == "check":
            _only(values, {"version", "op", "vm"})
            return _vm(fields, "vm")
    except EvidenceFormatError as exc:
        raise VtpmError(str(exc)) from exc
    raise VtpmError('the question is neither "watch" nor "check"')


def encode_word(word: Word | Window) -> bytes:
    """A line of the helper's."""
    if isinstance(word, Alive):
        return _line({"alive": True})
    if isinstance(word, Gone):
        return _line({"gone": str(word.vm)})
    if isinstance(word, Window):
        return _line({"open": word.open, **_holds_values(word.holds)})
    return _line(
        {
            "vm": str(word.vm),
            "name": word.name[:MAX_NAME_CHARS],
            "run": word.run,
            "runs": word.runs,
            "origin": word.origin,
            **_holds_values(word.holds),
        }
    )


def parse_word(line: bytes) -> Word:
    """A line of the answer to `watch`. Raises: VtpmError."""
    values, fields = _object(line, MAX_LINE_BYTES)
    try:
        if "alive" in values:
            _only(values, {"alive"})
            _flag(values, "alive")
            return Alive()
        if "gone" in values:
            _only(values, {"gone"})
            return Gone(vm=_vm(fields, "gone"))
        _only(values, {"vm", "name", "run", "runs", "origin", *_HOLDS})
        run = fields.text("run", MAX_RUN_CHARS)
        origin = fields.text("origin", MAX_WORD_CHARS)
        if not _RUN_RE.fullmatch(run):
            raise VtpmError("run is not valid")
        name = fields.text("name", MAX_NAME_CHARS)
        return Sighting(
            vm=_vm(fields, "vm"),
            name="".join(c if c.isprintable() else "?" for c in name),
            run=run,
            runs=_flag(values, "runs"),
            origin=_one_of(origin, get_args(Origin)),
            holds=_parse_holds(values, fields),
        )
    except EvidenceFormatError as exc:
        raise VtpmError(str(exc)) from exc


def parse_window(line: bytes) -> Window:
    """The answer to `check`. Raises: VtpmError."""
    values, fields = _object(line, MAX_LINE_BYTES)
    try:
        _only(values, {"open", *_HOLDS})
        return Window(open=_flag(values, "open"), holds=_parse_holds(values, fields))
    except EvidenceFormatError as exc:
        raise VtpmError(str(exc)) from exc


_HOLDS = ("reading", "eks", "why")


def _holds_values(holds: Holds) -> dict[str, object]:
    eks = [{"alg": ek.alg, "spki_sha256": ek.spki_sha256, "spire": ek.spire} for ek in holds.eks]
    return {"reading": holds.reading, "eks": eks, "why": holds.why[:MAX_WHY_CHARS]}


def _parse_holds(values: Mapping[str, object], fields: Fields) -> Holds:
    reading: Reading = _one_of(fields.text("reading", MAX_WORD_CHARS), get_args(Reading))
    items = values.get("eks")
    if not isinstance(items, list) or len(items) > MAX_EKS:
        raise VtpmError(f"eks is not a list of at most {MAX_EKS} EKs")
    eks = tuple(_parse_ek(item) for item in items)
    if bool(eks) != (reading == "read") or len({ek.family for ek in eks}) != len(eks):
        raise VtpmError("eks must hold one key of each family, exactly if reading is read")
    why = fields.text("why", MAX_WHY_CHARS)
    return Holds(reading=reading, eks=eks, why="".join(c if c.isprintable() else "?" for c in why))


def _parse_ek(item: object) -> Ek:
    if not isinstance(item, dict) or set(item) != {"alg", "spki_sha256", "spire"}:
        raise VtpmError("an EK is not valid")
    fields = Fields(item, "eks")
    alg, digest = fields.text("alg", MAX_WORD_CHARS), fields.text("spki_sha256", 64)
    spire = fields.text("spire", 64)
    digests = (digest, spire) if spire else (digest,)
    if not _ALG_RE.fullmatch(alg) or not all(map(_DIGEST_RE.fullmatch, digests)):
        raise VtpmError("an EK is not valid")
    return Ek(alg=alg, spki_sha256=digest, spire=spire)


def _line(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode("ascii") + b"\n"


def _object(line: bytes, limit: int) -> tuple[Mapping[str, object], Fields]:
    if len(line) > limit:
        raise VtpmError(f"the line is longer than {limit} bytes")
    try:
        values = parse_json_object(line, "line")
    except EvidenceFormatError as exc:
        raise VtpmError(str(exc)) from exc
    return values, Fields(values, "line")


def _only(values: Mapping[str, object], known: set[str]) -> None:
    if not set(values) <= known:
        raise VtpmError("the line has an unknown key")


def _flag(values: Mapping[str, object], key: str) -> bool:
    value = values.get(key)
    if not isinstance(value, bool):
        raise VtpmError(f"{key} is not true or false")
    return value


def _one_of(text: str, known: Sequence[T]) -> T:
    for word in known:
        if text == word:
            return word
    raise VtpmError("a value is unknown")


def _vm(fields: Fields, key: str) -> uuid.UUID:
    text = fields.text(key, MAX_WORD_CHARS)
    try:
        value = uuid.UUID(text)
    except ValueError:
        raise VtpmError("the VM's UUID is not a valid UUID") from None
    if str(value) != text:
        raise VtpmError("the VM's UUID is not in lower case with hyphens")
    return value
