"""An OpenAI-compatible server over one `Engine`: completions and chats, whole or as they come.

    app = create_app(engine, text, name="llama")            # an ASGI application; its lifespan runs the engine
    run(app, host="127.0.0.1", port=8000)                   # until SIGTERM or Ctrl-C, then answers are finished

`redco-like serve --model FOLDER` does both. One thread runs the engine (`worker`), everything else is asyncio: requests
are read and checked (`requests`), their tokens become text and records (`answers`); `app` has the routes, `service`
what they run on, `metrics` the counts, `process` starts and ends it. FastAPI and uvicorn come with
`pip install 'redco-like[serve]'`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redco_like.server.app import create_app
    from redco_like.server.errors import ApiError
    from redco_like.server.process import run
    from redco_like.server.requests import Limits
    from redco_like.server.worker import EngineWorker

_HOMES = {
    "ApiError": "redco_like.server.errors",
    "EngineWorker": "redco_like.server.worker",
    "Limits": "redco_like.server.requests",
    "create_app": "redco_like.server.app",
    "run": "redco_like.server.process",
}

__all__ = ["ApiError", "EngineWorker", "Limits", "create_app", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name in ("fastapi", "starlette", "uvicorn"):
            raise ImportError(f"the server needs {error.name}: pip install 'redco-like[serve]'") from error
        raise
    globals()[name] = value
    return value
