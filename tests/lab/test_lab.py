"""swap, drift, quantisation_error, profile, roofline, cost: on tiny models, and against figures worked out by hand."""

import inspect
import math
from collections.abc import Hashable
from pathlib import Path

import matplotlib
import numba
import numpy as np
import pytest
from matplotlib.text import Text

import ruvllm.kernels as K
from ruvllm import lab
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.kernels import KERNELS
from ruvllm.lab.profiling import WAIT, Operation, Profile
from ruvllm.lab.rooflines import Point, Roofline
from ruvllm.lab.work import counted, work_of
from ruvllm.llm import LLM
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.model import Llama, ModelConfig
from ruvllm.model.config import ExpertsConfig
from ruvllm.model.low_rank import AdapterSet
from ruvllm.model.ops.recording import Pass
from ruvllm.model.ops.swapped import SWAPPED
from ruvllm.model.reference import reference_logits, reference_states
from tests.model import tiny
from tests.model.architectures import ARCHITECTURES, CONFIG, build

matplotlib.use("Agg")
LIMITS = Peaks(
    2, 1e11, 4e11, (Level("L1", 32 << 10, 4e11), Level("L2", 1 << 20, 2e11), Level("memory", math.inf, 2e10))
)
IDS = [5, 9, 2, 11, 3, 7]


def loaded(case: str, layout: str = "f32") -> LLM:
    """A tiny model with no tokenizer, from its file."""
    path = tiny.directory(case)
    with open_checkpoint(path) as checkpoint:
        return LLM(Llama(checkpoint.config, checkpoint, layout, threads=1), _NoText(), Path(path))


class _NoText:
    eos_ids = ()

    def stream_decoder(self, **_):
        return self

    def push(self, token):
        return ""

    def finish(self):
        return ""


def numpy_rms_norm(x, weight, eps=1e-5):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


@numba.njit
def compiled_rms_norm(x, weight, eps):
    out = np.empty_like(x)
    for row in range(x.shape[0]):
        s = np.float32(0)
        for i in range(x.shape[1]):
            s += x[row, i] * x[row, i]
        scale = np.float32(1) / np.sqrt(s / np.float32(x.shape[1]) + np.float32(eps))
        for i in range(x.shape[1]):
            out[row, i] = x[row, i] * scale * weight[i]
    return out


# --- swap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_a_swapped_kernel_is_what_a_model_uses(fused: bool) -> None:
    llm = loaded("llama2_mha")
    llm.model.fused = fused
    before = llm.logits(IDS)
    with lab.swap(rms_norm=numpy_rms_norm) as swapped:
        assert K.rms_norm is not KERNELS["rms_norm"].function
        during = llm.logits(IDS)
        assert swapped["rms_norm"].calls == 2 * llm.config.num_hidden_layers + 1
    np.testing.assert_allclose(during, before, atol=1e-4)
    assert np.any(during != before)
    np.testing.assert_array_equal(llm.logits(IDS), before)
    assert K.rms_norm is KERNELS["rms_norm"].function
    assert all(error < 1e-12 for error in swapped["rms_norm"].errors)
    for text in (str(swapped), swapped._repr_html_()):
        assert "rows 1, n 768" in text
    assert len(swapped.plot().patches) == 2 * len(KERNELS["rms_norm"].sizes)


def off_by(factor: float, name: str):
    """The kernel itself, whose result is then a little larger."""

    def larger(**arguments):
        return np.float32(factor) * np.asarray(getattr(K, name)(**arguments))

    spec = KERNELS[name]
    parameters = [p for p in inspect.signature(spec.function).parameters.values() if p.name != "out"]

    def call(*given, **named):
        return larger(**dict(zip((p.name for p in parameters), given, strict=False)), **named)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("llama", ("rms_norm", "silu_mul", "apply_rope_tables")),
        ("gemma", ("rms_norm", "gelu_mul")),
        ("bounded", ("clamped_swiglu", "scale", "softcap")),
        ("mixture", ("silu_mul",)),
    ],
)
def test_both_paths_call_what_is_swapped(variant: str, names: tuple[str, ...]) -> None:
    """With the same bits and as often; for a prompt, for one token, and together with a hook."""
    model = build(variant, "int8")
    llm = LLM(model, _NoText(), Path())
    plain = llm.logits(IDS)
    for name in names:
        found, calls = [], []
        for model.fused in (True, False):
            with lab.swap(tolerance=1e-3, **{name: off_by(1.01, name)}) as swapped:
                cache = llm.new_cache(20)
                with llm.edit("final.residual", scale=0.5):
                    rows = [llm.logits(IDS, cache), llm.logits([3], cache)]
                found.append(np.concatenate([*rows, llm.logits(IDS)]))
                calls.append(swapped[name].calls)
        np.testing.assert_array_equal(found[0], found[1], err_msg=name)
        assert calls[0] == calls[1] > 0 and np.any(found[0][-len(IDS) :] != plain), name
    model.fused = True
    np.testing.assert_array_equal(llm.logits(IDS), plain)


def test_a_wrong_function_never_goes_live() -> None:
    for wrong, message in (
        (lambda x, weight, eps: x, "rms_norm: at .* error is .*: not swapped"),
        (lambda x, weight, eps: x[0], "rms_norm: expected results of shape"),
    ):
        with pytest.raises(ValueError, match=message), lab.swap(rms_norm=wrong):
            raise AssertionError("unreachable")
        assert K.rms_norm is KERNELS["rms_norm"].function
    with pytest.raises(ValueError, match="no kernel 'rmsnorm'"), lab.swap(rmsnorm=numpy_rms_norm):
        pass
    with pytest.raises(TypeError, match="rms_norm: expected a function"), lab.swap(rms_norm=3):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="expected at least one"), lab.swap():
        pass


def test_a_function_that_spoils_its_arguments_never_goes_live() -> None:
    def in_place(x, weight, eps):
        x *= weight / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        return x

    with pytest.raises(ValueError, match="^rms_norm: the function changes its arguments: x$"):
        with lab.swap(rms_norm=in_place):
            raise AssertionError("unreachable")
    with lab.swap(kv_append=lambda *args, **named: KERNELS["kv_append"].function(*args, **named)):
        pass  # what the kernel itself changes may be changed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, weight, eps, out: out, r"expected a function of \(x, weight, eps\), found one of .*'out'"),
        (lambda a, b, c: a, r"expected a function of \(x, weight, eps\), found one of \(a, b, c\)"),
        (lambda x, weight, eps: None, "expected a result of real numbers, found NoneType"),
        (lambda x, weight, eps: "hello", "expected a result of real numbers, found str"),
        (lambda x, weight, eps: x * 1j, "expected a result of real numbers, found an array of complex64"),
    ],
)
def test_a_function_of_another_kind_is_refused(wrong, message) -> None:
    with pytest.raises(TypeError, match=f"^rms_norm: {message}"), lab.swap(rms_norm=wrong):
        raise AssertionError("unreachable")


def test_a_kernel_is_swapped_once_at_a_time_and_others_with_it() -> None:
    with lab.swap(rms_norm=lambda x, weight, eps: K.rms_norm(x, weight, eps)) as outer:
        with pytest.raises(ValueError, match="^rms_norm: swapped already"), lab.swap(rms_norm=numpy_rms_norm):
            raise AssertionError("unreachable")
        K.rms_norm(np.ones((2, 8), np.float32), np.ones(8, np.float32), 1e-5)
        assert outer["rms_norm"].calls == 1
        inner = lab.swap(silu_mul=lambda gate, up: gate / (1 + np.exp(-gate)) * up)
        inner.__enter__()
    assert SWAPPED == {"silu_mul"}  # the other block, begun later, goes on
    assert K.rms_norm is KERNELS["rms_norm"].function and K.silu_mul is not KERNELS["silu_mul"].function
    inner.__exit__(None, None, None)
    assert not SWAPPED and K.silu_mul is KERNELS["silu_mul"].function


def test_a_compiled_function_can_be_swapped_in() -> None:
    with lab.swap(rms_norm=compiled_rms_norm) as swapped:
        x = np.ones((2, 8), np.float32)
        out = np.empty_like(x)
        assert K.rms_norm(x, x[0], 1e-5, out=out) is out
    assert swapped["rms_norm"].calls == 1 and np.allclose(out, 1, atol=1e-4)


def test_an_error_inside_puts_the_kernel_back() -> None:
    with pytest.raises(ZeroDivisionError), lab.swap(silu_mul=lambda gate, up: gate / (1 + np.exp(-gate)) * up):
        raise ZeroDivisionError
    assert K.silu_mul is KERNELS["silu_mul"].function and not SWAPPED


def test_tolerance_lets_an_approximation_in() -> None:
    rough = lambda x, weight, eps: numpy_rms_norm(x, weight, eps) * np.float32(1.001)
    llm = loaded("llama2_mha")
    exact = lab.drift(llm, IDS, progress=False)
    with lab.swap(tolerance=1e-5, rms_norm=rough):
        rougher = lab.drift(llm, IDS, progress=False)
    assert rougher.errors[-1] > 50 * exact.errors[-1]


# --- drift, quantisation ------------------------------------------------------------------------------------------


def test_drift_is_the_same_on_both_paths() -> None:
    llm = loaded("llama2_mha", "int8")
    replayed = lab.drift(llm, IDS, progress=False)
    llm.model.fused = False
    assert lab.drift(llm, IDS, progress=False) == replayed


def test_drift_of_each_layer_against_float64() -> None:
    """The last state's error is that of the logits' own comparison; coarser weights are farther away."""
    found = {layout: lab.drift(loaded("llama2_mha", layout), IDS, progress=False) for layout in ("f32", "f16", "int8")}
    layers = loaded("llama2_mha").config.num_hidden_layers
    assert all(len(d.errors) == layers + 1 for d in found.values())
    assert found["f32"].errors[0] == 0 and found["f32"].errors[-1] < 1e-6 and found["f32"].agreement == 1
    assert found["f32"].errors[-1] < found["f16"].errors[-1] < found["int8"].errors[-1]
    with open_checkpoint(tiny.directory("llama2_mha")) as checkpoint:
        expected = reference_logits(checkpoint, IDS)
        states = list(reference_states(checkpoint, IDS))
    assert len(states) == layers + 2 and np.array_equal(states[-1], expected)
    llm = loaded("llama2_mha", "int8")
    got = llm.logits(IDS, llm.new_cache(len(IDS), "f32"))
    assert found["int8"].logits == pytest.approx(np.abs(got - expected).max(), rel=1e-6)
    ax = found["f32"].plot()
    assert found["int8"].plot(ax) is ax and len(ax.lines) == 2
    assert "layer 0" in str(found["int8"]) and "KL divergence" in found["int8"]._repr_html_()


def test_quantisation_error_of_each_tensor() -> None:
    path = tiny.directory("llama2_mha")
    found = lab.quantisation_error(path, ("f32", "f16", "int8", "int4"), progress=False)
    with open_checkpoint(path) as checkpoint:
        w = checkpoint.tensor("layers.0.q").float32().astype(np.float64)
    half = np.linalg.norm(w.astype(np.float16) - w) / np.linalg.norm(w)
    assert found.errors["f32"]["layers.0.q"] == 0
    assert found.errors["f16"]["layers.0.q"] == pytest.approx(half, rel=1e-3)
    assert all(found.errors["int8"][n] < found.errors["int4"][n] < 0.2 for n in found.dtypes)
    assert "layers.1.down" in str(found) and "int4" in found._repr_html_()
    assert len(found.plot().lines) == 4
    with pytest.raises(ValueError, match="layouts: expected some of"):
        lab.quantisation_error(path, ("int3",))


# --- profile ------------------------------------------------------------------------------------------------------


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
    llm = LLM(Llama(config, None, "int8", threads=1), _NoText(), Path())
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


# --- roofline, cost -----------------------------------------------------------------------------------------------


def test_roofline_places_kernels() -> None:
    found = lab.roofline("rms_norm", "gemv", "linear int4", peaks=LIMITS)
    assert [x.name for x in found.points] == ["rms_norm", "gemv", "linear int4 x1", "linear int4 x96"]
    norm = found.points[0]
    sizes = max(KERNELS["rms_norm"].sizes, key=lambda s: KERNELS["rms_norm"].flops(**s))
    assert norm.flops == 4 * sizes["rows"] * sizes["n"] and norm.seconds > 0
    assert norm.limit(LIMITS) == max(norm.flops / 1e11, norm.nbytes / LIMITS.bandwidth(norm.nbytes))
    assert found.points[3].integer and found.points[3].limit(LIMITS) == max(
        found.points[3].flops / 4e11, found.points[3].nbytes / LIMITS.bandwidth(found.points[3].nbytes)
    )
    assert "linear int4 x96" in str(found) and "op per byte" in found._repr_html_()
    assert len(found.plot().lines) == len(LIMITS.levels) + 2 + len(found.points)
    with pytest.raises(ValueError, match="no kernel 'gemw'"):
        lab.roofline("gemw", peaks=LIMITS)


def test_labels_of_many_kernels_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    works = np.exp(rng.normal(0, 1.2, (40, 2)))
    points = [Point(f"kernel_number_{i}", "", 1e6 * a, 1e6, a * 1e-4 * b, False) for i, (a, b) in enumerate(works)]
    ax = Roofline(LIMITS, tuple(points)).plot()
    ax.figure.canvas.draw()
    texts = [text for text in ax.texts if text.get_text().startswith("kernel_number")]
    # Of the letters alone, without lines to points; boxes of labels above each other may touch.
    boxes = [Text.get_window_extent(text).shrunk(0.96, 0.8) for text in texts]
    assert len(boxes) == 40
    assert not [(i, j) for i in range(40) for j in range(i) if boxes[i].overlaps(boxes[j])]


def test_cost_by_hand() -> None:
    config = ModelConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, name="small",
    )  # fmt: skip
    found = lab.cost(config, ("f32", "int8"), context=100, peaks=LIMITS)
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64
    head = 64 * 1008  # in panels of 16 rows
    vectors = 4 * 64 * 5
    cache = 4 * 2 * 2 * 2 * 16 * 112  # positions are kept in blocks of 16
    f32, int8 = found["f32"], found["int8"]
    assert f32.weights == Llama(config, layout="f32").nbytes == 4 * (2 * head + 2 * layer) + vectors
    assert f32.cache == cache
    assert f32.bytes_per_token == 4 * (head + 64 + 2 * layer) + vectors + cache
    assert f32.bytes_of_prompt == 4 * (head + 100 * 64 + 2 * layer) + vectors
    attention = 4 * 100 * 4 * 16 * 2
    assert f32.flops_per_token == int8.flops_per_token == 2 * (64 * 1000 + 2 * layer) + attention
    # Of a prompt, each token goes through the layers and sees half of it; one of the hundred meets the head.
    products, seen = 2 * 2 * layer + 2 * 64 * 1000 / 100, attention * 50.5 / 100
    assert f32.prefill == pytest.approx(1e11 / (products + seen))
    assert int8.prefill == pytest.approx(1 / (products / 4e11 + seen / 1e11))
    # All of it fits into two L2 caches, from which it is read faster than it is computed.
    assert f32.decode == pytest.approx(1e11 / f32.flops_per_token) and f32.limit == "arithmetic"
    assert f32.decode < 2e11 / f32.bytes_per_token
    far = lab.cost(config, "f32", context=100, peaks=Peaks(2, 1e11, 4e11, LIMITS.levels[-1:]))["f32"]
    assert far.decode == pytest.approx(2e10 / f32.bytes_per_token) and far.limit == "memory"
    assert int8.weights == Llama(config, layout="int8").nbytes == (32 + 2) / 32 * (2 * head + 2 * layer) + vectors


@pytest.mark.parametrize("bias", [False, True])
def test_cost_of_a_mixture_by_hand(bias: bool) -> None:
    """A token meets the experts that it is sent to; five tokens reach at most as many as there are."""
    experts = ExpertsConfig(count=8, per_token=2, intermediate_size=48, layers=(1,), bias=bias)
    config = ModelConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, experts=experts,
    )  # fmt: skip
    attends, dense, router, expert = 4 * 64 * 64, 3 * 96 * 64, 8 * 64, 3 * 48 * 64
    head, biases = 64 * 1024, (48 + 48 + 64) * bias
    fixed = 2 * attends + dense + head + 16 * 64 + 5 * 64 + 8 * bias  # a router of 8 rows fills a panel
    for context, reached in ((1, 2), (3, 6), (5, 8)):
        found = lab.cost(config, "f32", context=context, peaks=LIMITS)["f32"]
        assert found.weights == Llama(config, layout="f32").nbytes == 4 * (fixed + 8 * (expert + biases) + head)
        cache = 4 * 2 * 16 * 2 * 64
        assert found.cache == cache
        assert found.bytes_per_token == 4 * (fixed + 2 * (expert + biases) + 64) + cache
        products = 2 * attends + dense + head + router + 2 * expert
        assert found.flops_per_token == 2 * products + 4 * context * 64 * 2
        assert found.bytes_of_prompt == 4 * (fixed + reached * (expert + biases) + context * 64)
    cost = lab.cost(config, "f32", peaks=LIMITS)
    assert cost.parameters - cost.active == 6 * (expert + biases)
    assert f"{cost.parameters / 1e9:.2f} B parameters ({cost.active / 1e9:.2f} B active)" in str(cost)


def test_cost_of_windows_tied_heads_and_biases_by_hand() -> None:
    """Of two layers one sees 40 tokens; q and k are normalised by head; the head is the embedding."""
    config = ModelConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, attention_bias=True, norms="both",
        qk_norm="head", sliding_window=40, layer_types=("sliding_attention", "full_attention"),
    )  # fmt: skip
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64
    vectors = 4 * (2 * (4 * 64 + 2 * 16 + 64 + 2 * 32) + 64)
    found = lab.cost(config, "f32", context=1000, peaks=LIMITS)["f32"]
    assert found.weights == Llama(config, layout="f32").nbytes == 4 * (64 * 1024 + 2 * layer) + vectors
    assert found.cache == 4 * 2 * 2 * 16 * (256 + 1024)  # a window and a pass of 126 tokens, and all, in blocks of 256
    assert found.bytes_per_token == 4 * (64 * 1024 + 64 + 2 * layer) + vectors + 4 * 2 * 2 * 16 * (48 + 1008)
    assert found.flops_per_token == 2 * (64 * 1024 + 2 * layer) + 4 * (40 + 1000) * 64
    products = 1000 * 2 * 2 * layer + 2 * 64 * 1024
    pairs = (40 * 41 // 2 + 960 * 40) + 1000 * 1001 // 2
    assert found.prefill == pytest.approx(1000 * 1e11 / (products + 4 * pairs * 64))


def test_cost_of_gemma3_270m_against_the_real_model() -> None:
    """Each byte is read once for a token but what a file has in other types; the arithmetic is that of its matrices."""
    config = ModelConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, tie_word_embeddings=True, norms="both", qk_norm="head",
        sliding_window=512, layer_types=(*("sliding_attention",) * 5, "full_attention") * 3,
    )  # fmt: skip
    found = lab.cost(config, "int8", context=4096, kv="f32", peaks=LIMITS)
    matrices = 262144 * 640 + 18 * (2 * 1024 * 640 + 2 * 256 * 640 + 3 * 2048 * 640)
    vectors = 4 * (18 * (4 * 640 + 2 * 256) + 640)
    assert found.parameters == found.active == matrices + vectors // 4 == 268_098_176
    assert found["int8"].weights == matrices * 34 // 32 + vectors
    seen = 3 * 4096 + 15 * 512
    assert found["int8"].bytes_per_token == (matrices + 640) * 34 // 32 + vectors + seen * 2 * 256 * 4
    assert found["int8"].flops_per_token == 2 * matrices + 4 * seen * 4 * 256


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_work_of_every_operation_is_known(name: str) -> None:
    """Steps of one token and of several, with an adapter on one matrix: what each of them costs."""
    model = build(name, "int8")
    down, up = np.ones((4, CONFIG.hidden_size), np.float32), np.ones((192, 4), np.float32)
    adapters = AdapterSet(CONFIG.num_hidden_layers, {"layers.0.q": (down, up)}, rounded=False)
    model.set_adapters(adapters)
    matrices: dict[Hashable, float] = {label: linear.weights.nbytes for label, linear in model.linears().items()}
    matrices |= {("layers.0.q", "down"): 1000.0, ("layers.0.q", "up"): 2000.0}
    for kind, tokens in ((Pass.TOKEN, 1), (Pass.PROMPT, 7)):
        steps = model.tapes.tape(kind, "f32").steps
        works = [(work_of(x, n, np.arange(tokens), matrices, 256.0), n) for x, n in counted(steps, tokens)]
        assert all(work.nbytes > 0 for work, _ in works)
        found = [work for work, _ in works]
        assert [work.weights for work in found].count(1000.0) == [work.weights for work in found].count(2000.0) == 1
        products = sum(work.flops for x, work in zip(steps, found, strict=True) if x.label in matrices)
        experts = model.config.experts
        share = 1.0 if experts is None else experts.per_token / experts.count  # of an expert's matrix, for each token
        others = [x for x in model.linears().values() if x.name not in ("embed", "head")]
        met = sum(x.size * (share if ".experts." in x.name else 1) for x in others)
        assert products == pytest.approx(2 * (tokens * met + model.decoder.head.size), rel=1e-12)


def test_cost_of_known_models_and_wrong_arguments() -> None:
    found = lab.cost("llama3-8b", "int4", peaks=LIMITS)
    assert found["int4"].weights == pytest.approx(5.02e9, rel=0.01)
    assert "LLaMA3-8B: 8.03 B parameters" in str(found) and "int4" in found._repr_html_()
    assert found.plot().get_ylabel() == "tokens/s at most"
    for arguments, message in (
        ({"config": "gpt-5"}, "config: expected a ModelConfig or one of"),
        ({"config": "llama3-8b", "weights": "int3"}, "weights: expected some of"),
        ({"config": "llama3-8b", "context": 0}, "context: expected at least 1"),
        ({"config": "llama3-8b", "kv": "f64"}, "kv: expected one of auto, f32, f16, int8, found 'f64'"),
    ):
        with pytest.raises(ValueError, match=message):
            lab.cost(**arguments, peaks=LIMITS)
    with pytest.raises(TypeError, match="config: expected a ModelConfig or a name, found int"):
        lab.cost(5, peaks=LIMITS)  # type: ignore[arg-type]


TAKE_MODELS = [name for name in lab.__all__ if "llm" in getattr(getattr(lab, name), "__annotations__", {})]


@pytest.mark.parametrize("name", TAKE_MODELS)
def test_a_path_in_place_of_a_loaded_model(name: str, tmp_path: Path) -> None:
    function = getattr(lab, name)
    others = [["a"]] * sum(x.default is x.empty for x in list(inspect.signature(function).parameters.values())[1:])
    for given in ("smollm2-135m", tmp_path / "model.gguf"):
        with pytest.raises(TypeError) as caught:
            function(given, *others)
        assert str(caught.value) == (
            f"llm: expected a loaded model, found {str(given)!r}: load it first: ruvllm.load(...)"
        )
    with pytest.raises(TypeError, match="expected a loaded model, as ruvllm.load returns, found Llama"):
        function(loaded("llama2_mha").model, *others)


def test_functions_that_take_models_are_found() -> None:
    assert set(TAKE_MODELS) == {"drift", "patch", "profile", "steering"}
