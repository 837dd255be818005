"""Files of torch: the tensors come out as they were, and nothing in a file is executed."""

import argparse
import functools
import pathlib
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taskvec import checkpoints, headers, streaming
from taskvec.errors import IncompatibleWeights, MissingArtifact
from taskvec.lazy import Held
from taskvec.mapped import Mapped
from taskvec.pickles import import_legacy, open_legacy, open_pickle

law = settings(deadline=None, max_examples=40)


def tensors_of(weights: Mapped) -> dict[str, Tensor]:
    """Return the tensors under all their names, in torch's dtypes."""
    kinds = {code: dtype for dtype, code in checkpoints.CODES.items()}
    found = {}
    for name, stored in weights.named.items():
        found[name] = torch.empty(stored.shape, dtype=kinds[stored.dtype])
        found[name].view(-1).view(torch.uint8)[:] = torch.from_numpy(stored.data)
    return found


def same(weights: Mapped, state: dict[str, Tensor]) -> bool:
    found = tensors_of(weights)
    return found.keys() == state.keys() and all(
        part.dtype == state[name].dtype and torch.equal(part, state[name])
        for name, part in found.items()
    )


def refused(open_file: Callable[[Path], Mapped], path: Path) -> str:
    with pytest.raises(IncompatibleWeights) as caught:
        open_file(path)
    return str(caught.value)


def odd() -> dict[str, Tensor]:
    """Tensors that do not lie in memory as they lie in a file."""
    base = torch.arange(24.0)
    return {
        "part": base[2:5],
        "turned": base.reshape(4, 6).T,
        "every": base[::3],
        "spread": torch.ones(1).expand(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "learnt": nn.Parameter(torch.ones(2)),
        "half": torch.ones(3).bfloat16(),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
        "truth": torch.tensor([True, False]),
        "wide": torch.ones(2).double(),
    }


def test_views_and_all_dtypes_are_read(tmp_path: Path) -> None:
    torch.save(odd(), tmp_path / "x.pt")
    weights = open_pickle(tmp_path / "x.pt")
    assert same(weights, odd())
    assert weights.tied == {}
    assert weights.fingerprint == checkpoints.fingerprint(odd())
    assert weights.label == str(tmp_path / "x.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: OrderedDict(state),
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": {"state_dict": 3}, "state_dict": state},
        lambda state: {f"module.{name}": part for name, part in state.items()},
        lambda state: {f"_orig_mod.module.{name}": part for name, part in state.items()},
        lambda state: {"model": {f"module._orig_mod.{n}": part for n, part in state.items()}},
    ],
    ids=range(8),
)
def test_state_dicts_are_found_and_unwrapped(
    tmp_path: Path, wrap: Callable[[Any], Any], zipped: bool
) -> None:
    state = {"a.weight": torch.ones(2, 3), "module.b": torch.zeros(2)}
    torch.save(wrap(state), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert same(open_pickle(tmp_path / "x.pt"), state)


def test_tied_tensors_are_one_and_stay_tied(tmp_path: Path) -> None:
    table = torch.ones(2, 3)
    state = {"words": table, "head": table, "turned": table.T, "x": torch.ones(2, 3)}
    torch.save(state, tmp_path / "x.pt")
    weights = open_pickle(tmp_path / "x.pt")
    assert weights.tied == {"words": "head"}
    assert weights.fingerprint == checkpoints.fingerprint(state)
    edit = Held({"head": np.full((2, 3), 0.5, np.float32)})
    streaming.apply(weights, edit, tmp_path / "y.safetensors")
    edited = checkpoints.load(tmp_path / "y.safetensors", "checkpoint").tensors
    assert edited["words"] is edited["head"]
    assert edited["words"].tolist() == [[1.5] * 3] * 2
    assert edited["turned"].tolist() == [[1.0] * 2] * 3


class Foreign:
    """A class that a file must not bring to life."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors but a dict"),
        ([torch.ones(2)], "holds no tensors but a list"),
        (torch.ones(2), "holds no tensors but a Tensor"),
        ({"x": 3}, "'x' is a int; expected names of tensors only"),
        ({3: torch.ones(2)}, "3 is a Tensor; expected names"),
        ({"x": torch.ones(2, dtype=torch.complex64)}, "'x' is torch.complex64"),
        ({"x": torch.ones(2, 2).to_sparse()}, "torch.sparse_coo on cpu; expected plain dense"),
        ({"x": torch.ones(2, device="meta")}, "on meta; expected plain dense tensors"),
        ({"x": torch.ones(2), "y": Foreign()}, "Unsupported global: GLOBAL test_pickles.Fo"),
        (
            nn.Linear(2, 2),
            r"GLOBAL torch.nn.modules.linear.Linear .* by `taskvec import x.pt --out",
        ),
    ],
    ids=range(10),
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(IncompatibleWeights, match=message):
        open_pickle(tmp_path / "x.pt")


def test_a_missing_file_is_a_missing_artifact(tmp_path: Path) -> None:
    for open_file in (open_pickle, open_legacy):
        for path in (tmp_path / "x.pt", tmp_path):
            with pytest.raises(MissingArtifact, match="does not exist"):
                open_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(64)}, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    for length in range(0, len(good) - 1, 13):
        path.write_bytes(good[:length])
        assert "cannot be read as plain tensors" in refused(open_pickle, path)
        assert "nothing" not in refused(open_legacy, path)
    path.write_bytes(b"PK\3\4" + good)
    assert "cannot be read as plain tensors" in refused(open_pickle, path)


@law
@given(st.data())
def test_damage_is_found_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.pt"
    torch.save(nn.Linear(2, 2) if data.draw(st.booleans()) else {"a": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    for open_file in (open_pickle, open_legacy):
        with suppress(IncompatibleWeights):
            open_file(path).measure()


@pytest.fixture
def modeling() -> Iterator[Callable[..., None]]:
    """Return a function that saves a module of a class of src.modeling, which then is gone."""

    def save(module: nn.Module, path: Path, **options: Any) -> None:
        source = types.ModuleType("src.modeling")
        named = {}
        for part in module.modules():
            kind = type(part)
            if kind.__module__ == __name__:
                named[kind] = kind.__qualname__
                kind.__module__, kind.__qualname__ = "src.modeling", kind.__name__
                setattr(source, kind.__name__, kind)
        sys.modules["src"], sys.modules["src.modeling"] = types.ModuleType("src"), source
        try:
            torch.save(module, path, **options)
        finally:
            del sys.modules["src"], sys.modules["src.modeling"]
            for kind, name in named.items():
                kind.__module__, kind.__qualname__ = __name__, name

    yield save
    assert "src" not in sys.modules


class Attention(nn.Module):
    """A block with everything that a module can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("absent", None)
        self.register_module("child", None)
        self.scale = nn.Parameter(torch.tensor(2.5).half())


class ImageEncoder(nn.Module):
    """As the class of the paper's code: a model, transforms and options."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 2), Attention(), nn.Linear(4, 4, bias=False))
        self.again = self.model[2]
        self.head = nn.Linear(4, 4)
        self.head.weight = self.model[2].weight
        self.layers = nn.ModuleDict({"a": nn.Embedding(3, 4), "b": nn.LayerNorm(4).bfloat16()})
        self.transforms = [Foreign(), nn.functional.gelu, slice(1, 2), {1, 2}, b"bytes", 1 << 70]
        self.args = argparse.Namespace(model="ViT-B-32", cache=pathlib.PurePosixPath("x"))
        self.half = functools.partial(nn.functional.gelu, approximate="tanh")
        self.statistics = np.ones(3)


class ClassificationHead(nn.Linear):
    """As the class of the paper's code: a zero-shot head."""

    def __init__(self, normalize: bool, weights: Tensor) -> None:
        super().__init__(weights.shape[1], weights.shape[0])
        self.normalize = normalize
        self.weight = nn.Parameter(weights.clone())


def test_a_pickled_module_is_read_without_its_class(
    tmp_path: Path, modeling: Callable[..., None]
) -> None:
    module = ImageEncoder()
    modeling(module, tmp_path / "finetuned.pt")
    with pytest.raises(ModuleNotFoundError, match="No module named 'src'"):
        torch.load(tmp_path / "finetuned.pt", weights_only=False)
    before = set(torch.serialization.get_safe_globals())
    weights = open_legacy(tmp_path / "finetuned.pt")
    state = module.state_dict()
    assert same(weights, state)
    assert "model.1.cache" not in state
    assert weights.tied == {"head.weight": "again.weight", "model.2.weight": "again.weight"}
    assert weights.fingerprint == checkpoints.fingerprint(state)
    assert set(torch.serialization.get_safe_globals()) == before


def test_protocols_of_pickle(tmp_path: Path, modeling: Callable[..., None]) -> None:
    module = Attention()
    modeling(module, tmp_path / "x.pt", pickle_protocol=3)
    assert same(open_legacy(tmp_path / "x.pt"), module.state_dict())
    modeling(module, tmp_path / "x.pt", pickle_protocol=4)
    assert "cannot be read as plain tensors" in refused(open_legacy, tmp_path / "x.pt")


def test_a_zero_shot_head_is_a_module_too(tmp_path: Path, modeling: Callable[..., None]) -> None:
    head = ClassificationHead(True, torch.ones(3, 4))
    modeling(head, tmp_path / "head_MNIST.pt")
    assert same(open_legacy(tmp_path / "head_MNIST.pt"), head.state_dict())


MODULES = st.recursive(
    st.sampled_from(
        [
            lambda: nn.Linear(2, 3),
            lambda: nn.Conv1d(2, 3, 1, bias=False),
            lambda: nn.BatchNorm2d(2),
            lambda: nn.LayerNorm(3, elementwise_affine=False),
            lambda: nn.GRU(2, 2),
            lambda: nn.MultiheadAttention(2, 1, kdim=3, vdim=1),
            lambda: nn.utils.weight_norm(nn.Linear(2, 2)),
            Attention,
            nn.GELU,
        ]
    ),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(
        lambda makers: lambda: nn.Sequential(*(make() for make in makers))
    ),
    max_leaves=6,
)


@law
@given(MODULES, st.booleans())
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_module_has_the_names_and_values_of_its_state_dict(
    tmp_path_factory: pytest.TempPathFactory, make: Callable[[], nn.Module], half: bool
) -> None:
    module = make().half() if half else make()
    path = tmp_path_factory.mktemp("module") / "x.pt"
    torch.save(module, path)
    if module.state_dict():
        assert same(open_legacy(path), module.state_dict())
    else:
        assert "holds no tensors" in refused(open_legacy, path)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_modules_in_the_format_before_torch_1_6_are_refused(
    tmp_path: Path, modeling: Callable[..., None]
) -> None:
    modeling(ImageEncoder(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert "is not in the format of torch 1.6 and later" in refused(open_legacy, tmp_path / "x.pt")
    assert "GLOBAL src.modeling.ImageEncoder" in refused(open_pickle, tmp_path / "x.pt")


def changed(**attributes: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.__dict__.update(attributes)
    return module


def ring() -> nn.Module:
    module = nn.Sequential(nn.Linear(1, 1))
    module._modules["0"] = module
    return module


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(2)}, "its content is no pickled module but a dict; a plain state dict"),
        (Foreign(), "its content is no pickled module but a test_pickles.Foreign"),
        (changed(_modules={"a": Foreign()}), "'a' is no pickled module but a test_pickles.F"),
        (changed(_modules={"a": torch.ones(2)}), "'a' is no pickled module but a Tensor"),
        (changed(_modules=[1]), "its content is no pickled module"),
        (changed(_buffers=None), "its content is no pickled module"),
        (changed(_non_persistent_buffers_set=3), "its content is no pickled module"),
        (changed(_parameters={"a": Foreign()}), "'a' is a test_pickles.Foreign; expected"),
        (changed(_buffers={"a": 3}), "'a' is a int; expected names of tensors only"),
        (nn.GELU(), "holds no tensors"),
        (ring(), "more than 50000 modules"),
    ],
    ids=range(11),
)
def test_what_is_no_module_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(IncompatibleWeights, match=message):
        open_legacy(tmp_path / "x.pt")


def test_a_program_of_torch_is_refused(tmp_path: Path) -> None:
    with zip_file(tmp_path / "x.pt") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/constants.pkl", pickle.dumps((), 2))
    for open_file in (open_pickle, open_legacy):
        assert "cannot be read as plain tensors" in refused(open_file, tmp_path / "x.pt")


class Call:
    """An object that is a call when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attacks(mark: Path) -> dict[str, Any]:
    """Return objects that would make the file ``mark`` if they were unpickled."""
    from numpy.testing._private import utils

    code = f"open({str(mark)!r}, 'w')"
    return {
        "system": Call(__import__("os").system, f"touch {mark}"),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "import": Call(__import__, "antigravity"),
        "process": Call(subprocess.Popen, ["touch", str(mark)]),
        "run": Call(subprocess.run, ["touch", str(mark)]),
        "numpy": Call(utils.runstring, code, {}),
        "codecs": Call(__import__("_codecs").lookup, "rot13"),
        "bound": Call(pathlib.Path(mark).touch),
        "partial": Call(functools.partial(pathlib.Path(mark).touch)),
        "torch": Call(torch.load, str(mark)),
    }


ATTACKS = sorted(attacks(Path("x")))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_is_executed(tmp_path: Path, attack: str, zipped: bool) -> None:
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    call = attacks(mark)[attack]
    module = changed(note=call)
    for content in (call, {"a": torch.ones(2), "b": call}, changed(_modules={"a": call}), module):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        refused(open_pickle, path)
        if content is not module or attack not in ("numpy", "torch"):
            refused(open_legacy, path)
        elif zipped:
            # A name of another package may be a class of the module's attributes. It is inert.
            assert same(open_legacy(path), module.state_dict())
    assert not mark.exists()


@pytest.mark.parametrize("attack", ["system", "eval", "exec", "import", "process", "run", "codecs"])
def test_names_of_python_that_no_module_is_made_of_are_refused(tmp_path: Path, attack: str) -> None:
    torch.save(changed(note=attacks(tmp_path / "mark")[attack]), tmp_path / "x.pt")
    message = refused(open_legacy, tmp_path / "x.pt")
    assert "which no module is made of; nothing of the file was executed" in message


def test_objects_made_by_hand_stay_inert(tmp_path: Path) -> None:
    """BUILD on a class, REDUCE of an instance, and a class whose state is no mapping."""
    path = tmp_path / "x.pt"
    torch.save({}, path)
    for content, message in (
        (b"csrc\nA\n)\x81)R.", "Trying to call reduce for unrecognized function"),
        (b"csrc\nA\n}X\x01\x00\x00\x00aNsb.", "Can only build"),
        (b"csrc\nA\n)\x81K\x01b.", "its content is no pickled module but a src.A"),
    ):
        with zip_file(path) as archive:
            archive.writestr("x/version", "3\n")
            archive.writestr("x/data.pkl", b"\x80\x02" + content)
        assert message in refused(open_legacy, path)


def zip_file(path: Path) -> Any:
    from zipfile import ZipFile

    return ZipFile(path, "w")


def test_a_legacy_file_becomes_a_checkpoint(tmp_path: Path, modeling: Callable[..., None]) -> None:
    module = ImageEncoder()
    modeling(module, tmp_path / "finetuned.pt")
    mark = import_legacy(tmp_path / "finetuned.pt", tmp_path / "x.safetensors")
    loaded = checkpoints.load(tmp_path / "x.safetensors", "checkpoint")
    state = module.state_dict()
    assert loaded.tensors.keys() == state.keys()
    assert all(torch.equal(part, state[name]) for name, part in loaded.tensors.items())
    assert loaded.metadata["imported"] == "finetuned.pt"
    assert mark == loaded.fingerprint == checkpoints.fingerprint(state)
    import_legacy(tmp_path / "finetuned.pt", tmp_path / "y.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    modeling(ClassificationHead(True, torch.ones(3, 4)), tmp_path / "head.pt")
    import_legacy(tmp_path / "head.pt", tmp_path / "head.safetensors")
    metadata = checkpoints.load(tmp_path / "head.safetensors", "checkpoint").metadata
    assert headers.TIED not in metadata
