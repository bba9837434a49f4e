"""The configuration of a model: its sizes, the variants of its layers, its memory.

Field names are those of Hugging Face `transformers` where it has them. A `ModelConfig` that exists is valid: every
value is checked once, here, whatever file or program it came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from ruvllm.brief import short
from ruvllm.model.config_checks import ConfigError, require_boolean, require_integer, require_real
from ruvllm.model.rope_config import RopeConfig

__all__ = ["ConfigError", "ExpertsConfig", "MemoryEstimate", "ModelConfig", "RopeConfig"]

FULL, SLIDING = "full_attention", "sliding_attention"
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "hidden_act": ("silu", "gelu_tanh", "clamped_swiglu"),
    "norms": ("before", "after", "both"),
    "qk_norm": (None, "head", "row"),
}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_FLAGS = ("tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias", "attention_sinks")
_FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "swiglu_limit")
_OPTIONAL_FACTORS = ("attention_multiplier", "attn_logit_softcapping", "final_logit_softcapping")

GROUP = 32  # weights that share one scale in the INT8 and INT4 estimates
SCALE_BYTES = 2  # a float16 scale


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of a layer's feed-forward network: a router sends each token to a few of them.

    normalised: the weights of the chosen experts sum to 1; else they are their share of the softmax over all.
    layers: those that have experts; None: all. The shared expert is one that every token goes to, with a weight of
    sigmoid(x · shared_gate) if there is such a gate. bias: router and experts have biases.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalised: bool = True
    layers: tuple[int, ...] | None = None
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        for size in ("count", "per_token", "intermediate_size"):
            require_integer(f"experts.{size}", getattr(self, size))
        if self.per_token > self.count:
            raise ConfigError("experts.per_token", self.per_token, f"at most experts.count = {self.count}")
        for flag in ("normalised", "shared_gate", "bias"):
            require_boolean(f"experts.{flag}", getattr(self, flag))
        if self.shared_intermediate_size:
            require_integer("experts.shared_intermediate_size", self.shared_intermediate_size)
        elif self.shared_gate:
            raise ConfigError("experts.shared_gate", True, "False without a shared expert")
        if not isinstance(self.layers, tuple | None):
            raise ConfigError("experts.layers", self.layers, "a tuple or None")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a model's weights need, from `ModelConfig.memory_estimate`; for its cache see `kv_size`.

    parameters: number of weights; active: of those that one token meets, where experts are chosen. fp16: two bytes for
    each. int8, int4: matrices in whole bytes or nibbles with one float16 scale for each group of 32 along a row,
    vectors (norms, biases) at two bytes.
    """

    parameters: int
    active: int
    fp16: int
    int8: int
    int4: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that determines the shape and the arithmetic of a model.

    Sizes: hidden_size is E, intermediate_size F, num_attention_heads H, num_key_value_heads KV, head_dim D,
    vocab_size V; H · D need not equal E. `tie_word_embeddings` makes the embedding serve as the output head.

    Attention: with `sliding_window` W, position p of a windowed layer sees positions p-W+1 .. p; `layer_types` says
    which layers are windowed ("sliding_attention") and which see all ("full_attention"); without it all are alike.
    `local_rope` is the rotary embedding of windowed layers where it differs from `rope`; `no_rope_layers` have none.
    attention_bias: biases on q, k, v; attention_out_bias: on o. qk_norm: RMSNorm of q and k, of each "head" or of the
    whole "row". attention_multiplier: factor of the scores, 1 / √D if None;
    attn_logit_softcapping c: scores become c tanh(score / c). attention_sinks: each head has a score that takes part
    in the softmax and has no value.

    Feed-forward: hidden_act "silu" (SwiGLU), "gelu_tanh" (GeGLU), or "clamped_swiglu" with swiglu_limit and
    swiglu_alpha; mlp_bias: biases on gate, up, down; `experts`: a mixture.

    Layer: norms stand "before" attention and feed-forward, "after" them or on "both" sides. Embeddings are multiplied
    by embedding_multiplier, what a layer adds by residual_multiplier; logits are divided by logits_scaling, then
    softcapped by final_logit_softcapping.

    model_type names the family whose file format and names the model has; it decides no arithmetic.

    Raises ConfigError (a ValueError) naming the field, the value found and what was expected.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    no_rope_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: str | None = None
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    attention_sinks: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    experts: ExpertsConfig | None = None
    norms: str = "before"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    final_logit_softcapping: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""
    model_type: str = "llama"

    def __repr__(self) -> str:
        """Only what differs from the plainest model: few models make most of these choices."""
        plain = {f.name: f.default for f in fields(self)}
        said = (name for name, default in plain.items() if getattr(self, name) != default)
        return f"ModelConfig({', '.join(f'{name}={short(getattr(self, name))}' for name in said)})"

    def __post_init__(self) -> None:
        for size in SIZES:
            require_integer(size, getattr(self, size))
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"a divisor of num_attention_heads = {self.num_attention_heads}"
            raise ConfigError("num_key_value_heads", self.num_key_value_heads, expected)
        require_real("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        for flag in _FLAGS:
            require_boolean(flag, getattr(self, flag))
        for choice, known in _CHOICES.items():
            if getattr(self, choice) not in known:
                raise ConfigError(choice, getattr(self, choice), "one of " + ", ".join(map(repr, known)))
        for factor in (*_FACTORS, *(name for name in _OPTIONAL_FACTORS if getattr(self, name) is not None)):
            require_real(factor, getattr(self, factor), 0.0, 1e9)
        for rope in self.ropes:
            if not isinstance(rope, RopeConfig):
                raise ConfigError("rope", rope, "a RopeConfig")
            rope.require_head(self.head_dim)
        if len({rope.rotary_dim for rope in self.ropes}) > 1:
            raise ConfigError("local_rope", self.local_rope, "the rotary_dim of rope")
        self._check_layers()
        self._check_tokens()

    def _check_layers(self) -> None:
        if self.experts is not None and not isinstance(self.experts, ExpertsConfig):
            raise ConfigError("experts", self.experts, "an ExpertsConfig")
        for name in ("layer_types", "no_rope_layers"):
            if not isinstance(getattr(self, name), tuple):
                raise ConfigError(name, getattr(self, name), "a tuple")
        if self.sliding_window is not None:
            require_integer("sliding_window", self.sliding_window)
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            expected = f"one for each of num_hidden_layers = {self.num_hidden_layers}"
            raise ConfigError("layer_types", f"{len(self.layer_types)} types", expected)
        for kind in self.layer_types:
            if kind not in (FULL, SLIDING):
                raise ConfigError("layer_types", kind, f"{FULL!r} or {SLIDING!r}")
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise ConfigError("sliding_window", None, "an integer: layer_types has windowed layers")
        chosen = () if self.experts is None else self.experts.layers or ()
        for name, layers in (("no_rope_layers", self.no_rope_layers), ("experts.layers", chosen)):
            for layer in layers:
                if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < self.num_hidden_layers:
                    raise ConfigError(name, layer, f"layers from 0 to {self.num_hidden_layers - 1}")

    def _check_tokens(self) -> None:
        if not isinstance(self.eos_token_ids, tuple):
            raise ConfigError("eos_token_ids", self.eos_token_ids, "a tuple of token ids")
        ids = [("eos_token_ids", i) for i in self.eos_token_ids]
        if self.bos_token_id is not None:
            ids.append(("bos_token_id", self.bos_token_id))
        for name, token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise ConfigError(name, token, f"a token id from 0 to {self.vocab_size - 1}")

    # What a layer chooses.

    def window(self, layer: int) -> int | None:
        """The window of a layer's attention; None: it sees all positions."""
        if self.layer_types and self.layer_types[layer] != SLIDING:
            return None
        return self.sliding_window

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings that layers choose from."""
        if self.local_rope is None or self.local_rope == self.rope:
            return (self.rope,)
        return self.rope, self.local_rope

    def rope_index(self, layer: int) -> int | None:
        """Which of ``ropes`` a layer uses; None: its heads are not rotated."""
        if layer in self.no_rope_layers:
            return None
        return 0 if len(self.ropes) == 1 or self.window(layer) is None else 1

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward network of a layer is a mixture of experts."""
        return self.experts is not None and (self.experts.layers is None or layer in self.experts.layers)

    @property
    def attention_scale(self) -> float:
        """What the scores q·k are multiplied by."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    # Tensors.

    def layer_shapes(self, layer: int = 0) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of one layer, by its name within the layer. Matrices are (outputs, inputs)."""
        E, D = self.hidden_size, self.head_dim
        HD, KVD = self.num_attention_heads * D, self.num_key_value_heads * D
        before, after = self.norms != "after", self.norms != "before"
        shapes: dict[str, tuple[int, ...]] = {"attn_norm": (E,)} if before else {}
        shapes |= {"q": (HD, E), "k": (KVD, E), "v": (KVD, E), "o": (E, HD)}
        if self.attention_bias:
            shapes |= {"q_bias": (HD,), "k_bias": (KVD,), "v_bias": (KVD,)}
        if self.attention_out_bias:
            shapes["o_bias"] = (E,)
        if self.qk_norm is not None:
            per_head = self.qk_norm == "head"
            shapes |= {"q_norm": (D if per_head else HD,), "k_norm": (D if per_head else KVD,)}
        if self.attention_sinks:
            shapes["sinks"] = (self.num_attention_heads,)
        shapes |= {"attn_post_norm": (E,)} if after else {}
        shapes |= {"mlp_norm": (E,)} if before else {}
        shapes |= self._expert_shapes() if self.has_experts(layer) else self._mlp_shapes("", self.intermediate_size)
        return shapes | ({"mlp_post_norm": (E,)} if after else {})

    def _mlp_shapes(self, prefix: str, F: int, bias: bool | None = None) -> dict[str, tuple[int, ...]]:
        E = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}gate": (F, E), f"{prefix}up": (F, E), f"{prefix}down": (E, F)}
        if self.mlp_bias if bias is None else bias:
            shapes |= {f"{prefix}gate_bias": (F,), f"{prefix}up_bias": (F,), f"{prefix}down_bias": (E,)}
        return shapes

    def _expert_shapes(self) -> dict[str, tuple[int, ...]]:
        assert self.experts is not None
        experts, E = self.experts, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"router": (experts.count, E)}
        if experts.bias:
            shapes["router_bias"] = (experts.count,)
        for x in range(experts.count):
            shapes |= self._mlp_shapes(f"experts.{x}.", experts.intermediate_size, experts.bias)
        if experts.shared_intermediate_size:
            shapes |= self._mlp_shapes("shared.", experts.shared_intermediate_size, False)
        return shapes | ({"shared_gate": (1, E)} if experts.shared_gate else {})

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the model, by canonical name: `embed`, `norm`, `head`, `layers.{i}.q` ..."""
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, self.hidden_size)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in self.layer_shapes(i).items()}
        shapes["norm"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["head"] = (self.vocab_size, self.hidden_size)
        return shapes

    def parameter_count(self) -> int:
        """Number of weights; a tied head counts once, of a mixture all experts."""
        return self._total(math.prod)

    def active_parameter_count(self) -> int:
        """Number of weights used for one token: of a mixture only the experts that it is sent to."""
        if self.experts is None:
            return self.parameter_count()
        expert = self._mlp_shapes("", self.experts.intermediate_size, self.experts.bias)
        idle = (self.experts.count - self.experts.per_token) * sum(map(math.prod, expert.values()))
        return self.parameter_count() - idle * sum(self.has_experts(i) for i in range(self.num_hidden_layers))

    def memory_estimate(self) -> MemoryEstimate:
        """Bytes of the weights at several precisions; see `MemoryEstimate`."""
        parameters = self.parameter_count()
        return MemoryEstimate(
            parameters=parameters,
            active=self.active_parameter_count(),
            fp16=2 * parameters,
            int8=self._total(lambda shape: _quantized_bytes(shape, 8)),
            int4=self._total(lambda shape: _quantized_bytes(shape, 4)),
        )

    def _total(self, cost: Callable[[tuple[int, ...]], int]) -> int:
        """Sum of cost(shape) over all tensors of the model."""
        return sum(cost(shape) for shape in self.tensor_shapes().values())


def _quantized_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Bytes of one tensor quantised in groups along its rows; a vector stays at two bytes a value."""
    if len(shape) == 1:
        return 2 * shape[0]
    rows, columns = shape
    return rows * ((columns * bits + 7) // 8 + (columns + GROUP - 1) // GROUP * SCALE_BYTES)
