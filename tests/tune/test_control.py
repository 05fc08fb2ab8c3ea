"""Accuracy control: a planted fault is repaired at its site alone, each step is told."""

import jax
import numpy as np
import pytest

import jaxquant
from jaxquant import stages
from jaxquant.progress import Progress
from jaxquant.tune.changes import changed_sites
from jaxquant.tune.goal import Goal
from tests.analysis import faults
from tests.analysis.test_analyze import FAULTS, accuracy, quantize, quantized

pytestmark = pytest.mark.filterwarnings("ignore:the quantized model's outputs")
GOAL = 0.03


def controlled(fault, goal, images=None, **settings):
    """A model under control; few candidates in the goal cost less: each is compiled."""
    settings = {
        "recover": ("bias_correction",),
        **settings,
    }  # what repairs unasked is not tested here
    config = jaxquant.QuantConfig(**fault.options, **settings)
    given, images = (fault.params, faults.apply_fn), fault.images if images is None else images
    observations = jaxquant.calibrate(*given, images, batch_size=256, progress=False, config=config)
    source, progress = stages.float_model(*given), Progress("quantize", shown=False)
    return stages.quantize(source, observations, config, None, progress, goal)


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_repaired_at_its_site_alone(plant):
    fault, full_qparams, full = quantized(plant)
    metric = accuracy(fault)
    goal = Goal(metric, GOAL, algos=("KL", "mse"), recovery=("equalization",))
    qparams, qapply = controlled(fault, goal)
    told = qapply.report().summary["control"]
    assert told["held"]
    assert told["int8_score"] < told["target"] <= told["score"]
    assert told["int8_score"] == metric(lambda x: full(full_qparams, x))
    assert told["score"] == metric(lambda x: qapply(qparams, x))
    assert told["ranking"][0] == fault.site
    programs = [each.program(fault.images[:256]) for each in (full, qapply)]
    assert changed_sites(*(each.binding for each in programs)) == (fault.site,)
    others = {row["name"] for row in qapply.report().rows if row["status"] == "float"}
    assert others <= {fault.site, *fault.options.get("skip", ())}
    text = str(qapply.report())
    assert all(f"{step['step']}, {step['detail']}" in text for step in told["steps"])
    assert "is held" in text
    rules = jaxquant.QuantConfig.from_json(
        jaxquant.QuantConfig(rules=qapply.report().rules).to_json()
    ).rules
    again, other = quantize(fault, rules=rules)
    assert rules
    assert other.plan == qapply.plan
    jax.tree.map(np.testing.assert_array_equal, again, qparams)


def test_nothing_is_tried_where_full_int8_holds():
    fault = faults.healthy()
    qapply = quantize(fault, metric=accuracy(fault), max_drop=0.05)[1]
    told = qapply.report().summary["control"]
    assert told["held"]
    assert told["steps"] == []


def test_the_same_call_gives_the_same_bits():
    fault = faults.rare_spike()
    goal = Goal(accuracy(fault), GOAL, algos=("KL", "mse"), recovery=())
    runs = [controlled(fault, goal) for _ in range(2)]
    first, second = (jax.tree.leaves(qparams) for qparams, _ in runs)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert runs[0][1].report().summary["control"] == runs[1][1].report().summary["control"]


def test_a_target_out_of_reach_warns_and_gives_the_best():
    fault = faults.outlier_input_channel()

    def lower(model):
        return accuracy(fault)(model) - 1.0 * is_int8(model)

    with pytest.warns(UserWarning, match="no step brings it there"):
        _, qapply = controlled(fault, Goal(lower, 0, algos=("KL", "mse"), recovery=()))
    told = qapply.report().summary["control"]
    assert not told["held"]
    assert told["score"] == max([told["int8_score"], *(step["score"] for step in told["steps"])])
    assert "is not reached" in str(qapply.report())


def is_int8(model) -> bool:
    """True for a whole int8 model; not for the float model or a mixture."""
    return isinstance(getattr(model, "func", None), jaxquant.run.qapply.QuantizedApply)


def test_no_step_is_begun_when_the_time_is_up():
    fault = faults.outlier_input_channel()
    with pytest.warns(UserWarning, match="time budget is spent"):
        _, qapply = quantize(fault, metric=accuracy(fault), max_drop=GOAL, time_budget=0)
    told = qapply.report().summary["control"]
    assert told["out_of_time"]
    assert told["steps"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": -1}, "max_drop is a finite number"),
        ({"max_drop": float("nan")}, "max_drop is a finite number"),
        ({"time_budget": "soon"}, "time_budget is a finite number"),
    ],
)
def test_bad_goals_are_refused(options, message):
    fault = faults.healthy()
    with pytest.raises(ValueError, match=message):
        quantize(fault, metric=accuracy(fault), **options)
    with pytest.raises(ValueError, match="give metric="):
        quantize(fault, time_budget=1)
    with pytest.raises(TypeError, match="metric is a function"):
        quantize(fault, metric=0.5)
    with pytest.raises(ValueError, match="has to be finite"):
        quantize(fault, metric=lambda model: np.inf)
