"""Makes tests/data/transformer_lens: what TransformerLens computes inside of two tiny models, and patching results.

Run ``python -m tests.data.make_transformer_lens`` where torch, transformers and transformer-lens are installed; the
committed files were made with transformer-lens 2.16.1, torch 2.13 and transformers 5.24. The weights are those of
``tests.model.tiny_checkpoints``; norms are not folded. A file has ``ids``, ``corrupted``, ``patched`` (layers, T), and
each array by TransformerLens' name for it, without the axis of the batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from transformer_lens import HookedTransformer, HookedTransformerConfig  # type: ignore[import-not-found]
from transformer_lens.pretrained.weight_conversions import (  # type: ignore[import-not-found]
    convert_llama_weights,
    convert_qwen2_weights,
)
from transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

from tests.model import tiny_checkpoints

OUT = Path(__file__).parent / "transformer_lens"
CASES = {"llama3": convert_llama_weights, "qwen2": convert_qwen2_weights}
TOKENS, CHANGED, TARGETS = 12, 4, (5, 9)
KEPT = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "attn.hook_q", "attn.hook_v", "attn.hook_rot_k",
    "attn.hook_pattern", "attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out",
    "ln1.hook_normalized", "ln2.hook_normalized", "ln_final.hook_normalized",
)  # fmt: skip


def hooked(variant: str, directory: Path) -> Any:
    """The model of a variant as TransformerLens has it."""
    found = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoints.write_checkpoint(directory, tiny_checkpoints.read(variant)), dtype=torch.float32
    )
    config = tiny_checkpoints.read(variant).config
    options: dict[str, Any] = {}
    scaling = config.get("rope_scaling")
    if scaling:
        options = {
            "use_NTK_by_parts_rope": True, "NTK_by_parts_factor": scaling["factor"],
            "NTK_by_parts_low_freq_factor": scaling["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": scaling["high_freq_factor"],
            "NTK_original_ctx_len": scaling["original_max_position_embeddings"],
        }  # fmt: skip
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    cfg = HookedTransformerConfig(
        n_layers=config["num_hidden_layers"], d_model=config["hidden_size"], d_head=head, n_ctx=64,
        n_heads=config["num_attention_heads"], n_key_value_heads=config["num_key_value_heads"],
        d_mlp=config["intermediate_size"], d_vocab=config["vocab_size"], act_fn="silu", gated_mlp=True,
        normalization_type="RMS", eps=config["rms_norm_eps"], positional_embedding_type="rotary", rotary_dim=head,
        rotary_base=int(config["rope_theta"]), final_rms=True, device="cpu", **options,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict(CASES[variant](found, cfg), strict=False)
    return model.eval()


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for variant in CASES:
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            model = hooked(variant, Path(directory))
            checkpoint = tiny_checkpoints.read(variant)
            ids = checkpoint.ids[:TOKENS]
            logits, cache = model.run_with_cache(torch.tensor(ids)[None])
            assert np.abs(logits[0].numpy() - checkpoint.logits[:TOKENS]).max() < 2e-4
            arrays = {n: x[0].numpy() for n, x in cache.items() if n.endswith(KEPT)}
            corrupted = ids.copy()
            corrupted[CHANGED] = (ids[CHANGED] + 7) % len(model.W_E)
            patched = np.empty((model.cfg.n_layers, TOKENS), np.float32)
            for layer, position in np.ndindex(*patched.shape):
                name = f"blocks.{layer}.hook_resid_pre"

                def restore(x: Any, hook: Any, clean: Any = cache[name], position: int = position) -> Any:
                    x[:, position] = clean[:, position]
                    return x

                result = model.run_with_hooks(torch.tensor(corrupted)[None], fwd_hooks=[(name, restore)])[0, -1]
                patched[layer, position] = result[TARGETS[0]] - result[TARGETS[1]]
        np.savez_compressed(
            OUT / f"{variant}.npz", ids=ids, corrupted=corrupted, targets=TARGETS, patched=patched, **arrays
        )


if __name__ == "__main__":
    main()
