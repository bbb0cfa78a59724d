"""Runs commands whose stdout or stderr is in a bad state.

    python forked_commands.py FOLDER STREAM... < LINES

STREAM is `stdout=full`, `stdout=closed`, `stdout=gone`, or the same of stderr. Each line is a
command; it runs in a child of this process, so that the package is imported once. Prints a JSON
object a line: the command's words, its exit code, and what it wrote to the stream that was left alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

from provider_proxy.cli.main import main

NUMBERS = {"stdout": 1, "stderr": 2}


def spoil(number: int, state: str) -> None:
    """Make a descriptor what a careless caller leaves."""
    if state == "closed":
        os.close(number)
    elif state == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    else:
        read, write = os.pipe()
        os.dup2(write, number)
        os.close(read)


def run(words: list[str], states: dict[str, str]) -> tuple[int, str]:
    """Exit code and the text on the streams that are as they should be."""
    with tempfile.TemporaryFile() as text:
        child = os.fork()
        if child == 0:
            for number in NUMBERS.values():
                os.dup2(text.fileno(), number)
            for name, state in states.items():
                spoil(NUMBERS[name], state)
            sys.argv = ["provider-proxy", *words]
            for name, state in states.items():
                if state == "closed":  # what Python makes of it at its start
                    setattr(sys, name, None)
                    setattr(sys, f"__{name}__", None)
            main()
        _, status = os.waitpid(child, 0)
        text.seek(0)
        return os.waitstatus_to_exitcode(status), text.read().decode(errors="replace")


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    wanted = dict(word.split("=") for word in sys.argv[2:])
    for line in sys.stdin.read().splitlines():
        code, said = run(line.split(), wanted)
        sys.stdout.write(json.dumps({"words": line, "code": code, "said": said}) + "\n")
        sys.stdout.flush()
