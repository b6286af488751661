"""Train, evaluate, run and export video classifiers: the public names, imported when first used.

>>> import tvit_cli
>>> result = tvit_cli.train(path_to_data="my_videos", epochs=30, test_at_end=True)
>>> model = tvit_cli.load_model(result.model)
>>> model.predict("clip.avi", top_k=5).label
'Archery'
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvit_cli.api import download, evaluate, export, extract, predict, train
    from tvit_cli.data.layout import VIDEO_SUFFIXES
    from tvit_cli.data.motions import make_motions
    from tvit_cli.data.video import read_video
    from tvit_cli.engine.download import DownloadResult
    from tvit_cli.engine.export import ExportResult
    from tvit_cli.engine.predict import Model, PredictResult, TimelineResult, load_model
    from tvit_cli.engine.predict.explain import Explanation
    from tvit_cli.errors import (
        CheckpointError,
        DataError,
        Interrupted,
        ModelError,
        RunError,
        SettingsError,
        TvitError,
        VideoError,
    )
    from tvit_cli.results import (
        AnswersStart,
        ClassTable,
        Comparison,
        DryRun,
        EpochDone,
        EvalResult,
        Event,
        ExtractResult,
        Note,
        Prediction,
        Progress,
        Scan,
        Segment,
        SegmentFound,
        SegmentsEnd,
        SeriesResult,
        StepDone,
        StreamResult,
        Timeline,
        TrainingStarts,
        TrainResult,
        WindowPrediction,
    )

__version__ = "0.2.0"
__all__ = [
    "VIDEO_SUFFIXES",
    "AnswersStart",
    "CheckpointError",
    "ClassTable",
    "Comparison",
    "DataError",
    "DownloadResult",
    "DryRun",
    "EpochDone",
    "EvalResult",
    "Event",
    "Explanation",
    "ExportResult",
    "ExtractResult",
    "Interrupted",
    "Model",
    "ModelError",
    "Note",
    "PredictResult",
    "Prediction",
    "Progress",
    "RunError",
    "Scan",
    "Segment",
    "SegmentFound",
    "SegmentsEnd",
    "SeriesResult",
    "SettingsError",
    "StepDone",
    "StreamResult",
    "Timeline",
    "TimelineResult",
    "TrainResult",
    "TrainingStarts",
    "TvitError",
    "VideoError",
    "WindowPrediction",
    "__version__",
    "download",
    "evaluate",
    "export",
    "extract",
    "load_model",
    "make_motions",
    "predict",
    "read_video",
    "train",
]
# In the order of their import times.
_MODULES = (
    "errors",
    "results",
    "api",
    "data.layout",
    "data.motions",
    "data.video",
    "engine.predict.model",
    "engine.predict",
    "engine.export",
    "engine.download",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # See Note [Waiting threads sleep]
        for path in _MODULES:
            module = importlib.import_module(f"tvit_cli.{path}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
