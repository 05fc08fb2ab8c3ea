import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import zoo
from experiments.weights import formats, tree


def test_a_saved_network_is_loaded_again(tmp_path):
    entry = zoo.find("cifar10_resnet20")
    variables = tree.random_variables(tree.template(entry.module(), 32))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", variables)
    _, loaded = zoo.load("cifar10_resnet20", str(tmp_path / "step"))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(tree.WeightsError, match="not an Orbax checkpoint"):
        formats.read(tmp_path)
