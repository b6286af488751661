"""A caption burnt into a picture: light letters on a dark ground, in the lower left corner."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SHARE, LEAST = 18, 10  # letters are this part of the picture's height, and at least so many pixels
GROUND = 0.35  # how bright the picture stays behind the letters

Picture = NDArray[np.uint8]


def captioned(picture: Picture, text: str) -> Picture:
    """The picture, uint8 (H, W, 3), with a line of text; too long a line is drawn smaller."""
    height, width = picture.shape[:2]
    letters = caption_mask(text, height, width)  # (h, w) in [0, 1]
    rows, columns = letters.shape
    out = picture.copy()
    corner = out[height - rows :, :columns].astype(np.float32) * GROUND
    out[height - rows :, :columns] = corner + letters[..., None] * (255 - corner)
    return out


@lru_cache(maxsize=64)
def caption_mask(text: str, height: int, width: int) -> NDArray[np.float32]:
    """How much of each pixel the letters cover, with a margin around them; no larger than the picture."""
    size = max(LEAST, height // SHARE)
    while True:
        font = ImageFont.load_default(size)
        margin = max(2, round(size / 3))
        left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
        wide, tall = round(right - left) + 2 * margin, round(bottom - top) + 2 * margin
        if wide <= width or size <= 4:
            break
        size -= 1
    mask = Image.new("L", (min(wide, width), min(tall, height)))
    ImageDraw.Draw(mask).text((margin - left, margin - top), text, fill=255, font=font)
    return np.asarray(mask, np.float32) / np.float32(255)
