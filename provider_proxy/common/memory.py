"""The cyclic garbage collector: rare, and never away for long.

Reference counts free what a request, a connection, a batch or a round leaves behind; tests hold that.
What still makes a cycle, an exception in a worker thread for one, is rare and small, but may hold on to
much: so the collector comes by the clock as well as by the count of objects.
"""

from __future__ import annotations

import gc

import anyio

GC_THRESHOLD = 100_000  # objects in the youngest generation; some 10 MB of garbage at most
GC_EVERY_S = 30.0  # one collection takes a millisecond for each ten thousand objects alive


def tune_gc() -> None:
    """Make the collector rare, and leave to it only what is made from now on.

    A batch of a thousand keeps some ten thousand objects alive at once, and the default threshold of
    700 has the collector walk them again and again: a fifth of the daemon's CPU (measured).
    """
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 100)


async def collect() -> None:
    """Collect every `GC_EVERY_S` seconds, until cancelled."""
    while True:
        await anyio.sleep(GC_EVERY_S)
        gc.collect()
