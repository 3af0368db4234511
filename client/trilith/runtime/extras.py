"""What is not installed with Trilith itself: one way to say which extra brings a package that is missing."""

from __future__ import annotations

from importlib.util import find_spec

from trilith.errors import MissingExtraError

__all__ = ["missing_extra", "need"]

_EXTRAS = {
    "torch": "torch",
    "confluent_kafka": "data",
    "safetensors": "serving",
    "fastapi": "serving",
    "starlette": "serving",
    "uvicorn": "serving",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
"""By top-level module, the extra that brings it, where nothing else is said."""


def need(*modules: str, extra: str) -> None:
    """See that modules can be imported, before anything else is done.

    Raises:
        MissingExtraError: One cannot; the message names the extra.
    """
    for module in modules:
        try:
            found = find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise _missing(module, extra)


def missing_extra(error: ModuleNotFoundError) -> ImportError:
    """What to raise instead of `error`: itself, if the module is of no extra."""
    module = (error.name or "").partition(".")[0]
    return _missing(module, _EXTRAS[module]) if module in _EXTRAS else error


def _missing(module: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"{module} is not installed; pip install 'trilith[{extra}]' brings it", name=module)
