"""The structures of pytrees as plain data."""

import json
from collections import OrderedDict, namedtuple

import jax
import pytest

from jaxquant.deploy.stored.trees import decode_tree, encode_tree

Pair = namedtuple("Pair", "left right")
Other = namedtuple("Other", "only")


@pytest.mark.parametrize(
    "tree",
    [
        0,
        (),
        [],
        {},
        None,
        (0, [0, None, {"b": 0, "a": (0,)}], {}),
        {1: 0, 0: 0},
        OrderedDict(b=0, a=[0]),
    ],
)
def test_structures_come_back(tree):
    structure = jax.tree.structure(tree)
    assert decode_tree(json.loads(json.dumps(encode_tree(structure)))) == structure


def test_a_registered_container_comes_back():
    jax.export.register_namedtuple_serialization(Pair, serialized_name="tests.Pair")
    structure = jax.tree.structure((Pair(0, [0]), 0))
    assert decode_tree(encode_tree(structure)) == structure


def test_others_say_what_to_do():
    with pytest.raises(ValueError, match=r"Other, which cannot be saved\. Let apply_fn take"):
        encode_tree(jax.tree.structure(Other(0)))


DEEP: object = "leaf"
for _ in range(100):
    DEEP = {"tuple": [DEEP]}


@pytest.mark.parametrize(
    "data",
    [
        3, "x", [], {}, {"tuple": 3}, {"tuple": [3]}, {"set": []}, {"dict": [["a"]]}, DEEP,
        {"dict": [[None, "leaf"]]}, {"dict": [[[], "leaf"]]}, {"tuple": [], "list": []},
        {"registered": ["no such", "", []]}, {"registered": [1, 2, 3]},
    ],
)  # fmt: skip
def test_damage_is_refused(data):
    with pytest.raises(ValueError, match=r"damaged|not registered|no text or number"):
        decode_tree(data)
