"""From tokens to answers: the sequences of one request as text, and as the records that OpenAI's clients read.

job = Job(asked, prompts, worker=worker, text=text, shape=Completion("cmpl-1", "llama"))
async for piece in job.pieces(): ...             # text as it comes, by index
record = await job.whole()                       # or all of it
job.close()                                      # gives up what still runs
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from redco_like.server.errors import ApiError
from redco_like.server.requests import Asked
from redco_like.server.worker import EngineWorker, Mailbox
from redco_like.text import Text


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one sequence has got: text, its tokens if they are wanted with log-probabilities, and its end."""

    index: int
    text: str
    tokens: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


class Job:
    """The sequences of one request. Used in the event loop.

    Args:
        prompts: tokens; sequence `i * n + j` continues prompt i.
        params: makes the engine's parameters of a seed and the number of tokens at most.

    Raises:
        ValueError: the engine refuses a prompt.
    """

    def __init__(
        self,
        asked: Asked,
        prompts: Sequence[Sequence[int]],
        *,
        worker: EngineWorker,
        text: Text,
        params: Callable[[int, int], Any],
        max_tokens: Sequence[int],
    ):
        self.asked, self._worker, self._text = asked, worker, text
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.output_tokens = 0
        count = len(prompts) * asked.n
        self._box = Mailbox(count)
        self._streams = [text.stream(stop=asked.stop) for _ in range(count)]
        self._ended = [False] * count
        self._requests: list[int] = []
        try:
            for index in range(count):
                tokens = prompts[index // asked.n]
                made = params(index, max_tokens[index // asked.n])
                self._requests.append(worker.submit(tokens, made, self._box, index))
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> bool:
        return all(self._ended)

    def close(self) -> None:
        """Give up every sequence that still runs."""
        self._worker.cancel(self._requests)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What has come since the last time, for every sequence that has got something, until all have ended.

        Raises:
            ApiError: the engine failed.
        """
        async for parts in self._box:
            found = []
            for part in parts:
                if self._ended[part.index]:
                    continue
                if part.finish == "error":
                    raise ApiError(500, part.error, code="engine_failed", outcome="failed")
                if part.finish == "cancelled":
                    message = part.error or "the engine gave the request up"
                    raise ApiError(503, message, code="given_up", outcome="cancelled")
                found.append(self._piece(part))
            if found:
                yield found
            if self.done:
                return

    def _piece(self, part: Any) -> Piece:
        stream = self._streams[part.index]
        self.output_tokens += len(part.tokens)
        tokens = part.tokens
        if part.finish == "stop" and tokens and tokens[-1] in self._ends:
            tokens = tokens[:-1]  # it may be text to a tokenizer that does not know what it means
        text, finish = stream.add(tokens), part.finish
        if finish is not None and not stream.stopped:
            text += stream.end()
        if stream.stopped and finish != "stop":
            finish = "stop"
            self._worker.cancel([self._requests[part.index]])
        self._ended[part.index] = finish is not None
        wanted = tuple(zip(part.tokens, part.logprobs, strict=False)) if self.asked.logprobs else ()
        return Piece(part.index, text, wanted, finish)

    @property
    def _ends(self) -> tuple[int, ...]:
        return () if self.asked.ignore_eos else tuple(self._worker.engine.eos)

    def usage(self) -> dict[str, int]:
        """Tokens read and written so far."""
        total = self.prompt_tokens + self.output_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.output_tokens, "total_tokens": total}


class Shape:
    """The records of one endpoint.

    Args:
        id: of the answer.
        model: the name that is shown.
        text: for the text of single tokens.
    """

    whole_object: str
    part_object: str

    def __init__(self, id: str, model: str, text: Text):
        self._text = text
        self._id, self._model, self._created = id, model, int(time.time())

    def _record(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }

    def whole(self, pieces: dict[int, list[Piece]], usage: dict[str, int], logprobs: bool) -> dict[str, Any]:
        """The answer in one record."""
        choices = [self._choice(pieces[index], logprobs) for index in sorted(pieces)]
        return self._record(self.whole_object, choices, usage=usage)

    def part(self, piece: Piece, *, first: bool, logprobs: bool, with_usage: bool) -> dict[str, Any]:
        """A part of a stream; `usage` is null in those before the last, where it was asked for."""
        more = {"usage": None} if with_usage else {}
        return self._record(self.part_object, [self._part(piece, first, logprobs)], **more)

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The end of a stream whose usage was asked for."""
        return self._record(self.part_object, [], usage=usage)

    def _choice(self, pieces: list[Piece], logprobs: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, piece: Piece, first: bool, logprobs: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _name(self, token: int) -> str:
        return self._text.decode([token], special=True)


class CompletionShape(Shape):
    """Of /v1/completions."""

    whole_object = part_object = "text_completion"

    def __init__(self, id: str, model: str, text: Text):
        super().__init__(id, model, text)
        self._offsets: dict[int, int] = {}

    def _choice(self, pieces: list[Piece], logprobs: bool) -> dict[str, Any]:
        joined = joined_piece(pieces)
        return self._part(joined, True, logprobs)

    def _part(self, piece: Piece, first: bool, logprobs: bool) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece) if logprobs else None,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        names, offsets, at = [], [], self._offsets.get(piece.index, 0)
        for token, _ in piece.tokens:
            names.append(self._name(token))
            offsets.append(at)
            at += len(names[-1])
        self._offsets[piece.index] = at
        values = [logprob for _, logprob in piece.tokens]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    whole_object, part_object = "chat.completion", "chat.completion.chunk"

    def _choice(self, pieces: list[Piece], logprobs: bool) -> dict[str, Any]:
        piece = joined_piece(pieces)
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece) if logprobs else None,
            "finish_reason": piece.finish,
        }

    def _part(self, piece: Piece, first: bool, logprobs: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if piece.text or first:
            delta["content"] = piece.text
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece) if logprobs and piece.tokens else None,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        content = []
        for token, logprob in piece.tokens:
            name = self._name(token)
            entry = {"token": name, "logprob": logprob, "bytes": list(name.encode("utf-8", "replace"))}
            content.append(entry | {"top_logprobs": []})
        return {"content": content, "refusal": None}


def joined_piece(pieces: Sequence[Piece]) -> Piece:
    """All of a sequence in one piece."""
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece(pieces[0].index, "".join(piece.text for piece in pieces), tokens, pieces[-1].finish)
