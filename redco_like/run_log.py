"""What one call of `Trainer.fit` writes: a line of metrics at every logged step, and a progress line.

with RunLog(folder, name="train", unit="tokens", units_per_step=8192, ...) as log:
    log.tick(step)
    log.record(step, {"loss": 2.5, "skipped": 0})
"""

from __future__ import annotations

import collections
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from redco_like.metrics import MetricsLog, Progress, Writer

_RATE_OVER = 8
"""Lines of metrics that a rate is taken over: steps are read in bunches, so that two lines alone say little."""


class RunLog:
    """Metrics file and progress line of one call of `fit`.

    Args:
        folder: of the trainer; None writes no file.
        name: of the trainer.
        writers: where metrics go besides the file.
        config: recorded by writers that have a place for it.
        active: whether this process writes.
        unit, units_per_step: what the rate counts, and how many of them a step has.
        steps_per_epoch, start: for the epoch of a step; `start` is the step this call counts from.
        step, last_step: where the run is, and where it ends.
    """

    def __init__(
        self,
        folder: pathlib.Path | None,
        *,
        name: str,
        writers: Sequence[str | Writer] = (),
        config: Mapping[str, Any] | None = None,
        active: bool = True,
        unit: str,
        units_per_step: int,
        steps_per_epoch: int,
        start: int,
        step: int,
        last_step: int,
    ):
        self._unit, self._units_per_step = unit, units_per_step
        self._steps_per_epoch, self._start = steps_per_epoch, start
        self._metrics = MetricsLog(folder, ("jsonl", *writers), run_name=name, config=config, active=active)
        self._progress = Progress(last_step, description=name, unit=unit, units_per_step=units_per_step, active=active)
        self.tick = self._progress.update
        self._last_step: int | None = None
        self._read: collections.deque[tuple[float, int]] = collections.deque(maxlen=_RATE_OVER)
        self._skipped = 0
        self.pause(step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close(self._last_step)
        self._metrics.close()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a training step, with the recent rate."""
        now = time.perf_counter()
        seconds, steps = now - self._read[0][0], step - self._read[0][1]
        self._read.append((now, step))
        self._skipped += int(metrics["skipped"])
        rate = steps * self._units_per_step / seconds if seconds > 0 else 0.0
        epoch = (step - self._start) / self._steps_per_epoch
        more = {"skipped": self._skipped, "epoch": epoch, f"{self._unit}_per_second": rate}
        self._metrics.write(step, {**metrics, **more})
        self._last_step = step
        self._progress.update(step, {"loss": metrics["loss"]})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation as `eval/...`."""
        named = {f"eval/{name}": value for name, value in metrics.items()}
        self._metrics.write(step, named)
        self._progress.message(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in named.items()))

    def pause(self, step: int) -> None:
        """Leave the time up to now out of the rate."""
        self._read.clear()
        self._read.append((time.perf_counter(), step))
