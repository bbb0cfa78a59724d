"""`make mutants`: breaks the pure core on purpose, one place at a time, and looks whether a test notices.

    python tests/support/mutants.py [--sample N] [--seed S] [--jobs J] [--list] [MODULE …]

A mutant is the package with one comparison turned, one operator exchanged, one number changed by one, one
condition negated, or one `raise` left out. It is killed where the tests of its module fail or hang. One
that survives is a fault that no test sees, unless it means the same: those are named in `EQUIVALENT`,
with the reason. Runs in copies of the tree, outside CI: a mutant costs some seconds.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "provider_proxy"
LIMIT_S = 120.0
EVIDENCE = "tests/evidence"
LOGS = (f"{EVIDENCE}/test_ima.py", f"{EVIDENCE}/test_ima_judge.py", f"{EVIDENCE}/test_log_judge.py")
VECTORS = f"{EVIDENCE}/test_vectors.py"
TESTS: dict[str, tuple[str, ...]] = {
    "evidence/verify.py": (f"{EVIDENCE}/test_verify.py", VECTORS),
    "evidence/wire.py": (f"{EVIDENCE}/test_wire.py", VECTORS),
    "evidence/strict_json.py": (
        f"{EVIDENCE}/test_strict_json.py",
        f"{EVIDENCE}/test_wire.py",
        VECTORS,
    ),
    "evidence/attestation.py": (
        f"{EVIDENCE}/test_attestation.py",
        f"{EVIDENCE}/test_verify.py",
        VECTORS,
    ),
    "evidence/inclusion.py": (f"{EVIDENCE}/test_inclusion.py", VECTORS),
    "evidence/policy.py": (f"{EVIDENCE}/test_policy.py",),
    "evidence/vtpm_link.py": (f"{EVIDENCE}/test_vtpm_link.py", VECTORS),
    "evidence/model.py": (f"{EVIDENCE}/test_wire.py", f"{EVIDENCE}/test_query.py", VECTORS),
    "evidence/logs/ima.py": LOGS,
    "evidence/logs/ima_line.py": LOGS,
    "evidence/logs/ima_judge.py": LOGS,
    "evidence/logs/ima_keys.py": LOGS,
    "evidence/logs/runtime_policy.py": LOGS,
    "evidence/logs/runtime_policy_file.py": LOGS,
    "evidence/logs/judge.py": (*LOGS, f"{EVIDENCE}/test_event_log.py"),
    "evidence/logs/event_log.py": (f"{EVIDENCE}/test_event_log.py",),
    "evidence/logs/boot_policy.py": (f"{EVIDENCE}/test_event_log.py",),
    "evidence/logs/policy_making.py": ("tests/cli/test_policy_cli.py",),
}
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "evidence/logs/ima_judge.py",
        "Mult to Add: MAX_REMEMBERED_CHARS = 8 * 1024 * 1024  # some 45,000 lines, twice: 50 MB",
    ): "how much is remembered changes no verdict",
    (
        "evidence/strict_json.py",
        "20000000 plus one: MAX_OWN_PARTS = 20_000_000  # a runtime policy of 256 MB: two digests and a "
        "name are 150 bytes",
    ): "the bound is on one's own file: that there is one is tested, not its last digit",
}
"""Module and description of a mutant that means the same, to the reason."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE,),
    ast.LtE: (ast.Lt,),
    ast.Gt: (ast.GtE,),
    ast.GtE: (ast.Gt,),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.Mod: ast.Add,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    what: str
    source: str


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    text = (ROOT / PACKAGE / module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    skipped = {id(n) for node in ast.walk(tree) for n in _uninteresting(node)}
    places = [n for n in ast.walk(tree) if id(n) not in skipped]
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in skipped or node not in places:
            continue
        for name, change in _changes(node):
            broken = copy.deepcopy(tree)
            target = next(n for k, n in enumerate(ast.walk(broken)) if k == place)
            change(target)
            line = lines[getattr(node, "lineno", 1) - 1].strip()
            yield Mutant(module, f"{name}: {line}", ast.unparse(ast.fix_missing_locations(broken)))


def _uninteresting(node: ast.AST) -> Iterator[ast.AST]:
    """What a test need not see: annotations, messages, decorators."""
    for name in ("annotation", "returns"):
        part = getattr(node, name, None)
        if isinstance(part, ast.AST):
            yield from ast.walk(part)
    if isinstance(node, ast.JoinedStr):
        yield from ast.walk(node)
    for decorator in getattr(node, "decorator_list", ()):
        yield from ast.walk(decorator)


Change = Callable[[Any], object]


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    if isinstance(node, ast.Compare):
        for at, op in enumerate(node.ops):
            for other in COMPARISONS.get(type(op), ()):
                yield f"{type(op).__name__} to {other.__name__}", _set_op(at, other)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        other_op = OPERATORS[type(node.op)]
        yield f"{type(node.op).__name__} to {other_op.__name__}", _set("op", other_op())
    elif isinstance(node, ast.BoolOp):
        other_bool: ast.boolop = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield f"{type(node.op).__name__} turned", _set("op", other_bool)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not left out", _set("op", ast.UAdd())
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield f"{node.value} plus one", _set("value", node.value + 1)
    elif isinstance(node, ast.Raise):
        yield "raise left out", _drop_raise
    elif isinstance(node, ast.If):
        yield "if negated", _negate


def _set(field: str, value: object) -> Change:
    return lambda node: setattr(node, field, value)


def _set_op(at: int, other: type[ast.cmpop]) -> Change:
    return lambda node: node.ops.__setitem__(at, other())


def _drop_raise(node: Any) -> None:
    node.__class__ = ast.Pass


def _negate(node: ast.If) -> None:
    node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)


def survives(mutant: Mutant, tree: Path) -> bool:
    """Run the tests of its module over a mutant; True where they pass."""
    path = tree / PACKAGE / mutant.module
    good = path.read_text(encoding="utf-8")
    tests = [test for test in TESTS[mutant.module] if (tree / test).exists()]
    path.write_text(mutant.source, encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=tree,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
            env=os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    except subprocess.TimeoutExpired:
        return False
    finally:
        path.write_text(good, encoding="utf-8")
    return done.returncode == 0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="evidence/verify.py, for example"
    )
    parser.add_argument("--sample", type=int, default=130, help="so many; 0 for all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only name them")
    args = parser.parse_args()
    made = [m for module in args.modules or TESTS for m in mutants_of(module)]
    if args.sample and args.sample < len(made):
        made = random.Random(args.seed).sample(made, args.sample)  # the same again
    if args.list:
        for mutant in made:
            print(f"{mutant.module}: {mutant.what}")
        return 0
    with tempfile.TemporaryDirectory(prefix="provider-proxy-mutants-") as directory:
        return _run(made, Path(directory), args.jobs)


def _run(made: list[Mutant], directory: Path, jobs: int) -> int:
    trees: SimpleQueue[Path] = SimpleQueue()
    for number in range(jobs):
        tree = directory / str(number)
        for name in (PACKAGE, "tests", "docs", "pyproject.toml", "CHANGELOG.md", "README.md"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, tree / name)
        trees.put(tree)

    def one(mutant: Mutant) -> bool:
        tree = trees.get()
        try:
            return survives(mutant, tree)
        finally:
            trees.put(tree)

    alive = []
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, lives in zip(made, pool.map(one, made), strict=True):
            reason = EQUIVALENT.get((mutant.module, mutant.what))
            if lives:
                print(
                    f"{'same' if reason else 'ALIVE'}  {mutant.module}: {mutant.what}", flush=True
                )
                alive += [] if reason else [mutant]
    print(f"{len(made) - len(alive)} of {len(made)} are killed, or mean the same")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
