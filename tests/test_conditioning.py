"""Dropping class labels for classifier-free guidance (specification B.7)."""

from __future__ import annotations

import pytest
import torch
from golden import metadata, tensors
from scipy import stats

from deco_fast.conditioning.labels import drop_labels


def test_dropped_labels_equal_golden() -> None:
    golden = tensors("cfg_dropout")
    probability = metadata("cfg_dropout")["null_condition_p"]
    null_class = int(golden["label.uncond"][0])
    assert (golden["label.uncond"] == null_class).all()
    dropped = drop_labels(golden["label.cond"], null_class, probability, u=golden["u"])
    assert dropped.dtype == torch.int64
    assert torch.equal(dropped, golden["label.dropped"])
    assert not torch.equal(dropped, golden["label.cond"])


def test_the_comparison_is_strict() -> None:
    y, u = torch.tensor([1, 2, 3]), torch.tensor([0.25, 0.5, 0.75])
    assert drop_labels(y, 9, 0.5, u=u).tolist() == [9, 2, 3]


@pytest.mark.parametrize(("probability", "expected"), [(0.0, [0, 1, 2]), (1.0, [9, 9, 9])])
def test_certain_cases(probability: float, expected: list[int]) -> None:
    # u is in [0, 1): even a zero is kept at probability 0.
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert drop_labels(torch.arange(3), 9, probability, u=u).tolist() == expected


def test_labels_fall_as_often_as_asked() -> None:
    count, probability = 20_000, 0.1
    y = torch.zeros(count, dtype=torch.int64)
    dropped = drop_labels(y, 7, probability, generator=torch.Generator().manual_seed(0))
    assert set(dropped.tolist()) == {0, 7}
    fallen = int((dropped == 7).sum())
    assert stats.binomtest(fallen, count, probability).pvalue > 0.01


def test_a_generator_decides_which_and_nothing_else_is_touched() -> None:
    y = torch.arange(100)
    state = torch.get_rng_state()
    draws = [
        drop_labels(y, 100, 0.5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, torch.arange(100))
