"""`provider-proxy`: picks the subcommand and turns errors into exit codes.

Exit codes of every subcommand: 0 good, 1 verification refused, 2 usage, 3 environment (an uncaught
exception included, and output that could not be written). Results go to stdout, the log to stderr.
A subcommand's module is imported only when it runs, so that a tenant with the base install can
verify.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from provider_proxy.cli import options_file
from provider_proxy.cli.streams import OutputLostError, Streams
from provider_proxy.common import log
from provider_proxy.common.version import program_version
from provider_proxy.errors import ProviderProxyError, RequestError, UsageError, VerificationError

EXIT_GOOD = 0
EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3

SUBCOMMANDS = {
    "serve": "run the daemon",
    "vtpm-helper": "inspect this host's vTPMs for the daemon; its unit is provider-proxy-vtpm",
    "support-bundle": "collect diagnostic data without secrets, for those who help",
    "check-config": "show every setting and the file and line that it came from",
    "status": "show what a running daemon does: its TPM, queue, batches, tenants",
    "top": "show the status live in the terminal",
    "fetch": "ask a proxy for a quote; save the request and the evidence",
    "verify": "verify saved evidence, offline",
    "policy": "make, merge, judge and explain policies of a host's logs",
    "verify-link": "verify that a VM with its vTPM runs on a host",
    "keylime-check": "have your own Keylime verifier judge a host, after our checks",
    "ek-check": "Keylime's ek_check_script: verify the host of an agent's VM",
    "vtpm-ca": "get and check the CA that certifies a host's vTPMs",
    "ek-ca": "show a store of TPM makers' CAs; judge an EK certificate by it",
    "identity": "show what a proxy says about its host's keys",
    "watch": "verify hosts continuously, and report changes",
    "bridge": "present hosts as agents to your own, unmodified Keylime",
    "fleet": "let several watchers share hosts, through PostgreSQL",
    "pki": "make a small CA, and certificates for a server and tenants",
    "audit": "prove that a nonce was in a batch of the audit log",
    "pin": "pin the AK that is trusted for a host",
    "tpm": "examine the host's TPM and its attestation key",
    "register": "register the host in its tenants' registrars once, step by step",
    "registrations": "show the state of a running daemon's registrations",
    "vms": "list the VMs whose vTPMs this host has registered",
    "plan": "predict latency and duty for a number of tenants, and the window to set",
    "demo": "show 200 tenants on one TPM, on this machine",
    "bench": "measure the performance of this machine",
}
EXTRA_OF = {
    "httpx": "client",
    "anyio": "client",
    "trio": "host",
    "h11": "host",
    "merklelib": "host",
    "tpm2_pytss": "host",
    "prometheus_client": "host",
    "rich": "host",
    "matplotlib": "plot",
    "psycopg": "fleet",
}


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of one subcommand, or of all; imports what it has to."""
    parser = argparse.ArgumentParser(
        prog="provider-proxy",
        description="One TPM quote for many tenants; each verifies its own part.",
        epilog="exit codes: 0 good, 1 verification refused, 2 usage, 3 environment",
    )
    parser.add_argument(
        "--log-level",
        choices=log.LEVELS,
        help="lowest level of messages on stderr (default: info; for serve, log.level)",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {program_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in SUBCOMMANDS.items():
        sub = commands.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
        )
        if only in (None, name):
            module = importlib.import_module(f"provider_proxy.cli.{name.replace('-', '_')}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser


def sub_parser(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser | None:
    """The parser of a command; None where there is no such command."""
    subs = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return next(subs).choices.get(command)


def _command_in(argv: Sequence[str]) -> str:
    return next((word for word in argv if word in SUBCOMMANDS), "")


def run(argv: Sequence[str]) -> int:
    """Run a subcommand; returns the exit code."""
    try:
        command = _command_in(argv)
        parser = build_parser(command)
        args = parser.parse_args(options_file.expanded(argv, command, sub_parser(parser, command)))
        log.set_up(args.log_level or "info")
        code: int = args.run(args)
    except ModuleNotFoundError as exc:
        extra = EXTRA_OF.get((exc.name or "").partition(".")[0])
        if extra is not None and _command_in(argv) in ("watch", "bridge"):
            extra = _command_in(argv)
        if extra is None:
            raise
        print(
            f"provider-proxy: this command needs the extra {extra!r} of provider-proxy "
            f"(module {exc.name} is missing)",
            file=sys.stderr,
        )
        return EXIT_ENVIRONMENT
    except VerificationError as exc:
        print(f"provider-proxy: refused: {type(exc).__name__}: {exc}", file=sys.stderr)
        return EXIT_REFUSED
    except (UsageError, RequestError) as exc:
        print(f"provider-proxy: {exc}", file=sys.stderr)
        return EXIT_USAGE
    except ProviderProxyError as exc:
        print(f"provider-proxy: {exc}", file=sys.stderr)
        return EXIT_ENVIRONMENT
    return code


def main() -> None:
    """Entry point."""
    streams = Streams()
    try:
        code = _run_to_exit_code(sys.argv[1:])
        streams.flush()
    except OutputLostError:
        code = EXIT_ENVIRONMENT
    except KeyboardInterrupt:
        code = EXIT_ENVIRONMENT
    except Exception:  # noqa: BLE001  # Python's own exit code for it would be 1: refused
        code = EXIT_ENVIRONMENT
        if streams.lost() is None:  # else it came of that, from a group of tasks
            traceback.print_exc()
    if (why := streams.lost()) is not None:
        code = EXIT_ENVIRONMENT
        if why:
            print(f"provider-proxy: the output could not be written: {why}", file=sys.stderr)
        streams.abandon()
    sys.exit(code)


def _run_to_exit_code(argv: Sequence[str]) -> int:
    try:
        return run(argv)
    except SystemExit as exc:  # argparse's, after --help or a usage error
        return (
            exc.code if isinstance(exc.code, int) else EXIT_GOOD if exc.code is None else EXIT_USAGE
        )
