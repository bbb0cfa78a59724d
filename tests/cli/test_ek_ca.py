"""`provider-proxy ek-ca`: what a store holds, and what it says of one chip."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import run_here
from places import DOCS
from soft_ek import DAY, Authority, ek_certificate, rsa_ek

from provider_proxy.cli.ek_ca import SOON
from provider_proxy.evidence.tpm_writer import encode_ek
from provider_proxy.trust.ek_store import utc_now

ROOT = Authority("Infineon root")
ISSUING = Authority("Infineon issuing", ROOT)
CHIP_CA = Authority("chip's own", ISSUING)
VTPM = Authority("swtpm-localca")
EK = rsa_ek()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    cas = tmp_path / "cas"
    cas.mkdir()
    (cas / "bundle.pem").write_bytes(ROOT.pem() + ISSUING.pem())
    (cas / "virtual.pem").write_bytes(VTPM.pem())
    (cas / "broken.pem").write_bytes(ROOT.pem()[:99])
    (cas / "old.pem").write_bytes(Authority("old", ends=utc_now() - DAY).pem())
    (cas / "soon.pem").write_bytes(Authority("soon", ends=utc_now() + SOON - DAY).pem())
    return cas


def cert_file(tmp_path: Path, authority: Authority, *, key: Any = EK) -> Path:
    path = tmp_path / "ek.der"
    path.write_bytes(ek_certificate(authority, key))
    return path


def ek_ca(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run_here("ek-ca", *words, cwd=Path.cwd())


def last(out: str) -> dict[str, Any]:
    values = json.loads(out.splitlines()[-1])
    assert isinstance(values, dict)
    return values


def test_show(store: Path) -> None:
    done = ek_ca("show", store)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for line in (
        "Infineon\n",
        "hardware, self-signed, secp256r1, until 2049-01-01",
        "hardware, intermediate",
        "1 CAs below it are anchors too: they stay trusted",
        "not accepted for hosts: its name is that of a maker of virtual TPMs",
        "expired: chips that it certifies are refused",
        "expires soon",
        "broken.pem: a PEM block in it has no end",
        "4 anchors for hardware TPMs, 1 for virtual ones, 1 files or parts of files not used",
    ):
        assert line in out


def test_show_as_json(store: Path) -> None:
    done = ek_ca("show", store / "bundle.pem", store / "broken.pem", "--json")
    assert done.returncode == 0, done.stderr
    values = last(done.stdout)
    issuing, root = values["anchors"]
    assert (root["kind"], root["maker"], root["purpose"]) == ("self-signed", "Infineon", "hardware")
    assert root["anchors_below"] == [issuing["sha256"]]
    assert issuing["source"].endswith("bundle.pem (2)")
    assert [Path(each["source"]).name for each in values["skipped"]] == ["broken.pem"]


def test_check(store: Path, tmp_path: Path) -> None:
    words = ("check", "--cert", cert_file(tmp_path, ISSUING), "--ek-ca", store)
    done = ek_ca(*words)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "good: a TPM of Infineon (id:49465800 SLB id:13)" in out
    assert "under CN=Infineon issuing" in out
    done = ek_ca(*words, "--json")
    assert done.returncode == 0, done.stderr
    values = last(done.stdout)
    assert values["good"] is True
    assert values["anchor"]["name"] == "CN=Infineon issuing"
    assert values["also_under"] == []


def test_check_with_a_chain_names_the_anchors_that_keep_it_alive(
    store: Path, tmp_path: Path
) -> None:
    cert = cert_file(tmp_path, CHIP_CA)
    words = ("check", "--cert", cert, "--ek-ca", store, "--json")
    done = ek_ca(*words)
    assert done.returncode == 1, done.stderr
    assert 'no CA named "CN=chip\'s own"' in last(done.stdout)["reason"]
    chain = tmp_path / "chain.der"
    chain.write_bytes(CHIP_CA.der() + ISSUING.der() + b"\xff" * 40)
    done = ek_ca(*words, "--chain", chain)
    assert done.returncode == 0, done.stderr
    values = last(done.stdout)
    assert values["chain"] == ["the EK certificate", "CN=chip's own"]
    assert [each["name"] for each in values["also_under"]] == ["CN=Infineon root"]
    # Beside the certificate in one file, too.
    cert.write_bytes(cert.read_bytes() + CHIP_CA.der())
    done = ek_ca(*words)
    assert done.returncode == 0, done.stderr


def test_check_refuses_with_the_reason(store: Path, tmp_path: Path) -> None:
    cert = cert_file(tmp_path, VTPM)
    words = ("check", "--cert", cert, "--ek-ca", store)
    done = ek_ca(*words)
    assert done.returncode == 1, done.stderr
    err = done.stderr
    assert (
        "refused: the EK certificate does not lead to a trusted CA: the CA 'CN=swtpm-localca'"
        in err
    )
    assert "broken.pem" in err
    done = ek_ca(*words, "--insecure-virtual-ek")
    assert done.returncode == 0, done.stderr
    other = tmp_path / "other.tpm"
    other.write_bytes(encode_ek(rsa_ek(1).public_key()))
    done = ek_ca(*words, "--insecure-virtual-ek", "--ek-tpm", other)
    assert done.returncode == 1, done.stderr
    cert.write_bytes(b"garbage")
    done = ek_ca(*words)
    assert done.returncode == 1, done.stderr
    assert "cannot be read: it begins with 67617262" in done.stderr


def test_files_that_cannot_be_read_are_the_environment_s(store: Path, tmp_path: Path) -> None:
    cert = cert_file(tmp_path, ISSUING)
    missing = tmp_path / "missing"
    done = ek_ca("check", "--cert", missing, "--ek-ca", store)
    assert done.returncode == 3, done.stderr
    done = ek_ca("check", "--cert", cert, "--ek-ca", missing)
    assert done.returncode == 3, done.stderr
    done = ek_ca("show", missing)
    assert done.returncode == 3, done.stderr
    done = ek_ca("check", "--cert", cert, "--ek-ca", store / "broken.pem")
    assert done.returncode == 3, done.stderr
    assert "has no CA certificate that can be used" in done.stderr


def test_the_documented_commands(store: Path, tmp_path: Path) -> None:
    """The shell block of docs/ek-certificates.md, over a certificate and its chain in one file."""
    text = (DOCS / "ek-certificates.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    store.rename(tmp_path / "tpm-cas")
    leaf = ssl.DER_cert_to_PEM_cert(cert_file(tmp_path, CHIP_CA).read_bytes())
    (tmp_path / "ek.pem").write_bytes(leaf.encode() + CHIP_CA.pem())
    for line in block.splitlines():
        program, *words = line.split()
        assert program == "provider-proxy"
        done = run_here(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
