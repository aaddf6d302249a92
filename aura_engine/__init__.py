"""Text to image and image to image, by an engine on this machine, in the cloud, or in this very process.

    import aura_engine as ae
    ae.AuraClient("offline").generate("a red apple").save("apple.png")

The names of `__all__` are the interface: the changelog speaks of them, and they change only with a notice. Everything
else in this package may change. Importing the package is light. A name is fetched when it is first used.
"""
from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# A thread of torch's that waits for the others spins. Where a neighbour has taken a core, that makes a step fifteen
# times as slow (05d_precision measures it). libgomp reads this once, when torch is imported, so it is said here.
if "OMP_WAIT_POLICY" not in os.environ: os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:      # for editors and type checkers, which cannot see what __getattr__ does
    from .client import AsyncAuraClient as AsyncAuraClient, AuraClient as AuraClient
    from .config import Settings as Settings, load_settings as load_settings
    from .engine import Engine as Engine
    from .planning import plan as plan
    from .server import create_server as create_server
    from .types import AuraError as AuraError, GenerateRequest as GenerateRequest, RefineRequest as RefineRequest
    from .widgets import Compare as Compare, EngineStatus as EngineStatus, Studio as Studio

# Public name -> the module that defines it.
PUBLIC: dict[str, str] = {
    "AuraClient": "client",
    "AsyncAuraClient": "client",
    "Engine": "engine",
    "load_settings": "config",
    "Settings": "config",
    "GenerateRequest": "types",
    "RefineRequest": "types",
    "plan": "planning",
    "Studio": "widgets",
    "EngineStatus": "widgets",
    "Compare": "widgets",
    "create_server": "server",
    "AuraError": "types",
}

__all__ = ["AuraClient", "AsyncAuraClient", "Engine", "load_settings", "Settings", "GenerateRequest", "RefineRequest",
           "plan", "Studio", "EngineStatus", "Compare", "create_server", "AuraError", "__version__"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used."""
    if name not in PUBLIC: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try: value = getattr(import_module(f".{PUBLIC[name]}", __name__), name)
    except ModuleNotFoundError as e:
        if e.name not in ("ipywidgets", "anywidget", "traitlets"): raise
        raise ImportError(f"aura_engine.{name} is for notebooks: pip install ipywidgets anywidget", name=e.name) from e
    globals()[name] = value
    return value


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
