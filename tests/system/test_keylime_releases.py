"""What each release of Keylime can do with this project: docs/keylime-releases.md, tried out.

Each release's registrar and verifier are started once. `make test-keylime-releases` runs it
(TEST_KEYLIME_RELEASES=1); the page is held against what it finds.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from docs_helpers import code, rows
from helpers import command
from keylime_rig import SETTINGS, Keylime, ak_of, running_bridge, running_tenant
from places import ROOT
from real_host import RealHost, pcr_0
from tpm_helpers import daemon_over

from provider_proxy.tenant.verifier_api import RELEASES as NAMES
from provider_proxy.tenant.verifier_api import release_of

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        "TEST_KEYLIME_RELEASES" not in os.environ, reason="make test-keylime-releases"
    ),
]
LISTED = {
    code(row[0]): row[1:]
    for row in rows("docs/keylime-releases.md", "Release", "API", "The host registers")
}
NEWEST = "7.14.3"  # of tests/system/keylime/requirements.txt
POLLS = 150  # 7.12.2 stops after 70
STOPS_S = 180.0
AGENT_ID = "host-17"


async def run(*words: str | Path) -> tuple[int, str]:
    done = await trio.run_process(
        [*command(*map(str, words))], capture_stdout=True, capture_stderr=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


async def registered(keylime: Keylime, host: RealHost) -> str:
    """Register the host, as its daemon does."""
    registrar = keylime.registrar
    config = host.folder / "daemon.toml"
    config.write_text(
        f"""
state_dir = {json.dumps(str(host.folder / "state"))}
[listen]
address = "127.0.0.1:0"
insecure_plaintext = true
[tpm]
tcti = {json.dumps(host.tcti)}
[registrars.mine]
url = {json.dumps(registrar.https_url)}
ca = {json.dumps(str(registrar.ca))}
client_cert = {json.dumps(str(registrar.client_cert))}
client_key = {json.dumps(str(registrar.client_key))}
agent_id = "{AGENT_ID}"
"""
    )
    code_, said = await run("register", "--config", config)
    print(said)
    return "yes" if code_ == 0 else "no"


async def pinned(keylime: Keylime, folder: Path) -> str:
    registrar = keylime.registrar
    code_, said = await run(
        *("pin", "add", AGENT_ID, "--pins", folder / "pins", "--agent-id", AGENT_ID),
        *("--registrar", registrar.https_url, "--registrar-ca", registrar.ca),
        *("--registrar-cert", registrar.client_cert, "--registrar-key", registrar.client_key),
        "--insecure-no-ek",
    )
    print(said)
    return "yes" if code_ == 0 else "no"


async def checked(keylime: Keylime, host: RealHost, folder: Path) -> str:
    registrar = keylime.registrar
    policy = folder / "policy.json"
    policy.write_text(json.dumps({"0": [pcr_0()]}))
    code_, said = await run(
        *("keylime-check", f"http://127.0.0.1:{host.port}", "--pinned", AGENT_ID),
        *("--pins", folder / "pins", "--agent-id", AGENT_ID, "--insecure-no-ek"),
        *("--registrar", registrar.https_url, "--registrar-ca", registrar.ca),
        *("--registrar-cert", registrar.client_cert, "--registrar-key", registrar.client_key),
        *("--verifier", keylime.verifier.url, "--verifier-ca", registrar.ca),
        *("--tpm-policy", policy),
    )
    print(said)
    if code_ == 0:
        return "yes"
    if "your verifier is Keylime" in said:
        assert release_of(version_of(keylime)) in said
    return "no"


def version_of(keylime: Keylime) -> tuple[int, int]:
    major, minor = keylime.api.removeprefix("v").split(".")
    return int(major), int(minor)


async def bridged(keylime: Keylime, host: RealHost, folder: Path) -> str:
    """Whether an agent is added and attested, and for how long."""
    with running_bridge(keylime, folder / "bridge", {"host": host.rules}) as bridge:
        bridge.pin("host", await ak_of(host))
        try:
            await trio.to_thread.run_sync(bridge.start)
        except AssertionError:
            print(bridge.log[-1500:])
            return "no"
        agent_id = bridge.ids()["host"]
        policy = json.dumps({"0": [pcr_0()]})
        code_, said = await keylime.tenant("-c", "add", "-u", agent_id, "--tpm_policy", policy)
        if code_ != 0:
            print(said[-1500:])
            return "no"
        end, last, before = time.monotonic() + STOPS_S, time.monotonic(), 0
        while before < POLLS and time.monotonic() < end and time.monotonic() - last < 15:
            polls = bridge.status()["hosts"]["host"]["polls"]
            if polls > before:
                before, last = polls, time.monotonic()
            await trio.sleep(0.2)
        print(f"{before} polls; {bridge.status()['hosts']['host']['last']}")
        return "yes" if before >= POLLS else "stops"


@pytest.mark.parametrize("release", LISTED)
async def test_a_release(release: str, tmp_path: Path) -> None:
    site = None if release == NEWEST else ROOT / f".venv-keylime-{release}"
    (tmp_path / "keylime").mkdir()
    host = RealHost(tmp_path / "host")
    async with AsyncExitStack() as stack:
        stack.callback(host.close)
        keylime = stack.enter_context(
            running_tenant(tmp_path / "keylime", site=site, settings=SETTINGS)
        )
        found = {"API": keylime.api.removeprefix("v")}
        with host.power():
            found["registers"] = await registered(keylime, host)
            async with daemon_over(host.config()):
                found["pin"] = await pinned(keylime, tmp_path)
                found["check"] = await checked(keylime, host, tmp_path)
                found["bridge"] = await bridged(keylime, host, tmp_path)
    print(release, found)
    said = [cell.split(":")[0].split(",")[0] for cell in LISTED[release]]
    assert said == list(found.values()), found


def test_the_names_of_releases_in_messages_are_the_page_s() -> None:
    newest: dict[str, str] = {}
    for release, (api, *_) in LISTED.items():
        newest.setdefault(api, release)
    for (major, minor), name in NAMES.items():
        release = newest.get(f"{major}.{minor}", "")
        if release and minor > 1:
            assert release.startswith(name.split(" ")[-1][:4]), (release, name)
