"""Training adapters: its cost against PyTorch + PEFT, its results, the cost of adapters per token.

    python -m benchmarks.training --learn      a small task: loss curve, held-out loss, answers before and after
    python -m benchmarks.training --peer       the same data in both, alternating step by step: time, memory, loss
    python -m benchmarks.training --adapters   decode with adapters, swapping, one step of feedback

RUVLLM_TORCH_PYTHON names a Python that has torch, transformers and peft, for --peer. PEFT trains on the same weights
in float32, as it does on a CPU; ruvllm on the 4 bits of the file.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

import ruvllm
from benchmarks._orders import orders
from ruvllm.checkpoint.adapters import save_adapter
from ruvllm.checkpoint.hub import resolve
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.names import hf_name
from ruvllm.checkpoint.safetensors_writer import write_safetensors
from ruvllm.measure.workers import Worker
from ruvllm.model.lora import TARGETS, LoraAdapter, LoraConfig
from ruvllm.model.training import TrainingConfig
from ruvllm.model.training_data import step_batches
from ruvllm.paths import cache_directory

MODEL = "smollm2-135m"
HELD_OUT = 40


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.split("\n")[0])
    for name in ("learn", "peer", "adapters"):
        made.add_argument(f"--{name}", action="store_true")
    made.add_argument("-t", "--threads", type=int, help="default: physical cores")
    made.add_argument("--weights", default="auto", help="layout of ruvllm's base weights (default: %(default)s)")
    made.add_argument("--examples", type=int, default=120, help="of the training data (default: %(default)s)")
    made.add_argument("--steps", type=int, default=60, help="of four examples (default: %(default)s)")
    made.add_argument("--checkpointing", action="store_true", help="on ruvllm's side")
    return made


def main() -> None:
    """Run the chosen parts, or all of them."""
    args = parser().parse_args()
    every = not (args.learn or args.peer or args.adapters)
    llm = ruvllm.load(MODEL, weights=args.weights, threads=args.threads)
    layout = llm.model.decoder.layers[0].attention.q.layout
    print(f"{MODEL}, {layout} weights, {llm.model.threads} threads")
    if args.learn or every:
        learn(llm, args)
    if args.peer or every:
        peer(llm, args)
    if args.adapters or every:
        adapters(llm)


def settings(args: argparse.Namespace) -> TrainingConfig:
    """The same on both sides."""
    return TrainingConfig(steps=args.steps, batch_size=4, lr=2e-3, warmup=5, checkpointing=args.checkpointing)


def learn(llm: ruvllm.LLM, args: argparse.Namespace) -> None:
    """Teach the task and show the result."""
    data = orders(args.examples + HELD_OUT)
    teach, held_out = data[: args.examples], data[args.examples :]
    before = [llm.chat(_question(record), max_tokens=60).text for record in held_out[:3]]
    losses = []
    trainer = llm.lora.trainer(llm.examples(teach), "orders", LoraConfig(8, 16.0), settings(args))
    unseen = llm.examples(held_out)
    first = trainer.evaluate(unseen)
    started = time.perf_counter()
    for step in trainer.run():
        losses.append(step.loss)
    seconds = time.perf_counter() - started
    llm.lora.refresh("orders")
    curve = " ".join(f"{np.mean(losses[i : i + 6]):.3f}" for i in range(0, len(losses), 6))
    each = seconds / trainer.total
    print(f"\n{len(teach)} examples, {trainer.total} steps of 4 in {seconds:.1f} s ({each:.3f} s a step)")
    print(f"loss, mean of 6 steps: {curve}\nheld out before: {first}\nheld out after:  {trainer.evaluate(unseen)}")
    answers = [llm.chat(_question(record), max_tokens=60).text for record in held_out]
    right = sum(answer.strip() == record["completion"] for answer, record in zip(answers, held_out, strict=True))
    print(f"held-out orders answered exactly: {right} of {len(held_out)}")
    for record, old, new in zip(held_out, before, answers, strict=False):
        print(f"\n  asked:  {record['prompt']}\n  before: {old[:100]!r}")
        print(f"  after:  {new}\n  right:  {record['completion']}")
    llm.lora.detach("orders")


def _question(record: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": record["prompt"]}]


def peer(llm: ruvllm.LLM, args: argparse.Namespace) -> None:
    """The same examples, order, adapter and learning rates in both, a step each in turn."""
    try:
        other = Worker("peft")
    except ModuleNotFoundError:
        print("\nPyTorch + PEFT: not installed (RUVLLM_TORCH_PYTHON names a Python that has them)")
        return
    data = orders(args.examples + HELD_OUT)
    examples, unseen = llm.examples(data[: args.examples]), llm.examples(data[args.examples :])
    config = settings(args)
    trainer = llm.lora.trainer(examples, "orders", LoraConfig(8, 16.0), config)
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(trainer.adapter, adapter, llm.config)
        directory = str(_float_directory())
        other.call("load", model=directory, adapter=adapter, threads=llm.model.threads, checkpointing=False)
    ours, theirs, tokens = [], [], 0
    for number in range(config.steps or 0):
        batch = next(iter(step_batches(examples, number, config.batch_size, 1, config.seed)))
        rows = [(batch.ids[a:b].tolist(), batch.targets[a:b].tolist()) for a, b in pairwise(batch.starts)]
        step = trainer.step()
        ids, targets = [row[0] for row in rows], [row[1] for row in rows]
        answer = other.call("step", ids=ids, targets=targets, lr=step.lr, max_norm=config.max_grad_norm)
        ours.append((step.loss, step.seconds))
        theirs.append((answer["loss"], answer["seconds"]))
        tokens += step.tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    rows = [(e.ids.tolist(), [*np.where(e.learn[1:], e.ids[1:], -1).tolist(), -1]) for e in unseen]
    after = other.call("loss", ids=[row[0] for row in rows], targets=[row[1] for row in rows])
    mine, their_peak = trainer.evaluate(unseen).loss, other.call("peak")
    other.close()
    llm.lora.detach("orders")
    a, b = median(s for _, s in ours), median(s for _, s in theirs)
    print(f"\nagainst {', '.join(f'{k} {v}' for k, v in other.hello.items())}; {tokens / len(ours):.0f} tokens a step")
    print("| | ruvllm | PyTorch + PEFT | ratio |\n|---|--:|--:|--:|")
    print(f"| step, median s | {a:.3f} | {b:.3f} | {b / a:.2f}x |")
    print(f"| peak memory, MB | {peak:.0f} | {their_peak:.0f} | {their_peak / peak:.2f}x |")
    tail = [float(np.mean([loss for loss, _ in side[-10:]])) for side in (ours, theirs)]
    print(f"| training loss, last 10 steps | {tail[0]:.4f} | {tail[1]:.4f} | |")
    print(f"| held-out loss | {mine:.4f} | {after:.4f} | |")


def _float_directory() -> Path:
    """The model in float32 as a Hugging Face directory, made once from the file."""
    directory = cache_directory() / f"{MODEL}-f32"
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        with open_checkpoint(resolve(MODEL)) as checkpoint:
            c, tensor = checkpoint.config, checkpoint.tensor
            tensors = {hf_name(n): tensor(n).float32().reshape(shape) for n, shape in c.tensor_shapes().items()}
        write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim, "rms_norm_eps": c.rms_norm_eps,
            "rope_theta": c.rope.theta, "max_position_embeddings": c.max_position_embeddings,
            "tie_word_embeddings": c.tie_word_embeddings, "hidden_act": "silu",
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def adapters(llm: ruvllm.LLM) -> None:
    """Decode without and with adapters in turns; swapping; one step on 32 tokens of feedback."""
    model, cache = llm.model, llm.new_cache(256)
    for name, rank, targets in (("rank 8 on q, v", 8, ("q", "v")), ("rank 16 on all seven", 16, TARGETS)):
        llm.lora.attach(_random(llm, rank, targets), name)
    sets: tuple[tuple[str, ...], ...] = ((), ("rank 8 on q, v",), ("rank 16 on all seven",))
    llm.logits(np.arange(100, 132), cache, last_only=True)
    times: dict[tuple[str, ...], list[float]] = {names: [] for names in sets}
    swaps = []
    for _ in range(16):
        for names in sets:
            started = time.perf_counter()
            llm.lora.use(*names)
            swaps.append(time.perf_counter() - started)
            _decode(model, cache, 2)
            times[names].append(_decode(model, cache, 30))
    print("\n| decode | ms a token | overhead |\n|---|--:|--:|")
    for names in sets:
        ratio = median(t / plain for t, plain in zip(times[names], times[()], strict=True))
        print(f"| {', '.join(names) or 'no adapter'} | {1e3 * median(times[names]):.3f} | {100 * (ratio - 1):.1f} % |")
    print(f"swap: {1e3 * median(swaps):.3f} ms")
    llm.lora.use()
    text = "The spare key of the summer house lies under the third flower pot beside the door. "
    example = llm.examples([3 * text], context=32)[0]
    steps = []
    for _ in range(8):
        started = time.perf_counter()
        loss = llm.lora.adapt(example)
        steps.append((time.perf_counter() - started, loss))
    curve = " ".join(f"{loss:.2f}" for _, loss in steps)
    print(f"adapt, rank 2, {len(example.ids)} tokens: {1e3 * median(t for t, _ in steps[1:]):.0f} ms; loss {curve}")
    for name in list(llm.lora.adapters):
        llm.lora.detach(name)


def _decode(model: ruvllm.Llama, cache: ruvllm.KVCache, tokens: int) -> float:
    """Seconds a token."""
    before, out, token = len(cache), np.empty(model.config.vocab_size, np.float32), np.array([500])
    started = time.perf_counter()
    for _ in range(tokens):
        model.forward(token, cache, last_only=True, out=out)
    seconds = (time.perf_counter() - started) / tokens
    cache.truncate(before)
    return seconds


def _random(llm: ruvllm.LLM, rank: int, targets: tuple[str, ...]) -> LoraAdapter:
    made = LoraAdapter(llm.config, LoraConfig(rank, targets=targets))
    rng = np.random.default_rng(0)
    for b in made.b.values():
        b[:] = rng.standard_normal(b.shape) * 1e-3
    return made


if __name__ == "__main__":
    main()
