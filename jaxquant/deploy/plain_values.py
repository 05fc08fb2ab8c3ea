"""What equations hold, as plain data: numbers and the parameters of primitives."""

from __future__ import annotations

import enum
import math
from typing import Any

import jax
import numpy as np

from jaxquant.deploy.network import Scalar


def scalar(value: np.ndarray) -> Scalar:
    """A number written into an equation; text where JSON has no such number."""
    number = np.asarray(value).item() if value.dtype.kind in "biu" else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        return Scalar(str(number), str(value.dtype))
    return Scalar(number, str(value.dtype))


def plain(value: Any) -> Any:
    """A parameter of a primitive as plain data; what has no such form becomes its type's name."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    # bool is an int to Python, hence before; NaN and infinity are no JSON.
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return str(np.dtype(value))
    if jax.export.is_symbolic_dim(value):
        return str(value)
    # Dimension numbers are classes of their own, known by what they have.
    if hasattr(value, "lhs_spec") or hasattr(value, "offset_dims"):
        return {k: plain(v) for k, v in vars(value).items() if not k.startswith("_")}
    return f"<{type(value).__name__}>"
