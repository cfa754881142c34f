"""The routes: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    app = create_app(engine, text, name="llama", api_key=None)

An application has a `service`: what it runs on, and whether it still takes requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from redco_like.server.answers import ChatShape, CompletionShape, Job, Piece, Shape
from redco_like.server.errors import ApiError
from redco_like.server.metrics import CONTENT_TYPE, Metrics
from redco_like.server.requests import Asked, Limits, read_chat, read_completion
from redco_like.server.service import Service
from redco_like.server.worker import EngineLike
from redco_like.text import Text

logger = logging.getLogger(__name__)
CLIENT_LEFT = 499
"""What nginx calls a request whose client did not wait; nobody reads it."""


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
        self._counted = False

    def _count(self, metrics: Metrics, outcome: str) -> None:
        """Note the end, once, before the client knows of it."""
        if not self._counted:
            self._counted = True
            self._outcome(outcome)
            _close(metrics, self._job)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        metrics = scope["app"].state.service.metrics

        async def write() -> bool:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
            self._count(metrics, "ok")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True

        try:
            await _unless_gone(write(), receive)
        except ApiError as error:  # the client has been told in the stream
            self._count(metrics, error.outcome)
            with contextlib.suppress(OSError):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass
        finally:
            await self._lines.aclose()  # type: ignore[attr-defined]
            self._count(metrics, "cancelled")


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
