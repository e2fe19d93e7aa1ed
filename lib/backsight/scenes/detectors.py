"""How the shipped detectors are built, what they learn from, and how they are saved.

Both learn DETR's set prediction after every decoder layer, and get help that exists during training only and leaves a
stock transformers architecture behind: real BatchNorm in the backbone, three groups of queries (Chen et al. 2022,
Group DETR), a class and box loss on the encoder's tokens through the shared heads, and queries that start on a grid.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from backsight.project import write_json
from backsight.representation import Predictions
from backsight.scenes.dataset import BACKGROUND, MAXIMUM_OBJECTS, MEAN, SIZE, STD, Batch
from backsight.scenes.render import CLASS_NAMES

Grid = tuple[int, int]

_LAYERS: dict[str, Any] = {
    "num_queries": 16,
    "d_model": 128,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "position_embedding_type": "sine",
    "id2label": dict(enumerate(CLASS_NAMES)),
    "label2id": {name: i for i, name in enumerate(CLASS_NAMES)},
}


def detr_config() -> Any:
    """The DETR that is shipped: one grid of stride 8."""
    backbone = ResNetConfig(  # type: ignore[call-arg]
        embedding_size=64,
        hidden_sizes=[64, 128],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    # transformers 5.23 feeds the *normalised* stream to the next decoder layer when auxiliary_loss is set; the
    # auxiliary loss is therefore computed here, and the shipped model stays the published DETR.
    return DetrConfig(backbone_config=backbone, auxiliary_loss=False, **_LAYERS)


def deformable_config() -> Any:
    """The Deformable DETR that is shipped: grids of strides 8 and 16, neither two-stage nor with box refinement."""
    backbone = ResNetConfig(  # type: ignore[call-arg]
        embedding_size=64,
        hidden_sizes=[64, 128, 192],
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3"],
    )
    return DeformableDetrConfig(
        backbone_config=backbone,
        num_feature_levels=2,
        encoder_n_points=4,
        decoder_n_points=4,
        two_stage=False,
        with_box_refine=False,
        auxiliary_loss=False,
        class_cost=2,
        **_LAYERS,
    )


@dataclass(frozen=True)
class _Streams:
    """What the heads read. tokens: (B, N, C) on grids; layers: one (G*B, Q, C) for each decoder layer, group-major.

    token_places: (1, N, 2), query_places: (G*B, Q, 2), logits of x and y that the box head adds to, or None.
    """

    tokens: Tensor
    grids: tuple[Grid, ...]
    layers: list[Tensor]
    token_places: Tensor | None = None
    query_places: Tensor | None = None


class DetectorTraining(nn.Module, ABC):
    """A detector with the loss it is trained by; focal: weight of a focal loss of sigmoids, 0 for a softmax."""

    slow: ClassVar[tuple[str, ...]] = ()
    processor: ClassVar[str]
    focal: ClassVar[int] = 0
    set_loss: ClassVar[Any]  # of transformers: (logits, truth, device, boxes, config)
    model: Any
    other_groups: nn.Parameter  # (groups - 1, Q, …); training only: dropped on saving

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.model.model.unfreeze_backbone()
        _with_batch_norm(self.model.model.backbone)

    def _grow_groups(self, start: Tensor, groups: int) -> None:
        """Further groups of queries, each near the first one's start (Q, …)."""
        others = start.repeat(groups - 1, 1, 1) + 0.1 * torch.randn(groups - 1, *start.shape)
        self.other_groups = nn.Parameter(others)

    def _queries(self) -> tuple[Tensor, Tensor, int]:
        """All groups' embeddings (G*Q, …), the mask between groups, and Q."""
        first = self.model.model.query_position_embeddings.weight
        queries = torch.cat([first, *(self.other_groups if self.training else ())])
        group = torch.arange(len(queries), device=first.device) // len(first)
        mask = torch.zeros(1, 1, len(group), len(group), device=first.device)
        return queries, mask.masked_fill_(group[:, None] != group, torch.finfo(mask.dtype).min), len(first)

    @abstractmethod
    def streams(self, pixels: Tensor) -> _Streams:
        """What the detector's training pass holds behind every layer."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(…, classes) of decoder states (…, C)."""

    @abstractmethod
    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        """(…, 4) centre and size in [0, 1] of decoder states (…, C)."""

    def loss(self, batch: Batch) -> Tensor:
        """DETR's set loss after every decoder layer (Carion et al. 2020; weights 1, 5, 2), and that of the tokens."""
        streams = self.streams(batch.pixels)
        groups = len(streams.layers[0]) // len(batch.pixels)
        truth = [
            {"class_labels": label[label >= 0], "boxes": box[label >= 0]}
            for label, box in zip(batch.labels, batch.boxes, strict=True)
        ] * groups
        total = self._dense(streams, batch)
        for hidden in streams.layers:
            logits, boxes = self.logits(hidden), self.boxes(hidden, streams.query_places)
            loss, parts, _ = type(self).set_loss(logits, truth, logits.device, boxes, self.model.config)
            total = total + loss + max(0, self.focal - 1) * parts["loss_ce"]
        return total

    def _dense(self, streams: _Streams, batch: Batch) -> Tensor:
        """Each encoder token names the object that covers most of its patch (if a third at least) and its box."""
        one_hot = F.one_hot(batch.objects, MAXIMUM_OBJECTS + 1).float().permute(0, 3, 1, 2)
        shares = torch.cat([F.adaptive_avg_pool2d(one_hot, grid).flatten(2) for grid in streams.grids], 2)
        share, owner = shares.transpose(1, 2)[..., 1:].max(-1)
        covered = share > 1 / 3
        labels, logits = torch.where(covered, batch.labels.gather(1, owner), BACKGROUND), self.logits(streams.tokens)
        if self.focal:
            wanted = F.one_hot(labels, BACKGROUND + 1)[..., :BACKGROUND].to(logits.dtype)
            focal = sigmoid_focal_loss(logits, wanted, reduction="sum")
            class_loss = self.focal * focal / wanted.sum().clamp(min=1)
        else:
            class_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        places = streams.token_places
        places = None if places is None else places.expand(len(owner), -1, -1)[covered]
        boxes = self.boxes(streams.tokens[covered], places)
        wanted = batch.boxes.gather(1, owner[..., None].expand(-1, -1, 4))[covered]
        corners = (box_convert(each, "cxcywh", "xyxy") for each in (boxes, wanted))
        overlap = generalized_box_iou_loss(*corners, reduction="mean")
        return class_loss + 5 * (boxes - wanted).abs().sum(-1).mean() + 2 * overlap

    def outputs(self, pixels: Tensor) -> Predictions:
        streams = self.streams(pixels)
        hidden = streams.layers[-1]
        activation: Literal["softmax", "sigmoid"] = "sigmoid" if self.focal else "softmax"
        return Predictions(self.logits(hidden), self.boxes(hidden, streams.query_places), activation)

    def save(self, folder: Path) -> None:
        """The stock model by save_pretrained, without what only training needed, and its image processor."""
        with torch.random.fork_rng():
            stock = type(self.model)(self.model.config)
        weights = {k: v for k, v in self.model.state_dict().items() if not k.endswith("num_batches_tracked")}
        stock.load_state_dict(weights)
        stock.save_pretrained(folder)
        processor = {
            "image_processor_type": self.processor,
            "do_normalize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_resize": True,
            "do_pad": True,
            "image_mean": MEAN,
            "image_std": STD,
            "size": {"height": SIZE, "width": SIZE},
            "resample": 3,
        }
        write_json(folder / "preprocessor_config.json", processor)


def _with_batch_norm(module: nn.Module) -> None:
    """Replace the frozen BatchNorm that transformers builds into a DETR by trainable ones, names unchanged."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("FrozenBatchNorm2d"):
            setattr(module, name, nn.BatchNorm2d(child.weight.numel()))  # type: ignore[operator]
        else:
            _with_batch_norm(child)


def _by_group(hidden: Tensor, queries: int) -> Tensor:
    """(B, G*Q, C) as (G*B, Q, C), group-major."""
    return hidden.unflatten(1, (-1, queries)).transpose(0, 1).flatten(0, 1)


class DetrTraining(DetectorTraining):
    """transformers' DetrForObjectDetection."""

    processor = "DetrImageProcessor"
    set_loss = ForObjectDetectionLoss

    def __init__(self, groups: int) -> None:
        super().__init__(DetrForObjectDetection(detr_config()))
        weight = self.model.model.query_position_embeddings.weight
        with torch.no_grad():
            weight.copy_(_grid_positions(self.model.model, self.model.config))
        self._grow_groups(weight.detach(), groups)

    def streams(self, pixels: Tensor) -> _Streams:
        core = self.model.model
        mask = torch.ones(len(pixels), *pixels.shape[-2:], device=pixels.device)
        features, _ = core.backbone(pixels, mask)[-1]
        memory = core.input_projection(features).flatten(2).transpose(1, 2)
        position = core.position_embedding(shape=features.shape, device=pixels.device, dtype=pixels.dtype)
        position = position.flatten(2).transpose(1, 2)
        for layer in core.encoder.layers:
            memory = layer(memory, None, spatial_position_embeddings=position)
        queries, strangers, number = self._queries()
        query_position = queries.expand(len(pixels), -1, -1)
        stream, layers = torch.zeros_like(query_position), []
        for layer in core.decoder.layers:
            stream = layer(stream, strangers, position.expand(len(pixels), -1, -1), query_position, memory)
            layers.append(_by_group(core.decoder.layernorm(stream), number))
        return _Streams(core.decoder.layernorm(memory), (tuple(features.shape[-2:]),), layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.class_labels_classifier(hidden)

    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        return self.model.bbox_predictor(hidden).sigmoid()


class DeformableDetrTraining(DetectorTraining):
    """transformers' DeformableDetrForObjectDetection: focal loss, and boxes relative to a place.

    The place of a query is the reference point that the model makes of its position embedding; a token's place is its
    own. As published (Zhu et al. 2021), sampling offsets and reference points learn at a tenth of the rate.
    """

    processor = "DeformableDetrImageProcessor"
    slow = ("sampling_offsets", "reference_points")
    focal = 2
    set_loss = DeformableDetrForObjectDetectionLoss

    def __init__(self, groups: int) -> None:
        super().__init__(DeformableDetrForObjectDetection(deformable_config()))
        core, config = self.model.model, self.model.config
        side = math.isqrt(config.num_queries)
        position, places = _grid_positions(core, config), _grid_places(((side, side),), torch.device("cpu"))
        start = core.query_position_embeddings.weight  # (Q, 2 * C): position, then content
        with torch.no_grad():
            start[:, : config.d_model] = position
            # The smallest linear map that sends the position of each cell to the cell's centre.
            core.reference_points.weight.copy_(torch.linalg.lstsq(position, places).solution.T)
            core.reference_points.bias.zero_()
            for head in self.model.class_embed:
                head.bias.fill_(-math.log(99))  # one in a hundred (Lin et al. 2017, Focal Loss)
            for head in self.model.bbox_embed:
                head.layers[-1].weight.zero_()
                head.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, -0.5, -0.5]))
        self._grow_groups(start.detach(), groups)

    def streams(self, pixels: Tensor) -> _Streams:
        core, count = self.model.model, len(pixels)
        mask = torch.ones(count, *pixels.shape[-2:], device=pixels.device)
        maps = [project(made) for project, (made, _) in zip(core.input_proj, core.backbone(pixels, mask), strict=True)]
        grids = tuple((made.shape[2], made.shape[3]) for made in maps)
        memory = torch.cat([made.flatten(2).transpose(1, 2) for made in maps], 1)
        codes = [
            core.position_embedding(shape=made[:1].shape, device=pixels.device, dtype=pixels.dtype) for made in maps
        ]
        levels = [c.flatten(2).transpose(1, 2) + level for c, level in zip(codes, core.level_embed, strict=True)]
        position = torch.cat(levels, 1)
        places = _grid_places(grids, pixels.device)
        where: dict[str, Any] = {"spatial_shapes": torch.tensor(grids, device=pixels.device)}
        where["spatial_shapes_list"] = list(grids)
        centres = places.sigmoid()[None, :, None].expand(count, -1, len(grids), -1)
        for layer in core.encoder.layers:
            memory = layer(memory, None, spatial_position_embeddings=position, reference_points=centres, **where)
        queries, strangers, number = self._queries()
        query_position, stream = queries.expand(count, -1, -1).chunk(2, -1)
        query_places = core.reference_points(query_position)
        references = query_places.sigmoid()[:, :, None].expand(-1, -1, len(grids), -1)
        where |= {"encoder_hidden_states": memory, "attention_mask": strangers}
        layers = []
        for layer in core.decoder.layers:
            stream = layer(stream, query_position, references, **where)
            layers.append(_by_group(stream, number))
        return _Streams(memory, grids, layers, places[None], _by_group(query_places, number))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.class_embed[0](hidden)

    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        assert places is not None
        return (self.model.bbox_embed[0](hidden) + F.pad(places, (0, 2))).sigmoid()


def _grid_positions(core: Any, config: Any) -> Tensor:
    """(Q, C): the sine code of the cells of a square grid with as many cells as queries."""
    side = math.isqrt(config.num_queries)
    grid = core.position_embedding(shape=(1, config.d_model, side, side), device="cpu", dtype=torch.float32)
    return grid.flatten(2).transpose(1, 2)[0]


def _grid_places(grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """Centres x, y of the cells of the grids, row-major, as logits: (N, 2)."""
    centres = []
    for height, width in grids:
        y, x = (torch.arange(n, device=device).add(0.5).div(n) for n in (height, width))
        centres.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(centres).logit()
