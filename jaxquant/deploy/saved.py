"""Save an int8 model in one file, and load it without the model's code."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant._version import __version__
from jaxquant.code_tables import INT, VALUES
from jaxquant.deploy import program, tree
from jaxquant.deploy.check import check_program
from jaxquant.deploy.schema import decode
from jaxquant.deploy.stored.form import StoredForm
from jaxquant.deploy.stored.read import StoredGraph
from jaxquant.deploy.stored.write import CONSTANTS, store
from jaxquant.files import atomic, packing, strict_json
from jaxquant.files import safetensors as container
from jaxquant.files.errors import FileError
from jaxquant.files.strict_json import dump_json, parse_json
from jaxquant.graph import kinds
from jaxquant.keywords import named
from jaxquant.plan import layout
from jaxquant.plan.bind import bind
from jaxquant.plan.liveness import live_equations
from jaxquant.plan.modes import MODES, WEIGHT_ONLY
from jaxquant.plan.plan import VERSION, Plan
from jaxquant.progress import Progress
from jaxquant.report.report import Report
from jaxquant.run.program import Program
from jaxquant.run.qapply import QuantizedApply
from jaxquant.run.qparams import check_qparams

FORMAT = container.Format("jaxquant", "2", "a model that jaxquant.save_quantized_model wrote")
_PARTS = "jaxquant"  # the packed parts are tensors under this name, the constants under their own
_NAMES = ("plan.json", "report.json", "graph.json")


@named
def save_quantized_model(
    path: str | os.PathLike[str],
    qparams: Mapping[str, Any],
    qapply: Any,
    *,
    shapes: Any = None,
    constraints: Sequence[str] = (),
    progress: bool = True,
) -> None:
    """Save an int8 model in one file, from which `load_quantized_model` makes it again.

    The file is a safetensors file: the arrays, and the plan, the report and the graph of the model
    as packed JSON.  It is written beside `path` and renamed, so that a crash leaves the old file
    whole.

    Args:
      path: of the file to write, whatever its name; the folder must be there.
      qparams: the arrays that `quant_post`, `quantize` or `load_quantized_model` returned.
      qapply: the function that came with them.
      shapes: which sizes of the inputs may vary, as `jax.export.symbolic_args_specs` takes it:
        "b, h, w, 3" for one input, a tuple of such strings for several.  None: the first axis of
        every input array that has one is the batch, all other sizes are those of the calibration
        data; of a loaded model, what the file says.
      constraints: what holds for every size with a name, where the model computes something else
        for others: ("s >= 2",).  A loaded `qapply` refuses other sizes.  Written with <=, >= or ==,
        as `jax.export.symbolic_args_specs` takes them.  Where the model takes no others ("s <= 512"
        of one that reads `positions[:s]` of 512), that is found without being told.
      progress: show what is being done, as `jaxquant.quant_post`.

    Raises:
      ValueError: `qparams` and `qapply` do not belong together, an array, container or operation
        cannot be saved (the message names it), or the model cannot be traced with sizes that vary.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxquant
      >>> params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
      >>> qparams, qapply = jaxquant.quant_post(
      ...     params, apply_fn, [jnp.ones((2, 4))], algo="abs_max", progress=False)
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = f"{folder.name}/model.safetensors"
      >>> jaxquant.save_quantized_model(path, qparams, qapply)
      >>> qparams, qapply = jaxquant.load_quantized_model(path)
      >>> qapply(qparams, jnp.ones((1, 4))).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
      >>> folder.cleanup()
    """
    with Progress("save_quantized_model", progress) as shown:
        with shown.stage("tracing"):
            plain = tree.plain(qparams, qapply)
            stored = make_stored(qapply, shapes, constraints)
            # A file that could not be loaded again is refused now, while the model is at hand.
            check_program(_example_program(stored, qapply.plan), plain, stored.example)
        with shown.stage("saving"):
            parts = {
                "plan.json": dataclasses.asdict(qapply.plan),
                "report.json": _plain_report(qapply.report()),
                "graph.json": dataclasses.asdict(stored.form),
            }
            # Constants are arrays of the file too, apart from the JSON: it holds no array.
            tensors = {**tree.flatten(plain), **stored.arrays}
            for name, value in parts.items():
                tensors[f"{_PARTS}/{name}"] = packing.pack(dump_json(value, name))
            versions = {"jaxquant": __version__, "jax": jax.__version__}
            atomic.write_file(path, container.chunks(tensors, versions, FORMAT))


def make_stored(
    qapply: QuantizedApply, shapes: Any = None, constraints: Sequence[str] = ()
) -> StoredGraph:
    """The model's graph as it is stored; that of a loaded model is what the file had.

    Args:
      qapply, shapes, constraints: as for `save_quantized_model`.

    Raises:
      ValueError: as `save_quantized_model`.
    """
    if isinstance(qapply.source, StoredGraph) and shapes is None and not constraints:
        return qapply.source
    inputs, graph = program.traced(
        qapply, shapes, constraints, lambda inputs: (inputs, qapply.source(inputs).graph)
    )
    paths = layout.leaf_paths(graph, qapply.source.params)
    example = qapply.inputs
    assert example is not None, "symbolic_inputs refuses that"
    # First with all constants: what is read is known once the model is bound.
    whole = StoredGraph(*store(graph, inputs, example, paths, set(graph.constants)))
    # An array that only int8 weights were made of is not read any more, and not kept.
    running = _example_program(whole, qapply.plan)
    read = set(live_equations(running.binding).sources)
    pairs = zip(graph.constants, running.graph.constants, strict=True)
    needed = {var for var, known in pairs if known in read}
    return StoredGraph(*store(graph, inputs, example, paths, needed))


def _example_program(stored: StoredGraph, plan: Plan) -> Program:
    """The program, as XLA runs it, for the inputs that the model was quantized with."""
    return Program(bind(stored(stored.example), plan), stored.params)


def _plain_report(report: Report) -> dict[str, Any]:
    """A report without what depends on the machine."""
    data: dict[str, Any] = json.loads(report.to_json())
    data["summary"].pop("backend", None)
    return data


@named
def load_quantized_model(
    path: str | os.PathLike[str], *, sha256: str | None = None
) -> tuple[dict[str, Any], QuantizedApply]:
    """Load a model that `save_quantized_model` wrote; needs neither its code nor Flax.

    Everything is checked before anything of it runs: sizes before they are unpacked, the checksums,
    the structure, and that graph, plan and arrays belong together.  The checksums find damage; they
    do not tell who made the file.  No file makes this function run code; but a model is a program
    of its author's, and calling one may take any time and memory (`docs/deploying.md`).  Load what
    you trust, or give the `sha256` that you know.

    Args:
      path: of the file.
      sha256: the SHA-256 that the whole file must have, in hexadecimal.

    Returns:
      `(qparams, qapply)`: the arrays on the default device, and the `qapply` that was saved: on the
      same backends, as fast, to be prepared, exported, differentiated and saved again.  Its inputs
      have the dtypes and shapes of the model that was saved, with any batch size, or what `shapes`
      let vary; where it took a container of Flax, as the state of `nnx.split`, it takes and gives
      the dict (`nnx.to_pure_dict`).  `qapply.plan` and `qapply.report()` are those of the model
      that was saved.

    Raises:
      FileError: a ValueError; the file is refused, and the message says which part and why.
      OSError: it cannot be read.

    Example:
      See `jaxquant.save_quantized_model`.
    """
    tensors, metadata, digest = container.read(path, FORMAT)
    if sha256 is not None and digest != sha256.lower():
        raise FileError(f"{os.fspath(path)}: its SHA-256 is {digest}, not {sha256}")
    try:
        return _load(tensors, metadata.get("jax", ""))
    # With the path, which the reader of a message looks for first.
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None


def _load(
    tensors: Mapping[str, np.ndarray], made_with: str
) -> tuple[dict[str, Any], QuantizedApply]:
    packed, constants, arrays = {}, {}, {}
    for name, array in tensors.items():
        root, _, rest = name.partition("/")
        if root == _PARTS:
            packed[rest] = array
        elif root == CONSTANTS:
            constants[name] = array
        else:
            arrays[name] = array
    if set(packed) != set(_NAMES):
        raise FileError(f"its parts are {sorted(packed)[:9]}, not {sorted(_NAMES)}")

    # Sizes are looked at before anything is unpacked: a small file may claim to be large.
    def part(name: str) -> dict[str, Any]:
        contents = packing.unpack(packed[name], name, strict_json.MAX_BYTES)
        return parse_json(contents, name.removesuffix(".json"))

    # Each part is checked by itself, then whether they fit each other.
    plan = _plan(part("plan.json"))
    report = _report(part("report.json"))
    qparams = tree.unflatten(arrays)
    try:
        check_qparams(qparams, plan)
    except ValueError as error:
        raise FileError(f"the arrays do not fit the plan: {error}") from None
    stored = _graph(part("graph.json"), constants, plan, qparams, made_with)
    qapply = QuantizedApply(stored, plan, report, stored.example)

    # On the device at last, when nothing is refused any more.
    return jax.tree.map(jnp.asarray, qparams), qapply


def _graph(
    data: dict[str, Any],
    constants: Mapping[str, np.ndarray],
    plan: Plan,
    qparams: Mapping[str, Any],
    made_with: str,
) -> StoredGraph:
    try:
        stored = StoredGraph(decode(StoredForm, data, "graph"), constants)
        check_program(_example_program(stored, plan), qparams, stored.example)
    except Exception as error:  # a primitive raises what it likes about what it is given
        other = f" (it was saved with jax {made_with[:20]}, this is {jax.__version__})"
        raise FileError(
            f"the graph is refused: {error}{other if made_with != jax.__version__ else ''}"
        ) from error
    return stored


def _plan(data: dict[str, Any]) -> Plan:
    if data.get("version") != VERSION:
        raise FileError(
            f"plan version {str(data.get('version'))[:20]!r}; this release of jaxquant reads "
            f"{VERSION}"
        )
    try:
        plan = decode(Plan, data, "plan")
    except ValueError as error:
        raise FileError(f"the plan is damaged: {error}") from None
    if plan.mode not in MODES:
        raise FileError(f"the plan's mode is {plan.mode!r}, not one of {', '.join(MODES)}")
    if plan.group_size is not None and plan.group_size < 1:
        raise FileError(f"the plan has weights in groups of {plan.group_size}")
    # A plan steers compiled kernels: values that no plan has are refused one by one.
    for site in plan.sites:
        if site.weight_bits not in ((8, 4) if plan.mode == WEIGHT_ONLY else (8,)):
            raise FileError(f"the plan has {site.weight_bits} bits for a weight of {site.name!r}")
        is_table = site.weight_dtype in VALUES and site.weight_bits == 4
        if site.weight_dtype != INT and not is_table:
            raise FileError(f"the plan has {site.weight_dtype!r} for a weight of {site.name!r}")
        if site.dynamic and site.kind not in kinds.DOT_KINDS:
            raise FileError(f"the plan scales what a {site.kind}, {site.name!r}, reads in the call")
    # A scale of zero, or NaN, fails this comparison as well.
    for tensor in plan.tensors:
        if not (-128 <= tensor.zero_point <= 127 and tensor.scale > 0):
            raise FileError(f"the plan's grid of tensor {tensor.name!r} is none of int8")
    return plan


def _report(data: dict[str, Any]) -> Report:
    try:
        outputs = data.get("outputs", ())  # files of earlier releases have none
        report = Report(data["rows"], data["tensors"], data["summary"], outputs)
        str(report), report.to_json(), report._repr_html_()
    except Exception as error:  # of whatever formats a value that is not what it should be
        raise FileError(f"the report is damaged: {error!r:.300}") from None
    return report
