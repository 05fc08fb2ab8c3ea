"""ImageNet as it is unpacked: `train/<synset>/*.JPEG`, and `val` with or without such folders.

The 1000 classes are numbered in the order of their synsets, such as "n01440764".  A flat `val` has
its labels in a file: those that are found here are `val.txt` (Caffe: a name and a number a line),
`val_list.txt` (PaddlePaddle: likewise),
`LOC_val_solution.csv` (Kaggle: a name and a synset) and
`imagenet_2012_validation_synset_labels.txt` (TensorFlow: a synset a line, in the order of the
images), in the folder or one above it.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

CLASSES = 1000
ABOVE = 4  # folders above `val` that are searched: Kaggle has ILSVRC/Data/CLS-LOC/val
KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")
VALIDATION_IMAGES = "ILSVRC2012_val_*"


def splits(root: Path) -> tuple[Path, Path] | None:
    """The folders `train` and `val` of ImageNet's own folder; None where it is not one."""
    for folder in (root, root / KAGGLE):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return folder / "train", folder / "val"
    return None


def flat_validation(root: Path) -> list[tuple[Path, int]]:
    """The images of a flat `val` and their labels; none where the folder is not one.

    Raises:
      ValueError: it is one, but there is no file of labels, or it does not fit the images.
    """
    images = sorted(path for path in root.glob(VALIDATION_IMAGES) if path.is_file())
    if not images:
        return []
    for folder in (root, *root.absolute().parents[:ABOVE]):
        for name, read in LABEL_FILES.items():
            if (folder / name).is_file():
                return _joined(images, folder / name, read(folder / name))
    raise ValueError(
        f"{root}: {len(images)} images of ImageNet without labels; put one of the files "
        f"{', '.join(LABEL_FILES)} into it or above it, or a labels.csv with the columns file,label"
    )


def _joined(images: Sequence[Path], file: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    missing = [path.name for path in images if path.stem not in labels]
    if missing:
        raise ValueError(
            f"{file}: no label for {len(missing)} of the {len(images)} images, the first of them "
            f"{missing[0]}"
        )
    return [(path, labels[path.stem]) for path in images]


def _read_caffe(file: Path) -> dict[str, int]:
    try:
        pairs = [line.rsplit(maxsplit=1) for line in file.read_text().splitlines() if line.strip()]
        return {Path(name).stem: int(label) for name, label in pairs}
    except ValueError as error:
        raise ValueError(f"{file}: a name and a number expected on each line: {error}") from error


def _read_kaggle(file: Path) -> dict[str, int]:
    with file.open(newline="", encoding="utf-8") as opened:
        rows = csv.DictReader(opened)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file}: expected the columns ImageId and PredictionString")
        synsets = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    numbers = _numbered(file, list(synsets.values()))
    return {name: numbers[synset] for name, synset in synsets.items()}


def _read_tensorflow(file: Path) -> dict[str, int]:
    synsets = file.read_text().split()
    numbers = _numbered(file, synsets)
    return {f"ILSVRC2012_val_{i:08}": numbers[s] for i, s in enumerate(synsets, start=1)}


def _numbered(file: Path, synsets: Sequence[str]) -> dict[str, int]:
    """Synset -> label; all of them have to be there for their order to be the labels."""
    classes = sorted(set(synsets))
    if len(classes) != CLASSES:
        raise ValueError(f"{file}: {len(classes)} different synsets where {CLASSES} were expected")
    return {synset: label for label, synset in enumerate(classes)}


LABEL_FILES: dict[str, Callable[[Path], dict[str, int]]] = {
    "val.txt": _read_caffe,
    "val_list.txt": _read_caffe,
    "LOC_val_solution.csv": _read_kaggle,
    "imagenet_2012_validation_synset_labels.txt": _read_tensorflow,
}
