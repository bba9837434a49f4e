"""What `ruvllm info` says of a configuration: each choice in words, and none that a model does not make."""

from __future__ import annotations

from pathlib import Path

from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.cli.describe import described, ranges
from ruvllm.model.presets import PRESETS
from tests.model import tiny_checkpoints


def of(variant: str, directory: Path) -> dict[str, str]:
    """The words for a tiny checkpoint."""
    tiny_checkpoints.write_checkpoint(directory, tiny_checkpoints.read(variant))
    with open_checkpoint(directory) as checkpoint:
        return described(checkpoint.config)


def test_a_plain_model() -> None:
    assert described(PRESETS["llama3-8b"]) == {
        "family": "llama",
        "layers": "32 of hidden size 4096; norms before attention and feed-forward",
        "attention": "32 query, 8 key/value heads of 128",
        "rope": "base 500,000",
        "feed-forward": "SwiGLU of 14,336",
        "vocabulary": "128,256 tokens",
        "context": "8,192 tokens",
    }
    assert described(PRESETS["mistral-7b"])["window"] == "4,096 tokens in all layers"
    assert described(PRESETS["smollm2-135m"])["vocabulary"] == "49,152 tokens; the embedding is also the head"


def test_windows_softcaps_and_multipliers(tmp_path: Path) -> None:
    gemma2, gemma3 = of("gemma2", tmp_path / "gemma2"), of("gemma3", tmp_path / "gemma3")
    assert gemma2["layers"].endswith("norms before and after attention and feed-forward")
    assert gemma2["attention"] == "4 query, 2 key/value heads of 24; scores softcapped at 4"
    assert gemma2["window"] == "9 tokens in layers 0, 2"
    assert gemma2["vocabulary"].endswith("; the embedding is also the head; logits softcapped at 9")
    assert gemma2["multipliers"] == "embedding times 8.944"  # the root of 80
    assert gemma3["family"] == "gemma3_text" and gemma3["feed-forward"].startswith("GeGLU of ")
    assert "q and k normalised by head" in gemma3["attention"]
    assert gemma3["rope"] == "base 1,000,000, scaling linear; of windowed layers: base 10,000"
    granite = of("granite", tmp_path / "granite")
    assert granite["multipliers"] == "embedding times 3.5, what layers add times 0.6, logits divided by 1.7"
    assert granite["attention"].endswith("; scores times 0.4")


def test_experts(tmp_path: Path) -> None:
    mixed, oss = of("qwen2_moe_mixed", tmp_path / "mixed"), of("gpt_oss", tmp_path / "oss")
    assert mixed["feed-forward"] == "SwiGLU of 60 in layers 0, 2-3"
    assert mixed["experts"] == "7 in layer 1, 3 of them for each token; SwiGLU of 28; one of 52 for all tokens"
    assert "feed-forward" not in oss
    assert oss["experts"] == "6 in all layers, 2 of them for each token; clamped SwiGLU of 40; biases"
    assert oss["attention"].endswith("; a sink for each head; biases on q, k, v, o")


def test_ropes(tmp_path: Path) -> None:
    assert of("smollm3", tmp_path / "smollm3")["rope"] == "base 2,000,000; none in layer 3"
    assert of("olmo3", tmp_path / "olmo3")["rope"] == "base 500,000, scaling yarn; of windowed layers: base 500,000"
    assert of("olmo3_alike", tmp_path / "alike")["rope"] == "base 500,000"
    assert of("phi4_mini", tmp_path / "phi")["rope"] == "base 10,000, scaling longrope, 12 of 16 rotated"


def test_ranges() -> None:
    assert ranges([]) == ""
    assert ranges([0, 1, 2, 3, 4, 6, 8, 9]) == "0-4, 6, 8-9"
