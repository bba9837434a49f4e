"""patch(model): a LLaMA, Mistral or Qwen model of transformers runs on the kernels, in place."""

from types import MethodType
from typing import Any

import torch  # type: ignore[import-not-found]
from torch import Tensor, nn

from ruvllm.torch import operators

WEIGHTS = ("f32", "int8", "int4")
ATTENTION = "ruvllm"  # the name of our attention in transformers


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed, in 32, 8 or 4 bits; made from ``nn.Linear``.

    Args:
        layer: whose weights and bias are taken.
        weights: "f32", "int8" or "int4".
    """

    def __init__(self, layer: nn.Linear, weights: str) -> None:
        super().__init__()
        pack = {"f32": operators.pack_float, "int8": operators.pack_int8, "int4": operators.pack_int4}[weights]
        self.in_features, self.out_features, self.weights = layer.in_features, layer.out_features, weights
        self.register_buffer("packed", pack(layer.weight))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias: x (..., K) -> (..., N)."""
        packed, rows = self.packed, self.out_features
        assert isinstance(packed, Tensor)
        if self.weights == "f32":
            y = operators.linear(x, packed, rows)
        else:
            y = operators.quant_linear(x, packed, rows, 8 if self.weights == "int8" else 4)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={self.weights}"


def patch(model: Any, weights: str = "f32") -> Any:
    """Run a model of transformers on ruvllm's kernels: norms, gated activations, attention, linear layers.

    The model is changed in place, for inference: it has no gradients afterwards. With padding, or another mask than the
    causal one, attention is PyTorch's. Rotary embedding stays as it is.

    Args:
        model: a ``LlamaForCausalLM``, ``MistralForCausalLM``, ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM`` on the CPU.
        weights: "f32", or linear layers but the last in "int8" or "int4".

    Returns:
        The model.

    Raises:
        TypeError: the model is of another class.
        ValueError: unknown weights, or a model that is not on the CPU.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, found {weights!r}")
    known = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    if type(model).__name__ not in known:
        raise TypeError(f"model: expected a {', '.join(known[:-1])} or {known[-1]}, found {type(model).__name__}")
    devices = {str(p.device) for p in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"model: expected all weights on the CPU, found {', '.join(sorted(devices))}")
    model.eval().requires_grad_(False)
    for module in list(model.modules()):
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            if model.config.hidden_act == "silu":
                module.forward = MethodType(_gated, module)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                kind = "f32" if child is model.lm_head else weights
                setattr(module, name, PackedLinear(child, kind))
    _register()
    model.set_attn_implementation(ATTENTION)
    return model


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return operators.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(operators.silu_mul(self.gate_proj(x), self.up_proj(x)))


def _register() -> None:
    """Make our attention known to transformers, with masks as PyTorch's attention has them: None where it is causal."""
    from transformers import AttentionInterface, AttentionMaskInterface  # type: ignore[import-not-found]
    from transformers.masking_utils import sdpa_mask  # type: ignore[import-not-found]

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, KV, S, D) -> (B, T, H, D)."""
    tokens, length = query.shape[2], key.shape[2]
    if attention_mask is not None or query.shape[-1] != value.shape[-1] or 1 < tokens < length:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward  # type: ignore[import-not-found]

        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.ops.ruvllm.attention(q, k, v, True, None, settings.get("scaling")), None
