import pytest
from PIL import Image

from configs.train import common
from experiments import data
from experiments.training import TrainingError
from experiments.training.settings import (
    FREE,
    NOT_NEGATIVE,
    POSITIVE,
    check,
    check_resumed,
    choose_data,
)


def settings(**changes):
    config = common.get_config("cifar10_resnet20", dataset="noise")
    config.update(changes)
    return config


def test_the_defaults_pass_and_every_checked_name_is_a_setting():
    config = settings()
    check(config)
    assert set(POSITIVE) | set(NOT_NEGATIVE) | FREE <= set(config.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size should be positive; it is 0"),
        ({"learning_rate": -0.1}, "learning_rate should be positive; it is -0.1"),
        ({"epochs": float("nan")}, "epochs should be positive; it is nan"),
        ({"weight_decay": -1.0}, "weight_decay should not be negative"),
        ({"augmentation": "crop"}, "augmentation should be one of none, shift, resized_crop"),
        ({"optimizer": "adam"}, "optimizer should be one of sgd, rmsprop; it is 'adam'"),
        ({"dtype": "float16"}, "dtype should be one of float32, bfloat16"),
        ({"label_smoothing": 1.0}, "label_smoothing should be less than 1"),
        ({"momentum": 1.0}, "momentum should be less than 1"),
        ({"seed": -1}, "seed should not be negative"),
    ],
)
def test_settings_that_mean_nothing_are_named(changes, message):
    with pytest.raises(TrainingError) as error:
        check(settings(**changes))
    assert message in str(error.value)


def test_all_of_them_are_named_at_once():
    with pytest.raises(TrainingError, match=r"workers should(.|\n)*dtype should"):
        check(settings(workers=0, dtype="int8"))


def test_a_run_goes_on_under_its_own_settings_alone():
    saved = settings().to_dict()
    check_resumed(settings(workers=9, progress=False, devices=1).to_dict(), saved)
    with pytest.raises(TrainingError, match=r"batch_size: 256 there, 64 given\n  seed: 0 there"):
        check_resumed(settings(batch_size=64, seed=1).to_dict(), saved)


def test_the_data_are_found(tmp_path):
    train, evaluation = choose_data(settings(train_samples=5, eval_samples=3), 8)
    assert (train.size, evaluation.size) == (5, 3)
    with pytest.raises(TrainingError, match=r"give --config\.eval_dir too"):
        choose_data(settings(data_dir="images"), 8)
    for split, value in (("train", 1), ("val", 2)):
        for name in ("cats", "dogs"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (value, 0, 0)).save(tmp_path / split / name / "image.png")
    for changes in ({}, {"eval_dir": str(tmp_path / "val")}):
        chosen = choose_data(settings(data_dir=str(tmp_path), **changes), 8)
        images = [next(dataset.examples())()[0] for dataset in chosen]
        assert [image.getpixel((0, 0))[0] for image in images] == [1, 2]
    with pytest.raises(data.DataError, match="no such folder"):
        choose_data(settings(data_dir="/nowhere", eval_dir="/nowhere"), 8)
    with pytest.raises(TrainingError, match="nothing to train on"):
        choose_data(settings(dataset=""), 8)
