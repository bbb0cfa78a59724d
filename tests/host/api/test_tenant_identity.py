"""Who comes in, and as whom: identities, dates, the CRL, unlisted tenants; quotas by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from provider_proxy.common.crl import Crl, load_crls
from provider_proxy.common.tls import load_certificates
from provider_proxy.errors import HostError, TenantLimitError, UnknownTenantError
from provider_proxy.evidence.model import Tenant
from provider_proxy.host.api import quotas as quotas_module
from provider_proxy.host.api.identity import TenantDirectory, load_tenant_directory, parse_chain
from provider_proxy.host.api.quotas import (
    LOG_BURST_BYTES,
    LOG_BYTES_PER_S,
    MAX_REMEMBERED,
    Quota,
    Quotas,
)
from provider_proxy.host.config.tables import Listen, TenantRules
from provider_proxy.host.http.messages import Peer

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DAY = timedelta(days=1)
CA_KEY = ec.generate_private_key(ec.SECP256R1())
KEY = ec.generate_private_key(ec.SECP256R1())


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(
    *names: x509.GeneralName, cn: str = "a tenant", serial: int = 7, until: datetime = NOW + DAY
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(cn))
        .issuer_name(name("ca"))
        .public_key(KEY.public_key())
        .serial_number(serial)
        .not_valid_before(NOW - DAY)
        .not_valid_after(until)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(CA_KEY, hashes.SHA256())


def peer(
    cert: x509.Certificate | None = None, *above: x509.Certificate, uid: int | None = None
) -> Peer:
    chain = (cert, *above) if cert is not None and above else ()
    return Peer(
        name="192.0.2.1:5",
        is_gone=lambda: False,
        limit=lambda seconds: None,
        certificate=cert.public_bytes(Encoding.DER) if cert is not None else None,
        chain=tuple(each.public_bytes(Encoding.DER) for each in chain),
        uid=uid,
    )


def directory(
    tenants: Mapping[str, TenantRules] | None = None,
    *,
    unlisted: bool = False,
    certificates: bool = True,
    now: Callable[[], datetime] = lambda: NOW,
) -> TenantDirectory:
    defaults = TenantRules(accept_unlisted=unlisted)
    return TenantDirectory(defaults, tenants or {}, certificates=certificates, now=now)


ACME = x509.UniformResourceIdentifier("spiffe://example.org/acme")
FULL = certificate(
    ACME,
    x509.UniformResourceIdentifier("https://not.an.identity/"),
    x509.DNSName("Verifier.Example"),
    x509.RFC822Name("a@example.org"),
)
FINGERPRINT = FULL.fingerprint(hashes.SHA256()).hex()


@pytest.mark.parametrize(
    "identity",
    [
        "spiffe://example.org/acme",
        "dns:verifier.example",
        "email:a@example.org",
        f"sha256:{FINGERPRINT}",
    ],
)
def test_any_name_of_a_certificate_finds_its_tenant(identity: str) -> None:
    rules = TenantRules(identities=(identity,), rate=3, burst=4, max_inflight=5, pcr_allow=6)
    found = directory({"acme": rules}).find(peer(FULL))
    assert found == Tenant(name="acme", rate=3, burst=4, max_inflight=5, pcr_allow=6)


def test_names_are_looked_up_in_order() -> None:
    tenants = {
        "by-mail": TenantRules(identities=("email:a@example.org",)),
        "by-uri": TenantRules(identities=("spiffe://example.org/acme",)),
    }
    assert directory(tenants).find(peer(FULL)).name == "by-uri"


def test_the_cn_counts_only_where_there_is_no_other_name() -> None:
    tenants = {"cn": TenantRules(identities=("cn:a tenant",))}
    assert directory(tenants).find(peer(certificate())).name == "cn"
    with pytest.raises(UnknownTenantError):
        directory(tenants).find(peer(FULL))


def test_an_uri_that_is_no_spiffe_id_is_no_identity() -> None:
    assert not any("not.an.identity" in i for i in parse_chain((_der(FULL),)).identities)


def _der(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.DER)


@pytest.mark.parametrize("data", [b"", b"garbage", _der(FULL)[:-1]])
def test_bytes_that_are_no_certificate_do_not_come_in(data: bytes) -> None:
    with pytest.raises(UnknownTenantError):
        parse_chain((data,))


def test_a_name_of_a_kind_that_nobody_reads_is_no_bug_of_ours() -> None:
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    x400 = x509.UnrecognizedExtension(
        x509.SubjectAlternativeName.oid, bytes.fromhex("3004a3023000")
    )
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x400, critical=False)
        .sign(key, hashes.SHA256())
    )
    with pytest.raises(UnknownTenantError):
        parse_chain((_der(cert),))


def test_unlisted_tenants_come_in_where_the_defaults_say_so() -> None:
    assert directory(unlisted=True).find(peer(FULL)).name == "spiffe://example.org/acme"
    with pytest.raises(UnknownTenantError):
        directory(unlisted=False).find(peer(FULL))


def test_no_certificate_takes_the_name_of_a_table() -> None:
    """An unlisted certificate whose CN is a tenant's name is another tenant."""
    tenants = {"acme": TenantRules(identities=("dns:acme.example",))}
    found = directory(tenants, unlisted=True).find(peer(certificate(cn="acme")))
    assert found.name == "cn:acme"


def test_without_a_certificate_nobody_comes_in_where_one_is_asked_for() -> None:
    with pytest.raises(UnknownTenantError):
        directory(unlisted=True).find(peer())


def test_without_certificates_a_connection_is_a_tenant() -> None:
    assert directory(certificates=False).find(peer()).name == "192.0.2.1:5"


def test_dates_are_looked_at_each_time() -> None:
    time = [NOW]
    tenants = {"acme": TenantRules(identities=("spiffe://example.org/acme",))}
    found = directory(tenants, now=lambda: time[0])
    assert found.find(peer(FULL)).name == "acme"
    for other in (NOW + 2 * DAY, NOW - 2 * DAY):
        time[0] = other
        with pytest.raises(UnknownTenantError):
            found.find(peer(FULL))


def test_a_unix_user_is_a_tenant() -> None:
    tenants = {"agent": TenantRules(identities=("uid:64055",))}
    assert directory(tenants).find(peer(uid=64055)).name == "agent"
    with pytest.raises(UnknownTenantError):
        directory(tenants).find(peer(uid=0))
    assert directory(tenants, unlisted=True).find(peer(uid=0)).name == "uid:0"


# --- the CRL ----------------------------------------------------------------------------------------


def ca_certificate() -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(name("ca"))
        .issuer_name(name("ca"))
        .public_key(CA_KEY.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .sign(CA_KEY, hashes.SHA256())
    )


def write_crl(
    folder: Path,
    serials: tuple[int, ...],
    *,
    key: ec.EllipticCurvePrivateKey = CA_KEY,
    until: datetime = NOW + DAY,
    encoding: Encoding = Encoding.PEM,
    issuer: str = "ca",
) -> tuple[Path, Path]:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name(issuer))
        .last_update(NOW - DAY)
        .next_update(until)
    )
    for serial in serials:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
        )
    crl, ca = folder / "crl", folder / "ca"
    crl.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(encoding))
    ca.write_bytes(ca_certificate().public_bytes(Encoding.PEM))
    return crl, ca


def read_crls(crl: Path, ca: Path) -> tuple[Crl, ...]:
    return load_crls("listen.client_crl", crl, load_certificates("listen.client_ca", ca))


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_a_revoked_certificate_does_not_come_in(tmp_path: Path, encoding: Encoding) -> None:
    crls = read_crls(*write_crl(tmp_path, (7, 9), encoding=encoding))
    defaults = TenantRules(accept_unlisted=True)
    found = TenantDirectory(defaults, {}, certificates=True, crls=crls, now=lambda: NOW)
    with pytest.raises(UnknownTenantError, match="revoked"):
        found.find(peer(certificate(serial=7), ca_certificate()))
    assert found.find(peer(certificate(serial=8), ca_certificate())).name == "cn:a tenant"


def test_a_list_counts_however_the_ca_spells_its_name(tmp_path: Path) -> None:
    """RFC 5280, section 7.1: capitals and spaces make no other CA."""
    crls = read_crls(*write_crl(tmp_path, (7,), issuer=" CA "))
    found = TenantDirectory(TenantRules(), {}, certificates=True, crls=crls, now=lambda: NOW)
    with pytest.raises(UnknownTenantError, match="revoked"):
        found.find(peer(certificate(serial=7), ca_certificate()))


def test_several_lists_in_one_file(tmp_path: Path) -> None:
    crl, ca = write_crl(tmp_path, (7,))
    first = crl.read_bytes()
    write_crl(tmp_path, (9,))
    crl.write_bytes(first + b"# the next\n" + crl.read_bytes())
    assert [sorted(each.serials) for each in read_crls(crl, ca)] == [[7], [9]]


def test_a_crl_of_somebody_else_is_refused(tmp_path: Path) -> None:
    crl, ca = write_crl(tmp_path, (), key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(HostError, match="none of the trusted CAs signed"):
        read_crls(crl, ca)


def test_a_crl_that_has_run_out_still_keeps_out_whom_it_names(tmp_path: Path) -> None:
    crls = read_crls(*write_crl(tmp_path, (7,), until=NOW))
    late = lambda: NOW + timedelta(hours=1)  # noqa: E731
    defaults = TenantRules(accept_unlisted=True)
    for strict in (False, True):
        found = TenantDirectory(
            defaults, {}, certificates=True, crls=crls, crl_strict=strict, now=late
        )
        with pytest.raises(UnknownTenantError, match="revoked"):
            found.find(peer(certificate(serial=7), ca_certificate()))
        if not strict:
            assert found.find(peer(certificate(serial=8), ca_certificate())).name == "cn:a tenant"
            continue
        with pytest.raises(UnknownTenantError, match="revocation list has expired"):
            found.find(peer(certificate(serial=8), ca_certificate()))


@pytest.mark.parametrize("strict", [False, True])
def test_a_crl_that_has_run_out_stops_the_start_where_that_is_wanted(
    tmp_path: Path, strict: bool
) -> None:
    """A fleet that reboots after a month comes back, unless its owner said otherwise."""
    crl, ca = write_crl(tmp_path, (), until=NOW)  # NOW is long ago
    listen = Listen(client_ca=ca, client_crl=crl, crl_strict=strict)
    if not strict:
        load_tenant_directory(listen, TenantRules(), {})
        return
    with pytest.raises(HostError, match=r"has expired, and listen\.crl_strict is set"):
        load_tenant_directory(listen, TenantRules(), {})


def test_what_is_no_crl_is_refused(tmp_path: Path) -> None:
    crl, ca = write_crl(tmp_path, ())
    wrong = {
        b"": "is empty",
        b"-----BEGIN X509 CRL-----\n": "holds no X509 CRL",
        ca.read_bytes(): "holds no X509 CRL",
        os.urandom(100): "is not a CRL",
    }
    for data, words in wrong.items():
        crl.write_bytes(data)
        with pytest.raises(HostError, match=f"^listen.client_crl: .* {words}"):
            read_crls(crl, ca)
    crl.unlink()
    with pytest.raises(HostError, match=r"^listen\.client_crl: cannot read "):
        read_crls(crl, ca)


def test_a_delta_list_is_not_a_whole_one(tmp_path: Path) -> None:
    _, ca = write_crl(tmp_path, ())
    delta = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(name("ca"))
        .last_update(NOW - DAY)
        .next_update(NOW + DAY)
        .add_extension(x509.DeltaCRLIndicator(1), critical=True)
        .sign(CA_KEY, hashes.SHA256())
    )
    (tmp_path / "crl").write_bytes(delta.public_bytes(Encoding.PEM))
    with pytest.raises(HostError, match="of a kind that is not supported"):
        read_crls(tmp_path / "crl", ca)


# --- quotas -----------------------------------------------------------------------------------------

SLOW = Tenant(name="slow", pcr_allow=1, rate=2, burst=3, max_inflight=2)


async def test_a_bucket_fills_at_the_rate(autojump_clock: trio.testing.MockClock) -> None:
    quotas = Quotas()
    for _ in range(3):
        quotas.leave(quotas.enter(SLOW, wants_logs=False))
    with pytest.raises(TenantLimitError) as caught:
        quotas.enter(SLOW, wants_logs=False)
    assert caught.value.retry_after_s >= 1
    await trio.sleep(0.5)  # one token at two a second
    quotas.leave(quotas.enter(SLOW, wants_logs=False))
    with pytest.raises(TenantLimitError):
        quotas.enter(SLOW, wants_logs=False)
    await trio.sleep(1000)  # never more than the burst
    for _ in range(3):
        quotas.leave(quotas.enter(SLOW, wants_logs=False))
    with pytest.raises(TenantLimitError):
        quotas.enter(SLOW, wants_logs=False)


async def test_requests_in_flight_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    quotas = Quotas()
    first, _ = (quotas.enter(SLOW, wants_logs=False) for _ in range(2))
    with pytest.raises(TenantLimitError, match="in flight"):
        quotas.enter(SLOW, wants_logs=False)
    quotas.leave(first)
    quotas.enter(SLOW, wants_logs=False)


async def test_one_tenants_limit_is_nobody_elses(autojump_clock: trio.testing.MockClock) -> None:
    quotas = Quotas()
    other = Tenant(name="other", pcr_allow=1, rate=2, burst=3, max_inflight=2)
    for _ in range(2):
        quotas.enter(SLOW, wants_logs=False)
    quotas.enter(other, wants_logs=False)


async def test_logs_are_paid_for(autojump_clock: trio.testing.MockClock) -> None:
    quotas = Quotas()
    quick = Tenant(name="quick", pcr_allow=1, rate=1e6, burst=1e6, max_inflight=9)
    debt = LOG_BURST_BYTES + 10 * LOG_BYTES_PER_S
    quotas.leave(quotas.enter(quick, wants_logs=True), log_bytes=debt)
    with pytest.raises(TenantLimitError, match="ima_ml_entry"):
        quotas.enter(quick, wants_logs=True)
    quotas.leave(quotas.enter(quick, wants_logs=False))  # quotes without logs go on
    await trio.sleep(11)
    quotas.enter(quick, wants_logs=True)


async def test_what_is_remembered_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    quotas = Quotas()
    for number in range(MAX_REMEMBERED):
        who = Tenant(name=str(number), pcr_allow=1, rate=1, burst=1, max_inflight=1)
        quotas.leave(quotas.enter(who, wants_logs=False))
    await trio.sleep(100)
    quotas.enter(SLOW, wants_logs=False)
    assert len(quotas._quotas) == 1


def crowd(number: int, *, rate: float = 1, burst: int = 1) -> Tenant:
    return Tenant(name=str(number), pcr_allow=1, rate=rate, burst=burst, max_inflight=1)


async def test_a_newcomer_does_not_search_through_all(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are remembered, and in flight: a crowd of strangers costs each the same."""
    monkeypatch.setattr(quotas_module, "MAX_REMEMBERED", 100)
    looked: list[float] = []
    is_as_new = Quota.is_as_new

    def counted(quota: Quota, now: float) -> bool:
        looked.append(now)
        return is_as_new(quota, now)

    monkeypatch.setattr(Quota, "is_as_new", counted)
    quotas = Quotas()
    for number in range(1000):
        quotas.enter(crowd(number), wants_logs=False)
    assert 900 <= len(looked) <= 2 * 1000


async def test_one_in_flight_keeps_no_others_in_memory(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas_module, "MAX_REMEMBERED", 100)
    quotas = Quotas()
    waits = quotas.enter(crowd(0), wants_logs=False)
    for number in range(1, 300):
        quotas.leave(quotas.enter(crowd(number), wants_logs=False))
    await trio.sleep(100)
    for number in range(300, 310):
        quotas.leave(quotas.enter(crowd(number), wants_logs=False))
    assert len(quotas._quotas) <= 110
    assert quotas._quotas["0"] is waits


async def test_who_refills_slowly_is_not_forgotten_before_it_is_full(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To be forgotten must not be a way to a new burst."""
    monkeypatch.setattr(quotas_module, "MAX_REMEMBERED", 10)
    quotas = Quotas()
    slow = crowd(0, rate=0.001, burst=1)
    quotas.leave(quotas.enter(slow, wants_logs=False))
    for number in range(1, 100):
        await trio.sleep(1)
        quotas.leave(quotas.enter(crowd(number), wants_logs=False))
    with pytest.raises(TenantLimitError):
        quotas.enter(slow, wants_logs=False)
    assert len(quotas._quotas) <= 40


@given(
    st.floats(0.1, 100),
    st.integers(1, 20),
    st.lists(st.floats(0, 2), min_size=1, max_size=200),
)
def test_no_pattern_of_asking_gets_more_than_rate_and_burst(
    rate: float, burst: int, gaps: list[float]
) -> None:
    """Over any stretch of time: at most burst + rate x time."""
    now = [0.0]
    quotas = Quotas(now=lambda: now[0])
    who = Tenant(name="t", pcr_allow=1, rate=rate, burst=burst, max_inflight=1000)
    admitted: list[float] = []
    for gap in gaps:
        now[0] += gap
        try:
            quotas.leave(quotas.enter(who, wants_logs=False))
        except TenantLimitError:
            continue
        admitted.append(now[0])
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            span = admitted[last] - admitted[first]
            assert last - first + 1 <= burst + rate * span + 1e-6


@given(st.integers(1, 10), st.lists(st.booleans(), max_size=200))
def test_in_flight_never_passes_its_limit(limit: int, steps: list[bool]) -> None:
    quotas = Quotas(now=lambda: 0.0)
    who = Tenant(name="t", pcr_allow=1, rate=1, burst=1e9, max_inflight=limit)
    held = []
    for enters in steps:
        if enters:
            try:
                held.append(quotas.enter(who, wants_logs=False))
            except TenantLimitError:
                assert len(held) == limit
        elif held:
            quotas.leave(held.pop())
        assert len(held) <= limit
