"""The judge of drawn digits, and the command that asks it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deco_fast.checkpoint import save_weights
from deco_fast.cli.evaluate import main
from deco_fast.data import DigitsDataset
from deco_fast.evaluation.digits import DigitsEvaluator
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import DeCoConfig
from deco_fast.models.deco import DeCo
from deco_fast.sampling.images import to_uint8
from deco_fast.sampling.noise import noise_for

# --- the judge ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator() -> DigitsEvaluator:
    return DigitsEvaluator()


@pytest.fixture(scope="module")
def held_out() -> DigitsDataset:
    return DigitsDataset("test")


def test_classifier_reads_held_out_digits(evaluator: DigitsEvaluator) -> None:
    assert 0.98 <= evaluator.held_out_accuracy < 1


def test_classifier_is_fitted_on_the_training_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong labels on the held-out digits cost their accuracy and change no prediction."""
    images = DigitsDataset("test", size=8).images
    expected = DigitsEvaluator(size=8).predict(images)
    original = DigitsDataset.__init__

    def relabelled(self: DigitsDataset, split: str = "train", size: int = 32) -> None:
        original(self, split, size)  # type: ignore[arg-type]
        if split == "test":
            self.labels = (self.labels + 1) % 10

    monkeypatch.setattr(DigitsDataset, "__init__", relabelled)
    relabelled_evaluator = DigitsEvaluator(size=8)
    assert relabelled_evaluator.held_out_accuracy < 0.02
    assert torch.equal(relabelled_evaluator.predict(images), expected)


def test_report_of_held_out_digits(evaluator: DigitsEvaluator, held_out: DigitsDataset) -> None:
    report = evaluator.evaluate(held_out.images, held_out.labels)
    assert report.num_images == 360
    assert report.accuracy == report.held_out_accuracy
    assert report.nearest == report.held_out_nearest
    assert 0 < report.nearest.quantile_05 < report.nearest.median
    assert report.exact_copies == report.nearer_than_held_out == 0


def test_accuracy_counts_the_class_asked_for(
    evaluator: DigitsEvaluator, held_out: DigitsDataset
) -> None:
    read_right = evaluator.predict(held_out.images) == held_out.labels
    images, labels = held_out.images[read_right], held_out.labels[read_right].clone()
    threes, wrong = (labels == 3).nonzero().flatten(), 5
    labels[threes[:wrong]] = 8
    report = evaluator.evaluate(images, labels)
    eights = int((labels == 8).sum())
    assert report.accuracy == pytest.approx(1 - wrong / len(labels))
    expected = {digit: 1.0 for digit in range(10)} | {8: 1 - wrong / eights}
    assert report.accuracy_per_class == pytest.approx(expected)


def test_noise_is_no_digit(evaluator: DigitsEvaluator) -> None:
    noise = torch.stack([noise_for(0, index, (3, 32, 32)) for index in range(200)])
    report = evaluator.evaluate(noise, torch.arange(200) % 10)
    assert report.accuracy < 0.3
    assert report.nearest.median > 2 * report.held_out_nearest.median


def test_copies_are_counted(evaluator: DigitsEvaluator) -> None:
    train = DigitsDataset("train")
    images, labels = to_uint8(train.images[:30]), train.labels[:30]
    # Eight changed by one grey level in one value: no exact copies, and still far too near.
    images[:8, 0, 0, 0] += 1
    report = evaluator.evaluate(images, labels)
    assert report.exact_copies == 22
    assert report.nearer_than_held_out == 30
    assert report.nearest.median == 0
    distances, nearest = evaluator.nearest_training_digits(images)
    assert distances[:8].tolist() == pytest.approx([1 / (3 * 32 * 32) ** 0.5] * 8)
    assert torch.equal(nearest, to_uint8(train.images[:30]))


def test_nearest_distance_is_the_root_mean_square(
    evaluator: DigitsEvaluator, held_out: DigitsDataset
) -> None:
    image = to_uint8(held_out.images[:1])
    train = to_uint8(DigitsDataset("train").images)
    differences = (train.double() - image.double()).square().mean((1, 2, 3)).sqrt()
    distances, nearest = evaluator.nearest_training_digits(image)
    assert float(distances) == pytest.approx(float(differences.min()))
    assert torch.equal(nearest[0], train[differences.argmin()])


def test_floats_and_bytes_are_judged_alike(
    evaluator: DigitsEvaluator, held_out: DigitsDataset
) -> None:
    as_bytes = to_uint8(held_out.images).numpy()
    labels = held_out.labels
    assert evaluator.evaluate(held_out.images, labels) == evaluator.evaluate(
        as_bytes, labels.numpy()
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_labels_are_labels(
    evaluator: DigitsEvaluator, held_out: DigitsDataset, dtype: type
) -> None:
    images, labels = held_out.images[:20], held_out.labels[:20]
    expected = evaluator.evaluate(images, labels)
    assert evaluator.evaluate(images, labels.numpy().astype(dtype)) == expected


def test_report_as_text_and_json(evaluator: DigitsEvaluator, held_out: DigitsDataset) -> None:
    report = evaluator.evaluate(held_out.images, held_out.labels)
    fields = json.loads(json.dumps(report.to_json()))
    assert fields["accuracy"] == report.accuracy
    assert fields["held_out_nearest"]["median"] == report.held_out_nearest.median
    assert set(fields["accuracy_per_class"]) == {str(digit) for digit in range(10)}
    assert f"{report.accuracy:.1%}" in str(report)
    assert f"{report.nearest.median:.1f}" in str(report)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), r"expected uint8 \(N, 32, 32, 3\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), "expected uint8"),
        (torch.zeros(2, 3, 32, 32), torch.tensor([0]), "2 images, labels"),
        (torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64), "0 images"),
        (torch.zeros(2, 3, 32, 32), torch.tensor([0, 10]), "0 to 10: expected"),
        (torch.zeros(2, 3, 32, 32), torch.tensor([0.0, 1.0]), "expected integers"),
        (torch.zeros(2, 3, 32, 32), np.array([False, True]), "labels are torch.bool: expected"),
        (torch.zeros(2, 3, 32, 32), np.array([0j, 1]), "torch.complex128: expected integers"),
        (torch.zeros(2, 3, 32, 32), np.array([0, 10], np.uint16), "0 to 10: expected"),
    ],
)
def test_evaluator_refuses_wrong_arguments(
    evaluator: DigitsEvaluator,
    images: torch.Tensor,
    labels: torch.Tensor | np.ndarray,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate(images, labels)


# --- the command ----------------------------------------------------------------------------

CONFIG = DeCoConfig(
    hidden_size=16, depth=1, num_heads=2, patch_size=8, decoder_hidden_size=8, num_classes=10
)
CARD = ModelCard(
    name="tiny", height=16, width=16, sampling=SamplingSettings(steps=3, guidance_scale=2.0)
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the checkpoint tiny.safetensors."""
    monkeypatch.chdir(tmp_path)
    save_weights("tiny.safetensors", DeCo(CONFIG), CARD)
    return tmp_path


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_command_draws_and_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digits", "--checkpoint", "tiny.safetensors", "--num", "20"]) == 0
    output = folder / "evaluations/digits-tiny-euler3-seed0"
    assert str(output.relative_to(folder) / "report.json") in capsys.readouterr().out
    document = report_of(output)
    assert document["report"]["num_images"] == 20
    assert set(document["report"]["accuracy_per_class"]) == {str(digit) for digit in range(10)}
    assert document["source"]["steps"] == 3 and document["source"]["guidance_scale"] == 2

    # An untrained decoder's velocity is zero, so that what is drawn is the noise itself: its
    # judgement shows that seed, index and label of every image were those of the sampling command.
    noise = torch.stack([noise_for(0, index, (3, 16, 16)) for index in range(20)])
    expected = DigitsEvaluator(16).evaluate(noise, torch.arange(20) % 10)
    assert document["report"] == json.loads(json.dumps(expected.to_json()))

    pairs = np.asarray(Image.open(output / "pairs.png"))
    _, nearest = DigitsEvaluator(16).nearest_training_digits(noise)
    np.testing.assert_array_equal(pairs[:16, :16], to_uint8(noise)[0])
    np.testing.assert_array_equal(pairs[:16, 16:32], nearest[0])


def test_command_keeps_other_reports(folder: Path) -> None:
    command = ["digits", "--checkpoint", "tiny.safetensors", "--num", "10"]
    for arguments in ([], [], ["--guidance-scale", "1.5"]):
        assert main(command + arguments) == 0
    outputs = sorted((folder / "evaluations").iterdir())
    assert [output.name[-5:] for output in outputs] == ["seed0", "ed0-2"]
    scales = [report_of(output)["source"]["guidance_scale"] for output in outputs]
    assert scales == [2.0, 1.5]


def test_command_reads_npz(folder: Path) -> None:
    test = DigitsDataset("test", size=16)
    np.savez("digits.npz", to_uint8(test.images).numpy(), test.labels.numpy())
    assert main(["digits", "--images", "digits.npz", "--out", "here"]) == 0
    report = report_of(folder / "here")["report"]
    assert report["num_images"] == 360
    assert (
        report["accuracy"] == report["held_out_accuracy"] == DigitsEvaluator(16).held_out_accuracy
    )


def test_command_keeps_the_report_of_other_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = DigitsDataset("test", size=16)
    images, labels = to_uint8(test.images).numpy(), test.labels.numpy()
    np.savez("digits.npz", images, labels)
    command = ["digits", "--images", "digits.npz", "--out", "here"]
    assert main(command) == 0
    before = (folder / "here/report.json").read_bytes()
    np.savez("digits.npz", images[:20], labels[:20])
    assert main(command) == 2
    assert "--out here holds the report of other images" in capsys.readouterr().err
    assert (folder / "here/report.json").read_bytes() == before


def test_command_draws_with_the_newest_finished_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs/mine"
    weights = run / "checkpoints/step-00000007/ema.safetensors"
    save_weights(weights, DeCo(CONFIG), CARD)
    (run / "finished").touch()
    assert main(["digits", "--num", "10", "--steps", "2", "--solver", "heun"]) == 0
    assert "the newest run that has finished" in capsys.readouterr().out
    assert (folder / "evaluations/digits-mine-step-00000007-heun2-seed0/report.json").exists()


def bad_arguments(folder: Path) -> dict[str, list[str]]:
    """Expected words of the error, and the arguments that call for it."""
    save_weights("imagenet.safetensors", DeCo(DeCoConfig(16, 1, 2, 8, 8)), CARD)
    grey = np.zeros((2, 16, 16, 1), np.uint8)
    np.savez("grey.npz", grey, [0, 1])
    np.savez("unlabelled.npz", grey)
    np.savez("flat.npz", grey.reshape(2, -1), [0, 1])
    (folder / "text.npz").write_text("no npz")
    (folder / "nothing.npz").touch()
    np.savez_compressed("broken.npz", np.random.default_rng(0).bytes(9000), [0, 1])
    broken = bytearray((folder / "broken.npz").read_bytes())
    broken[2000:4000] = bytes(2000)
    (folder / "broken.npz").write_bytes(broken)
    (folder / "pictures").mkdir()
    (folder / "pictures/pairs.png").write_text("of mine")
    (folder / "taken").mkdir()
    (folder / "taken/report.json").write_text("{}")
    tiny = ["--checkpoint", "tiny.safetensors", "--num", "10"]
    return {
        "missing": ["--checkpoint", "missing"],
        "1000 classes: name a checkpoint": ["--checkpoint", "imagenet.safetensors"],
        "--steps: must be at least 1": [*tiny, "--steps", "0"],
        "euler": [*tiny, "--solver", "eular"],
        "unknown device": [*tiny, "--device", "abacus"],
        "--out tiny.safetensors": [*tiny, "--out", "tiny.safetensors"],
        "holds the report of other images": [*tiny, "--out", "taken"],
        "pictures holds a pairs.png that is not of a report": [*tiny, "--out", "pictures"],
        "nothing.npz is no npz file": ["--images", "nothing.npz"],
        "broken.npz is no npz file": ["--images", "broken.npz"],
        "missing.npz does not exist": ["--images", "missing.npz"],
        "text.npz is no npz file": ["--images", "text.npz"],
        "unlabelled.npz is no npz file": ["--images", "unlabelled.npz"],
        "shape (2, 256)": ["--images", "flat.npz"],
        "grey holds no digits": ["--images", "grey.npz"],
        "--steps is for drawing": ["--images", "grey.npz", "--steps", "5"],
        "--seed is for drawing": ["--images", "grey.npz", "--seed", "0"],
    }


def test_command_refuses_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected, arguments in bad_arguments(folder).items():
        assert main(["digits", *arguments]) == 2, expected
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and expected in error
    assert (folder / "taken/report.json").read_text() == "{}"
    assert (folder / "pictures/pairs.png").read_text() == "of mine"
    assert not (folder / "evaluations").exists()
