"""The page and the tables of an execution plan: everything is there, drawn within its lanes, and escaped."""

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


def blocks(markup):
    return [
        (*(float(x) for x in found.groups()[:4]), found[5], bool(found[6]), found[7]) for found in RECT.finditer(markup)
    ]


def test_lanes_are_runs_of_devices_that_do_the_same():
    assert lanes_of(execution()) == [Window(0, 4), Window(4, 2), Window(6, 2)]


def test_blocks_cover_their_devices_and_times():
    plan = execution()
    drawn = blocks(draw_gantt(plan, 960, upto=plan.period_seconds))
    own = {tip.partition("\n")[0]: (x, y, width, height) for x, y, width, height, _, odd, tip in drawn if not odd}
    assert set(own) == {busy.what for busy in plan.timeline}
    per_second = own["generate"][2] / 4.0
    assert own["reward"][2] == pytest.approx(1.0 * per_second, abs=0.2)
    assert own["generate"][0] + own["generate"][2] == pytest.approx(own["reward"][0], abs=0.2)
    # Three lanes, two lanes, one lane.
    assert own["generate"][3] > own["train_actor"][3] > own["train_critic"][3]
    assert own["train_actor"][1] == own["generate"][1]
    assert own["train_critic"][1] > own["reference"][1] > own["reward"][1]


def test_what_reaches_beyond_the_period_comes_back_faint():
    plan = execution()
    drawn = blocks(draw_gantt(plan, 960, upto=plan.period_seconds))
    faint = [block for block in drawn if block[5]]
    assert [(kind, tip.partition(",")[0]) for *_, kind, _, tip in faint] == [("train", "train_critic")]
    assert "of the iteration before" in faint[0][6]
    first = min(block[0] for block in drawn)
    assert faint[0][0] == first


def test_idle_share_is_what_the_blocks_leave():
    plan = execution()
    busy = 8 * 4.4 + 4 * 1.0 + 2 * 1.6 + 2 * 1.8 + 6 * 3.8 + 2 * 4.4
    assert idle_share(plan) == pytest.approx(1 - busy / (8 * 10.2))


def test_memory_is_below_its_limit_where_it_fits():
    markup = draw_memory(execution(), 960)
    tall = [height for _, _, _, height, kind, *_ in blocks(markup) if kind == "params"]
    assert len(tall) == 7
    assert max(tall) < 74
    assert "of 73.0 GiB usable" in markup


def test_the_page_has_everything_and_escapes_names(tmp_path):
    plan = execution(reason="because <b>", models=dict.fromkeys(execution().graph.roles, "a<b"))
    path = write_execution_report(tmp_path / "page.html", plan, others={"colocated": execution(period_seconds=12.0)})
    page = path.read_text()
    for text in ("because &lt;b&gt;", "a&lt;b", "train_critic", "1.18", "reallocate", "Every role on all devices"):
        assert text in page, text
    assert "<b>," not in page
    assert "a<b" not in page
