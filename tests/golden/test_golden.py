"""Golden plans: what the planner and the runtime say of small models today is what the files say, reviewed as a diff.

Where a difference is meant, `python tests/golden/regenerate.py` writes the files anew; see there.
"""

import functools

import pytest
from golden.regenerate import CASES, FOLDER, MODELS, Built, read, write

from search.compiler import ToolchainMissing

ADVICE = "where this is meant: python tests/golden/regenerate.py {name}, and review the diff"
SAME_BYTES = 0.01
"""Of the same compiler: all but what it schedules by chance is the same."""
OTHER_VERSION = 0.10
"""Bytes and traffic of another version of the compiler; how often each collective runs is then its own affair."""
RECOMPILED = "dense_v5e_fsdp"
"""Compiled again wherever the compiler for TPUs is installed; the others in the slow tests."""

built = functools.lru_cache(maxsize=2)(Built)


def test_every_case_has_its_file_and_every_file_its_case():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(CASES)
    assert {path.name for path in MODELS.iterdir() if path.is_file()} == {case.model for case in CASES.values()}


def test_files_are_as_they_would_be_written(tmp_path, monkeypatch):
    records = {name: read(name) for name in CASES}
    monkeypatch.setattr("golden.regenerate.FOLDER", tmp_path)
    for name, record in records.items():
        write(name, record)
        assert (tmp_path / f"{name}.json").read_text() == (FOLDER / f"{name}.json").read_text(), name


def test_files_say_nothing_of_the_machine_that_wrote_them():
    for name in CASES:
        text = (FOLDER / f"{name}.json").read_text()
        assert '"/' not in text, name
        assert "site-packages" not in text, name
        assert 'seconds":' not in text, name


def test_the_cases_cover_kinds_of_models_and_of_clusters():
    assert {case.cluster for case in CASES.values()} == {"v5e:2x4", "v5p:2x2x2", "8xH100"}
    assert {case.task for case in CASES.values()} == {"train", "decode"}
    kinds = {
        key for name in CASES for kinds in read(name)["compiled"]["collectives"].values() for key in kinds["counts"]
    }
    assert kinds >= {"all_gather", "all_reduce", "reduce_scatter", "permute"}


@pytest.mark.parametrize("name", CASES)
def test_planner_and_runtime_say_what_the_file_says(name):
    kept, case = read(name), built(name)
    for part, found in {**case.plan_record(), "specs": case.specs(), "planned": case.planned()}.items():
        assert found == kept[part], f"{part} of {name}: {ADVICE.format(name=name)}"


@pytest.mark.parametrize("name", CASES)
def test_files_agree_with_themselves(name):
    """Nothing else would tell a file that was edited by hand, or written by a program that counts wrongly."""
    record = read(name)
    compiled, mesh = record["compiled"], record["plan"]["mesh"]
    sizes = compiled["bytes"]
    assert sizes["aliased"] <= sizes["arguments"]
    assert sizes["arguments"] + sizes["results"] <= sizes["total"]
    for axes, row in compiled["collectives"].items():
        assert all(mesh[axis] > 1 for axis in axes.split("+"))
        assert 0 <= row["asynchronous"] <= row["sent"]
        assert all(count > 0 for count in row["counts"].values())


@pytest.mark.aot
@pytest.mark.parametrize(
    "name", [name if name == RECOMPILED else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_compiler_says_what_the_file_says(name):
    kept, case = read(name), built(name)
    assert case.specs() == kept["specs"], ADVICE.format(name=name)
    try:
        found = case.compiled()
    except ToolchainMissing as missing:
        pytest.skip(str(missing))
    wanted = kept["compiled"]
    same = found["versions"] == wanted["versions"]
    by = f"{name}: kept of {wanted['versions']}, compiled here by {found['versions']}"
    if not same:
        print(f"{by}: bytes and traffic are compared within {OTHER_VERSION:.0%}, and no counts")
    near = functools.partial(pytest.approx, rel=SAME_BYTES if same else OTHER_VERSION)
    message = f"{by}; {ADVICE.format(name=name)}"
    assert (found["target"], found["depth"]) == (wanted["target"], wanted["depth"]), message
    if same:
        assert found["collectives"].keys() == wanted["collectives"].keys(), message
        for axes, row in wanted["collectives"].items():
            assert found["collectives"][axes]["counts"] == row["counts"], f"over {axes}; {message}"
        assert found["warnings"] == wanted["warnings"], message
    # A percent of nothing is nothing: bytes are compared against the total that they are a part of.
    total = wanted["bytes"]["total"]
    for kind, size in wanted["bytes"].items():
        assert found["bytes"][kind] == near(size, abs=0.01 * total), f"{kind}; {message}"
    sent = {axes: row["sent"] for axes, row in wanted["collectives"].items()}
    for axes in sent | found["collectives"]:
        here = found["collectives"].get(axes, {"sent": 0})["sent"]
        assert here == near(sent.get(axes, 0), abs=0.01 * sum(sent.values())), f"over {axes}; {message}"
    assert found["flops"] == near(wanted["flops"]), message
