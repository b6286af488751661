"""Explanations: integrated gradients, deletion test, film strip."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_model
from torch import Tensor, nn

import tvit_cli
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.predict import predict
from tvit_cli.engine.predict.explain import (
    Deletion,
    Explanation,
    blank_clip,
    blanked,
    by_patch,
    deletion_test,
    integrated_gradients,
)
from tvit_cli.errors import DataError, ModelError, VideoError
from tvit_cli.portable.config import ATTENTIONS, POOLS
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.report.drawing import PALETTE
from tvit_cli.report.film import ExplanationStrip, patch_brightness, relevance_png
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.predict import PredictSettings


class Spot(nn.Module):
    """Odds of class 1 against 0 are the sum over one patch, rows 4-7, columns 8-11, of frames 1 to 3, times a weight."""

    def forward(self, clips: Tensor) -> Tensor:
        seen = clips[:, 1:, :, 4:8, 8:12].sum((1, 2, 3, 4)) * 0.01
        return torch.stack([torch.zeros_like(seen), seen], 1)


def test_relevance_adds_up_to_the_log_score():
    clip = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip[1:, :, 4:8, 8:12] += 2
    blank = blank_clip(clip)
    assert blank.shape == clip.shape and blank[0, 1, 3, 4] == pytest.approx(
        clip[:, 1].mean().item(), abs=1e-6
    )
    values = integrated_gradients(Spot(), clip, blank, 1, steps=64)
    patches = by_patch(values, 4)
    assert patches.shape == (4, 4, 4)
    chosen = torch.zeros(4, 4, 4, dtype=torch.bool)
    chosen[1:, 1, 2] = True
    assert (patches[~chosen] == 0).all()
    before, after = (Spot()(x[None]).log_softmax(1)[0, 1].item() for x in (blank, clip))
    assert patches[chosen].sum().item() == pytest.approx(after - before, abs=1e-3)


@pytest.mark.parametrize(
    ("relevance", "shares"),
    [
        ([[3.0, -1.0], [1.0, 0.0]], [0.75, 0.25]),
        ([[3e-20, -1.0], [1e-20, 0.0]], [0.75, 0.25]),
        ([[-3.0, 0.0], [0.0, -1.0]], [0.0, 0.0]),
    ],
)
def test_frame_shares_sum_to_1_or_are_all_0(relevance, shares):
    by_frame = torch.tensor(relevance)[:, :, None]  # (T, P, 1)
    deletion = Deletion(shares=(), relevant=(), random=(), p_value=1.0)
    explanation = Explanation("a.avi", "A", 0.5, torch.zeros(2, 3, 4, 4), by_frame, deletion)
    assert explanation.frames.tolist() == pytest.approx(shares)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_relevance_adds_up_for_every_scheme_and_pooling(attention, pool):
    config = ViTConfig(
        num_classes=3, frame_size=16, patch_size=8, n_frames=4, tubelet_size=1 if attention == "space" else 2,
        width=8, depth=2, num_heads=2, attention=attention, pool=pool,
    )  # fmt: skip
    model = build_model(config, seed=1, from_scratch=True).eval()
    clip = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    blank = blank_clip(clip)
    total = by_patch(integrated_gradients(model, clip, blank, 2, steps=128), 8).sum().item()
    with torch.no_grad():
        before, after = (model(x[None]).log_softmax(1)[0, 2].item() for x in (blank, clip))
    assert total == pytest.approx(after - before, abs=0.02 + 0.02 * abs(after - before))


def test_a_true_map_beats_every_random_order_and_a_false_one_does_not():
    clip = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clip[1:, :, 4:8, 8:12] += 2
    blank = blank_clip(clip)
    true = by_patch(integrated_gradients(Spot(), clip, blank, 1), 4)
    test = deletion_test(Spot(), clip, blank, true, 1)
    assert test.holds and test.p_value == 1 / 20
    assert max(test.relevant) < min(test.random)
    false = deletion_test(Spot(), clip, blank, -true, 1)  # the patches that matter go last
    assert not false.holds and false.p_value == 1
    assert deletion_test(Spot(), clip, blank, true, 1) == test  # nothing is drawn from outside


def test_deleting_replaces_whole_patches_by_the_blank():
    clip = torch.rand(2, 3, 8, 8)
    blank = blank_clip(clip)
    found = blanked(clip, blank, torch.Size((2, 2, 2)), torch.tensor([1, 6]))
    changed = (found != clip).any(1)
    assert changed[0, :4, 4:].all() and changed[1, 4:, :4].all() and int(changed.sum()) == 32
    assert torch.equal(found[0, :, :4, 4:], blank[0, :, :4, 4:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that is not trained, and a video beside it."""
    root = tmp_path_factory.mktemp("explain")
    make_model(root / "model", ("Left", "Right"))
    frames = np.random.default_rng(0).integers(0, 255, (9, 40, 48, 3)).astype(np.uint8)
    write_video(root / "clip.avi", frames)
    return root


def test_the_verb_writes_a_strip_of_one_video(folder, tmp_path):
    out = tmp_path / "new" / "why.png"
    notes = []
    settings = PredictSettings(
        paths=(str(folder / "clip.avi"),), model=folder / "model", explain=out, device="cpu"
    )
    predict(settings, lambda event: notes.append(str(event)))
    assert Image.open(io.BytesIO(out.read_bytes())).size[0] >= 2 * 4 * 112
    assert any("without random ones" in note for note in notes)
    passes = [f"Progress(task='explaining', done={n}, total=24, unit='')" for n in range(1, 25)]
    assert [note for note in notes if "explaining" in note] == passes
    with pytest.raises(DataError, match="takes one video, 2 are named"):
        predict(settings.model_copy(update={"paths": settings.paths * 2}))


def test_a_label_can_be_named_and_is_checked(folder, tmp_path):
    model = tvit_cli.load_model(folder / "model", device="cpu")
    both = [model.explain(folder / "clip.avi", label=label) for label in model.labels]
    assert both[0].score + both[1].score == pytest.approx(1) and both[0].relevance.shape == (4, 4, 4)
    assert both[0].frames.sum().item() == pytest.approx(1)
    assert model.explain(folder / "clip.avi").score == max(b.score for b in both)
    light, dark = (model.draw_explanation(both[0], dark=dark) for dark in (False, True))
    model.write_explanation(tmp_path / "why.png", both[0])
    assert (tmp_path / "why.png").read_bytes() == light != dark
    with pytest.raises(ModelError, match="Up: is no label"):
        model.explain(folder / "clip.avi", label="Up")
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(VideoError, match="not a video"):
        model.explain(tmp_path / "text.avi")


def test_the_strip_is_bright_where_the_relevance_is():
    relevance = torch.zeros(2, 2, 2)
    relevance[1, 0, 1], relevance[0, 1, 1] = 4.0, -3.0
    assert patch_brightness(relevance)[1, 0, 1] == 1 and patch_brightness(relevance).sum() == 1
    reading = ExplanationStrip("Left 0.9", "it holds", relevance, [0.0, 1.0])
    white = Preprocessing(n_frames=2, frame_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    image = np.asarray(
        Image.open(io.BytesIO(relevance_png(torch.ones(2, 3, 16, 16), white, reading))).convert("L")
    )
    dark = Image.open(io.BytesIO(relevance_png(torch.ones(2, 3, 16, 16), white, reading, dark=True)))
    assert "#{:02x}{:02x}{:02x}".format(*dark.getpixel((2, 2))) == PALETTE["paper"][1]  # type: ignore[misc]
    top = (30 + 112 + 4) * 2
    second = image[top : top + 224, (12 + 116) * 2 : (12 + 116) * 2 + 224]
    assert second[:100, 124:].min() > 250 and second[124:].max() < 80 and second[:100, :100].max() < 80


def test_the_verdict_has_effect_beaten_orders_and_weakly():
    weak = Deletion((0.1, 0.3), (0.30, 0.280), (0.31, 0.295), 1 / 20)
    assert weak.verdict == (
        "without the 30% most relevant patches the score is 0.280, without random ones 0.295; mean difference "
        "0.012, 100% of random orders beaten (p = 0.05): the map is weakly better than chance (below 0.05)"
    )
    strong = Deletion((0.1, 0.3), (0.2, 0.1), (0.8, 0.6), 1 / 20)
    assert "mean difference 0.550" in strong.verdict and strong.verdict.endswith("is better than chance")
    false = Deletion((0.1, 0.3), (0.9, 0.8), (0.8, 0.6), 1.0)
    assert "-0.150, 0% of random orders" in false.verdict and false.verdict.endswith("no better than chance")
