"""Suites: what they plan, how they go on, what they write; and the data of the small one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from processes import TINY, assert_identical, in_processes, weights
from sklearn.datasets import load_sample_image

from deco_fast.checkpoint import load_checkpoint, save_weights
from deco_fast.cli.evaluate import main
from deco_fast.config import load_config
from deco_fast.data import DigitsDataset, PhotographCrops
from deco_fast.errors import UserError
from deco_fast.evaluation.extractors import open_extractor
from deco_fast.evaluation.frechet import Moments, frechet_distance
from deco_fast.evaluation.random_conv import RandomConvExtractor
from deco_fast.evaluation.spectrum import block_energy, spectral_error
from deco_fast.evaluation.statistics import SetStatistics
from deco_fast.experiments.folder import SuiteFolder
from deco_fast.experiments.reference import Reference, dataset_identity, suite_reference
from deco_fast.experiments.suite import Evaluation, load_suite, plan, suite_names
from deco_fast.experiments.table import RunResult, markdown
from deco_fast.experiments.values import KeptValues
from deco_fast.models.deco import DeCo
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import to_uint8
from deco_fast.sampling.run import draw
from deco_fast.training.batches import open_dataset
from deco_fast.training.distributed import Processes
from deco_fast.training.monitor import Monitor

# --- the photographs ------------------------------------------------------------------------


def test_crops_are_parts_of_the_photographs() -> None:
    crops = PhotographCrops(32, 24)
    assert len(crops) == 2 * 99 * 155
    china, flower = (torch.tensor(load_sample_image(f"{n}.jpg")) for n in ("china", "flower"))
    first, last = crops[0], crops[len(crops) - 1]
    assert torch.equal(first[0].permute(1, 2, 0), china[:32, :24]) and first[1] == 0
    assert torch.equal(last[0].permute(1, 2, 0), flower[392:424, 616:640]) and last[1] == 1
    one_down = crops[155][0].permute(1, 2, 0)
    assert torch.equal(one_down, china[4:36, :24])
    with pytest.raises(IndexError, match="crop 30690 of 30690"):
        crops[30690]
    with pytest.raises(ValueError, match="choose up to 427×640"):
        PhotographCrops(428, 32)
    assert crops.fingerprint == PhotographCrops(32, 24).fingerprint
    assert crops.fingerprint != PhotographCrops(32, 32).fingerprint


def test_photographs_are_a_dataset_of_the_configuration() -> None:
    dataset = open_dataset(load_config("photographs"))
    assert isinstance(dataset, PhotographCrops) and len(dataset) == 30_294
    with pytest.raises(UserError, match="photographs has 2 classes: set model"):
        load_config("photographs", ["--model.num_classes=10"])


# --- planning -------------------------------------------------------------------------------


def small_suite(**changes: object) -> dict:
    """Two rows from two seeds, of a tiny model on digits."""
    common = dict(word.removeprefix("--").split("=") for word in TINY)
    return {
        "name": "small",
        "description": "A test.",
        "config": "deco-digits",
        "overrides": {
            key: int(value)
            for key, value in common.items()
            if not key.startswith("training.warmup")
        }
        | {"training.steps": 4, "training.warmup_steps": 1, "output.checkpoint_every": 2},
        "rows": [
            {"name": "with", "paper": {"fid": 31.35}},
            {"name": "without it", "overrides": {"loss.frequency_weight": 0}},
        ],
        "seeds": [0, 1],
        "evaluation": {
            "features": "random-conv",
            "metrics": ["fid"],
            "num": 452,
            "spectrum_images": 8,
            "batch_size": 113,
        },
    } | changes


def write_suite(**changes: object) -> str:
    Path("suite.yaml").write_text(yaml.safe_dump(small_suite(**changes)))
    return "suite.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_shipped_suite_can_be_planned() -> None:
    planned = 0
    for name in suite_names():
        suite = load_suite(name)
        assert suite.name == name
        runs = plan(suite)
        assert len(runs) == len(suite.rows) * len(suite.seeds)
        planned += len(suite.rows)
    assert planned >= 10


def test_a_plan_takes_all_rows_from_a_seed_first(folder: Path) -> None:
    suite = load_suite(write_suite(), evaluation={"num": 600})
    assert suite.evaluation.num == 600
    runs = plan(suite, {"training.learning_rate": "5e-4"})
    assert [run.name for run in runs] == [
        "with-seed0",
        "without-it-seed0",
        "with-seed1",
        "without-it-seed1",
    ]
    assert [run.config.loss.frequency_weight for run in runs] == [1, 0, 1, 0]
    assert [run.config.training.seed for run in runs] == [0, 0, 1, 1]
    assert {run.config.training.learning_rate for run in runs} == {5e-4}
    assert runs[1].config.name == "without-it-seed0"


BAD_SUITES = {
    "unknown key 'row'": {"row": []},
    "rows: ": {"rows": []},
    "two rows are called 'a-b'": {"rows": [{"name": "A b"}, {"name": "a, B"}]},
    "unknown 'random-con'; did you mean 'random-conv'": {"evaluation": {"features": "random-con"}},
    "evaluation.metrics: unknown 'fad'; did you mean 'fid'": {"evaluation": {"metrics": ["fad"]}},
    "row 'a' of suite small: unknown key 'loss.weight'": {
        "rows": [{"name": "a", "overrides": {"loss.weight": 3}}]
    },
    "row 'a' of suite small: unknown configuration 'digits'": {
        "rows": [{"name": "a", "config": "digits"}]
    },
    "on equal terms, training.steps differs (a: 4; b: 5)": {
        "rows": [{"name": "a"}, {"name": "b", "overrides": {"training.steps": 5}}]
    },
    "suite small: seed 1 is given twice": {"seeds": [1, 0, 1]},
    "row 'Real images' is called as that of the real images": {"rows": [{"name": "Real images"}]},
    "row '!!' has no letters or digits": {"rows": [{"name": "!!"}]},
    "name: '../mine' is no name for a folder": {"name": "../mine"},
    "name: '..' is no name for a folder": {"name": ".."},
    "evaluation.reference: string should have at least 1": {"evaluation": {"reference": ""}},
} | {
    f"on equal terms, {key} differs": {"rows": [{"name": "a"}, {"name": "b", "overrides": change}]}
    for change in (
        {"sampling.order": 3},
        {"sampling.guidance_interval": [0.1, 0.9]},
        {"sampling.guidance_rescale": 0.5},
        {"sampling.time_shift": 3.0},
        {"data.root": "other"},
    )
    for key in change
}


@pytest.mark.parametrize("message", BAD_SUITES)
def test_wrong_suites_are_refused(
    folder: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablate", "--suite", write_suite(**BAD_SUITES[message]), "--device=cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (folder / "ablations").exists()


def test_wrong_options_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_suite()
    (folder / "list.yaml").write_text("[1, 2]")
    for message, arguments in {
        "unknown suite 'photograph'; did you mean 'photographs'": ["--suite", "photograph"],
        "none.yaml: no such suite file": ["--suite", "none.yaml"],
        "list.yaml: must hold the keys": ["--suite", "list.yaml"],
        "suite small has no 'with it'; did you mean": ["--suite", name, "--rows", "with it"],
        "--set loss: write --set section.key=value": ["--suite", name, "--set", "loss"],
        "fid of 448 features needs at least 449 images": ["--suite", name, "--num", "448"],
        "--out suite.yaml: suite.yaml is a file": ["--suite", name, "--out", name],
        "suite small: seed 0 is given twice": ["--suite", name, "--seeds", "0", "0"],
        "--reference: is empty": ["--suite", name, "--reference", ""],
        "--weights: is empty": ["--suite", name, "--weights", ""],
    }.items():
        assert main(["ablate", *arguments, "--device=cpu"]) == 2, message
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error
    few = write_suite(evaluation={"features": "random-conv", "metrics": ["recall"], "num": 3})
    assert main(["ablate", "--suite", few, "--device=cpu"]) == 2
    assert "recall needs at least 4 images and the images holds 3" in capsys.readouterr().err
    # Nothing was trained before these were known.
    assert not list(folder.glob("ablations/*/runs/*"))


def test_dry_run_lists_the_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate", "--suite", write_suite(), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "without-it-seed1" in lines[3] and "to do" in lines[3]
    assert "4 steps of 8 images" in lines[0]
    assert not (folder / "ablations").exists()


def test_nothing_of_others_is_written_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a suite's folder is not one, and where its reference lies in it."""
    name = write_suite()
    for file in ("results.md", "results.png", "reference.npz", "evaluations/mine.json"):
        mine = folder / "mine" / file
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("of mine")
        assert main(["ablate", "--suite", name, "--device=cpu", "--out=mine"]) == 2
        first = file.partition("/")[0]
        assert f"holds a {first} that is not of a suite: choose" in capsys.readouterr().err
        assert mine.read_text() == "of mine"
        shutil.rmtree(folder / "mine")
    for reference in ("reference.npz", "runs/with-seed0/samples", "evaluations", ".", "../.."):
        path = f"ablations/small/{reference}"
        assert main(["ablate", "--suite", name, "--device=cpu", "--reference", path]) == 2
        assert f"--reference {path} lies among what the suite writes" in capsys.readouterr().err
    # What a suite left is its own, whichever of its marks is there.
    where = SuiteFolder(folder / "mine")
    where.claim()
    (folder / "mine/results.md").write_text("of a suite")
    where.check("dataset")
    (folder / "mine/suite.json").unlink()
    note = {"identity": "", "rows": True, "extractor": "", "energy": None}
    (folder / "mine/reference.json").write_text(json.dumps(note))
    where.check("dataset")
    (folder / "mine/reference.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a results\.md that is not of a suite"):
        where.check("dataset")


def test_figures_of_another_evaluation_are_kept(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_suite()
    evaluations = SuiteFolder(folder / "ablations/small").evaluations
    found = {}
    for number in (452, 600, 700):
        suite = load_suite(name, evaluation={"num": number})
        source = {"evaluation": suite.evaluation.model_dump(mode="json"), "reference": "images"}
        kept = KeptValues(evaluations, "with-seed0", source)
        assert kept.read() is None
        kept.write({"fid": float(number)})
        found[number] = kept
    assert {kept.read()["fid"] for kept in found.values()} == {452, 600, 700}  # type: ignore[index]
    assert len(list(evaluations.iterdir())) == 3 and (evaluations / "with-seed0.json").exists()
    SuiteFolder(folder / "ablations/small").claim()
    for number, state in (("600", "evaluated"), ("601", "to do")):
        assert main(["ablate", "--suite", name, "--dry-run", "--num", number]) == 0
        assert state in capsys.readouterr().out.splitlines()[0]
    # A file that is cut short is in nobody's way.
    (evaluations / "with-seed0.json").write_text("{")
    found[452].write({"fid": 1.0})
    assert KeptValues(evaluations, "with-seed0", {}).read() is None
    assert found[452].read() == {"fid": 1.0}
    assert len(list(evaluations.iterdir())) == 3


def test_the_rows_of_a_suite_become_configurations(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As files that train.py takes; a file that was changed by hand is not written over."""
    command = ["ablate", "--suite", "paper-decoder-conditioning", "--write-configs", "rows"]
    for _ in range(2):
        assert main(command) == 0
    assert capsys.readouterr().out.split()[:2] == [
        str(Path("rows", name)) for name in ("adaln-seed0.yaml", "unet-style-seed0.yaml")
    ]
    for planned in plan(load_suite("paper-decoder-conditioning")):
        assert load_config(str(folder / "rows" / f"{planned.name}.yaml")) == planned.config
    file = folder / "rows" / "unet-style-seed0.yaml"
    file.write_text(file.read_text().replace("concat", "adaln"))
    changed = file.read_text()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "unet-style-seed0.yaml is there" in error
    assert file.read_text() == changed
    assert main([*command[:-1], str(file)]) == 2
    assert "--write-configs" in capsys.readouterr().err


# --- running --------------------------------------------------------------------------------


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_suite_stops_and_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole life of a suite: a signal in a training, a loss of everything since, the end."""
    command = ["ablate", "--suite", write_suite(), "--device=cpu"]
    assert main([*command, "--out=unbroken"]) == 0
    unbroken = results(Path("unbroken"))
    assert [(row["row"], row["seed"]) for row in unbroken] == [
        ("real images", "0"),
        ("with", "0"),
        ("without it", "0"),
        ("with", "1"),
        ("without it", "1"),
    ]
    capsys.readouterr()

    made = []
    step = Monitor.step

    def step_and_stop(self: Monitor) -> None:
        step(self)
        made.append(1)
        if len(made) == 4 + 3:  # in the second run
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, "step", step_and_stop)
        assert main(command) == 128 + signal.SIGTERM
    output = folder / "ablations/small"
    assert "[2/4] without it, seed 0: saved at step 3" in capsys.readouterr().out
    assert [row["row"] for row in results(output)] == ["real images", "with"]
    assert "1 of 4 runs" in (output / "results.md").read_text()

    # As after a SIGKILL: the last checkpoint is lost and an evaluation is half written.
    shutil.rmtree(output / "runs/without-it-seed0/checkpoints/step-00000003")
    (output / "evaluations/with-seed0.json").write_text("{")
    assert main(command) == 0
    assert results(output) == unbroken
    for name in ("with-seed0", "without-it-seed0", "with-seed1", "without-it-seed1"):
        assert_identical(
            weights(output / "runs" / name, 4), weights(Path("unbroken/runs") / name, 4)
        )

    # Typed once more nothing is left to do.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert main(command) == 0
    changed = {p.name for p in before if p.stat().st_mtime_ns != before[p]}
    assert changed == {"results.csv", "results.md", "results.png", "results.svg"}
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")

    # Another budget is another suite.
    capsys.readouterr()
    assert main([*command, "--set", "training.steps=5"]) == 2
    assert "holds a run of another configuration (training.steps was 4, is 5)" in (
        capsys.readouterr().err
    )

    check_values(output)


def test_runs_begin_with_the_weights_that_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_suite(seeds=[0], rows=[{"name": "with"}])
    command = ["ablate", "--suite", name, "--device=cpu"]
    config = plan(load_suite(name))[0].config
    save_weights(folder / "begin.safetensors", DeCo(config.model), config.card())
    tiny_rate = ["--set", "training.learning_rate=1e-30", "--set", "training.steps=1"]
    begin = ["--set", "training.init_from=begin.safetensors"]
    assert main([*command, *tiny_rate, *begin]) == 0
    assert "beginning with begin.safetensors" in capsys.readouterr().out
    trained = load_checkpoint(folder / "ablations/small/runs/with-seed0")
    expected = load_checkpoint(folder / "begin.safetensors")
    # A step of 1e-30 moves what is zero at initialisation.
    torch.testing.assert_close(
        dict(trained.state_dict()), dict(expected.state_dict()), rtol=0, atol=1e-20
    )


def test_the_table_keeps_what_has_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever rows and seeds are asked for, and while a repeated command is under way."""
    changes = {"overrides": small_suite()["overrides"] | {"training.steps": 1}, "seeds": [0]}
    command = ["ablate", "--suite", write_suite(**changes), "--device=cpu"]
    output = folder / "ablations/small"
    assert main([*command, "--rows", "with", "--seeds", "3"]) == 0
    assert main(command) == 0
    whole = results(output)
    assert [(row["row"], row["seed"]) for row in whole] == [
        ("real images", "0"),
        ("with", "0"),
        ("without it", "0"),
        ("with", "3"),
    ]
    assert "3 of 3 runs; mean ± standard deviation over the seeds (0, 3)" in (
        (output / "results.md").read_text()
    )
    tables = []
    monkeypatch.setattr(
        "deco_fast.experiments.runner.write_tables",
        lambda suite, found, planned, folder: tables.append((len(found), planned)),
    )
    assert main([*command, "--rows", "without it"]) == 0 and main(command) == 0
    assert tables == [(4, 3)] * 3
    assert results(output) == whole

    # What the command refuses is not listed as evaluated.
    capsys.readouterr()
    assert main([*command, "--set", "training.steps=2", "--dry-run"]) == 2
    assert "holds a run of another configuration (training.steps was 1" in capsys.readouterr().err
    # One more row, which cannot stand beside those of another length.
    longer = ["--rows", "with", "--seeds", "4", "--set", "training.steps=2"]
    assert main([*command, *longer]) == 0
    assert "not in the table: ablations/small/runs/with-seed0 holds" in capsys.readouterr().out
    assert tables[3:] == [(2, 1)]

    (output / "reference.npz").write_bytes(b"cut short")
    assert main(command) == 2
    assert "reference.npz, where the suite keeps its reference, is damaged: delete it" in (
        capsys.readouterr().err
    )
    (output / "reference.npz").unlink()
    assert main(command) == 0


def run_in_processes(file: Path) -> None:
    assert (
        main(["ablate", "--suite", str(file), "--device=cpu", f"--out={file.parent / 'two'}"]) == 0
    )


@pytest.mark.slow
def test_two_processes_share_a_suite(folder: Path) -> None:
    name = write_suite(seeds=[0], rows=[{"name": "with"}])
    in_processes(2, run_in_processes, folder / name)
    command = ["ablate", "--suite", name, "--device=cpu", "--out=one"]
    assert main([*command, "--set", "training.gradient_accumulation=2"]) == 0
    one, two = results(Path("one")), results(Path("two"))
    assert [row["row"] for row in two] == ["real images", "with"]
    for left, right in zip(one, two, strict=True):
        for metric in ("fid", "spectral_error"):
            assert float(left[metric]) == pytest.approx(float(right[metric]), rel=1e-4)


def check_values(output: Path) -> None:
    """The figures of one run, computed again from its images."""
    found = json.loads((output / "evaluations/with-seed1.json").read_text())["values"]
    assert list(found) == ["fid", "spectral_error", "dit_high_share"]
    engine = SamplingEngine(load_checkpoint(output / "runs/with-seed1"), batch_size=113)
    drawn = torch.cat([images for _, images in draw(engine, [k % 10 for k in range(452)])])
    drawn, real = drawn.permute(0, 3, 1, 2), to_uint8(DigitsDataset().images).permute(0, 3, 1, 2)
    distances = []
    extractor = RandomConvExtractor(torch.device("cpu"))
    for images in (drawn, real):
        rows = extractor(images).pooled
        moments = Moments(rows.shape[1])
        moments.add(rows)
        distances.append(moments)
    assert found["fid"] == pytest.approx(frechet_distance(*distances), rel=1e-6)
    energies = [block_energy(images.float() / 127.5 - 1) for images in (drawn, real)]
    assert found["spectral_error"] == pytest.approx(spectral_error(*energies), rel=1e-9)
    assert 0 < found["dit_high_share"] < 1


def test_a_reference_is_computed_anew_when_its_files_change(tmp_path: Path) -> None:
    images, kept = tmp_path / "images", tmp_path / "suite"
    images.mkdir()
    kept.mkdir()
    evaluation = Evaluation(features="random-conv", reference=str(images))
    extractor = open_extractor("random-conv")
    processes = Processes(0, 1, torch.device("cpu"))
    config = load_config("deco-digits")

    def open_reference(count: int, brightness: int) -> Reference:
        for number in range(count):
            pixels = torch.randint(brightness, (16, 16, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(images / f"{number}.png")
        return suite_reference(evaluation, config, extractor, kept, processes)

    first = open_reference(20, 255)
    again = suite_reference(evaluation, config, extractor, kept, processes)
    assert again.identity == first.identity
    assert torch.equal(again.statistics.pooled.mean, first.statistics.pooled.mean)
    others = open_reference(20, 60)
    assert others.identity != first.identity and others.statistics.count == 20
    assert not torch.equal(others.statistics.pooled.mean, first.statistics.pooled.mean)
    assert open_reference(30, 60).statistics.count == 30


def test_a_reference_is_of_the_very_images_that_are_trained_on(tmp_path: Path) -> None:
    """A folder of the same names is another reference, and so are other crops of one folder."""
    for root, brightness in (("one", 255), ("other", 60)):
        for number in range(6):
            pixels = torch.randint(brightness, (16, 16, 3), dtype=torch.uint8)
            (tmp_path / root / "abc"[number % 3]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(
                tmp_path / root / "abc"[number % 3] / f"{number}.png"
            )
    evaluation = Evaluation(features="random-conv", metrics=("fid",), reference="dataset")
    extractor = open_extractor("random-conv")

    def found(*changes: str) -> Reference:
        words = ["--data.dataset=folder", "--model.num_classes=3", *changes]
        config = load_config("deco-digits", words)
        return suite_reference(
            evaluation, config, extractor, tmp_path, Processes(0, 1, torch.device("cpu"))
        )

    one, other = (f"--data.root={tmp_path / root}" for root in ("one", "other"))
    first = found(one)
    assert found(one).identity == first.identity
    # A program that dies between statistics and note leaves no note of others.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SetStatistics, "save", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            found(other)
    assert not (tmp_path / "reference.json").exists()
    second = found(other)
    assert float(second.statistics.pooled.mean.sum()) != float(first.statistics.pooled.mean.sum())
    assert found(other, "--data.random_flip=true").statistics.count == 12
    small = ("--data.height=16", "--data.width=16")
    assert found(other, *small).statistics.size == (16, 16)
    digits = [load_config("deco-digits", changes) for changes in ([], small)]
    assert len({dataset_identity(open_dataset(config), config) for config in digits}) == 2


def test_the_table_gives_means_and_spreads(folder: Path) -> None:
    suite = load_suite(write_suite())
    found = [
        RunResult("real images", 0, None, {"fid": 1.0}),
        RunResult("with", 0, 1234567, {"fid": 10.0}),
        RunResult("with", 1, 1234567, {"fid": 14.0}),
        RunResult("without it", 0, 1234567, {"fid": 20.0}),
    ]
    text = markdown(suite, found, 4, ["fid"]).splitlines()
    assert "| Fréchet distance, random-conv ↓ | FID ↓, the paper's |" in text[4]
    assert text[6] == "| real images |  | 1 | 1 |  |"
    assert text[7] == "| with | 1,234,567 | 2 | 12 ± 2.8 | 31.35 |"
    assert text[8] == "| without it | 1,234,567 | 1 | 20 |  |"
    found.append(RunResult("a | b", 0, 1, {"fid": 2.0}))
    assert r"| a \| b | 1 | 1 | 2 |  |" in markdown(suite, found, 4, ["fid"])
    assert "3 of 4 runs; mean ± standard deviation over the seeds (0, 1)" in text[10]
