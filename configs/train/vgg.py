r"""VGG16 and VGG19 on ImageNet, for an accelerator.

  python experiments/train.py --config=configs/train/vgg.py:depth=16 \
    --config.data_dir=IMAGENET --config.dtype=bfloat16

Batch, momentum and weight decay are those of the paper; the schedule is a cosine with a warmup.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "depth=16" or "depth=19", "runlocal" for a smoke test."""
    given = parse_arg(arg, depth=16, runlocal=False)
    config = common.get_config(
        f"vgg{given.depth}_torchvision", learning_rate=0.01, weight_decay=5e-4, clip_norm=1.0
    )
    return common.run_local(config) if given.runlocal else config
