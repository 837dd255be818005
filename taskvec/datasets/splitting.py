"""From items to splits: one size for all pictures, no item twice, no group in two splits.

Nothing is drawn by a random number generator: whatever is chosen comes first in the order of
SHA-256 over the seed and a name, which no platform and no version of a library changes.

Letters: N items, S pixels along an edge.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from taskvec.datasets.items import SPLITS, Items
from taskvec.errors import InvalidData

THUMBNAIL = 8  # pixels along an edge
NEAR = 4.0  # root mean square difference of thumbnails, grey levels of 255
BLOCK = 1024  # pictures that are compared with all others at once


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return pictures (N, H, W) or (N, H, W, 3) as (N, 3, S, S) uint8, by PIL's bicubic filter.

    Grey is repeated in the three channels; the aspect ratio is not kept. PIL widens the filter when
    it shrinks a picture, so that nothing aliases.
    """
    result = np.empty((len(images), 3, size, size), dtype=np.uint8)
    for place, image in enumerate(images):
        resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized)  # (S, S) or (S, S, 3)
        result[place] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return result


def digests(images: NDArray[np.uint8]) -> list[str]:
    """Return the SHA-256 (hex) of the bytes of each picture."""
    return [sha256(image.tobytes()).hexdigest() for image in images]


def order(items: Items, seed: int) -> list[int]:
    """Return the positions of all items in the order in which they are drawn: by hash."""
    seen: Counter[str] = Counter()
    keys = []
    for group in items.groups:
        keys.append(sha256(f"{seed}:{group}:{seen[group]}".encode()).digest())
        seen[group] += 1
    return sorted(range(len(keys)), key=keys.__getitem__)


def assign(items: Items, sizes: Mapping[str, int], seed: int) -> list[str | None]:
    """Return the split of each item, or None where it is left out.

    Of equal pictures only the first stays. Groups never cross splits. Each split gets exactly its
    declared size, with the classes in the proportions that the source has, as well as the groups
    allow. Splits that come with the items are kept, and thinned to the declared sizes; if they hold
    no validation item, validation is drawn from train.

    Args:
        items: N items.
        sizes: items of train, validation and test.
        seed: which items are drawn; equal groups and labels give equal splits.

    Raises:
        InvalidData: the items contradict each other, or there are too few.
    """
    _check(items)
    marks = digests(items.images)
    first = dict(reversed([(mark, i) for i, mark in enumerate(marks)]))
    unique = [i for i in order(items, seed) if first[marks[i]] == i]
    sizes = {split: sizes[split] for split in SPLITS}
    removed = len(marks) - len(unique)
    if items.splits is None:
        homes = _draw_groups(items, unique, sizes, seed, removed)
    else:
        homes = _given_groups(items, items.splits)
        if "validation" not in items.splits:
            train = [i for i in unique if homes[items.groups[i]] == "train"]
            drawn = {split: sizes[split] for split in ("train", "validation")}
            homes |= _draw_groups(items, train, drawn, seed, removed)
    result: list[str | None] = [None] * len(marks)
    for split in SPLITS:
        candidates = [i for i in unique if homes.get(items.groups[i]) == split]
        if len(candidates) < sizes[split]:
            raise InvalidData(
                f"{len(candidates)} items are left for {split} after {removed} duplicates "
                f"were removed, expected {sizes[split]}; lower {split} in params.yaml"
            )
        for i in stratify(items, candidates)[: sizes[split]]:
            result[i] = split
    return result


def near_duplicates(images: NDArray[np.uint8], splits: Sequence[str]) -> int:
    """Return how many pairs of pictures in different splits look nearly the same.

    Nearly: thumbnails of 8 x 8 grey levels differ by at most `NEAR` levels, root mean square. A
    figure to look at, not a verdict: different items of a simple source come close, too.

    Args:
        images: (N, 3, S, S) uint8.
        splits: (N,).
    """
    small = np.stack([_thumbnail(image) for image in images])
    names = np.array(splits)
    parts = [small[names == split] for split in SPLITS]
    return sum(
        _near_pairs(left[start : start + BLOCK], right)
        for k, left in enumerate(parts)
        for right in parts[k + 1 :]
        for start in range(0, len(left), BLOCK)
    )


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the grey levels (64,) of a picture (3, S, S)."""
    grey = Image.fromarray(image.mean(axis=0).round().astype(np.uint8))
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel()


def _near_pairs(left: NDArray[np.float32], right: NDArray[np.float32]) -> int:
    # integers below 2**24: sums and products of float32 are exact
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)
    return int((squares - 2 * left @ right.T <= NEAR**2 * left.shape[1]).sum())


def _check(items: Items) -> None:
    count = len(items.labels)
    lengths = [len(items.images), count, len(items.groups)]
    lengths += [] if items.splits is None else [len(items.splits)]
    if len(set(lengths)) != 1 or not count:
        raise InvalidData(
            f"the adapter returned {lengths} images, labels, groups and splits; expected the same "
            "number of each, at least one"
        )
    found = sorted(set(items.labels.tolist()))
    if items.classes is not None:
        if found[0] < 0 or found[-1] >= items.classes:
            raise InvalidData(
                f"the labels are {found[:20]}; expected 0 to {items.classes - 1}, as the adapter "
                f"declares {items.classes} classes"
            )
    elif found != list(range(len(found))):
        raise InvalidData(
            f"the labels are {found[:20]}; expected 0 to the number of classes - 1, without gaps"
        )


def stratify(items: Items, positions: Sequence[int]) -> list[int]:
    """Return the positions so that every beginning has the classes in nearly equal proportions.

    Items of one class keep their order.
    """
    totals = Counter(int(items.labels[i]) for i in positions)
    seen: Counter[int] = Counter()
    keyed = []
    for place, i in enumerate(positions):
        label = int(items.labels[i])
        keyed.append(((seen[label] + 0.5) / totals[label], place, i))
        seen[label] += 1
    return [i for _, _, i in sorted(keyed)]


def _given_groups(items: Items, splits: Sequence[str]) -> dict[str, str]:
    homes: dict[str, str] = {}
    for group, split in zip(items.groups, splits, strict=True):
        if split not in SPLITS:
            raise InvalidData(
                f"the adapter returned the split {split!r}; known: {', '.join(SPLITS)}"
            )
        if homes.setdefault(group, split) != split:
            raise InvalidData(
                f"the group {group!r} is in {homes[group]} and in {split}; a group has one split"
            )
    return homes


def _draw_groups(
    items: Items, unique: Sequence[int], sizes: Mapping[str, int], seed: int, removed: int
) -> dict[str, str]:
    """Return the split of each group: large groups first, each to where most of it is needed."""
    wanted = sum(sizes.values())
    if len(unique) < wanted:
        declared = " + ".join(f"{split} {size}" for split, size in sizes.items())
        raise InvalidData(
            f"{len(unique)} items are left after {removed} duplicates were "
            f"removed, expected {wanted} ({declared}); lower the sizes in params.yaml"
        )
    if len({items.groups[i] for i in unique}) == len(unique):
        return _draw_items(items, unique, sizes)
    quota = _quotas(items, unique, sizes)
    need = {split: Counter(quota[split]) for split in sizes}
    classes: dict[str, Counter[int]] = defaultdict(Counter)
    for i in unique:
        classes[items.groups[i]][int(items.labels[i])] += 1
    homes: dict[str, str] = {}
    spare = []
    for group in sorted(classes, key=lambda name: (-classes[name].total(), _hash(seed, name))):
        home = max(sizes, key=lambda split: _fit(classes[group], need[split], quota[split]))
        if not any(need[home][label] > 0 for label in classes[group]):
            spare.append(group)
            continue
        homes[group] = home
        need[home] -= classes[group]  # `-=` on counters drops what falls to zero or below
    missing = Counter(dict(sizes))
    for group, home in homes.items():
        missing[home] -= classes[group].total()
    for group in spare:
        home = max(sizes, key=missing.__getitem__)
        if missing[home] <= 0:
            break
        homes[group] = home
        missing[home] -= classes[group].total()
    return homes


def _draw_items(items: Items, unique: Sequence[int], sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the split of each item where every item is a group of its own.

    Test is drawn first, then validation, then train: to train on more or less moves no test item.
    """
    ranked = iter(stratify(items, unique))
    return {
        items.groups[i]: split
        for split in reversed(list(sizes))
        for i in islice(ranked, sizes[split])
    }


def _quotas(
    items: Items, unique: Sequence[int], sizes: Mapping[str, int]
) -> dict[str, Counter[int]]:
    """Return how many items of each class each split should have; the sums are the sizes."""
    sequence = [int(items.labels[i]) for i in stratify(items, unique)]
    result, start = {}, 0
    for split, size in sizes.items():
        result[split] = Counter(sequence[start : start + size])
        start += size
    return result


def _fit(group: Counter[int], need: Counter[int], quota: Counter[int]) -> tuple[int, float]:
    """Return how many items of a group a split needs, then how empty the split is for them."""
    useful = (group & need).total()
    room = sum(need[label] for label in group)
    return useful, room / max(1, sum(quota[label] for label in group))


def _hash(seed: int, name: str) -> bytes:
    return sha256(f"{seed}:{name}".encode()).digest()
