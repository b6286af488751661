"""Pointing game and deletion test of explanations on the demo motions.

    python tests/bench/explain.py [--model MODEL --data data/motions] [--clips 64] [--subset test]

Without a model, the quickstart's is trained first, in a temporary folder. Pointing game (arXiv:1608.00507): the
centre of the most relevant patch of a clip lies in the object's box in that frame, by the boxes that the data set
stores; chance is the share of patches whose centre does. Deletion: the score of the label without the most
relevant and without random patches. Integrated gradients start from several blank clips in turn.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
import torch.nn.functional as F
from timeline import quickstart
from torch import Tensor

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.video import read_clip
from tvit_cli.engine.predict.explain import blank_clip, by_patch, deletion_test, integrated_gradients
from tvit_cli.engine.trained import Trained, open_trained
from tvit_cli.portable.reading import segment_indices

BLANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean colour": blank_clip,
    "ImageNet's mean colour": torch.zeros_like,
    "blurred": lambda clip: F.avg_pool2d(clip, 33, 1, 16, count_include_pad=False),
    "mean over time": lambda clip: clip.mean(0, keepdim=True).expand_as(clip),
    "median over time": lambda clip: clip.median(0, keepdim=True).values.expand_as(clip),
}


def inside(boxes: Tensor, side: int, size: int) -> Tensor:
    """Which patches have their centre in a frame's box: (T, 4) -> (T, P, P)."""
    centre = (torch.arange(side) + 0.5) * size
    left, top, right, bottom = boxes.unbind(1)
    rows = (centre >= top[:, None]) & (centre <= bottom[:, None])
    columns = (centre >= left[:, None]) & (centre <= right[:, None])
    return rows[:, :, None] & columns[:, None, :]


def play(
    trained: Trained, clips: list[Path], data: Path, blank: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Mean scores of the clips' explanations."""
    boxes = json.loads((data / "boxes.json").read_text(encoding="utf-8"))
    preprocessing, size = trained.card.preprocessing, trained.model.config.patch_size
    rows = []
    for path in clips:
        read = read_clip(path, lambda count: segment_indices(count, preprocessing.n_frames))
        frames = torch.from_numpy(read.frames).permute(0, 3, 1, 2)
        (clip,) = eval_transform([frames], preprocessing=preprocessing, device=trained.device)
        with torch.no_grad():
            label = int(trained.model(clip[None]).argmax())
        gradients = integrated_gradients(trained.model, clip, blank(clip), label)
        relevance = by_patch(gradients, size)
        box = torch.tensor(boxes[path.relative_to(data).as_posix()])[list(read.indices)]
        hits = inside(box, relevance.shape[-1], size)
        test = deletion_test(trained.model, clip, blank(clip), relevance, label)
        rows.append(
            (
                float(hits.flatten()[relevance.argmax()]), float(hits.float().mean()),
                sum(test.relevant) / len(test.relevant), sum(test.random) / len(test.random),
                float(test.holds), float(sum(test.relevant) < sum(test.random)),
            )
        )  # fmt: skip
    names = ("pointing", "chance", "without_relevant", "without_random", "holds", "beats_mean")
    return {name: round(sum(row[i] for row in rows) / len(rows), 3) for i, name in enumerate(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/motions"))
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--subset", default="test")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder, data = (options.model, options.data) if options.model else quickstart(Path(made))
        trained = open_trained(folder, working_directory=Path(), device=torch.device("cpu"))
        clips = sorted(data.glob(f"{options.subset}/*/*.avi"))
        random.Random(0).shuffle(clips)
        clips = clips[: options.clips]
        for name, blank in BLANKS.items():
            print(json.dumps({"blank": name, **play(trained, clips, data, blank)}), flush=True)


if __name__ == "__main__":
    main()
