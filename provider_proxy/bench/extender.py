"""Extends PCR 10 of a TPM as the kernel's IMA does, and says when.

`python -m provider_proxy.bench.extender TCTI EXTENDS_PER_S OPEN_S SHELL_S SEED` prints one JSON line.
First extends are due at random moments, drawn beforehand; like IMA it sends one at a time, and the others
wait: "due" and "done" are the moments, as monotonic seconds. Then it is one shell:
each extend as soon as the last is done. "shell" is when each of those was done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time

from provider_proxy.host.batching.ima_wait import EXEC_S
from provider_proxy.host.tpm.chip import close_context, open_context
from provider_proxy.testing.ima import extend


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tcti")
    parser.add_argument("extends_per_s", type=float)
    parser.add_argument("open_s", type=float)
    parser.add_argument("shell_s", type=float)
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    dice = random.Random(args.seed)  # noqa: S311  # a load generator
    gaps = iter(lambda: dice.expovariate(args.extends_per_s), None)
    moments = list(itertools.takewhile(lambda at: at < args.open_s, itertools.accumulate(gaps)))
    context = open_context(args.tcti)
    try:
        due, done, shell = [], [], []
        begin = time.monotonic()
        for moment in moments:
            time.sleep(max(0.0, begin + moment - time.monotonic()))
            extend(context)
            due.append(begin + moment)
            done.append(time.monotonic())
        begin = time.monotonic()
        while time.monotonic() < begin + args.shell_s:
            time.sleep(EXEC_S)
            extend(context)
            shell.append(time.monotonic())
    finally:
        close_context(context)
    print(json.dumps({"due": due, "done": done, "shell": shell}))


if __name__ == "__main__":
    main()
