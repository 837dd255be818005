"""`python -m benchmarks.spectral [--quick]`: TSV-M and Iso-C against direct decompositions.

Prints JSON: what `measure` returns. Both ways work in this process, on the same matrices in memory
and with as many threads; the direct way is the authors' formula with `torch.linalg.svd`.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.measuring import interleave
from taskvec.lazy import Held, materialize
from taskvec.merging.iso_c import iso_c
from taskvec.merging.tsv_m import tsv_m

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))  # one block of ViT-B/32
QUICK_SHAPES = ((48, 32), (32, 32))
TASKS = 8
EXACT = 2  # of the matrices are computed in float64 as well, which takes longest
# The singular values of real changes fall off; drawn noise has none that are small.
SPECTRA = {"noise": 0.0, "singular values 1000 : 1": 3.0}
METHODS = {"tsv_m": tsv_m, "iso_c": iso_c}


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shapes, rounds = (QUICK_SHAPES, 1) if quick else (SHAPES, 2)
    found = [
        {"method": method, "spectrum": words, **measure(method, shapes, decades, rounds)}
        for method in METHODS
        for words, decades in SPECTRA.items()
    ]
    print(json.dumps(found))


def measure(
    method: str, shapes: Sequence[tuple[int, int]], decades: float, rounds: int
) -> dict[str, object]:
    """Return the seconds of both ways by round, and the errors of both relative to float64."""
    vectors = [
        [drawn(shape, decades, 100 * task + place) for place, shape in enumerate(shapes)]
        for task in range(TASKS)
    ]
    held = {
        str(task): Held({str(place): matrix.numpy() for place, matrix in enumerate(matrices)})
        for task, matrices in enumerate(vectors)
    }
    results: dict[str, list[Tensor]] = {}

    def ours() -> None:
        merged = materialize(METHODS[method](held))
        results["ours"] = [torch.from_numpy(merged[str(place)]) for place in range(len(shapes))]

    def direct() -> None:
        results["direct"] = [DIRECT[method](list(m)) for m in zip(*vectors, strict=True)]

    times = interleave({"ours": ours, "direct": direct}, rounds)
    some = list(zip(*vectors, strict=True))[:EXACT]
    exact = [DIRECT[method]([matrix.double() for matrix in matrices]) for matrices in some]
    return {
        "seconds": {way: value.seconds for way, value in times.items()},
        "errors": {way: _error(result, exact) for way, result in results.items()},
    }


def drawn(shape: tuple[int, int], decades: float, seed: int) -> Tensor:
    """Return a matrix of noise, or one whose singular values fall evenly by so many decades."""
    generator = torch.Generator().manual_seed(seed)
    if not decades:
        return 3e-4 * torch.randn(shape, generator=generator)
    rank = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
        for size in shape
    )
    values = 1e-2 * torch.logspace(0, -decades, rank, dtype=torch.float64)
    return ((left * values) @ right.T).float()


def direct_tsv_m(matrices: Sequence[Tensor]) -> Tensor:
    """Return the leading parts of all matrices, their singular vectors made orthogonal."""
    kept = min(matrices[0].shape) // len(matrices)
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    left = torch.cat([u[:, :kept] for u, _, _ in parts], dim=1)
    values = torch.cat([s[:kept] for _, s, _ in parts])
    right = torch.cat([v[:kept] for _, _, v in parts])
    return _orthogonal(left) @ torch.diag(values) @ _orthogonal(right)


def direct_iso_c(matrices: Sequence[Tensor]) -> Tensor:
    """Return the sum with all singular values replaced by their mean."""
    left, values, right = torch.linalg.svd(sum(matrices), full_matrices=False)
    return values.mean() * (left @ right)


DIRECT: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "tsv_m": direct_tsv_m,
    "iso_c": direct_iso_c,
}


def _orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error of a matrix, in the Frobenius norm."""
    pairs = zip(found, exact, strict=False)  # not all were computed exactly
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


if __name__ == "__main__":
    main()
