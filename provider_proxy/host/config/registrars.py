"""`[registrars.NAME]`: its keys, checks across them, and the id that the host has in a registrar.

Two registrars must not have the same id: the answer to a challenge binds only the id, so the operator of
one could relay the other's challenge to this host and answer it there. Ids are compared without regard to
case, because some registrars' databases do so.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from provider_proxy.common.settings.schema import check_related, setting
from provider_proxy.common.settings.values import (
    IDENTITY_RE,
    number,
    read_agent_id,
    read_contact,
    read_flag,
    read_host,
    read_path,
    read_text,
    read_url,
)
from provider_proxy.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrarTable:
    """`[registrars.NAME]`: a tenant's registrar, in which the host is registered."""

    url: str = setting(
        read_url,
        None,
        ("URL of the registrar; must be set. `https://`, or `http://` with `insecure_plaintext`."),
    )
    ca: Path | None = setting(
        read_path,
        None,
        ("CA of the registrar's certificate, PEM. Without it, the CAs that the system trusts."),
    )
    client_cert: Path | None = setting(
        read_path,
        None,
        (
            "Own certificate for the registrar, PEM; with `client_key`. Without it the "
            "record cannot be read back."
        ),
    )
    client_key: Path | None = setting(
        read_path,
        None,
        (
            "Its private key, PEM, not encrypted. Refused if others can read it: mode 0600, "
            "or 0640 where root owns it."
        ),
    )
    tls_name: str | None = setting(
        read_host, None, "Name in the registrar's certificate; the host of `url` by default."
    )
    insecure_plaintext: bool = setting(
        read_flag,
        False,
        (
            "The URL is `http://`. No secret is sent, but the record is never read back, and "
            "nothing proves who answers."
        ),
    )
    tenant: str | None = setting(
        read_text,
        None,
        (
            "Whose registrar this is: a `[tenants.NAME]`, or an unlisted identity such as "
            "`dns:acme.example`. Only this tenant sees the registration in "
            "`/verifier/identity`."
        ),
    )
    contact: str | None = setting(
        read_contact,
        None,
        (
            "IP address and port in the record, where the tenant's verifier finds the proxy. "
            "Keylime keeps 15 characters, an IPv4 address."
        ),
    )
    agent_id: str | None = setting(
        read_agent_id,
        None,
        (
            "The host's id in this registrar: 1 to 80 letters, digits, `.`, `_` and `-`. By "
            "default it is derived from the host's id, NAME and URL. No two registrars may "
            "have the same."
        ),
    )
    interval_s: float = setting(
        number(10, 86_400), 300.0, "How often the record is checked, in seconds."
    )
    register_unread: bool = setting(
        read_flag,
        False,
        "Register though the record cannot be read and Keylime up to 7.13 lets it be replaced.",
    )


def agent_id_of(name: str, table: RegistrarTable, host_uuid: uuid.UUID) -> str:
    """The host's id in a registrar: the configured one, or one of host, name and URL."""
    if table.agent_id is not None:
        return table.agent_id
    text = f"provider-proxy/registration/1/{host_uuid}/{name}/{table.url}"
    return str(uuid.uuid5(uuid.NAMESPACE_OID, text))


def check_registrars(
    registrars: Mapping[str, RegistrarTable], tenants: Mapping[str, object], *, quoter: str
) -> None:
    """Check the keys of `[registrars.NAME]` against each other.

    Args:
        quoter: `quoter.kind`; a Keylime agent registers its own keys and answers no other challenges.

    Raises:
        ConfigError: the message names the key.
    """
    for name, table in registrars.items():
        key = f"registrars.{name}"
        if quoter != "tpm":
            raise ConfigError(f'{key} needs quoter.kind = "tpm"')
        _check_url(key, table)
        check_related(key, table, together=(("client_cert", "client_key"),))
        if (
            table.tenant is not None
            and table.tenant not in tenants
            and not IDENTITY_RE.fullmatch(table.tenant)
        ):
            raise ConfigError(f"{key}.tenant must be a [tenants.NAME], or an unlisted identity")
    check_distinct({name: t.agent_id for name, t in registrars.items() if t.agent_id is not None})


def _check_url(key: str, table: RegistrarTable) -> None:
    if not table.url:
        raise ConfigError(f"{key}.url must be set", key=key)
    if table.url.startswith("https://"):
        if table.insecure_plaintext:
            raise ConfigError(f"{key}.insecure_plaintext must not be set with an https:// URL")
    elif not table.insecure_plaintext:
        raise ConfigError(
            f"{key}.url must begin with https:// (or set {key}.insecure_plaintext: no secret is "
            "sent, but the record is not read back, and the server is not authenticated)"
        )
    elif table.ca or table.client_cert or table.client_key:
        raise ConfigError(f"{key}.insecure_plaintext must not stand beside TLS files")


def check_distinct(ids: Mapping[str, str]) -> None:
    """Refuse two registrars with one id.

    Args:
        ids: by the registrars' names.

    Raises:
        ConfigError: the message names both.
    """
    owner: dict[str, str] = {}
    for name, agent_id in ids.items():
        other = owner.setdefault(agent_id.lower(), name)
        if other != name:
            raise ConfigError(
                f"registrars.{name}.agent_id is that of registrars.{other} too, so one registrar could "
                "use this to answer the other's challenge"
            )
