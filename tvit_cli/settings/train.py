"""Settings of `tvit train`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tvit_cli.settings import types
from tvit_cli.settings.base import flag, setting
from tvit_cli.settings.card import ResizeMode

run, data, model, lora = (partial(setting, panel=p) for p in ("Run", types.DATA, types.MODEL, "LoRA"))
optimisation, augmentation = (partial(setting, panel=p) for p in ("Optimisation", "Augmentation"))
regularisation, checkpoints = (partial(setting, panel=p) for p in ("Regularisation", "Checkpoints"))

LoraInit = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]
LORA_TARGETS = ("patch_embed", "q", "k", "v", "proj", "fc1", "fc2", "classifier")
DEFAULT_MICRO_BATCH = 8
FROZEN = ("classifier", "probe")  # modes of --train that train no block
# Note [Joint attention is the default]
# On Weizmann with people held out (90 test clips over three folds) divided has 82 right, joint and space (single
# frames) 81, factorized 78. With --token-drop 0.5 and twice the epochs joint has 86, 84 and 80 (three seeds), space
# 66, 65 and 70. joint trains adapters only and needs fewer operations than divided (18.3 and 22.1 GFLOP per clip;
# docs/benchmarks.md), but its cost is quadratic in the tokens: long clips of large frames are cheaper with divided
# attention or tubelets (2 frames: 78 right). On motions, all but space learn the order. AIM and ST-Adapter
# were no better (docs/negative-results.md).

SCRATCH_SHAPE = {"width": 192, "depth": 12, "num_heads": 3, "patch_size": 16}  # ViT-Ti/16 (DeiT, table 1)


class TrainSettings(types.DataSettings):
    """Settings of `tvit train`."""

    SERIES: ClassVar[tuple[str, ...]] = ("seed", "split")
    NAMING: ClassVar[tuple[str, ...]] = (
        "hf_model_name",
        "from_",
        "resume_from_checkpoint",
        "experiment_name",
        "working_directory",
        "checkpoint_dir",
        "overwrite",
        "path_to_data",
        "train",  # a probe does not take the pooling of its weights
        "n_frames",
        *SERIES,
    )

    # fmt: off
    experiment_name: str | None = run(None, "Name of the run folder", resume_safe=True, reference="required",
        why="no finished run is overwritten by accident", default_text="the first free <data>-<n>",
        essential=True)
    working_directory: Path = run(types.RUNS, types.RUNS_TEXT, resume_safe=True, reference="required",
        why="one folder for every run")
    seed: int = run(0, "Seed of every random choice", ge=0, lt=2**31, essential=True)
    device: types.Device = run("auto", types.DEVICE_TEXT, resume_safe=True)
    num_processes: int = run(1, types.PROCESSES_TEXT, ge=1, le=1024, resume_safe=True)
    log_wandb: bool = run(False, "Logs metrics to Weights & Biases", resume_safe=True, reference="False")
    log_tensorboard: bool = run(False, "Logs metrics to TensorBoard, inside the run folder", resume_safe=True)
    show_settings: bool = run(False, "Prints all settings with their origins, then exits", resume_safe=True,
        printed=True)
    dry_run: bool = run(False,
        "Measures parameters, FLOPs, memory, time, then exits",
        resume_safe=True, essential=True)
    test_at_end: bool = run(False, "Evaluates the test subset once after training", resume_safe=True,
        essential=True)
    top_k: int = run(5, "k of the top-k accuracy", ge=1, reference="5")

    strict: bool = data(False, "Refuses data leakage: groups or files of train that are also in val or test",
        resume_safe=True)
    n_frames: int = data(8, "Frames per clip, one per equal segment of the video", ge=1, le=1024,
        reference="8", essential=True)
    frame_grid: int | None = data(None,
        "Samples from this many evenly spaced frames of each video only, as in a frame store", ge=1,
        resettable=True)
    clip_seconds: types.Seconds = data(None,
        "Spreads the frames over a part of the video of this length, such as 2s, at a random place in training",
        metavar="SECONDS", resettable=True, gt=0, default_text="the whole video; video ViTs: as they were trained")
    img_size: int = data(224, "Height and width of input frames, in pixels", ge=1, le=4096, reference="224")
    resize: ResizeMode = data("crop",
        "Square frames by a centre crop of the resized frame (crop) or by distortion (squash)")
    num_workers: int | None = data(None, "Decoding processes per GPU; 0 decodes in the training process",
        ge=0, le=256, resume_safe=True, reference="32", why="more workers than cores slow training down",
        default_text="from the CPU count")

    from_: str | None = model(None,
        "Run or model folder to go on from: its weights, classes and settings, except those given",
        metavar="RUN", essential=True)
    hf_model_name: str | None = model("google/vit-base-patch16-224",
        "Pretrained ViT: Hugging Face name, folder (also of a tvit model) or weights file; none: from scratch",
        reference="required", why="the reference's own backbone", resettable=True, essential=True)
    width: int | None = model(None, "Token size, from scratch only", ge=1,
        default_text=str(SCRATCH_SHAPE["width"]))
    depth: int | None = model(None, "Number of blocks, from scratch only", ge=1,
        default_text=str(SCRATCH_SHAPE["depth"]))
    num_heads: int | None = model(None, "Attention heads per block, from scratch only", ge=1,
        default_text=str(SCRATCH_SHAPE["num_heads"]))
    patch_size: int | None = model(None, "Height and width of a patch in pixels, from scratch only", ge=1,
        default_text=str(SCRATCH_SHAPE["patch_size"]))
    tubelet_size: int = model(1, "Frames per patch token (tubelet)", ge=1, le=16)
    attention: Literal["joint", "divided", "factorized", "space"] = model("joint",
        "Space-time attention: over all tokens (joint), over time then space (divided), temporal blocks on "
        "frame embeddings (factorized), or single frames (space)")
    temporal_depth: int | None = model(None, "Temporal blocks of --attention factorized", ge=1, le=64,
        default_text="2")
    pool: Literal["class", "mean", "attentive"] = model("class",
        "Features: class token, mean of the patch tokens, or learned average of both")
    feature_norm: bool = model(False,
        "Standardises features before the classifier with training-set statistics")
    custom_weight_init: bool = model(False,
        "Draws layers without pretrained weights from a truncated normal, sd 0.02", reference="False")

    train: types.TrainMode = lora("lora",
        "Trained weights: adapters (lora), everything (all), the classifier (classifier), that and an attentive "
        "pooler (probe), or the last N blocks and all later layers (last-N). lora and last-N also train temporal "
        "modules without pretrained weights; lora also trains the classifier",
        metavar="lora|all|classifier|probe|last-N", default_text="lora; from scratch all", essential=True)
    lora_rank: int = lora(8, "Rank of the adapters; 0 attaches none", ge=0, le=1024, reference="8",
        essential=True)
    lora_alpha: float = lora(8, "Scale of the adapters: alpha / rank", gt=0, reference="8")
    lora_rank_pattern: types.Pairs[Annotated[int, Field(ge=1, le=1024)]] = lora({},
        "Ranks of single layers by short or full name, as in q=16,blocks.11.mlp.fc1=4", default_text="none",
        metavar="NAME=INT,…")
    lora_alpha_pattern: types.Pairs[Annotated[float, Field(gt=0)]] = lora({},
        "Alphas of single layers, in the form of --lora-rank-pattern", default_text="none",
        metavar="NAME=FLOAT,…")
    lora_use_rslora: bool = lora(False, "rsLoRA: scales adapters by alpha / sqrt(rank)", reference="False")
    lora_use_dora: bool = lora(False,
        "DoRA: learns magnitude and direction of each weight row separately (slower)")
    lora_init: LoraInit = lora("default",
        "Initial adapter weights; pissa and olora subtract them from the layer's own")
    lora_dropout: float = lora(0.1, "Dropout before the adapters", ge=0, lt=1, reference="0.1")
    lora_bias: Literal["none", "lora_only", "all"] = lora("none",
        "Trained biases: none, those of adapted layers, or all", reference="'none'")
    lora_target_modules: types.NamesOrNone = lora(("q", "k", "v"),
        f"Layers with an adapter: {', '.join(LORA_TARGETS)}, or full names; tubelets add patch_embed",
        reference="None", why="LoRA trains nothing without targets")
    lora_exclude_modules: types.NamesOrNone = lora((), "Layers without an adapter, trained in full",
        reference="None", default_text="none")

    epochs: int = optimisation(300, "Passes over the training videos", ge=1, reference="300", essential=True)
    clip_passes: int | None = optimisation(None,
        "Training budget in clips: epochs and other settings left out are chosen from the data, as by --preset "
        "finetune", ge=1)
    warmup_epochs: float | None = optimisation(None, "Epochs of linear learning-rate warm-up", ge=0,
        reference="30", why="30 of 300; a short run would never leave the warm-up",
        default_text="min(30, epochs / 10)")
    per_gpu_batch_size: types.CountOrAuto = optimisation(DEFAULT_MICRO_BATCH,
        "Clips per GPU in one forward pass, at least 1; auto takes the most that fit", reference="256",
        why="256 clips of 8 frames need over 100 GB with ViT-B", metavar="INT|auto", essential=True)
    gradient_accumulation_steps: int = optimisation(1, "Forward passes per optimizer step", ge=1,
        reference="1")
    global_batch_size: int | None = optimisation(None,
        "Clips per optimizer step, over all GPUs and forward passes", ge=1, resettable=True,
        default_text="per-gpu-batch-size (8 if auto) × gradient-accumulation-steps × processes")
    gradient_checkpointing: bool = optimisation(False,
        "Recomputes blocks in the backward pass: less memory, more time", resume_safe=True)
    learning_rate: float = optimisation(5e-4, "Peak learning rate of the cosine schedule", gt=0,
        reference="0.003", why="PEFT starts its adapters smaller, and batches are smaller", essential=True)
    weight_decay: float = optimisation(0.1, "AdamW's weight decay", ge=0, reference="0.1")
    label_smoothing: float = optimisation(0.0, "Target share spread over all classes", ge=0, lt=1,
        reference="0")
    bias_weight_decay: bool = optimisation(False, "Applies weight decay to biases", reference="False")
    norm_weight_decay: bool = optimisation(False, "Applies weight decay to normalisation layers",
        reference="False")
    max_grad_norm: float | None = optimisation(1.0, "Gradient clipping norm; none disables", gt=0,
        reference="1.0", resettable=True)
    adam_beta1: float = optimisation(0.9, "AdamW's beta 1", ge=0, lt=1, reference="0.9")
    adam_beta2: float = optimisation(0.999, "AdamW's beta 2", ge=0, lt=1, reference="0.999")
    adam_epsilon: float = optimisation(1e-8, "AdamW's epsilon", gt=0, reference="1e-8")
    mixed_precision: types.MixedPrecision = optimisation("auto", types.PRECISION_TEXT)
    compile: bool = optimisation(False, "Compiles the model with torch.compile")
    deterministic: bool = optimisation(False,
        "Deterministic algorithms only: a resumed run has the same bits on a GPU, too, but is slower; on a CPU it "
        "has them anyway", resume_safe=True)

    crop_scale_min: float = augmentation(0.5, "Smallest share of the frame's area in a random crop", gt=0, le=1)
    horizontal_flip: float = augmentation(0.5,
        "Probability of mirroring a clip; 0 where left and right are different classes", ge=0, le=1)
    brightness: float = augmentation(0.2, "Strength of the brightness jitter", ge=0, le=1)
    contrast: float = augmentation(0.2, "Strength of the contrast jitter", ge=0, le=1)
    saturation: float = augmentation(0.2, "Strength of the saturation jitter", ge=0, le=1)
    hue: float = augmentation(0.0, "Strength of the hue jitter, in turns of the colour wheel", ge=0, le=0.5)

    drop_path: float = regularisation(0.0,
        "Stochastic depth: rate of the last block, linear from 0 in the first", ge=0, lt=1)
    token_drop: float = regularisation(0.0,
        "Share of each training clip's patches that is dropped, redrawn at every step", ge=0, le=0.9)
    ema_decay: float | None = regularisation(None,
        "Decay of the weights' exponential moving average, which is validated and saved instead of them",
        gt=0, lt=1, resettable=True)
    layer_decay: float = regularisation(1.0, "Learning rate of each block relative to the next", gt=0, le=1)
    temporal_rate: float | None = regularisation(None,
        "Learning rate of the temporal blocks of --attention factorized, relative to --learning-rate", gt=0,
        le=1, default_text="0.1 with --train lora on pretrained weights, else 1")
    classifier_rate: float = regularisation(1.0,
        "Learning rate of the classifier, relative to --learning-rate", gt=0)
    class_weights: Literal["none", "balanced"] = regularisation("none",
        "Class weights of the training loss; balanced gives rare classes more")
    balanced_sampling: bool = regularisation(False,
        "Draws equally many clips of every class; epochs keep their length")
    patience: int | None = regularisation(None,
        "Early stopping after this many epochs without a better validation result", ge=1, resettable=True)
    mixup: float = regularisation(0.0, "Mixup: alpha of the Beta distribution; 0 disables", ge=0, le=100)
    cutmix: float = regularisation(0.0,
        "CutMix, the same box in all frames: alpha as for --mixup; 0 disables. With both, each clip draws one",
        ge=0, le=100)
    randaugment: int = regularisation(0, "RandAugment operations per clip besides colour jitter", ge=0, le=16)
    randaugment_magnitude: float = regularisation(9.0, "Magnitude of RandAugment's operations", ge=0, le=10)
    random_erasing: float = regularisation(0.0,
        "Probability of erasing a box, the same in all frames of a clip", ge=0, le=1)
    repeats: int = regularisation(1,
        "Repeated augmentation: independently augmented clips per video in each batch", ge=1, le=64)

    checkpoint_dir: str = checkpoints("checkpoints", "Folder of checkpoints inside the run folder",
        resume_safe=True, reference="required", why="the name is arbitrary")
    save_checkpoint_interval: int = checkpoints(1,
        "Epochs between checkpoints; the last epoch is always saved", ge=1, resume_safe=True, reference="1")
    save_every_steps: int | None = checkpoints(None,
        "Steps between checkpoints within an epoch, besides those at its end", ge=1, resume_safe=True,
        resettable=True)
    save_every_minutes: float | None = checkpoints(None, "Most minutes between checkpoints", gt=0,
        resume_safe=True, resettable=True)
    max_no_of_checkpoints: int = checkpoints(10, "Number of latest checkpoints to keep", ge=1,
        resume_safe=True, reference="10")
    overwrite: bool = checkpoints(False,
        "Replaces the run of that name; refused where it holds files that tvit did not write",
        resume_safe=True)
    resume_from_checkpoint: str | None = checkpoints(None,
        "Checkpoint to resume from: latest, a name, or the path of a checkpoint or run folder", resume_safe=True,
        reference="None", metavar="NAME|PATH|latest", essential=True)
    # fmt: on

    @field_validator("experiment_name", "checkpoint_dir")
    @classmethod
    def _is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or value in (".", "..") or "/" in value or "\\" in value):
            raise ValueError("it should be one folder name; --working-directory is the folder above it")
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_depend_on_weights(cls, values: Any) -> Any:
        """A frozen backbone with random weights is useless, so another default holds from scratch."""
        if isinstance(values, dict) and values.get("train") == "probe":
            values = {"pool": "attentive", **values}
        if isinstance(values, dict) and values.get("from_") is not None:
            return {"hf_model_name": None, **values}
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
            yield f"--gradient-accumulation-steps {accumulation}: --global-batch-size sets it. Leave one out"
        if self.frame_grid is not None and self.frame_grid < self.n_frames:
            yield f"--frame-grid {self.frame_grid}: it should be at least --n-frames {self.n_frames}"
        if self.frame_grid is not None and self.clip_seconds is not None:
            advice = "Leave one out (--clip-seconds none takes the whole video)"
            yield f"--frame-grid {self.frame_grid}: not with --clip-seconds, which takes frames by time. {advice}"
        if self.n_frames % self.tubelet_size:
            yield f"--n-frames {self.n_frames}: it should be a multiple of --tubelet-size {self.tubelet_size}"
        micro_batch = DEFAULT_MICRO_BATCH if self.per_gpu_batch_size == "auto" else self.per_gpu_batch_size
        clips = total or micro_batch * accumulation
        if clips % self.repeats:
            options = "--per-gpu-batch-size × --gradient-accumulation-steps"
            batch = f"--global-batch-size {clips}" if total else f"the {clips} clips per GPU ({options})"
            yield f"--repeats {self.repeats}: it should divide {batch}"
        if self.class_weights == "balanced" and self.balanced_sampling:
            yield "--class-weights balanced and --balanced-sampling correct class imbalance twice. Take one"

    def _model_problems(self) -> Iterator[str]:
        if self.clip_passes is not None and self.from_ is not None:
            reason = f"--from {self.from_} takes over the settings of its run"
            yield f"--clip-passes {self.clip_passes}: {reason}. Leave one out"
        given = [flag(key) for key in SCRATCH_SHAPE if getattr(self, key) is not None]
        if self.from_ is not None and self.hf_model_name is not None:
            yield f"--hf-model-name {self.hf_model_name}: --from {self.from_} has other weights. Leave one out"
        elif self.hf_model_name is not None and given:
            fixed = f"{', '.join(given)}: fixed by the pretrained model {self.hf_model_name}"
            yield f"{fixed}. Leave out, or train from scratch with --hf-model-name none"
        if self.feature_norm and self.pretrained is None:
            yield "--feature-norm: untrained features have no useful statistics. Give --hf-model-name"
        attention, is_frozen = f"--attention {self.attention}", self.train in FROZEN
        if self.train == "probe" and self.pool != "attentive":
            advice = (
                "Leave --pool out" if self.from_ is None else f"Give --hf-model-name {self.from_}, not --from"
            )
            yield f"--train probe: it trains an attentive pooler, not --pool {self.pool}. {advice}"
        if self.train == "probe" and self.pretrained is None:
            yield "--train probe: an encoder with random weights has no features. Give --hf-model-name"
        if self.attention == "space" and self.tubelet_size > 1:
            yield f"{attention}: a tubelet contains the order of its frames. Take --tubelet-size 1"
        if self.attention != "factorized" or is_frozen:
            advice = "Leave it out, or take --attention factorized"
            if self.temporal_rate is not None:
                reason = f"{attention} with --train {self.train} trains no temporal blocks"
                yield f"--temporal-rate {self.temporal_rate:g}: {reason}. {advice} and another --train"
            if self.temporal_depth is not None and self.attention != "factorized":
                yield f"--temporal-depth {self.temporal_depth}: {attention} has no temporal blocks. {advice}"
        for name, neutral in (("drop_path", 0), ("layer_decay", 1)):
            if is_frozen and (value := getattr(self, name)) != neutral:
                yield f"{flag(name)} {value:g}: --train {self.train} trains no block. Leave one of them out"
        if self.lora_use_dora and self.lora_init in ("pissa", "olora"):
            yield f"--lora-init {self.lora_init}: it changes the weights that --lora-use-dora splits. Take one"

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

    @property
    def pretrained(self) -> str | None:
        """Name of the weights to start from, of --from or --hf-model-name; None from scratch."""
        return self.hf_model_name if self.from_ is None else self.from_

    def temporal_share(self) -> float:
        """Learning rate of temporal blocks relative to the others'; full fine-tuning has a small one already."""
        if self.temporal_rate is not None:
            return self.temporal_rate
        return 0.1 if self.train == "lora" and self.pretrained is not None else 1.0

    def warmup(self) -> float:
        """Warm-up in epochs: the setting, else min(30, epochs / 10)."""
        return min(30.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs
