"""A slowed-down swtpm for several programs, in a process of its own, which reports when it was in use.

The load generator's process is busy at times, and a broker inside it would pass commands on late.
`python -m provider_proxy.bench.slow_chip TCTI CHIP` prints one JSON line with what its clients open,
then, for each line that it reads, one with all commands since; it ends with its input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from types import TracebackType

from provider_proxy.errors import HostError
from provider_proxy.testing.broker import Broker, Command
from provider_proxy.testing.disturb import CHIPS, slow_down

STOP_LIMIT_S = 15.0


class SlowChip:
    """That process.

    Args:
        tcti: of the swtpm.
        chip: a name of `CHIPS`.

    Attributes:
        tcti: what its clients open.
    """

    def __init__(self, tcti: str, chip: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "provider_proxy.bench.slow_chip", tcti, chip],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tcti: str = json.loads(self._line())["tcti"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise HostError("the process of the slowed-down chip ended: see its error above")
        return line

    def take(self) -> list[Command]:
        """All commands since the last time, in the order in which the chip had them."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return [Command(**each) for each in json.loads(self._line())]

    def __enter__(self) -> SlowChip:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tcti")
    parser.add_argument("chip", choices=sorted(CHIPS))
    args = parser.parse_args()
    seen: list[Command] = []
    with Broker(args.tcti, slow_down(CHIPS[args.chip]), observe=seen.append) as broker:
        print(json.dumps({"tcti": broker.tcti}), flush=True)
        for _ in sys.stdin:
            count = len(seen)
            print(json.dumps([dataclasses.asdict(each) for each in seen[:count]]), flush=True)
            del seen[:count]


if __name__ == "__main__":
    main()
