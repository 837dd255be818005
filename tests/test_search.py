"""The search's decision: values in, decision out."""

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from taskvec.params import Constraint, Objective, Range
from taskvec.search import Candidate, Reference, decide, feasible, grid, objective_value

NAN = float("nan")
REFERENCES = {
    "new": Reference(pretrained=0.4, finetuned=0.8),
    "old": Reference(pretrained=0.5, finetuned=1.0),
}
LEARN = Objective(maximize="accuracy", tasks=["new"])
FORGET = Objective(minimize="accuracy", tasks=["new"])
KEEP = Constraint(tasks=["old"], min_ratio=0.9)
SHARES = st.sampled_from([0.0, 0.1, 0.44, 0.45, 0.46, 0.5, 0.9, 1.0])


def curve(new: Sequence[float], old: Sequence[float] | None = None) -> list[Candidate]:
    """Return candidates whose coefficient is 0, 0.1, 0.2 and so on."""
    controls = old or [0.5] * len(new)
    return [
        Candidate({"c": i / 10}, {"new": a, "old": b})
        for i, (a, b) in enumerate(zip(new, controls, strict=True))
    ]


def chosen(
    candidates: Sequence[Candidate],
    objective: Objective = LEARN,
    constraint: Constraint | None = None,
    select: str = "best",
) -> Mapping[str, float]:
    return candidates[decide(candidates, objective, constraint, select, REFERENCES)].coefficients


@st.composite
def searches(draw: st.DrawFn) -> list[Candidate]:
    """Return candidates on a grid of two coefficients; accuracies are equal often, or NaN."""
    values = [-0.5, 0.0, 0.5, 1.0]
    places = draw(st.lists(st.sampled_from([*product(values, values)]), min_size=1, unique=True))
    share = SHARES | st.just(NAN)
    return [
        Candidate({"a": a, "b": b}, {"new": draw(share), "old": draw(share)}) for a, b in places
    ]


RULES = st.sampled_from(
    [(objective, constraint, select)
     for objective in (LEARN, FORGET, Objective(maximize="normalized_accuracy", tasks=["new"]))
     for constraint, select in ((None, "best"), (KEEP, "best"), (KEEP, "largest"))]
)  # fmt: skip


@given(searches(), RULES, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(
    candidates: list[Candidate], rule: tuple[Objective, Constraint | None, str], random: object
) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen(candidates, *rule) == chosen(shuffled, *rule)


@given(
    st.lists(
        st.builds(
            Candidate,
            st.fixed_dictionaries({"c": st.sampled_from([0.0, 0.5])}),
            st.fixed_dictionaries({"new": SHARES, "old": SHARES}),
            st.fixed_dictionaries(
                {"ties.density": st.sampled_from([0.2, 1.0]), "x.way": st.sampled_from("ab")}
            ),
        ),
        min_size=1,
        unique_by=lambda item: (item.coefficients["c"], *sorted(item.choice.items())),
    ),
    RULES,
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_options_does_not_matter_either(
    candidates: list[Candidate], rule: tuple[Objective, Constraint | None, str], random: object
) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (found[decide(found, *rule, REFERENCES)] for found in (candidates, shuffled))
    assert one == other


def test_ties_between_options_go_to_the_text_that_comes_first() -> None:
    same = {"new": 0.7, "old": 0.5}
    candidates = [Candidate({"c": c}, same, {"p": p}) for c in (0.5, 0.2) for p in (0.9, 0.5)]
    assert candidates[decide(candidates, LEARN, None, "best", REFERENCES)] == candidates[3]
    better = [*candidates, Candidate({"c": 1.0}, {"new": 0.8, "old": 0.5}, {"p": 0.9})]
    assert better[decide(better, LEARN, None, "best", REFERENCES)] == better[4]


@given(searches(), RULES)
def test_nothing_allowed_beats_what_is_chosen(
    candidates: list[Candidate], rule: tuple[Objective, Constraint | None, str]
) -> None:
    objective, constraint, select = rule
    winner = candidates[decide(candidates, objective, constraint, select, REFERENCES)]
    known = [c for c in candidates if all(value == value for value in c.accuracy.values())]
    allowed = [c for c in known if feasible(c, constraint, REFERENCES)]
    assume(allowed)
    assert winner in allowed
    sign = 1 if objective.maximize else -1
    for other in allowed:
        if select == "largest":
            assert size(other) <= size(winner)
        else:
            gain = sign * (value_of(other, objective) - value_of(winner, objective))
            assert gain < 0 or (gain == 0 and size(other) >= size(winner))


@given(searches(), RULES)
def test_nan_never_wins(
    candidates: list[Candidate], rule: tuple[Objective, Constraint | None, str]
) -> None:
    winner = candidates[decide(candidates, *rule, REFERENCES)]
    if any(value != value for value in winner.accuracy.values()):
        assert all(any(v != v for v in c.accuracy.values()) for c in candidates)


@given(searches(), st.sampled_from(["best", "largest"]))
def test_where_nothing_is_allowed_the_smallest_edit_is_taken(
    candidates: list[Candidate], select: str
) -> None:
    impossible = Constraint(tasks=["old"], min_ratio=100.0)
    winner = candidates[decide(candidates, LEARN, impossible, select, REFERENCES)]
    known = [c for c in candidates if all(value == value for value in c.accuracy.values())]
    assert size(winner) == min(size(c) for c in known or candidates)


def size(candidate: Candidate) -> float:
    return sum(abs(value) for value in candidate.coefficients.values())


def value_of(candidate: Candidate, objective: Objective) -> float:
    return objective_value(candidate, objective, REFERENCES)


def test_best_takes_the_largest_or_the_smallest_accuracy() -> None:
    candidates = curve([0.4, 0.6, 0.7, 0.3])
    assert chosen(candidates, LEARN) == {"c": 0.2}
    assert chosen(candidates, FORGET) == {"c": 0.3}


def test_a_constraint_excludes_and_its_bound_is_allowed() -> None:
    candidates = curve([0.4, 0.6, 0.7, 0.9], old=[0.5, 0.46, 0.45, 0.44])
    assert chosen(candidates, LEARN, KEEP) == {"c": 0.2}
    assert not feasible(candidates[3], KEEP, REFERENCES)


def test_best_and_largest_differ_where_forgetting_is_not_monotone() -> None:
    # forgetting is deepest at 0.2; the control task recovers at 0.5 and is lost at 0.6
    candidates = curve(
        [0.4, 0.2, 0.1, 0.15, 0.2, 0.3, 0.0], old=[0.5, 0.5, 0.48, 0.3, 0.3, 0.47, 0.1]
    )
    assert chosen(candidates, FORGET, KEEP, "best") == {"c": 0.2}
    assert chosen(candidates, FORGET, KEEP, "largest") == {"c": 0.5}


def test_ties_go_to_the_smaller_edit_whatever_its_sign() -> None:
    candidates = [
        Candidate({"c": c}, {"new": 0.7, "old": 0.5}) for c in (-1.0, -0.5, 0.6, 1.0)
    ]  # fmt: skip
    assert chosen(candidates) == {"c": -0.5}
    both = [Candidate({"a": a, "b": b}, {"new": 0.7}) for a, b in ((0.5, 0.2), (0.2, 0.5))]
    assert chosen(both) == {"a": 0.2, "b": 0.5}


def test_largest_means_the_largest_size_of_a_negative_coefficient() -> None:
    candidates = [Candidate({"c": c}, {"new": 0.1, "old": 0.5}) for c in (-1.0, -0.5, 0.0)]
    assert chosen(candidates, FORGET, KEEP, "largest") == {"c": -1.0}


@pytest.mark.parametrize("task", ["new", "old"])
@pytest.mark.parametrize("select", ["best", "largest"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_in_any_place_loses(task: str, select: str, place: int) -> None:
    for objective in (LEARN, FORGET):
        candidates = curve([0.5, 0.5, 0.5])
        candidates[place].accuracy[task] = NAN  # type: ignore[index]
        assert chosen(candidates, objective, KEEP, select) != {"c": place / 10}
    everything = curve([NAN] * 3, old=[NAN] * 3)
    assert chosen(everything, LEARN, KEEP, select) == {"c": 0.0}


def test_golden_values_of_the_objective() -> None:
    candidate = Candidate({"c": 1.0}, {"new": 0.6, "old": 0.5})
    both = ["new", "old"]
    mean = Objective(maximize="accuracy", tasks=both)
    normalized = Objective(minimize="normalized_accuracy", tasks=both)
    assert objective_value(candidate, mean, REFERENCES) == pytest.approx(0.55)
    assert objective_value(candidate, normalized, REFERENCES) == pytest.approx(0.625)


def test_the_last_name_varies_fastest_and_both_ends_are_exact() -> None:
    ranges = {
        "b": Range(low=0, high=1, points=2),
        "a": Range(low=-0.1, high=0.3, points=3),
    }  # fmt: skip
    points = grid(ranges)
    assert [(p["a"], p["b"]) for p in points] == [
        (-0.1, 0.0), (-0.1, 1.0), (0.1, 0.0), (0.1, 1.0), (0.3, 0.0), (0.3, 1.0),
    ]  # fmt: skip
    assert [list(p) for p in points] == [["a", "b"]] * 6


def test_the_grid_of_the_paper() -> None:
    points = [p["c"] for p in grid({"c": Range(low=0, high=1, points=21)})]
    assert points == [round(0.05 * i, 2) for i in range(21)]


@given(
    st.floats(-10, 10, allow_subnormal=False), st.floats(0.01, 10), st.integers(2, 50)
)  # fmt: skip
def test_a_range_is_ascending_between_its_exact_ends(low: float, width: float, n: int) -> None:
    values = [p["c"] for p in grid({"c": Range(low=low, high=low + width, points=n)})]
    assert (values[0], values[-1], len(values)) == (low, low + width, n)
    assert values == sorted(set(values))
