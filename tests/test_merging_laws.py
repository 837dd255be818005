"""Laws of merging methods: of all that are found by name, then of each published one."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from taskvec import lazy, plugins
from taskvec.errors import IncompatibleWeights, InvalidInput
from taskvec.lazy import Array, Held, Lazy
from tests import reference_merging as reference
from tests.test_lazy import GRAINS, array, coarse, equal_bytes, flat, values

Model = dict[str, Array]

law = settings(deadline=None, max_examples=8)
SHAPES = st.sampled_from(
    [(), (0,), (1,), (4,), (99,), (2, 3), (5, 4), (1, 6), (6, 1), (0, 3), (3, 0), (2, 3, 2, 2)]
)
NAMES = ("logit_scale", "proj", "resblocks.0.attn.w", "resblocks.1.ln.0.w")
KINDS = (
    "normal", "ties", "zero", "rank one", "large", "small", "tiny", "mixed", "outlier", "same",
    "opposite",
)  # fmt: skip
LABELS = "abcdefgh"


# --------------------------------------------------------------------------------------------
# The methods


def method(name: str) -> Callable[..., Lazy]:
    return getattr(plugins.load("merging", name), name)


def labelled(models: Sequence[Model | Lazy]) -> dict[str, Lazy]:
    """Return vectors with the labels a, b, c .."""
    vectors = [Held(model) if isinstance(model, dict) else model for model in models]
    return dict(zip(LABELS, vectors, strict=False))


def merge(name: str, *models: Model | Lazy, **options: Any) -> Model:
    """Return all tensors of the merging of a, b, c .."""
    return values(method(name)(labelled(models), **options))


@dataclass(frozen=True)
class Case:
    """A method with options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.options.values())])

    def __hash__(self) -> int:
        return hash(str(self))

    def __call__(self, vectors: Mapping[str, Lazy]) -> Lazy:
        required = {
            option: "a"  # the label of a vector
            for option, parameter in self.parameters.items()
            if parameter.default is parameter.empty
        }
        return method(self.name)(vectors, **{**required, **self.options})

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        found = inspect.signature(method(self.name)).parameters.values()
        return {each.name: each for each in found if each.kind is each.KEYWORD_ONLY}


FAST = {"wudi": {"steps": 4}}
FOUND = [Case(name, FAST.get(name, {})) for name in plugins.names("merging")]
VARIANTS = [
    Case("magnitude", {"scope": "tensor"}),
    Case("ties", {"variant": "sum", "density": 0.7}),
    Case("ties", {"variant": "normalized", "scope": "tensor"}),
    Case("dare", {"rescale": "l1", "p": 0.7}),
    Case("dare", {"rescale": "none"}),
    Case("breadcrumbs", {"scope": "tensor", "density": 0.6, "gamma": 0.4}),
    Case("della", {"rescale": "l1"}),
    Case("consensus", {"variant": "ties", "k": 1}),
    Case("lines", {"alpha": 0.2, "beta": 0.8}),
    Case("slerp", {"t": 0.1}),
    Case("iso_cts", {"common": 0.0}),
    Case("pcb", {"variant": "vision", "ratio": 0.5}),
    Case("pcb", {"ratio": 1.0}),
]
UNORDERED = [
    case
    for case in FOUND + VARIANTS
    if not plugins.constant("merging", case.name, "ORDERED", False)
]
SEVERAL = [
    case for case in FOUND + VARIANTS if plugins.constant("merging", case.name, "OPERANDS", 0) != 1
]
every_method = pytest.mark.parametrize("case", FOUND + VARIANTS, ids=str)


def normal(seed: int, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Model:
    """Return a model of usual sizes, in which no two magnitudes are equal."""
    shapes = shapes or dict(zip(NAMES, [(), (7, 5), (3, 4), (2, 3, 2, 2)], strict=True))
    random = np.random.default_rng(seed)
    return {name: array(random.normal(size=shape)) for name, shape in shapes.items()}


@cache
def arities(case: Case) -> list[int]:
    """Return how many vectors, of 1, 2 and 3, a method takes."""
    found = []
    for number in (1, 2, 3):
        try:
            case(labelled([normal(seed) for seed in range(number)]))
            found.append(number)
        except InvalidInput as error:
            refused = error
    assert found, f"{case} takes neither one vector nor two nor three: {refused}"
    return found


def drawn(kind: str, shape: tuple[int, ...], seed: int, first: Array | None) -> Array:
    """Return a tensor of a kind."""
    random = np.random.default_rng(seed)
    part: Any = random.normal(size=shape)
    match kind:
        case "ties":
            part = random.integers(-3, 4, size=shape) * random.choice([-0.125, 0.125], size=shape)
        case "zero":
            part = 0 * part
        case "rank one" if len(shape) == 2:
            part = random.normal(size=(shape[0], 1)) * random.normal(size=shape[1])
        case "large":
            part = part * 1e6
        case "small":
            part = part * 1e-12
        case "tiny":
            part = part * 1e-30
        case "mixed":
            part = part * 10 ** random.uniform(-30, 6, size=shape)
        case "outlier" if part.size:
            part = part * 1e-3
            part.flat[0] = 1e5
        case "same" if first is not None:
            part = first
        case "opposite" if first is not None:
            part = -first
    return array(part)


@st.composite
def groups(draw: st.DrawFn, case: Case, kinds: Sequence[str] = KINDS) -> list[Model]:
    """Return as many models of equal shapes as the method takes."""
    shapes = {name: draw(SHAPES) for name in NAMES}
    models: list[Model] = []
    for _ in range(draw(st.sampled_from(arities(case)))):
        kind = st.sampled_from(kinds)
        first = models[0] if models else dict.fromkeys(NAMES)
        models.append(
            {
                name: drawn(draw(kind), shape, draw(st.integers(0, 999)), first[name])
                for name, shape in shapes.items()
            }
        )
    return models


def largest(*models: Model) -> float:
    """Return the largest magnitude."""
    return max(float(np.abs(flat(model)).max(initial=0)) for model in models)


def assert_close(found: Model, expected: Mapping[str, Any], tolerance: float = 2e-6) -> None:
    """Compare to a fraction of the largest magnitude of each tensor."""
    assert found.keys() == expected.keys()
    for name, part in found.items():
        scale = float(np.abs(expected[name]).max(initial=0))
        np.testing.assert_allclose(part, expected[name], 0, tolerance * scale, err_msg=name)


def doubled(model: Model) -> dict[str, Any]:
    """Return a model in float64."""
    return {name: part.astype(np.float64) for name, part in model.items()}


def times(factor: float, model: Model) -> Model:
    return {name: array(factor * part) for name, part in model.items()}


def plus(*models: Model) -> dict[str, Any]:
    """Return the sum in float64."""
    return {name: sum(doubled(model)[name] for model in models) for name in models[0]}


# --------------------------------------------------------------------------------------------
# Every method


def test_methods_are_found() -> None:
    published = {*reference.SOURCES, "dare", "della", "layers"}
    assert published <= set(plugins.names("merging"))


@every_method
def test_a_method_takes_as_many_operands_as_its_module_says(case: Case) -> None:
    number = plugins.constant("merging", case.name, "OPERANDS", 0)
    assert arities(case) == ([number] if number else [1, 2, 3])


@every_method
@law
@given(st.data())
def test_a_merged_vector_has_the_shapes_of_its_operands_and_finite_elements(
    case: Case, data: st.DataObject
) -> None:
    models = data.draw(groups(case))
    found = values(case(labelled(models)))
    assert {name: part.shape for name, part in found.items()} == {
        name: part.shape for name, part in models[0].items()
    }
    assert all(np.isfinite(part).all() for part in found.values())


@every_method
@law
@given(st.data())
def test_a_merged_vector_has_the_same_bytes_however_it_is_cut(
    case: Case, data: st.DataObject
) -> None:
    models = data.draw(groups(case))
    vector = case(labelled(models))
    whole = values(vector)
    assert equal_bytes(values(vector, block=data.draw(st.integers(1, 100))), whole)
    name = data.draw(st.sampled_from(NAMES))
    start = data.draw(st.integers(0, whole[name].size))
    stop = data.draw(st.integers(start, whole[name].size))
    found = [part for _, (part,) in lazy.blocks([vector], name, start, stop, 8)]
    assert b"".join(map(np.ndarray.tobytes, found)) == whole[name].ravel()[start:stop].tobytes()


@every_method
@law
@given(st.data())
def test_a_merged_vector_has_the_same_bytes_for_any_number_of_workers(
    case: Case, data: st.DataObject
) -> None:
    models = data.draw(groups(case))
    found = []
    for number in (1, 2, 3, 1):
        with lazy.workers(number):
            found.append(values(case(labelled(models))))
    assert all(equal_bytes(found[0], other) for other in found[1:])


@every_method
@law
@given(st.data())
def test_merging_leaves_its_operands_as_they_are(case: Case, data: st.DataObject) -> None:
    models = data.draw(groups(case))
    before = [{name: part.tobytes() for name, part in model.items()} for model in models]
    for model in models:
        for part in model.values():
            part.flags.writeable = False  # to write raises
    values(case(labelled(models)))
    assert before == [{k: part.tobytes() for k, part in model.items()} for model in models]


@every_method
@law
@given(st.data())
def test_operands_may_themselves_be_computed_by_rows_or_whole_tensors(
    case: Case, data: st.DataObject
) -> None:
    models = data.draw(groups(case))
    computed = [coarse(Held(model), data.draw(GRAINS)) for model in models]
    assert equal_bytes(values(case(labelled(computed))), values(case(labelled(models))))


@every_method
@law
@given(st.data())
def test_merging_zero_vectors_gives_the_zero_vector(case: Case, data: st.DataObject) -> None:
    models = data.draw(groups(case, kinds=["zero"]))
    assert not any(part.any() for part in values(case(labelled(models))).values())


@pytest.mark.parametrize("case", UNORDERED, ids=str)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_the_operands_changes_rounding_alone(case: Case, seed: int) -> None:
    vectors = labelled([normal(seed + 10 * place) for place in range(max(arities(case)))])
    turned = dict(reversed(vectors.items()))
    assert_close(values(case(turned)), values(case(vectors)), 1e-4)


@every_method
def test_labels_matter_only_to_methods_that_draw_by_label_or_ask_for_one(case: Case) -> None:
    models = [normal(seed) for seed in range(max(arities(case)))]
    first = "a" if "task" in case.parameters else "b"
    named = dict(zip(("a", "x", "y"), map(Held, models), strict=False))
    others = dict(zip((first, "q", "p"), map(Held, models), strict=False))
    same = equal_bytes(values(case(named)), values(case(others)))
    assert same != ("seed" in case.parameters)


@every_method
def test_a_merged_vector_of_millions_has_the_same_bytes_for_any_number_of_workers(
    case: Case,
) -> None:
    models = wide()[: max(arities(case))]
    found = []
    for number in (1, 3):
        with lazy.workers(number):
            found.append(values(case(labelled(models))))
    assert equal_bytes(*found)
    assert np.isfinite(flat(found[0])).all() and flat(found[0]).any()


@cache
def wide() -> list[Model]:
    """Return models of which one tensor fills more than a unit, and a matrix more than a block."""
    shapes = {"resblocks.0.w": (1_050_000,), "resblocks.1.w": (280, 240), "s": ()}
    return [normal(seed, shapes) for seed in range(3)]


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_operands_of_other_shapes_are_refused(case: Case) -> None:
    models = [normal(seed) for seed in range(max(arities(case)))]
    models[-1]["proj"] = models[-1]["proj"].T
    with pytest.raises(IncompatibleWeights, match=r"'proj' has the shape \(7, 5\)"):
        case(labelled(models))


INFINITE = [math.nan, math.inf, -math.inf]
WRONG: dict[str, list[Any]] = {
    "density": [0.0, -0.1, 1.5, "half"],
    "scope": ["everywhere"],
    "variant": ["best"],
    "rescale": ["l3"],
    "p": [1.0, -0.1],
    "gamma": [1.0, -0.1],
    "threshold": [-0.1],
    "task": ["mnist"],
    "seed": [0.5],
    "ratio": [0.0, 1.5],
    "common": [-0.1, 1.5],
    "steps": [-1],
    "learning_rate": [-1.0],
    "k": [-1],
    "t": [-0.1, 1.1],
    "first": [-1],
    "last": [-2],
}


@pytest.mark.parametrize(
    ("case", "option", "wrong"),
    [
        (case, option, wrong)
        for case in FOUND
        for option, parameter in case.parameters.items()
        for wrong in WRONG.get(option, []) + INFINITE * isinstance(parameter.default, float)
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_the_value_that_was_found(
    case: Case, option: str, wrong: Any
) -> None:
    with pytest.raises(InvalidInput) as caught:
        Case(case.name, {**case.options, option: wrong})(
            labelled([normal(seed) for seed in range(max(arities(case)))])
        )
    assert str(wrong) in str(caught.value)
    assert option in str(caught.value)


# --------------------------------------------------------------------------------------------
# Families of methods

every_seed = pytest.mark.parametrize("seed", [1, 2, 3])


def cases(names: str) -> Callable[[Any], Any]:
    """Parametrise over all cases of some methods."""
    chosen = [case for case in FOUND + VARIANTS if case.name in names.split()]
    return pytest.mark.parametrize("case", chosen, ids=str)


SEPARATE = (
    "task_arithmetic average magmax dare breadcrumbs della tall_mask tsv_m iso_c iso_cts wudi "
    "model_stock slerp random_like"
)
HOMOGENEOUS = (
    "task_arithmetic average magnitude magmax ties dare breadcrumbs della tall_mask consensus "
    "lines layers tsv_m iso_c iso_cts model_stock slerp"
)


@cases(SEPARATE)
@law
@given(st.data())
def test_tensors_are_merged_each_by_itself(case: Case, data: st.DataObject) -> None:
    models = data.draw(groups(case))
    name = data.draw(st.sampled_from(NAMES))
    alone = values(case(labelled([{name: model[name]} for model in models])))
    assert equal_bytes(alone, {name: values(case(labelled(models)))[name]})


@cases("magnitude ties")
@law
@given(st.data())
def test_trimming_in_the_scope_of_tensors_merges_each_by_itself(
    case: Case, data: st.DataObject
) -> None:
    models = data.draw(groups(case))
    name = data.draw(st.sampled_from(NAMES))
    scoped = Case(case.name, {**case.options, "scope": "tensor"})
    alone = values(scoped(labelled([{name: model[name]} for model in models])))
    flat_alone = Case(case.name, {**case.options, "scope": "flat"})(
        labelled([{name: model[name]} for model in models])
    )
    assert equal_bytes(alone, values(flat_alone))
    if case.name == "magnitude":  # TIES lets the majority of the model decide where signs cancel
        assert equal_bytes(alone, {name: values(scoped(labelled(models)))[name]})


@cases(HOMOGENEOUS)
@every_seed
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_operands_of_another_length_give_the_same_direction(
    case: Case, seed: int, factor: float
) -> None:
    models = [normal(seed + 10 * place) for place in range(max(arities(case)))]
    longer = values(case(labelled([times(factor, model) for model in models])))
    assert_close(longer, times(factor, values(case(labelled(models)))))


@cases(HOMOGENEOUS + " pcb wudi")
@every_seed
def test_the_opposite_operands_give_the_opposite(case: Case, seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(max(arities(case)))]
    opposite = values(case(labelled([times(-1, model) for model in models])))
    assert_close(opposite, times(-1, values(case(labelled(models)))))


SPECTRAL = ("tsv_m", "iso_c", "iso_cts", "wudi")
LARGER = {
    "resblocks.0.w": (30, 20),
    "resblocks.1.w": (20, 31),
    "resblocks.2.w": (24, 24),
    "resblocks.3.w": (3, 4, 2, 2),
    "bias": (50,),
    "logit_scale": (),
}


@cases(" ".join(reference.SOURCES))
@every_seed
def test_a_method_agrees_with_its_formula_written_plainly(case: Case, seed: int) -> None:
    for number in arities(case):
        models = [normal(seed + 10 * place, LARGER) for place in range(number)]
        exact = {label: doubled(model) for label, model in zip("abc", models, strict=False)}
        options = {"task": "a", **case.options} if case.name == "tall_mask" else case.options
        expected = getattr(reference, case.name)(exact, **options)
        tolerance = 1e-4 if case.name in SPECTRAL else 1e-5  # singular vectors in float32
        assert_close(values(case(labelled(models))), expected, tolerance)


@cases("average magmax model_stock slerp")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("same", "opposite")])
def test_merging_a_vector_with_itself_changes_nothing(case: Case, kind: str) -> None:
    for number in arities(case):
        model = {name: drawn(kind, part.shape, 7, None) for name, part in normal(0).items()}
        assert_close(values(case(labelled([model] * number))), model, 1e-6)


@cases("task_arithmetic average magmax tall_mask tsv_m wudi model_stock")
@every_seed
def test_merging_one_vector_gives_that_vector(case: Case, seed: int) -> None:
    assert_close(values(case(labelled([normal(seed)]))), normal(seed), 1e-5)


@pytest.mark.parametrize("name", ["average", "magmax", "ties", "pcb"])
@every_seed
def test_an_element_of_the_merged_vector_lies_between_those_of_the_operands_and_zero(
    name: str, seed: int
) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    stack = np.array([flat(model) for model in models])
    found = flat(merge(name, *models))
    assert (found <= np.maximum(0, stack.max(0)) + 1e-6).all()
    assert (found >= np.minimum(0, stack.min(0)) - 1e-6).all()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 49, 50, 99, 100, 101])
@pytest.mark.parametrize("scope", ["flat", "tensor"])
def test_trimming_tiny_tensors_keeps_the_whole_part_of_the_share_and_at_least_one_element(
    number: int, scope: str
) -> None:
    model = normal(number, {"w": (number,)})
    for name in ("magnitude", "ties"):
        found = merge(name, model, density=0.2, scope=scope)
        assert np.count_nonzero(found["w"]) == max(1, math.floor(0.2 * number))


@pytest.mark.parametrize(("number", "kept"), [(1, 1), (50, 45), (99, 89), (100, 90), (101, 90)])
@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_tiny_tensors_are_not_lost_among_the_breadcrumbs(
    number: int, kept: int, scope: str
) -> None:
    model = normal(number, {"w": (number,)})
    found = merge("breadcrumbs", model, density=0.9, gamma=0.01, scope=scope)
    assert np.count_nonzero(found["w"]) == kept


@pytest.mark.parametrize("name", ["magnitude", "ties", "breadcrumbs"])
@pytest.mark.parametrize("scope", ["tensor", None])
def test_a_scalar_is_kept(name: str, scope: str | None) -> None:
    options = {"scope": scope} if scope else {}
    model = {"logit_scale": array(0.3)}
    assert equal_bytes(merge(name, model, **options), model)


# --------------------------------------------------------------------------------------------
# Sums


@every_seed
def test_task_arithmetic_over_the_number_of_tasks_is_the_average(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    summed = method("task_arithmetic")(labelled(models))
    assert_close(values(lazy.combination([(summed, 1 / 3)])), merge("average", *models))


@every_seed
def test_task_arithmetic_adds_bit_for_bit_in_the_order_given(seed: int) -> None:
    a, b, c = (normal(seed + 10 * place) for place in range(3))
    expected = {name: a[name] + b[name] + c[name] for name in a}
    assert equal_bytes(merge("task_arithmetic", a, b, c), expected)


@every_seed
def test_magmax_takes_the_operand_that_is_largest_in_each_place(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    stack = np.array([flat(model) for model in models])
    assert flat(merge("magmax", *models)).tolist() == [
        max(column, key=abs) for column in stack.T.tolist()
    ]


# --------------------------------------------------------------------------------------------
# Trimming


@every_seed
@pytest.mark.parametrize("density", [0.001, 0.2, 0.29, 0.5, 0.999, 1])
def test_magnitude_keeps_exactly_the_largest_elements_of_the_model(
    seed: int, density: float
) -> None:
    model = normal(seed)
    found, whole = flat(merge("magnitude", model, density=density)), flat(model)
    kept = found != 0
    assert kept.sum() == max(1, math.floor(density * whole.size))
    assert found[kept].tobytes() == whole[kept].tobytes()
    assert np.abs(whole[kept]).min() > np.abs(whole[~kept]).max(initial=0)


@every_seed
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_magnitude_by_tensor_keeps_the_share_of_each(seed: int, density: float) -> None:
    model = normal(seed)
    for name, part in merge("magnitude", model, density=density, scope="tensor").items():
        assert np.count_nonzero(part) == max(1, math.floor(density * part.size))
        assert set(part[part != 0]) <= set(model[name].ravel())


@pytest.mark.parametrize("scope", ["flat", "tensor"])
@law
@given(st.data(), st.floats(0.01, 1))
def test_pruning_twice_is_pruning_once(scope: str, data: st.DataObject, density: float) -> None:
    (model, *_) = data.draw(groups(Case("magnitude")))
    once = merge("magnitude", model, density=density, scope=scope)
    assert equal_bytes(merge("magnitude", once, density=density, scope=scope), once)


def test_elements_as_large_as_the_last_that_is_kept_are_kept_too() -> None:
    model = {"w": array([3, -1, 1, 2, -1, 0.5])}
    for name in ("magnitude", "ties"):
        assert merge(name, model, density=0.5)["w"].tolist() == [3, -1, 1, 2, -1, 0]
    found = merge("breadcrumbs", model, density=0.34, gamma=0.2, scope="tensor")
    assert found["w"].tolist() == [0, -1, 1, 2, -1, 0]


@law
@given(st.data())
def test_trimming_to_all_elements_is_task_arithmetic(data: st.DataObject) -> None:
    models = data.draw(groups(Case("magnitude")))
    summed = merge("task_arithmetic", *models)
    for scope in ("flat", "tensor"):
        assert np.array_equal(
            flat(merge("magnitude", *models, density=1, scope=scope)), flat(summed)
        )
    for scope in ("row", "tensor"):
        found = merge("breadcrumbs", *models, density=1, gamma=0, scope=scope)
        assert np.array_equal(flat(found), flat(summed))


@pytest.mark.parametrize("variant", ["mean", "sum", "normalized"])
@pytest.mark.parametrize("scope", ["flat", "tensor"])
@law
@given(st.data())
def test_ties_of_one_whole_vector_is_that_vector(
    variant: str, scope: str, data: st.DataObject
) -> None:
    (model, *_) = data.draw(groups(Case("ties")))
    found = merge("ties", model, density=1, variant=variant, scope=scope)
    assert np.array_equal(flat(found), flat(model))


@every_seed
def test_ties_of_vectors_that_agree_is_their_mean_or_sum(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    signed = [{k: np.abs(v) * np.sign(models[0][k]) for k, v in model.items()} for model in models]
    for variant, expected in (("mean", "average"), ("sum", "task_arithmetic")):
        found = merge("ties", *signed, density=1, variant=variant)
        assert_close(found, merge(expected, *signed))


@every_seed
def test_ties_adds_only_what_has_the_sign_of_the_sum(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    trimmed = np.array([flat(merge("magnitude", model, density=0.6)) for model in models])
    signs = np.sign(trimmed.sum(0, dtype=np.float64))
    agreeing = np.where(trimmed * signs > 0, trimmed, 0).sum(0, dtype=np.float64)
    found = flat(merge("ties", *models, density=0.6, variant="sum"))
    np.testing.assert_allclose(found, agreeing, 1e-6)
    assert np.array_equal(np.sign(found), signs)


def test_where_signs_cancel_ties_follows_the_majority() -> None:
    a, b = {"w": array([1, 2, 3, -1])}, {"w": array([-1, 1, 1, -1])}
    assert merge("ties", a, b, density=1)["w"].tolist() == [1, 1.5, 2, -1]
    opposite = merge("ties", times(-1, a), times(-1, b), density=1)
    assert opposite["w"].tolist() == [-1, -1.5, -2, 1]
    even = merge("ties", {"w": array([1, 2, -2])}, {"w": array([-1, 2, -2])}, density=1)
    assert even["w"].tolist() == [0, 2, -2]


@every_seed
def test_the_normalized_variant_of_ties_divides_by_the_weights_that_agree(seed: int) -> None:
    a, b = normal(seed), normal(seed + 10)
    half = [lazy.combination([(Held(model), 0.5)]) for model in (a, b)]
    mean = merge("ties", a, b, density=1)
    assert_close(merge("ties", *half, density=1, variant="normalized"), mean)
    assert_close(merge("ties", *half, density=1, variant="mean"), times(0.5, mean))
    assert_close(merge("ties", a, b, density=1, variant="normalized"), mean)
    found = merge("ties", half[0], b, density=1, variant="normalized")
    for name, part in found.items():
        first, second = 0.5 * a[name].astype(np.float64), b[name].astype(np.float64)
        both = (first + second) / 1.5
        alone = np.where(np.abs(first) > np.abs(second), first / 0.5, second)
        np.testing.assert_allclose(part, np.where(first * second > 0, both, alone), 1e-5, 1e-7)


# --------------------------------------------------------------------------------------------
# Breadcrumbs


@every_seed
@pytest.mark.parametrize(("density", "gamma"), [(0.2, 0.1), (0.5, 0.25), (0.3, 0.7), (1, 0.5)])
def test_breadcrumbs_drops_the_largest_and_keeps_the_next_of_each_row(
    seed: int, density: float, gamma: float
) -> None:
    model = normal(seed, {"w": (6, 23), "v": (2, 3, 4, 10), "b": (17,)})
    found = merge("breadcrumbs", model, density=density, gamma=gamma)
    for name, part in model.items():
        n = part.shape[-1]
        dropped = int(gamma * n)
        kept = min(max(1, int(density * n)), n - dropped)
        rows = zip(part.reshape(-1, n), found[name].reshape(-1, n), strict=True)
        for row, left in rows:
            order = np.argsort(-np.abs(row))
            assert set(np.flatnonzero(left)) == set(order[dropped : dropped + kept])
            assert set(left[left != 0]) <= set(row)


@pytest.mark.parametrize("scope", ["row", "tensor"])
@law
@given(st.data(), st.floats(0.01, 1))
def test_breadcrumbs_that_drops_nothing_is_pruning(
    scope: str, data: st.DataObject, density: float
) -> None:
    models = data.draw(groups(Case("breadcrumbs")))
    found = merge("breadcrumbs", *models, density=density, gamma=0, scope=scope)
    if scope == "tensor":
        expected = merge("magnitude", *models, density=density, scope="tensor")
        assert np.array_equal(flat(found), flat(expected))
        return
    for name, part in models[0].items():
        length = part.shape[-1] if part.shape else 1
        for place in range(part.size // length if length else 0):
            rows = [{"row": m[name].reshape(-1, length)[place]} for m in models]
            expected = merge("magnitude", *rows, density=density)
            assert np.array_equal(found[name].reshape(-1, length)[place], expected["row"])


@law
@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0, 0.99), st.integers(0, 99))
def test_in_a_tensor_of_one_row_rows_and_tensors_have_the_same_breadcrumbs(
    number: int, density: float, gamma: float, seed: int
) -> None:
    # Together above 1, "tensor" drops less, as mergekit does, and "row" keeps less.
    assume(int(gamma * number) + max(1, int(density * number)) <= number)
    model = normal(seed, {"w": (1, number)})
    by_row = merge("breadcrumbs", model, density=density, gamma=gamma, scope="row")
    by_tensor = merge("breadcrumbs", model, density=density, gamma=gamma, scope="tensor")
    assert equal_bytes(by_row, by_tensor)
    assert by_row["w"].any()


# --------------------------------------------------------------------------------------------
# Random masks

LONG = {"w": (40, 500), "v": (20_000,)}


@law
@given(st.data(), st.integers(0, 99))
def test_dare_that_drops_nothing_is_task_arithmetic(data: st.DataObject, seed: int) -> None:
    models = data.draw(groups(Case("dare")))
    for rescale in ("unbiased", "none"):
        found = merge("dare", *models, p=0, seed=seed, rescale=rescale)
        assert np.array_equal(flat(found), flat(merge("task_arithmetic", *models)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dare_keeps_each_element_with_the_same_probability_and_divides_by_it(p: float) -> None:
    model = normal(1, LONG)
    found = merge("dare", model, p=p)
    for name, part in found.items():
        kept = part != 0
        deviation = math.sqrt(p * (1 - p) / part.size)
        assert kept.mean() == pytest.approx(1 - p, abs=4 * deviation)
        np.testing.assert_allclose(part[kept], model[name][kept] / (1 - p), 1e-6)
    halves = np.split(found["v"] != 0, 2)
    assert halves[0].mean() == pytest.approx(halves[1].mean(), abs=0.03)
    assert np.mean(halves[0] == halves[1]) == pytest.approx(p**2 + (1 - p) ** 2, abs=0.02)


@pytest.mark.parametrize("case", [Case("dare", {"p": 0.7}), Case("della")], ids=str)
def test_the_mean_over_seeds_tends_to_the_vector(case: Case) -> None:
    model = normal(1, {"w": (20, 50)})
    seeds = range(150)
    drawn_ = [
        merge(case.name, model, **case.options, seed=seed)["w"].astype(np.float64) for seed in seeds
    ]
    mean = np.mean(drawn_, 0)
    noise = np.mean(np.var(drawn_, 0)) / len(seeds)  # what remains of it in the mean
    assert np.mean((mean - model["w"]) ** 2) == pytest.approx(noise, rel=0.25)
    assert noise < 0.02 * np.mean(model["w"] ** 2)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_masks_differ_between_seeds_labels_and_tensors_and_stay_with_them(name: str) -> None:
    part = normal(1, LONG)["v"]
    merged = method(name)

    def mask(label: str = "a", tensor: str = "v", seed: int = 0, factor: float = 1) -> Array:
        vectors = {label: Held({tensor: array(factor * part), "x": array(2)})}
        return values(merged(vectors, seed=seed))[tensor] != 0

    first = mask()
    for other in (mask(label="b"), mask(tensor="w"), mask(seed=1), mask(seed=-1)):
        assert 0.4 < np.mean(first == other) < 0.6
    assert np.array_equal(first, mask(factor=-8))
    alone = values(merged({"a": Held({"v": part})}))["v"]
    both = values(merged({"c": Held({"v": 0 * part}), "a": Held({"v": part})}))["v"]
    assert np.array_equal(alone, both)


@pytest.mark.parametrize("name", ["dare", "della"])
def test_masked_vectors_can_keep_their_elements_or_their_sum_of_magnitudes(name: str) -> None:
    model = normal(1, LONG)
    plain = merge(name, model, rescale="none")
    scaled = merge(name, model, rescale="l1")
    for tensor, part in model.items():
        kept = plain[tensor] != 0
        assert 0 < kept.sum() < part.size
        assert plain[tensor][kept].tobytes() == part[kept].tobytes()
        assert np.array_equal(scaled[tensor] != 0, kept)
        assert np.abs(scaled[tensor]).sum() == pytest.approx(np.abs(part).sum(), rel=1e-5)
        ratio = scaled[tensor][kept] / part[kept]
        np.testing.assert_allclose(ratio, ratio[0], 1e-5)


def test_della_keeps_large_elements_of_a_row_more_often_in_proportion_to_their_rank() -> None:
    model = normal(1, {"w": (4, 5000)})
    found = merge("della", model, density=0.4, epsilon=0.2)
    for row, left in zip(model["w"], found["w"], strict=True):
        ranks = np.argsort(np.argsort(np.abs(row), kind="stable"))  # equal ones by place
        chance = 0.2 + 0.4 * ranks / (len(row) - 1)
        kept = left != 0
        np.testing.assert_allclose(left[kept] * chance[kept], row[kept], 1e-5)
        for low in (0, 0.25, 0.5, 0.75):
            quarter = (ranks >= low * len(row)) & (ranks < (low + 0.25) * len(row))
            assert kept[quarter].mean() == pytest.approx(chance[quarter].mean(), abs=0.05)


def test_della_without_a_spread_keeps_and_rescales_as_dare_does() -> None:
    model = normal(1, LONG)
    found = merge("della", model, density=0.4, epsilon=0)
    kept = found["v"] != 0
    assert kept.mean() == pytest.approx(0.4, abs=0.015)
    np.testing.assert_allclose(found["v"][kept], model["v"][kept] / 0.4, 1e-6)


def test_della_keeps_rows_of_one_element_with_the_mean_probability() -> None:
    model = normal(1, {"column": (3000, 1)})
    found = merge("della", model, density=0.3, epsilon=0.2)["column"]
    kept = found != 0
    assert kept.mean() == pytest.approx(0.3, abs=0.035)
    np.testing.assert_allclose(found[kept], model["column"][kept] / 0.3, 1e-6)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("dare", {"p": 0.5, "seed": 0, "rescale": "unbiased"}),
        ("della", {"density": 0.5, "epsilon": 0.15, "seed": 0, "rescale": "unbiased"}),
    ],
)
def test_options_that_are_left_out_are_the_published_ones(
    name: str, published: dict[str, Any]
) -> None:
    assert equal_bytes(merge(name, normal(1)), merge(name, normal(1), **published))
    for option, other in {"p": 0.4, "density": 0.4, "epsilon": 0.1, "seed": 1}.items():
        if option in published:
            assert not equal_bytes(
                merge(name, normal(1)), merge(name, normal(1), **{option: other})
            )


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.9, 0.2), (0.1, 0.2), (0.5, -0.1), (0.25, 0.25), (0.75, 0.25)]
)
def test_della_refuses_probabilities_outside_zero_and_one(density: float, epsilon: float) -> None:
    with pytest.raises(InvalidInput, match=str(epsilon)):
        merge("della", normal(1), density=density, epsilon=epsilon)


# --------------------------------------------------------------------------------------------
# Masks of tasks


@law
@given(st.data(), st.sampled_from(["a", "b"]))
def test_a_task_keeps_elements_of_the_sum_or_nothing(data: st.DataObject, task: str) -> None:
    models = data.draw(groups(Case("tall_mask")))
    models = models if len(models) > 1 else models * 2
    summed = flat(merge("task_arithmetic", *models))
    found = flat(merge("tall_mask", *models, task=task))
    assert ((found == summed) | (found == 0)).all()


@every_seed
def test_a_mask_keeps_less_the_higher_its_threshold(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    kept = [
        flat(merge("tall_mask", *models, task="b", threshold=threshold)) != 0
        for threshold in (1e-9, 0.2, 0.6, 2, 1e9)
    ]
    assert kept[0].all() and not kept[-1].any()
    assert all((more | ~less).all() for more, less in zip(kept, kept[1:], strict=False))
    assert len({mask.sum() for mask in kept}) == 5


@pytest.mark.parametrize(
    ("variant", "merged", "options"),
    [("ta", "task_arithmetic", {}), ("ties", "ties", {"density": 0.2, "variant": "sum"})],
)
@law
@given(st.data())
def test_a_consensus_of_none_is_the_whole_sum_and_of_more_than_all_nothing(
    variant: str, merged: str, options: dict[str, Any], data: st.DataObject
) -> None:
    models = data.draw(groups(Case("consensus")))
    whole = flat(merge(merged, *models, **options))
    assert np.array_equal(flat(merge("consensus", *models, k=0, variant=variant)), whole)
    more = merge("consensus", *models, k=len(models) + 1, variant=variant)
    assert not flat(more).any()


@every_seed
def test_a_consensus_counts_the_masks_of_the_tasks(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    summed = flat(merge("task_arithmetic", *models))
    masks = [flat(merge("tall_mask", *models, task=task)) != 0 for task in "abc"]
    for k in (1, 2, 3):
        found = flat(merge("consensus", *models, k=k))
        assert np.array_equal(found, np.where(np.sum(masks, 0) >= k, summed, 0))
    assert 0 < np.count_nonzero(found) < summed.size


# --------------------------------------------------------------------------------------------
# Layers


def stack(layers: int) -> Model:
    """Return a network of blocks whose parts are numbered too, and tensors outside."""
    names = ["proj", "ln_post.weight"]
    for layer in range(layers):
        names += [f"resblocks.{layer}.ln.0.w", f"resblocks.{layer}.mlp.1.w"]
    return {name: np.ones(2, np.float32) for name in names}


def test_lines_scales_a_block_by_its_own_number_not_by_numbers_inside_it() -> None:
    found = merge("lines", stack(12), alpha=0, beta=1)
    assert found["resblocks.7.ln.0.w"].tolist() == [np.float32(7 / 11)] * 2
    assert found["resblocks.0.mlp.1.w"].tolist() == [0, 0]
    assert found["resblocks.11.ln.0.w"].tolist() == [1, 1]
    assert found["proj"].tolist() == found["ln_post.weight"].tolist() == [0, 0]


def test_lines_scales_linearly_from_alpha_and_tensors_outside_the_blocks_by_alpha() -> None:
    for name, part in merge("lines", stack(5), alpha=0.2, beta=0.6).items():
        layer = int(name.split(".")[1]) if name.startswith("resblocks") else 0
        np.testing.assert_allclose(part, 0.2 + 0.6 * layer / 4, 1e-6)


@every_seed
def test_the_published_rule_gives_a_sum_of_tasks_the_length_of_their_average(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    summed = method("task_arithmetic")(labelled(models))
    average = merge("average", *models)
    assert_close(merge("lines", summed), average)
    assert_close(merge("lines", lazy.combination([(summed, 0.37)])), average)
    assert_close(merge("lines", models[0]), models[0])


@every_seed
def test_the_published_rule_compares_a_merged_vector_with_the_sum_of_its_tasks(seed: int) -> None:
    models = [normal(seed + 10 * place) for place in range(3)]
    merged = method("ties")(labelled(models))
    exact = {label: doubled(model) for label, model in zip("abc", models, strict=True)}
    expected = reference.lines({"m": reference.ties(exact)}, beta=0.5, leaves=exact)
    assert_close(merge("lines", merged, beta=0.5), expected)


def test_layers_are_cut_out_by_their_own_number_and_all_else_is_zero() -> None:
    for name, part in merge("layers", stack(12), first=3, last=7).items():
        inside = name.startswith("resblocks") and 3 <= int(name.split(".")[1]) <= 7
        assert part.tolist() == [inside, inside], name


@pytest.mark.parametrize(("name", "options"), [("lines", {"alpha": 0, "beta": 1}), ("layers", {})])
def test_two_towers_are_counted_each_by_itself(name: str, options: dict[str, Any]) -> None:
    towers = {
        f"{tower}.resblocks.{layer}.w": np.ones(1, np.float32)
        for tower, depth in (("visual", 12), ("text", 3))
        for layer in range(depth)
    }
    found = merge(name, towers, **options)
    assert found["visual.resblocks.11.w"] == found["text.resblocks.2.w"] == 1
    if name == "lines":
        assert found["text.resblocks.1.w"] == 0.5
        assert found["visual.resblocks.1.w"] == np.float32(1 / 11)


@every_seed
def test_ranges_of_layers_that_share_nothing_add_up_to_all_layers(seed: int) -> None:
    model = {name: part * seed for name, part in stack(6).items()}
    inside = {name for name in model if name.startswith("resblocks")}
    parts = [merge("layers", model, first=a, last=b) for a, b in ((0, 1), (2, 2), (3, -1))]
    for name in inside:
        assert plus(*parts)[name].tolist() == model[name].tolist()
    for name, part in merge("layers", model).items():
        assert name not in inside or part.tolist() == model[name].tolist()


@pytest.mark.parametrize(
    ("model", "options", "found"),
    [
        (stack(3), {"first": 3}, "the vector has 3 blocks"),
        (stack(3), {"first": 2, "last": 1}, "the vector has 3 blocks"),
        (stack(0), {}, "the vector has no blocks"),
    ],
)
def test_a_range_without_layers_is_refused_with_their_number(
    model: Model, options: dict[str, int], found: str
) -> None:
    with pytest.raises(InvalidInput, match=found):
        merge("layers", model, **options)


@pytest.mark.parametrize("name", ["lines", "layers"])
def test_methods_of_one_vector_refuse_two(name: str) -> None:
    with pytest.raises(InvalidInput, match="2"):
        merge(name, stack(3), stack(3))


# --------------------------------------------------------------------------------------------
# Competition of parameters


@every_seed
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_pcb_of_one_vector_keeps_its_largest_elements(seed: int, ratio: float) -> None:
    model = normal(seed, {"w": (400,)})
    found, whole = merge("pcb", model, ratio=ratio)["w"], model["w"]
    kept = found != 0
    assert kept.sum() == pytest.approx(ratio * whole.size, abs=2)
    assert np.abs(whole[kept]).min() > np.abs(whole[~kept]).max()
    clipped = np.sort(np.abs(whole))[-2]
    np.testing.assert_allclose(found[kept], np.clip(whole[kept], -clipped, clipped), 1e-6)


@pytest.mark.parametrize("variant", ["flat", "vision"])
def test_pcb_of_vectors_without_elements_has_none(variant: str) -> None:
    empty = {"w": np.zeros((0, 3), np.float32)}
    found = merge("pcb", empty, empty, variant=variant)
    assert found["w"].shape == (0, 3)


# --------------------------------------------------------------------------------------------
# Singular values


def singular(part: Array) -> Any:
    return np.linalg.svd(part.astype(np.float64), compute_uv=False)


MATRICES = {"tall": (9, 5), "wide": (4, 7), "square": (6, 6), "conv": (2, 3, 2, 2), "bias": (8,)}
is_matrix = [name for name, shape in MATRICES.items() if len(shape) == 2]


@pytest.mark.parametrize("name", SPECTRAL)
@every_seed
def test_what_is_not_a_matrix_is_averaged(name: str, seed: int) -> None:
    models = [normal(seed + 10 * place, MATRICES) for place in range(3)]
    found, average = merge(name, *models), merge("average", *models)
    assert_close({k: found[k] for k in ("conv", "bias")}, {k: average[k] for k in ("conv", "bias")})
    assert all(np.abs(found[name] - average[name]).max() > 0.01 for name in is_matrix)


@every_seed
@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_isotropic_merging_gives_equal_singular_values(seed: int, name: str, number: int) -> None:
    models = [normal(seed + 10 * place, MATRICES) for place in range(number)]
    found = merge(name, *models)
    for matrix in is_matrix:
        spectrum = singular(found[matrix])
        np.testing.assert_allclose(spectrum, spectrum[0], 1e-5)
        if name == "iso_c":
            summed = sum(singular(np.asarray(plus(*models)[matrix])))
            assert spectrum.sum() == pytest.approx(summed, rel=1e-5)


@every_seed
def test_iso_cts_without_task_specific_directions_is_iso_c(seed: int) -> None:
    models = [normal(seed + 10 * place, MATRICES) for place in range(2)]
    assert_close(merge("iso_cts", *models, common=1), merge("iso_c", *models), 1e-4)
    assert_close(merge("iso_cts", models[0]), merge("iso_c", models[0]), 1e-4)


@every_seed
def test_tsv_m_adds_tasks_of_low_rank_that_share_no_direction(seed: int) -> None:
    random = np.random.default_rng(seed)
    models = [{"w": np.zeros((8, 9), np.float32)} for _ in range(2)]
    for place, model in enumerate(models):
        rows, columns = slice(4 * place, 4 * place + 4), slice(4 * place, 4 * place + 4)
        model["w"][rows, columns] = random.normal(size=(4, 4))
    assert_close(merge("tsv_m", *models), plus(*models), 1e-5)


@every_seed
@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_directions_in_which_no_task_moved_are_not_made_up(seed: int, name: str) -> None:
    random = np.random.default_rng(seed)
    rows, columns = random.normal(size=(8, 2)), random.normal(size=(2, 9))
    models = [{"w": array(rows * random.normal(size=2) @ columns)} for _ in range(2)]
    found = merge(name, *models)["w"].astype(np.float64)
    assert np.abs(found).max() > 0.1
    for basis, part in ((rows, found), (columns.T, found.T)):
        outside = part - basis @ np.linalg.lstsq(basis, part)[0]
        assert np.abs(outside).max() < 1e-4


@every_seed
def test_iso_c_of_one_direction_shares_its_length_among_all_singular_values(seed: int) -> None:
    random = np.random.default_rng(seed)
    model = {"w": array(np.outer(random.normal(size=5), random.normal(size=8)))}
    assert_close(merge("iso_c", model), times(1 / 5, model), 1e-5)


@every_seed
def test_tsv_m_of_a_vector_with_itself_is_its_best_approximation_of_half_the_rank(
    seed: int,
) -> None:
    model = normal(seed, {"w": (6, 9)})
    u, s, v = np.linalg.svd(model["w"].astype(np.float64), full_matrices=False)
    assert_close(merge("tsv_m", model, model), {"w": u[:, :3] * s[:3] @ v[:3]}, 1e-5)


@every_seed
def test_tsv_m_averages_the_text_projection(seed: int) -> None:
    shapes = {"text_projection": (5, 6), "visual.proj": (5, 6)}
    models = [normal(seed + 10 * place, shapes) for place in range(2)]
    found, average = merge("tsv_m", *models), merge("average", *models)
    np.testing.assert_allclose(found["text_projection"], average["text_projection"], 0, 1e-6)
    assert np.abs(found["visual.proj"] - average["visual.proj"]).max() > 0.01


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_matrix_with_fewer_rows_than_tasks_is_not_lost(name: str) -> None:
    models = [normal(seed, {"w": (2, 9), "column": (9, 1)}) for seed in range(5)]
    for part in merge(name, *models).values():
        assert np.abs(part).max() > 0.01


@every_seed
def test_wudi_lowers_its_loss(seed: int) -> None:
    models = [normal(seed + 10 * place, {"w": (6, 9)}) for place in range(3)]
    deltas = [model["w"].astype(np.float64) for model in models]
    merged = [merge("wudi", *models, steps=n, learning_rate=1e-3)["w"] for n in (1, 50, 200)]
    losses = [reference.wudi_loss(part.astype(np.float64), deltas) for part in merged]
    start = reference.wudi_loss(sum(deltas, np.zeros((6, 9))), deltas)
    assert start > losses[0] > losses[1] > losses[2]


# --------------------------------------------------------------------------------------------
# Geometry


def test_model_stock_of_orthogonal_vectors_is_zero() -> None:
    first, second = {"w": array([[1, 0], [0, 2]])}, {"w": array([[0, 3], [4, 0]])}
    assert not merge("model_stock", first, second)["w"].any()


@every_seed
def test_model_stock_shortens_the_mean_of_related_vectors_by_their_angle(seed: int) -> None:
    shared = normal(seed + 90)
    models = [plus(shared, times(0.5, normal(seed + 10 * place))) for place in range(2)]
    models = [{name: array(part) for name, part in model.items()} for model in models]
    found, average = merge("model_stock", *models), merge("average", *models)
    for name in found:
        first, second = (model[name].ravel().astype(np.float64) for model in models)
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        if cosine > 0:
            ratio = 2 * cosine / (1 + cosine)
            np.testing.assert_allclose(found[name], ratio * average[name], 1e-5, 1e-6)


@every_seed
@pytest.mark.parametrize("kind", ["normal", "small", "large"])
def test_slerp_starts_at_the_first_vector_and_ends_at_the_second(seed: int, kind: str) -> None:
    first, second = (
        {name: drawn(kind, part.shape, seed + place, None) for name, part in normal(0).items()}
        for place in (0, 50)
    )
    assert_close(merge("slerp", first, second, t=0), first)
    assert_close(merge("slerp", first, second, t=1), second)


@every_seed
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_between_vectors_of_one_length_keeps_it_and_moves_at_an_even_angle(
    seed: int, t: float
) -> None:
    first, second = (
        part / np.linalg.norm(part) for part in np.random.default_rng(seed).normal(size=(2, 5, 7))
    )
    found = merge("slerp", {"w": array(first)}, {"w": array(second)}, t=t)["w"]
    assert np.linalg.norm(found) == pytest.approx(1, rel=1e-5)
    angle = math.acos(float(np.sum(first * second)))
    assert math.acos(float(np.sum(found * first))) == pytest.approx(t * angle, abs=1e-3)


@pytest.mark.parametrize("angle", [0.04, 0.5, 2, 3, 3.1])
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_slerp_follows_the_arc(angle: float, t: float) -> None:
    first, second = {"w": array([1, 0])}, {"w": array([math.cos(angle), math.sin(angle)])}
    found = merge("slerp", first, second, t=t)["w"]
    assert found == pytest.approx([math.cos(t * angle), math.sin(t * angle)], abs=2e-5)


@pytest.mark.parametrize("angle", [1e-4, 0.03, 3.12])
def test_slerp_is_linear_where_the_vectors_are_nearly_parallel(angle: float) -> None:
    first, second = array([1, 0]), array([math.cos(angle), math.sin(angle)])
    found = merge("slerp", {"w": first}, {"w": second}, t=0.25)["w"]
    assert found == pytest.approx(0.75 * first + 0.25 * second, abs=1e-6)


@pytest.mark.parametrize("number", [1, 3])
def test_slerp_refuses_any_number_of_vectors_but_two(number: int) -> None:
    with pytest.raises(InvalidInput, match=str(number)):
        merge("slerp", *[normal(seed) for seed in range(number)])
