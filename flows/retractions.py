"""retractions.yaml: what turned out to be bad, by digest, committed to git.

A retraction is about bytes, not names: every model made of them is marked for ever, wherever it
lies, and what replaces them under the same name is not.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML

from flows.lineage import Artifact, Lineage
from tasks.artifacts import Artifacts
from taskvec import yaml_file
from taskvec.atomic import write_text
from taskvec.errors import InvalidInput

NOTE = "# What must not be used any more; written by `taskvec retract`.\n"
DIGEST = r"^[0-9a-f]{32}(\.dir)?$"
FINGERPRINT = r"^([0-9a-f]{64})?$"


class Retraction(BaseModel):
    """One artifact that must not be used any more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    md5: str = Field(pattern=DIGEST)
    fingerprint: str = Field(default="", pattern=FINGERPRINT)
    path: str
    why: str = Field(min_length=1)


@dataclass(frozen=True)
class Retractions:
    """Everything that was retracted."""

    items: tuple[Retraction, ...]

    def reasons(self) -> dict[str, str]:
        """Return digest -> why, by md5 and by fingerprint."""
        found = {}
        for item in self.items:
            found[item.md5] = item.why
            if item.fingerprint:
                found[item.fingerprint] = item.why
        return found

    def inside(self, lineage: Lineage, artifact: Artifact) -> list[Retraction]:
        """Return what of an artifact, or of what it is made of, was retracted."""
        parts = [artifact, *lineage.contents(artifact)]
        marks = {mark for part in parts for mark in (part.md5, part.fingerprint) if mark}
        return [item for item in self.items if {item.md5, item.fingerprint} & marks]


def load(top: Path) -> Retractions:
    """Return what retractions.yaml says; nothing if there is no such file.

    Raises:
        InvalidInput: it is not what `taskvec retract` writes.
    """
    path = Artifacts(top).retractions()
    if not path.is_file():
        return Retractions(())
    content = yaml_file.plain(yaml_file.read(path))
    try:
        return Retractions(tuple(Retraction(**item) for item in content["retractions"]))
    except (ValidationError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path}: not what `taskvec retract` writes ({error}); `git diff {path.name}` shows "
            "what was edited"
        ) from None


def retract(lineage: Lineage, artifact: Artifact, why: str) -> list[Artifact]:
    """Record that an artifact must not be used; return the models that contain it.

    Raises:
        InvalidInput: no reason is given, or the artifact is not known to DVC.
    """
    if not why.strip():
        raise InvalidInput('--why "..." says what is wrong with it; it is committed to git')
    if not artifact.md5:
        raise InvalidInput(
            f"{artifact.name} was made outside the graph; retract what it is made of instead"
        )
    known = load(lineage.top)
    new = Retraction(
        md5=artifact.md5, fingerprint=artifact.fingerprint, path=artifact.name, why=why.strip()
    )
    kept = [item for item in known.items if item.md5 != new.md5]
    _write(lineage.top, [*kept, new])
    return [made.artifact for made in lineage.below(artifact) if made.contains]


def withdraw(lineage: Lineage, artifact: Artifact) -> None:
    """Take a retraction back.

    Raises:
        InvalidInput: the artifact was not retracted.
    """
    known = load(lineage.top)
    kept = [item for item in known.items if item.md5 != artifact.md5]
    if len(kept) == len(known.items):
        raise InvalidInput(f"{artifact.name} ({artifact.key[:12]}) was not retracted")
    _write(lineage.top, kept)


def notes(lineage: Lineage) -> list[str]:
    """Return a sentence for each model in the checkout that contains something retracted."""
    found = []
    for item in load(lineage.top).items:
        made = [m for m in lineage.below(lineage.artifact(item.md5)) if m.contains and m.current]
        models = [m.artifact.name for m in made if m.artifact.name.endswith("/model.safetensors")]
        where = f"; {len(models)} edited models contain it: {', '.join(models)}" if models else ""
        found.append(f"{item.path} ({item.md5[:12]}) is retracted: {item.why}{where}")
    return found


def _write(top: Path, items: Iterable[Retraction]) -> None:
    ordered = sorted(items, key=lambda item: (item.path, item.md5))
    yaml = YAML()
    yaml.width = 10_000
    stream = StringIO()
    content = [item.model_dump(exclude_defaults=True) for item in ordered]
    yaml.dump({"retractions": content}, stream)
    write_text(Artifacts(top).retractions(), NOTE + stream.getvalue())
