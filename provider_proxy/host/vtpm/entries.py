"""What the registry knows of one VM, and how each word about it changes that.

Pure: an entry and a word in, the next entry out. Three sources speak: swtpm_setup's hook (`registered`:
a claim of the swtpm user), libvirt's hook (`happened`: root's word) and the vTPM's own state file
(`read_back`: what its TPM says). Invariants: an entry has at most an RSA and an ECC key; "confirmed"
holds only for exactly the keys that were read back; what arrives from elsewhere starts as nothing.
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

from provider_proxy.host.vtpm.requests import EkPublicKey

CLAIMED: Final = "claimed"
CONFIRMED: Final = "confirmed"
State = Literal["claimed", "confirmed"]
UNKNOWN_ISSUER: Final = "unknown"  # nothing of the EK's certificate went through this host's hook
STARTS = frozenset({"started", "reconnect", "attach"})
STOPS = frozenset({"prepare", "stopped", "release"})
COMES_IN = "migrate"
EVENTS = STARTS | STOPS | {COMES_IN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ek:
    """A vTPM's endorsement key.

    Attributes:
        alg: "rsa2048", "rsa3072", "rsa4096", "p256" or "p384".
        spki_sha256: SHA-256 of its SubjectPublicKeyInfo, DER, in hex.
    """

    alg: str
    spki_sha256: str

    @property
    def family(self) -> str:
        """A vTPM has one key of each: "rsa" or "p"."""
        return self.alg.rstrip("0123456789")


def ek_of(key: EkPublicKey) -> Ek:
    """A public key as the registry keeps it."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    family = "rsa" if isinstance(key, RSAPublicKey) else "p"
    return Ek(alg=f"{family}{key.key_size}", spki_sha256=hashlib.sha256(spki).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A VM's vTPM.

    Attributes:
        name: the VM's, for people; never a key to anything.
        eks: by their `alg`; empty where none is known (yet).
        state: "confirmed" once exactly these EKs were read back from the vTPM's state.
        running: libvirt says that the VM runs here, or its swtpm was seen.
        making: swtpm_setup is at work: another EK of this vTPM may still come.
        generation: rises each time that a vTPM was made, or came in, under this UUID.
        issuer: who certified the EKs when they were made: "delegate", "tpm" or "unknown".
        migrated: the vTPM was not made on this host.
        registered_at: when these EKs were first heard of, seconds since the epoch; 0 without EKs.
        changed_at: when this entry changed, the same.
    """

    vm: uuid.UUID
    name: str = ""
    eks: tuple[Ek, ...] = ()
    state: State = CLAIMED
    running: bool = False
    making: bool = False
    generation: int = 0
    issuer: str = UNKNOWN_ISSUER
    migrated: bool = False
    registered_at: int = 0
    changed_at: int = 0


def registered(old: Entry | None, vm: uuid.UUID, name: str, ek: Ek, *, issuer: str) -> Entry:
    """swtpm_setup made a key: it joins those of the same making, or begins a new vTPM.

    Does not check: that the VM does not run, for then nobody makes it a vTPM; the registry does.
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
        making=True,
        generation=entry.generation + 1,
        issuer=issuer,
    )


def happened(old: Entry | None, vm: uuid.UUID, name: str, event: str) -> Entry | None:
    """libvirt says what it does with the VM; None where that is nothing to remember."""
    if event in STOPS:
        return old and dataclasses.replace(old, running=False)
    entry = old or Entry(vm=vm)
    if event in STARTS:
        # Another state file may lie there than at the last start: it is read again.
        state = CLAIMED if event == "started" else entry.state
        return dataclasses.replace(entry, name=name, running=True, making=False, state=state)
    assert event == COMES_IN
    if entry.running:  # libvirt refuses it in a moment: that VM is here already
        return entry
    # Another host sends the vTPM: whatever was known of one under this UUID may be wrong.
    return Entry(vm=vm, name=name, generation=entry.generation + 1, migrated=True)


def read_back(entry: Entry, eks: Sequence[Ek]) -> Entry:
    """The vTPM's own state holds these EKs, and no others: they are the truth."""
    found = tuple(sorted(eks, key=lambda key: key.alg))
    assert found
    if set(found) <= set(entry.eks):
        return dataclasses.replace(entry, eks=found, state=CONFIRMED)
    if not entry.eks:  # it came in, or was made before the hooks were there
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
    """The same vTPM without keys that turned out to be another's."""
    kept = tuple(ek for ek in entry.eks if ek not in eks)
    return dataclasses.replace(entry, eks=kept, state=CLAIMED)


def stamped(entry: Entry, old: Entry | None, now: int) -> Entry:
    """A changed entry with its times; the same one where nothing changed."""
    if entry == old:
        return entry
    registered_at = (entry.registered_at or now) if entry.eks else 0
    return dataclasses.replace(entry, registered_at=registered_at, changed_at=now)
