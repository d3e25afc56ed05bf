"""The DeCo network: against the golden tensors, and what it promises (specification B.3 to B.5)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import (
    document,
    gradient_norms,
    load_model,
    metadata,
    our_name,
    relative_error,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deco_fast import DeCo, DeCoConfig, ops
from deco_fast.errors import UserError
from deco_fast.models import attention as attention_module
from deco_fast.models.attention import activate_flash_attention, attention
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.dit import SwiGLU
from deco_fast.models.network import DeCoNetwork

TOLERANCE = 1e-5
"""Relative, in float32: an independent implementation came within 1.7e-6 of the goldens."""

P16, P8 = "model_c2i_deco_p16", "model_c2i_deco_p8"
T16, T8 = "model_t2i_deco_p16", "model_t2i_deco_p8"
CASES = [(P16, "sq"), (P16, "wide"), (P16, "tall"), (P8, "sq"), (P8, "wide")]
CASES += [(T16, "sq"), (T16, "wide"), (T16, "tall"), (T8, "sq"), (T8, "wide")]
TINY = DeCoConfig(
    hidden_size=16,
    depth=2,
    num_heads=2,
    patch_size=4,
    decoder_hidden_size=8,
    decoder_depth=2,
    num_classes=5,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_model(seed: int = 0) -> DeCo:
    """A small network with no parameter at zero, so that every one of them matters."""
    model = DeCo(TINY)
    rng = generator(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=rng)
    return model


def inputs(batch: int = 2, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y for `TINY`, the null class among the labels."""
    rng = generator(1)
    x = torch.randn(batch, 3, height, width, generator=rng)
    return x, torch.rand(batch, generator=rng), torch.arange(batch) % 6


# --- the golden tensors ---------------------------------------------------------------------


@dataclass
class Run:
    """One golden case, and the same computed by our network."""

    name: str
    model: DeCoNetwork
    case: str
    golden: dict[str, Tensor]
    stride: dict[str, int]
    velocity: Tensor
    tokens: Tensor
    blocks: tuple[Tensor, ...]
    x_gradient: Tensor
    y_gradient: Tensor | None  # labels have none

    def expected(self, name: str) -> Tensor:
        return self.golden[f"{self.case}.{name}"]


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: f"{case[0][6:9]}-{case[0][-3:].strip('_')}-{case[1]}",
)
def run(request: pytest.FixtureRequest) -> Run:
    name, case = request.param
    golden, model = tensors(name), load_model(name)
    x, t, y, g = (golden[f"{case}.in.{key}"] for key in "xtyg")
    x, y = x.clone().requires_grad_(), y.clone()
    if y.is_floating_point():
        y.requires_grad_()
    tokens, blocks = model.encode(x, t, y, return_layers=range(1, model.config.depth + 1))
    velocity = model.decode(x, tokens)
    (velocity * g).sum().backward()
    assert x.grad is not None
    stride = metadata(name)["grad_row_stride"]
    return Run(name, model, case, golden, stride, velocity, tokens, blocks, x.grad, y.grad)


def test_velocity_equals_golden(run: Run) -> None:
    assert relative_error(run.velocity, run.expected("out.v")) <= TOLERANCE


def test_forward_is_decode_of_encode(run: Run) -> None:
    with torch.no_grad():
        velocity = run.model(*(run.expected(f"in.{key}") for key in "xty"))
    assert relative_error(velocity, run.expected("out.v")) <= TOLERANCE
    assert torch.equal(velocity, run.velocity)


def test_tokens_equal_golden(run: Run) -> None:
    assert relative_error(run.tokens, run.expected("out.s")) <= TOLERANCE


def test_block_outputs_equal_golden(run: Run) -> None:
    assert len(run.blocks) == run.model.config.depth
    for i, output in enumerate(run.blocks):
        assert relative_error(output, run.expected(f"inter.blocks.{i}")) <= TOLERANCE, f"block {i}"


def test_time_embedding_equals_golden(run: Run) -> None:
    embedding = run.model.timestep_embedder(run.expected("in.t"))
    assert relative_error(embedding, run.expected("inter.t_embedder")) <= TOLERANCE


def test_upsampled_conditions_equal_golden(run: Run) -> None:
    name = f"{run.case}.inter.cond_embed"
    if name not in run.golden:
        assert run.case != "sq"
        return
    layer = run.model.decoder.upsample
    y = ops.linear_upsample(run.tokens, layer.weight, layer.bias, run.model.config.patch_size)
    expected = run.golden[name]
    # A row of the golden tensor is a patch: pixel-major, channel-fast.
    assert relative_error(y.flatten(1)[: len(expected)], expected) <= TOLERANCE


def test_gradient_of_the_image_equals_golden(run: Run) -> None:
    assert relative_error(run.x_gradient, run.expected("grad.x")) <= TOLERANCE


def test_gradient_of_the_text_equals_golden(run: Run) -> None:
    assert (run.y_gradient is not None) == isinstance(run.model, DeCoT2I)
    if run.y_gradient is not None:
        assert relative_error(run.y_gradient, run.expected("grad.y")) <= TOLERANCE


def test_refined_text_equals_golden(run: Run) -> None:
    if not isinstance(run.model, DeCoT2I):
        return
    temb = run.model.timestep_embedder(run.expected("in.t"))[:, None]
    text = run.model.refine_text(run.expected("in.y"), temb)
    last = f"inter.text_refine_blocks.{run.model.config.text_depth - 1}"
    assert relative_error(text, run.expected(last)) <= TOLERANCE


def test_norm_of_every_gradient_equals_golden(run: Run) -> None:
    norms = gradient_norms(run.model, run.name)
    expected = run.expected("grad.norms")
    assert norms.shape == expected.shape
    assert ((norms - expected).abs() / expected).max() <= TOLERANCE


def test_stored_gradients_equal_golden(run: Run) -> None:
    prefix = f"{run.case}.grad.param."
    stored = [key.removeprefix(prefix) for key in run.golden if key.startswith(prefix)]
    of_a_square = 27 if isinstance(run.model, DeCoT2I) else 22
    assert len(stored) == (of_a_square if run.case == "sq" else 0)
    for published in stored:
        gradient = run.model.get_parameter(our_name(published)).grad
        assert gradient is not None
        error = relative_error(gradient[:: run.stride[published]], run.golden[prefix + published])
        assert error <= TOLERANCE, published


def test_batch_of_one_equals_golden(run: Run) -> None:
    x, t, y = (run.expected(f"in.{key}")[1:2] for key in "xty")
    with torch.no_grad():
        assert relative_error(run.model(x, t, y), run.expected("out.v")[1:2]) <= TOLERANCE


def test_float64_equals_golden(run: Run) -> None:
    x, t, y = (run.expected(f"in.{key}") for key in "xty")
    with torch.no_grad():
        velocity = copy.deepcopy(run.model).double()(x.double(), t.double(), y)
    assert velocity.dtype == torch.float64
    assert relative_error(velocity, run.expected("out.v")) <= TOLERANCE


# --- half precision -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [P16, P8, T16, T8])
def test_bf16_autocast_is_as_near_as_the_published_code(name: str) -> None:
    golden, model = tensors(name), load_model(name)
    exact, guide = golden["sq.out.v"], golden["sq.out.v_cpu_autocast_bf16"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        velocity = model(*(golden[f"sq.in.{key}"] for key in "xty"))
    assert relative_error(velocity, exact) <= 1.5 * relative_error(guide, exact)


@pytest.mark.parametrize("name", [P16, P8, T16, T8])
def test_pure_bf16_forward_and_backward(name: str) -> None:
    golden, model = tensors(name), load_model(name).bfloat16()
    x, t, y, g = (golden[f"sq.in.{key}"] for key in "xtyg")
    x = x.bfloat16().requires_grad_()
    velocity = model(x, t.bfloat16(), y)
    assert velocity.dtype == torch.bfloat16
    exact, guide = golden["sq.out.v"], golden["sq.out.v_cpu_autocast_bf16"]
    # Weights, inputs and residual stream have 8 bits here, where autocast keeps some in float32.
    assert relative_error(velocity, exact) <= 2.5 * relative_error(guide, exact)
    (velocity * g).sum().backward()
    assert x.grad is not None
    similarity = F.cosine_similarity(x.grad.float().flatten(), golden["sq.grad.x"].flatten(), 0)
    assert similarity > 0.999
    norms, expected = gradient_norms(model, name), golden["sq.grad.norms"]
    assert ((norms - expected).abs() / expected).max() < 0.1


def test_a_float32_image_may_go_into_a_bf16_model() -> None:
    x, t, y = inputs()
    model = tiny_model().bfloat16()
    assert torch.equal(model(x, t, y), model(x.bfloat16(), t, y))


# --- shapes and sizes -----------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_any_size_that_the_patch_divides(batch: int, rows: int, columns: int) -> None:
    x, t, y = inputs(batch, 4 * rows, 4 * columns)
    with torch.no_grad():
        tokens, (last,) = (model := tiny_model()).encode(x, t, y, return_layers=(2,))
        velocity = model.decode(x, tokens)
    assert tokens.shape == last.shape == (batch, rows * columns, 16)
    assert velocity.shape == x.shape and velocity.isfinite().all()


@pytest.mark.parametrize(
    ("preset", "total", "decoder"),
    [
        ("deco-xl", 682_282_851, 9_464_739),
        ("deco-xl-512", 682_282_851, 9_464_739),
        ("deco-l", 426_938_019, 8_416_163),
    ],
)
def test_parameter_counts_are_the_published_ones(preset: str, total: int, decoder: int) -> None:
    with torch.device("meta"):
        model = DeCo.from_preset(preset)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("preset", "published"), [("deco-xl", "DeCo_XL"), ("deco-l", "DeCo_large")]
)
def test_a_preset_has_the_published_tensors(preset: str, published: str) -> None:
    layout = document("checkpoint_layout")["state_dict"][published]
    with torch.device("meta"):
        ours = {k: list(v.shape) for k, v in DeCo.from_preset(preset).state_dict().items()}
    prefix = "denoiser."
    theirs = {
        our_name(k.removeprefix(prefix)): v for k, v in layout.items() if k.startswith(prefix)
    }
    assert ours == theirs


def test_presets_carry_their_card() -> None:
    with torch.device("meta"):
        card = DeCo.from_preset("deco-xl-512").card
    assert card is not None
    assert (card.height, card.width) == (512, 512)
    assert card.sampling.guidance_scale == 5.0
    assert card.sampling.guidance_interval == (0.1, 1.0)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"deco-xk.*'deco-xl'"):
        DeCo.from_preset("deco-xk")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("depth", 0),
        ("num_heads", 3),
        ("num_classes", -1),
        ("patch_size", 0),
        ("decoder_hidden_size", 0),
        ("class_embedding_std", -0.1),
    ],
)
def test_an_impossible_configuration_is_refused(field: str, value: float) -> None:
    fields: dict[str, Any] = {"hidden_size": 16, "depth": 1, "num_heads": 2, field: value}
    with pytest.raises(ValueError, match=field):
        DeCoConfig(**fields)


# --- what goes in and comes out -------------------------------------------------------------


def test_encode_returns_the_layers_asked_for_in_that_order() -> None:
    model, (x, t, y) = tiny_model(), inputs()
    tokens, (first, second) = model.encode(x, t, y, return_layers=(1, 2))
    again, (b, a) = model.encode(x, t, y, return_layers=[2, 1])
    assert torch.equal(a, first) and torch.equal(b, second) and not torch.equal(first, second)
    alone = model.encode(x, t, y)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, tokens) and torch.equal(again, tokens)
    # B.5: the condition is silu of the last block's output plus the time embedding.
    assert torch.equal(tokens, F.silu(model.timestep_embedder(t)[:, None] + second))


@pytest.mark.parametrize("layer", [0, -1, 3])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer {layer} .*1 … 2"):
        tiny_model().encode(*inputs(), return_layers=(layer,))


def test_no_labels_is_an_error_that_names_the_null_class() -> None:
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=r"y must be .*None.*null class is 5"):
        tiny_model()(x, t, None)


@pytest.mark.parametrize("label", [-1, 6])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    x, t, y = inputs()
    y[0] = label
    with pytest.raises(ValueError, match=rf"labels 0 … 4, or 5 for the null class.*{label}"):
        tiny_model()(x, t, y)


@pytest.mark.parametrize(
    "y", [torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)]
)
def test_labels_of_a_wrong_dtype_or_shape_are_refused(y: Tensor) -> None:
    x, t, _ = inputs()
    with pytest.raises(ValueError, match="y must be int64 labels"):
        tiny_model()(x, t, y)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.zeros(3), torch.zeros(2, 1)])
def test_times_of_a_wrong_shape_are_refused(t: Tensor) -> None:
    x, _, y = inputs()
    with pytest.raises(ValueError, match="t must be times"):
        tiny_model()(x, t, y)


@pytest.mark.parametrize("size", [(10, 12), (8, 13), (2, 2)])
def test_a_size_that_the_patch_does_not_divide_is_refused(size: tuple[int, int]) -> None:
    _, t, y = inputs()
    message = rf"{size[0]}×{size[1]} is not divisible by the patch size 4"
    model, x = tiny_model(), torch.zeros(2, 3, *size)
    with pytest.raises(ValueError, match=message):
        model(x, t, y)
    with pytest.raises(ValueError, match=message):
        model.decode(x, torch.zeros(2, 6, 16))


@pytest.mark.parametrize("shape", [(2, 1, 8, 12), (2, 4, 8, 12), (3, 8, 12)])
def test_a_wrong_number_of_channels_is_refused(shape: tuple[int, ...]) -> None:
    _, t, y = inputs()
    with pytest.raises(ValueError, match=r"x must be \(B, 3, H, W\)"):
        tiny_model()(torch.zeros(shape), t, y)


def test_tokens_of_another_image_are_refused() -> None:
    x, t, y = inputs()
    model = tiny_model()
    tokens = model.encode(x, t, y)
    with pytest.raises(ValueError, match=r"tokens must be \(2, 4, 16\)"):
        model.decode(x[..., :8], tokens)


def test_every_input_matters() -> None:
    model, (x, t, y) = tiny_model(), inputs()
    velocity = model(x, t, y)
    for changed in (model(x + 0.1, t, y), model(x, t + 0.1, y), model(x, t, (y + 1) % 6)):
        assert (changed - velocity).flatten(1).abs().amax(1).min() > 1e-4


# --- nothing is kept by calling -------------------------------------------------------------


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All that a module and its parts hold: identities, and the bytes of tensors."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for entry, item in entries:
                content = item.detach().clone() if isinstance(item, Tensor) else None
                state[f"{name}.{key}.{entry}"] = (id(item), content)
    return state


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, (identity, content) in before.items():
        assert after[key][0] == identity, key
        if content is not None:
            assert torch.equal(after[key][1], content), key


def test_forward_leaves_no_trace() -> None:
    model = tiny_model()
    before = state_of(model)
    model(*inputs())
    with torch.inference_mode():
        model(*inputs(1, 4, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(*inputs(3, 12, 8))
    assert_same_state(before, state_of(model))
    assert not list(model.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_after_inference_mode_gives_the_same_gradients() -> None:
    used, fresh = tiny_model(), tiny_model()
    with torch.inference_mode():
        used(*inputs())
    for model in (used, fresh):
        model(*inputs()).square().mean().backward()
    for (name, ours), theirs in zip(used.named_parameters(), fresh.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        assert ours.grad.abs().max() > 0, name
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_model_follows_its_device_and_dtype() -> None:
    model, (x, t, y) = tiny_model(), inputs()
    first = model(x, t, y)
    model.bfloat16()(x, t, y)
    model.double()(x, t, y)
    model.load_state_dict(tiny_model().state_dict())
    assert torch.equal(model.float()(x, t, y), first)


# --- attention ------------------------------------------------------------------------------


def qkv(head_dim: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = generator(2)
    return [torch.randn(2, 3, 6, head_dim, generator=rng).to(dtype) for _ in range(3)]


def test_attention_is_the_softmax_of_scaled_products() -> None:
    q, k, v = qkv()
    expected = (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
    assert relative_error(attention(q, k, v), expected) <= 1e-6


class AsIfOnCuda(Tensor):
    """A CPU tensor that says it lies on a GPU, which is what decides for flash-attn."""

    is_cuda = True


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that a stand-in for flash-attn was called with; it computes (B, L, heads, d)."""
    calls: list[tuple[int, ...]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(tuple(q.shape))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)

    stand_in = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setattr(attention_module, "flash_attn", stand_in)
    return calls


@pytest.mark.parametrize("head_dim", [8, 72, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_is_taken_where_the_tensors_allow(
    flash_calls: list[tuple[int, ...]], head_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = qkv(head_dim, dtype)
    out = attention(*(tensor.as_subclass(AsIfOnCuda) for tensor in (q, k, v)))
    assert flash_calls == [(2, 6, 3, head_dim)]
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert relative_error(out.as_subclass(Tensor), expected) <= 0.02


@pytest.mark.parametrize(
    ("head_dim", "dtype", "on_cuda"),
    [
        (8, torch.bfloat16, False),
        (8, torch.float32, True),
        (12, torch.bfloat16, True),
        (264, torch.bfloat16, True),
    ],
    ids=["cpu", "float32", "head-of-12", "head-of-264"],
)
def test_flash_attn_is_not_taken_elsewhere(
    flash_calls: list[tuple[int, ...]], head_dim: int, dtype: torch.dtype, on_cuda: bool
) -> None:
    q, k, v = qkv(head_dim, dtype)
    kind = AsIfOnCuda if on_cuda else Tensor
    out = attention(*(tensor.as_subclass(kind) for tensor in (q, k, v)))
    assert flash_calls == []
    assert torch.equal(out.as_subclass(Tensor), F.scaled_dot_product_attention(q, k, v))


def test_the_whole_model_can_run_on_flash_attn(flash_calls: list[tuple[int, ...]]) -> None:
    model, (x, t, y) = tiny_model().bfloat16(), inputs()
    expected = model(x, t, y)
    assert flash_calls == []
    with ops.use_backend("reference"):  # Triton's kernels would ask for the GPU
        velocity = model(x.as_subclass(AsIfOnCuda), t, y).as_subclass(Tensor)
    assert flash_calls == [(2, 6, 2, 8)] * 2
    assert relative_error(velocity, expected) <= 0.05


@pytest.fixture
def as_if_on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of compute capability 9.0, and none of torch's switch turned on."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


def test_flash_attention_3_is_activated_where_it_is_installed(
    as_if_on_hopper: None,
    flash_calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = SimpleNamespace(remove=lambda: None)
    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: handle)
    assert activate_flash_attention(torch.device("cuda")) == "FA3"
    assert activate_flash_attention(torch.device("cuda")) == "FA3"
    q, k, v = (tensor.as_subclass(AsIfOnCuda) for tensor in qkv(8, torch.bfloat16))
    attention(q, k, v)
    assert flash_calls == []  # torch's own function, which FA3 then serves


def test_flash_attention_that_is_not_installed_is_no_error(
    as_if_on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("flash_attn_interface")

    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA3", missing)
    assert activate_flash_attention(torch.device("cuda")) is None
    assert activate_flash_attention(torch.device("cpu")) is None


class Adapter(torch.nn.Module):
    """What stands for a linear layer in low-rank adaptation."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + self.up(self.down(x))
        return result


def test_an_adapter_in_an_mlp_counts() -> None:
    torch.manual_seed(0)
    mlp, x = SwiGLU(16, 24), torch.randn(2, 5, 16)
    before = mlp(x)
    heard: list[str] = []
    for name in ("w1", "w3", "w2"):
        getattr(mlp, name).register_forward_hook(lambda *_, name=name: heard.append(name))
    torch.testing.assert_close(mlp(x), before)
    assert heard == ["w1", "w3", "w2"]
    mlp.w1 = adapter = Adapter(mlp.w1)  # type: ignore[assignment]
    result = mlp(x)
    result.sum().backward()
    assert not torch.allclose(result, before)
    assert adapter.up.weight.grad is not None
    with pytest.raises(TypeError, match=r"test_model\.Adapter stands .* merge it into the weight"):
        mlp.gate_value_down()


@pytest.mark.parametrize("name", ["upsample", "output", "blocks.0.modulation", "blocks.0.mlp.2"])
def test_an_adapter_in_the_decoder_is_refused(name: str) -> None:
    config = DeCoConfig(hidden_size=16, depth=1, num_heads=2, patch_size=4, num_classes=5)
    model = DeCo(config)
    decoder = model.decoder
    decoder.set_submodule(name, Adapter(decoder.get_submodule(name)))  # type: ignore[arg-type]
    x, t, y = torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([1])
    with pytest.raises(TypeError, match=r"test_model\.Adapter stands"):
        model(x, t, y)
