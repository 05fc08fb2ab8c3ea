"""What masks put in place of values is no value: what reads it stays float, and says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.graph.model import trace_model
from jaxquant.plan.fillers import fillers
from tests.plan.full import quantize as quantize_full

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (6, 8)),
    "b": jax.random.normal(jax.random.key(1), (8, 5)),
}
X = jax.random.normal(jax.random.key(2), (4, 7, 6))
FIRST = np.arange(5) < 2  # of the classes, those that are masked


SEGMENTS = np.array([0, 1, 1, 3, 3, 5, 5])  # of 6 those of X's rows: 2 and 4 are empty


def largest_of_segments(x, value):
    """As `jax.ops.segment_max` has them, with minus infinity for `value`."""
    return jnp.full((6, *x.shape[1:]), value).at[SEGMENTS].max(x)


def of_segments(x, value):
    largest = largest_of_segments(x, value)
    return jnp.where(largest > value, largest, 0.0)


def graph_attention(p, x, value):
    """Softmax over the edges of a node, and the largest of what they bring: as jraph has both."""
    rows = x[0] @ p["a"]
    largest = largest_of_segments(rows[:, 0], value)
    weights = jnp.exp(rows[:, 0] - largest[SEGMENTS])
    sums = jax.ops.segment_sum(weights, SEGMENTS, 6)
    nodes = jax.ops.segment_sum((weights / sums[SEGMENTS])[:, None] * rows, SEGMENTS, 6)
    return (nodes + of_segments(rows, value)) @ p["b"]


def largest_of_some(p, x, value):
    """The maximum over the positions whose first feature is positive, as of a set of points."""
    features = jnp.where(x[..., :1] > 0, jax.nn.relu(x @ p["a"]), value)
    return jnp.maximum(features.max(axis=1), 0) @ p["b"]


def legal_action(p, x, value):
    logits = jnp.where(FIRST, value, jax.nn.relu(x @ p["a"]) @ p["b"])
    return jnp.argmax(logits, axis=-1), jax.nn.softmax(logits)


def with_mask_in_the_bias(p, x, value):
    logits = jax.nn.relu(x @ p["a"]) @ p["b"] + jnp.where(FIRST, value, 0.0)
    return jnp.argmax(logits, axis=-1), jax.nn.softmax(logits)


@pytest.mark.parametrize("value", [-np.inf, -1e9])
@pytest.mark.parametrize(
    "model", [largest_of_some, legal_action, with_mask_in_the_bias, graph_attention]
)
def test_masked_values_are_told_apart(model, value):
    def apply_fn(p, x):
        return model(p, x, value)

    for full in (True, False):
        qparams, qapply = jaxquant.quant_post(
            PARAMS, apply_fn, [X], is_full_quantize=full, progress=False
        )
        for given, wanted in zip(
            jax.tree.leaves(qapply(qparams, X)), jax.tree.leaves(apply_fn(PARAMS, X)), strict=True
        ):
            if jnp.issubdtype(wanted.dtype, jnp.integer):
                assert (given == wanted).mean() > 0.9  # of scores next to one another either
            else:
                assert np.abs(given - wanted).max() < 0.05 * np.abs(wanted).max()
        rows = {row["name"]: row for row in qapply.report().rows}
        assert rows["a"]["status"] == rows["b"]["status"] == "int8"
        if full:
            reasons = " ".join(row.get("reason") or "" for row in rows.values())
            assert f"holds {value:.3g} where values do not count" in reasons


def test_what_hands_a_filler_on():
    constant = np.where(FIRST, -1e9, 0).astype(np.float32)
    held = {
        "added": lambda x: x + jnp.where(FIRST, -jnp.inf, 0.0),
        "closed over": lambda x: x + constant,
        "set": lambda x: x.at[:, 3].set(-jnp.inf),
        "largest of segments": lambda x: jax.ops.segment_max(x, SEGMENTS, 6),
        "divided, then sorted": lambda x: jnp.sort(jnp.where(x > 0, x, -1e9) / 0.7)[:, 1:],
    }
    not_held = {
        "clipped": lambda x: jax.nn.relu(jnp.where(x > 0, x, -1e9)),
        "reduced": lambda x: jnp.where(x > 0, x, -jnp.inf).max(1),
        "segments that hold some": lambda x: jax.ops.segment_max(x, SEGMENTS, 6)[SEGMENTS],
        "instead of empty segments": lambda x: of_segments(x, -1e9),
        "in place of infinity": jnp.nan_to_num,
        "small": lambda x: jnp.where(x > 0, x, -100.0),
        "large everywhere": lambda x: x + np.full(5, -1e6, np.float32),
    }
    for is_held, functions in ((True, held), (False, not_held)):
        for name, function in functions.items():
            graph = trace_model(
                lambda p, x, f=function: f(x @ p["b"]), PARAMS, (X[0, :, :1] + jnp.ones(8),)
            ).graph
            assert (graph.outputs[0] in fillers(graph)) == is_held, name


LENGTHS = np.arange(16)[:, None] % 6
MASK = np.arange(7) <= LENGTHS
SEQUENCES = jax.random.normal(jax.random.key(3), (16, 7, 6))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize(
    "of_mask",
    [
        lambda mask: (1 - mask) * -1e9,
        lambda mask: (mask - 1) * 1e9,
        lambda mask: -1e9 * (1 - mask[:, None])[:, 0],
        lambda mask: jnp.log(mask.astype(bool).astype(np.float32)),
    ],
    ids=["one minus it", "it minus one", "spread", "logarithm"],
)
def test_a_mask_that_is_multiplied_and_added(of_mask, dtype):
    """As attention and pooling by attention have it."""

    def apply_fn(p, x, mask):
        hidden = of_mask(mask.astype(jnp.float32))
        y = x @ p["a"]
        scores = 0.1 * jnp.einsum("btd,bsd->bts", y, y) + hidden[:, None]
        y = jax.nn.softmax(scores) @ y
        weights = jax.nn.softmax((y @ p["b"])[..., 0] + hidden)
        return jnp.einsum("bt,btd->bd", weights, y) @ p["b"]

    model = quantize_full(apply_fn, PARAMS, SEQUENCES, MASK.astype(dtype))
    wanted = apply_fn(PARAMS, SEQUENCES, MASK.astype(dtype))
    got = model(SEQUENCES, MASK.astype(dtype))
    assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("start", [-1e38, -np.inf])
def test_a_loop_that_begins_with_a_filler(start):
    """A largest value so far, as in RWKV and in a softmax in one pass; its range is no range."""

    def apply_fn(p, x):
        scores = (x @ p["a"]) @ p["b"]

        def step(carry, score):
            largest, total = carry
            new = jnp.maximum(largest, score)
            kept = jnp.exp(largest - new)
            return (new, total * kept + jnp.exp(score - new)), total

        begin = jnp.full((len(x), 5), start), jnp.zeros((len(x), 5))
        (largest, total), _ = lax.scan(step, begin, scores.swapaxes(0, 1))
        return largest + jnp.log(total)

    qparams, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [SEQUENCES], is_full_quantize=True, progress=False
    )
    wanted = apply_fn(PARAMS, SEQUENCES)
    assert np.abs(qapply(qparams, SEQUENCES) - wanted).max() < 0.05 * np.abs(wanted).max()
    reasons = [row["reason"] or "" for row in qapply.report().rows]
    assert any(f"holds {start:.3g} where values do not count" in reason for reason in reasons)
