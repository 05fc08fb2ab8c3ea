"""Save and load: the same arrays, the same bits, without the model's code."""

import hashlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.deploy.saved import FORMAT
from jaxquant.files import packing
from jaxquant.files import safetensors as container
from jaxquant.files.errors import FileError
from tests import networks
from tests.deploy.models import SHAPE, same_bits, small, small_file
from tests.files.test_safetensors import header_of, reseal
from tests.networks import LinenNet, images, linen_variables, plain_net, plain_params


def quantize(*args, **config):
    """Run by XLA, as a saved program is."""
    qparams, qapply = networks.quantize(*args, **config)
    return qparams, qapply.with_backend("xla")


def round_trip(path, qparams, qapply, **options):
    """The loaded model, run by XLA: to the bit as the saved one is, whatever this machine has."""
    jaxquant.save_quantized_model(path, qparams, qapply, **options)
    qparams, qapply = jaxquant.load_quantized_model(path)
    return qparams, qapply.with_backend("xla")


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


def test_a_loaded_model_is_saved_for_other_shapes(tmp_path):
    qparams, qapply = small()
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    fixed, apply = round_trip(tmp_path / "n", loaded, apply, shapes="1, 8, 8, 3")
    x = images(1, SHAPE)
    assert same_bits(apply(fixed, x[:1]), qapply(qparams, x[:1]))
    with pytest.raises(ValueError, match=r"takes float32\[1, 8, 8, 3\], got float32\[4, 8, 8, 3\]"):
        apply(fixed, x)


def test_a_weight_that_is_closed_over_is_saved_as_int8_alone(tmp_path):
    weight = jnp.asarray(images(0, (64, 64)))
    qparams, qapply = quantize({"b": jnp.ones(64)}, lambda p, x: x @ weight + p["b"], jnp.eye(64))
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    assert same_bits(apply(loaded, jnp.eye(64)), qapply(qparams, jnp.eye(64)))
    names = [n for n in container.read(tmp_path / "m", FORMAT)[0] if n.startswith("constants")]
    assert not names


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


def test_shapes_say_what_may_vary(tmp_path):
    class Convolutional(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (1, 1), strides=(2, 2))(x).max((1, 2))

    model = Convolutional()
    variables = model.init(jax.random.key(0), images(0, SHAPE))
    qparams, qapply = quantize(variables, model.apply, images(0, SHAPE))
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, shapes="b, 2*h, 2*w, 3")
    x = images(1, (2, 12, 6, 3))
    assert same_bits(apply(loaded, x), qapply(qparams, x))
    loaded, apply = round_trip(tmp_path / "n", qparams, qapply, shapes="4, 8, 8, 3")
    with pytest.raises(ValueError, match="hape"):
        apply(loaded, x)
    with pytest.raises(ValueError, match=r"shapes='b, 8'.*does not fit"):
        jaxquant.save_quantized_model(tmp_path / "o", qparams, qapply, shapes="b, 8")


def test_an_input_without_axes_leaves_the_batch_clear(tmp_path):
    params = {"w": jnp.eye(4)}
    qparams, qapply = quantize(
        params, lambda p, x, t: x @ p["w"] * t, jnp.ones((3, 4)), jnp.ones(())
    )
    for options in ({}, {"shapes": ("b, 4", "")}):
        loaded, apply = round_trip(tmp_path / "m", qparams, qapply, **options)
        assert apply(loaded, jnp.ones((5, 4)), jnp.float32(2)).tolist() == [[2.0] * 4] * 5


def test_a_batch_that_is_not_clear_is_an_error(tmp_path):
    params = {"w": jnp.eye(4)}
    qparams, qapply = quantize(
        params, lambda p, x, t: x @ p["w"] * t, jnp.ones((3, 4)), jnp.ones((4,))
    )
    with pytest.raises(ValueError, match=r"which axis is the batch is not clear. Give shapes="):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, shapes=("b, 4", "4"))
    assert apply(loaded, jnp.ones((5, 4)), jnp.full(4, 2.0)).tolist() == [[2.0] * 4] * 5


def _heads(p, x):
    """A factor behind a reshape that splits the channels: multi-head attention's queries."""
    return (x @ p["w"]).reshape(x.shape[0], 5, 2, 4) * 0.5


def _haiku_linear(p, x):
    y = x @ p["w"]
    return y + jnp.broadcast_to(p["b"], y.shape)


def _merged(p, x):
    y = x.reshape(x.shape[0] * 2, 4) @ p["u"] + p["c"]
    return y.reshape(x.shape[0], 2, 2, 3) @ p["v"]


def _depthwise_and_pool(p, x):
    y = x.reshape(x.shape[0], 2, 2, 2) @ p["e"]
    y = jax.lax.conv_general_dilated(
        y, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    return jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")


@pytest.mark.parametrize(
    "mode",
    ["full", "weights", *(pytest.param(m, marks=pytest.mark.slow) for m in ("static", "dynamic"))],
)
def test_sizes_with_names_are_compared_by_what_is_known_of_them(mode, tmp_path):
    """Reshapes that split channels, biases spread to a shape: what JAX's libraries write."""
    params = {"w": images(1, (8, 40)), "b": images(2, (40,)), "u": images(3, (4, 6))}
    params |= {"c": images(4, (6,)), "v": images(5, (3, 5)), "e": images(6, (2, 4))}
    params["k"] = images(7, (3, 3, 1, 4))

    def apply_fn(p, x):
        return _heads(p, x), _haiku_linear(p, x), _merged(p, x), _depthwise_and_pool(p, x)

    qparams, qapply = by_mode(mode, params, apply_fn, images(0, (4, 8)))
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply)
    for batch in (1, 3):
        x = images(batch, (batch, 8))
        assert same_bits(apply(loaded, x), qapply.with_backend("xla")(qparams, x))


def by_mode(mode, params, apply_fn, x):
    if mode == "dynamic":
        return jaxquant.quant_dynamic(params, apply_fn, x)
    if mode == "weights":
        return jaxquant.quant_weights(params, apply_fn, x)
    return jaxquant.quant_post(
        params, apply_fn, [x], algo="abs_max", is_full_quantize=mode == "full", progress=False
    )


def test_constraints_say_what_is_known_of_the_sizes(tmp_path):
    """Beyond a table of positions the model does without: that it is long enough has to be said."""
    params = {"positions": images(1, (16, 4)), "w": images(2, (4, 3))}

    def apply_fn(p, x):
        length = x.shape[1]
        return (x + p["positions"][:length] if length <= 16 else x) @ p["w"]

    qparams, qapply = quantize(params, apply_fn, images(0, (2, 5, 4)))
    known = {"shapes": "b, s, 4", "constraints": ("s <= 16",)}
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, **known)
    for length in (3, 16):
        x = images(3, (3, length, 4))
        assert same_bits(apply(loaded, x), qapply(qparams, x))
    with pytest.raises(ValueError, match="shapes"):
        apply(loaded, images(3, (3, 17, 4)))
    with pytest.raises(ValueError, match=re.escape('constraints=("s <= 16",)')):
        jaxquant.save_quantized_model(tmp_path / "n", qparams, qapply, shapes="b, s, 4")
    with pytest.raises(ValueError, match=r"constraints=\('s < 9',\) does not fit"):
        jaxquant.save_quantized_model(
            tmp_path / "n", qparams, qapply, shapes="b, s, 4", constraints=("s < 9",)
        )
    with pytest.raises(ValueError, match=re.escape("give a tuple: ('s <= 16',)")):
        jaxquant.save_quantized_model(tmp_path / "n", qparams, qapply, constraints="s <= 16")


def test_a_model_that_depends_on_the_batch_size_is_an_error(tmp_path):
    def apply_fn(p, x):
        return x @ p["w"] if x.shape[0] > 2 else x @ p["w"] + 1

    qparams, qapply = quantize({"w": jnp.eye(4)}, apply_fn, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"(?s)something else for some sizes.*batch, 4.*shapes="):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = round_trip(tmp_path / "m", qparams, qapply, shapes="3, 4")
    assert apply(loaded, jnp.ones((3, 4))).shape == (3, 4)


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


def test_what_does_not_belong_together_is_refused(tmp_path):
    qparams, qapply = small()
    with pytest.raises(TypeError, match="got function"):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, lambda q, x: x)
    with pytest.raises(ValueError, match="takes the qparams that quant_post returned"):
        jaxquant.save_quantized_model(tmp_path / "m", qparams["params"], qapply)
    other = {**qparams, "tensors": {}}
    with pytest.raises(ValueError, match="another model or plan"):
        jaxquant.save_quantized_model(tmp_path / "m", other, qapply)
    assert not (tmp_path / "m").exists()


def test_an_array_that_cannot_be_saved_is_named(tmp_path):
    qparams, qapply = small()
    qparams = {**qparams, "params": {**qparams["params"], "key": jax.random.key(0)}}
    with pytest.raises(ValueError, match=r"qparams\['params/key'\] is key<fry>"):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    qparams["params"] = {**qparams["params"], "key": {"..": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"under the key '\.\.' cannot be saved"):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)


def edited(path, part, edit):
    """The file with one packed part changed, and right checksums."""
    raw = path.read_bytes()
    header = header_of(raw)
    length = len(raw) - header[container.SEAL]["data_offsets"][1]
    old, start = header[f"jaxquant/{part}"]["data_offsets"], None
    data = raw[length:-32]
    piece = packing.pack(
        edit(packing.unpack(np.frombuffer(data[slice(*old)], np.uint8), part, 2**28))
    )
    grown = piece.size - (old[1] - old[0])
    for name, entry in header.items():
        if name == f"jaxquant/{part}":
            entry["shape"], entry["data_offsets"] = [piece.size], [old[0], old[1] + grown]
            start = True
        elif start:
            entry["data_offsets"] = [x + grown for x in entry["data_offsets"]]
    path.write_bytes(reseal(raw, header, data[: old[0]] + piece.tobytes() + data[old[1] :]))
    return path


@pytest.mark.parametrize(
    ("part", "edit", "message"),
    [
        ("plan.json", lambda b: b.replace(b'"version":', b'"version":9'), "plan version"),
        (
            "plan.json",
            lambda b: b.replace(b'"scale"', b'"scala"', 1),
            r"plan is damaged: plan\.ten",
        ),
        ("plan.json", lambda b: b.replace(b"stem/input", b"stem/other"), "do not fit the plan"),
        ("plan.json", lambda b: b.replace(b'"scale":0', b'"scale":-1', 1), "grid of tensor 'stem"),
        ("report.json", lambda b: b.replace(b'"kind"', b'"king"'), "report is damaged"),
        ("graph.json", lambda b: b.replace(b'"op":"max"', b'"op":3', 1), r"op is 3, not str"),
        ("graph.json", lambda b: b.replace(b'"op":"max"', b'"op":"pure_callback"'), "may ask for"),
        ("graph.json", lambda b: b.replace(b'"op":"max"', b'"op":"cos"'), "equation .*'cos'"),
        ("graph.json", lambda b: b.replace(b'"batch"', b'"batch("'), "graph is refused"),
        ("graph.json", lambda b: b[:-1], "graph is damaged"),
        ("graph.json", lambda b: b"[" * 10**6, "nested 1000000 deep"),
        ("graph.json", lambda b: b" " * 2**26, "bytes when unpacked"),
    ],
)
def test_edited_parts_are_refused_and_named(part, edit, message, tmp_path):
    path = edited(small_file.__wrapped__(tmp_path), part, edit)
    with pytest.raises(FileError, match=message):
        jaxquant.load_quantized_model(path)


def test_the_graph_of_another_model_is_refused(tmp_path):
    qparams, qapply = quantize({"w": jnp.eye(4)}, lambda p, x: x @ p["w"], jnp.ones((3, 4)))
    jaxquant.save_quantized_model(tmp_path / "other", qparams, qapply)
    graph = container.read(tmp_path / "other", FORMAT)[0]["jaxquant/graph.json"]
    graph = packing.unpack(graph, "graph", 2**28)
    path = edited(small_file.__wrapped__(tmp_path), "graph.json", lambda _: graph)
    with pytest.raises(FileError, match="the graph is refused: these inputs give another graph"):
        jaxquant.load_quantized_model(path)


@pytest.mark.parametrize(
    "name", ["params/stem/kernel/int8", "params/stem/kernel/scale", "sites/stem/multiplier"]
)
def test_arrays_of_another_form_are_refused(name, tmp_path):
    """The native kernels read as far as the graph says that an array reaches."""
    tensors, metadata, _ = container.read(small_file(tmp_path), FORMAT)
    wider = np.concatenate([tensors[name]] * 2) if tensors[name].ndim else tensors[name][None]
    for changed in (wider, tensors[name].astype(np.int16)):
        chunks = container.chunks({**tensors, name: changed}, {"jax": metadata["jax"]}, FORMAT)
        (tmp_path / "m").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
        with pytest.raises(FileError, match="graph is refused"):
            jaxquant.load_quantized_model(tmp_path / "m")


def test_what_runs_other_code_is_not_saved(tmp_path):
    def apply_fn(p, x):
        y = x @ p["w"]
        return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(y.shape, y.dtype), y)

    qparams, qapply = jaxquant.quant_dynamic({"w": jnp.eye(4)}, apply_fn, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"it calls 'pure_callback'.*export_stablehlo"):
        jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)


def test_a_file_of_another_kind_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(FileError, match=r"x\.npy: not a safetensors file"):
        jaxquant.load_quantized_model(tmp_path / "x.npy")
    with pytest.raises(FileNotFoundError):
        jaxquant.load_quantized_model(tmp_path / "nothing")


def test_the_digest_is_that_of_the_file(tmp_path):
    path = small_file(tmp_path)
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    jaxquant.load_quantized_model(path, sha256=known)
    with pytest.raises(FileError, match="its SHA-256 is"):
        jaxquant.load_quantized_model(path, sha256="0" * 64)
