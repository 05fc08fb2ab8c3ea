r"""GoogLeNet, as trained for Caffe, to INT8.

No package carries these weights: give a file as --config.weights.

With 100 of 500 ImageNet images to calibrate on and 650 validation images to evaluate on, each a
folder with labels.csv (about 3 minutes on two CPU cores, most of it the float32 network):

  python experiments/quant_post.py --config=configs/googlenet.py --config.weights=FILE.npz \
    --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES

docs/results.md has the figures.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = common.parse_arg(arg, runlocal=False)
    return common.get_config("googlenet", runlocal=given.runlocal)
