"""The server: OpenAI's own client gets the library's answers; hostile and hasty clients harm nobody else."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from ruvllm.llm import LLM
from ruvllm.serving.server import listen
from ruvllm.serving.settings import Settings
from tests.llm_cases import write_directory
from tests.serving_cases import Running, Scripted, running, wait_for

CHAT: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}}
]


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, sequences=4, queue=8) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return server.client()


def says(llm: LLM, monkeypatch: pytest.MonkeyPatch, text: str, pause: Any = lambda: None) -> None:
    """Let each answer be this text."""
    monkeypatch.setattr(llm, "sampler", lambda options, chat=None: Scripted(text, pause), raising=False)


def metric(server: Running, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    found = re.search(rf"^ruvllm_{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def test_a_chat_is_the_librarys(llm: LLM, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="bytes", messages=CHAT, seed=7, temperature=0.9, top_p=0.95, max_tokens=20, presence_penalty=0.3,
        logit_bias={"65": 5}, logprobs=True, top_logprobs=3, extra_body={"top_k": 200},
    )  # fmt: skip
    own = llm.chat(
        CHAT, seed=7, temperature=0.9, top_p=0.95, max_tokens=20, presence_penalty=0.3, logit_bias={65: 5}, top_k=200,
        logprobs=3,
    )  # fmt: skip
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (own.text, own.finish_reason)
    assert found.usage is not None and own.logprobs is not None and choice.logprobs is not None
    assert found.usage.completion_tokens == own.timings.tokens
    assert found.usage.prompt_tokens == own.timings.prompt_tokens
    content = choice.logprobs.content or []
    assert [bytes(entry.bytes or []) for entry in content] == [llm.tokenizer.token_bytes(i) for i in own.ids]
    assert [entry.logprob for entry in content] == [logprob for logprob, _ in own.logprobs]
    top = [[bytes(t.bytes or []) for t in entry.top_logprobs] for entry in content]
    assert top == [[llm.tokenizer.token_bytes(i) for i, _ in likeliest] for _, likeliest in own.logprobs]


def test_a_stream_says_the_same(llm: LLM, client: openai.OpenAI) -> None:
    asked: Any = {"model": "bytes", "messages": CHAT, "seed": 3, "n": 3, "max_tokens": 15, "stop": ["zz"]}
    whole = client.chat.completions.create(**asked, logprobs=True)
    texts, tokens, reasons = [""] * 3, [0] * 3, [""] * 3
    chunks: list[Any] = list(
        client.chat.completions.create(**asked, logprobs=True, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    own = llm.generate(CHAT, seed=3, n=3, max_tokens=15, temperature=1.0, progress=False)
    assert texts == [c.message.content for c in whole.choices] == [one.text for one in own]
    assert tokens == [len(one.ids) for one in own]
    assert reasons == [c.finish_reason for c in whole.choices]


def test_completions(llm: LLM, server: Running, client: openai.OpenAI) -> None:
    prompts = ["The quick", "a"]
    found = client.completions.create(model="bytes", prompt=prompts, n=2, seed=5, logprobs=2, temperature=0.8)
    own = [llm.generate(p, seed=5, n=2, temperature=0.8, max_tokens=16, logprobs=2, progress=False) for p in prompts]
    for choice, one in zip(found.choices, [*own[0], *own[1]], strict=True):
        assert choice.text == one.text and choice.logprobs is not None and one.logprobs is not None
        assert choice.logprobs.token_logprobs == [logprob for logprob, _ in one.logprobs]
        offsets = choice.logprobs.text_offset or []
        assert offsets[0] == 0 and len(offsets) == len(one.ids)
    ids = llm.tokenizer.encode("a")
    asked: Any = {"model": "bytes", "prompt": ids, "temperature": 0, "max_tokens": 4}
    text = llm.generate("a", max_tokens=4).text
    assert client.completions.create(**asked).choices[0].text == text
    assert "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True)) == text
    raw = httpx.post(f"{server.url}/v1/completions", json={**asked, "stream": True}).text
    assert raw.endswith("data: [DONE]\n\n") and raw.startswith("data: {")
    echoed = client.completions.create(model="bytes", prompt="a", temperature=0, max_tokens=4, echo=True)
    assert echoed.choices[0].text == "a" + text


def test_answers_of_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False,
    }  # fmt: skip
    kind: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    found = client.chat.completions.create(model="bytes", messages=CHAT, seed=1, response_format=kind)
    assert json.loads(found.choices[0].message.content or "")["a"] in (1, 22)
    kind = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="schema: cannot be compiled") as refused:
        client.chat.completions.create(model="bytes", messages=CHAT, response_format=kind)
    assert refused.value.param == "response_format"


def test_calls_of_tools(llm: LLM, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"name": "weather", "arguments": {"city": "Köln"}}
    says(llm, monkeypatch, f"Wait. <tool_call>{json.dumps(call)}</tool_call>")
    asked: Any = {"model": "bytes", "messages": CHAT, "tools": TOOLS}
    (choice,) = client.chat.completions.create(**asked).choices
    (made,) = choice.message.tool_calls or []
    assert (choice.finish_reason, choice.message.content, made.type) == ("tool_calls", "Wait.", "function")
    assert made.function.name == "weather" and json.loads(made.function.arguments) == {"city": "Köln"}
    calls: list[Any] = []
    text, reason = "", None
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta
        text, calls = text + (delta.content or ""), calls + (delta.tool_calls or [])
        reason = chunk.choices[0].finish_reason or reason
    assert (text.strip(), reason) == ("Wait.", "tool_calls")
    assert json.loads(calls[0].function.arguments) == {"city": "Köln"} and calls[0].id
    # What was called goes back in the next request; arguments are objects for the template.
    messages = [*CHAT, choice.message, {"role": "tool", "tool_call_id": made.id, "content": "rain"}]
    says(llm, monkeypatch, "1 <tool_c and 2")
    again: Any = {**asked, "messages": messages}
    assert client.chat.completions.create(**again).choices[0].message.content == "1 <tool_c and 2"
    stream = client.chat.completions.create(**again, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "1 <tool_c and 2"


def test_embeddings(llm: LLM, client: openai.OpenAI) -> None:
    texts = ["The quick brown fox", "a"]
    found = client.embeddings.create(model="bytes", input=texts)  # the client asks for base64
    own = llm.embed(texts, progress=False)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_array_equal(np.array([one.embedding for one in found.data], np.float32), own)
    (one,) = client.embeddings.create(model="bytes", input="a", encoding_format="float").data
    np.testing.assert_array_equal(np.array(one.embedding, np.float32), own[1])
    with pytest.raises(openai.BadRequestError, match="the prompt has 300 tokens"):
        client.embeddings.create(model="bytes", input="a" * 300)


def test_models_health_and_the_page(server: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bytes"]
    assert client.models.retrieve("bytes").object == "model"
    with pytest.raises(openai.NotFoundError, match="the model other does not exist: this server has bytes"):
        client.models.retrieve("other")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    page = httpx.get(server.url)
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere
    assert metric(server, 'requests_total{path="/health",status="200"}') >= 1


@pytest.mark.parametrize(
    ("changes", "status", "param", "message"),
    [
        ({"tempreature": 1}, 400, "tempreature", "Unrecognized request argument supplied: tempreature"),
        ({"temperature": -1}, 400, "temperature", "temperature: expected a finite number >= 0, found -1"),
        ({"temperature": "hot"}, 400, "temperature", "temperature: expected a finite number"),
        ({"messages": []}, 400, "messages", "messages: expected a list of messages"),
        ({"messages": [{"role": "pirate", "content": "a"}]}, 400, "messages", "role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "image_url"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, 400, "messages", "context full"),
        ({"model": "gpt-4"}, 404, "model", "the model gpt-4 does not exist: this server has bytes"),
        ({"n": 0}, 400, "n", "n: expected an integer from 1 to 12"),
        ({"n": 13}, 400, "n", "n: expected an integer from 1 to 12"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "max_tokens: expected an integer"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs to be true"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "token ids as keys"),
        ({"logit_bias": {"70000": 1}}, 400, "logit_bias", "token ids up to 259"),
        ({"stop": [""]}, 400, "stop", "stop: expected a string"),
        ({"response_format": {"type": "xml"}}, 400, "response_format", "json_object or json_schema"),
        ({"tools": TOOLS, "tool_choice": "required"}, 400, "tool_choice", "a call cannot be forced"),
        ({"stream_options": {}}, 400, "stream_options", "with stream: true"),
        ({"seed": -4}, 400, "seed", "seed: expected an integer >= 0"),
    ],
)
def test_what_is_refused(server: Running, changes: Any, status: int, param: str | None, message: str) -> None:
    body = json.dumps({"model": "bytes", "messages": CHAT, "max_tokens": 4, **changes})
    kind = {"Content-Type": "application/json"}
    found = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=kind)
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (status, param), error
    assert message in error["message"] and error["type"] == "invalid_request_error" and error.keys() == {
        "message", "type", "param", "code"
    }  # fmt: skip


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"temperature": NaN}', b"[" * 100_000, b'"' + b"a" * 1000]
)
def test_garbage_is_refused(server: Running, body: bytes) -> None:
    for path in ("chat/completions", "completions", "embeddings"):
        found = httpx.post(f"{server.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_json")


def test_other_methods_paths_and_kinds(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["code"] == "not_found"
    assert httpx.post(f"{server.url}/v1/completions", data={"prompt": "a"}).status_code == 415
    assert httpx.options(f"{server.url}/v1/completions", headers={"Origin": "http://evil"}).status_code == 405
    for host, status in (("evil.example:80", 421), ("localhost", 200), ("[::1]:8080", 200), ("", 421)):
        assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == status


def test_the_key_is_needed(llm: LLM) -> None:
    with running(llm, api_key="secret", sequences=1) as server:
        for wrong in ("secre", "secret2"):
            with pytest.raises(openai.AuthenticationError):
                server.client(api_key=wrong).models.list()
        for header in ("Bearer é".encode(), b"Basic secret", b"secret", b"Bearer"):
            assert httpx.get(f"{server.url}/v1/models", headers={b"Authorization": header}).status_code == 401
        assert httpx.get(f"{server.url}/v1/models").status_code == httpx.get(f"{server.url}/metrics").status_code == 401
        assert server.client(api_key="secret").models.list().data[0].id == "bytes"
        assert httpx.get(server.url).status_code == httpx.get(f"{server.url}/health").status_code == 200


def test_limits_of_size_number_and_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    with running(llm, sequences=1, queue=1, timeout=1.5, body_bytes=2000, context=100) as server:
        client = server.client()
        asked: Any = {"model": "bytes", "messages": CHAT}
        with pytest.raises(openai.APIStatusError, match="more than 2000 bytes") as refused:
            client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": "a" * 2000}])
        assert refused.value.status_code == 413
        pieces = (b" " * 500 for _ in range(6))  # of unknown length
        kind = {"Content-Type": "application/json"}
        assert httpx.post(f"{server.url}/v1/completions", content=pieces, headers=kind).status_code == 413
        with pytest.raises(openai.BadRequestError, match="the server takes 100"):
            client.completions.create(model="bytes", prompt="a" * 101)
        assert client.completions.create(model="bytes", prompt="a" * 98, max_tokens=9).usage.completion_tokens <= 2  # type: ignore[union-attr]

        with monkeypatch.context() as patched:
            says(llm, patched, "slow " * 30, lambda: go.wait(0.05))
            streams = [client.chat.completions.create(**asked, stream=True) for _ in range(2)]
            with pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(**asked)
            assert full.value.response.headers["retry-after"] == "1"
            with pytest.raises(openai.APIError, match="longer than 1.5 seconds"):  # as an event
                list(streams[0])
            streams[1].close()
            wait_for(lambda: metric(server, "running_sequences") + metric(server, "waiting_sequences") == 0)
            with pytest.raises(openai.InternalServerError) as late:
                client.with_options(max_retries=2).chat.completions.create(**asked)  # which does not ask again
            assert late.value.status_code == 504
            assert metric(server, 'requests_total{path="/v1/chat/completions",status="504"}') == 1
        go.set()
        assert client.chat.completions.create(**asked, max_tokens=2).choices  # nothing is left of them


def test_each_text_to_embed_has_a_place_in_the_queue(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    with running(llm, sequences=1, queue=3) as server:
        client = server.client()
        with monkeypatch.context() as patched:
            says(llm, patched, "slow " * 30, lambda: go.wait(0.05))
            asked: Any = {"model": "bytes", "messages": CHAT, "stream": True}
            streams = [client.chat.completions.create(**asked) for _ in range(2)]
            with pytest.raises(openai.RateLimitError):
                client.embeddings.create(model="bytes", input=["a"] * 3)
            for stream in streams:
                stream.close()
            go.set()
            wait_for(lambda: metric(server, "running_sequences") + metric(server, "waiting_sequences") == 0)
        for _ in range(3):  # more than the queue takes: alone, they are computed one after the other
            assert len(client.embeddings.create(model="bytes", input=["a"] * 10).data) == 10


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_sequence(
    llm: LLM, server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    go = threading.Event()
    before = metric(server, "disconnects_total")
    with monkeypatch.context() as patched:
        says(llm, patched, "on and on " * 20, lambda: go.wait(0.02))
        body = json.dumps({"messages": CHAT, "stream": stream}).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as gone:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_for(lambda: metric(server, "running_sequences") == 1)
        wait_for(lambda: metric(server, "running_sequences") == 0, 3)  # its text would take four seconds
    go.set()
    assert metric(server, "disconnects_total") == before + 1 and metric(server, "kv_bytes_in_use") == 0
    own = llm.chat(CHAT, max_tokens=8, temperature=0)
    found = client.chat.completions.create(model="bytes", messages=CHAT, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == own.text


def test_an_error_ends_its_own_request_alone(
    llm: LLM, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: Any = {"model": "bytes", "messages": CHAT, "seed": 2, "max_tokens": 40}
    stream = client.chat.completions.create(**asked, stream=True)
    with monkeypatch.context() as patched:
        says(llm, patched, "", lambda: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the answer failed: division by zero"):
            client.chat.completions.create(**asked)
        with pytest.raises(openai.APIError, match="the answer failed"):
            list(client.chat.completions.create(**asked, stream=True))
    own = llm.chat(CHAT, seed=2, max_tokens=40, temperature=1.0)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == own.text


def test_many_clients_at_once(llm: LLM, server: Running, client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}

    def ask(seed: int) -> None:
        found = client.completions.create(model="bytes", prompt="Once", seed=seed, max_tokens=12)
        texts[seed] = found.choices[0].text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {s: llm.generate("Once", seed=s, max_tokens=12, temperature=1.0).text for s in range(10)}


def test_the_end_waits_for_answers_and_no_longer_than_said(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    for grace, text in ((10, "to the end"), (1, "on and on" * 100)):
        with monkeypatch.context() as patched, running(llm, grace=grace, context=2000) as server:
            says(llm, patched, text, lambda: never.wait(0.02))
            asked: Any = {"model": "bytes", "messages": CHAT}
            stream = server.client().chat.completions.create(**asked, stream=True)
            next(iter(stream))
            server.server.should_exit = True
            if grace > 1:
                assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
            else:
                with pytest.raises((httpx.HTTPError, openai.APIError)):
                    list(stream)
            server.thread.join(10)
            assert not server.thread.is_alive()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("ends_by", [signal.SIGTERM, signal.SIGINT])
def test_the_command(tmp_path: Path, ends_by: signal.Signals) -> None:
    model = write_directory(tmp_path / "tiny")
    command = [sys.executable, "-m", "ruvllm", "serve", str(model), "--port", "0", "--sequences", "2", "--alias", "t"]
    environment = {**os.environ, "RUVLLM_API_KEY": "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"t answers at (http://127.0.0.1:\d+/v1)", line)))
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        assert client.completions.create(model="t", prompt="a", max_tokens=3).choices[0].finish_reason
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(model="t", messages=CHAT)
        process.send_signal(ends_by)
        rest = process.stderr.read()
        assert (process.wait(20), "Traceback" in rest) == (0, False), rest


def test_settings_and_addresses_that_cannot_be(llm: LLM) -> None:
    for wrong, message in (({"sequences": 0}, "sequences"), ({"queue": -1}, "queue"), ({"timeout": 0}, "timeout")):
        with pytest.raises(ValueError, match=message):
            Settings("a", **wrong)  # type: ignore[arg-type]
    for key in ("", " a", "é"):
        with pytest.raises(ValueError, match="api_key: expected ASCII"):
            Settings("a", api_key=key)
    assert "secret" not in repr(Settings("a", api_key="secret"))
    with listen("127.0.0.1", 0) as taken, pytest.raises(OSError, match="cannot listen on 127.0.0.1, port"):
        listen("127.0.0.1", taken.getsockname()[1])
