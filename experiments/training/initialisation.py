"""The variables that training starts from."""

import re

import jax
import numpy as np

from experiments.weights.tree import Variables, random_variables

CLASSIFIER_DEVIATION = 0.01  # small, so that the first loss is about log K
BLOCK_CONV = re.compile(r"(stage\d+_block\d+)/conv(\d)/bn/scale")


def initial_variables(shapes: Variables, seed: int, zero_residuals: bool = False) -> Variables:
    """Random variables of the given shapes, the same ones for the same seed, as NumPy arrays.

    Kernels are normal with variance 2 / fan-in (He et al., ICCV 2015), which networks without
    BatchNorm need to train at all; the classifier's are small; biases are zero.

    Args:
      shapes: of the model (see `experiments.weights.tree.template`).
      seed: a non-negative number.
      zero_residuals: start each residual block of a ResNet as the identity, with a zero scale in
        its last BatchNorm (Goyal et al., arXiv:1706.02677, section 5.1).
    """
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    convs = [match for match in map(BLOCK_CONV.search, names) if match]
    last = {match[1]: max(int(m[2]) for m in convs if m[1] == match[1]) for match in convs}

    def adjust(path: tuple[jax.tree_util.DictKey, ...], leaf: np.ndarray) -> np.ndarray:
        name = _name(path)
        if name.endswith("classifier/kernel"):
            he = np.float32(np.sqrt(2 / leaf.shape[0]))
            return leaf * (np.float32(CLASSIFIER_DEVIATION) / he)
        match = BLOCK_CONV.search(name)
        if zero_residuals and match and int(match[2]) == last[match[1]]:
            return np.zeros_like(leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(adjust, random_variables(shapes, seed))


def _name(path: tuple[jax.tree_util.DictKey, ...]) -> str:
    return "/".join(str(key.key) for key in path)
