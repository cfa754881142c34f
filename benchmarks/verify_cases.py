"""Four published models planned and verified end to end with the command line: seconds, and whether they fit.

    python benchmarks/verify_cases.py [--write]          a minute

It needs the extras tpu-aot and gpu-aot, and no TPU and no GPU. With `--write` the records go to `docs/verified/`, and
`docs/verified.md` gets the table.

Bars: every plan fits by the compiler; plan and verify together take at most 120 s for each.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOST_SECONDS = 120.0
CASES = {
    "llama-3-70b-train-v5p-512": "--model llama-3-70b --cluster v5p-512 --seq-len 8192 --global-batch 256",
    "llama-3-70b-decode-v5e-4x4": (
        "--model llama-3-70b --task decode --cluster v5e:4x4 --seq-len 4096 --global-batch 16"
    ),
    "gpt3-175b-train-v6e-16x16": "--model gpt3-175b --cluster v6e:16x16 --seq-len 2048 --global-batch 512",
    "mixtral-8x7b-train-8x8xH100": "--model mixtral-8x7b --cluster 8x8xH100 --seq-len 4096 --global-batch 256",
}
SCRIPT = "import sys; from redco_like.cli import main; sys.exit(main(sys.argv[1:]))"
UNSTABLE = ("compile_seconds",)
"""What differs from run to run."""


def command(*words: str) -> tuple[int, str, float]:
    """Exit code, standard output and seconds of a command of redco-like."""
    start = time.monotonic()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=env, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise SystemExit(done.stderr)
    return done.returncode, done.stdout, time.monotonic() - start


def run(options: str, folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, float]]:
    """The record of one case, and the seconds of its two commands."""
    plan = folder / "plan.json"
    code, _, planning = command("plan", *options.split(), "--out", str(plan))
    if code:
        raise SystemExit(f"no plan fits: {options}")
    _, text, verifying = command("verify", str(plan), "--fresh", "--json")
    return json.loads(text), {"plan": round(planning, 1), "verify": round(verifying, 1)}


def row(name: str, record: dict[str, Any], seconds: dict[str, float]) -> str:
    """A line of the table."""
    found, plan = record["verification"], record["plan"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    gib = {kind: size / 2**30 for kind, size in found["bytes"].items()}
    planned = found["planned_bytes"] / 2**30
    sent = " / ".join(f"{sum(t[k] for t in found['traffic']) / 2**30:,.1f}" for k in ("planned", "sent"))
    return (
        f"| `{CASES[name]}` | {mesh}; remat {plan['remat']}, {plan['microbatches']} microbatches | "
        f"{planned:.1f} / {gib['total']:.1f} of {found['usable_bytes'] / 2**30:.1f} | {sent} | "
        f"{found['planned_seconds']:.3g} / {found['seconds']:.3g} | {seconds['plan']:.1f} + {seconds['verify']:.1f} |"
    )


HEAD = (
    "| redco-like plan ... | plan | GiB per device, planned / compiled | GiB sent by a device, planned / compiled | "
    "s per step, analytic / roofline over the compiled program | s of plan + verify |\n|---|---|---|---|---|---|"
)


def main(write: bool) -> int:
    lines, results = [HEAD], {}
    for name, options in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            record, seconds = run(options, pathlib.Path(folder))
        lines.append(row(name, record, seconds))
        print(lines[-1], flush=True)
        found = record["verification"]
        results[name] = {"fits": found["fits"], "bytes": found["bytes"]["total"], "seconds": seconds}
        if write:
            kept = {key: value for key, value in found.items() if key not in UNSTABLE}
            record = {"command": f"redco-like plan {options}", "plan": record["plan"], "verification": kept}
            path = ROOT / "docs" / "verified" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            text = json.dumps(record, indent=1, sort_keys=True).replace(str(ROOT) + "/", "")
            path.write_text(text + "\n", "utf-8")
    if write:
        (ROOT / "docs" / "verified.md").write_text("\n".join(lines) + "\n", "utf-8")
    passed = all(r["fits"] and sum(r["seconds"].values()) <= MOST_SECONDS for r in results.values())
    print(
        json.dumps(
            {
                "benchmark": "verify_cases",
                "labels": {"bytes": "compiled", "seconds": "measured"},
                "machine": platform.processor() or "cpu",
                "results": results,
                "bar_seconds": MOST_SECONDS,
                "passed": passed,
            }
        )
    )
    return 0 if passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="write the records to docs/")
    sys.exit(main(parser.parse_args().write))
