"""What the registry knows of one VM, and how each word about it changes that.

Pure: an entry and a word in, the next entry out. Two sources speak: swtpm_setup's hook, in the moment
in which root has it make a vTPM (`registered`), and provider-proxy-vtpm (`saw`): where the VM is, by
root's word, and what its vTPM's state holds (`read_back`). Invariants: an entry has at most an RSA and
an ECC key; "confirmed" holds only for exactly the keys that were read, and in the life of the VM in
which they were; what comes in from elsewhere starts as nothing.
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
UNKNOWN_ISSUER: Final = "unknown"  # nothing of the EK's certificate went through this host's hook
Origin = Literal["here", "elsewhere", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ek:
    """A vTPM's endorsement key.

    Attributes:
        alg: "rsa2048", "rsa3072", "rsa4096", "p256" or "p384".
        spki_sha256: SHA-256 of its SubjectPublicKeyInfo, DER, in hex.
        spire: what spire-tpm-plugin calls it; empty where an older registry did not know.
    """

    alg: str
    spki_sha256: str
    spire: str = dataclasses.field(default="", compare=False)

    @property
    def family(self) -> str:
        """A vTPM has one key of each: "rsa" or "p"."""
        return self.alg.rstrip("0123456789")


def ek_of(key: EkPublicKey) -> Ek:
    """A public key as the registry keeps it."""
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    family = "rsa" if isinstance(key, RSAPublicKey) else "p"
    digest = hashlib.sha256(spki).hexdigest()
    return Ek(alg=f"{family}{key.key_size}", spki_sha256=digest, spire=spire_name(key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A VM's vTPM.

    Attributes:
        name: the VM's, for people; never a key to anything.
        eks: by their `alg`; empty where none is known (yet).
        state: "confirmed" once exactly these EKs were read from the vTPM's state while the VM ran;
            "registered" where they came through swtpm_setup while root had it make the vTPM; "claimed"
            where they are known from before only.
        running: provider-proxy-vtpm sees the VM run here.
        run: the life of the VM's QEMU that these EKs and this state belong to.
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
    run: str = ""
    making: bool = False
    generation: int = 0
    issuer: str = UNKNOWN_ISSUER
    migrated: bool = False
    registered_at: int = 0
    changed_at: int = 0


def registered(old: Entry | None, vm: uuid.UUID, name: str, ek: Ek, *, issuer: str) -> Entry:
    """swtpm_setup made a key: it joins those of the same making, or begins a new vTPM.

    Does not check: that root has it do so now; the vTPM service does.
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
    """The VM's QEMU is here, in this life of it. What was known of an earlier life may be wrong now."""
    entry = old or Entry(vm=vm)
    if entry.run == run:
        return dataclasses.replace(entry, name=name, making=False)
    if origin == "elsewhere":
        # Another host has sent the vTPM: none of what was known under this UUID is about it.
        return Entry(vm=vm, name=name, run=run, generation=entry.generation + 1, migrated=True)
    began = dataclasses.replace(lowered(entry), name=name, run=run, making=False)
    if origin == "here":
        return began
    # Nobody saw how this life began: it may have come in.
    return dataclasses.replace(began, eks=(), state=CLAIMED, issuer=UNKNOWN_ISSUER)


def lowered(entry: Entry) -> Entry:
    """The same EKs, which nobody has read in this life of the VM, or not again."""
    if entry.state != CONFIRMED:
        return entry
    state: State = CLAIMED if entry.issuer == UNKNOWN_ISSUER else REGISTERED
    return dataclasses.replace(entry, state=state)


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
    """A changed entry with its times; the old one where nothing changed."""
    if old is not None and entry == old:
        return old
    registered_at = (entry.registered_at or now) if entry.eks else 0
    return dataclasses.replace(entry, registered_at=registered_at, changed_at=now)
