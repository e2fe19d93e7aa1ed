"""YOLOS: the order of its tokens, its positions, and what transformers itself says of them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from targets.examples import small_detector
from torch import Tensor

from backsight.errors import BacksightError
from backsight.representation import Predictions, Tokens
from backsight.targets import load_target
from backsight.targets.base import Stage
from backsight.targets.detectors import Yolos

small = partial(small_detector, "yolos")


def _images(target: Yolos, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    height, width = size or target.image_size
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def _model_order(tokens: Tokens) -> Tensor:
    return torch.cat([tokens.values[:, :1], tokens.patches, tokens.values[:, 1 : tokens.prefix]], dim=1)


def test_taps_agree_with_transformers() -> None:
    target = small(use_mid_position_embeddings=False)
    images = _images(target)
    recorded = target.record(images, "fine")
    raw = target.model(target.preprocessing.normalise(images), output_hidden_states=True)
    names = ("embeddings", "encoder.layer.0", "encoder.layer.1")
    for name, hidden in zip(names, raw.hidden_states, strict=True):
        torch.testing.assert_close(_model_order(recorded[name]), hidden)
    torch.testing.assert_close(_model_order(recorded["layernorm"]), raw.last_hidden_state)
    predictions = recorded["predictions"]
    assert isinstance(predictions, Predictions)
    torch.testing.assert_close(predictions.logits, raw.logits)
    torch.testing.assert_close(predictions.boxes, raw.pred_boxes)
    assert predictions.activation == "softmax"
    assert predictions.objects.shape == (2, 5, 3)  # "no object" left out


def test_prefix_and_grid() -> None:
    target = small((48, 80))
    images = _images(target)
    tokens = target.record(images)["embeddings"]
    assert isinstance(tokens, Tokens)
    assert (tokens.prefix, tokens.grids) == (6, ((3, 5),))
    vit = target.model.vit.embeddings
    projected = vit.patch_embeddings(target.preprocessing.normalise(images))
    positions = vit.interpolation(vit.position_embeddings, (48, 80))
    torch.testing.assert_close(tokens.patches, projected + positions[:, 1:16])
    torch.testing.assert_close(tokens.prefix_values[0, 1:], (vit.detection_tokens + positions[:, 16:])[0])
    assert target.record(_images(target, 1, (64, 32)))["encoder.layer.0"].grids == ((4, 2),)


@pytest.mark.parametrize("middle", [True, False])
def test_each_tap_carries_the_pass(middle: bool) -> None:
    """Each part of the tokens, the stream beside the MLP of a half-step too; what is given stays as it was."""
    target = small((48, 80), use_mid_position_embeddings=middle)
    images = _images(target)
    output = target(images)
    for tap, tokens in target.record(images, "fine").items():
        before = tokens.values.clone()
        assert (target.from_tap(tap, tokens).logits - output.logits).abs().max() <= 1e-5, tap
        assert torch.equal(tokens.values, before)
        if tap == "predictions":
            continue
        last = tap.startswith("encoder.layer.1") or tap == "layernorm"  # behind it, tokens do not meet any more
        for part in (slice(1, 6),) if last else (0, slice(1, 6), slice(6, None)):
            values = tokens.values.clone()
            values[:, part] = values[:, part].flip(-1)
            changed = target.from_tap(tap, tokens.replace(values))
            assert (changed.logits - output.logits).abs().max() > 1e-4, (tap, part)


def test_positions_between_the_layers_come_after_the_tap() -> None:
    target = small()
    recorded = target.record(_images(target), "fine")
    layer = target.model.vit.encoder.layer[0]
    with torch.no_grad():
        expected = layer(_model_order(recorded["embeddings"]))
    torch.testing.assert_close(_model_order(recorded["encoder.layer.0"]), expected)


def test_stages_and_tap_sets() -> None:
    target = small()
    assert target.taps == ("embeddings", "encoder.layer.0", "encoder.layer.1", "layernorm", "predictions")
    assert target.resolve_taps("components") == ("embeddings", "encoder.layer.1", "predictions")
    assert target.stage("embeddings", "pixels") == Stage("patch_embedding", 0, 2, 48)
    assert target.stage("encoder.layer.1", "embeddings") == Stage("blocks", 2, 2, 48)
    assert target.stage("encoder.layer.0.attn", "embeddings") == Stage("blocks", 1, 2, 48)
    assert target.stage("layernorm", "encoder.layer.1") == Stage("norm", 0, 2, 48)
    assert target.stage("predictions", "layernorm") == Stage("decoder", 0, 2, 48)
    assert target.depth("encoder.layer.1.attn") == 1.5
    assert target.reduction == (16, 16)


def test_refusals() -> None:
    target = small()
    with pytest.raises(BacksightError, match="multiples of 16"):
        target.check_size((64, 72))
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    target.record(_images(target), padding=padding)
    padding[0, 0] = True
    with pytest.raises(BacksightError, match="padd"):
        target.record(_images(target), padding=padding)
    tokens = target.record(_images(target))["embeddings"]
    for wrong in (Tokens(tokens.values, ((3, 7),), 1), Tokens(tokens.values[..., :8], tokens.grids, 6)):
        with pytest.raises(BacksightError, match=r"6 prefix tokens|cannot stand for it"):
            target.from_tap("embeddings", wrong)
    with pytest.raises(BacksightError, match="holds predictions"):
        target.from_tap("predictions", tokens)


def test_a_saved_folder_loads(tmp_path: Path) -> None:
    target = small()
    target.model.save_pretrained(tmp_path / "mine")
    name = str(tmp_path / "mine")
    loaded = load_target(name)
    assert loaded.weights_hash == target.weights_hash
    assert loaded.classes == ("disc", "ring", "star")
    assert loaded.image_size == (480, 640)
    images = _images(target)
    torch.testing.assert_close(
        loaded(images).logits,  # type: ignore[union-attr]
        target.model(loaded.preprocessing.normalise(images)).logits,
    )
