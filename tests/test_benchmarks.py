"""The comparisons with peers: what they measure is what they say, and they run where a peer is not installed."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import ruvllm
from benchmarks import _engines, _kernel_cases, _perplexity, kernels, make_7b, peers
from benchmarks._engines import LlamaCpp, Ruvllm, file_bytes_per_token
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.kernels import KERNELS
from ruvllm.lab.peaks import Level, Peaks
from ruvllm.report import gguf_file

TINY = dataclasses.replace(
    make_7b.SEVEN_B, vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=3, head_dim=32, rms_norm_eps=2**-16, name="tiny",
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    make_7b.write(path, TINY, progress=False)
    return path


def test_synthetic_file_is_a_model_of_the_shape_asked_for(tiny: Path) -> None:
    llm = ruvllm.load(tiny, weights="f32")
    assert dataclasses.replace(llm.config, name="tiny") == TINY
    logits = llm.logits(np.arange(40) + 200)
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
    assert len(set(gguf_file.vocabulary(32000))) == 32000
    assert llm.tokenizer.decode(llm.tokenizer.encode("Hi, you", add_special=False)).strip() == "Hi, you"


def test_random_blocks_have_the_deviation_asked_for() -> None:
    blocks = make_7b.random_blocks(np.random.default_rng(0), 64, 1024).reshape(-1, gguf_file.BLOCK_BYTES)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float64) - 8
    assert (scales * codes).std() == pytest.approx(1 / 32, rel=0.1)


def test_bytes_per_token_leave_out_an_embedding_that_is_not_the_head(tiny: Path) -> None:
    E, F, V, L = 96, 160, 300, 2
    matrices = L * (4 * E * E + 3 * E * F) + V * E
    assert file_bytes_per_token(tiny) == matrices * 18 // 32 + 4 * E * (2 * L + 1)
    with GGUFFile(tiny) as file:
        whole = sum(tensor.nbytes for tensor in file.tensors.values())
    assert whole - file_bytes_per_token(tiny) == V * E * 18 // 32


def test_a_turn_leaves_the_cache_as_it_was(tiny: Path) -> None:
    engine = Ruvllm()
    engine.load(tiny, threads=1, context=40)
    assert engine.prefill(list(range(10))) > 0
    for kind in ("prefill", "decode"):
        assert peers._turn(engine, kind, [1, 2, 3], held=10) > 0
        assert engine._cache.length == 10


def test_table_without_llama_cpp(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = peers.measure([Ruvllm()], "tiny", tiny, ["prefill-32", "decode"], threads=1, rounds=2)
    out = capsys.readouterr().out.splitlines()
    assert [len(line.split("|")) for line in [*peers.table_head().splitlines(), *out]] == [11] * 4
    assert all("not installed" in line for line in out)
    assert [len(row.seconds["ruvllm"]) for row in rows] == [2, 2]
    assert json.loads(json.dumps(rows[1].record()))["ratio"] is None


def test_ratio_and_share_of_the_bandwidth() -> None:
    row = peers.Row("m", "decode", 1, tokens=32)
    row.seconds = {"ruvllm": [0.32, 0.16, 9.0], "llama.cpp": [0.64, 0.64, 0.1]}
    row.bandwidth, row.weight_bytes = [1e10, 2e10, 3e10], {"ruvllm": 10**8, "llama.cpp": 5 * 10**7}
    assert row.ratio() == pytest.approx(2)
    assert row.share("ruvllm") == pytest.approx(0.5)
    assert row.share("llama.cpp") == pytest.approx(0.125)
    row.case = "prefill-32"
    assert row.share("ruvllm") is None


def test_missing_llama_cpp_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(_engines, "WORKER", worker)
    worker.write_text("import json; input(); print(json.dumps({'error': 'no llama_cpp', 'missing': True}))")
    with pytest.raises(ModuleNotFoundError, match="no llama_cpp"):
        LlamaCpp()
    worker.write_text("import sys; input(); sys.exit('broken')")
    with pytest.raises(RuntimeError, match="its process ended during 'hello': broken"):
        LlamaCpp()


@pytest.mark.parametrize("options", [["--models", "Q3_K"], ["--threads", "0"], ["--cases", "prefill"]])
def test_wrong_options_are_one_line(options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=options[0]):
        peers.run(peers.parser().parse_args(options), None)
    assert peers.main([*options, "--llama-python", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_perplexity_text_is_the_same_each_time() -> None:
    text = _perplexity.read("pydoc")
    assert len(text) == 20_000 and _perplexity.sha256(text) == _perplexity.sha256(_perplexity.read("pydoc"))


# --- benchmarks.kernels ------------------------------------------------------------------------------------------


def test_table_of_kernels(capsys, tmp_path, monkeypatch) -> None:
    """A plain kernel, one on packed weights and one that has no peer in NumPy, without PyTorch."""
    peaks = Peaks(1, 1e12, 1e12, (Level("memory", float("inf"), 1e12),))
    monkeypatch.setattr(kernels, "measure_peaks", lambda threads: peaks)
    monkeypatch.setattr(kernels, "Torch", _without_torch)
    some = (
        _kernel_cases.Case("gemm", "gemm", {"m": 5, "n": 6, "k": 7}, seed=1e-6),
        _kernel_cases.Case("linear", "gemm_nt", {"m": 3, "n": 20, "k": 30}, packed=True),
        _kernel_cases.Case("norm", "silu_mul", {"rows": 2, "n": 33}),
    )
    monkeypatch.setattr(_kernel_cases, "CASES", some)
    out = tmp_path / "rows.json"
    assert kernels.main(["--quick", "--only", "gemm,linear,norm", "--threads", "1,2", "--json", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 and all(kernels.NOT_INSTALLED in line for line in lines[2:])
    rows = json.loads(out.read_text())["rows"]
    assert [row["threads"] for row in rows] == [1, 2] * 3
    assert all(row["call"]["median"] > 0 and row["kernel"] > 0 for row in rows if row["threads"] == 1)
    assert [sorted(row["peers"]) for row in rows] == [["numpy"]] * 4 + [[]] * 2
    assert rows[0]["seed"] == 1e-6 and rows[0]["ratio"] > 0 and rows[-1]["ratio"] is None


def _without_torch(python: str) -> None:
    raise ModuleNotFoundError


def test_every_case_of_kernels_has_the_sizes_of_its_record() -> None:
    for case in _kernel_cases.CASES:
        assert tuple(sorted(case.sizes)) == tuple(sorted(KERNELS[case.kernel].axes)), case.label


def test_groups_of_kernels_that_are_unknown(capsys) -> None:
    assert kernels.main(["--only", "gem", "--torch-python", sys.executable]) == 2
    assert "--only: expected some of gemm,linear" in capsys.readouterr().err
