"""lab.cost and lab.roofline: bytes and arithmetic, against figures worked out by hand."""

from collections.abc import Hashable

import numpy as np
import pytest
from matplotlib.text import Text

from ruvllm import lab
from ruvllm.kernels import KERNELS
from ruvllm.lab.rooflines import Point, Roofline
from ruvllm.lab.work import counted, work_of
from ruvllm.measure.peaks import Peaks
from ruvllm.model import Llama, ModelConfig
from ruvllm.model.config import ExpertsConfig
from ruvllm.model.low_rank import AdapterSet
from ruvllm.model.ops.recording import Pass
from tests.lab.cases import LIMITS
from tests.model.architectures import ARCHITECTURES, CONFIG, build


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
