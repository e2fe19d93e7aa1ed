"""How the shipped detectors are built, what they learn from, and how they are saved.

Both learn DETR's set prediction after every decoder layer, and get help that exists during training only and leaves a
stock transformers architecture behind: real BatchNorm in the backbone, three groups of queries (Chen et al. 2022,
Group DETR), a class and box loss on the encoder's tokens through the shared heads, and queries that start on a grid.
"""

import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from backsight.representation import Predictions
from backsight.scenes.dataset import BACKGROUND, MAXIMUM_OBJECTS, MEAN, SIZE, STD, SceneTensors
from backsight.scenes.render import CLASS_NAMES

GROUPS, QUERIES, WIDTH = 3, 16, 128  # groups of queries while training, queries of each, channels
_COMMON: dict[str, Any] = {
    **{"d_model": WIDTH, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "position_embedding_type": "sine"},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    # transformers 5.23 feeds the *normalised* stream to the next decoder layer of a DETR when auxiliary_loss is set;
    # the losses behind the layers are therefore computed here, and the shipped model stays the published DETR.
    "auxiliary_loss": False,
    "id2label": dict(enumerate(CLASS_NAMES)),
    "label2id": {name: i for i, name in enumerate(CLASS_NAMES)},
}
# What the decoder is given of the queries, and of the images that it is asked about.
_OF_QUERIES = ("inputs_embeds", "object_queries_position_embeddings", "reference_points")
_OF_IMAGES = ("encoder_hidden_states", "encoder_attention_mask", "spatial_position_embeddings", "valid_ratios")


class _Streams(NamedTuple):
    """What the heads read. tokens: (B, N, C); layers: one (G*B, Q, C) for each decoder layer, group-major; places:
    (G*B, Q, 2) logits of x and y that the box head adds to, or None."""

    tokens: Tensor
    layers: list[Tensor]
    places: Tensor | None = None


class DetrTraining(nn.Module):
    """transformers' DetrForObjectDetection, on one grid of stride 8, with the loss that it is trained by."""

    slow: ClassVar[tuple[str, ...]] = ()
    strides: ClassVar[tuple[int, ...]] = (8,)
    focal: ClassVar[int] = 0  # weight of a focal loss of sigmoids, 0 for a softmax
    set_loss: ClassVar[Any] = staticmethod(ForObjectDetectionLoss)  # (logits, truth, device, boxes, config)
    kind: ClassVar[str] = "Detr"
    own: ClassVar[dict[str, Any]] = {}
    channels: ClassVar[tuple[int, ...]] = (64, 128)
    model: Any

    def __init__(self) -> None:
        super().__init__()
        self.model = self._stock(GROUPS * QUERIES)
        core = self.model.model
        for name, module in [*core.backbone.named_modules()]:
            if type(module).__name__.endswith("FrozenBatchNorm2d"):
                core.backbone.set_submodule(name, nn.BatchNorm2d(module.weight.numel()))
        core.unfreeze_backbone()
        core.decoder.register_forward_pre_hook(self._by_group, with_kwargs=True)
        with torch.no_grad():
            self._start(core)
            first, others = core.query_position_embeddings.weight.split([QUERIES, (GROUPS - 1) * QUERIES])
            others.copy_(first.repeat(GROUPS - 1, 1) + 0.1 * torch.randn_like(others))

    def _stock(self, queries: int) -> Any:
        depth = len(self.channels)
        backbone = transformers.ResNetConfig(  # type: ignore[call-arg]
            embedding_size=64,
            hidden_sizes=[*self.channels],
            depths=[1] * depth,
            layer_type="basic",
            out_features=[f"stage{i}" for i in range(2, depth + 1)],
        )
        config = getattr(transformers, f"{self.kind}Config")
        model = getattr(transformers, f"{self.kind}ForObjectDetection")
        return model(config(backbone_config=backbone, num_queries=queries, **_COMMON, **self.own))

    def _start(self, core: Any) -> None:
        """Queries start on a square grid: as the sine code of its cells."""
        core.query_position_embeddings.weight[:QUERIES, :WIDTH] = self._positions(core)

    @staticmethod
    def _positions(core: Any) -> Tensor:
        side = math.isqrt(QUERIES)
        code = core.position_embedding(shape=(1, WIDTH, side, side), device="cpu", dtype=torch.float32)
        return code.flatten(2).transpose(1, 2)[0]

    def _by_group(self, _decoder: nn.Module, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The decoder sees each group of queries by itself, group-major; in evaluation the first one only."""
        groups = GROUPS if self.training else 1
        for name, value in named.items():
            if name in _OF_QUERIES:
                named[name] = torch.cat(value.split(QUERIES, 1)[:groups])
            elif name in _OF_IMAGES:
                named[name] = torch.cat([value] * groups)
        return positional, named

    def streams(self, pixels: Tensor) -> _Streams:
        """What the detector holds behind every layer."""
        core = self.model.model
        outputs = core(pixels, output_hidden_states=True)
        *layers, last = outputs.decoder_hidden_states[1:]  # normalised is the last one only
        normalised = core.decoder.layernorm
        return _Streams(normalised(outputs.encoder_last_hidden_state), [*map(normalised, layers), last])

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, classes) of decoder states (…, C)."""
        return self.model.class_labels_classifier(hidden)

    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        """(…, 4) centre and size in [0, 1] of decoder states (…, C) at places (…, 2)."""
        return self.model.bbox_predictor(hidden).sigmoid()

    def loss(self, scenes: SceneTensors) -> Tensor:
        """DETR's set loss after every decoder layer (Carion et al. 2020; weights 1, 5, 2), and that of the tokens."""
        streams = self.streams(scenes.pixels)
        truth = [
            {"class_labels": label[label >= 0], "boxes": box[label >= 0]}
            for label, box in zip(scenes.labels, scenes.boxes, strict=True)
        ] * GROUPS
        total = self._dense(streams.tokens, scenes)
        for hidden in streams.layers:
            logits, boxes = self.logits(hidden), self.boxes(hidden, streams.places)
            loss, parts, _ = self.set_loss(logits, truth, logits.device, boxes, self.model.config)
            total = total + loss + max(0, self.focal - 1) * parts["loss_ce"]
        return total

    def _dense(self, tokens: Tensor, scenes: SceneTensors) -> Tensor:
        """Each encoder token names the object that covers most of its patch (if a third at least) and its box."""
        one_hot = F.one_hot(scenes.objects.long(), MAXIMUM_OBJECTS + 1).float().permute(0, 3, 1, 2)
        shares = torch.cat([F.avg_pool2d(one_hot, stride).flatten(2) for stride in self.strides], 2)
        share, owner = shares.transpose(1, 2)[..., 1:].max(-1)
        covered, logits = share > 1 / 3, self.logits(tokens)
        labels = torch.where(covered, scenes.labels.gather(1, owner), BACKGROUND)
        if self.focal:
            named = F.one_hot(labels, BACKGROUND + 1)[..., :BACKGROUND].to(logits.dtype)
            focal = sigmoid_focal_loss(logits, named, reduction="sum")
            class_loss = self.focal * focal / named.sum().clamp(min=1)
        else:
            class_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        places = cell_centres(*(SIZE // stride for stride in self.strides)).to(tokens).logit()
        boxes = self.boxes(tokens[covered], places.expand(len(owner), -1, -1)[covered])
        true_boxes = scenes.boxes.gather(1, owner[..., None].expand(-1, -1, 4))[covered]
        corners = (box_convert(of, "cxcywh", "xyxy") for of in (boxes, true_boxes))
        overlap = generalized_box_iou_loss(*corners, reduction="mean")
        return class_loss + 5 * (boxes - true_boxes).abs().sum(-1).mean() + 2 * overlap

    def outputs(self, pixels: Tensor) -> Predictions:
        streams = self.streams(pixels)
        boxes = self.boxes(streams.layers[-1], streams.places)
        return Predictions(self.logits(streams.layers[-1]), boxes, "sigmoid" if self.focal else "softmax")

    def save(self, folder: Path) -> None:
        """The stock model by save_pretrained, without what only training needed, and its image processor."""
        with torch.random.fork_rng():
            stock = self._stock(QUERIES)
        weights = {k: v for k, v in self.model.state_dict().items() if not k.endswith("num_batches_tracked")}
        queries = "model.query_position_embeddings.weight"
        stock.load_state_dict(weights | {queries: weights[queries][:QUERIES]})
        stock.save_pretrained(folder)
        size, look = {"height": SIZE, "width": SIZE}, {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
        getattr(transformers, f"{self.kind}ImageProcessor")(size=size, resample=3, **look).save_pretrained(folder)


class DeformableDetrTraining(DetrTraining):
    """transformers' DeformableDetrForObjectDetection, on grids of strides 8 and 16, with neither two stages nor box
    refinement: focal loss, and boxes relative to a place.

    The place of a query is the reference point that the model makes of its position embedding; a token's place is its
    own. As published (Zhu et al. 2021), sampling offsets and reference points learn at a tenth of the rate.
    """

    slow = ("sampling_offsets", "reference_points")
    strides = (8, 16)
    focal = 2
    set_loss = staticmethod(DeformableDetrForObjectDetectionLoss)
    kind = "DeformableDetr"
    own: ClassVar[dict[str, Any]] = {
        **{"num_feature_levels": 2, "encoder_n_points": 4, "decoder_n_points": 4, "class_cost": 2},
        **{"two_stage": False, "with_box_refine": False},
    }
    channels = (64, 128, 192)

    def _start(self, core: Any) -> None:
        super()._start(core)
        # The smallest linear map that sends the position of each cell to the cell's centre.
        places = cell_centres(math.isqrt(QUERIES)).logit()
        core.reference_points.weight.copy_(torch.linalg.lstsq(self._positions(core), places).solution.T)
        core.reference_points.bias.zero_()
        for head in self.model.class_embed:
            head.bias.fill_(-math.log(99))  # one in a hundred (Lin et al. 2017, Focal Loss)
        for head in self.model.bbox_embed:
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, -0.5, -0.5]))

    def streams(self, pixels: Tensor) -> _Streams:
        outputs = self.model.model(pixels)
        places = outputs.intermediate_reference_points[:, 0].logit(1e-5)
        return _Streams(outputs.encoder_last_hidden_state, [*outputs.intermediate_hidden_states.unbind(1)], places)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.class_embed[0](hidden)

    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        assert places is not None
        return (self.model.bbox_embed[0](hidden) + F.pad(places, (0, 2))).sigmoid()


def cell_centres(*sides: int) -> Tensor:
    """(N, 2) x and y in [0, 1] of the centres of the cells of square grids, row-major."""
    lines = [(torch.arange(side) + 0.5) / side for side in sides]
    return torch.cat([torch.cartesian_prod(line, line).flip(1) for line in lines])
