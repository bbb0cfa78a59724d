"""Predicts the results of the batching rule: latencies, the chip's duty, CPU and memory.

A small simulation of docs/adr/0001's rule, request by request: tenants poll, lines collect, a ripe line
is sealed when the chip is free and rested, and the answers leave one after the other. It also covers the
two rejected rules: one quote for each request, and a free-running tick. The kernel's IMA waits for the
same chip (`ima_wait`). Pure: no clock, no sockets, and the same seed gives the same figures. `bench plan`
and `bench ima` compare the predictions with the daemon.

Does not model: tenants that retry, a chip that fails, other programs' commands on the chip.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from provider_proxy.errors import UsageError
from provider_proxy.host.batching.ima_wait import NO_IMA, ImaWait, predict_ima
from provider_proxy.host.tpm.times import SMALL_COMMAND_S

DUTY_SPAN_S = 10.0  # as the gate's: no rest is longer than (1 - duty) times this
SIMULATED_REQUESTS = 20_000  # 200 of them are beyond the 99th percentile
LEAST_ROUNDS = 20  # polls of each tenant, however many tenants there are
MOST_ROUNDS = 2_000
MAX_TENANTS = 100_000
WINDOWS_MS = (0, 10, 20, 50, 100, 200, 300, 500, 700, 1000, 2000, 5000)
RESERVE = 1.15  # the error that a prediction may have: see `bench plan`
EXTENDS_PER_S = 5.0  # new or changed files a second that IMA measures; hardly changes its wait
WORTH_OF_DUTY = 0.05  # saving less of the chip's time is not worth a longer window
CPU_LIMIT = 0.8  # of the one core that the daemon's loop uses; above it queues grow


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The daemon's own costs; the defaults as `bench plan` measured them on one core of a shared server.

    Attributes:
        request_s: CPU of a request from its bytes to its place in a line.
        answer_s: CPU of a request's share in tree and check, and of its answer.
        batch_s: CPU of a batch, whatever its size; its answers wait for half of it.
        base_mb: resident memory of a daemon that has no tenant, MB (10^6 bytes).
        tenant_kb: memory of a tenant's connection by mutual TLS, and of its request, kB.
    """

    request_s: float = 190e-6
    answer_s: float = 290e-6
    batch_s: float = 4.0e-3
    base_mb: float = 55.0
    tenant_kb: float = 85.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The load, and the chip that serves it.

    Attributes:
        tenants: number of tenants that poll.
        interval_s: each polls once an interval, at its own time in it.
        quote_s: the chip's time for TPM2_Quote.
        window_s, max_leaves, max_duty: as configured.
        keys: kinds of requests (bank, isolated PCRs, allowed PCRs) that do not share a batch.
        tick_s: instead of our rule, a free-running tick quotes all requests since the last one.
        readings, read_s: TPM2_PCR_Read commands for each quote, and the time of one. 0 while the PCRs
            do not change, 1 where up to 8 of them change all the time.
        extends_per_s, extend_s: how often the host's IMA extends a PCR, and the chip's time for that.
    """

    tenants: int
    interval_s: float
    quote_s: float
    window_s: float = 0.05
    max_leaves: int = 1024
    max_duty: float = 0.5
    keys: int = 1
    tick_s: float | None = None
    readings: float = 0.0
    read_s: float = SMALL_COMMAND_S
    extends_per_s: float = EXTENDS_PER_S
    extend_s: float = SMALL_COMMAND_S

    def __post_init__(self) -> None:
        if not 1 <= self.tenants <= MAX_TENANTS:
            raise UsageError(f"tenants must be 1 to {MAX_TENANTS}")
        if not 1 <= self.keys <= self.tenants:
            raise UsageError("keys must be at least 1 and at most the number of tenants")
        if not (self.interval_s > 0 and self.quote_s > 0 and self.window_s >= 0):
            raise UsageError("interval and chip time must be > 0, and the window >= 0")
        if min(self.readings, self.read_s, self.extends_per_s, self.extend_s) < 0:
            raise UsageError("readings, extends and their times must be >= 0")
        if not 0 < self.max_duty <= 1 or self.max_leaves < 1:
            raise UsageError(
                "the duty must be > 0 and <= 1, and a batch must have at least one leaf"
            )

    @property
    def chip_s(self) -> float:
        """The chip's time for all commands of a quote."""
        return self.quote_s + self.readings * self.read_s

    @property
    def turn_s(self) -> float:
        """From the start of one quote to the next one's, where the chip is never idle."""
        return self.chip_s + self.rest_s

    @property
    def rest_s(self) -> float:
        """The rest after a quote, which keeps the duty."""
        return min(self.chip_s * (1 / self.max_duty - 1), DUTY_SPAN_S * (1 - self.max_duty))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The results of a scenario.

    Attributes:
        p50_ms, p99_ms: from the request's bytes to the answer's.
        quotes_per_s, duty: of the chip; the duty is the share of its time that quotes take.
        leaves: requests a batch, on average.
        answered_per_s: less than tenants / interval where tenants still wait when the next poll is due.
        cpu: share of one core. memory_mb: resident, MB.
        ima: how long the host's IMA waits for the chip.
    """

    p50_ms: float
    p99_ms: float
    quotes_per_s: float
    duty: float
    leaves: float
    answered_per_s: float
    cpu: float
    memory_mb: float
    ima: ImaWait = NO_IMA


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A window, its results, and whether they are good enough."""

    window_ms: float
    prediction: Prediction
    fits: bool


def predict(scenario: Scenario, costs: Costs | None = None, *, seed: int = 1) -> Prediction:
    """Simulate; the first poll of each tenant does not count."""
    costs = costs or Costs()
    rounds = math.ceil(SIMULATED_REQUESTS / scenario.tenants)
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, rounds))
    dice = random.Random(seed)  # noqa: S311  # a simulation
    run = Simulation(scenario, costs, dice)
    run.play(draw_polls(scenario, rounds + 1, dice))
    latencies = sorted(run.latencies)
    span_s = max(run.end_s, (rounds + 1) * scenario.interval_s) - scenario.interval_s
    rate = len(latencies) / span_s
    quotes = run.quotes / span_s
    return Prediction(
        p50_ms=quantile(latencies, 0.5) * 1000,
        p99_ms=quantile(latencies, 0.99) * 1000,
        quotes_per_s=quotes,
        duty=quotes * scenario.chip_s,
        leaves=len(latencies) / run.quotes,
        answered_per_s=rate,
        cpu=rate * (costs.request_s + costs.answer_s) + quotes * costs.batch_s,
        memory_mb=costs.base_mb + scenario.tenants * costs.tenant_kb / 1000,
        ima=predict_ima(
            run.begins,
            scenario.chip_s,
            scenario.rest_s,
            extend_s=scenario.extend_s,
            extends_per_s=scenario.extends_per_s,
            dice=dice,
        ),
    )


def quantile(ascending: Sequence[float], share: float) -> float:
    """A quantile of ascending values; infinite where there are none."""
    if not ascending:
        return math.inf
    return ascending[min(len(ascending) - 1, int(len(ascending) * share))]


def choose(
    scenario: Scenario,
    deadline_s: float,
    costs: Costs | None = None,
    *,
    windows_ms: Iterable[float] = WINDOWS_MS,
) -> tuple[Choice | None, list[Choice]]:
    """The window to set, and the results of each candidate.

    Of those whose p99 meets the deadline with `RESERVE`, the shortest that leaves the chip about as
    much time as any other. A longer window helps only under light load: under heavy load requests
    collect during the quote before.

    Returns:
        The choice, None where no window meets the deadline; and all candidates.
    """
    found = []
    for window_ms in windows_ms:
        if window_ms and window_ms / 1000 >= deadline_s:
            continue  # no answer would come in time
        prediction = predict(replace(scenario, window_s=window_ms / 1000), costs)
        # An answer later than the interval would delay the tenant's next poll.
        bound_s = min(deadline_s, scenario.interval_s)
        fits = prediction.p99_ms * RESERVE <= bound_s * 1000 and prediction.cpu <= CPU_LIMIT
        found.append(Choice(window_ms=window_ms, prediction=prediction, fits=fits))
    good = [choice for choice in found if choice.fits]
    least = min((choice.prediction.duty for choice in good), default=0.0)
    best = next((c for c in good if c.prediction.duty <= least + WORTH_OF_DUTY), None)
    return best, found


def draw_polls(scenario: Scenario, rounds: int, dice: random.Random) -> list[tuple[float, int]]:
    """Times (seconds from the start) and tenants of all polls, ascending: one poll an interval each."""
    return sorted(
        ((number + dice.random()) * scenario.interval_s, tenant)
        for number in range(rounds)
        for tenant in range(scenario.tenants)
    )


class Simulation:
    """One run of the rule. Times are seconds from its start; the first interval is a warm-up.

    Attributes:
        latencies: of each request that counts, in seconds.
        quotes: how many counted. end_s: when the last answer left.
        begins: when the chip started each quote.
    """

    def __init__(self, scenario: Scenario, costs: Costs, dice: random.Random) -> None:
        self._is = scenario
        self._costs = costs
        self._dice = dice
        self._lines: dict[int, list[tuple[float, int]]] = {}  # key: (arrival, tenant), oldest first
        self._waits = [False] * scenario.tenants
        self._answered = [0.0] * scenario.tenants
        self._flush_free_s = 0.0
        # While it answers, the loop also reads requests, so answers get less of the core.
        taken = scenario.tenants / scenario.interval_s * costs.request_s
        self._answer_s = costs.answer_s / max(0.1, 1 - taken)
        self.latencies: list[float] = []
        self.quotes = 0
        self.end_s = 0.0
        self.begins: list[float] = []

    def play(self, polls: Sequence[tuple[float, int]]) -> None:
        """Serve these polls; a tenant that still waits for its last answer does not poll."""
        scenario = self._is
        at, now, rested = 0, 0.0, 0.0

        def admit(until_s: float) -> None:
            nonlocal at
            while at < len(polls) and polls[at][0] <= until_s:
                arrival, tenant = polls[at]
                at += 1
                if self._waits[tenant] or self._answered[tenant] > arrival:
                    continue  # it still waits for its last answer
                self._waits[tenant] = True
                self._lines.setdefault(tenant % scenario.keys, []).append((arrival, tenant))

        while at < len(polls) or self._lines:
            if not self._lines:
                now = max(now, polls[at][0])
            admit(now)
            if not self._lines:
                continue  # that tenant still waits for its last answer
            ripe_s = self._ripe_s()
            while ripe_s > now:  # requests in the meantime may fill a line
                step = min(ripe_s, polls[at][0]) if at < len(polls) else ripe_s
                now = step
                admit(now)
                ripe_s = self._ripe_s()
            now = max(now, rested)
            admit(now)
            key = next(key for key in self._lines if self._line_ripe_s(key) <= now)
            now = self._quote(key, now)
            rested = now + scenario.rest_s

    def _ripe_s(self) -> float:
        return min(self._line_ripe_s(key) for key in self._lines)

    def _line_ripe_s(self, key: int) -> float:
        line, scenario = self._lines[key], self._is
        if scenario.tick_s is not None:
            return math.ceil(line[0][0] / scenario.tick_s) * scenario.tick_s
        if len(line) >= scenario.max_leaves:
            return line[scenario.max_leaves - 1][0]
        return line[0][0] + scenario.window_s

    def _quote(self, key: int, now: float) -> float:
        """Seal, quote and answer; returns when the chip has finished."""
        line, scenario, costs = self._lines.pop(key), self._is, self._costs
        taken, rest = line[: scenario.max_leaves], line[scenario.max_leaves :]
        if rest:
            self._lines[key] = rest  # behind the other lines
        end_s = now + scenario.chip_s
        self.begins.append(now)
        self._flush_free_s = max(end_s, self._flush_free_s) + costs.batch_s / 2
        counts = now >= scenario.interval_s
        self.quotes += counts
        self._dice.shuffle(taken)  # the loop answers in any order
        for arrival, tenant in taken:
            self._flush_free_s += self._answer_s
            self._waits[tenant] = False
            self._answered[tenant] = self._flush_free_s
            if counts:
                self.latencies.append(self._flush_free_s - arrival + costs.request_s)
        self.end_s = self._flush_free_s
        return end_s
