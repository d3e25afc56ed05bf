"""Captioned images: folders, BLIP3o's shards, sizes, prefixes, dropout (specification B.12)."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import metadata, tensors
from image_sets import encoded, noise, shade_of, write, write_tar
from PIL import Image
from scipy import stats

from deco_fast.conditioning.captions import PREFIXES, drop_captions, prefix_captions
from deco_fast.data import CaptionedImages, FolderCaptions, ShardImages
from deco_fast.data.shards.source import index_share
from deco_fast.data.transforms import centre_crop, crop_to_size
from deco_fast.errors import UserError


def samples(dataset: CaptionedImages) -> list[tuple[int, str]]:
    return [
        (shade_of(image), caption) for image, caption in (dataset[i] for i in range(len(dataset)))
    ]


class TestFolder:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "photos"
        for name, shade, caption in (
            ("b.png", 20, "a dark square\n"),
            ("a.JPG", 200, "\ufeffein helles Quadrat, größer"),
            ("more/c.png", 100, ""),
        ):
            write(root / name, encoded(shade, name[-3:]))
            write((root / name).with_suffix(".txt"), caption.encode())
        write(root / "lonely.png", encoded(50))
        write(root / ".hidden/d.png", encoded(50))
        write(root / "notes.txt", b"no image")
        return root

    def test_images_come_with_the_text_beside_them(self, root: Path) -> None:
        source = FolderCaptions(root)
        assert [source.names[i] for i in range(3)] == ["a.JPG", "b.png", "more/c.png"]
        assert (source.lost, source.lost_images) == (("lonely.png: no caption",), 1)
        dataset = CaptionedImages(source, 16, 16, max_damaged_share=0.5)
        assert samples(dataset) == [
            (200, "ein helles Quadrat, größer"),
            (20, "a dark square"),
            (100, ""),
        ]

    def test_a_caption_that_cannot_be_read_is_damage(self, root: Path) -> None:
        (root / "b.txt").write_bytes("größer".encode("latin-1"))
        dataset = CaptionedImages(FolderCaptions(root), 16, 16, max_damaged_share=0.5)
        assert samples(dataset)[1] == (100, "")  # the next one stands in
        assert dataset.damage.names() == ["lonely.png: no caption", "b.png"]

    def test_what_is_refused(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="1 of 4 images are damaged"):
            CaptionedImages(FolderCaptions(root), 16, 16)
        with pytest.raises(UserError, match="nowhere does not exist"):
            FolderCaptions(tmp_path / "nowhere")
        with pytest.raises(UserError, match="is no folder"):
            FolderCaptions(root / "a.JPG")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"put NAME.txt beside each NAME.jpg"):
            FolderCaptions(tmp_path / "empty")


class TestShards:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = tmp_path / "blip3o"
        for shard in range(2):
            members = []
            for place in range(3):
                number = 3 * shard + place
                key = f"sa_{number:06}"
                members += [
                    (f"{key}.jpg", encoded(40 * number, "jpg")),
                    (f"{key}.txt", f"shade number {number}, ü\n".encode()),
                    (f"{key}.json", b"{}"),
                ]
            write_tar(root / f"part{shard}/{shard:05}.tar", members)
        return root

    def test_images_come_with_their_captions(self, root: Path) -> None:
        for _ in range(2):  # the second time from the kept index
            dataset = CaptionedImages(ShardImages(str(root), captions=True), 16, 16)
            expected = [(40 * n, f"shade number {n}, ü") for n in range(6)]
            assert samples(dataset) == expected
        index_share(str(root), None, 0, 2)

    def test_the_other_names_of_the_fields(self, root: Path) -> None:
        members = [("x.output_image", encoded(7)), ("x.input_prompt", b"seven")]
        members += [("y.png", encoded(9)), ("z.txt", b"no image")]
        write_tar(root / "extra.tar", members)
        source = ShardImages(str(root / "extra.tar"), captions=True)
        assert source.lost == ("extra.tar/y: no caption", "extra.tar/z: no image")
        assert samples(CaptionedImages(source, 16, 16, max_damaged_share=1.0)) == [(7, "seven")]

    def test_shards_without_captions(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("x.png", encoded(7)), ("x.cls", b"1")])
        with pytest.raises(UserError, match=r"no image in .* has a caption: put KEY.txt"):
            ShardImages(str(tmp_path), captions=True)
        with pytest.raises(UserError, match=r"has no images .*: a shard holds KEY.jpg and KEY.txt"):
            write_tar(tmp_path / "a.tar", [("x.txt", b"alone")])
            ShardImages(str(tmp_path), captions=True)

    def test_a_run_is_told_apart_by_its_images(self, root: Path) -> None:
        first, second = (
            CaptionedImages(ShardImages(str(place), captions=True), 16, 16).fingerprint
            for place in (root, root / "part0")
        )
        assert first != second


class TestSize:
    def folder(self, root: Path, sizes: list[tuple[int, int]]) -> FolderCaptions:
        for number, size in enumerate(sizes):
            write(root / f"{number}.png", encoded(10 * number, size=size))
            write(root / f"{number}.txt", str(number).encode())
        return FolderCaptions(root)

    def test_small_images_are_passed_over_and_no_damage(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path, [(15, 40), (16, 16), (40, 15), (8, 8), (17, 90)])
        dataset = CaptionedImages(source, 16, 16, skip_small=True)
        captions = [caption for _, caption in samples(dataset)]
        assert captions[1] == "1" and captions[4] == "4" and set(captions) == {"1", "4"}
        assert captions == [caption for _, caption in samples(dataset)]
        assert dataset.damage.names() == []
        everything = CaptionedImages(source, 16, 16)
        assert [caption for _, caption in samples(everything)] == list("01234")

    def test_no_image_stands_in_for_all_that_are_passed_over(self, tmp_path: Path) -> None:
        """As many small ones in a row as a source of other images may bring."""
        small, large = 150, 50
        source = self.folder(tmp_path, [(8, 8)] * small + [(16, 16)] * large)
        dataset = CaptionedImages(source, 16, 16, skip_small=True)
        drawn = Counter(caption for _, caption in samples(dataset))
        # Each is there for itself and, in the mean, for three others.
        assert sum(drawn.values()) == small + large
        assert len(drawn) == large and max(drawn.values()) <= 12
        assert dataset.damage.names() == []

    def test_nothing_but_small_images(self, tmp_path: Path) -> None:
        dataset = CaptionedImages(self.folder(tmp_path, [(8, 8)] * 2), 16, 16, skip_small=True)
        with pytest.raises(UserError, match=r"2 image\(s\) in a row cannot be used \(8×8 pixels"):
            dataset[0]

    @pytest.mark.parametrize(("width", "height"), [(40, 20), (21, 33), (16, 16), (100, 31)])
    def test_the_bilinear_crop_is_resize_and_centre_crop(self, width: int, height: int) -> None:
        image = Image.open(io.BytesIO(noise(0, size=(width, height))))
        cropped = np.asarray(crop_to_size(image, 16, 16, "bilinear"))
        # By another implementation of bilinear scaling with antialiasing.
        short, long = 16, int(16 * max(width, height) / min(width, height))
        target = (short, long) if width >= height else (long, short)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
        scaled = torch.nn.functional.interpolate(
            pixels, target, mode="bilinear", antialias=True, align_corners=False
        )[0]
        top, left = round((target[0] - 16) / 2), round((target[1] - 16) / 2)
        expected = scaled[:, top : top + 16, left : left + 16].permute(1, 2, 0).numpy()
        assert cropped.shape == (16, 16, 3)
        assert np.abs(cropped - expected).max() <= 1.5  # Pillow rounds after each of two passes

    def test_the_adm_crop_is_the_class_model_s(self) -> None:
        image = Image.open(io.BytesIO(noise(0, size=(50, 40))))
        assert crop_to_size(image, 16, 16, "adm") == centre_crop(image, 16, 16)

    @pytest.mark.parametrize("size", [(24, 16), (16, 24), (17, 31)])
    def test_other_shapes_are_covered(self, size: tuple[int, int]) -> None:
        image = Image.new("RGB", (37, 29), (9, 9, 9))
        cropped = np.asarray(crop_to_size(image, *size, "bilinear"))
        assert cropped.shape == (*size, 3)
        assert (cropped == 9).all()


class TestPrefixes:
    def test_short_captions_get_one_as_often_as_asked(self) -> None:
        count = 4000
        u, choice = torch.rand(2, count, generator=torch.Generator().manual_seed(0))
        captions = prefix_captions(["a cat"] * count, 0.5, u, choice)
        with_one = [caption for caption in captions if caption != "a cat"]
        assert stats.binomtest(len(with_one), count, 0.5).pvalue > 0.01
        assert {caption.removesuffix("a cat") for caption in with_one} == set(PREFIXES)
        assert len(PREFIXES) == 7 and PREFIXES[0] == "A photo of "

    def test_long_captions_get_none(self) -> None:
        zero = torch.zeros(2)
        captions = [" ".join(["word"] * 30), " ".join(["word"] * 29)]
        prefixed = prefix_captions(captions, 1.0, zero, zero)
        assert prefixed == [captions[0], PREFIXES[0] + captions[1]]
        assert prefix_captions(captions, 0.0, zero, zero) == captions


def test_dropped_texts_equal_golden() -> None:
    golden = tensors("cfg_dropout")
    probability = metadata("cfg_dropout")["null_condition_p"]
    features = {str(i): text for i, text in enumerate(golden["text_bf16.cond"])}
    (features[""],) = golden["text_bf16.uncond"][:1]
    kept = drop_captions(["0", "1", "2", "3", "4"], probability, golden["u"])
    assert torch.equal(torch.stack([features[key] for key in kept]), golden["text_bf16.dropped"])
    assert 0 < kept.count("") < 5
