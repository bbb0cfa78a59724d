"""What a fleet needs: cores, members, connections, database. Calculated from figures per verdict.

The figures were measured on two shared cores (PostgreSQL 15, durable, 100,000 hosts with
pins of 700 bytes and IMA positions; `bench watch` for the checks). Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CHECKS_PER_CORE_S = (
    720.0  # of one member: question, verification, policy; with an IMA list that does not grow
)
MEMBER_WRITE_S = 62e-6  # a member's CPU for one verdict's rows
DATABASE_CORE_S = 46e-6  # the server's
WAL_BYTES = 1_600  # of one verdict, checkpoints' full pages included
HOST_BYTES = 3_700  # rows of `host` and `host_state` with their indexes
BLOAT = 2.0  # rows are rewritten with each verdict, and vacuum comes later
REPORT_BYTES = 930
KEEP_DAYS = 30
HISTORY_BYTES = 31 * 24 * 60 * 5 * 90  # a month of minutes, five states each
BUSY = 0.7  # of a core: above that, questions are late
DATABASE_BUSY = 0.5  # stalls come before a core is full
CONNECTIONS = 2  # a member


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSize:
    """What a fleet of so many hosts needs.

    Attributes:
        verdicts_s: a second.
        members: processes, each on its own core; one of them may fail.
        connections: to the database.
        database_cores: of the server.
        wal_mb_s: WAL that the server writes, and sends to each standby, in MB a second.
        database_gb: on disk, with reports of `KEEP_DAYS`.
    """

    hosts: int
    interval_s: float
    verdicts_s: float
    members: int
    connections: int
    database_cores: int
    wal_mb_s: float
    database_gb: float


def fleet_size(hosts: int, interval_s: float, *, reports_a_day: float = 1.0) -> FleetSize:
    """Calculate it.

    Args:
        reports_a_day: of each host.
    """
    verdicts_s = hosts / interval_s
    cores = verdicts_s * (1 / CHECKS_PER_CORE_S + MEMBER_WRITE_S)
    members = max(2, math.ceil(cores / BUSY) + 1)
    stored = hosts * (HOST_BYTES * BLOAT + reports_a_day * KEEP_DAYS * REPORT_BYTES)
    return FleetSize(
        hosts=hosts,
        interval_s=interval_s,
        verdicts_s=verdicts_s,
        members=members,
        connections=members * CONNECTIONS,
        database_cores=max(1, math.ceil(verdicts_s * DATABASE_CORE_S / DATABASE_BUSY)),
        wal_mb_s=verdicts_s * WAL_BYTES / 1e6,
        database_gb=(stored + HISTORY_BYTES) / 1e9,
    )
