"""Inverses of several training seeds, and those of untrained targets beside them."""

import pytest
import torch
from PIL import Image

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.inverses.families import FAMILIES, fit
from backsight.inverses.files import load, save
from backsight.studies.by_seed import families_by_seed, training_source, untrained_by_seed
from backsight.targets import load_target


@pytest.fixture(scope="module")
def target():
    return load_target("scenes-vit", taps=["patch_embed", "norm"])


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    """Two training seeds of two families, and one seed of them for the untrained target."""
    place = tmp_path_factory.mktemp("inverses")
    images = torch.rand(24, 3, 64, 64)
    untrained = load_target(target.name, target.taps, pretrained=False, seed=0)  # as 02_train_inverse has it
    for name, frozen, seed in (("a", target, 0), ("b", target, 1), ("null", untrained, 0)):
        for family in ("linear", "modular"):
            options = {} if family == "linear" else {"steps": 1, "batch_size": 4}
            made = fit(family, frozen, images, seed=seed, progress=False, **options)
            save(made, place / name / family)
    return place


def test_every_seed_and_family_of_a_folder(target, folder):
    found = families_by_seed(target, folder, [1, 0])
    assert list(found) == [1, 0]
    images = torch.rand(2, 3, 64, 64)
    recorded = target.record(images)
    for families in found.values():
        assert list(families) == ["linear", "modular"]
        for inverses in families.values():
            assert list(inverses) == list(target.taps)
            assert all(inverse(recorded[tap]).shape == images.shape for tap, inverse in inverses.items())
    assert set(families_by_seed(target.select(["norm"]), folder, [0])[0]["modular"]) == {"norm"}
    assert set(load(folder, target, 0)) <= set(FAMILIES)  # those of the untrained target are passed over


def test_untrained_families_are_found_or_fitted(target, folder):
    made = untrained_by_seed(target, folder, [0, 1], count=32)
    (null, families), (other, linear) = made[0], made[1]
    assert null.weights == other.weights == "random"
    assert null.weights_hash != other.weights_hash != target.weights_hash
    assert set(families) == {"linear", "modular"}
    assert set(linear) == {"linear"}  # fitted here: the folder has none of seed 1


def test_without_a_folder_linear_inverses_are_fitted_on_other_images_each_seed(target):
    made = families_by_seed(target, "", [1, 2], count=64)
    first, second = (made[seed]["linear"]["norm"] for seed in (1, 2))
    assert not torch.equal(first.maps["cells"].matrix, second.maps["cells"].matrix)


def test_shipped_inverses_come_first_with_the_seed_that_they_have(target):
    made = families_by_seed(target, "", [0, 1], count=64)
    assert {seed: set(families) for seed, families in made.items()} == {0: {"linear", "modular"}}


def test_shipped_inverses_stand_in_for_families_that_only_other_seeds_have(target, tmp_path):
    """As in the run graph, which trains with the seed 0 only what is not shipped."""
    images = torch.rand(24, 3, 64, 64)
    options = {"progress": False, "steps": 1, "batch_size": 4}
    for family, seeds in (("direct", [0, 1]), ("modular", [1])):
        for seed in seeds:
            save(fit(family, target, images, seed=seed, **options), tmp_path / str(seed))
    found = families_by_seed(target, tmp_path, [0, 1])
    assert {seed: list(families) for seed, families in found.items()} == {
        seed: ["direct", "modular"] for seed in (0, 1)
    }
    (shipped,) = families_by_seed(target, "", [0]).values()
    recorded = target.record(images[:2])["norm"]
    assert torch.equal(found[0]["modular"]["norm"](recorded), shipped["modular"]["norm"](recorded))
    assert list(families_by_seed(target, tmp_path, [0])[0]) == ["direct"]


def test_what_inverses_were_trained_on_is_what_their_files_say(target, folder, tmp_path):
    """The nulls of `03_quality -p target=dinov2-small` were fitted on scenes, its inverses on leaves."""
    assert training_source(target, "", "photographs") == "scenes"  # of the shipped ones
    assert training_source(load_target("scenes-vit", pretrained=False), "", "some folder") == "leaves"  # there are none
    photographs = tmp_path / "mine"
    photographs.mkdir()
    for number, tone in enumerate((20, 60, 90, 120, 150, 220)):
        Image.new("RGB", (64, 64), (tone, 0, 0)).save(photographs / f"{number}.png")
    for source in ("leaves", str(photographs)):
        images = open_images(source, None if source != "leaves" else "train", target, 6)
        save(fit("linear", target, images, progress=False), tmp_path / source.rpartition("/")[2])
    assert training_source(target, tmp_path / "leaves", "scenes") == "leaves"
    assert training_source(target, tmp_path / "mine", str(photographs)) == str(photographs)
    for place, images in ((tmp_path, "scenes"), (tmp_path / "mine", "scenes"), (folder, "scenes")):
        with pytest.raises(BacksightError, match="trained_on"):
            training_source(target, place, images)


def test_bad_seeds_and_folders_are_refused(target, folder):
    with pytest.raises(BacksightError, match="each of them once"):
        families_by_seed(target, folder, [0, 0])
    with pytest.raises(BacksightError, match=r"seeds \[0, 1\]"):
        families_by_seed(target, folder, [0, 5])
    with pytest.raises(BacksightError, match=r"not of|no inverse for"):
        families_by_seed(load_target("scenes-detr"), folder, [0])
    with pytest.raises(BacksightError, match="with the weights"):
        load(folder / "null", target)
