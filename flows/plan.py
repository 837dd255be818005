"""params.yaml -> what DVC reads: code.yaml, edits/dvc.yaml, results/dvc.yaml, lists in dvc.yaml.

DVC cannot give a templated stage a list of dependencies, so the stages of edits are rendered: each
edit depends on exactly the vectors that it names. Nothing from params.yaml but checked names and
numbers enters a command. Run `python -m flows.plan` to render, `--check` to compare; every command
of `taskvec` renders first. This module imports nothing heavy.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError

from flows.fingerprints import Code
from tasks.artifacts import Artifacts
from tasks.stages import NAMES
from taskvec import params as parameters
from taskvec.atomic import write_text
from taskvec.errors import InvalidInput, InvalidParams, StaleRendering, TaskvecError
from taskvec.params import Params

OVERLOOKED = ("nfiles", "size")  # by dvc.stage.cache
SOURCES = Path(__file__).parents[1]
PACKAGES = ("jinja2", "matplotlib", "numpy", "pillow", "torch")
ARITHMETIC = "taskvec.numeric:make_deterministic"  # decides the last bit of every stage
NOTE = "# Rendered from params.yaml and dvc.yaml by `python -m flows.plan`; do not edit.\n"
CODE_NOTE = (
    "# Digests of the code that each stage reaches and versions that decide results, rendered by\n"
    "# `python -m flows.plan`; do not edit.\n"
)
TIMEOUTS = {"combine": 600, "search": 14400, "evaluate": 3600}  # seconds


def render(root: Path, params: Params) -> dict[Path, str]:
    """Return the text of every rendered file, by path."""
    _refuse_overlooked(params.model_dump(), "")
    files = Artifacts(Path())
    stages = _load(root / "dvc.yaml")
    try:
        _fill_lists(stages["stages"], params, files)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{root / 'dvc.yaml'} lacks a list that is kept equal to params.yaml "
            f"({type(error).__name__}: {error}); `git diff dvc.yaml` shows what was edited"
        ) from None
    first, further = params.seeds[0], params.seeds[1:]
    edits = {
        name: stage
        for edit in params.edits
        for name, stage in _edit_stages(edit, first, params, files)
    }
    results = dict(_seed_stages(stages["stages"], further))
    for seed in further:
        for edit in params.edits:
            results.update(_edit_stages(edit, seed, params, files))
    results["report-results"] = {
        "wdir": "..",
        "desc": "the table of results over all seeds, committed to git",
        "cmd": "python -m tasks report results",
        "deps": _report_inputs(params, params.seeds, files),
        "params": deepcopy(stages["stages"]["report"]["params"]),
        "outs": [{str(files.results()): {"cache": False}}],
        "meta": {"gpu": 0, "timeout": 600},
    }
    main, more = _dump(stages), NOTE + _dump({"stages": edits})
    # The page draws the graph, and DVC lets no stage depend on a dvc.yaml.
    graph = hashlib.md5((main + more).encode(), usedforsecurity=False).hexdigest()
    return {
        root / "code.yaml": CODE_NOTE + _dump({**code_fingerprints(params), "graph": graph}),
        root / "dvc.yaml": main,
        root / "edits" / "dvc.yaml": more,
        root / "results" / "dvc.yaml": NOTE + _dump({"stages": results}),
    }


def write(root: Path, params: Params) -> list[Path]:
    """Render, write what differs and return its paths."""
    changed = []
    for path, text in render(root, params).items():
        if not path.is_file() or path.read_text() != text:
            write_text(path, text)
            changed.append(path)
    return changed


def check(root: Path, params: Params) -> None:
    """Raise StaleRendering if a rendered file differs from what its sources say."""
    for path, text in render(root, params).items():
        if not path.is_file() or path.read_text() != text:
            raise StaleRendering(
                f"{path.relative_to(root)} does not match params.yaml or the code; "
                "run `taskvec status`, which renders it anew and says what is stale"
            )


def code_fingerprints(params: Params) -> dict[str, Any]:
    """Return the contents of code.yaml: versions, and a digest of the code of every stage."""
    code = Code(SOURCES)
    family = f"taskvec.models.{params.model.family}"
    result: dict[str, Any] = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        # The local part (+cpu, +cu130) is no reason to rerun: results then agree to rounding.
        "packages": {name: version(name).split("+")[0] for name in PACKAGES},
        # What of the model decides the pictures; the rest of it does not rerun `prepare`.
        "pictures": {
            "image_size": params.model.image_size or f"that of {_architecture(params)}",
            "shots": params.model.shots,
        },
    }
    for stage in NAMES:
        own = [f"tasks.{stage}:{stage}", ARITHMETIC]
        if stage == "prepare":
            result[stage] = {
                task: code.fingerprint([*own, f"taskvec.datasets.{item.data.dataset}"])
                for task, item in params.tasks.items()
            }
        elif stage == "combine":
            used = {edit: params.parse(edit).methods for edit in params.edits}
            digests = {
                methods: code.fingerprint([*own, *(f"taskvec.merging.{m}" for m in methods)])
                for methods in set(used.values())
            }
            result[stage] = {edit: digests[methods] for edit, methods in used.items()}
        elif stage in ("extract", "report"):
            result[stage] = code.fingerprint(own)
        else:
            result[stage] = code.fingerprint([*own, family])
    return result


def _architecture(params: Params) -> str:
    return str(params.model.options.get("name", params.model.family))


def _refuse_overlooked(value: Any, where: str) -> None:
    """Raise InvalidParams for a key that DVC leaves out of its run cache's key, at any depth.

    A change of its value would be answered with the outputs of the old one.
    """
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in OVERLOOKED:
            raise InvalidParams(
                f"params.yaml: {where}{key}: DVC's run cache overlooks keys called "
                f"{' and '.join(OVERLOOKED)}; choose another name"
            )
        _refuse_overlooked(item, f"{where}{key}.")


def _fill_lists(stages: Any, params: Params, files: Artifacts) -> None:
    """Set the lists in dvc.yaml that follow params.yaml."""
    _fill(stages["prepare"]["foreach"], list(params.tasks), flow=True)
    for stage in stages.values():
        if "matrix" in stage:
            _fill(stage["matrix"]["seed"], params.seeds[:1], flow=True)
    _fill(
        stages["pretrain"]["deps"],
        [str(files.images(task, "alignment")) for task in params.model.align_tasks],
    )
    inputs = ["tasks/report.html.jinja", *_report_inputs(params, params.seeds[:1], files)]
    _fill(stages["report"]["deps"], inputs)


def _fill(sequence: CommentedSeq, items: Sequence[Any], *, flow: bool = False) -> None:
    """Replace the items in place, since `tasks` is one list under several names."""
    sequence[:] = items
    if flow or not items:
        sequence.fa.set_flow_style()
    else:
        sequence.fa.set_block_style()


def _report_inputs(params: Params, seeds: list[int], files: Artifacts) -> list[str]:
    paths = []
    for seed in seeds:
        for task in params.tasks:
            paths += [
                files.evaluation(task, seed), files.training(task, seed), files.vector(task, seed),
            ]  # fmt: skip
        for edit in params.edits:
            paths += [
                files.evaluation(edit, seed),
                files.search_table(edit, seed),
                files.coefficients(edit, seed),
            ]
    return sorted(str(path) for path in paths)


def _seed_stages(stages: Any, seeds: list[int]) -> Iterator[tuple[str, Any]]:
    """Yield the blocks of dvc.yaml that have a seed, for other seeds."""
    for name, stage in stages.items():
        if "matrix" in stage and seeds:
            block = parameters.plain(stage)
            block["matrix"]["seed"] = seeds
            yield name, {"wdir": "..", **block}


def _edit_stages(
    edit: str, seed: int, params: Params, files: Artifacts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield combine, search and evaluate of one edit, with exact dependencies."""
    recipe = params.edits[edit]
    searched = sorted(
        {*recipe.objective.tasks, *(recipe.constraint.tasks if recipe.constraint else [])}
    )
    evaluated = list(recipe.evaluate)
    own = params.tasks
    yield from _stage(
        "combine", edit, seed,
        deps=[files.vector(name, seed) for name in params.parse(edit).vectors],
        params=["expression"],
        outs=[files.basis(edit, seed)],
    )  # fmt: skip
    yield from _stage(
        "search", edit, seed,
        deps=[files.pretrained(), files.basis(edit, seed)]
        + [files.head(task) for task in searched]
        + [files.images(task, "validation") for task in searched]
        + [files.evaluation(task, seed) for task in searched if task in own],
        params=[
            key
            for key in ("coefficients", "objective", "constraint", "select")
            if key in recipe.model_fields_set
        ],
        outs=[files.edited(edit, seed)],
        metrics=[files.coefficients(edit, seed)],
        plots=[{str(files.search_table(edit, seed)): {
            "x": f"coefficient.{min(recipe.coefficients)}", "y": "objective"}}],
    )  # fmt: skip
    yield from _stage(
        "evaluate", edit, seed,
        deps=[files.pretrained(), files.edited(edit, seed)]
        + [files.head(task) for task in evaluated]
        + [files.images(task, split) for task in evaluated for split in ("validation", "test")]
        + [files.evaluation(task, seed) for task in evaluated],
        params=["evaluate"],
        outs=[files.evaluation(edit, seed), files.figure(edit, seed)],
        metrics=[files.metrics(edit, seed)],
    )  # fmt: skip


def _stage(
    stage: str,
    edit: str,
    seed: int,
    *,
    deps: list[Path],
    params: list[str],
    outs: list[Path],
    metrics: list[Path] | None = None,
    plots: list[Any] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    keys: list[Any] = [f"edits.{edit}.{key}" for key in params]
    if stage != "combine":
        keys.append("model")
    packages = {
        "combine": ["packages.numpy", "packages.torch"],
        "search": ["packages.numpy", "packages.torch"],
        "evaluate": ["packages.torch", "packages.matplotlib"],
    }[stage]
    digest = f"combine.{edit}" if stage == "combine" else stage
    keys.append({"code.yaml": ["python", *packages, digest]})
    block: dict[str, Any] = {
        "wdir": "..",
        "cmd": f"python -m tasks {stage} {edit}-{seed}",
        "deps": sorted(str(path) for path in deps),
        "params": keys,
        "outs": [str(path) for path in outs],
    }
    if metrics:
        block["metrics"] = [str(path) for path in metrics]
    if plots:
        block["plots"] = plots
    block["meta"] = {"gpu": int(stage != "combine"), "timeout": TIMEOUTS[stage]}
    yield f"{stage}-{edit}-{seed}", block


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(path: Path) -> CommentedMap:
    try:
        return _yaml().load(path.read_text())
    except FileNotFoundError:
        raise InvalidParams(f"{path} does not exist; run taskvec in the project's root") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidParams(f"{path}:{line}: {error.problem or error.context}") from None


def _dump(value: Any) -> str:
    stream = StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()


def main(arguments: list[str]) -> int:
    """Render the files, or with ``--check`` compare them; return the exit code."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m flows.plan [--check]\n")
        return 2
    root = Path.cwd()
    try:
        params = parameters.load(root / "params.yaml")
        if arguments:
            check(root, params)
            return 0
        for path in write(root, params):
            sys.stderr.write(f"rendered {path.relative_to(root)}\n")
    except TaskvecError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
