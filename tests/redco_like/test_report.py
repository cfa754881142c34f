"""The report: well formed, self-contained, small; its numbers, bars and lanes are the estimate's."""

import html
import html.parser
import itertools
import math
import re

import jax
import optax
import pytest
import zoo

import search
from redco_like.report import lanes, markup, pareto, report_html, timeline, words, write_report
from redco_like.report.bars import Row
from search import Estimate, Plan
from search.solver import Costed, SearchResult
from sharding_rules import MeshShape, make_layout, trace

SECTIONS = ["headline", "memory", "timeline", "communication", "pareto", "plans", "axes", "file"]
PROBLEM = {"model": "some-model", "cluster": "16x8xA100-80", "seq_len": 4096, "global_batch": 256}
EXPOSED = {"data": 0.11, "fsdp": 0.37, "tensor": 1.3}
MEMORY = {"params": 7, "gradients": 2, "optimizer": 14, "activations": 33, "transient": 5}


def estimate(compute=8.0, exposed=EXPOSED, bubble=0.0, scale=1.0):
    seconds = {"compute": compute, **{f"exposed {axis}": s for axis, s in exposed.items()}}
    seconds |= {"bubble": bubble, "optimizer": 0.25}
    total = sum(seconds.values())
    return Estimate(
        seconds_per_step=total,
        low_seconds=0.9 * total,
        high_seconds=1.2 * total,
        seconds=seconds,
        hidden_seconds=0.5 * len(exposed),
        communication={axis: {"seconds": 0.5 + s, "exposed": s, "bytes": 3e10} for axis, s in exposed.items()},
        mfu=0.487,
        tokens_per_second=1_048_576 / total,
        memory={part: int(size * scale * 2**30) for part, size in MEMORY.items()},
        usable_bytes=68 * 2**30,
        flops=3.9e18,
        binds="compute: matrix products 71 % of the step",
        labels={"seconds": "analytic", "memory": "analytic", "collectives": "analytic"},
    )


def plan(microbatches=2, remat="full", preset="fsdp+megatron", **fields):
    mesh = MeshShape(**{axis: fields.pop(axis) for axis in ("data", "fsdp", "stage", "tensor") if axis in fields})
    return Plan(mesh, preset, (), microbatches, remat, compute_dtype="bfloat16", **fields)


def result(**fields):
    best = Costed(plan(data=2, fsdp=8, tensor=2), estimate())
    others = [Costed(plan(fsdp=2 ** (4 + k), tensor=8), estimate(8.1 + k / 10, {"tensor": 1.5})) for k in range(3)]
    front = [Costed(plan(fsdp=128, microbatches=2**k), estimate(8 * 1.3**k, scale=0.8**k)) for k in range(5)]
    known = {"bound": best.estimate.seconds_per_step, "gap": 0.0, "candidates": 9, "evaluated": 5, "memory_checked": 2}
    known |= {"placements": 3, "illegal": {}, "advice": "", "seconds": 0.1}
    return SearchResult(**{"best": best, "runners_up": tuple(others), "pareto": tuple(front), **known, **fields})


class Page(html.parser.HTMLParser):
    """Elements of a page; an end tag that does not fit is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.stack, self.elements, self.words, self.text = [], [], [], {}, text
        self.feed(text)
        self.close()
        assert not self.open, f"{self.open} is not closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.elements.append((tag, attributes, tuple(self.open)))
        if tag not in markup.VOID:
            self.open.append(attributes.get("id") or attributes.get("class") or tag)
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack[-1:] == [tag], f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()
        self.open.pop()

    def handle_data(self, data):
        for name in {*self.open}:
            self.words[name] = self.words.get(name, "") + data + " "

    def marks(self, section, kind, size="wide"):
        """Rectangles of a kind in a figure: (x, y, width)."""
        return [
            tuple(float(a[key]) for key in ("x", "y", "width"))
            for tag, a, inside in self.elements
            if tag == "rect" and kind in a["class"].split() and section in inside and size in inside
        ]


@pytest.fixture(scope="module")
def problem():
    model = zoo.MODELS["llama_scanned"]
    args = (model.abstract_params(), model.abstract_batch(8), zoo.base.abstract_key())
    return {**PROBLEM, "traced": trace(model.loss, *args, names=("params", "batch", "rng"))}


@pytest.fixture(scope="module")
def page(problem):
    return Page(report_html(problem=problem, result=result()))


def test_page_is_well_formed_and_has_every_section_once(page):
    assert [a["id"] for tag, a, _ in page.elements if tag == "section"] == SECTIONS
    assert page.text.startswith("<!doctype html>")


def test_page_reads_nothing_from_elsewhere(page):
    """The only address a page may name is none: it is read offline, and from a mail."""
    assert not re.search(r"https?:|//\w|@import|url\(|\bfetch\(|\bsrc=|\bhref=", page.text)
    assert {tag for tag, _, _ in page.elements} & {"link", "img", "iframe", "object"} == set()


def test_headline_says_the_estimate_its_interval_and_its_label(page):
    e, said = result().best.estimate, page.words["headline"]
    for number in (
        "10.0 s",
        "9.03 s to 12.0 s",
        "49 %",
        "61.0 GiB",
        "90 % of 68.0 GiB",
        "105 k",
        "analytic",
        "Gap 0 %",
    ):
        assert number in said, (number, said)
    assert markup.seconds(e.seconds_per_step) == "10.0 s"
    assert e.binds in said
    assert result().certificate() in said
    assert f"data 2 {markup.TIMES} fsdp 8 {markup.TIMES} tensor 2" in said
    assert "2 microbatches, remat full (preset fsdp+megatron)" in said


def test_memory_bars_are_as_long_as_their_bytes(page):
    """Each part of each plan, against the line of what is usable."""
    limits = [
        float(a["x1"])
        for tag, a, inside in page.elements
        if tag == "line" and a["class"] == "limit" and {"memory", "wide"} <= {*inside}
    ]
    starts = sorted({x for x, _, _ in page.marks("memory", "params")})
    assert len(limits) == len(starts) == 1
    per_gib = (limits[0] - starts[0]) / 68
    for part in ("params", "gradients", "activations", "transient"):
        widths = [width for _, _, width in page.marks("memory", part)]
        assert len(widths) == 4
        assert widths == pytest.approx([MEMORY[part] * per_gib] * 4, abs=0.11)


def test_time_bars_are_as_long_as_their_seconds(page):
    e = result().best.estimate
    first = min(y for _, y, _ in page.marks("memory", "compute"))
    (compute,) = [w for _, y, w in page.marks("memory", "compute") if y == first]
    waits = [w for _, y, w in page.marks("memory", "exposed") if y == first]
    assert waits == pytest.approx([compute * s / e.seconds["compute"] for s in EXPOSED.values()], abs=0.11)
    kinds = ("compute", "exposed", "optimizer", "params", "gradients", "activations", "transient")
    parts = sorted((x, width) for kind in kinds for x, y, width in page.marks("memory", kind) if y == first)
    assert len(parts) == 1 + 3 + 1 + 5
    for (x, width), (after, _) in itertools.pairwise(parts[:5]):
        assert x + width == pytest.approx(after, abs=0.11)
    for (x, width), (after, _) in itertools.pairwise(parts[5:]):
        assert x + width == pytest.approx(after, abs=0.11)


def test_communication_says_bytes_and_seconds_of_each_axis(page):
    said = page.words["communication"]
    for axis, size in (("data", 2), ("fsdp", 8), ("tensor", 2)):
        assert f"{axis} {size}" in said
        assert markup.seconds(EXPOSED[axis]) in said
    assert said.count("27.9 GiB") == 2 * 3  # 3e10 bytes, in the wide figure and in the narrow one
    hidden, waits = ([w for _, _, w in page.marks("communication", kind)] for kind in ("hidden", "exposed"))
    assert waits == pytest.approx([hidden[0] * s / 0.5 for s in EXPOSED.values()], abs=0.4)


def test_every_plan_of_the_front_is_a_point_and_says_what_it_is(page):
    points = [a for tag, a, inside in page.elements if tag == "circle" and "wide" in inside]
    assert sorted(a["class"] for a in points) == ["point"] * 5 + ["runner"] * 3 + ["winner"]
    assert all("per device" in a["data-tip"] and "microbatch" in a["data-tip"] for a in points)
    assert len({a["cx"] for a in points if a["class"] == "point"}) == 5


def test_tables_have_the_plans_the_axes_and_the_parameters(page, problem):
    for other in result().runners_up:
        assert f"{other.estimate.seconds_per_step:.2f}" in page.words["plans"]
    said = page.words["axes"]
    layout = make_layout(problem["traced"], MeshShape(data=2, fsdp=8, tensor=2), "fsdp+megatron")
    assert {path for path in layout.param_shares if path not in said} == set()
    assert markup.gib(layout.bytes_per_device("params")) in said  # float32, traced and stored
    for row in ("batch", "embed", "mlp", "vocab"):
        assert row in said


def test_words_of_the_user_are_escaped():
    name = "<script>alert('&')</script>"
    text = report_html(problem={**PROBLEM, "name": name, "description": name}, result=result())
    assert text.count("<script") == 1
    assert Page(text).words["headline"].count(name) == 2


def test_a_saved_plan_makes_a_page_from_its_own_estimate(tmp_path):
    """What a page shows is in the plan's file, and its file is in the page."""
    saved = plan(data=2, fsdp=8, tensor=8, estimate=estimate(), problem={**PROBLEM, "name": "kept"})
    path = write_report(tmp_path / "plan.html", plan=Plan.from_json(saved.to_json()))
    page = Page(path.read_text("utf-8"))
    assert [a["id"] for tag, a, _ in page.elements if tag == "section"] == [s for s in SECTIONS if s != "pareto"]
    assert "kept on 16x8xA100-80" in page.words["headline"]
    again = Plan.from_json(html.unescape(re.search(r"<pre>(.*?)</pre>", page.text, re.DOTALL).group(1)))
    assert again == saved
    assert again.estimate == saved.estimate


def test_a_page_needs_a_plan_and_an_estimate():
    with pytest.raises(ValueError, match="result=, or plan= with an estimate"):
        report_html(plan=plan())
    with pytest.raises(ValueError, match="result=, or plan= with an estimate"):
        report_html()


def test_when_nothing_fits_the_page_says_what_would():
    nothing = result(best=None, runners_up=(), pareto=(), advice="2.1 GiB short; 256 devices would fit")
    page = Page(report_html(problem=PROBLEM, result=nothing))
    assert "No plan fits" in page.words["headline"]
    assert "256 devices would fit" in page.words["headline"]


def test_what_cannot_run_yet_and_what_does_not_fit_is_said():
    big = Page(report_html(problem=PROBLEM, plan=plan(stage=4), estimate=estimate(scale=2.0)))
    assert "cannot run it yet: stage=4 (1f1b)" in big.words["headline"]
    assert "Does not fit: 122 GiB of 68.0 GiB" in big.words["headline"]


# One step.


@pytest.mark.parametrize("microbatches", [1, 2, 64])
def test_lanes_are_as_long_as_the_estimate_says(microbatches):
    e = estimate()
    step = lanes.step_lanes(plan(microbatches, data=2, fsdp=8, tensor=8), e, forward_share=0.25)
    length = {(lane.name, kind): 0.0 for lane in step.lanes for kind in timeline.NAMES}
    for lane in step.lanes:
        for before, after in zip(lane.blocks, lane.blocks[1:], strict=False):
            assert after.start >= before.end - 1e-9, (lane.name, before, after)
        for block in lane.blocks:
            length[lane.name, block.kind] += block.end - block.start
    assert length["compute", "forward"] == pytest.approx(0.25 * 8)
    assert length["compute", "backward"] == pytest.approx(0.75 * 8)
    assert length["compute", "optimizer"] == pytest.approx(0.25)
    assert [length[axis, "exposed"] for axis in EXPOSED] == pytest.approx([*EXPOSED.values()])
    assert [length[axis, "hidden"] for axis in EXPOSED] == pytest.approx([0.5] * 3)
    assert max(block.end for lane in step.lanes for block in lane.blocks) == pytest.approx(e.seconds_per_step)
    # While a collective is waited for, nothing is computed.
    waits = [b for lane in step.lanes for b in lane.blocks if b.kind == "exposed"]
    for block in step.lanes[0].blocks:
        assert all(min(w.end, block.end) - max(w.start, block.start) < 1e-9 for w in waits)


@pytest.mark.parametrize("microbatches", [32, 256])
@pytest.mark.parametrize("schedule, chunks", [("1f1b", 1), ("gpipe", 1), ("zb_h1", 1), ("interleaved", 2)])
def test_a_pipeline_is_its_schedule_with_whole_periods_left_out(schedule, chunks, microbatches):
    """What is left out is as long as its microbatches take, and the picture goes on where it stopped."""
    piped = plan(microbatches, stage=8, tensor=8, schedule=schedule, chunks=chunks)
    step = lanes.step_lanes(piped, estimate(bubble=1.0))
    assert len(step.lanes) == 8
    cuts = timeline.choose_cuts(step, 860, narrow=False)
    assert bool(cuts) == (microbatches == 256)
    for cut in cuts:
        assert 0 < cut.start < cut.end < step.seconds
        for lane in step.lanes:
            inside = [b for b in lane.blocks if cut.start <= (b.start + b.end) / 2 < cut.end]
            passes = [b for b in inside if b.kind == "forward"] or [b for b in inside if b.kind == "backward"]
            assert len(passes) == cut.microbatches * chunks
            assert _working(lane, cut.start) == pytest.approx(_working(lane, cut.end), abs=1e-6)
    drawn = Page(str(timeline.draw_timeline(step, 960)))
    assert len(cuts) == drawn.text.count("more microbatches,")
    assert drawn.text.count("stage ") >= 8


def _working(lane, time):
    """How far into its block a lane is at a time; -1 if it is idle."""
    at = time + 1e-9
    return next((time - b.start for b in lane.blocks if b.start <= at < b.end), -1.0)


def test_a_long_step_shows_its_first_and_last_microbatches_and_says_what_is_left_out():
    step = lanes.step_lanes(plan(64, data=2, fsdp=8, tensor=8), estimate())
    page = Page(str(timeline.draw_timeline(step, 960)))
    said = page.words["svg"]
    (left_out,) = re.findall(r"(\d+) more microbatches", said)
    tips = [a["data-tip"] for tag, a, _ in page.elements if "data-tip" in a and "backward" in a["class"]]
    assert len(tips) == 64 - int(left_out)
    assert "microbatch 1 of 64" in tips[0]
    assert "microbatch 64 of 64" in tips[-1]


def test_the_largest_pipeline_stays_under_a_megabyte(tmp_path):
    largest = plan(128, stage=64, tensor=8, schedule="interleaved", chunks=2)
    path = write_report(tmp_path / "big.html", problem=PROBLEM, plan=largest, estimate=estimate(bubble=1.0))
    assert path.stat().st_size < 1_000_000
    assert "One stage in " in Page(path.read_text("utf-8")).words["timeline"]


def test_plans_are_told_in_words_with_all_that_they_choose():
    """The mesh from its slowest links to its fastest, and what differs from the default."""
    said = words.mesh_words(plan(data=2, fsdp=4, tensor=8, order=("tensor", "data", "fsdp")))
    assert said.replace(markup.TIMES, "x") == "tensor 8 x data 2 x fsdp 4"
    piped = plan(8, stage=4, schedule="interleaved", chunks=2, vocab="spread", preset="megatron+sequence")
    assert words.how_words(piped) == (
        "8 microbatches, interleaved with 2 chunks, vocabulary spread, remat full, sequence parallel"
    )
    rest = plan(1, "none", data=2, optimizer_sharding=True, regather=False, offload=("optimizer", "params"))
    assert words.how_words(rest) == (
        "1 microbatch, no remat, ZeRO-1 optimizer, gathered once per microbatch, optimizer and params offloaded"
    )


def test_which_constant_would_change_the_winner_is_said():
    rows = [search.Sensitivity("attention", factor, (10.0, 10.1, 10.2, 10.3), 0) for factor in (0.87, 1.15)]
    steady = Page(report_html(problem=PROBLEM, result=result(), sensitivity=rows)).words["plans"]
    assert "off by a factor of 1.15, up or down, plan 1 stays the fastest" in steady
    rows[0] = search.Sensitivity("attention", 0.87, (11.5, 11.9, 11.2, 12.0), 2)
    other = Page(report_html(problem=PROBLEM, result=result(), sensitivity=rows)).words["plans"]
    assert f"Another of these plans would be the fastest: plan 3 with attention at {markup.TIMES} 0.87." in other


def test_a_pipeline_of_a_model_has_the_times_of_its_stages(problem):
    """Embedding and head make the ends slower than the middle; the picture has what the schedule's simulation has."""
    traced = problem["traced"]
    state = jax.eval_shape(optax.adam(1e-3).init, traced.arg("params"))
    model = search.TracedModel(traced, state, search.parse_cluster("6xA100"))
    piped = Plan(MeshShape(stage=3, data=2), "data", (), 2, compute_dtype=model.plan_fields["compute_dtype"])
    expected = search.estimate_plan(model, piped)
    page = Page(report_html(problem=problem, model=model, plan=piped, estimate=expected))
    simulated = search.timeline(model, piped)
    wanted = [b.end_seconds - b.start_seconds for rank in simulated.busy for b in rank if b.op.kind == "F"]
    drawn = [width for _, _, width in page.marks("timeline", "forward")]
    assert len(drawn) == 3 * 2
    assert [w / drawn[0] for w in drawn] == pytest.approx([w / wanted[0] for w in wanted], rel=0.01)
    assert wanted[0] != pytest.approx(wanted[-1], rel=0.02)


# Numbers and markup.


@pytest.mark.parametrize("width", [358, 960])
def test_labels_beside_points_do_not_overlap(width):
    """Eight plans at almost the same place: those labels that are drawn are apart."""
    rows = [Row(str(k + 1), plan(fsdp=2**k), estimate(8 + k / 1000, scale=1 - k / 500)) for k in range(8)]
    front = [*rows, Row("", plan(), estimate(20, scale=0.1))]
    drawn = str(pareto.draw_pareto(front, rows, width))
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="mark[^>]*>([^<]+)<', drawn)
    boxes = [(float(x), float(y), markup.text_width(label)) for x, y, label in found]
    assert len(boxes) >= 2
    for (x, y, wide), (x2, y2, wide2) in itertools.combinations(boxes, 2):
        assert abs(y - y2) > 9 or x + wide < x2 or x2 + wide2 < x, found
        assert x >= 0
        assert x + wide <= width


@pytest.mark.parametrize("low, high", [(0, 1e-6), (0.3, 0.31), (0, 7.9), (24.1, 37.5), (0, 1e5)])
def test_ticks_are_round_and_within(low, high):
    found = markup.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    assert math.log10(markup.round_step((high - low) / 5)) <= math.log10((high - low) / 2)


def test_a_search_of_a_real_model_makes_a_page(problem):
    """From the traced model to the page, with the axes that the winner splits."""
    traced = problem["traced"]
    state = jax.eval_shape(optax.adam(1e-3).init, traced.arg("params"))
    cluster = search.parse_cluster("8xA100")
    model = search.TracedModel(traced, state, cluster)
    found = search.solve(search.Space(model, cluster), runners_up=2, pareto=True)
    page = Page(report_html(problem={"name": "llama"}, model=model, result=found))
    assert "llama on 8xA100" in page.words["headline"]
    assert markup.seconds(found.best.estimate.seconds_per_step) in page.words["headline"]
    rows = search.sensitivity(model, [found.best.plan, *(other.plan for other in found.runners_up)])
    for row in rows:
        assert row.constant in page.words["plans"]
    # The fastest plan of every row is bold.
    assert len([tag for tag, _, inside in page.elements if tag == "b" and "plans" in inside]) == len(rows)
    for axis, size in found.best.plan.mesh.sizes.items():
        assert size == 1 or axis in page.words["axes"]
