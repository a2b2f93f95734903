"""The worker's front and everything that speaks Celery: the app, the pool, the three tasks, wake-ups, the reaper.

Owns what happens to a Celery message and, through `tasks.front`, what a worker says to the state server about its
requests. It must not know tensors or devices (the engine process does: `engines`) nor HTTP (`webapp`). Importing this
package imports neither torch nor transformers, and reads no settings: `app` is made when it is first asked for, so
that `celery -A tasks worker -Q prefill.tiny-chat` works while a gateway that only sends wake-ups stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Celery

    app: Celery
    celery: Celery

__all__ = ["app", "celery"]


def __getattr__(name: str) -> Any:
    if name in ("app", "celery"):
        import importlib

        # `from tasks.app import app` here would find the submodule of that name once it is loaded.
        application = importlib.import_module("tasks.app").app
        globals().update(app=application, celery=application)
        return application
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
