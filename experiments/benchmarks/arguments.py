"""The command line that benchmarks of whole networks share."""

import argparse
from collections.abc import Sequence


def network_parser(
    description: str, networks: Sequence[str], rounds: int
) -> argparse.ArgumentParser:
    """A parser with `--networks` and `--rounds`, of these defaults, and `--weights`.

    It gives `networks` as a list and `weights` as (network, file) pairs.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), default=list(networks),
        help="separated by commas",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--weights", type=_weights, action="append", default=[], metavar="NETWORK=FILE",
        help="the weight file of a network; may be given several times",
    )  # fmt: skip
    return parser


def _weights(text: str) -> tuple[str, str]:
    network, separator, file = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NETWORK=FILE")
    return network, file
