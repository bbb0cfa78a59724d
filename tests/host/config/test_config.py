"""The configuration: every key's default, good values and refusals, and what only the whole can tell."""

from __future__ import annotations

import dataclasses
import os
import tomllib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from provider_proxy.common.addresses import parse_contact, split_address
from provider_proxy.common.files import read_secret
from provider_proxy.errors import ConfigError, HostError
from provider_proxy.evidence.model import HashAlg, mask_of
from provider_proxy.host.config import load as config_whole
from provider_proxy.host.config import tables as config_tables
from provider_proxy.host.config.load import parse_config
from provider_proxy.host.config.registrars import RegistrarTable, agent_id_of, check_registrars
from provider_proxy.host.config.tables import Config, TenantRules

PLAIN = "[listen]\ninsecure_plaintext = true\n"
ISOLATED = mask_of((10, 11, 12, 13, 14, 15, 16, 23))
UUID = "0ddba11c-0ffe-4bad-8bad-00000c0ffee0"

# key: its default, then good values as TOML with what they become
KEYS: dict[str, tuple[Any, list[tuple[str, Any]]]] = {
    "state_dir": (Path("/var/lib/provider-proxy"), [('"/srv/x"', Path("/srv/x"))]),
    "host_uuid": (None, [(f'"{UUID}"', uuid.UUID(UUID))]),
    "listen.address": (
        ("127.0.0.1:8890",),
        [
            ('"127.0.0.1:0"', ("127.0.0.1:0",)),
            ('"[::1]:65535"', ("[::1]:65535",)),
            ('"localhost:1"', ("localhost:1",)),
            ('"unix:/run/p.sock"', ("unix:/run/p.sock",)),
            ('["127.0.0.1:1", "unix:/run/p"]', ("127.0.0.1:1", "unix:/run/p")),
        ],
    ),
    "listen.tls_cert": (None, []),  # see the TLS rules below
    "listen.tls_key": (None, []),
    "listen.client_ca": (None, []),
    "listen.client_crl": (None, []),
    "listen.crl_strict": (False, [("true", True)]),
    "listen.front": ((), []),  # needs more, see below
    "listen.front_peers": ((), []),
    "listen.proxy_protocol_from": (
        (),
        [('["192.0.2.7", "2001:DB8::/32"]', ("192.0.2.7/32", "2001:db8::/32"))],
    ),
    "listen.insecure_plaintext": (False, [("true", True)]),
    "admin.address": (
        (),
        [('"127.0.0.1:9"', ("127.0.0.1:9",)), ('"unix:/run/a"', ("unix:/run/a",)), ("[]", ())],
    ),
    "tpm.tcti": (
        "device:/dev/tpmrm0",
        [('"embedded"', "embedded"), ('"swtpm:port=2321"', "swtpm:port=2321")],
    ),
    "tpm.ek_handle": (0x81010001, [("0x81000000", 0x81000000), ("0x81ffffff", 0x81FFFFFF)]),
    "tpm.ak_handle": (0x81000100, [("0x81000000", 0x81000000), ("0x81ffffff", 0x81FFFFFF)]),
    "tpm.ak_algorithm": ("ecc", [('"rsa"', "rsa"), ('"ecc"', "ecc")]),
    "tpm.banks": (
        (HashAlg.SHA256,),
        [
            ('["sha256", "sha384"]', (HashAlg.SHA256, HashAlg.SHA384)),
            ('["sha512"]', (HashAlg.SHA512,)),
        ],
    ),
    "tpm.max_duty": (0.5, [("1", 1.0), ("0.001", 0.001)]),
    "tpm.ima_wait_ms": (30.0, [("0", 0.0), ("10000", 10000.0)]),
    "tpm.hang_limit_s": (120.0, [("1", 1.0), ("3600", 3600.0)]),
    "tpm.owner_auth_file": (None, [('"/etc/o"', Path("/etc/o"))]),
    "tpm.endorsement_auth_file": (None, [('"/etc/e"', Path("/etc/e"))]),
    "quoter.kind": ("tpm", [('"tpm"', "tpm")]),  # the agent needs more, see below
    "keylime_agent.url": (None, [('"https://a:9002"', "https://a:9002")]),
    "keylime_agent.agent_id": (None, [(f'"{UUID}"', UUID)]),
    "keylime_agent.client_cert": (None, [('"/etc/c"', Path("/etc/c"))]),
    "keylime_agent.client_key": (None, [('"/etc/k"', Path("/etc/k"))]),
    "keylime_agent.registrar_url": (None, [('"https://r:8891"', "https://r:8891")]),
    "keylime_agent.registrar_ca": (None, [('"/etc/ca"', Path("/etc/ca"))]),
    "keylime_agent.registrar_tls_name": (None, [('"R.example"', "r.example")]),
    "keylime_agent.registrar_cert": (None, [('"/etc/c"', Path("/etc/c"))]),
    "keylime_agent.registrar_key": (None, [('"/etc/k"', Path("/etc/k"))]),
    "keylime_agent.ek_ca": (
        (),
        [
            ('"/etc/cas"', (Path("/etc/cas"),)),
            ('["/etc/cas", "/b.pem"]', (Path("/etc/cas"), Path("/b.pem"))),
        ],
    ),
    "keylime_agent.insecure_virtual_ek": (False, [("true", True)]),
    "tpm.ek_cert_file": (None, [('"/etc/ek.der"', Path("/etc/ek.der"))]),
    "tpm.ek_chain_file": (None, [('"/etc/chain.pem"', Path("/etc/chain.pem"))]),
    "tpm.insecure_sha1_bank": (False, [("true", True)]),
    "keylime_agent.insecure_no_ek": (False, [("true", True)]),
    "batch.window_ms": (50.0, [("0", 0.0), ("12.5", 12.5), ("29999", 29_999.0)]),
    "batch.max_leaves": (1024, [("1", 1), ("65536", 65_536)]),
    "batch.isolate_pcrs": (ISOLATED, [("[]", 0), ("[0, 23]", 1 | 1 << 23)]),
    "limits.max_queue": (8192, [("1", 1), ("1000000", 1_000_000)]),
    "limits.max_connections": (4096, [("1", 1), ("100000", 100_000)]),
    "limits.max_connections_per_address": (512, [("1", 1), ("100000", 100_000)]),
    "limits.default_timeout_ms": (30_000, [("51", 51), ("60000", 60_000)]),
    "limits.max_timeout_ms": (60_000, [("30000", 30_000), ("600000", 600_000)]),
    "limits.busy_status": (503, [("408", 408), ("500", 500), ("503", 503)]),
    "limits.drain_ms": (20_000, [("0", 0), ("600000", 600_000)]),
    "tenant_defaults.pcr_allow": (0xFFFFFF & ~(1 << 10), [("[0, 10]", 1 | 1 << 10), ("[]", 0)]),
    "tenant_defaults.identities": ((), [("[]", ())]),  # more belongs in [tenants.NAME], see below
    "tenant_defaults.vms": (frozenset(), [("[]", frozenset())]),
    "tenant_defaults.rate": (50.0, [("0.001", 0.001), ("1000000", 1e6)]),
    "tenant_defaults.burst": (100, [("1", 1), ("1000000", 1_000_000)]),
    "tenant_defaults.max_inflight": (64, [("1", 1), ("1000000", 1_000_000)]),
    "tenant_defaults.accept_unlisted": (True, [("false", False)]),
    "registrars.NAME.url": (
        None,
        [
            ('"https://registrar.example"', "https://registrar.example"),
            ('"https://registrar.example:8891/"', "https://registrar.example:8891"),
            ('"https://[::1]:8891/keylime"', "https://[::1]:8891/keylime"),
        ],
    ),
    "registrars.NAME.ca": (None, [('"/etc/ca"', Path("/etc/ca"))]),
    "registrars.NAME.client_cert": (None, []),  # see the registrars' rules below
    "registrars.NAME.client_key": (None, []),
    "registrars.NAME.tls_name": (None, [('"R.example"', "r.example")]),
    "registrars.NAME.insecure_plaintext": (False, [("false", False)]),
    "registrars.NAME.tenant": (None, [('"dns:acme.example"', "dns:acme.example")]),
    "registrars.NAME.contact": (
        None,
        [
            ('"192.0.2.7:8890"', "192.0.2.7:8890"),
            ('"[2001:db8::7]:65535"', "[2001:db8::7]:65535"),
        ],
    ),
    "registrars.NAME.agent_id": (
        None,
        [(f'"{UUID}"', UUID), ('"host-a.example"', "host-a.example"), (f'"{"a" * 80}"', "a" * 80)],
    ),
    "registrars.NAME.interval_s": (300.0, [("10", 10.0), ("86400", 86_400.0)]),
    "registrars.NAME.register_unread": (False, [("true", True)]),
    "audit.enabled": (False, [("true", True)]),
    "audit.path": (None, [('"/tmp/audit"', Path("/tmp/audit"))]),
    "audit.max_mb": (64, [("1", 1), ("100000", 100_000)]),
    "audit.keep": (8, [("1", 1), ("99", 99)]),
    "vtpm.enabled": (False, [("true", True)]),
    "vtpm.socket": (Path("/run/provider-proxy/vtpm.sock"), [('"/run/v"', Path("/run/v"))]),
    "vtpm.issuer": ("delegate", [('"tpm"', "tpm")]),
    "vtpm.swtpm_user": ("tss", [('"swtpm"', "swtpm")]),
    "vtpm.state_root": (Path("/var/lib/libvirt/swtpm"), [('"/srv/s"', Path("/srv/s"))]),
    "vtpm.helper": (Path("/run/provider-proxy-vtpm.sock"), [('"/run/h"', Path("/run/h"))]),
    "vtpm.max_vms": (4096, [("1", 1), ("100000", 100_000)]),
    "vtpm.ca_handle": (0x81000101, [("0x81000000", 0x81000000), ("0x81ffffff", 0x81FFFFFF)]),
    "log.format": ("text", [('"json"', "json"), ('"text"', "text")]),
    "log.level": ("info", [('"debug"', "debug"), ('"warning"', "warning"), ('"error"', "error")]),
    "logs.ima": (
        Path("/sys/kernel/security/ima/ascii_runtime_measurements"),
        [('"/tmp/ima"', Path("/tmp/ima"))],
    ),
    "logs.uefi": (
        Path("/sys/kernel/security/tpm0/binary_bios_measurements"),
        [('"/tmp/uefi"', Path("/tmp/uefi"))],
    ),
}

TEXT = "text"
FLAG = "true or false"
NUMBER = "a number"
WHOLE = "a whole number"
PATH = "a path"
HANDLE = "a persistent handle, 0x81000000 to 0x81ffffff"
PCRS = "a list of PCR numbers, 0 to 23"
ADDRESS = '"host:port", "[ipv6]:port" or "unix:/path"'
URL = '"https://host:port"'
CONTACT = '"address:port" with an IP address'
AGENT_ID = "1 to 80 letters, digits, '.', '_', '~' and '-'"
BANK = 'one of "sha1", "sha256", "sha384", "sha512"'

# key, a bad value as TOML, what the message says the value must be
BAD: list[tuple[str, str, str]] = [
    ("listen.crl_strict", '"yes"', FLAG),
    ("registrars.NAME.tls_name", '"a b"', "an IP address or a host's name"),
    ("keylime_agent.registrar_tls_name", '"*"', "an IP address or a host's name"),
    ("tpm.tcti", '"/dev/tpmrm0"', 'a tpm2-tss string: write "device:/dev/tpmrm0"'),
    ("state_dir", "1", TEXT),
    ("state_dir", '""', PATH),
    ("state_dir", '"a\\u0000b"', PATH),
    ("host_uuid", '"me"', "a UUID"),
    ("host_uuid", "7", TEXT),
    ("listen.address", "8890", TEXT),
    ("listen.proxy_protocol_from", '"192.0.2.7"', "a list of IP addresses and networks"),
    ("listen.proxy_protocol_from", '["localhost"]', "a list of IP addresses and networks"),
    ("listen.proxy_protocol_from", '["10.0.0.1/8"]', "a list of IP addresses and networks"),
    ("listen.front_peers", '"uid:33"', "a list of identities"),
    ("listen.front", "1", TEXT),
    ("listen.address", '"8890"', ADDRESS),
    ("listen.address", '":8890"', ADDRESS),
    ("listen.address", '"127.0.0.1"', ADDRESS),
    ("listen.address", '"127.0.0.1:"', ADDRESS),
    ("listen.address", '"127.0.0.1:65536"', ADDRESS),
    ("listen.address", '"127.0.0.1:-1"', ADDRESS),
    ("listen.address", '"127.0.0.1:http"', ADDRESS),
    ("listen.address", '"127.0.0.1:\u0661"', ADDRESS),
    ("listen.address", f'"127.0.0.1:{"1" * 5000}"', ADDRESS),
    ("listen.address", '"unix:relative"', ADDRESS),
    ("listen.address", '["127.0.0.1:1", 2]', TEXT),
    ("listen.tls_cert", "true", TEXT),
    ("listen.tls_key", "true", TEXT),
    ("listen.client_ca", '""', PATH),
    ("listen.client_crl", "1", TEXT),
    ("listen.crl_strict", "1", FLAG),
    ("listen.client_crl", '"credential:"', PATH),
    ("listen.client_crl", '"credential:../crl"', PATH),
    ("listen.client_crl", '"credential:.crl"', PATH),
    ("listen.client_crl", '"credential:a/crl"', PATH),
    ("listen.insecure_plaintext", "1", FLAG),
    ("listen.insecure_plaintext", '"yes"', FLAG),
    ("admin.address", '"9100"', ADDRESS),
    ("admin.address", "true", TEXT),
    ("tpm.tcti", "0", TEXT),
    ("tpm.ek_handle", "0x80ffffff", HANDLE),
    ("tpm.ek_handle", '"0x81010001"', HANDLE),
    ("tpm.ek_handle", "true", HANDLE),
    ("tpm.ak_handle", "0x82000000", HANDLE),
    ("tpm.ak_handle", "0x40000001", HANDLE),
    ("tpm.ak_algorithm", '"ECC"', 'one of "ecc", "rsa"'),
    ("tpm.ak_algorithm", "1", 'one of "ecc", "rsa"'),
    ("tpm.ak_algorithm", "[]", 'one of "ecc", "rsa"'),
    ("tpm.banks", '"sha256"', "a list of banks"),
    ("tpm.banks", "[]", "a list of banks"),
    ("tpm.banks", '["md5"]', BANK),
    ("tpm.banks", "[11]", BANK),
    ("tpm.hang_limit_s", "0", ">= 1"),
    ("tpm.hang_limit_s", "3601", "<= 3600"),
    ("tpm.ima_wait_ms", "-1", ">= 0"),
    ("tpm.ima_wait_ms", "10001", "<= 10000"),
    ("tpm.ima_wait_ms", '"20"', NUMBER),
    ("tpm.max_duty", "0", "> 0"),
    ("tpm.max_duty", "-1", ">= 0"),
    ("tpm.max_duty", "1.1", "<= 1"),
    ("tpm.max_duty", "true", NUMBER),
    ("tpm.max_duty", '"half"', NUMBER),
    ("tpm.owner_auth_file", "1", TEXT),
    ("tpm.endorsement_auth_file", '""', PATH),
    ("quoter.kind", '"yubikey"', "one of "),
    ("keylime_agent.url", "7", TEXT),
    ("keylime_agent.agent_id", "7", TEXT),
    ("keylime_agent.client_cert", '""', "a path"),
    ("keylime_agent.client_key", '""', "a path"),
    ("keylime_agent.registrar_url", "7", TEXT),
    ("keylime_agent.registrar_ca", '""', "a path"),
    ("keylime_agent.registrar_cert", '""', "a path"),
    ("keylime_agent.registrar_key", '""', "a path"),
    ("keylime_agent.ek_ca", '""', "a path"),
    ("keylime_agent.ek_ca", "[1]", "text"),
    ("keylime_agent.insecure_virtual_ek", "1", "true or false"),
    ("tpm.ek_cert_file", '""', "a path"),
    ("tpm.ek_chain_file", "1", "text"),
    ("tpm.insecure_sha1_bank", "1", "true or false"),
    ("keylime_agent.insecure_no_ek", "1", "true or false"),
    ("batch.window_ms", "-1", ">= 0"),
    ("batch.window_ms", "-0.001", ">= 0"),
    ("batch.window_ms", "60001", "<= 60000"),
    ("batch.window_ms", "inf", "<= 60000"),
    ("batch.window_ms", "nan", ""),
    ("batch.window_ms", "true", NUMBER),
    ("batch.window_ms", '"50"', NUMBER),
    ("batch.max_leaves", "0", ">= 1"),
    ("batch.max_leaves", "65537", "<= 65536"),
    ("batch.max_leaves", "1.5", WHOLE),
    ("batch.max_leaves", "true", WHOLE),
    ("batch.isolate_pcrs", "[24]", PCRS),
    ("batch.isolate_pcrs", "[-1]", PCRS),
    ("batch.isolate_pcrs", "[true]", PCRS),
    ("batch.isolate_pcrs", "10", PCRS),
    ("batch.isolate_pcrs", '["10"]', PCRS),
    ("limits.max_queue", "0", ">= 1"),
    ("limits.max_queue", "1e3", WHOLE),
    ("limits.max_connections", "0", ">= 1"),
    ("limits.max_connections", "100001", "<= 100000"),
    ("limits.max_connections_per_address", "0", ">= 1"),
    ("limits.default_timeout_ms", "0", ">= 1"),
    ("limits.max_timeout_ms", "600001", "<= 600000"),
    ("limits.busy_status", "200", "one of 503, 408, 500"),
    ("limits.busy_status", "true", "one of 503, 408, 500"),
    ("limits.drain_ms", "-1", ">= 0"),
    ("limits.drain_ms", "600001", "<= 600000"),
    ("tenant_defaults.pcr_allow", "[24]", PCRS),
    ("tenant_defaults.pcr_allow", '"all"', PCRS),
    ("tenant_defaults.identities", '"dns:a"', "a list of identities"),
    ("tenant_defaults.identities", "[1]", TEXT),
    ("tenant_defaults.identities", '["a"]', "identities: "),
    ("tenant_defaults.identities", '["dns:A"]', "identities: "),
    ("tenant_defaults.identities", '["sha256:00"]', "identities: "),
    ("tenant_defaults.identities", '["uid:-1"]', "identities: "),
    ("tenant_defaults.identities", '["cn:"]', "identities: "),
    ("tenant_defaults.vms", f'"{UUID}"', "a list of UUIDs"),
    ("tenant_defaults.vms", '["me"]', "a UUID"),
    ("tenant_defaults.rate", "0", ">= 0.001"),
    ("tenant_defaults.rate", "inf", "<= 1e+06"),
    ("tenant_defaults.burst", "0", ">= 1"),
    ("tenant_defaults.burst", "1.5", WHOLE),
    ("tenant_defaults.max_inflight", "0", ">= 1"),
    ("tenant_defaults.accept_unlisted", "0", FLAG),
    ("registrars.NAME.url", "1", TEXT),
    ("registrars.NAME.url", '""', URL),
    ("registrars.NAME.url", '"registrar.example:8891"', URL),
    ("registrars.NAME.url", '"ftp://registrar.example"', URL),
    ("registrars.NAME.url", '"https://"', URL),
    ("registrars.NAME.url", '"https://registrar.example:65536"', URL),
    ("registrars.NAME.url", '"https://registrar.example:0"', URL),
    ("registrars.NAME.url", '"https://user:word@registrar.example"', URL),
    ("registrars.NAME.url", '"https://registrar.example/?x"', URL),
    ("registrars.NAME.url", '"https://registrar.example/#x"', URL),
    ("registrars.NAME.url", '"https://registrar.example/a b"', URL),
    ("registrars.NAME.url", '"https://registr\u00e4r.example"', URL),
    ("registrars.NAME.url", '"https://[::1"', URL),
    ("registrars.NAME.url", f'"https://{"a" * 1024}"', URL),
    ("registrars.NAME.ca", "1", TEXT),
    ("registrars.NAME.client_cert", '""', PATH),
    ("registrars.NAME.client_key", "true", TEXT),
    ("registrars.NAME.insecure_plaintext", "1", FLAG),
    ("registrars.NAME.tenant", "1", TEXT),
    ("registrars.NAME.contact", "8890", TEXT),
    ("registrars.NAME.contact", '"192.0.2.7"', CONTACT),
    ("registrars.NAME.contact", '"192.0.2.7:0"', CONTACT),
    ("registrars.NAME.contact", '"192.0.2.7:65536"', CONTACT),
    ("registrars.NAME.contact", '"host.example:8890"', CONTACT),
    ("registrars.NAME.contact", '"2001:db8::7:8890"', CONTACT),
    ("registrars.NAME.contact", '"[192.0.2.7]:8890"', CONTACT),
    ("registrars.NAME.contact", f'"192.0.2.7:{"1" * 5000}"', CONTACT),
    ("registrars.NAME.agent_id", "1", TEXT),
    ("registrars.NAME.agent_id", '""', AGENT_ID),
    ("registrars.NAME.agent_id", '"../agents"', AGENT_ID),
    ("registrars.NAME.agent_id", '"a/b"', AGENT_ID),
    ("registrars.NAME.agent_id", f'"{"a" * 81}"', AGENT_ID),
    ("registrars.NAME.register_unread", '"yes"', "true or false"),
    ("registrars.NAME.interval_s", "9", ">= 10"),
    ("registrars.NAME.interval_s", "86401", "<= 86400"),
    ("audit.enabled", "1", FLAG),
    ("audit.path", "1", TEXT),
    ("audit.max_mb", "0", ">= 1"),
    ("audit.keep", "100", "<= 99"),
    ("vtpm.enabled", "1", FLAG),
    ("vtpm.socket", '""', PATH),
    ("vtpm.issuer", '"me"', 'one of "delegate", "tpm"'),
    ("vtpm.swtpm_user", "0", TEXT),
    ("vtpm.state_root", "1", TEXT),
    ("vtpm.helper", '""', PATH),
    ("vtpm.max_vms", "0", ">= 1"),
    ("vtpm.ca_handle", "0x82000000", HANDLE),
    ("vtpm.ca_handle", "true", HANDLE),
    ("log.format", '"xml"', 'one of "text", "json"'),
    ("log.level", '"INFO"', 'one of "debug", "info", "warning", "error"'),
    ("log.level", "6", 'one of "debug", "info", "warning", "error"'),
    ("logs.ima", "false", TEXT),
    ("logs.uefi", '""', PATH),
]


REGISTRAR_URL = "https://registrar.example:8891"


def document(key: str, value: str) -> dict[str, Any]:
    """A good file with one key set to a value, written as TOML."""
    data = tomllib.loads(PLAIN)
    data["registrars"] = {"NAME": {"url": REGISTRAR_URL}}
    *tables, name = key.split(".")
    at = data
    for table in tables:
        at = at.setdefault(table, {})
    at[name] = tomllib.loads(f"v = {value}")["v"]
    return data


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def all_keys() -> list[str]:
    """Every key that the dataclasses declare."""
    keys = []
    for field in dataclasses.fields(Config):
        kind = config_tables.TABLES.get(field.name)
        if "read" in field.metadata:
            keys.append(field.name)
        elif kind is not None:
            keys += [f"{field.name}.{f.name}" for f in dataclasses.fields(kind)]
        elif field.name != "tenants":  # which have the keys of tenant_defaults; see below
            kind = config_tables.NAMED_TABLES[field.name]
            keys += [f"{field.name}.NAME.{f.name}" for f in dataclasses.fields(kind)]
    return keys


def test_every_key_is_tested() -> None:
    assert sorted(KEYS) == sorted(all_keys())
    assert {key for key, _, _ in BAD} == set(all_keys())


def test_defaults() -> None:
    config = parse_config(document("listen.insecure_plaintext", "true"))
    defaults = {key: value_of(config, key) for key in KEYS}
    wanted: dict[str, Any] = {key: default for key, (default, _) in KEYS.items()}
    assert defaults == wanted | {
        "listen.insecure_plaintext": True,
        "registrars.NAME.url": REGISTRAR_URL,
    }


GOOD = [(key, text, value) for key, (_, values) in KEYS.items() for text, value in values]


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_good_values(key: str, text: str, value: object) -> None:
    got = value_of(parse_config(document(key, text)), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(("key", "text", "must"), BAD)
def test_bad_values_are_refused_by_name(key: str, text: str, must: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(document(key, text))
    assert str(caught.value).startswith(f"{key} must be {must}")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("stat_dir = '/x'", "stat_dir"),
        ("[batches]\nwindow_ms = 1", "batches"),
        ("[batch]\nwindow = 1", "batch.window"),
        ("[tpm]\nTCTI = 'embedded'", "tpm.TCTI"),
        ("[limits.more]\nx = 1", "limits.more"),
    ],
)
def test_unknown_keys_are_refused_by_name(text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is not a key; the known keys are "):
        parse_config(tomllib.loads(text))


@pytest.mark.parametrize("name", sorted(config_tables.TABLES))
def test_a_table_must_be_one(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be a table$"):
        parse_config({name: 1})


# --- TLS --------------------------------------------------------------------------------------------

TLS = 'tls_cert = "/c"\ntls_key = "/k"\n'


@pytest.mark.parametrize(
    ("listen", "message"),
    [
        ("", "listen.tls_cert and listen.tls_key must be set"),
        ('tls_cert = "/c"', "listen.tls_cert and listen.tls_key must be set"),
        ('tls_key = "/k"', "listen.tls_cert and listen.tls_key must be set"),
        ('client_ca = "/a"', "listen.tls_cert and listen.tls_key must be set"),
        ("insecure_plaintext = false", "listen.tls_cert and listen.tls_key must be set"),
        ("insecure_plaintext = true\n" + TLS, "listen.insecure_plaintext must not stand beside"),
        (
            'insecure_plaintext = true\nclient_ca = "/a"',
            "listen.insecure_plaintext must not stand beside",
        ),
        (TLS + 'client_crl = "/l"', "listen.client_crl needs client_ca"),
        (TLS + "address = []", "listen.address must name at least one address"),
    ],
)
def test_tls_rules(listen: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tomllib.loads("[listen]\n" + listen))
    assert str(caught.value).startswith(message)


def test_with_tls_any_address_is_fine() -> None:
    text = f'[listen]\n{TLS}client_ca = "/a"\naddress = ["0.0.0.0:443", "[::]:443"]'
    listen = parse_config(tomllib.loads(text)).listen
    assert listen.address == ("0.0.0.0:443", "[::]:443")
    assert (listen.tls_cert, listen.tls_key) == (Path("/c"), Path("/k"))
    assert listen.client_ca == Path("/a")


LOCAL = ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "unix:/run/x"]
FOREIGN = [
    "0.0.0.0:1",
    "[::]:1",
    "192.0.2.1:1",
    "[fe80::1]:1",
    "example.org:1",
    "localhost.example.org:1",
    "127.example.org:1",  # a name that somebody else resolves
    "127.0.0.1.example.org:1",
]


@pytest.mark.parametrize("address", LOCAL)
def test_plaintext_on_this_machine(address: str) -> None:
    text = f'{PLAIN}address = "{address}"\n[admin]\naddress = "{address}"'
    assert parse_config(tomllib.loads(text)).listen.address == (address,)


@pytest.mark.parametrize("address", FOREIGN)
def test_no_plaintext_elsewhere(address: str) -> None:
    for addresses in (f'"{address}"', f'["127.0.0.1:1", "{address}"]'):
        with pytest.raises(ConfigError) as caught:
            parse_config(tomllib.loads(f"{PLAIN}address = {addresses}"))
        assert str(caught.value) == (
            f"listen.insecure_plaintext is for loopback and unix sockets only, not {address}"
        )


@pytest.mark.parametrize("address", FOREIGN)
def test_the_admin_door_is_local_even_beside_tls(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^admin.address is for loopback and unix sockets only"):
        parse_config(tomllib.loads(f'[listen]\n{TLS}[admin]\naddress = "{address}"'))


# --- tenants ----------------------------------------------------------------------------------------

ALICE = '[tenants.alice]\nidentities = ["dns:alice.example.org"]\n'


def tenants_of(text: str) -> Mapping[str, TenantRules]:
    return parse_config(tomllib.loads(PLAIN + text)).tenants


def test_no_tenants_by_default() -> None:
    assert tenants_of("") == {}


def test_what_a_tenant_does_not_say_the_defaults_say() -> None:
    text = (
        "[tenant_defaults]\nrate = 7\npcr_allow = [0]\naccept_unlisted = false\n"
        f'{ALICE}rate = 9\nvms = ["{UUID}"]\n[tenants.bob]\nidentities = ["uid:0", "cn:bob"]\n'
    )
    rules = tenants_of(text)
    assert list(rules) == ["alice", "bob"]
    assert rules["alice"].rate == 9.0
    assert rules["alice"].pcr_allow == 1
    assert rules["alice"].vms == {uuid.UUID(UUID)}
    assert rules["bob"].rate == 7.0
    assert rules["bob"].vms == frozenset()
    assert rules["bob"].identities == ("uid:0", "cn:bob")


@pytest.mark.parametrize(
    "identity",
    [
        "spiffe://example.org/ns/a",
        "dns:alice.example.org",
        "email:alice@example.org",
        "cn:Alice Example",
        "sha256:" + "0a" * 32,
        "uid:1000",
    ],
)
def test_forms_of_an_identity(identity: str) -> None:
    rules = tenants_of(f'[tenants.alice]\nidentities = ["{identity}"]\n')
    assert rules["alice"].identities == (identity,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tenants = 1", "tenants must be tables"),
        ("[tenants]\nalice = 1", "tenants.alice must be a table"),
        ("[tenants.alice]", "tenants.alice.identities must name at least one identity"),
        ("[tenants.alice]\nidentities = []", "tenants.alice.identities must name at least one"),
        (ALICE + "rat = 1", "tenants.alice.rat is not a key"),
        (ALICE + "rate = 0", "tenants.alice.rate must be >= 0.001"),
        (ALICE + "pcr_allow = [24]", "tenants.alice.pcr_allow must be a list of PCR numbers"),
        (ALICE + "accept_unlisted = true", "tenants.alice.accept_unlisted belongs in"),
        ('[tenants."a:b"]\nidentities = ["uid:1"]', "tenants.a:b must be a name of letters"),
        ('[tenants.""]\nidentities = ["uid:1"]', "tenants. must be a name of letters"),
        (f'[tenants.{"a" * 64}]\nidentities = ["uid:1"]', f"tenants.{'a' * 64} must be a name"),
        (
            ALICE + ALICE.replace("tenants.alice", "tenants.bob"),
            "tenants.bob.identities: dns:alice.example.org is already in alice",
        ),
        (
            '[tenant_defaults]\nidentities = ["uid:1"]',
            "tenant_defaults.identities belongs in [tenants.NAME]",
        ),
        (
            f'[tenant_defaults]\nvms = ["{UUID}"]',
            "tenant_defaults.vms belongs in [tenants.NAME]",
        ),
    ],
)
def test_tenants_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**tomllib.loads(PLAIN), **tomllib.loads(text)})
    assert str(caught.value).startswith(message)


# --- registrars -------------------------------------------------------------------------------------

ONE = f'[registrars.one]\nurl = "{REGISTRAR_URL}"\n'
PLAIN_ONE = '[registrars.one]\nurl = "http://registrar.example:8890"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("registrars = 1", "registrars must be tables, [registrars.NAME]"),
        ("[registrars]\none = 1", "registrars.one must be a table"),
        ('[registrars."a/b"]\nurl = "https://r"', "registrars.a/b must be a name of letters"),
        (ONE + "verify = false", "registrars.one.verify is not a key; the known keys are "),
        ("[registrars.one]", "registrars.one.url must be set"),
        (PLAIN_ONE, "registrars.one.url must begin with https:// (or set registrars.one.insecure"),
        (
            PLAIN_ONE + "insecure_plaintext = true\nca = '/ca'",
            "registrars.one.insecure_plaintext must not stand beside TLS files",
        ),
        (
            ONE + "insecure_plaintext = true",
            "registrars.one.insecure_plaintext must not be set with an https:// URL",
        ),
        (ONE + "client_cert = '/c'", "registrars.one.client_cert and client_key belong together"),
        (ONE + "client_key = '/k'", "registrars.one.client_cert and client_key belong together"),
        (ONE + "tenant = 'nobody'", "registrars.one.tenant must be a [tenants.NAME]"),
        (
            ONE + "agent_id = 'host-a'\n" + ONE.replace("one", "two") + "agent_id = 'HOST-A'",
            "registrars.two.agent_id is that of registrars.one too",
        ),
    ],
)
def test_registrars_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**tomllib.loads(PLAIN), **tomllib.loads(text)})
    assert str(caught.value).startswith(message)


def test_contacts_are_split() -> None:
    assert split_address(parse_contact("192.0.2.7:8890")) == ("192.0.2.7", 8890)
    assert split_address(parse_contact("[2001:DB8::7]:1")) == ("2001:db8::7", 1)


def test_an_agents_keys_are_not_ours_to_register() -> None:
    table = RegistrarTable(url=REGISTRAR_URL)
    check_registrars({"one": table}, {}, quoter="tpm")
    check_registrars({}, {}, quoter="keylime-agent")
    with pytest.raises(ConfigError, match=r'^registrars.one needs quoter.kind = "tpm"$'):
        check_registrars({"one": table}, {}, quoter="keylime-agent")


def test_registrars() -> None:
    text = PLAIN + ALICE + ONE + "client_cert = '/c'\nclient_key = '/k'\ntenant = 'alice'\n"
    text += PLAIN_ONE.replace("one", "two") + "insecure_plaintext = true\n"
    registrars = parse_config(tomllib.loads(text)).registrars
    assert list(registrars) == ["one", "two"]
    assert registrars["one"].client_cert == Path("/c")
    assert registrars["one"].tenant == "alice"
    assert registrars["two"].insecure_plaintext


def test_ids_differ_by_host_name_and_url_and_stay() -> None:
    host, other = uuid.UUID(UUID), uuid.UUID(int=1)
    table = RegistrarTable(url=REGISTRAR_URL)
    ids = [
        agent_id_of("one", table, host),
        agent_id_of("two", table, host),
        agent_id_of("one", RegistrarTable(url="https://elsewhere.example"), host),
        agent_id_of("one", table, other),
    ]
    assert len(set(ids)) == 4
    assert all(str(uuid.UUID(each)) == each for each in ids)
    # Known to tenants: it must never change.
    assert ids[0] == "543aea66-c0f2-52a8-b116-44d585a8a283"
    assert agent_id_of("one", RegistrarTable(url=REGISTRAR_URL, agent_id="mine"), host) == "mine"


# --- what two keys say together ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[limits]\ndefault_timeout_ms = 60001",
            "limits.default_timeout_ms must be <= limits.max_timeout_ms",
        ),
        (
            "[limits]\nmax_timeout_ms = 29999",
            "limits.default_timeout_ms must be <= limits.max_timeout_ms",
        ),
        ("[tpm]\nak_handle = 0x81010001", "tpm.ak_handle must differ from tpm.ek_handle"),
        *(
            (
                f'[vtpm]\nissuer = "tpm"\nca_handle = {handle}',
                "vtpm.ca_handle must differ from tpm.ek_handle and tpm.ak_handle",
            )
            for handle in ("0x81010001", "0x81000100")
        ),
    ],
)
def test_contradictions(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tomllib.loads(PLAIN + text))
    assert str(caught.value) == message


AGENT = """
[quoter]
kind = "keylime-agent"
[keylime_agent]
url = "https://127.0.0.1:9002"
agent_id = "host-a"
client_cert = "/c"
client_key = "/k"
registrar_url = "https://registrar.example:8891"
registrar_ca = "/ca"
ek_ca = "/cas"
"""


def agent_config(*changes: tuple[str, str]) -> Config:
    text = PLAIN + AGENT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_config(tomllib.loads(text))


def test_an_agent_as_the_quoter() -> None:
    config = agent_config()
    assert config.quoter.kind == "keylime-agent"
    assert config.keylime_agent.agent_id == "host-a"
    agent_config(
        ("https://127.0.0.1", "http://127.0.0.1"),
        ('client_cert = "/c"\n', ""),
        ('client_key = "/k"\n', ""),
    )
    agent_config(('ek_ca = "/cas"', "insecure_no_ek = true"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('url = "https://127.0.0.1:9002"\n', "", "keylime_agent.url must be set"),
        ('agent_id = "host-a"\n', "", "keylime_agent.agent_id must be set"),
        ('agent_id = "host-a"', 'agent_id = ""', "keylime_agent.agent_id must be 1 to 80"),
        (
            '"https://127.0.0.1:9002"',
            '"ftp://127.0.0.1:9"',
            "keylime_agent.url must be an https URL",
        ),
        (
            '"https://127.0.0.1:9002"',
            '"http://10.0.0.1:9"',
            "keylime_agent.url must be an https URL",
        ),
        ('"https://127.0.0.1:9002"', '"https://"', "keylime_agent.url must be an https URL"),
        ('"https://registrar', '"http://registrar', "registrar_url must be an https URL"),
        ('client_key = "/k"\n', "", "client_cert and client_key belong together"),
        ('client_cert = "/c"\nclient_key = "/k"\n', "", "client_cert must be set for an agent"),
        (
            'registrar_ca = "/ca"',
            'registrar_cert = "/ca"',
            "registrar_cert and registrar_key belong together",
        ),
        ('ek_ca = "/cas"\n', "", "ek_ca must be set, or insecure_no_ek, and not both"),
        ('ek_ca = "/cas"', 'ek_ca = "/c"\ninsecure_no_ek = true', "and not both"),
        ("[quoter]", '[tpm]\nbanks = ["sha384", "sha256"]\n[quoter]', "tpm.banks must be one bank"),
    ],
)
def test_an_agent_that_is_only_half_described(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent_config((old, new))


def test_sha_1_needs_the_word_insecure() -> None:
    text = PLAIN + '[tpm]\nbanks = ["sha256", "sha1"]\n'
    with pytest.raises(ConfigError, match=r"tpm\.banks: sha1 values can be forged"):
        parse_config(tomllib.loads(text))
    config = parse_config(tomllib.loads(text + "insecure_sha1_bank = true\n"))
    assert config.tpm.banks == (HashAlg.SHA256, HashAlg.SHA1)


def test_values_are_frozen() -> None:
    config = parse_config(tomllib.loads(PLAIN))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch.window_ms = 1.0  # type: ignore[misc]


# --- secrets ----------------------------------------------------------------------------------------


def secret(path: Path, data: bytes = b"s3cret", mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_no_path_is_no_secret() -> None:
    assert read_secret("k", None) == b""


@pytest.mark.parametrize(
    ("data", "value"),
    [(b"a", b"a"), (b"a\n", b"a"), (b"a\n\n", b"a\n"), (b" a\r\n", b" a\r"), (b"", b"")],
)
def test_a_final_newline_is_no_part_of_a_secret(tmp_path: Path, data: bytes, value: bytes) -> None:
    assert read_secret("k", secret(tmp_path / "s", data)) == value


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o700])
def test_good_modes(tmp_path: Path, mode: int) -> None:
    assert read_secret("k", secret(tmp_path / "s", mode=mode)) == b"s3cret"


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret(tmp_path / "s", mode=mode)
    with pytest.raises(HostError) as caught:
        read_secret("tpm.owner_auth_file", path)
    assert str(caught.value).startswith(
        f"tpm.owner_auth_file: {path} must not be readable by others: chmod"
    )


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"^tpm.owner_auth_file: cannot read .*/none: "):
        read_secret("tpm.owner_auth_file", tmp_path / "none")


def test_a_secret_is_a_plain_file(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"^k: "):
        read_secret("k", tmp_path)
    with pytest.raises(HostError, match="must be a plain file"):
        read_secret("k", Path(os.devnull))


def test_a_symbolic_link_to_a_good_secret_is_fine(tmp_path: Path) -> None:
    """As Kubernetes and systemd's credentials lay them out."""
    target = secret(tmp_path / "s")
    (tmp_path / "link").symlink_to(target)
    assert read_secret("k", tmp_path / "link") == b"s3cret"


def test_no_vtpms_beside_a_keylime_agent() -> None:
    """A client of an agent has a nonce of its own choice signed, and so a claim."""
    config = parse_config(tomllib.loads(PLAIN + "[vtpm]\nenabled = true\n"))
    agent = dataclasses.replace(config.quoter, kind="keylime-agent")
    with pytest.raises(ConfigError, match=r"vtpm\.enabled needs"):
        config_whole._check_whole(dataclasses.replace(config, quoter=agent))


# --- credentials ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "path"),
    [
        ("/run/credentials/x.service", "/run/credentials/x.service/secret_tls.key"),
        (None, "/run/credentials/provider-proxy.service/secret_tls.key"),
        ("", "/run/credentials/provider-proxy.service/secret_tls.key"),
        ("relative", "/run/credentials/provider-proxy.service/secret_tls.key"),
    ],
)
def test_a_credential_is_a_path(
    monkeypatch: pytest.MonkeyPatch, directory: str | None, path: str
) -> None:
    if directory is None:
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    else:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", directory)
    text = '[listen]\ntls_cert = "/c"\ntls_key = "credential:secret_tls.key"\n'
    assert parse_config(tomllib.loads(text)).listen.tls_key == Path(path)


def test_a_credential_s_group_bits_are_the_mask_of_its_acl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd makes them 0440 root:root, with an ACL for the unit's user."""
    path = tmp_path / "secret_owner"
    path.write_text("password\n")
    path.chmod(0o440)
    if os.geteuid() != 0:  # of root's own files a group may read
        with pytest.raises(HostError, match="must not be readable by others"):
            read_secret("tpm.owner_auth_file", path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_secret("tpm.owner_auth_file", path) == b"password"
    path.chmod(0o444)
    with pytest.raises(HostError, match="must not be readable by others"):
        read_secret("tpm.owner_auth_file", path)
