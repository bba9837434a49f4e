"""Kernels as operators of PyTorch on the CPU, and transformers models on them (``pip install 'ruvllm[torch]'``).

    import ruvllm.torch                                   # registers torch.ops.ruvllm.*
    y = torch.ops.ruvllm.rms_norm(x, weight, 1e-5)
    ruvllm.torch.patch(model, weights="int4")             # a LLaMA, Mistral or Qwen model of transformers

The operators know the shapes of fake tensors, so ``torch.compile`` keeps them in its graph. They have no gradients.
"""

from ruvllm.torch.operators import pack_int4, pack_int8
from ruvllm.torch.patching import PackedLinear, patch

__all__ = ["PackedLinear", "pack_int4", "pack_int8", "patch"]
