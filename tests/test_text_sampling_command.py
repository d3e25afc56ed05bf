"""`python sample.py --prompt`: what it draws, the folders of GenEval and DPG, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny_qwen3
import torch
from PIL import Image

from deco_fast import DeCo, DeCoConfig, DeCoT2I, load_checkpoint, sample
from deco_fast.checkpoint import save_checkpoint
from deco_fast.cli.evaluate import main as evaluate
from deco_fast.cli.sample import main
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.sampling.benchmark_folders import DpgFolder, GenEvalFolder
from deco_fast.sampling.images import to_uint8
from deco_fast.sampling.noise import noise_for
from deco_fast.sampling.prompts import DpgPrompt, GenEvalPrompt, read_geneval, read_prompts
from deco_fast.sampling.run import share

CONFIG = tiny_qwen3.MODEL_CONFIG
SETTINGS = SamplingSettings(solver="adams", steps=3, guidance_scale=3.0, time_shift=3.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = ModelCard(
        name="tiny",
        height=16,
        width=16,
        sampling=SETTINGS,
        text_encoder=str(tiny_qwen3.folder()),
    )
    torch.manual_seed(0)
    model = DeCoT2I(CONFIG, card)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return save_checkpoint(folder, model=None, ema=model, card=card)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(checkpoint: Path) -> Callable[..., int]:
    def run(*arguments: object) -> int:
        return main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)])

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


class TestPrompts:
    def test_images_are_those_of_the_library(
        self, run: Callable[..., int], checkpoint: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--prompt", "a cat", "--prompt", "", "--negative-prompt", "blur") == 0
        folder = Path("samples/tiny-adams3-seed0")
        names = [f"{i:06d}-prompt{i % 2}.png" for i in range(8)]
        assert files(folder) == {*names, "grid.png", "settings.json"}
        printed = capsys.readouterr().out
        for part in ("8 of 16×16, seed 0", "2, away from 'blur'", "time shift 3", "adams"):
            assert part in printed
        stored = json.loads((folder / "settings.json").read_text())
        assert (stored["prompts"], stored["negative_prompt"]) == (["a cat", ""], "blur")

        encoder = Qwen3TextEncoder(
            str(tiny_qwen3.folder()), length=CONFIG.text_length, size=CONFIG.text_size
        )
        noise = torch.stack([noise_for(0, i, (3, 16, 16)) for i in range(8)])
        texts, negative = encoder(["a cat", ""] * 4), encoder(["blur"])
        expected = sample(load_checkpoint(checkpoint), noise, texts, negative, **asdict(SETTINGS))
        for name, image in zip(names, to_uint8(expected).numpy(), strict=True):
            assert np.abs(pixels(folder / name) - image.astype(int)).max() <= 1

    def test_a_file_of_prompts_and_another_size(self, run: Callable[..., int]) -> None:
        Path("prompts.txt").write_text("\ufeffa cat\n\n  zwei Hunde ü  \r\na bird\n", "utf-8")
        assert (
            run("--prompts-file", "prompts.txt", "--height", 32, "--width", 20, "--out", "o") == 0
        )
        assert pixels(Path("o/000002-prompt2.png")).shape == (32, 20, 3)
        stored = json.loads(Path("o/settings.json").read_text())
        assert stored["prompts"] == ["a cat", "zwei Hunde ü", "a bird"]

    def test_a_line_ends_at_a_line_feed_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        file.write_text("a cat\u2028on a\x0cmat\x85\r\n\na\x0b dog", "utf-8")
        assert read_prompts(file) == ["a cat\u2028on a\x0cmat", "a\x0b dog"]
        file.write_text('{"prompt": "a cat\u2028on a mat"}\n', "utf-8")
        assert [prompt.prompt for prompt in read_geneval(file)] == ["a cat\u2028on a mat"]

    def test_a_long_prompt_is_cut_and_said_so(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--prompt", "x" * 100_000, "--num", 1, "--out", "long") == 0
        printed = capsys.readouterr().out
        assert "cut: of 100,000 tokens the first 8 are used: 'xxx" in printed
        assert len(printed) < 3000
        assert run("--prompt", "x" * 8, "--num", 1, "--out", "short") == 0
        assert "cut" not in capsys.readouterr().out
        name = "000000-prompt0.png"
        np.testing.assert_array_equal(pixels(Path("long") / name), pixels(Path("short") / name))

    def test_images_by_another_encoder_do_not_mix(
        self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny_qwen3.save(tmp_path / "qwen")
        words = ("--prompt", "a cat", "--num", 2, "--out", "o", "--text-encoder")
        assert run(*words, "qwen") == 0
        Path("qwen").rename("moved")
        tiny_qwen3.save(tmp_path / "qwen", seed=1)
        capsys.readouterr()
        assert run(*words, "qwen") == 2
        assert "o holds images of other settings (text_encoder_checksum" in capsys.readouterr().err
        assert run(*words, "moved") == 0
        assert "o holds these images already" in capsys.readouterr().out

    def test_an_npz_file(self, run: Callable[..., int]) -> None:
        assert run("--prompt", "a", "--prompt", "b", "--num", 3, "--npz", "out.npz") == 0
        with np.load("out.npz") as arrays:
            assert arrays["arr_0"].shape == (3, 16, 16, 3)
            assert arrays["arr_1"].tolist() == [0, 1, 0]


class TestGenEval:
    LINES = (
        '{"tag": "single_object", "include": [{"class": "bench"}], "prompt": "a bench"}',
        '{"tag": "colors",  "prompt": "a photo of a red \\u00fc"}',
    )

    @pytest.fixture(autouse=True)
    def _metadata(self) -> None:
        Path("metadata.jsonl").write_text("\n".join(self.LINES) + "\n\n", "utf-8")

    def test_the_layout_file_by_file(self, run: Callable[..., int]) -> None:
        assert run("--geneval", "metadata.jsonl") == 0
        folder = Path("samples/tiny-adams3-seed0-geneval")
        samples = {f"{p:05d}/samples/{k:04d}.png" for p in range(2) for k in range(4)}
        metadata = {f"{p:05d}/metadata.jsonl" for p in range(2)}
        assert files(folder) == samples | metadata | {"settings.json"}
        for number, line in enumerate(self.LINES):
            # The scorer reads the whole file as one JSON object.
            kept = json.loads((folder / f"{number:05d}/metadata.jsonl").read_text("utf-8"))
            assert kept == json.loads(line)
        images = [pixels(folder / name) for name in sorted(samples)]
        assert all(image.shape == (16, 16, 3) for image in images)
        assert len({image.tobytes() for image in images}) == 8
        assert Path("samples/tiny-adams3-seed0-geneval-grid.png").is_file()

    def test_it_goes_on_where_it_was(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ("--geneval", "metadata.jsonl", "--out", "g", "--batch-size", 3)
        assert run(*command) == 0
        before = {name: (Path("g") / name).read_bytes() for name in files(Path("g"))}
        kept = Path("g/00000/samples/0000.png")
        inode = kept.stat().st_ino
        for name in ("00000/samples/0002.png", "00001/samples/0003.png", "00001/metadata.jsonl"):
            (Path("g") / name).unlink()
        capsys.readouterr()
        assert run(*command) == 0
        assert "6 of 8 images are in g" in capsys.readouterr().out
        assert {name: (Path("g") / name).read_bytes() for name in files(Path("g"))} == before
        assert kept.stat().st_ino == inode

    def test_images_of_other_settings_are_not_mixed(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ("--geneval", "metadata.jsonl", "--out", "g")
        assert run(*command) == 0
        Path("g/notes.txt").write_text("mine")
        assert run(*command, "--steps", 2) == 2
        assert "g holds images of other settings (steps 3 and not 2)" in capsys.readouterr().err
        before = Path("g/00000/samples/0000.png").read_bytes()
        assert run(*command, "--steps", 2, "--overwrite") == 0
        assert Path("g/00000/samples/0000.png").read_bytes() != before
        assert Path("g/notes.txt").read_text() == "mine"
        # Of the same settings too, and with what the scorer compares with by now.
        Path("g/00000/samples/0000.png").write_bytes(b"spoiled")
        metadata = Path("metadata.jsonl").read_text()
        Path("metadata.jsonl").write_text(metadata.replace("{", '{"corrected": true, ', 1))
        assert run(*command, "--steps", 2, "--overwrite") == 0
        assert Path("g/00000/samples/0000.png").read_bytes() != b"spoiled"
        assert '"corrected": true' in Path("g/00000/metadata.jsonl").read_text()

    def test_overwrite_deletes_our_files_and_no_others(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        # Folders of years beside the settings.json of another program.
        Path("mine/02023/samples").mkdir(parents=True)
        Path("mine/settings.json").write_text('{"theme": "dark"}')
        Path("mine/02023/samples/0000.png").write_bytes(b"mine")
        assert run("--geneval", "metadata.jsonl", "--out", "mine", "--overwrite") == 2
        error = capsys.readouterr().err
        assert (
            error == "error: mine/settings.json holds no settings of ours: choose another place\n"
        )
        assert files(Path("mine")) == {"settings.json", "02023/samples/0000.png"}
        # Among images of ours.
        command = ("--geneval", "metadata.jsonl", "--out", "g")
        assert run(*command) == 0
        for name in ("2023/tax.txt", "00001/notes.txt", "00001/samples/0000-mine.png"):
            Path("g", name).parent.mkdir(exist_ok=True)
            Path("g", name).write_text("mine")
        Path("metadata.jsonl").write_text(self.LINES[0] + "\n", "utf-8")
        # GenEval's scorer would take it for a fifth sample.
        Path("g/00001/samples/0004.png").write_bytes(b"mine")
        before = {name: Path("g", name).read_bytes() for name in files(Path("g"))}
        assert run(*command, "--overwrite") == 2
        assert "g/00001/samples/0004.png is no image of ours: delete it" in capsys.readouterr().err
        assert {name: Path("g", name).read_bytes() for name in files(Path("g"))} == before
        Path("g/00001/samples/0004.png").unlink()
        assert run(*command, "--overwrite") == 0
        samples = {f"00000/samples/{k:04d}.png" for k in range(4)}
        assert files(Path("g")) == {
            *samples,
            *("settings.json", "00000/metadata.jsonl", "2023/tax.txt"),
            *("00001/notes.txt", "00001/samples/0000-mine.png"),
        }

    def test_a_grid_takes_the_place_of_nothing(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("run.v1-grid.png").write_bytes(b"mine")
        command = ("--geneval", "metadata.jsonl", "--out")
        assert run(*command, "run.v1") == 2
        error = capsys.readouterr().err
        assert (
            "run.v1-grid.png exists, where the grid of run.v1 goes: choose another --out" in error
        )
        assert Path("run.v1-grid.png").read_bytes() == b"mine" and not Path("run.v1").exists()
        # The number after the dot is part of the name.
        assert run(*command, "run.v2") == 0
        assert Path("run.v2-grid.png").exists() and not Path("run-grid.png").exists()
        assert run(*command, "run.v2") == 0
        assert run(*command, "run.v1", "--overwrite") == 0
        assert Path("run.v1-grid.png").read_bytes() != b"mine"


class TestDpg:
    @pytest.fixture(autouse=True)
    def _prompts(self) -> None:
        Path("prompts").mkdir()
        for name, prompt in (("256", "a red cube\n"), ("COCOval2014_01", "two dogs")):
            Path("prompts", f"{name}.txt").write_text(prompt)

    def test_the_layout_file_by_file(self, run: Callable[..., int]) -> None:
        assert run("--dpg", "prompts", "--out", "d") == 0
        # The scorer takes everything in the folder for an image, named after its prompt.
        assert files(Path("d")) == {"256.png", "COCOval2014_01.png"}
        assert {p.name for p in Path().iterdir()} == {
            *("prompts", "d", "d.settings.json", "d-grid.png")
        }
        assert run("--prompt", "a red cube", "--num", 4, "--out", "single") == 0
        grid = pixels(Path("d/256.png"))
        assert grid.shape == (32, 32, 3)
        for k, (top, left) in enumerate(((0, 0), (0, 16), (16, 0), (16, 16))):
            single = pixels(Path(f"single/{k:06d}-prompt0.png"))
            assert np.abs(grid[top : top + 16, left : left + 16] - single).max() <= 1

    def test_it_goes_on_where_it_was(
        self,
        run: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        command = ("--dpg", "prompts", "--out", "d", "--batch-size", 3)
        write = DpgFolder.write
        calls: list[list[int]] = []

        def killed_at_the_second(self: DpgFolder, indices: list[int], images: torch.Tensor) -> None:
            calls.append(indices)
            if len(calls) == 2:
                raise KeyboardInterrupt
            write(self, indices, images)

        with monkeypatch.context() as patch:
            patch.setattr(DpgFolder, "write", killed_at_the_second)
            assert run(*command) == 130
        assert files(Path("d")) == set()
        assert files(Path("d.partial")) == {f"256-{k}.png" for k in range(3)}
        capsys.readouterr()
        assert run(*command, "--steps", 2) == 2
        assert "holds images of other settings" in capsys.readouterr().err
        assert run(*command) == 0
        assert "3 of 8 images are in d" in capsys.readouterr().out
        assert not Path("d.partial").exists()
        resumed = {name: (Path("d") / name).read_bytes() for name in files(Path("d"))}
        assert run("--dpg", "prompts", "--out", "whole", "--batch-size", 3) == 0
        assert {n: (Path("whole") / n).read_bytes() for n in files(Path("whole"))} == resumed
        assert run(*command) == 0  # finished: nothing is drawn again
        assert "8 of 8 images are in d" in capsys.readouterr().out

    def test_files_of_others_are_left_alone(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("d").mkdir()
        Path("d/mine.png").write_bytes(b"mine")
        for extra in ((), ("--overwrite",)):
            assert run("--dpg", "prompts", "--out", "d", *extra) == 2
            assert "d holds files that are not ours" in capsys.readouterr().err
        assert Path("d/mine.png").read_bytes() == b"mine"

    def test_overwrite_deletes_our_files_and_no_others(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("d.settings.json").write_text('{"theme": "dark"}')
        command = ("--dpg", "prompts", "--out", "d", "--overwrite")
        for holds in (False, True):
            Path("d").mkdir(exist_ok=True)
            if holds:
                Path("d/256.png").write_bytes(b"mine")
            assert run(*command) == 2
            assert "d.settings.json holds no settings of ours" in capsys.readouterr().err
        assert Path("d.settings.json").read_text() == '{"theme": "dark"}'
        Path("d/256.png").unlink()
        Path("d.settings.json").unlink()
        assert run(*command) == 0
        grid = Path("d/256.png").read_bytes()
        Path("d/holiday.png").write_bytes(b"mine")
        assert run(*command, "--seed", 1) == 2
        assert "d/holiday.png is no image of these prompts: delete it" in capsys.readouterr().err
        assert Path("d/256.png").read_bytes() == grid
        Path("d/holiday.png").unlink()
        assert run(*command, "--seed", 1) == 0
        assert Path("d/256.png").read_bytes() != grid


@pytest.mark.parametrize("folder_class", [GenEvalFolder, DpgFolder])
def test_several_processes_share_a_benchmark(
    folder_class: type[GenEvalFolder] | type[DpgFolder], tmp_path: Path
) -> None:
    prompts = [(f"prompt {i}", str(i)) for i in range(3)]
    pictures = torch.randint(256, (12, 4, 4, 3), dtype=torch.uint8)

    def opened() -> GenEvalFolder | DpgFolder:
        if folder_class is DpgFolder:
            return DpgFolder(tmp_path / "out", {}, [DpgPrompt(*prompt) for prompt in prompts])
        return GenEvalFolder(tmp_path / "out", {}, [GenEvalPrompt(*prompt) for prompt in prompts])

    opened().open()
    for rank in (0, 1):  # with batches of three, the images of one prompt fall to both
        folder, own = opened(), share(12, 3, rank, 2)
        assert folder.pending(own) == own
        folder.write(own, pictures[own])
        assert opened().pending(own) == []
    first = opened()
    assert torch.equal(first.first(12), pictures)
    first.finish()
    assert torch.equal(opened().first(12), pictures)
    assert opened().pending(range(12)) == []


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), 'draws from text: give --prompt "TEXT"'),
            (("--prompt", "a", "--classes", "1"), "--classes: this checkpoint draws from text"),
            (("--prompt", "a", "--height", "18"), "--height 18 is not one of 16 … 128, divisible"),
            (("--prompt", "a", "--width", "8"), "by 4: use 16"),
            (("--prompt", "a", "--width", "256"), "by 4: use 128"),
            (("--prompt", "a", "--recipe", "euler-250"), "--recipe: the recipes are those of"),
            (("--prompt", "a", "--text-encoder", "nowhere"), "text encoder nowhere is no folder"),
            (("--prompt", "a", "--prompts-file", "p.txt"), "not allowed with argument --prompt"),
            (("--prompt", "a", "--prompt", "b \udcff"), "--prompt: prompt 2 is not Unicode: char"),
            (("--prompt", "a", "--negative-prompt", "\udcff"), "--negative-prompt is not Unicode"),
            (("--geneval", "half.jsonl"), "--geneval: prompt 1 is not Unicode: character 3, in"),
            (("--prompt", "a", "--time-shift", "1e-30"), "time shift of 1e-30 are too close"),
            (("--prompts-file", "missing.txt"), "missing.txt does not exist"),
            (("--prompts-file", "latin.txt"), "latin.txt is not UTF-8 (byte 0xfc at 2): save it"),
            (("--prompts-file", "empty.txt"), "empty.txt holds no prompt"),
            (("--prompts-file", "folder"), "folder cannot be read (Is a directory)"),
            (("--geneval", "empty.txt"), "empty.txt is empty: name GenEval's"),
            (("--geneval", "bad.jsonl"), "bad.jsonl, line 2, is no JSON object with a prompt"),
            (("--geneval", "number.jsonl"), "number.jsonl, line 1: its prompt is no text"),
            (("--geneval", "good.jsonl", "--num", "3"), "--num: a benchmark has 4 images"),
            (("--geneval", "good.jsonl", "--npz", "a.npz"), "--npz: a benchmark has 4 images"),
            (("--dpg", "folder"), "folder has no .txt files"),
            (("--dpg", "missing"), "missing is no folder"),
            (("--dpg", "dpg", "--height", "32"), "--dpg: its scorer cuts squares"),
        ],
    )
    def test_is_one_line_and_draws_nothing(
        self,
        run: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...],
        message: str,
    ) -> None:
        Path("latin.txt").write_bytes("a\nü".encode("latin-1"))
        Path("empty.txt").write_text("\n \n")
        for name, lines in (
            ("good", '{"prompt": "a"}'),
            ("bad", '{"prompt": "a"}\n["a"]'),
            ("number", '{"prompt": 3}'),
            ("half", '{"prompt": "a \\ud800"}'),
        ):
            Path(f"{name}.jsonl").write_text(lines)
        Path("folder").mkdir()
        Path("dpg").mkdir()
        Path("dpg/a.txt").write_text("a")
        before = files(Path())
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert files(Path()) == before

    def test_prompts_for_a_class_model(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        card = ModelCard(height=8, width=8)
        model = DeCo(DeCoConfig(16, 1, 2, patch_size=4, num_classes=3), card)
        path = save_checkpoint(tmp_path / "classes", model=None, ema=model, card=card)
        for option in ("--prompt", "--negative-prompt", "--text-encoder"):
            assert main(["--checkpoint", str(path), "--device", "cpu", option, "a cat"]) == 2
            assert f"{option}: this checkpoint draws classes" in capsys.readouterr().err


def test_the_published_model_draws_by_its_own_settings() -> None:
    from deco_fast.models.presets import PRESETS

    card = PRESETS["deco-t2i"].card
    assert (card.height, card.width) == (512, 512)
    assert card.sampling == replace(SETTINGS, steps=25, guidance_scale=4.0)
    assert card.text_encoder == "hf:Qwen/Qwen3-1.7B"


def test_evaluating_digits_needs_a_class_model(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["digits", "--checkpoint", str(checkpoint), "--device", "cpu"]
    assert evaluate([*arguments, "--num", "4"]) == 2
    message = f"{checkpoint} draws from text: name a checkpoint that draws classes"
    assert message in capsys.readouterr().err
