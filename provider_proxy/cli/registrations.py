"""`provider-proxy registrations`: a running daemon's registrations, from its admin listener."""

from __future__ import annotations

import argparse
import json
import time

from provider_proxy.cli.arguments import add_config_argument
from provider_proxy.cli.ask_admin import AdminClient, configured
from provider_proxy.cli.register import EXIT_REFUSED, SAID_NO
from provider_proxy.common.failures import printable
from provider_proxy.errors import ReplyError

MAX_BODY_BYTES = 4 * 1024 * 1024  # some thousands of registrations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and show; 1 where a person must act, because a registrar refuses.

    Raises:
        UsageError: the configuration names no admin listener.
        HostError, ReplyError: no daemon answers there.
    """
    found = _ask(configured(args.config))
    if args.json:
        print(json.dumps({"registrations": found}))
    elif not found:
        print("the daemon has no [registrars.NAME]")
    else:
        for each in found:
            _show(each)
    said_no = [state.value for state in SAID_NO]
    return EXIT_REFUSED if any(each.get("state") in said_no for each in found) else 0


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
    """The admin listener's `GET /registrations`. Raises: HostError, ReplyError."""
    found = AdminClient(address).get("/registrations", MAX_BODY_BYTES).get("registrations")
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ReplyError("the daemon's answer has no registrations")
    return found


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
