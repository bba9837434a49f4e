"""Makes tests/data/lora: adapters that PEFT wrote for the tiny checkpoints, with its logits, loss and gradients.

Run `python tests/data/make_lora.py` where torch, transformers and peft are installed; the committed files were made
with torch 2.13, transformers 5.24 and peft 0.21. Each case is a directory as PEFT saves it, with a file `golden.npz`:
`ids` (T,), `targets` (T,) (the id that each position predicts, -1 where it does not count), `logits` (T, V), `loss`,
and the gradients of the mean loss by tensor name.

`python tests/data/make_lora.py check CASE DIRECTORY` reads an adapter that ruvllm saved, with PEFT, and prints the
largest difference of its logits from the golden ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch  # type: ignore[import-not-found]
from peft import LoraConfig, PeftModel, get_peft_model  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM  # type: ignore[import-not-found]

HERE = Path(__file__).parent
OUT = HERE / "lora"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama3_scaled_gqa": LoraConfig(r=3, lora_alpha=6, target_modules=ALL, task_type="CAUSAL_LM"),
    "mistral_window": LoraConfig(r=2, lora_alpha=5, target_modules=ALL, use_rslora=True, task_type="CAUSAL_LM"),
    "bf16_sharded_tied": LoraConfig(r=4, lora_alpha=4, target_modules=ALL, task_type="CAUSAL_LM"),
    "attention_bias": LoraConfig(r=1, lora_alpha=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


def base(case: str) -> torch.nn.Module:
    """The tiny checkpoint in float32."""
    path = HERE / "tiny" / case
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def make(case: str, config: LoraConfig, seed: int) -> None:
    """Write one case's directory."""
    directory = OUT / case
    shutil.rmtree(directory, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(base(case), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / parameter.shape[1] ** 0.5)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    settings = json.loads((directory / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = case
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1))

    with np.load(HERE / "tiny" / case / "logits.npz") as file:
        ids = file["ids"]
    targets = np.append(ids[1:], -1)
    targets[: len(ids) // 3] = -1  # a prompt that does not count
    logits = model(torch.from_numpy(ids)[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), ignore_index=-1)
    loss.backward()
    gradients = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    results = {"logits": logits.detach().numpy(), "loss": loss.item(), **gradients}
    np.savez_compressed(directory / "golden.npz", ids=ids, targets=targets, **results)
    for file in directory.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{case}: {size} bytes, loss {float(loss):.4f}, {len(gradients)} gradients")


def check(case: str, directory: str) -> None:
    """Read an adapter with PEFT and compare its logits with the golden ones."""
    with np.load(OUT / case / "golden.npz") as file:
        ids, expected = file["ids"], file["logits"]
    model = PeftModel.from_pretrained(base(case), directory).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    print(f"{case}: max |difference of logits| {np.abs(logits - expected).max():.2e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(*sys.argv[2:4])
    else:
        for number, (name, settings) in enumerate(CASES.items()):
            make(name, settings, seed=2000 + number)
