"""Masks, boxes and labels follow the image; what is odd in an annotation file is named, never silently wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backsight.data.decode import ImageError
from backsight.data.images import SPLITS, batches, open_images, tensor
from backsight.errors import SourceError

SQUARE = {"segmentation": [[4, 6, 14, 6, 14, 16, 4, 16]], "bbox": [4, 6, 10, 10]}
FILE = "annotations/instances_val2017.json"


@pytest.fixture
def scenes(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    return tmp_path


def test_scenes_and_their_truth(scenes, capsys):
    from backsight.scenes.render import CLASS_NAMES, render

    (scenes / "scenes").mkdir()
    source = open_images("scenes", "test", (32, 32), 6, masks=True)
    assert capsys.readouterr().out == ""
    assert (len(source), source.classes) == (6, CLASS_NAMES)
    for index, item in enumerate(source):
        truth = render("test", index, size=32)
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), truth.image)
        np.testing.assert_array_equal(item["masks"].numpy(), truth.masks)
        np.testing.assert_array_equal(item["labels"].numpy(), truth.labels)
        expected = np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]], 1)
        np.testing.assert_allclose(item["boxes"].numpy(), expected)
        assert item["boxes"].dtype == torch.float32
        assert not item["crowd"].any()
    plain = open_images("scenes", None, (16, 24), 3)
    assert plain[0]["image"].shape == (3, 16, 24)
    assert "masks" not in plain[0]


def test_what_a_killed_rendering_left_is_removed(scenes):
    first = tensor(open_images("scenes", "test", 16, 2))
    [folder] = [path for path in (scenes / "scenes").iterdir() if path.is_dir()]
    made = folder.rename(folder.with_name(f".making-{folder.name}"))
    (made / "test2017" / "000000000001.png").unlink()
    assert torch.equal(tensor(open_images("scenes", "test", 16, 2)), first)
    assert [path for path in (scenes / "scenes").iterdir() if path.is_dir()] == [folder]


def annotated(folder: Path, objects, size=(40, 30), name="1.png", exif=None, **more) -> Path:
    """A COCO root with one image (width, height = size) in val2017. more: further content of the file."""
    (folder / "val2017" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    Image.new("RGB", size).save(folder / "val2017" / name, **({"exif": exif} if exif else {}))
    content = {
        "images": [{"id": 1, "file_name": name, "width": size[0], "height": size[1]}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 7, "iscrowd": 0} | annotation
            for i, annotation in enumerate(objects)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
    }
    (folder / FILE).write_text(json.dumps(content | more))
    return folder


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((30, 40), [4, 6, 14, 16]),
        ((60, 80), [8, 12, 28, 32]),
        ((30, 30), [0, 6, 9, 16]),  # 5 columns are cut off on the left
        ((15, 15), [0, 3, 4, 8]),
    ],
)
def test_boxes_and_masks_follow_the_image(tmp_path, size, box):
    item = open_images(annotated(tmp_path, [SQUARE]), None, size, masks=True)[0]
    assert item["boxes"][0].tolist() == pytest.approx(box)
    assert (item["masks"].shape, item["masks"].dtype) == ((1, *size), torch.bool)
    assert item["masks"].sum().item() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), rel=0.15)
    assert item["labels"].tolist() == [1]  # "ant" (3) comes before "cat" (7)


def test_run_lengths_crowds_and_what_the_crop_leaves_out(tmp_path):
    crowd = {"segmentation": {"size": [30, 40], "counts": [600, 120, 480]}, "bbox": [20, 0, 4, 30], "iscrowd": 1}
    outside = {"segmentation": [[0, 0, 3, 0, 3, 9, 0, 9]], "bbox": [0, 0, 3, 9]}
    item = open_images(annotated(tmp_path, [outside, crowd]), None, 30, masks=True)[0]
    assert item["crowd"].tolist() == [True]
    assert item["boxes"].tolist() == [[15, 0, 19, 30]]
    assert item["masks"][0].sum() == 4 * 30
    # An L whose upright is cut away: only the foot, at the bottom, is left.
    ell = {"segmentation": [[0, 0, 4, 0, 4, 26, 20, 26, 20, 30, 0, 30]], "bbox": [0, 0, 20, 30]}
    item = open_images(annotated(tmp_path, [ell]), None, 30, masks=True)[0]
    assert item["boxes"][0].tolist() == pytest.approx([0, 26, 15, 30], abs=1)
    item = open_images(annotated(tmp_path, []), None, (7, 5), masks=True)[0]
    assert [item[name].shape for name in ("masks", "boxes", "labels")] == [(0, 7, 5), (0, 4), (0,)]


def test_annotations_made_without_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    item = open_images(annotated(tmp_path, [SQUARE], exif=exif), None, (30, 40), masks=True)[0]
    assert item["boxes"][0].tolist() == pytest.approx([4, 6, 14, 16])


def test_files_and_annotations_that_do_not_match_are_named(tmp_path):
    annotated(tmp_path, [SQUARE, SQUARE | {"image_id": 9}])
    Image.new("RGB", (8, 8)).save(tmp_path / "val2017" / "extra.png")
    with pytest.warns(UserWarning, match="1 files skipped"):
        source = open_images(tmp_path, masks=True)
    assert [entry.id for entry in source.entries] == ["val2017/1.png"]
    assert [Path(path).name for path, _ in source.skipped] == ["extra.png"]


def test_one_base_name_in_two_folders_is_two_images(tmp_path):
    """Both had the objects of one of them."""
    for camera in (1, 2):
        annotated(tmp_path, [], (80, 60), f"cam{camera}/0001.jpg")
    images = [{"id": i, "file_name": f"cam{i}/0001.jpg", "width": 80, "height": 60} for i in (1, 2)]
    other = {
        "segmentation": [[40, 30, 70, 30, 70, 50, 40, 50]],
        "bbox": [40, 30, 30, 20],
        "image_id": 2,
        "category_id": 3,
    }
    annotated(tmp_path, [SQUARE, other], (80, 60), "cam1/0001.jpg", images=images)
    found = {
        item["id"]: (item["labels"].tolist(), item["boxes"].tolist())
        for item in open_images(tmp_path, None, (60, 80), masks=True)
    }
    assert found == {
        "val2017/cam1/0001.jpg": ([1], [[4, 6, 14, 16]]),
        "val2017/cam2/0001.jpg": ([0], [[40, 30, 70, 50]]),
    }


def test_without_a_size_of_its_own_an_image_is_annotated_as_it_is(tmp_path):
    annotated(tmp_path, [SQUARE], images=[{"id": 1, "file_name": "1.png"}])
    assert open_images(tmp_path, None, (30, 40), masks=True)[0]["boxes"].tolist() == [[4, 6, 14, 16]]


@pytest.mark.parametrize("box", [[4, 6, 0, 10], [4, 6, -3, 10], [float("nan")] * 4, [1e9, 6, 10, 10], None])
def test_a_degenerate_box_is_that_of_its_mask(tmp_path, box):
    annotated(tmp_path, [SQUARE | {"bbox": box}])
    assert open_images(tmp_path, None, (30, 40), masks=True)[0]["boxes"].tolist() == [[4, 6, 14, 16]]


def test_an_object_without_an_outline_does_not_cost_its_image(tmp_path):
    """As tools write it that know boxes and outlines; the objects beside it are read."""
    bare = {"bbox": [4, 6, 10, 10]}
    item = open_images(annotated(tmp_path, [bare, SQUARE, bare | {"segmentation": []}]), None, (30, 40), masks=True)[0]
    assert item["boxes"].tolist() == [[4, 6, 14, 16]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"category_id": 77},
        {"category_id": "7"},
        {"segmentation": {"size": [30, 40], "counts": [1, 2, 3]}},
        {"segmentation": {"size": [40, 30], "counts": [600, 120, 480]}},
        {"segmentation": [[]]},
        {"segmentation": [[1, 2]]},
    ],
)
def test_a_malformed_annotation_is_named(tmp_path, wrong):
    source = open_images(annotated(tmp_path, [SQUARE, SQUARE | wrong]), masks=True)
    with pytest.raises(ImageError, match="annotation 1 in instances_val2017"):
        source[0]
    with pytest.warns(UserWarning, match="malformed"):
        assert list(source) == []
    assert len(next(batches(source, 4))) == 1  # the image itself is fine


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"annotations": [SQUARE | {"segmentation": [], "id": 1, "image_id": 1, "category_id": 7}]}, "no masks"),
        ({"images": [{"id": "1", "file_name": "1.png", "width": 40, "height": 30}]}, "image_id"),
        (
            {"images": [{"id": 1, "file_name": name, "width": 40, "height": 30} for name in ("0.png", "1.png")]},
            "one id",
        ),
        ({"categories": [{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}]}, "one id"),
        ({"annotations": None}, "not a COCO"),
        ({"categories": [{"name": "cat"}]}, "not a COCO"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, content, said):
    annotated(tmp_path, [SQUARE], **content)
    with pytest.raises(SourceError, match=said) as caught:
        open_images(tmp_path, masks=True)
    assert FILE.split("/")[1] in str(caught.value)
    assert len(open_images(tmp_path)) == 1


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]", ""])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    annotated(tmp_path, [SQUARE])
    (tmp_path / FILE).write_text(content)
    with pytest.raises(SourceError, match="instances_val2017"):
        open_images(tmp_path, masks=True)


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("val2014", "annotations/instances_val2014.json"),
        ("val", "annotations/instances_val.json"),
        ("images/val2017", FILE),
        ("valid", "valid/_annotations.coco.json"),  # Roboflow
        ("images", "annotations/instances_default.json"),  # CVAT
    ],
)
def test_other_coco_layouts(tmp_path, folder, file):
    annotated(tmp_path, [SQUARE])
    for old, new in ((FILE, file), ("val2017", folder)):
        (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / old).rename(tmp_path / "moved")
        (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "moved").rename(tmp_path / new) if not (tmp_path / new).is_dir() else [
            path.rename(tmp_path / new / path.name) for path in (tmp_path / "moved").iterdir()
        ]
    item = open_images(tmp_path, "all" if folder == "images" else "test", (30, 40), masks=True)[0]
    assert item["boxes"].tolist() == [[4, 6, 14, 16]]


def test_coco_splits_are_disjoint(coco_sample, capsys):
    parts = {split: open_images(coco_sample, split, 32, masks=True) for split in SPLITS}
    names = {split: {entry.id for entry in part.entries} for split, part in parts.items()}
    assert capsys.readouterr().out == ""
    assert {split: len(part) for split, part in names.items()} == {"train": 72, "validation": 8, "test": 80}
    assert not names["train"] & names["validation"]
    assert not names["test"] & (names["train"] | names["validation"])
    assert len(parts["test"].classes) == 80
    assert {entry.id for entry in open_images(coco_sample, "validation", 32).entries} == names["validation"]


def test_masks_need_their_file(tmp_path):
    annotated(tmp_path, [SQUARE])
    (tmp_path / FILE).unlink()
    with pytest.raises(SourceError, match="instances_"):
        open_images(tmp_path, masks=True)
    assert len(open_images(tmp_path)) == 1


@pytest.mark.parametrize("size", [(224, 224), (130, 200)])
def test_coco_masks_agree_with_boxes(coco_sample, size):
    gaps = []
    for item in open_images(coco_sample, None, size, 12, masks=True):
        assert item["image"].shape == (3, *size)
        for mask, box in zip(item["masks"], item["boxes"], strict=True):
            rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
            tight = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            assert (box >= 0).all()
            assert (box[2:] <= torch.tensor([size[1], size[0]])).all()
            assert (tight[:2] >= box[:2] - 1.5).all()
            assert (tight[2:] <= box[2:] + 1.5).all()
            gaps.append((tight - box).abs().max().item())
    # Parts thinner than a pixel of the frame may be missed by the nearest neighbour, so not every gap is small.
    assert len(gaps) > 40
    assert np.mean(np.array(gaps) <= 1.5) > 0.9
