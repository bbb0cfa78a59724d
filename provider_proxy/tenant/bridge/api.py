"""Keylime's agent API, for one host: what Keylime's verifier and tenant tool ask an agent.

    GET  /version                              the API versions
    GET  /v2.x/quotes/identity, integrity      one fresh question to the host
    GET  /v2.x/keys/pubkey, /v2.x/agent/info   what an agent says of itself
    POST /v2.x/notifications/revocation        logged
    /v2.x/keys/ukey, vkey, verify              refused: a host takes no payload

A refusal is 200 with the name of a hash that Keylime does not accept: Keylime takes no other status for a
verdict, and this is the only text of an answer that it logs and sends with its revocation. A missing
answer is 408, and Keylime asks again. Source: Keylime 7.12 to 7.14, `cloud_verifier_tornado.py`;
docs/bridge.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl

from provider_proxy.errors import (
    ParameterError,
    ProviderProxyError,
    ReplyError,
    VerificationError,
)
from provider_proxy.evidence.model import PCR_COUNT
from provider_proxy.evidence.wire import encode_envelope
from provider_proxy.tenant.bridge.agent import Agent, Poll
from provider_proxy.tenant.bridge.quoting import DATA_PCR
from provider_proxy.tenant.watch.http_server import Answer, Asked

log = logging.getLogger(__name__)

VERSIONS = ("2.1", "2.2", "2.3", "2.4", "2.5", "2.6")
NONCE_RE = re.compile(r"[A-Za-z0-9]{1,64}", re.ASCII)  # as Keylime's agents
MASK_RE = re.compile(r"(?:0x)?([0-9A-Fa-f]{1,8})", re.ASCII)
ENTRY_RE = re.compile(r"[0-9]{1,9}", re.ASCII)
MAX_REASON_CHARS = 400
REFUSED = "refused: "
NO_PAYLOAD = (
    "this agent stands for a host behind provider-proxy and accepts no payload: leave out -f, --cert and "
    "--verify"
)


async def answer(agent: Agent, asked: Asked) -> Answer:
    """An agent's answer. Raises nothing but cancellation."""
    try:
        return await _route(agent, asked)
    except ParameterError as exc:
        return _plain(400, str(exc))
    except VerificationError as exc:
        return _answer(200, "Success", refusal(agent, exc))
    except ReplyError as exc:
        return _plain(408, f"the host gave no answer: {printable(str(exc))}")
    except ProviderProxyError as exc:
        return _plain(500, f"the bridge cannot judge the host: {printable(str(exc))}")


async def _route(agent: Agent, asked: Asked) -> Answer:
    path, _, query = asked.target.partition("?")
    if path == "/version":
        supported = {"supported_version": VERSIONS[-1], "supported_versions": list(VERSIONS)}
        return _only("GET", asked, supported)
    version, _, rest = path.removeprefix("/v").partition("/")
    if not path.startswith("/v") or version not in VERSIONS:
        # Keylime looks for these words, and asks /version again.
        return _plain(400, f"API version not supported: v{printable(version)[:16]}")
    match rest.rstrip("/"):
        case "quotes/identity" | "quotes/integrity" as what:
            if asked.method != "GET":
                return _plain(405, "only GET is allowed here")
            values = await _quote(agent, what == "quotes/identity", _parameters(query))
            return _answer(200, "Success", values)
        case "agent/info":
            labels = {f"tpm_{name}": value for name, value in _LABELS.items()}
            info = {"agent_uuid": agent.agent_id, **labels, "ak_handle": 0}
            return _only("GET", asked, info)
        case "keys/pubkey":
            return _only("GET", asked, {"pubkey": agent.pubkey})
        case "keys/ukey" | "keys/vkey" | "keys/verify":
            log.warning("%s: a payload was refused (%s)", agent.name, rest)
            return _plain(400, NO_PAYLOAD)
        case "notifications/revocation":
            log.warning("%s: Keylime reports a revocation", agent.name)
            return _only("POST", asked, {})
    return _plain(404, "no such path")


_LABELS = {"hash_alg": "sha256", "enc_alg": "rsa", "sign_alg": "rsassa"}
"""As 7.12 to 7.14 all accept them; API 2.5 would say rsa2048, which 7.13 does not know."""


async def _quote(agent: Agent, is_identity: bool, given: Mapping[str, str]) -> dict[str, object]:
    nonce = given.get("nonce", "")
    if not NONCE_RE.fullmatch(nonce):
        raise ParameterError("nonce", "must be 1 to 64 letters and digits")
    mask, entry, with_key = 0, 0, True
    if not is_identity:
        mask = _mask(given.get("mask", ""))
        if given.get("partial") not in ("0", "1"):
            raise ParameterError("partial", "must be 0 or 1")
        with_key = given["partial"] == "0"
        if not ENTRY_RE.fullmatch(text := given.get("ima_ml_entry", "0")):
            raise ParameterError("ima_ml_entry", "must be a number")
        entry = int(text)
    shown = await agent.attest(Poll(nonce=nonce.encode("ascii"), mask=mask, ima_ml_entry=entry))
    return {
        **_LABELS,
        **shown.values(),
        **({"pubkey": agent.pubkey} if with_key else {}),
    }


def _mask(text: str) -> int:
    """Hex, with or without 0x, as Keylime's agents read it."""
    found = MASK_RE.fullmatch(text)
    mask = int(found[1], 16) if found is not None else 1 << PCR_COUNT
    if mask >> PCR_COUNT:
        raise ParameterError("mask", "must be hex digits, of PCRs 0 to 23")
    return mask & ~(1 << DATA_PCR)


def _parameters(query: str) -> Mapping[str, str]:
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=16)
    except ValueError:
        raise ParameterError("query", "cannot be read") from None
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ParameterError("query", "has a parameter twice")
    return values


def refusal(agent: Agent, error: VerificationError) -> dict[str, object]:
    """The results of a refusal: its reason, and nothing signed."""
    return {**_LABELS, "hash_alg": refused_because(error), "quote": "r", "pubkey": agent.pubkey}


def refused_because(error: VerificationError) -> str:
    """The reason for a refusal, as Keylime gets it."""
    return f"{REFUSED}{type(error).__name__}: {printable(str(error))}"


def printable(text: str) -> str:
    """Text that may come from a host, as one short line of ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:MAX_REASON_CHARS])


def _only(method: str, asked: Asked, results: Mapping[str, object]) -> Answer:
    if asked.method != method:
        return _plain(405, f"only {method} is allowed here")
    return _answer(200, "Success", results)


def _plain(status: int, text: str) -> Answer:
    return _answer(status, text, {})


def _answer(status: int, text: str, results: Mapping[str, object]) -> Answer:
    return Answer(status=status, body=encode_envelope(status, text, results))
