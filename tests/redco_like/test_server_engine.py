"""The server over the real engine: a folder, its tokenizer, its template, and answers that are those of the engine."""

import asyncio
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import httpx
import pytest
from serving import serving, tiny_folder
from stress import make_requests, storm

from redco_like import Engine, MeshShape, Plan, SamplingParams
from redco_like.models import load
from redco_like.text import Text

LENGTH = 96
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once upon a time"}]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), length=LENGTH)


@pytest.fixture(scope="module")
def server(folder):
    loaded = load(folder)
    text = Text.from_folder(folder)
    plan = Plan(MeshShape(), "data")
    engine = Engine(loaded.model, loaded.params, plan=plan, rows=4, length=LENGTH, chunk_tokens=16, eos=text.eos)
    # What a request gets alone, before anybody serves.
    prompt = text.encode_chat(MESSAGES)
    [[chat]] = engine.generate([prompt], SamplingParams(max_tokens=20, eos=()))
    asked = SamplingParams(max_tokens=12, temperature=1.0, top_k=20, seed=7, eos=())
    sampled = [engine.generate([text.encode("Once upon")], dataclasses.replace(asked, seed=s))[0][0] for s in (7, 8)]
    with serving(engine, text=text, name="tiny") as running:
        running.alone = {"chat": text.decode(chat.tokens), "sampled": [text.decode(one.tokens) for one in sampled]}
        running.text = text
        yield running


def test_a_chat_is_the_engines_answer_to_the_template(server):
    prompt = server.text.encode_chat(MESSAGES)
    assert server.text.decode(prompt, special=True).endswith("<|end|><|assistant|>")
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    found = server.client.post("/v1/chat/completions", json=body).json()
    assert found["usage"]["prompt_tokens"] == len(prompt)
    assert found["choices"][0]["message"]["content"] == server.alone["chat"]


def test_sampled_answers_depend_on_the_seed_alone(server):
    body = {"prompt": "Once upon", "max_tokens": 12, "temperature": 1.0, "top_k": 20, "ignore_eos": True, "seed": 7}
    found = server.client.post("/v1/completions", json={**body, "n": 2}).json()
    texts = [choice["text"] for choice in found["choices"]]
    assert texts == server.alone["sampled"]
    assert texts[0] != texts[1]


def test_logprobs_are_the_models(server):
    body = {"prompt": "Once upon", "max_tokens": 5, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    found = server.client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == 5
    assert all(-20 < value < 0 for value in found["token_logprobs"])


def test_many_clients_get_what_they_would_get_alone(server):
    requests = make_requests(60, seed=3, longest=20)
    answers, _ = asyncio.run(storm(server.base_url, requests, leaving=0.3, seed=3, patience=0.5))
    assert sum(answer is not None for answer in answers) >= 30
    server.wait_idle()
    stats = server.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    for request, answer in zip(requests, answers, strict=True):
        if answer is not None:
            found = server.client.post("/v1/completions", json={**request.body(), "stream": False}).json()
            assert answer == found["choices"][0]["text"], request


@pytest.mark.slow
def test_the_command_serves_a_folder_until_it_is_told_to_stop(folder):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = "import sys; from redco_like.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["serve", "--model", str(folder), "--port", "0", "--rows", "8", "--name", "mine"]
    with subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
    ) as process:
        first = process.stdout.readline()
        url = re.search(r"http://\S+", first)[0]
        assert first.startswith("serving mine at http://127.0.0.1:")
        assert f"8 rows of up to {LENGTH} tokens" in process.stdout.readline()
        curl = process.stdout.readline()
        body = json.loads(re.search(r"-d '(.*)'", curl)[1])
        found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert found["model"] == "mine"
        assert found["choices"][0]["message"]["role"] == "assistant"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read().endswith("stopped\n")
