"""Models of transformers by folder, checkpoint or hub id: detectors, encoders and classifiers of images.

What transformers only warns about is refused here: weights that are missing, left over or of another shape.
A new detector is a file with its class, and one line in DETECTORS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.targets.base import TAP_SETS, Preprocessing, Size, Target, seeded
from backsight.targets.checkpoints import (
    Choice,
    choose,
    misfit,
    read_object,
    read_tensors,
    unfit,
    unique,
    warn_of_unused,
)
from backsight.targets.discovered import RECOMMENDED, ModuleTarget
from backsight.targets.names import Source, checked_preprocessing, explained, reason

# A detector's `model_type` in config.json: the file beside this one, and the class in it.
DETECTORS = {
    "detr": "detr:Detr",
    "conditional_detr": "detr:ConditionalDetr",
    "dab-detr": "detr:DabDetr",
    "deformable_detr": "detr:DeformableDetr",
    "rt_detr": "rt_detr:RtDetr",
    "rt_detr_v2": "rt_detr:RtDetr",
    "yolos": "yolos:Yolos",
    "mask2former": "mask2former:Mask2Former",
}
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
# Image processors of types of which transformers itself does not know one.
PROCESSORS = {
    "rt_detr_v2": "RTDetrImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
}
LARGEST_HEIGHT = 480  # of a batch of images where a detector's processor keeps the aspect ratio


class Encoder(ModuleTarget):
    """An encoder or classifier of transformers, which can be built again from its config."""

    def resolve_taps(self, taps: str | Sequence[str]) -> tuple[str, ...]:
        return super().resolve_taps(RECOMMENDED if isinstance(taps, str) and taps in TAP_SETS else taps)

    def _randomised(self) -> nn.Module:
        model = type(self.model)(self.model.config).eval().requires_grad_(False)
        return _of_any_size(model) if isinstance(self.model.forward, functools.partial) else model


def _of_any_size(model: nn.Module) -> nn.Module:
    """Models that can resample their position embedding do so only when they are told to."""
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        model.forward = functools.partial(model.forward, interpolate_pos_encoding=True)
    return model


def _own_size(config: Any) -> Size | None:
    """(H, W) that config.json says, of models that have one."""
    side = getattr(config, "image_size", None)
    return (side, side) if isinstance(side, int) else tuple(side) if side else None


def configuration(source: Source, arguments: Mapping[str, Any]) -> Any:
    """transformers' own, of a folder or from the hub; arguments: over what it says."""
    import transformers

    where, revision = _place(source)
    with explained(source, "model of transformers"):
        config, unused = transformers.AutoConfig.from_pretrained(
            where, revision=revision, trust_remote_code=False, return_unused_kwargs=True, **arguments
        )
    if stray := sorted(unused.keys() & arguments.keys()):
        known = nearest(stray[0], [*config.to_dict()])
        raise BacksightError(f"The configuration of {source.name} has no {stray[0]!r}; {known}.")
    return config


def _place(source: Source) -> tuple[str, str | None]:
    """(folder or hub id, revision); a file that is named with a hub's id has that id's configuration."""
    repository, _, revision = str(source.architecture).partition("@")
    return (str(source.folder), None) if source.config else (repository, revision or None)


def transformers_target(
    source: Source, config: Any, pretrained: bool, seed: int, size: Size | None, fill: bool
) -> Target | None:
    """fill=False: on the meta device and without weights, None where its taps are found by a pass."""
    with explained(source, "model of transformers"):
        kind, config = _model_class(source, config)
        with torch.device("meta"):
            own = unique(kind(config).to("meta"))  # some make a tensor where no context reaches
    label, choice = source.label if pretrained else "random", None
    if pretrained and source.checkpoint is not None:
        choice = _transformers_choice(source, source.checkpoint, kind, config, own, fill)
        label = choice.label(label)
    if pretrained and fill:
        model = _loaded(source, kind, config, choice)
    else:
        with seeded(seed), torch.device("cpu" if fill else "meta"), explained(source, kind.__name__):
            model = kind(config).to("cpu" if fill else "meta")
    named = [str(config.id2label[index]) for index in range(config.num_labels)]
    if config.model_type in DETECTORS:
        module, _, adapter = DETECTORS[config.model_type].partition(":")
        provisional = Preprocessing((0.0,) * 3, (1.0,) * 3, (1, 1))  # the model itself says its stride
        detector = getattr(import_module(f"backsight.targets.{module}"), adapter)
        target = detector(model, source.name, provisional, label, named)
        target.preprocessing = _processing(source, config, target.size_step)
        return target
    if not fill:
        return None
    preprocessing, model = _processing(source, config, None), model.eval().requires_grad_(False)
    preprocessing = dataclasses.replace(preprocessing, size=size or preprocessing.size)
    if preprocessing.size != _own_size(config):
        model = _of_any_size(model)
    target = Encoder(model, RECOMMENDED, preprocessing, name=source.name)
    target.weights, target.classes = label, tuple(named) if "Classification" in kind.__name__ else None
    return target


def _model_class(source: Source, config: Any) -> tuple[Any, Any]:
    """(model class, its config): a detector, the class that config.json names, or the part that sees images."""
    import transformers

    if config.model_type in DETECTORS:
        names = ("MODEL_FOR_OBJECT_DETECTION_MAPPING", "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING")
        mappings = [getattr(transformers, name) for name in names]
        return next(mapping[type(config)] for mapping in mappings if type(config) in mapping), config
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


def _transformers_choice(
    source: Source, path: Path, kind: Any, config: Any, own: Mapping[str, Tensor], fill: bool
) -> Choice:
    """The weights of a file, compared with the architecture as far as that can be done before transformers loads it:
    it renames some names as it does, and a weight that is shared has two."""
    tensors = read_tensors(path)
    choice = choose(tensors, own)
    common = [name for name in own if name in choice.state and own[name].ndim == choice.state[name].ndim > 0]
    if not source.config.keys() & {"id2label", "num_labels"}:  # then only the weights say the number of classes
        further = {choice.state[name].shape[0] - own[name].shape[0] for name in common} - {0}
        if len(further) == 1:
            config.num_labels = config.num_labels + further.pop()
            with torch.device("meta"):
                own = unique(kind(config).to("meta"))
    state = choice.state
    if fill:
        own = {name: own[name] for name in common if own[name].shape == state[name].shape}
        known = {name: state[name] for name in own}
    else:  # the shapes of the names that differ have to pair
        missing = Counter(tensor.shape for name, tensor in own.items() if name not in state)
        spare = Counter(tensor.shape for name, tensor in state.items() if name not in own)
        known = {name: t for name, t in own.items() if name not in state and missing[t.shape] <= spare[t.shape]}
        known |= {name: t for name, t in state.items() if name in own or spare[t.shape] > missing[t.shape]}
    if words := misfit(known, own):
        raise unfit(source.name, path, words, choice)
    return choice


def _loaded(source: Source, kind: Any, config: Any, choice: Choice | None) -> nn.Module:
    """The model with its weights (choice, or the hub's) in float32; transformers only warns where they do not fit."""
    where, revision = _place(source)
    # Half-precision files are read as float32, or the processor would run in the file's type.
    settings = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    with seeded(0), _quietly(), explained(source, kind.__name__):
        if choice is None:
            model, report = kind.from_pretrained(where, revision=revision, **settings)
        else:
            model, report = kind.from_pretrained(None, state_dict=choice.state, **settings)
    own = model.state_dict()
    state = {name: tensor for name, tensor in own.items() if name not in report["missing_keys"]}
    state |= {str(name): torch.empty(0) for name in report["unexpected_keys"]}
    state |= {str(name): torch.empty(shape, device="meta") for name, shape, _ in report["mismatched_keys"]}
    path = source.checkpoint or Path(where)
    if words := misfit(state, own):
        raise unfit(source.name, path, words, choice)
    if choice and "vision_config" not in source.config:  # else the other half is left out on purpose
        warn_of_unused(path, [*choice.unused, *sorted(state.keys() - own.keys())])
    return model


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No bar for a load of a fraction of a second, which a saved notebook would keep, and no table of misfits."""
    from transformers.utils import logging as reports

    shown, level = reports.is_progress_bar_enabled(), reports.get_verbosity()
    reports.disable_progress_bar()
    reports.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if shown:
            reports.enable_progress_bar()


def _processing(source: Source, config: Any, step: Size | None) -> Preprocessing:
    """What the model's own image processor does. step: of a detector, whose images may have any aspect ratio."""
    try:
        processor = _processor(source, config)
        if processor is None:  # no file: what its type usually does, at its own size
            processor = _usual(config)()
            if step is None and (own := _own_size(config)):
                processor.size, processor.do_center_crop = {"height": own[0], "width": own[1]}, False
        size, crop = _processed_size(processor, config, step)
        factor = 255.0 * (processor.rescale_factor if processor.do_rescale else 1.0)
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        rows = ([row] * 3 if isinstance(row, (int, float)) else row for row in (mean, std))
        mean, std = ([value / factor for value in row] for row in rows)
        if getattr(processor, "do_flip_channel_order", False):
            raise ValueError("it takes the channels as blue, green, red")
        interpolation = INTERPOLATIONS.get(int(getattr(processor, "resample", None) or 2), "bilinear")
        return checked_preprocessing(source, mean, std, 3, size, interpolation, crop)
    except BacksightError:
        raise
    except Exception as error:  # transformers raises many types on a file that somebody edited
        raise BacksightError(
            f"preprocessor_config.json of {source.name} describes no preprocessing ({reason(error)}): correct it."
        ) from error


def _usual(config: Any) -> Any:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    processors: Any = IMAGE_PROCESSOR_MAPPING.get(type(config), {})
    known = processors.get("torchvision")
    return known or getattr(transformers, PROCESSORS.get(config.model_type, "ViTImageProcessor"))


def _processor(source: Source, config: Any) -> Any:
    """The image processor of a folder or of the hub, None where a folder has none."""
    from transformers import AutoImageProcessor

    where, revision = _place(source)
    if source.config:
        values = read_object(Path(where, "preprocessor_config.json"))
        if not values and not Path(where, "processor_config.json").exists():
            warnings.warn(f"{source.name} has no preprocessor_config.json: images are prepared as usual.", stacklevel=2)
            return None
        if values and not values.keys() & {"image_processor_type", "feature_extractor_type"}:
            return _usual(config).from_pretrained(where)
    return AutoImageProcessor.from_pretrained(where, revision=revision, trust_remote_code=False)


def _processed_size(processor: Any, config: Any, step: Size | None) -> tuple[Size, float]:
    """(H, W) for one batch of images, and what part of the shorter side a centre crop keeps.

    Where a detector's processor keeps the aspect ratio (shortest and longest edge), it is a 4:3 picture of at most 480
    pixels in height: the size at which DETR was inverted in the paper, and a third of the cost of 800 x 1066.
    """
    rule, crop = processor.size, getattr(processor, "crop_size", None)
    if not getattr(processor, "do_resize", True) or not rule:
        return _own_size(config) or (224, 224), 1.0
    short, long = rule.get("shortest_edge"), rule.get("longest_edge")
    if getattr(processor, "do_center_crop", None) and crop:
        return (crop["height"], crop["width"]), crop["height"] / (short or rule.get("height") or crop["height"])
    for kind in ("", "max_"):
        if rule.get(f"{kind}height") and rule.get(f"{kind}width"):
            return (rule[f"{kind}height"], rule[f"{kind}width"]), 1.0
    if step is None or short is None:
        kept = getattr(processor, "crop_pct", None)
        return (short or long, short or long), kept if kept and (short or long) < 384 else 1.0
    height = min(short, LARGEST_HEIGHT)
    width = height if long is not None and long <= short else height * 4 // 3
    return (math.ceil(height / step[0]) * step[0], math.ceil(width / step[1]) * step[1]), 1.0
