import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.graph import evaluate, ir
from jaxquant.graph.trace import path_name, path_parts, trace
from tests import networks


def run(graph, params, *inputs):
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    return evaluate.outputs(evaluate.evaluate(graph, leaves, jax.tree.leaves(inputs)))


def names(graph):
    return [eqn.name for eqn in graph.equations]


def paths(tree):
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


@jax.custom_jvp
def cube(x):
    return x * x * x


cube.defjvp(lambda x, t: (cube(x[0]), 3 * x[0] ** 2 * t[0]))


@jax.custom_vjp
def double(x):
    return x + x


double.defvjp(lambda x: (double(x), None), lambda _, g: (2 * g,))


@pytest.mark.parametrize(
    "call",
    [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f)), lambda f: lambda x: double(f(x))],
    ids=["jit", "remat", "nested jit", "custom_vjp"],
)
def test_calls_are_inlined(call):
    inner = call(lambda x: cube(jax.nn.relu(x)) + 1)
    graph = trace(lambda p, x: inner(x * p), jnp.ones(3), [jnp.ones(3)])
    assert set(names(graph)) <= {"mul", "max", "add"}
    x = jnp.array([-1.0, 2.0, 3.0])
    np.testing.assert_array_equal(run(graph, jnp.full(3, 2.0), x), inner(x * 2))


def test_a_reduction_over_no_axes_computes_nothing():
    """Under `vmap` a sum over a scalar is one, which exported files took for one over all axes."""

    def apply_fn(p, x):
        def each(row):
            return jnp.sum(row @ p) + jnp.max(row[0]) + jnp.prod(row[1])

        return jnp.sum(jax.vmap(each)(x), axis=())

    w, x = networks.images(0, (3,)), networks.images(1, (4, 3))
    graph = trace(apply_fn, w, (x,))
    assert not [name for name in names(graph) if name.startswith("reduce_")]
    np.testing.assert_allclose(run(graph, w, x), apply_fn(w, x), rtol=1e-6)


def test_control_flow_stays_one_equation():
    def apply_fn(p, x):
        x = jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c + p["w"], x)
        x = jax.lax.cond(x.sum() > 0, lambda v: v * 2, lambda v: v, x)
        return jax.lax.scan(lambda c, w: (c * w, c.sum()), x, p["steps"])

    params = {"w": jnp.ones(3), "steps": jnp.array([1.0, 2.0])}
    graph = trace(apply_fn, params, [jnp.ones(3)])
    assert [n for n in names(graph) if n in ("while", "cond", "scan")] == ["while", "cond", "scan"]
    x = jnp.array([1.0, 2.0, 3.0])
    expected = apply_fn(params, x)
    jax.tree.map(np.testing.assert_array_equal, run(graph, params, x), expected)


def test_static_is_what_depends_on_parameters_and_constants_alone():
    table = np.arange(3, dtype=np.float32)

    def apply_fn(p, x):
        weight = jnp.sqrt(p["w"]) * table
        return weight + x * 2, weight

    graph = trace(apply_fn, {"w": jnp.ones(3)}, [jnp.ones(3)])
    static = {eqn.name for eqn in graph.equations if graph.static[eqn.outputs[0]]}
    dynamic = {eqn.name for eqn in graph.equations if not graph.static[eqn.outputs[0]]}
    assert "sqrt" in static
    assert "add" in dynamic
    assert "sqrt" not in dynamic
    assert [graph.is_static(x) for x in graph.outputs] == [False, True]
    assert graph.is_static(ir.Literal(np.float32(1)))


def test_a_loops_operands_that_are_static_are_static_in_its_body():
    def apply_fn(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, p["layers"])

    graph = trace(apply_fn, {"layers": jnp.ones((2, 3, 3))}, [jnp.ones((4, 3))])
    (site,) = networks.find(apply_fn, {"layers": jnp.ones((2, 3, 3))}, jnp.ones((4, 3)))
    assert (site.inside, site.weight_path, site.kind) == (("scan",), "layers", "mul")
    assert [eqn.name for eqn in graph.equations] == ["scan"]


def test_structs_are_traced_like_arrays_without_computing():
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    structs = jax.tree.map(ir.struct, params)
    a = trace(lambda p, x: x @ p["w"], params, [x])
    b = trace(lambda p, x: x @ p["w"], structs, [ir.struct(x)])
    assert names(a) == names(b) == ["dot_general"]
    assert [a.shape(v) for v in a.outputs] == [b.shape(v) for v in b.outputs] == [(4, 2)]


def test_the_output_keeps_its_pytree():
    def apply_fn(p, x):
        return {"logits": x * p, "all": [x, (p, None)]}

    graph = trace(apply_fn, jnp.float32(2), [jnp.ones(2)])
    out = run(graph, jnp.float32(3), jnp.array([1.0, 2.0]))
    assert jax.tree.structure(out) == jax.tree.structure(apply_fn(1.0, 1.0))
    np.testing.assert_array_equal(out["logits"], [3, 6])
    assert float(out["all"][1][0]) == 3


def test_inputs_are_pytrees():
    graph = trace(
        lambda p, batch, scale: p * batch["a"] + batch["b"][0] * scale,
        jnp.float32(2),
        [{"a": jnp.ones(2), "b": (jnp.ones(2),)}, jnp.float32(3)],
    )
    out = run(graph, jnp.float32(2), {"a": jnp.ones(2), "b": (jnp.full(2, 5.0),)}, jnp.float32(3))
    np.testing.assert_array_equal(out, [17, 17])


def test_scopes_join_through_calls():
    def apply_fn(p, x):
        with jax.named_scope("outer"):
            return jax.jit(lambda v: jax.named_scope("inner")(jnp.dot)(v, p))(x)

    graph = trace(apply_fn, jnp.ones((3, 2)), [jnp.ones((4, 3))])
    (scope,) = {eqn.scope for eqn in graph.equations if eqn.name == "dot_general"}
    assert scope.startswith("outer")
    assert scope.endswith("inner")


def test_linen_scopes_are_module_paths():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="proj")(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="block")(x)

    x = jnp.ones((1, 3))
    params = jax.eval_shape(Net().init, jax.random.key(0), x)
    graph = trace(Net().apply, params, [x])
    (scope,) = {eqn.scope for eqn in graph.equations if eqn.name == "dot_general"}
    assert scope.endswith("block/proj")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"a": {"b": 1}, "c": 2}, ["a/b", "c"]),
        (([1, 2], 3), ["0/0", "0/1", "1"]),
        (1.0, ["param"]),
        ({"mlp/linear": {"w": 1}}, ["mlp/linear/w"]),
        (networks.Mlp([networks.Layer(1, 2)]), ["layers/0/weight", "layers/0/bias"]),
        ({"value": 1}, ["value"]),
    ],
    ids=["dict", "sequence", "array", "haiku", "dataclass", "a key called value"],
)
def test_path_names(tree, expected):
    assert paths(tree) == expected


def test_path_names_of_nnx_leave_out_the_variables_value():
    from flax import nnx

    state = nnx.state(nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
    assert paths(state) == ["bias", "kernel"]


def test_path_parts_keep_a_slash_inside_a_name():
    ((path, _),) = jax.tree_util.tree_flatten_with_path({"mlp/linear": {"w": 1}})[0]
    assert path_parts(path) == ("mlp/linear", "w")


def test_sources_are_the_parameters_and_constants_behind_a_tensor():
    table = np.ones(3, np.float32)

    def apply_fn(p, x):
        return x + (p["a"] * table + p["b"])

    params = {"a": jnp.ones(3), "b": jnp.ones(3), "unused": jnp.ones(3)}
    graph = trace(apply_fn, params, [jnp.ones(3)])
    (last,) = graph.outputs
    operand = graph.producer[last].inputs[1]
    found = [graph.paths[v] for v in graph.sources(operand)]
    assert found[:2] == ["a", "b"]
    assert found[2:] in ([], ["constant_0"])  # JAX may write a small array into the equation


def test_a_wide_value_is_rounded_only_where_a_reader_needs_the_models_dtype():
    """An int8 site hands float32 to the elementwise equations of a bfloat16 model."""

    def apply_fn(p, x):
        y = x * p
        return jnp.tanh(y), y.reshape(2, 2)

    graph = trace(apply_fn, jnp.bfloat16(1), [jnp.ones(4, jnp.bfloat16)])
    first = graph.equations[0]
    exact = jnp.array([1.001, 2.002, 3.003, 4.004], jnp.float32)
    table = evaluate.float_table(graph.equations)
    table[first.index] = lambda env: {first.outputs[0]: exact}
    leaves = {graph.leaves[0]: jnp.bfloat16(1)}
    env = evaluate.evaluate(graph, leaves, [jnp.ones(4, jnp.bfloat16)], table)
    activation, reshaped = graph.outputs
    assert env.wide(activation).dtype == jnp.float32
    np.testing.assert_array_equal(env.wide(activation), jnp.tanh(exact))
    assert env.read(activation).dtype == jnp.bfloat16
    assert env.wide(reshaped).dtype == jnp.bfloat16
    np.testing.assert_array_equal(env.read(reshaped).reshape(-1), exact.astype(jnp.bfloat16))


def test_prng_keys_among_the_parameters():
    params = {"key": jax.random.key(1), "w": jnp.ones(3)}

    def apply_fn(p, x):
        return x * p["w"] + jax.random.uniform(p["key"], (3,))

    graph = trace(apply_fn, params, [jnp.ones(3)])
    np.testing.assert_array_equal(run(graph, params, jnp.ones(3)), apply_fn(params, jnp.ones(3)))


def test_a_number_that_is_cast_to_its_own_dtype_makes_no_other_weight():
    """JAX leaves such casts out where sizes are symbolic, as they are when a model is saved."""

    def weight_of(number):
        graph = trace(lambda p, x: x @ (p * number()), jnp.ones((3, 4)), (jnp.ones((2, 3)),))
        (dot,) = (eqn for eqn in graph.equations if eqn.name == "dot_general")
        return names(graph), graph.fingerprint(dot.inputs[1])

    plain, weight = weight_of(lambda: np.float32(2))
    with_cast, cast_weight = weight_of(lambda: jax.jit(jnp.float32)(2.0))
    assert "convert_element_type" in set(with_cast) - set(plain)
    assert cast_weight == weight
    assert weight_of(lambda: np.float32(3))[1] != weight
