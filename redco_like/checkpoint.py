"""Checkpoints: saved in the background, restored on any mesh, refused with a reason when damaged or of another model.

    store = CheckpointStore("runs/lm/checkpoints", keep=2, best_metric="eval/loss")
    store.save(step, state, metrics={"eval/loss": 2.1}, plan_json=plan.to_json(), data_state=loader.state(step))
    state = store.restore(abstract_state)        # leaves say shape, dtype and sharding: those wanted, not those saved

The only module that touches orbax. A state is stored as a flat table from path to array, beside JSON metadata that
lists the table: what a checkpoint holds is compared with what is wanted before an array is read.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from sharding_rules import tree_paths

FORMAT = 1
_FILES = "files.json"
_SET_ASIDE = "set-aside"
_SHOWN = 6

logger = logging.getLogger("redco_like.checkpoint")


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, or holds another model."""


class CheckpointStore:
    """The checkpoints of one run in one folder.

    Args:
        folder: created if missing. In a run of several processes, one that all of them see.
        keep: number of latest checkpoints kept.
        best_metric: name of the metric whose best checkpoint is kept as well.
        best_mode: whether less or more of the metric is better.
        asynchronous: write in the background; `save` returns when the arrays are copied off the devices.

    Steps that another run left in the folder and that this run did not restore from are never mixed with this run's:
    the first save moves them to the subfolder `set-aside`.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        asynchronous: bool = True,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep}; at least the latest checkpoint is kept")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode={best_mode!r}; write 'min' or 'max'")
        # Orbax takes half a second to import: not paid by the planner.
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        self.folder = pathlib.Path(folder).absolute()
        self._best_metric, self._best_mode = best_metric, best_mode
        self._ocp = ocp
        self._metrics: dict[int, dict[str, float | None]] = {}
        self._mine: set[int] = set()
        self._unsealed: set[int] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            # Saves that were cut short. Orbax would do it in a thread, whose traceback covers that of a run that fails.
            for path in self.folder.iterdir():
                if ocp.utils.TMP_DIR_SUFFIX in path.name:
                    shutil.rmtree(path, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep), _KeepBest(self)]
                ),
                enable_async_checkpointing=asynchronous,
            ),
        )
        for step in self.steps():
            self._metrics[step] = self._metrics_of(step)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, Any] | None = None,
        plan_json: str | None = None,
        data_state: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save a state. Every process calls it; the state may be donated as soon as it returns.

        Args:
            step: optimizer steps done; names the checkpoint.
            state: tree of arrays; typed PRNG keys and numbers included.
            metrics: numbers that belong to this state; `best_metric` is looked up here.
            plan_json: the plan in use (`Plan.to_json`).
            data_state: where the input pipeline is (`DataLoader.state`).

        Returns:
            False if this run has saved this step already.
        """
        self._seal()
        if step in self._mine and step in self.steps() and step == max(self._mine):
            return False
        self._set_aside([other for other in self.steps() if other not in self._mine or other >= step])
        table = _flatten(state)
        self._metrics[step] = _finite(metrics or {})
        record = {
            "format": FORMAT,
            "step": step,
            "unix_seconds": time.time(),
            "metrics": self._metrics[step],
            "plan": None if plan_json is None else json.loads(plan_json),
            "data_state": None if data_state is None else dict(data_state),
            "versions": {name: _version(name) for name in ("redco-like", "jax", "flax", "optax", "orbax-checkpoint")},
            "process_count": jax.process_count(),
            "arrays": {path: _describe(leaf) for path, leaf in table.items()},
        }
        args = self._ocp.args
        arrays = {path: _storable(leaf) for path, leaf in table.items()}
        self._manager.save(
            step, args=args.Composite(state=args.PyTreeSave(arrays), metadata=args.JsonSave(record)), force=True
        )
        self._mine.add(step)
        self._unsealed.add(step)
        return True

    def wait(self) -> None:
        """Wait until the last save is on disk; raise what went wrong with it."""
        self._manager.wait_until_finished()
        self._seal()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order (one that is being written counts)."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best `best_metric`; None if no checkpoint has a finite one."""
        return self._best(self.steps())

    def damage(self, step: int) -> str:
        """Say which file of a checkpoint is missing or cut off; empty if all are whole."""
        folder = self.folder / str(step)
        if not folder.is_dir():
            return "it is not there"
        try:
            sizes = json.loads((folder / _FILES).read_text())
        except FileNotFoundError:
            # The process was killed after the commit and before the list was written: look at what must be there.
            sizes = dict.fromkeys(("metadata/metadata", "state/_METADATA", "state/manifest.ocdbt"))
        except json.JSONDecodeError:
            return f"{_FILES} is cut off"
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                return f"the file {name} is missing"
            if size is not None and file.stat().st_size != size:
                return f"the file {name} has {file.stat().st_size} bytes instead of {size}"
        return ""

    def metadata(self, step: int | Literal["best"] | None = None) -> dict[str, Any]:
        """What was saved beside the arrays: step, metrics, plan, data_state, versions, arrays (path -> shape, dtype).

        Raises:
            CheckpointError: no such checkpoint, or its metadata cannot be read.
        """
        step = self._resolve(step)
        try:
            restored = self._manager.restore(step, args=self._ocp.args.Composite(metadata=self._ocp.args.JsonRestore()))
            record = restored["metadata"]
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, f"its metadata cannot be read ({error})") from error
        if record.get("format") != FORMAT:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} has format {record.get('format')!r}; this version reads {FORMAT}"
            )
        return record

    def restore(self, abstract_state: Any, step: int | Literal["best"] | None = None, *, prefix: str = "") -> Any:
        """Read a state onto the devices that `abstract_state` names, whatever mesh it was saved from.

        Args:
            abstract_state: tree of `ShapeDtypeStruct` with shardings (arrays pass too). Without a sharding an array
                goes to the first device; numpy arrays stay on the host. Floats are cast to the wanted dtype.
            step: default the latest.
            prefix: read only a part of what was saved, such as `"params"`.

        Raises:
            CheckpointError: no such checkpoint; it is damaged (the last whole one is named); it holds another model
                (the first paths that differ are named).
        """
        step = self._resolve(step)
        self.wait()
        damage = self.damage(step)
        if damage:
            raise self._damaged(step, damage)
        record = self.metadata(step)
        wanted = {_join(prefix, path): leaf for path, leaf in _flatten(abstract_state).items()}
        self._compare(step, record["arrays"], {path: _describe(leaf) for path, leaf in wanted.items()}, prefix)
        targets = {path: _target(leaf) for path, leaf in wanted.items()}
        ocp = self._ocp
        restore_args = {path: _restore_args(ocp, target) for path, target in targets.items()}
        args = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args, partial_restore=bool(prefix))
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        except Exception as error:  # orbax raises a bare Exception for arrays that it cannot read
            raise self._damaged(step, f"its arrays cannot be read ({str(error).splitlines()[0][:200]})") from error
        leaves = [_loaded(leaf, restored[path], record["arrays"][path]) for path, leaf in wanted.items()]
        if not prefix:
            self._mine |= {other for other in self.steps() if other <= step}
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _resolve(self, step: int | Literal["best"] | None) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"there is no checkpoint in {self.folder}")
        if step is None:
            return steps[-1]
        if step == "best":
            best = self._best(steps)
            if best is None:
                raise CheckpointError(f"no checkpoint in {self.folder} has a finite metric {self._best_metric!r}")
            return best
        if step not in steps:
            raise CheckpointError(f"there is no checkpoint of step {step} in {self.folder}; there are {steps}")
        return step

    def _best(self, steps: Sequence[int]) -> int | None:
        if self._best_metric is None:
            return None
        scored = {step: self._metrics.get(step, {}).get(self._best_metric) for step in steps}
        known = {step: value for step, value in scored.items() if value is not None}
        if not known:
            return None
        sign = 1 if self._best_mode == "min" else -1
        return min(known, key=lambda step: (sign * known[step], step))

    def _metrics_of(self, step: int) -> dict[str, float | None]:
        try:
            return self.metadata(step)["metrics"]
        except CheckpointError as error:
            logger.warning("%s", error)
            return {}

    def _damaged(self, step: int, what: str) -> CheckpointError:
        whole = [other for other in self.steps() if other < step and not self.damage(other)]
        advice = f"restore step {whole[-1]}, the last whole one before it" if whole else "no earlier one is whole"
        return CheckpointError(f"checkpoint {step} in {self.folder} is damaged: {what}; {advice}")

    def _compare(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> None:
        if prefix:
            saved = {path: form for path, form in saved.items() if path == prefix or path.startswith(f"{prefix}/")}
        lines = [
            f"{path}: saved {_form(saved.get(path))}, wanted {_form(wanted.get(path))}"
            for path in sorted(saved.keys() | wanted.keys())
            if not _compatible(saved.get(path), wanted.get(path))
        ]
        if lines:
            more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} holds another model: {len(lines)} arrays differ\n  "
                + "\n  ".join(lines[:_SHOWN])
                + more
                + "\nGive this model a folder of its own, or build the model that was saved."
            )

    def _seal(self) -> None:
        """Write the list of files of every finished save, by which `damage` knows a whole checkpoint."""
        for step in sorted(self._unsealed):
            folder = self.folder / str(step)
            if not folder.is_dir():
                continue  # still being written, or already deleted
            self._unsealed.discard(step)
            if jax.process_index() == 0:
                files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _FILES)
                sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
                (folder / _FILES).write_text(json.dumps(sizes, indent=0))

    def _set_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        self._manager.wait_until_finished()
        target = self.folder / _SET_ASIDE / time.strftime("%Y%m%d-%H%M%S")
        logger.warning("%s holds steps %s of another run: moved to %s", self.folder, list(steps), target)
        if jax.process_index() == 0:
            target.mkdir(parents=True, exist_ok=True)
            for step in steps:
                if (self.folder / str(step)).is_dir():
                    (self.folder / str(step)).rename(_free_name(target / str(step)))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints of another run set aside")
        self._manager.reload()
        for step in steps:
            self._metrics.pop(step, None)
            self._mine.discard(step)


class _KeepBest:
    """Orbax preservation policy: keep the checkpoint with the best metric."""

    def __init__(self, store: CheckpointStore):
        self._store = store

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        best = self._store._best([info.step for info in checkpoints])
        return [info.step == best for info in checkpoints]


def _flatten(state: Any) -> dict[str, Any]:
    paths = [path or "value" for path in tree_paths(state)]
    if len(set(paths)) != len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"the state has two leaves at the path {twice[0]!r}; rename one")
    return dict(zip(paths, jax.tree.leaves(state), strict=True))


def _join(prefix: str, path: str) -> str:
    if not prefix:
        return path
    return prefix if path == "value" else f"{prefix}/{path}"


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"shape": list(np.shape(leaf)), "dtype": str(_dtype(leaf))}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        record["key_impl"] = str(jax.random.key_impl(leaf))
    return record


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _form(record: Mapping[str, Any] | None) -> str:
    return "nothing" if record is None else f"{record['dtype']}{record['shape']}"


def _compatible(saved: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None) -> bool:
    if saved is None or wanted is None or saved["shape"] != wanted["shape"]:
        return False
    return saved["dtype"] == wanted["dtype"] or (_is_float(saved["dtype"]) and _is_float(wanted["dtype"]))


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def _storable(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind in "OUS":
        raise ValueError(f"the state holds a {type(leaf).__name__}, {leaf!r:.60}; only arrays and numbers are saved")
    return array


def _target(leaf: Any) -> Any:
    """What to ask orbax for: an array of the devices (with its sharding) or of the host."""
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array):
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
        form = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        data = jax.eval_shape(jax.random.key_data, form) if _is_key(leaf) else form
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return np.empty(np.shape(leaf), _dtype(leaf))


def _restore_args(ocp: Any, target: Any) -> Any:
    if isinstance(target, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=target.dtype)
    return ocp.ArrayRestoreArgs(sharding=target.sharding, global_shape=target.shape, dtype=target.dtype)


def _loaded(wanted: Any, array: Any, record: Mapping[str, Any]) -> Any:
    if _is_key(wanted):
        return jax.random.wrap_key_data(array, impl=record["key_impl"])
    if isinstance(wanted, bool | int | float):
        return type(wanted)(array)
    return array


def _finite(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    values = {name: float(value) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _free_name(path: pathlib.Path) -> pathlib.Path:
    names = (path, *(path.with_name(f"{path.name}-{i}") for i in range(1, 1000)))
    return next(name for name in names if not name.exists())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
