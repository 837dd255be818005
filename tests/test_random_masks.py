"""Random lanes follow from seed, label, name and place, however they are cut."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from taskvec.random_masks import bounds, lanes


@given(st.integers(0, 100), st.integers(0, 60), st.integers(0, 60))
def test_any_cut_gives_the_same_lanes(first: int, second: int, third: int) -> None:
    low, middle, high = sorted([first, second, third])
    whole = lanes(3, "a", "w", 0, 120)
    parts = [lanes(3, "a", "w", low, middle), lanes(3, "a", "w", middle, high)]
    assert np.array_equal(np.concatenate(parts), whole[low:high])


def test_lanes_do_not_change_from_one_release_to_the_next() -> None:
    assert lanes(0, "mnist", "visual.proj", 5, 8).tolist() == [2434923030, 3476250298, 2556423173]
    far = lanes(0, "mnist", "visual.proj", 10**11, 10**11 + 2)
    assert far.tolist() == [4102169824, 2338403751]


@given(st.integers(0, 2**44))
def test_a_far_lane_is_found_by_numpy_s_own_jump(start: int) -> None:
    key = hashlib.sha256(b'[0, "mnist", "visual.proj"]').digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    generator.advance(start // 8)
    expected = generator.random_raw(8).astype("<u8").view("<u4")[start % 8 : start % 8 + 5]
    assert np.array_equal(lanes(0, "mnist", "visual.proj", start, start + 5), expected)


def test_seed_label_and_name_each_change_all_lanes() -> None:
    streams = [
        lanes(*key, 0, 64)
        for key in [(0, "a", "w"), (1, "a", "w"), (0, "b", "w"), (0, "a", "v"), (0, "aw", "")]
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert not (one == other).any()


def test_label_and_name_do_not_run_into_one_another() -> None:
    assert lanes(0, "a.b", "c", 0, 4).tolist() != lanes(0, "a", "b.c", 0, 4).tolist()
    assert lanes(0, 'a", "b', "c", 0, 4).tolist() != lanes(0, "a", 'b", "c', 0, 4).tolist()


@given(st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.999]), st.integers(0, 2**40))
def test_a_share_of_the_lanes_is_below_a_bound(probability: float, seed: int) -> None:
    number = 1 << 14
    below = (lanes(seed, "a", "w", 0, number) < bounds(probability)).mean()
    assert abs(below - probability) < 7 * np.sqrt(probability * (1 - probability) / number)


def test_bounds_stay_within_32_bits() -> None:
    assert bounds([0.0, 0.5, 1.0]).tolist() == [0, 1 << 31, (1 << 32) - 1]
    assert bounds(0.25).dtype == np.uint32
