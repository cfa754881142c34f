"""The command `redco-like`: what to run a model on, how, how fast it will be, and whether it fits.

    redco-like plan --model llama-3-70b --cluster v5p-1024 --seq-len 8192 --global-batch 1024 --out plan.json
    redco-like explain plan.json
    redco-like verify plan.json

Exit codes: 0 done; 1 nothing fits, or `diff` found a difference; 2 bad input, with one message on stderr.

Arguments are parsed before JAX is imported, and commands that plan run on the CPU: no accelerator is initialised.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from redco_like.cli.diff import Diff
from redco_like.cli.explain import Explain
from redco_like.cli.plan import Plan
from redco_like.cli.profile import Profile
from redco_like.cli.report import Report
from redco_like.cli.rlhf import Rlhf
from redco_like.cli.serve import Serve
from redco_like.cli.terminal import Terminal, UsageError
from redco_like.cli.validate import Validate
from redco_like.cli.verify import Verify

__all__ = ["main"]

COMMANDS = {
    "plan": Plan,
    "serve": Serve,
    "explain": Explain,
    "verify": Verify,
    "rlhf": Rlhf,
    "diff": Diff,
    "report": Report,
    "validate": Validate,
    "profile": Profile,
}
DESCRIPTION = (
    "How to run a model on a cluster: the fastest plan that fits, how fast it will be, and why. Only profile and serve "
    "need the devices. What is printed is an estimate (analytic) unless it says compiled or measured.\n\n"
    "Example: redco-like plan --model llama-3-70b --cluster v5p-1024 --seq-len 8192 --global-batch 1024\n\n"
    "Exit codes: 0 done; 1 nothing fits, or plans differ; 2 bad input."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    try:
        command = _parse(argv or ["--help"])
        if command.on_host:
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        return command.run(Terminal.open())
    except SystemExit as done:  # --help, or arguments that tyro has already complained about
        return 2 if not argv else done.code if isinstance(done.code, int) else 2
    except UsageError as error:
        print(f"redco-like {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"redco-like {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: Sequence[str]) -> Any:
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    if argv and argv[0] in COMMANDS:
        return tyro.cli(COMMANDS[argv[0]], prog=f"redco-like {argv[0]}", args=argv[1:], config=config)
    # No command of ours: the list of them, one line each.
    listed: Any = functools.reduce(
        operator.or_,
        (
            Annotated[kind, tyro.conf.subcommand(name, description=(kind.__doc__ or "").partition("\n")[0])]
            for name, kind in COMMANDS.items()
        ),
    )
    return tyro.cli(listed, prog="redco-like", description=DESCRIPTION, args=argv, config=config)
