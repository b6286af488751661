"""Label videos with `tvit export --format safetensors`: torch, safetensors and PyAV, no tvit.

    python use_safetensors.py EXPORT VIDEO...

Of each of as many equal segments of the video as a clip has frames, the middle frame is used.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

if len(sys.argv) < 3:
    print("usage: python use_safetensors.py EXPORT VIDEO...", file=sys.stderr)
    sys.exit(2)
folder, *videos = map(Path, sys.argv[1:])
sys.path.insert(0, str(folder))

from source.config import ViTConfig  # noqa: E402  (from the export)
from source.preprocessing import frames_to_input  # noqa: E402
from source.reading import read_clip  # noqa: E402
from source.vit import TemporalViT  # noqa: E402

card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
facts = card["preprocessing"]
model = TemporalViT(ViTConfig.from_dict(card["model"]), initialise=False).eval()
model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)

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
    clip = frames_to_input(
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        **{key: facts[key] for key in ("frame_size", "resize", "scale_to", "mean", "std")},
    )
    with torch.inference_mode():
        scores = model(clip[None])[0].softmax(0)
    print(f"{video}\t{card['labels'][scores.argmax()]}\t{scores.max():.6f}")
