"""INT8 post-training quantization of JAX models.

qparams, qapply = jaxquant.quant_post(params, apply_fn, ds)
logits = qapply(qparams, x)
print(qapply.report())
"""

from jaxquant._version import __version__
from jaxquant.analysis import plots
from jaxquant.analysis.analysis import Analysis
from jaxquant.analysis.analyze import analyze
from jaxquant.analysis.page import report_html
from jaxquant.calibration.capture import capture
from jaxquant.calibration.kl import kl_threshold
from jaxquant.calibration.observations import Observations
from jaxquant.calibration.observations_file import load_observations, save_observations
from jaxquant.calibration.observers import Observer, histogram_observer
from jaxquant.data_free import quant_dynamic, quant_weights
from jaxquant.deploy.litert.export import export_litert
from jaxquant.deploy.onnx.export import export_onnx
from jaxquant.deploy.saved import load_quantized_model, save_quantized_model
from jaxquant.deploy.stablehlo import export_stablehlo
from jaxquant.files.errors import FileError
from jaxquant.pipeline import calibrate, quant_post, quantize
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.rules import Rule
from jaxquant.report.arrays import describe
from jaxquant.report.report import Report
from jaxquant.run.agreement import DisagreementError
from jaxquant.run.qapply import QuantizedApply

__all__ = [
    "Analysis",
    "DisagreementError",
    "FileError",
    "Observations",
    "Observer",
    "QuantConfig",
    "QuantizedApply",
    "Report",
    "Rule",
    "__version__",
    "analyze",
    "calibrate",
    "capture",
    "describe",
    "export_litert",
    "export_onnx",
    "export_stablehlo",
    "histogram_observer",
    "kl_threshold",
    "load_observations",
    "load_quantized_model",
    "plots",
    "quant_dynamic",
    "quant_post",
    "quant_weights",
    "quantize",
    "report_html",
    "save_observations",
    "save_quantized_model",
]
