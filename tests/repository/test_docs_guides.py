"""What the guides name is there: pages, tests, files, configuration keys, alerts, checks, days."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from docs_helpers import (
    ADRS,
    CODE,
    DOCS,
    FENCE,
    OWN,
    code,
    fenced,
    read,
    rows,
    subclasses,
)
from places import ROOT, TESTS

from provider_proxy import errors
from provider_proxy.cli import pki as pki_command
from provider_proxy.host import pki
from provider_proxy.host.quoters import agent_binding, ca_signer
from provider_proxy.host.registration.registrations import LOCKS
from provider_proxy.host.vtpm import ca
from provider_proxy.host.vtpm import open_service as vtpm_opening

THREATS, OPERATING = "docs/threat-model.md", "docs/operating.md"
TEST = re.compile(r"`(\w+)::(\w+)`")
# Files of a host, a tenant or a program, not of this repository.
FOLDERS = ("docs", "systemd", "tests", "provider_proxy")


def links_of(name: str) -> set[str]:
    text = FENCE.sub("", read(name))
    return {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)}


def test_every_page_has_its_place_in_the_index() -> None:
    linked = links_of("docs/README.md")
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.glob("*.md")} - {"README.md"}
    assert pages | {f"adr/{path.name}" for path in ADRS} <= linked
    listed = [re.findall(r"\]\(([^)]+)\)", row[0]) for row in rows("docs/README.md", "Page")]
    assert sorted(name for (name,) in listed) == sorted(pages)
    assert "docs/README.md" in links_of("README.md")


def file_of(name: str) -> Path:
    """The one test module of that name, in whichever folder it stands."""
    (path,) = TESTS.rglob(f"{name}.py")
    return path


@cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_the_tests_that_the_threat_model_names_exist() -> None:
    named = TEST.findall(read(THREATS))
    assert len(named) > 50
    for file, name in named:
        assert f"test_{name}" in functions_of(file_of(f"test_{file}")), f"{file}::{name}"


def test_what_stops_a_threat_is_shown_or_said_to_remain() -> None:
    """A row without a test says in its own words that nothing stops it, or what a person has to do."""
    for row in rows(THREATS, "Tries to", "Stopped by", "Shown by"):
        assert TEST.search(row[2]) or re.search(r"nothing|at first trust", row[1]), row


def test_the_threat_model_has_each_check() -> None:
    listed = rows(THREATS, "Check", "The lie", "Error class", "Shown by")
    numbers = {code(row[2]): int(row[0]) for row in listed}
    kinds = {
        kind
        for kind in subclasses(errors.VerificationError)
        if kind is errors.LinkError or not issubclass(kind, errors.LinkError)
    }
    # A field that a registrar's record lacks is not a lie.
    kinds -= {errors.NotRegisteredError, errors.BindingError}
    assert numbers == {kind.__name__: vars(errors)[kind.__name__].check for kind in kinds}
    assert list(numbers.values()) == sorted(numbers.values())
    assert all(TEST.search(row[3]) for row in listed)


def test_each_alert_has_its_row_among_the_incidents() -> None:
    alerts = set(re.findall(r"alert: (\w+)", read("docs/alerts.yml")))
    symptoms = " ".join(row[0] for row in rows(OPERATING, "Symptom", "Cause", "What to do"))
    assert set(re.findall(r"`(ProviderProxy\w+)`", symptoms)) == alerts


def test_the_files_of_the_state_directory_are_the_code_s() -> None:
    listed = {code(row[0]) for row in rows(OPERATING, "File", "Holds", "Secret")}
    assert listed == {
        *("ak.json", "swtpm/", f"{agent_binding.PINS}/", f"{LOCKS}/"),
        *(ca_signer.KEY_FILE, ca.CERTIFICATE_FILE, vtpm_opening.REGISTRY_FILE),
    }


def test_certificates_end_when_the_guide_says() -> None:
    days = [
        row[1].strip("*").split(" ")[0].strip("*") for row in rows(OPERATING, "What", "Good for")
    ]
    assert days[:4] == [
        *(str(pki.CRL_DAYS), str(pki_command.TENANT_DAYS)),
        *(str(pki_command.SERVER_DAYS), str(pki.CA_DAYS)),
    ]


def pieces(path: Path) -> list[str]:
    return CODE.findall(FENCE.sub("", path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_configuration_keys_that_are_named_exist(path: Path) -> None:
    known = {
        code(row[0]) for row in rows("docs/reference.md", "Key", "Values", "Default", "Meaning")
    }
    tables = {key.partition(".")[0] for key in known if "." in key}
    for piece in pieces(path):
        match = re.fullmatch(r"([a-z_]+)\.([a-z_]+)(?: = .*)?", piece)
        if match and match[1] in tables and match[2] not in ENDINGS:
            assert f"{match[1]}.{match[2]}" in known, piece


ENDINGS = {"d", "toml", "json", "jsonl", "md", "py", "sqlite"}  # `audit.md` is a file


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for piece in pieces(path):
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]+", piece):
            assert (ROOT / piece).exists(), piece


# Which test runs a page's shell blocks. What is not run there is a command that test_docs parses: of
# audit.md and vtpm.md, whose own tests run it with other files.
RUN_BY = {
    "audit": "test_audit",
    "bindings": "test_guides",
    "ek-certificates": "test_ek_ca",
    "migrating": "test_guides",
    "monitoring": "test_guides",
    "operating": "test_guides",
    "policies": "test_policy_cli",
    "quickstart": "test_guides",
    "registration": "test_registration_real",
    "sizing": "test_simulation",
    "tenants": "test_keylime_real",
    "tls": "test_pki",
    "vtpm": "test_guides",
    "watch": "test_watch_real",
}


def test_shell_blocks_have_a_test_that_runs_them() -> None:
    with_blocks = {path for path in OWN if fenced(path, "sh")}
    assert {path.stem for path in with_blocks} == set(RUN_BY)
    for name, test in RUN_BY.items():
        text = file_of(test).read_text(encoding="utf-8")
        assert f"{name}.md" in text or f'"{name}"' in text
