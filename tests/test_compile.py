"""torch.compile takes the network whole, and once for every batch size.

The backend "eager" runs what Dynamo traced: it shows graph breaks and recompilations in a second.
What Inductor makes of the graph takes half a minute to compile and is marked slow.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden import load_model, relative_error, tensors
from processes import TINY
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from deco_fast import DeCo, DeCoConfig, flow_matching_loss, frequency_table, sample
from deco_fast.compiling import keep_compiled_code
from deco_fast.config import load_config
from deco_fast.errors import UserError
from deco_fast.training.distributed import Processes
from deco_fast.training.objective import Objective
from deco_fast.training.parallel import prepare_network

CONFIG = DeCoConfig(
    hidden_size=32,
    depth=1,
    num_heads=2,
    patch_size=8,
    decoder_hidden_size=16,
    decoder_depth=1,
    num_classes=5,
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="Inductor needs a C++ compiler on the CPU",
)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def new_model() -> DeCo:
    torch.manual_seed(0)
    model = DeCo(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(batch: int, height: int = 16, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y of one batch, whose size Dynamo may take to be unknown from the start."""
    x, t = torch.randn(batch, 3, height, width), torch.rand(batch)
    y = torch.arange(batch) % (CONFIG.num_classes + 1)
    for tensor in (x, t, y):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return x, t, y


@pytest.mark.parametrize("mode", ["training", "no_grad"])
def test_one_graph_serves_every_batch_size(mode: str) -> None:
    eager, counter = new_model(), CompileCounterWithBackend("eager")
    model = copy.deepcopy(eager)
    model.compile(backend=counter, fullgraph=True)
    with torch.set_grad_enabled(mode == "training"):
        for batch in (2, 3, 7):
            x, t, y = inputs(batch)
            assert relative_error(model(x, t, y), eager(x, t, y)) <= 1e-5
    assert counter.frame_count == 1
    # A checkpoint of a compiled model is one of the model.
    assert model.state_dict().keys() == eager.state_dict().keys()


def test_encode_and_decode_compile_on_their_own() -> None:
    model = new_model()
    encode = torch.compile(model.encode, backend="eager", fullgraph=True)
    decode = torch.compile(model.decode, backend="eager", fullgraph=True)
    x, t, y = inputs(2)
    tokens, layers = encode(x, t, y, return_layers=(1,))
    expected, expected_layers = model.encode(x, t, y, return_layers=(1,))
    assert relative_error(tokens, expected) <= 1e-5
    for layer, expected_layer in zip(layers, expected_layers, strict=True):
        assert relative_error(layer, expected_layer) <= 1e-5
    assert relative_error(decode(x, tokens), model(x, t, y)) <= 1e-5


def test_the_loss_is_one_graph() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flow_matching_loss, backend=counter, fullgraph=True)
    table = frequency_table()
    for batch in (2, 3):
        prediction, target = torch.randn(2, batch, 3, 12, 16)
        for tensor in (prediction, target):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        ours = compiled(prediction, target, table, 1.0)
        for actual, expected in zip(
            ours, flow_matching_loss(prediction, target, table, 1.0), strict=True
        ):
            assert relative_error(actual, expected) <= 1e-6
    assert counter.frame_count == 1


@pytest.mark.slow
def test_sampling_with_a_compiled_model() -> None:
    model, counter = new_model().eval(), CompileCounterWithBackend("eager")
    noise, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    expected = sample(model, noise, labels, steps=4, guidance_scale=2.0)
    model.compile(backend=counter, fullgraph=True, dynamic=True)
    images = sample(model, noise, labels, steps=4, guidance_scale=2.0)
    assert relative_error(images, expected) <= 1e-5
    # Unguided and guided steps differ in their batch size alone.
    assert counter.frame_count == 1


# --- Inductor -------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", ["sq", "wide"])
def test_inductor_equals_golden(case: str) -> None:
    """The published code gives wrong velocities here, silently, on torch 2.13 (D0)."""
    golden = tensors("model_c2i_deco_p8")
    model = load_model("model_c2i_deco_p8")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        velocity = compiled(*(golden[f"{case}.in.{key}"] for key in "xty"))
    assert relative_error(velocity, golden[f"{case}.out.v"]) <= 1e-5


@pytest.mark.slow
@needs_compiler
def test_inductor_trains_like_eager_at_two_batch_sizes() -> None:
    model, counter = new_model(), CompileCounterWithBackend("inductor")
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 5):
        x, t, y = inputs(batch)
        for network in (model, eager):
            network.zero_grad()
        loss = compiled(x, t, y).square().mean()
        expected = eager(x, t, y).square().mean()
        assert relative_error(loss, expected) <= 1e-5
        loss.backward()
        expected.backward()
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None, name
            assert relative_error(ours.grad, theirs.grad) <= 1e-4, name
    assert counter.frame_count == 1


def test_compiled_code_is_kept_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "deco_fast" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")


def test_without_a_place_for_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own is named; in a container without a home torch's is left as it is."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"TORCHINDUCTOR_CACHE_DIR .*cache cannot be made"):
        keep_compiled_code()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_code()

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_keeps_no_casts_of_weights_and_no_swiglu() -> None:
    """Under autocast; they are made again for the backward pass."""
    words = [*TINY, "--training.precision=bf16", "--training.compile=true"]
    config = load_config("deco-digits", words)
    eager = Objective(new_model(), config)
    compiled = copy.deepcopy(eager)
    network = prepare_network(compiled, config.training, Processes(0, 1, torch.device("cpu")))
    x, t, y = inputs(2)
    noise = torch.randn_like(x)
    shapes = {p.shape for p in compiled.parameters() if p.ndim == 2}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = network(x, y, t, noise)["total"]
    assert not [tensor for tensor in kept if tensor.shape in shapes]
    inner = [tensor for tensor in kept if tensor.shape[-1] == CONFIG.mlp_hidden_size]
    assert len(inner) == 2 * CONFIG.depth  # the gate and the value
    total.backward()
    eager(x, y, t, noise)["total"].backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        for module in (compiled, eager)
    ]
    assert relative_error(*gradients) <= 1e-2
