"""Models of transformers by folder, checkpoint or hub id: detectors, encoders and classifiers of images.

What transformers only warns about is refused here: weights that are missing, left over or of another shape.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backsight.errors import BacksightError, nearest
from backsight.targets.base import Preprocessing, Size, Target, seeded
from backsight.targets.checkpoints import Choice, choose, fitted, read_object, read_tensors
from backsight.targets.detectors import DETECTORS
from backsight.targets.discovered import RECOMMENDED, ModuleTarget
from backsight.targets.names import Source, explained

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
LARGEST_HEIGHT = 480  # of a batch of images where a detector's processor keeps the aspect ratio


class Encoder(ModuleTarget):
    """An encoder or classifier of transformers, which can be built again from its config."""

    def _randomised(self) -> nn.Module:
        return _at_size(type(self.model)(self.model.config).eval().requires_grad_(False), self.image_size)


def _at_size(model: nn.Module, size: Size) -> nn.Module:
    """Models that can resample their position embedding do so only when they are told to."""
    if size != _own_size(model.config) and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        model.forward = functools.partial(model.forward, interpolate_pos_encoding=True)
    return model


def _own_size(config: Any) -> Size | None:
    """(H, W) that config.json says, of models that have one."""
    side = getattr(config, "image_size", None)
    return (side, side) if isinstance(side, int) else tuple(side) if side else None


def configuration(source: Source, arguments: Mapping[str, Any]) -> Any:
    """transformers' own, of a folder or from the hub; arguments: over what it says."""
    import transformers

    settings = {"trust_remote_code": False, "return_unused_kwargs": True, **arguments}
    with explained(source, "model of transformers"):
        config, unused = transformers.AutoConfig.from_pretrained(**_place(source), **settings)
    if stray := sorted(unused.keys() & arguments.keys()):
        known = nearest(stray[0], [*config.to_dict()])
        raise BacksightError(f"The configuration of {source.name} has no {stray[0]!r}; {known}.")
    return config


def _place(source: Source) -> dict[str, Any]:
    """Folder or hub id, and revision; a file that is named with a hub's id has that id's configuration."""
    place = str(source.folder) if source.config else source.repository
    return {"pretrained_model_name_or_path": place, "revision": source.architecture.partition("@")[2] or None}


def transformers_target(source: Source, config: Any, pretrained: bool, seed: int, size: Size | None) -> Target:
    with explained(source, "model of transformers"):
        kind, config = _model_class(source, config)
    with seeded(seed), explained(source, kind.__name__):
        model, label = _loaded(source, kind, config) if pretrained else (kind(config), "random")
    named = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    if config.model_type in DETECTORS:
        provisional = Preprocessing((0.0,) * 3, (1.0,) * 3, (1, 1))  # the model itself says its stride
        detector = DETECTORS[config.model_type](model, source.name, provisional, label, named)
        detector.preprocessing = _processing(source, config, size, detector.size_step)
        return detector
    preprocessing = _processing(source, config, size)
    model = _at_size(model.eval().requires_grad_(False), preprocessing.size)
    target = Encoder(model, RECOMMENDED, preprocessing, name=source.name)
    target.weights, target.classes = label, named if "Classification" in kind.__name__ else None
    return target


def _model_class(source: Source, config: Any) -> tuple[Any, Any]:
    """(model class, its config): a detector, the class that config.json names, or the part that sees images."""
    import transformers

    if config.model_type in DETECTORS:
        task = DETECTORS[config.model_type].task
        return getattr(transformers, f"{type(config).__name__.removesuffix('Config')}{task}"), config
    named = (config.architectures or [""])[0]
    if hasattr(config, "vision_config") and "ImageClassification" not in named:
        named, config = "", config.vision_config
    kind: Any = getattr(transformers, named or " ", None)
    if kind is None or not isinstance(config, kind.config_class):
        kind = transformers.MODEL_MAPPING.get(type(config), None)
    if kind is None or kind.main_input_name != "pixel_values":
        raise BacksightError(
            f"{source.name} is a model of the type {config.model_type!r}, which takes no images alone: name an "
            "encoder, a classifier or a detector of images, or give the model to module_target()."
        )
    return kind, config


def _loaded(source: Source, kind: Any, config: Any) -> tuple[nn.Module, str]:
    """The model with its weights (a file's, or the hub's) and the label of these."""
    from transformers.utils import logging as reports

    choice, place = Choice({}), _place(source)
    if source.checkpoint is not None:
        with torch.device("meta"):
            own = kind(config).to("meta").state_dict()  # some make a tensor where no context reaches
        choice = choose(read_tensors(source.checkpoint), own)
        if not source.config.keys() & {"id2label", "num_labels"}:  # then only the weights say the number of classes
            pairs = [(choice.state[name], tensor) for name, tensor in own.items() if name in choice.state]
            further = {theirs.shape[0] - ours.shape[0] for theirs, ours in pairs if theirs.ndim == ours.ndim > 0} - {0}
            config.num_labels += further.pop() if len(further) == 1 else 0
        place = {"pretrained_model_name_or_path": None, "state_dict": choice.state}
    # Half-precision files are read as float32, or the processor would run in the file's type.
    settings = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    with contextlib.ExitStack() as quiet:  # no bar, which a saved notebook would keep, and no table of misfits
        quiet.callback(reports.set_verbosity, reports.get_verbosity())
        if reports.is_progress_bar_enabled():
            quiet.callback(reports.enable_progress_bar)
        reports.disable_progress_bar()
        reports.set_verbosity_error()
        model, report = kind.from_pretrained(**place, **settings)
    own = model.state_dict()
    state = {name: choice.state.get(name, t) for name, t in own.items() if name not in report["missing_keys"]}
    state |= {str(name): torch.empty(shape, device="meta") for name, shape, _ in report["mismatched_keys"]}
    if "vision_config" in source.config:  # the other half is left out on purpose
        choice = choice._replace(unused=())
    else:
        state |= {str(name): torch.empty(0) for name in report["unexpected_keys"]}
    fitted(source.name, source.checkpoint or Path(source.repository), choice, state, own)
    return model, source.label + choice.note


def _processing(source: Source, config: Any, size: Size | None, step: Size | None = None) -> Preprocessing:
    """What the model's own image processor does. step: of a detector, whose images may have any aspect ratio."""
    with explained(source, "preprocessing in preprocessor_config.json"):
        processor = _processor(source, config, step)
        usual, crop = _processed_size(processor, config, step)
        factor = 255.0 * (processor.rescale_factor if processor.do_rescale else 1.0)
        look = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        rows = [[row] * 3 if isinstance(row, (int, float)) else row for row in look]
        mean, std = (tuple(value / factor for value in row) for row in rows)
        if len(mean) != 3 or getattr(processor, "do_flip_channel_order", False):
            raise ValueError("images have the channels red, green, blue")
        interpolation = INTERPOLATIONS.get(int(getattr(processor, "resample", None) or 2), "bilinear")
        return Preprocessing(mean, std, size or usual, interpolation, crop)


def _processor(source: Source, config: Any, step: Size | None) -> Any:
    """The image processor of a folder or of the hub; where a folder has none, what its type usually does."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as KNOWN

    place, folder = _place(source), source.folder if source.config else None
    values = read_object(folder / "preprocessor_config.json") if folder else {}
    silent = folder and not (folder / "processor_config.json").exists()
    if not silent or values.keys() & {"image_processor_type", "feature_extractor_type"}:
        return transformers.AutoImageProcessor.from_pretrained(**place, trust_remote_code=False)
    # transformers itself does not know one of "rt_detr_v2" and "clip_vision_model", but of "rt_detr" and "clip".
    near = max((name for name in KNOWN if config.model_type.startswith(name)), key=len, default="vit")
    usual = getattr(transformers, KNOWN[near]["torchvision"])
    if values:
        return usual.from_pretrained(**place)
    warnings.warn(f"{source.name} has no preprocessor_config.json: images are prepared as usual.", stacklevel=2)
    own = _own_size(config) if step is None else None
    return usual(size={"height": own[0], "width": own[1]}, do_center_crop=False) if own else usual()


def _processed_size(processor: Any, config: Any, step: Size | None) -> tuple[Size, float]:
    """(H, W) for one batch of images, and what part of the shorter side a centre crop keeps.

    Where a detector's processor keeps the aspect ratio (shortest and longest edge), it is a 4:3 picture of at most 480
    pixels in height: the size at which DETR was inverted in the paper, and a third of the cost of 800 x 1066.
    """
    rule: Any = (getattr(processor, "do_resize", True) and processor.size) or {}
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", None) else None
    short, long = rule.get("shortest_edge"), rule.get("longest_edge")
    height: Any
    width: Any
    height, width = (rule.get(side) or rule.get(f"max_{side}") for side in ("height", "width"))
    if not rule:
        return _own_size(config) or (224, 224), 1.0
    if crop:
        return (crop["height"], crop["width"]), crop["height"] / (short or height or crop["height"])
    if not (height and width) and (step is None or short is None):
        height = width = short or long
        return (height, width), getattr(processor, "crop_pct", None) or 1.0 if height < 384 else 1.0
    if step is not None and short is not None:
        height = min(short, LARGEST_HEIGHT)
        width = height if long is not None and long <= short else height * 4 // 3
        height, width = (math.ceil(side / cells) * cells for side, cells in zip((height, width), step, strict=True))
    return (height, width), 1.0
