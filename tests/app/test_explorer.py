"""The explorer without a browser: views as values, what they compute, the thread that drops stale work, the page."""

import io
import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from targets.examples import small_timm

from backsight.app.explorer import View, Workbench
from backsight.app.explorer.hue_loss import hue_loss_figure, hue_rows, lost_from
from backsight.app.explorer.judging import hue_in_words
from backsight.app.explorer.latest import Latest
from backsight.app.explorer.page import Page
from backsight.app.explorer.pictures import in_folder, keep_upload, subject
from backsight.app.explorer.seeing import Depth, _refuse_another_form
from backsight.app.explorer.serve import command, free_port
from backsight.app.explorer.view import carried, from_query
from backsight.errors import BacksightError
from backsight.representation import Tokens
from backsight.tables.values import METRIC_COLUMNS

VIT, DETR = "scenes-vit", "scenes-detr"


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return Workbench(fit_images=64)


@pytest.fixture
def page(workbench: Workbench) -> Any:
    made = Page(workbench)
    made.look(View())
    assert made.wait()
    yield made
    made.close()


def png(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


# ---------------------------------------------------------------------------------------------------------------- views


def test_a_view_survives_a_link_and_a_pngs_metadata() -> None:
    view = View(DETR, "linear", "decoder.layers.1", "scene 7", -45.0, 0.5, "image", (3, 1), (9, 8), 0.25, removed=(2,))
    assert from_query(view.to_query()) == view
    assert from_query("?" + view.to_query() + "&voila-theme=dark") == view  # others' entries are passed over
    assert json.loads(view.to_json())["hue_shift"] == -45
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


def test_the_objects_hue_is_turned_exactly_and_nothing_else() -> None:
    plain, turned = (subject(View(hue_shift=hue), (64, 64)) for hue in (0.0, 120.0))
    assert plain.mask is not None
    changed = (plain.image != turned.image).any(1)
    rim = torch.nn.functional.max_pool2d(plain.mask.float()[None], 5, 1, 2)[0].bool()
    assert changed[plain.mask].float().mean() > 0.9
    assert not changed[~rim].any()
    whole = subject(View(hue_shift=120.0, region="image"), (64, 64))
    assert (whole.image != plain.image).any(1)[~rim].float().mean() > 0.3


@pytest.mark.parametrize("size", [(48, 64), (65, 33)])
def test_pictures_fit_sizes_that_are_not_square(size: tuple[int, int]) -> None:
    for name in ("scene 3", "chelsea"):
        shown = subject(View(picture=name, saturation=0.5), size)
        assert shown.image.shape == (1, 3, *size)
        assert shown.image.amin() >= 0
        assert shown.image.amax() <= 1
    assert subject(View(picture="scene 3"), size).mask.shape == (1, *size)  # type: ignore[union-attr]


def test_uploads_are_kept_as_pictures_and_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path))
    for kind, mode in (("PNG", "RGBA"), ("JPEG", "L"), ("WEBP", "RGB"), ("TIFF", "CMYK"), ("BMP", "RGB"), ("GIF", "P")):
        file = io.BytesIO()
        Image.new(mode, (37, 91), 80 if mode in "LP" else None).save(file, kind)
        kept = keep_upload(f"../a photo.{kind.lower()}", file.getvalue())
        assert subject(View(picture=kept), (64, 64)).image.shape == (1, 3, 64, 64)
        assert tmp_path in Path(kept).parents
        assert keep_upload(f"a photo.{kind.lower()}", file.getvalue()) == kept
    before = sorted(tmp_path.rglob("*"))
    for name, content, said in (
        ("notes.txt", b"no picture at all", "notes.txt is no picture"),
        ("empty.png", b"", "empty.png is empty"),
        ("cut.png", file_of_noise()[:400], "cut.png"),
        ("huge.png", b"\0" * (64 * 2**20 + 1), "64 MB"),
    ):
        with pytest.raises(BacksightError, match=said):
            keep_upload(name, content)
    assert sorted(tmp_path.rglob("*")) == before


def file_of_noise() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_folder_is_read_or_refused(tmp_path: Path) -> None:
    with pytest.raises(BacksightError, match="no folder"):
        in_folder(tmp_path / "nowhere")
    with pytest.raises(BacksightError, match="no image"):
        in_folder(tmp_path)
    (tmp_path / "b.png").write_bytes(file_of_noise())
    (tmp_path / "a.txt").write_text("no")
    assert [Path(name).name for name in in_folder(tmp_path)] == ["b.png"]


# --------------------------------------------------------------------------------------------------------------- seeing


def test_what_a_view_shows_is_what_the_library_computes(workbench: Workbench) -> None:
    seen = workbench.see(View(tap="blocks.2"))
    bench = workbench.bench(VIT)
    recorded = bench.target.record(seen.image)["blocks.2"]
    with torch.no_grad():
        made = bench.families["modular"]["blocks.2"](recorded)
    assert torch.equal(seen.reconstruction, made)
    assert seen.measures["psnr"] == pytest.approx(-10 * float((made - seen.image).square().mean().log10()), abs=1e-3)
    assert seen.errors.shape == bench.grid == (8, 8)
    assert seen.errors.mean() ** 2 <= float((made - seen.image).square().mean()) <= seen.errors.max() ** 2
    assert len(seen.answers[0].classes) == 5
    assert seen.answers[0].classes[0][1] > 0.5


def test_each_change_acts_where_it_should(workbench: Workbench) -> None:
    plain = workbench.see(View(tap="blocks.1"))
    erased = workbench.see(View(tap="blocks.1", erased=(0, 9)))
    mean = torch.tensor(workbench.bench(VIT).target.preprocessing.mean).view(3, 1, 1)
    assert torch.allclose(erased.image[0, :, :8, :8], mean.expand(3, 8, 8))
    assert torch.equal(erased.image[..., 16:, 16:], plain.image[..., 16:, 16:])
    shuffled = workbench.see(View(tap="blocks.1", shuffled=(0, 1, 10)))
    assert not torch.equal(shuffled.image, plain.image)
    pieces = sorted(float(shuffled.image[..., r : r + 8, c : c + 8].sum()) for r, c in ((0, 0), (0, 8), (8, 16)))
    assert pieces == pytest.approx(
        sorted(float(plain.image[..., r : r + 8, c : c + 8].sum()) for r, c in ((0, 0), (0, 8), (8, 16)))
    )
    noisy, more = (workbench.see(View(tap="blocks.1", noise=sigma)) for sigma in (0.5, 1.0))
    assert torch.equal(noisy.image, plain.image)
    assert plain.measures["psnr"] > noisy.measures["psnr"] > more.measures["psnr"]
    assert torch.equal(noisy.reconstruction, workbench.see(View(tap="blocks.1", noise=0.5)).reconstruction)
    crossed = workbench.see(View(tap="blocks.1", inverse_tap="blocks.4"))
    assert torch.equal(crossed.image, plain.image)
    assert crossed.measures["psnr"] < plain.measures["psnr"]


def test_all_tokens_swapped_show_the_other_picture(workbench: Workbench) -> None:
    swapped = workbench.see(View(family="linear", tap="patch_embed", swapped=tuple(range(64)), swap_picture="scene 5"))
    other = workbench.see(View(family="linear", tap="patch_embed", picture="scene 5"))
    plain = workbench.see(View(family="linear", tap="patch_embed"))
    assert (swapped.reconstruction - other.reconstruction).abs().max() < 1e-4  # the prefix tokens stay
    assert (swapped.reconstruction - plain.reconstruction).abs().mean() > 0.05
    half = workbench.see(View(family="linear", tap="patch_embed", swapped=tuple(range(32)), swap_picture="scene 5"))
    assert (half.reconstruction[..., :32, :] - other.reconstruction[..., :32, :]).abs().mean() < 0.05
    assert (half.reconstruction[..., 32:, :] - plain.reconstruction[..., 32:, :]).abs().mean() < 0.05


def test_object_queries_are_removed_or_the_reason_is_said(workbench: Workbench) -> None:
    tap = "decoder.layers.2"
    plain = workbench.see(View(DETR, tap=tap))
    query = plain.answers[0].boxes[0].query
    removed = workbench.see(View(DETR, tap=tap, removed=(query,)))
    assert not torch.equal(removed.reconstruction, plain.reconstruction)
    assert torch.equal(removed.image, plain.image)
    early = workbench.see(View(DETR, tap="encoder.layers.0", removed=(query,)))
    assert "before the object queries" in early.remarks[0]
    late = workbench.see(View(DETR, tap=tap, swapped=(1,)))
    assert "have no place" in late.remarks[0]
    everything = workbench.see(View(DETR, tap="predictions", removed=tuple(range(16))))
    other = workbench.see(View(DETR, tap="predictions", picture="scene 4", removed=tuple(range(16))))
    assert torch.equal(everything.reconstruction, other.reconstruction)  # nothing of the picture is left


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (View(tap="blocks.77"), "blocks.77"),
        (View(family="spline", tap="blocks.1"), "spline"),
        (View("scenes-vitt"), "scenes-vit"),
        (View(picture="nowhere.png"), "no picture"),
        (View(DETR, tap="backbone", inverse_tap="predictions"), "predictions"),
    ],
)
def test_what_cannot_be_seen_is_said(workbench: Workbench, view: View, said: str) -> None:
    with pytest.raises(BacksightError, match=said):
        workbench.see(view)


def test_the_curve_of_hues_does_not_depend_on_the_hue_that_is_looked_at(workbench: Workbench) -> None:
    view = View(DETR, picture="scene 2")
    curve = workbench.hues(view)
    assert list(curve) == list(workbench.bench(DETR).taps)
    assert curve == workbench.hues(replace(view, hue_shift=90.0, tap="projection"))
    assert curve["backbone"] < 30 < curve["predictions"]  # also what the notebook's table says of 16 scenes
    one = workbench.strip(replace(view, tap="backbone"))
    assert [depth.tap for depth in one] == list(curve)
    assert isinstance(one[0], Depth)


def test_the_loss_of_hue_in_words() -> None:
    assert "from every layer" in hue_in_words({"a": 1.0, "b": 29.0})
    assert "down to a (10°) and is lost from b on" in hue_in_words({"a": 10.0, "b": 80.0, "c": 70.0})
    assert "lost at b" in hue_in_words({"a": 10.0, "b": 80.0, "c": 7.0})
    assert "from no layer" in hue_in_words({"a": 31.0})
    assert "no hue to lose" in hue_in_words({"a": float("nan")})


def test_the_table_of_hues_has_intervals_and_a_null(workbench: Workbench) -> None:
    import pandas as pd

    metrics = pd.DataFrame(hue_rows(workbench, [VIT, DETR], 4))
    assert set(METRIC_COLUMNS) <= set(metrics.columns)
    assert (metrics.n == 4).all()
    assert (metrics.low <= metrics.value).all()
    assert (metrics.value <= metrics.high).all()
    null = metrics[metrics.inverse == "null_shuffled"]
    assert len(null) == 18
    assert null.value.between(45, 135).all()
    summary = lost_from(metrics)
    assert set(summary.target) == {VIT, DETR}
    assert summary.loc[(summary.target == DETR) & (summary.inverse == "modular"), "lost from"].iloc[0] != "-"
    assert len(hue_loss_figure(metrics).axes[0].lines) == 2 + 2


def test_a_target_without_inverses_gets_linear_ones_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path))
    name = "vit_tiny_patch16_224"
    from backsight.targets import load_target

    monkeypatch.setattr(
        "backsight.app.explorer.seeing.load_target",
        lambda name: load_target(name, ["patch_embed", "blocks.0"], pretrained=False),
    )
    said: list[str] = []
    bench = Workbench(fit_images=12).bench(name, said.append)
    assert list(bench.families) == ["linear"]
    assert bench.grid == (14, 14)
    assert any("Fitting linear" in text for text in said)
    again: list[str] = []
    seen = Workbench(fit_images=12)
    seen.bench(name, again.append)
    assert not any("Fitting" in text for text in again)
    assert seen.see(View(name, "linear", "blocks.0", "chelsea")).image.shape == (1, 3, 224, 224)


# ----------------------------------------------------------------------------------------------------------- the thread


def test_only_the_newest_request_is_computed() -> None:
    started, release, done, busy = threading.Event(), threading.Event(), [], []

    def steps(request: int) -> Any:
        if request == 0:
            started.set()
            release.wait(10)
        yield
        done.append(request)
        yield

    latest = Latest(steps, lambda request, error: done.append(error), busy.append)
    latest.submit(0)
    assert started.wait(10)
    for request in range(1, 20):
        latest.submit(request)
    release.set()
    assert latest.wait(10)
    latest.close()
    assert done == [19]  # the first was given up between its steps, the others never began
    assert busy[0] is True
    assert busy[-1] is False


def test_an_exception_is_told_and_the_thread_lives_on() -> None:
    told: list[Any] = []

    def steps(request: int) -> Any:
        if request:
            raise ValueError("no")
        told.append("done")
        yield

    latest = Latest(steps, lambda request, error: told.append(type(error)), lambda busy: None)
    for request in (1, 0):
        latest.submit(request)
        assert latest.wait(10)
    latest.close()
    assert told == [ValueError, "done"]


# ------------------------------------------------------------------------------------------------------------- the page


def test_a_control_changes_the_view_and_only_what_it_should(page: Page) -> None:
    row = page.rows[0]
    before = row.given.png, row.made.png
    page.depth.value = 4
    assert page.wait()
    assert page.view.tap == "blocks.3"
    assert row.given.png == before[0]
    assert row.made.png != before[1]
    assert row.strip.chosen == "blocks.3"
    made = row.made.png
    page.hue.value = 90
    assert page.wait()
    assert page.view.hue_shift == 90
    assert row.given.png != before[0]
    assert row.made.png != made
    assert "hue_shift=90" in page.frame.query
    assert "hue_shift=90.0" in page.code.value


def test_the_state_survives_another_target(page: Page) -> None:
    page.depth.value = 7
    page.hue.value = 60
    page._heard(None, {"kind": "patch", "patch": 5, "on": True}, None)
    assert page.wait()
    page.target.value = DETR
    assert page.wait()
    assert (page.view.target, page.view.tap, page.view.hue_shift, page.view.erased) == (DETR, "predictions", 60.0, (5,))
    assert page.depth.max == 9
    assert page.depth.value == 9
    page.target.value = VIT
    assert page.wait()
    assert page.view.tap == "norm"
    assert page.view.erased == (5,)


def test_a_second_target_is_seen_at_the_same_relative_depth(page: Page) -> None:
    page.look(View(tap="norm", compare=DETR, erased=(1,)))
    assert page.wait()
    assert page.rows[1].box.layout.display == ""
    assert page.rows[1].strip.chosen == "predictions"
    assert page.rows[1].given.rows == 0
    page.compare.value = ""
    assert page.wait()
    assert page.rows[1].box.layout.display == "none"


def test_errors_are_sentences_and_the_page_goes_on(page: Page) -> None:
    page.other.value = "scenes-vitt"
    assert page.wait()
    assert "scenes-vit" in page.message.value
    assert "Traceback" not in page.message.value
    assert page.view.target == VIT
    assert page.target.value == VIT
    page._heard(None, {"kind": "file", "name": "notes.txt"}, [memoryview(b"no picture")])
    assert "notes.txt is no picture" in page.message.value
    page.folder.value = "/nowhere/at/all"
    assert "no folder" in page.message.value
    page.open("hue_shift=blue")
    assert "hue_shift" in page.message.value
    page.hue.value = 30
    assert page.wait()
    assert page.message.value == ""
    assert page.view.hue_shift == 30


def test_dragging_never_queues_up_stale_pictures(page: Page) -> None:
    drawn: list[Any] = []
    page.rows[0].strip.observe(drawn.append, "depths")
    for value in range(-180, 181, 15):
        page.hue.value = value
    assert page.wait()
    assert page.view.hue_shift == 180
    assert len(drawn) < 10  # of 24; the others were dropped
    assert page.seen is not None
    assert page.seen.view.hue_shift == 180


def test_the_exported_python_writes_the_exported_png(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKSIGHT_RESULTS", str(tmp_path / "results"))
    sent: list[Any] = []
    monkeypatch.setattr(page.frame, "send", lambda content, buffers=None: sent.append((content, buffers)))
    page.look(View(tap="blocks.2", hue_shift=45.0, erased=(3,), noise=0.3, compare=DETR))
    assert page.wait()
    page.export.click()
    (message, buffers) = sent[-1]
    exported = bytes(buffers[0])
    assert message["kind"] == "download"
    assert "Exported to" in page.message.value
    assert [file.read_bytes() for file in (tmp_path / "results").rglob("*.png")] == [exported]
    monkeypatch.chdir(tmp_path)
    exec(page.view.to_python(), {})
    assert np.array_equal(png((tmp_path / "view.png").read_bytes()), png(exported))
    texts = Image.open(io.BytesIO(exported)).text  # type: ignore[attr-defined]
    assert json.loads(texts["backsight"])["erased"] == [3]
    assert len(json.loads(texts["measures"])) == 2


def test_a_click_on_a_query_removes_it_and_a_second_brings_it_back(page: Page) -> None:
    page.look(View(DETR, tap="decoder.layers.0"))
    assert page.wait()
    assert page.rows[0].given.queries
    assert page.rows[0].given.boxes
    query, made = page.rows[0].given.boxes[0]["query"], page.rows[0].made.png
    page._heard(None, {"kind": "query", "query": query}, None)
    assert page.wait()
    assert page.view.removed == (query,)
    assert page.rows[0].made.png != made
    page._heard(None, {"kind": "query", "query": query}, None)
    assert page.wait()
    assert page.view.removed == ()
    assert page.rows[0].made.png == made


def test_the_page_is_served_on_the_loopback_only() -> None:
    arguments, environment = command(free_port(), browser=False)
    assert "--Voila.ip=127.0.0.1" in arguments
    assert "--no-browser" in arguments
    template = Path(environment["JUPYTER_PATH"].split(":")[0]) / "voila" / "templates" / "backsight" / "index.html.j2"
    assert template.is_file()
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BacksightError, match="--port"):
            free_port(taken.getsockname()[1])


def test_tokens_on_several_levels_are_all_swapped(workbench: Workbench) -> None:
    from backsight.app.explorer.seeing import _token_numbers

    tokens = Tokens(torch.zeros(1, 1 + 16 + 4, 3), ((4, 4), (2, 2)), prefix=1)
    assert _token_numbers((0,), (8, 8), tokens) == [1, 17]
    assert _token_numbers((63,), (8, 8), tokens) == [16, 20]


def test_waits_say_when_time_is_up() -> None:
    latest = Latest(lambda request: iter([time.sleep(0.3)]), lambda request, error: None, lambda busy: None)
    latest.submit(1)
    assert latest.wait(0.01) is False
    assert latest.wait(10) is True
    latest.close()


def test_the_curve_marks_the_depth_at_once_where_it_is_known(page: Page) -> None:
    marked = page.rows[0].hue.value
    page.depth.value = 5
    assert page.wait()
    assert page.workbench.knows_hues(page.view)
    assert not page.workbench.knows_hues(replace(page.view, noise=0.7))
    assert page.rows[0].hue.value != marked
    assert page.workbench.hues(page.view) == page.workbench.hues(replace(page.view, tap="norm"))


def test_solved_inverses_refuse_tokens_of_another_form() -> None:
    swin = small_timm("Swin")
    recorded = swin.record(torch.rand(1, 3, *swin.image_size), ["layers.0", "layers.1"])
    view = View(family="map", tap="layers.0", inverse_tap="layers.1")
    with pytest.raises(BacksightError, match=r"map inverse of 'layers\.1' reads .* 'layers\.0' holds"):
        _refuse_another_form(view, "layers.0", recorded)
    _refuse_another_form(replace(view, inverse_tap=""), "layers.0", recorded)
    _refuse_another_form(replace(view, family="modular"), "layers.0", recorded)  # which says so itself
