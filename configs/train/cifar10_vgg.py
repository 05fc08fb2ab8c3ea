r"""VGG16 and VGG19 on CIFAR-10, for an accelerator.

The networks are those of ImageNet, without BatchNorm, with two hidden dense layers of 4096. The
last feature map of 32x32 images is 1x1, so the first dense layer takes 512 values and not 25088.

  python experiments/train.py --config=configs/train/cifar10_vgg.py:depth=16 \
    --config.dtype=bfloat16

The images come from a package (downloads 139 MB, once).
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "depth=16" or "depth=19", "runlocal" for a smoke test."""
    given = parse_arg(arg, depth=16, runlocal=False)
    config = common.get_config(
        f"cifar10_vgg{given.depth}",
        dataset="cifar10",
        augmentation="shift",
        epochs=200.0,
        warmup_epochs=5.0,
        batch_size=128,
        learning_rate=0.02,
        weight_decay=5e-4,
        clip_norm=1.0,
    )
    return common.run_local(config) if given.runlocal else config
