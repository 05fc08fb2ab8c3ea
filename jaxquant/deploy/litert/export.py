"""Export an int8 model as LiteRT (TensorFlow Lite)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxquant.deploy.litert import elementwise, flatbuffer
from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.litert.emitter import Emitter
from jaxquant.deploy.litert.graph import Tensor
from jaxquant.deploy.litert.sites import emit_site
from jaxquant.deploy.lower.model import lower
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.files import atomic
from jaxquant.keywords import named
from jaxquant.progress import Progress

_CHANNELS_LAST = (0, 2, 3, 1)


@named
def export_litert(
    path: str | os.PathLike[str],
    qparams: Mapping[str, Any],
    qapply: Any,
    *,
    channels_last: bool = False,
    shapes: Any = None,
    constraints: Sequence[str] = (),
    progress: bool = True,
) -> None:
    """Write an int8 model as `.tflite`, which LiteRT (TensorFlow Lite) runs on phones.

    Operations take int8 and give int8 wherever `qapply` quantizes what they give: weights are int8
    with a scale for each output channel, biases int32, activations are fused.  What it computes in
    float is float in the file too.  So is a convolution or dot whose result nobody quantizes (an
    output, a residual addition), on the same integers, since LiteRT's int8 kernels give int8 alone:
    `jaxquant.quant_post(target="litert", is_full_quantize=True)` makes a model without them.

    The file has a signature, "serving_default", with the names of the model's inputs and outputs,
    and says in its metadata "jaxquant" how the sizes that vary are called.

    Args:
      path: of the file to write.
      qparams: the arrays of the int8 model.
      qapply: the function that came with them; a loaded one will do.
      channels_last: give inputs and outputs of four axes as [B, H, W, C], in which LiteRT computes,
        where the model has [B, C, H, W].
      shapes, constraints, progress: see `jaxquant.save_quantized_model`.

    Raises:
      ValueError: the model holds an operation that is not covered (the message names it and its
        site), or cannot be traced with sizes that vary.
      ImportError: tflite is not installed.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxquant
      >>> params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
      >>> qparams, qapply = jaxquant.quant_post(
      ...     params, apply_fn, [jnp.ones((2, 4))], algo="abs_max", progress=False)
      >>> folder = tempfile.TemporaryDirectory()
      >>> jaxquant.export_litert(f"{folder.name}/model.tflite", qparams, qapply)
      >>> folder.cleanup()
    """
    # Before any work: what is not installed is told at once.
    flatbuffer.import_tflite()
    with Progress("export_litert", progress) as shown:
        with shown.stage("tracing"):
            lowered = lower(qparams, qapply, shapes, constraints, elementwise.OPERATORS)
        with shown.stage("writing the graph"):
            data = _file(Emitter(lowered, Builder(), emit_site), channels_last)
        with shown.stage("saving"):
            atomic.write_file(path, [data])


def _file(emitter: Emitter, channels_last: bool) -> bytes:
    """The bytes of the file."""
    network, builder = emitter.network, emitter.builder
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    sizes: dict[str, list[Size]] = {}
    for name, var in zip(network.input_names, network.inputs, strict=True):
        shape = network.tensors[var].shape
        order = _order(len(shape), channels_last)
        value = Value("", shape, order)
        tensor = Tensor(value.physical, emitter.dtype(var))
        inputs[name] = builder.tensor(tensor, name)
        sizes[name] = list(value.physical)
        emitter.set_input(var, Value(inputs[name], shape, order))
    emitter.emit(network.nodes)
    for name, atom in zip(network.output_names, network.outputs, strict=True):
        value = emitter.value(atom)
        if isinstance(atom, int):
            value = emitter.full(value, atom)
        value = builder.ordered(value, _order(value.rank, channels_last))
        # A signature names its tensors: two outputs cannot be one, and none can be an input.
        outputs[name] = builder.apart(value, {*inputs.values(), *outputs.values()})
        sizes[name] = list(value.physical)
    # A size that varies is -1 in the file; its name and relations are in the metadata.
    metadata = {"sizes": sizes, "in_float": emitter.in_float}
    return flatbuffer.serialize(builder, inputs, outputs, metadata)


def _order(rank: int, channels_last: bool) -> tuple[int, ...]:
    return _CHANNELS_LAST if channels_last and rank == 4 else straight(rank)
