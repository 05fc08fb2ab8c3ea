"""A model whose graph was stored computes what it did, for other sizes too."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.deploy.saved import make_stored
from jaxquant.deploy.schema import decode
from jaxquant.deploy.stored.form import Body, Equation, StoredForm
from jaxquant.deploy.stored.read import StoredGraph
from tests.deploy.models import same_bits
from tests.networks import images

PARAMS = {
    "w": jnp.asarray(images(0, (8, 8))),
    "v": jnp.asarray(images(1, (8, 6))),
    "table": [jnp.asarray(images(2, (20, 8)))],
}
KEY, CLOSED_OVER = jax.random.key(3), jnp.asarray(images(3, (8, 8)))
ROWS, WORDS = images(4, (4, 8)), images(5, (4, 5, 8))
PICTURES, TOKENS = images(6, (4, 6, 6, 8)), np.arange(12).reshape(4, 3)


def recurrent(p, x):
    def step(carry, row):
        return jax.nn.relu(carry @ CLOSED_OVER + row), jnp.round(carry)

    first = jnp.zeros((x.shape[0], 8))
    last, rows = lax.scan(step, first, jnp.swapaxes(x @ p["w"], 0, 1), unroll=2)
    return {"last": last @ p["v"], "rows": (rows, None)}


def looping(p, x):
    def body(_, y):
        return lax.cond(y.sum() > 0, jnp.tanh, lambda z: jax.nn.silu(z) * 2, y)

    return lax.fori_loop(0, 3, body, x @ p["w"])


def random(p, x):
    noise = jax.random.normal(jax.random.fold_in(KEY, 1), (8,))
    return x @ p["w"] + noise + jax.random.uniform(jax.random.PRNGKey(0), x.shape)


def indexed(p, x):
    y = x @ p["w"]
    y = y.at[:, jnp.array([0, 1])].add(1.0).at[:, 3].set(0.0)
    return jnp.sort(y), lax.top_k(y, 3), jnp.take(y, jnp.array([0, 9]), axis=1, mode="clip")


def sized(p, x):
    """Sizes that vary are read as numbers, and as shapes."""
    positions = jnp.arange(x.shape[0])[:, None] / x.shape[0]
    return x @ p["w"] + positions + jnp.ones((x.shape[0] * 2, 1)).sum()


def attending(p, x):
    scores = jnp.einsum("bld,bmd->blm", x @ p["w"], x @ p["w"])
    return jax.nn.softmax(scores) @ x


def resized(p, x):
    shape = (x.shape[0], 12, 12, 8)
    nearest = jax.image.resize(x @ p["w"], shape, "nearest")
    pooled = lax.reduce_window(nearest, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return jax.image.resize(pooled, shape, "bilinear")


MODELS = {
    "recurrent": (recurrent, WORDS),
    "looping": (looping, ROWS),
    "random": (random, ROWS),
    "indexed": (indexed, ROWS),
    "sized": (sized, ROWS),
    "attending": (attending, WORDS),
    "resized": (resized, PICTURES),
    "embedding": (lambda p, x: p["table"][0][x] @ p["w"] @ p["v"], TOKENS),
    "spectrum": (lambda p, x: jnp.abs(jnp.fft.rfft(x @ p["w"])), ROWS),
    "values": (lambda p, x: jnp.linalg.eigvalsh(jnp.outer(x[0], x[0] @ p["w"])), ROWS),
    "derived": (lambda p, x: jax.vmap(jax.grad(lambda y: jnp.tanh(y @ p["w"]).sum()))(x), ROWS),
    "checkpointed": (lambda p, x: jax.checkpoint(jnp.sin)(x @ p["w"]) @ p["v"], ROWS),
}
WAYS = {
    "dynamic": lambda f, x: jaxquant.quant_dynamic(PARAMS, f, x),
    "weights": lambda f, x: jaxquant.quant_weights(PARAMS, f, x, weight_bits=4, group_size=4),
    "full": lambda f, x: jaxquant.quant_post(
        PARAMS, f, [x], algo="abs_max", is_full_quantize=True, recover=(), progress=False
    ),
}
CASES = [(name, "dynamic") for name in MODELS]
CASES += [
    (name, way) for name in ("attending", "embedding", "sized") for way in ("weights", "full")
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_loaded_model_gives_the_same_bits(name, way, tmp_path):
    function, x = MODELS[name]
    qparams, qapply = WAYS[way](function, x)
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    assert str(apply.report()) == str(qapply.report())
    for inputs in (x, x[:1]):
        assert same_bits(apply(loaded, inputs), qapply(qparams, inputs))


@functools.cache
def stored(name="looping"):
    function, x = MODELS[name]
    _, qapply = jaxquant.quant_dynamic(PARAMS, function, x)
    return make_stored(qapply)


def changed(**fields):
    """The graph of a model with other fields, as it would be read from a file."""
    form = dataclasses.replace(stored().form, **fields)
    data = json.loads(json.dumps(dataclasses.asdict(form)))
    graph = StoredGraph(decode(StoredForm, data, "graph"), stored().arrays)
    return graph(graph.example).graph


def with_equation(op, inputs, outputs=1, **params):
    form = stored().form
    return changed(equations=(*form.equations, Equation(op, inputs, outputs, params)))


def test_an_unchanged_form_gives_the_graph():
    assert len(changed().equations) == len(stored().form.equations)


X = 3  # the number of the input: there are three leaves, and no constant


@pytest.mark.parametrize(
    ("op", "inputs", "params", "message"),
    [
        ("pure_callback", (X,), {}, "may ask for"),
        ("ffi_call", (X,), {}, "may ask for"),
        ("sin", (10**6,), {}, "number 1000000 of"),
        ("sin", (-1,), {}, "number -1 of"),
        ("sin", (X, X), {}, "'sin'"),
        ("sin", (X,), {"x": 1}, "'sin'"),
        ("sin", ((1, "int8"),), {"accuracy": None}, "'sin'"),
        ("add", (X, ("x", "float32")), {}, "no number"),
        ("broadcast_in_dim", ((0.0, "float32"),),
         {"shape": [2**21, 2**21], "broadcast_dimensions": [], "sharding": None}, "the shape"),
        ("iota", (), {"dtype": {"dtype": "int32"}, "shape": [2**62], "dimension": 0,
                      "sharding": None}, "iota"),
        ("while", (X,), {"cond_nconsts": 0, "body_nconsts": 0, "cond_jaxpr": {"body": 99},
                         "body_jaxpr": {"body": 0}}, "number 99 of"),
        ("sin", (X,), {"accuracy": {"body": 0}}, "with a body"),
    ],
)  # fmt: skip
def test_what_no_trace_gives_is_refused(op, inputs, params, message):
    with pytest.raises(ValueError, match=message):
        with_equation(op, inputs, **params)


def test_a_body_cannot_read_itself():
    call = Equation("jit", (0,), 1, {"name": "f", "body": {"body": 0}})
    body = Body((), 1, (call,), (1,))
    loop = {"branches": [{"body": 0}]}
    last = Equation("cond", ((0, "int32"), X), 1, loop)
    with pytest.raises(ValueError, match="reads itself"):
        changed(bodies=(body,), equations=(*stored().form.equations[:1], last))


def nested(depth):
    """Bodies of which each calls the one before it four times."""
    bodies = [Body((), 1, (Equation("neg", (0,), 1),), (1,))]
    for k in range(depth):
        calls = [Equation("jit", (n,), 1, {"name": "f", "body": {"body": k}}) for n in range(4)]
        bodies.append(Body((), 1, tuple(calls), (4,)))
    last = Equation("cond", ((0, "int32"), X), 1, {"branches": [{"body": depth}]})
    return {"bodies": tuple(bodies), "equations": (*stored().form.equations[:1], last)}


def test_bodies_in_bodies_do_not_multiply():
    assert len(changed(**nested(12), outputs=(X,)).equations) == 2  # 4 ** 12 of them otherwise
    with pytest.raises(ValueError, match="too deep"):
        changed(**nested(40))


def test_a_loop_gives_what_it_takes():
    form = stored().form
    params = {"new_dtype": {"dtype": "float16"}, "weak_type": False, "sharding": None}
    body = Body((), 1, (Equation("convert_element_type", (0,), 1, params),), (1,))
    test = Body((), 1, (), ((True, "bool"),))
    loop = Equation("while", (X,), 1, {
        "cond_nconsts": 0, "body_nconsts": 0, "cond_jaxpr": {"body": 1}, "body_jaxpr": {"body": 0}
    })  # fmt: skip
    with pytest.raises(ValueError, match="gives something else than is read"):
        changed(bodies=(body, test), equations=(*form.equations[:1], loop), outputs=())


def test_inputs_that_do_not_fit_are_explained():
    graph = stored()
    with pytest.raises(
        ValueError, match=r"takes float32\[batch, 8\], got float32\[4, 7\]: the size"
    ):
        graph((jnp.zeros((4, 7)),))
    with pytest.raises(ValueError, match="another dtype or rank"):
        graph((jnp.zeros((4, 8), jnp.int32),))
    with pytest.raises(ValueError, match="takes inputs of the structure"):
        graph(({"x": jnp.zeros((4, 8))},))


def test_constraints_hold_for_what_is_called(tmp_path):
    def positioned(p, x):
        return x @ p["w"] + p["table"][0][: x.shape[1]]

    qparams, qapply = jaxquant.quant_dynamic(PARAMS, positioned, WORDS)
    options = {"shapes": "b, s, 8", "constraints": ("s <= 20",)}
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply, **options)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    for length in (1, 20):
        x = images(7, (2, length, 8))
        assert same_bits(apply(loaded, x), qapply(qparams, x))
    with pytest.raises(ValueError, match="saved for s <= 20"):
        apply(loaded, images(7, (2, 21, 8)))
