"""PyTorch and PEFT in an interpreter of their own: one training step per request, a JSON line each way."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any


class Trainer:
    """One model with an adapter, and its optimizer."""

    def load(self, model: str, adapter: str, threads: int, checkpointing: bool) -> dict[str, str]:
        """Read model and adapter; the adapter learns."""
        import peft  # type: ignore[import-not-found]
        import torch  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]

        self.torch = torch
        torch.set_num_threads(threads)
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        self.model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.model.train()
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=0.0, weight_decay=0.0)
        return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}

    def step(self, ids: list[list[int]], targets: list[list[int]], lr: float, max_norm: float) -> dict[str, float]:
        """Learn from sequences, padded to the longest; targets are those of the next token, -1 where none counts."""
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

    def loss(self, ids: list[list[int]], targets: list[list[int]]) -> dict[str, float]:
        """Mean loss, without learning."""
        torch = self.torch
        total, count = 0.0, 0
        with torch.no_grad():
            for row, wanted in zip(ids, targets, strict=True):
                logits = self.model(input_ids=torch.tensor([row])).logits[0]
                known = torch.tensor(wanted)
                losses = torch.nn.functional.cross_entropy(logits, known, ignore_index=-1, reduction="sum")
                total, count = total + losses.item(), count + sum(t >= 0 for t in wanted)
        return {"loss": total / count}

    def peak(self) -> dict[str, float]:
        """Most memory that this process has held, in MB."""
        return {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    trainer: Any = Trainer()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            answer = {"result": getattr(trainer, name)(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
