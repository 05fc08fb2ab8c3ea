r"""Times a loaded model against the one that was saved, in turns.

    python -m experiments.benchmarks.loaded --networks=mobilenet_v1,resnet50 --batches=1,8

Prints the medians of both and their ratio, with the weights packed as `qapply.prepare` does, and
how long saving and loading took.  They run the same program, so a ratio other than 1 is noise.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax

import jaxquant
from experiments.benchmarks.arguments import network_parser
from experiments.benchmarks.interleave import print_table, time_in_turn
from experiments.benchmarks.systems import Case


def measure(network: str, batch: int, rounds: int, weights: str | None) -> None:
    """Print the table of one network at one batch size."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(network, batch, Path(folder), weights)
        qparams, qapply = case.int8()
        path, start = Path(folder) / "model.safetensors", time.perf_counter()
        jaxquant.save_quantized_model(path, qparams, qapply, progress=False)
        saved = time.perf_counter()
        loaded, loaded_apply = jaxquant.load_quantized_model(path)
        done = time.perf_counter()
        before, after = qapply.prepare(qparams), loaded_apply.prepare(loaded)
        programs = {
            "before saving": lambda: qapply(before, case.x),
            "loaded": lambda: loaded_apply(after, case.x),
        }
        same = (jax.device_get(programs["before saving"]()) == programs["loaded"]()).all()
        medians = time_in_turn(programs, rounds)
        print_table(f"{network}, batch {batch}, {loaded_apply.backend}, same bits: {same}", medians)
        print(f"saved in {saved - start:.2f} s, loaded in {done - saved:.2f} s\n", flush=True)


def main(given: argparse.Namespace) -> None:
    weights = dict(given.weights)
    for network in given.networks:
        for batch in map(int, given.batches.split(",")):
            measure(network, batch, given.rounds, weights.get(network))


if __name__ == "__main__":
    parser = network_parser(__doc__, ("mobilenet_v1", "resnet50"), rounds=20)
    parser.add_argument("--batches", default="1,8", help="separated by commas")
    main(parser.parse_args())
