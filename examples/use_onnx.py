"""Label videos with `tvit export --format onnx`: ONNX Runtime, numpy and PyAV, neither torch nor tvit.

    python use_onnx.py EXPORT VIDEO...

Of each of as many equal segments of the video as a clip has frames, the middle frame is used. Files whose
hash is not the one in parity.json are refused.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

if len(sys.argv) < 3:
    print("usage: python use_onnx.py EXPORT VIDEO...", file=sys.stderr)
    sys.exit(2)
folder, *videos = map(Path, sys.argv[1:])
for name, expected in json.loads((folder / "parity.json").read_text(encoding="utf-8"))["files"].items():
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
        sys.exit(
            f"{folder / name}: its hash is not the one in parity.json. The file was changed; copy it again."
        )

sys.path.insert(0, str(folder))
from source.reading import read_clip  # noqa: E402  (from the export)


def run(session: onnxruntime.InferenceSession, values: np.ndarray) -> np.ndarray:
    """The only output for the only input."""
    return session.run(None, {session.get_inputs()[0].name: values})[0]


model = onnxruntime.InferenceSession(folder / "model.onnx")
metadata = model.get_modelmeta().custom_metadata_map
labels, facts = json.loads(metadata["labels"]), json.loads(metadata["preprocessing"])
outside = folder / "preprocessing.onnx"  # absent if it is inside model.onnx
preprocess = onnxruntime.InferenceSession(outside) if outside.exists() else None

for video in videos:
    try:
        clips = read_clip(
            video,
            n_frames=facts["n_frames"],
            short_side=facts["scale_to"],
            frame_grid=facts["frame_grid"],
            clip_seconds=facts["clip_seconds"],
        )[None]
    except (OSError, ValueError) as error:  # it names the video
        print(f"error: {error}.", file=sys.stderr)
        sys.exit(2)
    if preprocess is None:
        scores = run(model, clips)[0]
    else:
        logits = run(model, run(preprocess, clips))[0].astype(np.float64)
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    print(f"{video}\t{labels[scores.argmax()]}\t{scores.max():.6f}")
