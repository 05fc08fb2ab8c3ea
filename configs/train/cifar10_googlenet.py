r"""GoogLeNet on CIFAR-10, the network of ImageNet as it is.

  python experiments/train.py --config=configs/train/cifar10_googlenet.py

The images come from a package (downloads 139 MB, once).
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = parse_arg(arg, runlocal=False)
    config = common.get_config(
        "cifar10_googlenet",
        dataset="cifar10",
        augmentation="shift",
        epochs=200.0,
        batch_size=128,
        learning_rate=0.02,
        weight_decay=2e-4,
        clip_norm=1.0,
    )
    return common.run_local(config) if given.runlocal else config
