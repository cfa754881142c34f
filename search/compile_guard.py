"""Runs a module in a child process that never outlives its parent; started by `search/compiler.py`, by path.

    python -P search/compile_guard.py FOLDER PARENT_PID MODULE REQUEST.json

Standard input is a pipe that the parent holds open and writes nothing to: when the parent is gone, killed even, the
pipe ends, and this process removes FOLDER and kills its own group. What the module raises is written to
FOLDER/failure.json, whole. Nothing but the standard library is imported before the module is.
"""

import json
import os
import pathlib
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading

FAILURE = "failure.json"


def main(folder: str, parent: int, module: str, request: str) -> None:
    """Run a module as `python -m` would, with the request's path as its only argument."""
    threading.Thread(target=_die_with, args=(folder, parent), daemon=True).start()
    sys.argv = [module, request]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception as error:
        failure = {"type": type(error).__name__, "message": str(error), "errno": getattr(error, "errno", None)}
        (pathlib.Path(folder) / FAILURE).write_text(json.dumps(failure), "utf-8")
        raise


def _die_with(folder: str, parent: int) -> None:
    while os.getppid() == parent:
        ready, _, _ = select.select([0], [], [], 1.0)
        if ready and not os.read(0, 1):
            break
    # The compiler may be writing at this moment: what removes the folder for good runs when this group is dead.
    shutil.rmtree(folder, ignore_errors=True)
    clean = "import shutil, sys, time; time.sleep(0.5); shutil.rmtree(sys.argv[1], ignore_errors=True)"
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", clean, folder],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
