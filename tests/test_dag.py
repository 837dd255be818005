"""`Dag` against DVC itself, on a small real repository: the same plan, the same lock files."""

import filecmp
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from pathlib import Path
from random import Random
from typing import Any

import pytest
from dvc.utils.serialize import dumps_yaml, load_yaml, parse_yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flows.dag import Dag, StageChanged
from flows.lock_file import LockFile
from taskvec.errors import InvalidInput, TaskvecError
from tests.project import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # in DVC

# Stages as in this repository, with small commands: parameters, code, two files, items, a metric.
MAIN = """
stages:
  prepare:
    foreach: [mnist, digits]
    do:
      cmd: cp -f source.txt data/${item}.txt
      deps: [source.txt]
      params: ['tasks.${item}']
      outs: ['data/${item}.txt']
  join:
    cmd: cat data/mnist.txt data/digits.txt > data/joined.txt && echo {} > data/joined.json
    deps: [data/digits.txt, data/mnist.txt]
    params:
      - model
      - code.yaml: [python, packages.torch, join]
    outs: [data/joined.txt]
    metrics: [data/joined.json]
    meta: {gpu: 1, timeout: 77}
"""
EDITS = """
stages:
  search-sum-0:
    wdir: ..
    cmd: cp -f data/joined.txt data/searched.txt
    deps: [data/joined.txt]
    params: [edits.sum.coefficients]
    outs: [data/searched.txt]
"""
PARAMS = """
model: {width: 1, rate: 1e-5}
tasks: {mnist: {train: 3}, digits: {train: 4}}
edits: {sum: {coefficients: {c: {low: 0, high: 1, points: 3}}}}
"""
CODE = "python: '3.11'\npackages: {torch: 2.0.0}\njoin: aaa\n"
ALL = ["prepare@mnist", "prepare@digits", "join", "edits/dvc.yaml:search-sum-0"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    (root / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    files = {
        "dvc.yaml": MAIN, "edits/dvc.yaml": EDITS, "params.yaml": PARAMS, "code.yaml": CODE,
        "source.txt": "text\n", ".gitignore": "/data/\n", "data/keep": "",
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository in which nothing has run; the working directory, as for `taskvec`."""
    checkout = copy(template, tmp_path / "checkout")
    monkeypatch.chdir(checkout)
    return checkout


@pytest.fixture(scope="module")
def done_template(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = copy(template, tmp_path_factory.mktemp("done") / "checkout")
    with chdir(checkout):
        bring_up_to_date(checkout)
    return checkout


@pytest.fixture
def done(done_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository in which everything is up to date."""
    checkout = copy(done_template, tmp_path / "done")
    monkeypatch.chdir(checkout)
    return checkout


@pytest.fixture(scope="module")
def repro(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return a repository that `dvc repro` brought up to date, and the order of its stages."""
    checkout = copy(template, tmp_path_factory.mktemp("repro") / "checkout")
    done = dvc(checkout, "repro", "dvc.yaml", "edits/dvc.yaml")
    assert done.returncode == 0, done.stderr
    return checkout, re.findall(r"^Running stage '(.*)':$", done.stdout, re.M)


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)
    return target


def dvc(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip


def stages(root: Path) -> dict[str, Any]:
    """Return the entries of the lock file."""
    return dict(load_yaml(root / "dvc.lock")["stages"])


def work(dag: Dag, root: Path, address: str) -> None:
    """Do a stage as a worker would: write new files."""
    node = next(node for node in dag.plan(list(ALL)) if node.address == address)
    subprocess.run(["sh", "-c", node.command], cwd=root, check=True)


def bring_up_to_date(root: Path) -> dict[str, str]:
    """Do what the flow does, one stage after the other; return how each went."""
    dag = Dag(root)
    hows = {}
    for node in dag.plan(["join", "search-sum-0"]):
        hows[node.address] = how = dag.begin(node.address)
        if how == "run":
            with dag.guard(node.address, owner="test"):
                subprocess.run(["sh", "-c", node.command], cwd=root, check=True)
        if how != "skip":
            dag.commit(node.address)
    return hows


def reasons(root: Path) -> dict[str, list[tuple[str, str]]]:
    nodes = Dag(root).plan(["join", "search-sum-0"])
    return {n.name: [(r.kind, r.words) for r in n.reasons] for n in nodes if n.reasons}


def change(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).unlink()  # outputs are read-only and may share their bytes with the cache
    (root / name).write_text(text.replace(old, new, 1))


# The plan


def test_the_plan_has_the_order_of_dvcs_own(root: Path, repro: tuple[Path, list[str]]) -> None:
    assert [node.address for node in Dag(root).plan(ALL)] == repro[1] == ALL


def test_a_plan_without_targets_is_dvc_yaml_and_what_it_needs(root: Path) -> None:
    assert [node.address for node in Dag(root).plan()] == ALL[:3]


def test_a_plan_of_a_target_holds_what_it_needs_and_no_more(root: Path) -> None:
    dag = Dag(root)
    assert [node.name for node in dag.plan(["prepare@digits"])] == ["prepare@digits"]
    assert [node.address for node in dag.plan(["search-sum-0"])] == ALL
    assert [node.address for node in dag.plan(["edits/dvc.yaml:search-sum-0"])] == ALL


def test_a_node_says_what_dvc_yaml_says(root: Path) -> None:
    nodes = {node.name: node for node in Dag(root).plan(ALL)}
    join = nodes["join"]
    assert (join.gpus, join.timeout) == (1, 77.0)
    assert join.deps == ["data/digits.txt", "data/mnist.txt"]
    assert join.outs == ["data/joined.txt", "data/joined.json"]
    assert join.upstream == ["prepare@digits", "prepare@mnist"]
    assert join.params["model"] == {"width": 1, "rate": 1e-5}
    assert join.params["code.yaml:join"] == "aaa"
    assert nodes["search-sum-0"].outs == ["data/searched.txt"]
    assert nodes["search-sum-0"].upstream == ["join"]


# Why


def test_what_has_never_run_says_so_and_what_follows_names_it(root: Path) -> None:
    assert set(reasons(root)) == {"prepare@mnist", "prepare@digits", "join", "search-sum-0"}
    assert all(kind == "never run" for [(kind, _)] in reasons(root).values())


def test_what_is_up_to_date_has_no_reason(done: Path) -> None:
    assert reasons(done) == {}


@pytest.mark.parametrize(
    ("name", "old", "new", "stage", "kind", "words"),
    [
        ("params.yaml", "width: 1", "width: 2", "join", "params", "model.width changed: 1 -> 2"),
        ("params.yaml", "1e-5", "2e-5", "join", "params", "model.rate changed: 1e-05 -> 2e-05"),
        ("params.yaml", "width: 1, ", "", "join", "params", "model.width changed: 1 -> none"),
        ("params.yaml", "points: 3", "points: 4", "search-sum-0", "params",
         "edits.sum.coefficients.c.points changed: 3 -> 4"),
        ("code.yaml", "aaa", "bbb", "join", "code", "its code changed"),
        ("code.yaml", "2.0.0", "2.1.0", "join", "params", "packages.torch changed: 2.0.0 -> 2.1.0"),
        ("code.yaml", "3.11", "3.12", "join", "params", "python changed: 3.11 -> 3.12"),
        ("data/joined.txt", "text", "other", "join", "output",
         "its output data/joined.txt is changed"),
        ("dvc.yaml", "cat data/mnist.txt", "cat  data/mnist.txt", "join", "command",
         "its command changed"),
    ],
)  # fmt: skip
def test_a_change_is_told_in_words(
    done: Path, name: str, old: str, new: str, stage: str, kind: str, words: str
) -> None:
    change(done, name, old, new)
    found = reasons(done)
    assert (kind, words) in found[stage]
    for below in {"join": ["search-sum-0"]}.get(stage, []):
        [(kind, words), *_] = found[below]
        assert kind in ("upstream", "data")
    assert found.keys() <= {stage, "search-sum-0"}


def test_a_changed_and_a_missing_file_are_told_by_their_names(done: Path) -> None:
    change(done, "source.txt", "text", "other")
    found = reasons(done)
    assert found["prepare@mnist"] == [("data", "source.txt is changed")]
    assert found["join"] == [("upstream", "prepare@digits will run (and 1 more)")]
    assert found["search-sum-0"] == [("upstream", "join will run")]
    (done / "data/searched.txt").unlink()
    assert ("output", "its output data/searched.txt is missing") in reasons(done)["search-sum-0"]


def test_comments_descriptions_and_meta_make_nothing_stale(done: Path) -> None:
    change(done, "dvc.yaml", "timeout: 77", "timeout: 99")
    change(done, "params.yaml", "model:", "# a word\nmodel:")
    change(done, "code.yaml", "join:", "other: ccc\njoin:")
    assert reasons(done) == {}


# The life of a stage


def test_lock_files_are_those_of_dvc_repro_byte_for_byte(
    done: Path, repro: tuple[Path, list[str]]
) -> None:
    for name in ("dvc.lock", "edits/dvc.lock"):
        assert filecmp.cmp(done / name, repro[0] / name, shallow=False), name
    status = dvc(done, "status", "--json")
    assert json.loads(status.stdout) == {}, status.stdout


def test_what_is_up_to_date_is_skipped(done: Path) -> None:
    before = (done / "dvc.lock").read_bytes()
    assert set(bring_up_to_date(done).values()) == {"skip"}
    assert (done / "dvc.lock").read_bytes() == before


def test_unchanged_outputs_stop_a_change_from_spreading(done: Path) -> None:
    change(done, "params.yaml", "train: 3", "train: 5")
    hows = bring_up_to_date(done)
    assert hows.pop("prepare@mnist") == "run"
    assert set(hows.values()) == {"skip"}


def test_a_parameter_put_back_is_restored_from_the_run_cache(done: Path) -> None:
    before = (done / "dvc.lock").read_bytes()
    change(done, "params.yaml", "width: 1", "width: 2")
    assert bring_up_to_date(done)["join"] == "run"
    assert (done / "dvc.lock").read_bytes() != before
    change(done, "params.yaml", "width: 2", "width: 1")
    assert bring_up_to_date(done)["join"] == "restored"
    assert (done / "dvc.lock").read_bytes() == before
    assert reasons(done) == {}


def test_a_missing_output_comes_back_from_the_cache(done: Path) -> None:
    (done / "data/joined.txt").unlink()
    assert bring_up_to_date(done)["join"] == "restored"
    assert (done / "data/joined.txt").read_text() == "text\ntext\n"


def test_a_failed_attempt_is_never_taken_for_a_finished_one(done: Path) -> None:
    """DVC's own object would now hand back the old outputs for the new parameters."""
    change(done, "params.yaml", "width: 1", "width: 2")
    dag = Dag(done)
    for _ in range(3):
        assert dag.begin("join") == "run"
        assert not (done / "data/joined.txt").exists()  # and here the stage fails
    work(dag, done, "join")
    dag.commit("join")
    assert "width: 2" in (done / "dvc.lock").read_text()
    assert reasons(done) == {}


def test_a_failed_attempt_then_other_parameters_run_again(done: Path) -> None:
    dag = Dag(done)
    change(done, "params.yaml", "width: 1", "width: 2")
    assert dag.begin("join") == "run"
    change(done, "params.yaml", "width: 2", "width: 3")
    assert dag.begin("join") == "run"
    work(dag, done, "join")
    dag.commit("join")
    assert "width: 3" in (done / "dvc.lock").read_text()


def test_a_dependency_that_moves_while_its_stage_runs_is_noticed(done: Path) -> None:
    change(done, "params.yaml", "width: 1", "width: 2")
    before = (done / "dvc.lock").read_bytes()
    dag = Dag(done)
    assert dag.begin("join") == "run"
    work(dag, done, "join")
    change(done, "data/mnist.txt", "text", "moved")
    with pytest.raises(StageChanged, match=r"data/mnist\.txt changed while join ran; run again"):
        dag.commit("join")
    assert (done / "dvc.lock").read_bytes() == before


@pytest.mark.parametrize(("name", "old", "new"), [("params.yaml", "width: 2", "width: 9"),
                                                  ("code.yaml", "aaa", "zzz")])  # fmt: skip
def test_a_parameter_that_moves_while_its_stage_runs_is_noticed(
    done: Path, name: str, old: str, new: str
) -> None:
    change(done, "params.yaml", "width: 1", "width: 2")
    dag = Dag(done)
    assert dag.begin("join") == "run"
    work(dag, done, "join")
    change(done, name, old, new)
    with pytest.raises(StageChanged, match=f"{name} changed while join ran"):
        dag.commit("join")


def test_an_output_that_was_not_written_is_named(done: Path) -> None:
    change(done, "params.yaml", "width: 1", "width: 2")
    dag = Dag(done)
    assert dag.begin("join") == "run"
    (done / "data/joined.txt").write_text("half")
    with pytest.raises(TaskvecError, match=r"join: .*data/joined\.json.* does not exist"):
        dag.commit("join")


def test_outputs_are_read_only_because_they_may_share_their_bytes_with_the_cache(
    done: Path,
) -> None:
    assert not (done / "data/joined.txt").stat().st_mode & 0o222


def test_a_commit_keeps_what_others_wrote_meanwhile_and_leaves_no_temporary_file(
    done: Path,
) -> None:
    entries = Dag(done).entries()
    dag = Dag(done)
    for width in (2, 1):
        change(done, "params.yaml", f"width: {3 - width}", f"width: {width}")
        dag.begin("join")
        work(dag, done, "join")
        dag.commit("join")
        recorded = Dag(done).entries()
        assert recorded["join"]["params"]["params.yaml"]["model"]["width"] == width
        if width == 2:
            foreign = {"schema": "2.0", "stages": {"gone": {"cmd": "true"}, **stages(done)}}
            (done / "dvc.lock").write_text(dumps_yaml(foreign))
    assert list(stages(done)) == [*(name for name in entries if ":" not in name), "gone"]
    assert Dag(done).entries() == entries
    assert not list(done.glob(".writing*"))


def test_links_that_a_kill_left_are_removed_and_nothing_else_is(done: Path) -> None:
    left = done / "data/.bljbRzwSr_hWthXam6K-sA.tmp"
    left.hardlink_to(done / "data/joined.txt")
    own = done / "data/.notes.tmp"
    own.touch()
    Dag(done).repair()
    assert not left.exists() and own.exists()
    assert reasons(done) == {}


def test_a_committed_stage_survives_a_collection_of_garbage_at_once(done: Path) -> None:
    """Its outputs are in the cache and in the lock file, or neither."""
    change(done, "params.yaml", "width: 1", "width: 2")
    dag = Dag(done)
    assert dag.begin("join") == "run"
    work(dag, done, "join")
    dag.commit("join")
    gone = dvc(done, "gc", "--workspace", "--force")
    assert gone.returncode == 0, gone.stderr
    (done / "data/joined.txt").unlink()
    assert dvc(done, "checkout").returncode == 0
    assert reasons(done) == {}


NAMES = st.from_regex(r"[a-z][a-z0-9@-]{0,5}", fullmatch=True) | st.text("a@-'\\né:#", min_size=1)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=90),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, min_size=1, max_size=3), min_size=1)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ENTRIES, st.randoms(use_true_random=False))
def test_a_lock_file_written_an_entry_at_a_time_is_what_dvc_writes_at_once(
    tmp_path: Path, entries: dict[str, dict[str, object]], draw: Random
) -> None:
    path = tmp_path / "dvc.lock"
    whole = dumps_yaml({"schema": "2.0", "stages": entries})
    # What DVC itself does not read back, such as a next line (U+0085), no lock file holds.
    assume(parse_yaml(whole, path) == {"schema": "2.0", "stages": entries})
    path.unlink(missing_ok=True)
    file = LockFile(path, {name: place for place, name in enumerate(entries)})
    for name in draw.sample(list(entries), len(entries)):
        file.write(name, {"cmd": "old"})
        if draw.random() < 0.3:  # another process goes on
            file = LockFile(path, {name: place for place, name in enumerate(entries)})
        file.write(name, entries[name])
    assert path.read_text() == whole


def test_a_lock_file_is_whole_at_every_moment(done: Path) -> None:
    lock = done / "dvc.lock"
    size = lock.stat().st_size
    stop = threading.Event()
    seen: set[int] = set()

    def watch() -> None:
        while not stop.is_set():
            seen.add(len(lock.read_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    dag = Dag(done)
    for number in range(2, 6):
        change(done, "params.yaml", f"width: {number - 1}", f"width: {number}")
        assert dag.begin("join") == "run"
        work(dag, done, "join")
        dag.commit("join")
    stop.set()
    watcher.join()
    assert seen == {size}


def test_threads_may_commit_at_the_same_time(root: Path, done_template: Path) -> None:
    dag = Dag(root)

    def bring(address: str) -> None:
        assert dag.begin(address) == "run"
        with dag.guard(address, owner="test"):
            work(dag, root, address)
        dag.commit(address)

    for together in (["prepare@mnist", "prepare@digits"], ["join"], [ALL[-1]]):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(bring, together))
    for name in ("dvc.lock", "edits/dvc.lock"):
        assert filecmp.cmp(done_template / name, root / name, shallow=False), name
    assert reasons(root) == {}


def test_digests_of_outputs_and_inputs_are_those_of_the_lock_file(done: Path) -> None:
    change(done, "params.yaml", "width: 1", "width: 2")
    dag = Dag(done)
    dag.begin("join")
    work(dag, done, "join")
    outs = dag.commit("join")
    entry = Dag(done).entries()["join"]
    assert outs == {out["path"]: out["md5"] for out in entry["outs"]}
    assert dag.inputs("join") == {dep["path"]: dep["md5"] for dep in entry["deps"]}


# Other DVC commands at the same time


def test_a_guarded_stage_cannot_be_run_by_another_dvc_command(done: Path) -> None:
    change(done, "params.yaml", "width: 1", "width: 2")
    dag = Dag(done)
    assert dag.begin("join") == "run"
    with dag.guard("join", owner="taskvec run"):
        refused = dvc(done, "repro", "join")
        assert refused.returncode != 0
        assert f"(PID {os.getpid()}): taskvec run join" in refused.stdout + refused.stderr
        work(dag, done, "join")
    dag.commit("join")
    again = dvc(done, "repro", "join")
    assert again.returncode == 0
    assert "didn't change" in again.stdout


def test_a_guard_ends_with_an_error_and_guards_of_others_stay(done: Path) -> None:
    dag = Dag(done)
    rwlock = done / ".dvc/tmp/rwlock"
    with dag.guard("prepare@mnist", owner="one"):
        with pytest.raises(KeyError), dag.guard("prepare@digits", owner="two"):
            assert "one prepare@mnist" in rwlock.read_text()
            assert "two prepare@digits" in rwlock.read_text()
            raise KeyError
        assert "one prepare@mnist" in rwlock.read_text()
        assert "two" not in rwlock.read_text()
    assert "one" not in rwlock.read_text()


@pytest.mark.parametrize("text", ["", '{"write": {"/a/b', "null null"])
def test_a_truncated_rwlock_is_removed(done: Path, text: str) -> None:
    rwlock = done / ".dvc/tmp/rwlock"
    rwlock.write_text(text)
    dag = Dag(done)
    dag.repair()
    assert not rwlock.exists()
    with dag.guard("join", owner="test"):
        assert "test join" in rwlock.read_text()


def test_a_valid_rwlock_is_kept(done: Path) -> None:
    dag = Dag(done)
    with dag.guard("join", owner="test"):
        before = (done / ".dvc/tmp/rwlock").read_text()
        dag.repair()
        assert (done / ".dvc/tmp/rwlock").read_text() == before
    (done / ".dvc/tmp/rwlock").unlink()
    dag.repair()


def test_a_repository_that_another_dvc_command_holds_is_waited_for(done: Path) -> None:
    change(done, "params.yaml", "width: 1", "width: 2")
    hold = (
        "import sys, time; from dvc.repo import Repo, lock_repo\n"
        "with lock_repo(Repo('.')):\n    print('held', flush=True)\n    time.sleep(4)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", hold], cwd=done, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        began = time.monotonic()
        assert Dag(done).begin("join") == "run"
        assert time.monotonic() - began > 2


# Mistakes


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("outs: [data/joined.txt]", "outs: [data/mnist.txt]", "mnist.txt"),
        ("deps: [source.txt]", "deps: [data/joined.txt]", "both a dependency and an output"),
        ("  join:\n    cmd:", "  join:\n    comand:", r"dvc\.yaml' validation failed"),
        ("stages:", "stages: [", "dvc.yaml"),
    ],
)
def test_a_graph_that_dvc_refuses_is_one_line(root: Path, old: str, new: str, words: str) -> None:
    change(root, "dvc.yaml", old, new)
    with pytest.raises(InvalidInput, match=words) as error:
        Dag(root)
    assert str(error.value).startswith("DVC cannot load the graph: ")
    assert "\n" not in str(error.value)


def test_a_directory_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="DVC cannot load the graph"):
        Dag(tmp_path)


def test_a_target_that_does_not_exist_is_answered_with_the_nearest_names(root: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nothing is called 'jion'; .*join"):
        Dag(root).plan(["jion"])
