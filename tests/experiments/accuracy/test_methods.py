import jax
import pytest

import jaxquant
from experiments.accuracy import methods
from experiments.accuracy.methods import METHODS, Method
from jaxquant.calibration.observers import find_observer


def test_names_can_be_listed_with_commas_and_are_single():
    names = [method.name for method in METHODS]
    assert len(set(names)) == len(names)
    assert "," not in "".join(names)
    pairs = {(m.options["algo"], m.options.get("is_full_quantize", False)) for m in METHODS}
    assert {(a, full) for a in ("KL", "abs_max") for full in (False, True)} <= pairs


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_option_is_one_of_the_library(method):
    methods.check(method)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_what_keeps_statistics_of_its_own_is_calibrated_with(method):
    observer = find_observer(method.options["algo"], 0.99999)
    given = method.calibration.get("algo", "KL")
    assert observer.keeps_histogram or given == method.options["algo"]


def test_an_option_that_no_step_takes_is_named():
    with pytest.raises(ValueError, match="'odd': no step of jaxquant takes agro"):
        methods.check(Method("odd", {"agro": "KL", "skip": ()}))


def test_methods_that_observe_the_same_share_a_calibration():
    method = Method("x", {"algo": "KL", "is_full_quantize": True})
    assert method.calibration == {"is_full_quantize": True}


def test_methods_are_chosen_in_their_own_order():
    assert methods.choose([]) == list(METHODS)
    assert [m.name for m in methods.choose(["abs_max", "KL"])] == ["KL", "abs_max"]
    with pytest.raises(ValueError, match="did you mean 'abs_max'"):
        methods.choose(["absmax"])


def test_each_method_is_varied_with_each_recovery():
    chosen = methods.choose(["KL", "abs_max"])
    assert methods.with_recovery(chosen, []) == chosen
    varied = methods.with_recovery(chosen, ["none", "equalization+bias_correction"])
    assert [m.name for m in varied] == [
        "KL recover=none",
        "KL recover=equalization+bias_correction",
        "abs_max recover=none",
        "abs_max recover=equalization+bias_correction",
    ]
    assert varied[1].options == {"algo": "KL", "recover": ["equalization", "bias_correction"]}
    for method in varied:
        methods.check(method)
    with pytest.raises(ValueError, match="did you mean 'equalization'"):
        methods.with_recovery(chosen, ["equalisation+bias_correction"])


def test_the_recovery_steps_are_those_of_the_library():
    one = {"w": jax.numpy.eye(4)}, lambda p, x: x @ p["w"], [jax.numpy.ones((2, 4))]
    with pytest.raises(ValueError) as error:
        jaxquant.quant_post(*one, recover=("nothing",), progress=False)
    for step in methods.RECOVERY_STEPS:
        assert step in str(error.value)
