"""Small classifiers with one planted fault, which the analysis has to find and control to repair.

Every fault leaves the float model's function as it was, or nearly so.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = ("a", "b", "c", "d", "e")


class Fault(NamedTuple):
    """A model and its data.

    Attributes:
      params: of five layers.
      images: [N, 16] float32; `labels` are the float model's classes.
      site: where the fault is; "" for none.
      options: of `quant_post`.
    """

    params: dict[str, Any]
    images: np.ndarray
    labels: np.ndarray
    site: str
    options: dict[str, Any]


def apply_fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Five dense layers with ReLUs between them: [N, 16] -> [N, 8]."""
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name]["w"] + params[name]["b"])
    return x @ params["e"]["w"] + params["e"]["b"]


def _healthy(seed: int = 0, samples: int = 512) -> tuple[dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = (16, 32, 32, 32, 32, 8)
    params = {
        name: {
            "w": (rng.normal(size=(n, m)) * np.sqrt(2 / n)).astype(np.float32),
            "b": (0.1 * rng.normal(size=m)).astype(np.float32),
        }
        for name, n, m in zip(LAYERS, sizes[:-1], sizes[1:], strict=True)
    }
    return params, rng.normal(size=(samples, 16)).astype(np.float32)


def _fault(params: Any, images: np.ndarray, site: str, **options: Any) -> Fault:
    labels = np.asarray(apply_fn(params, jnp.asarray(images))).argmax(-1)
    return Fault(jax.tree.map(jnp.asarray, params), images, labels, site, options)


def healthy() -> Fault:
    return _fault(*_healthy(), site="")


def outlier_input_channel() -> Fault:
    """Layer c weighs one of its input channels a hundred times more, which is as much smaller."""
    params, images = _healthy()
    params["b"]["w"][:, 3] /= 100
    params["b"]["b"][3] /= 100
    params["c"]["w"][3, :] *= 100
    return _fault(params, images, "c")


def outlier_output_channel() -> Fault:
    """One output channel of layer c has weights a hundred times larger, and one scale for all."""
    params, images = _healthy()
    params["c"]["w"][:, 5] *= 100
    params["c"]["b"][5] *= 100
    params["d"]["w"][5, :] = 0
    return _fault(params, images, "c", weight_quantize_type="abs_max", skip=("d",))


def rare_spike() -> Fault:
    """A channel before layer d, which d ignores, has a huge value in a rare sample."""
    params, images = _healthy()
    params["a"]["w"][:, 0] = 0
    params["a"]["w"][0, 0] = 1
    params["a"]["b"][0] = -2.5
    for layer in ("b", "c"):
        params[layer]["w"][0, :] = 0
        params[layer]["w"][:, 0] = 0
        params[layer]["w"][0, 0] = 1
        params[layer]["b"][0] = 0
    params["c"]["w"][0, 0] = 1e4
    params["d"]["w"][0, :] = 0
    return _fault(params, images, "d", algo="abs_max")
