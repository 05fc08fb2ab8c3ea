import re
import subprocess
import sys
import types
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import data, loader
from experiments.preprocessing import Preprocessing
from jaxquant.extras import how_to_install

SMALL = Preprocessing(size=4, mean=(0.0,) * 3, std=(1.0,) * 3, resize=4)


def save(path, value: int, size=(4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


@pytest.fixture
def images(tmp_path):
    """Twenty images whose red value is their position, in a folder with labels."""
    for i in range(20):
        save(tmp_path / f"{i:02}.png", i)
    rows = "".join(f"{i:02}.png,{i % 3}\n" for i in range(20))
    (tmp_path / "labels.csv").write_text("file,label\n" + rows)
    return tmp_path


def reds(dataset: data.Dataset, batch_size: int = 8) -> list[int]:
    batches = loader.batches(dataset, SMALL, batch_size, workers=3)
    return [int(red) for images, _ in batches for red in images[:, 0, 0, 0]]


def test_batches_keep_the_order_and_the_last_one_is_smaller(images):
    batches = list(loader.batches(data.folder(images), SMALL, 8, workers=3))
    assert [x.shape for x, _ in batches] == [(8, 4, 4, 3), (8, 4, 4, 3), (4, 4, 4, 3)]
    assert batches[0][0].dtype == np.float32
    assert batches[0][1].dtype == np.int32
    labels = np.concatenate([y for _, y in batches])
    np.testing.assert_array_equal(labels, np.arange(20) % 3)
    assert reds(data.folder(images)) == list(range(20))


def test_only_a_bounded_number_is_decoded_ahead():
    decoded = []

    def example(i):
        return lambda: (decoded.append(i) or np.zeros((4, 4, 3), np.uint8), 0)

    dataset = data.from_examples("counted", [example(i) for i in range(1000)])
    batches = loader.batches(dataset, SMALL, 8, workers=2)
    next(batches)
    batches.close()
    assert 8 <= len(decoded) <= (loader.AHEAD + 1) * 8


def test_a_subset_is_spread_over_the_data(images):
    dataset = data.subset(data.folder(images), 3)
    assert dataset.size == 3
    assert reds(dataset) == [0, 10, 19]
    assert data.subset(data.folder(images), 50).size == 20


def test_a_stream_is_cut_after_the_first_ones(images):
    stream = data.folder(images)._replace(size=None)
    assert reds(data.subset(stream, 3)) == [0, 1, 2]


def test_subfolders_are_classes(tmp_path):
    save(tmp_path / "n02" / "x.png", 2)
    save(tmp_path / "n01" / "y.png", 1)
    ((images, labels),) = loader.batches(data.folder(tmp_path), SMALL, 8)
    assert images[:, 0, 0, 0].tolist() == [1, 2]
    assert labels.tolist() == [0, 1]


def test_a_part_of_the_imagenet_folders_needs_labels(tmp_path):
    save(tmp_path / "n02102040" / "x.png", 1)
    with pytest.raises(data.DataError, match=r"1 of the 1000 folders .* add labels\.csv"):
        data.folder(tmp_path)


def test_bad_folders_are_explained(tmp_path, images):
    with pytest.raises(data.DataError, match="no such folder"):
        data.folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match=r"expected labels\.csv"):
        data.folder(tmp_path / "empty")
    (images / "07.png").unlink()
    with pytest.raises(data.DataError, match=r"1 of the 20 files .* missing.* 07.png"):
        data.folder(images)
    (images / "labels.csv").write_text("name,class\n")
    with pytest.raises(data.DataError, match="should name the columns file and label"):
        data.folder(images)
    (images / "labels.csv").write_text("file,label\n01.png,cat\n")
    with pytest.raises(data.DataError, match=r"line 2: .*'cat'"):
        data.folder(images)


def test_a_broken_image_is_named(images):
    (images / "11.png").write_bytes(b"no image")
    with pytest.raises(data.DataError, match=r"11\.png: not an image"):
        list(loader.batches(data.folder(images), SMALL, 8))


def test_tfds_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(data.DataError, match=re.escape(how_to_install("tfds"))):
        data.tfds("imagenette", "validation")


@pytest.fixture
def fake_tfds(monkeypatch):
    """The two ways in which tensorflow-datasets gives its records."""
    records = [{"image": np.full((4, 4, 1), i, np.uint8), "label": i % 2} for i in range(5)]
    module = types.ModuleType("tensorflow_datasets")
    module.records = records
    module.data_source = lambda name, split, data_dir: records
    module.load = lambda name, split, data_dir: records
    module.as_numpy = iter
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    return module


def test_tfds_is_read_at_random(fake_tfds):
    dataset = data.tfds("mnist", "test")
    assert (dataset.name, dataset.size) == ("mnist/test", 5)
    assert reds(dataset, 2) == [0, 1, 2, 3, 4]


def test_labels_of_a_part_of_imagenet_are_those_of_imagenet(fake_tfds):
    examples = [example() for example in data.tfds("imagenette/160px:1.0", "test").examples()]
    assert [label for _, label in examples[:2]] == [0, 217]


def test_tfds_falls_back_to_a_stream(fake_tfds):
    def unprepared(name, split, data_dir):
        raise NotImplementedError

    fake_tfds.data_source = unprepared
    dataset = data.tfds("mnist", "test")
    assert dataset.size is None
    assert reds(data.subset(dataset, 3), 2) == [0, 1, 2]


def test_tfds_without_labels_is_explained(fake_tfds):
    fake_tfds.records[0] = {"text": "no image"}
    with pytest.raises(data.DataError, match=r"features \['text'\]"):
        reds(data.tfds("mnist", "test"))


def test_unknown_names_are_explained():
    with pytest.raises(data.DataError, match="choose foolbox"):
        data.embedded("imagenet", 8)
    with pytest.raises(data.DataError, match="train and test"):
        data.cifar10("validation")


@pytest.mark.network
def test_the_embedded_images(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXQUANT_CACHE", str(tmp_path))
    dataset = data.foolbox_images()
    examples = [example() for example in dataset.examples()]
    assert len(examples) == 20
    assert examples[0][1] == 243
    assert all(min(image.size) >= 512 for image, _ in examples)


@pytest.mark.parametrize("prefix", ["val/", ""])
def test_paddle_lists_are_read(tmp_path, prefix):
    for i in range(3):
        save(tmp_path / "val" / f"ILSVRC2012_val_{i} a.JPEG", 0)
    names = [f"{prefix}ILSVRC2012_val_{i} a.JPEG" for i in range(3)]
    (tmp_path / "val_list.txt").write_text("".join(f"{n} {65 + i}\n" for i, n in enumerate(names)))
    # the folder as it is unpacked, and the folder of the images in it
    for folder in (tmp_path, tmp_path / "val"):
        labels = [example()[1] for example in data.folder(folder).examples()]
        assert labels == [65, 66, 67]


def test_paddle_lists_that_do_not_fit_are_explained(tmp_path):
    save(tmp_path / "val" / "x.png", 0)
    (tmp_path / "val_list.txt").write_text("val/x.png 1\nval/y.png 2\n")
    with pytest.raises(data.DataError, match=r"1 of the 2 files in val_list\.txt .* y\.png"):
        data.folder(tmp_path)
    (tmp_path / "val_list.txt").write_text("val/x.png cat\n")
    with pytest.raises(data.DataError, match=r"line 1: a path and a label expected"):
        data.folder(tmp_path)


def test_one_subfolder_is_no_labels(tmp_path):
    save(tmp_path / "val" / "x.png", 0)
    with pytest.raises(data.DataError, match=r"every image would have the label 0"):
        data.folder(tmp_path)


TINY_BUILDER = """
import io
import tensorflow_datasets as tfds
from PIL import Image


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    file.seek(0)
    return file


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image, label = tfds.features.Image(shape=(4, 4, 3)), tfds.features.ClassLabel(num_classes=3)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"image": image, "label": label})
        )

    def _split_generators(self, manager):
        return {"train": ((i, {"image": png(i), "label": i % 3}) for i in range(5))}

    def _generate_examples(self):
        raise NotImplementedError
"""

READ_TINY = """
import sys
from tiny.tiny import Tiny

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
sys.path.insert(0, sys.argv[2])
from experiments import data

images = [example() for example in data.tfds("tiny", "train", sys.argv[1]).examples()]
assert sorted((int(image[0, 0, 0]), y) for image, y in images) == [(i, i % 3) for i in range(5)]
assert "tensorflow" not in sys.modules
for name, split in (("imagenettte", "train"), ("tiny", "test")):
    try:
        data.tfds(name, split, sys.argv[1])
    except data.DataError as error:
        assert len(str(error).splitlines()) == 1 and name in str(error), error
    else:
        raise AssertionError(name)
"""


@pytest.mark.slow
@pytest.mark.network
def test_tfds_works_as_its_extra_installs_it(tmp_path):
    """A small set, prepared here, read without TensorFlow in an environment of the extra alone."""
    repository = Path(data.__file__).parent.parent
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "__init__.py").write_text("")
    (tmp_path / "tiny" / "tiny.py").write_text(TINY_BUILDER)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-e", f"{repository}[experiments,tfds]"]
    subprocess.run(install, check=True)
    command = [python, "-c", READ_TINY, tmp_path / "prepared", repository]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_data_set_that_tfds_does_not_have_is_one_line(fake_tfds):
    def unknown(name, split, data_dir):
        raise ValueError("Dataset imagenettte not found.\n\nDid you mean: imagenette ?\n\nCheck:")

    fake_tfds.data_source = unknown
    with pytest.raises(data.DataError, match=r"not found\. Did you mean: imagenette \?$"):
        data.tfds("imagenettte", "train")


def test_a_stream_without_tensorflow_says_how_to_prepare_it(fake_tfds):
    def unprepared(name, split, data_dir):
        raise NotImplementedError

    def without_tensorflow(name, split, data_dir):
        raise ImportError("No module named 'tensorflow'")

    fake_tfds.data_source, fake_tfds.load = unprepared, without_tensorflow
    with pytest.raises(data.DataError, match="file_format=array_record"):
        data.tfds("mnist", "test")
