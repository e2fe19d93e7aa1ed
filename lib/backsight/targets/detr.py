"""DETR of transformers: DetrForObjectDetection, any backbone.

    pixels ─► backbone ─► projection ─► encoder.layers.i ─► decoder.layers.i ─► decoder.layernorm ─► predictions
              (Tokens, channels of      (Tokens with        (Queries)           (Queries)            (Predictions)
               the last stage)           positional code)

Facts of transformers 5.23 that the taps stand on: `decoder.layers.i` is the layer's own output, before the final
`decoder.layernorm`; with `auxiliary_loss=True` the decoder feeds the *normalised* stream to its next layer, which
`from_tap` follows; the first self-attention sees zeros, so `decoder.layers.0.attn` is the same for every image.
Half-steps (`.attn`, `.cross_attn`) are the stream after their own layer norm, as DETR normalises after each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries, Representation, Tokens
from backsight.targets import sources
from backsight.targets.base import PIXELS, Family, Preprocessing, Site, Size, Stage, Target, seeded
from backsight.targets.sources import Source

# Published models whose architecture is known without asking the hub: (timm backbone, dilated last stage).
PUBLISHED = {
    "facebook/detr-resnet-50": ("resnet50", False),
    "facebook/detr-resnet-101": ("resnet101", False),
    "facebook/detr-resnet-50-dc5": ("resnet50", True),
    "facebook/detr-resnet-101-dc5": ("resnet101", True),
}
PUBLISHED_LABELS = 91  # COCO identifiers 0 to 90
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEARNED_POSITIONS = 50  # rows and columns that DetrLearnedPositionEmbedding has
PROBE = 128  # pixels of the blank image that measures the backbone's stride


class Detr(Target):
    """A transformers DetrForObjectDetection. Its output is Predictions."""

    kind = "detector"
    model: Any

    @property
    def available_taps(self) -> tuple[str, ...]:
        return self._taps_with(halves=True)

    def _taps_with(self, halves: bool) -> tuple[str, ...]:
        config = self.model.config
        encoder = (".attn", "") if halves else ("",)
        decoder = (".attn", ".cross_attn", "") if halves else ("",)
        return (
            "backbone",
            "projection",
            *(f"encoder.layers.{i}{step}" for i in range(config.encoder_layers) for step in encoder),
            *(f"decoder.layers.{i}{step}" for i in range(config.decoder_layers) for step in decoder),
            "decoder.layernorm",
            "predictions",
        )

    def tap_set(self, name: str) -> tuple[str, ...]:
        if name == "components":
            last = self.model.config.encoder_layers - 1
            return ("projection", f"encoder.layers.{last}", "decoder.layernorm", "predictions")
        return self._taps_with(halves=name == "fine")

    @cached_property
    def _stride(self) -> Size:
        blank = torch.zeros(1, 3, PROBE, PROBE, device=self.device)
        with torch.no_grad():
            features, _ = self.model.model.backbone(blank, blank[:, 0] + 1)[-1]
        return PROBE // features.shape[2], PROBE // features.shape[3]

    @property
    def reduction(self) -> Size:
        return self._stride

    def check_size(self, size: Size) -> None:
        down, across = self.reduction
        if min(size) < 1 or size[0] % down or size[1] % across:
            raise BacksightError(
                f"{self.name} takes images whose height is a multiple of {down} and whose width is a multiple of "
                f"{across} (height, width), not {tuple(size)}."
            )
        if (
            self.model.config.position_embedding_type == "learned"
            and max(size[0] // down, size[1] // across) > LEARNED_POSITIONS
        ):
            raise BacksightError(
                f"{self.name} has learned positions for {LEARNED_POSITIONS} rows and columns of tokens: the largest "
                f"image is {(LEARNED_POSITIONS * down, LEARNED_POSITIONS * across)}, not {tuple(size)}."
            )

    def stage(self, tap: str, previous: str) -> Stage:
        """What lies between two taps; a span over several parts is named after its hardest one.

        From a map or the pixels to queries or predictions: decoder; from the pixels to a map: backbone; from a map
        to a later one: encoder, or projection where no layer lies between; from queries to predictions: heads.
        depth counts encoder and decoder layers together.
        """
        self._refuse_order(tap, previous)
        config = self.model.config
        order = self.available_taps
        steps = order[0 if previous == PIXELS else order.index(previous) + 1 : order.index(tap) + 1]
        in_encoder = sum(step.startswith("encoder.") for step in steps)
        in_decoder = sum(step.startswith("decoder.layers") for step in steps)
        depth = math.ceil(Fraction(in_encoder, 2) + Fraction(in_decoder, 3))
        encoder = (int(config.encoder_attention_heads), int(config.encoder_ffn_dim))
        decoder = (int(config.decoder_attention_heads), int(config.decoder_ffn_dim))
        from_map = previous == PIXELS or not previous.startswith("decoder")
        if tap.startswith("decoder") or tap == "predictions":
            if from_map or any(step.startswith("decoder.layers") for step in steps):
                return Stage("decoder", depth, *decoder)
            if tap == "decoder.layernorm":
                return Stage("norm", 0, *decoder)
            return Stage("heads", 0, decoder[0], int(config.d_model))
        if previous == PIXELS:
            return Stage("backbone", depth, *encoder)
        return Stage("encoder" if depth else "projection", depth, *encoder)

    def _sites(self, taps: Sequence[str]) -> dict[str, Site]:
        sites = {tap: self._site(tap) for tap in taps if tap != "predictions"}
        sites["mask"] = Site(self.model.model.backbone, read=lambda out: (out[-1][0].shape[-2:], out[-1][1]))
        if any(tap.startswith("decoder") for tap in taps):
            sites["memory"] = Site(self.model.model.encoder, read=lambda out: out[0])
        return sites

    def _site(self, tap: str) -> Site:
        model = self.model.model
        if tap == "backbone":
            return Site(model.backbone, read=lambda out: out[-1][0])
        if tap == "projection":
            return Site(model.input_projection)
        if tap == "decoder.layernorm":
            return Site(model.decoder.layernorm)
        part, index, step = _parts(tap)
        layer = getattr(model, part).layers[index]
        if not step:
            return Site(layer)
        return Site(layer.self_attn_layer_norm if step == "attn" else layer.encoder_attn_layer_norm)

    def _canonical(
        self, taps: Sequence[str], seen: Mapping[str, Any], output: Any, images: Tensor, padding: Tensor | None
    ) -> dict[str, Representation]:
        (height, width), mask = seen["mask"]
        grid = (int(height), int(width))
        token_padding = None if padding is None else ~mask.flatten(1)
        position = self._position(grid, token_padding, output.boxes)

        def tokens(values: Tensor, code: Tensor | None) -> Tokens:
            return Tokens(values, (grid,), 0, token_padding, code)

        def canonical(tap: str) -> Representation:
            if tap == "predictions":
                return output
            if tap == "backbone":
                return tokens(_flat(seen[tap]), None)
            if tap == "projection":
                return tokens(_flat(seen[tap]), position)
            if tap.startswith("encoder"):
                return tokens(seen[tap], position)
            return Queries(seen[tap], context=tokens(seen["memory"], position))

        return {tap: canonical(tap) for tap in taps}

    def _position(self, grid: Size, padding: Tensor | None, like: Tensor) -> Tensor:
        """(1 or B, N, d_model) positional code, by the model's own module; one for all images without padding."""
        if padding is None:
            mask = torch.ones((1, *grid), dtype=torch.bool, device=like.device)
        else:
            mask = ~padding.unflatten(1, grid)
        shape = torch.Size([mask.shape[0], self.model.config.d_model, *grid])
        return _flat(self.model.model.position_embedding(shape, like.device, like.dtype, mask))

    def _forward(self, images: Tensor, padding: Tensor | None) -> Predictions:
        mask = None if padding is None else (~padding).long()
        output = self.model(pixel_values=images, pixel_mask=mask)
        return Predictions(output.logits, output.pred_boxes)

    def _rest(self, tap: str, representation: Any) -> Predictions:
        if tap == "predictions":
            return self._expect(tap, representation, Predictions)
        if tap.startswith("decoder"):
            return self._rest_of_decoder(tap, self._expect(tap, representation, Queries))
        tokens = self._expect(tap, representation, Tokens)
        values = tokens.values
        if tap == "backbone":
            values = _flat(self.model.model.input_projection(tokens.map()))
        position = self._position(tokens.grids[0], tokens.padding, values)
        mask = self._attention_mask(self.model.model.encoder.config, values, values, tokens.padding)
        layers = self.model.model.encoder.layers
        following = 0
        if tap.startswith("encoder"):
            _, index, step = _parts(tap)
            following = index + 1
            if step:
                values = _after_attention(layers[index], values)
        for layer in layers[following:]:
            values = layer(values, mask, spatial_position_embeddings=position.expand(tokens.batch, -1, -1))
        memory = Tokens(values, tokens.grids, 0, tokens.padding, position)
        queries = torch.zeros_like(self._query_positions(tokens.batch))
        return self._heads(self._decode(queries, 0, memory))

    def _rest_of_decoder(self, tap: str, queries: Queries) -> Predictions:
        if tap == "decoder.layernorm":
            return self._heads(queries.values)
        if queries.context is None:
            raise BacksightError(
                f"The rest of {self.name} behind {tap} reads the encoder's output, but these queries carry no "
                "context: pass queries from record(), or give them one with dataclasses.replace."
            )
        _, index, step = _parts(tap)
        layer, values, memory = self.model.model.decoder.layers[index], queries.values, queries.context
        if step == "attn":
            values = self._cross_attend(layer, values, memory)
        if step:
            values = _after_attention(layer, values)
        return self._heads(self._decode(self._between_layers(values), index + 1, memory))

    def _decode(self, values: Tensor, first: int, memory: Tokens) -> Tensor:
        """The decoder from layer `first` on, final layer norm included."""
        decoder = self.model.model.decoder
        position = self._position(memory.grids[0], memory.padding, values)
        mask = self._attention_mask(decoder.config, values, memory.values, memory.padding)
        for layer in decoder.layers[first:]:
            values = layer(
                values,
                None,
                position.expand(memory.batch, -1, -1),
                self._query_positions(memory.batch),
                memory.values,
                encoder_attention_mask=mask,
            )
            values = self._between_layers(values)
        return decoder.layernorm(values)

    def _between_layers(self, values: Tensor) -> Tensor:
        return self.model.model.decoder.layernorm(values) if self.model.config.auxiliary_loss else values

    def _cross_attend(self, layer: Any, values: Tensor, memory: Tokens) -> Tensor:
        attended, _ = layer.encoder_attn(
            hidden_states=values,
            key_value_states=memory.values,
            attention_mask=self._attention_mask(self.model.model.decoder.config, values, memory.values, memory.padding),
            position_embeddings=self._query_positions(memory.batch),
            encoder_position_embeddings=self._position(memory.grids[0], memory.padding, values).expand(
                memory.batch, -1, -1
            ),
        )
        return layer.encoder_attn_layer_norm(values + attended)

    def _query_positions(self, batch: int) -> Tensor:
        return self.model.model.query_position_embeddings.weight.unsqueeze(0).expand(batch, -1, -1)

    def _attention_mask(self, config: Any, values: Tensor, keys: Tensor, padding: Tensor | None) -> Any:
        from transformers.masking_utils import create_bidirectional_mask

        if padding is None:
            return None
        return create_bidirectional_mask(
            config=config, inputs_embeds=values, attention_mask=~padding, encoder_hidden_states=keys
        )

    def _heads(self, values: Tensor) -> Predictions:
        return Predictions(self.model.class_labels_classifier(values), self.model.bbox_predictor(values).sigmoid())

    def _expect(self, tap: str, representation: Any, kind: Any) -> Any:
        if not isinstance(representation, kind):
            raise BacksightError(
                f"{tap} of {self.name} holds {kind.__name__.lower()}, "
                f"not a representation {getattr(representation, 'signature', type(representation).__name__)}."
            )
        if kind is not Predictions:
            channels = self.model.config.d_model
            if tap == "backbone":
                channels = self.model.model.input_projection.in_channels
            if representation.channels != channels:
                raise BacksightError(f"{tap} of {self.name} has {channels} channels, not {representation.channels}.")
        return representation

    def _randomised(self) -> nn.Module:
        return type(self.model)(self.model.config)


def _flat(feature_map: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C), row-major."""
    return feature_map.flatten(2).transpose(1, 2)


def _parts(tap: str) -> tuple[str, int, str]:
    """ "decoder.layers.2.attn" to ("decoder", 2, "attn")."""
    part, _, index, *step = tap.split(".")
    return part, int(index), step[0] if step else ""


def _after_attention(layer: Any, values: Tensor) -> Tensor:
    """The MLP half of an encoder or decoder layer."""
    return layer.final_layer_norm(values + layer.mlp(values))


# Building: a save_pretrained folder, a checkpoint beside its config.json, or a hub id


def _config(source: Source) -> Any:
    """The DetrConfig of a source, with an explicit backbone that asks no network."""
    from transformers import DetrConfig

    if source.config:
        values = dict(source.config)
    elif sources.cached_file(source.name, ["config.json"]) or source.name not in PUBLISHED:
        values = sources.read_json(sources.hub_file(source.name, source.name, ["config.json"]))
    else:
        backbone, dilation = PUBLISHED[source.name]
        values = {"backbone": backbone, "dilation": dilation, "num_labels": PUBLISHED_LABELS}
    if values.get("model_type", "detr") != "detr":
        raise BacksightError(
            f"{source.name} is a transformers model of the type {values['model_type']!r}, and only detr is taken: "
            "use a timm name for a ViT, or module_target() for other models."
        )
    if values.get("backbone_config") is None:
        values["backbone_config"] = {
            "model_type": "timm_backbone",
            "backbone": values.get("backbone") or "resnet50",
            "num_channels": values.get("num_channels", 3),
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [1, 2, 3, 4],
            **({"output_stride": 16} if values.get("dilation") else {}),
        }
    for key in ("backbone", "backbone_kwargs", "use_timm_backbone", "use_pretrained_backbone"):
        values.pop(key, None)
    try:
        return DetrConfig.from_dict(values)
    except Exception as error:  # transformers raises many types on a config that somebody edited
        reason = " ".join(str(error).split())[:200]
        raise BacksightError(f"The config.json of {source.name} describes no DETR ({reason}): correct it.") from error


def _constructed(source: Source, config: Any) -> Any:
    from transformers import DetrForObjectDetection

    try:
        return DetrForObjectDetection(config)
    except (TypeError, ValueError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BacksightError(f"The config.json of {source.name} describes no DETR ({reason}): correct it.") from error


def _files(source: Source) -> tuple[Path, Path | None]:
    """(checkpoint, preprocessor_config.json or None), local, cached or fetched."""
    if source.folder is not None:
        if source.checkpoint is None:
            raise BacksightError(
                f"The folder of {source.name} has no {sources.CHECKPOINT_NAMES[0]}: put the weights there."
            )
        return source.checkpoint, source.folder
    checkpoint = sources.hub_file(source.name, source.name, sources.CHECKPOINT_NAMES[:2])
    sources.hub_file(source.name, source.name, ["preprocessor_config.json"])
    return checkpoint, checkpoint.parent


def _preprocessing(source: Source, folder: Path | None, stride: Size) -> Preprocessing:
    """From preprocessor_config.json; without one, what DetrImageProcessor does by default."""
    values: Mapping[str, Any] = {}
    if folder is None:
        found = sources.cached_file(source.name, ["preprocessor_config.json"])
        folder = found.parent if found else None
    if folder is not None:
        values = sources.read_json(folder / "preprocessor_config.json")
        values = values or sources.read_json(folder / "processor_config.json").get("image_processor", {})
    size = values.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    height, width = _image_size(size, stride)
    return Preprocessing(
        mean=tuple(values.get("image_mean", IMAGENET_MEAN)),
        std=tuple(values.get("image_std", IMAGENET_STD)),
        size=(height, width),
        interpolation=INTERPOLATIONS.get(values.get("resample", 2), "bilinear"),
        square=height == width,
    )


def _image_size(size: Any, stride: Size) -> Size:
    """(H, W) for one batch of images: the configured size, or a 4:3 picture of at most 480 pixels in height.

    DETR keeps the aspect ratio (shortest and longest edge); 480 x 640 is the size at which it was inverted in the
    paper, and costs a third of 800 x 1066.
    """
    if isinstance(size, Mapping) and "height" in size:
        return int(size["height"]), int(size["width"])
    short = size.get("shortest_edge", 800) if isinstance(size, Mapping) else size
    long = size.get("longest_edge") if isinstance(size, Mapping) else None
    height = min(int(short), 480)
    width = height if long is not None and long <= short else height * 4 // 3
    return _round_up(height, stride[0]), _round_up(width, stride[1])


def _round_up(length: int, step: int) -> int:
    return math.ceil(length / step) * step


def _target(source: Source, model: Any, folder: Path | None, weights: str) -> Detr:
    classes = [model.config.id2label[index] for index in range(model.config.num_labels)]
    provisional = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, (PROBE, PROBE))
    target = Detr(model, source.name, provisional, weights, classes)
    target.preprocessing = _preprocessing(source, folder, target.reduction)
    return target


def _skeleton(source: Source) -> Target:
    config = _config(source)
    with torch.device("meta"):
        return _target(source, _constructed(source, config), source.folder, "none")


def _load(source: Source, pretrained: bool, seed: int) -> Target:
    if not pretrained:
        config = _config(source)
        with seeded(seed):
            model = _constructed(source, config)
        return _target(source, model, source.folder, "random")
    checkpoint, folder = _files(source)
    return _target(source, _loaded(source, _config(source), checkpoint), folder, source.label)


def _loaded(source: Source, config: Any, checkpoint: Path) -> Any:
    """The model with the checkpoint's weights; transformers only warns about missing ones, this refuses them."""
    from transformers import DetrForObjectDetection

    state = sources.read_checkpoint(checkpoint)
    try:
        with seeded(0), _without_progress_bar():
            # Half-precision files are read as float32, or the processor would run in the file's type.
            loaded: Any = DetrForObjectDetection.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
            )
            model, report = loaded
    except Exception as error:  # transformers raises many types on files that do not fit
        reason = " ".join(str(error).split())[:200]
        raise BacksightError(
            f"{checkpoint.name} does not fit {source.name} ({reason}): it belongs to another architecture."
        ) from error
    if missing := sorted(str(key) for key in report["missing_keys"]):
        raise BacksightError(
            f"{checkpoint.name} of {source.name} lacks {len(missing)} weights of the architecture, {missing[0]} among "
            "them: it belongs to another model or is incomplete."
        )
    return model


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """No bar for a load of a fraction of a second, which a saved notebook would keep."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# The family, as the registry sees it


def _claims(source: Source) -> bool:
    if source.config:
        return "model_type" in source.config
    name = source.architecture or ""
    return name in PUBLISHED or (name.count("/") == 1 and ":" not in name)


def _check(source: Source) -> None:
    if source.checkpoint is not None:
        sources.compare_shapes(source, _skeleton(source).model.state_dict(), renamed=True)
        return
    if source.folder is not None:
        _files(source)
    for filename in ("config.json", *sources.CHECKPOINT_NAMES[:1]):
        if sources.cached_file(source.name, [filename]) is None:
            sources.refuse_unreachable(source.name, source.name, filename)


def _listed() -> dict[str, str]:
    return {name: name for name in PUBLISHED}


def _names() -> list[str]:
    return list(PUBLISHED)


FAMILY = Family("transformers DETR", "detector", _claims, _skeleton, _load, _check, _listed, _names)
