r"""EfficientNet-Lite0 to Lite4 on ImageNet, for an accelerator.

  python experiments/train.py --config=configs/train/efficientnet_lite.py:variant=lite0 \
    --config.data_dir=IMAGENET --config.dtype=bfloat16

Optimizer, weight decay and label smoothing are those of the paper, the schedule is a cosine; there
is no average of the weights over the steps and no AutoAugment.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "variant=lite0" to "variant=lite4", "runlocal" for a smoke test."""
    given = parse_arg(arg, variant="lite0", runlocal=False)
    config = common.get_config(
        f"efficientnet_{given.variant}",
        epochs=350.0,
        optimizer="rmsprop",
        learning_rate=0.016,
        nesterov=False,
        weight_decay=1e-5,
        label_smoothing=0.1,
    )
    return common.run_local(config) if given.runlocal else config
