"""Mixup and CutMix."""

import pytest
import torch

from tvit_cli.data.augment import Mixing, mix

SIZE = 24


def clips(count):
    return torch.rand(count, 3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def go(pixels, partners, mixing, *, seed=0, epochs=None, indices=None):
    count = len(pixels)
    return mix(
        pixels, partners, torch.tensor(epochs or [0] * count), torch.tensor(indices or list(range(count))),
        mixing=mixing, seed=seed,
    )  # fmt: skip


def pair_of(count):
    """Clips of ones, each with a partner of zeros after them: a mixture's pixels are the clip's share."""
    return torch.cat([torch.ones(count, 2, 3, SIZE, SIZE), torch.zeros(1, 2, 3, SIZE, SIZE)])


def test_mixup_blends_every_pixel_by_the_share():
    pixels = clips(5)
    mixed, shares = go(pixels, [1, 0, 4], Mixing(mixup=0.8))
    assert mixed.shape == (3, 3, 3, SIZE, SIZE) and shares.shape == (3,)
    for place, partner in enumerate([1, 0, 4]):
        share = shares[place]
        assert 0 < share < 1
        wanted = share * pixels[place] + (1 - share) * pixels[partner]
        assert torch.allclose(mixed[place], wanted, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_are_spread_as_the_beta_distribution(alpha):
    _, shares = go(pair_of(600), [600] * 600, Mixing(mixup=alpha))
    assert shares.mean() == pytest.approx(0.5, abs=0.06)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def test_cutmix_pastes_one_box_in_all_frames_and_returns_its_share():
    count = 200
    mixed, shares = go(pair_of(count), [count] * count, Mixing(cutmix=1.0))
    for clip, share in zip(mixed, shares, strict=True):
        assert torch.equal(clip, clip[:1, :1].expand_as(clip))
        pasted = clip[0, 0] == 0
        assert share == pytest.approx(1 - pasted.float().mean().item(), abs=1e-6)
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns)
        assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2
    assert shares.min() < 0.2 and shares.max() > 0.95
    centre = (mixed[:, 0, 0] == 0).float().mean(0)
    assert centre.min() > 0.1  # every pixel is pasted over now and then


def test_with_both_each_clip_draws_which():
    count = 200
    mixed, _ = go(pair_of(count), [count] * count, Mixing(mixup=1.0, cutmix=1.0))
    pasted = sum(set(clip.unique().tolist()) <= {0.0, 1.0} for clip in mixed)
    assert 70 < pasted < 130


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(0.4, 0.4)])
def test_a_mixture_depends_on_its_key_and_not_on_its_batch(mixing):
    pixels = clips(4)
    together, shares = go(pixels, [1, 0, 3, 2], mixing, epochs=[3] * 4, indices=[7, 8, 9, 10])
    for place, partner in enumerate([1, 0, 3, 2]):
        alone, share = go(pixels[[place, partner]], [1], mixing, epochs=[3, 3], indices=[7 + place, 0])
        assert torch.equal(alone[0], together[place]) and torch.equal(share[0], shares[place])
    one = Mixing(mixup=0.8)
    base = go(pixels, [1], one, epochs=[3] * 4)[1]
    assert base != go(pixels, [1], one, epochs=[4] * 4)[1]
    assert base != go(pixels, [1], one, epochs=[3] * 4, indices=[1, 1, 1, 1])[1]
    assert base != go(pixels, [1], one, epochs=[3] * 4, seed=1)[1]
    torch.manual_seed(9)
    assert base == go(pixels, [1], one, epochs=[3] * 4)[1]


def test_a_clip_that_is_its_own_partner_stays_as_it_is():
    pixels = clips(1)
    for mixing in (Mixing(mixup=0.8), Mixing(cutmix=1.0)):
        assert torch.equal(go(pixels, [0], mixing)[0], pixels)


def test_a_tiny_alpha_leaves_one_clip_or_the_other():
    mixed, shares = go(pair_of(50), [50] * 50, Mixing(mixup=1e-6))
    assert set(shares.round(decimals=3).tolist()) == {0.0, 1.0}
    assert torch.isfinite(mixed).all()
