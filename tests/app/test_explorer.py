"""The explorer without a browser: views as values, what they compute, the page and its server."""

import asyncio
import io
import json
import math
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backsight.app.explorer.captions import HUES, html, hue_in_words, mean_errors
from backsight.app.explorer.page import AT_HAND, Page, explore, keep_upload
from backsight.app.explorer.serve import serve
from backsight.app.explorer.view import View, from_query
from backsight.app.explorer.workbench import Workbench, carried, given, token_numbers
from backsight.errors import BacksightError, WeightsError
from backsight.inverses.families import kept_inverses
from backsight.representation import Tokens
from backsight.targets.wheels import from_index

VIT, DETR = "scenes-vit", "scenes-detr"


def of_scene(target: str = VIT, **changes: Any) -> View:
    return View(**{"target": target, "picture": "scene 0", "swap_picture": "scene 1"} | changes)


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench()


@pytest.fixture
def page(workbench: Workbench) -> Any:
    made = Page()
    made.workbench = workbench
    made.look(of_scene())
    return made


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# ---------------------------------------------------------------------------------------------------------------- views


def test_a_view_survives_a_link() -> None:
    view = View(DETR, "linear", "decoder.layers.1", "scene 7", -45.0, 0.5, "image", (3, 1), (9, 8), 0.25, removed=(2,))
    assert from_query(view.to_query()) == view
    assert from_query("?" + view.to_query() + "&voila-theme=dark") == view  # others' entries are passed over
    assert View().to_query() == ""
    assert from_query("") == View()
    assert view.erased == (1, 3)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("hue_shift=blue", "hue_shift"),
        ("noise=nan", "noise"),
        ("erased=1,x", "erased"),
        ("region=sky", "sky"),
        ("saturation=-1", "saturation"),
    ],
)
def test_a_bad_link_names_what_is_wrong(query: str, named: str) -> None:
    with pytest.raises(BacksightError, match=named):
        from_query(query)


def test_patches_are_carried_to_the_same_places_of_another_grid() -> None:
    assert carried((0, 15), (4, 4), (2, 2)) == (0, 3)
    assert carried((3,), (2, 2), (4, 4)) == (10, 11, 14, 15)
    assert carried((5,), (4, 4), (4, 4)) == (5,)
    assert carried((4,), (3, 3), (2, 2)) == (0, 1, 2, 3)  # the middle one touches all four
    assert carried((99,), (3, 3), (2, 2)) == ()


# ------------------------------------------------------------------------------------------------------------- pictures


def shown(view: View, size: tuple[int, int] = (64, 64)) -> Any:
    return given(view, size, (8, 8), (0.5, 0.5, 0.5))


def test_the_objects_hue_is_turned_exactly_and_nothing_else() -> None:
    plain, turned = (shown(of_scene(hue_shift=hue)) for hue in (0.0, 120.0))
    changed = (plain.image != turned.image).any(1)
    rim = torch.nn.functional.max_pool2d(plain.mask.float()[None], 5, 1, 2)[0].bool()
    assert changed[plain.mask].float().mean() > 0.9
    assert not changed[~rim].any()
    whole = shown(of_scene(hue_shift=120.0, region="image"))
    assert (whole.image != plain.image).any(1)[~rim].float().mean() > 0.3


@pytest.mark.parametrize("size", [(48, 64), (65, 33)])
def test_pictures_fit_sizes_that_are_not_square(size: tuple[int, int]) -> None:
    for name in ("scene 3", "chelsea"):
        picture = shown(View(picture=name, saturation=0.5), size)
        assert picture.image.shape == (1, 3, *size)
        assert picture.mask.shape == (1, *size)
        assert picture.image.amin() >= 0
        assert picture.image.amax() <= 1


def test_uploads_are_kept_as_pictures_and_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path))
    for kind, mode in (("PNG", "RGBA"), ("JPEG", "L"), ("WEBP", "RGB"), ("TIFF", "CMYK"), ("BMP", "RGB"), ("GIF", "P")):
        file = io.BytesIO()
        Image.new(mode, (37, 91), 80 if mode in "LP" else None).save(file, kind)
        kept = keep_upload(f"../a photo.{kind.lower()}", file.getvalue())
        assert shown(View(picture=kept)).image.shape == (1, 3, 64, 64)
        assert tmp_path in Path(kept).parents
        assert keep_upload(f"a photo.{kind.lower()}", file.getvalue()) == kept
    before = sorted(tmp_path.rglob("*"))
    for name, content, said in (
        ("notes.txt", b"no picture at all", "notes.txt is no picture"),
        ("empty.png", b"", "empty.png is no picture"),
        ("cut.png", file_of_noise()[:400], "cut.png"),
    ):
        with pytest.raises(BacksightError, match=said):
            keep_upload(name, content)
    assert sorted(tmp_path.rglob("*")) == before


def file_of_noise() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------------- seeing


def test_what_a_view_shows_is_what_the_library_computes(workbench: Workbench) -> None:
    seen = workbench.see(of_scene(tap="blocks.2"))
    bench = workbench.bench(VIT)
    recorded = bench.target.record(seen.image)["blocks.2"]
    with torch.no_grad():
        made = bench.families["modular"]["blocks.2"](recorded)
    assert torch.equal(seen.reconstruction, made)
    assert seen.measures["psnr"] == pytest.approx(-10 * float((made - seen.image).square().mean().log10()), abs=1e-3)
    assert bench.grid == (8, 8)
    assert seen.answers[0].words.count("%") == 5


def test_each_change_acts_where_it_should(workbench: Workbench) -> None:
    plain = workbench.see(of_scene(tap="blocks.1"))
    erased = workbench.see(of_scene(tap="blocks.1", erased=(0, 9)))
    mean = torch.tensor(workbench.bench(VIT).target.preprocessing.mean).view(3, 1, 1)
    assert torch.allclose(erased.image[0, :, :8, :8], mean.expand(3, 8, 8))
    assert torch.equal(erased.image[..., 16:, 16:], plain.image[..., 16:, 16:])
    shuffled = workbench.see(of_scene(tap="blocks.1", shuffled=(0, 1, 10)))
    assert not torch.equal(shuffled.image, plain.image)
    pieces = sorted(float(shuffled.image[..., r : r + 8, c : c + 8].sum()) for r, c in ((0, 0), (0, 8), (8, 16)))
    assert pieces == pytest.approx(
        sorted(float(plain.image[..., r : r + 8, c : c + 8].sum()) for r, c in ((0, 0), (0, 8), (8, 16)))
    )
    noisy, more = (workbench.see(of_scene(tap="blocks.1", noise=sigma)) for sigma in (0.5, 1.0))
    assert torch.equal(noisy.image, plain.image)
    assert plain.measures["psnr"] > noisy.measures["psnr"] > more.measures["psnr"]
    assert torch.equal(noisy.reconstruction, workbench.see(of_scene(tap="blocks.1", noise=0.5)).reconstruction)
    crossed = workbench.see(of_scene(tap="blocks.1", inverse_tap="blocks.4"))
    assert torch.equal(crossed.image, plain.image)
    assert crossed.measures["psnr"] < plain.measures["psnr"]


def test_all_tokens_swapped_show_the_other_picture(workbench: Workbench) -> None:
    swapped = workbench.see(
        of_scene(family="linear", tap="patch_embed", swapped=tuple(range(64)), swap_picture="scene 5")
    )
    other = workbench.see(of_scene(family="linear", tap="patch_embed", picture="scene 5"))
    plain = workbench.see(of_scene(family="linear", tap="patch_embed"))
    assert (swapped.reconstruction - other.reconstruction).abs().max() < 1e-4  # the prefix tokens stay
    assert (swapped.reconstruction - plain.reconstruction).abs().mean() > 0.05
    half = workbench.see(of_scene(family="linear", tap="patch_embed", swapped=tuple(range(32)), swap_picture="scene 5"))
    assert (half.reconstruction[..., :32, :] - other.reconstruction[..., :32, :]).abs().mean() < 0.05
    assert (half.reconstruction[..., 32:, :] - plain.reconstruction[..., 32:, :]).abs().mean() < 0.05


def test_object_queries_are_removed_or_the_reason_is_said(workbench: Workbench) -> None:
    tap = "decoder.layers.2"
    plain = workbench.see(of_scene(DETR, tap=tap))
    query = plain.answers[0].boxes[0]["query"]
    removed = workbench.see(of_scene(DETR, tap=tap, removed=(query,)))
    assert not torch.equal(removed.reconstruction, plain.reconstruction)
    assert torch.equal(removed.image, plain.image)
    early = workbench.see(of_scene(DETR, tap="encoder.layers.0", removed=(query,)))
    assert "before the object queries" in early.remarks[0]
    late = workbench.see(of_scene(DETR, tap=tap, swapped=(1,)))
    assert "have no place" in late.remarks[0]
    everything = workbench.see(of_scene(DETR, tap="predictions", removed=tuple(range(16))))
    other = workbench.see(of_scene(DETR, tap="predictions", picture="scene 4", removed=tuple(range(16))))
    assert torch.equal(everything.reconstruction, other.reconstruction)  # nothing of the picture is left


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (View(VIT, tap="blocks.77"), "blocks.77"),
        (View(VIT, family="spline", tap="blocks.1"), "spline"),
        (View("scenes-vitt"), "scenes-vit"),
        (View(VIT, picture="nowhere.png"), "no picture"),
        (View(DETR, tap="backbone", inverse_tap="predictions"), "predictions"),
    ],
)
def test_what_cannot_be_seen_is_said(workbench: Workbench, view: View, said: str) -> None:
    with pytest.raises(BacksightError, match=said):
        workbench.see(view)


def test_the_curve_of_hues_does_not_depend_on_the_hue_that_is_looked_at(workbench: Workbench) -> None:
    view = View(DETR, picture="scene 2")
    depths = workbench.depths(view)
    assert list(depths) == list(workbench.bench(DETR).taps)
    assert depths is workbench.depths(replace(view, tap="projection", inverse_tap="backbone"))
    curve = mean_errors([workbench.depths(replace(view, hue_shift=hue)) for hue in HUES])
    assert curve["backbone"] < 30 < curve["predictions"]  # also what the notebook's table says of 16 scenes
    made, scores = workbench.depths(replace(view, hue_shift=45.0))["backbone"]
    turned = workbench.see(replace(view, tap="backbone", hue_shift=45.0))
    assert torch.equal(made, turned.reconstruction)
    for measure, (value,) in scores.items():
        assert value == pytest.approx(turned.measures[measure])


def test_the_loss_of_hue_in_words() -> None:
    assert "from every layer" in hue_in_words({"a": 1.0, "b": 29.0})
    assert "down to a (10°) and is lost from b on (80°)" in hue_in_words({"a": 10.0, "b": 80.0, "c": 70.0})
    assert "lost at b" in hue_in_words({"a": 10.0, "b": 80.0, "c": 7.0})
    assert "from no layer" in hue_in_words({"a": 31.0})
    nan, zero, none = np.full(1, np.nan), np.zeros(1), torch.zeros(1)
    assert "no hue to lose" in hue_in_words(mean_errors([{"a": (none, {"hue_error": nan, "share_grey": nan})}] * 2))
    kept, grey = {"hue_error": zero, "share_grey": zero}, {"hue_error": nan, "share_grey": zero + 1}
    words = hue_in_words(mean_errors([{"a": (none, kept), "b": (none, grey)}] * 2))
    assert "down to a (0°) and is lost from b on (grey)" in words


def test_the_curve_has_a_gap_where_the_hue_comes_back_grey() -> None:
    drawn = html().chart({"a": 10.0, "b": math.nan, "c": 80.0, "d": 85.0}, "d", "#029e73")
    assert drawn.count("<circle") == 3
    assert re.findall(r"L(\S+) (\S+)\"", drawn) == [("262.0", "36.0")]  # the one line, from c to d
    assert "b grey; c 80°" in drawn


@pytest.mark.parametrize("size", [None, (64, 48)])
def test_a_target_without_inverses_gets_linear_ones_once(
    size: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKSIGHT_CACHE", str(tmp_path))
    name = "vit_tiny_patch16_224"
    from backsight.targets import load_target

    monkeypatch.setattr("backsight.app.explorer.workbench.kept_inverses", partial(kept_inverses, count=12))
    monkeypatch.setattr(
        "backsight.app.explorer.workbench.load_target",
        lambda name: load_target(name, ["patch_embed", "blocks.0"], pretrained=False, image_size=size),
    )
    bench = Workbench().bench(name)
    assert list(bench.families) == ["linear"]
    assert bench.grid == ((14, 14) if size is None else (4, 3))
    monkeypatch.setattr("backsight.inverses.families.fit", None)
    picture = Workbench().see(View(name, tap="blocks.0", noise=0.5)).image
    assert picture.shape == (1, 3, *(size or (224, 224)))


# ------------------------------------------------------------------------------------------------------------- the page


def test_a_control_changes_the_view_and_only_what_it_should(page: Page) -> None:
    before = page.given.png, page.made.png
    page.controls["tap"].index = 4
    assert page.view.tap == "blocks.3"
    assert page.given.png == before[0]
    assert page.made.png != before[1]
    assert page.strip.chosen == "blocks.3"
    made = page.made.png
    page.controls["hue_shift"].value = 90
    assert page.view.hue_shift == 90
    assert page.given.png != before[0]
    assert page.made.png != made
    assert "hue_shift=90" in page.frame.query
    assert "hue_shift=90" in page.code.value


def test_the_state_survives_another_target(page: Page) -> None:
    page.controls["tap"].index = 7
    page.controls["hue_shift"].value = 60
    page._heard(None, {"kind": "patch", "patch": 9, "on": True}, [])
    page.controls["target"].value = DETR
    assert (page.view.target, page.view.tap, page.view.hue_shift, page.view.erased) == (DETR, "predictions", 60.0, (9,))
    assert page.play.max == page.controls["tap"].index == page.play.value == 9
    page.controls["target"].value = "scenes-swin"  # patches of half the size
    assert page.view.tap == "norm"
    assert page.view.erased == (34, 35, 50, 51)


def test_errors_are_sentences_and_the_page_goes_on(page: Page) -> None:
    page.look(View("scenes-vitt"))
    assert "scenes-vit" in page.message.value
    assert "Traceback" not in page.message.value
    assert page.view.target == page.controls["target"].value == VIT
    page._heard(None, {"kind": "file", "name": "notes.txt"}, [memoryview(b"no picture")])
    assert "notes.txt is no picture" in page.message.value
    for query, named in (("hue_shift=blue", "hue_shift"), ("target=scenes-vitt", "scenes-vitt")):
        strange = explore(query)
        assert named in strange.message.value
        assert strange.view.target == VIT
        assert strange.workbench.bench.cache_info().currsize == 1  # of no other model are weights asked for
    page.controls["hue_shift"].value = 30
    assert page.message.value == ""
    assert page.view.hue_shift == 30


def test_the_page_opens_on_a_pretrained_model_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> Any:
        raise WeightsError(f"The weights of {name} cannot be had: no answer.")

    with monkeypatch.context() as offline:
        offline.setattr("backsight.targets.load.from_wheel", lambda source: refused(source.name))
        page = explore()
    assert "dinov2-small cannot be had" in page.message.value
    assert page.view == replace(AT_HAND, family="modular", tap="patch_embed")
    assert page.made.png
    try:
        from_index("dinov2-small")
    except WeightsError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("backsight.app.explorer.workbench.kept_inverses", partial(kept_inverses, count=16))
    page = explore()
    assert (page.view.target, page.view.picture, page.message.value) == ("dinov2-small", "chelsea", "")
    assert pixels(page.made.png).shape == (224, 224, 3)
    assert "it has no classes" in page.measures.value
    assert len(page.strip.depths) == 14


def test_what_follows_the_pictures_is_dropped_where_a_newer_view_comes(page: Page) -> None:
    strips: list[Any] = []
    page.strip.observe(strips.append, "depths")

    async def drag() -> None:
        for value in range(-180, 181, 15):
            page.controls["hue_shift"].value = value
            await asyncio.sleep(0)
        assert page._rest is not None
        await page._rest

    asyncio.run(drag())
    assert page.view.hue_shift == 180
    assert len(strips) == 1
    assert "Computed" in page.status.value
    assert "hue" in page.sentence.value


def test_the_exported_python_writes_the_exported_png(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path / "results"))
    sent: list[Any] = []
    monkeypatch.setattr(page.frame, "send", lambda content, buffers=None: sent.append((content, buffers)))
    page.look(of_scene(tap="blocks.2", hue_shift=45.0, erased=(3,), noise=0.3))
    page.export.click()
    (message, buffers) = sent[-1]
    exported = bytes(buffers[0])
    assert message["kind"] == "download"
    assert "Exported to" in page.message.value
    assert [file.read_bytes() for file in (tmp_path / "results").rglob("*.png")] == [exported]
    monkeypatch.chdir(tmp_path)
    exec(page.view.to_python(), {})
    assert np.array_equal(pixels((tmp_path / "view.png").read_bytes()), pixels(exported))
    texts = Image.open(io.BytesIO(exported)).text  # type: ignore[attr-defined]
    assert json.loads(texts["backsight"])["erased"] == [3]
    assert json.loads(texts["measures"])["psnr"] > 0


def test_a_click_on_a_query_removes_it_and_a_second_brings_it_back(page: Page) -> None:
    page.look(of_scene(DETR, tap="decoder.layers.0"))
    query, made = page.given.shown["boxes"][0]["query"], page.made.png
    page._heard(None, {"kind": "query", "query": query}, [])
    assert page.view.removed == (query,)
    assert page.made.png != made
    page._heard(None, {"kind": "query", "query": query}, [])
    assert page.view.removed == ()
    assert page.made.png == made
    page._heard(None, {"kind": "query", "query": query}, [])
    page.controls["target"].value = VIT  # which has no queries
    assert page.view.removed == ()


def test_tokens_on_several_levels_are_all_swapped() -> None:
    tokens = Tokens(torch.zeros(1, 1 + 16 + 4, 3), ((4, 4), (2, 2)), prefix=1)
    assert token_numbers((0,), (8, 8), tokens) == [1, 17]
    assert token_numbers((63,), (8, 8), tokens) == [16, 20]


def test_the_server_knows_its_guests() -> None:
    """Only this machine, only by its own name (DNS rebinding), and only those who know the token."""
    server = subprocess.Popen(
        [sys.executable, "-m", "backsight.app.cli", "explore", "--no-browser"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        plain, _, token = address.partition("?token=")
        assert plain.startswith("http://127.0.0.1:")
        assert len(token) > 20

        def answer(url: str, **headers: str) -> tuple[int, str]:
            for _ in range(300):
                try:
                    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
                        return response.status, response.url
                except urllib.error.HTTPError as error:
                    return error.code, url
                except OSError:
                    time.sleep(0.2)
            raise AssertionError("the server does not answer")

        assert "/login" in answer(plain)[1]
        assert answer(address, Host="evil.example")[0] == 403
        with pytest.raises(BacksightError, match="--port"):
            serve(int(plain.rstrip("/").rpartition(":")[2]))
    finally:
        server.terminate()
        server.wait(20)
