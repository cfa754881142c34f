"""What watches a training loop: metrics read late, non-finite steps, wishes to stop, and long waits.

watch = StepWatch(record, policy="skip")
state, metrics = step(state, batch)
watch.push(step_number, metrics, batch)        # reads the metrics of an earlier step, never of this one
"""

from __future__ import annotations

import collections
import contextlib
import logging
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax

OnNonfinite = Literal["raise", "skip", "stop"]
STOP_FILE = "STOP"
_STEPS_IN_FLIGHT = 2
"""Steps that may at least be in flight before one is read: the device has the next one queued while the host reads."""
_SECONDS_IN_FLIGHT = 0.02
"""More steps than that may be in flight if together they take no longer: each wait costs the host a change of threads,
about as long as a step of a tiny model takes (`benchmarks/trainer_overhead.py`: 0.1 ms per step if it always waits)."""


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite. The state is the one before that step, trained on by the steps after it."""


class StepWatch:
    """Reads the metrics of finished steps, in order, and applies the policy for those that are not finite.

    Args:
        record: called with `(step, metrics)` for each step that is to be logged, metrics as floats.
        log_every: which steps are logged; those that are not finite are in any case, and
        last_step: the last one.
        policy: what a non-finite step leads to: an error, a stop, or nothing but a count.
        most_skips: with "skip", how many non-finite steps in a row are an error.
        explain: called with the batch of a non-finite step before an error is raised; its text becomes part of it.

    Attributes:
        skipped: non-finite steps seen.
        loss: of the last step read.
        stop: set when the policy "stop" met its first one.
    """

    def __init__(
        self,
        record: Callable[[int, Mapping[str, float]], None],
        *,
        log_every: int,
        last_step: int,
        policy: OnNonfinite,
        most_skips: int,
        explain: Callable[[Any], str],
        logger: logging.Logger,
    ):
        self._record, self._log_every, self._policy, self._explain = record, log_every, policy, explain
        self._most_skips, self._last_step, self._logger = most_skips, last_step, logger
        self._pending: collections.deque[tuple[int, Mapping[str, jax.Array], Any]] = collections.deque()
        self._in_a_row = 0
        self._last_push = time.perf_counter()
        self._seconds_per_step = 1.0
        self.skipped = 0
        self.loss: float | None = None
        self.stop = False

    def push(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        """Take note of a step that was just dispatched; read older ones, never this one, if enough are in flight."""
        pending = self._pending
        pending.append((step, metrics, batch))
        now = time.perf_counter()
        self._seconds_per_step += 0.2 * (now - self._last_push - self._seconds_per_step)
        self._last_push = now
        most = max(_STEPS_IN_FLIGHT, int(_SECONDS_IN_FLIGHT / self._seconds_per_step))
        if len(pending) > most:
            while len(pending) > max(_STEPS_IN_FLIGHT, most // 2):
                self._read(*pending.popleft())

    def drain(self) -> None:
        """Read all that is in flight."""
        while self._pending:
            step, metrics, batch = self._pending.popleft()
            if not self._pending:
                self.loss = float(metrics["loss"])
            self._read(step, metrics, batch)

    def _read(self, step: int, metrics: Mapping[str, jax.Array], batch: Any) -> None:
        bad = int(metrics["skipped"])
        if bad or step % self._log_every == 0 or step == self._last_step:
            self._record(step, {name: float(value) for name, value in metrics.items()})
        if not bad:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        what = f"step {step}: loss {loss:g}, gradient norm {norm:g}"
        if self._policy == "raise":
            self._pending.clear()
            raise NonFiniteError(f"{what}; {self._explain(batch)}. The step was not applied")
        self._logger.warning("%s: not finite, the step was not applied", what)
        if self._policy == "stop":
            self.stop = True
        elif self._in_a_row >= self._most_skips:
            self._pending.clear()
            raise NonFiniteError(f"{what}, and so were {self._in_a_row - 1} steps before it; {self._explain(batch)}")


def check_policy(policy: OnNonfinite) -> OnNonfinite:
    """Return `policy` if it is one.

    Raises:
        ValueError: it is not.
    """
    if policy not in get_args(OnNonfinite):
        raise ValueError(f"on_nonfinite={policy!r}; one of {', '.join(map(repr, get_args(OnNonfinite)))}")
    return policy


class StopRequest:
    """Whether somebody wants the run to end early: by SIGTERM, or by a file called STOP in the run's folder.

    Use as a context: the former handler comes back at its end. The file is looked for once a second, and removed.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._file = None if folder is None else folder / STOP_FILE
        self._next_look = 0.0
        self._reason = ""
        self._former: Any = None
        self._installed = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._former if self._former is not None else signal.SIG_DFL)

    def reason(self) -> str:
        """Why to stop; empty if there is no reason."""
        if self._file is not None and not self._reason:
            now = time.monotonic()
            if now >= self._next_look:
                self._next_look = now + 1.0
                if self._file.exists():
                    self._file.unlink(missing_ok=True)
                    self._reason = f"the file {self._file} was there"
        return self._reason

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        self._reason = f"signal {signal.Signals(number).name}"


@contextlib.contextmanager
def announced(what: str, logger: logging.Logger, *, seconds_between: float = 15.0) -> Iterator[None]:
    """Say what is being waited for, how long it has taken every so often, and how long it took.

    The first word comes after half a second, so that what is quick stays silent.
    """
    start = time.monotonic()
    done = threading.Event()

    def speak() -> None:
        if done.wait(0.5):
            return
        logger.info("%s ...", what)
        while not done.wait(seconds_between):
            logger.info("%s: %.0f s so far", what, time.monotonic() - start)

    speaker = threading.Thread(target=speak, daemon=True, name=what)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()
    logger.info("%s took %.1f s", what, time.monotonic() - start)
