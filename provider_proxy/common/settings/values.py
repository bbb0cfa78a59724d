"""Readers of single configuration values: each checks one, and names its key in what it says.

A reader takes the key and the TOML value, and gives the value that the program uses.
"""

from __future__ import annotations

import enum
import ipaddress
import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provider_proxy.common import addresses
from provider_proxy.common.files import credentials_directory
from provider_proxy.errors import ConfigError, UsageError
from provider_proxy.evidence.model import PCR_COUNT, HashAlg, mask_of

Reader = Callable[[str, Any], Any]

PERSISTENT_HANDLES = range(0x81000000, 0x82000000)
LABEL_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}", re.ASCII)  # a host's, and its pin's
CREDENTIAL = "credential:"
CREDENTIAL_NAME_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", re.ASCII)
IDENTITY_RE = re.compile(
    r"spiffe://[^\s]{1,2000}|dns:[a-z0-9._-]{1,253}|email:[^\s]{3,254}|cn:[^\n]{1,64}"
    r"|sha256:[0-9a-f]{64}|uid:[0-9]{1,10}"
)


RULES = {
    "spiffe": "spiffe://TRUST-DOMAIN/PATH without spaces",
    "dns": "a host's name, without a wildcard",
    "email": "name@example.org, 254 characters at most",
    "cn": "the common name, 64 characters at most",
    "sha256": "the certificate's SHA-256, 64 hex digits",
    "uid": "a numeric user id",
}
MUST_IDENTITIES = "identities: spiffe://…, dns:…, email:…, cn:…, sha256:<hex> or uid:<n>"


def fail(key: str, must: str) -> ConfigError:
    """The error of a key whose value is not as it must be."""
    return ConfigError(f"{key} must be {must}", key=key)


def as_toml(read: Reader, value: object) -> str:
    """A value that a reader gave, as the configuration file writes it.

    Raises:
        TypeError: the value is of a kind that no reader here gives.
    """
    if read is read_pcrs and isinstance(value, int):
        return json.dumps([pcr for pcr in range(PCR_COUNT) if value >> pcr & 1])
    if read is read_handle and isinstance(value, int):
        return hex(value)
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: object) -> object:
    """What JSON, and so TOML, writes the same way."""
    if isinstance(value, HashAlg):
        return value.label
    if isinstance(value, Path | uuid.UUID):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | frozenset):
        listed = [_plain(item) for item in value]
        return sorted(listed, key=str) if isinstance(value, frozenset) else listed
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str | int | float):
        return value
    raise TypeError(f"as_toml does not know {type(value).__name__}")


def read_text(key: str, value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise fail(key, "text")
    return value


def parsed(parse: Callable[[str], Any], must: str) -> Reader:
    """A reader of text that a parser takes.

    Args:
        parse: raises `UsageError` that says why it does not take a text.
        must: what it must be, for messages.
    """

    def read(key: str, value: object) -> Any:
        text = read_text(key, value)
        try:
            return parse(text)
        except UsageError as exc:
            raise fail(key, f"{must}: {exc}") from exc

    return read


def read_label(key: str, value: object) -> str:
    """The name of a host, which is also its pin's, and a file's."""
    text = read_text(key, value)
    if not LABEL_RE.fullmatch(text):
        raise fail(key, "a name of letters, digits, '.', '_' and '-'")
    return text


def read_flag(key: str, value: object) -> bool:
    """A boolean."""
    if not isinstance(value, bool):
        raise fail(key, "true or false")
    return value


def read_path(key: str, value: object) -> Path:
    """A path, not empty; "credential:NAME" is a credential of the unit's."""
    text = read_text(key, value)
    if text.startswith(CREDENTIAL):
        name = text.removeprefix(CREDENTIAL)
        if not CREDENTIAL_NAME_RE.fullmatch(name):
            raise fail(key, "a path; credential:NAME takes letters, digits, '.', '_' and '-'")
        return credentials_directory() / name
    if not text or "\0" in text:
        raise fail(key, "a path")
    return Path(text)


def read_paths(key: str, value: object) -> tuple[Path, ...]:
    """A path or a list of them."""
    return tuple(read_path(key, item) for item in (value if isinstance(value, list) else [value]))


def read_uuid(key: str, value: object) -> uuid.UUID:
    """A UUID."""
    try:
        return uuid.UUID(read_text(key, value))
    except ValueError:
        raise fail(key, "a UUID") from None


def number(least: float, most: float) -> Reader:
    """A reader of numbers within bounds."""

    def read(key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fail(key, "a number")
        if not least <= value <= most:
            raise fail(key, f">= {least:g}" if value < least else f"<= {most:g}")
        return float(value)

    return read


def integer(least: int, most: int) -> Reader:
    """A reader of whole numbers within bounds."""
    inner = number(least, most)

    def read(key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise fail(key, "a whole number")
        return int(inner(key, value))

    return read


def one_of(*choices: str) -> Reader:
    """A reader of some words."""

    def read(key: str, value: object) -> str:
        if value not in choices:
            raise fail(key, "one of " + ", ".join(f'"{choice}"' for choice in choices))
        return read_text(key, value)

    return read


def read_choice(kind: type[enum.Enum]) -> Reader:
    """A reader of the values of an enumeration."""
    inner = one_of(*(str(each.value) for each in kind))
    return lambda key, value: kind(inner(key, value))


def number_of(*choices: int) -> Reader:
    """A reader of some whole numbers."""

    def read(key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value not in choices:
            raise fail(key, "one of " + ", ".join(map(str, choices)))
        return value

    return read


def read_duty(key: str, value: object) -> float:
    """A share above 0 and at most 1."""
    share: float = number(0, 1)(key, value)
    if share <= 0:
        raise fail(key, "> 0")
    return share


def read_handle(key: str, value: object) -> int:
    """A TPM's persistent handle."""
    if not isinstance(value, int) or isinstance(value, bool) or value not in PERSISTENT_HANDLES:
        raise fail(key, "a persistent handle, 0x81000000 to 0x81ffffff")
    return value


def read_pcrs(key: str, value: object) -> int:
    """A list of PCR numbers; their mask."""
    if not isinstance(value, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < PCR_COUNT for n in value
    ):
        raise fail(key, f"a list of PCR numbers, 0 to {PCR_COUNT - 1}")
    return mask_of(value)


def read_banks(key: str, value: object) -> tuple[HashAlg, ...]:
    """A list of PCR banks."""
    if not isinstance(value, list) or not value:
        raise fail(key, "a list of banks")
    read = one_of(*(alg.label for alg in HashAlg))
    return tuple(HashAlg.from_label(read(key, name)) for name in value)


_read_address = parsed(addresses.parse_address, addresses.MUST_ADDRESS)


def read_addresses(key: str, value: object) -> tuple[str, ...]:
    """An address or a list of them."""
    listed = value if isinstance(value, list) else [value]
    return tuple(_read_address(key, item) for item in listed)


def read_networks(key: str, value: object) -> tuple[str, ...]:
    """A list of IP addresses and networks."""
    must = 'a list of IP addresses and networks ("10.0.0.0/8")'
    if not isinstance(value, list):
        raise fail(key, must)
    found = []
    for item in value:
        try:
            found.append(str(ipaddress.ip_network(read_text(key, item))))
        except ValueError as exc:
            raise fail(key, must) from exc
    return tuple(found)


def read_identities(key: str, value: object) -> tuple[str, ...]:
    """A list of tenants' identities."""
    if not isinstance(value, list):
        raise fail(key, "a list of identities")
    for item in value:
        if not IDENTITY_RE.fullmatch(read_text(key, item)):
            raise fail(key, f"{MUST_IDENTITIES}: {addresses.shown(item)} {_why_no_identity(item)}")
    return tuple(value)


def _why_no_identity(text: str) -> str:
    """The rule that an identity breaks, and the text that would be accepted, where that is clear."""
    kind, colon, rest = text.partition(":")
    if not colon or kind.lower() not in RULES:
        return f"does not begin with one of {', '.join(f'{name}:' for name in RULES)}"
    bare = rest.replace(":", "").lower() if kind.lower() == "sha256" else rest.lower()
    folded = f"{kind.lower()}:{bare if kind.lower() in ('dns', 'sha256') else rest}"
    if IDENTITY_RE.fullmatch(folded):
        rule = "has colons or capitals in its hex" if kind.lower() == "sha256" else "has capitals"
        return f"{rule}: write {addresses.shown(folded)}"
    return f"is not a valid identity of that kind, which is {RULES[kind.lower()]}"


def read_uuids(key: str, value: object) -> frozenset[uuid.UUID]:
    """A list of UUIDs."""
    if not isinstance(value, list):
        raise fail(key, "a list of UUIDs")
    return frozenset(read_uuid(key, item) for item in value)


read_url = parsed(lambda text: str(addresses.parse_url(text)), addresses.MUST_URL)
read_safe_url = parsed(addresses.parse_safe_url, addresses.MUST_SAFE_URL)
read_webhook_url = parsed(
    lambda text: addresses.parse_safe_url(text, query=True), addresses.MUST_SAFE_URL
)
read_host = parsed(addresses.parse_host, addresses.MUST_HOST)
read_agent_id = parsed(addresses.parse_agent_id, addresses.MUST_AGENT_ID)
read_contact = parsed(addresses.parse_contact, addresses.MUST_CONTACT)
