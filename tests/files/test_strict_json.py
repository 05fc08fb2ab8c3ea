"""JSON that is measured before it is parsed."""

import pytest

from jaxquant.files import strict_json
from jaxquant.files.errors import FileError
from jaxquant.files.strict_json import dump_json, parse_json


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return {"a": value}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, 2.5, None, True, "x"], "b": {"c": [[]]}},
        {'quotes " and \\ and \\" ][][': "[[[" * 100, "\U0001f600": "é"},
        {"a": "\\" * 7, "b": '\\"' * 7, "c": 2**63},
        nested(strict_json.MAX_DEPTH - 1),
    ],
)
def test_what_is_written_is_read(value):
    assert parse_json(dump_json(value, "part"), "part") == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (nested(strict_json.MAX_DEPTH), "65 deep"),
        ({"a": [[]] * 2**21}, "values"),
        ({"a": "x" * 2**25}, "bytes of JSON"),
    ],
)
def test_what_is_not_read_is_not_written(value, message):
    with pytest.raises(ValueError, match=f"the part cannot be saved: .*{message}"):
        dump_json(value, "part")


def test_a_number_that_is_not_finite_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        dump_json({"a": float("nan")}, "part")


@pytest.mark.parametrize(
    "text", [b'{"a":-Infinity}', b'{"a":-1e400}', b'{"a":' + b"1" * 21 + b"}", b'{"a":"\xff"}']
)
def test_liberties_are_refused(text):
    with pytest.raises(FileError, match="the part is damaged"):
        parse_json(text, "part")
