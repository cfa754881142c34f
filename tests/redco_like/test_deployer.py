"""Start-up: what a launcher's environment means, what is refused and in which words, keys, folders, logs."""

import logging
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from redco_like.deployer import Deployer
from redco_like.launch import (
    DeployError,
    Launch,
    detect_launch,
    resolve_launch,
    start_distributed,
    within_deadline,
)


@pytest.fixture
def deployer(tmp_path):
    with Deployer(tmp_path / "run", seed=7) as deployer:
        yield deployer


def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_one_process_sees_all_devices(deployer):
    assert (deployer.process_index, deployer.process_count, deployer.is_first) == (0, 1, True)
    assert deployer.devices == jax.devices()
    assert deployer.local_devices == jax.local_devices()
    assert f"{len(jax.devices())} cpu devices" in deployer.describe()


def test_keys_depend_on_seed_and_name_only(tmp_path):
    def key(seed, name, *before):
        with Deployer(seed=seed) as deployer:
            for other in before:
                deployer.rng(other)
            return jax.random.key_data(deployer.rng(name)).tolist()

    assert key(0, "init") == key(0, "init", "data", "eval")
    assert len({tuple(key(seed, name)) for seed in (0, 1) for name in ("init", "data")}) == 4


def test_subfolders_stay_inside_the_workdir(deployer):
    assert deployer.subfolder("actor/checkpoints").is_dir()
    assert deployer.subfolder("actor").parent == deployer.workdir
    with pytest.raises(ValueError, match="not inside"):
        deployer.subfolder("../elsewhere")
    with Deployer() as bare, pytest.raises(ValueError, match="without a workdir"):
        bare.subfolder("x")


def test_log_file_is_written_and_the_root_logger_left_alone(tmp_path):
    before = (list(logging.getLogger().handlers), logging.getLogger().level)
    with Deployer(tmp_path / "run") as first, Deployer(tmp_path / "other"):
        first.logger.info("hello")
    first.logger.info("after the end")
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count("hello") == 1
    assert "after the end" not in text
    assert first.logger.handlers == []


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DeployError, match="cannot be written"):
        Deployer(tmp_path / "taken")
    assert logging.getLogger("redco_like").handlers == []


def test_users_compilation_cache_is_kept(deployer):
    assert deployer.compile_cache == jax.config.jax_compilation_cache_dir


def test_compilation_cache_is_set_where_there_is_none_at_construction_only(tmp_path):
    program = (
        "import jax, redco_like.deployer as d; assert jax.config.jax_compilation_cache_dir is None\n"
        f"with d.Deployer({str(tmp_path / 'run')!r}) as deployer:\n"
        "    print(deployer.compile_cache, jax.config.jax_compilation_cache_dir)"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    expected = str(tmp_path / "cache" / "redco-like" / "compiled")
    assert done.stdout.split() == [expected, expected], done.stderr


def test_missing_platform_is_named():
    program = "import redco_like.deployer as d; d.Deployer()"
    environment = {"JAX_PLATFORMS": "cuda", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert "JAX finds no device on the platform 'cuda' that JAX_PLATFORMS asks for" in done.stderr


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, None),  # a shell inside an allocation
        (SLURM | {"SLURM_STEP_NODELIST": "n[1-4]"}, Launch("slurm", process_count=4, process_id=2)),
        (SLURM | {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, None),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_MCA_orte_hnp_uri": "x"},
            Launch("open mpi", process_count=2, process_id=1),
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            Launch("open mpi", process_count=2, process_id=1, detection="mpi4py"),
        ),
        ({"PMI_SIZE": "8", "PMI_RANK": "3"}, Launch("mpi", process_count=8, process_id=3, detection="mpi4py")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc"}, Launch("tpu")),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, Launch("kubernetes")),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            Launch("environment", "h:1", 2, 0),
        ),
    ],
)
def test_launch_is_read_from_the_environment(environ, expected):
    assert detect_launch(environ) == expected


@pytest.mark.parametrize(
    ("distributed", "message"),
    [
        ("yes", "write 'auto', True, False or a dict"),
        ({"coordinator_address": "h:1"}, "it needs"),
        ({"coordinator_address": "h", "num_processes": 2, "process_id": 0}, "write it as host:port"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "not one of 2 processes"),
    ],
)
def test_impossible_arguments_are_refused(distributed, message):
    with pytest.raises(ValueError, match=message):
        start_distributed(resolve_launch(distributed), 1.0)


def test_absent_coordinator_is_named_within_the_deadline():
    where, begin = address(), time.monotonic()
    message = rf"process 1 of 2 waited 0.5 s for the coordinator \(process 0\) at {where}: .*refused"
    with pytest.raises(DeployError, match=message):
        start_distributed(Launch("explicit", where, 2, 1), 0.5)
    assert time.monotonic() - begin < 5


def test_absent_processes_are_named_within_the_deadline():
    where, begin = address(), time.monotonic()
    with pytest.raises(DeployError, match=f"waited 0.5 s at {where}; not there: process 1, process 2"):
        start_distributed(Launch("explicit", where, 3, 0), 0.5)
    assert time.monotonic() - begin < 5


def test_taken_port_is_named():
    with socket.create_server(("", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(DeployError, match=f"cannot listen on {where}"):
            start_distributed(Launch("explicit", where, 2, 0), 1.0)


def test_processes_that_disagree_are_refused_on_both_sides():
    where, errors = address(), {}

    def start(launch):
        try:
            start_distributed(launch, 20.0)
        except DeployError as error:
            errors[launch.process_id] = str(error)

    launches = (Launch("explicit", where, 2, 0), Launch("explicit", where, 3, 1))
    threads = [threading.Thread(target=start, args=(launch,)) for launch in launches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "process 1 at 127.0.0.1 counts 3 processes, process 0 counts 2" in errors[0]
    assert errors[1] == f"process 0 does not start: {errors[0]}"


def test_a_stranger_on_the_port_does_not_stop_the_roll_call():
    where, errors = address(), []

    def start():
        try:
            start_distributed(Launch("explicit", where, 2, 0), 2.0)
        except DeployError as error:
            errors.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    host, port = where.split(":")
    for _ in range(50):
        try:
            with socket.create_connection((host, int(port)), timeout=1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n")
            break
        except OSError:
            time.sleep(0.05)
    thread.join(30)
    assert "not there: process 1" in errors[0]


def test_several_processes_after_a_device_was_used_is_explained():
    jax.devices()
    where, done = address(), threading.Event()

    def other():
        with pytest.raises((DeployError, RuntimeError)):
            start_distributed(Launch("explicit", where, 2, 1), 10.0)
        done.set()

    threading.Thread(target=other, daemon=True).start()
    with pytest.raises(DeployError, match="make the Deployer before anything that touches a device"):
        start_distributed(Launch("explicit", where, 2, 0), 10.0)
    assert done.wait(10)


def test_within_deadline_returns_raises_and_gives_up():
    assert within_deadline("a sum", 5, sum, [1, 2]) == 3
    with pytest.raises(ZeroDivisionError):
        within_deadline("a quotient", 5, lambda: 1 / 0)
    with pytest.raises(DeployError, match=r"waited 0\.1 s for a sleeper"):
        within_deadline("a sleeper", 0.1, time.sleep, 1)
