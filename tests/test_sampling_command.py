"""`python sample.py`: what it draws, with which checkpoint and settings, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from torch import Tensor

from deco_fast import DeCo, DeCoConfig, load_checkpoint
from deco_fast.checkpoint import save_checkpoint
from deco_fast.checkpoint.checksums import weights_checksum
from deco_fast.checkpoint.lock import alone_in
from deco_fast.cli.sample import main
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.presets import PRESETS
from deco_fast.sampling import source
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.noise import noise_for
from deco_fast.sampling.recipes import recipe_settings, resolve_settings
from deco_fast.sampling.run import (
    _one_behind,
    draw,
    share,
)
from deco_fast.sampling.source import checkpoint_name, newest_finished_run
from deco_fast.sampling.writers import NpzFile, PngFolder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = DeCoConfig(
    hidden_size=32,
    depth=1,
    num_heads=2,
    patch_size=8,
    decoder_hidden_size=16,
    decoder_depth=1,
    num_classes=10,
)
CARD = ModelCard(
    name="tiny", height=16, width=16, sampling=SamplingSettings(steps=4, guidance_scale=2.0)
)


def tiny_model(seed: int = 0) -> DeCo:
    """With random weights throughout: a new DeCo's velocity is zero."""
    torch.manual_seed(seed)
    model = DeCo(CONFIG, CARD).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return save_checkpoint(folder, model=tiny_model(1), ema=tiny_model(), card=CARD)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu"])


def pngs(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*-class*.png"))
    return {file.name: np.asarray(Image.open(file)) for file in files}


def npz_images(path: Path) -> np.ndarray:
    with np.load(path) as arrays:
        images: np.ndarray = arrays["arr_0"]
    return images


def most_different(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


class TestNothingIsLost:
    def test_a_grid_takes_the_place_of_nothing(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ("--checkpoint", checkpoint, "--num", 2, "--npz", "mine.npz")
        Path("mine-grid.png").write_bytes(b"of mine")
        assert run(*options) == 2
        error = capsys.readouterr().err
        assert "mine-grid.png exists, where the grid of mine.npz goes" in error
        assert Path("mine-grid.png").read_bytes() == b"of mine" and not Path("mine.npz").exists()
        assert run(*options, "--overwrite") == 0
        assert run(*options) == 0  # finished already

    @pytest.mark.parametrize("more", [(), ("--overwrite", "--seed", 1)], ids=["same", "overwrite"])
    @pytest.mark.parametrize("option", [("--npz", "a.npz"), ("--out", "a")], ids=["npz", "folder"])
    def test_two_commands_do_not_write_to_one_place(
        self,
        checkpoint: Path,
        option: tuple[str, str],
        more: tuple[object, ...],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        place = Path("a.npz.partial" if option[0] == "--npz" else "a")
        options = ("--checkpoint", checkpoint, "--num", 2, *option)
        with alone_in(place):
            # What the first command has written, and is writing.
            contents = {"settings.json": b"{}", ".000000-class0.png.tmp-0123abcd": b"half"}
            for name, content in contents.items():
                (place / name).write_bytes(content)
            assert run(*options, *more) == 2
            assert "is in use by another program" in capsys.readouterr().err
            assert {path.name: path.read_bytes() for path in place.iterdir()} == contents
        assert run(*options, "--overwrite") == 0

    def test_what_is_refused_leaves_no_folder(self) -> None:
        with pytest.raises(ZeroDivisionError), alone_in(Path("new")):
            assert Path("new").is_dir()
            raise ZeroDivisionError
        assert not Path("new").exists()
        with alone_in(Path("new")):
            Path("new/image.png").write_bytes(b"")
        assert Path("new/image.png").exists()

    def test_a_damaged_checkpoint_is_not_drawn_from(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damaged = Path(shutil.copytree(checkpoint, "damaged"))
        content = (damaged / "ema.safetensors").read_bytes()
        (damaged / "ema.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert run("--checkpoint", damaged, "--num", 1) == 2
        assert "ema.safetensors is damaged: its checksum" in capsys.readouterr().err
        assert run("--checkpoint", damaged, "--num", 1, "--weights", "model") == 0

    @pytest.mark.parametrize("option", ["--checkpoint", "--out", "--npz"])
    def test_an_empty_path_is_none(
        self, option: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As a variable of the shell that is not set."""
        named = () if option == "--checkpoint" else ("--checkpoint", checkpoint)
        assert run(*named, option, "") == 2
        assert f"{option}: is empty: name a path" in capsys.readouterr().err
        assert not list(Path().iterdir())

    def test_the_checkpoint_that_ships_has_a_name(self) -> None:
        assert run("--checkpoint", "deco-digits", "--num", 1, "--steps", 1) == 0
        assert load_checkpoint("deco-digits").config.num_classes == 10


class TestDrawing:
    def test_writes_images_and_grid_and_says_what_it_did(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--checkpoint", checkpoint, "--num", 12) == 0
        folder = Path("samples/tiny-euler4-seed0")
        images = pngs(folder)
        assert list(images) == [f"{i:06d}-class{i % 10}.png" for i in range(12)]
        assert all(image.shape == (16, 16, 3) for image in images.values())
        grid = np.asarray(Image.open(folder / "grid.png"))
        np.testing.assert_array_equal(grid[:16, 18:34], images["000001-class1.png"])
        np.testing.assert_array_equal(grid[18:, 18:34], images["000011-class1.png"])
        printed = capsys.readouterr().out
        for part in (
            f"{checkpoint}, ema weights",
            "12 of 16×16, seed 0",
            "euler, 4 steps, guidance 2 in (0, 1], time shift 1",
            "fp32 on 1 × cpu, batch 12",
            "per image",
            "per step",
            str(folder / "grid.png"),
        ):
            assert part in printed

    def test_images_are_those_of_the_library(self, checkpoint: Path) -> None:
        from deco_fast import sample
        from deco_fast.sampling.images import to_uint8

        options = ("--seed", 3, "--solver", "adams", "--order", 3, "--time-shift", 2, "--num", 2)
        assert run("--checkpoint", checkpoint, "--out", "out", *options) == 0
        images = sample(
            load_checkpoint(checkpoint),
            torch.stack([noise_for(3, i, (3, 16, 16)) for i in range(2)]),
            torch.tensor([0, 1]),
            steps=4,
            solver="adams",
            order=3,
            time_shift=2.0,
            guidance_scale=2.0,
        )
        drawn = np.stack(list(pngs(Path("out")).values()))
        assert most_different(drawn, to_uint8(images).numpy()) <= 1  # rounding, at a boundary

    def test_weights_are_those_asked_for(self, checkpoint: Path) -> None:
        for weights in ("ema", "model"):
            options = ("--weights", weights, "--num", 1, "--out", weights)
            assert run("--checkpoint", checkpoint, *options) == 0
        ema, model = (np.stack(list(pngs(Path(name)).values())) for name in ("ema", "model"))
        assert most_different(ema, model) > 5

    def test_classes_go_round(self, checkpoint: Path) -> None:
        options = ("--classes", 7, 2, 5, "--num", 7, "--npz", "a.npz")
        assert run("--checkpoint", checkpoint, *options) == 0
        with np.load("a.npz") as arrays:
            assert arrays["arr_1"].tolist() == [7, 2, 5, 7, 2, 5, 7]

    def test_class_changes_the_image_and_the_noise_does_not(self, checkpoint: Path) -> None:
        for label in (1, 2):
            options = ("--classes", label, "--num", 1, "--npz", f"{label}.npz")
            assert run("--checkpoint", checkpoint, *options) == 0
        assert most_different(npz_images(Path("1.npz")), npz_images(Path("2.npz"))) > 0

    def test_image_depends_on_seed_and_index_alone(self, checkpoint: Path) -> None:
        drawn = {}
        for batch_size, num, seed in ((1, 7, 5), (3, 7, 5), (7, 7, 5), (3, 4, 5), (3, 7, 6)):
            name = f"{batch_size}-{num}-{seed}.npz"
            options = ("--batch-size", batch_size, "--num", num, "--seed", seed, "--npz", name)
            assert run("--checkpoint", checkpoint, *options) == 0
            drawn[batch_size, num, seed] = npz_images(Path(name))
        reference = drawn.pop((7, 7, 5))
        assert most_different(drawn.pop((3, 7, 6)), reference) > 50
        for images in drawn.values():
            # Matrix products of another size may round a level to its neighbour.
            assert most_different(images, reference[: len(images)]) <= 1

    @pytest.mark.parametrize("fast", [True, False])
    def test_a_processor_that_is_slow_at_bf16_is_named(
        self,
        checkpoint: Path,
        fast: bool,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("deco_fast.cli.sample.has_fast_bfloat16", lambda: fast)
        for dtype in ("fp32", "bf16"):
            options = ("--dtype", dtype, "--device", "cpu", "--npz", f"{dtype}.npz")
            assert run("--checkpoint", checkpoint, "--num", 1, *options) == 0
            said = "--dtype fp32 draws faster" in capsys.readouterr().out
            assert said == (dtype == "bf16" and not fast)

    def test_another_size_and_dtype(self, checkpoint: Path) -> None:
        fp32, bf16 = Path("fp32.npz"), Path("bf16.npz")
        for path in (fp32, bf16):
            options = ("--height", 8, "--width", 24, "--num", 2, "--dtype", path.stem)
            assert run("--checkpoint", checkpoint, *options, "--npz", path) == 0
        assert npz_images(fp32).shape == (2, 8, 24, 3)
        assert 0 < most_different(npz_images(fp32), npz_images(bf16)) < 64

    def test_images_that_are_not_finite_are_an_error(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = tiny_model()
        with torch.no_grad():
            model.decoder.output.bias.fill_(torch.nan)
        save_checkpoint("broken", model=None, ema=model, card=CARD)
        assert run("--checkpoint", "broken", "--dtype", "fp16") == 2
        assert "image 0 is not finite in float16: draw with --dtype fp32" in capsys.readouterr().err

    def test_script_is_thin_and_returns_the_status(self) -> None:
        command = [sys.executable, str(ROOT / "sample.py"), "--steps", "0"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == "error: argument --steps: must be at least 1, not 0\n"

    def test_help_shows_the_defaults(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        for part in ("(default: 40)", "(default: fp32)", "(default: ema)", "(default: runs)"):
            assert part in printed
        for recipe in ("euler-100", "euler-250", "heun-50"):
            assert recipe in printed


class TestDraw:
    """The library's side: `deco_fast.sampling.run`."""

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    @pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1]])
    def test_noise_is_bitwise_that_of_the_index(self, batch_size: int, indices: list[int]) -> None:
        model = tiny_model()
        inputs: list[Tensor] = []
        model.decoder.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
        engine = SamplingEngine(model, SamplingSettings(steps=1), batch_size=batch_size)
        labels = [index * 2 for index in indices]
        drawn = [i for batch, _ in draw(engine, labels, indices, seed=9) for i in batch]
        assert drawn == indices
        noise = torch.cat(inputs)
        for row, index in enumerate(indices):
            assert torch.equal(noise[row], noise_for(9, index, (3, 16, 16)))

    def test_settings_come_from_the_card(self) -> None:
        model = tiny_model()
        explicit = SamplingEngine(model, CARD.sampling, height=16, width=16)
        ((_, expected),) = draw(explicit, [0, 1])
        ((indices, images),) = draw(SamplingEngine(model), [0, 1])
        assert indices == [0, 1]
        assert torch.equal(images, expected)
        assert images.dtype == torch.uint8

    def test_labels_belong_to_positions(self) -> None:
        engine = SamplingEngine(tiny_model(), batch_size=2)
        (_, both), (_, last) = draw(engine, [5, 8, 3], [7, 2, 4])
        ((_, alone),) = draw(engine, [8], [2])
        assert most_different(both[1:].numpy(), alone.numpy()) <= 1
        ((_, alone),) = draw(engine, [3], [4])
        assert most_different(last.numpy(), alone.numpy()) <= 1

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="2 conditions for 1 images"):
            next(draw(SamplingEngine(tiny_model()), [0, 1], [0]))

    @pytest.mark.parametrize("count", [0, 1, 2, 5])
    def test_drawing_ahead_loses_and_reorders_nothing(self, count: int) -> None:
        asked: list[int] = []

        def items() -> Iterator[int]:
            for i in range(count):
                asked.append(i)
                yield i

        for got in (behind := _one_behind(items())):
            assert asked[-1] == min(got + 1, count - 1)
        assert asked == list(range(count))
        assert not list(behind)

    def test_every_image_has_one_process(self) -> None:
        shares = [share(11, 2, rank, 3) for rank in range(3)]
        assert shares == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10]]
        assert share(11, 2) == list(range(11))

    def test_checksum_sees_every_weight(self) -> None:
        model = tiny_model()
        before = weights_checksum(model)
        assert weights_checksum(tiny_model()) == before
        assert weights_checksum(tiny_model().bfloat16()) != before
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.view(-1)[-1] += 1
            after = weights_checksum(model)
            assert after != before
            before = after


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ((), "euler, 4 steps, guidance 2 in (0, 1], time shift 1"),
            (
                ("--recipe", "heun-50"),
                "heun, 50 steps, guidance 3.2 in (0.1, 1], time shift 1",
            ),
            (
                ("--recipe", "heun-50", "--steps", 3, "--guidance-scale", 1),
                "heun, 3 steps, no guidance, time shift 1",
            ),
            (
                ("--solver", "adams", "--guidance-interval", 0.25, 0.5, "--guidance-rescale", 0.7),
                "adams of order 2, 4 steps, guidance 2 in (0.25, 0.5), rescaled by 0.7, "
                "time shift 1",
            ),
        ],
    )
    def test_what_is_given_wins(
        self,
        checkpoint: Path,
        capsys: pytest.CaptureFixture[str],
        options: tuple[object, ...],
        expected: str,
    ) -> None:
        assert run("--checkpoint", checkpoint, "--num", 1, *options) == 0
        assert expected in capsys.readouterr().out

    def test_preset_takes_the_place_of_the_card(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        card = replace(CARD, name="other", height=8, sampling=SamplingSettings(steps=3))
        monkeypatch.setitem(PRESETS, "deco-digits", PRESETS["deco-digits"]._replace(card=card))
        model = DeCo(PRESETS["deco-digits"].config)
        save_checkpoint("digits", model=None, ema=model, card=CARD)
        options = ("--checkpoint", "digits", "--num", 1, "--preset", "deco-digits")
        assert run(*options) == 0
        assert run(*options, "--steps", 2) == 0
        printed = capsys.readouterr().out
        assert "1 of 8×16" in printed
        assert "euler, 3 steps, no guidance" in printed
        assert "euler, 2 steps, no guidance" in printed

    def test_recipes_are_the_published_ones(self) -> None:
        guidance = {"guidance_interval": (0.1, 1.0), "time_shift": 1.0, "guidance_rescale": 0.0}
        for name, solver, steps in (
            ("euler-100", "euler", 100),
            ("euler-250", "euler", 250),
            ("heun-50", "heun", 50),
        ):
            for size, scale in ((256, 3.2), (512, 5.0)):
                settings = asdict(recipe_settings(name, size, size))
                expected = {
                    "solver": solver,
                    "steps": steps,
                    "guidance_scale": scale,
                    **guidance,
                }
                assert settings.items() >= expected.items()
        for preset_name in ("deco-xl", "deco-xl-512"):
            card = PRESETS[preset_name].card
            assert card.sampling == recipe_settings("euler-100", card.height, card.width)

    def test_recipe_wins_over_card(self) -> None:
        card = SamplingSettings(time_shift=3.0, steps=7)
        recipe = SamplingSettings(steps=100)
        assert resolve_settings(card, None, {"steps": None}) == card
        assert resolve_settings(card, recipe, {"steps": None}) == recipe
        assert resolve_settings(card, recipe, {"steps": 5}) == SamplingSettings(steps=5)

    def test_assumptions_are_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        card = replace(CARD, assumed=("the size is taken to be 16×16",))
        save_checkpoint("guessed", model=None, ema=tiny_model(), card=card)
        assert run("--checkpoint", "guessed", "--num", 1) == 0
        assert "assumed     the size is taken to be 16×16" in capsys.readouterr().out


class TestCheckpoint:
    def training_run(self, name: str, *, finished: float | None, steps: int = 1) -> Path:
        run_folder = Path("runs") / name
        for step in range(1, steps + 1):
            folder = run_folder / "checkpoints" / f"step-{step:08d}"
            save_checkpoint(folder, model=None, ema=tiny_model(), card=CARD)
        if finished is not None:
            (run_folder / "finished").touch()
            os.utime(run_folder / "finished", (finished, finished))
        return run_folder

    def test_newest_finished_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.training_run("z-old", finished=1e9)
        self.training_run("newest", finished=2e9, steps=2)
        self.training_run("a-old", finished=1.5e9)
        self.training_run("unfinished", finished=None)
        (Path("runs") / "empty").mkdir()
        (Path("runs") / "empty" / "finished").touch()
        assert newest_finished_run(Path("runs")) == Path("runs/newest")
        assert run("--num", 1) == 0
        printed = capsys.readouterr().out
        assert "runs/newest/checkpoints/step-00000002" in printed
        assert "the newest run that has finished" in printed
        assert Path("samples/newest-step-00000002-euler4-seed0/grid.png").exists()

    def test_shipped_one_where_no_run_has_finished(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(source, "pretrained_folder", lambda: Path("package"))
        self.training_run("unfinished", finished=None)
        assert run("--num", 1) == 2
        assert "ships no checkpoint" in capsys.readouterr().err
        save_checkpoint("package/deco-digits", model=None, ema=tiny_model(), card=CARD)
        assert run("--num", 1) == 0
        assert "ships with the package; no run in runs has finished" in capsys.readouterr().out
        assert Path("samples/deco-digits-euler4-seed0/grid.png").exists()

    def test_run_folder_and_runs_elsewhere(self, capsys: pytest.CaptureFixture[str]) -> None:
        folder = self.training_run("mine", finished=1e9)
        assert run("--checkpoint", folder, "--num", 1) == 0
        folder.parent.rename("elsewhere")
        assert run("--runs", "elsewhere", "--num", 1) == 0
        assert "elsewhere/mine/checkpoints/step-00000001" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("runs/digits/checkpoints/step-00001000", "digits-step-00001000"),
            ("runs/digits/checkpoints/step-00001000/ema.safetensors", "digits-step-00001000"),
            ("pretrained/deco-digits", "deco-digits"),
            ("cache/imagenet256_epoch800.ckpt", "imagenet256_epoch800"),
            ("my.model.safetensors", "my.model"),
            ("my.v2", "my.v2"),
        ],
    )
    def test_name(self, path: str, name: str) -> None:
        assert checkpoint_name(Path(path)) == name


class TestOutput:
    def test_default_folder_never_replaces_other_images(self, checkpoint: Path) -> None:
        for scale in (2, 3, 3):
            options = ("--guidance-scale", scale, "--num", 2)
            assert run("--checkpoint", checkpoint, *options) == 0
        folders = sorted(Path("samples").iterdir())
        assert [folder.name for folder in folders] == ["tiny-euler4-seed0", "tiny-euler4-seed0-2"]
        scales = [
            json.loads((folder / "settings.json").read_text())["guidance_scale"]
            for folder in folders
        ]
        assert scales == [2, 3]

    def test_out_with_other_images_is_refused(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ("--checkpoint", checkpoint, "--num", 2, "--out", "out")
        assert run(*options) == 0
        before = pngs(Path("out"))
        assert run(*options, "--seed", 1) == 2
        assert "out holds images of other settings (seed 0 and not 1)" in capsys.readouterr().err
        for name, image in pngs(Path("out")).items():
            np.testing.assert_array_equal(image, before[name])
        assert run(*options, "--seed", 1, "--overwrite") == 0
        for name, image in pngs(Path("out")).items():
            assert most_different(image, before[name]) > 5
        assert json.loads(Path("out/settings.json").read_text())["seed"] == 1

    def test_npz_writes_the_npz_and_the_grid_alone(self, checkpoint: Path) -> None:
        options = ("--checkpoint", checkpoint, "--num", 3)
        assert run(*options, "--npz", "new/a.npz") == 0
        assert {file.name for file in Path("new").iterdir()} == {"a.npz", "a-grid.png"}
        assert run(*options, "--npz", "b.npz", "--out", "out") == 0
        assert [file.name for file in Path("out").iterdir()] == ["grid.png"]

    @pytest.fixture
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The numbers of all images that are drawn from here on."""
        numbers: list[int] = []
        for writer in (NpzFile, PngFolder):

            def counted(
                self: Any, indices: list[int], images: Tensor, write: Any = writer.write
            ) -> None:
                numbers.extend(indices)
                write(self, indices, images)

            monkeypatch.setattr(writer, "write", counted)
        return numbers

    def test_a_folder_goes_on_where_it_was(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str], drawn: list[int]
    ) -> None:
        options = ("--checkpoint", checkpoint, "--num", 5, "--batch-size", 2, "--out", "out")
        assert run(*options) == 0
        before = pngs(Path("out"))
        # As an interrupt leaves it.
        for name in list(before)[2:]:
            Path("out", name).unlink()
        Path("out/grid.png").unlink()
        Path("out/.000002-class2.png.tmp-0123abcd").write_bytes(b"half")
        assert run(*options) == 0
        assert "2 of 5 images are in out" in capsys.readouterr().out
        assert drawn == [0, 1, 2, 3, 4, 2, 3, 4] and Path("out/grid.png").exists()
        assert not list(Path("out").glob(".*"))
        for name, image in pngs(Path("out")).items():
            assert most_different(image, before[name]) <= 1  # another batch may round otherwise
        assert run(*options) == 0
        assert "out holds these images already; --overwrite" in capsys.readouterr().out
        assert len(drawn) == 8
        assert run(*options, "--overwrite") == 0
        assert drawn[8:] == [0, 1, 2, 3, 4]

    def test_finished_npz_is_not_drawn_again(
        self, checkpoint: Path, capsys: pytest.CaptureFixture[str], drawn: list[int]
    ) -> None:
        options = ("--checkpoint", checkpoint, "--num", 3, "--npz", "a.npz")
        assert run(*options) == 0
        assert run(*options) == 0
        assert "a.npz holds these images already; --overwrite" in capsys.readouterr().out
        assert drawn == [0, 1, 2]
        assert run(*options, "--overwrite") == 0
        assert drawn == [0, 1, 2] * 2
        assert run(*options, "--steps", 5) == 2
        assert "(steps 4 and not 5)" in capsys.readouterr().err


KILLED = """
import os, signal, sys
import numpy as np
from deco_fast.cli.sample import main

save, saved = np.save, []

def save_and_die(file, array):
    if len(saved) == 2:
        file.write(b"half a batch")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(file)
    save(file, array)

np.save = save_and_die
main(sys.argv[1:])
"""


KILLED_OPTIONS = ("--num", "11", "--batch-size", "2", "--device", "cpu", "--npz", "a.npz")


@pytest.fixture(scope="module")
def killed_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a run died in its third batch."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, "--checkpoint", str(checkpoint), *KILLED_OPTIONS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.glob("a.npz.partial/*.npy"))) == 2
    assert not (folder / "a.npz").exists()
    return folder


class TestKilled:
    options = KILLED_OPTIONS

    @pytest.fixture
    def killed(self, killed_folder: Path) -> Path:
        """What it left, copied to where the test is."""
        shutil.copytree(killed_folder, ".", dirs_exist_ok=True)
        return Path("a.npz.partial")

    def test_same_command_goes_on_and_ends_the_same(
        self, checkpoint: Path, killed: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["--checkpoint", str(checkpoint), *self.options]) == 0
        assert "4 of 11 images are in a.npz" in capsys.readouterr().out
        resumed = Path("a.npz").read_bytes()
        assert {file.name for file in Path().iterdir()} == {"a.npz", "a-grid.png"}
        assert main(["--checkpoint", str(checkpoint), *self.options, "--overwrite"]) == 0
        assert Path("a.npz").read_bytes() == resumed

        other = ("--batch-size", "3", "--npz", "b.npz")
        assert main(["--checkpoint", str(checkpoint), *self.options, *other]) == 0
        assert most_different(npz_images(Path("b.npz")), npz_images(Path("a.npz"))) <= 1

    def test_another_batch_size_goes_on_too(self, checkpoint: Path, killed: Path) -> None:
        before = {file.name: file.read_bytes() for file in killed.glob("*.npy")}
        assert before.keys() == {"00000000-00000001.npy", "00000002-00000003.npy"}
        options = ("--checkpoint", str(checkpoint), *self.options)
        assert main([*options, "--batch-size", "3"]) == 0
        resumed = npz_images(Path("a.npz"))
        assert main([*options, "--overwrite"]) == 0
        assert most_different(npz_images(Path("a.npz")), resumed) <= 1

    def test_a_grid_that_goes_elsewhere_takes_the_place_of_nothing(
        self, checkpoint: Path, killed: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        grid = Path("out/grid.png")
        grid.parent.mkdir()
        grid.write_bytes(b"of mine")
        options = ("--checkpoint", str(checkpoint), *self.options)
        assert main([*options, "--out", "out"]) == 2
        assert "out/grid.png exists, where the grid of a.npz goes" in capsys.readouterr().err
        assert grid.read_bytes() == b"of mine" and killed.exists()
        assert main(list(options)) == 0

    def test_another_command_is_refused(
        self, checkpoint: Path, killed: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ("--checkpoint", str(checkpoint), *self.options)
        assert main([*options, "--guidance-scale", "4"]) == 2
        error = capsys.readouterr().err
        assert (
            "a.npz.partial holds images of other settings (guidance_scale 2.0 and not 4.0)" in error
        )
        assert len(list(killed.glob("*.npy"))) == 2


BAD = [
    (("--checkpoint", "nowhere"), "nowhere does not exist"),
    (("--classes", 3, 10), "class 10 does not exist: the model knows 0 … 9"),
    (("--classes", -1), "--classes: must be at least 0, not -1"),
    (("--classes", "cat"), "--classes: must be a whole number, not 'cat'"),
    (("--steps", 0), "--steps: must be at least 1, not 0"),
    (("--num", 0), "--num: must be at least 1, not 0"),
    (("--batch-size", 0), "--batch-size: must be at least 1, not 0"),
    (("--seed", -1), "--seed: must be 0 … 18446744073709551615, not -1"),
    (("--guidance-interval", 0.6, 0.3), "--guidance-interval: guidance interval (0.6, 0.3) must"),
    (("--guidance-interval", 0, 1.5), "--guidance-interval: guidance interval (0.0, 1.5) must"),
    (("--guidance-interval", -0.5, 1), "--guidance-interval: guidance interval (-0.5, 1.0) must"),
    (("--guidance-interval", 0.5), "--guidance-interval: expected 2 arguments"),
    (("--guidance-scale", "nan"), "--guidance-scale: must be finite, not nan"),
    (("--guidance-scale", "inf"), "--guidance-scale: must be finite, not inf"),
    (("--guidance-scale", "much"), "--guidance-scale: must be a number, not 'much'"),
    (("--guidance-rescale", 1.5), "--guidance-rescale: must be 0 … 1, not 1.5"),
    (("--time-shift", 0), "--time-shift: must be above 0, not 0"),
    (("--height", 20), "--height 20 is not divisible by the patch size 8: use 16"),
    (("--width", 3), "--width 3 is not divisible by the patch size 8: use 8"),
    (("--height", 0), "--height: must be at least 1, not 0"),
    (("--solver", "huen"), "--solver: unknown solver 'huen'; did you mean 'heun'?"),
    (("--order", 5), "--order: must be 1 … 4, not 5"),
    (("--order", 0), "--order: must be 1 … 4, not 0"),
    (("--preset", "deco-xxl"), "--preset: unknown preset 'deco-xxl'; did you mean 'deco-xl'?"),
    (("--preset", "deco-l"), "is not of the architecture of preset deco-l"),
    (("--recipe", "euler-10"), "--recipe: unknown recipe 'euler-10'; did you mean 'euler-100'?"),
    (("--dtype", "bf17"), "--dtype: unknown 'bf17'; did you mean 'bf16'?"),
    (("--weights", "emma"), "--weights: unknown 'emma'; did you mean 'ema'?"),
    (("--device", "gpu"), "unknown device 'gpu'"),
    (("--out", "file"), "--out file: file is a file: choose another folder"),
    (("--npz", "x" * 300), "x cannot be written (File name too long): choose another place"),
    (("--out", "file/below"), "--out file/below: file is a file: choose another folder"),
    (("--npz", "file/a.npz"), "--npz file: file is a file: choose another folder"),
    (("--npz", "."), "--npz . is a folder: name a file in it"),
    (("--npz", "file"), "file does not say what its images were drawn with"),
    (("--guidance-scal", 3), "unknown option '--guidance-scal'; did you mean '--guidance-scale'?"),
]


class TestBadInput:
    @pytest.mark.parametrize(("arguments", "message"), BAD)
    def test_is_one_line_and_leaves_everything_as_it_was(
        self,
        checkpoint: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[object, ...],
        message: str,
    ) -> None:
        Path("file").write_text("mine")
        options = ["--checkpoint", str(checkpoint), "--num", "2", *map(str, arguments)]
        assert main(options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
        assert [file.name for file in Path().iterdir()] == ["file"]
        assert Path("file").read_text() == "mine"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_cuda_without_cuda(self, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--checkpoint", str(checkpoint), "--device", "cuda"]) == 2
        error = capsys.readouterr().err
        assert "'cuda' is not available" in error
        assert "--device cpu" in error

    def test_folder_that_cannot_be_made(
        self,
        checkpoint: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def refuse(self: Path, *arguments: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refuse)
        assert run("--checkpoint", checkpoint, "--out", "out") == 2
        assert "out cannot be written (Permission denied)" in capsys.readouterr().err


def draw_in(folder: str, *options: str) -> None:
    os.chdir(folder)
    assert main([*options]) == 0


@pytest.mark.slow
def test_two_processes_draw_what_one_does(checkpoint: Path) -> None:
    options = ["--checkpoint", str(checkpoint), "--num", "11", "--batch-size", "2"]
    options += ["--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(*words: str) -> str:
        return subprocess.run(
            words, env=environment, capture_output=True, text=True, check=True
        ).stdout

    # Without the "--" torchrun takes --num for the beginning of its own --numa-binding.
    two = [*torchrun, "--nproc-per-node", "2", "--", str(ROOT / "sample.py"), *options]
    one = [sys.executable, str(ROOT / "sample.py"), *options]
    printed = command(*two, "--npz", "two.npz")
    assert printed.count("per image") == 1
    assert "fp32 on 2 × cpu, batch 2" in printed
    command(*one, "--npz", "one.npz")
    assert Path("two.npz").read_bytes() == Path("one.npz").read_bytes()
    assert "already" in command(*two, "--npz", "one.npz")

    here = os.getcwd()
    in_processes(2, draw_in, here, *options, "--out", "two")
    in_processes(1, draw_in, here, *options, "--out", "one")
    assert {file.name for file in Path("two").iterdir()} == {
        file.name for file in Path("one").iterdir()
    }
    for name, image in pngs(Path("one")).items():
        np.testing.assert_array_equal(pngs(Path("two"))[name], image)


@pytest.mark.slow
def test_compile_option(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--checkpoint", checkpoint, "--num", 5, "--batch-size", 2)
    assert run(*options, "--npz", "compiled.npz", "--compile") == 0
    assert "compiling" in capsys.readouterr().out
    assert run(*options, "--npz", "plain.npz") == 0
    assert most_different(npz_images(Path("compiled.npz")), npz_images(Path("plain.npz"))) <= 1
