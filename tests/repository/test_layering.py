"""Which module may import which: the order of docs and design as data, held against the sources."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import provider_proxy

ROOT = Path(provider_proxy.__file__).parent

PURE = (
    *("errors", "model", "tpm_bytes", "inclusion", "attestation_key", "attestation", "credential"),
    *("wire", "query", "policy", "link", "verify", "deep", "request_file", "soft_tpm"),
    *("der", "vtpm_ca_check", "ima", "runtime_policy", "eventlog", "watch"),
)
SHARED = (
    *("files", "metrics", "journal", "config_values", "config_schema", "http_body"),
    *("pins", "ek_chain", "single_flight", "agent_records", "bindings"),
)
TENANT = (
    *("link_map", "replies", "client", "keylime", "ek_check"),
    *("watch_tables", "watch_config", "watch_policy", "watch_state", "watch_http", "watch_metrics"),
    *("watch_reports", "watch_host", "watch_registrars", "watcher"),
)
PROVIDER = (
    *(
        "plan",
        "merkle",
        "batch",
        "batch_report",
        "recent",
        "audit",
        "audit_file",
        "waiting_room",
        "config_tables",
        "config_registrars",
        "config_files",
        "config_env",
        "config",
        "sysd",
        "hostlogs",
    ),
    *("tpm.*", "quoters.*", "vtpm.*"),
    *("quotas", "batcher", "http_messages", "http1", "tenants", "server", "listeners"),
    *("registrar_client", "registration_state", "registration", "registrations"),
    *("status", "admin"),
    *("pki", "watchdog", "unit_status", "reload", "assembly", "daemon"),
)
PROGRAMS = ("bench.*", "cli.*", "__main__")
ORDER = (*PURE, *SHARED, *TENANT, *PROVIDER, *PROGRAMS)
"""A module imports from above only; within a package (`name.*`) in any order, but in no circle."""

THIRD_PARTY = {
    "cryptography": ("*",),
    "trio": (
        *(*PROVIDER, "bench.*", "cli.*"),
        *("watch_http", "watch_reports", "watch_host", "watcher"),
    ),
    "httpx": (
        *("http_body", "agent_records", "bindings", "client", "keylime"),
        *(
            "watch_reports",
            "watch_registrars",
            "quoters.*",
            "registrar_client",
            "registration",
            "bench.*",
            "cli.*",
        ),
    ),
    "anyio": ("http_body", "single_flight", "agent_records", "bindings", "client", "ek_check"),
    "h11": ("http_messages", "http1", "watch_http"),
    "merklelib": ("merkle",),
    "tpm2_pytss": ("tpm.*", "quoters.*"),
    "prometheus_client": ("metrics", "watch_metrics"),
    "rich": ("cli.*",),
    "matplotlib": ("bench.*", "cli.*"),
}
"""Who may import what is not ours and not the standard library's."""


def name_of(path: Path) -> str:
    """ "wire", "tpm.chip", "tpm" for tpm/__init__.py; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def entry_of(name: str) -> str:
    """The entry of ORDER that a module belongs to."""
    first, _, rest = name.partition(".")
    if rest or f"{first}.*" in ORDER:
        return f"{first}.*"
    return first


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever it does so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    dotted = {
        imported.removeprefix("provider_proxy").removeprefix(".")
        for imported in imports_of(MODULES[name])
        if imported.partition(".")[0] == "provider_proxy"
    }
    found = {target for target in dotted if target in MODULES and target}
    # `from provider_proxy import X` names a module above, or something of __init__, which nobody may.
    assert all(target in MODULES or target.rpartition(".")[0] in MODULES for target in dotted), (
        dotted
    )
    return found - {name}


def foreign_imports(name: str) -> set[str]:
    return {
        top
        for imported in imports_of(MODULES[name])
        if (top := imported.partition(".")[0]) != "provider_proxy"
        and top not in sys.stdlib_module_names
    }


def test_every_module_has_its_place() -> None:
    entries = {entry_of(name) for name in MODULES if name}
    assert entries == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_from_above_only(name: str) -> None:
    own = entry_of(name)
    above = ORDER[: ORDER.index(own)]
    upwards = {t for t in own_imports(name) if entry_of(t) not in above and entry_of(t) != own}
    assert not upwards


@pytest.mark.parametrize("name", [name for name in MODULES if name in PURE])
def test_a_pure_module_imports_cryptography_and_the_standard_library(name: str) -> None:
    assert foreign_imports(name) <= {"cryptography"}


@pytest.mark.parametrize("name", [name for name in MODULES if name in PURE])
def test_a_pure_module_opens_no_files_sockets_or_clocks(name: str) -> None:
    tops = {imported.partition(".")[0] for imported in imports_of(MODULES[name])}
    assert not tops & {"os", "io", "pathlib", "socket", "ssl", "time", "datetime", "logging"}
    assert not tops & {"threading", "asyncio", "subprocess", "pickle", "ctypes"}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_other_packages_stay_where_they_belong(name: str) -> None:
    for package in foreign_imports(name):
        allowed = THIRD_PARTY[package]
        assert entry_of(name) in allowed or "*" in allowed, f"{name} imports {package}"


def test_the_package_itself_gives_pure_modules_only() -> None:
    assert {entry_of(target) for target in own_imports("")} <= set(PURE)
    assert not foreign_imports("")


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_nobody_takes_names_from_the_package_itself(name: str) -> None:
    # Its __init__ imports them all: that would be a circle, and hide who needs what.
    for node in ast.walk(ast.parse(MODULES[name].read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module == "provider_proxy":
            assert all(alias.name in MODULES for alias in node.names)


def test_tenant_and_provider_do_not_know_each_other() -> None:
    for name in MODULES:
        if entry_of(name) in PROVIDER:
            assert not {entry_of(target) for target in own_imports(name)} & set(TENANT), name


def test_there_is_no_circle() -> None:
    left = {name: own_imports(name) for name in MODULES if name}
    while left:
        free = {name for name, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}


@pytest.mark.parametrize("name", list(MODULES))
def test_a_module_says_what_it_is_for(name: str) -> None:
    text = MODULES[name].read_bytes()
    # A package's empty __init__ has nothing to say.
    assert ast.get_docstring(ast.parse(text)) or (not text and MODULES[name].name == "__init__.py")


def test_all_is_sorted_and_resolves() -> None:
    names = provider_proxy.__all__
    assert list(names) == sorted(set(names))
    for name in names:
        assert getattr(provider_proxy, name) is not None
    public = {name for name in vars(provider_proxy) if not name.startswith("_")}
    assert public - set(names) <= set(MODULES)  # and nothing else is there but submodules


def test_what_the_package_gives_is_what_its_modules_have() -> None:
    tree = ast.parse(MODULES[""].read_bytes())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert getattr(provider_proxy, alias.name) is getattr(module, alias.name)
                assert alias.name in provider_proxy.__all__
