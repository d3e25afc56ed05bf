"""Embeddings of time and of place (specification B.2, B.4, B.5), and the norm beside them."""

from __future__ import annotations

import pytest
import torch
from golden import relative_error, tensors
from hypothesis import given
from hypothesis import strategies as st

from deco_fast.kernels.pixel_decoder.reference import pixel_position_features
from deco_fast.kernels.qk_norm_rope.reference import apply_rotary
from deco_fast.models.embeddings import (
    TimestepEmbedder,
    rotary_table,
    timestep_embedding,
)
from deco_fast.models.norm import RMSNorm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [256, 7])
def test_timestep_embedding_equals_golden(dim: int) -> None:
    golden = tensors("tables_positional")
    embedding = timestep_embedding(golden["timestep.t"], dim)
    assert relative_error(embedding, golden[f"timestep.embedding_{dim}"]) <= 1e-6


def test_timestep_embedding_uses_the_unscaled_time_and_period_ten() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    embedding = timestep_embedding(t, 4)
    slow = 10**-0.5
    expected = [t.cos(), (t * slow).cos(), t.sin(), (t * slow).sin()]
    assert torch.allclose(embedding, torch.stack(expected, dim=-1), atol=1e-7)


def test_timestep_embedding_of_bf16_times_is_float32() -> None:
    t = torch.rand(5, generator=generator()).bfloat16()
    embedding = timestep_embedding(t)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, timestep_embedding(t.float()))


def test_timestep_embedder_follows_its_weights_dtype() -> None:
    t = torch.rand(5, generator=generator())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert TimestepEmbedder(16).to(dtype)(t).dtype == dtype


# --- rotary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64, 72])
@pytest.mark.parametrize("grid", [(1, 5), (2, 4), (4, 3), (4, 4)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_rotary_table_equals_golden(head_dim: int, grid: tuple[int, int]) -> None:
    height, width = grid
    golden = tensors("tables_positional")[f"c2i.rope.d{head_dim}.{height}x{width}"]
    table = rotary_table(height, width, head_dim)
    assert table.dtype == torch.float32
    # An angle goes up to 16, where a float32 has steps of 1e-6.
    assert relative_error(table, golden) <= 3e-6


@pytest.mark.parametrize("head_dim", [16, 64, 72])
@pytest.mark.parametrize("grid", [(1, 5), (2, 4), (4, 3), (4, 4)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_rotary_table_of_the_text_model_equals_golden(head_dim: int, grid: tuple[int, int]) -> None:
    height, width = grid
    golden = tensors("tables_positional")[f"t2i.rope.d{head_dim}.{height}x{width}"]
    table = rotary_table(height, width, head_dim, extent=(width, height))
    assert relative_error(table, golden) <= 3e-6


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([4, 8, 24, 32]))
def test_rotary_table_shape_and_geometry(height: int, width: int, head_dim: int) -> None:
    table = rotary_table(height, width, head_dim)
    assert table.shape == (height * width, head_dim // 2, 2)
    assert torch.allclose(table.square().sum(-1), torch.ones(height * width, head_dim // 2))
    by_place = table.view(height, width, head_dim // 2, 2)
    # Even pairs see only the column, odd pairs only the row.
    assert torch.equal(by_place[:, :, 0::2], by_place[:1, :, 0::2].expand_as(by_place[:, :, 0::2]))
    assert torch.equal(by_place[:, :, 1::2], by_place[:, :1, 1::2].expand_as(by_place[:, :, 1::2]))
    still = torch.tensor([1.0, 0.0])
    assert torch.equal(by_place[0, 0], still.expand(head_dim // 2, 2))


def test_rotary_positions_end_at_sixteen_whatever_the_resolution() -> None:
    for size in (2, 5, 32):
        last = rotary_table(size, size, 4)[-1]
        angle = torch.tensor([16.0, 16.0])
        assert torch.allclose(last, torch.stack([angle.cos(), angle.sin()], dim=-1), atol=1e-5)


def test_apply_rotary_is_a_complex_product() -> None:
    x = torch.randn(2, 3, 12, 16, generator=generator())
    table = rotary_table(3, 4, 16)
    product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)
    assert torch.allclose(
        apply_rotary(x, table), torch.view_as_real(product).flatten(-2), atol=1e-6
    )


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    width = 9
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator()).expand(2, 1, 1, width, 16)
    table = rotary_table(1, width, 16)
    scores = (apply_rotary(q, table) @ apply_rotary(k, table).mT)[0, 0]
    for distance in range(-width + 1, width):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)


def test_apply_rotary_turns_bf16_in_float32() -> None:
    x = torch.randn(1, 2, 12, 8, generator=generator()).bfloat16()
    table = rotary_table(3, 4, 8)
    turned = apply_rotary(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rotary(x.float(), table).bfloat16())


# --- the pixel's place inside its patch -----------------------------------------------------


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
@pytest.mark.parametrize(("model", "kind"), [("c2i", "product"), ("t2i", "axial")])
def test_pixel_position_features_equal_golden(model: str, kind: str, patch_size: int) -> None:
    golden = tensors("tables_positional")[f"{model}.x_embedder_pos.p{patch_size}"][0]
    features = pixel_position_features(patch_size, kind=kind)
    assert features.dtype == torch.float32
    assert relative_error(features, golden) <= 3e-6


@given(st.integers(1, 20))
def test_pixel_position_features_by_the_formula(patch_size: int) -> None:
    features = pixel_position_features(patch_size)
    assert features.shape == (patch_size**2, 64)
    place = torch.linspace(0, 1, patch_size, dtype=torch.float64)
    py, px = 2 * patch_size // 3, patch_size // 3
    for i, j in ((0, 0), (1, 6), (5, 2), (7, 7)):
        fx, fy = 8 * i / 7, 8 * j / 7
        expected = (torch.pi * place[px] * fx).cos() * (torch.pi * place[py] * fy).cos()
        actual = features[py * patch_size + px, 8 * i + j]
        assert abs(actual - expected / (1 + fx * fy)) < 1e-5


@given(st.integers(2, 20), st.integers(0, 31))
def test_axial_features_are_the_cosines_of_a_rotary_table(patch_size: int, k: int) -> None:
    features = pixel_position_features(patch_size, kind="axial")
    table = rotary_table(patch_size, patch_size, 128, extent=(patch_size, patch_size))
    assert torch.allclose(features, table[..., 0], atol=1e-5)
    place = torch.linspace(0, patch_size, patch_size, dtype=torch.float64)
    by_place = features.view(patch_size, patch_size, 64)
    expected = (place * 10000 ** (-k / 32)).cos().float()
    assert torch.allclose(by_place[0, :, 2 * k], expected, atol=1e-5)
    assert torch.allclose(by_place[:, 0, 2 * k + 1], expected, atol=1e-5)


def test_unknown_position_features_are_refused() -> None:
    with pytest.raises(ValueError, match="'polar': choose product or axial"):
        pixel_position_features(4, kind="polar")


# --- RMSNorm --------------------------------------------------------------------------------


def test_rms_norm_by_the_formula() -> None:
    norm = RMSNorm(24)
    torch.nn.init.normal_(norm.weight, generator=generator(1))
    # So small that the epsilon inside the root decides.
    x = 1e-3 * torch.randn(5, 24, generator=generator())
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert relative_error(norm(x), expected.detach()) <= 1e-6


def test_rms_norm_takes_its_statistics_in_float32() -> None:
    norm = RMSNorm(512)
    x = 10 * torch.randn(8, 512, generator=generator()).bfloat16()
    y = norm.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm.float()(x.float()).bfloat16())


def test_the_default_dtype_changes_no_rotary_table() -> None:
    expected = rotary_table(3, 5, 24)
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = rotary_table(3, 5, 24)
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.dtype == torch.float32 and torch.equal(table, expected)
