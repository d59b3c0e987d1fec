"""From image files to what the loop sees."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import Dataset
from train.data import EXIF_ORIENTATION, Cache, read_folder, read_pixels
from train.errors import BadDataset

TURN_RIGHT = 6


def read(folder: Path, caption: str | None = None) -> object:
    return read_folder(Dataset(folder=folder, caption=caption), folder, ["sks"])


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16] = (255, 0, 0)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURN_RIGHT
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = read_pixels(tmp_path / "a.png", 32)
    np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[:8] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    flat = read_pixels(tmp_path / "a.png", 16)
    assert (flat[0, 0] == (10, 20, 30)).all()
    assert (flat[15, 0] == 255).all()


def test_a_wide_image_keeps_its_middle(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), dtype=np.uint8)
    pixels[:, 16:32] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_pixels(tmp_path / "a.png", 16) == 200).all()


def test_every_problem_of_the_folder_is_told(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(photos, folder)
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "copy.txt").write_text("a red circle")
    Image.new("RGBA", (8, 8)).save(folder / "clear.png")
    (folder / "clear.txt").write_text("a sks circle")
    report = read_folder(Dataset(folder=folder), folder, ["sks"])
    assert len(report.examples) == 6
    assert set(report.warnings) == {
        "clear.png: transparency laid over white",
        "copy.png: its caption contains no trigger",
        "copy.png: the same image as 0.png",
    }


def test_an_image_without_caption_is_an_error(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "mine")
    (tmp_path / "mine" / "2.txt").unlink()
    with pytest.raises(BadDataset, match=r"1 of 4 images have no .txt caption, such as 2\.png"):
        read(tmp_path / "mine")
    read(tmp_path / "mine", caption="a sks circle")


def test_captions_that_never_say_the_trigger_are_an_error(photos: Path) -> None:
    with pytest.raises(BadDataset, match="no caption contains the trigger 'zorb'"):
        read_folder(Dataset(folder=photos), photos, ["zorb"])


def test_an_unreadable_image_is_named(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "mine")
    (tmp_path / "mine" / "1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(BadDataset, match=r"1\.png: is not a readable image"):
        read(tmp_path / "mine")


def test_an_empty_or_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match="holds no images"):
        read(tmp_path)
    with pytest.raises(BadDataset, match="no such folder"):
        read(tmp_path / "none")


def test_the_fingerprint_follows_content_and_not_names(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(photos, folder)
    before = read_folder(Dataset(folder=folder), folder, ["sks"]).fingerprint()
    for suffix in (".png", ".txt"):
        (folder / f"0{suffix}").rename(folder / f"z{suffix}")
    assert read_folder(Dataset(folder=folder), folder, ["sks"]).fingerprint() == before
    (folder / "z.txt").write_text("a sks purple circle")
    assert read_folder(Dataset(folder=folder), folder, ["sks"]).fingerprint() != before


def test_the_cache_computes_once_per_key(tmp_path: Path) -> None:
    calls = []

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.arange(3.0)

    first = Cache(tmp_path).get(("a", "b"), compute)
    second = Cache(tmp_path).get(("a", "b"), compute)
    Cache(tmp_path).get(("ab",), compute)
    assert torch.equal(first, second)
    assert len(calls) == 2
