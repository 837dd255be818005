"""Adapters as task vectors: the vector is scale * B @ A, and nothing of an adapter is ignored."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taskvec import checkpoints, lazy, lora, mergekit, streaming
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.lazy import Lazy, combination
from taskvec.lora import CONFIG, open_adapter, vector_from
from taskvec.mapped import Mapped, open_weights
from tests.test_lazy import equal_bytes, values

GOLDEN = Path(__file__).parent / "golden" / "peft"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
law = settings(deadline=None, max_examples=60)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(directory: Path, tensors: Mapping[str, Tensor], **options: Any) -> Path:
    """Return a directory with an adapter, as peft names its tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps({**PLAIN, **options}))
    named = {f"base_model.model.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    return directory


def pair(module: str, out: int, into: int, rank: int = 2, seed: int = 1) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": noise(rank, into, seed=seed),
        f"{module}.lora_B.weight": noise(out, rank, seed=seed + 1),
    }


def base_of(directory: Path, tensors: Mapping[str, Tensor]) -> Mapped:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / "model.safetensors")
    return open_weights(directory)


def tensors_of(vector: Lazy) -> dict[str, Tensor]:
    return {name: torch.from_numpy(part) for name, part in values(vector).items()}


def refused(directory: Path, base: Mapped) -> str:
    with pytest.raises(IncompatibleWeights) as caught:
        open_adapter(directory, base)
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Mapped:
    return base_of(tmp_path / "base", {"a.weight": noise(4, 3), "a.bias": noise(4), "b": noise(5)})


def test_an_adapter_of_peft_is_what_peft_merges() -> None:
    """The files were written by peft 0.21.2: save_pretrained, and merge_and_unload.

    Linear, Conv1D, Conv2d and Embedding modules, patterns of ranks and alphas, rsLoRA, biases and
    whole modules; as peft saved it, fan_in_fan_out is true although most matrices lie as usual.
    """
    base, merged = (
        open_weights(GOLDEN / "base.safetensors"),
        load_file(GOLDEN / "merged.safetensors"),
    )
    vector = tensors_of(vector_from(GOLDEN, base))
    before = load_file(GOLDEN / "base.safetensors")
    for name, after in merged.items():
        torch.testing.assert_close(before[name] + vector[name], after, rtol=1e-6, atol=1e-6)
        assert not torch.equal(before[name], after)


Module = tuple[nn.Module, dict[str, Tensor], Callable[[Tensor], Tensor], Tensor]


def linear(rank: int, dtype: torch.dtype, sizes: tuple[int, int]) -> Module:
    into, out = sizes
    a, b = noise(rank, into, seed=2, dtype=dtype), noise(out, rank, seed=3, dtype=dtype)
    module = nn.Linear(into, out)
    factors = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    return module, factors, lambda x: x @ a.float().T @ b.float().T, noise(3, into, seed=4)


def table(rank: int, dtype: torch.dtype, sizes: tuple[int, int]) -> Module:
    words, width = sizes
    a, b = noise(rank, words, seed=2, dtype=dtype), noise(width, rank, seed=3, dtype=dtype)
    factors = {"m.lora_embedding_A": a, "m.lora_embedding_B": b}
    asked = torch.arange(words)
    return nn.Embedding(words, width), factors, lambda x: a.float().T[x] @ b.float().T, asked


def convolution(rank: int, dtype: torch.dtype, sizes: tuple[int, int]) -> Module:
    into, out = sizes
    axes, kernel = 1 + into % 3, 1 + out % 2
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    module = kind(into, out, kernel, stride=2, padding=1)
    inner = kind(into, rank, kernel, stride=2, padding=1, bias=False).to(dtype)
    outer = kind(rank, out, 1, bias=False).to(dtype)
    factors = {"m.lora_A.weight": inner.weight, "m.lora_B.weight": outer.weight}
    inner, outer = inner.float(), outer.float()
    return module, factors, lambda x: outer(inner(x)), noise(2, into, *[4] * axes, seed=4)


@law
@given(
    st.sampled_from([linear, table, convolution]),
    st.integers(1, 9),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    DTYPES,
    st.sampled_from([0.5, 1, 3]),
    st.booleans(),
)
@torch.no_grad()
def test_the_edited_module_computes_what_module_and_adapter_compute(
    tmp_path_factory: pytest.TempPathFactory,
    kind: Callable[..., Module],
    rank: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    alpha: float,
    rooted: bool,
) -> None:
    path = tmp_path_factory.mktemp("law")
    module, factors, path_of, x = kind(rank, dtype, sizes)
    state = {f"m.{name}": value.data for name, value in module.state_dict().items()}
    base = base_of(path, state)
    factors = {name: value.data for name, value in factors.items()}
    adapter = written(path / "x", factors, r=rank, lora_alpha=alpha, use_rslora=rooted)
    vector = open_adapter(adapter, base)
    plain = module(x)
    module.load_state_dict({n[2:]: state[n] + part for n, part in tensors_of(vector).items()})
    scale = alpha / (rank**0.5 if rooted else rank)
    torch.testing.assert_close(module(x), plain + scale * path_of(x), rtol=1e-4, atol=1e-4)
    for block in (1, 7):
        with lazy.workers(3):
            assert equal_bytes(values(vector, block), values(vector))


@law
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_opposite_weights_cancel_and_others_do_not_mix(
    tmp_path_factory: pytest.TempPathFactory, rank: int, into: int, out: int
) -> None:
    path = tmp_path_factory.mktemp("law")
    base = base_of(path, {"m.weight": noise(out, into)})
    one = written(path / "1", pair("m", out, into, rank), r=rank, lora_alpha=rank)
    two = written(path / "2", pair("m", out, into, rank, 7), r=rank, lora_alpha=rank)
    first, second = open_adapter(one, base), open_adapter(two, base)
    nothing = combination([(first, 1.0), (open_adapter(one, base), -1.0)])
    assert not tensors_of(nothing)["m.weight"].any()
    a, b = pair("m", out, into, rank).values()
    c, d = pair("m", out, into, rank, 7).values()
    found = tensors_of(combination([(first, 1.0), (second, -1.0)]))["m.weight"]
    torch.testing.assert_close(found, b @ a - d @ c, rtol=1e-5, atol=1e-5)


def test_a_product_has_the_same_bytes_in_blocks_that_do_not_fit_the_cache(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"m.weight": torch.zeros(300, 500), "n.weight": torch.zeros(500, 300)})
    tensors = {**pair("m", 300, 500), **pair("n", 300, 500, seed=5)}
    vector = open_adapter(written(tmp_path / "x", tensors), base)
    assert [vector.grain("m.weight"), vector.grain("n.weight")] == [500, 300]
    for name in vector.shapes:
        whole = vector.block(name, 0, vector.size(name))
        assert np.array_equal(whole, values(vector, 1000)[name].ravel())
        with lazy.workers(4):
            assert np.array_equal(whole, values(vector)[name].ravel())


def test_what_has_no_adapter_does_not_change(tmp_path: Path, base: Mapped) -> None:
    vector = tensors_of(open_adapter(written(tmp_path / "x", pair("a", 4, 3)), base))
    assert vector.keys() == {"a.weight", "a.bias", "b"}
    assert not vector["b"].any()
    assert not vector["a.bias"].any()
    assert vector["a.weight"].all()


def test_patterns_match_ends_of_names_and_the_first_counts(tmp_path: Path) -> None:
    modules = ["h.0.q", "h.1.q", "h.1.seq", "h.0.v"]
    ranks = [1, 3, 2, 2]
    alphas = [8, 8, 5, 7]
    base = base_of(tmp_path, {f"{module}.weight": torch.zeros(4, 3) for module in modules})
    tensors = [pair(module, 4, 3, rank) for module, rank in zip(modules, ranks, strict=True)]
    directory = written(
        tmp_path / "x",
        {name: value for part in tensors for name, value in part.items()},
        lora_alpha=5,
        rank_pattern={r"h\.0\.q": 1, "q": 3, "0.q": 9},
        alpha_pattern={"q": 8, "^h.0.v$": 7},
    )
    vector = tensors_of(open_adapter(directory, base))
    for module, rank, alpha, part in zip(modules, ranks, alphas, tensors, strict=True):
        a, b = part.values()
        torch.testing.assert_close(vector[f"{module}.weight"], alpha / rank * (b @ a))


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_lies_as_fan_in_fan_out_says(tmp_path: Path, flag: bool) -> None:
    base = base_of(tmp_path, {"m.weight": torch.zeros(3, 3)})
    tensors = pair("m", 3, 3)
    directory = written(tmp_path / "x", tensors, fan_in_fan_out=flag, lora_alpha=2)
    a, b = tensors.values()
    found = tensors_of(open_adapter(directory, base))["m.weight"]
    torch.testing.assert_close(found, (b @ a).T if flag else b @ a)


def test_a_square_is_refused_if_its_neighbours_lie_the_other_way(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"m.weight": torch.zeros(3, 3), "n.weight": torch.zeros(4, 3)})
    tensors = {**pair("m", 3, 3), **pair("n", 3, 4)}
    assert "not known which way 'm.weight'" in refused(written(tmp_path / "x", tensors), base)
    flagged = written(tmp_path / "y", tensors, fan_in_fan_out=True)
    assert tensors_of(open_adapter(flagged, base))["n.weight"].all()


def test_whole_tensors_count_as_their_difference(tmp_path: Path, base: Mapped) -> None:
    before = load_file(base_path(base))
    after = {"a.base_layer.bias": noise(4, seed=9), "b": noise(5, seed=8).bfloat16()}
    directory = written(tmp_path / "x", {**pair("a", 4, 3), **after}, lora_alpha=2)
    vector = tensors_of(open_adapter(directory, base))
    torch.testing.assert_close(vector["a.bias"], after["a.base_layer.bias"] - before["a.bias"])
    torch.testing.assert_close(vector["b"], after["b"].float() - before["b"])


def base_path(base: Mapped) -> Path:
    return Path(base.label)


def test_a_saved_matrix_and_its_product_add_up(tmp_path: Path, base: Mapped) -> None:
    before, saved = load_file(base_path(base))["a.weight"], noise(4, 3, seed=9)
    tensors = pair("a", 4, 3)
    directory = written(tmp_path / "x", {**tensors, "a.base_layer.weight": saved}, lora_alpha=2)
    a, b = tensors.values()
    found = tensors_of(open_adapter(directory, base))["a.weight"]
    torch.testing.assert_close(found, b @ a + saved - before)


def test_the_bias_of_a_factor_is_scaled_like_the_product(tmp_path: Path, base: Mapped) -> None:
    tensors = {**pair("a", 4, 3), "a.lora_B.bias": noise(4, seed=9)}
    directory = written(tmp_path / "x", tensors, lora_bias=True)
    found = tensors_of(open_adapter(directory, base))["a.bias"]
    torch.testing.assert_close(found, 3 * noise(4, seed=9))


def test_names_of_adapters_are_taken_off(tmp_path: Path, base: Mapped) -> None:
    base = base_of(
        tmp_path / "m", {"a.weight": noise(4, 3), "e.weight": noise(6, 3), "b.x": noise(5)}
    )
    named = {
        "a.lora_A.mine.weight": noise(2, 3),
        "a.lora_B.mine.weight": noise(4, 2),
        "e.lora_embedding_A.mine": noise(2, 6),
        "e.lora_embedding_B.mine": noise(3, 2),
        "b.modules_to_save.mine.x": noise(5, seed=3),
    }
    plain = {
        name.replace(".modules_to_save", "").replace(".mine", ""): named[name] for name in named
    }
    one = open_adapter(written(tmp_path / "x", named), base)
    two = open_adapter(written(tmp_path / "y", plain), base)
    assert equal_bytes(values(one), values(two))
    two_adapters = {**named, "b.modules_to_save.other.y": noise(5)}
    message = refused(written(tmp_path / "x", two_adapters), base)
    assert "holds several adapters (mine, other)" in message
    unnamed = {"a.lora_A.weight": noise(2, 3), "a.lora_B.mine.weight": noise(4, 2)}
    assert "(mine, one without a name)" in refused(written(tmp_path / "z", unnamed), base)


@pytest.mark.parametrize(
    ("names", "adapted"),
    [
        (["h.0.weight", "h.1.weight"], ["transformer.h.0", "transformer.h.1"]),
        (["bert.h.0.weight", "bert.h.1.weight", "cls.weight"], ["h.0", "h.1"]),
    ],
)
def test_names_may_differ_by_one_leading_part(
    tmp_path: Path, names: list[str], adapted: list[str]
) -> None:
    base = base_of(tmp_path, {name: noise(4, 3) for name in names})
    tensors = {name: part for module in adapted for name, part in pair(module, 4, 3).items()}
    vector = tensors_of(open_adapter(written(tmp_path / "x", tensors), base))
    assert all(vector[name].all() for name in names[:2])


def test_a_leading_part_is_not_guessed_among_several(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"text.h.weight": noise(4, 3), "vision.h.weight": noise(4, 3)})
    assert "changes 'h.weight'" in refused(written(tmp_path / "x", pair("h", 4, 3)), base)


def test_names_that_have_nothing_in_common_with_the_base_are_refused(
    tmp_path: Path, base: Mapped
) -> None:
    tensors = {**pair("x.c", 4, 3), **pair("y.d", 4, 3)}
    assert "changes 'x.c.weight'" in refused(written(tmp_path / "x", tensors), base)


def test_a_file_without_the_prefix_of_peft_is_read(tmp_path: Path, base: Mapped) -> None:
    directory = written(tmp_path / "x", pair("a", 4, 3))
    save_file(pair("a", 4, 3), directory / "adapter_model.safetensors")
    expected = open_adapter(written(tmp_path / "y", pair("a", 4, 3)), base)
    assert equal_bytes(values(open_adapter(directory, base)), values(expected))


def test_a_file_of_torch_is_read(tmp_path: Path, base: Mapped) -> None:
    tensors = pair("a", 4, 3)
    expected = open_adapter(written(tmp_path / "y", tensors), base)
    directory = written(tmp_path / "x", tensors)
    (directory / "adapter_model.safetensors").unlink()
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    torch.save(named, directory / "adapter_model.bin")
    assert equal_bytes(values(open_adapter(directory, base)), values(expected))
    assert equal_bytes(values(vector_from(directory / "adapter_model.bin", base)), values(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'; only LORA"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "use_dora is set: its product is scaled by the norms"),
        ({"trainable_token_indices": [1]}, "replaces rows of an embedding"),
        ({"target_parameters": ["a.weight"]}, "do not say which parameters"),
        ({"layer_replication": [[0, 1]]}, "more layers than its base"),
        ({"brand_new_option": 1}, "brand_new_option is set: this option is not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weights"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes the base weights"),
        ({"r": 0}, "rank 0; expected a whole number above 0"),
        ({"r": None}, "rank None"),
        ({"r": True}, "rank True"),
        ({"rank_pattern": {"a": 2.5}}, "rank 2.5"),
        ({"lora_alpha": "6"}, "lora_alpha '6'; expected a number"),
        ({"alpha_pattern": {"a": float("nan")}}, "lora_alpha nan"),
        ({"alpha_pattern": ["a"]}, "must be mappings"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is no pattern"),
        ({"alpha_pattern": {"(?i)a": 2}}, "is no pattern"),
    ],
    ids=str,
)
def test_options_that_would_change_the_vector_are_refused(
    tmp_path: Path, base: Mapped, options: dict[str, Any], message: str
) -> None:
    directory = written(tmp_path / "x", pair("a", 4, 3), **options)
    with pytest.raises(IncompatibleWeights, match=message):
        open_adapter(directory, base)


def test_options_that_matter_in_training_only_are_accepted(tmp_path: Path, base: Mapped) -> None:
    options = {name: "something" for name in lora.WITHOUT_EFFECT}
    for start in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        written(tmp_path / "x", pair("a", 4, 3), **options, init_lora_weights=start)
        open_adapter(tmp_path / "x", base)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "malformed JSON"),
        ('{"r": 1, "r": 2}', "a key appears twice"),
        ("[" * 100_000, "malformed JSON"),
        ("3", "peft_type 3"),
    ],
    ids=range(4),
)
def test_malformed_options_are_refused(
    tmp_path: Path, base: Mapped, content: str, message: str
) -> None:
    directory = written(tmp_path / "x", pair("a", 4, 3))
    (directory / CONFIG).write_text(content)
    assert message in refused(directory, base)


def test_missing_files_are_missing_artifacts(tmp_path: Path, base: Mapped) -> None:
    directory = written(tmp_path / "x", pair("a", 4, 3))
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingArtifact, match=r"holds no adapter_model\.safetensors"):
        open_adapter(directory, base)
    with pytest.raises(MissingArtifact, match=r"adapter_config\.json does not exist"):
        open_adapter(tmp_path, base)


A, B = noise(2, 3), noise(4, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.lora_magnitude_vector": A}, "'base_model.model.a.lora_magnitude_vector' is no tensor"),
        ({"a.lora_E": A}, "is no tensor of a plain LoRA adapter"),
        ({"a.lora_A.bias": A}, "is no tensor of a plain LoRA adapter"),
        ({"a.token_adapter.trainable_tokens_delta": A}, "is no tensor of a plain LoRA adapter"),
        ({"a.original_module.weight": A}, "is no tensor of a plain LoRA adapter"),
        ({"a.lora_A.weight": A}, "does not hold both factors, A and B, of 'a'"),
        ({"a.lora_B.bias": noise(4)}, "does not hold both factors"),
        ({"a.lora_A.weight": A, "a.lora_embedding_B": B}, "does not hold both factors"),
        ({"a.lora_A.weight": A.int(), "a.lora_B.weight": B}, "is I32; expected one of F32"),
        (
            {"c.lora_A.weight": A, "c.lora_B.weight": B},
            "changes 'c.weight', which .* does not hold",
        ),
        ({"q.lora_A.weight": A, "q.lora_B.weight": B}, "which is I8 in .* before quantisation"),
        ({"a.lora_A.weight": A[:1], "a.lora_B.weight": B}, r"A \(1, 3\) and B \(4, 2\) of 'a', of"),
        ({"a.lora_A.weight": A, "a.lora_B.weight": B[:3]}, r"of shape \(4, 3\)"),
        ({"a.lora_A.weight": A, "a.lora_B.weight": B[:, :1]}, "of rank 2 by adapter_config.json"),
        ({"a.lora_A.weight": A, "a.lora_B.weight": noise(4, 2, 1)}, "do not make 'a.weight'"),
        ({"a.lora_embedding_A": A, "a.lora_embedding_B": B}, "do not make 'a.weight'"),
        ({"a.lora_A.weight": noise(2), "a.lora_B.weight": B}, "do not make 'a.weight'"),
        ({**pair("v", 5, 3)}, r"do not make 'v.weight' of shape \(5,\)"),
        ({**pair("a", 4, 3), "a.lora_B.bias": noise(3)}, r"\(4,\) in .* and \(3,\)"),
        ({**pair("attn", 9, 3)}, "MultiheadAttention or a part of it"),
        ({**pair("attn.base_layer.out_proj", 3, 3)}, "MultiheadAttention or a part of it"),
        ({"head.weight": A}, "a new head, or the second name"),
        ({"a.weight": noise(5, 3)}, "if its rows are a vocabulary, resize both"),
        ({"a.weight": B, "a.base_layer.weight": B + 1}, "holds 'a.weight' twice"),
        ({"a.bias": noise(4).double()}, "which is F32 in .* and F64 in the adapter"),
        ({"n": torch.tensor([4])}, "which is I64 in .* and I64 in the adapter"),
        ({"t.weight": B}, "changes 't.weight' and not 'u.weight', which are one tensor"),
        ({"t.weight": B, "u.weight": B + 1}, "which are one tensor"),
        ({**pair("t", 4, 2)}, "changes 't.weight' and not 'u.weight', which are one tensor"),
        ({**pair("u", 4, 2)}, "changes 'u.weight' and not 't.weight', which are one tensor"),
    ],
    ids=range(30),
)
def test_nothing_that_does_not_fit_is_skipped(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    tied = noise(4, 2)
    state = {
        "a.weight": noise(4, 3),
        "a.bias": noise(4),
        "attn.in_proj_weight": noise(9, 3),
        "attn.out_proj.weight": noise(3, 3),
        "q.weight": torch.zeros(4, 3, dtype=torch.int8),
        "v.weight": noise(5),
        "n": torch.tensor([3]),
        "t.weight": tied,
        "u.weight": tied,
    }
    torch.save(state, tmp_path / "base.pt")
    directory = written(tmp_path / "x", tensors)
    with pytest.raises(IncompatibleWeights, match=message):
        open_adapter(directory, open_weights(tmp_path / "base.pt"))


def test_names_with_and_without_the_prefix_are_refused(tmp_path: Path, base: Mapped) -> None:
    directory = written(tmp_path / "x", pair("a", 4, 3))
    named = {f"base_model.model.{name}": value for name, value in pair("a", 4, 3).items()}
    save_file({**named, **pair("a", 4, 3)}, directory / "adapter_model.safetensors")
    assert "'a.lora_A.weight' is no tensor of a plain LoRA adapter" in refused(directory, base)


def test_whole_tensors_that_are_no_floats_may_be_there_unchanged(tmp_path: Path) -> None:
    tied = noise(4, 2)
    torch.save({"n": torch.tensor([3]), "t": tied, "u": tied}, tmp_path / "base.pt")
    base = open_weights(tmp_path / "base.pt")
    new = noise(4, 2, seed=1)
    directory = written(tmp_path / "x", {"n": torch.tensor([3]), "t": new, "u": new.clone()})
    found = tensors_of(open_adapter(directory, base))
    assert found.keys() == {"t"}
    torch.testing.assert_close(found["t"], new - tied)


@pytest.mark.parametrize("place", ["lora_A", "lora_B", "whole"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, base: Mapped, place: str) -> None:
    tensors = {**pair("a", 4, 3), "b": noise(5)}
    name = "b" if place == "whole" else f"a.{place}.weight"
    tensors[name].view(-1)[1] = torch.inf
    vector = open_adapter(written(tmp_path / "x", tensors), base)
    with pytest.raises(IncompatibleWeights, match="holds NaN or infinite values"):
        values(vector)


def test_a_product_that_leaves_the_range_is_refused(tmp_path: Path, base: Mapped) -> None:
    tensors = {name: part.sign() * 1e30 for name, part in pair("a", 4, 3).items()}
    vector = open_adapter(written(tmp_path / "x", tensors), base)
    with pytest.raises(IncompatibleWeights, match="'a.weight' of .* holds NaN or infinite values"):
        values(vector)


def test_an_empty_matrix_has_an_empty_product(tmp_path: Path) -> None:
    base = base_of(tmp_path, {"m.weight": torch.zeros(4, 0), "n.weight": torch.zeros(0, 3)})
    tensors = {**pair("m", 4, 0), **pair("n", 0, 3)}
    vector = open_adapter(written(tmp_path / "x", tensors), base)
    assert {name: part.shape for name, part in values(vector).items()} == vector.shapes


def test_an_adapter_edits_a_base_in_shards(tmp_path: Path) -> None:
    state = {"a.weight": noise(4, 3).bfloat16(), "b.weight": noise(4, 3).bfloat16()}
    places = {}
    for name, value in state.items():
        file = f"model-{name[0]}.safetensors"
        save_file({name: value}, tmp_path / file)
        places[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    base = open_weights(tmp_path)
    tensors = pair("b", 4, 3)
    vector = vector_from(written(tmp_path / "adapter", tensors, lora_alpha=2), base)
    streaming.apply(base, vector, tmp_path / "edited.safetensors")
    edited = checkpoints.load(tmp_path / "edited.safetensors", "checkpoint").tensors
    a, b = tensors.values()
    assert torch.equal(edited["a.weight"], state["a.weight"])
    expected = (state["b.weight"].float() + b @ a).bfloat16()
    torch.testing.assert_close(edited["b.weight"], expected, rtol=0.01, atol=0)


def test_a_vector_comes_from_an_adapter_a_checkpoint_or_a_vector(
    tmp_path: Path, base: Mapped
) -> None:
    expected = values(vector_from(written(tmp_path / "x", pair("a", 4, 3)), base))
    vector = vector_from(tmp_path / "x" / "adapter_model.safetensors", base)
    streaming.apply(base, vector, tmp_path / "edited.safetensors")
    edited = open_weights(tmp_path / "edited.safetensors")
    streaming.extract(base, edited, tmp_path / "vector.safetensors")
    found = values(vector_from(tmp_path / "edited.safetensors", base))
    assert equal_bytes(values(vector_from(tmp_path / "vector.safetensors", base)), found)
    np.testing.assert_allclose(found["a.weight"], expected["a.weight"], atol=1e-6)
    for file in ("vector", "edited"):
        assert not lora.is_adapter(tmp_path / f"{file}.safetensors")
    with pytest.raises(IncompatibleWeights, match="starts from the pre-trained weights"):
        vector_from(tmp_path / "vector.safetensors", edited)
    checkpoints.save(tmp_path / "head.safetensors", {"head": noise(3)}, "head")
    with pytest.raises(IncompatibleWeights, match="holds a 'head', expected a checkpoint or"):
        vector_from(tmp_path / "head.safetensors", base)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleWeights, match="holds a LoRA adapter, not a model"):
        open_weights(written(tmp_path / "x", pair("a", 4, 3)))


def test_an_adapter_merges_with_checkpoints_as_a_mergekit_file_says(tmp_path: Path) -> None:
    base = {"a.weight": noise(4, 3), "b.bias": noise(5, seed=9)}
    tuned = {name: value + noise(*value.shape, seed=4) for name, value in base.items()}
    factors = pair("a", 4, 3)
    for name, tensors in (("base", base), ("tuned", tuned)):
        base_of(tmp_path / name, tensors)
    written(tmp_path / "adapter", factors)
    (tmp_path / "both.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\ndtype: float32\nmodels:\n"
        "  - {model: tuned, parameters: {weight: 0.5}}\n"
        "  - {model: adapter, parameters: {weight: 2.0}}\n"
    )
    mergekit.merge(tmp_path / "both.yml", tmp_path / "out.safetensors", warn=pytest.fail)
    found = load_file(tmp_path / "out.safetensors")
    product = 3.0 * factors["a.lora_B.weight"] @ factors["a.lora_A.weight"]
    wanted = base["a.weight"] + 0.5 * (tuned["a.weight"] - base["a.weight"]) + 2.0 * product
    assert torch.allclose(found["a.weight"], wanted, atol=1e-5)
    wanted = base["b.bias"] + 0.5 * (tuned["b.bias"] - base["b.bias"])
    assert torch.allclose(found["b.bias"], wanted, atol=1e-6)
