"""`redco-like rlhf`: a plan, its file, its page; and every bad input, with one message."""

import json

import pytest

from redco_like.cli import main
from search.rlhf import ExecutionPlan

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LOAD = ["--prompts", "16", "--prompt-tokens", "16", "--new-tokens", "16"]
GRAPH = """
from search.rlhf import Call, Graph

def get_graph():
    return Graph(
        "best_of_n",
        ("prompts",),
        (
            Call("write", "actor", "generate", ("prompts",), ("texts",)),
            Call("judge", "judge", "score", ("texts",), ("rewards",)),
            Call("learn", "actor", "train", ("texts", "rewards")),
        ),
    )
"""


@pytest.fixture(scope="module")
def actor(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*arguments):
    return main(["rlhf", "--cluster", "4xA100-80", *arguments])


def test_a_plan_is_found_written_and_drawn(actor, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out, page = tmp_path / "rlhf.json", tmp_path / "rlhf.html"
    assert run("--actor", actor, *LOAD, "--minibatches", "2", "--out", str(out), "--report", str(page)) == 0
    printed = capsys.readouterr().out
    for text in (
        "train_critic",
        "no plan of the space is faster",
        "all roles on all devices",
        "next: redco-like verify",
    ):
        assert text in printed, text
    plan = ExecutionPlan.load(out)
    assert plan.gap == 0
    assert plan.period_seconds <= min(plan.heuristics.values())
    assert plan.workload.minibatches == 2
    assert plan.problem == {
        "cluster": "4xA100-80",
        "optimizer": "adamw",
        "dtype": "bfloat16",
        "param_dtype": "float32",
    }
    assert page.read_text().count("<svg") >= 4


def test_a_graph_of_a_file_and_json(actor, tmp_path, capsys):
    path = tmp_path / "graph.py"
    path.write_text(GRAPH)
    models = ["--actor", actor, "--model", f"judge={actor}"]
    assert run("--graph", str(path), *models, *LOAD, "--samples", "2", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fits"]
    assert record["gap"] == 0
    assert [call["call"] for call in record["execution"]["calls"]] == ["write", "judge", "learn"]


def test_what_does_not_fit_says_so(capsys):
    assert main(["rlhf", "--cluster", "1xA100-40", "--actor", "llama-2-70b", *LOAD]) == 1
    assert "othing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--graph", "pppo"], "no graph 'pppo', did you mean ppo?"),
        (["--graph", "nowhere.py"], "there is no run file nowhere.py"),
        (["--model", "judge"], "--model judge: write ROLE=NAME"),
        (["--model", "critc=gpt2"], "has no role 'critc', did you mean critic?"),
        (["--graph", "grpo", "--critic", "gpt2"], "has no role 'critic'; it has actor, reward, reference"),
        (["--time-limit", "0"], "--time-limit 0.0; a number of seconds above 0"),
        (["--prompts", "0"], "prompts=0; a whole number from 1 up"),
        (["--minibatches", "3"], "16 sequences do not split into minibatches=3; nearest: 2"),
        (["--cluster", "4xB900"], "B900"),
        (["--actor", "llama-2-8b"], "llama-2-8b"),
        (["--actor", "t5-small"], "is no decoder"),
        (["--out", "/nowhere/x.json"], "there is no folder /nowhere"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments, message, capsys):
    given = {"--cluster": "4xA100-80", "--actor": "gpt2", **dict(zip(LOAD[::2], LOAD[1::2], strict=True))}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert main(["rlhf", *(part for pair in given.items() for part in pair)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_role_without_a_model_is_named(capsys):
    assert run(*LOAD) == 2
    assert "has a role 'actor' without a model: give --actor NAME" in capsys.readouterr().err


def test_a_file_that_returns_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "graph.py"
    path.write_text("def get_graph():\n    return 3\n")
    assert run("--actor", "gpt2", "--graph", str(path), *LOAD) == 2
    assert "get_graph() returned a int; it must be a search.rlhf.Graph" in capsys.readouterr().err


def test_verify_reads_execution_plans(actor, tmp_path, capsys):
    path = tmp_path / "rlhf.json"
    path.write_text('{"graph": {}, "calls": [], "version": 1}')
    assert main(["verify", str(path)]) == 2
    assert "the graph has no 'calls'" in capsys.readouterr().err
    assert run("--actor", actor, "--graph", "sft", *LOAD, "--out", str(path)) == 0
    assert main(["verify", str(path), "--set", "remat=full"]) == 2
    assert "--set changes one plan" in capsys.readouterr().err
