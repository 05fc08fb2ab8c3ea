"""One step of the decoder of `decode.py` by llama.cpp, to time beside ours.

llama.cpp is called by its C interface.  Its library for Linux is in a package of npm, the writer of
its files in one of PyPI:

    pip install gguf && npm pack @node-llama-cpp/linux-x64 && tar xf node-llama-cpp-linux-x64-*.tgz
    python -m experiments.benchmarks.decode --batch 1 --llama-cpp package/bins/linux-x64

Its decoder turns queries and keys by their positions (RoPE), which ours does not; all else is the
same: weights, sizes, and the tokens in the cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NORMS = ("attn_norm", "ffn_norm")
NAMES = {
    "query": "attn_q", "key": "attn_k", "value": "attn_v", "out": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
TYPES = ("F32", "Q8_0", "Q4_0")


MOST_TOKENS = 512  # that llama.cpp takes in a call


class _Parameters(ctypes.Structure):
    """Passed by value, and opaque: with room for those of any version."""

    _fields_ = (("bytes", ctypes.c_byte * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (("tokens", ctypes.c_int32), *((f"at_{k}", ctypes.c_void_p) for k in range(6)))


def write(path: Path, params: Any, heads: int, of_type: str) -> None:
    """The decoder's parameters as a file of llama.cpp, all matrices of a type."""
    import gguf

    kind = gguf.GGMLQuantizationType[of_type]
    embedding = np.asarray(params["embedding"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(embedding.shape[1])
    writer.add_block_count(len(params["layers"]))
    writer.add_feed_forward_length(params["layers"][0]["up"].shape[1])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(embedding.shape[0])
    writer.add_tokenizer_model("none")

    def add(name: str, matrix: np.ndarray) -> None:
        matrix = np.ascontiguousarray(matrix, np.float32)
        if matrix.ndim > 1:
            matrix = gguf.quants.quantize(matrix, kind)
        writer.add_tensor(f"{name}.weight", matrix, raw_dtype=kind if matrix.ndim > 1 else None)

    ones = np.ones(embedding.shape[1], np.float32)
    add("token_embd", embedding)  # and the output, where that is not there
    add("output_norm", ones)
    for k, layer in enumerate(params["layers"]):
        for ours, theirs in NAMES.items():
            add(f"blk.{k}.{theirs}", np.asarray(layer[ours]).T)
        for norm in NORMS:
            add(f"blk.{k}.{norm}", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Library:
    """llama.cpp, with what of its interface is needed here.

    Args:
      folder: its shared libraries, those of ggml and of each processor.
      threads: that compute.
    """

    def __init__(self, folder: Path, threads: int):
        folder = folder.resolve()
        # One needs the next: each is found among those that are loaded.
        base, ggml, llama = (
            ctypes.CDLL(str(next(folder.glob(f"lib{name}*.so"))), ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml.v", "llama.v")
        )
        self._base, self._llama, self._threads = base, llama, threads
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda level, text, data: None
        )
        llama.llama_log_set(self._log, None)
        for name in ("model_default_params", "context_default_params"):
            getattr(llama, f"llama_{name}").restype = _Parameters
        for name in ("model_load_from_file", "init_from_model", "get_logits", "get_memory"):
            getattr(llama, f"llama_{name}").restype = ctypes.c_void_p
        llama.llama_batch_get_one.restype = _Batch

    def step(self, path: Path, context: int) -> Callable[[], np.ndarray]:
        """A step of the model in a file: the logits of a token after so many in the cache."""
        llama = self._llama
        model = llama.llama_model_load_from_file(
            str(path).encode(), llama.llama_model_default_params()
        )
        assert model, f"llama.cpp cannot read {path}"
        options = llama.llama_context_default_params()
        # The first field is the number of tokens that there is room for.
        ctypes.c_uint32.from_buffer(options).value = context + 1
        state = ctypes.c_void_p(llama.llama_init_from_model(ctypes.c_void_p(model), options))
        llama.llama_set_n_threads(state, self._threads, self._threads)
        memory = ctypes.c_void_p(llama.llama_get_memory(state))

        def decode(tokens: int) -> None:
            ids = (ctypes.c_int32 * tokens)()
            failed = llama.llama_decode(state, llama.llama_batch_get_one(ids, tokens))
            assert not failed, f"llama.cpp: {failed}"

        for first in range(0, context, MOST_TOKENS):
            decode(min(MOST_TOKENS, context - first))

        def run() -> np.ndarray:
            llama.llama_memory_seq_rm(memory, 0, context, -1)
            decode(1)
            logits = ctypes.cast(llama.llama_get_logits(state), ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(logits, (1,)).copy()

        return run
