"""Chat templates: messages as the text that a model was trained on, by Jinja in a sandbox.

    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    template.render([{"role": "user", "content": "Hello"}])

The environment is that of `transformers` (`utils/chat_template_utils.py`): blocks are trimmed, `raise_exception`,
`strftime_now` and `tojson` without HTML escapes are there, `{% generation %}` blocks are shown as they are. A template
comes with a model that someone else made: it cannot change objects or reach attributes that begin with an underscore.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES_HINT = '[{"role": "user", "content": "Hello"}]'


class ChatTemplate:
    """A template that was read, and the tokens that it may name.

    Args:
        source: in Jinja's language.
        tokens: bos_token, eos_token, ... as text.

    Raises:
        ImportError: Jinja is not installed.
        ValueError: the source is no template.
    """

    def __init__(self, source: str, **tokens: str):
        try:
            import jinja2
        except ImportError as error:
            raise ImportError("chat templates need Jinja: pip install 'redco-like[hf]'") from error
        self._tokens = tokens
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        """Write messages as the model reads them.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end where the assistant's answer begins.
            tools: JSON schemas of functions, for templates that know them.
            more: what else a template reads, such as `enable_thinking`.

        Raises:
            ValueError: no messages, or what the template refuses, in its own words.
        """
        import jinja2

        check_messages(messages)
        given = {**self._tokens, **more, "messages": list(messages), "tools": tools, "documents": None}
        try:
            return self._template.render(**given, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Find out what no template could read.

    Raises:
        ValueError: names the message and what it lacks.
    """
    if not messages:
        raise ValueError(f"there are no messages; such as {ROLES_HINT}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}] has no role; messages are such as {ROLES_HINT}")


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant said, for training; to be shown it means nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return environment
