"""Mistakes with files, dates, addresses, TLS and identities, and how each is made for real.

`mistakes_page` makes each in a `Scene`, runs three programs over it, and writes down what they say.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from provider_proxy.host import pki

DAY = timedelta(days=1)
NOW = datetime.now(UTC)
IDENTITY = "spiffe://provider-proxy/tenant/acme"
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
NOBODY = 65534


class Scene:
    """A daemon's configuration, a tenant's command and its watcher's file, all of them good.

    Attributes:
        config: the daemon's file.
        watch: the watcher's.
        url, options: of `provider-proxy fetch`.
        environ: what the three programs get beside their own.
        port, admin: two free ports.
        held: sockets that are open meanwhile.
        config_mode: of the daemon's file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = pki.new_authority(NOW - 100 * DAY)
        self.other_ca = pki.new_authority(NOW - 100 * DAY)
        self.write("ca.crt", pki.pem(self.ca.certificate))
        self.write("other-ca.crt", pki.pem(self.other_ca.certificate))
        self.crl(days=20)
        self.pair("server", SERVER)
        self.pair("tenant", CLIENT)
        self.held: list[socket.socket] = []
        self.config_mode = 0o600
        self.port, self.admin = self.free_port(), self.free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self.environ: dict[str, str] = {}
        self.options = {name: str(folder / f) for name, f in OPTIONS.items()}
        self.config = (
            f'state_dir = "{folder}/state"\n[listen]\naddress = "127.0.0.1:{self.port}"\n'
            f'tls_cert = "{folder}/server.crt"\ntls_key = "{folder}/server.key"\n'
            f'client_ca = "{folder}/ca.crt"\nclient_crl = "{folder}/crl.pem"\n'
            f'[admin]\naddress = "127.0.0.1:{self.admin}"\n[tpm]\ntcti = "embedded"\n'
            f'[tenants.acme]\nidentities = ["{IDENTITY}"]\n'
        )
        self.watch = (
            f'state_dir = "{folder}/watch"\npins = "{folder}/pins"\n[hosts.h]\n'
            f'provider_ip = "127.0.0.1"\nprovider_port = {self.port}\ntls_ca = "{folder}/ca.crt"\n'
            f'tls_cert = "{folder}/tenant.crt"\ntls_key = "{folder}/tenant.key"\n'
            "insecure_any_state = true\n"
        )

    @staticmethod
    def free_port() -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])

    def write(self, name: str, data: bytes | str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        path.chmod(mode)
        return path

    def crl(self, *, days: float, ca: pki.Holder | None = None) -> None:
        made = NOW + (days - pki.CRL_DAYS) * DAY
        self.write("crl.pem", pki.pem(pki.sign_crl(ca or self.ca, 1, (), made)), 0o644)

    def pair(
        self,
        name: str,
        purpose: x509.ObjectIdentifier,
        *,
        ca: pki.Holder | None = None,
        days: float = 60,
        names: tuple[x509.GeneralName, ...] = (),
    ) -> pki.Holder:
        """A certificate that ends in so many days, which may be past."""
        address = x509.IPAddress(IPv4Address("127.0.0.1"))
        own = (address,) if purpose == SERVER else (x509.UniformResourceIdentifier(IDENTITY),)
        made = NOW + (days - 90) * DAY
        holder = pki.issue(ca or self.ca, name, names or own, purpose, days=90, now=made)
        self.write(f"{name}.crt", pki.pem(holder.certificate), 0o644)
        self.write(f"{name}.key", holder.key_pem())
        return holder

    def set(self, key: str, value: str | None) -> None:
        """Another value, as TOML, of a key of the daemon's file; None takes it out."""
        self.config = _set(self.config, key, value)

    def set_watch(self, key: str, value: str) -> None:
        """The same of the watcher's file."""
        self.watch = _set(self.watch, key, value)

    def swap(self, one: str, other: str) -> None:
        a, b = (self.folder / name for name in (one, other))
        first = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(first)

    def encrypt(self, name: str, holder: pki.Holder) -> None:
        self.write(
            name,
            holder.key.private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
            ),
        )


OPTIONS = {"--ca": "ca.crt", "--cert": "tenant.crt", "--key": "tenant.key"}


def _set(text: str, key: str, value: str | None) -> str:
    lines = text.splitlines()
    at = [number for number, line in enumerate(lines) if line.startswith(f"{key} = ")]
    lines[at[0] : at[0] + 1] = [] if value is None else [f"{key} = {value}"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One of them.

    Attributes:
        name: what was done, for people.
        make: does it.
        of_tenant: it is in the tenant's files or command; else in the daemon's.
        real_chip: the daemon opens the TPM that is configured.
        watches: the tenant's command is `watch --once`, not `fetch`.
    """

    name: str
    make: Callable[[Scene], object]
    of_tenant: bool = False
    real_chip: bool = False
    watches: bool = False


def _files(scene: Scene, name: str) -> Path:
    return scene.folder / name


def _der(scene: Scene) -> None:
    holder = scene.pair("server", SERVER)
    data = holder.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    scene.write("server.key", data)


def _swapped(scene: Scene) -> None:
    scene.swap("server.crt", "server.key")
    (scene.folder / "server.crt").chmod(0o600)


def _folder(scene: Scene, name: str) -> None:
    (scene.folder / name).unlink()
    (scene.folder / name).mkdir()


def _foreign(scene: Scene) -> None:
    scene.folder.chmod(0o755)
    path = scene.write("conf.d/90-more.toml", "[batch]\nwindow_ms = 10\n", 0o644)
    os.chown(path, NOBODY, NOBODY)


def _closed_folder(scene: Scene, name: str, file: str, text: str) -> None:
    scene.write(f"{name}/{file}", text, 0o644)
    (scene.folder / name).chmod(0)


def _port_in_use(scene: Scene) -> None:
    server = socket.create_server(("127.0.0.1", scene.port))
    scene.held.append(server)

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()

    threading.Thread(target=hang_up, daemon=True).start()


def _tenant_option(option: str, key: str, value: str) -> Callable[[Scene], object]:
    """The same in the command and in the watcher's file."""

    def make(scene: Scene) -> None:
        path = str(scene.folder / value)
        scene.options[option] = path
        scene.set_watch(key, f'"{path}"')

    return make


def _tenant_pair(ca: str | None = None, days: float = 60) -> Callable[[Scene], object]:
    def make(scene: Scene) -> None:
        scene.pair("tenant", CLIENT, ca=scene.other_ca if ca else None, days=days)

    return make


def _no_cert(scene: Scene) -> None:
    for option, key in (("--cert", "tls_cert"), ("--key", "tls_key")):
        del scene.options[option]
        scene.watch = _set(scene.watch, key, None)


def _url(text: str, key: str | None = None, value: str = "") -> Callable[[Scene], object]:
    def make(scene: Scene) -> None:
        scene.url = text.replace("PORT", str(scene.port))
        if key is not None:
            scene.set_watch(key, value)

    return make


def _name(scene: Scene) -> None:
    scene.pair("server", SERVER, names=(x509.DNSName("proxy.example.org"),))


def _stranger(scene: Scene) -> None:
    other = "spiffe://provider-proxy/tenant/globex"
    scene.pair("tenant", CLIENT, names=(x509.UniformResourceIdentifier(other),))
    scene.config += "[tenant_defaults]\naccept_unlisted = false\n"


def _second_tenant(scene: Scene) -> None:
    scene.config += f'[tenants.globex]\nidentities = ["{IDENTITY}"]\n'


def _identity(text: str) -> Callable[[Scene], object]:
    return lambda scene: scene.set("identities", f'["{text}"]')


def _setting(key: str, value: str | None) -> Callable[[Scene], object]:
    """With FOLDER and PORT filled in."""

    def make(scene: Scene) -> None:
        filled = None
        if value is not None:
            filled = value.replace("FOLDER", str(scene.folder)).replace("PORT", str(scene.port))
        scene.set(key, filled)

    return make


def _more(text: str) -> Callable[[Scene], object]:
    def make(scene: Scene) -> None:
        scene.config += text.replace("FOLDER", str(scene.folder))

    return make


def _top(text: str) -> Callable[[Scene], object]:
    def make(scene: Scene) -> None:
        scene.config = text + scene.config

    return make


def _write(name: str, data: str, mode: int = 0o600) -> Callable[[Scene], object]:
    return lambda scene: scene.write(name, data, mode)


def _all(*steps: Callable[[Scene], object]) -> Callable[[Scene], object]:
    return lambda scene: [step(scene) for step in steps]


def _of_tenant(name: str, make: Callable[[Scene], object]) -> Mistake:
    return Mistake(name=name, make=make, of_tenant=True)


GROUPS: dict[str, tuple[Mistake, ...]] = {
    "Files of the daemon": (
        Mistake(name="the key is missing", make=lambda s: _files(s, "server.key").unlink()),
        Mistake(name="the key is a directory", make=lambda s: _folder(s, "server.key")),
        Mistake(name="the key is empty", make=_write("server.key", "")),
        Mistake(name="the key is DER", make=_der),
        Mistake(
            name="certificate and key are swapped",
            make=_swapped,
        ),
        Mistake(
            name="the key is of another certificate",
            make=lambda s: s.write("server.key", s.other_ca.key_pem()),
        ),
        Mistake(name="the key cannot be read", make=lambda s: _files(s, "server.key").chmod(0)),
        Mistake(
            name="others can read the key", make=lambda s: _files(s, "server.key").chmod(0o644)
        ),
        Mistake(
            name="the key is encrypted",
            make=lambda s: s.encrypt("server.key", s.pair("server", SERVER)),
        ),
        Mistake(name="the certificate is a client's", make=lambda s: s.pair("server", CLIENT)),
        Mistake(
            name="the CA's file holds a key",
            make=lambda s: s.write("ca.crt", s.ca.key_pem()),
        ),
        Mistake(name="the CRL is missing", make=lambda s: _files(s, "crl.pem").unlink()),
        Mistake(name="the CRL is another CA's", make=lambda s: s.crl(days=20, ca=s.other_ca)),
        Mistake(
            name="`tenants.d` cannot be read",
            make=lambda s: _closed_folder(s, "tenants.d", "b.toml", "[tenants.b]\n"),
        ),
        Mistake(
            name="everybody can write the configuration",
            make=lambda s: setattr(s, "config_mode", 0o666),
        ),
        Mistake(name="a drop-in belongs to another user", make=_foreign),
        Mistake(name="a quote is not closed", make=_setting("tls_cert", '"FOLDER/server.crt')),
        Mistake(name="the file begins with a byte order mark", make=_top("\ufeff")),
        Mistake(name="a key is misspelt", make=_more("[batch]\nwindow_sm = 10\n")),
        Mistake(
            real_chip=True,
            name="the state directory cannot be looked into",
            make=lambda s: _closed_folder(s, "state", "ak.json", "{}"),
        ),
        Mistake(real_chip=True, name="the state directory is a file", make=_write("state", "")),
        Mistake(
            name="the audit log's folder is missing",
            make=_more('[audit]\nenabled = true\npath = "FOLDER/none/audit.log"\n'),
        ),
        Mistake(
            name="`credential:` outside systemd",
            make=_setting("tls_key", '"credential:secret_tls.key"'),
        ),
        Mistake(
            name="`SSLKEYLOGFILE` names a folder that is not there",
            make=lambda s: [
                s.environ.update(SSLKEYLOGFILE=f"{s.folder}/none/keys.log"),
                _more('[registrars.acme]\nurl = "https://127.0.0.1:8891"\nca = "FOLDER/ca.crt"\n')(
                    s
                ),
            ],
        ),
    ),
    "Dates": (
        Mistake(
            name="the server's certificate has expired",
            make=lambda s: s.pair("server", SERVER, days=-1),
        ),
        Mistake(
            name="the server's certificate is not valid yet",
            make=lambda s: s.pair("server", SERVER, days=95),
        ),
        Mistake(
            name="the server's certificate ends in three days",
            make=lambda s: s.pair("server", SERVER, days=3.5),
        ),
        Mistake(name="the CRL has run out", make=lambda s: s.crl(days=-1)),
        Mistake(
            name="the CRL has run out, and `crl_strict` is set",
            make=_all(
                lambda s: s.crl(days=-1),
                _setting("client_crl", '"FOLDER/crl.pem"\ncrl_strict = true'),
            ),
        ),
        _of_tenant("the tenant's certificate has expired", _tenant_pair(days=-1)),
    ),
    "Addresses": (
        Mistake(name="another program has the port", make=_port_in_use),
        Mistake(
            name="the admin listener has the tenants' port",
            make=lambda s: _set_admin(s, f"127.0.0.1:{s.port}"),
        ),
        Mistake(
            name="the admin listener is open to the network",
            make=lambda s: _set_admin(s, f"0.0.0.0:{s.admin}"),
        ),
        Mistake(name="`*:8890`", make=_setting("address", '"*:8890"')),
        Mistake(name="a URL as an address", make=_setting("address", '"https://127.0.0.1:8890"')),
        Mistake(name="an invalid port", make=_setting("address", '"127.0.0.1:99999"')),
        Mistake(name="an IPv6 address without brackets", make=_setting("address", '"::1:8890"')),
        Mistake(
            name="a unix socket's path that is too long",
            make=_setting("address", '"unix:/run/' + 110 * "x" + '"'),
        ),
        Mistake(
            name="a registrar without TLS over the network",
            make=_more('[registrars.acme]\nurl = "http://registrar.example:8890"\n'),
        ),
        Mistake(name="`tcti` is a path", make=_setting("tcti", '"/dev/tpmrm0"')),
        Mistake(
            real_chip=True,
            name="the TPM's device is missing",
            make=_setting("tcti", '"device:/dev/tpmrm7"'),
        ),
        _of_tenant(
            "an invalid port in a URL",
            _url("https://localhost:99999", "provider_port", "99999"),
        ),
        _of_tenant(
            "an invalid host name in a URL",
            _url("https://xn--a:1", "provider_ip", '"xn--a"'),
        ),
        _of_tenant(
            "an address without its scheme", _url("127.0.0.1:PORT", "provider_ip", '"127.0.0.1:1"')
        ),
        _of_tenant(
            "nothing listens there",
            lambda s: _url(f"https://127.0.0.1:{s.free_port()}")(s),
        ),
    ),
    "TLS between tenant and daemon": (
        Mistake(name="the server's certificate has another name", make=_name),
        _of_tenant("http:// where TLS is spoken", _url("http://127.0.0.1:PORT")),
        _of_tenant("no certificate of one's own", _no_cert),
        _of_tenant("a certificate of another CA", _tenant_pair("other")),
        _of_tenant("the wrong CA for the proxy", _tenant_option("--ca", "tls_ca", "other-ca.crt")),
        _of_tenant(
            "others can read the tenant's key", lambda s: _files(s, "tenant.key").chmod(0o644)
        ),
        _of_tenant(
            "the tenant's key is encrypted",
            lambda s: s.encrypt("tenant.key", s.pair("tenant", CLIENT)),
        ),
        _of_tenant("the tenant shows a server's certificate", lambda s: s.pair("tenant", SERVER)),
        Mistake(
            name="`hosts.d` cannot be read",
            make=lambda s: _closed_folder(s, "hosts.d", "b.toml", "[hosts.b]\n"),
            of_tenant=True,
            watches=True,
        ),
    ),
    "Identities": (
        Mistake(name="an identity in capitals", make=_identity("SPIFFE://example.org/acme")),
        Mistake(name="an identity without its kind", make=_identity("acme.example.org")),
        Mistake(name="a fingerprint with colons", make=_identity("sha256:" + "AB:" * 31 + "AB")),
        Mistake(name="one identity at two tenants", make=_second_tenant),
        _of_tenant("a tenant that the provider does not know", _stranger),
    ),
}


def _set_admin(scene: Scene, address: str) -> None:
    head, table, rest = scene.config.partition("[admin]\n")
    scene.config = head + table + _set(rest, "address", f'"{address}"')
