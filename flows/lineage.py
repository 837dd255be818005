"""Where every artifact came from and what was made from it: questions to the index of records.

Files are linked by their bytes (md5), so that a chain stays true when names are used again. Models
that `taskvec edit` wrote outside the graph are linked by the fingerprints in their headers.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flows import outbox, sweep_rows
from flows.index import Index, header
from flows.records import Execution, Records, chunks, is_weights, md5_of, parsed
from flows.sweep_rows import Row
from tasks.artifacts import Artifacts, experiments
from taskvec.errors import InvalidInput, MissingArtifact, nearest

if TYPE_CHECKING:
    from flows.registry import Version

DIGEST = re.compile(r"[0-9a-f]{6,64}(\.dir)?")
FINGERPRINT = 64  # digits; an md5 has fewer
# Which output a task, an edit or a sweep means, the first stage that there is.
MEANT = ("search", "fine_tune", "sweep", "few_shot", "pretrain", "prepare", "head", "report")
# The directories of outputs, in the order of the pipeline: what lies there, in one word.
KINDS = {
    "prepared": "data",
    "checkpoints": "checkpoint",
    "heads": "head",
    "training": "training",
    "vectors": "vector",
    "edits": "edit",
    "sweeps": "sweep",
    "few_shots": "few-shot",
    "evaluations": "scores",
    "reports": "report",
}
# What the log of runs knows of an execution.
LOGGED = (
    "how", "because", "commit", "dirty", "prefect_task_run", "prefect_flow_run", "mlflow_run",
    "mlflow_parent", "run",
)  # fmt: skip
EDIT, MERGE, EXPORT = "taskvec edit", "taskvec merge", "taskvec export"
OUTSIDE = {EXPORT: "export", sweep_rows.COMMAND: "sweep row"}  # command -> kind of what it made


@dataclass(frozen=True)
class Artifact:
    """A version of a file.

    Attributes:
        md5: of its bytes; empty for a file that DVC does not know.
        paths: its names in the checkout, relative to the repository; a former version has those
            that it had, relative to the experiment.
        fingerprint: of its tensors, if it holds weights whose file is at hand; else empty.
        metadata: what a weights file states of itself.
        outside: what it is if no stage made it, in one word; else empty.
    """

    md5: str
    paths: tuple[str, ...]
    fingerprint: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    outside: str = field(default="", compare=False)

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return self.md5 or self.fingerprint

    @property
    def kind(self) -> str:
        """What it is, in one word."""
        if self.outside:
            return self.outside
        parts = Path(self.paths[0]).parts if self.paths else ()
        after = parts[parts.index("data") + 1 :] if "data" in parts else ()
        return KINDS.get(after[0], "file") if after else "file"

    @property
    def name(self) -> str:
        """One name, to show."""
        return min(self.paths, key=lambda path: (path.count("/"), path), default=self.key[:12])


@dataclass(frozen=True)
class Made:
    """Something that was made from an artifact.

    Attributes:
        artifact: what.
        contains: whether the artifact is a part of its weights; else it had a say in a choice or a
            figure only.
        current: whether the lock files of the checkout name it.
        through: the execution that made it.
    """

    artifact: Artifact
    contains: bool
    current: bool
    through: Execution


class Lineage:
    """Questions about the artifacts of a repository, answered offline."""

    def __init__(self, root: Path) -> None:
        """Open the index.

        Args:
            root: the directory of params.yaml, whose lock files say what a name means.
        """
        self._root = root
        self.top = Artifacts(root).top
        self.records = Records(self.top)
        self._index = Index(self.records)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._index.__exit__(*error)

    # ----------------------------------------------------------------------------------------
    # What a name means

    def find(self, name: str) -> Artifact:
        """Return the artifact that a name means.

        Args:
            name: a path; ``models:/NAME@ALIAS``; an md5, a fingerprint or the beginning of one (6
                digits or more); a task, an edit, a sweep or a stage, maybe with a seed
                (``addition``, ``addition-1``), also at a revision of git (``addition@HEAD~3``);
                a row of a sweep (``pairs-0:mnist+usps``, ``pairs-0:mnist+usps:0.4``).

        Raises:
            MissingArtifact: nothing recorded is called so.
            InvalidInput: a digest begins several artifacts' digests.
        """
        ways = (
            self._registered, self._at_path, self._by_digest, self._by_name, self._by_row,
            self._at_revision,
        )  # fmt: skip
        for way in ways:
            if found := way(name):
                return found
        known = {name for stage in self._stages for name in self._words(*stage)}
        raise MissingArtifact(
            f"nothing recorded is called {name!r}: no output of a stage, no model of `taskvec "
            f"edit`, no digest; {nearest(name, known)}"
        )

    def artifact(self, md5: str) -> Artifact:
        """Return the artifact with these bytes."""
        fingerprint, metadata = self._index.weights(md5)
        return Artifact(md5, tuple(self._index.paths(md5)), fingerprint, metadata)

    def _registered(self, name: str) -> Artifact | None:
        if not name.startswith("models:/"):
            return None
        from flows import registry

        return self.artifact(registry.digest(self._root, name))

    def _at_path(self, name: str) -> Artifact | None:
        path = Path(name)
        for place in dict.fromkeys([path.absolute(), self._root / path, self.top / path]):
            for root in (self._root, *experiments(self.top).values(), self.top):
                if not place.is_relative_to(root):
                    continue
                inside = place.relative_to(root).as_posix()
                for lock in self.records.of_root(root):
                    if md5 := self._index.output(lock, inside):
                        return self.artifact(md5)
        if path.is_dir() and (path / "provenance.json").is_file():
            path = next(iter(sorted(path.glob("*.safetensors"))), path)
        if not path.is_file():
            return None
        stated = header(path)
        # a whole model that was exported names the tower in it
        if mark := stated.get("tower") or stated.get("fingerprint"):
            if known := self._index.with_fingerprint(mark):
                return self.artifact(known[0])
            if "operands" in stated:
                self._outside[mark] = from_header(stated, path.name)
                return Artifact("", (str(path.absolute()),), mark, stated, "edit")
        digest = md5_of(path)
        return self.artifact(digest) if self._index.paths(digest) else None

    def _by_digest(self, name: str) -> Artifact | None:
        if not DIGEST.fullmatch(name):
            return None
        whole = len(name) == FINGERPRINT
        if whole and name in self._outside:
            return self._of_mark(name)
        found = self._marks(name) if whole else self._index.beginning_with(name)
        if len(found) > 1 and not whole:
            lines = [f"{md5}  {self.artifact(md5).name}" for md5 in found]
            raise InvalidInput("\n  ".join([f"several digests begin with {name}:", *lines]))
        return self.artifact(found[0]) if found else None

    def _by_name(self, name: str) -> Artifact | None:
        return self._named(name, self._current(self._root))

    def _by_row(self, name: str) -> Artifact | None:
        sweep, colon, rest = name.partition(":")
        if not (sweep and colon):
            return None
        subset, _, coefficient = rest.partition(":")
        for row in self._rows_of(sweep):
            if row.subset == subset and (
                row.name == f"{row.sweep}:{rest}" if coefficient else row.chosen
            ):
                (mark,) = row.execution.outputs.values()
                self._outside[mark] = row.execution
                return self._of_mark(mark)
        return None

    def _at_revision(self, name: str) -> Artifact | None:
        name, at, revision = name.rpartition("@")
        if not at or not name or revision.startswith("-"):
            return None
        entries = {}
        for lock in self.records.of_root(self._root):
            for stage, text in chunks(self.records.at(revision, lock)):
                entries[stage] = parsed(text)
        return self._named(name, entries)

    def _named(self, name: str, entries: dict[str, Execution]) -> Artifact | None:
        found = [
            (MEANT.index(entry.stage) if entry.stage in MEANT else len(MEANT), stage)
            for stage, entry in entries.items()
            if name in self._words(stage, entry)
        ]
        if not found:
            return None
        outputs = entries[min(found)[1]].outputs
        chosen = [path for path in outputs if path.endswith("/model.safetensors")]
        return self.artifact(outputs[(chosen or sorted(outputs))[0]])

    @staticmethod
    def _words(stage: str, entry: Execution) -> set[str]:
        """Return what an entry of a lock file may be called."""
        item, dash, seed = entry.item.rpartition("-")
        words = {stage, entry.stage, entry.item, *([item] if dash and seed.isdigit() else [])}
        return words - {""}

    def recorded(self) -> list[Execution]:
        """Return the executions that the lock files of the checkout name, experiments included."""
        idents = [
            ident
            for lock in self.records.lock_files()
            for ident in self._index.current(lock).values()
        ]
        return [self._index.execution(ident) for ident in dict.fromkeys(idents)]

    def sources(self, execution: Execution) -> list[tuple[str, str]]:
        """Return (source, stage) of every record of an execution: lock, commit or run cache."""
        return self._index.sources(execution.ident)

    def places(self, md5: str) -> list[str]:
        """Return the names of a file in the checkout, relative to the repository."""
        return self._index.paths(md5) if self._index.is_current(md5) else []

    def stage(self, execution: Execution) -> str:
        """Return what DVC calls the stage of an execution, or the command outside the graph."""
        if execution.stage == "taskvec":
            return execution.command
        names = [stage for _, stage in self._index.sources(execution.ident) if stage]
        return names[0] if names else execution.name

    @cached_property
    def _stages(self) -> list[tuple[str, Execution]]:
        return list(self._current(self._root).items())

    def _current(self, root: Path) -> dict[str, Execution]:
        """Return stage -> execution of the lock files of an experiment, in order of seeds."""
        found = {
            stage: self._index.execution(ident)
            for lock in self.records.of_root(root)
            for stage, ident in self._index.current(lock).items()
        }
        return dict(sorted(found.items(), key=lambda item: _natural(item[0])))

    # ----------------------------------------------------------------------------------------
    # Where it came from

    def chain(self, artifact: Artifact) -> list[Execution]:
        """Return the executions that made an artifact, the newest first, back to the data."""
        found: dict[str, Execution] = {}
        needs: dict[str, dict[str, None]] = {}  # in the order in which they were found
        waiting = deque([(artifact.key, "")])
        while waiting:
            mark, user = waiting.popleft()
            if not (maker := self.maker(mark)):
                continue
            if user and user != maker.ident:
                needs[user][maker.ident] = None
            if maker.ident in found:
                continue
            found[maker.ident], needs[maker.ident] = maker, {}
            waiting.extend((mark, maker.ident) for mark in maker.inputs.values())
        try:
            order = list(TopologicalSorter(needs).static_order())
        except CycleError:  # a stage that wrote exactly what an earlier one read
            order = list(found)[::-1]
        return [found[ident] for ident in reversed(order)]

    def last_two(self, command: str) -> tuple[Execution | None, Execution | None]:
        """Return the execution of a command that the checkout has, and the one before it.

        Before is the last that git recorded earlier; executions that were never committed have no
        order, so that one of them counts only if it is alone.
        """
        idents = self._index.of_command(command)
        now = [ident for ident in idents if ident in self._own]
        if not now:
            return None, None
        last = self._told(self._index.execution(now[0]))
        place = idents.index(now[0])
        committed = [i for i in idents[:place] if self._index.execution(i).run]
        others = committed or [ident for ident in idents if ident != now[0]]
        alone = committed or len(others) == 1
        if not alone or not others:
            return last, None
        before = self._index.execution(others[-1])
        # The log of runs knows files: of two executions that made the same it means the last.
        return last, before if before.outputs == last.outputs else self._told(before)

    def maker(self, mark: str) -> Execution | None:
        """Return the execution that wrote some bytes, the one in the checkout if there are several.

        Args:
            mark: an md5, or the fingerprint of weights.
        """
        made = next(filter(None, map(self._index.makers, self._marks(mark))), [])
        if not made:
            return self._outside.get(mark)
        return self._told(self._index.execution(min(made, key=self._rank)))

    def stored(self, artifact: Artifact) -> Path:
        """Return a file that holds an artifact: DVC's copy, or one in the checkout.

        Raises:
            MissingArtifact: there is none.
        """
        cached = self.records.cached(artifact.md5)
        if artifact.md5 and cached.is_file():
            return cached
        for path in (self.top / name for name in artifact.paths):
            if path.is_file() and (not artifact.md5 or md5_of(path) == artifact.md5):
                return path
        raise MissingArtifact(
            f"the bytes of {artifact.name} ({artifact.key[:12]}) are not here; `dvc pull` or "
            "`taskvec run` may bring them back"
        )

    def contents(self, artifact: Artifact) -> list[Artifact]:
        """Return the weights that an artifact is made of, the nearest first."""
        found: dict[str, Artifact] = {}
        waiting = deque([artifact.key])
        while waiting:
            maker = self.maker(waiting.popleft())
            for path, mark in maker.inputs.items() if maker else ():
                if (is_weights(path) or maker.stage == "taskvec") and mark not in found:  # type: ignore[union-attr]
                    found[mark] = self._of_mark(mark)
                    waiting.append(mark)
        return list(found.values())

    def _marks(self, mark: str) -> list[str]:
        """Return the md5 of the files with a digest, which may be a fingerprint.

        An edit with coefficient 0 has the fingerprint of the base: the base comes first, then what
        the checkout has.
        """
        if len(mark) < FINGERPRINT:
            return [mark]

        def place(md5: str) -> tuple[bool, bool, str]:
            base = any(path.endswith("/pretrained.safetensors") for path in self._index.paths(md5))
            return not base, not self._index.is_current(md5), md5

        return sorted(self._index.with_fingerprint(mark), key=place)

    def _of_mark(self, mark: str) -> Artifact:
        known = self._marks(mark)
        if known:
            return self.artifact(known[0])
        maker = self._outside.get(mark)
        kind = OUTSIDE.get(maker.command, "edit") if maker else ""
        return Artifact("", tuple(maker.outputs) if maker else (), mark, outside=kind)

    def _rank(self, ident: str) -> tuple[int, str]:
        """Return how far an execution is from the checkout."""
        if ident in self._own:
            return 0, ident
        sources = [source for source, _ in self._index.sources(ident)]
        for place, kind in enumerate(("lock ", "commit ")):
            if any(source.startswith(kind) for source in sources):
                return 1 + place, ident
        return 3, ident

    @cached_property
    def _own(self) -> set[str]:
        return {entry.ident for _, entry in self._stages}

    # ----------------------------------------------------------------------------------------
    # What was made from it

    def below(self, artifact: Artifact) -> list[Made]:
        """Return everything made from an artifact: what contains it first, each by name."""
        inside = dict(self._reached(artifact.key, weights_only=True))
        found = {**dict(self._reached(artifact.key, weights_only=False)), **inside}
        made = [
            Made(self._of_mark(mark), mark in inside, self._is_current(mark), through)
            for mark, through in found.items()
        ]
        return sorted(made, key=lambda m: (not m.contains, not m.current, m.artifact.name))

    def rows(self, artifacts: Iterable[Artifact]) -> list[Row]:
        """Return the rows of sweeps, of the checkout, that are made of any of some weights."""
        parts = {artifact.md5 for artifact in artifacts} - {""}
        return [row for row in self._rows_of() if not parts.isdisjoint(row.inputs.values())]

    def _rows_of(self, name: str = "") -> Iterator[Row]:
        """Yield the rows of sweeps; of one, with a seed or without, if it is named."""
        for ident in self._index.current_of("sweep"):
            sweep = self._index.execution(ident)
            if name not in ("", sweep.item, sweep.item.rpartition("-")[0]):
                continue
            table = self.artifact(sweep_rows.table(sweep))
            with suppress(MissingArtifact):  # its bytes are not here
                yield from sweep_rows.rows(sweep, table.name, self.stored(table))

    def registered(self, digests: Iterable[str]) -> "list[Version]":
        """Return the versions of registered models that have some bytes.

        Raises:
            ServiceUnreachable: MLflow does not answer.
        """
        wanted = set(digests)
        return [version for version in self._versions if version.md5 in wanted]

    @cached_property
    def _versions(self) -> "list[Version]":
        from flows import registry

        return registry.versions(self._root)

    def _reached(self, start: str, *, weights_only: bool) -> Iterator[tuple[str, Execution]]:
        """Yield (digest, execution) of what was made from some bytes, directly or not."""
        seen = {start}
        waiting = deque([start])
        while waiting:
            mark = waiting.popleft()
            for execution, read in self._users(mark):
                outside = execution.stage == "taskvec"
                if weights_only and not outside and not is_weights(read):
                    continue
                for path, output in execution.outputs.items():
                    if output in seen or (weights_only and not outside and not is_weights(path)):
                        continue
                    seen.add(output)
                    waiting.append(output)
                    yield output, execution

    def _users(self, mark: str) -> Iterator[tuple[Execution, str]]:
        """Yield the executions that read some bytes, and the name under which they did."""
        for md5 in self._marks(mark):
            for ident in self._index.users(md5):
                execution = self._index.execution(ident)
                yield execution, next(p for p, m in execution.inputs.items() if m == md5)
        marks = {mark, self._index.weights(mark)[0]} - {""}
        for execution in self._outside.values():
            for name, used in execution.inputs.items():
                if used in marks and execution.command != sweep_rows.COMMAND:
                    yield execution, name

    def _is_current(self, mark: str) -> bool:
        return any(self._index.is_current(md5) for md5 in self._marks(mark))

    def _told(self, execution: Execution) -> Execution:
        """Return an execution with what the log of runs knows of it."""
        known = self._runs.get(frozenset(execution.outputs.values()))
        return replace(execution, run={**execution.run, **_facts(known)}) if known else execution

    @cached_property
    def logged(self) -> list[dict[str, Any]]:
        """What was executed to its end, as `flows.outbox.executions` tells it."""
        return [run for run in outbox.executions(self.top) if run["status"] == "FINISHED"]

    @cached_property
    def _runs(self) -> dict[frozenset[str], dict[str, Any]]:
        """Return the md5s of all outputs of a stage -> the last run that made them."""
        return {frozenset(run["made"]): run for run in self.logged if run["made"]}

    @cached_property
    def _outside(self) -> dict[str, Execution]:
        """Return digest -> how it was made, of models that were made outside the graph."""
        found: dict[str, Execution] = {}
        for run in self.logged:
            if run["kind"] == "edit" and "operands" in run["recipe"]:
                made = from_header(run["recipe"], run["path"])
                found[run["recipe"]["fingerprint"]] = replace(made, run=_facts(run))
            elif run["kind"] == "export":
                found[run["digest"]] = replace(exported(run), run=_facts(run))
        return found


def from_header(stated: dict[str, Any], name: str) -> Execution:
    """Return how a model was made outside the graph, as its header says.

    Args:
        stated: the header of a model of `taskvec edit` or `taskvec merge`.
        name: of the file.
    """
    operands = {
        operand: item["fingerprint"] or item["file"] if isinstance(item, dict) else item
        for operand, item in {"origin": stated["origin"], **stated["operands"]}.items()
        if item
    }
    recipe: dict[str, Any] = {
        key: stated[key] for key in ("expression", "coefficients", "seed") if key in stated
    }
    kind = EDIT if "coefficients" in stated else MERGE
    command = f"{kind} {stated['expression']!r}"
    return Execution(command, operands, {name: stated["fingerprint"]}, {"": recipe})


def exported(run: dict[str, Any]) -> Execution:
    """Return how an export was made, as the log of runs says."""
    source = {run["model"]: run["md5"] or run["fingerprint"]}
    recipe = {"format": run["library"]}
    return Execution(EXPORT, source, {run["path"]: run["digest"]}, {"": recipe})


def _facts(run: dict[str, Any]) -> dict[str, str]:
    """Return what the log of runs knows of an execution, in the words of `Execution.run`."""
    facts = {key: str(run[key]) for key in LOGGED if run.get(key)}
    if run.get("user"):
        facts["who"] = f"{run['user']}@{run['host']}"
    for key, name in (("started", "started"), ("ended", "when")):
        if run.get(key):
            facts[name] = datetime.fromtimestamp(run[key], UTC).isoformat("T", "seconds")
    return facts


def _natural(name: str) -> tuple[str, int]:
    """Return a key that sorts mnist-2 before mnist-10."""
    text, _, number = name.rpartition("-")
    return (text, int(number)) if number.isdigit() else (name, -1)
