"""XLA's forms of a call give what NumPy does, with zero points that are known and that vary."""

from __future__ import annotations

import pytest

from jaxquant.backends.xla import Xla
from tests.backends import calls


@pytest.mark.parametrize("form", calls.FORMS)
def test_every_form_in_a_loop(form: str) -> None:
    calls.check_in_a_loop(Xla(), calls.example(form, "int8"))


@pytest.mark.parametrize("epilogue", calls.EPILOGUES)
def test_every_epilogue_in_a_loop(epilogue: str) -> None:
    calls.check_in_a_loop(Xla(), calls.example("padded", epilogue))


@pytest.mark.parametrize("epilogue", calls.EPILOGUES)
def test_every_epilogue_with_known_zero_points(epilogue: str) -> None:
    calls.check_known(Xla(), calls.example("dense", epilogue))


@pytest.mark.parametrize("form", ["padded", "depthwise", "transposed"])
def test_a_form_with_known_zero_points(form: str) -> None:
    calls.check_known(Xla(), calls.example(form, "both results"))
