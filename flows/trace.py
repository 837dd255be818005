"""Where a file came from, read from DVC's lock files and MLflow's record."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.dag import Dag
from flows.tracking import runs_by_output
from taskvec import headers
from taskvec.errors import IncompatibleWeights, MissingArtifact


def trace(root: Path, path: Path) -> dict[str, Any]:
    """Return the file and the chain of stages that made it, the newest first.

    Args:
        root: the checkout.
        path: an output of some stage, or a model that `taskvec edit` or `taskvec merge` wrote
            anywhere; absolute or relative to the working directory.

    Raises:
        MissingArtifact: no stage is recorded to have made it.
    """
    name = os.path.relpath(path.absolute(), root)
    entries = Dag(root).entries()
    makers = {out["path"]: address for address, entry in entries.items() for out in entry["outs"]}
    runs = runs_by_output(root)
    if name in makers:
        chain, queue = [], [makers[name]]
        mark = {"md5": _md5(entries[makers[name]], name)}
    else:
        link, inputs, found = _ad_hoc(root, path, makers)
        chain, queue = [link], sorted({makers[item] for item in inputs})
        mark = {"fingerprint": found}
    seen = set(queue)
    while queue:
        address = queue.pop(0)
        entry = entries[address]
        chain.append(_link(address, entry, runs))
        for dep in entry.get("deps", []):
            maker = makers.get(dep["path"])
            if maker and maker not in seen:
                seen.add(maker)
                queue.append(maker)
    return {"path": name, **mark, "chain": chain}


def _ad_hoc(
    root: Path, path: Path, makers: Mapping[str, str]
) -> tuple[dict[str, Any], list[str], str]:
    """Return the link of a file that no stage made, its inputs that stages made, its fingerprint.

    Raises:
        MissingArtifact: it is not there, or nothing tells where it came from.
    """
    metadata = _stated(path)
    if "operands" not in metadata:
        raise MissingArtifact(
            f"no recorded stage made {path}; name a model of `taskvec edit`, or an output of a "
            f"stage, such as {min(makers, default='data/reports/index.html after `taskvec run`')}"
        )
    wanted = {
        name: item["fingerprint"] or item["file"] if isinstance(item, dict) else item
        for name, item in {"origin": metadata["origin"], **metadata["operands"]}.items()
        if item
    }
    made = {
        _stated(root / name).get("fingerprint"): name
        for name in makers
        if name.endswith(".safetensors")
    }
    inputs = {made.get(mark, f"{name} (not here)"): mark for name, mark in wanted.items()}
    command = "edit" if "coefficients" in metadata else "merge"
    link = {
        "stage": f"taskvec {command} {metadata['digest'][:12]}",
        "command": f"taskvec {command} {metadata['expression']!r}",
        "inputs": inputs,
        "outputs": {path.name: metadata["fingerprint"]},
        "parameters": {
            key: metadata[key] for key in ("expression", "coefficients", "seed") if key in metadata
        },
        "run": {},
    }
    return link, [name for name in inputs if name in makers], str(metadata["fingerprint"])


def _stated(path: Path) -> dict[str, Any]:
    """Return what a weights file states of itself; nothing if it is no file of taskvec."""
    try:
        return headers.read_metadata(headers.read_header(path), path)
    except (IncompatibleWeights, MissingArtifact, OSError):
        return {}


def render(chain: dict[str, Any]) -> str:
    """Return a trace as indented text."""
    kind = "md5" if "md5" in chain else "fingerprint"
    lines = [f"{chain['path']}  {kind} {chain[kind]}"]
    for link in chain["chain"]:
        lines.append(f"\n{link['stage']}")
        for kind in ("inputs", "outputs"):
            for path, md5 in link[kind].items():
                lines.append(f"  {kind[:-1]:7} {path}  {md5[:12]}")
        for key, value in link["parameters"].items():
            text = str(value)
            lines.append(f"  param   {key} = {text if len(text) <= 90 else text[:87] + '...'}")
        for key, value in link["run"].items():
            lines.append(f"  {key} {value}")
    return "\n".join(lines)


def _link(address: str, entry: dict[str, Any], runs: dict[str, dict[str, str]]) -> dict[str, Any]:
    outs = {out["path"]: out["md5"] for out in entry["outs"]}
    tags = next((runs[md5] for md5 in outs.values() if md5 in runs), {})
    wanted = {
        "run_id": "MLflow run",
        "prefect.task_run": "Prefect task run",
        "mlflow.parentRunId": "MLflow parent run",
        "how": "how",
        "stale.because": "because",
    }
    return {
        "stage": address,
        "command": entry["cmd"],
        "inputs": {dep["path"]: dep["md5"] for dep in entry.get("deps", [])},
        "outputs": outs,
        "parameters": {
            key if file == "params.yaml" else f"{file}:{key}": value
            for file, values in entry.get("params", {}).items()
            for key, value in values.items()
        },
        "run": {words: tags[tag] for tag, words in wanted.items() if tag in tags},
    }


def _md5(entry: dict[str, Any], name: str) -> str:
    return next(str(out["md5"]) for out in entry["outs"] if out["path"] == name)
