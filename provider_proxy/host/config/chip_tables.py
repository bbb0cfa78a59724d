"""The configuration file's tables about the TPM: `[tpm]`, `[quoter]`, `[keylime_agent]`, `[vtpm]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from provider_proxy.common.settings.schema import setting
from provider_proxy.common.settings.values import (
    fail,
    integer,
    number,
    one_of,
    read_agent_id,
    read_banks,
    read_duty,
    read_flag,
    read_handle,
    read_host,
    read_path,
    read_paths,
    read_safe_url,
    read_text,
)
from provider_proxy.evidence.model import HashAlg

KEYLIME_AGENT = "keylime-agent"


def read_tcti(key: str, value: object) -> str:
    """A tpm2-tss string, which begins with the name of a TCTI (a way to reach the TPM)."""
    text = read_text(key, value)
    if text.startswith("/"):
        raise fail(key, f'a tpm2-tss string: write "device:{text}"')
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Tpm:
    """`[tpm]`: the chip."""

    tcti: str = setting(
        read_tcti,
        "device:/dev/tpmrm0",
        (
            'How to reach the TPM, a tpm2-tss string. `"embedded"` starts a swtpm below '
            "`state_dir`: software, not a hardware TPM. There is no fallback."
        ),
    )
    ek_handle: int = setting(
        read_handle,
        0x81010001,
        (
            "Persistent handle of the EK. The EK is made there if the handle is empty; the "
            "start fails if it holds something else."
        ),
    )
    ak_handle: int = setting(
        read_handle,
        0x81000100,
        (
            "Persistent handle of the AK. The AK is made there if the handle is empty; the "
            "start fails if it holds something else."
        ),
    )
    ak_algorithm: str = setting(
        one_of("ecc", "rsa"),
        "ecc",
        (
            "Algorithm of the AK when it is made: P-256 with ECDSA, or RSA-2048 with RSASSA, "
            "both with SHA-256. The start fails if the handle holds an AK of the other kind."
        ),
    )
    banks: tuple[HashAlg, ...] = setting(
        read_banks,
        (HashAlg.SHA256,),
        (
            "PCR banks that tenants may ask for. Each is tried at start. Keylime's own check "
            "takes the bank of the AK's hash only."
        ),
    )
    max_duty: float = setting(
        read_duty,
        0.5,
        (
            "Share of the chip's time that all commands of the proxy together may take. IMA "
            "needs the rest: programs wait while IMA waits for the chip."
        ),
    )
    ima_wait_ms: float = setting(
        number(0, 10_000),
        30.0,
        (
            "Where an IMA policy is active: how long IMA may wait for the proxy's commands "
            "on average, in ms. It limits the duty to 2 * this / the time of a quote (at "
            "least 0.05), below `max_duty`. 0 sets no limit."
        ),
    )
    hang_limit_s: float = setting(
        number(1, 3600),
        120.0,
        (
            "A TPM command that takes longer than this many seconds ends the process (exit "
            "code 3); systemd starts it again."
        ),
    )
    owner_auth_file: Path | None = setting(
        read_path,
        None,
        (
            "File with the owner hierarchy's authorisation, readable by its owner alone. "
            "Needed once, to make keys, where the hierarchy has one."
        ),
    )
    endorsement_auth_file: Path | None = setting(
        read_path,
        None,
        "File with the endorsement hierarchy's authorisation; each registration needs it, too.",
    )
    ek_cert_file: Path | None = setting(
        read_path,
        None,
        (
            "The EK's certificate, PEM or DER, where the chip does not carry it. It must be "
            "for the EK at `ek_handle`."
        ),
    )
    ek_chain_file: Path | None = setting(
        read_path,
        None,
        (
            "CAs between the EK's certificate and its maker's root, PEM or DER, for the "
            "tenants; used in place of those in the chip."
        ),
    )
    insecure_sha1_bank: bool = setting(
        read_flag, False, "Allow `sha1` in `banks`, although its values can be forged."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuoterTable:
    """`[quoter]`: who quotes."""

    kind: str = setting(
        one_of("tpm", KEYLIME_AGENT),
        "tpm",
        (
            "What signs the quotes: the host's TPM, or a Keylime agent that owns it "
            "(docs/keylime-agent.md)."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeylimeAgent:
    """`[keylime_agent]`: the agent that owns the chip, where `quoter.kind` says so."""

    url: str | None = setting(
        read_safe_url,
        None,
        "URL of the agent: https, or http on loopback for an agent without mTLS.",
    )
    agent_id: str | None = setting(read_agent_id, None, "Its id at the registrar.")
    client_cert: Path | None = setting(
        read_path, None, "Certificate for the agent, of a CA in its `trusted_client_ca`, PEM."
    )
    client_key: Path | None = setting(
        read_path, None, "Its private key, PEM; not readable by others."
    )
    registrar_url: str | None = setting(
        read_safe_url,
        None,
        (
            "The provider's own registrar, where the agent is registered: https, or http on "
            "loopback."
        ),
    )
    registrar_ca: Path | None = setting(read_path, None, "CA of the registrar's certificate, PEM.")
    registrar_tls_name: str | None = setting(
        read_host,
        None,
        "Name in the registrar's certificate; the host of `registrar_url` by default.",
    )
    registrar_cert: Path | None = setting(read_path, None, "Certificate for the registrar, PEM.")
    registrar_key: Path | None = setting(
        read_path, None, "Its private key, PEM; not readable by others."
    )
    ek_ca: tuple[Path, ...] = setting(
        read_paths,
        (),
        (
            "The TPM makers' CAs that the EK's certificate must lead to: directories or PEM "
            "bundles (docs/ek-certificates.md)."
        ),
    )
    insecure_no_ek: bool = setting(
        read_flag, False, "Take any EK: a TPM of software passes for the chip."
    )
    insecure_virtual_ek: bool = setting(
        read_flag, False, "Accept virtual TPMs whose CAs are in `ek_ca` as the chip."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Vtpm:
    """`[vtpm]`: the link between VMs' vTPMs and the host's TPM."""

    enabled: bool = setting(
        read_flag,
        False,
        "Register vTPMs, and answer requests with `vm` with claims (docs/vtpm.md).",
    )
    socket: Path = setting(
        read_path,
        Path("/run/provider-proxy/vtpm.sock"),
        (
            "Unix socket for provider-proxy-ekhook, with an ACL for the swtpm user. The kernel "
            "names the user that connects, and others are turned away, too, where the file "
            "system has no ACLs."
        ),
    )
    helper: Path = setting(
        read_path,
        Path("/run/provider-proxy-vtpm.sock"),
        (
            "Unix socket of provider-proxy-vtpm, which sees the VMs that run and reads their "
            "vTPMs. Without it no VM has claims."
        ),
    )
    issuer: str = setting(
        one_of("delegate", "tpm"),
        "delegate",
        (
            "Who certifies the EKs of vTPMs: swtpm_localca (`delegate`), or a CA in the "
            "host's TPM (`tpm`)."
        ),
    )
    swtpm_user: str = setting(
        read_text,
        "tss",
        (
            "The user that swtpm runs as: `swtpm_user` of libvirt's qemu.conf. Only this "
            "user and root may use the socket."
        ),
    )
    state_root: Path = setting(
        read_path,
        Path("/var/lib/libvirt/swtpm"),
        (
            "libvirt's folder of vTPMs, `UUID/tpm2` for each VM. An entry whose folder has "
            "been gone for an hour is forgotten."
        ),
    )
    max_vms: int = setting(
        integer(1, 100_000),
        4096,
        (
            "VMs that the registry holds. One more replaces the VM that has been stopped the "
            "longest; it is refused where all run."
        ),
    )
    ca_handle: int = setting(
        read_handle,
        0x81000101,
        (
            'Persistent handle of the CA\'s key, for `issuer = "tpm"`. The key is made there '
            "if the handle is empty; the start fails if it holds something else."
        ),
    )
