"""What stands in a file of mergekit: models, parameters, dtypes, each checked when it is asked for.

A parameter stands with a model, with a slice or at the top; the first of these that has it wins.
Every message names the file and the key.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from taskvec.errors import InvalidInput, MissingArtifact, nearest

MAX_BYTES = 64 * 1024
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WORDS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}
TOP = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype",
    "chat_template", "modules", "tokenizer", "tokenizer_source",
)  # fmt: skip
VOCABULARY = (
    "vocabularies are not aligned here; remove this key if all models have the same one, else "
    "align them with mergekit first"
)
UNKNOWN_HERE = {
    "modules": "the parts of a model are not merged apart; write models instead",
    "tokenizer": VOCABULARY,
    "tokenizer_source": VOCABULARY,
}
BY_MODEL = frozenset({"weight", "density", "gamma", "epsilon"})
PARAMETERS = BY_MODEL | {"normalize", "lambda", "rescale", "int8_mask", "t", "filter_wise"}

Scalar = bool | int | float | str
Scopes = Sequence[tuple[str, Mapping[str, Any]]]  # (place, parameters), the first one wins


@dataclass(frozen=True)
class Model:
    """A model of a file: its path, where it stands, and where its own parameters may stand."""

    path: str
    place: str
    scopes: Scopes


class File:
    """A file of mergekit.

    Attributes:
        path: where it lies.
        warnings: what the user should read, grows while the file is read.
        models: in their order, with a base that is not among them as the last.
        base: the path of the base, None if there is none.
        blocks: how many blocks every model must have, None if any number will do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._raw = self._checked("", _loaded(path), TOP)
        for key, message in UNKNOWN_HERE.items():
            if key in self._raw:
                self.refuse(key, message)
        if "chat_template" in self._raw:
            self.warnings.append("chat_template: no weight depends on it; ignored")
        if ("models" in self._raw) == ("slices" in self._raw):
            self.refuse("models", "expected either models or slices")
        self.base = self._base("", self._raw)
        self.blocks: int | None = None
        self._top = self._scopes("", self._raw)
        self.models = self._sources() if "slices" in self._raw else self._listed()
        paths = [model.path for model in self.models]
        for place, model in enumerate(self.models):
            if model.path in paths[:place]:
                self.refuse(f"{model.place}.model", f"{model.path!r} stands twice")
        if self.base is not None and self.base not in paths:
            if self.blocks is not None:
                self.refuse("base_model", f"{self.base!r} is not among the sources; add it")
            self.models.append(Model(self.base, "base_model", self._top))

    def refuse(self, key: str, message: str) -> NoReturn:
        """Raise InvalidInput, which names the file and the key."""
        raise InvalidInput(f"{self.path}: {key}: {message}")

    def method(self, known: Iterable[str], reasons: Mapping[str, str]) -> str:
        """Return the name of the method, one of the known ones."""
        method = self._raw.get("merge_method")
        if not isinstance(method, str) or method not in known:
            reason = reasons.get(str(method), "this method has no counterpart here")
            found = "missing" if method is None else f"found {short(method)}: {reason}"
            self.refuse("merge_method", f"{found}; known: {', '.join(sorted(known))}")
        return method

    def dtypes(self) -> tuple[str | None, str | None]:
        """Return the dtype that mergekit would compute in, and the one that it would write."""
        found = {}
        for key in ("dtype", "out_dtype"):
            name = str(self._raw.get(key, "")).removeprefix("torch.")
            if key in self._raw and name not in DTYPES:
                self.refuse(key, f"found {short(self._raw[key])}; expected {', '.join(DTYPES)}")
            found[key] = DTYPES.get(name)
        return found["dtype"], found["out_dtype"] or found["dtype"]

    def check_parameters(self, method: str, used: Iterable[str], *, of_base: bool) -> None:
        """Refuse unknown parameters, and warn of those that have no effect.

        Args:
            method: the name of the method.
            used: the parameters that have an effect in it.
            of_base: whether a base has parameters in it.
        """
        own = self._own
        for place, values in {scope: v for m in self.models for scope, v in m.scopes}.items():
            if not of_base and place in own and own[place].path == self.base:
                if values:
                    self.warnings.append(f"{place}: the base has none in {method}; ignored")
                continue
            for key in values:
                here = f"{place}.{key}"
                if key not in PARAMETERS:
                    self.refuse(here, f"unknown parameter; {nearest(str(key), PARAMETERS)}")
                if key not in used:
                    self.warnings.append(f"{here} has no effect on the result of {method}; ignored")
                elif key not in BY_MODEL and place in own:
                    self.warnings.append(f"{here}: mergekit reads it at the top alone; ignored")

    @property
    def shared(self) -> Scopes:
        """Where the parameters stand that do not belong to one model."""
        return [scope for scope in self.models[0].scopes if scope[0] not in self._own]

    @property
    def _own(self) -> dict[str, Model]:
        """The models by the place of the parameters that are theirs alone."""
        return {m.scopes[0][0]: m for m in self.models if m.scopes is not self._top}

    def number(
        self,
        key: str,
        scopes: Scopes,
        default: float | None,
        expected: str = "a number",
        fits: Callable[[float], bool] = math.isfinite,
    ) -> float:
        """Return a parameter that is a number.

        Args:
            key: its name.
            scopes: where it may stand.
            default: its value if it stands nowhere; None if it must not be missing.
            expected: what it must be, in words.
            fits: tells whether it is that.
        """
        place, value = self._setting(key, scopes, default)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not fits(number):
            self.refuse(place, f"found {short(value)}; expected {expected}")
        return number

    def truth(self, key: str, scopes: Scopes, default: bool) -> bool:
        """Return a parameter that is true or false."""
        place, value = self._setting(key, scopes, default)
        if str(value).lower() not in WORDS:
            self.refuse(place, f"found {short(value)}; expected true or false")
        return WORDS[str(value).lower()]

    def _setting(self, key: str, scopes: Scopes, default: Scalar | None) -> tuple[str, Scalar]:
        """Return where a parameter stands, and its value."""
        for place, values in scopes:
            if key in values:
                return f"{place}.{key}", self._single(f"{place}.{key}", values[key])
        if default is None:
            self.refuse(f"{scopes[0][0]}.{key}", "missing; give a number here or at the top")
        return key, default

    def _single(self, place: str, setting: Any) -> Scalar:
        """Return the one value that a setting has for all tensors."""
        conditions = setting if isinstance(setting, list) else [setting]
        if not conditions or not isinstance(conditions[0], dict):
            return self._constant(place, setting)
        values: list[Scalar] = []
        for number, item in enumerate(conditions):
            here = f"{place}[{number}]"
            condition = self._checked(here, item, ("value", "filter"))
            values.append(self._constant(f"{here}.value", condition.get("value")))
            if condition.get("filter", "*") in ("*", ""):
                break
        else:
            self.refuse(place, "filters that leave tensors out; give one value for all tensors")
        if len(set(values)) > 1:
            self.refuse(place, f"found {short(values)} by filters; give one value for all tensors")
        return values[0]

    def _constant(self, place: str, value: Any) -> Scalar:
        """Return a value, also of a gradient that does not change."""
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(item, bool | int | float | str) for item in values):
            self.refuse(place, f"found {short(value)}; expected a number, or true or false")
        if len(set(values)) > 1:
            self.refuse(
                place,
                f"found {short(value)}, a gradient over the layers; give one value for all layers",
            )
        first: Scalar = values[0]
        return first

    def _listed(self) -> list[Model]:
        entries = self._list("models", self._raw["models"])
        return self._models("models", entries, ("model", "parameters"), self._top)

    def _sources(self) -> list[Model]:
        """Return the models of the only slice."""
        slices = self._list("slices", self._raw["slices"])
        if len(slices) > 1:
            self.refuse(
                "slices",
                f"found {len(slices)}; expected one that covers all layers: layers are merged in "
                "their places, not stacked",
            )
        only = self._checked("slices[0]", slices[0], ("sources", "base_model", "parameters"))
        self.base = self._base("slices[0].", only) or self.base
        entries = self._list("slices[0].sources", only.get("sources"))
        scopes = [*self._scopes("slices[0].", only), *self._top]
        keys = ("model", "layer_range", "parameters")
        models = self._models("slices[0].sources", entries, keys, scopes)
        ends = [
            self._end(f"{model.place}.layer_range", entry["layer_range"])
            for model, entry in zip(models, entries, strict=True)
        ]
        if len(set(ends)) > 1:
            self.refuse("slices[0].sources", f"found ranges to {short(ends)}; expected the same")
        self.blocks = ends[0]
        return models

    def _end(self, place: str, found: Any) -> int:
        """Return where a range of layers ends, which must be that of a whole model."""
        pair = isinstance(found, list) and len(found) == 2
        if not pair or not all(type(n) is int for n in found) or not found[1] > found[0] == 0:
            self.refuse(
                place, f"found {short(found)}; expected [0, number of layers], for whole models"
            )
        return int(found[1])

    def _models(
        self, place: str, entries: Sequence[Any], keys: Sequence[str], outer: Scopes
    ) -> list[Model]:
        models = []
        for number, entry in enumerate(entries):
            here = f"{place}[{number}]"
            values = self._checked(here, entry, keys)
            for key in {"model", "layer_range"} & set(keys) - values.keys():
                self.refuse(f"{here}.{key}", "missing")
            path = self._reference(f"{here}.model", values["model"])
            models.append(Model(path, here, [*self._scopes(f"{here}.", values), *outer]))
        return models

    def _scopes(self, place: str, values: Mapping[str, Any]) -> Scopes:
        found = values.get("parameters", {})
        if not isinstance(found, dict):
            self.refuse(f"{place}parameters", f"found {short(found)}; expected names and values")
        return [(f"{place}parameters", found)]

    def _base(self, place: str, values: Mapping[str, Any]) -> str | None:
        if "base_model" not in values:
            return None
        return self._reference(f"{place}base_model", values["base_model"])

    def _reference(self, place: str, value: Any) -> str:
        """Return the path of a model, given as a text or as ``{model: {path: text}}``."""
        path = value
        if isinstance(path, dict):
            path = self._checked(place, path, ("model",)).get("model")
            path = self._checked(f"{place}.model", path, ("path",)).get("path")
        if not isinstance(path, str) or not path:
            self.refuse(place, f"found {short(value)}; expected the path of a model")
        for mark, meaning in (("+", "a LoRA adapter"), ("@", "a revision")):
            if mark in path and path is value:
                self.refuse(
                    place,
                    f"found {value!r}, where {mark} stands for {meaning}; name a local directory "
                    f"with the weights as they are, or write {{model: {{path: {value!r}}}}} if "
                    "this is one",
                )
        return path

    def _checked(self, place: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
        """Return the keys that have a value; all must be among those known."""
        if not isinstance(value, dict):
            self.refuse(place or "the file", f"found {short(value)}; expected {', '.join(keys)}")
        for key in value:
            if key not in keys:
                self.refuse(f"{place}.{key}".lstrip("."), f"unknown key; {nearest(str(key), keys)}")
        return {key: item for key, item in value.items() if item is not None}

    def _list(self, place: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            self.refuse(place, f"found {short(value)}; expected a list")
        return value


def short(value: Any) -> str:
    """Return a value for a message, cut short."""
    return reprlib.repr(value)


def _loaded(path: Path) -> Any:
    """Return the contents of a YAML file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingArtifact(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{path} has {len(data)} bytes; at most {MAX_BYTES}")
    try:
        return YAML(typ="safe", pure=True).load(data.decode())
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidInput(f"{path}:{line}: {error.problem or error.context}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
