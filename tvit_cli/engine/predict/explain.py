"""Explanations: integrated gradients per patch, and a deletion test of them.

Letters: T frames, C channels, S the side of a frame, p pixels along a patch, P patches along a frame.

Note [One relevance for every scheme]
Attention rollout (arXiv:2005.00928) and gradient-weighted attention (arXiv:2103.15679) multiply attention
matrices from block to block. They say nothing of what does not pass through a softmax (an MLP, a gate), and every
scheme needs a rule of its own for how frames meet. Integrated gradients (arXiv:1703.01365) ask the model as a
whole: the gradient of the label's log score is averaged on the straight way from a blank clip to this one and
multiplied by what changes on it. It holds for any scheme and pooling by construction, and it adds up: the
relevance of all patches is log score(clip) - log score(blank). The blank is the clip's own mean colour. On the
demo motions the strongest patch then lay on the moving object more often than with four other blanks, and
deleting what attention's maps point at did less harm than deleting random patches (docs/negative-results.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.clips import ClipDataset
from tvit_cli.engine.predict.paths import as_video
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import ModelError, RunError, VideoError
from tvit_cli.files import Location, atomic_write

STEPS = 16  # on the way from blank to clip
AT_ONCE = 4  # of them in one pass
SHARES = (0.05, 0.1, 0.2, 0.3)  # of all patches, deleted together
RANDOM_ORDERS = 19  # so that being better than all of them has p = 1 / 20
SEED = 0  # of the random orders: the same clip has the same answer


@dataclass(frozen=True)
class Deletion:
    """The label's score with shares of the patches blanked: the most relevant first, and in random orders."""

    shares: tuple[float, ...]
    relevant: tuple[float, ...]
    random: tuple[float, ...]  # mean over the orders
    p_value: float  # share of orders, this one among them, that make the score fall as far

    @property
    def holds(self) -> bool:
        """Whether the map finds what matters better than every random order does."""
        return self.p_value <= 1 / (1 + RANDOM_ORDERS)


@dataclass(frozen=True)
class Explanation:
    """What speaks for a label (positive) and against it, by patch, on the CPU; and whether that can be believed.

    The sum of `relevance` (T, P, P) is the log score of the clip less that of a blank one, up to the error of the
    integral. `clip` (T, C, S, S) is what the model was given.
    """

    video: str
    label: str
    score: float
    clip: Tensor
    relevance: Tensor
    deletion: Deletion

    @property
    def frames(self) -> Tensor:
        """Each frame's share of what speaks for the label, (T,): together 1, or all 0 where nothing does."""
        positive = self.relevance.clamp(min=0).sum((1, 2))
        total = positive.sum()
        return positive / total if total > 0 else positive


def explain(trained: Trained, place: Location, label: str | None = None) -> Explanation:
    """Explain one label of a video, the best unless named. Raises VideoError, ModelError for an unknown label."""
    card = trained.card
    if label is not None and label not in card.labels:
        raise ModelError(f"{label}: is no label of {trained.folder}. It has {', '.join(card.labels)}.")
    dataset = ClipDataset(
        [as_video(place, card.labels[0])],
        card.labels,
        n_frames=card.preprocessing.n_frames,
        short_side=card.preprocessing.scale_to,
        seed=0,
        training=False,
        grid=card.preprocessing.frame_grid,
    )
    item = dataset[0, 0]
    if item.error:
        raise VideoError(f"{place}: {item.error}")
    (clip,) = eval_transform([item.frames], preprocessing=card.preprocessing, device=trained.device)
    with torch.no_grad(), trained.autocast():  # as predicted; the explanation is in full precision
        scores = trained.model(clip[None]).cpu().double().softmax(1)[0]  # MPS has no float64
    index = int(scores.argmax()) if label is None else card.labels.index(label)
    blank = blank_clip(clip)
    relevance = by_patch(
        integrated_gradients(trained.model, clip, blank, index), trained.model.config.patch_size
    )
    return Explanation(
        video=str(place),
        label=card.labels[index],
        score=float(scores[index]),
        clip=clip.cpu(),
        relevance=relevance.cpu(),
        deletion=deletion_test(trained.model, clip, blank, relevance, index),
    )


def blank_clip(clip: Tensor) -> Tensor:
    """The clip's mean colour everywhere, (T, C, S, S) -> the same shape."""
    return clip.mean(dim=(0, 2, 3), keepdim=True).expand_as(clip)


def integrated_gradients(
    model: nn.Module, clip: Tensor, blank: Tensor, label: int, *, steps: int = STEPS
) -> Tensor:
    """What each value of a clip adds to the label's log score, (T, C, S, S).

    The steps lie closer near the blank, at cubes of even places: norms make the model change fastest there. See
    Note [One relevance for every scheme].
    """
    total = torch.zeros_like(clip)
    even = (torch.arange(steps, device=clip.device) + 0.5) / steps  # the midpoint rule
    places, weights = even**3, 3 * even**2 / steps
    for first in range(0, steps, AT_ONCE):
        some = slice(first, first + AT_ONCE)
        on_the_way = torch.lerp(blank, clip, places[some].view(-1, 1, 1, 1, 1)).requires_grad_(True)
        log_scores = model(on_the_way).float().log_softmax(1)[:, label]
        (gradient,) = torch.autograd.grad(log_scores.sum(), on_the_way)
        total += (gradient * weights[some].view(-1, 1, 1, 1, 1)).sum(0)
    return total * (clip - blank)


def by_patch(values: Tensor, patch_size: int) -> Tensor:
    """Sums over channels and the pixels of each patch, (T, C, S, S) -> (T, P, P)."""
    side = values.shape[-1] // patch_size
    return values.sum(1).reshape(len(values), side, patch_size, side, patch_size).sum((2, 4))


@torch.no_grad()
def deletion_test(model: nn.Module, clip: Tensor, blank: Tensor, relevance: Tensor, label: int) -> Deletion:
    """Blank the most relevant patches, then as many random ones: how far does the label's score fall?"""
    generator = torch.Generator().manual_seed(SEED)
    count = relevance.numel()
    orders = [relevance.flatten().argsort(descending=True, stable=True).cpu()]
    orders += [torch.randperm(count, generator=generator) for _ in range(RANDOM_ORDERS)]
    rows = []
    for order in orders:
        clips = [blanked(clip, blank, relevance.shape, order[: round(share * count)]) for share in SHARES]
        rows.append(model(torch.stack(clips)).cpu().double().softmax(1)[:, label])
    scores = torch.stack(rows)  # (orders, shares)
    means = scores.mean(1)
    as_far = int((means[1:] <= means[0]).sum())
    return Deletion(
        shares=SHARES,
        relevant=tuple(scores[0].tolist()),
        random=tuple(scores[1:].mean(0).tolist()),
        p_value=(1 + as_far) / len(orders),
    )


def blanked(clip: Tensor, blank: Tensor, shape: torch.Size, patches: Tensor) -> Tensor:
    """A clip with some patches, numbered through all frames, replaced by the blank's."""
    chosen = torch.zeros(shape.numel(), dtype=torch.bool)
    chosen[patches] = True
    size = clip.shape[-1] // shape[-1]
    mask = chosen.view(shape).repeat_interleave(size, 1).repeat_interleave(size, 2)
    return torch.where(mask[:, None].to(clip.device), blank, clip)


def write_explanation(path: Path, explanation: Explanation, trained: Trained) -> None:
    """Write the film strip as a PNG. Raises RunError where it cannot be written; then an older one stays."""
    data = explanation_png(explanation, trained)
    try:
        with atomic_write(path) as beside:
            beside.write_bytes(data)
    except OSError as error:
        raise RunError(f"--explain {path}: cannot be written ({error.strerror}).") from error


def explanation_png(explanation: Explanation, trained: Trained, *, dark: bool = False) -> bytes:
    """The film strip as a PNG, on light paper or on dark."""
    from tvit_cli.report.film import ExplanationStrip, relevance_png

    deletion = explanation.deletion
    reading = ExplanationStrip(
        title=f"{explanation.label} {explanation.score:.3f}",
        verdict=verdict(deletion),
        relevance=explanation.relevance,
        frames=explanation.frames.tolist(),
    )
    return relevance_png(explanation.clip, trained.card.preprocessing, reading, dark=dark)


def verdict(deletion: Deletion) -> str:
    """What the deletion test says, in a sentence."""
    share, ours, theirs = (values[-1] for values in (deletion.shares, deletion.relevant, deletion.random))
    says = "the map holds" if deletion.holds else "the map says no more than chance"
    return (
        f"without the {share:.0%} most relevant patches the score is {ours:.3f}, without random ones {theirs:.3f} "
        f"(p = {deletion.p_value:.2f}): {says}"
    )
