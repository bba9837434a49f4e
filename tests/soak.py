"""Mixed use of one model for a given time; memory, speed and answers must stay the same.

    python -m tests.soak [--minutes 60] [--model smollm2-135m] [--plot soak.png]

The actions of a long-lived program come in random order: answers, chats that grow, streams left early, threads,
interrupts, full caches, bad arguments, hostile files, adapters that learn and are swapped, loading again. In between, a
probe: one greedy text, always the same, and its speed. The table shows each probe; the plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

import ruvllm
from ruvllm.errors import ContextFullError, ModelFormatError
from ruvllm.llm import LLM
from ruvllm.model.lora import LoraAdapter, LoraConfig
from ruvllm.model.weights import FLOAT_LAYOUTS
from tests import llm_cases
from tests.checkpoint import corpus

PROBE = "Once upon a time, in a house by the sea,"
WORDS = "the of and to in is that it was for on are as with they at be this from have or by one had not but".split()


@dataclass(frozen=True)
class Probe:
    """State after some actions: seconds since the start, bytes of memory, threads and files, tokens a second."""

    seconds: float
    memory: int
    threads: int
    files: int
    speed: float


class Soak:
    """One model in use; ``step`` does the next action, ``probe`` checks the model.

    Args:
        llm: the model.
        reload: gives the same model again, from its file.
        directory: where hostile files are written.
        seed: of the order of actions.
    """

    def __init__(self, llm: LLM, reload: Callable[[], LLM], directory: Path, seed: int = 0) -> None:
        self.llm = llm
        self.reload = reload
        self.directory = directory
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.started = time.monotonic()
        self.cache = llm.new_cache(min(512, llm.config.max_position_embeddings))
        self.hostile = corpus.hostile_gguf()
        self.expected = self._answer()
        self.actions: Sequence[Callable[[], None]] = (
            self.generate, self.chat, self.leave_early, self.logits, self.fill_a_cache, self.ask_wrongly,
            self.open_hostile_files, self.interrupt, self.several_threads, self.perplexity, self.load_again,
            self.learn, self.swap_adapters,
        )  # fmt: skip
        self.often = (8, 6, 6, 4, 2, 2, 2, 4, 2, 1, 1, 2, 3)

    def step(self) -> str:
        """Do one action and return its name."""
        (action,) = self.random.choices(self.actions, self.often)
        action()
        self.done[action.__name__] += 1
        return action.__name__

    def probe(self) -> Probe:
        """Raises AssertionError if the model's answer differs from its first."""
        started = time.perf_counter()
        found = self._answer()
        seconds = time.perf_counter() - started
        assert found == self.expected, f"another answer after {dict(self.done)}"
        gc.collect()
        process = psutil.Process()
        files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        elapsed = time.monotonic() - self.started
        return Probe(elapsed, process.memory_info().rss, process.num_threads(), files, len(found) / seconds)

    def _answer(self) -> list[int]:
        return self.llm.generate(PROBE, max_tokens=32).ids

    def _text(self, words: int) -> str:
        return " ".join(self.random.choices(WORDS, k=words))

    def generate(self) -> None:
        self.llm.generate(
            self._text(self.random.randrange(1, 20)), max_tokens=self.random.randrange(1, 40),
            temperature=self.random.choice((0.0, 0.7, 1.5)), top_p=self.random.choice((1.0, 0.9)),
            top_k=self.random.choice((0, 20)), seed=self.random.randrange(1 << 30), logprobs=self.random.choice((0, 3)),
        )  # fmt: skip

    def chat(self) -> None:
        messages = []
        for _ in range(self.random.randrange(1, 4)):
            messages.append({"role": "user", "content": self._text(3)})
            reply = self.llm.chat(messages, max_tokens=8, cache=self.cache)
            messages.append({"role": "assistant", "content": reply.text or "..."})

    def leave_early(self) -> None:
        stream = self.llm.stream(self._text(5), max_tokens=30, temperature=1.0, seed=self.random.randrange(1 << 30))
        for _ in range(self.random.randrange(3)):
            next(stream, None)

    def logits(self) -> None:
        ids = [self.random.randrange(self.llm.config.vocab_size) for _ in range(self.random.randrange(1, 100))]
        assert self.llm.logits(ids, last_only=self.random.random() < 0.5).shape[-1] == self.llm.config.vocab_size

    def fill_a_cache(self) -> None:
        for kv in ("f32", "f16"):
            cache = self.llm.new_cache(20, kv)
            self.llm.logits([1] * 18, cache)
            try:
                self.llm.logits([1] * 3, cache)
            except ContextFullError:
                assert len(cache) == 18
            else:
                raise AssertionError("more tokens than fit")
            self.llm.logits([1] * 2, cache)

    def ask_wrongly(self) -> None:
        wrong: tuple[tuple[type[Exception], Callable[[], object]], ...] = (
            (ValueError, lambda: self.llm.logits([self.llm.config.vocab_size])),
            (ValueError, lambda: self.llm.logits([-1])),
            (TypeError, lambda: self.llm.logits([0.5])),  # type: ignore[list-item]
            (ValueError, lambda: self.llm.generate("x", temperature=float("nan"))),
            (ValueError, lambda: self.llm.generate("x", top_p=0.0)),
            (ValueError, lambda: self.llm.generate([])),
            (ContextFullError, lambda: self.llm.generate([1] * (self.llm.config.max_position_embeddings + 1))),
        )
        for error, call in wrong:
            try:
                call()
            except error:
                continue
            raise AssertionError("accepted")

    def open_hostile_files(self) -> None:
        path = self.directory / "hostile.gguf"
        for case in self.random.sample(self.hostile, 5):
            path.write_bytes(case.data)
            try:
                ruvllm.load(path, mmap=self.random.random() < 0.5)
            except ModelFormatError:
                continue
            raise AssertionError(f"{case}: accepted")

    def interrupt(self) -> None:
        """Ctrl-C at some moment of a long answer; ``chat`` goes on using the cache."""
        if threading.current_thread() is not threading.main_thread():
            return
        timer = threading.Timer(self.random.uniform(0, 0.05), lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while True:
                self.llm.generate(self._text(30), max_tokens=20, cache=self.cache)
        except KeyboardInterrupt:
            pass
        timer.join()

    def several_threads(self) -> None:
        found: list[list[int]] = []
        threads = [threading.Thread(target=lambda: found.append(self._answer())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [self.expected] * 3

    def perplexity(self) -> None:
        assert self.llm.perplexity(self._text(60), context=16, progress=False).value > 1

    def learn(self) -> None:
        """Steps on pieces of feedback, after which the adapter is kept but disabled."""
        for _ in range(2):
            loss = self.llm.adapt({"prompt": self._text(4), "completion": self._text(3)})
            assert math.isfinite(loss)
        self.llm.lora.use()

    def swap_adapters(self) -> None:
        """Two adapters are attached, swapped between tokens of an answer, merged into float weights, and detached."""
        lora, names = self.llm.lora, ("one", "other")
        for name in names:
            adapter = LoraAdapter(self.llm.config, LoraConfig(self.random.randrange(1, 9)))
            adapter.parameters[:] = np.random.default_rng(self.random.randrange(1 << 30)).normal(
                0, 0.05, adapter.param_count
            )
            lora.attach(adapter, name)
        stream = self.llm.stream(self._text(5), max_tokens=12, temperature=1.0)
        for active in ({"one": 1.0}, {"one": 0.5, "other": 0.5}, {}, {"other": -1.0}):
            lora.use(active)
            next(stream, None)
        if self.llm.model.decoder.embed.layout in FLOAT_LAYOUTS:
            lora.merge()
            assert self._answer() != self.expected
            lora.unmerge()
        lora.use()
        for name in names:
            lora.detach(name)

    def load_again(self) -> None:
        self.cache = self.llm.new_cache(self.cache.max_tokens)  # the old one knows the old model
        self.llm = self.reload()


def report(probes: Sequence[Probe]) -> str:
    """Memory and speed of the second half against the first, in one line each."""
    half = len(probes) // 2
    lines = []
    for name, unit, values in (
        ("memory", "MB", [probe.memory / 1e6 for probe in probes]), ("speed", "tokens/s", [p.speed for p in probes]),
        ("threads", "", [probe.threads for probe in probes]), ("files", "", [probe.files for probe in probes]),
    ):  # fmt: skip
        first, second = statistics.median(values[:half]), statistics.median(values[half:])
        lines.append(f"{name}: median of the first half {first:.1f}, of the second {second:.1f} {unit}".rstrip())
    return "\n".join(lines)


def plot(probes: Sequence[Probe], path: Path) -> None:
    """Memory and speed over time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5))
    minutes = [probe.seconds / 60 for probe in probes]
    above.plot(minutes, [probe.memory / 1e6 for probe in probes])
    above.set(ylabel="resident memory, MB", ylim=(0, None))
    below.plot(minutes, [probe.speed for probe in probes])
    below.set(ylabel="probe, tokens/s", xlabel="minutes", ylim=(0, None))
    figure.suptitle("Mixed use of one model")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Use one model in every way, for a long time.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", default="smollm2-135m", help="a model, or 'tiny' for random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=20, help="actions between two probes")
    parser.add_argument("--plot", type=Path, help="where to draw memory and speed")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may be set to ignore it
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def load() -> LLM:
            if arguments.model == "tiny":
                return llm_cases.byte_llm(directory)
            return ruvllm.load(arguments.model, progress=False)

        soak = Soak(load(), load, directory, arguments.seed)
        probes = [soak.probe()]
        print("minutes  memory MB  threads  files  tokens/s  actions")
        while soak.started + arguments.minutes * 60 > time.monotonic():
            for _ in range(arguments.every):
                soak.step()
            probes.append(probe := soak.probe())
            print(
                f"{probe.seconds / 60:7.1f} {probe.memory / 1e6:10.1f} {probe.threads:8d} {probe.files:6d} "
                f"{probe.speed:9.1f} {soak.done.total():8d}", flush=True,
            )  # fmt: skip
        print(report(probes))
        print(", ".join(f"{action} {times}" for action, times in soak.done.most_common()))
        if arguments.plot:
            plot(probes, arguments.plot)


if __name__ == "__main__":
    main()
