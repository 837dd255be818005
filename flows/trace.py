"""Where a file came from, read from DVC's lock files and MLflow's record."""

import os
from pathlib import Path
from typing import Any

from flows.dag import Dag
from flows.tracking import runs_by_output
from taskvec.errors import MissingArtifact


def trace(root: Path, path: Path) -> dict[str, Any]:
    """Return the file and the chain of stages that made it, the newest first.

    Args:
        root: the checkout.
        path: an output of some stage, absolute or relative to the working directory.

    Raises:
        MissingArtifact: no stage is recorded to have made it.
    """
    name = os.path.relpath(path.absolute(), root)
    entries = Dag(root).entries()
    makers = {out["path"]: address for address, entry in entries.items() for out in entry["outs"]}
    if name not in makers:
        raise MissingArtifact(
            f"no recorded stage made {name}; name an output of a stage, such as "
            f"{min(makers, default='data/reports/index.html after `taskvec run`')}"
        )
    runs = runs_by_output(root)
    chain, queue, seen = [], [makers[name]], {makers[name]}
    while queue:
        address = queue.pop(0)
        entry = entries[address]
        chain.append(_link(address, entry, runs))
        for dep in entry.get("deps", []):
            maker = makers.get(dep["path"])
            if maker and maker not in seen:
                seen.add(maker)
                queue.append(maker)
    return {"path": name, "md5": _md5(entries[makers[name]], name), "chain": chain}


def render(chain: dict[str, Any]) -> str:
    """Return a trace as indented text."""
    lines = [f"{chain['path']}  md5 {chain['md5']}"]
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
