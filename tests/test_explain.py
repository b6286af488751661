"""Explanations and videos with their labels written into the picture."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_model
from torch import Tensor, nn

import tvit_cli
from tvit_cli.data.video import iter_frames, probe
from tvit_cli.data.video_writer import video_writer, write_video
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
from tvit_cli.engine.predict.timeline import WHOLE, annotate
from tvit_cli.errors import DataError, ModelError, RunError, VideoError
from tvit_cli.portable.config import ATTENTIONS, POOLS
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.report.drawing import PALETTE
from tvit_cli.report.film import ExplanationStrip, caption_mask, draw_caption, patch_brightness, relevance_png
from tvit_cli.results import Progress, Segment
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
    assert blank.shape == clip.shape
    assert blank[0, 1, 3, 4] == pytest.approx(clip[:, 1].mean().item(), abs=1e-6)
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


def test_every_frame_keeps_its_time_and_has_the_caption_of_its_segment(tmp_path, make_video):
    source = make_video(tmp_path / "a.mp4", frames=20, height=91, width=121, rate=10, pixel_format="yuv420p")
    out = tmp_path / "new" / "out.mp4"
    events = []
    segments = [Segment(0, 0.7, "A", 0.9), Segment(0.7, 2, "a much longer label", 0.8)]
    annotate(out, source, segments, events.append)
    before, after = list(iter_frames(source)), list(iter_frames(out))
    assert [p.start for p in after] == pytest.approx([p.start for p in before], abs=1e-3)
    assert (probe(out).width, probe(out).height) == (120, 90)
    assert events == [Progress("seconds written", second, 2) for second in (1, 2)]
    assert [p.end for p in after] == pytest.approx([p.end for p in before], abs=1e-3)
    assert after[0].length == pytest.approx(2.0, abs=1e-3)  # the last frame lasts as long as the others
    widths = []
    for a, b in zip(before, after, strict=True):
        change = np.abs(a.picture()[:90, :120].astype(int) - b.picture()).max(2) > 25
        assert not change[:60].any()  # the picture itself stays
        widths.append(int(np.flatnonzero(change.any(0)).max()))
    assert max(widths[:7]) < 60 < min(widths[7:])
    assert [path.name for path in out.parent.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_nearer_than_a_tick_of_the_output_are_all_written(tmp_path, suffix):
    ticks = [0, 1, 2, 3, 4, 3600, 3601, 7200, 10800]  # of 1/90,000 s, as MPEG-TS counts
    with video_writer(tmp_path / f"out{suffix}") as writer:
        for number, (start, end) in enumerate(pairwise([*ticks, 14400])):
            picture = np.full((48, 64, 3), 20 + 20 * number, np.uint8)
            writer.write(picture, start / 90_000, end / 90_000)
    found = list(iter_frames(tmp_path / f"out{suffix}"))
    assert [p.start for p in found] == pytest.approx([tick / 90_000 for tick in ticks], abs=1e-3)
    levels = [int(p.picture().mean()) for p in found]
    assert levels == pytest.approx([20 + 20 * number for number in range(len(ticks))], abs=6)


@pytest.mark.parametrize("height", [240, 720])
def test_colours_stay_as_they_are(tmp_path, height):
    colour = np.broadcast_to(np.array([200, 30, 30], np.uint8), (height, height, 3))
    with video_writer(tmp_path / "one.mp4") as writer:
        writer.write(colour, 0.0, 0.1)
        writer.write(colour, 0.1, 0.5)
    write_video(tmp_path / "all.mp4", np.stack([colour, colour]))
    for name in ("one.mp4", "all.mp4"):
        for frame in iter_frames(tmp_path / name):
            assert np.abs(frame.picture().astype(int) - colour).max() <= 3, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (31, 1)])
def test_a_video_of_one_pixel_is_annotated(height, width, tmp_path):
    source, out = tmp_path / "a.avi", tmp_path / "out.mp4"
    frames = np.full((4, height, width, 3), 90, np.uint8)
    write_video(source, frames, codec="png", pixel_format="rgb24")
    annotate(out, source, [Segment(0.0, WHOLE, "A", 0.9)])
    info = probe(out)
    assert (info.frames, info.height, info.width) == (4, max(height // 2 * 2, 2), max(width // 2 * 2, 2))


def test_a_caption_is_light_on_a_darkened_corner_and_fits_the_picture():
    picture = np.full((180, 240, 3), 100, np.uint8)
    out = draw_caption(picture, "Walk  0.93")
    rows, columns = caption_mask("Walk  0.93", 180, 240).shape
    assert (out[: 180 - rows] == 100).all() and (out[:, columns:] == 100).all()
    corner = out[180 - rows :, :columns]
    assert corner.max() > 230 and corner.min() == 35 and (picture == 100).all()
    assert caption_mask("a very long label indeed, " * 5, 48, 64).shape[1] <= 64


def test_a_video_does_not_replace_itself_and_a_failure_leaves_nothing(tmp_path, make_video):
    source = make_video(tmp_path / "a.mp4", frames=3)
    whole = [Segment(0, WHOLE, "A", 1.0)]
    with pytest.raises(DataError, match="is the video itself"):
        annotate(source, source, whole)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="not a video"):
        annotate(tmp_path / "out.mp4", tmp_path / "text.mp4", whole)
    with pytest.raises(RunError, match="could not be written"), video_writer(source / "below.mp4"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "text.mp4"]
