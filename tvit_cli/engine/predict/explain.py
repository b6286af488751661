"""Explanations: integrated gradients per patch, and a deletion test of them.

Letters: T frames, C channels, S the side of a frame, p pixels along a patch, P patches along a frame.

Note [Integrated gradients]
Integrated gradients (arXiv:1703.01365) average the gradient of the label's log probability on the straight path
from a blank clip to the clip. They fit any attention scheme and pooling, and the relevance of all patches sums to
log p(clip) - log p(blank). Attention rollout (arXiv:2005.00928) and gradient-weighted attention (arXiv:2103.15679)
ignore paths without a softmax; deleting their patches lowered the score less than deleting random ones. A blank of
the clip's mean colour located moving objects better than four others (docs/negative-results.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tvit_cli.data.augment import eval_transform
from tvit_cli.engine.evaluate.scoring import clips_to_score, unlabelled_video
from tvit_cli.engine.predict.paths import output_file
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import ModelError, VideoError
from tvit_cli.files import Source

STEPS = 16  # on the path from blank to clip
BATCH = 4  # of them in one pass
SHARES = (0.05, 0.1, 0.2, 0.3)  # of all patches, deleted together
RANDOM_ORDERS = 19  # the smallest p-value is 1 / 20
WEAK = 0.05  # mean difference of the label's score, below which a map is called weakly better than chance


@dataclass(frozen=True)
class Deletion:
    """Scores of the label after deleting shares of the patches: most relevant first, and in random order."""

    shares: tuple[float, ...]
    relevant: tuple[float, ...]
    random: tuple[float, ...]  # mean over the orders
    p_value: float  # share of the orders, with that of the relevance, that lower the score as much

    @property
    def effect(self) -> float:
        """Mean difference of the score between random deletions and those of the most relevant patches."""
        return (sum(self.random) - sum(self.relevant)) / len(self.shares)

    @property
    def beaten(self) -> float:
        """Share of the random orders that lower the score less than the order of relevance."""
        return 1 - (self.p_value * (1 + RANDOM_ORDERS) - 1) / RANDOM_ORDERS

    @property
    def holds(self) -> bool:
        """Whether the order of relevance lowers the score more than every random order."""
        return self.p_value <= 1 / (1 + RANDOM_ORDERS)

    @property
    def verdict(self) -> str:
        """Result of the deletion test in a sentence."""
        result = "no better than chance"
        if self.holds:
            is_weak = self.effect < WEAK
            result = f"weakly better than chance (below {WEAK:g})" if is_weak else "better than chance"
        return (
            f"without the {self.shares[-1]:.0%} most relevant patches the score is {self.relevant[-1]:.3f}, "
            f"without random ones {self.random[-1]:.3f}; mean difference {self.effect:.3f}, "
            f"{self.beaten:.0%} of random orders beaten (p = {self.p_value:.2f}): the map is {result}"
        )


@dataclass(frozen=True)
class Explanation:
    """Relevance of each patch for (positive) and against a label, on the CPU, and its deletion test.

    `relevance` (T, P, P) sums to log p(clip) - log p(blank), up to the error of the integral. `clip` (T, C, S, S)
    is the model's input.
    """

    video: str
    label: str
    score: float
    clip: Tensor
    relevance: Tensor
    deletion: Deletion

    @property
    def frames(self) -> Tensor:
        """Share of each frame in the positive relevance, (T,): sums to 1, or all 0 without any."""
        positive = self.relevance.clamp(min=0).sum((1, 2))
        total = positive.sum()
        return positive / total if total > 0 else positive


def explain(
    trained: Trained,
    location: Source,
    label: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Explains a label (default: the best) of a video; `progress` gets the passes done and in all.

    Raises VideoError, ModelError for an unknown label.
    """
    card, model = trained.card, trained.model
    if label is not None and label not in card.labels:
        raise ModelError(f"{label}: is no label of {trained.folder}. It has {', '.join(card.labels)}.")
    clips = clips_to_score([unlabelled_video(location, trained)], card.labels, card.preprocessing)
    item = clips.dataset[0, 0]
    if item.error:
        raise VideoError(f"{location}: {item.error}")
    (clip,) = eval_transform([item.frames], preprocessing=card.preprocessing, device=trained.device)
    done, total = 0, STEPS // BATCH + 1 + RANDOM_ORDERS

    def passed() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with torch.no_grad(), trained.autocast():  # as in prediction; the explanation is in float32
        logits = model(clip[None])
    trained.check_scores(logits)
    scores = logits.cpu().double().softmax(1)[0]  # MPS has no float64
    index = int(scores.argmax()) if label is None else card.labels.index(label)
    blank = blank_clip(clip)
    relevance = by_patch(
        integrated_gradients(model, clip, blank, index, passed=passed), model.config.patch_size
    )
    return Explanation(
        video=str(location),
        label=card.labels[index],
        score=float(scores[index]),
        clip=clip.cpu(),
        relevance=relevance.cpu(),
        deletion=deletion_test(model, clip, blank, relevance, index, passed=passed),
    )


def blank_clip(clip: Tensor) -> Tensor:
    """The clip's mean colour everywhere, (T, C, S, S) -> the same shape."""
    return clip.mean(dim=(0, 2, 3), keepdim=True).expand_as(clip)


def integrated_gradients(
    model: nn.Module,
    clip: Tensor,
    blank: Tensor,
    label: int,
    *,
    steps: int = STEPS,
    passed: Callable[[], None] = lambda: None,
) -> Tensor:
    """Relevance of each value of a clip for the label's log probability, (T, C, S, S).

    See Note [Integrated gradients]. Steps are denser near the blank, at cubes of even positions, where
    norms make the model change fastest.
    """
    total = torch.zeros_like(clip)
    even = (torch.arange(steps, device=clip.device) + 0.5) / steps  # the midpoint rule
    positions, weights = even**3, 3 * even**2 / steps
    shape = (-1, 1, 1, 1, 1)
    for position, weight in zip(torch.split(positions, BATCH), torch.split(weights, BATCH), strict=True):
        on_path = torch.lerp(blank, clip, position.view(shape)).requires_grad_(True)
        log_scores = model(on_path).float().log_softmax(1)[:, label]
        (gradient,) = torch.autograd.grad(log_scores.sum(), on_path)
        total += (gradient * weight.view(shape)).sum(0)
        passed()
    return total * (clip - blank)


def by_patch(values: Tensor, patch_size: int) -> Tensor:
    """Sums over channels and the pixels of each patch, (T, C, S, S) -> (T, P, P)."""
    side = values.shape[-1] // patch_size
    return values.sum(1).reshape(len(values), side, patch_size, side, patch_size).sum((2, 4))


@torch.no_grad()
def deletion_test(
    model: nn.Module,
    clip: Tensor,
    blank: Tensor,
    relevance: Tensor,
    label: int,
    *,
    passed: Callable[[], None] = lambda: None,
) -> Deletion:
    """Deletes the most relevant patches, and as many random ones, and compares the label's scores."""
    generator = torch.Generator().manual_seed(0)  # the result depends on the clip alone
    count = relevance.numel()
    orders = [relevance.flatten().argsort(descending=True, stable=True).cpu()]
    orders += [torch.randperm(count, generator=generator) for _ in range(RANDOM_ORDERS)]
    rows = []
    for order in orders:
        clips = [blanked(clip, blank, relevance.shape, order[: round(share * count)]) for share in SHARES]
        rows.append(model(torch.stack(clips)).cpu().double().softmax(1)[:, label])
        passed()
    scores = torch.stack(rows)  # (orders, shares)
    means = scores.mean(1)
    return Deletion(
        shares=SHARES,
        relevant=tuple(scores[0].tolist()),
        random=tuple(scores[1:].mean(0).tolist()),
        p_value=(1 + int((means[1:] <= means[0]).sum())) / len(orders),
    )


def blanked(clip: Tensor, blank: Tensor, shape: torch.Size, patches: Tensor) -> Tensor:
    """A clip with some patches, numbered across frames, replaced by the blank's."""
    chosen = torch.zeros(shape.numel(), dtype=torch.bool)
    chosen[patches] = True
    size = clip.shape[-1] // shape[-1]
    mask = chosen.view(shape).repeat_interleave(size, 1).repeat_interleave(size, 2)
    return torch.where(mask[:, None].to(clip.device), blank, clip)


def write_explanation(path: Path, explanation: Explanation, trained: Trained) -> None:
    """Writes the film strip as a PNG. Raises RunError where it cannot be written; an older file then stays."""
    data = explanation_png(explanation, trained)
    with output_file("--explain", path) as temporary:
        temporary.write_bytes(data)


def explanation_png(explanation: Explanation, trained: Trained, *, dark: bool = False) -> bytes:
    """The film strip as a PNG, in light or dark colours."""
    from tvit_cli.report.film import ExplanationStrip, relevance_png  # imports PIL

    strip = ExplanationStrip(
        title=f"{explanation.label} {explanation.score:.3f}",
        verdict=explanation.deletion.verdict,
        relevance=explanation.relevance,
        frames=explanation.frames.tolist(),
    )
    return relevance_png(explanation.clip, trained.card.preprocessing, strip, dark=dark)
