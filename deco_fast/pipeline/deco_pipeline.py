"""`DeCoPipeline`: the sampling engine behind the interface of diffusers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, snapshot_download, upload_folder
from PIL import Image
from torch import Tensor

from deco_fast.checkpoint.find import HUB_SCHEME, is_shipped, locate
from deco_fast.checkpoint.load import load_checkpoint, open_checkpoint
from deco_fast.conditioning.qwen3 import Qwen3TextEncoder
from deco_fast.errors import UserError, nearest
from deco_fast.interop.model_folder import (
    DATA_FILES,
    NEW_README_FILE,
    check_model_folder,
    write_model_folder,
)
from deco_fast.models.card import ModelCard
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.network import DeCoNetwork
from deco_fast.pipeline.inputs import (
    Generators,
    Labels,
    Prompts,
    check_count,
    check_generator,
    check_latents,
    conditions_of,
    settings_of,
)
from deco_fast.sampling.engine import SamplingEngine
from deco_fast.sampling.images import to_uint8
from deco_fast.sampling.job import check_size
from deco_fast.sampling.text_encoder import cut_prompts, open_text_encoder, text_encoder_path

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")

_PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")

Callback = Callable[[DiffusionPipeline, int, float, dict[str, Tensor]], dict[str, Tensor] | None]

logger = logging.get_logger(__name__)


class DeCoPipeline(DiffusionPipeline):
    """Draws images from class labels or prompts with any network of deco_fast.

    `SamplingEngine` draws, so the images are those of `sample.py` for the same noise. What a call
    does not say comes from the model's card. There is no autoencoder: what diffusers calls latents
    are the images themselves, about [−1, 1]. The text encoder stays in the dtype that it was made
    with, bfloat16 unless told otherwise, whatever the network's.

    Args:
        transformer: the network, with its card.
        text_encoder: of a text model.

    Raises:
        UserError: the network has no card; a text model has no text encoder, or a class model one.
    """

    _optional_components = ["text_encoder"]  # noqa: RUF012  diffusers reads a list
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    transformer: DeCoNetwork
    text_encoder: Qwen3TextEncoder | None

    def __init__(
        self, transformer: DeCoNetwork, text_encoder: Qwen3TextEncoder | None = None
    ) -> None:
        super().__init__()
        is_text = isinstance(transformer, DeCoT2I)
        if is_text and text_encoder is None:
            raise UserError("this network draws from text: give text_encoder, a Qwen3TextEncoder")
        if text_encoder is not None and not is_text:
            raise UserError("text_encoder: this network draws classes; leave it out")
        self.register_modules(transformer=transformer, text_encoder=text_encoder)
        _ = self._card  # raises where there is none
        self._interrupt = False
        self._weights = "ema"

    @property
    def interrupt(self) -> bool:
        """Whether to stop drawing: a callback sets `_interrupt`, as everywhere in diffusers."""
        return self._interrupt

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        text_encoder: str | os.PathLike[str] | Qwen3TextEncoder | None = None,
        use_safetensors: bool | None = None,
        **download_options: Any,
    ) -> DeCoPipeline:
        """A pipeline on the CPU; nothing in the files is executed.

        Args:
            pretrained_model_name_or_path: a folder of `save_pretrained` or `interop export`; or
                anything else that `deco_fast.load_checkpoint` opens, "hf:owner/repository/file"
                among it; or "owner/repository", a model folder on the hub.
            dtype, torch_dtype: of the network; float32 by default, as in diffusers.
            text_encoder: instead of the model's: a folder, "hf:owner/repository", or one that is
                open already.
            use_safetensors: true or not said; a model folder has no other weights.
            download_options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir,
                local_files_only, force_download.

        Raises:
            UserError: there is no such model, it is damaged, or an option is unknown.
        """
        known = (*_DOWNLOAD_OPTIONS, "dtype", "text_encoder", "use_safetensors")
        _check_options("from_pretrained", download_options, _DOWNLOAD_OPTIONS, known)
        _check_safetensors("use_safetensors", use_safetensors)
        dtype = dtype or torch_dtype or torch.float32
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"dtype must be one of torch's, such as torch.bfloat16, not {dtype!r}")
        name = os.fspath(pretrained_model_name_or_path)
        here = Path(name).expanduser().exists() or is_shipped(name)
        if not name.startswith(HUB_SCHEME) and not here:
            name = os.fspath(cls.download(name, **download_options))
        path = locate(name)
        weights = open_checkpoint(path).weights
        if path.is_dir():
            check_model_folder(path, weights)
        network = load_checkpoint(path, weights, dtype=dtype)
        # Weights that are mapped lie as the file has them, and a CPU's products round differently
        # where they are not aligned: a model that was saved would not draw the same bits again.
        copies = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(copies, assign=True)
        if isinstance(text_encoder, os.PathLike):
            text_encoder = os.fspath(text_encoder)
        if isinstance(network, DeCoT2I) and not isinstance(text_encoder, Qwen3TextEncoder):
            said = text_encoder_path(text_encoder, network.card or ModelCard())
            text_encoder = open_text_encoder(network, said, network.device)
        if isinstance(text_encoder, str):
            raise UserError(f"text_encoder: {name} draws classes; leave it out")
        pipeline = cls(network, text_encoder)
        pipeline._weights = weights
        pipeline.register_to_config(_name_or_path=name)
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **options: Any) -> str:
        """Fetch a model folder from the hub: weights and texts, no code.

        Args:
            pretrained_model_name: "owner/repository".
            options: of `huggingface_hub.snapshot_download`.

        Returns:
            The folder in the hub's cache.

        Raises:
            UserError: there is no such repository, or the hub cannot be reached.
        """
        try:
            return str(
                snapshot_download(pretrained_model_name, allow_patterns=list(DATA_FILES), **options)
            )
        except (OSError, ValueError) as error:  # the hub's errors are either
            reason = str(error).strip().splitlines()[0].rstrip(".:")
            raise UserError(
                f"{pretrained_model_name} is no file or folder here, and the hub does not give it "
                f"({reason}): check the name"
            ) from error

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        *,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a model folder: config.json, safetensors, model card, as `interop export` does.

        A text encoder in a folder is copied into it; one on the hub is named.

        Args:
            save_directory: where; a model folder that is there is replaced. An edited README.md
                stays, beside the new one, README.new.md, which is not uploaded.
            safe_serialization: true; there is no other way here.
            push_to_hub: upload it as well, see `push_to_hub`.
            options: of `push_to_hub`; `repo_id` is the folder's name by default.

        Raises:
            UserError: it cannot be written, or holds other files; or an option is unknown.
        """
        known = (*_PUSH_OPTIONS, "push_to_hub", "safe_serialization")
        _check_options("save_pretrained", options, _PUSH_OPTIONS, known)
        _check_safetensors("safe_serialization", safe_serialization)
        network, card = self.transformer, self._card
        if self.text_encoder is not None:
            card = replace(card, text_encoder=self.text_encoder.path)
        folder = Path(save_directory)
        write_model_folder(folder, network.state_dict(), card, network.config, self._weights)
        if push_to_hub:
            _upload(folder, options.pop("repo_id", folder.name), **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the model folder, with its model card, to the hub.

        Args:
            repo_id: "owner/repository"; it is made if it does not exist.
            commit_message: "Upload DeCoPipeline" by default.
            private: of a new repository; by default as its owner has set.
            token: to log in with; by default that of `hf auth login`.
            create_pr: propose a change instead of making it.

        Returns:
            The address of the commit.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(folder)
            return _upload(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
            )

    def to(self, *args: Any, **kwargs: Any) -> DeCoPipeline:
        """Move to a device, and the network to a dtype, as in diffusers.

        Returns:
            The pipeline itself.
        """
        super().to(*args, **kwargs)
        if self.text_encoder is not None:
            self.text_encoder.to(self.device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        class_labels: Labels | None = None,
        negative_prompt: Prompts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        time_shift: float | None = None,
        solver: str | None = None,
        order: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images, all in one batch.

        Args:
            prompt: of a text model, a text or several; "" is unconditional.
            class_labels: of a class model, labels 0 … num_classes − 1; num_classes is none of them.
            negative_prompt: what guidance leads away from, one for all images; by default nothing.
            height, width: in pixels.
            num_inference_steps: solver steps.
            guidance_scale: 1 is no guidance.
            guidance_rescale: 0 … 1, against too strong contrast.
            guidance_interval: (low, high), times in 0 … 1 between which guidance acts.
            time_shift: above 1: more steps near the noise.
            solver, order: "euler", "heun", "heun-pec", or "adams" of order 1 … 4.
            num_images_per_prompt: of each prompt, or of each class.
            generator: of the noise; a list has one for each image.
            latents: the noise itself, (N, C, H, W), standard normal; that of image i of
                `sample.py --seed S` is `deco_fast.sampling.noise.noise_for(S, i, (C, H, W))`.
            output_type: "pil"; "np", (N, H, W, C) in [0, 1]; "pt", (N, C, H, W) in [0, 1]; or
                "latent", (N, C, H, W) as the model gives them, about [−1, 1].
            return_dict: a tuple instead, if false.
            callback_on_step_end: called as (pipeline, i, t, {"latents": x}) after evaluation i of
                the model, made at time t from 0 (noise) to 1 (image); Heun's solvers evaluate about
                twice a step. It may return a dict, whose "latents" take the place of x.
            callback_on_step_end_tensor_inputs: which of ("latents",) it gets.

        Returns:
            `ImagePipelineOutput`, whose `images` are as `output_type` says.

        Raises:
            UserError: an argument does not fit the model, or an image is not finite.
            ValueError: a setting of the solver or of guidance is out of range.
        """
        network, card = self.transformer, self._card
        if output_type not in OUTPUT_TYPES:
            raise UserError(
                f"unknown output_type '{output_type}'{nearest(str(output_type), OUTPUT_TYPES)}"
            )
        for name in callback_on_step_end_tensor_inputs:
            if name not in self._callback_tensor_inputs:
                raise UserError(f"callback_on_step_end_tensor_inputs: there is no '{name}'")
        conditions, uncondition = conditions_of(
            network.config, prompt, class_labels, negative_prompt, num_images_per_prompt
        )
        height = card.height if height is None else height
        width = card.width if width is None else width
        for name, size in (("height", height), ("width", width)):
            check_count(name, size)
        check_size(network.config, height, width, names=("height", "width"))
        settings = settings_of(
            card.sampling,
            num_inference_steps=num_inference_steps,
            solver=solver,
            order=order,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            time_shift=time_shift,
        )
        shape = (len(conditions), network.config.in_channels, height, width)
        noise = self._noise(shape, generator, latents)
        self._warn_of_cut_prompts(conditions, uncondition)
        engine = SamplingEngine(
            network,
            settings,
            height=height,
            width=width,
            batch_size=len(conditions),
            distinct_conditions=len(set(conditions)),
            encode_text=self.text_encoder,
        )

        self._interrupt = False
        t = 0.0
        states = engine.states(noise, conditions, uncondition=uncondition)
        with self.progress_bar(total=engine.evaluations) as bar:
            for state in states:
                if state.evaluation > 0:
                    bar.update()
                    if callback_on_step_end is not None:
                        inputs = dict.fromkeys(callback_on_step_end_tensor_inputs, state.x)
                        outputs = callback_on_step_end(self, state.evaluation - 1, t, inputs) or {}
                        if (changed := outputs.get("latents", state.x)) is not state.x:
                            state.x.copy_(check_latents(changed, shape))
                if self.interrupt:
                    break
                t = state.t
        images = state.x.clone()
        if not images.isfinite().all():
            dtype = str(network.dtype).removeprefix("torch.")
            remedy = "the weights or the settings are to blame"
            if network.dtype != torch.float32:
                remedy = "draw in float32: pipe.to(torch.float32)"
            raise UserError(f"an image is not finite in {dtype}: {remedy}")
        converted = _converted(images, output_type)
        return ImagePipelineOutput(images=converted) if return_dict else (converted,)

    @property
    def _card(self) -> ModelCard:
        card = self.transformer.card
        if card is None:
            raise UserError("the network has no card: set transformer.card to a ModelCard")
        return card

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: Generators | None,
        latents: Tensor | None,
    ) -> Tensor:
        if latents is not None:
            if not check_latents(latents, shape).isfinite().all():
                raise UserError("latents are not finite: give standard normal noise")
            return latents
        generators = check_generator(generator, shape[0])
        # In float32 whatever the network's dtype, as the engine's state is.
        noise: Tensor = randn_tensor(shape, generators, device=self.device, dtype=torch.float32)
        return noise

    def _warn_of_cut_prompts(self, conditions: Sequence[Any], uncondition: Any) -> None:
        if self.text_encoder is not None:
            for line in cut_prompts(self.text_encoder, [*conditions, uncondition or ""]):
                logger.warning(line)


def _check_options(
    method: str, given: Iterable[str], accepted: Sequence[str], known: Sequence[str]
) -> None:
    for option in given:
        if option not in accepted:
            raise UserError(f"{method}: unknown '{option}'{nearest(option, known)}")


def _check_safetensors(option: str, value: bool | None) -> None:
    if value is False:
        raise UserError(f"{option}: weights are safetensors and nothing else; leave it out")


def _upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """As diffusers' own mixin, which would put an empty model card in the place of ours."""
    repository = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    return str(
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[NEW_README_FILE],
            token=token,
            commit_message=commit_message or "Upload DeCoPipeline",
            create_pr=create_pr,
        )
    )


def _converted(images: Tensor, output_type: str) -> Any:
    """Of images (N, C, H, W), about [−1, 1]."""
    if output_type == "latent":
        return images
    if output_type == "pil":
        # Not by diffusers' function, which rounds halves to even and sample.py does not.
        return [Image.fromarray(image) for image in to_uint8(images).cpu().numpy()]
    shares = (images / 2 + 0.5).clamp(0, 1)
    return shares if output_type == "pt" else np.asarray(shares.permute(0, 2, 3, 1).cpu())
