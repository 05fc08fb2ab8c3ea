"""What JAX and XLA here may not have is left away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.jax_shim import compilation


def test_options_that_this_xla_lacks_are_left_away(monkeypatch: pytest.MonkeyPatch):
    options = compilation.quick_compilation()
    assert bool(options) == (jax.default_backend() == "cpu")
    run = jax.jit(lambda x: jnp.tanh(x) @ x.T, compiler_options=options)
    x = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    np.testing.assert_allclose(run(x), np.tanh(x) @ x.T, rtol=1e-4, atol=1e-4)
    assert not compilation.has_option("xla_of_another_release", True)
    compilation.quick_compilation.cache_clear()
    monkeypatch.setattr(compilation, "has_option", lambda name, value: False)
    assert compilation.quick_compilation() == {}
    compilation.quick_compilation.cache_clear()
