"""Many clients at once, some of whom leave: what each of the others gets, and what is left of the server afterwards.

outcome = asyncio.run(storm(base_url, requests, leaving=0.3, seed=0))
"""

import asyncio
import dataclasses
import json
import random
import time

import httpx


@dataclasses.dataclass(frozen=True)
class Request:
    """A completion: its prompt, and how it is asked for."""

    prompt: str
    seed: int
    max_tokens: int
    temperature: float
    stream: bool

    def body(self):
        return {**dataclasses.asdict(self), "ignore_eos": True}


def make_requests(count, *, seed, longest=40):
    """Prompts of which many begin alike, greedy and sampled, streamed and whole."""
    rng = random.Random(seed)
    starts = ["Once upon a time ", "The server said: ", ""]
    words = ["cat", "dog", "tree", "house", "river", "stone", "cloud", "light"]
    return [
        Request(
            rng.choice(starts) + " ".join(rng.choices(words, k=rng.randint(1, 5))),
            rng.randrange(1000),
            rng.randint(1, longest),
            rng.choice([0.0, 1.0]),
            rng.random() < 0.5,
        )
        for _ in range(count)
    ]


async def ask(client, request, *, leave_after=None):
    """The text of one answer; None where the client left."""
    try:
        async with asyncio.timeout(leave_after):
            if not request.stream:
                response = await client.post("/v1/completions", json=request.body())
                response.raise_for_status()
                return response.json()["choices"][0]["text"]
            text, done = "", False
            async with client.stream("POST", "/v1/completions", json=request.body()) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line:
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            assert done, "the stream broke off"
            return text
    except TimeoutError:
        return None


async def storm(base_url, requests, *, leaving, seed, patience):
    """Ask all at once; a share of the clients leaves after a random part of `patience` seconds.

    Returns:
        Answers by request (None for those who left), and the seconds that all took.
    """
    rng = random.Random(seed)
    leave = [rng.random() * patience if rng.random() < leaving else None for _ in requests]
    limits = httpx.Limits(max_connections=len(requests), max_keepalive_connections=len(requests))
    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=base_url, timeout=300, limits=limits) as client:
        answers = await asyncio.gather(
            *(ask(client, r, leave_after=after) for r, after in zip(requests, leave, strict=True))
        )
    return answers, time.perf_counter() - start


def resident_bytes():
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
