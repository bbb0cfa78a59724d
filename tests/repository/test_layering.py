"""The folders are the architecture: who may import whom is read from the folders themselves.

`FLOORS` is the order of docs and design, the lowest first. A file imports from its own folder and from
floors below its own. Within `host/` the same rule holds among its own folders (`HOST_FLOORS`).
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_modules import MODULES, NAMED, ROOT

import provider_proxy

FLOORS = (
    ("errors",),
    ("evidence",),
    ("common",),
    ("trust",),
    ("tenant", "host"),
    ("testing",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
HOST_FLOORS = (
    ("config", "metrics"),
    ("tpm", "logs"),
    ("quoters", "batching"),
    ("http", "registration", "vtpm", "audit"),
    ("status",),
    ("api",),
    ("preflight", "listening"),
    ("assembly", "reload"),
    ("daemon", "pki"),
)

THIRD_PARTY: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "evidence": frozenset({"cryptography"}),
    "common": frozenset({"cryptography", "httpx", "httpcore", "anyio", "trio"}),
    "trust": frozenset({"cryptography", "httpx", "anyio"}),
    "trust.registration": frozenset({"trio", "httpx"}),
    "tenant": frozenset({"cryptography", "httpx", "anyio"}),
    "tenant.bridge": frozenset({"cryptography", "httpx", "trio", "prometheus_client"}),
    "tenant.fleet": frozenset({"trio", "psycopg", "prometheus_client"}),
    "tenant.watch": frozenset({"httpx", "trio", "h11", "prometheus_client"}),
    "host": frozenset({"cryptography", "trio", "prometheus_client"}),
    "host.config": frozenset(),
    "host.tpm": frozenset({"cryptography", "trio", "tpm2_pytss"}),
    "host.quoters": frozenset({"trio", "httpx", "tpm2_pytss"}),
    "host.batching": frozenset({"trio", "merklelib"}),
    "host.http": frozenset({"trio", "h11"}),
    "host.api": frozenset({"cryptography", "trio"}),
    "host.registration": frozenset({"trio"}),
    "host.vtpm": frozenset({"cryptography", "trio"}),
    "host.audit": frozenset({"trio"}),
    "host.status": frozenset({"cryptography", "trio"}),
    "testing": frozenset({"cryptography", "tpm2_pytss"}),
    "bench": frozenset({"psycopg", "cryptography", "trio", "httpx", "h11", "matplotlib"}),
    "cli": frozenset({"psycopg", "cryptography", "trio", "httpx", "rich"}),
    "__main__": frozenset(),
}
"""What each folder may import that is neither ours nor the standard library's.

A folder that has no line of its own is held to its parent's.
"""

IMPURE = frozenset(
    {"os", "io", "pathlib", "socket", "ssl", "time", "datetime", "logging", "tempfile", "select"}
    | {"threading", "asyncio", "subprocess", "pickle", "ctypes", "urllib.request", "http.client"}
)
"""What `evidence/` may not touch: files, sockets, clocks, threads, other processes."""


def folder_of(name: str) -> str:
    """The folder that holds a module; the name itself for a package and for a file at the top."""
    if MODULES[name].name == "__init__.py" or "." not in name:
        return name
    return name.rpartition(".")[0]


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports from."""
    found: set[str] = set()
    for imported in imports_of(MODULES[name]):
        if imported.partition(".")[0] != "provider_proxy":
            continue
        target = imported.removeprefix("provider_proxy").removeprefix(".")
        # The last part is a module, or a name in one.
        if target not in MODULES:
            target = target.rpartition(".")[0]
        assert target in MODULES, imported
        # `from provider_proxy import X` would take X from the package's __init__, which imports most
        # of evidence/: that makes a circle, and hides who needs what.
        assert target, f"{name} takes {imported} from the package itself"
        found.add(target)
    return found - {name}


def foreign_imports(name: str) -> set[str]:
    tops = {imported.partition(".")[0] for imported in imports_of(MODULES[name])}
    return tops - {"provider_proxy"} - set(sys.stdlib_module_names)


def floor(floors: tuple[tuple[str, ...], ...], part: str) -> int:
    found = [number for number, names in enumerate(floors) if part in names]
    assert len(found) == 1, f"{part} has no floor of its own"
    return found[0]


def may_import(name: str, target: str) -> bool:
    """Whether the order of the folders lets a module import another."""
    own, other = name.split("."), target.split(".")
    if own[0] != other[0]:
        return floor(FLOORS, other[0]) < floor(FLOORS, own[0])
    if own[0] == "host" and own[1:2] != other[1:2]:
        return floor(HOST_FLOORS, other[1]) < floor(HOST_FLOORS, own[1])
    return True


@pytest.mark.parametrize("name", NAMED)
def test_a_module_imports_from_lower_floors_only(name: str) -> None:
    assert {target for target in own_imports(name) if not may_import(name, target)} == set()


def test_the_rule_knows_right_from_wrong() -> None:
    assert may_import("host.api.tenant", "host.batching.batcher")
    assert not may_import("host.batching.batcher", "host.api.tenant")
    assert not may_import("tenant.client", "host.config.load")
    assert not may_import("host.daemon", "tenant.client")
    assert not may_import("evidence.wire", "common.files")
    assert not may_import("errors", "evidence.wire")


def test_the_top_holds_folders_and_nothing_else() -> None:
    files = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert {name for name in files if name.endswith(".py")} == {
        "__init__.py",
        "__main__.py",
        "errors.py",
    }
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders | {"errors", "__main__"} == {name for names in FLOORS for name in names}


def test_no_module_is_long() -> None:
    long = {name: count for name, path in MODULES.items() if (count := lines_of(path)) > 400}
    assert long == {}


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", [name for name in NAMED if name.partition(".")[0] == "evidence"])
def test_evidence_is_pure(name: str) -> None:
    assert foreign_imports(name) <= {"cryptography"}
    imported = set(imports_of(MODULES[name]))
    touched = {
        impure
        for impure in IMPURE
        for found in imported
        if found == impure or found.startswith(f"{impure}.")
    }
    assert touched == set()
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(MODULES[name].read_bytes()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}


@pytest.mark.parametrize("name", NAMED)
def test_other_packages_stay_in_their_folders(name: str) -> None:
    folder = folder_of(name)
    while folder not in THIRD_PARTY:
        folder = folder.rpartition(".")[0]
        assert folder, f"{name} belongs to no folder of THIRD_PARTY"
    assert foreign_imports(name) <= THIRD_PARTY[folder]


@pytest.mark.parametrize("folder", list(THIRD_PARTY))
def test_what_a_folder_may_import_it_imports(folder: str) -> None:
    """So that the table above does not promise more than is there."""
    named = {
        name
        for name in NAMED
        if (own := folder_of(name)) == folder
        or (own.startswith(f"{folder}.") and own not in THIRD_PARTY)
    }
    assert set().union(*(foreign_imports(name) for name in named)) == THIRD_PARTY[folder]


@pytest.mark.parametrize(("package", "home"), [("merklelib", "host.batching.merkle")])
def test_one_module_alone_imports(package: str, home: str) -> None:
    assert {name for name in NAMED if package in foreign_imports(name)} == {home}


def test_the_package_itself_gives_pure_modules_only() -> None:
    assert {target.partition(".")[0] for target in own_imports("")} <= {"errors", "evidence"}
    assert not foreign_imports("")


def test_there_is_no_circle() -> None:
    left = {name: own_imports(name) for name in NAMED}
    while left:
        free = {name for name, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}


@pytest.mark.parametrize("name", NAMED)
def test_names_come_from_where_they_are_defined(name: str) -> None:
    """Nobody imports a name from a module that has only imported it itself."""
    for node in ast.walk(ast.parse(MODULES[name].read_bytes())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        source = node.module.removeprefix("provider_proxy.")
        if source in MODULES and node.module != source:
            for alias in node.names:
                assert alias.name in defined_in(source) or f"{source}.{alias.name}" in MODULES, (
                    f"{alias.name} is not defined in {source}"
                )


def defined_in(name: str) -> set[str]:
    """The names that a module itself defines at its top level."""
    found: set[str] = set()
    todo: list[ast.stmt] = list(ast.parse(MODULES[name].read_bytes()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                found |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.If | ast.Try):
            todo += node.body
    return found


@pytest.mark.parametrize("name", list(MODULES))
def test_a_module_says_what_it_is_for(name: str) -> None:
    text = MODULES[name].read_bytes()
    # A folder's empty __init__ has nothing to say.
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


def test_what_tests_share_is_in_support() -> None:
    """A helper inside a test module is found by luck of the folders' order."""
    tests = Path(__file__).parents[1]
    modules = {path.stem for path in tests.rglob("test_*.py")}
    borrowed = {
        f"{path.relative_to(tests)} imports {found}"
        for path in tests.rglob("*.py")
        for found in imports_of(path)
        if not modules.isdisjoint(found.split("."))
    }
    assert borrowed == set()
