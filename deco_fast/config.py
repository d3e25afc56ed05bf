"""A run's configuration: YAML file, then overrides from the command line, resolved once.

Everything below the commands gets a `RunConfig` and reads neither files nor the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from deco_fast.data.transforms import Crop
from deco_fast.errors import UserError, nearest
from deco_fast.flow import TimestepDistribution, TimestepWeight
from deco_fast.losses import FrequencyMode
from deco_fast.models.card import ModelCard, SamplingSettings, check_sampling
from deco_fast.models.config import (
    NETWORKS,
    ClassConfig,
    DeCoConfig,
    DeCoT2IConfig,
    NetworkConfig,
    PixDDTConfig,
    PixelDiTConfig,
    PixNerdConfig,
    network_of,
)
from deco_fast.models.presets import preset
from deco_fast.resources import config_folder
from deco_fast.solvers import time_grid

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Images, and labels or captions."""

    dataset: Literal["digits", "photographs", "folder", "shards"] = Field(
        "folder",
        description="digits, photographs: scikit-learn's, no download; folder: class folders, or "
        "for a text model images with IMAGE.txt beside them; shards: tar files",
    )
    root: str | list[str] | None = Field(
        None,
        description="the folder; for shards a folder of .tar files, a pattern such as "
        "train-{000000..000146}.tar, or a list of these",
    )
    height: Count = Field(256, description="pixels")
    width: Count = Field(256, description="pixels")
    random_flip: bool = Field(False, description="mirror half of the images; off in the paper")
    crop: Crop = Field(
        "adm", description="to size: adm, or bilinear as in the text model's fine-tuning"
    )
    skip_small: bool = Field(
        False, description="of a text model, pass over images that would have to be enlarged"
    )
    max_damaged_share: Probability = Field(
        0.01, description="of the images; with more damaged ones the run stops"
    )
    index_folder: str | None = Field(
        None, description="keeps the shards' index; None: .deco-index beside them"
    )
    workers: Annotated[int, Field(ge=0)] = Field(4, description="loader processes per rank")
    prefetch: Count = Field(4, description="batches that each of them reads ahead")


class FlowConfig(_Section):
    """Times and conditions of a training step."""

    distribution: TimestepDistribution = Field("lognorm", description="of the training times")
    time_shift: Positive = Field(1.0, description="above 1: more steps near the noise")
    timestep_weight: TimestepWeight = Field(
        "constant", description="weight of the flow-matching term over time"
    )
    null_probability: Probability = Field(
        0.1, description="labels or captions dropped in training, for guidance"
    )


class LossConfig(_Section):
    """The frequency-aware term."""

    frequency_weight: NonNegative = Field(1.0, description="its factor; 0 is off")
    quality: Annotated[int, Field(ge=1, le=100)] = Field(85, description="of the JPEG tables")
    mode: FrequencyMode = Field("inv_gamma", description="how a table becomes weights")
    gamma: float = Field(1.0, description="exponent of inv_gamma")


class AlignmentConfig(_Section):
    """REPA: the DiT's tokens are drawn towards DINOv2's."""

    enabled: bool = Field(False, description="train with it; --repa on, off or FILE for short")
    weight: Positive = Field(0.5, description="of the cosine term")
    layer: Count = Field(8, description="the DiT block, from 1, whose output is aligned")
    projector_hidden_size: Count | None = Field(None, description="none: the width of the DiT")
    encoder: str = Field(
        "hf:facebook/dinov2-base/model.safetensors",
        description="DINOv2's weights: the original's .pth, a .safetensors, or hf:…",
    )
    cache: str | None = Field(None, description="folder that keeps features of images met before")
    cache_gib: Positive = Field(64, description="the most that it may take, in GiB")


class TextConfig(_Section):
    """Captions and prompts of a text model."""

    encoder: str = Field(
        "hf:Qwen/Qwen3-1.7B", description="a folder with Qwen3, or hf:owner/repository"
    )
    prefix_probability: Probability = Field(
        0.0, description='of "A photo of" and the like before captions under 30 words'
    )
    sample_prompts: Annotated[list[str], Field(min_length=1)] = Field(
        [
            "a red panda reading a newspaper",
            "a bowl of fruit on a wooden table",
            "a lighthouse on a cliff at night",
            "a portrait of an old sailor",
        ],
        description="of the grids of samples",
    )


class TrainingConfig(_Section):
    """The optimizer's side."""

    steps: Count = Field(description="optimizer steps")
    batch_size: Count = Field(256, description="images per step over all processes")
    gradient_accumulation: Count = Field(1, description="backward passes per step")
    learning_rate: Positive = 1e-4
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="linear from 0")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="after the warm-up; cosine ends at 0"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of AdamW")
    weight_decay: NonNegative = 0.0
    gradient_clipping: Positive | None = Field(None, description="largest norm of the gradient")
    explosion_factor: Annotated[float, Field(gt=1)] | None = Field(
        20.0, description="a loss so many times the mean of the last 100 stops the run; null: off"
    )
    ema_decay: Probability = Field(0.9999, description="of the averaged weights")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16: autocast, fp32 weights")
    compile: bool = Field(True, description="torch.compile the model and the loss")
    cuda_graph: bool = Field(
        True,
        description="on GPUs record forward and backward of a step once and replay them, so that "
        "it does not wait for the host; ddp then averages gradients after the backward pass: "
        "between GPUs with a slow network false may be faster; not with recompute_activations, nor "
        "with fsdp on several GPUs",
    )
    recompute_activations: bool = Field(
        False, description="compute the DiT blocks again in the backward pass: less memory, slower"
    )
    distribution: Literal["ddp", "fsdp"] = Field(
        "ddp", description="over processes: a copy of the weights each, or FSDP2's shards"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init_from: str | None = Field(
        None, description="begin with a checkpoint's weights; --init-from for short"
    )


class OutputConfig(_Section):
    """What a run leaves behind, and how often."""

    log_every: Count = Field(50, description="steps between TensorBoard scalars")
    sample_every: Count = Field(5000, description="steps between grids of samples")
    sample_count: Count = Field(40, description="images in such a grid")
    checkpoint_every: Count = Field(5000, description="steps between checkpoints")
    keep_checkpoints: Count = Field(3, description="the newest ones that are kept")
    wandb_project: str | None = Field(
        None, description="send what TensorBoard gets to this project of Weights & Biases as well"
    )


def _network_of(value: Any) -> str:
    """The tag of the union below; for what is no network any, which then says so."""
    if isinstance(value, dict):
        return network_of(value)
    return network_of(value.to_json()) if hasattr(value, "to_json") else "deco"


class RunConfig(_Section):
    """One experiment, complete."""

    name: str = Field(description="of the run and its folder")
    model: Annotated[
        Annotated[DeCoConfig, Tag("deco")]
        | Annotated[DeCoT2IConfig, Tag("deco-t2i")]
        | Annotated[PixelDiTConfig, Tag("pixel-dit")]
        | Annotated[PixNerdConfig, Tag("pixnerd")]
        | Annotated[PixDDTConfig, Tag("pixddt")],
        Discriminator(_network_of),
    ] = Field(description="the network; `preset: NAME` fills in a named one")
    data: DataConfig = Field(default_factory=DataConfig)
    flow: FlowConfig = Field(default_factory=FlowConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    training: TrainingConfig
    sampling: SamplingSettings = Field(
        default_factory=SamplingSettings, description="how to draw from the trained model"
    )
    output: OutputConfig = Field(default_factory=OutputConfig)

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, fields: dict[str, Any]) -> dict[str, Any]:
        model = fields.get("model")
        if isinstance(model, dict) and "preset" in model:
            rest = {key: value for key, value in model.items() if key != "preset"}
            named = preset(str(model["preset"])).config.to_json()
            network = NETWORKS.get(network_of(named | rest))
            if network is not None:
                own = {part.name for part in dataclasses.fields(network)}
                named = {key: value for key, value in named.items() if key in own}
            fields = {**fields, "model": named | rest}
        return fields

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if Path(self.name).name != self.name or self.name in ("", ".."):
            raise ValueError(f"name '{self.name}' must be that of a folder in runs/: give --out")
        for side in ("height", "width"):
            if getattr(self.data, side) % self.model.patch_size:
                raise ValueError(
                    f"data.{side} {getattr(self.data, side)} is not divisible by "
                    f"model.patch_size {self.model.patch_size}"
                )
        built_in = {"digits": 10, "photographs": 2}.get(self.data.dataset)
        is_text = isinstance(self.model, DeCoT2IConfig)
        if is_text and built_in is not None:
            raise ValueError(
                f"data.dataset {self.data.dataset} has no captions: use folder or shards"
            )
        if not is_text and (self.data.skip_small or self.data.crop != "adm"):
            raise ValueError("data.skip_small and data.crop are for text models: leave them out")
        if (
            built_in is not None
            and isinstance(self.model, ClassConfig)
            and self.model.num_classes != built_in
        ):
            raise ValueError(
                f"data.dataset {self.data.dataset} has {built_in} classes: "
                f"set model.num_classes to {built_in}"
            )
        if self.data.dataset == "digits" and self.data.height != self.data.width:
            raise ValueError("data.dataset digits is square: set data.height = data.width")
        if self.alignment.enabled and self.alignment.layer > self.model.depth:
            raise ValueError(
                f"alignment.layer {self.alignment.layer} does not exist: the DiT has "
                f"{self.model.depth} blocks (model.depth)"
            )
        if self.model.in_channels != 3:
            raise ValueError(
                f"data.dataset {self.data.dataset} reads RGB: set model.in_channels to 3"
            )
        if self.data.root == "":
            raise ValueError("data.root is empty: name a folder, or leave it out")
        if self.data.dataset == "folder" and isinstance(self.data.root, list):
            raise ValueError("data.dataset folder has one data.root: name one folder")
        time_grid(self.sampling.steps, self.sampling.time_shift)
        # A checkpoint with others could not be read.
        check_sampling(self.sampling)
        return self

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def card(self, step: int | None = None) -> ModelCard:
        """What a checkpoint of this run has to say beside its tensors."""
        return ModelCard(
            name=self.name,
            height=self.data.height,
            width=self.data.width,
            sampling=self.sampling,
            prediction=getattr(self.model, "prediction", "velocity"),
            text_encoder=self.text.encoder if isinstance(self.model, DeCoT2IConfig) else None,
            step=step,
        )


def load_config(name_or_file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a configuration.

    Args:
        name_or_file: a name in configs/ or the path of a YAML file.
        overrides: "--section.key value" or "--section.key=value", as typed.

    Raises:
        UserError: the file, a key or a value is wrong; the nearest right one is named.
    """
    fields = _read(name_or_file)
    for key, value in _pairs(overrides):
        *sections, leaf = key.split(".")
        place = fields
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"--{key}: '{section}' is a value, not a section")
        place[leaf] = value
    try:
        return RunConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def option_help() -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every key, for `--help`."""
    for section, info in RunConfig.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for key, field in kind.model_fields.items():
                default = "required" if field.is_required() else str(field.get_default())
                yield f"{section}.{key}", default, field.description or ""
        elif dataclasses_of := _dataclasses(kind):
            parts = {
                part.name: part for each in dataclasses_of for part in dataclasses.fields(each)
            }
            for part in parts.values():
                default = "from the preset" if section == "model" else str(part.default)
                yield f"{section}.{part.name}", default, part.metadata["help"]
        else:
            yield section, "required", info.description or ""


def _dataclasses(kind: Any) -> list[Any]:
    """A dataclass, or those of a union, without what is annotated."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    bare = [get_args(each)[0] if get_origin(each) is Annotated else each for each in kinds]
    return [each for each in bare if dataclasses.is_dataclass(each)]


class _YamlLoader(yaml.SafeLoader):
    """Refuses a key that a section has twice: PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"
        ]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key}' is there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read(name_or_file: str) -> dict[str, Any]:
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = config_folder() / f"{name_or_file}.yaml"
        if not path.is_file():
            names = [file.stem for file in config_folder().glob("*.yaml")]
            raise UserError(f"unknown configuration '{name_or_file}'{nearest(name_or_file, names)}")
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such configuration file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path}: not readable as YAML: {message}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: must hold sections such as 'model:' and 'training:'")
    return fields


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    words = iter(overrides)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected '{word}': overrides look like --training.steps 1000")
        key, equals, text = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise UserError(f"--{key} needs a value")
            text = following
        # Scalars stay text, which pydantic reads by the field's type: YAML 1.1 would make a
        # string of 1e-4 and a boolean of "off".
        if text.lower() in ("null", "none"):
            yield key, None
        else:
            yield key, _list(key, text) if text.startswith("[") else text


def _list(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{key} {text} is not a list: write '[A, B]', in quotes") from error


def _explain(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    # A key that is written wrong also lacks: its name says more.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place = [str(part) for part in first["loc"] if not str(part).startswith("function")]
    network = None
    if place[:1] == ["model"] and len(place) > 1:
        network = NETWORKS[place.pop(1)]  # the union's tag
    key = ".".join(place)
    value = first.get("input")
    if first["type"] == "union_tag_invalid":
        name = str(first["ctx"]["tag"])
        return f"model.network: there is no '{name}'{nearest(name, NETWORKS)}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key '{key}'{_nearest_key(key, _keys(network))}"
    if first["type"] in ("missing", "missing_argument"):
        option = "model.preset NAME" if key == "model" else key
        return f"'{key}' is not set: add it to the configuration or give --{option}"
    if first["type"] == "literal_error":
        choices = _choices(place, network)
        return f"{key}: '{value}' is not one of {', '.join(choices)}{nearest(str(value), choices)}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{key}: {message}" if key else message
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {value!r}"


def _keys(network: type[NetworkConfig] | None) -> list[str]:
    """All keys; of the model those of this network, where it is known which one is meant."""
    keys = [key for key, _, _ in option_help()]
    if network is not None:
        own = {f"model.{part.name}" for part in dataclasses.fields(network)}
        keys = [key for key in keys if not key.startswith("model.") or key in own]
    return [*keys, *{key.split(".")[0] for key in keys}, "model.preset"]


def _nearest_key(key: str, keys: Sequence[str]) -> str:
    """As `nearest`, by the names without their sections: the key's own section, then all."""
    section, _, name = key.rpartition(".")
    own = [known for known in keys if known.rpartition(".")[0] == section]
    for some in (own, keys):
        names = {known.rpartition(".")[2]: known for known in some}
        if close := difflib.get_close_matches(name, names, n=1):
            return f"; did you mean '{names[close[0]]}'?"
    return nearest(key, keys)


def _choices(place: Sequence[str], network: type[NetworkConfig] | None) -> list[str]:
    if network is not None:
        return [str(choice) for choice in get_args(get_type_hints(network)[place[1]])]
    section = RunConfig.model_fields[place[0]].annotation
    assert isinstance(section, type) and issubclass(section, BaseModel)
    return [str(choice) for choice in get_args(section.model_fields[place[1]].annotation)]
