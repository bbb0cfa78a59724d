"""The HTTP client of subcommands that ask a proxy."""

from __future__ import annotations

import argparse
import ssl
from pathlib import Path

import httpx

from provider_proxy.common.http import no_cookies
from provider_proxy.errors import HostError, UsageError

CONNECT_LIMIT_S = 10.0
READ_LIMIT_S = 120.0  # above the longest timeout_ms that a proxy serves by default


def make_client(args: argparse.Namespace) -> httpx.AsyncClient:
    """A client by the arguments of `files.add_tls_arguments`.

    Raises:
        UsageError: a certificate without its key.
        HostError: a TLS file is missing or no PEM.
    """
    return open_client(args.ca, args.cert, args.key, options="--ca, --cert, --key")


def open_client(
    ca: Path | None, cert: Path | None, key: Path | None, *, options: str
) -> httpx.AsyncClient:
    """A client that speaks TLS with these files; `options` names them in errors.

    Raises:
        UsageError: a certificate without its key.
        HostError: a TLS file is missing or no PEM.
    """
    if (cert is None) != (key is None):
        raise UsageError(f"{options}: certificate and key belong together")
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as exc:
        raise HostError(f"{options}: {exc}") from exc
    timeout = httpx.Timeout(READ_LIMIT_S, connect=CONNECT_LIMIT_S)
    # trust_env: a proxy or netrc of the environment has no business between tenant and host.
    return httpx.AsyncClient(verify=context, timeout=timeout, trust_env=False, cookies=no_cookies())
