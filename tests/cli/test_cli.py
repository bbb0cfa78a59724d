"""The commands as people run them: subprocesses, exit codes, files, the last line of `--json`."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from helpers import (
    HOST_UUID,
    LIMIT_S,
    Certs,
    FakeQuoter,
    command,
    daemon_with,
    free_port,
    make_certs,
    make_evidence,
    run_command,
    run_here,
)
from soft_ek import Authority, ek_certificate, rsa_ek
from verify_files import MASK, VALUE, VERIFY, Done, Files

from provider_proxy.errors import QuoteError
from provider_proxy.evidence.request_file import parse_request
from provider_proxy.evidence.tpm_writer import encode_ek, encode_public
from provider_proxy.evidence.vtpm_link import spki_digest
from provider_proxy.host.config.tables import BatchTable, Config, Listen, Logs
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.ek_files import read_certificates

GOOD, REFUSED, USAGE, ENVIRONMENT = 0, 1, 2, 3
NOWHERE = Path("/nonexistent")


def last_object(done: Done) -> dict[str, Any]:
    """The one JSON object in the last line of stdout."""
    values = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(values, dict)
    return values


def expect(done: Done, code: int, *words: str) -> Done:
    """The exit code, and these words in what people read; a traceback is never among them."""
    assert done.returncode == code, done.stderr + done.stdout
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    return done


# --- verify, offline --------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_verify_good(files: Files) -> None:
    done = expect(run_command(*VERIFY.split(), cwd=files.folder), GOOD)
    assert files.tpm.ak.name.hex() in done.stdout
    assert VALUE.hex() in done.stdout
    assert done.stderr == ""


def test_verify_json(files: Files) -> None:
    done = expect(files.verify("--json"), GOOD)
    assert last_object(done) == {
        "verified": True,
        "bank": "sha256",
        "pcrs": {"16": VALUE.hex()},
        "reset_count": 1,
        "restart_count": 0,
        "clock_ms": 1000,
        "clock_safe": True,
        "was_reset": False,
        "ak_name": files.tpm.ak.name.hex(),
    }


def test_verify_takes_a_raw_ak_too(files: Files) -> None:
    files.put("ak", files.tpm.ak_public)
    expect(files.verify(), GOOD)


def test_verify_with_a_pem_says_so(files: Files) -> None:
    pem = files.tpm.ak.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    files.put("ak.pem", pem)
    expect(files.verify(key=("--insecure-ak-pem", "ak.pem")), GOOD, "--insecure-ak-pem")


def test_verify_any_state_says_so(files: Files) -> None:
    expect(files.verify(policy=("--insecure-any-state",)), GOOD, "--insecure-any-state")


def test_verify_twice_is_fine_offline(files: Files) -> None:
    for _ in range(2):
        expect(files.verify(), GOOD)


def tampered(body: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    values = json.loads(body)
    change(values["results"])
    return json.dumps(values).encode()


def other_salt(results: dict[str, Any]) -> None:
    results["merkle"]["salt"] = "00" * 16


def other_index(results: dict[str, Any]) -> None:
    results["merkle"]["leaf_index"] ^= 1


def more_claims(results: dict[str, Any]) -> None:
    results["claims"] = base64.b64encode(b"{}").decode()


def other_mask(results: dict[str, Any]) -> None:
    results["mask"] = "0x1"


def other_name(results: dict[str, Any]) -> None:
    results["ak_name"] = "000b" + "00" * 32


def other_quote(results: dict[str, Any]) -> None:
    attest, signature, pcrs = results["quote"][1:].split(":")
    raw = bytearray(base64.b64decode(attest))
    raw[-1] ^= 1
    results["quote"] = "r" + ":".join((base64.b64encode(bytes(raw)).decode(), signature, pcrs))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (other_salt, "QualifyingDataError"),
        (other_index, "QualifyingDataError"),
        (more_claims, "ClaimsError"),
        (other_mask, "PcrSelectionError"),
        (other_name, "SignatureError"),
        (other_quote, "SignatureError"),
    ],
)
def test_tampered_evidence_is_refused(
    files: Files, change: Callable[[dict[str, Any]], None], error: str
) -> None:
    body = files.put("evidence.json", tampered(files.body, change)).read_bytes()
    files.record(answered_after_s=1.0, evidence_sha256=sha256(body).digest())
    done = expect(files.verify("--json"), REFUSED, f"refused: {error}: ")
    assert done.stdout == ""


def test_tampered_evidence_is_refused_by_the_command_itself(files: Files) -> None:
    body = files.put("evidence.json", tampered(files.body, other_quote)).read_bytes()
    files.record(answered_after_s=1.0, evidence_sha256=sha256(body).digest())
    expect(run_command(*VERIFY.split(), cwd=files.folder), REFUSED, "refused: SignatureError: ")


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", b'{"results":{"format":2}}', b"[" * 9999])
def test_what_is_no_evidence_is_refused(files: Files, body: bytes) -> None:
    files.put("evidence.json", body)
    files.record(answered_after_s=1.0, evidence_sha256=sha256(body).digest())
    expect(files.verify(), REFUSED, "refused: EvidenceFormatError: ")


def test_an_error_body_is_refused(files: Files) -> None:
    body = b'{"code":503,"status":"full","results":{}}'
    files.put("evidence.json", body)
    files.record(answered_after_s=1.0, evidence_sha256=sha256(body).digest())
    expect(files.verify(), REFUSED)


def test_another_tpm_is_refused(files: Files) -> None:
    files.put("ak", SoftTpm().ak_public)
    expect(files.verify(), REFUSED, "SignatureError")


def test_a_key_that_is_no_ak_is_refused(files: Files) -> None:
    files.put("ak", encode_public(ec.generate_private_key(ec.SECP256R1()).public_key(), 1 << 18))
    expect(files.verify(), REFUSED, "UntrustedAkError")


def test_another_state_is_refused(files: Files) -> None:
    files.put("policy.json", json.dumps({"16": ["00" * 32]}).encode())
    expect(files.verify(), REFUSED, "PolicyError", VALUE.hex())


@pytest.mark.parametrize("seconds", [60.1, 1e9])
def test_a_late_answer_is_refused(files: Files, seconds: float) -> None:
    files.record(answered_after_s=seconds, evidence_sha256=sha256(files.body).digest())
    expect(files.verify(), REFUSED, "StaleEvidenceError")
    expect(files.verify("--max-age", str(seconds + 1)), GOOD)


def test_an_unanswered_request_is_judged_by_the_wall_clock(files: Files) -> None:
    files.record()
    expect(files.verify(), GOOD)
    files.record(made_at_s=time.time() - 3600)
    expect(files.verify(), REFUSED, "StaleEvidenceError")
    files.record(made_at_s=time.time() + 3600)  # from the future
    expect(files.verify(), REFUSED, "StaleEvidenceError")


def test_an_exchanged_evidence_file_is_a_usage_error(files: Files) -> None:
    """A good answer to this very nonce, but not the one whose time was recorded."""
    files.put("evidence.json", make_evidence(files.tpm, files.request))
    expect(files.verify(), USAGE, "not the answer that the request file records")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b'{"format":"provider-proxy/request/2"}', b" " * 20_000]
)
def test_a_damaged_request_file_is_a_usage_error(files: Files, data: bytes) -> None:
    files.put("request.json", data)
    expect(files.verify(), USAGE, "request")


@pytest.mark.parametrize(
    "policy",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"16": "00"}',
        b'{"24": []}',
        b'{"16": []}',
        b'{"x": []}',
        b'{"mask": "0x10000"}',
        b"[" * 99_999,
    ],
)
def test_a_damaged_policy_is_a_usage_error(files: Files, policy: bytes) -> None:
    files.put("policy.json", policy)
    expect(files.verify(), USAGE)


def test_a_policy_beyond_the_request_is_a_usage_error(files: Files) -> None:
    files.put("policy.json", json.dumps({"16": VALUE.hex(), "0": "00" * 32}).encode())
    expect(files.verify(), USAGE, "were not requested")


@pytest.mark.parametrize("data", [b"", b"garbage", b"AAAA", b"x" * 70_000])
def test_a_file_that_is_no_key_is_a_usage_error(files: Files, data: bytes) -> None:
    files.put("ak", data)
    expect(files.verify(), USAGE)


@pytest.mark.parametrize("what", ["evidence", "request"])
@pytest.mark.parametrize("name", ["missing", ".", "evidence.json/x"])
def test_a_missing_file_is_the_environments_fault(files: Files, what: str, name: str) -> None:
    done = files.verify(evidence=name) if what == "evidence" else files.verify(request=name)
    expect(done, ENVIRONMENT, "cannot read")


def test_a_missing_key_or_policy_is_the_environments_fault(files: Files) -> None:
    expect(files.verify(key=("--ak-tpm", "no")), ENVIRONMENT, "cannot read no")
    expect(files.verify(key=("--insecure-ak-pem", "no")), ENVIRONMENT, "cannot read no")
    expect(files.verify(policy=("--tpm-policy", "no")), ENVIRONMENT, "cannot read no")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "verify",
        "verify e",
        "verify e --request r --insecure-any-state",
        "verify e --request r --ak-tpm a --insecure-ak-pem b --insecure-any-state",
        "verify e --request r --ak-tpm a --tpm-policy p --insecure-any-state",
        "verify e --request r --ak-tpm a --insecure-any-state --max-age soon",
        "verify e --request r --ak-tpm a --insecure-any-state --jsno",
        "--log-level loud verify e --request r --ak-tpm a --insecure-any-state",
        "fetch",
        "fetch http://127.0.0.1:1",
        "fetch http://127.0.0.1:1 --mask 0x1 --pcrs 0",
        "serve --port 1",
        "identity",
    ],
)
def test_a_wrong_command_line_is_a_usage_error(tmp_path: Path, line: str) -> None:
    expect(run_here(*line.split(), cwd=tmp_path), USAGE, "usage: ")


@pytest.mark.parametrize("words", [("--help",), ("verify", "--help"), ("fetch", "--help")])
def test_help(words: tuple[str, ...]) -> None:
    done = expect(run_command(*words), GOOD)
    assert "usage: provider-proxy" in done.stdout
    assert done.stderr == ""


# --- extras that are not installed ------------------------------------------------------------------

WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from provider_proxy.cli.main import main
main()
"""
HOST_MODULES = "trio,h11,merklelib,tpm2_pytss,prometheus_client,rich"


def run_without(modules: str, *words: str | Path, cwd: Path | None = None) -> Done:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, modules, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("modules", "words", "extra"),
    [
        ("httpx", ("fetch", "http://127.0.0.1:1", "--mask", "0x1"), "client"),
        ("httpx", ("identity", "http://127.0.0.1:1"), "client"),
        ("trio", ("serve", "--config", "c"), "host"),
        ("h11", ("serve", "--config", "c"), "host"),
        ("merklelib", ("serve", "--config", "c"), "host"),
        ("tpm2_pytss", ("serve", "--config", "c"), "host"),
        ("prometheus_client", ("serve", "--config", "c"), "host"),
        ("matplotlib", ("bench", "plan", "--plot", "d"), "plot"),
    ],
)
def test_a_missing_extra_is_named(modules: str, words: tuple[str, ...], extra: str) -> None:
    expect(run_without(modules, *words), ENVIRONMENT, f"extra '{extra}'", modules)


def test_a_plan_needs_no_tpm_libraries() -> None:
    expect(run_without("tpm2_pytss", "plan", "--tenants", "3", "--quote-ms", "50", "--json"), GOOD)


def test_verify_needs_no_extra(files: Files) -> None:
    modules = f"httpx,{HOST_MODULES},matplotlib"
    expect(run_without(modules, *VERIFY.split(), cwd=files.folder), GOOD)
    expect(run_without(modules, "--help"), GOOD)
    expect(run_without(modules, "verify", "--help"), GOOD)


def test_a_bug_is_no_verdict(files: Files) -> None:
    code = (
        "import provider_proxy.cli.verify as v\n"
        "def broken(*args): raise RuntimeError('a bug')\n"
        "v.parse_request = broken\n"
        "from provider_proxy.cli.main import main\nmain()"
    )
    words = "verify evidence.json --request request.json --ak-tpm ak --insecure-any-state"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        cwd=files.folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == ENVIRONMENT
    assert "a bug" in done.stderr


def test_a_closed_pipe_is_no_verdict(files: Files) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            command(*VERIFY.split()),
            cwd=files.folder,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=LIMIT_S,
            check=False,
        )
    finally:
        os.close(write)
    assert done.returncode == ENVIRONMENT
    assert b"Traceback" not in done.stderr


# --- against a server ---------------------------------------------------------------------------------


class Site:
    """A daemon over a fake quoter, and commands run beside it."""

    def __init__(self, folder: Path, quoter: FakeQuoter, url: str, certs: Certs) -> None:
        self.folder = folder
        self.quoter = quoter
        self.url = url
        self.certs = certs

    async def run(self, name: str, *words: str | Path, **more: Any) -> Done:
        with trio.fail_after(LIMIT_S):
            return await trio.to_thread.run_sync(
                lambda: run_command(name, self.url, *words, cwd=self.folder, **more)
            )

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def plain() -> Listen:
    return Listen(address=("127.0.0.1:0",), insecure_plaintext=True)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Certs:
    return make_certs(tmp_path_factory.mktemp("certs"))


@pytest.fixture(params=["http"])
async def site(request: pytest.FixtureRequest, tmp_path: Path, certs: Certs) -> AsyncIterator[Site]:
    quoter = FakeQuoter(SoftTpm(pcrs={16: b"good"}))
    listen = plain()
    if request.param == "https":
        listen = Listen(
            address=("127.0.0.1:0",),
            tls_cert=certs.cert,
            tls_key=certs.key,
            client_ca=certs.ca_file,
        )
    config = Config(
        state_dir=NOWHERE,
        listen=listen,
        batch=BatchTable(window_ms=1.0),
        logs=Logs(ima=NOWHERE, uefi=NOWHERE),
    )
    async with daemon_with(quoter, config) as started:
        yield Site(tmp_path, quoter, f"{request.param}://{started.addresses[0]}", certs)


async def test_identity_fetch_verify(site: Site) -> None:
    done = expect(
        await site.run("identity", "--save-ak", "ak", "--json"), GOOD, "what the proxy claims"
    )
    assert last_object(done) == {
        "ak_name": site.quoter.ak.name.hex(),
        "sign_alg": "ecdsa",
        "host_uuid": str(HOST_UUID),
        "software": True,
        "ek_cert": False,
        "ek_chain": 0,
        "ek_sha256": None,  # the fake EK is not a key
        "registrations": [],
    }
    expect(await site.run("identity", "--save-ek", "ek.pem"), REFUSED, "nothing to save")
    assert base64.b64decode(site.read("ak")) == site.quoter.tpm.ak_public
    done = expect(await site.run("fetch", "--mask", "0x10000", "--json"), GOOD)
    assert last_object(done) == {"evidence": "evidence.json", "request": "request.json"}
    record = parse_request(site.read("request.json"))
    assert record.request.mask == MASK
    assert record.url == site.url
    assert record.evidence_sha256 == sha256(site.read("evidence.json")).digest()
    assert record.answered_after_s is not None
    assert 0 <= record.answered_after_s < LIMIT_S
    (site.folder / "policy.json").write_text(json.dumps({"16": VALUE.hex()}))
    words = "evidence.json --request request.json --ak-tpm ak --tpm-policy policy.json --json"
    with trio.fail_after(LIMIT_S):
        done = await trio.to_thread.run_sync(
            lambda: run_command("verify", *words.split(), cwd=site.folder)
        )
    assert last_object(expect(done, GOOD))["pcrs"] == {"16": VALUE.hex()}


async def test_files_are_the_owners_alone(site: Site) -> None:
    expect(await site.run("fetch", "--pcrs", "16", "--evidence", "e", "--request", "r"), GOOD)
    assert site.names() == ["e", "r"]
    for name in ("e", "r"):
        assert stat.S_IMODE(os.stat(site.folder / name).st_mode) == 0o600


async def test_people_are_told_that_nothing_is_verified_yet(site: Site) -> None:
    done = expect(await site.run("fetch", "--pcrs", "16"), GOOD)
    assert "not verified yet" in done.stdout


@pytest.mark.parametrize(("pcrs", "mask"), [("0", 1), ("16,0,1", 0x10003), ("23", 1 << 23)])
async def test_pcrs_are_a_mask(site: Site, pcrs: str, mask: int) -> None:
    expect(await site.run("fetch", "--pcrs", pcrs, "--bank", "sha256"), GOOD)
    assert parse_request(site.read("request.json")).request.mask == mask


async def test_each_fetch_has_a_nonce_of_its_own(site: Site) -> None:
    nonces = set()
    for _ in range(2):
        expect(await site.run("fetch", "--pcrs", "16"), GOOD)
        nonces.add(parse_request(site.read("request.json")).request.nonce)
    assert len(nonces) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("--mask", "1"),
        ("--mask", "0x0"),
        ("--mask", "0x1000000"),
        ("--pcrs", "24"),
        ("--pcrs", ""),
        ("--pcrs", "0,,1"),
        ("--pcrs", "-1"),
        ("--pcrs", "9" * 5000),
        ("--mask", "0x1", "--bank", "md5"),
        ("--mask", "0x1", "--vm", "me"),
        ("--mask", "0x1", "--timeout-ms", "0"),
        ("--mask", "0x1", "--timeout-ms", "600001"),
        ("--mask", "0x1", "--timeout-ms", "x"),
        ("--mask", "0x1", "--cert", "c"),
        ("--mask", "0x1", "--key", "k"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run_here("fetch", "http://127.0.0.1:1", *words, cwd=tmp_path)
    expect(done, USAGE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["", "127.0.0.1:8890", "ftp://127.0.0.1", "HTTPS//x"])
def test_a_url_that_is_none_is_a_usage_error(tmp_path: Path, url: str) -> None:
    expect(run_here("fetch", url, "--mask", "0x1", cwd=tmp_path), USAGE, "URL")
    expect(run_here("identity", url, cwd=tmp_path), USAGE, "URL")


async def test_a_proxy_that_refuses(site: Site) -> None:
    """The question stays on disk; no evidence is written, and an old one is not touched."""
    (site.folder / "evidence.json").write_bytes(b"old")
    site.quoter.error = QuoteError("the TPM gave no quote")
    done = await site.run("fetch", "--pcrs", "16", "--json")
    expect(done, ENVIRONMENT, "the proxy answered 503: the TPM gave no quote")
    assert done.stdout == ""
    assert site.read("evidence.json") == b"old"
    assert parse_request(site.read("request.json")).answered_after_s is None
    site.quoter.error = None
    done = await site.run("fetch", "--pcrs", "10")
    expect(done, ENVIRONMENT, "the proxy answered 400: mask")
    done = await site.run("fetch", "--pcrs", "16", "--vm", str(HOST_UUID))
    expect(done, ENVIRONMENT, "the proxy answered 404")


def test_nobody_there(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = run_command("fetch", url, "--mask", "0x1", cwd=tmp_path)
    expect(done, ENVIRONMENT, "the proxy gave no answer")
    assert os.listdir(tmp_path) == ["request.json"]
    expect(run_command("identity", url, cwd=tmp_path), ENVIRONMENT, "the proxy gave no answer")


async def test_a_place_that_cannot_be_written(site: Site) -> None:
    (site.folder / "file").write_bytes(b"")
    for words in (("--request", "file/x"), ("--evidence", "file/x")):
        done = await site.run("fetch", "--pcrs", "16", *words)
        expect(done, ENVIRONMENT, "cannot write file/x")
    expect(await site.run("identity", "--save-ak", "file/x"), ENVIRONMENT, "cannot write file/x")


async def test_the_ek_s_certificate_and_chain_are_saved(site: Site) -> None:
    maker = Authority("maker")
    chip_ca = Authority("chip's own", maker)
    ek, cert = rsa_ek(), ek_certificate(chip_ca, rsa_ek())
    site.quoter.identity = type(site.quoter.identity)(
        ak_public=site.quoter.tpm.ak_public,
        ek_public=encode_ek(ek.public_key()),
        ek_cert=cert,
        ek_chain=(chip_ca.der(),),
        host_uuid=HOST_UUID,
        software=False,
    )
    config = Config(state_dir=NOWHERE, listen=plain(), logs=Logs(ima=NOWHERE, uefi=NOWHERE))
    async with daemon_with(site.quoter, config) as started:
        site.url = f"http://{started.addresses[0]}"
        done = await site.run("identity", "--save-ek", "ek.pem", "--json")
    values = last_object(expect(done, GOOD))
    assert (values["ek_cert"], values["ek_chain"]) == (True, 1)
    assert values["ek_sha256"] == spki_digest(ek.public_key()).hex()
    (site.folder / "ca.pem").write_bytes(maker.pem())
    words = ("ek-ca", "check", "--cert", "ek.pem", "--ek-ca", "ca.pem")
    expect(run_here(*words, cwd=site.folder), GOOD)
    assert read_certificates(site.read("ek.pem")) == (cert, chip_ca.der())


async def test_what_is_no_ak_is_refused(site: Site) -> None:
    """A proxy that names a key that signs anything."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    site.quoter.identity = type(site.quoter.identity)(
        ak_public=encode_public(key, 1 << 18),
        ek_public=b"",
        ek_cert=None,
        host_uuid=HOST_UUID,
        software=True,
    )
    config = Config(state_dir=NOWHERE, listen=plain(), logs=Logs(ima=NOWHERE, uefi=NOWHERE))
    async with daemon_with(site.quoter, config) as started:
        site.url = f"http://{started.addresses[0]}"
        done = await site.run("identity", "--save-ak", "ak")
    expect(done, REFUSED, "UntrustedAkError")
    assert site.names() == []


@pytest.mark.parametrize("site", ["https"], indirect=True)
async def test_tls(site: Site) -> None:
    certs = site.certs
    own = ("--cert", certs.client_cert, "--key", certs.client_key)
    expect(await site.run("fetch", "--pcrs", "16", "--ca", certs.ca_file, *own), GOOD)
    expect(await site.run("identity", "--ca", certs.ca_file, *own), GOOD)
    # the system's CAs do not know this one; the server demands a certificate
    expect(await site.run("fetch", "--pcrs", "16", *own), ENVIRONMENT, "no answer")
    expect(await site.run("fetch", "--pcrs", "16", "--ca", certs.ca_file), ENVIRONMENT, "no answer")
    for words in (("--ca", "none"), ("--ca", certs.ca_file, "--cert", "none", "--key", "none")):
        message = f"{words[-4:][0]}: cannot read none"
        expect(await site.run("fetch", "--pcrs", "16", *words), ENVIRONMENT, message)


async def test_a_proxy_of_the_environment_is_not_asked(site: Site) -> None:
    env = {
        name: f"http://127.0.0.1:{free_port()}"
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY")
    }
    expect(await site.run("identity", env=env), GOOD)


# --- serve ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[listen", "c.toml"),
        ("x = 1", "x is not a key"),
        ("[batch]\nwindow_ms = -1", "batch.window_ms must be >= 0"),
        ("", "listen.tls_cert and listen.tls_key must be set"),
        ('[listen]\ninsecure_plaintext = true\naddress = "0.0.0.0:1"', "loopback"),
    ],
)
def test_serve_with_a_bad_file(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(toml)
    expect(run_command("serve", "--config", "c.toml", cwd=tmp_path), USAGE, message)


def test_serve_without_a_file(tmp_path: Path) -> None:
    done = run_command("serve", "--config", "none.toml", cwd=tmp_path)
    expect(done, ENVIRONMENT, "cannot read none.toml: No such file or directory")
