"""Registrations in the real Keylime registrar, by a real TPM (swtpm): rounds, daemon, commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from docs_helpers import codes, fenced, read, rows
from helpers import (
    LIMIT_S,
    Asker,
    connect,
    free_port,
    get,
    listening_socket,
    plain_toml,
    quote_over,
    run_command,
    serving,
    trusted_ak,
    until,
    until_answered,
)
from keylime_helpers import Registrar, running_registrar
from manufactured import manufacture, provision
from registrar_helpers import certificate, delete, make, record_of, tls
from simulated_registrar import FakeKeys, wrap
from tpm_helpers import (
    CC_ACTIVATE_CREDENTIAL,
    Faults,
    Swtpm,
    daemon_over,
    open_quoter,
    plain_config,
    quote_once,
    swtpm_at,
)

from provider_proxy.host.config.registrars import RegistrarTable
from provider_proxy.host.config.tables import Config, Listen, TenantRules
from provider_proxy.host.quoters.local_tpm import EsysQuoter
from provider_proxy.host.tpm import gate
from provider_proxy.tenant.client import ProxyClient
from provider_proxy.testing.disturb import Action
from provider_proxy.testing.soft_tpm import SoftTpm
from provider_proxy.trust.registration import client, registration
from provider_proxy.trust.registration import round as rounds
from provider_proxy.trust.registration.credential import parse_challenge
from provider_proxy.trust.registration.state import State, Status, for_provider, for_tenant

pytestmark = pytest.mark.real

ME = f"uid:{os.getuid()}"


@pytest.fixture(scope="module")
def registrar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registrar]:
    with running_registrar(tmp_path_factory.mktemp("registrar")) as running:
        yield running


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Swtpm, Path]]]:
    """Two TPMs, one with a P-256 and one with an RSA AK, and where their AKs' authValues are."""
    with ExitStack() as stack:
        made = {}
        for kind in ("ecc", "rsa"):
            folder = tmp_path_factory.mktemp(kind)
            swtpm = Swtpm(folder / "chip")
            stack.callback(swtpm.close)
            swtpm.start()
            made[kind] = (swtpm, folder / "s")
        yield made


Chips = dict[str, tuple[Swtpm, Path]]


@pytest.fixture
async def quoter(chips: Chips) -> AsyncIterator[EsysQuoter]:
    swtpm, state = chips["ecc"]
    async with open_quoter(swtpm.tcti, state) as opened:
        yield opened


@pytest.fixture
async def other(chips: Chips) -> AsyncIterator[EsysQuoter]:
    """Another TPM."""
    swtpm, state = chips["rsa"]
    async with open_quoter(swtpm.tcti, state, ak_algorithm="rsa") as opened:
        yield opened


def plain(registrar: Registrar, **changes: Any) -> RegistrarTable:
    return replace(RegistrarTable(url=registrar.http_url, insecure_plaintext=True), **changes)


@dataclass(slots=True)
class Wrapped:
    """A TPM whose keys or answers are not its own."""

    tpm: EsysQuoter
    identity: FakeKeys
    answer: Callable[[bytes], bytes] = lambda key: key

    async def activate_credential(self, credential: bytes, secret: bytes) -> bytes:
        return self.answer(await self.tpm.activate_credential(credential, secret))


def keys_of(tpm: EsysQuoter, **changes: Any) -> FakeKeys:
    mine = FakeKeys(ak_public=tpm.identity.ak_public, ek_public=tpm.identity.ek_public)
    return replace(mine, **changes)


# --- rounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
async def test_registered_over_tls(registrar: Registrar, chips: Chips, algorithm: str) -> None:
    swtpm, state = chips[algorithm]
    async with open_quoter(swtpm.tcti, state, ak_algorithm=algorithm) as tpm:
        agent_id = f"tls-{algorithm}"
        mine = make(tls(registrar, contact="192.0.2.7:8890"), agent_id, tpm)
        for _ in range(2):
            report = await mine.once()
            assert report.state is State.REGISTERED, report
        record = record_of(registrar, agent_id)
        assert record is not None
        assert (record["ip"], record["port"], record["regcount"]) == ("192.0.2.7", 8890, 1)


@pytest.mark.parametrize("algorithm", ["ecc", "rsa"])
async def test_registered_without_tls(registrar: Registrar, chips: Chips, algorithm: str) -> None:
    swtpm, state = chips[algorithm]
    async with open_quoter(swtpm.tcti, state, ak_algorithm=algorithm) as tpm:
        agent_id = f"plain-{algorithm}"
        for _ in range(2):
            report = await make(plain(registrar), agent_id, tpm).once()
            assert report.state is State.UNCONFIRMED, report
            assert record_of(registrar, agent_id) is not None


async def test_without_a_certificate_nothing_is_read(
    registrar: Registrar, quoter: EsysQuoter
) -> None:
    table = tls(registrar, client_cert=None, client_key=None)
    assert (await make(table, "no-cert", quoter).once()).state is State.UNCONFIRMED
    assert record_of(registrar, "no-cert") is not None


async def test_a_refused_ek(registrar: Registrar, quoter: EsysQuoter) -> None:
    foreign = certificate(ec.generate_private_key(ec.SECP256R1()))
    tpm = Wrapped(quoter, keys_of(quoter, ek_cert=foreign))
    report = await make(tls(registrar), "refused", tpm).once()
    assert report.state is State.REFUSED
    assert report.error is not None
    assert "refused the EK or the AK" in report.error


async def test_a_challenge_that_is_not_for_this_tpm(
    registrar: Registrar, quoter: EsysQuoter
) -> None:
    """The TPM itself finds out; nothing is answered, and quotes go on."""
    tpm = Wrapped(quoter, keys_of(quoter, ak_public=SoftTpm().ak_public))
    report = await make(tls(registrar), "foreign-ak", tpm).once()
    assert report.state is State.WRONG_CHALLENGE
    assert report.steps[-1].name == "tpm"
    assert quoter.state.trouble is None
    assert record_of(registrar, "foreign-ak") is None


async def test_a_wrong_answer_is_refused_and_then_a_right_one_accepted(
    registrar: Registrar, quoter: EsysQuoter
) -> None:
    tpm = Wrapped(quoter, keys_of(quoter), answer=lambda key: bytes(32))
    report = await make(tls(registrar), "wrong", tpm).once()
    assert report.state is State.WRONG_CHALLENGE
    assert report.steps[-1].name == "activate"
    assert (await make(tls(registrar), "wrong", quoter).once()).state is State.REGISTERED


@pytest.mark.parametrize("secured", [True, False])
async def test_an_id_that_another_tpm_has_is_left_to_it(
    registrar: Registrar, quoter: EsysQuoter, other: EsysQuoter, secured: bool
) -> None:
    agent_id = f"taken-{secured}"
    await make(tls(registrar), agent_id, other).once()
    before = record_of(registrar, agent_id)
    assert before is not None
    table = tls(registrar) if secured else plain(registrar)
    report = await make(table, agent_id, quoter).once()
    assert report.state is State.CONFLICT
    assert record_of(registrar, agent_id) == before
    delete(registrar, agent_id)
    assert (await make(table, agent_id, quoter).once()).error is None


async def test_a_registrar_that_dies_between_the_two_steps(
    quoter: EsysQuoter, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        running = stack.enter_context(running_registrar(tmp_path))

        def kill(key: bytes) -> bytes:
            stack.close()
            return key

        tpm = Wrapped(quoter, keys_of(quoter), answer=kill)
        mine = make(tls(running), "dies", tpm)
        report = await mine.once()
        assert report.state is State.AWAY
        assert report.steps[-1].name == "activate"
        assert (await mine.once()).steps[-1].name == "version"
        with running_registrar(tmp_path, port=running.port, tls_port=running.tls_port):
            assert record_of(running, "dies") is None  # it is there, inactive
            tpm.answer = lambda key: key
            assert (await mine.once()).state is State.REGISTERED
            assert record_of(running, "dies") is not None


# --- the daemon ---------------------------------------------------------------------------------------


def serve_config(folder: Path, registrars: dict[str, RegistrarTable]) -> Config:
    return replace(
        plain_config(folder / "s"),
        listen=Listen(address=(f"unix:{folder}/server",), insecure_plaintext=True),
        tenants={"acme": TenantRules(identities=(ME,))},
        registrars=registrars,
    )


async def told(admin: str) -> dict[str, dict[str, Any]]:
    """What the admin server says, by registrar."""
    results = (await get(admin, "/registrations")).results()
    found = cast("list[dict[str, Any]]", results["registrations"])
    return {each["registrar"]: each for each in found}


async def until_state(admin: str, registrar: str, state: State) -> dict[str, Any]:
    async def as_wanted() -> bool:
        await trio.sleep(0.05)
        return bool((await told(admin))[registrar]["state"] == state.value)

    await until_answered(as_wanted, f"{registrar} {state.value}")
    return (await told(admin))[registrar]


async def test_the_daemon_keeps_the_host_registered(
    registrar: Registrar, other: EsysQuoter, tmp_path: Path
) -> None:
    """Deleted, and replaced by a stranger, while it serves; each tenant sees its own alone."""
    tables = {
        "one": tls(registrar, tenant="acme", interval_s=0.1),
        "two": tls(registrar, tenant="else", interval_s=0.1),
    }
    async with daemon_over(serve_config(tmp_path, tables)) as started:
        admin = started.admin_addresses[0]
        mine = await until_state(admin, "one", State.REGISTERED)
        assert mine["tenant"] == "acme"
        assert mine["last_error"] is None
        agent_id = mine["agent_id"]
        assert (await until_state(admin, "two", State.REGISTERED))["agent_id"] != agent_id

        identity = (await get(started.addresses[0], "/verifier/identity")).results()
        (own,) = cast("list[dict[str, Any]]", identity["registrations"])
        assert (own["registrar"], own["agent_id"], own["state"]) == ("one", agent_id, "registered")
        assert sorted(own) == ["agent_id", "last_success", "registrar", "state"]
        record = record_of(registrar, agent_id)
        assert record is not None
        assert record["aik_tpm"] == identity["ak_tpm"]
        assert record["ek_tpm"] == identity["ek_tpm"]

        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=started.addresses[0].removeprefix("unix:"))
        ) as http:
            claimed = await ProxyClient(http, "http://localhost").identity()
        assert [each.agent_id for each in claimed.registrations] == [agent_id]

        delete(registrar, agent_id)
        await until(lambda: record_of(registrar, agent_id) is not None, "the record's return")

        # A stranger: deletes it, which takes a certificate or a wrong answer, and takes the id.
        stranger, limit = make(tls(registrar), agent_id, other), trio.current_time() + LIMIT_S
        async with stranger._open_http() as http:
            while trio.current_time() < limit:  # the daemon is as quick
                delete(registrar, agent_id)
                if (await stranger.round(http)).state is State.REGISTERED:
                    break
        taken = record_of(registrar, agent_id)
        mine = await until_state(admin, "one", State.CONFLICT)
        assert "another TPM's" in mine["last_error"]
        text = (await get(admin, "/metrics")).body.decode()
        assert 'registrations{registrar="one",state="conflict"} 1.0' in text
        assert 'registrations{registrar="one",state="registered"} 0.0' in text
        await trio.sleep(0.3)
        assert record_of(registrar, agent_id) == taken
        delete(registrar, agent_id)  # a person settles it
        await until_state(admin, "one", State.REGISTERED)


async def test_a_registrar_that_never_answers_keeps_nobody_waiting(tmp_path: Path) -> None:
    with listening_socket() as (_, port):
        tables = {"dead": RegistrarTable(url=f"http://127.0.0.1:{port}", insecure_plaintext=True)}
        with trio.fail_after(LIMIT_S):
            async with daemon_over(serve_config(tmp_path, tables)) as started:
                server = started.addresses[0]
                asker = Asker(await trusted_ak(server))
                async with connect(server) as wire:
                    for _ in range(3):
                        await quote_over(wire, asker)
                assert (await told(started.admin_addresses[0]))["dead"]["state"] == "pending"


# --- commands and SIGHUP --------------------------------------------------------------------------------


def tables_toml(registrar: Registrar, name: str = "acme", more: str = "") -> str:
    return (
        f'[registrars.{name}]\nurl = "{registrar.https_url}"\nca = "{registrar.ca}"\n'
        f'client_cert = "{registrar.client_cert}"\nclient_key = "{registrar.client_key}"\n{more}'
    )


def test_register_by_hand_says_each_step(registrar: Registrar, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    base = plain_toml(tmp_path / "s")
    config.write_text(base + tables_toml(registrar))
    done = run_command("register", "--config", config)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"acme: {registrar.https_url} as ")
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["ok", step] for step in ("version", "read", "register", "tpm", "activate", "confirm")
    ]
    assert lines[-1] == "acme: registered"
    agent_id = lines[0].split()[-1]
    assert record_of(registrar, agent_id) is not None

    taken = tables_toml(registrar, "taken", 'agent_id = "by-hand"\n')
    away = '[registrars.away]\nurl = "http://127.0.0.1:1"\ninsecure_plaintext = true\n'
    config.write_text(base + tables_toml(registrar) + taken + away)
    (tmp_path / "other.toml").write_text(plain_toml(tmp_path / "t") + taken)
    assert run_command("register", "--config", tmp_path / "other.toml").returncode == 0
    done = run_command("register", "--config", config, "--json", "taken")
    assert done.returncode == 1
    (values,) = json.loads(done.stdout.splitlines()[-1])["registrations"]
    assert (values["registrar"], values["state"]) == ("taken", "conflict")
    assert values["steps"][-1]["good"] is False
    done = run_command("register", "--config", config)
    assert done.returncode == 3
    assert "acme: registered" in done.stdout
    assert "taken: conflict" in done.stdout
    assert "FAIL version" in done.stdout


@pytest.mark.parametrize(
    ("toml", "words", "code", "message"),
    [
        ("", ["register"], 2, "the configuration has no [registrars.NAME]"),
        ("", ["registrations"], 2, "does not set admin.address"),
        (
            '[admin]\naddress = "unix:/nonexistent/admin"\n',
            ["registrations"],
            3,
            "no daemon answers at unix:/nonexistent/admin",
        ),
        (
            '[registrars.a]\nurl = "https://a"\n',
            ["register", "b"],
            2,
            "has no [registrars.b]; it has a",
        ),
        (
            '[registrars.a]\nurl = "https://a"\nca = "/nonexistent"\n',
            ["register"],
            3,
            "registrars.a.ca: cannot read /nonexistent: No such file or directory",
        ),
    ],
)
def test_what_the_commands_refuse(
    tmp_path: Path, toml: str, words: list[str], code: int, message: str
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(plain_toml(tmp_path / "s", tables=toml))
    done = run_command(*words, "--config", config)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


async def test_sighup_replaces_the_registrars(registrar: Registrar, tmp_path: Path) -> None:
    base = plain_toml(tmp_path / "s", tables=f'[admin]\naddress = "unix:{tmp_path}/admin"\n')
    admin = f"unix:{tmp_path}/admin"
    async with serving(tmp_path, base) as daemon:
        config = tmp_path / "d0.toml"

        async def reload(toml: str) -> None:
            config.write_text(base + toml)
            before = daemon.log.count("reload")
            daemon.process.send_signal(signal.SIGHUP)
            await until(lambda: daemon.log.count("reload") > before, "the reload")

        assert await told(admin) == {}
        await reload(tables_toml(registrar))
        status = await until_state(admin, "acme", State.REGISTERED)
        shown = await trio.to_thread.run_sync(
            partial(run_command, "registrations", "--config", config)
        )
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert lines[0].startswith("acme: registered, since ")
        assert lines[2].split() == ["as", status["agent_id"]]
        assert lines[-1].split() == ["last", "error", "none"]
        shown = await trio.to_thread.run_sync(
            partial(run_command, "registrations", "--config", config, "--json")
        )
        (values,) = json.loads(shown.stdout.splitlines()[-1])["registrations"]
        assert values["agent_id"] == status["agent_id"]

        refused = await trio.to_thread.run_sync(
            partial(run_command, "register", "--config", config)
        )
        assert refused.returncode == 3
        assert "send it SIGHUP" in refused.stderr

        delete(registrar, status["agent_id"])  # a reload looks at once, long before the interval
        await reload(tables_toml(registrar))
        await until(lambda: record_of(registrar, status["agent_id"]) is not None, "the record")

        await reload(tables_toml(registrar).replace(str(registrar.ca), "/nonexistent"))
        assert "reload refused" in daemon.log
        assert (await told(admin))["acme"]["state"] == "registered"

        await reload("")
        assert await told(admin) == {}
        assert 'registrar="acme"' not in (await get(admin, "/metrics")).body.decode()
        assert await daemon.stop(signal.SIGTERM) == 0


# --- the chip is shared -------------------------------------------------------------------------------


async def test_a_quote_waits_for_one_activation_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crowd of registrars comes back at once, to a slow chip."""
    monkeypatch.setattr(gate, "GIVE_WAY_S", 1.0)  # a busy machine needs longer for the tree
    faults = Faults()
    async with open_quoter("embedded", tmp_path, faults=faults, max_duty=0.5) as opened:
        faults.always(CC_ACTIVATE_CREDENTIAL, Action(delay_s=0.03))
        keys = opened.identity
        challenge = parse_challenge(wrap(keys.ek_public, keys.ak_public, bytes(32)))
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(opened.activate_credential, *challenge)
            for _ in range(4):
                await until(lambda: opened.state.in_flight_s > 0, "an activation in flight")
                before = len(faults.seen)
                await opened.ready()
                await trio.sleep(0.002)  # the batch's tree
                await quote_once(opened)
                assert faults.seen[before:].count(CC_ACTIVATE_CREDENTIAL) <= 1
            nursery.cancel_scope.cancel()


# --- docs/registration.md -----------------------------------------------------------------------------

DOC = "docs/registration.md"


def test_documented_states_and_limits_are_the_code_s() -> None:
    assert codes(rows(DOC, "State", "Meaning", "What to do")) == [state.value for state in State]
    limits = {row[0]: row[1] for row in rows(DOC, "What", "Limit")}
    assert limits == {
        "a call to a registrar, from connecting to the last byte": (f"{client.CALL_LIMIT_S:g} s"),
        "a registrar's answer": f"{client.MAX_BODY_BYTES >> 10} KiB",
        "the chip's answer, waiting for its turn included": f"{rounds.TPM_LIMIT_S:g} s",
        "a round, the wait for another process included": f"{registration.ROUND_LIMIT_S:g} s",
    }
    text = read(DOC)
    assert f"is waited for, {registration.LOCK_LIMIT_S:g} s at most" in text
    assert f"comes after {registration.FIRST_RETRY_S:g} s, doubling" in text
    oldest, newest = client.OLDEST, client.NEWEST
    assert "newest of {}.{} (Keylime 7.12) to {}.{} is".format(*oldest, *newest) in text


def test_documented_fields_are_the_code_s() -> None:
    values = for_provider("acme", "id", Status(), url="https://r", tenant=None)
    (entry,) = re.findall(
        r"^`results\.registrations` is.*?\n\n", read("docs/http-api.md"), re.M | re.S
    )
    named = re.findall(r"`([a-z_]+)`", entry)
    assert [name for name in named if name != "null"] == list(values)
    for name in for_tenant("acme", "id", Status()):
        assert f"`{name}`" in read("docs/http-api.md")


def test_documented_session_runs(registrar: Registrar, tmp_path: Path) -> None:
    (script,) = (block for block in fenced(DOC, "sh") if "registered.toml" in block)
    for file in (registrar.ca, registrar.client_cert, registrar.client_key):
        shutil.copy(file, tmp_path)
    script = script.replace("8891", str(registrar.tls_port)).replace("sleep 1", "sleep 0.1")
    for port in ("8890", "8895"):
        script = script.replace(f'"127.0.0.1:{port}"', f'"127.0.0.1:{free_port()}"')
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["sh", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:  # the group is this script's alone
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
    assert process.returncode == 0, output
    (shown,) = (block for block in fenced(DOC, "") if "acme: registered" in block)
    wanted = [line.split(" as ")[0] for line in shown.splitlines()]
    wanted[0] = wanted[0].replace("8891", str(registrar.tls_port))
    got = [line.split(" as ")[0] for line in output.splitlines()]
    start = got.index(wanted[0])
    assert got[start : start + len(wanted)] == wanted
    assert "INFO stopped" in output


@pytest.mark.parametrize("kind", ["ecc384", "rsa3072"])
def test_the_registrar_takes_eks_of_the_high_range(
    registrar: Registrar, tmp_path: Path, kind: str
) -> None:
    """Their name algorithm is SHA-384, and they are used with a password: the challenge is solved."""
    with swtpm_at(manufacture(tmp_path)) as made:
        provision(
            made.tcti,
            "tpm2_evictcontrol -Q -C o -c 0x81010001\n"
            "tpm2_nvundefine -C p 0x01c00002\ntpm2_nvundefine -C p 0x01c00016\n"
            f"tpm2_createek -Q -c 0x81010001 -G {kind} -u e.pub\n",
            tmp_path,
        )
        (tmp_path / "c.toml").write_text(
            f'state_dir = "{tmp_path}/s"\n[listen]\ninsecure_plaintext = true\n'
            f'[tpm]\ntcti = "{made.tcti}"\n[registrars.a]\nurl = "{registrar.https_url}"\n'
            f'ca = "{registrar.ca}"\nclient_cert = "{registrar.client_cert}"\n'
            f'client_key = "{registrar.client_key}"\n'
        )
        done = run_command("register", "--config", "c.toml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout.splitlines()[-1])["registrations"]
    assert report["state"] == "registered"
