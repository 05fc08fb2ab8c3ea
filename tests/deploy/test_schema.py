"""Plain data into dataclasses."""

import dataclasses
import json
from collections.abc import Mapping

import pytest

from jaxquant.deploy.schema import decode
from jaxquant.plan.plan import Plan
from tests.deploy.models import small


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int | str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner | None
    ratio: float
    by_name: Mapping[str, Inner]


def test_nested_data():
    data = {"inner": {"name": "a", "sizes": [1, "b"]}, "ratio": 2, "by_name": {"x": {"name": "y"}}}
    found = decode(Outer, data, "outer")
    assert found == Outer(Inner("a", (1, "b")), 2.0, {"x": Inner("y")})
    assert isinstance(found.ratio, float)
    assert decode(Outer, {**data, "inner": None}, "outer").inner is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"name": 3}}, "outer.inner.name is 3, not str"),
        ({"inner": {"name": "a", "sizes": [1.5]}}, r"outer.inner.sizes\[0\] is 1.5"),
        ({"ratio": True}, "outer.ratio is True, not float"),
        ({"ratio": "1"}, "outer.ratio is '1', not float"),
        ({"by_name": []}, r"outer.by_name is \[\], not an object"),
        ({"by_name": {"x": {}}}, r"outer.by_name\['x'\] lacks 'name'"),
        ({"extra": 1}, "outer has the unknown entry 'extra'"),
        ({"inner": 7}, "outer.inner is 7, not an object"),
    ],
)
def test_other_types_are_named(change, message):
    data = {"inner": None, "ratio": 2, "by_name": {}, **change}
    with pytest.raises(ValueError, match=message):
        decode(Outer, data, "outer")


@pytest.mark.parametrize("full", [False, True])
def test_plans_come_back(full):
    plan = small(full)[1].plan
    assert decode(Plan, json.loads(plan.to_json()), "plan") == plan
