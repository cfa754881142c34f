"""The validation beyond training steps: inference, what fits, and memory plan by plan. The runs lie outside."""

from __future__ import annotations

import csv
import dataclasses
import json
import os

import numpy as np
import pytest

from redco_like.models import ModelConfig, architecture
from redco_like.problem import load_problem
from redco_like.validation import FOLDER_VARIABLE
from redco_like.validation.amp import FILE, crashed_section, read_amp
from redco_like.validation.inference import (
    Answer,
    Request,
    answer,
    fit_section,
    inference_bars,
    latency_section,
    read_requests,
)
from redco_like.validation.memory import MIB, PROFILE, compare_plans, memory_bars, memory_section
from redco_like.validation.report import Bar
from search import find_accelerator
from search.efficiency import Efficiency

GPT = ModelConfig(family="gpt2", kind="decoder", vocab=1024, embed=4096, layers=4, heads=32, mlp=16384)
ROW = {
    **dict(row_id="a", source_id="s", independent_group="g", kind="inference", framework="Fast (server)", model="m"),
    **dict(arch_class="dense_gpt", n_layers=4, d_model=512, n_heads=8, d_ff=2048, vocab=1024, tied_emb="true"),
    **dict(hardware="A100-SXM-80GB", n_devices=2, devices_per_node=8, precision="fp16", tp=2, pp=1, global_batch=4),
    **dict(input_len=16, output_len=8, step_time_s=0.5, mem_per_device_GB="", usable="strict", missing_fields=""),
}


def make_request(**changes) -> Request:
    made = Request(
        row="made up",
        group="g",
        model="small",
        software="FasterTransformer",
        config=GPT,
        accelerator="A100-80",
        devices=1,
        devices_per_node=8,
        dtype="float16",
        tensor=1,
        batch=1,
        input_len=16,
        output_len=9,
        seconds=1.0,
        memory_bytes=None,
        out_of_memory=False,
    )
    return dataclasses.replace(made, **changes)


def fitted(accelerator, framework) -> Efficiency:
    return Efficiency.for_accelerator(find_accelerator(accelerator), framework)


def write(tmp_path, *rows):
    with (tmp_path / "published_runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_inference_and_what_ran_out_of_memory_is_read(tmp_path):
    failed = ROW | dict(row_id="b", kind="oom_observation", usable="no", step_time_s="")
    narrow, training = ROW | dict(row_id="c", precision="fp8"), ROW | dict(row_id="d", kind="train")
    requests, left = read_requests(write(tmp_path, ROW, failed, narrow, training))
    assert [r.row for r in requests] == ["a", "b"]
    assert (requests[0].tensor, requests[0].batch, requests[0].length, requests[0].seconds) == (2, 4, 24, 0.5)
    assert requests[0].software == "Fast"
    assert requests[1].out_of_memory
    assert requests[1].seconds is None
    assert left == {"s: weights and cache in fp8": 1}


def test_one_token_takes_as_long_as_the_weights_need_from_memory():
    (one,) = answer([make_request()], fitted)
    weights = 2 * 4 * 12 * GPT.embed**2
    floor = weights / 2039e9
    step = (one.seconds - one.prompt_seconds) / 8
    assert floor < step < 1.5 * floor


def test_memory_of_a_request_is_weights_and_a_full_cache():
    small, large = answer([make_request(row=str(b), batch=b) for b in (1, 33)], fitted)
    weights = 2 * load_problem(GPT, seq_len=16, global_batch=1).parameters
    cache = 2 * 2 * GPT.layers * GPT.embed * 25
    assert weights + cache < small.bytes_per_device < 1.1 * (weights + cache)
    assert large.bytes_per_device - small.bytes_per_device > 32 * cache


def test_lengths_between_the_traced_ones_are_interpolated():
    ends = [make_request(row="short", input_len=16), make_request(row="long", input_len=512, output_len=512)]
    middle = make_request(row="middle", input_len=200, output_len=100)
    together = answer([*ends, middle], fitted)[2]
    (alone,) = answer([middle], fitted)
    assert together.seconds == pytest.approx(alone.seconds, rel=1e-3)
    assert together.bytes_per_device == pytest.approx(alone.bytes_per_device, rel=1e-3)


def test_tensor_parallel_requests_are_faster_but_wait_for_their_sums():
    wide = dataclasses.replace(GPT, embed=16384, heads=128, head_dim=128, mlp=65536)
    made = [make_request(row=str(n), config=wide, tensor=n, devices=n, batch=8) for n in (1, 2, 8)]
    one, two, many = answer(made, fitted)
    assert one.seconds > two.seconds > one.seconds / 2
    assert many.bytes_per_device < one.bytes_per_device / 4


def test_what_does_not_fit_is_counted():
    requests = [make_request(row="fits"), make_request(row="does not", batch=2**16, seconds=None, out_of_memory=True)]
    right = answer(requests, fitted)
    assert [a.fits for a in right] == [True, False]
    wrong = dataclasses.replace(right[1], fits=True)
    counts = [bar.value for a in (right[1], wrong) for bar in inference_bars([right[0], a]) if "out of" in bar.name]
    assert counts == [0, 1]
    assert fit_section([right[0], wrong]).rows[0] == ("ran out of memory, said to fit", 1, "1")


def test_errors_are_those_of_the_answers():
    times = {1.0: 1.1, 2.0: 1.2}
    answers = [Answer(make_request(row=str(s), seconds=s), t, 0.1, 1e9, True) for s, t in times.items()]
    (bar,) = [bar for bar in inference_bars(answers) if "latency" in bar.name]
    assert bar.value == pytest.approx((0.1 + 0.4) / 2)
    assert latency_section(answers).rows[0][:3] == ("FasterTransformer, small", 2, pytest.approx(0.25))


def test_growth_of_memory_leaves_out_what_the_program_itself_takes():
    sizes = {1: 3e9, 2: 2.2e9, 64: 12e9}
    answers = [
        Answer(make_request(row=str(b), batch=b, memory_bytes=measured), 1.0, 0.1, 1e9 * b / 2, True)
        for b, measured in sizes.items()
    ]
    (bar,) = [bar for bar in inference_bars(answers) if "growth" in bar.name]
    assert bar.value == pytest.approx(31e9 / 9.8e9 - 1)


def test_a_small_result_is_made_in_pieces_of_its_depth():
    e = Efficiency(half_output=3e5, half_depth=60.0)
    whole = dataclasses.replace(e, half_output=0.0)
    assert e.product(8, 1024, 8192) > 0.25 * whole.product(8, 1024, 8192)
    large = np.array([600, 4096])
    np.testing.assert_allclose(
        e.product(large, 512, 8192), whole.product(large, 512, 8192) * large * 512 / (large * 512 + 3e5)
    )
    assert (np.diff(e.product(np.arange(1, 2000), 256, 4096)) > 0).all()
    assert (np.diff(e.product(8, 256, np.arange(1, 5000))) > 0).all()


def test_plans_of_a_profile_are_compared(tmp_path):
    path = tmp_path / PROFILE
    path.parent.mkdir()
    run = {f"layernum[{n}]_bsz8_seq2048_rank{r}_{k}": x for n in (1, 2) for r in (0, 7) for k, x in MADE_UP[n].items()}
    path.write_text(json.dumps({"1_1_8_sp": run, "layertype_0_sp": {"2048": {"parameter_size": 1.0}}}))
    (plan,) = compare_plans(tmp_path)
    assert plan.name == "stage=1 tensor=1 fsdp=8"
    config = dataclasses.replace(architecture("llama-2-7b"), layers=2)
    parameters = load_problem(config, seq_len=2048, global_batch=8).parameters
    assert plan.states == (1300 * MIB, pytest.approx(16 * parameters / 8, rel=1e-3))
    assert plan.above[0] == 1800 * MIB
    assert plan.layer is not None
    assert plan.layer[0] == 500 * MIB
    # Per token: two sums, two norms, q, k, v, what attention gave, and four hidden vectors, most of them in 16 bits.
    assert 400 * MIB < plan.layer[1] < 700 * MIB
    assert isinstance(memory_bars([plan])[0], Bar)
    assert len(memory_section([plan]).rows) == 1


MADE_UP = {1: dict(ms=900, act=800, act_peak=1300), 2: dict(ms=1300, act=1300, act_peak=1800)}


def test_without_a_profile_no_plans(tmp_path):
    assert compare_plans(tmp_path) == []


def test_plans_that_crashed_are_not_ranked(tmp_path):
    plan = {"mp": 2, "dp": 2, "pp": 4, "mbs": 4, "part": "0, 8, 14, 20, 30", "pred": 1.0}
    path = tmp_path / FILE
    path.parent.mkdir()
    path.write_text(json.dumps({"homogeneous": [plan | {"real": 2.0}, plan | {"real": float("inf")}]}))
    (ranking,) = read_amp(tmp_path)
    (run,) = ranking.runs
    assert (run.tensor, run.data, run.stage, run.microbatches, run.seconds) == (2, 2, 4, 4, 2.0)
    assert run.layers_per_stage == ()
    section = crashed_section(tmp_path)
    assert section is not None
    assert section.rows[0][1] == 1
    assert read_amp(tmp_path / "nowhere") == []
    assert crashed_section(tmp_path / "nowhere") is None


def published_bars(wanted):
    """Bars of the published requests that are wanted."""
    if FOLDER_VARIABLE not in os.environ:
        pytest.skip(f"{FOLDER_VARIABLE} names no folder with published_runs.csv")
    requests, _ = read_requests(os.environ[FOLDER_VARIABLE])
    answers = answer({r.row: r for r in requests if wanted(r)}.values(), fitted)
    return {bar.name: bar for bar in inference_bars(answers)}


def test_what_ran_out_of_memory_is_said_not_to_fit():
    assert published_bars(lambda r: not r.seconds)["runs out of memory that are said to fit"].met


def test_published_latencies_are_met():
    bars = published_bars(lambda r: r.model == "GPT-20B" and r.input_len == 200)
    assert bars["FasterTransformer, mean error of latency (left out)"].met
