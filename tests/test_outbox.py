"""The log of a run: a chain in which every damage is found, and which a kill leaves usable."""

import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import outbox
from flows.outbox import Log, broken, damages, executions, logs, settle, unsent
from flows.redaction import cleaned, reason, redacted, without_user
from flows.store import tracking_uri
from tests.project import ROOT

SEED = 20230501


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def start(log: Log, **tags: str) -> None:
    log.append("start", name="taskvec run", tags={"host": outbox.hostname(), **tags})


def begin(log: Log, name: str = "fine_tune@mnist-0", **more: Any) -> int:
    return log.append(
        "begin",
        **{
            "address": name, "name": name, "command": "python -m tasks fine_tune mnist-0",
            "how": "run", "because": "never run", "prefect_task_run": "p1", "params": {}, **more,
        },
    )  # fmt: skip


def recorded(top: Path, stages: int = 2, *, closed: bool = True) -> Path:
    """Write a log as a run would, let go of it, and return its path."""
    log = Log.create(top)
    start(log, **{"prefect.flow_run": "f1", "user": "ada", "git.dirty": "False"})
    for index in range(stages):
        number = begin(log, f"stage-{index}")
        log.append("progress", durable=False, of=number, step=1, metrics={"loss": 0.5})
        files = {"outs": {"data/a": f"{index:032x}"}, "deps": {"data/b": "f" * 32}}
        header = {"data/a": {"taskvec.fingerprint": f"{index:064x}"}}
        log.append("end", of=number, status="FINISHED", headers=header, **files)
    if closed:
        log.close("FINISHED")
    log.release()
    return log.path


# The chain


def test_a_log_as_it_was_written_has_no_damage(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for _ in range(200):
        recorded(tmp_path, chance.randrange(4), closed=chance.random() < 0.8)
    assert damages(tmp_path) == {}
    assert all(broken(path) is None for path in logs(tmp_path)[:20])


def edited(lines: list[bytes], chance: random.Random) -> list[bytes]:
    place = chance.randrange(len(lines))
    byte = chance.randrange(len(lines[place]))
    kind = chance.choice(["flip", "insert", "delete"])
    line = bytearray(lines[place])
    if kind == "flip":
        line[byte] ^= 1 << chance.randrange(8)
    elif kind == "insert":
        line.insert(byte, chance.choice(b" x0\n"))
    else:
        del line[byte]
    return [*lines[:place], bytes(line), *lines[place + 1 :]]


def dropped(lines: list[bytes], chance: random.Random) -> list[bytes]:
    start = chance.randrange(len(lines))
    return lines[:start] + lines[start + chance.choice([1, 1, len(lines)]) :]


def reordered(lines: list[bytes], chance: random.Random) -> list[bytes]:
    first, second = chance.sample(range(len(lines)), 2)
    swapped = list(lines)
    swapped[first], swapped[second] = lines[second], lines[first]
    return swapped


def replayed(lines: list[bytes], chance: random.Random) -> list[bytes]:
    place = chance.randrange(len(lines) + 1)
    return [*lines[:place], chance.choice(lines), *lines[place:]]


def test_every_mutation_of_a_log_is_found(tmp_path: Path) -> None:
    path = recorded(tmp_path, 3)
    entry = outbox.closed(tmp_path)[path.stem]
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    chance = random.Random(SEED)
    for index in range(1000):
        change = [edited, dropped, reordered, replayed][index % 4]
        changed = b"".join(change(lines, chance))
        assert changed != content
        path.write_bytes(changed)
        assert broken(path, entry) is not None, (change.__name__, index)
    path.write_bytes(content)
    assert broken(path) is None


def test_the_first_bad_line_is_named(tmp_path: Path) -> None:
    path = recorded(tmp_path, 3)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for number in range(1, len(lines) + 1):
        changed = [*lines]
        changed[number - 1] = lines[number - 1].replace(b'"at":1', b'"at":2')
        path.write_bytes(b"".join(changed))
        assert broken(path) == number
    path.write_bytes(b"".join(lines[:-1]))
    assert broken(path) == len(lines)
    path.unlink()
    assert damages(tmp_path) == {path.stem: 1}


def test_a_log_of_another_run_is_no_log_of_this_one(tmp_path: Path) -> None:
    first, second = recorded(tmp_path), recorded(tmp_path)
    second.write_bytes(first.read_bytes())
    assert damages(tmp_path) == {second.stem: 1}


def test_a_log_that_was_rewritten_with_a_chain_of_its_own_is_found(tmp_path: Path) -> None:
    path = recorded(tmp_path, 1)
    entry = path.read_bytes()
    before, lines = outbox._origin(path), []
    for line in entry.splitlines():
        event = {k: v for k, v in json.loads(line).items() if k not in ("before", "sha256")}
        text, before = outbox._line(
            {**event, "name": "forged run "} if event["event"] == "start" else event, before
        )
        lines.append(text)
    path.write_bytes(b"".join(lines))
    assert broken(path, {}) is None  # the chain alone cannot tell
    assert broken(path) is not None


# What a crash leaves


def test_the_end_of_a_line_that_a_crash_tore_is_repaired_and_not_reported(tmp_path: Path) -> None:
    path = recorded(tmp_path, 2, closed=False)
    content = path.read_bytes()
    whole = content.rfind(b"\n", 0, -1) + 1
    for size in (whole + 1, len(content) - 1):
        path.write_bytes(content[:size])
        assert broken(path) is None
    settle(tmp_path)
    assert broken(path) is None
    events = [event["event"] for event, _ in outbox.read(path)]
    assert events == ["start", "begin", "progress", "end", "begin", "progress", "end", "close"]
    assert path.read_bytes()[:whole] == content[:whole]
    assert damages(tmp_path) == {}


KILL = """
import sys, time
from pathlib import Path
from tests.test_outbox import begin, start
from flows.outbox import Log
log = Log.create(Path(sys.argv[1]))
start(log)
number = begin(log)
print(log.path, flush=True)
while True:
    log.append("progress", durable=False, of=number, step=1, metrics={"loss": 0.5})
"""


def test_the_log_of_a_killed_run_is_closed_by_the_next_and_that_of_a_live_one_is_not(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert settle(tmp_path) == []
        (item,) = executions(tmp_path)
        assert item["status"] == "RUNNING"
        process.kill()
    assert settle(tmp_path) == [path.stem]
    assert settle(tmp_path) == []
    assert unsent(tmp_path) == [path.stem]
    outbox.note(tmp_path, path.stem, outbox.Mark(store="own", lines=9, done=True))
    assert unsent(tmp_path) == []
    (item,) = executions(tmp_path)
    assert item["status"] == "KILLED"
    assert [event["status"] for event, _ in outbox.read(path)[-2:]] == ["KILLED", "KILLED"]
    assert damages(tmp_path) == {}


def test_a_log_of_another_host_a_damaged_and_an_empty_one_are_left_alone_or_removed(
    tmp_path: Path,
) -> None:
    foreign = Log.create(tmp_path)
    start(foreign, host="elsewhere")
    foreign.release()
    damaged = recorded(tmp_path, 1, closed=False)
    damaged.write_bytes(damaged.read_bytes().replace(b"never run", b"never ran"))
    empty = Log.create(tmp_path)
    empty.release()
    before = {path: path.read_bytes() for path in logs(tmp_path)}
    assert settle(tmp_path) == []
    assert {path: path.read_bytes() for path in logs(tmp_path)} == {
        path: content for path, content in before.items() if path != empty.path
    }


def test_a_log_that_ended_but_is_not_in_the_list_is_entered(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    (path.parent / outbox.CLOSED).write_text('{"run": "torn')
    assert len(list(executions(tmp_path))) == 2
    assert settle(tmp_path) == []
    assert list(outbox.closed(tmp_path)) == [path.stem]
    assert len(list(executions(tmp_path))) == 2


def test_a_line_that_cannot_be_written_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log.create(tmp_path)
    start(log)
    before = log.path.read_bytes()
    real = os.write
    calls = iter([5, OSError(28, "No space left on device")])

    def short(descriptor: int, data: bytes) -> int:
        match next(calls):
            case OSError() as error:
                raise error
            case size:
                return real(descriptor, data[:size])

    with monkeypatch.context() as patched:
        patched.setattr(outbox.os, "write", short)
        with pytest.raises(OSError, match="No space left"):
            begin(log)
    assert log.path.read_bytes() == before
    assert begin(log) == 1
    log.close("FINISHED")
    log.release()
    assert damages(tmp_path) == {}


def test_a_process_lives_only_if_it_started_then() -> None:
    import psutil

    started = psutil.Process().create_time()
    assert outbox.alive(os.getpid(), started)
    assert outbox.alive(os.getpid(), None)
    assert not outbox.alive(os.getpid(), started - 60)  # the number was used before
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        while process.poll() is None:
            time.sleep(0.01)
    assert not outbox.alive(process.pid, None)


# What it tells


def test_an_execution_says_what_was_made_of_what_by_whom(tmp_path: Path) -> None:
    path = recorded(tmp_path, 2)
    outbox.note(tmp_path, path.stem, outbox.Mark("own", 3, {0: "m0", 1: "m1"}))
    outbox.note(tmp_path, path.stem, outbox.Mark("own", 8, {4: "m4"}, done=True))
    first, second = executions(tmp_path)
    assert first["key"] == f"{path.stem}/1"
    assert (first["mlflow_run"], second["mlflow_run"]) == ("m1", "m4")
    assert first["mlflow_parent"] == "m0"
    assert first["kind"] == "stage" and first["stage"] == "stage-0"
    assert first["command"] == "python -m tasks fine_tune mnist-0"
    assert first["outs"] == {"data/a": "0" * 32} and first["made"] == ["0" * 32]
    assert first["deps"] == {"data/b": "f" * 32} and first["read"] == ["f" * 32]
    assert first["fingerprints"] == {"data/a": "0" * 64}
    assert (first["how"], first["because"]) == ("run", "never run")
    assert (first["prefect_task_run"], first["prefect_flow_run"]) == ("p1", "f1")
    assert (first["user"], first["host"], first["dirty"]) == ("ada", outbox.hostname(), "False")
    assert first["status"] == "FINISHED"
    assert time.time() - 60 < first["started"] <= first["ended"] <= time.time()


def test_the_list_of_closed_logs_tells_the_same_as_the_logs(tmp_path: Path) -> None:
    for stages in range(4):
        recorded(tmp_path, stages)
    listed = list(executions(tmp_path))
    (outbox.directory(tmp_path) / outbox.CLOSED).unlink()
    assert list(executions(tmp_path)) == listed
    assert len(listed) == 6


def test_many_executions_are_read_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    place = outbox.directory(tmp_path)
    place.mkdir(parents=True)
    path = recorded(tmp_path, 10)
    content = path.read_bytes()
    (line,) = (place / outbox.CLOSED).read_text().splitlines()
    runs = [f"20260101T000000-{index:08x}" for index in range(1000)]
    for run in runs:
        (place / f"{run}.jsonl").write_bytes(content)
    (place / outbox.CLOSED).write_text(
        "".join(line.replace(path.stem, run) + "\n" for run in [path.stem, *runs])
    )
    code = (
        "import sys; from pathlib import Path; from flows.outbox import executions\n"
        f"print(len(list(executions(Path({str(tmp_path)!r})))))\n"
        "print({'mlflow', 'dvc', 'torch', 'prefect', 'pandas'} & sys.modules.keys() or '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    count, *heavy = done.stdout.split()
    assert (int(count), heavy) == (10_010, [])


def test_no_record_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(executions(tmp_path)) == []
    (tmp_path / "mlflow.db").touch()  # MLflow is about to create its tables
    assert list(executions(tmp_path)) == []
    (tmp_path / "mlflow.db").write_text("this is no database, but it is long enough to be read")
    assert list(executions(tmp_path)) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert list(executions(tmp_path)) == []


def test_runs_that_only_mlflow_has_are_told_too_and_those_of_a_log_not_twice(
    tmp_path: Path,
) -> None:
    root = tmp_path / "a b#c?d%41"
    root.mkdir()
    with sqlite3.connect(root / "mlflow.db") as database:
        database.executescript(
            "CREATE TABLE runs (run_uuid, lifecycle_stage, status, start_time, end_time);"
            "CREATE TABLE tags (run_uuid, key, value);"
            "INSERT INTO runs VALUES ('p', 'active', 'FINISHED', 1000, 9000),"
            " ('r1', 'active', 'FINISHED', 1000, 2000), ('r2', 'deleted', 'FINISHED', 1, 1),"
            " ('r3', 'active', 'FINISHED', 1, 1);"
            "INSERT INTO tags VALUES ('p', 'host', 'here'), ('r1', 'dvc.stage', 'extract'),"
            " ('r1', 'mlflow.parentRunId', 'p'), ('r1', 'dvc.outs', 'x y'),"
            " ('r2', 'dvc.stage', 'gone'), ('r3', 'dvc.stage', 'logged'),"
            " ('r3', 'taskvec.key', 'RUN/1');"
        )
    database.close()
    (item,) = executions(root)
    assert (item["stage"], item["mlflow_run"], item["mlflow_parent"]) == ("extract", "r1", "p")
    assert (item["made"], item["outs"], item["host"]) == (["x", "y"], {}, "here")
    assert (item["started"], item["ended"]) == (1, 2)


def test_the_store_is_the_checkouts_own_unless_the_environment_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    assert tracking_uri(tmp_path) == "http://somewhere"


# Passwords

words = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
SECRET = "Canary-5ecret"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["http", "postgresql+psycopg2", "s3"]), words, words, words)
def test_an_address_loses_its_password_and_nothing_else(
    scheme: str, user: str, host: str, text: str
) -> None:
    told = redacted(f"{text} ({scheme}://{user}:{SECRET}@{host}:5000/{text}) {text}")
    assert told == f"{text} ({scheme}://***@{host}:5000/{text}) {text}"
    assert redacted(f"{scheme}://{host}/{text}") == f"{scheme}://{host}/{text}"
    assert without_user(f"{scheme}://{user}:{SECRET}@{host}/x") == f"{scheme}://{host}/x"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:a@b:{SECRET}@host/x",
        f"postgresql://host/db?user=me&password={SECRET}&x=1",
        f"https://host/x?sig=1&access_token={SECRET}",
    ],
)
def test_odd_addresses_lose_their_passwords_too(text: str) -> None:
    assert SECRET not in redacted(text)
    assert redacted(text).count("host") == 1


@pytest.mark.parametrize("piece", ["x", "://", "?key", "a@", "x:"])
def test_a_long_text_takes_no_time(piece: str) -> None:
    began = time.perf_counter()
    redacted(piece * 100_000)
    assert time.perf_counter() - began < 2


def test_secrets_of_the_environment_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("SOME_DATABASE", f"mysql://me:other-{SECRET}@host/db")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "short")
    assert redacted(f"{SECRET}, other-{SECRET}, short") == "***, ***, short"
    assert reason(ValueError(f"no\n  {SECRET}")) == "ValueError: no ***"


def test_content_keeps_everything_but_secrets_and_numbers_that_json_has_not() -> None:
    content = {
        "a.password": SECRET, "token": [SECRET], "tokenizer": "bpe", "tokens": 77,
        "deep": {"api_key": SECRET, "x": (1, 2.5, True, None)}, "loss": float("nan"),
        "secrets.steps": "80",
    }  # fmt: skip
    assert cleaned(content) == {
        "a.password": "***", "token": ["***"], "tokenizer": "bpe", "tokens": 77,
        "deep": {"api_key": "***", "x": [1, 2.5, True, None]}, "loss": "nan",
        "secrets.steps": "80",
    }  # fmt: skip
