"""The HTTP clients of subcommands: of a proxy, a registrar, a verifier."""

from __future__ import annotations

import argparse
from pathlib import Path

import httpx

from provider_proxy.common.http import http_client
from provider_proxy.common.tls import TlsFiles, client_context, demand_current

READ_LIMIT_S = 120.0  # above the longest timeout_ms that a proxy serves by default


def make_client(args: argparse.Namespace) -> httpx.AsyncClient:
    """A client by the arguments of `arguments.add_tls_arguments`.

    Raises:
        UsageError: a certificate without its key.
        HostError: a TLS file is wrong; the message names it.
    """
    names = ("--ca", "--cert", "--key")
    return open_client(args.ca, args.cert, args.key, names=names, tls_name=args.tls_name)


def open_client(
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    *,
    names: tuple[str, str, str],
    tls_name: str | None = None,
) -> httpx.AsyncClient:
    """A client that speaks TLS with these files; `names` are theirs in errors.

    Raises:
        UsageError: a certificate without its key.
        HostError: a TLS file is wrong, or nothing in it is valid now; the message names it.
    """
    files = TlsFiles(ca=ca, cert=cert, key=key, names=names)
    demand_current(files)
    return http_client(client_context(files), read_limit_s=READ_LIMIT_S, tls_name=tls_name)
