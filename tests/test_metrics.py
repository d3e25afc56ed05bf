"""FID and its companions against closed forms and float64 oracles, and the command."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import in_processes
from safetensors.torch import save_file
from scipy.spatial.distance import cdist
from torch import Tensor

from deco_fast.cli.evaluate import main
from deco_fast.errors import UserError
from deco_fast.evaluation import inception_score
from deco_fast.evaluation.extractors import Features, open_extractor
from deco_fast.evaluation.frechet import Moments, frechet_distance
from deco_fast.evaluation.image_sets import open_images
from deco_fast.evaluation.inception_score import InceptionScore
from deco_fast.evaluation.metrics import Collector, compare
from deco_fast.evaluation.precision_recall import precision_recall
from deco_fast.evaluation.random_conv import RandomConvExtractor
from deco_fast.evaluation.report import EVALUATIONS, report_folder, write_report
from deco_fast.evaluation.statistics import load_statistics
from deco_fast.training.distributed import Processes, join_processes

ALONE = Processes(0, 1, torch.device("cpu"))
CPU = torch.device("cpu")


def moments(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments.of(mean, covariance, 1000)


def moments_of(*batches: Tensor) -> Moments:
    found = Moments(batches[0].shape[1])
    for batch in batches:
        found.add(batch)
    return found


# --- the Fréchet distance -------------------------------------------------------------------


def adm_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The textbook formula over all rows at once, in float64."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    mean1, mean2 = first.mean(axis=0), second.mean(axis=0)
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root))


def test_distance_of_diagonal_gaussians() -> None:
    """Σ (√a − √b)² + ‖μ₁ − μ₂‖²."""
    a, b = torch.tensor([4.0, 9.0, 0.25]).double(), torch.tensor([1.0, 16.0, 0.0]).double()
    shift = torch.tensor([3.0, 0.0, -4.0]).double()
    distance = frechet_distance(moments(torch.zeros(3), a.diag()), moments(shift, b.diag()))
    assert distance == pytest.approx(1 + 1 + 0.25 + 25, rel=1e-12)


def test_distance_of_rotated_and_scaled_gaussians() -> None:
    """With Σ₂ = s²Σ₁ it is (s − 1)² tr Σ₁, whatever Σ₁."""
    rows = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    covariance = rows.T.cov()
    one, other = (moments(torch.zeros(6), s**2 * covariance) for s in (1, 3))
    assert frechet_distance(one, other) == pytest.approx(4 * float(covariance.trace()), rel=1e-12)
    assert frechet_distance(one, one) <= 1e-12 * float(covariance.trace())


def test_distance_of_singular_covariances() -> None:
    """Two lines: tr(Σ₁Σ₂)^½ is the product of the deviations and the cosine between them."""
    u, v = torch.tensor([2.0, 0.0, 0.0]).double(), torch.tensor([3.0, 4.0, 0.0]).double()
    one, other = (moments(torch.zeros(3), torch.outer(w, w)) for w in (u, v))
    assert frechet_distance(one, other) == pytest.approx(4 + 25 - 2 * 6, rel=1e-9)


def test_distance_equals_the_oracle() -> None:
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((50, 50))
    first = (generator.standard_normal((300, 50)) @ mix + 5).astype(np.float32)
    second = (generator.standard_normal((170, 50)) + 4.5).astype(np.float32)
    ours = frechet_distance(
        moments_of(*torch.from_numpy(first).split(64)),
        moments_of(*torch.from_numpy(second).split(33)),
    )
    assert ours == pytest.approx(adm_distance(first, second), rel=1e-9)


def test_distance_refuses_other_features() -> None:
    with pytest.raises(ValueError, match="features of 2 and of 3 values"):
        frechet_distance(
            moments(torch.zeros(2), torch.eye(2)), moments(torch.zeros(3), torch.eye(3))
        )


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.sampled_from([0.0, 1e4]))
def test_moments_do_not_depend_on_the_batches(sizes: list[int], offset: float) -> None:
    generator = np.random.default_rng(sum(sizes))
    rows = generator.standard_normal((sum(sizes), 5)) + offset
    found = moments_of(*torch.from_numpy(rows).split(sizes))
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-9)


def test_covariance_of_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 vector\(s\) is not defined"):
        _ = moments_of(torch.zeros(1, 3)).covariance


# --- Inception score, precision and recall --------------------------------------------------


def score_oracle(logits: np.ndarray, split: int) -> float:
    scores = []
    for start in range(0, len(logits), split):
        part = logits[start : start + split].astype(np.float64)
        p = np.exp(part - part.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        divergence = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def test_score_equals_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception_score, "SPLIT", 30)
    logits = 3 * torch.randn(100, 7)  # the last of four splits is not full
    score = InceptionScore(100, 7)
    for first in range(0, 100, 16):
        score.add(logits[first : first + 16], first)
    assert score.value(ALONE) == pytest.approx(score_oracle(logits.numpy(), 30), rel=1e-12)


def test_score_of_certain_and_of_uncertain_classifiers() -> None:
    """The number of classes where each image has one of its own, 1 where all look alike."""
    certain, uncertain = InceptionScore(8, 4), InceptionScore(8, 4)
    certain.add(1e4 * torch.eye(4).repeat(2, 1), 0)
    uncertain.add(torch.zeros(8, 4), 0)
    assert certain.value(ALONE) == pytest.approx(4)
    assert uncertain.value(ALONE) == pytest.approx(1)


def manifold_oracle(balls: np.ndarray, points: np.ndarray) -> float:
    """The fraction of points within the third neighbour's distance of any ball's centre."""
    balls, points = balls.astype(np.float64), points.astype(np.float64)
    radii = np.sort(cdist(balls, balls), axis=1)[:, 3]
    return float((cdist(points, balls) <= radii).any(axis=1).mean())


@pytest.mark.parametrize(("count", "others"), [(4, 9), (37, 23), (150, 90)])
def test_precision_and_recall_equal_the_oracle(
    count: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["deco_fast.evaluation.precision_recall"]
    monkeypatch.setattr(module, "_ROWS", 16)
    monkeypatch.setattr(module, "_COLUMNS", 31)
    reference, images = torch.randn(count, 3) + 20, 1.5 * torch.randn(others, 3) + 20
    found = precision_recall(reference, images, ALONE)
    assert found.precision == manifold_oracle(reference.numpy(), images.numpy())
    assert found.recall == manifold_oracle(images.numpy(), reference.numpy())


def test_precision_and_recall_of_equal_and_of_far_sets() -> None:
    rows = torch.randn(20, 4)
    assert precision_recall(rows, rows, ALONE) == (1, 1)
    assert precision_recall(rows, rows + 1000, ALONE) == (0, 0)
    with pytest.raises(ValueError, match="3 vectors have no 3 neighbours"):
        precision_recall(rows[:3], rows, ALONE)


# --- several processes ----------------------------------------------------------------------


def made_features(count: int) -> Features:
    generator = torch.Generator().manual_seed(count)
    shapes = ((count, 6), (count, 4), (count, 5))
    return Features(*(torch.randn(*shape, generator=generator) for shape in shapes))


def all_metrics(processes: Processes, count: int, others: int) -> dict[str, float]:
    collected = []
    for size in (count, others):
        numbers = processes.share(size)
        collector = Collector(size, numbers, processes)
        whole = made_features(size)
        for first in range(numbers.start, numbers.stop, 7):
            rows = slice(first, min(first + 7, numbers.stop))
            collector.add(Features(*(part[rows] for part in whole if part is not None)))
        collected.append(collector.finish())
    return compare(*collected, processes)


def save_metrics(file: Path) -> None:
    inception_score.SPLIT = 10
    with join_processes("cpu") as processes:
        values = all_metrics(processes, 53, 40)
        file.with_suffix(f".{processes.rank}").write_text(json.dumps(values))


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_processes(2, save_metrics, tmp_path / "values")
    monkeypatch.setattr(inception_score, "SPLIT", 10)
    alone = all_metrics(ALONE, 53, 40)
    assert list(alone) == ["fid", "sfid", "inception_score", "precision", "recall"]
    for rank in range(2):
        assert json.loads((tmp_path / f"values.{rank}").read_text()) == pytest.approx(alone)


# --- extractors -----------------------------------------------------------------------------

needs_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None,
    reason="torch-fidelity is not installed (make installs it without its dependencies)",
)


def images_of(count: int, size: int = 16, seed: int = 0) -> np.ndarray:
    shape = (count, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the right shapes, made as the library initialises its network."""
    from deco_fast.evaluation import inception

    module = inception._import()
    made: list[object] = []
    file = tmp_path_factory.mktemp("inception") / "random.pth"

    class Stop(Exception):
        pass

    class Network(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined, misc]
        def load_state_dict(self, *arguments: object, **options: object) -> None:
            made.append(self.state_dict())
            raise Stop

    torch.save({}, file)
    with pytest.raises(Stop):
        Network("inception", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(made[0], file)
    return file


@needs_fidelity
def test_inception_features(inception_file: Path) -> None:
    extractor = open_extractor("inception", str(inception_file))
    images = torch.from_numpy(images_of(2, 20)).permute(0, 3, 1, 2)
    found = extractor(images)
    network = extractor._network  # type: ignore[attr-defined]
    hidden: list[Tensor] = []
    network.Mixed_6c.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    pooled, logits = network(images)
    assert torch.equal(found.pooled, pooled) and pooled.shape == (2, 2048)
    assert found.logits is not None and torch.equal(found.logits, logits)
    assert logits.shape == (2, 1008)
    assert torch.allclose(logits, pooled @ network.fc.weight.T, atol=1e-5)  # without bias
    # Channels last: the first seven of the 1×1 branch of the seventh block of 17×17 and 35×35.
    branch = network.Mixed_6d.branch1x1(hidden[0])
    assert found.spatial is not None and found.spatial.shape == (2, 17 * 17 * 7)
    assert torch.equal(found.spatial.view(2, 17, 17, 7)[:, 5, 11], branch[:, :7, 5, 11])
    assert extractor.fingerprint == open_extractor("inception", str(inception_file)).fingerprint


@needs_fidelity
def test_inception_weights_that_cannot_be_used(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({"code": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:9000])
    for name, message in {
        "none.pth": "none.pth does not exist",
        "other.pth": "other.pth are not of the Inception network: give https://",
        "code.pth": "code.pth is damaged, or holds more than tensors",
        "cut.pth": "cut.pth is damaged",
    }.items():
        with pytest.raises(UserError, match=message):
            open_extractor("inception", str(tmp_path / name))

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\): get https://"):
        open_extractor("inception")


def test_inception_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'deco-fast\[metrics\]'"):
        open_extractor("inception")


@pytest.fixture
def dinov2(tmp_path: Path) -> tuple[Any, Path]:
    """A small one of random weights, and their file."""
    # Imported here: every process of the test above would wait for it.
    from transformers import Dinov2Config

    from deco_fast.alignment.dinov2 import random_dinov2

    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=224, patch_size=14
    )
    backbone = random_dinov2(config=config).eval()
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    return backbone, tmp_path / "model.safetensors"


def test_dinov2_features(dinov2: tuple[Any, Path], tmp_path: Path) -> None:
    backbone, file = dinov2
    extractor = open_extractor("dinov2", str(file))
    images = torch.from_numpy(images_of(2, 224)).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = backbone(pixel_values=(images / 255 - mean) / std).pooler_output
    found = extractor(images).pooled
    assert found.shape == (2, 64)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert extractor(images[..., :50, :40]).pooled.shape == (2, 64)
    with pytest.raises(UserError, match=r"--features dinov2 needs DINOv2: .*none.* by --weights"):
        open_extractor("dinov2", str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    "name", ["random-conv", pytest.param("inception", marks=needs_fidelity), "dinov2"]
)
def test_no_gpu_would_round_what_it_convolves(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = None
    if name == "inception":
        weights = str(request.getfixturevalue("inception_file"))
    elif name == "dinov2":
        weights = str(request.getfixturevalue("dinov2")[1])
    extractor = open_extractor(name, weights)
    convolve, seen = F.conv2d, []

    def watched(*arguments: Any, **options: Any) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return convolve(*arguments, **options)

    monkeypatch.setattr(F, "conv2d", watched)
    before = torch.backends.cudnn.allow_tf32
    extractor(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before


def test_random_features_are_always_the_same() -> None:
    extractor = RandomConvExtractor(CPU)
    images = torch.arange(2 * 3 * 16 * 16).remainder(251).view(2, 3, 16, 16).byte()
    found = extractor(images).pooled
    assert found.shape == (2, 448)
    assert extractor.fingerprint[:16] == "6bea4dd98843a390"
    assert float(found.double().sum()) == pytest.approx(175.16999947, rel=1e-5)


def test_unknown_features() -> None:
    with pytest.raises(UserError, match="unknown features 'incepton'; did you mean 'inception'"):
        open_extractor("incepton")


# --- image sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_batches(tmp_path: Path, save: object) -> None:
    images = images_of(10, 6)
    save(tmp_path / "images.npz", labels=np.arange(10), arr_0=images)  # type: ignore[operator]
    opened = open_images(tmp_path / "images.npz")
    assert (len(opened), opened.height, opened.width) == (10, 6, 6)
    batches = list(opened.batches(range(2, 9), 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1), images[2:9])


def write_images(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}-class{number}.png")


def test_folder_is_read_in_order(tmp_path: Path) -> None:
    images = images_of(7, 8)
    write_images(tmp_path / "b", images[:5])
    write_images(tmp_path / "c", images[5:])
    (tmp_path / "b/settings.json").write_text("{}")
    Image.new("RGB", (50, 50)).save(tmp_path / "b/grid.png")
    opened = open_images(tmp_path)
    assert len(opened) == 7
    found = torch.cat(list(opened.batches(range(1, 7), 4)))
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1), images[1:])


def test_folder_of_mixed_sizes_is_cut(tmp_path: Path) -> None:
    write_images(tmp_path, images_of(2, 8))
    Image.new("RGB", (12, 30)).save(tmp_path / "tall.png")
    with pytest.raises(UserError, match=r"000000-class0.png is 8×8 and tall.png is 30×12"):
        open_images(tmp_path)
    opened = open_images(tmp_path, crop=8)
    assert torch.cat(list(opened.batches(range(3), 2))).shape == (3, 3, 8, 8)


# --- the command ----------------------------------------------------------------------------


def evaluate(*arguments: object) -> int:
    return main(["metrics", "--features", "random-conv", *map(str, arguments)])


def report() -> dict[str, float]:
    return json.loads(Path("out/report.json").read_text())["report"]


def test_command_compares_and_reuses_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reference, images = images_of(600), np.clip(images_of(520, seed=1), 40, 215)
    np.savez("reference.npz", reference)
    np.savez("images.npz", images)
    common = ("--images", "images.npz", "--out", "out")
    assert evaluate(*common, "--reference", "reference.npz", "--save-statistics", "kept.npz") == 0
    first = report()
    assert "Fréchet distance" in capsys.readouterr().out
    assert list(first) == ["fid", "precision", "recall"]

    extractor = RandomConvExtractor(CPU)
    one, other = (
        extractor(torch.from_numpy(part).permute(0, 3, 1, 2)).pooled.numpy()
        for part in (images, reference)
    )
    assert first["fid"] == pytest.approx(adm_distance(one, other), rel=1e-6)
    assert first["precision"] == manifold_oracle(other, one)
    assert first["recall"] == manifold_oracle(one, other)

    assert evaluate("--images", "images.npz", "--reference", "kept.npz", "--out", "again") == 0
    Path("again").rename("out2")
    again = json.loads(Path("out2/report.json").read_text())["report"]
    assert again == pytest.approx(first, rel=1e-9)
    # What holds no statistics is not replaced, and nothing by itself.
    with np.load("kept.npz") as kept:
        np.savez("batch.npz", arr_0=images, **kept)
    np.savez("fid.npz", mu=np.zeros(448), sigma=np.eye(448))
    names = ("reference.npz", "kept.npz", "batch.npz", "fid.npz")
    before = {name: Path(name).read_bytes() for name in names}
    capsys.readouterr()
    for reference_file, kept_file, message in (
        ("reference.npz", "reference.npz", "is the reference itself"),
        ("kept.npz", "kept.npz", "is the reference itself"),
        ("kept.npz", "images.npz", "exists and holds no statistics"),
        ("kept.npz", "batch.npz", "exists and is not by --save-statistics"),
        ("kept.npz", "fid.npz", "exists and is not by --save-statistics"),
    ):
        assert evaluate("--reference", reference_file, "--save-statistics", kept_file) == 2
        assert f"--save-statistics {kept_file} {message}: choose" in capsys.readouterr().err
    assert evaluate(*common, "--reference", "kept.npz", "--save-statistics", "images.npz") == 2
    assert "--save-statistics images.npz is what --images names" in capsys.readouterr().err
    assert all(Path(name).read_bytes() == content for name, content in before.items())
    assert evaluate("--reference", "reference.npz", "--save-statistics", "kept.npz") == 0
    # Without images: only the statistics are made.
    assert evaluate("--reference", "reference.npz", "--save-statistics", "other.npz") == 0
    with np.load("kept.npz") as kept, np.load("other.npz") as other_file:
        assert set(kept.files) == {"deco_fast", "mu", "sigma", "pool_features"}
        np.testing.assert_array_equal(kept["sigma"], other_file["sigma"])


@needs_fidelity
def test_batches_of_the_adm_suite_are_references(tmp_path: Path, inception_file: Path) -> None:
    """Their own statistics count for the distances, their images for precision and recall."""
    generator = np.random.default_rng(0)
    statistics = {}
    for names, size in ((("mu", "sigma"), 2048), (("mu_s", "sigma_s"), 2023)):
        factor = generator.standard_normal((size, 3))
        statistics[names[0]] = generator.standard_normal(size)
        statistics[names[1]] = factor @ factor.T
    file = tmp_path / "adm.npz"
    np.savez(file, arr_0=images_of(4), **statistics)
    loaded = load_statistics(file, open_extractor("inception", str(inception_file)))
    np.testing.assert_allclose(loaded.pooled.mean, statistics["mu"])
    np.testing.assert_allclose(loaded.pooled.covariance, statistics["sigma"])
    assert loaded.spatial is not None and loaded.spatial.size == 2023
    assert loaded.rows is None and loaded.count is None


def test_what_cannot_be_compared_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", images_of(460))
    np.savez("few.npz", images_of(448))
    np.savez("large.npz", images_of(460, 32))
    assert evaluate("--images", "good.npz", "--reference", "good.npz", "--out", "taken") == 0
    seen: list[int] = []
    extract = RandomConvExtractor.__call__

    def counted(self: RandomConvExtractor, images: Tensor) -> Features:
        seen.append(len(images))
        return extract(self, images)

    monkeypatch.setattr(RandomConvExtractor, "__call__", counted)
    for message, images, reference, *out in (
        ("taken holds the report of other images", "few.npz", "good.npz", "--out", "taken"),
        ("the images holds 448", "few.npz", "good.npz"),
        ("the reference holds 448", "good.npz", "few.npz"),
        ("the images are 32×32 and the reference 16×16", "large.npz", "good.npz"),
    ):
        assert evaluate("--images", images, "--reference", reference, *out) == 2
        assert message in capsys.readouterr().err
    assert sum(seen) <= 3 * 2 * 4


def test_a_batch_has_the_size_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is asked for; and images that cannot be read are no statistics alone."""
    monkeypatch.chdir(tmp_path)
    np.savez("large.npz", images_of(460, 32))
    assert evaluate("--reference", "large.npz", "--save-statistics", "kept.npz") == 0
    with np.load("kept.npz") as file:
        note = json.loads(str(file["deco_fast"])) | {"size": None}
        kept = {"deco_fast": np.array(json.dumps(note)), "mu": file["mu"], "sigma": file["sigma"]}
    np.savez("batch.npz", arr_0=images_of(10), **kept)
    np.savez("grey.npz", arr_0=images_of(10)[..., 0], **kept)
    for reference, message in (
        ("batch.npz", "the images are 32×32 and the reference 16×16"),
        ("grey.npz", "grey.npz has uint8 (10, 16, 16) under 'arr_0'"),
    ):
        for metrics in ((), ("--metrics", "fid")):
            assert evaluate("--images", "large.npz", "--reference", reference, *metrics) == 2
            assert message in capsys.readouterr().err


def damaged_files() -> dict[str, str]:
    """Expected words of the error, and the file that calls for it."""
    note = {"features": "random-conv", "fingerprint": RandomConvExtractor(CPU).fingerprint}
    factor = np.random.default_rng(0).standard_normal((448, 448))
    sigma = factor @ factor.T
    moments = {"mu": np.zeros(448), "sigma": sigma}
    np.savez_compressed("broken.npz", deco_fast=np.array(json.dumps(note)), **moments)
    broken = bytearray(Path("broken.npz").read_bytes())
    middle = len(broken) // 2
    broken[middle : middle + 2000] = bytes([255] * 2000)
    Path("broken.npz").write_bytes(broken)
    directory = bytearray(Path("good.npz").read_bytes())
    start = directory.rfind(b"PK\x01\x02")
    directory[start : start + 4] = b"XXXX"
    Path("directory.npz").write_bytes(directory)
    np.savez("list.npz", deco_fast=np.array("[1]"), **moments)
    sized = np.array(json.dumps(note | {"size": 5}))
    np.savez("sized.npz", deco_fast=sized, **moments)
    with zipfile.ZipFile("bare.npz", "w") as archive:
        archive.writestr("arr_0", b"x")
    Path("nothing.npz").touch()
    return {
        "directory.npz cannot be read as an npz file": "directory.npz",
        "nothing.npz cannot be read as an npz file": "nothing.npz",
        "broken.npz holds no readable statistics": "broken.npz",
        "list.npz holds no readable statistics": "list.npz",
        "sized.npz holds no readable statistics": "sized.npz",
        "bare.npz holds no images under 'arr_0' (it has: arr_0, which is no .npy)": "bare.npz",
    }


def test_damaged_files_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("good.npz", images_of(460))
    for expected, file in damaged_files().items():
        assert evaluate("--images", "good.npz", "--reference", file) == 2, expected
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and expected in error
    before = Path("directory.npz").read_bytes()
    assert evaluate("--reference", "good.npz", "--save-statistics", "directory.npz") == 2
    assert "exists and holds no statistics" in capsys.readouterr().err
    assert Path("directory.npz").read_bytes() == before
    np.savez("one.npz", images_of(1))
    assert evaluate("--reference", "one.npz", "--save-statistics", "kept.npz") == 2
    assert "statistics of one image have no covariance" in capsys.readouterr().err
    assert evaluate("--images", "good.npz", "--reference", "one.npz") == 2
    assert "the reference holds 1" in capsys.readouterr().err
    assert not Path("kept.npz").exists()


BAD_STATISTICS = {
    "pool_features is (20,), of 4 features": {"pool_features": np.zeros(20)},
    "pool_features is (20, 3), of 4 features": {"pool_features": np.zeros((20, 3))},
    "pool_features is not finite": {"pool_features": np.full((20, 4), np.nan)},
    "mu is complex128": {"mu": np.zeros(4, complex)},
    "sigma is complex128": {"sigma": np.eye(4, dtype=complex)},
    "sigma is not finite": {"sigma": np.full((4, 4), np.inf)},
    "sigma is not symmetric": {"sigma": np.eye(4) + np.eye(4, k=1)},
    "sigma has negative eigenvalues, as no covariance": {"sigma": -np.eye(4)},
}


@pytest.mark.parametrize("reason", BAD_STATISTICS)
def test_arrays_that_are_no_statistics(tmp_path: Path, reason: str) -> None:
    extractor = RandomConvExtractor(CPU)
    note = {"features": extractor.name, "fingerprint": extractor.fingerprint}
    arrays = {"deco_fast": np.array(json.dumps(note)), "mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(tmp_path / "bad.npz", **arrays | BAD_STATISTICS[reason])
    with pytest.raises(UserError) as caught:
        load_statistics(tmp_path / "bad.npz", extractor)
    assert f"bad.npz holds no readable statistics ({reason}): make them" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounded_statistics_are_read(tmp_path: Path, dtype: type) -> None:
    """Of fewer images than features, so that rounding makes some eigenvalues negative."""
    extractor = RandomConvExtractor(CPU)
    note = {"features": extractor.name, "fingerprint": extractor.fingerprint}
    factor = np.random.default_rng(0).standard_normal((300, 20))
    sigma = (factor @ factor.T).astype(dtype)
    sigma[0, 1] *= 1 + np.finfo(dtype).eps
    np.savez(
        tmp_path / "kept.npz", deco_fast=np.array(json.dumps(note)), mu=np.zeros(300), sigma=sigma
    )
    found = load_statistics(tmp_path / "kept.npz", extractor).pooled.covariance
    np.testing.assert_allclose(found, factor @ factor.T, atol=0.02)


# --- the folder of the report ---------------------------------------------------------------


def test_two_evaluations_at_once_keep_both_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with report_folder(None, "x", {"seed": 0}) as first:
        with report_folder(None, "x", {"seed": 1}) as second:
            write_report(second, {"seed": 1}, {})
        with pytest.raises(UserError, match="x is in use by another program"):
            report_folder(first, "x", {"seed": 0}).__enter__()
        write_report(first, {"seed": 0}, {})
    assert [first, second] == [EVALUATIONS / "x", EVALUATIONS / "x-2"]
    for folder, seed in ((first, 0), (second, 1)):
        with report_folder(None, "x", {"seed": seed}) as again:
            assert again == folder
        assert json.loads((folder / "report.json").read_text())["source"] == {"seed": seed}


def test_a_report_folder_of_others_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), report_folder(None, "x", {}):
        raise ZeroDivisionError
    assert not EVALUATIONS.exists()
    for name, file, content in (("x", "a.csv", b"mine"), ("x-2", "report.json", b"\xff")):
        (EVALUATIONS / name).mkdir(parents=True)
        (EVALUATIONS / name / file).write_bytes(content)
    with report_folder(None, "x", {}, ["a.csv"]) as folder:
        assert folder == EVALUATIONS / "x-3"


def test_where_no_report_can_be_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{240 * 'n'}.npz"
    np.savez(name, images_of(460))
    for _ in range(2):
        assert evaluate("--images", name, "--reference", name) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: evaluations/metrics-nnn")
        assert "(File name too long): choose another" in error
        assert not list(EVALUATIONS.glob("*"))
        EVALUATIONS.mkdir(exist_ok=True)
    EVALUATIONS.rmdir()
    EVALUATIONS.touch()
    assert evaluate("--images", name, "--reference", name) == 2
    assert "evaluations is a file: choose another folder" in capsys.readouterr().err


def test_a_report_of_images_that_have_changed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", images_of(460))
    np.savez("b.npz", images_of(460))
    command = ("--images", "a.npz", "--reference", "b.npz", "--metrics", "fid", "--out", "out")
    assert evaluate(*command) == 0 and evaluate(*command) == 0
    for changed in ("a.npz", "b.npz"):
        np.savez(changed, images_of(470, seed=1))
        before = Path("out/report.json").read_bytes()
        assert evaluate(*command) == 2
        assert "--out out holds the report of other images" in capsys.readouterr().err
        assert Path("out/report.json").read_bytes() == before
        Path("out/report.json").unlink()
        assert evaluate(*command) == 0


def bad_arguments() -> dict[str, list[str]]:
    """Expected words of the error, and the arguments that call for it."""
    np.savez("good.npz", images_of(460))
    np.savez("few.npz", images_of(448))
    np.savez("three.npz", images_of(3))
    np.savez("key.npz", images=images_of(5))
    np.savez("floats.npz", images_of(5).astype(np.float32))
    np.savez("grey.npz", images_of(5)[..., 0])
    np.savez("empty.npz", images_of(0))
    np.savez("large.npz", images_of(460, 32))
    np.savez("objects.npz", np.array([None], dtype=object))
    np.savez("inception.npz", mu=np.zeros(4), sigma=np.eye(4))
    note = {"features": "random-conv", "fingerprint": RandomConvExtractor(CPU).fingerprint}
    note |= {"count": 1000, "size": None}
    for name, width, value in (("narrow", 4, 1.0), ("nan", 448, np.nan)):
        moments = {"mu": np.full(width, value), "sigma": np.eye(width)}
        np.savez(f"{name}.npz", deco_fast=np.array(json.dumps(note)), **moments)
    Path("text.npz").write_text("no npz")
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:5000])
    write_images(Path("mixed"), images_of(2, 8))
    write_images(Path("mixed/more"), images_of(2, 9))
    Path("nothing").mkdir()
    write_images(Path("damaged"), images_of(2, 8))
    Path("damaged/000001-class1.png").write_bytes(b"no png")
    return {
        "'arr_0' (it has: images)": ["key.npz"],
        "float32 (5, 16, 16, 3) under 'arr_0' instead of uint8": ["floats.npz"],
        "uint8 (5, 16, 16) under 'arr_0'": ["grey.npz"],
        "object (1,) under 'arr_0'": ["objects.npz"],
        "holds no images: its 'arr_0' is (0, 16, 16, 3)": ["empty.npz"],
        "text.npz cannot be read as an npz file": ["text.npz"],
        "cut.npz cannot be read as an npz file": ["cut.npz"],
        "missing.npz does not exist": ["missing.npz"],
        "nothing holds no images": ["nothing"],
        "mixed sizes: 000000-class0.png is 8×8": ["mixed"],
        "000001-class1.png is no readable image": ["damaged"],
        "fid of 448 features needs at least 449 images and the images holds 448": ["few.npz"],
        "precision needs at least 4 images": ["three.npz", "--metrics", "precision"],
        "sfid cannot be computed from these features": ["good.npz", "--metrics", "sfid"],
        "the images are 32×32 and the reference 16×16": ["large.npz"],
        "unknown metric 'fad'; did you mean 'fid'?": ["good.npz", "--metrics", "fad"],
        "statistics are of 4 features and not of 448": ["good.npz", "--reference", "narrow.npz"],
        "nan.npz holds no readable statistics (mu is not finite)": [
            "good.npz",
            "--reference",
            "nan.npz",
        ],
        "holds statistics of inception features": ["good.npz", "--reference", "inception.npz"],
        "unknown features 'dino'; did you mean 'dinov2'": ["good.npz", "--features", "dino"],
        "the weights of random-conv are fixed": ["good.npz", "--weights", "some.pth"],
        "--crop cuts the images of folders, not those of good.npz": ["good.npz", "--crop", "8"],
        "--weights: is empty": ["good.npz", "--weights", ""],
        "--out good.npz: good.npz is a file": ["good.npz", "--out", "good.npz"],
    }


def test_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected, arguments in bad_arguments().items():
        assert evaluate("--reference", "good.npz", "--images", *arguments) == 2, expected
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and expected in error
    assert evaluate("--reference", "good.npz") == 2
    assert "--images is missing" in capsys.readouterr().err
    assert not Path("evaluations").exists()


# --- memory ---------------------------------------------------------------------------------


def evaluate_made_rows(count: int, reference_count: int) -> None:
    """All metrics of made feature rows in the sizes of Inception's."""
    torch.set_num_threads(2)
    collected = []
    for size, scale in ((count, 1.0), (reference_count, 1.1)):
        collector = Collector(size, range(size), ALONE)
        generator = torch.Generator().manual_seed(size)
        for first in range(0, size, 500):
            batch = min(500, size - first)
            widths = (2048, 2023, 1008)
            rows = (scale * torch.randn(batch, n, generator=generator) for n in widths)
            collector.add(Features(*rows))
        collected.append(collector.finish())
    print(json.dumps(compare(*collected, ALONE)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@pytest.mark.soak
def test_fifty_thousand_rows_fit_in_two_gigabytes() -> None:
    program = "from test_metrics import evaluate_made_rows; evaluate_made_rows(50_000, 10_000)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    values, peak = done.stdout.splitlines()
    # A factor of 1.1 gives 2,048 · (1.1 − 1)² = 20; that 10,000 images are few adds the rest.
    assert 20 < json.loads(values)["fid"] < 400
    assert int(peak) < 2e9
