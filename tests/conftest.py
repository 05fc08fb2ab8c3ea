"""Settings and fixtures that every test shares.

Nearly all the time of these tests is XLA compiling.  So what one test compiled serves the others,
by a cache that is made for the run and removed behind it; and XLA compiles in the quickest way that
it has, but for the tests marked 'optimized': those that compare bits, as users get them.
"""

import collections
import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from jax._src import compiler

from jaxquant.jax_shim import compilation

# What takes long is compiling, and how long depends on what else the machine does.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Several CPU devices let the sharding tests run anywhere; they cost the other tests nothing.
NUM_CPU_DEVICES = 8
_NATIVE = Path(__file__).parent / "native"  # all of whose tests compare bits
# Small programs take a third of the time to compile: kernels by LLVM alone, not by way of MLIR, all
# of a program in one module, and nothing optimized where a program asks for a part of it either.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,
}

_get_compile_options = compiler.get_compile_options


@functools.cache
def _quick() -> dict[str, Any]:
    return {name: value for name, value in _QUICK.items() if compilation.has_option(name, value)}


if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="jaxquant-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        # The environment takes it to the workers of this run and to the processes that tests start.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _quick()  # it compiles, so before what follows
    compiler.get_compile_options = _compile_options
    _compile_as_users_do(False)  # what modules compute as they are imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerators", action="store_true", help="run those marked 'accelerators'")
    parser.addoption("--network", action="store_true", help="run the tests marked 'network'")
    parser.addoption("--optimized", action="store_true", help="compile all tests as users do")
    parser.addoption("--slow", action="store_true", help="run the tests marked 'slow'")


def pytest_collection_finish() -> None:
    # What is there now stays, and JAX makes much that lives long: Python need not look so often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _NATIVE in item.path.parents:
            item.add_marker(pytest.mark.optimized)
    reasons = {
        "accelerators": "compiles for devices that are not here",
        "network": "needs the internet",
        "slow": "takes long",
    }
    for name, reason in reasons.items():
        if config.getoption(f"--{name}"):
            continue
        skip = pytest.mark.skip(reason=f"{reason}: give --{name}")
        for item in items:
            if name in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _compile_as_users_do("optimized" in item.keywords or item.config.getoption("--optimized"))
    if "gpu" in item.keywords and not _gpus():
        pytest.skip("needs a GPU: run with JAX_PLATFORMS=cuda,cpu where there is one")


def _compile_as_users_do(optimized: bool) -> None:
    if jax.config.values["jax_disable_most_optimizations"] == optimized:
        jax.config.update("jax_disable_most_optimizations", not optimized)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not optimized))  # for new processes
        jax.clear_caches()  # what is compiled stays as it was


def _compile_options(
    *args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    """JAX's, and the quick ones: JAX has no setting for the options of every program."""
    quick = _quick() if jax.config.values["jax_disable_most_optimizations"] else {}
    options = {**(env_options_overrides or {}), **quick}
    return _get_compile_options(*args, env_options_overrides=options, **kwargs)


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


@pytest.fixture(scope="module")
def numbers_as_they_are():
    """Biases are not rounded to whole units of the accumulator, nor scales moved away from ties.

    What is left is the arithmetic, to be compared to the last bit.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxquant.weights.epilogue.LARGEST_BIAS", -1.0)
        patch.setattr("jaxquant.plan.ties.find_sums", lambda part: collections.defaultdict(dict))
        yield
