"""One reader of addresses, URLs and agent ids, for files, options and every client.

The results have one spelling: schemes and names in lower case, IPv6 in brackets only where a port or a
path follows. What two programs could read as two hosts is refused: names that are not ASCII, "0x7f.1",
a user before an "@". Nothing is looked up here.

Every function raises `UsageError`, which names the value and the rule that it breaks. The reader of a
file or an option puts the key, and what the value must be (`MUST_…`), before it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from provider_proxy.errors import UsageError

MAX_URL_CHARS = 2048
MAX_NAME_CHARS = 253  # RFC 1035, in text
MAX_UNIX_BYTES = 107  # sun_path of unix(7) has 108 with its final NUL
MAX_PORT = 65535
SHOWN_CHARS = 100
MUST_ADDRESS = '"host:port", "[ipv6]:port" or "unix:/path"'
MUST_URL = '"https://host:port"'
MUST_SAFE_URL = "an https URL (http:// is for loopback only)"
MUST_HOST = "an IP address or a host's name"
MUST_CONTACT = '"address:port" with an IP address'
MUST_AGENT_ID = "1 to 80 letters, digits, '.', '_', '~' and '-', a letter or a digit first"

AGENT_ID_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._~-]{0,79}", re.ASCII)  # 80: Keylime's columns
# RFC 952 allows no "_" in a host's name, but companies and containers use such names.
_LABEL_RE = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMBER_RE = re.compile(
    r"[0-9]+|0x[0-9a-f]*", re.ASCII
)  # as a last label: inet_aton takes "0x7f.1"
_URL_RE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?", re.ASCII)
_REST_RE = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*", re.ASCII)
_PUNYCODE = "xn--"
_ANY = ("0.0.0.0", "::")  # noqa: S104  # nothing is bound here
_LOCAL = {"localhost": ("127.0.0.1", "::1")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Url:
    """An http or https URL, in one spelling.

    Attributes:
        host: without brackets.
        port: None where the URL has no port.
        rest: path and query; empty, or begins with "/" or "?".
    """

    scheme: str
    host: str
    port: int | None
    rest: str

    @property
    def is_safe(self) -> bool:
        """True for https, and for http on loopback, where nobody is in between."""
        return self.scheme == "https" or is_loopback(self.host)

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{_bracketed(self.host)}{port}{self.rest}"


def shown(text: str) -> str:
    """A value in a message: quoted, one short printable line."""
    cut = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"
    return '"' + "".join(c if c.isprintable() else "?" for c in cut) + '"'


def _shown_url(text: str) -> str:
    """As `shown`, without what may be secret: a user, a query."""
    scheme, slashes, rest = text.partition("?")[0].partition("//")
    user, at, host = rest.rpartition("@")
    return shown(scheme + slashes + ("…@" if at and user else at) + host if slashes else scheme)


def is_loopback(host: str) -> bool:
    """True for addresses of this machine alone. Another name may resolve to anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Networks:
    """IP networks, asked often.

    Args:
        listed: addresses and networks, "10.0.0.0/8".
    """

    def __init__(self, listed: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(text) for text in listed)

    def holds(self, address: str) -> bool:
        """True where an IP address lies in one of them."""
        if not self._networks:
            return False
        parsed = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._networks)


def is_safe_url(url: str) -> bool:
    """True for a good https URL, and for http on loopback, where nobody is in between."""
    try:
        return parse_url(url).is_safe
    except UsageError:
        return False


def parse_url(text: str, *, query: bool = False) -> Url:
    """Read an http or https URL.

    Args:
        query: whether it may have one, as a webhook's does; a base URL has none, nor a final slash.

    Raises:
        UsageError: it is not a URL, names a user or a fragment, or its host or port is wrong.
    """
    if len(text) > MAX_URL_CHARS:
        raise UsageError(f"{_shown_url(text)} has more than {MAX_URL_CHARS} characters")
    found = _URL_RE.fullmatch(text)
    if found is None or found[1].lower() not in ("http", "https"):
        raise UsageError(f"{_shown_url(text)} is not an http or https URL")
    where, path, asked = found[2], found[3], found[4] or ""
    if "@" in where:
        raise UsageError("a URL must not hold a user or a password: leave out what is before the @")
    if asked and not query:
        raise UsageError(f"{_shown_url(text)} has a query: leave out what follows the ?")
    if not _REST_RE.fullmatch(path + asked):
        raise UsageError(f"{_shown_url(text)} holds a character that must be written as %XX")
    try:
        host, port = _split(where)
        name = parse_host(host) if host else ""
        number = None if port is None else parse_port(port)
    except UsageError as exc:
        raise UsageError(f"{_shown_url(text)}: {exc}") from exc
    if not name or "%" in name:
        raise UsageError(f"{_shown_url(text)} has no host")
    rest = path + asked if query else path.rstrip("/")
    return Url(scheme=found[1].lower(), host=name, port=number, rest=rest)


def parse_safe_url(text: str, *, query: bool = False) -> str:
    """A URL of https, or of http on loopback, as `parse_url` writes it.

    Raises:
        UsageError: as `parse_url`; or http to another host.
    """
    url = parse_url(text, query=query)
    if not url.is_safe:
        raise UsageError(f"{_shown_url(text)} goes over the network in the clear")
    return str(url)


def parse_host(text: str) -> str:
    """Read an IP address, with or without brackets, or the name of a host.

    Returns:
        Without brackets, in lower case; an address in its shortest form.

    Raises:
        UsageError: it is neither.
    """
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(inner)
    except ValueError:
        return _parse_name(text)
    if inner != text and address.version == 4:
        raise UsageError(f"{shown(text)}: an IPv4 address has no brackets")
    return str(address)


def _parse_name(text: str) -> str:
    name = text.lower()
    labels = name.split(".")
    if not text.isascii():
        raise UsageError(f"{shown(text)} is not ASCII: write the name with xn--")
    if text == "*":
        raise UsageError(
            '"*" is not an address: every interface is "0.0.0.0" in IPv4 and "[::]" in IPv6'
        )
    if len(name) > MAX_NAME_CHARS or not all(map(_LABEL_RE.fullmatch, labels)):
        raise UsageError(f"{shown(text)} is neither an IP address nor the name of a host")
    if _NUMBER_RE.fullmatch(labels[-1]):
        raise UsageError(f"{shown(text)} is not an IP address, and no name ends in a number")
    for label in labels:
        if label.startswith(_PUNYCODE) and not _is_punycode(label.removeprefix(_PUNYCODE)):
            raise UsageError(f"{shown(text)}: {shown(label)} is not a valid xn-- name")
    return name


def _is_punycode(encoded: str) -> bool:
    try:
        name = encoded.encode("ascii").decode("punycode")
        return name.isprintable() and name.encode("punycode") == encoded.encode("ascii")
    except UnicodeError:
        return False


def parse_port(text: str, *, least: int = 1) -> int:
    """Read a port.

    Args:
        least: 0 where the system may choose one.

    Raises:
        UsageError: not a number of that range.
    """
    good = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_PORT))
    if not good or not least <= int(text) <= MAX_PORT:
        raise UsageError(f"{shown(text)} is not a port: ports are {least} to {MAX_PORT}")
    return int(text)


def _split(text: str) -> tuple[str, str | None]:
    """Host with its brackets, and port, of "host", "host:port", "[ipv6]" or "[ipv6]:port"."""
    if text.startswith("["):
        host, bracket, after = text.partition("]")
        if bracket and (not after or after.startswith(":")):
            return host + bracket, after[1:] if after else None
        raise UsageError(f"{shown(text)} has a bracket too few or too many")
    host, colon, port = text.rpartition(":")
    if ":" in host:
        raise UsageError(f"{shown(text)}: an IPv6 address with a port must be in brackets")
    return (host, port) if colon else (text, None)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of what `parse_address` gave."""
    host, _, port = text.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_address(text: str) -> str:
    """Read what a program listens on: "host:port", "[ipv6]:port" or "unix:/path".

    Raises:
        UsageError: none of them; or a path that is longer than a socket's may be.
    """
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path:
            raise UsageError(f"{shown(text)}: the path of a unix socket must be absolute")
        if len(os.fsencode(path)) > MAX_UNIX_BYTES:
            raise UsageError(
                f"{shown(text)}: the path of a unix socket may have {MAX_UNIX_BYTES} bytes, "
                f"and this one has {len(os.fsencode(path))}"
            )
        return text
    if "://" in text:
        raise UsageError(f"{shown(text)} is a URL: leave out what is before the host")
    host, port = _split(text)
    if port is None:
        raise UsageError(f"{shown(text)} has no port")
    if not host:
        raise UsageError(f"{shown(text)} has no host")
    try:
        return f"{_bracketed(parse_host(host))}:{parse_port(port, least=0)}"
    except UsageError as exc:
        raise UsageError(f"{shown(text)}: {exc}") from exc


def is_conflict(one: str, other: str) -> bool:
    """True where one machine cannot listen on both of two addresses that `parse_address` gave."""
    if one.startswith("unix:") or other.startswith("unix:"):
        return one == other
    (host, port), (other_host, other_port) = split_address(one), split_address(other)
    if port != other_port or port == 0:
        return False
    return any(
        one == other or ((one in _ANY or other in _ANY) and (":" in one) == (":" in other))
        for one in _LOCAL.get(host, (host,))
        for other in _LOCAL.get(other_host, (other_host,))
    )


def check_local(addresses: tuple[str, ...]) -> None:
    """Raises: UsageError where an address is neither on loopback nor a unix socket."""
    for address in addresses:
        if not address.startswith("unix:") and not is_loopback(split_address(address)[0]):
            raise UsageError(f"is for loopback and unix sockets only, not {address}")


def parse_contact(text: str) -> str:
    """Read an IP address and a port, as "192.0.2.7:8890" or "[2001:db8::7]:8890"; for `split_address`.

    Raises:
        UsageError: it has no IP address or no port; a name is refused, since records hold addresses.
    """
    host, port = _split(text)
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    is_bare = address is not None and (address.version == 6) != host.startswith("[")
    if address is None or port is None or is_bare or "%" in host:
        raise UsageError(f"{shown(text)} has no IP address, or no port")
    return authority(str(address), parse_port(port))


def parse_agent_id(text: str) -> str:
    """Read an agent's id in a registrar, which stands in its URLs as it is.

    Raises:
        UsageError: it holds another character, or too many.
    """
    if not AGENT_ID_RE.fullmatch(text):
        raise UsageError(f"{shown(text)} is not an agent id")
    return text


def authority(host: str, port: int) -> str:
    """ "host:port", the host in brackets where it is IPv6."""
    return f"{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
