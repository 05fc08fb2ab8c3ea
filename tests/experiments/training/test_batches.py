import numpy as np
import pytest

from experiments import data
from experiments.preprocessing import Preprocessing
from experiments.training import TrainingError
from experiments.training.augmentation import AUGMENTATIONS
from experiments.training.batches import batches, epoch_order, make_reader, steps_per_epoch

PLAIN = Preprocessing(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, resize=8)
COUNT, BATCH = 22, 4


def numbered(count: int = COUNT, counter: list | None = None) -> data.Dataset:
    """Images of one value each: their position, which is their label too."""

    def example(i):
        def load():
            if counter is not None:
                counter.append(i)
            return np.full((12, 12, 3), i % 256, np.uint8), i

        return load

    return data.from_examples("numbered", [example(i) for i in range(count)])


def read(dataset, augmentation="none", cache=10**9, num_classes=COUNT):
    return make_reader(
        dataset,
        PLAIN,
        AUGMENTATIONS[augmentation],
        num_classes=num_classes,
        workers=2,
        cache_bytes=cache,
    )


def run(steps, augmentation="none", cache=10**9, seed=0):
    return list(
        batches(
            read(numbered(), augmentation, cache),
            COUNT,
            AUGMENTATIONS[augmentation],
            batch_size=BATCH,
            seed=seed,
            steps=steps,
            workers=3,
        )
    )


def test_an_epoch_has_each_image_once_in_an_order_of_its_own():
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 4

    taken = run(range(10))
    for epoch in (taken[:5], taken[5:]):
        labels = np.concatenate([labels for _, labels in epoch])
        assert len(set(labels.tolist())) == 20
    for images, labels in taken:
        assert (images.shape, images.dtype) == ((BATCH, 8, 8, 3), np.uint8)
        assert labels.dtype == np.int32
        assert (images == labels[:, None, None, None]).all()


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_batches_depend_on_the_step_alone(augmentation):
    whole, rest = run(range(12), augmentation), run(range(7, 12), augmentation)
    for (images, labels), (later_images, later_labels) in zip(whole[7:], rest, strict=True):
        np.testing.assert_array_equal(images, later_images)
        np.testing.assert_array_equal(labels, later_labels)
    other = run(range(12), augmentation, seed=1)
    assert any((a[1] != b[1]).any() for a, b in zip(whole, other))


def test_small_images_are_decoded_once_and_large_ones_when_they_are_used():
    for cache, expected in ((10**9, COUNT), (0, 3 * BATCH)):
        decoded = []
        reader = read(numbered(counter=decoded), cache=cache)
        for step in range(3):
            reader(epoch_order(COUNT, 0, 0)[step * BATCH : (step + 1) * BATCH], 0, 0)
        assert len(decoded) == expected
    for (a, _), (b, _) in zip(run(range(5)), run(range(5), cache=0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_a_bounded_number_is_made_ahead():
    decoded = []
    stream = batches(
        read(numbered(1000, decoded), cache=0, num_classes=1000),
        1000,
        AUGMENTATIONS["none"],
        batch_size=4,
        seed=0,
        steps=range(250),
        workers=2,
    )
    next(stream)
    stream.close()
    assert 4 <= len(decoded) <= 4 * 4


def test_what_cannot_be_trained_on_is_explained():
    with pytest.raises(data.DataError, match=r"label 5, .* 5 classes: give --config\.num_classes"):
        read(numbered(), num_classes=5)
    with pytest.raises(TrainingError, match=r"is a stream.*array_record"):
        read(numbered()._replace(size=None))
    with pytest.raises(TrainingError, match="3 training images do not fill one batch of 4"):
        steps_per_epoch(3, 4)
