r"""ResNet20 to 110 on CIFAR-10, as in the paper (section 4.2), with a cosine schedule.

  python experiments/train.py --config=configs/train/cifar10_resnet.py

The 200 epochs were not run. One epoch, with a schedule for it (docs/training.md has its figures):

  python experiments/train.py --config=configs/train/cifar10_resnet.py --config.epochs=1 \
    --config.warmup_epochs=0.1 --config.batch_size=32 --config.learning_rate=0.05

ResNet50, 101 and 152, with a 3x3 stem and no pooling after it, for an accelerator:

  python experiments/train.py --config=configs/train/cifar10_resnet.py:depth=101 \
    --config.dtype=bfloat16

The images come from a package (downloads 139 MB, once).
"""

from ml_collections import ConfigDict

from configs.common import parse_arg
from configs.train import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "depth=20" to "depth=152", "runlocal" for a smoke test."""
    given = parse_arg(arg, depth=20, runlocal=False)
    has_bottlenecks = given.depth in (50, 101, 152)
    config = common.get_config(
        f"cifar10_resnet{given.depth}",
        dataset="cifar10",
        augmentation="shift",
        epochs=200.0,
        warmup_epochs=5.0 if has_bottlenecks else 1.0,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4 if has_bottlenecks else 1e-4,
        zero_residuals=has_bottlenecks,
    )
    return common.run_local(config) if given.runlocal else config
