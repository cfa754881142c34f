"""A user's Python file: one function of it is called, and what goes wrong is said in one line with its place.

config = call_of_file(Path("run.py"), "get_config", "a dict with loss_fn, init_fn, optimizer and batch")
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any


def call_of_file(path: Path, function: str, returns: str) -> Any:
    """Run a file and call a function of it without arguments; modules beside the file can be imported by it.

    Args:
        path: of the file.
        function: its name.
        returns: what it should return, for the message where it is missing.

    Raises:
        ValueError: no such file or function; or what the file raised, with the line.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"there is no run file {path}{hint}")
    name = f"redco_like_run_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module  # dataclasses of the file look their module up
    sys.path.insert(0, folder)
    try:
        with blamed(path):
            spec.loader.exec_module(module)
        if not callable(make := getattr(module, function, None)):
            raise ValueError(f"{path} has no function {function}(); it returns {returns}")
        with blamed(path):
            return make()
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


class blamed:
    """Turn what a user's file raises into a ValueError of one line, with the exception and where in the file it was."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception | SystemExit):
            return
        own = self.path.resolve()
        lines = [f.lineno for f in traceback.extract_tb(trace) if Path(f.filename).resolve() == own]
        if isinstance(error, SyntaxError) and error.filename and Path(error.filename).resolve() == own:
            lines.append(error.lineno)
        if not lines and isinstance(error, ValueError):
            return
        where = f"{self.path}:{lines[-1]}" if lines else str(self.path)
        message = " ".join(str(error).split()) or "no message"
        raise ValueError(f"{where} raised {type(error).__name__}: {message}") from error
