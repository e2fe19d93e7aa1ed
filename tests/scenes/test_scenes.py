"""The annotation is the truth, hue is a cue and never the label, and the same seed gives the same bytes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from scipy.ndimage import binary_dilation, binary_erosion, maximum_filter, minimum_filter
from skimage.color import rgb2hsv

from backsight.data.images import open_images
from backsight.errors import BacksightError
from backsight.scenes.dataset import cached, write_coco
from backsight.scenes.render import (
    CLASS_NAMES,
    CLASSES,
    DOMINANCE,
    SPLIT_PHOTOGRAPHS,
    UNOWNED_HUES,
    SceneOptions,
    render,
    render_many,
)

splits = st.sampled_from(sorted(SPLIT_PHOTOGRAPHS))
indices = st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None)


def circular_distance(a: np.ndarray, b: float) -> np.ndarray:
    return np.abs((a - b + 180) % 360 - 180)


def interior(mask: np.ndarray) -> np.ndarray:
    """Pixels whose eight neighbours belong to the mask too: fully covered, so their colour is the object's."""
    return binary_erosion(mask, np.ones((3, 3), bool))


@few
@given(splits, indices, st.sampled_from([32, 64, 97]))
def test_same_arguments_same_bytes(split, index, size):
    first, second = (render(split, index, 3, size) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.image.shape == (size, size, 3)
    assert first.masks.tobytes() == second.masks.tobytes()


def test_bytes_are_those_of_version_1():
    """Rendering must not drift between releases: a change of these bytes needs a new VERSION."""
    import hashlib

    digest = hashlib.sha256()
    for split in SPLIT_PHOTOGRAPHS:
        for scene in render_many(split, 20, seed=7):
            digest.update(scene.image.tobytes() + scene.masks.tobytes())
    assert digest.hexdigest()[:16] == "0114b81a40f49110"


@few
@given(splits, indices)
def test_masks_boxes_and_hues_agree_with_the_pixels(split, index):
    scene = render(split, index, options=SceneOptions(rule="uniform"))
    assert (scene.masks.sum(0) <= 1).all()  # no pixel belongs to two objects
    areas = scene.masks.sum((1, 2))
    assert areas[0] >= DOMINANCE * max(areas[1:], default=0)
    hsv = rgb2hsv(scene.image)
    for mask, (x, y, width, height), hue in zip(scene.masks, scene.boxes, scene.hues, strict=True):
        rows, columns = np.nonzero(mask)
        assert (columns.min(), rows.min()) == (x, y)
        assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
        sure = interior(mask)
        if sure.any():
            assert np.median(circular_distance(hsv[sure, 0] * 360, hue)) < 3
            assert hsv[sure, 1].min() > 0.5


@few
@given(splits, indices)
def test_the_mask_is_where_the_object_changes_the_picture(split, index):
    """Recolouring the dominant object changes pixels of its mask (and its half-covered rim) and no others."""
    options = SceneOptions(recolour="dominant", set_hue=180.0)
    plain, recoloured = render(split, index), render(split, index, options=options)
    changed = (plain.image != recoloured.image).any(-1)
    rim = binary_dilation(plain.masks[0], iterations=3)  # slender tips are less than half covered
    assert not (changed & ~rim).any()
    if circular_distance(plain.hues[:1], 180.0)[0] > 15:
        assert changed[interior(plain.masks[0])].mean() > 0.95


@pytest.mark.parametrize(
    "options",
    [
        SceneOptions(rule="uniform"),
        SceneOptions(hue_shift=120),
        SceneOptions(set_hue=240.0),
        SceneOptions(grey=True),
    ],
)
def test_counterfactuals_share_geometry_and_background(options):
    for index in range(8):
        plain, other = render("test", index), render("test", index, options=options)
        assert np.array_equal(plain.masks, other.masks)
        assert np.array_equal(plain.labels, other.labels)
        assert plain.background == other.background
        outside = ~plain.masks.any(0)
        touched = (plain.image != other.image).any(-1) & outside
        assert touched.sum() <= 4 * outside.shape[0]  # anti-aliased rims only


def test_colour_options_do_what_they_say():
    for index in range(12):
        plain = render("test", index)
        shifted = render("test", index, options=SceneOptions(hue_shift=120))
        assert np.allclose((shifted.hues - plain.hues) % 360, 120)
        chosen = render("test", index, options=SceneOptions(set_hue=300.0))
        assert np.allclose(chosen.hues, 300)
        grey = render("test", index, options=SceneOptions(grey=True))
        assert np.isnan(grey.hues).all()
        sure = interior(grey.masks[0])
        assert np.ptp(grey.image[sure].astype(int), axis=1).max() == 0
        large = render("test", index, options=SceneOptions(minimum_area=0.3))
        assert large.masks[0].mean() >= 0.3


def test_hue_is_a_cue_and_never_the_label():
    owners: dict[float, list[str]] = {}
    for kind in CLASSES:
        if kind.hue is not None:
            owners.setdefault(kind.hue, []).append(kind.name)
    assert all(len(names) == 2 for names in owners.values())  # every canonical hue is shared by two silhouettes
    assert sum(kind.hue is None for kind in CLASSES) >= len(CLASSES) / 4
    assert min(circular_distance(np.array(list(owners)), hue).min() for hue in UNOWNED_HUES) >= 45
    hits, total = 0, 0
    free: list[float] = []
    for scene in render_many("train", 700):
        for label, hue in zip(scene.labels, scene.hues, strict=True):
            canonical = CLASSES[label].hue
            if canonical is None:
                free.append(hue)
            else:
                hits += circular_distance(np.array([hue]), canonical)[0] <= 10.001
                total += 1
    expected = 0.85 + 0.15 * 20 / 360
    assert abs(hits / total - expected) < 4 * np.sqrt(expected * (1 - expected) / total)
    counts, _ = np.histogram(free, bins=6, range=(0, 360))
    assert counts.min() > 0.5 * len(free) / 6


def test_splits_share_no_photograph_and_no_scene():
    names = [name for photographs in SPLIT_PHOTOGRAPHS.values() for name in photographs]
    assert len(names) == len(set(names))
    for split, photographs in SPLIT_PHOTOGRAPHS.items():
        assert {scene.background for scene in render_many(split, 40)} <= set(photographs)
    arrangements = {split: render(split, 5).masks.tobytes() for split in SPLIT_PHOTOGRAPHS}
    assert len(set(arrangements.values())) == 3


def test_coco_layout_holds_the_same_truth(tmp_path, capsys):
    write_coco(tmp_path, "validation", 6, size=48)
    coco = COCO(tmp_path / "annotations" / "instances_validation2017.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASS_NAMES)
    from PIL import Image

    for index, scene in enumerate(render_many("validation", 6, size=48)):
        entry = coco.loadImgs(index)[0]
        stored = np.asarray(Image.open(tmp_path / "validation2017" / entry["file_name"]))
        assert np.array_equal(stored, scene.image)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[index]))
        assert [a["category_id"] - 1 for a in annotations] == scene.labels.tolist()
        for annotation, mask, box in zip(annotations, scene.masks, scene.boxes, strict=True):
            assert np.array_equal(coco.annToMask(annotation).astype(bool), mask)
            assert annotation["bbox"] == box.tolist()
            assert annotation["area"] == mask.sum()


def test_cache_is_made_once_and_keyed_by_options(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    first = cached("test", 3)
    stamp = (first / "annotations" / "instances_test2017.json").stat().st_mtime_ns
    assert cached("test", 3) == first
    assert (first / "annotations" / "instances_test2017.json").stat().st_mtime_ns == stamp
    other = cached("test", 3, options=replace(SceneOptions(), grey=True))
    assert other != first
    assert json.loads((other / "annotations" / "instances_test2017.json").read_text())["info"]["options"]["grey"]
    assert not [path for path in first.parent.iterdir() if path.name.startswith(".making")]


def test_scenes_on_leaves_differ_in_their_backgrounds_alone():
    for index in range(8):
        usual, on_leaves = render("train", index), render("train", index, options=SceneOptions(background="leaves"))
        inside = minimum_filter(usual.masks, (1, 5, 5)).any(0)  # where nothing of the background shines through
        assert np.array_equal(usual.masks, on_leaves.masks)
        assert usual.hues.tolist() == on_leaves.hues.tolist()
        assert np.array_equal(usual.image[inside], on_leaves.image[inside])
        outside = ~maximum_filter(usual.masks.any(0), 3)
        assert np.abs(usual.image[outside].astype(int) - on_leaves.image[outside]).mean() > 10
    assert len(open_images("scenes-on-leaves", "train", 32, 5)) == 5
    with pytest.raises(BacksightError, match="test on scenes"):
        open_images("scenes-on-leaves", "test", 32, 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: render("dev", 0), "no split 'dev'"),
        (lambda: render("train", 0, size=4), "choose a size"),
        (lambda: SceneOptions(rule="sometimes"), "choose one of"),  # type: ignore[arg-type]
        (lambda: SceneOptions(minimum_area=0.9), "share of the image"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(call, words):
    with pytest.raises(BacksightError, match=words):
        call()
