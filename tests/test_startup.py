"""Starting costs little and decoding allocates nothing: what is imported, what is compiled, what a token takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.model import tiny
from tests.processes import ROOT, python

HEAVY = {
    "gguf", "httpx2", "huggingface_hub", "jinja2", "llvmlite", "matplotlib", "numba", "numpy", "pandas", "psutil",
    "rich", "safetensors", "threadpoolctl", "tokenizers", "torch", "tqdm", "transformers",
}  # fmt: skip


def _python(program: str, *arguments: str, **environment: str) -> Any:
    """Run a program in a process of its own; what it prints as JSON."""
    return json.loads(python("-c", program, *arguments, **environment).splitlines()[-1])


# --- importing ---------------------------------------------------------------------------------------------------

IMPORTED = """
import json, sys
{statement}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


@pytest.mark.parametrize(
    ("statement", "needed"),
    [
        ("import ruvllm; ruvllm.__version__, dir(ruvllm)", set()),
        ("from ruvllm import ModelFormatError, RuvllmError", set()),
        ("import ruvllm.model, ruvllm.checkpoint, ruvllm.cli", set()),
        ("import ruvllm.kernels", set()),
        ("from ruvllm.kernels import rms_norm", {"numpy", "numba", "llvmlite"}),
        ("from ruvllm import Llama", {"numpy", "numba", "llvmlite"}),
    ],
)
def test_importing_brings_in_no_more_than_it_needs(statement: str, needed: set[str]) -> None:
    """NumPy and Numba take a second; a name of the package is fetched when it is first used."""
    brought = set(_python(IMPORTED.format(statement="pass")))
    assert (set(_python(IMPORTED.format(statement=statement))) - brought) & HEAVY == needed


NOTHING_COMPILED = """
import json
from numba.core import event
with event.install_recorder("numba:run_pass") as passes:
    import ruvllm
    from ruvllm import load, LLM, Llama, KVCache, warmup
    import ruvllm.kernels, ruvllm.model, ruvllm.loading, ruvllm.cli.talk
    from ruvllm.kernels.jit.decorators import COMPILED
print(json.dumps([len(passes.buffer), sum(len(function.signatures) for function in COMPILED), len(COMPILED)]))
"""


def test_importing_compiles_nothing() -> None:
    passes, signatures, functions = _python(NOTHING_COMPILED)
    assert (passes, signatures) == (0, 0)
    assert functions > 50


# --- a second start ----------------------------------------------------------------------------------------------

GENERATE = """
import hashlib, json, sys
from numba.core import event
with event.install_recorder("numba:run_pass") as passes:
    import ruvllm
    llm = ruvllm.load(sys.argv[1], threads=int(sys.argv[2]), progress=False)
    options = dict(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=11, logprobs=2)
    answer = llm.generate("Once upon a time", max_tokens=60, **options)
    logits = llm.logits(range(90))
print(json.dumps({"passes": len(passes.buffer), "text": answer.text, "ids": answer.ids, "logprobs": answer.logprobs,
                  "logits": hashlib.sha256(logits.tobytes()).hexdigest()}))
"""


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_later_starts_compile_nothing_and_say_the_same(dtype: str, tmp_path: Path) -> None:
    """Bit for bit in each process, whose addresses are random, and with one thread or two; same seed, same text."""
    path = str(tiny.write_gguf("mlp_bias_f16", tmp_path / "tiny.gguf", dtype))
    first = _python(GENERATE, path, "2", NUMBA_NUM_THREADS="2")
    assert len(first["ids"]) >= 1
    expected = {**first, "passes": 0}
    for threads in ("2", "1"):
        assert _python(GENERATE, path, threads, NUMBA_NUM_THREADS=threads) == expected


SPEAK = """
import json, sys, ruvllm
models = [ruvllm.load(path, weights=weights, progress=False) for path, weights in zip(sys.argv[1::2], sys.argv[2::2])]
print(json.dumps([llm.generate("Once upon a time", max_tokens=20, temperature=0).text for llm in models]))
"""


def test_models_of_several_kinds_live_in_one_process(tmp_path: Path) -> None:
    """Each says what it says alone, whichever was loaded first."""
    kinds = {
        kind: (str(tiny.write_gguf("mlp_bias_f16", tmp_path / f"{kind}.gguf", kind)), weights)
        for kind, weights in (("F32", "auto"), ("Q8_0", "auto"), ("Q4_0", "int4"))
    }
    alone = {kind: _python(SPEAK, *kinds[kind])[0] for kind in kinds}
    for order in (list(kinds), list(kinds)[::-1]):
        assert _python(SPEAK, *(x for kind in order for x in kinds[kind])) == [alone[kind] for kind in order]


# --- a token -----------------------------------------------------------------------------------------------------

DECODE = """
import json, sys, tracemalloc
import numpy as np
from numba.core.runtime import rtsys
from ruvllm.model import Llama, ModelConfig
config = ModelConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=2048,
)
model = Llama(config, layout=sys.argv[1])
cache = model.new_cache(1100, sys.argv[2])
logits = np.empty(config.vocab_size, np.float32)
token = np.array([7])
model.forward(np.arange(900) % 4096, cache, last_only=True, out=logits)
for _ in range(3):
    model.forward(token, cache, last_only=True, out=logits)
buffers = {key: id(value) for key, value in cache._buffers.items()}
tables = [id(table) for table in model.rope.upto(1, cache.max_tokens)]
tracemalloc.start()
inside = rtsys.get_allocation_stats()
start, peaks = tracemalloc.get_traced_memory()[0], []
for _ in range(60):
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    model.forward(token, cache, last_only=True, out=logits)
    peaks.append(tracemalloc.get_traced_memory()[1] - before)
print(json.dumps({
    "token": min(peaks), "left": tracemalloc.get_traced_memory()[0] - start,
    "compiled": rtsys.get_allocation_stats().alloc - inside.alloc,
    "same buffers": buffers == {key: id(value) for key, value in cache._buffers.items()},
    "same tables": tables == [id(table) for table in model.rope.upto(1, cache.max_tokens)],
}))
"""


@pytest.mark.parametrize(("layout", "kv"), [("f32", "f32"), ("int4", "f16")])
def test_a_token_allocates_nothing_on_its_way_through_the_layers(layout: str, kv: str) -> None:
    """Neither in Python nor in compiled code: less than the smallest array in it."""
    found = _python(DECODE, layout, kv, NUMBA_NRT_STATS="1")
    assert found["same buffers"] and found["same tables"]
    assert found["compiled"] == 0
    assert found["token"] < 1024 * 4  # bytes of the hidden state
    assert found["left"] < 4 * 1024 * 4  # after sixty tokens


# --- notebooks ---------------------------------------------------------------------------------------------------

IN_A_NOTEBOOK = """
import importlib, json, pkgutil, sys, types, warnings
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")  # by this one or the other, tqdm knows a notebook
sys.modules["ipywidgets"] = None  # is not installed
import ruvllm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import tqdm
print(json.dumps([str(w.message) for w in caught if issubclass(w.category, tqdm.TqdmWarning)]))
"""


def test_a_notebook_without_widgets_is_no_reason_for_a_warning() -> None:
    """tqdm.auto warns when it is first imported there: so one module does that, quietly, for all."""
    users = {path for path in (ROOT / "ruvllm").rglob("*.py") if "tqdm" in path.read_text()}
    direct = {path for path in users if "tqdm.auto" in path.read_text()}
    assert direct == {ROOT / "ruvllm" / "progress.py"} and len(users) > 5
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(users)]
    assert _python(IN_A_NOTEBOOK, *[name for name in names if not name.endswith(".progress")]) == []


# --- idle threads ------------------------------------------------------------------------------------------------

SPINNING = """
import json, os, ruvllm, sys
from ruvllm.spinning import environment_of_others
names = "GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT"
print(json.dumps([[os.environ.get(n) for n in names], [environment_of_others().get(n) for n in names]]))
"""


@pytest.mark.parametrize(
    ("of_user", "here"),
    [
        ({}, ["30000", "18"]),
        ({"GOMP_SPINCOUNT": "7", "OPENBLAS_THREAD_TIMEOUT": "4"}, ["7", "4"]),
        ({"OMP_WAIT_POLICY": "active"}, [None, "18"]),
    ],
)
def test_idle_threads_spin_for_less_unless_the_user_has_said_how_long(
    monkeypatch: pytest.MonkeyPatch, of_user: dict[str, str], here: list[str | None]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    found = _python(SPINNING, **of_user)
    assert found == [here, [of_user.get("GOMP_SPINCOUNT"), of_user.get("OPENBLAS_THREAD_TIMEOUT")]]
