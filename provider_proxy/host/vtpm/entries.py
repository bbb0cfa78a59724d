"""The registry's entry for one VM, and how each message changes it.

Pure: an entry and a message in, the next entry out. There are two sources: swtpm_setup's hook, while
root has a vTPM made (`registered`), and provider-proxy-vtpm, which says where the VM is by facts that
root controls (`saw`) and what its vTPM's state holds (`read_back`). Invariants: an entry has at most one
RSA and one ECC key; "confirmed" holds only for exactly the keys that were read, and only in the life (the
QEMU process) of the VM in which they were read; a vTPM that comes from another host starts without keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from provider_proxy.evidence.vtpm_link import spire_name
from provider_proxy.host.vtpm.requests import EkPublicKey

CLAIMED: Final = "claimed"
REGISTERED: Final = "registered"
CONFIRMED: Final = "confirmed"
State = Literal["claimed", "registered", "confirmed"]
UNKNOWN_ISSUER: Final = "unknown"  # the EK's certificate did not go through this host's hook
Origin = Literal["here", "elsewhere", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ek:
    """A vTPM's endorsement key.

    Attributes:
        alg: "rsa2048", "rsa3072", "rsa4096", "p256" or "p384".
        spki_sha256: SHA-256 of its SubjectPublicKeyInfo, DER, in hex.
        spire: its name in spire-tpm-plugin; empty where an older registry did not store it.
    """

    alg: str
    spki_sha256: str
    spire: str = dataclasses.field(default="", compare=False)

    @property
    def family(self) -> str:
        """ "rsa" or "p"; a vTPM has at most one key of each."""
        return self.alg.rstrip("0123456789")


def ek_of(key: EkPublicKey) -> Ek:
    """A public key as the registry stores it."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    family = "rsa" if isinstance(key, RSAPublicKey) else "p"
    digest = hashlib.sha256(spki).hexdigest()
    return Ek(alg=f"{family}{key.key_size}", spki_sha256=digest, spire=spire_name(key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A VM's vTPM.

    Attributes:
        name: the VM's, for people; never used to look anything up.
        eks: by their `alg`; empty where none is known (yet).
        state: "confirmed" once exactly these EKs were read from the vTPM's state while the VM ran;
            "registered" where they came from swtpm_setup while root had the vTPM made; "claimed"
            where they are only known from earlier.
        running: provider-proxy-vtpm sees the VM run here.
        run: the life of the VM's QEMU to which these EKs and this state belong.
        making: swtpm_setup is still running: another EK of this vTPM may come.
        generation: rises each time a vTPM is made, or comes from another host, under this UUID.
        issuer: who certified the EKs when they were made: "delegate", "tpm" or "unknown".
        migrated: the vTPM was not made on this host.
        registered_at: when these EKs first became known, seconds since the epoch; 0 without EKs.
        changed_at: when this entry changed, the same.
    """

    vm: uuid.UUID
    name: str = ""
    eks: tuple[Ek, ...] = ()
    state: State = CLAIMED
    running: bool = False
    run: str = ""
    making: bool = False
    generation: int = 0
    issuer: str = UNKNOWN_ISSUER
    migrated: bool = False
    registered_at: int = 0
    changed_at: int = 0


def registered(old: Entry | None, vm: uuid.UUID, name: str, ek: Ek, *, issuer: str) -> Entry:
    """swtpm_setup made a key: it is added to those of the same run, or starts a new vTPM.

    Does not check: that root has the vTPM made now; the vTPM service does.
    """
    entry = old or Entry(vm=vm)
    if ek in entry.eks:
        return entry
    families = {known.family for known in entry.eks}
    if entry.making and ek.family not in families:
        eks = tuple(sorted((*entry.eks, ek), key=lambda key: key.alg))
        return dataclasses.replace(entry, name=name, eks=eks)
    return Entry(
        vm=vm,
        name=name,
        eks=(ek,),
        state=REGISTERED,
        making=True,
        generation=entry.generation + 1,
        issuer=issuer,
    )


def saw(old: Entry | None, vm: uuid.UUID, name: str, *, run: str, origin: Origin) -> Entry:
    """The VM's QEMU is here, in this life. Facts from an earlier life may be wrong now."""
    entry = old or Entry(vm=vm)
    if entry.run == run:
        return dataclasses.replace(entry, name=name, making=False)
    if origin == "elsewhere":
        # The vTPM came from another host: earlier facts under this UUID are not about it.
        return Entry(vm=vm, name=name, run=run, generation=entry.generation + 1, migrated=True)
    began = dataclasses.replace(lowered(entry), name=name, run=run, making=False)
    if origin == "here":
        return began
    # The start of this life was not seen: the VM may have come from another host.
    return dataclasses.replace(began, eks=(), state=CLAIMED, issuer=UNKNOWN_ISSUER)


def lowered(entry: Entry) -> Entry:
    """The same EKs, not (or no longer) read back in this life of the VM."""
    if entry.state != CONFIRMED:
        return entry
    state: State = CLAIMED if entry.issuer == UNKNOWN_ISSUER else REGISTERED
    return dataclasses.replace(entry, state=state)


def read_back(entry: Entry, eks: Sequence[Ek]) -> Entry:
    """The vTPM's own state holds exactly these EKs: they replace what was known."""
    found = tuple(sorted(eks, key=lambda key: key.alg))
    assert found
    if set(found) <= set(entry.eks):
        return dataclasses.replace(entry, eks=found, state=CONFIRMED)
    if not entry.eks:  # it came from another host, or was made before the hooks were installed
        generation = max(entry.generation, 1)
        return dataclasses.replace(entry, eks=found, state=CONFIRMED, generation=generation)
    return dataclasses.replace(
        entry,
        eks=found,
        state=CONFIRMED,
        generation=entry.generation + 1,
        issuer=UNKNOWN_ISSUER,
        registered_at=0,
    )


def without(entry: Entry, eks: Sequence[Ek]) -> Entry:
    """The same vTPM without keys that belong to another VM."""
    kept = tuple(ek for ek in entry.eks if ek not in eks)
    return dataclasses.replace(entry, eks=kept, state=CLAIMED)


def stamped(entry: Entry, old: Entry | None, now: int) -> Entry:
    """A changed entry with its times; the old one if nothing changed."""
    if old is not None and entry == old:
        return old
    registered_at = (entry.registered_at or now) if entry.eks else 0
    return dataclasses.replace(entry, registered_at=registered_at, changed_at=now)
