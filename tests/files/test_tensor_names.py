"""The names of tensors in a file."""

import pytest

from jaxquant.files import tensor_names
from jaxquant.files.errors import FileError


@pytest.mark.parametrize("parts", [("a", "b"), ("a/b", "~"), ("~1", "~/~0"), ("é", " ")])
def test_names_come_back(parts):
    assert tensor_names.split(tensor_names.join(parts)) == parts


@pytest.mark.parametrize("part", ["", ".", "..", "a\0", "a\nb"])
def test_names_that_read_as_paths_are_refused(part):
    with pytest.raises(ValueError, match="cannot be saved"):
        tensor_names.join(("params", part))
    with pytest.raises(FileError, match="not valid"):
        tensor_names.split(f"params/{part}/x")


@pytest.mark.parametrize("parts", [("a",) * 3000, ("a" * 5000,)])
def test_names_that_are_too_deep_or_too_long_are_refused(parts):
    with pytest.raises(ValueError, match="can be saved"):
        tensor_names.join(parts)
    with pytest.raises(FileError, match="too long or too deep"):
        tensor_names.split("/".join(parts))
