"""scripts/predict.py: labels and overlays of images, folders, lists and videos, and what it refuses."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import load_config
from common.data import DATASETS
from common.models import build_model, load_weights
from scripts import predict
from tests.unit.data_files import picture, save

pytestmark = pytest.mark.usefixtures("unchanged")


def test_predict_writes_what_the_network_says(config, weights, tmp_path, call):
    pictures = tmp_path / "in"
    for name, size in (("a.png", (40, 72)), ("deep/b.jpg", (64, 64))):
        save(picture(*size), pictures / name)
    call(predict.main, config, weights, pictures, "--out", tmp_path / "out", "--device", "cpu")
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert found == ["a.png", "a_overlay.jpg", "deep/b.png", "deep/b_overlay.jpg"]
    model = build_model(load_config(config).model).eval()
    load_weights(model, weights)
    image = torch.from_numpy(np.array(Image.open(pictures / "a.png"))).permute(2, 0, 1)[None]
    with Image.open(tmp_path / "out" / "a.png") as written:
        assert written.mode == "P" and written.getpalette()[:3] == list(DATASETS["cityscapes"].palette[0])
        assert np.array_equal(np.array(written), model.labels(image)[0][0].numpy())
    with Image.open(tmp_path / "out" / "deep" / "b_overlay.jpg") as shown:
        assert shown.size == (64, 64)


def test_predict_takes_a_list(config, weights, tmp_path, call, fails):
    """Paths are relative to the list's folder; one that leads out of it is written by its last part."""
    for path in ("in/a.png", "in/deep/b c.png", "elsewhere/d.png"):
        save(picture(32, 48), tmp_path / path)
    images = tmp_path / "in" / "some.txt"
    images.write_text(f"deep/b c.png\n\n../elsewhere/d.png\n{tmp_path / 'in' / 'a.png'}\n")
    out = tmp_path / "out"
    call(predict.main, config, weights, images, "--out", out, "--device", "cpu")
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == ["a.png", "d.png", "deep/b c.png"]

    images.write_text("deep/e.png\n")
    assert "some.txt: no image 'deep/e.png'" in fails(predict.main, config, weights, images, "--out", out)


def film_by_av(path, pictures):
    import av

    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        for image in pictures:
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        video.mux(stream.encode())


def film_by_opencv(path, pictures):
    import cv2

    height, width = pictures[0].shape[:2]
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (width, height))
    for image in pictures:
        video.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    video.release()


@pytest.mark.parametrize("library, film", [("av", film_by_av), ("cv2", film_by_opencv)])
def test_predict_takes_a_video(library, film, config, weights, tmp_path, call, fails, monkeypatch):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    monkeypatch.setattr(predict, "find_spec", lambda name: name if name == library else None)
    colours = [np.full((48, 64, 3), colour, np.uint8) for colour in ((200, 40, 40), (40, 200, 40), (40, 40, 200))]
    film(tmp_path / "drive.mp4", colours)
    for (name, shown), colour in zip(predict.frames(tmp_path / "drive.mp4", "drive"), colours, strict=True):
        assert np.abs(shown.astype(int) - colour).mean() < 10, name

    words = (predict.main, config, weights, tmp_path / "drive.mp4", "--out", tmp_path / "out", "--device", "cpu")
    call(*words)
    names = sorted(path.name for path in (tmp_path / "out" / "drive").iterdir())
    assert names == [f"00000{i}{end}" for i in range(3) for end in (".png", "_overlay.jpg")]
    with Image.open(tmp_path / "out" / "drive" / "000002.png") as label:
        assert label.size == (64, 48)
    assert "000000.png: there already" in fails(*words)

    (tmp_path / "drive.mp4").write_bytes(b"no video")
    said = fails(*words, "--force")
    assert "drive.mp4: cannot decode the video" in said or "drive.mp4: holds no frame that can be decoded" in said


def test_predict_says_what_a_video_needs(config, weights, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    (tmp_path / "drive.mp4").write_bytes(b"")
    line = fails(predict.main, config, weights, tmp_path / "drive.mp4", "--out", tmp_path / "out")
    assert "drive.mp4: a video needs PyAV or OpenCV" in line and not (tmp_path / "out").exists()


def test_predict_keeps_what_is_there(config, weights, tmp_path, call, fails):
    """Its own inputs, and what an earlier call has written; files below --out are no inputs."""
    folder = tmp_path / "in"
    image = save(picture(32, 32), folder / "a.png")
    before = image.read_bytes()
    words = (predict.main, config, weights, folder, "--device", "cpu", "--out")
    assert "a.png: there already; write elsewhere, or replace what is there with --force" in fails(*words, folder)
    assert image.read_bytes() == before and len(list(folder.iterdir())) == 1

    assert "1 images segmented" in call(*words, folder / "labels")
    assert "a.png: there already, and 1 more" in fails(*words, folder / "labels")
    assert "1 images segmented" in call(*words, folder / "labels", "--force")
    assert image.read_bytes() == before


def test_predict_refuses(config, weights, tmp_path, fails):
    out, image = ("--out", tmp_path / "out"), save(picture(32, 32), tmp_path / "in" / "a.png")
    assert "no such image" in fails(predict.main, config, weights, tmp_path / "b.png", *out)
    save(picture(32, 32), tmp_path / "in" / "a.jpg")
    assert "written as 'a' too" in fails(predict.main, config, weights, tmp_path / "in", *out)
    assert "no such weight file" in fails(predict.main, config, tmp_path / "none.pth", image, *out)
    wrong = fails(predict.main, config, weights, image, "model.num_classes=11", *out)
    assert "model.num_classes is 11, cityscapes has 19" in wrong
    image.write_bytes(image.read_bytes()[:200])
    assert "a.png: cannot decode the image" in fails(predict.main, config, weights, image, *out)
