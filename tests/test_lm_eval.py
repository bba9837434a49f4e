"""The LM Evaluation Harness runs tasks on a model: scores are those of its logits, answers those of ``generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ruvllm.kernels as K
from ruvllm.llm import LLM
from tests import llm_cases as cases

pytest.importorskip("lm_eval", reason="needs the LM Evaluation Harness: pip install 'ruvllm[lm_eval]'")

DOCS = [
    {"question": "The fox is", "choices": ["red", "a bird", "old"], "gold": 0},
    {"question": "Two and two", "choices": ["are four", "are"], "gold": 1},
    {"question": "The fox was", "choices": ["x", "yy", "zzz"], "gold": 2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from ruvllm.lm_eval import RuvllmLM

    directory = cases.write_directory(tmp_path_factory.mktemp("tiny") / "model")
    return RuvllmLM(path=str(directory), max_gen_toks=6, memory_gb=0.1)


def task(directory: Path, **settings: Any) -> dict[str, Any]:
    data = directory / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return {
        "task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "doc_to_text": "{{question}}", **settings,
    }  # fmt: skip


def evaluated(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    import lm_eval

    found = lm_eval.simple_evaluate(model=model, tasks=[settings], bootstrap_iters=0, log_samples=True)
    assert found is not None
    return found


def log_likelihood(llm: LLM, context: list[int], text: list[int]) -> tuple[float, bool]:
    logits = llm.logits([*context, *text])[len(context) - 1 : -1]
    scored = K.log_softmax(logits)[np.arange(len(text)), text].sum(dtype=np.float64)
    return float(scored), bool((logits.argmax(axis=1) == text).all())


def test_multiple_choice(model: Any, tmp_path: Path) -> None:
    choice = task(tmp_path, output_type="multiple_choice", doc_to_choice="choices", doc_to_target="gold")
    found = evaluated(model, choice)
    encode, right = model.llm.tokenizer.encode, 0
    for doc, sample in zip(DOCS, found["samples"]["tiny"], strict=True):
        question, choices = str(doc["question"]), doc["choices"]
        assert isinstance(choices, list)
        expected = []
        for text in choices:
            before, whole = encode(question), encode(f"{question} {text}")
            expected.append(log_likelihood(model.llm, before, whole[len(before) :]))
        assert [(float(a), bool(b)) for a, b in sample["filtered_resps"]] == expected
        right += int(np.argmax([score for score, _ in expected])) == doc["gold"]
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(right / len(DOCS))


def test_answers_until_a_string(model: Any, tmp_path: Path) -> None:
    asked = task(
        tmp_path, output_type="generate_until", doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["e"], "max_gen_toks": 8}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    samples = evaluated(model, asked)["samples"]["tiny"]
    for doc, sample in zip(DOCS, samples, strict=True):
        alone = model.llm.generate(str(doc["question"]), max_tokens=8, stop="e")
        assert sample["resps"][0][0] == alone.text


def test_rolling_windows(model: Any) -> None:
    """Of a text that is longer than the model's context, each token is scored once, with as much before it as fits."""
    from lm_eval.api.instance import Instance

    text = "the fox was red and old " * 4
    model.max_length, before = 16, model.max_length
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = model.loglikelihood_rolling([request])
    model.max_length = before
    ids = model.llm.tokenizer.encode(text, add_special=False)
    whole, expected = [model.prefix_token_id, *ids], 0.0
    for first in range(0, len(ids), 16):
        end = min(first + 16, len(ids))
        start = max(0, end - 16)
        expected += log_likelihood(model.llm, whole[start : first + 1], whole[first + 1 : end + 1])[0]
    assert found == pytest.approx(expected, abs=1e-4)


def test_texts_without_context_or_too_long(model: Any) -> None:
    from lm_eval.api.instance import Instance

    encode = model.llm.tokenizer.encode
    requests = [Instance("loglikelihood", {}, arguments, 0) for arguments in (("", "red"), ("the fox is ", "red"))]
    found = model.loglikelihood(requests)
    assert found[0] == log_likelihood(model.llm, [model.prefix_token_id], encode("red", add_special=False))
    before, whole = encode("the fox is"), encode("the fox is red")
    assert found[1] == log_likelihood(model.llm, before, whole[len(before) :])
    model.max_length, length = 4, model.max_length
    (cut,) = model.loglikelihood(requests[1:])
    model.max_length = length
    n = len(whole) - len(before)
    assert cut == log_likelihood(model.llm, whole[-5:-n], whole[-n:])
