"""Mask2Former: what goes around the encoder, the masks that its decoder looks through, and boxes from masks."""

from pathlib import Path

import pytest
import torch
from targets.examples import FOUR_MAPS, small_detector
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries, Tokens
from backsight.targets import load_target
from backsight.targets.base import Stage
from backsight.targets.detectors import Mask2Former, soft_boxes


@pytest.fixture(scope="module")
def target() -> Mask2Former:
    return small_detector("mask2former")


def _images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_taps_agree_with_transformers(target: Mask2Former) -> None:
    images = _images(2, 64, 96)
    recorded = target.record(images, "fine")
    raw = target.model(target.preprocessing.normalise(images), output_hidden_states=True)
    memory = recorded["encoder.layers.0"]
    assert isinstance(memory, Tokens)
    assert memory.grids == ((2, 3), (4, 6), (8, 12))
    for found, expected in zip(memory.maps(), raw.pixel_decoder_hidden_states, strict=True):
        torch.testing.assert_close(found, expected)
    for number, expected in enumerate(raw.transformer_decoder_hidden_states[1:]):
        torch.testing.assert_close(recorded[f"decoder.layers.{number}"].values, expected.transpose(0, 1))
    for number, expected in enumerate(raw.encoder_hidden_states):
        stage = recorded[f"backbone.{number}"]
        assert isinstance(stage, Tokens)
        torch.testing.assert_close(stage.maps()[0], expected)
    predictions = recorded["predictions"]
    assert isinstance(predictions, Predictions)
    torch.testing.assert_close(predictions.logits, raw.class_queries_logits)
    torch.testing.assert_close(predictions.masks, raw.masks_queries_logits)
    assert predictions.activation == "softmax"


def test_another_size_continues_from_every_tap(target: Mask2Former) -> None:
    resnet = small_detector("mask2former", backbone_config=FOUR_MAPS, pre_norm=True, decoder_layers=2)
    images = _images(1, 32, 96)
    for model in (target, resnet):
        output = model(images)
        for tap, representation in model.record(images, model.available_taps).items():
            made = model.from_tap(tap, representation)
            assert (made.logits - output.logits).abs().max() <= 1e-4, tap
            assert (made.masks - output.masks).abs().max() <= 1e-4 * float(output.masks.abs().max()), tap
    # A ResNet's maps follow from one another, so only finer ones travel beside one.
    assert list(resnet.record(images, ["backbone.1"])["backbone.1"].context) == ["backbone.0"]


def test_each_tap_carries_the_pass(target: Mask2Former) -> None:
    images = _images()
    output = target(images)
    for tap, representation in target.record(images, "fine").items():
        if isinstance(representation, Predictions):
            continue
        changed = target.from_tap(tap, representation.replace(representation.values.flip(-1)))
        assert (changed.logits - output.logits).abs().max() > 1e-4, tap


def test_masks_of_a_layer_are_what_the_next_one_looks_through(target: Mask2Former) -> None:
    """Queries put in at layer 0 change where layer 1 looks: its attention mask is computed again."""
    images = _images()
    queries = target.record(images, ["decoder.layers.0"])["decoder.layers.0"]
    looked: list[Tensor] = []
    layer = target.model.model.transformer_module.decoder.layers[1]

    def look(_module: object, _inputs: object, named: dict[str, Tensor]) -> None:
        looked.append(named["encoder_attention_mask"])

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        target(images)
        target.from_tap("decoder.layers.0", queries)
        target.from_tap("decoder.layers.0", queries.replace(-queries.values))
    finally:
        handle.remove()
    assert torch.equal(looked[0], looked[1])
    assert not torch.equal(looked[0], looked[2])


def test_what_goes_around_travels_along(target: Mask2Former) -> None:
    recorded = target.record(_images(), "blocks")
    # Behind a Swin's maps there are norms, so none follows from another.
    assert list(recorded["backbone.2"].context) == ["backbone.0", "backbone.1", "backbone.3"]
    memory = recorded["encoder.layers.0"]
    assert list(memory.context) == ["backbone.0"]
    assert memory.position.shape == (1, 84, 32)
    queries = recorded["decoder.layers.1"]
    assert isinstance(queries, Queries)
    assert isinstance(queries.context, Tokens)
    torch.testing.assert_close(queries.context.values, memory.values)
    with pytest.raises(BacksightError, match=r"reads backbone\.0 too"):
        target.from_tap("encoder.layers.0", Tokens(memory.values, memory.grids))
    for tap in ("decoder.layers.1", "decoder.layernorm"):
        with pytest.raises(BacksightError, match="context"):
            target.from_tap(tap, Queries(queries.values))


def test_positional_code_is_what_the_encoder_adds(target: Mask2Former) -> None:
    images = _images()
    added: list[Tensor] = []
    encoder = target.model.model.pixel_level_module.decoder.encoder
    handle = encoder.register_forward_pre_hook(
        lambda _module, _inputs, named: added.append(named["position_embeddings"]), with_kwargs=True
    )
    try:
        position = target.record(images, ["projection"])["projection"].position
    finally:
        handle.remove()
    torch.testing.assert_close(position, added[0][:1])


def test_boxes_of_masks() -> None:
    masks = torch.full((1, 3, 20, 40), -30.0)
    masks[0, 0, 4:10, 8:24] = 30.0  # rows 0.2 to 0.5, columns 0.2 to 0.6
    masks[0, 1] = 30.0
    masks[0, 2] = 0.0
    boxes = soft_boxes(masks)
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.4, 0.35, 0.4, 0.3]))
    torch.testing.assert_close(boxes[0, 1], torch.tensor([0.5, 0.5, 1.0, 1.0]))
    torch.testing.assert_close(boxes[0, 2], torch.tensor([0.5, 0.5, 1.0, 1.0]))
    empty = soft_boxes(torch.full((1, 1, 8, 8), -200.0))
    assert torch.isfinite(empty).all()
    masks.requires_grad_()
    soft_boxes(masks)[0, 0].sum().backward()
    assert torch.isfinite(masks.grad).all()


def test_stages_and_tap_sets(target: Mask2Former) -> None:
    assert target.taps == (
        *(f"backbone.{number}" for number in range(4)),
        "projection",
        "encoder.layers.0",
        "decoder.layers.0",
        "decoder.layers.1",
        "decoder.layernorm",
        "predictions",
    )
    assert "decoder.layers.0.cross_attn" in target.resolve_taps("fine")
    assert target.resolve_taps("components") == ("projection", "encoder.layers.0", "decoder.layernorm", "predictions")
    assert target.stage("backbone.1", "backbone.0").kind == "backbone"
    assert target.stage("projection", "backbone.3") == Stage("projection", 0, 2, 40)
    assert target.stage("encoder.layers.0", "projection") == Stage("encoder", 1, 2, 40)
    assert target.stage("decoder.layers.0", "encoder.layers.0") == Stage("decoder", 1, 2, 48)
    assert target.stage("decoder.layernorm", "decoder.layers.1") == Stage("norm", 0, 2, 48)
    assert target.stage("predictions", "decoder.layernorm") == Stage("heads", 0, 2, 32)
    assert (target.reduction, target.size_step) == ((4, 4), (32, 32))


def test_refusals(target: Mask2Former) -> None:
    with pytest.raises(BacksightError, match="multiples of 32"):
        target.check_size((64, 72))
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    target.record(_images(), padding=padding)
    padding[0, 0] = True
    with pytest.raises(BacksightError, match="padd"):
        target(_images(), padding)


def test_a_saved_folder_loads(target: Mask2Former, tmp_path: Path) -> None:
    target.model.save_pretrained(tmp_path / "mine")
    name = str(tmp_path / "mine")
    loaded = load_target(name)
    assert loaded.weights_hash == target.weights_hash
    assert loaded.classes == ("disc", "ring", "star")
    assert loaded.image_size == (480, 640)
