"""Label videos with `tvit export --format torch`: torch and PyAV, no tvit and no model code.

    python use_torch.py EXPORT VIDEO...

Of each of as many equal segments of the video as a clip has frames, the middle frame is used.
"""

import json
import sys
from pathlib import Path

import torch

if len(sys.argv) < 3:
    print("usage: python use_torch.py EXPORT VIDEO...", file=sys.stderr)
    sys.exit(2)
folder, *videos = map(Path, sys.argv[1:])
sys.path.insert(0, str(folder))

from source.reading import read_clip  # noqa: E402  (from the export)

card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
facts = card["preprocessing"]
model = torch.export.load(folder / "model.pt2").module()
outside = folder / "preprocessing.pt2"  # absent if it is inside model.pt2
preprocess = torch.export.load(outside).module() if outside.exists() else None

for video in videos:
    try:
        frames = read_clip(
            video,
            n_frames=facts["n_frames"],
            short_side=facts["scale_to"],
            frame_grid=facts["frame_grid"],
            clip_seconds=facts["clip_seconds"],
        )
    except (OSError, ValueError) as error:  # it names the video
        print(f"error: {error}.", file=sys.stderr)
        sys.exit(2)
    clips = torch.from_numpy(frames)[None]
    with torch.inference_mode():
        scores = model(clips)[0] if preprocess is None else model(preprocess(clips))[0].softmax(0)
    print(f"{video}\t{card['labels'][scores.argmax()]}\t{scores.max():.6f}")
