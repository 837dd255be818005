"""Statements, events and graphs of lineage are valid, and every change of an export is found."""

import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows import openlineage, prov, received
from flows.export import write_weights
from flows.received import SIGNATURE, STATEMENT, verify_received
from flows.records import Execution
from flows.statement import predicate, public
from taskvec import headers
from taskvec.errors import MissingArtifact
from taskvec.mapped import open_weights
from tests.made_exports import executions, tiny_export
from tests.project import ROOT

EXPORTS = 200
MUTATIONS = 1_000

# From https://github.com/in-toto/attestation (spec/v1) and https://slsa.dev/spec/v1.0/provenance.
DESCRIPTOR = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "uri": {"type": "string", "pattern": r"^[a-z][a-z0-9+.-]*:\S+$"},
        "digest": {
            "type": "object",
            "additionalProperties": {"type": "string", "pattern": r"^[0-9a-f]{32,64}$"},
            "minProperties": 1,
        },
        "annotations": {"type": "object"},
    },
    "additionalProperties": False,
    "anyOf": [{"required": ["uri"]}, {"required": ["digest"]}],
}
DESCRIPTORS = {"type": "array", "items": DESCRIPTOR}
SCHEMA = {
    "type": "object",
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "items": {"allOf": [DESCRIPTOR, {"required": ["name", "digest"]}]},
        },
        "predicateType": {"const": "https://slsa.dev/provenance/v1"},
        "predicate": {
            "type": "object",
            "properties": {
                "buildDefinition": {
                    "type": "object",
                    "properties": {
                        "buildType": {"type": "string", "format": "uri", "pattern": "^urn:"},
                        "externalParameters": {"type": "object"},
                        "internalParameters": {"type": "object"},
                        "resolvedDependencies": DESCRIPTORS,
                    },
                    "required": ["buildType", "externalParameters"],
                    "additionalProperties": False,
                },
                "runDetails": {
                    "type": "object",
                    "properties": {
                        "builder": {
                            "type": "object",
                            "properties": {
                                "id": {"type": "string", "pattern": "^urn:"},
                                "version": {
                                    "type": "object",
                                    "additionalProperties": {"type": "string"},
                                },
                            },
                            "required": ["id"],
                            "additionalProperties": False,
                        },
                        "metadata": {
                            "type": "object",
                            "properties": {"invocationId": {"type": "string"}},
                            "additionalProperties": False,
                        },
                        "byproducts": DESCRIPTORS,
                    },
                    "required": ["builder"],
                    "additionalProperties": False,
                },
            },
            "required": ["buildDefinition", "runDetails"],
            "additionalProperties": False,
        },
    },
    "required": ["_type", "subject", "predicateType", "predicate"],
    "additionalProperties": False,
}

# From https://openlineage.io/spec/2-0-2/OpenLineage.json, RunEvent.
FACETS = {
    "type": "object",
    "additionalProperties": {"type": "object", "required": ["_producer", "_schemaURL"]},
}
DATASETS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "namespace": {"type": "string"}, "name": {"type": "string"}, "facets": FACETS,
        },
        "required": ["namespace", "name"],
    },
}  # fmt: skip
EVENT = {
    "type": "object",
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "format": "date-time"},
        "producer": {"type": "string", "format": "uri"},
        "schemaURL": {"type": "string", "format": "uri"},
        "run": {
            "type": "object",
            "properties": {"runId": {"type": "string", "format": "uuid"}, "facets": FACETS},
            "required": ["runId"],
        },
        "job": {
            "type": "object",
            "properties": {
                "namespace": {"type": "string"}, "name": {"type": "string"}, "facets": FACETS,
            },
            "required": ["namespace", "name"],
        },
        "inputs": DATASETS,
        "outputs": DATASETS,
    },
    "required": ["eventTime", "producer", "schemaURL", "run", "job"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return exports that all differ; tests copy them."""
    top = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # most of the time, and no part of what is asked
        for seed in range(EXPORTS):
            tiny_export(top / f"{seed}", seed)
    return sorted(top.iterdir())


# Statements


def test_every_statement_is_one_of_in_toto_and_slsa(clean: list[Path]) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for directory in clean:
        validator.validate(json.loads((directory / STATEMENT).read_text()))


def test_the_published_protocol_reads_the_statements(clean: list[Path]) -> None:
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2

    for directory in clean[:20]:
        text = (directory / STATEMENT).read_text()
        parsed = json_format.Parse(text, statement.Statement([], "", {}).pb)
        statement.Statement.copy_from_pb(parsed).validate()
        content = json.dumps(json.loads(text)["predicate"])
        built = json_format.Parse(content, provenance_pb2.Provenance())
        assert built.build_definition.build_type and built.run_details.builder.id


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.randoms())
def test_the_order_of_stages_changes_no_statement(seed: int, order: random.Random) -> None:
    newest, *chain = executions(random.Random(seed))
    shuffled = order.sample(chain, len(chain))
    found = [predicate({}, [newest, *c], c, {}, head="a" * 40) for c in (chain, shuffled)]
    assert headers.canonical(found[0]) == headers.canonical(found[1])


paths = st.lists(st.text("ab.-_", min_size=1, max_size=6), min_size=2, max_size=5).map(
    lambda parts: "/" + "/".join(parts)
)
secrets = st.text("abcXYZ019:@%", min_size=8, max_size=20)
leaves = st.one_of(
    paths,
    paths.map(lambda path: "C:" + path.replace("/", "\\")),
    secrets.map(lambda secret: f"https://user:{secret}@example.org/x"),
    st.integers(),
    st.text("abc/ ", max_size=8).filter(lambda text: not text.startswith("/")),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(leaves.map(str), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(values)
def test_no_absolute_path_and_no_credential_is_left(value: Any) -> None:
    text = json.dumps(public(value))
    assert not re.search(r'"/[ab.\-_]+/', text)
    assert not re.search(r'"C:\\', text)
    assert "user:" not in text
    assert public(public(value)) == public(value)


def test_what_is_no_path_stays_as_it_is() -> None:
    texts = ["a photo of a {}.", "data/vectors/a.safetensors", "c * (a - b)", "openai", "/", "a@b"]
    assert public({text: [text, 0.5, None, True] for text in texts}) == {
        text: [text, 0.5, None, True] for text in texts
    }


def test_users_and_hosts_stay_at_home_and_runs_are_named() -> None:
    facts = {"who": "Ada Lovelace", "host": "engine", "when": "2026-01-01", "mlflow_run": "f" * 32}
    (found,) = [replace(item, run=facts) for item in executions(random.Random(0))[:1]]
    text = json.dumps(predicate({}, [found], [], {}))
    assert "f" * 32 in text
    assert not any(secret in text for secret in ("Ada", "engine", "2026"))


# A received export


def test_clean_exports_that_differ_all_verify(clean: list[Path]) -> None:
    assert len(clean) == EXPORTS
    assert len({(directory / STATEMENT).read_bytes() for directory in clean}) == EXPORTS
    assert [item for directory in clean for item in verify_received(directory)] == []


def pick(draw: random.Random, directory: Path) -> Path:
    return draw.choice(sorted(directory.iterdir()))


def weights(directory: Path) -> Path:
    (path,) = directory.glob("*.safetensors")
    return path


def flip(draw: random.Random, directory: Path, other: Path) -> None:
    path = pick(draw, directory)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_a_weight(draw: random.Random, directory: Path, other: Path) -> None:
    """Change a byte of the weights and correct the statement."""
    path = weights(directory)
    content = bytearray(path.read_bytes())
    content[draw.randrange(8, len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    correct(directory)


def cut(draw: random.Random, directory: Path, other: Path) -> None:
    path = pick(draw, directory)
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def lengthen(draw: random.Random, directory: Path, other: Path) -> None:
    path = pick(draw, directory)
    path.write_bytes(path.read_bytes() + draw.choice([b"\0", b"\n", b"x"]))


def drop(draw: random.Random, directory: Path, other: Path) -> None:
    pick(draw, directory).unlink()


def rename(draw: random.Random, directory: Path, other: Path) -> None:
    path = pick(draw, directory)
    path.rename(path.with_name(draw.choice(["x", f"{path.name}.bak", path.name.upper() + "_"])))


def add(draw: random.Random, directory: Path, other: Path) -> None:
    name = draw.choice(["x", ".hidden", "other.safetensors", SIGNATURE, "nested/x"])
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(draw.choice([b"", b"{}", pick(draw, other).read_bytes()]))


def exchange(draw: random.Random, directory: Path, other: Path) -> None:
    one, two = draw.sample(sorted(directory.iterdir()), 2)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def link(draw: random.Random, directory: Path, other: Path) -> None:
    path = pick(draw, directory)
    moved = directory.parent / f"outside-{path.name}"
    path.rename(moved)
    path.symlink_to(moved)


def take_from_another(draw: random.Random, directory: Path, other: Path) -> None:
    name = draw.choice([STATEMENT, "README.md", weights(directory).name])
    source = weights(other) if name.endswith(".safetensors") else other / name
    (directory / name).write_bytes(source.read_bytes())


def take_and_correct(draw: random.Random, directory: Path, other: Path) -> None:
    """Take the weights or the card of another export and correct the statement."""
    name = draw.choice(["README.md", weights(directory).name])
    source = weights(other) if name.endswith(".safetensors") else other / name
    (directory / name).write_bytes(source.read_bytes())
    correct(directory)


def edit_the_card(draw: random.Random, directory: Path, other: Path) -> None:
    """Change a digit of the card and correct the statement."""
    path = directory / "README.md"
    text = path.read_text()
    place = draw.choice([match.start() for match in re.finditer(r"\d", text)])
    path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")
    correct(directory)


def edit_the_header(draw: random.Random, directory: Path, other: Path) -> None:
    """Change what the header says, seal it anew and correct the statement."""
    path = weights(directory)
    opened = open_weights(path)
    content = json.loads(json.dumps(dict(opened.metadata)))
    mutate(draw, content, lambda place: place[-1] not in ("kind", "fingerprint"))
    write_weights(directory / "new", opened, content)
    (directory / "new").rename(path)
    correct(directory)


def edit_the_statement(draw: random.Random, directory: Path, other: Path) -> None:
    content = json.loads((directory / STATEMENT).read_text())
    mutate(draw, content)
    dump(directory, content)


def rewrite_the_statement(draw: random.Random, directory: Path, other: Path) -> None:
    """Say the same in other bytes."""
    content = json.loads((directory / STATEMENT).read_text())
    indent = draw.choice([None, 0, 2])
    (directory / STATEMENT).write_text(json.dumps(content, indent=indent, sort_keys=True))


def repeat_a_key(draw: random.Random, directory: Path, other: Path) -> None:
    text = (directory / STATEMENT).read_text()
    (directory / STATEMENT).write_text(text.replace("{", '{"_type": "x",', 1))


MUTATORS: list[Callable[[random.Random, Path, Path], None]] = [
    flip, flip_a_weight, cut, lengthen, drop, rename, add, exchange, link, take_from_another,
    take_and_correct, edit_the_card, edit_the_header, edit_the_statement, rewrite_the_statement,
    repeat_a_key,
]  # fmt: skip


def correct(directory: Path) -> None:
    """Give the statement the digests that the files have now."""
    content = json.loads((directory / STATEMENT).read_text())
    for item in content["subject"]:
        path = directory / item["name"]
        item["digest"]["sha256"] = received.file_sha256(path)
        if path.suffix == ".safetensors" and (mark := received._attempt(received.measure, path)):
            item["annotations"]["fingerprint"] = mark
    dump(directory, content)


def dump(directory: Path, content: Any) -> None:
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    (directory / STATEMENT).write_text(text)


def mutate(
    draw: random.Random,
    content: Any,
    allowed: Callable[[tuple[Any, ...]], bool] = lambda place: True,
) -> None:
    """Change, drop or add one value anywhere in JSON."""
    places = [place for place in walk(content) if place and allowed(place)]
    *above, last = draw.choice(places)
    for key in above:
        content = content[key]
    match draw.choice(["change", "drop", "add"]):
        case "change":
            content[last] = changed(draw, content[last])
        case "drop":
            del content[last]
        case "add" if isinstance(content, dict):
            content[f"{last}_"] = "new"
        case _:
            content.append("new")


def walk(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    return [place, *(found for key, item in items for found in walk(item, (*place, key)))]


def changed(draw: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "other"
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str) and value:
        place = draw.randrange(len(value))
        return value[:place] + ("0" if value[place] != "0" else "1") + value[place + 1 :]
    return "other" if not isinstance(value, dict | list) else type(value)() if value else ["other"]


def snapshot(directory: Path) -> dict[str, bytes | str]:
    return {
        path.name: "link" if path.is_symlink() else path.read_bytes() if path.is_file() else "other"
        for path in directory.iterdir()
    }


def test_every_one_of_a_thousand_changes_is_found(clean: list[Path], tmp_path: Path) -> None:
    draw = random.Random(0)
    missed, done = [], 0
    while done < MUTATIONS:
        directory, other = draw.sample(clean, 2)
        mutator = MUTATORS[done % len(MUTATORS)]
        place = tmp_path / str(done) / "export"
        shutil.copytree(directory, place)
        before = snapshot(place)
        mutator(draw, place, other)
        if snapshot(place) == before:  # two equal files were exchanged, or the like
            shutil.rmtree(place)
            continue
        if not verify_received(place):
            missed.append((done, mutator.__name__, directory.name))
        shutil.rmtree(place.parent)
        done += 1
    assert missed == []


@pytest.mark.parametrize(
    ("mutator", "words"),
    [
        (lambda d: (d / "README.md").unlink(), "README.md is missing"),
        (lambda d: (d / "README.md").rename(d / "x.md"), "README.md was renamed to 'x.md'"),
        (lambda d: (d / "x").write_text(""), "x is not in the statement"),
        (lambda d: (d / STATEMENT).unlink(), "provenance.json is missing: nothing says what"),
        (
            lambda d: (d / STATEMENT).write_text("[]"),
            "provenance.json is no statement of an export",
        ),
        (lambda d: (d / "README.md").write_text("x"), "README.md was changed: its SHA-256 is"),
        (lambda d: (d / "down").mkdir(), "down is no plain file"),
        (lambda d: (d / "l").symlink_to(d / "README.md"), "l is a symbolic link"),
        (lambda d: weights(d).write_bytes(b"x"), "model.safetensors was changed"),
        (lambda d: (d / SIGNATURE).write_text("{}"), "model.sig is no signature of a model"),
    ],
)
def test_the_first_finding_names_the_bad_file(
    clean: list[Path], tmp_path: Path, mutator: Callable[[Path], object], words: str
) -> None:
    source = next(path for path in clean if (path / "model.safetensors").is_file())
    directory = shutil.copytree(source, tmp_path / "export")
    mutator(directory)
    assert str(verify_received(directory)[0]).startswith(words)


def test_an_edited_statement_is_named_although_its_digests_fit(
    clean: list[Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(clean[0], tmp_path / "export")
    content = json.loads((directory / STATEMENT).read_text())
    content["predicate"]["buildDefinition"]["externalParameters"]["recipe"] = {"seed": 99}
    dump(directory, content)
    name = weights(directory).name
    assert [str(item) for item in verify_received(directory)] == [
        f"provenance.json was edited, or {name} is of another export"
    ]


def test_a_signature_of_other_files_is_told_without_its_key(
    clean: list[Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(clean[0], tmp_path / "export")
    digests = {path.name: received.file_sha256(path) for path in directory.iterdir()}
    for change, expected in (
        ({}, []),
        ({"README.md": "0" * 64}, ["is the signature of other files"]),
    ):
        resources = [
            {"name": name, "digest": digest, "algorithm": "sha256"}
            for name, digest in {**digests, **change}.items()
        ]
        payload = json.dumps({"predicate": {"resources": resources}}).encode()
        bundle = {"dsseEnvelope": {"payload": base64.b64encode(payload).decode()}}
        (directory / SIGNATURE).write_text(json.dumps(bundle))
        assert [item.problem for item in verify_received(directory)] == expected


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Check a directory in a Python that has neither torch nor what makes exports."""
    missing = ("torch", "numpy", "dvc", "mlflow", "prefect", "pandas", "networkx", "ruamel")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        "import runpy; runpy.run_module('flows.received', run_name='__main__', alter_sys=True)"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_it_runs_alone_with_the_documented_exit_codes(clean: list[Path], tmp_path: Path) -> None:
    done = run(str(clean[0]))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{clean[0]} is intact: every file is the one that was exported\n"
    directory = shutil.copytree(clean[0], tmp_path / "export")
    (directory / "README.md").unlink()
    done = run(str(directory))
    assert (done.returncode, done.stderr) == (4, "")
    assert done.stdout.startswith("README.md is missing\n")
    done = run(str(tmp_path / "nowhere"))
    assert done.returncode == MissingArtifact.exit_code == 5
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert run().returncode == 2


# Events and graphs


def test_every_execution_gives_a_start_and_an_end_that_are_valid(tmp_path: Path) -> None:
    chain = executions(random.Random(3))
    openlineage.write(tmp_path / "events.jsonl", chain)
    found = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    checker = jsonschema.Draft202012Validator(EVENT)
    for event in found:
        checker.validate(event)
        uuid.UUID(event["run"]["runId"])
        assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None
    assert [event["eventType"] for event in found] == ["START", "COMPLETE"] * len(chain)
    starts, ends = found[::2], found[1::2]
    assert [e["run"] for e in starts] == [e["run"] for e in ends]
    assert len({e["run"]["runId"] for e in starts}) == len(chain)
    for execution, end in zip(reversed(chain), ends, strict=True):
        assert {item["name"] for item in end["inputs"]} == set(execution.inputs)
        versions = {
            item["name"]: item["facets"]["version"]["datasetVersion"] for item in end["outputs"]
        }
        assert versions == execution.outputs
        assert end["eventTime"] == execution.run["when"]


@pytest.mark.parametrize(
    ("status", "end"),
    [("FINISHED", "COMPLETE"), ("FAILED", "FAIL"), ("KILLED", "ABORT"), ("RUNNING", "ABORT")],
)
def test_the_status_of_a_run_decides_how_its_events_end(status: str, end: str) -> None:
    run = {"status": status, "started": "2026-01-01T00:00:00Z", "ended": "2026-01-01T01:00:00Z"}
    execution = Execution("python -m tasks search a-0", {}, {"out": "a" * 32}, {}, run)
    start, last = openlineage.events([execution])
    assert (start["eventTime"], last["eventTime"]) == (run["started"], run["ended"])
    assert (start["eventType"], last["eventType"]) == ("START", end)
    assert bool(last["outputs"]) == (end == "COMPLETE")


def test_the_client_of_openlineage_takes_the_events() -> None:
    client = pytest.importorskip("openlineage.client.event_v2")
    for event in openlineage.events(executions(random.Random(1))):
        facets = {key: event[key] for key in ("eventTime", "producer")}
        read = client.RunEvent(
            **facets,
            eventType=client.RunState[event["eventType"]],
            run=client.Run(event["run"]["runId"]),
            job=client.Job(event["job"]["namespace"], event["job"]["name"]),
        )
        assert read.run.runId == event["run"]["runId"]


def test_a_graph_of_prov_relates_every_file_and_execution(tmp_path: Path) -> None:
    chain = executions(random.Random(3))
    prov.write(tmp_path / "prov.json", chain)
    found = json.loads((tmp_path / "prov.json").read_text())
    assert len(found["activity"]) == len(chain)
    assert len(found["used"]) == sum(len(item.inputs) for item in chain)
    assert len(found["wasGeneratedBy"]) == sum(len(item.outputs) for item in chain)
    assert {item["prov:label"] for item in found["agent"].values()} == {"Ada"}
    digests = {item["taskvec:digest"] for item in found["entity"].values()}
    assert digests == {m for item in chain for m in [*item.inputs.values(), *item.outputs.values()]}
    prov.write(tmp_path / "again.json", list(reversed(chain)))
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "prov.json").read_bytes()


def test_the_package_prov_reads_the_graph_back(tmp_path: Path) -> None:
    model = pytest.importorskip("prov.model")
    chain = executions(random.Random(3))
    prov.write(tmp_path / "prov.json", chain)
    read = model.ProvDocument.deserialize(tmp_path / "prov.json", format="json")
    kinds = [type(record).__name__ for record in read.get_records()]
    assert kinds.count("ProvActivity") == len(chain)
    assert kinds.count("ProvUsage") == sum(len(item.inputs) for item in chain)
    again = json.loads(read.serialize(format="json"))
    ours = json.loads((tmp_path / "prov.json").read_text())
    assert again["activity"].keys() == ours["activity"].keys()
    assert again["entity"].keys() == ours["entity"].keys()
