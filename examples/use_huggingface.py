"""Label videos with `tvit export --format huggingface`: transformers, torch and PyAV, no tvit.

    python use_huggingface.py EXPORT VIDEO...

EXPORT may be a repository on the Hugging Face hub. Its processor samples the frames: the middle one of each of as
many equal segments of the video as a clip has frames.
"""

import sys

from transformers import pipeline

if len(sys.argv) < 3:
    print("usage: python use_huggingface.py EXPORT VIDEO...", file=sys.stderr)
    sys.exit(2)
folder, *videos = sys.argv[1:]
classify = pipeline("video-classification", model=folder, trust_remote_code=True)

for video in videos:
    try:
        best = classify(video, top_k=1)[0]
    except (OSError, ValueError) as error:  # it names the video
        print(f"error: {error}.", file=sys.stderr)
        sys.exit(2)
    print(f"{video}\t{best['label']}\t{best['score']:.6f}")
