r"""EfficientNet-Lite0 to INT8.

On the embedded 20 images, which it calibrates and evaluates on (downloads 19 MB, once; about a
minute on two CPU cores):

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py

With 100 of 500 ImageNet images to calibrate on and 650 validation images to evaluate on, each a
folder with labels.csv (about 4 minutes on two CPU cores, most of it the float32 network):

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py \
    --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES

docs/results.md has the figures.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test, "variant=lite1" to "lite4" for the larger networks."""
    given = common.parse_arg(arg, variant="lite0", runlocal=False)
    return common.get_config(f"efficientnet_{given.variant}", runlocal=given.runlocal)
