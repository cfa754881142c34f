"""The routes: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    app = create_app(engine, text, name="llama", api_key=None)

An application has a `service`: what it runs on, and whether it still takes requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from redco_like.server.answers import ChatShape, CompletionShape, Job, Piece, Shape
from redco_like.server.errors import ApiError, bad
from redco_like.server.metrics import CONTENT_TYPE, Metrics
from redco_like.server.requests import COMPLETION_TOKENS, Asked, Limits, read_chat, read_completion
from redco_like.server.worker import EngineFailed, EngineLike, EngineWorker, Timing
from redco_like.text import Text

logger = logging.getLogger(__name__)
LONG = 8192
"""Characters from which on a text is tokenised in a thread of its own."""
CLIENT_LEFT = 499
"""What nginx calls a request whose client did not wait; nobody reads it."""


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


def create_app(
    engine: EngineLike, text: Text, *, name: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """Make the application; its lifespan starts and stops the engine's thread.

    Args:
        engine: that nobody else steps.
        text: of the model's tokenizer.
        name: of the model, as clients call it.
        limits: what requests may hold.
        api_key: that clients have to send; None for no key.
    """
    service = Service(engine, text, name=name, limits=limits or Limits(), api_key=api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(title="redco-like", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(ApiError, _error)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(HTTPException, _http_error)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(Exception, _unexpected)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, "completions", read_completion, CompletionShape, "cmpl")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, "chat", read_chat, ChatShape, "chatcmpl")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.check_key(request)
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        service.check_key(request)
        if name != service.name:
            raise ApiError(404, f"there is no model {name!r} here; there is {service.name!r}", code="model_not_found")
        return JSONResponse(_model(service))

    @app.get("/health")
    async def health() -> Response:
        if service.worker.failure is not None:
            return JSONResponse({"status": "failed", "error": str(service.worker.failure)}, 503)
        if service.draining or not service.worker.running:
            return JSONResponse({"status": "draining" if service.draining else "starting"}, 503)
        return JSONResponse({"status": "ok", "model": service.name})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.check_key(request)
        worker = service.worker
        page = service.metrics.render(worker.engine.stats(), up=worker.running, open_sequences=worker.open)
        return PlainTextResponse(page, media_type=CONTENT_TYPE)

    return app


def _model(service: Service) -> dict[str, Any]:
    length = service.worker.engine.length
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "redco-like",
        "max_model_len": length,
    }


# One request.


async def _answer(
    service: Service,
    request: Request,
    endpoint: str,
    read: Callable[[Any, Limits], Asked],
    shape: Callable[[str, str, Text], Shape],
    prefix: str,
) -> Response:
    outcome = functools.partial(_outcome, service.metrics, endpoint)
    job: Job | None = None
    try:
        service.check_key(request)
        service.check_open()
        asked = read(await _body(request, service.limits.body_bytes), service.limits)
        job = await service.job(asked)
        made = shape(f"{prefix}-{secrets.token_hex(12)}", service.name, service.text)
        if not asked.stream:
            record = await _unless_gone(_whole(job, made), request.receive)
            if record is None:
                outcome("cancelled")
                return Response(status_code=CLIENT_LEFT)
            outcome("ok")
            return JSONResponse(record)
        # Errors that come before the first token have a status of their own: the response begins with it.
        pieces = job.pieces()
        first = await _unless_gone(_next(pieces), request.receive)
        if first is None:
            outcome("cancelled")
            return Response(status_code=CLIENT_LEFT)
        streamed, job = _Events(job, _lines(job, made, first, pieces), outcome), None
        return streamed
    except ApiError as error:
        outcome(error.outcome)
        raise
    except ClientDisconnect:
        outcome("cancelled")
        return Response(status_code=CLIENT_LEFT)
    except asyncio.CancelledError:
        outcome("cancelled")
        raise
    except Exception:
        outcome("failed")
        raise
    finally:
        if job is not None:
            _close(service.metrics, job)


def _outcome(metrics: Metrics, endpoint: str, outcome: str) -> None:
    metrics.requests.add(endpoint=endpoint, outcome=outcome)


def _close(metrics: Metrics, job: Job) -> None:
    job.close()
    metrics.output_tokens.add(job.output_tokens)


async def _body(request: Request, most: int) -> Any:
    """The body as JSON, of at most so many bytes."""
    declared = request.headers.get("content-length", "0")
    found = bytearray()
    if not (declared.isdigit() and int(declared) > most):
        async for part in request.stream():
            found += part
            if len(found) > most:
                break
        else:
            try:
                return json.loads(found)
            except (ValueError, RecursionError) as error:
                raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    raise ApiError(
        413, f"the body has more than {most} bytes", code="request_too_large", headers={"Connection": "close"}
    )


async def _next(pieces: AsyncIterator[list[Piece]]) -> list[Piece]:
    return await anext(pieces)


async def _whole(job: Job, shape: Shape) -> dict[str, Any]:
    found: dict[int, list[Piece]] = {}
    async for pieces in job.pieces():
        for piece in pieces:
            found.setdefault(piece.index, []).append(piece)
    return shape.whole(found, job.usage(), job.asked.logprobs)


async def _lines(job: Job, shape: Shape, first: list[Piece], rest: AsyncIterator[list[Piece]]) -> AsyncIterator[bytes]:
    """Server-sent events of a stream (html.spec.whatwg.org/multipage/server-sent-events.html)."""
    asked, seen = job.asked, set()

    def lines(pieces: list[Piece]) -> bytes:
        out = b""
        for piece in pieces:
            if piece.text or piece.finish or piece.tokens or piece.index not in seen:
                begins = piece.index not in seen
                seen.add(piece.index)
                record = shape.part(piece, first=begins, logprobs=asked.logprobs, with_usage=asked.include_usage)
                out += _event(record)
        return out

    try:
        yield lines(first)
        async for pieces in rest:
            if out := lines(pieces):
                yield out
        if asked.include_usage:
            yield _event(shape.last(job.usage()))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.record())
        raise


def _event(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class _Events(Response):
    """A stream that ends, and gives its job up, when its client leaves."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, lines: AsyncIterator[bytes], outcome: Callable[[str], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._lines, self._outcome = job, lines, outcome

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        ended = "cancelled"

        async def write() -> bool:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True

        try:
            if await _unless_gone(write(), receive):
                ended = "ok"
        except ApiError as error:  # the client has been told in the stream
            ended = error.outcome
            with contextlib.suppress(OSError):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass
        finally:
            await self._lines.aclose()  # type: ignore[attr-defined]
            self._outcome(ended)
            self._job.close()
            scope["app"].state.service.metrics.output_tokens.add(self._job.output_tokens)


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Callable[[], Any]) -> Any:
    """Do something unless the client leaves first, which gives None."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


# Errors.


async def _error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.record(), error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    what = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} takes no {request.method}"}
    made = ApiError(error.status_code, what.get(error.status_code, str(error.detail)))
    return JSONResponse(made.record(), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("%s failed", request.url.path, exc_info=error)
    return JSONResponse(ApiError(500, f"the server failed: {type(error).__name__}").record(), 500)
