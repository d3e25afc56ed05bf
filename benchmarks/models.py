"""DeCo and the models beside it, in the layout of the paper's Table 1."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.markdown import markdown_table
from deco_fast.config import RunConfig, load_config

STEPS = 50
"""Euler steps of a drawing in Table 1, without guidance."""


@dataclass(frozen=True)
class Published:
    """What Table 1 says of a model: 32 images a GPU; latency on an A800."""

    parameters: int
    training_gb: float
    iteration: float
    inference_gb: float
    image: float
    step: float


@dataclass(frozen=True)
class Model:
    """A line of Table 1.

    Attributes:
        config: in configs/, of the run at size L.
        overrides: of that configuration.
        network: its `model:` section at the scale of configs/photographs.yaml.
        published: the paper's figures.
    """

    name: str
    config: str
    network: dict[str, Any]
    published: Published
    overrides: tuple[str, ...] = ()

    def run(self, small: bool, batch: int, precision: str) -> RunConfig:
        """The training of size L, or of a laptop's size, with random images in view."""
        words = [*self.overrides, f"--training.precision={precision}", "--training.compile=false"]
        if not small:
            words += [f"--training.batch_size={batch}"]
            return load_config(self.config, words)
        fields = load_config(self.config, words).model_dump(mode="json")
        fields["model"] = _SMALL | self.network
        fields["alignment"] = {"enabled": False}
        fields["data"] |= {"dataset": "photographs", "root": None, "height": 32, "width": 32}
        fields["training"] |= {"batch_size": batch}
        return RunConfig.model_validate(fields)


_SMALL = {"hidden_size": 128, "depth": 4, "num_heads": 4, "patch_size": 4, "num_classes": 2}
_DECO = {"network": "deco", "decoder_hidden_size": 16}
_DIT = {"network": "pixel-dit", "depth": 5}

MODELS = (
    Model(
        "PixDDT",
        "pixddt_l_256",
        {"network": "pixddt", "decoder_depth": 1},
        Published(434_000_000, 23.6, 0.22, 2.4, 0.49, 0.010),
    ),
    Model(
        "PixNerd",
        "pixnerd_l_256",
        {"network": "pixnerd", "decoder_hidden_size": 16},
        Published(458_000_000, 29.2, 0.25, 2.6, 0.48, 0.010),
    ),
    Model(
        "JiT",
        "jit_l_256",
        _DIT | {"prediction": "image"},
        Published(459_000_000, 24.8, 0.23, 2.5, 0.46, 0.009),
    ),
    Model(
        "Baseline",
        "baseline_l_256",
        _DIT,
        Published(459_000_000, 24.8, 0.22, 2.5, 0.46, 0.009),
    ),
    Model(
        "DeCo without frequency loss",
        "c2i_l_256",
        _DECO,
        Published(426_000_000, 27.5, 0.24, 2.4, 0.46, 0.009),
        ("--loss.frequency_weight=0",),
    ),
    Model("DeCo", "c2i_l_256", _DECO, Published(426_000_000, 27.5, 0.24, 2.4, 0.46, 0.009)),
)


@dataclass
class ModelFigures:
    """What was measured of a model; times in seconds, memory in bytes.

    Attributes:
        parameters: of the network, without REPA's projector.
        iteration: median of a training step.
        iteration_spread: least and most.
        iteration_floor: the least that its arithmetic and its bytes allow.
        training_memory: weights, gradients, moments, average, and the peak of a step.
        image: median of drawing one image.
        image_spread: least and most.
        inference_memory: the engine's weights and tables, and the peak of a drawing.
        published: the paper's figures, at size L.
    """

    name: str
    parameters: int
    iteration: float
    iteration_spread: tuple[float, float]
    iteration_floor: float
    training_memory: int | None
    image: float
    image_spread: tuple[float, float]
    inference_memory: int | None
    published: dict[str, float] | None = None


@dataclass(frozen=True)
class ModelTable:
    """Table 1 as it was measured.

    Attributes:
        title: size and precision.
        conditions: batch and image size.
        rows: in the table's order.
    """

    title: str
    conditions: str
    rows: list[ModelFigures]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain types."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelTable:
        """The inverse of `to_json`."""
        rows = [ModelFigures(**row) for row in fields["rows"]]
        return cls(fields["title"], fields["conditions"], rows)


def describe_models(table: ModelTable) -> str:
    """The table as Markdown; the paper's figures in brackets."""
    return f"### {table.title}\n\n{table.conditions}.\n\n" + markdown_table(
        [_cells(row) for row in table.rows]
    )


def _cells(row: ModelFigures) -> dict[str, str]:
    paper = row.published or {}

    def cell(text: str, key: str, unit: str, per: float = 1) -> str:
        return f"{text} ({paper[key] / per:g}{unit})" if key in paper else text

    return {
        "variant": row.name,
        "parameters": cell(f"{row.parameters / 1e6:,.2f}M", "parameters", "M", 1e6),
        "training GB": cell(_gb(row.training_memory), "training_gb", " GB"),
        "ms/iteration": cell(_ms(row.iteration, row.iteration_spread), "iteration", " s"),
        "of floor": f"{row.iteration_floor / row.iteration:.1%}",
        "inference GB": cell(_gb(row.inference_memory), "inference_gb", " GB"),
        "ms/image": cell(_ms(row.image, row.image_spread), "image", " s"),
        "ms/step": cell(_four_digits(row.image / STEPS * 1e3), "step", " s"),
    }


def _gb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.3g}"


def _ms(seconds: float, spread: tuple[float, float]) -> str:
    low, median, high = (_four_digits(value * 1e3) for value in (spread[0], seconds, spread[1]))
    return f"{median} [{low} – {high}]"


def _four_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
