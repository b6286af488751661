"""What is classified, standardised over training clips before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object

from tvit_cli.data.layout import Video
from tvit_cli.engine.build import Built
from tvit_cli.engine.events import Note, Progress, Report
from tvit_cli.engine.scoring import WithFeatures, merge_scores, score
from tvit_cli.engine.source import Source
from tvit_cli.errors import DataError
from tvit_cli.model.additions import FeatureNorm

# Note [What all clips share]
# The clips of one data set look alike to a pretrained network: on Weizmann, of a feature of DINOv2-S, what all
# clips have in common is 2.0 and what they differ by 1.1 (both as root mean squares). The classifier's gradient
# is mostly of the common part, so that each step raises and lowers the score of a class for all clips at once,
# and the adapters learn from that noise. Without it they learn faster and better: tests/bench/RESULTS.md.

MOST_CLIPS = 256
BATCH_SIZE = 8  # always, so that the last bits depend neither on the micro-batch nor on the processes


def standardise_features(
    built: Built, source: Source, accelerator: Accelerator, *, workers: int, report: Report
) -> None:
    """Fit the model's `feature_norm` to training clips, each seen as evaluation sees it.

    All processes read their share and get the same numbers. Raises DataError when no clip can be read.
    """
    norm = built.model.feature_norm
    assert isinstance(norm, FeatureNorm)
    chosen = clips_to_standardise(source)
    own = score(
        WithFeatures(built.model),
        chosen,
        source.layout.labels,
        built.preprocessing,
        device=accelerator.device,
        batch_size=BATCH_SIZE,
        workers=workers,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        autocast=accelerator.autocast,
        store=source.store,
        progress=lambda done, total: report(Progress("standardising features", done, total)),
    )
    scores = merge_scores(gather_object([own]))
    if not len(scores.indices):
        raise DataError(f"{source.layout.root}: none of {len(chosen)} training videos can be read.")
    norm.fit(scores.logits[:, built.config.num_classes :].double())
    report(Note(f"Features standardised over {len(scores.indices)} training clips.", "detail"))


def clips_to_standardise(source: Source) -> list[Video]:
    """The training videos whose features are standardised."""
    return _evenly(source.readable("train"))


def _evenly(videos: Sequence[Video]) -> list[Video]:
    """At most MOST_CLIPS of them, from all places of the list."""
    count = min(len(videos), MOST_CLIPS)
    return [videos[(2 * i + 1) * len(videos) // (2 * count)] for i in range(count)]
