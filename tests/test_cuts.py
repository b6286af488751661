"""Shot boundary detection."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tvit_cli.data.video import TimedFrame
from tvit_cli.engine.predict.timeline import ShotBoundaries

RATE = 12
Picture = NDArray[np.uint8]


def scene(seed, size=32):
    """A soft texture, wider than the picture that looks at it."""
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12, 3))
    return np.kron(coarse, np.ones((size // 4, size // 4, 1))).astype(np.uint8)


def cuts_of(picture_at, frames, every=3):
    """The detector after every third frame."""

    def played():
        for number in range(frames):
            yield TimedFrame(
                number / RATE, (number + 1) / RATE, None, lambda number=number: picture_at(number)
            )

    cuts = ShotBoundaries()
    for number, frame in enumerate(cuts.watch(played())):
        if number % every == every // 2:
            assert np.array_equal(frame.picture(), picture_at(number))
    return cuts


def pan(number, seed=0, speed=1):
    left = speed * number % 48
    return scene(seed)[:32, left : left + 32]


@pytest.mark.parametrize("size", [32, 256])
def test_a_cut_is_found_midway_between_the_pictures_that_differ(size):
    first, second = scene(1, size), scene(2, size)
    cuts = cuts_of(lambda n: (first if n < 24 else second)[n % 24 : size + n % 24, :size], 48)
    assert cuts.finish() == pytest.approx([24 / RATE])
    assert cuts.decided == pytest.approx(46.5 / RATE - 3 / RATE / 2 - 1 / RATE / 2, abs=0.2)


def test_what_moves_flashes_or_stands_still_is_no_cut():
    noise = np.random.default_rng(0).integers(-3, 4, (48, 32, 32, 3))
    still = scene(3)[:32, :32].clip(3, 252)
    assert cuts_of(pan, 48).finish() == []
    assert cuts_of(lambda n: (still + noise[n]).astype(np.uint8), 48).finish() == []
    white = np.full((32, 32, 3), 255, np.uint8)
    assert cuts_of(lambda n: white if 24 <= n < 27 else still, 48).finish() == []


def test_pictures_that_come_twice_are_no_cuts_and_no_picture_is_nothing():
    # every second one that is taken is the last one again
    assert cuts_of(lambda n: pan(n // 6 * 6), 48).finish() == []
    assert cuts_of(pan, 1).finish() == [] and cuts_of(pan, 48, every=99).finish() == []
