"""What a model saw of a video when it was scored, read once more to be shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tvit_cli.data.clips import ClipDataset
from tvit_cli.data.transforms import eval_transform
from tvit_cli.engine.scoring import Views
from tvit_cli.settings.card import Preprocessing


@dataclass(frozen=True)
class Seen:
    """The clips of an evaluation, as the model was given them."""

    clips: ClipDataset
    preprocessing: Preprocessing
    views: Views

    def clip(self, name: str) -> Tensor | None:
        """The clip of a video by its name, normalised (T, C, S, S) float32; None where it cannot be read.

        Of several views of a video, the one in the middle.
        """
        item = self.clips[(0, self.clips.names.index(name))]
        if item.error:
            return None
        frames = item.frames.chunk(self.views.clips_per_video)[self.views.clips_per_video // 2]
        places = [place for place, mirrored in self.views.crops if not mirrored]
        place = places[len(places) // 2]
        return eval_transform(
            [frames], preprocessing=self.preprocessing, device=torch.device("cpu"), place=place, flip=False
        )[0]
