"""What a call shows: its stages in order, as lines or as bars, and nothing where it is not to."""

import io
import logging
import sys
import threading
import types
import warnings

import jax.numpy as jnp
import pytest
import tqdm

import jaxquant
from jaxquant import progress
from jaxquant.backends import operations
from jaxquant.progress import Progress

PARAMS = {"w": jnp.asarray([[1.0, -0.5], [0.25, 2.0]])}
X = jnp.asarray([[1.0, -2.0]])
BATCHES = [X, jnp.asarray([[0.5, 3.0]]), jnp.asarray([[-1.0, 1.0]])]


def dot(params, x):
    return x @ params["w"]


@pytest.fixture
def on_screen(monkeypatch):
    """A stderr that is a terminal."""
    monkeypatch.setattr(progress, "is_on_screen", lambda: True)


@pytest.fixture
def without_tqdm(monkeypatch):
    """An environment where `import tqdm` fails."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)


@pytest.fixture
def lines(caplog):
    """The records of the library, with logging set up to show them."""
    caplog.set_level(logging.INFO, "jaxquant")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "jaxquant"]


def work(call="work", shown=True):
    """A call with two stages, the first with two steps and a stage in the first of them."""
    with Progress(call, shown) as stages:
        with stages.stage("reading", 2, "batch") as stage:
            for number in stage.each(range(2)):
                if number == 0:
                    with stages.stage("compiling"), stages.stage("linking"):
                        pass
        with stages.stage("writing"):
            pass


def test_lines_of_the_logger_in_order_and_the_times_at_the_end(lines, capsys):
    work()
    *begun, last = lines()
    assert begun == ["reading", "reading: compiling", "writing"]
    assert last == "work took 0.0 s: reading 0.0 s (compiling 0.0 s), writing 0.0 s"
    assert capsys.readouterr() == ("", "")  # not twice


def test_lines_on_stderr_where_logging_is_not_set_up(capsys):
    work()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:3] == [
        "jaxquant: reading",
        "jaxquant: reading: compiling",
        "jaxquant: writing",
    ]


def test_without_tqdm_a_terminal_gets_lines(without_tqdm, on_screen, capsys):
    work()
    assert "jaxquant: reading: compiling\n" in capsys.readouterr().err


def test_bars_with_totals_and_the_stage_within(on_screen, capsys):
    work()
    states = [state.strip() for state in capsys.readouterr().err.split("\r")]
    reading = [state for state in states if state.startswith("reading: ")]
    assert "| 0/2 [" in reading[0]
    assert any(state.endswith("compiling]") for state in reading)
    assert any(state.endswith("compiling: linking]") for state in reading)
    assert reading[-1].startswith("reading: 100%")
    assert "| 2/2 [" in reading[-1]
    assert "batch/s" in reading[-1]
    assert states[-1].startswith("writing: 00:0")
    assert "jaxquant:" not in "".join(states)


def test_a_bar_of_unknown_total(on_screen, capsys):
    with Progress("work", True) as stages, stages.stage("reading", None, "batch") as stage:
        assert list(stage.each(iter("ab"))) == ["a", "b"]
    assert "reading: 2batch" in capsys.readouterr().err


def test_a_line_does_not_go_into_a_bar(on_screen, capsys):
    handler = logging.StreamHandler(sys.stderr)
    progress.LOGGER.addHandler(handler)
    progress.LOGGER.setLevel(logging.INFO)
    try:
        work()
    finally:
        progress.LOGGER.removeHandler(handler)
        progress.LOGGER.setLevel(logging.NOTSET)
    texts = [text.rsplit("\r", 1)[-1] for text in capsys.readouterr().err.split("\n")]
    assert "reading: compiling" in texts


@pytest.mark.parametrize("screen", [False, True])
def test_quiet(screen, monkeypatch, lines, capsys):
    monkeypatch.setattr(progress, "is_on_screen", lambda: screen)
    before = threading.active_count()
    with Progress("work", False) as stages, stages.stage("reading", 2, "batch") as stage:
        assert threading.active_count() == before
        assert list(stage.each("ab")) == ["a", "b"]
    assert stage.done == 2
    assert lines() == []
    assert capsys.readouterr() == ("", "")


def test_quiet_needs_no_tqdm(without_tqdm, on_screen, capsys):
    work(shown=False)
    assert capsys.readouterr() == ("", "")


def test_an_item_is_done_when_the_next_is_asked_for():
    with Progress("work", False) as stages, stages.stage("reading", 2, "batch") as stage:
        items = stage.each("ab")
        next(items)
        assert stage.done == 0
        next(items)
        assert stage.done == 1


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_error_ends_the_bar_and_the_clock_and_says_nothing_more(error, on_screen, capsys, lines):
    def fail():
        with Progress("work", True) as stages, stages.stage("reading", 5, "batch") as stage:
            for _ in stage.each(range(5)):
                with stages.stage("compiling"):
                    raise error

    with pytest.raises(error):
        fail()
    assert not any(thread.name == "jaxquant" for thread in threading.enumerate())
    assert lines() == ["reading", "reading: compiling"]
    work()  # and the next call is whole
    assert lines()[2:5] == ["reading", "reading: compiling", "writing"]


def test_an_error_is_shown_below_the_bar(on_screen, capsys):
    def fail():
        with Progress("work", True) as stages, stages.stage("reading", 5, "batch"):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert capsys.readouterr().err.endswith("\n")


def test_an_interrupt_while_a_stage_opens_leaves_no_bar(on_screen, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    def fail():
        with Progress("work", True) as stages:
            monkeypatch.setattr(Progress, "_note_inner", interrupted)
            with stages.stage("reading", 5, "batch"):
                pass

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert capsys.readouterr().err.endswith("\n")


def test_steps_of_many_threads_are_all_counted(on_screen, capsys):
    with Progress("work", True) as stages, stages.stage("reading", 400, "item") as stage:

        def run():
            for _ in range(100):
                stage.step()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stage.done == 400
    assert "400/400" in capsys.readouterr().err


def test_a_long_stage_breaks_its_silence(monkeypatch):
    """Where there is no bar; the wait ends with the line, whatever the machine does meanwhile."""
    monkeypatch.setattr(progress, "TICK", 0.001)
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    said, text = threading.Event(), io.StringIO()

    class Stderr(io.StringIO):
        def write(self, written):
            text.write(written)
            if " so far" in written:
                said.set()
            return len(written)

    monkeypatch.setattr(sys, "stderr", Stderr())
    with Progress("work", True) as stages, stages.stage("reading", 3, "batch") as stage:
        stage.step()
        with stages.stage("compiling"):
            assert said.wait(60)
    assert "jaxquant: reading, batch 1 of 3: compiling, 0.0 s so far\n" in text.getvalue()


def test_import_warnings_of_tqdm_are_not_passed_on(on_screen, monkeypatch, capsys):
    """tqdm warns on import in a notebook without ipywidgets; here that is an error if it passes."""
    auto = types.ModuleType("tqdm.auto")

    def look_up(name):
        warnings.warn("IProgress not found", stacklevel=2)
        return tqdm.tqdm

    auto.__getattr__ = look_up
    monkeypatch.setitem(sys.modules, "tqdm.auto", auto)
    work()
    assert "reading: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("known", [True, False])
def test_quant_post_tells_its_stages(lines, monkeypatch, known):
    monkeypatch.setattr(operations, "are_loaded", lambda: known)
    jaxquant.quant_post(PARAMS, dot, BATCHES)
    *begun, last = lines()
    assert begun == [
        *([] if known else ["loading the kernels"]),
        "calibrating",
        "calibrating: tracing",
        "calibrating: compiling",
        "tracing",
        "searching thresholds",
        "quantizing weights",
        "bias correction",
        "comparing",
    ]
    assert last.startswith("quant_post took ")


def test_analyze_tells_its_stages(lines):
    qparams, qapply = jaxquant.quant_post(PARAMS, dot, BATCHES, recover=(), progress=False)
    assert lines() == []
    jaxquant.analyze(PARAMS, dot, qparams, qapply, BATCHES, lambda model: float(model(X)[0, 0]))
    assert [line for line in lines() if ": " not in line] == [
        "comparing",
        "measuring weights",
        "sensitivity",
        "trade-off",
    ]


def test_the_batches_are_the_total_of_the_bar(on_screen, capsys):
    jaxquant.calibrate(PARAMS, dot, jnp.concatenate(BATCHES), batch_size=1)
    assert "| 3/3 [" in capsys.readouterr().err.rstrip().rsplit("\r", 1)[-1]


def test_a_warning_has_lines_of_its_own(on_screen, capsys, monkeypatch):
    before = []

    def show(*args, **kwargs):
        before.append(capsys.readouterr().err)

    far_apart = {"w": jnp.asarray([[1.0, 1e-6], [1e-6, 1.0]])}
    x = jnp.asarray([[1e-4, 1e4], [-1e-4, 1e-3]])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        jaxquant.quant_post(far_apart, dot, [x], weight_quantize_type="abs_max", recover=())
    assert before
    assert all(text.endswith("\n") or not text for text in before)


@pytest.mark.parametrize(
    "function",
    [jaxquant.quant_post, jaxquant.calibrate, jaxquant.quant_dynamic, jaxquant.quant_weights],
)
def test_progress_is_a_flag(function):
    with pytest.raises(ValueError, match="progress is True or False, got 1"):
        function(PARAMS, dot, BATCHES, progress=1)
