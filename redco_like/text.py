"""Text in and out of a model: its tokenizer, its chat template, where answers end, and tokens as they come as text.

    text = Text.from_folder("path/to/model")          # tokenizer.json, tokenizer_config.json, generation_config.json
    tokens = text.encode("Once upon a time")
    tokens = text.encode_chat([{"role": "user", "content": "Hello"}])
    stream = text.stream(stop=["\\n\\n"])
    for tokens in ...:
        print(stream.add(tokens), end="")             # whole characters alone; what may begin a stop string waits
        if stream.stopped: break
    print(stream.end())

A folder without a tokenizer is an error; `Text.of_bytes()` reads and writes bytes, for models trained on them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from redco_like.chat_template import ChatTemplate, check_messages

BROKEN = "\ufffd"
"""What stands for bytes that are no text, and for those that are not complete yet."""
WINDOW = 32
"""Tokens that are decoded together while a stream goes on; more are cut off at the front."""
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer(Protocol):
    """What text needs of a tokenizer."""

    def encode(self, text: str, *, special: bool) -> list[int]: ...
    def decode(self, tokens: Sequence[int], *, special: bool) -> str: ...
    def is_open(self, tokens: Sequence[int], *, special: bool) -> bool:
        """Whether their text may change with the next token, though it ends with a character."""
        ...

    def id_of(self, token: str) -> int | None: ...

    size: int


class Text:
    """A model's words.

    Attributes:
        eos: tokens that end an answer.
        template: the chat template; None where the folder has none.
        size: tokens that the tokenizer knows; a model may have more rows.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos: Sequence[int] = (), template: ChatTemplate | None = None):
        self._tokenizer = tokenizer
        self.eos, self.template, self.size = tuple(eos), template, tokenizer.size

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Text:
        """Read a Hugging Face folder.

        The tokens that end an answer are those of generation_config.json, else of config.json, else the tokenizer's.

        Raises:
            ImportError: `tokenizers` is not installed.
            ValueError: no folder, no tokenizer.json, files that cannot be read.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json; add the one that the model was trained with, or say that it reads "
                "bytes: Text.of_bytes() (redco-like serve --tokenizer bytes)"
            )
        tokenizer = _Trained(file)
        record = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
        tokens = {name: _content(record[name]) for name in TOKEN_NAMES if record.get(name) is not None}
        return cls(tokenizer, eos=_eos(folder, tokens, tokenizer), template=_template(folder, record, tokens))

    @classmethod
    def of_bytes(cls, *, eos: Sequence[int] = ()) -> Text:
        """Text as its UTF-8 bytes, a token each, for a model with at least 256 tokens that was trained on them.

        >>> text = Text.of_bytes()
        >>> text.encode("né"), text.decode([110, 195, 169])
        ([110, 195, 169], 'né')
        """
        return cls(_Bytes(), eos=eos)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around one if `special`."""
        return self._tokenizer.encode(text, special=special)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens, without those that are no text unless `special`."""
        return self._tokenizer.decode(tokens, special=special)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Messages as the model reads them; see `ChatTemplate.render`.

        Raises:
            ValueError: the folder has no chat template, or the template refuses the messages.
        """
        check_messages(messages)
        if self.template is None:
            raise ValueError(
                "the model's folder has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): complete a prompt instead"
            )
        return self.template.render(messages, **options)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Tokens of messages; the template has written the special ones itself."""
        return self.encode(self.chat(messages, **options), special=False)

    def stream(self, *, stop: Sequence[str] = (), special: bool = False) -> Stream:
        """A decoder of tokens as they come."""
        return Stream(self._tokenizer, stop=stop, special=special)


class Stream:
    """Tokens to text, piece by piece; all pieces together are the text of all tokens, up to a stop string.

    A piece ends with a whole character. What could be the beginning of a stop string is kept back until it is known
    not to be one; of several, the one that is complete first counts. One stream is for one answer and one thread.

    Attributes:
        stopped: whether a stop string was found; it and what follows are left out.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), special: bool = False):
        if "" in stop:
            raise ValueError("an empty stop string stops at once; leave it out")
        self._tokenizer, self._stop, self._special = tokenizer, tuple(stop), special
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that have been passed on
        self._held = ""
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; return what is certain by now."""
        if self.stopped or not tokens:
            return ""
        self._window += tokens
        if self._tokenizer.is_open(self._window, special=self._special):
            return ""
        text = self._tokenizer.decode(self._window, special=self._special)
        whole = len(text) - text.endswith(BROKEN)
        fresh, self._sent = text[self._sent : whole], max(whole, self._sent)
        if whole == len(text) and len(self._window) > WINDOW:
            rest = self._tokenizer.decode(tokens, special=self._special)
            if rest:  # else the next token would be the window's first, which loses its space in some tokenizers
                self._window, self._sent = list(tokens), len(rest)
        return self._release(fresh)

    def end(self) -> str:
        """Return what was kept back: no more tokens come."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._window, special=self._special)
        piece = self._release(text[self._sent :])
        self._window, self._sent = [], 0
        held, self._held = ("", "") if self.stopped else (self._held, "")
        return piece + held

    def _release(self, fresh: str) -> str:
        """What of the text so far is before a stop string and can be the beginning of none."""
        if not self._stop:
            return fresh
        text = self._held + fresh
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters are the first of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class _Trained:
    """The tokenizer of a tokenizer.json."""

    def __init__(self, file: Path):
        try:
            from tokenizers import Tokenizer as Trained
        except ImportError as error:
            raise ImportError(f"reading {file.name} needs tokenizers: pip install 'redco-like[hf]'") from error
        try:
            self._tokenizer: Any = Trained.from_file(str(file))
        except Exception as error:
            raise ValueError(f"{file} is no tokenizer: {error}") from error
        # A file may say how to cut or fill; what a request may hold is not the tokenizer's to say.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self._bytes = {token for name in names if (token := self._tokenizer.token_to_id(name)) is not None}
        self._hidden = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Sequence[int], *, special: bool) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)

    def is_open(self, tokens: Sequence[int], *, special: bool) -> bool:
        # A run of bytes is text all together or not at all; tokens that are not shown do not end it.
        if not self._bytes:
            return False
        shown = (t for t in reversed(tokens) if t < self.size and (special or t not in self._hidden))
        return next(shown, None) in self._bytes

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _Bytes:
    """A token is a byte; others are no text."""

    size = 256

    def encode(self, text: str, *, special: bool) -> list[int]:
        return list(text.encode("utf-8", "surrogatepass"))

    def decode(self, tokens: Sequence[int], *, special: bool) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")

    def is_open(self, tokens: Sequence[int], *, special: bool) -> bool:
        return False

    def id_of(self, token: str) -> int | None:
        return None


# Files of a folder.


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no JSON object")
    return record


def _content(token: Any) -> str:
    """A special token's text, which is written alone or with its properties."""
    return token["content"] if isinstance(token, dict) else token


def _eos(folder: Path, tokens: Mapping[str, str], tokenizer: Tokenizer) -> tuple[int, ...]:
    config = _read(folder / "config.json")
    for record in (_read(folder / "generation_config.json"), config, config.get("text_config") or {}):
        found = record.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    end = tokenizer.id_of(tokens["eos_token"]) if "eos_token" in tokens else None
    return () if end is None else (end,)


def _template(folder: Path, record: Mapping[str, Any], tokens: Mapping[str, str]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    source = file.read_text("utf-8") if file.is_file() else record.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default") or next(iter(named.values()), None)
    if not source:
        return None
    try:
        return ChatTemplate(source, **tokens)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
