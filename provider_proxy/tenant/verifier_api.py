"""The tenant's own Keylime verifier over HTTPS: its versions, and calls of its API.

The caller's `httpx.AsyncClient` has the CA and, where a call needs one, the client certificate. Answers
come from the tenant's own verifier, and are bounded all the same. docs/keylime-releases.md says which
release supports what.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import httpx

from provider_proxy.common.http import IDENTITY, no_answer, read_body
from provider_proxy.errors import EvidenceFormatError, NotSupportedError, ReplyError, UsageError
from provider_proxy.evidence.strict_json import parse_json_object, parse_own_json
from provider_proxy.tenant.replies import status_text

Version = tuple[int, int]

NEWEST: Version = (2, 6)  # 3.0 answers 500 to questions about evidence (7.14.3)
FIRST_WITH_EVIDENCE: Version = (2, 5)  # Keylime 7.14.0
FIRST_WITH_AGENTS: Version = (2, 1)
VERSION_RE = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})", re.ASCII)
RELEASES = {
    (2, 6): "7.14.3",
    (2, 5): "7.14.0 to 7.14.2",
    (2, 4): "7.13",
    (2, 3): "7.12",
    (2, 1): "7.0",
}
MAX_SMALL_BYTES = 1024 * 1024
MAX_POLICY_BYTES = 256 * 1024 * 1024
PUSH_STATUS = 410  # the answer of a verifier in push mode to /version


def release_of(version: Version) -> str:
    """Which Keylime has an API version, for people."""
    if version < (2, 3):
        return "Keylime before 7.12"
    return "Keylime " + RELEASES.get(version, "after 7.14.3")


class VerifierApi:
    """One verifier.

    Args:
        http: the caller's client; the caller closes it.
        base_url: "https://verifier:8881".
    """

    def __init__(self, http: httpx.AsyncClient, base_url: str) -> None:
        self._http = http
        self._base_url = base_url.rstrip("/")

    async def negotiate(self, least: Version, what: str) -> str:
        """The newest API version that both sides support.

        Args:
            least: the first that has the request.
            what: the request, for the message.

        Raises:
            NotSupportedError: the verifier is too old.
            ReplyError: no answer, or not a verifier's answer.
        """
        status, body = await self.call("GET", "/version", limit=MAX_SMALL_BYTES)
        if status == PUSH_STATUS:
            raise NotSupportedError(
                f"your verifier runs in push mode, which does not support {what}; set mode = pull there"
            )
        if status != 200:
            raise ReplyError(
                f"the verifier answered {status} when asked for its versions", status=status
            )
        versions = _versions(body)
        good = [version for version in versions if least <= version <= NEWEST]
        if not good:
            newest = max(versions)
            raise NotSupportedError(
                f"your verifier is {release_of(newest)} (API {newest[0]}.{newest[1]}), which does "
                f"not support {what}; Keylime {RELEASES[least].partition(' ')[0]} or later is needed"
            )
        return "{}.{}".format(*max(good))

    async def call(
        self, method: str, path: str, body: bytes | None = None, *, limit: int
    ) -> tuple[int, bytes]:
        """One exchange: status and body, for any status.

        Raises:
            ReplyError: no complete answer within `limit` bytes.
        """
        headers = IDENTITY if not body else IDENTITY | {"Content-Type": "application/json"}
        with no_answer("the verifier"):
            async with self._http.stream(
                method, self._base_url + path, content=body, headers=headers
            ) as response:
                received = await read_body(response, limit, "the verifier")
        return response.status_code, received

    async def runtime_policy(self, agent_id: str) -> Mapping[str, object] | None:
        """The runtime policy that was added together with an agent; None without one.

        Does not see a policy that was stored under its own name.

        Raises:
            ReplyError: no answer, or no access.
        """
        status, body = await self.call(
            "GET", f"/v2.6/allowlists/{agent_id}", limit=MAX_POLICY_BYTES
        )
        if status == 404:
            return None
        if status != 200:
            raise ReplyError(f"the verifier answered {status}: {status_text(body)}", status=status)
        try:
            results = parse_json_object(body, "the verifier's policy").get("results")
            text = results.get("runtime_policy") if isinstance(results, dict) else None
            return parse_own_json(text, "the verifier's policy") if isinstance(text, str) else None
        except (EvidenceFormatError, UsageError) as exc:
            raise ReplyError(str(exc)) from exc

    async def reactivate(self, agent_id: str) -> None:
        """Make the verifier poll an agent again that it has stopped polling.

        Raises:
            ReplyError: it does not, or gave no answer.
            NotSupportedError: it is too old.
        """
        version = await self.negotiate(FIRST_WITH_AGENTS, "agents")
        status, body = await self.call(
            "PUT", f"/v{version}/agents/{agent_id}/reactivate", b"", limit=MAX_SMALL_BYTES
        )
        if status != 200:
            raise ReplyError(f"the verifier answered {status}: {status_text(body)}", status=status)


def _versions(body: bytes) -> list[Version]:
    try:
        results = parse_json_object(body, "the verifier's versions").get("results")
    except EvidenceFormatError as exc:
        raise ReplyError(str(exc)) from exc
    listed = results.get("supported_versions") if isinstance(results, dict) else None
    found = [VERSION_RE.fullmatch(v) for v in listed or () if isinstance(v, str)]
    versions = [(int(match[1]), int(match[2])) for match in found if match is not None]
    if not versions:
        raise ReplyError("the verifier does not say which API versions it supports")
    return versions
