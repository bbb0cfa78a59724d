"""A daemon's configuration whose files all carry dates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from provider_proxy.host import pki
from provider_proxy.host.config.tables import (
    Admin,
    Config,
    Listen,
)

DAY = timedelta(days=1)


class Place:
    """A CA with all that hangs on it, made at a time of one's choice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = pki.new_authority(datetime.now(UTC) - 100 * DAY)
        self.write("ca.crt", pki.pem(self.ca.certificate))
        self.crl(until_days=20)
        self.pair("server", ExtendedKeyUsageOID.SERVER_AUTH, days=60)
        self.pair("client", ExtendedKeyUsageOID.CLIENT_AUTH, days=60)

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_bytes(data)
        return path

    def crl(self, *, until_days: float) -> None:
        made = datetime.now(UTC) + (until_days - pki.CRL_DAYS) * DAY
        self.write("crl.pem", pki.pem(pki.sign_crl(self.ca, 1, (), made)))

    def pair(self, name: str, purpose: x509.ObjectIdentifier, *, days: float) -> None:
        """A certificate that ends in so many days, which may be past."""
        lasts = 90
        holder = pki.issue(
            self.ca,
            name,
            [x509.DNSName("localhost")],
            purpose,
            days=lasts,
            now=datetime.now(UTC) + (days - lasts) * DAY,
        )
        self.write(f"{name}.crt", pki.pem(holder.certificate))
        self.write(f"{name}.key", holder.key_pem())

    def config(self, **more: Any) -> Config:
        listen = Listen(
            address=("127.0.0.1:0",),
            tls_cert=self.folder / "server.crt",
            tls_key=self.folder / "server.key",
            client_ca=self.folder / "ca.crt",
            client_crl=self.folder / "crl.pem",
            crl_strict=more.pop("crl_strict", False),
        )
        return Config(
            state_dir=self.folder, listen=listen, admin=Admin(address=("127.0.0.1:0",)), **more
        )
