"""Completions to look at: a table for the log, and a page of HTML that grows with the iterations.

    shown = pick(prompts, completions, rewards, lengths, count=4)       # from the worst to the best
    print(sample_table(shown))
    page = SamplePage("runs/rl/samples.html")
    page.add(7, shown, reward=0.41)                  # a section for iteration 7; the newest is shown first

What models write is text from outside: the page escapes all of it, the table shows control characters as escapes.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from redco_like.report.markup import Markup, join, tag
from redco_like.report.style import css

MORE_CSS = (
    "#iterations{display:flex;flex-direction:column-reverse}section{margin-top:28px}"
    "td.text{white-space:pre-wrap;overflow-wrap:anywhere;font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace;"
    "min-width:120px}"
)
TAIL = "\n</div></main></body></html>\n"
SECTION = re.compile(rb'<section id="iteration-(\d+)">')
COLUMNS = ("prompt", "completion", "reward", "tokens")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        prompt, completion: as text.
        reward: of the completion.
        length: tokens of the completion.
    """

    prompt: str
    completion: str
    reward: float
    length: int

    @classmethod
    def of(cls, prompt: Any, completion: Any, reward: float, length: int) -> Sample:
        """Any objects: texts as they are, tokens as numbers, others as Python prints them."""
        return cls(_words(prompt), _words(completion), float(reward), int(length))


def pick(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Sequence[float],
    lengths: Sequence[int],
    *,
    count: int = 4,
) -> list[Sample]:
    """Choose completions at equal distances in the order of their rewards: the worst, the best, and some between.

    Args:
        prompts, completions, rewards, lengths: one each per completion.
        count: how many.

    Raises:
        ValueError: another number of one than of the others, or a count below 1.

    >>> [sample.reward for sample in pick("abcde", "vwxyz", [3, 1, 5, 2, 4], [1] * 5, count=3)]
    [1.0, 3.0, 5.0]
    """
    sizes = {"prompts": len(prompts), "completions": len(completions), "rewards": len(rewards), "lengths": len(lengths)}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"one each per completion, not {', '.join(f'{n} {name}' for name, n in sizes.items())}")
    if count < 1:
        raise ValueError(f"count={count}; at least 1")
    order = sorted(range(len(rewards)), key=lambda i: float(rewards[i]))
    count = min(count, len(order))
    places = [round(k * (len(order) - 1) / max(count - 1, 1)) for k in range(count)]
    return [Sample.of(prompts[i], completions[i], rewards[i], lengths[i]) for i in (order[p] for p in places)]


def sample_table(samples: Sequence[Sample], *, width: int | None = None) -> str:
    """Lines of text: a row per sample, cut to what fits.

    Args:
        samples: what to show.
        width: characters, at least 44; default the terminal's.
    """
    width = max(shutil.get_terminal_size((100, 24)).columns if width is None else width, 44)
    fixed = {"reward": max([6, *(len(_reward(s)) for s in samples)]), "tokens": 6}
    rest = width - sum(fixed.values()) - 2 * (len(COLUMNS) - 1)
    longest = [max([10, *(Text(_plain(text)).cell_len for text in texts)]) for texts in _columns(samples)]
    fixed["prompt"] = min(longest[0], max(rest // 2, rest - longest[1]))
    fixed["completion"] = min(longest[1], rest - fixed["prompt"])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for name in COLUMNS:
        number = name in ("reward", "tokens")
        table.add_column(
            name, width=fixed[name], no_wrap=True, overflow="ellipsis", justify="right" if number else "left"
        )
    for s in samples:
        table.add_row(Text(_plain(s.prompt)), Text(_plain(s.completion)), _reward(s), str(s.length))
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


class SamplePage:
    """One self-contained page of HTML, which grows by a section per iteration, at its end: older ones are not read.

    A run that goes on from a checkpoint writes its iterations again; what the page has of them is taken out.

    Args:
        path: of the page; its folder is made. A file that is there goes on if it is such a page.
        title: of the page.

    Raises:
        ValueError: the file is something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, title: str = "Samples"):
        self.path = pathlib.Path(path)
        self._title = title
        self._begun = False

    def add(self, iteration: int, samples: Sequence[Sample], **numbers: float) -> None:
        """Write the section of an iteration, in place of any from this one on.

        Args:
            iteration: its number.
            samples: what to show.
            numbers: to show in its heading, such as `reward`.
        """
        section = _section(iteration, samples, numbers)
        if not self._begun:
            self._begin(iteration)
        with self.path.open("r+b") as file:
            file.seek(-len(TAIL.encode()), os.SEEK_END)
            file.truncate()
            file.write(section.encode() + TAIL.encode())

    def _begin(self, iteration: int) -> None:
        if self.path.exists():
            written = self.path.read_bytes()
            if not written.endswith(TAIL.encode()) or b'<div id="iterations">' not in written:
                raise ValueError(f"{self.path} is no page of samples; move it, or give another path")
            again = next((m for m in SECTION.finditer(written) if int(m[1]) >= iteration), None)
            if again is not None:
                self.path.write_bytes(written[: again.start()].rstrip(b"\n") + TAIL.encode())
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(_head(self._title) + TAIL, "utf-8")
        self._begun = True


def _head(title: str) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(css() + MORE_CSS)),
    )
    return f'<!doctype html>\n<html lang="en">{head}<body><main>{tag("h1", title)}<div id="iterations">'


def _section(iteration: int, samples: Sequence[Sample], numbers: dict[str, float]) -> str:
    words = " · ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
    heads = [tag("th", name, class_="n" if name in ("reward", "tokens") else None) for name in COLUMNS]
    rows = [
        tag(
            "tr",
            tag("td", _whole(s.prompt), class_="text"),
            tag("td", _whole(s.completion), class_="text"),
            tag("td", _reward(s), class_="n"),
            tag("td", str(s.length), class_="n"),
        )
        for s in samples
    ]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="full")
    made = join(tag("h2", f"Iteration {iteration}"), tag("p", words, class_="soft") if words else None)
    return "\n" + tag("section", made, tag("div", table, class_="scroll"), id=f"iteration-{iteration}")


def _columns(samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    return [s.prompt for s in samples], [s.completion for s in samples]


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(hasattr(item, "__index__") for item in value):
        return " ".join(str(int(item)) for item in value)
    return str(value)


def _reward(sample: Sample) -> str:
    return f"{sample.reward:.4g}"


def _plain(text: str) -> str:
    """On one line, and nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _whole(text: str) -> str:
    """What HTML can hold: line breaks and tabs stay, other control characters and lone surrogates are shown."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
