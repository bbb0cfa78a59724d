"""`make mutants`: breaks the pure core on purpose, one place at a time, and looks whether a test notices.

    python tests/support/mutants.py [--sample N] [--seed S] [--jobs J] [--again FILE] [--list] [MODULE …]

A mutant is the package with one comparison turned, one operator exchanged, one number changed by one, one
condition negated, or one `raise` left out. It is killed where a test of its module fails, or takes more
than `LIMIT_S` seconds of the processor. One that survives is a fault that no test sees, unless it means
the same: those stand in `equivalent_mutants.toml` beside this file, each with the reason. The run is good
where nothing survives that does not stand there, and nothing stands there that is killed or is gone.

No file is changed, and nothing is started for a mutant but a child of this process: one that has the
tests collected, and whose functions are broken; then, for what is not in a function and for what has
survived, one that imports the package again, with the broken source. Outside CI.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib.abc
import importlib.machinery
import mmap
import os
import random
import resource
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NoReturn

import cryptography.x509  # noqa: F401  (imported before the fork, as the next ones are)
import hypothesis
import pytest
import trio  # noqa: F401
from hypothesis import strategies

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "provider_proxy"
KNOWN = Path(__file__).with_name("equivalent_mutants.toml")
LIMIT_S = 20  # of the processor: the tests of a module take 4 at the most
LIMIT_BYTES = 4 << 30
OPTIONS: tuple[str, ...] = ("-q", "-p", "no:cacheprovider", "--hypothesis-seed=0")
OPTIONS += ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # hypothesis is there already
OPTIONS += ("-W", "ignore::hypothesis.errors.HypothesisSideeffectWarning")
EVIDENCE = "tests/evidence"
LOGS = (f"{EVIDENCE}/test_ima.py", f"{EVIDENCE}/test_ima_judge.py", f"{EVIDENCE}/test_log_judge.py")
VECTORS = f"{EVIDENCE}/test_vectors.py"
TESTS: dict[str, tuple[str, ...]] = {
    "evidence/verify.py": (f"{EVIDENCE}/test_verify.py", VECTORS),
    "evidence/wire.py": (
        f"{EVIDENCE}/test_wire.py",
        f"{EVIDENCE}/test_request_file.py",
        VECTORS,
    ),
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
    "evidence/model.py": (
        f"{EVIDENCE}/test_model.py",
        f"{EVIDENCE}/test_wire.py",
        f"{EVIDENCE}/test_query.py",
        VECTORS,
    ),
    "evidence/logs/ima.py": LOGS,
    "evidence/logs/ima_line.py": (f"{EVIDENCE}/test_ima_line.py", *LOGS),
    "evidence/logs/ima_judge.py": LOGS,
    "evidence/logs/ima_keys.py": LOGS,
    "evidence/logs/runtime_policy.py": LOGS,
    "evidence/logs/runtime_policy_file.py": LOGS,
    "evidence/logs/judge.py": (*LOGS, f"{EVIDENCE}/test_event_log.py"),
    "evidence/logs/event_log.py": (f"{EVIDENCE}/test_event_log.py",),
    "evidence/logs/boot_policy.py": (f"{EVIDENCE}/test_event_log.py",),
    "evidence/logs/policy_making.py": (
        f"{EVIDENCE}/test_policy_making.py",
        "tests/cli/test_policy_cli.py",
    ),
}
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
    """One change of one module.

    Attributes:
        place: of the node in the module's tree, as `ast.walk` counts.
        which: of the changes of this node.
        inside: it is in the body of a function, and so changes nothing else.
        what: names it; the second of the same on a line of the same text has "(2)" behind it.
    """

    module: str
    place: int
    which: int
    what: str
    inside: bool

    def code(self) -> CodeType:
        """The broken module, compiled."""
        tree = ast.parse((ROOT / PACKAGE / self.module).read_bytes())
        node = next(n for k, n in enumerate(ast.walk(tree)) if k == self.place)
        list(_changes(node))[self.which][1](node)
        path = str(ROOT / PACKAGE / self.module)
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    text = (ROOT / PACKAGE / module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    skipped = {id(n) for node in ast.walk(tree) for n in _uninteresting(node)}
    inside = {id(n) for node in ast.walk(tree) for n in _body(node)}
    seen: Counter[str] = Counter()
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for which, (name, _) in enumerate(_changes(node)):
            what = f"{name}: {lines[getattr(node, 'lineno', 1) - 1].strip()}"
            seen[what] += 1
            if seen[what] > 1:
                what += f" ({seen[what]})"
            yield Mutant(module, place, which, what, id(node) in inside)


def _body(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a function is called, and not before."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for statement in node.body:
            yield from ast.walk(statement)
    elif isinstance(node, ast.Lambda):
        yield from ast.walk(node.body)


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


class BrokenModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the import system the mutant in the place of the module."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = f"{PACKAGE}.{mutant.module[:-3].replace('/', '.')}"
        self._path = str(ROOT / PACKAGE / mutant.module)
        self._code = mutant.code()

    def find_spec(
        self, fullname: str, path: object, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=self._path)
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


class BrokenFunctions:
    """A pytest plugin: collects once, and runs the tests in a child for each mutant, until one fails.

    Those that have failed most often come first.

    Attributes:
        alive: mutants that no test has noticed.
    """

    def __init__(self, made: Sequence[Mutant], jobs: int) -> None:
        self._made = made
        self._jobs = jobs
        self.alive: list[Mutant] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        functions = [f for f in gc.get_objects() if isinstance(f, FunctionType)]
        failures = memoryview(mmap.mmap(-1, 2 * len(session.items))).cast(
            "H"
        )  # the children's, too

        def attempt(mutant: Mutant) -> int:
            self._break(mutant, functions)
            order = sorted(range(len(failures)), key=lambda place: -failures[place])
            items = [session.items[place] for place in order]
            for place, item, following in zip(order, items, (*items[1:], None), strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    failures[place] += 1
                    return 1
            return 0

        ended = each_in_a_child(self._made, attempt, self._jobs)
        self.alive = [mutant for mutant, lives in ended if lives]
        return True

    def _break(self, mutant: Mutant, functions: list[FunctionType]) -> None:
        path = str(ROOT / PACKAGE / mutant.module)
        broken = {(c.co_qualname, c.co_firstlineno): c for c in code_in(mutant.code())}
        for function in functions:
            code = function.__code__
            if code.co_filename == path:
                function.__code__ = broken[code.co_qualname, code.co_firstlineno]


def code_in(code: CodeType) -> Iterator[CodeType]:
    """A code object's own functions, and theirs."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from code_in(part)


def each_in_a_child(
    made: Sequence[Mutant], run: Callable[[Mutant], int], jobs: int
) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether its tests passed in a child of its own, as they end."""
    running: dict[int, Mutant] = {}
    left = iter(made)
    while True:
        while len(running) < jobs and (mutant := next(left, None)) is not None:
            child = os.fork()
            if not child:
                _be_the_child(mutant, run)
            running[child] = mutant
        if not running:
            return
        child, status = os.wait()
        yield running.pop(child), status == 0


def _be_the_child(mutant: Mutant, run: Callable[[Mutant], int]) -> NoReturn:
    code = 99
    try:
        _say_nothing()
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S + 1))
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = run(mutant)
    finally:
        os._exit(code)


def _say_nothing() -> None:
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 2)


def in_functions(module: str, made: Sequence[Mutant], jobs: int) -> list[Mutant]:
    """Those that survive where the functions alone are broken, of mutants in a module's functions."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _say_nothing()
        plugin = BrokenFunctions(made, jobs)
        code = pytest.main([*OPTIONS, *TESTS[module]], plugins=[plugin])
        with os.fdopen(write, "w") as result:
            result.write(" ".join(str(made.index(mutant)) for mutant in plugin.alive))
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as result:
        alive = [made[int(number)] for number in result.read().split()]
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != pytest.ExitCode.OK:
        raise SystemExit(f"the tests of {module} cannot be collected")
    return alive


def from_the_import_on(mutant: Mutant) -> int:
    """Run the tests on a package that never was whole; the exit code. For a child."""
    sys.meta_path.insert(0, BrokenModule(mutant))
    return pytest.main([*OPTIONS, "-x", *TESTS[mutant.module]])


def run_all(made: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant, and whether it survived."""
    left: list[Mutant] = []
    for module in dict.fromkeys(mutant.module for mutant in made):
        of_module = [mutant for mutant in made if mutant.module == module]
        inside = [mutant for mutant in of_module if mutant.inside]
        alive = in_functions(module, inside, jobs)
        yield from ((mutant, False) for mutant in inside if mutant not in alive)
        # What was computed while the tests were collected was whole: no verdict on those that live.
        left = [mutant for mutant in of_module if not mutant.inside or mutant in alive]
        yield from each_in_a_child(left, from_the_import_on, jobs)


def warm_up(modules: Sequence[str]) -> None:
    """Import what takes long, and see that the tests pass where nothing is broken.

    Raises:
        SystemExit: they do not.
    """

    @hypothesis.given(strategies.text(), strategies.floats())
    @hypothesis.settings(max_examples=1, database=None, deadline=None)
    def draw(_text: str, _number: float) -> None:
        pass

    draw()
    tests = sorted({test for module in modules for test in TESTS[module]})
    child = os.fork()
    if not child:
        code = pytest.main([*OPTIONS, "-x", *tests])
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the tests fail with nothing broken: mend that first")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "modules", nargs="*", metavar="MODULE", help="evidence/verify.py, for example"
    )
    parser.add_argument("--sample", type=int, default=0, help="only so many; 0 for all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="only those that an earlier run's output has alive",
    )
    parser.add_argument("--list", action="store_true", help="only name them")
    args = parser.parse_args()
    modules = args.modules or list(TESTS)
    made = [mutant for module in modules for mutant in mutants_of(module)]
    known = tomllib.loads(KNOWN.read_text(encoding="utf-8"))
    there = {(mutant.module, mutant.what) for mutant in made}
    gone = [
        f"{module}: {what}"
        for module, listed in known.items()
        for what in listed
        if module in modules and (module, what) not in there
    ]
    if args.again is not None:
        before = args.again.read_text(encoding="utf-8").splitlines()
        alive = {line.removeprefix("ALIVE  ") for line in before if line.startswith("ALIVE  ")}
        made = [mutant for mutant in made if f"{mutant.module}: {mutant.what}" in alive]
    if args.sample and args.sample < len(made):
        made = random.Random(args.seed).sample(made, args.sample)  # the same again
    if args.list:
        for mutant in made:
            print(f"{mutant.module}: {mutant.what}")
        return 0
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="provider-proxy-mutants-") as directory:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = directory
        sys.dont_write_bytecode = False
        warm_up(modules)
        return report(made, known, gone, args.jobs)


def report(made: list[Mutant], known: dict[str, dict[str, str]], gone: list[str], jobs: int) -> int:
    """Run them, and name what is not as it should be; the exit code."""
    begun = time.monotonic()
    count: Counter[str] = Counter()
    for mutant, lives in run_all(made, jobs):
        listed = mutant.what in known.get(mutant.module, {})
        verdict = {
            (True, False): "ALIVE",
            (True, True): "equivalent",
            (False, False): "killed",
            (False, True): "KILLED, BUT LISTED",
        }[lives, listed]
        count[verdict] += 1
        if verdict != "killed":
            print(f"{verdict}  {mutant.module}: {mutant.what}", flush=True)
    for name in gone:
        print(f"LISTED, BUT GONE  {name}")
    print(
        f"{len(made)} mutants in {time.monotonic() - begun:.0f} s: {count['killed']} killed, "
        f"{count['equivalent']} equivalent, {count['ALIVE']} alive"
    )
    return 1 if count["ALIVE"] or count["KILLED, BUT LISTED"] or gone else 0


if __name__ == "__main__":
    sys.exit(main())
