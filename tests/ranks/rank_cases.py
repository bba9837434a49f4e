"""What several ranks do together; rank 0 prints JSON: ``mpiexec -n N python -m tests.ranks.rank_cases CASE ...``."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mpi4py
import numpy as np

mpi4py.rc.thread_level = "funneled"

from mpi4py import MPI  # noqa: E402

import ruvllm  # noqa: E402
from ruvllm.checkpoint.loader import open_checkpoint  # noqa: E402
from ruvllm.checkpoint.part import PartOfCheckpoint  # noqa: E402
from ruvllm.dividing import divide  # noqa: E402
from ruvllm.loading import weight_bytes  # noqa: E402
from ruvllm.model.llama import Llama, choose_layouts  # noqa: E402
from ruvllm.model.lora_adapter import LoraAdapter, LoraConfig  # noqa: E402
from ruvllm.model.ranks import Ranks  # noqa: E402
from ruvllm.model.split import SplitLlama  # noqa: E402
from ruvllm.model.training import Trainer, TrainingConfig  # noqa: E402
from ruvllm.model.training_data import Example  # noqa: E402

COMM = MPI.COMM_WORLD
IDS = np.random.default_rng(0).integers(3, 60, 24)


def split(path: str, layout: str, parts: list[float], wire: str) -> SplitLlama:
    """This rank's share of a checkpoint, without a tokenizer."""
    ranks = Ranks(COMM)
    with open_checkpoint(path) as checkpoint:
        layouts = choose_layouts(checkpoint.config, checkpoint, layout)
        shares = divide(checkpoint.config, parts, layouts, wire)
        return SplitLlama(shares, ranks, PartOfCheckpoint(checkpoint, shares[ranks.rank]), layout, threads=1, wire=wire)


def whole(path: str, layout: str) -> Llama:
    with open_checkpoint(path) as checkpoint:
        return Llama(checkpoint.config, checkpoint, layout, threads=1)


def adapter_of(model: Llama) -> LoraAdapter:
    """An adapter on every matrix that changes the logits."""
    targets = ("q", "k", "v", "o") + (() if model.whole_config.experts else ("gate", "up", "down"))
    adapter = LoraAdapter(model.whole_config, LoraConfig(rank=3, alpha=6.0, targets=targets), seed=1)
    adapter.parameters[:] = np.random.default_rng(2).normal(0, 0.05, adapter.parameters.size)
    return adapter


def distances(model: SplitLlama, path: str, layout: str) -> dict[str, float]:
    """The largest differences of logits from one rank's, over ways to run them."""
    from ruvllm.model.lora import MicroLora

    alone = whole(path, layout)
    found = {}
    ids = IDS % model.config.vocab_size
    for kv in ("f32", "f16", "int8"):
        cache, other = model.new_cache(64, kv), alone.new_cache(64, kv)
        a, b = model.forward(ids, cache), alone.forward(ids, other)
        found[f"prompt, {kv}"] = float(np.abs(a - b).max())
        a, b = (m.forward(ids[:1], c, last_only=True) for m, c in ((model, cache), (alone, other)))
        found[f"token, {kv}"] = float(np.abs(a - b).max())
        cache.truncate(10)
        other.truncate(10)
        a, b = model.forward(ids[:5], cache), alone.forward(ids[:5], other)
        found[f"after truncation, {kv}"] = float(np.abs(a - b).max())
    adapter = adapter_of(alone)
    MicroLora(model).attach(adapter)
    plain = b
    MicroLora(alone).attach(adapter)
    a, b = (m.forward(ids, m.new_cache(64)) for m in (model, alone))
    found["adapter"] = float(np.abs(a - b).max())
    found["changed by it"] = float(np.abs(b[: len(plain)] - plain).max())
    MicroLora(model).use()
    MicroLora(alone).use()
    model.fused = False  # rank 0 in Python, the others replay their tape
    found["eager"] = float(
        np.abs(model.forward(ids, model.new_cache(64)) - alone.forward(ids, alone.new_cache(64))).max()
    )
    return found


def logits(parts: list[float], wire: str, paths: dict[str, str]) -> None:
    """Of several checkpoints, PATH -> layout."""
    found: dict[str, Any] = {}
    for path, layout in paths.items():
        try:
            model = split(path, layout, parts, wire)
        except ValueError as error:  # on every rank
            found[path] = str(error)
            continue
        if COMM.rank:
            model.follow()
        else:
            found[path] = distances(model, path, layout)
            model.end()
    say(found)


def facade(path: str) -> None:
    """An answer, the command's way: tokens equal to one rank's, a second thread refused, caches freed."""
    llm = ruvllm.load(path, comm=COMM, threads=1)
    if COMM.rank:
        llm.follow()
        return
    alone = ruvllm.load(path, threads=1)
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0}
    answers = [[model.generate("ab ba", **options, seed=seed).ids for seed in range(5)] for model in (llm, alone)]
    caches = [llm.new_cache(20) for _ in range(3)]
    for cache in caches:
        llm.logits([1, 2], cache)
    del caches, cache
    forks = [[fork_and_go_on(model) for _ in range(2)] for model in (llm, alone)]
    text = [3, 4, 5, 6] * 20
    perplexities = [float(model.perplexity(text, context=16)) for model in (llm, alone)]
    refused = []
    cache = alone.new_cache(20)
    alone.logits([1, 2], cache)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "a.kv"
        cache.save(file)
        cache = llm.new_cache(20)
        llm.logits([1, 2], cache)
        for call in (llm.names, lambda: cache.save(file), lambda: llm.load_cache(file), lambda: llm.embed("ab")):
            try:
                call()
            except ValueError as error:
                refused.append(str(error))
    say({
        "answers": answers, "perplexities": perplexities, "refused": refused, "whole": llm.config == alone.config,
        "forks": forks,
    })  # fmt: skip
    llm.close()


def fork_and_go_on(llm: Any) -> list[list[float]]:
    """Logits after a cache and two forks of it have gone on apart, by turns."""
    cache = llm.new_cache(40)
    unused = cache.fork()
    llm.logits([3, 4, 5, 6, 7], cache)
    fork = cache.fork()
    cache.truncate(3)
    second = cache.fork()
    llm.logits([8], cache)
    llm.logits([9, 10], fork)
    llm.logits([9], second)
    llm.logits([9], unused)
    return [llm.logits([11], each, last_only=True).tolist() for each in (cache, fork, second, unused)]


def smollm2(*given: str) -> None:
    """64 tokens and the perplexity of a text, by each of PATH=LAYOUT on all ranks and on one."""
    found = {}
    for each in given:
        path, _, weights = each.partition("=")
        llm = ruvllm.load(path, weights, comm=COMM, threads=1)
        if COMM.rank:
            llm.follow()
            continue
        models = llm, ruvllm.load(path, weights, threads=1)
        text = Path(__file__).read_text()[:1000]
        ids = llm.tokenizer.encode(text)[:100]
        found[each] = {
            "answers": [
                model.generate("The sun rose over the hills, and", max_tokens=64, temperature=0).ids for model in models
            ],
            "perplexities": [float(model.perplexity(text, context=128)) for model in models],
            "difference": float(np.abs(np.subtract(*(model.logits(ids) for model in models))).max()),
        }
        llm.close()
    say(found)


def halves() -> None:
    """Sums of odd sizes in IEEE half precision, of numbers that depend on the rank; then one that is too large."""
    ranks, found = Ranks(COMM), []
    for size in (1, 31, 577):
        parts = [np.random.default_rng([size, rank]).normal(size=size).astype(np.float32) for rank in range(ranks.size)]
        total = parts[ranks.rank].copy()
        ranks.add_halves(total)
        exact, scale = np.sum(parts, axis=0, dtype=np.float64), np.sum(np.abs(parts), axis=0)
        found.append(float((np.abs(total - exact) / scale).max()))
    message = ""
    try:
        ranks.add_halves(np.full(5, 40_000, np.float32))
    except OverflowError as error:
        message = str(error)
    equal = len(set(COMM.allgather(total.tobytes()))) == 1
    refused = COMM.allgather("65504" in message)
    say({"errors": found, "sent": ranks.sent, "equal": equal, "refused": refused})


def data(path: str) -> None:
    """Perplexity and training with the whole model on every rank."""
    llm = ruvllm.load(path, weights="f32", threads=1)
    text = np.random.default_rng(4).integers(3, 60, 16 * 7)
    scored = float(llm.perplexity(text, context=16, comm=COMM))
    refused = ""
    try:
        llm.perplexity(text[COMM.rank :], context=16, comm=COMM)
    except ruvllm.RankError as error:
        refused = str(error)
    generator = np.random.default_rng(5)
    examples = []
    for _ in range(9):
        ids = generator.integers(3, 60, 12)
        examples.append(Example(ids, np.ones(12, bool)))
    config = TrainingConfig(steps=20, batch_size=3, accumulation=2)

    def losses(ranks: Ranks | None) -> list[float]:
        adapter = LoraAdapter(llm.config, LoraConfig(rank=2), seed=0)
        return [step.loss for step in Trainer(llm.model, adapter, examples, config, ranks=ranks).run()]

    together = losses(Ranks(COMM))
    say({
        "perplexities": [scored, float(llm.perplexity(text, context=16))],
        "losses": [together, losses(None) if COMM.rank == 0 else []],
        "equal on all ranks": len({tuple(found) for found in COMM.allgather(together)}) == 1,
        "refused": COMM.allgather(refused),
    })  # fmt: skip


def killed(path: str) -> None:
    """Rank 1 is killed in the middle of an answer."""
    llm = ruvllm.load(path, comm=COMM, threads=1)
    if COMM.rank:

        def end(*_: Any) -> None:
            fails()
            os.kill(os.getpid(), signal.SIGKILL)

        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        llm.follow()
    while True:
        llm.generate("ab", max_tokens=20)


def out_of_memory(path: str) -> None:
    """Rank 1 runs out of memory when rank 0 asks for a cache."""
    llm = ruvllm.load(path, comm=COMM, threads=1)
    if COMM.rank:

        def no_cache(*_: Any) -> Any:
            fails()
            raise ruvllm.InsufficientMemoryError("KV cache: 9.0 GB needed, 1.0 GB free")

        llm.model.new_cache = no_cache  # type: ignore[assignment]
        llm.follow()
    llm.generate("ab", max_tokens=20)
    time.sleep(60)


def limited(path: str) -> None:
    """A model under a limit of memory that all of its weights exceed, on one rank and then on all."""
    with open_checkpoint(path) as checkpoint:
        whole = weight_bytes(checkpoint, "f32")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + int(0.8 * whole)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    alone = ""
    try:
        ruvllm.load(path, "f32", threads=1)
    except (MemoryError, OSError) as error:
        alone = str(error)
    refused = COMM.allgather(bool(alone))
    llm = ruvllm.load(path, "f32", comm=COMM, threads=1)
    held = COMM.gather(llm.model.nbytes)
    if COMM.rank:
        llm.follow()
        return
    ids = llm.generate("The sun rose over the hills, and", max_tokens=8, temperature=0).ids
    say({"refused": refused, "alone": alone, "ids": ids, "whole": whole, "held": held})
    llm.close()


def raises(path: str) -> None:
    """Rank 1 raises an exception that nobody catches, while rank 0 asks for an answer."""
    llm = ruvllm.load(path, comm=COMM, threads=1)
    if COMM.rank:
        fails()
        raise KeyError("of the program")
    llm.generate("ab", max_tokens=20)


def leaves(path: str) -> None:
    """Rank 1 ends, while rank 0 asks for an answer."""
    llm = ruvllm.load(path, comm=COMM, threads=1)
    if COMM.rank:
        fails()
        sys.exit()
    llm.generate("ab", max_tokens=20)


def ends(path: str) -> None:
    """Programs that end without close and follow, or without one of them; one rank has failed to load before."""
    try:
        ruvllm.load(path, comm=COMM, threads=COMM.rank)
    except (ValueError, ruvllm.RankError):
        pass
    closed, dropped, _unused = (ruvllm.load(path, comm=COMM, threads=1) for _ in range(3))
    for llm in (closed, dropped):
        if COMM.rank == 0:
            llm.generate("ab", max_tokens=2)
        if COMM.rank == 0 and llm is closed:
            llm.close()
        elif COMM.rank:
            llm.follow()
    if COMM.rank == 0:
        try:
            closed.generate("ab", max_tokens=2)
        except RuntimeError as error:
            say({"first": str(error)})


def follows_again(path: str) -> None:
    """A second ``follow`` after ``close``."""
    llm = ruvllm.load(path, comm=COMM, threads=1)
    second = ""
    if COMM.rank == 0:
        llm.close()
    else:
        llm.follow()
        try:
            llm.follow()
        except RuntimeError as error:
            second = str(error)
    found = COMM.gather(second)
    if found:
        say({"second": found[1]})


def shares(path: str) -> None:
    """Each rank is given other shares."""
    try:
        ruvllm.load(path, comm=COMM, threads=1, shares=[1, 2 + COMM.rank])
    except ruvllm.RankError as error:
        say({"error": str(error)})


def fails() -> None:
    """This rank is about to fail: from here on the others have 10 s."""
    os.write(1, b"fails\n")


def versions(path: str) -> None:
    """Rank 1 has another version."""
    if COMM.rank:
        ruvllm.__version__ = "0.0.9"
    try:
        ruvllm.load(path, comm=COMM, threads=1)
    except ruvllm.RankError as error:
        say({"error": str(error)})


def files(path: str) -> None:
    """Each rank has a file of its own; PATH holds a "%" for its number."""
    try:
        ruvllm.load(path.replace("%", str(COMM.rank)), comm=COMM, threads=1)
    except (ruvllm.RankError, OSError) as error:
        say({"error": str(error), "type": type(error).__name__})


def interrupted(path: str) -> None:
    """Ctrl-C on all ranks while rank 0 generates, after the line "ready": its answer ends, and the model goes on."""
    llm = ruvllm.load(path, comm=COMM, threads=1)
    if COMM.rank:
        llm.follow()
        return
    before = llm.generate("ab ba", max_tokens=20).ids
    try:
        print("ready", flush=True)
        while True:
            llm.generate("ab", max_tokens=20)
    except KeyboardInterrupt:
        pass
    say({"answers": [before, llm.generate("ab ba", max_tokens=20).ids]})
    llm.close()


def say(found: dict[str, Any]) -> None:
    if COMM.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    case, *arguments = sys.argv[1:]
    if case == "logits":
        logits(json.loads(arguments[0]), arguments[1], json.loads(Path(arguments[2]).read_text()))
    else:
        cases = (
            facade, smollm2, halves, limited, data, killed, out_of_memory, versions, files, interrupted, raises, leaves,
            ends, follows_again, shares,
        )  # fmt: skip
        {each.__name__: each for each in cases}[case](*arguments)
