"""What a batch is made of: waiters, the sealed batch, its tree, its check, its answers.

Synchronous and without a clock; `batcher` decides when. `build_batch_tree` and `check_batch` are the two
long computations of a batch, some 10 microseconds a leaf each, and run in a worker thread.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from provider_proxy.errors import ProviderProxyError
from provider_proxy.evidence import attestation, inclusion
from provider_proxy.evidence.model import (
    SALT_BYTES,
    AttestationKey,
    HashAlg,
    InclusionProof,
    Quote,
    QuoteRequest,
    RootHash,
    Tenant,
)
from provider_proxy.evidence.verify import check_covered, check_request_in_quote
from provider_proxy.evidence.wire import EvidenceEncoder, LogsPart
from provider_proxy.host.batching import merkle


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A tenant's answer: its own proof, and the encoder that its batch shares."""

    encoder: EvidenceEncoder
    proof: InclusionProof
    claims: bytes | None
    logs: LogsPart | None
    queued_s: float

    def body(self) -> tuple[bytes, ...]:
        """The HTTP body, in parts."""
        return self.encoder.encode(
            self.proof, claims=self.claims, logs=self.logs, queued_ms=self.queued_s * 1000
        )


class SealedBy(enum.Enum):
    """Why a batch was sealed when it was."""

    WINDOW = "window"  # its window was over, and the chip was ready
    CHIP = "chip"  # its window ended earlier: the chip was busy, or rested to keep its duty
    FULL = "full"  # it held `max_leaves`
    DRAIN = "drain"


SORT_KEY_BYTES = 8  # two equal keys among a thousand: once in 10^13 batches, and harmless

BatchKey = tuple[HashAlg, int, int]
"""Bank, the isolated part of the mask, allowed PCRs: what requests of one batch share."""


@dataclass(slots=True, eq=False)
class Waiter:
    """A waiting request. It gets one answer or one error, and `done` is set."""

    request: QuoteRequest
    tenant: Tenant
    key: BatchKey
    arrived: float
    deadline: float
    is_gone: Callable[[], bool] | None
    claims: bytes | None = None
    sealed: bool = False
    done: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None
    error: ProviderProxyError | None = None

    def refuse(self, error: ProviderProxyError) -> None:
        if not self.done.is_set():
            self.error = error
            self.done.set()


@dataclass(slots=True, eq=False)
class Batch:
    """A sealed batch. `quote` and `proofs` are set as the work proceeds; times are the batcher's.

    Attributes:
        sealed_by: why it was sealed at that moment.
        quote_s: how long the quote, or the attempts at it, took; 0 where none was asked for.
        error: the error that all its waiters got; None without an error.
    """

    number: int
    bank: HashAlg
    waiters: list[Waiter]
    opened: float
    sealed: float
    sealed_by: SealedBy = SealedBy.WINDOW
    quote: Quote | None = None
    quote_s: float = 0.0
    size: int = 0
    proofs: tuple[InclusionProof, ...] = ()
    error: ProviderProxyError | None = None

    @property
    def outcome(self) -> str:
        """ "ok", or the name of the error's class."""
        return "ok" if self.error is None else type(self.error).__name__

    @property
    def deadline(self) -> float:
        """When the last of its waiters times out."""
        return max(waiter.deadline for waiter in self.waiters)

    @property
    def mask(self) -> int:
        mask = 0
        for waiter in self.waiters:
            mask |= waiter.request.mask
        return mask

    def refuse(self, error: ProviderProxyError) -> None:
        self.error = self.error or error
        for waiter in self.waiters:
            waiter.refuse(error)


def build_batch_tree(batch: Batch) -> RootHash:
    """Build a batch's tree (in the tree worker); the proofs are in the order of the waiters.

    Leaves and padding are shuffled together, so that an index does not tell the order of arrival.
    """
    salts = secrets.token_bytes(SALT_BYTES * len(batch.waiters))
    leaves: list[bytes] = []
    for place, waiter in enumerate(batch.waiters):
        request = waiter.request
        leaves.append(
            inclusion.leaf_input(
                salt=salts[place * SALT_BYTES : (place + 1) * SALT_BYTES],
                nonce=request.nonce,
                mask=request.mask,
                bank=request.bank,
                claims=waiter.claims or b"",
            )
        )
    padded = leaves + merkle.padding(len(leaves))
    # Our own shuffle: SystemRandom's asks the kernel once for each leaf, this once for each batch.
    keys = secrets.token_bytes(SORT_KEY_BYTES * len(padded))
    order = sorted(
        range(len(padded)),
        key=lambda place: keys[place * SORT_KEY_BYTES : (place + 1) * SORT_KEY_BYTES],
    )
    index_of = [0] * len(padded)
    for index, place in enumerate(order):
        index_of[place] = index
    wanted = index_of[: len(leaves)]
    tree = merkle.build_tree([padded[place] for place in order], wanted=wanted)
    batch.size = tree.size
    batch.proofs = tuple(
        InclusionProof(
            leaf_index=index,
            tree_size=tree.size,
            path=path,
            salt=salts[place * SALT_BYTES : (place + 1) * SALT_BYTES],
        )
        for place, (index, path) in enumerate(zip(wanted, tree.paths, strict=True))
    )
    return tree.root


def check_batch(batch: Batch, quote: Quote, ak: AttestationKey) -> None:
    """The tenants' checks 1 to 5, over everything that is about to be sent (in the tree worker).

    The quoter has checked the signature already, because it can repeat a quote after a fault of the bus.
    It is checked again here so that no answer depends on the quoter; that costs 0.1 ms a batch.

    Raises:
        VerificationError: a tenant would refuse this.
    """
    attest = attestation.check_quote(quote, ak)
    for waiter, proof in zip(batch.waiters, batch.proofs, strict=True):
        check_request_in_quote(waiter.request, proof, waiter.claims, attest)
        check_covered(attest, waiter.request)
