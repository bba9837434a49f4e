"""repr() of whatever the library hands out is one line, however much it holds: a notebook shows it unasked."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ruvllm
from ruvllm import lab
from ruvllm.batching import Embedded, Scored
from ruvllm.brief import brief
from ruvllm.checkpoint.gguf import GGUFFile
from ruvllm.checkpoint.gguf_split import open_gguf, split_name
from ruvllm.checkpoint.hf_hub import parse
from ruvllm.checkpoint.hub import MODELS
from ruvllm.checkpoint.loader import open_checkpoint
from ruvllm.checkpoint.safetensors import SafetensorsFile
from ruvllm.checkpoint.tokenizer.hf import vocabulary_from_directory
from ruvllm.kernels import KERNELS
from ruvllm.kernels.matmul.blas import Speedup
from ruvllm.lab.explanation import Remark
from ruvllm.llm import LLM
from ruvllm.measure.peaks import Level, Peaks
from ruvllm.model import RopeConfig
from ruvllm.model.adaptation import consolidate
from ruvllm.model.config import ExpertsConfig
from ruvllm.model.generate import Token
from ruvllm.model.lora import LoraAdapter, LoraConfig
from ruvllm.model.presets import PRESETS
from ruvllm.model.sampling.filters import candidates
from ruvllm.model.sampling.options import Mirostat, Sampling
from ruvllm.model.speculation.costs import Acceptance
from ruvllm.model.speculation.draft_model import DraftModel
from ruvllm.model.speculation.lookup import Lookup
from ruvllm.model.speculation.speculate import Speculation
from ruvllm.model.training import TrainingConfig
from ruvllm.model.training_data import make_batch
from ruvllm.options import AnswerOptions
from ruvllm.report.comparison import compare
from ruvllm.report.rows import SECTIONS
from ruvllm.report.summary import standings, verdicts
from ruvllm.streaming import Timings
from ruvllm.structured.constraint import constraint_of
from ruvllm.structured.form import Form
from tests import llm_cases
from tests.checkpoint.gguf_parts import write_parts
from tests.model import tiny
from tests.report.report_cases import ALL_ROWS, a_report

LONGEST = 700  # characters: ModelConfig, all of whose fields are small
# Handed to nobody, with all that is below: the inside of a file, of a compiler, of a forward pass, of measuring.
INSIDE = (
    "ruvllm.checkpoint.families", "ruvllm.checkpoint.family", "ruvllm.checkpoint.fields",
    "ruvllm.checkpoint.four_bits", "ruvllm.checkpoint.gguf_header",
    "ruvllm.checkpoint.gguf_writer", "ruvllm.checkpoint.groups", "ruvllm.checkpoint.packed",
    "ruvllm.checkpoint.safetensors_writer", "ruvllm.checkpoint.source", "ruvllm.checkpoint.template",
    "ruvllm.checkpoint.tokenizer.added_tokens", "ruvllm.checkpoint.tokenizer.spm", "ruvllm.checkpoint.unpacked",
    "ruvllm.batching.prefixes", "ruvllm.batching.texts", "ruvllm.lm_eval", "ruvllm.model.many",
    "ruvllm.cli", "ruvllm.kernels.attention", "ruvllm.kernels.experts", "ruvllm.kernels.jit", "ruvllm.kernels.lora",
    "ruvllm.kernels.operations", "ruvllm.kernels.training", "ruvllm.kernels.matmul",
    "ruvllm.kernels.simd", "ruvllm.kernels.matmul.blas", "ruvllm.kernels.quant",
    "ruvllm.kernels.tape", "ruvllm.kernels.threads", "ruvllm.lab.assembly", "ruvllm.lab.calls", "ruvllm.lab.cross",
    "ruvllm.lab.work",
    "ruvllm.measure.engines", "ruvllm.measure.gguf_file", "ruvllm.measure.inside", "ruvllm.measure.numpy_peer",
    "ruvllm.measure.peers", "ruvllm.measure.replacing", "ruvllm.measure.timing", "ruvllm.measure.workers",
    "ruvllm.model.activations", "ruvllm.model.edits", "ruvllm.model.exchange", "ruvllm.model.experts",
    "ruvllm.model.feed_forward", "ruvllm.model.hooks", "ruvllm.model.layer", "ruvllm.model.rope",
    "ruvllm.model.low_rank", "ruvllm.model.ops",
    "ruvllm.model.random_weights", "ruvllm.model.reference", "ruvllm.model.replay", "ruvllm.model.weights",
    "ruvllm.report.bench", "ruvllm.report.layer_peers", "ruvllm.report.layers", "ruvllm.report.rust_report",
    "ruvllm.report.tables", "ruvllm.torch", "ruvllm.serving", "ruvllm.checkpoint.part",
    "ruvllm.checkpoint.packed_cache", "ruvllm.model.ranks", "ruvllm.model.share", "ruvllm.model.split", "ruvllm.paths",
)  # fmt: skip
NEVER_MADE = {
    "Kind", "MetadataFile", "Penalty", "Weights", "Constraint", "SafetensorsIndex", "TrainingPass", "Separator",
    "Whole", "Table", "Drafter", "Counts", "ManyTexts", "Sequence", "Inspection", "Learning", "BlockLayout", "Block",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[type, Any]:
    """An object of each class, from calls that users make and from what those objects hold, each with much in it."""
    directory = tmp_path_factory.mktemp("repr")
    seen: dict[type, Any] = {}
    for root in _roots(directory):
        _walk(root, seen)
    return seen


def _roots(directory: Path) -> Iterable[Any]:
    llm = llm_cases.byte_llm(directory)
    yield llm
    records = [{"text": f"number {n}, " * 30} for n in range(50)]
    trainer = llm.fit(records, training=TrainingConfig(steps=2, batch_size=2), on_step=lambda *_: None)
    yield trainer
    yield trainer.evaluate(trainer.examples[:2])
    yield consolidate(llm.model, trainer.adapter, trainer.examples[:3])
    yield make_batch(trainer.examples[:2])
    llm.lora.use()
    yield llm.stream("x" * 100, max_tokens=100)
    answer = llm.generate("x" * 100, max_tokens=100, logprobs=200)
    yield answer
    yield from llm.stream("x" * 100, max_tokens=10).parts()
    yield Token(1, -0.5, answer.logprobs[0][1] if answer.logprobs else ())
    options = AnswerOptions.of({"dry": 0.8, "xtc": 0.5, "logit_bias": dict.fromkeys(range(100), 1.0)})
    yield [options, llm.sampler(options), Sampling(mirostat=2), Mirostat(), candidates(np.zeros(100, np.float32))]
    drafters: list[Any] = [Lookup(), DraftModel(llm.model, llm.config.vocab_size, 100)]
    yield [*drafters, Speculation(drafters[0], llm.costs, Timings()), Acceptance(0.5, 0.5), llm.costs]
    yield [Form(choices=["a" * 1000]), constraint_of(Form(choices=["a"]), llm.tokenizer, llm.config.vocab_size)]
    yield llm.new_cache(200)
    answering, request = llm.answering(sequences=2), llm.request("x" * 100)
    yield [llm.encoded("x" * 100), answering, request, answering.submit(request), *answering.engine.step()]
    yield [Scored(np.arange(100), 50), Embedded(np.arange(100), "mean")]
    yield llm.tokenizer.stream_decoder()
    yield llm.tokenizer
    yield llm.divergence(np.arange(250) % 200, llm, context=64)
    long_rope = RopeConfig(scaling="factors", factors=tuple(np.linspace(1, 8, 64).tolist()))
    experts = ExpertsConfig(count=8, per_token=2, intermediate_size=64)
    yield [dataclasses.replace(llm_cases.CONFIG, head_dim=128, rope=long_rope, experts=experts), experts]
    yield [PRESETS["llama2-7b"], PRESETS["llama2-7b"].memory_estimate(), *MODELS.values(), *KERNELS.values()]
    for layout in ("int4", "f16"):
        yield llm_cases.byte_llm(directory, layout).model
    path = tiny.write_gguf("llama2_mha", directory / "tiny.gguf")
    yield [GGUFFile(path), open_gguf(write_parts("llama2_mha", directory)), split_name("a-00001-of-00002.gguf")]
    yield parse("owner/name:Q4_K_M")
    yield SafetensorsFile(tiny.directory("llama2_mha") / "model.safetensors")
    yield vocabulary_from_directory(directory)
    for place in (path, tiny.directory("llama2_mha"), tiny.directory("bf16_sharded_tied")):
        checkpoint = open_checkpoint(place)
        yield checkpoint
        yield checkpoint.tensor("embed")
    loaded = ruvllm.load(path, progress=False)
    peaks = Peaks(2, 1e11, 4e11, (Level("L1", 32 << 10, 4e11), Level("memory", math.inf, 2e10)))
    yield [lab.cost("llama3-8b", peaks=peaks), lab.scale("llama3-8b", peaks=peaks), lab.Costs()]
    yield [lab.drift(loaded, [3, 4, 5], progress=False), lab.steering(loaded, ["ab", "abc"], ["ba", "bca"])]
    yield lab.quantisation_error(path, progress=False)
    yield lab.explain("rms_norm")
    yield lab.profile(loaded, [3, 4, 5], max_tokens=3, peaks=peaks)
    yield lab.roofline("rms_norm", peaks=peaks)
    with lab.swap(rms_norm=_rms_norm) as swapped:
        loaded.logits([3, 4, 5])
        yield swapped
    with llm.trace("x" * 50) as trace:
        yield trace
    yield [llm.names(), trace.attention(1), trace.logit_lens(), trace.direct_attribution("a", "b")]
    yield lab.patch(llm, "x" * 9 + "ab", "x" * 9 + "ba", metric=("a", "b"), progress=False)
    yield Remark("norm.py", 12, "cannot be vectorised")
    yield [*ALL_ROWS, *SECTIONS, Speedup(1.0, 0.9, 1.1)]
    report = a_report({row.id: 1e-3 for row in ALL_ROWS})
    yield report
    yield [compare(report, report), verdicts(report), standings(report, 1)]


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def _walk(value: Any, seen: dict[type, Any]) -> None:
    """All of the library's objects in public attributes of ``value``, and in theirs; the longest of each class."""
    if isinstance(value, Mapping) and not type(value).__module__.startswith("ruvllm."):
        value = list(value.values())
    if type(value) in (list, tuple):  # and no named tuple
        for item in value[:200]:
            _walk(item, seen)
        return
    kind = type(value)
    if not kind.__module__.startswith("ruvllm."):
        return
    known = kind in seen
    if not known or len(repr(value)) > len(repr(seen[kind])):
        seen[kind] = value
    if not known:
        names = [name for name in {*getattr(value, "__dict__", {}), *_properties(kind)} if not name.startswith("_")]
        for name in names:
            _walk(getattr(value, name, None), seen)


def _properties(kind: type) -> list[str]:
    return [name for name, member in inspect.getmembers(kind) if isinstance(member, property)]


def test_every_public_object_is_one_line(found: dict[type, Any]) -> None:
    wrong = {kind.__name__: len(repr(value)) for kind, value in found.items() if not _is_a_line(repr(value))}
    assert not wrong


def _is_a_line(text: str) -> bool:
    return text.isprintable() and len(text) <= LONGEST


def test_no_public_class_is_left_out(found: dict[type, Any]) -> None:
    public = set()
    for module in pkgutil.walk_packages(ruvllm.__path__, "ruvllm."):
        inside = any(f"{module.name}.".startswith(f"{name}.") for name in INSIDE)
        if not inside and not any(part.startswith("_") for part in module.name.split(".")):
            for name, kind in vars(importlib.import_module(module.name)).items():
                ours = inspect.isclass(kind) and kind.__module__ == module.name and not name.startswith("_")
                if ours and not issubclass(kind, BaseException) and name not in NEVER_MADE:
                    public.add(kind)
    assert {kind.__qualname__ for kind in public - set(found)} == set()


def test_brief_says_what_is_small_and_counts_what_is_not() -> None:
    sampling = Sampling(temperature=0.5, seed=None)
    assert brief(sampling).startswith(
        "Sampling(temperature=0.5, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=None, "
    )
    assert repr(sampling) == "Sampling(temperature=0.5, seed=None)"
    object.__setattr__(sampling, "seed", "a\n" * 1000)
    object.__setattr__(sampling, "top_k", np.zeros((3, 4), np.float32))
    object.__setattr__(sampling, "top_p", list(range(1000)))
    object.__setattr__(sampling, "min_p", {"a": 1})
    text = brief(sampling)
    assert "top_k=<float32 (3, 4)>, top_p=<1000 in a list>, min_p={'a': 1}" in text
    assert "... (2000 characters)" in text and _is_a_line(text)


def test_names_from_files_and_users_stay_on_the_line(tmp_path: Path) -> None:
    name = "two\nlines " * 1000
    llm = llm_cases.byte_llm(tmp_path, config=dataclasses.replace(llm_cases.CONFIG, name=name))
    llm.path = Path(name)
    for n in range(50):
        llm.lora.attach(LoraAdapter(llm.config, LoraConfig(rank=1)), f"{n}{name}")
    for value in (llm, llm.model, llm.lora):
        assert _is_a_line(repr(value)), repr(value)[:1000]


def test_a_generation_is_printed_as_its_text_and_shown_as_one_line(found: dict[type, Any]) -> None:
    llm = next(value for kind, value in found.items() if kind is LLM)
    answer = llm.generate("x", max_tokens=50)
    assert str(answer) == answer.text
    assert repr(answer).startswith("Generation(text=")
