"""The server: its endpoints, what it refuses, who leaves, what fails, how it ends. With an engine without a model."""

import concurrent.futures
import json
import socket
import threading
import time

import httpx
import pytest
from fake_engine import FakeEngine, expected
from serving import serving

from redco_like.server import Limits
from redco_like.server.metrics import Counter, Histogram
from redco_like.text import Text

CHATML = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if extra %}{{ extra }}{% endif %}"


def chat_text():
    from redco_like.chat_template import ChatTemplate

    plain = Text.of_bytes(eos=(0,))
    plain.template = ChatTemplate(CHATML)
    return plain


@pytest.fixture(scope="module")
def server():
    with serving(FakeEngine(rows=4), text=chat_text()) as running:
        yield running


def complete(server, **body):
    return server.client.post("/v1/completions", json={"model": "fake", "prompt": "hello", "seed": 1, **body})


def chat(server, **body):
    messages = [{"role": "user", "content": "hi"}]
    return server.client.post("/v1/chat/completions", json={"model": "fake", "messages": messages, "seed": 1, **body})


def events(response):
    """The records of a stream, its end checked."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def tokens(text):
    return list(text.encode())


# What is answered.


def test_a_completion_has_openais_form(server):
    response = complete(server, max_tokens=12)
    assert response.status_code == 200
    found = response.json()
    assert found["object"] == "text_completion"
    assert found["id"].startswith("cmpl-")
    assert found["model"] == "fake"
    want = {"index": 0, "text": expected(tokens("hello"), 1, 12), "logprobs": None, "finish_reason": "length"}
    assert found["choices"] == [want]
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}


def test_a_chat_has_openais_form(server):
    found = chat(server, max_completion_tokens=7).json()
    assert found["object"] == "chat.completion"
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected(tokens("user:hi;"), 1, 7), "refusal": None}
    assert choice["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 7


def test_a_completion_that_says_no_length_has_sixteen_tokens_and_a_chat_its_context(server):
    assert complete(server).json()["usage"]["completion_tokens"] == 16
    assert chat(server).json()["usage"]["total_tokens"] == 256


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_of_a_completion_adds_up(server, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    response = complete(server, max_tokens=20, stream=True, **options)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    if usage:
        assert found[-1]["choices"] == []
        assert found.pop()["usage"] == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}
        assert all(record["usage"] is None for record in found)
    else:
        assert not any("usage" in record for record in found)
    text = "".join(record["choices"][0]["text"] for record in found)
    assert text == expected(tokens("hello"), 1, 20)
    assert [r["choices"][0]["finish_reason"] for r in found] == [None] * (len(found) - 1) + ["length"]
    assert len({record["id"] for record in found}) == 1


def test_a_stream_of_a_chat_begins_with_the_role(server):
    found = events(chat(server, max_tokens=9, stream=True))
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert not any("role" in record["choices"][0]["delta"] for record in found[1:])
    text = "".join(record["choices"][0]["delta"].get("content", "") for record in found)
    assert text == expected(tokens("user:hi;"), 1, 9)
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert found[0]["object"] == "chat.completion.chunk"


def test_several_answers_to_several_prompts_keep_their_places(server):
    found = complete(server, prompt=["ab", tokens("cd"), "e"], n=2, max_tokens=5, seed=40).json()
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert texts == [expected(tokens(p), 40 + i, 5) for i, p in enumerate(["ab", "ab", "cd", "cd", "e", "e"])]
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 30, "total_tokens": 35}
    streamed = {}
    for record in events(complete(server, prompt=["ab", "cd", "e"], n=2, max_tokens=5, seed=40, stream=True)):
        choice = record["choices"][0]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert [streamed[i] for i in range(6)] == texts


def test_a_prompt_of_tokens_is_taken_as_it_is(server):
    assert complete(server, prompt=[1, 2, 3], max_tokens=4).json()["choices"][0]["text"] == expected([1, 2, 3], 1, 4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_and_is_not_in_it(server, stream):
    whole = expected(tokens("hello"), 1, 60)
    stop = whole[20:23]
    response = complete(server, max_tokens=60, stop=[stop, "never"], stream=stream)
    if stream:
        found = events(response)
        text, finish = "".join(r["choices"][0]["text"] for r in found), found[-1]["choices"][0]["finish_reason"]
    else:
        text, finish = response.json()["choices"][0]["text"], response.json()["choices"][0]["finish_reason"]
    assert (text, finish) == (whole[: whole.index(stop)], "stop")
    server.wait_idle()  # its row is free


def test_a_stop_string_of_one_answer_leaves_the_other_going(server):
    first, second = (expected(tokens("hello"), seed, 40) for seed in (1, 2))
    stop = next(first[i : i + 4] for i in range(30) if first[i : i + 4] not in second)
    choices = complete(server, max_tokens=40, n=2, stop=stop).json()["choices"]
    assert [c["text"] for c in choices] == [first[: first.index(stop)], second]
    assert [c["finish_reason"] for c in choices] == ["stop", "length"]


def test_an_end_token_is_no_text_and_may_be_ignored():
    with serving(FakeEngine(end_share=0.1)) as server:
        body = {"prompt": "hello", "seed": 3, "max_tokens": 80}
        found = server.client.post("/v1/completions", json=body).json()
        want = expected(tokens("hello"), 3, 80, end_share=0.1)
        assert len(want) < 80
        assert found["choices"][0]["text"] == want
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] == len(want) + 1
        found = server.client.post("/v1/completions", json={**body, "ignore_eos": True}).json()
        assert found["usage"]["completion_tokens"] == 80


def test_characters_in_parts_are_streamed_whole():
    said = "né 😀 日本"
    with serving(FakeEngine(scripted=tokens(said))) as server:
        response = server.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 60, "stream": True})
        pieces = [record["choices"][0]["text"] for record in events(response)]
    assert "".join(pieces) == said
    assert not any("\ufffd" in piece for piece in pieces)


def test_logprobs_of_the_chosen_tokens(server):
    found = complete(server, max_tokens=3, logprobs=0).json()["choices"][0]
    assert found["logprobs"] == {
        "tokens": list(found["text"]),
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": None,
        "text_offset": [0, 1, 2],
    }
    found = chat(server, max_tokens=2, logprobs=True).json()["choices"][0]
    content = found["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == found["message"]["content"]
    first = content[0]["token"]
    assert content[0] == {"token": first, "logprob": -0.25, "bytes": tokens(first), "top_logprobs": []}
    streamed = events(chat(server, max_tokens=2, logprobs=True, stream=True))
    assert [e for r in streamed for e in (r["choices"][0]["logprobs"] or {"content": []})["content"]] == content


def test_the_template_reads_parts_and_options(server):
    messages = [{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    found = chat(server, messages=messages, chat_template_kwargs={"extra": "!"}, max_tokens=3).json()
    assert found["choices"][0]["message"]["content"] == expected(tokens("system:ab;!"), 1, 3)


def test_without_a_seed_answers_differ(server):
    texts = {complete(server, seed=None, max_tokens=20).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_models_and_health(server):
    found = server.client.get("/v1/models").json()
    assert [entry["id"] for entry in found["data"]] == ["fake"]
    assert server.client.get("/v1/models/fake").json()["max_model_len"] == 256
    assert server.client.get("/v1/models/other").status_code == 404
    assert server.client.get("/health").json() == {"status": "ok", "model": "fake"}


# What is refused.

BAD = [
    ({"prompt": None}, "prompt", "no prompt"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "text"),
    ({"prompt": ["a", ""]}, "prompt", r"prompt[1] is empty"),
    ({"prompt": [1, "a"]}, "prompt", "neither"),
    ({"prompt": [[1], ["a"]]}, "prompt", r"prompt[1]"),
    ({"prompt": [1, 999]}, "prompt", "0 to 255"),
    ({"prompt": "x" * 256}, "prompt", "at most 255"),
    ({"prompt": ["x"] * 65}, "prompt", "more than 64"),
    ({"max_tokens": 0}, "max_tokens", "from 1"),
    ({"max_tokens": True}, "max_tokens", "whole"),
    ({"max_tokens": 1.5}, "max_tokens", "whole"),
    ({"max_tokens": 252}, "max_tokens", "nearest: max_tokens=251"),
    ({"n": 17}, "n", "1 to 16"),
    ({"temperature": -1}, "temperature", "0 (greedy)"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"min_p": 2}, "min_p", "0 to 1"),
    ({"top_k": -2}, "top_k", "-1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"seed": "x"}, "seed", "whole"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "from 1"),
    ({"stop": "x" * 300}, "stop", "256"),
    ({"stop": [1]}, "stop", "text"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"stream": True, "stream_options": {"x": 1}}, "x", "unknown"),
    ({"echo": True}, "echo", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 3}, "best_of", "not ranked"),
    ({"logprobs": 2}, "logprobs", "chosen tokens"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "repetition_penalty"),
    ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"model": 3}, "model", "name"),
]


@pytest.mark.parametrize(("body", "param", "said"), BAD, ids=[f"{next(iter(b))}{i}" for i, (b, _, _) in enumerate(BAD)])
def test_a_completion_that_cannot_be_had_is_refused_with_its_field(server, body, param, said):
    response = complete(server, **body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]


CHAT_BAD = [
    ({"messages": []}, "messages", "list"),
    ({"messages": [{"content": "x"}]}, "messages", "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages", "text"),
    ({"messages": [{"role": "user", "content": "x"}] * 2000}, "messages", "at most 1024"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"top_logprobs": 3}, "top_logprobs", "chosen tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "one of them"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "cannot set"),
    ({"prompt": "x"}, "prompt", "unknown"),
]


@pytest.mark.parametrize(
    ("body", "param", "said"), CHAT_BAD, ids=[f"{next(iter(b))}{i}" for i, (b, _, _) in enumerate(CHAT_BAD)]
)
def test_a_chat_that_cannot_be_had_is_refused_with_its_field(server, body, param, said):
    response = chat(server, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(server, content):
    response = server.client.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_not_a_number_is_no_temperature(server):
    response = server.client.post("/v1/completions", content=b'{"prompt": "x", "temperature": NaN}')
    assert response.json()["error"]["param"] == "temperature"


def test_another_model_another_path_and_another_method(server):
    response = complete(server, model="gpt-4")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        response = server.client.request(method, path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]


def test_a_model_without_a_template_cannot_chat():
    with serving(FakeEngine()) as server:
        response = chat(server)
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_not_read(chunked):
    with serving(FakeEngine(), limits=Limits(body_bytes=1000)) as server:
        body = json.dumps({"prompt": "x" * 5000}).encode()
        content = iter([body[:600], body[600:]]) if chunked else body
        response = server.client.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


def test_the_servers_limits_hold():
    with serving(FakeEngine(), limits=Limits(prompt_tokens=10, max_tokens=5), text=chat_text()) as server:
        assert complete(server, prompt="x" * 11).status_code == 400
        assert complete(server, max_tokens=6).status_code == 400
        assert complete(server).json()["usage"]["completion_tokens"] == 5
        assert chat(server).json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic secret", "secret", "Bearer secre", "Bearer s\u00e9cret"]
)
def test_without_the_key_nothing_is_answered_but_health(header):
    with serving(FakeEngine(), api_key="secret") as server:
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
            response = server.client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert server.client.get("/health").status_code == 200
        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "x", "max_tokens": 2}
        assert server.client.post("/v1/completions", json=body, headers=headers).status_code == 200


# Many at a time.


def test_a_full_queue_says_when_to_come_again():
    with serving(FakeEngine(rows=1, delay=0.02), limits=Limits(waiting=1)) as server:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = [pool.submit(complete, server, max_tokens=30) for _ in range(2)]
            until = time.monotonic() + 5
            while server.service.worker.open < 2 and time.monotonic() < until:
                time.sleep(0.005)
            response = complete(server, max_tokens=2)
            assert response.status_code == 429
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert [r.result().status_code for r in running] == [200, 200]
        assert complete(server, max_tokens=2).status_code == 200


def wait_for(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rows_taken", [False, True], ids=["running", "waiting"])
def test_who_leaves_frees_the_row(stream, rows_taken):
    with serving(FakeEngine(rows=1, delay=0.01)) as server:
        if rows_taken:
            other = threading.Thread(target=complete, args=(server,), kwargs={"max_tokens": 100})
            other.start()
            wait_for(lambda: server.engine.stats().running == 1)
        already = server.service.worker.open
        body = json.dumps({"prompt": "x", "max_tokens": 200, "stream": stream}).encode()
        port = int(server.base_url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            wait_for(lambda: server.service.worker.open == already + 1)
            if stream and not rows_taken:
                assert raw.recv(4096)
        wait_for(lambda: server.service.worker.open == already)
        if rows_taken:
            other.join()
        server.wait_idle()
        assert server.engine.stats().cancelled == 1
        wait_for(
            lambda: server.metrics().get('redco_like_requests_total{endpoint="completions",outcome="cancelled"}') == 1
        )
        assert complete(server, max_tokens=3).json()["choices"][0]["text"] == expected(tokens("hello"), 1, 3)


def test_a_client_that_does_not_read_holds_nobody_up():
    """Its tokens wait for it, joined; its row is free when the answer is whole."""
    with serving(FakeEngine(rows=2, length=60_000, per_step=500)) as server:
        body = json.dumps({"prompt": "slow", "max_tokens": 50_000, "stream": True, "n": 1, "logprobs": 0}).encode()
        port = int(server.base_url.rsplit(":", 1)[1])
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", port))
            raw.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            wait_for(lambda: server.service.worker.open == 1 or server.engine.generated > 0)
            start = time.monotonic()
            assert complete(server, max_tokens=50).json()["choices"][0]["text"] == expected(tokens("hello"), 1, 50)
            assert time.monotonic() - start < 5
            wait_for(lambda: server.service.worker.open == 0)
        server.wait_idle()


def test_an_engine_that_fails_is_everybodys_error_and_health_is_red():
    with serving(FakeEngine(rows=2, delay=0.01)) as server:
        server.engine.fails_at = 20
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            whole = [pool.submit(complete, server, max_tokens=200) for _ in range(3)]
            streamed = pool.submit(complete, server, max_tokens=200, stream=True)
        statuses = [r.result().status_code for r in whole]
        assert statuses == [500] * 3
        assert "out of memory" in whole[0].result().json()["error"]["message"]
        if streamed.result().status_code == 200:  # it had begun
            last = [line for line in streamed.result().text.split("\n\n") if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        response = server.client.get("/health")
        assert response.status_code == 503
        assert "out of memory" in response.json()["error"]
        assert complete(server).status_code == 500
        metrics = server.metrics()
        assert metrics["redco_like_engine_up"] == 0
        assert metrics['redco_like_requests_total{endpoint="completions",outcome="failed"}'] == 5


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_alone_leaves_the_others(server, stream):
    response = complete(server, prompt=[255, 1], stream=stream)
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    assert server.client.get("/health").status_code == 200
    response = complete(server, prompt=["a", [255, 1]], max_tokens=200)  # one of two is none
    assert response.status_code == 500
    server.wait_idle()
    assert complete(server, max_tokens=3).status_code == 200


def test_metrics_count_what_happened():
    with serving(FakeEngine()) as server:
        complete(server, max_tokens=10)
        complete(server, max_tokens=10, stream=True)
        complete(server, max_tokens=-1)
        found = server.metrics()
        assert found['redco_like_requests_total{endpoint="completions",outcome="ok"}'] == 2
        assert found['redco_like_requests_total{endpoint="completions",outcome="invalid"}'] == 1
        assert found["redco_like_prompt_tokens_total"] == 10
        assert found["redco_like_output_tokens_total"] == 20
        assert found["redco_like_time_to_first_token_seconds_count"] == 2
        assert found["redco_like_time_per_output_token_seconds_count"] == 2
        assert found["redco_like_rows"] == 4
        assert found["redco_like_sequences_running"] == found["redco_like_sequences_open"] == 0
        assert found["redco_like_engine_up"] == 1


def test_histograms_are_cumulative_and_labels_are_escaped():
    histogram = Histogram("h", "help", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    lines = ['h_bucket{le="1"} 2', 'h_bucket{le="2"} 3', 'h_bucket{le="+Inf"} 4', "h_sum 12", "h_count 4"]
    assert histogram.lines()[2:] == lines
    counter = Counter("c", "help")
    counter.add(2, what='a"b\n')
    assert counter.lines()[2:] == ['c{what="a\\"b\\n"} 2']


# How it ends.


def test_told_to_stop_it_finishes_what_runs_and_refuses_what_comes():
    with serving(FakeEngine(rows=2, delay=0.01)) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(complete, server, max_tokens=60, stream=stream) for stream in (False, True)]
        wait_for(lambda: server.engine.stats().running == 2)
        server.drain()
        wait_for(lambda: server.service.draining)
        response = complete(server)
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "overloaded_error"
        assert "retry-after" in response.headers
        assert server.client.get("/health").status_code == 503
        assert running[0].result().json()["choices"][0]["text"] == expected(tokens("hello"), 1, 60)
        assert len(events(running[1].result())) >= 1
        wait_for(lambda: server.server.should_exit)
        with pytest.raises(httpx.TransportError):
            for _ in range(100):
                complete(server)
                time.sleep(0.02)


def test_what_does_not_end_in_the_grace_time_is_given_up():
    engine = FakeEngine(rows=2, delay=0.02)
    with serving(engine, grace_seconds=0.3) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(complete, server, max_tokens=250, stream=stream) for stream in (False, True)]
        wait_for(lambda: server.engine.stats().running == 2)
        start = time.monotonic()
        server.drain()
        assert running[0].result().status_code == 503
        assert "shutting down" in running[0].result().json()["error"]["message"]
        assert '"error"' in running[1].result().text
        assert 0.25 < time.monotonic() - start < 2
        wait_for(lambda: engine.idle)
    assert engine.stats().cancelled == 2
