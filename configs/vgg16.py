r"""VGG16 to INT8.

HEADER_vgg16
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = common.parse_arg(arg, runlocal=False)
    return common.get_config("vgg16", runlocal=given.runlocal)
