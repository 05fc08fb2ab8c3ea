"""The pickle machine makes plain containers of what a dict of tensors consists of."""

import io
import pickle
from collections import OrderedDict

import pytest

from experiments.weights import pickles
from experiments.weights.tree import WeightsError


def find(module, name):
    if (module, name) == ("collections", "OrderedDict"):
        return pickles.Function(pickles.ordered_dict)
    raise WeightsError(f"{module}.{name}")


def load(contents):
    return pickles.load(io.BytesIO(contents), find, lambda pid: ("storage", pid))


PLAIN = [
    None,
    [1, -2, 2**70, 0.5, "é", b"ab", True, [], {}, ()],
    {"a": {"b": (1, (2, 3), [4] * 300)}, 3: [None] * 2},
    OrderedDict(a=1, b=OrderedDict()),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN)
def test_plain_values_come_back(value, protocol):
    if protocol < 3 and isinstance(value, list):
        value = [item for item in value if not isinstance(item, bytes)]  # made by a call there
    assert load(pickle.dumps(value, protocol)) == value


def test_several_pickles_follow_each_other():
    stream = io.BytesIO(pickle.dumps(1) + pickle.dumps("x"))
    assert [pickles.load(stream, find, None) for _ in range(2)] == [1, "x"]


def test_a_deep_tuple_as_a_key_is_refused():
    """Python's unpickler hashes it, which overflows the C stack."""
    deep = b")" + b"\x85" * 200_000  # ((((...),),),)
    with pytest.raises(WeightsError, match="a tuple as a key"):
        load(b"\x80\x02}" + deep + b"K\x01s.")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (pickle.dumps(print), "builtins.print"),
        (pickle.dumps(io.StringIO), "_io.StringIO"),
        (b"\x80\x02]\x94(K\x01K\x02e)R.", "calls what is no part"),
        (b"\x80\x02}(K\x01K\x02\x90.", "ADDITEMS"),
        (b"K\x01" * (pickles.MAX_OPERATIONS + 1) + b".", "operations"),
    ],
)
def test_what_no_dict_of_tensors_has_is_refused(contents, message):
    with pytest.raises(WeightsError, match=message):
        load(contents)


@pytest.mark.parametrize(
    "contents", [b"", b".", b"K\x01K\x02.", b"s.", b"e.", b"t.", b"h\x05.", b"\x8a\xff."]
)
def test_damage_is_an_error(contents):
    with pytest.raises((ValueError, LookupError)):
        load(contents)
