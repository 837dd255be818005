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


def resize(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return pictures (N, H, W) or (N, H, W, 3) as (N, 3, S, S) uint8, by PIL's bicubic filter.

    Grey is repeated in the three channels; the aspect ratio is not kept. PIL widens the filter when
    it shrinks a picture, so that nothing aliases.
    """
    square = (size, size)
    resized = [
        np.asarray(Image.fromarray(image).resize(square, Image.Resampling.BICUBIC))
        for image in images
    ]
    stacked = np.stack(resized)
    if stacked.ndim == 3:
        stacked = np.repeat(stacked[..., None], 3, axis=3)  # (N, S, S, 3)
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


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
    allow. Splits that come with the items are kept, and thinned to the declared sizes.

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
    if items.splits is None:
        homes = _draw_groups(items, unique, sizes, seed)
    else:
        homes = _given_groups(items, items.splits)
    result: list[str | None] = [None] * len(marks)
    for split in SPLITS:
        candidates = [i for i in unique if homes.get(items.groups[i]) == split]
        if len(candidates) < sizes[split]:
            raise InvalidData(
                f"{len(candidates)} items are left for {split} after {len(marks) - len(unique)} "
                f"duplicates were removed, expected {sizes[split]}; lower {split} in params.yaml"
            )
        for i in _stratify(items, candidates)[: sizes[split]]:
            result[i] = split
    return result


def near_duplicates(images: NDArray[np.uint8], splits: Sequence[str]) -> int:
    """Return how many pairs of pictures in different splits look nearly the same.

    Nearly: thumbnails of 8 x 8 grey levels differ by at most `NEAR` levels, root mean square. A
    figure to look at, not a verdict: different items of a simple source come close, too.

    Args:
        images: (N, 3, S, S) uint8, N up to some ten thousand.
        splits: (N,).
    """
    size = (THUMBNAIL, THUMBNAIL)
    grey = images.mean(axis=1).round().astype(np.uint8)  # (N, S, S)
    small = np.stack(
        [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in grey]
    )
    # integers below 2**24: sums and products of float32 are exact
    flat = small.reshape(len(small), -1).astype(np.float32)
    squares = (flat**2).sum(axis=1)
    limit = NEAR**2 * flat.shape[1]
    names = np.array(splits)
    pairs = 0
    for k, left in enumerate(SPLITS):
        for right in SPLITS[k + 1 :]:
            a, b = names == left, names == right
            distances = squares[a, None] + squares[None, b] - 2 * flat[a] @ flat[b].T
            pairs += int((distances <= limit).sum())
    return pairs


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
    if found != list(range(len(found))):
        raise InvalidData(
            f"the labels are {found[:20]}; expected 0 to the number of classes - 1, without gaps"
        )


def _stratify(items: Items, positions: Sequence[int]) -> list[int]:
    """Return the positions so that every beginning has the classes in nearly equal proportions."""
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
    items: Items, unique: Sequence[int], sizes: Mapping[str, int], seed: int
) -> dict[str, str]:
    """Return the split of each group: large groups first, each to where most of it is needed."""
    wanted = sum(sizes[split] for split in SPLITS)
    if len(unique) < wanted:
        declared = " + ".join(f"{split} {sizes[split]}" for split in SPLITS)
        raise InvalidData(
            f"{len(unique)} items are left after {len(items.labels) - len(unique)} duplicates were "
            f"removed, expected {wanted} ({declared}); lower the sizes in params.yaml"
        )
    if len({items.groups[i] for i in unique}) == len(unique):
        return _draw_items(items, unique, sizes)
    quota = _quotas(items, unique, sizes)
    need = {split: Counter(quota[split]) for split in SPLITS}
    classes: dict[str, Counter[int]] = defaultdict(Counter)
    for i in unique:
        classes[items.groups[i]][int(items.labels[i])] += 1
    homes: dict[str, str] = {}
    spare = []
    for group in sorted(classes, key=lambda name: (-classes[name].total(), _hash(seed, name))):
        home = max(SPLITS, key=lambda split: _fit(classes[group], need[split], quota[split]))
        if not any(need[home][label] > 0 for label in classes[group]):
            spare.append(group)
            continue
        homes[group] = home
        need[home] -= classes[group]  # `-=` on counters drops what falls to zero or below
    missing = Counter(dict(sizes))
    for group, home in homes.items():
        missing[home] -= classes[group].total()
    for group in spare:
        home = max(SPLITS, key=missing.__getitem__)
        if missing[home] <= 0:
            break
        homes[group] = home
        missing[home] -= classes[group].total()
    return homes


def _draw_items(items: Items, unique: Sequence[int], sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the split of each item where every item is a group of its own.

    Test is drawn first, then validation, then train: to train on more or less moves no test item.
    """
    ranked = iter(_stratify(items, unique))
    return {
        items.groups[i]: split for split in reversed(SPLITS) for i in islice(ranked, sizes[split])
    }


def _quotas(
    items: Items, unique: Sequence[int], sizes: Mapping[str, int]
) -> dict[str, Counter[int]]:
    """Return how many items of each class each split should have; the sums are the sizes."""
    sequence = [int(items.labels[i]) for i in _stratify(items, unique)]
    result, start = {}, 0
    for split in SPLITS:
        result[split] = Counter(sequence[start : start + sizes[split]])
        start += sizes[split]
    return result


def _fit(group: Counter[int], need: Counter[int], quota: Counter[int]) -> tuple[int, float]:
    """Return how many items of a group a split needs, then how empty the split is for them."""
    useful = (group & need).total()
    room = sum(need[label] for label in group)
    return useful, room / max(1, sum(quota[label] for label in group))


def _hash(seed: int, name: str) -> bytes:
    return sha256(f"{seed}:{name}".encode()).digest()
