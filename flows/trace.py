"""Where an artifact came from and what was made from it, as text, JSON or a graph."""

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import PurePath
from typing import Any

import networkx

from flows.lineage import Artifact, Lineage, Made
from flows.records import Execution

SHOWN = 90  # characters of a parameter's value
FACTS = {
    "mlflow_run": "MLflow run",
    "mlflow_parent": "MLflow parent run",
    "prefect_task_run": "Prefect task run",
    "prefect_flow_run": "Prefect flow run",
    "run": "log",
    "how": "how",
    "because": "because",
    "who": "by",
    "when": "at",
    "commit": "at commit",
    "recorded": "first recorded in commit",
    "author": "committed by",
    "committed": "committed at",
    "dirty": "with uncommitted changes",
}


def trace(lineage: Lineage, artifact: Artifact) -> dict[str, Any]:
    """Return an artifact and the chain of stages that made it, the newest first."""
    chain = [_link(lineage, execution) for execution in lineage.chain(artifact)]
    return {**_described(artifact), "chain": chain}


def below(lineage: Lineage, artifact: Artifact) -> dict[str, Any]:
    """Return an artifact, what contains it, and what it had a say in."""
    made = lineage.below(artifact)
    return {
        **_described(artifact),
        "contained in": [_item(lineage, item) for item in made if item.contains],
        "used for": [_item(lineage, item) for item in made if not item.contains],
    }


def render(found: Mapping[str, Any]) -> str:
    """Return a trace as indented text."""
    lines = [_title(found)]
    for link in found["chain"]:
        lines.append(f"\n{link['stage']}")
        for kind in ("inputs", "outputs"):
            for path, md5 in link[kind].items():
                lines.append(f"  {kind[:-1]:7} {path}  {md5[:12]}")
        for key, value in link["parameters"].items():
            text = str(value)
            short = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
            lines.append(f"  param   {key} = {short}")
        for key, value in link["run"].items():
            lines.append(f"  {key} {value}")
    return "\n".join(lines)


def render_below(found: Mapping[str, Any]) -> str:
    """Return what was made from an artifact as text; former versions are counted."""
    lines = [_title(found)]
    for title in ("contained in", "used for"):
        items = found[title]
        current = [item for item in items if item["current"]]
        former = len(items) - len(current)
        lines.append(f"\n{title}: {len(current)} files, {former} former versions")
        for kind, group in groupby(sorted(current, key=_by_kind), key=lambda item: item["kind"]):
            lines.append(f"  {kind}")
            lines += [f"    {item['path']}  {item['md5'][:12]}" for item in group]
    return "\n".join(lines)


def graph(lineage: Lineage, artifact: Artifact, *, down: bool) -> networkx.DiGraph:
    """Return the graph above or below an artifact.

    Nodes are files, by digest (``kind``, ``label``), and executions (``kind`` is "stage"), with the
    commits and runs that recorded them; edges lead from what was used to what was made.
    """
    if down:
        executions: Iterable[Execution] = {
            made.through.ident: made.through for made in lineage.below(artifact)
        }.values()
    else:
        executions = lineage.chain(artifact)
    found = networkx.DiGraph()
    found.add_node(artifact.key, kind=artifact.kind, label=artifact.name)
    for execution in executions:
        link = _link(lineage, execution)
        found.add_node(execution.ident, kind="stage", label=link["stage"], **link)
        for path, mark in {**execution.inputs, **execution.outputs}.items():
            if mark not in found:
                one = Artifact(mark, (path,))
                found.add_node(mark, kind=one.kind, label=path)
        found.add_edges_from((mark, execution.ident) for mark in execution.inputs.values())
        found.add_edges_from((execution.ident, mark) for mark in execution.outputs.values())
    return found


def dot(found: networkx.DiGraph) -> str:
    """Return a graph in the language of Graphviz."""
    lines = ["digraph lineage {", "  rankdir=LR;", '  node [fontname="sans-serif"];']
    for node, data in found.nodes(data=True):
        shape = "box" if data["kind"] == "stage" else "note"
        lines.append(f"  {json.dumps(node)} [label={json.dumps(data['label'])}, shape={shape}];")
    lines += [f"  {json.dumps(a)} -> {json.dumps(b)};" for a, b in found.edges]
    return "\n".join([*lines, "}"])


def mermaid(found: networkx.DiGraph) -> str:
    """Return a graph as a Mermaid flowchart."""
    names = {node: f"n{number}" for number, node in enumerate(found.nodes)}
    lines = ["flowchart LR"]
    for node, data in found.nodes(data=True):
        label = data["label"].replace('"', "#quot;")
        left, right = ("[", "]") if data["kind"] == "stage" else ("([", "])")
        lines.append(f'  {names[node]}{left}"{label}"{right}')
    lines += [f"  {names[a]} --> {names[b]}" for a, b in found.edges]
    return "\n".join(lines)


def _described(artifact: Artifact) -> dict[str, Any]:
    """Return name and digests of an artifact; `md5` only of what DVC knows."""
    marks = {"md5": artifact.md5, "fingerprint": artifact.fingerprint}
    return {"path": artifact.name, **{key: mark for key, mark in marks.items() if mark}}


def _link(lineage: Lineage, execution: Execution) -> dict[str, Any]:
    return {
        "stage": lineage.stage(execution),
        "command": execution.command,
        "inputs": execution.inputs,
        "outputs": execution.outputs,
        "parameters": {
            key if file in ("", "params.yaml") else f"{file}:{key}": value
            for file, values in execution.parameters.items()
            for key, value in values.items()
        },
        "run": {words: execution.run[key] for key, words in FACTS.items() if key in execution.run},
    }


def _item(lineage: Lineage, made: Made) -> dict[str, Any]:
    return {
        **_described(made.artifact),
        "md5": made.artifact.key,
        "kind": made.artifact.kind,
        "current": made.current,
        "stage": lineage.stage(made.through),
    }


def _by_kind(item: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return item["kind"], PurePath(item["path"]).parts


def _title(found: Mapping[str, Any]) -> str:
    marks = [f"{kind} {found[kind]}" for kind in ("md5", "fingerprint") if kind in found]
    return "  ".join([found["path"], *marks])
