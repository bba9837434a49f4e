"""llm.trace and llm.edit: what is kept, that nothing changes, that nothing leaks."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm.errors import InsufficientMemoryError
from ruvllm.llm import LLM
from ruvllm.model import LoraAdapter, LoraConfig
from ruvllm.model.kv_pool import KVPool, block_bytes
from ruvllm.model.many import Many, Run
from tests.llm_cases import CONFIG, byte_llm
from tests.model.model_cases import KINDS

IDS = np.arange(40, 61)
RESIDUALS = ("embed", "layers.*.residual", "final.residual")


def doubled(x: np.ndarray) -> np.ndarray:
    return 2 * x


# A trace changes nothing.


@pytest.mark.parametrize(("layout", "kv"), KINDS)
def test_logits_stay_bit_identical(layout: str, kv: str, tmp_path: Path) -> None:
    """All traced, with every kind of weights and cache, without and with an adapter, on both paths."""
    llm = byte_llm(tmp_path, layout, threads=2)
    for adapted in (False, True):
        before = llm.logits(IDS)
        if adapted:
            adapter = LoraAdapter(llm.config, LoraConfig(4))
            adapter.parameters += np.float32(0.05)
            llm.lora.attach(adapter, "more")
            assert np.abs(llm.logits(IDS) - before).max() > 0.01
        plain = llm.logits(IDS, llm.new_cache(30, kv))
        for llm.model.fused in (True, False):
            with llm.trace(IDS, kv=kv) as together:
                pass
            np.testing.assert_array_equal(together["logits"], plain)
            cache = llm.new_cache(30, kv)
            with llm.trace() as apart:
                rows = [llm.logits(part, cache) for part in np.split(IDS, [9, 10, 11, 18])]
            np.testing.assert_array_equal(np.concatenate(rows), plain)
            np.testing.assert_array_equal(apart.ids, IDS)
            for name in together.names:
                np.testing.assert_array_equal(apart[name], together[name], err_msg=name)
        llm.model.fused = True


def test_a_generation_has_a_row_for_each_token(llm: LLM) -> None:
    plain = llm.generate("What?", max_tokens=6)
    with llm.trace() as t:
        t.keep("layers.1.residual", "layers.0.attention.pattern", "logits")
        answer = llm.generate("What?", max_tokens=6)
    assert answer.text == plain.text
    tokens = len(answer.ids) + len(b"What?") - 1  # the last one is chosen, and not computed any more
    assert t["layers.1.residual"].shape == (tokens, 48) and len(t.tokens) == tokens
    np.testing.assert_array_equal(t["logits"].argmax(-1), answer.ids)
    with llm.trace(t.ids) as again:
        again.keep("layers.1.residual", "layers.0.attention.pattern")
    for name in again.names:
        np.testing.assert_array_equal(t[name], again[name])


def test_what_a_cache_holds_is_part_of_patterns(llm: LLM) -> None:
    cache = llm.new_cache(30)
    llm.logits(IDS[:7], cache)
    with llm.trace() as t:
        t.keep("layers.0.attention.pattern")
        llm.logits(IDS[7:], cache)
    with llm.trace(IDS) as whole:
        whole.keep("layers.0.attention.pattern")
    assert t.first == 7 and t.attention(0).shape == (4, 14, 21)
    np.testing.assert_array_equal(t.attention(0)[:], whole.attention(0)[:, 7:])


# What is kept.


def test_a_trace_keeps_what_is_asked_for(llm: LLM) -> None:
    with llm.trace("Hello") as t:
        t.keep(*RESIDUALS)
        t.keep("blocks.0.attn.hook_z")
    assert t.names == ["embed", "layers.0.residual", "layers.0.attention.heads", "layers.1.residual", "final.residual"]
    assert t.keys() == list(t) == t.names and len(t) == 5
    assert t.tokens == list("Hello") and t["layers.0.residual"].dtype == np.float32
    assert t["layers.0.heads"].shape == (5, 4, 12) and t.nbytes == 5 * 5 * 48 * 4
    np.testing.assert_array_equal(t["blocks.0.hook_resid_post"], t["layers.1.residual"])
    assert "embed" in t and "layers.1.attention.normalised" in t and "layers.*.residual" in t
    assert "layers.1.mlp.normalised" not in t and "layers.0.mlp.out" not in t
    with pytest.raises(KeyError, match="'layers.0.mlp.out' was not kept: name it in keep"):
        _ = t["layers.0.mlp.out"]
    with pytest.raises(KeyError, match="'layers.1.attention.pattern' was not kept"):
        t.attention(1)
    with pytest.raises(KeyError, match="expected one array, found 2"):
        _ = t["layers.*.residual"]
    with pytest.raises(ValueError, match="the trace has begun"):
        t.keep("logits")


def test_a_first_look_runs_the_text(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with llm.trace(messages) as t:
        first = t["embed"]
    assert t.tokens[0] == "<|user|>" and len(first) == len(t.ids)
    with pytest.raises(KeyError, match="nearest: layers.0.residual"), llm.trace("Hi") as t:
        t.keep("layers.0.residua")


def test_bytes_are_named_before_they_are_kept(llm: LLM) -> None:
    passes = []
    with (
        pytest.raises(InsufficientMemoryError, match=r"trace: 12,096 bytes to keep, more than limit=12,000"),
        llm.trace(IDS, limit=12_000) as t,
        llm.edit("embed", lambda x: passes.append(len(x))),
    ):
        t.keep(*RESIDUALS[1:])
    assert not passes
    with pytest.raises(InsufficientMemoryError, match="trace: 2,112 bytes to keep"), llm.trace(limit=2000) as t:
        t.keep("embed")
        llm.generate("Hello", max_tokens=20)
    with llm.trace(IDS, limit=2 * 21 * 48 * 4) as t:
        t.keep("layers.0.attention.pattern")
    with pytest.raises(InsufficientMemoryError, match="more than limit=8,064"):
        t.attention(0)


def test_a_trace_follows_one_sequence(llm: LLM) -> None:
    with pytest.raises(ValueError, match="expected position 21 of one sequence, found position 0 of another"):
        with llm.trace():
            llm.logits(IDS)
            llm.logits(IDS)
    with pytest.raises(ValueError, match="expected one sequence, found a batch"), llm.trace():
        llm.generate_many(["a"], max_tokens=1)


# What is computed of it.


def test_attribution_sums_to_the_difference_of_logits(llm: LLM) -> None:
    with llm.trace("Hello") as t:
        pass
    found = t.direct_attribution("a", 98)
    wanted = t["logits"][-1, 97] - t["logits"][-1, 98]
    assert (found.wanted, found.other) == ("a", "b")
    assert found.difference == pytest.approx(wanted, abs=1e-5)
    assert sum(found.blocks.values()) == pytest.approx(wanted, abs=1e-5)
    for layer in range(2):
        attention = found.blocks[f"layers.{layer}.attention.out"]
        assert found.heads[layer].sum() == pytest.approx(attention, abs=1e-5)
    before = t.direct_attribution("a", "b", position=2)
    assert before.difference == pytest.approx(t["logits"][2, 97] - t["logits"][2, 98], abs=1e-5)
    assert "layers.1.mlp.out" in str(found)
    for position in (5, -6, 1.0):
        with pytest.raises(ValueError, match=f"position: expected -5 to 4, found {position}"):
            t.direct_attribution("a", "b", position)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected text of one token, found 'ab', which has 2"):
        t.direct_attribution("ab", "c")


def test_attribution_says_what_it_does_not_explain(tmp_path: Path) -> None:
    """Products of quantised weights round activations."""
    llm = byte_llm(tmp_path, "int4", threads=1)
    with llm.trace("Hello") as t:
        pass
    found = t.direct_attribution("a", "b")
    assert found.logits == t["logits"][-1, 97] - t["logits"][-1, 98]
    assert found.unexplained == pytest.approx(found.logits - sum(found.blocks.values()))
    found = dataclasses.replace(found, logits=sum(found.blocks.values()) + 0.25)
    assert f"logit a - logit b = {found.logits:.3f}" in found.heading() and "+0.250 unexplained" in found.heading()
    assert "unexplained" not in dataclasses.replace(found, logits=found.logits - 0.25).heading()


def test_tokens_of_a_padded_vocabulary_are_shown_by_number(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=270)
    llm = byte_llm(tmp_path, threads=1, config=config)
    banned = np.where(np.arange(270) == 262, np.float32(0), np.float32("-inf"))
    with llm.edit("logits", lambda x: x + banned), llm.trace([7, 262]) as t:
        assert (t["logits"].argmax(-1) == 262).all()
    assert t.tokens[1] == "<262>" and t.logit_lens(top=270).texts[262] == "<262>"
    assert t.direct_attribution(262, "a").wanted == "<262>"


def test_the_lens_ends_with_what_the_model_predicts(llm: LLM) -> None:
    with llm.trace("Hello") as t:
        pass
    lens = t.logit_lens(top=2)
    assert lens.ids.shape == (3, 5, 2) and lens.stages() == ["embedding", "layer 0", "layer 1"]
    np.testing.assert_array_equal(lens.ids[-1, :, 0], t["logits"].argmax(-1))
    shares = np.exp(t["logits"] - np.log(np.exp(t["logits"]).sum(-1, keepdims=True)))
    np.testing.assert_allclose(lens.probabilities[-1, :, 0], shares.max(-1), rtol=1e-5)
    assert not np.array_equal(lens.ids[0], lens.ids[-1])


def test_what_was_not_kept_is_computed_again(llm: LLM) -> None:
    """With the edits that the text met, whichever there are when it is needed."""
    for edit in (llm.edit("layers.0.mlp.out", doubled), llm.edit("embed", scale=1)):
        with edit, llm.trace(IDS) as whole:
            pass
        with edit, llm.trace(IDS) as t, llm.edit("layers.0.residual", scale=1):
            t.keep("layers.*.residual", "layers.1.attention.pattern")
        with llm.edit("layers.1.mlp.out", scale=0), llm.trace() as other:
            lens, parts = t.logit_lens(), t.direct_attribution("a", "b")
            assert not other.names
        np.testing.assert_array_equal(lens.probabilities, whole.logit_lens().probabilities)
        assert parts.blocks == whole.direct_attribution("a", "b").blocks
        for name in ("final.residual", "layers.0.mlp.out"):
            np.testing.assert_array_equal(t[name], whole[name])
        assert t.nbytes < whole.nbytes and "logits" not in t


def test_what_cannot_be_computed_again_is_named_at_once(llm: LLM) -> None:
    with llm.trace() as t:
        t.keep("layers.0.residual")
        llm.logits(IDS)
    missing = "2 arrays were not kept: keep.'layers.1.residual', 'final.residual'. before the text"
    with pytest.raises(KeyError, match=missing):
        t.logit_lens()
    with llm.trace(IDS) as t:
        t.keep("layers.0.residual")
    llm.model.weights_changed()
    with pytest.raises(KeyError, match="weights or adapters have changed since the trace"):
        t.logit_lens()
    with llm.trace(IDS, limit=IDS.size * 48 * 4 * 2) as t:
        t.keep("layers.0.residual")
    with pytest.raises(InsufficientMemoryError, match="trace: 12,096 bytes to keep, more than limit=8,064"):
        t.logit_lens()
    assert t.names == ["layers.0.residual"]


def test_results_print_and_plot(llm: LLM) -> None:
    import matplotlib.pyplot as plt

    with llm.trace("A price of 3$ and 4$\n") as t:
        pass
    pattern, lens, parts = t.attention(1), t.logit_lens(), t.direct_attribution("a", "b")
    for shown in (pattern, lens, parts, llm.names()):
        assert shown.heading() in str(shown) and "<table>" in shown._repr_html_()
    assert len(pattern.plot()) == 4 and pattern.plot()[0].get_title() == "head 0"
    for ax in (lens.plot(), parts.plot()):
        ax.figure.canvas.draw()
    plt.close("all")


# Edits.


def test_edits_nest_and_end_with_their_block(llm: LLM) -> None:
    plain = llm.logits(IDS)
    with llm.edit("layers.0.mlp.out", doubled):
        outer = llm.logits(IDS)
        with llm.edit("layers.0.mlp.out", lambda x: x + 1), llm.trace(IDS) as t:
            t.keep("layers.0.mlp.out")
        with pytest.raises(RuntimeError), llm.edit("embed", scale=0):
            raise RuntimeError
        np.testing.assert_array_equal(llm.logits(IDS), outer)
        with llm.trace(IDS) as once:
            once.keep("layers.0.mlp.out")
    np.testing.assert_array_equal(t["layers.0.mlp.out"], once["layers.0.mlp.out"] + 1)
    assert np.abs(outer - plain).max() > 0.01
    np.testing.assert_array_equal(llm.logits(IDS), plain)


def test_an_edit_may_be_entered_again(llm: LLM) -> None:
    plain = llm.logits(IDS)
    with pytest.raises(KeyError, match="no array has this name"):
        llm.edit("nonsense", scale=0)
    for edit in (llm.edit("layers.0.mlp.out", scale=2), llm.steer({0: np.ones(48)})):
        with edit:
            once = llm.logits(IDS)
            with edit:
                twice = llm.logits(IDS)
            np.testing.assert_array_equal(llm.logits(IDS), once)
        np.testing.assert_array_equal(llm.logits(IDS), plain)
        with edit:
            np.testing.assert_array_equal(llm.logits(IDS), once)
        assert not np.array_equal(once, plain) and not np.array_equal(twice, once)
    with llm.edit("layers.0.mlp.out", scale=4):
        four = llm.logits(IDS)
    with llm.edit("layers.0.mlp.out", scale=2), llm.edit("layers.0.mlp.out", scale=2):
        np.testing.assert_array_equal(llm.logits(IDS), four)


@pytest.mark.parametrize(("layout", "kv"), [("int4", "f32"), ("int8", "int8")])
def test_each_array_can_be_edited(layout: str, kv: str, tmp_path: Path) -> None:
    """Logits then have the same bits on both paths, for a prompt and for tokens one by one, and differ from before."""
    llm = byte_llm(tmp_path, layout, threads=2)
    plain = llm.logits(IDS[:9], llm.new_cache(9, kv))
    for name, point in llm.model.points.items():
        if point.derived:
            continue
        with llm.edit(name, lambda x: np.tanh(2 * x)):
            together = llm.logits(IDS[:9], llm.new_cache(9, kv))
            cache = llm.new_cache(9, kv)
            apart = [llm.logits(IDS[i : i + 1], cache)[0] for i in range(9)]
            llm.model.fused = False
            eager = llm.logits(IDS[:9], llm.new_cache(9, kv))
            llm.model.fused = True
        np.testing.assert_array_equal(apart, together, err_msg=name)
        np.testing.assert_array_equal(eager, together, err_msg=name)
        assert np.abs(together - plain).max() > 1e-3, name


def test_an_edit_may_begin_inside_of_a_trace(llm: LLM) -> None:
    with llm.edit("embed", doubled), llm.trace(IDS) as before:
        pass
    with llm.trace(IDS) as inside, llm.edit("embed", doubled):
        pass
    np.testing.assert_array_equal(inside["logits"], before["logits"])
    with pytest.raises(ValueError, match=r"edit of embed: positions: expected 0 to 20 of this text, found \[21\]"):
        with llm.trace(IDS), llm.edit("embed", scale=0, positions=[20, 21]):
            pass
    with llm.trace(IDS) as after:
        pass
    assert not np.array_equal(after["logits"], before["logits"])


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("embed", {"change": lambda x: x[:, :5]}, ValueError, r"edit of embed: expected the shape \(21, 48\), found"),
        ("embed", {"change": lambda x: x.astype(np.float64)}, TypeError, "edit of embed: expected float32"),
        ("embed", {"change": lambda x: 1}, TypeError, "edit of embed: expected a function that returns an array"),
        ("embed", {"change": lambda x: x * np.float32("nan")}, ValueError, "edit of embed: NaN in 1008 of 1008"),
        ("embed", {"change": lambda x: x + np.float32("inf")}, ValueError, "edit of embed: infinity in 1008 of 1008"),
        ("embed", {"change": np.inf}, ValueError, "edit of embed: infinity in 1008 of 1008"),
        ("logits", {"change": np.inf}, ValueError, "edit of logits: infinity in"),
        ("embed", {"scale": float("nan")}, ValueError, "edit of embed: scale: expected a finite number, found nan"),
        ("embed", {"scale": -np.inf}, ValueError, "edit of embed: scale: expected a finite number, found -inf"),
        ("embed", {"scale": 1e39}, ValueError, "edit of embed: scale: expected a finite number, found 1e"),
        ("final.norm", {"scale": 3e38}, ValueError, "edit of final.norm: infinity in"),
        ("embed", {"scale": "0"}, ValueError, "edit of embed: scale: expected a finite number, found '0'"),
        ("embed", {"change": np.ones(5)}, ValueError, r"edit of embed: expected a value of shape \(21, 48\), found"),
        ("embed", {"change": "x"}, TypeError, "edit of embed: expected numbers"),
        ("embed", {}, ValueError, "either a function or value, or scale="),
        ("embed", {"scale": 0, "positions": -1}, ValueError, "positions: expected integers >= 0, found -1"),
        ("layers.0.heads.4", {"scale": 0}, ValueError, "has the shape .T, 4, 12., and no head 4"),
        ("layers.0.attention.pattern", {"scale": 0}, ValueError, "it is computed to be looked at"),
        ("layers.7.mlp.out", {"scale": 0}, KeyError, "no array has this name"),
    ],
)  # fmt: skip
def test_wrong_edits_are_named(llm: LLM, name: str, options: dict[str, Any], error: type, message: str) -> None:
    plain, cache = llm.logits(IDS), llm.new_cache(30)
    for llm.model.fused in (False, True):
        with pytest.raises(error, match=message), llm.edit(name, **options):
            llm.logits(IDS, cache)
        assert len(cache) == 0
        np.testing.assert_array_equal(llm.logits(IDS), plain)


def test_edits_stay_in_their_thread(llm: LLM) -> None:
    plain, found = llm.logits(IDS), []
    with llm.edit("embed", scale=0):
        thread = threading.Thread(target=lambda: found.append(llm.logits(IDS)))
        thread.start()
        thread.join()
        assert not np.array_equal(llm.logits(IDS), plain)
    np.testing.assert_array_equal(found[0], plain)


def test_a_cache_remembers_what_filled_it(llm: LLM) -> None:
    """Edits, adapters and weights: a conversation goes on from what the same ones computed, and no further."""
    cache, text = llm.new_cache(60), "What do you"

    def reused() -> int:
        return llm.generate(text, max_tokens=1, cache=cache).timings.reused_tokens

    plain = llm.generate(text, max_tokens=3, cache=cache)
    with llm.edit("layers.0.mlp.out", scale=-3):
        assert reused() == 0 and reused() == len(text) - 1
        with llm.edit("layers.1.mlp.out", scale=-3):
            assert reused() == 0
    with llm.edit("layers.0.mlp.out", scale=-3):
        assert reused() == 0
    again = llm.generate(text, max_tokens=3, cache=cache)
    assert again.timings.reused_tokens == 0 and again.text == plain.text
    with llm.trace():
        assert reused() == len(text) - 1
    llm.lora.attach(LoraAdapter(llm.config, LoraConfig(4)), "other")
    assert reused() == 0
    llm.lora.use()
    assert reused() == 0 and reused() == len(text) - 1
    with llm.edit("embed", doubled):
        llm.logits([7], cache)  # after the text's tokens, which stay
    assert reused() == len(text) - 1
    llm.model.weights_changed()
    assert reused() == 0


def test_edits_act_on_each_sequence_of_a_batch(llm: LLM) -> None:
    def batched() -> np.ndarray:
        pool = KVPool(llm.config, 2 * block_bytes(llm.config))
        blocks = [pool.layout.new_block(0) for _ in range(2)]
        runs = [
            Run(np.append(IDS[:n], last), 0, np.array([[block.address]]), 1, 9)
            for block, (n, last) in zip(blocks, ((3, 9), (5, 8)), strict=True)
        ]
        return Many(llm.model, pool).forward(runs)

    plain = batched()
    with llm.edit("layers.*.heads.2", scale=0):
        edited = batched()
        alone = llm.logits([*IDS[:5], 8])[-1]
    np.testing.assert_array_equal(edited[1], alone)
    assert np.abs(edited - plain).max() > 0.01
    with pytest.raises(ValueError, match="positions are those of one sequence"), llm.edit("embed", 0, positions=[3]):
        batched()


def test_nothing_is_kept_alive(llm: LLM) -> None:
    """Neither by the model nor by a cache that the edited model filled."""
    cache = llm.new_cache(30)

    class Change:
        def __call__(self, x: np.ndarray) -> np.ndarray:
            return 2 * x

    change = Change()
    with llm.edit("embed", change), llm.trace() as t:
        llm.logits(IDS, cache)
    kept = weakref.ref(t), weakref.ref(change)
    del t, change
    gc.collect()
    assert kept[0]() is None and kept[1]() is None
