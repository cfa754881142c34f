"""`redco-like profile`: measure this machine, and write a cluster file."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

import tyro

from redco_like.cli.terminal import Terminal, UsageError, check_folder, write_text


@dataclasses.dataclass(frozen=True)
class Profile:
    """Measure matrix products, memory and collectives on the devices of this machine, and write a cluster file.

    Example: redco-like profile --out here.toml; redco-like plan --model run.py --cluster here.toml
    """

    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE.TOML")] = pathlib.Path("cluster.toml")
    """Where to write it: redco-like plan --cluster FILE.TOML reads it."""

    on_host = False

    def run(self, terminal: Terminal) -> int:
        check_folder(self.out)
        if self.out.suffix != ".toml":
            raise UsageError(
                f"--out {self.out}: a cluster file ends in .toml; nearest: {self.out.with_suffix('.toml')}"
            )
        with terminal.progress("starting the devices") as tell:
            from redco_like.profile import profile_devices

            profile = profile_devices(progress=lambda what: tell(f"measuring {what}"))
        write_text(self.out, profile.to_toml())
        terminal.line(str(profile))
        terminal.line(f"wrote {self.out}; next: redco-like plan --model ... --cluster {self.out}")
        return 0
