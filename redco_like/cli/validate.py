"""`redco-like validate`: the estimates against published runs."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated

from redco_like.cli.options import Flag, optional
from redco_like.cli.terminal import Terminal, bad_input, check_folder


@dataclasses.dataclass(frozen=True)
class Validate:
    """How far the estimates are from published runs: errors of time and memory by group, and whether plans rank right.

    Example: redco-like validate --data data --plot validation.png
    """

    data: Annotated[pathlib.Path | None, optional("FOLDER", "$REDCO_LIKE_GROUND_TRUTH")] = None
    """With published_runs.csv, and optionally vtrain/multi_node.csv."""
    plot: Annotated[pathlib.Path | None, optional("FILE.PNG")] = None
    """Draw estimate against measurement (needs the extra plots)."""
    json: Flag = False
    """Print one JSON object instead of tables."""

    on_host = True

    def run(self, terminal: Terminal) -> int:
        check_folder(self.plot)
        with terminal.progress("reading published runs") as tell:
            from redco_like.validation import validate

            with bad_input():
                result = validate(self.data, progress=tell, plot=self.plot)
        if self.json:
            terminal.json(result.to_record())
        else:
            terminal.print(result)
        return 0
