"""How fast IMA lines are judged, compared with Keylime's own code in its own interpreter, alternately."""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.bench.ima_lists import List, make_list, runtime_policy
from provider_proxy.errors import HostError
from provider_proxy.evidence.logs.ima import ImaReplay, Outcome
from provider_proxy.evidence.logs.ima_judge import LineJudge
from provider_proxy.evidence.logs.runtime_policy_file import parse_runtime_policy
from provider_proxy.evidence.model import HashAlg

LINES = 20_000
SIGNED_LINES = 2_000
TURNS = 7
KEYLIME_PYTHON = Path(".venv-keylime/bin/python")  # `make keylime`

# `gpg` is a module that Keylime imports and does not need for this.
_KEYLIME = """
import json, logging, sys, time, types
sys.modules["gpg"] = types.ModuleType("gpg")
logging.disable(logging.CRITICAL)
from keylime.common.algorithms import Hash
from keylime.ima import ima
from keylime.ima.file_signatures import ImaKeyring, ImaKeyrings
cases = []
for policy_file, list_file, value in json.loads(sys.stdin.readline()):
    policy = json.load(open(policy_file))
    keyrings = ImaKeyrings()
    keyrings.set_tenant_keyring(ImaKeyring.from_string(policy["verification-keys"] or "null"))
    cases.append((policy, open(list_file).read().split("\\n"), value, keyrings))
print("ready", flush=True)
for number in sys.stdin:
    policy, lines, value, keyrings = cases[int(number)]
    begin = time.perf_counter()
    _, failure = ima.process_measurement_list(
        None, lines, policy, pcrval=value, ima_keyrings=keyrings, hash_alg=Hash.SHA256)
    took = time.perf_counter() - begin
    print("failed" if failure else took, flush=True)
"""


def measure(say: Callable[[str], None]) -> dict[str, object]:
    """Lines a second and their ratios; those against Keylime are None where it is not installed."""
    say("judging: making lists")
    key = rsa.generate_private_key(65537, 2048)
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    keys = json.dumps({"keyids": [], "pubkeys": [base64.b64encode(spki).decode()]})
    plain, signed = make_list(LINES), make_list(SIGNED_LINES, key=key)
    policies = (
        runtime_policy(plain.digests),
        runtime_policy({"boot_aggregate": signed.digests["boot_aggregate"]}, keys),
    )
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as directory:
        return _turns(Path(directory), (plain, signed), policies, say)


def _turns(
    directory: Path,
    lists: tuple[List, List],
    policies: tuple[bytes, bytes],
    say: Callable[[str], None],
) -> dict[str, object]:
    read = [parse_runtime_policy(policy) for policy in policies]
    times: dict[str, list[float]] = {}

    def note(name: str, count: int, took_s: float) -> None:
        times.setdefault(name, []).append(count / took_s)

    with _keylime(directory, lists, policies) as ask:
        for turn in range(TURNS):
            say(f"judging: round {turn + 1} of {TURNS}")
            plain, signed = lists
            judge = LineJudge(HashAlg.SHA256, read[0])
            note("unseen", LINES, _replay(plain, judge))
            note("seen", LINES, _replay(plain, judge))
            fresh = LineJudge(HashAlg.SHA256, read[1])
            note("signed_unseen", SIGNED_LINES, _replay(signed, fresh))
            note("signed_seen", SIGNED_LINES, _replay(signed, fresh))
            if ask is not None:
                note("keylime", LINES, ask(0))
                note("keylime_signed", SIGNED_LINES, ask(1))
    return _figures(times)


def _figures(times: dict[str, list[float]]) -> dict[str, object]:
    rates = {name: statistics.median(values) for name, values in times.items()}
    figures: dict[str, object] = {f"judge_{name}_per_s": round(v) for name, v in rates.items()}
    for name, values in times.items():
        figures[f"judge_{name}_spread"] = round((max(values) - min(values)) / rates[name], 2)

    def ratio(over: str, under: str) -> float | None:
        """The median of each round's own ratio: a shared machine is slow now and then."""
        if under not in times:
            return None
        pairs = zip(times[over], times[under], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 2)

    return figures | {
        "judge_ratio_vs_keylime": ratio("unseen", "keylime"),
        "judge_seen_ratio": ratio("seen", "unseen"),
        "judge_seen_ratio_vs_keylime": ratio("seen", "keylime"),
        "judge_signed_ratio_vs_keylime": ratio("signed_unseen", "keylime_signed"),
        "judge_signed_seen_ratio": ratio("signed_seen", "signed_unseen"),
    }


def _replay(made: List, judge: LineJudge) -> float:
    """Another host's list, whole; how long it took, in seconds."""
    text, replay = made.text(), ImaReplay(judge)
    begin = time.perf_counter()
    for _ in replay.offer(text, 0, made.value):
        pass
    took = time.perf_counter() - begin
    if replay.outcome is not Outcome.MATCHED:
        raise HostError("the list that was made does not lead to its own PCR 10")
    return took


@contextmanager
def _keylime(
    directory: Path, lists: tuple[List, List], policies: tuple[bytes, bytes]
) -> Iterator[Callable[[int], float] | None]:
    """Asks Keylime's judge for a list's time; None where Keylime is not there."""
    if not KEYLIME_PYTHON.exists():
        yield None
        return
    cases = []
    for number, (made, policy) in enumerate(zip(lists, policies, strict=True)):
        policy_file, list_file = directory / f"{number}.json", directory / f"{number}.list"
        policy_file.write_bytes(policy)
        list_file.write_text(made.text())
        cases.append((str(policy_file), str(list_file), made.value.hex()))
    process = subprocess.Popen(
        [KEYLIME_PYTHON, "-c", _KEYLIME],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PATH": os.environ.get("PATH", "")},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(number: int) -> float:
        stdin.write(f"{number}\n")
        stdin.flush()
        answer = stdout.readline().strip()
        try:
            return float(answer)
        except ValueError:
            raise HostError(f"Keylime's judge: {answer or 'no answer'}") from None

    try:
        stdin.write(json.dumps(cases) + "\n")
        stdin.flush()
        if stdout.readline() != "ready\n":
            raise HostError(f"{KEYLIME_PYTHON} cannot import Keylime")
        yield ask
    finally:
        stdin.close()
        process.wait()
        stdout.close()
