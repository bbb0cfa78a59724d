"""What the keys of `[registrars.NAME]` say together, and the id that the host has in a registrar.

Two registrars never share an id: a challenge's answer binds the id alone, so whoever runs the one could
relay the other's challenge to this host and answer it there. Ids are compared without regard to case,
because some of the databases behind registrars do so.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from provider_proxy.common.settings.values import IDENTITY_RE
from provider_proxy.errors import ConfigError
from provider_proxy.host.config.tables import RegistrarTable


def agent_id_of(name: str, table: RegistrarTable, host_uuid: uuid.UUID) -> str:
    """The host's id in a registrar: the configured one, or one of host, name and URL."""
    if table.agent_id is not None:
        return table.agent_id
    text = f"provider-proxy/registration/1/{host_uuid}/{name}/{table.url}"
    return str(uuid.uuid5(uuid.NAMESPACE_OID, text))


def check_registrars(
    registrars: Mapping[str, RegistrarTable], tenants: Mapping[str, object], *, quoter: str
) -> None:
    """What one key of `[registrars.NAME]` cannot tell alone.

    Args:
        quoter: `quoter.kind`; a Keylime agent registers its own keys, and solves nothing for others.

    Raises:
        ConfigError: the message names the key.
    """
    for name, table in registrars.items():
        key = f"registrars.{name}"
        if quoter != "tpm":
            raise ConfigError(f'{key} needs quoter.kind = "tpm"')
        _check_url(key, table)
        if (table.client_cert is None) != (table.client_key is None):
            raise ConfigError(f"{key}.client_cert and {key}.client_key belong together")
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
            raise ConfigError(f"{key}.insecure_plaintext must not stand beside an https:// URL")
    elif not table.insecure_plaintext:
        raise ConfigError(
            f"{key}.url must begin with https:// (or set {key}.insecure_plaintext: no secret is "
            "sent, but neither is the record read back, nor known who answers)"
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
                f"registrars.{name}.agent_id is that of registrars.{other} too; a registrar could "
                "answer the other's challenge with it"
            )
