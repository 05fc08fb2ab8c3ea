"""The progress bar: what it shows, and that the reading goes on without it."""

import contextlib
import subprocess
import sys

import pytest

from jaxquant.calibration import progress
from jaxquant.calibration.progress import progress_bar
from jaxquant.extras import how_to_install


@pytest.fixture
def without_tqdm(monkeypatch):
    """An environment where `import tqdm` fails, and where that has not been said yet."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    progress._say_once.cache_clear()
    yield
    progress._say_once.cache_clear()


def test_shows_description_count_rate_and_yields_all(capsys):
    assert list(progress_bar(range(4), 4, "calibrate")) == [0, 1, 2, 3]
    captured = capsys.readouterr()
    last = captured.err.rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("calibrate: 100%")
    assert "4/4" in last
    assert "batch/s" in last or "s/batch" in last
    assert captured.out == ""


def test_unknown_total(capsys):
    assert list(progress_bar(iter("ab"), None, "calibrate")) == ["a", "b"]
    assert "calibrate: 2batch" in capsys.readouterr().err


def test_an_item_is_done_when_the_next_is_asked_for(capsys):
    bar = progress_bar(range(2), 2, "calibrate")
    next(bar)
    assert "0/2" in capsys.readouterr().err
    bar.close()
    assert "1/2" not in capsys.readouterr().err


def test_disabled_shows_nothing_and_needs_no_tqdm(without_tqdm, capsys):
    assert list(progress_bar(range(3), 3, "calibrate", enabled=False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_nothing_is_shown_or_read_before_the_first_item(capsys):
    source = iter([1])
    progress_bar(source, 1, "calibrate").close()
    assert capsys.readouterr() == ("", "")
    assert next(source) == 1


def test_error_of_the_source_closes_the_bar(capsys):
    def source():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(progress_bar(source(), 5, "calibrate"))
    assert capsys.readouterr().err.endswith("\n")


def test_error_of_the_consumer_closes_the_bar(capsys):
    def consume():
        with contextlib.closing(progress_bar(range(5), 5, "calibrate")) as batches:
            for _ in batches:
                raise ArithmeticError

    with pytest.raises(ArithmeticError):
        consume()
    assert capsys.readouterr().err.endswith("\n")


def test_without_tqdm_says_so_once_and_goes_on(without_tqdm, capsys):
    for _ in range(2):
        assert list(progress_bar(range(3), 3, "calibrate")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert how_to_install("progress") in lines[0]


def test_import_warnings_of_tqdm_are_not_passed_on():
    """tqdm warns on import in a notebook without ipywidgets; here that is an error if it passes."""
    code = """
import sys, types, warnings
auto = types.ModuleType("tqdm.auto")
def lookup(name):
    warnings.warn("IProgress not found")
    import tqdm
    return tqdm.tqdm
auto.__getattr__ = lookup
import tqdm
sys.modules["tqdm.auto"] = auto
from jaxquant.calibration.progress import progress_bar
warnings.simplefilter("error")
assert list(progress_bar([1, 2], 2, "calibrate")) == [1, 2]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
