"""The stages: what each is given, and one small experiment from pictures to edited models."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from ruamel.yaml import YAML
from safetensors.torch import save_file
from torch import Tensor

from flows import plan
from tasks import stages
from tasks.artifacts import Artifacts
from tasks.inputs import architecture
from taskvec import checkpoints, headers, params, streaming, tables
from taskvec.edits import at, evaluate
from taskvec.errors import GateClosed, InvalidInput, MissingArtifact, TaskvecError
from taskvec.lazy import Lazy, materialize
from taskvec.mapped import StoredVector, open_weights
from taskvec.merging.ties import ties
from taskvec.params import Params
from tests.test_models import QUICK, TINY, install, register_tiny_models, write_tiny_weights

ROOT = Path(__file__).parent.parent
SEED = 3
CLASSES = ["red", "green", "blue"]
Key = tuple[str, ...]

# What each stage is given


# What the default experiment has not.
STUDIES = {
    "variants": {"slow": {"of": ["mnist"], "fine_tune": {"steps": 9}, "evaluate": ["faces"]}},
    "sweeps": {"pairs": {"vectors": ["mnist", "faces"], "sizes": [2], "screen": 100, "keep": 3,
                         "coefficient": {"low": 0, "high": 1, "points": 3}}},
    "few_shots": {"few": {"task": "digits", "edits": ["addition"], "shots": [0, 2],
                          "fine_tune": {"steps": 9}}},
}  # fmt: skip


def declared(setting: Params) -> Iterator[tuple[str, str, list[Key]]]:
    """Yield stage, item and the keys of params.yaml that DVC watches for them, for all stages."""
    for path, text in plan.render(ROOT, setting).items():
        if path.name == "dvc.yaml":
            for block in YAML(typ="safe").load(text)["stages"].values():
                for item, stage in instances(block):
                    yield (*command(stage["cmd"], item), list(keys(stage["params"], item)))


def instances(block: dict[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield what ``${item}`` and so on stand for, and the stage that they stand in."""
    if "foreach" in block:
        yield from (({"item": str(name)}, block["do"]) for name in block["foreach"])
    elif "matrix" in block:
        for task in block["matrix"]["task"]:
            for seed in block["matrix"]["seed"]:
                yield {"item.task": str(task), "item.seed": str(seed)}, block
    else:
        yield {}, block


def filled(text: str, item: dict[str, str]) -> str:
    for name, value in item.items():
        text = text.replace(f"${{{name}}}", value)
    assert "$" not in text
    return text


def command(text: str, item: dict[str, str]) -> tuple[str, str]:
    words = filled(text, item).split()
    assert words[:3] == ["python", "-m", "tasks"]
    return words[3], words[4] if len(words) > 4 else ""


def keys(entries: list[Any], item: dict[str, str]) -> Iterator[Key]:
    for entry in entries:
        if isinstance(entry, str):
            yield tuple(filled(entry, item).split("."))
        elif "pictures" in entry["code.yaml"]:
            # the rendered copy of what of the model decides the pictures
            yield from [("model", "image_size"), ("model", "shots")]


def leaves(node: Any, *above: str) -> Iterator[Key]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, *above, key)
    else:
        yield above


def arguments(stage: str, item: str, setting: Params) -> dict[str, Any]:
    """Return what a stage is given, without what other things that DVC watches follow from too.

    Which vectors an edit has is in its weights and in its dependencies. The number of checks in the
    experiment decides whether a gate closes, and nothing that is written.
    """
    given = stages.arguments(stage, item, setting)
    return {name: value for name, value in given.items() if name not in ("vectors", "checks")}


def altered(node: Any, key: Key) -> Any:
    """Return a copy of the parameters with another value at a key, checked or not."""
    if not key:
        return another(node)
    if key == ("expression",):
        return node.model_copy(update={"expression": f"0.5 * ({node.expression})"})
    first, rest = key[0], key[1:]
    if isinstance(node, dict):
        return {**node, first: altered(node[first], rest)}
    if first not in type(node).model_fields:
        first, rest = "options", key
    return node.model_copy(update={first: altered(getattr(node, first), rest)})


def another(value: Any) -> Any:
    if isinstance(value, BaseModel):  # an empty section
        return value.model_copy(update={next(iter(type(value).model_fields)): 1})
    if isinstance(value, list):
        return [*value, value[0]]
    if isinstance(value, str):
        return f"x{value}"
    return not value if isinstance(value, bool) else value + 1


def test_a_stage_is_given_exactly_what_dvc_watches_for_it() -> None:
    raw = {**params.plain(params.read(ROOT / "params.yaml")), **STUDIES}
    default = params.validate(raw)
    others = {key: altered(default, key) for key in leaves(raw)}
    found = list(declared(default))
    assert {stage for stage, _, _ in found} == set(stages.NAMES)
    unwatched, unused = [], []
    for stage, item, watched in found:
        if (stage, item) == ("report", "studies"):
            continue  # it reads the parameters of the studies, which are its dependencies
        given = arguments(stage, item, default)
        matter = {key for key, other in others.items() if arguments(stage, item, other) != given}
        assert default == params.validate(raw)
        for key in sorted(matter):
            if not any(key[: len(prefix)] == prefix for prefix in watched):
                unwatched.append(f"{stage} {item}: {'.'.join(key)}")
        for prefix in watched:
            if not any(key[: len(prefix)] == prefix for key in matter):
                unused.append(f"{stage} {item}: {'.'.join(prefix)}")
    assert unwatched == []
    assert unused == []


@pytest.mark.parametrize(
    ("stage", "item", "message"),
    [
        ("prepair", "mnist-0", "unknown stage 'prepair'; did you mean 'prepare'"),
        ("prepare", "minst", "unknown task 'minst'; did you mean 'mnist'"),
        ("extract", "mnist", "such as mnist-0"),
        ("extract", "mnist-zero", "such as mnist-0"),
        ("fine_tune", "-0", "such as mnist-0"),
        ("combine", "adition-0", "unknown edit 'adition'; did you mean 'addition'"),
        ("search", "mnist-0", "unknown edit 'mnist'"),
    ],
)
def test_unknown_stages_and_items_are_refused_with_a_hint(
    stage: str, item: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        stages.arguments(stage, item, params.load(ROOT / "params.yaml"))


# One small experiment


def pictures_file(seed: int, shift: int) -> bytes:
    """Return an .npz whose label is the brightest channel, counted from another one by shift."""
    generator, arrays = np.random.default_rng(seed), {}
    for short, count in (("train", 24), ("val", 12), ("test", 15)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 150, (count, 16, 16, 3))
        images[np.arange(count), :, :, (labels + shift) % 3] += 100
        arrays[f"x_{short}"], arrays[f"y_{short}"] = images.astype(np.uint8), labels
    file = BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def experiment(model: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """Return the contents of a params.yaml with two tasks of two kinds and four edits."""
    sizes = {"train": 24, "validation": 12, "test": 15}
    templates = ["a photo of a {} thing.", "{}"]
    heads = {"text": {"templates": templates}, "prototypes": {}}
    tasks = {
        task: {
            "data": {
                "dataset": "npz",
                "source": {"package": "taskvec-test-data", "version": "1.0", "files": {
                    name: files[name]}},
                **sizes,
            },
            "head": {"kind": kind, "classes": CLASSES, **heads[kind]},
            "fine_tune": changes,
        }
        for task, name, kind, changes in (
            ("straight", "pictures/straight.npz", "text", {}),
            ("shifted", "pictures/shifted.npz", "prototypes", {"learning_rate": 5e-3}),
        )
    }  # fmt: skip
    both, unit = ["straight", "shifted"], {"low": 0, "high": 1, "points": 3}
    return {
        "seeds": [SEED],
        "model": model,
        "fine_tune": {
            "steps": 5, "batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.0,
            "warmup": 0.2, "clip_norm": 1.0,
        },
        "tasks": tasks,
        "edits": {
            "same": {
                "expression": "c * straight",
                "coefficients": {"c": {"low": 1, "high": 1, "points": 1}},
                "objective": {"maximize": "accuracy", "tasks": ["straight"]},
                "evaluate": ["straight"],
            },
            "both": {
                "expression": "a * straight + b * shifted",
                "coefficients": {"a": unit, "b": unit},
                "objective": {"maximize": "normalized_accuracy", "tasks": both},
                "evaluate": both,
            },
            "forget": {
                "expression": "0.5 * shifted - c * straight",
                "coefficients": {"c": unit},
                "objective": {"minimize": "accuracy", "tasks": ["straight"]},
                "constraint": {"tasks": ["shifted"], "min_ratio": 0.5},
                "select": "largest",
                "evaluate": both,
            },
            "merged": {
                "expression": "c * ties(*, density=[0.2, 1.0]) + dare(0.1 * shifted, p=0.5)",
                "coefficients": {"c": unit},
                "objective": {"maximize": "normalized_accuracy", "tasks": both},
                "evaluate": both,
            },
        },
    }  # fmt: skip


ORDER = [
    *[("prepare", task) for task in ("straight", "shifted")],
    ("pretrain", ""),
    *[("head", task) for task in ("straight", "shifted")],
    *[
        (stage, f"{task}-{SEED}")
        for stage in ("fine_tune", "extract", "evaluate")
        for task in ("straight", "shifted")
    ],
    *[
        (stage, f"{edit}-{SEED}")
        for stage in ("combine", "search", "evaluate")
        for edit in ("same", "both", "forget", "merged")
    ],
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return the parameters of the experiment, whose weights and pictures exist."""
    directory = tmp_path_factory.mktemp("inputs")
    register_tiny_models(directory)
    model = {"family": "open_clip", **write_tiny_weights(directory / "weights.safetensors")}
    content = {
        "pictures/straight.npz": pictures_file(0, shift=0),
        "pictures/shifted.npz": pictures_file(1, shift=1),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield experiment(model, dict(install(directory, content).files))


@pytest.fixture(scope="module")
def setting(raw: dict[str, Any]) -> Params:
    return params.validate(raw)


@pytest.fixture(scope="module")
def done(setting: Params, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Return the artifacts of the whole experiment; copy them, do not change them."""
    artifacts = Artifacts(tmp_path_factory.mktemp("done"))
    for stage, item in ORDER:
        stages.run(stage, item, setting, artifacts, quiet)
    return artifacts


@pytest.fixture
def fresh(done: Artifacts, tmp_path: Path) -> Artifacts:
    """Return a copy of the experiment, to change at will."""
    shutil.copytree(done.root, tmp_path / "copy")
    return Artifacts(tmp_path / "copy")


def quiet(progress: stages.Progress) -> None:
    del progress


def digests(artifacts: Artifacts) -> dict[str, str]:
    return {
        str(path.relative_to(artifacts.root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(artifacts.root.rglob("*"))
        if path.is_file()
    }


def state(path: Path) -> dict[str, Tensor]:
    return checkpoints.load(path, "checkpoint").tensors


def test_the_same_parameters_give_the_same_bytes(
    setting: Params, done: Artifacts, tmp_path: Path
) -> None:
    again = Artifacts(tmp_path)
    for stage, item in ORDER:
        stages.run(stage, item, setting, again, quiet)
    assert digests(again) == digests(done)
    assert not list(done.root.rglob(".writing-*"))


def test_a_vector_holds_exactly_the_floating_parameters_of_the_vision_tower(
    setting: Params, done: Artifacts
) -> None:
    tower = architecture(setting.model)
    expected = {f"visual.{n}": p.shape for n, p in tower.module.named_parameters()}
    pretrained = checkpoints.load(done.pretrained(), "checkpoint")
    for task in setting.tasks:
        vector = checkpoints.load(done.vector(task, SEED), "vector")
        assert {name: value.shape for name, value in vector.tensors.items()} == expected
        assert {value.dtype for value in vector.tensors.values()} == {torch.float32}
        assert vector.metadata["origin"] == pretrained.fingerprint
        finetuned = state(done.checkpoint(task, SEED))
        for name, value in vector.tensors.items():
            assert torch.equal(value, finetuned[name] - pretrained.tensors[name])
        assert any(value.any() for value in vector.tensors.values())


def test_one_vector_with_coefficient_one_is_the_finetuned_model(
    setting: Params, done: Artifacts
) -> None:
    edited, finetuned = state(done.edited("same", SEED)), state(done.checkpoint("straight", SEED))
    for name, value in finetuned.items():
        torch.testing.assert_close(edited[name], value, rtol=1e-6, atol=1e-6)
    classifier = checkpoints.load(done.head("straight"), "head").tensors["head"]
    images = checkpoints.load(done.images("straight", "test"), "images").tensors["images"]
    predictions = []
    for weights in (edited, finetuned):
        tower = architecture(setting.model)
        tower.load(weights)
        with torch.inference_mode():
            predictions.append((tower.features(images).cpu() @ classifier.T).argmax(1).tolist())
    assert predictions[0] == predictions[1]
    own = tables.read(done.evaluation("straight", SEED), tables.Evaluation)
    edit = tables.read(done.evaluation("same", SEED), tables.Evaluation)
    own = own[own["model"] == "finetuned"]
    assert edit["correct"].tolist() == own["correct"].tolist()
    assert edit["normalized"].tolist() == [1.0, 1.0]


def test_an_edit_is_the_sum_of_its_vectors_at_the_chosen_coefficients(
    setting: Params, done: Artifacts
) -> None:
    pretrained = state(done.pretrained())
    straight, shifted = (
        checkpoints.load(done.vector(task, SEED), "vector").tensors
        for task in ("straight", "shifted")
    )
    for edit in ("both", "forget"):
        found = checkpoints.load(done.edited(edit, SEED), "checkpoint")
        c = found.metadata["coefficients"]
        x, y = (c["a"], c["b"]) if edit == "both" else (-c["c"], 0.5)
        for name, value in found.tensors.items():
            expected = pretrained[name] + x * straight[name] + y * shifted[name]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        summary = json.loads(done.coefficients(edit, SEED).read_text())
        assert {name: summary[f"coefficient.{name}"] for name in c} == c
        table = tables.read(done.search_table(edit, SEED), tables.Search)
        (row,) = table[table["chosen"]].to_dict("records")
        assert {name: row[f"coefficient.{name}"] for name in c} == c
        assert len(table) == (9 if edit == "both" else 3) == summary["evaluated"]


def test_the_search_and_the_evaluation_of_its_choice_agree(done: Artifacts) -> None:
    for edit in ("both", "forget", "merged"):
        table = tables.read(done.search_table(edit, SEED), tables.Search)
        (row,) = table[table["chosen"]].to_dict("records")
        found = tables.read(done.evaluation(edit, SEED), tables.Evaluation)
        for task in ("straight", "shifted"):
            place = (found["task"] == task) & (found["split"] == "validation")
            assert found[place]["accuracy"].tolist() == [row[f"accuracy.{task}"]]


def operands(artifacts: Artifacts) -> dict[str, Lazy]:
    tasks = ("straight", "shifted")
    return {task: StoredVector(open_weights(artifacts.vector(task, SEED))) for task in tasks}


def test_an_option_with_several_values_gives_a_basis_a_value(
    setting: Params, done: Artifacts
) -> None:
    recipe = setting.parse("merged")
    basis = checkpoints.load(done.basis("merged", SEED), "basis")
    assert basis.metadata["choices"] == [{"ties.density": 0.2}, {"ties.density": 1.0}]
    assert basis.metadata["coefficients"] == ["c"]
    assert basis.metadata["expression"] == str(recipe)
    assert basis.metadata["digest"] == recipe.digest
    assert set(basis.metadata["operands"]) == {"straight", "shifted"}
    expected: dict[str, Any] = {}
    for number, density in enumerate((0.2, 1.0)):
        merged = materialize(ties(dict(sorted(operands(done).items())), density=density))
        expected |= {f"{number}.basis.c.{name}": value for name, value in merged.items()}
        alternative = recipe.alternatives()[number]
        assert alternative.offset is not None
        rest = materialize(evaluate(alternative.offset, operands(done)))
        expected |= {f"{number}.offset.{name}": value for name, value in rest.items()}
    assert basis.tensors.keys() == expected.keys()
    for name, value in basis.tensors.items():
        assert value.numpy().tobytes() == expected[name].tobytes()
    kept = [bool(basis.tensors[f"{i}.basis.c.visual.conv1.weight"].all()) for i in (0, 1)]
    assert kept == [False, True]


def test_a_search_tries_every_coefficient_with_every_option(
    setting: Params, done: Artifacts, tmp_path: Path
) -> None:
    table = tables.read(done.search_table("merged", SEED), tables.Search)
    assert table["option.ties.density"].tolist() == [0.2, 0.2, 0.2, 1.0, 1.0, 1.0]
    assert table["coefficient.c"].tolist() == [0.0, 0.5, 1.0] * 2
    (row,) = table[table["chosen"]].to_dict("records")
    summary = json.loads(done.coefficients("merged", SEED).read_text())
    assert summary["option.ties.density"] == row["option.ties.density"]
    assert summary["coefficient.c"] == row["coefficient.c"]
    assert summary["evaluated"] == 6
    model = checkpoints.load(done.edited("merged", SEED), "checkpoint")
    assert model.metadata["choice"] == {"ties.density": row["option.ties.density"]}
    assert model.metadata["coefficients"] == {"c": row["coefficient.c"]}
    (alternative,) = (
        item
        for item in setting.parse("merged").alternatives()
        if dict(item.choice) == model.metadata["choice"]
    )
    vector = at(alternative, model.metadata["coefficients"], operands(done))
    mark = streaming.apply(open_weights(done.pretrained()), vector, tmp_path / "x")
    assert mark == model.fingerprint


def test_every_candidate_of_a_search_is_the_model_that_it_says(
    setting: Params, done: Artifacts, tmp_path: Path
) -> None:
    table = tables.read(done.search_table("merged", SEED), tables.Search)
    tower, task = architecture(setting.model), "shifted"
    classifier = checkpoints.load(done.head(task), "head").tensors["head"]
    data = checkpoints.load(done.images(task, "validation"), "images").tensors
    for row in table.to_dict("records"):
        (alternative,) = (
            item
            for item in setting.parse("merged").alternatives()
            if item.choice["ties.density"] == row["option.ties.density"]
        )
        vector = at(alternative, {"c": row["coefficient.c"]}, operands(done))
        streaming.apply(open_weights(done.pretrained()), vector, tmp_path / "x")
        tower.load(state(tmp_path / "x"))
        with torch.inference_mode():
            found = (tower.features(data["images"]).cpu() @ classifier.T).argmax(1)
        assert float((found == data["labels"]).float().mean()) == pytest.approx(
            row[f"accuracy.{task}"]
        )


def test_the_search_finds_the_better_option(raw: dict[str, Any], fresh: Artifacts) -> None:
    other = copy.deepcopy(raw)
    edit = other["edits"]["merged"]
    # One of the options undoes the fine-tuning, the other keeps it.
    edit["expression"] = "c * lines(straight, alpha=[0.0, 1.0])"
    edit["coefficients"] = {"c": {"low": 1, "high": 1, "points": 1}}
    edit["objective"] = {"minimize": "accuracy", "tasks": ["straight"]}
    setting = params.validate(other)
    for stage in ("combine", "search"):
        stages.run(stage, f"merged-{SEED}", setting, fresh, quiet)
    table = tables.read(fresh.search_table("merged", SEED), tables.Search)
    accuracy = dict(zip(table["option.lines.alpha"], table["accuracy.straight"], strict=True))
    own = tables.read(fresh.evaluation("straight", SEED), tables.Evaluation)
    own = own[own["split"] == "validation"].set_index("model")["accuracy"]
    assert accuracy == {0.0: own["pretrained"], 1.0: own["finetuned"]}
    (row,) = table[table["chosen"]].to_dict("records")
    assert row["accuracy.straight"] == min(accuracy.values())


def test_a_tasks_own_recipe_overrides_the_shared_one(done: Artifacts) -> None:
    for task, rate in (("straight", 1e-2), ("shifted", 5e-3)):
        curve = tables.read(done.training(task, SEED), tables.Training)
        assert curve["step"].tolist() == [1, 2, 3, 4, 5]
        assert curve["learning_rate"].max() == rate


def test_progress_is_told_from_the_first_step_to_the_last(
    setting: Params, fresh: Artifacts
) -> None:
    for stage, item, count in (("fine_tune", "straight", 5), ("search", "both", 9),
                               ("search", "merged", 6), ("evaluate", "straight", 4),
                               ("evaluate", "both", 4)):  # fmt: skip
        told: list[stages.Progress] = []
        stages.run(stage, f"{item}-{SEED}", setting, fresh, told.append)
        assert [(p["step"], p["steps"]) for p in told] == [(i + 1, count) for i in range(count)]


def test_another_seed_gives_another_model_in_files_of_its_own(
    setting: Params, fresh: Artifacts
) -> None:
    before = digests(fresh)
    stages.run("fine_tune", "straight-4", setting, fresh, quiet)
    after = digests(fresh)
    assert {**after, **before} == after
    assert set(after) - set(before) == {
        "data/checkpoints/straight-4.safetensors",
        "data/training/straight-4.csv",
    }
    other = state(fresh.checkpoint("straight", 4))
    name = "visual.conv1.weight"
    assert not torch.equal(other[name], state(fresh.checkpoint("straight", SEED))[name])


# Evaluation and its gates


def answers(setting: Params, artifacts: Artifacts, path: Path, task: str, split: str) -> Tensor:
    """Return the logits (N, classes) of a model, computed without the stage's own code."""
    tower = architecture(setting.model)
    tower.load(state(path))
    classifier = checkpoints.load(artifacts.head(task), "head").tensors["head"]
    images = checkpoints.load(artifacts.images(task, split), "images").tensors["images"]
    with torch.inference_mode():
        return tower.features(images).cpu() @ classifier.T


def test_an_evaluation_has_accuracy_and_loss_of_every_model(
    setting: Params, done: Artifacts
) -> None:
    table = tables.read(done.evaluation("shifted", SEED), tables.Evaluation)
    paths = {"pretrained": done.pretrained(), "finetuned": done.checkpoint("shifted", SEED)}
    assert table["model"].tolist() == ["pretrained"] * 2 + ["finetuned"] * 2
    for row in table.to_dict("records"):
        logits = answers(setting, done, paths[row["model"]], "shifted", row["split"])
        labels = checkpoints.load(done.images("shifted", row["split"]), "images").tensors["labels"]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
        assert row["correct"] == int((logits.argmax(1) == labels).sum())
        assert row["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        half = 1.959963984540054 * float(losses.std()) / len(labels) ** 0.5
        assert row["loss_high"] == pytest.approx(row["loss"] + half, rel=1e-4)


def test_metrics_say_what_the_gates_found(done: Artifacts) -> None:
    own = json.loads(done.metrics("straight", SEED).read_text())
    assert own["gate.expert"] == own["gate.leak"] == "passed"
    table = tables.read(done.evaluation("forget", SEED), tables.Evaluation)
    edit = json.loads(done.metrics("forget", SEED).read_text())
    assert edit["gate.leak"] == "passed"
    assert "gate.expert" not in edit
    accuracy = table.set_index(["task", "split"])["accuracy"]
    for task in ("straight", "shifted"):
        gap = accuracy[task, "validation"] - accuracy[task, "test"]
        assert edit[f"gap.{task}"] == pytest.approx(gap)
    assert edit["feasible.test"] in ("feasible", "infeasible", "open")
    assert json.loads(done.metrics("both", SEED).read_text())["feasible.test"] == "feasible"


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [({"min": 0.0}, "feasible"), ({"max": 1e-6}, "infeasible"), ({"max_rise": 0.0}, "open")],
)
def test_an_edit_whose_constraint_fails_on_test_data_is_marked(
    bound: dict[str, float], verdict: str, raw: dict[str, Any], fresh: Artifacts
) -> None:
    other = copy.deepcopy(raw)
    metric = "loss" if "max" in bound else "accuracy"
    other["edits"]["same"]["constraint"] = {"tasks": ["straight"], "metric": metric, **bound}
    streaming.apply(
        open_weights(fresh.pretrained()),
        at(params.validate(other).parse("same"), {"c": 0.0}, operands(fresh)),
        fresh.edited("same", SEED),
        identity=checkpoints.load(fresh.pretrained(), "checkpoint").metadata["identity"],
    )  # the pre-trained model itself, whose rise is 0 with an interval about it
    stages.run("evaluate", f"same-{SEED}", params.validate(other), fresh, quiet)
    assert json.loads(fresh.metrics("same", SEED).read_text())["feasible.test"] == verdict


def assert_stopped(
    name: str, key: str, messages: list[str], raw: dict[str, Any], artifacts: Artifacts
) -> None:
    """Check that a gate stops an evaluation, which names it, and that an override is recorded."""
    before = digests(artifacts)
    with pytest.raises(GateClosed) as caught:
        stages.run("evaluate", f"{name}-{SEED}", params.validate(raw), artifacts, quiet)
    assert caught.value.exit_code == 8
    assert digests(artifacts) == before
    for message in (*messages, f'gates: {{override: {{"{key}": "why"}}}}'):
        assert message in str(caught.value)
    other = {**raw, "gates": {"override": {key: "a test of the override"}}}
    stages.run("evaluate", f"{name}-{SEED}", params.validate(other), artifacts, quiet)
    found = json.loads(artifacts.metrics(name, SEED).read_text())
    assert found[f"gate.{key.split()[0]}"] == "overridden: a test of the override"


def test_a_checkpoint_with_another_score_than_recorded_stops_the_run(
    raw: dict[str, Any], fresh: Artifacts
) -> None:
    def damage(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        counted = metadata["score"]["tasks"]["straight"]
        counted["correct"] = (counted["correct"] + 6) % 12

    rewrite(fresh.checkpoint("straight", SEED), damage)
    messages = [f"data/checkpoints/straight-{SEED}.safetensors gets", "but records", "of 12 items"]
    assert_stopped("straight", "expert straight", messages, raw, fresh)


def test_a_checkpoint_that_is_never_right_is_the_gates_matter(
    setting: Params, fresh: Artifacts
) -> None:
    def damage(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors["visual.proj"] = -tensors["visual.proj"]

    rewrite(fresh.checkpoint("straight", SEED), damage)
    before = digests(fresh)
    with pytest.raises(GateClosed, match="gets 0 of 12 items"):
        stages.run("evaluate", f"straight-{SEED}", setting, fresh, quiet)
    assert digests(fresh) == before


def test_a_checkpoint_without_a_score_is_evaluated_and_noted(
    setting: Params, fresh: Artifacts
) -> None:
    def foreign(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        del metadata["score"]

    rewrite(fresh.checkpoint("straight", SEED), foreign)
    stages.run("evaluate", f"straight-{SEED}", setting, fresh, quiet)
    found = json.loads(fresh.metrics("straight", SEED).read_text())
    assert found["gate.expert"] == "no recorded score"


def test_a_test_item_in_the_training_data_of_another_task_stops_the_run(
    raw: dict[str, Any], fresh: Artifacts
) -> None:
    path = fresh.items("shifted")
    planted = tables.read(path, tables.Items)
    tested = tables.read(fresh.items("straight"), tables.Items)
    (digest,) = tested[(tested["split"] == "test") & (tested["item"] == 7)]["digest"]
    place = (planted["split"] == "train") & (planted["item"] == 3)
    tables.write(path, planted.assign(digest=planted["digest"].where(~place, digest)), tables.Items)
    message = "test item 7 of straight is training item 3 of shifted"
    file = f"1 test items are in the training data of data/edits/both-{SEED}/model.safetensors"
    assert_stopped("both", "leak both", [message, file], raw, fresh)
    # the vector of this edit has not seen it
    stages.run("evaluate", f"same-{SEED}", params.validate(raw), fresh, quiet)
    assert json.loads(fresh.metrics("same", SEED).read_text())["gate.leak"] == "passed"


def test_a_test_score_far_above_validation_stops_the_run(
    setting: Params, raw: dict[str, Any], fresh: Artifacts
) -> None:
    path = fresh.checkpoint("straight", SEED)
    for split in ("validation", "test"):
        labels = answers(setting, fresh, path, "straight", split).argmax(1)
        if split == "validation":
            labels[1:] = (labels[1:] + 1) % 3

        def relabel(
            tensors: dict[str, Tensor], metadata: dict[str, Any], labels: Tensor = labels
        ) -> None:
            tensors["labels"] = labels

        rewrite(fresh.images("straight", split), relabel)

    def foreign(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        del metadata["score"]

    rewrite(path, foreign)
    messages = [
        f"data/checkpoints/straight-{SEED}.safetensors gets 15 of 15 items (100.00 %)",
        "1 of 12 items (8.33 %) of its validation data: 91.67 points more",
    ]
    assert_stopped("straight", "leak straight", messages, raw, fresh)


def test_another_way_to_fine_tune_is_evaluated_beside_the_experts(
    raw: dict[str, Any], fresh: Artifacts
) -> None:
    other = copy.deepcopy(raw)
    other["variants"] = {"joint": {"of": ["straight", "shifted"], "fine_tune": {}}}
    setting = params.validate(other)
    for stage in ("fine_tune", "evaluate"):
        stages.run(stage, f"joint-{SEED}", setting, fresh, quiet)
    table = tables.read(fresh.evaluation("joint", SEED), tables.Evaluation)
    assert set(table["model"]) == {"joint"}
    assert set(table["task"]) == {"straight", "shifted"}
    score = checkpoints.load(fresh.checkpoint("joint", SEED), "checkpoint").metadata["score"]
    for row in table[table["split"] == "validation"].to_dict("records"):
        assert score["tasks"][row["task"]] == {"correct": row["correct"], "items": row["items"]}
    found = json.loads(fresh.metrics("joint", SEED).read_text())
    assert found["gate.expert"] == "passed" and "feasible.test" not in found


# Files that do not fit


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change tensors and metadata of a file as another program could have written them."""
    kind = headers.read_header(path)["__metadata__"][headers.METADATA_KEY]
    loaded = checkpoints.load(path, json.loads(kind)["kind"])
    tensors, metadata = dict(loaded.tensors), dict(loaded.metadata)
    change(tensors, metadata)
    metadata["fingerprint"] = checkpoints.fingerprint(tensors)
    sealed = {**metadata, headers.SEAL: headers.seal(metadata)}
    save_file(tensors, path, {headers.METADATA_KEY: headers.canonical(sealed)})


def first(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("conv1.weight"))


def another_origin(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    metadata["origin"] = "f" * 64


def missing_tensor(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    del tensors[first(tensors)]


def extra_tensor(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors[f"{first(tensors)}er"] = torch.zeros(1)


def another_shape(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)][1:]


def another_dtype(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)].half()


def not_a_number(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    tensors[first(tensors)][0] = float("nan")


CHANGES = [
    another_origin, missing_tensor, extra_tensor, another_shape, another_dtype, not_a_number,
]  # fmt: skip


def assert_refused(stage: str, item: str, setting: Params, artifacts: Artifacts) -> str:
    """Check that a stage without outputs ends with exit code 3 and writes nothing."""
    before = digests(artifacts)
    with pytest.raises(TaskvecError) as caught:
        stages.run(stage, item, setting, artifacts, quiet)
    assert caught.value.exit_code == 3, caught.value
    assert digests(artifacts) == before
    assert not list(artifacts.root.rglob(".writing-*"))
    return str(caught.value)


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("change", CHANGES)
def test_extract_refuses_a_checkpoint_that_does_not_fit(
    change: Any, setting: Params, fresh: Artifacts
) -> None:
    remove(fresh.vector("straight", SEED))
    rewrite(fresh.checkpoint("straight", SEED), change)
    assert_refused("extract", f"straight-{SEED}", setting, fresh)


@pytest.mark.parametrize("change", CHANGES)
def test_search_refuses_a_basis_that_does_not_fit(
    change: Any, setting: Params, fresh: Artifacts
) -> None:
    remove(fresh.search_table("both", SEED), fresh.coefficients("both", SEED))
    remove(fresh.edited("both", SEED))
    rewrite(fresh.basis("both", SEED), change)
    assert_refused("search", f"both-{SEED}", setting, fresh)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["straight", "both"])
def test_evaluate_refuses_a_model_that_does_not_fit(
    name: str, change: Any, setting: Params, fresh: Artifacts
) -> None:
    remove(fresh.evaluation(name, SEED), fresh.metrics(name, SEED))
    edited = name == "both"
    rewrite(fresh.edited(name, SEED) if edited else fresh.checkpoint(name, SEED), change)
    assert_refused("evaluate", f"{name}-{SEED}", setting, fresh)


@pytest.mark.parametrize("change", CHANGES)
def test_combine_refuses_vectors_that_do_not_fit_together(
    change: Any, setting: Params, fresh: Artifacts
) -> None:
    edits = ("both", "forget", "merged")
    remove(*(fresh.basis(edit, SEED) for edit in edits))
    rewrite(fresh.vector("shifted", SEED), change)
    for edit in edits:
        assert_refused("combine", f"{edit}-{SEED}", setting, fresh)


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not another_origin])
def test_fine_tuning_refuses_pretrained_weights_that_do_not_fit(
    change: Any, setting: Params, fresh: Artifacts
) -> None:
    remove(fresh.checkpoint("straight", SEED), fresh.training("straight", SEED))
    rewrite(fresh.pretrained(), change)
    assert_refused("fine_tune", f"straight-{SEED}", setting, fresh)


def test_a_model_fine_tuned_from_other_weights_is_refused_everywhere(
    raw: dict[str, Any], fresh: Artifacts, tmp_path: Path
) -> None:
    other = copy.deepcopy(raw)
    options = write_tiny_weights(tmp_path / "other.safetensors", seed=1)
    other["model"] = {"family": "open_clip", **options}
    setting = params.validate(other)
    stages.run("pretrain", "", setting, fresh, quiet)
    for stage, item in (("extract", "straight"), ("search", "both"), ("evaluate", "straight"),
                        ("evaluate", "both")):  # fmt: skip
        message = assert_refused(stage, f"{item}-{SEED}", setting, fresh)
        assert "starts from the pre-trained weights" in message


def test_checkpoints_of_the_other_activation_are_refused(
    raw: dict[str, Any], fresh: Artifacts
) -> None:
    other = copy.deepcopy(raw)
    assert other["model"]["name"] == TINY
    other["model"]["name"] = QUICK
    setting = params.validate(other)
    for stage, item in (("fine_tune", "straight"), ("search", "both"), ("evaluate", "both")):
        message = assert_refused(stage, f"{item}-{SEED}", setting, fresh)
        assert "'gelu'" in message and "'quickgelu'" in message


def test_a_basis_with_other_coefficients_is_refused(raw: dict[str, Any], fresh: Artifacts) -> None:
    other = copy.deepcopy(raw)
    edit = other["edits"]["forget"]
    edit["expression"] = "0.5 * shifted - d * straight"
    edit["coefficients"] = {"d": edit["coefficients"]["c"]}
    message = assert_refused("search", f"forget-{SEED}", params.validate(other), fresh)
    assert "the basis has the coefficients c, the search d" in message


@pytest.mark.parametrize(
    ("stage", "item", "path"),
    [
        ("head", "shifted", Artifacts.pretrained),
        ("fine_tune", "straight-3", lambda files: files.images("straight", "train")),
        ("extract", "straight-3", lambda files: files.checkpoint("straight", 3)),
        ("combine", "both-3", lambda files: files.vector("shifted", 3)),
        ("search", "both-3", lambda files: files.evaluation("shifted", 3)),
        ("evaluate", "both-3", lambda files: files.edited("both", 3)),
        ("evaluate", "same-3", lambda files: files.items("straight")),
    ],
)
def test_a_file_that_is_not_there_is_named(
    stage: str,
    item: str,
    path: Callable[[Artifacts], Path],
    setting: Params,
    fresh: Artifacts,
) -> None:
    remove(path(fresh))
    before = digests(fresh)
    with pytest.raises(MissingArtifact, match=path(fresh).name) as caught:
        stages.run(stage, item, setting, fresh, quiet)
    assert caught.value.exit_code == 5
    assert digests(fresh) == before


@pytest.mark.parametrize("size", [None, 16])
def test_prepare_takes_the_picture_size_of_the_model(
    size: int | None, raw: dict[str, Any], done: Artifacts, tmp_path: Path
) -> None:
    other = {**raw, "model": {**raw["model"], **({"image_size": size} if size else {})}}
    artifacts = Artifacts(tmp_path)
    stages.run("prepare", "straight", params.validate(other), artifacts, quiet)
    path = artifacts.images("straight", "train")
    assert path.read_bytes() == done.images("straight", "train").read_bytes()
    assert checkpoints.load(path, "images").tensors["images"].shape == (24, 3, 16, 16)
