"""A Keylime to try the bridge with: `make keylime-trial`, or with the name of a directory.

Registrar and verifier run until they are interrupted. Beside them is what docs/tenants.md uses: the CA,
a client's certificate and key, `tpm_cert_store`, and `keylime_tenant` with its environment, a script.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from pathlib import Path

from keylime_helpers import PYTHON, Registrar, keylime_environment, running_registrar
from keylime_rig import TENANT_CONFIG, Keylime, verifier_of

SETTINGS = {"quote_interval": "2", "retry_interval": "2", "max_retries": "5"}
VARIABLES = ("KEYLIME_DIR", "KEYLIME_CA_CONFIG", "PYTHONPATH", "XDG_RUNTIME_DIR")


def put_beside(keylime: Keylime, folder: Path) -> None:
    """The files of the page, in `folder`."""
    registrar: Registrar = keylime.registrar
    for file in (registrar.ca, registrar.client_cert, registrar.client_key):
        shutil.copy(file, folder)
    store = folder / "tpm_cert_store"
    store.mkdir(exist_ok=True)
    config = folder / "tenant.conf"
    config.write_text(
        TENANT_CONFIG.format(
            verifier_port=keylime.verifier.port,
            registrar_port=registrar.tls_port,
            store=store.resolve(),
        )
    )
    environment = keylime_environment(registrar.directory)
    words = [f"{name}={shlex.quote(environment[name])}" for name in VARIABLES]
    words.append(f"KEYLIME_TENANT_CONFIG={shlex.quote(str(config.resolve()))}")
    script = folder / "keylime_tenant"
    program = shlex.quote(str(PYTHON.parent / "keylime_tenant"))
    script.write_text(f'#!/bin/sh\nexec env {" ".join(words)} {program} "$@"\n')
    script.chmod(0o755)


def main() -> None:
    """Entry point."""
    folder = Path(sys.argv[1])
    inside = (folder / "keylime").resolve()
    inside.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("starting Keylime's registrar and verifier", flush=True)
    with (
        running_registrar(inside, port=8889, tls_port=8891) as registrar,
        verifier_of(registrar, verifier_port=8881, settings=SETTINGS) as keylime,
    ):
        put_beside(keylime, folder)
        print(
            f"they are up; go on in {folder.resolve()} (see docs/tenants.md), and end them with Ctrl-C",
            flush=True,
        )
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending them")


if __name__ == "__main__":
    main()
