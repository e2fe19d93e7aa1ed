"""How the shipped classifiers are built, what they learn from, and how they are saved.

Beside the class of the dominant object, each token of the last grids predicts which share of its patch each class
covers (with a linear head that exists during training only), which leaves a stock timm architecture behind.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from backsight.project import write_atomically, write_json
from backsight.scenes.dataset import BACKGROUND, MEAN, SIZE, STD, Batch, patch_shares
from backsight.scenes.render import CLASS_NAMES, CLASSES

VIT_ARGUMENTS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": len(CLASSES),
    "class_token": True,
    "global_pool": "token",
}

SWIN_ARGUMENTS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 64,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "mlp_ratio": 2,
    "drop_path_rate": 0.0,
    "num_classes": len(CLASSES),
}


class ClassifierTraining(nn.Module, ABC):
    """A classifier with the loss it is trained by."""

    slow: ClassVar[tuple[str, ...]] = ()
    architecture: ClassVar[str]
    arguments: ClassVar[dict[str, Any]]
    model: nn.Module

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor: ...

    def outputs(self, pixels: Tensor) -> Tensor:
        """Class logits (B, K) of normalised pixels."""
        return self.model(pixels)

    def save(self, folder: Path) -> None:
        """Weights and the architecture's name and arguments, which are all that builds the model again."""
        from safetensors.torch import save_file

        weights = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
        description = {
            "architecture": self.architecture,
            "arguments": self.arguments,
            "classes": list(CLASS_NAMES),
            "mean": MEAN,
            "std": STD,
            "input_size": [3, SIZE, SIZE],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }
        write_json(folder / "config.json", description)


def share_loss(logits: Tensor, batch: Batch, patch: int) -> Tensor:
    """Cross-entropy of the tokens' predictions (B, N, classes + 1) against the shares of the classes in each patch."""
    shares = patch_shares(batch, patch)
    return -(shares * F.log_softmax(logits, -1)).sum(-1).mean()


class VitTraining(ClassifierTraining):
    """timm's VisionTransformer; the patch tokens after the final norm predict the shares."""

    architecture = "VisionTransformer"
    arguments = VIT_ARGUMENTS

    def __init__(self) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.model = VisionTransformer(**VIT_ARGUMENTS)
        self.patch_head = nn.Linear(VIT_ARGUMENTS["embed_dim"], BACKGROUND + 1)

    def loss(self, batch: Batch) -> Tensor:
        tokens = self.model.forward_features(batch.pixels)  # type: ignore[operator]
        logits = self.model.forward_head(tokens)  # type: ignore[operator]
        patches = self.patch_head(tokens[:, 1:])
        return F.cross_entropy(logits, batch.labels[:, 0]) + share_loss(patches, batch, VIT_ARGUMENTS["patch_size"])


class SwinTraining(ClassifierTraining):
    """timm's SwinTransformer; the tokens at the end of the second and of the last stage predict the shares."""

    architecture = "SwinTransformer"
    arguments = SWIN_ARGUMENTS

    def __init__(self) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer

        self.model = SwinTransformer(**SWIN_ARGUMENTS)
        width = SWIN_ARGUMENTS["embed_dim"]
        self.middle_head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, BACKGROUND + 1))
        self.patch_head = nn.Linear(4 * width, BACKGROUND + 1)

    def loss(self, batch: Batch) -> Tensor:
        model, patch = self.model, SWIN_ARGUMENTS["patch_size"]
        first, second, third = model.layers  # type: ignore[misc]
        middle = second(first(model.patch_embed(batch.pixels)))  # type: ignore[operator]
        last = model.norm(third(middle))  # type: ignore[operator]
        logits = model.forward_head(last)  # type: ignore[operator]
        total = F.cross_entropy(logits, batch.labels[:, 0])
        total = total + share_loss(self.middle_head(middle).flatten(1, 2), batch, 2 * patch)
        return total + share_loss(self.patch_head(last).flatten(1, 2), batch, 4 * patch)
