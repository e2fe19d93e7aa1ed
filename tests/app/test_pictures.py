"""Pictures by name, the same ones on the page, in 00_quickstart and in the explorer."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from backsight.app.pictures import open_picture
from backsight.errors import BacksightError
from backsight.scenes.render import render


def test_pictures_by_name() -> None:
    names = ("scene 22 hue 0", "scene 22 hue 240", "scene 22", "china")
    first, second, plain, china = (open_picture(name, (32, 32)) for name in names)
    images = torch.cat([first.image, second.image, plain.image, china.image])
    assert images.shape == (4, 3, 32, 32)
    changed = (images[0] != images[1]).any(0)
    assert changed[first.mask[0]].float().mean() > 0.9
    assert 0.1 < changed.float().mean() < 0.6  # one object, not the picture
    red, blue = images[0][:, changed].mean(1), images[1][:, changed].mean(1)
    assert red.argmax() == 0
    assert blue.argmax() == 2
    assert "the heart recoloured to a hue of 240°" in second.words
    assert china.words == "the photograph china"
    assert torch.equal(
        plain.image, torch.from_numpy(render("test", 22, size=32).image.copy()).permute(2, 0, 1)[None] / 255
    )
    assert not torch.equal(open_picture("scene 22", (32, 32), 90.0).image, plain.image)
    for wrong, message in (
        *(("scene -1", "no picture"), ("scene 3 hue 360", "0 to 359"), ("chelsae", "no picture")),
        *(("x" * 5000, "no picture"), ("a\0b", "no picture")),
    ):
        with pytest.raises(BacksightError, match=message):
            open_picture(wrong, (32, 32))
    assert open_picture("scene 0", (32, 48)).image.shape == (1, 3, 32, 48)


def test_files_are_cropped_at_their_centre(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "red.png")
    image, mask, words = open_picture(str(tmp_path / "red.png"), (8, 8))
    assert torch.equal(image[0, :, 3, 3], torch.tensor([1.0, 0.0, 0.0]))
    assert mask.shape == (1, 8, 8)
    assert mask.all()
    assert words == "the image red.png"
