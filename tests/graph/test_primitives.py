import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.graph import primitives
from jaxquant.graph.primitives import Channels
from jaxquant.graph.trace import trace

TO_THREE_AXES = [
    lambda x: x.reshape(2, 12),
    lambda x: x.transpose(2, 0, 1),
    lambda x: x[:, None],
    lambda x: x[::-1],
    jax.lax.stop_gradient,
    lambda x: jnp.broadcast_to(x[None], (1, 2, 3, 4)),
]


def graph_of(fn, *shapes):
    return trace(lambda p, *xs: fn(*xs), jnp.ones(()), [jnp.zeros(s) for s in shapes])


@pytest.mark.parametrize("fn", TO_THREE_AXES)
def test_movements_are_seen_through(fn):
    graph = graph_of(lambda x: fn(jnp.tanh(x)), (2, 3, 4))
    tanh = graph.equations[0].outputs[0]
    assert primitives.movement_root(graph, graph.outputs[0]) == tanh


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x + x,
        lambda x: x[:1],
        lambda x: jnp.broadcast_to(x[None], (5, 2, 3, 4)),
        lambda x: jnp.concatenate([x, x]),
        lambda x: x.sum(0),
        lambda x: jnp.pad(x, 1),
        lambda x: x.astype(jnp.bfloat16),
        lambda x: jnp.broadcast_to(x[:, :, :1], (2, 3, 4)),
    ],
)
def test_what_computes_repeats_or_drops_values_is_no_movement(fn):
    graph = graph_of(fn, (2, 3, 4))
    last = graph.outputs[0]
    assert not primitives.is_movement(graph, graph.producer[last])
    assert primitives.movement_root(graph, last) == last


def test_copies_of_nothing_are_copies():
    """An empty batch has as many elements before as behind."""
    graph = graph_of(lambda x: jnp.broadcast_to(jnp.tanh(x)[:, None], (0, 5, 4)), (0, 4))
    assert not primitives.is_movement(graph, graph.producer[graph.outputs[0]])


def test_elementwise():
    graph = graph_of(lambda x: jnp.where(jnp.isfinite(x), jax.nn.gelu(x), jnp.cbrt(x)), (3,))
    assert all(
        primitives.is_elementwise(eqn) or eqn.name == "broadcast_in_dim" for eqn in graph.equations
    )
    graph = graph_of(lambda x: jnp.cumsum(x), (3,))
    assert not any(primitives.is_elementwise(eqn) for eqn in graph.equations)


def labels(channels: Channels, shape) -> np.ndarray:
    """The channel number of every element, by the definition of `Channels`."""
    index = np.zeros(shape, int)
    for size, axis in zip(channels.sizes, channels.axes):
        along = np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        index = index * size + along
    return index


@st.composite
def movements(draw):
    """A shape, the axes of its channels, and movements to apply."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    rank = len(shape)
    axes = draw(st.lists(st.integers(0, rank - 1), max_size=2, unique=True))
    steps = []
    current = list(shape)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["transpose", "merge", "split", "expand", "rev"]))
        if kind == "transpose":
            order = draw(st.permutations(range(len(current))))
            steps.append(("transpose", tuple(order)))
            current = [current[a] for a in order]
        elif kind == "merge" and len(current) > 1:
            at = draw(st.integers(0, len(current) - 2))
            current = [*current[:at], current[at] * current[at + 1], *current[at + 2 :]]
            steps.append(("reshape", tuple(current)))
        elif kind == "split" and any(s % 2 == 0 for s in current):
            at = draw(st.sampled_from([i for i, s in enumerate(current) if s % 2 == 0]))
            current = [*current[:at], 2, current[at] // 2, *current[at + 1 :]]
            steps.append(("reshape", tuple(current)))
        elif kind == "expand":
            current = [1, *current]
            steps.append(("reshape", tuple(current)))
        elif kind == "rev":
            steps.append(("rev", draw(st.integers(0, len(current) - 1))))
    return tuple(shape), tuple(axes), steps


def apply_steps(x, steps, lib):
    for kind, argument in steps:
        if kind == "transpose":
            x = x.transpose(argument)
        elif kind == "reshape":
            x = x.reshape(argument)
        elif lib is np:
            x = np.flip(x, argument)
        else:
            x = jax.lax.rev(x, (argument,))
    return x


@settings(max_examples=60, deadline=None)
@given(movements())
def test_channels_are_followed_through_movements_or_given_up(case):
    """Where `through` gives an answer, every element still has its own channel."""
    shape, axes, steps = case
    channels = Channels(tuple(shape[a] for a in axes), axes)
    graph = graph_of(lambda x: apply_steps(jnp.tanh(x), steps, jnp), shape)
    expected = apply_steps(labels(channels, shape), steps, np)
    current = channels
    for eqn in graph.equations[1:]:
        current = current.through(graph, eqn)
        if current is None:
            return
    np.testing.assert_array_equal(labels(current, expected.shape), expected)


@pytest.mark.parametrize(
    ("shape", "axes", "fn"),
    [
        ((4, 6, 8), (2,), lambda x: x.reshape(24, 8)),
        ((4, 6, 8), (1, 2), lambda x: x.reshape(4, 48)),
        ((4, 48), (1,), lambda x: x.reshape(4, 6, 8)),
        ((4, 6, 8), (2,), lambda x: x.transpose(2, 0, 1)),
        ((4, 6, 8), (0,), lambda x: x[:, None, ::-1]),
    ],
)
def test_channels_are_not_given_up_needlessly(shape, axes, fn):
    """Merged batch axes and split or merged channels: what `nn.DenseGeneral` and einsum do."""
    channels = Channels(tuple(shape[a] for a in axes), axes)
    graph = graph_of(lambda x: fn(jnp.tanh(x)), shape)
    for eqn in graph.equations[1:]:
        channels = channels.through(graph, eqn)
        assert channels is not None
    expected = np.asarray(fn(labels(Channels(tuple(shape[a] for a in axes), axes), shape)))
    np.testing.assert_array_equal(labels(channels, expected.shape), expected)


SYMBOLIC = {
    "split": (("b", 24), (1,), lambda x: x.reshape(x.shape[0], 4, 1, 6), (1, 3)),
    "merged batch": (("b", "s", 8), (2,), lambda x: x.reshape(-1, 8), (1,)),
    "split batch": (("2*b", 4, 6), (1, 2), lambda x: x.reshape(-1, 2, 24), (2,)),
    "both": (("b", 4, 2, 6), (2, 3), lambda x: x.reshape(4 * x.shape[0], 12), (1,)),
}


@pytest.mark.parametrize("size", ["symbol", 0, 1, 3])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_channels_are_followed_whatever_the_batch(name, size):
    """Symbols can be compared for equality alone, and an empty batch makes all products equal."""
    spec, axes, fn, expected = SYMBOLIC[name]
    scope = jax.export.SymbolicScope()
    text = ", ".join(map(str, spec))
    symbols = jax.export.symbolic_shape(text, scope=scope)
    known = {"b": size, "2*b": 2 * size, "s": 5} if size != "symbol" else {}
    shape = tuple(known.get(str(d), d) for d in symbols)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    graph = trace(lambda p, x: fn(jnp.tanh(x)), jnp.ones(()), [x])
    channels = Channels(tuple(shape[a] for a in axes), axes)
    for eqn in graph.equations[1:]:
        channels = channels.through(graph, eqn)
    assert channels is not None
    assert channels.axes == expected


@pytest.mark.parametrize(
    ("shape", "axes", "fn"),
    [
        ((4, 8), (1,), lambda x: x.reshape(32)),
        ((8, 4), (0,), lambda x: jax.lax.rev(x, (0,))),
        ((4, 6), (1, 0), lambda x: x.reshape(24)),
    ],
    ids=["mixed with the batch", "reversed", "in another order"],
)
def test_channels_that_get_mixed_are_given_up(shape, axes, fn):
    graph = graph_of(fn, shape)
    channels = Channels(tuple(shape[a] for a in axes), axes)
    assert channels.through(graph, graph.equations[-1]) is None
