"""What a run's times and conditions determine, computed ahead of the sampling loop.

Of both models: the AdaLN modulations. They depend on the time and the class alone (of the text
model, on the time alone), and their weights are a third of DeCo's parameters (223 of 682 million in
DeCo-XL): a loop that computes them at each step reads that third each time for a few rows.

Of the text model also the keys and values of the text. They depend on the time and the prompt: the
refinement of the text is conditioned on the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_fast.conditioning.qwen3 import EncodeText
from deco_fast.models.class_conditional import ClassConditional
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.dit import DiTBlock, JointBlock
from deco_fast.models.network import DeCoNetwork
from deco_fast.models.prepared import WeightLayout, fold_norms, prepared_text_keys_values
from deco_fast.transfer import to_device

Condition = int | str
"""A class label or a prompt."""

# Tokens of text that are refined at once: enough to keep a GPU busy, a few hundred megabytes.
_TOKENS_AT_ONCE = 2**14


class ConditionTable(Protocol):
    """Some evaluations in a row, for some conditions.

    Attributes:
        time_embedding: (E, D), what the decoder's condition adds to the tokens.
        span: evaluations that the table holds at a time.
        tensors: what `select` reads; they stay where they are.
        unconditional: the condition of the unconditional half, unless another is given.
    """

    time_embedding: Tensor
    span: int
    tensors: tuple[Tensor, ...]
    unconditional: Condition

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise ValueError for one that the model does not know."""
        ...

    def fill(self, start: int, conditions: Sequence[Condition]) -> None:
        """Hold the evaluations start … start + span − 1 for these conditions, in their order."""
        ...

    def select(
        self, tensors: tuple[Tensor, ...], index: Tensor, rows: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """What each prepared block takes beside its tokens and the rotary table.

        Args:
            tensors: of the table.
            index: (1,), the evaluation among those that it holds.
            rows: (B,), which of its conditions is that of an input.
        """
        ...

    def select_final(
        self, tensors: tuple[Tensor, ...], index: Tensor, rows: Tensor
    ) -> tuple[Tensor, ...]:
        """What `decoder_condition` takes beside tokens and time; the arguments as for `select`."""
        ...


class ClassTable:
    """The modulations of the class model.

    Args:
        model: whose modulations.
        times: (E,), of all evaluations of a run.
        max_labels: distinct classes that a call of `fill` may bring.
        max_bytes: of memory for the table; it then holds fewer evaluations at a time, at least one.
    """

    def __init__(
        self, model: ClassConditional, times: Tensor, max_labels: int, max_bytes: int
    ) -> None:
        config = model.config
        self._model = model
        self.unconditional: Condition = config.num_classes
        self.time_embedding: Tensor = model.timestep_embedder(times)
        row = config.depth * 6 * config.hidden_size
        size = max_labels * row * self.time_embedding.element_size()
        self.span = max(1, min(len(times), max_bytes // size))
        modulation = self.time_embedding.new_empty(
            self.span, max_labels, config.depth, 6, config.hidden_size
        )
        # Of a network without a modulation after the last block, nothing.
        final = model.final_modulation(self.time_embedding[:1])
        self.tensors: tuple[Tensor, ...] = (
            modulation,
            *(part.new_empty(self.span, max_labels, part.shape[-1]) for part in final),
        )
        self._held: tuple[int, tuple[Condition, ...]] | None = None

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise ValueError for a label that is none."""
        null = self._model.config.num_classes
        for label in conditions:
            if not isinstance(label, int) or not 0 <= label <= null:
                raise ValueError(
                    f"label {label} does not exist: 0 … {null - 1}, or {null} for the null class"
                )

    def fill(self, start: int, conditions: Sequence[Condition]) -> None:
        """See `ConditionTable`."""
        if self._held == (start, tuple(conditions)):
            return
        # A fill that fails half-way, out of memory or interrupted, leaves nothing that counts.
        self._held = None
        table, *finals = self.tensors
        y = to_device(torch.tensor(conditions), table.device)
        temb = self.time_embedding[start : start + self.span, None]
        condition = F.silu(temb + self._model.class_embedder(y))
        for i, block in enumerate(self._model.blocks):
            assert isinstance(block, DiTBlock)
            modulation = fold_norms(block.modulation(condition), block)
            table[: len(condition), : len(conditions), i] = modulation
        for final, part in zip(finals, self._model.final_modulation(condition), strict=True):
            final[: len(condition), : len(conditions)] = part
        self._held = start, tuple(conditions)

    def select(
        self, tensors: tuple[Tensor, ...], index: Tensor, rows: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """See `ConditionTable`."""
        modulation = tensors[0].index_select(0, index)[0].index_select(0, rows)
        return [(of_block,) for of_block in modulation.unbind(1)]

    def select_final(
        self, tensors: tuple[Tensor, ...], index: Tensor, rows: Tensor
    ) -> tuple[Tensor, ...]:
        """See `ConditionTable`."""
        return tuple(
            final.index_select(0, index)[0].index_select(0, rows)[:, None] for final in tensors[1:]
        )


class TextTable:
    """The modulations of the text model, and its texts' keys and values.

    Args:
        model: whose.
        times: (E,), of all evaluations of a run.
        max_prompts: distinct prompts that a call of `fill` may bring.
        max_bytes: of memory for the table; it then holds fewer evaluations at a time, at least one.
        layout: of the blocks that read the table.
        encode_text: the text encoder.
    """

    def __init__(
        self,
        model: DeCoT2I,
        times: Tensor,
        max_prompts: int,
        max_bytes: int,
        layout: WeightLayout,
        encode_text: EncodeText,
    ) -> None:
        config = model.config
        self._model = model
        self._layout = layout
        self._encode_text = encode_text
        self.unconditional: Condition = ""
        self.time_embedding: Tensor = model.timestep_embedder(times)
        modulation = (config.depth, 6, config.hidden_size)
        texts = (config.depth, max_prompts, 2, config.num_heads, config.text_length)
        numbers = config.depth * config.hidden_size * (6 + max_prompts * 2 * config.text_length)
        size = numbers * self.time_embedding.element_size()
        self.span = max(1, min(len(times), max_bytes // size))
        self.tensors: tuple[Tensor, ...] = (
            self.time_embedding.new_empty(self.span, *modulation),
            self.time_embedding.new_zeros(self.span, *texts, config.head_dim),
        )
        self._held: tuple[int, tuple[Condition, ...]] | None = None
        self._modulated: int | None = None
        self._features: tuple[tuple[Condition, ...], Tensor] | None = None

    def check(self, conditions: Sequence[Condition]) -> None:
        """Raise ValueError for what is no prompt."""
        for prompt in conditions:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt must be a text, not {prompt!r}")

    def fill(self, start: int, conditions: Sequence[Condition]) -> None:
        """See `ConditionTable`."""
        prompts = tuple(conditions)
        if self._held == (start, prompts):
            return
        # A fill that fails half-way, out of memory or interrupted, leaves nothing that counts.
        self._held = None
        modulations, texts = self.tensors
        temb = self.time_embedding[start : start + self.span]
        if self._modulated != start:
            self._modulated = None
            condition = F.silu(temb)
            for i, block in enumerate(self._model.blocks):
                assert isinstance(block, JointBlock)
                modulations[: len(temb), i] = fold_norms(block.modulation(condition), block)
            self._modulated = start
        features = self._encode(prompts)
        at_once = max(1, _TOKENS_AT_ONCE // (len(prompts) * self._model.config.text_length))
        for first in range(0, len(temb), at_once):
            some = temb[first : first + at_once]
            # Every evaluation with every prompt: (e p) rows.
            text = self._model.refine_text(
                features.repeat(len(some), 1, 1),
                some.repeat_interleave(len(prompts), dim=0)[:, None],
            )
            for i, block in enumerate(self._model.blocks):
                assert isinstance(block, JointBlock)
                keys_values = prepared_text_keys_values(text, block, self._layout)
                keys_values = keys_values.unflatten(0, (len(some), -1))
                texts[first : first + len(some), i, : len(prompts)] = keys_values
        self._held = start, prompts

    def select(
        self, tensors: tuple[Tensor, ...], index: Tensor, rows: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """See `ConditionTable`; the blocks pick the texts themselves, next to where they lie."""
        modulation, texts = (tensor.index_select(0, index)[0] for tensor in tensors)
        return [
            (modulation_of_block[None], texts_of_block, rows)
            for modulation_of_block, texts_of_block in zip(
                modulation.unbind(0), texts.unbind(0), strict=True
            )
        ]

    def select_final(
        self, tensors: tuple[Tensor, ...], index: Tensor, rows: Tensor
    ) -> tuple[Tensor, ...]:
        """See `ConditionTable`; the text model has none."""
        return ()

    def _encode(self, prompts: tuple[Condition, ...]) -> Tensor:
        """Once for all pieces of a run."""
        if self._features is None or self._features[0] != prompts:
            features = self._encode_text([str(prompt) for prompt in prompts])
            expected = (len(prompts), self._model.config.text_length, self._model.config.text_size)
            if tuple(features.shape) != expected:
                raise ValueError(
                    f"the text encoder gave {tuple(features.shape)} and not {expected}"
                )
            self._features = prompts, features.to(self.time_embedding.device, self._model.dtype)
        return self._features[1]


def condition_table(
    model: DeCoNetwork,
    times: Tensor,
    distinct: int,
    max_bytes: int,
    layout: WeightLayout,
    encode_text: EncodeText | None,
) -> ConditionTable:
    """The table of a model, for batches of so many distinct conditions and one uncondition.

    Raises:
        ValueError: a text model has no text encoder, or a class model has one.
    """
    if isinstance(model, DeCoT2I):
        if encode_text is None:
            raise ValueError("a text model needs encode_text, see Qwen3TextEncoder")
        return TextTable(model, times, distinct + 1, max_bytes, layout, encode_text)
    assert isinstance(model, ClassConditional)
    if encode_text is not None:
        raise ValueError("encode_text is for a text model: this one draws from class labels")
    return ClassTable(model, times, min(distinct, model.config.num_classes) + 1, max_bytes)
