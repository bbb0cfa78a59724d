"""`bench bindings`: verifying one host again and again, with a registrar that takes 150 ms a call.

Four ways, 10 clients at once, a full verification each time: (a) a new client and two calls for each
attestation; (b) a pooled client and a cache of records and of the API version; (c) `RegistrarBindings`;
(d) no registrar at all. Every round measures (b), (c) and (d), one after the other. (a) makes 600 calls,
90 s, for 300 attestations; its rate does not depend on their number, so fewer are measured. The
registrar is a process of its own and speaks plain HTTP: TLS would make (a) and (b) slower still.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from provider_proxy.errors import BindingError, HostError
from provider_proxy.evidence import inclusion
from provider_proxy.evidence.model import HashAlg, InclusionProof, TrustedHost, check_mask
from provider_proxy.evidence.policy import Policy, parse_tpm_policy
from provider_proxy.evidence.tpm_writer import encode_ek
from provider_proxy.evidence.verify import Challenge, MemoryHistory, Verifier, new_challenge
from provider_proxy.evidence.wire import EvidenceEncoder
from provider_proxy.host.batching import merkle
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.bindings import RegistrarBindings
from provider_proxy.trust.ek_chain import EK_PURPOSE
from provider_proxy.trust.ek_store import EkStore, utc_now
from provider_proxy.trust.pins import PinStore

CALL_S = 0.150  # the source's registrar: 1 / (2 * 0.15 s) = 3.3 attestations a second
CLIENTS = 10
COUNTS = (300, 1000)
ROUNDS = 5
NEW_CLIENT_COUNT = 20  # of (a): 40 calls, 6 s
WARM_CHUNK = 250
WARM_CHUNKS = 16  # of (c) and of (d) in each round, in turns
AGENT = "host"
MASK = 0xFF
STOP_LIMIT_S = 10.0

Say = Callable[[str], None]
Work = tuple[Challenge, bytes]
Ask = Callable[[], Awaitable[TrustedHost]]
"""Finds out which AK to trust, for one attestation."""


def run(seed: int, say: Say) -> dict[str, object]:
    """Measure; returns the figures. The seed changes nothing: nothing here is random.

    Raises:
        HostError: the registrar to ask did not start.
        VerificationError: something that should verify did not.
    """
    with tempfile.TemporaryDirectory(prefix="provider-proxy-bench-") as name:
        host = _Host(Path(name))
        with _slow_registrar(Path(name), host) as url:
            return asyncio.run(_Bench(host, url, Path(name), say).run())


class _Host:
    """A host of software with a vendor who vouches for its EK."""

    def __init__(self, directory: Path) -> None:
        self.tpm = SoftTpm(pcrs={pcr: b"%d" % pcr for pcr in range(8)})
        ek = rsa.generate_private_key(65537, 2048)
        self.ek_public = encode_ek(ek.public_key())
        root, self.ek_cert = _vendor(ek)
        self.cas = directory / "cas"
        self.cas.mkdir()
        (self.cas / "vendor.pem").write_bytes(root)
        allowed = self.tpm.read(HashAlg.SHA256, MASK).values
        values: dict[str, object] = {str(pcr): [digest.hex()] for pcr, digest in allowed}
        self.policy: Policy = parse_tpm_policy(values, bank=HashAlg.SHA256)

    def record(self) -> dict[str, object]:
        """The host's record, as a registrar has it."""
        return {
            "agent_id": AGENT,
            "ek_tpm": base64.b64encode(self.ek_public).decode("ascii"),
            "ekcert": base64.b64encode(self.ek_cert).decode("ascii"),
            "aik_tpm": base64.b64encode(self.tpm.ak_public).decode("ascii"),
            "mtls_cert": None,
            "ip": "192.0.2.1",
            "port": 9002,
            "regcount": 1,
        }

    def evidence(self, count: int, history: MemoryHistory) -> list[Work]:
        """Challenges and good answers to them, all of one batch."""
        challenges = [
            new_challenge(mask=MASK, now_s=time.monotonic(), history=history) for _ in range(count)
        ]
        salts = [secrets.token_bytes(16) for _ in challenges]
        leaves = [
            inclusion.leaf_input(
                salt=salt,
                nonce=challenge.request.nonce,
                mask=check_mask(MASK),
                bank=HashAlg.SHA256,
                claims=b"",
            )
            for salt, challenge in zip(salts, challenges, strict=True)
        ]
        tree = merkle.build_tree(leaves + merkle.padding(count), wanted=range(count))
        quote = self.tpm.quote(
            inclusion.qualifying_data(tree.root, tree.size), HashAlg.SHA256, MASK
        )
        ak = self.tpm.ak
        encoder = EvidenceEncoder(
            quote,
            ak_name=ak.name,
            hash_alg=ak.signature_hash,
            enc_alg=ak.enc_alg,
            sign_alg=ak.sign_alg,
            quote_ms=1.0,
        )
        return [
            (challenge, b"".join(encoder.encode(proof)))
            for challenge, proof in zip(challenges, _proofs(tree, salts), strict=True)
        ]


def _proofs(tree: merkle.Tree, salts: Sequence[bytes]) -> Iterator[InclusionProof]:
    for index, salt in enumerate(salts):
        yield InclusionProof(
            leaf_index=index, tree_size=tree.size, path=tree.paths[index], salt=salt
        )


def _vendor(ek: rsa.RSAPrivateKey) -> tuple[bytes, bytes]:
    """A root, PEM, and an EK certificate of its, DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench TPM vendor")])
    begin = utc_now() - timedelta(days=1)

    def builder(subject: x509.Name) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(name)
        made = made.serial_number(x509.random_serial_number()).not_valid_before(begin)
        return made.not_valid_after(begin + timedelta(days=30))

    is_ca = x509.BasicConstraints(ca=True, path_length=0)
    root = builder(name).public_key(key.public_key()).add_extension(is_ca, critical=True)
    leaf = builder(x509.Name([])).public_key(ek.public_key())
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([EK_PURPOSE]), critical=False)
    signed = [made.sign(key, SHA256()) for made in (root, leaf)]
    return signed[0].public_bytes(Encoding.PEM), signed[1].public_bytes(Encoding.DER)


@contextmanager
def _slow_registrar(directory: Path, host: _Host) -> Iterator[str]:
    path = directory / "record.json"
    path.write_text(json.dumps(host.record()))
    process = subprocess.Popen(
        [sys.executable, "-m", "provider_proxy.bench.slow_registrar", str(path), str(CALL_S)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise HostError("the benchmark's registrar did not start")
        yield f"http://127.0.0.1:{json.loads(line)['port']}"
    finally:
        process.kill()
        process.wait(STOP_LIMIT_S)
        process.stdout.close()
        process.stdin.close()


@dataclass(frozen=True, slots=True)
class _Took:
    """A run's wall-clock time and this thread's CPU time, in seconds."""

    wall_s: float
    cpu_s: float


class _Bench:
    """The rounds."""

    def __init__(self, host: _Host, url: str, directory: Path, say: Say) -> None:
        self._host = host
        self._url = url
        self._directory = directory
        self._say = say
        self._stores = 0

    def _new_bindings(self, http: httpx.AsyncClient) -> RegistrarBindings:
        """With an empty cache, and pins of its own: a first trust."""
        self._stores += 1
        eks = EkStore(self._host.cas)
        pins = PinStore(self._directory / f"pins-{self._stores}")
        return RegistrarBindings(http, self._url, pins=pins, eks=eks, ttl_s=300)

    async def run(self) -> dict[str, object]:
        rates: dict[str, list[float]] = {}
        colds: list[float] = []
        ratios: list[float] = []
        verifications: list[float] = []
        for number in range(1, ROUNDS + 1):
            for count in COUNTS:
                self._say(f"round {number} of {ROUNDS}, {count} attestations")
                for name, way in (
                    ("pooled_cached", self._pooled_cached),
                    ("ours", self._ours),
                    ("no_registrar", self._no_registrar),
                ):
                    took = await way(count)
                    rates.setdefault(f"{name}_{count}", []).append(count / took.wall_s)
            self._say(f"round {number} of {ROUNDS}, a new client each")
            took = await self._new_client(NEW_CLIENT_COUNT)
            rates.setdefault("new_client", []).append(NEW_CLIENT_COUNT / took.wall_s)
            self._say(f"round {number} of {ROUNDS}, cold and warm")
            colds.append(await self._cold_start())
            ratio, each_s = await self._warm()
            ratios.append(ratio)
            verifications.append(1 / each_s)
        figures: dict[str, object] = {
            "clients": CLIENTS,
            "rounds": ROUNDS,
            "registrar_call_ms": CALL_S * 1000,
            "new_client_sampled": NEW_CLIENT_COUNT,
        }
        for count in COUNTS:
            speedups = [
                ours / theirs
                for ours, theirs in zip(
                    rates[f"ours_{count}"], rates[f"pooled_cached_{count}"], strict=True
                )
            ]
            figures |= _summary(f"speedup_vs_pooled_cached_{count}", speedups, 2)
        figures |= _summary("warm_ratio_vs_no_registrar", ratios, 4)
        figures |= _summary("cold_start_ratio", colds, 3)
        figures |= _summary("verifications_per_s", verifications, 0)
        for name in sorted(rates):
            figures |= _summary(f"{name}_per_s", rates[name], 2)
        return figures

    async def _attest(self, work: Sequence[Work], history: MemoryHistory, ask: Ask) -> _Took:
        """All of the work, by `CLIENTS` clients at once."""
        verifier = Verifier(self._host.policy)
        queue = iter(work)

        async def client() -> None:
            for challenge, body in queue:
                host = await ask()
                now_s = time.monotonic()
                verifier.verify(body, challenge, host, history, now_s=now_s)
                await asyncio.sleep(0)  # a real client waits for its quote here

        begin, begin_cpu = time.perf_counter(), time.thread_time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(client())
        return _Took(time.perf_counter() - begin, time.thread_time() - begin_cpu)

    async def _measure(self, count: int, ask: Ask) -> _Took:
        history = MemoryHistory()
        return await self._attest(self._host.evidence(count, history), history, ask)

    async def _no_registrar(self, count: int) -> _Took:
        host = TrustedHost(ak=self._host.tpm.ak)

        async def ask() -> TrustedHost:
            return host

        return await self._measure(count, ask)

    async def _new_client(self, count: int) -> _Took:
        async def ask() -> TrustedHost:
            async with httpx.AsyncClient(trust_env=False) as http:
                await self._two_calls(http)
            return TrustedHost(ak=self._host.tpm.ak)

        return await self._measure(count, ask)

    async def _pooled_cached(self, count: int) -> _Took:
        """The source's design: each client that misses the cache asks; none waits for another."""
        cached: dict[str, object] | None = None

        async with httpx.AsyncClient(trust_env=False) as http:

            async def ask() -> TrustedHost:
                nonlocal cached
                record = cached
                if record is None:
                    record = cached = await self._two_calls(http)
                if record["aik_tpm"] != wanted["aik_tpm"] or record["ekcert"] != wanted["ekcert"]:
                    raise BindingError("another AK or EK")
                return host

            wanted, host = self._host.record(), TrustedHost(ak=self._host.tpm.ak)
            return await self._measure(count, ask)

    async def _ours(self, count: int) -> _Took:
        async with httpx.AsyncClient(trust_env=False) as http:
            return await self._measure(count, self._asker(self._new_bindings(http)))

    def _asker(self, bindings: RegistrarBindings) -> Ask:
        async def ask() -> TrustedHost:
            binding = await bindings.check(AGENT, self._host.ek_cert, self._host.tpm.ak_public)
            return binding.host

        return ask

    async def _two_calls(self, http: httpx.AsyncClient) -> dict[str, object]:
        (await http.get(f"{self._url}/version")).raise_for_status()
        answer = (await http.get(f"{self._url}/v2.6/agents/{AGENT}")).raise_for_status()
        record: dict[str, object] = answer.json()["results"]
        return record

    async def _cold_start(self) -> float:
        """Until all clients have their binding, over two calls one after the other."""
        async with httpx.AsyncClient(trust_env=False) as http:
            begin = time.perf_counter()
            await self._two_calls(http)
            two_calls_s = time.perf_counter() - begin
        async with httpx.AsyncClient(trust_env=False) as http:
            ask = self._asker(self._new_bindings(http))
            begin = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(CLIENTS):
                    tasks.create_task(ask())  # type: ignore[arg-type]
            return (time.perf_counter() - begin) / two_calls_s

    async def _warm(self) -> tuple[float, float]:
        """The rate with a warm cache over that without a registrar, and seconds a verification.

        In CPU time: neither side waits for anything, and other programs' load cancels out.
        """
        plain_host = TrustedHost(ak=self._host.tpm.ak)

        async def plain() -> TrustedHost:
            return plain_host

        async with httpx.AsyncClient(trust_env=False) as http:
            ask = self._asker(self._new_bindings(http))
            await ask()
            with_s, without_s = [], []
            for _ in range(WARM_CHUNKS):
                with_s.append((await self._measure(WARM_CHUNK, ask)).cpu_s)
                without_s.append((await self._measure(WARM_CHUNK, plain)).cpu_s)
        without = statistics.median(without_s)
        return without / statistics.median(with_s), without / WARM_CHUNK


def _summary(name: str, values: Sequence[float], digits: int) -> dict[str, object]:
    """The median, and the least and the most."""
    return {
        name: round(statistics.median(values), digits),
        f"{name}_range": [round(min(values), digits), round(max(values), digits)],
    }
