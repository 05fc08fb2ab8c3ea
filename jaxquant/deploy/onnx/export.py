"""Export an int8 model as ONNX."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant._version import __version__
from jaxquant.deploy.lower.model import Lowered, lower
from jaxquant.deploy.lower.values import Value, straight
from jaxquant.deploy.network import Int8Node, Node
from jaxquant.deploy.onnx import control_flow, elementwise, operators, reduction, shaping, stored
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.emitter import WITH_DTYPES, Emitter
from jaxquant.deploy.onnx.quantization import Quantizer
from jaxquant.deploy.onnx.sites import emit_site
from jaxquant.deploy.onnx.target import Target
from jaxquant.files import atomic
from jaxquant.graph.contraction import DENSE
from jaxquant.keywords import named
from jaxquant.progress import Progress

OPSETS = range(13, 24)
_USUAL = 17  # which runtimes of 2022 load
_CHANNELS_FIRST = (0, 3, 1, 2)
_MAX_BYTES = 2**31 - 1  # of a protobuf message


def covered() -> frozenset[str]:
    """The primitives that an export may hold, by name; of some, not every form."""
    names = {"optimization_barrier", *DENSE}
    names |= {*WITH_DTYPES, *control_flow.TABLE, *reduction.OPERATIONS, *shaping.TABLE}
    return frozenset(names | elementwise.OPERATIONS)


@named
def export_onnx(
    path: str | os.PathLike[str],
    qparams: Mapping[str, Any],
    qapply: Any,
    *,
    opset: int | None = None,
    channels_first: bool = False,
    runtime: str = "any",
    processors: str = "any",
    shapes: Any = None,
    constraints: Sequence[str] = (),
    progress: bool = True,
) -> None:
    """Write an int8 model as ONNX, in the QDQ form that runtimes turn into int8 kernels.

    Activations are integers between QuantizeLinear and DequantizeLinear, weights are 8-bit
    initialisers with a scale for every output channel, biases int32; BatchNorms and multipliers are
    folded into the scales.  A tensor with a scale for every channel is divided by them before it is
    quantized.  The batch (and what else varies) is a named size.

    Args:
      path: of the file to write.
      qparams: the arrays of the int8 model.
      qapply: the function that came with them; a loaded one will do.
      opset: the version of the ONNX operators, 13 to 23.  None is the oldest one, 17 or later, that
        has the model's own operators: 20 for `Gelu`.  An older one has theirs composed of others,
        before 17 `LayerNormalization` too.
      channels_first: give inputs and outputs of four axes as [B, C, H, W] where the model has
        [B, H, W, C], as most runtimes want them.
      runtime: "any" is QDQ throughout, with int8 activations where the zero point is 0 and uint8
        ones (the same integers plus 128) elsewhere.  "onnxruntime" is what ONNX Runtime runs in
        int8 on CPU: uint8 activations alone, and 1x1 convolutions whose result stays float (before
        a residual addition, say) as MatMulInteger.  Of the others it runs those in float.
      processors: which ones will run the file.  x86 without VNNI (AVX2; AVX-512 before 2019) does
        not sum products of uint8 and int8 exactly, in any runtime: sums of two saturate at 16 bits,
        and a network's results are wrong.  "any" is exact there too: weights are uint8 with zero
        point 128, but for depthwise ones, whose products are not summed so, and for those of
        transposed convolutions, which are float32.  "vnni" (x86 with AVX512-VNNI, AVX-VNNI or AMX),
        "arm" and "gpu" are for those alone: all weights are int8, which is faster on them, and what
        TensorRT and the drivers of phones ask for.
      shapes, constraints, progress: see `jaxquant.save_quantized_model`.

    Raises:
      ValueError: the model holds an operation that is not covered (the message names it and its
        site), or cannot be traced with sizes that vary.
      ImportError: onnx is not installed.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxquant
      >>> params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
      >>> qparams, qapply = jaxquant.quant_post(
      ...     params, apply_fn, [jnp.ones((2, 4))], algo="abs_max", progress=False)
      >>> folder = tempfile.TemporaryDirectory()
      >>> jaxquant.export_onnx(f"{folder.name}/model.onnx", qparams, qapply)
      >>> folder.cleanup()
    """
    if opset is not None and opset not in OPSETS:
        raise ValueError(f"opset={opset!r}: {OPSETS[0]} to {OPSETS[-1]} are covered")
    # Whatever is asked for is checked before the model is traced.
    target = Target(runtime, processors)
    # Operators of the model's own kinds where the opset may have them; the rest is composed.
    newest = OPSETS[-1] if opset is None else opset
    kinds = [kind for kind, since in operators.SINCE.items() if since <= newest]
    with Progress("export_onnx", progress) as shown:
        with shown.stage("tracing"):
            lowered = lower(qparams, qapply, shapes, constraints, kinds)
        with shown.stage("writing the graph"):
            builder = Builder(_opset(lowered) if opset is None else opset)
            quantizer = Quantizer(builder, lowered.scales, target, _first_factors(lowered))
            model = _model(
                Emitter(lowered, quantizer, emit_site, control_flow.TABLE), channels_first
            )

        # The same model gives the same bytes: protobuf's maps have no order of their own.
        with shown.stage("saving"):
            atomic.write_file(path, [model.SerializeToString(deterministic=True)])


def _opset(model: Lowered) -> int:
    """The oldest opset that has the operators of a model."""
    nodes = [node for node in model.network.walk() if isinstance(node, Node)]
    needed = [operators.SINCE.get(node.op, _USUAL) for node in nodes]
    needed += [stored.since(**node.params) for node in nodes if node.op == "dequantize"]
    return max([_USUAL, *needed])


def _first_factors(model: Lowered) -> frozenset[str]:
    """The entries of the tensors that come first in a product of two activations."""
    return frozenset(
        model.entries(node)[0]
        for node in model.network.walk()
        if isinstance(node, Int8Node)
        and not node.dynamic
        and node.node.contraction is not None
        and not (node.weight or node.computed_weight is not None)
    )


def _model(emitter: Emitter, channels_first: bool) -> Any:
    """The ONNX model, checked."""
    inputs = _add_inputs(emitter, channels_first)
    emitter.emit(emitter.network.nodes)
    outputs = _add_outputs(emitter, channels_first)
    builder = emitter.builder
    onnx = builder.onnx

    # Constants that were folded into others on the way are not written.
    initializers = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        for name, array in builder.arrays.items()
        if name in builder.read
    ]
    if sum(array.nbytes for array in builder.arrays.values()) > _MAX_BYTES:
        raise ValueError("the model is larger than the 2 GiB of one ONNX file")
    graph = onnx.helper.make_graph(builder.nodes, "jaxquant", inputs, outputs, initializers)
    opset = onnx.helper.make_opsetid("", builder.opset)
    others = [onnx.helper.make_opsetid(domain, 1) for domain in sorted(builder.domains)]
    model = onnx.helper.make_model(
        graph,
        opset_imports=[opset, *others],
        ir_version=onnx.helper.find_min_ir_version_for([opset]),
        producer_name="jaxquant",
        producer_version=__version__,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _add_inputs(emitter: Emitter, channels_first: bool) -> list[Any]:
    """Give the network its inputs; what the file says of them."""
    network, builder = emitter.network, emitter.builder
    infos = []
    for name, var in zip(network.input_names, network.inputs, strict=True):
        tensor = network.tensors[var]
        order = _order(len(tensor.shape), channels_first)
        value = Value(builder.unique(name), tensor.shape, order)
        builder.name_sizes(value.name, value.physical)
        infos.append(_info(builder.onnx, value, tensor.dtype))
        emitter.set_input(var, value)
    return infos


def _add_outputs(emitter: Emitter, channels_first: bool) -> list[Any]:
    """Add what gives the outputs; what the file says of them."""
    network, builder = emitter.network, emitter.builder
    infos = []
    for name, atom in zip(network.output_names, network.outputs, strict=True):
        value, dtype = emitter.value(atom), emitter.dtype(atom)
        if isinstance(atom, int):
            value = emitter.full(value, atom)
        value = builder.ordered(value, _order(value.rank, channels_first))
        # By an Identity, so that an output has the name that was asked for, and two may be one
        # tensor.
        output = builder.unique(name)
        # A name counts as read here, or its array would be left out of the file.
        builder.read.add(value.name)
        builder.nodes.append(
            builder.onnx.helper.make_node(
                "Identity", [value.name], [output], name=f"{name}/Identity"
            )
        )
        infos.append(_info(builder.onnx, Value(output, value.shape, value.order), dtype))
    return infos


def _order(rank: int, channels_first: bool) -> tuple[int, ...]:
    return _CHANNELS_FIRST if channels_first and rank == 4 else straight(rank)


def _info(onnx: Any, value: Value, dtype: str) -> Any:
    code = elementwise.ONNX_TYPES[elementwise.onnx_dtype(dtype)]
    return onnx.helper.make_tensor_value_info(value.name, code, list(value.physical))
