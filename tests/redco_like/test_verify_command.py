"""`redco-like verify` and `plan --verify`: what is compiled, told, kept and refused; with a compiler, under `aot`."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from hlo_programs import read_case

from redco_like.cli import main
from search import Plan, compiler, hlo
from search.compiler import Cache, Compiled, CompileTimeout, ToolchainMissing
from search.verify import Verification

ROOT = pathlib.Path(__file__).parents[2]
RUN_FILE = '''
"""A network of two layers."""
import jax
import jax.numpy as jnp
import optax


def init_fn(rng):
    first, second = jax.random.split(rng)
    return {"up": jax.random.normal(first, (256, 512)), "down": jax.random.normal(second, (512, 256))}


def loss_fn(params, batch):
    return jnp.square(jax.nn.relu(batch["x"] @ params["up"]) @ params["down"]).mean()


def get_config():
    batch = {"x": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
    return {"loss_fn": loss_fn, "init_fn": init_fn, "optimizer": optax.adam(1e-3), "batch": batch}
'''
VERSIONS = {"jax": "1", "libtpu": "2"}
GIB = 2**30
V100 = 'name = "mine"\ncluster = "8xV100"\n'
CUSTOM = """
name = "custom"
cluster = "v5e:2x4"
[accelerator]
name = "abacus"
"""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("REDCO_LIKE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(RUN_FILE)
    return path


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan of the run file: the file's folder, and the plan's text."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "run.py").write_text(RUN_FILE)
    fix = ("--fix", "fsdp=8,remat=none", "--runners-up", "0")
    argv = ("plan", "--model", folder / "run.py", "--cluster", "v5e:2x4", *fix, "--out", folder / "plan.json")
    assert main([str(arg) for arg in argv]) == 0
    return str(folder), (folder / "plan.json").read_text()


@pytest.fixture
def plan_file(planned, run_file, tmp_path):
    """The plan, of this test's own run file."""
    folder, text = planned
    path = tmp_path / "plan.json"
    path.write_text(text.replace(folder, str(tmp_path)))
    return path


def bare(path):
    """A plan as it is compiled: why it was taken plays no part."""
    return dataclasses.replace(Plan.load(path), reason="")


parse = functools.cache(hlo.parse)  # the same text each time


class FakeCompiler:
    """Stands in for the child: a stored program, and as many bytes as a test says for each plan."""

    def __init__(self, monkeypatch):
        self.plans, self.limits = [], {}
        self.bytes_of = lambda plan: 2 * GIB
        self.hlo = read_case("v5e_fsdp")
        monkeypatch.setattr("redco_like.verify.compile_in_child", self)
        monkeypatch.setattr("redco_like.verify.toolchain", lambda target: dict(VERSIONS))
        monkeypatch.setattr("search.hlo.parse", parse)

    def __call__(self, module, request, target, *, depth, limit_seconds, limit_bytes, tell):
        plan = Plan.from_json(request["plan"])
        self.plans.append(plan)
        self.limits = {"depth": depth, "seconds": limit_seconds, "bytes": limit_bytes}
        tell("compiling")
        said = {"bytes": {"arguments": 1000, "aliased": 900, "results": 0}}
        report = f"Memory Space: default (color=0)\nTotal bytes: {self.bytes_of(plan)} (some)\n"
        return Compiled(self.hlo, report, said, 3.0, 2.0, depth)


@pytest.fixture
def compiler_of(monkeypatch):
    return FakeCompiler(monkeypatch)


# verify.


def test_verify_says_that_it_fits_and_what_moves(run, plan_file, compiler_of):
    code, text, err = run("verify", plan_file)
    assert (code, err) == (0, "")
    for wanted in ("fits: 2.0 GiB per device of 15.8 GiB", "to spare (compiled)", "v5e:2x4, fast", "libtpu 2", "fsdp"):
        assert wanted in text, wanted
    assert compiler_of.limits == {"depth": "fast", "seconds": 1800, "bytes": 16 * GIB}
    assert compiler_of.plans == [bare(plan_file)]


def test_verify_says_what_would_fit_and_exits_1(run, plan_file, compiler_of):
    compiler_of.bytes_of = lambda plan: 16 * GIB
    code, text, err = run("verify", plan_file)
    assert (code, err) == (1, "")
    for wanted in ("does not fit", "too much", "with --set", "next: redco-like verify", " --set "):
        assert wanted in text, wanted
    command = next(line for line in text.splitlines() if line.startswith("next: ")).removeprefix("next: redco-like ")
    compiler_of.bytes_of = lambda plan: 15 * GIB
    assert run(*command.split())[0] == 0
    assert compiler_of.plans[-1] != compiler_of.plans[0]


def test_verify_says_where_nothing_would_fit(run, plan_file, compiler_of):
    compiler_of.bytes_of = lambda plan: 2000 * GIB
    code, text, _ = run("verify", plan_file)
    assert code == 1
    assert "more devices, or a smaller batch" in text


def test_set_changes_the_plan_and_out_keeps_what_was_found(run, plan_file, compiler_of, tmp_path):
    out = tmp_path / "smaller.json"
    code, _, err = run("verify", plan_file, "--set", "remat=full,microbatches=2", "--out", out)
    assert (code, err) == (0, "")
    plan = Plan.load(out)
    assert (plan.remat, plan.microbatches) == ("full", 2)
    assert plan == compiler_of.plans[0]
    assert plan.verified["fits"] is True
    assert plan.verified["bytes"]["total"] == 2 * GIB
    assert plan.verified["versions"] == VERSIONS
    assert plan.problem["model"] == Plan.load(plan_file).problem["model"]
    code, _, _ = run("explain", out)
    assert code == 0


def test_json_is_one_object_that_is_read_back(run, plan_file, compiler_of):
    code, out, err = run("verify", plan_file, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert set(record) == {"plan", "verification"}
    found = Verification.from_record(record["verification"])
    assert (found.fits, found.bytes["total"], found.target) == (True, 2 * GIB, "v5e:2x4")
    assert record["plan"]["verified"]["fits"] is True


def test_what_was_compiled_is_kept(run, plan_file, run_file, compiler_of):
    first = run("verify", plan_file, "--json")
    assert run("verify", plan_file, "--json") == first
    assert len(compiler_of.plans) == 1
    run("verify", plan_file, "--fresh")
    assert len(compiler_of.plans) == 2
    for more in (("--set", "remat=full"), ("--depth", "full"), ("--global-batch", 128)):
        count = len(compiler_of.plans)
        run("verify", plan_file, *more)
        assert len(compiler_of.plans) == count + 1, more
    run_file.write_text(RUN_FILE.replace("jax.nn.relu", "jax.nn.silu"))
    count = len(compiler_of.plans)
    run("verify", plan_file)
    assert len(compiler_of.plans) == count + 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "other"}'])
def test_a_kept_result_that_cannot_be_read_is_made_again(run, plan_file, compiler_of, text):
    run("verify", plan_file)
    (entry,) = Cache().folder.iterdir()
    entry.write_text(text)
    assert run("verify", plan_file)[0] == 0
    assert len(compiler_of.plans) == 2
    assert json.loads(entry.read_text())["record"]["fits"] is True


def test_a_kept_result_of_another_version_is_made_again(run, plan_file, compiler_of):
    run("verify", plan_file)
    (entry,) = Cache().folder.iterdir()
    kept = json.loads(entry.read_text())
    entry.write_text(json.dumps({**kept, "record": {**kept["record"], "version": 0}}))
    assert run("verify", plan_file)[0] == 0
    assert len(compiler_of.plans) == 2


def test_a_folder_that_cannot_be_written_is_a_warning(run, plan_file, compiler_of, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REDCO_LIKE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="REDCO_LIKE_CACHE"):
        code, text, _ = run("verify", plan_file)
    assert code == 0
    assert "fits" in text


# Bad input: exit code 2, one message on stderr, nothing on stdout.


@pytest.mark.parametrize(
    "more, wanted",
    [
        (("--set", "remta=full"), "did you mean remat?"),
        (("--set", "remat=some"), "none, dots, full"),
        (("--set", "tensor"), "KEY=VALUE"),
        (("--set", "tensor=2"), "16 devices"),
        (("--set", "stage=2,fsdp=4"), "stage=2"),
        (("--set", "offload=optimizer"), "offloaded to the host"),
        (("--set", "microbatches=3"), "64"),
        (("--compile-limit", 0), "--compile-limit"),
        (("--compile-memory", -1), "--compile-memory"),
        (("--depth", "deep"), "deep"),
        (("--out", "no/such/folder/plan.json"), "no/such/folder"),
        (("--cluster", "8xV100"), "V100"),
        (("--cluster", "v5e:2x4x4"), "v5e"),
        (("--cluster", "2x8xH100"), "8 devices"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_option_is_one_message_and_exit_2(run, plan_file, compiler_of, more, wanted):
    code, out, err = run("verify", plan_file, *more)
    assert (code, out) == (2, "")
    assert err.startswith("redco-like verify: ") or "usage" in err or "Parsing" in err or "deep" in err
    assert wanted in err
    assert "Traceback" not in err
    assert compiler_of.plans == []


@pytest.mark.parametrize("text, wanted", [(V100, "H100"), (CUSTOM, "accelerator.base")])
def test_an_accelerator_that_nothing_compiles_for_names_the_nearest(
    run, plan_file, compiler_of, tmp_path, text, wanted
):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    code, out, err = run("verify", plan_file, "--cluster", path)
    assert (code, out) == (2, "")
    assert "nearest" in err
    assert wanted in err


def test_a_plan_that_does_not_say_its_problem(run, plan_file, compiler_of):
    record = json.loads(plan_file.read_text())
    plan_file.write_text(json.dumps({**record, "problem": {}}))
    code, out, err = run("verify", plan_file)
    assert (code, out) == (2, "")
    assert "give --model" in err


@pytest.mark.parametrize("text", ["{", '{"version": 99}'])
def test_a_file_that_is_no_plan(run, tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    code, out, err = run("verify", path)
    assert (code, out) == (2, "")
    assert str(path) in err
    code, out, err = run("verify", tmp_path / "missing.json")
    assert (code, out) == (2, "")
    assert "missing.json" in err


@pytest.mark.parametrize("cluster, extra", [("v5e:2x4", "tpu-aot"), ("8xH100", "gpu-aot")])
def test_a_missing_compiler_names_the_extra(run, plan_file, monkeypatch, cluster, extra):
    monkeypatch.setattr(
        "search.topology._version", lambda name: "1" if name.startswith("jax") and "-" not in name else None
    )
    code, out, err = run("verify", plan_file, "--cluster", cluster)
    assert (code, out) == (2, "")
    assert f"pip install 'redco-like[{extra}]'" in err


@pytest.mark.parametrize(
    "error",
    [
        CompileTimeout("compiling for v5e:2x4 was not done after 5 s (it was compiling)"),
        compiler.CompileKilled("compiling for v5e:2x4 was killed by SIGKILL after 3 s"),
        compiler.DiskFull("no space left for the compile in /tmp (0 MiB free)"),
        compiler.CompilerError("compiling for v5e:2x4 failed: a message"),
        ToolchainMissing("no compiler for v5e:2x4"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_ends_a_compile_is_one_message(run, plan_file, compiler_of, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("redco_like.verify.compile_in_child", fail)
    for command in (("verify", plan_file), ("plan", "--model", plan_file.parent / "run.py", "--cluster", "v5e:2x4")):
        more = ("--verify", 1) if command[0] == "plan" else ()
        code, out, err = run(*command, *more)
        assert (code, out) == (2, "")
        assert err == f"redco-like {command[0]}: {error}\n"
    assert not Cache().folder.exists()


# plan --verify.


@pytest.fixture
def plan_args(run_file, tmp_path):
    return "plan", "--model", run_file, "--cluster", "v5e:2x4", "--fix", "fsdp=8", "--out", tmp_path / "best.json"


def test_the_compilers_order_wins_and_what_does_not_fit_is_dropped(run, plan_args, compiler_of):
    compiler_of.bytes_of = lambda plan: (64 if len(compiler_of.plans) == 1 else 2) * GIB
    code, out, err = run(*plan_args, "--verify", 3, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert len(compiler_of.plans) == 3
    assert [row["fits"] for row in record["verified"]] == [True, True, False]
    assert record["verified"][-1]["rank"] == 1
    best = bare(plan_args[-1])
    assert best == compiler_of.plans[record["verified"][0]["rank"] - 1]
    assert best.verified["fits"] is True
    runners = [dataclasses.replace(Plan.from_json(json.dumps(r["plan"])), reason="") for r in record["runners_up"]]
    assert compiler_of.plans[0] not in runners
    assert all(runner != best for runner in runners)


def test_seconds_of_the_compiled_program_decide(run, plan_args, compiler_of, monkeypatch):
    from search.verify import verification as real

    def slower_first(*args, **options):
        found = real(*args, **options)
        return dataclasses.replace(found, seconds=10.0 / len(compiler_of.plans))

    monkeypatch.setattr("redco_like.verify.verification", slower_first)
    code, out, _ = run(*plan_args, "--verify", 3, "--json")
    assert code == 0
    assert [row["rank"] for row in json.loads(out)["verified"]] == [3, 2, 1]
    assert bare(plan_args[-1]) == compiler_of.plans[2]


def test_the_table_has_both_ranks(run, plan_args, compiler_of):
    code, text, _ = run(*plan_args, "--verify", 2)
    assert code == 0
    assert "planner's rank" in text


def test_where_nothing_fits_the_advice_says_so(run, plan_args, compiler_of):
    compiler_of.bytes_of = lambda plan: 17 * GIB
    code, text, err = run(*plan_args, "--verify", 2)
    assert (code, err) == (1, "")
    for wanted in ("Nothing fits of the 2 plans that were compiled", "GiB too much", "--memory-share"):
        assert wanted in text, wanted
    assert not plan_args[-1].exists()
    code, out, _ = run(*plan_args, "--verify", 2, "--json")
    assert (code, json.loads(out)["fits"]) == (1, False)


def test_verify_takes_no_less_than_none(run, plan_args):
    code, out, err = run(*plan_args, "--verify", -1)
    assert (code, out) == (2, "")
    assert "--verify -1" in err


# With a compiler for TPUs.


def command(*argv, **env):
    code = "import sys; from redco_like.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": os.environ | env},
    )


def compiling_child(parent):
    """The process that compiles for a command, once it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text().split("\0")
                above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if above == parent and any(word.endswith("compile_guard.py") for word in words):
                return int(folder.name)
        time.sleep(0.05)
    raise AssertionError("no child compiles")


@pytest.mark.aot
def test_a_plan_that_does_not_fit_leads_to_one_that_does_in_one_change(run, tmp_path):
    path, smaller = tmp_path / "plan.json", tmp_path / "smaller.json"
    problem = ("--model", "qwen2-0.5b", "--cluster", "v5e:2x4", "--global-batch", 64, "--seq-len", 2048)
    assert run("plan", *problem, "--fix", "fsdp=8", "--runners-up", 0, "--out", path)[0] == 0
    code, out, err = run("verify", path, "--set", "data=8,fsdp=1,microbatches=1,remat=none", "--out", path, "--json")
    found = json.loads(out)["verification"]
    assert (code, err, found["fits"]) == (1, "", False)
    assert found["bytes"]["total"] > found["usable_bytes"]
    change = found["changes"][0]
    assert change["bytes"] <= found["usable_bytes"]
    code, out, err = run("verify", path, "--set", change["set"], "--out", smaller, "--json")
    found = json.loads(out)["verification"]
    assert (code, err, found["fits"]) == (0, "", True), change
    assert Plan.load(smaller).verified["fits"] is True


@pytest.mark.aot
def test_two_at_once_both_end(plan_file, tmp_path):
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp")}
    both = [command("verify", plan_file, "--fresh", "--json", **env) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in both]
    for process, (out, err) in zip(both, results, strict=True):
        assert process.returncode == 0, err
        assert json.loads(out)["verification"]["fits"]
    assert list((tmp_path / "tmp").glob("redco-like-*")) == []


@pytest.mark.aot
def test_a_killed_child_is_one_message_and_leaves_nothing(plan_file, tmp_path):
    (tmp_path / "tmp").mkdir()
    process = command("verify", plan_file, "--fresh", TMPDIR=str(tmp_path / "tmp"))
    child = compiling_child(process.pid)
    os.kill(child, signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("redco-like verify: compiling for v5e:2x4 was killed by SIGKILL")
    assert len(err.splitlines()) == 1
    assert list((tmp_path / "tmp").glob("redco-like-*")) == []
    assert not pathlib.Path(f"/proc/{child}").exists()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):  # nor anything else that it started
        try:
            assert str(tmp_path / "tmp") not in (folder / "cmdline").read_text()
        except OSError:
            continue
