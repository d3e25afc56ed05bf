"""The sampling engine: the images of the plain loop, and the work that it saves."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from golden import load_model
from torch import Tensor, nn

from deco_fast import DeCo, DeCoConfig, SamplingEngine, ops, sample
from deco_fast.errors import UserError
from deco_fast.kernels.packed_linear.cpu import can_pack
from deco_fast.models import fp8
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.prepared import WeightLayout
from deco_fast.sampling import condition_table
from deco_fast.sampling.batch_size import default_batch_size, largest_batch_size
from deco_fast.sampling.run import draw
from deco_fast.solvers import SOLVERS, time_grid

CONFIG = DeCoConfig(
    hidden_size=64,
    depth=2,
    num_heads=4,
    patch_size=8,
    decoder_hidden_size=16,
    decoder_depth=2,
    num_classes=10,
)
HEIGHT, WIDTH = 32, 24
GUIDED = SamplingSettings(steps=6, guidance_scale=3.0, guidance_interval=(0.2, 0.9))


def random_model(config: DeCoConfig = CONFIG) -> DeCo:
    """With random weights throughout: a new DeCo's velocity is zero."""
    torch.manual_seed(0)
    model = DeCo(config, ModelCard(name="tiny", height=HEIGHT, width=WIDTH, sampling=GUIDED)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def plain(model: DeCo, noise: Tensor, labels: list[int], settings: SamplingSettings) -> Tensor:
    with ops.use_backend("reference"):
        return sample(model, noise, torch.tensor(labels, device=noise.device), **asdict(settings))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def noise(count: int) -> Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH)


class TestAgreement:
    """With `deco_fast.sample` on the reference ops."""

    @pytest.mark.parametrize("name", ["model_c2i_deco_p16", "model_c2i_deco_p8"])
    def test_a_hundred_steps_of_a_golden_model(self, name: str) -> None:
        model = load_model(name)
        side = 2 * model.config.patch_size
        settings = SamplingSettings(steps=100, guidance_scale=3.2, guidance_interval=(0.1, 1.0))
        start = torch.randn(2, 3, side, 2 * side)
        expected = plain(model, start, [3, 10], settings)
        engine = SamplingEngine(model, settings, height=side, width=2 * side, batch_size=2)
        # Asked for: 1e-4. Seen: 3e-7.
        assert error(engine(start, [3, 10]), expected) < 1e-5

    @pytest.mark.parametrize(
        "changes",
        [
            *({"solver": solver} for solver in SOLVERS),
            *({"solver": "adams", "order": order, "time_shift": 3.0} for order in (1, 3, 4)),
            *({"solver": solver, "steps": 1} for solver in SOLVERS),
            {"solver": "heun", "guidance_interval": (0.0, 1.0)},
            {"guidance_rescale": 0.7},
            {"guidance_scale": 1.0},
            {"guidance_interval": (0.5, 0.5)},
        ],
        ids=str,
    )
    def test_every_way_of_sampling(self, changes: dict[str, object]) -> None:
        settings = replace(GUIDED, **changes)  # type: ignore[arg-type]
        start, labels = noise(3), [0, 7, 7]

        def both(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            """By the engine and by the plain loop."""
            model = random_model().to(dtype)
            images = SamplingEngine(model, settings, batch_size=3)(start.to(dtype), labels)
            return images, plain(model, start.to(dtype), labels, settings)

        images, exact = both(torch.float64)
        assert error(images, exact) < 1e-11
        # Adams' method of high order amplifies rounding, on some processors to more than 1e-5.
        images, loop = both(torch.float32)
        assert error(images, exact) < max(1e-5, 2 * error(loop, exact))

    def test_several_threads_and_a_copy_draw_the_same(self) -> None:
        engine = SamplingEngine(random_model(), replace(GUIDED, steps=20), batch_size=2)
        starts = [noise(2) for _ in range(6)]
        expected = [engine(start, [1, 2]) for start in starts]
        with ThreadPoolExecutor(3) as pool:
            drawn = list(pool.map(lambda start: engine(start, [1, 2]), starts))
        assert all(map(torch.equal, drawn, expected))
        assert torch.equal(copy.deepcopy(engine)(starts[0], [1, 2]), expected[0])

    def test_float64(self) -> None:
        model = random_model().double()
        start = noise(2).double()
        images = SamplingEngine(model, batch_size=2)(start, [1, 2])
        assert images.dtype == torch.float64
        assert error(images, plain(model, start, [1, 2], GUIDED)) < 1e-12

    def test_bfloat16_is_as_near_to_float32_as_the_plain_loop(self) -> None:
        start, labels = noise(4), [1, 2, 3, 4]
        expected = plain(random_model(), start, labels, GUIDED)
        model = random_model().bfloat16()
        ours = error(SamplingEngine(model, batch_size=4)(start, labels), expected)
        assert ours < 1.2 * error(plain(model, start, labels, GUIDED), expected)

    def test_batches_of_any_size_and_one_after_the_other(self) -> None:
        model, start = random_model(), noise(5)
        labels = [4, 4, 0, 9, 10]
        engine = SamplingEngine(model, batch_size=3)
        images = torch.cat([engine(start[:3], labels[:3]), engine(start[3:], labels[3:])])
        assert error(images, plain(model, start, labels, GUIDED)) < 1e-5

    def test_a_table_that_holds_a_part_of_the_run(self) -> None:
        # Not bit by bit: libraries may round a product of fewer rows otherwise.
        model, start = random_model().double(), noise(2).double()
        whole = SamplingEngine(model, batch_size=2)(start, [1, 2])
        row = CONFIG.depth * 6 * CONFIG.hidden_size * 8
        for evaluations in (0, 1, 4):
            engine = SamplingEngine(model, batch_size=2, table_bytes=3 * row * evaluations)
            assert engine._table.span == max(1, evaluations)
            assert error(engine(start, [1, 2]), whole) < 1e-13

    def test_the_states_on_the_way(self) -> None:
        settings = replace(GUIDED, guidance_interval=(0.3, 0.8))
        model, start, labels = random_model().double(), noise(2).double(), torch.tensor([1, 2])
        engine = SamplingEngine(model, settings, batch_size=3)
        images = engine(start, labels.tolist())
        x, null = start, torch.full_like(labels, 10)
        velocity = torch.zeros_like(start)
        times = time_grid(settings.steps)
        states = engine.states(start, labels.tolist())
        assert not torch.is_inference_mode_enabled()
        for i, state in enumerate(states):
            assert not torch.is_inference_mode_enabled()
            assert (state.evaluation, state.t) == (i, times[i])
            torch.testing.assert_close(state.x, x, rtol=0, atol=1e-11)
            torch.testing.assert_close(state.velocity, velocity, rtol=0, atol=1e-11)
            before = x - (times[i] - times[max(0, i - 1)]) * velocity
            estimate = before + (1 - times[max(0, i - 1)]) * velocity
            torch.testing.assert_close(state.clean_estimate(), estimate, rtol=0, atol=1e-11)
            if i == settings.steps:
                break
            with torch.no_grad(), ops.use_backend("reference"):
                t = torch.full((2,), times[i], dtype=torch.float64)
                velocity = model(x, t, labels)
                if 0.3 < times[i] <= 0.8:
                    free = model(x, t, null)
                    velocity = free + settings.guidance_scale * (velocity - free)
            x = x + (times[i + 1] - times[i]) * velocity
        assert i == engine.evaluations
        assert torch.equal(state.x, images)
        assert torch.equal(state.clean_estimate(), images)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_the_last_state_is_the_images(self, solver: str) -> None:
        engine = SamplingEngine(random_model(), replace(GUIDED, solver=solver), batch_size=2)
        start = noise(2)
        images = engine(start, [1, 2])
        *way, last = engine.states(start, [1, 2])
        assert [state.evaluation for state in way] == list(range(engine.evaluations))
        assert (last.evaluation, last.t) == (engine.evaluations, 1.0)
        assert torch.equal(last.x, images)

    def test_labels_may_be_elements_of_tensors(self) -> None:
        engine, start = SamplingEngine(random_model(), batch_size=2), noise(2)
        expected = engine(start, [1, 7])
        labels = torch.tensor([1, 7])
        assert torch.equal(engine(start, labels), expected)  # type: ignore[arg-type]
        assert torch.equal(engine(start, labels.numpy()), expected)  # type: ignore[arg-type]

    def test_images_can_be_used_in_training(self) -> None:
        images = SamplingEngine(random_model(), batch_size=1)(noise(1), [0])
        (images * torch.ones(1, requires_grad=True)).sum().backward()

    @pytest.mark.slow
    @pytest.mark.parametrize("depth", [2, 9], ids=["one graph", "block by block"])
    def test_compiled(self, depth: int) -> None:
        model = random_model(replace(CONFIG, depth=depth))
        start, labels = noise(3), [0, 7, 8]
        torch.compiler.reset()
        engine = SamplingEngine(model, batch_size=2, compile=True)
        engine.warm_up()
        with torch.compiler.set_stance("fail_on_recompile"):
            images = torch.cat([engine(start[:2], labels[:2]), engine(start[2:], labels[2:])])
        assert error(images, plain(model, start, labels, GUIDED)) < 1e-5


class TestWork:
    """What is not computed."""

    def test_no_unconditional_half_outside_of_the_interval(self) -> None:
        model = random_model()
        sizes: list[int] = []
        model.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        SamplingEngine(model, batch_size=3)(noise(3), [0, 1, 2])
        # Times 0, 1/6, …, 5/6; guidance in (0.2, 0.9].
        assert sizes == [3, 3, 6, 6, 6, 6]

    def test_modulations_are_computed_once_for_distinct_classes(self) -> None:
        model = random_model()
        rows: list[int] = []
        for block in model.blocks:
            assert isinstance(block.modulation, nn.Module)
            block.modulation.register_forward_pre_hook(
                lambda _, inputs: rows.append(inputs[0].flatten(0, -2).shape[0])
            )
        engine = SamplingEngine(model, batch_size=4)
        engine(noise(4), [5, 5, 1, 5])
        steps_times_classes = GUIDED.steps * 3  # two classes and the null class
        assert rows == [steps_times_classes] * CONFIG.depth
        engine(noise(4), [1, 1, 1, 5])  # the same classes: nothing to do
        assert rows == [steps_times_classes] * CONFIG.depth

    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_evaluations_are_as_many_as_calls(self, solver: str, steps: int) -> None:
        model = random_model()
        calls: list[None] = []
        model.decoder.register_forward_pre_hook(lambda *_: calls.append(None))
        engine = SamplingEngine(model, replace(GUIDED, solver=solver, steps=steps), batch_size=1)
        engine(noise(1), [0])
        assert len(calls) == engine.evaluations

    @pytest.mark.parametrize("depth", [2, 9], ids=["one graph", "block by block"])
    def test_as_many_compiled_engines_as_one_likes(
        self, depth: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torch gives up at the eighth compilation of the same code."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        torch.compiler.reset()
        model = random_model(replace(CONFIG, depth=depth))
        for batch_size in range(1, 7):
            engine = SamplingEngine(model, batch_size=batch_size, compile=True)
            engine.warm_up()
        start = noise(2)
        assert error(engine(start, [1, 2]), plain(model, start, [1, 2], GUIDED)) < 1e-5

    @pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("depth", [2, 9], ids=["one graph", "block by block"])
    def test_its_copy_of_the_weights_goes_with_it(
        self, depth: int, compile: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At once, and not when Python looks for objects that refer to one another in a circle."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        torch.compiler.reset()
        model = random_model(replace(CONFIG, depth=depth))
        gc.collect()
        gc.disable()
        try:
            engine = SamplingEngine(model, batch_size=1, compile=compile)
            engine.warm_up()
            engine(noise(1), [0])
            died = weakref.ref(engine)
            weights = [weakref.ref(tensor) for tensor in engine._blocks.parameters()]
            weights += [weakref.ref(tensor) for tensor in engine._blocks.buffers()]
            assert len(weights) >= depth
            del engine
            assert died() is None
            if compile:  # torch's compiler has circles of its own
                gc.collect()
            assert [weight() for weight in weights] == [None] * len(weights)
        finally:
            gc.enable()

    def test_a_batch_that_failed_leaves_nothing_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, start = SamplingEngine(random_model(), batch_size=2), noise(2)
        expected = engine(start, [1, 2])
        fold, calls = condition_table.fold_norms, []

        def run_out(*arguments: Any) -> Tensor:
            calls.append(arguments)
            if len(calls) == CONFIG.depth:
                raise torch.OutOfMemoryError("out of memory")
            return fold(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(condition_table, "fold_norms", run_out)
            with pytest.raises(torch.OutOfMemoryError):
                engine(start, [3, 4])
        assert torch.equal(engine(start, [1, 2]), expected)


class TestLayout:
    def test_wide_layers_are_packed_on_a_cpu_that_can(self) -> None:
        cpu = torch.device("cpu")
        assert not WeightLayout.best(cpu, torch.float32, 128).packed
        assert not WeightLayout.best(torch.device("cuda"), torch.bfloat16, 1152).packed
        assert not WeightLayout.best(cpu, torch.float64, 1152).packed

    def test_a_forced_backend_is_obeyed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("deco_fast.models.prepared.can_pack", lambda dtype: True)
        cpu = torch.device("cpu")
        assert WeightLayout.best(cpu, torch.bfloat16, 1152).packed
        with ops.use_backend("reference"):
            assert not WeightLayout.best(cpu, torch.bfloat16, 1152).packed

    def test_float32_is_packed_with_avx512_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("deco_fast.models.prepared.can_pack", lambda dtype: True)
        for found in (False, True):
            monkeypatch.setattr("deco_fast.models.prepared.has_avx512", lambda found=found: found)
            layouts = [
                WeightLayout.best(torch.device("cpu"), dtype, 1152)
                for dtype in (torch.float32, torch.bfloat16)
            ]
            assert [layout.packed for layout in layouts] == [found, True]

    def test_three_products_are_torch_s_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("deco_fast.models.prepared.can_pack", lambda dtype: True)
        monkeypatch.setattr("deco_fast.models.prepared.has_avx512", lambda: True)
        unit = True
        monkeypatch.setattr("deco_fast.models.prepared.can_split", lambda: unit)
        cpu = torch.device("cpu")
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            assert WeightLayout.best(cpu, torch.float32, 1152) == WeightLayout(packed=True)
            torch.set_float32_matmul_precision("high")
            assert WeightLayout.best(cpu, torch.float32, 1152).three_products
            assert not WeightLayout.best(cpu, torch.bfloat16, 1152).three_products
            unit = False
            assert WeightLayout.best(cpu, torch.float32, 1152) == WeightLayout(packed=True)
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_packed_engine_agrees(self, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("deco_fast.models.prepared.has_avx512", lambda: True)
        monkeypatch.setattr("deco_fast.models.prepared.can_split", lambda: can_pack(torch.bfloat16))
        wide = replace(CONFIG, hidden_size=512, num_heads=8, depth=1)
        if not WeightLayout.best(torch.device("cpu"), torch.float32, 512).packed:
            pytest.skip("oneDNN has no block products for this processor")
        model, start = random_model(wide), noise(2)
        torch.set_float32_matmul_precision(precision)
        try:
            engine = SamplingEngine(model, batch_size=2)
        finally:
            torch.set_float32_matmul_precision("highest")
        images = engine(start, [1, 2])
        assert error(images, plain(model, start, [1, 2], GUIDED)) < 1e-4


class TestBadInput:
    def test_arguments(self) -> None:
        model = random_model()
        arguments: list[dict[str, Any]] = [
            *({"batch_size": 0}, {"height": 0}, {"width": -8}, {"height": 16.0}),
            *({"distinct_conditions": 0}, {"distinct_conditions": -1}),
        ]
        for argument in arguments:
            ((name, number),) = argument.items()
            message = f"^{name} must be a whole number, at least 1, not {number}$"
            with pytest.raises(ValueError, match=message):
                SamplingEngine(model, **argument)
        with pytest.raises(ValueError, match="a DataParallel is no DeCo network: pass the network"):
            SamplingEngine(torch.nn.DataParallel(model))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="guidance_rescale must be 0 … 1, not 5"):
            SamplingEngine(model, replace(GUIDED, guidance_rescale=5))
        with pytest.raises(ValueError, match="30×24 is not divisible by the patch size 8"):
            SamplingEngine(model, height=30)
        with pytest.raises(ValueError, match="unknown solver 'eular'"):
            SamplingEngine(model, replace(GUIDED, solver="eular"))
        model.card = None
        with pytest.raises(ValueError, match="no card: give settings, height and width"):
            SamplingEngine(model)

    def test_calls(self) -> None:
        engine = SamplingEngine(random_model(), batch_size=2)
        with pytest.raises(ValueError, match=r"up to 2 images of \(3, 32, 24\)"):
            engine(noise(3), [0, 1, 2])
        with pytest.raises(ValueError, match="2 noises but 1 conditions"):
            engine(noise(2), [0])
        with pytest.raises(ValueError, match="must be a list, one for each noise, not a str"):
            engine(noise(2), "ab")
        with pytest.raises(ValueError, match="label 11 does not exist: 0 … 9, or 10"):
            engine(noise(1), [11])

    def test_fp8_needs_a_gpu(self) -> None:
        with pytest.raises(UserError, match="fp8 needs a GPU of sm_89 or later, not cpu"):
            SamplingEngine(random_model(), fp8=True)
        assert "--dtype bf16" in (fp8.fp8_problem(torch.device("cpu")) or "")


class TestBatchSize:
    def test_default_is_never_zero(self) -> None:
        assert default_batch_size(torch.device("cpu"), 32, 32) == 64
        assert default_batch_size(torch.device("cpu"), 512, 512) == 1
        assert default_batch_size(torch.device("cuda"), 256, 256) == 32

    @pytest.mark.parametrize(
        ("fitting", "limit", "expected", "tried"),
        [
            (1000, 50_000, 256, [256]),
            (100, 50_000, 64, [256, 128, 64]),
            (1000, 40, 40, [64]),
            (1, 50_000, 1, [256, 128, 64, 32, 16, 8, 4, 2, 1]),
            (5, 1, 1, [1]),
        ],
    )
    def test_largest_that_fits(
        self, fitting: int, limit: int, expected: int, tried: list[int]
    ) -> None:
        sizes: list[int] = []

        def run(size: int) -> None:
            sizes.append(size)
            if size > fitting:
                raise torch.OutOfMemoryError

        assert largest_batch_size(run, 256, 256, limit) == expected
        assert sizes == tried

    def test_not_even_one(self) -> None:
        def run(size: int) -> None:
            raise torch.OutOfMemoryError

        with pytest.raises(torch.OutOfMemoryError):
            largest_batch_size(run, 512, 512, 10)


@pytest.mark.gpu
class TestGpu:
    """The same on CUDA: graphs, no waiting, fp8."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("compile", [False, True])
    @pytest.mark.parametrize("depth", [2, 9])
    def test_agrees_with_the_plain_loop(
        self, dtype: torch.dtype, compile: bool, depth: int
    ) -> None:
        start, labels = noise(5).cuda(), [0, 3, 3, 9, 10]
        model = random_model(replace(CONFIG, depth=depth)).to("cuda", dtype)
        expected = plain(model, start, labels, GUIDED)
        engine = SamplingEngine(model, batch_size=4, compile=compile)
        engine.warm_up()
        images = torch.cat([engine(start[:4], labels[:4]), engine(start[4:], labels[4:])])
        assert error(images, expected) < (1e-4 if dtype == torch.float32 else 5e-2)

    def test_the_host_never_waits_inside_the_loop(self) -> None:
        engine = SamplingEngine(random_model().cuda(), batch_size=2, compile=True)
        engine.warm_up()
        start = noise(2).cuda()
        engine(start, [1, 2])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine(start, [3, 4])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_batches_drawn_ahead_come_in_order(self) -> None:
        model = random_model().cuda()
        drawn = list(draw(SamplingEngine(model, batch_size=2, compile=True), range(5), seed=3))
        assert [indices for indices, _ in drawn] == [[0, 1], [2, 3], [4]]
        alone = [
            images
            for i in range(5)
            for _, images in draw(SamplingEngine(model, batch_size=1), [i], [i], seed=3)
        ]
        difference = torch.cat([images for _, images in drawn]).int() - torch.cat(alone).int()
        assert difference.abs().max() <= 2

    def test_fp8_is_near_bf16(self) -> None:
        if problem := fp8.fp8_problem(torch.device("cuda")):
            pytest.skip(problem)
        wide = replace(CONFIG, hidden_size=512, num_heads=8)
        model, start = random_model(wide).to("cuda", torch.bfloat16), noise(4).cuda()
        labels = [1, 2, 3, 4]
        expected = SamplingEngine(model, batch_size=4)(start, labels)
        images = SamplingEngine(model, batch_size=4, fp8=True, compile=True)(start, labels)
        assert 0 < error(images, expected) < 0.15
