"""scale(): the sum of its parts, by hand; more ranks pay only as long as the network allows."""

from __future__ import annotations

import numpy as np
import pytest

from ruvllm import lab
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.model.config import ModelConfig

PEAKS = Peaks(threads=8, fma=1e15, int8_dot=1e15, levels=(Level("memory", 0, 40e9),))
CONFIG = ModelConfig(
    name="small", vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64,
)  # fmt: skip
NETWORK = lab.Network("slow", 1e-3, 1e6)


def test_a_token_takes_the_sum_of_its_parts() -> None:
    found = lab.scale(CONFIG, [NETWORK], [1, 2], "f32", context=16, peaks=PEAKS, costs=lab.Costs(1e-5, 3e-4))
    one, two = found.points
    layer = 4 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1024)
    read = 3 * layer + 4 * 1024 * 512 + 4 * 512 + 3 * 16 * 4 * 2 * 64 * 4 + 4 * 512 * 7  # head, row, cache, norms
    assert one.seconds == pytest.approx(read / 40e9, rel=1e-3)
    assert one.waiting == 0
    sums = 7 * (1e-3 + 4 * 512 / 1e6) + 6 * 1e-5
    beside = 1e-3 + 4 * 512 / 1e6 + 1e-3 + 3e-4  # logits of 512 tokens, a message to all
    assert two.waiting == pytest.approx(sums + beside)
    assert two.seconds - two.waiting == pytest.approx(one.seconds / 2, rel=0.01)
    assert found.pays_until("small", "slow") == 1
    halves = lab.scale(CONFIG, [NETWORK], [2], "f32", 16, PEAKS, lab.Costs(1e-5, 3e-4), "f16").points[0]
    assert two.waiting - halves.waiting == pytest.approx(6 * 2 * 512 / 1e6)
    gathered = lab.scale(CONFIG, [NETWORK], [2], "f32", 16, PEAKS, lab.Costs(1e-5, 3e-4), "exact").points[0]
    each = 4 * (1e-3 + 1e-5) + 4 * (8 * 64 + 1024 + 2 * 512) / 2 / 1e6
    assert gathered.waiting == pytest.approx(3 * each + 1e-3 + 4 * 512 / 1e6 + beside)


def test_a_fast_network_pays_longer() -> None:
    found = lab.scale("llama3-8b", ranks=(1, 2, 4, 8, 16), peaks=PEAKS)
    pays = [found.pays_until("LLaMA3-8B", name) for name in ("1 Gbit/s", "10 Gbit/s", "100 Gbit/s")]
    assert pays == sorted(pays) and pays[0] < pays[-1]
    assert "LLaMA3-8B" in str(found)
    speeds = [x.speed for x in found.curve("LLaMA3-8B", "100 Gbit/s")]
    assert np.all(np.diff(speeds[:3]) > 0)


def test_ranks_that_a_model_lacks_heads_for_are_left_out() -> None:
    found = lab.scale(CONFIG, [NETWORK], [1, 8, 9], "f32", peaks=PEAKS)
    assert [x.ranks for x in found.points] == [1, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "llama9"}, "config: expected"), ({"weights": "int3"}, "weights: expected"),
        ({"wire": "f8"}, "wire: expected"), ({"ranks": [0]}, "ranks: expected"), ({"context": 0}, "context"),
        ({"config": []}, "config: expected at least one, found none"), ({"config": [3]}, "config: expected a Model"),
        ({"networks": ()}, "networks: expected at least one, found none"), ({"ranks": ()}, "ranks: expected"),
        ({"ranks": [1.5]}, "ranks: expected positive integers, found"), ({"context": 1.5}, "context: expected"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lab.scale(**{"config": CONFIG, "peaks": PEAKS, **arguments})  # type: ignore[arg-type]


def test_one_network_and_one_number_of_ranks_are_taken() -> None:
    several = lab.scale([CONFIG], [NETWORK], [2], "f32", peaks=PEAKS)
    assert lab.scale(CONFIG, NETWORK, 2, "f32", peaks=PEAKS) == several and len(several.points) == 1
    with pytest.raises(TypeError, match="networks: expected one or several lab.Network, found"):
        lab.scale(CONFIG, ["1 Gbit/s"], peaks=PEAKS)  # type: ignore[list-item]


@pytest.mark.parametrize("latency", [-1e-6, float("nan"), float("inf"), "fast"])
def test_no_network_is_earlier_than_at_once(latency: float) -> None:
    with pytest.raises(ValueError, match="^latency: expected seconds, 0 or more, found "):
        lab.Network("odd", latency, 1e9)


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), None])
def test_every_network_carries_something(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="^bandwidth: expected bytes/s above 0, found "):
        lab.Network("odd", 1e-6, bandwidth)
