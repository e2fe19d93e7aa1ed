"""Small targets with random weights: EXAMPLES is what every test of all targets walks; a new adapter adds its lines.

small_timm("Swin")          small_detector("deformable_detr", two_stage=True, with_box_refine=True)
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
import transformers
from torch import nn

from backsight.targets import detectors
from backsight.targets.base import Preprocessing, Target, seeded
from backsight.targets.timm_models import TimmTarget

CLASSES = ("disc", "ring", "star")

# timm

_TOKENS = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
_INNER_AND_OUTER = {
    "patch_size": 8,
    "embed_dim": 16,
    "inner_dim": 8,
    "depth": 2,
    "num_heads_inner": 2,
    "num_heads_outer": 2,
    "first_stride": 2,
}
_BRANCHES = {
    "patch_size": (4, 8),
    "img_scale": (1.0, 1.0),
    "embed_dim": (16, 32),
    "depth": ((1, 1, 0), (1, 1, 0)),
    "num_heads": (2, 2),
}
_WINDOWS = {"patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4}
_FOUR_STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
_PYRAMID = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}

# The class, the size of the images, and the arguments.
TIMM: Mapping[str, tuple[str, int, Mapping[str, Any]]] = {
    "ViT": ("VisionTransformer", 32, {**_TOKENS, "img_size": 32}),
    "DeiT, distilled": ("VisionTransformerDistilled", 32, {**_TOKENS, "img_size": 32}),
    "BEiT": ("Beit", 32, {**_TOKENS, "img_size": 32}),
    "EVA": ("Eva", 32, {**_TOKENS, "img_size": 32}),
    "CaiT": ("Cait", 32, {**_TOKENS, "img_size": 32, "depth_token_only": 1}),
    "XCiT": ("Xcit", 32, {**_TOKENS, "img_size": 32, "cls_attn_layers": 1}),
    "TNT": ("TNT", 32, {**_INNER_AND_OUTER, "img_size": 32}),
    "CrossViT": ("CrossVit", 32, {**_BRANCHES, "img_size": 32}),
    "Swin": ("SwinTransformer", 64, {**_WINDOWS, "img_size": 64}),
    "Swin V2": ("SwinTransformerV2", 64, {**_WINDOWS, "img_size": 64}),
    "PVT V2": ("PyramidVisionTransformerV2", 64, _PYRAMID),
    "Hiera": ("Hiera", 64, {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "PoolFormer": ("MetaFormer", 64, _FOUR_STAGES),
    "ConvNeXt": ("ConvNeXt", 64, _FOUR_STAGES),
}


def small_timm(name: str = "ViT", **changes: Any) -> Target:
    """One of TIMM; changes: of its arguments."""
    architecture, side, arguments = TIMM[name]
    build = partial(getattr(timm.models, architecture), **{"num_classes": 5, **arguments, **changes})
    size = changes.get("img_size", side)
    size = (size, size) if isinstance(size, int) else size
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), size)
    with seeded(0):
        model = build()
    vit = isinstance(model, timm.models.VisionTransformer)
    return TimmTarget(model, f"small {name}", "random", preprocessing, build=None if vit else build)


# transformers

RESNET = {  # maps of the strides 8 and 16
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24],
    "depths": [1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3"],
}
FOUR_MAPS = {
    **RESNET,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
# Two layers each, heads and widths that differ.
_DETR = {
    "backbone_config": RESNET,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "num_queries": 6,
}
_RT_DETR = {
    **_DETR,
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32, 32, 32],
    "encoder_hidden_dim": 32,
    "encoder_layers": 1,
    "decoder_n_points": 2,
    "num_denoising": 4,
}
_MASK2FORMER = {
    "backbone_config": SWIN,
    "feature_size": 32,
    "mask_feature_size": 16,
    "hidden_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_feedforward_dim": 40,
    "dim_feedforward": 48,
    "num_attention_heads": 2,
    "num_queries": 6,
}
_YOLOS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": [64, 64],
    "patch_size": 16,
    "num_detection_tokens": 5,
}
TWO_STAGES = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 6}

# model_type: the adapter, transformers' name, and the configuration.
DETECTORS: Mapping[str, tuple[Any, str, Mapping[str, Any]]] = {
    "detr": (detectors.Detr, "Detr", _DETR),
    "conditional_detr": (detectors.ConditionalDetr, "ConditionalDetr", _DETR),
    "dab-detr": (detectors.DabDetr, "DabDetr", {**_DETR, "hidden_size": 32, "d_model": None}),
    "deformable_detr": (
        detectors.DeformableDetr,
        "DeformableDetr",
        {**_DETR, "num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2},
    ),
    "rt_detr": (detectors.RtDetr, "RTDetr", _RT_DETR),
    "rt_detr_v2": (detectors.RtDetr, "RTDetrV2", _RT_DETR),
    "yolos": (detectors.Yolos, "Yolos", _YOLOS),
    "mask2former": (detectors.Mask2Former, "Mask2Former", _MASK2FORMER),
}


def small_detector(model_type: str = "detr", size: tuple[int, int] = (64, 64), **changes: Any) -> Any:
    """One of DETECTORS for images of `size`; changes: of its configuration."""
    adapter, name, arguments = DETECTORS[model_type]
    settings = {key: value for key, value in {**arguments, **changes}.items() if value is not None}
    task = "UniversalSegmentation" if model_type == "mask2former" else "ObjectDetection"
    with seeded(0):
        config = getattr(transformers, f"{name}Config")(**{"id2label": dict(enumerate(CLASSES)), **settings})
        model = getattr(transformers, f"{name}For{task}")(config)
    preprocessing = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size, "bilinear")
    return adapter(scattered(model), f"small {model_type}", preprocessing, "random", CLASSES)


def scattered(model: nn.Module, seed: int = 7) -> nn.Module:
    """The model with noise on all parameters, and norm weights about 1 (some models start theirs, or heads, at 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "weight" and parameter.ndim == 1:
                    parameter.fill_(1.0)
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


EXAMPLES: Mapping[str, Callable[[], Target]] = {
    **{name: partial(small_timm, name) for name in TIMM},
    **{name: partial(small_detector, name) for name in DETECTORS},
}
