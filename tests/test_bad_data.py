"""Data that does not fit is a clear error that names the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.graph.calls import shapes_text
from tests.bad_input import PARAMS, X, mlp, never, notes, quant_post


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer or None, got 0"),
        ({"batch_nums": 1.5}, TypeError, "batch_nums must be a positive integer or None, got 1.5"),
        ({"select": 1.5}, TypeError, "select must be a key or index"),
        ({"select": 3}, ValueError, "select=3 does not fit batch 0 of ds"),
    ],
)
def test_arguments_of_the_data_are_checked(kwargs, error, match):
    with pytest.raises(error, match=match):
        quant_post(apply_fn=never, **kwargs)


@pytest.mark.parametrize(
    ("ds", "match"),
    [
        ([], r"ds is empty: it gave no batch \(ds is a list\)"),
        (iter([]), "A generator or another iterator can be read only once"),
        (lambda: [], "The callable must return a fresh iterator"),
        (np.zeros((0, 4), np.float32), "ds is empty"),
        ([np.zeros((0, 4), np.float32)], r"batch 0 of ds is empty: .*float32\[0,4\]. Leave it out"),
    ],
    ids=["list", "iterator", "callable", "array", "batch"],
)
def test_empty_ds(ds, match):
    with pytest.raises(ValueError, match=match):
        jaxquant.calibrate(PARAMS, mlp, ds, progress=False)


def test_an_exhausted_generator():
    ds = (x for x in [X])
    next(ds)
    with pytest.raises(ValueError, match="if it has been read already, pass a callable"):
        jaxquant.calibrate(PARAMS, mlp, ds, progress=False)


def test_fewer_batches_than_asked_is_a_warning():
    with pytest.warns(UserWarning, match="ds ended after 1 of batch_nums=5 batches"):
        seen = jaxquant.calibrate(PARAMS, mlp, [X], batch_nums=5, progress=False)
    assert seen.batches == 1


@pytest.mark.parametrize(
    ("ds", "guess"),
    [
        ([(X, jnp.zeros(3))], "select=0"),
        ([jnp.ones((3, 7))], "give batch_size="),
        ([{"image": X}], "select='image'"),
        ([jnp.ones((2, 3, 8, 8))], "x.transpose(0, 2, 3, 1)"),
    ],
    ids=["labels too", "another shape", "a dict", "channels first"],
)
def test_batches_that_do_not_fit_apply_fn_are_described(ds, guess):
    with pytest.raises((TypeError, ValueError)) as info:
        jaxquant.calibrate(PARAMS, mlp, ds, progress=False)
    assert "calibration called apply_fn(params, *inputs) with inputs of" in notes(info.value)
    assert "float32" in notes(info.value)
    assert guess in notes(info.value)


def test_no_guess_at_the_data_where_the_function_cannot_be_traced():
    with pytest.raises(jax.errors.TracerBoolConversionError) as info:
        jaxquant.calibrate(PARAMS, lambda p, x: mlp(p, x) if x.sum() else x, [X], progress=False)
    assert "batch_size" not in notes(info.value)


def test_batches_that_do_not_fit_each_other():
    with pytest.raises(TypeError) as info:
        jaxquant.calibrate(PARAMS, mlp, [X, jnp.ones((3, 5))], progress=False)
    said = notes(info.value)
    assert "with inputs of float32[3, 5]" in said
    assert (
        f"That is batch 1; batch 0, which the model took, has inputs of {shapes_text((X,))}" in said
    )


def test_a_batch_size_that_changes_the_graph_names_the_batch():
    def apply_fn(p, x):
        return mlp(p, x) if x.shape[0] > 1 else x @ p["head"]["w"]

    with pytest.raises(ValueError, match=r"batch 1 gives another graph than batch 0.* sites fc "):
        jaxquant.calibrate(PARAMS, apply_fn, [X, X[:1]], progress=False)


def test_inputs_that_are_traced():
    with pytest.raises(TypeError, match=r"batch 0 .* is being traced: .* outside jit"):
        jax.jit(lambda x: quant_post(ds=[x])[0])(X)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"batch_size": 2}, "batch_size=2 has stacked 2 items of ds"), ({}, "give batch_size=")],
)
def test_batches_and_samples_that_are_confused(options, match):
    def apply_fn(p, x):
        assert x.ndim == 2, "a batch of vectors"
        return mlp(p, x)

    ds = [X, X] if options else [X[0], X[1]]
    with pytest.raises(AssertionError) as info:
        jaxquant.calibrate(PARAMS, apply_fn, ds, progress=False, **options)
    assert match in notes(info.value)
