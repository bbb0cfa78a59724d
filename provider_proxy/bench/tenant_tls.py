"""The TLS of a bench's tenants, from the files that `overload.make_certificates` writes."""

from __future__ import annotations

import ssl
from pathlib import Path

from provider_proxy.common.tls import TlsFiles, client_context


def tenant_context(ca: Path, pem: Path) -> ssl.SSLContext:
    """A tenant's context.

    Args:
        pem: its certificate and key in one file.

    Raises:
        HostError: a file is wrong.
    """
    return client_context(TlsFiles(ca=ca, cert=pem, key=pem, names=("ca", "certificate", "key")))
