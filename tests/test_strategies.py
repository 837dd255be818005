"""Strategies find the optimum of smooth problems, inside the ranges, within the budget."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import layered, plugins
from taskvec.answers import Answers
from taskvec.errors import InvalidInput
from taskvec.params import Constraint, Objective, Range
from taskvec.search import (
    Candidate,
    Choice,
    Coefficients,
    Goal,
    Level,
    Problem,
    Reference,
    Slope,
    combinations,
    solve,
)
from taskvec.strategies.descent import Adam

CHUNK = 50
LAYERS = ["0", "1", "rest"]
GRID = Range(low=0, high=1, points=21)
KEEP = Constraint(tasks=["control"], min_ratio=0.95)
LEARN = Objective(maximize="accuracy", tasks=["target"])
FORGET = Objective(minimize="accuracy", tasks=["target"])
law = settings(deadline=None, max_examples=25)


class World:
    """Items that are right where their margin is positive, which is smooth in the coefficients.

    The target's margin is largest at ``optimum`` (coefficients that differ by layer are averaged),
    that of the control task falls with the size of the edit.
    """

    def __init__(
        self, optimum: Mapping[str, float], *, items: int = 400, noise: int = 0, sharp: float = 8.0
    ) -> None:
        draw = np.random.default_rng(noise)
        self.optimum, self.sharp = optimum, sharp
        self.sizes = {
            "target": [CHUNK] * (items // CHUNK), "control": [CHUNK] * (items // CHUNK // 2)
        }  # fmt: skip
        self.noise = {task: draw.normal(0, 1.5, (len(s), CHUNK)) for task, s in self.sizes.items()}
        self.asked = 0

    def ask(self, at: Coefficients, choice: Choice, task: str, chunk: int) -> Answers:
        self.asked += 1
        margin = self.margin(at, task, chunk) - abs(float(choice.get("worse", 0)))
        return Answers(margin > 0, np.logaddexp(0, -margin).astype(np.float32))

    def margin(self, at: Coefficients, task: str, chunk: int) -> Any:
        means = self.means(at)
        if task == "control":
            level = 2.0 - 2.0 * sum(x * x for x in means.values())
        else:
            distance = sum((x - self.optimum[name]) ** 2 for name, x in means.items())
            level = 2.0 - self.sharp * distance
        return level + self.noise[task][chunk]

    def means(self, at: Coefficients) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for name, value in at.items():
            found.setdefault(layered.base(name), []).append(value)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def differentiate(
        self, at: Coefficients, choice: Choice, task: str, chunk: int, of: str
    ) -> Slope:
        """Return differences of the loss; the entropy is that of the two answers of an item."""

        def loss(point: Coefficients) -> float:
            margin = self.margin(point, task, chunk)
            if of == "cross_entropy":
                return float(np.logaddexp(0, -margin).mean())
            p = 1 / (1 + np.exp(-margin))
            return float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean())

        gradient = {
            name: (loss({**at, name: x + 1e-5}) - loss({**at, name: x - 1e-5})) / 2e-5
            for name, x in at.items()
        }
        return Slope(loss(at), gradient, self.ask(at, choice, task, chunk))


def problem(
    world: World,
    ranges: Mapping[str, Range] | None = None,
    *,
    objective: Objective = LEARN,
    constraint: Constraint | None = None,
    select: str = "best",
    choices: list[Choice] | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> Problem:
    tasks = ["target", "control"] if constraint else ["target"]
    start = dict.fromkeys(world.optimum, 0.0)
    references = {}
    for task in tasks:
        parts = [world.ask(start, {}, task, i) for i in range(len(world.sizes[task]))]
        share = float(np.mean([part.accuracy for part in parts]))
        level = Level(share, float(np.mean([part.mean_loss for part in parts])))
        references[task] = Reference(level, level)
    return Problem(
        ranges=ranges or dict.fromkeys(world.optimum, GRID),
        choices=choices or [{}],
        goal=Goal(objective, references, constraint, select),
        sizes={task: world.sizes[task] for task in tasks},
        ask=world.ask,
        differentiate=world.differentiate,
        layers=LAYERS,
        seed=seed,
        budget=budget,
    )


def run(found: Problem, strategy: str, **options: Any) -> Candidate:
    function = getattr(plugins.load("strategies", strategy), strategy)
    return solve(found, function, plugins.complete("strategies", strategy, options))


def gap(found: Problem, winner: Candidate, world: World) -> float:
    """Return by how much the winner misses the best point of the grid, in the objective."""
    whole = problem(world, found.ranges, objective=found.goal.objective,
                    constraint=found.goal.constraint, select=found.goal.select,
                    choices=list(found.choices))  # fmt: skip
    return whole.gain(run(whole, "grid")) - found.gain(winner)


# What holds for all of them

NAMES = plugins.names("strategies")
QUICK: dict[str, dict[str, Any]] = {
    "gradient": {"steps": 20}, "adamerging": {"steps": 20, "rate": 0.02},
}  # fmt: skip
JUDGED = [name for name in NAMES if name != "adamerging"]  # it does not look at labels
SEVERAL = [name for name in JUDGED if name != "golden"]  # it takes one coefficient


@pytest.mark.parametrize("strategy", NAMES)
@law
@given(
    optimum=st.floats(0, 1),
    low=st.sampled_from([-1.0, 0.0, 0.25]),
    share=st.floats(0.05, 1.2),
    choices=st.sampled_from([[{}], [{"worse": 0}, {"worse": 1}]]),
    constraint=st.sampled_from([None, KEEP]),
)
def test_within_the_range_within_the_budget_and_always_the_same(
    strategy: str, optimum: float, low: float, share: float, choices: Any, constraint: Any
) -> None:
    runs = []
    for _ in range(2):
        world = World({"c": optimum}, items=200)
        found = problem(
            world, {"c": Range(low=low, high=1, points=11)}, choices=choices, constraint=constraint
        )
        found.budget = max(found.full_price, int(share * found.grid_price))
        winner = run(found, strategy, **QUICK.get(strategy, {}))
        assert winner.complete
        assert found.price <= found.limit
        assert all(low <= x <= 1 for c in found.candidates for x in c.coefficients.values())
        runs.append([(c.coefficients, c.choice, c.items) for c in found.candidates])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("strategy", NAMES)
def test_a_range_of_one_point_is_that_point(strategy: str) -> None:
    found = problem(World({"c": 0.5}), {"c": Range(low=0.3, high=0.3, points=1)}, budget=10_000)
    winner = run(found, strategy, **QUICK.get(strategy, {}))
    assert set(winner.coefficients.values()) == {0.3}


@pytest.mark.parametrize("strategy", JUDGED)
@pytest.mark.parametrize("optimum", [0.0, 0.32, 0.7, 1.0])
def test_the_optimum_of_a_smooth_problem_is_found(strategy: str, optimum: float) -> None:
    world = World({"c": optimum})
    found = problem(world, budget=20_000)
    winner = run(found, strategy, **QUICK.get(strategy, {}))
    assert abs(winner.coefficients["c"] - optimum) <= 0.2
    assert gap(found, winner, world) <= 0.03


@pytest.mark.parametrize("strategy", SEVERAL)
def test_the_optimum_of_two_coefficients_is_found(strategy: str) -> None:
    world = World({"a": 0.3, "b": 0.8})
    grid = Range(low=0, high=1, points=9)
    found = problem(world, {"a": grid, "b": grid})
    winner = run(found, strategy, **QUICK.get(strategy, {}))
    assert gap(found, winner, world) <= 0.02


@pytest.mark.parametrize("strategy", JUDGED)
def test_the_better_option_is_found(strategy: str) -> None:
    found = problem(World({"c": 0.6}), choices=[{"worse": 1}, {"worse": 0}])
    assert run(found, strategy, **QUICK.get(strategy, {})).choice == {"worse": 0}


@pytest.mark.parametrize("strategy", JUDGED)
@pytest.mark.parametrize("select", ["best", "largest"])
def test_a_constraint_is_kept_and_used(strategy: str, select: str) -> None:
    world = World({"c": 0.0}, sharp=4.0)  # forgetting grows with c, and so does the damage
    found = problem(world, objective=FORGET, constraint=KEEP, select=select)
    winner = run(found, strategy, **QUICK.get(strategy, {}))
    assert found.slack(winner) >= 0
    assert gap(found, winner, world) <= 0.05


@pytest.mark.parametrize("strategy", JUDGED)
def test_where_nothing_keeps_the_constraint_the_smallest_edit_is_taken(strategy: str) -> None:
    impossible = Constraint(tasks=["control"], min=1.5)
    found = problem(World({"c": 0.5}), constraint=impossible)
    winner = run(found, strategy, **QUICK.get(strategy, {}))
    smallest = min(abs(c.coefficients["c"]) for c in found.candidates if c.complete)
    assert winner.coefficients["c"] == smallest


@pytest.mark.parametrize("strategy", ["tpe", "cma_es"])
def test_another_seed_draws_other_points(strategy: str) -> None:
    drawn = []
    for seed in (0, 1):
        found = problem(World({"a": 0.3, "b": 0.8}), seed=seed, budget=4000)
        run(found, strategy)
        drawn.append([tuple(c.coefficients.values()) for c in found.candidates])
    assert drawn[0] != drawn[1]


# Each on its own


def test_the_grid_evaluates_every_point_with_every_option() -> None:
    grid = {"a": Range(low=0, high=1, points=3), "b": Range(low=0, high=1, points=2)}
    found = problem(World({"a": 0.3, "b": 0.8}), grid, choices=[{"worse": 0}, {"worse": 1}])
    run(found, "grid")
    assert [dict(c.coefficients) for c in found.candidates] == combinations(grid) * 2
    assert found.price == found.grid_price


@pytest.mark.parametrize("guide", ["loss", "objective"])
def test_golden_section_needs_few_evaluations(guide: str) -> None:
    found = problem(World({"c": 0.613}, items=4000))
    winner = run(found, "golden", guide=guide, tolerance=0.02)
    assert abs(winner.coefficients["c"] - 0.613) < 0.1
    assert len(found.candidates) <= 11


def test_the_end_of_what_keeps_the_constraint_is_found_by_bisection() -> None:
    world = World({"c": 0.0}, items=4000)
    found = problem(world, objective=FORGET, constraint=KEEP, select="largest")
    winner = run(found, "golden", tolerance=0.01)
    beyond = {"c": winner.coefficients["c"] + 0.02}
    assert found.slack(winner) >= 0 > found.slack(found.evaluate(beyond, {}))
    assert len(found.candidates) <= 11


def test_golden_section_takes_a_single_coefficient() -> None:
    with pytest.raises(InvalidInput, match="searches one coefficient, the edit has a, b"):
        run(problem(World({"a": 0.3, "b": 0.8})), "golden")


@law
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_halving_keeps_the_best_or_what_cannot_be_told_from_it(seed: int, optimum: float) -> None:
    world = World({"c": optimum}, noise=seed)
    found = problem(world)
    winner = run(found, "halving", z=3.0)
    assert gap(found, winner, world) <= 0.0101  # four of 400 items
    assert found.price < found.grid_price


def test_halving_is_exact_where_the_differences_are_large() -> None:
    for seed in range(10):
        world = World({"c": 0.45}, noise=seed, sharp=40)
        found = problem(world)
        assert gap(found, run(found, "halving", z=3.0), world) == 0
        assert found.price < 0.75 * found.grid_price


def test_guided_pays_at_most_a_quarter_of_the_grid() -> None:
    gaps = []
    for seed in range(10):
        world = World({"c": 0.1 + 0.08 * seed}, noise=seed, items=600)
        found = problem(world)
        gaps.append(gap(found, run(found, "guided"), world))
        assert found.price <= found.grid_price / 4
    assert np.mean(gaps) <= 0.002


def test_steps_of_the_gradient_stop_where_the_budget_does() -> None:
    world = World({"c": 0.7})
    for budget in (400, 1200, 3000):
        found = problem(world, budget=budget)
        winner = run(found, "gradient", steps=1000)
        assert found.price <= budget and winner.complete


def test_layers_have_coefficients_of_their_own() -> None:
    found = problem(World({"c": 0.7}))
    winner = run(found, "gradient", layerwise=True, steps=10)
    assert sorted(winner.coefficients) == ["c@0", "c@1", "c@rest"]
    assert len({tuple(sorted(c.coefficients)) for c in found.candidates}) == 1


def test_adamerging_follows_the_entropy_and_is_judged_by_its_last_point_alone() -> None:
    found = problem(World({"c": 0.7}), budget=100_000)
    winner = run(found, "adamerging", steps=100, rate=0.02)
    assert sorted(winner.coefficients) == ["c@0", "c@1", "c@rest"]
    assert all(abs(x - 0.7) < 0.1 for x in winner.coefficients.values())
    assert len(found.candidates) == 1


def test_adamerging_does_not_look_at_labels() -> None:
    class Blind(World):
        def ask(self, *args: Any) -> Answers:
            said = super().ask(*args)
            return Answers(~said.correct, 10 - said.loss)

    ends = [
        run(problem(world({"c": 0.7}), budget=50_000), "adamerging", steps=30, rate=0.02)
        for world in (World, Blind)
    ]
    assert ends[0].coefficients == ends[1].coefficients


def test_adamerging_cannot_forget() -> None:
    with pytest.raises(InvalidInput, match="objective"):
        run(problem(World({"c": 0.7}), objective=FORGET), "adamerging")


@law
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0.001, 1))
def test_adam_is_that_of_torch(slopes: list[float], rate: float) -> None:
    value = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([value], lr=rate)
    found = Adam({"c": 0.3}, {"c": Range(low=-1000, high=1000, points=2)}, {"c": rate})
    for slope in slopes:
        value.grad = torch.tensor([slope], dtype=torch.float64)
        reference.step()
        found.step({"c": slope})
    assert found.values["c"] == pytest.approx(value.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("strategy", ["tpe", "cma_es"])
def test_what_other_packages_say_is_not_heard(
    strategy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run(problem(World({"c": 0.5}), budget=3000), strategy)
    assert capfd.readouterr() == ("", "")
