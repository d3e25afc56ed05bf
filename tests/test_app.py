"""The page without a browser: what it accepts, what it draws, and how the command starts."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import tiny_qwen3
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from deco_fast import DeCo, DeCoConfig, DeCoT2I, DeCoT2IConfig
from deco_fast.app import served as served_module
from deco_fast.app import server
from deco_fast.app.drawing import Drawn, Progress, draw_request
from deco_fast.app.limits import Limits
from deco_fast.app.page import build_page
from deco_fast.app.pictures import FRAMES, GridPicture, is_frame, save_animation
from deco_fast.app.request import DrawRequest, check_request
from deco_fast.app.served import Origin, ServedModel
from deco_fast.app.visitors import Visitors
from deco_fast.checkpoint import save_checkpoint, save_weights
from deco_fast.cli import app
from deco_fast.cli.sample import main as sample
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.errors import UserError
from deco_fast.interop.convert import convert
from deco_fast.models.build import build_network
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import PixelDiTConfig
from deco_fast.models.presets import PRESETS, Preset
from deco_fast.sampling.images import to_uint8

CLASS_CONFIG = DeCoConfig(
    hidden_size=32,
    depth=1,
    num_heads=2,
    patch_size=8,
    decoder_hidden_size=16,
    decoder_depth=1,
    num_classes=10,
)
TEXT_CONFIG = tiny_qwen3.MODEL_CONFIG
SETTINGS = SamplingSettings(
    solver="adams", steps=4, guidance_scale=3.0, guidance_interval=(0.1, 0.9), time_shift=3.0
)
FIELDS: dict[str, Any] = {
    "classes": [],
    "num": 5,
    "seed": "7",
    "height": 16,
    "width": 24,
    "solver": "euler",
    "order": 2,
    "steps": 4,
    "guidance": 2.5,
    "time_shift": 1.5,
}
TEXT_FIELDS = {**FIELDS, "prompt": "a cat", "negative_prompt": "-blurry 'n grey"}


def served_model(folder: Path, config: DeCoConfig | DeCoT2IConfig, **limits: Any) -> ServedModel:
    """With random weights throughout, saved in a folder."""
    text_encoder = str(tiny_qwen3.folder()) if isinstance(config, DeCoT2IConfig) else None
    card = ModelCard("tiny", 16, 16, sampling=SETTINGS, text_encoder=text_encoder)
    torch.manual_seed(0)
    model = (DeCoT2I if isinstance(config, DeCoT2IConfig) else DeCo)(config, card).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    checkpoint = save_checkpoint(folder / "tiny", model=None, ema=model, card=card)
    encoder = None
    if isinstance(config, DeCoT2IConfig):
        encoder = Qwen3TextEncoder(str(text_encoder), length=8, size=config.text_size)
    return ServedModel(model, card, Origin(str(checkpoint)), encoder, Limits(**limits))


@pytest.fixture
def by_class(tmp_path: Path) -> ServedModel:
    return served_model(tmp_path, CLASS_CONFIG)


@pytest.fixture
def by_text(tmp_path: Path) -> ServedModel:
    return served_model(tmp_path, TEXT_CONFIG)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check(fields: dict[str, Any], is_text: bool = False, **limits: Any) -> DrawRequest:
    config = TEXT_CONFIG if is_text else CLASS_CONFIG
    return check_request(fields, config, SETTINGS, Limits(**limits))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


class TestRequest:
    def test_what_is_entered_is_drawn(self) -> None:
        request = check({**FIELDS, "classes": [3, 9]})
        assert request.job.labels == [3, 9, 3, 9, 3]
        assert (request.num, request.seed, request.height, request.width) == (5, 7, 16, 24)
        # What the page does not ask is the model's.
        assert request.settings == replace(
            SETTINGS, solver="euler", steps=4, guidance_scale=2.5, time_shift=1.5
        )
        assert request.captions[1] == "seed 7, image 1, class 9"

    def test_numbers_as_a_browser_sends_them(self) -> None:
        changes = {"num": 5.0, "height": 16.0, "guidance": 1, "seed": f" {2**64 - 1} "}
        request = check({**FIELDS, **changes, "classes": None})
        assert (request.num, request.height, request.seed) == (5, 16, 2**64 - 1)
        assert request.job.labels == [0, 1, 2, 3, 4]

    def test_prompts(self) -> None:
        request = check({**TEXT_FIELDS, "height": 20}, is_text=True)
        assert request.job.conditions == ["a cat"] * 5
        assert request.negative_prompt == "-blurry 'n grey"
        assert request.captions[4] == "seed 7, image 4"
        empty = check({**TEXT_FIELDS, "prompt": None, "negative_prompt": ""}, is_text=True)
        assert empty.job.prompts == [""]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num": None}, "number of images is empty: enter a number"),
            ({"num": 0}, "number of images must be 1 … 64, not 0"),
            ({"num": 65}, "number of images must be 1 … 64, not 65"),
            ({"num": 2.5}, "number of images must be a whole number, not '2.5'"),
            ({"seed": ""}, "seed is empty"),
            ({"seed": "-1"}, "seed must be 0 … 18446744073709551615, not -1"),
            ({"seed": str(2**64)}, "seed must be 0 …"),
            ({"seed": "seven"}, "seed must be a whole number, not 'seven'"),
            ({"seed": "9" * 5000}, "seed is not a number of at most 40 digits"),
            ({"height": 18}, "height 18 is not divisible by the patch size 8: use 16"),
            ({"width": 1e12}, "16×1000000000000 is too large: at most 4,194,304 pixels"),
            ({"num": 64, "height": 512, "width": 256}, "64 images of 512×256 are too many at"),
            ({"solver": "midpoint"}, "unknown solver 'midpoint'"),
            ({"solver": None}, "unknown solver 'None'"),
            ({"order": 5}, "order must be 1 … 4, not 5"),
            ({"steps": 1001}, "steps must be 1 … 1000, not 1001"),
            ({"steps": "1e3"}, "steps must be a whole number"),
            ({"guidance": float("nan")}, "guidance must be finite"),
            ({"guidance": 101}, "guidance must be -100 … 100, not 101"),
            ({"time_shift": 0}, "time shift must be 0.01 … 100, not 0"),
            ({"classes": [10]}, "class must be 0 … 9, not 10"),
            ({"classes": ["cat"]}, "class must be a whole number, not 'cat'"),
        ],
    )
    def test_wrong_input_is_one_line(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError) as error:
            check({**FIELDS, **change})
        assert message in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 200

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"height": 18}, "height 18 is not one of 16 … 128, divisible by 4: use 16"),
            ({"prompt": "x" * 100_001}, "the prompt has 100,001 characters: at most 100,000"),
            ({"prompt": "a \ud800"}, r"the prompt is not Unicode: character 3, in 'a \\ud800'"),
            ({"negative_prompt": "x" * 100_001}, "the negative prompt has 100,001 characters"),
        ],
    )
    def test_wrong_input_for_a_text_model(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            check({**TEXT_FIELDS, **change}, is_text=True)

    def test_the_limit_says_how_many_fit(self) -> None:
        assert check(FIELDS, pixels=5 * 16 * 24).num == 5
        with pytest.raises(UserError, match="5 images of 16×24 are too many at once: at most 4"):
            check(FIELDS, pixels=5 * 16 * 24 - 1)


def draw(served: ServedModel, fields: dict[str, Any], folder: Path) -> tuple[list[Progress], Drawn]:
    request = check_request(fields, served.model.config, served.card.sampling, served.limits)
    *moments, drawn = draw_request(served, request, folder)
    assert isinstance(drawn, Drawn)
    return [moment for moment in moments if isinstance(moment, Progress)], drawn


class TestDrawing:
    @pytest.mark.parametrize("batch_size", [64, 2])
    @pytest.mark.parametrize("fields", [FIELDS, TEXT_FIELDS], ids=["class", "text"])
    def test_the_command_shown_draws_the_same_bits(
        self,
        fields: dict[str, Any],
        batch_size: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(served_module, "default_batch_size", lambda *size: batch_size)
        served = served_model(tmp_path, TEXT_CONFIG if "prompt" in fields else CLASS_CONFIG)
        (tmp_path / "page").mkdir()
        _, drawn = draw(served, fields, tmp_path / "page")
        program, script, *arguments = shlex.split(drawn.command)
        assert (program, script) == ("python", "sample.py")
        assert sample([*arguments, "--out", "again"]) == 0
        assert len(drawn.images) == 5
        for path in drawn.images:
            assert pixels(path).shape == (16, 24, 3)
            np.testing.assert_array_equal(pixels(path), pixels(Path("again") / path.name))

    def test_nothing_is_drawn_after_the_end(self, by_class: ServedModel, tmp_path: Path) -> None:
        request = check_request(
            FIELDS, by_class.model.config, by_class.card.sampling, by_class.limits
        )
        moments = draw_request(by_class, request, tmp_path)
        assert isinstance(next(moments), Progress)
        by_class.close()
        assert not list(moments)
        assert not list(draw_request(by_class, request, tmp_path))

    def test_what_is_seen_on_the_way(
        self, by_class: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(served_module, "default_batch_size", lambda *size: 3)
        moments, drawn = draw(by_class, FIELDS, tmp_path)
        assert [(moment.done, moment.total) for moment in moments] == [
            *((done, 8) for done in range(5)),
            *((done, 8) for done in range(4, 9)),
        ]
        previews = [np.asarray(moment.preview) for moment in moments]
        assert len({preview.tobytes() for preview in previews}) == 10
        np.testing.assert_array_equal(previews[-1], np.asarray(drawn.preview))
        with Image.open(drawn.animation) as animation:
            assert animation.format == "WEBP"
            assert animation.n_frames == 5
            assert animation.size == drawn.preview.size

    def test_the_archive(self, by_class: ServedModel, tmp_path: Path) -> None:
        _, drawn = draw(by_class, FIELDS, tmp_path)
        assert drawn.archive.name == "tiny-euler4-seed7.zip"
        with zipfile.ZipFile(drawn.archive) as archive:
            images = {f"{i:06d}-class{i}.png" for i in range(5)}
            assert set(archive.namelist()) == images | {"settings.json", "trajectory.webp"}
            settings = json.loads(archive.read("settings.json"))
        assert settings["seed"] == 7
        assert settings["command"] == drawn.command

    def test_a_checkpoint_does_not_choose_where_files_go(
        self, by_class: ServedModel, tmp_path: Path
    ) -> None:
        (tmp_path / "in").mkdir()
        by_class.card = replace(by_class.card, name="../../out/x")
        _, drawn = draw(by_class, FIELDS, tmp_path / "in")
        assert drawn.archive == tmp_path / "in" / ".._.._out_x-euler4-seed7.zip"

    def test_prompts_that_are_cut_are_named(self, by_text: ServedModel, tmp_path: Path) -> None:
        _, drawn = draw(by_text, {**TEXT_FIELDS, "prompt": "x" * 100_000, "num": 1}, tmp_path)
        assert drawn.notes[0].startswith("cut: of 100,000 tokens the first 8 are used: 'xxx")
        assert len(drawn.notes) == 2

    def test_one_engine_is_kept(self, by_class: ServedModel) -> None:
        request = check(FIELDS)
        engine = by_class.engine(request)
        assert by_class.engine(replace(request, seed=8)) is engine
        assert by_class.engine(replace(request, height=8)) is not engine

    def test_a_stopped_request_ends_when_the_next_one_begins(
        self, by_class: ServedModel, tmp_path: Path
    ) -> None:
        for name in ("alone", "stopped", "next"):
            (tmp_path / name).mkdir()
        fields = {**FIELDS, "seed": 8}
        _, alone = draw(by_class, fields, tmp_path / "alone")
        stopped = draw_request(by_class, check(FIELDS), tmp_path / "stopped")
        next(stopped)
        following = draw_request(by_class, check(fields), tmp_path / "next")
        next(following)
        assert list(stopped) == []
        *_, drawn = following
        assert isinstance(drawn, Drawn)
        for ours, expected in zip(drawn.images, alone.images, strict=True):
            np.testing.assert_array_equal(pixels(ours), pixels(expected))

    def test_stopping(self, by_class: ServedModel, tmp_path: Path) -> None:
        answers = iter([False, False, True])
        moments = list(
            draw_request(by_class, check(FIELDS), tmp_path, is_stopped=lambda: next(answers))
        )
        assert [type(moment) for moment in moments] == [Progress, Progress]
        assert list(tmp_path.glob("*.zip")) == []

    def test_time_and_numbers_have_limits(self, by_class: ServedModel, tmp_path: Path) -> None:
        by_class.limits = Limits(seconds=-1)
        with pytest.raises(UserError, match="given up after -1 s, the limit of this page"):
            draw(by_class, FIELDS, tmp_path)
        by_class.limits = Limits()
        with torch.no_grad():
            by_class.model.patch_embedder.weight[0] = torch.nan
        with pytest.raises(UserError, match="image 0 is not finite"):
            draw(by_class, FIELDS, tmp_path)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError(),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        ],
        ids=["cuda", "cpu"],
    )
    def test_no_memory_is_a_message(
        self,
        error: Exception,
        by_class: ServedModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def no_memory(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(served_module, "SamplingEngine", no_memory)
        with pytest.raises(UserError, match="there is no memory for 16×24: draw fewer or"):
            draw(by_class, FIELDS, tmp_path)


def test_only_a_visitor_with_a_request_can_stop_one() -> None:
    visitors = Visitors()
    visitors.stop("a")
    a, b = visitors.begin("a"), visitors.begin("b")
    assert not visitors.is_stopped("a", a)
    visitors.stop("a")
    assert (visitors.is_stopped("a", a), visitors.is_stopped("b", b)) == (True, False)
    assert not visitors.is_replaced("a", a)
    visitors.end("a", a)
    assert not visitors.is_stopped("a", visitors.begin("a"))


def test_a_request_takes_the_place_of_the_one_before() -> None:
    visitors = Visitors()
    first = visitors.begin("a")
    visitors.stop("a")
    second = visitors.begin("a")
    assert (visitors.is_stopped("a", first), visitors.is_stopped("a", second)) == (True, False)
    assert (visitors.is_replaced("a", first), visitors.is_replaced("a", second)) == (True, False)
    visitors.end("a", first)
    assert not visitors.is_stopped("a", second)
    visitors.stop("a")
    assert visitors.is_stopped("a", second)


class TestPage:
    VALUES = ("a cat", "", 2, "7", 16, 16, 6, 2.5, "euler", 2, 1.5)

    @pytest.fixture(autouse=True)
    def _temporary_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))

    @pytest.fixture
    def functions(self, by_text: ServedModel) -> dict[str, Callable[..., Any]]:
        """What the buttons call."""
        page = build_page(by_text)
        (draw,) = (fn for fn in page.fns.values() if fn.api_name == "draw")
        assert draw.trigger_mode == "multiple"
        drawing = [fn.concurrency_id for fn in page.fns.values() if fn.types_generator]
        assert drawing == ["draw", "draw"]
        # A heartbeat would take a connection of each window, and a browser has six for a site.
        assert not page.get_config_file()["connect_heartbeat"]
        return {str(fn.api_name): fn.fn for fn in page.fns.values() if fn.fn is not None}

    @staticmethod
    def statuses(moments: Iterator[dict[Any, Any]]) -> Iterator[str]:
        for moment in moments:
            for output, value in moment.items():
                if output.elem_id == "status":
                    yield str(value)

    def test_what_follows_a_stop(self, functions: dict[str, Callable[..., Any]]) -> None:
        begin, generate, end = (functions[name] for name in ("begin", "draw", "end"))
        visitor = SimpleNamespace(session_hash="a")
        (said, first), values = begin(visitor, *self.VALUES), self.VALUES
        assert said == "waiting for its turn"
        stopped = self.statuses(generate(visitor, *values, first))
        assert next(stopped) == "preparing" and "evaluation 0" in next(stopped)
        end(visitor)
        _, second = begin(visitor, *values)
        # Of the one that comes to its end nothing is shown in the place of the next.
        assert list(stopped) == []
        following = self.statuses(generate(visitor, *values, second))
        assert next(following) == "preparing" and "evaluation 0" in next(following)
        end(visitor)
        assert list(following) == ["stopped"]
        _, third = begin(visitor, *values)
        *_, last = self.statuses(generate(visitor, *values, third))
        assert last.startswith("drawn: 2 of 16×16")

    def test_what_was_shown_does_not_fill_the_disk(self, by_text: ServedModel) -> None:
        page = build_page(by_text)
        assert page.delete_cache is not None and sum(page.delete_cache) < 2 * 3600
        (preview,) = (b for b in page.blocks.values() if getattr(b, "elem_id", "") == "preview")
        assert isinstance(preview, gr.Image)
        moment = GridPicture(1, 512, 512)
        moment.set([0], torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)))
        shown = preview.postprocess(moment.picture())
        assert shown is not None and shown.path is not None
        assert Path(shown.path).stat().st_size < 300_000

    def test_a_stop_while_it_waits(self, functions: dict[str, Callable[..., Any]]) -> None:
        visitor = SimpleNamespace(session_hash="a")
        _, ticket = functions["begin"](visitor, *self.VALUES)
        functions["end"](visitor)
        moments = functions["draw"](visitor, *self.VALUES, ticket)
        assert list(self.statuses(moments)) == ["stopped"]


class TestPictures:
    @pytest.mark.parametrize("evaluations", [1, 2, 5, FRAMES, 25, 49, 100, 1999])
    def test_the_moments_that_are_shown(self, evaluations: int) -> None:
        shown = [i for i in range(evaluations + 1) if is_frame(i, evaluations)]
        assert shown[0] == 0
        assert shown[-1] == evaluations
        assert len(shown) == min(evaluations, FRAMES) + 1
        gaps = np.diff(shown)
        assert gaps.max() - gaps.min() <= 1

    def test_small_images_are_enlarged_by_a_whole_factor(self) -> None:
        images = torch.rand(3, 3, 8, 16) * 2 - 1
        grid = GridPicture(4, 8, 16)
        grid.set([0, 1, 3], images)
        picture = np.asarray(grid.picture())
        assert picture.shape == (18 * 15, 34 * 15, 3)
        single = to_uint8(images).numpy()
        np.testing.assert_array_equal(picture[7 : 8 * 15 : 15, 18 * 15 + 7 :: 15], single[1])
        assert (picture[10 * 15 :, : 16 * 15] == 255).all()

    def test_large_images_are_reduced(self) -> None:
        grid = GridPicture(4, 512, 1024)
        grid.set([0], torch.full((1, 3, 512, 1024), 2.0))
        grid.set([3], torch.full((1, 3, 512, 1024), -2.0))
        picture = np.asarray(grid.picture())
        assert picture.shape == (258, 514, 3)
        assert (picture[:128, :256] == 255).all()
        assert (picture[130:, 258:] == 0).all()

    def test_the_animation_rests_on_the_image(self, tmp_path: Path) -> None:
        pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]
        save_animation(pictures, tmp_path / "a.webp")
        with Image.open(tmp_path / "a.webp") as animation:
            durations = []
            for frame in range(animation.n_frames):
                animation.seek(frame)
                animation.load()
                durations.append(animation.info["duration"])
            assert animation.info["loop"] == 0
        assert durations == [80, 80, 2000]


def test_a_program_can_ask_as_well(
    by_text: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    page = build_page(by_text)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False)
    try:
        client = Client(address, verbose=False, download_files=str(tmp_path / "downloads"))
        endpoints = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
        # No more than what the page asks for, and no ticket.
        assert {name: len(of["parameters"]) for name, of in endpoints.items()} == {"/generate": 11}
        names = [of["parameter_name"] for of in endpoints["/generate"]["parameters"]]
        assert names == [
            *("prompt", "negative_prompt", "num", "seed", "height", "width", "steps"),
            *("guidance", "solver", "order", "time_shift"),
        ]

        def ask(num: int) -> Any:
            return client.predict(
                "a cat", "", num, "7", 16, 24, 4, 2.5, "euler", 2, 1.5, api_name="/generate"
            )

        status, _, _, gallery, archive, command = ask(5)
        assert status == "drawn: 5 of 16×24, seed 7"
        assert len(gallery) == 5
        assert sample([*shlex.split(command)[2:], "--out", "again"]) == 0
        with zipfile.ZipFile(archive["value"] if isinstance(archive, dict) else archive) as content:
            for i in range(5):
                name = f"{i:06d}-prompt0.png"
                ours = np.asarray(Image.open(io.BytesIO(content.read(name))))
                np.testing.assert_array_equal(ours, pixels(Path("again") / name))
        with pytest.raises(AppError, match="number of images must be 1 … 64, not 65"):
            ask(65)
    finally:
        page.close()


class TestCommand:
    @pytest.fixture
    def served(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
        """What would be put on a port."""
        calls: list[Any] = []
        monkeypatch.setattr(server, "serve", lambda *arguments: calls.append(arguments))
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        yield calls

    def test_without_a_checkpoint_it_opens_the_shipped_digits(
        self, served: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert app.main(["--device", "cpu"]) == 0
        ((model, host, port, _),) = served
        assert (model.card.name, host, port) == ("deco-digits", "127.0.0.1", None)
        assert "(ships with the package)" in capsys.readouterr().out

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM that a program can catch")
    def test_a_service_that_is_stopped_leaves_nothing_behind(self, tmp_path: Path) -> None:
        root, temporary = Path(app.__file__).parents[2], tmp_path / "temporary"
        temporary.mkdir()
        process = subprocess.Popen(
            [sys.executable, root / "app.py", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("page ") for line in lines)
        assert list(temporary.glob("deco-app-*"))
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
        assert process.returncode in (0, 130)
        assert "Traceback" not in rest
        assert not list(temporary.glob("deco-app-*"))

    def test_a_configuration_brings_size_and_settings(
        self, by_class: ServedModel, served: list[Any]
    ) -> None:
        checkpoint = by_class.origin.checkpoint
        model = "".join(f"  {key}: {value}\n" for key, value in vars(CLASS_CONFIG).items())
        Path("run.yaml").write_text(
            f"name: mine\nmodel:\n{model}"
            "data: {dataset: digits, height: 40, width: 40}\n"
            "training: {steps: 1}\nsampling: {steps: 9, solver: heun}\n"
        )
        options = ["--config", "run.yaml", "--checkpoint", checkpoint, "--device", "cpu"]
        assert app.main([*options, "--host", "localhost", "--max-pixels", "9"]) == 0
        ((model, host, _, _),) = served
        assert (model.card.height, model.card.sampling.solver, host) == (40, "heun", "localhost")
        assert model.limits == Limits(pixels=9)
        assert model.origin.checkpoint == checkpoint

    def test_a_preset_tells_what_a_published_file_does_not(
        self, served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = PixelDiTConfig(
            hidden_size=32, depth=1, num_heads=2, patch_size=8, num_classes=10, prediction="image"
        )
        card = ModelCard("jit", 16, 16, prediction="image")
        monkeypatch.setitem(PRESETS, "jit-l", Preset(config, card))
        save_weights("ours.safetensors", build_network(config, card), card)
        convert("ours.safetensors", "ours.ckpt")
        published = torch.load("ours.ckpt", weights_only=True)
        del published["deco_fast"]
        torch.save(published, "jit.ckpt")
        options = ["--checkpoint", "jit.ckpt", "--preset", "jit-l", "--device", "cpu"]
        assert app.main(options) == 0
        ((model, *_),) = served
        assert (model.model.config, replace(model.card, step=None)) == (config, card)
        (tmp_path / "page").mkdir()
        _, drawn = draw(model, {**FIELDS, "num": 1}, tmp_path / "page")
        assert sample([*shlex.split(drawn.command)[2:], "--out", "again"]) == 0
        (image,) = drawn.images
        np.testing.assert_array_equal(pixels(image), pixels(Path("again") / image.name))

    def test_a_run_is_shown_as_the_checkpoint_that_it_was(
        self, by_class: ServedModel, served: list[Any]
    ) -> None:
        Path("run/checkpoints").mkdir(parents=True)
        newest = Path(by_class.origin.checkpoint).rename("run/checkpoints/step-00000007")
        assert app.main(["--checkpoint", "run", "--device", "cpu"]) == 0
        ((model, *_),) = served
        assert model.origin.checkpoint == str(newest)

    def test_a_shipped_one_is_shown_by_its_name(self, served: list[Any]) -> None:
        assert app.main(["--checkpoint", "deco-digits", "--device", "cpu"]) == 0
        ((model, *_),) = served
        assert model.origin.checkpoint == "deco-digits"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--checkpoint nowhere", "nowhere does not exist"),
            ("--config c2i_xl_256", "of --config c2i_xl_256 (hidden_size 128 and not 1152"),
            ("--config nope", "unknown configuration 'nope'"),
            ("--preset deco-xl", "name another preset, or leave it out"),
            ("--preset deco-xl --config c2i_xl_256", "not allowed with argument"),
            ("--port 0", "--port: must be 1 … 65535, not 0"),
            ("--host 203.0.113.7", "--host 203.0.113.7 cannot be had"),
            ("--host no..address", "--host no..address is no address: use 127.0.0.1"),
            ("--max-images 0", "--max-images: must be at least 1"),
            ("--devise cpu", "unknown option '--devise'; did you mean '--device'?"),
            ("--device tpux", "unknown device 'tpux'"),
            ("--dtype fp9", "did you mean 'fp8'?"),
        ],
    )
    def test_wrong_options_are_one_line(
        self, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert app.main(arguments.split()) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1

    def test_without_gradio(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert app.main([]) == 2
        assert capsys.readouterr().err == (
            "error: the page needs the package gradio: pip install 'deco-fast[app]'\n"
        )
