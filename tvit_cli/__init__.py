"""The package's version, and its Python API; everything is imported late.

>>> import tvit_cli
>>> model = tvit_cli.load_model("working_directory/ucf101-1")
>>> model.predict("clip.avi", top_k=5).label
'Archery'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvit_cli.engine.predict import Model, Prediction, load_model

__version__ = "0.2.0"
__all__ = ["Model", "Prediction", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "Prediction", "load_model"):
        from tvit_cli.engine import predict

        return getattr(predict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
