"""What stays float because the user says so: scopes, patterns, the first and last layer."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests import networks
from tests.plan import full

X = jnp.ones((2, 6, 6, 3))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(4, name="fc")(x))


class SetUp(nn.Module):
    def setup(self):
        self.inner = Block()

    def __call__(self, x):
        return self.inner(x)


class Net(nn.Module):
    """Blocks in every way that linen has of nesting them."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        x = SetUp(name="one")(x)
        x = nn.remat(Block)(name="two")(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(5, name="head")(jax.nn.softmax(x))


def linen(module, x=X):
    params = networks.random_params(lambda: module.init(jax.random.key(0), x))
    return module.apply, params


def status(plan):
    return {site.name: site.status for site in plan.sites}


def floats(plan):
    return {site.name for site in plan.sites if site.status == "float"}


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("stem", {"stem"}),
        ("*/fc", {"one/inner/fc", "two/fc"}),
        ("params/one/inner/fc/kernel", {"one/inner/fc"}),
        ("params/head/*", {"head"}),
        ("*/two/fc", {"two/fc"}),
        ("[st]*", {"stem", "two/fc"}),
        ("kind:conv2d", {"stem"}),
        ("kind:mul", {"one/inner/fc", "two/fc", "head"}),
        ("kind:pool2d", {"pool2d"}),
        ("kind:softmax", {"softmax"}),
        ("module:Block", {"one/inner/fc", "two/fc"}),
        ("module:B*k", {"one/inner/fc", "two/fc"}),
        ("module:SetUp", {"one/inner/fc"}),
        ("module:Conv", {"stem"}),
        ("module:Dense", {"one/inner/fc", "two/fc", "head"}),
    ],
)
def test_patterns_on_linen(pattern, skipped):
    plan = full.plan_of(*linen(Net()), X, skip=(pattern,))
    assert {re.sub(r"^Net/", "", name) for name in floats(plan)} == skipped
    assert {s.reason for s in plan.sites if s.status == "float"} == {f"skip={pattern!r}"}


def test_a_scanned_module_carries_its_class():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4, name="fc")(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return nn.Dense(5, name="head")(scanned(name="layers")(x, None)[0])

    apply_fn, params = linen(Stack(), jnp.ones((2, 4)))
    plan = full.plan_of(apply_fn, params, jnp.ones((2, 4)), skip=("module:*Body",))
    reasons = {site.name: site.reason for site in plan.sites}
    assert reasons["head"] == ""
    assert reasons["layers/fc"] == "skip='module:*Body'"


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.fc(x))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def by_closure(graphdef):
    return lambda state, x: nnx.merge(graphdef, state)(x)


def by_partial(graphdef):
    return functools.partial(lambda g, state, x: nnx.merge(g, state)(x), graphdef)


def by_keyword(graphdef):
    return functools.partial(lambda state, x, *, g: nnx.merge(g, state)(x), g=graphdef)


def by_default(graphdef):
    return lambda state, x, g=graphdef: nnx.merge(g, state)(x)


@pytest.fixture(scope="module")
def nnx_model():
    return nnx.split(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))))


@pytest.mark.parametrize("hold", [by_closure, by_partial, by_keyword, by_default])
def test_classes_of_nnx_modules(nnx_model, hold):
    graphdef, state = nnx_model
    plan = full.plan_of(hold(graphdef), state, X, skip=("module:NnxBlock",))
    assert floats(plan) == {"blocks/0/fc", "blocks/1/fc"}
    plan = full.plan_of(hold(graphdef), state, X, skip=("module:Conv", "blocks/0/*"))
    assert floats(plan) == {"stem", "blocks/0/fc"}


def test_a_pattern_that_matches_nothing_names_the_nearest(nnx_model):
    graphdef, state = nnx_model

    def refuse(pattern, match):
        with pytest.raises(ValueError, match=match):
            full.plan_of(by_closure(graphdef), state, X, skip=("stem", pattern))

    refuse("sten", r"'sten' matches no site; nearest: stem")
    refuse("blocks/0/fd", r"matches no site; nearest: blocks/0/fc, blocks/1/fc")
    refuse("kind:conv3d", r"'kind:conv3d' matches no site; nearest: kind:conv2d")
    refuse("module:NnxBlok", r"'module:NnxBlok' matches no site; nearest: module:NnxBlock")


def skipping_linen():
    class Skipping(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), name="stem")(x)
            with jax.named_scope("skip_quant"):
                y = nn.Dense(4, name="fc")(x)
                y = jax.nn.softmax(nn.max_pool(y, (2, 2), (2, 2)))
            return nn.Dense(5, name="head")(y)

    return linen(Skipping())


def skipping_nnx():
    class Skipping(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.head = nnx.Linear(4, 5, rngs=rngs)

        def __call__(self, x):
            x = self.stem(x)
            with jax.named_scope("skip_quant"):
                x = jax.nn.softmax(nnx.max_pool(self.fc(x), (2, 2), (2, 2)))
            return self.head(x)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: Skipping(nnx.Rngs(0))))
    return by_closure(graphdef), state


def skipping_plain():
    @jax.jit
    def skipped(p, x):
        y = nn.max_pool(x @ p["fc"]["kernel"], (2, 2), (2, 2))
        return jax.nn.softmax(y)

    def apply_fn(p, x):
        x = networks.conv(x, p["stem"])
        with jax.named_scope("skip_quant"):
            y = skipped(p, x)
        return y @ p["head"]["kernel"]

    shapes = {"stem": (3, 3, 3, 4), "fc": (4, 4), "head": (4, 5)}
    return apply_fn, {name: {"kernel": networks.images(0, s)} for name, s in shapes.items()}


@pytest.mark.parametrize("make", [skipping_linen, skipping_nnx, skipping_plain])
def test_the_skip_scope(make):
    plan = full.plan_of(*make(), X)
    inside = [site for site in plan.sites if site.status == "float"]
    assert {site.kind for site in inside} == {"mul", "pool2d", "softmax"}
    assert {site.reason for site in inside} == {"inside jax.named_scope('skip_quant')"}
    assert {site.name for site in plan.sites if site.status == "int8"} == {"stem", "head"}
    assert len(plan.tensors) == 2


def test_another_scope_with_that_word_in_its_name_skips_nothing():
    def apply_fn(p, x):
        with jax.named_scope("skip_quantity"):
            return x @ p["w"]

    assert not floats(full.plan_of(apply_fn, {"w": jnp.ones((3, 3))}, X))


def test_the_first_and_the_last_layer():
    apply_fn, params = linen(Net())
    plan = full.plan_of(apply_fn, params, X, skip_first_last=True)
    assert floats(plan) == {"stem", "head"}
    reasons = {site.reason for site in plan.sites if site.status == "float"}
    assert reasons == {"first or last layer (skip_first_last)"}


def lowered(apply_fn, params, *inputs, **config):
    """The StableHLO of the int8 model, and the plan."""
    model = full.quantize(apply_fn, params, *inputs, **config)
    qapply = model.qapply.with_backend("xla")
    return jax.jit(qapply).lower(model.qparams, *inputs).as_text(), model.plan


PLAIN = {name: {"w": networks.exact_weight((6, 6))} for name in "ab"}


def test_what_is_skipped_has_no_int8_in_the_program():
    """All but a dot is skipped, so its operands and its weight alone are int8."""

    def apply_fn(p, x):
        y = jnp.concatenate([x, x * 2.0], 0)
        y = jax.nn.softmax(y) @ p["a"]["w"]
        return jnp.where(y[:2] > y[2:4], y[:2] + y[4:6] * y[:2], y[2:4]) @ p["b"]["w"]

    x = networks.whole_numbers((4, 6))
    kinds = ("concat", "softmax", "slice", "elementwise_*", "greater_than")
    text, plan = lowered(apply_fn, PLAIN, x, skip=("a", *(f"kind:{kind}" for kind in kinds)))
    assert {site.name for site in plan.sites if site.status == "int8"} == {"b"}
    assert [tensor.name for tensor in plan.tensors] == ["b/input"]
    assert text.count("-> tensor<2x6xi8>") == 1
    assert set(re.findall(r"tensor<([0-9x]+)xi8>", text)) == {"2x6", "6x6"}


@pytest.mark.parametrize("skip", [True, False])
def test_elementwise_operations_in_the_skip_scope_read_floats(skip):
    """The tensor that they read is int8 for the dot and the subtraction beside them."""

    def apply_fn(p, x):
        with jax.named_scope("skip_quant" if skip else "other"):
            y = jax.nn.relu(x * 3.0)
        return y, x @ p["a"]["w"], x[:2] - x[2:]

    x = networks.whole_numbers((4, 6)) + 0.375
    model = full.quantize(apply_fn, PLAIN, x)
    assert (model(x)[0] == apply_fn(PLAIN, x)[0]).all() == skip


def test_every_part_skipped_is_an_error():
    with pytest.raises(ValueError, match="no site is left to quantize"):
        full.plan_of(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 3))}, X, skip=("*",))
