"""Settings of a server: the model's name, who may use it, and limits."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_BODY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """The limits of a server.

    name: of the model, in /v1/models and in requests.
    context: the most tokens of one sequence; None: the model's context length.
    kv, memory, sequences: see ``LLM.answering``.
    queue: answers that may wait, in addition to those that are computed; more are refused with 429. Each text of a
        request for embeddings counts as one, up to all of the queue.
    timeout: seconds that a request may take.
    api_key: what clients must send as a bearer token; None: anyone may ask.
    local_only: refuse requests for another host name than this machine's own, so that no page of the web reaches the
        server through a name that leads here.
    body_bytes: the most bytes of a request.
    """

    name: str
    context: int | None = None
    kv: str = "auto"
    memory: float | None = None
    sequences: int = 8
    queue: int = 64
    timeout: float = 600.0
    api_key: str | None = field(default=None, repr=False)
    local_only: bool = True
    body_bytes: int = MOST_BODY_BYTES

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences: expected a positive integer, found {self.sequences}")
        if self.queue < 0:
            raise ValueError(f"queue: expected 0 or more, found {self.queue}")
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, found {self.timeout}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ValueError("api_key: expected ASCII characters without space around them")

    @property
    def most_answers(self) -> int:
        """Answers that are computed or wait at one time."""
        return self.sequences + self.queue
