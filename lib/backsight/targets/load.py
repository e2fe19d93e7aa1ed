"""A name becomes a frozen model with its own preprocessing: shipped, of timm, of transformers, with any checkpoint.

scenes-vit                                      shipped, in data/weights
vit_base_patch16_224, hf-hub:owner/name         timm, which fetches, builds and fills its models itself
facebook/detr-resnet-50, facebook/dinov2-small  transformers: a detector, an encoder or a classifier
path/to/folder, local-dir:path/to/folder        of either, with config.json
NAME@path/to/checkpoint                         the architecture of a name or folder, the weights of a file
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.targets.base import Precision, Preprocessing, Size, Target, seeded
from backsight.targets.checkpoints import Choice, choose, misfit, read_tensors, unfit, warn_of_unused
from backsight.targets.hugging_face import DETECTORS, configuration, transformers_target
from backsight.targets.names import (
    SHIPPED,
    USUAL,
    Source,
    checked_preprocessing,
    explained,
    is_local,
    reason,
    resolve,
    shipped_names,
)
from backsight.targets.timm_models import TimmTarget


def load_target(
    name: str,
    taps: str | Sequence[str] | None = "blocks",
    pretrained: bool = True,
    seed: int = 0,
    device: torch.device | str = "auto",
    dtype: Precision = "float32",
    image_size: int | Size | None = None,
    **model_arguments: Any,
) -> Target:
    """A frozen target with its own preprocessing; this file's head says which names there are.

    taps: "blocks" (the default), "components", "fine" or tap names; pretrained=False: random weights from `seed`,
    recorded as weights="random"; device: "auto" is cuda where there is one, else cpu; dtype: of the passes;
    image_size: side or (H, W), other than the model's own; model_arguments: of timm's model or transformers' config.
    Raises BacksightError, with nearest names, on an unknown name or tap, and where weights are missing, corrupt or of
    another model.
    """
    target = _built(resolve(name), pretrained, seed, image_size, model_arguments)
    assert target is not None
    if taps is not None:
        target = target.select(taps)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return target.to(device) if dtype == "float32" else target.to(device, dtype)
    except (RuntimeError, AssertionError) as error:
        raise BacksightError(f"The device {device!r} cannot be used here ({reason(error)}).") from error


def check_target(
    name: str, taps: str | Sequence[str] | None = None, image_size: int | Size | None = None, pretrained: bool = True
) -> None:
    """Raise BacksightError if `name` cannot be loaded here, has not these taps or takes no images of this size.

    The model is built without its weights; those of a file are compared with it, others have to be reachable.
    """
    source = resolve(name)
    if pretrained:
        _built(source, True, 0, None, {}, fill=False)
    if taps is not None or image_size is not None:
        target = _built(source, False, 0, None, {}, fill=False) or _built(source, False, 0, None, {})
        assert target is not None
        target.resolve_taps("blocks" if taps is None else taps)
        if image_size is not None:
            target.check_size(_size(image_size))


def list_targets() -> list[dict[str, str]]:
    """What can be inverted here and now: name, kind, status ("ready", "damaged", "to fetch" or "missing"), needs.

    Any other name of timm or transformers, folder or checkpoint works too; these are the usual ones.
    """
    rows = []
    for name in dict.fromkeys([*shipped_names(), *SHIPPED]):
        row = ("shipped", "missing", "notebooks/01_targets.ipynb")
        if name in shipped_names():
            try:
                detector = resolve(name).config.get("model_type") in DETECTORS
                row = ("detector" if detector else "classifier", "ready", "")
            except BacksightError as error:
                row = ("shipped", "damaged", str(error))
        rows.append((name, *row))
    for name in USUAL:
        kind = "detector" if any(word in name for word in ("detr", "yolos", "mask2former")) else "classifier"
        rows.append((name, kind, *(("ready", "") if is_local(name) else ("to fetch", "its weights, once"))))
    return [dict(zip(("name", "kind", "status", "needs"), row, strict=True)) for row in rows]


def _size(size: int | Size) -> Size:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise BacksightError(f"An image size is a side or (height, width) in pixels, not {size!r}.")
    return pair[0], pair[1]


def _built(
    source: Source,
    pretrained: bool,
    seed: int,
    image_size: int | Size | None,
    arguments: Mapping[str, Any],
    fill: bool = True,
) -> Target | None:
    """The target; fill=False: on the meta device and without weights, None where its taps are found by a pass."""
    from huggingface_hub import constants

    size = None if image_size is None else _size(image_size)
    if pretrained and source.folder is not None and source.checkpoint is None:
        raise BacksightError(f"The folder of {source.name} has no model.safetensors: put the weights there.")
    if pretrained and source.folder is None and constants.HF_HUB_OFFLINE and not is_local(source.name):
        with explained(source, "model"):
            raise OSError("offline")
    config = None if source.is_timm else configuration(source, arguments)
    if config is not None and config.model_type == "timm_wrapper":
        source, config = dataclasses.replace(source, architecture=f"hf-hub:{source.architecture}"), None
    if config is None:
        target = _timm(source, pretrained, seed, size, dict(arguments), fill)
    else:
        target = transformers_target(source, config, pretrained, seed, size, fill)
    if size is not None and target is not None:
        target.preprocessing = dataclasses.replace(target.preprocessing, size=size)
        target.check_size(size)
    return target


def _timm(
    source: Source, pretrained: bool, seed: int, size: Size | None, arguments: dict[str, Any], fill: bool
) -> Target | None:
    from timm.models import VisionTransformer

    arguments = {**(source.config.get("arguments") or source.config.get("model_args") or {}), **arguments}
    if size is not None:  # built for it where the model takes a size, run at it as it is where it does not
        with contextlib.suppress(BacksightError), torch.device("meta"):
            _constructed(source, {**arguments, "img_size": size})
            arguments["img_size"] = size
    path, label, state = source.checkpoint, source.label, None
    if path is not None and path.suffix == ".npz":
        arguments["num_classes"] = _npz_classes(path)
    elif path is not None:
        arguments, choice = _timm_choice(source, path, arguments)
        state, label = choice.state, choice.label(source.label)
    with seeded(seed), torch.device("cpu" if fill else "meta"):
        model = _constructed(source, arguments, pretrained and path is None and fill)
    if pretrained and fill and path is not None:
        with explained(source, f"model that {path.name} fits"):
            model.load_pretrained(str(path)) if state is None else model.load_state_dict(state)
    preprocessing, classes = _timm_preprocessing(source, model, arguments, size), _timm_classes(source, model)
    weights = label if pretrained else "random"
    build = None if isinstance(model, VisionTransformer) else functools.partial(_constructed, source, arguments)
    return TimmTarget(model, source.name, weights, preprocessing, classes, build=build)


def _constructed(
    source: Source, arguments: Mapping[str, Any], pretrained: bool = False, settings: Mapping[str, Any] | None = None
) -> Any:
    """A timm model; settings: over its pretrained configuration. Raises BacksightError where it cannot be built."""
    import timm

    named = str(source.architecture or source.config.get("architecture", "VisionTransformer"))
    fields = {field.name for field in dataclasses.fields(timm.models.PretrainedCfg)} - {"architecture"}
    overlay = {**(source.config.get("pretrained_cfg") or {}), **source.config, **(settings or {})}
    overlay = {key: value for key, value in overlay.items() if key in fields}
    with explained(source, named):
        if "arguments" in source.config:  # shipped ones name timm's class
            return getattr(timm.models, named)(**arguments)
        arguments = {key: _layer(key, value) for key, value in arguments.items()}
        return timm.create_model(named, pretrained, pretrained_cfg_overlay=overlay, **arguments)


def _layer(argument: str, value: Any) -> Any:
    """Layers may be named in config.json; of these timm itself reads only norms, activations and attentions."""
    import timm

    if argument not in ("mlp_layer", "embed_layer", "block_fn") or not isinstance(value, str):
        return value
    layers = {**vars(timm.layers), **vars(timm.models.vision_transformer)}
    if value not in layers:
        raise BacksightError(f"timm has no layer {value!r} for {argument}; {nearest(value, [*layers])}.")
    return layers[value]


def _timm_choice(source: Source, path: Path, arguments: dict[str, Any]) -> tuple[dict[str, Any], Choice]:
    """The weights of a file, and the arguments with the number of classes and the image size that they are for."""
    tensors = read_tensors(path)
    while True:
        with torch.device("meta"):
            model = _constructed(source, arguments)
        own = model.state_dict()
        choice = choose(tensors, own)
        state, changes = choice.state, _size_in(model, choice.state, arguments)
        if not changes and misfit(state, own) and "arguments" not in source.config:
            state = _as_timm_reads(source, model, arguments, state)
        changes = changes or _classes_in(model, state)
        if not changes or changes.items() <= arguments.items():
            break
        arguments = {**arguments, **changes}
    if words := misfit(state, own):
        raise unfit(source.name, path, words, choice)
    warn_of_unused(path, [*choice.unused, *sorted(state.keys() - own.keys())])
    return arguments, dataclasses.replace(choice, state={name: state[name] for name in own})


def _size_in(model: Any, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The image size that the position embedding of a file is for, where that is another than the model's."""
    position, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    embed: Any = getattr(model, "patch_embed", None)
    if position is None or not isinstance(own, Tensor) or not position.ndim == own.ndim == 3:
        return {}
    if "img_size" in arguments or position.shape[1] == own.shape[1] or not hasattr(embed, "patch_size"):
        return {}
    rows, columns = embed.grid_size
    for prefix in (own.shape[1] - rows * columns, 1, 0):  # files of other projects keep a class token there
        side = math.isqrt(max(position.shape[1] - prefix, 0))
        if side and side * side == position.shape[1] - prefix:
            size = (side * embed.patch_size[0], side * embed.patch_size[1])
            return {} if (side, side) == (rows, columns) else {"img_size": size}
    return {}


def _classes_in(model: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The number of classes of a file's head, 0 where only the head is lacking, if that is another than the model's."""
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else heads
    rows = [state[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state]
    lacking = [name for name in model.state_dict() if name not in state]
    if not rows and (not lacking or any(not name.startswith(tuple(f"{head}." for head in heads)) for name in lacking)):
        return {}
    classes = rows[0] if rows else 0
    return {} if classes == model.num_classes else {"num_classes": classes}


def _as_timm_reads(
    source: Source, model: Any, arguments: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What timm's own loading makes of a file: other layouts are renamed (DINOv2, CLIP, DeiT-3), position embeddings
    resampled. Which filter a model has only its entry point knows, so the state is caught where it would be loaded."""
    caught: dict[str, Tensor] = {}

    def catch(_model: nn.Module, filtered: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        caught.update(filtered)
        return nn.modules.module._IncompatibleKeys([], [])

    settings: dict[str, Any] = dict.fromkeys(("url", "file", "source", "hf_hub_id", "hf_hub_filename"))
    settings |= {"state_dict": dict(state), "custom_load": False, "num_classes": model.num_classes}
    loading = mock.patch.object(nn.Module, "load_state_dict", catch)
    with contextlib.suppress(BacksightError), torch.device("meta"), loading:
        _constructed(source, arguments, True, settings)
    return caught or dict(state)


def _npz_classes(path: Path) -> int:
    """Of Google's files of ViT, MLP-Mixer and BiT, which timm reads with the model's own load_pretrained."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return next((int(file[name].shape[-1]) for name in file.files if name.endswith("head/bias")), 0)
    except (OSError, ValueError, EOFError) as error:
        raise BacksightError(f"The checkpoint {path.name} is corrupt or no .npz file ({reason(error)}).") from error


def _timm_preprocessing(source: Source, model: Any, arguments: Mapping[str, Any], size: Size | None) -> Preprocessing:
    """As the description says, or the model's own configuration; at the size that the model was built for."""
    from timm.data import resolve_model_data_config

    data = source.config if "arguments" in source.config else resolve_model_data_config(model)
    built = arguments.get("img_size") or getattr(getattr(model, "patch_embed", None), "img_size", None)
    built = size or ((built, built) if isinstance(built, int) else tuple(built or data["input_size"][1:]))
    crop, interpolation = float(data.get("crop_pct") or 1.0), str(data.get("interpolation") or "bicubic")
    channels = arguments.get("in_chans") or 3
    return checked_preprocessing(source, data["mean"], data["std"], channels, built, interpolation, crop)


def _timm_classes(source: Source, model: Any) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    settings = source.config.get("pretrained_cfg") or {}
    labels = source.config.get("classes") or source.config.get("label_names") or settings.get("label_names")
    if not labels and "arguments" not in source.config and model.num_classes > 0:
        subset = infer_imagenet_subset(model)
        labels = ImageNetInfo(subset).label_descriptions() if subset else None
    return tuple(map(str, labels)) if labels and len(labels) == model.num_classes else None
