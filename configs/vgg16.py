r"""VGG16, as Keras trained it, to INT8.

No package carries these weights: give a Keras .h5 file as --config.weights, or torchvision's .pth
or .safetensors with --config.model=vgg16_torchvision. Not measured: no trained weights were at
hand. configs/train/vgg.py:depth=16 trains them.

  python experiments/quant_post.py --config=configs/vgg16.py --config.weights=FILE \
    --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = common.parse_arg(arg, runlocal=False)
    return common.get_config("vgg16", runlocal=given.runlocal)
