"""What a new mutual-TLS connection costs, against a bare loop of `ssl.SSLSocket`s; what memory stays."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from provider_proxy.bench.process import Target
from provider_proxy.errors import HostError

CLIENTS = 3
EACH = 60
ROUNDS = 5
NO_NODELAY = 150
CLOSED = 10_000
WARM_UP = 500

Say = Callable[[str], None]


def connect(
    host: str,
    port: int,
    directory: Path,
    count: int,
    *,
    clients: int = CLIENTS,
    nodelay: bool = True,
) -> float:
    """New connections a second of some clients at once, each so many.

    Args:
        directory: with `ca.crt` and `tenant0.pem`.

    Raises:
        HostError: a client ended, or a request was not answered.
    """
    command = [sys.executable, "-m", "provider_proxy.bench.connector", host, str(port)]
    command += [str(directory / "ca.crt"), str(directory / "tenant0.pem"), str(count)]
    command += [] if nodelay else ["--no-nodelay"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        for _ in range(clients)
    ]
    rate = 0.0
    for process in processes:
        output, _ = process.communicate()
        if process.returncode:
            raise HostError("a client process ended: see its error above")
        values = json.loads(output)
        if values["good"] != count:
            raise HostError(f"{count - values['good']} of {count} requests were not answered")
        rate += count / values["seconds"]
    return rate


def measure(directory: Path, config: str, say: Say) -> dict[str, object]:
    """CPU per connection of the daemon and of the bare loop, alternately; and the memory after 10,000."""
    used: dict[str, list[float]] = {"daemon": [], "bare": []}
    with (
        Target(directory, "fresh", config) as daemon,
        Target(directory, "bare_tls", config, module="provider_proxy.bench.bare_tls") as bare,
    ):
        both = (("daemon", daemon), ("bare", bare))
        for turn in range(ROUNDS):
            say(f"new connections, round {turn + 1} of {ROUNDS}")
            for name, target in both if turn % 2 else both[::-1]:
                begin = target.cpu_s()
                connect(target.host, target.port, directory, EACH)
                used[name].append((target.cpu_s() - begin) / (CLIENTS * EACH) * 1000)
        say("clients without TCP_NODELAY")
        slow, slow_bare = (
            connect(each.host, each.port, directory, NO_NODELAY, clients=1, nodelay=False)
            for each in (daemon, bare)
        )
        say(f"{CLOSED} connections that close")
        connect(daemon.host, daemon.port, directory, WARM_UP)
        before = daemon.rss_mb()
        connect(daemon.host, daemon.port, directory, CLOSED // CLIENTS)
        after = daemon.rss_mb()
    ratios = [a / b for a, b in zip(used["daemon"], used["bare"], strict=True)]
    return {
        "new_connection_ratio": round(statistics.median(ratios), 2),
        "new_connection_ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "new_connection_cpu_ms": round(statistics.median(used["daemon"]), 2),
        "new_connection_cpu_ms_bare": round(statistics.median(used["bare"]), 2),
        "new_connections_no_nodelay_per_s": round(slow, 1),
        "new_connections_no_nodelay_per_s_bare": round(slow_bare, 1),
        "rss_after_10000_closed_mb": round(after - before, 1),
    }
