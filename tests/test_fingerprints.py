"""Fingerprints: equal for what cannot change a result, different for everything that can."""

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from flows import plan
from flows.fingerprints import Code
from taskvec import params
from tests.project import EXPERIMENT, ROOT, STUDY

# Two stages over a library of a few modules: `combine` uses classes, `search` imports in odd ways.
FILES = {
    "taskvec/__init__.py": '"""A library."""\n',
    "taskvec/rooms/__init__.py": "LOADED = []\nLOADED.append('rooms')\n",
    "taskvec/rooms/deep.py": """
        from . import shallow
        from .shallow import fill as pour
        def dig(x):
            return pour(x)
    """,
    "taskvec/rooms/shallow.py": """
        def fill(x):
            return x + 5
    """,
    "taskvec/base.py": """
        from json import JSONEncoder
        class Shape:
            \"\"\"A base class.\"\"\"
            sides = 0
            def area(self):
                return self.sides * UNIT
            def never_mentioned(self):
                return 1
        class Coder(JSONEncoder):
            def default(self, o):
                return str(o)
        UNIT = 2
    """,
    "taskvec/shapes.py": """
        from functools import cache
        from taskvec.base import Coder, Shape
        SCALE = 3
        KINDS = []
        def logged(function):
            return function
        class Square(Shape):
            \"\"\"Four equal sides.\"\"\"
            sides = 4
            \"\"\"How many.\"\"\"
            @logged
            def decorated(self):
                return 11
            @property
            def corner(self):
                return SCALE
            def by_name(self):
                return 12
            def forgotten(self):
                return 0
            def __len__(self):
                return 13
        @cache
        def grow(x):
            \"\"\"Return more.\"\"\"
            # why: because
            return x * WEIGHT
        def unused(x):
            return x - 1
        class MyCoder(Coder):
            def encode(self, o):
                return "encoded"
        WEIGHT = 7
        KINDS.append("square")
    """,
    "taskvec/quantities.py": """
        def double(x):
            return 2 * x
        def triple(x):
            return 3 * x
        def fourfold(x):
            return 4 * x
        try:
            from taskvec.fast import half
        except ImportError:
            from taskvec.slow import half
    """,
    "taskvec/fast.py": "def half(x):\n    return x / 2\n",
    "taskvec/slow.py": "def half(x):\n    return x * 0.5\n",
    "taskvec/tools.py": """
        from taskvec.quantities import triple as threefold
        def tool(x):
            return x + 21
        def other_tool(x):
            return x + 22
    """,
    "taskvec/settings.py": "VALUES = {}\nVALUES['x'] = 1\n",
    "taskvec/lonely.py": "def alone(x):\n    return x\n",
    "tasks/__init__.py": "",
    "tasks/combine.py": """
        from math import sqrt as root
        from taskvec.shapes import MyCoder as Encoder, Square as Form, grow
        def combine(x):
            form = Form()
            text = MODES[0].dumps(getattr(form, "by_name")(), cls=Encoder)
            return grow(form.corner) + root(x) + form.area() + len(text)
        import json
        MODES = [json]
    """,
    "tasks/search.py": """
        import taskvec.tools as tools
        import taskvec.rooms.deep
        from taskvec import quantities
        def search(x):
            import taskvec.settings
            from taskvec.quantities import double as twice, fourfold as more
            return more(twice(x)) + tools.threefold(x) + tools.tool(quantities.half(x))
        def dive(x):
            return taskvec.rooms.deep.dig(x)
        search.dive = dive
    """,
}
SAMPLE = 12  # of the functions that stages call; another one in each run
COMBINE, SEARCH, BOTH, NONE = {"combine"}, {"search"}, {"combine", "search"}, set[str]()


def package(root: Path) -> Path:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


def digests(root: Path) -> dict[str, str]:
    code = Code(root)
    return {stage: code.fingerprint([f"tasks.{stage}:{stage}"]) for stage in BOTH}


def changed_by(root: Path, name: str, old: str, new: str) -> set[str]:
    """Return the stages whose fingerprint changes with a text in a file."""
    before = digests(root)
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))
    after = digests(root)
    return {stage for stage in BOTH if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("taskvec/shapes.py", "# why: because", "# why: for other reasons"),
        ("taskvec/shapes.py", "Return more.", "Return much more."),
        ("taskvec/shapes.py", '"""How many."""', '"""The number of sides."""'),
        ("taskvec/shapes.py", "SCALE = 3\n", '\n\nSCALE = (\n    3\n)\n"""A scale."""\n'),
        ("taskvec/shapes.py", "return 0", "return 1000"),
        ("taskvec/shapes.py", "    def forgotten", "    def more(self): ...\n    def forgotten"),
        ("taskvec/shapes.py", "return x - 1", "return x - 1000"),
        ("taskvec/shapes.py", "WEIGHT = 7\n", "SPARE = 8\nWEIGHT = 7\n"),
        ("taskvec/base.py", "return 1\n", "return 1000\n"),
        ("taskvec/lonely.py", "return x", "return x + 1000"),
        ("taskvec/tools.py", "x + 22", "x + 1000"),
        ("taskvec/__init__.py", "A library", "The library"),
    ],
)
def test_what_cannot_change_a_result_changes_no_fingerprint(
    tmp_path: Path, name: str, old: str, new: str
) -> None:
    assert changed_by(package(tmp_path), name, old, new) == NONE


@pytest.mark.parametrize(
    ("name", "old", "new", "stages"),
    [
        pytest.param("taskvec/shapes.py", "x * WEIGHT", "x - WEIGHT", COMBINE, id="function"),
        pytest.param("taskvec/shapes.py", "WEIGHT = 7", "WEIGHT = 8", COMBINE, id="constant"),
        pytest.param("taskvec/shapes.py", "SCALE = 3", "SCALE = 4", COMBINE, id="via a property"),
        pytest.param("taskvec/base.py", "UNIT = 2", "UNIT = 4", COMBINE, id="via a base's method"),
        pytest.param("taskvec/base.py", "* UNIT", "+ UNIT", COMBINE, id="method of a base class"),
        pytest.param("taskvec/base.py", "sides = 0", "sides = 1", COMBINE, id="a base's attribute"),
        pytest.param("taskvec/shapes.py", "sides = 4", "sides = 5", COMBINE, id="class attribute"),
        pytest.param("taskvec/shapes.py", "Square(Shape)", "Square", COMBINE, id="base class"),
        pytest.param("taskvec/shapes.py", "return 11", "return 0", COMBINE, id="decorated method"),
        pytest.param("taskvec/shapes.py", "return 12", "return 0", COMBINE, id="by getattr"),
        pytest.param("taskvec/shapes.py", "return 13", "return 0", COMBINE, id="dunder method"),
        pytest.param("taskvec/shapes.py", "@cache\n", "", COMBINE, id="decorator removed"),
        pytest.param(
            "taskvec/shapes.py", "return function", "return None", COMBINE, id="decorator changed"
        ),
        pytest.param(
            "taskvec/base.py", "return str(o)", "return repr(o)", COMBINE, id="called by a library"
        ),
        pytest.param(
            "taskvec/shapes.py", '"encoded"', '"else"', COMBINE, id="called by a library, deeper"
        ),
        pytest.param(
            "taskvec/shapes.py", 'append("square")', 'append("disc")', COMBINE, id="import effect"
        ),
        pytest.param(
            "taskvec/shapes.py",
            "SCALE = 3\n",
            "SCALE = 3\nfor kind in ('a', 'b'):\n    KINDS.append(kind)\n",
            COMBINE,
            id="loop at import",
        ),
        pytest.param(
            "taskvec/shapes.py",
            "    def forgotten",
            "    size = SCALE\n    def forgotten",
            COMBINE,
            id="class attribute added",
        ),
        pytest.param("tasks/combine.py", "import sqrt", "import cbrt", COMBINE, id="outside name"),
        pytest.param("tasks/combine.py", "from math", "from cmath", COMBINE, id="outside module"),
        pytest.param("taskvec/quantities.py", "2 * x", "x + x", SEARCH, id="import in a function"),
        pytest.param("taskvec/quantities.py", "3 * x", "x * 3", SEARCH, id="passed on, renamed"),
        pytest.param(
            "tasks/search.py",
            "double as twice, fourfold as more",
            "fourfold as twice, double as more",
            SEARCH,
            id="two imports swapped",
        ),
        pytest.param("taskvec/tools.py", "x + 21", "x - 21", SEARCH, id="attribute of a module"),
        pytest.param("taskvec/fast.py", "x / 2", "x / 3", SEARCH, id="import under try"),
        pytest.param("taskvec/slow.py", "x * 0.5", "x * 0.4", SEARCH, id="import under except"),
        pytest.param("taskvec/settings.py", "= 1", "= 2", SEARCH, id="imported for its effect"),
        pytest.param("taskvec/rooms/__init__.py", "'rooms'", "'x'", SEARCH, id="package's effect"),
        pytest.param("taskvec/rooms/shallow.py", "x + 5", "x + 6", SEARCH, id="relative import"),
        pytest.param("taskvec/__init__.py", '"""\n', '"""\nprint()\n', BOTH, id="root package"),
    ],
)
def test_a_change_of_reached_code_changes_exactly_the_stages_that_reach_it(
    tmp_path: Path, name: str, old: str, new: str, stages: set[str]
) -> None:
    assert changed_by(package(tmp_path), name, old, new) == stages


def test_the_order_of_definitions_does_not_matter(tmp_path: Path) -> None:
    before = digests(package(tmp_path))
    for name in ("taskvec/quantities.py", "taskvec/tools.py", "taskvec/base.py"):
        tree = ast.parse((tmp_path / name).read_text())
        tree.body.reverse()
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "Shape":
                node.body.append(node.body.pop(2))  # a method behind the others
        (tmp_path / name).write_text(ast.unparse(tree))
    assert digests(tmp_path) == before


def test_the_order_of_two_definitions_of_one_name_matters(tmp_path: Path) -> None:
    both = "WEIGHT = 7\nWEIGHT = 8\n"
    (package(tmp_path) / "taskvec/shapes.py").write_text(
        textwrap.dedent(FILES["taskvec/shapes.py"]).replace("WEIGHT = 7\n", both)
    )
    assert changed_by(tmp_path, "taskvec/shapes.py", both, "WEIGHT = 8\nWEIGHT = 7\n") == COMBINE


def test_the_order_of_import_effects_matters(tmp_path: Path) -> None:
    old = 'KINDS.append("square")\n'
    more = f'{old}KINDS.append("disc")\n'
    assert changed_by(package(tmp_path), "taskvec/shapes.py", old, more) == COMBINE
    swapped = f'KINDS.append("disc")\n{old}'
    assert changed_by(tmp_path, "taskvec/shapes.py", more, swapped) == COMBINE


def test_a_new_module_that_nothing_imports_changes_nothing(tmp_path: Path) -> None:
    before = digests(package(tmp_path))
    (tmp_path / "taskvec/novel.py").write_text("X = []\nX.append(1)\ndef double(x): return x\n")
    assert digests(tmp_path) == before


def test_a_file_that_replaces_a_library_of_the_same_name_is_not_mistaken_for_it(
    tmp_path: Path,
) -> None:
    before = digests(package(tmp_path))
    (tmp_path / "math.py").write_text("def sqrt(x): return 0\n")
    assert digests(tmp_path) == before


def test_an_unknown_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"no module taskvec\.nowhere below"):
        Code(ROOT).fingerprint(["taskvec.nowhere"])


# The real code


@pytest.fixture
def real(tmp_path: Path) -> Path:
    for room in ("taskvec", "tasks"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, tmp_path / room, ignore=ignore)
    return tmp_path


def real_digests(root: Path) -> dict[str, Any]:
    """Return code.yaml's digests for the code below a directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SOURCES", root)
        return plan.code_fingerprints(params.load(ROOT / "params.yaml"))


def stages_changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {stage for stage in plan.NAMES if before[stage] != after[stage]}


def test_all_stages_are_fingerprinted_in_less_than_a_second_and_a_half() -> None:
    # in a process of its own, since measuring coverage more than doubles it
    code = (
        "import time; from tests.test_fingerprints import ROOT, real_digests\n"
        "began = time.process_time(); real_digests(ROOT); print(time.process_time() - began)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.5


def test_a_new_merging_method_a_new_method_and_words_rerun_nothing(real: Path) -> None:
    before = real_digests(real)
    (real / "taskvec/merging/novel.py").write_text("def novel(x):\n    return x\n")
    vectors = real / "taskvec/vectors.py"
    text = vectors.read_text().replace("Return the inner product", "Return the scalar product")
    text = text.replace("    def dot(", "    def half(self):\n        return 0.5\n\n    def dot(")
    vectors.write_text(text.replace("import torch\n", "import torch  # tensors\n"))
    assert stages_changed(before, real_digests(real)) == set()


@pytest.mark.parametrize(
    ("name", "old", "new", "stages"),
    [
        ("taskvec/merging/task_arithmetic.py", "total(", "sum(", set()),
        (
            "taskvec/streaming.py",
            "needed * 1.01",
            "needed * 1.02",
            {"extract", "combine", "search"},
        ),
        ("tasks/extract.py", "def extract(", "X = 1\n\n\ndef extract(", set()),
        ("taskvec/numeric.py", "set_num_threads(1)", "set_num_threads(2)", set(plan.NAMES)),
        (
            "taskvec/headers.py",
            "digest = hashlib.sha256()",
            "digest = hashlib.md5()",
            set(plan.NAMES),
        ),
    ],
)
def test_a_change_of_the_real_code_reruns_exactly_the_stages_that_reach_it(
    real: Path, name: str, old: str, new: str, stages: set[str]
) -> None:
    before = real_digests(real)
    text = (real / name).read_text()
    assert old in text
    (real / name).write_text(text.replace(old, new, 1))
    assert stages_changed(before, real_digests(real)) == stages


def test_a_merging_method_concerns_the_edits_that_use_it_alone(real: Path) -> None:
    raw = params.plain(params.read(ROOT / "params.yaml"))
    edits = raw["edits"]
    edits["addition"]["expression"] = "c * ties(mnist, digits + textures, dare(faces))"
    edits["only_mnist"]["expression"] = "c * dare(mnist, p=[0.1, 0.9])"
    edits["plain_sum"]["expression"] = "c * slerp(digits, mnist_inverted)"

    def combine() -> dict[str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "SOURCES", real)
            digests: dict[str, str] = plan.code_fingerprints(params.validate(raw))["combine"]
        return digests

    before = combine()
    for name, old, new, changed in (
        ("ties", "agree = values > 0", "agree = values >= 0", {"addition"}),
        ("dare", "return total(sparse", "return sum(sparse", {"addition", "only_mnist"}),
        ("dare", "p: Share = 0.5", "p: Share = 0.25", {"addition", "only_mnist"}),
        ("magnitude", "def trim(", "def trim(_: int, ", {"addition"}),
        ("slerp", "PARALLEL = 0.9995", "PARALLEL = 0.9", {"plain_sum"}),
        ("slerp", "ORDERED = True", "ORDERED = False", {"plain_sum"}),
        ("magmax", "def magmax(", "def magmax(_: int, ", set()),
    ):
        path = real / f"taskvec/merging/{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        after = combine()
        assert {edit for edit in before if after[edit] != before[edit]} == changed, (name, old)
        path.write_text(text)


def test_a_data_adapter_concerns_its_own_tasks_alone(real: Path) -> None:
    before = real_digests(real)
    path = real / "taskvec/datasets/digits.py"
    path.write_text(path.read_text().replace("255 - images", "254 - images"))
    after = real_digests(real)
    assert stages_changed(before, after) == {"prepare"}
    changed = {
        task for task, digest in after["prepare"].items() if digest != before["prepare"][task]
    }
    assert changed == {"digits", "digits_inverted"}


def test_every_function_that_a_stage_calls_is_in_its_fingerprint(
    real: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Run all stages, see which functions they call, and change a sample of those."""
    called = calls_of_stages(tmp_path_factory.mktemp("experiment"))
    assert {stage for stage, *_ in called} == set(plan.NAMES)
    assert len(called) > 150
    code = Code(real)
    before = {stage: stage_digest(code, stage) for stage in plan.NAMES}
    missed = [
        f"{stage} calls {name}:{line} {function}"
        for stage, name, line, function in random.sample(called, SAMPLE)
        if digest_with_change(real, stage, name, line) == before[stage]
    ]
    assert not missed, "\n".join(missed)


def digest_with_change(root: Path, stage: str, name: str, line: int) -> str:
    """Return a stage's fingerprint with one more statement in the function at a line."""
    path = root / name
    text = path.read_text()
    last = next(
        node.body[-1]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and line in (node.lineno, *(decorator.lineno for decorator in node.decorator_list))
    )
    lines = text.splitlines(keepends=True)
    lines.insert(last.lineno - 1, " " * last.col_offset + "_changed = 1\n")
    path.write_text("".join(lines))
    digest = stage_digest(Code(root), stage)
    path.write_text(text)
    return digest


def stage_digest(code: Code, stage: str) -> str:
    roots = [f"tasks.{stage}:{stage}", plan.ARITHMETIC]
    if stage == "prepare":
        roots.append("taskvec.datasets.digits")
    elif stage not in ("extract", "combine", "report"):
        roots.append("taskvec.models.bundled")
    if stage == "search":
        roots.append("taskvec.strategies.grid")
    return code.fingerprint(roots)


def calls_of_stages(root: Path) -> list[tuple[str, str, int, str]]:
    """Return (stage, file, line, function) of all calls, from a process that runs all stages."""
    text = EXPERIMENT + STUDY
    committed = params.plain(params.read(ROOT / "params.yaml"))["tasks"]
    for task in ("digits", "faces"):
        text = text.replace(f"SOURCE_{task.upper()}", json.dumps(committed[task]["data"]["source"]))
    (root / "params.yaml").write_text(text)
    shutil.copy(ROOT / "dvc.yaml", root / "dvc.yaml")
    (root / "tasks").mkdir()
    shutil.copy(ROOT / "tasks/report.html.jinja", root / "tasks")
    plan.write(root, params.load(root / "params.yaml"))
    code = "from tests.test_fingerprints import print_calls; print_calls()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(stage, name, line, word) for stage, name, line, word in json.loads(done.stdout)]


def print_calls() -> None:
    """Run all stages in the working directory and print what they call."""
    import importlib

    from tasks.artifacts import Artifacts
    from tasks.stages import arguments
    from taskvec.numeric import make_deterministic

    importlib.import_module("flows.warm")  # outside of the trace, which is slow
    importlib.import_module("taskvec.models.bundled")
    calls: dict[tuple[str, str, int, str], None] = {}
    stage = ""
    own = tuple(f"{ROOT / room}{os.sep}" for room in ("taskvec", "tasks"))

    def note(frame: Any, event: str, argument: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(own) and not code.co_name.startswith("<"):
            calls[stage, code.co_filename, code.co_firstlineno, code.co_name] = None

    make_deterministic()
    loaded = params.load(Path("params.yaml"))
    for stage, item in work():
        keywords = arguments(stage, item, loaded)
        function = getattr(importlib.import_module(f"tasks.{stage}"), stage)
        # The second item of a stage calls what the first one did.
        sys.settrace(note if "faces" not in item and "both" not in item else None)
        function(Artifacts(Path()), emit=lambda progress: None, **keywords)
        sys.settrace(None)
    found = [(s, f, line, w) for s, f, line, w in calls if Path(f).suffix == ".py"]
    relative = [(s, os.path.relpath(f, ROOT), line, w) for s, f, line, w in found]
    sys.stdout.write(json.dumps(sorted(relative)))


def work() -> list[tuple[str, str]]:
    """Return all stages of the tiny experiment in an order in which they can run."""
    tasks, edits = ("digits", "faces"), ("both", "forget")
    seeded = ("fine_tune", "extract", "evaluate")
    return [
        *(("prepare", task) for task in tasks),
        ("pretrain", ""),
        *(("head", task) for task in tasks),
        *((stage, f"{name}-0") for stage in seeded for name in (*tasks, "together", "ascent")),
        *((stage, f"{edit}-0") for stage in ("combine", "search", "evaluate") for edit in edits),
        ("sweep", "pair-0"),
        ("few_shot", "few-0"),
        ("report", "page"),
    ]
