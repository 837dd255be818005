"""Weights in every layout that people have, and what makes a difference of two of them."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from taskvec import checkpoints, headers, streaming
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.mapped import (
    Mapped,
    StoredVector,
    aligned,
    check_alike,
    difference,
    open_weights,
    same_bytes,
    weights_as_vector,
)
from tests.test_lazy import values

law = settings(deadline=None, max_examples=50)
INDEX = "model.safetensors.index.json"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small() -> dict[str, Tensor]:
    return {
        "b.weight": noise(2, 3),
        "a": noise(5).bfloat16(),
        "c/d-e:f": noise(1, 2, 1, 2).half(),
        "scale": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor([3, 4]),
        "flag": torch.tensor([True, False]),
        "wide": noise(2).double(),
        "eight": noise(3).to(torch.float8_e4m3fn),
    }


def opened(path: Path, tensors: Mapping[str, Tensor]) -> Mapped:
    """Return weights from a plain safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return open_weights(path)


def sharded(directory: Path, state: Mapping[str, Tensor], ending: str = "safetensors") -> Path:
    """Write two shards and their index, as Hugging Face does; return the index."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    places = {}
    for number in (0, 1):
        part = {name: state[name] for name in sorted(state)[number::2]}
        file = f"{stem}-0000{number + 1}-of-00002.{ending}"
        (save_file if ending == "safetensors" else torch.save)(part, directory / file)
        places.update(dict.fromkeys(part, file))
    index = directory / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def in_directory(name: str) -> Callable[[Path, dict[str, Tensor]], Path]:
    def write(path: Path, state: dict[str, Tensor]) -> Path:
        (torch.save if name.endswith("bin") else save_file)(state, path / name)
        return path

    return write


def in_file(name: str, **options: Any) -> Callable[[Path, dict[str, Tensor]], Path]:
    def write(path: Path, state: dict[str, Tensor]) -> Path:
        torch.save(state, path / name, **options)
        return path / name

    return write


def ours_in_file(path: Path, state: dict[str, Tensor]) -> Path:
    checkpoints.save(path / "x.safetensors", state, "checkpoint")
    return path / "x.safetensors"


LAYOUTS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "a file": lambda path, state: in_directory("x.safetensors")(path, state) / "x.safetensors",
    "Hugging Face": in_directory("model.safetensors"),
    "open_clip": in_directory("open_clip_model.safetensors"),
    "open_clip, older": in_directory("open_clip_pytorch_model.bin"),
    "diffusers": in_directory("diffusion_pytorch_model.safetensors"),
    "transformers, older": in_directory("pytorch_model.bin"),
    "shards": lambda path, state: sharded(path, state).parent,
    "an index": sharded,
    "shards of torch": lambda path, state: sharded(path, state, "bin").parent,
    "torch": in_file("x.pt"),
    "torch before 1.6": in_file("x.pth", _use_new_zipfile_serialization=False),
    "training": lambda path, state: in_file("x.ckpt")(path, {"epoch": 3, "state_dict": state}),
    "taskvec": ours_in_file,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_tensors(tmp_path: Path, layout: str) -> None:
    state = small()
    if layout == "torch before 1.6":
        del state["eight"]  # is younger than the format
    path = LAYOUTS[layout](tmp_path, state)
    weights = open_weights(path)
    assert weights.measure() == weights.fingerprint == checkpoints.fingerprint(state)
    assert list(weights.tensors) == sorted(state)
    assert weights.floating == ["a", "b.weight", "c/d-e:f", "empty", "scale"]
    assert weights.label.startswith(str(path).removesuffix(f"/{INDEX}"))
    found = values(weights_as_vector(weights))
    for name in weights.floating:
        np.testing.assert_array_equal(found[name], state[name].float().numpy())


def test_halves_of_every_bit_pattern_become_the_same_floats(tmp_path: Path) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    state = {"half": bits.view(torch.float16), "brain": bits.clone().view(torch.bfloat16)}
    weights = opened(tmp_path / "x.safetensors", state)
    for name, value in state.items():
        found = weights.tensors[name].floats(0, 1 << 16)
        np.testing.assert_array_equal(found, value.float().numpy())
        np.testing.assert_array_equal(weights.tensors[name].floats(7, 9), found[7:9])


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for pad in range(8):
        text = header + b" " * pad
        path = tmp_path / f"{pad}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1, 2))
        assert values(weights_as_vector(open_weights(path)))["x"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", IncompatibleWeights, "no weight_map of names to files"),
        ("[]", IncompatibleWeights, "no weight_map of names to files"),
        ("[" * 100_000, IncompatibleWeights, "no weight_map of names to files"),
        ({}, IncompatibleWeights, "no weight_map of names to files"),
        ({"weight_map": ["a"]}, IncompatibleWeights, "no weight_map of names to files"),
        ({"weight_map": {}}, IncompatibleWeights, "0 tensors"),
        ('{"weight_map": {"a": "x", "a": "y"}}', IncompatibleWeights, "a key appears twice"),
        ({"weight_map": {"a": "no.safetensors"}}, MissingArtifact, "names 'no.safetensors', which"),
        ({"weight_map": {"a": "a\0.safetensors"}}, MissingArtifact, "which is not there"),
        ({"weight_map": {"a": "../x.safetensors"}}, IncompatibleWeights, "no file of weights"),
        ({"weight_map": {"a": "/x.safetensors"}}, IncompatibleWeights, "beside the index"),
        ({"weight_map": {"a": ".."}}, IncompatibleWeights, "no file of weights beside the index"),
        ({"weight_map": {"a": ""}}, IncompatibleWeights, "no file of weights beside the index"),
        ({"weight_map": {"a": INDEX}}, IncompatibleWeights, "no file of weights"),
        ({"weight_map": {"a": "one.safetensors"}}, IncompatibleWeights, "do not agree on 'b'"),
        (
            {"weight_map": dict.fromkeys("abc", "one.safetensors")},
            IncompatibleWeights,
            "do not agree on 'c'; download the shards anew",
        ),
        (
            {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
            IncompatibleWeights,
            "one.safetensors do not agree on 'b'",
        ),
    ],
    ids=range(17),
)
def test_a_wrong_index_is_refused(
    tmp_path: Path, content: Any, error: type[Exception], message: str
) -> None:
    opened(tmp_path / "one.safetensors", {"a": noise(2), "b": noise(2)})
    opened(tmp_path / "two.safetensors", {"b": noise(2)})
    opened(tmp_path.parent / "x.safetensors", {"a": noise(2)})
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(error, match=message):
        open_weights(tmp_path)


def test_what_is_not_there_is_a_missing_artifact(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pt", INDEX):
        with pytest.raises(MissingArtifact, match="does not exist"):
            open_weights(tmp_path / name)
    with pytest.raises(MissingArtifact, match=r"holds no weights; expected model\.safetensors"):
        open_weights(tmp_path)


def test_shards_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path, small())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    good = shard.read_bytes()
    for length in (0, 4, 30, len(good) - 1):
        shard.write_bytes(good[:length])
        with pytest.raises(IncompatibleWeights, match="cut short"):
            open_weights(index)


def test_files_behind_links_are_read(tmp_path: Path) -> None:
    """The cache of Hugging Face keeps the files elsewhere, under their digests."""
    state = small()
    sharded(tmp_path / "blobs", state)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert open_weights(tmp_path / "snapshot").measure() == checkpoints.fingerprint(state)


def test_files_of_taskvec_know_their_fingerprint_and_their_ties(tmp_path: Path) -> None:
    table = noise(4, 2)
    mark = checkpoints.save(tmp_path / "x.safetensors", {"a": table, "b": table}, "checkpoint")
    weights = open_weights(tmp_path / "x.safetensors")
    assert weights.metadata["kind"] == "checkpoint"
    assert (weights.tied, list(weights.tensors)) == ({"b": "a"}, ["a"])
    assert weights.named["b"] is weights.tensors["a"]
    assert weights.fingerprint == weights.measure() == mark


@pytest.mark.parametrize("ties", [{"b": "c"}, {"b": ["a"]}, {"a": "a"}, ["a"]], ids=str)
def test_ties_to_nothing_are_damage(tmp_path: Path, ties: Any) -> None:
    checkpoints.save(tmp_path / "x.safetensors", {"a": noise(2)}, "checkpoint", tied=ties)
    with pytest.raises(IncompatibleWeights, match="it ties tensors that it does not hold"):
        open_weights(tmp_path / "x.safetensors")


def test_a_vector_is_a_part_of_a_file_below_a_prefix(tmp_path: Path) -> None:
    weights = opened(
        tmp_path / "x.safetensors", {"p.a": noise(2), "p.b": noise(3), "q.a": noise(1)}
    )
    vector = StoredVector(weights, "p.")
    assert dict(vector.shapes) == {"a": (2,), "b": (3,)}
    assert values(vector)["b"].tolist() == noise(3).tolist()


def test_a_vector_is_made_of_finite_floats(tmp_path: Path) -> None:
    weights = opened(tmp_path / "x.safetensors", {"a": noise(2), "n": torch.tensor([1])})
    with pytest.raises(IncompatibleWeights, match="'n' is I64; the tensors of a vector are F32"):
        StoredVector(weights)
    weights = opened(tmp_path / "y.safetensors", {"a": torch.tensor([1.0, torch.nan, torch.inf])})
    with pytest.raises(IncompatibleWeights, match=r"holds NaN or infinite values \(2 in one block"):
        values(StoredVector(weights))


@law
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 99),
)
def test_a_difference_is_taken_in_float32(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shape: list[int], seed: int
) -> None:
    path = tmp_path_factory.mktemp("difference")
    before, after = noise(*shape, seed=seed).to(dtype), noise(*shape, seed=seed + 1).to(dtype)
    one = opened(path / "one.safetensors", {"x": before})
    two = opened(path / "two.safetensors", {"x": after})
    found = values(difference(one, two))["x"]
    np.testing.assert_array_equal(found, (after.float() - before.float()).numpy())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0, torch.nan], [1.0, 1.0], r"'x' of .*one\.safetensors holds NaN"),
        ([1.0, 1.0], [torch.inf, 1.0], r"'x' of .*two\.safetensors holds NaN"),
        ([-3e38, 1.0], [3e38, 1.0], "two.safetensors minus .*one.safetensors holds NaN"),
    ],
)
def test_a_difference_is_finite(
    tmp_path: Path, before: list[float], after: list[float], message: str
) -> None:
    one = opened(tmp_path / "one.safetensors", {"x": torch.tensor(before)})
    two = opened(tmp_path / "two.safetensors", {"x": torch.tensor(after)})
    with pytest.raises(IncompatibleWeights, match=message):
        values(difference(one, two))


def test_large_values_are_finite_although_their_sum_is_not(tmp_path: Path) -> None:
    one = opened(tmp_path / "one.safetensors", {"x": torch.zeros(4)})
    two = opened(tmp_path / "two.safetensors", {"x": torch.full((4,), 3e38)})
    assert values(difference(one, two))["x"].max() == np.float32(3e38)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b.weight": None}, "do not have the same parameters: 1 only in .*one.* 'b.weight'"),
        ({"new": noise(2), "old": noise(2)}, r"2 only in .*two\.safetensors \(first: 'new'\)"),
        ({"b.weight": noise(4, 3)}, r"\(2, 3\) in .* and \(4, 3\) in .*rows are a vocabulary"),
        ({"b.weight": noise(3, 2)}, "use checkpoints of one architecture"),
        ({"a": noise(4).bfloat16()}, "use checkpoints of one architecture"),
        ({"a": noise(5)}, "'a' is BF16 in .* and F32 in .*; store both in one dtype"),
        ({"count": torch.tensor([3, 5])}, r"1 tensors that are not edited differ .*'count', I64"),
        ({"flag": torch.tensor([True, True])}, "'flag', BOOL"),
        ({"wide": noise(2, seed=1).double()}, "'wide', F64.*or edit them too, as one of F32"),
        ({"eight": noise(3, seed=1).to(torch.float8_e4m3fn)}, "'eight', F8_E4M3"),
    ],
    ids=range(10),
)
def test_a_vector_that_would_lose_something_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    one = opened(tmp_path / "one.safetensors", small())
    state = {name: part for name, part in {**small(), **changes}.items() if part is not None}
    with pytest.raises(IncompatibleWeights, match=message):
        difference(one, opened(tmp_path / "two.safetensors", state))


def test_only_what_is_edited_may_differ(tmp_path: Path) -> None:
    one = opened(tmp_path / "one.safetensors", small())
    two = opened(tmp_path / "two.safetensors", {**small(), "a": noise(5, seed=1).bfloat16()})
    assert list(difference(one, two, ["a"]).shapes) == ["a"]
    with pytest.raises(
        IncompatibleWeights, match="1 tensors that are not edited differ.*'a', BF16"
    ):
        difference(one, two, ["b.weight"])
    with pytest.raises(IncompatibleWeights, match="'count' of .* is I64; a vector is made of F32"):
        difference(one, two, ["a", "count"])
    with pytest.raises(IncompatibleWeights, match="the edited parameter 'no' is not in"):
        difference(one, two, ["a", "no"])
    whole = opened(tmp_path / "whole.safetensors", {"n": torch.tensor([1])})
    with pytest.raises(IncompatibleWeights, match="there is nothing to edit"):
        difference(whole, whole)


def test_a_frozen_tensor_of_many_pieces_is_compared_to_its_end(tmp_path: Path) -> None:
    many = torch.arange(headers.PIECE // 4 + 9, dtype=torch.int32)
    one = opened(tmp_path / "one.safetensors", {"x": noise(2), "many": many})
    many[-1] += 1
    two = opened(tmp_path / "two.safetensors", {"x": noise(2), "many": many})
    with pytest.raises(IncompatibleWeights, match="1 tensors that are not edited"):
        difference(one, two)
    many[0] += 1
    three = opened(tmp_path / "three.safetensors", {"x": noise(2), "many": many})
    with pytest.raises(IncompatibleWeights, match="1 tensors that are not edited"):
        difference(one, three)
    assert not same_bytes(one.tensors["many"], two.tensors["many"])
    assert not same_bytes(one.tensors["many"], one.tensors["x"])


WORDS, HEAD = "embed.weight", "lm_head.weight"


def stored_once(path: Path, table: Tensor) -> Mapped:
    return opened(path.with_suffix(".safetensors"), {WORDS: table, "x": noise(2)})


def stored_twice(path: Path, table: Tensor) -> Mapped:
    return opened(
        path.with_suffix(".safetensors"), {WORDS: table, HEAD: table.clone(), "x": noise(2)}
    )


def pickled(path: Path, table: Tensor) -> Mapped:
    torch.save({WORDS: table, HEAD: table, "x": noise(2)}, path.with_suffix(".pt"))
    return open_weights(path.with_suffix(".pt"))


def ours(path: Path, table: Tensor) -> Mapped:
    file = path.with_suffix(".safetensors")
    checkpoints.save(file, {WORDS: table, HEAD: table, "x": noise(2)}, "checkpoint")
    return open_weights(file)


WAYS = [stored_once, stored_twice, pickled, ours]


@pytest.mark.parametrize("after", WAYS)
@pytest.mark.parametrize("before", WAYS)
def test_tied_tensors_may_be_stored_in_any_way(
    tmp_path: Path,
    before: Callable[[Path, Tensor], Mapped],
    after: Callable[[Path, Tensor], Mapped],
) -> None:
    old, new = noise(5, 3), noise(5, 3, seed=1)
    one, two = before(tmp_path / "one", old), after(tmp_path / "two", new)
    vector = difference(one, two)
    assert list(vector.shapes) == list(one.tensors)
    for name, part in values(vector).items():
        np.testing.assert_array_equal(part, new - old if name != "x" else np.zeros(2))
    streaming.apply(one, vector, tmp_path / "edited.safetensors")
    edited = checkpoints.load(tmp_path / "edited.safetensors", "checkpoint").tensors
    assert edited.keys() == one.named.keys()
    for name in edited.keys() - {"x"}:
        torch.testing.assert_close(edited[name], new)


@pytest.mark.parametrize("before", [pickled, ours])
def test_tensors_that_are_tied_no_longer_are_refused(
    tmp_path: Path, before: Callable[[Path, Tensor], Mapped]
) -> None:
    one, state = before(tmp_path / "one", noise(5, 3)), {WORDS: noise(5, 3), "x": noise(2)}
    two = opened(tmp_path / "two.safetensors", {**state, HEAD: noise(5, 3, seed=1)})
    with pytest.raises(IncompatibleWeights, match="are one tensor in .*one.* and two in .*two"):
        difference(one, two)


def test_a_new_tensor_is_no_second_name(tmp_path: Path) -> None:
    one = stored_once(tmp_path / "one", noise(5, 3))
    two = opened(
        tmp_path / "two.safetensors",
        {WORDS: noise(5, 3), HEAD: noise(5, 3, seed=1), "x": noise(2)},
    )
    for pair in ((one, two), (two, one)):
        with pytest.raises(IncompatibleWeights, match="1 only in .*two.*first: 'lm_head.weight'"):
            difference(*pair)


def test_three_names_of_one_tensor(tmp_path: Path) -> None:
    names = ["decoder.weight", "encoder.weight", "shared.weight"]
    one = opened(tmp_path / "one.safetensors", {name: noise(4, 3).clone() for name in names})
    new = noise(4, 3, seed=1)
    two = opened(tmp_path / "two.safetensors", {"shared.weight": new})
    found = values(difference(one, two))
    assert list(found) == names
    assert all(np.array_equal(part, new - noise(4, 3)) for part in found.values())
    untied = {"shared.weight": new, "encoder.weight": noise(4, 3, seed=2)}
    with pytest.raises(IncompatibleWeights, match="are one tensor in .*one.* and two in .*three"):
        difference(one, opened(tmp_path / "three.safetensors", untied))


@pytest.mark.parametrize("same", [torch.ones(4), torch.ones(4, 3), torch.zeros(0, 3), noise(4)])
def test_tensors_that_are_equal_by_chance_are_not_taken_for_one(
    tmp_path: Path, same: Tensor
) -> None:
    one = opened(tmp_path / "one.safetensors", {"a.weight": same, "b.weight": same.clone()})
    two = opened(tmp_path / "two.safetensors", {"a.weight": same})
    with pytest.raises(IncompatibleWeights, match="1 only in .*one.* 'b.weight'"):
        difference(one, two)


def test_aligned_weights_keep_their_label_and_metadata(tmp_path: Path) -> None:
    one, two = stored_twice(tmp_path / "one", noise(5, 3)), ours(tmp_path / "two", noise(5, 3))
    found = aligned(one, two)
    assert (found.label, found.metadata, found.tied) == (two.label, two.metadata, {})
    assert list(found.tensors) == list(one.tensors) == check_alike(one, two)
