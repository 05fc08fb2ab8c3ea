"""The layouts of ImageNet, with images of one pixel."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict
from PIL import Image

from experiments import data, imagenet, settings

SYNSETS = [f"n{i:08}" for i in range(1000)]
NAMES = [f"ILSVRC2012_val_{i:08}" for i in range(1, 1001)]
LABELS = [(7 * i + 3) % 1000 for i in range(1000)]


def flat(folder: Path, count: int = 5) -> Path:
    folder.mkdir(parents=True)
    for name in NAMES[:count]:
        Image.new("RGB", (1, 1)).save(folder / f"{name}.JPEG")
    return folder


def of_caffe() -> tuple[str, str]:
    lines = (f"{name}.JPEG {label}" for name, label in zip(NAMES, LABELS))
    return "val.txt", "\n".join(lines)


def of_kaggle() -> tuple[str, str]:
    rows = [f"{n},{SYNSETS[y]} 1 2 3 4 {SYNSETS[y]} 5 6 7 8 " for n, y in zip(NAMES, LABELS)]
    return "LOC_val_solution.csv", "ImageId,PredictionString\n" + "\n".join(reversed(rows))


def of_tensorflow() -> tuple[str, str]:
    name = "imagenet_2012_validation_synset_labels.txt"
    return name, "\n".join(SYNSETS[label] for label in LABELS)


@pytest.mark.parametrize("written", [of_caffe, of_kaggle, of_tensorflow])
@pytest.mark.parametrize("above", [0, 1, 4])
def test_a_flat_folder_finds_its_labels(tmp_path, written, above):
    folder = flat(tmp_path / "a" / "b" / "c" / "d")
    name, text = written()
    (folder, *folder.parents)[above].joinpath(name).write_text(text)
    dataset = data.folder(folder)
    assert [example()[1] for example in dataset.examples()] == LABELS[:5]


def test_a_flat_folder_without_labels_says_which_files_it_looks_for(tmp_path):
    folder = flat(tmp_path / "val")
    looked_for = r"5 images .* val\.txt, val_list\.txt, LOC_val.*labels\.csv"
    with pytest.raises(data.DataError, match=looked_for):
        data.folder(folder)
    (folder / "val.txt").write_text(f"{NAMES[0]}.JPEG 3\n")
    with pytest.raises(data.DataError, match=r"no label for 4 of the 5 images.*_00000002\.JPEG"):
        data.folder(folder)
    (folder / "val.txt").write_text(f"{NAMES[0]}.JPEG three\n")
    with pytest.raises(data.DataError, match="a name and a number expected"):
        data.folder(folder)


def test_a_part_of_the_synsets_cannot_be_numbered(tmp_path):
    folder = flat(tmp_path / "val")
    name, text = of_tensorflow()
    (folder / name).write_text("\n".join(text.splitlines()[:5]))
    with pytest.raises(data.DataError, match="5 different synsets where 1000"):
        data.folder(folder)


@pytest.mark.parametrize("inside", [Path(), imagenet.KAGGLE])
def test_the_root_gives_train_to_calibrate_on_and_val_to_evaluate_on(tmp_path, inside):
    for synset in SYNSETS:
        for split in ("train", "val"):
            (tmp_path / inside / split / synset).mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(tmp_path / inside / "train" / SYNSETS[3] / "a.JPEG")
    Image.new("RGB", (1, 1)).save(tmp_path / inside / "val" / SYNSETS[999] / "b.JPEG")
    config = ConfigDict({"data_dir": str(tmp_path), "calib_dir": "", "calib_samples": 9})
    config.eval_samples = 0
    calibration, evaluation = settings.choose_data(config, 224)
    assert [(d.name, d.size) for d in (calibration, evaluation)] == [("train", 1), ("val", 1)]
    assert [example()[1] for example in calibration.examples()] == [3]
    assert [example()[1] for example in evaluation.examples()] == [999]
    with pytest.raises(data.DataError, match="give one of them"):
        data.folder(tmp_path)
