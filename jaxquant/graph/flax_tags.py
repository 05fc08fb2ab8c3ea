"""Tag a trace with the classes of Flax modules, so that skips can name them.

Linen calls every method through an interceptor, which here opens a named scope with the class; it
names and stores nothing.  Nnx has no such hook, but `nnx.split` leaves the classes in the graph
definition that `apply_fn` holds.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

_MARK = "module="


@contextlib.contextmanager
def tagging() -> Iterator[None]:
    """While open, equations of linen modules have `module=CLASS` in their name stack."""
    # Not imported: who does not use linen does not pay for it.
    linen = sys.modules.get("flax.linen")
    if linen is None:
        yield
        return

    def tag(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        with jax.named_scope(f"{_MARK}{type(context.module).__name__}"):
            return next_method(*args, **kwargs)

    with linen.intercept_methods(tag):
        yield


def split_scope(scope: str) -> tuple[str, tuple[str, ...]]:
    """A name stack without the tags, and the classes that the tags name, outermost first."""
    # No tag, as in most scopes: nothing to take apart.
    if _MARK not in scope:
        return scope, ()
    parts = scope.split("/")
    modules = tuple(p.removeprefix(_MARK) for p in parts if p.startswith(_MARK))
    return "/".join(p for p in parts if not p.startswith(_MARK)), modules


def nnx_classes(apply_fn: Callable[..., Any], params: Any) -> Mapping[str, str]:
    """Module path -> class, from the `nnx.GraphDef` that a function holds; {} without one."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.State):
        return {}
    # Found by its type, wherever the function holds it.
    for value in _held(apply_fn):
        if isinstance(value, nnx.GraphDef):
            # Any values will do, and those of `params` need not be all: `nnx.split` with filters
            # hands caches and counters to the function beside them.
            model = nnx.merge(value, dict.fromkeys(range(value.num_leaves), 0))
            return {
                "/".join(map(str, path)): type(module).__name__
                for path, module in nnx.iter_modules(model)
            }
    return {}


def _held(function: Any) -> Iterator[Any]:
    """What a function carries with it: closure, defaults, and arguments of functools.partial."""
    if isinstance(function, functools.partial):
        yield from function.args
        yield from function.keywords.values()
        function = function.func
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    yield from getattr(function, "__defaults__", None) or ()
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    for name in code.co_names if code is not None else ():
        if name in names:
            yield names[name]
