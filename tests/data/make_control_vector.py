"""Makes tests/data/control_vector.npz: logits of a tiny model that llama.cpp steers with a control vector.

Run ``python -m tests.data.make_control_vector`` where llama-cpp-python and the test extra are installed; the committed
file was made with llama-cpp-python 0.3.36. It has ``ids`` (T,), ``directions`` (L - 1, E) of layers 1 and above,
``first`` and ``last`` (layers that are steered), and ``logits`` (T, V) of llama.cpp in float32.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

from tests.model import tiny_checkpoints, tiny_gguf

OUT = Path(__file__).parent / "control_vector.npz"
VARIANT, TOKENS, SIZE = "llama3", 9, 0.5


def main() -> None:
    """Write the file."""
    checkpoint = tiny_checkpoints.read(VARIANT)
    ids = np.asarray(checkpoint.ids)[:TOKENS]
    with tempfile.TemporaryDirectory() as directory:
        path = tiny_gguf.write_gguf(Path(directory) / "tiny.gguf", checkpoint)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        layers, width = llama_cpp.llama_model_n_layer(model), llama_cpp.llama_model_n_embd(model)
        directions = SIZE * np.random.default_rng(0).standard_normal((layers - 1, width)).astype(np.float32)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.type_k, params.type_v = 64, 0, 0  # keys and values in float32
        params.flash_attn_type = 0
        context = llama_cpp.llama_init_from_model(model, params)
        first, last = 1, layers - 1
        floats = directions.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(context, floats, directions.size, width, first, last) == 0
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), vocabulary)).copy()
    np.savez_compressed(OUT, ids=ids, directions=directions, first=first, last=last, logits=logits)


if __name__ == "__main__":
    main()
