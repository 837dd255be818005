"""Which coefficients to try, and which to take: values in, decision out; no models, no files.

The paper tries a grid on validation data and takes the best (arXiv:2212.04089, section 2), or for
negation the largest coefficient whose control accuracy stays above a bound (section 3). Here a
*strategy* (a module of taskvec/strategies/) decides what to try: it drives a `Problem`, and
`decide` picks among what was evaluated completely. A strategy is one function of its module's name:

    def grid(problem: Problem, *, OPTION: TYPE = DEFAULT, ...) -> None

It is deterministic given ``problem.seed``, stays inside ``problem.ranges`` and sees no test item.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import exp, inf, isnan, nan, prod, sqrt
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from taskvec import layered
from taskvec.answers import Answers, join
from taskvec.errors import InvalidInput
from taskvec.metrics import normalized_accuracy
from taskvec.params import Constraint, Objective, Range

ROUNDING = 1e-9  # a bound is kept if only rounding says otherwise
SLOPE_PRICE = 5  # image evaluations that a forward and a backward pass cost; by operations, 3

Choice = Mapping[str, bool | int | float | str]
Coefficients = Mapping[str, float]
Of = Literal["cross_entropy", "entropy"]


@dataclass(frozen=True)
class Level:
    """How a model does on one task.

    Attributes:
        accuracy: a fraction in [0, 1].
        loss: mean cross-entropy in nats.
    """

    accuracy: float
    loss: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return exp(self.loss) if self.loss < 700 else inf if self.loss >= 700 else nan


@dataclass(frozen=True)
class Reference:
    """What gives a task's figures their meaning, on the same validation data."""

    pretrained: Level
    finetuned: Level


@dataclass(frozen=True, eq=False)
class Candidate:
    """One combination of coefficients and options, and its answers on validation data.

    Attributes:
        coefficients: ``NAME`` or ``NAME@LAYER`` -> value, no unit.
        choice: options that have several values -> the value.
        answers: task -> answers on its first chunks.
        complete: whether these are all chunks.
    """

    coefficients: Coefficients
    choice: Choice
    answers: Mapping[str, Answers]
    complete: bool = True

    @cached_property
    def levels(self) -> dict[str, Level]:
        """Task -> how the model does on what it was asked."""
        return {
            task: Level(answers.accuracy, answers.mean_loss)
            for task, answers in self.answers.items()
        }

    @property
    def items(self) -> int:
        """The number of items it was asked about, over all tasks."""
        return sum(len(answers) for answers in self.answers.values())

    @cached_property
    def known(self) -> bool:
        """Whether no figure is NaN."""
        return not any(isnan(x) for level in self.levels.values() for x in _figures(level))


@dataclass(frozen=True)
class Slope:
    """A loss on one chunk, its derivative by each coefficient, and the answers on the chunk."""

    value: float
    gradient: Mapping[str, float]
    answers: Answers


@dataclass(frozen=True)
class Goal:
    """What makes a candidate good, and which ones are allowed.

    Attributes:
        objective: what is made large or small.
        constraint: what must be kept, if anything.
        select: "best" or "largest"; see `decide`.
        references: task -> its references; those of the objective and of the constraint.
    """

    objective: Objective
    references: Mapping[str, Reference]
    constraint: Constraint | None = None
    select: str = "best"

    @property
    def tasks(self) -> list[str]:
        """The tasks of the objective and of the constraint, sorted."""
        return sorted({*self.objective.tasks, *(self.constraint.tasks if self.constraint else ())})


def combinations(ranges: Mapping[str, Range]) -> list[dict[str, float]]:
    """Return all combinations of the coefficients' values; the last name varies fastest."""
    names = sorted(ranges)
    values = [ranges[name].values() for name in names]
    return [dict(zip(names, combination, strict=True)) for combination in product(*values)]


def objective_value(
    candidate: Candidate, objective: Objective, references: Mapping[str, Reference]
) -> float:
    """Return the mean over the objective's tasks of what it makes large or small."""
    metric = objective.maximize or objective.minimize
    values = []
    for task in objective.tasks:
        level = candidate.levels[task]
        if metric == "normalized_accuracy":
            finetuned = references[task].finetuned.accuracy
            values.append(normalized_accuracy(level.accuracy, finetuned))
        else:
            values.append(level.loss if metric == "loss" else level.accuracy)
    return sum(values) / len(values)


def item_scores(
    answers: Answers, task: str, objective: Objective, references: Mapping[str, Reference]
) -> npt.NDArray[np.float64]:
    """Return what each of n items of a task adds to the objective, times n, (n,).

    The objective is the sum over its tasks of the mean of these.
    """
    metric = objective.maximize or objective.minimize
    values = (answers.loss if metric == "loss" else answers.correct).astype(np.float64)
    scale = references[task].finetuned.accuracy if metric == "normalized_accuracy" else 1.0
    return values / (scale * len(objective.tasks))


def sign(objective: Objective) -> float:
    """Return 1 if the objective is made large, -1 if small."""
    return 1.0 if objective.maximize else -1.0


def paired_difference(one: Candidate, other: Candidate, goal: Goal) -> tuple[float, float]:
    """Return how much better ``one`` is than ``other``, and the standard error of that.

    Both have answered the same items, so that only items that they answer differently count. The
    variance is that of a mean of differences, stratified by task; infinite below two items a task.
    """
    mean, variance = 0.0, 0.0
    for task in goal.objective.tasks:
        pair = [
            item_scores(candidate.answers[task], task, goal.objective, goal.references)
            for candidate in (one, other)
        ]
        difference = sign(goal.objective) * (pair[0] - pair[1])
        mean += float(difference.mean())
        number = len(difference)
        variance += float(difference.var(ddof=1)) / number if number > 1 else inf
    return mean, sqrt(variance)


def bound(constraint: Constraint, pretrained: Level) -> tuple[float, float]:
    """Return the bound on the constraint's metric, and 1 if it is a lower one, -1 if an upper."""
    before = _metric(pretrained, constraint)
    rule, value = constraint.rule
    match rule:
        case "min_ratio":
            return value * before, 1.0
        case "max_ratio":
            return value * before, -1.0
        case "min":
            return value, 1.0
        case "max":
            return value, -1.0
        case "max_drop":
            return before - value, 1.0
    return before + value, -1.0


def slack(
    candidate: Candidate, constraint: Constraint | None, references: Mapping[str, Reference]
) -> float:
    """Return how far the worst control task is inside its bound, in units of the metric.

    Negative: outside. Infinite without a constraint.
    """
    found = [inf]
    for task in constraint.tasks if constraint else ():
        assert constraint is not None
        limit, side = bound(constraint, references[task].pretrained)
        found.append(side * (_metric(candidate.levels[task], constraint) - limit))
    return nan if any(map(isnan, found)) else min(found)


def feasible(
    candidate: Candidate, constraint: Constraint | None, references: Mapping[str, Reference]
) -> bool:
    """Return whether every control task keeps the constraint; the bound itself is allowed."""
    return slack(candidate, constraint, references) >= -ROUNDING


def decide(
    candidates: Sequence[Candidate],
    objective: Objective,
    constraint: Constraint | None,
    select: str,
    references: Mapping[str, Reference],
) -> int:
    """Return the position of the candidate to take.

    ``best`` takes the feasible candidate with the best objective, ``largest`` the feasible one
    with the largest coefficient (the paper's rule for negation). Ties go to the smaller edit, then
    to the smaller coefficients in the order of their names, then to the options in the order of
    their text, so that the order of the candidates does not matter. If nothing is feasible the
    smallest edit is taken, which the table marks as not feasible. A candidate with a NaN never wins
    against one without, and one that was not evaluated completely never against one that was.
    """

    def size(position: int) -> float:
        return sum(abs(value) for _, value in sorted(candidates[position].coefficients.items()))

    def smallest(position: int) -> tuple[float, list[float], list[str]]:
        candidate = candidates[position]
        coefficients = [value for _, value in sorted(candidate.coefficients.items())]
        return (
            size(position),
            coefficients,
            [str(item) for item in sorted(candidate.choice.items())],
        )

    def best(position: int) -> tuple[float, float, list[float], list[str]]:
        value = objective_value(candidates[position], objective, references)
        return -sign(objective) * value, *smallest(position)

    def largest(position: int) -> tuple[float, float, list[float], list[str]]:
        return -size(position), *smallest(position)

    everything = range(len(candidates))
    complete = [position for position in everything if candidates[position].complete] or everything
    known = [position for position in complete if candidates[position].known]
    allowed = [
        position for position in known if feasible(candidates[position], constraint, references)
    ]
    if not allowed:
        return min(known or complete, key=smallest)
    return min(allowed, key=largest if select == "largest" else best)


class Exhausted(Exception):
    """The budget does not pay for what a strategy asks; `solve` ends the search with it."""


@dataclass
class Problem:
    """What a strategy sees: it asks with `evaluate` and `slope`, and everything is recorded.

    Attributes:
        ranges: coefficient -> its range.
        choices: the combinations of options that have several values; at least one, maybe empty.
        goal: objective, constraint, rule and references.
        sizes: task -> the number of items in each of its chunks; those of the goal's tasks.
        ask: (coefficients, choice, task, chunk) -> answers on that chunk.
        differentiate: (coefficients, choice, task, chunk, of) -> slope; None: not possible here.
        layers: the layers of the model, for coefficients that differ by layer.
        seed: for strategies that draw.
        budget: image evaluations that may be spent; None: the price of the whole grid.
        tell: is called with what was just evaluated.
        candidates: everything evaluated, in order.
        price: image evaluations asked for; each point and chunk counts once, `SLOPE_PRICE` times if
            it is differentiated. What a memory of earlier searches knows costs as if it did not.

    Raises:
        InvalidInput: the budget does not pay for one complete evaluation.
    """

    ranges: Mapping[str, Range]
    choices: Sequence[Choice]
    goal: Goal
    sizes: Mapping[str, Sequence[int]]
    ask: Callable[[Coefficients, Choice, str, int], Answers]
    differentiate: Callable[[Coefficients, Choice, str, int, Of], Slope] | None = None
    layers: Sequence[str] = ()
    seed: int = 0
    budget: int | None = None
    tell: Callable[[Candidate | Slope], None] = lambda found: None
    candidates: list[Candidate] = field(default_factory=list, init=False)
    price: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._answers: dict[tuple[object, str, int], Answers] = {}
        self._slopes: dict[tuple[object, str, int, Of], Slope] = {}
        self._recorded: dict[object, Candidate] = {}
        if self.limit < self.full_price:
            raise InvalidInput(
                f"search.budget is {self.limit} image evaluations, but one evaluation of all "
                f"validation items costs {self.full_price}; set it to that or more, or leave it out"
            )

    @property
    def items(self) -> dict[str, int]:
        """Task -> the number of its validation items."""
        return {task: sum(sizes) for task, sizes in self.sizes.items()}

    @property
    def chunks(self) -> dict[str, int]:
        """Task -> the number of its chunks."""
        return {task: len(sizes) for task, sizes in self.sizes.items()}

    @property
    def full_price(self) -> int:
        """The price of one complete evaluation, in image evaluations."""
        return sum(self.items.values())

    @property
    def grid_price(self) -> int:
        """The price of all points of the ranges with all options."""
        points = prod(allowed.points for allowed in self.ranges.values())
        return points * len(self.choices) * self.full_price

    @property
    def limit(self) -> int:
        """The budget in image evaluations."""
        return self.grid_price if self.budget is None else self.budget

    @property
    def left(self) -> int:
        """What is left of the budget; some of it is kept for one complete evaluation."""
        return self.limit - self.price - self._kept()

    def evaluate(
        self, coefficients: Coefficients, choice: Choice, chunks: int | None = None
    ) -> Candidate:
        """Return a candidate with its answers on the first chunks of each task; None: all.

        Raises:
            Exhausted: the budget does not pay for it.
            ValueError: a coefficient is outside its range.
        """
        coefficients, wanted = self._inside(coefficients), self._wanted(chunks)
        point = _point(coefficients, choice)
        found = self._recorded.get((point, tuple(wanted.values())))
        if found is not None:
            return found
        complete = wanted == self.chunks
        self._pay(self.price_of(coefficients, choice, chunks), complete=complete)
        for task, chunk in self._new(point, wanted):
            self._answers[point, task, chunk] = self.ask(coefficients, choice, task, chunk)
        answers = {
            task: join(self._answers[point, task, chunk] for chunk in range(number))
            for task, number in wanted.items()
        }
        found = Candidate(coefficients, dict(choice), answers, complete)
        self._recorded[point, tuple(wanted.values())] = found
        self.candidates.append(found)
        self.tell(found)
        return found

    def price_of(
        self, coefficients: Coefficients, choice: Choice, chunks: int | None = None
    ) -> int:
        """Return what `evaluate` would cost: image evaluations that were not asked for before."""
        point = _point(self._inside(coefficients), choice)
        return sum(
            self.sizes[task][chunk] for task, chunk in self._new(point, self._wanted(chunks))
        )

    def slope(
        self, coefficients: Coefficients, choice: Choice, task: str, chunk: int, of: Of
    ) -> Slope:
        """Return the slope of a loss on one chunk; ``chunk`` counts round and round.

        Raises:
            Exhausted: the budget does not pay for it.
            InvalidInput: this model cannot be differentiated.
        """
        if self.differentiate is None:
            raise InvalidInput("this search cannot differentiate; choose a strategy without slopes")
        coefficients = self._inside(coefficients)
        chunk %= self.chunks[task]
        place = (_point(coefficients, choice), task, chunk, of)
        if place not in self._slopes:
            self._pay(self.slope_price(task, chunk), complete=False)
            self._slopes[place] = self.differentiate(coefficients, choice, task, chunk, of)
            self.tell(self._slopes[place])
        return self._slopes[place]

    def slope_price(self, task: str, chunk: int) -> int:
        """Return the price of a slope on one chunk, in image evaluations."""
        return SLOPE_PRICE * self.sizes[task][chunk % self.chunks[task]]

    def value(self, candidate: Candidate) -> float:
        """Return the objective."""
        return objective_value(candidate, self.goal.objective, self.goal.references)

    def gain(self, candidate: Candidate) -> float:
        """Return the objective with the sign that makes larger better."""
        return sign(self.goal.objective) * self.value(candidate)

    def smooth(self, candidate: Candidate) -> float:
        """Return the direction of the objective measured by cross-entropy; larger is better.

        Accuracy is a step function of the coefficients and its steps are noise; the mean
        cross-entropy over the objective's tasks, in nats, is smooth.
        """
        losses = [candidate.levels[task].loss for task in self.goal.objective.tasks]
        return -self.learning * sum(losses) / len(losses)

    def worth(self, candidate: Candidate, guide: str) -> float:
        """Return what a strategy makes large among feasible candidates.

        Args:
            candidate: any.
            guide: "objective" for `gain`, "loss" for `smooth`; with ``select: largest`` the size of
                the edit counts instead.
        """
        if self.goal.select == "largest":
            return sum(map(abs, candidate.coefficients.values()))
        return self.smooth(candidate) if guide == "loss" else self.gain(candidate)

    @property
    def learning(self) -> float:
        """1 if the objective wants a small cross-entropy, -1 if a large one."""
        objective = self.goal.objective
        wants_loss = "loss" in (objective.maximize, objective.minimize)
        return -sign(objective) if wants_loss else sign(objective)

    def slack(self, candidate: Candidate) -> float:
        """Return how far the worst control task is inside its bound; negative: outside."""
        return slack(candidate, self.goal.constraint, self.goal.references) + ROUNDING

    def chosen(self, candidates: Sequence[Candidate] | None = None) -> Candidate:
        """Return the best of some candidates, or of all, by the rules of `decide`."""
        among = self.candidates if candidates is None else candidates
        goal = self.goal
        place = decide(among, goal.objective, goal.constraint, goal.select, goal.references)
        return among[place]

    def _wanted(self, chunks: int | None) -> dict[str, int]:
        return {
            task: number if chunks is None else max(1, min(chunks, number))
            for task, number in self.chunks.items()
        }

    def _new(self, point: object, wanted: Mapping[str, int]) -> list[tuple[str, int]]:
        return [
            (task, chunk)
            for task, number in wanted.items()
            for chunk in range(number)
            if (point, task, chunk) not in self._answers
        ]

    def _pay(self, cost: int, *, complete: bool) -> None:
        kept = 0 if complete else self._kept()
        if self.price + cost + kept > self.limit:
            raise Exhausted
        self.price += cost

    def _kept(self) -> int:
        """Return what must stay in the budget for a result: one complete evaluation."""
        return 0 if any(item.complete for item in self.candidates) else self.full_price

    def _inside(self, coefficients: Coefficients) -> dict[str, float]:
        for name, value in coefficients.items():
            allowed = self.ranges[layered.base(name)]
            if not allowed.low <= value <= allowed.high:
                raise ValueError(f"{name} = {value} is not in [{allowed.low}, {allowed.high}]")
        return {name: float(coefficients[name]) + 0.0 for name in sorted(coefficients)}  # no -0.0


def solve(problem: Problem, strategy: Callable[..., None], options: Mapping[str, Any]) -> Candidate:
    """Let a strategy drive a problem to its end or to that of the budget; return the choice."""
    with suppress(Exhausted):
        strategy(problem, **options)
    if not any(candidate.complete for candidate in problem.candidates):
        _complete(problem)
    return problem.chosen()


def _complete(problem: Problem) -> None:
    """Evaluate the most promising point completely; the budget has been kept for that."""
    if not problem.candidates:
        first = {name: allowed.values()[0] for name, allowed in problem.ranges.items()}
        problem.evaluate(first, problem.choices[0])
        return
    most = max(candidate.items for candidate in problem.candidates)
    best = problem.chosen([item for item in problem.candidates if item.items == most])
    problem.evaluate(best.coefficients, best.choice)


def _point(coefficients: Coefficients, choice: Choice) -> object:
    return tuple(sorted(coefficients.items())), tuple(sorted(choice.items()))


def _metric(level: Level, constraint: Constraint) -> float:
    value: float = getattr(level, constraint.metric)
    return value


def _figures(level: Level) -> Iterable[float]:
    return level.accuracy, level.loss
