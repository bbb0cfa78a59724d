"""`provider-proxy verify-link`: does this VM, with this EK, run on that host now?

`files` judges saved evidence, with `--vtpm-quote` both quotes of a deep one. `agent` is for Keylime: its
`ek_check_script` gives it environment variables alone, all of them hostile; what the VM is, where it may
run and what to demand stands in the tenant's own file (`link_map`). It asks the proxy itself.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from provider_proxy.attestation_key import MAX_PUBLIC_BYTES, parse_ak
from provider_proxy.cli import files, http
from provider_proxy.cli.verify import (
    add_judging_arguments,
    add_link_arguments,
    link_line,
    link_of,
    link_values,
    load_judging,
    load_policy,
)
from provider_proxy.client import ProxyClient
from provider_proxy.deep import deep_verify
from provider_proxy.errors import (
    ClaimsNeverError,
    EkNotLinkedError,
    ReplyError,
    UsageError,
    VerificationError,
    VmNotRunningError,
)
from provider_proxy.link import VtpmLink, ek_digest, spki_digest
from provider_proxy.link_map import AgentEntry, HostEntry, LinkMap, load_link_map
from provider_proxy.model import HashAlg, VerifiedQuote
from provider_proxy.pins import PinStore
from provider_proxy.policy import AllOf
from provider_proxy.verify import Verifier

log = logging.getLogger(__name__)

MAX_VARIABLE_CHARS = 16 * 1024  # an RSA-4096 key as a PEM has 800
TRIES = 4  # a chip that is busy says so with 503
LONGEST_WAIT_S = 10.0  # between two tries: whoever adds an agent waits for us
NOT_THERE = 404
BUSY = (503, 504)
ANY_STATE_MASK = 0x1  # where no policy reads a PCR, a quote needs one all the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    saved = actions.add_parser("files", help="judge saved evidence, offline")
    add_judging_arguments(saved)
    add_link_arguments(saved, required=True)
    saved.add_argument(
        "--vtpm-quote",
        type=Path,
        metavar="FILE",
        help="deep quote: the vTPM's own quote, which the host's must come after",
    )
    saved.add_argument("--vtpm-nonce", metavar="TEXT", help="the nonce that the vTPM quoted over")
    saved.add_argument(
        "--vak", type=Path, metavar="FILE", help="the vTPM's AK: TPM2B_PUBLIC, raw or base64"
    )
    state = saved.add_mutually_exclusive_group()
    state.add_argument(
        "--vtpm-policy", type=Path, metavar="FILE", help="allowed PCR values of the vTPM"
    )
    state.add_argument(
        "--insecure-any-vtpm-state", action="store_true", help="accept whatever they hold"
    )
    saved.set_defaults(act=_files)
    agent = actions.add_parser("agent", help="as Keylime's ek_check_script: ask the proxy")
    agent.add_argument(
        "--map",
        type=Path,
        required=True,
        metavar="FILE",
        help="your own file of agents, VMs and hosts, TOML",
    )
    agent.set_defaults(act=_agent)
    for action in (saved, agent):
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Judge.

    Raises:
        VerificationError: refused; the class says why.
        UsageError, HostError: a file or an option is wrong or missing.
        ReplyError: no proxy gave an answer.
    """
    code: int = args.act(args)
    return code


# --- saved evidence ---------------------------------------------------------------------------------


def _files(args: argparse.Namespace) -> int:
    judging = load_judging(args)
    link = link_of(args)
    assert link is not None  # both options are required
    deep = (args.vtpm_quote, args.vtpm_nonce, args.vak)
    if all(part is None for part in deep):
        if args.vtpm_policy is not None or args.insecure_any_vtpm_state:
            raise UsageError("--vtpm-quote is missing")
        quote = Verifier(AllOf((judging.policy, link)), max_age_s=args.max_age).verify(
            judging.body, judging.challenge, judging.host, judging.history, now_s=judging.age_s
        )
        return _show(link_values(link, quote), as_json=args.json)
    if any(part is None for part in deep):
        raise UsageError("--vtpm-quote, --vtpm-nonce and --vak belong together")
    if args.vtpm_policy is None and not args.insecure_any_vtpm_state:
        raise UsageError("--vtpm-quote needs --vtpm-policy (or --insecure-any-vtpm-state)")
    verified = deep_verify(
        judging.body,
        judging.challenge,
        judging.host,
        judging.history,
        nonce=args.vtpm_nonce.encode("utf-8"),
        vtpm_quote=files.read_quote(args.vtpm_quote),
        vak=parse_ak(files.read_public(args.vak)),
        vtpm_policy=load_policy(
            args.vtpm_policy,
            any_state=args.insecure_any_vtpm_state,
            bank=HashAlg.SHA256,
            of="vTPM",
        ),
        host_policy=judging.policy,
        link=link,
        now_s=judging.age_s,
        max_age_s=args.max_age,
    )
    values = link_values(link, verified.host)
    values["vtpm_pcrs"] = {str(pcr): value.hex() for pcr, value in verified.vtpm.pcrs.items()}
    return _show(values, as_json=args.json)


def _show(values: Mapping[str, object], host: str = "the host", *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"linked": True, **values}))
        return 0
    print(link_line(values, host))
    if "vtpm_pcrs" in values:
        print("  deep: the host's quote came after the vTPM's")
    return 0


# --- Keylime's ek_check_script ----------------------------------------------------------------------


def _agent(args: argparse.Namespace) -> int:
    agent_id, ek = read_environment(os.environ)
    known = load_link_map(args.map)
    entry = known.agent(agent_id)
    link = VtpmLink(vm=entry.vm, ek=ek, confirmed=entry.confirmed, issuer=entry.ek_issuer)
    host, quote = asyncio.run(_ask(known, entry, link))
    values = {"agent": entry.agent, "host": host.name, **link_values(link, quote)}
    return _show(values, host.name, as_json=args.json)


def read_environment(variables: Mapping[str, str]) -> tuple[str, bytes]:
    """The agent's id, and the digest of its EK's SPKI, from what `ek_check_script` is given.

    `EK_TPM` is what the registrar's credential activation was about. `EK`, the same key as a PEM, must
    agree with it. `EK_CERT`, `PROVKEYS` and `TPM_CERT_STORE` are not used: the link needs no certificate.

    Raises:
        UsageError: a variable is missing or too long: this is not Keylime.
        EkNotLinkedError: the EK is no key, or the two do not agree.
    """
    for name in ("AGENT_UUID", "EK_TPM"):
        if not variables.get(name):
            raise UsageError(f"{name} is not in the environment: Keylime's ek_check_script has it")
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
        key = load_pem_public_key(pem.encode("utf-8", "surrogateescape"))
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise EkNotLinkedError("EK is no PEM of a public key") from exc
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise EkNotLinkedError("EK is neither an RSA nor an EC key")
    if spki_digest(key) != digest:
        raise EkNotLinkedError("EK and EK_TPM are not the same key")


async def _ask(
    known: LinkMap, entry: AgentEntry, link: VtpmLink
) -> tuple[HostEntry, VerifiedQuote]:
    """Ask the hosts in turn until one proves the link; another's refusal cannot take that away.

    Raises:
        VerificationError: none does, and this is the first refusal.
        ClaimsNeverError: none does, and one was not asked.
        ReplyError: none does, and one gave no answer.
        VmNotRunningError: none of them has claims about the VM.
    """
    refused: VerificationError | None = None
    silent: ReplyError | None = None
    for host in entry.hosts:
        if host.claims == "never":
            log.warning('%s is marked claims = "never" and was not asked', host.name)
            continue
        try:
            return host, await _ask_one(known, host, link)
        except VerificationError as exc:
            log.warning("%s: refused: %s: %s", host.name, type(exc).__name__, exc)
            refused = refused or exc
        except ReplyError as exc:
            log.warning("%s: %s", host.name, exc)
            if exc.status != NOT_THERE:
                silent = silent or exc
    if refused is not None:
        raise refused
    if any(host.claims == "never" for host in entry.hosts):
        raise ClaimsNeverError("no host proves the link, and claims of one prove nothing")
    if silent is not None:
        raise silent
    names = ", ".join(host.name for host in entry.hosts)
    raise VmNotRunningError(f"no host has claims about the VM {link.vm}; asked: {names}")


async def _ask_one(known: LinkMap, host: HostEntry, link: VtpmLink) -> VerifiedQuote:
    pinned = PinStore(known.pins).load(host.pinned)
    policy = load_policy(host.tpm_policy, any_state=host.insecure_any_state, bank=HashAlg.SHA256)
    reach = argparse.Namespace(url=host.url, ca=host.ca, cert=host.cert, key=host.key)
    verifier = Verifier(AllOf((policy, link)))
    async with http.make_client(reach) as client:
        proxy = ProxyClient(client, host.url)
        for left in reversed(range(TRIES)):
            try:
                return await proxy.attest(
                    verifier,
                    pinned.host,
                    pinned,
                    mask=policy.needed_mask or ANY_STATE_MASK,
                    vm=link.vm,
                    now=time.monotonic,
                )
            except ReplyError as exc:
                if not left or exc.status not in BUSY:
                    raise
                await asyncio.sleep(min(exc.retry_after_s or 1.0, LONGEST_WAIT_S))
    raise AssertionError("the last try returns or raises")
