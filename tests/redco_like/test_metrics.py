"""Metrics: strict JSON lines whatever is written, extras that say how to install them, progress that is cheap."""

import io
import json
import time

import jax.numpy as jnp
import pytest

from redco_like.metrics import MetricsLog, Progress, read_metrics


def test_lines_are_strict_json_and_say_what_was_not_finite(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": jnp.float32(2.5), "count": 3})
        log.write(2, {"loss": float("nan"), "norm": float("-inf"), "rate": 0.5})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed: readable while the run goes on
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"not JSON: {name}")) for line in lines]
    assert (records[0]["step"], records[0]["loss"], records[0]["count"]) == (1, 2.5, 3)
    assert "nonfinite" not in records[0]
    assert (records[1]["loss"], records[1]["norm"], records[1]["rate"]) == (None, None, 0.5)
    assert records[1]["nonfinite"] == {"loss": "nan", "norm": "-inf"}
    assert records[0]["seconds"] >= 0
    assert abs(records[0]["unix_seconds"] - time.time()) < 60


def test_log_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with MetricsLog(tmp_path) as log:
        log.write(2, {"loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]


def test_inactive_log_writes_nothing(tmp_path):
    with MetricsLog(tmp_path / "run", ("tensorboard",), active=False) as log:
        log.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsLog(tmp_path, ("tensorboard",)) as log:
        log.write(1, {"loss": 1.0})
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert len(read_metrics(tmp_path)) == 1


def test_own_writer_gets_every_line(tmp_path):
    class Kept(list):
        def write(self, step, values):
            self.append((step, dict(values)))

        def close(self):
            self.append("closed")

    kept = Kept()
    with MetricsLog(tmp_path, (kept,)) as log:
        log.write(1, {"loss": 1.0})
    assert kept == [(1, {"loss": 1.0}), "closed"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_writer_that_is_not_installed_names_its_extra(tmp_path, name, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(module)

    monkeypatch.setattr("redco_like.metrics.importlib.import_module", missing)
    with pytest.raises(ImportError, match=rf"pip install 'redco-like\[{name}\]'"):
        MetricsLog(tmp_path, (name,))


def test_bad_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown metrics writer 'tensorbord'"):
        MetricsLog(tmp_path, ("tensorbord",))
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="cannot be called 'step'"):
        log.write(1, {"step": 1})


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("redco_like.metrics.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(1000, unit="tokens", units_per_step=512, seconds_between=10, stream=stream) as progress:
        for step in range(1, 301):
            progress.update(step, {"loss": 2.5, "lr": 3e-4})
            now[0] += 0.125
        progress.message("saved")
        progress.close(300)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train 1/1000  loss 2.5000  lr 3.00e-04"
    assert lines[1].startswith("train 81/1000  loss 2.5000  lr 3.00e-04  4,096 tokens/s  0:01:55 left")
    assert len(lines) == 6
    assert lines[4] == "saved"
    assert lines[5].startswith("train 300/1000")


def test_values_are_read_only_when_shown():
    class Unread:
        def __float__(self):
            raise AssertionError("read")

    with Progress(10, seconds_between=1000, stream=io.StringIO()) as progress:
        assert progress.update(1, {"loss": 1.0})
        assert not progress.update(2, {"loss": Unread()})
    quiet = Progress(10, active=False, stream=io.StringIO())
    assert not quiet.update(1, {"loss": Unread()})


def test_update_that_shows_nothing_costs_under_20_microseconds():
    with Progress(10**6, seconds_between=1000, stream=io.StringIO()) as progress:
        values = {"loss": 1.0}
        progress.update(0, values)
        begin = time.process_time()
        for step in range(10_000):
            progress.update(step, values)
        assert (time.process_time() - begin) / 10_000 < 20e-6
