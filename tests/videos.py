"""Video files with chosen colour tags and rotation."""

from fractions import Fraction
from pathlib import Path

import av


def write_solid_colour(
    path: Path, yuv: tuple[int, int, int], *, height: int, space: int, full: bool, form: str = "yuv444p"
) -> Path:
    """Writes a lossless file of one colour: the stored numbers and their colour tags."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, height, form
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = 2 if full else 0
        frame = av.VideoFrame(64, height, form)
        for plane, value in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.colorspace, frame.color_range = space, 2 if full else 0
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_rotation(path: Path, degrees: int) -> None:
    """Writes a rotation (clockwise, 90 or 270) into an MP4's track header."""
    set_matrix(path, *((0, 1, -1, 0) if degrees == 90 else (0, -1, 1, 0)))


def set_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    """Writes a display matrix into an MP4's track header: (x, y), y down, is shown at (ax + cy, bx + dy)."""
    one, content = (1 << 16).to_bytes(4, "big"), bytearray(path.read_bytes())
    start = content.index(one + bytes(12) + one, content.index(b"tkhd"))
    numbers = [*(round(value * (1 << 16)) for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30]
    content[start : start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(content)
