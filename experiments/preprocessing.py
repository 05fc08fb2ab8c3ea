"""From a decoded image to what a network takes."""

from typing import Literal, NamedTuple, TypeVar

import jax
import numpy as np
from PIL import Image

Pixels = TypeVar("Pixels", np.ndarray, jax.Array)


class Preprocessing(NamedTuple):
    """Centre crop of `size`, then `(x - mean) / std` per channel.

    Attributes:
      size: height and width that the network takes.
      mean: of the values 0 to 255, per channel in the order of `channels`.
      std: likewise.
      channels: the order that the network takes them in.
      resize: the short side that larger images are brought to before the crop.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: Literal["RGB", "BGR"] = "RGB"
    resize: int = 0

    def at_size(self, size: int) -> "Preprocessing":
        """The same for another size, with the resize in proportion."""
        return self._replace(size=size, resize=round(self.resize * size / self.size))

    def __call__(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """An image of any size and mode -> [size, size, 3] float32."""
        return self.normalise(self.crop(image))

    def crop(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """An image of any size and mode -> its middle, [size, size, 3] uint8 RGB."""
        return np.asarray(_crop(_resize(to_rgb(image), self), self.size))

    def normalise(self, pixels: Pixels) -> Pixels:
        """[..., 3] uint8 RGB -> what the network takes, float32; of NumPy or of JAX."""
        if self.channels == "BGR":
            pixels = pixels[..., ::-1]
        return (pixels.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """An image of any mode, or an array [H, W, 1 or 3] uint8, as RGB."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return image.convert("RGB")


def imagenet(
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    channels: Literal["RGB", "BGR"] = "RGB",
) -> Preprocessing:
    """ImageNet's evaluation crop: the short side to 256 at a crop of 224, and so in proportion."""
    return Preprocessing(size, mean, std, channels, resize=round(256 * size / 224))


def _resize(image: Image.Image, to: Preprocessing) -> Image.Image:
    """Resizes images that are larger than the target, or too small to be cropped; bicubic."""
    short = min(image.size)
    target = max(to.resize, to.size)
    if to.size <= short <= target:
        return image
    width, height = (max(to.size, round(side * target / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int) -> Image.Image:
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))
