"""A figure of one picture: every layer turned back by shipped, kept or newly fitted inverses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import backsight
from backsight.app.cli import main
from backsight.errors import BacksightError
from backsight.inverses import families


def test_shipped_inverses_of_all_families_and_their_scores() -> None:
    figure = backsight.look("chelsea", "scenes-vit", ["patch_embed", "norm"])
    texts = [text.get_text() for text in figure.texts]
    scores = [float(text.removesuffix(" dB")) for text in texts if text.endswith(" dB")]
    assert len(scores) == 4  # two taps, by the linear and by the modular inverse
    assert 10 < sorted(scores)[1] < 25 < sorted(scores)[2]  # the last tap by both, and the first by both
    only = backsight.look("chelsea", "scenes-vit", ["norm"], "modular")
    assert len([text for text in only.texts if text.get_text().endswith(" dB")]) == 1


def test_inverses_of_any_other_target_are_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    small = backsight.load_target("vit_tiny_patch16_224", ["blocks.0"], pretrained=False, image_size=(32, 48))
    first = families.kept_inverses(small, count=16)["linear"]["blocks.0"]
    monkeypatch.setattr(families, "fit", None)
    again = families.kept_inverses(small, count=16)["linear"]["blocks.0"]
    assert all(
        np.array_equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )
    monkeypatch.setattr(families, "VERSION", families.VERSION + 1)  # leaves of another kind
    with pytest.raises(TypeError, match="NoneType"):  # it goes on to fit
        families.kept_inverses(small, count=16)
    monkeypatch.undo()
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    more = families.kept_inverses(small.select(["blocks.0", "blocks.1.attn"]), count=16)["linear"]
    assert {*more.modules} == {"blocks.0", "blocks.1.attn"}


def test_the_command_writes_the_figure_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 50), "teal").save("sea.jpg")
    assert main(["look", "sea.jpg", "--target", "scenes-vit", "--taps", "patch_embed,norm"]) == 0
    with Image.open("sea-scenes-vit.png") as written:
        assert written.width > 300
        assert "scenes-vit" in written.info["Title"]
    assert main(["look", "nowhere.jpg"]) == 2
    assert "nowhere.jpg" in capsys.readouterr().err


def test_what_is_not_shipped_is_fitted_on_leaves_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAP below linear, of a target with other taps than the figure asks for; the second time nothing is fitted."""
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    target = backsight.load_target("scenes-vit")
    figure = backsight.look("chelsea", target, ["blocks.0"], ["linear", "map"])
    scores = [float(text.get_text().removesuffix(" dB")) for text in figure.texts if text.get_text().endswith(" dB")]
    assert len(scores) == 2
    assert scores[1] > scores[0] + 2
    monkeypatch.setattr(families, "fit", None)
    again = backsight.look("chelsea", target, ["blocks.0"], ["linear", "map"])
    assert [text.get_text() for text in again.texts] == [text.get_text() for text in figure.texts]
    (folder,) = tmp_path.glob("inverses/*-map")
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path / "other"))
    own = backsight.look("chelsea", target, ["blocks.0"], ["linear", "map"], inverses=folder)
    assert [text.get_text() for text in own.texts] == [text.get_text() for text in figure.texts]


def test_a_family_that_is_not_there_is_named() -> None:
    with pytest.raises(BacksightError, match=r"no inverse family 'modula'; nearest: modular"):
        backsight.look("chelsea", "scenes-vit", ["norm"], "modula")
