r"""GoogLeNet on ImageNet, for an accelerator.

  python experiments/train.py --config=configs/train/googlenet.py \
    --config.data_dir=IMAGENET --config.dtype=bfloat16

The inputs have unit variance (the network of Caffe does without), and there are no auxiliary
classifiers.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = parse_arg(arg, runlocal=False)
    config = common.get_config(
        "googlenet_scaled", learning_rate=0.01, weight_decay=2e-4, clip_norm=1.0
    )
    return common.run_local(config) if given.runlocal else config
