"""Sets as torchvision's own readers find them on a disk; nothing is downloaded.

The first folder of the names in source.files is the root that torchvision is given. Its readers see
the files that source.files and its manifests list, and no other.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image

import taskvec.torchvision_import  # noqa: F401  before torchvision

from torchvision import datasets  # isort: skip

from taskvec.datasets import decoding
from taskvec.datasets.items import Items
from taskvec.errors import InvalidData
from taskvec.options import Count

# Below the root, for the message when something is missing.
LAYOUT = {
    "mnist": "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
    "svhn": "{train,test}_32x32.mat",
    "gtsrb": "gtsrb/GTSRB/{Training,Final_Test/Images} and gtsrb/GT-final_test.csv",
    "dtd": "dtd/dtd/{images,labels}",
    "stanford_cars": "stanford_cars/{cars_train,cars_test,devkit,cars_test_annos_withlabels.mat}",
    "sun397": "SUN397/{a,...,z}, SUN397/ClassName.txt and perhaps SUN397/{Train,Test}ing_01.txt",
    "eurosat": "eurosat/2750/CLASS",
}


class Svhn(datasets.SVHN):
    """SVHN without torchvision's own digests: those of source.files have been checked."""

    split_list = {
        key: [url, file, None] for key, (url, file, _) in datasets.SVHN.split_list.items()
    }


@dataclass
class Part:
    """Items of one split.

    Attributes:
        data: torchvision's data set, whose items are a picture, or the path of one, and a label.
        split: train or test; None where the source has no splits.
        rows: positions in the data set.
        groups: of each row; default: each row by itself.
    """

    data: Any
    split: str | None
    rows: list[int] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = self.rows or list(range(len(self.data)))
        prefix = f"{self.split}-" if self.split else ""
        self.groups = self.groups or [f"{prefix}row{row:06d}" for row in self.rows]


def load(
    files: Mapping[str, Path],
    *,
    name: Literal["mnist", "svhn", "gtsrb", "dtd", "stanford_cars", "sun397", "eurosat"],
    side: Count = 224,
) -> Items:
    """Return the items of a set that torchvision knows, labelled as torchvision does.

    Validation is drawn from train, which holds DTD's own validation part, too. GTSRB's training
    pictures are grouped by the physical sign that they show. SUN397 is split by its first
    partition where that lies beside it; else it is drawn like EuroSAT, which has no splits.

    Args:
        files: as torchvision lays them out below its root.
        name: of the set.
        side: pixels along an edge; the middle of each picture, see `decoding.square`.

    Raises:
        InvalidData: a file is missing, or is not what torchvision expects.
    """
    with _linked(files) as root:
        parts = _open(name, root)
        places = [(part, row) for part in parts for row in part.rows]
        labels = np.zeros(len(places), dtype=np.int64)

        def picture(place: int) -> Image.Image:
            part, row = places[place]
            try:
                found, labels[place] = part.data[row]
            except OSError as error:
                raise InvalidData(
                    f"torchvision cannot read item {row} of {name}: {error}"
                ) from None
            if isinstance(found, str):
                return decoding.read(Path(found), str(Path(found).relative_to(root)))
            return found.convert("RGB")

        images = decoding.stack(len(places), picture, side)
    groups = [group for part in parts for group in part.groups]
    splits = [part.split for part in parts for _ in part.rows]
    given = [split for split in splits if split is not None]
    return Items(images, labels, groups, given or None)


@contextmanager
def _linked(files: Mapping[str, Path]) -> Iterator[Path]:
    """Give a folder with links to the files and nothing else, as torchvision's root."""
    roots = {PurePosixPath(name).parts[0] for name in files}
    if len(roots) != 1 or any("/" not in name for name in files):
        raise InvalidData(
            f"source.files starts with {', '.join(sorted(roots)) or 'nothing'}; expected one "
            "folder, which torchvision is given as its root"
        )
    with tempfile.TemporaryDirectory() as directory:
        for name, path in files.items():
            link = Path(directory, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        yield Path(directory, *roots)


def _open(name: str, root: Path) -> list[Part]:
    try:
        return READERS[name](root)
    except Exception as error:  # torchvision's readers of seven formats raise a dozen types
        reason = " ".join(str(error).split())[:300].replace(str(root), "ROOT")
        raise InvalidData(
            f"torchvision cannot read {name}: {type(error).__name__}: {reason}; source.files must "
            f"list ROOT/{LAYOUT[name]}"
        ) from None


def _mnist(root: Path) -> list[Part]:
    return [
        Part(datasets.MNIST(root, train=True), "train"),
        Part(datasets.MNIST(root, train=False), "test"),
    ]


def _svhn(root: Path) -> list[Part]:
    return [Part(Svhn(root, split=split), split) for split in ("train", "test")]


def _gtsrb(root: Path) -> list[Part]:
    train = datasets.GTSRB(root, split="train")
    folder = root / "gtsrb" / "GTSRB" / "Training"
    found = datasets.folder.make_dataset(str(folder), extensions=(".ppm",))
    # CLASS/TRACK_FRAME.ppm: a track is thirty pictures of one sign
    tracks = [f"{Path(path).parent.name}-{Path(path).name[:5]}" for path, _ in found]
    return [
        Part(train, "train", groups=[f"train-{track}" for track in tracks]),
        Part(datasets.GTSRB(root, split="test"), "test"),
    ]


def _dtd(root: Path) -> list[Part]:
    parts = {"train": "train", "val": "train", "test": "test"}
    return [
        Part(data, split, groups=[f"{part}-row{row:06d}" for row in range(len(data))])
        for part, split in parts.items()
        for data in [datasets.DTD(root, split=part, loader=str)]
    ]


def _stanford_cars(root: Path) -> list[Part]:
    return [
        Part(datasets.StanfordCars(root, split=split, loader=str), split)
        for split in ("train", "test")
    ]


def _sun397(root: Path) -> list[Part]:
    data = datasets.SUN397(root, loader=str)
    base = root / "SUN397"
    rows = {f"/{Path(data[row][0]).relative_to(base)}": row for row in range(len(data))}
    lists = {"train": base / "Training_01.txt", "test": base / "Testing_01.txt"}
    if not all(path.is_file() for path in lists.values()):
        return [_named(data, rows, None)]
    return [
        _named(data, {name: rows[name] for name in path.read_text().split()}, split)
        for split, path in lists.items()
    ]


def _named(data: Any, rows: Mapping[str, int], split: str | None) -> Part:
    """Return a part in the order of the names, each of which is a group."""
    names = sorted(rows)
    return Part(data, split, rows=[rows[name] for name in names], groups=names)


def _eurosat(root: Path) -> list[Part]:
    return [Part(datasets.EuroSAT(root, loader=str), None)]


READERS: dict[str, Callable[[Path], list[Part]]] = {
    "mnist": _mnist,
    "svhn": _svhn,
    "gtsrb": _gtsrb,
    "dtd": _dtd,
    "stanford_cars": _stanford_cars,
    "sun397": _sun397,
    "eurosat": _eurosat,
}
