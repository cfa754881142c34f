"""Start-up of a run: processes, devices, folders, logs, random keys. What is wrong is found here, within a deadline.

    with Deployer("runs/lm", seed=0) as deployer:       # under srun, mpirun, a TPU pod, or alone: the same line
        trainer = Trainer(deployer, ...)

Several trainers may share one Deployer; each takes its own subfolder and its own keys, by name.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pathlib
import re
import secrets
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from redco_like.launch import DeployError, resolve_launch, start_distributed, within_deadline

LOGGER_NAME = "redco_like"
_VIRTUAL_CPU_THREADS = 32

logger = logging.getLogger(LOGGER_NAME)


class Deployer:
    """The processes, devices and folders of a run.

    Args:
        workdir: folder of the run; None writes nothing.
        seed: from which every key of the run comes.
        distributed: "auto" asks the environment whether there are several processes (SLURM, MPI, TPU pods, Kubernetes,
            or JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID); True insists that there are; False
            runs alone; a dict gives `coordinator_address`, `num_processes` and `process_id`.
        compile_cache: where compiled programs are kept between runs: True for the user's cache folder, a path, or
            False. A folder that JAX has been given already is left as it is.
        deadline_seconds: how long to wait for other processes.
        log_level: of this package's logger, the root logger being left alone.

    Raises:
        ValueError: arguments that do not make sense.
        DeployError: what the run needs is not there; says what was waited for, and for how long.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path | None = None,
        seed: int = 0,
        *,
        distributed: Literal["auto"] | bool | Mapping[str, Any] = "auto",
        compile_cache: bool | str | pathlib.Path = True,
        deadline_seconds: float = 300.0,
        log_level: int | str = logging.INFO,
    ):
        if deadline_seconds <= 0:
            raise ValueError(f"deadline_seconds={deadline_seconds}; it must be above 0")
        self.seed = seed
        self.deadline_seconds = deadline_seconds
        self.workdir = None if workdir is None else pathlib.Path(workdir).absolute()
        self.workdir_shared = True
        self._handlers: list[logging.Handler] = []
        self._started_distributed = False
        logger.setLevel(log_level)
        if not logger.hasHandlers():  # else the user has said where logs go
            self._add_handler(logging.StreamHandler(sys.stderr))
            logger.propagate = False  # libraries that set up the root logger later would print each line again
        try:
            launch = resolve_launch(distributed)
            if launch is not None and not jax.distributed.is_initialized():
                _spare_cpu_threads(several_processes=True)
                start_distributed(launch, deadline_seconds)
                self._started_distributed = True
            _spare_cpu_threads()
            self.devices = _devices()
            self.process_index, self.process_count = jax.process_index(), jax.process_count()
            self._open_log_file()
            self._check_processes()
            self._check_workdir_shared()
            self.compile_cache = _set_compile_cache(compile_cache, self.workdir)
        except BaseException:
            self.close()
            raise
        logger.info("%s", self.describe())

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.process_index == 0

    @property
    def local_devices(self) -> list[Any]:
        return [device for device in self.devices if device.process_index == self.process_index]

    @property
    def logger(self) -> logging.Logger:
        return logger

    def describe(self) -> str:
        """One line: versions, processes, devices, folders."""
        kinds = sorted({device.device_kind for device in self.devices})
        processes = f"{self.process_count} processes, " if self.process_count > 1 else ""
        folder = "no workdir" if self.workdir is None else f"workdir {self.workdir}"
        if self.process_count > 1 and self.workdir is not None:
            folder += " (shared by all processes)" if self.workdir_shared else " (NOT shared by all processes)"
        cache = f", compiled programs kept in {self.compile_cache}" if self.compile_cache else ""
        devices = f"{len(self.devices)} {self.devices[0].platform} devices ({', '.join(kinds)})"
        return f"redco-like {_version()}, jax {jax.__version__}, {processes}{devices}, {folder}{cache}"

    def rng(self, name: str) -> jax.Array:
        """The typed key that belongs to a name: the same in every process, whatever else was asked for before."""
        return jax.random.fold_in(jax.random.key(self.seed), np.uint32(zlib.crc32(name.encode())))

    def subfolder(self, name: str) -> pathlib.Path:
        """Create a folder in the workdir.

        Raises:
            ValueError: there is no workdir, or the name leads out of it.
        """
        if self.workdir is None:
            raise ValueError(f"there is no folder for {name!r}: this Deployer was made without a workdir")
        folder = self.workdir / name
        if self.workdir not in folder.resolve().parents:
            raise ValueError(f"the folder {name!r} is not inside {self.workdir}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def barrier(self, name: str) -> None:
        """Wait until every process has come here.

        Raises:
            DeployError: some did not within the deadline.
        """
        if self.process_count > 1:
            self._together(f"all {self.process_count} processes at {name!r}", multihost_utils.sync_global_devices, name)

    def close(self) -> None:
        """Leave the group of processes and close the log."""
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        if self._handlers:
            logger.propagate = True
        self._handlers = []
        if self._started_distributed:
            self._started_distributed = False
            jax.distributed.shutdown()

    def __enter__(self) -> Deployer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_handler(self, handler: logging.Handler, prefix: str = "") -> None:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        self._handlers.append(handler)

    def _open_log_file(self) -> None:
        prefix = f"[{self.process_index}] " if self.process_count > 1 else ""
        for handler in self._handlers:  # the terminal hears of the other processes only when something is wrong
            handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
            handler.setLevel(logging.NOTSET if self.is_first else logging.WARNING)
        if self.workdir is None:
            return
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.workdir):
                pass
        except OSError as error:
            raise DeployError(f"the workdir {self.workdir} cannot be written: {error}") from error
        name = "log.txt" if self.is_first else f"log-{self.process_index}.txt"
        self._add_handler(logging.FileHandler(self.workdir / name), prefix)

    def _check_processes(self) -> None:
        if self.process_count == 1:
            return
        counts = [0] * self.process_count
        for device in self.devices:
            counts[device.process_index] += 1
        if len(set(counts)) > 1:
            raise DeployError(f"processes have different numbers of devices: {dict(enumerate(counts))}")
        versions = self._gather("the JAX versions of all processes", _version_numbers(jax.__version__))
        texts = [".".join(map(str, row.tolist())) for row in versions]
        if len(set(texts)) > 1:
            raise DeployError(f"processes run different versions of JAX: {dict(enumerate(texts))}")

    def _check_workdir_shared(self) -> None:
        if self.workdir is None or self.process_count == 1:
            return
        token = int(self._gather("a token from process 0", np.asarray([secrets.randbits(31)], np.int32))[0, 0])
        mark = self.workdir / f".shared-{token}"
        if self.is_first:
            mark.touch()
        self.barrier("the mark in the workdir is written")
        seen = self._gather("who sees the workdir of process 0", np.asarray([_appears(mark)], np.int32))
        if self.is_first:
            mark.unlink(missing_ok=True)
        self.workdir_shared = bool(seen.all())
        if not self.workdir_shared:
            blind = [i for i, row in enumerate(seen) if not row[0]]
            logger.warning(
                "the workdir %s of process 0 is not seen by processes %s: checkpoints need a folder that all share",
                self.workdir,
                blind,
            )

    def _gather(self, what: str, values: np.ndarray) -> np.ndarray:
        gathered = self._together(what, multihost_utils.process_allgather, values)
        return np.asarray(gathered).reshape(self.process_count, -1)

    def _together(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        return within_deadline(what, self.deadline_seconds, function, *args)


def _spare_cpu_threads(*, several_processes: bool = False) -> None:
    """Give virtual CPU devices enough threads.

    With fewer threads than devices, programs that run ahead wait for each other forever in their collectives (seen with
    8 devices on 2 cores). The variable is read when the CPU client is made: too late if a device was used before.
    """
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    virtual = max(int(flag.group(1)) if flag else 1, getattr(jax.config, "jax_num_cpu_devices", None) or 1)
    if (virtual > 1 or several_processes) and (os.cpu_count() or 1) < _VIRTUAL_CPU_THREADS:
        os.environ.setdefault("PJRT_NPROC", str(_VIRTUAL_CPU_THREADS))


def _devices() -> list[Any]:
    asked = os.environ.get("JAX_PLATFORMS") or getattr(jax.config, "jax_platforms", None)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for a platform without its plugin (jax 0.10)
        where = f" on the platform {asked!r} that JAX_PLATFORMS asks for" if asked else ""
        raise DeployError(
            f"JAX finds no device{where}. {str(error).partition(chr(10))[0]} Install JAX for the platform, such as "
            "pip install 'jax[cuda12]' or 'jax[tpu]', or unset JAX_PLATFORMS"
        ) from error
    if not devices:
        raise DeployError(f"JAX finds no device on the platform {asked or 'that it chose'}")
    if devices[0].platform == "cpu" and not asked and pathlib.Path("/dev/nvidia0").exists():
        logger.warning("this machine has an NVIDIA GPU, but JAX runs on the CPU: pip install 'jax[cuda12]'")
    return list(devices)


def _set_compile_cache(wanted: bool | str | pathlib.Path, workdir: pathlib.Path | None) -> str | None:
    present = getattr(jax.config, "jax_compilation_cache_dir", None)
    if present or wanted is False:
        return present
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    candidates = [pathlib.Path(base) / "redco-like" / "compiled"] if wanted is True else [pathlib.Path(wanted)]
    if workdir is not None:
        candidates.append(workdir / "compiled")
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            logger.warning("compiled programs cannot be kept in %s: %s", folder, error)
            continue
        jax.config.update("jax_compilation_cache_dir", str(folder))
        return str(folder)
    return None


def _appears(path: pathlib.Path, seconds: float = 5.0) -> bool:
    """Whether a file is there, given the time that network file systems take to show it."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _version_numbers(version: str) -> np.ndarray:
    numbers = [int(n) for n in re.findall(r"\d+", version)][:4]
    return np.asarray(numbers + [0] * (4 - len(numbers)), np.int32)


def _version() -> str:
    try:
        return importlib.metadata.version("redco-like")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
