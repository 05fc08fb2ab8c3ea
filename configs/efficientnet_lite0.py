r"""EfficientNet-Lite0 to INT8.

On the embedded 20 images, nothing else needed (downloads 19 MB; TIME):

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py

On a folder of images with labels.csv, calibrated on 100 images of another one:

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py \
    --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test, "variant=lite1" to "lite4" for the larger networks."""
    given = common.parse_arg(arg, variant="lite0", runlocal=False)
    return common.get_config(f"efficientnet_{given.variant}", runlocal=given.runlocal)
