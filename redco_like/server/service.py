"""What an application runs on: the engine's worker, the tokenizer, the limits, and who may ask.

service = Service(engine, text, name="llama", limits=Limits(), api_key=None)
service.check_key(request); service.check_open()
job = await service.job(asked)
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import math
import time
from typing import Any

from fastapi import Request

from redco_like.server.answers import Job
from redco_like.server.errors import ApiError, bad
from redco_like.server.metrics import Metrics
from redco_like.server.requests import COMPLETION_TOKENS, Asked, Limits
from redco_like.server.worker import EngineFailed, EngineLike, EngineWorker, Timing
from redco_like.text import Text

LONG = 8192
"""Characters from which on a text is tokenised in a thread of its own."""


class Service:
    """What an application runs on.

    Attributes:
        draining: whether running requests are finished and new ones refused.
    """

    def __init__(self, engine: EngineLike, text: Text, *, name: str, limits: Limits, api_key: str | None):
        self.worker, self.text, self.name, self.limits = EngineWorker(engine), text, name, limits
        self.metrics = Metrics()
        self.draining = False
        self.created = int(time.time())
        self._key = None if api_key is None else api_key.encode()
        self.rows: int = engine.stats().rows
        self.worker.on_first, self.worker.on_end = self.metrics.first_token.observe, self._ended

    def _ended(self, timing: Timing) -> None:
        if timing.each is not None:
            self.metrics.each_token.observe(timing.each)
        self.metrics.whole.observe(timing.whole)

    def check_key(self, request: Request) -> None:
        """Compare in a time that does not tell how much of a key was right."""
        if self._key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError(
                401,
                "no valid API key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
                outcome="unauthorized",
            )

    def check_open(self) -> None:
        """Whether requests are taken at all."""
        if self.worker.failure is not None:
            raise ApiError(
                500, f"the engine has stopped: {self.worker.failure}", code="engine_failed", outcome="failed"
            )
        if self.draining:
            raise ApiError(
                503,
                "the server is shutting down; send the request to another one",
                code="shutting_down",
                headers={"Retry-After": "5", "Connection": "close"},
                outcome="draining",
            )

    def check_room(self, count: int) -> None:
        """Whether so many more sequences may wait."""
        waiting = self.worker.open + count - self.rows
        if waiting <= self.limits.waiting:
            return
        took = self.metrics.whole.sum / self.metrics.whole.count if self.metrics.whole.count else 1.0
        seconds = min(60, max(1, math.ceil(took * waiting / self.rows)))
        raise ApiError(
            429,
            f"{max(self.worker.open - self.rows, 0)} sequences wait already, of at most {self.limits.waiting}; try "
            f"again in about {seconds} s",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
            outcome="refused",
        )

    async def job(self, asked: Asked) -> Job:
        """Tokenise, check the sizes, and hand everything to the engine."""
        from redco_like import SamplingParams

        if asked.model and asked.model != self.name:
            message = f"there is no model {asked.model!r} here; there is {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        prompts = await self._prompts(asked)
        field = "messages" if asked.messages else "prompt"
        rooms = [self._room(len(prompt), asked, field) for prompt in prompts]
        self.check_room(len(prompts) * asked.n)
        eos = () if asked.ignore_eos else None

        def params(index: int, max_tokens: int) -> Any:
            seed = (asked.seed + index) % 2**32
            return SamplingParams(max_tokens=max_tokens, seed=seed, eos=eos, **asked.sampling)

        try:
            job = Job(asked, prompts, worker=self.worker, text=self.text, params=params, max_tokens=rooms)
        except EngineFailed:
            self.check_open()
            raise
        except ValueError as error:
            raise bad(field, str(error)) from error
        self.metrics.prompt_tokens.add(job.prompt_tokens)
        return job

    async def _prompts(self, asked: Asked) -> list[list[int]]:
        if not asked.messages:
            return [list(p) if isinstance(p, tuple) else await self._encode(p, special=True) for p in asked.prompts]
        try:
            text = self.text.chat(asked.messages, **asked.template_options)
        except ValueError as error:
            raise bad("messages", str(error)) from error
        return [await self._encode(text, special=False)]

    async def _encode(self, text: str, *, special: bool) -> list[int]:
        encode = functools.partial(self.text.encode, text, special=special)
        return await asyncio.to_thread(encode) if len(text) > LONG else encode()

    def _room(self, prompt: int, asked: Asked, field: str) -> int:
        """Tokens at most of an answer to a prompt of so many."""
        length = self.worker.engine.length
        most = min(self.limits.prompt_tokens or length - 1, length - 1)
        if not prompt:
            raise bad(field, "the prompt has no tokens: there is nothing to continue")
        if prompt > most:
            raise bad(field, f"a prompt of {prompt} tokens; at most {most}", "context_length_exceeded")
        room = length - prompt
        if asked.max_tokens is None:
            usual = room if asked.messages else COMPLETION_TOKENS
            return min(usual, room, self.limits.max_tokens or room)
        if asked.max_tokens > room:
            raise bad(
                "max_tokens",
                f"a prompt of {prompt} tokens and max_tokens={asked.max_tokens} are more than the context of {length}; "
                f"nearest: max_tokens={room}",
                "context_length_exceeded",
            )
        return asked.max_tokens
