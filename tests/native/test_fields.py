"""What Python and the kernels both know is the same on both sides."""

import re
from importlib import resources

from jaxquant.native.float_operations import FEW_ROWS


def test_both_sides_know_the_same_few_rows():
    header = (resources.files("jaxquant.native") / "src" / "attention.h").read_text()
    (there,) = re.findall(r"kFewestRows = (\d+);", header)
    assert int(there) == FEW_ROWS
