"""timm models by name, folder, checkpoint or description: building, loading, and which adapter reads them.

VisionTransformer and its subclasses     vit.py, exact, with half-steps
every other with forward_intermediates   timm_intermediates.py, read off one observed pass
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backsight.errors import BacksightError, nearest
from backsight.targets import sources
from backsight.targets.base import Family, Preprocessing, Target, seeded
from backsight.targets.sources import HUB_PREFIXES, Source
from backsight.targets.timm_intermediates import TimmIntermediates
from backsight.targets.vit import TimmTransformer

# Listed by `backsight targets`; any other name of timm works too.
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
    "beit_base_patch16_224",
    "eva02_small_patch14_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "tnt_s_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "pvt_v2_b0",
    "mvitv2_tiny",
    "hiera_tiny_224",
    "poolformer_s12",
    "convnext_tiny",
    "resnet50",
)

# Building: from a shipped description, a timm folder, a checkpoint with a timm name, or a timm name alone


@dataclasses.dataclass(frozen=True)
class _Blueprint:
    """How to construct the model.

    architecture: a timm name, or that of a class of timm's (by_class), such as SwinTransformer; arguments: of it;
    pretrained: the model's data configuration.
    """

    architecture: str
    arguments: Mapping[str, Any]
    pretrained: Mapping[str, Any]
    classes: tuple[str, ...] | None = None
    by_class: bool = False


def _blueprint(source: Source) -> _Blueprint:
    config = source.config
    if "arguments" in config:
        architecture = str(config.get("architecture", "VisionTransformer"))
        return _Blueprint(architecture, config["arguments"], config, _names(config.get("classes")), by_class=True)
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


def _construct(source: Source, blueprint: _Blueprint) -> Any:
    """The model with random weights. Raises BacksightError where the description builds none."""
    import timm

    try:
        if blueprint.by_class:
            return _class_named(source, blueprint.architecture)(**blueprint.arguments)
        _refuse_unknown(source, blueprint.architecture)
        fields = {each.name for each in dataclasses.fields(timm.models.PretrainedCfg)}
        overlay = {key: value for key, value in blueprint.pretrained.items() if key in fields}
        return timm.create_model(
            blueprint.architecture, pretrained=False, pretrained_cfg_overlay=overlay, **blueprint.arguments
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise BacksightError(f"{source.name} describes no {blueprint.architecture} ({reason}): correct it.") from error


def _class_named(source: Source, name: str) -> Callable[..., nn.Module]:
    """A model class of timm. Raises BacksightError, with the nearest names, where it has no such class."""
    import timm

    classes = {key: each for key, each in vars(timm.models).items() if inspect.isclass(each)}
    models: dict[str, Any] = {key: each for key, each in classes.items() if hasattr(each, "forward_intermediates")}
    if name not in models:
        raise BacksightError(
            f"{source.name} names the class {name}, which timm does not have; {nearest(name, list(models))}."
        )
    return models[name]


def _refuse_unknown(source: Source, architecture: str) -> None:
    """Refuse names that timm does not have before anything is built."""
    import timm
    from timm.models import is_model

    base = architecture.partition(".")[0]
    if not is_model(base):
        raise BacksightError(f"{source.name} names the architecture {architecture}, which timm does not have.")
    if "." in architecture and architecture not in timm.list_pretrained(f"{base}*"):
        tags = [each for each in timm.list_pretrained(f"{base}*") if each.startswith(f"{base}.")]
        raise BacksightError(f"timm has no weights {architecture}; there are: {', '.join(tags) or 'none'}.")


def _adapted(source: Source, blueprint: _Blueprint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments that a checkpoint of a changed head or input size needs: number of classes, image size."""
    with torch.device("meta"):
        model: Any = _construct(source, blueprint)
    extra: dict[str, Any] = {}
    classes = _classes_in(model, shapes)
    if not blueprint.by_class and classes and classes != model.num_classes:
        extra["num_classes"] = classes
    position, own = shapes.get("pos_embed"), getattr(model, "pos_embed", None)
    if (
        position is None
        or not isinstance(own, torch.Tensor)
        or own.ndim != 3
        or "img_size" in blueprint.arguments
        or position[1] == own.shape[1]
        or not hasattr(model.patch_embed, "patch_size")
    ):
        return extra
    patches = position[1] - (0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise BacksightError(
            f"The checkpoint of {source.name} has {patches} positions, which is no square grid: "
            'say "img_size" in the model_args of config.json.'
        )
    down, across = model.patch_embed.patch_size
    return {**extra, "img_size": (side * down, side * across)}


def _classes_in(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of classes of a checkpoint's head, 0 where it has none or is of another layout than the model.

    Original DINOv2, CLIP, … layouts are renamed by timm's filter: their head cannot be read off by name.
    """
    head = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    names = [f"{head if isinstance(head, str) else head[0]}.weight", "head.weight"]  # as it is, and as it was published
    found = next((name for name in names if name in shapes), None)
    return 0 if found is None or _foreign_layout(model, shapes) else shapes[found][0]


def _foreign_layout(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Are a good part of the model's weights not to be found under their names?"""
    names = model.state_dict().keys()
    return len(names & shapes.keys()) < 0.8 * len(names) or ("mask_token" in shapes and "mask_token" not in names)


def _build(source: Source, pretrained: bool, seed: int) -> tuple[Any, _Blueprint]:
    """The model, and the blueprint with everything that builds it again."""
    blueprint = _blueprint(source)
    if not blueprint.by_class and blueprint.architecture == source.architecture:
        blueprint = _named_blueprint(source, blueprint)
    checkpoint = _checkpoint(source, blueprint) if pretrained or source.checkpoint else None
    if checkpoint is not None:
        extra = _adapted(source, blueprint, sources.read_shapes(checkpoint))
        blueprint = dataclasses.replace(blueprint, arguments={**blueprint.arguments, **extra})
    with seeded(seed):
        model = _construct(source, blueprint)
        if pretrained and checkpoint is not None:
            model = _filled(source, blueprint, model, sources.read_checkpoint(checkpoint), checkpoint)
    return model, blueprint


def _named_blueprint(source: Source, blueprint: _Blueprint) -> _Blueprint:
    """A hub name's config.json, fetched; other names stay as they are."""
    architecture = blueprint.architecture
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

    architecture = blueprint.architecture
    if source.name.startswith(HUB_PREFIXES):
        return _hub_identifier(source.name), list(sources.CHECKPOINT_NAMES)
    _refuse_unknown(source, architecture)
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


def _filled(
    source: Source,
    blueprint: _Blueprint,
    model: Any,
    state: Mapping[str, torch.Tensor],
    checkpoint: Path,
) -> Any:
    """The model with the checkpoint's weights; every weight must be there and fit."""
    try:
        if blueprint.by_class:
            model.load_state_dict(state)
            return model
        import timm

        # timm's own loading renames foreign layouts (DINOv2, CLIP, DeiT-3) and needs the class count of the file.
        overlay = {
            **{key: value for key, value in model.pretrained_cfg.items() if key not in ("file", "url")},
            "state_dict": state,
            "source": None,
            "hf_hub_id": None,
            "hf_hub_filename": None,
            "custom_load": False,
            "num_classes": model.num_classes,
        }
        filled: Any = timm.create_model(
            blueprint.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **blueprint.arguments
        )
        filled.pretrained_cfg.pop("state_dict", None)
        return filled
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        shapes = sources.shapes_of(state)
        words = "" if _foreign_layout(model, shapes) else sources.misfit(shapes, sources.shapes_of(model.state_dict()))
        words = words or f"it belongs to another architecture ({' '.join(str(error).split())[:200]})"
        raise BacksightError(sources.does_not_fit(source.name, checkpoint, words)) from error


def _target(source: Source, model: Any, blueprint: _Blueprint, weights: str) -> Target:
    """The target, by the adapter that reads models of this class."""
    from timm.models.vision_transformer import VisionTransformer

    classes = blueprint.classes or _imagenet_names(model, blueprint)
    preprocessing = _preprocessing(model, blueprint)
    if isinstance(model, VisionTransformer):
        return TimmTransformer(model, source.name, weights, preprocessing, classes)
    build = functools.partial(_construct, source, blueprint)
    return TimmIntermediates(model, source.name, weights, build, preprocessing, classes)


def _preprocessing(model: Any, blueprint: _Blueprint) -> Preprocessing:
    """As the description says, or the model's own configuration; at the size that the model was built for."""
    from timm.data import resolve_model_data_config

    data = blueprint.pretrained if blueprint.by_class else resolve_model_data_config(model)
    built = blueprint.arguments.get("img_size") or getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = (built, built) if isinstance(built, int) else tuple(built or data["input_size"][1:])
    return Preprocessing(
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        size=(size[0], size[1]),
        interpolation=str(data.get("interpolation", "bicubic")),
        crop_fraction=float(data.get("crop_pct", 1.0)),
        square=size[0] == size[1],
    )


def _imagenet_names(model: Any, blueprint: _Blueprint) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if blueprint.by_class or model.num_classes <= 0:
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
    """Without weights where the adapter knows the taps without a pass, else with random ones."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model, blueprint = _build(source, pretrained=False, seed=0)
    if not isinstance(model, VisionTransformer):
        model, blueprint = _build(source, pretrained=False, seed=0)
    return _target(source, model, blueprint, "none")


def _check(source: Source) -> None:
    blueprint = _blueprint(source)
    if source.checkpoint is not None:
        _check_shapes(source, source.checkpoint)
        return
    if source.folder is not None:
        _checkpoint(source, blueprint)
    location = _location(source, blueprint)
    if isinstance(location, tuple) and sources.cached_file(*location) is None:
        sources.refuse_unreachable(source.name, location[0], location[1][0])


def _check_shapes(source: Source, checkpoint: Path) -> None:
    """Refuse a checkpoint that does not fit, from names and shapes alone.

    Where names differ, timm's own loading may rename them; whether it does is tried without values.
    """
    shapes = sources.read_shapes(checkpoint)
    with torch.device("meta"):
        model, blueprint = _build(source, pretrained=False, seed=0)
        words = sources.misfit(shapes, sources.shapes_of(model.state_dict()))
        if words and blueprint.by_class:
            raise BacksightError(sources.does_not_fit(source.name, checkpoint, words))
        if words:
            state = {name: torch.empty(shape) for name, shape in shapes.items()}
            _filled(source, blueprint, model, state, checkpoint)


def _listed() -> dict[str, str]:
    import timm

    settings = {name: timm.get_pretrained_cfg(name) for name in LISTED}
    return {name: each.hf_hub_id for name, each in settings.items() if each is not None and each.hf_hub_id}


def _all_names() -> list[str]:
    import timm

    return list(timm.list_models())


def random_target(name: str, size: int | None = None, seed: int = 0, **arguments: Any) -> Target:
    """A timm name with random weights, for images of another side than its own.

    arguments: of the model. Where it takes `img_size`, it is built for this one, else it is run at it as it is.
    Raises BacksightError where the model does not take the size.
    """
    config: dict[str, Any] = {"architecture": name, "model_args": arguments}
    if size is not None:
        config |= {"pretrained_cfg": {"input_size": (3, size, size)}, "model_args": {**arguments, "img_size": size}}
        source = Source(name, "random", config=config)
        try:
            with torch.device("meta"):
                _build(source, pretrained=False, seed=seed)
        except BacksightError:
            config["model_args"] = arguments
    return _load(Source(name, "random", config=config), pretrained=False, seed=seed)


FAMILY = Family("timm", "classifier", _claims, _skeleton, _load, _check, _listed, _all_names)
