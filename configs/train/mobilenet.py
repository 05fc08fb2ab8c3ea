r"""MobileNetV1 and MobileNetV2 on ImageNet, for an accelerator.

  python experiments/train.py --config=configs/train/mobilenet.py:version=1 \
    --config.data_dir=IMAGENET --config.dtype=bfloat16
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "version=1" or "version=2", "runlocal" for a smoke test."""
    given = parse_arg(arg, version=1, runlocal=False)
    config = common.get_config(
        f"mobilenet_v{given.version}", epochs=150.0, learning_rate=0.05, weight_decay=4e-5
    )
    return common.run_local(config) if given.runlocal else config
