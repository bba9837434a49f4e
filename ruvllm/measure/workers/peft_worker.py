"""PyTorch and PEFT as a worker (see ``workers``): one training step per request."""

from __future__ import annotations

import resource
import time
from importlib import import_module
from typing import Any

from serve import serve  # type: ignore[import-not-found]  # in this program's directory, not in a package


class Trainer:
    """One model with an adapter, and its optimizer."""

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")
        self.transformers: Any = import_module("transformers")
        self.peft: Any = import_module("peft")

    def hello(self) -> dict[str, str]:
        """The versions of the three libraries."""
        return {library.__name__: library.__version__ for library in (self.torch, self.transformers, self.peft)}

    def load(self, model: str, adapter: str, threads: int, checkpointing: bool) -> None:
        """Read model and adapter; only the adapter is trained."""
        torch = self.torch
        torch.set_num_threads(threads)
        base = self.transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        self.model: Any = self.peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.model.train()
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=0.0, weight_decay=0.0)

    def step(self, ids: list[list[int]], targets: list[list[int]], lr: float, max_norm: float) -> dict[str, float]:
        """Train on sequences, padded to the longest; targets are the next tokens, -1 where none counts."""
        torch = self.torch
        started = time.perf_counter()
        longest = max(map(len, ids))
        inputs = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        wanted = torch.tensor([row + [-1] * (longest - len(row)) for row in targets])
        hidden = self.model.base_model.model.model(input_ids=inputs, attention_mask=seen, use_cache=False)[0]
        where = wanted >= 0  # logits only where they count, as ruvllm does
        logits = self.model.base_model.model.lm_head(hidden[where])
        loss = torch.nn.functional.cross_entropy(logits, wanted[where])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.learned, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "grad_norm": norm.item(), "seconds": time.perf_counter() - started}

    def loss(self, ids: list[list[int]], targets: list[list[int]]) -> float:
        """Mean loss, without training."""
        torch = self.torch
        total, count = 0.0, 0
        with torch.no_grad():
            for row, wanted in zip(ids, targets, strict=True):
                logits = self.model(input_ids=torch.tensor([row])).logits[0]
                known = torch.tensor(wanted)
                losses = torch.nn.functional.cross_entropy(logits, known, ignore_index=-1, reduction="sum")
                total, count = total + losses.item(), count + sum(t >= 0 for t in wanted)
        return total / count

    def peak(self) -> float:
        """Peak memory of this process, in MB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    serve(Trainer)
