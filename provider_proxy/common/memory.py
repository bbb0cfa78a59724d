"""The cyclic garbage collector: it runs seldom, but at regular times.

Reference counts free what a request, a connection, a batch or a round leaves behind; tests hold that.
Reference cycles, for example of an exception in a worker thread, are rare and small but may keep much
memory alive: so the collector runs by the clock as well as by the count of objects.
"""

from __future__ import annotations

import gc

import anyio

GC_THRESHOLD = 100_000  # objects in the youngest generation; some 10 MB of garbage at most
YOUNG = 1  # the two younger generations: all that was made since the last collection
GC_EVERY_S = 30.0  # one collection takes a millisecond for each ten thousand objects alive


def tune_gc() -> None:
    """Make the collector rare, and leave to it only what is made from now on.

    A batch of a thousand keeps some ten thousand objects alive at once, and the default threshold of
    700 has the collector walk them again and again: a fifth of the daemon's CPU (measured).
    """
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 100)


def settle() -> None:
    """Collect now, and leave what is alive out of every later collection: call it when what lasts is
    made, at the start and after a reload.

    A watcher's two thousand hosts have a hundred thousand objects, and a collection that walks them
    holds the event loop up.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def let_go(error: BaseException) -> None:
    """Remove from an error that is kept all that it refers to beside its own text: tracebacks and causes.

    A traceback holds frames, and these hold their variables: the whole of an answer that was refused,
    say, for as long as its error is shown.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None


async def collect(*, young_s: float | None = None, full_s: float | None = None) -> None:
    """Collect by the clock, until cancelled.

    Args:
        young_s: between two collections of what was made since the last one, where a full one would hold
            up the event loop for too long; None for full ones only.
        full_s: between two full ones; None for `GC_EVERY_S`.
    """
    full_s = GC_EVERY_S if full_s is None else full_s
    step_s = full_s if young_s is None else young_s
    waited_s = 0.0
    while True:
        await anyio.sleep(step_s)
        waited_s += step_s
        if waited_s < full_s:
            gc.collect(YOUNG)
        else:
            gc.collect()
            waited_s = 0.0
