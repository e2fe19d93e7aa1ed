"""The canonical form: shapes that do not fit are refused, batches can be split and joined again."""

import pytest
import torch

from backsight.errors import BacksightError
from backsight.representation import Predictions, Queries, Tokens, concatenate


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tokens(batch: int = 2, seed: int = 0) -> Tokens:
    """Two grids (2 x 3 and 1 x 2), two prefix tokens, padding and a positional code."""
    padding = torch.zeros(batch, 8, dtype=torch.bool)
    padding[0, -1] = True
    return Tokens(_random(batch, 10, 4, seed=seed), ((2, 3), (1, 2)), 2, padding, _random(1, 8, 4))


def test_prefix_and_patches_make_up_the_tokens():
    tokens = _tokens()
    assert tokens.batch == 2
    assert tokens.channels == 4
    assert torch.equal(torch.cat([tokens.prefix_values, tokens.patches], 1), tokens.values)


def test_maps_are_row_major():
    tokens = _tokens()
    first, second = tokens.maps()
    assert first.shape == (2, 4, 2, 3)
    assert second.shape == (2, 4, 1, 2)
    assert torch.equal(first[1, :, 1, 2], tokens.patches[1, 5])
    assert torch.equal(second[0, :, 0, 1], tokens.patches[0, 7])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"values": torch.zeros(2, 6), "grids": ((2, 3),)}, r"\(2, 6\)"),
        ({"values": torch.zeros(2, 6, 4), "grids": ((2, 2),)}, r"batch, 4, channels"),
        ({"values": torch.zeros(2, 6, 4), "grids": ((2, 3),), "prefix": 1}, r"batch, 7, channels"),
        ({"values": torch.zeros(2, 6, 4), "grids": ((2, 3),), "padding": torch.zeros(2, 5)}, "padding"),
        ({"values": torch.zeros(2, 6, 4), "grids": ((2, 3),), "position": torch.zeros(1, 6, 3)}, "position"),
        ({"values": torch.zeros(2, 6, 4), "grids": ((2, 3),), "position": torch.zeros(3, 6, 4)}, "position"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(arguments, said):
    with pytest.raises(BacksightError, match=said):
        Tokens(**arguments)


def test_queries_and_predictions_that_do_not_fit_are_refused():
    with pytest.raises(BacksightError, match="queries"):
        Queries(torch.zeros(2, 4))
    with pytest.raises(BacksightError, match="boxes"):
        Predictions(torch.zeros(2, 5, 3), torch.zeros(2, 4, 4))


@pytest.mark.parametrize(
    "representation",
    [
        _tokens(4),
        Queries(_random(4, 5, 3), _tokens(4)),
        Queries(_random(4, 5, 3)),
        Predictions(_random(4, 5, 3), _random(4, 5, 4).sigmoid()),
    ],
    ids=["tokens", "queries", "queries without context", "predictions"],
)
def test_split_and_joined_again(representation):
    parts = [representation.index(slice(0, 1)), representation.index([1, 2]), representation.index(3)]
    assert [part.batch for part in parts] == [1, 2, 1]
    joined = concatenate(parts)
    assert torch.equal(joined.values, representation.values)
    assert joined.form == representation.form == parts[0].form
    if isinstance(representation, Tokens):
        assert torch.equal(joined.padding, representation.padding)
        assert torch.equal(joined.position, representation.position)
    if isinstance(representation, Queries) and representation.context is not None:
        assert torch.equal(joined.context.values, representation.context.values)


def test_position_of_each_image_is_kept_in_a_join():
    one = Tokens(_random(1, 6, 4), ((2, 3),), position=_random(1, 6, 4, seed=1))
    other = Tokens(_random(1, 6, 4), ((2, 3),), position=_random(1, 6, 4, seed=2))
    assert concatenate([one, one]).position.shape[0] == 1
    joined = concatenate([one, other])
    assert torch.equal(joined.position, torch.cat([one.position, other.position]))
    assert torch.equal(joined.index(1).position, other.position)


def test_unpadded_images_join_padded_ones():
    padded = Tokens(_random(1, 6, 4), ((2, 3),), padding=torch.ones(1, 6, dtype=torch.bool))
    joined = concatenate([padded, Tokens(_random(2, 6, 4), ((2, 3),))])
    assert joined.padding.tolist() == [[True] * 6, [False] * 6, [False] * 6]


def test_only_the_same_form_can_be_joined():
    with pytest.raises(BacksightError, match="empty"):
        concatenate([])
    with pytest.raises(BacksightError, match="different form"):
        concatenate([Tokens(_random(1, 6, 4), ((2, 3),)), Tokens(_random(1, 6, 4), ((3, 2),))])


def test_replace_drops_a_position_of_other_width():
    tokens = _tokens()
    assert tokens.replace(values=_random(2, 10, 4)).position is tokens.position
    assert tokens.replace(values=_random(2, 10, 7)).position is None


def test_prediction_values_are_distribution_and_box():
    predictions = Predictions(_random(2, 5, 3), _random(2, 5, 4).sigmoid())
    assert predictions.values.shape == (2, 5, 7)
    torch.testing.assert_close(predictions.values[..., :3].sum(-1), torch.ones(2, 5))
    again = predictions.replace(predictions.values)
    torch.testing.assert_close(again.values, predictions.values)
    assert torch.isfinite(predictions.replace(torch.zeros(2, 5, 7)).logits).all()


def test_plain_is_all_that_an_inverse_may_read():
    tokens = Tokens(_random(2, 6, 4), ((2, 3),), context={"beside": _random(2, 9)}, position=_random(1, 6, 4))
    assert (tokens.plain().context, tokens.plain().grids) == ({}, tokens.grids)
    assert Queries(_random(2, 5, 3), tokens).plain().context is None
    assert _tokens().plain().padding is not None


def test_detach_leaves_no_graph_in_what_travels_along():
    values = _random(2, 5, 3).requires_grad_()
    context = Tokens(_random(2, 6, 4).requires_grad_(), ((2, 3),))
    detached = Queries(values, context).detach()
    assert not detached.values.requires_grad
    assert not detached.context.values.requires_grad
    assert detached.to("cpu").context.values.device.type == "cpu"
