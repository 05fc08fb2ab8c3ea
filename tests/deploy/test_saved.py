"""Save and load: the same arrays, the same bits, without the model's code."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.deploy.saved import FORMAT
from jaxquant.files import packing
from jaxquant.files import safetensors as container
from tests import networks
from tests.deploy.models import SHAPE, quantize, round_trip, same_bits, small, small_file
from tests.networks import LinenNet, images, linen_variables, plain_net, plain_params


@pytest.mark.parametrize("full", [False, True])
def test_a_loaded_model_is_the_saved_one(full, tmp_path):
    qparams, qapply = small(full)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(loaded, qparams)
    assert apply.plan == qapply.plan
    assert str(apply.report()) == str(qapply.report())
    x = images(1, (3, *SHAPE[1:]))
    expected = qapply(qparams, x)
    assert same_bits(apply(loaded, x), expected)
    assert same_bits(jax.jit(apply)(loaded, x), expected)
    assert apply(loaded, x[:1]).shape == (1, 5)


def test_saving_is_deterministic_and_names_no_path_of_the_machine(tmp_path):
    small_file(tmp_path)
    jaxquant.save_quantized_model(tmp_path / "again", *small())
    raw = (tmp_path / "again").read_bytes()
    assert raw == (tmp_path / "small_0.safetensors").read_bytes()
    tensors = container.read(tmp_path / "again", FORMAT)[0]
    for part in ("graph.json", "plan.json", "report.json"):
        assert b".py" not in packing.unpack(tensors[f"jaxquant/{part}"], part, 2**28)


def test_a_loaded_model_is_what_it_was_before(tmp_path):
    """The same backends, packed weights, batch sizes, transformations and exports."""
    batch = images(0, SHAPE)
    qparams, qapply = networks.quantize(plain_params(), plain_net, batch)
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    assert type(apply) is type(qapply)
    assert apply.backend == qapply.backend
    assert repr(apply) == repr(qapply)
    assert str(apply.report()) == str(qapply.report())
    packed, known = apply.prepare(loaded), qapply.prepare(qparams)
    assert same_bits(packed, known)
    for size in (0, 1, 3):
        x = batch[:size]
        assert same_bits(apply(packed, x), qapply(known, x))
        on_xla = apply.with_backend("xla")(loaded, x)
        assert same_bits(on_xla, qapply.with_backend("xla")(qparams, x))
    assert same_bits(
        jax.vmap(apply, (None, 0))(loaded, batch[:, None]),
        jax.vmap(qapply, (None, 0))(qparams, batch[:, None]),
    )

    def gradient(function, arrays):
        def loss(x):
            return function.with_backend("xla")(arrays, x).sum()

        return jax.grad(loss)(batch)

    assert same_bits(gradient(apply, loaded), gradient(qapply, qparams))
    for name, (arrays, function) in {"a": (qparams, qapply), "b": (loaded, apply)}.items():
        jaxquant.export_stablehlo(tmp_path / name, arrays, function)
    programs = [jax.export.deserialize(bytearray((tmp_path / n).read_bytes())) for n in "ab"]
    assert same_bits(*(program.call(qparams, batch) for program in programs))


def test_a_weight_that_is_closed_over_is_saved_as_int8_alone(tmp_path):
    weight = jnp.asarray(images(0, (64, 64)))
    qparams, qapply = quantize({"b": jnp.ones(64)}, lambda p, x: x @ weight + p["b"], jnp.eye(64))
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(apply(loaded, jnp.eye(64)), qapply(qparams, jnp.eye(64)))
    names = [n for n in container.read(tmp_path / "m", FORMAT)[0] if n.startswith("constants")]
    assert not names


def test_constants_of_layers_that_int8_weights_were_made_of(tmp_path):
    """A bias of each layer that is closed over, which the sites hold: the loop does not read it."""
    bias = jnp.asarray(images(0, (3, 8)))

    def apply_fn(p, x):
        return lax.scan(lambda x, of: (jnp.tanh(x @ of[0] + of[1]), None), x, (p, bias))[0]

    qparams, qapply = quantize(jnp.asarray(images(1, (3, 8, 8))), apply_fn, x := jnp.eye(8))
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(jax.jit(apply)(loaded, x), jax.jit(qapply)(qparams, x))


def test_a_loaded_model_is_saved_again_as_it_was(tmp_path):
    path = small_file(tmp_path)
    jaxquant.save_quantized_model(tmp_path / "again", *jaxquant.load_quantized_model(path))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


_FRESH = """
import sys, numpy as np, jax, jaxquant
jax.config.update("jax_platforms", "cpu")
qparams, qapply = jaxquant.load_quantized_model(sys.argv[1])
np.save(sys.argv[3], qapply(qparams, np.load(sys.argv[2])))
assert not {"flax", "tests", "onnx"} & set(sys.modules), sys.modules
"""


@pytest.mark.optimized  # as the other process is
def test_a_fresh_process_without_flax_gives_the_same_bits(tmp_path):
    variables, x = linen_variables(plain_params()), images(2, (3, *SHAPE[1:]))
    qparams, qapply = quantize(variables, LinenNet().apply, images(0, SHAPE))
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    np.save(tmp_path / "x.npy", x)
    arguments = [str(tmp_path / name) for name in ("m", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", _FRESH, *arguments], check=True)
    assert same_bits(np.load(tmp_path / "y.npy"), qapply(qparams, x))


def test_several_inputs_in_containers_and_several_outputs(tmp_path):
    params = {"w": jnp.eye(4), "v": jnp.ones((4, 2))}

    def apply_fn(p, pair, options):
        y = pair[0] @ p["w"] + pair[1]
        return {"y": y, "z": (y @ p["v"], options["mask"] > 0)}

    inputs = ((images(0, (3, 4)), images(1, (3, 4))), {"mask": jnp.arange(3)})
    qparams, qapply = quantize(params, apply_fn, *inputs)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    inputs = jax.tree.map(lambda x: x[:2], inputs)
    assert same_bits(apply(loaded, *inputs), qapply(qparams, *inputs))
    assert apply.input_shapes == ("float32[batch, 4]", "float32[batch, 4]", "int32[batch]")


def test_bfloat16_and_other_leaves_come_back(tmp_path):
    params = {
        "w": jnp.eye(4, dtype=jnp.bfloat16),
        "b": jnp.ones(4, jnp.bfloat16),
        "steps": jnp.arange(2),
        "a/b": {"~": jnp.float16(3)},
    }

    def apply_fn(p, x):
        odd = p["a/b"]["~"].astype(jnp.bfloat16)
        y = jax.nn.softmax(x @ p["w"]) * jnp.max(x, -1, keepdims=True)
        return (y + p["b"]) * odd + p["steps"].sum().astype(jnp.bfloat16)

    x = images(0, (3, 4)).astype(jnp.bfloat16)
    qparams, qapply = quantize(params, apply_fn, x)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(loaded, qparams)
    assert same_bits(apply(loaded, x), qapply(qparams, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_scales_of_groups_are_loaded_as_they_are(dtype, tmp_path):
    """bfloat16, as they are made; or the same numbers as float32, with the same bits."""
    params, x = {"w": images(0, (96, 8)), "table": images(1, (7, 96))}, np.array([[4, 0], [1, 2]])
    qparams, qapply = jaxquant.quant_weights(
        params, lambda p, i: p["table"][i] @ p["w"], x, weight_bits=4, group_size=32, progress=False
    )
    expected = qapply(qparams, x)
    for name in params:
        scale = qparams["params"][name]["scale"]
        assert scale.dtype == jnp.bfloat16
        qparams["params"][name]["scale"] = scale.astype(dtype)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(loaded, qparams)
    assert same_bits(apply(loaded, x), expected)


def test_where_arrays_lie_on_devices_is_not_saved(tmp_path):
    """A model with sharding constraints is saved and exported as the same without them."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    params = {"a": images(0, (6, 8)), "b": images(1, (8, 5))}

    def apply_fn(p, x):
        hidden = jax.lax.with_sharding_constraint(jax.nn.relu(x @ p["a"]), columns)
        return (
            jax.lax.fori_loop(
                0, 2, lambda _, y: jax.lax.with_sharding_constraint(jnp.tanh(y), columns), hidden
            )
            @ p["b"]
        )

    x = images(2, (4, 6))
    qparams, qapply = quantize(params, apply_fn, x)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(jax.jit(apply)(loaded, x), jax.jit(qapply)(qparams, x))


def test_complex_parameters_are_saved(tmp_path):
    """As of a Fourier layer."""
    params = {"a": images(0, (6, 8)), "f": np.array([1 + 2j, 3, -1j], np.complex64)}

    def apply_fn(p, x):
        return jnp.fft.irfft(jnp.fft.rfft(x @ p["a"])[:, :3] * p["f"], 8)

    x = images(2, (4, 6))
    qparams, qapply = quantize(params, apply_fn, x)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(jax.jit(apply)(loaded, x), jax.jit(qapply)(qparams, x))
