r"""ResNet50, 101 and 152 on ImageNet, for an accelerator.

  python experiments/train.py --config=configs/train/resnet.py:depth=101 \
    --config.data_dir=IMAGENET --config.dtype=bfloat16

The recipe is that of Goyal et al., with label smoothing and a cosine schedule.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "depth=50", "depth=101" or "depth=152", "runlocal" for a smoke test."""
    given = parse_arg(arg, depth=50, runlocal=False)
    config = common.get_config(
        f"resnet{given.depth}_torchvision", label_smoothing=0.1, zero_residuals=True
    )
    return common.run_local(config) if given.runlocal else config
