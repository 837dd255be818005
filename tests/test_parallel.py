"""Processes that train together learn what one process learns, and fail and end together."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

from tasks.artifacts import Artifacts
from tasks.ranks import TrainingFailed, lead, processes
from taskvec import checkpoints, yaml_file
from taskvec.errors import InvalidInput
from taskvec.parallel import joined
from taskvec.passes import Passage
from taskvec.sections import FineTune
from taskvec.training import Lesson, fine_tune
from tests.project import EXPERIMENT, ROOT
from tests.test_passes import bare, losses, one_thread, small_tower, train
from tests.test_towers import Tower, assert_same, coloured, tiny_tower
from tests.test_training import classifier, lesson, recipe

__all__ = ["one_thread"]  # a fixture

# The library: processes of a fork server, which imports once.

RECIPES = {
    "even": recipe(steps=4, batch_size=6, weight_decay=0.1),
    "uneven": recipe(steps=4, batch_size=7, micro_batch=2),
    "an empty share": recipe(steps=4, batch_size=1),
}


def learner(rank: int, size: int, directory: Path) -> None:
    """Train every recipe, and one that does not fit into the memory of the last process."""
    torch.set_num_threads(1)
    with joined(rank, size, directory / "meeting") as group:
        for name, how in RECIPES.items():
            tower = tiny_tower()
            steps = fine_tune(tower, [lesson()], how, 0, passage=Passage(tower, how, group))
            keep(directory / f"{name}-{rank}", tower, losses(steps))
        small = small_tower(2) if rank == size - 1 else small_tower(99)
        how = recipe(steps=4, batch_size=8)
        passage = Passage(small, how, group)
        steps = fine_tune(small, [lesson()], how, 0, passage=passage)
        keep(directory / f"small-{rank}", small, losses(steps))
        (directory / f"record-{rank}.json").write_text(json.dumps(passage.record()))


def keep(path: Path, tower: Tower, curve: list[float]) -> None:
    checkpoints.save(path, bare(tower), kind="checkpoint", curve=curve)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with what two processes learnt."""
    directory = tmp_path_factory.mktemp("learnt")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_parallel"])
    workers = [context.Process(target=learner, args=(i, 2, directory)) for i in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    return directory


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_learn_what_one_learns(learnt: Path, name: str) -> None:
    first, second = (checkpoints.load(learnt / f"{name}-{i}", "checkpoint") for i in range(2))
    assert_same(first.tensors, second.tensors)
    tower, steps, _ = train(RECIPES[name])
    assert first.metadata["curve"] == pytest.approx(losses(steps), rel=1e-5, abs=1e-7)
    for key, value in tower.state().items():
        torch.testing.assert_close(first.tensors[key], value, rtol=1e-3, atol=1e-4)


def test_two_processes_are_one_with_two_pieces_bit_for_bit(learnt: Path) -> None:
    found = checkpoints.load(learnt / "even-0", "checkpoint")
    tower, steps, _ = train(RECIPES["even"].model_copy(update={"micro_batch": 3}))
    assert_same(found.tensors, tower.state())
    assert found.metadata["curve"] == losses(steps)


def test_all_halve_where_one_has_too_little_memory(learnt: Path) -> None:
    first, second = (checkpoints.load(learnt / f"small-{i}", "checkpoint") for i in range(2))
    assert_same(first.tensors, second.tensors)
    steps = train(recipe(steps=4, batch_size=8))[1]
    assert first.metadata["curve"] == pytest.approx(losses(steps), rel=1e-5)
    records = [json.loads((learnt / f"record-{i}.json").read_text()) for i in range(2)]
    assert records == [{"training": {"micro_batch": 2, "halved_at": 1, "processes": 2}}] * 2


# How many


def test_the_number_of_processes_is_that_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TASKVEC_PROCESSES", raising=False)
    assert processes() == max(1, torch.cuda.device_count())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert processes() == 3
    monkeypatch.setenv("TASKVEC_PROCESSES", "2")
    assert processes() == 2
    for wrong in ("4", "0", "-1", "two", "1.5"):
        monkeypatch.setenv("TASKVEC_PROCESSES", wrong)
        with pytest.raises(
            InvalidInput, match=f"is '{wrong}'; expected a number from 1, at most 3"
        ):
            processes()


# The stage, as the pipeline runs it: a daemonic child of the fork server. A family is added to a
# copy of the sources, all else is real.

FAMILY = '''
"""A tiny tower that can be told to fail."""
import os, signal, time
from pathlib import Path
import torch
from torch import nn
from taskvec.towers import Tower

class Tiny(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode, self.calls = mode, 0
        self.conv, self.out = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        self.calls += self.training or torch.is_grad_enabled()
        if self.mode and self.calls == 3:
            rank = torch.distributed.get_rank()
            if self.mode == "hangs":
                Path(f"hangs-{os.getpid()}").touch()
                time.sleep(600)
            if self.mode == "killed" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.out(self.conv(x).relu().mean((2, 3)))

def tower(image_size, *, mode: str = ""):
    torch.manual_seed(0)
    return Tower(Tiny(mode), (0.5,) * 3, (0.5,) * 3, 8, {"family": "tiny"})
'''

DRIVER = """
import json, sys, time
from pathlib import Path
from flows.dag import Node
from flows.workers import Slots, Workers

workers = Workers(Path.cwd(), Slots(2, []))
workers.start()
text = Path("params.yaml").read_text()

def attempt(item, mode=""):
    Path("params.yaml").write_text(text.replace("MODE", mode))
    events = []
    node = Node(item, item, f"python -m tasks fine_tune {item}", 1, 300.0, [], [], [])
    try:
        workers.run(node, [], events.append)
    except Exception as error:
        return {"kind": type(error).__name__, "words": str(error), "code": error.exit_code}
    return {"events": events}

found = {"fine": attempt("digits-0"), "killed": attempt("digits-0", "killed")}
print(json.dumps(found), flush=True)
attempt("digits-0", "hangs")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources with a tiny family, the inputs of fine_tune, and a driver."""
    root = tmp_path_factory.mktemp("checkout")
    for room in ("flows", "tasks", "taskvec"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "taskvec/models/tiny.py").write_text(FAMILY)
    (root / "flows/warm.py").write_text("import tasks.fine_tune")
    (root / "driver.py").write_text(DRIVER)
    nothing = '{"package": "x", "version": "1", "files": {}}'
    text = EXPERIMENT.replace("SOURCE_DIGITS", nothing).replace("SOURCE_FACES", nothing)
    head, _, rest = text.partition("model:")
    text = f"{head}model: {{family: tiny, mode: 'MODE'}}{rest[rest.index(chr(10)) :]}"
    (root / "params.yaml").write_text(text)
    write_inputs(root)
    return root


def family(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("tiny", root / "taskvec/models/tiny.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_inputs(root: Path) -> None:
    artifacts, tower = Artifacts(root), family(root).tower(8)
    checkpoints.save(
        artifacts.pretrained(), tower.state(), kind="checkpoint", identity=dict(tower.identity)
    )
    checkpoints.save(artifacts.head("digits"), {"head": classifier()}, kind="head")
    images, labels = coloured(30)
    for split in ("train", "validation"):
        parts = {"images": images, "labels": labels}
        checkpoints.save(artifacts.images("digits", split), parts, kind="images")


@pytest.fixture(scope="module")
def driver(checkout: Path) -> Iterator["subprocess.Popen[str]"]:
    """Yield a driver that has seen a stage end in all ways and then waits for one that hangs."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "driver.py"],
        cwd=checkout, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(checkout), "TASKVEC_PROCESSES": "2"},
    ) as driver:  # fmt: skip
        yield driver
        driver.kill()


@pytest.fixture(scope="module")
def attempts(driver: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return what the driver saw."""
    assert driver.stdout is not None
    return dict(json.loads(driver.stdout.readline()))


def test_a_stage_trains_in_two_processes(attempts: dict[str, Any], checkout: Path) -> None:
    events = attempts["fine"]["events"]
    assert [event["step"] for event in events] == list(range(1, 7))
    artifacts = Artifacts(checkout)
    written = checkpoints.load(artifacts.checkpoint("digits", 0), "checkpoint")
    assert written.metadata["training"] == {"processes": 2}
    tower = family(checkout).tower(8)
    how = FineTune.model_validate(yaml_file.read(checkout / "params.yaml")["fine_tune"])
    what = Lesson(classifier(), *coloured(30))
    steps = train(how.model_copy(update={"micro_batch": 8}), tower, [what])[1]
    assert_same(written.tensors, tower.state())
    curve = pd.read_csv(artifacts.training("digits", 0))
    assert curve["loss"].tolist() == [event["loss"] for event in events] == losses(steps)


def test_a_process_that_is_killed_ends_the_stage(attempts: dict[str, Any]) -> None:
    killed = attempts["killed"]
    assert killed["kind"] == "StageCrashed"  # and so is tried again
    assert "process 1 of 2 died with exit code -9" in killed["words"]


def test_an_error_of_a_process_keeps_its_words_and_its_exit_code(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)  # whose code the process then has
    job = {
        "root": str(checkout), "expert": "moths", "seed": 0, "tasks": ["moths"],
        "model": {"family": "tiny"}, "recipe": recipe().model_dump(),
    }  # fmt: skip
    with pytest.raises(TrainingFailed, match=r"heads/moths.safetensors does not exist") as caught:
        lead(job, 1, lambda progress: None)
    assert caught.value.exit_code == 5


def test_the_processes_die_with_the_driver(
    attempts: dict[str, Any], driver: "subprocess.Popen[str]", checkout: Path
) -> None:
    del attempts
    deadline = time.monotonic() + 300
    while len(marks := list(checkout.glob("hangs-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [psutil.Process(int(mark.name.removeprefix("hangs-"))) for mark in marks]
    driver.kill()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
