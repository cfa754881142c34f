"""Completions for people: lines that fit, pages that are whole, grow, go on, and obey nothing that a model writes."""

import html.parser

import hypothesis
import hypothesis.strategies as st
import pytest
from rich.text import Text

from redco_like.rlhf.samples import COLUMNS, SECTION, SamplePage, pick, sample_table

NASTY = "</td><script>alert('x')</script>\x1b[31m&amp;\u202e\x00\ud800"


class Reader(html.parser.HTMLParser):
    """Checks nesting, and keeps the cells and the tags."""

    void = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.cells, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)
        if tag not in self.void:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def some(count=5):
    prompts, completions = [f"prompt {i}" for i in range(count)], [f"completion {i}" for i in range(count)]
    return pick(prompts, completions, [(7 * i) % count for i in range(count)], range(1, count + 1), count=3)


def read(path):
    return Reader(path.read_text("utf-8"))


def test_picked_are_the_worst_the_best_and_some_between():
    shown = pick("abcdefg", "tuvwxyz", [5, 3, 0, 6, 2, 1, 4], range(7), count=4)
    assert [s.reward for s in shown] == [0, 2, 4, 6]
    assert [s.prompt for s in shown] == ["c", "e", "g", "d"]
    assert [s.completion for s in shown] == ["v", "x", "z", "w"]
    assert len(pick("ab", "cd", [1, 1], [1, 1], count=9)) == 2
    assert pick([], [], [], []) == []


def test_tokens_and_other_objects_are_shown_as_text():
    shown = pick([(1, 2), {"q": 1}], [[3, 4], 5.5], [0, 1], [2, 1])
    assert [(s.prompt, s.completion) for s in shown] == [("1 2", "3 4"), ("{'q': 1}", "5.5")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a"], [], [1.0], [1]), "one each per completion, not 1 prompts, 0 completions, 1 rewards, 1 lengths"),
        ((["a"], ["b"], [1.0], [1, 2]), "2 lengths"),
    ],
)
def test_numbers_that_disagree_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pick(*arguments)
    with pytest.raises(ValueError, match="count=0; at least 1"):
        pick(["a"], ["b"], [1.0], [1], count=0)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(
        st.tuples(st.text(max_size=150), st.text(max_size=150), st.floats(-1e6, 1e6), st.integers(0, 99999)), max_size=4
    ),
    st.integers(30, 160),
)
def test_table_keeps_to_its_lines_and_its_width(rows, width):
    shown = pick(*(list(column) for column in zip(*rows, strict=True)), count=4) if rows else []
    lines = sample_table(shown, width=width).split("\n")
    assert len(lines) == 1 + len(rows)
    assert lines[0].split() == list(COLUMNS)
    assert all(Text(line).cell_len <= max(width, 44) and line.isprintable() for line in lines)
    assert [line.split()[-1] for line in lines[1:]] == [str(s.length) for s in shown]
    ends = {Text(line).cell_len for line in lines}
    assert len(ends) == 1  # numbers end in one column


def test_table_shows_what_a_terminal_would_obey():
    table = sample_table(pick(["a\nb"], [NASTY], [0.5], [3]), width=120)
    assert "a\\nb" in table
    assert "\\x1b[31m" in table
    assert "\x1b" not in table


def test_page_grows_and_is_whole_at_any_time(tmp_path):
    path = tmp_path / "deep" / "samples.html"
    page = SamplePage(path, title="Samples of <run>")
    for iteration in (1, 2, 10):
        page.add(iteration, some(), reward=0.25 * iteration)
        found = read(path)
        assert found.tags.count("html") == found.tags.count("main") == 1
    assert [name for name in found.ids if name != "iterations"] == ["iteration-1", "iteration-2", "iteration-10"]
    assert found.cells[:4] == ["prompt 0", "completion 0", "0", "1"]
    assert "reward 2.5" in path.read_text()
    assert "script" not in found.tags


def test_page_goes_on_where_a_run_goes_on(tmp_path):
    path = tmp_path / "samples.html"
    first = SamplePage(path)
    for iteration in range(1, 6):
        first.add(iteration, some(), reward=0.0)
    SamplePage(path).add(4, some(), reward=9.0)  # from the checkpoint of iteration 3
    assert [int(m) for m in SECTION.findall(path.read_bytes())] == [1, 2, 3, 4]
    assert read(path).cells
    SamplePage(path).add(1, some(), reward=9.0)
    assert [int(m) for m in SECTION.findall(path.read_bytes())] == [1]
    assert path.read_text().count("reward 9") == 1


def test_page_escapes_all_that_is_written(tmp_path):
    path = tmp_path / "samples.html"
    SamplePage(path, title=NASTY[:20]).add(1, pick([NASTY], ["two\nlines <b>"], [1], [2]))
    found = read(path)
    assert "script" not in found.tags
    assert "b" not in found.tags
    assert found.cells[0] == "</td><script>alert('x')</script>\\x1b[31m&amp;\\u202e\\x00\\ud800"
    assert found.cells[1] == "two\nlines <b>"


def test_a_completion_cannot_look_like_a_section(tmp_path):
    path = tmp_path / "samples.html"
    forged = '<section id="iteration-1">'
    page = SamplePage(path)
    page.add(1, pick([forged], [forged], [1], [2]))
    page.add(2, some())
    SamplePage(path).add(2, some())
    assert [int(m) for m in SECTION.findall(path.read_bytes())] == [1, 2]


def test_another_file_is_not_written_over(tmp_path):
    path = tmp_path / "samples.html"
    path.write_text("<html>mine</html>")
    with pytest.raises(ValueError, match="is no page of samples"):
        SamplePage(path).add(1, some())
    assert path.read_text() == "<html>mine</html>"
