"""Random changes of training images, each a function of the image and a random generator."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.preprocessing import to_rgb

PADDING = 4  # pixels at 32, and so in proportion
AREA = (0.08, 1.0)  # of the image that a random crop takes
RATIO = (3 / 4, 4 / 3)  # of its width and height
TRIES = 10

Pixels = np.ndarray


class Augmentation(NamedTuple):
    """What is done to an image when it is decoded, and to a batch afterwards.

    Attributes:
      image: (image, size, generator) -> [size, size, 3] uint8; None takes the network's own crop,
        which is the same in every epoch.
      batch: ([B, S, S, 3] uint8, generator) -> the same shape and type.
    """

    image: Callable[[Image.Image | np.ndarray, int, np.random.Generator], Pixels] | None
    batch: Callable[[Pixels, np.random.Generator], Pixels]


def flip(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Half of the images mirrored."""
    mirrored = rng.random(len(images)) < 0.5
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def shift_and_flip(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Each image padded with zeros, cropped at a random place and mirrored or not.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """
    count, size = images.shape[:2]
    padding = max(1, PADDING * size // 32)
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, sides), (size, size), axis=(1, 2)
    )
    top, left = rng.integers(0, 2 * padding + 1, (2, count))
    return flip(windows[np.arange(count), top, left].transpose(0, 2, 3, 1), rng)


def random_resized_crop(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator
) -> Pixels:
    """A random part of an image, of a random area and aspect ratio, at `size`.

    Where none fits in `TRIES` tries, the largest square in the middle.

    Reference: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6.
    """
    image = to_rgb(image)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, random_box(*image.size, rng))
    return np.asarray(resized)


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part that `random_resized_crop` takes."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(*map(math.log, RATIO)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(rng.integers(0, width - wide + 1))
            top = int(rng.integers(0, height - high + 1))
            return left, top, left + wide, top + high
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


AUGMENTATIONS = {
    "none": Augmentation(image=None, batch=lambda images, rng: images),
    "shift": Augmentation(image=None, batch=shift_and_flip),
    "resized_crop": Augmentation(image=random_resized_crop, batch=flip),
}
