"""Settings and fixtures that every test shares."""

import os

import jax
import numpy as np
import pytest

# Several CPU devices let the sharding tests run anywhere; they cost the other tests nothing.
NUM_CPU_DEVICES = 8

if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network", action="store_true", help="run the tests marked 'network'")
    parser.addoption("--slow", action="store_true", help="run the tests marked 'slow'")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name, reason in (("network", "needs the internet"), ("slow", "takes long")):
        if config.getoption(f"--{name}"):
            continue
        skip = pytest.mark.skip(reason=f"{reason}: give --{name}")
        for item in items:
            if name in item.keywords:
                item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and not _gpus():
        pytest.skip("needs a GPU: run with JAX_PLATFORMS=cuda,cpu where there is one")


def _gpus() -> list[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


@pytest.fixture(autouse=True)
def _strict_dtype_promotion():
    """No operation mixes dtypes unless the code says which one wins."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed: the same draws in every run, whatever ran before."""
    return np.random.default_rng(0)
