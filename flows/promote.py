"""Promote an edited model: register it in MLflow under an alias, if nothing speaks against it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import registry, retractions, verify
from flows.lineage import Artifact, Lineage
from flows.records import Execution
from taskvec.errors import GateClosed, InvalidInput

MODEL = "/model.safetensors"
OVERRIDDEN = "overridden"


@dataclass(frozen=True)
class Objection:
    """What speaks against a promotion.

    Attributes:
        words: what, and what to do.
        final: nobody can override it.
    """

    words: str
    final: bool


def promote(root: Path, name: str, alias: str, override: str = "") -> str:
    """Register an edited model and let an alias point to it; return its ``models:/`` address.

    Args:
        root: the directory of params.yaml.
        name: an edit, or whatever else `Lineage.find` knows its model by.
        alias: such as "champion".
        override: why objections that can be overridden do not count; recorded with the version.

    Raises:
        GateClosed: something speaks against it.
        InvalidInput: it is no edited model, or the alias is malformed.
        ServiceUnreachable: MLflow does not answer.
    """
    registry.check_alias(alias)
    with Lineage(root) as lineage:
        artifact = lineage.find(name)
        if not artifact.name.endswith(MODEL):
            raise InvalidInput(f"{artifact.name} is no edited model; name an edit of params.yaml")
        found = list(objections(lineage, artifact))
        against = [one for one in found if one.final or not override]
        if against:
            hint = "" if any(one.final for one in against) else '; or --override "why"'
            lines = "\n  ".join(one.words for one in against)
            raise GateClosed(f"{artifact.name} is not promoted:\n  {lines}{hint}")
        maker = lineage.maker(artifact.md5)
        tags = {
            "dvc.md5": artifact.md5,
            "dvc.path": artifact.name,
            "taskvec.fingerprint": artifact.fingerprint,
            "taskvec.execution": maker.ident if maker else "",
            "git.commit": lineage.records.git("rev-parse", "HEAD").strip(),
        }
        if found:
            tags |= {"override": override, "overridden": "; ".join(one.words for one in found)}
        parents = [part.md5 for part in lineage.contents(artifact) if part.md5]
        edit = Path(artifact.name).parent.name.rpartition("-")[0]
    version = registry.register(root, edit, alias, tags, parents)
    return f"models:/{edit}/{version}"


def objections(lineage: Lineage, artifact: Artifact) -> Iterator[Objection]:
    """Yield what speaks against promoting a model."""
    for item in retractions.load(lineage.top).inside(lineage, artifact):
        yield Objection(f"it contains {item.path}, which is retracted: {item.why}", final=True)
    if lineage.records.git("status", "--porcelain", "--untracked-files=no"):
        yield Objection("there are uncommitted changes: commit them", final=False)
    for finding in verify.verify(lineage, [artifact]).findings:
        yield Objection(f"{finding.node}: {finding.problem}; {finding.repair}", final=False)
    own = [
        made.through
        for made in lineage.below(artifact)
        if made.current and made.through.stage == "evaluate"
        and artifact.md5 in made.through.inputs.values()
    ]  # fmt: skip
    if not own:
        yield Objection("it was not evaluated: run `taskvec run`", final=False)
    for execution in [*lineage.chain(artifact), *own[:1]]:
        for key, value in _measured(lineage, execution).items():
            if key.startswith("gate.") and str(value).startswith(OVERRIDDEN):
                yield Objection(f"{execution.name}: {key} was {value}", final=False)
            if execution in own and (key, value) == ("feasible.test", "infeasible"):
                yield Objection("its constraint fails on test data: it is infeasible", final=True)


def _measured(lineage: Lineage, execution: Execution) -> dict[str, Any]:
    """Return what an evaluation recorded as flat JSON; nothing for another stage."""
    if execution.stage != "evaluate":
        return {}
    found = (md5 for path, md5 in execution.outputs.items() if path.endswith(".json"))
    return {
        key: value
        for md5 in found
        for key, value in json.loads(lineage.stored(lineage.artifact(md5)).read_text()).items()
    }
