"""DeCo for class labels."""

from __future__ import annotations

from torch import nn

from deco_fast.errors import UserError
from deco_fast.models.card import ModelCard
from deco_fast.models.class_conditional import ClassConditional
from deco_fast.models.concat_decoder import ConcatDecoder
from deco_fast.models.config import DeCoConfig
from deco_fast.models.decoder import PixelDecoder
from deco_fast.models.presets import preset


class DeCo(ClassConditional):
    """Class-conditional DeCo: `decode(x, encode(x, t, y))` is the velocity.

    Any height and width divisible by the patch size; the weights do not depend on them. They
    begin as published (specification B.8): at zero velocity, though no DiT block at zero.

    Attributes:
        config: the network's shape.
        card: what the tensors cannot tell, where it is known.
    """

    config: DeCoConfig

    def __init__(self, config: DeCoConfig, card: ModelCard | None = None) -> None:
        super().__init__(config, card)

    @classmethod
    def from_preset(cls, name: str) -> DeCo:
        """A freshly initialised model: "deco-xl", "deco-xl-512", "deco-l" or "deco-digits".

        Raises:
            UserError: there is no such preset, or it is of a text model.
        """
        config, card = preset(name)
        if not isinstance(config, DeCoConfig):
            raise UserError(
                f"{name} is no DeCo for class labels: use DeCoT2I.from_preset for the text model, "
                "build_network(preset(NAME).config) for others"
            )
        return cls(config, card)

    def make_decoder(self) -> nn.Module:
        if self.config.decoder_conditioning == "concat":
            return ConcatDecoder(self.config)
        return PixelDecoder(self.config, own_patch_size=self.config.decoder_patch_size)
