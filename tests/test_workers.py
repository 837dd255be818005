"""Slots keep their law, and a stage's process reports, fails, crashes and ends as it should."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.nodes import Node
from flows.slots import Slots, find_slots
from flows.workers import Child, Resident, check_command
from taskvec.errors import InvalidInput
from tests.project import EXPERIMENT, ROOT

# Slots


@settings(max_examples=30, deadline=None)
@given(
    cpus=st.integers(1, 3),
    devices=st.lists(st.sampled_from("0123"), unique=True, max_size=4),
    wants=st.lists(st.integers(0, 3), max_size=30),
)
def test_no_more_run_at_once_than_there_are_slots_and_no_device_is_shared(
    cpus: int, devices: list[str], wants: list[int]
) -> None:
    slots = Slots(cpus, devices)
    lock = threading.Lock()
    in_use: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def work(gpus: int) -> list[str]:
        with slots.take(gpus) as mine:
            with lock:
                in_use.update(mine or ["cpu"])
                for name, count in in_use.items():
                    most[name] = max(most[name], count)
            time.sleep(0.0005)
            with lock:
                in_use.subtract(mine or ["cpu"])
            return mine

    wants = [want for want in wants if not want > len(devices) > 0]
    with ThreadPoolExecutor(8) as pool:
        given_devices = list(pool.map(work, wants))
    assert most["cpu"] <= cpus
    assert all(most[device] <= 1 for device in devices)
    for want, mine in zip(wants, given_devices, strict=True):
        assert len(mine) == (want if devices else 0)
        assert len(set(mine)) == len(mine)
    assert slots.total == cpus + len(devices)


def test_a_stage_waits_until_a_slot_is_free() -> None:
    slots = Slots(1, ["3", "5"])
    entered = threading.Event()

    def wait_for_a_device() -> list[str]:
        with slots.take(1) as devices:
            entered.set()
            return devices

    with ThreadPoolExecutor(1) as pool:
        with slots.take(2) as both:
            assert both == ["3", "5"]
            waiting = pool.submit(wait_for_a_device)
            assert not entered.wait(0.2)
            with slots.take(0) as none:  # the CPU slot is another matter
                assert none == []
        assert waiting.result(5) in (["3"], ["5"])


def test_a_slot_is_free_again_after_an_error() -> None:
    slots = Slots(1, ["0"])
    for gpus in (0, 1):
        for _ in range(3):
            with pytest.raises(KeyError), slots.take(gpus):
                raise KeyError


def test_a_stage_that_wants_more_gpus_than_there_are_is_refused() -> None:
    with (
        pytest.raises(InvalidInput, match="wants 3 GPUs, there are 2"),
        Slots(4, ["0", "1"]).take(3),
    ):
        pass
    with Slots(1, []).take(3) as devices:  # without any GPU everything runs on the CPU
        assert devices == []


def test_a_spare_slot_is_one_that_nobody_uses_or_waits_for() -> None:
    slots = Slots(2, ["4"])
    with slots.spare(0) as cpu, slots.spare(1) as gpu:
        assert (cpu, gpu) == ([], ["4"])
        with slots.spare(1) as none:
            assert none is None
        with slots.take(0), slots.spare(0) as none:
            assert none is None
    entered = threading.Event()

    def enter() -> None:
        with slots.take(1):
            entered.set()

    with ThreadPoolExecutor(1) as pool, slots.take(1):
        waiting = pool.submit(enter)
        while not slots.wanted:
            time.sleep(0.001)
        with slots.spare(0) as none:  # free, but somebody waits for another kind
            assert none is None
        assert not entered.is_set()
    waiting.result(5)
    assert entered.is_set() and not slots.wanted


def test_the_visible_devices_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-1234")
    assert find_slots(3).total == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert find_slots(3).total == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_slots().total == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "command",
    [
        "", "python -m tasks", "python -m task combine a-0", "python -m tasks conbine a-0",
        "python -m tasks combine a-0 b", "python3 -m tasks combine a-0", "rm -rf x y z",
        "python -m tasks combine;rm a-0",
    ],
)  # fmt: skip
def test_only_the_stages_of_tasks_are_run(command: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not `python -m tasks STAGE \[ITEM\]`"):
        check_command(Node("some", "some", command, 0, 1.0, [], [], []))
    check_command(Node("some", "some", "python -m tasks combine a-0", 0, 1.0, [], [], []))


# Processes. The stage `combine` is replaced in a copy of the sources, all else is real.

STAGE = """
import os, signal, sys, time
from pathlib import Path
from taskvec.errors import MissingArtifact

basis_prefix = offset_prefix = stored_vectors = None  # what other modules import of it

def combine(artifacts, *, edit, seed, expression, vectors, emit):
    if seed == 1:
        for step in range(1, 201):
            emit({"step": step, "steps": 200, "loss": 1 / step})
    elif seed == 2:
        raise MissingArtifact("there is no vector")
    elif seed == 3:
        raise ValueError("a mistake in the code")
    elif seed == 4:
        print("first words\\n" * 100, "last words", sep="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    elif seed in (5, 8, 9):
        (artifacts.root / f"hangs-{seed}-{os.getpid()}").touch()
        time.sleep(600)
    elif seed == 6:
        names = {"device": "CUDA_VISIBLE_DEVICES", "threads": "OMP_NUM_THREADS"}
        found = {word: float(os.environ[name]) for word, name in names.items()}
        emit({"step": 1, "steps": 1, **found, "here": float(Path().samefile(artifacts.root))})
    elif seed == 7:
        os._exit(3)
    elif seed == 10:
        while not Path("taken").exists():
            time.sleep(0.02)
        emit({"step": 1, "steps": 1})
    elif seed == 11:
        time.sleep(1.5)
    elif seed == 12:
        emit({"step": 1, "steps": 1, "process": os.getpid()})
    elif seed == 14:
        emit({"step": 1, "steps": 1, "none": float(os.environ["CUDA_VISIBLE_DEVICES"] == "")})
    elif seed == 13:
        full = bytearray(200 * 2**20)
        while time.process_time() < 0.5:
            pass

def assist(artifacts, *, edit, seed, expression, vectors, emit):
    emit({"step": 7, "steps": 7})
    (artifacts.root / f"assistant-{seed}-{os.getpid()}").touch()
    time.sleep(600)
"""

DRIVER = """
import json, os, sys, threading, time
from pathlib import Path
open("driver_was_imported", "a").write("x")

from flows import workers as module
from flows.nodes import Node
from flows.slots import Slots
from flows.workers import Workers

module.ASSISTED = ()

def node(seed, timeout=60.0):
    name = f"combine@both-{seed}"
    return Node(name, name, f"python -m tasks combine both-{seed}", 0, timeout, [], [], [])

def attempt(seed, timeout=60.0, devices=(), workers=None):
    workers, events, began = workers or warm, [], time.monotonic()
    try:
        error = {"used": workers.run(node(seed, timeout), list(devices), events.append)}
    except Exception as caught:
        error = {"kind": type(caught).__name__, "words": str(caught),
                 "code": getattr(caught, "exit_code", None)}
    return {"events": events, "seconds": time.monotonic() - began, **error}

warm = Workers(Path.cwd(), Slots(2, []))
warm.start()
attempt(1)
found = {
    "steps": attempt(1), "error": attempt(2), "exception": attempt(3), "killed": attempt(4),
    "late": attempt(5, timeout=1.0), "devices": attempt(6, devices=["7"]), "gone": attempt(7),
}
threads = [threading.Thread(target=attempt, args=(1,)) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
found["after"] = attempt(1)
stopped = Workers(Path.cwd(), Slots(2, []))
stopper = threading.Timer(1.0, stopped.stop, [15])
stopper.start()
found["stopped"] = attempt(9, workers=stopped)
found["not started"] = attempt(9, workers=stopped)
found["used"] = attempt(13)

module.RESIDENT = ("combine",)
def kept(seed=12, devices=(), workers=None):
    events = attempt(seed, devices=devices, workers=workers)["events"]
    return [event["process"] for event in events]

found["kept"] = [*kept(), *kept(), *kept(devices="7"), *kept(devices="7"), *kept()]
attempt(3)
found["kept after an error"] = kept()
module.RESIDENT = ()
attempt(6, devices=["7"])
time.sleep(0.2)
found["living"] = [pid for pid in set(found["kept"]) if Path(f"/proc/{pid}").exists()]
module.resident.retire(0.0)
found["retired"] = [pid for pid in set(found["kept"]) if Path(f"/proc/{pid}").exists()]
hidden = Workers(Path.cwd(), Slots(2, ["7"]))
found["hidden"] = attempt(14, workers=hidden)

module.ASSISTED, module.ASSIST_AFTER = ("combine",), 0.3

def assisted(seed, slots):
    def take_a_slot():
        while not list(Path.cwd().glob("assistant-10-*")):
            time.sleep(0.02)
        with slots.take(0):
            Path("taken").touch()
    threading.Thread(target=take_a_slot, daemon=True).start()
    with slots.take(0):
        return attempt(seed, workers=Workers(Path.cwd(), slots))

(Path.cwd() / ".taskvec/logs").mkdir(parents=True, exist_ok=True)
found["assisted"], found["alone"] = assisted(10, Slots(2, [])), assisted(11, Slots(1, []))
print(json.dumps(found), flush=True)
for _ in range(2):
    threading.Thread(target=attempt, args=(8,), daemon=True).start()
time.sleep(600)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources with another `combine`, and a driver."""
    root = tmp_path_factory.mktemp("checkout")
    for room in ("flows", "tasks", "taskvec"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tasks/combine.py").write_text(STAGE)
    (root / "driver.py").write_text(DRIVER)
    nothing = '{"package": "x", "version": "1", "files": {}}'
    text = EXPERIMENT.replace("SOURCE_DIGITS", nothing).replace("SOURCE_FACES", nothing)
    (root / "params.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def driver(checkout: Path) -> Iterator["subprocess.Popen[str]"]:
    """Yield a driver that has tried all ways to end and then hangs in two stages."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "driver.py"],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, text=True,
        stdout=subprocess.PIPE,
    ) as driver:  # fmt: skip
        yield driver
        driver.kill()


@pytest.fixture(scope="module")
def attempts(driver: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return what the driver saw of stages that end in all ways."""
    assert driver.stdout is not None
    return dict(json.loads(driver.stdout.readline()))


def test_progress_arrives_completely_and_in_order(attempts: dict[str, Any]) -> None:
    steps = attempts["steps"]
    assert "kind" not in steps
    assert [event["step"] for event in steps["events"]] == list(range(1, 201))
    assert steps["events"][99]["loss"] == 0.01


def test_an_error_of_a_stage_keeps_its_words_and_its_exit_code(attempts: dict[str, Any]) -> None:
    error = attempts["error"]
    assert (error["kind"], error["code"]) == ("StageFailed", 5)
    assert error["words"] == "combine@both-2: there is no vector"


def test_a_mistake_in_the_code_is_shown_with_its_traceback(attempts: dict[str, Any]) -> None:
    error = attempts["exception"]
    assert (error["kind"], error["code"]) == ("StageFailed", 1)
    assert "ValueError: a mistake in the code" in error["words"]
    assert "tasks/combine.py" in error["words"]


def test_a_killed_process_is_a_crash_with_its_exit_code_and_last_words(
    attempts: dict[str, Any],
) -> None:
    crash = attempts["killed"]
    assert crash["kind"] == "StageCrashed"
    assert "died with exit code -9" in crash["words"]
    assert crash["words"].endswith("last words")
    assert len(crash["words"].splitlines()) < 20
    gone = attempts["gone"]
    assert gone["kind"] == "StageCrashed"
    assert "exit code 3" in gone["words"]


def test_a_stage_is_killed_at_its_timeout(attempts: dict[str, Any], checkout: Path) -> None:
    late = attempts["late"]
    assert late["kind"] == "StageCrashed"
    assert "ran longer than 1 s" in late["words"] and "meta.timeout" in late["words"]
    assert 1.0 <= late["seconds"] < 5.0
    (mark,) = checkout.glob("hangs-5-*")
    assert not psutil.pid_exists(int(mark.name.removeprefix("hangs-5-")))


def test_a_stage_is_killed_when_the_workers_are_stopped_and_no_other_one_begins(
    attempts: dict[str, Any],
) -> None:
    for name in ("stopped", "not started"):
        assert attempts[name]["kind"] == "StageFailed"  # and so is not tried again
        assert "was stopped" in attempts[name]["words"]
        assert attempts[name]["seconds"] < 10


def test_a_stage_sees_its_devices_one_thread_and_the_checkout(attempts: dict[str, Any]) -> None:
    (event,) = attempts["devices"]["events"]
    assert (event["device"], event["threads"], event["here"]) == (7.0, 1.0, 1.0)


def test_a_stage_without_a_gpu_sees_none(attempts: dict[str, Any]) -> None:
    assert attempts["hidden"]["events"][0]["none"] == 1.0


def test_what_a_stage_used_is_told(attempts: dict[str, Any]) -> None:
    used = attempts["used"]["used"]
    assert used["device"] == "cpu"
    assert used["peak_memory_mib"] > attempts["steps"]["used"]["peak_memory_mib"] + 150
    assert 0.2 < used["cpu_utilisation"] <= 1.5
    assert 0 < used["seconds"] <= attempts["used"]["seconds"]


def test_a_stage_that_keeps_what_it_loads_stays_on_its_device_until_the_room_is_needed(
    attempts: dict[str, Any],
) -> None:
    first, second, on_gpu, again_on_gpu, third = attempts["kept"]
    assert first == second == third != on_gpu == again_on_gpu
    assert attempts["kept after an error"] != [first]  # whatever it left is not used again
    assert attempts["living"] == []  # one ended with its error, the other one made room
    assert attempts["retired"] == []


def test_a_waiting_process_that_knows_the_stage_is_taken_first() -> None:
    class Waiting:
        """A child without a process."""

        process = SimpleNamespace(is_alive=lambda: True)

        def __init__(self, devices: list[str], *stages: str) -> None:
            self.devices, self.stages, self.finished = devices, set(stages), True

    resident = Resident()
    search, both, elsewhere = (
        Waiting([], "search"),
        Waiting([], "search", "report"),
        Waiting(["7"], "report"),
    )
    for child in (elsewhere, both, search):
        resident.keep(cast(Child, child))
    taken: list[object] = [resident.take(stage, []) for stage in ("report", "evaluate", "report")]
    assert taken == [both, search, None]  # what it does not know, any of its device can learn
    resident.keep(cast(Child, both))
    resident.keep(cast(Child, search))
    assert resident.take("search", []) is cast(object, search)  # which worked last
    assert resident.take("search", ["7"]) is cast(object, elsewhere)


def test_an_idle_slot_assists_a_stage_until_somebody_wants_it(
    attempts: dict[str, Any], checkout: Path
) -> None:
    # the stage ends only when another one has got the slot of its assistant
    assert "kind" not in attempts["assisted"]
    assert attempts["assisted"]["events"] == [{"step": 1, "steps": 1}]  # the assistant is silent
    assistants = [int(path.name.rpartition("-")[2]) for path in checkout.glob("assistant-10-*")]
    assert assistants and not any(psutil.pid_exists(number) for number in assistants)


def test_without_an_idle_slot_nobody_assists(attempts: dict[str, Any], checkout: Path) -> None:
    assert "kind" not in attempts["alone"]
    assert not list(checkout.glob("assistant-11-*"))


def test_stages_start_from_a_warm_process_which_never_imports_the_driver(
    attempts: dict[str, Any], checkout: Path
) -> None:
    # Importing torch alone takes longer.
    assert min(attempts[name]["seconds"] for name in ("steps", "error", "after")) < 0.7
    assert (checkout / "driver_was_imported").read_text() == "x"


def test_nothing_survives_a_killed_driver(
    driver: "subprocess.Popen[str]", attempts: dict[str, Any], checkout: Path
) -> None:
    assert attempts  # now it hangs in two stages
    deadline = time.monotonic() + 60
    while len(list(checkout.glob("hangs-8-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(driver.pid).children(recursive=True)
    assert len(below) >= 3  # the fork server and its children
    driver.kill()
    deadline = time.monotonic() + 20
    while left := [process for process in below if is_alive(process)]:
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
