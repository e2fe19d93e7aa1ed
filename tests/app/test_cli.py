"""The command as a stranger meets it."""

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from backsight.app.cli import app, main

COMMANDS = ["run", "look", "plan", "fit", "explore", "targets", "doctor", "report", "findings"]


def test_without_a_command_all_of_them_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert re.findall(r"^  (\w+)  ", printed.out + printed.err, flags=re.MULTILINE) == COMMANDS


def test_every_command_and_every_argument_says_what_it_is() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        assert not [argument.name for argument in command.params if not argument.help], name


def test_what_is_mistyped_is_refused_with_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in {
        ("rnu",): "Did you mean 'run'",
        ("fit", "scenes-vit", "scenes", "out", "--step", "3"): "--steps",
        ("fit", "scenes-vit", "scenes", "out", "--families", "['linear', lineer]"): "no inverse family 'lineer'",
        ("run",): "NOTEBOOK",
    }.items():
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_a_file_of_the_user_is_left_alone(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("mine")
    assert main(["findings", str(root / "results" / "reference"), str(mine)]) == 2
    assert "mine.md is not of backsight" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    picture = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(picture)
    before = picture.read_bytes()
    assert main(["look", str(picture), "--target", "scenes-vit", "--out", str(picture)]) == 2
    assert "would replace" in capsys.readouterr().err
    assert main(["look", "chelsea", "--target", "scenes-vit", "--out", str(picture)]) == 2
    assert "cat.png is not of backsight" in capsys.readouterr().err
    assert picture.read_bytes() == before
