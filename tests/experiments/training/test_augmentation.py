import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments.training import augmentation
from experiments.training.augmentation import AUGMENTATIONS


def numbered(count: int, size: int) -> np.ndarray:
    """Images whose pixels tell where they were: red the row, green the column, blue 255."""
    rows, columns = np.mgrid[:size, :size] + 1
    image = np.stack([rows, columns, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    return np.broadcast_to(image, (count, size, size, 3))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_batches_keep_their_form_and_depend_on_the_generator_alone(name):
    change = AUGMENTATIONS[name].batch
    images = numbered(6, 32)
    first, again = (change(images, np.random.default_rng(3)) for _ in range(2))
    assert (first.shape, first.dtype) == (images.shape, np.uint8)
    np.testing.assert_array_equal(first, again)
    if name != "none":
        assert (first != change(images, np.random.default_rng(4))).any()


def test_shifts_are_whole_pixels_within_the_padding(rng):
    shifts, mirrored = set(), 0
    for image in augmentation.shift_and_flip(numbered(500, 32), rng).astype(int):
        inside = image[..., 2] == 255
        rows, columns = image[..., 0][inside], image[..., 1][inside]
        at_rows, at_columns = np.nonzero(inside)
        (down,) = set((rows - 1 - at_rows).tolist())
        if at_columns[0] < at_columns[-1] and columns[0] > columns[-1]:
            mirrored += 1
            columns, at_columns = columns, 31 - at_columns
        (right,) = set((columns - 1 - at_columns).tolist())
        shifts.add((down, right))
    assert 180 < mirrored < 320
    assert {d for d, _ in shifts} == {r for _, r in shifts} == set(range(-4, 5))
    assert len(shifts) > 70  # of 81: the two directions are independent


def test_a_flip_mirrors_the_columns(rng):
    images = numbered(400, 8)
    flipped = augmentation.flip(images, rng)
    mirrored = (flipped[:, 0, 0, 1] == 8).sum()
    assert 150 < mirrored < 250
    for image in flipped:
        assert (image == images[0]).all() or (image == images[0][:, ::-1]).all()


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32))
def test_boxes_lie_in_the_image(width, height, seed):
    left, top, right, bottom = augmentation.random_box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_boxes_have_the_areas_and_ratios_of_the_paper(rng):
    boxes = np.array([augmentation.random_box(1000, 1000, rng) for _ in range(2000)])
    wide, high = (boxes[:, 2] - boxes[:, 0]) / 1000, (boxes[:, 3] - boxes[:, 1]) / 1000
    area, ratio = wide * high, wide / high
    assert 0.079 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    assert abs(np.median(np.log(ratio))) < 0.03


@pytest.mark.parametrize("mode", ["RGB", "L", "array"])
def test_a_random_crop_has_the_networks_size(mode, rng):
    if mode == "array":
        image = np.full((40, 60, 1), 7, np.uint8)
    else:
        image = Image.new(mode, (60, 40), 7 if mode == "L" else (7, 7, 7))
    crop = augmentation.random_resized_crop(image, 24, rng)
    assert (crop.shape, crop.dtype) == ((24, 24, 3), np.uint8)
    assert (crop == 7).all()


def test_random_crops_differ(rng):
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    crops = [augmentation.random_resized_crop(image, 16, rng) for _ in range(2)]
    assert (crops[0] != crops[1]).any()
