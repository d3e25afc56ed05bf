"""The least work that a task asks for: its FLOPs and the bytes it must move.

FLOPs are those of matrix products, 2·M·N·K each, counted as torch.utils.flop_counter does;
elementwise work is not counted. The backward of a product costs two such products, one for the
gradient of the weight and one for that of the input; the gradients of images and times, which
nobody asks for, are left out. What an implementation computes twice (recomputation in the
backward) counts once: this is the task, not a way to do it.

Bytes are compulsory traffic: every input and weight read once in the forward and once in the
backward, every output and gradient written once, no activation in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from deco_fast import ops
from deco_fast.kernels.flow_matching_loss.reference import BLOCK
from deco_fast.kernels.pixel_decoder.reference import POSITION_FEATURES
from deco_fast.models.build import empty_network
from deco_fast.models.config import (
    DeCoConfig,
    DeCoT2IConfig,
    NetworkConfig,
    PixelDecoderConfig,
)
from deco_fast.models.embeddings import FREQUENCY_CHANNELS

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, and bytes to and from memory."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Images:
    """A batch of RGB images: what the amount of work depends on beside the network."""

    batch: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Pixels of the whole batch."""
        return self.batch * self.height * self.width

    @property
    def values(self) -> int:
        """Pixels times three channels."""
        return 3 * self.pixels

    def tokens(self, patch_size: int) -> int:
        """The DiT's tokens for one image."""
        return self.height * self.width // patch_size**2

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.height}×{self.width}"


@cache
def parameter_count(config: NetworkConfig, decoder_only: bool = False) -> int:
    """Parameters of a network, or of its decoder."""
    network = empty_network(config)
    module = network.decoder if decoder_only else network
    return sum(parameter.numel() for parameter in module.parameters())


def decoder_flops(
    config: PixelDecoderConfig, images: Images, backward: bool, folded_input: bool = True
) -> int:
    """The pixel decoder, upsampling included.

    Per pixel, with D the DiT's width, C the decoder's channels and K blocks:

        upsample    2·D·C           a token's p²·C outputs are C for each of its p² pixels
        input       2·3·C           two affine maps in a row, of which the position's share is
                                    the same in every patch: folded, only the colours are left
                    2·67·C + 2·C²   as the reference computes it
        block       2·C·3C (modulation) + 2·2·C² (MLP) = 10·C², K times
        output      2·C·3

    Backward: twice that, less the gradient of the decoder's input features.
    """
    channels, width = images.values // images.pixels, config.decoder_hidden_size
    features = channels if folded_input else channels + POSITION_FEATURES
    first = 2 * features * width
    rest = (
        (0 if folded_input else 2 * width**2)
        + 2 * config.hidden_size * width
        + config.decoder_depth * 10 * width**2
        + 2 * width * channels
    )
    return images.pixels * (2 * first + 3 * rest if backward else first + rest)


def decoder_work(
    config: PixelDecoderConfig, images: Images, backward: bool, element_bytes: int = FLOAT32_BYTES
) -> Work:
    """The pixel decoder: image, tokens and weights in, velocity out.

    The backward reads the three again and the velocity's gradient, and writes the gradients of
    tokens and weights.
    """
    length = images.batch * images.tokens(config.patch_size)
    weights = parameter_count(config, decoder_only=True) + length * config.hidden_size
    elements = weights + 2 * images.values
    if backward:
        elements += 2 * (weights + images.values)
    return Work(decoder_flops(config, images, backward), elements * element_bytes)


def loss_flops(images: Images, backward: bool) -> int:
    """The flow-matching loss: one colour conversion and one transform of the difference.

    Colour: 2·3·3 per pixel. Transform A X Aᵀ: two 8×8×8 products for a block's 64 values,
    2·2·8 = 32 per value; sides are padded to multiples of 8. The backward is the transposed
    transform and conversion, the same number again.
    """
    padded_height, padded_width = (
        -(-side // BLOCK) * BLOCK for side in (images.height, images.width)
    )
    transform = images.batch * 3 * padded_height * padded_width * 2 * 2 * BLOCK
    forward = images.pixels * 2 * 3 * 3 + transform
    return 2 * forward if backward else forward


def loss_work(images: Images, backward: bool, prediction_bytes: int = FLOAT32_BYTES) -> Work:
    """The flow-matching loss: prediction and float32 target in, in the backward a gradient out.

    The gradient can be made in the pass that makes the loss, so nothing is read again.
    """
    per_value = prediction_bytes + FLOAT32_BYTES + (prediction_bytes if backward else 0)
    return Work(loss_flops(images, backward), images.values * per_value)


def model_flops(
    config: NetworkConfig, images: Images, backward: bool, folded_input: bool = True
) -> int:
    """DeCo: patch embedding, time embedding, DiT blocks, pixel decoder; others: `counted_flops`.

    Per image, with L tokens of width D and an MLP of inner width I:

        patches     2·L·(3p²)·D
        time        2·256·D + 2·D²
        block       2·D·6D (modulation) + 2·L·D·3D (q, k, v) + 4·L·(L + T)·D (attention, to T
                    tokens of text too) + 2·L·D² (projection) + 3·2·L·D·I (SwiGLU)
        decoder     see decoder_flops

    Without what a text costs, see text_flops.

    Backward: twice that, less the gradients of the image and of the time's sinusoids.
    """
    is_variant = isinstance(config, DeCoConfig) and not config.is_published
    if is_variant or not isinstance(config, DeCoConfig | DeCoT2IConfig):
        return counted_flops(config, images, backward)
    length, width = images.tokens(config.patch_size), config.hidden_size
    text_tokens = config.text_length if isinstance(config, DeCoT2IConfig) else 0
    patches = 2 * length * config.in_channels * config.patch_size**2 * width
    sinusoids = 2 * FREQUENCY_CHANNELS * width
    block = (
        2 * width * 6 * width
        + 2 * length * width * 3 * width
        + 4 * length * (length + text_tokens) * width
        + 2 * length * width**2
        + 3 * 2 * length * width * config.mlp_hidden_size
    )
    first, rest = patches + sinusoids, 2 * width**2 + config.depth * block
    dit = 2 * first + 3 * rest if backward else first + rest
    return images.batch * dit + decoder_flops(config, images, backward, folded_input)


@cache
def counted_flops(config: NetworkConfig, images: Images, backward: bool) -> int:
    """What torch counts of the products of any class network, in the reference ops.

    The gradient of the image is left out, as nobody asks for it.
    """
    with torch.device("meta"), ops.use_backend("reference"):
        model = empty_network(config)
        x = torch.zeros(images.batch, config.in_channels, images.height, images.width)
        t, y = torch.zeros(images.batch), torch.zeros(images.batch, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            velocity = model(x, t, y)
            if backward:
                velocity.sum().backward()
    flops: int = counter.get_total_flops()
    return flops


def text_flops(config: NetworkConfig) -> int:
    """A prompt at one time: its refinement, its keys and values in every block; 0 without text.

    Of T tokens of width D, S channels of the text encoder and an MLP of inner width I:

        embedding   2·T·S·D
        refinement  2·D·6D + 2·T·D·3D + 4·T²·D + 2·T·D² + 3·2·T·D·I, in each of its blocks
        DiT         2·T·D·2D (keys, values) in each block
    """
    if not isinstance(config, DeCoT2IConfig):
        return 0
    tokens, width = config.text_length, config.hidden_size
    refinement = (
        2 * width * 6 * width
        + 2 * tokens * width * 3 * width
        + 4 * tokens**2 * width
        + 2 * tokens * width**2
        + 3 * 2 * tokens * width * config.mlp_hidden_size
    )
    return (
        2 * tokens * config.text_size * width
        + config.text_depth * refinement
        + config.depth * 2 * tokens * width * 2 * width
    )


def model_work(config: NetworkConfig, images: Images, element_bytes: int = FLOAT32_BYTES) -> Work:
    """A forward of DeCo: image and weights in, velocity out."""
    elements = parameter_count(config) + 2 * images.values
    return Work(model_flops(config, images, backward=False), elements * element_bytes)


def encoder_flops(images: Images) -> int:
    """DINOv2-B/14's forward for REPA, on 14/16 of the size: as many patches as the DiT has tokens.

    A block, with L tokens (one of them the class's) and width D:

        2·L·D·3D (q, k, v) + 4·L²·D (attention) + 2·L·D² (projection) + 2·2·L·D·4D (MLP)
    """
    width, depth, patch = 768, 12, 14
    patches = images.tokens(16)
    length = patches + 1
    block = 24 * length * width**2 + 4 * length**2 * width
    return images.batch * (2 * patches * 3 * patch**2 * width + depth * block)


def training_work(config: NetworkConfig, images: Images, encoder: int = 0) -> Work:
    """A training iteration: forward, loss, backward, AdamW; float32 weights.

    A weight moves ten times: read in forward and backward, its gradient written and read, it and
    its two moments read and written by AdamW. Of the images only the data is read; the noise can
    be made where it is used.
    """
    moves = 10 * parameter_count(config) + images.values
    return Work(
        model_flops(config, images, backward=True) + loss_flops(images, backward=True) + encoder,
        moves * FLOAT32_BYTES,
    )


def sampling_work(
    config: NetworkConfig,
    images: Images,
    steps: int,
    guided_steps: int,
    element_bytes: int = FLOAT32_BYTES,
) -> Work:
    """Drawing images with one evaluation a step, two where guidance is on.

    Of a text model all images have one prompt, and the unconditional half another. The weights are
    read once a step: those of a large model outlive no cache.
    """
    evaluations = steps + guided_steps
    weights = steps * parameter_count(config) * element_bytes
    return Work(
        evaluations * (model_flops(config, images, backward=False) + text_flops(config)),
        weights + 2 * images.values * FLOAT32_BYTES,
    )
