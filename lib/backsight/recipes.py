"""How the shipped targets `scenes-vit` and `scenes-detr` are trained: data, losses, schedule, scores, model card.

Both see the training photographs only. Beside the task's own loss each gets help that exists during training only and
leaves a stock architecture behind:

- ViT: every patch token also predicts which share of its patch each class covers (with the final norm, a linear head).
- DETR: real BatchNorm in the backbone, an auxiliary loss after every decoder layer, three groups of queries (Chen et
  al. 2022, Group DETR), a class and box loss on the encoder's tokens through the shared heads, and query positions
  that start on a grid.

Matrices of the transformer blocks are trained by Muon, the rest by AdamW, with warm-up and cosine decay.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.runs import write_atomically, write_json
from backsight.scenes import CLASS_NAMES, CLASSES, SPLIT_PHOTOGRAPHS, SceneOptions, render_many

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SIZE = 64
MAXIMUM_OBJECTS = 4
BACKGROUND = len(CLASSES)

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


@dataclass(frozen=True)
class Recipe:
    """Every number that training a shipped target depends on.

    schedule: steps over which the rates would fall to zero (cosine); 0: `steps`. The shipped targets stop half-way
    down: their validation scores had long passed what they are for.
    """

    target: Literal["scenes-vit", "scenes-detr"]
    steps: int
    schedule: int = 0
    batch: int = 128
    images: int = 120_000
    seed: int = 0
    muon_rate: float = 2e-3
    rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200
    query_groups: int = 3
    evaluate_every: int = 500
    evaluate_images: int = 1000

    def changed(self, steps: int = 0, seed: int | None = None) -> "Recipe":
        """The recipe with another number of steps (0: its own) or another seed."""
        schedule = 0 if steps else self.schedule
        return replace(self, steps=steps or self.steps, schedule=schedule, seed=self.seed if seed is None else seed)


RECIPES: dict[str, Recipe] = {
    "scenes-vit": Recipe("scenes-vit", steps=3500, schedule=7000, batch=64, images=64_000, evaluate_every=250),
    "scenes-detr": Recipe("scenes-detr", steps=2000, schedule=4400, batch=64, images=48_000, evaluate_every=250),
}


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class SceneArrays:
    """A split as arrays. images: (N, H, W, 3) uint8; objects: (N, H, W) uint8, 0 = background, k = k-th object;
    labels: (N, 4) int64, -1 = no object; boxes: (N, 4, 4) float32 centre x, centre y, width, height in [0, 1]."""

    images: np.ndarray
    objects: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def _render_chunk(split: str, start: int, count: int, seed: int, rule: str) -> SceneArrays:
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    objects = np.zeros((count, SIZE, SIZE), np.uint8)
    labels = np.full((count, MAXIMUM_OBJECTS), -1, np.int64)
    boxes = np.zeros((count, MAXIMUM_OBJECTS, 4), np.float32)
    options = SceneOptions(rule=rule)  # type: ignore[arg-type]
    for i, scene in enumerate(render_many(split, count, seed, SIZE, options, start)):
        images[i] = scene.image
        number = len(scene.labels)
        labels[i, :number] = scene.labels
        x, y, width, height = scene.boxes.T / SIZE
        boxes[i, :number] = np.stack([x + width / 2, y + height / 2, width, height], 1)
        for k, mask in enumerate(scene.masks):
            objects[i][mask] = k + 1
    return SceneArrays(images, objects, labels, boxes)


def scene_arrays(split: str, count: int, seed: int = 0, rule: str = "mixed", processes: int = 1) -> SceneArrays:
    """Render a split into memory, 16 KB an image, on several processes."""
    if processes <= 1:
        return _render_chunk(split, 0, count, seed, rule)
    from concurrent.futures import ProcessPoolExecutor

    starts = list(range(0, count, 2000))
    sizes = [min(2000, count - start) for start in starts]
    with ProcessPoolExecutor(processes) as pool:
        many = len(starts)
        chunks = pool.map(_render_chunk, [split] * many, starts, sizes, [seed] * many, [rule] * many)
        parts = list(chunks)
    fields = ("images", "objects", "labels", "boxes")
    return SceneArrays(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # (B, 3, H, W) normalised
    objects: Tensor  # (B, H, W) int64
    labels: Tensor  # (B, 4) int64, -1 = none
    boxes: Tensor  # (B, 4, 4)


def _batch(data: SceneArrays, chosen: np.ndarray, device: str) -> Batch:
    images = torch.from_numpy(data.images[chosen]).to(device).permute(0, 3, 1, 2).float() / 255
    pixels = (images - torch.tensor(MEAN, device=device)[:, None, None]) / torch.tensor(STD, device=device)[
        :, None, None
    ]
    objects = torch.from_numpy(data.objects[chosen]).to(device).long()
    return Batch(
        pixels.contiguous(),
        objects,
        torch.from_numpy(data.labels[chosen]).to(device),
        torch.from_numpy(data.boxes[chosen]).to(device),
    )


def _order(count: int, batch: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless shuffled batches; batch k is a function of (seed, k) only."""
    per_epoch = count // batch
    step = start
    while True:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        for k in range(place, per_epoch):
            yield order[k * batch : (k + 1) * batch]
            step += 1


def _patch_shares(batch: Batch, patch: int) -> Tensor:
    """Share of each patch that each class (and the background, last) covers: (B, N, classes + 1)."""
    lookup = torch.cat([torch.full_like(batch.labels[:, :1], BACKGROUND), batch.labels], 1)
    classes = lookup.gather(1, batch.objects.flatten(1)).view_as(batch.objects)
    one_hot = F.one_hot(classes, BACKGROUND + 1).float().permute(0, 3, 1, 2)
    return F.avg_pool2d(one_hot, patch).flatten(2).transpose(1, 2)


# -------------------------------------------------------------------------------------------------------------- ViT


def build_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**VIT_ARGUMENTS)


class _VitTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = build_vit()
        self.patch_head = nn.Linear(VIT_ARGUMENTS["embed_dim"], BACKGROUND + 1)

    def loss(self, batch: Batch) -> Tensor:
        tokens = self.model.forward_features(batch.pixels)  # type: ignore[operator]
        logits = self.model.forward_head(tokens)  # type: ignore[operator]
        shares = _patch_shares(batch, VIT_ARGUMENTS["patch_size"])
        patches = F.log_softmax(self.patch_head(tokens[:, 1:]), -1)
        return F.cross_entropy(logits, batch.labels[:, 0]) - (shares * patches).sum(-1).mean()


# ------------------------------------------------------------------------------------------------------------- DETR


def detr_config() -> Any:
    from transformers import DetrConfig, ResNetConfig

    backbone = ResNetConfig(  # type: ignore[call-arg]
        embedding_size=64,
        hidden_sizes=[64, 128],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    return DetrConfig(
        backbone_config=backbone,
        num_queries=16,
        d_model=128,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        position_embedding_type="sine",
        # transformers 5.23 feeds the *normalised* stream to the next decoder layer when auxiliary_loss is set; the
        # auxiliary loss is therefore computed here, and the shipped model stays the published DETR.
        auxiliary_loss=False,
        id2label=dict(enumerate(CLASS_NAMES)),
        label2id={name: i for i, name in enumerate(CLASS_NAMES)},
    )


def _with_batch_norm(module: nn.Module) -> None:
    """Replace the frozen BatchNorm that transformers builds into DETR by trainable ones, names unchanged."""
    for name, child in module.named_children():
        if type(child).__name__ == "DetrFrozenBatchNorm2d":
            setattr(module, name, nn.BatchNorm2d(child.weight.numel()))  # type: ignore[operator]
        else:
            _with_batch_norm(child)


class _DetrTraining(nn.Module):
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
        self.other_groups = nn.Parameter(others)  # training only: dropped on saving

    def hidden(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encoder tokens (B, N, C) and the normalised output of each decoder layer (G*B, Q, C), group-major."""
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
        query_position = torch.cat(queries).expand(len(pixels), -1, -1)
        number, count = len(queries[0]), query_position.shape[1]
        group = torch.arange(count, device=pixels.device) // number
        strangers = torch.zeros(1, 1, count, count, device=pixels.device)  # groups do not see each other
        strangers.masked_fill_(group[:, None] != group, torch.finfo(strangers.dtype).min)
        stream = torch.zeros_like(query_position)
        outputs = []
        for layer in core.decoder.layers:
            stream = layer(stream, strangers, position.expand(len(pixels), -1, -1), query_position, memory)
            normed = core.decoder.layernorm(stream)
            outputs.append(normed.unflatten(1, (-1, number)).transpose(0, 1).flatten(0, 1))
        return memory, outputs

    def loss(self, batch: Batch) -> Tensor:
        memory, outputs = self.hidden(batch.pixels)
        groups = outputs[0].shape[0] // len(batch.pixels)
        labels, boxes = batch.labels.repeat(groups, 1), batch.boxes.repeat(groups, 1, 1)
        total = self._dense(memory, batch)
        for hidden in outputs:
            total = total + _set_loss(self._logits(hidden), self._boxes(hidden), labels, boxes)
        return total

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.class_labels_classifier(hidden)

    def _boxes(self, hidden: Tensor) -> Tensor:
        return self.model.bbox_predictor(hidden).sigmoid()

    def _dense(self, memory: Tensor, batch: Batch) -> Tensor:
        """Each encoder token names the object that covers most of its patch (if a third at least) and its box."""
        patch = round(math.sqrt(batch.objects[0].numel() / memory.shape[1]))
        one_hot = F.one_hot(batch.objects, MAXIMUM_OBJECTS + 1).float().permute(0, 3, 1, 2)
        shares = F.avg_pool2d(one_hot, patch).flatten(2).transpose(1, 2)[..., 1:]
        share, owner = shares.max(-1)
        covered = share > 1 / 3
        labels = torch.where(covered, batch.labels.gather(1, owner), BACKGROUND)
        normed = self.model.model.decoder.layernorm(memory)
        class_loss = F.cross_entropy(self._logits(normed).flatten(0, 1), labels.flatten())
        wanted = batch.boxes.gather(1, owner[..., None].expand(-1, -1, 4))[covered]
        found = self._boxes(normed[covered])
        box_loss = 5 * (found - wanted).abs().sum(-1) + 2 * (1 - _generalised_iou(found, wanted))
        return class_loss + box_loss.mean()


Training = _VitTraining | _DetrTraining


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


def _set_loss(logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """DETR's set prediction loss (Carion et al. 2020, eq. 1-2; weights 1, 5, 2; "no object" counts a tenth)."""
    from scipy.optimize import linear_sum_assignment

    present = labels >= 0
    with torch.no_grad():
        chance = logits.softmax(-1)
        wanted = labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
        cost = -chance.gather(2, wanted)
        pairs = (
            boxes[:, :, None].expand(-1, -1, truth.shape[1], -1),
            truth[:, None].expand(-1, boxes.shape[1], -1, -1),
        )
        cost = cost + 5 * (pairs[0] - pairs[1]).abs().sum(-1) - 2 * _generalised_iou(*pairs)
        numbers = present.sum(1).tolist()
        matrices = cost.cpu().numpy()
        images, queries, objects = [], [], []
        for image, number in enumerate(numbers):
            rows, columns = linear_sum_assignment(matrices[image, :, :number])
            images += [image] * number
            queries += rows.tolist()
            objects += columns.tolist()
    picture, query, thing = (torch.tensor(v, device=logits.device) for v in (images, queries, objects))
    classes = torch.full(logits.shape[:2], BACKGROUND, device=logits.device)
    classes[picture, query] = labels[picture, thing]
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[BACKGROUND] = 0.1
    class_loss = F.cross_entropy(logits.transpose(1, 2), classes, weight)
    found, goal = boxes[picture, query], truth[picture, thing]
    return class_loss + (5 * (found - goal).abs().sum(-1) + 2 * (1 - _generalised_iou(found, goal))).mean()


# --------------------------------------------------------------------------------------------------------- training


def _optimisers(training: Training, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices, others, plain = [], [], []
    for name, parameter in training.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 2 and (".blocks." in name or ".layers." in name) and "bbox" not in name:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and "embed" not in name and "token" not in name and "group" not in name:
            others.append(parameter)
        else:
            plain.append(parameter)
    groups = [{"params": others, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98)),
    ]


def train_target(
    recipe: Recipe, folder: str | Path, device: str = "cpu", processes: int = 1, progress: bool = True
) -> Path:
    """Train a shipped target from nothing and write its weights, configuration and model card into `folder`.

    Raises BacksightError when the loss is no longer a number, with the step. The curve of the validation score goes
    into `curve.csv`.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    if recipe.target not in RECIPES:
        raise BacksightError(f"no recipe for {recipe.target!r}; there are recipes for {', '.join(RECIPES)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    data = scene_arrays("train", recipe.images, recipe.seed, processes=processes)
    validation = scene_arrays("validation", recipe.evaluate_images, recipe.seed, processes=processes)
    rendered = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        training = _VitTraining() if recipe.target == "scenes-vit" else _DetrTraining(recipe.query_groups)
    training.to(device).train()
    optimisers = _optimisers(training, recipe)
    rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    curve: list[dict[str, float]] = []
    bar = tqdm(range(recipe.steps), recipe.target, leave=False, disable=not progress)
    batches = _order(len(data), recipe.batch, recipe.seed)
    running = 0.0
    for step in bar:
        factor = (
            min(1.0, (step + 1) / recipe.warmup)
            * 0.5
            * (1 + math.cos(math.pi * step / (recipe.schedule or recipe.steps)))
        )
        for optimiser, starts in zip(optimisers, rates, strict=True):
            for group, start in zip(optimiser.param_groups, starts, strict=True):
                group["lr"] = start * factor
        loss = training.loss(_batch(data, next(batches), device))
        if not torch.isfinite(loss):
            raise BacksightError(f"the loss of {recipe.target} is {loss.item()} at step {step}: lower the rates")
        loss.backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
            score = evaluate(training, validation, device)
            curve.append({"step": step + 1, "seconds": time.monotonic() - began, "loss": running, **score})
            pd.DataFrame(curve).to_csv(folder / "curve.csv", index=False)
            if progress:
                tqdm.write(json.dumps(curve[-1]))
            training.train()
            _save(training, folder)
    minutes = {"rendering": (rendered - began) / 60, "training": (time.monotonic() - rendered) / 60}
    write_card(recipe, training, folder, minutes, device, processes)
    return folder


def _save(training: Training, folder: Path) -> None:
    from safetensors.torch import save_file

    model = training.model
    if isinstance(training, _VitTraining):
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        description = {
            "architecture": "VisionTransformer",
            "arguments": VIT_ARGUMENTS,
            "classes": list(CLASS_NAMES),
            "mean": MEAN,
            "std": STD,
            "input_size": [3, SIZE, SIZE],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        return
    from transformers import DetrForObjectDetection

    stock = DetrForObjectDetection(detr_config())
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    stock.load_state_dict(weights)
    stock.save_pretrained(folder)
    processor = {
        "image_processor_type": "DetrImageProcessor",
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
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(training: Training, data: SceneArrays, device: str = "cpu", batch: int = 250) -> dict[str, float]:
    """Scores of a model in training on a split: top-1 for the ViT; AP50 and AP (COCO, 0.5:0.95) for the DETR."""
    training.eval()
    chunks = [np.arange(i, min(i + batch, len(data))) for i in range(0, len(data), batch)]
    if isinstance(training, _VitTraining):
        right = 0
        for chosen in chunks:
            given = _batch(data, chosen, device)
            right += int((training.model(given.pixels).argmax(1) == given.labels[:, 0]).sum())
        return {"top1": right / len(data)}
    logits, boxes = [], []
    for chosen in chunks:
        hidden = training.hidden(_batch(data, chosen, device).pixels)[1][-1]
        logits.append(training._logits(hidden).cpu())
        boxes.append(training._boxes(hidden).cpu())
    return average_precision(torch.cat(logits), torch.cat(boxes), data)[0]


def average_precision(
    logits: Tensor, boxes: Tensor, data: SceneArrays
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """COCO average precision of predicted sets, and the same per class.

    logits: (N, Q, K + 1), the last one "no object"; boxes: (N, Q, 4) centre x, centre y, width, height in [0, 1].
    Source: pycocotools.COCOeval.
    """
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image in range(len(data)):
        for label, (x, y, w, h) in zip(data.labels[image], (data.boxes[image] * SIZE).tolist(), strict=True):
            if label >= 0:
                box = [x - w / 2, y - h / 2, w, h]
                truth.append({"id": len(truth) + 1, "image_id": image, "category_id": int(label), "bbox": box})
                truth[-1] |= {"area": w * h, "iscrowd": 0}
    scores, classes = logits.softmax(-1)[..., :-1].max(-1)
    corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]], -1) * SIZE
    for image in range(len(data)):
        for score, label, box in zip(
            scores[image].tolist(), classes[image].tolist(), corners[image].tolist(), strict=True
        ):
            found.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(len(data))],
            "annotations": truth,
            "categories": [{"id": i, "name": n} for i, n in enumerate(CLASS_NAMES)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (IoU thresholds, recall levels, classes)
    precision = np.where(precision < 0, np.nan, precision)
    per_class = {
        name: {"ap": float(np.nanmean(precision[:, :, i])), "ap50": float(np.nanmean(precision[0, :, i]))}
        for i, name in enumerate(CLASS_NAMES)
    }
    return {"ap50": float(evaluation.stats[1]), "ap": float(evaluation.stats[0])}, per_class


def write_card(
    recipe: Recipe, training: Training, folder: Path, minutes: dict[str, float], device: str, processes: int
) -> None:
    """The model card's facts about the training; `score_target` adds the scores on the test split."""
    card = {
        "target": recipe.target,
        "data": {"dataset": "scenes", "split": "train", "photographs": SPLIT_PHOTOGRAPHS["train"], "rule": "mixed"},
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "minutes": {name: round(value, 1) for name, value in minutes.items()},
        "device": device,
        "processes": processes,
        "torch": torch.__version__,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


@torch.no_grad()
def score_target(target: Any, count: int = 5000, seed: int = 0, split: str = "test", batch: int = 250) -> Any:
    """Scores of a target on unseen photographs, with the canonical colours and with uniformly random object hues.

    target: a `scenes` classifier (top-1 of the dominant object) or detector (AP50, AP by COCO's rules).
    Returns a table: rule, measure, classes ("all", "canonical", "colour-free" or one class), value, low, high, n.
    Intervals of top-1 are Wilson's 95 %; those of AP come from the spread over ten disjoint blocks of images.
    Raises BacksightError when the target does not know the classes of `scenes`.
    """
    import pandas as pd

    if target.classes is None or tuple(target.classes)[: len(CLASSES)] != CLASS_NAMES:
        raise BacksightError(f"{target.name} does not know the classes of scenes: score it on its own data set")
    if count < 500:
        raise BacksightError(f"{count} images are too few for an interval: score on 500 or more")
    free = {kind.name for kind in CLASSES if kind.hue is None}
    rows: list[dict[str, Any]] = []
    for rule in ("mixed", "uniform"):
        data = scene_arrays(split, count, seed, rule)
        outputs = []
        for start in range(0, count, batch):
            images = torch.from_numpy(data.images[start : start + batch]).permute(0, 3, 1, 2).float() / 255
            outputs.append(target(images))
        if target.kind == "classifier":
            hits = torch.cat(outputs).argmax(1).numpy() == data.labels[:, 0]
            names = np.array(CLASS_NAMES)[data.labels[:, 0]]
            colour_free = np.isin(names, list(free))
            groups = {"all": np.ones(count, bool), "canonical": ~colour_free, "colour-free": colour_free}
            groups |= {name: names == name for name in CLASS_NAMES}
            for group, chosen in groups.items():
                low, high = _wilson(int(hits[chosen].sum()), int(chosen.sum()))
                scores = {"value": float(hits[chosen].mean()), "low": low, "high": high, "n": int(chosen.sum())}
                rows.append({"rule": rule, "measure": "top1", "classes": group, **scores})
            continue
        logits, boxes = torch.cat([o.logits for o in outputs]), torch.cat([o.boxes for o in outputs])
        blocks = [np.arange(start, count, 10) for start in range(10)]
        everything = _groups(*average_precision(logits, boxes, data), free)
        parts = [_groups(*average_precision(logits[b], boxes[b], _chosen(data, b)), free) for b in blocks]
        for (measure, group), value in everything.items():
            spread = 1.96 * float(np.nanstd([part[measure, group] for part in parts], ddof=1)) / math.sqrt(len(parts))
            interval = {"value": value, "low": value - spread, "high": value + spread, "n": count}
            rows.append({"rule": rule, "measure": measure, "classes": group, **interval})
    return pd.DataFrame(rows)


def _groups(
    whole: dict[str, float], per_class: dict[str, dict[str, float]], free: set[str]
) -> dict[tuple[str, str], float]:
    """{(measure, classes): score} for all classes, the canonical and the colour-free ones, and each class."""
    groups = {"canonical": [name for name in per_class if name not in free], "colour-free": sorted(free)}
    groups |= {name: [name] for name in per_class}
    scores: dict[tuple[str, str], float] = {}
    for measure in ("ap50", "ap"):
        scores[measure, "all"] = whole[measure]
        for group, names in groups.items():
            scores[measure, group] = float(np.mean([per_class[name][measure] for name in names]))
    return scores


def _chosen(data: SceneArrays, which: np.ndarray) -> SceneArrays:
    return SceneArrays(data.images[which], data.objects[which], data.labels[which], data.boxes[which])


def _wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z = 1.96
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def add_scores(card_file: Path, scores: Any, count: int, save: bool) -> dict[str, Any]:
    """The model card with the table of `score_target` in it; save: also write it, and the card in words beside it."""
    card = json.loads(card_file.read_text())
    records = json.loads(scores.to_json(orient="records", double_precision=4))
    card |= {"scores": records, "scored_on": {"dataset": "scenes", "split": "test", "images": count}}
    if save:
        write_json(card_file, card)
        write_atomically(card_file.with_name("README.md"), lambda path: path.write_text(card_text(card)))
    return card


def card_text(card: dict[str, Any]) -> str:
    """The model card in Markdown: what it is, what it was trained on, its scores, and the command that remakes it."""
    recipe, minutes, data = card["recipe"], card["minutes"], card["data"]
    name = card["target"]
    what = {
        "scenes-vit": "a timm `VisionTransformer` that names the dominant object of a scene",
        "scenes-detr": "a transformers `DetrForObjectDetection` that detects all objects of a scene",
    }[name]
    lines = [
        f"# {name}",
        "",
        f"{name} is {what}: {card['parameters']:,} parameters, {SIZE} x {SIZE} pixels, {len(CLASSES)} classes.",
        "Trained by the backsight authors on the project's own procedural data; same licence as the project.",
        "",
        f"- **Data**: {recipe['images']:,} `scenes` of the training split (seed {recipe['seed']}, colour rule "
        f'"{data["rule"]}"), on crops of {", ".join(data["photographs"])}.',
        f"- **Training**: {recipe['steps']:,} steps of {recipe['batch']} images, seed {recipe['seed']}, "
        f"{minutes['training']} minutes on {card['device']} (one thread of two busy cores), torch {card['torch']}.",
        f"- **Scores**: test split, photographs {', '.join(SPLIT_PHOTOGRAPHS['test'])}, "
        f"{card['scored_on']['images']:,} scenes for each colour rule; 95 % intervals in brackets.",
        f"- **Remake**: `backsight run notebooks/01_targets.ipynb -p retrain={name}`",
        "",
        "| measure | classes | usual hues | random hues |",
        "| --- | --- | --- | --- |",
    ]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in card["scores"]:
        text = f"{row['value']:.3f}"
        if row.get("low") is not None:
            text += f" [{row['low']:.3f}, {row['high']:.3f}]"
        table.setdefault((row["measure"], row["classes"]), {})[row["rule"]] = text
    lines += [f"| {m} | {c} | {cell['mixed']} | {cell['uniform']} |" for (m, c), cell in table.items()]
    return "\n".join(lines) + "\n"
