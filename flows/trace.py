"""Where an artifact came from and what was made from it, as text, JSON or a graph."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from flows.lineage import Artifact, Lineage, Made
from flows.records import Execution
from taskvec.errors import ServiceUnreachable
from taskvec.headers import canonical

if TYPE_CHECKING:  # to import it takes a tenth of a second, which most questions do not need
    from networkx import DiGraph

REGISTERED = "registered model"
# What is known of a run that is a node of the whole graph -> its kind.
NODES = {
    "at commit": "commit",
    "first recorded in commit": "commit",
    "Prefect flow run": "flow run",
    "Prefect task run": "task run",
    "MLflow parent run": "MLflow run",
    "MLflow run": "MLflow run",
}
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
    """Return an artifact, where it is registered, and the chain of stages that made it.

    The chain has the newest first.
    """
    chain = [_link(lineage, execution) for execution in lineage.chain(artifact)]
    return {
        **_described(artifact),
        **_registered(lineage, [artifact]),
        "chain": chain,
    }


def below(lineage: Lineage, artifact: Artifact) -> dict[str, Any]:
    """Return an artifact, what contains it, and what it had a say in."""
    made = lineage.below(artifact)
    inside = [item for item in made if item.contains]
    return {
        **_described(artifact),
        **_registered(lineage, [artifact, *(item.artifact for item in inside)]),
        "contained in": [_item(lineage, item) for item in inside],
        "used for": [_item(lineage, item) for item in made if not item.contains],
        "sweep rows": [
            {
                "table": row.table,
                "subset": row.subset,
                "coefficient": row.coefficient,
                "objective": row.objective,
                "chosen": row.chosen,
            }
            for row in lineage.rows([artifact, *(item.artifact for item in inside)])
        ],
    }


def render(found: Mapping[str, Any]) -> str:
    """Return a trace as indented text."""
    lines = [_title(found), *_registrations(found)]
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
    lines = [_title(found), *_registrations(found)]
    for title in ("contained in", "used for"):
        items = found[title]
        current = [item for item in items if item["current"]]
        former = len(items) - len(current)
        lines.append(f"\n{title}: {len(current)} files, {former} former versions")
        for kind, group in groupby(sorted(current, key=_by_kind), key=lambda item: item["kind"]):
            lines.append(f"  {kind}")
            lines += [f"    {item['path']}  {item['md5'][:12]}" for item in group]
    for table, group in groupby(found["sweep rows"], key=lambda row: row["table"]):
        rows = list(group)
        chosen = [f"    {row['subset']} at {row['coefficient']:g}" for row in rows if row["chosen"]]
        lines.append(f"\n{table}: {len(rows)} edits contain it; the chosen ones:")
        lines += chosen
    return "\n".join(lines)


def graph(lineage: Lineage, artifact: Artifact, *, down: bool) -> "DiGraph":
    """Return the graph above or below an artifact.

    Nodes are files, by digest (``kind``, ``label``), executions (``kind`` is "stage") and the
    versions of registered models; edges lead from what was used to what was made.
    """
    from networkx import DiGraph

    made = lineage.below(artifact) if down else []
    executions: Iterable[Execution] = (
        {item.through.ident: item.through for item in made}.values()
        if down
        else lineage.chain(artifact)
    )
    found = DiGraph()
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
    for item in made:
        found.nodes[item.artifact.key]["kind"] = item.artifact.kind
    with suppress(ServiceUnreachable):
        for version in lineage.registered(node for node in found):
            label = ", ".join([version.address, *version.aliases])
            found.add_node(version.address, kind=REGISTERED, label=label)
            found.add_edge(version.md5, version.address)
    return found


def with_facts(found: "DiGraph") -> "DiGraph":
    """Return a graph with code, parameters, commits and runs of its stages as nodes of their own.

    In pictures they would lead from everything to everything.
    """
    full = found.copy()
    for stage, data in found.nodes(data=True):
        if data["kind"] != "stage":
            continue
        facts = [
            (kind, data["run"][words]) for words, kind in NODES.items() if words in data["run"]
        ]
        for key, value in data["parameters"].items():
            kind = "code" if key.startswith("code.yaml:") else "parameters"
            facts.append((kind, f"{key} = {canonical(value)}"))
        for kind, label in facts:
            full.add_node(f"{kind} {label}", kind=kind, label=label)
            full.add_edge(f"{kind} {label}", stage)
    return full


def node_link(found: "DiGraph") -> dict[str, Any]:
    """Return a graph as JSON, in the form of `networkx.node_link_data`."""
    from networkx import DiGraph, node_link_data

    slim = DiGraph(found.edges)
    for node, data in found.nodes(data=True):
        slim.add_node(node, kind=data["kind"], label=data["label"])
    return dict(node_link_data(slim, edges="edges"))


def dot(found: "DiGraph") -> str:
    """Return a graph in the language of Graphviz."""
    lines = ["digraph lineage {", "  rankdir=LR;", '  node [fontname="sans-serif"];']
    for node, data in found.nodes(data=True):
        shape = "box" if data["kind"] == "stage" else "note"
        lines.append(f"  {json.dumps(node)} [label={json.dumps(data['label'])}, shape={shape}];")
    lines += [f"  {json.dumps(a)} -> {json.dumps(b)};" for a, b in found.edges]
    return "\n".join([*lines, "}"])


def mermaid(found: "DiGraph") -> str:
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
    """Return name and digests of an artifact: md5 of what DVC knows, fingerprint of weights.

    ``digest`` is the sha256 of an exported file, or of the recipe of a row of a sweep.
    """
    kind = "fingerprint" if artifact.outside in ("", "edit") else "digest"
    marks = {"md5": artifact.md5, kind: artifact.fingerprint}
    return {"path": artifact.name, **{key: mark for key, mark in marks.items() if mark}}


def _registered(lineage: Lineage, artifacts: Iterable[Artifact]) -> dict[str, Any]:
    """Return which of some artifacts are registered; why that is not known, if it is not."""
    paths = {artifact.md5: artifact.name for artifact in artifacts if artifact.md5}
    try:
        versions = lineage.registered(paths)
    except ServiceUnreachable as error:
        return {"registered": [], "registered unknown": str(error)}
    return {
        "registered": [
            {
                "address": version.address,
                "aliases": list(version.aliases),
                "path": paths[version.md5],
                "md5": version.md5,
            }
            for version in versions
        ]
    }


def _registrations(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for item in found["registered"]:
        words = f" ({', '.join(item['aliases'])})" if item["aliases"] else ""
        lines.append(f"registered: {item['address']}{words} is {item['path']}")
    if "registered unknown" in found:
        lines.append(f"registered: {found['registered unknown']}")
    return lines


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
    marks = [f"{kind} {found[kind]}" for kind in ("md5", "fingerprint", "digest") if kind in found]
    return "  ".join([found["path"], *marks])
