"""`redco-like serve`: a model's folder behind an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from redco_like.cli import units
from redco_like.cli.options import Dtype, Flag, optional
from redco_like.cli.terminal import Terminal, UsageError, bad_input

if TYPE_CHECKING:
    import socket

    from redco_like.engine import Engine
    from redco_like.text import Text

KEY_VARIABLE = "REDCO_LIKE_API_KEY"
LENGTH, ROWS, CHUNK_TOKENS = 2048, 16, 256
NEEDED = {"fastapi": "serve", "uvicorn": "serve", "tokenizers": "hf", "jinja2": "hf", "safetensors": "hf"}
"""Modules that a server needs, and the extra that each comes with."""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where it listens, and to whom."""

    host: str = "127.0.0.1"
    """Others than this machine's own need an API key."""
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 8000
    """0 takes a free one."""
    api_key: Annotated[str | None, optional("KEY", f"the variable {KEY_VARIABLE}; else none is asked for")] = None
    """That clients have to send; better given by the variable, which no list of processes shows."""
    allow_no_key: Flag = False
    """Answer other machines without a key."""
    grace: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 30.0
    """For answers that run when it is told to stop."""

    def key(self) -> str | None:
        return self.api_key or os.environ.get(KEY_VARIABLE) or None

    def check(self) -> None:
        """Raise a UsageError for an address that is not to be served."""
        from redco_like.server.process import is_loopback

        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}; a number from 0 to 65535")
        if not self.grace >= 0:
            raise UsageError(f"--grace {self.grace}; seconds, at least 0")
        if not is_loopback(self.host) and self.key() is None and not self.allow_no_key:
            raise UsageError(
                f"--host {self.host} can be reached by other machines, and no API key is set: set {KEY_VARIABLE}, or "
                "say --allow-no-key; --host 127.0.0.1 is for this machine alone"
            )

    def bind(self) -> socket.socket:
        """The socket, taken before anything is loaded."""
        from redco_like.server.process import bind

        try:
            return bind(self.host, self.port)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {self.host}:{self.port}: {error.strerror or error}; --port 0 takes a free one"
            ) from error


@dataclasses.dataclass(frozen=True)
class Room:
    """What it holds, and how it runs."""

    plan: Annotated[str, tyro.conf.arg(metavar="PLAN")] = "auto"
    """auto, a preset such as megatron, or a file: of a plan, or what `plan --task serve --out` has written."""
    mesh: Annotated[str | None, optional("SIZES", "as the plan has it")] = None
    """Devices per axis: data=2,tensor=4."""
    rows: Annotated[int | None, optional("N", f"{ROWS}, or the plan's")] = None
    """Sequences that run at a time."""
    length: Annotated[int | None, optional("N", f"the model's, at most {LENGTH}, or the plan's")] = None
    """Tokens of a sequence, prompt and answer together."""
    chunk_tokens: Annotated[int | None, optional("N", f"{CHUNK_TOKENS}, or the plan's")] = None
    """Tokens of prompts that are read between two steps of decoding."""
    steps_per_dispatch: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Tokens per row that are decoded before the host looks at them."""
    dtype: Annotated[Dtype | None, optional("DTYPE", "the checkpoint's")] = None
    """Of parameters and computation."""


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What requests may hold; more is refused."""

    max_waiting: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Sequences that wait for a row; more get the status 429."""
    max_prompt_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of one prompt. (0: what the length leaves)"""
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Of one answer. (0: what the length leaves)"""
    max_n: Annotated[int, tyro.conf.arg(metavar="N")] = 16
    """Answers to one prompt."""


@dataclasses.dataclass(frozen=True)
class Serve:
    """Answer OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    Example: redco-like serve --model path/to/Llama-3.1-8B
    """

    model: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """A Hugging Face folder: config.json, model.safetensors, tokenizer.json."""
    address: Address
    room: Room
    allowed: Allowed
    name: Annotated[str | None, optional("NAME", "the folder's")] = None
    """What clients call the model."""
    tokenizer: Annotated[str | None, optional("FOLDER|bytes", "the model's folder")] = None
    """Where the tokenizer is; bytes for a model that reads bytes."""
    random_weights: Annotated[int | None, optional("SEED")] = None
    """Make random weights, to try a configuration without a checkpoint: what it answers means nothing."""

    on_host = False

    def run(self, terminal: Terminal) -> int:
        check_extras()
        self.address.check()
        folder = self._folder()
        from redco_like.server import Limits, create_app, run

        with bad_input():
            text = self._text(folder)
            limits = Limits(
                waiting=self.allowed.max_waiting,
                prompt_tokens=self.allowed.max_prompt_tokens,
                max_tokens=self.allowed.max_tokens,
                n=self.allowed.max_n,
            )
            settings = room_of(self.room)
        sock = self.address.bind()
        with sock:
            with leaving_compilers(), terminal.progress(f"reading {self.model}") as tell, enough_memory(settings):
                engine = self._engine(text, settings, tell)
                start, programs = time.perf_counter(), len(engine.programs.names)
                done = 0

                def told(last: str) -> None:
                    nonlocal done
                    done += 1
                    tell(f"warming up: {done} of {programs} programs compiled, the last: {last}")

                tell(f"warming up: 0 of {programs} programs compiled")
                engine.warm_up(told)
                took = time.perf_counter() - start
            name = self.name or folder.resolve().name
            app = create_app(engine, text, name=name, limits=limits, api_key=self.address.key())
            host, port = sock.getsockname()[:2]
            told_once = self._told(terminal, engine, text, name, f"http://{_in_url(host)}:{port}", took)
            run(app, sock=sock, grace_seconds=self.address.grace, started=told_once)
        terminal.line("stopped")
        return 0

    def _folder(self) -> pathlib.Path:
        folder = pathlib.Path(self.model).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise UsageError(f"{folder} has no config.json; --model is a Hugging Face folder")
            return folder
        from redco_like.models import architectures

        if self.random_weights is not None and self.model in architectures():
            if self.tokenizer is None:
                raise UsageError(f"{self.model} is a name without a folder; give --tokenizer FOLDER, or bytes")
            return pathlib.Path(self.model)
        raise UsageError(f"there is no folder {folder}; --model is a Hugging Face folder with weights and a tokenizer")

    def _text(self, folder: pathlib.Path) -> Text:
        from redco_like.text import Text

        if self.tokenizer == "bytes":
            return Text.of_bytes()
        return Text.from_folder(folder if self.tokenizer is None else self.tokenizer)

    def _engine(self, text: Text, settings: Settings, tell: Callable[[str], None]) -> Engine:
        from redco_like import Engine, PlanError
        from redco_like.models import load

        def progress(read: int, total: int) -> None:
            tell(f"loading {self.model}: {read / 2**30:.1f} of {total / 2**30:.1f} GiB")

        with bad_input():
            try:
                loaded = load(
                    self.model,
                    plan=settings.plan,
                    mesh=self.room.mesh,
                    dtype=self.room.dtype,
                    random_seed=self.random_weights,
                    progress=progress,
                )
                longest = loaded.config.max_length
                if settings.length is not None and settings.length > longest:
                    raise UsageError(
                        f"--length {settings.length}: the model reads up to {longest} tokens; nearest: {longest}"
                    )
                tell("placing the cache")
                return Engine(
                    loaded.model,
                    loaded.params,
                    plan=loaded.plan or settings.plan,
                    mesh=self.room.mesh,
                    rows=settings.rows,
                    length=settings.length or min(longest, LENGTH),
                    chunk_tokens=settings.chunk_tokens,
                    steps_per_dispatch=self.room.steps_per_dispatch,
                    eos=text.eos,
                )
            except PlanError as error:
                raise UsageError(str(error)) from error

    def _told(
        self, terminal: Terminal, engine: Engine, text: Text, name: str, address: str, warm_seconds: float
    ) -> Callable[[], None]:
        """What is printed when it answers."""

        def told() -> None:
            key = ' -H "Authorization: Bearer $' + KEY_VARIABLE + '"' if self.address.key() else ""
            path, body = "/v1/completions", {"prompt": "Once upon a time", "max_tokens": 64}
            if text.template is not None:
                path, body = (
                    "/v1/chat/completions",
                    {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
                )
            said = shlex.quote(json.dumps(body))
            terminal.line(f"serving {name} at {address}")
            for line in _about(engine, text, warm_seconds):
                terminal.line(line)
            terminal.line(f"try: curl {address}{path}{key} -H 'Content-Type: application/json' -d {said}")
            terminal.line("Ctrl-C lets answers end; twice stops at once")
            terminal.out.file.flush()

        return told


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the engine is made."""

    plan: Any
    rows: int
    length: int | None
    chunk_tokens: int


def room_of(room: Room) -> Settings:
    """Read the plan's file, if it is one; one of `plan --task serve` also says how many rows there are, how long, and
    how much of a prompt is read at a time.

    Raises:
        UsageError: a file that is neither.
    """
    for name in ("rows", "length", "chunk_tokens", "steps_per_dispatch"):
        value = getattr(room, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}; a whole number from 1 up")
    plain = Settings(room.plan, room.rows or ROWS, room.length, room.chunk_tokens or CHUNK_TOKENS)
    if not room.plan.endswith(".json"):
        return plain
    from search import Plan

    path = pathlib.Path(room.plan).expanduser()
    with bad_input():
        try:
            record = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UsageError(f"--plan {path}: there is no such file") from None
        except json.JSONDecodeError as error:
            raise UsageError(f"--plan {path} is not JSON: {error}") from None
        if not isinstance(record, dict) or "plans" not in record:
            return dataclasses.replace(plain, plan=Plan.load(path))
        if not record["plans"].get("decode"):
            raise UsageError(f"--plan {path}: nothing fits, so it says no plan")
        plan = Plan.from_json(json.dumps(record["plans"]["decode"]))
        sized = record["asked"] or record["most_within_limits"] or record["most_that_fit"]
    length, chunk = room.length or record["problem"]["context_tokens"], room.chunk_tokens or sized["chunk_tokens"]
    return Settings(plan, room.rows or sized["rows"], length, chunk)


@contextlib.contextmanager
def leaving_compilers() -> Iterator[None]:
    """End the process at Ctrl-C where it stands: threads that compile do not survive the interpreter's own end."""
    try:
        yield
    except KeyboardInterrupt:
        print("redco-like serve: interrupted", file=sys.stderr, flush=True)
        os._exit(130)


@contextlib.contextmanager
def enough_memory(settings: Settings) -> Iterator[None]:
    """Say what a device that is out of memory means.

    Raises:
        UsageError: instead of JAX's error.
    """
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        long = f" of {settings.length:,} tokens" if settings.length else ""
        raise UsageError(
            f"the devices have no room for the model and {settings.rows:,} rows{long}: "
            f"{str(error).partition(chr(10))[0]}; give fewer --rows or a shorter --length; "
            "redco-like plan --task serve says what fits"
        ) from error


def check_extras() -> None:
    """Find out before anything is loaded what is not installed.

    Raises:
        UsageError: names it, and how to install it.
    """
    for module, extra in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"{module} is not installed: pip install 'redco-like[serve]'"
                + (f" (or [{extra}])" if extra != "serve" else "")
            )


def _about(engine: Engine, text: Text, warm_seconds: float) -> list[str]:
    """What runs, in a line; and another one where the tokenizer is not the model's."""
    stats, mesh, vocab = engine.stats(), engine.programs.plans.decode.mesh, engine.model.config.vocab
    devices = "one device" if mesh.size == 1 else f"{mesh.size} devices ({mesh})"
    lines = [
        f"{stats.rows} rows of up to {engine.length:,} tokens on {devices}: {units.size(stats.params_bytes)} of "
        f"parameters and {units.size(stats.cache_bytes)} of cache on each; {stats.programs} programs compiled in "
        f"{units.seconds(warm_seconds)}"
    ]
    if text.size > vocab:
        lines.append(
            f"the tokenizer knows {text.size:,} tokens and the model {vocab:,}: prompts with the others are refused"
        )
    return lines


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
