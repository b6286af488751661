"""LoRA adapters (arXiv:2106.09685) by PEFT: attach, merge, save, load; and the trainable parameters of each mode.

PEFT takes seconds to import, so functions import it when they need it.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tvit_cli.errors import ModelError
from tvit_cli.model.folder import save_tensors, tensor_mismatches
from tvit_cli.model.linear import lora_layer
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.settings.base import flag
from tvit_cli.settings.train import FROZEN, LORA_TARGETS, LoraInit

ADAPTER = "default"  # the adapter's name inside PEFT
ADAPTER_FILE = "adapter_model.safetensors"
FROM_WEIGHTS = frozenset({"pissa", "olora"})  # these subtract the initial adapter from the base weights
LINEAR_ONLY = FROM_WEIGHTS | {"orthogonal"}
PATCHES = "patch_embed"
START_PARTS = (f"lora_A.{ADAPTER}.weight", f"lora_B.{ADAPTER}.weight")


@dataclass(frozen=True)
class LoraSpec:
    """Adapters to attach.

    Targets, exclude and the patterns' keys are short names (`q`: every layer of that name) or full ones
    (`blocks.3.attention.q`). A pattern's value replaces the rank or alpha; that of a full name wins.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    bias: Literal["none", "lora_only", "all"]
    targets: tuple[str, ...]
    exclude: tuple[str, ...]
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    init: LoraInit = "default"


def attach(model: TemporalViT, spec: LoraSpec, *, seed: int) -> None:
    """Attaches adapters to the targets, in place, with first weights from the seed; rank 0 attaches none.

    Trainable are then the adapters, the added modules, the classifier (unless it is a target), the excluded
    layers (as in the reference), and biases: none, those of layers with an adapter (`lora_only`), or all. With
    tubelets the patch embedding is always a target, except for initialisations of linear layers alone: pretrained,
    its weights for all frames but one are 0.

    Raises ModelError for an unknown layer, if no layer is left for an adapter, and for a rank or an initialisation
    that a layer cannot have.
    """
    assert not adapted_layers(model), "adapters are attached once"
    excluded = resolve_layers(model, spec.exclude, option="lora_exclude_modules")
    wanted = resolve_layers(model, spec.targets, option="lora_target_modules")
    is_inflated = model.config.tubelet_size > 1 and not model.config.is_video  # not a video ViT's own
    if is_inflated and PATCHES not in wanted and spec.init not in LINEAR_ONLY:
        wanted.append(PATCHES)
    targets = [name for name in wanted if name not in excluded] if spec.rank else []
    if spec.rank and not targets:
        raise ModelError(
            f"No layer is left for an adapter: lora_target_modules is {','.join(spec.targets) or 'empty'}, "
            f"lora_exclude_modules is {','.join(spec.exclude) or 'empty'}. Add a target, or give --lora-rank 0."
        )
    if targets:
        _inject(model, targets, spec, seed)
    adapted = adapted_layers(model)
    assert sorted(adapted) == sorted(targets), "PEFT adapts the targets, and no other layers"

    own = adapter_names(model)
    model.requires_grad_(False)
    for module in (*model.added_modules().values(), *map(model.get_submodule, excluded)):
        module.requires_grad_(True)
    model.classifier.requires_grad_("classifier" not in targets)
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        is_adapted = layer.removesuffix(".base_layer") in adapted
        trains_bias = spec.bias == "all" or (spec.bias == "lora_only" and is_adapted)
        if name in own or (leaf == "bias" and trains_bias):
            parameter.requires_grad_(True)


def resolve_layers(model: TemporalViT, names: Iterable[str], *, option: str) -> list[str]:
    """Full names of the layers that short names (the last part) or full names stand for.

    `["q"]` in a model of two blocks -> `["blocks.0.attention.q", "blocks.1.attention.q"]`. Layers of added modules
    are excluded: those are trained in full. Raises ModelError, naming the option, for an unknown name.
    """
    added = tuple(f"{name}." for name in model.added_modules())
    kinds = (nn.Linear, nn.Conv2d)
    layers = [n for n, m in model.named_modules() if isinstance(m, kinds) and not n.startswith(added)]
    layers = [name for name in layers if name.rpartition(".")[2] in LORA_TARGETS]
    chosen: set[str] = set()
    for wanted in names:
        found = [name for name in layers if wanted in (name, name.rpartition(".")[2])]
        if not found:
            close = difflib.get_close_matches(wanted, [*LORA_TARGETS, *layers], n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ModelError(
                f"{option}: {wanted!r} is no layer of the model.{hint} Legal names are "
                f"{', '.join(LORA_TARGETS)}, or one layer in full, such as blocks.0.attention.q."
            )
        chosen.update(found)
    return [name for name in layers if name in chosen]


@torch.no_grad()
def merge(model: TemporalViT) -> None:
    """Merges adapters into their layers, in place; the state dict then has plain names again."""
    for name, layer in adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
        if getattr(layer, "gelu", None) is not None:
            model.get_submodule(name.rpartition(".")[0]).act = nn.GELU(approximate=layer.gelu)
    vars(model).pop("peft_config", None)  # left by PEFT


@torch.no_grad()
def merged_state_dict(model: TemporalViT) -> dict[str, Tensor]:
    """The state dict after `merge`, bit for bit; layers without an adapter share the unchanged model's memory."""
    merged = bare_state_dict(model)
    for name, layer in adapted_layers(model).items():
        copied = copy.deepcopy(layer)
        copied.merge()
        merged[f"{name}.weight"] = copied.get_base_layer().weight.detach()
    return merged


def _inject(model: TemporalViT, targets: list[str], spec: LoraSpec, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    ranks = _by_layer(model, targets, spec.rank_pattern, option="lora_rank_pattern")
    alphas = _by_layer(model, targets, spec.alpha_pattern, option="lora_alpha_pattern")
    _check_init(model, spec, {name: ranks.get(name, spec.rank) for name in targets})
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        init_lora_weights=True if spec.init == "default" else spec.init,
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    if (ours := own_layer()) is not None:
        config._register_custom_module({nn.Linear: ours})
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, layer in adapted_layers(model).items():
        if spec.init in FROM_WEIGHTS:
            layer.start = {part: layer.get_parameter(part).detach().clone() for part in START_PARTS}
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        act = getattr(parent, "act", None)
        computes_gelu = name.endswith(".fc2") and not spec.use_dora and type(layer) is ours
        if name == f"blocks.{len(model.blocks) - 1}.mlp.fc2" and model.pools_in_last:
            model.pools_in_last = not spec.dropout  # a mean cannot be dropped token by token
            computes_gelu = computes_gelu and not model.pools_in_last
        if computes_gelu and isinstance(act, nn.GELU):  # See Note [Memory of a LoRA layer]
            layer.gelu, parent.act = act.approximate, nn.Identity()


@functools.cache
def own_layer() -> type[nn.Module] | None:
    """Our LoRA class for `nn.Linear`; None if PEFT's private hook, tried on a small layer, does not accept it."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    try:
        ours = lora_layer(Linear)
        config = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
        config._register_custom_module({nn.Linear: ours})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trial = inject_adapter_in_model(config, nn.Sequential(nn.Linear(3, 2)), adapter_name=ADAPTER)
            x = torch.randn(4, 3)
            same = type(trial[0]) is ours and torch.allclose(trial(x), Linear.forward(trial[0], x), atol=1e-5)
    except (AttributeError, TypeError):  # the hook or an attribute changed
        return None
    return ours if same else None


def _by_layer(
    model: TemporalViT, targets: list[str], pattern: Mapping[str, Any], *, option: str
) -> dict[str, Any]:
    """A pattern's values by full name. {"q": 4, "blocks.1.attention.q": 8} -> {"blocks.0.attention.q": 4, …}"""
    values = {}
    for name in sorted(pattern, key=lambda name: "." in name):  # full names win
        layers = [layer for layer in resolve_layers(model, [name], option=option) if layer in targets]
        if not layers:
            add = f"Add it to {flag('lora_target_modules')}, or leave it out."
            raise ModelError(f"{option}: {name!r} gets no adapter. {add}")
        values.update(dict.fromkeys(layers, pattern[name]))
    return values


def _check_init(model: TemporalViT, spec: LoraSpec, ranks: Mapping[str, int]) -> None:
    option = f"--lora-init {spec.init}"
    for name, rank in ranks.items() if spec.init in LINEAR_ONLY else ():
        layer, targets = model.get_submodule(name), flag("lora_target_modules")
        if not isinstance(layer, nn.Linear):
            problem = f"{option}: {name} is a convolution; it initialises linear layers alone"
            raise ModelError(f"{problem}. Leave {name} out of {targets}, or use --lora-init default.")
        most = min(layer.in_features, layer.out_features)
        if spec.init in FROM_WEIGHTS and rank > most:
            key = name if name in spec.rank_pattern else name.rpartition(".")[2]
            raise ModelError(
                f"{option}: {name} maps {layer.in_features} to {layer.out_features} numbers, so its rank is at "
                f"most {most}, not {rank}. Give {flag('lora_rank_pattern')} {key}={most}, or leave it out."
            )
        if spec.init == "orthogonal" and rank % 2:
            raise ModelError(f"{option}: {name} has the rank {rank}; it has to be even. Use {rank + 1}.")


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter (PEFT's `LoraLayer`), recognised by `base_layer` without importing PEFT."""
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), nn.Module)}


def adapter_names(model: nn.Module) -> set[str]:
    """Full names of the adapters' tensors, without those of their base layers."""
    return {
        f"{layer}.{name}"
        for layer, module in adapted_layers(model).items()
        for name in module.state_dict()
        if not name.startswith("base_layer.")
    }


def set_trainable(model: TemporalViT, mode: str, spec: LoraSpec, *, seed: int) -> None:
    """Chooses the trainable parameters.

    lora        those of `attach`: adapters, classifier, added modules
    all         every parameter
    classifier  the classifier, the attentive pool, and the feature norm
    probe       the same; the pool is an attentive one
    last-N      the last N blocks, everything after them, and all added modules

    In modes that train no block the encoder runs without autograd. Raises ModelError for a name in the spec that is
    no layer of the model, and for more blocks than there are.
    """
    if mode == "lora":
        attach(model, spec, seed=seed)
        return
    model.requires_grad_(mode == "all")
    model.encoder_grad = mode not in FROZEN
    trained: list[nn.Module] = [model.pool, model.feature_norm, model.classifier]
    if mode.startswith("last-"):
        count = int(mode.removeprefix("last-"))
        if count > len(model.blocks):
            raise ModelError(f"--train {mode}: the model has {len(model.blocks)} blocks. Give fewer, or all.")
        # All added modules: beside image weights they start neutral, and frozen, the model would ignore time.
        trained += [*model.blocks[-count:], model.norm, model.summary, *model.added_modules().values()]
    for part in trained:
        part.requires_grad_(True)


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, which share the model's memory."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def start_tensors(model: nn.Module) -> dict[str, Tensor]:
    """First weights of adapters that were subtracted from the base weights (PiSSA, OLoRA), else nothing.

    A checkpoint stores them, because the remaining base weights depend on them and another machine may
    decompose the same weights differently. They share the model's memory.
    """
    return {
        f"start/{name}.{part}": tensor
        for name, layer in adapted_layers(model).items()
        for part, tensor in getattr(layer, "start", {}).items()
    }


def load_trainable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors of `trainable_tensors` into the model.

    With those of `start_tensors` among them, recomputes the base weights for these. Raises ModelError, with the
    model unchanged, if names or shapes differ.
    """
    starts = start_tensors(model) if any(name.startswith("start/") for name in tensors) else {}
    layers = {name: layer for name, layer in adapted_layers(model).items() if starts}
    before = {name: [layer.start[part].clone() for part in START_PARTS] for name, layer in layers.items()}
    copy_tensors(tensors, {**trainable_tensors(model), **starts})
    for name, layer in layers.items():
        now = [layer.start[part] for part in START_PARTS]
        if not all(map(torch.equal, before[name], now)):
            weight, scale = layer.get_base_layer().weight.detach(), layer.scaling[ADAPTER]
            weight += scale * (before[name][1] @ before[name][0] - now[1] @ now[0]).to(weight.device)


@torch.no_grad()
def copy_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into those of a run. Raises ModelError, with nothing copied, if they do not match."""
    if problems := tensor_mismatches(tensors, own):
        options = "--train, --lora-rank, --lora-target-modules"
        raise ModelError(
            f"The saved weights do not fit: {problems}. Use the settings of their run ({options})."
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def trainable_report(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters, adapters included: (trainable, total)."""
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(n for n, is_trainable in counts if is_trainable), sum(n for n, _ in counts)


def bare_state_dict(model: TemporalViT) -> dict[str, Tensor]:
    """The state dict of the model without its adapters, with plain names; it shares the model's memory."""
    own = adapter_names(model)
    return {plain_name(name): weight for name, weight in model.state_dict().items() if name not in own}


def plain_name(name: str) -> str:
    """A tensor's name without adapters. blocks.0.attention.q.base_layer.bias -> blocks.0.attention.q.bias"""
    return name.replace(".base_layer.", ".")


def save_adapter(model: TemporalViT, folder: Path, *, prefix: str, backbone: str) -> None:
    """Writes all trainable weights in PEFT's format, for a model that contains this one as `prefix`.

    Fully trained modules are stored under `modules_to_save`. `backbone` is the location of the bare model.
    """
    adapters, trained = adapter_names(model), trainable_tensors(model)
    whole: list[str] = []  # the outermost modules that are trained in full, without an adapter
    for name, module in model.named_modules():
        names = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        is_inside = any(name.startswith(f"{outer}.") for outer in whole)
        if names and names <= trained.keys() and not is_inside and not adapters & names:
            whole.append(name)
    config = copy.copy(cast(Any, model.peft_config)[ADAPTER])  # set by PEFT
    config.target_modules = {prefix + name for name in adapted_layers(model)}
    config.modules_to_save = [prefix + name for name in whole]
    config.base_model_name_or_path = backbone
    config.init_lora_weights = True  # other initialisations would change the backbone on loading
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = {}
    for name in dict.fromkeys([*trained, *adapters]):
        stored = name.replace(f".{ADAPTER}", "") if name in adapters else name
        stored = stored.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        tensors[f"base_model.model.{prefix}{stored}"] = model.get_parameter(name).detach().contiguous()
    save_tensors(tensors, folder / ADAPTER_FILE, {"format": "pt"})
