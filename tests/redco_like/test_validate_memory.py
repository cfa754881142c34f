"""Bytes per device of published runs: what their software holds, on made-up runs."""

from __future__ import annotations

import dataclasses

import pytest
from test_validate import SMALL, make_run

from redco_like.validation.problems import Problem, Problems
from redco_like.validation.runs import Mla

LATENT = dataclasses.replace(SMALL, kv_heads=4, mla=Mla(q_rank=64, kv_rank=64, nope=64, rope=32, v=64))
EXPERTS = dataclasses.replace(SMALL, experts=8, chosen=2, expert_width=512, mlp=0)
REPLICAS = {"framework": "megatron", "data": 8, "fsdp": 1, "zero": 1}


def problem(**changes) -> Problem:
    return Problems().of(make_run(**changes))


def test_experts_hold_the_tokens_of_their_own_replica():
    # Eight times the replicas with eight times the batch: a device's own tokens are as many as before.
    few = problem(**REPLICAS | {"data": 1, "devices": 1, "zero": 0}, architecture=EXPERTS, global_batch=8)
    many = problem(**REPLICAS | {"zero": 0}, architecture=EXPERTS, global_batch=64)
    assert few.run.global_batch // few.run.data == many.run.global_batch // many.run.data
    assert many.bytes_per_device() == pytest.approx(few.bytes_per_device(), rel=0.02)


def test_latents_instead_of_queries_keys_and_values():
    kept, made_again = (problem(architecture=LATENT, recompute_latents=x) for x in (False, True))
    a, m = LATENT, LATENT.mla
    assert m is not None
    tokens = kept.run.microbatch * kept.run.seq_len
    heads = 2 * a.layers * a.heads * tokens * (2 * (m.nope + m.rope) + m.v)
    saved = kept.bytes_per_device() - made_again.bytes_per_device()
    assert 0.6 * heads < saved < 1.1 * heads


def test_logits_are_never_in_memory_in_float32():
    narrow, wide = (
        problem(architecture=dataclasses.replace(SMALL, vocab=v), remat="full") for v in (64 * 1024, 128 * 1024)
    )
    tokens, vocab = narrow.run.microbatch * narrow.run.seq_len, 64 * 1024
    weights = 2 * vocab * SMALL.embed  # table and head, of which a device has an eighth at rest
    # The logits and their gradient, two bytes each; weights at rest (16 bytes) and gathered (2 and their gradient).
    assert wide.bytes_per_device() - narrow.bytes_per_device() <= tokens * vocab * 4 + weights * (16 / 8 + 4)


def test_gradients_are_as_narrow_as_they_are_summed():
    wide, narrow = (problem(**REPLICAS, sums_narrow=x) for x in (False, True))
    params = wide.place.held[0].sum(0)[0]
    assert wide.bytes_per_device() - narrow.bytes_per_device() == pytest.approx(params)


def test_weights_split_over_devices_that_divide_no_axis():
    whole = problem(devices=7, devices_per_node=7, fsdp=7, global_batch=56, microbatch=8, microbatches=1)
    even = problem(devices=8, fsdp=8, global_batch=64, microbatch=8, microbatches=1)
    assert whole.bytes_per_device() < 1.1 * even.bytes_per_device()
