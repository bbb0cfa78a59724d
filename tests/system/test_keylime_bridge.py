"""The bridge and all the real parts: registrar, verifier and `keylime_tenant` from PyPI, swtpms.

What is quick runs always. `make test-keylime-bridge` (TEST_KEYLIME_BRIDGE=1) runs it all: 200 polls
under each kind of policy, restarts of everything, a hundred hosts of which one hangs, the release before.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import trio
from helpers import command, free_port
from keylime_helpers import running_registrar
from keylime_rig import (
    FAILED,
    GET_QUOTE,
    INVALID_QUOTE,
    SETTINGS,
    STATES_OF_GETTING,
    Keylime,
    Running,
    ak_of,
    running_bridge,
    running_tenant,
    verifier_of,
)
from keylime_scenes import (
    FILES,
    FIRMWARE,
    LIES,
    MORE,
    link_to_a_vm,
    make_refstate,
    runtime_policy,
    start,
    until_said,
)
from places import ROOT
from plain_proxy import PlainProxy, plain_proxies
from real_host import RealHost, pcr_0

from provider_proxy.errors import UntrustedAkError
from provider_proxy.trust.bindings import RegistrarBindings
from provider_proxy.trust.ek_judges import UnsafeAnyEk
from provider_proxy.trust.pins import PinStore

pytestmark = pytest.mark.real

ALL = pytest.mark.skipif("TEST_KEYLIME_BRIDGE" not in os.environ, reason="make test-keylime-bridge")
DETECTION_S = 10.0  # an interval of 0.25 s, on a machine with other things to do
POLLS = 200
RELEASE_BEFORE = ROOT / ".venv-keylime-7.13.1"


async def add_all(keylime: Keylime, ids: dict[str, str], *words: str) -> None:
    """Add agents, two at a time."""
    places = trio.CapacityLimiter(2)

    async def one(agent_id: str) -> None:
        async with places:
            await keylime.add(agent_id, *words)

    async with trio.open_nursery() as nursery:
        for agent_id in ids.values():
            nursery.start_soon(one, agent_id)


@pytest.fixture(scope="module")
def keylime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keylime]:
    with running_tenant(tmp_path_factory.mktemp("keylime"), settings=SETTINGS) as made:
        yield made


# --- hosts that lie, and what Keylime makes of them ---------------------------------------------------


QUICK_LIES = ("pcr", "clock", "ak", "path", "link", "crash")


async def tale_of_lies(keylime: Keylime, tmp_path: Path, lies: Iterable[str]) -> None:
    """Hosts are attested, then lie; an honest one goes on, one goes away and comes back."""
    names = [*lies, "honest", "away"]
    async with plain_proxies(len(names)) as made:
        proxies = dict(zip(names, made, strict=True))
        hosts = {name: proxy.rules for name, proxy in proxies.items()}
        if "link" in proxies:
            hosts["link"] = hosts["link"] | link_to_a_vm(proxies["link"], tmp_path)
        options = {"after_crash": "refuse"}
        with running_bridge(keylime, tmp_path / "bridge", hosts, **options) as bridge:
            for name, proxy in proxies.items():
                bridge.pin(name, proxy.fake.tpm.ak_public)
            ids = await start(bridge)
            await add_all(keylime, ids, "--tpm_policy", FIRMWARE)
            for name in names:
                await keylime.until_attested(ids[name], 2)
            for name, lie in ((name, LIES[name]) for name in lies):
                began, before = time.monotonic(), len(keylime.log)
                lie.tell(proxies[name])
                status = await keylime.until(ids[name], INVALID_QUOTE)
                print(f"{name}: Invalid Quote after {time.monotonic() - began:.1f} s")
                assert time.monotonic() - began < DETECTION_S
                if lie.reason:
                    assert lie.reason in keylime.log[before:], keylime.log[before:]
                    assert bridge.status()["hosts"][name]["last"] == "refused"
                else:
                    assert status["last_event_id"] == "pcr_validation.invalid_pcr_0"
            await back_again(keylime, bridge, proxies["away"], ids["away"])
            # What went wrong is set right: by a person, and by the host's name.
            proxies["path"].fake.answer = proxies["path"].fake.good
            said = await bridge.cli("reactivate", "path")
            assert said == f"path: reactivated, agent {ids['path']}\n"
            await keylime.until(ids["path"], *STATES_OF_GETTING)
            await keylime.until_attested(ids["path"], 2)
            await keylime.until_attested(ids["honest"], 1)
            assert "Keylime reports a revocation" in bridge.log
            await gone(keylime, bridge, ids["honest"])
            await no_host(keylime, bridge, ids["path"], tmp_path)


async def back_again(keylime: Keylime, bridge: Running, proxy: PlainProxy, agent_id: str) -> None:
    """A short outage is a retry; a long one is Failed until somebody reactivates the agent."""
    async with trio.open_nursery() as nursery:
        await proxy.close()
        await until_said(bridge, "away", "no answer")
        await proxy.serve(nursery)
        await keylime.until(agent_id, GET_QUOTE)
        await keylime.until_attested(agent_id, 2)
        await proxy.close()
        await keylime.until(agent_id, FAILED)
        assert bridge.status()["hosts"]["away"]["last"] == "no answer"
        await proxy.serve(nursery)
        await bridge.cli("reactivate", "away")
        await keylime.until(agent_id, *STATES_OF_GETTING)
        await keylime.until_attested(agent_id, 2)
        await proxy.close()
        nursery.cancel_scope.cancel()


async def gone(keylime: Keylime, bridge: Running, agent_id: str) -> None:
    """Deleted at the verifier, an agent is not asked any more."""
    code, said = await keylime.tenant("-c", "delete", "-u", agent_id)
    assert code == 0, said
    end = time.monotonic() + 20
    while keylime.status(agent_id):
        assert time.monotonic() < end
        await trio.sleep(0.2)
    before = bridge.status()["hosts"]["honest"]["polls"]
    await trio.sleep(1.5)
    assert bridge.status()["hosts"]["honest"]["polls"] <= before + 1


async def no_host(keylime: Keylime, bridge: Running, agent_id: str, tmp_path: Path) -> None:
    """The bridge's record passes for no host."""
    registrar = keylime.registrar
    async with httpx.AsyncClient(verify=registrar.client_context(), trust_env=False) as http:
        bindings = RegistrarBindings(
            http, registrar.https_url, pins=PinStore(tmp_path / "pins"), eks=UnsafeAnyEk()
        )
        with pytest.raises(UntrustedAkError, match="provider-proxy bridge"):
            await bindings.get(agent_id)
    done = await trio.run_process(
        [
            *command("pin", "add", "host-17", "--pins", str(tmp_path / "pins")),
            *("--registrar", registrar.https_url, "--registrar-ca", str(registrar.ca)),
            *("--registrar-cert", str(registrar.client_cert)),
            *("--registrar-key", str(registrar.client_key)),
            *("--agent-id", agent_id, "--insecure-no-ek"),
        ],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert b"provider-proxy bridge" in done.stderr
    assert not list((tmp_path / "pins").glob("host-17*"))


async def test_hosts_that_lie_are_invalid_with_the_reason(keylime: Keylime, tmp_path: Path) -> None:
    await tale_of_lies(
        keylime, tmp_path, LIES if "TEST_KEYLIME_BRIDGE" in os.environ else QUICK_LIES
    )


# --- every kind of policy, over a real daemon ---------------------------------------------------------


def policies(keylime: Keylime, log: Path) -> dict[str, tuple[str, ...]]:
    """The words of `keylime_tenant -c add` for each kind of policy.

    Args:
        log: the firmware's log of a good boot.
    """
    folder = keylime.folder
    runtime, refstate = folder / "runtime.json", folder / "refstate.json"
    runtime.write_text(runtime_policy(FILES + MORE))
    make_refstate(keylime, log, refstate)
    words = {
        "tpm": ("--tpm_policy", json.dumps({"0": [pcr_0()]})),
        "runtime": ("--runtime-policy", str(runtime)),
        "boot": ("--mb_refstate", str(refstate)),
    }
    debug = ("--tpm_policy", json.dumps({"23": ["00" * 32]}))  # Keylime keeps PCRs 0 to 15 apart
    return words | {"all": (*debug, *words["runtime"], *words["boot"])}


async def tale_of_policies(
    keylime: Keylime, tmp_path: Path, *, kinds: Sequence[str], polls: int
) -> None:
    """One host under kinds of policies, so many polls, while it runs files; then an unknown one."""
    host = RealHost(tmp_path / "host")
    try:
        async with AsyncExitStack() as stack:
            up = await stack.enter_async_context(AsyncExitStack())
            await up.enter_async_context(host.up(FILES))
            words = policies(keylime, host.folder / "uefi")
            hosts = dict.fromkeys(kinds, host.rules)
            bridge = stack.enter_context(running_bridge(keylime, tmp_path / "bridge", hosts))
            ak_public = await ak_of(host)
            for kind in kinds:
                bridge.pin(kind, ak_public)
            ids = await start(bridge)
            for kind in kinds:
                await keylime.add(ids[kind], *words[kind])
            async with trio.open_nursery() as nursery:
                for kind in kinds:
                    nursery.start_soon(keylime.until_attested, ids[kind], polls, 60.0 + 3 * polls)
                for file in MORE[:: max(1, len(MORE) // 8)]:
                    await trio.to_thread.run_sync(host.run, file)
                    await trio.sleep(polls / 40)
            for kind in kinds:
                print(f"{kind}: {keylime.status(ids[kind])['attestation_count']} good attestations")
            await trio.to_thread.run_sync(host.run, ("/tmp/evil", b"evil"))
            for kind in set(kinds) & {"runtime", "all"}:
                status = await keylime.until(ids[kind], INVALID_QUOTE)
                assert status["last_event_id"].startswith("ima."), status
            if "boot" in kinds:
                await up.aclose()
                host.grub = b"another"
                await stack.enter_async_context(host.up(FILES))
                status = await keylime.until(ids["boot"], INVALID_QUOTE)
                print(f"another boot loader: {status['last_event_id']}")
                assert status["last_event_id"].startswith("measured_boot.")
                assert "invalid_pcr" not in status["last_event_id"]  # log and PCRs agree
            if "tpm" in kinds:
                await trio.to_thread.run_sync(host.extend, (0, sha256(b"evil").digest()))
                status = await keylime.until(ids["tpm"], INVALID_QUOTE)
                assert status["last_event_id"] == "pcr_validation.invalid_pcr_0"
    finally:
        host.close()


async def test_policies_of_every_kind_are_judged_by_keylime(
    keylime: Keylime, tmp_path: Path
) -> None:
    await tale_of_policies(keylime, tmp_path, kinds=["boot", "all"], polls=3)


# --- what takes longer --------------------------------------------------------------------------------


@ALL
async def test_two_hundred_polls_under_each_kind_of_policy(
    keylime: Keylime, tmp_path: Path
) -> None:
    await tale_of_policies(keylime, tmp_path, kinds=["tpm", "runtime", "boot", "all"], polls=POLLS)


async def tale_of_restarts(folder: Path, *, site: Path | None = None) -> None:
    """Reboots of the host, and restarts of bridge, verifier and registrar: all are attested on."""
    host = RealHost(folder / "host")
    (folder / "keylime").mkdir(parents=True)
    ports = {"port": free_port(), "tls_port": free_port()}
    verifier_port = free_port()
    async with AsyncExitStack() as stack:
        stack.callback(host.close)
        registrar_stack = stack.enter_context(ExitStack())
        registrar = registrar_stack.enter_context(
            running_registrar(folder / "keylime", site=site, **ports)
        )
        verifier_stack = stack.enter_context(ExitStack())
        settings = SETTINGS | {"max_retries": "40"}
        keylime = verifier_stack.enter_context(
            verifier_of(registrar, verifier_port=verifier_port, settings=settings)
        )
        async with host.up(FILES):
            bridge = stack.enter_context(
                running_bridge(keylime, folder / "bridge", {"host": host.rules})
            )
            bridge.pin("host", await ak_of(host))
            agent_id = (await start(bridge))["host"]
            await keylime.add(agent_id, *policies(keylime, host.folder / "uefi")["runtime"])
            await keylime.until_attested(agent_id, 3)
        for number in range(3):
            await until_said(bridge, "host", "no answer")
            async with host.up(FILES + MORE[: 5 * number]):  # another boot, another list
                await keylime.until_attested(agent_id, 3)
                print(f"reboot {number + 1}: attested again")
        async with host.up(FILES):
            await keylime.until_attested(agent_id, 3)
            for kill in (False, True):
                await trio.to_thread.run_sync(partial(bridge.stop, kill=kill))
                await trio.sleep(1)
                await trio.to_thread.run_sync(bridge.start)
                await keylime.until_attested(agent_id, 3)
                print(f"bridge {'killed' if kill else 'ended'} and started again: attested again")
            verifier_stack.close()
            await trio.sleep(1)
            keylime = verifier_stack.enter_context(
                verifier_of(registrar, verifier_port=verifier_port, settings=settings)
            )
            await keylime.until_attested(agent_id, 3)
            print("verifier restarted: attested again")
            registrar_stack.close()
            for table in (folder / "keylime").glob("reg_data.sqlite*"):
                table.unlink()  # it has lost everything, too
            registrar_stack.enter_context(running_registrar(folder / "keylime", site=site, **ports))
            await keylime.until_attested(agent_id, 3)
            await trio.to_thread.run_sync(bridge.await_ready)
            async with httpx.AsyncClient(
                verify=registrar.client_context(), trust_env=False
            ) as http:
                path = f"{registrar.https_url}/v2.1/agents/{agent_id}"
                end = time.monotonic() + 40
                while (await http.get(path)).status_code != 200:
                    assert time.monotonic() < end
                    await trio.sleep(0.5)
            print("registrar restarted without its records: registered again")
            await keylime.until_attested(agent_id, 3)


@ALL
async def test_reboots_and_restarts_of_everything(tmp_path: Path) -> None:
    await tale_of_restarts(tmp_path)


@ALL
async def test_a_hundred_hosts_one_of_them_hanging(tmp_path: Path) -> None:
    """The one that hangs costs the others nothing; hosts come and go, and ports stay."""
    (tmp_path / "keylime").mkdir()
    settings = SETTINGS | {"quote_interval": "5", "retry_interval": "2"}
    with running_tenant(tmp_path / "keylime", settings=settings) as keylime:
        async with plain_proxies(2) as (good, hanging):
            hosts = {f"h{number}": good.rules for number in range(99)} | {"bad": hanging.rules}
            with running_bridge(keylime, tmp_path / "bridge", hosts) as bridge:
                for name in hosts:
                    bridge.pin(name, (hanging if name == "bad" else good).fake.tpm.ak_public)
                ids = await start(bridge)
                ports = {name: host["port"] for name, host in bridge.status()["hosts"].items()}
                assert len(set(ports.values())) == 100
                await add_by_api(keylime, bridge, ids)
                await keylime.until_attested(ids["bad"], 1, 120)
                hanging.fake.answer = lambda request: None
                await until_said(bridge, "bad", "no answer")
                before = {name: host["polls"] for name, host in bridge.status()["hosts"].items()}
                began = time.monotonic()
                await trio.sleep(40)
                after = bridge.status()["hosts"]
                least = min(after[name]["polls"] - before[name] for name in hosts if name != "bad")
                spent = time.monotonic() - began
                print(
                    f"100 hosts: in {spent:.0f} s each good one was polled at least {least} times"
                )
                assert least >= 3
                assert all(host["last"] == "good" for name, host in after.items() if name != "bad")
                assert after["bad"]["last"] == "no answer"
                for name in ("h0", "h50"):
                    del bridge.hosts[name]
                bridge.hosts["new"] = good.rules
                bridge.pin("new", good.fake.tpm.ak_public)
                await trio.to_thread.run_sync(bridge.reload)
                now = {name: host["port"] for name, host in bridge.status()["hosts"].items()}
                assert {name: now[name] for name in ports if name in now} == {
                    name: port for name, port in ports.items() if name not in ("h0", "h50")
                }
                assert now["new"] not in ports.values()


async def add_by_api(keylime: Keylime, bridge: Running, ids: dict[str, str]) -> None:
    """What `keylime_tenant -c add` posts, a hundred times, without its three seconds each."""
    tls_cert = re.search(
        r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n",
        (bridge.folder / "state/bridge/keys.pem").read_text(),
        re.DOTALL,
    )
    assert tls_cert is not None
    hosts = bridge.status()["hosts"]
    for name, agent_id in ids.items():
        record = keylime.http.get(f"{keylime.registrar.https_url}/v2.1/agents/{agent_id}").json()[
            "results"
        ]
        answer = keylime.http.post(
            f"{keylime.verifier.url}/{keylime.api}/agents/{agent_id}",
            json={
                "v": None,
                "cloudagent_ip": "127.0.0.1",
                "cloudagent_port": hosts[name]["port"],
                "verifier_ip": "127.0.0.1",
                "verifier_port": keylime.verifier.port,
                "tpm_policy": json.dumps(json.loads(FIRMWARE) | {"mask": "0x1"}),
                "runtime_policy": "",
                "runtime_policy_name": "",
                "runtime_policy_key": "",
                "mb_policy": None,
                "mb_policy_name": "",
                "ima_sign_verification_keys": "[]",
                "metadata": "{}",
                "revocation_key": "",
                "accept_tpm_hash_algs": ["sha256"],
                "accept_tpm_encryption_algs": ["rsa"],
                "accept_tpm_signing_algs": ["rsassa"],
                "ak_tpm": record["aik_tpm"],
                "mtls_cert": tls_cert[0],
                "supported_version": "2.6",
            },
        )
        assert answer.status_code == 200, answer.text
        await trio.lowlevel.checkpoint()


@ALL
async def test_the_release_before(tmp_path: Path) -> None:
    """Keylime 7.13.1: policies and refusals, 200 polls, reboots and restarts."""
    (tmp_path / "keylime").mkdir()
    with running_tenant(tmp_path / "keylime", site=RELEASE_BEFORE, settings=SETTINGS) as keylime:
        await tale_of_policies(
            keylime, tmp_path / "policies", kinds=["tpm", "runtime", "boot", "all"], polls=POLLS
        )
        await tale_of_lies(keylime, tmp_path / "lies", QUICK_LIES)
    await tale_of_restarts(tmp_path / "restarts", site=RELEASE_BEFORE)
