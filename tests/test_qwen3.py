"""Prompts through Qwen3: the tokens, the mask, the cache, and what is refused (B.10)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen3
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Model

from deco_fast.conditioning import qwen3
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.errors import UserError
from deco_fast.quiet import quiet_transformers

LENGTH, SIZE = 12, tiny_qwen3.HIDDEN_SIZE
PROMPTS = ["a cat", "", "two small dogs on a red sofa", "über"]


@pytest.fixture(scope="module")
def encoder() -> Qwen3TextEncoder:
    folder = str(tiny_qwen3.folder())
    return Qwen3TextEncoder(folder, length=LENGTH, size=SIZE, dtype=torch.float32)


def by_hand(prompt: str, implementation: str) -> Tensor:
    """One prompt as specified, without transformers' tokenizer."""
    # Byte-level vocabularies write bytes as letters; ours numbers the sorted letters from 1.
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    text = ByteLevel(add_prefix_space=False).pre_tokenize_str(prompt)
    ids = [1 + letters.index(letter) for piece, _ in text for letter in piece][:LENGTH]
    padding = [0] * (LENGTH - len(ids))
    with quiet_transformers():
        model = Qwen3Model.from_pretrained(
            tiny_qwen3.folder(), attn_implementation=implementation, dtype=torch.float32
        )
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([ids + padding]),
            attention_mask=torch.tensor([[1] * len(ids) + [0] * len(padding)]),
        )
    return output.last_hidden_state[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_features_are_the_last_hidden_state(encoder: Qwen3TextEncoder, prompt: str) -> None:
    features = encoder(PROMPTS)
    assert features.shape == (4, LENGTH, SIZE)
    actual = features[PROMPTS.index(prompt)]
    assert torch.allclose(actual, by_hand(prompt, "sdpa"), atol=1e-5)
    if prompt:  # of an empty one every position is masked, for which softmax has no definition
        assert torch.allclose(actual, by_hand(prompt, "eager"), atol=1e-5)


def test_nothing_waits_for_the_device(encoder: Qwen3TextEncoder) -> None:
    """A value that the host reads is one for which a GPU would have to be waited for."""
    read: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
                read.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        bool(torch.ones(2).all())
        assert read
        read.clear()
        encoder._encode(PROMPTS)
        encoder._encode(["a" * 4 * LENGTH])  # without padding
    assert not read


def test_the_empty_prompt_is_padding_alone(encoder: Qwen3TextEncoder) -> None:
    features = encoder([""])[0]
    assert features.isfinite().all()
    assert torch.allclose(features, features[:1].expand_as(features), atol=1e-5)
    assert not torch.allclose(features, encoder(["a"])[0], atol=1e-2)


def test_no_code_of_the_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask, and someone, or a script, would say yes."""
    folder = tiny_qwen3.save(tmp_path / "encoder")
    described = json.loads((folder / "config.json").read_text())
    described |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"no text encoder at|is of type evil"):
        Qwen3TextEncoder(str(folder), length=LENGTH, size=SIZE)
    assert not (tmp_path / "ran").exists()


def test_prompts_are_encoded_once_and_never_mixed_up() -> None:
    encoder = Qwen3TextEncoder(str(tiny_qwen3.folder()), length=LENGTH, size=SIZE)
    encoder._cache.clear()
    batches: list[int] = []
    encoder._model.register_forward_pre_hook(
        lambda _, __, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first = encoder(["a cat", "", "a cat", "blurry"])
    assert first.dtype == torch.bfloat16
    assert batches == [3]
    assert torch.equal(first[0], first[2])
    # In the original the negative prompt took the place of the empty one for good.
    assert torch.equal(encoder([""])[0], first[1])
    assert torch.equal(encoder(["blurry"])[0], first[3])
    assert not torch.equal(first[1], first[3])
    assert batches == [3]


def test_the_cache_holds_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3, "_CACHED_PROMPTS", 3)
    monkeypatch.setattr(qwen3, "_AT_ONCE", 2)
    encoder = Qwen3TextEncoder(str(tiny_qwen3.folder()), length=LENGTH, size=SIZE)
    features = encoder(["a", "b", "c", "d", "e"])
    assert list(encoder._cache) == ["c", "d", "e"]
    encoder(["c"])
    encoder(["f"])
    assert list(encoder._cache) == ["e", "c", "f"]
    assert torch.allclose(encoder(["a"])[0].float(), features[0].float(), atol=0.1)


def test_encodings_made_while_sampling_serve_in_training() -> None:
    encoder = Qwen3TextEncoder(str(tiny_qwen3.folder()), length=LENGTH, size=SIZE)
    with torch.inference_mode():
        encoder(["a cat"])
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    (encoder(["a cat"]) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(("size", "word"), [(30, "padded with zeros"), (20, "cut")])
def test_another_number_of_channels(size: int, word: str) -> None:
    folder = str(tiny_qwen3.folder())
    encoder = Qwen3TextEncoder(folder, length=LENGTH, size=size, dtype=torch.float32)
    features = encoder(["a cat"])[0]
    assert features.shape == (LENGTH, size)
    assert torch.allclose(features[:, :20], by_hand("a cat", "sdpa")[:, :20], atol=1e-5)
    assert not features[:, SIZE:].any()
    assert f"has 24 channels, {word} to the network's {size}" in encoder.note


def test_long_prompts_are_counted_and_cut(encoder: Qwen3TextEncoder) -> None:
    assert encoder.count_tokens("a" * 100_000) == 100_000
    assert encoder.count_tokens("") == 0
    assert torch.equal(encoder(["a" * 100_000]), encoder(["a" * LENGTH]))


@pytest.mark.parametrize("prompt", ["a \ud800", "\udcff"])
def test_half_a_surrogate_pair_is_refused(encoder: Qwen3TextEncoder, prompt: str) -> None:
    for encode in (encoder.count_tokens, lambda text: encoder(["a", text])):
        with pytest.raises(UserError, match="a prompt is not Unicode: character"):
            encode(prompt)


class TestRefused:
    def refusal(self, path: str | Path) -> str:
        with pytest.raises(UserError) as caught:
            Qwen3TextEncoder(str(path))
        message = str(caught.value)
        assert "\n" not in message and "--text-encoder FOLDER" in message
        return message

    def test_a_folder_that_is_not_there(self) -> None:
        assert "Qwen3-17B is no folder" in self.refusal("Qwen3-17B")

    def test_a_repository_that_cannot_be_reached(self) -> None:
        assert "no text encoder at hf:Qwen/Qwen3-1.7B" in self.refusal(qwen3.QWEN3_1_7B)

    def test_another_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        assert "is of type bert" in self.refusal(tmp_path)

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_a_missing_file(self, tmp_path: Path, name: str) -> None:
        folder = Path(shutil.copytree(tiny_qwen3.folder(), tmp_path / "qwen3"))
        (folder / name).unlink()
        if name == "model.safetensors":  # what could hold code is not read in its place
            torch.save({}, folder / "pytorch_model.bin")
        assert f"no text encoder at {folder}" in self.refusal(folder)

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_qwen3.folder(), tmp_path / "qwen3"))
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        assert f"no text encoder at {folder}" in self.refusal(folder)

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(tiny_qwen3.folder(), tmp_path / "qwen3"))
        tensors = load_file(folder / "model.safetensors")
        tensors["norm.weight"][0] = torch.nan
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="are not finite: download it again"):
            Qwen3TextEncoder(str(folder))

    def test_missing_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(UserError, match=r"pip install 'deco-fast\[t2i\]'"):
            Qwen3TextEncoder(str(tiny_qwen3.folder()))
