"""Which colours a decoded frame is stored in, and exact ways out of them. Imports PyAV alone: exports carry it."""

from __future__ import annotations

from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation

# Without FULL_CHR_H_INT swscale converts to RGB through tables that truncate: white comes out as 253.
SCALING = (
    Interpolation.BILINEAR
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
# Between YUV and YUV of one matrix there are no such tables, and the rounding costs twice the time for the
# same numbers.
PLANE_SCALING = Interpolation.BILINEAR | Interpolation.BITEXACT

# AVColorSpace (libavutil/pixfmt.h) -> the matrix that swscale is told to use.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,  # BT.470BG
    6: Colorspace.ITU601,  # SMPTE 170M
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,  # constant luminance
}
_HD_HEIGHT = 720  # players take BT.709 from this height on where the stream does not say


def matrix_of(frame: VideoFrame) -> Colorspace:
    """The matrix of a frame: its own, or that of its height."""
    return _MATRICES.get(frame.colorspace, matrix_by_height(frame.height))


def matrix_by_height(height: int) -> Colorspace:
    """The matrix of a picture that does not name its own."""
    return Colorspace.ITU601 if height < _HD_HEIGHT else Colorspace.ITU709
