"""`provider-proxy registrations`: how a running daemon's registrations stand, from its admin listener."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import httpx

from provider_proxy.cli.arguments import add_config_argument
from provider_proxy.errors import EvidenceFormatError, ReplyError, UsageError
from provider_proxy.evidence.strict_json import parse_json_object
from provider_proxy.host.config.load import load_config
from provider_proxy.trust.registration.client import printable

ASK_LIMIT_S = 10.0
MAX_BODY_BYTES = 4 * 1024 * 1024  # some thousands of registrations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and show.

    Raises:
        UsageError: the configuration names no admin listener.
        ReplyError: no daemon answers there.
    """
    addresses = load_config(args.config).admin.address
    if not addresses:
        raise UsageError("admin.address is not set: there is nobody to ask")
    found = _ask(addresses[0])
    if args.json:
        print(json.dumps({"registrations": found}))
        return 0
    if not found:
        print("the daemon has no [registrars.NAME]")
        return 0
    for each in found:
        _show(each)
    return 0


def _show(each: dict[str, object]) -> None:
    print(f"{_text(each, 'registrar')}: {_text(each, 'state')}, since {_age(each.get('since'))}")
    error = "none"
    if each.get("last_error") is not None:
        error = f"{_age(each.get('last_error_at'))}: {_text(each, 'last_error')}"
    rows = {
        "at": _text(each, "url"),
        "as": _text(each, "agent_id"),
        "of tenant": _text(each, "tenant"),
        "last success": _age(each.get("last_success")),
        "last error": error,
    }
    for name, text in rows.items():
        print(f"  {name:13} {text}")


def _ask(address: str) -> list[dict[str, object]]:
    """The admin listener's `GET /registrations`. Raises: ReplyError."""
    is_unix = address.startswith("unix:")
    transport = httpx.HTTPTransport(uds=address.removeprefix("unix:") if is_unix else None)
    url = f"http://{'localhost' if is_unix else address}/registrations"
    data = bytearray()
    try:
        with (
            httpx.Client(transport=transport, trust_env=False, timeout=ASK_LIMIT_S) as http,
            http.stream("GET", url) as response,
        ):
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > MAX_BODY_BYTES:
                    raise ReplyError("the daemon's answer is too large")
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise ReplyError(f"no daemon answers at {address}: {exc}") from exc
    if response.status_code != 200:
        raise ReplyError(f"the daemon answered {response.status_code}")
    try:
        results = parse_json_object(bytes(data), "the daemon's answer").get("results")
    except EvidenceFormatError as exc:
        raise ReplyError(str(exc)) from exc
    found = results.get("registrations") if isinstance(results, dict) else None
    if not isinstance(found, Sequence) or not all(isinstance(each, dict) for each in found):
        raise ReplyError("the daemon's answer has no registrations")
    return [each for each in found if isinstance(each, dict)]


def _text(each: dict[str, object], key: str) -> str:
    value = each.get(key)
    return printable(str(value)) if value is not None else "none"


def _age(value: object) -> str:
    """How long ago a time was, in its two largest units."""
    if not isinstance(value, int):
        return "never"
    seconds = max(0, int(time.time()) - value)
    days, hours, minutes = seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h ago"
    if hours:
        return f"{hours} h {minutes} min ago"
    return f"{minutes} min {seconds % 60} s ago" if minutes else f"{seconds} s ago"
