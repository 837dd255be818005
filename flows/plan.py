"""params.yaml -> what DVC reads: code.yaml, edits/dvc.yaml, results/dvc.yaml, lists in dvc.yaml.

DVC cannot give a templated stage a list of dependencies, so the stages of edits are rendered: each
edit depends on exactly the vectors that it names. Nothing from params.yaml but checked names and
numbers enters a command. Run `python -m flows.plan` to render everything, experiments included, or
`--check` to compare; every command of `taskvec` renders its own first. This module imports nothing
heavy.
"""

import hashlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from configparser import ConfigParser
from functools import lru_cache
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError

from flows.blocks import FILES, of_seed
from flows.fingerprints import Code, state
from tasks.artifacts import Artifacts, experiments
from tasks.stages import NAMES
from taskvec import params as parameters
from taskvec.atomic import write_text
from taskvec.errors import InvalidInput, InvalidParams, StaleRendering, TaskvecError, nearest
from taskvec.params import Params

OVERLOOKED = ("nfiles", "size")  # by dvc.stage.cache
SOURCES = Path(__file__).parents[1]
TEMPLATE = SOURCES / "tasks" / "report.html.jinja"
PACKAGES = ("cmaes", "jinja2", "matplotlib", "numpy", "optuna", "pillow", "torch")
ARITHMETIC = "taskvec.numeric:make_deterministic"  # decides the last bit of every stage
# What an answer that searches remember depends on, beside the model family.
ANSWERS = (
    "taskvec.answers:answer", "taskvec.answers:cross_entropy", "taskvec.answers:entropy",
    "taskvec.flat:FlatEditor", "tasks.validation:Validation",
)  # fmt: skip
NOTE = "# Rendered from params.yaml and dvc.yaml by `python -m flows.plan`; do not edit.\n"
CODE_NOTE = (
    "# Digests of the code that each stage reaches and versions that decide results, rendered by\n"
    "# `python -m flows.plan`; do not edit.\n"
)


def render(root: Path, params: Params) -> dict[Path, str]:
    """Return the text of every rendered file, by path.

    Args:
        root: the directory of params.yaml: the repository, or experiments/NAME in it, which takes
            the stages per task from the repository's dvc.yaml.
        params: its checked contents.
    """
    _refuse_overlooked(params.model_dump(), "")
    if params.study and params.study not in studies():
        raise InvalidParams(
            f"params.yaml: study: no module tasks/studies/{params.study}.py; "
            f"{nearest(params.study, studies())}"
        )
    top = Artifacts(root).top
    stages = _load(top / "dvc.yaml")
    whole = top != root  # an experiment is one file with all seeds
    seeds = params.seeds if whole else params.seeds[:1]
    try:
        _fill_lists(stages["stages"], params, seeds)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{top / 'dvc.yaml'} lacks a list that is kept equal to params.yaml "
            f"({type(error).__name__}: {error}); `git diff dvc.yaml` shows what was edited"
        ) from None
    blocks = {name: block for seed in seeds for name, block in of_seed(params, seed)}
    report = stages["stages"]["report"]
    if whole:
        graphs = _experiment(root, stages, blocks, params)
    else:
        graphs = {"dvc.yaml": _dump(stages), "edits/dvc.yaml": NOTE + _dump(_above(blocks))}
        further = dict(_seed_stages(stages["stages"], params.seeds[1:]))
        for seed in params.seeds[1:]:
            further.update(_above(dict(of_seed(params, seed)))["stages"])
        further["report-results"] = {"wdir": "..", **_page(report, "results", params)}
        if texts := study_texts(root):
            further["report-studies"] = {"wdir": "..", **_collection(report, texts)}
        graphs["results/dvc.yaml"] = NOTE + _dump({"stages": further})
    # The page draws the graph, and DVC lets no stage depend on a dvc.yaml.
    drawn = "".join(text for name, text in graphs.items() if name != "results/dvc.yaml")
    graph = hashlib.md5(drawn.encode(), usedforsecurity=False).hexdigest()
    code = CODE_NOTE + _dump({**code_fingerprints(params), "graph": graph})
    files = {"code.yaml": code, **graphs}
    if whole:
        files[".dvc/config"] = _dvc_config(top)
    return {root / name: text for name, text in files.items()}


def rendered(root: Path) -> list[Path]:
    """Return the paths of the files that `render` makes for a directory."""
    own = ("code.yaml", "dvc.yaml", "edits/dvc.yaml", "results/dvc.yaml")
    experiment = ("code.yaml", "dvc.yaml", ".dvc/config")
    return [root / name for name in (own if Artifacts(root).top == root else experiment)]


def write(root: Path, params: Params) -> list[Path]:
    """Render, write what differs and return its paths."""

    def differ() -> dict[Path, str]:
        return {p: t for p, t in texts.items() if not p.is_file() or p.read_text() != t}

    texts = render(root, params)
    if not differ():
        return []
    directory = Artifacts(root).top / ".taskvec"
    directory.mkdir(exist_ok=True)
    with FileLock(directory / "rendering.lock"):  # two at once would share a temporary file
        changed = differ()
        for path, text in changed.items():
            write_text(path, text)
    return list(changed)


def check(root: Path, params: Params) -> None:
    """Raise StaleRendering if a rendered file differs from what its sources say."""
    for path, text in render(root, params).items():
        if not path.is_file() or path.read_text() != text:
            raise StaleRendering(
                f"{path.relative_to(Artifacts(root).top)} does not match params.yaml or the code; "
                "run `taskvec status`, which renders it anew and says what is stale"
            )


def code_fingerprints(params: Params) -> dict[str, Any]:
    """Return the contents of code.yaml: versions, and a digest of the code of every stage."""
    code = _code(SOURCES, state(SOURCES))
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
        match stage:
            case "prepare":
                result[stage] = {
                    task: code.fingerprint([*own, f"taskvec.datasets.{item.data.dataset}"])
                    for task, item in params.tasks.items()
                }
            case "combine":
                used = {edit: params.parse(edit).methods for edit in params.edits}
                result[stage] = _by_edit(code, own, used, "merging")
            case "search":
                ways = {edit: (item.search.strategy,) for edit, item in params.edits.items()}
                result[stage] = _by_edit(code, [*own, family], ways, "strategies")
            case "extract":
                result[stage] = code.fingerprint(own)
            case "report":
                text = code.fingerprint(own) + TEMPLATE.read_text()
                result[stage] = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
            case _:
                result[stage] = code.fingerprint([*own, family])
    if params.study:
        module = f"tasks.studies.{params.study}"
        result["study"] = code.fingerprint(["tasks.report:report", ARITHMETIC, module])
    # no stage depends on it: it is a part of the keys under which answers are remembered
    result["answers"] = code.fingerprint([*ANSWERS, ARITHMETIC, family])
    return result


@lru_cache(maxsize=1)
def _code(root: Path, found: tuple[tuple[str, int, int], ...]) -> Code:
    """Return the code below a directory; it is read again when its files are others."""
    del found
    return Code(root)


def _by_edit(
    code: Code, own: list[str], used: Mapping[str, Collection[str]], room: str
) -> dict[str, str]:
    """Return edit -> digest; edits that use the same modules of a room share it."""
    digests = {
        names: code.fingerprint([*own, *(f"taskvec.{room}.{name}" for name in names)])
        for names in {tuple(sorted(names)) for names in used.values()}
    }
    return {edit: digests[tuple(sorted(names))] for edit, names in used.items()}


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


def _fill_lists(stages: Any, params: Params, seeds: list[int]) -> None:
    """Set the lists in dvc.yaml that follow params.yaml."""
    _fill(stages["prepare"]["foreach"], list(params.tasks), flow=True)
    for stage in stages.values():
        if "matrix" in stage:
            _fill(stage["matrix"]["seed"], seeds, flow=True)
    _fill(
        stages["pretrain"]["deps"],
        [str(FILES.images(task, "alignment")) for task in params.model.align_tasks],
    )
    _fill(stages["report"]["deps"], _report_inputs(params, params.seeds[:1]))
    _fill(stages["report"]["params"], [*_sections(params), stages["report"]["params"][-1]])
    gates = ["gates"] if "gates" in params.model_fields_set else []
    evaluate = stages["evaluate"]["params"]
    _fill(evaluate, ["model", *gates, evaluate[-1]])


def _sections(params: Params) -> list[str]:
    """Return the sections of params.yaml that a page reads, as far as they are given."""
    wanted = (
        "study", "seeds", "model", "fine_tune", "gates", "tasks", "variants", "edits", "sweeps",
        "few_shots",
    )  # fmt: skip
    return [name for name in wanted if name in params.model_fields_set]


def _fill(sequence: CommentedSeq, items: Sequence[Any], *, flow: bool = False) -> None:
    """Replace the items in place, since `tasks` is one list under several names."""
    sequence[:] = items
    if flow or not items:
        sequence.fa.set_flow_style()
    else:
        sequence.fa.set_block_style()


def _experiment(root: Path, stages: Any, blocks: dict[str, Any], params: Params) -> dict[str, str]:
    """Return dvc.yaml of an experiment: the stages per task, the rendered ones, the pages."""
    merged = parameters.plain(stages)["stages"]
    report = merged.pop("report")
    merged = {**merged, **blocks, "report": report}
    if params.study:
        merged["report-study"] = page = _page(report, "study", params)
        if (root / FILES.published()).is_file():
            page["deps"].append(str(FILES.published()))
    return {"dvc.yaml": NOTE + _dump({"stages": merged})}


def _page(report: Any, page: str, params: Params) -> dict[str, Any]:
    """Return the stage of another page than the first one: over all seeds, committed to git."""
    what = {"results": "the table of results", "study": "what the study shows"}[page]
    outs = [FILES.results()] if page == "results" else [FILES.study_text(), FILES.study_figures()]
    *keys, code = parameters.plain(report["params"])
    if page == "study":
        used = [name for name in code["code.yaml"] if name not in ("graph", "report")]
        code = {"code.yaml": [*used, "study"]}
    return {
        "desc": f"{what} over all seeds, committed to git",
        "cmd": f"python -m tasks report {page}",
        "deps": _report_inputs(params, params.seeds),
        "params": [*keys, code],
        "outs": [{str(path): {"cache": False}} for path in outs],
        "meta": {"gpu": 0, "timeout": 600},
    }


def studies() -> list[str]:
    """Return the names of the modules of tasks/studies/ that make the page of a study."""
    found = []
    for path in sorted((SOURCES / "tasks" / "studies").glob("*.py")):
        if re.search(rf"^def {path.stem}\(.*-> Study:", path.read_text(), re.MULTILINE):
            found.append(path.stem)
    return found


def study_texts(top: Path) -> list[str]:
    """Return paths of what the studies have written so far, and of their parameters, sorted."""
    found = [
        directory / name
        for directory in experiments(top).values()
        if (directory / FILES.study_text()).is_file()
        for name in ("params.yaml", FILES.study_text())
    ]
    return sorted(str(path.relative_to(top)) for path in found)


def _collection(report: Any, texts: list[str]) -> dict[str, Any]:
    """Return the stage that puts the results of all studies on one page."""
    return {
        "desc": "what all studies show, committed to git",
        "cmd": "python -m tasks report studies",
        "deps": texts,
        "params": [parameters.plain(report["params"])[-1]],
        "outs": [{str(FILES.studies()): {"cache": False}}],
        "meta": {"gpu": 0, "timeout": 600},
    }


def _above(blocks: dict[str, Any]) -> dict[str, Any]:
    """Return blocks for a file one directory below the one that their paths are relative to."""
    return {"stages": {name: {"wdir": "..", **block} for name, block in blocks.items()}}


def _report_inputs(params: Params, seeds: list[int]) -> list[str]:
    paths = []
    for seed in seeds:
        for expert in params.experts:
            paths += [
                FILES.evaluation(expert, seed), FILES.training(expert, seed),
                FILES.vector(expert, seed),
            ]  # fmt: skip
        for edit, recipe in params.edits.items():
            if seed in params.seeds_of(recipe):
                paths += [
                    FILES.evaluation(edit, seed),
                    FILES.metrics(edit, seed),
                    FILES.search_table(edit, seed),
                    FILES.coefficients(edit, seed),
                ]
        for sweep, swept in params.sweeps.items():
            if seed in params.seeds_of(swept):
                paths += [FILES.sweep_table(sweep, seed), FILES.sweep_chosen(sweep, seed)]
        for few, study in params.few_shots.items():
            if seed in params.seeds_of(study):
                paths.append(FILES.few_shot(few, seed))
    return sorted(str(path) for path in paths)


def _seed_stages(stages: Any, seeds: list[int]) -> Iterator[tuple[str, Any]]:
    """Yield the blocks of dvc.yaml that have a seed, for other seeds."""
    for name, stage in stages.items():
        if "matrix" in stage and seeds:
            block = parameters.plain(stage)
            block["matrix"]["seed"] = seeds
            yield name, {"wdir": "..", **block}


def _dvc_config(top: Path) -> str:
    """Return the configuration of an experiment's own DVC project: the repository's, its cache.

    A project of its own keeps `dvc status` of the repository from reading all experiments; the
    shared cache, run cache included, is why equal stages of two experiments run once.
    """
    config = ConfigParser(interpolation=None)
    config.read(top / ".dvc" / "config")
    if "cache" not in config:
        config["cache"] = {}
    own = config["cache"].get("dir", "cache").strip('"')
    config["cache"]["dir"] = own if own.startswith("/") else f"../../../.dvc/{own}"
    stream = StringIO()
    config.write(stream)
    return "# Rendered by `python -m flows.plan`; do not edit.\n" + stream.getvalue().strip() + "\n"


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
    """Render the files of the repository and its experiments, or with ``--check`` compare them.

    Returns the exit code.
    """
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m flows.plan [--check]\n")
        return 2
    top = Path.cwd()
    try:
        for root in [top, *experiments(top).values()]:
            params = parameters.load(root / "params.yaml")
            if arguments:
                check(root, params)
                continue
            for path in write(root, params):
                sys.stderr.write(f"rendered {path.relative_to(top)}\n")
    except TaskvecError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
