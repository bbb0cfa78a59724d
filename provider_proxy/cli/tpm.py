"""`provider-proxy tpm`: look at the chip, and at the AK in it."""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console
from rich.table import Table

from provider_proxy.cli.arguments import DEFAULT_CONFIG, add_config_argument
from provider_proxy.common.files import is_there, read_secret, write_private
from provider_proxy.common.settings.values import read_path
from provider_proxy.errors import ConfigError, HostError, VerificationError
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.host.config.chip_tables import Tpm, read_tcti
from provider_proxy.host.config.load import load_config
from provider_proxy.host.config.tables import DEFAULT_STATE_DIR, Config
from provider_proxy.host.quoters.renewal import renew
from provider_proxy.host.quoters.tpm_opener import TpmOpener
from provider_proxy.host.tpm import chip, doctor, progress

log = logging.getLogger(__name__)

SMALL_COMMANDS = {
    "pcr_read": "a reading of 8 PCRs",
    "extend": "an extend (TPM2_Hash in its place)",
    "other": "another small command",
}
FORMATS = ("base64", "raw", "pem")
EXIT_ENVIRONMENT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    what = actions.add_parser(
        "doctor", help="show what chip this is, what follows from that, and what to do"
    )
    _add_config(what)
    what.add_argument(
        "--tcti", metavar="TCTI", help="the TPM, a tpm2-tss string, instead of the configuration's"
    )
    ak = actions.add_parser("ak", help="the attestation key")
    steps = ak.add_subparsers(dest="step", required=True, metavar="STEP")
    show = steps.add_parser("show", help="show it, and make nothing")
    create = steps.add_parser("create", help="find it, or make it and the EK")
    export = steps.add_parser("export", help="write its public part to a file")
    export.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file for the public part"
    )
    export.add_argument(
        "--format",
        choices=FORMATS,
        default="base64",
        help="TPM2B_PUBLIC as base64 or raw, or a PEM, which has no attributes",
    )
    renewing = steps.add_parser(
        "renew", help="after a compromise: keep the same key, and make its old secrets useless"
    )
    renewing.add_argument(
        "--endorsement-auth",
        required=True,
        metavar="FILE",
        help="file with the endorsement hierarchy's new authValue, 16 to 32 bytes",
    )
    acts = ((show, _show), (create, _create), (export, _export), (renewing, _renew))
    for step, act in acts:
        _add_config(step)
        step.set_defaults(act=act)


def _add_config(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        HostError: no TPM, no key, a file that cannot be written.
        ConfigError: the configuration is wrong.
    """
    if args.action == "doctor":
        return _doctor(args)
    code: int = args.act(args, load_config(args.config))
    return code


@contextlib.contextmanager
def _opener(config: Config) -> Iterator[TpmOpener]:
    opener = TpmOpener(
        config.tpm, config.state_dir, host_uuid=config.host_uuid, open_context=chip.open_context
    )
    try:
        yield opener
    finally:
        opener.stop()


def _doctor(args: argparse.Namespace) -> int:
    settings, state_dir = _doctors_settings(args)
    opener = TpmOpener(settings, state_dir, host_uuid=None, open_context=chip.open_context)

    def examine() -> doctor.Report:
        context = opener.connect()
        try:
            return doctor.examine(context, settings.ek_handle, settings)
        finally:
            chip.close_context(context)

    try:
        with Console(stderr=True).status("measuring; an RSA key may take a minute to make"):
            report = progress.run_within(examine, settings.hang_limit_s)
    finally:
        opener.stop()
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _show_report(report)
    return EXIT_ENVIRONMENT if report.failures else 0


def _doctors_settings(args: argparse.Namespace) -> tuple[Tpm, Path]:
    """The chip's settings; the defaults where there is no configuration yet."""
    settings, state_dir = Tpm(), Path(DEFAULT_STATE_DIR)
    if args.config != DEFAULT_CONFIG or is_there(args.config):
        try:
            config = load_config(args.config)
            settings, state_dir = config.tpm, config.state_dir
        except ConfigError:
            if args.config != DEFAULT_CONFIG:
                raise
            log.warning("%s has faults (see check-config): the defaults are used", args.config)
    if args.tcti is not None:
        settings = dataclasses.replace(settings, tcti=read_tcti("--tcti", args.tcti))
    return settings, state_dir


def _show_report(report: doctor.Report) -> None:
    table = Table(title="TPM", show_header=False, title_justify="left")
    table.add_column(style="bold")
    rows = {
        "manufacturer": f"{report.manufacturer} {report.vendor}",
        "firmware": report.firmware,
        "specification revision": f"{report.revision:.2f}",
        "PCR banks": ", ".join(report.pcr_banks),
        "algorithms": ", ".join(report.algorithms),
        "persistent handles": ", ".join(f"{h:#x}" for h in report.persistent) or "none",
        "EK certificates in NV": ", ".join(report.ek_certificates) or "none",
        "EK chain in NV": f"{report.ek_chain} CAs" if report.ek_chain else "none",
        "EK, SHA-256": report.ek_sha256 or "none at tpm.ek_handle yet",
    }
    rows |= {f"a quote, {kind}": f"{ms:.1f} ms" for kind, ms in report.quote_ms.items()}
    rows |= {SMALL_COMMANDS[name]: f"{ms:.1f} ms" for name, ms in report.command_ms.items()}
    rows |= {
        name.replace("_", " "): str(value)
        for name, value in report.limits.items()
        if name not in doctor.SHOWN_OTHERWISE
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console = Console()
    console.print(table)
    for title, sentences in (
        ("NV indices that were skipped", report.ek_passed_over),
        ("What failed", report.failures),
        ("What follows", report.consequences),
        ("What to do", report.todo),
    ):
        if sentences:
            console.print(f"{title}:", style="bold")
        for sentence in sentences:
            console.print(f"• {sentence}", highlight=False, soft_wrap=True, markup=False)


def _print_ak(args: argparse.Namespace, config: Config, public: bytes) -> None:
    key = parse_ak(public)
    values = {
        "handle": f"{config.tpm.ak_handle:#x}",
        "ak_name": key.name.hex(),
        "sign_alg": key.sign_alg,
        "hash_alg": key.signature_hash.label,
        "ak_tpm": base64.b64encode(public).decode("ascii"),
    }
    if args.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name:9} {value}")


def _public(config: Config) -> bytes:
    with _opener(config) as opener:
        public = progress.run_within(opener.read_ak_public, config.tpm.hang_limit_s)
    if public is None:
        raise HostError(
            f"there is no key at tpm.ak_handle {config.tpm.ak_handle:#x}; "
            "`provider-proxy tpm ak create` makes one"
        )
    try:
        parse_ak(public)
    except VerificationError as exc:
        raise HostError(f"tpm.ak_handle holds a key that is not an AK: {exc}") from exc
    return public


def _show(args: argparse.Namespace, config: Config) -> int:
    _print_ak(args, config, _public(config))
    return 0


def _create(args: argparse.Namespace, config: Config) -> int:
    with _opener(config) as opener:
        progress.run_within(lambda: opener.open().close(), config.tpm.hang_limit_s)
        public = opener.identity.ak_public
    _print_ak(args, config, public)
    return 0


def _renew(args: argparse.Namespace, config: Config) -> int:
    option = "--endorsement-auth"
    endorsement = read_secret(option, read_path(option, args.endorsement_auth))
    with _opener(config) as opener:
        done = progress.run_within(
            lambda: renew(opener, config.tpm, config.state_dir, config.vtpm.ca_handle, endorsement),
            config.tpm.hang_limit_s,
        )
    values = {
        "ak_name": done.ak_name.hex(),
        "copies_removed": [f"{handle:#x}" for handle in done.copies],
        "vtpm_ca_key": done.ca_key,
    }
    if args.json:
        print(json.dumps(values))
        return 0
    print(f"AK {done.ak_name.hex()}: the same key, with a new secret authValue")
    if done.ca_key:
        print("vTPM CA's key: the same key, with a new secret authValue")
    for handle in done.copies:
        print(f"handle {handle:#x} held a copy, which was removed")
    print("endorsement hierarchy: it has the new authValue; no old private part loads any more")
    print(
        f'Now set tpm.endorsement_auth_file to "{args.endorsement_auth}", give it to the EK\'s other '
        "users, and reboot: what is loaded in the TPM stays usable until then."
    )
    return 0


def _export(args: argparse.Namespace, config: Config) -> int:
    public = _public(config)
    if args.format == "raw":
        data = public
    elif args.format == "base64":
        data = base64.b64encode(public) + b"\n"
    else:
        data = parse_ak(public).public_key.public_bytes(
            Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
        )
    write_private(args.out, data)
    _print_ak(args, config, public)
    return 0
