"""The registrar of a command line: records whose keys are checked. Needs the extra `client`."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from provider_proxy.cli.arguments import read_public
from provider_proxy.cli.http import open_client
from provider_proxy.common.files import read_file
from provider_proxy.errors import UsageError
from provider_proxy.trust.bindings import RegistrarBindings
from provider_proxy.trust.ek_chain import Verdict
from provider_proxy.trust.ek_files import read_certificates
from provider_proxy.trust.ek_judges import (
    AskHost,
    EkJudge,
    HostCertificates,
    KnownEk,
    KnownEkDigest,
    UnsafeAnyEk,
)
from provider_proxy.trust.ek_store import EkStore
from provider_proxy.trust.expected_eks import parse_digest
from provider_proxy.trust.pins import PinStore
from provider_proxy.trust.registrar import AgentRecord

MAX_EK_FILE_BYTES = 256 * 1024


def read_record(
    args: argparse.Namespace, *, by_hand: EkJudge | None
) -> tuple[AgentRecord, Verdict | None]:
    """The host's record at the registrar that the options name.

    Args:
        by_hand: accepts the EK that a person confirms; None without one.

    Returns:
        The record, and the certificate chain of its EK; None without a certificate.

    Raises:
        VerificationError: no record, not an AK, or an EK that nothing vouches for.
        ReplyError: the registrar gave no answer.
        UsageError, HostError: an option or a file is wrong.
    """

    async def read() -> tuple[AgentRecord, Verdict | None]:
        async with open_bindings(args, by_hand=by_hand) as bindings:
            return await bindings.record(args.agent_id or args.label, ask_host=own_copy(args))

    return asyncio.run(read())


@asynccontextmanager
async def open_bindings(
    args: argparse.Namespace, *, by_hand: EkJudge | None
) -> AsyncIterator[RegistrarBindings]:
    """The bindings of the registrar that the options name, of which nothing is cached.

    Raises:
        UsageError, HostError: an option or a file is wrong.
    """
    judge = _judge(args, by_hand)
    names = ("--registrar-ca", "--registrar-cert", "--registrar-key")
    tls = (args.registrar_ca, args.registrar_cert, args.registrar_key)
    async with open_client(*tls, names=names, tls_name=args.registrar_tls_name) as http:
        yield RegistrarBindings(http, args.registrar, pins=PinStore(args.pins), eks=judge, ttl_s=0)


def _judge(args: argparse.Namespace, by_hand: EkJudge | None) -> EkJudge:
    if args.insecure_virtual_ek and not args.ek_ca:
        raise UsageError("--insecure-virtual-ek needs --ek-ca")
    if sum((by_hand is not None, bool(args.ek_ca), args.insecure_no_ek)) != 1:
        raise UsageError(
            "--registrar needs one of --ek-ca, --ek-tpm, --ek-sha256 and --insecure-no-ek: it decides "
            "whether the EK is the host's"
        )
    if by_hand is not None:
        return by_hand
    if args.ek_ca:
        return EkStore(*args.ek_ca, insecure_virtual=args.insecure_virtual_ek)
    return UnsafeAnyEk()


def vouched_by_hand(args: argparse.Namespace) -> EkJudge | None:
    """Takes the EK that `--ek-tpm` or `--ek-sha256` names; None where neither is given.

    Raises:
        UsageError, HostError: no such key or digest; both are given.
    """
    if args.ek_tpm is not None and args.ek_sha256 is not None:
        raise UsageError("--ek-tpm and --ek-sha256 both name the EK: give one of them")
    if args.ek_tpm is not None:
        return KnownEk(read_public(args.ek_tpm))
    return KnownEkDigest(parse_digest(args.ek_sha256)) if args.ek_sha256 is not None else None


def own_copy(args: argparse.Namespace) -> AskHost | None:
    """The host's own copy of its certificates, from `--ek-cert`; None where it is not given.

    Raises:
        HostError, UsageError: the file cannot be read, or holds nothing.
    """
    if args.ek_cert is None:
        return None
    found = read_certificates(read_file(args.ek_cert, MAX_EK_FILE_BYTES))
    if not found:
        raise UsageError(f"{args.ek_cert} holds no certificate")

    async def ask_host() -> HostCertificates:
        return HostCertificates(ek_cert=found[0], ek_chain=found[1:])

    return ask_host
