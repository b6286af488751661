"""What `tvit train` can be told.

A field marked `harmless` may differ between a checkpoint and the run that goes on from it: the result stays
the same bits (another device or data path is checked through what was read from it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tvit_cli.settings.base import about, flag
from tvit_cli.settings.card import ResizeMode
from tvit_cli.settings.types import (
    DATA,
    PRECISION,
    CountOrAuto,
    DataSettings,
    Device,
    MixedPrecision,
    NamesOrNone,
    Pairs,
    TrainMode,
)

RUN, MODEL, LORA = "Run", "Model", "LoRA"
OPTIMISATION, AUGMENTATION, CHECKPOINTS = "Optimisation", "Augmentation", "Checkpoints"
REGULARISATION = "Regularisation"

LoraInit = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]
LORA_TARGETS = ("patch_embed", "q", "k", "v", "proj", "fc1", "fc2", "classifier")
DEFAULT_MICRO_BATCH = 8
# Note [Joint attention is the default]
# On people left out (Weizmann, 60 clips to learn from, three folds of 30 to answer) no scheme is told from
# another where all patches are shown for 16 epochs: divided answers 82 of 90 right, joint and single frames alone
# (space) 81, factorized 78. With half of the patches for twice as long (--token-drop 0.5), which was chosen on
# inner people, joint answers 86, 84 and 80 (three seeds), single frames 66, 65 and 70. On motions, which only the
# order of frames tells apart, all but space are right on 0.98 to 1.00 of 256 clips where all patches are shown
# (with half of them factorized on 0.945, joint and divided as before). joint trains adapters alone, and needs
# fewer operations than divided (18.3 and 22.1 GFLOP a clip; docs/benchmarks.md). Attention over time with the
# weights of space (AIM) and convolutions over time (ST-Adapter) were tried, were no better anywhere, and are gone.
# Its cost grows with the square of the tokens; for long clips of large frames there are divided, and tubelets,
# which are faster than anything else and not free: of 2 frames they answer 78 of the 90 right.

SCRATCH_SHAPE = {"width": 192, "depth": 12, "num_heads": 3, "patch_size": 16}  # ViT-Ti/16 (DeiT, table 1)


class TrainSettings(DataSettings):
    """Train a temporal Vision Transformer on a folder of videos."""

    SERIES: ClassVar[tuple[str, ...]] = ("seed", "split")

    # Run
    experiment_name: str | None = Field(
        None,
        description="Name of the run's folder",
        json_schema_extra=about(
            RUN,
            harmless=True,
            reference="required",
            why="nothing finished is overwritten unasked",
            default="the first free <data>-<n>",
        ),
    )
    working_directory: Path = Field(
        Path("working_directory"),
        description="Folder that holds all runs",
        json_schema_extra=about(RUN, harmless=True, reference="required", why="one place for every run"),
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of every random choice", json_schema_extra=about(RUN)
    )
    device: Device = Field(
        "auto", description="Where the model runs", json_schema_extra=about(RUN, harmless=True)
    )
    num_processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes of this machine that share the work, one per GPU",
        json_schema_extra=about(RUN, harmless=True),
    )
    log_wandb: bool = Field(
        False,
        description="Log metrics to Weights & Biases as well",
        json_schema_extra=about(RUN, harmless=True, reference="False"),
    )
    log_tensorboard: bool = Field(
        False,
        description="Log metrics to TensorBoard as well, below the run's folder",
        json_schema_extra=about(RUN, harmless=True),
    )
    show_settings: bool = Field(
        False,
        description="Print all settings and where each comes from, and stop",
        json_schema_extra=about(RUN, harmless=True),
    )
    dry_run: bool = Field(
        False,
        description="Build everything, print sizes, operations, memory and time per epoch, and stop",
        json_schema_extra=about(RUN, harmless=True),
    )
    test_at_end: bool = Field(
        False,
        description="Score the test subset once when training has ended",
        json_schema_extra=about(RUN, harmless=True),
    )
    top_k: int = Field(
        5, ge=1, description="k of the top-k accuracy", json_schema_extra=about(RUN, reference="5")
    )

    # Data
    strict: bool = Field(
        False,
        description="Refuse data whose val or test videos share groups or files with train",
        json_schema_extra=about(DATA, harmless=True),
    )
    n_frames: int = Field(
        8,
        ge=1,
        le=1024,
        description="Frames per clip, one from each equal share of the video",
        json_schema_extra=about(DATA, reference="8"),
    )
    frame_grid: int | None = Field(
        None,
        ge=1,
        description="Draw frames from this many evenly spaced ones of each video only, as a frame store holds them",
        json_schema_extra=about(DATA, resettable=True),
    )
    img_size: int = Field(
        224,
        ge=1,
        le=4096,
        description="Width and height of frames passed to the model, in pixels",
        json_schema_extra=about(DATA, reference="224"),
    )
    resize: ResizeMode = Field(
        "crop",
        description="How a frame becomes square: crop (short side, then centre) or squash (the whole frame)",
        json_schema_extra=about(DATA),
    )
    num_workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Processes per GPU that decode videos; 0 decodes in the training process",
        json_schema_extra=about(
            DATA,
            harmless=True,
            reference="32",
            why="more workers than cores starve the model",
            default="from the CPU count",
        ),
    )

    # Model
    hf_model_name: str | None = Field(
        "google/vit-base-patch16-224",
        description="Pretrained ViT: a Hugging Face name, a folder (one that tvit trained, too) or a file; none "
        "trains from scratch",
        json_schema_extra=about(
            MODEL,
            reference="required",
            why="the reference's own backbone",
            resettable=True,
        ),
    )
    width: int | None = Field(
        None,
        ge=1,
        description="Token size, from scratch only",
        json_schema_extra=about(MODEL, default=str(SCRATCH_SHAPE["width"])),
    )
    depth: int | None = Field(
        None,
        ge=1,
        description="Number of blocks, from scratch only",
        json_schema_extra=about(MODEL, default=str(SCRATCH_SHAPE["depth"])),
    )
    num_heads: int | None = Field(
        None,
        ge=1,
        description="Attention heads per block, from scratch only",
        json_schema_extra=about(MODEL, default=str(SCRATCH_SHAPE["num_heads"])),
    )
    patch_size: int | None = Field(
        None,
        ge=1,
        description="Height and width of a patch in pixels, from scratch only",
        json_schema_extra=about(MODEL, default=str(SCRATCH_SHAPE["patch_size"])),
    )
    tubelet_size: int = Field(
        1, ge=1, le=16, description="Frames per patch token", json_schema_extra=about(MODEL)
    )
    attention: Literal["joint", "divided", "factorized", "space"] = Field(
        "joint",
        description="How tokens see other frames: all at once (joint); over time, then within the frame "
        "(divided); by blocks over whole frames (factorized); not at all (space)",
        json_schema_extra=about(MODEL),
    )
    temporal_depth: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Blocks over whole frames, with --attention factorized only",
        json_schema_extra=about(MODEL, default="2"),
    )
    pool: Literal["class", "mean", "attentive"] = Field(
        "class",
        description="What is classified: the class token, the mean of the patches, or a learned mean of both",
        json_schema_extra=about(MODEL),
    )
    feature_norm: bool = Field(
        False,
        description="Standardise what is classified, at first by the mean and deviation over training clips",
        json_schema_extra=about(MODEL),
    )
    custom_weight_init: bool = Field(
        False,
        description="Draw layers without pretrained weights from a truncated normal, sd 0.02",
        json_schema_extra=about(MODEL, reference="False"),
    )

    # LoRA
    train: TrainMode = Field(
        "lora",
        description="What is trained: lora (adapters, the classifier and what pretrained weights lack), all, "
        "classifier (with an attentive pool and --feature-norm), or last-N (the last N blocks, all after them, "
        "and what pretrained weights lack, in full)",
        json_schema_extra=about(LORA, metavar="lora|all|classifier|last-N", default="lora; from scratch all"),
    )
    lora_rank: int = Field(
        8,
        ge=0,
        le=1024,
        description="Rank of the adapters; 0 attaches none",
        json_schema_extra=about(LORA, reference="8"),
    )
    lora_alpha: float = Field(
        8,
        gt=0,
        description="Scale of the adapters: alpha / rank",
        json_schema_extra=about(LORA, reference="8"),
    )
    lora_rank_pattern: Pairs[Annotated[int, Field(ge=1, le=1024)]] = Field(
        {},
        description="Ranks of single layers, by short or full names, as in q=16,blocks.11.mlp.fc1=4",
        json_schema_extra=about(LORA, default="none", metavar="NAME=INT,…"),
    )
    lora_alpha_pattern: Pairs[Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Alphas of single layers, likewise",
        json_schema_extra=about(LORA, default="none", metavar="NAME=FLOAT,…"),
    )
    lora_use_rslora: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)",
        json_schema_extra=about(LORA, reference="False"),
    )
    lora_use_dora: bool = Field(
        False,
        description="Learn the length of each output's weights apart from their direction (DoRA; slower)",
        json_schema_extra=about(LORA),
    )
    lora_init: LoraInit = Field(
        "default",
        description="First weights of the adapters; pissa and olora take them out of the layer's own",
        json_schema_extra=about(LORA),
    )
    lora_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Dropout before the adapters",
        json_schema_extra=about(LORA, reference="0.1"),
    )
    lora_bias: Literal["none", "lora_only", "all"] = Field(
        "none",
        description="Biases trained beside the adapters: none, those of adapted layers, or all",
        json_schema_extra=about(LORA, reference="'none'"),
    )
    lora_target_modules: NamesOrNone = Field(
        ("q", "k", "v"),
        description=f"Layers that get an adapter, of {', '.join(LORA_TARGETS)}; or full names; patch_embed, too, "
        "where a patch spans several frames",
        json_schema_extra=about(LORA, reference="None", why="LoRA trains nothing without targets"),
    )
    lora_exclude_modules: NamesOrNone = Field(
        (),
        description="Layers that get no adapter and are trained in full",
        json_schema_extra=about(LORA, reference="None", default="none"),
    )

    # Optimisation
    epochs: int = Field(
        300,
        ge=1,
        description="Passes over the training videos",
        json_schema_extra=about(OPTIMISATION, reference="300"),
    )
    warmup_epochs: float | None = Field(
        None,
        ge=0,
        description="Epochs in which the learning rate rises from 0",
        json_schema_extra=about(
            OPTIMISATION,
            reference="30",
            why="30 of 300; a short run would never leave the warm-up",
            default="min(30, epochs / 10)",
        ),
    )
    per_gpu_batch_size: CountOrAuto = Field(
        DEFAULT_MICRO_BATCH,
        description="Clips per GPU in one forward pass, 1 or more; auto takes the most that fit",
        json_schema_extra=about(
            OPTIMISATION,
            reference="256",
            why="256 clips of 8 frames need over 100 GB with ViT-B",
            metavar="INT|auto",
        ),
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Forward passes per optimizer update",
        json_schema_extra=about(OPTIMISATION, reference="1"),
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Clips per optimizer update, over all GPUs and forward passes",
        json_schema_extra=about(
            OPTIMISATION,
            resettable=True,
            default="per-gpu-batch-size (8 if auto) × gradient-accumulation-steps × processes",
        ),
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute each block again in the backward pass: less memory for more time",
        json_schema_extra=about(OPTIMISATION, harmless=True),
    )
    learning_rate: float = Field(
        5e-4,
        gt=0,
        description="Peak learning rate of the cosine schedule",
        json_schema_extra=about(
            OPTIMISATION, reference="0.003", why="PEFT starts its adapters smaller, and batches are smaller"
        ),
    )
    weight_decay: float = Field(
        0.1, ge=0, description="AdamW's weight decay", json_schema_extra=about(OPTIMISATION, reference="0.1")
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the target spread over all classes",
        json_schema_extra=about(OPTIMISATION, reference="0"),
    )
    bias_weight_decay: bool = Field(
        False,
        description="Apply weight decay to biases",
        json_schema_extra=about(OPTIMISATION, reference="False"),
    )
    norm_weight_decay: bool = Field(
        False,
        description="Apply weight decay to normalisation layers",
        json_schema_extra=about(OPTIMISATION, reference="False"),
    )
    max_grad_norm: float | None = Field(
        1.0,
        gt=0,
        description="Largest norm of the gradient; none does not clip",
        json_schema_extra=about(OPTIMISATION, reference="1.0", resettable=True),
    )
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="AdamW's beta 1", json_schema_extra=about(OPTIMISATION, reference="0.9")
    )
    adam_beta2: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="AdamW's beta 2",
        json_schema_extra=about(OPTIMISATION, reference="0.999"),
    )
    adam_epsilon: float = Field(
        1e-8, gt=0, description="AdamW's epsilon", json_schema_extra=about(OPTIMISATION, reference="1e-8")
    )
    mixed_precision: MixedPrecision = Field(
        "auto", description=PRECISION, json_schema_extra=about(OPTIMISATION)
    )
    compile: bool = Field(
        False,
        description="Compile the model with torch.compile before it is trained",
        json_schema_extra=about(OPTIMISATION),
    )

    # Augmentation
    crop_scale_min: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Smallest share of a frame's area that a random crop keeps",
        json_schema_extra=about(AUGMENTATION),
    )
    horizontal_flip: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Probability of mirroring a clip; 0 where left and right are different classes",
        json_schema_extra=about(AUGMENTATION),
    )
    brightness: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Strength of the brightness jitter",
        json_schema_extra=about(AUGMENTATION),
    )
    contrast: float = Field(
        0.2, ge=0, le=1, description="Strength of the contrast jitter", json_schema_extra=about(AUGMENTATION)
    )
    saturation: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Strength of the saturation jitter",
        json_schema_extra=about(AUGMENTATION),
    )
    hue: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Strength of the hue jitter, in turns of the colour circle",
        json_schema_extra=about(AUGMENTATION),
    )

    # Regularisation
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability that a clip skips a branch of the last block, in a line from 0 in the first",
        json_schema_extra=about(REGULARISATION),
    )
    token_drop: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="Share of each training clip's patches that the model is not shown, others at each step",
        json_schema_extra=about(REGULARISATION),
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the trained weights, which is validated and kept in their place",
        json_schema_extra=about(REGULARISATION, resettable=True),
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Learning rate of each block as a share of that of the block after it",
        json_schema_extra=about(REGULARISATION),
    )
    temporal_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Learning rate of blocks over whole frames, which pretrained weights lack, as a share of "
        "--learning-rate; with --attention factorized only",
        json_schema_extra=about(
            REGULARISATION, default="0.1 with --train lora on pretrained weights, else 1"
        ),
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="Weight of a clip in the training loss: one for all, or by how rare its class is",
        json_schema_extra=about(REGULARISATION),
    )
    balanced_sampling: bool = Field(
        False,
        description="Draw equally many clips of every class in each epoch; its length stays",
        json_schema_extra=about(REGULARISATION),
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after so many epochs without a better validation result",
        json_schema_extra=about(REGULARISATION, resettable=True),
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Blend each clip with another: alpha of the Beta distribution of its share; 0 is off",
        json_schema_extra=about(REGULARISATION),
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Paste a box of another clip, through all frames: alpha as for --mixup; 0 is off. "
        "With both, each clip draws which",
        json_schema_extra=about(REGULARISATION),
    )
    randaugment: int = Field(
        0,
        ge=0,
        le=16,
        description="RandAugment: operations drawn for each clip, beside the colour jitter",
        json_schema_extra=about(REGULARISATION),
    )
    randaugment_magnitude: float = Field(
        9.0,
        ge=0,
        le=10,
        description="Magnitude of RandAugment's operations",
        json_schema_extra=about(REGULARISATION),
    )
    random_erasing: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Probability of erasing one box of a clip, through all frames",
        json_schema_extra=about(REGULARISATION),
    )
    repeats: int = Field(
        1,
        ge=1,
        le=64,
        description="Times that each video is in an update, drawn and augmented anew each time",
        json_schema_extra=about(REGULARISATION),
    )

    # Checkpoints
    checkpoint_dir: str = Field(
        "checkpoints",
        description="Folder of checkpoints inside the run's folder",
        json_schema_extra=about(
            CHECKPOINTS, harmless=True, reference="required", why="one name is as good as another"
        ),
    )
    save_checkpoint_interval: int = Field(
        1,
        ge=1,
        description="Epochs between checkpoints; the last epoch is always saved",
        json_schema_extra=about(CHECKPOINTS, harmless=True, reference="1"),
    )
    save_every_steps: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints within an epoch, besides those at its end",
        json_schema_extra=about(CHECKPOINTS, harmless=True, resettable=True),
    )
    save_every_minutes: float | None = Field(
        None,
        gt=0,
        description="Most minutes between checkpoints",
        json_schema_extra=about(CHECKPOINTS, harmless=True, resettable=True),
    )
    max_no_of_checkpoints: int = Field(
        10,
        ge=1,
        description="Checkpoints kept on disk, the latest ones",
        json_schema_extra=about(CHECKPOINTS, harmless=True, reference="10"),
    )
    overwrite: bool = Field(
        False,
        description="Replace the run of that name; refused where it holds files that tvit did not write",
        json_schema_extra=about(CHECKPOINTS, harmless=True),
    )
    resume_from_checkpoint: str | None = Field(
        None,
        description="Checkpoint to go on from: latest, a name, or a path",
        json_schema_extra=about(CHECKPOINTS, harmless=True, reference="None", metavar="NAME|PATH|latest"),
    )

    @field_validator("experiment_name", "checkpoint_dir")
    @classmethod
    def _is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or value in (".", "..") or "/" in value or "\\" in value):
            raise ValueError("it should be one folder name; the folder above it is --working-directory")
        return value

    @model_validator(mode="before")
    @classmethod
    def _trains_all_of_a_model_from_scratch(cls, values: Any) -> Any:
        """Random weights that stay frozen would be no backbone."""
        from_scratch = isinstance(values, dict) and values.get("hf_model_name", "") is None
        return {"train": "all", **values} if from_scratch else values

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainSettings:
        if self.hf_model_name is not None:
            given = [flag(key) for key in SCRATCH_SHAPE if getattr(self, key) is not None]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: the pretrained model {self.hf_model_name} has a shape of its own. "
                    "Leave them out, or train from scratch with --hf-model-name none"
                )
        if self.lora_use_dora and self.lora_init in ("pissa", "olora"):
            raise ValueError(
                f"--lora-init {self.lora_init}: it changes the weights whose lengths --lora-use-dora learns. "
                "Leave one of them out"
            )
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise ValueError(
                f"--warmup-epochs {self.warmup_epochs:g}: the run has only {self.epochs} epochs. Give fewer"
            )
        if self.global_batch_size is not None and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"--gradient-accumulation-steps {self.gradient_accumulation_steps}: it follows from "
                f"--global-batch-size {self.global_batch_size}. Leave one of them out"
            )
        if self.frame_grid is not None and self.frame_grid < self.n_frames:
            raise ValueError(
                f"--frame-grid {self.frame_grid}: it should be at least --n-frames {self.n_frames}"
            )
        micro_batch = DEFAULT_MICRO_BATCH if self.per_gpu_batch_size == "auto" else self.per_gpu_batch_size
        update = self.global_batch_size or micro_batch * self.gradient_accumulation_steps
        if update % self.repeats:
            raise ValueError(
                f"--repeats {self.repeats}: it should divide the {update} clips of an update "
                + (
                    "(--global-batch-size)"
                    if self.global_batch_size
                    else "per GPU (--per-gpu-batch-size × --gradient-accumulation-steps)"
                )
            )
        if self.n_frames % self.tubelet_size:
            raise ValueError(
                f"--n-frames {self.n_frames}: it should be a multiple of --tubelet-size {self.tubelet_size}"
            )
        self._scheme_agrees()
        self._regularisation_agrees()
        return self

    def _scheme_agrees(self) -> None:
        if self.feature_norm and self.hf_model_name is None:
            raise ValueError(
                "--feature-norm: features of a model from scratch say nothing yet that could be standardised. "
                "Take --no-feature-norm, or give pretrained weights with --hf-model-name"
            )
        if self.attention == "space" and self.tubelet_size > 1:
            raise ValueError(
                "--attention space: it must not know the order of frames, and a tubelet of several does. Take "
                "--tubelet-size 1"
            )
        if self.temporal_depth is not None and self.attention != "factorized":
            raise ValueError(
                f"--temporal-depth {self.temporal_depth}: --attention {self.attention} has no blocks over whole "
                "frames. Leave it out, or take --attention factorized"
            )
        trained = self.attention == "factorized" and self.train != "classifier"
        if self.temporal_rate is not None and not trained:
            raise ValueError(
                f"--temporal-rate {self.temporal_rate:g}: no blocks over whole frames are trained with --attention "
                f"{self.attention} and --train {self.train}. Leave it out, or take --attention factorized and "
                "another --train than classifier"
            )

    def _regularisation_agrees(self) -> None:
        if self.train == "classifier" and self.drop_path:
            raise ValueError(
                f"--drop-path {self.drop_path:g}: with --train classifier no block learns, so there is none to "
                "regularise. Leave it out, or train more"
            )
        if self.train == "classifier" and self.layer_decay != 1:
            raise ValueError(
                f"--layer-decay {self.layer_decay:g}: with --train classifier no block learns, and the "
                "classifier has the full rate. Leave it out, or train more"
            )
        if self.class_weights == "balanced" and self.balanced_sampling:
            raise ValueError(
                "--class-weights balanced and --balanced-sampling: each makes up for rare classes, and both "
                "together would do so twice. Take one of them"
            )

    def without_effect(self) -> list[str]:
        """Settings of adapters that were changed where none is attached."""
        if self.train == "lora" and self.lora_rank:
            return []
        still: set[str] = set()
        if self.train == "lora":  # rank 0 is what says so
            still = {"lora_rank", "lora_exclude_modules"} | (
                {"lora_bias"} if self.lora_bias == "all" else set()
            )
        fields = TrainSettings.model_fields
        return [
            name
            for name, field in fields.items()
            if name.startswith("lora_") and name not in still and getattr(self, name) != field.default
        ]

    def temporal_share(self) -> float:
        """Share of the learning rate for blocks over frames; without adapters the rate is a small one already."""
        if self.temporal_rate is not None:
            return self.temporal_rate
        return 0.1 if self.train == "lora" and self.hf_model_name is not None else 1.0

    def warmup(self) -> float:
        """Warm-up in epochs: what was given, else min(30, epochs / 10)."""
        return min(30.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs
