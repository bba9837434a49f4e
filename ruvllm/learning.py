"""Learning: adapters over a model, read from files or trained on text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm.compiling import compile_training
from ruvllm.model.llama import Llama
from ruvllm.model.lora import LoraAdapter, MicroLora
from ruvllm.progress import tqdm

if TYPE_CHECKING:
    from ruvllm.model.training import Step, Trainer
    from ruvllm.model.training_data import Example
    from ruvllm.training_text import Record


class Learning:
    """The methods of ``LLM`` for adapters."""

    model: Llama
    tokenizer: Any
    lora: MicroLora
    config: Any  # LLM.config

    def load_adapter(self, path: str | os.PathLike[str], weight: float = 1.0, name: str | None = None) -> LoraAdapter:
        """Read a LoRA adapter and activate it, next to other active ones; ``llm.lora`` mixes, swaps and removes them.

        Args:
            path: a directory that PEFT wrote, or a GGUF file of llama.cpp.
            weight: its factor.
            name: its name in ``llm.lora``; that of the file or directory if None.

        Raises:
            FileNotFoundError: there is nothing at ``path``.
            ModelFormatError: it is unsound, of a kind that is not supported, or was made for another model.
            ValueError: the name is taken, or the weight is not a finite number.
        """
        from ruvllm.checkpoint.adapters import load_adapter

        adapter = load_adapter(path, self.config)
        return self.lora.attach(adapter, Path(path).resolve().stem if name is None else name, weight)

    def fit(
        self, data: str | os.PathLike[str] | Iterable[Record], name: str = "trained", context: int = 512, **options: Any
    ) -> Trainer:
        """Train an adapter and activate it. The base weights stay frozen; they may have 4 bits.

        Args:
            data: a .jsonl or text file, or records; see ``training_text.to_example`` for their forms.
            name: of the adapter in ``llm.lora``: a new one, or one to train further.
            context: longer examples are cut to this many tokens.
            options: ``config`` (LoraConfig), ``training`` (TrainingConfig), ``penalty``, ``on_step``: see
                ``MicroLora.fit``. Without ``on_step`` a bar shows the loss.

        Raises:
            TrainingDataError: the data holds nothing to learn, or a line is unsound.
            FloatingPointError: the loss is no longer a finite number.
        """
        examples = self.examples(data, context)
        compile_training(self.model.layouts)
        if "on_step" in options:
            return self.lora.fit(examples, name, **options)
        with tqdm(desc="training", unit="step", disable=None) as bar:

            def advance(step: Step, total: int) -> None:
                bar.total = total
                bar.set_postfix(loss=f"{step.loss:.3f}")
                bar.update()

            return self.lora.fit(examples, name, on_step=advance, **options)

    def examples(self, data: str | os.PathLike[str] | Iterable[Record], context: int = 512) -> list[Example]:
        """The tokens of data for training or evaluation; see ``fit``."""
        from ruvllm.training_text import read_examples, to_examples

        if isinstance(context, bool) or not isinstance(context, int) or context < 2:
            raise ValueError(f"context: expected an integer >= 2, found {context!r}")
        context = min(context, self.config.max_position_embeddings)
        if isinstance(data, str | os.PathLike):
            return read_examples(data, self.tokenizer, context)
        return to_examples(data, self.tokenizer, context)

    def adapt(self, feedback: Record, **options: Any) -> float:
        """One gradient step on a piece of feedback; see ``MicroLora.adapt`` for the options.

        Args:
            feedback: a record as ``fit`` takes them: {"prompt": ..., "completion": the right answer}.

        Returns:
            The mean loss of the feedback before the step.
        """
        example = self.examples([feedback], self.config.max_position_embeddings)[0]
        compile_training(self.model.layouts)
        return self.lora.adapt(example, **options)
