"""The networks of text by name. No package carries their weights: they train in minutes."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from experiments.errors import SettingsError
from experiments.models.llama import Llama
from experiments.models.tagger import CELLS, Tagger
from experiments.models.transformer import Transformer
from experiments.text import corpus


class Entry(NamedTuple):
    """One network.

    Attributes:
      module: makes the Flax module, its loops as loops.
      text: reads what it trains on.
      length: of the texts that it trains on, in characters.
    """

    module: Callable[[], nn.Module]
    text: Callable[[], corpus.Labelled]
    length: int


def find(name: str) -> Entry:
    """The network of that name.

    Raises:
      SettingsError: there is none.
    """
    if name not in MODELS:
        raise SettingsError(f"there is no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def _tagger(cell: str) -> Entry:
    return Entry(
        lambda: Tagger(corpus.VOCABULARY, len(corpus.TAGS), cell=cell), corpus.python_source, 48
    )


MODELS = {
    "transformer": Entry(lambda: Transformer(corpus.VOCABULARY), corpus.language_reference, 64),
    "llama": Entry(lambda: Llama(corpus.VOCABULARY), corpus.language_reference, 64),
    **{f"{cell}_tagger": _tagger(cell) for cell in CELLS},
}
