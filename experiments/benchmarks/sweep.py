"""Times the calibration sweep against the float32 forward pass of the same batches.

    python -m experiments.benchmarks.sweep --model=efficientnet_lite0

About two minutes.  The weights are random: they do not change what is computed.  Also times the
int8 model on the batch.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from experiments import zoo
from experiments.benchmarks.interleave import print_table, time_in_turn
from jaxquant.backends import operations
from jaxquant.calibration import counting, histogram
from jaxquant.calibration.sweep import Sweep
from jaxquant.graph.model import FloatModel
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.observed import observed_tensors


def main(model: str, batch: int, rounds: int, full: bool) -> None:
    module = zoo.find(model).module()
    size = zoo.find(model).preprocessing.size
    x = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.asarray(x[:1]))
    forward = jax.jit(module.apply)
    config = QuantConfig(is_full_quantize=full)
    tensors_of = functools.partial(observed_tensors, config=config)
    count = operations.counter(counting.portable_counts, histogram.MIN_EXPONENT)
    sweep = Sweep(FloatModel(module.apply, variables), tensors_of, count=count)
    qparams, qapply = jaxquant.quant_post(
        variables, module.apply, [x], is_full_quantize=full, progress=False
    )

    def observe() -> jax.Array:
        sweep.add((x,))
        return sweep.state.lo

    medians = time_in_turn(
        {
            "forward, float32": lambda: forward(variables, x),
            "calibration sweep": observe,
            "int8 model": lambda: qapply(qparams, x),
        },
        rounds,
    )
    print_table(f"{model}, batch {batch}, {rounds} rounds, full={full}", medians)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    main(arguments.model, arguments.batch, arguments.rounds, arguments.full)
