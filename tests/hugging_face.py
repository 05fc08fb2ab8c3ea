"""Quantize small Flax models of Hugging Face's `transformers`, as that package has them.

Prints a line of JSON for each, `{"model": ..., "mode": ..., "sqnr": ..., "int8": ...}`; for a
generation loop "same" in place of the SQNR, the part of the tokens that stay.  Run by
`tests/test_hugging_face.py` in an environment that has the package.
"""

import functools
import importlib
import json
import warnings

import numpy as np

import jaxquant

TOKENS, LENGTH = 100, 16
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
WORDS = {"vocab_size": TOKENS, "max_position_embeddings": 32, **SIZES, "intermediate_size": 128}


@functools.cache
def hugging_face():
    """The package, which says in warnings that its Flax models are its last ones."""
    warnings.simplefilter("ignore")
    return importlib.import_module("transformers")


def text(seed):
    """Three sentences, two of them padded."""
    ids = np.random.default_rng(seed).integers(1, TOKENS, (3, LENGTH)).astype(np.int32)
    lengths = np.array([[LENGTH], [LENGTH - 3], [5]])
    return {"input_ids": ids, "attention_mask": (np.arange(LENGTH) < lengths).astype(np.int32)}


def images(seed):
    pixels = np.random.default_rng(seed).normal(size=(2, 3, 32, 32)).astype(np.float32)
    return {"pixel_values": pixels}


def gpt2():
    config = hugging_face().GPT2Config(
        vocab_size=TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=32
    )
    return hugging_face().FlaxGPT2LMHeadModel(config, seed=0)


MODELS = {
    "bert": (
        lambda: hugging_face().FlaxBertModel(hugging_face().BertConfig(**WORDS), seed=0),
        text,
        "last_hidden_state",
    ),
    "gpt2": (gpt2, text, "logits"),
    "llama": (
        lambda: hugging_face().FlaxLlamaForCausalLM(
            hugging_face().LlamaConfig(**WORDS, num_key_value_heads=2), seed=0
        ),
        text,
        "logits",
    ),
    "vit": (
        lambda: hugging_face().FlaxViTModel(
            hugging_face().ViTConfig(**SIZES, intermediate_size=128, image_size=32, patch_size=8),
            seed=0,
        ),
        images,
        "last_hidden_state",
    ),
}


def quantize(mode, params, apply_fn, batches):
    if mode == "static":
        return jaxquant.quant_post(params, apply_fn, batches, progress=False)
    make = jaxquant.quant_dynamic if mode == "dynamic" else jaxquant.quant_weights
    return make(params, apply_fn, batches[:1], progress=False)


def show(name, mode, qapply, **figures):
    sites = qapply.report().summary["sites_int8"]
    print(json.dumps({"model": name, "mode": mode, "int8": sites, **figures}), flush=True)


def main():
    for name, (make, inputs, output) in MODELS.items():
        model = make()

        def apply_fn(params, x, model=model, output=output):
            return model(**x, params=params)[output]

        x = inputs(9)
        wanted = np.asarray(apply_fn(model.params, x), np.float64)
        for mode in ("static", "dynamic", "weights"):
            batches = [inputs(seed) for seed in range(4)]
            qparams, qapply = quantize(mode, model.params, apply_fn, batches)
            noise = np.square(wanted - np.asarray(qapply(qparams, x))).sum()
            show(name, mode, qapply, sqnr=10 * np.log10(np.square(wanted).sum() / noise))

    model = gpt2()

    def generate(params, ids):
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, params=params, **settings).sequences

    ids = text(0)["input_ids"]
    qparams, qapply = quantize("static", model.params, generate, [ids])
    same = np.mean(np.asarray(qapply(qparams, ids)) == np.asarray(generate(model.params, ids)))
    show("gpt2, generate", "static", qapply, same=float(same))


if __name__ == "__main__":
    main()
