"""What lies between an operation and the quantization of its result, and is done in int8 with it.

LiteRT's int8 kernels round their sums onto an int8 grid themselves, with an activation fused.  So
they need the whole way there: the clips, the division of a mean, and pools, which may as well take
the maximum of integers.
"""

from __future__ import annotations

import dataclasses
import math

from jaxquant.deploy.lower.model import Lowered
from jaxquant.deploy.lower.uses import with_scalar
from jaxquant.deploy.network import Node, Scalar, Var
from jaxquant.graph.primitives import PLACEMENTS

_AS_IT_IS = frozenset(
    {"optimization_barrier", "stop_gradient", "copy", "copy_p", "reduce_precision", *PLACEMENTS}
)


@dataclasses.dataclass(frozen=True)
class Chain:
    """The way from a float tensor to its int8 form, which alone is read.

    Attributes:
      end: the tensor that is quantized.
      low, high: what its values are clipped to.
      factor: what the tensor at the start is multiplied by.
      pools: the maximum poolings on the way, in order.
      passed: the tensors behind the start, `end` among them.
    """

    end: Var
    low: float = -math.inf
    high: float = math.inf
    factor: float = 1.0
    pools: tuple[Node, ...] = ()
    passed: tuple[Var, ...] = ()


def follow(model: Lowered, start: Var) -> Chain | None:
    """The chain from a tensor; None where somebody reads a float on the way."""
    chain, entries = Chain(start), model.network.entries
    while True:
        var = chain.end
        # Here it is quantized: that is where the chain ends.
        if str(var) in entries:
            # Divided by numbers for each channel, integers are on no grid that a kernel writes.
            is_divided = model.scales.is_divided(entries[str(var)])
            return None if is_divided or model.uses.is_read_in_float(var) else chain
        reader = model.uses.only_reader(var)
        longer = None if reader is None else _longer(chain, reader)
        if reader is None or longer is None:
            return None
        (end,) = reader.outputs
        chain = dataclasses.replace(longer, end=end, passed=(*chain.passed, end))


def _longer(chain: Chain, reader: Node) -> Chain | None:
    """The chain with what an operation does to its values; None where it does something else."""
    # In the order of the operations: once something is clipped, no factor fits before it.
    is_clipped = math.isfinite(chain.low) or math.isfinite(chain.high)
    if reader.op == "max" and (split := with_scalar(reader, "max")):
        return dataclasses.replace(chain, low=max(chain.low, float(split[1].array())))
    if reader.op == "min" and (split := with_scalar(reader, "min")):
        return dataclasses.replace(chain, high=min(chain.high, float(split[1].array())))
    if reader.op == "clamp":
        low, _, high = reader.inputs
        if isinstance(low, Scalar) and isinstance(high, Scalar):
            bounds = float(low.array()), float(high.array())
            return dataclasses.replace(
                chain, low=max(chain.low, bounds[0]), high=min(chain.high, bounds[1])
            )
    if reader.op in ("mul", "div") and not is_clipped and not chain.pools:
        split = with_scalar(reader, reader.op)
        is_divisor = reader.op == "div"
        if split is not None and not (is_divisor and isinstance(reader.inputs[0], Scalar)):
            number = float(split[1].array())
            # Kernels multiply by a quotient of scales, which is positive.
            if number > 0:
                factor = chain.factor / number if is_divisor else chain.factor * number
                return dataclasses.replace(chain, factor=factor)
    if reader.op == "reduce_window_max":
        return dataclasses.replace(chain, pools=(*chain.pools, reader))
    return chain if reader.op in _AS_IT_IS else None
