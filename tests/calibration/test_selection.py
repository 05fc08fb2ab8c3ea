"""The `select` argument of the data iterator."""

import numpy as np
import pytest

from jaxquant.calibration.data import iterate, num_batches
from tests.calibration.datasets import LazyMapping, Pair, assert_batches_equal, images, shapes

ITEM = {"image": images(2), "label": np.arange(2, dtype=np.int32), "name": ["a", "b"]}


@pytest.mark.parametrize(
    ("item", "select", "expected"),
    [
        (ITEM, "image", (ITEM["image"],)),
        (ITEM, ("label", "image"), (ITEM["label"], ITEM["image"])),
        (ITEM, ["image"], (ITEM["image"],)),
        (ITEM, lambda item: item["image"] + 1, (ITEM["image"] + 1,)),
        (ITEM, lambda item: {"x": item["image"]}, ({"x": ITEM["image"]},)),
        (ITEM, lambda item: (item["image"], item["label"]), (ITEM["image"], ITEM["label"])),
        ((images(2), "text"), 0, (images(2),)),
        (["text", images(2)], -1, (images(2),)),
        (("text", images(2), images(1)), (2, 1), (images(1), images(2))),
        (((images(2), images(1)), "text"), 0, (images(2), images(1))),
        (((images(2), images(1)), "text"), (0,), ((images(2), images(1)),)),
        (({"x": images(2)}, "text"), 0, ({"x": images(2)},)),
        (Pair(images(2), "text"), "image", (images(2),)),
        ({0: images(2), 1: "text"}, 0, (images(2),)),
        (LazyMapping(ITEM), "image", (ITEM["image"],)),
    ],
)
def test_select_from_items(item, select, expected):
    assert_batches_equal(iterate([item], select=select), [expected])


@pytest.mark.parametrize(
    "select", ["image", lambda item: item["image"]], ids=["before slicing", "after slicing"]
)
def test_select_from_dict_in_memory(select):
    data = {"image": images(3), "label": np.array(["a", "b", "c"])}
    expected = [(images(3)[:2],), (images(3)[2:],)]
    assert_batches_equal(iterate(data, batch_size=2, select=select), expected)


def test_select_from_tuple_in_memory():
    expected = [(images(3)[:2],), (images(3)[2:],)]
    assert_batches_equal(iterate((images(3), "text"), batch_size=2, select=0), expected)


def test_select_from_samples_runs_before_stacking():
    samples = ({"image": image, "name": "text"} for image in images(3))
    assert shapes(iterate(samples, batch_size=2, select="image")) == [((2, 2, 3),), ((1, 2, 3),)]


@pytest.mark.parametrize("select", [1.5, (), ("a", None), True, {"a": 1}])
def test_bad_select(select):
    with pytest.raises(TypeError, match="select must be a key or index"):
        iterate(images(2), select=select)


@pytest.mark.parametrize(
    ("item", "select", "has"),
    [
        ({"image": 1.0, "label": 2}, "img", r"dict with the keys \['image', 'label'\]"),
        ({"image": 1.0}, 0, r"dict with the keys \['image'\]"),
        ({"image": 1.0}, ("image", "img"), r"dict with the keys \['image'\]"),
        ((1.0, 2.0), 2, "tuple of 2 entries"),
        ((1.0, 2.0), -3, "tuple of 2 entries"),
        ((1.0, 2.0), "image", "tuple of 2 entries"),
        (Pair(1.0, 2.0), "img", r"Pair with the fields \['image', 'label'\]"),
        (np.zeros(2), 0, "single ndarray, without entries"),
    ],
)
def test_select_that_does_not_fit(item, select, has):
    bad = select if isinstance(select, str | int) else select[-1]
    match = rf"select={bad!r} does not fit batch 0 of ds, which is a {has}"
    with pytest.raises(ValueError, match=match):
        list(iterate([item], select=select))


def test_select_that_does_not_fit_in_memory():
    match = r"select='img' does not fit the whole of ds.*\['image'\]"
    for function in (iterate, num_batches):
        with pytest.raises(ValueError, match=match):
            list(function({"image": images(2)}, select="img"))


def test_exception_of_select_has_a_note():
    def select(item):
        raise ArithmeticError("bad pick")

    with pytest.raises(ArithmeticError, match="bad pick") as info:
        list(iterate([{"a": 1}], select=select))
    (note,) = info.value.__notes__
    assert note == "Raised by select in batch 0 of ds, on a dict with the keys ['a']."
