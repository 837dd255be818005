"""The search: what is asked and paid, what is decided, and how sure that is."""

import time
from collections.abc import Mapping, Sequence
from itertools import product
from math import exp, inf
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from taskvec import bootstrap
from taskvec.answers import Answers
from taskvec.bootstrap import intervals, not_worse, resampled_means
from taskvec.errors import InvalidData, InvalidInput
from taskvec.params import Constraint, Objective, Range
from taskvec.search import (
    Candidate,
    Choice,
    Coefficients,
    Exhausted,
    Goal,
    Level,
    Problem,
    Reference,
    Slope,
    bound,
    combinations,
    decide,
    feasible,
    item_scores,
    objective_value,
    paired_difference,
    slack,
    solve,
)

NAN = float("nan")
ITEMS = 100
REFERENCES = {
    "new": Reference(pretrained=Level(0.4, 2.0), finetuned=Level(0.8, 0.5)),
    "old": Reference(pretrained=Level(0.5, 1.0), finetuned=Level(1.0, 0.1)),
}
LEARN = Objective(maximize="accuracy", tasks=["new"])
FORGET = Objective(minimize="accuracy", tasks=["new"])
KEEP = Constraint(tasks=["old"], min_ratio=0.9)
SHARES = st.sampled_from([0.0, 0.1, 0.44, 0.45, 0.46, 0.5, 0.9, 1.0])


def answers(share: float, loss: float = 1.0) -> Answers:
    """Return answers of which a share in hundredths is correct; NaN makes the losses NaN."""
    correct = np.arange(ITEMS) < round(0 if share != share else share * ITEMS)
    return Answers(correct, np.full(ITEMS, NAN if share != share else loss, np.float32))


def candidate(
    coefficients: Coefficients, accuracy: Mapping[str, float], choice: Choice | None = None,
    *, complete: bool = True, loss: float = 1.0,
) -> Candidate:  # fmt: skip
    found = {task: answers(share, loss) for task, share in accuracy.items()}
    return Candidate(coefficients, choice or {}, found, complete)


def curve(new: Sequence[float], old: Sequence[float] | None = None) -> list[Candidate]:
    """Return candidates whose coefficient is 0, 0.1, 0.2 and so on."""
    controls = old or [0.5] * len(new)
    return [
        candidate({"c": i / 10}, {"new": a, "old": b})
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
        candidate(
            {"a": a, "b": b}, {"new": draw(share), "old": draw(share)}, complete=draw(st.booleans())
        )
        for a, b in places
    ]


RULES = st.sampled_from(
    [(objective, constraint, select)
     for objective in (LEARN, FORGET, Objective(maximize="normalized_accuracy", tasks=["new"]),
                       Objective(minimize="loss", tasks=["new"]))
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
            candidate,
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
    assert (one.coefficients, one.choice) == (other.coefficients, other.choice)


def test_ties_between_options_go_to_the_text_that_comes_first() -> None:
    same = {"new": 0.7, "old": 0.5}
    candidates = [candidate({"c": c}, same, {"p": p}) for c in (0.5, 0.2) for p in (0.9, 0.5)]
    assert decide(candidates, LEARN, None, "best", REFERENCES) == 3
    better = [*candidates, candidate({"c": 1.0}, {"new": 0.8, "old": 0.5}, {"p": 0.9})]
    assert decide(better, LEARN, None, "best", REFERENCES) == 4


@given(searches(), RULES)
def test_nothing_allowed_beats_what_is_chosen(
    candidates: list[Candidate], rule: tuple[Objective, Constraint | None, str]
) -> None:
    objective, constraint, select = rule
    winner = candidates[decide(candidates, objective, constraint, select, REFERENCES)]
    known = [c for c in whole(candidates) if c.known]
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
    if not winner.known:
        assert not any(other.known for other in whole(candidates))


@given(searches(), RULES)
def test_what_was_asked_in_part_never_wins_against_what_is_complete(
    candidates: list[Candidate], rule: tuple[Objective, Constraint | None, str]
) -> None:
    assume(any(c.complete for c in candidates))
    assert candidates[decide(candidates, *rule, REFERENCES)].complete


@given(st.lists(st.integers(-10, 10), min_size=1, unique=True))
def test_a_constant_objective_chooses_the_smallest_edit(tenths: list[int]) -> None:
    candidates = [candidate({"c": x / 10}, {"new": 0.7, "old": 0.5}) for x in tenths]
    for objective in (LEARN, FORGET, Objective(maximize="loss", tasks=["new"])):
        winner = candidates[decide(candidates, objective, KEEP, "best", REFERENCES)]
        assert size(winner) == min(map(size, candidates))


@given(searches(), st.sampled_from(["best", "largest"]))
def test_where_nothing_is_allowed_the_smallest_edit_is_taken(
    candidates: list[Candidate], select: str
) -> None:
    impossible = Constraint(tasks=["old"], min_ratio=100.0)
    winner = candidates[decide(candidates, LEARN, impossible, select, REFERENCES)]
    known = [c for c in whole(candidates) if c.known]
    assert size(winner) == min(size(c) for c in known or whole(candidates))


def whole(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    return [c for c in candidates if c.complete] or candidates


def size(found: Candidate) -> float:
    return sum(abs(value) for value in found.coefficients.values())


def value_of(found: Candidate, objective: Objective) -> float:
    return objective_value(found, objective, REFERENCES)


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
    candidates = [candidate({"c": c}, {"new": 0.7, "old": 0.5}) for c in (-1.0, -0.5, 0.6, 1.0)]
    assert chosen(candidates) == {"c": -0.5}
    both = [candidate({"a": a, "b": b}, {"new": 0.7}) for a, b in ((0.5, 0.2), (0.2, 0.5))]
    assert chosen(both) == {"a": 0.2, "b": 0.5}


def test_largest_means_the_largest_size_of_a_negative_coefficient() -> None:
    candidates = [candidate({"c": c}, {"new": 0.1, "old": 0.5}) for c in (-1.0, -0.5, 0.0)]
    assert chosen(candidates, FORGET, KEEP, "largest") == {"c": -1.0}


@pytest.mark.parametrize("task", ["new", "old"])
@pytest.mark.parametrize("select", ["best", "largest"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_in_any_place_loses(task: str, select: str, place: int) -> None:
    for objective in (LEARN, FORGET):
        candidates = curve([0.5, 0.5, 0.5])
        candidates[place].answers[task] = answers(NAN)  # type: ignore[index]
        assert chosen(candidates, objective, KEEP, select) != {"c": place / 10}
    everything = curve([NAN] * 3, old=[NAN] * 3)
    assert chosen(everything, LEARN, KEEP, select) == {"c": 0.0}


def test_golden_values_of_the_objective() -> None:
    found = candidate({"c": 1.0}, {"new": 0.6, "old": 0.5}, loss=1.5)
    both = ["new", "old"]
    for objective, expected in (
        (Objective(maximize="accuracy", tasks=both), 0.55),
        (Objective(minimize="normalized_accuracy", tasks=both), 0.625),
        (Objective(minimize="loss", tasks=both), 1.5),
    ):
        assert objective_value(found, objective, REFERENCES) == pytest.approx(expected)
        scores = [item_scores(found.answers[t], t, objective, REFERENCES).mean() for t in both]
        assert sum(scores) == pytest.approx(expected)


def test_a_finetuned_model_that_is_never_right_normalises_nothing() -> None:
    never = {"new": Reference(Level(0.4, 1.0), Level(0.0, 9.0))}
    objective = Objective(maximize="normalized_accuracy", tasks=["new"])
    with pytest.raises(InvalidData, match="accuracy 0"):
        objective_value(candidate({"c": 0.0}, {"new": 0.5}), objective, never)


# the pre-trained model has accuracy 0.5 and loss 1 nat on the control task
BOUNDS = [
    ({"min_ratio": 0.9}, 0.45, 1), ({"max_ratio": 1.2}, 0.6, -1), ({"min": 0.3}, 0.3, 1),
    ({"max": 0.7}, 0.7, -1), ({"max_drop": 0.05}, 0.45, 1), ({"max_rise": 0.1}, 0.6, -1),
    ({"metric": "loss", "max_ratio": 1.5}, 1.5, -1), ({"metric": "loss", "max": 2.0}, 2.0, -1),
    ({"metric": "loss", "min_ratio": 0.5}, 0.5, 1), ({"metric": "loss", "max_drop": 0.2}, 0.8, 1),
    ({"metric": "perplexity", "max_rise": 0.5}, exp(1) + 0.5, -1),
    ({"metric": "perplexity", "max_ratio": 2.0}, 2 * exp(1), -1),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "limit", "side"), BOUNDS)
def test_every_bound_allows_itself_and_what_lies_on_its_side(
    rule: dict[str, Any], limit: float, side: int
) -> None:
    constraint = Constraint(tasks=["old"], **rule)
    assert bound(constraint, REFERENCES["old"].pretrained) == (pytest.approx(limit), side)
    for step, allowed in ((-0.05, side < 0), (0.0, True), (0.05, side > 0)):
        value = limit + step
        if constraint.metric == "accuracy":
            found = candidate({"c": 1.0}, {"old": value})
        else:
            loss = np.log(value) if constraint.metric == "perplexity" else value
            answered = Answers(np.ones(4, bool), np.full(4, loss, np.float64))  # type: ignore[arg-type]
            found = Candidate({"c": 1.0}, {}, {"old": answered})
        assert feasible(found, constraint, REFERENCES) == allowed, value
        assert slack(found, constraint, REFERENCES) == pytest.approx(side * step, abs=1e-9)


def test_the_worst_control_task_decides_and_nan_keeps_no_bound() -> None:
    both = Constraint(tasks=["new", "old"], min_ratio=0.9)
    assert slack(candidate({}, {"new": 0.5, "old": 0.4}), both, REFERENCES) == pytest.approx(-0.05)
    assert slack(candidate({}, {"new": 0.5}), None, REFERENCES) == inf
    loss = Constraint(tasks=["old"], metric="perplexity", max=9.0)
    assert not feasible(candidate({}, {"old": NAN}), loss, REFERENCES)
    assert Level(0.5, 800.0).perplexity == inf


def test_the_last_name_varies_fastest_and_both_ends_are_exact() -> None:
    ranges = {
        "b": Range(low=0, high=1, points=2),
        "a": Range(low=-0.1, high=0.3, points=3),
    }  # fmt: skip
    points = combinations(ranges)
    assert [(p["a"], p["b"]) for p in points] == [
        (-0.1, 0.0), (-0.1, 1.0), (0.1, 0.0), (0.1, 1.0), (0.3, 0.0), (0.3, 1.0),
    ]  # fmt: skip
    assert [list(p) for p in points] == [["a", "b"]] * 6


def test_the_grid_of_the_paper() -> None:
    points = [p["c"] for p in combinations({"c": Range(low=0, high=1, points=21)})]
    assert points == [round(0.05 * i, 2) for i in range(21)]


@given(
    st.floats(-10, 10, allow_subnormal=False), st.floats(0.01, 10), st.integers(2, 50)
)  # fmt: skip
def test_a_range_is_ascending_between_its_exact_ends(low: float, width: float, n: int) -> None:
    values = [p["c"] for p in combinations({"c": Range(low=low, high=low + width, points=n)})]
    assert (values[0], values[-1], len(values)) == (low, low + width, n)
    assert values == sorted(set(values))


# A problem: what is asked, recorded and paid

RANGES = {"c": Range(low=-1, high=1, points=5)}
SIZES = {"new": [4, 4, 2], "old": [3]}


class Asked:
    """Answers from a formula, and counts what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, str, int]] = []

    def __call__(self, at: Coefficients, choice: Choice, task: str, chunk: int) -> Answers:
        self.calls.append((at["c"], task, chunk))
        number = SIZES[task][chunk]
        loss = np.full(number, (at["c"] - 0.3) ** 2 + chunk, np.float32)
        return Answers(np.arange(number) % 2 == 0, loss)


def problem(asked: Asked | None = None, *, budget: int | None = None, **goal: Any) -> Problem:
    return Problem(
        ranges=RANGES,
        choices=[{}],
        goal=Goal(**{"objective": LEARN, "references": REFERENCES, **goal}),
        sizes=SIZES,
        ask=asked or Asked(),
        budget=budget,
    )


def test_the_budget_is_the_price_of_the_grid_unless_it_is_set() -> None:
    found = problem()
    assert (found.full_price, found.grid_price, found.limit) == (13, 65, 65)
    assert (found.items, found.chunks) == ({"new": 10, "old": 3}, {"new": 3, "old": 1})
    assert problem(budget=40).limit == 40
    assert found.left == 65 - 13  # what a complete evaluation costs stays


def test_each_point_and_chunk_is_asked_and_paid_once() -> None:
    asked = Asked()
    found = problem(asked)
    small = found.evaluate({"c": 0.5}, {}, 1)
    assert (found.price, small.items, small.complete) == (7, 7, False)
    assert found.evaluate({"c": 0.5}, {}, 1) is small
    middle = found.evaluate({"c": 0.5}, {}, 2)
    assert (found.price, middle.items, middle.complete) == (11, 11, False)
    complete = found.evaluate({"c": 0.5}, {})
    assert found.evaluate({"c": 0.5}, {}, 3) is found.evaluate({"c": 0.5}, {}, 99) is complete
    assert (found.price, complete.items, complete.complete) == (13, 13, True)
    assert len(asked.calls) == len(set(asked.calls)) == 4
    assert found.candidates == [small, middle, complete]
    assert list(complete.answers["new"].loss) == pytest.approx([0.04] * 4 + [1.04] * 4 + [2.04] * 2)


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5]), st.sampled_from([1, 2, 3, None]))))
def test_the_price_is_the_number_of_different_images_asked(
    requests: list[tuple[float, int | None]],
) -> None:
    asked = Asked()
    found = problem(asked, budget=1000)
    for value, chunks in requests:
        found.evaluate({"c": value}, {}, chunks)
    assert len(set(asked.calls)) == len(asked.calls)
    assert found.price == sum(SIZES[task][chunk] for _, task, chunk in asked.calls)
    assert len({(c.coefficients["c"], c.items) for c in found.candidates}) == len(found.candidates)


def test_minus_zero_is_zero() -> None:
    found = problem()
    assert found.evaluate({"c": -0.0}, {}) is found.evaluate({"c": 0.0}, {})
    assert str(found.candidates[0].coefficients["c"]) == "0.0"


def test_a_coefficient_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"c = 1.01 is not in \[-1.0, 1.0\]"):
        problem().evaluate({"c": 1.01}, {})


def test_a_budget_below_one_evaluation_is_refused() -> None:
    assert problem(budget=13).limit == 13
    with pytest.raises(InvalidInput, match="12 image evaluations, but one .* costs 13"):
        problem(budget=12)


@pytest.mark.parametrize("chunks", [1, 2, None])
@pytest.mark.parametrize("budget", [13, 14, 20, 30, 64])
def test_the_budget_is_kept_and_there_is_a_complete_result(budget: int, chunks: int | None) -> None:
    def strategy(found: Problem) -> None:
        for value in np.linspace(-1, 1, 50):
            found.evaluate({"c": float(value)}, {}, chunks)

    found = problem(budget=budget)
    winner = solve(found, strategy, {})
    assert found.price <= budget
    assert winner.complete and winner in found.candidates
    with pytest.raises(Exhausted):
        strategy(problem(budget=budget))


def test_a_strategy_that_asks_nothing_has_a_result() -> None:
    found = problem()
    assert solve(found, lambda _: None, {}).coefficients == {"c": -1.0}


def test_the_most_promising_of_what_was_looked_at_is_evaluated_in_the_end() -> None:
    def strategy(found: Problem) -> None:
        for value in (-1.0, 0.5, 1.0):
            found.evaluate({"c": value}, {}, 2)
        found.evaluate({"c": 0.3}, {}, 1)

    found = problem(objective=Objective(minimize="loss", tasks=["new"]))
    assert solve(found, strategy, {}).coefficients == {"c": 0.5}


def test_slopes_cost_several_evaluations_an_image_and_leave_one_complete_evaluation() -> None:
    def differentiate(at: Any, choice: Any, task: str, chunk: int, of: Any) -> Slope:
        return Slope(1.0, {"c": 2.0}, answers(0.5))

    found = problem(budget=47)
    with pytest.raises(InvalidInput, match="cannot differentiate"):
        found.slope({"c": 0.0}, {}, "old", 0, "entropy")
    found.differentiate = differentiate
    assert found.slope({"c": 0.0}, {}, "old", 0, "entropy").gradient == {"c": 2.0}
    found.slope({"c": 0.0}, {}, "old", 5, "entropy")  # the same chunk, round and round
    assert found.price == 15 == found.slope_price("old", 0)
    with pytest.raises(Exhausted):
        found.slope({"c": 0.5}, {}, "new", 0, "entropy")  # 15 + 20 + 13 > 47
    found.evaluate({"c": 0.0}, {})
    assert found.price == 28


def test_the_smooth_direction_is_that_of_the_objective() -> None:
    low, high = (candidate({}, {"new": 0.5}, loss=x) for x in (1.0, 2.0))
    for objective, learns in (
        (LEARN, True), (FORGET, False), (Objective(minimize="loss", tasks=["new"]), True),
        (Objective(maximize="loss", tasks=["new"]), False),
        (Objective(minimize="normalized_accuracy", tasks=["new"]), False),
    ):  # fmt: skip
        found = problem(objective=objective)
        assert (found.smooth(low) > found.smooth(high)) == learns
        assert found.learning == (1 if learns else -1)


# How sure a choice is


@st.composite
def rivals(draw: st.DrawFn) -> tuple[list[Candidate], Goal]:
    """Return candidates with random answers on two tasks of different sizes."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for place in range(draw(st.integers(1, 4))):
        said = {
            task: Answers(generator.random(n) < 0.7, generator.exponential(1, n).astype(np.float32))
            for task, n in (("new", 40), ("old", 15))
        }
        found.append(Candidate({"c": place / 10}, {}, said))
    metric = draw(st.sampled_from(["accuracy", "normalized_accuracy", "loss"]))
    direction = draw(st.sampled_from(["maximize", "minimize"]))
    objective = Objective(**{direction: metric}, tasks=["new", "old"])
    return found, Goal(objective, REFERENCES)


@settings(max_examples=15, deadline=None)
@given(rivals())
def test_the_intervals_are_those_of_a_direct_bootstrap(case: tuple[list[Candidate], Goal]) -> None:
    candidates, goal = case
    direction = 1 if goal.objective.maximize else -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "RESAMPLES", 60)
        patch.setattr(bootstrap, "BLOCK", 300)  # several blocks a task
        low, high = intervals(candidates, candidates[0], goal)
    generator = np.random.default_rng(bootstrap.SEED)
    drawn = {}
    for task, number in (("new", 40), ("old", 15)):
        rows = 300 // number
        parts = [
            generator.integers(0, number, (min(rows, 60 - start), number))
            for start in range(0, 60, rows)
        ]
        drawn[task] = np.concatenate(parts)
    for place, found in enumerate(candidates):
        gains = []
        for i in range(60):
            resampled = [
                Candidate({}, {}, {
                    task: Answers(said.correct[drawn[task][i]], said.loss[drawn[task][i]])
                    for task, said in item.answers.items()
                })
                for item in (found, candidates[0])
            ]  # fmt: skip
            values = [objective_value(item, goal.objective, REFERENCES) for item in resampled]
            gains.append(direction * (values[0] - values[1]))
        expected = np.percentile(gains, [2.5, 97.5])
        np.testing.assert_allclose([low[place], high[place]], expected, atol=1e-9)
    assert low[0] == high[0] == 0


def test_the_standard_error_is_that_of_the_paired_difference() -> None:
    one = Answers(np.array([1, 1, 1, 0], bool), np.zeros(4, np.float32))
    other = Answers(np.array([1, 0, 0, 0], bool), np.zeros(4, np.float32))
    pair = [Candidate({}, {}, {"new": found}) for found in (one, other)]
    mean, error = paired_difference(pair[0], pair[1], Goal(LEARN, REFERENCES))
    assert mean == 0.5
    assert error == pytest.approx(np.std([0, 1, 1, 0], ddof=1) / 2)
    assert paired_difference(pair[0], pair[1], Goal(FORGET, REFERENCES))[0] == -0.5
    single = Candidate({}, {}, {"new": Answers(np.array([True]), np.zeros(1, np.float32))})
    assert paired_difference(single, single, Goal(LEARN, REFERENCES)) == (0, inf)


def test_what_is_clearly_worse_infeasible_or_incomplete_is_not_as_good() -> None:
    shares = [0.80, 0.78, 0.40, 0.90, 0.85]
    candidates = curve(shares, old=[0.5, 0.5, 0.5, 0.1, 0.5])
    candidates[4] = candidate({"c": 0.4}, {"new": 0.85, "old": 0.5}, complete=False)
    goal = Goal(LEARN, REFERENCES, KEEP)
    assert not_worse(candidates, 0, goal) == [True, True, False, False, False]
    better = not_worse(candidates, 2, goal)  # "largest" may choose what is worse than others
    assert better == [True, True, True, False, False]
    hopeless = Goal(LEARN, REFERENCES, Constraint(tasks=["old"], min_ratio=9.0))
    assert not_worse(candidates, 1, hopeless) == [False, True, False, False, False]


def test_a_confidence_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(1), 0
    for _ in range(200):
        values = (draw.random((80, 1)) < 0.3).astype(np.float64)
        low, high = np.percentile(resampled_means(values, np.random.default_rng(0)), [2.5, 97.5])
        covered += low <= 0.3 <= high
    assert 178 <= covered <= 200


def test_twenty_one_candidates_on_four_thousand_items_take_less_than_a_second() -> None:
    draw = np.random.default_rng(0)
    said = [Answers(draw.random(4000) < 0.8, np.zeros(4000, np.float32)) for _ in range(21)]
    candidates = [Candidate({"c": i / 20}, {}, {"new": found}) for i, found in enumerate(said)]
    started = time.process_time()
    not_worse(candidates, 3, Goal(LEARN, REFERENCES))
    assert time.process_time() - started < 1
