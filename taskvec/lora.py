"""LoRA adapters of peft as task vectors: ``scale * B @ A`` over the names of their base model.

An adapter is opened as the whole change of weights that it stands for, never as its factors: sums
of factors are not the factors of the sum. Source: Hu et al., arXiv:2106.09685, section 4.1; the
scale of rank-stabilised adapters: Kalajdzievski, arXiv:2312.03732.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from taskvec import headers
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.lazy import BLOCK, Array, Lazy
from taskvec.mapped import (
    FLOATS,
    Difference,
    Mapped,
    Stored,
    StoredVector,
    check_finite,
    check_shape,
    difference,
    open_weights,
    same_bytes,
)

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# The name of the adapter stands in files that were not written by peft's own save.
ADAPTER = r"(\.(?P<adapter>[^.]+))?"
MATRIX = re.compile(rf"(?P<module>.+)\.lora_(?P<kind>[AB]){ADAPTER}\.weight")
TABLE = re.compile(rf"(?P<module>.+)\.lora_(?P<kind>embedding_[AB]){ADAPTER}")
BIAS = re.compile(rf"(?P<module>.+)\.lora_B{ADAPTER}\.bias")
SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<name>.+)")
STRANGE = re.compile(r"(^|\.)(lora_|token_adapter\.|original_module\.)")

USED = (
    "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "peft_type", "r",
    "rank_pattern", "use_rslora",
)  # fmt: skip
# What these say matters in training only, or shows in the names of the tensors.
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type", "velora_config",
)  # fmt: skip
REFUSED = {
    "alora_invocation_tokens": "it changes the weights for some tokens only",
    "arrow_config": "it chooses among adapters for every token",
    "kasa_config": "it changes the base weights before training",
    "layer_replication": "its model has more layers than its base",
    "monteclora_config": "its weights are drawn at random",
    "target_parameters": "its tensors do not say which parameters they belong to",
    "trainable_token_indices": "it replaces rows of an embedding",
    "use_bdlora": "its factors are block-diagonal",
    "use_dora": "its product is scaled by the norms of the base weights (DoRA)",
    "use_qalora": "its product belongs to groups of quantised weights",
}
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
ADVICE = "merge it into its base model with peft and use the merged checkpoint"


@dataclass(frozen=True)
class Product:
    """``scale * b @ a``, or its transpose, as a tensor of the base.

    Attributes:
        b: (rows, rank), with further axes of length 1 for a convolution.
        a: (rank, ...), (rank, in, height, width) for a convolution.
        rank: r.
        scale: no unit.
        turned: the tensor of the base is (in, out).
    """

    b: Stored
    a: Stored
    rank: int
    scale: float
    turned: bool = False

    @property
    def columns(self) -> int:
        """The number of elements that belong to one row."""
        return math.prod(self.b.shape if self.turned else self.a.shape) // self.rank

    def factors(self) -> tuple[Array, Array]:
        """Return float32 matrices (rows, rank) and (rank, columns)."""
        b = self.b.floats(0, math.prod(self.b.shape)).reshape(-1, self.rank)
        a = self.a.floats(0, math.prod(self.a.shape)).reshape(self.rank, -1)
        return (a.T, np.ascontiguousarray(b.T)) if self.turned else (b, a)


@dataclass(frozen=True)
class _Content:
    """What an adapter's file holds; modules without ``base_model.model.``, as peft calls them.

    Attributes:
        factors: module -> {"A": (r, ...), "B": (..., r)}, or those of an embedding.
        biases: module -> what is added to its bias, before the scale.
        whole: (name, new value) of whole tensors.
    """

    factors: dict[str, dict[str, Stored]] = field(default_factory=dict)
    biases: dict[str, Stored] = field(default_factory=dict)
    whole: list[tuple[str, Stored]] = field(default_factory=list)


class Adapter(Lazy):
    """The change of weights that an adapter makes; zero where it makes none."""

    def __init__(
        self, products: Mapping[str, Product], whole: Lazy, base: Mapped, label: str
    ) -> None:
        self._products, self._whole, self._label = products, whole, label
        # Workers share a tensor, and factors of half precision are converted once.
        self._factors = lru_cache(maxsize=8)(self._finite_factors)
        super().__init__({name: base.tensors[name].shape for name in base.floating})

    def grain(self, name: str) -> int:
        """Return the length of a row of the product."""
        return max(1, self._products[name].columns) if name in self._products else 1

    def block(self, name: str, start: int, stop: int) -> Array:
        """Compute elements of a product, and add what whole tensors change.

        Raises:
            IncompatibleWeights: one of them is NaN or infinite.
        """
        if name not in self._products:
            if name in self._whole.shapes:
                return self._whole.block(name, start, stop)
            return np.zeros(stop - start, np.float32)
        values = self._product(name, start, stop)
        if name in self._whole.shapes:
            values += self._whole.block(name, start, stop)
        check_finite(values, name, self._label)
        return values

    def _product(self, name: str, start: int, stop: int) -> Array:
        product = self._products[name]
        left, right = self._factors(name)
        first, last = start // product.columns, stop // product.columns
        values = np.empty((last - first, product.columns), np.float32)
        step = max(1, BLOCK // product.columns)  # rows that stay in the cache
        term = np.empty((min(step, last - first), product.columns), np.float32)
        # Added up in the order of the rank, not by a library for matrices: the bytes of its
        # products depend on the number of threads and on the shape of the block.
        with np.errstate(over="ignore", invalid="ignore"):
            for low in range(first, last, step):
                rows = left[low : min(low + step, last)]
                part = values[low - first : low - first + len(rows)]
                np.multiply(rows[:, :1], right[0], out=part)
                for k in range(1, product.rank):
                    np.multiply(rows[:, k : k + 1], right[k], out=term[: len(rows)])
                    part += term[: len(rows)]
                part *= np.float32(product.scale)
        return values.reshape(-1)

    def _finite_factors(self, name: str) -> tuple[Array, Array]:
        left, right = self._products[name].factors()
        for factor in (left, right):
            check_finite(factor, name, self._label)
        return left, right


def is_adapter(path: Path) -> bool:
    """Return whether a path is an adapter's directory, or the weights in it."""
    return (_directory(path) / CONFIG).is_file()


def open_adapter(directory: Path, base: Mapped) -> Lazy:
    """Return the task vector of an adapter, computed when it is read.

    Factors of Linear, Conv1D, Conv1d/2d/3d and Embedding modules are multiplied and scaled. Whole
    tensors (``modules_to_save``, biases, saved embeddings) count as their difference from the base.
    A square matrix is transposed if ``fan_in_fan_out`` says so, any other if its shape does. All
    names may have one leading part (``transformer.``) more or less than those of the base.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors (or .bin).
        base: the weights that the adapter was trained on.

    Raises:
        MissingArtifact: a file is not there.
        IncompatibleWeights: the adapter is no plain LoRA, a tensor of it is unknown, or it does not
            fit the base.
    """
    config = _config(directory / CONFIG)
    content = _content(directory)
    label = str(directory)
    rename = _renaming(content, base)
    products = _products(content, config, rename, base, label)
    for module, values in content.biases.items():
        if module not in content.factors:
            raise _incomplete(module, label)
        name = _single(rename(f"{module}.bias"), base, label)
        check_shape(name, base.tensors[name].shape, base.label, values.shape, label)
        one = Stored("F32", (1, 1), np.ones(1, np.float32).view(np.uint8))
        products[name] = Product(values, one, 1, _rank_and_scale(module, config)[1])
    return Adapter(products, _whole(content, rename, base, label), base, label)


def vector_from(path: Path, base: Mapped) -> Lazy:
    """Return the task vector that a path stands for, computed when it is read.

    Args:
        path: a fine-tuned checkpoint in any layout, a vector that taskvec wrote, or an adapter.
        base: the pre-trained weights.

    Raises:
        MissingArtifact, IncompatibleWeights: see `open_adapter`, `taskvec.mapped.open_weights` and
            `taskvec.mapped.difference`; also if a vector starts from other weights.
    """
    if is_adapter(path):
        return open_adapter(_directory(path), base)
    weights = open_weights(path)
    kind = weights.metadata.get("kind", "checkpoint")
    if kind == "checkpoint":
        return difference(base, weights)
    if kind != "vector":
        raise IncompatibleWeights(f"{path} holds a {kind!r}, expected a checkpoint or a vector")
    origin, found = str(weights.metadata.get("origin")), base.fingerprint
    if origin != found:
        raise IncompatibleWeights(
            f"{path} starts from the pre-trained weights {origin[:12]}, {base.label} is "
            f"{found[:12]}; use the checkpoint that it was extracted with"
        )
    return StoredVector(weights)


def _directory(path: Path) -> Path:
    return path.parent if path.name in FILES else path


def _config(path: Path) -> dict[str, Any]:
    """Return the options of an adapter; nothing in them changes the weights unnoticed."""
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=headers.unique)
    except FileNotFoundError:
        raise MissingArtifact(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise IncompatibleWeights(f"{path}: malformed JSON: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else config
    if kind != "LORA":
        raise IncompatibleWeights(
            f"{path}: peft_type {kind!r}; only LORA is a sum of weights that can be read: {ADVICE}"
        )
    for option in sorted(config):
        if config[option] and option not in USED + WITHOUT_EFFECT:
            reason = REFUSED.get(option, "this option is not known here")
            raise IncompatibleWeights(f"{path}: {option} is set: {reason}; {ADVICE}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(REBASED):
        raise IncompatibleWeights(
            f"{path}: init_lora_weights {start!r} changes the base weights before training, so the "
            f"product is no vector of the base; {ADVICE}"
        )
    _check_numbers(config, path)
    return dict(config)


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise IncompatibleWeights(f"{path}: rank_pattern and alpha_pattern must be mappings")
    for rank in (config.get("r"), *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise IncompatibleWeights(f"{path}: rank {rank!r}; expected a whole number above 0")
    for alpha in (config.get("lora_alpha"), *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise IncompatibleWeights(f"{path}: lora_alpha {alpha!r}; expected a number")
    for pattern in (*ranks, *alphas):
        try:
            re.compile(_ending(pattern))
        except re.error as error:
            raise IncompatibleWeights(f"{path}: {pattern!r} is no pattern: {error}") from None


def _patterns(config: Mapping[str, Any], option: str) -> Any:
    return config.get(option) or {}


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def _rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return the rank and the scale of a module's product, by the patterns of the options.

    A pattern must match the end of the module's name from the start of a part; the first counts.
    """

    def chosen(option: str, default: Any) -> Any:
        for pattern, value in _patterns(config, option).items():
            if re.fullmatch(_ending(pattern), module):
                return value
        return default

    rank, alpha = chosen("rank_pattern", config["r"]), chosen("alpha_pattern", config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _content(directory: Path) -> _Content:
    """Return the tensors of an adapter, sorted into kinds."""
    found = [directory / name for name in FILES if (directory / name).is_file()]
    if not found:
        raise MissingArtifact(f"{directory} holds no {FILES[0]}")
    tensors = open_weights(found[0]).named
    prefix = PREFIX if any(key.startswith(PREFIX) for key in tensors) else ""
    content, adapters = _Content(), set()
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        factor = MATRIX.fullmatch(name) or TABLE.fullmatch(name)
        bias, saved = BIAS.fullmatch(name), SAVED.fullmatch(name)
        match = factor or bias or saved
        if (factor or bias) and tensor.dtype not in FLOATS:
            raise IncompatibleWeights(
                f"{found[0]}: {key!r} is {tensor.dtype}; expected one of {', '.join(FLOATS)}"
            )
        if not key.startswith(prefix) or (not match and STRANGE.search(name)):
            raise IncompatibleWeights(
                f"{found[0]}: {key!r} is no tensor of a plain LoRA adapter; {ADVICE}"
            )
        if match:
            adapters.add(match["adapter"])
        if factor:
            content.factors.setdefault(factor["module"], {})[factor["kind"]] = tensor
        elif bias:
            content.biases[bias["module"]] = tensor
        else:
            whole = f"{saved['module']}.{saved['name']}" if saved else name
            content.whole.append((whole.replace(".base_layer.", "."), tensor))
    if len(adapters) > 1:
        names = ", ".join(sorted(name or "one without a name" for name in adapters))
        raise IncompatibleWeights(f"{found[0]} holds several adapters ({names}); save them apart")
    return content


def _renaming(content: _Content, base: Mapped) -> Callable[[str], str]:
    """Return how the adapter's names become those of the base."""
    known = base.named
    names = [f"{module}.weight" for module in content.factors]
    names += [name for name, _ in content.whole]

    def fits(rename: Callable[[str], str]) -> bool:
        return all(rename(name) in known for name in names)

    if fits(_same):
        return _same
    heads = {name.partition(".")[0] for name in known}
    rules: list[Callable[[str], str]] = [partial(_longer, head) for head in sorted(heads)]
    if len({name.partition(".")[0] for name in names}) == 1:
        rules.append(_shorter)
    fitting = [rule for rule in rules if fits(rule)]
    return fitting[0] if len(fitting) == 1 else _same


def _same(name: str) -> str:
    return name


def _longer(head: str, name: str) -> str:
    return f"{head}.{name}"


def _shorter(name: str) -> str:
    return name.partition(".")[2]


def _products(
    content: _Content,
    config: Mapping[str, Any],
    rename: Callable[[str], str],
    base: Mapped,
    label: str,
) -> dict[str, Product]:
    """Return the products by the names of the tensors that they are added to."""
    result: dict[str, Product] = {}
    squares: dict[str, Product] = {}
    ways = set()  # how the matrices of linear modules that are no squares lie
    for module, pair in content.factors.items():
        if ".base_layer." in module or rename(f"{module}.in_proj_weight") in base.tensors:
            raise IncompatibleWeights(
                f"{label} adapts {module!r}, a MultiheadAttention or a part of it, whose output "
                f"matrix peft (to 0.21) changes by twice the product; {ADVICE}, with the release "
                "that it was trained with"
            )
        name = _single(rename(f"{module}.weight"), base, label)
        if pair.keys() not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise _incomplete(module, label)
        fitting = _fitting(pair, base.tensors[name].shape, *_rank_and_scale(module, config))
        if not fitting:
            shapes = [f"{kind} {tensor.shape}" for kind, tensor in sorted(pair.items())]
            raise IncompatibleWeights(
                f"{label}: the factors {' and '.join(shapes)} of {module!r}, of rank "
                f"{_rank_and_scale(module, config)[0]} by {CONFIG}, do not make {name!r} of shape "
                f"{base.tensors[name].shape} in {base.label}; use the base model it was trained on"
            )
        result[name] = fitting[0]
        if len(fitting) == 2:
            squares[name] = fitting[1]
        elif "A" in pair and len(pair["A"].shape) == 2:
            ways.add(fitting[0].turned)
    turned = bool(config.get("fan_in_fan_out"))
    if squares and (not turned) in ways:
        raise IncompatibleWeights(
            f"{label}: fan_in_fan_out is {turned}, but other matrices lie the other way, so it is "
            f"not known which way {min(squares)!r}, a square, lies; {ADVICE}"
        )
    return result | (squares if turned else {})


def _fitting(
    pair: Mapping[str, Stored], shape: tuple[int, ...], rank: int, scale: float
) -> list[Product]:
    """Return the products that have a shape: one, two for a square matrix, or none."""
    embedding = "embedding_A" in pair
    a, b = (pair[f"embedding_{kind}" if embedding else kind] for kind in "AB")
    if a.shape[:1] != (rank,) or b.shape[1:] != (rank, *(1 for _ in a.shape[2:])):
        return []
    found = []
    if not embedding and (*b.shape[:1], *a.shape[1:]) == shape:
        found.append(Product(b, a, rank, scale))
    if len(a.shape) == 2 and (a.shape[1], b.shape[0]) == shape:
        found.append(Product(b, a, rank, scale, turned=True))
    return found


def _whole(content: _Content, rename: Callable[[str], str], base: Mapped, label: str) -> Lazy:
    """Return how whole tensors differ from the base, by the names of the base."""
    given: dict[str, Stored] = {}
    for old, tensor in content.whole:
        name = rename(old)
        if name not in base.tensors and name not in base.tied:
            raise _unknown(name, base, label)
        if name in given:
            raise IncompatibleWeights(f"{label} holds {name!r} twice")
        given[name] = tensor
    tensors = {}
    for name, tensor in given.items():
        first = base.tied.get(name, name)
        for other in (first, *(second for second, twin in base.tied.items() if twin == first)):
            if not (other in given and same_bytes(given[other], tensor)):
                raise _tied(name, other, base, label)
        before = base.tensors[first]
        check_shape(name, before.shape, base.label, tensor.shape, label)
        if before.dtype in FLOATS and tensor.dtype in FLOATS:
            tensors[first] = tensor
        elif not same_bytes(before, tensor):
            raise IncompatibleWeights(
                f"{label} changes {name!r}, which is {before.dtype} in {base.label} and "
                f"{tensor.dtype} in the adapter; a vector is made of {', '.join(FLOATS)}"
            )
    return Difference(base, Mapped(tensors, label), tensors)


def _single(name: str, base: Mapped, label: str) -> str:
    """Return a name; raise IncompatibleWeights unless a vector can change that tensor alone."""
    if name not in base.tensors and name not in base.tied:
        raise _unknown(name, base, label)
    for second, first in base.tied.items():
        if name in (first, second):
            raise _tied(name, second if name == first else first, base, label)
    if base.tensors[name].dtype not in FLOATS:
        raise IncompatibleWeights(
            f"{label} changes {name!r}, which is {base.tensors[name].dtype} in {base.label}; "
            f"a vector is made of {', '.join(FLOATS)}: use the base model before quantisation"
        )
    return name


def _unknown(name: str, base: Mapped, label: str) -> IncompatibleWeights:
    return IncompatibleWeights(
        f"{label} changes {name!r}, which {base.label} does not hold; use the base model that it "
        "was trained on (a new head, or the second name of a tied tensor, is in none)"
    )


def _tied(name: str, other: str, base: Mapped, label: str) -> IncompatibleWeights:
    return IncompatibleWeights(
        f"{label} changes {name!r} and not {other!r}, which are one tensor in {base.label}; "
        f"{ADVICE}"
    )


def _incomplete(module: str, label: str) -> IncompatibleWeights:
    return IncompatibleWeights(
        f"{label} does not hold both factors, A and B, of {module!r}; its file is not whole"
    )
