"""The tables of the watcher's file: a table is a dataclass, a key is one of its fields.

A field's metadata says how to read and check the value (`read`) and what it means (`doc`). `config`
reads the file. docs/reference.md is made from these tables.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from provider_proxy.common.addresses import is_loopback, split_address
from provider_proxy.common.settings.schema import setting, table_of
from provider_proxy.common.settings.values import (
    fail,
    integer,
    number,
    one_of,
    read_agent_id,
    read_choice,
    read_contact,
    read_flag,
    read_host,
    read_label,
    read_path,
    read_paths,
    read_pcrs,
    read_safe_url,
    read_text,
    read_uuid,
    read_webhook_url,
)
from provider_proxy.evidence.logs.ima_judge import Violations
from provider_proxy.evidence.logs.judge import DEFAULT_UEFI_PCRS
from provider_proxy.evidence.model import HashAlg
from provider_proxy.evidence.vtpm_link import STATES

MAX_COMMAND_WORDS = 100


def _read_ip(key: str, value: object) -> str:
    try:
        return str(ipaddress.ip_address(read_text(key, value)))
    except ValueError:
        raise fail(key, "an IP address") from None


def _read_admin(key: str, value: object) -> str:
    text: str = read_contact(key, value)
    if not is_loopback(split_address(text)[0]):
        raise fail(key, "a loopback address and a port")
    return text


def _read_bank(key: str, value: object) -> HashAlg:
    return HashAlg.from_label(one_of(*(alg.label for alg in HashAlg))(key, value))


def _read_argv(key: str, value: object) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= MAX_COMMAND_WORDS
        or not all(isinstance(word, str) and "\0" not in word for word in value)
        or not value[0].startswith("/")
    ):
        raise fail(key, "a list of words, the first of them a program's absolute path")
    return tuple(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRules:
    """`[defaults]` and `[hosts.NAME]`: one host, its policy and how to ask it."""

    provider_ip: str = setting(
        read_host, "", "Where the host's proxy answers: IP address or name. Needed."
    )
    provider_port: int = setting(integer(1, 65535), 8890, "The proxy's port.")
    provider: str | None = setting(
        read_label,
        None,
        "The host's provider: hosts of one provider share the memory for large answers.",
    )
    mode: str = setting(
        one_of("pull", "push"),
        "pull",
        "For `bridge`: your verifier polls the host's agent, or (experimental) the agent posts to it.",
    )
    need_provider_quote: bool = setting(
        read_flag, True, "Whether the host is asked; if not, it is only listed."
    )
    uuid: str | None = setting(
        read_agent_id, None, "The host's id at your registrar; reports contain it."
    )
    registrar: str | None = setting(
        read_label,
        None,
        "A [registrars.NAME] that gives the host's AK and EK; they are checked and pinned.",
    )
    pin: str | None = setting(
        read_label, None, "Name of the host's pin; the host's own by default."
    )
    tls_ca: Path | None = setting(
        read_path, None, "CA of the proxy's certificate, PEM; the system's CAs by default."
    )
    tls_cert: Path | None = setting(read_path, None, "Client certificate for the proxy, PEM.")
    tls_key: Path | None = setting(read_path, None, "Private key of tls_cert, PEM.")
    tls_name: str | None = setting(
        read_host, None, "Name in the proxy's certificate; provider_ip by default."
    )
    insecure_plaintext: bool = setting(read_flag, False, "No TLS. For proxies on loopback only.")
    interval_s: float = setting(number(0.1, 86_400), 10.0, "Seconds from one question to the next.")
    jitter: float = setting(
        number(0, 0.5), 0.1, "Random variation of the interval, as a share of it."
    )
    timeout_s: float = setting(
        number(0.1, 600), 30.0, "How long a whole answer may take, in seconds."
    )
    round_limit_s: float = setting(
        number(0.1, 7200),
        120.0,
        "How long a round may take, including all questions and retries, in seconds; then FAILED.",
    )
    max_age_s: float = setting(
        number(0.1, 3600), 60.0, "How old a nonce may be when its answer comes, in seconds."
    )
    max_retries: int = setting(
        integer(0, 100), 5, "Retries in a round without evidence, before FAILED."
    )
    retry_interval_s: float = setting(
        number(0.1, 3600), 2.0, "Wait before the first retry; it doubles with each, in seconds."
    )
    max_retry_s: float = setting(
        number(0.1, 3600), 60.0, "The longest wait, whatever Retry-After says, in seconds."
    )
    on_invalid: str = setting(
        one_of("continue", "stop"),
        "continue",
        "After INVALID_QUOTE: continue at the interval, or stop until SIGHUP.",
    )
    bank: HashAlg = setting(_read_bank, HashAlg.SHA256, "PCR bank to ask for.")
    tpm_policy: Path | None = setting(
        read_path, None, "PCR values in Keylime's tpm_policy JSON; a file."
    )
    insecure_trust_on_first_use: bool = setting(
        read_flag, False, "Trust the values of first_use_pcrs in the first answer from then on."
    )
    first_use_pcrs: int = setting(read_pcrs, 0, "PCRs for insecure_trust_on_first_use.")
    insecure_any_state: bool = setting(
        read_flag, False, "No policy: proves only that some state was signed."
    )
    ima: bool = setting(read_flag, False, "Whether PCR 10 is asked for and the IMA list replayed.")
    runtime_policy: Path | None = setting(
        read_path, None, "Files that IMA may have measured, Keylime's runtime policy JSON; a file."
    )
    runtime_policy_key: Path | None = setting(
        read_path, None, "Key that must have signed runtime_policy (DSSE), PEM; a file."
    )
    ima_violations: Violations = setting(
        read_choice(Violations),
        Violations.REFUSE,
        "A file that was written to while IMA measured it: refuse or count it.",
    )
    uefi: bool = setting(read_flag, False, "Whether the firmware's event log is replayed.")
    uefi_pcrs: int = setting(read_pcrs, DEFAULT_UEFI_PCRS, "PCRs that the event log must lead to.")
    boot_policy: Path | None = setting(
        read_path, None, "Digests that may be extended into a PCR, JSON; a file."
    )
    vm: UUID | None = setting(
        read_uuid, None, "VM that must be linked to the host; asked for with each quote."
    )
    vm_ek: Path | None = setting(
        read_path, None, "EK of that VM's vTPM: TPM2B_PUBLIC, raw or base64; a file."
    )
    vm_least: str = setting(
        one_of(*STATES),
        STATES[0],
        ("The least that the host must know of that EK (docs/vtpm.md#what-each-state-says)."),
    )


OWN_KEYS = ("provider_ip", "uuid", "pin", "vm", "vm_ek")
"""Keys that must differ between hosts, so `[defaults]` must not have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrarTable:
    """`[registrars.NAME]`: one of your own registrars (Keylime's)."""

    url: str | None = setting(read_safe_url, None, "Its https URL, port 8891 as a rule. Needed.")
    ca: Path | None = setting(
        read_path, None, "CA of its certificate, PEM; the system's CAs by default."
    )
    cert: Path | None = setting(
        read_path, None, "Client certificate, PEM; the registrar demands one."
    )
    key: Path | None = setting(read_path, None, "Its private key, PEM.")
    tls_name: str | None = setting(
        read_host, None, "Name in its certificate; the URL's host by default."
    )
    ek_ca: tuple[Path, ...] = setting(
        read_paths,
        (),
        (
            "The TPM makers' CAs that vouch for EKs: directories or PEM bundles "
            "(docs/ek-certificates.md)."
        ),
    )
    insecure_no_ek: bool = setting(
        read_flag, False, "Check no EK certificate: a software TPM is accepted as a chip."
    )
    insecure_virtual_ek: bool = setting(
        read_flag, False, "Accept virtual TPMs whose CAs are in `ek_ca` as chips."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """`[webhook]`: a URL that gets a report of each change."""

    url: str | None = setting(
        read_webhook_url, None, "Where reports are posted; http on loopback only."
    )
    secret_file: Path | None = setting(
        read_path, None, "File with the key of the signature; readable only by its owner. Needed."
    )
    ca: Path | None = setting(
        read_path, None, "CA of its certificate, PEM; the system's CAs by default."
    )
    tls_name: str | None = setting(
        read_host, None, "Name in its certificate; the URL's host by default."
    )
    timeout_s: float = setting(number(0.1, 120), 10.0, "How long one try may take, in seconds.")
    max_tries: int = setting(integer(1, 100), 8, "Tries of a report before it is dropped.")
    retry_interval_s: float = setting(
        number(0.05, 3600), 1.0, "Wait before the second try; it doubles with each, in seconds."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`[command]`: a program that is started for each change, the report on its stdin."""

    argv: tuple[str, ...] = setting(_read_argv, (), "Program and arguments; no shell.")
    timeout_s: float = setting(
        number(0.1, 3600), 30.0, "How long it may run before it is ended, in seconds."
    )
    max_running: int = setting(integer(1, 100), 4, "How many may run at once.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsTable:
    """`[metrics]`: Prometheus' text format in a file."""

    textfile: Path | None = setting(
        read_path, None, "File for node_exporter's textfile collector; replaced as a whole."
    )
    interval_s: float = setting(number(0.1, 3600), 15.0, "How often it is written, in seconds.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeTable:
    """`[bridge]`: the hosts as agents of your own Keylime; only for `bridge`."""

    registrar: str | None = setting(
        read_label,
        None,
        "A [registrars.NAME] with cert and key, where the agents register. Needed.",
    )
    client_ca: Path | None = setting(
        read_path,
        None,
        "CA of the client certificates of your verifier and its tools, PEM. Needed for mode pull.",
    )
    listen_ip: str = setting(_read_ip, "127.0.0.1", "IP address at which the agents listen.")
    contact_ip: str | None = setting(
        _read_ip, None, "IP address at which your verifier reaches them; listen_ip by default."
    )
    first_port: int = setting(
        integer(1, 65535), 20_000, "First of the agents' ports; outside the ephemeral ones."
    )
    last_port: int = setting(integer(1, 65535), 29_999, "Last of the agents' ports.")
    state_dir: Path | None = setting(
        read_path,
        None,
        "Directory for clock states, ports and keys; `bridge` below state_dir by default.",
    )
    keys: Path | None = setting(
        read_path,
        None,
        "The bridge's keys, from `bridge make-keys`; by default created in its state_dir.",
    )
    hold_s: float = setting(
        number(0.1, 50),
        3.0,
        "How long a poll may wait for a host's answer, in seconds; then 408.",
    )
    after_crash: str = setting(
        one_of("accept", "refuse"),
        "accept",
        "A TPM that lost power may show a clock that is a little behind (safe = 0).",
    )
    admin: str = setting(
        _read_admin, "127.0.0.1:8897", "Address for status, readiness and metrics; on loopback."
    )
    register_interval_s: float = setting(
        number(10, 86_400), 300.0, "How often the agents' records are checked, in seconds."
    )
    register_unread: bool = setting(
        read_flag,
        False,
        "Register even if a record cannot be read first and the registrar would let it be replaced.",
    )
    verifier_url: str | None = setting(
        read_safe_url,
        None,
        "Your verifier, https, port 8881 as a rule: for reactivate, and needed for mode push.",
    )
    verifier_ca: Path | None = setting(
        read_path, None, "CA of its certificate, PEM; the system's CAs by default."
    )
    verifier_cert: Path | None = setting(
        read_path,
        None,
        "Client certificate, PEM: for reactivate, and in mode push to read policies.",
    )
    verifier_key: Path | None = setting(read_path, None, "Its private key, PEM.")
    verifier_tls_name: str | None = setting(
        read_host, None, "Name in its certificate; the URL's host by default."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """The whole file."""

    state_dir: Path = setting(
        read_path, Path("/var/lib/provider-proxy-watch"), "Directory for what was accepted."
    )
    state: str | None = setting(
        read_text, None, "PostgreSQL of a fleet, postgresql://…; the hosts then come from it."
    )
    member: str | None = setting(
        read_label,
        None,
        "Name of this process in a fleet; the machine's name and the process id by default.",
    )
    admin: str | None = setting(
        _read_admin,
        None,
        "Address for a fleet's page, readiness and metrics; on loopback. Only with state.",
    )
    pins: Path = setting(
        read_path,
        Path("/var/lib/provider-proxy-watch/pins"),
        "Directory of the pinned hosts; see `pin add`.",
    )
    save_interval_s: float = setting(
        number(0.05, 60), 1.0, "How often accepted clock states are saved, all at once, in seconds."
    )
    ek_dir: Path | None = setting(
        read_path,
        None,
        "Directory with an empty file for each EK that is now linked to a trusted host.",
    )
    defaults: HostRules = table_of(HostRules)
    hosts: Mapping[str, HostRules] = field(default_factory=dict)
    registrars: Mapping[str, RegistrarTable] = field(default_factory=dict)
    webhook: Webhook = table_of(Webhook)
    command: Command = table_of(Command)
    metrics: MetricsTable = table_of(MetricsTable)
    bridge: BridgeTable = table_of(BridgeTable)


TABLES: dict[str, type[Any]] = {
    "defaults": HostRules,
    "webhook": Webhook,
    "command": Command,
    "metrics": MetricsTable,
    "bridge": BridgeTable,
}
