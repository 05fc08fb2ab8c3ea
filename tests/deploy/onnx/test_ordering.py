"""Sorting, in ONNX Runtime against qapply, with values that are there twice."""

import jax.numpy as jnp
from jax import lax

from tests.deploy.onnx.runtime import agrees, behind_dot
from tests.networks import whole_numbers

SORTS = {
    "last axis": lambda x: jnp.sort(x, -1),
    "middle axis": lambda x: jnp.sort(x, 1),
    "descending": lambda x: jnp.sort(x, 1, descending=True),
    "indices": lambda x: jnp.argsort(x, 1),
    "indices, descending": lambda x: jnp.argsort(x, -1, descending=True),
    "whole numbers": lambda x: jnp.sort(jnp.round(x / 50).astype(jnp.int32), 1),
    "equals keep their order": lambda x: jnp.argsort(jnp.round(x / 90), 1),
    "two keys": lambda x: lax.sort((jnp.round(x / 90), x, -x), dimension=1, num_keys=2),
    "truth values": lambda x: jnp.sort(x > 0, 1),
    "transposed": lambda x: jnp.sort(x.transpose(0, 2, 1), 1),
    "median": lambda x: jnp.median(x, 1),
    "top": lambda x: lax.top_k(x, 3),
    "top of another axis": lambda x: lax.top_k(x.swapaxes(1, 2), 2),
    "top, equals": lambda x: lax.top_k(jnp.round(x / 90), 3)[1],
}


def test_sorts(tmp_path):
    x = whole_numbers((3, 7, 4))
    agrees(tmp_path, {"a": 127 * jnp.eye(4)}, behind_dot(SORTS, False), x, at_least=120)
