"""`provider-proxy keylime-check`: our checks, then your Keylime verifier.

The registrar says which AK is the host's, and `bindings` checks what that is worth. Our checks find the
nonce in the quote, and the selection in what was signed. Only then is the tenant's own, unmodified
verifier asked, with the tenant's policies. The verdict is good if both accept; without an answer from
both there is no verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.cli import arguments, http, options_file
from provider_proxy.cli.registrar import open_bindings, own_copy, vouched_by_hand
from provider_proxy.common.files import read_file
from provider_proxy.errors import (
    KeylimeRefusedError,
    ProviderProxyError,
    ReplyError,
    UsageError,
    VerificationError,
)
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.logs.judge import DEFAULT_UEFI_PCRS
from provider_proxy.evidence.model import VerifiedQuote
from provider_proxy.evidence.policy import UnsafeAcceptAny
from provider_proxy.evidence.verify import Verifier
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.tenant.keylime import (
    MAX_POLICY_BYTES,
    KeylimePolicies,
    KeylimeVerifier,
    RegisteredHost,
    ask_host,
)
from provider_proxy.trust.bindings import Binding
from provider_proxy.trust.ek_judges import EkJudge, HostCertificates, KnownEk
from provider_proxy.trust.pins import PinStore

MAX_KEY_BYTES = 64 * 1024
NOT_ASKED, GOOD, REFUSED, NO_ANSWER = "not asked", "good", "refused", "no answer"
EXIT_OF = {GOOD: 0, REFUSED: 1, NO_ANSWER: 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    options_file.add_argument(parser)
    arguments.add_tls_arguments(parser)
    parser.add_argument(
        "--pinned",
        metavar="HOST",
        required=True,
        help="your name for the host; its EK and AK are pinned under this name at first trust",
    )
    parser.add_argument(
        "--pins", type=Path, required=True, metavar="DIR", help="directory of the pins"
    )
    parser.add_argument(
        "--registrar",
        type=arguments.safe_url,
        required=True,
        metavar="URL",
        help="your registrar, https://…:8891, which knows the host's AK",
    )
    arguments.add_registrar_arguments(parser)
    parser.add_argument(
        "--verifier",
        type=arguments.safe_url,
        required=True,
        metavar="URL",
        help="your own Keylime verifier, https://…:8881, which judges a host after our checks",
    )
    parser.add_argument("--verifier-ca", type=Path, metavar="FILE", help="CA of the verifier")
    parser.add_argument("--verifier-cert", type=Path, metavar="FILE", help="your certificate, PEM")
    parser.add_argument("--verifier-key", type=Path, metavar="FILE", help="its private key, PEM")
    arguments.add_tls_name_argument(parser, "--verifier-tls-name", "the verifier's")
    for name, what in (
        (
            "--tpm-policy",
            'Keylime\'s tpm_policy, JSON, {"0": ["hex", …]}; one of the policies is needed',
        ),
        ("--mb-policy", "Keylime's measured-boot policy, JSON; asks for PCRs 0 to 9 and 11 to 15"),
    ):
        parser.add_argument(name, type=Path, metavar="FILE", help=what)
    arguments.add_log_arguments(parser)
    arguments.add_uefi_argument(
        parser,
        "with --mb-policy: PCRs that the event log must lead to (default: 0 to 7)",
    )
    arguments.add_pcr_arguments(parser, required=False)
    arguments.add_timeout_argument(parser)
    arguments.add_max_age_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What one judge says. `error` is the class of the error, where it is one of ours."""

    state: str
    reasons: tuple[str, ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        return ": ".join((self.state, *self.reasons[:1])) + "".join(
            f"\n         {reason}" for reason in self.reasons[1:]
        )


def _word_of(error: ProviderProxyError) -> Word:
    if isinstance(error, KeylimeRefusedError):
        return Word(state=REFUSED, reasons=error.reasons)
    name = type(error).__name__
    if isinstance(error, VerificationError):
        return Word(state=REFUSED, reasons=(f"{name}: {error}",), error=name)
    return Word(state=NO_ANSWER, reasons=(str(error),), error=name)


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What both judges say; good only where both say so."""

    ours: Word = Word(state=NOT_ASKED)
    keylime: Word = Word(state=NOT_ASKED)
    binding: Binding | None = None
    quote: VerifiedQuote | None = None

    @property
    def state(self) -> str:
        """The verdict: the first word that is not "good", ours before Keylime's."""
        return self.keylime.state if self.ours.state == GOOD else self.ours.state


def run(args: argparse.Namespace) -> int:
    """Judge; prints the verdict, which the exit code says, too.

    Raises:
        UsageError, HostError: an option or a file is wrong; no server was asked.
    """
    policies = _load_policies(args)
    verdict = asyncio.run(_judge(args, policies))
    print(json.dumps(_values(verdict)) if args.json else _lines(verdict))
    return EXIT_OF[verdict.state]


def _load_policies(args: argparse.Namespace) -> KeylimePolicies:
    key = args.runtime_policy_key
    uefi_mask = arguments.parse_uefi_pcrs(args)
    if uefi_mask and args.mb_policy is None:
        raise UsageError("--uefi-pcrs needs --mb-policy")
    texts: list[str | None] = []
    for path in (args.tpm_policy, args.runtime_policy, args.mb_policy):
        try:
            text = None if path is None else read_file(path, MAX_POLICY_BYTES).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise UsageError(f"{path} is not UTF-8") from exc
        texts.append(text)
    tpm, runtime, measured_boot = texts
    return KeylimePolicies(
        tpm=tpm,
        runtime=runtime,
        measured_boot=measured_boot,
        runtime_key=None if key is None else read_file(key, MAX_KEY_BYTES),
        violations=Violations(args.ima_violations),
        uefi_mask=uefi_mask or DEFAULT_UEFI_PCRS,
    )


async def _judge(args: argparse.Namespace, policies: KeylimePolicies) -> Verdict:
    verdict = Verdict()
    mask, timeout_ms = arguments.parse_pcrs(args), arguments.parse_timeout_ms(args)
    tls = (args.verifier_ca, args.verifier_cert, args.verifier_key)
    names = ("--verifier-ca", "--verifier-cert", "--verifier-key")
    async with (
        http.make_client(args) as proxy_http,
        http.open_client(*tls, names=names, tls_name=args.verifier_tls_name) as keylime_http,
        open_bindings(args, by_hand=_by_hand(args)) as bindings,
    ):
        try:
            proxy = ProxyClient(proxy_http, args.url)

            async def shown() -> HostCertificates:
                identity = await proxy.identity()
                return HostCertificates(ek_cert=identity.ek_cert, ek_chain=identity.ek_chain)

            binding = await bindings.get(
                args.agent_id or args.pinned, label=args.pinned, ask_host=own_copy(args) or shown
            )
            verdict.binding = binding
            verdict.quote, evidence = await ask_host(
                proxy,
                RegisteredHost(
                    host=binding.host,
                    history=binding.history,
                    ek_public=binding.ek_public,
                    ak_public=binding.ak_public,
                ),
                Verifier(UnsafeAcceptAny(), max_age_s=args.max_age),
                policies,
                mask=mask,
                timeout_ms=timeout_ms,
            )
        except (VerificationError, ReplyError) as exc:
            verdict.ours = _word_of(exc)
            return verdict
        verdict.ours = Word(state=GOOD)
        try:
            await KeylimeVerifier(keylime_http, args.verifier).judge(
                evidence, policies, ek_public=binding.ek_public, ak_public=binding.ak_public
            )
        except (VerificationError, ReplyError) as exc:
            verdict.keylime = _word_of(exc)
        else:
            verdict.keylime = Word(state=GOOD)
    return verdict


def _by_hand(args: argparse.Namespace) -> EkJudge | None:
    """Takes the EK that a person vouches for: with an option now, or with `pin add` before."""
    judge = vouched_by_hand(args)
    if judge is not None or args.ek_ca or args.insecure_no_ek:
        return judge
    pins = PinStore(args.pins)
    pinned = pins.load(args.pinned) if pins.has(args.pinned) else None
    if pinned is None or pinned.ek_public is None or not pinned.ek_by_hand:
        return None
    return KnownEk(pinned.ek_public)


def _lines(verdict: Verdict) -> str:
    ours = str(verdict.ours)
    if verdict.quote is not None and verdict.ours.state == GOOD:
        pcrs = ", ".join(map(str, verdict.quote.pcrs))
        ours += f": fresh quote of PCRs {pcrs}, signed by the registered AK"
    what = "none" if verdict.state == NO_ANSWER else verdict.state
    return f"ours:    {ours}\nkeylime: {verdict.keylime}\nverdict: {what}"


def _values(verdict: Verdict) -> Mapping[str, object]:
    binding, quote = verdict.binding, verdict.quote
    return {
        "verdict": "none" if verdict.state == NO_ANSWER else verdict.state,
        "ours": _word_values(verdict.ours),
        "keylime": _word_values(verdict.keylime),
        "agent_id": None if binding is None else binding.agent_id,
        "ak_name": None if binding is None else binding.host.ak.name.hex(),
        "pcrs": None if quote is None else {str(pcr): v.hex() for pcr, v in quote.pcrs.items()},
    }


def _word_values(word: Word) -> Mapping[str, object]:
    return {"state": word.state, "error": word.error, "reasons": list(word.reasons)}
