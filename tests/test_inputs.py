"""Clips, labels and weights that a batch gives to the model."""

import torch
from tiny import settings

from tvit_cli.data.clips import ClipBatch
from tvit_cli.engine.train.batches import MicroBatch, make_inputs
from tvit_cli.settings.card import Preprocessing

STILL = {"crop_scale_min": 1.0, "horizontal_flip": 0, "brightness": 0, "contrast": 0, "saturation": 0}
READ = [(0, 5), (0, 6), (0, 7)]  # the last only as a partner


def go(*, unreadable=(), real=2, **changes):
    """A pass of two clips, white 0 and black 1; a grey one, 2, is the partner of the second."""
    pairs = changes.get("mixup", 0) or changes.get("cutmix", 0)
    read = READ if pairs else READ[:2]
    planned = MicroBatch(
        epoch=0, step=0, keys=tuple(READ[:2]), extra=tuple(read[2:]), partners=(1, 2) if pairs else (),
        real=real, step_clips=3, ends_step=True, ends_epoch=False,
    )  # fmt: skip
    batch = ClipBatch(
        clips=[torch.full((2, 3, 16, 16), value, dtype=torch.uint8) for value in (255, 0, 127)[: len(read)]],
        labels=torch.arange(len(read)),
        epochs=torch.tensor([epoch for epoch, _ in read]),
        indices=torch.tensor([index for _, index in read]),
        weights=torch.tensor([float(place not in unreadable) for place in range(len(read))]),
        errors=[],
    )
    return make_inputs(
        planned,
        batch,
        settings=settings(**{**STILL, **changes}),
        preprocessing=Preprocessing(n_frames=2, frame_size=16, mean=(0, 0, 0), std=(1, 1, 1)),
        device=torch.device("cpu"),
    )


def test_without_mixing_each_clip_has_its_label():
    clips, targets = go()
    assert clips.shape == (2, 2, 3, 16, 16)
    assert clips.mean(dim=(1, 2, 3, 4)).tolist() == [1.0, 0.0]
    assert targets.labels.tolist() == [0, 1] and targets.weights.tolist() == [1, 1]
    assert targets.others is None and targets.shares is None


def test_mixed_clips_have_both_labels_and_partners_add_no_loss():
    for changes in ({"mixup": 1.0}, {"cutmix": 1.0}):
        clips, targets = go(**changes)
        assert clips.shape == (2, 2, 3, 16, 16)
        assert targets.labels.tolist() == [0, 1] and targets.weights.tolist() == [1, 1]
        assert targets.others is not None and targets.others.tolist() == [1, 2]
        assert targets.shares is not None
        white, grey = targets.shares[0], (1 - targets.shares[1]) * 127 / 255
        assert torch.allclose(clips.mean(dim=(1, 2, 3, 4)), torch.stack([white, grey]), atol=1e-5)


def test_a_clip_is_not_mixed_with_one_that_cannot_be_read():
    for changes in ({"mixup": 1.0}, {"cutmix": 1.0}):
        clips, targets = go(**changes, unreadable=(1,))
        assert torch.equal(clips[0], torch.ones_like(clips[0]))
        assert targets.others is not None and targets.others.tolist() == [0, 2]
        assert targets.weights.tolist() == [1, 0]


def test_clips_beyond_the_real_ones_weigh_nothing():
    assert go(real=1)[1].weights.tolist() == [1, 0]
    assert go(real=0, mixup=1.0)[1].weights.tolist() == [0, 0]
