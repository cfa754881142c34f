"""The page and the tables of an execution plan: everything is there, drawn within its lanes, and escaped."""

import dataclasses
import re

import pytest
from executions import execution

from redco_like.report import write_execution_report
from redco_like.report.gantt import draw_gantt, draw_memory, idle_share, lanes_of
from search.rlhf import Window

RECT = re.compile(
    r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([-\d.]+)" height="([-\d.]+)" '
    r'class="block (\w+)( odd)?" data-tip="([^"]*)"'
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    x: float
    y: float
    width: float
    height: float
    kind: str
    faint: bool
    tip: str


def blocks(markup):
    found = RECT.finditer(markup)
    return [Drawn(*(float(x) for x in m.groups()[:4]), m[5], bool(m[6]), m[7]) for m in found]  # pyright: ignore


def test_lanes_are_runs_of_devices_that_do_the_same():
    assert lanes_of(execution()) == [Window(0, 4), Window(4, 2), Window(6, 2)]


def test_blocks_cover_their_devices_and_times():
    plan = execution()
    drawn = blocks(draw_gantt(plan, 960, upto=plan.period_seconds))
    own = {block.tip.partition("\n")[0]: block for block in drawn if not block.faint}
    assert set(own) == {busy.what for busy in plan.timeline}
    per_second = own["generate"].width / 4.0
    assert own["reward"].width == pytest.approx(1.0 * per_second, abs=0.2)
    assert own["generate"].x + own["generate"].width == pytest.approx(own["reward"].x, abs=0.2)
    # Three lanes, two lanes, one lane.
    assert own["generate"].height > own["train_actor"].height > own["train_critic"].height
    assert own["train_actor"].y == own["generate"].y
    assert own["train_critic"].y > own["reference"].y > own["reward"].y


def test_what_reaches_beyond_the_period_comes_back_faint():
    plan = execution()
    drawn = blocks(draw_gantt(plan, 960, upto=plan.period_seconds))
    (faint,) = [block for block in drawn if block.faint]
    assert faint.kind == "train"
    assert faint.tip.startswith("train_critic, of the iteration before")
    assert faint.x == min(block.x for block in drawn)


def test_idle_share_is_what_the_blocks_leave():
    plan = execution()
    move = dataclasses.replace(plan.timeline[0], window=Window(0, 6))
    plan = dataclasses.replace(plan, timeline=(*plan.timeline, move))
    busy = 8 * 4.4 + 4 * 1.0 + 2 * 1.6 + 2 * 1.8 + 6 * 3.8 + 2 * 4.4
    assert idle_share(plan) == pytest.approx(1 - busy / (8 * 10.2))


def test_memory_is_below_its_limit_where_it_fits():
    markup = draw_memory(execution(), 960)
    tall = [block.height for block in blocks(markup) if block.kind == "params"]
    assert len(tall) == 7
    assert max(tall) < 74
    assert "of 73.0 GiB usable" in markup


def test_the_page_has_everything_and_escapes_names(tmp_path):
    plan = execution(reason="because <b>", models=dict.fromkeys(execution().graph.roles, "a<b"))
    path = write_execution_report(tmp_path / "page.html", plan, others={"colocated": execution(period_seconds=12.0)})
    page = path.read_text()
    for text in ("because &lt;b&gt;", "a&lt;b", "train_critic", "1.18", "reallocate", "All roles on all devices"):
        assert text in page, text
    assert "<b>," not in page
    assert "a<b" not in page
