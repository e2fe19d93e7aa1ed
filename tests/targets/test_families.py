"""Every family of targets, by the small examples that it offers: taps, the rest of the pass, and inverses of all taps.

A family that joins the registry is tested here without a line of its own.
"""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from targets.examples import DETECTORS, EXAMPLES
from torch import Tensor

from backsight.errors import BacksightError
from backsight.inverses.linear import fit_linear
from backsight.representation import Predictions, Queries, Tokens
from backsight.targets import PIXELS
from backsight.targets.base import Target, seeded
from backsight.training.fit import fit_direct, fit_modular

each_example = pytest.mark.parametrize("name", EXAMPLES)
AGREEMENT = 1e-4  # of the output's own size
MASKED = [name for name in DETECTORS if name not in ("yolos", "mask2former")]
FORMS = ("DeiT, distilled", "TNT", "Swin", "PVT V2", "detr", "deformable_detr", "yolos")  # one of each


@cache
def example(name: str) -> Target:
    """The target with random biases, scales and tokens too, so that no step is an identity by its initial value."""
    target = EXAMPLES[name]()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in target.model.parameters():
            parameter += 0.05 * parameter.std(correction=0) + 0.02 * torch.randn(parameter.shape, generator=generator)
    return target


def images_for(target: Target, batch: int, seed: int = 0) -> Tensor:
    """Smooth random pictures of the target's own size."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, len(target.preprocessing.mean), 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, target.image_size, mode="bilinear")


def tensors(output: Tensor | Predictions) -> Sequence[Tensor]:
    if isinstance(output, Tensor):
        return (output,)
    return tuple(each for each in (output.logits, output.boxes, output.masks) if each is not None)


def assert_agree(found: Tensor | Predictions, wanted: Tensor | Predictions, what: str) -> None:
    for part, truth in zip(tensors(found), tensors(wanted), strict=True):
        assert part.shape == truth.shape, what
        assert (part - truth).abs().max() <= AGREEMENT * max(1.0, float(truth.abs().max())), what


def state(target: Target) -> tuple[object, ...]:
    modules = dict(target.model.named_modules())
    hooks = [(name, len(each._forward_hooks), len(each._forward_pre_hooks)) for name, each in modules.items()]
    modes = [each.training for each in modules.values()]
    tensors_ = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    return (
        hooks,
        modes,
        torch.get_rng_state().tolist(),
        {name: float(each.double().sum()) for name, each in tensors_.items()},
    )


@each_example
@pytest.mark.parametrize("batch", [1, 2])
def test_continues_from_every_tap(name: str, batch: int) -> None:
    target = example(name)
    images = images_for(target, batch)
    before = state(target)
    recorded = target.record(images, target.available_taps)
    assert tuple(recorded) == target.available_taps
    output = target(images)
    for tap, representation in recorded.items():
        assert representation.batch == batch, tap
        assert torch.isfinite(representation.values).all(), tap
        assert_agree(target.from_tap(tap, representation), output, tap)
    assert state(target) == before


@each_example
def test_another_representation_gives_another_output(name: str) -> None:
    """What lies behind the tap reads the tap: two images' representations, swapped, swap the outputs."""
    target = example(name)
    images = images_for(target, 2)
    swapped = target(images.flip(0))
    parts = tensors(swapped)
    assert any((part[0] - part[1]).abs().max() > 10 * AGREEMENT * max(1.0, float(part.abs().max())) for part in parts)
    for tap, representation in target.record(images, target.available_taps).items():
        assert_agree(target.from_tap(tap, representation.index([1, 0])), swapped, tap)


@pytest.mark.parametrize("name", MASKED)
def test_padded_pixels_do_not_count(name: str) -> None:
    target = example(name)
    images = images_for(target, 2)
    padding = torch.zeros(2, *target.image_size, dtype=torch.bool)
    padding[1, :, target.image_size[1] // 2 :] = True
    output = target(images, padding)
    filled = images.clone()
    filled[1, :, :, target.image_size[1] // 2 :] = 0.7
    assert_agree(target(filled, padding), output, "the output changes with what lies under the padding")
    for tap, representation in target.record(images, target.available_taps, padding).items():
        assert_agree(target.from_tap(tap, representation), output, tap)
        if isinstance(representation, Tokens):
            assert representation.padding is not None, tap
            assert representation.padding[1].any(), tap
            assert not representation.padding[0].any(), tap


@pytest.mark.parametrize("name", ["ViT", "Swin", "yolos", "mask2former"])
def test_padding_is_refused_where_it_would_count(name: str) -> None:
    target = example(name)
    images = images_for(target, 2)
    with pytest.raises(BacksightError, match="padd"):
        target(images, torch.ones(2, *target.image_size, dtype=torch.bool))


@each_example
def test_taps_stages_and_depths_are_in_order(name: str) -> None:
    target = example(name)
    for tap_set in ("components", "blocks"):
        taps = target.tap_set(tap_set)
        assert taps
        assert [tap for tap in target.available_taps if tap in taps] == list(taps)
        depths = [target.depth(tap) for tap in taps]
        assert depths == sorted(depths)
        for previous, tap in zip((PIXELS, *taps), taps, strict=False):
            assert target.stage(tap, previous).kind != "norm" or previous != PIXELS
    with pytest.raises(BacksightError, match="no tap"):
        target.record(images_for(target, 1), ["nonsense"])


@each_example
def test_untrained_has_other_weights(name: str) -> None:
    target = example(name)
    with seeded(3):
        before = torch.get_rng_state()
        other, again = target.untrained(1), target.untrained(1)
        assert torch.equal(before, torch.get_rng_state())
    assert other.weights_hash == again.weights_hash != target.weights_hash
    assert other.model.state_dict().keys() == target.model.state_dict().keys()


@pytest.mark.parametrize("name", DETECTORS)
def test_queries_and_predictions_travel_with_what_the_rest_needs(name: str) -> None:
    target = example(name)
    recorded = target.record(images_for(target, 1), target.available_taps)
    assert isinstance(recorded[target.available_taps[-1]], Predictions)
    contexts = [each.index(0).context for each in recorded.values() if isinstance(each, Queries)]
    assert name == "yolos" or any(context is not None for context in contexts)


@pytest.mark.parametrize("name", FORMS)
def test_inverts_end_to_end(name: str) -> None:
    """Linear, direct and modular inverses of every tap of "blocks", and the chain down to the image."""
    target = example(name)
    images = images_for(target, 24)
    for tap, inverse in fit_linear(target, images, progress=False).items():
        made = inverse(target.record(images[:2], [tap])[tap])
        assert made.shape == images[:2].shape, tap
    few: dict[str, object] = {"steps": 2, "batch_size": 4, "ridge_images": 24, "progress": False}
    direct = fit_direct(target, images, **few)  # type: ignore[arg-type]
    modules = fit_modular(target, images, **few)  # type: ignore[arg-type]
    assert set(direct) == set(modules) == set(target.taps)
    recorded = target.record(images[:1])
    for tap, representation in recorded.items():
        assert direct[tap](representation).shape == images[:1].shape, tap  # type: ignore[union-attr]
        chain: Callable[..., Tensor] = modules[tap]
        made = chain(representation)
        assert made.shape == images[:1].shape, tap
        assert torch.isfinite(made).all(), tap
