"""Arguments that subcommands share: the trusted AK, what to ask for, how to reach proxy and registrar."""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
from collections.abc import Callable
from pathlib import Path

from provider_proxy.common import addresses
from provider_proxy.common.files import read_file
from provider_proxy.errors import EvidenceFormatError, UsageError
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.model import (
    PCR_COUNT,
    AttestationKey,
    HostLogs,
    Quote,
    mask_of,
    parse_mask,
)
from provider_proxy.evidence.query import MAX_TIMEOUT_MS, MIN_TIMEOUT_MS
from provider_proxy.evidence.tpm_keys import insecure_ak_from_pem, parse_ak, parse_public
from provider_proxy.evidence.verify import DEFAULT_MAX_AGE_S
from provider_proxy.evidence.wire import MAX_QUOTE_STRING, parse_quote
from provider_proxy.tenant.policies import LogRules
from provider_proxy.trust.pins import PinnedHost, PinStore

DEFAULT_CONFIG = Path("/etc/provider-proxy/provider-proxy.toml")
MAX_KEY_FILE_BYTES = 64 * 1024
MAX_LIST_BYTES = 1024 * 1024 * 1024  # of an IMA list: what the daemon keeps, six million lines


def read_public(path: Path) -> bytes:
    """A TPM2B_PUBLIC from a file, raw or base64, as registrars give it.

    Raises:
        UsageError: the file holds no such thing.
        HostError: it cannot be read.
    """
    data = read_file(path, MAX_KEY_FILE_BYTES)
    with contextlib.suppress(binascii.Error):  # raw, then
        data = base64.b64decode(data.strip(), validate=True)
    try:
        parse_public(data)
    except EvidenceFormatError as exc:
        raise UsageError(f"{path} is not a TPM2B_PUBLIC: {exc}") from exc
    return data


def read_quote(path: Path) -> Quote:
    """A quote string, as a Keylime agent gives it, from a file.

    Raises:
        UsageError: the file holds none.
        HostError: it cannot be read.
    """
    try:
        return parse_quote(read_file(path, MAX_QUOTE_STRING).decode("ascii").strip())
    except (EvidenceFormatError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} does not hold a quote: {exc}") from exc


def load_ak(ak_tpm: Path | None, insecure_pem: Path | None) -> AttestationKey:
    """The trusted AK of a command line.

    Args:
        ak_tpm: a TPM2B_PUBLIC, raw or base64.
        insecure_pem: a PEM, whose attributes were not checked.

    Raises:
        UntrustedAkError: a key, but not an attestation key.
        UsageError: not a TPM2B_PUBLIC.
    """
    if ak_tpm is not None:
        return parse_ak(read_public(ak_tpm))
    assert insecure_pem is not None  # argparse demands one of the two
    return insecure_ak_from_pem(read_file(insecure_pem, MAX_KEY_FILE_BYTES))


def add_pins_argument(parser: argparse.ArgumentParser) -> None:
    """`--pins`, for `--pinned`."""
    parser.add_argument(
        "--pins", type=Path, metavar="DIR", help="directory of the pins, for --pinned"
    )


def load_pin(args: argparse.Namespace) -> PinnedHost | None:
    """The host that `--pinned` names; None where it is not given.

    Raises:
        UsageError: it is not pinned, or `--pins` is missing.
    """
    if args.pinned is None:
        return None
    if args.pins is None:
        raise UsageError("--pinned needs --pins")
    return PinStore(args.pins).load(args.pinned)


def option(parse: Callable[[str], str], must: str) -> Callable[[str], str]:
    """A `type` for argparse: of a parser that raises `UsageError`."""

    def read(text: str) -> str:
        try:
            return parse(text)
        except UsageError as exc:
            raise argparse.ArgumentTypeError(f"must be {must}: {exc}") from exc

    return read


safe_url = option(addresses.parse_safe_url, addresses.MUST_SAFE_URL)
host_name = option(addresses.parse_host, addresses.MUST_HOST)
agent_id = option(addresses.parse_agent_id, addresses.MUST_AGENT_ID)


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """`URL`, and how to speak TLS with it."""
    parser.add_argument(
        "url", type=safe_url, metavar="URL", help="the proxy's URL, for example https://host:8890"
    )
    parser.add_argument("--ca", type=Path, metavar="FILE", help="CA of the proxy's certificate")
    parser.add_argument("--cert", type=Path, metavar="FILE", help="your certificate, PEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its private key, PEM")
    add_tls_name_argument(parser, "--tls-name", "the proxy's")


def add_tls_name_argument(parser: argparse.ArgumentParser, option: str, whose: str) -> None:
    """The name in a server's certificate, if its URL has another one."""
    parser.add_argument(
        option,
        type=host_name,
        metavar="NAME",
        help=f"the name in {whose} certificate, if it is not the URL's host",
    )


def add_registrar_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes with `--registrar URL`: its TLS, the host's id there, what vouches for the EK."""
    parser.add_argument(
        "--registrar-ca", type=Path, metavar="FILE", help="CA of the registrar's certificate"
    )
    parser.add_argument("--registrar-cert", type=Path, metavar="FILE", help="your certificate, PEM")
    parser.add_argument("--registrar-key", type=Path, metavar="FILE", help="its private key, PEM")
    add_tls_name_argument(parser, "--registrar-tls-name", "the registrar's")
    parser.add_argument(
        "--agent-id",
        type=agent_id,
        metavar="ID",
        help="the host's id at the registrar (default: HOST)",
    )
    parser.add_argument(
        "--ek-tpm",
        type=Path,
        metavar="FILE",
        help="its EK, TPM2B_PUBLIC; you confirm that it is the host's; its certificate is not checked",
    )
    parser.add_argument(
        "--ek-sha256",
        metavar="HEX",
        help="SHA-256 of its EK's public key (SubjectPublicKeyInfo); you confirm that it is the host's",
    )
    parser.add_argument(
        "--ek-cert",
        type=Path,
        metavar="FILE",
        help="the host's own copy of its EK certificate and chain, for --ek-ca; see identity --save-ek",
    )
    parser.add_argument(
        "--ek-ca",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="the TPM makers' CAs that you trust: a directory or a PEM bundle; may be repeated",
    )
    parser.add_argument(
        "--insecure-virtual-ek",
        action="store_true",
        help="also accept virtual TPMs whose CAs are in --ek-ca: root on their machine has their keys",
    )
    parser.add_argument(
        "--insecure-no-ek",
        action="store_true",
        help="do not check the EK certificate; a software TPM can then pass for the host's",
    )


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """What the host's IMA list must be; with `add_boot_arguments` for `log_rules`."""
    parser.add_argument(
        "--runtime-policy",
        type=Path,
        metavar="FILE",
        help="Keylime's runtime policy, JSON; the IMA list must obey it and lead to PCR 10",
    )
    parser.add_argument(
        "--runtime-policy-key",
        type=Path,
        metavar="FILE",
        help="PEM public key; the policy must be signed with its private key",
    )
    parser.add_argument(
        "--ima-violations",
        choices=[choice.value for choice in Violations],
        default=Violations.REFUSE.value,
        help="what to do with a file that was written to while IMA measured it (default: %(default)s)",
    )


def with_ima_list(logs: HostLogs, path: Path | None) -> HostLogs:
    """Logs with the host's whole IMA list, from a file, in place of the part in an answer.

    Args:
        path: None for the logs as they are.

    Raises:
        HostError: it cannot be read, or is too large.
    """
    if path is None:
        return logs
    data = read_file(path, MAX_LIST_BYTES)
    return HostLogs(
        ima=data.decode("utf-8", "backslashreplace"), uefi=logs.uefi, uefi_missing=logs.uefi_missing
    )


def add_boot_arguments(parser: argparse.ArgumentParser) -> None:
    """What the firmware's event log must be."""
    parser.add_argument(
        "--boot-policy",
        type=Path,
        metavar="FILE",
        help='digests that may be extended into a PCR, {"4": ["hex", …]}',
    )
    add_uefi_argument(parser, "the firmware's event log must lead to these PCRs")


def add_uefi_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """`--uefi-pcrs`, for `parse_uefi_pcrs`."""
    parser.add_argument("--uefi-pcrs", metavar="0,1,7", help=what)


def parse_uefi_pcrs(args: argparse.Namespace) -> int:
    """The mask of `--uefi-pcrs`; 0 where it is not given. Raises: UsageError."""
    return 0 if args.uefi_pcrs is None else parse_pcr_list(args.uefi_pcrs)


def log_rules(args: argparse.Namespace) -> LogRules:
    """What the options demand of the logs.

    Raises:
        UsageError: they do not go together.
    """
    if args.runtime_policy_key is not None and args.runtime_policy is None:
        raise UsageError("--runtime-policy-key needs --runtime-policy")
    return LogRules(
        ima=getattr(args, "ima", False),
        runtime_policy=args.runtime_policy,
        runtime_policy_key=args.runtime_policy_key,
        violations=Violations(args.ima_violations),
        uefi_mask=parse_uefi_pcrs(args),
        boot_policy=args.boot_policy,
    )


def add_pcr_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """`--mask` or `--pcrs`, for `parse_pcrs`."""
    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument("--mask", metavar="0x…", help="PCR mask; bit n stands for PCR n")
    which.add_argument("--pcrs", metavar="0,1,7", help="the same as a list of PCR numbers")


def parse_pcrs(args: argparse.Namespace) -> int:
    """The mask of `--mask` or `--pcrs`; 0 where neither is given.

    Raises:
        UsageError, ParameterError: no such mask, no such list.
    """
    if args.mask is not None:
        return parse_mask(args.mask)
    return 0 if args.pcrs is None else parse_pcr_list(args.pcrs)


def parse_pcr_list(text: str) -> int:
    """Read "0,1,7". Raises: UsageError."""
    numbers = text.split(",")
    if not all(
        n.isascii() and n.isdecimal() and len(n) < 3 and int(n) < PCR_COUNT for n in numbers
    ):
        raise UsageError(f"--pcrs must be numbers from 0 to {PCR_COUNT - 1} joined by commas")
    return mask_of(int(n) for n in numbers)


def add_timeout_argument(parser: argparse.ArgumentParser) -> None:
    """`--timeout-ms`, for `parse_timeout_ms`."""
    parser.add_argument(
        "--timeout-ms", type=int, metavar="N", help="how long the proxy may take, in milliseconds"
    )


def parse_timeout_ms(args: argparse.Namespace) -> int | None:
    """`--timeout-ms`. Raises: UsageError."""
    if args.timeout_ms is not None and not MIN_TIMEOUT_MS <= args.timeout_ms <= MAX_TIMEOUT_MS:
        raise UsageError(f"--timeout-ms must be in {MIN_TIMEOUT_MS}..{MAX_TIMEOUT_MS}")
    timeout_ms: int | None = args.timeout_ms
    return timeout_ms


def add_max_age_argument(parser: argparse.ArgumentParser) -> None:
    """`--max-age`."""
    parser.add_argument(
        "--max-age",
        type=float,
        default=DEFAULT_MAX_AGE_S,
        metavar="SECONDS",
        help="maximum age of the nonce when the reply arrives, in seconds "
        f"(default: {DEFAULT_MAX_AGE_S:g})",
    )


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """`--config`, by default where a package puts the configuration."""
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="the daemon's configuration, TOML (default: %(default)s)",
    )
