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
from jax import export

from jaxquant.deploy import program as programs
from jaxquant.deploy import tree
from jaxquant.deploy.artifact import Artifact, make_artifact
from jaxquant.deploy.loaded import LoadedApply
from jaxquant.deploy.network import Network
from jaxquant.deploy.schema import decode
from jaxquant.files import atomic, packing, strict_json
from jaxquant.files import safetensors as container
from jaxquant.files.errors import FileError
from jaxquant.files.strict_json import parse_json
from jaxquant.keywords import named
from jaxquant.modes import MODES
from jaxquant.plan.plan import VERSION, Plan
from jaxquant.report.report import Report

FORMAT = container.Format("jaxquant", "1", "a model that jaxquant.save_quantized_model wrote")
_PARTS = "jaxquant"  # the packed parts are tensors under this name, the constants under their own
_CONSTANTS = "constants"
# The parts, and how large they may be when unpacked.
_MAX_BYTES = {
    "plan.json": strict_json.MAX_BYTES,
    "report.json": strict_json.MAX_BYTES,
    "network.json": strict_json.MAX_BYTES,
    "program": 2**28,
}


@named
def save_quantized_model(
    path: str | os.PathLike[str],
    qparams: Mapping[str, Any],
    qapply: Any,
    *,
    shapes: Any = None,
    constraints: Sequence[str] = (),
) -> None:
    """Save an int8 model in one file, from which `load_quantized_model` makes it again.

    The file is a safetensors file: the arrays, and the plan, the report, the network and the
    exported program as bytes.  It is written beside `path` and renamed, so that a crash leaves the
    old file whole.

    Args:
      path: of the file to write, whatever its name; the folder must be there.
      qparams: the arrays that `quant_post`, `quantize` or `load_quantized_model` returned.
      qapply: the function that came with them.
      shapes: which sizes of the inputs may vary, as `jax.export.symbolic_args_specs` takes it:
        "b, h, w, 3" for one input, a tuple of such strings for several.  None: the first axis of
        every input array is the batch, all other sizes are those of the calibration data.
      constraints: what holds for every size with a name, where the model needs it: ("s <= 512",)
        for a model that reads `positions[:s]` of 512.  `qapply` refuses other sizes.  Written with
        <=, >= or ==, as `jax.export.symbolic_args_specs` takes them.

    Raises:
      ValueError: `qparams` and `qapply` do not belong together, an array or container cannot be
        saved, or the model cannot be traced with sizes that vary.
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
    plain, artifact = make_artifact(qparams, qapply, shapes, constraints)
    network = json.dumps(dataclasses.asdict(artifact.network), separators=(",", ":"))
    parts = {
        "plan.json": artifact.plan.to_json().encode(),
        "report.json": artifact.report.to_json().encode(),
        "network.json": network.encode(),
        "program": artifact.program,
    }
    tensors = {**tree.flatten(plain), **artifact.constants}
    for name, contents in parts.items():
        tensors[f"{_PARTS}/{name}"] = packing.pack(contents)
    atomic.write_file(path, container.chunks(tensors, artifact.versions, FORMAT))


@named
def load_quantized_model(
    path: str | os.PathLike[str], *, sha256: str | None = None
) -> tuple[dict[str, Any], LoadedApply]:
    """Load a model that `save_quantized_model` wrote; needs neither its code nor Flax.

    Everything is checked before anything of it runs: the checksums, the structure, and that arrays,
    plan and program belong together.  The checksums find damage; they do not tell who made the
    file, so load what you trust, or give the `sha256` that you know.

    Args:
      path: of the file.
      sha256: the SHA-256 that the whole file must have, in hexadecimal.

    Returns:
      `(qparams, qapply)`: the arrays on the default device, and a function of them and of the
      inputs, with any batch size, on CPU, GPU and TPU.  `qapply.plan` and `qapply.report()` are
      those of the model that was saved.

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
        return _load(tensors, metadata)
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None


def _load(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], LoadedApply]:
    packed, constants, arrays = {}, {}, {}
    for name, array in tensors.items():
        root, _, rest = name.partition("/")
        if root == _PARTS:
            packed[rest] = array
        elif root == _CONSTANTS:
            constants[name] = array
        else:
            arrays[name] = array
    if set(packed) != set(_MAX_BYTES):
        raise FileError(f"its parts are {sorted(packed)[:9]}, not {sorted(_MAX_BYTES)}")
    parts = {name: packing.unpack(packed[name], name, _MAX_BYTES[name]) for name in _MAX_BYTES}
    plan = _plan(parts["plan.json"])
    exported = _program(parts["program"])
    qparams = tree.unflatten(arrays)
    network = _network(parts["network.json"], arrays, constants)
    artifact = Artifact(
        plan=plan,
        report=_report(parts["report.json"]),
        program=parts["program"],
        network=network,
        constants=constants,
        versions={key: metadata[key] for key in ("jaxquant", "jax") if key in metadata},
    )
    _check_arguments(exported, qparams)
    qapply = LoadedApply(artifact, exported)
    try:
        qapply.check(qparams)
    except ValueError as error:
        raise FileError(f"the arrays do not fit the plan: {error}") from None
    return jax.tree.map(jnp.asarray, qparams), qapply


def _plan(contents: bytes) -> Plan:
    data = parse_json(contents, "plan")
    if data.get("version") != VERSION:
        raise FileError(
            f"plan version {data.get('version')!r}; this release of jaxquant reads {VERSION}"
        )
    try:
        plan = decode(Plan, data, "plan")
    except ValueError as error:
        raise FileError(f"the plan is damaged: {error}") from None
    if plan.mode not in MODES:
        raise FileError(f"the plan's mode is {plan.mode!r}, not one of {', '.join(MODES)}")
    return plan


def _report(contents: bytes) -> Report:
    data = parse_json(contents, "report")
    try:
        report = Report(data["rows"], data["tensors"], data["summary"])
        str(report), report.to_json(), report._repr_html_()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"the report is damaged: {error!r}") from None
    return report


def _network(
    contents: bytes, arrays: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray]
) -> Network:
    data = parse_json(contents, "network")
    try:
        network = decode(Network, data, "network")
    except ValueError as error:
        raise FileError(f"the network is damaged: {error}") from None
    missing = set(network.leaves.values()) - set(arrays)
    missing |= set(network.constants.values()) ^ set(constants)
    if missing:
        raise FileError(f"the network and the arrays differ in {sorted(missing)[0]!r}")
    return network


def _program(contents: bytes) -> export.Exported:
    try:
        return programs.deserialize(contents)
    except ValueError as error:
        raise FileError(f"the program is refused: {error}") from None


def _check_arguments(exported: export.Exported, qparams: Mapping[str, Any]) -> None:
    """Raise FileError where the program takes other arrays than those of the file."""
    arguments, keywords = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if keywords or not arguments:
        raise FileError("the program is refused: it is no function of (qparams, *inputs)")
    wanted = {
        jax.tree_util.keystr(path): (aval.shape, aval.dtype)
        for path, aval in jax.tree_util.tree_flatten_with_path(arguments[0])[0]
    }
    found = {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_flatten_with_path(qparams)[0]
    }
    differing = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise FileError(
            f"the program takes other arrays than those of the file: qparams{key} is "
            f"{found.get(key)}, it wants {wanted.get(key)}"
        )
