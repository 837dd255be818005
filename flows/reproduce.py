"""Rebuild an artifact from its lineage, in a clean worktree with an empty cache, and compare."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.lineage import Artifact, Lineage
from flows.records import Execution, chunks, is_weights, md5_of, parsed
from tasks.artifacts import Artifacts
from taskvec.errors import InvalidInput, MissingArtifact, TaskvecError

TOLERANCE = 1e-3  # of the norm of the weights, between machines that round differently
# its runs are nobody's record
FORGET = ("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI", "TASKVEC_DATABASE_URL")


@dataclass(frozen=True)
class Rebuilt:
    """How a rebuilt artifact compares.

    Attributes:
        path: of the artifact.
        commit: whose code, parameters and graph were used.
        expected: md5 that is recorded.
        found: md5 of what came out.
        distance: of the weights, as a share of their norm; None if the file holds no weights, or
            the recorded one is not at hand.
        stages: how many stages ran.
    """

    path: str
    commit: str
    expected: str
    found: str
    distance: float | None
    stages: int

    @property
    def equal(self) -> bool:
        """Whether every bit is the same."""
        return self.expected == self.found

    @property
    def close(self) -> bool:
        """Whether the weights are those recorded, but for rounding."""
        return self.equal or (self.distance is not None and self.distance <= TOLERANCE)

    def described(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {**asdict(self), "equal": self.equal, "close": self.close}


def reproduce(
    lineage: Lineage,
    root: Path,
    artifact: Artifact,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Rebuilt:
    """Rebuild an artifact from the raw data on, and compare it with what is recorded.

    Args:
        lineage: of the repository.
        root: the directory of params.yaml.
        artifact: made by a stage.
        say: is told what is going on.

    Raises:
        MissingArtifact: no stage made it, or no commit and no file of the checkout says how.
        TaskvecError: the run failed.
    """
    maker = lineage.maker(artifact.key)
    if not maker or not artifact.md5:
        raise MissingArtifact(
            f"no stage made {artifact.name}; reproduce what it is made of, and repeat its command"
        )
    commit, stage = _recipe(lineage, root, maker)
    path = next(name for name, digest in maker.outputs.items() if digest == artifact.md5)
    say(f"{path}: {stage} at {commit[:12]}, from the data on")
    below = root.relative_to(lineage.top)
    with _worktree(lineage.top, commit) as tree:
        place = tree / below
        _isolate(tree, place)
        counted = _run(place, tree, stage)
        made = place / path
        found = md5_of(made)
        distance = None
        if found != artifact.md5 and is_weights(path):
            distance = _distance(lineage, artifact, made)
    return Rebuilt(path, commit, artifact.md5, found, distance, counted)


def render(found: Rebuilt) -> str:
    """Return the comparison as text."""
    made = f"{found.path}: rebuilt by {found.stages} stages at {found.commit[:12]}"
    if found.equal:
        return f"{made}; equal, bit for bit (md5 {found.found})"
    lines = [f"{made}; md5 {found.found}, recorded is {found.expected}"]
    if found.distance is None:
        lines.append("the bytes differ")
    else:
        verdict = "within" if found.close else "beyond"
        lines.append(
            f"the weights differ by {found.distance:.2g} of their norm, {verdict} the "
            f"{TOLERANCE:g} that other processors and versions of torch may make"
        )
    return "\n".join(lines)


def _recipe(lineage: Lineage, root: Path, maker: Execution) -> tuple[str, str]:
    """Return a commit that holds everything an execution was given, and the stage's name."""
    records = lineage.records
    candidates = [maker.run["recorded"]] if "recorded" in maker.run else []
    snapshot = records.git("stash", "create").strip() or records.git("rev-parse", "HEAD").strip()
    for commit in [snapshot, *candidates]:
        for lock in records.of_root(root):
            # The lock file itself may not be committed yet; what it is of must be.
            here = commit == snapshot
            text = (records.top / lock).read_text() if here else records.at(commit, lock)
            for stage, entry in chunks(text):
                try:
                    same = parsed(entry).ident == maker.ident
                except InvalidInput:
                    continue
                if same:
                    return commit, stage
    raise MissingArtifact(
        f"no commit and no file of the checkout says how {maker.name} was run; what was neither "
        "committed nor kept cannot be rebuilt"
    )


@contextmanager
def _worktree(top: Path, commit: str) -> Iterator[Path]:
    """Yield a directory with the files of a commit, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="taskvec-reproduce-") as directory:
        tree = Path(directory) / "tree"
        add = ["git", "worktree", "add", "--detach", "--quiet", str(tree), commit]
        done = subprocess.run(add, cwd=top, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TaskvecError(f"git cannot check out {commit[:12]}: {done.stderr.strip()}")
        try:
            yield tree
        finally:
            shutil.rmtree(tree, ignore_errors=True)
            subprocess.run(["git", "worktree", "prune"], cwd=top, check=False)


def _isolate(tree: Path, place: Path) -> None:
    """Give a worktree an empty cache of its own, and no lock entry that says what to expect."""
    for directory in {tree, place}:
        (directory / ".dvc").mkdir(exist_ok=True)
        (directory / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {tree / '.cache'}\n")
    for name in ("dvc.lock", "edits/dvc.lock", "results/dvc.lock"):
        (place / name).unlink(missing_ok=True)


def _run(place: Path, tree: Path, stage: str) -> int:
    """Run what a stage needs; return how many stages that were."""
    environment = {key: value for key, value in os.environ.items() if key not in FORGET}
    environment["PYTHONPATH"] = str(tree)
    if root := environment.get("TASKVEC_DATA"):
        environment["TASKVEC_DATA"] = str(Path(root).absolute())
    words = [sys.executable, "-m", "flows.cli", "run", stage]
    if Artifacts(place).top != place:
        words += ["--experiment", place.name]
    done = subprocess.run(
        words, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise TaskvecError(f"{stage} cannot be rebuilt (exit code {done.returncode}):\n{last}")
    return done.stderr.count("  run        ")


def _distance(lineage: Lineage, artifact: Artifact, made: Path) -> float | None:
    from flows.difference import distances

    try:
        recorded = lineage.stored(artifact)
    except MissingArtifact:
        return None
    return float(distances(recorded, made)["relative"])
