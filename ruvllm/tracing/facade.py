"""Inspection: the methods of LLM that trace, edit and steer what the model computes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ruvllm.model.edits import Change, Edit, steering_edits
from ruvllm.model.hooks import Editing, recording, waiting
from ruvllm.model.llama import Llama
from ruvllm.prompt import Prompt

if TYPE_CHECKING:
    from ruvllm.tracing.names import Names
    from ruvllm.tracing.trace import Trace


class Inspection:
    """The methods of ``LLM`` that look inside: arrays by name."""

    model: Llama
    tokenizer: Any
    config: Any  # LLM.config
    new_cache: Any  # LLM.new_cache
    _ids: Any  # LLM._ids

    def names(self) -> Names:
        """The named arrays of the model, with shapes and meanings: what ``trace`` keeps and ``edit`` changes."""
        from ruvllm.tracing.names import Names

        return Names(self.model.points)

    @contextmanager
    def trace(self, prompt: Prompt | None = None, kv: str = "auto", limit: int | None = None) -> Iterator[Trace]:
        """Keep arrays of the model as it takes one text, by their names.

        With a prompt the model takes it when the block ends, or when the trace is first looked at; ``keep`` in the
        block says what is kept, all if it is left out. Edits that begin in the block are part of it. Without a prompt
        it keeps of what this thread computes in the block, of one sequence: ``llm.generate(...)``, one row a token.
        Logits are bit-identical to those without a trace.

        Args:
            prompt: text, token ids or chat messages.
            kv: precision of the KV cache.
            limit: bytes that may be kept; None: as many as are free.

        Raises:
            KeyError: no array has one of the names.
            InsufficientMemoryError: what is to be kept has more bytes; nothing was computed then.
            ValueError: an empty prompt, or several sequences in one block.
        """
        from ruvllm.tracing.trace import Trace

        ids = None if prompt is None else self._ids(prompt)
        trace = Trace(self.model, self.tokenizer, ids, lambda tokens: self.new_cache(tokens, kv), limit)
        if ids is None:
            with recording(self.model, trace):
                yield trace
        else:
            with waiting(self.model, trace):
                yield trace
                trace.run()

    def edit(
        self, name: str, change: Change | None = None, *, scale: float | None = None,
        positions: int | Iterable[int] | None = None,
    ) -> Editing:  # fmt: skip
        """``with`` it, change a named array of all that this thread computes; blocks nest, and may be entered again.

        An edit acts on what is computed while its block is open. An answer streamed that began inside and is read
        outside goes on without it; a cache of one's own that was filled inside keeps the edited keys and values.

        Args:
            name: of ``names()``, an alias or a glob; of one head the name and its number: "layers.3.heads.4".
            change: a function of the array, which returns another or changes it in place and returns None; or what
                the array becomes, broadcast.
            scale: a factor, in place of ``change``; 0 removes what the array carries.
            positions: of the sequence, from 0, whose rows are changed where the block computes them; None: all. An edit
                inside of a trace of a prompt must have positions of that prompt.

        Raises:
            KeyError: no array has this name.
            ValueError, TypeError: an edit that cannot be; while the model computes, a result of another shape or
                dtype, or with NaN or infinity, with the array's name. Logits and routers' scores may be -inf.
        """
        return Editing(self.model, [Edit(self.model.points, name, change, scale, positions)])

    def steer(
        self, by: str | os.PathLike[str] | Mapping[int, Any], scale: float = 1.0, layers: Iterable[int] | None = None
    ) -> Editing:
        """``with`` it, add ``scale`` times a direction to the residual stream after each layer.

        Args:
            by: what ``lab.steering`` found; a control vector of llama.cpp (a GGUF file); or directions (E,) by layer.
            scale: a factor; negative ones lead the other way.
            layers: those to steer; None: all that have a direction. Often a few in the middle serve best.

        Raises:
            FileNotFoundError, ModelFormatError: the file is not there, unsound, or was made for another model.
            ValueError: a layer without a direction, or a direction of another size.
        """
        if isinstance(by, str | os.PathLike):
            from ruvllm.checkpoint.control_vector import load_control_vector

            by = load_control_vector(by, self.config)
        return Editing(self.model, steering_edits(self.model.points, self.config, by, scale, layers))
