import importlib.util

import jax
import numpy as np
import pytest

from experiments.models.bert import PADDING, Bert
from experiments.models.transformer import stack
from experiments.text import minilm, similarity

SMALL = Bert(vocabulary=20, layers=2, width=8, heads=2, hidden=12, length=9)
IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, PADDING, PADDING]], np.int32)


def _arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """What a file of that size holds: Hugging Face's names, matrices [outputs, inputs]."""
    rng = np.random.default_rng(seed)
    dense = {
        "attention.self.query": (8, 8),
        "attention.self.key": (8, 8),
        "attention.self.value": (8, 8),
        "attention.output.dense": (8, 8),
        "intermediate.dense": (12, 8),
        "output.dense": (8, 12),
    }
    shapes = {
        "embeddings.word_embeddings.weight": (20, 8),
        "embeddings.position_embeddings.weight": (9, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "embeddings.LayerNorm.weight": (8,),
        "embeddings.LayerNorm.bias": (8,),
    }
    for layer in range(2):
        for name, shape in dense.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (8,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (8,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _layer_norm(x: np.ndarray, arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-12)
    return normal * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def _embedding(ids: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """One sentence without padding, from the file's arrays, as the paper has it: [D]."""

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    tables = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    words, positions, types = (arrays[name] for name in tables)
    x = words[ids] + positions[: len(ids)] + types[0]
    x = _layer_norm(x, arrays, "embeddings.LayerNorm")
    for layer in range(2):
        name = f"encoder.layer.{layer}"
        parts = [dense(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value")]
        query, key, value = (part.reshape(len(ids), 2, 4).swapaxes(0, 1) for part in parts)
        scores = query @ key.swapaxes(1, 2) / 2
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mixed = (weights @ value).swapaxes(0, 1).reshape(len(ids), 8)
        x = x + dense(mixed, f"{name}.attention.output.dense")
        x = _layer_norm(x, arrays, f"{name}.attention.output.LayerNorm")
        hidden = np.asarray(jax.nn.gelu(dense(x, f"{name}.intermediate.dense"), approximate=False))
        x = _layer_norm(
            x + dense(hidden, f"{name}.output.dense"), arrays, f"{name}.output.LayerNorm"
        )
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("scanned", [False, True])
def test_the_arrays_of_a_file_compute_what_bert_does(scanned: bool):
    arrays = _arrays()
    params = minilm.as_params(arrays, SMALL)
    given = stack(params) if scanned else params
    ours = SMALL.clone(scanned=scanned).apply({"params": given}, IDS)
    texts = [row[row != PADDING] for row in IDS]
    expected = [_embedding(text, arrays) for text in texts]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_the_parameters_are_all_of_the_model():
    template = jax.eval_shape(SMALL.init, jax.random.key(0), IDS)
    given = {"params": minilm.as_params(_arrays(), SMALL)}
    shapes = jax.tree.map(lambda leaf: leaf.shape, (template, given))
    assert shapes[0] == shapes[1]


def test_neighbours_and_noise():
    reference = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.1, 0.99]], np.float32)
    assert similarity.neighbours(reference).tolist() == [1, 0, 3, 2]
    assert similarity.kept(reference, reference[:, ::-1]) == 1.0
    assert similarity.kept(reference, reference[[0, 2, 1, 3]]) == 0.0
    np.testing.assert_allclose(similarity.sqnr_db(reference, 0.9 * reference), 20, atol=1e-4)


@pytest.mark.network
@pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="needs the tokenizers library"
)
def test_sentences_that_mean_the_same_are_near():
    module, variables = minilm.load()
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell today."]
    embedded = np.asarray(jax.jit(module.apply)(variables, minilm.tokenize(texts, multiple=16)))
    likeness = embedded @ embedded.T
    assert likeness[0, 1] > 0.6 > 0.2 > likeness[0, 2]
