"""Singular vectors and polar factors through Gram matrices, against direct decompositions."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from taskvec import lazy, spectral
from taskvec.lazy import Held
from taskvec.spectral import Matrices, Stack, gram, joined, leading, polar, product

SHAPES = [(40, 40), (90, 40), (40, 90), (300, 300), (400, 160), (160, 300)]
SPECTRA = ["noise", 1, 3, 4]  # decades from the largest singular value to the smallest


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are not worth a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(shape: tuple[int, int], spectrum: str | int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(spectrum, str):
        return torch.randn(shape, generator=generator) * 1e-3
    rank = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
        for n in shape
    )
    return (left * torch.logspace(-1, -1 - spectrum, rank, dtype=torch.float64) @ right.T).float()


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left, values, right.T


def error(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected) / torch.linalg.norm(expected))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes that are decomposed directly."""
    calls: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def record(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(tuple(matrix.shape))
        return svd(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", record)
    yield calls


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_polar_factor_is_that_of_a_direct_decomposition(
    shape: tuple[int, int], spectrum: str | int
) -> None:
    matrix = drawn(shape, spectrum)
    left, values, right = decomposed(matrix)
    factor, mean = polar(matrix)
    assert error(factor, left @ right.T) < 3e-5
    assert mean == pytest.approx(float(values.mean()), rel=1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.125, 1.0])
def test_the_leading_part_is_that_of_a_direct_decomposition(
    shape: tuple[int, int], spectrum: str | int, share: float
) -> None:
    matrix = drawn(shape, spectrum)
    number = int(share * min(shape))
    left, values, right = (part[..., :number] for part in decomposed(matrix))
    found = leading(matrix, number)
    assert [tuple(part.shape) for part in found] == [left.shape, values.shape, right.shape]
    assert error(found[0] * found[1] @ found[2].T, left * values @ right.T) < 1e-5
    assert error(found[1], values) < 1e-6
    for columns in (found[0], found[2]):
        assert error(columns.T @ columns, torch.eye(number)) < 3e-5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_matrix_does_not_matter(scale: float) -> None:
    matrix = drawn((160, 170), "noise")
    assert error(polar(matrix * scale)[0], polar(matrix)[0].double()) < 1e-5
    assert error(leading(matrix * scale, 9)[1] / scale, leading(matrix, 9)[1].double()) < 1e-5


@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (300, 160)])
def test_what_nothing_determines_contributes_nothing(
    shape: tuple[int, int], direct: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(size, 4, generator=generator) for size in shape)
    matrix = rows @ columns.T
    factor, mean = polar(matrix)
    values = torch.linalg.svdvals(factor.double())
    torch.testing.assert_close(values[:4], torch.ones(4, dtype=torch.float64))
    assert float(values[4:].max()) < 1e-5
    assert mean == pytest.approx(float(torch.linalg.svdvals(matrix.double()).mean()), rel=1e-5)
    left, values, right = leading(matrix, 6)
    assert not left[:, 4:].any() and not values[4:].any() and not right[:, 4:].any()
    assert error(left * values @ right.T, matrix.double()) < 1e-5
    assert not direct


def test_zeros_stay_zeros() -> None:
    factor, mean = polar(torch.zeros(5, 3))
    assert not factor.any() and mean == 0
    assert not any(part.any() for part in leading(torch.zeros(3, 5), 2))


def test_a_gram_matrix_in_float32_is_not_used_beyond_its_accuracy(
    monkeypatch: pytest.MonkeyPatch, direct: list[tuple[int, ...]]
) -> None:
    calls: list[tuple[torch.dtype, int]] = []
    eigh = torch.linalg.eigh

    def record(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((matrix.dtype, len(matrix)))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", record)
    polar(drawn((400, 200), "noise"))
    assert calls == [(torch.float32, 200)]
    calls.clear()
    polar(drawn((400, 400), "noise"))
    (first, size), (second, few) = calls
    assert (first, size, second) == (torch.float32, 400, torch.float64)
    assert few < 40
    calls.clear()
    polar(drawn((400, 300), 3))
    assert calls == [(torch.float32, 300), (torch.float64, 300)]
    assert not direct


def test_a_failure_of_the_float32_routine_is_survived() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.zeros(800, 400)
    for column in range(0, 400, 100):
        matrix[:, column : column + 2] = torch.linalg.qr(torch.randn(800, 2, generator=generator)).Q
    left, values, right = decomposed(matrix)
    assert error(polar(matrix)[0], left[:, :8] @ right[:, :8].T) < 1e-5
    assert error(leading(matrix, 12)[1][:8], values[:8]) < 1e-6


def test_a_failure_of_all_routines_for_gram_matrices_is_survived(
    monkeypatch: pytest.MonkeyPatch, direct: list[tuple[int, ...]]
) -> None:
    def fail(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    matrix = drawn((300, 160), "noise")
    left, values, right = decomposed(matrix)
    assert error(polar(matrix)[0], left @ right.T) < 1e-5
    assert error(leading(matrix, 12)[1], values[:12]) < 1e-6
    assert len(direct) == 3


def test_a_spectrum_beyond_float64_is_decomposed_directly(direct: list[tuple[int, ...]]) -> None:
    matrix = torch.diag(torch.logspace(0, -6, 200))
    assert error(polar(matrix)[0], torch.eye(200, dtype=torch.float64)) < 1e-5
    assert error(leading(matrix, 200)[1], matrix.diagonal().double()) < 1e-6
    assert direct == [(200, 200), (200, 200)]


def test_columns_are_made_orthonormal_together() -> None:
    left, right = drawn((60, 20), "noise", 1), drawn((50, 20), "noise", 2)
    values = torch.rand(20, generator=torch.Generator().manual_seed(3))
    expected = (polar(left)[0] * values) @ polar(right)[0].T
    found = joined([left[:, :7], left[:, 7:]], values, [right[:, :7], right[:, 7:]])
    assert error(found, expected.double()) < 1e-6


def test_columns_of_zeros_contribute_nothing() -> None:
    left, right, none = drawn((60, 20), "noise", 1), drawn((50, 20), "noise", 2), torch.zeros(60, 3)
    found = joined([left, none], torch.tensor(2.0), [right, none[:50]])
    assert torch.equal(found, joined([left], torch.tensor(2.0), [right]))
    assert not joined([none], torch.ones(3), [none[:50]]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_products_with_the_transpose(dtype: torch.dtype) -> None:
    left, right = drawn((30, 21), "noise", 1).to(dtype), drawn((17, 21), "noise", 2).to(dtype)
    torch.testing.assert_close(product(left, right), left @ right.T)
    torch.testing.assert_close(product(left.T, left.T), left.T @ left)
    for size in (1, 3, 4, 30):
        torch.testing.assert_close(gram(left[:size]), left[:size] @ left[:size].T)


def test_a_stack_reads_blocks_and_adds_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "BLOCK", 7)
    tensors = [np.full((4, 5), value, np.float32) for value in (1, 2**-30, -1)]
    stack = Stack([Held({"a": tensor}) for tensor in tensors], "a")
    assert [matrix.numpy().tolist() for matrix in stack] == [t.tolist() for t in tensors]
    assert stack.total().tolist() == [[2**-30] * 5] * 4


def test_other_tensors_are_averaged_in_blocks() -> None:
    shapes = {"empty": (0, 3), "matrix": (4, 6), "row": (1, 6), "scalar": (), "skipped": (4, 6)}
    first, second = (
        Held({name: np.full(shape, value, np.float32) for name, shape in shapes.items()})
        for value in (1, 2)
    )
    merged = Matrices(
        [first, second], lambda stack: 10 * stack.total().float(), smallest=2, mean="skip"
    )
    found = {name: merged.block(name, 0, merged.size(name)) for name in shapes}
    assert {name: sorted(set(part.tolist())) for name, part in found.items()} == {
        "empty": [], "matrix": [30], "row": [1.5], "scalar": [1.5], "skipped": [1.5],
    }  # fmt: skip
    assert {name: merged.grain(name) for name in shapes} == {
        "empty": 1, "matrix": 24, "row": 1, "scalar": 1, "skipped": 1,
    }  # fmt: skip


def test_bytes_do_not_depend_on_threads() -> None:
    vectors = [
        Held({str(place): drawn(shape, "noise", 10 * task + place).numpy() for place, shape in
              enumerate(SHAPES)})
        for task in range(2)
    ]  # fmt: skip
    merged = Matrices(vectors, lambda stack: polar(stack.total())[0])
    found = set()
    for torch_threads in (2, 1):
        torch.set_num_threads(torch_threads)
        for workers in (1, 2, 3):
            with lazy.workers(workers):
                parts = lazy.parallel(lambda unit: merged.block(*unit), lazy.all_units([merged]))
                found.add(b"".join(part.tobytes() for part in parts))
    assert len(found) == 1


def test_torch_has_one_thread_inside_and_its_own_number_afterwards() -> None:
    together = threading.Barrier(3)
    seen: list[int] = []

    def inside() -> None:
        with spectral.single_threaded():
            together.wait()
            with spectral.single_threaded():
                pass
            seen.append(torch.get_num_threads())

    torch.set_num_threads(2)
    for _ in range(4):
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(inside) for _ in range(3)]:
                done.result()
    assert seen == [1] * 12
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    with pytest.raises(KeyError), spectral.single_threaded():
        raise KeyError
    assert torch.get_num_threads() == 2
