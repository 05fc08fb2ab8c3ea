"""Sizes as expressions."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.deploy.stored import sizes


@pytest.mark.parametrize(
    "text",
    [
        "b",
        "2*b + h - 3",
        "floordiv(b + 1, 2)",
        "mod(h, 3)",
        "b*h^2 - 3*b",
        "max(b, h)",
        "min(b, 7)",
    ],
)
@given(b=st.integers(1, 50), h=st.integers(1, 50))
def test_what_jax_writes_is_what_it_means(text, b, h):
    (size,) = jax.export.symbolic_shape(text)
    known = {"b": b, "h": h}
    expected = eval(
        text.replace("^", "**"),
        {"floordiv": lambda x, y: x // y, "mod": lambda x, y: x % y, "max": max, "min": min},
        known,
    )
    assert sizes.evaluate(str(size), known) == expected


def test_sizes_may_be_symbols_again():
    (n,) = jax.export.symbolic_shape("n")
    assert str(sizes.evaluate("max(b, 4) + floordiv(2*b, 2)", {"b": n})) == "max(n, 4) + n"
    assert sizes.solve([("2*b", 2 * n), ("b + 1", n + 1)]) == {"b": n}


def test_names():
    assert sizes.names("floordiv(b + 1, 2)*h - 3") == {"b", "h"}


def test_sizes_are_solved():
    wanted = [("b", 4), ("2*h", 10), (3, 3), ("h + w - 1", 11)]
    assert sizes.solve(wanted) == {"b": 4, "h": 5, "w": 7}
    assert sizes.solve([("b", 0)]) == {"b": 0}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([("2*h", 9)], r"9 is not 2\*h for any h"),
        ([("b", 3), ("b", 4)], "4 is not b"),
        ([(3, 4)], "4 is not 3"),
        ([("b*h", 6)], "cannot be told apart"),
        ([("b*b", 9)], r"9 is not b\*b for any b"),
        ([("mod(b, 2)", 1)], "for any b"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wanted, message):
    with pytest.raises(ValueError, match=message):
        sizes.solve(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "", "b +", "(b", "b)", "b b", "2b", "b^b", "b^9", "b^0", "f(b)", "max(b)", "b/2", "1e3",
        "__import__('os')", "b.c(1)", "(" * 30 + "b" + ")" * 30, "b+" * 1000 + "b", "9" * 20,
        "floordiv(b, 0)", "mod(b, 0)", "c",
    ],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="size"):
        sizes.evaluate(text, {"b": 2})
