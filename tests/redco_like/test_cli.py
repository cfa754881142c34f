"""The command line: every command, every bad input, exit codes, and JSON that programs can rely on."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from rich.console import Console

from redco_like.cli import choices, main, terminal, units
from redco_like.cli.terminal import Terminal, UsageError
from redco_like.cli.words import describe, links
from search import Estimate, Plan, parse_cluster
from search.space import CHOICES
from sharding_rules import MeshShape

RUN_FILE = '''
"""A small nnx network."""
import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(32, 128, rngs=rngs)
        self.second = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


def init_fn(rng):
    return nnx.state(Net(nnx.Rngs(rng)), nnx.Param)


def loss_fn(params, batch):
    logits = nnx.merge(GRAPH, params)(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def get_config():
    return {
        "loss_fn": loss_fn,
        "init_fn": init_fn,
        "optimizer": optax.adam(1e-3),
        "batch": {
            "x": jax.ShapeDtypeStruct((64, 32), jnp.float32),
            "y": jax.ShapeDtypeStruct((64,), jnp.int32),
        },
    }
'''
NO_MEMORY = """
cluster = "8xH100"
[accelerator]
memory_bytes = 0
"""
TINY_MEMORY = """
name = "thimbles"
cluster = "8xH100"
[accelerator]
memory_bytes = 2000
usable_memory_bytes = 2000
"""
KEYS = {
    "version",
    "problem",
    "fits",
    "plan",
    "planned",
    "estimate",
    "runners_up",
    "pareto",
    "certificate",
    "sensitivity",
    "advice",
    "verified",
}
PLAN = Plan(MeshShape(fsdp=8, tensor=4), "fsdp+megatron+sequence", microbatches=2, remat="dots")
ESTIMATE = Estimate(
    seconds_per_step=2.0,
    low_seconds=1.8,
    high_seconds=2.3,
    seconds={"compute": 1.5, "exposed tensor": 0.4, "optimizer": 0.1},
    hidden_seconds=0.5,
    communication={"tensor": {"seconds": 0.9, "exposed": 0.4, "bytes": 1e9}},
    mfu=0.45,
    tokens_per_second=1_234_567.0,
    memory={"params": 2**30, "gradients": 2**30, "optimizer": 2**31, "activations": 2**33, "transient": 0},
    usable_bytes=2**36,
    flops=1e15,
    binds="compute: matrix products 71 % of the step",
    labels={"seconds": "analytic", "memory": "analytic", "collectives": "analytic"},
)


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text(RUN_FILE)
    return str(path)


@pytest.fixture
def run(capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


# Plan.


def test_plan_prints_winner_proof_and_next_command(run, run_file, tmp_path):
    out = tmp_path / "plan.json"
    code, text, err = run("plan", "--model", run_file, "--cluster", "8xH100", "--runners-up", 2, "--out", out)
    assert (code, err) == (0, "")
    for wanted in (
        "1 (best)",
        "analytic",
        "step time",
        "MFU",
        "of usable",
        "gap 0.00%",
        "interval",
        "next: redco-like",
    ):
        assert wanted in text, wanted
    assert max(len(line) for line in text.splitlines() if not line.startswith("next: ")) <= 120
    plan = Plan.load(out)
    assert plan.mesh.size == 8
    assert plan.estimate is not None
    assert plan.problem["model"] == run_file
    assert plan.problem["global_batch"] == 64


def test_plan_fits_in_80_columns(run, run_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, text, _ = run("plan", "--model", run_file, "--cluster", "8xH100")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80


def test_json_is_one_object_with_stable_keys(run, run_file):
    code, out, err = run("plan", "--model", run_file, "--cluster", "8xH100", "--runners-up", 2, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert set(record) == KEYS
    assert record["fits"] is True
    assert record["certificate"]["gap"] == 0
    assert set(record["runners_up"][0]) == {"plan", "planned", "estimate"}
    assert record["estimate"]["seconds_per_step"] <= record["runners_up"][0]["estimate"]["seconds_per_step"]
    assert sum(record["estimate"]["seconds"].values()) == pytest.approx(record["estimate"]["seconds_per_step"])
    assert Plan.from_json(json.dumps(record["plan"])).mesh.size == 8


def test_fix_forbid_and_max_microbatch_are_honoured(run, run_file):
    code, out, _ = run(
        *("plan", "--model", run_file, "--cluster", "8xH100", "--json"),
        *("--fix", "tensor=2,remat=full", "--fix", "data=4", "--forbid", "sequence", "--max-microbatch", 8),
    )
    plan = json.loads(out)["plan"]
    assert code == 0
    assert (plan["mesh"]["tensor"], plan["mesh"]["data"], plan["remat"]) == (2, 4, "full")
    assert "sequence" not in plan["preset"]
    assert 64 // (4 * plan["microbatches"]) <= 8


def test_what_cannot_run_is_left_out_unless_allowed(run, run_file):
    args = ("plan", "--model", run_file, "--cluster", "8xH100", "--json")
    default, allowed = (json.loads(run(*args, *more)[1]) for more in ((), ("--allow-planned",)))
    assert not default["planned"]
    assert not any(entry["planned"] for entry in default["runners_up"])
    assert allowed["certificate"]["candidates"] > default["certificate"]["candidates"]


def test_nothing_fits_says_what_would_and_exits_1(run, run_file, tmp_path):
    cluster = write(tmp_path, "thimbles.toml", TINY_MEMORY)
    code, text, err = run("plan", "--model", run_file, "--cluster", cluster)
    assert (code, err) == (1, "")
    assert "Nothing fits" in text
    assert "needs" in text
    code, out, _ = run("plan", "--model", run_file, "--cluster", cluster, "--json")
    record = json.loads(out)
    assert code == 1
    assert set(record) == KEYS
    assert (record["fits"], record["plan"], record["estimate"]) == (False, None, None)
    assert record["advice"]


def test_what_a_run_file_prints_is_kept_out_of_the_json(run, tmp_path):
    path = write(tmp_path, "talks.py", RUN_FILE + "\nprint('hello')\n")
    code, out, err = run("plan", "--model", path, "--cluster", "8xH100", "--json")
    assert code == 0
    assert json.loads(out)["fits"]
    assert err == "hello\n"


def test_config_of_hugging_face(run, tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    path = write(tmp_path, "config.json", json.dumps(config))
    args = ("--cluster", "8xH100", "--seq-len", 64, "--global-batch", 16, "--runners-up", 0)
    code, text, _ = run("plan", "--model", path, *args)
    assert code == 0
    assert "64 tokens" in text
    code, text, _ = run("plan", "--model", path, *args, "--task", "decode")
    assert code == 0
    assert "decode" in text
    assert "adamw" not in text
    path.write_text(json.dumps({"model_type": "perceiver"}))
    code, out, err = run("plan", "--model", path, *args)
    assert (code, out) == (2, "")
    assert "perceiver" in err


def test_progress_is_on_stderr_and_leaves_stdout_alone(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "WAIT_SECONDS", 0.0)
    shown = Terminal(Console(file=sys.stdout), Console(file=sys.stderr, force_terminal=True))
    with shown.progress("reading a model") as tell:
        time.sleep(0.2)
        tell("searching")
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading a model" in err
    assert "searching" in err
    assert "0:00:00" in err


def test_time_limit_says_how_far_the_plan_may_be(run, run_file):
    code, out, _ = run("plan", "--model", run_file, "--cluster", "8xH100", "--time-limit", 0, "--json")
    certificate = json.loads(out)["certificate"]
    assert code == 0
    assert 0 <= certificate["gap"] < 1


def test_architecture_by_name(run):
    args = ("--seq-len", 256, "--global-batch", 16, "--runners-up", 0)
    code, text, _ = run("plan", "--model", "gpt2", "--cluster", "8xA100-80", *args)
    assert code == 0
    assert "124 M parameters" in text
    assert "256 tokens" in text


# Bad input: exit code 2, one message on stderr, nothing on stdout.


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"--model": "llama-3-70bb"}, "llama-3-70b"),
        ({"--model": "missing.py"}, "missing.py"),
        ({"--cluster": "8xH10O"}, "H100"),
        ({"--cluster": "missing.toml"}, "missing.toml"),
        ({"--fix": "tensor=x"}, "--fix tensor=x"),
        ({"--fix": "tensor=0"}, "--fix tensor=0"),
        ({"--fix": "tensor"}, "KEY=VALUE"),
        ({"--fix": "tensr=2"}, "tensr"),
        ({"--fix": "tensor=3"}, "3"),
        ({"--fix": "remat=some"}, "remat"),
        ({"--fix": "sequence=3"}, "true or false"),
        ({"--fix": "order=tensr+data"}, "tensor"),
        ({"--fix": "offload=optimiser"}, "optimizer"),
        ({"--fix": "microbatches=3"}, "nearest: 2"),
        ({"--fix": "stage=2"}, "--allow-planned"),
        ({"--fix": "order=data+stage", "--cluster": "4x8xH100"}, "no mesh of 32 devices"),
        ({"--forbid": "pipeline"}, "pipeline"),
        ({"--forbid": "remat"}, "stage"),
        ({"--cluster": ""}, "8xH100"),
        ({"--memory-share": "1.5"}, "--memory-share"),
        ({"--runners-up": "-1"}, "--runners-up"),
        ({"--out": "no/such/folder/plan.json"}, "no/such/folder"),
    ],
    ids=lambda value: " ".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_bad_option_is_one_message_and_exit_2(run, run_file, options, wanted):
    options = {"--model": run_file, "--cluster": "8xH100", **options}
    code, out, err = run("plan", *(part for pair in options.items() for part in pair))
    assert (code, out) == (2, "")
    assert err.startswith("redco-like plan: ")
    assert wanted in err
    assert "Traceback" not in err


def test_memory_of_zero_is_refused(run, run_file, tmp_path):
    code, out, err = run("plan", "--model", run_file, "--cluster", write(tmp_path, "none.toml", NO_MEMORY))
    assert (code, out) == (2, "")
    assert "memory_bytes" in err


def test_batch_that_divides_by_nothing_is_refused_with_one_that_does(run, tmp_path):
    path = write(tmp_path, "odd.py", RUN_FILE.replace("(64", "(7"))
    code, out, err = run("plan", "--model", path, "--cluster", "16x8xH100", "--forbid", "tensor")
    assert (code, out) == (2, "")
    assert "7" in err
    assert "128" in err


def test_run_file_that_raises_is_named_with_its_line(run, tmp_path):
    path = write(tmp_path, "broken.py", "def get_config():\n    raise KeyError('no data')\n")
    code, out, err = run("plan", "--model", path, "--cluster", "8xH100")
    assert (code, out) == (2, "")
    assert "broken.py" in err
    assert "no data" in err
    assert "2" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["plan", "--model", "gpt2"], "--cluster"),
        (["plan", "--model", "gpt2", "--cluster", "8xH100", "--seq-len", "many"], "--seq-len"),
        (["plan", "--model", "gpt2", "--cluster", "8xH100", "--dtype", "float8"], "float8"),
        (["plam"], "plam"),
        (["diff", "a.json"], "B.JSON"),
        (["diff", "a.json", "b.json"], "a.json"),
        (["explain", "missing.json"], "missing.json"),
        (["explain", "fsdp"], "--model"),
        (["report", "missing.json"], "missing.json"),
        (["verify", "missing.json"], "missing.json"),
        (["verify"], "PLAN.JSON"),
    ],
    ids=" ".join,
)
def test_arguments_that_are_wrong(run, argv, wanted):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert wanted in err


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 9}', '{"version": 2, "mesh": {"tensr": 2}}'])
def test_file_that_is_no_plan(run, tmp_path, text):
    path = write(tmp_path, "plan.json", text)
    code, out, err = run("explain", path)
    assert (code, out) == (2, "")
    assert str(path) in err


# Explain, diff, report.


@pytest.fixture
def plan_file(run, run_file, tmp_path):
    path = tmp_path / "mine.json"
    assert run("plan", "--model", run_file, "--cluster", "8xH100", "--fix", "tensor=2", "--out", path)[0] == 0
    return path


def test_explain_tells_axes_parts_and_collectives(run, plan_file):
    code, text, err = run("explain", plan_file)
    assert (code, err) == (0, "")
    for wanted in ("tensor 2", "first/kernel", "compute", "of usable", "optimizer state:", "all-reduce"):
        assert wanted in text, wanted
    code, out, _ = run("explain", plan_file, "--json")
    record = json.loads(out)
    assert code == 0
    assert {"plan", "collectives", "axes"} == set(record)
    for axis, totals in record["plan"]["estimate"]["communication"].items():
        rows = [row for row in record["collectives"] if row["axis"] == axis]
        assert sum(row["seconds"] for row in rows) == pytest.approx(totals["seconds"])


def test_explain_of_a_preset(run, run_file):
    args = ("--model", run_file, "--cluster", "8xH100", "--microbatches", 2, "--remat", "full")
    code, text, _ = run("explain", "fsdp", *args)
    assert code == 0
    assert "fsdp 8" in text
    assert "2 of 4 examples per device" in text
    code, text, _ = run("explain", "fsdp+megatron", "--mesh", "fsdp=4,tensor=2", *args)
    assert code == 0
    code, _, err = run("explain", "fsdp+megatron", *args)
    assert code == 2
    assert "--mesh fsdp=2,tensor=4" in err
    code, _, err = run("explain", "fsdq", "--mesh", "fsdp=8", *args)
    assert code == 2
    assert "fsdp" in err


def test_explain_of_a_plan_on_other_devices_or_batches_than_it_splits(run, plan_file):
    code, out, err = run("explain", plan_file, "--cluster", "2x8xH100")
    assert (code, out) == (2, "")
    assert "the plan is for 8 devices" in err
    assert "has 16" in err
    code, out, err = run("explain", plan_file, "--global-batch", 66)
    assert (code, out) == (2, "")
    assert "66" in err
    assert "nearest: 64" in err


def test_explain_of_a_plan_without_its_problem(run, tmp_path):
    PLAN.save(tmp_path / "bare.json")
    code, text, _ = run("explain", tmp_path / "bare.json")
    assert code == 0
    assert "--model" in text


def test_diff_exit_code_and_fields(run, tmp_path):
    a, b, c = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    dataclasses.replace(PLAN, estimate=ESTIMATE, reason="one").save(a)
    dataclasses.replace(PLAN, estimate=ESTIMATE, reason="two").save(b)
    slower = dataclasses.replace(ESTIMATE, seconds_per_step=3.0)
    dataclasses.replace(PLAN, mesh=MeshShape(fsdp=16, tensor=2), remat="full", estimate=slower).save(c)
    code, text, _ = run("diff", a, b)
    assert code == 0
    assert "the same" in text
    code, text, _ = run("diff", a, c)
    assert code == 1
    for wanted in ("fsdp=8,tensor=4", "fsdp=16,tensor=2", "dots", "full", "+50.0 %"):
        assert wanted in text, wanted
    code, out, _ = run("diff", a, c, "--json")
    assert code == 1
    assert set(json.loads(out)["fields"]) == {"mesh", "remat"}


def test_report_writes_one_page(run, plan_file, tmp_path):
    pytest.importorskip("redco_like.report")
    out = tmp_path / "plan.html"
    code, text, err = run("report", plan_file, "--out", out)
    assert (code, err) == (0, "")
    assert out.read_text().lstrip().lower().startswith("<!doctype html")
    assert str(out) in text


def test_profile_writes_a_cluster_that_plan_reads(run, run_file, tmp_path, monkeypatch):
    class Measured:
        def to_toml(self):
            return 'name = "mine"\ncluster = "8xA100-80"\n'

        def __str__(self):
            return "a constant, measured"

    def measure(progress):
        progress("products")
        return Measured()

    monkeypatch.setattr("redco_like.profile.profile_devices", measure)
    out = tmp_path / "mine.toml"
    code, text, err = run("profile", "--out", out)
    assert (code, err) == (0, "")
    assert "a constant, measured" in text
    code, text, _ = run("plan", "--model", run_file, "--cluster", out, "--runners-up", 0)
    assert code == 0
    assert "mine: 8 x A100-80" in text
    code, out, err = run("profile", "--out", tmp_path / "mine.json")
    assert (code, out) == (2, "")
    assert "mine.toml" in err


def test_validate_without_published_runs_says_how_to_name_them(run, tmp_path, monkeypatch):
    monkeypatch.delenv("REDCO_LIKE_GROUND_TRUTH", raising=False)
    code, out, err = run("validate")
    assert (code, out) == (2, "")
    assert "REDCO_LIKE_GROUND_TRUTH" in err
    code, out, err = run("validate", "--data", tmp_path)
    assert (code, out) == (2, "")
    assert "published_runs.csv" in err


def test_validate_prints_its_report(run, tmp_path, monkeypatch):
    class Report:
        def to_record(self):
            return {"bars": []}

        def __rich__(self):
            return "errors by group"

    def validate(folder, *, progress, plot):
        progress("estimating")
        assert (folder, plot) == (tmp_path, tmp_path / "runs.png")
        return Report()

    monkeypatch.setattr("redco_like.validation.validate", validate)
    args = ("validate", "--data", tmp_path, "--plot", tmp_path / "runs.png")
    assert run(*args) == (0, "errors by group\n", "")
    code, out, _ = run(*args, "--json")
    assert code == 0
    assert json.loads(out) == {"bars": []}


# Parts.


def test_fixed_choices_are_read():
    pairs = ("tensor=8, data=2", "remat=full", "sequence=true", "offload=optimizer+activations", "order=tensor+data")
    assert choices.fixed(pairs) == {
        "tensor": 8,
        "data": 2,
        "remat": "full",
        "sequence": True,
        "offload": "optimizer+activations",
        "order": ("tensor", "data"),
    }
    assert choices.forbidden(("stage,context",)) == ("stage", "context")
    assert {*choices.SIZES, *choices.SWITCHES, *choices.LISTS, *choices.NAMED} == set(CHOICES)
    with pytest.raises(UsageError, match="twice"):
        choices.fixed(("tensor=8", "tensor=4"))


def test_numbers_have_units():
    assert [units.seconds(s) for s in (0, 2e-6, 0.00123, 0.9999, 12.345, 999.9, 1234.5)] == [
        *("0 s", "2.00 µs", "1.23 ms", "1.00 s", "12.3 s", "1,000 s", "1,234 s"),
    ]
    assert [units.percent(x) for x in (0, 0.0012, 0.095, 0.5, 0.9999, 1.5)] == [
        *("0 %", "0.12 %", "9.5 %", "50.0 %", "100 %", "150 %"),
    ]
    assert [units.many(x) for x in (70.554e9, 8.39e6, 999, 4.59e14)] == ["70.6 B", "8.39 M", "999", "459 T"]
    assert [units.size(x, 2**34) for x in (0, 2**20, 2**31)] == ["0", "0.001 GiB", "2.0 GiB"]


def test_words_say_what_each_axis_does_and_over_which_links():
    cluster = parse_cluster("4x8xH100")
    assert links(PLAN, cluster) == {"tensor": "inside a node", "fsdp": "inside and across nodes"}
    lines = dict(describe(PLAN, global_batch=64, cluster=cluster))
    assert "sequence parallelism" in lines["tensor 4"]
    assert "across nodes" in lines["fsdp 8"]
    assert lines["microbatches"].startswith("2 of 4 examples per device")
    assert "not run yet" not in lines
    assert "order" not in lines
    turned = dataclasses.replace(PLAN, order=("tensor", "fsdp"))
    assert links(turned, cluster) == {"fsdp": "inside a node", "tensor": "across nodes"}
    assert dict(describe(turned))["order"].startswith("tensor, fsdp")
    planned = dataclasses.replace(PLAN, mesh=MeshShape(stage=4, tensor=8), preset="megatron", offload=("optimizer",))
    lines = dict(describe(planned))
    assert "1F1B" in lines["stage 4"]
    assert "stage=4" in lines["not run yet"]


@pytest.mark.parametrize("command", ["plan", "verify", "explain", "diff", "report", "validate", "profile"])
def test_help_of_every_command(run, command):
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: redco-like {command}" in out
    code, out, _ = run("--help")
    assert code == 0
    assert command in out


def test_help_does_not_import_jax():
    program = "import sys; from redco_like.cli import main; main(['plan', '--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_as_a_process_uses_no_accelerator(run_file):
    program = (
        "import sys; from redco_like.cli import main; code = main(sys.argv[1:]);"
        "import jax; assert jax.config.jax_platforms == 'cpu'; sys.exit(code)"
    )
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    args = ["plan", "--model", run_file, "--cluster", "8xH100", "--json"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, env=env, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    assert done.stderr == ""


def test_context_is_not_planned_where_attention_kernels_take_whole_sequences(run):
    problem = ("plan", "--model", "gpt2", "--cluster", "8xH100", "--seq-len", 1024, "--global-batch", 8, "--json")
    code, out, _ = run(*problem)
    assert code == 0
    assert all(entry["plan"]["mesh"]["context"] == 1 for entry in json.loads(out)["pareto"])
    code, _, err = run(*problem, "--fix", "context=2")
    assert code == 2
    assert "take whole sequences" in err
    code, out, _ = run(*problem, "--fix", "context=2", "--attention", "plain")
    assert (code, json.loads(out)["plan"]["mesh"]["context"]) == (0, 2)
