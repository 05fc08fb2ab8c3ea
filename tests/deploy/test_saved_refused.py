"""What is not saved, and files that are not read."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.deploy.saved import FORMAT
from jaxquant.files import packing
from jaxquant.files import safetensors as container
from jaxquant.files.errors import FileError
from tests.deploy.models import quantize, small, small_file
from tests.files.test_safetensors import header_of, reseal


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
