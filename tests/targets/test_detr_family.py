"""The detectors of transformers beyond what holds for every family: variants, padding, files and refusals."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from targets.examples import TWO_STAGES, small_detector
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries, Tokens
from backsight.targets import detectors, load_target
from backsight.targets.base import Stage, Target

MODELS: dict[str, Callable[..., Any]] = {
    "detr": partial(small_detector, "detr"),
    "conditional": partial(small_detector, "conditional_detr"),
    "dab": partial(small_detector, "dab-detr"),
    "deformable": partial(small_detector, "deformable_detr"),
    "deformable, two stages": partial(small_detector, "deformable_detr", **TWO_STAGES),
    "rt": partial(small_detector, "rt_detr"),
    "rt, second": partial(small_detector, "rt_detr_v2"),
}
each_model = pytest.mark.parametrize("name", MODELS)


@cache
def model(name: str) -> Any:
    return MODELS[name]()


def _images(batch: int = 2, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def _padding(height: int = 64, width: int = 96) -> Tensor:
    """Of two images: the second is smaller, by lengths that no stride divides."""
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, :, 53:] = True
    padding[1, 41:] = True
    return padding


def _difference(one: Any, other: Any) -> float:
    return max(float((one.logits - other.logits).abs().max()), float((one.boxes - other.boxes).abs().max()))


def _assert_every_tap_continues(target: Any, images: Tensor, padding: Tensor | None) -> None:
    """from_tap of every tap gives the output of the bare model, called without backsight's own forward."""
    normalised = target.preprocessing.normalise(images)
    mask = None
    if padding is not None:
        normalised, mask = normalised.masked_fill(padding[:, None], 0), (~padding).long()
    with torch.no_grad():
        raw = target.model(pixel_values=normalised, pixel_mask=mask)
    expected = Predictions(raw.logits, raw.pred_boxes)
    assert expected.logits.std() > 0.01
    for tap, representation in target.record(images, target.available_taps, padding).items():
        assert _difference(target.from_tap(tap, representation), expected) <= 1e-4, tap


# Variants


def _swin() -> Any:
    from transformers import SwinConfig

    config: Any = SwinConfig
    return config(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3"],
    )


TIMM = {
    "model_type": "timm_backbone",
    "backbone": "test_resnet",
    "features_only": True,
    "use_pretrained_backbone": False,
    "out_indices": [1, 2, 3],
}
VARIANTS: dict[str, Callable[[], Target]] = {
    **MODELS,
    "detr, auxiliary losses": partial(small_detector, "detr", auxiliary_loss=True),
    "detr, timm": partial(small_detector, "detr", backbone_config=TIMM),
    "conditional, auxiliary losses, learned positions": partial(
        small_detector, "conditional_detr", auxiliary_loss=True, position_embedding_type="learned"
    ),
    "dab, patterns, norm behind the encoder": partial(
        small_detector, "dab-detr", num_patterns=2, normalize_before=True, keep_query_pos=True
    ),
    "dab, timm": partial(small_detector, "dab-detr", backbone_config=TIMM),
    "deformable, timm, levels added": partial(
        small_detector, "deformable_detr", backbone_config=TIMM, num_feature_levels=5
    ),
    "deformable, box refinement, learned positions": partial(
        small_detector, "deformable_detr", with_box_refine=True, position_embedding_type="learned"
    ),
    "deformable, swin": partial(small_detector, "deformable_detr", backbone_config=_swin(), **TWO_STAGES),
    "deformable, no encoder": partial(small_detector, "deformable_detr", encoder_layers=0),
    "rt, attention on two levels, one level more": partial(
        small_detector, "rt_detr", encode_proj_layers=[1, 2], encoder_layers=2, num_feature_levels=4
    ),
    "rt, softmax, pre-norm": partial(small_detector, "rt_detr", use_focal_loss=False, normalize_before=True),
    "rt, no attention": partial(small_detector, "rt_detr", encoder_layers=0),
    "rt, anchors": partial(small_detector, "rt_detr", anchor_image_size=[64, 96], eval_size=64),
    "rt, second, discrete": partial(small_detector, "rt_detr_v2", decoder_method="discrete"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_half_a_batch_padded_continues_from_every_tap(name: str) -> None:
    _assert_every_tap_continues(model(name) if name in MODELS else VARIANTS[name](), _images(), _padding())


def test_one_level() -> None:
    target = small_detector("deformable_detr", num_feature_levels=1, backbone_config={**TIMM, "out_indices": [2]})
    tokens = target.record(_images(), ["projection"])["projection"]
    assert isinstance(tokens, Tokens)
    assert tokens.grids == ((8, 12),)
    _assert_every_tap_continues(target, _images(), _padding())


def test_maps_that_are_no_modules_own_are_put_in_all_together() -> None:
    """The levels of a Swin backbone are normed beside the stream, so the coarser ones travel beside a finer one."""
    target = small_detector("deformable_detr", backbone_config=_swin())
    tokens = target.record(_images(), ["backbone.1"])["backbone.1"]
    assert isinstance(tokens, Tokens)
    assert set(tokens.context) == {"backbone.0", "backbone.2"}
    # A model that reads the last map only has nothing to continue from at the others.
    assert small_detector("conditional_detr", backbone_config=_swin()).available_taps[:2] == (
        "backbone.2",
        "projection",
    )


def test_a_map_carries_the_coarser_ones_that_follow_from_it() -> None:
    target = model("deformable")
    recorded = target.record(_images(), ["backbone.0", "backbone.1"])
    assert set(recorded["backbone.0"].context) == set()
    assert set(recorded["backbone.1"].context) == {"backbone.0"}
    changed = recorded["backbone.0"].replace(recorded["backbone.0"].values.flip(1))
    assert _difference(target.from_tap("backbone.0", changed), target(_images())) > 1e-3


# Taps are what they say


@each_model
def test_every_part_has_its_taps(name: str) -> None:
    target = model(name)
    recorded = target.record(_images(), target.available_taps)
    config = target.model.config
    layers = [tap for tap in target.taps if "layers." in tap]
    encoder = config.encoder_layers * len(getattr(config, "encode_proj_layers", [0]))
    assert sum(tap.startswith("encoder") for tap in layers) == encoder
    assert sum(tap.startswith("decoder") for tap in layers) == config.decoder_layers
    assert all(isinstance(recorded[tap], Queries if tap.startswith("decoder") else Tokens) for tap in layers)
    predictions = recorded["predictions"]
    assert isinstance(predictions, Predictions)
    assert predictions.activation == ("softmax" if name == "detr" else "sigmoid")
    assert predictions.objects.shape == (2, 6, 3)
    assert set(target.available_taps) - set(target.taps) == {
        tap for tap in target.available_taps if tap.endswith("attn") or (name == "detr" and tap.startswith("backbone."))
    }


@pytest.mark.parametrize("name", ["conditional", "dab", "deformable", "deformable, two stages"])
def test_taps_agree_with_the_hidden_states_of_transformers(name: str) -> None:
    target = MODELS[name]()  # a model of its own, because transformers leaves hooks in it
    recorded = target.record(_images(), target.available_taps)
    raw = target.model(target.preprocessing.normalise(_images()), output_hidden_states=True)
    torch.testing.assert_close(recorded["projection"].values, raw.encoder_hidden_states[0])
    torch.testing.assert_close(recorded["encoder.layers.0"].values, raw.encoder_hidden_states[1])
    torch.testing.assert_close(recorded["encoder.layers.1"].values, raw.encoder_last_hidden_state)
    torch.testing.assert_close(recorded["decoder.layers.0"].values, raw.decoder_hidden_states[1])
    final = "decoder.layers.1" if name.startswith("deformable") else "decoder.layernorm"
    torch.testing.assert_close(recorded[final].values, raw.last_hidden_state)


@pytest.mark.parametrize("name", ["rt", "rt, second"])
def test_taps_of_the_hybrid_encoder_agree_with_transformers(name: str) -> None:
    target = MODELS[name]()
    recorded = target.record(_images(), target.available_taps)
    raw = target.model(target.preprocessing.normalise(_images()), output_hidden_states=True)
    attended = raw.encoder_hidden_states[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(recorded["encoder.aifi.0.layers.0"].values, attended)
    merged = recorded["encoder.pan_blocks"]
    assert isinstance(merged, Tokens)
    for made, wanted in zip(merged.maps(), raw.encoder_last_hidden_state, strict=True):
        torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(recorded["decoder.layers.1"].values, raw.last_hidden_state)


def test_levels_lie_one_after_the_other_with_their_codes() -> None:
    target, images = model("deformable"), _images()
    tokens = target.record(images, ["encoder.layers.0"])["encoder.layers.0"]
    assert tokens.grids == ((8, 12), (4, 6), (2, 3))
    inner = target.model.model
    first = inner.position_embedding(
        torch.Size([1, 32, 8, 12]), images.device, images.dtype, torch.ones(1, 8, 12, dtype=torch.bool)
    )
    wanted = first.flatten(2).transpose(1, 2) + inner.level_embed[0]
    torch.testing.assert_close(tokens.position[:, :96], wanted)
    assert tokens.position.shape == (1, 126, 32)
    assert target.reduction == (8, 8)


# Padding


def test_padding_is_that_of_the_model_on_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a level does not divide the image (80 / 3), one pixel inside a cell of the finest grid decides."""
    target, images, padding = model("deformable"), _images(2, 80, 112), _padding(80, 112)
    padding[1, 53:] = True
    masks: list[Tensor] = []
    forward = target.model.model.encoder.forward

    def seen(*arguments: Any, **named: Any) -> Any:
        masks.append(named["attention_mask"])
        return forward(*arguments, **named)

    monkeypatch.setattr(target.model.model.encoder, "forward", seen)
    tokens = target.record(images, ["projection"], padding)["projection"]
    target.from_tap("projection", tokens)
    assert tokens.grids == ((10, 14), (5, 7), (3, 4))
    assert torch.equal(tokens.padding, ~masks[0])
    assert torch.equal(masks[1], masks[0])
    assert tokens.padding[1].any()
    assert not tokens.padding[0].any()
    alone = target.record(images, ["backbone.1"], padding)["backbone.1"]
    assert torch.equal(alone.padding, tokens.padding[:, 140:175])


# Refusals


def test_representations_that_do_not_fit_are_refused() -> None:
    target = model("deformable")
    recorded = target.record(_images(), target.available_taps)
    queries, tokens = recorded["decoder.layers.0"], recorded["projection"]
    with pytest.raises(BacksightError, match=r"decoder\.layers\.0 reads the encoder's output"):
        target.from_tap("decoder.layers.0", Queries(queries.values))
    with pytest.raises(BacksightError, match=r"backbone\.1 reads backbone\.0 too"):
        target.from_tap("backbone.1", replace(recorded["backbone.1"], context={}))
    with pytest.raises(BacksightError, match="holds tokens"):
        target.from_tap("projection", queries)
    with pytest.raises(BacksightError, match="cannot stand for it"):
        target.from_tap("projection", Tokens(tokens.values[:, :120], ((8, 12), (4, 6))))
    with pytest.raises(BacksightError, match="cannot stand for it"):
        target.from_tap("projection", Tokens(tokens.values[:, :, :7], tokens.grids))
    model("conditional").from_tap(
        "decoder.layernorm", Queries(model("conditional").record(_images())["decoder.layernorm"].values)
    )


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BacksightError, match="multiples of 16"):
        model("deformable").check_size((64, 72))
    with pytest.raises(BacksightError, match="multiples of 32"):
        model("rt").check_size((64, 80))
    with pytest.raises(BacksightError, match=r"of 6 tokens.*not of 5"):
        small_detector("deformable_detr", **TWO_STAGES, num_feature_levels=2).check_size((16, 16))
    with pytest.raises(BacksightError, match=r"exactly \(64, 96\)"):
        small_detector("rt_detr", anchor_image_size=[64, 96]).check_size((64, 64))
    with pytest.raises(BacksightError, match=r"\(400, 400\)"):
        small_detector("deformable_detr", position_embedding_type="learned").check_size((16, 416))


@pytest.mark.parametrize(
    ("name", "previous", "tap", "stage"),
    [
        ("deformable", "pixels", "backbone.0", Stage("backbone", 0, 2, 40)),
        ("deformable", "backbone.0", "backbone.1", Stage("backbone", 0, 2, 40)),
        ("deformable", "backbone.1", "projection", Stage("projection", 0, 2, 40)),
        ("deformable", "projection", "encoder.layers.1", Stage("encoder", 2, 2, 40)),
        ("deformable", "encoder.layers.0", "encoder.layers.1.attn", Stage("encoder", 1, 2, 40)),
        ("deformable", "encoder.layers.1", "decoder.layers.1", Stage("decoder", 2, 2, 48)),
        ("deformable", "decoder.layers.1", "predictions", Stage("heads", 0, 2, 32)),
        ("dab", "decoder.layers.1", "decoder.layernorm", Stage("norm", 0, 2, 48)),
        ("rt", "projection", "encoder.aifi.0.layers.0", Stage("encoder", 1, 2, 40)),
        ("rt", "encoder.aifi.0.layers.0", "encoder.fpn_blocks", Stage("convolution", 2, 0, 0)),
        ("rt", "encoder.pan_blocks", "decoder_input_proj", Stage("projection", 0, 2, 40)),
        ("rt", "pixels", "predictions", Stage("decoder", 7, 2, 48)),
    ],
)
def test_stages(name: str, previous: str, tap: str, stage: Stage) -> None:
    assert model(name).stage(tap, previous) == stage


def test_components() -> None:
    assert model("deformable").tap_set("components") == (
        "projection",
        "encoder.layers.1",
        "decoder.layers.1",
        "predictions",
    )
    assert model("rt").tap_set("components") == ("projection", "decoder_input_proj", "decoder.layers.1", "predictions")


# Files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where no weights of the project lie, and no network answers."""

    def blocked(*_arguments: Any, **_named: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    return tmp_path


def _save(target: Any, folder: Any, **processor: Any) -> None:
    target.model.save_pretrained(folder)
    settings = {
        "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "size": {"height": 64, "width": 96},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **processor}))


def _edit(folder: Any, **changes: Any) -> None:
    """Change config.json; None takes a key away."""
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    kept = {key: value for key, value in values.items() if changes.get(key, 0) is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@each_model
def test_a_saved_folder_is_loaded_as_it_was(name: str, folder) -> None:
    target = model(name)
    _save(target, folder)
    loaded = load_target(str(folder))
    assert type(loaded) is type(target)
    assert loaded.weights_hash == target.weights_hash
    assert loaded.classes == ("disc", "ring", "star")
    assert loaded.image_size == (64, 96)
    assert loaded.preprocessing.std == (0.4, 0.5, 0.6)
    target.preprocessing, kept = loaded.preprocessing, target.preprocessing
    assert _difference(loaded(_images()), target(_images())) == 0
    target.preprocessing = kept


def test_a_processor_that_does_not_normalise(folder) -> None:
    _save(model("rt"), folder, do_normalize=False)
    assert load_target(str(folder)).preprocessing.std == (1.0, 1.0, 1.0)
    (folder / "preprocessor_config.json").unlink()
    preprocessing = load_target(str(folder)).preprocessing
    assert (preprocessing.mean, preprocessing.size) == ((0.0, 0.0, 0.0), (640, 640))


@pytest.mark.parametrize("name", ["detr", "dab", "deformable, two stages", "rt, second"])
def test_another_number_of_classes(name: str, folder) -> None:
    """As config.json says; where it says nothing, as the checkpoint's head has it."""
    build = MODELS[name]
    target = build(id2label={number: f"class {number}" for number in range(5)})
    _save(target, folder)
    assert load_target(str(folder)).classes == tuple(f"class {number}" for number in range(5))
    _edit(folder, id2label=None, label2id=None)
    loaded: Any = load_target(str(folder))
    assert loaded.weights_hash == target.weights_hash
    assert loaded.model.config.num_labels == 5
    _edit(folder, num_labels=4)
    with pytest.raises(BacksightError, match=r"of another shape \(.*\([56], 32\) instead of"):
        load_target(str(folder))


def test_a_misfit_names_the_keys_that_differ(folder) -> None:
    _save(model("deformable"), folder)
    path = folder / "model.safetensors"
    whole = load_file(path)
    lacking = {name: tensor for name, tensor in whole.items() if ".encoder.layers.1." not in name}
    lacking["model.encoder.layers.7.bias"] = torch.zeros(3)
    lacking["model.level_embed"] = torch.zeros(4, 32)
    save_file(lacking, path, {"format": "pt"})
    with pytest.raises(BacksightError) as caught:
        load_target(str(folder))
    message = str(caught.value)
    assert "missing" in message
    assert "unexpected" in message
    assert "1 of another shape (model.level_embed (4, 32) instead of (3, 32))" in message
    assert "\n" not in message


def test_left_over_weights_matter_where_they_are_of_a_layer(folder) -> None:
    _save(model("conditional"), folder)
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({**whole, "some.counter": torch.zeros(1)}, path, {"format": "pt"})
    load_target(str(folder))
    save_file({**whole, "model.decoder.layers.2.mlp.fc1.bias": torch.zeros(48)}, path, {"format": "pt"})
    with pytest.raises(BacksightError, match=r"unexpected .*model\.decoder\.layers\.2\.mlp\.fc1\.bias"):
        load_target(str(folder))


def test_a_checkpoint_in_the_older_format(folder) -> None:
    """All weights of this model begin with "model.", which a reader of checkpoints may take for a wrapper."""
    _save(model("rt"), folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_target(str(folder)).weights_hash == model("rt").weights_hash


def test_half_precision_runs_in_single(folder) -> None:
    halved = small_detector("deformable_detr")
    halved.model.half()
    _save(halved, folder)
    assert {each.dtype for each in load_target(str(folder)).model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "type 'bert'"),
        ({"model_type": None}, "model_type"),
        ({"d_model": "wide"}, "describes no"),
        ({"two_stage": True, "with_box_refine": False}, "describes no"),
    ],
)
def test_configurations_that_are_none_of_ours(folder, changes: dict[str, Any], said: str) -> None:
    _save(model("deformable"), folder)
    _edit(folder, **changes)
    with pytest.raises(BacksightError, match=said):
        load_target(str(folder))


def test_the_shipped_deformable_detr() -> None:
    target = load_target("scenes-deformable-detr", taps="fine")
    assert isinstance(target, detectors.DeformableDetr)
    _assert_every_tap_continues(target, _images(2, *target.image_size), None)
