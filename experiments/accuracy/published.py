"""What other systems lose on the same networks: the figures to stand beside ours.

They are quoted, not measured by anything in this repository.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """ImageNet top-1 in percent, before and after int8."""

    fp32: float
    int8: float

    @property
    def loss(self) -> float:
        return round(self.fp32 - self.int8, 2)


class Figures(NamedTuple):
    """top-1 loss in points, agreement with float32 in percent, SQNR of the logits in dB."""

    loss: float
    agreement: float
    sqnr_db: float


# PaddleSlim's documentation of static post-training quantization: the ImageNet validation set, 100
# calibration images; conv2d, depthwise_conv2d, mul, pool2d, elementwise_add and concat in int8.
PADDLESLIM = {
    "googlenet": Published(70.50, 70.12),
    "mobilenet_v1": Published(70.91, 70.24),
    "mobilenet_v2": Published(71.90, 71.36),
    "resnet50": Published(76.35, 76.26),
    "resnet101": Published(77.49, 75.44),
    "vgg16": Published(72.08, 71.93),
    "vgg19": Published(72.56, 72.55),
}

# ONNX Runtime (ORT) and NNCF, run by us on the float32 weights of the networks here: 100 ImageNet
# images to calibrate on, 650 of the validation set to evaluate on; int8 weights per channel, uint8
# activations per tensor.  "two clips": a graph whose ReLU6 stayed two clips, so that no bias
# correction ran and other tensors were quantized.
PEERS = {
    "ORT min-max": {
        "mobilenet_v1": Figures(1.54, 93.1, 13.9),
        "mobilenet_v2": Figures(-0.46, 93.4, 13.8),
        "efficientnet_lite0": Figures(-0.31, 97.7, 19.5),
        "googlenet": Figures(-0.46, 98.2, 27.3),
        "resnet50": Figures(0.46, 96.3, 21.7),
    },
    "ORT percentile 99.999": {
        "mobilenet_v1": Figures(1.38, 93.5, 13.9),
        "mobilenet_v2": Figures(-0.62, 92.9, 14.0),
        "efficientnet_lite0": Figures(0.15, 98.2, 19.7),
        "googlenet": Figures(-0.15, 98.8, 25.3),
        "resnet50": Figures(-0.31, 97.8, 24.0),
    },
    "ORT entropy": {
        "mobilenet_v1": Figures(0.77, 91.2, 11.9),
        "mobilenet_v2": Figures(0.15, 88.5, 5.7),
        "efficientnet_lite0": Figures(3.69, 88.5, 1.2),
        "googlenet": Figures(32.3, 52.2, 3.4),
        "resnet50": Figures(9.69, 80.0, 7.0),
    },
    "NNCF": {
        "mobilenet_v1": Figures(1.23, 94.6, 15.4),
        "mobilenet_v2": Figures(0.31, 94.5, 13.9),
        "efficientnet_lite0": Figures(0.00, 97.5, 17.1),
        "googlenet": Figures(-0.15, 98.0, 19.3),
        "resnet50": Figures(0.77, 97.2, 22.2),
    },
    "NNCF, two clips": {
        "mobilenet_v1": Figures(-0.15, 95.7, 17.6),
        "mobilenet_v2": Figures(-0.46, 95.2, 14.1),
        "efficientnet_lite0": Figures(-0.15, 98.2, 17.6),
        "googlenet": Figures(-0.46, 97.7, 19.3),
        "resnet50": Figures(0.62, 96.9, 22.1),
    },
}


def best_of_peers(model: str) -> Figures | None:
    """The best figure of all peers, each by itself; None where none was measured."""
    found = [figures[model] for figures in PEERS.values() if model in figures]
    if not found:
        return None
    losses, agreements, sqnrs = zip(*found)
    return Figures(min(losses), max(agreements), max(sqnrs))
