"""What a client asks for: read, checked, and refused where it cannot be had. Nothing is ignored in silence.

    asked = read_completion(body, limits)            # /v1/completions
    asked = read_chat(body, limits)                  # /v1/chat/completions

Fields are those of OpenAI's API, and top_k, min_p, repetition_penalty, ignore_eos and chat_template_kwargs besides.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from redco_like.server.errors import ApiError, bad

COMPLETION_TOKENS = 16
"""Of a completion that does not say, as OpenAI has it; a chat may fill its context."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may hold.

    Attributes:
        body_bytes: of the request.
        prompt_tokens: of one prompt; 0 for what the engine's length leaves.
        max_tokens: of one answer; 0 for what the engine's length leaves.
        n: answers to one prompt; sequences: of one request, over all its prompts.
        stops: stop strings; stop_chars: of each.
        waiting: sequences that may wait for a row, over all requests.
        messages: of a chat.
    """

    body_bytes: int = 4 * 2**20
    prompt_tokens: int = 0
    max_tokens: int = 0
    n: int = 16
    sequences: int = 64
    stops: int = 4
    stop_chars: int = 256
    waiting: int = 256
    messages: int = 1024

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), int(field.name not in ("prompt_tokens", "max_tokens", "waiting"))
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{field.name}={value!r}; a whole number from {low} up")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that was understood.

    Attributes:
        prompts: text or tokens, of /v1/completions.
        messages: of /v1/chat/completions; template_options: for its template.
        model: the name that was asked for; "" for any.
        sampling: fields of `SamplingParams` besides max_tokens, seed and n.
        seed: of the first sequence; the next ones have the next numbers.
        max_tokens: None where the request does not say.
        include_usage: whether a stream ends with its usage.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Mapping[str, Any], ...]
    model: str
    sampling: Mapping[str, Any]
    seed: int
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool
    template_options: Mapping[str, Any]

    @property
    def logprobs(self) -> bool:
        return bool(self.sampling["logprobs"])


SHARED = frozenset(
    "model max_tokens temperature top_p top_k min_p repetition_penalty n stop stream stream_options seed logprobs "
    "frequency_penalty presence_penalty logit_bias ignore_eos user metadata store".split()
)
COMPLETION = SHARED | {"prompt", "echo", "best_of", "suffix"}
CHAT = SHARED | frozenset(
    "messages max_completion_tokens top_logprobs response_format tools tool_choice functions function_call "
    "parallel_tool_calls chat_template_kwargs modalities audio service_tier reasoning_effort".split()
)
IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "echo": ((None, False), "the prompt is not repeated in the answer; put it before the answer yourself"),
    "suffix": ((None, ""), "text is written after a prompt, not between two"),
    "frequency_penalty": ((None, 0), "tokens are not penalised by their count; use repetition_penalty"),
    "presence_penalty": ((None, 0), "tokens are not penalised by an amount; use repetition_penalty"),
    "logit_bias": ((None, {}), "logits are not biased"),
    "tools": ((None, []), "calls of tools are not read from answers"),
    "tool_choice": ((None, "none", "auto"), "calls of tools are not read from answers"),
    "functions": ((None, []), "calls of functions are not read from answers"),
    "function_call": ((None, "none", "auto"), "calls of functions are not read from answers"),
    "response_format": ((None, {"type": "text"}), "answers are not held to a format"),
    "top_logprobs": ((None, 0), "only the chosen tokens' log-probabilities are given, not those of others"),
    "modalities": ((None, ["text"]), "answers are text"),
    "audio": ((None,), "answers are text"),
    "reasoning_effort": ((None,), "there is no such setting; see chat_template_kwargs"),
}
"""Field -> values that ask for nothing, and why others are refused."""


def read_completion(body: Any, limits: Limits) -> Asked:
    """Read a request of /v1/completions.

    Raises:
        ApiError: names the field, what it holds, and what it may hold.
    """
    fields = _Fields(body, COMPLETION)
    n = fields.whole("n", 1, 1, limits.n)
    best_of = fields.whole("best_of", n, 1, limits.n)
    if best_of != n:
        raise bad("best_of", f"best_of={best_of} is not n={n}: answers are not ranked; leave it out")
    prompts = _prompts(fields.get("prompt"), limits)
    if len(prompts) * n > limits.sequences:
        raise bad(
            "prompt",
            f"{len(prompts)} prompts with {n} answers each are more than {limits.sequences}; send several requests",
        )
    logprobs = fields.get("logprobs")
    if logprobs is not None and (isinstance(logprobs, bool) or logprobs != 0):
        raise bad("logprobs", f"logprobs={logprobs!r}: {IMPOSSIBLE['top_logprobs'][1]}; logprobs=0 gives these")
    max_tokens = fields.whole("max_tokens", None, 1, limits.max_tokens or 2**31 - 1)
    return _asked(fields, limits, n, max_tokens, prompts=prompts, logprobs=logprobs is not None)


def read_chat(body: Any, limits: Limits) -> Asked:
    """Read a request of /v1/chat/completions.

    Raises:
        ApiError: names the field, what it holds, and what it may hold.
    """
    fields = _Fields(body, CHAT)
    most = limits.max_tokens or 2**31 - 1
    both = [fields.whole(name, None, 1, most) for name in ("max_completion_tokens", "max_tokens")]
    if None not in both and both[0] != both[1]:
        raise bad("max_tokens", f"max_tokens={both[1]} and max_completion_tokens={both[0]}: give one of them")
    options = fields.get("chat_template_kwargs") or {}
    if not isinstance(options, dict) or not all(key.isidentifier() for key in options):
        raise bad("chat_template_kwargs", "chat_template_kwargs is an object whose keys are names")
    if taken := sorted({"messages", "tools", "add_generation_prompt"} & set(options)):
        raise bad("chat_template_kwargs", f"chat_template_kwargs cannot set {taken[0]}")
    n = fields.whole("n", 1, 1, min(limits.n, limits.sequences))
    max_tokens = both[0] or both[1]
    logprobs = fields.flag("logprobs")
    messages = _messages(fields.get("messages"), limits)
    return _asked(fields, limits, n, max_tokens, messages=messages, logprobs=logprobs, options=options)


def _asked(
    fields: _Fields,
    limits: Limits,
    n: int,
    max_tokens: int | None,
    *,
    logprobs: bool,
    prompts: tuple[str | tuple[int, ...], ...] = (),
    messages: tuple[Mapping[str, Any], ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Asked:
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise bad("model", f"model={model!r}; the name of a model")
    stream, stream_options = fields.flag("stream"), fields.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise bad("stream_options", 'stream_options is an object: {"include_usage": true}')
    if stream_options and not stream:
        raise bad("stream_options", "stream_options is for stream=true alone")
    usage = _Fields(stream_options, frozenset({"include_usage", "include_obfuscation"})).flag("include_usage")
    seed = fields.whole("seed", None, -(2**63), 2**64)
    return Asked(
        prompts=prompts,
        messages=messages,
        model=model or "",
        sampling={
            "temperature": fields.number("temperature", 1.0, lambda x: 0 <= x <= 2, "from 0 (greedy) to 2"),
            "top_p": fields.number("top_p", 1.0, lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "min_p": fields.number("min_p", 0.0, lambda x: 0 <= x <= 1, "from 0 to 1"),
            "top_k": _top_k(fields),
            "repetition_penalty": fields.number("repetition_penalty", 1.0, lambda x: 0 < x <= 10, "above 0, up to 10"),
            "logprobs": logprobs,
        },
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        max_tokens=max_tokens,
        n=n,
        stop=_stops(fields.get("stop"), limits),
        stream=stream,
        include_usage=usage,
        ignore_eos=fields.flag("ignore_eos"),
        template_options=options or {},
    )


class _Fields:
    """A JSON object, its unknown and impossible fields refused."""

    def __init__(self, body: Any, known: frozenset[str]):
        if not isinstance(body, dict):
            raise ApiError(400, "the body is not a JSON object", code="invalid_json")
        self._body = body
        for name, value in body.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f", did you mean {near[0]}?" if near else ""
                raise bad(name, f"unknown field {name!r}{hint}", "unknown_parameter")
            if name in IMPOSSIBLE and value not in IMPOSSIBLE[name][0]:
                raise bad(name, f"{name} is not supported: {IMPOSSIBLE[name][1]}", "unsupported_parameter")

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def whole(self, name: str, default: Any, low: int, high: int) -> Any:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad(name, f"{name}={_short(value)}; a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, good: Callable[[float], bool], what: str) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not good(value):
            raise bad(name, f"{name}={_short(value)}; a number {what}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise bad(name, f"{name}={_short(value)}; true or false")
        return bool(value)


def _top_k(fields: _Fields) -> int:
    return max(fields.whole("top_k", 0, -1, 2**31 - 1), 0)  # -1 is for all, too


def _prompts(prompt: Any, limits: Limits) -> tuple[str | tuple[int, ...], ...]:
    if prompt is None:
        raise bad("prompt", "there is no prompt")
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    prompts = [prompt] if one else prompt
    if not isinstance(prompts, list) or not prompts:
        raise bad("prompt", "prompt is text, a list of tokens, or a list of these")
    out: list[str | tuple[int, ...]] = []
    for i, each in enumerate(prompts):
        name = "prompt" if one else f"prompt[{i}]"
        if isinstance(each, str):
            out.append(each)
        elif isinstance(each, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in each):
            out.append(tuple(each))
        else:
            raise bad("prompt", f"{name} is neither text nor a list of tokens")
        if not out[-1]:
            raise bad("prompt", f"{name} is empty: there is nothing to continue")
    return tuple(out)


def _messages(messages: Any, limits: Limits) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise bad("messages", 'messages is a list such as [{"role": "user", "content": "Hello"}]')
    if len(messages) > limits.messages:
        raise bad("messages", f"{len(messages)} messages; at most {limits.messages}")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad("messages", f"messages[{i}] is no object with a role")
        out.append({**message, "content": _content(message.get("content"), i)})
    return tuple(out)


def _content(content: Any, i: int) -> str:
    """A message's text, which may be in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise bad("messages", f"messages[{i}].content is text, or a list of parts of type text")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise bad("messages", f"messages[{i}].content has a part of type {kind!r}; this model reads text alone")
        texts.append(part["text"])
    return "".join(texts)


def _stops(stop: Any, limits: Limits) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise bad("stop", "stop is text, or a list of texts")
    if len(stops) > limits.stops:
        raise bad("stop", f"{len(stops)} stop strings; at most {limits.stops}")
    for s in stops:
        if not 1 <= len(s) <= limits.stop_chars:
            raise bad("stop", f"a stop string of {len(s)} characters; from 1 to {limits.stop_chars}")
    return tuple(stops)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
