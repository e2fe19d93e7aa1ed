"""Invert or guess: the own image is found, a guess is at chance, and noise ends it."""

import pytest
import torch

from backsight.errors import BacksightError
from backsight.measures.structure import Judged
from backsight.representation import Tokens
from backsight.studies.retrieval import gallery, noised, ranks, retrieval, retrieval_under_noise
from backsight.tables.pooling import pool
from backsight.tables.values import Values


@pytest.fixture(scope="module")
def pictures():
    """(60, 3, 16, 16) random smooth pictures."""
    coarse = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")


def test_an_image_finds_itself_even_pale_and_blurred(pictures):
    mean = pictures.mean(0)
    among = gallery(pictures, mean)
    truth = torch.arange(60)
    assert ranks(pictures, among, truth).eq(0).all()
    pale = mean + 0.1 * (pictures - mean)
    assert ranks(pale, among, truth).eq(0).all()


def test_a_guess_is_at_chance(pictures):
    mean = pictures.mean(0)
    among = gallery(pictures, mean)
    truth = torch.arange(60)
    assert ranks(mean.expand_as(pictures), among, truth).eq(29.5).all()  # says nothing: the middle
    others = ranks(pictures.roll(1, 0), among, truth)
    assert others.ge(1).all()  # the other image itself comes first
    assert 0.3 < others.mean() / 59 < 0.7
    values = retrieval(among)(Judged(pictures[:20], None, None, truth[:20]))(pictures[:20])
    assert {key[0] for key in values} == {"retrieval_top1", "retrieval_rank"}
    assert all(dict(key[1]) == {"noise": 0.0} for key in values)
    assert [float(value.mean()) for value in values.values()] == [1, 0]


def test_large_pictures_are_compared_small():
    pictures = torch.rand(3, 3, 128, 96, generator=torch.Generator().manual_seed(1))
    among = gallery(pictures, pictures.mean(0))
    assert among.vectors.shape == (3, 3 * 64 * 48)
    assert ranks(pictures, among, torch.arange(3)).eq(0).all()
    with pytest.raises(BacksightError, match="two candidates"):
        gallery(pictures[:1], pictures.mean(0))


def test_noise_is_measured_in_standard_deviations_over_images():
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(64, 16, 2, generator=generator) * torch.tensor([1.0, 10.0])
    values = values + 100 * torch.randn(1, 16, 2, generator=generator)  # a code of position, the same in every image
    tokens = Tokens(values, ((4, 4),))
    made = noised(tokens, 0.5, torch.Generator().manual_seed(3))
    assert (made.values - values).std((0, 1)).tolist() == pytest.approx([0.5, 5.0], rel=0.1)
    assert torch.equal(noised(tokens, 0.0, generator).values, values)
    with pytest.raises(BacksightError, match="at least 2"):
        noised(tokens.index(0), 1.0, generator)


class _Identity:
    """Just enough of a target: its only tap holds the pixels."""

    name, weights, taps = "identity", "none", ("pixels",)

    def record(self, images, taps):
        return {"pixels": Tokens(images.flatten(2).transpose(1, 2), (tuple(images.shape[2:]),))}

    def depth(self, tap):
        return 0.0


def test_retrieval_falls_to_chance_as_noise_grows(pictures):
    def invert(tokens):
        return tokens.maps()[0]

    among = gallery(pictures, pictures.mean(0))
    families = {seed: {"linear": {"pixels": invert}} for seed in (0, 1)}
    values = Values(_Identity(), "d", "test", range(20))
    retrieval_under_noise(_Identity(), pictures[:20], families, among, values, (0.1, 100.0))
    rows = pool(values.table())
    rank = rows[rows.measure == "retrieval_rank"].set_index("noise")
    first = rows[rows.measure == "retrieval_top1"].set_index("noise")
    assert first.value[0.1] == 1
    assert rank.value[0.1] == 0
    assert first.value[100.0] < 0.5
    assert rank.value[100.0] > 0.05
    assert (rows.n == 20).all()
    assert (rows.seeds == 2).all()
    assert (rows.low <= rows.value).all()
    assert (rows.value <= rows.high).all()
