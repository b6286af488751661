"""Does an explanation point at the moving object, and does what it points at matter? On the demo motions.

    python tests/bench/explain.py [--model MODEL --data data/motions] [--clips 64] [--subset test] [--others]

Without a model, the quickstart's is trained first, in a temporary folder. Pointing game (arXiv:1608.00507): the
centre of the most relevant patch of a clip lies in the object's box in that frame, by the boxes that the data set
stores; chance is the share of patches whose centre does. Deletion: the score of the label without the most
relevant and without random patches. With several blanks to integrate from; with `--others`, other maps instead.
"""

from __future__ import annotations

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
from maps import gradient_weighted, in_groups, masked_gradients, rollout
from timeline import quickstart
from torch import Tensor, nn

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.video import read_clip
from tvit_cli.engine.predict.explain import STEPS, blank_clip, by_patch, deletion_test, integrated_gradients
from tvit_cli.engine.trained import Trained, open_trained
from tvit_cli.portable.reading import segment_indices

BLANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean colour": blank_clip,
    "ImageNet's mean colour": torch.zeros_like,
    "blurred": lambda clip: F.avg_pool2d(clip, 33, 1, 16, count_include_pad=False),
    "mean over time": lambda clip: clip.mean(0, keepdim=True).expand_as(clip),
    "median over time": lambda clip: clip.median(0, keepdim=True).values.expand_as(clip),
}


Map = Callable[[nn.Module, Tensor, Tensor, int], Tensor]  # of model, clip, blank, label -> (T, P, P)


def integrated(steps: int = STEPS) -> Map:
    """What --explain draws."""
    return lambda model, clip, blank, label: by_patch(
        integrated_gradients(model, clip, blank, label, steps=steps), model.config.patch_size
    )


def smoothed(noise: float, samples: int) -> Map:
    """Integrated gradients of the clip with noise, averaged (arXiv:1706.03825)."""

    def relevance(model: nn.Module, clip: Tensor, blank: Tensor, label: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noisy = (clip + noise * torch.randn(clip.shape, generator=generator) for _ in range(samples))
        maps = [integrated()(model, one, blank, label) for one in noisy]
        return torch.stack(maps).mean(0)

    return relevance


def averaged(*blanks: str) -> Map:
    """Integrated gradients from several blanks, averaged."""
    return lambda model, clip, blank, label: torch.stack(
        [integrated()(model, clip, BLANKS[name](clip), label) for name in blanks]
    ).mean(0)


OTHERS: dict[str, Map] = {
    "integrated gradients": integrated(),
    "64 steps": integrated(64),
    "smoothed, 4 of 0.1 sd": smoothed(0.1, 4),
    "from mean colour and mean over time": averaged("mean colour", "mean over time"),
    "from mean colour and blurred": averaged("mean colour", "blurred"),
    "gradients with random patches blank, 64": masked_gradients(64),
    "a random eighth of the patches after the other, 8 times": in_groups(8, 8),
    "gradient-weighted attention": gradient_weighted,
    "attention rollout": rollout,
}


def inside(boxes: Tensor, side: int, size: int) -> Tensor:
    """Which patches have their centre in a frame's box: (T, 4) -> (T, P, P)."""
    centre = (torch.arange(side) + 0.5) * size
    left, top, right, bottom = boxes.unbind(1)
    rows = (centre >= top[:, None]) & (centre <= bottom[:, None])
    columns = (centre >= left[:, None]) & (centre <= right[:, None])
    return rows[:, :, None] & columns[:, None, :]


def play(
    trained: Trained, clips: list[Path], data: Path, blank: Callable[[Tensor], Tensor], attribute: Map
) -> dict[str, float]:
    boxes = json.loads((data / "boxes.json").read_text(encoding="utf-8"))
    preprocessing, size = trained.card.preprocessing, trained.model.config.patch_size
    rows = []
    for path in clips:
        read = read_clip(path, lambda count: segment_indices(count, preprocessing.n_frames))
        frames = torch.from_numpy(read.frames).permute(0, 3, 1, 2)
        (clip,) = eval_transform([frames], preprocessing=preprocessing, device=trained.device)
        with torch.no_grad():
            label = int(trained.model(clip[None]).argmax())
        relevance = attribute(trained.model, clip, blank(clip), label)
        box = torch.tensor(boxes[path.relative_to(data).as_posix()])[list(read.indices)]
        hits = inside(box, relevance.shape[-1], size)
        test = deletion_test(trained.model, clip, blank(clip), relevance, label)
        rows.append(
            (
                float(hits.flatten()[relevance.argmax()]),
                float(hits.float().mean()),
                sum(test.relevant) / len(test.relevant),
                sum(test.random) / len(test.random),
                float(test.holds),
                float(sum(test.relevant) < sum(test.random)),
            )
        )
    names = ("pointing", "chance", "without_relevant", "without_random", "holds", "beats_mean")
    return {name: round(sum(row[i] for row in rows) / len(rows), 3) for i, name in enumerate(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/motions"))
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--subset", default="test")
    parser.add_argument(
        "--others", action="store_true", help="other maps, from the blank that --explain takes"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder, data = (options.model, options.data) if options.model else quickstart(Path(made))
        trained = open_trained(folder, working_directory=Path(), device=torch.device("cpu"))
        clips = sorted(data.glob(f"{options.subset}/*/*.avi"))
        random.Random(0).shuffle(clips)
        clips = clips[: options.clips]
        if options.others:
            for name, attribute in OTHERS.items():
                found = play(trained, clips, data, blank_clip, attribute)
                print(json.dumps({"map": name, **found}), flush=True)
        else:
            for name, blank in BLANKS.items():
                print(
                    json.dumps({"blank": name, **play(trained, clips, data, blank, integrated())}), flush=True
                )


if __name__ == "__main__":
    main()
