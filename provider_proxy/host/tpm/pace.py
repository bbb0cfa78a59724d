"""How long a quote takes on this chip, and how long the quoter rests after it.

The kernel's IMA uses the same chip, so all our commands together may take at most `max_duty` of its time:
after a command of `t` seconds comes a rest of `t * (1/max_duty - 1)`. Times are learnt, because they
differ a hundredfold between chips and hardly at all on one chip. It has no clock of its own.
"""

from __future__ import annotations

from provider_proxy.host.tpm.state import ChipState

EWMA_WEIGHT = 0.2  # a chip's time varies by percents (TPMScan: p99/p50 = 1.02): few samples suffice
DUTY_SPAN_S = 10.0  # over which the duty holds
HANG_FACTOR = 20  # a command of this many times the learnt time hangs; a chip's p99/p50 is 1.02
HANG_LEAST_S = 5.0  # but not earlier: another program's new RSA key takes seconds
LARGEST_SURPRISE = 3  # one hang must not spoil all estimates; a slower chip is soon learnt
LEAST_DUTY = 0.05  # less would make tenants of a slow chip wait for minutes, without gain for IMA
FRESH_S = 0.005  # each request asks for the state
FIRST_GUESS_S = 0.25  # the median RSA signature of 139 chips, until our own is measured


def capped_duty(max_duty: float, quote_s: float, ima_wait_s: float | None) -> float:
    """The duty's cap that also keeps IMA's mean wait (duty x quote / 2) within its limit.

    Args:
        max_duty: the cap without IMA.
        quote_s: the time of a quote, in seconds.
        ima_wait_s: the limit; None for no limit.
    """
    if ima_wait_s is None:
        return max_duty
    return min(max_duty, max(LEAST_DUTY, 2 * ima_wait_s / quote_s))


class BusyTime:
    """How much of each of the last seconds the chip was busy for us. One thread adds, any may read."""

    def __init__(self) -> None:
        self._seconds = [(0, 0.0)] * (int(DUTY_SPAN_S) + 1)  # which second, and its busy part

    def add(self, begin: float, end: float) -> None:
        """Count a command that ran from `begin` to `end`, monotonic seconds."""
        begin = max(begin, end - DUTY_SPAN_S)
        while begin < end:
            second = int(begin)
            until = min(end, second + 1.0)
            place = second % len(self._seconds)
            known, busy = self._seconds[place]
            self._seconds[place] = (second, until - begin + (busy if known == second else 0.0))
            begin = until

    def share(self, now: float) -> float:
        """The busy share of the last `DUTY_SPAN_S`, accurate to a second."""
        oldest = int(now) - DUTY_SPAN_S
        busy = sum(busy for second, busy in tuple(self._seconds) if second > oldest)
        return min(1.0, busy / DUTY_SPAN_S)


class Pace:
    """The learnt time, and the values derived from it.

    Args:
        max_duty: share of time that our commands may take, > 0 and <= 1.
        ima_wait_s: limit of IMA's mean wait for our commands; None for no limit.

    Attributes:
        max_duty: the cap for the learnt time.
        expected_s: learnt time of a quote, in seconds.
    """

    def __init__(self, max_duty: float, ima_wait_s: float | None = None) -> None:
        self._max_duty = max_duty
        self._ima_wait_s = ima_wait_s
        self._learnt = False
        self._busy = BusyTime()
        self._state: tuple[float, float | None, ChipState] | None = None
        self.expected_s = FIRST_GUESS_S
        self._follow()

    def _follow(self) -> None:
        """Update the values derived from the learnt time."""
        self.max_duty = capped_duty(self._max_duty, self.expected_s, self._ima_wait_s)
        self._rest_factor = 1 / self.max_duty - 1
        self._longest_rest = DUTY_SPAN_S * (1 - self.max_duty)
        self._state = None

    @property
    def pause_s(self) -> float:
        """The rest after a command of the learnt time."""
        return self.expected_s * self._rest_factor

    @property
    def hang_s(self) -> float:
        """A command that runs longer is taken to hang, in seconds."""
        return max(HANG_LEAST_S, HANG_FACTOR * self.expected_s)

    def rest_after(self, seconds: float) -> float:
        """The rest after a command of this time.

        After a command that hung the rest is bounded: only as long as the duty over its span, plus that
        command, requires.
        """
        if seconds > self.hang_s:
            return max(self.pause_s, self._longest_rest - seconds)
        return min(seconds * self._rest_factor, self._longest_rest)

    def worked(self, begin: float, end: float) -> None:
        """Count a command that ran from `begin` to `end`, monotonic seconds."""
        self._busy.add(begin, end)
        self._state = None

    def duty(self, now: float, since: float | None = None) -> float:
        """Share of the last 10 s in which the chip worked for the proxy.

        Args:
            since: when the command began that runs now; None while none does.
        """
        running = 0.0 if since is None else min(now - since, DUTY_SPAN_S)
        return min(1.0, self._busy.share(now) + running / DUTY_SPAN_S)

    def state(self, now: float, *, trouble: str | None, since: float | None = None) -> ChipState:
        """The chip's state as of `now`, monotonic seconds, or some milliseconds ago.

        Args:
            trouble: why there are no quotes, if known; a hanging command is detected here.
            since: when the command began that runs now; None while none does.
        """
        known = self._state
        if (
            known is not None
            and (known[1], known[2].trouble) == (since, trouble)
            and 0 <= now - known[0] < FRESH_S
        ):
            return known[2]
        in_flight_s = 0.0 if since is None else now - since
        if trouble is None and in_flight_s > self.hang_s:
            trouble = "a TPM command has not returned"
        state = ChipState(
            expected_s=self.expected_s,
            pause_s=self.pause_s,
            duty=self.duty(now, since),
            max_duty=self.max_duty,
            trouble=trouble,
            in_flight_s=in_flight_s,
        )
        self._state = (now, since, state)
        return state

    def learn(self, seconds: float) -> None:
        """Take a quote's time into account."""
        if not self._learnt:
            self.expected_s = seconds
        seconds = min(seconds, LARGEST_SURPRISE * self.expected_s)
        self.expected_s += EWMA_WEIGHT * (seconds - self.expected_s)
        self._learnt = True
        self._follow()
