"""Blocks are read from whole components of a name, never from parts of a word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.layers import CONTAINERS, layer_of, places


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("visual.transformer.resblocks.11.attn.in_proj_weight", 11),
        ("vision_model.encoder.layers.3.self_attn.k_proj.weight", 3),
        ("bert.encoder.layer.7.output.dense.weight", 7),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("encoder.block.5.layer.1.DenseReluDense.wi.weight", 5),
        ("visual.trunk.blocks.6.0.conv_pw.weight", 6),
        ("resblocks.7.ln.0.w", 7),
        ("layers.12", 12),
        ("mlp.0.weight", None),
        ("layer1.0.conv1.weight", None),
        ("sublayers.3.w", None),
        ("layers.3a.w", None),
        ("layers.\u0663.w", None),
        ("layers.norm.2.w", None),
        ("logit_scale", None),
        ("", None),
    ],
)
def test_the_layer_of_a_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_each_stack_has_its_own_depth() -> None:
    names = [
        "visual.transformer.resblocks.0.w",
        "visual.transformer.resblocks.11.w",
        "transformer.resblocks.5.w",
        "token_embedding.weight",
    ]
    assert places(names) == {names[0]: (0, 12), names[1]: (11, 12), names[2]: (5, 6)}


WORDS = st.sampled_from(["visual", "0", "7", "ln", "w", "resblock", *sorted(CONTAINERS)])


@given(st.lists(st.lists(WORDS, min_size=1, max_size=6).map(".".join), max_size=8))
def test_places_and_layer_of_agree(names: list[str]) -> None:
    found = places(names)
    for name in names:
        layer = layer_of(name)
        assert (name in found) == (layer is not None)
        if layer is not None:
            assert found[name].layer == layer < found[name].depth
