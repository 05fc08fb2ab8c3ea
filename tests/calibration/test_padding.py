"""Masks of padding: what is padding counts nowhere, whatever stands there."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from experiments.models.bert import Block
from experiments.models.transformer import scanned

LENGTHS = (6, 3, 3)
MASK = (np.arange(6) < np.array(LENGTHS)[:, None]).astype(np.int32)
OTHER = jnp.float32(40.0)


class Encoder(nn.Module):
    """Ids and their mask [B, T] -> [B, T, 8]."""

    is_scanned: bool = False

    @nn.compact
    def __call__(self, inputs: dict[str, jax.Array]) -> jax.Array:
        mask = inputs["mask"][:, None, None, :] > 0
        x = nn.Embed(30, 8, name="words")(inputs["ids"])
        if self.is_scanned:
            x, _ = scanned(Block, 2)(2, 16, name="layers")(x, mask)
        else:
            x, _ = Block(2, 16, name="layer")(x, mask)
        return nn.Dense(8, name="out")(x)


class Plain(nnx.Module):
    """A layer of features, of all positions as rows of one matrix."""

    def __init__(self, rngs: nnx.Rngs):
        self.words = nnx.Embed(30, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, inputs: dict[str, jax.Array]) -> jax.Array:
        x = self.words(inputs["ids"])
        rows = self.dense(self.norm(x.reshape(-1, 8)))
        weights = inputs["mask"].astype(x.dtype)
        summed = (rows.reshape(x.shape) * weights[..., None]).sum(axis=1)
        return summed / weights.sum(axis=1, keepdims=True)


def texts(seed: int = 0, other: int = 0) -> dict[str, np.ndarray]:
    """Ids that differ with `other` where padding is, alone."""
    ids = np.random.default_rng(seed).integers(1, 20, MASK.shape).astype(np.int32)
    junk = np.random.default_rng(other).integers(20, 30, MASK.shape).astype(np.int32)
    return {"ids": np.where(MASK, ids, junk), "mask": MASK}


def model(kind: str) -> tuple[Any, Any]:
    """A model whose rows of ids from 20 on, which stand at padding alone, are far larger."""
    if kind == "nnx":
        graph, params = nnx.split(Plain(nnx.Rngs(0)))
        large = params["words"]["embedding"]
        large[...] = large[...].at[20:].mul(OTHER)
        return params, lambda p, x: nnx.merge(graph, p)(x)
    if kind == "function":
        rng = np.random.default_rng(0)
        table = jnp.asarray(rng.normal(size=(30, 8)), jnp.float32).at[20:].mul(OTHER)
        params = {"table": table, "w": jnp.eye(8), "v": jnp.ones((8, 4))}
        return params, lambda p, x: jax.nn.relu(p["table"][x["ids"]] @ p["w"]) @ p["v"]
    module = Encoder(is_scanned=kind == "scan")
    params = module.init(jax.random.key(0), texts())
    table = params["params"]["words"]["embedding"]
    params["params"]["words"]["embedding"] = table.at[20:].mul(OTHER)
    return params, module.apply


def assert_same(one: Any, other: Any) -> None:
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


KINDS = [pytest.param("linen", marks=pytest.mark.slow), "scan", "nnx", "function"]


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_is_that_of_the_texts_without_padding(kind: str):
    params, apply_fn = model(kind)
    options: Any = {"progress": False, "is_full_quantize": kind != "nnx"}
    padded = texts()
    alone = [jax.tree.map(lambda x: x[:1], padded), jax.tree.map(lambda x: x[1:, :3], padded)]
    found = jaxquant.calibrate(params, apply_fn, [padded], mask="mask", **options)
    wanted = jaxquant.calibrate(params, apply_fn, alone, **options)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, stats in found.tensors.items():
        want = wanted.tensors[name]
        assert (stats.count, stats.bin_width) == (want.count, want.bin_width), name
        moved = np.abs(stats.counts - want.counts).sum()
        assert moved <= 0.01 * want.count, name  # sums of other sizes may round otherwise
        np.testing.assert_allclose([stats.min, stats.max], [want.min, want.max], rtol=1e-5)


def test_without_a_mask_padding_is_counted():
    params, apply_fn = model("function")
    found, counted = (
        jaxquant.calibrate(params, apply_fn, [texts()], progress=False, **options).tensors
        for options in ({"mask": "mask"}, {})
    )
    assert counted["w/input"].abs_max > 10 * found["w/input"].abs_max
    assert counted["w/input"].count == MASK.size * 8


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_at_padding_changes_nothing(kind: str):
    """Thresholds, the look at outliers, equalization and the corrected biases."""
    params, apply_fn = model(kind)
    made = [
        jaxquant.quant_post(
            params,
            apply_fn,
            [texts(other=other), texts(seed=1, other=other)],
            mask="mask",
            recover=("outliers", "equalization", "bias_correction"),
            progress=False,
        )
        for other in (1, 2)
    ]
    (qparams, qapply), (others, other) = made
    assert_same(qparams, others)
    rows, same = ([row["sqnr_db"] for row in q.report().rows] for q in (qapply, other))
    np.testing.assert_allclose(
        np.array(rows, float), np.array(same, float), rtol=1e-4, equal_nan=True
    )


@pytest.mark.parametrize("kind", [pytest.param("scan", marks=pytest.mark.slow), "nnx"])
def test_rounding_on_data_looks_at_no_padding(kind: str):
    params, apply_fn = model(kind)
    made = [
        jaxquant.quant_weights(
            params,
            apply_fn,
            [texts(seed, other) for seed in range(6)],
            mask="mask",
            recover=("awq", "gptq"),
            weight_bits=4,
            progress=False,
        )[0]
        for other in (1, 2)
    ]
    assert_same(*made)


@pytest.mark.parametrize("kind", [pytest.param("scan", marks=pytest.mark.slow), "function"])
def test_an_analysis_looks_at_no_padding(kind: str):
    params, apply_fn = model(kind)
    ds = [texts()]
    qparams, qapply = jaxquant.quant_post(params, apply_fn, ds, mask="mask", progress=False)
    one, other, unmasked = (
        jaxquant.analyze(params, apply_fn, qparams, qapply, [each], mask=mask, progress=False)
        for each, mask in ((ds[0], "mask"), (texts(other=1), "mask"), (ds[0], None))
    )
    for key in ("own_db", "accumulated_db", "clipped"):
        found, wanted = ([row.get(key) for row in each.rows] for each in (one, other))
        np.testing.assert_allclose(np.array(found, float), np.array(wanted, float), rtol=1e-4)
    highest, counted = (max(max(t.high) for t in a.tensors.values()) for a in (one, unmasked))
    assert highest < counted


def test_a_function_or_an_index_gives_the_mask():
    params, apply_fn = model("function")
    texts_alone = texts()["ids"]

    def by_index(p: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return apply_fn(p, {"ids": ids}) * mask.astype(jnp.float32)[..., None]

    found = [
        jaxquant.calibrate(params, function, ds, mask=mask, progress=False).tensors["w/input"]
        for function, ds, mask in (
            (apply_fn, [texts()], "mask"),
            (apply_fn, [texts()], lambda inputs: inputs["ids"] < 20),
            (apply_fn, [texts()], {"ids": "mask"}),
            (by_index, [(texts_alone, MASK)], 1),
            (by_index, [(texts_alone, MASK.astype(bool))], {0: 1}),
        )
    ]
    for stats in found:
        np.testing.assert_array_equal(stats.counts, found[0].counts)
        assert stats.count == MASK.sum() * 8


def test_the_texts_of_an_encoder_and_of_a_decoder_have_masks_of_their_own():
    """Of the same sizes by chance."""
    params = {"a": jnp.eye(8), "b": jnp.eye(8)}
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32) for _ in range(2))
    masks = MASK, MASK[::-1]

    def apply_fn(p: Any, x: Any, y: Any, x_mask: Any, y_mask: Any) -> Any:
        return x @ p["a"], y @ p["b"], x_mask, y_mask

    seen = jaxquant.calibrate(
        params, apply_fn, [(x, y, *masks)], mask={0: 2, 1: 3}, progress=False
    ).tensors
    for name, value, mask in (("a/input", x, masks[0]), ("b/input", y, masks[1])):
        real = np.asarray(value)[mask > 0]
        assert (seen[name].min, seen[name].max) == (real.min(), real.max())
        assert seen[name].count == real.size


def test_a_mask_is_of_the_sequence_that_it_meets():
    """That of the keys alone, of two texts of the same sizes."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32) for _ in range(2))
    params = {"keys": jnp.eye(8), "queries": jnp.eye(8)}

    def apply_fn(p: Any, x: Any, y: Any, mask: Any) -> Any:
        scores = jnp.einsum("btd,bsd->bts", y @ p["queries"], x @ p["keys"])
        return jax.nn.softmax(jnp.where(mask[:, None], scores, -1e9)) @ x

    seen = jaxquant.calibrate(params, apply_fn, [(x, y, MASK > 0)], mask=2, progress=False).tensors
    assert seen["keys/input"].count == MASK.sum() * 8
    assert seen["queries/input"].count == y.size


def test_texts_that_never_meet_need_a_mask_each():
    params = {"a": jnp.eye(8), "b": jnp.eye(8)}
    ones = np.ones((3, 6, 8), np.float32)

    def apply_fn(p: Any, x: Any, y: Any, mask: Any) -> Any:
        return (x * mask[..., None]) @ p["a"], y @ p["b"]

    batch = (ones, ones, MASK.astype(np.float32))
    with pytest.warns(UserWarning, match="mask: whether 1 has the same positions as the mask"):
        seen = jaxquant.calibrate(params, apply_fn, [batch], mask=2, progress=False).tensors
    assert (seen["a/input"].count, seen["b/input"].count) == (MASK.sum() * 8, ones.size)


def test_what_is_added_by_arithmetic_on_ids_is_no_fill():
    params = {"v": jnp.full(8, 0.1), "w": jnp.eye(8)}
    x = np.random.default_rng(0).normal(size=(*MASK.shape, 8)).astype(np.float32)
    places = np.broadcast_to(np.arange(6), MASK.shape)

    def apply_fn(p: Any, x: Any, places: Any, mask: Any) -> Any:
        x = x + places.astype(x.dtype)[..., None] * p["v"]
        return (x @ p["w"]) * mask[..., None].astype(x.dtype)

    seen = jaxquant.calibrate(params, apply_fn, [(x, places, MASK)], mask=2, progress=False)
    assert seen.tensors["w/input"].count == MASK.sum() * 8


def test_a_product_that_reads_what_a_mask_filled_in_counts_it_and_says_so():
    params = {"w": jnp.eye(8)}
    x = np.random.default_rng(0).normal(size=(*MASK.shape, 8)).astype(np.float32)

    def apply_fn(p: Any, x: Any, mask: Any) -> Any:
        return (x + mask.astype(x.dtype)[..., None]) @ p["w"]

    with pytest.warns(UserWarning, match=r"counted in 'w/input': the model adds or writes"):
        seen = jaxquant.calibrate(params, apply_fn, [(x, MASK)], mask=1, progress=False)
    assert seen.tensors["w/input"].count == x.size


@pytest.mark.parametrize(
    "maker", ["mask", lambda inputs: inputs["mask"] > 0], ids=["key", "function"]
)
def test_one_mask_of_several_inputs(maker: Any):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(30, 8)).astype(np.float32) for name in ("words", "kinds")}
    params["w"] = np.eye(8, dtype=np.float32)

    def apply_fn(p: Any, x: Any) -> Any:
        embedded = p["words"][x["ids"]] + p["kinds"][x["kinds"]]
        return (embedded @ p["w"]) * x["mask"][..., None].astype(jnp.float32)

    ds = [{**texts(), "kinds": texts(other=1)["ids"]}]
    mask = {"ids": maker, "kinds": maker}
    seen = jaxquant.calibrate(params, apply_fn, ds, mask=mask, progress=False).tensors
    assert seen["w/input"].count == MASK.sum() * 8


def test_a_float_that_a_function_makes_the_mask_of_fills_in_too():
    """Masked scores are read: they have to stay far below the others in int8."""
    params = {"w": jnp.eye(8)}
    x = np.random.default_rng(0).normal(size=(*MASK.shape, 8)).astype(np.float32)

    def apply_fn(p: Any, x: Any, mask: Any) -> Any:
        x = x @ p["w"]
        return jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x) + (1 - mask[:, None]) * -1e4) @ x

    ds = [(x, MASK.astype(np.float32))]
    options: Any = {"is_full_quantize": True, "progress": False}
    named, made = (
        jaxquant.calibrate(params, apply_fn, ds, mask=mask, **options).tensors
        for mask in (1, lambda x, mask: mask > 0.5)
    )
    for name, stats in made.items():
        assert (stats.min, stats.count) == (named[name].min, named[name].count), name


def test_a_function_that_gives_an_input_names_it():
    """What a mask of floats adds to scores is read, whichever way the mask is named."""
    params = {"w": jnp.eye(8)}
    x = np.random.default_rng(0).normal(size=(*MASK.shape, 8)).astype(np.float32)

    def apply_fn(p: Any, x: Any, mask: Any) -> Any:
        x = x @ p["w"]
        scores = jnp.einsum("btd,bsd->bts", x, x) + (1 - mask[:, None]) * -20.0
        return jax.nn.softmax(scores) @ x

    ds = [(x, MASK.astype(np.float32))]
    options: Any = {"is_full_quantize": True, "progress": False}
    named, given = (
        jaxquant.calibrate(params, apply_fn, ds, mask=mask, **options).tensors
        for mask in (1, lambda x, mask: mask)
    )
    assert {k: (v.min, v.count) for k, v in named.items()} == {
        k: (v.min, v.count) for k, v in given.items()
    }


def test_a_file_keeps_the_mask(tmp_path: Any):
    params, apply_fn = model("function")
    path = tmp_path / "calibration.safetensors"
    options: Any = {"progress": False}
    ds = [texts(), texts(1)]
    direct, _ = jaxquant.quant_post(params, apply_fn, ds, mask="mask", **options)
    jaxquant.calibrate(params, apply_fn, ds, mask="mask", calibration_file=path, **options)
    assert_same(direct, jaxquant.quantize(params, apply_fn, path, **options)[0])
    with pytest.raises(ValueError, match=r"mask is None, in the file \[\[None, 'mask'\]\]"):
        jaxquant.quant_post(params, apply_fn, ds, calibration_file=path, **options)


def test_an_observer_of_ones_own_sees_zeros():
    params, apply_fn = model("function")
    largest = jaxquant.Observer(
        lambda: jnp.zeros(()),
        lambda state, x: jnp.maximum(state, abs(x).max()),
        lambda states, levels: states,
    )
    seen = jaxquant.calibrate(
        params, apply_fn, [texts()], algo=largest, mask="mask", progress=False
    )
    assert seen.states["w/input"] == seen.tensors["w/input"].abs_max


def test_what_cannot_be_followed_is_counted_and_named():
    params = {"w": jnp.eye(8)}

    def apply_fn(p: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.roll(x, 2, axis=1) @ p["w"] * mask[..., None].astype(x.dtype)

    x = np.random.default_rng(0).normal(size=(*MASK.shape, 8)).astype(np.float32)
    with pytest.warns(UserWarning, match=r"padding is counted in 'w/input': .* 'slice'"):
        seen = jaxquant.calibrate(params, apply_fn, [(x, MASK)], mask=1, progress=False)
    assert seen.tensors["w/input"].count == x.size


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("msk", ValueError, r"mask='msk' names no input of the model; it has 0\['ids'\], 0\['mask"),
        (3, ValueError, r"mask=3 names no input"),
        (True, TypeError, r"mask is the key or index of the input that tells"),
        ({}, TypeError, r"mask is an empty dict"),
        ({"words": "mask"}, ValueError, r"mask='words' names no input"),
        (lambda x: x["mask"][0], ValueError, r"is of shape \[6\]; a mask of padding is \[B, T\]"),
        (lambda x: x["mask"][:, 1:], ValueError, r"of shape \[3, 5\], and no other input begins"),
        (lambda x: x["mask"] - 1, ValueError, r"holds -1 in batch 0; .* holds 1"),
        (lambda x: x["mask"] * 0, ValueError, r"every position of batch 0 that it is padding"),
    ],
)
def test_a_wrong_mask_is_an_error(mask: Any, error: type[Exception], message: str):
    params, apply_fn = model("function")
    with pytest.raises(error, match=message):
        jaxquant.calibrate(params, apply_fn, [texts()], mask=mask, progress=False)
