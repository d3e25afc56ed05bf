"""Shards: which files, what is in them, what is damaged, and how they are written."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from image_sets import encoded, noise, sample, shade_of, write, write_tar

from deco_fast.data import FolderImages, ImageDataset, ShardImages
from deco_fast.data.shards import index_share
from deco_fast.data.shards import source as shard_source
from deco_fast.data.shards.__main__ import main
from deco_fast.data.shards.index import scan
from deco_fast.data.shards.locate import find_shards
from deco_fast.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four samples; the shade of an image is ten times its number."""
    root = tmp_path / "set"
    for shard in range(3):
        members = []
        for place in range(4):
            number = 4 * shard + place
            members += sample(f"class/{number:04}", 10 * number, number % 3)
        write_tar(root / f"train-{shard:03}.tar", members)
    return root


def opened(root: Path | str, limit: float = 1.0) -> ImageDataset:
    return ImageDataset(ShardImages(str(root)), 16, 16, max_damaged_share=limit)


def shades(dataset: ImageDataset) -> list[int]:
    return [shade_of(dataset[index][0]) for index in range(len(dataset))]


# --- which files ----------------------------------------------------------------------------


def test_a_folder_a_pattern_and_a_list_name_shards(shards: Path) -> None:
    paths = [shards / f"train-{number:03}.tar" for number in range(3)]
    write_tar(shards / "more/extra.tar", sample("x", 0, 0))
    write_tar(shards / ".old/extra.tar", sample("x", 0, 0))
    assert find_shards(str(shards)) == [shards / "more/extra.tar", *paths]
    assert find_shards(f"{shards}/train-{{000..002}}.tar") == paths
    assert find_shards([str(paths[2]), f"{shards}/train-00{{0,1}}.tar"]) == [paths[2], *paths[:2]]


def test_a_folder_may_have_braces_in_its_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "{odd}/0.tar", sample("x", 0, 0))
    assert find_shards(str(tmp_path / "{odd}")) == [tmp_path / "{odd}/0.tar"]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("{set}/train-{000..003}.tar", "train-003.tar does not exist"),
        ("{set}/train-{000..002.tar", "braces do not match"),
        ("nowhere", "does not exist"),
        ("pipe:cat {set}/train-000.tar", "local files"),
        ("https://example.com/train-000.tar", "local files"),
        ("{set}/empty", "has no .tar"),
        ("{set}/all.tar.gz", "decompress"),
        (["{set}/train-000.tar", "{set}/train-000.tar"], "twice"),
        ([], "names no shards"),
    ],
)
def test_what_names_no_shards_is_refused(shards: Path, root: str | list[str], message: str) -> None:
    (shards / "empty").mkdir()
    (shards / "all.tar.gz").write_bytes(b"")

    def filled(text: str) -> str:
        return text.replace("{set}", str(shards))

    with pytest.raises(UserError, match=message) as caught:
        find_shards(filled(root) if isinstance(root, str) else [filled(each) for each in root])
    assert "\n" not in str(caught.value)


# --- what is in them ------------------------------------------------------------------------


def test_images_and_labels_in_order(shards: Path) -> None:
    dataset = opened(shards)
    assert shades(dataset) == list(range(0, 120, 10))
    assert [dataset[index][1] for index in range(12)] == [number % 3 for number in range(12)]
    assert dataset.num_classes == 3
    assert dataset.source.names[5] == "train-001.tar/class/0005.png"
    assert not dataset.damage.names()


def test_samples_of_many_kinds(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "0.tar",
        [
            ("__meta__.json", b"{}"),  # has no image: no sample of ours
            *sample("json", 10, 4, how="json"),
            ("both.cls", b" 2\n"),
            ("both.json", b'{"label": 3}'),
            ("both.JPG", encoded(20, "jpg")),
            ("both.seg.png", encoded(200)),
            ("._both.jpg", b"of another system"),
            ("json-cls.webp", encoded(30, "webp")),
            ("json-cls.json", b'{"cls": 1}'),
            ("a.v1/b.txt", b"a text"),
            ("a.v1/b.png", encoded(40)),
            ("a.v1/b.cls", b"0"),
            *sample("same", 50, 0),
            *sample("same", 60, 1),
            *sample("n" * 150, 70, 0),  # in a header of its own
        ],
    )
    dataset = ImageDataset(ShardImages(str(tmp_path)), 16, 16, max_damaged_share=0.2)
    assert shades(dataset) == pytest.approx([10, 20, 30, 40, 50, 60, 70], abs=1)
    assert [dataset[index][1] for index in range(7)] == [4, 2, 1, 0, 0, 1, 0]
    assert dataset.source.names[3] == "0.tar/a.v1/b.png"
    assert dataset.damage.names() == ["0.tar/__meta__: no image"]
    index = scan(tmp_path / "0.tar")
    assert "txt" in index.fields and "seg.png" in index.fields


@pytest.mark.parametrize(
    ("field", "content"),
    [("cls", b"9" * 30), ("json", b'{"label": %s}' % (b"9" * 30)), ("json", b"[" * 20_000)],
    ids=["no label can be so large", "nor in JSON", "JSON as deep as a well"],
)
def test_a_label_that_cannot_be_meant_is_none(tmp_path: Path, field: str, content: bytes) -> None:
    write_tar(
        tmp_path / "0.tar",
        [("a.png", encoded(10)), (f"a.{field}", content), *sample("b", 20, 1)],
    )
    assert scan(tmp_path / "0.tar").labels.tolist() == [-1, 1]


def test_archives_that_were_joined(tmp_path: Path) -> None:
    write_tar(tmp_path / "a", sample("a", 10, 0))
    write_tar(tmp_path / "b", sample("b", 20, 0))
    (tmp_path / "0.tar").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    dataset = opened(tmp_path)
    assert shades(dataset) == [10, 20] and not dataset.damage.names()


def open_tar_files() -> int:
    descriptors = Path("/proc/self/fd").iterdir()
    return sum(os.readlink(each).endswith(".tar") for each in descriptors if each.is_symlink())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to count open files")
def test_more_shards_than_may_be_open(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_source, "_OPEN_SHARDS", 2)
    dataset = opened(shards)
    for index in (0, 4, 8, 1, 5, 9, 2):
        assert shade_of(dataset[index][0]) == 10 * index
    assert open_tar_files() == 2
    del dataset
    assert open_tar_files() == 0


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", encoded(0)), ("b.png", encoded(0))], "has a label: put KEY.cls"),
        ([("a.png", encoded(0)), ("a.cls", b"cat")], "has a label"),
        ([("a.png", encoded(0)), ("a.json", b"[1]")], "has a label"),
        ([("a.png", encoded(0)), ("a.json", b'{"label": "cat"}')], "has a label"),
        ([("a.txt", b"text"), ("a.cls", b"0")], "has no images"),
        ([], "has no images"),
    ],
)
def test_a_set_without_labels_or_images_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        ShardImages(str(tmp_path))
    assert "\n" not in str(caught.value)


# --- the index ------------------------------------------------------------------------------


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    scanned: list[Path] = []

    def counting(shard: Path) -> object:
        scanned.append(shard)
        return scan(shard)

    monkeypatch.setattr("deco_fast.data.shards.index.scan", counting)
    monkeypatch.setattr("deco_fast.data.shards.source.scan", counting)
    return scanned


def test_the_index_is_kept_and_made_again_for_a_changed_shard(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = count_scans(monkeypatch)
    first = opened(shards)
    assert len(scanned) == 3
    second = opened(shards)
    assert len(scanned) == 3
    assert second.fingerprint == first.fingerprint and shades(second) == shades(first)

    # Same size, other content; only the time tells.
    changed = shards / "train-001.tar"
    members = [member for place in range(4) for member in sample(f"class/{place}", 5, 1)]
    write_tar(changed, members)
    os.utime(changed, ns=(1, 1))
    assert shades(opened(shards))[4:8] == [5, 5, 5, 5]
    assert scanned[3:] == [changed]


@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_a_damaged_index_is_made_again(
    shards: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shades(opened(shards))
    kept = sorted((shards / ".deco-index").iterdir())
    assert [file.name for file in kept] == [f"train-{number:03}.tar.index" for number in range(3)]
    half = kept[0].read_bytes()
    for file, damaged in zip(kept, (content, half[: len(half) // 2], half), strict=True):
        file.write_bytes(damaged)
    scanned = count_scans(monkeypatch)
    assert shades(opened(shards)) == whole
    assert shards / "train-000.tar" in scanned and shards / "train-001.tar" in scanned


def test_processes_share_the_indexing(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = count_scans(monkeypatch)
    index_share(str(shards), None, 1, 2)
    assert [path.name for path in scanned] == ["train-001.tar"]
    index_share(str(shards), None, 0, 2)
    assert len(scanned) == 3
    assert len(opened(shards)) == 12 and len(scanned) == 3


def test_an_index_folder_of_its_own(shards: Path, tmp_path: Path) -> None:
    # Two sets with shards of the same name do not get in each other's way.
    write_tar(tmp_path / "other/train-000.tar", sample("x", 70, 0))
    roots = [str(shards), str(tmp_path / "other")]
    dataset = ImageDataset(ShardImages(roots, tmp_path / "index"), 16, 16)
    assert shades(dataset) == [*range(0, 120, 10), 70]
    assert len(list((tmp_path / "index").iterdir())) == 4
    assert not (shards / ".deco-index").exists()


def test_without_a_place_for_the_index_it_goes_on(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shards / ".deco-index").write_text("in the way")
    assert len(opened(shards)) == 12
    assert len(caplog.records) == 1
    assert "data.index_folder" in caplog.records[0].getMessage()


# --- damage ---------------------------------------------------------------------------------


def test_a_damaged_header_costs_one_sample(shards: Path) -> None:
    path = shards / "train-001.tar"
    with tarfile.open(path) as archive:
        third = archive.getmember("class/0006.png")
    content = bytearray(path.read_bytes())
    content[third.offset : third.offset + 100] = b"\xff" * 100
    path.write_bytes(content)
    dataset = opened(shards)
    assert shades(dataset) == [0, 10, 20, 30, 40, 50, 70, 80, 90, 100, 110]
    assert dataset.damage.names() == [
        f"{path}: has a damaged header near byte {third.offset}",
        "train-001.tar/class/0006: no image",
    ]
    assert dataset.source.lost_images == 1


def test_images_whose_names_have_dots_are_counted_one_by_one(tmp_path: Path) -> None:
    members = [*sample("plain", 0, 0), *sample("frame.0", 10, 1), *sample("frame.1", 20, 2)]
    write_tar(tmp_path / "set/0.tar", members)
    dataset = opened(tmp_path / "set")
    assert shades(dataset) == [0]
    assert dataset.source.lost_images == 2
    assert dataset.damage.names() == [
        "0.tar/frame: no image, but .0.png: the name of an image has one dot, before its ending"
    ]
    with pytest.raises(UserError, match="of 3"):
        opened(tmp_path / "set", limit=0.5)


def test_a_tilde_is_the_home_folder(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shards.parent))
    monkeypatch.setenv("USERPROFILE", str(shards.parent))
    assert find_shards(f"~/{shards.name}") == find_shards(str(shards))


@pytest.mark.parametrize("cut", ["in an image", "between samples", "in a header"])
def test_a_truncated_shard_gives_what_is_left(shards: Path, cut: str) -> None:
    path = shards / "train-001.tar"
    with tarfile.open(path) as archive:
        third = archive.getmember("class/0006.png")
    length = {
        "in an image": third.offset_data + 9,
        "between samples": third.offset,
        "in a header": third.offset + 100,
    }[cut]
    os.truncate(path, length)
    dataset = opened(shards)
    assert shades(dataset) == [0, 10, 20, 30, 40, 50, 80, 90, 100, 110]
    (name,) = dataset.damage.names()
    assert name.startswith(f"{path}: ")
    assert dataset.source.lost_images == 2  # the other shards hold four


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"no tar at all " * 300])
def test_a_shard_with_nothing_in_it(shards: Path, content: bytes) -> None:
    path = shards / "train-001.tar"
    path.write_bytes(content)
    dataset = opened(shards)
    assert shades(dataset) == [0, 10, 20, 30, 80, 90, 100, 110]
    if content.strip(b"\0"):
        assert dataset.damage.names() and dataset.source.lost_images == 4
    with pytest.raises(UserError, match="has no images"):
        ShardImages(str(path))


def test_too_many_damaged_shards_are_refused(shards: Path) -> None:
    os.truncate(shards / "train-001.tar", 700)
    assert len(opened(shards, limit=0.4)) == 8
    with pytest.raises(UserError, match=r"4 of 12 images .*train-001\.tar: ends") as caught:
        opened(shards, limit=0.3)
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_replaced_by_the_next(shards: Path) -> None:
    path = shards / "train-001.tar"
    with tarfile.open(path) as archive:
        last = archive.getmember("class/0007.png")
    content = bytearray(path.read_bytes())
    content[last.offset_data : last.offset_data + last.size] = bytes(last.size)
    path.write_bytes(content)
    dataset = opened(shards)
    assert shade_of(dataset[7][0]) == 80 and dataset[7][1] == 2
    assert dataset.damage.names() == ["train-001.tar/class/0007.png"]


def test_a_shard_that_shrinks_during_the_run(shards: Path) -> None:
    dataset = opened(shards)
    os.truncate(shards / "train-002.tar", 100)
    assert shade_of(dataset[8][0]) == 0
    assert dataset.damage.indices() == [8, 9, 10, 11]


# --- writing --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for number, name in enumerate(
        ["ant/1.png", "ant/1.jpg", "ant/sub/1.png", "bee/a.b.png", "bee/c.JPEG", "cat/d.webp"]
    ):
        write(root / name, noise(number, name.rpartition(".")[2].lower()))
    return root


def test_shards_do_not_go_among_the_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    for out in (folder, folder / "shards", folder / ".." / folder.name / "a" / "b"):
        assert main(["pack", str(folder), str(out)]) == 2
        assert "itself: choose another folder for the shards" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_packed_shards_hold_the_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["pack", str(folder), str(out), "--images-per-shard", "4"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "classes.json",
        "pack.json",
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    assert json.loads((out / "classes.json").read_text()) == ["ant", "bee", "cat"]
    packed = ImageDataset(ShardImages(str(out)), 16, 16)
    plain = ImageDataset(FolderImages(folder), 16, 16)
    assert not packed.damage.names() and len(packed) == len(plain) == 6
    # The number in a name is the place in the folder.
    places = [int(packed.source.names[i].split("/")[-1][:8]) for i in range(6)]
    assert sorted(places) == list(range(6)) and places != sorted(places)
    for index, place in enumerate(places):
        assert torch.equal(packed[index][0], plain[place][0])
        assert packed[index][1] == plain[place][1]


def test_packing_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arguments = ["--images-per-shard", "2"]
    main(["pack", str(folder), str(whole), *arguments])
    main(["pack", str(folder), str(resumed), *arguments])
    # As a killed call leaves it: one shard is missing, and there is half of it.
    (resumed / "shard-000001.tar").rename(resumed / ".shard-000001.tar.tmp-0000")
    with pytest.raises(UserError, match=r"lacks 1 of \d shards, shard-000001\.tar first: type the"):
        ShardImages(str(resumed))
    kept = (resumed / "shard-000000.tar").stat().st_mtime_ns
    assert main(["pack", str(folder), str(resumed), *arguments]) == 0
    assert (resumed / "shard-000000.tar").stat().st_mtime_ns == kept
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in resumed.iterdir()) == names
    for name in names:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_packing_refuses_what_it_would_spoil(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str | Path) -> str:
        assert main(["pack", *map(str, arguments)]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and printed.count("\n") == 1
        return printed

    out = tmp_path / "out"
    assert main(["pack", str(folder), str(out)]) == 0
    capsys.readouterr()
    assert "with other options" in error(folder, out, "--images-per-shard", "3")
    (folder / "cat/new.png").write_bytes(encoded(0))
    assert "of other images" in error(folder, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("")
    assert "is not empty" in error(folder, tmp_path / "other")
    assert "does not exist" in error(folder / "missing", out)
    assert "--images-per-shard" in error(folder, out, "--images-per-shard", "0")


def test_a_full_disk_leaves_the_finished_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original, added = tarfile.TarFile.addfile, []

    def full(self: tarfile.TarFile, header: tarfile.TarInfo, content: io.BytesIO) -> None:
        added.append(header.name)
        if len(added) > 6:
            raise OSError(28, "No space left on device")
        original(self, header, content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    assert main(["pack", str(folder), str(out), "--images-per-shard", "2"]) == 2
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar"]
    assert not list(out.glob(".*"))
    monkeypatch.undo()
    assert main(["pack", str(folder), str(out), "--images-per-shard", "2"]) == 0
    assert len(ImageDataset(ShardImages(str(out)), 16, 16)) == 6
