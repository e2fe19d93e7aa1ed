"""Models of transformers: which family a name belongs to, and loading without network, warnings or surprises.

A family is a file that describes its models by `Architecture` and offers `family(...)`:

    FAMILY = family("transformers Conditional DETR", [Architecture("conditional_detr", …)])

What transformers only warns about is refused here: weights that are missing, left over or of another shape. A backbone
is always described in full, because transformers would otherwise ask the network for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.targets import sources
from backsight.targets.base import Family, Preprocessing, Size, Target, seeded
from backsight.targets.sources import Source

# Published models whose family is known without asking the hub, and so all the model types that are taken.
PUBLISHED = {
    "facebook/detr-resnet-50": "detr",
    "facebook/detr-resnet-101": "detr",
    "facebook/detr-resnet-50-dc5": "detr",
    "facebook/detr-resnet-101-dc5": "detr",
    "microsoft/conditional-detr-resnet-50": "conditional_detr",
    "IDEA-Research/dab-detr-resnet-50": "dab-detr",
    "IDEA-Research/dab-detr-resnet-50-dc5": "dab-detr",
    "SenseTime/deformable-detr": "deformable_detr",
    "SenseTime/deformable-detr-single-scale": "deformable_detr",
    "SenseTime/deformable-detr-single-scale-dc5": "deformable_detr",
    "SenseTime/deformable-detr-with-box-refine": "deformable_detr",
    "SenseTime/deformable-detr-with-box-refine-two-stage": "deformable_detr",
    "PekingU/rtdetr_r18vd": "rt_detr",
    "PekingU/rtdetr_r50vd": "rt_detr",
    "PekingU/rtdetr_r101vd": "rt_detr",
    "PekingU/rtdetr_v2_r18vd": "rt_detr_v2",
    "PekingU/rtdetr_v2_r50vd": "rt_detr_v2",
    "hustvl/yolos-tiny": "yolos",
    "hustvl/yolos-small": "yolos",
    "facebook/mask2former-swin-tiny-coco-instance": "mask2former",
}
MODEL_TYPES = tuple(dict.fromkeys(PUBLISHED.values()))
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESSOR: Mapping[str, Any] = {"size": {"shortest_edge": 800, "longest_edge": 1333}}  # of DETR and its kin
LARGEST_HEIGHT = 480  # of a batch of images where the processor keeps the aspect ratio
LEGACY_KEYS = ("backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone")


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers, as its family describes it.

    model_type: in config.json; config, model: names of its classes in transformers; target: the adapter, called with
    (model, name, preprocessing, weights, classes); heads: names that the weight of the class head may have in a
    checkpoint; spare: its rows that are no class of the data ("no object"); out_indices: maps that the default timm
    backbone gives, from the config's values, or None where the config class makes its own default without network;
    processor: what the model's image processor does by default (keys of preprocessor_config.json).
    """

    model_type: str
    config: str
    model: str
    target: Callable[[Any, str, Preprocessing, str, Sequence[str]], Any]
    heads: tuple[str, ...] = ()
    spare: int = 0
    out_indices: Callable[[Mapping[str, Any]], list[int]] | None = None
    processor: Mapping[str, Any] = field(default_factory=lambda: PROCESSOR)


def family(
    name: str,
    architectures: Sequence[Architecture],
    kind: Any = "detector",
    refuses: bool = False,
) -> Family:
    """The registry's view of these architectures. refuses: claim model types that no family takes, to refuse them."""
    by_type = {each.model_type: each for each in architectures}

    def claims(source: Source) -> bool:
        model_type = model_type_of(source)
        return model_type in by_type or (refuses and model_type is not None and model_type not in MODEL_TYPES)

    def found(source: Source) -> Architecture:
        model_type = str(model_type_of(source))
        if model_type not in by_type:
            raise BacksightError(
                f"{source.name} is a transformers model of the type {model_type!r}, and only {', '.join(MODEL_TYPES)} "
                "are taken: use a timm name for a ViT, or module_target() for other models."
            )
        return by_type[model_type]

    names = [each for each, model_type in PUBLISHED.items() if model_type in by_type]
    return Family(
        name,
        kind,
        claims,
        skeleton=lambda source: _skeleton(source, found(source)),
        load=lambda source, pretrained, seed: _load(source, found(source), pretrained, seed),
        check=lambda source: _check(source, found(source)),
        listed=lambda: {each: each for each in names},
        names=lambda: list(names),
    )


# What a name stands for


def model_type_of(source: Source) -> str | None:
    """`model_type` of the folder's config.json, or of a hub id "owner/name"; None where it is no transformers model.

    Published names are known; for other hub ids config.json is read from the cache or fetched.
    Raises BacksightError where it cannot be fetched.
    """
    if source.config:
        found = source.config.get("model_type")
        return None if found is None else str(found)
    name = source.architecture or ""
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name.count("/") != 1 or ":" in name:
        return None
    found = sources.read_json(sources.hub_file(name, name, ["config.json"])).get("model_type")
    return None if found is None else str(found)


def _config(source: Source, architecture: Architecture, checkpoint: Path | None) -> Any:
    """The configuration of a source, with an explicit backbone that asks no network."""
    import transformers

    if source.config:
        values = dict(source.config)
    else:
        values = sources.read_json(sources.hub_file(source.name, source.name, ["config.json"]))
    values["backbone_config"] = _explicit_backbone(values, architecture)
    for key in LEGACY_KEYS:
        values.pop(key, None)
    if values["backbone_config"] is None:
        del values["backbone_config"]
    if not values.keys() & {"id2label", "num_labels"} and checkpoint is not None:
        shapes = sources.read_shapes(checkpoint)
        if head := next((name for name in architecture.heads if name in shapes), None):
            values["num_labels"] = shapes[head][0] - architecture.spare
    with _describing(source, architecture):
        return getattr(transformers, architecture.config).from_dict(values)


def _explicit_backbone(values: Mapping[str, Any], architecture: Architecture) -> Any:
    backbone = values.get("backbone_config")
    if backbone is None and architecture.out_indices is not None:
        arguments = values.get("backbone_kwargs") or {}
        return {
            "model_type": "timm_backbone",
            "backbone": values.get("backbone") or "resnet50",
            "num_channels": values.get("num_channels", 3),
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": arguments.get("out_indices") or architecture.out_indices(values),
            **({"output_stride": 16} if values.get("dilation") else {}),
        }
    if isinstance(backbone, Mapping) and backbone.get("model_type") == "timm_backbone":
        return {**backbone, "use_pretrained_backbone": False}
    return backbone


def _constructed(source: Source, architecture: Architecture, config: Any) -> Any:
    import transformers

    with _describing(source, architecture):
        return getattr(transformers, architecture.model)(config)


@contextmanager
def _describing(source: Source, architecture: Architecture) -> Iterator[None]:
    """transformers raises many types on a config.json that somebody edited; say in one sentence what is wrong."""
    try:
        yield
    except Exception as error:
        raise BacksightError(
            f"The config.json of {source.name} describes no {architecture.model} ({_reason(error)}): correct it."
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# Building: a save_pretrained folder, a checkpoint beside its config.json, or a hub id


def _skeleton(source: Source, architecture: Architecture) -> Target:
    config = _config(source, architecture, source.checkpoint)
    with torch.device("meta"):
        model = _constructed(source, architecture, config).to("meta")  # some make a tensor where no context reaches
        return _target(source, architecture, model, source.folder, "none")


def _load(source: Source, architecture: Architecture, pretrained: bool, seed: int) -> Target:
    if not pretrained:
        config = _config(source, architecture, source.checkpoint)
        with seeded(seed):
            model = _constructed(source, architecture, config)
        return _target(source, architecture, model, source.folder, "random")
    checkpoint, folder = _files(source)
    config = _config(source, architecture, checkpoint)
    return _target(source, architecture, _loaded(source, architecture, config, checkpoint), folder, source.label)


def _target(source: Source, architecture: Architecture, model: Any, folder: Path | None, weights: str) -> Target:
    classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
    processor = _processor(source, architecture, folder)
    # The model itself says its stride, which the image size is rounded to.
    provisional = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, (1, 1))
    target = architecture.target(model, source.name, provisional, weights, classes)
    target.preprocessing = _preprocessing(processor, target.size_step)
    return target


def _files(source: Source) -> tuple[Path, Path | None]:
    """(checkpoint, folder of preprocessor_config.json), local, cached or fetched."""
    if source.folder is not None:
        if source.checkpoint is None:
            raise BacksightError(
                f"The folder of {source.name} has no {sources.CHECKPOINT_NAMES[0]}: put the weights there."
            )
        return source.checkpoint, source.folder
    checkpoint = sources.hub_file(source.name, source.name, sources.CHECKPOINT_NAMES[:2])
    sources.hub_file(source.name, source.name, ["preprocessor_config.json"])
    return checkpoint, checkpoint.parent


def _loaded(source: Source, architecture: Architecture, config: Any, checkpoint: Path) -> Any:
    """The model with the checkpoint's weights, in float32; transformers only warns where they do not fit."""
    import transformers

    state = sources.read_checkpoint(checkpoint)
    try:
        with seeded(0), _quietly():
            # Half-precision files are read as float32, or the processor would run in the file's type.
            loaded: Any = getattr(transformers, architecture.model).from_pretrained(
                None,
                config=config,
                state_dict=state,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
            model, report = loaded
    except Exception as error:  # transformers raises many types on files that do not fit
        raise BacksightError(
            f"{checkpoint.name} does not fit {source.name} ({_reason(error)}): it belongs to another architecture."
        ) from error
    if words := sources.misfit(_found_shapes(model, report), sources.shapes_of(model.state_dict())):
        raise BacksightError(sources.does_not_fit(source.name, checkpoint, words))
    return model


def _found_shapes(model: nn.Module, report: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the checkpoint held, under the names that transformers has given it."""
    shapes = sources.shapes_of(model.state_dict())
    found = {name: shape for name, shape in shapes.items() if name not in report["missing_keys"]}
    found |= {str(name): () for name in report["unexpected_keys"]}
    return found | {str(name): tuple(there) for name, there, _ in report["mismatched_keys"]}


@contextmanager
def _quietly() -> Iterator[None]:
    """No bar for a load of a fraction of a second, which a saved notebook would keep, and no table of misfits."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _check(source: Source, architecture: Architecture) -> None:
    if source.checkpoint is not None:
        model = _skeleton(source, architecture).model
        sources.compare_shapes(source, _unique(model), renamed=True)
        return
    if source.folder is not None:
        _files(source)
    for filename in ("config.json", *sources.CHECKPOINT_NAMES[:1]):
        if sources.cached_file(source.name, [filename]) is None:
            sources.refuse_unreachable(source.name, source.name, filename)


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """The state without its second names: a weight that two modules share lies once in a checkpoint."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        seen.setdefault(id(tensor), name)
    return {name: state[name] for name in seen.values()}


# Preprocessing


def _processor(source: Source, architecture: Architecture, folder: Path | None) -> dict[str, Any]:
    """preprocessor_config.json, over what the image processor does by default."""
    values: Mapping[str, Any] = {}
    if folder is None:
        found = sources.cached_file(source.name, ["preprocessor_config.json"])
        folder = found.parent if found else None
    if folder is not None:
        values = sources.read_json(folder / "preprocessor_config.json")
        values = values or sources.read_json(folder / "processor_config.json").get("image_processor", {})
    return {**architecture.processor, **values}


def _preprocessing(values: Mapping[str, Any], step: Size) -> Preprocessing:
    height, width = _image_size(values["size"], step)
    mean, std = values.get("image_mean", IMAGENET_MEAN), values.get("image_std", IMAGENET_STD)
    if not values.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return Preprocessing(
        mean=tuple(mean),
        std=tuple(std),
        size=(height, width),
        interpolation=INTERPOLATIONS.get(values.get("resample", 2), "bilinear"),
        square=height == width,
    )


def _image_size(size: Any, step: Size) -> Size:
    """(H, W) for one batch of images: the configured size, or a 4:3 picture of at most 480 pixels in height.

    DETR keeps the aspect ratio (shortest and longest edge); 480 x 640 is the size at which it was inverted in the
    paper, and costs a third of 800 x 1066.
    """
    if isinstance(size, Mapping) and "height" in size:
        return int(size["height"]), int(size["width"])
    short = size.get("shortest_edge", 800) if isinstance(size, Mapping) else size
    long = size.get("longest_edge") if isinstance(size, Mapping) else None
    height = min(int(short), LARGEST_HEIGHT)
    width = height if long is not None and long <= short else height * 4 // 3
    return _round_up(height, step[0]), _round_up(width, step[1])


def _round_up(length: int, step: int) -> int:
    return math.ceil(length / step) * step
