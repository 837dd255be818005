"""The page that shows a lineage: one HTML file with a picture to zoom into, nothing fetched."""

import json
from pathlib import Path
from statistics import fmean

import networkx
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flows import retractions, trace
from flows.lineage import KINDS, OUTSIDE, Artifact, Lineage
from flows.trace import REGISTERED
from taskvec.atomic import write_text

SWEEPS = 6  # to and fro, until edges are short


def write(path: Path, lineage: Lineage, artifact: Artifact, *, down: bool) -> None:
    """Write the page of what is above or below an artifact.

    Args:
        path: of the page.
        lineage: of the repository.
        artifact: in the middle of interest.
        down: what was made from it instead of what it was made from.
    """
    graph = trace.graph(lineage, artifact, down=down)
    marks = retractions.load(lineage.top)
    write_text(path, page(graph, artifact.key, artifact.name, marks.reasons()))


def page(graph: networkx.DiGraph, center: str, title: str, retracted: dict[str, str]) -> str:
    """Return the page of a graph of files and stages.

    Args:
        graph: as `flows.trace.graph` gives it.
        center: the node that the question was about.
        title: what it is called.
        retracted: digest -> why it was retracted.
    """
    files, makers = _files(graph)
    near = {center, *networkx.ancestors(files, center), *networkx.descendants(files, center)}
    files = networkx.subgraph(files, near)
    columns = layers(files)
    nodes = []
    for column, names in enumerate(columns):
        for row, name in enumerate(names):
            data = graph.nodes[name]
            maker = graph.nodes[makers[name]] if name in makers else {}
            nodes.append(
                {
                    "id": name,
                    "label": _short(data["label"]),
                    "path": data["label"],
                    "kind": data["kind"],
                    "column": column,
                    "row": row - (len(names) - 1) / 2,
                    "retracted": retracted.get(name, ""),
                    "made": {key: maker.get(key) for key in ("stage", "parameters", "run")},
                }
            )
    kinds = {node["kind"] for node in nodes}
    known = [*KINDS.values(), *OUTSIDE.values(), REGISTERED, "file"]
    content = {
        "nodes": nodes,
        "edges": sorted(files.edges),
        "center": center,
        "kinds": [kind for kind in known if kind in kinds],
    }
    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # Nothing in a name may end or open a script.
    data = json.dumps(content, sort_keys=True, default=str).replace("<", "\\u003c")
    return environment.get_template("lineage.html.jinja").render(title=title, data=data)


def layers(files: networkx.DiGraph) -> list[list[str]]:
    """Return the columns of a picture: each node right of what it was made from.

    Within a column nodes stand at the mean height of their neighbours, so that edges are short.
    """
    if not networkx.is_directed_acyclic_graph(files):
        return [sorted(files)]
    columns = [sorted(names) for names in networkx.topological_generations(files)]
    height = {name: row / len(column) for column in columns for row, name in enumerate(column)}
    for sweep in range(SWEEPS):
        near = files.predecessors if sweep % 2 == 0 else files.successors
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            pull = {}
            for name in column:
                neighbours = [height[other] for other in near(name)]
                pull[name] = fmean(neighbours) if neighbours else height[name]
            column.sort(key=lambda name, pull=pull: (round(pull[name], 9), name))  # type: ignore[misc]
            height |= {name: (row + 0.5) / len(column) for row, name in enumerate(column)}
    return columns


def _files(graph: networkx.DiGraph) -> tuple[networkx.DiGraph, dict[str, str]]:
    """Return the graph of files alone, and the stage that made each."""
    found: networkx.DiGraph = networkx.DiGraph()
    makers: dict[str, str] = {}
    for node, data in graph.nodes(data=True):
        if data["kind"] == "stage":
            outputs = list(graph.successors(node))
            makers.update(dict.fromkeys(outputs, node))
            found.add_edges_from(
                (a, b) for a in graph.predecessors(node) for b in outputs if a != b
            )
        else:
            found.add_node(node)
            found.add_edges_from(
                (node, b) for b in graph.successors(node) if graph.nodes[b]["kind"] != "stage"
            )
    return found, makers


def _short(path: str) -> str:
    """Return a path without what all have, to stand in a box."""
    parts = path.split("/")
    return "/".join(parts[parts.index("data") + 1 :] if "data" in parts else parts)
