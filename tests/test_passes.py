"""How a batch goes through the tower: in pieces, in bfloat16, compiled, with too little memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from taskvec import passes
from taskvec.errors import InvalidInput, MissingDependency
from taskvec.passes import OutOfMemory, Passage, check
from taskvec.sections import FineTune
from taskvec.towers import PREFIX, Tower
from taskvec.training import Lesson, Step, batches, fine_tune, schedule
from tests.test_towers import assert_same, tiny_tower
from tests.test_training import classifier, lesson, recipe

# torch.compile warns of torch itself
warns = pytest.mark.filterwarnings("ignore::DeprecationWarning")
law = settings(deadline=None, max_examples=20)
CPU = torch.device("cpu")
ON_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes."


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as stages do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Small(nn.Module):
    """A module with room for so many items at once, from its n-th call on."""

    def __init__(self, module: nn.Module, room: int, error: Exception, first: int = 1) -> None:
        super().__init__()
        self.module = module
        self.room, self.error, self.first = room, error, first
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        rows: Tensor = self.module(x)
        if len(x) > self.room and self.calls >= self.first:
            raise self.error
        return rows


def small_tower(room: int, error: Exception | None = None, first: int = 1) -> Tower:
    """Return the tiny tower on a device with little memory; its state has the usual names."""
    tower = tiny_tower()
    module = Small(tower.module, room, error or RuntimeError(ON_CPU), first)
    return Tower(module, tower.mean, tower.std, 8, tower.identity, ("visual.module.head.",))


def bare(tower: Tower) -> dict[str, Tensor]:
    return {name.replace("module.", ""): value for name, value in tower.state().items()}


def train(
    how: FineTune, tower: Tower | None = None, lessons: Sequence[Lesson] | None = None
) -> tuple[Tower, list[Step], Passage]:
    tower = tower or tiny_tower()
    passage = Passage(tower, how)
    steps = fine_tune(tower, lessons or [lesson()], how, 0, passage=passage)
    return tower, steps, passage


def losses(steps: list[Step]) -> list[float]:
    return [step.loss for step in steps]


def plain(tower: Tower, what: Lesson, how: FineTune, seed: int) -> list[float]:
    """Train as the recipe of the paper says, with nothing else."""
    named = [(PREFIX + name, value) for name, value in tower.module.named_parameters()]
    chosen = [value for name, value in named if name in tower.edited()]
    for name, value in named:
        value.requires_grad_(name in tower.edited())
    optimizer = torch.optim.AdamW(
        chosen, lr=how.learning_rate, weight_decay=how.weight_decay
    )  # fmt: skip
    found = []
    for number, batch in enumerate(batches(len(what.labels), how, seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * schedule(number, how.steps, how.warmup)
        logits = tower.features(what.images[batch]) @ what.head.to(tower.device).T
        labels = what.labels[batch].to(tower.device)
        loss = functional.cross_entropy(logits, labels, reduction="sum") / len(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, how.clip_norm)
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_recipe_without_options_takes_the_plain_steps_bit_for_bit() -> None:
    how = recipe(steps=8, weight_decay=0.1)
    tower, steps, passage = train(how)
    reference = tiny_tower()
    assert plain(reference, lesson(), how, 0) == losses(steps)
    assert_same(tower.state(), reference.state())
    assert passage.record() == {}


@law
@given(st.integers(1, 9), st.data())
def test_pieces_give_the_gradient_of_the_whole_batch(batch_size: int, data: st.DataObject) -> None:
    micro_batch = data.draw(st.integers(1, batch_size))
    images, labels = lesson().images, lesson().labels
    lessons = [lesson(), Lesson(classifier().flip(0), images, 2 - labels)]
    how = recipe(steps=4, batch_size=batch_size)
    _, whole, _ = train(how, lessons=lessons)
    pieces = how.model_copy(update={"micro_batch": micro_batch})
    _, found, passage = train(pieces, lessons=lessons)
    assert losses(found) == pytest.approx(losses(whole), rel=1e-3, abs=1e-5)
    assert losses(found)[0] == pytest.approx(losses(whole)[0], rel=1e-5)
    assert passage.record() == {"training": {"micro_batch": micro_batch}}


@law
@given(st.integers(1, 12), st.data())
def test_the_last_piece_counts_as_many_items_as_it_has(items: int, data: st.DataObject) -> None:
    micro_batch = data.draw(st.integers(1, items))
    values = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=20, max_size=20)))
    batch = torch.tensor(data.draw(st.permutations(range(20)))[:items])
    weight = nn.Parameter(torch.ones(()))
    seen: list[int] = []

    def loss(piece: Tensor) -> Tensor:
        seen.append(len(piece))
        return (weight * values[piece]).sum() / items

    how = recipe(batch_size=items, micro_batch=micro_batch)
    weight.grad = torch.ones(())  # of the step before
    found = Passage(tiny_tower(), how).gradient(1, batch, [weight], loss, -1.0)
    mean = values[batch].float().mean().item()
    assert found.item() == pytest.approx(mean, abs=1e-5)
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(-mean, abs=1e-5)
    assert sum(seen) == items and seen[:-1] == [micro_batch] * (len(seen) - 1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(ON_CPU),
        RuntimeError("[enforce fail] not enough memory: you tried to allocate 4 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_training_with_half_the_items_from_the_start(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    how = recipe(steps=5, batch_size=7)
    tower, steps, passage = train(how, small_tower(4, error))
    halved, expected, _ = train(recipe(steps=5, batch_size=7, micro_batch=4))
    assert steps == expected
    assert_same(bare(tower), halved.state())
    assert passage.record() == {"training": {"micro_batch": 4, "halved_at": 1}}
    assert "7 items at once; goes on with 4" in caplog.text


def test_too_little_memory_later_repeats_that_step_alone() -> None:
    how = recipe(steps=6, batch_size=6)
    tower, steps, passage = train(how, small_tower(3, first=3))
    assert passage.halved_at == 3
    expected = tiny_tower()
    other = Passage(expected, how)

    def halve(step: Step) -> None:
        if step.step == 2:
            other.micro_batch = 3

    assert steps == fine_tune(expected, [lesson()], how, 0, on_step=halve, passage=other)
    assert_same(bare(tower), expected.state())


def test_too_little_memory_for_half_the_items_says_what_to_set() -> None:
    message = "step 1 needs more memory than there is on cpu with 3 items at once, after it was"
    with pytest.raises(OutOfMemory, match=f"{message}.*fine_tune.micro_batch below 3") as caught:
        train(recipe(batch_size=6), small_tower(2))
    assert caught.value.exit_code == 1
    with pytest.raises(
        OutOfMemory, match=r"with 1 items at once \(Def.*\); set fine_tune.precision"
    ):
        train(recipe(batch_size=1), small_tower(0))
    with pytest.raises(OutOfMemory, match="below 2"):  # a micro-batch of the recipe counts
        train(recipe(batch_size=9, micro_batch=4), small_tower(1))


def test_other_errors_are_no_matter_of_memory() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(recipe(), small_tower(1, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_bf16_learns_with_weights_and_results_in_float32() -> None:
    tower = tiny_tower()
    seen = set()
    tower.module.get_submodule("conv").register_forward_hook(lambda *a: seen.add(a[-1].dtype))
    how = recipe(steps=60, precision="bf16")
    passage = Passage(tower, how)
    assert passage.features(lesson().images).dtype == torch.float32
    steps = fine_tune(tower, [lesson()], how, 0, passage=passage)
    assert seen == {torch.bfloat16}
    kinds = {value.dtype for value in tower.state().values() if value.is_floating_point()}
    assert kinds == {torch.float32}
    assert sum(losses(steps)[-5:]) < 0.7 * sum(losses(steps)[:5])
    exact = losses(train(recipe(steps=60))[1])
    assert losses(steps)[0] == pytest.approx(exact[0], rel=0.05)
    assert losses(steps) != exact
    assert passage.record() == {"training": {"precision": "bf16"}}


def test_bf16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(InvalidInput, match="bf16, which Tesla V100 does not compute") as caught:
        check(recipe(precision="bf16"), torch.device("cuda"))
    assert caught.value.exit_code == 3
    check(recipe(), torch.device("cuda"))


class Flat(nn.Module):
    """Quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.linear(x.flatten(1))
        return rows.relu()


def flat_tower() -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower(Flat(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 8, {"family": "flat"})


@warns
def test_a_compiled_tower_takes_the_same_steps() -> None:
    from torch._inductor import config

    how = recipe(steps=4, compile=True)
    torch._dynamo.reset()
    with config.patch({"compile_threads": 1, "cpp.simdlen": 1}):  # less to compile
        _, steps, passage = train(how, flat_tower())
    _, plainly, _ = train(recipe(steps=4), flat_tower())
    assert losses(steps) == pytest.approx(losses(plainly), rel=1e-4)
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] > 0
    assert passage.record() == {"training": {"compile": True}}


@warns
def test_a_missing_compiler_is_reported_before_any_work() -> None:
    from torch._inductor import config

    passes._check_compiler.cache_clear()
    torch._dynamo.reset()
    absent = {"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}
    with (
        config.patch(absent),
        pytest.raises(MissingDependency, match=r"torch.compile does not work here.*g\+\+"),
    ):
        check(recipe(compile=True), CPU)
    passes._check_compiler.cache_clear()
    torch._dynamo.reset()


on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("more", [
    pytest.param({"precision": "bf16"}, marks=on_gpu),
    pytest.param({"compile": True}, marks=on_gpu),
    pytest.param({"micro_batch": 4}, marks=on_gpu),
])  # fmt: skip
def test_a_cuda_device_learns_with_every_option(more: dict[str, Any]) -> None:
    tower, steps, _ = train(recipe(steps=60, **more))
    assert tower.device.type == "cuda"
    assert sum(losses(steps)[-5:]) < 0.7 * sum(losses(steps)[:5])
