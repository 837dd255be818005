"""What MLflow holds of a run, during and after it, and that it never stands in the way."""

import hashlib
import http.client
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows import outbox
from flows.recording import StageRecord, Tracker
from flows.servers import free_port, spawn, stop, wait_for
from flows.tracking import digest_tags, server_command
from tests.project import ROOT

SECRET = "canary-in-the-address"
OTHER_SECRET = "canary-in-the-environment"

# One process records a run, as `taskvec run` does, and looks at the database while it lasts.
RECORD = """
import hashlib, json, os, sys, time
from pathlib import Path
import torch
from flows import outbox
from flows.recording import StageRecord, Tracker, stated
from taskvec.checkpoints import save

root = Path.cwd()
warnings, md5s = [], {}
def digest(name):
    md5s[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    return {name: md5s[name]}
def weights(name, **metadata):
    save(root / "data" / name, {"w": torch.ones(300_000)}, "vector", origin="abc", **metadata)
    return digest(f"data/{name}")
def record(name, params=None, *more):
    return StageRecord(f"dvc:{name}", name, f"python -m tasks {name}", params or {}, "run", *more)

tracker = Tracker(root, warnings.append)
tracker.start({"name": "taskvec run", "mlflow.source.git.commit": "c0ffee"})

pretrained = weights("checkpoints/pretrained.safetensors")
tracker.begin(record("pretrain", {"model": {"family": "bundled"}}, "never run", "p1"))
tracker.end("dvc:pretrain", "FINISHED", pretrained, {})

params = {"fine_tune": {"steps": 80, "learning_rate": 5e-5}, "code.yaml:python": "3.11",
          "files": {f"odd (name) + {i}*.png": "x" * 7000 for i in range(250)}}
tracker.begin(record("fine_tune", params, "fine_tune.steps changed: 6 -> 80", "p2"))
for step in range(1, 6):
    tracker.progress("dvc:fine_tune", step, {"loss": 1 / step})
tracker.begin(record("broken"))
tracker.end("dvc:broken", "FAILED", {}, {})
print("look", flush=True)
link = tracker.link(sys.stdin.readline().strip())

outs = {**weights("checkpoints/mnist-0.safetensors"),
        **weights("vectors/mnist-0.safetensors", expression="c * mnist"),
        **weights("edits/both-0/basis.safetensors")}
(root / "data/accuracy.json").write_text(json.dumps({"accuracy": 0.5, "items": 3, "kind": "a"}))
(root / "data/table.csv").write_text("a,b\\n")
(root / "data/long.csv").write_text("a,b\\n")
outs |= digest("data/accuracy.json") | digest("data/table.csv") | digest("data/long.csv")
(root / "data/long.csv").write_text("written again since then\\n")
tracker.end("dvc:fine_tune", "FINISHED", outs, pretrained)
print(json.dumps(md5s), flush=True)

from mlflow import MlflowClient
client = MlflowClient()
experiment = client.get_experiment_by_name("taskvec").experiment_id
me = outbox.identity(root)
def left(name, **tags):  # as a run without a log left it
    run = client.create_run(experiment, run_name=name, tags=tags)
    child = {"mlflow.parentRunId": run.info.run_id}
    client.create_run(experiment, run_name=f"stage of {name}", tags=child)
dead = os.fork() or os._exit(0)
os.waitpid(dead, 0)
left("dead", host=me["host"], pid=str(dead))
left("number used again", **{**me, "process.started": "1.0"})
left("alive", **me)
left("elsewhere", **{**me, "host": "elsewhere", "pid": str(dead)})
tracker.close("FINISHED")
next_run = Tracker(root, warnings.append)
next_run.start({"name": "next run"})
while next_run._log.path.read_text().count("reaped") < 2:
    time.sleep(0.02)
made = weights("model.safetensors", expression="c * mnist", digest="d" * 64)
parent = stated(root / "data/vectors/mnist-0.safetensors")["taskvec.fingerprint"]
next_run.edited(root / "data/model.safetensors", [parent], {"validation.accuracy.mnist": 0.75})
next_run.close("FINISHED")
print(json.dumps(warnings))
print(json.dumps({
    "link": link,
    "runs": {r.info.run_name: {
        "id": r.info.run_id, "status": r.info.status, "tags": r.data.tags,
        "metrics": r.data.metrics, "params": r.data.params,
        # search_runs leaves these out
        "inputs": [m.model_id for m in client.get_run(r.info.run_id).inputs.model_inputs],
        "outputs": [m.model_id for m in r.outputs.model_outputs],
        "files": [f.path for f in client.list_artifacts(r.info.run_id)]}
        for r in client.search_runs([experiment])},
    "models": {m.tags.get("dvc.path") or m.tags["path"]: {
        "id": m.model_id, "tags": m.tags, "type": m.model_type}
               for m in client.search_logged_models([experiment])}}))
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# A run with nothing in its way


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a directory with the record of a run, and what was read during and after it."""
    root = tmp_path_factory.mktemp("recorded")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", RECORD],
        cwd=root, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "look\n"
        during = look(root)
        process.stdin.write(f"http://user:{SECRET}@server\n")
        process.stdin.flush()
        during["md5"] = json.loads(process.stdout.readline())
        assert json.loads(process.stdout.readline()) == []
        during["content"] = json.loads(process.stdout.readline())
    assert process.returncode == 0
    return root, during


def rows(database: Path, query: str) -> list[Any]:
    """Return what a query finds in MLflow's database, while somebody else may write."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
        return opened.execute(query).fetchall()


def look(root: Path) -> dict[str, Any]:
    """Return status and losses of every run, read while somebody else writes."""
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        try:
            status = dict(rows(root / "mlflow.db", "SELECT name, status FROM runs"))
            query = "SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step"
            losses = rows(root / "mlflow.db", query)
        except sqlite3.OperationalError:
            continue  # the tables are being created
        if status.get("broken") == "FAILED":
            return {"status": status, "losses": losses}


@pytest.fixture(scope="module")
def content(recorded: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return dict(recorded[1]["content"])


def test_metrics_can_be_read_while_the_stage_runs(recorded: tuple[Path, dict[str, Any]]) -> None:
    _, during = recorded
    assert during["status"]["fine_tune"] == "RUNNING"
    assert during["status"]["taskvec run"] == "RUNNING"
    assert during["losses"] == [(step, 1 / step) for step in range(1, 6)]


def test_every_stage_is_a_child_of_the_run(content: dict[str, Any]) -> None:
    runs = content["runs"]
    parent = runs["taskvec run"]
    assert parent["status"] == "FINISHED"
    assert parent["tags"]["host"] == outbox.hostname()
    assert parent["tags"]["mlflow.source.git.commit"] == "c0ffee"
    stages = {name: runs[name] for name in ("pretrain", "fine_tune", "broken")}
    assert [run["status"] for run in stages.values()] == ["FINISHED", "FINISHED", "FAILED"]
    for name, run in stages.items():
        assert run["tags"]["mlflow.parentRunId"] == parent["id"]
        assert run["tags"]["dvc.stage"] == f"dvc:{name}"
        assert run["tags"]["how"] == "run"
    assert stages["fine_tune"]["tags"]["stale.because"] == "fine_tune.steps changed: 6 -> 80"
    assert stages["fine_tune"]["tags"]["prefect.task_run"] == "p2"


def test_tags_hold_the_digests_of_inputs_and_outputs(
    recorded: tuple[Path, dict[str, Any]], content: dict[str, Any]
) -> None:
    md5s = recorded[1]["md5"]
    pretrained = md5s.pop("data/checkpoints/pretrained.safetensors")
    tags = content["runs"]["fine_tune"]["tags"]
    assert tags["dvc.outs"].split() == sorted(set(md5s.values()))
    assert tags["dvc.deps"] == pretrained
    assert "dvc.deps" not in content["runs"]["pretrain"]["tags"]
    md5s["data/checkpoints/pretrained.safetensors"] = pretrained


def test_a_tag_is_never_longer_than_mlflow_takes() -> None:
    tags = digest_tags({str(i): f"{i:032x}" for i in range(1000)}, {})
    assert len(tags["dvc.outs"]) <= 8000 and "dvc.deps" not in tags


def test_parameters_and_final_metrics_are_recorded(content: dict[str, Any]) -> None:
    run = content["runs"]["fine_tune"]
    assert run["params"]["fine_tune.steps"] == "80"
    assert run["params"]["fine_tune.learning_rate"] == "5e-05"
    assert run["params"]["code.yaml/python"] == "3.11"
    assert run["params"]["kind"] == "a"
    assert run["metrics"] == {"accuracy": 0.5, "items": 3, "loss": 0.2}


def test_small_files_are_logged_unless_they_are_no_longer_what_they_were(
    content: dict[str, Any],
) -> None:
    assert set(content["runs"]["fine_tune"]["files"]) == {"accuracy.json", "table.csv"}


def test_names_that_mlflow_does_not_take_are_changed_and_long_values_cut(
    content: dict[str, Any],
) -> None:
    params = content["runs"]["fine_tune"]["params"]
    odd = {name: value for name, value in params.items() if name.startswith("files")}
    assert "files.odd _name_ _ 0_.png" in odd
    assert len(params) == 201  # the last is the option that the search chose
    assert max(len(value) for value in odd.values()) <= 6000


def test_weights_are_models_that_point_to_their_files(
    recorded: tuple[Path, dict[str, Any]], content: dict[str, Any]
) -> None:
    root, during = recorded
    models = content["models"]
    assert {path: model["type"] for path, model in models.items()} == {
        "data/model.safetensors": "edited model",
        "data/checkpoints/pretrained.safetensors": "checkpoint",
        "data/checkpoints/mnist-0.safetensors": "checkpoint",
        "data/vectors/mnist-0.safetensors": "task vector",
    }
    run = content["runs"]["fine_tune"]
    assert run["inputs"] == [models["data/checkpoints/pretrained.safetensors"]["id"]]
    assert set(run["outputs"]) == {
        models["data/checkpoints/mnist-0.safetensors"]["id"],
        models["data/vectors/mnist-0.safetensors"]["id"],
    }
    tags = models["data/vectors/mnist-0.safetensors"]["tags"]
    assert tags["dvc.md5"] == during["md5"]["data/vectors/mnist-0.safetensors"]
    assert tags["taskvec.origin"] == "abc" and tags["taskvec.expression"] == "c * mnist"
    stored = [path for path in root.rglob("*") if path.is_file() and "data" not in path.parts]
    assert not [path for path in stored if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in (root / "mlartifacts").rglob("*")) < 100_000


def test_a_model_made_outside_the_graph_is_a_model_of_its_run(
    recorded: tuple[Path, dict[str, Any]], content: dict[str, Any]
) -> None:
    run, models = content["runs"]["next run"], content["models"]
    model = models["data/model.safetensors"]
    assert run["outputs"] == [model["id"]]
    assert run["inputs"] == [models["data/vectors/mnist-0.safetensors"]["id"]]
    assert run["metrics"] == {"validation.accuracy.mnist": 0.75}
    assert run["tags"]["taskvec.expression"] == "c * mnist"
    (item,) = [item for item in outbox.executions(recorded[0]) if item["kind"] == "edit"]
    assert (item["path"], item["status"]) == ("data/model.safetensors", "FINISHED")
    assert item["header"].items() <= model["tags"].items()
    parent = models["data/vectors/mnist-0.safetensors"]["tags"]["taskvec.fingerprint"]
    assert item["parents"] == [parent] and item["mlflow_run"] == run["id"]


def test_the_run_in_mlflow_is_linked_without_a_password(content: dict[str, Any]) -> None:
    run = content["runs"]["taskvec run"]["id"]
    assert content["link"] == f"http://server/#/experiments/1/runs/{run}"


def test_the_log_and_mlflow_say_the_same(
    recorded: tuple[Path, dict[str, Any]], content: dict[str, Any]
) -> None:
    root, during = recorded
    told = {i["name"]: i for i in outbox.executions(root) if i["kind"] == "stage"}
    assert told.keys() == {"pretrain", "fine_tune", "broken"}
    for name, item in told.items():
        run = content["runs"][name]
        assert item["mlflow_run"] == run["id"]
        assert item["mlflow_parent"] == content["runs"]["taskvec run"]["id"]
        assert item["status"] == run["status"]
        assert run["tags"]["taskvec.key"] == item["key"]
    assert told["fine_tune"]["outs"].items() <= during["md5"].items()
    vector = content["models"]["data/vectors/mnist-0.safetensors"]["tags"]
    told_vector = told["fine_tune"]["fingerprints"]["data/vectors/mnist-0.safetensors"]
    assert told_vector == vector["taskvec.fingerprint"]
    assert outbox.damages(root) == {}


def test_runs_that_dead_processes_left_are_closed_and_others_are_not(
    recorded: tuple[Path, dict[str, Any]], content: dict[str, Any]
) -> None:
    status = {name: run["status"] for name, run in content["runs"].items()}
    for name in ("dead", "number used again"):
        assert status[name] == status[f"stage of {name}"] == "KILLED"
    for name in ("alive", "elsewhere"):
        assert status[name] == status[f"stage of {name}"] == "RUNNING"
    last = outbox.read(outbox.logs(recorded[0])[-1])
    reaped = {event["mlflow_run"] for event, _ in last if event["event"] == "reaped"}
    assert reaped == {content["runs"][name]["id"] for name in ("dead", "number used again")}


# A server that fails


class Proxy(ThreadingHTTPServer):
    """Passes requests on to an MLflow server, or fails as it is told to.

    Attributes:
        fault: "", "refuses", "hangs", "500", "slow", "loses answers", "dies" after 5 requests, or
            "recovers" after 3.
        lose: loses the answer of the request with this number, from 0, of those that change things.
        requests, changes: how many came.
    """

    daemon_threads = True

    def __init__(self, port: int, fault: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server_bind()  # the port is taken from now on; who connects is refused
        self.behind, self.fault = port, fault
        self.lose, self.requests, self.changes = -1, 0, 0

    def start(self) -> None:
        """Answer from now on."""
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://user:{SECRET}@127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients go away."""


class Handler(BaseHTTPRequestHandler):
    def pass_on(self) -> None:
        proxy = self.server
        assert isinstance(proxy, Proxy)
        number, proxy.requests = proxy.requests, proxy.requests + 1
        fault = proxy.fault
        until = {"refuses": number + 1, "recovers": 3}.get(fault, 0)
        if number < until or (fault == "dies" and number >= 5):
            return
        while proxy.fault == "hangs":
            time.sleep(0.05)
        if fault == "slow":
            time.sleep(2)
        if fault == "500":
            self.send_error(500)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = http.client.HTTPConnection("127.0.0.1", proxy.behind, timeout=60)
        kept = {k: v for k, v in self.headers.items() if k not in ("Host", "Connection")}
        behind.request(self.command, self.path, body, kept)
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        if "search" not in self.path and "get" not in self.path:
            proxy.changes += 1
            if proxy.changes == proxy.lose + 1:
                return
        if fault == "loses answers":
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = pass_on

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


PRETRAINED, EXPERT, ACCURACY = (
    "data/checkpoints/pretrained.safetensors", "data/checkpoints/mnist-0.safetensors",
    "data/accuracy.json",
)  # fmt: skip


def make_files(root: Path) -> None:
    """Write what the stages of the story leave."""
    (root / "data" / "checkpoints").mkdir(parents=True)
    for name in (PRETRAINED, EXPERT):
        (root / name).write_text(f"{name} in {root}")
    (root / ACCURACY).write_text('{"accuracy": 0.5}')


def story(tracker: Tracker, root: Path) -> None:
    """Tell a tracker of two stages, the second of which reads the weights of the first."""
    pretrained, expert, accuracy = (
        {name: hashlib.md5((root / name).read_bytes()).hexdigest()}
        for name in (PRETRAINED, EXPERT, ACCURACY)
    )
    record = StageRecord("pretrain", "pretrain", "python -m tasks pretrain", {"a": {"b": 1}}, "run")
    tracker.begin(record)
    tracker.end("pretrain", "FINISHED", pretrained, {})
    params = {"url": f"http://user:{SECRET}@host", "api_key": SECRET, "seed": 1}
    tracker.begin(StageRecord("fine_tune", "fine_tune", "python -m tasks fine_tune", params, "run"))
    for step in range(5):
        tracker.progress("fine_tune", step, {"loss": 1 / (1 + step), "rate": 0.1})
    tracker.end("fine_tune", "FINISHED", expert | accuracy, pretrained)


def assert_once(database: Path, log: str) -> None:
    """Assert that a database holds the story of a log, everything once."""
    tagged = f"key = 'taskvec.key' AND value LIKE '{log}/%'"
    runs = rows(
        database,
        "SELECT r.name, r.status, r.run_uuid FROM runs r JOIN tags USING (run_uuid) "
        f"WHERE lifecycle_stage = 'active' AND {tagged} ORDER BY name",
    )
    assert [run[:2] for run in runs] == [
        ("fine_tune", "FINISHED"), ("pretrain", "FINISHED"), ("story", "FINISHED"),
    ]  # fmt: skip
    ids = {name: run for name, _, run in runs}
    query = f"SELECT key, step, value FROM metrics WHERE run_uuid = '{ids['fine_tune']}'"
    losses = {("loss", step, 1 / (1 + step)) for step in range(5)}
    rates = {("rate", step, 0.1) for step in range(5)}
    found = rows(database, query)
    assert set(found) == losses | rates | {("accuracy", 0, 0.5)} and len(found) == 11
    models = rows(
        database,
        "SELECT model_id, status FROM logged_models m JOIN logged_model_tags t USING (model_id) "
        f"WHERE lifecycle_stage = 'active' AND t.tag_key = 'taskvec.key' "
        f"AND t.tag_value LIKE '{log}/%'",
    )
    assert len(models) == 2
    among = ", ".join(f"'{run}'" for run in ids.values())
    links = rows(database, f"SELECT source_type FROM inputs WHERE source_id IN ({among})")
    assert sorted(links) == [("RUN_INPUT",), ("RUN_OUTPUT",), ("RUN_OUTPUT",)]
    parents = rows(
        database,
        f"SELECT value FROM tags WHERE key = 'mlflow.parentRunId' AND run_uuid IN ({among})",
    )
    assert parents == [(ids["story"],)] * 2


# Every place records its story at the same time, in a process of its own. When that is told and
# the faults are over, what was kept is sent, twice. Then every answer of the server is lost once.
FAULTS = """
import json, os, sys, time
from pathlib import Path
import mlflow
from flows import recording
from flows.recording import Tracker
from flows.tracking import send_kept
from tests.test_tracking import RECOVERS, story

def tell(root, uri):
    if root.name == RECOVERS:
        recording.RETRY_SECONDS = 0.1
    os.environ["MLFLOW_TRACKING_URI"] = uri
    warnings = []
    began = time.monotonic()
    tracker = Tracker(root, warnings.append)
    tracker.start({"name": "story"})
    story(tracker, root)
    called = time.monotonic() - began
    time.sleep(1)
    while root.name == RECOVERS and tracker._delivery.mark.lines < 10:
        time.sleep(0.02)
    closing = time.monotonic()
    tracker.close("FINISHED")
    seconds = time.monotonic() - closing
    told = {"warnings": warnings, "called": called, "seconds": seconds}
    (root / "told.json").write_text(json.dumps(told))

places, children = json.loads(sys.argv[1]), {}
for name, (root, uri) in places.items():
    if not (pid := os.fork()):
        tell(Path(root), uri)
        sys.exit(5)
    children[pid] = name
began, codes = time.monotonic(), {}
while children:
    pid, status = os.wait()
    codes[children.pop(pid)] = [os.waitstatus_to_exitcode(status), time.monotonic() - began]
print(json.dumps(codes), flush=True)
sys.stdin.readline()
sent = {}
for name in json.loads(sys.argv[2]):
    root, os.environ["MLFLOW_TRACKING_URI"] = places[name]
    sent[name] = [send_kept(Path(root)).runs, send_kept(Path(root)).runs]
print(json.dumps(sent), flush=True)
os.environ["MLFLOW_TRACKING_URI"] = sys.argv[3]
root = Path(sys.argv[4])
for line in sys.stdin:
    tracker = Tracker(root, print)
    tracker.keep({"name": "story"})
    story(tracker, root)
    tracker.close("FINISHED")
    print("kept", flush=True)
    sys.stdin.readline()
    try:
        print(send_kept(root).runs, flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        print(send_kept(root).runs, flush=True)
"""
LOCKED = "locked"
RECOVERS = "recovers"
NAMED = ["refuses", "hangs", "500", "slow", "loses answers", "dies", "nobody", LOCKED]
NOWHERE = {"no such directory": "sqlite:////proc/no/mlflow.db", "no scheme": "nonsense://x"}


class Faults:
    """Runs that met a fault: what each told, and how it ended."""

    def __init__(self, base: Path) -> None:
        port, log = free_port(), base / "server.log"
        self.server = base / "server"
        self.server.mkdir()
        process = spawn(server_command(self.server, port), log, environment())
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log, "MLflow")
            self._run(base, port)
        finally:
            stop(process)

    def _run(self, base: Path, port: int) -> None:
        proxies = {name: Proxy(port, name) for name in (*NAMED[:-1], RECOVERS)}
        lossy = Proxy(port)
        for proxy in (lossy, *proxies.values()):
            if proxy.fault != "nobody":
                proxy.start()
        self.roots = {name: base / name for name in (*NAMED, *NOWHERE, RECOVERS)}
        for root in [*self.roots.values(), base / "lossy"]:
            make_files(root)
        self.database = self.server / "mlflow.db"
        uris = {name: proxy.uri for name, proxy in proxies.items()}
        own = self.roots[LOCKED] / "runs.db"
        uris[LOCKED] = f"sqlite:///{own}"
        places = {name: [str(self.roots[name]), uri] for name, uri in (uris | NOWHERE).items()}
        words = [json.dumps(places), json.dumps(NAMED), lossy.uri, str(base / "lossy")]
        with (
            closing(sqlite3.connect(own)) as holder,
            (base / "errors").open("w") as errors,
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", FAULTS, *words], text=True, cwd=base,
                env=environment(MLFLOW_TRACKING_PASSWORD=OTHER_SECRET),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            ) as process,
        ):  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            said, hear = process.stdin, process.stdout.readline
            holder.execute("BEGIN EXCLUSIVE")
            self.codes = json.loads(hear())
            self.told = {n: json.loads((r / "told.json").read_text())
                         for n, r in self.roots.items()}  # fmt: skip
            holder.rollback()
            for proxy in proxies.values():
                proxy.fault = ""
            proxies["nobody"].start()
            say(said)
            self.sent = json.loads(hear())
            self.lost = list(lose_each(lossy, lambda: say(said), hear))
            said.close()
        self.errors = (base / "errors").read_text()
        for proxy in [*proxies.values(), lossy]:
            proxy.shutdown()
            proxy.server_close()


def say(said: Any) -> None:
    said.write("\n")
    said.flush()


def lose_each(lossy: Proxy, go_on: Callable[[], None], hear: Callable[[], str]) -> Iterator[str]:
    """Lose the answer of every change that a delivery makes, one a time; yield what was said."""
    number = 0
    while True:
        go_on()
        assert hear() == "kept\n"
        lossy.changes, lossy.lose = 0, number
        go_on()
        said = hear()
        yield said
        if said == "1\n":
            return  # there were not so many changes
        assert hear() == "1\n"
        number += 1


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", [*NAMED, *NOWHERE])
def test_a_fault_costs_seconds_and_a_line_and_nothing_else(faults: Faults, fault: str) -> None:
    told = faults.told[fault]
    code, seconds = faults.codes[fault]
    assert code == 5  # what the run itself ended with
    assert told["called"] < 2  # nobody waits for MLflow while stages run
    assert told["seconds"] < 10
    assert seconds < told["called"] + 1 + told["seconds"] + 10  # nor when the process ends
    (warning,) = told["warnings"]
    assert warning.startswith("MLflow does not answer (") and "\n" not in warning
    assert "kept in .taskvec/outbox; the next run or `taskvec backfill` sends it" in warning
    assert outbox.damages(faults.roots[fault]) == {}


@pytest.mark.parametrize("fault", NAMED)
def test_after_a_fault_everything_is_there_once(faults: Faults, fault: str) -> None:
    assert faults.sent[fault] == [1, 0]
    (log,) = outbox.logs(faults.roots[fault])
    own = faults.roots[fault] / "runs.db"
    assert_once(own if fault == LOCKED else faults.database, log.stem)


def test_a_server_that_comes_back_gets_the_rest_from_the_same_run(faults: Faults) -> None:
    assert faults.told[RECOVERS]["warnings"] == []
    (log,) = outbox.logs(faults.roots[RECOVERS])
    assert outbox.marks(faults.roots[RECOVERS])[log.stem].done
    assert_once(faults.database, log.stem)


def test_nothing_but_one_line_is_printed(faults: Faults) -> None:
    assert faults.errors == ""


def test_whichever_answer_is_lost_everything_is_there_once(faults: Faults) -> None:
    assert len(faults.lost) > 12
    assert all(said.startswith("ServiceUnreachable: MLflow does") for said in faults.lost[:-1])
    for log in outbox.logs(faults.roots["refuses"].with_name("lossy")):
        assert_once(faults.database, log.stem)


def test_passwords_are_nowhere(faults: Faults) -> None:
    told = json.dumps([faults.told, faults.lost, faults.errors])
    kept = [path for root in faults.roots.values() for path in (root / ".taskvec").rglob("*")]
    texts = [path.read_bytes() for path in [*kept, faults.database] if path.is_file()]
    assert len(texts) > 20
    for secret in (SECRET, OTHER_SECRET):
        assert secret not in told
        assert not [text for text in texts if secret.encode() in text]
    (log,) = outbox.logs(faults.roots["500"])
    (params,) = [e["params"] for e, _ in outbox.read(log) if e.get("name") == "fine_tune"]
    assert params == {"url": "http://***@host", "api_key": "***", "seed": "1"}


START = """
import json, os, sys
from pathlib import Path
import mlflow
from flows.recording import Tracker
from flows.tracking import send_kept
from tests.test_tracking import make_files, story
root, warnings = Path.cwd(), []
make_files(root)
start, go = os.pipe()
for number in range(8):
    if not os.fork():
        os.close(go)
        os.read(start, 1)
        for _ in range(2):
            tracker = Tracker(root, warnings.append)
            tracker.start({"name": "story"})
            story(tracker, root)
            tracker.close("FINISHED")
        sys.stderr.write("".join(f"{warning}\\n" for warning in warnings))
        sys.exit(0)
os.close(go)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(8)]
print(json.dumps([codes, send_kept(root).left]))
"""


def test_eight_first_starts_at_once_lose_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout) == [[0] * 8, 0], done.stderr
    names = outbox.logs(tmp_path)
    assert len(names) == 16
    for log in names:
        assert_once(tmp_path / "mlflow.db", log.stem)


# Without a server


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / ".taskvec").write_text("no directory")
    make_files(tmp_path)
    warnings: list[str] = []
    tracker = Tracker(tmp_path, warnings.append)
    tracker.start({"name": "run"})
    story(tracker, tmp_path)
    tracker.close("FINISHED")
    (warning,) = warnings
    assert "cannot be written" in warning and ".taskvec/outbox" in warning


def test_a_tracker_that_never_started_can_be_closed(tmp_path: Path) -> None:
    warnings: list[str] = []
    Tracker(tmp_path, warnings.append).close("FAILED")
    assert warnings == []


def test_what_comes_after_the_end_is_not_recorded(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(tmp_path, warnings.append)
    tracker.keep({"name": "run"})
    tracker.close("FINISHED")
    make_files(tmp_path)
    story(tracker, tmp_path)
    tracker.close("FAILED")
    (log,) = outbox.logs(tmp_path)
    assert [event["event"] for event, _ in outbox.read(log)] == ["start", "close"]
    assert warnings == [] and outbox.damages(tmp_path) == {}
