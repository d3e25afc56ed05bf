"""The weights of a new model: distributed as the published ones (specification B.8)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from golden import deco_config, document, our_name

from deco_fast import DeCo
from deco_fast.interop.published import layout_of
from deco_fast.models.build import build_network
from deco_fast.models.config import DeCoT2IConfig, NetworkConfig
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.presets import PRESETS


@pytest.fixture(scope="module", params=["c2i_deco", "t2i_deco", "c2i_baseline", "c2i_pixnerd"])
def golden(request: pytest.FixtureRequest) -> tuple[NetworkConfig, dict[str, dict[str, float]]]:
    statistics = document("init_stats")[request.param]
    config, layout = deco_config(statistics["config"]), layout_of(statistics["params"])
    return (
        config,
        {our_name(name, layout): stats for name, stats in statistics["params"].items()},
    )


def test_every_parameter_is_distributed_as_published(
    golden: tuple[NetworkConfig, dict[str, dict[str, float]]],
) -> None:
    config, published = golden
    torch.manual_seed(0)
    parameters = dict(build_network(config).named_parameters())
    assert parameters.keys() == published.keys()
    for name, parameter in parameters.items():
        stats, values = published[name], parameter.detach().double()
        assert list(values.shape) == stats["shape"], name
        if stats["std"] == 0:
            assert (values == stats["mean"]).all(), name
            continue
        # Both sides are samples, so a difference varies √2 times as much as either: by
        # std·√(2/n) for a mean, and by std/√n at most for a standard deviation. Five times that
        # leaves one chance in a million.
        n, std = values.numel(), stats["std"]
        assert abs(values.mean() - stats["mean"]) <= 5 * std * math.sqrt(2 / n), name
        assert abs(values.std() - std) <= 5 * std / math.sqrt(n), name
        if n >= 1000:
            # What tells a uniform distribution (√3 standard deviations) from a normal one.
            assert values.abs().max() / std == pytest.approx(stats["absmax"] / std, rel=0.25), name


def test_the_first_velocity_is_exactly_zero() -> None:
    model = DeCo.from_preset("deco-digits")
    x = torch.randn(2, 3, 32, 32)
    velocity = model(x, torch.rand(2), torch.tensor([3, 10]))
    assert torch.equal(velocity, torch.zeros_like(x))
    assert model.encode(x, torch.rand(2), torch.tensor([3, 10])).abs().max() > 0.1
    for block in model.decoder.blocks:
        assert not block.modulation.weight.any() and not block.modulation.bias.any()
    for block in model.blocks:
        assert block.modulation.weight.any() and block.modulation.bias.any()


def test_the_first_velocity_of_the_text_model_is_exactly_zero() -> None:
    config = DeCoT2IConfig(16, 1, 2, patch_size=4, text_depth=1, text_size=8, text_length=3)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 3, 8)
    model = DeCoT2I(config)
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    assert model.encode(x, t, y).abs().max() > 0.1


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_the_class_embedding_has_the_configured_spread(std: float) -> None:
    config = dataclasses.replace(PRESETS["deco-digits"].config, class_embedding_std=std)
    weight = DeCo(config).class_embedder.weight.detach()
    assert float(weight.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))


def test_a_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = DeCo.from_preset("deco-digits")
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
