"""In the guest: makes the IMA list long, and measures how the kernel gives it to a reader. Prints JSON.

The kernel walks its list from the head for each read(), and at most formats a page of it; a reader that
opens the file again and seeks has all before that formatted once more.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

LIST = "/sys/kernel/security/integrity/ima/ascii_runtime_measurements"
LINES, NEW = 4000, 100
PAGE, LARGE = 4096, 1024 * 1024
MANY = Path("/root/many")


def measure(first: int, count: int) -> None:
    """Have that many files measured: root reads them."""
    for number in range(first, first + count):
        path = MANY / str(number)
        path.write_text(str(number))
        path.read_bytes()


def read_on(fd: int, asked: int) -> dict[str, float]:
    """Read to the end."""
    begin, total, reads, largest, lines = time.monotonic(), 0, 0, 0, 0
    while data := os.read(fd, asked):
        total += len(data)
        reads += 1
        largest = max(largest, len(data))
        lines += data.count(b"\n")
    seconds = time.monotonic() - begin
    return {"bytes": total, "reads": reads, "largest": largest, "lines": lines, "s": seconds}


def main() -> None:
    """Measure."""
    MANY.mkdir()
    measure(0, LINES)
    whole = {}
    for asked in (PAGE, LARGE):
        fd = os.open(LIST, os.O_RDONLY)
        whole[asked] = read_on(fd, asked)
        if asked != LARGE:
            os.close(fd)
    at = int(whole[LARGE]["bytes"])
    measure(LINES, NEW)
    kept = read_on(fd, LARGE)
    fresh = os.open(LIST, os.O_RDONLY)
    again = read_on(fresh, LARGE)
    sought = os.open(LIST, os.O_RDONLY)
    begin = time.monotonic()
    os.lseek(sought, at, os.SEEK_SET)
    read_on(sought, LARGE)
    found = {
        "kernel": os.uname().release,
        "lines": again["lines"],
        "bytes": again["bytes"],
        "whole": whole,
        "new": NEW,
        "kept_lines": kept["lines"],
        "kept_s": kept["s"],
        "again_s": again["s"],
        "seek_s": time.monotonic() - begin,
    }
    print(json.dumps(found))


main()
