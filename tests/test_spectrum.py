"""DCT energy spectra: the transform, the signals of a model, and the command."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from image_sets import encoded, write
from torch import Tensor

from deco_fast.checkpoint import save_weights
from deco_fast.cli.evaluate import main
from deco_fast.data import DigitsDataset
from deco_fast.evaluation.spectrum import (
    DIT_OUTPUT,
    TRUE_VELOCITY,
    VELOCITY,
    LabelledBatch,
    Spectrum,
    block_energy,
    measure_spectra,
    spectral_error,
    zigzag,
)
from deco_fast.evaluation.spectrum_images import SpectrumImages
from deco_fast.evaluation.spectrum_report import draw_spectra
from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoConfig
from deco_fast.models.deco import DeCo
from deco_fast.sampling.noise import noise_for

CONFIG = DeCoConfig(
    hidden_size=16, depth=2, num_heads=2, patch_size=4, decoder_hidden_size=8, num_classes=10
)
CARD = ModelCard(name="tiny", height=32, width=32)

# The order of ITU-T T.81, figure A.6: the number of each coefficient of the first rows.
FIRST_ROWS = [[0, 1, 5, 6, 14, 15, 27, 28], [2, 4, 7, 13, 16, 26, 29, 42]]


def test_zigzag_order() -> None:
    numbers = torch.empty(64, dtype=torch.int64)
    numbers[zigzag()] = torch.arange(64)
    assert numbers.view(8, 8)[:2].tolist() == FIRST_ROWS
    assert zigzag(2).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("shape", "size"), [((2, 3, 16, 24), 8), ((3, 5, 4, 6), 4)])
def test_energy_equals_the_oracle(shape: tuple[int, ...], size: int) -> None:
    values = torch.randn(shape)
    total = np.zeros((size, size))
    cut = values.numpy()[..., : shape[2] // size * size, : shape[3] // size * size]
    blocks = [
        part
        for plane in cut.reshape(-1, *cut.shape[2:])
        for rows in np.split(plane, plane.shape[0] // size)
        for part in np.split(rows, plane.shape[1] // size, axis=1)
    ]
    for block in blocks:
        total += scipy.fft.dctn(block.astype(np.float64), norm="ortho") ** 2
    energy = block_energy(values)
    np.testing.assert_allclose(energy, (total / len(blocks)).ravel()[zigzag(size)], rtol=1e-6)
    # Parseval: the transform keeps the energy.
    assert float(energy.sum()) == pytest.approx(size**2 * float((cut**2).mean()), rel=1e-5)


def test_energies_of_plain_signals() -> None:
    flat = block_energy(torch.full((1, 1, 8, 8), 3.0))
    assert flat.tolist() == pytest.approx([9 * 64] + [0] * 63)
    board = torch.arange(8)[:, None] + torch.arange(8)
    checkered = block_energy(torch.where(board % 2 == 0, 1.0, -1.0)[None, None])
    assert checkered.argmax() == 63
    # White noise: every frequency alike.
    noise = block_energy(torch.randn(64, 3, 32, 32))
    assert noise.tolist() == pytest.approx([1] * 64, rel=0.1)


def test_error_is_in_decibels() -> None:
    energy = torch.rand(64, dtype=torch.float64) + 0.1
    assert spectral_error(energy, energy) == 0
    assert spectral_error(10 * energy, energy) == pytest.approx(10)
    one = energy.clone()
    one[5] *= 100
    assert spectral_error(one, energy) == pytest.approx((20**2 / 64) ** 0.5)


def scrambled_model() -> DeCo:
    """Weights of which no layer gives zero."""
    model = DeCo(CONFIG, CARD).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_signals_of_a_model() -> None:
    model, digits = scrambled_model(), DigitsDataset("test")
    images, labels = digits.images[:6], digits.labels[:6]
    batches = [LabelledBatch(images[k : k + 4], labels[k : k + 4]) for k in (0, 4)]
    found = measure_spectra(model, "m", batches, timesteps=(0.25,), seed=3)
    assert [(s.model, s.signal) for s in found] == [
        ("", TRUE_VELOCITY),
        ("m", VELOCITY),
        ("m", DIT_OUTPUT),
    ]
    noise = torch.stack([noise_for(3, k, (3, 32, 32)) for k in range(6)])
    x, t = 0.25 * images + 0.75 * noise, torch.full((6,), 0.25)
    # The last block's output comes before the time embedding and the SiLU of `encode`.
    tokens, (output,) = model.encode(x, t, labels, return_layers=(2,))
    embedded = output + model.timestep_embedder(t)[:, None]
    assert torch.allclose(torch.nn.functional.silu(embedded), tokens, atol=1e-6)
    grid = output.transpose(1, 2).reshape(6, 16, 8, 8)
    for spectrum, signal in zip(found, (images - noise, model(x, t, labels), grid), strict=True):
        torch.testing.assert_close(spectrum.energy, block_energy(signal), rtol=1e-5, atol=1e-9)
        assert float(spectrum.share.sum()) == pytest.approx(1)
        assert spectrum.high_share == pytest.approx(float(spectrum.share[32:].sum()))


def test_any_velocity_will_do() -> None:
    """Without an encoder there is no output of a DiT."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x * t.view(-1, 1, 1, 1)

    batch = LabelledBatch(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    found = measure_spectra(model, "plain", [batch], timesteps=(0.5, 1.0, 1.0))
    assert {s.signal for s in found} == {TRUE_VELOCITY, VELOCITY}
    ends = [s for s in found if s.signal == VELOCITY and s.timestep == 1]
    torch.testing.assert_close(ends[0].energy, block_energy(batch.images))


@pytest.mark.parametrize("count", [1, 3, 5, 6, 8])
def test_images_are_spread_over_all(count: int) -> None:
    images = [(torch.full((3, 8, 8), float(number)), number) for number in range(8)]
    spread = SpectrumImages(images, null=8, labelled=True)  # type: ignore[arg-type]
    labels = torch.cat([batch.labels for batch in spread.batches(count, 4)])
    gaps = labels.diff(prepend=torch.tensor([0]), append=torch.tensor([8]))[1:]
    assert len(labels) == count and labels[0] == 0
    assert int(gaps.max() - gaps.min()) <= 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two checkpoints."""
    monkeypatch.chdir(tmp_path)
    save_weights("one.safetensors", scrambled_model(), CARD)
    save_weights("two.safetensors", DeCo(CONFIG), CARD)
    return tmp_path


def test_command_compares_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["one.safetensors", "zero=two.safetensors", "--num", "20", "--timesteps", "0.2,0.8"]
    assert main(["spectrum", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "one: 20 images of 32×32, with their labels" in printed
    output = folder / "evaluations/spectrum-one-zero"
    with (output / "spectrum.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Two times, 64 frequencies: the true velocity once, two signals of each of two models.
    assert len(rows) == 2 * 64 * (1 + 2 * 2)
    energies = {
        (row["model"], row["signal"]): float(row["energy"])
        for row in rows
        if row["timestep"] == "0.2" and row["frequency"] == "0"
    }
    # A new decoder's velocity is zero.
    assert energies["zero", "velocity"] == 0 < energies["one", "velocity"]
    assert energies["zero", "dit_output"] > 0
    assert (output / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (output / "spectrum.svg").read_text()


def test_command_reads_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        for k in range(2):
            write(folder / f"classes/{number}/{k}.png", encoded(20 * number + k))
    command = ["spectrum", "one.safetensors", "--timesteps", "0.5", "--num", "10", "--images"]
    assert main([*command, "classes", "--out", "a"]) == 0
    assert "10 images of 32×32, with their labels" in capsys.readouterr().out
    # A single class folder is no labelling of ten classes.
    assert main([*command, "classes/3", "--out", "b"]) == 0
    assert "2 images of 32×32, with the null class" in capsys.readouterr().out


def test_command_replaces_no_file_of_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["spectrum", "one.safetensors", "--timesteps", "0.5", "--num", "10", "--out", "mine"]
    (folder / "mine").mkdir()
    (folder / "mine/spectrum.csv").write_text("of mine")
    assert main(command) == 2
    assert "--out mine holds a spectrum.csv that is not of a report" in capsys.readouterr().err
    assert (folder / "mine/spectrum.csv").read_text() == "of mine"
    (folder / "mine/spectrum.csv").unlink()
    assert main(command) == 0 and main(command) == 0  # its own it may
    unnamed = folder / "evaluations/spectrum-one"
    unnamed.mkdir(parents=True)
    (unnamed / "spectrum.csv").write_text("of mine")
    assert main(command[:-2]) == 0
    assert (unnamed / "spectrum.csv").read_text() == "of mine"
    assert (folder / "evaluations/spectrum-one-2/spectrum.csv").exists()


def test_command_keeps_the_report_of_other_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "images/a.png", encoded(1))
    command = ["spectrum", "one.safetensors", "--timesteps", "0.5", "--images", "images"]
    command += ["--out", "mine"]
    assert main(command) == 0
    before = (folder / "mine/spectrum.csv").read_bytes()
    write(folder / "images/b.png", encoded(200))
    assert main(command) == 2
    assert "--out mine holds the report of other images" in capsys.readouterr().err
    assert (folder / "mine/spectrum.csv").read_bytes() == before


def test_command_refuses_damaged_images_in_class_folders(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        write(folder / f"classes/{number}/0.png", encoded(20 * number))
    (folder / "classes/3/0.png").write_bytes(b"no png")
    assert main(["spectrum", "one.safetensors", "--images", "classes"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: classes/3/0.png is no readable image")


def test_names_of_checkpoints(folder: Path) -> None:
    """A path with "=" is a path, and a name that begins with "_" stands in the legend."""
    (folder / "runs").mkdir()
    (folder / "one.safetensors").rename(folder / "runs/lr=0.1.safetensors")
    command = ["spectrum", "runs/lr=0.1.safetensors", "_zero=two.safetensors", "--num", "4"]
    assert main([*command, "--timesteps", "0.5"]) == 0
    output = folder / "evaluations/spectrum-lr=0.1-_zero"
    with (output / "spectrum.csv").open(newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"", "lr=0.1", "_zero"}


def test_every_model_is_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(
        "deco_fast.evaluation.spectrum_report.save_figure", lambda figure, _: figures.append(figure)
    )
    energy = torch.ones(64, dtype=torch.float64)
    draw_spectra([Spectrum(name, VELOCITY, 0.5, energy) for name in ("_a", "b")], [])
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_a", "b"]


def test_command_refuses_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = ModelCard(name="large", height=64, width=64)
    save_weights("large.safetensors", DeCo(CONFIG), large)
    (folder / "empty").mkdir()
    bad = {
        "missing.safetensors does not exist": ["missing.safetensors"],
        "two checkpoints are called 'one'": ["one.safetensors", "one=two.safetensors"],
        "images of several sizes (one 32×32, large 64×64)": [
            "one.safetensors",
            "large.safetensors",
        ],
        "--timesteps: timesteps are 0 … 1, not 2": ["one.safetensors", "--timesteps", "2"],
        "a name is empty: name the checkpoint otherwise, NAME=one": ["=one.safetensors"],
        "'true' is what the true velocity is called": ["true=one.safetensors"],
        "../x=one.safetensors does not exist, and '../x' is no name": ["../x=one.safetensors"],
        "File name too long": [f"{200 * 'a'}=one.safetensors", f"{200 * 'b'}=two.safetensors"],
        "--timesteps: two timesteps of 0.1234567,0.1234568 are equal in six digits": [
            "one.safetensors",
            "--timesteps",
            "0.1234567,0.1234568",
        ],
        "--timesteps: could not convert": ["one.safetensors", "--timesteps", "soon"],
        "--images: is empty": ["one.safetensors", "--images", ""],
        "--images none is no folder": ["one.safetensors", "--images", "none"],
        "empty holds no images": ["one.safetensors", "--images", "empty"],
    }
    for expected, arguments in bad.items():
        assert main(["spectrum", *arguments]) == 2, expected
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and expected in error
    assert not (folder / "evaluations").exists()
