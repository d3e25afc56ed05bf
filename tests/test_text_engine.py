"""The sampling engine with prompts: the images of the plain loop, and the work that it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from golden import load_model
from torch import Tensor

from deco_fast import DeCo, DeCoConfig, DeCoT2I, DeCoT2IConfig, SamplingEngine, ops, sample
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.prepared import WeightLayout
from deco_fast.sampling import condition_table
from deco_fast.sampling.run import draw

CONFIG = DeCoT2IConfig(
    hidden_size=64,
    depth=2,
    num_heads=4,
    patch_size=8,
    decoder_hidden_size=16,
    decoder_depth=2,
    text_depth=2,
    text_size=24,
    text_length=7,
)
HEIGHT, WIDTH = 32, 24
GUIDED = SamplingSettings(
    solver="adams", steps=6, guidance_scale=3.0, guidance_interval=(0.2, 0.9), time_shift=3.0
)
PROMPTS = ["a cat", "", "a dog"]


class Encoder:
    """Random features for each prompt, and a record of what was asked for."""

    def __init__(self, config: DeCoT2IConfig = CONFIG) -> None:
        self.config = config
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        self.asked += prompts
        return torch.stack([self.features(prompt) for prompt in prompts])

    def features(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(prompt.encode()))
        return torch.randn(self.config.text_length, self.config.text_size, generator=generator)


def random_model(config: DeCoT2IConfig = CONFIG) -> DeCoT2I:
    torch.manual_seed(0)
    card = ModelCard(name="tiny", height=HEIGHT, width=WIDTH, sampling=GUIDED)
    model = DeCoT2I(config, card).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def plain(
    model: DeCoNetwork,
    noise: Tensor,
    prompts: Sequence[str],
    settings: SamplingSettings,
    negative: str = "",
) -> Tensor:
    assert isinstance(model.config, DeCoT2IConfig)
    encoder = Encoder(model.config)
    texts, null = encoder(prompts).to(noise.device), encoder([negative]).to(noise.device)
    with ops.use_backend("reference"):
        return sample(model, noise, texts, null, **asdict(settings))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def noise(count: int) -> Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH)


class TestAgreement:
    """With `deco_fast.sample` on the reference ops."""

    @pytest.mark.parametrize("name", ["model_t2i_deco_p16", "model_t2i_deco_p8"])
    def test_the_published_settings_on_a_golden_model(self, name: str) -> None:
        model = load_model(name)
        assert isinstance(model, DeCoT2I)
        side = 2 * model.config.patch_size
        settings = SamplingSettings(solver="adams", steps=25, guidance_scale=4.0, time_shift=3.0)
        start = torch.randn(2, 3, side, 2 * side)
        expected = plain(model, start, PROMPTS[:2], settings)
        engine = SamplingEngine(
            model,
            settings,
            height=side,
            width=2 * side,
            batch_size=2,
            encode_text=Encoder(model.config),
        )
        assert error(engine(start, PROMPTS[:2]), expected) < 1e-5

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"solver": "euler", "guidance_interval": (0.0, 1.0)},
            {"solver": "heun"},
            {"guidance_scale": 1.0},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("negative", ["", "blurry"])
    def test_ways_of_sampling(self, changes: dict[str, object], negative: str) -> None:
        model, settings = random_model(), replace(GUIDED, **changes)  # type: ignore[arg-type]
        start = noise(3)
        engine = SamplingEngine(model, settings, batch_size=3, encode_text=Encoder())
        images = engine(start, PROMPTS, uncondition=negative)
        assert error(images, plain(model, start, PROMPTS, settings, negative)) < 1e-5

    def test_bfloat16_is_as_near_to_float32_as_the_plain_loop(self) -> None:
        start = noise(3)
        expected = plain(random_model(), start, PROMPTS, GUIDED)
        model = random_model().bfloat16()
        engine = SamplingEngine(model, batch_size=3, encode_text=Encoder())
        ours = error(engine(start, PROMPTS), expected)
        assert ours < 1.2 * error(plain(model, start, PROMPTS, GUIDED), expected)

    def test_one_batch_after_the_other(self) -> None:
        model, start = random_model(), noise(5)
        prompts = ["a", "b", "a", "b", "c"]
        engine = SamplingEngine(model, batch_size=3, distinct_conditions=2, encode_text=Encoder())
        images = torch.cat(
            [
                engine(start[:3], prompts[:3], uncondition="blurry"),
                engine(start[3:], prompts[3:], uncondition="blurry"),
            ]
        )
        assert error(images, plain(model, start, prompts, GUIDED, "blurry")) < 1e-5

    def test_a_table_that_holds_a_part_of_the_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, start = random_model(), noise(2)
        expected = plain(model, start, PROMPTS[:2], GUIDED)
        row = CONFIG.depth * CONFIG.hidden_size * (6 + 3 * 2 * CONFIG.text_length) * 4
        for evaluations in (0, 1, 4):
            encoder = Encoder()
            engine = SamplingEngine(
                model, batch_size=2, encode_text=encoder, table_bytes=row * evaluations
            )
            assert engine._table.span == max(1, evaluations)
            assert error(engine(start, PROMPTS[:2]), expected) < 1e-5
            assert encoder.asked == ["", "a cat"]
        # Texts that are refined piece by piece.
        monkeypatch.setattr(condition_table, "_TOKENS_AT_ONCE", 4 * CONFIG.text_length)
        engine = SamplingEngine(model, batch_size=2, encode_text=Encoder())
        assert error(engine(start, PROMPTS[:2]), expected) < 1e-5

    def test_a_batch_that_failed_leaves_nothing_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, start = random_model(), noise(2)
        row = CONFIG.depth * CONFIG.hidden_size * (6 + 3 * 2 * CONFIG.text_length) * 4
        for evaluations in (4, GUIDED.steps):
            engine = SamplingEngine(
                model, batch_size=2, encode_text=Encoder(), table_bytes=row * evaluations
            )
            expected = engine(start, PROMPTS[:2])
            prepare, calls = condition_table.prepared_text_keys_values, []

            def run_out(*arguments: Any, prepare: Any = prepare, calls: Any = calls) -> Tensor:
                calls.append(arguments)
                if len(calls) == CONFIG.depth:
                    raise torch.OutOfMemoryError("out of memory")
                result: Tensor = prepare(*arguments)
                return result

            with monkeypatch.context() as patched:
                patched.setattr(condition_table, "prepared_text_keys_values", run_out)
                with pytest.raises(torch.OutOfMemoryError):
                    engine(start, ["a bird", "a fish"])
            assert torch.equal(engine(start, PROMPTS[:2]), expected)

    def test_the_layout_is_that_of_when_the_engine_was_made(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Queries and keys must lie alike, whatever backend is forced when texts are prepared."""
        model, start = random_model(), noise(2)
        with monkeypatch.context() as patched:
            layout = WeightLayout(packed=False, halves=False)
            patched.setattr(WeightLayout, "best", staticmethod(lambda *_: layout))
            engine = SamplingEngine(model, batch_size=2, encode_text=Encoder())
        images = engine(start, PROMPTS[:2])
        assert error(images, plain(model, start, PROMPTS[:2], GUIDED)) < 1e-5

    @pytest.mark.slow
    def test_compiled_block_by_block(self) -> None:
        model = random_model(replace(CONFIG, depth=9))
        start = noise(3)
        torch.compiler.reset()
        engine = SamplingEngine(model, batch_size=2, encode_text=Encoder(), compile=True)
        engine.warm_up()
        with torch.compiler.set_stance("fail_on_recompile"):
            images = torch.cat([engine(start[:2], PROMPTS[:2]), engine(start[2:], PROMPTS[2:])])
        assert error(images, plain(model, start, PROMPTS, GUIDED)) < 1e-5


class TestWork:
    """What is not computed."""

    def test_texts_are_refined_ahead_of_the_loop_in_one_batch(self) -> None:
        model, encoder = random_model(), Encoder()
        refined: list[int] = []
        projected: list[int] = []
        modulated: list[int] = []
        model.text_blocks[0].register_forward_pre_hook(lambda _, x: refined.append(len(x[0])))
        for block in model.blocks:
            block.attention.kv_y.register_forward_pre_hook(lambda _, x: projected.append(len(x[0])))
            block.modulation.register_forward_pre_hook(lambda _, x: modulated.append(len(x[0])))
        engine = SamplingEngine(model, batch_size=3, encode_text=encoder)
        engine(noise(3), ["a cat", "a dog", "a cat"])
        times_with_prompts = GUIDED.steps * 3  # the empty one is the third
        assert refined == [times_with_prompts]
        assert projected == [times_with_prompts] * CONFIG.depth
        assert modulated == [GUIDED.steps] * CONFIG.depth
        assert encoder.asked == ["", "a cat", "a dog"]
        engine(noise(2), ["a dog", "a cat"])  # the same prompts: nothing to do
        assert refined == [times_with_prompts]
        engine(noise(1), ["a bird"])  # the times are the same
        assert refined == [times_with_prompts, GUIDED.steps * 2]
        assert modulated == [GUIDED.steps] * CONFIG.depth

    def test_no_unconditional_text_without_guidance(self) -> None:
        encoder = Encoder()
        settings = replace(GUIDED, guidance_scale=1.0)
        engine = SamplingEngine(random_model(), settings, batch_size=1, encode_text=encoder)
        engine(noise(1), ["a cat"])
        assert encoder.asked == ["a cat"]

    def test_draw_leads_away_from_a_negative_prompt(self) -> None:
        engine = SamplingEngine(random_model(), batch_size=2, encode_text=Encoder())
        with_it, without = (
            torch.cat([images for _, images in draw(engine, PROMPTS, uncondition=uncondition)])
            for uncondition in ("blurry", None)
        )
        assert with_it.shape == (3, HEIGHT, WIDTH, 3)
        assert not torch.equal(with_it, without)


class TestBadInput:
    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match="a text model needs encode_text"):
            SamplingEngine(random_model(), batch_size=1)
        classes = DeCo(DeCoConfig(16, 1, 2, patch_size=8), ModelCard(height=16, width=16))
        with pytest.raises(ValueError, match="this one draws from class labels"):
            SamplingEngine(classes, batch_size=1, encode_text=Encoder())

    def test_calls(self) -> None:
        engine = SamplingEngine(
            random_model(), batch_size=2, distinct_conditions=1, encode_text=Encoder()
        )
        with pytest.raises(ValueError, match="a prompt must be a text, not 3"):
            engine(noise(1), [3])
        with pytest.raises(ValueError, match="2 noises but 1 conditions"):
            engine(noise(2), ["a"])
        with pytest.raises(ValueError, match=r"2 distinct conditions .* was made for 1"):
            engine(noise(2), ["a", "b"])
        wrong = Encoder(replace(CONFIG, text_size=8))
        with pytest.raises(ValueError, match=r"text encoder gave \(2, 7, 8\) and not \(2, 7, 24\)"):
            SamplingEngine(random_model(), batch_size=1, encode_text=wrong)(noise(1), ["a"])

    def test_the_plain_loop_needs_an_uncondition(self) -> None:
        with pytest.raises(ValueError, match="guidance needs an uncondition"):
            sample(random_model(), noise(1), Encoder()(["a"]), guidance_scale=2.0)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("compile", [False, True])
    def test_agrees_with_the_plain_loop(self, dtype: torch.dtype, compile: bool) -> None:
        start = noise(3).cuda()
        model = random_model().to("cuda", dtype)
        expected = plain(model, start, PROMPTS, GUIDED)
        engine = SamplingEngine(model, batch_size=2, compile=compile, encode_text=Encoder())
        engine.warm_up()
        images = torch.cat([engine(start[:2], PROMPTS[:2]), engine(start[2:], PROMPTS[2:])])
        assert error(images, expected) < (1e-4 if dtype == torch.float32 else 5e-2)
