"""Finding the other processes of a run: how this one was launched, and a start that names what it waits for.

launch = resolve_launch("auto")                 # from SLURM, MPI, a TPU pod, Kubernetes, or JAX_* variables
if launch is not None:
    start_distributed(launch, deadline_seconds=300)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
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
_GO = "all are here"
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
    who = f"process {launch.process_id}" if launch.process_id is not None else "this process"
    others = f"all {launch.process_count} processes" if launch.process_count else "the other processes"
    logger.info("%s waits for %s (%s), at most %g s", who, others, launch.kind, deadline_seconds)
    begin = time.monotonic()
    if launch.coordinator_address is not None:
        _roll_call(launch, deadline_seconds)
    if launch.detection == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        raise DeployError(
            f"started by {launch.kind} as one of {launch.process_count} processes, and the package mpi4py that finds "
            f"the others is not installed: pip install mpi4py, or pass {_BY_HAND}"
        )
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


def _roll_call(launch: Launch, deadline_seconds: float) -> None:
    """Let every process report to process 0 before JAX starts, and go on only when all are there.

    JAX itself aborts the process when one is missing, without saying which.
    """
    address, count, index = launch.coordinator_address or "", launch.process_count or 0, launch.process_id or 0
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator_address={address!r}; write it as host:port")
    if not 0 <= index < count:
        raise ValueError(f"process_id={index} is not one of {count} processes")
    deadline = time.monotonic() + deadline_seconds
    if index == 0:
        _call_the_roll(address, int(port), count, deadline, deadline_seconds)
    else:
        _report((host.strip("[]"), int(port)), index, count, deadline, deadline_seconds)


def _call_the_roll(address: str, port: int, count: int, deadline: float, deadline_seconds: float) -> None:
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
    except OSError as error:
        raise DeployError(f"process 0 cannot listen on {address}: {error}; take another port") from error
    present: dict[int, socket.socket] = {}
    problem = ""
    with server:
        while len(present) < count - 1 and not problem:
            missing = [i for i in range(1, count) if i not in present]
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, (where, *_) = server.accept()
                where = where.removeprefix("::ffff:")
            except TimeoutError:
                problem = (
                    f"process 0 of {count} waited {deadline_seconds:g} s at {address}; not there: "
                    f"{', '.join(f'process {i}' for i in missing[:8])}{' and more' if len(missing) > 8 else ''}"
                )
                break
            hello = _read_line(connection, min(deadline, time.monotonic() + 5.0))
            try:
                said = json.loads(hello)
                other, of, version = int(said["process"]), said["of"], said["jax"]
            except (ValueError, TypeError, KeyError):
                connection.close()  # a stranger, such as a port scan
                continue
            if of != count:
                problem = f"process {other} at {where} counts {of} processes, process 0 counts {count}"
            elif version != jax.__version__:
                problem = f"process {other} at {where} runs jax {version}, process 0 runs jax {jax.__version__}"
            elif other not in missing:
                problem = f"two processes call themselves process {other}; the second one is at {where}"
            present[other if not problem else -1] = connection
        for connection in present.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem or _GO}\n".encode())
                # The other side closes first, so that the port is free for JAX at once.
                _read_line(connection, time.monotonic() + 5.0)
            connection.close()
    if problem:
        raise DeployError(problem)


def _report(peer: tuple[str, int], index: int, count: int, deadline: float, deadline_seconds: float) -> None:
    hello = json.dumps({"process": index, "of": count, "jax": jax.__version__})
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(peer, timeout=max(min(5.0, left), 0.1)) as connection:
                connection.sendall(f"{hello}\n".encode())
                # Process 0 may give up a moment after this one: leave it time to say why.
                answer = _read_line(connection, deadline + 2.0)
        except OSError as error:
            reason = str(error)
            time.sleep(min(0.2, max(left, 0.0)))
            continue
        if answer == _GO:
            return
        if answer:
            raise DeployError(f"process 0 does not start: {answer}")
        reason = "it closed the connection"
        time.sleep(0.2)
    raise DeployError(
        f"process {index} of {count} waited {deadline_seconds:g} s for the coordinator (process 0) at "
        f"{peer[0]}:{peer[1]}: {reason}. Is process 0 running, is the address the one it listens on, and is the port "
        "open between the hosts?"
    )


def _read_line(connection: socket.socket, deadline: float) -> str:
    """Read up to a newline; empty if the other side closes, stalls past the deadline, or says too much."""
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 4096:
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            part = connection.recv(1024)
            if not part:
                return ""
            text += part
    except OSError:
        return ""
    return text.decode(errors="replace").strip()


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
