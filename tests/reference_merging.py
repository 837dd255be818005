"""Every merging method in float64 on whole tensors, written from the formulas of the papers.

Plain sorts and direct singular value decompositions: slow, and easy to compare with the paper. The
stored figures of tests/golden/merging.json are made here; ``python -m tests.reference_merging``
writes them again. DARE and DELLA draw random numbers and have laws instead of figures.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Tensors = dict[str, Matrix]
Vectors = Mapping[Any, Tensors]

GOLDEN = Path(__file__).parent / "golden" / "merging.json"
UNIT = 2.0**-17  # the stored inputs are whole multiples: short to write, exact in float32


# --------------------------------------------------------------------------------------------
# Building blocks


def per_tensor(vectors: Vectors, function: Callable[[str, list[Matrix]], Matrix]) -> Tensors:
    """Return ``function(name, [delta_1, ..., delta_T])`` for every tensor."""
    first = next(iter(vectors.values()))
    return {
        name: function(name, [vector[name] for vector in vectors.values()])
        for name in sorted(first)
    }


def flat(vectors: Vectors) -> Matrix:
    """Return all elements of all vectors, (T, n)."""
    names = sorted(next(iter(vectors.values())))
    return np.array([np.concatenate([v[k].ravel() for k in names]) for v in vectors.values()])


def unflat(row: Matrix, like: Tensors) -> Tensors:
    """Return the tensors that a flattened vector holds."""
    ends = np.cumsum([like[name].size for name in sorted(like)])
    parts = np.split(row, ends[:-1])
    pairs = zip(sorted(like), parts, strict=True)
    return {name: part.reshape(like[name].shape) for name, part in pairs}


def in_scope(vectors: Vectors, scope: str, function: Callable[[Matrix], Matrix]) -> Tensors:
    """Apply a function of (T, n) to the whole model at once, or to every tensor."""
    if scope == "flat":
        return unflat(function(flat(vectors)), next(iter(vectors.values())))
    return per_tensor(
        vectors,
        lambda _, d: function(np.array([x.ravel() for x in d])).reshape(d[0].shape),
    )


def top(values: Matrix, density: float) -> Matrix:
    """Return values with all but the k largest magnitudes set to zero; ties at the k-th stay."""
    if not values.size:
        return values
    kept = max(1, math.floor(density * values.size))
    threshold = np.sort(np.abs(values))[::-1][kept - 1]
    return np.where(np.abs(values) >= threshold, values, 0)


def mean(deltas: list[Matrix]) -> Matrix:
    return sum(deltas, np.zeros_like(deltas[0])) / len(deltas)


def polar(matrix: Matrix) -> Matrix:
    """Return P Q of the decomposition P D Q."""
    p, _, q = np.linalg.svd(matrix, full_matrices=False)
    return p @ q


def minmax(values: Matrix) -> Matrix:
    """Return values moved and stretched to [0, 1]; constant values become 0."""
    width = values.max() - values.min()
    return (values - values.min()) / width if width else np.zeros_like(values)


# --------------------------------------------------------------------------------------------
# The methods


def task_arithmetic(vectors: Vectors) -> Tensors:
    return per_tensor(vectors, lambda _, d: sum(d, np.zeros_like(d[0])))


def average(vectors: Vectors) -> Tensors:
    return per_tensor(vectors, lambda _, d: mean(d))


def magnitude(vectors: Vectors, *, density: float = 0.2, scope: str = "flat") -> Tensors:
    return in_scope(vectors, scope, lambda d: np.array([top(row, density) for row in d]).sum(0))


def magmax(vectors: Vectors) -> Tensors:
    def largest(_: str, deltas: list[Matrix]) -> Matrix:
        stack = np.array(deltas)
        return np.take_along_axis(stack, np.abs(stack).argmax(0)[None], 0)[0]

    return per_tensor(vectors, largest)


def ties(
    vectors: Vectors, *, density: float = 0.2, variant: str = "mean", scope: str = "flat"
) -> Tensors:
    """With all weights 1 the normalised variant is the mean."""

    each = [magnitude({"": vector}, density=density, scope=scope) for vector in vectors.values()]
    trimmed = flat(dict(enumerate(each)))
    signs = np.sign(trimmed.sum(0))
    signs = np.where(signs == 0, np.sign(signs.sum()), signs)  # of the whole model in any scope
    agree = trimmed * signs > 0
    added = np.where(agree, trimmed, 0).sum(0)
    merged = added if variant == "sum" else added / np.maximum(agree.sum(0), 1)
    return unflat(merged, each[0])


def breadcrumbs(
    vectors: Vectors, *, density: float = 0.2, gamma: float = 0.1, scope: str = "row"
) -> Tensors:
    def middle(values: Matrix) -> Matrix:
        n = values.size
        if not n:
            return values
        order = np.sort(np.abs(values))[::-1]
        dropped = int(gamma * n)
        last = min(dropped + max(1, int(density * n)), n) - 1
        inside = (np.abs(values) <= order[dropped]) & (np.abs(values) >= order[last])
        return np.where(inside, values, 0)

    def masked(delta: Matrix) -> Matrix:
        if scope == "tensor" or delta.ndim == 0 or not delta.size:
            return middle(delta.ravel()).reshape(delta.shape)
        rows = delta.reshape(-1, delta.shape[-1])
        return np.array([middle(row) for row in rows]).reshape(delta.shape)

    return per_tensor(vectors, lambda _, d: sum((masked(x) for x in d), np.zeros_like(d[0])))


def _task_mask(delta: Matrix, merged: Matrix, threshold: float) -> npt.NDArray[np.bool_]:
    return np.abs(delta) > threshold * np.abs(merged - delta)


def tall_mask(vectors: Vectors, *, task: str, threshold: float = 0.4) -> Tensors:
    merged = task_arithmetic(vectors)
    return {
        name: merged[name] * _task_mask(delta, merged[name], threshold)
        for name, delta in vectors[task].items()
    }


def consensus(
    vectors: Vectors, *, k: int = 2, threshold: float = 0.4, variant: str = "ta"
) -> Tensors:
    merged = task_arithmetic(vectors) if variant == "ta" else ties(vectors, variant="sum")
    votes = per_tensor(
        vectors,
        lambda name, d: np.sum([_task_mask(x, merged[name], threshold) for x in d], axis=0),
    )
    return {name: np.where(votes[name] >= k, merged[name], 0) for name in merged}


def lines(
    vectors: Vectors, *, alpha: float = -1.0, beta: float = 0.0, leaves: Vectors | None = None
) -> Tensors:
    """A negative alpha is the published one; the leaves are the vectors that were merged."""
    (merged,) = vectors.values()
    if alpha < 0:
        leaves = leaves or vectors
        added = np.abs(flat(leaves).sum(0)).sum()
        alpha = added / np.abs(flat(vectors)).sum() / len(leaves)
    place = {name: next((int(p) for p in name.split(".") if p.isdigit()), None) for name in merged}
    blocks = 1 + max(index for index in place.values() if index is not None)

    def factor(index: int | None) -> float:
        return alpha if index is None else alpha + beta * index / (blocks - 1)

    return {name: factor(place[name]) * value for name, value in merged.items()}


def pcb(vectors: Vectors, *, ratio: float = 0.1, variant: str = "flat") -> Tensors:
    def clipped(row: Matrix, share: float) -> Matrix:
        order = np.sort(row)
        low, high = int(row.size * share), int(row.size * (1 - share) - 1)
        return np.clip(row, order[low], order[high])

    def above_quantile(row: Matrix) -> Matrix:
        return np.maximum(row, np.sort(row)[int(row.size * (1 - ratio))])

    def merge(deltas: Matrix) -> Matrix:
        share = 1e-4 if variant == "flat" else 1e-2
        sizes = np.array([clipped(np.abs(row), share) for row in deltas])
        normalised = np.array([minmax(row) for row in sizes])
        intra = np.exp(len(deltas) * normalised**2)
        if variant == "flat":
            inter = np.tanh(deltas * deltas.sum(0))
        else:
            signed = np.sign(deltas) * normalised
            inter = sum((np.tanh(signed * other) for other in signed), np.zeros_like(signed))
        scores = np.array([minmax(above_quantile(row)) for row in intra * inter])
        return (scores * np.sign(deltas) * sizes).sum(0) / np.maximum(scores.sum(0), 1e-12)

    return in_scope(vectors, "flat", merge)


def tsv_m(vectors: Vectors) -> Tensors:
    def merge(name: str, deltas: list[Matrix]) -> Matrix:
        if deltas[0].ndim != 2 or "text_projection" in name:
            return mean(deltas)
        k = int(min(deltas[0].shape) / len(deltas))
        parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
        u = np.concatenate([u[:, :k] for u, _, _ in parts], axis=1)
        s = np.concatenate([s[:k] for _, s, _ in parts])
        v = np.concatenate([v[:k] for _, _, v in parts], axis=0)
        return polar(u) @ np.diag(s) @ polar(v)

    return per_tensor(vectors, merge)


def iso_c(vectors: Vectors) -> Tensors:
    def merge(_: str, deltas: list[Matrix]) -> Matrix:
        if deltas[0].ndim != 2:
            return mean(deltas)
        u, s, v = np.linalg.svd(sum(deltas, np.zeros_like(deltas[0])), full_matrices=False)
        return s.mean() * (u @ v)

    return per_tensor(vectors, merge)


def iso_cts(vectors: Vectors, *, common: float = 0.8) -> Tensors:
    def merge(_: str, deltas: list[Matrix]) -> Matrix:
        if deltas[0].ndim != 2:
            return mean(deltas)
        rank, number = min(deltas[0].shape), len(deltas)
        each = round((rank - int(common * rank)) / number)  # of every task, as in the authors' code
        each = min(each, rank // number)
        shared = rank - each * number
        u, s, v = np.linalg.svd(sum(deltas, np.zeros_like(deltas[0])), full_matrices=False)
        us: list[Matrix] = []
        ss: list[Matrix] = []
        vs: list[Matrix] = []
        for delta in deltas:
            rest = delta - u[:, :shared] @ u[:, :shared].T @ delta
            own_u, own_s, own_v = np.linalg.svd(rest, full_matrices=False)
            us, ss, vs = us + [own_u[:, :each]], ss + [own_s[:each]], vs + [own_v[:each]]
        u = np.concatenate([*us, u[:, :shared]], axis=1)
        s = np.concatenate([*ss, s[:shared]])
        v = np.concatenate([*vs, v[:shared]], axis=0)
        return s.mean() * polar(u) @ polar(v)

    return per_tensor(vectors, merge)


def wudi_loss(merged: Matrix, deltas: list[Matrix]) -> float:
    """Return ``sum_t |(tau - delta_t) delta_t^T|_F^2 / |delta_t|_F^2``."""
    return sum(
        float(np.sum(((merged - delta) @ delta.T) ** 2) / np.sum(delta**2))
        for delta in deltas
        if delta.any()
    )


def wudi(vectors: Vectors, *, steps: int = 300, learning_rate: float = 1e-5) -> Tensors:
    def merge(_: str, deltas: list[Matrix]) -> Matrix:
        if deltas[0].ndim != 2:
            return mean(deltas)
        tau = sum(deltas, np.zeros_like(deltas[0]))
        first, second = np.zeros_like(tau), np.zeros_like(tau)
        for step in range(1, steps + 1):
            gradient = np.zeros_like(tau)
            for delta in deltas:
                gradient += 2 * (tau - delta) @ delta.T @ delta / np.sum(delta**2)
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            tau = tau - learning_rate * first / (1 - 0.9**step) / scale
        return tau

    return per_tensor(vectors, merge)


def _cosine(a: Matrix, b: Matrix) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.sum(a * b) / norms) if norms else 0.0  # zero is at a right angle to all


def model_stock(vectors: Vectors) -> Tensors:
    def merge(_: str, deltas: list[Matrix]) -> Matrix:
        number = len(deltas)
        if number == 1:
            return deltas[0]
        cosine = np.mean([_cosine(deltas[i], deltas[j]) for i in range(number) for j in range(i)])
        divisor = 1 + (number - 1) * cosine
        return number * cosine / divisor * mean(deltas) if divisor > 1e-6 else 0 * deltas[0]

    return per_tensor(vectors, merge)


def slerp(vectors: Vectors, *, t: float = 0.5) -> Tensors:
    def merge(_: str, deltas: list[Matrix]) -> Matrix:
        a, b = deltas
        angle = math.acos(max(-1.0, min(1.0, _cosine(a, b))))
        if abs(math.cos(angle)) > 0.9995:
            return (1 - t) * a + t * b
        return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)

    return per_tensor(vectors, merge)


def random_like(vectors: Vectors, *, seed: int = 0) -> Tensors:
    """The uniform numbers are those of taskvec/random_masks.py, two for two elements."""
    ((label, tensors),) = vectors.items()

    def normal(name: str, size: int) -> list[float]:
        key = hashlib.sha256(json.dumps([seed, label, name]).encode()).digest()[:16]
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw((size + 1) // 2)
        found: list[float] = []
        for word in words.tolist():
            first, second = ((half + 0.5) / 2**32 for half in (word % 2**32, word >> 32))
            radius = math.sqrt(-2 * math.log(first))
            found += [f(2 * math.pi * second) * radius for f in (math.cos, math.sin)]
        return found[:size]

    def like(name: str, deltas: list[Matrix]) -> Matrix:
        noise = np.array(normal(name, deltas[0].size)).reshape(deltas[0].shape)
        return noise * (np.linalg.norm(deltas[0]) / (np.linalg.norm(noise) or 1))

    return per_tensor({label: tensors}, like)


# --------------------------------------------------------------------------------------------
# The stored figures

SOURCES = {
    "task_arithmetic": "Ilharco et al., arXiv:2212.04089: sum_t d_t",
    "average": "Wortsman et al., arXiv:2203.05482: sum_t d_t / T",
    "magnitude": "the trimming of Yadav et al., arXiv:2306.01708: the k largest |d_t|, added",
    "magmax": "Marczak et al., arXiv:2407.06322: element by element the d_t with the largest |d_t|",
    "ties": "Yadav et al., arXiv:2306.01708: trim, elect the sign of the sum, merge what agrees",
    "breadcrumbs": "Davari and Belilovsky, arXiv:2312.06795: both tails of |d_t| masked by row",
    "tall_mask": "Wang et al., arXiv:2405.07813: tau where |d_t| > threshold * |tau - d_t|",
    "consensus": "Wang et al., arXiv:2405.07813: tau where k or more of the tasks' masks are 1",
    "lines": "Wang et al., arXiv:2410.17146: block l of L times alpha + beta * l / (L - 1)",
    "pcb": "Du et al., arXiv:2410.02396: sum_t s_t sign(d_t) a_t / sum_t s_t",
    "tsv_m": "Gargiulo et al., arXiv:2412.00081: polar(U) diag(s) polar(V) of the tasks' top parts",
    "iso_c": "Marczak et al., arXiv:2502.04959: mean(s) U V of the sum's U diag(s) V",
    "iso_cts": "Marczak et al., arXiv:2502.04959: mean(s) polar(U) polar(V), common and own parts",
    "wudi": "Cheng et al., arXiv:2503.08099: Adam on sum_t |(tau - d_t) d_t'|^2 / |d_t|^2",
    "model_stock": "Jang et al., arXiv:2403.19522: N cos / (1 + (N - 1) cos) times the mean",
    "slerp": "Shoemake, SIGGRAPH 1985: the great arc between two vectors",
    "random_like": "Ilharco et al., arXiv:2212.04089: Gaussian noise with the norm of d, by tensor",
}

ALL = ["a", "b", "c"]
BOTH: list[tuple[str, dict[str, Any], list[str]]] = [
    ("task_arithmetic", {}, ALL),
    ("average", {}, ALL),
    ("magnitude", {}, ALL),
    ("magnitude", {"density": 0.35, "scope": "tensor"}, ALL),
    ("magmax", {}, ALL),
    ("ties", {}, ALL),
    ("ties", {"density": 0.6, "variant": "sum"}, ALL),
    ("ties", {"density": 0.6, "variant": "normalized"}, ALL),
    ("ties", {"density": 0.5, "scope": "tensor"}, ["a", "b"]),
    ("breadcrumbs", {}, ALL),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.3}, ALL),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.2, "scope": "tensor"}, ["a", "b"]),
    ("tall_mask", {"task": "a", "threshold": 0.5}, ["a", "b"]),
    ("consensus", {"k": 1, "threshold": 0.75}, ALL),
    ("lines", {"alpha": 0.4, "beta": 0.5}, ["b"]),
    ("model_stock", {}, ALL),
    ("slerp", {}, ["a", "b"]),
    ("slerp", {"t": 0.25}, ["b", "c"]),
    ("random_like", {}, ["a"]),
    ("random_like", {"seed": 7}, ["b"]),
]
# Equal numbers decide nothing here, or make the singular vectors arbitrary.
DISTINCT: list[tuple[str, dict[str, Any], list[str]]] = [
    ("tall_mask", {"task": "b"}, ALL),
    ("consensus", {}, ALL),
    ("consensus", {"variant": "ties"}, ALL),
    ("pcb", {}, ALL),
    ("pcb", {"ratio": 0.4}, ["a", "b"]),
    ("pcb", {"ratio": 0.3, "variant": "vision"}, ALL),
    ("tsv_m", {}, ALL),
    ("tsv_m", {}, ["a", "b"]),
    ("iso_c", {}, ALL),
    ("iso_cts", {}, ["a", "b"]),
    ("iso_cts", {"common": 0.4}, ALL),
    ("wudi", {}, ALL),
    ("wudi", {"steps": 40, "learning_rate": 1e-3}, ["a", "b"]),
]
CASES = [(*case, "distinct") for case in BOTH + DISTINCT] + [(*case, "tied") for case in BOTH]

SHAPES: dict[str, tuple[int, ...]] = {
    "empty": (0,),
    "logit_scale": (),
    "one": (1,),
    "resblocks.0.attn.weight": (7, 5),
    "resblocks.0.ln.1.bias": (9,),
    "resblocks.1.mlp.weight": (5, 8),
    "resblocks.2.conv.weight": (2, 3, 2, 2),
    "text_projection": (3, 4),
}


def _drawn(model: str) -> dict[str, dict[str, list[int]]]:
    """Return three correlated vectors as multiples of UNIT, with or without equal magnitudes."""
    generator = np.random.default_rng(20240607)
    scale, rounded = (60_000, 1) if model == "distinct" else (30_000, 16_384)
    count = sum(math.prod(shape) for shape in SHAPES.values())
    shared = generator.normal(size=count)
    drawn = {}
    for label in "abc":
        own = 0.4 * shared + generator.normal(size=count)
        drawn[label] = np.rint(own * scale / rounded).astype(int) * rounded
    found = np.abs(np.concatenate(list(drawn.values())))
    if model == "distinct":
        assert len(np.unique(found)) == len(found), "two magnitudes are equal; take another seed"
    ends = np.cumsum([math.prod(shape) for shape in SHAPES.values()])[:-1]
    return {
        label: {name: part.tolist() for name, part in zip(SHAPES, np.split(row, ends), strict=True)}
        for label, row in drawn.items()
    }


def operands(stored: Mapping[str, Mapping[str, list[int]]], labels: list[str]) -> Vectors:
    """Return the stored multiples of UNIT as tensors."""
    return {
        label: {
            name: np.array(stored[label][name], np.float64).reshape(shape) * UNIT
            for name, shape in SHAPES.items()
        }
        for label in labels
    }


def golden() -> dict[str, Any]:
    """Return the inputs and what the methods of this module make of them."""
    inputs = {model: _drawn(model) for model in ("distinct", "tied")}
    cases = []
    for method, options, labels, model in CASES:
        merged = globals()[method](operands(inputs[model], labels), **options)
        cases.append(
            {
                "method": method,
                "options": options,
                "input": model,
                "operands": labels,
                "expected": {
                    name: [float(f"{value:.9g}") for value in merged[name].ravel()]
                    for name in SHAPES
                },
            }
        )
    return {"unit": UNIT, "shapes": SHAPES, "sources": SOURCES, "inputs": inputs, "cases": cases}


def written(figures: Any, indent: str = "") -> str:
    """Return JSON with one tensor a line."""
    values = list(figures.values() if isinstance(figures, dict) else figures)
    if all(isinstance(value, int | float) for value in values):
        return json.dumps(figures)
    inner = indent + " "
    parts = [
        written(value, inner) if isinstance(value, dict | list | tuple) else json.dumps(value)
        for value in values
    ]
    if isinstance(figures, dict):
        parts = [f"{json.dumps(key)}: {part}" for key, part in zip(figures, parts, strict=True)]
    left, right = "{}" if isinstance(figures, dict) else "[]"
    return left + "".join(f"\n{inner}{part}," for part in parts)[:-1] + f"\n{indent}{right}"


def main() -> None:
    """Write the stored figures again."""
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(written(golden()) + "\n")


if __name__ == "__main__":
    main()
