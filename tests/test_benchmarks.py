"""Benchmarks against peers measure what they say, and run where a peer is not installed."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import ruvllm
from benchmarks import _files, _perplexity, kernels, make_7b, peers
from benchmarks._table import NOT_INSTALLED, table_head
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.kernels import KERNELS
from ruvllm.measure import gguf_file, workers
from ruvllm.measure.engines import IkLlamaCpp, LlamaCpp, Ruvllm, file_bytes_per_token
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.measure.peers import relative_error
from ruvllm.report.rust_report import RUST_ZEN4

TINY = dataclasses.replace(
    make_7b.SEVEN_B, vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=3, head_dim=32, rms_norm_eps=2**-16, name="tiny",
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    make_7b.write(path, TINY, progress=False)
    return path


def test_synthetic_file_is_a_model_of_the_given_shape(tiny: Path) -> None:
    llm = ruvllm.load(tiny, weights="f32")
    assert dataclasses.replace(llm.config, name="tiny") == TINY
    logits = llm.logits(np.arange(40) + 200)
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10
    assert len(set(gguf_file.vocabulary(32000))) == 32000
    assert llm.tokenizer.decode(llm.tokenizer.encode("Hi, you", add_special=False)).strip() == "Hi, you"


def test_random_blocks_have_the_given_deviation() -> None:
    blocks = make_7b.random_blocks(np.random.default_rng(0), 64, 1024).reshape(-1, make_7b.BLOCK_BYTES)
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
    engine.append(list(range(10)))
    for kind in ("prefill", "decode"):
        assert engine.seconds(kind, [1, 2, 3], cached=10) > 0
        assert engine.cache.length == 10


def test_table_without_llama_cpp(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = peers.measure([Ruvllm()], "tiny", tiny, ["prefill-32", "decode"], threads=1, rounds=2)
    out = capsys.readouterr().out.splitlines()
    head = table_head(peers.headings(["llama.cpp"])).splitlines()
    assert [len(line.split("|")) for line in [*head, *out]] == [11] * 4
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
    worker = tmp_path / "llama_worker.py"
    monkeypatch.setattr(workers, "_PROGRAMS", tmp_path)
    worker.write_text("import json; input(); print(json.dumps({'error': 'no llama_cpp', 'missing': True}))")
    with pytest.raises(ModuleNotFoundError, match="no llama_cpp"):
        LlamaCpp()
    worker.write_text("import sys; input(); sys.exit('broken')")
    with pytest.raises(RuntimeError, match="its process ended during 'hello': broken"):
        LlamaCpp()


def llama_bench(path: Path, text: str = '[{"build_commit": "c0ffee", "build_number": 7, "samples_ns": [%d]}]') -> str:
    """A stand-in for ik_llama.cpp's program: 10 ms a token; its arguments go to a file beside it."""
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        "a = sys.argv[1:]\nwith Path(__file__ + '.log').open('a') as log: print(*a, file=log)\n"
        "tokens = int(a[a.index('-gp') + 1].split(',')[1]) if '-gp' in a else int(a[a.index('-p') + 1])\n"
        f"text = {text!r}\nprint(text % (tokens * 10_000_000) if '%' in text else text)\n"
        "sys.exit(print('no such model', file=sys.stderr) or 1) if not text else None\n"
    )
    path.chmod(0o755)
    return str(path)


def test_llama_bench_is_a_column_like_the_others(tiny: Path, tmp_path: Path, capsys) -> None:
    ik = IkLlamaCpp(llama_bench(tmp_path / "llama-bench"))
    rows = peers.measure([Ruvllm(), ik], "tiny", tiny, ["prefill-32", "decode@0", "decode"], threads=2, rounds=2)
    out = capsys.readouterr().out.splitlines()
    head = table_head(peers.headings(["llama.cpp", "ik_llama.cpp"])).splitlines()
    assert {len(line.split("|")) for line in [*head, *out]} == {14}
    assert [row.seconds["ik_llama.cpp"] for row in rows] == [[0.32, 0.32], [0.16, 0.16], [0.32, 0.32]]
    assert [row.speed("ik_llama.cpp") for row in rows] == [pytest.approx(100)] * 3
    assert all(" 100.0 |" in line and NOT_INSTALLED in line for line in out)
    assert rows[2].ratio("ik_llama.cpp") == pytest.approx(rows[2].speed("ruvllm") / 100)  # type: ignore[operator]
    assert rows[2].weight_bytes["ik_llama.cpp"] == file_bytes_per_token(tiny)
    assert ik.about.startswith("c0ffee (7), ")
    calls = (tmp_path / "llama-bench.log").read_text().splitlines()
    assert all(f"-m {tiny} -t 2 -ngl 0 " in call and call.endswith("-r 1 -o json") for call in calls)
    assert [call.split("-rtr 1 ")[1].split(" -r ")[0] for call in calls[::3]] == [
        "-p 32 -n 0", "-p 0 -n 0 -gp 0,16", "-p 0 -n 0 -gp 32,32",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "not JSON", "[]", "{}", '[{"build_commit": "c0ffee"}]', "[1]"])
def test_llama_bench_that_fails_is_named(tiny: Path, tmp_path: Path, text: str) -> None:
    ik = IkLlamaCpp(llama_bench(tmp_path / "llama-bench", text))
    ik.load(tiny, 1, 40)
    with pytest.raises(RuntimeError, match=r"ik_llama.cpp: .*llama-bench: expected the JSON of one test"):
        ik.seconds("decode", [1, 2], 8)


def test_the_environment_names_llama_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """And what it names must be there: one line, like other errors."""
    monkeypatch.setenv("RUVLLM_IK_BENCH", str(tmp_path / "none"))
    monkeypatch.setattr("ruvllm.measure.engines.Worker", _without)
    monkeypatch.setattr(_files, "smollm2", lambda kind, llama: None)
    assert peers.main(["--models", "Q4_1", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert f"ik_llama.cpp: {tmp_path / 'none'}" in out and "| ik_llama.cpp tok/s |" in out


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
    peaks = Peaks(1, 1e12, 1e12, (Level("L3", 1e9, 1e12), Level("memory", float("inf"), 1e12)))
    monkeypatch.setattr(kernels, "measure_peaks", lambda threads: peaks)
    monkeypatch.setattr(kernels, "Torch", _without)
    for name, sizes in (
        ("gemm", {"m": 5, "n": 6, "k": 7}), ("gemm_nt", {"m": 3, "n": 20, "k": 30}), ("silu_mul", {"rows": 2, "n": 33}),
    ):  # fmt: skip
        monkeypatch.setitem(KERNELS, name, dataclasses.replace(KERNELS[name], sizes=(sizes,)))
    monkeypatch.setitem(kernels.GROUPS, "norm", ("silu_mul",))
    monkeypatch.setitem(RUST_ZEN4, "gemm m=5 n=6 k=7", 1e-6)
    out = tmp_path / "rows.json"
    assert kernels.main(["--quick", "--only", "gemm,linear,norm", "--threads", "1,2", "--json", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 and all(NOT_INSTALLED in line for line in lines[2:])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["threads"]) for row in rows[::2]] == [
        ("gemm m=5 n=6 k=7", 1), ("linear m=3 n=20 k=30", 1), ("silu_mul rows=2 n=33", 1),
    ]  # fmt: skip
    assert [row["threads"] for row in rows] == [1, 2] * 3 and all(row["error"] < 1e-6 for row in rows)
    assert all(row["call"]["median"] > 0 and row["inside"]["median"] > 0 for row in rows if row["threads"] == 1)
    assert [sorted(row["peers"]) for row in rows] == [["numpy"]] * 4 + [[]] * 2
    assert rows[0]["rust_zen4"] == 1e-6 and rows[0]["ratio"] > 0 and rows[-1]["ratio"] is None


def _without(*_: object) -> None:
    raise ModuleNotFoundError


def test_every_row_of_kernels_is_a_size_of_its_record() -> None:
    rows = [row for names in kernels.GROUPS.values() for name in names for row in kernels.rows_of(name)]
    assert len({row.label for row in rows}) == len(rows) == sum(
        len(KERNELS[{"linear": "gemm_nt", "cached": "grouped_query_attention"}.get(name, name)].sizes)
        for names in kernels.GROUPS.values() for name in names
    )  # fmt: skip
    assert all(row.sizes in KERNELS[row.kernel].sizes for row in rows)
    assert set(RUST_ZEN4) <= {row.id for row in rows}


def test_a_models_layouts_compute_the_same() -> None:
    for name, sizes in (
        ("gemm_nt", {"m": 3, "n": 20, "k": 30}),
        ("grouped_query_attention", {"heads": 4, "kv_heads": 2, "length": 32, "dim": 16}),
    ):
        spec = KERNELS[name]
        inputs = spec.example(np.random.default_rng(0), **sizes)
        packed, arguments = kernels.FORMS[{"gemm_nt": "linear"}.get(name, "cached")](spec, inputs)
        assert relative_error(packed.function(*arguments), spec.reference(**inputs)) < 1e-6


def test_groups_of_kernels_that_are_unknown(capsys) -> None:
    assert kernels.main(["--only", "gem", "--torch-python", sys.executable]) == 2
    assert "--only: expected some of gemm,linear" in capsys.readouterr().err
