"""Files of mergekit: the same results as mergekit, round trips, and refusals with reasons.

tests/golden/mergekit.json holds what mergekit 0.1.5 made of small float32 models; see
tests/make_mergekit_golden.py.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taskvec import edits, expressions, headers, lazy, mergekit, streaming
from taskvec.errors import IncompatibleWeights, InvalidExpression, InvalidInput, MissingArtifact
from taskvec.mapped import open_weights
from taskvec.mergekit_recipe import labels

STORED = json.loads((Path(__file__).parent / "golden" / "mergekit.json").read_text())
CASES: dict[str, dict[str, Any]] = STORED["cases"]
TOLERANCE = 5e-8  # absolute; the weights are about 0.1, where float32 has steps of 7e-9
INTEGERS = "positions"

Tensors = dict[str, np.ndarray[Any, Any]]


def stored(model: Mapping[str, list[float]]) -> Tensors:
    return {
        name: np.array(numbers, np.int64 if name == INTEGERS else np.float32).reshape(
            STORED["shapes"][name]
        )
        for name, numbers in model.items()
    }


MODELS = {name: stored(model) for name, model in STORED["models"].items()}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with base, a, b and c; nothing may be written into it but new files."""
    directory = tmp_path_factory.mktemp("mergekit")
    for name, tensors in MODELS.items():
        save_file(tensors, directory / f"{name}.safetensors")
    return directory


def written(directory: Path, text: str, name: str = "config.yaml") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def read(directory: Path, text: str) -> mergekit.Recipe:
    return mergekit.read(written(directory, text))


def merged(config: Path, out: Path, **options: Any) -> tuple[Tensors, list[str]]:
    warnings: list[str] = []
    mergekit.merge(config, out, warn=warnings.append, **options)
    return load_file(out), warnings


def file(
    method: str = "ties", models: str = "a: {weight: 1}; b: {weight: 1}", rest: str = ""
) -> str:
    """Return a file with models such as ``a: {weight: 1}; b``."""
    entries = []
    for entry in models.split("; "):
        name, _, parameters = entry.partition(": ")
        text = f"    parameters: {parameters}\n" if parameters else ""
        entries.append(f"  - model: {name}.safetensors\n{text}")
    base = "base_model: base.safetensors\n"
    return f"merge_method: {method}\n{base}models:\n{''.join(entries)}{rest}"


# --- the same results as mergekit


def lost(case: str, name: str) -> bool:
    """Whether mergekit loses a tensor because fewer than one of its elements is to be kept."""
    return case.startswith("breadcrumbs") and name == "logit_scale"


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_what_mergekit_gives(case: str, room: Path, tmp_path: Path) -> None:
    config = written(room, CASES[case]["file"], f"{case}.yaml")
    found, _ = merged(config, tmp_path / "out.safetensors")
    assert found.keys() == MODELS["base"].keys()
    for name, expected in stored(CASES[case]["result"]).items():
        assert found[name].dtype == expected.dtype
        assert found[name].shape == expected.shape
        if not lost(case, name):
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("case", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_keep_one_element_where_mergekit_loses_the_tensor(
    case: str, room: Path, tmp_path: Path
) -> None:
    config = written(room, CASES[case]["file"], f"{case}.yaml")
    found, warnings = merged(config, tmp_path / "out.safetensors")
    base = MODELS["base"]["logit_scale"]
    assert stored(CASES[case]["result"])["logit_scale"] == base
    assert abs(found["logit_scale"] - base) > 0.01
    assert any("mergekit drops the whole change" in warning for warning in warnings)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_canonical_and_comes_back_when_it_is_written(
    case: str, room: Path, tmp_path: Path
) -> None:
    recipe = mergekit.read(written(room, CASES[case]["file"], f"{case}.yaml"))
    assert str(expressions.parse(recipe.expression, recipe.vectors, ())) == recipe.expression
    text = mergekit.write(recipe.expression, recipe.vectors, recipe.base)
    again = mergekit.read(written(room, text, f"{case} again.yaml"))
    assert (again.expression, again.vectors, again.base) == (
        recipe.expression,
        recipe.vectors,
        recipe.base,
    )
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for name, path in zip((f"{case}.yaml", f"{case} again.yaml"), paths, strict=True):
        merged(room / name, path)
    one, two = map(load_file, paths)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_file_as_in_the_readme_of_mergekit_is_read(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        """\
# TIES of two fine-tuned models
models:
  - model: ./mistral-7b        # the base needs no parameters
    # no parameters necessary for base model
  - model: zoo/OpenHermes-2.5-Mistral-7B
    parameters:
      density: 0.5             # fraction of the weights to keep
      weight: 0.5
  - model: zoo/dolphin-2.2.1-mistral-7b
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: ./mistral-7b
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    )
    hermes, dolphin = "OpenHermes_2_5_Mistral_7B", "dolphin_2_2_1_mistral_7b"
    assert recipe.expression == (
        f'ties(0.3 * {dolphin}, 0.5 * {hermes}, density=0.5, scope="tensor", variant="normalized")'
    )
    assert recipe.vectors == {
        hermes: Path("zoo/OpenHermes-2.5-Mistral-7B"),
        dolphin: Path("zoo/dolphin-2.2.1-mistral-7b"),
    }
    assert (recipe.base, recipe.dtype) == (Path("mistral-7b"), "F16")
    assert recipe.warnings == (
        "parameters.int8_mask has no effect on the result of ties; ignored",
        "mergekit computes in float16; here everything is computed in float32 and rounded once",
    )


# --- random masks


@pytest.mark.parametrize(
    ("method", "warning"), [("dare_linear", "its masks anew"), ("della_linear", "the second axis")]
)
def test_random_masks_keep_the_share_and_the_sum_of_magnitudes(
    method: str, warning: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    base = {"w": random.normal(0, 1, (40, 250)).astype(np.float32)}
    tuned = {"w": base["w"] + random.normal(0, 1, (40, 250)).astype(np.float32)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "a.safetensors")
    text = file(method, "a: {weight: 1, density: 0.4}")
    found, warnings = merged(written(tmp_path, text), tmp_path / "out.safetensors")
    assert len(warnings) == 1
    assert warning in warnings[0]
    before, after = tuned["w"] - base["w"], found["w"] - base["w"]
    assert abs((after != 0).mean() - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 10_000)
    np.testing.assert_allclose(np.abs(after).sum(), np.abs(before).sum(), rtol=1e-4)
    assert read(tmp_path, text + "parameters: {rescale: false}\n").expression.count('"none"') == 1


def test_random_masks_stand_inside_an_election_of_signs(room: Path) -> None:
    models = "a: {weight: 0.7, density: 0.9}; b: {weight: 0.2}"
    dare = read(room, file("dare_ties", models)).expression
    assert dare == (
        'ties(0.2 * b, 0.7 * dare(a, p=0.1, rescale="l1", seed=0), '
        'density=1.0, scope="flat", variant="sum")'
    )
    della = read(room, file("della", models, "parameters: {epsilon: 0.05}\n")).expression
    assert della == (
        'ties(0.2 * b, 0.7 * della(a, density=0.9, epsilon=0.05, rescale="l1", seed=0), '
        'density=1.0, scope="flat", variant="normalized")'
    )


# --- what a file may look like


WEIGHTS = [
    ("a: {weight: '0.5'}", "0.5 * a"),
    ("a: {weight: 5e-1}", "0.5 * a"),
    ("a: {weight: [0.5]}", "0.5 * a"),
    ("a: {weight: [0.5, 0.5]}", "0.5 * a"),
    ("a: {weight: {value: 0.5}}", "0.5 * a"),
    ("a: {weight: [{value: 0.5}]}", "0.5 * a"),
    ('a: {weight: [{filter: mlp, value: 0.5}, {filter: "*", value: 0.5}]}', "0.5 * a"),
    ("a: {weight: [{filter: null, value: [0.5]}, {filter: never, value: 2}]}", "0.5 * a"),
    ("a: {weight: 0.5}; b: {weight: 0}", "0.5 * a"),
    ("a: {weight: -1}", "-a"),
]


@pytest.mark.parametrize(("models", "expression"), WEIGHTS)
def test_a_weight_may_be_written_in_many_ways(models: str, expression: str, room: Path) -> None:
    assert read(room, file("task_arithmetic", models)).expression == expression


@pytest.mark.parametrize("word", ["yes", "on", "true", "True", "1", "'true'", "[true, true]"])
def test_truth_may_be_written_in_many_ways(word: str, room: Path) -> None:
    rest = f"parameters: {{normalize: {word}}}\n"
    text = file("task_arithmetic", "a: {weight: 2}; b: {weight: 2}", rest)
    assert read(room, text).expression == "average(a, b)"


def test_a_parameter_of_a_model_wins_over_the_file(room: Path) -> None:
    text = file("task_arithmetic", "a: {weight: 0.5}; b", "parameters: {weight: 0.25}\n")
    assert read(room, text).expression == "0.5 * a + 0.25 * b"


def test_empty_keys_are_as_if_they_were_missing(room: Path) -> None:
    rest = "parameters:\ndtype:\ntokenizer:\nslices:\n"
    assert read(room, file("task_arithmetic", "a: {weight: 1}", rest)).expression == "a"


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ("", None),
        ("dtype: float32\n", "F32"),
        ("dtype: torch.bfloat16\n", "BF16"),
        ("dtype: float32\nout_dtype: bfloat16\n", "BF16"),
        ("out_dtype: float16\n", "F16"),
    ],
)
def test_the_dtype_is_that_of_the_output(keys: str, dtype: str | None, room: Path) -> None:
    assert read(room, file("task_arithmetic", "a: {weight: 1}", keys)).dtype == dtype


def test_one_slice_over_all_layers_is_a_merge_of_whole_models(room: Path) -> None:
    recipe = read(
        room,
        """\
slices:
  - sources:
      - {model: base.safetensors, layer_range: [0, 2]}
      - {model: a.safetensors, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: b.safetensors, layer_range: [0, 2]}
    base_model: base.safetensors
    parameters: {weight: 0.25, lambda: 2}
merge_method: task_arithmetic
parameters: {weight: 7, lambda: 3, normalize: false}
""",
    )
    assert (recipe.expression, recipe.base) == ("a + 0.5 * b", Path("base.safetensors"))


def test_a_path_may_be_given_as_in_the_files_that_mergekit_writes(room: Path) -> None:
    path = "{model: {path: 'c+d@e.safetensors'}}"
    recipe = read(room, file("task_arithmetic", "a: {weight: 1}").replace("a.safetensors", path))
    assert recipe.vectors == {"c_d_e": Path("c+d@e.safetensors")}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a.safetensors", "b.pt"], ["a", "b"]),
        (["x/mnist/model.safetensors", "x/digits/model.safetensors"], ["mnist", "digits"]),
        (["x/mnist/model.safetensors.index.json"], ["mnist"]),
        (["x/mnist/finetuned.safetensors", "x/digits/finetuned.safetensors"],
         ["mnist_finetuned", "digits_finetuned"]),
        (["1/x/a", "2/x/a", "3/y/a"], ["x_a", "x_a_2", "y_a"]),
        (["x/a", "y/a", "x_a"], ["x_a_2", "y_a", "x_a"]),
        (["x-a/b", "x_a/b", "x_a_b_2"], ["x_a_b", "x_a_b_3", "x_a_b_2"]),
        (["Mistral-7B-v0.1", "7b"], ["Mistral_7B_v0_1", "model_7b"]),
        ([".", "ü.bin"], ["model", "model_2"]),
        (["m" * 80, "model.safetensors"], ["m" * 64, "model"]),
    ],
)  # fmt: skip
def test_names_come_from_paths(paths: list[str], names: list[str]) -> None:
    assert [labels(paths)[path] for path in paths] == names
    assert labels(reversed(paths)) == labels(paths)


# --- refusals


ONE = "a: {weight: 1}"


def stack(layers: str, method: str = "linear") -> str:
    other = "{model: b, layer_range: [0, 2]}"
    return (
        f"merge_method: {method}\n"
        f"slices: [{{sources: [{{model: a, layer_range: {layers}}}, {other}]}}]\n"
    )


REFUSALS = [
    ("[1]", "the file: found [1]; expected merge_method"),
    ("a: b\n", "a: unknown key; known: base_model"),
    (file("nuslerp"), "merge_method: found 'nuslerp': it has weights"),
    (file("passthrough"), "merge_method: found 'passthrough': it stacks layers"),
    (file("sce"), "this method has no counterpart here; known: breadcrumbs, breadcrumbs_ties"),
    ("models: [{model: a}]\n", "merge_method: missing; known: breadcrumbs"),
    (file("[ties]"), "merge_method: found ['ties']"),
    ("merge_method: ties\n", "models: expected either models or slices"),
    ("merge_method: ties\nmodels: 3\n", "models: found 3; expected a list"),
    ("merge_method: ties\nmodels: []\n", "models: found []; expected a list"),
    ("merge_method: ties\nmodels: [a]\n", "models[0]: found 'a'; expected model, parameters"),
    ("merge_method: ties\nmodels: [{model: }]\n", "models[0].model: missing"),
    ("merge_method: ties\nmodels: [{model: 7}]\n", "models[0].model: found 7; expected the path"),
    ("merge_method: ties\nmodels: [{model: {model: {path: [1]}}}]\n", "expected the path"),
    ("merge_method: ties\nmodels: [{model: {model: {path: a, revision: b}}}]\n",
     "models[0].model.model.revision: unknown key"),
    ("merge_method: ties\nmodels: [{model: a+b}]\n", "where + stands for a LoRA adapter"),
    ("merge_method: ties\nmodels: [{model: a@main}]\n", "where @ stands for a revision"),
    ("merge_method: ties\nmodels: [{model: a, parameters: [1]}]\n",
     "models[0].parameters: found [1]; expected names and values"),
    ("merge_method: ties\nmodels: [{model: a}, {model: a}]\n", "models[1].model: 'a' stands twice"),
    ("merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]\n", "base_model: missing"),
    (file("ties", "base"), "models: found the base alone"),
    (file("ties", "a"), "models[0].parameters.weight: missing; give a number here or at the top"),
    (file("linear", "a: {weight: 1}"), "parameters.weight: missing"),
    (file("slerp", ONE), "parameters.t: missing"),
    (file("ties", "a: {weight: true}"), "weight: found True; expected a number"),
    (file("ties", "a: {weight: .nan}"), "found nan; expected a number"),
    (file("ties", "a: {weight: heavy}"), "found 'heavy'; expected a number"),
    (file("ties", "a: {weight: }"), "found None; expected a number, or true or false"),
    (file("ties", "a: {weight: []}"), "found []; expected a number"),
    (file("ties", "a: {weight: [0, 1]}"), "found [0, 1], a gradient over the layers"),
    (file("ties", "a: {weight: [{filter: mlp, value: 1}]}"),
     "models[0].parameters.weight: filters that leave tensors out; give one value"),
    (file("ties", "a: {weight: [{filter: mlp, value: 1}, {value: 2}]}"), "found [1, 2] by filters"),
    (file("ties", "a: {weight: [{value: 1, t: 2}]}"), "weight[0].t: unknown key"),
    (file("ties", "a: {weight: [{filter: mlp}]}"), "weight[0].value: found None"),
    (file("ties", "a: {wieght: 1}"), "wieght: unknown parameter; did you mean 'weight'"),
    (file("ties", "a: {weight: 1, density: 1.5}"), "found 1.5; expected a fraction from 0 to 1"),
    (file("ties", "a: {weight: 0}"), "nothing is left to merge"),
    (file("ties", "a: {weight: 1, density: 0}"), "nothing is left to merge"),
    (file("ties", ONE, "parameters: {lambda: 0}\n"), "nothing is left to merge"),
    (file("linear", "a: {weight: 0}; base: {weight: 0}", "parameters: {normalize: false}\n"),
     "models: all weights are 0"),
    (file("linear", "a: {weight: 1}; base: {weight: -1}"),
     "parameters.normalize: the weights add up to 0"),
    (file("ties", "a: {weight: -1}; b: {weight: 1}"), "found negative weights"),
    (file("ties", ONE, "parameters: {normalize: maybe}\n"), "found 'maybe'; expected true"),
    (file("ties", ONE, "parameters: {density: 0.5, rescale: true}\n"),
     "parameters.rescale: found true; magnitude does not rescale here"),
    (file("breadcrumbs", ONE, "parameters: {density: 0.5, gamma: 1}\n"), "at least 0 and below 1"),
    (file("della", ONE, "parameters: {density: 0.9}\n"),
     "epsilon: found 0.15; expected 0 or more, with 0.9 - epsilon above 0 and 0.9 + epsilon below"),
    (file("task_arithmetic", "a: {weight: 1e308}", "parameters: {lambda: 1e308}\n"),
     "models: the factors [inf] are no floats"),
    (file("slerp", "a; b", "parameters: {t: 0.5}\n"), "models: found 2 beside the base"),
    (file("slerp", "a", "parameters: {t: 1.5}\n"), "parameters.t: found 1.5; expected a"),
    (file("slerp", "a", "parameters: {t: [0, 1]}\n"), "a gradient over the layers"),
    (file("model_stock", "a"), "model_stock takes two or more"),
    (file("model_stock", "a; b", "parameters: {filter_wise: true}\n"), "parameters.filter_wise"),
    (file("ties", ONE, "dtype: float64\n"), "dtype: found 'float64'; expected float32, float16"),
    (file("ties", ONE, "out_dtype: 16\n"), "out_dtype: found 16"),
    (file("ties", ONE, "tokenizer_source: union\n"), "tokenizer_source: vocabularies are not"),
    (file("ties", ONE, "tokenizer: {source: base}\n"), "tokenizer: vocabularies are not aligned"),
    (file("ties", ONE, "modules: {text: {}}\n"), "modules: the parts of a model"),
    (file("ties", ONE, "slices: [{sources: []}]\n"), "models: expected either models or slices"),
    ("merge_method: linear\nslices: [{}, {}]\n", "slices: found 2; expected one"),
    ("merge_method: linear\nslices: [{}]\n", "slices[0].sources: found None; expected a list"),
    ("merge_method: linear\nslices: [{sources: [{model: a}]}]\n",
     "slices[0].sources[0].layer_range: missing"),
    (stack("[0, 3]"), "found ranges to [3, 2]; expected the same"),
    (stack("[1, 2]"), "layer_range: found [1, 2]; expected [0,"),
    (stack("[0, 0]"), "layer_range: found [0, 0]"),
    (stack("[0, true]"), "layer_range: found [0, True]"),
    (stack("2"), "layer_range: found 2"),
    ("base_model: c\n" + stack("[0, 2]", "ties"), "'c' is not among the sources"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSALS)
def test_what_has_no_single_meaning_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'config.yaml'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"models: [", "config.yaml:1: "),
        (b"a: 1\na: 2\n", "config.yaml:2: found duplicate key"),
        (b"a: !!python/object:os.system {}\n", "config.yaml:1: could not determine a constructor"),
        (b"--- 1\n--- 2\n", "config.yaml:2: but found another document"),
        (b"a: \xff\n", "config.yaml is no YAML: 'utf-8' codec"),
        (b"a: \x00\n", "config.yaml is no YAML: "),
        (b"[" * 2_000, "config.yaml is no YAML: maximum recursion"),
        (b"#" * 70_000, "config.yaml has 70000 bytes; at most 65536"),
    ],
)
def test_what_is_no_yaml_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        mergekit.read(tmp_path / "config.yaml")
    assert message in str(caught.value)


def test_a_value_that_grows_without_end_is_cut_short(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    with pytest.raises(InvalidInput, match="unknown key") as caught:
        read(tmp_path, bomb + "merge_method: *a29\n")
    assert len(str(caught.value)) < 500


def test_a_file_that_is_missing_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match="nothing.yaml cannot be read: No such file"):
        mergekit.read(tmp_path / "nothing.yaml")


# --- warnings


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (file("ties", ONE, "chat_template: auto\n"), "chat_template: no weight depends on it"),
        (file("ties", ONE, "parameters: {int8_mask: true}\n"),
         "parameters.int8_mask has no effect on the result of ties; ignored"),
        (file("task_arithmetic", "a: {weight: 1, density: 0.5}"),
         "models[0].parameters.density has no effect on the result of task_arithmetic; ignored"),
        (file("ties", "a: {weight: 1, lambda: 2}"),
         "models[0].parameters.lambda: mergekit reads it at the top alone; ignored"),
        (file("ties", "base: {weight: 1}; a: {weight: 1}"),
         "models[0].parameters: the base has none in ties; ignored"),
        (file("slerp", "base: {t: 0.1}; a", "parameters: {t: 0.5}\n"),
         "models[0].parameters.t: mergekit reads it at the top alone; ignored"),
        (file("ties", ONE, "dtype: bfloat16\n"), "mergekit computes in bfloat16; here everything"),
        (file("dare_ties", "a: {weight: 1, density: 0.5}"), "mergekit draws its masks anew"),
        (file("model_stock", "a; b"), "nearly orthogonal"),
        (file("breadcrumbs", "a: {weight: 1, density: 0.5}"), "fewer than 1 / density elements"),
    ],
)  # fmt: skip
def test_what_is_ignored_or_differs_is_said(text: str, warning: str, room: Path) -> None:
    assert sum(warning in found for found in read(room, text).warnings) == 1


@pytest.mark.parametrize("method", ["dare_linear", "della", "breadcrumbs_ties", "ties"])
def test_nothing_is_said_where_nothing_differs(method: str, room: Path) -> None:
    assert read(room, file(method, "a: {weight: 1}")).warnings == ()


# --- expressions written


def exported(expression: str, base: str | None = "base") -> str:
    vectors = {name: Path(f"models/{name}") for name in ("a", "b", "c")}
    return mergekit.write(expression, vectors, base and Path(f"models/{base}"))


def test_a_file_is_written_in_the_manner_of_mergekit() -> None:
    text = exported('0.4 * ties(0.3 * a, 0.5 * b, scope="tensor", variant="normalized")')
    assert text == (
        """\
merge_method: ties
base_model: models/base
models:
  - model: models/a
    parameters:
      weight: 0.3
      density: 0.2
  - model: models/b
    parameters:
      weight: 0.5
      density: 0.2
parameters:
  normalize: true
  lambda: 0.4
"""
    )


CANONICAL = [
    "a",
    "-a",
    "1e-07 * a - 3 * b + 0.5 * c",
    "average(a, b, c)",
    "-0.5 * average(a, b)",
    "model_stock(a, b)",
    'ties(a, b, density=0.2, scope="tensor", variant="mean")',
    '0.3 * ties(-2 * a, b, density=0.2, scope="tensor", variant="sum")',
    'ties(0.5 * a, b, density=1.0, scope="flat", variant="normalized")',
    'ties(0.5 * magnitude(a, density=0.2, scope="tensor"), b, c, '
    'density=1.0, scope="flat", variant="normalized")',
    'dare(a, p=0.9, rescale="l1", seed=0)',
    '2 * b - 0.3 * dare(a, p=0.1, rescale="none", seed=0)',
    'ties(b, dare(a, p=0.5, rescale="l1", seed=0), density=1.0, scope="flat", variant="mean")',
    '0.3 * della(a, density=0.5, epsilon=0.1, rescale="l1", seed=0)',
    '2 * ties(della(a, density=0.5, epsilon=0.1, rescale="none", seed=0), '
    'density=1.0, scope="flat", variant="sum")',
    '0.5 * b + 0.3 * breadcrumbs(a, density=0.2, gamma=0.01, scope="tensor")',
    'ties(0.3 * breadcrumbs(a, density=0.2, gamma=0.0, scope="tensor"), c, '
    'density=1.0, scope="flat", variant="normalized")',
]
WHOLE = ["a", "0.25 * a + 0.75 * b", "average(a, b, c)", "slerp(b, a, t=0.25)"]


@pytest.mark.parametrize(
    ("expression", "base"), [(e, "base") for e in CANONICAL] + [(e, None) for e in WHOLE]
)
def test_what_is_written_comes_back(expression: str, base: str | None, tmp_path: Path) -> None:
    recipe = read(tmp_path, exported(expression, base))
    assert recipe.expression == expression
    assert recipe.base == (base and Path("models/base"))
    assert recipe.vectors == {name: Path(f"models/{name}") for name in recipe.vectors}


@pytest.mark.parametrize(
    ("expression", "same"),
    [
        ("a + b - b", "a"),
        ("average(0.5 * a, b) + c", "0.25 * a + 0.5 * b + c"),
        ("0.5 * task_arithmetic(a, 2 * b)", "0.5 * a + b"),
        ("average(average(a, b), c)", "0.25 * a + 0.25 * b + 0.5 * c"),
        ("average(a)", "a"),
        ("ties(0.5 * a, 0.5 * b, density=1)",
         '0.5 * ties(a, b, density=1.0, scope="flat", variant="mean")'),
        ('ties(a, b, density=1, scope="tensor")',
         'ties(a, b, density=1.0, scope="flat", variant="mean")'),
        ('ties(a, b, scope="tensor", variant="normalized")',
         'ties(a, b, density=0.2, scope="tensor", variant="mean")'),
        ('dare(a, p=0, rescale="l1") + b', "a + b"),
        ('0.5 * dare(a, b, p=0.5, rescale="l1")',
         '0.5 * dare(a, p=0.5, rescale="l1", seed=0) + 0.5 * dare(b, p=0.5, rescale="l1", seed=0)'),
        ('ties(magnitude(a, scope="tensor"), magnitude(b, scope="tensor"), density=1)',
         'ties(a, b, density=0.2, scope="tensor", variant="mean")'),
        ("ties(magnitude(a, density=1), density=1)",
         'ties(a, density=1.0, scope="flat", variant="mean")'),
    ],
)  # fmt: skip
def test_other_forms_come_back_with_the_same_result(
    expression: str, same: str, tmp_path: Path, room: Path
) -> None:
    found = read(tmp_path, exported(expression)).expression
    assert found == same
    deltas = {
        name: lazy.Held({"w": (np.arange(12) - 5.5).astype(np.float32) ** power})
        for name, power in (("a", 1), ("b", 2), ("c", 3))
    }
    one, two = (_values(text, deltas) for text in (expression, found))
    np.testing.assert_allclose(one, two, rtol=1e-6)


def _values(expression: str, vectors: Mapping[str, lazy.Lazy]) -> Any:
    merged = edits.at(expressions.parse(expression, vectors, ()), {}, vectors)
    assert merged is not None
    return lazy.materialize(merged)["w"]


UNWRITTEN = [
    ("a - a", "everything cancels"),
    ("average(a, b) - 0.5 * a - 0.5 * b", "nothing is left to merge"),
    ("c * d", "'d' is neither a task nor a coefficient"),
    ('ties(a, b, density=[0.1, 0.2], scope="tensor")', "ties.density is a list"),
    ("ties(a, b)", 'compares the elements of each tensor; write scope="tensor"'),
    ("ties(a + b, c, density=1)", "elects between vectors, not sums"),
    ('ties(dare(a, b, rescale="l1"), c, density=1)', "elects between vectors, not sums"),
    ('ties(dare(a, rescale="l1"), scope="tensor")', "thins out once; give ties density=1"),
    ("ties(a, 2 * b, density=1)", "divides by the weights that agree"),
    ('ties(-a, 2 * b, density=1, variant="normalized")', "with their signs"),
    ("ties(a, dare(a, rescale=\"l1\"), density=1)", "mergekit takes a once"),
    ("a + ties(b, c, density=1)", "cannot do this, or not in one file"),
    ("slerp(a, b)", "cannot do this"),
    ("average(ties(a, b))", "cannot do this"),
    ('dare(a, rescale="l1") + dare(b, rescale="none")', "one method with one rescale"),
    ('dare(a, rescale="l1") + della(b, rescale="l1")', "one method with one rescale"),
    ("dare(a)", 'write rescale="l1" or "none"'),
    ('dare(a, rescale="l1", seed=3)', "has no seed"),
    ('dare(2 * a, rescale="l1")', "write sums and weights outside"),
    ('dare(a + b, rescale="l1")', "write sums and weights outside"),
    ('dare(ties(a), rescale="l1")', "write sums and weights outside"),
    ("breadcrumbs(a)", 'write scope="tensor"'),
    ('magnitude(a, scope="tensor")', "by magnitude in ties alone"),
    ("model_stock(a)", "takes two or more vectors as they are"),
    ("2 * model_stock(a, b)", "and the result as it is"),
    ("model_stock(2 * a, b)", "takes two or more vectors as they are"),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "message"), UNWRITTEN)
def test_what_mergekit_cannot_do_is_not_written(expression: str, message: str) -> None:
    with pytest.raises(InvalidExpression) as caught:
        exported(expression)
    assert message in str(caught.value)


@pytest.mark.parametrize("expression", ["ties(a, b)", "2 * slerp(a, b)", "slerp(a, 2 * b)"])
def test_without_a_base_only_whole_models_are_written(expression: str) -> None:
    with pytest.raises(InvalidExpression, match="name the base that these vectors start from"):
        exported(expression, None)


def test_without_a_base_a_scaled_average_is_a_weighted_sum(tmp_path: Path) -> None:
    assert read(tmp_path, exported("0.5 * average(a, b)", None)).expression == "0.25 * a + 0.25 * b"


@pytest.mark.parametrize("base", ["one", "other"])
def test_a_model_is_not_written_twice(base: str) -> None:
    vectors = {"a": Path("one"), "b": Path("one" if base == "other" else "two")}
    with pytest.raises(InvalidExpression, match="the paths must differ"):
        mergekit.write("a + b", vectors, Path(base))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/models/a.safetensors", "/models/a.safetensors"),
        ("../a", "../a"),
        ("my models/ü", '"my models/ü"'),
        ("7b", '"7b"'),
        ("null", '"null"'),
        ("yes", '"yes"'),
        ("a: b # c", '"a: b # c"'),
        ("c++/a@b", '{model: {path: "c++/a@b"}}'),
    ],
)
def test_a_path_comes_back_whatever_it_is(path: str, text: str, tmp_path: Path) -> None:
    found = mergekit.write("0.5 * a", {"a": Path(path)}, Path("base"))
    assert f"  - model: {text}\n" in found
    assert list(read(tmp_path, found).vectors.values()) == [Path(path)]


# --- merges


def test_a_merge_records_where_it_came_from(room: Path, tmp_path: Path) -> None:
    plain = written(room, file("task_arithmetic", "a: {weight: 0.5}; b: {weight: 0.5}"), "m.yaml")
    told: list[tuple[int, int]] = []
    mark = mergekit.merge(
        plain, tmp_path / "merged", warn=print, progress=lambda *step: told.append(step)
    )
    weights = open_weights(tmp_path / "merged" / "model.safetensors")
    assert weights.metadata == {
        "kind": "checkpoint",
        "fingerprint": mark,
        "digest": expressions.parse("0.5 * a + 0.5 * b", ["a", "b"], ()).digest,
        "expression": "0.5 * a + 0.5 * b",
        "method": "task_arithmetic",
        "operands": {
            "a": {"file": "a.safetensors", "fingerprint": ""},
            "b": {"file": "b.safetensors", "fingerprint": ""},
        },
        "origin": {"file": "base.safetensors", "fingerprint": ""},
    }
    assert weights.measure() == mark
    assert told[-1][0] == told[-1][1] > 0
    assert str(room).encode() not in (tmp_path / "merged" / "model.safetensors").read_bytes()


def test_fingerprints_are_taken_from_headers_or_measured_if_asked(
    room: Path, tmp_path: Path
) -> None:
    first = written(room, file("task_arithmetic", ONE), "first.yaml")
    mark = mergekit.merge(first, room / "made.safetensors", warn=print)
    text = file("task_arithmetic", "made: {weight: 1}; b: {weight: 1}")
    second = written(room, text, "second.yaml")
    for measured in (False, True):
        out = tmp_path / f"{measured}.safetensors"
        mergekit.merge(second, out, fingerprints=measured, warn=print)
        operands = open_weights(out).metadata["operands"]
        expected = open_weights(room / "b.safetensors").measure() if measured else ""
        assert operands["made"]["fingerprint"] == mark
        assert operands["b"]["fingerprint"] == expected


def test_a_merge_of_whole_models_has_no_origin(room: Path, tmp_path: Path) -> None:
    config = written(room, CASES["linear averaged"]["file"], "linear.yaml")
    found, _ = merged(config, tmp_path / "out.safetensors")
    assert open_weights(tmp_path / "out.safetensors").metadata["origin"] is None
    assert np.array_equal(found[INTEGERS], MODELS["a"][INTEGERS])


def test_a_path_is_looked_for_beside_the_file_and_then_in_the_working_directory(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(MODELS["b"], tmp_path / "a.safetensors")
    config = written(tmp_path, file("task_arithmetic", ONE))
    monkeypatch.chdir(room)
    found, _ = merged(config, tmp_path / "out.safetensors")
    np.testing.assert_allclose(found["ln.bias"], MODELS["b"]["ln.bias"], atol=1e-7)


@pytest.mark.parametrize("name", ["org/model", "/no/such/place"])
def test_nothing_is_downloaded(name: str, room: Path, tmp_path: Path) -> None:
    text = file("task_arithmetic", ONE).replace("a.safetensors", name)
    with pytest.raises(MissingArtifact, match=f"'{name}' is no file.*nothing is downloaded"):
        mergekit.merge(written(room, text, "hub.yaml"), tmp_path / "out.safetensors", warn=print)


def test_the_dtype_of_the_file_is_written(room: Path, tmp_path: Path) -> None:
    for keys, dtype in (("", "F32"), ("dtype: float32\nout_dtype: bfloat16\n", "BF16")):
        config = written(room, file("task_arithmetic", ONE, keys), "dtype.yaml")
        mergekit.merge(config, tmp_path / "out.safetensors", warn=print)
        header = headers.read_header(tmp_path / "out.safetensors")
        assert header["ln.bias"]["dtype"] == dtype
        assert header[INTEGERS]["dtype"] == "I64"


@pytest.mark.parametrize(
    ("keys", "number"), [("", 1), ("dtype: float16\n", 1), ("dtype: float32\n", 0)]
)
def test_models_in_half_precision_are_merged_in_float32(
    keys: str, number: int, tmp_path: Path
) -> None:
    for name, tensors in MODELS.items():
        half = {key: value.astype(np.float16) for key, value in tensors.items() if key != INTEGERS}
        save_file(half, tmp_path / f"{name}.safetensors")
    config = written(tmp_path, file("task_arithmetic", ONE, keys))
    found, warnings = merged(config, tmp_path / "out.safetensors")
    assert found["ln.bias"].dtype == (np.float32 if "32" in keys else np.float16)
    assert np.array_equal(found["ln.bias"], MODELS["a"]["ln.bias"].astype(np.float16))
    said = ["mergekit computes in float16; here everything is computed in float32 and rounded once"]
    assert warnings == said[:number]
    whole = CASES["linear averaged"]["file"]
    _, warnings = merged(written(tmp_path, whole), tmp_path / "out.safetensors")
    assert warnings == []


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln.bias": None}, "do not have the same parameters"),
        ({"other": np.zeros(2, np.float32)}, "do not have the same parameters"),
        ({"ln.bias": np.zeros(3, np.float32)}, "has the shape"),
        ({"ln.bias": np.zeros(7, np.float16)}, "store both in one dtype"),
        ({INTEGERS: np.arange(5) + 1}, "not edited differ between base.safetensors and bad|"
         "not edited differ between a and bad"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(
    method: str, change: dict[str, Any], message: str, room: Path, tmp_path: Path
) -> None:
    tensors = {
        name: value for name, value in {**MODELS["b"], **change}.items() if value is not None
    }
    save_file(tensors, tmp_path / "bad.safetensors")
    for name in ("base", "a"):
        (tmp_path / f"{name}.safetensors").symlink_to(room / f"{name}.safetensors")
    text = file(method, "a: {weight: 1}; bad: {weight: 1}")
    if method == "linear":
        text = text.replace("base_model: base.safetensors\n", "")
    with pytest.raises(IncompatibleWeights, match=message):
        mergekit.merge(written(tmp_path, text), tmp_path / "out.safetensors", warn=print)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("end", "blocks"), [(2, "2"), (3, "2"), (2, "no")])
def test_a_slice_must_cover_all_blocks(end: int, blocks: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        flat = {"ln.bias": MODELS[name]["ln.bias"]}
        save_file(MODELS[name] if blocks == "2" else flat, tmp_path / f"{name}.safetensors")
    source = "{{model: {}.safetensors, layer_range: [0, {}], parameters: {{weight: 1}}}}"
    sources = ", ".join(source.format(name, end) for name in ("a", "b"))
    config = written(tmp_path, f"merge_method: linear\nslices: [{{sources: [{sources}]}}]\n")
    if blocks == str(end):
        found, _ = merged(config, tmp_path / "out.safetensors")
        assert found.keys() == MODELS["a"].keys()
        return
    with pytest.raises(IncompatibleWeights, match=f"end at {end}, and a has {blocks} blocks"):
        mergekit.merge(config, tmp_path / "out.safetensors", warn=print)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "a")):
        plain = tmp_path / f"plain {name}.safetensors"
        save_file({"x": np.full(3, 1 + number, np.float32)}, plain)
        streaming.write(
            tmp_path / f"{name}.safetensors",
            open_weights(plain).tensors,
            kind="checkpoint",
            metadata={headers.TIED: {"y": "x"}},
        )
    config = written(tmp_path, file("task_arithmetic", "a: {weight: 0.5}"))
    mark = mergekit.merge(config, tmp_path / "out.safetensors", warn=print)
    weights = open_weights(tmp_path / "out.safetensors")
    assert weights.measure() == mark
    assert weights.tied == {"y": "x"}
    assert weights.tensors["x"].floats(0, 3).tolist() == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("name", ["notes.txt", "out.pt"])
def test_a_merge_overwrites_no_other_file(name: str, room: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    config = written(room, file("task_arithmetic", ONE), "other.yaml")
    with pytest.raises(InvalidInput, match="is no directory; expected one, or a .safetensors file"):
        mergekit.merge(config, tmp_path / name, warn=print)
    assert (tmp_path / name).read_text() == "mine"


def test_a_directory_may_be_called_like_a_file(room: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    config = written(room, file("task_arithmetic", ONE), "directory.yaml")
    mergekit.merge(config, tmp_path / "a.safetensors", warn=print)
    assert (tmp_path / "a.safetensors" / "model.safetensors").is_file()


def test_the_module_imports_neither_torch_nor_pydantic_nor_pandas() -> None:
    code = (
        "import sys, taskvec.mergekit; "
        "assert not {'torch', 'pydantic', 'pandas'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
