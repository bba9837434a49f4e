"""The command `train`: fine-tune an adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvllm.cli.parser import DEFAULT_MODEL, take_last, take_model
from ruvllm.cli.talk import context_of, load_model
from ruvllm.paths import require_writable

if TYPE_CHECKING:
    from ruvllm.model.training import Trainer
    from ruvllm.model.training_data import Example

_LORA = ("rank", "alpha", "dropout", "rslora")
_TRAINING = (
    "epochs", "steps", "batch_size", "accumulation", "lr", "schedule", "warmup", "optimizer", "momentum",
    "weight_decay", "max_grad_norm", "seed", "checkpointing",
)  # fmt: skip
_NAME = "trained"


def train(args: argparse.Namespace) -> None:
    """Train an adapter on a file and write it."""
    model = take_model(args, DEFAULT_MODEL)
    if (operand := take_last(args)) is not None:
        raise ValueError(f"unexpected argument {operand!r}; the data is given with --data FILE")
    if args.data is None:
        raise ValueError(f"which data? for example: ruvllm train {model} --data FILE.jsonl")
    out = Path(args.out)
    writes = args.comm is None or args.comm.Get_rank() == 0
    if writes:
        _require_out(out, args.resume)
    llm = load_model(args, model)

    from ruvllm.checkpoint.training_state import resume_training, save_training
    from ruvllm.compiling import compile_training
    from ruvllm.model.lora import LoraConfig
    from ruvllm.model.ranks import Ranks
    from ruvllm.model.training import TrainingConfig
    from ruvllm.training_text import read_examples

    context = context_of(llm, args)
    examples = read_examples(args.data, llm.tokenizer, context)
    if args.eval is not None:
        held_out = read_examples(args.eval, llm.tokenizer, context)
    else:
        examples, held_out = _split(examples, args.eval_share, args.seed)
    lora = LoraConfig(targets=tuple(args.targets.split(",")), **{name: getattr(args, name) for name in _LORA})
    training = TrainingConfig(**{name: getattr(args, name) for name in _TRAINING})
    compile_training(llm.model.layouts)
    ranks = None if args.comm is None else Ranks(args.comm)
    trainer = llm.lora.trainer(examples, _NAME, lora, training, ranks=ranks)
    if args.resume:
        if writes:
            resume_training(trainer, out)
        if ranks is not None:
            trainer.restore(*ranks.share_object(trainer.state()))
        print(f"resumed after step {trainer.done} of {trainer.total}")
    counted = f"{len(examples)} examples, {sum(e.target_count for e in examples):,} tokens to learn"
    print(f"{counted}, {len(held_out)} held out; {trainer.adapter!r}", flush=True)
    if held_out and not trainer.done:
        print(f"before: {trainer.evaluate(held_out)}", flush=True)

    def save() -> None:
        if writes:
            save_training(trainer, out, str(llm.config.name or model))

    try:
        _run(trainer, args.save_every, save)
    except KeyboardInterrupt:
        save()
        print(f"\nstopped after step {trainer.done}; continue with the same command and --resume", file=sys.stderr)
        raise
    save()
    if held_out:
        print(f"after:  {trainer.evaluate(held_out)}")
    print(f"written to {out}; use it: ruvllm generate {model} --lora {out} PROMPT")


def _require_out(out: Path, resume: bool) -> None:
    """Refuse, before training, a directory that holds something else or cannot be written to."""
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: --resume continues the run there, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"--out: nothing can be written into {out} ({error.strerror})") from None
    require_writable("--out", out)


def _split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from, and those held out to measure with."""
    import numpy as np

    if not 0 <= share < 1:
        raise ValueError(f"--eval-share: expected a number from 0 to below 1, found {share}")
    count = min(round(share * len(examples)), len(examples) - 1)
    held = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    return [e for i, e in enumerate(examples) if i not in held], [e for i, e in enumerate(examples) if i in held]


def _run(trainer: Trainer, save_every: int, save: Any) -> None:
    """All steps, with a bar where stderr is a terminal and a line now and then where it is not."""
    from ruvllm.progress import tqdm

    shown = max(1, trainer.total // 20)
    with tqdm(total=trainer.total, initial=trainer.done, desc="training", unit="step", disable=None) as bar:
        for step in trainer.run():
            bar.update()
            bar.set_postfix(loss=f"{step.loss:.3f}", lr=f"{step.lr:.1e}")
            if bar.disable and (step.step % shown == 0 or step.step == trainer.total):
                note = f"loss {step.loss:.4f}, gradient {step.grad_norm:.3f}, lr {step.lr:.2e}, {step.seconds:.2f} s"
                print(f"step {step.step}/{trainer.total}: {note}", flush=True)
            if save_every and step.step % save_every == 0 and step.step < trainer.total:
                save()
