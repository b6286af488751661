"""Configuration and model classes of a tvit model for transformers, around `TemporalViT`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .config import ViTConfig
from .layers import AddedModule
from .vit import Positions, TemporalViT, init_layer


class TvitConfig(PretrainedConfig):
    """Config with the fields of ViTConfig under `network`; `id2label` names the classes."""

    model_type = "tvit"

    def __init__(self, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.network = dict(network or {})
        super().__init__(**kwargs)

    def vit_config(self) -> ViTConfig:
        """The network's shape, with one class per label."""
        return ViTConfig.from_dict({**self.network, "num_classes": self.num_labels})

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.vit_config().n_frames

    @property
    def image_size(self) -> int:
        """Height and width of a frame, in pixels."""
        return self.vit_config().frame_size

    @property
    def hidden_size(self) -> int:
        """Size of the features."""
        return self.vit_config().width


class TvitPreTrainedModel(PreTrainedModel):
    """The network with its classifier, and the first values of weights that no file provides."""

    config_class = TvitConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    _supports_sdpa = True

    def __init__(self, config: TvitConfig) -> None:
        super().__init__(config)
        self.network = TemporalViT(config.vit_config(), initialise=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AddedModule):
            module.reset_parameters(generator=None, from_scratch=True)
        elif isinstance(module, Positions):
            for position in module.parameters(recurse=False):
                nn.init.trunc_normal_(position, std=0.02)
        else:
            init_layer(module)


class TvitModel(TvitPreTrainedModel):
    """Backbone: features before the classifier, (B, T, C, H, W) -> `pooler_output` (B, D)."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.network.features(pixel_values))


class TvitForVideoClassification(TvitPreTrainedModel):
    """Classifier, (B, T, C, H, W) -> `logits` (B, K); with `labels` (B,) also their cross-entropy."""

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        logits = self.network(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
