"""A small saved model that the tests share."""

import functools

import jax
import numpy as np

import jaxquant
from tests import networks
from tests.networks import images, plain_net, plain_params

SHAPE = (4, 8, 8, 3)


@functools.cache
def small(full=False, seed=0):
    """`(qparams, qapply)` of `plain_net`."""
    batch = images(seed, SHAPE)
    qparams, qapply = jaxquant.quant_post(
        plain_params(seed), plain_net, [batch], is_full_quantize=full, progress=False
    )
    return qparams, qapply.with_backend("xla")  # as an exported program runs


@functools.cache
def small_file(folder, seed=0):
    """The file of `small(seed=seed)`, under a folder."""
    path = folder / f"small_{seed}.safetensors"
    jaxquant.save_quantized_model(path, *small(seed=seed))
    return path


def quantize(*args, **config):
    """Run by XLA, as a saved program is."""
    qparams, qapply = networks.quantize(*args, **config)
    return qparams, qapply.with_backend("xla")


def round_trip(path, qparams, qapply, **options):
    """The loaded model, run by XLA: to the bit as the saved one is, whatever this machine has."""
    jaxquant.save_quantized_model(path, qparams, qapply, **options)
    qparams, qapply = jaxquant.load_quantized_model(path)
    return qparams, qapply.with_backend("xla")


def same_bits(a, b) -> bool:
    """True where two trees of arrays are the same to the bit."""
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    if tree_a != tree_b:
        return False
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(leaves_a, leaves_b)]
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs
    )
