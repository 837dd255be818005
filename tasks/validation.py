"""Validation data of several tasks, asked chunk by chunk; what was ever answered is remembered."""

import json
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Protocol

from torch import Tensor

from tasks.artifacts import Artifacts
from tasks.inputs import evaluation_code
from taskvec import answers, checkpoints, memo
from taskvec.answers import Answers
from taskvec.errors import InvalidData
from taskvec.headers import canonical
from taskvec.metrics import Pictures
from taskvec.numeric import numeric_fingerprint
from taskvec.search import Of, Slope
from taskvec.towers import Tower

Differentiate = Callable[[Callable[[], Tensor]], tuple[float, dict[str, float]]]
LOSSES = {"cross_entropy": answers.cross_entropy, "entropy": answers.entropy}


class Memory(Protocol):
    """Bytes by key, such as `taskvec.memo.Memo`.

    What remembers is no part of what an answer depends on, so that its code is not in the keys.
    """

    def get(self, found_by: bytes) -> bytes | None:
        """Return what is remembered under a key, if anything is."""

    def put(self, found_by: bytes, content: bytes) -> None:
        """Remember something."""


class Validation:
    """Heads and validation pictures of tasks, for one tower whose weights the caller sets.

    Attributes:
        items: task -> number of validation items.
        chunks: task -> number of chunks, in which a task is asked.
        sizes: task -> number of items of each chunk.
        asked: items that the tower really looked at; what was remembered cost nothing.
    """

    def __init__(
        self, artifacts: Artifacts, tower: Tower, tasks: Iterable[str], memory: Memory
    ) -> None:
        """Read pictures and heads of the tasks.

        Args:
            artifacts: where they lie.
            tower: the model; its weights do not matter yet.
            tasks: whose validation data.
            memory: what was answered before.
        """
        self._tower = tower
        self._numeric = numeric_fingerprint()
        self._code = evaluation_code(artifacts)
        self._applied = ""
        self._heads, self._pictures, self._data = {}, {}, {}
        for task in sorted(set(tasks)):
            images = checkpoints.load(artifacts.images(task, "validation"), "images")
            head = checkpoints.load(artifacts.head(task), "head")
            self._heads[task] = head.tensors["head"]
            self._pictures[task] = Pictures(
                tower, images.tensors["images"], images.tensors["labels"]
            )
            self._data[task] = {"images": images.fingerprint, "head": head.fingerprint}
        self.items = {task: len(pictures) for task, pictures in self._pictures.items()}
        self.chunks = {task: pictures.chunks for task, pictures in self._pictures.items()}
        self.sizes = {
            task: [min(answers.CHUNK, number - i) for i in range(0, number, answers.CHUNK)]
            for task, number in self.items.items()
        }
        self.asked = 0
        self._memory = memory

    def answers(
        self, weights: Mapping[str, object], apply: Callable[[], None], task: str, chunk: int
    ) -> Answers:
        """Return what the model with some weights says on one chunk of a task.

        Args:
            weights: everything that decides the weights, as JSON can hold it: fingerprints of
                what they are made of, and coefficients.
            apply: sets the tower to these weights; called only if the answer is not remembered and
                the tower does not have them from the last call. Nothing else may change the tower.
            task: one of the tasks.
            chunk: from 0.
        """
        found_by = self._key(weights, task, chunk)
        known = self._memory.get(found_by)
        if known is not None:
            return answers.unpacked(known)
        self._prepare(weights, apply)
        found = answers.answer(self._tower, self._heads[task], self._pictures[task], chunk)
        self.asked += len(found)
        self._memory.put(found_by, found.packed())
        return found

    def slope(
        self,
        weights: Mapping[str, object],
        apply: Callable[[], None],
        differentiate: Differentiate,
        task: str,
        chunk: int,
        of: Of,
    ) -> Slope:
        """Return a loss of the model with some weights on one chunk, and its slope.

        Args:
            weights: as in `answers`.
            apply: as in `answers`.
            differentiate: takes what computes the loss; returns its value and derivatives by
                the coefficients that ``weights`` names.
            task: one of the tasks.
            chunk: from 0.
            of: which loss; see `taskvec.answers`.
        """
        found_by = self._key(weights, task, chunk, of=of)
        known = self._memory.get(found_by)
        if known is not None:
            head, _, rest = known.partition(b"\n")
            content = json.loads(head)
            return Slope(content["value"], content["gradient"], answers.unpacked(rest))
        self._prepare(weights, apply)
        said: list[Answers] = []

        def loss() -> Tensor:
            value, judged = LOSSES[of](self._tower, self._heads[task], self._pictures[task], chunk)
            said.append(judged)
            return value

        value, gradient = differentiate(loss)
        if not all(map(isfinite, [value, *gradient.values()])):
            raise InvalidData(f"the slope of the {of} is not finite; use a smaller rate")
        self.asked += len(said[0])
        head_ = canonical({"value": value, "gradient": gradient}).encode()
        self._memory.put(found_by, head_ + b"\n" + said[0].packed())
        return Slope(value, gradient, said[0])

    def _key(self, weights: Mapping[str, object], task: str, chunk: int, of: str = "") -> bytes:
        return memo.key(
            weights=weights,
            data=self._data[task],
            chunk=[chunk, answers.CHUNK],
            numeric=self._numeric,
            code=self._code,
            **({"of": of} if of else {}),
        )

    def _prepare(self, weights: Mapping[str, object], apply: Callable[[], None]) -> None:
        wanted = canonical(weights)
        if wanted != self._applied:
            self._applied = ""  # what a failed call leaves is unknown
            apply()
            self._applied = wanted
