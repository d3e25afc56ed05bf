"""Prompts as the features of a Qwen3 language model (specification B.10)."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_fast.checkpoint.checksums import weights_checksum
from deco_fast.checkpoint.find import HUB_SCHEME
from deco_fast.conditioning.unicode import check_unicode
from deco_fast.errors import UserError
from deco_fast.quiet import quiet_transformers
from deco_fast.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Model

EncodeText = Callable[[Sequence[str]], Tensor]
"""Prompts to their features (N, text_length, text_size)."""

QWEN3_1_7B = "hf:Qwen/Qwen3-1.7B"
"""What the published text-to-image model was trained with."""

QWEN3_PARAMETERS = 1_720_574_976
"""Of Qwen3-1.7B without a language-model head."""

# Half a megabyte each at 128 tokens of 2,048 channels in bf16.
_CACHED_PROMPTS = 256
# Prompts that go through the language model at once.
_AT_ONCE = 32


class Qwen3TextEncoder:
    """Prompts to the last hidden state of Qwen3, after its final norm.

    No chat template. A prompt is cut or padded at its right end to `length` tokens, and the padding
    masked. The empty prompt, which stands for "unconditional", is padding and nothing else.

    The newest encodings are kept by their prompt, so that a repeated or a negative prompt is
    encoded once. They can be used in training wherever they were made.

    Args:
        path: a folder with Qwen3's config.json, safetensors and tokenizer, or
            "hf:owner/repository" on the Hugging Face hub.
        length: tokens of a prompt, `DeCoT2IConfig.text_length`.
        size: channels, `DeCoT2IConfig.text_size`; features of fewer are padded with zeros and of
            more are cut, as published.
        device: where the language model shall be.
        dtype: of the language model and the features.

    Attributes:
        note: a sentence where channels are padded or cut, else empty.

    Raises:
        UserError: transformers is not installed; there is no such folder or repository; or it
            holds another model, no safetensors, no tokenizer or damaged weights.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = QWEN3_1_7B,
        *,
        length: int = 128,
        size: int = 2048,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.path = path = os.fspath(path)
        self.length, self.size = length, size
        self.device = torch.device(device)
        self._tokenizer, model = _load(path, dtype)
        network: nn.Module = model
        self._model = network.to(self.device).requires_grad_(False).eval()
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        hidden_size = model.config.hidden_size
        self.note = ""
        if hidden_size != size:
            what = "cut" if hidden_size > size else "padded with zeros"
            self.note = f"{path} has {hidden_size} channels, {what} to the network's {size}"
        # Now, and not at every call, for which a GPU would have to be waited for. Of the empty
        # prompt nothing is attended to, which not every attention kernel takes.
        if not self([""]).isfinite().all():
            raise UserError(f"the features of {path} are not finite: download it again")

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts.

        Returns:
            (N, length, size), on the device.

        Raises:
            UserError: one is not valid Unicode.
        """
        missing = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        found = {p: self._cache[p] for p in prompts if p in self._cache}
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            for prompt in some:
                check_unicode(prompt, "a prompt")
            found |= zip(some, self._encode(some), strict=True)
        for prompt in found:
            self._cache[prompt] = found[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > _CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return torch.stack([found[prompt] for prompt in prompts])

    @cached_property
    def fingerprint(self) -> str:
        """What tells this language model from another in the same place."""
        return weights_checksum(self._model)

    def to(self, device: str | torch.device) -> Qwen3TextEncoder:
        """Move the language model, and forget what was encoded elsewhere; returns itself."""
        device = torch.device(device)
        if device != self.device:
            self._model.to(device)
            self._cache.clear()
            self.device = device
        return self

    def count_tokens(self, prompt: str) -> int:
        """The tokens that a prompt would have if it were not cut at `length`.

        Raises:
            UserError: it is not valid Unicode.
        """
        check_unicode(prompt, "a prompt")
        with quiet_transformers():
            return len(self._tokenizer(prompt)["input_ids"])

    def _encode(self, prompts: Sequence[str]) -> list[Tensor]:
        with quiet_transformers():
            tokens = self._tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                padding_side="right",
                return_attention_mask=True,
                return_tensors="pt",
            )
        # Not in inference mode, whoever calls: its tensors could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            features = self._model(
                input_ids=to_device(tokens["input_ids"], self.device),
                attention_mask=_causal_mask(to_device(tokens["attention_mask"], self.device)),
                use_cache=False,
            )[0]
            features = features[..., : self.size]
            features = F.pad(features, (0, self.size - features.shape[-1]))
        # Each its own memory, so that a cached one does not keep the others.
        return [feature.clone() for feature in features]


def _causal_mask(is_token: Tensor) -> Tensor:
    """What attends to what, (N, 1, L, L), of a mask of the padding (N, L).

    transformers would make the same, but first ask the GPU, and wait for it, whether there is any
    padding.
    """
    length = is_token.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=is_token.device).tril()
    return causal & is_token.bool()[:, None, None, :]


def qwen3_flops(tokens: int) -> int:
    """Of Qwen3-1.7B for a prompt of so many tokens: 28 layers of 2,048 channels, 16 heads of 128
    over 8 of keys and values, an MLP of 6,144."""
    width, heads, key_value_heads, head_dim, inner, depth = 2048, 16, 8, 128, 6144, 28
    projections = width * head_dim * 2 * (heads + key_value_heads) + 3 * width * inner
    attention = 2 * tokens * heads * head_dim
    return 2 * depth * tokens * (projections + attention)


def _load(path: str, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, Qwen3Model]:
    try:
        from transformers import AutoConfig, AutoTokenizer, Qwen3Model
    except ImportError as error:
        raise UserError(
            "prompts need the package transformers: pip install 'deco-fast[t2i]'"
        ) from error
    name = path.removeprefix(HUB_SCHEME)
    remedy = "download huggingface.co/Qwen/Qwen3-1.7B and give its folder by --text-encoder FOLDER"
    if name == path and not Path(path).is_dir():
        raise UserError(f"the text encoder {path} is no folder: {remedy}, or name {QWEN3_1_7B}")
    with quiet_transformers():
        try:
            # Told so, transformers does not ask whether it may run what the folder brings along.
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            if config.model_type != "qwen3":
                raise UserError(f"the text encoder {path} is of type {config.model_type}: {remedy}")
            tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            # Safetensors alone: other files could hold code.
            loaded: Any = Qwen3Model.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
            model, info = loaded
        except UserError:
            raise
        except Exception as error:  # transformers raises almost anything for a damaged folder
            reason = str(error).strip().splitlines()[0].rstrip(".:")
            raise UserError(f"no text encoder at {path} ({reason}): {remedy}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise UserError(f"the text encoder {path} lacks tensors of Qwen3: {remedy}")
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {path} has no padding token: {remedy}")
    return tokenizer, model
