"""What observations were made of: digests of the model, the parameters and the batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.calibration.observations import Origin
from jaxquant.calibration.observers import Observer
from jaxquant.graph import ir
from jaxquant.graph.trace import path_name
from jaxquant.jax_shim import prng

DIGEST_BYTES = 16  # of SHA-256, which processors have instructions for
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function among the parameters of an equation


def make_origin(
    graph: ir.Graph,
    params: Any,
    tensor: Any,
    observer: Observer | None,
    options: Mapping[str, Any],
) -> Origin:
    """The origin of observations.

    Args:
      graph: the traced function.
      params: its parameters.
      tensor: shape and dtype of one that is observed, on which `observer` is traced.
      observer: what keeps statistics of its own.
      options: see `Origin`.
    """
    return Origin(
        model=model_digest(graph),
        params=params_digests(params),
        observer="" if observer is None else _observer_digest(observer, tensor),
        options=dict(options),
        jax=jax.__version__,
    )


def params_digests(params: Any) -> dict[str, str]:
    """Path -> "float32[3,4] " and a digest of the values.

    Example:
      >>> sorted(params_digests({"w": np.zeros(2, np.float32), "b": np.float32(1)}))
      ['b', 'w']
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {path_name(path): f"{_spell(leaf)} {_digest(leaf)}" for path, leaf in leaves}


def model_digest(graph: ir.Graph) -> str:
    """A digest of what a graph computes: its operations, shapes, and the arrays closed over.

    The same in another process; another version of JAX may trace another graph.
    """
    digest = hashlib.sha256()
    for var in (*graph.leaves, *graph.inputs):
        # Names and shapes of what comes in; its values are digested apart.
        digest.update(f"{var} {graph.paths.get(var)} {_spell(graph.avals[var])}\n".encode())
    for var, value in graph.constants.items():
        digest.update(f"{var} {_spell(value)} {_digest(value)}\n".encode())
    for eqn in graph.equations:
        inputs = [_spell_atom(x) for x in eqn.inputs]
        # Texts of functions hold addresses, which differ from run to run.
        params = {k: _ADDRESS.sub("", str(v)) for k, v in sorted(eqn.params.items())}
        digest.update(f"{eqn.outputs} {eqn.name} {inputs} {params}\n".encode())
    digest.update(str([_spell_atom(x) for x in graph.outputs]).encode())
    return digest.hexdigest()[: 2 * DIGEST_BYTES]


def batch_digest(inputs: tuple[Any, ...]) -> bytes:
    """16 bytes that tell whether a batch is the same.

    Example:
      >>> batch_digest((np.zeros(2),)) == batch_digest((np.zeros(2),))
      True
    """
    digest = hashlib.sha256()
    digest.update(str(jax.tree.structure(inputs)).encode())
    for leaf in jax.tree.leaves(inputs):
        digest.update(_spell(leaf).encode())
        digest.update(_bytes(leaf))
    return digest.digest()[:DIGEST_BYTES]


def _observer_digest(observer: Observer, aval: Any) -> str:
    state = jax.tree.map(ir.struct, observer.init())
    # By what it computes: a function has no other identity from run to run.
    closed = jax.make_jaxpr(observer.update)(state, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    digest = hashlib.sha256(_ADDRESS.sub("", str(closed)).encode())
    for value in (*closed.consts, *jax.tree.leaves(observer.init())):
        digest.update(_spell(value).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[: 2 * DIGEST_BYTES]


def _spell(leaf: Any) -> str:
    struct = ir.struct(leaf)
    return f"{struct.dtype}[{','.join(map(str, struct.shape))}]"


def _spell_atom(atom: ir.Atom) -> str:
    if isinstance(atom, ir.Literal):
        return f"{atom.value.dtype.name} {atom.value.tobytes().hex()}"
    return str(atom)


def _digest(leaf: Any) -> str:
    return hashlib.sha256(_bytes(leaf)).hexdigest()[: 2 * DIGEST_BYTES]


def _bytes(leaf: Any) -> memoryview:
    if hasattr(leaf, "dtype") and prng.is_key_dtype(leaf.dtype):
        # Keys are bits like others, behind an interface of their own.
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(np.asarray(leaf)).reshape(-1)
    return memoryview(array.view(np.uint8))
