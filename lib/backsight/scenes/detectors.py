"""How the shipped detectors are built, what they learn from, and how they are saved.

Both learn DETR's set prediction after every decoder layer, and get help that exists during training only and leaves a
stock transformers architecture behind: real BatchNorm in the backbone, three groups of queries (Chen et al. 2022,
Group DETR), a class and box loss on the encoder's tokens through the shared heads, and queries that start on a grid.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    from transformers import DetrConfig, ResNetConfig

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
    from transformers import DeformableDetrConfig, ResNetConfig

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
    """A detector with the loss it is trained by."""

    slow: ClassVar[tuple[str, ...]] = ()
    processor: ClassVar[str]
    model: Any
    other_groups: nn.Parameter  # (groups - 1, Q, …); training only: dropped on saving

    @abstractmethod
    def streams(self, pixels: Tensor) -> _Streams: ...

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor: ...

    @abstractmethod
    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor: ...

    @abstractmethod
    def set_loss(self, logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor: ...

    @abstractmethod
    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of token logits (B, N, …) against classes (B, N), BACKGROUND where there is no object."""

    @abstractmethod
    def outputs(self, pixels: Tensor) -> Predictions: ...

    def loss(self, batch: Batch) -> Tensor:
        streams = self.streams(batch.pixels)
        groups = streams.layers[0].shape[0] // len(batch.pixels)
        labels, boxes = batch.labels.repeat(groups, 1), batch.boxes.repeat(groups, 1, 1)
        total = self._dense(streams, batch)
        for hidden in streams.layers:
            total = total + self.set_loss(self.logits(hidden), self.boxes(hidden, streams.query_places), labels, boxes)
        return total

    def _dense(self, streams: _Streams, batch: Batch) -> Tensor:
        """Each encoder token names the object that covers most of its patch (if a third at least) and its box."""
        one_hot = F.one_hot(batch.objects, MAXIMUM_OBJECTS + 1).float().permute(0, 3, 1, 2)
        shares = torch.cat([F.adaptive_avg_pool2d(one_hot, grid).flatten(2) for grid in streams.grids], 2)
        share, owner = shares.transpose(1, 2)[..., 1:].max(-1)
        covered = share > 1 / 3
        labels = torch.where(covered, batch.labels.gather(1, owner), BACKGROUND)
        class_loss = self.token_loss(self.logits(streams.tokens), labels)
        wanted = batch.boxes.gather(1, owner[..., None].expand(-1, -1, 4))[covered]
        places = streams.token_places
        if places is not None:
            places = places.expand(len(owner), -1, -1)[covered]
        found = self.boxes(streams.tokens[covered], places)
        return class_loss + _box_loss(found, wanted)

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


def _strangers(groups: int, queries: int, device: torch.device) -> Tensor:
    """Additive attention mask (1, 1, G*Q, G*Q): groups of queries do not see each other."""
    group = torch.arange(groups * queries, device=device) // queries
    mask = torch.zeros(1, 1, len(group), len(group), device=device)
    return mask.masked_fill_(group[:, None] != group, torch.finfo(mask.dtype).min)


def _by_group(hidden: Tensor, queries: int) -> Tensor:
    """(B, G*Q, C) as (G*B, Q, C), group-major."""
    return hidden.unflatten(1, (-1, queries)).transpose(0, 1).flatten(0, 1)


class DetrTraining(DetectorTraining):
    """transformers' DetrForObjectDetection."""

    processor = "DetrImageProcessor"

    def __init__(self, groups: int) -> None:
        super().__init__()
        from transformers import DetrForObjectDetection

        self.model = DetrForObjectDetection(detr_config())
        self.model.model.unfreeze_backbone()
        _with_batch_norm(self.model.model.backbone)
        config = self.model.config
        side = round(math.sqrt(config.num_queries))
        core = self.model.model
        grid = core.position_embedding(shape=(1, config.d_model, side, side), device="cpu", dtype=torch.float32)
        start = grid.flatten(2).transpose(1, 2)[0]
        with torch.no_grad():
            core.query_position_embeddings.weight.copy_(start)
        others = start.repeat(groups - 1, 1, 1) + 0.1 * torch.randn(groups - 1, *start.shape)
        self.other_groups = nn.Parameter(others)

    def streams(self, pixels: Tensor) -> _Streams:
        core = self.model.model
        mask = torch.ones(pixels.shape[0], *pixels.shape[-2:], device=pixels.device)
        features, _ = core.backbone(pixels, mask)[-1]
        tokens = core.input_projection(features).flatten(2).transpose(1, 2)
        position = core.position_embedding(shape=features.shape, device=pixels.device, dtype=pixels.dtype)
        position = position.flatten(2).transpose(1, 2)
        memory = tokens
        for layer in core.encoder.layers:
            memory = layer(memory, None, spatial_position_embeddings=position)
        queries = [core.query_position_embeddings.weight, *(self.other_groups if self.training else ())]
        number = len(queries[0])
        strangers = _strangers(len(queries), number, pixels.device)
        query_position = torch.cat(queries).expand(len(pixels), -1, -1)
        stream = torch.zeros_like(query_position)
        layers = []
        for layer in core.decoder.layers:
            stream = layer(stream, strangers, position.expand(len(pixels), -1, -1), query_position, memory)
            layers.append(_by_group(core.decoder.layernorm(stream), number))
        return _Streams(core.decoder.layernorm(memory), (tuple(features.shape[-2:]),), layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.class_labels_classifier(hidden)

    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        return self.model.bbox_predictor(hidden).sigmoid()

    def set_loss(self, logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        """DETR's loss (Carion et al. 2020, eq. 1-2; weights 1, 5, 2; "no object" counts a tenth)."""
        place, thing = _assigned(-logits.detach().softmax(-1), boxes, labels, truth)
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[BACKGROUND] = 0.1
        classes = torch.full(logits.shape[:2], BACKGROUND, device=logits.device)
        classes[place] = labels[thing]
        return F.cross_entropy(logits.transpose(1, 2), classes, weight) + _box_loss(boxes[place], truth[thing])

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def outputs(self, pixels: Tensor) -> Predictions:
        hidden = self.streams(pixels).layers[-1]
        return Predictions(self.logits(hidden), self.boxes(hidden, None))


class DeformableDetrTraining(DetectorTraining):
    """transformers' DeformableDetrForObjectDetection: focal loss, and boxes relative to a place.

    The place of a query is the reference point that the model makes of its position embedding; a token's place is its
    own. As published (Zhu et al. 2021), sampling offsets and reference points learn at a tenth of the rate.
    """

    processor = "DeformableDetrImageProcessor"
    slow = ("sampling_offsets", "reference_points")

    def __init__(self, groups: int) -> None:
        super().__init__()
        from transformers import DeformableDetrForObjectDetection

        self.model = DeformableDetrForObjectDetection(deformable_config())
        core, config = self.model.model, self.model.config
        core.unfreeze_backbone()
        _with_batch_norm(core.backbone)
        side = round(math.sqrt(config.num_queries))
        grid = core.position_embedding(shape=(1, config.d_model, side, side), device="cpu", dtype=torch.float32)
        position = grid.flatten(2).transpose(1, 2)[0]
        places = _grid_places(((side, side),), torch.device("cpu"))
        with torch.no_grad():
            start = core.query_position_embeddings.weight  # (Q, 2 * C): position, then content
            start[:, : config.d_model] = position
            # The smallest linear map that sends the position of each cell to the cell's centre.
            core.reference_points.weight.copy_(torch.linalg.lstsq(position, places).solution.T)
            core.reference_points.bias.zero_()
            for head in self.model.class_embed:
                head.bias.fill_(-math.log(99))  # one in a hundred (Lin et al. 2017, Focal Loss)
            for head in self.model.bbox_embed:
                head.layers[-1].weight.zero_()
                head.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, -0.5, -0.5]))
            others = start.repeat(groups - 1, 1, 1) + 0.1 * torch.randn(groups - 1, *start.shape)
        self.other_groups = nn.Parameter(others)

    def streams(self, pixels: Tensor) -> _Streams:
        core, count = self.model.model, len(pixels)
        mask = torch.ones(count, *pixels.shape[-2:], device=pixels.device)
        maps = [project(each) for project, (each, _) in zip(core.input_proj, core.backbone(pixels, mask), strict=True)]
        grids = tuple((each.shape[2], each.shape[3]) for each in maps)
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
        positions = []
        for each, level in zip(maps, core.level_embed, strict=True):
            code = core.position_embedding(shape=each[:1].shape, device=pixels.device, dtype=pixels.dtype)
            positions.append(code.flatten(2).transpose(1, 2) + level)
        places = _grid_places(grids, pixels.device)
        shapes = torch.tensor(grids, device=pixels.device)
        where = {"spatial_shapes": shapes, "spatial_shapes_list": list(grids)}
        centres = places.sigmoid()[None, :, None].expand(count, -1, len(grids), -1)
        memory = tokens
        for layer in core.encoder.layers:
            memory = layer(
                memory,
                None,
                spatial_position_embeddings=torch.cat(positions, 1),
                reference_points=centres,
                **where,
            )
        queries = [core.query_position_embeddings.weight, *(self.other_groups if self.training else ())]
        number = len(queries[0])
        strangers = _strangers(len(queries), number, pixels.device)
        query_position, content = torch.cat(queries).expand(count, -1, -1).chunk(2, -1)
        query_places = core.reference_points(query_position)
        references = query_places.sigmoid()[:, :, None].expand(-1, -1, len(grids), -1)
        stream, layers = content, []
        for layer in core.decoder.layers:
            stream = layer(
                stream,
                query_position,
                references,
                encoder_hidden_states=memory,
                attention_mask=strangers,
                **where,
            )
            layers.append(_by_group(stream, number))
        return _Streams(memory, grids, layers, places[None], _by_group(query_places, number))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.class_embed[0](hidden)

    def boxes(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        assert places is not None
        return (self.model.bbox_embed[0](hidden) + F.pad(places, (0, 2))).sigmoid()

    def set_loss(self, logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        """Deformable DETR's loss: DETR's with a focal loss of weight 2 on the classes (Zhu et al. 2021)."""
        chance = logits.detach()
        cost = _focal(chance, torch.ones_like(chance)) - _focal(chance, torch.zeros_like(chance))
        place, thing = _assigned(2 * cost, boxes, labels, truth)
        classes = torch.full(logits.shape[:2], BACKGROUND, device=logits.device)
        classes[place] = labels[thing]
        return self.token_loss(logits, classes) + _box_loss(boxes[place], truth[thing])

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        wanted = F.one_hot(labels, BACKGROUND + 1)[..., :BACKGROUND].to(logits.dtype)
        return 2 * _focal(logits, wanted).sum() / wanted.sum().clamp(min=1)

    def outputs(self, pixels: Tensor) -> Predictions:
        streams = self.streams(pixels)
        hidden = streams.layers[-1]
        return Predictions(self.logits(hidden), self.boxes(hidden, streams.query_places), "sigmoid")


def _grid_places(grids: tuple[Grid, ...], device: torch.device) -> Tensor:
    """Centres x, y of the cells of the grids, row-major, as logits: (N, 2)."""
    centres = []
    for height, width in grids:
        y, x = (torch.arange(n, device=device).add(0.5).div(n) for n in (height, width))
        centres.append(torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1))
    return torch.cat(centres).logit()


def _corners(boxes: Tensor) -> Tensor:
    centre, extent = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - extent / 2, centre + extent / 2], -1)


def _generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise generalised IoU of (..., 4) boxes cx, cy, w, h. Source: Rezatofighi et al. 2019."""
    a, b = _corners(a), _corners(b)
    area_a = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a + area_b - inner
    return inner / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def _box_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """DETR's loss of boxes (M, 4) against theirs, weights 5 and 2."""
    return (5 * (found - wanted).abs().sum(-1) + 2 * (1 - _generalised_iou(found, wanted))).mean()


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Elementwise focal loss with alpha 0.25 and gamma 2 (Lin et al. 2017)."""
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    chance = logits.sigmoid()
    miss = torch.where(wanted > 0.5, 1 - chance, chance)
    return torch.where(wanted > 0.5, 0.25, 0.75) * miss.square() * loss


Places = tuple[Tensor, Tensor]


@torch.no_grad()
def _assigned(class_costs: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> tuple[Places, Places]:
    """The cheapest one-to-one assignment of queries to objects, image by image.

    class_costs: (B, Q, classes); boxes: (B, Q, 4); labels: (B, 4), -1 = none; truth: (B, 4, 4).
    Returns (image, query) and (image, object) of each pair.
    """
    from scipy.optimize import linear_sum_assignment

    wanted = labels.clamp(min=0)[:, None].expand(-1, boxes.shape[1], -1)
    cost = class_costs.gather(2, wanted)
    pairs = (
        boxes[:, :, None].expand(-1, -1, truth.shape[1], -1),
        truth[:, None].expand(-1, boxes.shape[1], -1, -1),
    )
    cost = cost + 5 * (pairs[0] - pairs[1]).abs().sum(-1) - 2 * _generalised_iou(*pairs)
    matrices = cost.cpu().numpy()
    images, queries, objects = [], [], []
    for image, number in enumerate((labels >= 0).sum(1).tolist()):
        rows, columns = linear_sum_assignment(matrices[image, :, :number])
        images += [image] * number
        queries += rows.tolist()
        objects += columns.tolist()
    picture, query, thing = (torch.tensor(v, device=boxes.device) for v in (images, queries, objects))
    return (picture, query), (picture, thing)
