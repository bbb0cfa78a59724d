"""A status as people read it in a terminal, in colour or not, wide or narrow.

Names that tenants chose are shown with control characters escaped and never as markup. Nothing here
uses the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from provider_proxy.common.log import escaped
from provider_proxy.errors import ReplyError

Pressed = Callable[[float], str]
"""Waits so many seconds for a key; "" where none came."""

SPARKS = " ▁▂▃▄▅▆▇█"
BAR_CELLS = 20
MOST_NAME_CHARS = 40
STYLES = {"ready": "bold green", "draining": "bold yellow", "trouble": "bold red"}
WIDE = 90  # columns from which on all is shown
COLUMNS = ["BATCH", "AT", "LEAVES", "WAIT", "QUOTE", "SEALED WHEN", "PCRS"]
NUMBERS = ("BATCH", "LEAVES", "WAIT", "QUOTE")
MIN_OUTCOME = 8
SEALED_BY = {
    "window": "window over",
    "chip": "chip ready",
    "full": "full",
    "drain": "stopping",
}
# In the words of the status page; a test compares the two.
REASONS = {
    "TenantLimitError": "over a limit of its own",
    "OverloadedError": "the queue was full, or the answer would have come too late",
    "QuoteError": "the TPM gave no quote",
    "DeadlineError": "no quote within the request's timeout",
    "ParameterError": "a parameter was wrong or not allowed",
    "UnknownTenantError": "not a tenant of this host, or its certificate is no longer valid",
    "ClientCertError": "the front sent no certificate that can be read",
    "ClientGoneError": "hung up before its batch was sealed",
    "DrainingError": "the proxy was stopping",
    "NotFoundError": "no such path, or no such VM for this tenant",
    "MethodError": "asked with something other than GET",
    "SelfCheckError": "the proxy's own check failed: look into this",
}


def render(
    status: Mapping[str, Any],
    *,
    batches: int,
    tenants: int,
    width: int,
    problem: str = "",
    footer: str = "",
) -> RenderableType:
    """The whole picture.

    Args:
        batches, tenants: how many of them there is room for.
        width: columns.
        footer: the last line of a live view, whose batches have a line each.
        problem: why the last look failed; what is shown is older then.

    Raises:
        ReplyError: the status lacks required keys.
    """
    try:
        parts: list[RenderableType] = [
            _head(status, problem),
            Text(),
            _facts(status, width),
            Text(),
        ]
        parts += [
            _batches(status, batches, width, live=bool(footer)),
            Text(),
            _tenants(status, tenants),
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError) as exc:
        raise ReplyError("the status lacks a key, or holds an unexpected value") from exc
    if footer:
        parts += [Text(), Text(footer, style="dim")]
    return Group(*parts)


def _name(text: object) -> str:
    name = escaped(str(text))
    return name if len(name) <= MOST_NAME_CHARS else name[: MOST_NAME_CHARS - 1] + "…"


def _head(status: Mapping[str, Any], problem: str) -> Text:
    state = str(status["state"])
    head = Text(overflow="fold")
    head.append(f" {_name(state).upper()} ", style=STYLES.get(state, "bold") + " reverse")
    if status["why"] is not None:
        head.append(f" {_name(status['why'])}", style=STYLES.get(state, ""))
    head.append(f"  provider-proxy {_name(status['program'])}", style="bold")
    head.append(f" on host {_name(status['host']['uuid'])}, up {_span(status)}")
    if status["host"]["software"]:
        head.append("  the TPM is software", style="yellow")
    if problem:
        head.append(f"\n{escaped(problem)}; asking again", style="bold red")
    return head


def _span(status: Mapping[str, Any]) -> str:
    seconds = max(0, int(status["now"] - status["started"]))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _bar(share: float, cap: float) -> Text:
    """A gauge of the duty with its cap."""
    filled = round(min(1.0, share) * BAR_CELLS)
    limit = min(BAR_CELLS - 1, round(cap * BAR_CELLS))
    style = "yellow" if share >= 0.9 * cap else "green"
    bar = Text()
    for cell in range(BAR_CELLS):
        mark = "█" if cell < filled else "░"
        if cell == limit and cell >= filled and cap < 1:
            mark = "┃"
        bar.append(mark, style=style if cell < filled else "dim")
    return bar


def _facts(status: Mapping[str, Any], width: int) -> Table:
    chip, queue, batching = status["chip"], status["queue"], status["batching"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    duty = _bar(chip["duty"], chip["max_duty"])
    duty.append(f"  busy {chip['duty']:.0%} of the last 10 s, at most {chip['max_duty']:.0%}")
    grid.add_row("chip", duty)
    quote = (
        f"a quote takes {_ms(chip['learnt_quote_ms'])} (learnt), and the pause after it "
        f"{_ms(chip['rest_ms'])}"
    )
    if chip["in_flight_ms"]:
        quote += f"; a command has run for {_ms(chip['in_flight_ms'])}"
    grid.add_row("", quote)
    if chip["errors"]:
        errors = ", ".join(f"{_name(code)} {count:d}" for code, count in chip["errors"].items())
        grid.add_row("", Text(f"errors since the start: {errors}", style="yellow"))
    if status["selfcheck_failures"]:
        failed = f"{status['selfcheck_failures']:d} batches failed the self-check"
        grid.add_row("", Text(failed, style="bold red"))
    if queue["waiting"]:
        lines = "1 line" if queue["lines"] == 1 else f"{queue['lines']:d} lines"
        waits = f"{queue['waiting']:d} waiting in {lines}, the first for {_ms(queue['oldest_ms'])}"
    else:
        waits = "no request waits"
    grid.add_row("queue", f"{waits}; room for {queue['max_queue']:d}")
    rule = f"{batching['window_ms']:g} ms, then when the chip is ready"
    grid.add_row("window", f"{rule}; {batching['max_leaves']:d} requests at most")
    if status.get("audit_lost"):
        lost = f"{status['audit_lost']:d} batches are not in the audit log"
        grid.add_row("audit", Text(lost, style="bold red"))
    dates = status.get("dates")
    if isinstance(dates, list) and dates:
        grid.add_row("dates", _dates(dates))
    away = status.get("turned_away")
    if isinstance(away, list) and away:
        who = f"{_name(away[0]['address'])}: {escaped(str(away[0]['reason']))}"
        grid.add_row("turned away", Text(f"last {who}", style="yellow"))
    registrations = status.get("registrations")
    if isinstance(registrations, list) and registrations:
        grid.add_row("registrars", ", ".join(_registration(one) for one in registrations))
    history = status["batches"][-max(10, min(120, width - 30)) :]
    if history:
        grid.add_row("leaves", _sparks([batch["leaves"] for batch in history]))
        grid.add_row(
            "time, ms", _sparks([batch["wait_ms"] + batch["quote_ms"] for batch in history])
        )
    return grid


def _dates(dates: list[Mapping[str, Any]]) -> Text:
    """What has expired or soon will; or what expires first."""
    warnings = [one for one in dates if one["warning"] is not None]
    if not warnings:
        first = datetime.fromtimestamp(dates[0]["not_after"]).strftime("%Y-%m-%d")
        return Text(
            f"all certificates are valid; the first to expire is {dates[0]['what']}, {first}"
        )
    text = Text(overflow="fold")
    for number, one in enumerate(warnings):
        style = "yellow" if one["state"] == "soon" else "bold red"
        text.append(("\n" if number else "") + escaped(str(one["warning"])), style=style)
    return text


def _registration(one: Mapping[str, Any]) -> str:
    return f"{_name(one.get('registrar', one.get('name')))} {_name(one.get('state'))}"


def _sparks(values: list[float]) -> Text:
    top = max([*values, 1])
    marks = "".join(SPARKS[min(8, max(1, round(value / top * 8)))] for value in values)
    return Text(f"{marks} {top:.0f} at most", style="blue", no_wrap=True, overflow="crop")


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _batches(status: Mapping[str, Any], most: int, width: int, *, live: bool) -> RenderableType:
    shown = status["batches"][: -most - 1 : -1]
    if not shown:
        return Text("No batches yet: nobody has asked for a quote.", style="dim")
    columns = COLUMNS if width >= WIDE else [name for name in COLUMNS if name not in ("AT", "PCRS")]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan", pad_edge=False)
    rows = [[_cell(name, batch) for name in columns] for batch in shown]
    # What is left for the outcome: rich would shorten the other columns, too.
    others = sum(
        max(len(name), *(len(row[n]) for row in rows)) + 2 for n, name in enumerate(columns)
    )
    rest = max(MIN_OUTCOME, width - others)
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    table.add_column("OUTCOME", overflow="fold", max_width=rest)
    for batch, row in zip(shown, rows, strict=True):
        good = batch["outcome"] == "ok"
        outcome = _name(batch["outcome"])
        if not good:
            outcome += f": {escaped(str(batch['reason']))}"
        if live and len(outcome) > rest:
            outcome = outcome[: rest - 1] + "…"
        table.add_row(*map(Text, [*row, outcome]), style="" if good else "red")
    return table


def _cell(column: str, batch: Mapping[str, Any]) -> str:
    match column:
        case "BATCH":
            return f"{batch['number']:d}"
        case "AT":
            return datetime.fromtimestamp(batch["sealed"]).strftime("%H:%M:%S")
        case "LEAVES":
            return f"{batch['leaves']:d}"
        case "WAIT":
            return _ms(batch["wait_ms"])
        case "QUOTE":
            return _ms(batch["quote_ms"])
        case "SEALED WHEN":
            return SEALED_BY.get(batch["sealed_by"], _name(batch["sealed_by"]))
        case _:
            return _name(f"{batch['bank']} {batch['mask']}")


def _tenants(status: Mapping[str, Any], most: int) -> RenderableType:
    tenants = status["tenants"]
    minutes = int(tenants["span_s"]) // 60
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan", pad_edge=False)
    table.add_column(f"TENANT, LAST {minutes} MIN")
    table.add_column("ANSWERED", justify="right")
    table.add_column("REFUSED", overflow="fold")
    for tenant in tenants["listed"][:most]:
        why = "\n".join(
            f"{count:d} x {REASONS.get(reason, _name(reason))}"
            for reason, count in tenant["refused"].items()
        )
        table.add_row(
            Text(_name(tenant["name"])),
            str(tenant["answered"]),
            Text(why or "-", style="yellow" if why else "dim"),
        )
    rest = len(tenants["listed"][most:]) + tenants["more"]
    if rest:
        table.add_row(Text(f"and {rest} more", style="dim"), "", "")
    if not tenants["listed"]:
        return Text(f"No tenant has asked in the last {minutes} minutes.", style="dim")
    return table
