"""INT8 post-training quantization of JAX models.

qparams, qapply = jaxquant.quant_post(params, apply_fn, ds)
logits = qapply(qparams, x)
print(qapply.report())
"""

from jaxquant._version import __version__
from jaxquant.calibration.capture import capture
from jaxquant.calibration.kl import kl_threshold
from jaxquant.calibration.observers import Observer, histogram_observer
from jaxquant.data_free import quant_dynamic, quant_weights
from jaxquant.pipeline import calibrate, quant_post, quantize

__all__ = [
    "Observer",
    "__version__",
    "calibrate",
    "capture",
    "histogram_observer",
    "kl_threshold",
    "quant_dynamic",
    "quant_post",
    "quant_weights",
    "quantize",
]
