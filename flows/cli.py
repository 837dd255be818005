"""`taskvec`: the command line. Imports what a command needs and no more."""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import ending
from flows.ending import leave
from flows.output import be_patient
from taskvec.errors import TaskvecError

if TYPE_CHECKING:
    from flows.lineage import Lineage
    from flows.nodes import Node

MOST_REASONS = 4  # that `status` prints of a stage; --json has all
OBJECTS = 50_000  # new ones between collections, which else take a sixth of the time of a question

app = typer.Typer(
    name="taskvec",
    help="Edit models with task vectors, and know where every edited model came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

services_app = typer.Typer(no_args_is_help=True, help="Servers that outlive the command.")
app.add_typer(services_app, name="services")
schedule_app = typer.Typer(no_args_is_help=True, help="When deployments run by themselves.")
app.add_typer(schedule_app, name="schedule")

Targets = Annotated[
    list[str] | None,
    typer.Argument(help="Stages, tasks, edits, or `results` (all seeds); default: all of dvc.yaml"),
]
Experiment = Annotated[
    str, typer.Option("--experiment", "-e", help="A directory of experiments/; default: none")
]


@app.command()
def run(
    targets: Targets = None,
    experiment: Experiment = "",
    data_root: Annotated[
        Path | None, typer.Option(help="Where external sets lie; default: $TASKVEC_DATA")
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="CPU slots; default: cores")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another run to end")] = False,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of params.yaml; the run is in a worktree of its own"),
    ] = None,
) -> None:
    """Bring stages up to date: run what is stale, and nothing else."""
    from flows.handover import run as hand_over
    from flows.running import report
    from flows.terminal import Terminal

    root = _root(experiment)
    if values:
        from flows import overrides

        root = overrides.checkout(root, overrides.parsed(values))
        os.chdir(root)
        _say(f"with other values: {root}")
    if data_root:
        os.environ["TASKVEC_DATA"] = str(data_root.absolute())
    with Terminal() as terminal:
        listener = terminal.listener()
        done = hand_over(root, targets or [], slots=slots, listener=listener, say=_say)
        if done is None:
            from flows.running import bring_up_to_date

            done = bring_up_to_date(
                root, targets or [], slots=slots, wait=wait, listener=listener, say=_say
            )
    if code := report(root, *done, say=_say):
        sys.exit(code)


@app.command()
def status(
    targets: Targets = None,
    experiment: Experiment = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Say what is stale and why."""
    from flows.running import plan

    _, nodes = plan(_root(experiment), targets or [], repair=False, say=_say)
    stale = [node for node in nodes if node.reasons]
    notes = [*_origin_notes(stale), *_retraction_notes()]
    if as_json:
        content = {
            "up_to_date": not stale,
            "stages": [
                {
                    "name": node.name,
                    "address": node.address,
                    "stale": bool(node.reasons),
                    "why": [{"kind": r.kind, "words": r.words} for r in node.reasons],
                }
                for node in nodes
            ],
            "notes": notes,
        }
        typer.echo(json.dumps(content, indent=2))
        return
    if not stale:
        typer.echo(f"up to date: {len(nodes)} stages")
        for note in notes:
            typer.echo(f"note: {note}")
        return
    width = max(len(node.name) for node in stale)
    for node in stale:
        told = "; ".join(reason.words for reason in node.reasons[:MOST_REASONS])
        more = len(node.reasons) - MOST_REASONS
        typer.echo(f"{node.name:{width}}  {told}{f'; and {more} more' if more > 0 else ''}")
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(
        f"{len(stale)} of {len(nodes)} stages are stale; `taskvec run` brings them up to date"
    )


@app.command()
def results(experiment: Experiment = "") -> None:
    """Print how the models do on test data, and where the report lies."""
    from flows.terminal import print_results

    print_results(_root(experiment))


@app.command()
def trace(
    what: Annotated[str, typer.Argument(help="A path, an edit or a task, a digest, EDIT@REVISION")],
    experiment: Experiment = "",
    down: Annotated[bool, typer.Option("--down", help="What was made from it")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    dot: Annotated[bool, typer.Option("--dot", help="Print a graph for Graphviz")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flowchart")] = False,
    page: Annotated[bool, typer.Option("--page", help="Write data/pages/lineage.html")] = False,
    html: Annotated[Path | None, typer.Option(help="Write that page to a file")] = None,
    openlineage: Annotated[Path | None, typer.Option(help="Write OpenLineage events")] = None,
    prov: Annotated[Path | None, typer.Option(help="Write W3C PROV-JSON")] = None,
) -> None:
    """Say where an artifact came from: stages, parameters, inputs and runs, back to the data."""
    from flows import trace as tracing

    written = html.absolute() if html else None
    documents = {"openlineage": openlineage, "prov": prov}
    wanted = {name: path.absolute() for name, path in documents.items() if path}
    with _lineage(experiment) as lineage:
        artifact = lineage.find(what)
        if wanted:
            from flows import openlineage as events
            from flows import prov as graphs

            for name, path in wanted.items():
                write = events.write if name == "openlineage" else graphs.write
                write(path, lineage.chain(artifact))
                _say(f"{name}: {path}")
            return
        if dot or mermaid:
            graph = tracing.graph(lineage, artifact, down=down)
            typer.echo(tracing.dot(graph) if dot else tracing.mermaid(graph))
            return
        if written or page:
            from flows import lineage_page
            from tasks.artifacts import Artifacts

            place = written or Artifacts(lineage.top).page("lineage")
            lineage_page.write(place, lineage, artifact, down=down)
            _say(f"page: {place}")
            return
        found = (tracing.below if down else tracing.trace)(lineage, artifact)
        if as_json:
            whole = tracing.with_facts(tracing.graph(lineage, artifact, down=down))
            found["graph"] = tracing.node_link(whole)
    render = tracing.render_below if down else tracing.render
    typer.echo(json.dumps(found, indent=2) if as_json else render(found))


@app.command()
def why(
    stage: Annotated[str, typer.Argument(help="A stage, such as search-addition-0")],
    experiment: Experiment = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Say why a stage would run, or why it ran last time."""
    from flows import why as reasons
    from flows.running import plan

    _, nodes = plan(_root(experiment), [stage], repair=False, say=_say)
    with _lineage() as lineage:
        found = reasons.why(lineage, nodes[-1])
    typer.echo(json.dumps(found, indent=2) if as_json else reasons.render(found))


@app.command()
def verify(
    what: Annotated[
        list[str] | None, typer.Argument(help="Artifacts, or a received export; default: all")
    ] = None,
    experiment: Experiment = "",
    deep: Annotated[bool, typer.Option("--deep", help="Fingerprints of weights as well")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Replace damaged copies, or remove them")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    key: Annotated[
        Path | None, typer.Option(help="The public key that a received export is signed with")
    ] = None,
) -> None:
    """Hash everything anew and compare it with what is recorded."""
    if what and len(what) == 1 and (Path(what[0]).is_dir() or key):
        _verify_received(Path(what[0]), key, as_json)
    from flows import verify as verifying
    from flows.editing import Line

    with _lineage(experiment) as lineage:
        artifacts = [lineage.find(name) for name in what or []]
        line = Line("verify")
        found = verifying.verify(
            lineage, artifacts, deep=deep,
            progress=lambda done, total: line({"step": done, "steps": total}),
        )  # fmt: skip
        done = verifying.repair(lineage, found) if repair else []
    typer.echo(json.dumps(found.described(), indent=2) if as_json else verifying.render(found))
    for words in done:
        _say(words)
    sys.exit(4 if found.findings else 0)


@app.command()
def promote(
    edit: Annotated[str, typer.Argument(help="An edit, or a path or digest of its model")],
    alias: Annotated[str, typer.Option(help="Such as champion")],
    override: Annotated[
        str, typer.Option(help="Why objections do not count; recorded with the version")
    ] = "",
    experiment: Experiment = "",
) -> None:
    """Register an edited model in MLflow under an alias, if nothing speaks against it."""
    from flows import promote as promoting

    _say(f"{promoting.promote(_root(experiment), edit, alias, override)} is {alias} now")


@app.command()
def export(
    what: Annotated[str, typer.Argument(help="An edit, or a file of `taskvec edit`")],
    directory: Annotated[Path, typer.Argument(help="A directory that does not exist yet")],
    form: Annotated[
        str, typer.Option("--format", help="open_clip, transformers or taskvec; default: what fits")
    ] = "",
    seed: Annotated[int | None, typer.Option(help="Of the vectors; default: the first")] = None,
    sign: Annotated[Path | None, typer.Option(help="A private key that signs the export")] = None,
    experiment: Experiment = "",
) -> None:
    """Write an edited model for others: weights, model card and provenance statement."""
    from flows import export as exporting

    place = directory.absolute()
    key = sign.absolute() if sign else None
    name = str(Path(what).absolute()) if Path(what).is_file() else what
    written = exporting.export(
        _root(experiment), name, place, form=form, seed=seed, key=key, say=_say
    )
    _say(f"{directory}: {written.weights} for {written.library}; `taskvec verify {directory}`")


@app.command()
def reproduce(
    what: Annotated[str, typer.Argument(help="An artifact that a stage made")],
    experiment: Experiment = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Rebuild an artifact from the data on, in a clean worktree, and compare every bit."""
    from flows import reproduce as rebuilding

    root = _root(experiment)
    with _lineage() as lineage:
        found = rebuilding.reproduce(lineage, root, lineage.find(what), say=_say)
    typer.echo(json.dumps(found.described(), indent=2) if as_json else rebuilding.render(found))
    sys.exit(0 if found.close else 4)


@app.command()
def retract(
    what: Annotated[str, typer.Argument(help="A path, a task or an edit, a digest")],
    why: Annotated[str, typer.Option(help="What is wrong with it; committed to git")] = "",
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take it back")] = False,
    experiment: Experiment = "",
) -> None:
    """Mark an artifact, and every model that contains it, as not to be used any more."""
    from flows import retractions

    with _lineage(experiment) as lineage:
        artifact = lineage.find(what)
        if withdraw:
            retractions.withdraw(lineage, artifact)
            _say(f"{artifact.name} is no longer retracted; commit retractions.yaml")
            return
        models = retractions.retract(lineage, artifact, why)
    _say(f"{artifact.name} ({artifact.key[:12]}) is retracted; {len(models)} files contain it:")
    for model in models:
        typer.echo(model.name)
    _say("commit retractions.yaml; `taskvec run` makes anew what a stage can make")


@app.command()
def diff(
    left: Annotated[str, typer.Argument(help="A model: an edit, a path, a digest, EDIT@REVISION")],
    right: Annotated[str, typer.Argument(help="Another one")],
    experiment: Experiment = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Say what differs between two models: data, code, parameters, metrics, weights by layer."""
    from flows import difference

    with _lineage(experiment) as lineage:
        found = difference.difference(lineage, lineage.find(left), lineage.find(right))
    typer.echo(json.dumps(found, indent=2) if as_json else difference.render(found))


@app.command()
def edit(
    expression: Annotated[str, typer.Argument(help='Such as "c * ties(mnist, digits)"')],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write")],
    at: Annotated[list[str] | None, typer.Option(help="A coefficient's value: c=0.4")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the vectors; default: the first")] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Say how the model does")] = False,
    task: Annotated[list[str] | None, typer.Option(help="Evaluate on; default: all tasks")] = None,
    split: Annotated[str, typer.Option(help="validation or test")] = "validation",
    experiment: Experiment = "",
) -> None:
    """Edit the model once, outside params.yaml; the file and MLflow say where it came from."""
    from flows import editing

    tasks = (task or []) if evaluate or task else None
    target = out.absolute() if experiment else out
    editing.edit(_root(experiment), expression, at or [], target, seed, tasks, split)


@app.command()
def similarity(
    tasks: Annotated[list[str] | None, typer.Argument(help="Default: all tasks")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the vectors; default: the first")] = None,
    plot: Annotated[Path | None, typer.Option(help="The page to write")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    experiment: Experiment = "",
) -> None:
    """Print and draw the cosines of task vectors, whole and layer by layer."""
    from flows import editing

    target = plot.absolute() if plot else None
    editing.similarity(_root(experiment), tasks or [], seed, target, as_json)


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(help="A mergekit YAML file")],
    out: Annotated[Path, typer.Option(help="The .safetensors file, or a directory")],
    fingerprints: Annotated[
        bool, typer.Option("--fingerprints", help="Record digests of all inputs; reads them twice")
    ] = False,
) -> None:
    """Merge checkpoints as a mergekit configuration says."""
    from flows import editing

    editing.merge(config, out, fingerprints)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A .pt file of the paper's code")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write")],
) -> None:
    """Convert a pickled model of the paper's code, without executing anything in it."""
    from flows import editing

    editing.import_legacy(path, out)


@app.command()
def backfill(experiment: Experiment = "") -> None:
    """Record stages that a bare `dvc repro` ran, and send MLflow what it has not got yet."""
    from flows import locking
    from flows.backfill import backfill as complete
    from flows.dag import Dag

    root = _root(experiment)
    with locking.held(root, "taskvec backfill", wait=False):
        for line in complete(root, Dag(root).entries(), _say):
            _say(line)


@app.command()
def ui() -> None:
    """Start the MLflow and Prefect UIs on loopback; Ctrl-C stops them."""
    from flows.ui import serve

    serve(_root(), typer.echo)


@services_app.command("up")
def services_up(
    prefect_port: Annotated[int, typer.Option(help="Default: as last time, or a free one")] = 0,
    mlflow_port: Annotated[int, typer.Option(help="Default: as last time, or a free one")] = 0,
) -> None:
    """Start Prefect, MLflow, a worker, the watcher and the driver, and keep them running."""
    from flows import services

    services.up(_root(), {"prefect": prefect_port, "mlflow": mlflow_port}, _say)


@services_app.command("status")
def services_status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Say what runs; exit code 7 if something that should does not."""
    from flows import services

    rows = services.status(_root())
    typer.echo(json.dumps(rows, indent=2) if as_json else services.table(rows))
    sys.exit(0 if services.healthy(rows) else 7)


@services_app.command("down")
def services_down() -> None:
    """Stop all services of this checkout."""
    from flows import services

    services.down(_root(), _say)


@app.command()
def deploy() -> None:
    """Check prefect.yaml, and tell Prefect of its deployments, triggers and notifications."""
    from flows import deploy as deploying

    deploying.deploy(_root(), _say)


@schedule_app.command("list")
def schedule_list(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Say what runs when."""
    from flows import schedule

    found = schedule.entries(_root())
    rows = schedule.described(found)
    typer.echo(json.dumps(rows, indent=2) if as_json else schedule.table(found))


@schedule_app.command("start")
def schedule_start(
    name: Annotated[str, typer.Argument(help="A deployment of prefect.yaml")],
) -> None:
    """Let a deployment run now; a worker does it."""
    from flows import schedule

    identifier, run = schedule.start(_root(), name)
    typer.echo(f"{run} {identifier}")


@schedule_app.command("pause")
def schedule_pause(
    name: Annotated[str, typer.Argument(help="A deployment of prefect.yaml")],
) -> None:
    """Let a deployment run by hand only."""
    from flows import schedule

    typer.echo(schedule.table(schedule.switch(_root(), name, active=False)))


@schedule_app.command("resume")
def schedule_resume(
    name: Annotated[str, typer.Argument(help="A deployment of prefect.yaml")],
) -> None:
    """Let a deployment run by itself again."""
    from flows import schedule

    typer.echo(schedule.table(schedule.switch(_root(), name, active=True)))


def main() -> None:
    """Run the command line; errors become one message and an exit code."""
    gc.set_threshold(OBJECTS)
    be_patient()
    ending.hear()
    try:
        code = app(standalone_mode=False)
        if code == 128 + signal.SIGINT:  # what Typer makes of an interruption
            raise KeyboardInterrupt
        leave(code if isinstance(code, int) else 0)
    except TaskvecError as error:
        _say(f"error: {error}")
        leave(error.exit_code)
    except typer.Abort:
        leave(130)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on where it stopped")
        leave(128 + (ending.asked() or signal.SIGINT))
    except Exception as error:
        # click's own usage errors know how to show themselves
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        leave(getattr(error, "exit_code", 2))


def _root(experiment: str = "") -> Path:
    """Return the directory of params.yaml, and make it the working directory."""
    if not experiment:
        return Path.cwd()
    from flows.running import experiment_root

    return experiment_root(Path.cwd(), experiment)


def _verify_received(directory: Path, key: Path | None, as_json: bool) -> None:
    """Check a received export, print what is wrong with it, and exit."""
    from flows import received, signing

    findings = signing.verify(directory, key)
    content = [{"file": item.file, "problem": item.problem} for item in findings]
    text = received.report(directory, findings)
    typer.echo(json.dumps(content, indent=2) if as_json else text.rstrip())
    sys.exit(received.EXIT_CODE if findings else 0)


def _lineage(experiment: str = "") -> "Lineage":
    from flows.lineage import Lineage

    return Lineage(_root(experiment))


def _origin_notes(stale: list["Node"]) -> list[str]:
    if any(node.stage == "pretrain" for node in stale):
        return ["the pre-trained model may change: every vector then gets a new origin"]
    return []


def _retraction_notes() -> list[str]:
    from tasks.artifacts import Artifacts

    if not Artifacts(Path.cwd()).retractions().is_file():
        return []
    from flows import retractions

    with _lineage() as lineage:
        return retractions.notes(lineage)


def _say(text: Any) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    main()
