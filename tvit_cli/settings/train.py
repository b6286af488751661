"""Settings of `tvit train`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tvit_cli.settings.base import flag, setting
from tvit_cli.settings.card import ResizeMode
from tvit_cli.settings.types import (
    DATA,
    DEVICE_TEXT,
    MODEL,
    PRECISION_TEXT,
    PROCESSES_TEXT,
    RUNS,
    RUNS_TEXT,
    CountOrAuto,
    DataSettings,
    Device,
    MixedPrecision,
    NamesOrNone,
    Pairs,
    TrainMode,
)

RUN, LORA, OPTIMISATION = "Run", "LoRA", "Optimisation"
AUGMENTATION, REGULARISATION, CHECKPOINTS = "Augmentation", "Regularisation", "Checkpoints"

LoraInit = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]
LORA_TARGETS = ("patch_embed", "q", "k", "v", "proj", "fc1", "fc2", "classifier")
DEFAULT_MICRO_BATCH = 8
# Note [Joint attention is the default]
# On Weizmann with people held out (60 training clips, three folds of 30 test clips, 16 epochs on all patches) the
# schemes do not differ: of 90 clips, divided has 82 right, joint and space (single frames) 81, factorized 78.
# With half of the patches for twice as long (--token-drop 0.5, selected on inner people) joint has 86, 84 and 80
# (three seeds), space 66, 65 and 70. On motions, where only the order of frames separates the classes, all but
# space reach 0.98 to 1.00 on 256 clips (factorized 0.945 with half of the patches). joint trains adapters only
# and needs fewer operations than divided (18.3 and 22.1 GFLOP per clip; docs/benchmarks.md). Two other schemes,
# AIM and ST-Adapter, were no better and were removed (docs/negative-results.md). Joint attention is quadratic in
# the number of tokens. Long clips of large frames are cheaper with divided attention, or with tubelets, which are
# fastest and less accurate: tubelets of 2 frames have 78 of the 90 right.

SCRATCH_SHAPE = {"width": 192, "depth": 12, "num_heads": 3, "patch_size": 16}  # ViT-Ti/16 (DeiT, table 1)


class TrainSettings(DataSettings):
    """Settings of `tvit train`."""

    SERIES: ClassVar[tuple[str, ...]] = ("seed", "split")

    # fmt: off
    experiment_name: str | None = setting(None, "Name of the run folder", RUN, resume_safe=True,
        reference="required", why="no finished run is overwritten by accident",
        default_text="the first free <data>-<n>")
    working_directory: Path = setting(RUNS, RUNS_TEXT, RUN, resume_safe=True, reference="required",
        why="one folder for every run")
    seed: int = setting(0, "Seed of every random choice", RUN, ge=0, lt=2**31)
    device: Device = setting("auto", DEVICE_TEXT, RUN, resume_safe=True)
    num_processes: int = setting(1, PROCESSES_TEXT, RUN, ge=1, le=1024, resume_safe=True)
    log_wandb: bool = setting(False, "Logs metrics to Weights & Biases", RUN, resume_safe=True,
        reference="False")
    log_tensorboard: bool = setting(False, "Logs metrics to TensorBoard, inside the run folder", RUN,
        resume_safe=True)
    show_settings: bool = setting(False, "Prints all settings with their origins, then exits", RUN,
        resume_safe=True)
    dry_run: bool = setting(False,
        "Builds data and model, measures parameters, FLOPs, memory and time per epoch, then exits", RUN,
        resume_safe=True)
    test_at_end: bool = setting(False, "Evaluates the test subset once after training", RUN, resume_safe=True)
    top_k: int = setting(5, "k of the top-k accuracy", RUN, ge=1, reference="5")

    strict: bool = setting(False,
        "Refuses data leakage: groups or files of train that are also in val or test", DATA, resume_safe=True)
    n_frames: int = setting(8, "Frames per clip, one from each equal segment of the video", DATA, ge=1,
        le=1024, reference="8")
    frame_grid: int | None = setting(None,
        "Samples from this many evenly spaced frames of each video only, as in a frame store", DATA, ge=1,
        resettable=True)
    img_size: int = setting(224, "Height and width of input frames, in pixels", DATA, ge=1, le=4096,
        reference="224")
    resize: ResizeMode = setting("crop",
        "Square frames by a centre crop of the resized frame (crop) or by distortion (squash)", DATA)
    num_workers: int | None = setting(None, "Decoding processes per GPU; 0 decodes in the training process",
        DATA, ge=0, le=256, resume_safe=True, reference="32",
        why="more workers than cores slow training down", default_text="from the CPU count")

    hf_model_name: str | None = setting("google/vit-base-patch16-224",
        "Pretrained ViT: Hugging Face name, folder (also of a tvit model) or weights file; none: from "
        "scratch", MODEL, reference="required", why="the reference's own backbone", resettable=True)
    width: int | None = setting(None, "Token size, from scratch only", MODEL, ge=1,
        default_text=str(SCRATCH_SHAPE["width"]))
    depth: int | None = setting(None, "Number of blocks, from scratch only", MODEL, ge=1,
        default_text=str(SCRATCH_SHAPE["depth"]))
    num_heads: int | None = setting(None, "Attention heads per block, from scratch only", MODEL, ge=1,
        default_text=str(SCRATCH_SHAPE["num_heads"]))
    patch_size: int | None = setting(None, "Height and width of a patch in pixels, from scratch only", MODEL,
        ge=1, default_text=str(SCRATCH_SHAPE["patch_size"]))
    tubelet_size: int = setting(1, "Frames per patch token (tubelet)", MODEL, ge=1, le=16)
    attention: Literal["joint", "divided", "factorized", "space"] = setting("joint",
        "Space-time attention: over all tokens (joint), over time then space (divided), temporal blocks"
        " on frame embeddings (factorized), or single frames (space)", MODEL)
    temporal_depth: int | None = setting(None, "Temporal blocks of --attention factorized", MODEL, ge=1,
        le=64, default_text="2")
    pool: Literal["class", "mean", "attentive"] = setting("class",
        "Features: class token, mean of the patch tokens, or learned average of both", MODEL)
    feature_norm: bool = setting(False,
        "Standardises features before the classifier with training-set statistics", MODEL)
    custom_weight_init: bool = setting(False,
        "Draws layers without pretrained weights from a truncated normal, sd 0.02", MODEL, reference="False")

    train: TrainMode = setting("lora",
        "Trained weights: adapters (lora), everything (all), the classifier with its pooling and "
        "normalisation (classifier), or the last N blocks and all later layers (last-N). lora and "
        "last-N also train temporal modules without pretrained weights; lora also trains the classifier",
        LORA, metavar="lora|all|classifier|last-N", default_text="lora; from scratch all")
    lora_rank: int = setting(8, "Rank of the adapters; 0 attaches none", LORA, ge=0, le=1024, reference="8")
    lora_alpha: float = setting(8, "Scale of the adapters: alpha / rank", LORA, gt=0, reference="8")
    lora_rank_pattern: Pairs[Annotated[int, Field(ge=1, le=1024)]] = setting({},
        "Ranks of single layers by short or full name, as in q=16,blocks.11.mlp.fc1=4", LORA,
        default_text="none", metavar="NAME=INT,…")
    lora_alpha_pattern: Pairs[Annotated[float, Field(gt=0)]] = setting({},
        "Alphas of single layers, in the form of --lora-rank-pattern", LORA, default_text="none",
        metavar="NAME=FLOAT,…")
    lora_use_rslora: bool = setting(False, "rsLoRA: scales adapters by alpha / sqrt(rank)", LORA,
        reference="False")
    lora_use_dora: bool = setting(False,
        "DoRA: learns magnitude and direction of each weight row separately (slower)", LORA)
    lora_init: LoraInit = setting("default",
        "Initial adapter weights; pissa and olora subtract them from the layer's own", LORA)
    lora_dropout: float = setting(0.1, "Dropout before the adapters", LORA, ge=0, lt=1, reference="0.1")
    lora_bias: Literal["none", "lora_only", "all"] = setting("none",
        "Trained biases: none, those of adapted layers, or all", LORA, reference="'none'")
    lora_target_modules: NamesOrNone = setting(("q", "k", "v"),
        f"Layers with an adapter: {', '.join(LORA_TARGETS)}, or full names; tubelets add patch_embed", LORA,
        reference="None", why="LoRA trains nothing without targets")
    lora_exclude_modules: NamesOrNone = setting((), "Layers without an adapter, trained in full", LORA,
        reference="None", default_text="none")

    epochs: int = setting(300, "Passes over the training videos", OPTIMISATION, ge=1, reference="300")
    warmup_epochs: float | None = setting(None, "Epochs of linear learning-rate warm-up", OPTIMISATION, ge=0,
        reference="30", why="30 of 300; a short run would never leave the warm-up",
        default_text="min(30, epochs / 10)")
    per_gpu_batch_size: CountOrAuto = setting(DEFAULT_MICRO_BATCH,
        "Clips per GPU in one forward pass, at least 1; auto takes the most that fit", OPTIMISATION,
        reference="256", why="256 clips of 8 frames need over 100 GB with ViT-B", metavar="INT|auto")
    gradient_accumulation_steps: int = setting(1, "Forward passes per optimizer step", OPTIMISATION, ge=1,
        reference="1")
    global_batch_size: int | None = setting(None,
        "Clips per optimizer step, over all GPUs and forward passes", OPTIMISATION, ge=1, resettable=True,
        default_text="per-gpu-batch-size (8 if auto) × gradient-accumulation-steps × processes")
    gradient_checkpointing: bool = setting(False,
        "Recomputes blocks in the backward pass: less memory, more time", OPTIMISATION, resume_safe=True)
    learning_rate: float = setting(5e-4, "Peak learning rate of the cosine schedule", OPTIMISATION, gt=0,
        reference="0.003", why="PEFT starts its adapters smaller, and batches are smaller")
    weight_decay: float = setting(0.1, "AdamW's weight decay", OPTIMISATION, ge=0, reference="0.1")
    label_smoothing: float = setting(0.0, "Share of the target spread over all classes", OPTIMISATION, ge=0,
        lt=1, reference="0")
    bias_weight_decay: bool = setting(False, "Applies weight decay to biases", OPTIMISATION,
        reference="False")
    norm_weight_decay: bool = setting(False, "Applies weight decay to normalisation layers", OPTIMISATION,
        reference="False")
    max_grad_norm: float | None = setting(1.0, "Gradient clipping norm; none disables", OPTIMISATION, gt=0,
        reference="1.0", resettable=True)
    adam_beta1: float = setting(0.9, "AdamW's beta 1", OPTIMISATION, ge=0, lt=1, reference="0.9")
    adam_beta2: float = setting(0.999, "AdamW's beta 2", OPTIMISATION, ge=0, lt=1, reference="0.999")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", OPTIMISATION, gt=0, reference="1e-8")
    mixed_precision: MixedPrecision = setting("auto", PRECISION_TEXT, OPTIMISATION)
    compile: bool = setting(False, "Compiles the model with torch.compile", OPTIMISATION)

    crop_scale_min: float = setting(0.5, "Smallest area of a random crop, as a share of the frame",
        AUGMENTATION, gt=0, le=1)
    horizontal_flip: float = setting(0.5,
        "Probability of mirroring a clip; 0 where left and right are different classes", AUGMENTATION, ge=0,
        le=1)
    brightness: float = setting(0.2, "Strength of the brightness jitter", AUGMENTATION, ge=0, le=1)
    contrast: float = setting(0.2, "Strength of the contrast jitter", AUGMENTATION, ge=0, le=1)
    saturation: float = setting(0.2, "Strength of the saturation jitter", AUGMENTATION, ge=0, le=1)
    hue: float = setting(0.0, "Strength of the hue jitter, in turns of the colour wheel", AUGMENTATION, ge=0,
        le=0.5)

    drop_path: float = setting(0.0, "Stochastic depth: rate of the last block, linear from 0 in the first",
        REGULARISATION, ge=0, lt=1)
    token_drop: float = setting(0.0,
        "Share of each training clip's patches that is dropped, redrawn at every step", REGULARISATION, ge=0,
        le=0.9)
    ema_decay: float | None = setting(None,
        "Decay of the weights' exponential moving average, which is validated and saved instead of them",
        REGULARISATION, gt=0, lt=1, resettable=True)
    layer_decay: float = setting(1.0, "Learning rate of each block relative to the next block's",
        REGULARISATION, gt=0, le=1)
    temporal_rate: float | None = setting(None,
        "Learning rate of the temporal blocks of --attention factorized, relative to --learning-rate",
        REGULARISATION, gt=0, le=1, default_text="0.1 with --train lora on pretrained weights, else 1")
    class_weights: Literal["none", "balanced"] = setting("none",
        "Class weights of the training loss; balanced gives rare classes more", REGULARISATION)
    balanced_sampling: bool = setting(False,
        "Draws equally many clips of every class; epochs keep their length", REGULARISATION)
    patience: int | None = setting(None,
        "Early stopping after this many epochs without a better validation result", REGULARISATION, ge=1,
        resettable=True)
    mixup: float = setting(0.0, "Mixup: alpha of the Beta distribution; 0 disables", REGULARISATION, ge=0,
        le=100)
    cutmix: float = setting(0.0,
        "CutMix, the same box in all frames: alpha as for --mixup; 0 disables. With both, each clip "
        "draws one", REGULARISATION, ge=0, le=100)
    randaugment: int = setting(0, "RandAugment: operations per clip, besides the colour jitter",
        REGULARISATION, ge=0, le=16)
    randaugment_magnitude: float = setting(9.0, "Magnitude of RandAugment's operations", REGULARISATION, ge=0,
        le=10)
    random_erasing: float = setting(0.0, "Probability of erasing a box, the same in all frames of a clip",
        REGULARISATION, ge=0, le=1)
    repeats: int = setting(1, "Repeated augmentation: independently augmented clips per video in each batch",
        REGULARISATION, ge=1, le=64)

    checkpoint_dir: str = setting("checkpoints", "Folder of checkpoints inside the run folder", CHECKPOINTS,
        resume_safe=True, reference="required", why="the name is arbitrary")
    save_checkpoint_interval: int = setting(1, "Epochs between checkpoints; the last epoch is always saved",
        CHECKPOINTS, ge=1, resume_safe=True, reference="1")
    save_every_steps: int | None = setting(None,
        "Steps between checkpoints within an epoch, besides those at its end", CHECKPOINTS, ge=1,
        resume_safe=True, resettable=True)
    save_every_minutes: float | None = setting(None, "Most minutes between checkpoints", CHECKPOINTS, gt=0,
        resume_safe=True, resettable=True)
    max_no_of_checkpoints: int = setting(10, "Number of latest checkpoints to keep", CHECKPOINTS, ge=1,
        resume_safe=True, reference="10")
    overwrite: bool = setting(False,
        "Replaces the run of that name; refused where it holds files that tvit did not write", CHECKPOINTS,
        resume_safe=True)
    resume_from_checkpoint: str | None = setting(None, "Checkpoint to resume from: latest, a name, or a path",
        CHECKPOINTS, resume_safe=True, reference="None", metavar="NAME|PATH|latest")
    # fmt: on

    @field_validator("experiment_name", "checkpoint_dir")
    @classmethod
    def _is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or value in (".", "..") or "/" in value or "\\" in value):
            raise ValueError("it should be one folder name; --working-directory is the folder above it")
        return value

    @model_validator(mode="before")
    @classmethod
    def _train_all_from_scratch(cls, values: Any) -> Any:
        """A frozen backbone with random weights is useless, so another default holds from scratch."""
        from_scratch = isinstance(values, dict) and values.get("hf_model_name", "") is None
        return {"train": "all", **values} if from_scratch else values

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainSettings:
        if problems := "\n".join([*self._batch_problems(), *self._model_problems()]):
            raise ValueError(problems)
        return self

    def _batch_problems(self) -> Iterator[str]:
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            yield f"--warmup-epochs {self.warmup_epochs:g}: it should be at most --epochs {self.epochs}"
        accumulation, total = self.gradient_accumulation_steps, self.global_batch_size
        if total is not None and accumulation > 1:
            yield (
                f"--gradient-accumulation-steps {accumulation}: it follows from --global-batch-size {total}. "
                "Leave one of them out"
            )
        if self.frame_grid is not None and self.frame_grid < self.n_frames:
            yield f"--frame-grid {self.frame_grid}: it should be at least --n-frames {self.n_frames}"
        if self.n_frames % self.tubelet_size:
            yield f"--n-frames {self.n_frames}: it should be a multiple of --tubelet-size {self.tubelet_size}"
        micro_batch = DEFAULT_MICRO_BATCH if self.per_gpu_batch_size == "auto" else self.per_gpu_batch_size
        batch = f"--global-batch-size {total}"
        if not total:
            batch = (
                f"the {micro_batch * accumulation} clips per GPU and optimizer step "
                "(--per-gpu-batch-size × --gradient-accumulation-steps)"
            )
        if (total or micro_batch * accumulation) % self.repeats:
            yield f"--repeats {self.repeats}: it should divide {batch}"
        if self.class_weights == "balanced" and self.balanced_sampling:
            yield (
                "--class-weights balanced and --balanced-sampling: class imbalance would be corrected twice. "
                "Take one of them"
            )

    def _model_problems(self) -> Iterator[str]:
        given = [flag(key) for key in SCRATCH_SHAPE if getattr(self, key) is not None]
        if self.hf_model_name is not None and given:
            yield (
                f"{', '.join(given)}: fixed by the pretrained model {self.hf_model_name}. Leave out, or train from "
                "scratch with --hf-model-name none"
            )
        if self.feature_norm and self.hf_model_name is None:
            yield (
                "--feature-norm: untrained features have no useful statistics. Leave it out, or give pretrained "
                "weights with --hf-model-name"
            )
        if self.attention == "space" and self.tubelet_size > 1:
            yield "--attention space: a tubelet contains the order of its frames. Take --tubelet-size 1"
        if self.temporal_depth is not None and self.attention != "factorized":
            yield (
                f"--temporal-depth {self.temporal_depth}: --attention {self.attention} has no temporal blocks. "
                "Leave it out, or take --attention factorized"
            )
        is_frozen = self.train == "classifier"
        if self.temporal_rate is not None and (is_frozen or self.attention != "factorized"):
            yield (
                f"--temporal-rate {self.temporal_rate:g}: --attention {self.attention} with --train {self.train} "
                "trains no temporal blocks. Leave it out, or take --attention factorized and another --train"
            )
        for name, neutral in (("drop_path", 0), ("layer_decay", 1)):
            if is_frozen and (value := getattr(self, name)) != neutral:
                yield f"{flag(name)} {value:g}: --train classifier trains no block. Leave one of them out"
        if self.lora_use_dora and self.lora_init in ("pissa", "olora"):
            yield (
                f"--lora-init {self.lora_init}: it changes the weights whose magnitudes --lora-use-dora learns. "
                "Leave one of them out"
            )

    def without_effect(self) -> list[str]:
        """Names of changed LoRA settings that are ignored because no adapter is attached."""
        if self.train == "lora" and self.lora_rank:
            return []
        used = {"lora_rank", "lora_exclude_modules"} if self.train == "lora" else set()
        used |= {"lora_bias"} if self.train == "lora" and self.lora_bias == "all" else set()
        return [
            name
            for name, field in TrainSettings.model_fields.items()
            if name.startswith("lora_") and name not in used and getattr(self, name) != field.default
        ]

    def temporal_share(self) -> float:
        """Learning rate of temporal blocks relative to the others'; full fine-tuning has a small one already."""
        if self.temporal_rate is not None:
            return self.temporal_rate
        return 0.1 if self.train == "lora" and self.hf_model_name is not None else 1.0

    def warmup(self) -> float:
        """Warm-up in epochs: the setting, else min(30, epochs / 10)."""
        return min(30.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs
