"""A real checkout with a tiny experiment, for tests that run the whole pipeline."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

EXPERIMENT = """
seeds: [0]
gates: {expert_tolerance: 0.005, leak_margin: 0.05, leak_level: 0.001}
model: {family: bundled, image_size: 32, align_tasks: [digits, faces], shots: 2}
fine_tune:
  {steps: 6, batch_size: 16, learning_rate: 1e-4, weight_decay: 0.0, warmup: 0.1, clip_norm: 1.0}
tasks:
  digits:
    data:
      dataset: digits
      source: SOURCE_DIGITS
      train: 200
      validation: 60
      test: 80
    head: {kind: text, classes: [zero, one, two, three, four, five, six, seven, eight, nine],
           templates: ['a photo of the number "{}".']}
    fine_tune: {}
  faces:
    data:
      dataset: faces
      source: SOURCE_FACES
      train: 100
      validation: 30
      test: 70
    head: {kind: text, classes: [face, background], templates: ["a photo of a {}."]}
    fine_tune: {}
edits:
  both:
    expression: c * (digits + faces)
    coefficients: {c: {low: 0, high: 1, points: 3}}
    objective: {maximize: normalized_accuracy, tasks: [digits, faces]}
    evaluate: [digits, faces]
  forget:
    expression: -c * digits
    coefficients: {c: {low: 0, high: 1, points: 3}}
    objective: {minimize: accuracy, tasks: [digits]}
    constraint: {tasks: [faces], min_ratio: 0.9}
    evaluate: [digits, faces]
"""

# Secrets that every command finds in its environment and in a file, and must write nowhere.
CANARY = "-".join(["canary", "8f2b61d07c"])  # this file does not hold it either
SECRETS = {
    name: f"{CANARY}-{name.lower()}"
    for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY")
}

# What an experiment may have beside tasks and edits.
STUDY = """
variants:
  together: {of: [digits, faces], fine_tune: {steps: 8}}
  ascent: {of: [faces], fine_tune: {direction: ascend}, evaluate: [faces, digits]}
sweeps:
  pair:
    vectors: [digits, faces]
    sizes: [1, 2]
    coefficient: {low: 0, high: 1, points: 3}
    evaluate: all
few_shots:
  few: {task: faces, edits: [both], shots: [0, 2], fine_tune: {steps: 2}}
"""

ALL = {
    "prepare@digits", "prepare@faces", "pretrain", "head@digits", "head@faces",
    "fine_tune@digits-0", "fine_tune@faces-0", "extract@digits-0", "extract@faces-0",
    "evaluate@digits-0", "evaluate@faces-0", "combine-both-0", "search-both-0", "evaluate-both-0",
    "combine-forget-0", "search-forget-0", "evaluate-forget-0", "report",
}  # fmt: skip


@dataclass
class Result:
    """What a command did: exit code, output, and the outcome of every stage."""

    code: int
    out: str
    err: str
    outcomes: dict[str, str] = field(default_factory=dict)

    def stages(self, how: str) -> set[str]:
        """Return the names of the stages with an outcome."""
        return {name for name, outcome in self.outcomes.items() if outcome == how}


@dataclass
class Project:
    """A checkout of this repository in a directory of its own."""

    root: Path
    server: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        root: Path,
        server: dict[str, str],
        experiment: str = "",
        more: Mapping[str, str] | None = None,
        without: Collection[str] = (),
    ) -> "Project":
        """Copy the tracked files (as they are now) and put an experiment in.

        Args:
            root: where to.
            server: the environment of the commands, beside this process's own.
            experiment: the text of params.yaml; default: the tiny experiment.
            more: texts of further files.
            without: directories that are left out.
        """
        listing = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        )  # fmt: skip
        for name in listing.stdout.split("\0"):
            source = ROOT / name
            wanted = name and name.partition("/")[0] not in without and not name.endswith(".lock")
            if wanted and source.is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, root / name)
        (root / "params.yaml").write_text(experiment or _tiny())
        for name, text in (more or {}).items():
            (root / name).write_text(text)
        (root / ".env").write_text("".join(f"{name}={value}\n" for name, value in SECRETS.items()))
        project = cls(root, server)
        # Once, not in every process; and never taken for that of code that a test changes.
        packages = [name for name in ("flows", "tasks", "taskvec") if (root / name).is_dir()]
        project.command(
            sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash",
            *packages,
        )  # fmt: skip
        project.command("git", "init", "-q")
        (root / ".git/info/exclude").write_text(".env\n")
        project.command("git", "add", "-A")
        project.command(
            "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "tiny"
        )  # fmt: skip
        return project

    def copy(self, root: Path) -> "Project":
        """Return an independent copy, data included."""
        subprocess.run(["cp", "-a", f"{self.root}/.", str(root)], check=True)
        return Project(root, self.server)

    def environment(self) -> dict[str, str]:
        """Return the environment of commands: this Python, this checkout's code."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            **SECRETS,
            **self.server,
        }

    def start(self, *arguments: str, deaf: Collection[int] = ()) -> "subprocess.Popen[str]":
        """Start `taskvec ARGUMENTS` and return the process, the leader of its own group.

        Args:
            *arguments: of the command.
            deaf: signals that it is told to ignore, as `nohup` does.
        """

        def hear() -> None:  # also where the tests run in the background, or under `nohup`
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number in deaf else signal.SIG_DFL)

        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=self.root, env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=hear,
        )  # fmt: skip

    def command(self, *words: str) -> Result:
        """Run any command in the checkout."""
        done = subprocess.run(
            words,
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert CANARY not in done.stdout + done.stderr, words
        return result(done.returncode, done.stdout, done.stderr)

    def taskvec(self, *arguments: str) -> Result:
        """Run `taskvec ARGUMENTS`."""
        return self.command(sys.executable, "-m", "flows.cli", *arguments)

    def stale(self) -> dict[str, list[str]]:
        """Return the stale stages with their reasons in words."""
        content = json.loads(self.taskvec("status", "--json").out)
        return {s["name"]: [r["words"] for r in s["why"]] for s in content["stages"] if s["stale"]}

    def replace(self, name: str, old: str, new: str) -> None:
        """Replace a text in a file; it must be there."""
        path = self.root / name
        text = path.read_text()
        assert old in text, f"{old!r} is not in {name}"
        path.write_text(text.replace(old, new, 1))


def result(code: int, out: str, err: str) -> Result:
    """Return a finished command with the stage outcomes that it printed."""
    found = re.findall(r"^\[ *\d+/\d+\] .{8}  (run-cache|run|unchanged|failed)\s+(\S+)$", err, re.M)
    return Result(code, out, err, {name: how for how, name in found})


def _tiny() -> str:
    from taskvec import params

    tasks: Any = params.plain(params.read(ROOT / "params.yaml"))["tasks"]
    text = EXPERIMENT
    for task in ("digits", "faces"):
        text = text.replace(f"SOURCE_{task.upper()}", json.dumps(tasks[task]["data"]["source"]))
    return text
