"""`provider-proxy tpm`, `pin`, and `--pinned` of `fetch` and `verify`: what they print, what they leave,
and their exit codes."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from helpers import LIMIT_S, NO_LOGS, FakeQuoter, children_of, daemon_with, is_alive, run_here
from tpm_helpers import AK_HANDLE, EK_HANDLE, Swtpm, plain_config, swtpm_at, tool

from provider_proxy.evidence.model import ClockState
from provider_proxy.evidence.request_file import parse_request
from provider_proxy.evidence.tpm_keys import parse_ak
from provider_proxy.evidence.tpm_writer import AK_ATTRIBUTES, encode_public
from provider_proxy.host.tpm.doctor import Report
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.pins import PinStore

GOOD, REFUSED, USAGE, ENVIRONMENT = 0, 1, 2, 3
OLDEST = ClockState(reset_count=0, restart_count=0, clock_ms=0)
Done = subprocess.CompletedProcess[str]


def expect(done: Done, code: int, *words: str) -> Done:
    """The exit code, and these words in what people read; never a traceback."""
    assert done.returncode == code, done.stderr + done.stdout
    for word in words:
        assert word in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    if code != GOOD:
        assert done.stdout == ""
        assert done.stderr.splitlines()[-1].startswith("provider-proxy: ")
    return done


def last_object(done: Done) -> dict[str, Any]:
    """The one JSON object in the last line of stdout."""
    values = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(values, dict)
    return values


# --- tpm --------------------------------------------------------------------------------------------


class Host:
    """A configuration, and a swtpm that is somebody else's."""

    def __init__(self, folder: Path, tpm: Swtpm) -> None:
        self.folder = folder
        self.tpm = tpm
        self.configure(tpm.tcti)

    def configure(self, tcti: str, more: str = "") -> None:
        (self.folder / "c.toml").write_text(
            f'state_dir = "{self.folder / "s"}"\n'
            '[listen]\naddress = "127.0.0.1:0"\ninsecure_plaintext = true\n'
            f'[tpm]\ntcti = "{tcti}"\n{more}{NO_LOGS}'
        )

    def run(self, *words: str) -> Done:
        return run_here("tpm", *words, "--config", "c.toml", cwd=self.folder)

    def persistent(self) -> list[str]:
        return tool(self.tpm.tcti, "tpm2_getcap", "handles-persistent").split()[1::2]

    def leaves_nothing(self) -> bool:
        """In the chip, but for what is persistent."""
        kinds = ("handles-transient", "handles-loaded-session", "handles-saved-session")
        return all(not tool(self.tpm.tcti, "tpm2_getcap", kind).split() for kind in kinds)


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with swtpm_at(tmp_path_factory.mktemp("chip")) as made:
        yield made


@pytest.fixture
def host(chip: Swtpm, tmp_path: Path) -> Iterator[Host]:
    yield Host(tmp_path, chip)
    tool(chip.tcti, "tpm2_clear", "-c", "p")


@pytest.mark.real
def test_doctor_for_people(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = expect(host.run("doctor"), GOOD)
    for words in (
        *("manufacturer", "IBM", "firmware", "PCR banks", "sha256", "algorithms", "ecdsa"),
        *("persistent handles", "a quote, ecc", "a quote, rsa", " ms", "sessions loaded free"),
        *("context gap max", "65535", "software TPM"),
    ):
        assert words in done.stdout
    assert host.persistent() == []
    assert host.leaves_nothing()


@pytest.mark.real
def test_doctor_for_programs(host: Host) -> None:
    values = last_object(expect(host.run("doctor", "--json"), GOOD))
    assert sorted(values) == sorted(field.name for field in fields(Report))
    assert values["manufacturer"] == "IBM"
    assert sorted(values["quote_ms"]) == ["ecc", "rsa"]
    assert values["limits"]["sessions_max"] == 64
    assert values["persistent"] == []
    assert not (host.folder / "s").exists()  # it has no business there


@pytest.mark.real
def test_doctor_on_the_embedded_tpm(
    tmp_path: Path, chip: Swtpm, caplog: pytest.LogCaptureFixture
) -> None:
    """Started for the moment, and stopped again."""
    host = Host(tmp_path, chip)
    host.configure("embedded")
    before = children_of(os.getpid())
    done = expect(host.run("doctor", "--json"), GOOD)
    assert "NOT a hardware TPM" in caplog.text
    assert last_object(done)["vendor"].startswith("SW")
    assert [pid for pid in children_of(os.getpid()) if pid not in before and is_alive(pid)] == []


@pytest.mark.real
def test_doctor_needs_no_configuration(
    tmp_path: Path, chip: Swtpm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None in its default place, or one with faults: the defaults, and another TPM by --tcti."""
    default = tmp_path / "default.toml"
    monkeypatch.setattr("provider_proxy.cli.arguments.DEFAULT_CONFIG", default)
    monkeypatch.setattr("provider_proxy.cli.tpm.DEFAULT_CONFIG", default)
    words = ("tpm", "doctor", "--tcti", chip.tcti)
    done = expect(run_here(*words, cwd=tmp_path), GOOD)
    for line in ("What to do:", "Make the EK and the AK", "This is a software TPM"):
        assert line in done.stdout
    default.write_text("[tpm]\nwrong = 1\n")
    expect(run_here(*words, cwd=tmp_path), GOOD)
    assert "the defaults are used" in caplog.text
    done = run_here("tpm", "doctor", "--tcti", "swtpm:path=/nonexistent", cwd=tmp_path)
    expect(done, ENVIRONMENT, "cannot open the TPM")


@pytest.mark.real
def test_an_ak_is_made_shown_and_exported(host: Host) -> None:
    """`show` and `export` make nothing; `create` makes once; all speak of the same key."""
    expect(host.run("ak", "show"), ENVIRONMENT, hex(AK_HANDLE), "tpm ak create")
    expect(host.run("ak", "export", "--out", "x"), ENVIRONMENT, hex(AK_HANDLE))
    assert host.persistent() == []
    assert not (host.folder / "x").exists()
    made = last_object(expect(host.run("ak", "create", "--json"), GOOD))
    assert [handle.lower() for handle in host.persistent()] == [hex(AK_HANDLE), hex(EK_HANDLE)]
    public = base64.b64decode(made["ak_tpm"])
    key = parse_ak(public)
    assert made == {
        "handle": hex(AK_HANDLE),
        "ak_name": key.name.hex(),
        "sign_alg": "ecdsa",
        "hash_alg": "sha256",
        "ak_tpm": made["ak_tpm"],
    }
    told = tool(host.tpm.tcti, "tpm2_readpublic", "-c", hex(AK_HANDLE))
    assert f"name: {made['ak_name']}" in told
    for words in (("create",), ("show",)):
        assert last_object(expect(host.run("ak", *words, "--json"), GOOD)) == made
        text = expect(host.run("ak", *words), GOOD, *made.values()).stdout
        assert len(text.splitlines()) == len(made)
    stored = json.loads((host.folder / "s" / "ak.json").read_text())
    assert stored["name"] == made["ak_name"]
    assert stored["auth"] not in "".join(json.dumps(made) + text)
    assert host.leaves_nothing()


@pytest.mark.real
def test_an_export_is_what_other_commands_take(host: Host) -> None:
    made = last_object(expect(host.run("ak", "create", "--json"), GOOD))
    public = base64.b64decode(made["ak_tpm"])
    exports = {"default": (), "base64": ("--format", "base64"), "raw": ("--format", "raw")}
    exports["pem"] = ("--format", "pem")
    for name, words in exports.items():
        done = host.run("ak", "export", "--out", name, "--json", *words)
        assert last_object(expect(done, GOOD)) == made
        assert stat.S_IMODE((host.folder / name).stat().st_mode) == 0o600
    assert (host.folder / "raw").read_bytes() == public
    assert base64.b64decode((host.folder / "base64").read_bytes(), validate=False) == public
    assert (host.folder / "default").read_bytes() == (host.folder / "base64").read_bytes()
    pem = load_pem_public_key((host.folder / "pem").read_bytes())
    assert pem == parse_ak(public).public_key
    for name in ("default", "raw"):
        words = ("add", name, "--ak-tpm", name, "--pins", "pins", "--json")
        done = expect(run_here("pin", *words, cwd=host.folder), GOOD)
        assert last_object(done) == {"host": name, "ak_name": made["ak_name"], "ek_name": None}


@pytest.mark.real
@pytest.mark.parametrize("out", ["/proc/x", ".", "c.toml/x"])
def test_an_export_that_cannot_be_written(host: Host, out: str) -> None:
    expect(host.run("ak", "create"), GOOD)
    expect(host.run("ak", "export", "--out", out), ENVIRONMENT, "cannot write")


@pytest.mark.real
def test_an_rsa_ak(host: Host) -> None:
    host.configure(host.tpm.tcti, 'ak_algorithm = "rsa"\n')
    made = last_object(expect(host.run("ak", "create", "--json"), GOOD))
    assert made["sign_alg"] == "rsassa"
    host.configure(host.tpm.tcti)
    expect(host.run("ak", "create"), ENVIRONMENT, "tpm.ak_algorithm")
    assert last_object(expect(host.run("ak", "show", "--json"), GOOD)) == made


@pytest.mark.real
@pytest.mark.parametrize("words", [("show",), ("export", "--out", "x"), ("create",)])
def test_a_foreign_key_at_the_handle(host: Host, words: tuple[str, ...]) -> None:
    """The host is not as it should be: that is 3; 1 is for evidence that is refused."""
    make_foreign_key(host)
    before = tool(host.tpm.tcti, "tpm2_readpublic", "-c", hex(AK_HANDLE))
    done = expect(host.run("ak", *words), ENVIRONMENT)
    assert hex(AK_HANDLE) in done.stderr or "tpm.ak_handle" in done.stderr
    assert tool(host.tpm.tcti, "tpm2_readpublic", "-c", hex(AK_HANDLE)) == before
    assert not (host.folder / "x").exists()


def make_foreign_key(host: Host) -> None:
    """A storage key where the AK belongs."""
    tcti = host.tpm.tcti
    tool(tcti, "tpm2_createprimary", "-Q", "-C", "o", "-c", host.folder / "key")
    tool(tcti, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", host.folder / "key", hex(AK_HANDLE))
    tool(tcti, "tpm2_flushcontext", "-t")


ACTIONS = [("doctor",), ("ak", "show"), ("ak", "create"), ("ak", "export", "--out", "x")]


@pytest.mark.real
@pytest.mark.parametrize("words", ACTIONS, ids=" ".join)
def test_no_tpm(tmp_path: Path, chip: Swtpm, words: tuple[str, ...]) -> None:
    host = Host(tmp_path, chip)
    host.configure(f"swtpm:path={tmp_path}/nowhere")
    expect(host.run(*words), ENVIRONMENT, "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml"]


@pytest.mark.parametrize("words", ACTIONS, ids=" ".join)
def test_bad_configurations(tmp_path: Path, words: tuple[str, ...]) -> None:
    def run() -> Done:
        return run_here("tpm", *words, "--config", "c.toml", cwd=tmp_path)

    expect(run(), ENVIRONMENT, "c.toml")  # it is missing
    (tmp_path / "c.toml").write_text("[tpm]\nwrong = 1\n")
    expect(run(), USAGE, "tpm.wrong")


@pytest.mark.parametrize(
    "line",
    [
        "tpm",
        "tpm ak",
        "tpm doctor c.toml",
        "tpm ak show c.toml",
        "tpm ak export --config c",
        "tpm ak export --config c --out x --format der",
        "tpm ak destroy --config c",
        "pin",
        "pin add h --pins p",
        "pin add --ak-tpm a --pins p",
        "pin list",
        "pin remove --pins p",
        "pin change h --pins p",
    ],
)
def test_a_wrong_command_line(tmp_path: Path, line: str) -> None:
    done = run_here(*line.split(), cwd=tmp_path)
    assert done.returncode == USAGE
    assert "usage: provider-proxy" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- pin --------------------------------------------------------------------------------------------


class Tenant:
    """A tenant's folder, with the AK of one TPM in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tpm = SoftTpm()
        self.put("ak", base64.b64encode(self.tpm.ak_public) + b"\n")
        self.pins = PinStore(folder / "pins")

    def put(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def pin(self, *words: str) -> Done:
        return run_here("pin", *words, "--pins", "pins", cwd=self.folder)

    def add(self, *more: str, label: str = "h", ak: str = "ak") -> Done:
        return self.pin("add", label, "--ak-tpm", ak, *more)


@pytest.fixture
def tenant(tmp_path: Path) -> Tenant:
    return Tenant(tmp_path)


def test_pin_add_list_remove(tenant: Tenant) -> None:
    name = tenant.tpm.ak.name.hex()
    assert last_object(expect(tenant.pin("list", "--json"), GOOD)) == {"hosts": []}
    assert expect(tenant.pin("list"), GOOD).stdout == ""
    assert expect(tenant.add(), GOOD).stdout == f"h {name}\n"
    tenant.put("raw", tenant.tpm.ak_public)
    done = expect(tenant.add("--json", label="b", ak="raw"), GOOD)
    assert last_object(done) == {"host": "b", "ak_name": name, "ek_name": None}
    tenant.pins.load("h").accept(ClockState(reset_count=3, restart_count=1, clock_ms=777))
    assert last_object(expect(tenant.pin("list", "--json"), GOOD)) == {
        "hosts": [
            {"host": "b", "ak_name": name, "ek_name": None, "reset_count": None, "clock_ms": None},
            {"host": "h", "ak_name": name, "ek_name": None, "reset_count": 3, "clock_ms": 777},
        ]
    }
    lines = expect(tenant.pin("list"), GOOD).stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["h", name, "-", "3", "777"]
    assert last_object(expect(tenant.pin("remove", "b", "--json"), GOOD)) == {"host": "b"}
    expect(tenant.pin("remove", "h"), GOOD)
    assert tenant.pins.labels() == []
    expect(tenant.pin("remove", "h"), USAGE, "not pinned")


def test_a_changed_ak_is_refused_until_anew(tenant: Tenant) -> None:
    expect(tenant.add(), GOOD)
    expect(tenant.add(), GOOD)  # the same once more
    other = SoftTpm()
    tenant.put("other", base64.b64encode(other.ak_public))
    words = ("PinChangedError", tenant.tpm.ak.name.hex(), other.ak.name.hex())
    expect(tenant.add(ak="other"), REFUSED, *words)
    assert tenant.pins.load("h").host.ak.name == tenant.tpm.ak.name
    expect(tenant.add("--replace", ak="other"), GOOD, other.ak.name.hex())
    assert tenant.pins.load("h").host.ak.name == other.ak.name


def test_a_key_that_is_no_ak_is_refused(tenant: Tenant) -> None:
    public = encode_public(tenant.tpm.ak.public_key, AK_ATTRIBUTES & ~(1 << 16))
    tenant.put("key", base64.b64encode(public))
    expect(tenant.add(ak="key"), REFUSED, "UntrustedAkError")
    assert tenant.pins.labels() == []


PEM = (
    b"-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n"
)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", b"AAAA", PEM, b"x" * 70_000],
    ids=["empty", "garbage", "short", "PEM", "large"],
)
def test_a_file_that_is_no_key_is_a_usage_error(tenant: Tenant, data: bytes) -> None:
    """As for `verify --ak-tpm`: nothing was refused, something else was given."""
    tenant.put("key", data)
    expect(tenant.add(ak="key"), USAGE)
    assert tenant.pins.labels() == []


def test_a_missing_file_and_a_bad_label(tenant: Tenant) -> None:
    expect(tenant.add(ak="missing"), ENVIRONMENT, "missing")
    for label in ("a/b", "..", "a b"):
        expect(tenant.add(label=label), USAGE, "label")
        expect(tenant.pin("remove", label), USAGE, "label")
    assert tenant.pins.labels() == []


def test_a_damaged_pin_is_named(tenant: Tenant) -> None:
    expect(tenant.add(), GOOD)
    (tenant.folder / "pins" / "h.json").write_text("{")
    expect(tenant.pin("list"), ENVIRONMENT, "h.json", "damaged")
    expect(tenant.add(), ENVIRONMENT, "damaged")
    expect(tenant.add("--replace"), GOOD)
    expect(tenant.pin("remove", "h"), GOOD)


# --- fetch --pinned, verify --pinned ------------------------------------------------------------------


class Site:
    """A daemon whose TPM's clock a test sets, and a tenant that pins it as "h"."""

    def __init__(self, folder: Path, url: str, quoter: FakeQuoter) -> None:
        self.tenant = Tenant(folder)
        self.url = url
        self.quoter = quoter

    async def run(self, *words: str) -> Done:
        with trio.fail_after(LIMIT_S):
            return await trio.to_thread.run_sync(lambda: run_here(*words, cwd=self.tenant.folder))

    async def fetch(self, name: str = "e", *, pinned: bool = True) -> ClockState | None:
        """Ask; the baseline that the request file has, None where it is older than any clock."""
        words = ("--pinned", "h", "--pins", "pins") if pinned else ()
        files = ("--evidence", name, "--request", f"{name}.request")
        expect(await self.run("fetch", self.url, "--pcrs", "0", *files, *words), GOOD)
        baseline = parse_request(self.read(f"{name}.request")).baseline
        return None if baseline == OLDEST else baseline

    async def verify(self, name: str = "e", *more: str) -> Done:
        return await self.run(
            *("verify", name, "--request", f"{name}.request", "--pinned", "h", "--pins", "pins"),
            *("--insecure-any-state", *more),
        )

    def read(self, name: str) -> bytes:
        return (self.tenant.folder / name).read_bytes()

    def set_clock(self, clock_ms: int, resets: int = 1) -> ClockState:
        clock = ClockState(reset_count=resets, restart_count=0, clock_ms=clock_ms)
        self.quoter.tpm.clock = clock
        return clock

    @property
    def newest(self) -> ClockState | None:
        return self.tenant.pins.load("h").newest()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    quoter = FakeQuoter()
    async with daemon_with(quoter, plain_config(tmp_path / "nowhere")) as started:
        made = Site(tmp_path, f"http://{started.addresses[0]}", quoter)
        made.tenant.pins.pin("h", quoter.tpm.ak_public)
        yield made


async def test_the_history_goes_from_verify_to_the_next_fetch(site: Site) -> None:
    first = site.set_clock(1000)
    assert await site.fetch() is None  # nothing is known yet
    assert last_object(expect(await site.verify("e", "--json"), GOOD))["clock_ms"] == 1000
    assert site.newest == first
    second = site.set_clock(2000)
    assert await site.fetch() == first
    expect(await site.verify(), GOOD, "2000 ms")
    assert site.newest == second
    assert await site.fetch(pinned=False) is None


async def test_a_reboot_passes_and_is_reported(site: Site) -> None:
    site.set_clock(1000)
    await site.fetch()
    assert last_object(expect(await site.verify("e", "--json"), GOOD))["was_reset"] is False
    rebooted = site.set_clock(7, resets=2)
    await site.fetch()
    values = last_object(expect(await site.verify("e", "--json"), GOOD))
    assert values["reset_count"] == 2
    assert values["clock_ms"] == 7
    assert values["was_reset"] is True
    assert site.newest == rebooted


async def test_a_rollback_is_refused(site: Site) -> None:
    newest = site.set_clock(1000, resets=3)
    await site.fetch()
    expect(await site.verify(), GOOD)
    for clock_ms, resets in ((999, 3), (5000, 2)):
        site.set_clock(clock_ms, resets)
        await site.fetch()
        expect(await site.verify(), REFUSED, "ClockError")
        assert site.newest == newest
    site.set_clock(1001, 3)
    await site.fetch()
    expect(await site.verify(), GOOD)


@pytest.mark.parametrize("known", [True, False], ids=["a known host", "the first questions"])
async def test_answers_may_be_verified_in_any_order(site: Site, known: bool) -> None:
    """The baseline is of the moment of the question; that there was none yet is one too."""
    before = None
    if known:
        before = site.set_clock(500)
        await site.fetch()
        expect(await site.verify(), GOOD)
    for number in range(3):
        site.set_clock(1000 + number)
        assert await site.fetch(f"e{number}") == before
    for number in (2, 0, 1):
        expect(await site.verify(f"e{number}"), GOOD)
    assert site.newest is not None
    assert site.newest.clock_ms == 1002


async def test_a_request_that_noted_no_baseline_is_held_against_all(site: Site) -> None:
    """Asked without `--pinned`, it cannot say when it was asked."""
    site.set_clock(1000)
    await site.fetch("early", pinned=False)
    site.set_clock(2000)
    await site.fetch("late")
    expect(await site.verify("late"), GOOD)
    expect(await site.verify("early"), REFUSED, "ClockError")


async def test_another_ak_than_the_pinned_one_is_refused(site: Site) -> None:
    site.tenant.pins.pin("h", SoftTpm().ak_public, replace=True)
    await site.fetch()
    expect(await site.verify(), REFUSED, "SignatureError")
    assert site.newest is None  # what was refused is not remembered


async def test_a_damaged_pin_verifies_nothing(site: Site) -> None:
    await site.fetch()
    (site.tenant.folder / "pins" / "h.json").write_text("{}")
    expect(await site.verify(), ENVIRONMENT, "damaged")
    done = await site.run("fetch", site.url, "--pcrs", "0", "--pinned", "h", "--pins", "pins")
    expect(done, ENVIRONMENT, "damaged")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pinned h", "--pins"),
        ("--pinned other --pins pins", "not pinned"),
        ("--pinned a/b --pins pins", "label"),
        ("--pinned h --pins nowhere", "not pinned"),
    ],
)
async def test_pinned_needs_a_pin(site: Site, words: str, message: str) -> None:
    await site.fetch()
    verify = ("verify", "e", "--request", "e.request", "--insecure-any-state", *words.split())
    expect(await site.run(*verify), USAGE, message)
    before = sorted(site.tenant.folder.rglob("*"))
    expect(await site.run("fetch", site.url, "--pcrs", "0", *words.split()), USAGE, message)
    assert sorted(site.tenant.folder.rglob("*")) == before  # nobody was asked


async def test_pinned_and_a_key_are_one_too_many(site: Site) -> None:
    await site.fetch()
    done = await site.verify("e", "--ak-tpm", "ak")
    assert done.returncode == USAGE


@pytest.mark.real
def test_ak_renew(host: Host) -> None:
    before = last_object(expect(host.run("ak", "create", "--json"), GOOD))
    secret = host.folder / "e"
    secret.touch(mode=0o600)
    secret.write_text("f" * 15)
    words = ("ak", "renew", "--endorsement-auth", str(secret))
    expect(host.run(*words), USAGE, "16 to 32 bytes")
    secret.write_text("f" * 16 + "\n")
    shown = expect(host.run(*words), GOOD, before["ak_name"], "no old private part loads", "reboot")
    assert "f" * 16 not in shown.stdout + shown.stderr
    host.configure(host.tpm.tcti, f'endorsement_auth_file = "{secret}"\n')
    expect(host.run(*words), USAGE, "make another one")
    other = host.folder / "other"
    other.touch(mode=0o600)
    other.write_text("g" * 16)
    done = host.run("ak", "renew", "--endorsement-auth", str(other), "--json")
    expected = {"ak_name": before["ak_name"], "copies_removed": [], "vtpm_ca_key": False}
    assert last_object(expect(done, GOOD)) == expected
    secret.chmod(0o644)
    expect(host.run(*words), ENVIRONMENT, "must not be readable by others")
