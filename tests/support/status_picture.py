"""docs/img/status-page.png: the status page of a real daemon under load, as a Chromium shows it.

    python tests/support/status_picture.py        (`make picture`)

The chip is an embedded swtpm whose quotes take 100 ms longer. Six tenants with certificates of their own
ask as often as they get answers; one asks for more than it may.
"""

from __future__ import annotations

import json
import random
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

import httpx
from places import DOCS
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

TENANTS = {"acme": 90, "globex": 60, "initech": 45, "umbrella": 30, "hooli": 20, "stark": 6}
LOAD_S = 25.0
SIZE = (1180, 1330)
CONFIG = """\
state_dir = "{folder}/state"
[listen]
address = "127.0.0.1:0"
tls_cert = "{folder}/pki/server.crt"
tls_key = "{folder}/pki/server.key"
client_ca = "{folder}/pki/ca.crt"
[admin]
address = "127.0.0.1:{admin}"
[tpm]
tcti = "embedded"
[tenant_defaults]
rate = 500
burst = 500
[tenants.stark]
identities = ["spiffe://provider-proxy/tenant/stark"]
rate = 2
burst = 2
"""


def main() -> None:
    """Take the picture."""
    with tempfile.TemporaryDirectory() as name:
        folder, admin = Path(name), random.randint(20000, 30000)
        pki(folder / "pki")
        (folder / "proxy.toml").write_text(CONFIG.format(folder=folder, admin=admin))
        argv = [sys.executable, "-m", "provider_proxy.bench.target", str(folder / "proxy.toml")]
        with subprocess.Popen([*argv, "--quote-delay-ms", "100"], stdout=subprocess.PIPE) as daemon:
            try:
                assert daemon.stdout is not None
                address = json.loads(daemon.stdout.readline())["address"]
                done = Event()
                threads = [
                    Thread(target=ask, args=(folder / "pki", tenant, address, done))
                    for tenant, number in TENANTS.items()
                    for _ in range(number // 3)
                ]
                for thread in threads:
                    thread.start()
                try:
                    time.sleep(LOAD_S)
                    shoot(f"http://127.0.0.1:{admin}/")
                finally:
                    done.set()
                    for thread in threads:
                        thread.join()
            finally:
                daemon.terminate()


def pki(folder: Path) -> None:
    """A CA, the server's certificate, and one for each tenant."""
    command = [sys.executable, "-m", "provider_proxy", "pki"]
    subprocess.run([*command, "init", "--host", "127.0.0.1", str(folder)], check=True)
    for tenant in TENANTS:
        subprocess.run([*command, "tenant", str(folder), tenant], check=True)


def ask(folder: Path, tenant: str, address: str, done: Event) -> None:
    """One verifier of a tenant: a question after the other."""
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.load_cert_chain(
        folder / "tenants" / f"{tenant}.crt", folder / "tenants" / f"{tenant}.key"
    )
    with httpx.Client(verify=context, base_url=f"https://{address}", timeout=30) as client:
        while not done.is_set():
            mask = random.choice(("0x1", "0x83", "0xff"))
            query = f"/verifier/quote?nonce={random.randbytes(16).hex()}&mask={mask}"
            client.get(query)
            done.wait(random.uniform(0.0, 0.4))


def shoot(url: str) -> None:
    """The page as a PNG."""
    options = Options()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--window-size={SIZE[0]},{SIZE[1]}")
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        driver.get(url)
        time.sleep(6.0)
        driver.save_screenshot(str(DOCS / "img" / "status-page.png"))
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
