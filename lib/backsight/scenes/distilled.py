"""How scenes-deit is trained: the ViT of scenes-vit with a distillation token, taught by scenes-vit as DeiT is.

Class and distillation token each have a head; the one learns the label, the other the teacher's hard decision, and
the model answers with the mean of both (Touvron et al. 2021, "hard distillation"). Patch tokens predict the shares of
the classes, as in scenes-vit. Size and blocks are those of scenes-vit, so that the two differ by the distillation only.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.scenes.classifiers import VIT_ARGUMENTS, ClassifierTraining, share_loss
from backsight.scenes.dataset import BACKGROUND, Batch

PREFIX = 2  # class and distillation token


class DeitTraining(ClassifierTraining):
    """timm's VisionTransformerDistilled and its teacher, the shipped scenes-vit."""

    architecture = "VisionTransformerDistilled"
    arguments = VIT_ARGUMENTS

    def __init__(self) -> None:
        super().__init__()
        from timm.models.deit import VisionTransformerDistilled

        self.model = VisionTransformerDistilled(**VIT_ARGUMENTS)
        self.patch_head = nn.Linear(VIT_ARGUMENTS["embed_dim"], BACKGROUND + 1)
        self.teacher = [_teacher()]  # in a list: no part of what is trained, saved or put in training mode

    def loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            decided = self.teacher[0](batch.pixels).argmax(1)
        tokens = self.model.forward_features(batch.pixels)  # type: ignore[operator]
        labelled = F.cross_entropy(self.model.head(tokens[:, 0]), batch.labels[:, 0])  # type: ignore[operator]
        taught = F.cross_entropy(self.model.head_dist(tokens[:, 1]), decided)  # type: ignore[operator]
        patches = self.patch_head(tokens[:, PREFIX:])
        return (labelled + taught) / 2 + share_loss(patches, batch, VIT_ARGUMENTS["patch_size"])


def _teacher() -> nn.Module:
    """scenes-vit from data/weights, frozen."""
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    from backsight.project import project_root

    folder = project_root() / "data" / "weights" / "scenes-vit"
    model = VisionTransformer(**json.loads((folder / "config.json").read_text())["arguments"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)
