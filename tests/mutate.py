"""Change the code on purpose and see whether the tests notice: ``python -m tests.mutate``.

mutmut makes the mutants and keeps the results in mutants/, where `mutmut results` and `mutmut show`
find them. The tests run here: they are collected once, and each mutant is tried in a fork of that
process, on the tests of its own module that reach the function, the fastest first. A run that was
stopped goes on where it was; `--again` also tries again what was not caught.
"""

import argparse
import inspect
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

MOST = 3.0  # seconds of tests for a mutant
PROCESSES = 2
# module -> its tests; a module that is not here is tried on the tests of its package
TESTS = {
    "taskvec.vectors": ["vectors"],
    "taskvec.expressions": ["expressions"],
    "taskvec.lazy": ["lazy"],
    "taskvec.streaming": ["streaming"],
    "taskvec.edits": ["edits"],
    "taskvec.layers": ["layers"],
    "taskvec.random_masks": ["random_masks"],
    "taskvec.merging": ["merging_golden", "merging_laws"],
}
SURVIVED, KILLED, NO_TESTS, TIMEOUT = 0, 1, 33, -24  # as mutmut writes them


def tests_of(module: str) -> list[str]:
    """Return the test files that a module is tried on."""
    names = TESTS[module if module in TESTS else module.rpartition(".")[0]]
    return [f"tests/test_{name}.py" for name in [*names, "survivors"]]


def mutate_decorated_functions() -> None:
    """Let mutmut mutate what is under a decorator; the decorator stays around all mutants."""
    import libcst
    from mutmut.mutation import file_mutation, trampoline

    skip = file_mutation.MutationVisitor._skip_node_and_children
    arrange = file_mutation.function_trampoline_arrangement
    wrap = trampoline.wrap_in_trampoline

    def skipped(visitor: Any, node: Any) -> bool:
        if isinstance(node, libcst.FunctionDef) and node.decorators:
            return node.name.value in file_mutation.NEVER_MUTATE_FUNCTION_NAMES
        return skip(visitor, node)

    def arranged(function: Any, mutants: Any, class_name: str | None) -> Any:
        names = [getattr(each.decorator, "value", None) for each in function.decorators]
        if names in ([], ["classmethod"], ["staticmethod"]):
            return arrange(function, mutants, class_name)
        plain = function.with_changes(decorators=())
        empty, nodes, assignments, mutant_names = arrange(plain, mutants, class_name)
        switch = nodes[0]
        nodes[0] = switch.with_changes(decorators=[*function.decorators, *switch.decorators])
        return empty, nodes, assignments, mutant_names

    def wrapped(*args: Any, **options: Any) -> Callable[..., Any]:
        decorate = wrap(*args, **options)

        @wraps(decorate)
        def with_signature(function: Any) -> Any:
            switch: Any = decorate(function)
            switch.__signature__ = inspect.signature(function)  # `options.checked` reads it
            return switch

        return with_signature

    file_mutation.MutationVisitor._skip_node_and_children = skipped
    file_mutation.function_trampoline_arrangement = arranged
    trampoline.wrap_in_trampoline = wrapped


def results(modules: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (module, what mutmut knows about its mutants); all modules if none is named."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.utils.file_utils import walk_mutatable_files

    for path in sorted(walk_mutatable_files()):
        module = path.with_suffix("").as_posix().replace("/", ".")
        data = SourceFileMutationData(path=path)
        data.load()
        data.meta_path = data.meta_path.absolute()
        if data.exit_code_by_key and (module in modules or not modules):
            yield module, data


class Tries:
    """A pytest plugin that runs the tests that were collected once for each mutant."""

    def __init__(self, work: list[tuple[str, Any, str]], end: float) -> None:
        self.work = work  # module, data, mutant
        self.end = end
        self.done = 0
        self.failed = False
        self.items: dict[str, list[pytest.Item]] = {}  # function -> tests that reach it
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from hypothesis import given  # pytest wants to be the first to import it
        from hypothesis import strategies as st

        given(st.integers())(lambda number: None)()  # hypothesis reads all sources at first
        self._learn(session.items)
        running: dict[int, tuple[Any, str, float]] = {}
        for module, data, mutant in self.work:
            if time.monotonic() > self.end:
                break
            tests = self._chosen(module, mutant)
            if not tests:
                self._write(data, mutant, NO_TESTS)
                continue
            while len(running) >= PROCESSES:
                self._wait(running)
            limit = 3 * (2 + sum(self.seconds[test.nodeid] for test in tests))
            running[_forked(lambda tests=tests: self._fails(tests), mutant)] = (
                data, mutant, time.monotonic() + limit,
            )  # fmt: skip
        while running:
            self._wait(running)
        return True

    def _learn(self, items: list[pytest.Item]) -> None:
        """Run every test once without a mutant: how long it takes and what it reaches."""
        learned = Path("learned.json").absolute()

        def run() -> int:
            from mutmut.state import state

            with learned.open("w") as file:
                for item in items:
                    state()._stats.clear()
                    start = time.perf_counter()
                    failed = self._fails([item])
                    took = time.perf_counter() - start
                    found = [item.nodeid, failed, took, sorted(state()._stats)]
                    file.write(json.dumps(found) + "\n")
                    file.flush()
            return 0

        os.waitpid(_forked(run, "stats"), 0)
        by_name = {item.nodeid: item for item in items}
        for line in learned.read_text().splitlines():
            name, failed, took, functions = json.loads(line)
            self.seconds[name] = took
            if failed:
                say(f"fails without a mutant, not used: {name}")
                continue
            for function in functions:
                self.items.setdefault(function, []).append(by_name[name])

    def _chosen(self, module: str, mutant: str) -> list[pytest.Item]:
        from mutmut.utils.format_utils import mangled_name_from_mutant_name

        reached = self.items.get(mangled_name_from_mutant_name(mutant), [])
        own, spent, result = tests_of(module), 0.0, []
        for item in sorted(reached, key=lambda item: self.seconds[item.nodeid]):
            spent += self.seconds[item.nodeid]
            if item.nodeid.partition("::")[0] in own and spent <= MOST:
                result.append(item)
        return result

    def _fails(self, tests: Iterable[pytest.Item]) -> int:
        self.failed = False
        for test in tests:
            test.ihook.pytest_runtest_protocol(item=test, nextitem=None)
            if self.failed:
                return KILLED
        return SURVIVED

    def _wait(self, running: dict[int, tuple[Any, str, float]]) -> None:
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                data, mutant, _ = running.pop(process)
                self._write(data, mutant, os.waitstatus_to_exitcode(status))
                return
            for late, (data, mutant, end) in list(running.items()):
                if time.monotonic() > end:
                    os.killpg(late, signal.SIGKILL)
                    os.waitpid(late, 0)
                    del running[late]
                    self._write(data, mutant, TIMEOUT)
                    return
            time.sleep(0.003)

    def _write(self, data: Any, mutant: str, code: int) -> None:
        data.exit_code_by_key[mutant] = code
        data.save()
        self.done += 1


def _forked(function: Callable[[], int], mutant: str) -> int:
    """Run a function in a copy of this process with a mutant; return the process."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    process = os.fork()
    if process:
        return process
    code = KILLED
    try:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        set_mutant_under_test(mutant)
        code = function()
    finally:
        os._exit(code)


def say(text: str) -> None:
    """Print a line, whatever pytest does with the output."""
    sys.__stderr__.write(f"{text}\n")  # type: ignore[union-attr]


def summary(modules: list[str]) -> str:
    """Return a table of what has been found so far, and the names of the survivors."""
    from mutmut.stats import status_by_exit_code

    kinds = ["killed", "timeout", "survived", "no tests", "not checked"]
    rows, survivors = [], []
    for module, data in results(modules):
        found = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
        rows.append((module, Counter(found.values())))
        survivors += [name for name, kind in found.items() if kind in ("survived", "no tests")]
    rows.append(("all", sum((counts for _, counts in rows), Counter())))
    lines = [f"| module | mutants | {' | '.join(kinds)} | other | caught |"]
    lines.append("|---" * (len(kinds) + 4) + "|")
    for name, counts in rows:
        figures = [counts[kind] for kind in kinds]
        tried = counts.total() - counts["not checked"]
        other = counts.total() - sum(figures)
        caught = counts["killed"] + counts["timeout"] + other
        share = f"{caught / tried:.1%}" if tried else ""
        cells = [name, counts.total(), *figures, other, share]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *survivors])


def main() -> None:
    """Make the mutants, try those that have not been tried, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("modules", nargs="*", help="such as taskvec.vectors; default: all")
    parser.add_argument("--again", action="store_true", help="also what was tried and not caught")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    args = parser.parse_args()

    os.environ |= {"HYPOTHESIS_PROFILE": "mutation", "OMP_NUM_THREADS": "1"}
    mutate_decorated_functions()
    from mutmut.__main__ import create_mutants
    from mutmut.configuration import config
    from mutmut.mutation.trampoline import set_mutant_under_test
    from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths

    set_mutant_under_test("")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    Path("mutants").mkdir(exist_ok=True)
    copy_src_dir()
    copy_also_copy_files()
    setup_source_paths()
    create_mutants(PROCESSES)

    open_codes = [None, SURVIVED, NO_TESTS, TIMEOUT] if args.again else [None]
    work = [
        (module, data, mutant)
        for module, data in results(args.modules)
        for mutant, code in data.exit_code_by_key.items()
        if code in open_codes
    ]
    files = sorted({file for module, _, _ in work for file in tests_of(module)})
    if work:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # those of mutants/ are wanted
        os.chdir("mutants")
        options = ["--rootdir=.", "-q", "-s", "-p", "no:randomly", *config().pytest_add_cli_args]
        start = time.monotonic()
        tries = Tries(work, start + 60 * args.minutes)
        pytest.main([*options, *files], plugins=[tries])
        say(f"{tries.done} mutants in {(time.monotonic() - start) / 60:.1f} minutes")
        os.chdir("..")
    text = summary(args.modules)
    Path("mutants/summary.md").write_text(summary([]) + "\n")
    say(text)


if __name__ == "__main__":
    main()
