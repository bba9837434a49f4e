"""lab.profile: operations, their work and their times, in models and by hand."""

import math
from pathlib import Path

import pytest

from ruvllm import lab
from ruvllm.lab.profiling import WAIT, Operation, Profile
from ruvllm.llm import LLM
from ruvllm.model import Llama, ModelConfig
from ruvllm.model.config import ExpertsConfig
from tests.lab.cases import IDS, LIMITS, NoText, loaded


def test_profile_counts_every_operation_and_its_work() -> None:
    for layout in ("f32", "int8"):
        llm = loaded("llama2_mha", layout)
        config, before = llm.config, set(vars(llm.model))
        found = lab.profile(llm, IDS, max_tokens=4, peaks=LIMITS)
        assert [tokens for *_, tokens in found.steps] == [len(IDS), 1, 1, 1]
        decode = [x for x in found.operations if x.step == 2 and x.name != WAIT]
        names = [x.name for x in decode if x.layer == 0 and x.name not in ("quantize", "broadcast")]
        assert sorted(names) == sorted([
            "rms_norm", "q", "k", "v", "rope", "rope", "attention", "merge", "o", "add", "rms_norm", "gate", "up",
            "silu_mul", "down", "add",
        ])  # fmt: skip
        assert {x.layer for x in decode} == {-1, *range(config.num_hidden_layers)}
        rounded = 4 * config.num_hidden_layers + 1 if layout == "int8" else 0
        assert sum(x.name == "quantize" for x in decode) == rounded
        assert sum(x.name == WAIT for x in found.operations if x.step == 2) > config.num_hidden_layers
        gate = next(x for x in decode if x.name == "gate")
        linear = llm.model.decoder.layers[0].mlp.gate
        assert gate.flops == 2 * linear.rows * linear.columns
        assert gate.nbytes == linear.nbytes + 4 * (linear.rows + linear.columns)
        peak = 4e11 if layout == "int8" else 1e11
        assert gate.limit == max(gate.flops / peak, gate.nbytes / LIMITS.bandwidth(llm.model.nbytes))
        attention = next(x for x in decode if x.name == "attention")
        assert attention.flops == 4 * config.num_attention_heads * config.head_dim * (len(IDS) + 2)
        assert next(x for x in decode if x.layer == -1 and x.flops > 1e3).name == "head"
        assert set(vars(llm.model)) == before and not hasattr(llm.model.runner, "runs")
        assert found.untimed > 0 and found.decode > 0


def test_profile_counts_the_experts_that_are_read() -> None:
    config = ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, experts=ExpertsConfig(count=5, per_token=2, intermediate_size=48),
    )  # fmt: skip
    llm = LLM(Llama(config, None, "int8", threads=1), NoText(), Path())
    found = lab.profile(llm, IDS, max_tokens=2, peaks=LIMITS)
    gate = llm.model.linears()["layers.0.experts.0.gate"]
    for rows, experts, step in ((2 * len(IDS), 5, 0), (2, 2, 1)):
        product = next(x for x in found.operations if x.name == "gate" and x.step == step)
        assert product.flops == 2 * rows * gate.rows * gate.columns
        assert product.nbytes == experts * gate.nbytes + 4 * rows * (gate.rows + gate.columns)
        combine = next(x for x in found.operations if x.name == "combine" and x.step == step)
        assert (combine.flops, combine.nbytes) == (2 * rows * 64, 4 * (rows + rows // 2) * 64)


def test_times_of_a_profile_lie_within_their_pass() -> None:
    found = lab.profile(loaded("llama2_mha"), IDS, max_tokens=6, peaks=LIMITS)
    for step, (start, end, _) in enumerate(found.steps):
        mine = [x for x in found.operations if x.step == step]
        slack = 0.1 * (end - start) + 2e-4  # the rate of the counter is estimated from a run of a few milliseconds
        assert all(start - slack <= x.start <= x.end <= end + slack and x.seconds >= 0 for x in mine)
        assert [x.start for x in mine] == sorted(x.start for x in mine)


def test_profile_is_shown() -> None:
    found = lab.profile(loaded("llama2_mha"), IDS, max_tokens=3, peaks=LIMITS)
    for text in (str(found), found._repr_html_()):
        for wanted in (
            "prompt, by op", "prompt, by thread", "decoding, by op", "decoding, by thread", "decoding, by layer",
            "layer 0", WAIT, "time stamps", "imbalance",
        ):  # fmt: skip
            assert wanted in text
    rows = found.table()
    shares = [float(row[3].rstrip("%")) for row in rows[1:]]
    assert sum(shares) == pytest.approx(100, abs=1)
    ax = found.plot()
    assert "attention" in [label.get_text() for label in ax.get_yticklabels()]
    assert found.plot(layer=1).get_xlabel().endswith("layer 1")
    with pytest.raises(ValueError, match="layer: expected one of the model's, found 9"):
        found.plot(layer=9)
    with pytest.raises(ValueError, match="max_tokens: expected at least 2"):
        lab.profile(loaded("llama2_mha"), IDS, max_tokens=1, peaks=LIMITS)


def test_threads_of_a_profile_by_hand() -> None:
    """Two passes of two threads, of which the second joined after the first operation."""
    nan = math.nan

    def operation(name: str, starts: tuple[float, float], ends: tuple[float, float]) -> Operation:
        return Operation(name, 0, 1, 0, starts, ends, 8e6, 4e6, 1e-3)

    gate = operation("gate", (0.0, nan), (0.002, nan))
    up = operation("up", (0.002, 0.003), (0.006, 0.004))
    wait = operation(WAIT, (0.006, 0.004), (0.0065, 0.006))
    found = Profile((gate, up, wait), ((0.0, 0.008, 1),), 2, 125.0, 125.0, LIMITS)
    assert (gate.seconds, gate.excess) == (0.002, 0)
    assert up.seconds == pytest.approx(0.0025) and up.excess == pytest.approx(0.0015)
    rows = {row[0]: row[1:] for row in found.table()}
    assert rows["up"] == ("1", "2.50", "31.2%", "60%", "1.6", "3.2", "40%")
    assert rows[WAIT][3] == "-" and rows["between operations"][1] == "2.25"
    assert found.by_thread() == [
        ("thread", "computes, ms", "waits, ms", "waits", "else, ms"),
        ("thread 0", "6.00", "0.50", "6.2%", "1.50"),
        ("thread 1", "1.00", "2.00", "25.0%", "5.00"),
    ]
    assert len(found.by_thread(decode=False)) == 1
    lanes = {round(b.get_paths()[0].vertices[0][1], 3) for b in found.plot().collections}
    assert lanes == {-0.4, 0.6, 1.6, 1.0, 2.0}  # thread 1 has no bar in the first lane
    assert [text.get_text() for text in found.plot().get_legend().get_texts()] == ["thread 0", "thread 1"]
