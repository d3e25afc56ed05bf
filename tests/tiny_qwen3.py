"""A random Qwen3 with a byte-level tokenizer in a folder, as the hub's repositories have it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from deco_fast.models.config import DeCoT2IConfig
from deco_fast.quiet import quiet_transformers

PAD = "<|endoftext|>"
HIDDEN_SIZE = 24

MODEL_CONFIG = DeCoT2IConfig(
    hidden_size=16,
    depth=1,
    num_heads=2,
    patch_size=2,
    decoder_hidden_size=16,
    decoder_depth=1,
    text_depth=1,
    text_size=HIDDEN_SIZE,
    text_length=8,
)
"""A tiny text model that draws from its features."""


def save(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer; each byte is a token, numbered from 1, and 0 is the padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {PAD: 0} | {letter: i for i, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, padding_side="left")
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        Qwen3Model(config).save_pretrained(folder)
        fast.save_pretrained(folder)
    return folder


@functools.cache
def folder() -> Path:
    """The same in a folder that all tests of a process share, and none changes."""
    return save(Path(tempfile.mkdtemp(prefix="tiny-qwen3-")))
