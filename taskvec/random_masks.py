"""Random masks that follow from a seed, a label and a tensor's name, and from nothing else.

Each tensor of each vector has its own stream of random 32-bit numbers, its *lanes*: lane e belongs
to the element e of the flattened tensor. The generator is counter based (Philox4x64-10; Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so it can start at any lane at the
same price, and a mask depends neither on how a tensor is cut nor on which thread comes first.
"""

import hashlib
import json

import numpy as np
import numpy.typing as npt

Lanes = npt.NDArray[np.uint32]
RANGE = 1 << 32  # how many values a lane can have
PER_COUNT = 8  # lanes that one count of the generator's counter gives: 4 words of 64 bits


def lanes(seed: int, label: str, name: str, start: int, stop: int) -> Lanes:
    """Return the lanes ``start`` to ``stop``: uniform on 0 .. 2**32 - 1, (stop - start,).

    Args:
        seed: any whole number.
        label: which vector; vectors with different labels have independent lanes.
        name: which tensor of the vector.
        start: the first lane; lanes ``a`` to ``b`` are the same in every call that covers them.
        stop: the one after the last.
    """
    text = json.dumps([seed, label, name])  # a list: no two of them can run into one another
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    count, skipped = divmod(start, PER_COUNT)
    words = (skipped + stop - start + 1) // 2
    # random_raw is what numpy promises never to change; the low half of a word is the first lane.
    raw = np.random.Philox(key=key, counter=count).random_raw(words)
    return raw.astype("<u8", copy=False).view("<u4")[skipped : skipped + stop - start]


def bounds(probabilities: npt.ArrayLike) -> Lanes:
    """Return what a lane is below with each probability: ``round(2**32 * probability)``.

    At most 2**32 - 1, so what has the probability 1 fails once in 2**32 times.
    """
    scaled = np.rint(np.asarray(probabilities, np.float64) * RANGE)
    return np.minimum(scaled, RANGE - 1).astype(np.uint32)
