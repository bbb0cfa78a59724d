"""What the batcher may expect of every quoter: the host's TPM, a Keylime agent, the fake."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from agent_helpers import Agent, binding_of, running_agent
from cryptography.hazmat.primitives.asymmetric import rsa
from helpers import LIMIT_S, FakeQuoter
from keylime_helpers import Registrar, running_registrar

from provider_proxy.evidence import attestation
from provider_proxy.evidence.model import HashAlg, Quote, pcrs_of
from provider_proxy.host.batching.batcher import Quoter
from provider_proxy.host.config.chip_tables import Tpm
from provider_proxy.host.metrics import Metrics
from provider_proxy.host.quoters import keylime_agent, local_tpm
from provider_proxy.testing.soft_tpm import SoftTpm

ALL = 0xFFFFFF
PCR_16 = 1 << 16
QUALIFYING = b"abcdefghijklmnopqrstuvwxyz234567"
ALL_BANKS = (HashAlg.SHA1, HashAlg.SHA256, HashAlg.SHA384, HashAlg.SHA512)
REAL = pytest.mark.real


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of quoter.

    Attributes:
        banks: that it can quote.
        uninvited: PCRs that are in its quotes whatever the mask.
    """

    quoter: Quoter
    banks: tuple[HashAlg, ...] = ALL_BANKS
    uninvited: int = 0

    def check(self, quote: Quote, qualifying: bytes, bank: HashAlg, mask: int) -> None:
        """As a tenant would: signed, over this, and with the values of these PCRs."""
        attest = attestation.parse_attest(quote.attest)
        signature = attestation.parse_signature(quote.signature)
        attestation.check_signature(quote.attest, signature, self.quoter.ak)
        attestation.check_pcrs(attest, quote.pcrs, self.quoter.ak.signature_hash)
        assert attest.extra_data == qualifying
        assert (attest.bank, attest.mask) == (bank, mask | self.uninvited)
        assert quote.pcrs.bank is bank
        assert [pcr for pcr, _ in quote.pcrs.values] == list(pcrs_of(mask | self.uninvited))


@pytest.fixture(scope="module")
def registrar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registrar]:
    with running_registrar(tmp_path_factory.mktemp("registrar")) as running:
        yield running


@pytest.fixture(scope="module")
def agent(registrar: Registrar, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with running_agent(tmp_path_factory.mktemp("agent"), registrar) as running:
        yield running


@pytest.fixture(
    params=["fake-ecc", "fake-rsa"]
    + [pytest.param(name, marks=REAL) for name in ("tpm-ecc", "tpm-rsa", "agent-rsa")]
)
async def kind(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kind]:
    what, algorithm = request.param.split("-")
    if what == "fake":
        key = rsa.generate_private_key(65537, 2048) if algorithm == "rsa" else None
        yield Kind(quoter=FakeQuoter(SoftTpm(key=key, pcrs={0: b"boot"}), delay_s=0.002))
    elif what == "tpm":
        settings = Tpm(tcti="embedded", max_duty=1.0, ak_algorithm=algorithm)
        async with local_tpm.open_quoter(settings, tmp_path, Metrics()) as opened:
            yield Kind(quoter=opened)
    else:
        bind = binding_of(request.getfixturevalue("agent"), request.getfixturevalue("registrar"))
        async with keylime_agent.open_quoter(bind, 1.0, Metrics()) as quoter:
            yield Kind(quoter=quoter, banks=(HashAlg.SHA256,), uninvited=PCR_16)


async def test_a_quote_is_over_what_was_asked(kind: Kind) -> None:
    for bank in kind.banks:
        for mask in (0x1, 0x800000, 0x10081, ALL):
            with trio.fail_after(LIMIT_S):
                quote = await kind.quoter.quote(QUALIFYING, bank, mask)
            kind.check(quote, QUALIFYING, bank, mask)


async def test_the_key_says_what_it_is(kind: Kind) -> None:
    ak = kind.quoter.ak
    is_rsa = isinstance(ak.public_key, rsa.RSAPublicKey)
    assert ak.sign_alg == ("rsassa" if is_rsa else "ecdsa")
    assert ak.signature_hash is HashAlg.SHA256
    assert ak.name[:2] == b"\x00\x0b"
    assert len(ak.name) == 34


async def test_the_clock_never_goes_back(kind: Kind) -> None:
    clocks = []
    for number in range(5):
        quote = await kind.quoter.quote(b"%032d" % number, HashAlg.SHA256, 1)
        clocks.append(attestation.parse_attest(quote.attest).clock)
    assert clocks == sorted(clocks)


async def test_many_at_once_are_all_served(kind: Kind) -> None:
    done: dict[bytes, Quote] = {}

    async def one(qualifying: bytes) -> None:
        done[qualifying] = await kind.quoter.quote(qualifying, HashAlg.SHA256, 1)

    wanted = [b"%032d" % number for number in range(8)]
    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery:
            for qualifying in wanted:
                nursery.start_soon(one, qualifying)
    assert sorted(done) == wanted
    for qualifying, quote in done.items():
        kind.check(quote, qualifying, HashAlg.SHA256, 1)


async def test_ready_returns_and_times_are_no_nonsense(kind: Kind) -> None:
    with trio.fail_after(LIMIT_S):
        await kind.quoter.quote(QUALIFYING, HashAlg.SHA256, 1)
        await kind.quoter.ready()
    state = kind.quoter.state
    assert 0 < state.expected_s < LIMIT_S
    assert state.pause_s >= 0
    assert state.turn_s == state.expected_s + state.pause_s
    assert 0 <= state.duty <= 1
    assert state.in_flight_s == 0
    assert state.trouble is None


async def test_a_cancelled_quote_does_no_harm(kind: Kind) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await kind.quoter.quote(QUALIFYING, HashAlg.SHA256, 1)
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kind.quoter.quote, QUALIFYING, HashAlg.SHA256, 1)
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    with trio.fail_after(LIMIT_S):
        quote = await kind.quoter.quote(QUALIFYING, HashAlg.SHA256, 3)
    kind.check(quote, QUALIFYING, HashAlg.SHA256, 3)
