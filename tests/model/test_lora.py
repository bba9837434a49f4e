"""Adapters over a model: against PEFT, on every kind of weights, mixed, swapped, merged, from several threads."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from ruvllm.checkpoint.adapters import load_adapter
from ruvllm.model import Llama, LoraAdapter, LoraConfig, MicroLora
from ruvllm.model.lora import TARGETS
from ruvllm.model.training_data import Example
from tests.model import tiny
from tests.model.model_cases import LAYOUTS, SMALL, load, logits, run, small_model, text

GOLDEN = Path(__file__).parents[1] / "data" / "lora"
PEFT_CASES = ("attention_bias", "bf16_sharded_tied", "llama3_scaled_gqa", "mistral_window")
IDS = text(40)


def adapter(rank: int = 5, targets: tuple[str, ...] = TARGETS, seed: int = 1, size: float = 0.1) -> LoraAdapter:
    """An adapter of the small model that changes its answers."""
    made = LoraAdapter(SMALL, LoraConfig(rank, targets=targets), seed)
    rng = np.random.default_rng(seed)
    for b in made.b.values():
        b[:] = rng.standard_normal(b.shape) * size
    return made


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize("case", PEFT_CASES)
def test_logits_of_peft(case: str, fused: bool) -> None:
    model = load(tiny.directory(case), "f32")
    model.fused = fused
    with np.load(GOLDEN / case / "golden.npz") as golden:
        ids, expected = golden["ids"], golden["logits"]
    before = logits(model, ids)
    lora = MicroLora(model)
    lora.attach(load_adapter(GOLDEN / case, model.config))
    assert np.abs(logits(model, ids) - expected).max() <= 2e-4
    assert np.abs(before - expected).max() > 0.01
    lora.merge()
    assert np.abs(logits(model, ids) - expected).max() <= 2e-4
    lora.unmerge()
    np.testing.assert_array_equal(logits(model, ids), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_paths_and_threads_agree_bit_for_bit(layout: str) -> None:
    """Many tokens and one, the region and the layers in Python, one thread and two."""
    results = []
    for threads, fused in ((1, True), (2, True), (2, False)):
        model = small_model(layout, threads)
        model.fused = fused
        MicroLora(model).attach(adapter(rank=19))
        results.append(run(model, model.new_cache(40), IDS, [30, 1, 2, *[1] * 7]))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("layout", ["f32", "int4"])
def test_what_an_adapter_adds(layout: str) -> None:
    """The first layer's q against NumPy: W x + b as without, plus scaling B^T A^T x."""
    model, made = small_model(layout), adapter(rank=3, targets=("q",))
    x = np.random.default_rng(0).standard_normal((7, SMALL.hidden_size)).astype(np.float32)
    q = model.decoder.layers[0].attention.q
    before = q(x)
    MicroLora(model).attach(made, weight=0.5)
    a, b = made.a["layers.0.q"].astype(np.float64), made.b["layers.0.q"].astype(np.float64)
    exact = expected = 0.5 * made.config.scaling * (x @ a @ b)
    if layout == "int4":  # then the factors have 8 bits
        expected = 0.5 * made.config.scaling * (x @ rounded(a, axis=0) @ rounded(b, axis=1))
    assert np.square(expected - exact).sum() <= 0.01**2 * np.square(exact).sum()
    assert model.adapters is not None
    added = q(x, adapter=model.adapters.matrices["layers.0.q"]) - before
    assert np.abs(added - expected).max() <= 1e-5 * np.abs(expected).max()


def test_factors_at_the_end_of_float32_keep_their_signs() -> None:
    """The step of denormals is a whole one, and 190 of it are more than 127."""
    model, made = small_model("int8"), adapter(rank=2, targets=("q",))
    for a, b in zip(made.a.values(), made.b.values(), strict=True):
        a[:], b[:] = 190 * np.float32(2.0**-149), 1e37
    MicroLora(model).attach(made)
    assert model.adapters is not None
    for matrix in model.adapters.matrices.values():
        assert matrix.down.min() >= 0 and matrix.up.min() >= 0


def rounded(x: np.ndarray, axis: int) -> np.ndarray:
    """x as whole multiples, up to 127, of a step for each rank."""
    step = np.abs(x).max(axis, keepdims=True) / 127
    return np.rint(x / step) * step


def test_a_new_adapter_changes_nothing() -> None:
    for layout in ("f32", "int8"):
        model = small_model(layout)
        before = logits(model, IDS)
        lora = MicroLora(model)
        lora.attach(LoraAdapter(SMALL, LoraConfig(targets=TARGETS), seed=3))
        np.testing.assert_array_equal(logits(model, IDS), before)


def test_swap_between_two_tokens() -> None:
    """Each token is computed with the adapter of its moment; the base weights do not change."""
    model = small_model("int4")
    lora = MicroLora(model)
    plain = logits(model, IDS)
    lora.attach(adapter(seed=1), "a")
    only_a = logits(model, IDS)
    lora.use()
    lora.attach(adapter(rank=2, seed=2), "b")
    only_b = logits(model, IDS)
    cache = model.new_cache(len(IDS))
    for t, token in enumerate(IDS[:4]):
        lora.use("a" if t % 2 else "b")
        model.forward([token], cache)
    lora.use("b")
    np.testing.assert_array_equal(logits(model, IDS), only_b)
    lora.use("a")
    np.testing.assert_array_equal(logits(model, IDS), only_a)
    with lora.disabled():
        assert lora.active == {}
        np.testing.assert_array_equal(logits(model, IDS), plain)
    np.testing.assert_array_equal(logits(model, IDS), only_a)
    lora.detach("a")
    assert lora.active == {} and list(lora.adapters) == ["b"]
    np.testing.assert_array_equal(logits(model, IDS), plain)


def test_several_at_once_are_the_sum() -> None:
    model = small_model("f32")
    lora = MicroLora(model)
    x = np.random.default_rng(0).standard_normal((3, SMALL.hidden_size)).astype(np.float32)
    gate = model.decoder.layers[1].mlp.gate
    plain = gate(x)
    parts = []
    for name, rank, targets in (("a", 5, TARGETS), ("b", 2, ("gate",)), ("c", 18, ("q", "gate"))):
        lora.use()
        lora.attach(adapter(rank, targets, seed=rank), name)
        parts.append(gate(x) - plain)
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    lora.use(weights)
    expected = plain + sum(w * part for w, part in zip(weights.values(), parts, strict=True))
    np.testing.assert_allclose(gate(x), expected, atol=2e-5)


def test_changed_numbers_are_taken_in() -> None:
    model, made = small_model("f32"), adapter()
    lora = MicroLora(model)
    lora.attach(made)
    before = logits(model, IDS)
    made.reset(5)
    lora.refresh("default")
    assert np.abs(logits(model, IDS) - before).max() > 0.01
    np.testing.assert_array_equal(logits(model, IDS), logits(small_model("f32"), IDS))


def test_swaps_while_another_thread_generates() -> None:
    """Each result is that of one of the two adapters, wherever the swaps fall."""
    model = small_model("f32")
    lora = MicroLora(model)
    expected = []
    for name in "ab":
        lora.use()
        lora.attach(adapter(seed=ord(name)), name)
        expected.append(logits(model, IDS).tobytes())
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            lora.use("a")
            lora.use("b")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        assert all(logits(model, IDS).tobytes() in expected for _ in range(100))
    finally:
        stop.set()
        thread.join()


def test_merge_needs_float_weights_and_keeps_the_layout() -> None:
    integer = MicroLora(small_model("int8"))
    integer.attach(adapter())
    with pytest.raises(ValueError, match=r"layers\.0\.q has int8 weights.*weights='f32'"):
        integer.merge()
    model: Llama = small_model("f16")
    lora = MicroLora(model)
    lora.attach(adapter())
    applied = logits(model, IDS)
    lora.merge()
    assert lora.active == {} and lora.merged and model.decoder.layers[0].attention.q.layout == "f16"
    assert np.abs(logits(model, IDS) - applied).max() <= 0.02  # W + AB is rounded to 16 bits
    with pytest.raises(ValueError, match="merged already"):
        lora.merge()


def test_merged_adapters_are_left_alone() -> None:
    """Several with their weights; what would let one act twice, or change what is in the weights, is refused."""
    model = small_model("f32")
    lora, before = MicroLora(model), logits(model, IDS)
    with pytest.raises(ValueError, match="no adapter is active, see use"):
        lora.merge()
    lora.attach(adapter(seed=1), "a", 0.7)
    lora.attach(adapter(seed=2, rank=3, targets=("o", "down")), "b", -0.5)
    applied = logits(model, IDS)
    with lora.disabled(), pytest.raises(ValueError, match="no adapter is active, they are disabled"):
        lora.merge()
    assert lora.active == {"a": 0.7, "b": -0.5}
    lora.merge()
    assert np.abs(logits(model, IDS) - applied).max() <= 1e-4
    example = Example(np.arange(5), np.ones(5, bool))
    for refused in (
        lambda: lora.use("a"), lambda: lora.detach("b"), lambda: lora.refresh("a"), lambda: lora.adapt(example, "a"),
        lambda: lora.trainer([example], "b"), lambda: lora.attach(lora.adapters["a"], "a"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is merged into the weights; unmerge first"):
            refused()
    lora.attach(adapter(seed=3), "c")
    lora.unmerge()
    assert lora.active == {"c": 1.0}
    lora.use()
    np.testing.assert_array_equal(logits(model, IDS), before)
    lora.use({"a": 0.7, "b": -0.5})
    np.testing.assert_array_equal(logits(model, IDS), applied)


def test_an_adapter_too_large_for_float32_is_not_kept() -> None:
    lora, large = MicroLora(small_model("int4")), adapter()
    large.b["layers.0.q"][:] = 1e25
    large.a["layers.0.q"][:] = 1e25
    with pytest.raises(ValueError, match="products fit into float32"):
        lora.attach(large, "a")
    assert not lora.adapters and not lora.active
    lora.attach(adapter(), "a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank: expected 1 to 1024, found 0"),
        ({"rank": 2.0}, "rank"),
        ({"alpha": 0}, "alpha: expected a finite number above 0, found 0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ("q", "query")}, "targets: expected some of q, k, v, o, gate, up, down"),
        ({"targets": ()}, "targets"),
        ({"rslora": 1}, "rslora"),
    ],
)
def test_settings_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**values)


def test_what_does_not_fit_is_refused() -> None:
    lora = MicroLora(small_model("f32"))
    other = load(tiny.directory("llama2_mha"), "f32")
    with pytest.raises(ValueError, match=r"made for another model: layers\.0\.q of shape \(48, 48\)"):
        lora.attach(LoraAdapter(other.config))
    bad = adapter()
    bad.b["layers.1.down"][0, 3] = np.nan
    with pytest.raises(ValueError, match=r"B of layers\.1\.down holds NaN"):
        lora.attach(bad)
    lora.attach(adapter(), "a")
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        lora.attach(adapter(), "a")
    with pytest.raises(KeyError, match="no adapter called 'b': there are a"):
        lora.use("b")
    with pytest.raises(ValueError, match="weight of 'a'"):
        lora.use({"a": float("inf")})


def test_sizes_and_text() -> None:
    made = adapter(rank=2, targets=("q", "down"))
    E, F, D = SMALL.hidden_size, SMALL.intermediate_size, SMALL.num_attention_heads * SMALL.head_dim
    assert made.param_count == SMALL.num_hidden_layers * 2 * (E + D + F + E)
    assert repr(made) == f"LoraAdapter(rank 2, alpha 16, q down, {made.param_count:,} parameters)"
    assert LoraConfig(4, 8.0).scaling == 2 and LoraConfig(4, 8.0, rslora=True).scaling == 4
    lora = MicroLora(small_model("f32"))
    assert repr(lora) == "MicroLora(0 adapters; none active)"
    lora.attach(made, "x", 0.5)
    assert repr(lora) == "MicroLora(1 adapters; x=0.5)"
