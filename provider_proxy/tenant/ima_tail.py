"""The part of a host's IMA list that another verifier wants, put together from answers.

This program's replay and the other verifier may have reached different entries. A list is asked for from
the smaller number: the replay gets what it has not seen, and the other verifier gets all lines from its
own entry up to the last one that the signed PCR 10 proves. A list that begins again at 0 begins again
here, too. Pure.
"""

from __future__ import annotations

import dataclasses

from provider_proxy.evidence.model import HostLogs


class ImaTail:
    """Collects lines.

    Args:
        entry: the first one that is wanted.

    Attributes:
        next_entry: the first one that is still missing.
    """

    def __init__(self, entry: int) -> None:
        self._entry = entry
        self._lines: list[str] = []

    @property
    def next_entry(self) -> int:
        return self._entry + len(self._lines)

    def add(self, logs: HostLogs, *, asked: int, replayed: int) -> HostLogs:
        """Take an answer's part of the list.

        Args:
            logs: with an IMA list; untrusted.
            asked: the entry that was asked for.
            replayed: how many entries the replay has seen.

        Returns:
            What the replay has not seen yet. A part that begins at another entry than was asked
            for is returned unchanged: the replay refuses it.
        """
        assert logs.ima is not None
        begin = logs.ima_entry
        lines = logs.ima.split("\n")
        rest = lines.pop()  # after the last line feed; not empty where the list is cut
        if begin == 0:
            self._entry, self._lines = 0, lines
        elif begin == asked:
            self._lines += lines[max(0, self.next_entry - begin) :]
        if not 0 < begin < replayed or begin != asked:
            return logs
        unseen = lines[replayed - begin :]
        text = "".join(line + "\n" for line in unseen) + rest
        return dataclasses.replace(logs, ima=text, ima_entry=replayed)

    def whole(self, logs: HostLogs, proven: int) -> tuple[HostLogs, bool]:
        """What was collected, cut after the last entry that is proven.

        Args:
            logs: of the last answer.
            proven: entries of the list that lead to the signed PCR 10.

        Returns:
            The logs with the wanted part, and whether that is complete; if not, ask for more.
        """
        wanted = self._lines[: max(0, proven - self._entry)]
        text = "".join(line + "\n" for line in wanted)
        done = self.next_entry >= proven
        return dataclasses.replace(logs, ima=text, ima_entry=self._entry), done
