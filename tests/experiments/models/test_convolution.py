"""The convolution of a training on a CPU is XLA's, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.models.convolution import as_one_product, for_training


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [
        ((3, 3, 4, 6), 1, ((1, 1), (1, 1)), 1),
        ((3, 3, 4, 6), 2, "SAME", 1),
        ((7, 7, 4, 6), 2, ((3, 3), (3, 3)), 1),
        ((1, 1, 4, 6), 2, "VALID", 1),
        ((3, 3, 1, 4), 1, "SAME", 4),
    ],
)
def test_value_and_gradients_are_those_of_xla(kernel, stride, padding, groups):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 9, 8, 4)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=kernel), jnp.float32)

    def loss(convolve):
        def of(images, weights):
            out = convolve(
                images,
                weights,
                (stride, stride),
                padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(images, weights)

    ours, xla = loss(as_one_product), loss(lax.conv_general_dilated)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, xla)


def test_inference_keeps_the_convolution_that_is_quantized():
    assert for_training(train=False) is None
