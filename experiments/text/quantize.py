"""Trains a network of text and quantizes it in every mode.

    python -m experiments.text.quantize transformer llama lstm_tagger --steps 1500

Prints the accuracy at held-out characters in float32 and in each mode, how many sites are quantized
and the SQNR of the logits, for the network with its loops and, with `--unrolled`, for the same one
in a Python loop.  Of a network that goes on with texts also what it makes of the beginning of a
sentence.
Two to five minutes a network on two CPU cores; `--steps 0` leaves the weights random.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jaxquant
from experiments.models import decoder, transformer
from experiments.text import corpus, zoo
from experiments.text.train import accuracy, train

CALIBRATION, EVALUATION = 100, 500  # texts
PROMPT = "The statement "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(zoo.MODELS), metavar="MODEL")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--unrolled", action="store_true", help="the Python loops as well")
    arguments = parser.parse_args()
    for name in arguments.models:
        entry = zoo.find(name)
        training, held_out = entry.text().split()
        module = entry.module()
        params = train(module, training, entry.length, arguments.steps, show=_show)
        windows = held_out.windows(entry.length)
        windows = corpus.Labelled(*(x[:EVALUATION] for x in windows[:2]), windows.num_classes)
        calibration = training.windows(entry.length).ids[:CALIBRATION]
        print(f"{name}: the loop as it is")
        _print_modes(module, params, calibration, windows)
        if arguments.unrolled:
            print(f"{name}: unrolled")
            _print_modes(*unrolled(module, params), calibration, windows)
        if isinstance(module, decoder.Decoder):
            model = module.clone(decode=True)
            ids = corpus.encode(PROMPT)[None]
            print(corpus.decode(np.asarray(decoder.generate(model, params, ids, model.length))[0]))


def unrolled(module: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The network with a Python loop in the place of its scan, and its parameters."""
    if isinstance(module, decoder.Decoder):
        return module.clone(scanned=False), transformer.unstack(params)
    return module.clone(unrolled=True), params


def quantized(
    apply_fn: Callable[..., jax.Array], params: Any, ids: np.ndarray | Sequence[np.ndarray]
) -> Iterator[tuple[str, Any, jaxquant.QuantizedApply]]:
    """The network in each mode: (its name, qparams, qapply).

    Args:
      apply_fn: (params, ids int32[B, T]) -> logits.
      params: of it.
      ids: the texts to calibrate on, or batches of them.
    """
    quiet = {"progress": False}
    yield "static", *jaxquant.quant_post(params, apply_fn, ids, **quiet)
    yield (
        "static, full",
        *jaxquant.quant_post(params, apply_fn, ids, is_full_quantize=True, **quiet),
    )
    yield "dynamic", *jaxquant.quant_dynamic(params, apply_fn, ids, **quiet)
    yield "8-bit weights", *jaxquant.quant_weights(params, apply_fn, ids, **quiet)
    yield (
        "4-bit weights, groups of 32",
        *jaxquant.quant_weights(params, apply_fn, ids, weight_bits=4, group_size=32, **quiet),
    )


def _print_modes(
    module: nn.Module, params: Any, calibration: np.ndarray, windows: corpus.Labelled
) -> None:
    def apply_fn(params: Any, ids: jax.Array) -> jax.Array:
        return module.apply({"params": params}, ids)

    reference = jax.jit(apply_fn)
    print(f"  float32: {accuracy(lambda ids: reference(params, ids), windows):.2%}")
    for mode, qparams, qapply in quantized(apply_fn, params, calibration):
        score = accuracy(lambda ids, q=qparams, f=qapply: f(q, ids), windows)
        told = qapply.report().summary
        sites = told["sites_int8"], told["sites_int8"] + told["sites_float"]
        print(
            f"  {mode}: {score:.2%}, {sites[0]} of {sites[1]} sites, "
            f"{told['output_sqnr_db']:.1f} dB, {told['bytes_after'] / 1e3:.0f} kB",
            flush=True,
        )


def _show(step: int, loss: float) -> None:
    print(f"  step {step}: loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
