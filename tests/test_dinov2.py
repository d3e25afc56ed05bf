"""The frozen encoder: the original DINOv2's arithmetic, from every kind of weight file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import relative_error
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.special import erf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from transformers import Dinov2Config, Dinov2Model

from deco_fast.alignment import load_encoder
from deco_fast.alignment.dinov2 import DINOv2, random_dinov2
from deco_fast.alignment.weights import load_dinov2
from deco_fast.config import load_config
from deco_fast.errors import UserError
from deco_fast.training.work import count_work

Array = NDArray[np.float64]

WIDTH, DEPTH, HEADS, SIDE, PATCH = 128, 2, 2, 5, 14


def original_weights() -> dict[str, Tensor]:
    """A small DINOv2 with the names of the original's file, every tensor random."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + SIDE**2, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        for name, shape in {
            "norm1": (WIDTH,),
            "norm2": (WIDTH,),
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        shapes |= {f"blocks.{i}.ls{j}.gamma": (WIDTH,) for j in (1, 2)}
    draws = torch.Generator().manual_seed(0)
    scale = {name: 1 / math.sqrt(math.prod(shape[1:])) for name, shape in shapes.items()}
    return {
        name: torch.randn(shape, generator=draws) * scale[name] for name, shape in shapes.items()
    }


def keys_bicubic(size: int, scale: float, count: int) -> Array:
    """The matrix (count, size) of cubic convolution with a = −0.75, edges repeated."""

    def kernel(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    matrix = np.zeros((count, size))
    for row in range(count):
        position = (row + 0.5) / scale - 0.5
        for column in range(math.floor(position) - 1, math.floor(position) + 3):
            matrix[row, min(max(column, 0), size - 1)] += kernel(position - column)
    return matrix


def resize(image: Array, rows: Array, columns: Array) -> Array:
    return np.einsum("ih,...hw,jw->...ij", rows, image, columns)


def dinov2_in_float64(weights: dict[str, Tensor], images: Array, deco_patch: int) -> Array:
    """Specification B.11 and the DINOv2 paper, in numpy."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    batch, _, height, width = images.shape
    rows, columns = height // deco_patch, width // deco_patch
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    pixels = resize(
        pixels,
        keys_bicubic(height, PATCH * rows / height, PATCH * rows),
        keys_bicubic(width, PATCH * columns / width, PATCH * columns),
    )
    patches = pixels.reshape(batch, 3, rows, PATCH, columns, PATCH).transpose(0, 2, 4, 1, 3, 5)
    tokens = (
        patches.reshape(batch, rows * columns, -1)
        @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T
    )
    tokens = tokens + w["patch_embed.proj.bias"]
    table = w["pos_embed"][0, 1:].T.reshape(WIDTH, SIDE, SIDE)
    if (rows, columns) != (SIDE, SIDE):
        # The original asks for a tenth of a patch more than it takes.
        table = resize(
            table,
            keys_bicubic(SIDE, (rows + 0.1) / SIDE, rows),
            keys_bicubic(SIDE, (columns + 0.1) / SIDE, columns),
        )
    tokens = tokens + table.reshape(WIDTH, -1).T
    cls = np.broadcast_to(w["cls_token"] + w["pos_embed"][:, :1], (batch, 1, WIDTH))
    x = np.concatenate([cls, tokens], axis=1)
    for i in range(DEPTH):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(batch, -1, 3, HEADS, WIDTH // HEADS).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(WIDTH // HEADS))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + w[f"blocks.{i}.ls1.gamma"] * linear(mixed, f"blocks.{i}.attn.proj")
        inner = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        inner = inner * (1 + erf(inner / math.sqrt(2))) / 2
        x = x + w[f"blocks.{i}.ls2.gamma"] * linear(inner, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 1:]


@pytest.fixture(scope="module")
def original_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("dinov2") / "dinov2_vitb14_pretrain.pth"
    torch.save(original_weights(), file)
    return file


@pytest.mark.parametrize(
    ("size", "deco_patch"),
    [((128, 128), 16), ((48, 96), 16), ((80, 80), 16), ((32, 48), 8)],
    ids=["square", "wide", "no-interpolation", "patch-8"],
)
def test_features_are_the_originals(
    original_file: Path, size: tuple[int, int], deco_patch: int
) -> None:
    images = torch.rand(2, 3, *size) * 2 - 1
    features = load_encoder(str(original_file), deco_patch, "fp32")(images)
    expected = dinov2_in_float64(original_weights(), images.double().numpy(), deco_patch)
    assert features.shape == (2, size[0] * size[1] // deco_patch**2, WIDTH)
    assert relative_error(features, torch.from_numpy(expected)) < 1e-5


def test_bf16_is_what_autocast_computes(original_file: Path) -> None:
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    exact, rounded = (load_encoder(str(original_file), 16, p) for p in ("fp32", "bf16"))
    assert rounded.backbone.encoder.layer[0].mlp.fc1.weight.dtype == torch.bfloat16
    exact.precision = "bf16"  # autocast over float32 weights
    assert torch.equal(rounded(images), exact(images))
    exact.precision = "fp32"
    assert rounded(images).dtype == torch.float32
    assert 1e-4 < relative_error(rounded(images), exact(images)) < 5e-2


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_of_the_cpu(original_file: Path) -> None:
    images = torch.rand(2, 3, 256, 256) * 2 - 1
    exact = load_encoder(str(original_file), 16, "fp32")(images)
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 5e-2)):
        encoder = load_encoder(str(original_file), 16, precision).cuda()
        assert relative_error(encoder(images.cuda()).cpu(), exact) < tolerance


def test_the_encoder_is_frozen() -> None:
    encoder = DINOv2(small(), precision="fp32").train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not encoder(images).requires_grad


def small(seed: int = 0) -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIDE * PATCH,
    )
    return random_dinov2(seed, config)


def test_random_weights_follow_the_seed() -> None:
    state = torch.get_rng_state()
    first, same, other = (small(seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    weight = "encoder.layer.0.mlp.fc1.weight"
    assert torch.equal(first.get_parameter(weight), same.get_parameter(weight))
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))


@pytest.mark.soak
def test_the_compiled_encoder_says_the_same() -> None:
    encoder = DINOv2(small(), precision="fp32")
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    eager = encoder(images)
    encoder.compile(fullgraph=True)
    assert relative_error(encoder(images), eager) < 1e-5


def test_attention_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, flash attention would be out of the question."""
    attention, masks = F.scaled_dot_product_attention, []

    def spy(*arguments: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        masks.append(attn_mask)
        return attention(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    DINOv2(small(), precision="fp32")(torch.rand(1, 3, 32, 32))
    assert masks == [None] * DEPTH


def test_the_estimate_counts_what_b14_computes() -> None:
    with torch.device("meta"):
        encoder = DINOv2(random_dinov2(), precision="fp32")
    with FlopCounterMode(display=False) as counter:
        encoder(torch.zeros(1, 3, 256, 256, device="meta"))
    # The encoder's work does not depend on the network that it teaches.
    small = ["--model.depth=1", "--alignment.layer=1"]
    config = load_config("c2i_l_256", small)
    assert count_work(config).encoder_flops == counter.get_total_flops()
    cached = load_config("c2i_l_256", [*small, "--alignment.cache=features"])
    assert count_work(cached).encoder_flops == 0


@pytest.mark.slow
def test_without_a_shape_it_is_b14() -> None:
    published = random_dinov2()
    assert sum(parameter.numel() for parameter in published.parameters()) == 86_580_480
    # A position for every patch of 518 x 518 pixels.
    assert published.embeddings.position_embeddings.shape == (1, 37**2 + 1, 768)


def test_hugging_faces_files_load_as_well(tmp_path: Path) -> None:
    backbone = small()
    backbone.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_dinov2(path)
        assert loaded.config.num_attention_heads == HEADS
        for name, parameter in backbone.named_parameters():
            assert torch.equal(parameter, loaded.get_parameter(name)), name


def damaged(folder: Path) -> Path:
    file = folder / "cut.pth"
    torch.save(original_weights(), file)
    file.write_bytes(file.read_bytes()[:5000])
    return file


def with_code(folder: Path) -> Path:
    torch.save({"cls_token": nn.Linear(2, 2)}, folder / "code.pth")
    return folder / "code.pth"


def of_another_network(folder: Path) -> Path:
    save_file({"weight": torch.zeros(3)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def with_registers(folder: Path) -> Path:
    torch.save(original_weights() | {"register_tokens": torch.zeros(1, 4, WIDTH)}, folder / "r.pth")
    return folder / "r.pth"


def without_a_tensor(folder: Path) -> Path:
    weights = original_weights()
    del weights["blocks.1.mlp.fc2.bias"]
    torch.save(weights, folder / "less.pth")
    return folder / "less.pth"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.pth", "none.pth does not exist"),
        (lambda folder: "hf:nobody/nothing/model.safetensors", "hub cannot be reached"),
        (damaged, "cut.pth is damaged"),
        (with_code, "code.pth is damaged, or holds more than tensors"),
        (of_another_network, "other.safetensors is not a DINOv2"),
        (with_registers, "r.pth is not a DINOv2 without registers .1 tensors"),
        (without_a_tensor, "less.pth is not a DINOv2 without registers .1 tensors"),
    ],
)
def test_unusable_weights_are_named_with_the_remedy(
    tmp_path: Path, make: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(str(path))
    assert "dinov2_vitb14_pretrain.pth" in str(caught.value)
    assert "--repa off" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"give https\S+dinov2_vitl14_pretrain\.pth by"):
        load_encoder(str(path), size="l")
    assert capsys.readouterr().err == ""
