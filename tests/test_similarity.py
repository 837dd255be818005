"""Cosines of vectors, whole and layer by layer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from taskvec.lazy import Held, combination
from taskvec.similarity import cosines, cosines_by_layer

NAMES = ("conv.w", "blocks.0.w", "blocks.1.w")


@st.composite
def vectors(draw: st.DrawFn) -> Held:
    elements = st.floats(-4, 4, width=16)
    return Held({name: draw(arrays.arrays(np.float32, (5,), elements=elements)) for name in NAMES})


def flat(vector: Held, names: tuple[str, ...] = NAMES) -> np.ndarray:
    return np.concatenate([vector.block(name, 0, 5) for name in names]).astype(np.float64)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    scale = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / scale) if scale else 0.0


@settings(deadline=None, max_examples=40)
@given(vectors(), vectors(), vectors())
def test_the_matrix_holds_the_cosine_of_every_pair(a: Held, b: Held, c: Held) -> None:
    named = {"a": a, "b": b, "c": c}
    found = cosines(named)
    assert list(found.index) == list(found.columns) == ["a", "b", "c"]
    for left in named:
        for right in named:
            wanted = 1.0 if left == right else cosine(flat(named[left]), flat(named[right]))
            assert found.loc[left, right] == pytest.approx(wanted, abs=1e-12)
    layers = cosines_by_layer(named)
    assert list(layers.index) == ["layer 0", "layer 1", "outside blocks"]
    assert list(layers.columns) == ["a, b", "a, c", "b, c"]
    for row, names in zip(layers.index, (NAMES[1:2], NAMES[2:], NAMES[:1]), strict=True):
        wanted = cosine(flat(a, names), flat(c, names))
        assert layers.loc[row, "a, c"] == pytest.approx(wanted, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(vectors(), st.floats(0.25, 4))
def test_a_factor_changes_the_sign_at_most(vector: Held, factor: float) -> None:
    named = {"v": vector, "plus": combination([(vector, factor)])}
    named["minus"] = combination([(vector, -factor)])
    found = cosines(named)
    some = bool(flat(vector).any())
    assert found.loc["v", "plus"] == pytest.approx(float(some))
    assert found.loc["v", "minus"] == pytest.approx(-float(some))


def test_a_vector_of_zeros_is_like_nothing() -> None:
    zero, one = (Held({"w": np.full(3, value, np.float32)}) for value in (0, 1))
    assert cosines({"zero": zero, "one": one}).loc["zero", "one"] == 0
