r"""ResNet20 for CIFAR-10 to INT8.

HEADER
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = common.parse_arg(arg, runlocal=False)
    config = common.get_config("cifar10_resnet20", dataset="cifar10", runlocal=given.runlocal)
    if not given.runlocal:
        config.batch_size = 100
    return config
