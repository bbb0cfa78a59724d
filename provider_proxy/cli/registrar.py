"""The registrar of a command line: records whose keys are checked. Needs the extra `client`."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from provider_proxy.cli.http import open_client
from provider_proxy.errors import UsageError
from provider_proxy.trust.bindings import RegistrarBindings
from provider_proxy.trust.ek_chain import Verdict
from provider_proxy.trust.ek_judges import EkJudge, KnownEk, UnsafeAnyEk
from provider_proxy.trust.ek_store import EkStore
from provider_proxy.trust.pins import PinStore
from provider_proxy.trust.registrar import AgentRecord


def read_record(
    args: argparse.Namespace, *, ek_by_hand: bytes | None
) -> tuple[AgentRecord, Verdict | None]:
    """The host's record at the registrar that the options name.

    Args:
        ek_by_hand: TPM2B_PUBLIC of the EK that `--ek-tpm` vouches for; None where it is not given.

    Returns:
        The record, and the chain that vouches for its EK; None where no certificate does.

    Raises:
        VerificationError: no record, no AK, or an EK that nobody vouches for.
        ReplyError: the registrar gave no answer.
        UsageError, HostError: an option or a file is wrong.
    """

    async def read() -> tuple[AgentRecord, Verdict | None]:
        async with open_bindings(args, ek_by_hand=ek_by_hand) as bindings:
            return await bindings.record(args.agent_id or args.label)

    return asyncio.run(read())


@asynccontextmanager
async def open_bindings(
    args: argparse.Namespace, *, ek_by_hand: bytes | None
) -> AsyncIterator[RegistrarBindings]:
    """The bindings of the registrar that the options name, of which nothing is cached.

    Raises:
        UsageError, HostError: an option or a file is wrong.
    """
    judge = _judge(args, ek_by_hand)
    names = ("--registrar-ca", "--registrar-cert", "--registrar-key")
    tls = (args.registrar_ca, args.registrar_cert, args.registrar_key)
    async with open_client(*tls, names=names) as http:
        yield RegistrarBindings(http, args.registrar, pins=PinStore(args.pins), eks=judge, ttl_s=0)


def _judge(args: argparse.Namespace, ek_by_hand: bytes | None) -> EkJudge:
    if args.insecure_virtual_ek and not args.ek_ca:
        raise UsageError("--insecure-virtual-ek goes with --ek-ca")
    if sum((ek_by_hand is not None, bool(args.ek_ca), args.insecure_no_ek)) != 1:
        raise UsageError(
            "--registrar needs one of --ek-ca, --ek-tpm and --insecure-no-ek: who vouches for the EK?"
        )
    if ek_by_hand is not None:
        return KnownEk(ek_by_hand)
    if args.ek_ca:
        return EkStore(*args.ek_ca, insecure_virtual=args.insecure_virtual_ek)
    return UnsafeAnyEk()
