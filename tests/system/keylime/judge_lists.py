"""Keylime's own judge of IMA lists, as a program: cases on stdin, verdicts on stdout, JSON both.

    .venv-keylime/bin/python judge_lists.py

A case is {"lines": […], "policy": {…}, "tolerant": bool}; its verdict {"lines": [bool, …]}: whether each
line is allowed, in order, one state over all of them as Keylime keeps it of an agent. `tolerant` is
Keylime as it is shipped (`ignore_tomtou_errors = False`).
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import sys
from typing import Any

logging.disable(logging.CRITICAL)

from keylime import config  # noqa: E402
from keylime.common import validators  # noqa: E402
from keylime.common.algorithms import Hash  # noqa: E402
from keylime.ima import ast, file_signatures, ima  # noqa: E402

_getboolean = config.getboolean
_tolerant = True


def getboolean(component: str, option: str, **more: Any) -> bool:
    """`ignore_tomtou_errors` as the case says: there are no configuration files."""
    if option == "ignore_tomtou_errors":
        return not _tolerant
    return bool(_getboolean(component, option, **more))


config.getboolean = getboolean


def judge(case: dict[str, Any]) -> dict[str, Any]:
    global _tolerant
    _tolerant = case["tolerant"]
    policy = copy.deepcopy(case["policy"])
    ima.validate_runtime_policy(policy)
    excludes, error = validators.valid_exclude_list(policy.get("excludes"))
    assert error is None, error
    keyrings = file_signatures.ImaKeyrings()
    keyrings.set_tenant_keyring(
        file_signatures.ImaKeyring.from_string(policy["verification-keys"] or "null")
    )
    # As `_process_measurement_list` puts them together.
    validator = ast.Validator(
        {
            ast.ImaSig: functools.partial(ima._validate_ima_sig, excludes, keyrings, policy),
            ast.ImaNg: functools.partial(ima._validate_ima_ng, excludes, policy),
            ast.Ima: functools.partial(ima._validate_ima_ng, excludes, policy),
            ast.ImaBuf: functools.partial(ima._validate_ima_buf, excludes, policy, keyrings, None),
        }
    )
    log_hash = Hash(policy["ima"]["log_hash_alg"])
    verdicts = []
    for line in case["lines"]:
        try:
            entry = ast.Entry(line, validator, ima_hash_alg=log_hash, pcr_hash_alg=Hash.SHA256)
            verdicts.append(not entry.invalid())
        except ast.ParserError:
            verdicts.append(False)
    return {"lines": verdicts}


if __name__ == "__main__":
    json.dump([judge(case) for case in json.load(sys.stdin)], sys.stdout)
