"""The table of recovery steps: what runs, in which order, and what is said of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxquant
from jaxquant.plan.rules import RECOVERY_STEPS
from jaxquant.recover import steps
from jaxquant.recover.step import Draft, Step, Task

PARAMS = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
X = jax.random.normal(jax.random.key(1), (16, 8))


def apply_fn(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w"])


def test_the_table_has_a_step_for_every_name():
    assert [name for step in steps.STEPS for name in step.names] == list(RECOVERY_STEPS)


def test_a_step_is_what_its_file_says(monkeypatch: pytest.MonkeyPatch):
    """Asked for, it runs in its place and says what it did; else it does not run."""

    def halve(task: Task, draft: Draft) -> Draft:
        assert "equalization" in draft.notes  # which stands before it
        assert "bias_correction" not in draft.notes
        sites = {name: dict(arrays) for name, arrays in draft.qparams["sites"].items()}
        sites["w"]["multiplier"] = sites["w"]["multiplier"] / 2
        return draft.replaced("halve", "1 site", qparams={**draft.qparams, "sites": sites})

    step = Step(names=("halve",), run=halve)
    before, after = steps.STEPS[:-1], steps.STEPS[-1:]
    names = dict.fromkeys([*RECOVERY_STEPS][:-1]) | {"halve": ""} | dict.fromkeys(after[0].names)
    monkeypatch.setattr(steps, "STEPS", (*before, step, *after))
    for module in ("rules", "plan"):
        monkeypatch.setattr(f"jaxquant.plan.{module}.RECOVERY_STEPS", names)

    def run(*recover: str) -> tuple[Any, Any]:
        return jaxquant.quant_post(PARAMS, apply_fn, [X], recover=recover, progress=False)

    plain, _ = run("equalization")
    halved, qapply = run("halve", "equalization")
    assert jnp.array_equal(
        halved["sites"]["w"]["multiplier"] * 2, plain["sites"]["w"]["multiplier"]
    )
    assert qapply.report().summary["recovery"]["halve"] == "1 site"


def test_a_step_that_lacks_a_package_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    def check() -> None:
        raise ImportError("no such package")

    adaround = next(step for step in steps.STEPS if "adaround" in step.names)
    monkeypatch.setattr(steps, "STEPS", (adaround._replace(check=check),))
    steps.check_steps(("bias_correction",))
    with pytest.raises(ImportError, match="no such package"):
        steps.check_steps(("adaround", "bias_correction"))


def test_a_draft_stays_as_it_is():
    draft = Draft(program=None, qparams={"a": 1}, notes={"first": "x"})  # type: ignore[arg-type]
    changed = draft.replaced("second", "y", qparams={})
    assert (draft.qparams, draft.notes) == ({"a": 1}, {"first": "x"})
    assert changed.notes == {"first": "x", "second": "y"}
