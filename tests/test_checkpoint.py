"""Our checkpoints: written whole or not at all, read without running anything."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deco_fast.checkpoint import (
    atomic,
    find,
    load_checkpoint,
    load_training_state,
    load_weights,
    newest_checkpoint,
    read_card,
    read_config,
    remove_leftovers,
    save,
    save_checkpoint,
    save_weights,
)
from deco_fast.checkpoint.atomic import atomic_file
from deco_fast.errors import UserError
from deco_fast.models.card import ModelCard, SamplingSettings
from deco_fast.models.config import DeCoConfig
from deco_fast.models.deco import DeCo

CONFIG = DeCoConfig(
    hidden_size=16,
    depth=2,
    num_heads=2,
    patch_size=4,
    decoder_hidden_size=8,
    decoder_depth=2,
    num_classes=3,
)
CARD = ModelCard(
    name="tiny",
    height=8,
    width=12,
    sampling=SamplingSettings(steps=7, guidance_interval=(0.25, 0.75)),
    step=1000,
)
STEP = "step-00001000"


def random_model(seed: int, config: DeCoConfig = CONFIG) -> DeCo:
    """A model without the zeros of the initialisation."""
    generator = torch.Generator().manual_seed(seed)
    model = DeCo(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 32.0}, r"height must be of type int, not 32\.0"),
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"name": 3}, "name must be of type str"),
        ({"text_encoder": 3}, "text_encoder must be of type str"),
        ({"step": "7"}, "step must be of type int"),
        ({"assumed": [3]}, "assumed must be sentences"),
        ({"sampling": {"solver": "rk4"}}, "unknown solver 'rk4'"),
        ({"sampling": {"order": 5}}, "order must be 1 … 4, not 5"),
        ({"sampling": {"steps": 2.5}}, r"steps must be of type int, not 2\.5"),
        ({"sampling": {"steps": 0}}, "steps must be at least 1, not 0"),
        ({"sampling": {"steps": True}}, "steps must be of type int, not True"),
        ({"sampling": {"guidance_interval": [0.9, 0.1]}}, "0 ≤ low ≤ high ≤ 1"),
        ({"sampling": {"guidance_interval": 1}}, "not a model card"),
        ({"sampling": {"guidance_scale": "3"}}, "guidance_scale must be of type float"),
        ({"sampling": {"guidance_scale": math.nan}}, "guidance_scale must be finite"),
        ({"sampling": {"guidance_scale": 10**400}}, "guidance_scale must be finite"),
        ({"sampling": {"guidance_interval": [0, 10**400]}}, "not a model card"),
        ({"sampling": {"guidance_rescale": 2}}, "guidance_rescale must be 0 … 1, not 2"),
        ({"sampling": {"time_shift": 0}}, "time_shift must be above 0, not 0"),
        ({"step": -1}, "step must be at least 0, not -1"),
        ({"assumed": "abc"}, "sampling must be an object, and assumed a list"),
        ({"sampling": []}, "sampling must be an object, and assumed a list"),
        ({"sampling": "euler"}, "sampling must be an object, and assumed a list"),
        ({"heigth": 8}, "not a model card"),
    ],
)
def test_a_card_of_wrong_values_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        ModelCard.from_json({**CARD.to_json(), **change})
    assert "\n" not in str(refusal.value)


def test_a_card_takes_whole_numbers_for_floats() -> None:
    settings = {**CARD.to_json()["sampling"], "guidance_scale": 3, "time_shift": 2}
    card = ModelCard.from_json({**CARD.to_json(), "sampling": settings})
    assert (card.sampling.guidance_scale, card.sampling.time_shift) == (3.0, 2.0)
    assert ModelCard.from_json({}) == ModelCard()


def assert_same_weights(one: DeCo, other: DeCo) -> None:
    expected = other.state_dict()
    assert one.state_dict().keys() == expected.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def training_state(step: int = 1000) -> dict[str, object]:
    """What a trainer saves, with an optimizer that has made a step."""
    model = random_model(0)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "loader": {"epoch": 3, "position": (5, 2**70)},
        "random": {"torch": torch.Generator().manual_seed(3).get_state(), "name": "mt"},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint in a run folder; model has seed 1, EMA seed 2."""
    path = tmp_path / "run" / "checkpoints" / STEP
    return save_checkpoint(
        path, model=random_model(1), ema=random_model(2), card=CARD, training=training_state()
    )


@pytest.mark.parametrize("content", ["[]", "{", '{"ema.safetensors": "sha256:00"}'])
def test_checksums_of_others_are_none_of_ours(folder: Path, content: str) -> None:
    (folder / "checksums.json").write_text(content)
    load_checkpoint(folder / "ema.safetensors")


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# Round trips


def test_a_checkpoint_comes_back_bit_for_bit(folder: Path) -> None:
    names = ["checksums.json", "ema.safetensors", "model.safetensors", "training.pt"]
    assert names_in(folder) == names
    for weights, seed in (("model", 1), ("ema", 2)):
        model = load_checkpoint(folder, weights=weights)
        assert_same_weights(model, random_model(seed))
        assert model.config == CONFIG
        assert model.card == CARD
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert read_config(folder) == CONFIG
    assert read_card(folder) == CARD


def test_a_loaded_model_computes(folder: Path) -> None:
    model, expected = load_checkpoint(folder), random_model(2)
    # A buffer that stayed on the meta device would show here.
    x, t, y = torch.randn(2, 3, 8, 12), torch.rand(2), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(model(x, t, y), expected(x, t, y))


def test_the_training_state_is_plain_and_comes_back(folder: Path) -> None:
    expected, state = training_state(), load_training_state(folder)
    assert state["step"] == 1000
    assert state["loader"] == expected["loader"]
    assert torch.equal(state["random"]["torch"], expected["random"]["torch"])
    optimizer = torch.optim.AdamW(random_model(0).parameters())
    optimizer.load_state_dict(state["optimizer"])
    again = optimizer.state_dict()["state"]
    for index, moments in expected["optimizer"]["state"].items():
        assert torch.equal(again[index]["exp_avg"], moments["exp_avg"])


def test_the_metadata_say_what_the_file_is(folder: Path) -> None:
    with safe_open(folder / "ema.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "deco_fast"
    assert metadata["format_version"] == "1"
    assert metadata["weights"] == "ema"
    assert json.loads(metadata["config"])["hidden_size"] == 16
    assert json.loads(metadata["card"])["sampling"]["steps"] == 7


def test_state_dicts_are_saved_with_a_config(tmp_path: Path) -> None:
    state = random_model(4).state_dict()
    save_checkpoint(tmp_path / STEP, model=state, card=CARD, config=CONFIG)
    assert_same_weights(load_checkpoint(tmp_path / STEP, weights="model"), random_model(4))
    with pytest.raises(ValueError, match="pass config"):
        save_checkpoint(tmp_path / "other", model=state, card=CARD)
    with pytest.raises(ValueError, match="needs the weights"):
        save_checkpoint(tmp_path / "other", model=None, card=CARD)
    assert names_in(tmp_path) == [STEP]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_converted(folder: Path, dtype: torch.dtype) -> None:
    model, expected = load_checkpoint(folder, dtype=dtype), random_model(2).to(dtype)
    assert model.dtype == dtype
    assert_same_weights(model, expected)


def test_a_single_file_in_half_precision(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "new" / "ema.safetensors", random_model(5), CARD, torch.float16)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    model = load_checkpoint(path)
    assert model.dtype == torch.float32
    assert_same_weights(model, random_model(5).half().float())
    assert model.card == CARD
    assert_same_weights(load_checkpoint(path.parent), model)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_tied_weights_are_written_twice(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = random_model(5)
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    second.w1.weight = first.w1.weight
    path = save_weights(tmp_path / "w.safetensors", model, CARD, dtype)
    loaded = load_checkpoint(path)
    assert_same_weights(loaded, model.to(dtype).float() if dtype else model)
    # What is read again is no longer tied.
    assert loaded.blocks[0].mlp.w1.weight is not loaded.blocks[1].mlp.w1.weight


def test_a_weight_beyond_the_range_of_half_precision_is_refused(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "w.safetensors", random_model(5), CARD)
    model = random_model(6)
    with torch.no_grad():
        model.patch_embedder.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"patch_embedder\.weight .* beyond the range"):
        save_weights(path, model, CARD, torch.float16)
    assert_same_weights(load_checkpoint(path), random_model(5))
    assert names_in(tmp_path) == ["w.safetensors"]


def test_changing_a_loaded_model_does_not_change_the_file(folder: Path) -> None:
    before = (folder / "ema.safetensors").read_bytes()
    model = load_checkpoint(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "ema.safetensors").read_bytes() == before


def test_a_loaded_model_outlives_its_checkpoint(folder: Path) -> None:
    model = load_checkpoint(folder)
    save_checkpoint(folder, model=random_model(7), ema=random_model(8), card=CARD)
    assert_same_weights(load_checkpoint(folder), random_model(8))
    shutil.rmtree(folder)
    assert_same_weights(model, random_model(2))


def test_weights_go_into_an_existing_model(folder: Path) -> None:
    model = random_model(9)
    pointer = model.patch_embedder.weight.data_ptr()
    load_weights(folder / "model.safetensors", model)
    assert_same_weights(model, random_model(1))
    assert model.patch_embedder.weight.data_ptr() == pointer
    other = DeCo(DeCoConfig(hidden_size=32, depth=2, num_heads=2, patch_size=4, num_classes=3))
    with pytest.raises(UserError, match="hidden_size 16 and not 32"):
        load_weights(folder, other)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = save_checkpoint(
            tmp_path / STEP, model=random_model(1), card=CARD, training={"step": 1}
        )
        modes = {entry.name: entry.stat().st_mode & 0o777 for entry in folder.iterdir()}
        assert set(modes.values()) == {0o640}
        assert folder.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(old)


@pytest.mark.parametrize(
    ("training", "where"),
    [
        ({"optimizer": {"state": {0: object()}}}, r"training\['optimizer'\]\['state'\]\[0\]"),
        ({"random": [1, {2, 3}]}, r"training\['random'\]\[1\] is a set"),
        ({"step": torch.float32}, r"training\['step'\] is a dtype"),
    ],
)
def test_a_training_state_that_could_not_be_read_back_is_refused(
    tmp_path: Path, training: dict[str, object], where: str
) -> None:
    with pytest.raises(ValueError, match=where):
        save_checkpoint(tmp_path / STEP, model=random_model(1), card=CARD, training=training)
    assert names_in(tmp_path) == []


# Which checkpoint is meant


def test_the_folder_where_one_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_checkpoint(".").card == load_checkpoint(folder).card
    monkeypatch.chdir(folder.anchor)
    for path in (".", folder.anchor):
        with pytest.raises(UserError, match="is a folder without a complete checkpoint"):
            load_checkpoint(path)


def test_a_run_folder_stands_for_its_newest_complete_checkpoint(folder: Path) -> None:
    checkpoints, run = folder.parent, folder.parent.parent
    newer = save_checkpoint(
        checkpoints / "step-00002000", model=random_model(3), ema=random_model(3), card=CARD
    )
    # A step of nine digits comes before one of eight where names are compared.
    newest = save_checkpoint(
        checkpoints / "step-100000000", model=random_model(4), ema=random_model(4), card=CARD
    )
    assert newest_checkpoint(run) == newest_checkpoint(checkpoints) == newest
    assert_same_weights(load_checkpoint(run), random_model(4))
    (newest / "model.safetensors").unlink()
    assert newest_checkpoint(run) == newer
    with (newer / "ema.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert newest_checkpoint(run) == folder
    (checkpoints / ".step-00003000.tmp-0a").mkdir()
    (checkpoints / "step-00004000").mkdir()
    (checkpoints / "step-latest").mkdir()
    assert newest_checkpoint(run) == folder
    with (folder / "training.pt").open("r+b") as file:
        file.truncate(1000)
    assert newest_checkpoint(run) is None
    with pytest.raises(UserError, match="without a complete checkpoint"):
        load_checkpoint(run)
    assert newest_checkpoint(run / "nothing") is None


def test_a_missing_path_suggests_the_nearest(folder: Path) -> None:
    run = folder.parent.parent
    with pytest.raises(UserError, match=rf"does not exist; did you mean {run}\?"):
        load_checkpoint(run.parent / "rum" / "checkpoints" / STEP)
    with pytest.raises(UserError, match=r"did you mean .*ema\.safetensors\?"):
        load_checkpoint(folder / "ema.safetensor")
    with pytest.raises(UserError, match="does not exist: check the path"):
        load_checkpoint(folder / "xyz")
    with pytest.raises(UserError, match="xxx does not exist: check the path"):
        load_checkpoint("x" * 300)


def test_a_checkpoint_without_the_wanted_weights(tmp_path: Path, folder: Path) -> None:
    (folder / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no 'ema' weights .* use --weights model"):
        load_checkpoint(folder)
    lone = save_weights(tmp_path / "w.safetensors", random_model(1), CARD)
    with pytest.raises(UserError, match=r"holds no 'model' weights .* use --weights ema"):
        load_checkpoint(lone, weights="model")
    with pytest.raises(UserError, match="unknown weights 'emma'; did you mean 'ema'"):
        load_checkpoint(lone, weights="emma")
    with pytest.raises(UserError, match=r"has no training\.pt"):
        load_training_state(lone.parent / "w.safetensors")


def test_a_preset_replaces_the_card_and_must_fit(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"architecture of preset deco-l \(hidden_size 16 and not 1024.*leave"
    ):
        load_checkpoint(folder, preset="deco-l")
    with pytest.raises(UserError, match=r"unknown preset 'deco-xxl'; did you mean 'deco-xl'"):
        load_checkpoint(folder, preset="deco-xxl")
    digits = DeCo.from_preset("deco-digits")
    path = save_weights(tmp_path / "d.safetensors", digits, CARD)
    with pytest.raises(UserError, match="use --preset deco-digits"):
        load_checkpoint(path, preset="deco-l")
    card = load_checkpoint(path, preset="deco-digits").card
    assert card is not None
    assert (card.name, card.height, card.step) == ("deco-digits", 32, 1000)


def test_devices_and_dtypes_that_cannot_be(folder: Path) -> None:
    with pytest.raises(UserError, match=r"weights cannot be torch\.int32"):
        load_checkpoint(folder, dtype=torch.int32)
    with pytest.raises(UserError, match="weights cannot be bf16: choose"):
        load_checkpoint(folder, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no device 'gpu' here"):
        load_checkpoint(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no device 'cuda' here"):
            load_checkpoint(folder, device="cuda")


@pytest.mark.gpu
def test_weights_go_to_the_gpu(folder: Path) -> None:
    model = load_checkpoint(folder, device="cuda", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.bfloat16)}
    assert_same_weights(model.cpu(), random_model(2).bfloat16())
    save_checkpoint(folder, model=random_model(3).cuda(), card=CARD)
    assert_same_weights(load_checkpoint(folder, weights="model"), random_model(3))


# Atomic writing


def break_writing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The second file of a checkpoint fails halfway."""
    real, calls = save_file, []

    def failing(tensors: object, path: Path, **rest: object) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise error
        real(tensors, path, **rest)

    monkeypatch.setattr(save, "save_file", failing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_no_trace(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    break_writing(monkeypatch, error)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    for target in (folder, folder.with_name("step-00002000")):
        with pytest.raises(expected) as caught:
            save_checkpoint(target, model=random_model(3), ema=random_model(3), card=CARD)
        if expected is UserError:
            assert str(target) in str(caught.value)
            assert "free some space" in str(caught.value)
        assert names_in(folder.parent) == [STEP]
        monkeypatch.undo()
        break_writing(monkeypatch, error)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_replacing_a_checkpoint_never_leaves_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename
    seen = []

    def watched(source: Path, destination: Path) -> None:
        for act in (lambda: None, lambda: real(source, destination)):
            act()
            newest = newest_checkpoint(folder.parent)
            assert newest is not None
            # By its own name too, as a program that samples from it would name it.
            assert_same_weights(load_checkpoint(folder), load_checkpoint(newest))
            seen.append(newest.name)

    monkeypatch.setattr(os, "rename", watched)
    save_checkpoint(folder, model=random_model(5), ema=random_model(6), card=CARD)
    assert seen == [STEP, f".{STEP}.previous", f".{STEP}.previous", STEP]
    assert names_in(folder.parent) == [STEP]
    assert_same_weights(load_checkpoint(folder), random_model(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m: {"model": torch.nn.DataParallel(m)}, "a DataParallel is no DeCo network"),
        (
            lambda m: {"model": torch.nn.DataParallel(m).state_dict(), "config": CONFIG},
            r"missing \(.*unknown \(module\.",
        ),
        (
            lambda m: {"model": m.state_dict(), "config": replace(CONFIG, depth=CONFIG.depth + 1)},
            "tensors of the configuration: .* missing",
        ),
        (
            lambda m: {"model": {k: v.int() for k, v in m.state_dict().items()}, "config": CONFIG},
            r"has torch\.int32: weights are floating-point",
        ),
        (lambda m: {"model": m, "card": replace(CARD, height=0)}, "height must be at least 1"),
        (
            lambda m: {"model": m, "card": replace(CARD, sampling=SamplingSettings(solver="x"))},
            "unknown solver 'x'",
        ),
    ],
)
def test_what_nobody_could_read_is_not_written(
    folder: Path, arguments: Callable[[DeCo], dict[str, Any]], message: str
) -> None:
    given = {"card": CARD, **arguments(random_model(5))}
    with pytest.raises(ValueError, match=message):
        save_checkpoint(folder, **given)
    with pytest.raises(ValueError, match=message):
        save_weights(folder.with_name("new.safetensors"), **given)
    assert_same_weights(load_checkpoint(folder), random_model(2))
    assert names_in(folder.parent) == [STEP]


def test_a_folder_of_the_user_called_previous_is_not_deleted(folder: Path) -> None:
    previous = folder.with_name(f".{STEP}.previous")
    previous.mkdir()
    (previous / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis"):
        save_checkpoint(folder, model=random_model(5), ema=random_model(6), card=CARD)
    assert (previous / "thesis.txt").read_text() == "mine"
    assert_same_weights(load_checkpoint(folder), random_model(2))


def test_what_processes_wrote_together_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / ".shards"
    shards.mkdir()
    (shards / "shard-0.safetensors").write_bytes(b"of the first process")

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_checksums", full)
        with pytest.raises(atomic.DiskFullError):
            save_checkpoint(
                tmp_path / STEP, model=random_model(1), card=CARD, optimizer_folder=shards
            )
    assert [file.name for file in tmp_path.iterdir()] == [".shards"]
    save_checkpoint(tmp_path / STEP, model=random_model(1), card=CARD, optimizer_folder=shards)
    assert [file.name for file in tmp_path.iterdir()] == [STEP]
    written = tmp_path / STEP / "optimizer" / "shard-0.safetensors"
    assert written.read_bytes() == b"of the first process"


def test_a_backup_called_previous_is_not_touched(folder: Path) -> None:
    backup = shutil.copytree(folder, folder.with_name(f"{STEP}.previous"))
    save_checkpoint(folder, model=random_model(5), ema=random_model(6), card=CARD)
    shutil.rmtree(folder)
    save_checkpoint(folder, model=random_model(7), ema=random_model(8), card=CARD)
    remove_leftovers(folder.parent)
    assert_same_weights(load_checkpoint(backup), random_model(2))


def test_a_link_stays_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    for _ in range(2):
        save_checkpoint(link, model=random_model(5), ema=random_model(6), card=CARD)
    assert link.is_symlink() and names_in(folder.parent) == [STEP]
    assert_same_weights(load_checkpoint(folder), random_model(6))
    file = tmp_path / "file.txt"
    file.symlink_to(tmp_path / "elsewhere.txt")
    with atomic_file(file) as temporary:
        temporary.write_text("new")
    assert file.is_symlink() and (tmp_path / "elsewhere.txt").read_text() == "new"


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_folder_without_a_name_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be replaced: name something in it"):
        save_checkpoint(path, model=random_model(1), card=CARD)


def test_killed_between_the_two_renames(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    class Killed(BaseException):
        pass

    def killed(source: Path, destination: Path) -> None:
        if Path(destination) == folder:
            raise Killed
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            save_checkpoint(folder, model=random_model(5), ema=random_model(6), card=CARD)
    assert not folder.exists()
    assert newest_checkpoint(folder.parent) == folder.with_name(f".{STEP}.previous")
    assert_same_weights(load_checkpoint(folder), random_model(2))
    save_checkpoint(folder, model=random_model(7), ema=random_model(8), card=CARD)
    assert names_in(folder.parent) == [STEP]
    assert_same_weights(load_checkpoint(folder), random_model(8))


def test_a_rename_that_fails_puts_the_old_one_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def failing(source: Path, destination: Path) -> None:
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(UserError, match="Input/output error"):
            save_checkpoint(folder, model=random_model(5), ema=random_model(6), card=CARD)
    assert names_in(folder.parent) == [STEP]
    assert_same_weights(load_checkpoint(folder), random_model(2))


def test_leftovers_are_removed(folder: Path) -> None:
    parent = folder.parent
    (parent / ".step-00000900.tmp-0a1b").mkdir()
    shutil.copytree(folder, parent / f".{STEP}.previous")
    shutil.copytree(folder, parent / ".step-00000500.previous")
    remove_leftovers(parent)
    # What is nowhere else is kept.
    assert names_in(parent) == [".step-00000500.previous", STEP]


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that are not a checkpoint's \(notes.txt\)"):
        save_checkpoint(tmp_path, model=random_model(1), card=CARD)
    with pytest.raises(UserError, match="is a file"):
        save_checkpoint(tmp_path / "notes.txt", model=random_model(1), card=CARD)
    with pytest.raises(UserError, match=r"cannot write .*notes\.txt/step"):
        save_checkpoint(tmp_path / "notes.txt" / "step", model=random_model(1), card=CARD)
    with pytest.raises(UserError, match=r"cannot write .*notes\.txt/w"):
        save_weights(tmp_path / "notes.txt" / "w", random_model(1), CARD)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own at `path`; the test is skipped where none can be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("too_large", ["weights", "training", "file"])
def test_a_full_disk(tmp_path: Path, too_large: str) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, megabytes=2):
        older = save_checkpoint(
            disk / "step-00000001", model=random_model(1), ema=random_model(2), card=CARD
        )
        large = DeCoConfig(hidden_size=256, depth=1, num_heads=2, patch_size=4, num_classes=3)
        target = disk / "step-00000002"
        with pytest.raises(UserError, match=f"cannot write {target}.*No space left.*free some"):
            if too_large == "weights":
                save_checkpoint(target, model=DeCo(large), card=CARD)
            elif too_large == "file":
                save_weights(target, DeCo(large), CARD)
            else:
                training = {"moments": [torch.zeros(1 << 18) for _ in range(4)]}
                save_checkpoint(target, model=random_model(1), card=CARD, training=training)
        assert names_in(disk) == ["step-00000001"]
        assert newest_checkpoint(disk) == older
        assert_same_weights(load_checkpoint(older), random_model(2))


_LIMITED = """
import resource, signal, sys
from deco_fast.checkpoint import save_checkpoint
from deco_fast.errors import UserError
from deco_fast.models.card import ModelCard
from deco_fast.models.config import DeCoConfig
from deco_fast.models.deco import DeCo

config = DeCoConfig(hidden_size=64, depth=1, num_heads=2, patch_size=4, num_classes=3)
save_checkpoint(sys.argv[1], model=DeCo(config), card=ModelCard("older"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(sys.argv[1], model=DeCo(config), card=ModelCard("newer"))
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs limits on the size of files")
def test_a_file_beyond_the_limit(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / STEP)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "File too large" in run.stdout
    assert names_in(tmp_path) == [STEP]
    assert read_card(tmp_path / STEP).name == "older"


# Wrong files


def assert_refused(path: Path, *parts: str) -> None:
    """`load_checkpoint` says so in one line that names the file."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert_refused(path, "is not a checkpoint (empty)")
    path.write_text("version https://git-lfs.github.com/spec/v1")
    assert_refused(path, "is not a checkpoint", "version https:")
    path.write_bytes(pickle.dumps({"a": 1}))
    assert_refused(path, "a plain pickle")
    path.write_bytes(b"\x80\x02garbage")
    assert_refused(path, "truncated or damaged")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "without a complete checkpoint")


def test_damaged_safetensors(folder: Path) -> None:
    path = folder / "ema.safetensors"
    whole = path.read_bytes()
    for size in (9, 500, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(path, "truncated or damaged", "download or copy it again")


def test_safetensors_with_other_tensors(tmp_path: Path, folder: Path) -> None:
    source = folder / "ema.safetensors"
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    path = tmp_path / "changed.safetensors"

    def change(**changes: torch.Tensor | None) -> None:
        changed = {**tensors, **{name.replace("__", "."): t for name, t in changes.items()}}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, path, metadata=metadata)

    change(blocks__1__norm1__weight=None, decoder__output__bias=None)
    assert_refused(path, "2 missing (blocks.1.norm1.weight, decoder.output.bias)")
    change(blocks__9__norm1__weight=torch.ones(16))
    assert_refused(path, "1 unknown (blocks.9.norm1.weight)")
    change(patch_embedder__bias=torch.ones(17))
    assert_refused(path, "1 of the wrong shape (patch_embedder.bias (17,) instead of (16,))")
    change(patch_embedder__bias=torch.ones(16, dtype=torch.int32))
    assert_refused(path, "torch.int32 in patch_embedder.bias")
    save_file(tensors, path)
    assert_refused(path, "of another program")
    save_file(tensors, path, metadata={**metadata, "format_version": "2"})
    assert_refused(path, "format version '2'", "install a newer deco_fast")
    save_file(tensors, path, metadata={**metadata, "config": '{"hidden_size": 16}'})
    assert_refused(path, "damaged metadata")
    card = {**CARD.to_json(), "height": "32"}
    save_file(tensors, path, metadata={**metadata, "card": json.dumps(card)})
    assert_refused(path, "damaged metadata (height must be of type int, not '32')")


def test_a_damaged_training_state(folder: Path) -> None:
    path = folder / "training.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"training\.pt is truncated or damaged"):
        load_training_state(folder)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no training state"):
        load_training_state(folder)
    path.write_bytes(whole)
    assert_refused(path, "holds no weights of DeCo", "its checkpoint's folder")


# The Hugging Face hub


def test_the_hub_is_asked_for_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(folder / "ema.safetensors")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert_same_weights(load_checkpoint("hf:owner/repo/sub/file.ckpt"), random_model(2))
    assert asked == [("owner/repo", "sub/file.ckpt")]


def test_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hub cannot be reached: check the network"):
        load_checkpoint("hf:owner/repo/file.ckpt")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        ("RepositoryNotFoundError", "there is no repository owner/repo"),
        ("EntryNotFoundError", "owner/repo has no file file.ckpt"),
        ("HFValidationError", "cannot be downloaded"),
    ],
)
def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, error: str, part: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(hub.errors, error)

    def download(repository: str, file: str) -> str:
        raise kind.__new__(kind, "refused")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=part):
        load_checkpoint("hf:owner/repo/file.ckpt")


def test_the_hub_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'deco-fast\[hub\]'"):
        load_checkpoint("hf:owner/repo/file.ckpt")
    with pytest.raises(UserError, match="not of the form hf:owner/repository/file"):
        find.locate("hf:owner/file.ckpt")


# Memory

_MEASURE = """
import re, sys
import torch
from deco_fast.checkpoint import load_checkpoint

def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

torch.set_num_threads(1)
load_checkpoint(sys.argv[2])
before = peak()
model = load_checkpoint(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
for parameter in model.parameters():
    parameter.detach().max()
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as two kinds of file."""
    from deco_fast.interop.convert import convert

    folder = tmp_path_factory.mktemp("large")
    config = DeCoConfig(hidden_size=1024, depth=3, num_heads=16)
    path = save_weights(folder / "large.safetensors", DeCo(config), CARD)
    convert(path, folder / "large.ckpt")
    return {"safetensors": path, "ckpt": folder / "large.ckpt"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of memory")
@pytest.mark.parametrize("layout", ["safetensors", "ckpt"])
@pytest.mark.parametrize(("dtype", "copies"), [("float32", 1.0), ("bfloat16", 1.5)])
def test_loading_never_holds_two_copies(
    tmp_path: Path, large_checkpoints: dict[str, Path], layout: str, dtype: str, copies: float
) -> None:
    """The mapped file, or it and the converted weights; a second copy would add one."""
    warm_up = save_weights(tmp_path / "tiny.safetensors", random_model(1), CARD)
    path = large_checkpoints[layout]
    size = path.stat().st_size
    assert size > 180e6
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path), str(warm_up), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < (copies + 0.25) * size
    assert int(run.stdout) > 0.5 * size  # else nothing was measured


def test_atomic_file_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic.atomic_file(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["file"]
