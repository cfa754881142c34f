"""Many clients, of whom some leave: every other one gets what it would get alone, and nothing is left over."""

import asyncio

from fake_engine import FakeEngine, expected
from serving import serving
from stress import make_requests, storm

from redco_like.server import Limits


def test_answers_are_those_of_a_request_alone_however_many_leave():
    with serving(FakeEngine(rows=16, delay=0.002), limits=Limits(waiting=1000)) as server:
        requests = make_requests(200, seed=0)
        answers, seconds = asyncio.run(storm(server.base_url, requests, leaving=0.3, seed=0, patience=0.7))
        left = sum(answer is None for answer in answers)
        assert 0 < left < 100, (left, seconds)
        for request, answer in zip(requests, answers, strict=True):
            if answer is not None:
                assert answer == expected(request.prompt.encode(), request.seed, request.max_tokens), request
        server.wait_idle()
        stats = server.engine.stats()
        assert (stats.running, stats.waiting, server.service.worker.open) == (0, 0, 0)
        assert server.engine.most_running == 16
        metrics = server.metrics()
        outcomes = {key: v for key, v in metrics.items() if key.startswith("redco_like_requests_total")}
        assert {key.rsplit("=", 1)[1] for key in outcomes} <= {'"ok"}', '"cancelled"}'}, outcomes
        # Who left before the server had read the request is not known to it; who left after the end is counted as ok.
        assert 200 - left <= outcomes['redco_like_requests_total{endpoint="completions",outcome="ok"}'] <= 200
        assert metrics["redco_like_output_tokens_total"] <= server.engine.generated
