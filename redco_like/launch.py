"""Finding the other processes of a run: how this one was launched, and a start that names what it waits for.

    launch = resolve_launch("auto")                 # from SLURM, MPI, a TPU pod, Kubernetes, or JAX_* variables
    if launch is not None:
        start_distributed(launch, deadline_seconds=300)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

logger = logging.getLogger("redco_like")
_BY_HAND = "distributed=dict(coordinator_address='host:port', num_processes=N, process_id=i)"


class DeployError(RuntimeError):
    """The run cannot start: no device, a process that is not there, a folder that cannot be written."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started as one of several.

    Attributes:
        kind: "explicit", "environment", "slurm", "open mpi", "mpi", "tpu" or "kubernetes".
        coordinator_address: host:port of process 0; None if JAX finds it.
        process_count: None if JAX finds it.
        process_id: None if JAX finds it.
        detection: what to pass as JAX's `cluster_detection_method`.
    """

    kind: str
    coordinator_address: str | None = None
    process_count: int | None = None
    process_id: int | None = None
    detection: str | None = None


def detect_launch(environ: Mapping[str, str]) -> Launch | None:
    """Tell from the environment whether this process is one of several; None if it runs alone.

    Only decides whether to ask JAX: addresses and numbers come from JAX's own detection.

    >>> detect_launch({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}).kind
    'slurm'
    """
    if "JAX_COORDINATOR_ADDRESS" in environ and "JAX_NUM_PROCESSES" in environ and "JAX_PROCESS_ID" in environ:
        count, index = int(environ["JAX_NUM_PROCESSES"]), int(environ["JAX_PROCESS_ID"])
        return Launch("environment", environ["JAX_COORDINATOR_ADDRESS"], count, index)
    if _more_than_one(environ.get("OMPI_COMM_WORLD_SIZE")):
        count, index = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ.get("OMPI_COMM_WORLD_RANK", 0))
        # Open MPI 5 no longer says where rank 0 is; mpi4py does.
        known = "OMPI_MCA_orte_hnp_uri" in environ
        return Launch("open mpi", process_count=count, process_id=index, detection=None if known else "mpi4py")
    # Without SLURM_STEP_NODELIST this is a shell inside an allocation and not a task that srun started.
    if "SLURM_STEP_NODELIST" in environ and _more_than_one(environ.get("SLURM_NTASKS")):
        count, index = int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_PROCID", 0))
        return Launch("slurm", process_count=count, process_id=index)
    if _more_than_one(environ.get("PMI_SIZE")):
        count, index = int(environ["PMI_SIZE"]), int(environ.get("PMI_RANK", 0))
        return Launch("mpi", process_count=count, process_id=index, detection="mpi4py")
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if "MEGASCALE_COORDINATOR_ADDRESS" in environ or "," in hosts:
        return Launch("tpu")
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Launch("kubernetes")
    return None


def resolve_launch(distributed: Literal["auto"] | bool | Mapping[str, Any]) -> Launch | None:
    """Turn the `distributed` argument of `Deployer` into a launch; None to run alone."""
    if distributed is False:
        return None
    if isinstance(distributed, Mapping):
        wanted = {"coordinator_address", "num_processes", "process_id"}
        if set(distributed) != wanted:
            raise ValueError(f"distributed has the fields {sorted(distributed)}; it needs {sorted(wanted)}")
        address, count, index = (distributed[k] for k in ("coordinator_address", "num_processes", "process_id"))
        return Launch("explicit", str(address), int(count), int(index))
    if distributed not in ("auto", True):
        raise ValueError(f"distributed={distributed!r}; write 'auto', True, False or a dict")
    launch = detect_launch(os.environ)
    if distributed is True and launch is None and not jax.distributed.is_initialized():
        return Launch("unknown")
    return launch


def start_distributed(launch: Launch, deadline_seconds: float) -> None:
    """Call `jax.distributed.initialize`, after the checks that it does not make.

    Raises:
        DeployError: the coordinator or the other processes are not there within the deadline, or cannot be found.
    """
    begin = time.monotonic()
    if launch.coordinator_address is not None:
        _check_coordinator(launch, deadline_seconds)
    if launch.detection == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        raise DeployError(
            f"started by {launch.kind} as one of {launch.process_count} processes, and the package mpi4py that finds "
            f"the others is not installed: pip install mpi4py, or pass {_BY_HAND}"
        )
    who = f"process {launch.process_id}" if launch.process_id is not None else "this process"
    others = f"all {launch.process_count} processes" if launch.process_count else "the other processes"
    logger.info("%s waits for %s (%s)", who, others, launch.kind)
    try:
        jax.distributed.initialize(
            launch.coordinator_address,
            launch.process_count if launch.coordinator_address else None,
            launch.process_id if launch.coordinator_address else None,
            cluster_detection_method=launch.detection or ("deactivate" if launch.coordinator_address else None),
            initialization_timeout=max(1, round(deadline_seconds - (time.monotonic() - begin))),
        )
    except ValueError as error:
        raise DeployError(
            f"JAX cannot tell which processes this run has ({launch.kind}): {error} Pass {_BY_HAND}, or "
            "distributed=False to run alone"
        ) from error
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise DeployError(
                "make the Deployer before anything that touches a device (jax.devices, jax.numpy, ...): the processes "
                "of a run must find each other first"
            ) from error
        raise DeployError(
            f"{who} waited {time.monotonic() - begin:.0f} s for {others} ({launch.kind}, coordinator "
            f"{launch.coordinator_address or 'found by JAX'}): {str(error).splitlines()[0]}"
        ) from error


def _check_coordinator(launch: Launch, deadline_seconds: float) -> None:
    """Reach process 0 before JAX does: its own failure to do so ends the process without a word on what was missing."""
    address, count, index = launch.coordinator_address or "", launch.process_count or 0, launch.process_id or 0
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator_address={address!r}; write it as host:port")
    if not 0 <= index < count:
        raise ValueError(f"process_id={index} is not one of {count} processes")
    host = host.strip("[]")
    if index == 0:
        _check_port_free(int(port), address)
        return
    begin, reason = time.monotonic(), "no answer"
    while (left := deadline_seconds - (time.monotonic() - begin)) > 0:
        try:
            socket.create_connection((host, int(port)), timeout=min(5.0, max(left, 0.1))).close()
            return
        except OSError as error:
            reason = str(error)
            time.sleep(min(0.2, max(left, 0.0)))
    raise DeployError(
        f"process {index} of {count} waited {deadline_seconds:g} s for the coordinator (process 0) at {address}: "
        f"{reason}. Is process 0 running, is the address the one it listens on, and is the port open between the hosts?"
    )


def _check_port_free(port: int, address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DeployError(f"process 0 cannot listen on {address}: {error}; take another port") from error


def within_deadline(what: str, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that may wait for others, and give up after a time.

    Raises:
        DeployError: it took longer; names `what` was waited for.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((function(*args), None))
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            answers.put((None, error))

    threading.Thread(target=call, daemon=True, name=f"waits for {what}").start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise DeployError(f"waited {seconds:g} s for {what}; a process is missing, stuck, or has failed") from None
    if error is not None:
        raise error
    return answer


def _more_than_one(text: str | None) -> bool:
    return text is not None and text.isdigit() and int(text) > 1
