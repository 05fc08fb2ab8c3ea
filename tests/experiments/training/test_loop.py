import itertools
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import TrainingError
from experiments.training.loop import Events, Every, fit, stopping
from experiments.training.step import State


def update(state, images, labels):
    loss = jnp.asarray(images, jnp.float32)
    return State(state.step + 1, state.variables, state.optimizer), {"loss": loss}


def run(losses, *, start=0, every, should_stop=lambda: False):
    """The calls of a run whose losses are given."""
    calls = []
    fit(
        State(jnp.asarray(start), {}, ()),
        update,
        [(np.float32(loss), np.int32(0)) for loss in losses],
        steps=start + len(losses),
        every=Every(*every),
        events=Events(
            log=lambda step, metrics: calls.append(("log", step, metrics["loss"])),
            save=lambda state: calls.append(("save", int(state.step))),
            evaluate=lambda step, state: calls.append(("evaluate", step)),
        ),
        should_stop=should_stop,
    )
    return calls


def test_events_come_at_their_steps_and_the_last_one_is_saved():
    assert run([1, 3, 5, 7, 9], every=(2, 3, 2)) == [
        ("log", 2, 2.0),
        ("evaluate", 2),
        ("save", 3),
        ("log", 4, 6.0),
        ("evaluate", 4),
        ("log", 5, 9.0),
        ("save", 5),
    ]


def test_steps_are_counted_from_where_the_run_goes_on():
    assert run([1, 3], start=3, every=(4, 4, 4))[:2] == [("log", 4, 1.0), ("evaluate", 4)]


def test_a_stop_saves_first():
    answers = itertools.chain([False, True], itertools.repeat(False))
    calls = run([1] * 5, every=(9, 9, 9), should_stop=lambda: next(answers))
    assert calls == [("save", 2)]


@pytest.mark.parametrize("every", [(4, 9, 9), (9, 4, 9), (1, 1, 1)])
def test_a_diverged_run_names_the_step_and_is_not_saved(every):
    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite.*learning_rate"):
        run([1, 1, np.nan, 1, 1], every=every)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with stopping() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        assert should_stop()
        assert signal.getsignal(number) is before  # a second one ends the program
    assert signal.getsignal(number) is before
    with stopping():
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
