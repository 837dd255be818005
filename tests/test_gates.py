"""The gates: laws of the pure functions, published figures, and what a message says."""

from fractions import Fraction
from math import comb, exp, inf, isnan, log
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import gates
from taskvec.errors import GateClosed, IncompatibleWeights, TaskvecError
from taskvec.gates import Count, Finding
from taskvec.metrics import wilson_interval
from taskvec.params import Constraint
from taskvec.summaries import Estimate, Score

law = settings(deadline=None)  # the first test imports scipy
MARGIN, LEVEL = 0.05, 1e-3


def single(correct: int, items: int) -> Count:
    """Return a count of items that stand for themselves."""
    return Count(correct, items, items)


def counts(most: int = 60) -> st.SearchStrategy[Count]:
    sizes = st.integers(1, most)
    return sizes.flatmap(lambda n: st.builds(single, st.integers(0, n), st.just(n)))


def leak(validation: Count, test: Count, margin: float = MARGIN, level: float = LEVEL) -> Finding:
    return gates.leak(
        "mnist", "mnist-0.safetensors", [], {"mnist": (validation, test)},
        margin=margin, level=level,
    )  # fmt: skip


# Test far above validation.


def tail(validation: Count, test: Count) -> Fraction:
    """Return the hypergeometric tail of Fisher's test in exact integers."""
    right = validation.correct + test.correct
    found = range(max(0, right - test.items), validation.correct + 1)
    ways = sum(comb(validation.items, i) * comb(test.items, right - i) for i in found)
    return Fraction(ways, comb(validation.items + test.items, right))


@law
@given(counts(), counts())
def test_the_p_value_is_the_exact_tail(validation: Count, test: Count) -> None:
    expected = float(tail(validation, test))
    assert gates.p_above(validation, test) == pytest.approx(expected, rel=1e-9)


@law
@given(st.integers(2, 60).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))), counts())
def test_a_better_test_score_is_less_likely_and_a_better_validation_score_explains_it(
    count: tuple[int, int], other: Count
) -> None:
    correct, items = count
    worse, better = single(correct - 1, items), single(correct, items)
    assert gates.p_above(other, better) <= gates.p_above(other, worse) + 1e-12
    assert gates.p_above(better, other) >= gates.p_above(worse, other) - 1e-12


@law
@given(counts(), counts())
def test_a_test_score_that_is_no_better_never_closes_the_gate(a: Count, b: Count) -> None:
    validation, test = (a, b) if a.accuracy >= b.accuracy else (b, a)
    assert not leak(validation, test, margin=0.0, level=0.5).problems or (
        validation.accuracy == test.accuracy
    )
    assert not leak(validation, test).problems


@law
@given(counts(), counts(), st.floats(0, 1), st.floats(1e-9, 0.5))
def test_the_gate_closes_when_margin_and_test_agree(
    validation: Count, test: Count, margin: float, level: float
) -> None:
    far = test.accuracy - validation.accuracy >= margin + 1e-9
    near = test.accuracy - validation.accuracy <= margin - 1e-9
    unlikely = gates.p_above(validation, test) < level
    if far or near:
        assert bool(leak(validation, test, margin, level).problems) == (far and unlikely)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize(("n", "m"), [(5, 20), (15, 15), (20, 6)])
def test_chance_closes_the_gate_no_more_often_than_the_level(rate: float, n: int, m: int) -> None:
    def chance(right: int, items: int) -> float:
        return comb(items, right) * rate**right * (1 - rate) ** (items - right)

    level = 0.01
    alarms = [
        chance(a, n) * chance(b, m)
        for a in range(n + 1)
        for b in range(m + 1)
        if leak(single(a, n), single(b, m), margin=0.0, level=level).problems
    ]
    assert sum(alarms) <= level


@law
@given(counts(), counts(), st.integers(1, 60), st.integers(1, 60))
def test_groups_stand_for_one_item_each(a: Count, b: Count, left: int, right: int) -> None:
    validation = Count(a.correct, a.items, min(left, a.items))
    test = Count(b.correct, b.items, min(right, b.items))
    p = gates.p_above(validation, test)
    # all wrong against all right is the most that so many groups can say
    least = 1 / comb(validation.groups + test.groups, test.groups)
    assert p >= least * (1 - 1e-9)
    if least >= LEVEL:
        assert not leak(validation, test, margin=0.0).problems


def test_published_scores_on_leaked_test_data_close_the_gate() -> None:
    # DTD in published tables: 97.98 % on 1,880 test items against 78.55 % on validation.
    validation, test = single(295, 376), single(1842, 1880)
    finding = leak(validation, test, level=1e-3 / 10_000)
    (problem,) = finding.problems
    assert "1842 of 1880 items (97.98 %)" in problem
    assert "295 of 376 items (78.46 %)" in problem
    assert "19.52 points more" in problem


@pytest.mark.parametrize(
    ("validation", "test"),
    [(single(445, 500), single(1320, 1500)), (single(28, 30), single(68, 70)),
     (Count(270, 300, 3), Count(590, 600, 6)), (Count(230, 300, 3), Count(520, 600, 6))],
)  # fmt: skip
def test_scores_of_the_default_tasks_leave_the_gate_open(validation: Count, test: Count) -> None:
    assert not leak(validation, test).problems


def test_other_fonts_may_be_easier_but_other_items_may_not() -> None:
    assert leak(single(270, 300), single(590, 600)).problems
    finding = leak(Count(270, 300, 3), Count(590, 600, 6))
    assert finding.note == "passed; compared mnist by 3 and 6 groups"
    assert leak(single(270, 300), single(271, 300)).note == "passed"


# Items that were trained on.

PLACES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 99), max_size=5)
TASKS = st.dictionaries(st.sampled_from(["mnist", "usps", "cars"]), PLACES, max_size=3)


@law
@given(TASKS, TASKS)
def test_leaks_are_the_digests_on_both_sides(
    training: dict[str, dict[str, int]], test: dict[str, dict[str, int]]
) -> None:
    found = {(item.task, item.item, item.source, item.source_item) for item in gates.leaks(
        training, test)}  # fmt: skip
    expected = {
        (task, place, source, training[source][digest])
        for task in test
        for source in training
        for digest, place in test[task].items()
        if digest in training[source]
    }
    assert found == expected


def test_a_leak_names_the_first_items_and_counts_the_rest() -> None:
    found = gates.leaks({"usps": dict(zip("abcdef", range(6), strict=True))},
                        {"mnist": {"b": 7, "a": 3, "z": 0, "c": 9, "d": 11, "f": 2}})  # fmt: skip
    finding = gates.leak("sum", "data/edits/sum-0/model.safetensors", found, {}, margin=0, level=1)
    (problem,) = finding.problems
    assert problem.startswith("5 test items are in the training data of data/edits/sum-0/model")
    assert (
        "test item 2 of mnist is training item 5 of usps, "
        "test item 3 of mnist is training item 0 of usps, "
        "test item 7 of mnist is training item 1 of usps and 2 more"
    ) in problem


# Experts.


@law
@given(counts(), counts(), st.floats(0, 1))
def test_an_expert_passes_within_the_tolerance_on_either_side(
    a: Count, b: Count, tolerance: float
) -> None:
    apart = abs(Fraction(a.correct, a.items) - Fraction(b.correct, b.items))
    for recorded, measured in ((a, b), (b, a)):
        finding = gates.expert("x", "x-0", {"x": recorded}, {"x": measured}, tolerance)
        if abs(float(apart) - tolerance) > 1e-9:
            assert bool(finding.problems) == (apart > tolerance)
    assert gates.expert("x", "x-0", {"x": a}, {"x": a}, 0.0).note == "passed"


def test_the_tolerance_itself_is_within_it() -> None:
    finding = gates.expert("x", "x-0", {"x": single(99, 200)}, {"x": single(100, 200)}, 0.005)
    assert finding.problems == ()


def test_a_checkpoint_of_several_tasks_is_judged_on_those_that_it_records() -> None:
    recorded = {"a": single(9, 10), "b": single(8, 10)}
    measured = {"b": single(2, 10), "c": single(1, 10)}
    (problem,) = gates.expert("joint", "joint-0", recorded, measured, 0.005).problems
    assert "2 of 10 items (20.00 %) of b's validation data" in problem
    assert "8 of 10 items (80.00 %)" in problem


def test_a_foreign_checkpoint_passes_with_a_note() -> None:
    assert gates.recorded_score({"kind": "checkpoint"}, "x") == {}
    assert gates.expert("x", "x-0", {}, {"x": single(1, 2)}, 0.0).note == "no recorded score"
    elsewhere = gates.expert("x", "x-0", {"y": single(1, 2)}, {"x": single(1, 2)}, 0.0)
    assert elsewhere.note == "no recorded score"


def test_a_score_is_read_as_fine_tune_writes_it() -> None:
    score = {"split": "validation", "tasks": {"x": {"correct": 3, "items": 4}}}
    assert gates.recorded_score({"score": score}, "x-0") == {"x": single(3, 4)}


@pytest.mark.parametrize(
    "score",
    [
        0.9, "0.9", {}, {"split": "validation"},
        {"split": "test", "tasks": {"x": {"correct": 1, "items": 2}}},
        *({"split": "validation", "tasks": tasks} for tasks in (
            [], {"x": 0.5}, {"x": {"correct": 1}}, {"x": {"correct": 3, "items": 2}},
            {"x": {"correct": -1, "items": 2}}, {"x": {"correct": 0, "items": 0}},
            {"x": {"correct": 0.5, "items": 1}}, {"x": {"correct": True, "items": 1}},
        )),
    ],
)  # fmt: skip
def test_a_malformed_score_is_refused(score: Any) -> None:
    with pytest.raises(IncompatibleWeights, match=r"x-0\.safetensors records the score"):
        gates.recorded_score({"score": score}, "x-0.safetensors")


# Overrides.

FINDINGS = st.lists(
    st.builds(
        Finding,
        st.sampled_from(["expert", "leak"]),
        st.sampled_from(["a", "b"]),
        st.sampled_from([(), ("too good",), ("one", "two")]),
    ),
    max_size=2,
    unique_by=lambda finding: finding.gate,
)


@law
@given(FINDINGS, st.sets(st.sampled_from(["expert a", "expert b", "leak a", "leak b"])))
def test_a_closed_gate_stops_unless_it_is_overridden_by_name(
    findings: list[Finding], overridden: set[str]
) -> None:
    override = dict.fromkeys(overridden, "I looked")
    stopped = [f for f in findings if f.problems and f.key not in overridden]
    if not stopped:
        assert gates.settle(findings, override) == {
            f"gate.{f.gate}": "overridden: I looked" if f.problems else "passed" for f in findings
        }
        return
    with pytest.raises(GateClosed) as caught:
        gates.settle(findings, override)
    for finding in findings:
        shown = f'gates: {{override: {{"{finding.key}": "why"}}}}' in str(caught.value)
        assert shown == (finding in stopped)


def test_a_closed_gate_has_an_exit_code_of_its_own() -> None:
    assert issubclass(GateClosed, TaskvecError)
    assert GateClosed.exit_code == 8


# Feasibility on test data.


def score(correct: int, items: int, loss: float = 1.0, width: float = 0.1) -> Score:
    accuracy = Estimate(correct / items, *wilson_interval(correct, items))
    return Score(accuracy, Estimate(loss, loss - width, loss + width), items, 0.1)


def constraint(metric: str = "accuracy", tasks: tuple[str, ...] = ("x",), **bound: float) -> Any:
    return Constraint.model_validate({"tasks": list(tasks), "metric": metric, **bound})


KINDS = ["min_ratio", "max_ratio", "min", "max", "max_drop", "max_rise"]
SCORES = st.builds(score, st.integers(0, 50), st.just(50), st.floats(0.2, 5.0), st.floats(0.0, 0.2))
RULES = st.builds(
    lambda kind, metric, bound: constraint(metric, **{kind: bound}),
    st.sampled_from(KINDS),
    st.sampled_from(["accuracy", "loss", "perplexity"]),
    st.floats(0.01, 3.0),
)


@law
@given(RULES, SCORES, SCORES)
def test_feasible_is_wholly_inside_and_infeasible_wholly_outside(
    rule: Constraint, edited: Score, pretrained: Score
) -> None:
    figure = gates.bounded(rule, edited, pretrained)
    verdict = gates.settled(rule, figure)
    ends = [gates.holds(rule, Estimate(v, v, v)) for v in (figure.low, figure.high)]
    if isnan(figure.value):
        assert verdict == "open"
        return
    assert figure.low <= figure.value <= figure.high
    assert verdict == {(True, True): "feasible", (False, False): "infeasible"}.get(
        (ends[0], ends[1]), "open"
    )
    assert verdict != ("infeasible" if gates.holds(rule, figure) else "feasible")
    assert gates.feasibility(rule, {"x": edited}, {"x": pretrained}) == verdict


@law
@given(RULES, SCORES, SCORES, st.floats(1.0, 3.0))
def test_a_looser_bound_never_makes_an_edit_infeasible(
    rule: Constraint, edited: Score, pretrained: Score, factor: float
) -> None:
    kind, bound = rule.rule
    looser = bound / factor if kind.startswith("min") else bound * factor
    loose = constraint(rule.metric, **{kind: looser})
    order = ["infeasible", "open", "feasible"]
    found = [gates.feasibility(c, {"x": edited}, {"x": pretrained}) for c in (rule, loose)]
    assert order.index(found[0]) <= order.index(found[1])


@pytest.mark.parametrize(
    ("metric", "bound", "expected"),
    [
        ("accuracy", {"min_ratio": 0.95}, 0.9 / 0.8),
        ("accuracy", {"max_ratio": 0.5}, 0.9 / 0.8),
        ("accuracy", {"min": 0.85}, 0.9),
        ("accuracy", {"max_drop": 0.03}, -0.1),
        ("accuracy", {"max_rise": 0.03}, 0.1),
        ("loss", {"max": 1.0}, 2.0),
        ("loss", {"max_rise": 0.2}, 0.5),
        ("loss", {"max_ratio": 1.1}, 2.0 / 1.5),
        ("perplexity", {"max_rise": 0.5}, exp(2.0) - exp(1.5)),
        ("perplexity", {"max": 9.0}, exp(2.0)),
    ],
)
def test_what_a_constraint_bounds(metric: str, bound: dict[str, float], expected: float) -> None:
    edited, pretrained = score(90, 100, loss=2.0), score(80, 100, loss=1.5)
    figure = gates.bounded(constraint(metric, **bound), edited, pretrained)
    assert figure.value == pytest.approx(expected)
    assert figure.low < figure.value < figure.high


def test_one_infeasible_control_makes_an_edit_infeasible() -> None:
    rule = constraint(tasks=("x", "y"), min_ratio=0.95)
    base = score(800, 1000)
    verdicts = {
        "feasible": score(880, 1000), "open": score(765, 1000), "infeasible": score(400, 1000)
    }  # fmt: skip
    for left, x in verdicts.items():
        for right, y in verdicts.items():
            found = gates.feasibility(rule, {"x": x, "y": y}, {"x": base, "y": base})
            worst = min((left, right), key=["infeasible", "open", "feasible"].index)
            assert found == worst
    assert gates.feasibility(None, {}, {}) == "feasible"


def test_a_share_of_nothing_is_open_and_a_huge_loss_is_infeasible() -> None:
    nothing = score(0, 20)
    assert gates.feasibility(constraint(min_ratio=0.9), {"x": nothing}, {"x": nothing}) == "open"
    lost = score(1, 20, loss=5000.0, width=1.0)
    for bound in ({"max": 10.0}, {"max_rise": 0.5}, {"max_ratio": 1.1}):
        rule = constraint("perplexity", **bound)
        assert gates.feasibility(rule, {"x": lost}, {"x": score(9, 20, log(5.0))}) == "infeasible"
    assert gates.settled(constraint(min=0.5), Estimate(0.6, -inf, inf)) == "open"
