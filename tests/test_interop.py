"""The published checkpoints: opened, refused where they are something else, written again."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import threading
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from deco_fast.checkpoint import load_checkpoint, read_card, read_config, save_checkpoint
from deco_fast.errors import UserError
from deco_fast.interop import progress, published
from deco_fast.interop.__main__ import main
from deco_fast.interop.convert import convert
from deco_fast.interop.unpickle import Placeholder, TensorRecord, TorchFile
from deco_fast.models.build import build_network
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import DeCoConfig, DeCoT2IConfig, PixelDiTConfig
from deco_fast.models.deco import DeCo
from deco_fast.models.deco_t2i import DeCoT2I
from deco_fast.models.presets import PRESETS

CONFIG = DeCoConfig(
    hidden_size=16,
    depth=2,
    num_heads=2,
    patch_size=4,
    decoder_hidden_size=8,
    decoder_depth=2,
    num_classes=3,
)
CARD = ModelCard(name="tiny", height=8, width=8, sampling=SamplingSettings(steps=7), step=12)


def random_state(seed: int, config: DeCoConfig = CONFIG) -> dict[str, Tensor]:
    """Weights under our names, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in DeCo(config).state_dict().items()
    }


def published_state(
    model: dict[str, Tensor] | None, ema: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Those of a published file, with the projector that it has beside them."""
    state = OrderedDict()
    for prefix, tensors in (("denoiser.", model), ("ema_denoiser.", ema)):
        for name, tensor in (tensors or {}).items():
            state[prefix + published.Layout().to_published(name)] = tensor
    state["diffusion_trainer.proj.0.0.weight"] = torch.zeros(16, 16)
    return state


def lightning_file(path: Path, state: dict[str, Tensor], **entries: object) -> Path:
    """A file as Lightning saves it."""
    content = {
        "epoch": 3,
        "global_step": 4321,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "lr_schedulers": [],
        **entries,
    }
    torch.save(content, path)
    return path


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A published file; model has seed 1, EMA seed 2."""
    return lightning_file(
        tmp_path / "published.ckpt", published_state(random_state(1), random_state(2))
    )


def assert_weights(model: DeCo, expected: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# Names


def layout(name: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a configuration."""
    layouts = golden.document("checkpoint_layout")["state_dict"]
    found = layouts[name]
    if "same_as" in found:
        found = layouts[found["same_as"]]
    return {key: tuple(shape) for key, shape in found.items()}


@pytest.mark.parametrize("weights", ["model", "ema"])
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("DeCo_XL", "deco-xl"),
        ("DeCo_XL_512", "deco-xl-512"),
        ("DeCo_large", "deco-l"),
        ("pretraining_res256", "deco-t2i"),
        ("sft_res512", "deco-t2i"),
        ("Baseline_DiT", "baseline-l"),
        ("Baseline_DiT_XL", "baseline-xl"),
        ("Baseline_PixNerd", "pixnerd-l"),
    ],
)
def test_names_and_shapes_map_one_to_one(name: str, preset: str, weights: str) -> None:
    prefix = published.PREFIXES[weights]
    theirs = {
        key.removeprefix(prefix): shape
        for key, shape in layout(name).items()
        if key.startswith(prefix)
    }
    with torch.device("meta"):
        model = build_network(PRESETS[preset].config)
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = published.layout_of(theirs)
    assert found == published.layout_for(model.config)
    assert {found.from_published(key): shape for key, shape in theirs.items()} == ours
    assert {found.to_published(key): shape for key, shape in ours.items()} == theirs
    assert published.infer_config(ours) == model.config
    assert not published.missing_for_inference(ours)


@pytest.mark.parametrize("name", ["model_c2i_baseline_p16", "model_c2i_pixnerd_p16"])
def test_a_baseline_to_our_layout_and_back(tmp_path: Path, name: str) -> None:
    state = {
        key.replace("param.", "ema_denoiser."): tensor
        for key, tensor in golden.tensors(name).items()
        if key.startswith("param.")
    }
    convert(lightning_file(tmp_path / "a.ckpt", state), tmp_path / "ours")
    notes = convert(tmp_path / "ours", tmp_path / "b.ckpt")
    arguments = next(note for note in notes if "configuration file" in note)
    for key, value in golden.metadata(name)["config"].items():
        assert f"{key}: {value}" in arguments
    again = torch.load(tmp_path / "b.ckpt", weights_only=True)["state_dict"]
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor), key


def test_a_preset_says_that_a_pixel_dit_predicts_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model_c2i_baseline_p16"
    state = {
        key.replace("param.", "ema_denoiser."): tensor
        for key, tensor in golden.tensors(name).items()
        if key.startswith("param.")
    }
    path = lightning_file(tmp_path / "jit.ckpt", state)
    small = golden.deco_config(golden.metadata(name)["config"])
    assert isinstance(small, PixelDiTConfig)
    jit = PRESETS["jit-l"]._replace(config=dataclasses.replace(small, prediction="image"))
    monkeypatch.setitem(PRESETS, "jit-l", jit)
    assert load_checkpoint(path).config == small
    assert "the network predicts velocity" in read_card(path).assumed
    assert load_checkpoint(path, preset="jit-l").config == jit.config


def test_names_of_no_tensor() -> None:
    for name in ("blocks.0.norm1.scale", "blocks.x.norm1.weight", "s_embedder.proj", "rope"):
        assert published.Layout().from_published(name) is None
        with pytest.raises(ValueError, match="not a tensor of a published deco"):
            published.Layout().to_published(name)


@settings(max_examples=25)
@given(
    hidden=st.integers(1, 4),
    heads=st.integers(1, 3),
    depth=st.integers(1, 11),
    patch=st.integers(1, 5),
    channels=st.integers(1, 4),
    decoder=st.tuples(st.integers(1, 9), st.integers(1, 11)),
    classes=st.integers(1, 5),
)
def test_any_architecture_is_found_from_its_tensors(
    hidden: int,
    heads: int,
    depth: int,
    patch: int,
    channels: int,
    decoder: tuple[int, int],
    classes: int,
) -> None:
    config = DeCoConfig(
        hidden_size=4 * hidden * heads,
        depth=depth,
        num_heads=heads,
        patch_size=patch,
        decoder_hidden_size=decoder[0],
        decoder_depth=decoder[1],
        num_classes=classes,
        in_channels=channels,
    )
    with torch.device("meta"):
        state = DeCo(config).state_dict()
    assert published.infer_config({k: tuple(t.shape) for k, t in state.items()}) == config


# Loading


@pytest.mark.parametrize(
    "name",
    [
        "model_c2i_deco_p16",
        "model_c2i_deco_p8",
        "model_t2i_deco_p8",
        "model_c2i_baseline_p16",
        "model_c2i_pixnerd_p16",
    ],
)
def test_the_golden_velocity(tmp_path: Path, name: str) -> None:
    tensors = golden.tensors(name)
    parameters = {
        key.removeprefix("param."): tensor
        for key, tensor in tensors.items()
        if key.startswith("param.")
    }
    state = {f"ema_denoiser.{key}": tensor for key, tensor in parameters.items()}
    state |= {f"denoiser.{key}": torch.zeros_like(tensor) for key, tensor in parameters.items()}
    model = load_checkpoint(lightning_file(tmp_path / "file.ckpt", state))
    assert model.config == golden.deco_config(golden.metadata(name)["config"])
    for case in golden.metadata(name)["cases"]:
        x, t, y = (tensors[f"{case}.in.{key}"] for key in "xty")
        with torch.no_grad():
            velocity = model(x, t, y)
        assert golden.relative_error(velocity, tensors[f"{case}.out.v"]) <= 1e-5


def test_a_published_file(ckpt: Path) -> None:
    for weights, seed in (("model", 1), ("ema", 2)):
        model = load_checkpoint(ckpt, weights=weights)
        assert_weights(model, random_state(seed))
        assert model.config == CONFIG
        assert not model.training
    assert_weights(
        load_checkpoint(ckpt, dtype=torch.bfloat16).float(),
        {name: tensor.bfloat16().float() for name, tensor in random_state(2).items()},
    )


def test_what_a_published_file_does_not_say_is_assumed(tmp_path: Path, ckpt: Path) -> None:
    card = read_card(ckpt)
    assert (card.height, card.width, card.prediction) == (256, 256, "velocity")
    assert card.sampling == SamplingSettings(
        steps=100, guidance_scale=3.2, guidance_interval=(0.1, 1.0)
    )
    assert card.step == 4321
    for part in ("256×256", "velocity", "guidance scale 3.2", "(0.1, 1]", "100 steps"):
        assert any(part in fact for fact in card.assumed), part
    with pytest.raises(UserError, match=r"preset deco-xl \(hidden_size 16 and not 1152, depth 2"):
        load_checkpoint(ckpt, preset="deco-xl")
    config = DeCo.from_preset("deco-digits").config
    state = published_state(None, random_state(3, config))
    card = load_checkpoint(lightning_file(tmp_path / "d.ckpt", state), preset="deco-digits").card
    assert card is not None
    assert (card.name, card.height, card.step, card.assumed) == ("deco-digits", 32, 4321, ())


def test_changing_a_loaded_model_does_not_change_the_file(ckpt: Path) -> None:
    before = ckpt.read_bytes()
    model = load_checkpoint(ckpt)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert ckpt.read_bytes() == before


def test_tensors_equal_those_that_torch_reads(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    saved = {
        "plain": base,
        "transposed": base.t(),
        "slice": base[2:4, ::3],
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(5).half(),
        "double": torch.randn(5).double(),
        "int": torch.arange(4),
        "bool": torch.tensor([True, False]),
        "uint16": torch.arange(4).to(torch.uint16),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    for protocol in (2, 4):
        path = tmp_path / f"{protocol}.pt"
        torch.save(saved, path, pickle_protocol=protocol)
        file = TorchFile(path)
        for name, expected in saved.items():
            record = file.content[name]
            assert isinstance(record, TensorRecord)
            tensor = file.read(record)
            assert tensor.dtype == expected.dtype
            assert tensor.shape == expected.shape
            assert torch.equal(tensor.float(), expected.detach().float()), name


def test_a_tensor_that_repeats_its_bytes_is_refused(tmp_path: Path) -> None:
    """A few of them may be as large in memory as the file likes to say."""
    path = tmp_path / "bomb.pt"
    torch.save({"whole": torch.ones(2, 3), "bomb": torch.ones(1).expand(10**6, 10**6)}, path)
    file = TorchFile(path)
    assert torch.equal(file.read(file.content["whole"]), torch.ones(2, 3))
    with pytest.raises(UserError, match="has fewer bytes than its shape"):
        file.read(file.content["bomb"])


# Foreign classes


def vanished_module(name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module whose classes pickle finds now and nobody finds later."""
    module = types.ModuleType(name)
    code = '''
import enum

class Plain:
    def __init__(self): self.value = {"nested": [self]}

class Config(dict):
    """As Lightning's AttributeDict: items, and attributes beside them."""

class Items(list): pass

class Node:
    """As OmegaConf's: slots, a state of its own, a parent that refers back."""
    __slots__ = ("content", "parent")
    def __init__(self, content, parent=None): self.content, self.parent = content, parent
    def __getstate__(self): return {"content": self.content, "parent": self.parent}
    def __setstate__(self, state): raise RuntimeError("executed")

class Kind(enum.Enum):
    A = 1

class Reducing:
    def __reduce__(self): return (touch, (PATH,), {"state": 1}, iter([1]), iter([("k", 2)]))

class Hashable:
    def __init__(self, value): self.value = value
    def __reduce__(self): return (Hashable, (self.value,))

def touch(path): open(path, "w").close(); return Items()
'''
    exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) == "builtins":
            continue
        if isinstance(value, (type, types.FunctionType)) and value is not enum.Enum:
            value.__module__ = name
    return module


def test_objects_of_foreign_classes_become_placeholders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "executed"
    with monkeypatch.context() as patch:
        module = vanished_module("a_module_that_no_longer_exists", patch)
        module.PATH = str(marker)
        root = module.Node({"a": 1})
        root.content["child"] = module.Node([1, 2], parent=root)
        config = module.Config(lr=1e-4)
        config.extra = module.Plain()
        defaults = defaultdict(list, {"x": [1]})
        parameters = {
            "plain": module.Plain(),
            "config": config,
            "items": module.Items([1, module.Plain()]),
            "node": root,
            "kind": module.Kind.A,
            "class": module.Plain,
            "reducing": module.Reducing(),
            "partial": functools.partial(module.Plain, 1, key=module.Items()),
            "optimizer": functools.partial(torch.optim.AdamW, lr=1e-4),
            "defaults": defaults,
            "path": pathlib.PurePosixPath("/a/b"),
            "keys": {module.Hashable(1): 1, module.Hashable(2): 2},
            "set": {1, 2},
            "frozen": frozenset([3]),
            "complex": 1 + 2j,
            "raw": b"\xff\x00",
            "large": 2**100,
            "dtype": torch.float16,
            "device": torch.device("cpu"),
        }
        state = published_state(random_state(1), random_state(2))
        path = lightning_file(tmp_path / "f.ckpt", state, hyper_parameters=parameters)
    # torch's own restricted loader cannot open it, whatever it is allowed to.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert "a_module_that_no_longer_exists" not in sys.modules
    assert_weights(load_checkpoint(path), random_state(2))
    assert not marker.exists()
    loaded = TorchFile(path).content["hyper_parameters"]
    assert loaded.keys() == parameters.keys()
    for name in ("plain", "config", "items", "node", "kind", "reducing", "partial", "defaults"):
        assert isinstance(loaded[name], Placeholder), name
    assert loaded["node"].qualname == "a_module_that_no_longer_exists.Node"
    assert loaded["large"] == 2**100
    assert len(loaded["keys"]) == 2


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class SystemCommand:
    """Pickles as a class whose construction would run a command."""

    def __reduce__(self) -> Any:
        return subprocess.Popen, (["touch", os.environ["DECO_TEST_MARKER"]],)


def code_objects(marker: Path) -> dict[str, object]:
    python = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, python),
        "exec": Calls(exec, python),
        "subprocess": SystemCommand(),
        "open": Calls(open, str(marker), "w"),
        "partial": functools.partial(os.system, f"touch {marker}"),
        "import": Calls(__import__, "antigravity"),
        "getattr": Calls(getattr, os, "system"),
        "nested": [{"a": (Calls(eval, python),)}],
    }


@pytest.mark.parametrize("name", [name for name in code_objects(Path()) if name != "getattr"])
def test_code_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    marker = tmp_path / "executed"
    monkeypatch.setenv("DECO_TEST_MARKER", str(marker))
    attack = code_objects(marker)[name]
    content = {"state_dict": published_state(None, random_state(2)), "hyper_parameters": attack}
    path = tmp_path / "attack.ckpt"
    for save in (
        lambda: torch.save(content, path),
        lambda: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(attack)),
        lambda: path.write_bytes(pickle.dumps(attack, protocol=2)),
    ):
        save()
        with pytest.raises(UserError) as caught:
            load_checkpoint(path)
        assert "has code in its pickle" in str(caught.value)
        assert "which was not run" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not marker.exists()


def replace_pickle(path: Path, data: bytes) -> None:
    """Put another pickle into a file of torch.save, with the bytes of its tensors kept."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize(
    "data",
    [
        # BUILD on what a global stands for, which a lax reader would let it change.
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x08\x00\x00\x00__call__K\x01stb.",
        b"\x80\x02ccollections\nOrderedDict\n(N}X\x0b\x00\x00\x00__setitem__K\x01stb.",
        b"\x80\x02cforeign\nThing\n(N}X\x07\x00\x00\x00__new__K\x01stb.",
        # An unknown record, a call of a number, an empty stack, an extension, nothing.
        b"\x80\x02X\x05\x00\x00\x00codesQ.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02.",
        b"\x80\x02\x82\x01.",
        b"",
    ],
)
def test_hostile_pickles_change_and_run_nothing(ckpt: Path, data: bytes) -> None:
    whole = ckpt.read_bytes()
    replace_pickle(ckpt, data)
    with pytest.raises(UserError):
        load_checkpoint(ckpt)
    ckpt.write_bytes(whole)
    assert_weights(load_checkpoint(ckpt), random_state(2))


# Wrong files


def assert_refused(path: Path, *parts: str, **options: Any) -> None:
    """`load_checkpoint` says so in one line that names the file."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_damaged_files(ckpt: Path) -> None:
    whole = ckpt.read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 1):
        ckpt.write_bytes(whole[:size])
        assert_refused(ckpt, "truncated or damaged", "download or copy it again")
    # The table of contents is whole and the bytes before it are short.
    ckpt.write_bytes(whole[5000:])
    assert_refused(ckpt)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file that is only read."""
    path = tmp_path_factory.mktemp("whole") / "file.ckpt"
    return lightning_file(path, published_state(None, random_state(2)))


@given(data=st.data())
def test_no_damage_makes_a_traceback(whole_file: Path, data: st.DataObject) -> None:
    """Any byte changed, or any part cut out: the file opens, or is refused in a sentence."""
    whole = whole_file.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = bytearray(whole)
        damaged[start] ^= data.draw(st.integers(1, 255))
    else:
        length = data.draw(st.integers(1, 2000))
        damaged = bytearray(whole[:start] + whole[start + length :])
    path = whole_file.with_name("damaged.ckpt")
    path.write_bytes(damaged)
    try:
        model = load_checkpoint(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert model.config == CONFIG


def test_compressed_and_other_zip_files(tmp_path: Path, ckpt: Path) -> None:
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    assert_refused(path, "not one of torch.save")
    with zipfile.ZipFile(ckpt) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name in archive.namelist():
            out.writestr(name, archive.read(name))
    assert_refused(path, "is compressed")
    torch.save([1, 2], path)
    assert_refused(path, "holds no weights of DeCo")
    torch.save({"state_dict": {"conv.weight": torch.ones(1)}}, path)
    assert_refused(path, "holds no weights of DeCo", "name a published .ckpt")


def test_a_file_of_the_other_byte_order(ckpt: Path) -> None:
    with zipfile.ZipFile(ckpt) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(ckpt, "w") as archive:
        for name, content in entries.items():
            other = b"big" if sys.byteorder == "little" else b"little"
            archive.writestr(name, other if name.endswith("/byteorder") else content)
    assert_refused(ckpt, "other byte order")


def test_a_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "legacy.ckpt"
    content = {"state_dict": published_state(None, random_state(2))}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert_refused(path, "before version 1.6", "save it again with torch.save")


def test_missing_unknown_and_misshapen_tensors(tmp_path: Path) -> None:
    path = tmp_path / "f.ckpt"
    whole = published_state(random_state(1), random_state(2))

    def change(**changes: Tensor | None) -> None:
        changed = {
            **whole,
            **{"ema_denoiser." + k.replace("__", "."): t for k, t in changes.items()},
        }
        lightning_file(path, {k: t for k, t in changed.items() if t is not None})

    change(blocks__1__norm1__weight=None, s_embedder__proj__bias=None)
    assert_refused(path, "2 missing (ema_denoiser.s_embedder.proj.bias, ema_denoiser.blocks.1.norm")
    change(s_embedder__proj__weight=None)
    assert_refused(path, "1 missing (ema_denoiser.s_embedder.proj.weight)")
    change(rope__table=torch.ones(1), blocks__0__attn__extra__weight=torch.ones(1))
    assert_refused(path, "2 unknown (ema_denoiser.rope.table, ema_denoiser.blocks.0.attn.extra")
    change(blocks__0__attn__extra__weight=None, blocks__7__norm1__weight=torch.ones(16))
    assert_refused(path, "missing", "1 unknown (ema_denoiser.blocks.7.norm1.weight)")
    change(s_embedder__proj__bias=torch.ones(17))
    assert_refused(
        path, "1 of the wrong shape (ema_denoiser.s_embedder.proj.bias (17,) instead of (16,))"
    )
    change(s_embedder__proj__weight=torch.ones(16, 50))
    assert_refused(path, "a patch of 50 values is no square of 3-channel pixels")
    change(s_embedder__proj__weight=torch.ones(16))
    assert_refused(path, "patch_embedder.weight has the shape (16,)")
    change(s_embedder__proj__bias=torch.ones(16, dtype=torch.int64))
    assert_refused(path, "torch.int64 in ema_denoiser.s_embedder.proj.bias")
    assert_weights(load_checkpoint(path, weights="model"), random_state(1))


def test_a_file_with_only_one_kind_of_weights(tmp_path: Path) -> None:
    path = lightning_file(tmp_path / "f.ckpt", published_state(random_state(1), None))
    assert_refused(path, "holds no 'ema' weights (it has: model): use --weights model")
    path = lightning_file(tmp_path / "f.ckpt", published_state(None, random_state(2)))
    assert_refused(path, "holds no 'model' weights (it has: ema)", weights="model")


def test_a_published_text_model(tmp_path: Path) -> None:
    config = DeCoT2IConfig(16, 2, 2, patch_size=4, text_depth=3, text_size=24, text_length=5)
    state = {name: torch.randn_like(t) for name, t in DeCoT2I(config).state_dict().items()}
    path = lightning_file(tmp_path / "t2i.ckpt", published_state(state, state))
    model = load_checkpoint(path)
    assert isinstance(model, DeCoT2I)
    assert model.config == config
    assert_weights(model, state)
    assert model.card is not None
    assert (model.card.height, model.card.sampling) == (512, PRESETS["deco-t2i"].card.sampling)
    assert "guidance scale 4 for times in (0, 1)" in model.card.assumed
    assert "25 steps of the solver adams, time shift 3" in model.card.assumed
    assert_refused(path, "draws from text, unlike preset deco-xl", preset="deco-xl")
    missing = {name: tensor for name, tensor in state.items() if name != "text_position"}
    lacking = lightning_file(tmp_path / "f.ckpt", published_state(None, missing))
    assert_refused(lacking, "1 missing (ema_denoiser.y_pos_embedding)")

    ours = tmp_path / "ours"
    assert "assumed: images of 512×512 pixels" in convert(path, ours)
    assert_weights(load_checkpoint(ours), state)
    notes = " ".join(convert(ours, tmp_path / "back.ckpt"))
    assert "txt_embed_dim: 24, txt_max_length: 5, num_text_blocks: 3" in notes
    assert "num_encoder_blocks: 2, num_decoder_blocks: 3" in notes
    back = load_checkpoint(tmp_path / "back.ckpt", weights="model")
    assert (back.config, back.card) == (config, load_checkpoint(ours).card)
    assert_weights(back, state)
    theirs = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(theirs["denoiser.y_pos_embedding"], state["text_position"])


# Conversion


def test_there_and_back(tmp_path: Path) -> None:
    ours = save_checkpoint(
        tmp_path / "ours",
        model=random_state(1),
        ema=random_state(2),
        card=CARD,
        config=CONFIG,
        projector={"0.weight": torch.zeros(16, 16)},
        training={"step": 12},
    )
    notes = convert(ours, tmp_path / "p.ckpt")
    assert any("training.pt (optimizer" in note for note in notes)
    assert any("num_groups: 2" in note and "num_blocks: 4" in note for note in notes)
    # What anybody else reads, with torch's own restricted loader.
    theirs = torch.load(tmp_path / "p.ckpt", weights_only=True)
    assert theirs["global_step"] == 12
    expected = published_state(random_state(1), random_state(2))
    assert theirs["state_dict"].keys() == expected.keys()
    assert all(torch.equal(theirs["state_dict"][k], expected[k]) for k in expected)
    # Reading it again, nothing has to be assumed.
    notes = convert(tmp_path / "p.ckpt", tmp_path / "again")
    assert not any("assumed" in note for note in notes)
    for name in ("model", "ema", "projector"):
        file = f"{name}.safetensors"
        one, other = load_file(ours / file), load_file(tmp_path / "again" / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_card(tmp_path / "again") == CARD
    assert read_config(tmp_path / "again") == CONFIG


def test_a_published_file_to_ours(tmp_path: Path, ckpt: Path) -> None:
    notes = convert(ckpt, tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "checksums.json",
        "ema.safetensors",
        "model.safetensors",
        "projector.safetensors",
    ]
    assert_weights(load_checkpoint(tmp_path / "ours"), random_state(2))
    assert_weights(load_checkpoint(tmp_path / "ours", weights="model"), random_state(1))
    text = "\n".join(notes)
    assert "projector" not in text
    assert "optimizer_states" in text
    assert "assumed: images of 256×256 pixels" in text
    assert read_card(tmp_path / "ours").assumed == read_card(ckpt).assumed
    notes = convert(ckpt, tmp_path / "w.safetensors", weights="model")
    assert any("the 'ema' weights" in note for note in notes)
    assert "not carried: the projector of representation alignment" in notes
    assert_weights(load_checkpoint(tmp_path / "w.safetensors", "model"), random_state(1))


def test_one_network_alone(tmp_path: Path) -> None:
    ckpt = lightning_file(tmp_path / "f.ckpt", published_state(None, random_state(2)))
    notes = convert(ckpt, tmp_path / "ours")
    assert any("not in" in note and "'model'" in note for note in notes)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "checksums.json",
        "ema.safetensors",
        "projector.safetensors",
    ]
    convert(tmp_path / "ours", tmp_path / "g.ckpt")
    assert all(
        name.startswith(("ema_denoiser.", "diffusion_trainer.proj."))
        for name in torch.load(tmp_path / "g.ckpt", weights_only=True)["state_dict"]
    )
    with pytest.raises(UserError, match="holds no 'model' weights"):
        convert(ckpt, tmp_path / "w.safetensors", weights="model")


def test_the_command(tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(ckpt), str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote {out}\n")
    assert "not carried: " in printed
    first = (out / "ema.safetensors").read_bytes()
    other = lightning_file(tmp_path / "o.ckpt", published_state(None, random_state(3)))
    assert main(["convert", str(other), str(out)]) == 2
    assert "exists: choose another name, or replace it with --force" in capsys.readouterr().err
    assert (out / "ema.safetensors").read_bytes() == first
    assert main(["convert", str(other), str(out), "--force"]) == 0
    assert_weights(load_checkpoint(out), random_state(3))


def test_nothing_is_written_into_a_checkpoint(
    tmp_path: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(ckpt), str(out)]) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for command, name in (
        ("convert", "ema.safetensors"),
        ("convert", "model.safetensors"),
        ("export", "published"),
    ):
        capsys.readouterr()
        assert main([command, str(out), str(out / name), "--force"]) == 2
        error = capsys.readouterr().err
        assert error == f"error: {out / name} is in the checkpoint {out}: choose another place\n"
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_bar_follows_the_bytes_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    class Bar:
        n = 0

        def __init__(self, **options: object) -> None:
            assert options["total"] == 20_000

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...

        def update(self, count: int) -> None:
            self.n += count
            shown.append(self.n)
            seen.set()

    seen = threading.Event()
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(progress, "_INTERVAL", 0.001)
    (tmp_path / ".older.tmp-00").write_bytes(bytes(5000))
    with progress.written_bytes_bar(tmp_path, 20_000, "writing"):
        (tmp_path / ".new.tmp-11").mkdir()
        for name in ("a", "b"):
            (tmp_path / ".new.tmp-11" / name).write_bytes(os.urandom(5000))
        for _ in range(10_000):  # some file systems allocate late
            if shown[-1:] == [10_000]:
                break
            seen.clear()
            assert seen.wait(60)
        assert shown[-1] == 10_000
    assert shown[-1] == 20_000
    assert shown == sorted(shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.ckpt", "out"], "does not exist"),
        (["f.ckpt", "out.ckpt"], "are both in published layout"),
        (["f.ckpt", "out.pth"], "names no layout"),
        (["f.ckpt", "out", "--preset", "deco-m"], "unknown preset 'deco-m'"),
        (["f.ckpt", "out", "--preset", "deco-l"], "not of the architecture of preset deco-l"),
        (["short.ckpt", "out.safetensors"], "truncated or damaged"),
        (["f.ckpt", "f.ckpt/out"], "cannot write"),
        (["f.ckpt", "out", "--weights", "raw"], "invalid choice"),
        (["f.ckpt"], "required: OUT"),
        (["f.ckpt", "out", "--presett", "deco-l"], "'--presett'; did you mean '--preset'?"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    ckpt: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = ckpt.read_bytes()
    Path("short.ckpt").write_bytes(whole[:-100])
    ckpt.rename("f.ckpt")
    before = sorted(os.listdir())
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(os.listdir()) == before
    assert Path("f.ckpt").read_bytes() == whole


def test_the_module_is_a_command(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "deco_fast.interop", "convert", str(tmp_path / "no.ckpt"), "out"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
