"""Images in class folders: what is listed, how it is read, and what is damaged."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import encoded, noise, shade_of, write
from PIL import Image

from deco_fast.data import FolderImages, ImageDataset
from deco_fast.data.captions import FolderCaptions
from deco_fast.data.transforms import centre_crop, to_pixels, to_rgb
from deco_fast.errors import UserError
from deco_fast.evaluation.fingerprint import files_fingerprint
from deco_fast.evaluation.image_sets import open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes; the shade of an image is its place in the dataset times ten."""
    names = ["ant/1.png", "ant/2.JPEG", "ant/sub/0.png", "bee/x.jpg", "bee/y.webp", "cat/only.bmp"]
    for place, name in enumerate(names):
        write(tmp_path / name, encoded(10 * place, name.rpartition(".")[2]))
    for name in ("ant/.hidden.png", ".cache/1.png", "cat/.thumbnails/1.png", "stray.png"):
        write(tmp_path / name, encoded(255))
    (tmp_path / "bee/notes.txt").write_text("no image")
    return tmp_path


def open_folder(root: Path, *, random_flip: bool = False, limit: float = 1.0) -> ImageDataset:
    return ImageDataset(FolderImages(root), 16, 16, random_flip, max_damaged_share=limit)


def test_classes_and_images(folder: Path) -> None:
    dataset = open_folder(folder)
    source = FolderImages(folder)
    assert source.classes == ["ant", "bee", "cat"] and dataset.num_classes == 3
    assert len(dataset) == 6
    samples = [dataset[index] for index in range(6)]
    assert [label for _, label in samples] == [0, 0, 0, 1, 1, 2]
    np.testing.assert_allclose([shade_of(image) for image, _ in samples], range(0, 60, 10), atol=2)
    assert all(image.shape == (3, 16, 16) for image, _ in samples)
    assert all(image.dtype == torch.uint8 for image, _ in samples)
    assert source.path(2) == folder / "ant/sub/0.png"
    with pytest.raises(IndexError):
        dataset[6]


def test_images_are_cropped_to_shape(folder: Path) -> None:
    content = noise(0, size=(90, 60))
    write(folder / "ant/0.png", content)
    image, _ = ImageDataset(FolderImages(folder), 16, 32)[0]
    expected = to_pixels(centre_crop(to_rgb(Image.open(io.BytesIO(content))), 16, 32))
    assert torch.equal(image, expected)


def test_flip_doubles_the_samples(folder: Path) -> None:
    write(folder / "bee/x.jpg", noise(0, "jpg", (40, 40)))
    plain, dataset = open_folder(folder), open_folder(folder, random_flip=True)
    assert len(dataset) == 2 * len(plain)
    for index in range(len(plain)):
        image, label = plain[index]
        assert torch.equal(dataset[index][0], image) and dataset[index][1] == label
        mirrored, mirrored_label = dataset[index + len(plain)]
        assert torch.equal(mirrored, image.flip(-1)) and mirrored_label == label
    assert not torch.equal(plain[3][0], plain[3][0].flip(-1))


def test_fingerprint_tells_names_and_labels_apart(folder: Path, tmp_path: Path) -> None:
    first = open_folder(folder).fingerprint
    assert open_folder(folder).fingerprint == first
    (folder / "cat/only.bmp").rename(folder / "cat/other.bmp")
    renamed = open_folder(folder).fingerprint
    (folder / "cat/other.bmp").rename(folder / "cat/only.bmp")
    (folder / "cat").rename(folder / "cow")
    assert len({first, renamed, open_folder(folder).fingerprint}) == 3


def test_linked_folders_are_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """By training, with captions and in evaluations alike; a link back up ends there."""
    tree = tmp_path_factory.mktemp("tree")
    write(tree / "dog/0.png", encoded(70))
    before = files_fingerprint(tree)
    (tree / "ant").symlink_to(folder / "ant")
    (tree / "dog/more").symlink_to(folder / "bee")
    (tree / "dog/up").symlink_to(tree)
    names = FolderImages(tree).names
    expected = ["ant/1.png", "ant/2.JPEG", "ant/sub/0.png"]
    expected += ["dog/0.png", "dog/more/x.jpg", "dog/more/y.webp"]
    found = [names[index] for index in range(len(names))]
    assert found == expected
    assert len(open_images(tree, crop=16)) == len(expected)
    (tree / "ant/1.txt").write_text("an ant")
    assert FolderCaptions(tree).names[0] == "ant/1.png"
    assert files_fingerprint(tree) != before


def test_a_folder_that_cannot_be_read_ends_a_listing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if os.fspath(path).endswith("sub"):  # which root could read whatever its mode
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for listed in (FolderImages, open_images, files_fingerprint):
        with pytest.raises(UserError, match=r"ant/sub cannot be read: Permission denied"):
            listed(folder)


# --- damage ---------------------------------------------------------------------------------


def damage(folder: Path) -> list[str]:
    """Make three of the six images unreadable, each in another way."""
    whole = (folder / "bee/x.jpg").read_bytes()
    (folder / "bee/x.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bee/y.webp").write_text("<html>not found</html>")
    # Pillow would have Ghostscript run this, if it is there.
    (folder / "cat/only.bmp").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    return ["bee/x.jpg", "bee/y.webp", "cat/only.bmp"]


def test_damaged_images_are_replaced_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = damage(folder)
    dataset = open_folder(folder, random_flip=True)
    assert dataset.damage.names() == []
    for _ in range(2):
        for index in (3, 4, 5, 9):  # past the last image it goes on with the first
            image, label = dataset[index]
            assert shade_of(image) == 0 and label == 0
        assert dataset.damage.names() == damaged
        assert dataset.damage.indices() == [3, 4, 5]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"skipped damaged image {path}" for path in damaged
    ]


def test_a_file_that_vanishes_is_replaced_too(folder: Path) -> None:
    dataset = open_folder(folder)
    (folder / "ant/1.png").unlink()
    assert shade_of(dataset[0][0]) == pytest.approx(10, abs=2)
    assert dataset.damage.names() == ["ant/1.png"]


def test_only_the_first_ten_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(12):
        (folder / f"bee/broken{number}.png").write_bytes(b"")
    dataset = open_folder(folder)
    for index in range(len(dataset)):
        dataset[index]
    assert len(dataset.damage.names()) == 12
    assert len(caplog.records) == 11
    assert "further" in caplog.records[-1].getMessage()


def test_too_large_a_share_stops_the_run(folder: Path) -> None:
    damage(folder)
    dataset = open_folder(folder, limit=0.34)
    dataset[4]  # the two from there on are damaged: 0.33
    with pytest.raises(UserError, match=r"3 of 6 images .* 0\.34 .* bee/x\.jpg: repair"):
        dataset[3]


def test_what_others_found_counts(folder: Path) -> None:
    damage(folder)
    dataset = open_folder(folder, limit=0.34)
    dataset[4]
    dataset.damage.merge(torch.tensor([False, False, False, False, True, True]))
    assert dataset.damage.indices() == [4, 5]
    dataset.damage.merge(torch.tensor([True, False, False, False, False, False]))
    with pytest.raises(UserError, match="3 of 6"):
        dataset.damage.check()


def test_nothing_readable_ends_the_run(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"ant/{number}.png", b"")
    with pytest.raises(UserError, match=r"3 image.* check"):
        open_folder(tmp_path)[1]


# --- refusals -------------------------------------------------------------------------------


def test_what_is_no_image_folder_is_refused(folder: Path) -> None:
    def error(root: Path) -> str:
        with pytest.raises(UserError) as caught:
            FolderImages(root)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = folder / "missing"
    assert str(missing) in error(missing) and "does not exist" in error(missing)
    assert "no folder" in error(folder / "stray.png")
    empty = folder / "empty"
    empty.mkdir()
    assert str(empty) in error(empty) and "no class folders" in error(empty)
    message = error(folder)  # `empty` is now one of its class folders
    assert str(empty) in message and "has no images" in message and "put images" in message


def test_wrong_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ImageDataset(FolderImages(folder), 0, 16)
    with pytest.raises(ValueError, match="0 … 1"):
        open_folder(folder, limit=1.5)
