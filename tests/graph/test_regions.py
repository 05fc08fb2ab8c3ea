"""The bodies of loops and choices as graphs whose inputs and outputs are bound to the outside."""

import jax
import jax.numpy as jnp

from jaxquant.graph.model import trace_model

X = jnp.ones((4, 3))
PARAMS = {"shared": jnp.ones((3, 3)), "layers": jnp.ones((5, 3, 3))}


def regions(apply_fn):
    model = trace_model(apply_fn, PARAMS, (X,))
    return model, model.regions


def path(region, position):
    """The parameter that feeds an input of a region."""
    atom = region.operands[position]
    return region.holder.graph.paths.get(atom)


def test_a_scan_binds_constants_carries_and_slices():
    def apply_fn(p, x):
        def step(carry, w):
            return jnp.tanh(carry @ p["shared"]) @ w, carry.sum()

        return jax.lax.scan(step, x, p["layers"])

    model, (root, body) = regions(apply_fn)
    assert root is model.root
    assert (root.inside, root.location, body.inside) == ((), (), ("scan",))
    assert body.location == (body.equation.index, 0)
    assert [path(body, k) for k in range(3)] == ["shared", None, "layers"]
    assert root.graph.inputs == (body.operands[1],)  # the carry starts with x
    assert (dict(body.carries), body.scanned, body.results) == ({1: 0}, {2}, (0, 1))
    assert [body.graph.static[var] for var in body.arguments] == [True, False, True]
    assert body.graph.leaves == (body.arguments[0], body.arguments[2])
    assert body.graph.inputs == (body.arguments[1],)
    assert [body.graph.shape(var) for var in body.arguments] == [(3, 3), (4, 3), (3, 3)]


def test_a_while_loop_binds_its_test_and_its_body():
    def apply_fn(p, x):
        def body(state):
            count, y = state
            return count + 1, jnp.tanh(y @ p["shared"])

        return jax.lax.while_loop(lambda state: state[0] < p["layers"].sum(), body, (0, x))[1]

    _, (_, test, body) = regions(apply_fn)
    assert (test.key, body.key) == ("cond_jaxpr", "body_jaxpr")
    assert test.results == (None,)
    assert not test.carries
    assert path(body, 0) == "shared"
    assert (dict(body.carries), body.results) == ({1: 0, 2: 1}, (0, 1))


def test_the_branches_of_a_choice_read_the_same_operands():
    def apply_fn(p, x):
        return jax.lax.cond(x.sum() > 0, lambda y: y @ p["shared"], lambda y: y * 2, x)

    _, (_, *branches) = regions(apply_fn)
    assert [branch.number for branch in branches] == [0, 1]
    assert branches[0].operands == branches[1].operands
    assert all(not (b.carries or b.scanned) and b.results == (0,) for b in branches)


def test_regions_nest_and_each_knows_its_holder():
    def apply_fn(p, x):
        def outer(carry, w):
            inner = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), carry, None, length=2)[0]
            return inner, None

        return jax.lax.scan(outer, x, p["layers"])[0]

    model, (root, outer, inner) = regions(apply_fn)
    assert inner.holder is outer
    assert outer.holder is root
    assert inner.inside == ("scan", "scan")
    (site,) = model.sites
    assert (site.location[:-1], site.inside) == (inner.location, inner.inside)
    assert inner.graph.paths[inner.graph.leaves[0]] == "layers"


def test_a_loop_over_parameters_alone_is_no_region():
    def apply_fn(p, x):
        return x @ jax.lax.scan(lambda c, w: (c @ w, None), p["shared"], p["layers"])[0]

    assert len(regions(apply_fn)[1]) == 1


def test_a_layer_that_shares_its_weight_with_an_embedding_is_called_after_it():
    def apply_fn(p, x):
        ids = jnp.argmax(x, axis=1)
        return p["shared"][ids] @ p["shared"].T

    found = {site.name: site.kind for site in trace_model(apply_fn, PARAMS, (X,)).sites}
    assert found == {"argmax": "argmax", "shared:1": "lookup_table", "shared": "mul"}
