r"""EfficientNet-Lite0 to INT8.

On the embedded 20 images, which it calibrates and evaluates on (downloads 19 MB, once; about a
minute on two CPU cores):

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py

  top-1 90 -> 90 %, agreement 100 %, SQNR 18.5 dB

With 100 of 500 ImageNet images to calibrate on and 650 validation images to evaluate on, each a
folder with labels.csv (about 4 minutes on two CPU cores, most of it the float32 network):

  python experiments/quant_post.py --config=configs/efficientnet_lite0.py \
    --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES

  top-1 82.62 -> 82.77 %, top-5 96.77 -> 96.77 %, agreement 97.38 %,
  SQNR 19.3 dB, 3.85 times fewer bytes, 50 sites in int8, 0 in float

With --config.algo=direct as well:

  top-1 82.62 -> 82.62 %, top-5 96.77 -> 96.62 %, agreement 97.54 %,
  SQNR 19.2 dB, 3.85 times fewer bytes, 50 sites in int8, 0 in float
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test, "variant=lite1" to "lite4" for the larger networks."""
    given = common.parse_arg(arg, variant="lite0", runlocal=False)
    return common.get_config(f"efficientnet_{given.variant}", runlocal=given.runlocal)
