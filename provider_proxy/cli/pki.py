"""`provider-proxy pki`: a small CA for a first set-up and for tests.

    DIR/  ca.crt  ca.key  server.crt  server.key  crl.pem  tenants/NAME.crt  tenants/NAME.key

The arguments are checked here, names above all: they become files and identities.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from provider_proxy.common.files import files_in, is_there, write_public
from provider_proxy.errors import HostError, UsageError
from provider_proxy.host import pki

SERVER_CERT, SERVER_KEY, TENANTS = "server.crt", "server.key", "tenants"
SERVER_DAYS = 397  # browsers take 398 at most of public CAs; one is left for clocks
TENANT_DAYS = 90

NAME_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)  # as of [tenants.NAME]
LABEL_RE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
MAX_DNS_CHARS = 253  # RFC 1035, in text
SPIFFE_RE = re.compile(r"spiffe://[a-z0-9._-]{1,255}((?:/[A-Za-z0-9._-]+)+)", re.ASCII)
MAX_SPIFFE_CHARS = 2000  # SPIFFE-ID says 2048; the configuration takes no more than this
ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
MAILBOX_RE = re.compile(rf"{ATOM}(?:\.{ATOM})*", re.ASCII)  # RFC 5321, Dot-string
MAX_MAILBOX_CHARS = 64
MAX_EMAIL_CHARS = 254


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, act: Callable[[argparse.Namespace], int], help_text: str) -> None:
        sub = commands[name] = actions.add_parser(name, help=help_text)
        sub.add_argument("directory", type=Path, metavar="DIR", help="directory of the CA, 0700")
        sub.add_argument("--json", action="store_true", help="one JSON object as the last line")
        sub.set_defaults(act=act)

    commands: dict[str, argparse.ArgumentParser] = {}
    action("init", _init, "make a CA and the certificate of a server")
    action("tenant", _tenant, "make the certificate of a tenant")
    action("revoke", _revoke, "revoke a tenant's certificate: put it on the CRL")
    action("crl", _crl, "sign the CRL again before it expires")
    action("show", _show, "list the certificates")
    commands["init"].add_argument(
        "--host",
        action="append",
        required=True,
        metavar="NAME",
        help="how tenants reach the server: DNS name or IP address; may be given more than once",
    )
    for name in ("tenant", "revoke"):
        commands[name].add_argument(
            "name", metavar="NAME", help="name of the tenant, and of its files"
        )
    for name in ("revoke", "crl"):
        commands[name].add_argument(
            "--out",
            type=Path,
            metavar="FILE",
            help="also write the CRL to FILE, where the daemon's user can read it (listen.client_crl)",
        )
    default = "spiffe://provider-proxy/tenant/NAME"
    for option, metavar, help_text in (
        ("--spiffe", "URI", f"SPIFFE ID as identity (if none of the three is given: {default})"),
        ("--dns", "NAME", "DNS name as identity"),
        ("--email", "ADDR", "e-mail address as identity"),
    ):
        commands["tenant"].add_argument(option, metavar=metavar, help=help_text)
    for name, days in (("init", SERVER_DAYS), ("tenant", TENANT_DAYS)):
        commands[name].add_argument(
            "--days",
            type=int,
            default=days,
            metavar="N",
            help=f"how long the certificate is valid (default: {days})",
        )


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        UsageError: a name is not valid, or a file exists already.
        HostError: a file is missing, damaged, or cannot be written.
    """
    code: int = args.act(args)
    return code


def _init(args: argparse.Namespace) -> int:
    hosts = [parse_host(text) for text in args.host]
    now = datetime.now(UTC)
    ca = pki.new_authority(now)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH
    server = pki.issue(ca, "provider-proxy", hosts, purpose, days=args.days, now=now)
    files = {
        pki.CA_CERT: pki.pem(ca.certificate),
        pki.CA_KEY: ca.key_pem(),
        SERVER_CERT: pki.pem(server.certificate) + pki.pem(ca.certificate),
        SERVER_KEY: server.key_pem(),
        pki.CRL: pki.pem(pki.sign_crl(ca, 1, (), now)),
    }
    pki.create(args.directory, files)
    _report_made(args, [args.directory / name for name in files], server.certificate)
    return 0


def _tenant(args: argparse.Namespace) -> int:
    name = check_name(args.name)
    names: list[x509.GeneralName] = []
    if args.spiffe is not None:
        names.append(parse_spiffe(args.spiffe))
    if args.dns is not None:
        names.append(parse_dns("--dns", args.dns))
    if args.email is not None:
        names.append(parse_email(args.email))
    tenant = pki.issue(
        pki.load_authority(args.directory),
        name,
        names or [parse_spiffe(f"spiffe://provider-proxy/tenant/{name}")],
        ExtendedKeyUsageOID.CLIENT_AUTH,
        days=args.days,
        now=datetime.now(UTC),
    )
    directory = args.directory / TENANTS
    files = {f"{name}.crt": pki.pem(tenant.certificate), f"{name}.key": tenant.key_pem()}
    pki.create(directory, files)
    _report_made(args, [directory / file for file in files], tenant.certificate)
    return 0


def _report_made(
    args: argparse.Namespace, paths: list[Path], certificate: x509.Certificate
) -> None:
    if args.json:
        print(json.dumps({"files": [str(path) for path in paths], **_values(certificate)}))
    else:
        for path in paths:
            print(path)


def _revoke(args: argparse.Namespace) -> int:
    path = args.directory / TENANTS / f"{check_name(args.name)}.crt"
    ca = pki.load_certificate(args.directory / pki.CA_CERT)
    if not is_there(path):
        raise UsageError(f"there is no {path}")
    certificate = _load_issued(path, ca)
    _update_crl(args, certificate)
    return 0


def _crl(args: argparse.Namespace) -> int:
    _update_crl(args, None)
    return 0


def _update_crl(args: argparse.Namespace, revoke: x509.Certificate | None) -> None:
    """Sign the CRL, copy it to where the daemon reads it, and say where it is."""
    crl = pki.update_crl(args.directory, revoke, now=datetime.now(UTC))
    paths = [args.directory / pki.CRL]
    if args.out is not None:
        write_public(args.out, pki.pem(crl))
        paths.append(args.out)
    if args.json:
        print(json.dumps({"crl": str(paths[-1]), **_crl_values(crl)}))
    else:
        print(*paths, sep="\n")


def _show(args: argparse.Namespace) -> int:
    ca = pki.load_certificate(args.directory / pki.CA_CERT)
    crl = pki.load_crl(args.directory, ca)
    paths = [path for path in (args.directory / SERVER_CERT,) if is_there(path)]
    paths += files_in(args.directory / TENANTS, ".crt")
    certificates = [("ca", ca)]
    for path in paths:
        name = path.relative_to(args.directory).with_suffix("").as_posix()
        certificates.append((name, _load_issued(path, ca)))
    shown = [
        {"name": name, **_values(certificate), "revoked": pki.is_revoked(crl, certificate)}
        for name, certificate in certificates
    ]
    if args.json:
        print(json.dumps({"certificates": shown, "crl": _crl_values(crl)}))
        return 0
    now = datetime.now(UTC)
    for name, certificate in certificates:
        end = certificate.not_valid_after_utc
        state = "revoked" if pki.is_revoked(crl, certificate) else _good_until(end, now)
        print(f"{name}  {' '.join(identities_of(certificate))}  {end.isoformat()}  {state}")
    due = crl.next_update_utc or now
    print(f"crl  number {pki.crl_number(crl)}  {due.isoformat()}  {_good_until(due, now)}")
    return 0


def _good_until(end: datetime, now: datetime) -> str:
    return "good" if now <= end else "expired"


def _values(certificate: x509.Certificate) -> dict[str, object]:
    return {
        "identities": identities_of(certificate),
        "serial": f"{certificate.serial_number:x}",
        "not_after": certificate.not_valid_after_utc.isoformat(),
    }


def _crl_values(crl: pki.Crl) -> dict[str, object]:
    due = crl.next_update_utc
    return {
        "number": pki.crl_number(crl),
        "next_update": None if due is None else due.isoformat(),
        "revoked": len(crl),
    }


def _load_issued(path: Path, ca: x509.Certificate) -> x509.Certificate:
    certificate = pki.load_certificate(path)
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as exc:
        raise HostError(f"{path} was not signed by the CA in {pki.CA_CERT}") from exc
    return certificate


def identities_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Who it is of, in the forms of `tenants.NAME.identities`; a server has "ip:…" too."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return tuple(f"cn:{name.value!s}" for name in common)
    return (
        *names.get_values_for_type(x509.UniformResourceIdentifier),
        *(f"dns:{name}" for name in names.get_values_for_type(x509.DNSName)),
        *(f"email:{name}" for name in names.get_values_for_type(x509.RFC822Name)),
        *(f"ip:{name}" for name in names.get_values_for_type(x509.IPAddress)),
    )


def check_name(text: str) -> str:
    """A tenant's name, which is a file's name too. Raises: UsageError."""
    if not NAME_RE.fullmatch(text) or ".." in text:
        raise UsageError(
            "a tenant's NAME has up to 63 letters, digits, '.', '_' and '-', without '..'"
        )
    return text


def parse_dns(option: str, text: str) -> x509.DNSName:
    """A DNS name without wildcards. Raises: UsageError."""
    name = text.lower()
    labels = name.split(".")
    good = text.isascii() and len(name) <= MAX_DNS_CHARS  # before lower(): U+212A is not a "k"
    good = good and all(LABEL_RE.fullmatch(label) for label in labels)
    if not good or labels[-1].isdecimal():  # "10.0.0.256" is a slip, not a name
        raise UsageError(f"{option} must be a DNS name, not {text!r}")
    return x509.DNSName(name)


def parse_host(text: str) -> x509.GeneralName:
    """What tenants write between https:// and the port. Raises: UsageError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return parse_dns("--host", text)
    if "%" in text:
        raise UsageError(f"--host must be an address without a zone, not {text!r}")
    return x509.IPAddress(address)


def parse_email(text: str) -> x509.RFC822Name:
    """An e-mail address. Raises: UsageError."""
    mailbox, _, domain = text.rpartition("@")
    if not MAILBOX_RE.fullmatch(mailbox) or len(mailbox) > MAX_MAILBOX_CHARS:
        raise UsageError(f"--email must be an address like name@example.org, not {text!r}")
    address = f"{mailbox}@{parse_dns('the domain of --email', domain).value}"
    if len(address) > MAX_EMAIL_CHARS:
        raise UsageError(f"--email must have {MAX_EMAIL_CHARS} characters at most")
    return x509.RFC822Name(address)


def parse_spiffe(text: str) -> x509.UniformResourceIdentifier:
    """A SPIFFE ID with a path. Raises: UsageError."""
    match = SPIFFE_RE.fullmatch(text)
    segments = match[1].split("/") if match and len(text) <= MAX_SPIFFE_CHARS else ["."]
    if "." in segments or ".." in segments:
        raise UsageError(f"--spiffe must be spiffe://TRUST-DOMAIN/PATH, not {text!r}")
    return x509.UniformResourceIdentifier(text)
