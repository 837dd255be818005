"""The stages that DVC's own templates cannot express: rendered with exact dependencies.

Each function yields (name, block) for one item and one seed. Paths are relative to the directory
of params.yaml; nothing from params.yaml but checked names and numbers enters a command.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.artifacts import Artifacts
from taskvec.params import Params

Block = tuple[str, dict[str, Any]]

FILES = Artifacts(Path())
# seconds
TIMEOUTS = {
    "fine_tune": 14400, "extract": 600, "combine": 600, "search": 14400, "evaluate": 3600,
    "sweep": 43200, "few_shot": 14400,
}  # fmt: skip
CPU_STAGES = ("extract", "combine")
PACKAGES = {
    "fine_tune": ["packages.torch"],
    "extract": ["packages.numpy"],
    "combine": ["packages.numpy", "packages.torch"],
    "search": ["packages.numpy", "packages.torch"],
    "evaluate": ["packages.torch", "packages.matplotlib"],
    "sweep": ["packages.numpy", "packages.torch"],
    "few_shot": ["packages.torch"],
}
# by strategy of a search
USED = {"tpe": ["packages.optuna"], "cma_es": ["packages.cmaes"]}


def of_seed(params: Params, seed: int) -> Iterator[Block]:
    """Yield every rendered stage of one seed, in an order in which they can run."""
    for variant in params.variants:
        yield from variant_stages(variant, seed, params)
    for edit, recipe in params.edits.items():
        if seed in params.seeds_of(recipe):
            yield from edit_stages(edit, seed, params)
    for sweep, swept in params.sweeps.items():
        if seed in params.seeds_of(swept):
            yield sweep_stage(sweep, seed, params)
    for few, study in params.few_shots.items():
        if seed in params.seeds_of(study):
            yield few_shot_stage(few, seed, params)


def variant_stages(variant: str, seed: int, params: Params) -> Iterator[Block]:
    """Yield fine_tune, extract and evaluate of a variant."""
    recipe = params.variants[variant]
    yield _stage(
        "fine_tune", variant, seed,
        deps=[FILES.pretrained()] + _heads(recipe.of) + _images(recipe.of, "train", "validation"),
        params=["model", "fine_tune", f"variants.{variant}.of", f"variants.{variant}.fine_tune"],
        outs=[FILES.checkpoint(variant, seed)],
        plots=[{str(FILES.training(variant, seed)): {"x": "step", "y": "loss"}}],
    )  # fmt: skip
    yield _stage(
        "extract", variant, seed,
        deps=[FILES.pretrained(), FILES.checkpoint(variant, seed)],
        params=[],
        outs=[FILES.vector(variant, seed)],
    )  # fmt: skip
    on = params.evaluated(variant)
    keys = [f"variants.{variant}.{'evaluate' if recipe.evaluate else 'of'}"]
    yield _evaluate(variant, seed, FILES.checkpoint(variant, seed), on, recipe.of, keys, params)


def edit_stages(edit: str, seed: int, params: Params) -> Iterator[Block]:
    """Yield combine, search and evaluate of an edit."""
    recipe = params.edits[edit]
    vectors = params.parse(edit).vectors
    searched = sorted(
        {*recipe.objective.tasks, *(recipe.constraint.tasks if recipe.constraint else [])}
    )
    yield _stage(
        "combine", edit, seed,
        deps=[FILES.vector(name, seed) for name in vectors],
        params=[f"edits.{edit}.expression"],
        outs=[FILES.basis(edit, seed)],
        code=f"combine.{edit}",
    )  # fmt: skip
    given = recipe.model_fields_set
    searching = ("coefficients", "objective", "constraint", "select", "search")
    yield _stage(
        "search", edit, seed,
        deps=[FILES.pretrained(), FILES.basis(edit, seed)]
        + _heads(searched) + _images(searched, "validation")
        + [FILES.evaluation(task, seed) for task in searched],
        params=[f"edits.{edit}.{key}" for key in searching if key in given] + ["model"],
        outs=[FILES.edited(edit, seed)],
        metrics=[FILES.coefficients(edit, seed)],
        plots=[{str(FILES.search_table(edit, seed)): {
            "x": f"coefficient.{min(recipe.coefficients)}", "y": "objective"}}],
        code=f"search.{edit}",
        packages=USED.get(recipe.search.strategy, []),
    )  # fmt: skip
    keys = [
        f"edits.{edit}.{key}"
        for key in ("evaluate", "constraint")
        if key in recipe.model_fields_set
    ]
    learnt = list(dict.fromkeys(task for name in vectors for task in params.learnt(name)))
    yield _evaluate(edit, seed, FILES.edited(edit, seed), recipe.evaluate, learnt, keys, params)


def sweep_stage(sweep: str, seed: int, params: Params) -> Block:
    """Return the stage of a sweep."""
    tasks = params.sweeps[sweep].vectors
    return _stage(
        "sweep", sweep, seed,
        deps=[FILES.pretrained()] + [FILES.vector(task, seed) for task in tasks]
        + _heads(tasks) + _images(tasks, "validation", "test")
        + [FILES.evaluation(task, seed) for task in tasks],
        params=[f"sweeps.{sweep}", "model"],
        outs=[FILES.sweep_table(sweep, seed), FILES.sweep_chosen(sweep, seed)],
    )  # fmt: skip


def few_shot_stage(name: str, seed: int, params: Params) -> Block:
    """Return the stage that fine-tunes on a few labelled images a class."""
    few = params.few_shots[name]
    return _stage(
        "few_shot", name, seed,
        deps=[FILES.pretrained()] + [FILES.edited(edit, seed) for edit in few.edits]
        + _heads([few.task]) + _images([few.task], "train", "validation", "test"),
        params=[f"few_shots.{name}", "model", "fine_tune"],
        outs=[FILES.few_shot(name, seed)],
    )  # fmt: skip


def _evaluate(
    name: str, seed: int, model: Path, on: list[str], learnt: list[str], keys: list[str],
    params: Params,
) -> Block:  # fmt: skip
    gates = ["gates"] if "gates" in params.model_fields_set else []
    return _stage(
        "evaluate", name, seed,
        deps=[FILES.pretrained(), model] + _heads(on) + _images(on, "validation", "test")
        + [FILES.evaluation(task, seed) for task in on]
        + [FILES.items(task) for task in dict.fromkeys([*on, *learnt])],
        params=[*keys, "model", *gates],
        outs=[FILES.evaluation(name, seed), FILES.figure(name, seed)],
        metrics=[FILES.metrics(name, seed)],
    )  # fmt: skip


def _heads(tasks: Sequence[str]) -> list[Path]:
    return [FILES.head(task) for task in tasks]


def _images(tasks: Sequence[str], *splits: str) -> list[Path]:
    return [FILES.images(task, split) for task in tasks for split in splits]


def _stage(
    stage: str,
    name: str,
    seed: int,
    *,
    deps: list[Path],
    params: list[str],
    outs: list[Path],
    metrics: list[Path] | None = None,
    plots: list[Any] | None = None,
    code: str = "",
    packages: Sequence[str] = (),
) -> Block:
    block: dict[str, Any] = {
        "cmd": f"python -m tasks {stage} {name}-{seed}",
        "deps": sorted({str(path) for path in deps}),
        "params": [*params, {"code.yaml": ["python", *PACKAGES[stage], *packages, code or stage]}],
        "outs": [str(path) for path in outs],
    }
    if metrics:
        block["metrics"] = [str(path) for path in metrics]
    if plots:
        block["plots"] = plots
    block["meta"] = {"gpu": int(stage not in CPU_STAGES), "timeout": TIMEOUTS[stage]}
    return f"{stage}-{name}-{seed}", block
