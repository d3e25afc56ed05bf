"""The sampling engine: a model prepared once for a way of sampling, then any number of batches.

The same images as `deco_fast.sample`, up to rounding. What can be known before the loop is done
before it: times, solver weights (`schedule`), modulations, keys and values of the text
(`condition_table`), layouts of the weights (`deco_fast.models.prepared`). One evaluation in the
loop is the DiT, the fused pixel decoder, and one pass for guidance and solver. Outside of the
guidance interval there is no unconditional half. The host gives orders and never waits for an
answer.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deco_fast.compiling import compile_apart
from deco_fast.conditioning.qwen3 import EncodeText
from deco_fast.guidance import guide
from deco_fast.kernels.layout import patchify
from deco_fast.models.card import SamplingSettings
from deco_fast.models.dit import DiTBlock, JointBlock
from deco_fast.models.fp8 import to_fp8
from deco_fast.models.network import DeCoNetwork, check_bare
from deco_fast.models.prepared import PreparedBlock, WeightLayout, prepared_rotary_table
from deco_fast.recording import pool_bytes, recording
from deco_fast.sampling.batch_size import default_batch_size
from deco_fast.sampling.condition_table import Condition, condition_table
from deco_fast.sampling.schedule import schedule
from deco_fast.sampling.state import State
from deco_fast.transfer import to_device

TABLE_BYTES = 2**30
"""Memory for what is computed ahead, unless told otherwise."""

# Up to so many blocks are compiled as one graph. Deeper models are compiled block by block, once
# for all: one block takes seconds, 28 of them minutes.
_ONE_GRAPH_DEPTH = 8


def _as_condition(condition: Condition) -> Condition:
    """A label may be any whole number, also an element of a tensor."""
    return condition if isinstance(condition, str) else operator.index(condition)


def _call(block: nn.Module, *arguments: Tensor) -> Tensor:
    result: Tensor = block(*arguments)
    return result


class SamplingEngine:
    """Draws batches of images with one model, one size and one way of sampling.

    It holds the weights of the DiT's blocks a second time, in the layout it computes with, and must
    be made anew when the model's weights change.

    Args:
        model: of any dtype, on any device; its card fills in what is not given.
        settings: solver, steps and guidance.
        height, width: in pixels, divisible by the patch size.
        batch_size: images in a batch at most (with guidance, twice as many inputs); by default
            `default_batch_size`.
        fp8: compute the DiT's products in 8-bit floating point (`deco_fast.models.fp8`).
        compile: use torch.compile, and on a GPU CUDA graphs; `warm_up` then takes the time for it.
        distinct_conditions: classes or prompts in a batch at most, without the one of the
            unconditional half; fewer of them leave memory for more steps at a time.
        encode_text: of a text model, its text encoder, such as `Qwen3TextEncoder`.
        table_bytes: memory for modulations and texts that are computed ahead: at 128 tokens
            DeCo-T2I takes 12.6 MB in bf16 for each prompt at each time.

    Attributes:
        evaluations: times that the model is evaluated for a batch.
        image_shape: (C, H, W).
        is_ahead: whether calls return before the images are computed.

    Raises:
        ValueError: an argument is out of range, the model has no card and one is needed, or a text
            model has no text encoder.
        UserError: there is no fp8 here.
    """

    def __init__(
        self,
        model: DeCoNetwork,
        settings: SamplingSettings | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        fp8: bool = False,
        compile: bool = False,
        distinct_conditions: int | None = None,
        encode_text: EncodeText | None = None,
        table_bytes: int = TABLE_BYTES,
    ) -> None:
        check_bare(model)
        config, card = model.config, model.card
        if card is not None:
            settings = settings or card.sampling
            height = card.height if height is None else height
            width = card.width if width is None else width
        if settings is None or height is None or width is None:
            raise ValueError("the model has no card: give settings, height and width")
        numbers = {
            "height": height,
            "width": width,
            "batch_size": batch_size,
            "distinct_conditions": distinct_conditions,
        }
        for name, number in numbers.items():
            if number is not None and not (isinstance(number, int) and number >= 1):
                raise ValueError(f"{name} must be a whole number, at least 1, not {number}")
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"image size {height}×{width} is not divisible by the patch size "
                f"{config.patch_size}"
            )
        self._device = model.patch_embedder.weight.device
        if batch_size is None:
            batch_size = default_batch_size(self._device, height, width)
        self.model, self.settings, self.batch_size = model, settings, batch_size
        self.image_shape = (config.in_channels, height, width)
        self.is_ahead = self._device.type != "cpu"
        self._evaluations = schedule(settings)
        self.evaluations = len(self._evaluations)
        self._is_guided = any(e.guided for e in self._evaluations)
        self._state_dtype = torch.promote_types(model.dtype, torch.float32)
        self._compiled = compile
        # Functions and no bound methods: an engine that referred to itself would keep its copy of
        # the weights until Python looks for such circles.
        engine = type(self)
        self._run_step, self._run_block = engine._step, _call
        self._run_decode, self._run_move = engine._decode, engine._move
        self._one_run = threading.Lock()
        self._ordered: torch.cuda.Event | None = None
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._times = times = torch.tensor(
            [e.t for e in self._evaluations], dtype=self._state_dtype, device=self._device
        )
        self._distinct = min(distinct_conditions or batch_size, batch_size)
        # Chosen once: the backend forced when the engine is made may be another than when it draws.
        layout = WeightLayout.best(self._device, model.dtype, config.hidden_size)
        with torch.no_grad():
            self._table = condition_table(
                model, times, self._distinct, table_bytes, layout, encode_text
            )
            self._prepare(layout)
            if fp8:
                to_fp8(self._blocks)
        if compile:
            self._compile()

    def _prepare(self, layout: WeightLayout) -> None:
        config, device = self.model.config, self._device
        _, height, width = self.image_shape
        self._blocks = nn.ModuleList(
            PreparedBlock(cast(DiTBlock | JointBlock, block), layout) for block in self.model.blocks
        )
        grid = height // config.patch_size, width // config.patch_size
        self._rotary = prepared_rotary_table(self.model.rotary_table(*grid, device), layout)
        shape = (self.batch_size, *self.image_shape)
        self._x = torch.zeros(shape, dtype=self._state_dtype, device=device)
        self._weights = self._x.new_tensor([e.weights for e in self._evaluations])
        self._velocities = self._x.new_zeros(self._weights.shape[1], *shape)
        # Which evaluation this is, among all and among those that the table holds.
        self._index = torch.zeros(2, 1, dtype=torch.int64, device=device)
        # The table's row of each input: first those of the unconditional half.
        self._rows = torch.zeros(2 * self.batch_size, dtype=torch.int64, device=device)

    def _compile(self) -> None:
        if self.model.config.depth <= _ONE_GRAPH_DEPTH:
            self._run_step = compile_apart(self._run_step)
            return
        self._run_block = compile_apart(self._run_block)
        self._run_decode = compile_apart(self._run_decode)
        self._run_move = compile_apart(self._run_move)

    def try_out(self) -> None:
        """Evaluate the model once for each number of inputs that a batch will bring.

        Raises:
            torch.OutOfMemoryError: the batch is too large.
        """
        with torch.inference_mode():
            for guided in self._kinds():
                self._evaluate(guided, self.batch_size)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def warm_up(self) -> None:
        """Compile, and record CUDA graphs, so that the first batch takes no longer than others."""
        self.try_out()
        if self._compiled and self._device.type == "cuda":
            with torch.inference_mode():
                # One after the other and never at once, so they may share their memory: that is a
                # stream's.
                self._pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
                self._graphs = {guided: self._record(guided, stream) for guided in self._kinds()}

    def graph_bytes(self) -> int:
        """The GPU's memory that the recorded graphs hold, 0 where there are none."""
        return pool_bytes(self._pool) if self._graphs else 0

    def _kinds(self) -> Iterator[bool]:
        """With and without guidance, as far as the run has both; of each the first evaluation."""
        self._table.fill(0, [self._table.unconditional])
        for guided in sorted({e.guided for e in self._evaluations}, reverse=True):
            self._index.zero_()
            self._rows.zero_()
            yield guided

    def _record(self, guided: bool, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # What libraries do at the first call on a stream must not be recorded.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._evaluate(guided, self.batch_size)
            self._index.zero_()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        # What other threads do meanwhile is no part of it, and no error.
        with recording(graph, self._pool, stream, "thread_local"):
            self._evaluate(guided, self.batch_size)
        return graph

    def __getstate__(self) -> dict[str, Any]:
        apart = ("_one_run", "_ordered")
        return {key: value for key, value in vars(self).items() if key not in apart}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _one_run=threading.Lock(), _ordered=None)

    def __call__(
        self,
        noise: Tensor,
        conditions: Sequence[Condition],
        *,
        uncondition: Condition | None = None,
    ) -> Tensor:
        """Draw a batch; of several threads one at a time, on whatever streams.

        Args:
            noise: (B, C, H, W), B up to the batch size.
            conditions: the class of each image, or its prompt.
            uncondition: what guidance leads away from; by default the null class, or the empty
                prompt. A negative prompt takes its place.

        Returns:
            Images (B, C, H, W), about [−1, 1], float32 (float64 for a float64 model).

        Raises:
            ValueError: shapes or conditions do not fit.
        """
        with self._one_run:
            if self._ordered is not None:  # on what may be another stream
                torch.cuda.current_stream(self._device).wait_event(self._ordered)
            for _ in self.states(noise, conditions, uncondition=uncondition):
                pass
            images = self._x[: len(noise)].clone()
            if self._device.type == "cuda":
                self._ordered = torch.cuda.current_stream(self._device).record_event()
            return images

    def states(
        self,
        noise: Tensor,
        conditions: Sequence[Condition],
        *,
        uncondition: Condition | None = None,
    ) -> Iterator[State]:
        """Draw a batch and show its way: the noise, then the state after each evaluation.

        A state comes when its evaluation has been ordered; a GPU may be behind. The last one has
        the images of `__call__`. One run at a time: where another begins, this one must not go on.

        Args:
            noise, conditions, uncondition: as for `__call__`.

        Returns:
            An iterator of `evaluations` + 1 states.

        Raises:
            ValueError: shapes or conditions do not fit.
        """
        if uncondition is None:
            uncondition = self._table.unconditional
        if isinstance(conditions, str):
            raise ValueError("conditions must be a list, one for each noise, not a str")
        conditions = [_as_condition(condition) for condition in conditions]
        uncondition = _as_condition(uncondition)
        self._check(noise, [*conditions, uncondition])
        return self._states(noise, conditions, uncondition)

    def _states(
        self, noise: Tensor, conditions: Sequence[Condition], uncondition: Condition
    ) -> Iterator[State]:
        # Another size would have to be compiled: the rest of a batch is computed and not seen.
        size = self.batch_size if self._compiled else len(noise)
        distinct = sorted({*conditions, *([uncondition] if self._is_guided else [])})
        x, velocity = self._x[: len(noise)], self._velocities[0, : len(noise)]
        times = [*(e.t for e in self._evaluations), 1.0]
        # Never around a yield: the mode would be the caller's as well.
        with torch.inference_mode():
            self._start(noise, conditions, uncondition, distinct, size)
        yield State(0, times[0], x, velocity)
        for i, evaluation in enumerate(self._evaluations):
            with torch.inference_mode():
                if i % self._table.span == 0:
                    self._table.fill(i, distinct)
                    self._index[1].zero_()
                if evaluation.guided in self._graphs:
                    self._graphs[evaluation.guided].replay()
                else:
                    self._evaluate(evaluation.guided, size)
            yield State(i + 1, times[i + 1], x, velocity)

    def _start(
        self,
        noise: Tensor,
        conditions: Sequence[Condition],
        uncondition: Condition,
        distinct: Sequence[Condition],
        size: int,
    ) -> None:
        self._x.zero_()
        self._x[: len(noise)].copy_(to_device(noise, self._device))
        self._velocities.zero_()
        self._index.zero_()
        row_of = {condition: row for row, condition in enumerate(distinct)}
        conditional = [row_of[condition] for condition in conditions]
        conditional += conditional[-1:] * (size - len(conditions))
        unconditional = [row_of.get(uncondition, 0)] * size
        rows = torch.tensor(unconditional + conditional)
        self._rows[: 2 * size].copy_(to_device(rows, self._device))

    def _evaluate(self, guided: bool, size: int) -> None:
        """Evaluate the first `size` images and move them."""
        x, velocities = self._x[:size], self._velocities[:, :size]
        new_x, new_velocities = self._run_step(
            self, x, velocities, self._index, self._rows[: 2 * size], self._table.tensors, guided
        )
        x.copy_(new_x)
        velocities.copy_(new_velocities)
        self._index.add_(1)

    def _step(
        self,
        x: Tensor,
        velocities: Tensor,
        index: Tensor,
        rows: Tensor,
        table: tuple[Tensor, ...],
        guided: bool,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation and the move after it: the new x (B, C, H, W) and velocities (K, …)."""
        rows = rows if guided else rows[len(rows) // 2 :]
        conditions = self._table.select(table, index[1], rows)
        final = self._table.select_final(table, index[1], rows)
        temb = self._table.time_embedding.index_select(0, index[0])
        t = self._times.index_select(0, index[0])
        inputs = x.repeat(2, 1, 1, 1) if guided else x
        velocity = self._velocity(inputs, conditions, temb, t, final)
        return self._run_move(
            self, x, velocities, velocity, self._weights.index_select(0, index[0])[0]
        )

    def _velocity(
        self,
        x: Tensor,
        conditions: list[tuple[Tensor, ...]],
        temb: Tensor,
        t: Tensor,
        final: tuple[Tensor, ...],
    ) -> Tensor:
        model = self.model
        s = model.patch_embedder(patchify(x.to(model.dtype), model.config.patch_size))
        for block, condition in zip(self._blocks, conditions, strict=True):
            s = self._run_block(block, s, self._rotary, *condition)
        return self._run_decode(self, x, s, temb, t, *final)

    def _decode(self, x: Tensor, s: Tensor, temb: Tensor, t: Tensor, *final: Tensor) -> Tensor:
        model = self.model
        tokens = model.decoder_condition(s, temb, *final)
        return model.to_velocity(model.decoder(x.to(model.dtype), tokens), x, t)

    def _move(
        self, x: Tensor, velocities: Tensor, velocity: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        velocity = velocity.to(x.dtype)
        if len(velocity) == 2 * len(x):
            unconditional, conditional = velocity.chunk(2)
            settings = self.settings
            velocity = guide(
                unconditional, conditional, settings.guidance_scale, settings.guidance_rescale
            )
        velocities = torch.cat([velocity[None], velocities[:-1]])
        return x + (weights.view(-1, 1, 1, 1, 1) * velocities).sum(0), velocities

    def _check(self, noise: Tensor, conditions: Sequence[Condition]) -> None:
        """Of the conditions the last one is the uncondition."""
        if noise.shape[1:] != self.image_shape or not 0 < len(noise) <= self.batch_size:
            raise ValueError(
                f"noise must be up to {self.batch_size} images of {self.image_shape}, not "
                f"{tuple(noise.shape)}"
            )
        if (count := len(conditions) - 1) != len(noise):
            raise ValueError(f"{len(noise)} noises but {count} conditions: one each")
        self._table.check(conditions)
        if (distinct := len({*conditions[:-1]})) > self._distinct:
            raise ValueError(
                f"{distinct} distinct conditions in a batch, and the engine was made for "
                f"{self._distinct}"
            )
