"""Times quant_post from call to return against NNCF on the same network and images.

    python -m experiments.benchmarks.quantization_time --networks=resnet50,mobilenet_v2

Compilation is part of both.  NNCF (with OpenVINO) has to be installed; its defaults, too.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import jaxquant
from experiments.benchmarks.arguments import network_parser
from experiments.benchmarks.systems import Case

NETWORKS = ("resnet50", "mobilenet_v1", "mobilenet_v2", "efficientnet_lite0")
IMAGES, BATCH = 100, 10


def seconds(function: Callable[[], object]) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def programs(case: Case) -> dict[str, Callable[[], object]]:
    import nncf
    import openvino as ov

    size = case.images.shape[1]
    images = np.random.default_rng(2).normal(size=(IMAGES, size, size, 3)).astype(np.float32)
    batches = images.reshape(IMAGES // BATCH, BATCH, size, size, 3)
    first = images.transpose(0, 3, 1, 2)[:, None]
    model = ov.Core().read_model(case.float_onnx())

    def ours(**options: object) -> object:
        return jaxquant.quant_post(
            case.variables, case.module.apply, list(batches), progress=False, **options
        )

    return {
        "NNCF": lambda: nncf.quantize(model.clone(), nncf.Dataset(list(first)), subset_size=IMAGES),
        "quant_post": ours,
        "quant_post, no recovery": lambda: ours(recover=()),
    }


def main(networks: list[str], rounds: int, weights: dict[str, str]) -> None:
    print(f"jax {jax.__version__}, {IMAGES} images, {rounds} rounds")
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            runs = programs(Case(network, BATCH, Path(folder), weights.get(network)))
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(rounds):
                for name, run in runs.items():
                    times[name].append(seconds(run))
        base = statistics.median(times["NNCF"])
        for name, values in times.items():
            median = statistics.median(values)
            print(f"{network:20}{name:26}{median:8.1f} s{median / base:8.2f}", flush=True)


if __name__ == "__main__":
    given = network_parser(__doc__, NETWORKS, rounds=1).parse_args()
    main(given.networks, given.rounds, dict(given.weights))
