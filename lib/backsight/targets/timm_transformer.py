"""ViT and DeiT: every model of timm's VisionTransformer class.

    pixels ─► patch_embed ─► blocks.0.attn ─► blocks.0 ─► … ─► norm ─► head
              (+ position,   (half-step:      (after
               + prefix)      after attention) the MLP)

`patch_embed` is what enters the first block: patch embedding with position, class and register tokens, and the
norm that CLIP-like models put before the blocks. `norm` is a tap only where the final norm acts on the tokens
(models that pool first normalise the pooled vector instead).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Representation, Tokens
from backsight.targets import sources
from backsight.targets.base import (
    PIXELS,
    Family,
    Preprocessing,
    Site,
    Size,
    Stage,
    Target,
    seeded,
)
from backsight.targets.sources import HUB_PREFIXES, Source

# Modules of timm whose models are VisionTransformers, and why some neighbours are not taken.
TIMM_MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid")
REFUSED_MODULES = {
    "naflexvit": "NaFlex models pack patches of varying grids into one sequence, so their tokens have no fixed grid",
}

# Listed by `backsight targets`; any other name of TIMM_MODULES works too.
LISTED = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch8_224",
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_base_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2",
)


class TimmTransformer(Target):
    """A timm VisionTransformer. Its output is logits (B, K), or pooled features where it has no head."""

    kind = "classifier"
    model: Any

    def __init__(
        self,
        model: nn.Module,
        name: str,
        weights: str,
        preprocessing: Preprocessing | None = None,
        classes: Sequence[str] | None = None,
        taps: str | Sequence[str] = "blocks",
    ) -> None:
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(model, VisionTransformer):
            raise BacksightError(
                f"{name} is a {type(model).__name__}, not one of timm's VisionTransformers: "
                "use module_target() for other models."
            )
        super().__init__(model, name, preprocessing or _preprocessing(model), weights, classes, taps)

    @property
    def available_taps(self) -> tuple[str, ...]:
        return self._taps_with(halves=self._half_step_refusal() is None)

    def _taps_with(self, halves: bool) -> tuple[str, ...]:
        taps = ["patch_embed"]
        for index in range(len(self.model.blocks)):
            taps += [f"blocks.{index}.attn", f"blocks.{index}"] if halves else [f"blocks.{index}"]
        return (*taps, *(() if isinstance(self.model.norm, nn.Identity) else ("norm",)))

    def _half_step_refusal(self) -> str | None:
        for index, block in enumerate(self.model.blocks):
            if _half_step(block) is None:
                return (
                    f"blocks.{index} of {self.name} is a {type(block).__name__}, in which attention and MLP do not "
                    "follow one another: there is no state between them"
                )
        return None

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            return ("patch_embed", f"blocks.{len(self.model.blocks) - 1}")
        if name == "fine" and (reason := self._half_step_refusal()):
            raise BacksightError(f'{reason}, so use taps="blocks".')
        return self._taps_with(halves=name == "fine")

    def _unknown_tap(self, tap: str) -> str:
        if tap.endswith(".attn") and (reason := self._half_step_refusal()):
            return f"{reason}, so {tap!r} is not a tap."
        return super()._unknown_tap(tap)

    @property
    def reduction(self) -> Size:
        embedding = self.model.patch_embed
        return embedding.img_size[0] // embedding.grid_size[0], embedding.img_size[1] // embedding.grid_size[1]

    def check_size(self, size: Size) -> None:
        if not self.model.dynamic_img_size:
            if tuple(size) != tuple(self.model.patch_embed.img_size):
                raise BacksightError(
                    f"{self.name} takes images of exactly {tuple(self.model.patch_embed.img_size)} "
                    f"(height, width), not {tuple(size)}."
                )
            return
        down, across = self.reduction
        if size[0] < down or size[1] < across or size[0] % down or size[1] % across:
            raise BacksightError(
                f"{self.name} takes images whose height is a multiple of {down} and whose width is a multiple of "
                f"{across}, not {tuple(size)}."
            )

    def stage(self, tap: str, previous: str) -> Stage:
        self._refuse_order(tap, previous)
        order = self._taps_with(halves=True)
        start = -1 if previous == PIXELS else order.index(previous)
        steps = order[start + 1 : order.index(tap) + 1]
        depth = math.ceil(sum(step.startswith("blocks.") for step in steps) / 2)
        heads, hidden = _block_sizes(self.model.blocks[0], self.model.embed_dim)
        if previous == PIXELS:
            return Stage("patch_embedding", depth, heads, hidden)
        return Stage("blocks" if depth else "norm", depth, heads, hidden)

    def _sites(self, taps: Sequence[str]) -> dict[str, Site]:
        return {tap: self._site(tap) for tap in taps}

    def _site(self, tap: str) -> Site:
        if tap == "patch_embed":
            return Site(self.model.blocks[0], "input")
        if tap == "norm":
            return Site(self.model.norm)
        block = self.model.blocks[_block_index(tap)]
        if not tap.endswith(".attn"):
            return Site(block)
        half = _half_step(block)
        assert half is not None
        return Site(half[0], "input")

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        height, width = images.shape[2:]
        down, across = self.reduction
        grid = (height // down, width // across)
        return {tap: Tokens(seen[tap], (grid,), self.model.num_prefix_tokens) for tap in taps}

    def _forward(self, images: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None and bool(padding.any()):
            raise BacksightError(
                f"{self.name} has no attention mask, so padded pixels would count as picture: "
                "crop or stretch the images instead of padding them."
            )
        return self.model(images)

    def _rest(self, tap: str, representation: Any) -> Tensor:
        if not isinstance(representation, Tokens) or representation.channels != self.model.embed_dim:
            raise BacksightError(
                f"{tap} of {self.name} holds tokens of {self.model.embed_dim} channels, "
                f"not a representation {representation.signature}."
            )
        if representation.prefix != self.model.num_prefix_tokens:
            raise BacksightError(
                f"{tap} of {self.name} has {self.model.num_prefix_tokens} prefix tokens, not {representation.prefix}."
            )
        values = representation.values
        if tap == "norm":
            return self.model.forward_head(values)
        following = 0
        if tap != "patch_embed":
            following = _block_index(tap) + 1
            if tap.endswith(".attn"):
                half = _half_step(self.model.blocks[_block_index(tap)])
                assert half is not None
                values = half[1](values)
        for block in self.model.blocks[following:]:
            values = block(values)
        return self.model.forward_head(self.model.norm(values))

    def _randomised(self) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.init_weights(needs_reset=True)
        return model


def _block_index(tap: str) -> int:
    return int(tap.split(".")[1])


def _half_step(block: Any) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
    """(module whose input is the residual stream after attention, the rest of the block), None if there is none."""
    from timm.models import vision_transformer as vit

    if isinstance(block, vit.Block):
        return block.norm2, lambda x: x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    if isinstance(block, vit.ResPostBlock):
        return block.mlp, lambda x: x + block.drop_path2(block.norm2(block.mlp(x)))
    if isinstance(block, vit.ParallelThingsBlock):
        return block.ffns[0], lambda x: x + torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)
    return None


def _block_sizes(block: Any, width: int) -> tuple[int, int]:
    """(attention heads, MLP width) of a block."""
    if hasattr(block, "in_split"):  # the parallel blocks keep [MLP, query, key, value] widths
        return int(block.num_heads), int(block.in_split[0])
    attention = block.attns[0].attn if hasattr(block, "attns") else block.attn
    mlp = block.ffns[0].mlp if hasattr(block, "ffns") else block.mlp
    final = getattr(mlp, "fc2", None)
    return int(attention.num_heads), int(getattr(final, "in_features", 4 * width))


def _preprocessing(model: Any) -> Preprocessing:
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(model)
    size = tuple(model.patch_embed.img_size or data["input_size"][1:])
    return Preprocessing(
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        size=(size[0], size[1]),
        interpolation=data["interpolation"],
        crop_fraction=float(data["crop_pct"]),
        square=size[0] == size[1],
    )


# Building: from a shipped description, a timm folder, a checkpoint with a timm name, or a timm name alone


@dataclasses.dataclass(frozen=True)
class _Blueprint:
    """How to construct the model: a timm name with arguments, or (`architecture` None) a VisionTransformer."""

    architecture: str | None
    arguments: Mapping[str, Any]
    pretrained: Mapping[str, Any]
    classes: tuple[str, ...] | None = None


def _blueprint(source: Source) -> _Blueprint:
    config = source.config
    if "arguments" in config:
        return _Blueprint(None, config["arguments"], config, _names(config.get("classes")))
    if "architecture" in config:
        settings = dict(config.get("pretrained_cfg") or {})
        if "num_classes" in config:
            settings["num_classes"] = config["num_classes"]
        labels = config.get("label_names") or settings.get("label_names")
        return _Blueprint(config["architecture"], config.get("model_args") or {}, settings, _names(labels))
    assert source.architecture is not None
    return _Blueprint(source.architecture, {}, {})


def _names(labels: Any) -> tuple[str, ...] | None:
    return tuple(str(label) for label in labels) if labels else None


def _construct(source: Source, blueprint: _Blueprint, **extra: Any) -> Any:
    """The model with random weights. Raises BacksightError where the description builds none."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    try:
        if blueprint.architecture is None:
            return VisionTransformer(**{**blueprint.arguments, **extra})
        _refuse_foreign(source, blueprint.architecture)
        fields = {each.name for each in dataclasses.fields(timm.models.PretrainedCfg)}
        overlay = {key: value for key, value in blueprint.pretrained.items() if key in fields}
        arguments = {**blueprint.arguments, **extra}
        return timm.create_model(blueprint.architecture, pretrained=False, pretrained_cfg_overlay=overlay, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise BacksightError(f"{source.name} describes no VisionTransformer ({reason}): correct it.") from error


def _refuse_foreign(source: Source, architecture: str) -> None:
    """Refuse timm models of other classes, with the reason, before anything is built."""
    import timm
    from timm.models import is_model, is_model_in_modules

    base = architecture.partition(".")[0]
    if not is_model(base):
        raise BacksightError(f"{source.name} names the architecture {architecture}, which timm does not have.")
    if is_model_in_modules(base, TIMM_MODULES):
        if "." in architecture and architecture not in timm.list_pretrained(f"{base}*"):
            tags = [each for each in timm.list_pretrained(f"{base}*") if each.startswith(f"{base}.")]
            raise BacksightError(f"timm has no weights {architecture}; there are: {', '.join(tags) or 'none'}.")
        return
    for module, reason in REFUSED_MODULES.items():
        if is_model_in_modules(base, (module,)):
            raise BacksightError(f"{source.name} cannot be a target: {reason}; use a vit_* or deit* name.")
    raise BacksightError(
        f"{source.name} is a timm model, but not a VisionTransformer (ViT, DeiT): "
        "use module_target() for other architectures."
    )


def _adapted(source: Source, blueprint: _Blueprint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments that a checkpoint of a changed head or input size needs: number of classes, image size."""
    with torch.device("meta"):
        model: Any = _construct(source, blueprint)
    extra: dict[str, Any] = {}
    head = shapes.get("head.weight")
    classes = head[0] if head else 0
    if blueprint.architecture is not None and classes != model.num_classes and not _foreign_layout(shapes):
        extra["num_classes"] = classes
    position = shapes.get("pos_embed")
    if (
        position is None
        or model.pos_embed is None
        or "img_size" in blueprint.arguments
        or position[1] == model.pos_embed.shape[1]
    ):
        return extra
    patches = position[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise BacksightError(
            f"The checkpoint of {source.name} has {patches} positions, which is no square grid: "
            'say "img_size" in the model_args of config.json.'
        )
    down, across = model.patch_embed.patch_size
    return {**extra, "img_size": (side * down, side * across)}


def _foreign_layout(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Original DINOv2, CLIP, … layouts, which timm's filter renames: their head cannot be read off by name."""
    return "blocks.0.norm1.weight" not in shapes or "mask_token" in shapes


def _build(source: Source, pretrained: bool, seed: int) -> tuple[Any, _Blueprint]:
    blueprint = _blueprint(source)
    if blueprint.architecture is not None and blueprint.architecture == source.architecture:
        blueprint = _named_blueprint(source, blueprint)
    checkpoint = _checkpoint(source, blueprint) if pretrained or source.checkpoint else None
    extra = _adapted(source, blueprint, sources.read_shapes(checkpoint)) if checkpoint else {}
    with seeded(seed):
        model = _construct(source, blueprint, **extra)
        if pretrained and checkpoint is not None:
            model = _filled(source, blueprint, model, checkpoint, extra)
    return model, blueprint


def _named_blueprint(source: Source, blueprint: _Blueprint) -> _Blueprint:
    """A hub name's config.json, fetched; other names stay as they are."""
    architecture = blueprint.architecture or ""
    if not architecture.startswith(HUB_PREFIXES):
        return blueprint
    config = sources.hub_file(source.name, _hub_identifier(architecture), ["config.json"])
    fetched = dataclasses.replace(source, config=sources.read_json(config))
    if "architecture" not in fetched.config:
        raise BacksightError(f"The hub repository of {source.name} holds no timm model: its config.json names none.")
    return _blueprint(fetched)


def _hub_identifier(name: str) -> str:
    return name.partition(":")[2]


def _checkpoint(source: Source, blueprint: _Blueprint) -> Path:
    """The checkpoint of a source: its own file, or that of the timm name, cached or fetched."""
    if source.checkpoint is not None:
        return source.checkpoint
    if source.folder is not None:
        raise BacksightError(
            f"The folder of {source.name} has no {sources.CHECKPOINT_NAMES[0]}: put the weights there."
        )
    location = _location(source, blueprint)
    if isinstance(location, tuple):
        return sources.hub_file(source.name, *location)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / location.rpartition("/")[2]
    if not cached.exists():
        if not sources.answers(location):
            raise BacksightError(sources.missing_weights(source.name, source.name, cached.name))
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(location, str(cached), progress=False)
    return cached


def _location(source: Source, blueprint: _Blueprint) -> tuple[str, list[str]] | str:
    """(hub repository, file names) or the address of a timm name's weights."""
    import timm

    architecture = blueprint.architecture or ""
    if source.name.startswith(HUB_PREFIXES):
        return _hub_identifier(source.name), list(sources.CHECKPOINT_NAMES)
    _refuse_foreign(source, architecture)
    settings = timm.get_pretrained_cfg(architecture)
    if settings is not None and settings.hf_hub_id:
        if not settings.hf_hub_filename:
            return settings.hf_hub_id, list(sources.CHECKPOINT_NAMES)
        safe = str(Path(settings.hf_hub_filename).with_suffix(".safetensors"))
        if settings.hf_hub_filename == "open_clip_pytorch_model.bin":
            safe = "open_clip_model.safetensors"
        return settings.hf_hub_id, list(dict.fromkeys([safe, settings.hf_hub_filename]))
    if settings is not None and isinstance(settings.url, str) and settings.url.endswith((".pth", ".pt")):
        return settings.url
    raise BacksightError(
        f"{source.name} has no published weights that can be read here: use pretrained=False for random weights; "
        f"{sources.working_names()}."
    )


def _filled(source: Source, blueprint: _Blueprint, model: Any, checkpoint: Path, extra: Mapping[str, Any]) -> Any:
    """The model with the checkpoint's weights; every weight must be there and fit."""
    state = sources.read_checkpoint(checkpoint)
    try:
        if blueprint.architecture is None:
            model.load_state_dict(state)
            return model
        import timm

        # timm's own loading renames foreign layouts (DINOv2, CLIP, DeiT-3) and needs the class count of the file.
        count = extra.get("num_classes", getattr(model, "num_classes", 0))
        overlay = {
            **{key: value for key, value in model.pretrained_cfg.items() if key not in ("file", "url")},
            "state_dict": state,
            "source": None,
            "hf_hub_id": None,
            "hf_hub_filename": None,
            "custom_load": False,
            **({"num_classes": count} if "num_classes" in extra else {}),
        }
        arguments = {**blueprint.arguments, **extra}
        filled: Any = timm.create_model(
            blueprint.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
        filled.pretrained_cfg.pop("state_dict", None)
        return filled
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BacksightError(
            f"{checkpoint.name} does not fit {source.name} ({reason}): it belongs to another architecture."
        ) from error


def _target(source: Source, model: Any, blueprint: _Blueprint, weights: str) -> TimmTransformer:
    preprocessing = None
    if blueprint.architecture is None:
        description = blueprint.pretrained
        size = model.patch_embed.img_size
        preprocessing = Preprocessing(
            mean=tuple(description["mean"]),
            std=tuple(description["std"]),
            size=(size[0], size[1]),
            interpolation=str(description.get("interpolation", "bicubic")),
            crop_fraction=float(description.get("crop_pct", 1.0)),
            square=size[0] == size[1],
        )
    classes = blueprint.classes or _imagenet_names(model, blueprint)
    return TimmTransformer(model, source.name, weights, preprocessing, classes)


def _imagenet_names(model: Any, blueprint: _Blueprint) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if blueprint.architecture is None or model.num_classes <= 0:
        return None
    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    names = ImageNetInfo(subset)
    return tuple(names.index_to_description(index) for index in range(model.num_classes))


# The family, as the registry sees it


def _claims(source: Source) -> bool:
    if source.config:
        return "architecture" in source.config and "model_type" not in source.config
    from timm.models import is_model

    name = source.architecture or ""
    return name.startswith(HUB_PREFIXES) or is_model(name.partition(".")[0])


def _load(source: Source, pretrained: bool, seed: int) -> Target:
    model, blueprint = _build(source, pretrained, seed)
    return _target(source, model, blueprint, source.label if pretrained else "random")


def _skeleton(source: Source) -> Target:
    with torch.device("meta"):
        model, blueprint = _build(source, pretrained=False, seed=0)
    return _target(source, model, blueprint, "none")


def _check(source: Source) -> None:
    blueprint = _blueprint(source)
    if source.checkpoint is not None:
        shapes = sources.read_shapes(source.checkpoint)
        if not _foreign_layout(shapes):
            sources.compare_shapes(source, _skeleton(source).model.state_dict())
        return
    if source.folder is not None:
        _checkpoint(source, blueprint)
    location = _location(source, blueprint)
    if isinstance(location, tuple) and sources.cached_file(*location) is None:
        sources.refuse_unreachable(source.name, location[0], location[1][0])


def _listed() -> dict[str, str]:
    import timm

    settings = {name: timm.get_pretrained_cfg(name) for name in LISTED}
    return {name: each.hf_hub_id for name, each in settings.items() if each is not None and each.hf_hub_id}


def _all_names() -> list[str]:
    import timm

    return [name for module in TIMM_MODULES for name in timm.list_models(module=module)]


FAMILY = Family("timm VisionTransformer", "classifier", _claims, _skeleton, _load, _check, _listed, _all_names)
