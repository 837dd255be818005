"""Questions about lineage on a finished pipeline, against an independent reading of its records."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from flows import difference, retractions, trace, verify
from flows.lineage import Lineage
from taskvec import headers
from taskvec.errors import InvalidInput, MissingArtifact
from tests.project import Project

pytestmark = pytest.mark.pipeline
LOCKS = ("dvc.lock", "edits/dvc.lock", "results/dvc.lock")
MODEL = "data/edits/{}-0/model.safetensors"


@pytest.fixture(scope="module")
def lineage(finished: Project) -> Iterator[Lineage]:
    """Return the lineage of a project that nobody changes."""
    with Lineage(finished.root) as found:
        yield found


def locked(root: Path) -> dict[str, dict[str, Any]]:
    """Return stage -> entry of all lock files, as ruamel reads them."""
    found = {}
    for name in LOCKS:
        if (root / name).is_file():
            found |= YAML(typ="safe").load((root / name).read_text())["stages"]
    return found


def files(entry: dict[str, Any], kind: str) -> dict[str, str]:
    return {item["path"]: item["md5"] for item in entry.get(kind, [])}


def needed(root: Path, start: str) -> set[str]:
    """Return the stages that an output needs, by the names in the lock files."""
    entries = locked(root)
    makers = {path: stage for stage, entry in entries.items() for path in files(entry, "outs")}
    seen: set[str] = set()
    waiting = [makers[start]]
    while waiting:
        stage = waiting.pop()
        if stage not in seen:
            seen.add(stage)
            waiting += [makers[path] for path in files(entries[stage], "deps") if path in makers]
    return seen


def test_a_chain_has_every_stage_once_and_nothing_before_what_it_needs(
    finished: Project, lineage: Lineage
) -> None:
    for edit in ("both", "forget"):
        chain = lineage.chain(lineage.find(edit))
        names = [lineage.stage(execution) for execution in chain]
        assert sorted(names) == sorted(needed(finished.root, MODEL.format(edit)))
        made: set[str] = set()
        for execution in reversed(chain):
            entry = locked(finished.root)[lineage.stage(execution)]
            assert execution.inputs == files(entry, "deps")
            assert execution.outputs == files(entry, "outs")
            produced = {md5 for path, md5 in execution.inputs.items() if path.startswith("data/")}
            assert produced <= made
            made |= set(execution.outputs.values())


def test_below_a_checkpoint_are_exactly_the_edits_that_contain_it(
    finished: Project, lineage: Lineage
) -> None:
    entries = locked(finished.root)
    for task in ("digits", "faces"):
        vector = f"data/vectors/{task}-0.safetensors"
        edits = {
            stage.removeprefix("combine-").removesuffix("-0")
            for stage, entry in entries.items()
            if stage.startswith("combine-") and vector in files(entry, "deps")
        }
        made = lineage.below(lineage.find(task))
        models = {m.artifact.name for m in made if m.contains and "model." in m.artifact.name}
        assert models == {MODEL.format(edit) for edit in edits} and edits
        assert {m.artifact.name for m in made if m.contains} == {
            vector,
            *(f"data/edits/{edit}-0/{kind}.safetensors" for edit in edits
              for kind in ("basis", "model")),
        }  # fmt: skip
        assert all(m.current for m in made)
    # faces is what `forget` must keep: it has a say in the choice and no part in the weights
    used = {m.artifact.name for m in lineage.below(lineage.find("faces")) if not m.contains}
    assert MODEL.format("forget") in used


def test_the_weights_inside_a_model_are_those_that_headers_name(
    finished: Project, lineage: Lineage
) -> None:
    found = {a.fingerprint for a in lineage.contents(lineage.find("both"))}

    def stated(name: str) -> dict[str, Any]:
        path = finished.root / "data" / name
        return headers.read_metadata(headers.read_header(path), path)

    expected = {stated("edits/both-0/basis.safetensors")["fingerprint"]}
    for task in ("digits", "faces"):
        vector = stated(f"vectors/{task}-0.safetensors")
        expected |= {vector["fingerprint"], vector["finetuned"], vector["origin"]}
    assert found == expected


def test_one_artifact_has_many_names(finished: Project, lineage: Lineage) -> None:
    model = lineage.find(MODEL.format("both"))
    names = [
        "both", "both-0", "search-both-0", model.md5, model.md5[:10], model.fingerprint,
        model.fingerprint[:10], str(finished.root / MODEL.format("both")),
    ]  # fmt: skip
    assert {lineage.find(name) for name in names} == {model}
    assert lineage.find("digits").name == "data/checkpoints/digits-0.safetensors"
    assert lineage.find("pretrain").name == "data/checkpoints/pretrained.safetensors"


def test_a_copy_anywhere_is_known_by_its_bytes(
    finished: Project, lineage: Lineage, tmp_path: Path
) -> None:
    for name in (MODEL.format("both"), "data/edits/both-0/search.csv"):
        copy = tmp_path / Path(name).name
        shutil.copyfile(finished.root / name, copy)
        assert lineage.find(str(copy)) == lineage.find(name)


@pytest.mark.parametrize("name", ["nothing", "README.md", "both-7", "deadbeef", "both@HEAD", ""])
def test_what_nobody_made_is_not_found(lineage: Lineage, name: str) -> None:
    with pytest.raises(MissingArtifact, match="nothing recorded is called"):
        lineage.find(name)


def test_a_beginning_of_several_digests_is_refused(lineage: Lineage) -> None:
    digests = {md5 for e in lineage.recorded() for md5 in e.outputs.values()}
    first = lineage.records.cache / "files" / "md5"
    assert digests and first.is_dir()
    with pytest.raises(MissingArtifact):
        lineage.find("zz")
    assert lineage._index.beginning_with("") != []


def test_the_index_built_step_by_step_is_the_one_built_at_once(project: Project) -> None:
    with Lineage(project.root):
        pass  # an index of the first state
    project.command("git", "add", "-Af", "dvc.lock", "edits/dvc.lock")
    project.command("git", "-c", "user.name=Ada", "-c", "user.email=a@b", "commit", "-qm", "one")
    project.replace(
        "params.yaml", "points: 3}}\n    objective: {max", "points: 5}}\n    objective: {max"
    )
    done = project.taskvec("run")
    assert done.code == 0, done.err

    def told(found: Lineage) -> Any:
        both, digits = found.find("both"), found.find("digits")
        then = found.find("both@HEAD")
        chains = [trace.trace(found, one) for one in (both, then)]
        return chains, trace.below(found, digits), found._index.counts()

    with Lineage(project.root) as grown:
        first = told(grown)
    (project.root / ".taskvec" / "lineage.sqlite").unlink()
    with Lineage(project.root) as fresh:
        assert told(fresh) == first
    (project.root / ".taskvec" / "lineage.sqlite").write_bytes(b"no database at all" * 100)
    with Lineage(project.root) as mended:
        assert told(mended) == first
        now, then = mended.find("both"), mended.find("both@HEAD")
        assert now.md5 != then.md5 or now == then
        last, before = mended.last_two("python -m tasks search both-0")
        assert last and before
        assert before.run["author"] == "Ada"
        assert any("points changed: 3 -> 5" in words for words in difference.words(before, last))

    why = project.taskvec("why", "search-both-0")
    assert why.code == 0, why.err
    assert "up to date" in why.out and "points changed: 3 -> 5" in why.out and "by Ada" in why.out
    compared = project.taskvec("diff", "both@HEAD", "both")
    assert compared.code == 0, compared.err
    assert "edits.EDIT.coefficients.c.points changed: 3 -> 5" in compared.out


def test_why_says_what_would_run_with_old_and_new_values(project: Project) -> None:
    project.replace("params.yaml", "steps: 6", "steps: 7")
    found = json.loads(project.taskvec("why", "fine_tune@digits-0", "--json").out)
    assert found["stale"] == ["fine_tune.steps changed: 6 -> 7"]
    assert found["last"]["outputs"]


def test_two_models_differ_by_recipe_coefficients_metrics_and_weights(lineage: Lineage) -> None:
    both, forget = lineage.find("both"), lineage.find("forget")
    found = difference.difference(lineage, both, forget)
    assert (
        "edits.EDIT.expression changed: c * (digits + faces) -> -c * digits"
        in (found["stages"]["combine EDIT"])
    )
    assert found["metrics"]["test.accuracy.digits"]
    one, other = (load_file(lineage.stored(a)) for a in (both, forget))
    squares = {name: ((one[name] - other[name]).double() ** 2).sum() for name in one
               if one[name].is_floating_point()}  # fmt: skip
    assert found["weights"]["distance"] == pytest.approx(
        float(torch.stack(list(squares.values())).sum().sqrt()), rel=1e-6
    )
    layers = found["weights"]["layers"]
    total = sum(layer["distance"] ** 2 for layer in layers.values())
    assert total == pytest.approx(found["weights"]["distance"] ** 2, rel=1e-6)
    same = difference.difference(lineage, both, both)
    assert not (same["stages"] or same["coefficients"] or same["metrics"])
    assert same["weights"]["distance"] == 0
    with pytest.raises(InvalidInput, match="no model or vector"):
        difference.difference(lineage, both, lineage.find("data/edits/both-0/search.csv"))


def test_graphs_have_the_chain(lineage: Lineage) -> None:
    both = lineage.find("both")
    graph = trace.graph(lineage, both, down=False)
    stages = {data["label"] for _, data in graph.nodes(data=True) if data["kind"] == "stage"}
    assert stages == {lineage.stage(execution) for execution in lineage.chain(both)}
    assert trace.dot(graph).count(" -> ") == graph.number_of_edges()
    assert trace.mermaid(graph).count(" --> ") == graph.number_of_edges()
    down = trace.graph(lineage, lineage.find("digits"), down=True)
    assert both.md5 in down


# --------------------------------------------------------------------------------------------
# Retractions


def test_a_retracted_checkpoint_marks_its_models_until_it_is_replaced(project: Project) -> None:
    bad = project.root / "data/checkpoints/digits-0.safetensors"
    done = project.taskvec("retract", "digits", "--why", "trained on its own test set")
    assert done.code == 0, done.err
    for edit in ("both", "forget"):
        assert MODEL.format(edit) in done.out
    status = project.taskvec("status")
    assert "trained on its own test set" in status.out
    assert f"2 edited models contain it: {MODEL.format('both')}" in status.out
    assert "is retracted" in " ".join(project.stale()["fine_tune@digits-0"])
    with Lineage(project.root) as lineage:
        marks = retractions.load(project.root)
        for edit, inside in (("both", True), ("forget", True), ("faces", False)):
            assert bool(marks.inside(lineage, lineage.find(edit))) == inside

    before = bad.read_bytes()
    # another recipe replaces it, and everything that contained it is made anew
    project.replace("params.yaml", "steps: 6", "steps: 7")
    mended = project.taskvec("run", "search-forget-0")
    assert mended.code == 0, mended.err
    again = {"fine_tune@digits-0", "extract@digits-0", "combine-forget-0", "search-forget-0"}
    assert again <= mended.stages("run")
    assert bad.read_bytes() != before
    assert not again & project.stale().keys() and "search-both-0" in project.stale()
    # back to the old recipe: the run cache has the bad bytes, and they are not restored; the same
    # recipe gives the same bytes, which nobody wants
    project.replace("params.yaml", "steps: 7", "steps: 6")
    back = project.taskvec("run", "fine_tune@digits-0")
    assert back.code == 1
    assert "made the retracted bytes" in back.err
    marks = retractions.load(project.root)
    withdrawn = project.taskvec("retract", "--withdraw", marks.items[0].md5)
    assert withdrawn.code == 0, withdrawn.err
    assert retractions.load(project.root).items == ()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["digits"], 3, "--why"),
        (["digits", "--why", " "], 3, "--why"),
        (["nothing", "--why", "x"], 5, "nothing recorded"),
        (["digits", "--withdraw"], 3, "was not retracted"),
    ],
)
def test_a_wrong_retraction_is_refused(
    finished: Project, words: list[str], code: int, said: str
) -> None:
    done = finished.taskvec("retract", *words)
    assert done.code == code and said in done.err
    assert not (finished.root / "retractions.yaml").exists()


def test_a_file_of_retractions_that_was_edited_badly_is_explained(tmp_path: Path) -> None:
    (tmp_path / "retractions.yaml").write_text("retractions:\n- md5: xyz\n  path: a\n  why: b\n")
    with pytest.raises(InvalidInput, match="not what `taskvec retract` writes"):
        retractions.load(tmp_path)
    assert retractions.load(tmp_path / "elsewhere").items == ()


# --------------------------------------------------------------------------------------------
# Verification


def test_nothing_is_wrong_with_what_has_just_run(finished: Project, lineage: Lineage) -> None:
    found = verify.verify(lineage, deep=True)
    assert found.findings == []
    assert found.entries == len(locked(finished.root))
    kept = {
        md5 for entry in locked(finished.root).values() for md5 in files(entry, "outs").values()
    }
    assert found.files >= len(kept)
    assert "nothing wrong" in finished.taskvec("verify", "both").out


def flip(path: Path) -> None:
    """Flip a bit of a file as hardware does, its mode and times as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    path.chmod(status.st_mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_damage_is_found_and_mended(project: Project) -> None:
    with Lineage(project.root) as lineage:
        flip(lineage.records.cached(lineage.find("extract@digits-0").md5))
    found = project.taskvec("verify", "both")
    assert found.code == 4
    first = found.out.splitlines()[0]
    assert first.startswith("data/vectors/digits-0.safetensors: ")
    assert "taskvec run extract@digits-0" in found.out
    project.taskvec("verify", "--repair")
    done = project.taskvec("run")
    assert done.code == 0, done.err
    assert project.taskvec("verify").code == 0


def test_an_edited_lock_entry_is_found(project: Project) -> None:
    project.replace("dvc.lock", "steps: 6", "steps: 5")
    found = project.taskvec("verify")
    assert found.code == 4
    assert "nobody ran it so" in found.out.splitlines()[0]
