"""Checks the host under a VM before the VM gets its key, for Keylime's `ek_check_script`.

Keylime's tenant runs that script between the VM's own quote and the hand-over of V, with only environment
variables, none of which is trusted: the tenant's own file (`link_map`) says what the VM is, where it may
run and what to demand. If its hosts prove links, one of them must prove it, in a state that its policy
allows. If they do not, any of them may be under the VM, so all must be in such a state. It ends within
the file's limit, and refuses anything that is not proven by then.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass

import anyio
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from provider_proxy.common.backoff import backoff_s
from provider_proxy.errors import (
    EkNotLinkedError,
    ProviderProxyError,
    ReplyError,
    UsageError,
    VerificationError,
    VmNotRunningError,
)
from provider_proxy.evidence.logs.judge import LogJudge
from provider_proxy.evidence.model import HashAlg, VerifiedQuote
from provider_proxy.evidence.pem import one_part
from provider_proxy.evidence.policy import AllOf, Policy
from provider_proxy.evidence.tpm_keys import MAX_PUBLIC_BYTES
from provider_proxy.evidence.verify import Verifier
from provider_proxy.evidence.vtpm_link import VtpmLink, ek_digest, spki_digest
from provider_proxy.tenant.asking import attest_whole
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.hosts_file import AgentEntry, HostEntry, LinkMap
from provider_proxy.tenant.policies import JudgedLogs, PolicyFiles
from provider_proxy.trust.pins import PinnedHost, PinStore

log = logging.getLogger(__name__)

MAX_VARIABLE_CHARS = 16 * 1024  # an RSA-4096 key as a PEM has 800
FIRST_WAIT_S = 0.5  # before the second try; doubles, and a random part of up to half is taken off
LONGEST_WAIT_S = 8.0
NOT_THERE = 404
# Answers that another try may change; a busy daemon also sends 408 and 500 (`limits.busy_status`).
PASSING = (408, 429, 500, 502, 503, 504)
ANY_STATE_MASK = 0x1  # if no policy reads a PCR, a quote still needs one

OpenProxy = Callable[[HostEntry], AbstractAsyncContextManager[ProxyClient]]
PolicyOf = Callable[[HostEntry], Policy]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenHost:
    """A host in a state that its policy allows, signed for a nonce of this check."""

    host: HostEntry
    quote: VerifiedQuote


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodAgent:
    """An agent whose VM runs on a good host.

    Attributes:
        hosts: the one that the VM is linked to; without links, all that it may run on.
        link: the proven link; None where the hosts do not prove links.
    """

    entry: AgentEntry
    hosts: tuple[ProvenHost, ...]
    link: VtpmLink | None


def read_environment(variables: Mapping[str, str]) -> tuple[str, bytes]:
    """The agent's id, and the digest of its EK's SPKI, from the environment of `ek_check_script`.

    `EK_TPM` is what the registrar's credential activation was about. `EK`, the same key as a PEM, must
    agree with it. `EK_CERT`, `PROVKEYS` and `TPM_CERT_STORE` are not used: the link needs no certificate.

    Raises:
        UsageError: a variable is missing or too long: Keylime did not start this.
        EkNotLinkedError: the EK is not a key, or the two do not agree.
    """
    for name in ("AGENT_UUID", "EK_TPM"):
        if not variables.get(name):
            raise UsageError(
                f"{name} is not in the environment: run this as Keylime's ek_check_script, which sets it"
            )
    for name in ("AGENT_UUID", "EK_TPM", "EK"):
        if len(variables.get(name, "")) > MAX_VARIABLE_CHARS:
            raise UsageError(f"{name} is longer than {MAX_VARIABLE_CHARS} characters")
    try:
        public = base64.b64decode(variables["EK_TPM"].strip(), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise EkNotLinkedError("EK_TPM is not base64") from exc
    if len(public) > MAX_PUBLIC_BYTES:
        raise EkNotLinkedError("EK_TPM is too long")
    digest = ek_digest(public)
    if variables.get("EK"):
        _check_pem(variables["EK"], digest)
    return variables["AGENT_UUID"], digest


def _check_pem(pem: str, digest: bytes) -> None:
    try:
        key = load_pem_public_key(one_part(pem.encode("utf-8", "surrogateescape")))
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise EkNotLinkedError("EK is not a public key in PEM") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise EkNotLinkedError("EK is neither an RSA nor an EC key")
    if spki_digest(key) != digest:
        raise EkNotLinkedError("EK and EK_TPM are not the same key")


async def check_agent(
    known: LinkMap, agent_id: str, ek: bytes, *, policy_of: PolicyOf, open_proxy: OpenProxy
) -> GoodAgent:
    """Ask the proxies of all hosts that an agent's VM may run on, at once; returns only if they are good.

    Args:
        agent_id: untrusted; the file decides.
        ek: SHA-256 of the SPKI of the EK that the tenant's registrar activated.
        policy_of: the policy for a host's state.

    Raises:
        VerificationError: refused; of several refusals that of the first host in the file.
        VmNotRunningError: no host has claims about the VM.
        ReplyError: a host that is needed gave no answer within the limit.
        UsageError, HostError: pin, policy or a TLS file of a host is missing.
    """
    entry = known.agent(agent_id)
    link = None
    if entry.is_linked:
        link = VtpmLink(vm=entry.vm, ek=ek, least=entry.least, issuer=entry.ek_issuer)
    async with AsyncExitStack() as stack:
        pins, files = PinStore(known.pins), PolicyFiles()
        hosts = [
            _Host(
                entry=host,
                pinned=pins.load(host.pinned),
                policy=policy_of(host),
                logs=files.logs(host.logs, HashAlg.SHA256),
                proxy=await stack.enter_async_context(open_proxy(host)),
            )
            for host in entry.hosts
        ]
        with anyio.move_on_after(known.limit_s) as scope:
            async with anyio.create_task_group() as tasks:
                for host in hosts:
                    tasks.start_soon(host.judge, link, scope.cancel)
    proven = tuple(
        ProvenHost(host=host.entry, quote=host.quote) for host in hosts if host.quote is not None
    )
    if link is not None and proven:
        return GoodAgent(entry=entry, hosts=proven[:1], link=link)
    if link is None and len(proven) == len(hosts):
        return GoodAgent(entry=entry, hosts=proven, link=None)
    raise _verdict(hosts, link, known.limit_s)


class _Host:
    """One host's part of a check. Ends with a quote, or with its last error."""

    def __init__(
        self,
        *,
        entry: HostEntry,
        pinned: PinnedHost,
        policy: Policy,
        logs: JudgedLogs,
        proxy: ProxyClient,
    ) -> None:
        self.entry = entry
        self.quote: VerifiedQuote | None = None
        self.error: ProviderProxyError | None = None
        self._pinned = pinned
        self._policy = policy
        self._logs = logs
        self._proxy = proxy

    async def judge(self, link: VtpmLink | None, settle: Callable[[], None]) -> None:
        """Ask until an answer is final; call `settle` once no other host can change the verdict."""
        for tries in itertools.count(1):
            try:
                self.quote = await self._ask(link)
            except ReplyError as exc:
                self._failed(exc)
                if exc.status is not None and exc.status not in PASSING:
                    break
                least_s = backoff_s(tries, first_s=FIRST_WAIT_S, longest_s=LONGEST_WAIT_S)
                await anyio.sleep(max(exc.retry_after_s or 0.0, least_s))
            except ProviderProxyError as exc:
                self._failed(exc)
                break
            else:
                break
        is_good = self.quote is not None
        if is_good == (
            link is not None
        ):  # with links one proof is enough; without, one refusal decides
            settle()

    def _failed(self, error: ProviderProxyError) -> None:
        if str(error) != str(self.error):  # one line for each cause, not for each try
            is_refusal = isinstance(error, VerificationError)
            what = f"refused: {type(error).__name__}: " if is_refusal else ""
            log.warning("%s: %s%s", self.entry.name, what, error)
        self.error = error

    async def _ask(self, link: VtpmLink | None) -> VerifiedQuote:
        policies = (self._policy,) if link is None else (self._policy, link)
        needed = self._policy.needed_mask | self._logs.policy.needed_mask
        attested = await attest_whole(
            self._proxy,
            Verifier(AllOf(policies)),
            self._pinned.host,
            self._pinned,
            LogJudge(self._logs.policy, HashAlg.SHA256, lines=self._logs.lines),
            mask=needed or ANY_STATE_MASK,
            vm=None if link is None else link.vm,
            now=time.monotonic,
        )
        return attested.quote


def _verdict(hosts: Sequence[_Host], link: VtpmLink | None, limit_s: float) -> ProviderProxyError:
    """Why it is not good: a refusal before a missing answer, in the file's order."""
    errors = [host.error for host in hosts]
    for error in errors:
        if isinstance(error, VerificationError):
            return error
    for error in errors:
        if error is not None and not isinstance(error, ReplyError):
            return error
    silent = [h for h in hosts if h.quote is None and not (link and _is_not_there(h.error))]
    if link is None or silent:
        names = ", ".join(host.entry.name for host in silent)
        return ReplyError(
            f"{names}: no proof within {limit_s:g} s: {silent[0].error or 'no answer'}"
        )
    names = ", ".join(host.entry.name for host in hosts)
    return VmNotRunningError(f"no host has claims about the VM {link.vm}; asked: {names}")


def _is_not_there(error: ProviderProxyError | None) -> bool:
    return isinstance(error, ReplyError) and error.status == NOT_THERE
