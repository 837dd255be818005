"""The model families: bundled weights, and any open_clip model by its name."""

import hashlib
import json
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import taskvec.torchvision_import  # noqa: F401  before open_clip
from taskvec import params
from taskvec.datasets.package_data import locate
from taskvec.errors import (
    IncompatibleWeights,
    InvalidData,
    InvalidInput,
    MissingArtifact,
    MissingDependency,
)
from taskvec.models import bundled
from taskvec.models import open_clip as family
from taskvec.sections import Source
from taskvec.towers import Alignment, Tower, check_identity
from tests.test_towers import assert_same, coloured

import open_clip  # isort: skip
from open_clip.pretrained import _PRETRAINED

TINY, QUICK = "tiny-clip", "tiny-clip-quickgelu"
CLASSES = ["red", "green", "blue thing"]
TEMPLATES = ["a photo of a {}.", "{}"]


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.marker,)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pictures(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


def features(tower: Tower, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return tower.features(images).cpu()


def install(directory: Path, files: dict[str, bytes]) -> Source:
    """Make a package of these files below a directory, which must be on sys.path."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    info = directory / "taskvec_test_data-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: taskvec-test-data\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    digests = {name: sha256(directory / name) for name in files}
    return Source(package="taskvec-test-data", version="1.0", files=digests)


def register_tiny_models(directory: Path) -> None:
    """Make two small models known to open_clip, which differ in their activation alone."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
        },
    }  # fmt: skip
    for name in (TINY, QUICK):
        path = directory / f"{name}.json"
        path.write_text(json.dumps({**config, "quick_gelu": name == QUICK}))
        open_clip.add_model_config(path)


def write_tiny_weights(path: Path, seed: int = 0) -> dict[str, str]:
    """Write random weights of the tiny model; return the options that name them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(TINY)
    save_file(model.state_dict(), path)
    return {"name": TINY, "pretrained": str(path), "sha256": sha256(path)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the options of a small random open_clip model in a local file."""
    directory = tmp_path_factory.mktemp("tiny")
    register_tiny_models(directory)
    return write_tiny_weights(directory / "weights.safetensors")


@pytest.fixture(scope="module")
def packages() -> None:
    """Skip where the packages with the bundled weights are not installed."""
    try:
        locate(bundled.VISION)
        locate(bundled.TEXT)
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Refuse every connection; yield the hosts that were asked for."""
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise socket.gaierror("Name or service not known")

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked  # type: ignore[return-value]


# The bundled family


@pytest.fixture(scope="module")
def base(packages: None) -> dict[str, Tensor]:
    """Return theta_pre of the bundled family, aligned to three pictures a colour."""
    images, labels = coloured(9)
    large = functional.interpolate(images.float(), 48).to(torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        # shorter than the names of ImageNet, which take four times as long
        patch.setattr(bundled, "_imagenet_prompts", lambda: [str(i) for i in range(1000)])
        return bundled.pretrained(48, [Alignment(large, labels, CLASSES, TEMPLATES)])


def test_the_bundled_tower_is_the_vision_part_of_an_open_clip_model(packages: None) -> None:
    tower, dual = bundled.tower(48), bundled.dual_tower(48)
    assert isinstance(dual, open_clip.CustomTextCLIP)
    whole = dual.state_dict()
    assert set(tower.state()) == {name for name in whole if name.startswith("visual.")}
    tower.load({name: whole[name] for name in tower.state()})
    images = pictures(3, 48)
    # to be bit-equal both must compute in one memory order
    visual = dual.get_submodule("visual").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        expected = functional.normalize(visual(tower.normalize(images).cpu()), dim=-1)
    assert torch.equal(features(tower, images), expected)


def test_the_bundled_base_holds_the_weights_of_the_package(base: dict[str, Tensor]) -> None:
    (path,) = locate(bundled.VISION).values()
    stored = list(torch.load(path, weights_only=True).values())
    tower = bundled.tower(None)
    tower.load(base)
    assert tower.image_size == bundled.IMAGE_SIZE
    trunk = [name for name in base if name.startswith("visual.trunk.")]
    assert all(torch.equal(base[n], v) for n, v in zip(trunk, stored, strict=False))
    assert set(base) - set(trunk) == {"visual.head.proj.weight"}
    assert base["visual.head.proj.weight"].shape == (bundled.EMBED_DIM, 1280)


def test_the_bundled_base_knows_the_pictures_that_aligned_it(base: dict[str, Tensor]) -> None:
    tower = bundled.tower(48)
    tower.load(base)
    images, labels = coloured(9)
    large = functional.interpolate(images.float(), 48).to(torch.uint8)
    head = bundled.text_head(CLASSES, TEMPLATES)
    assert torch.equal((features(tower, large) @ head.T).argmax(1), labels)


def test_only_the_projection_of_the_bundled_tower_is_frozen(packages: None) -> None:
    tower = bundled.tower(48)
    names = {f"visual.{name}" for name, _ in tower.module.named_parameters()}
    assert names - set(tower.edited()) == {"visual.head.proj.weight"}


def test_a_bundled_text_head_is_the_mean_of_its_prompts(packages: None) -> None:
    model, tokenize = bundled._text_model(), bundled.HFTokenizer(
        str(bundled._text_directory()), context_length=64
    )  # fmt: skip
    rows = []
    with torch.inference_mode():
        for name in CLASSES:
            prompts = [template.format(name) for template in TEMPLATES]
            embedded = [model.encode_text(tokenize([text]))[0] for text in prompts]
            rows.append(sum(vector / vector.norm() for vector in embedded))
    rows = [row / row.norm() for row in rows]
    centred = [row - sum(rows) / len(rows) for row in rows]
    expected = torch.stack([7.0 * row / row.norm() for row in centred])
    head = bundled.text_head(CLASSES, TEMPLATES, logit_scale=7.0)
    torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-5)
    assert not head.is_inference()


def test_dropping_columns_of_padding_changes_no_embedding(packages: None) -> None:
    whole = bundled.HFTokenizer(str(bundled._text_directory()), context_length=64)
    texts = ["a", "a photo of the background of a scene, which is longer", "a photo of a face"]
    full, trimmed = whole(texts), bundled._tokenizer()(texts)
    assert trimmed.shape[1] < full.shape[1]
    assert torch.equal(full[:, : trimmed.shape[1]], trimmed)
    assert not full[:, trimmed.shape[1] :].any()
    model = bundled._text_model()
    with torch.inference_mode():
        torch.testing.assert_close(
            model.encode_text(trimmed), model.encode_text(full), rtol=1e-4, atol=1e-5
        )


def test_the_base_is_aligned_to_the_thousand_names_of_imagenet(packages: None) -> None:
    prompts = bundled._imagenet_prompts()
    assert len(prompts) == 1000
    assert prompts[:2] == ["a photo of a tench", "a photo of a goldfish"]
    assert all(prompt.startswith("a photo of a ") and "," not in prompt for prompt in prompts)


def test_the_bundled_family_asks_no_network(packages: None, no_network: list[object]) -> None:
    for cached in (bundled._text_model, bundled._tokenizer, bundled._text_directory):
        cached.cache_clear()
    bundled.text_head(CLASSES, TEMPLATES)
    bundled.tower(48)
    assert no_network == []


@pytest.mark.parametrize("which", ["VISION", "TEXT"])
def test_bundled_weights_of_another_digest_are_refused(
    which: str, packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = getattr(bundled, which)
    name = next(iter(source.files))
    files = {**source.files, name: "0" * 64}
    monkeypatch.setattr(bundled, which, source.model_copy(update={"files": files}))
    bundled._text_directory.cache_clear()
    with pytest.raises(InvalidData, match="wrong digest"):
        bundled._trunk_weights() if which == "VISION" else bundled.dual_tower(32)
    bundled._text_directory.cache_clear()


def test_code_in_bundled_weights_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    content = pickle.dumps({"weight": Malicious(marker)}, 2)
    archive = tmp_path / "archive.pth"
    torch.save({"weight": Malicious(marker)}, archive)
    for number, data in enumerate((content, archive.read_bytes())):
        site = tmp_path / f"site{number}"
        with monkeypatch.context() as patch:
            patch.syspath_prepend(site)
            patch.setattr(bundled, "VISION", install(site, {"evil/weights.pth": data}))
            with pytest.raises(pickle.UnpicklingError):
                bundled._trunk_weights()
    assert not marker.exists()


# The open_clip family


def test_an_open_clip_tower_gives_the_features_of_its_model(tiny: dict[str, str]) -> None:
    tower = family.tower(None, **tiny)
    tower.load(family.pretrained(16, [], **tiny))
    images = pictures(5, 16)
    model = open_clip.create_model(TINY, pretrained=tiny["pretrained"]).eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (tower.mean, tower.std))
    with torch.inference_mode():
        expected = model.encode_image((images / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(features(tower, images), expected, rtol=1e-4, atol=1e-5)
    assert tower.mean == open_clip.OPENAI_DATASET_MEAN
    assert tower.image_size == 16
    names = {f"visual.{name}" for name, _ in model.visual.named_parameters()}
    assert set(tower.edited()) == names


def test_an_open_clip_head_is_the_zero_shot_classifier_times_the_scale(
    tiny: dict[str, str],
) -> None:
    model = open_clip.create_model(TINY, pretrained=tiny["pretrained"]).eval()
    rows = []
    with torch.inference_mode():
        for name in CLASSES:
            prompts = [template.format(name) for template in TEMPLATES]
            embedded = model.encode_text(open_clip.tokenize(prompts), normalize=True)
            rows.append(functional.normalize(embedded.mean(0), dim=0))
        expected = model.logit_scale.exp() * torch.stack(rows)
    head = family.text_head(CLASSES, TEMPLATES, **tiny)
    torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-4)
    assert not head.is_inference() and not head.requires_grad


def test_two_towers_share_no_memory(tiny: dict[str, str]) -> None:
    first, second = family.tower(None, **tiny), family.tower(None, **tiny)
    before = second.state()
    first.load(family.pretrained(None, [], **tiny))
    assert_same(second.state(), before)


def test_the_activation_is_part_of_the_identity(tiny: dict[str, str]) -> None:
    plain, quick = (family.tower(None, **{**tiny, "name": name}) for name in (TINY, QUICK))
    assert plain.identity["activation"] == "gelu"
    assert quick.identity["activation"] == "quickgelu"
    quick.load(plain.state())  # the weights fit: nothing but the identity tells them apart
    images = pictures(2, 16)
    assert not torch.allclose(features(plain, images), features(quick, images))
    for tower, other in ((plain, quick), (quick, plain)):
        check_identity(tower, {"identity": dict(tower.identity)}, "checkpoint")
        with pytest.raises(IncompatibleWeights, match="belongs to the model"):
            check_identity(tower, {"identity": dict(other.identity)}, "checkpoint")


@pytest.mark.parametrize("digest", ["", "0" * 64])
def test_a_local_file_needs_its_digest(tiny: dict[str, str], digest: str) -> None:
    options = {**tiny, "sha256": digest}
    for load in (
        lambda: family.pretrained(None, [], **options),
        lambda: family.text_head(CLASSES, TEMPLATES, **options),
    ):
        with pytest.raises(InvalidData, match=f"found {tiny['sha256']}, expected"):
            load()


def test_a_local_file_that_does_not_exist_is_missing(tiny: dict[str, str]) -> None:
    with pytest.raises(MissingArtifact, match="none.safetensors does not exist"):
        family.pretrained(None, [], **{**tiny, "pretrained": "no/none.safetensors"})


def without_visual(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("visual.")}


def with_other_shape(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "visual.proj": torch.zeros(32, 15)}


def with_more(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "visual.more": torch.zeros(1)}


@pytest.mark.parametrize("change", [without_visual, with_other_shape, with_more])
def test_weights_of_another_architecture_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], tiny: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_file(change(open_clip.create_model(TINY).state_dict()), path)
    options = {"name": TINY, "pretrained": str(path), "sha256": sha256(path)}
    with pytest.raises(IncompatibleWeights, match="does not hold the weights of tiny-clip"):
        family.pretrained(None, [], **options)


@pytest.mark.parametrize("content", [b"", b"no weights", pickle.dumps({}, 2), pickle.dumps([1], 2)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_what_is_no_file_of_weights_is_refused(
    content: bytes, suffix: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    options = {"name": TINY, "pretrained": str(path), "sha256": sha256(path)}
    with pytest.raises(IncompatibleWeights, match="does not hold the weights"):
        family.pretrained(None, [], **options)


def test_code_in_a_local_file_is_not_run(tiny: dict[str, str], tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pt", tmp_path / "marker"
    torch.save({"visual.proj": Malicious(marker)}, path)
    options = {"name": TINY, "pretrained": str(path), "sha256": sha256(path)}
    with pytest.raises(IncompatibleWeights):
        family.pretrained(None, [], **options)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "tiny-clap"}, "did you mean 'tiny-clip'"),
        ({"pretrained": ""}, "has no weights ''"),
        ({"pretrained": "opennai", "name": "RN50-quickgelu"}, "did you mean 'openai'"),
        ({"pretrained": "openai", "name": "RN50"}, "set model.name: RN50-quickgelu"),
    ],
)
def test_names_that_open_clip_does_not_know_are_refused(
    changes: dict[str, str], message: str, tiny: dict[str, str]
) -> None:
    with pytest.raises(InvalidInput, match=message):
        family.pretrained(None, [], **{**tiny, "sha256": "", **changes})


def test_open_clip_takes_its_own_picture_size_and_no_alignment(tiny: dict[str, str]) -> None:
    for make in (lambda: family.tower(32, **tiny), lambda: family.pretrained(32, [], **tiny)):
        with pytest.raises(InvalidInput, match="set model.image_size: 16"):
            make()
    alignment = Alignment(pictures(2, 16), torch.tensor([0, 1]), CLASSES[:2], TEMPLATES)
    with pytest.raises(InvalidInput, match="remove align_tasks"):
        family.pretrained(16, [alignment], **tiny)


def test_a_tag_decides_the_colours_and_its_digest_may_be_given(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = (0.5, 0.5, 0.5)
    published = {"file": tiny["pretrained"], "mean": half, "std": half}
    monkeypatch.setitem(_PRETRAINED, TINY, {"grey": published})
    options = {"name": TINY, "pretrained": "grey"}
    tower = family.tower(None, **options)
    assert (tower.mean, tower.std) == (half, half)
    expected = family.pretrained(None, [], **tiny)
    assert_same(family.pretrained(None, [], **options), expected)
    assert_same(family.pretrained(None, [], **options, sha256=tiny["sha256"]), expected)
    with pytest.raises(InvalidData, match="wrong digest"):
        family.pretrained(None, [], **options, sha256="0" * 64)


def test_without_a_network_a_tag_says_at_once_what_to_do(
    tiny: dict[str, str], no_network: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for published in ({"hf_hub": "taskvec-tests/none/"}, {"url": "https://none.invalid/none.pt"}):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setitem(_PRETRAINED, TINY, {"far": published})
        for load in (
            lambda: family.pretrained(None, [], name=TINY, pretrained="far"),
            lambda: family.text_head(CLASSES, TEMPLATES, name=TINY, pretrained="far"),
        ):
            with pytest.raises(MissingArtifact, match="cannot be downloaded.*model.sha256"):
                load()
    assert no_network


def test_the_model_of_the_paper_plugs_into_the_same_family() -> None:
    raw: dict[str, Any] = params.plain(params.read(Path(__file__).parent.parent / "params.yaml"))
    raw["model"] = {"family": "open_clip", "name": "ViT-B-32-quickgelu", "pretrained": "openai"}
    model = params.validate(raw).model
    assert (model.family, model.image_size, model.align_tasks) == ("open_clip", None, [])
    tower = family.tower(model.image_size, **model.options)
    assert tower.identity == {
        "family": "open_clip",
        "name": "ViT-B-32-quickgelu",
        "activation": "quickgelu",
        "image_size": "224",
    }
    assert (tower.image_size, len(tower.edited())) == (224, 152)
    assert tower.mean == (0.48145466, 0.4578275, 0.40821073)
