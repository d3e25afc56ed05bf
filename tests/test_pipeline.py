"""`DeCoPipeline`, and the folder that a model is published in."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_qwen3
import torch
from huggingface_hub import ModelCard as HubCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from deco_fast import DeCo, DeCoConfig, DeCoT2I, load_checkpoint, sample
from deco_fast.checkpoint import read_card, save_checkpoint
from deco_fast.cli.sample import main as sample_command
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.errors import UserError
from deco_fast.interop.__main__ import main
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.network import DeCoNetwork
from deco_fast.resources import pretrained_folder
from deco_fast.sampling.noise import noise_for

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers import DiffusionPipeline, ImagePipelineOutput

from deco_fast.pipeline import DeCoPipeline, deco_pipeline

CLASSES = DeCoConfig(
    hidden_size=16,
    depth=2,
    num_heads=2,
    patch_size=4,
    decoder_hidden_size=16,
    decoder_depth=2,
    num_classes=3,
)
TEXT = tiny_qwen3.MODEL_CONFIG
SIZE = 16


def disturbed(model: DeCoNetwork) -> DeCoNetwork:
    """A new network draws its noise again; this one does not."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(scope="module")
def class_model() -> DeCoNetwork:
    torch.manual_seed(0)
    settings = SamplingSettings(steps=4, guidance_scale=2.0, guidance_interval=(0.2, 1.0))
    card = ModelCard(name="tiny", height=SIZE, width=SIZE, sampling=settings, step=12)
    return disturbed(DeCo(CLASSES, card))


@pytest.fixture(scope="module")
def text_model() -> DeCoNetwork:
    torch.manual_seed(0)
    settings = SamplingSettings(solver="adams", steps=3, guidance_scale=3.0, time_shift=3.0)
    encoder = str(tiny_qwen3.folder())
    card = ModelCard(
        name="tiny-text", height=SIZE, width=SIZE, sampling=settings, text_encoder=encoder
    )
    return disturbed(DeCoT2I(TEXT, card))


def quiet(pipeline: DeCoPipeline) -> DeCoPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def classes(class_model: DeCoNetwork) -> DeCoPipeline:
    return quiet(DeCoPipeline(class_model))


@pytest.fixture(scope="module")
def encoder() -> Qwen3TextEncoder:
    path = str(tiny_qwen3.folder())
    return Qwen3TextEncoder(path, length=TEXT.text_length, size=TEXT.text_size)


@pytest.fixture
def texts(text_model: DeCoNetwork, encoder: Qwen3TextEncoder) -> DeCoPipeline:
    return quiet(DeCoPipeline(text_model, encoder))


def noise(count: int) -> torch.Tensor:
    return torch.stack([noise_for(7, index, (3, SIZE, SIZE)) for index in range(count)])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def contents(folder: Path) -> dict[str, Any]:
    """The bytes of all files, of safetensors those of the tensors, and the metadata."""
    found: dict[str, Any] = {}
    for name in files(folder):
        found[name] = (folder / name).read_bytes()
        if name.endswith(".safetensors"):
            # The metadata are written in any order.
            with safe_open(folder / name, framework="pt") as file:
                tensors = {key: file.get_tensor(key).tolist() for key in sorted(file.keys())}
                found[name] = file.metadata(), tensors
    return found


class TestCalls:
    def test_a_class_model_returns_diffusers_output(self, classes: DeCoPipeline) -> None:
        output = classes(class_labels=[0, 2], generator=seeded())
        assert isinstance(output, ImagePipelineOutput)
        assert [image.size for image in output.images] == [(SIZE, SIZE)] * 2
        (images,) = classes(class_labels=[0, 2], generator=seeded(), return_dict=False)
        assert [np.array(i).tolist() for i in images] == [
            np.array(i).tolist() for i in output.images
        ]

    def test_a_text_model(self, texts: DeCoPipeline) -> None:
        one = texts("a", generator=seeded(), output_type="latent").images
        assert one.shape == (1, 3, SIZE, SIZE)
        away = texts("a", negative_prompt="b", generator=seeded(), output_type="latent").images
        assert not torch.equal(one, away)
        same = texts(["a"], negative_prompt=[""], generator=seeded(), output_type="latent").images
        assert torch.equal(one, same)

    def test_output_types(self, classes: DeCoPipeline) -> None:
        def draw(output_type: str) -> Any:
            return classes(class_labels=[1], latents=noise(1), output_type=output_type).images

        raw, pt, array, (image,) = (draw(kind) for kind in ("latent", "pt", "np", "pil"))
        assert torch.equal(pt, (raw / 2 + 0.5).clamp(0, 1))
        assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        assert np.abs(np.array(image) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6

    def test_several_images_of_each(self, classes: DeCoPipeline) -> None:
        several = classes(
            class_labels=[0, 1], num_images_per_prompt=2, latents=noise(4), output_type="latent"
        ).images
        each = classes(class_labels=[0, 0, 1, 1], latents=noise(4), output_type="latent").images
        assert torch.equal(several, each)

    def test_labels_as_a_number_and_as_a_tensor(self, classes: DeCoPipeline) -> None:
        drawn = [
            classes(class_labels=labels, latents=noise(1), output_type="latent").images
            for labels in (2, [2], torch.tensor([2]))
        ]
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])

    def test_a_generator_for_each_image(self, classes: DeCoPipeline) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        both = classes(class_labels=[0, 0], generator=generators, output_type="latent").images
        second = classes(
            class_labels=[0], generator=torch.Generator().manual_seed(2), output_type="latent"
        ).images
        torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=0)

    def test_settings_of_a_call_win_over_the_card(self, classes: DeCoPipeline) -> None:
        given = {"guidance_scale": 1.5, "guidance_interval": (0.0, 0.7), "time_shift": 2.0}
        drawn = classes(
            class_labels=[1, 0],
            latents=noise(2),
            num_inference_steps=3,
            solver="heun",
            guidance_rescale=0.3,
            output_type="latent",
            **given,
        ).images
        expected = sample(
            classes.transformer,
            noise(2),
            torch.tensor([1, 0]),
            steps=3,
            solver="heun",
            guidance_rescale=0.3,
            **given,
        )
        torch.testing.assert_close(drawn, expected, atol=2e-5, rtol=0)

    def test_another_size(self, classes: DeCoPipeline) -> None:
        (image,) = classes(class_labels=0, height=8, width=24).images
        assert image.size == (24, 8)

    def test_the_images_are_those_of_the_sampling_command(
        self, class_model: DeCoNetwork, classes: DeCoPipeline, tmp_path: Path
    ) -> None:
        assert class_model.card is not None
        path = save_checkpoint(
            tmp_path / "tiny", model=None, ema=class_model, card=class_model.card
        )
        arguments = ["--checkpoint", path, "--num", 3, "--classes", 2, 0, 1, "--seed", 7]
        arguments += ["--batch-size", 3, "--device", "cpu", "--out", tmp_path / "drawn"]
        assert sample_command([str(argument) for argument in arguments]) == 0
        commanded = sorted((tmp_path / "drawn").glob("0*.png"))
        drawn = classes(class_labels=[2, 0, 1], latents=noise(3)).images
        assert len(commanded) == 3
        for file, image in zip(commanded, drawn, strict=True):
            assert np.array_equal(np.array(Image.open(file)), np.array(image))

    def test_the_images_of_prompts_are_those_of_the_sampling_command(
        self, text_model: DeCoNetwork, texts: DeCoPipeline, tmp_path: Path
    ) -> None:
        assert text_model.card is not None
        path = save_checkpoint(tmp_path / "tiny", model=None, ema=text_model, card=text_model.card)
        arguments = ["--checkpoint", path, "--prompt", "a", "--prompt", "b", "--num", 2]
        arguments += ["--negative-prompt", "c", "--seed", 7, "--batch-size", 2]
        arguments += ["--device", "cpu", "--out", tmp_path / "drawn"]
        assert sample_command([str(argument) for argument in arguments]) == 0
        commanded = sorted((tmp_path / "drawn").glob("0*.png"))
        drawn = texts(["a", "b"], negative_prompt="c", latents=noise(2)).images
        assert len(commanded) == 2
        for file, image in zip(commanded, drawn, strict=True):
            assert np.array_equal(np.array(Image.open(file)), np.array(image))


class TestCallback:
    def test_sees_every_evaluation(self, classes: DeCoPipeline) -> None:
        seen = []

        def look(
            pipeline: DeCoPipeline, step: int, t: float, inputs: dict[str, Any]
        ) -> dict[str, Any]:
            assert pipeline is classes
            seen.append((step, t, inputs["latents"].clone()))
            return inputs

        images = classes(
            class_labels=1, latents=noise(1), output_type="latent", callback_on_step_end=look
        ).images
        assert [(step, t) for step, t, _ in seen] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
        assert torch.equal(seen[-1][2], images)
        assert not torch.equal(seen[0][2], images)

    def test_may_change_the_images(self, classes: DeCoPipeline) -> None:
        def blank(_: Any, step: int, t: float, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"latents": torch.zeros_like(inputs["latents"])} if step == 3 else {}

        images = classes(class_labels=1, output_type="latent", callback_on_step_end=blank).images
        assert torch.equal(images, torch.zeros(1, 3, SIZE, SIZE))

    def test_may_only_look(self, classes: DeCoPipeline) -> None:
        seen: list[int] = []
        classes(class_labels=1, callback_on_step_end=lambda _, step, *rest: seen.append(step))
        assert seen == [0, 1, 2, 3]

    def test_may_stop(self, classes: DeCoPipeline) -> None:
        seen = []

        def stop(
            pipeline: DeCoPipeline, step: int, t: float, inputs: dict[str, Any]
        ) -> dict[str, Any]:
            seen.append(inputs["latents"].clone())
            pipeline._interrupt = step == 1
            return inputs

        images = classes(class_labels=1, output_type="latent", callback_on_step_end=stop).images
        assert len(seen) == 2 and torch.equal(images, seen[-1])

    def test_shows_a_progress_bar_unless_told_otherwise(
        self, class_model: DeCoNetwork, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pipeline = DeCoPipeline(class_model)
        pipeline(class_labels=0)
        assert "4/4" in capsys.readouterr().err
        pipeline.set_progress_bar_config(disable=True)
        pipeline(class_labels=0)
        assert capsys.readouterr().err == ""


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "give class_labels, 0 … 2"),
            ({"prompt": "a"}, "prompt: this model draws classes"),
            ({"class_labels": [4]}, "class 4 does not exist"),
            ({"class_labels": [-1]}, "class -1 does not exist"),
            ({"class_labels": [0.5]}, "whole numbers"),
            ({"class_labels": []}, "nothing to draw"),
            ({"class_labels": 0, "negative_prompt": "a"}, "negative_prompt: this model draws"),
            ({"class_labels": 0, "height": 10}, "^height 10 is not divisible by .* use 8"),
            ({"class_labels": 0, "height": 0}, "^height must be a whole number, at least 1, not 0"),
            ({"class_labels": 0, "width": 16.0}, "^width must be a whole number"),
            ({"class_labels": "1"}, "class_labels must be whole numbers, not '1'"),
            ({"class_labels": [1, None]}, "whole numbers"),
            ({"class_labels": [[0, 1], [2]]}, "whole numbers"),
            ({"class_labels": True}, "whole numbers"),
            ({"class_labels": 1j}, "class_labels must be whole numbers, not torch.complex64"),
            ({"class_labels": 0, "num_inference_steps": 0}, "steps must be a whole number"),
            ({"class_labels": 0, "num_inference_steps": 2.5}, "steps must be a whole number"),
            ({"class_labels": 0, "order": "2"}, "order must be a whole number"),
            ({"class_labels": 0, "guidance_scale": "2"}, "guidance_scale must be a number"),
            ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance_scale must be a numb"),
            ({"class_labels": 0, "guidance_rescale": 2}, "guidance_rescale must be 0 … 1, not 2"),
            ({"class_labels": 0, "guidance_interval": 0.5}, r"two times \(low, high\), not 0\.5"),
            ({"class_labels": 0, "guidance_interval": (0.5, "1")}, "must be a number"),
            ({"class_labels": 0, "guidance_interval": (0.5, 0.2)}, "0 ≤ low ≤ high ≤ 1"),
            ({"class_labels": 0, "generator": 3}, "manual_seed"),
            ({"class_labels": 0, "generator": [3]}, "manual_seed"),
            ({"class_labels": 0, "latents": [0.0]}, "must be a tensor .* not list"),
            ({"class_labels": 0, "latents": torch.full((1, 3, SIZE, SIZE), torch.inf)}, "finite"),
            ({"class_labels": 0, "output_type": None}, "unknown output_type 'None'"),
            ({"class_labels": 0, "solver": "eular"}, "did you mean 'euler'"),
            ({"class_labels": 0, "num_images_per_prompt": 0}, "at least 1"),
            ({"class_labels": 0, "output_type": "pill"}, "did you mean 'pil'"),
            ({"class_labels": 0, "latents": torch.zeros(2, 3, SIZE, SIZE)}, r"\(1, 3, 16, 16\)"),
            ({"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 generators for 2"),
            ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["x"]}, "no 'x'"),
        ],
    )
    def test_of_a_class_model(
        self, classes: DeCoPipeline, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message) as refusal:
            classes(**arguments)
        assert "\n" not in str(refusal.value)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "give prompt"),
            ({"class_labels": 1}, "class_labels: this model draws from text"),
            ({"prompt": [1]}, "text or a list of texts"),
            ({"prompt": "\ud800"}, r"prompt is not Unicode: character 1, in '\\ud800', is U\+D800"),
            ({"prompt": "a", "negative_prompt": "\ud800"}, "negative_prompt is not Unicode"),
            ({"prompt": "a", "negative_prompt": ["a", "b"]}, "one text for all images"),
            ({"prompt": "a", "width": 18}, "^width 18 is not one of 16 … 128, divisible by 4"),
        ],
    )
    def test_of_a_text_model(
        self, texts: DeCoPipeline, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            texts(**arguments)

    def test_parts_that_do_not_belong_together(
        self, class_model: DeCoNetwork, text_model: DeCoNetwork, encoder: Qwen3TextEncoder
    ) -> None:
        with pytest.raises(UserError, match="give text_encoder"):
            DeCoPipeline(text_model)
        with pytest.raises(UserError, match="draws classes"):
            DeCoPipeline(class_model, encoder)
        with pytest.raises(UserError, match="no card"):
            DeCoPipeline(DeCo(CLASSES))

    def test_images_that_are_not_finite(self, class_model: DeCoNetwork) -> None:
        broken = DeCo(CLASSES, class_model.card)
        torch.nn.init.constant_(broken.patch_embedder.weight, torch.nan)
        with pytest.raises(UserError, match="not finite in float32"):
            quiet(DeCoPipeline(broken))(class_labels=0)

    def test_a_cut_prompt_is_said(
        self, texts: DeCoPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[str] = []
        monkeypatch.setattr(deco_pipeline.logger, "warning", said.append)
        texts("abcdefghijkl")
        assert said == ["cut: of 12 tokens the first 8 are used: 'abcdefghijkl'"]

    def test_without_diffusers(self) -> None:
        code = (
            "import sys\n"
            "sys.modules['diffusers'] = None\n"
            "try: import deco_fast.pipeline\n"
            "except ValueError as error: print(error)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.stdout == (
            "the pipeline needs the package diffusers: pip install 'deco-fast[diffusers]'\n"
        ), result.stderr


class TestMoving:
    def test_to_a_dtype(self, class_model: DeCoNetwork) -> None:
        copy = DeCo(CLASSES, class_model.card)
        copy.load_state_dict(class_model.state_dict())
        pipeline = quiet(DeCoPipeline(copy)).to(torch.bfloat16)
        assert pipeline.dtype == pipeline.transformer.dtype == torch.bfloat16
        image = pipeline(class_labels=1, latents=noise(1), output_type="latent").images
        expected = DeCoPipeline(class_model)
        close = quiet(expected)(class_labels=1, latents=noise(1), output_type="latent").images
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, close, atol=0.2, rtol=0)

    def test_the_text_encoder_goes_with_the_network(self, text_model: DeCoNetwork) -> None:
        path = str(tiny_qwen3.folder())
        encoder = Qwen3TextEncoder(path, length=TEXT.text_length, size=TEXT.text_size)
        copy = DeCoT2I(TEXT, text_model.card)
        pipeline = DeCoPipeline(copy, encoder).to("meta")
        assert pipeline.device.type == encoder.device.type == "meta"
        assert all(p.device.type == "meta" for p in encoder._model.parameters())

    @pytest.mark.gpu
    def test_on_a_gpu(self, text_model: DeCoNetwork, class_model: DeCoNetwork) -> None:
        path = str(tiny_qwen3.folder())
        encoder = Qwen3TextEncoder(path, length=TEXT.text_length, size=TEXT.text_size)
        for model, parts, arguments in (
            (class_model, (), {"class_labels": [0, 1]}),
            (text_model, (encoder,), {"prompt": ["a", "b"]}),
        ):
            here = quiet(DeCoPipeline(model, *parts))
            expected = here(**arguments, latents=noise(2), output_type="latent").images
            there = here.to("cuda")
            drawn = there(**arguments, latents=noise(2), output_type="latent").images
            here.to("cpu")
            assert drawn.is_cuda
            torch.testing.assert_close(drawn.cpu(), expected, atol=2e-2, rtol=0)
            generated = there(**arguments, generator=seeded()).images
            assert len(generated) == 2


@pytest.fixture(params=["classes", "texts"])
def either(request: pytest.FixtureRequest) -> DeCoPipeline:
    pipeline: DeCoPipeline = request.getfixturevalue(request.param)
    return pipeline


def draw(pipeline: DeCoPipeline) -> torch.Tensor:
    what = {"prompt": ["a", "b"]} if pipeline.text_encoder else {"class_labels": [0, 2]}
    images: torch.Tensor = quiet(pipeline)(**what, latents=noise(2), output_type="latent").images
    return images


def test_the_checkpoint_that_ships_has_a_name() -> None:
    pipeline = DeCoPipeline.from_pretrained("deco-digits")
    assert pipeline.transformer.config.num_classes == 10


class TestRoundTrip:
    def test_is_equal_bit_for_bit(self, either: DeCoPipeline, tmp_path: Path) -> None:
        either.save_pretrained(tmp_path / "saved")
        again = DeCoPipeline.from_pretrained(tmp_path / "saved")
        for name, tensor in either.transformer.state_dict().items():
            assert torch.equal(tensor, again.transformer.state_dict()[name]), name
        assert again.transformer.config == either.transformer.config
        assert torch.equal(draw(again), draw(either))
        again.save_pretrained(tmp_path / "again")
        assert contents(tmp_path / "again") == contents(tmp_path / "saved")

    def test_in_bfloat16(self, class_model: DeCoNetwork, tmp_path: Path) -> None:
        copy = DeCo(CLASSES, class_model.card)
        copy.load_state_dict(class_model.state_dict())
        pipeline = DeCoPipeline(copy).to(torch.bfloat16)
        pipeline.save_pretrained(tmp_path / "saved")
        again = DeCoPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
        assert again.dtype == torch.bfloat16
        assert torch.equal(draw(again), draw(pipeline))
        assert DeCoPipeline.from_pretrained(tmp_path / "saved").dtype == torch.float32

    def test_a_saved_folder_can_be_moved(self, texts: DeCoPipeline, tmp_path: Path) -> None:
        texts.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved").rename(tmp_path / "moved")
        moved = DeCoPipeline.from_pretrained(tmp_path / "moved")
        named = DeCoPipeline.from_pretrained(tmp_path / "moved", text_encoder=tiny_qwen3.folder())
        assert named.text_encoder is not None
        assert named.text_encoder.path == str(tiny_qwen3.folder())
        assert moved.text_encoder is not None
        assert Path(moved.text_encoder.path) == tmp_path / "moved" / "text_encoder"
        assert torch.equal(draw(moved), draw(texts))
        # Nothing in it says where it was made.
        for name in ("config.json", "README.md", "model_index.json", "ema.safetensors"):
            content = (tmp_path / "moved" / name).read_bytes()
            assert str(tmp_path).encode() not in content
            assert str(tiny_qwen3.folder()).encode() not in content

    def test_a_text_encoder_on_the_hub_is_named(
        self, texts: DeCoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(texts.text_encoder, "path", "hf:owner/qwen")
        texts.save_pretrained(tmp_path / "saved")
        assert read_card(tmp_path / "saved").text_encoder == "hf:owner/qwen"
        assert not (tmp_path / "saved" / "text_encoder").exists()
        with pytest.raises(UserError, match="no text encoder at hf:owner/qwen"):
            DeCoPipeline.from_pretrained(tmp_path / "saved")
        again = DeCoPipeline.from_pretrained(
            tmp_path / "saved", text_encoder=str(tiny_qwen3.folder())
        )
        assert torch.equal(draw(again), draw(texts))

    def test_a_folder_that_is_saved_to_again(self, texts: DeCoPipeline, tmp_path: Path) -> None:
        texts.save_pretrained(tmp_path / "saved")
        DeCoPipeline.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "saved")
        assert torch.equal(draw(DeCoPipeline.from_pretrained(tmp_path / "saved")), draw(texts))
        (tmp_path / "saved" / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match=r"notes\.txt"):
            texts.save_pretrained(tmp_path / "saved")

    def test_any_checkpoint_opens(self, class_model: DeCoNetwork, tmp_path: Path) -> None:
        assert class_model.card is not None
        run = tmp_path / "run" / "checkpoints" / "step-00000012"
        save_checkpoint(run, model=class_model, ema=class_model, card=class_model.card)
        for path in (run, tmp_path / "run", run / "model.safetensors"):
            pipeline = DeCoPipeline.from_pretrained(path)
            assert torch.equal(draw(pipeline), draw(DeCoPipeline(class_model)))

    def test_what_kind_of_weights_it_has_is_not_forgotten(
        self, class_model: DeCoNetwork, tmp_path: Path
    ) -> None:
        assert class_model.card is not None
        save_checkpoint(tmp_path / "run", model=class_model, card=class_model.card)
        pipeline = DeCoPipeline.from_pretrained(tmp_path / "run")
        pipeline.save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved" / "model.safetensors").exists()
        assert "as the optimizer left them" in (tmp_path / "saved" / "README.md").read_text()

    def test_options_that_it_has_not(self, classes: DeCoPipeline, tmp_path: Path) -> None:
        classes.save_pretrained(tmp_path / "saved", safe_serialization=True)
        DeCoPipeline.from_pretrained(tmp_path / "saved", use_safetensors=True)
        with pytest.raises(UserError, match="safetensors and nothing else"):
            classes.save_pretrained(tmp_path / "other", safe_serialization=False)
        with pytest.raises(UserError, match="safetensors and nothing else"):
            DeCoPipeline.from_pretrained(tmp_path / "saved", use_safetensors=False)
        with pytest.raises(UserError, match="save_pretrained: unknown 'variant'"):
            classes.save_pretrained(tmp_path / "other", variant="fp16")
        with pytest.raises(UserError, match=r"such as torch\.bfloat16, not 'float16'"):
            DeCoPipeline.from_pretrained(
                tmp_path / "saved",
                dtype="float16",  # type: ignore[arg-type]
            )
        assert not (tmp_path / "other").exists()

    def test_the_shipped_model(self) -> None:
        pipeline = quiet(DeCoPipeline.from_pretrained(pretrained_folder() / "deco-digits"))
        (image,) = pipeline(class_labels=3, num_inference_steps=2, generator=seeded()).images
        assert image.size == (32, 32)


class TestLoading:
    def test_runs_no_code_from_the_folder(self, classes: DeCoPipeline, tmp_path: Path) -> None:
        folder = tmp_path / "saved"
        classes.save_pretrained(folder)
        mark = tmp_path / "mark"

        class Evil:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
                return Path.write_text, (mark, "x")  # type: ignore[return-value]

        code = f"import pathlib; pathlib.Path({str(mark)!r}).write_text('x')\n"
        for name in ("pipeline.py", "deco.py", "__init__.py"):
            (folder / name).write_text(code)
        for name in ("ema.bin", "diffusion_pytorch_model.bin", "pytorch_model.bin"):
            (folder / name).write_bytes(pickle.dumps(Evil()))
        (folder / "model_index.json").write_text(
            json.dumps({"_class_name": ["pipeline", "Evil"], "transformer": ["pipeline", "Evil"]})
        )
        DeCoPipeline.from_pretrained(folder)
        assert not mark.exists()

    def test_a_pickle_in_place_of_weights_is_refused(
        self, classes: DeCoPipeline, tmp_path: Path
    ) -> None:
        classes.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "ema.safetensors").write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(UserError, match="pickle"):
            DeCoPipeline.from_pretrained(tmp_path / "saved")

    def test_an_edited_config_is_refused(self, classes: DeCoPipeline, tmp_path: Path) -> None:
        classes.save_pretrained(tmp_path / "saved")
        path = tmp_path / "saved" / "config.json"
        path.write_text(path.read_text().replace('"steps": 4', '"steps": 5'))
        with pytest.raises(UserError, match=r"config\.json says other things"):
            DeCoPipeline.from_pretrained(tmp_path / "saved")
        for damaged in ("{", "[]", "{}", '{"card": {}, "depths": 3}'):
            path.write_text(damaged)
            with pytest.raises(UserError, match="cannot be read"):
                DeCoPipeline.from_pretrained(tmp_path / "saved")

    def test_what_an_older_version_wrote_opens(self, classes: DeCoPipeline, tmp_path: Path) -> None:
        classes.save_pretrained(tmp_path / "saved")
        path = tmp_path / "saved" / "config.json"
        fields = json.loads(path.read_text())
        # As if these had come later: they have their defaults.
        del fields["card"]["text_encoder"], fields["card"]["sampling"]["guidance_rescale"]
        del fields["class_embedding_std"]
        path.write_text(json.dumps(fields))
        assert torch.equal(draw(DeCoPipeline.from_pretrained(tmp_path / "saved")), draw(classes))

    def test_of_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="check the name"):
            DeCoPipeline.from_pretrained("owner/no-such-model", local_files_only=True)
        with pytest.raises(UserError, match="check the name"):
            DeCoPipeline.from_pretrained(tmp_path / "no" / "such" / "folder")
        with pytest.raises(UserError, match="did you mean 'revision'"):
            DeCoPipeline.from_pretrained(tmp_path, revison="main")

    def test_a_text_encoder_for_a_class_model(
        self, classes: DeCoPipeline, tmp_path: Path, encoder: Qwen3TextEncoder
    ) -> None:
        classes.save_pretrained(tmp_path / "saved")
        for given in (encoder, encoder.path, Path(encoder.path)):
            with pytest.raises(UserError, match="draws classes"):
                DeCoPipeline.from_pretrained(tmp_path / "saved", text_encoder=given)

    def test_from_the_hub(
        self, classes: DeCoPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        classes.save_pretrained(tmp_path / "saved")
        asked = {}

        def download(name: str, **options: Any) -> str:
            asked[name] = options
            return str(tmp_path / "saved")

        monkeypatch.setattr(deco_pipeline, "snapshot_download", download)
        pipeline = DeCoPipeline.from_pretrained("owner/model", revision="v1")
        assert torch.equal(draw(pipeline), draw(classes))
        patterns = ["*.json", "*.safetensors", "*.txt", "README.md"]
        assert asked == {"owner/model": {"allow_patterns": patterns, "revision": "v1"}}


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be uploaded, without a network."""
    made: list[dict[str, Any]] = []

    class Repository:
        def __init__(self, repo_id: str) -> None:
            self.repo_id = repo_id

    def create(repo_id: str, **options: Any) -> Repository:
        made.append({"created": repo_id, **options})
        return Repository(repo_id)

    def upload(**options: Any) -> str:
        folder = Path(options["folder_path"])
        made.append({**options, "files": contents(folder)})
        return "address"

    monkeypatch.setattr(deco_pipeline, "create_repo", create)
    monkeypatch.setattr(deco_pipeline, "upload_folder", upload)
    return made


class TestHub:
    def test_push_uploads_the_folder_with_its_card(
        self, classes: DeCoPipeline, tmp_path: Path, uploads: list[dict[str, Any]]
    ) -> None:
        assert classes.push_to_hub("owner/model", private=True) == "address"
        classes.save_pretrained(tmp_path / "saved")
        created, uploaded = uploads
        assert created["created"] == "owner/model" and created["private"] is True
        assert uploaded["repo_id"] == "owner/model"
        assert uploaded["files"] == contents(tmp_path / "saved")

    def test_save_and_push(
        self, classes: DeCoPipeline, tmp_path: Path, uploads: list[dict[str, Any]]
    ) -> None:
        classes.save_pretrained(tmp_path / "saved", push_to_hub=True, create_pr=True)
        assert uploads[1]["repo_id"] == "saved" and uploads[1]["create_pr"] is True
        assert (tmp_path / "saved" / "README.md").exists()

    def test_diffusers_recognises_the_folder(self, classes: DeCoPipeline, tmp_path: Path) -> None:
        classes.save_pretrained(tmp_path / "saved")
        index = DiffusionPipeline.load_config(tmp_path / "saved")
        assert index["_class_name"] == "DeCoPipeline"
        assert classes.config["transformer"] == tuple(index["transformer"])


class TestExport:
    @pytest.fixture
    def checkpoint(self, class_model: DeCoNetwork, tmp_path: Path) -> Path:
        assert class_model.card is not None
        card = replace(class_model.card, assumed=("the guidance is the published one",))
        model = DeCo(CLASSES, card)
        return save_checkpoint(
            tmp_path / "run" / "checkpoints" / "step-00000012",
            model=model,
            ema=class_model,
            card=card,
            training={"step": 12},
            projector={"weight": torch.zeros(2, 2)},
        )

    def test_the_folder(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "published"
        assert main(["export", str(tmp_path / "run"), str(folder)]) == 0
        said = capsys.readouterr().out
        assert f"wrote {folder}" in said and "licence" in said
        assert "not carried: the projector" in said and "training.pt" in said
        assert files(folder) == {"README.md", "config.json", "model_index.json", "ema.safetensors"}
        config = json.loads((folder / "config.json").read_text())
        assert config["hidden_size"] == 16 and config["card"]["sampling"]["steps"] == 4
        # It opens as a checkpoint, and as a pipeline.
        stored = load_file(checkpoint / "ema.safetensors")
        model = load_checkpoint(folder)
        assert model.card == read_card(checkpoint)
        assert all(torch.equal(stored[name], t) for name, t in model.state_dict().items())
        pipeline = DeCoPipeline.from_pretrained(folder)
        assert torch.equal(draw(pipeline), draw(DeCoPipeline(model)))
        pipeline.save_pretrained(tmp_path / "again")
        assert contents(tmp_path / "again") == contents(folder)

    def test_the_model_card(self, checkpoint: Path, tmp_path: Path) -> None:
        assert main(["export", str(checkpoint), str(tmp_path / "published")]) == 0
        path = tmp_path / "published" / "README.md"
        card = HubCard.load(path)
        assert card.data.library_name == "deco_fast"
        # The owner's choice, of which the head has the place.
        assert card.data.license is None and "\n# license:" in path.read_text()
        assert {"deco", "deco_fast"} <= set(card.data.tags)
        count = sum(p.numel() for p in DeCo(CLASSES).parameters())
        for part in (
            "# tiny",
            "images of 16×16 pixels from class labels (0 … 2)",
            "DeCoPipeline.from_pretrained(",
            f"| parameters | {count:,} (float32, ema.safetensors) |",
            "| weights | moving average, step 12 |",
            "| guidance scale | 2.0 |",
            "- the guidance is the published one",
        ):
            assert part in card.text, part

    def test_of_a_text_model(self, text_model: DeCoNetwork, tmp_path: Path) -> None:
        assert text_model.card is not None
        path = save_checkpoint(tmp_path / "run", model=text_model, card=text_model.card)
        options = ["export", str(path), str(tmp_path / "published"), "--weights", "model"]
        assert main(options) == 0
        card = HubCard.load(tmp_path / "published" / "README.md")
        assert card.data.pipeline_tag == "text-to-image"
        assert "| text encoder | Qwen3, in the folder text_encoder |" in card.text
        # The other model is opened, from where the folder lies, by the command too.
        (tmp_path / "published").rename(tmp_path / "elsewhere")
        arguments = ["--checkpoint", str(tmp_path / "elsewhere"), "--weights", "model"]
        arguments += ["--prompt", "a", "--num", "1", "--device", "cpu"]
        assert sample_command([*arguments, "--out", str(tmp_path / "drawn")]) == 0
        pipeline = DeCoPipeline.from_pretrained(tmp_path / "elsewhere")
        assert pipeline.transformer.card == replace(
            text_model.card, text_encoder=str(tmp_path / "elsewhere" / "text_encoder")
        )

    def test_refusals(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = str(tmp_path / "published")
        assert main(["export", str(tmp_path / "none"), folder]) == 2
        assert main(["export", str(checkpoint), folder]) == 0
        assert main(["export", str(checkpoint), folder]) == 2
        assert main(["export", str(checkpoint), folder, "--force"]) == 0
        assert main(["export", "", folder]) == main(["convert", str(checkpoint), ""]) == 2
        (tmp_path / "published" / "mine.txt").write_text("mine")
        assert main(["export", str(checkpoint), folder, "--force"]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 5
        assert "does not exist" in errors[0]
        assert "--force" in errors[1]
        assert errors[2] == "error: argument CHECKPOINT: is empty: name a path"
        assert errors[3] == "error: argument OUT: is empty: name a path"
        assert "mine.txt" in errors[4]

    def test_an_edited_readme_stays(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "published"
        arguments = ["export", str(checkpoint), str(folder), "--force"]
        assert main(arguments) == 0
        written = (folder / "README.md").read_text(encoding="utf-8")
        assert main(arguments) == 0
        assert not (folder / "README.new.md").exists()
        edited = written.replace("# license: its owner's choice, such as mit", "license: mit")
        (folder / "README.md").write_text(edited, encoding="utf-8")
        for _ in range(2):
            capsys.readouterr()
            assert main(arguments) == 0
            assert "README.md stays as it was: compare it with README.new.md" in (
                capsys.readouterr().out
            )
            assert (folder / "README.md").read_text(encoding="utf-8") == edited
            assert (folder / "README.new.md").read_text(encoding="utf-8") == written

    @pytest.mark.parametrize("scheme", ["", "beside:../"], ids=["a path", "beside"])
    def test_a_checkpoint_does_not_choose_what_is_published(
        self,
        text_model: DeCoNetwork,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        scheme: str,
    ) -> None:
        secret = tmp_path / "secret"
        secret.mkdir()
        (secret / "config.json").write_text('{"auths": {}}')
        assert text_model.card is not None
        place = scheme + "secret" if scheme else str(secret)
        card = replace(text_model.card, text_encoder=place)
        path = save_checkpoint(tmp_path / "run", model=None, ema=text_model, card=card)
        assert main(["export", str(path), str(tmp_path / "published")]) == 2
        error = capsys.readouterr().err
        assert "is not beside it" in error or "holds no text encoder of type qwen3" in error
        assert not (tmp_path / "published").exists()

    def test_a_text_encoder_that_is_gone(
        self,
        text_model: DeCoNetwork,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert text_model.card is not None
        card = replace(text_model.card, text_encoder=str(tmp_path / "gone"))
        path = save_checkpoint(tmp_path / "run", model=None, ema=text_model, card=card)
        assert main(["export", str(path), str(tmp_path / "published")]) == 2
        assert "restore it" in capsys.readouterr().err
        assert not (tmp_path / "published").exists()
