"""Software TPMs provisioned as makers and owners leave theirs: swtpm_setup, then tpm2-tools.

Nothing outside the folder is touched: CA and configuration of swtpm's tools lie in it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

CERT_INDEX = "ppread|ppwrite|ownerread|authread|no_da|platformcreate"
"""Attributes of a maker's NV index."""


def manufacture(folder: Path, options: str = "--create-ek-cert", *, banks: str = "sha256") -> Path:
    """The state directory of a new TPM, `folder / "state"`, with a CA of its own in `folder / "ca"`."""
    state, ca = folder / "state", folder / "ca"
    for made in (state, ca):
        made.mkdir(mode=0o700)
    (folder / "localca.conf").write_text(
        f"statedir = {ca}\nsigningkey = {ca}/signkey.pem\nissuercert = {ca}/issuercert.pem\n"
        f"certserial = {ca}/certserial\n"
    )
    (folder / "localca.options").write_text(
        "--platform-manufacturer Test\n--platform-version 1\n--platform-model Test\n"
    )
    (folder / "setup.conf").write_text(
        f"create_certs_tool = {shutil.which('swtpm_localca')}\n"
        f"create_certs_tool_config = {folder}/localca.conf\n"
        f"create_certs_tool_options = {folder}/localca.options\n"
    )
    done = subprocess.run(
        shlex.split(
            f"swtpm_setup --tpm2 --tpmstate {state} {options} --pcr-banks {banks} "
            f"--config {folder}/setup.conf"
        ),
        env={**os.environ, "XDG_CONFIG_HOME": str(folder / "xdg")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return state


def provision(tcti: str, script: str, folder: Path) -> None:
    """Run a shell script of tpm2-tools; the transient objects that it leaves are flushed."""
    environment = {**os.environ, "TPM2TOOLS_TCTI": tcti}
    for text in ("set -e\n" + script, "tpm2_flushcontext -t; tpm2_flushcontext -l"):
        done = subprocess.run(
            ["sh", "-c", text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def write_index(index: str, file: str, *, attributes: str = CERT_INDEX) -> str:
    """Script: define an NV index as large as a file, and write the file there."""
    return (
        f'tpm2_nvdefine -Q -C p -s $(stat -c %s {file}) -a "{attributes}" {index}\n'
        f"tpm2_nvwrite -Q -C p -i {file} {index}\n"
    )
