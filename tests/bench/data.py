"""Speed of reading and augmenting clips beside a plain baseline; in turn, medians and ratios.

    python tests/bench/data.py [--clips 12] [--rounds 5] [--workers 0,1,2] [--only augmentation|readers]

The baseline does what most training scripts do: decode every frame, make a PIL image of the chosen ones, and crop,
flip, jitter (hue included) and normalise frame by frame, to float. T=18 frames at 224 px from clips of 180 frames
of 320×240 in MPEG-4 with B-frames that weigh what UCF101's do: about 2.5 kB per frame, 15 kB as JPEG. tvit hands
over uint8 frames, to be augmented where the model is: on a GPU. Its augmentation is measured by itself, and added in
the rows "augmented as well", which are what a training on the same CPU has of it. What one process does alone is timed
by processor, which other work on the machine disturbs least; what several do together, by the clock.

Last, a training step of many short kernels (forward and backward of a tiny ViT with LoRA, one thread) beside one reader
of the store, over the step alone: such a step stands for the launches of a GPU's kernels, which need Python's lock as
the readers do. It takes a batch after each step, which is not counted.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import numpy as np
import torch
from PIL import Image, ImageEnhance
from step import TARGETS, step_of
from torch.utils.data import DataLoader, Dataset

from tvit_cli.data.augment import Augmentation, train_transform
from tvit_cli.data.clips import ClipDataset, load_batches
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video
from tvit_cli.data.video import count_frames
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine.extract import extract
from tvit_cli.model import lora
from tvit_cli.portable.vit import ViTConfig, build_model
from tvit_cli.results import silent
from tvit_cli.settings.card import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from tvit_cli.settings.extract import ExtractSettings

T, SIZE, FRAMES, HEIGHT, WIDTH = 18, 224, 180, 240, 320
MEAN, STD = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]


def make_clips(root: Path, count: int) -> list[Video]:
    """Clips of a drifting scene with some grain, in two classes; they weigh what UCF101's do."""
    videos = []
    height, width = HEIGHT + 64, WIDTH + 256
    for number in range(count):
        generator = np.random.default_rng(number)
        scene = 110 + noise(generator, height, width, 1, {64: 40, 32: 24, 16: 14, 8: 8, 4: 5, 2: 2})
        scene = scene + noise(generator, height, width, 3, {64: 15, 32: 8})
        grain = generator.normal(0, 1.75, (8, HEIGHT, WIDTH, 1))
        frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        for i in range(FRAMES):
            frames[i] = np.clip(scene[i // 6 : i // 6 + HEIGHT, i : i + WIDTH] + grain[i % 8], 0, 255)
        label = ("a", "b")[number % 2]
        path = root / "videos" / label / f"v_{label}_g{number:02d}_c01.avi"
        write_video(path, frames, quantiser=2, options={"bf": "2", "g": "250"})
        videos.append(Video(path, path.relative_to(root).as_posix(), label, "train", f"{number:02d}"))
    return videos


def noise(
    generator: np.random.Generator, height: int, width: int, channels: int, strength: dict[int, float]
) -> np.ndarray:
    """Smooth noise of several sizes in pixels, each with its standard deviation: (H, W, channels)."""
    total = np.zeros((height, width, channels))
    for size, deviation in strength.items():
        coarse = generator.normal(0, deviation, (channels, height // size + 2, width // size + 2))
        for channel, plane in enumerate(coarse.astype(np.float32)):
            smooth = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(smooth)
    return total


def hue_shifted(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue).astype(np.int16) + round(turns * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def baseline_augment(images: list[Image.Image]) -> torch.Tensor:
    """Random-resized crop, flip, brightness, contrast, saturation, hue and normalisation of PIL images."""
    side = random.randint(int(0.7 * HEIGHT), HEIGHT)
    left, top = random.randint(0, WIDTH - side), random.randint(0, HEIGHT - side)
    flip = random.random() < 0.5
    factors = [random.uniform(0.8, 1.2) for _ in range(3)]
    turns = random.uniform(-0.1, 0.1)
    tensors = []
    for image in images:
        image = image.crop((left, top, left + side, top + side)).resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR
        )
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
        ):
            image = enhance(image).enhance(factor)
        image = hue_shifted(image, turns)
        tensors.append((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD)
    return torch.stack(tensors)


class Baseline(Dataset[torch.Tensor]):
    """Decodes all frames, then augments the chosen ones."""

    def __init__(self, videos: list[Video]) -> None:
        self.paths = [video.path for video in videos]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with av.open(str(self.paths[index])) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        chosen = [int((i + 0.5) * len(frames) / T) for i in range(T)]
        return baseline_augment([Image.fromarray(frames[i]) for i in chosen])


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


def loaded(dataset: Dataset[object], batches: Iterable[list[object]], workers: int) -> Iterator[object]:
    """Batches as a training gets them; those of the baseline by torch's loader."""
    if isinstance(dataset, ClipDataset):
        return load_batches(dataset, batches, workers=workers)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
    return iter(loader)


def read(dataset: Dataset[object], videos: int, passes: int, workers: int) -> float:
    """Seconds per clip of a loader that has begun, in batches of one."""
    is_baseline = isinstance(dataset, Baseline)
    keys = [i if is_baseline else (epoch, i) for epoch in range(passes + 1) for i in range(videos)]
    batches = loaded(dataset, [[key] for key in keys], workers)
    for _ in range(videos):  # workers start, and each learns what it keeps of a video
        next(batches)
    return timed(lambda: list(map(type, batches)), time.perf_counter if workers else time.process_time) / (
        passes * videos
    )


def compare_extraction(settings: ExtractSettings, videos: list[Video], rounds: int) -> dict[str, float]:
    """The speed of decoding and storing over that of decoding alone, in one process."""
    ratios = {}
    for name, clock in (("processor", time.process_time), ("clock", time.perf_counter)):
        pairs = []
        for _ in range(rounds + 1):
            decoding = timed(lambda: [count_frames(video.path) for video in videos], clock)
            pairs.append((decoding, timed(lambda: extract(settings, silent), clock)))
        ratio = statistics.median(decoding / extraction for decoding, extraction in pairs[1:])
        decode, store = (statistics.median(p[i] for p in pairs[1:]) * 1e3 / len(videos) for i in (0, 1))
        print(f"by {name:9}  decoding {decode:.1f} ms, extraction {store:.1f} ms per clip   x {ratio:.2f}")
        ratios[f"extraction by {name}"] = ratio
    return ratios


def compare_reading(
    root: Path, videos: list[Video], options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios to the baseline by kind and workers, and milliseconds per clip of one process by kind."""
    facts = {"n_frames": T, "short_side": 317, "seed": 0, "training": True}
    sets: dict[str, Dataset[object]] = {
        "baseline": Baseline(videos),
        "video": ClipDataset(videos, ("a", "b"), **facts),
        "store": ClipDataset(videos, ("a", "b"), store=FrameStore(root / "frames"), **facts),
    }
    ratios: dict[str, float] = {}
    alone: dict[str, float] = {}
    for workers in sorted({0, *map(int, options.workers.split(","))}):
        times: dict[str, list[float]] = {kind: [] for kind in sets}
        for _ in range(options.rounds):
            for kind, dataset in sets.items():
                passes = 1 if kind == "baseline" else 4
                times[kind].append(read(dataset, len(videos), passes, workers))
        per_clip = {kind: statistics.median(values) * 1e3 for kind, values in times.items()}
        alone = alone or per_clip
        for kind, values in times.items():
            ratio = statistics.median(b / a for a, b in zip(values, times["baseline"], strict=True))
            ratios[f"{kind}, {workers} workers"] = ratio
            print(f"{workers} workers  {kind:9} {per_clip[kind]:7.1f} ms per clip   x {ratio:.1f}")
    return ratios, alone


def compare_augmentation(rounds: int) -> tuple[float, float]:
    """The ratio to the baseline, and our milliseconds per clip, of one core."""
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (T, HEIGHT, WIDTH, 3)).astype(np.uint8))
    images = [Image.fromarray(frame) for frame in clip.numpy()]
    chosen = {
        "augmentation": Augmentation(crop_scale=(0.5, 1.0), hue=0.1),
        "preprocessing": Preprocessing(n_frames=T, frame_size=SIZE),
        "seed": 0,
        "device": torch.device("cpu"),
    }
    pairs = []
    for index in range(3 * rounds):
        keys = (torch.tensor([0]), torch.tensor([index]))
        ours = timed(
            lambda k=keys: train_transform([clip.permute(0, 3, 1, 2)], *k, **chosen), time.process_time
        )
        pairs.append((ours, timed(lambda: baseline_augment(images), time.process_time)))
    ratio = statistics.median(b / a for a, b in pairs[1:])
    own, base = (statistics.median(pair[i] for pair in pairs[1:]) * 1e3 for i in (0, 1))
    print(f"augmentation {own:.1f} ms, baseline {base:.1f} ms per clip   x {ratio:.1f}")
    return ratio, own


def compare_step_beside(store: FrameStore, videos: list[Video], rounds: int) -> dict[str, float]:
    """The time of a step beside a reader, over that of the step alone: of medians, and of the fastest tenths."""
    config = ViTConfig(num_classes=2, n_frames=2, frame_size=64, width=192, depth=12, num_heads=3)
    model = build_model(config, seed=0, from_scratch=True)
    lora.attach(model, lora.LoraSpec(8, 8, 0.0, False, "none", TARGETS, ()), seed=0)
    step = step_of(model.train(), torch.randn(1, 2, 3, 64, 64))
    dataset = ClipDataset(videos, ("a", "b"), n_frames=8, short_side=240, seed=0, training=True, store=store)
    batches = [[(n, i % len(videos)) for i in range(8)] for n in range(100_000)]
    kinds: dict[str, dict[str, Any]] = {"alone": {}, "threads": {}}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as open_ones:
        read = {kind: load_batches(dataset, batches, workers=1, **how) for kind, how in kinds.items()}
        for made in read.values():
            open_ones.enter_context(closing(made))
        for number in range(rounds + 1):
            for kind in kinds:
                time.sleep(0.3)  # in which the other readers have read ahead as far as they may
                for _ in range(12):
                    if kind != "alone":
                        next(read[kind])
                    took = timed(step)
                    times[kind] += [took] if number else []
    ratios = {}
    for name, of in (("median", 0.5), ("fastest tenth", 0.1)):
        own = {kind: float(np.quantile(values, of)) for kind, values in times.items()}
        for kind in kinds:
            ratios[f"step beside reader {kind}, {name}"] = own[kind] / own["alone"]
            print(f"step, {name:13} {kind:10} {own[kind] * 1e3:6.1f} ms   x {own[kind] / own['alone']:.2f}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--only", choices=("augmentation", "readers"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, float] = {}
    if options.only != "readers":
        results["augmentation"], augmenting = compare_augmentation(options.rounds)
    if options.only != "augmentation":
        with tempfile.TemporaryDirectory() as name:
            root = Path(name) / "clips"
            videos = make_clips(root, options.clips)
            settings = ExtractSettings(
                path_to_data=str(root), num_workers=0, val_groups="none", test_groups="none", overwrite=True
            )
            if options.only is None:
                results |= compare_extraction(settings, videos, options.rounds)
                ratios, alone = compare_reading(root, videos, options)
                results |= ratios
                for kind in ("video", "store"):
                    ratio = alone["baseline"] / (alone[kind] + augmenting)
                    results[f"{kind}, augmented as well"] = ratio
                    print(f"{kind:9} augmented on the same core   x {ratio:.1f}")
            else:
                extract(settings, silent)
            results |= compare_step_beside(FrameStore(root / "frames"), videos, options.rounds)
    machine = {"torch": torch.__version__, "av": av.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "data", "cores": os.cpu_count(), **machine, "ratios": results}))


if __name__ == "__main__":
    main()
