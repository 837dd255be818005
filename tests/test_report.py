"""The report stage: figures by hand, same bytes every time, a page that fetches nothing."""

import hashlib
import html
import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch

from tasks import findings, graph, results
from tasks.artifacts import Artifacts
from tasks.findings import percent, signed
from tasks.report import report
from taskvec import checkpoints, params, pictures, summaries, tables
from taskvec.atomic import write_text
from taskvec.errors import InvalidInput, MissingArtifact
from taskvec.params import Params
from taskvec.summaries import Estimate, Scores
from tests.programs import require_program

REPOSITORY = Path(__file__).parent.parent
ORIGIN = "a" * 64
HOSTILE = "<script>alert('1')</script>"

DVC = """
stages:
  prepare:
    foreach: &tasks
      - mnist
      - digits
      - shifted
    do:
      cmd: python -m tasks prepare ${item}
      outs:
        - data/prepared/${item}/train.safetensors
      metrics:
        - data/prepared/${item}/summary.json: {cache: false}
  pretrain:
    cmd: python -m tasks pretrain
    deps: [data/prepared/mnist/train.safetensors]
    outs: [data/checkpoints/pretrained.safetensors]
  fine_tune:
    matrix:
      task: *tasks
      seed: [3, 5]
    cmd: python -m tasks fine_tune ${item.task}-${item.seed}
    deps:
      - data/checkpoints/pretrained.safetensors
      - data/prepared/${item.task}
    outs:
      - data/checkpoints/${key}.safetensors: {cache: true}
    plots:
      - data/training/${item.task}-${item.seed}.csv: {x: step, y: loss}
  evaluate:
    foreach: *tasks
    do:
      cmd: python -m tasks evaluate ${item}-3
      deps: ['data/checkpoints/${item}-3.safetensors']
      outs: ['data/evaluations/${item}-3.csv']
  report:
    cmd: python -m tasks report page
    deps:
      - data/evaluations/sum-3.csv
      - data/evaluations/mnist-3.csv
    outs: [data/reports/index.html]
"""

EDITS_DVC = """
stages:
  combine-sum-3:
    wdir: ..
    cmd: python -m tasks combine sum-3
    deps: [data/checkpoints/mnist-3.safetensors, data/checkpoints/digits-3.safetensors]
    outs: [data/edits/sum-3/basis.safetensors]
  evaluate-sum-3:
    wdir: ..
    cmd: python -m tasks evaluate sum-3
    deps: [data/edits/sum-3/basis.safetensors, data/evaluations/mnist-3.csv]
    outs: [data/evaluations/sum-3.csv]
"""

# (items, classes) a task; correct answers on (validation, test) a model and task.
SIZES = {"mnist": (200, 400), "digits": (150, 300), "shifted": (150, 300)}
CORRECT = {
    ("pretrained", "mnist"): (120, 240),
    ("pretrained", "digits"): (90, 192),
    ("pretrained", "shifted"): (60, 126),
    ("finetuned", "mnist"): (190, 380),
    ("finetuned", "digits"): (142, 285),
    ("finetuned", "shifted"): (144, 288),
    ("sum", "mnist"): (160, 304),
    ("sum", "digits"): (120, 228),
    ("forget", "digits"): (50, 93),
    ("forget", "mnist"): (116, 228),
    ("alone", "shifted"): (90, 180),
    ("likeness", "shifted"): (111, 219),
    ("added", "shifted"): (114, 231),
}


def raw_params() -> dict[str, Any]:
    """Return three tasks, five edits, two seeds, as params.yaml would hold them."""
    source = {"package": "mlxtend", "version": "0.25.0", "files": {"a.csv": "0" * 64}}

    def task(dataset: str, name: str) -> dict[str, Any]:
        data = {"dataset": dataset, "source": source, "train": 600, "validation": SIZES[name][0]}
        classes = [HOSTILE, *"bcdefghij"]
        return {
            "data": {**data, "test": SIZES[name][1]},
            "head": {"kind": "text", "classes": classes, "templates": ["a photo of {}."]},
            "fine_tune": {},
        }

    def edit(expression: str, evaluate: list[str], **more: Any) -> dict[str, Any]:
        names = sorted(set(re.findall(r"\b[abc]\b", expression)))
        steps = {1: 11, 2: 5}[len(names)]
        return {
            "expression": expression,
            "coefficients": {name: {"low": 0.0, "high": 1.0, "points": steps} for name in names},
            "objective": {"maximize": "accuracy", "tasks": evaluate[:1]},
            "evaluate": evaluate,
            **more,
        }

    pair = ["mnist", "digits"]
    return {
        "seeds": [3, 5],
        "model": {"family": "bundled", "image_size": 48, "align_tasks": ["mnist"], "shots": 3},
        "fine_tune": {
            "steps": 20, "batch_size": 32, "learning_rate": 1e-4, "weight_decay": 0.0,
            "warmup": 0.1, "clip_norm": 1.0,
        },
        "tasks": {
            "mnist": task("mnist", "mnist"),
            "digits": task("digits", "digits"),
            "shifted": task("digits", "shifted"),
        },
        "edits": {
            "sum": edit(
                "c * (mnist +\n digits)", pair,
                objective={"maximize": "normalized_accuracy", "tasks": pair},
            ),
            "forget": edit(
                "-c * digits", ["digits", "mnist"],
                objective={"minimize": "accuracy", "tasks": ["digits"]},
                constraint={"tasks": ["mnist"], "min_ratio": 0.95},
            ),
            "alone": edit("c * mnist", ["shifted"], group="likeness_group"),
            "likeness": edit("a * mnist + b * (digits - shifted)", ["shifted"],
                             group="likeness_group"),
            "added": edit("c * (mnist + digits)", ["shifted"], group="likeness_group"),
        },
    }  # fmt: skip


def wilson(correct: int, items: int) -> tuple[float, float]:
    """Return the Wilson interval, solved from (p - x)^2 = z^2 x (1 - x) / n by its roots."""
    z2 = 1.959963984540054**2
    p = correct / items
    roots = np.roots([1 + z2 / items, -(2 * p + z2 / items), p * p])
    low, high = sorted(float(root.real) for root in roots)
    return min(max(low, 0.0), p), max(min(high, 1.0), p)


def losses(accuracy: float) -> dict[str, float]:
    """Return a mean loss that falls with accuracy, and an interval about it."""
    loss = 3.0 - 2.0 * accuracy
    return {"loss": loss, "loss_low": loss - 0.1, "loss_high": loss + 0.2}


def evaluation(models: list[tuple[str, str]], seed: int, shift: int) -> pd.DataFrame:
    """Return an evaluation table of (model, task) pairs; ``shift`` more are right than CORRECT."""
    rows = []
    for model, task in models:
        for position, split in enumerate(("validation", "test")):
            items = SIZES[task][position]
            moved = 0 if model in ("pretrained", "finetuned") else shift
            correct = CORRECT[model, task][position] + moved
            low, high = wilson(correct, items)
            rows.append(
                {
                    "model": model, "seed": seed, "task": task, "split": split, "items": items,
                    "correct": correct, "accuracy": correct / items, "low": low, "high": high,
                    "normalized": correct / CORRECT["finetuned", task][position],
                    "ratio": correct / CORRECT["pretrained", task][position],
                    "chance": 0.1, **losses(correct / items),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def search_table(raw: dict[str, Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a smooth search and the coefficients chosen in it."""
    names = sorted(raw["coefficients"])
    grids = [np.linspace(0, 1, raw["coefficients"][name]["points"]).round(12) for name in names]
    tasks = sorted({*raw["objective"]["tasks"], *raw.get("constraint", {}).get("tasks", [])})
    shrink = "minimize" in raw["objective"]
    rows = []
    for point, values in enumerate(itertools.product(*grids)):
        c = float(np.mean(values))
        accuracy = {
            task: 0.6 - 0.5 * c**2 / (i + 1) if shrink else 0.6 + 0.9 * c * (0.9 - c) - 0.02 * i
            for i, task in enumerate(tasks)
        }
        rows.append(
            {
                "point": point,
                **{f"coefficient.{n}": float(v) for n, v in zip(names, values, strict=True)},
                **{f"accuracy.{task}": value for task, value in accuracy.items()},
                **{f"ratio.{task}": value / 0.6 for task, value in accuracy.items()},
                "objective": float(np.mean([accuracy[t] for t in raw["objective"]["tasks"]])),
                **{f"loss.{task}": 1.0 + c for task in tasks},
                "items": 200,
                "complete": True,
                "feasible": not shrink or c <= 0.55,
            }
        )
    table = pd.DataFrame(rows)
    allowed = table["objective"].where(table["feasible"])
    best = allowed.idxmin() if shrink else allowed.idxmax()
    table["chosen"] = table.index == best
    table["not_worse"] = table["feasible"] & ((allowed - allowed[best]).abs() < 0.02)
    summary = {name: table.loc[best, name] for name in table if name.startswith("coefficient.")}
    return table, {
        **summary, "objective": float(allowed[best]), "feasible": True, "strategy": "grid",
        "image_evaluations": 2200, "grid_image_evaluations": 2200,
    }  # fmt: skip


def experiment(root: Path, raw: dict[str, Any]) -> Artifacts:
    """Write everything that the report reads below ``root``."""
    artifacts = Artifacts(root)
    for shift, seed in enumerate(raw["seeds"]):
        draw = np.random.default_rng(seed)
        shared = draw.standard_normal(40).astype(np.float32)
        for task in raw["tasks"]:
            table = evaluation([("pretrained", task), ("finetuned", task)], seed, shift)
            tables.write(artifacts.evaluation(task, seed), table, tables.Evaluation)
            steps = np.arange(1, 21)
            loss = 2.2 * np.exp(-steps / 8) + 0.1 * draw.random(20)
            rate = np.full(20, 1e-4)
            curve = pd.DataFrame({"step": steps, "loss": loss, "learning_rate": rate})
            tables.write(artifacts.training(task, seed), curve, tables.Training)
            own = draw.standard_normal(40).astype(np.float32)
            tensors = {"w": torch.from_numpy(own + 0.5 * shared), "b": torch.zeros(3)}
            checkpoints.save(artifacts.vector(task, seed), tensors, "vector", origin=ORIGIN)
        for name, edit in raw["edits"].items():
            models = [(name, task) for task in edit["evaluate"]]
            table = evaluation(models, seed, shift)
            tables.write(artifacts.evaluation(name, seed), table, tables.Evaluation)
            searched, chosen = search_table(edit)
            tables.write(artifacts.search_table(name, seed), searched, tables.Search)
            write_text(artifacts.coefficients(name, seed), json.dumps(chosen))
    write_text(root / "dvc.yaml", DVC)
    write_text(root / "edits" / "dvc.yaml", EDITS_DVC)
    return artifacts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifacts, Params]:
    """Return an experiment of which both reports are written."""
    artifacts = experiment(tmp_path_factory.mktemp("experiment"), raw_params())
    checked = params.validate(raw_params())
    write_reports(artifacts, checked)
    return artifacts, checked


def write_reports(artifacts: Artifacts, checked: Params) -> None:
    for page in ("page", "results"):
        report(artifacts, page=page, params=checked, emit=lambda progress: None)


def test_a_search_over_options_shows_what_was_chosen(tmp_path: Path) -> None:
    raw = raw_params()
    raw["edits"]["sum"]["expression"] = "c * ties(mnist, digits, density=[0.2, 1.0])"
    artifacts = experiment(tmp_path, raw)
    options = {"option.ties.density": 0.2, "option.ties.variant": "sum", "option.toy.flag": True}
    for seed in raw["seeds"]:
        table, chosen = search_table(raw["edits"]["sum"])
        good = table.assign(**options)
        worse = table.assign(
            point=table["point"] + 11, objective=table["objective"] / 2, chosen=False,
            **{**options, "option.ties.density": 1.0},
        )  # fmt: skip
        both = pd.concat([worse, good])
        tables.write(artifacts.search_table("sum", seed), both, tables.Search)
        write_text(artifacts.coefficients("sum", seed), json.dumps(chosen | options))
    checked = params.validate(raw)
    run = findings.gather(artifacts, checked, 3)
    words = "ties.density = 0.2, ties.variant = sum, toy.flag = True"
    value = next(v for name, v in chosen.items() if name.startswith("coefficient."))
    assert run.coefficients("sum") == f"c = {value:g}, {words}"
    assert run.chosen_search("sum")["objective"].tolist() == table["objective"].tolist()
    assert len(run.chosen_search("forget")) == len(run.searches["forget"]) == 11
    write_reports(artifacts, checked)
    assert words in html.unescape(artifacts.report().read_text())
    assert "ties.density = 0.2" in artifacts.results().read_text()


def test_a_search_shows_what_it_cost_and_what_does_as_well(tmp_path: Path) -> None:
    artifacts = experiment(tmp_path, raw_params())
    path = artifacts.coefficients("forget", 3)
    more = {"image_evaluations": 1500, "interval.c.low": 0.4, "interval.c.high": 0.5}
    write_text(path, json.dumps(json.loads(path.read_text()) | more))
    checked = params.validate(raw_params())
    run = findings.gather(artifacts, checked, 3)
    assert run.price("forget") == "1,500 image evaluations, 68 % of the grid's 2,200"
    assert run.price("sum") == "2,200 image evaluations"
    assert run.intervals("forget") == "c from 0.4 to 0.5"
    assert run.intervals("sum") == ""
    write_reports(artifacts, checked)
    row = next(row for row in parsed(artifacts).tables[1] if row[0].startswith("forget"))
    assert "68 % of the grid's 2,200" in row[2]
    assert "not significantly worse: c from 0.4 to 0.5" in row[3]
    text = artifacts.results().read_text()
    assert (
        "The search cost 1,500 image evaluations, 68 % of the grid's 2,200 (seed 3); "
        "2,200 image evaluations (seed 5)."
    ) in text
    assert "The search cost 2,200 image evaluations.\n" in text
    assert "(paired bootstrap, 95 %): seed 3: c from 0.4 to 0.5." in text


def test_figures_draw_only_complete_evaluations(tmp_path: Path) -> None:
    artifacts = experiment(tmp_path, raw_params())
    for seed in (3, 5):
        path = artifacts.search_table("likeness", seed)
        table = tables.read(path, tables.Search)
        part = table.iloc[:4].assign(
            point=range(100, 104), complete=False, items=100, chosen=False, not_worse=False,
            objective=0.999,
        )  # fmt: skip
        tables.write(path, pd.concat([part, table]), tables.Search)
    checked = params.validate(raw_params())
    run = findings.gather(artifacts, checked, 3)
    assert len(run.searches["likeness"]) == 29
    shown = run.chosen_search("likeness")
    assert len(shown) == 25 and shown["complete"].all()
    write_reports(artifacts, checked)
    assert "99.9" not in artifacts.report().read_text()


def test_a_search_that_is_no_grid_is_drawn_by_coefficient(tmp_path: Path) -> None:
    artifacts = experiment(tmp_path, raw_params())
    path = artifacts.search_table("likeness", 3)
    table = tables.read(path, tables.Search)
    kept = table[table["chosen"] | (table["point"] % 3 == 0)]
    kept = kept.assign(**{"coefficient.a": kept["coefficient.a"] + kept["point"] / 1000})
    tables.write(path, kept, tables.Search)
    checked = params.validate(raw_params())
    report(artifacts, page="page", params=checked, emit=lambda progress: None)
    text = artifacts.report().read_text()
    (figure,) = re.findall(r"<svg[^>]*Search of likeness.*?</svg>", text, flags=re.S)
    assert "best objective, validation, %" in figure


def test_a_coefficient_by_layer_is_shown_by_its_mean_and_range(tmp_path: Path) -> None:
    artifacts = experiment(tmp_path, raw_params())
    path = artifacts.search_table("sum", 3)
    table = tables.read(path, tables.Search)
    c = table.pop("coefficient.c")
    layered = {f"coefficient.c@block{i}": c + 0.1 * i for i in range(3)}
    tables.write(path, table.assign(**layered), tables.Search)
    summary = json.loads(artifacts.coefficients("sum", 3).read_text())
    at = summary.pop("coefficient.c")
    values = {f"coefficient.c@block{i}": at + 0.1 * i for i in range(3)}
    write_text(artifacts.coefficients("sum", 3), json.dumps(summary | values))
    checked = params.validate(raw_params())
    run = findings.gather(artifacts, checked, 3)
    mean = f"{at + 0.1:.3g} on average ({at:.3g} to {at + 0.2:.3g} by layer)"
    assert run.coefficients("sum") == f"c = {mean}"
    assert run.chosen_search("sum")["coefficient.c"].tolist() == pytest.approx((c + 0.1).tolist())
    write_reports(artifacts, checked)
    assert mean in html.unescape(artifacts.report().read_text())


def test_variants_and_edits_of_one_seed_have_their_rows(tmp_path: Path) -> None:
    raw = raw_params()
    raw["edits"]["alone"]["seeds"] = [5]
    raw["variants"] = {"joint": {"of": ["mnist", "digits"], "fine_tune": {}}}
    artifacts = experiment(tmp_path, raw)
    for seed in raw["seeds"]:
        table = evaluation([("sum", "mnist"), ("sum", "digits")], seed, 0).assign(model="joint")
        tables.write(artifacts.evaluation("joint", seed), table, tables.Evaluation)
    artifacts.coefficients("alone", 3).unlink()
    checked = params.validate(raw)
    write_reports(artifacts, checked)
    page, text = parsed(artifacts).tables[0], artifacts.results().read_text()
    names = [row[0].split()[0] for row in page[1:]]
    assert "joint" in names and "alone" not in names
    assert "| joint | mnist | 400 | 76.0 |" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| alone | shifted |"))
    assert row.count("|") == 7 and "|  |" in row


def test_overridden_gates_are_shown_with_their_reasons(
    made: tuple[Artifacts, Params], tmp_path: Path
) -> None:
    assert "overridden" not in made[0].report().read_text()
    assert "Overridden" not in made[0].results().read_text()
    raw = {**raw_params(), "gates": {"override": {"leak mnist": f"known {HOSTILE}"}}}
    artifacts = experiment(tmp_path, raw)
    write_reports(artifacts, params.validate(raw))
    text = html.unescape(artifacts.report().read_text())
    assert f"<li><b>leak mnist</b>: known {HOSTILE}</li>" in text
    assert "<script" not in artifacts.report().read_text()
    assert "## Overridden gates\n\n- leak mnist: known" in artifacts.results().read_text()


# Figures.


def test_difference_is_newcombes_method_10() -> None:
    # Newcombe (1998), table II, example (a): 56/70 - 48/80, method 10: 0.0524 to 0.3339.
    left, right = Estimate(56 / 70, *wilson(56, 70)), Estimate(48 / 80, *wilson(48, 80))
    difference = left - right
    assert difference.value == pytest.approx(0.2)
    assert difference.low == pytest.approx(0.0524, abs=5e-5)
    assert difference.high == pytest.approx(0.3339, abs=5e-5)


def test_ratio_bounds_are_where_the_difference_touches_zero() -> None:
    top, bottom = Estimate(0.6, 0.52, 0.67), Estimate(0.8, 0.71, 0.86)
    found = summaries.ratio(top, bottom)

    def scaled(r: float) -> Estimate:
        return Estimate(r * bottom.value, r * bottom.low, r * bottom.high)

    assert found.value == pytest.approx(0.75)
    assert (top - scaled(found.low)).low == pytest.approx(0.0, abs=1e-12)
    assert (top - scaled(found.high)).high == pytest.approx(0.0, abs=1e-12)


def test_ratio_to_a_figure_known_exactly_scales_the_bounds() -> None:
    found = summaries.ratio(Estimate(0.4, 0.3, 0.6), Estimate(0.5, 0.5, 0.5))
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.6, 1.2))


@pytest.mark.parametrize(
    ("correct", "against"), [(0, 5), (10, 10), (0, 10), (10, 1), (1, 1), (5, 1), (3, 10)]
)
def test_ratio_of_small_counts_holds_its_value(correct: int, against: int) -> None:
    top, bottom = (Estimate(c / 10, *wilson(c, 10)) for c in (correct, against))
    found = summaries.ratio(top, bottom)
    assert 0 <= found.low <= found.value <= found.high < math.inf
    if correct == against == 10:
        assert found.high > 1.05  # a normal approximation on the log scale has no width here
        assert found.low < 0.95


def test_ratio_to_nothing_is_undefined() -> None:
    zero = Estimate(0.0, 0.0, 0.3)
    assert math.isnan(summaries.ratio(Estimate(0.5, 0.4, 0.6), zero).value)
    unbounded = summaries.ratio(Estimate(0.5, 0.4, 0.6), Estimate(0.1, -0.1, 0.2))
    assert unbounded.high == math.inf
    assert unbounded.low < unbounded.value == 5.0


def test_mean_of_independent_estimates_narrows_with_the_root() -> None:
    found = summaries.mean([Estimate(0.5, 0.4, 0.7)] * 4)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.45, 0.6))


def test_verdict_needs_the_whole_interval() -> None:
    assert Estimate(0.97, 0.95, 1.0).verdict(0.95) == "above"
    assert Estimate(0.97, 0.94, 1.0).verdict(0.95) == "open"
    assert Estimate(0.9, 0.88, 0.94).verdict(0.95) == "below"


def test_forgotten_is_the_share_of_what_lay_above_chance() -> None:
    seen = Scores.gather(
        [evaluation([("pretrained", "digits"), ("finetuned", "digits")], 3, 0),
         evaluation([("forget", "digits")], 3, 0)]
    )  # fmt: skip
    # 0.64 - 0.1 before, 0.31 - 0.1 after: 0.33 / 0.54 is gone.
    gone = seen.forgotten("forget", "digits")
    assert seen.above_chance("pretrained", "digits").value == pytest.approx(0.54)
    assert gone.value == pytest.approx(0.33 / 0.54)
    assert gone.low < gone.value < gone.high < 1


def test_normalized_is_the_mean_of_ratios_to_the_experts(made: tuple[Artifacts, Params]) -> None:
    artifacts, _ = made
    names = ["mnist", "digits", "sum"]
    seen = Scores.gather(
        tables.read(artifacts.evaluation(name, 3), tables.Evaluation) for name in names
    )
    assert seen.normalized("sum", ["mnist", "digits"]).value == pytest.approx(0.8)
    with pytest.raises(MissingArtifact, match="no row for 'sum' on 'shifted'"):
        seen.score("sum", "shifted")


def test_gains_compare_with_the_best_single_vector_and_the_plain_sum(
    made: tuple[Artifacts, Params],
) -> None:
    artifacts, checked = made
    group = ["alone", "likeness", "added"]
    seen = Scores.gather(
        tables.read(artifacts.evaluation(name, 3), tables.Evaluation)
        for name in ("shifted", *group)
    )
    found = summaries.gains(seen, "shifted", {name: checked.parse(name) for name in group})
    assert found.single == "alone"
    assert [row.edit for row in found.rows] == ["added", "likeness", "alone"]
    likeness = found.rows[1]
    assert likeness.over_pretrained.value == pytest.approx(93 / 300)
    assert likeness.over_single is not None
    assert likeness.over_single.value == pytest.approx(39 / 300)
    assert likeness.plain is not None
    assert likeness.plain[0] == "added"
    assert likeness.plain[1].value == pytest.approx(-12 / 300)
    assert likeness.plain[1].verdict(0) == "open"
    assert found.rows[2].over_single is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.871, "87.1"), (-0.032, "\u22123.2"), (-0.0001, "0.0"), (math.inf, "\u221e"),
     (-math.inf, "\u2212\u221e"), (math.nan, "undefined")],
)  # fmt: skip
def test_percent_is_written_with_one_decimal(value: float, text: str) -> None:
    assert percent(value) == text


def test_cosines_have_no_negative_zero() -> None:
    assert [findings.cosine_text(v) for v in (0.1625, -0.0001, -0.5)] == [
        "0.163", "0.000", "\u22120.500"
    ]  # fmt: skip


def test_differences_carry_their_sign() -> None:
    assert [signed(v) for v in (0.1, -0.1, 0.0, -1e-9)] == ["+10.0", "\u221210.0", "0.0", "0.0"]


# The stage graph.


def test_stage_graph_expands_names_as_dvc_prints_them(tmp_path: Path) -> None:
    write_text(tmp_path / "dvc.yaml", DVC)
    write_text(tmp_path / "edits" / "dvc.yaml", EDITS_DVC)
    stages = {stage.name: stage for stage in graph.stage_graph(tmp_path)}
    assert "prepare@shifted" in stages
    assert stages["fine_tune@mnist-5"].deps == (
        "data/checkpoints/pretrained.safetensors",
        "data/prepared/mnist",
    )
    assert stages["fine_tune@mnist-5"].outs == (
        "data/checkpoints/mnist-5.safetensors",
        "data/training/mnist-5.csv",
    )
    assert stages["prepare@mnist"].outs[0] == "data/prepared/mnist/summary.json"
    combine = stages["combine-sum-3"]
    assert (combine.kind, combine.item) == ("combine", "sum-3")
    assert combine.outs == ("data/edits/sum-3/basis.safetensors",)
    assert (stages["pretrain"].kind, stages["pretrain"].item) == ("pretrain", "")
    found = graph.edges(stages.values())
    assert ("prepare@mnist", "fine_tune@mnist-5") in found  # a directory above the file
    assert ("fine_tune@digits-3", "combine-sum-3") in found


def test_stage_graph_of_mappings_and_lists_of_mappings(tmp_path: Path) -> None:
    text = (
        "stages:\n  named:\n    foreach: {x: {size: 1}, y: {size: 2}}\n    do:\n"
        "      outs: ['${key}/${item.size}/${item.none}']\n"
        "  numbered:\n    foreach: [{size: 7}]\n    do:\n      deps: ['x/${item.size}']\n"
    )
    write_text(tmp_path / "dvc.yaml", text)
    stages = graph.stage_graph(tmp_path)
    assert [stage.name for stage in stages] == ["named@x", "named@y", "numbered@0"]
    assert stages[1].outs == ("y/2/${item.none}",)
    assert stages[2].deps == ("x/7",)
    assert graph.edges(stages) == []


def test_columns_split_a_kind_that_stands_on_both_sides(tmp_path: Path) -> None:
    write_text(tmp_path / "dvc.yaml", DVC)
    write_text(tmp_path / "edits" / "dvc.yaml", EDITS_DVC)
    stages = graph.ancestors(graph.stage_graph(tmp_path), "report")
    names = {stage.name for stage in stages}
    assert "fine_tune@mnist-3" in names
    assert not names & {"fine_tune@mnist-5", "fine_tune@shifted-3", "prepare@shifted"}
    found = [stack[0].kind for stack in graph.columns(stages)]
    assert found == [
        "prepare", "pretrain", "fine_tune", "combine", "evaluate", "evaluate", "report",
    ] or found == [
        "prepare", "pretrain", "fine_tune", "evaluate", "combine", "evaluate", "report",
    ]  # fmt: skip
    position = {s.name: i for i, stack in enumerate(graph.columns(stages)) for s in stack}
    assert all(position[left] < position[right] for left, right in graph.edges(stages))
    assert graph.ancestors(stages, "unknown") == stages


def test_the_projects_own_stage_graph_leads_to_the_page() -> None:
    stages = graph.ancestors(graph.stage_graph(REPOSITORY), "report")
    kinds = {stage.kind for stage in stages}
    assert {"prepare", "pretrain", "fine_tune", "combine", "search", "evaluate"} <= kinds


def test_stage_graph_without_dvc_yaml_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match="dvc.yaml does not exist"):
        graph.stage_graph(tmp_path)


# Both reports.


def test_reports_are_the_same_bytes_again_and_elsewhere(
    made: tuple[Artifacts, Params], tmp_path: Path
) -> None:
    artifacts, _ = made
    first = [digest(artifacts.report()), digest(artifacts.results())]
    experiment(tmp_path, raw_params())
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.test_report import Artifacts, params, raw_params, write_reports\n"
        "write_reports(Artifacts(Path(sys.argv[1])), params.validate(raw_params()))\n"
    )
    # A matplotlibrc in the working directory, another time zone, hash seed and locale.
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nsvg.fonttype: path\n")
    environment = {
        **os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Kathmandu", "LC_ALL": "C",
        "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, cwd=tmp_path
    )
    second = Artifacts(tmp_path)
    assert [digest(second.report()), digest(second.results())] == first


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_reports_hold_no_address_path_or_date(made: tuple[Artifacts, Params]) -> None:
    artifacts, _ = made
    for path in (artifacts.report(), artifacts.results()):
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|//[a-z]+\.", text)
        assert str(artifacts.root) not in text
        assert str(REPOSITORY) not in text
        assert " object at 0x" not in text
        assert not re.search(r"(?<![\w<.])/(home|tmp|usr|work|root|var)\b", text)
        assert not re.search(r"\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d|dc:date", text)


class Page(HTMLParser):
    """Collects the tables, ids and tags of a page."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += f"{data} "


def parsed(artifacts: Artifacts) -> Page:
    page = Page()
    page.feed(artifacts.report().read_text())
    assert page.open == []
    return page


def test_page_shows_the_accuracies_with_their_intervals(made: tuple[Artifacts, Params]) -> None:
    artifacts, _ = made
    table = parsed(artifacts).tables[0]
    header = [cell.strip() for cell in table[0]]
    for row in table[1:]:
        words = row[0].split()
        model = {"pre-trained": "pretrained", "fine-tuned": "finetuned"}.get(words[0], words[0])
        for task in SIZES:
            cell = row[header.index(task)]
            if (model, task) not in CORRECT:
                assert "not evaluated" in cell
                continue
            correct, items = CORRECT[model, task][1], SIZES[task][1]
            low, high = wilson(correct, items)
            expected = [f"{100 * x:.1f}" for x in (correct / items, low, high)]
            assert re.findall(r"\d+\.\d", cell) == expected
    merged = next(row for row in table if row[0].startswith("sum"))
    assert re.findall(r"\d+\.\d", merged[-1])[0] == "80.0"  # (0.76/0.95 + 0.76/0.95) / 2


def test_page_says_whether_the_constraint_holds_on_both_splits(
    made: tuple[Artifacts, Params],
) -> None:
    artifacts, _ = made
    table = parsed(artifacts).tables[1]
    row = next(row for row in table if row[0].startswith("forget"))
    # validation 116/120, test 228/240: 96.7 and 95.0 percent of the pre-trained model's.
    assert "96.7" in row[-2]
    assert "95.0" in row[-1]
    assert all("does not settle it" in " ".join(cell.split()) for cell in row[-2:])
    assert all("share of accuracy kept on mnist" in cell for cell in row[-2:])
    assert "open on test data: an interval holds the bound" in row[-1]
    text = artifacts.results().read_text()
    assert "Constraint on validation data: share of accuracy kept, at least 95 %." in text
    assert "On test data the edit is open for seed 3 and open for seed 5 (open: " in text


@pytest.mark.parametrize(
    ("metric", "bound", "asked", "figure", "value"),
    [
        ("accuracy", {"min_ratio": 0.95}, "at least 95 %", "share of accuracy kept",
         "50.0 % (40.0 to 60.0)"),
        ("accuracy", {"min": 0.8}, "at least 80 %", "accuracy", "50.0 % (40.0 to 60.0)"),
        ("accuracy", {"max_drop": 0.03}, "at most 3 points", "drop in accuracy",
         "50.0 points (40.0 to 60.0)"),
        ("loss", {"max": 0.7}, "at most 0.7 nats", "loss", "0.5 nats (0.4 to 0.6)"),
        ("loss", {"max_ratio": 1.1}, "at most 110 %",
         "loss as a share of the pre-trained model's", "50.0 % (40.0 to 60.0)"),
        ("perplexity", {"max_rise": 0.5}, "at most 0.5", "rise in perplexity",
         "0.5 (0.4 to 0.6)"),
    ],
)  # fmt: skip
def test_every_kind_of_constraint_has_its_words(
    metric: str, bound: dict[str, float], asked: str, figure: str, value: str
) -> None:
    rule = params.Constraint.model_validate({"tasks": ["x"], "metric": metric, **bound})
    words = findings.wording(rule)
    assert (words.asked, words.figure) == (asked, figure)
    assert words.value(Estimate(0.5, 0.4, 0.6)) == value


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [
        ({"metric": "loss", "max": 3.0}, "feasible on test data"),
        ({"metric": "perplexity", "max": 2.0}, "infeasible on test data: not to be used"),
        ({"max_drop": 0.0}, "open on test data: an interval holds the bound"),
    ],
)
def test_reports_say_of_every_constraint_whether_it_holds_on_test_data(
    bound: dict[str, Any], verdict: str, tmp_path: Path
) -> None:
    raw = raw_params()
    raw["edits"]["forget"]["constraint"] = {"tasks": ["mnist"], **bound}
    artifacts = experiment(tmp_path, raw)
    write_reports(artifacts, params.validate(raw))
    row = next(row for row in parsed(artifacts).tables[1] if row[0].startswith("forget"))
    assert verdict in row[-1]
    word = verdict.split()[0]
    text = artifacts.results().read_text()
    assert f"On test data the edit is {word} for seed 3 and {word} for seed 5 (open: " in text


def test_the_mean_of_figures_has_a_normal_interval() -> None:
    found = Estimate.of_mean(np.array([1.0, 2.0, 3.0, 6.0], dtype=np.float32))
    spread = 1.959963984540054 * math.sqrt((4 + 1 + 0 + 9) / 3 / 4)
    assert (found.value, found.high) == pytest.approx((3.0, 3.0 + spread))
    assert found.low == pytest.approx(3.0 - spread)
    assert Estimate.of_mean([0.0, 0.0, 9.0]).low == 0.0
    assert Estimate.of_mean([2.0]) == Estimate(2.0, 2.0, 2.0)


def test_page_is_well_formed_with_unique_ids_and_labelled_figures(
    made: tuple[Artifacts, Params],
) -> None:
    artifacts, _ = made
    text, page = artifacts.report().read_text(), parsed(artifacts)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("caption") == page.tags.count("table") > 5
    assert not {"script", "iframe", "object", "img"} & set(page.tags)
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(figures) == 5 + 1 + 3  # searches, group; cosines, losses, stages
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert len(root.get("aria-label", "")) > 30
        references = re.findall(r'(?:url\(#|href="#)([^")]+)', figure)
        assert set(references) <= set(page.ids)


def test_page_escapes_what_users_write(made: tuple[Artifacts, Params]) -> None:
    artifacts, _ = made
    text = artifacts.report().read_text()
    assert "<script" not in text
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;") in text


def test_pictures_escape_their_labels() -> None:
    bar = pictures.Bar(f"$x$ & {HOSTILE}", Estimate(0.5, 0.4, 0.6))
    figure = pictures.bars([bar], "ident", f'" onload="{HOSTILE}')
    assert "<script" not in figure
    assert "onload=" not in ElementTree.fromstring(figure).attrib
    assert "$x$ &amp; " in figure
    node = pictures.Node("a&b", HOSTILE, 0)
    assert "<script" not in pictures.graph(["a<b"], [node], [], "graph", HOSTILE)


def test_pictures_leave_matplotlibs_settings_alone() -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 3.25}):
        before = dict(matplotlib.rcParams)
        pictures.bars([pictures.Bar("a", Estimate(0.5, 0.4, 0.6))], "ident", "label")
        assert dict(matplotlib.rcParams) == before


def test_search_of_three_coefficients_has_a_panel_each() -> None:
    values = [0.0, 0.5, 1.0]
    table = pd.DataFrame(
        [
            {"coefficient.a": a, "coefficient.b": b, "coefficient.d": d,
             "objective": 0.5 + 0.1 * a - 0.1 * b * d, "feasible": a < 1,
             "chosen": (a, b, d) == (0.5, 0.0, 0.0)}
            for a, b, d in itertools.product(values, repeat=3)
        ]
    )  # fmt: skip
    figure = pictures.profiles(
        table, ["a", "b", "d"], pictures.PERCENT, largest=True, ident="p", label="label"
    )
    assert all(f"{name} = {value}" in figure for name, value in {"a": 0.5, "b": 0, "d": 0}.items())


def test_search_of_one_point_is_drawn() -> None:
    table = pd.DataFrame(
        {"coefficient.c": [0.3], "accuracy.x": [0.5], "objective": [0.7], "feasible": [False],
         "chosen": [True]}
    )  # fmt: skip
    assert "c = 0.3" in pictures.curves(
        table, "c", "accuracy", pictures.PERCENT, ["x"], "one", "label"
    )


def test_search_by_loss_is_drawn_in_nats() -> None:
    table = pd.DataFrame(
        {"coefficient.c": [0.0, 0.5, 1.0], "accuracy.x": [0.1, 0.2, 0.3], "loss.x": [2.2, 1.4, 0.9],
         "objective": [2.2, 1.4, 0.9], "feasible": True, "chosen": [False, False, True]}
    )  # fmt: skip
    figure = pictures.curves(table, "c", "loss", pictures.NATS, ["x"], "one", "label")
    assert "validation, nats" in figure and "%" not in "".join(
        re.findall(r">([^<]*)</text>", figure)
    )
    ticks = [float(text) for text in re.findall(r">([\d.]+)</text>", figure)]
    assert max(ticks) < 3


def test_results_show_every_seed_the_mean_and_the_range(made: tuple[Artifacts, Params]) -> None:
    artifacts, _ = made
    text = artifacts.results().read_text()
    assert text.startswith("<!-- written by the report stage; do not edit -->\n")
    # 304/400 and 305/400, 76.0 and 76.2: mean 76.1.
    line = next(line for line in text.splitlines() if line.startswith("| sum | mnist |"))
    low, high = (f"{100 * x:.1f}" for x in wilson(304, 400))
    assert line.startswith(f"| sum | mnist | 400 | 76.1 [76.0 to 76.2] | 76.0 ({low} to {high}) | ")
    assert "## sum: mean normalised accuracy" in text
    gain = 0.8 - (240 / 380 + 192 / 285) / 2
    assert f"+{100 * gain:.1f} (" in text
    assert "a gain is supported in 2 of 2 seeds" in text
    assert "the closest two are" in text
    assert "against added, the same without the minus term, neither gain nor loss is shown" in text


def test_results_of_one_seed_have_no_mean(made: tuple[Artifacts, Params]) -> None:
    artifacts, checked = made

    one = checked.model_copy(update={"seeds": [3]})
    text = results.render([findings.gather(artifacts, one, 3)], one)
    assert "[range]" not in text
    assert "of 1 seeds" not in text


def test_every_row_of_a_results_table_has_as_many_cells_as_its_header(
    made: tuple[Artifacts, Params],
) -> None:
    artifacts, _ = made
    for part in artifacts.results().read_text().split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_experiment_without_edits_has_a_page(tmp_path: Path) -> None:
    raw = {**raw_params(), "edits": {}, "seeds": [3]}
    artifacts = experiment(tmp_path, raw)
    write_reports(artifacts, params.validate(raw))
    assert "No edits are declared" in artifacts.report().read_text()
    assert "## Accuracy" in artifacts.results().read_text()


def test_experiment_of_one_task_has_a_page(tmp_path: Path) -> None:
    raw = raw_params()
    raw["tasks"] = {"mnist": raw["tasks"]["mnist"]}
    raw["edits"] = {
        "forget": {
            **raw["edits"]["forget"], "expression": "-c * mnist", "evaluate": ["mnist"],
            "objective": {"minimize": "accuracy", "tasks": ["mnist"]}, "constraint": None,
        }
    }  # fmt: skip
    stored = {**raw, "edits": {"forget": {**raw["edits"]["forget"], "constraint": {}}}}
    artifacts = experiment(tmp_path, stored)
    write_reports(artifacts, params.validate(raw))
    assert "cosine" not in artifacts.results().read_text().lower()


def test_missing_artifacts_and_unknown_pages_are_named(
    made: tuple[Artifacts, Params], tmp_path: Path
) -> None:
    _, checked = made
    artifacts = experiment(tmp_path, raw_params())
    artifacts.coefficients("sum", 5).unlink()
    with pytest.raises(MissingArtifact, match=r"sum-5/coefficients\.json does not exist"):
        report(artifacts, page="results", params=checked, emit=lambda progress: None)
    assert not artifacts.results().exists()
    with pytest.raises(InvalidInput, match="no page 'pages'; did you mean 'page'"):
        report(artifacts, page="pages", params=checked, emit=lambda progress: None)


# In a browser.


@pytest.mark.system
@pytest.mark.parametrize(
    ("scheme", "width", "scripts"),
    [("light", 1280, True), ("dark", 1280, True), ("light", 400, True), ("light", 1280, False)],
)
def test_page_opens_offline_without_overflow(
    made: tuple[Artifacts, Params], scheme: Any, width: int, scripts: bool
) -> None:
    program = require_program("chromium")
    from playwright.sync_api import sync_playwright

    address = made[0].report().as_uri()
    arguments = [
        "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    requests: list[str] = []
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        context = browser.new_context(
            color_scheme=scheme, offline=True, java_script_enabled=scripts,
            viewport={"width": width, "height": 900},
        )  # fmt: skip
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        figures = page.locator("figure svg")
        boxes = [figures.nth(i).bounding_box() for i in range(figures.count())]
        if scripts:
            widths = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert widths[0] <= widths[1]
        browser.close()
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert complaints == []
    assert len(boxes) == 9
    assert all(box and box["width"] > 100 and box["height"] > 50 for box in boxes)
