"""Many texts at once: answers, samples, scores and embeddings are those of each text alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ruvllm.kernels as K
from ruvllm.batching import Engine, Generated
from ruvllm.batching.sequence import Scored
from ruvllm.errors import ContextFullError
from ruvllm.llm import LLM
from ruvllm.loading import load
from ruvllm.model.kv_pool import BLOCK, block_bytes
from ruvllm.model.sampling.options import Sampling
from ruvllm.model.sampling.sampler import Sampler
from tests.llm_cases import byte_llm

LONG = "The quick brown fox jumps over the lazy dog. " * 2
PROMPTS: list[Any] = ["The quick brown fox", "a", LONG, [{"role": "user", "content": "Hi"}]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return byte_llm(tmp_path_factory.mktemp("bytes"), threads=2)


def test_answers_are_those_of_each_prompt_alone(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.9, "logprobs": 2, "repetition_penalty": 1.2}
    together = llm.generate_many(PROMPTS, sequences=3, progress=False, **options)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = llm.generate(prompt, **options)
        assert (found.text, found.ids, found.finish_reason) == (alone.text, alone.ids, alone.finish_reason)
        assert found.logprobs == alone.logprobs
        assert found.timings.tokens == alone.timings.tokens
        assert found.timings.prompt_tokens == alone.timings.prompt_tokens
    assert llm.generate_many([], progress=False) == []


def test_streams_of_many_prompts(llm: LLM) -> None:
    texts = [""] * len(PROMPTS)
    for i, piece in llm.stream_many(PROMPTS, max_tokens=12, temperature=0.9):
        texts[i] += piece
    assert texts == [llm.generate(prompt, max_tokens=12, temperature=0.9).text for prompt in PROMPTS]
    stream = llm.stream_many(PROMPTS, max_tokens=12)
    next(stream)
    stream.close()  # the others are given up


def test_samples_of_one_prompt(llm: LLM) -> None:
    prompt = LONG
    samples = llm.generate(prompt, n=3, max_tokens=8, temperature=1.0, seed=4, progress=False)
    alone = [llm.generate(prompt, max_tokens=8, temperature=1.0, seed=seed) for seed in (4, 5, 6)]
    assert [s.ids for s in samples] == [s.ids for s in alone] and samples[0].ids != samples[1].ids
    assert [s.timings.reused_tokens for s in samples] == [0, len(prompt) - 1, len(prompt) - 1]
    assert len(llm.generate("Once", n=1, max_tokens=2, progress=False)) == 1
    with pytest.raises(ValueError, match="n: expected a positive integer, found 0"):
        llm.generate("Once", n=0)


def test_stop_strings_end_each_answer(llm: LLM) -> None:
    alone = [llm.generate(prompt, max_tokens=40, temperature=0.9) for prompt in PROMPTS]
    stop = alone[0].text[3:5]
    found = llm.generate_many(PROMPTS, max_tokens=40, temperature=0.9, stop=stop, progress=False)
    for a, b in zip(alone, found, strict=True):
        assert b.text == a.text.partition(stop)[0]
        assert b.finish_reason == ("stop" if stop in a.text else a.finish_reason)


def test_scores_are_sums_of_log_probabilities(llm: LLM) -> None:
    endings = [" dog", " d", " fox and all that followed", "!"]
    found = llm.score(LONG, iter(endings), progress=False)
    for ending, score in zip(endings, found, strict=True):
        prompt = len(llm.tokenizer.encode(LONG))
        ids = llm.tokenizer.encode(LONG + ending)
        logits = llm.logits(ids)
        alone = K.log_softmax(logits)[np.arange(prompt - 1, len(ids) - 1), ids[prompt:]].sum(dtype=np.float64)
        assert score == alone
    chat = llm.score(PROMPTS[3], ["yes", "no"], progress=False)
    assert chat.shape == (2,) and (chat < 0).all()
    wrong: Any
    for wrong in ("text", [b"a"]):
        with pytest.raises(TypeError, match="continuations: expected a list of strings"):
            llm.score("a", wrong)
    with pytest.raises(ValueError, match=r"^continuations\[1\]: expected at least one character, found none"):
        llm.score("a", ["b", ""])
    with pytest.raises(ContextFullError, match="the prompt with its continuation, .* has 300 tokens, the model takes"):
        llm.score("a", ["b" * 300])


def test_a_prompt_and_a_continuation_that_are_one_token(smollm2_path: Path) -> None:
    """Nothing would come before it: each is then a token of its own."""
    llm = load(smollm2_path, threads=2)
    (x,), (a,), both = (llm.tokenizer.encode(text) for text in ("x", "a", "xa"))
    assert len(both) == 1
    assert llm.score("x", ["a"], progress=False)[0] == pytest.approx(K.log_softmax(llm.logits([x])[0])[a])
    engine = Engine(llm.model, "f16", memory=block_bytes(llm.config, "f16"))
    with pytest.raises(ValueError, match="expected at least one token, found none"):
        engine.submit(Scored(np.array(both), 0))


def test_embeddings_are_pooled_hidden_states(llm: LLM) -> None:
    texts = [p for p in PROMPTS if isinstance(p, str)]
    mean, last = llm.embed(texts, progress=False), llm.embed(texts, pooling="last", progress=False)
    assert mean.dtype == last.dtype == np.float32 and mean.shape == last.shape == (3, 48)
    for i, text in enumerate(texts):
        with llm.trace(text) as trace:
            trace.keep("final.residual")
        states = K.rms_norm(trace["final.residual"], llm.model.decoder.norm, llm.model.decoder.eps)
        np.testing.assert_array_equal(last[i], states[-1])
        np.testing.assert_allclose(mean[i], states.mean(axis=0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_array_equal(llm.embed(text, progress=False), mean[i])
    with pytest.raises(ValueError, match="pooling: expected one of mean, last, found 'max'"):
        llm.embed(texts, pooling="max")
    with pytest.raises(TypeError, match=r"^texts\[1\]: expected a string, found int"):
        llm.embed(["a", 3])  # type: ignore[list-item]
    with pytest.raises(ContextFullError, match="the text has 300 tokens, the model takes 256"):
        llm.embed(["a", "b" * 300])


def test_what_is_refused(llm: LLM) -> None:
    wrong: Any
    call: Any
    with pytest.raises(TypeError, match="prompts: expected several prompts, found str"):
        llm.generate_many("one prompt")
    with pytest.raises(ValueError, match="seed: expected one, or 2, one for each prompt, found 3"):
        llm.generate_many(["a", "b"], seed=[1, 2, 3])
    with pytest.raises(ValueError, match="kv: expected one of auto, f32, f16, int8, found 'f8'"):
        llm.generate_many(["a"], kv="f8")
    with pytest.raises(ValueError, match="memory: expected at least [0-9]+ bytes, which 256 tokens need, found 1000"):
        llm.generate_many(["a"], memory=1000)
    with pytest.raises(ValueError, match="sequences: expected a positive integer, found 0"):
        llm.generate_many(["a"], sequences=0)
    for wrong in ("2", 1.5):
        with pytest.raises(ValueError, match=f"sequences: expected a positive integer, found {wrong!r}"):
            llm.generate_many(["a"], sequences=wrong)
    for wrong in ("two", "1e9", float("inf"), float("nan"), -1.0, True):
        with pytest.raises(ValueError, match="^memory: expected a number of bytes, or a size such as 50GB, found "):
            llm.generate_many(["a"], memory=wrong)
    with pytest.raises(ValueError, match="memory: expected at least [0-9]+ bytes, which .*, found '1kB'"):
        llm.generate_many(["a"], memory="1kB")
    assert llm.answering(memory="20 MB").engine.pool.memory == 20 * 10**6
    assert llm.answering(memory="0.5GiB").engine.pool.memory == 2**29
    with pytest.raises(TypeError, match="draft: only for one text"):
        llm.generate("a", n=2, draft="lookup")
    with pytest.raises(TypeError, match="cache: only for one text"):
        llm.generate_many(["a"], cache=llm.new_cache(8))
    with pytest.raises(ValueError, match="seed: expected an integer"):
        llm.generate("a", n=2, seed="x")
    for call, name in (
        (llm.generate_many, "prompts"),
        (llm.embed, "texts"),
        (lambda x: llm.score("a", x), "continuations"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected .* found None"):
            call(None)
    with pytest.raises(TypeError, match="^prompts: expected several prompts, found the messages of one chat"):
        llm.generate_many(PROMPTS[3])


def test_errors_name_the_prompt(llm: LLM, tmp_path: Path) -> None:
    """And not where an option is at fault, or there is only one prompt."""
    call: Any
    for call in (llm.generate_many, lambda *given, **options: list(llm.stream_many(*given, **options))):
        for wrong, kind, said in (
            ("b" * 300, ContextFullError, "context full: the prompt has 300 tokens, the model takes 256"),
            ("", ValueError, "expected at least one token id, found none"),
            ([1, 5000], ValueError, "expected token ids from 0 to 259, found 5000"),
            (None, TypeError, "expected text, token ids or messages, found None"),
            ([{"role": "king", "content": "Hi"}], ValueError, r"messages\[0\]\['role'\]: found 'king'"),
        ):
            with pytest.raises(kind, match=rf"^prompts\[2\]: {said}"):
                call(["a", "b", wrong])
        with pytest.raises(ValueError, match=r"^prompts\[0\]: tools: only for messages"):
            call(["a"], tools=[])
        with pytest.raises(ValueError, match="^top_k: "):
            call(["a"], top_k=-1)
        with pytest.raises(ValueError, match="^max_tokens: "):
            call(["a"], max_tokens=0)
        with pytest.raises(TypeError, match="^unexpected keyword argument 'tok_p': did you mean 'top_p'"):
            call(["a"], tok_p=0.5)
    with pytest.raises(ContextFullError, match="^context full: the prompt has 300 tokens"):
        llm.generate("b" * 300, n=2)
    longer = byte_llm(tmp_path, config=replace(llm.config, max_position_embeddings=1024))
    with pytest.raises(ContextFullError, match=r"^prompts\[1\]: context full: the sequence may have 300 tokens"):
        longer.generate_many(["a", "b" * 200], max_tokens=100, memory=block_bytes(longer.config, "f32"))
    with pytest.raises(ValueError, match=r"^messages\[0\]\['role'\]"):
        llm.generate([{"role": "king", "content": "Hi"}], n=2)


def test_a_failing_sampler_ends_its_own_answer_alone(llm: LLM) -> None:
    class Failing(Sampler):
        def choose(self, logits: np.ndarray, ids: np.ndarray) -> int:
            if len(ids) == 4:
                raise ValueError("four")
            return super().choose(logits, ids)

    engine = Engine(llm.model, memory=block_bytes(llm.config, "f32") * 4)
    ids = np.array([1, 2, 3])
    good, bad = (Generated(ids, kind(Sampling()), 5, 10) for kind in (Sampler, Failing))
    engine.submit(good)
    engine.submit(bad)
    engine.finish()
    assert str(bad.error) == "four" and good.error is None
    assert good.ids[3:].tolist() == llm.generate(ids, max_tokens=5).ids
    assert not engine.prefixes.used


def test_an_engine_takes_requests_at_any_time(llm: LLM) -> None:
    """As a server uses it: requests join, go away, and share what others computed before."""
    answering = llm.answering(sequences=2, memory=block_bytes(llm.config, "f32") * 4)
    first = answering.submit(llm.request(LONG, max_tokens=20))
    ((_, pieces),) = answering.step()
    gone = answering.submit(llm.request("a", max_tokens=50))
    late = answering.submit(llm.request(LONG + "And", max_tokens=6))
    texts = {first: "".join(piece.text for piece in pieces), late: ""}
    steps = 0
    while answering.busy:
        for job, pieces in answering.step():
            if job in texts:
                texts[job] += "".join(piece.text for piece in pieces)
        steps += 1
        if steps == 3:
            answering.cancel(gone)
    assert gone.done and 0 < len(gone.sequence.ids) < 51 and gone.result.finish_reason == "cancelled"
    answering.cancel(late)  # has ended: it stays as it is
    assert late.result.finish_reason == "length"
    assert repr(late) == "Job(6 tokens, ended: length)" and repr(answering).startswith("Answering(Engine(")
    with pytest.raises(TypeError, match=r"^job: expected what submit\(\.\.\.\) returned, found NoneType"):
        answering.cancel(None)  # type: ignore[arg-type]
    other = llm.answering(sequences=1, memory=block_bytes(llm.config, "f32"))
    theirs = other.submit(llm.request("a", max_tokens=3))
    answering.cancel(theirs)  # not its own
    while not theirs.done:
        other.step()
    assert theirs.result.finish_reason == "length" and theirs.result.ids == llm.generate("a", max_tokens=3).ids
    with pytest.raises(TypeError, match=r"request: expected what llm\.request\(\.\.\.\) returns, found str"):
        answering.submit("a text")  # type: ignore[arg-type]
    assert texts[first] == first.result.text == llm.generate(LONG, max_tokens=20).text
    assert late.result.ids == llm.generate(LONG + "And", max_tokens=6).ids
    assert late.result.timings.reused_tokens == len(LONG)
    again = answering.submit(llm.request(LONG, max_tokens=2))
    while not again.done:
        answering.step()
    assert again.result.timings.reused_tokens == len(LONG) - 1
    assert BLOCK == 256 and "Engine(0 sequences, 0 waiting" in repr(answering.engine)
