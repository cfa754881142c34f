"""An engine without a model: letters that depend on the prompt, the seed and the position alone.

It keeps the interface of `redco_like.Engine`: rows, a queue, events, cancellation, and failures on request.
"""

import collections
import dataclasses
import hashlib
import threading
import time

END = 0
"""The token that ends an answer; a prompt with it in front never draws it."""


BROKEN = 255
"""A prompt that begins with it fails, alone."""


@dataclasses.dataclass(frozen=True)
class FakeEvent:
    request: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    finish: str | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class FakeStats:
    waiting: int
    running: int
    rows: int
    generated_tokens: int
    cancelled: int
    shared_tokens: int = 0


@dataclasses.dataclass
class _Row:
    request: int
    prompt: tuple[int, ...]
    params: object
    written: list[int] = dataclasses.field(default_factory=list)


def letter(prompt, seed, position, end_share=0.0):
    """The token at a position."""
    digest = hashlib.blake2b(repr((tuple(prompt), seed, position)).encode(), digest_size=8).digest()
    if digest[0] < 256 * end_share:
        return END
    return ord("a") + int.from_bytes(digest[1:], "big") % 26


def expected(prompt, seed, count, end_share=0.0):
    """The whole answer, without the end token."""
    out = []
    for position in range(count):
        token = letter(prompt, seed, position, end_share)
        if token == END:
            break
        out.append(token)
    return bytes(out).decode()


class FakeEngine:
    """See the module.

    Args:
        delay: seconds per step; may be changed while it runs.
        per_step: tokens per row and step.
        end_share: how likely an answer ends at a token.
        scripted: tokens to write instead, whatever the prompt.
    """

    def __init__(self, *, rows=4, length=256, delay=0.0, per_step=1, end_share=0.0, scripted=None, eos=(END,)):
        self.rows, self.length, self.eos = rows, length, eos
        self.delay, self.per_step, self.end_share, self.scripted = delay, per_step, end_share, scripted
        self.fails_at = None
        self.steps = self.generated = self.cancelled_count = 0
        self.most_running = 0
        self._lock = threading.Lock()
        self._next = 0
        self._waiting = collections.deque()
        self._running = {}
        self._cancelled = set()

    def submit(self, prompt, params):
        tokens = tuple(prompt)
        if any(not 0 <= t < 256 for t in tokens):
            raise ValueError(f"the prompt has token {max(tokens)}; the model has tokens 0 to 255")
        if len(tokens) + params.max_tokens > self.length:
            raise ValueError("more than fit")
        with self._lock:
            self._next += 1
            self._waiting.append(_Row(self._next, tokens, params))
            return self._next

    def cancel(self, request):
        with self._lock:
            self._cancelled.add(request)

    @property
    def idle(self):
        with self._lock:
            return not self._waiting and not self._running

    def stats(self):
        with self._lock:
            return FakeStats(len(self._waiting), len(self._running), self.rows, self.generated, self.cancelled_count)

    def step(self):
        time.sleep(self.delay)
        self.steps += 1
        if self.fails_at is not None and self.steps >= self.fails_at:
            raise RuntimeError("out of memory on the device")
        events = []
        with self._lock:
            gone, self._cancelled = self._cancelled, set()
            for row in [r for r in [*self._running.values(), *self._waiting] if r.request in gone]:
                self._running.pop(row.request, None)
                if row in self._waiting:
                    self._waiting.remove(row)
                self.cancelled_count += 1
                events.append(FakeEvent(row.request, 0, (), None, "cancelled"))
            while self._waiting and len(self._running) < self.rows:
                row = self._waiting.popleft()
                self._running[row.request] = row
            self.most_running = max(self.most_running, len(self._running))
            for row in list(self._running.values()):
                events.append(self._write(row))
        return events

    def _write(self, row):
        if row.prompt[0] == BROKEN:
            del self._running[row.request]
            return FakeEvent(row.request, 0, (), None, "error", "the logits are not finite numbers")
        new, finish = [], None
        for _ in range(self.per_step):
            position = len(row.written)
            if self.scripted is not None:
                token = self.scripted[position] if position < len(self.scripted) else END
            else:
                token = letter(row.prompt, row.params.seed, position, self.end_share)
            row.written.append(token)
            new.append(token)
            ends = self.eos if row.params.eos is None else row.params.eos
            finish = "stop" if token in ends else "length" if len(row.written) >= row.params.max_tokens else None
            if finish:
                del self._running[row.request]
                break
        self.generated += len(new)
        logprobs = tuple(-0.25 for _ in new) if row.params.logprobs else None
        return FakeEvent(row.request, 0, tuple(new), logprobs, finish)
