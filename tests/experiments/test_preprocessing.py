import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.preprocessing import Preprocessing, imagenet

IMAGENET = imagenet(224, mean=(127.0,) * 3, std=(128.0,) * 3)


def ramp(width: int, height: int) -> np.ndarray:
    """Red counts the column, green the row, both modulo 256."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("side", [224, 227, 256])
def test_images_up_to_the_target_are_cropped_and_not_resized(side):
    result = IMAGENET(ramp(side, side))
    assert result.shape == (224, 224, 3)
    assert result.dtype == np.float32
    margin = (side - 224) // 2
    expected = (ramp(side, side)[margin:][:224, margin:][:, :224] - 127.0) / 128.0
    np.testing.assert_array_equal(result, expected.astype(np.float32))


def test_larger_images_are_brought_to_the_target_first():
    image = np.broadcast_to((np.arange(400) // 2).astype(np.uint8)[:, None, None], (400, 600, 3))
    result = IMAGENET(image)
    assert result.shape == (224, 224, 3)
    # The short side 400 becomes 256, so the crop of 224 spans 350 pixels of the original rows.
    values = result[:, 100, 1] * 128 + 127
    assert values[-1] - values[0] == pytest.approx(350 / 2, abs=2)


def test_smaller_images_are_enlarged():
    assert IMAGENET(ramp(100, 60)).shape == (224, 224, 3)


def test_channels_follow_the_order_of_the_network():
    bgr = Preprocessing(2, mean=(3.0, 2.0, 1.0), std=(1.0, 1.0, 2.0), channels="BGR", resize=2)
    result = bgr(np.tile(np.uint8([[[11, 22, 33]]]), (2, 2, 1)))
    np.testing.assert_array_equal(result[0, 0], np.float32([30.0, 20.0, 5.0]))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_image_mode_becomes_rgb(mode):
    assert IMAGENET(Image.new(mode, (224, 224))).shape == (224, 224, 3)


def test_another_size_scales_the_resize():
    assert IMAGENET.at_size(112)[0] == 112
    assert IMAGENET.at_size(112).resize == 128


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_batches_are_normalised_on_the_device_as_images_are(channels, rng):
    to = Preprocessing(4, mean=(1.5, 2.0, 3.0), std=(7.0, 3.0, 1.0), channels=channels, resize=4)
    images = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    result = to.normalise(jnp.asarray(images))
    assert result.dtype == jnp.float32
    expected = np.stack([to(image) for image in images])
    np.testing.assert_allclose(result, expected, rtol=1e-6)  # XLA multiplies by the inverse
    assert to.crop(images[0]).dtype == np.uint8
