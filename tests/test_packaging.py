"""The package under every way to have it: a bare checkout, `pip install .`, `pip install -e .`.

The folder `kernels/` must be `deco_fast.kernels` in each of them and must never answer to the
name `kernels`, which belongs to a package of Hugging Face that transformers probes for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

import deco_fast
from deco_fast.kernels.registry import extension_problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = sysconfig.get_path("purelib")

# Prints what a fresh interpreter finds under the package's names.
PROBE = """
import importlib, json, sys
import deco_fast, deco_fast.kernels.registry as registry
from deco_fast import ops
from deco_fast.resources import config_folder, pretrained_folder
named = importlib.import_module("deco_fast.kernels")
print(json.dumps({
    "package": deco_fast.__file__,
    "registry": registry.__file__,
    "one kernels": deco_fast.kernels is named is sys.modules["deco_fast.kernels"],
    "one registry": [
        name for name, module in sys.modules.items()
        if str(getattr(module, "__file__", None)).endswith("registry.py")
        and "linear_upsample" in getattr(module, "OPS", ())
    ],
    "kernels imported": "kernels" in sys.modules,
    "ops": ops.backends(),
    "extension": registry.extension_problem(),
    "configs": sorted(path.name for path in config_folder().glob("*.yaml")),
    "pretrained": str(pretrained_folder()),
}))
"""


def _run(
    command: list[str], cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def _probe(python: list[str], cwd: Path, environment: dict[str, str] | None = None) -> Any:
    result = _run([*python, "-c", PROBE], cwd, environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _assert_sound(found: Any) -> None:
    assert found["one kernels"]
    assert found["one registry"] == ["deco_fast.kernels.registry"]
    assert not found["kernels imported"]
    assert all(status["reference"] is None for status in found["ops"].values())
    assert found["configs"] == sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    assert Path(found["pretrained"]) == Path(found["package"]).resolve().with_name("pretrained")


def _copy_of_the_sources(folder: Path) -> Path:
    """A copy, because a build writes into the folder that it builds from."""
    parts = ["deco_fast", "kernels", "configs", "csrc", "pyproject.toml", "setup.py", "LICENSE"]
    parts += ["MANIFEST.in"]
    parts += ["README.md"] if (ROOT / "README.md").exists() else []
    folder.mkdir()
    for name in parts:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, folder / name)
    return folder


def _without_torch(folder: Path) -> dict[str, str]:
    """The environment of a Python that cannot import torch."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "torch.py").write_text("raise ImportError('torch is hidden')")
    return {"PYTHONPATH": str(folder / "hidden"), "DECO_REQUIRE_EXTENSION": "0"}


def _environment(folder: Path) -> Path:
    """A new virtual environment that sees our dependencies and not our package."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    result = _run([str(python), "-c", "import sysconfig as s; print(s.get_path('purelib'))"], ROOT)
    # A folder named in a .pth file is searched, but its own .pth files, the editable install of
    # this package among them, are not read.
    Path(result.stdout.strip(), "dependencies.pth").write_text(SITE_PACKAGES)
    return python


def _pip(
    command: str, python: Path | str, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    options = ["--no-index", "--no-deps", "--no-build-isolation"]
    return _run([*pip, command, *options, *map(str, arguments)], ROOT, environment)


needs_build_tools = pytest.mark.skipif(
    # Not by find_spec: to look for pip's module switches setuptools' distutils off, without which
    # torch.compile fails in the rest of the process.
    not {"pip", "setuptools", "pybind11"} <= {d.name for d in importlib.metadata.distributions()},
    reason="needs pip, setuptools and pybind11",
)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


# The compiler, but an object that it has made before, from the same sources with the same options
# in another folder, is handed out again. It does not optimise, which takes half of a build's time:
# the extension that the other tests run was built as users build it.
_COMPILE_ONCE = """#!{python}
import hashlib, os, shutil, sys
from pathlib import Path

compiler, made, arguments = {compiler!r}, Path({made!r}), sys.argv[1:]
if "-c" not in arguments:
    os.execv(compiler, [compiler, *arguments])
source = Path(next(a for a in arguments if a.endswith(".cpp")))
target = Path(arguments[arguments.index("-o") + 1])
options = [a for a in arguments if not a.startswith(("-I", "-MF", os.sep)) and os.sep not in a]
headers = sorted(source.parent.glob("*.h"))
key = hashlib.sha256(repr(options).encode())
for file in (source, *headers):
    key.update(file.name.encode() + file.read_bytes())
kept = made / key.hexdigest()
if not kept.exists():
    status = os.spawnv(os.P_WAIT, compiler, [compiler, *arguments, "-O0", "-g0"])
    if status != 0:
        sys.exit(status)
    shutil.copyfile(target, kept)
shutil.copyfile(kept, target)
"""


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes a build use `_COMPILE_ONCE`, where there is a compiler."""
    compiler = _compiler()
    if compiler is None:
        return {}
    folder = tmp_path_factory.mktemp("compiler")
    script = folder / "c++"
    script.write_text(
        _COMPILE_ONCE.format(python=sys.executable, compiler=compiler, made=str(folder))
    )
    script.chmod(0o755)
    return {"CXX": str(script)}


class TestCheckout:
    """The sources as they lie, with nothing installed."""

    def test_from_the_root(self) -> None:
        # -S and PYTHONPATH leave out .pth files, and so an editable install of this package.
        found = _probe([sys.executable, "-S"], ROOT, {"PYTHONPATH": SITE_PACKAGES})
        _assert_sound(found)
        assert Path(found["registry"]) == ROOT / "kernels" / "registry.py"

    def test_from_elsewhere(self, tmp_path: Path) -> None:
        path = os.pathsep.join([str(ROOT), SITE_PACKAGES])
        found = _probe([sys.executable, "-S"], tmp_path, {"PYTHONPATH": path})
        _assert_sound(found)
        assert Path(found["registry"]) == ROOT / "kernels" / "registry.py"

    def test_the_name_kernels_is_not_ours(self) -> None:
        code = "import kernels; print([n for n in vars(kernels) if not n.startswith('_')])"
        result = _run([sys.executable, "-S", "-c", code], ROOT)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "[]"
        assert not list((ROOT / "kernels").rglob("__init__.py"))

    @pytest.mark.slow
    def test_transformers_does_not_take_us_for_kernels(self, tmp_path: Path) -> None:
        if importlib.util.find_spec("transformers") is None:
            pytest.skip("transformers is not installed")
        code = (
            "import sys, transformers, transformers.integrations.hub_kernels\n"
            "from transformers.utils import is_kernels_available\n"
            "print(is_kernels_available(), 'deco_fast' in sys.modules)"
        )
        here, there = (_run([sys.executable, "-c", code], cwd) for cwd in (ROOT, tmp_path))
        assert here.returncode == 0, here.stderr
        assert here.stdout == there.stdout
        assert here.stdout.split()[-1] == "False"

    def test_importing_the_package_is_light(self) -> None:
        code = "import sys, deco_fast; print('torch' in sys.modules, deco_fast.__version__)"
        result = _run([sys.executable, "-c", code], ROOT)
        assert result.stdout.split() == ["False", deco_fast.__version__], result.stderr


class TestFace:
    """The names that `deco_fast` offers."""

    def test_every_name_is_there(self) -> None:
        assert {name: hasattr(deco_fast, name) for name in deco_fast.__all__} == dict.fromkeys(
            deco_fast.__all__, True
        )
        assert set(deco_fast.__all__) <= set(dir(deco_fast))

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
            deco_fast.no_such_name  # noqa: B018

    def test_the_citation_has_the_version(self) -> None:
        assert f"version: {deco_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()

    def test_the_commands_exist(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for name, value in project["scripts"].items():
            entry = importlib.metadata.EntryPoint(name, value, "console_scripts")
            assert callable(entry.load())


class TestExtension:
    def test_is_there_where_it_is_required(self) -> None:
        if os.environ.get("DECO_REQUIRE_EXTENSION", "0") in ("", "0"):
            pytest.skip("DECO_REQUIRE_EXTENSION is not set")
        assert extension_problem() is None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, compile_once: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = _copy_of_the_sources(folder / "sources")
    result = _pip("wheel", sys.executable, "--wheel-dir", folder, sources, **compile_once)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("deco_fast-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = _environment(tmp_path_factory.mktemp("environment") / "venv")
    result = _pip("install", python, "--ignore-installed", wheel)
    assert result.returncode == 0, result.stderr
    return python


@pytest.mark.parametrize("with_torch", [True, False])
def test_a_source_distribution_holds_all_that_a_build_needs(
    tmp_path: Path, with_torch: bool
) -> None:
    sources = _copy_of_the_sources(tmp_path / "sources")
    environment = {} if with_torch else _without_torch(tmp_path)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    result = _run(command, sources, environment)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    expected |= {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {"configs/deco-digits.yaml", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert expected <= names


@pytest.mark.slow
@needs_build_tools
class TestInstalled:
    """`pip install .` and `pip install -e .`, each in an environment of its own."""

    def test_contents(self, wheel: Path) -> None:
        names = set(zipfile.ZipFile(wheel).namelist())
        assert {name.split("/")[0] for name in names} == {
            "deco_fast",
            f"deco_fast-{deco_fast.__version__}.dist-info",
        }
        expected = {"deco_fast/py.typed", "deco_fast/_C.pyi"}
        for folder, pattern in {"kernels": "*.py", "configs": "*.yaml"}.items():
            files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)]
            assert files
            expected |= {f"deco_fast/{name}" for name in files}
        for path in (ROOT / "deco_fast").rglob("*"):
            if path.suffix == ".py" or (path.is_file() and "pretrained" in path.parts):
                expected.add(path.relative_to(ROOT).as_posix())
        assert expected <= names
        assert not any("__pycache__" in name for name in names)

    def test_the_extension_is_there_where_a_compiler_is(self, wheel: Path) -> None:
        if _compiler() is None:
            pytest.skip("there is no C++ compiler")
        names = zipfile.ZipFile(wheel).namelist()
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        assert f"deco_fast/_C{suffix}" in names

    def test_from_elsewhere(self, python: Path, tmp_path: Path) -> None:
        found = _probe([str(python)], tmp_path)
        _assert_sound(found)
        package = Path(found["package"]).parent
        assert ROOT not in package.parents
        assert Path(found["registry"]) == package / "kernels" / "registry.py"
        assert (found["extension"] is None) == (_compiler() is not None)

    def test_from_the_root(self, python: Path) -> None:
        # The working folder goes before the installed package: this is the checkout.
        _assert_sound(_probe([str(python)], ROOT))

    def test_a_wrong_option_is_exit_status_2(self, python: Path, tmp_path: Path) -> None:
        for command in ("deco-train", "deco-sample", "deco-evaluate", "deco-app"):
            result = _run([str(python.with_name(command)), "--no-such-option"], tmp_path)
            assert result.returncode == 2, result.stderr
            assert "error:" in result.stderr
            assert "Traceback" not in result.stderr

    def test_an_installed_command_calls_itself_so(self, python: Path, tmp_path: Path) -> None:
        result = _run([str(python.with_name("deco-sample")), "--help"], tmp_path)
        assert result.stdout.startswith("usage: deco-sample ")
        assert "torchrun --nproc-per-node 8 -- $(which deco-sample) --num" in result.stdout

    @pytest.mark.parametrize("mode", ["lenient", "strict"])
    def test_editable_install(
        self, mode: str, tmp_path: Path, compile_once: dict[str, str]
    ) -> None:
        sources = _copy_of_the_sources(tmp_path / "sources")
        python = _environment(tmp_path / "venv")
        options = ["--ignore-installed", "--config-settings", f"editable_mode={mode}"]
        result = _pip("install", python, *options, "--editable", sources, **compile_once)
        assert result.returncode == 0, result.stderr
        for cwd in (sources, tmp_path):
            found = _probe([str(python)], cwd)
            _assert_sound(found)
            assert sources in Path(found["registry"]).resolve().parents
        # An edit is seen without a new installation: that is what editable is for.
        with (sources / "kernels" / "registry.py").open("a") as file:
            file.write("\nprint('edited')\n")
        result = _run([str(python), "-c", "import deco_fast.kernels.registry"], tmp_path)
        assert result.stdout == "edited\n", result.stderr


@pytest.mark.slow
@needs_build_tools
@pytest.mark.parametrize("missing", ["compiler", "torch"])
class TestWithoutExtension:
    """A machine without a compiler, and a build that pip isolates from torch."""

    @pytest.fixture
    def environment(self, missing: str, tmp_path: Path) -> dict[str, str]:
        if missing == "compiler":
            return dict.fromkeys(("CC", "CXX"), shutil.which("false") or "no-such-compiler")
        return _without_torch(tmp_path)

    def test_installs_and_runs_on_the_reference(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        sources = _copy_of_the_sources(tmp_path / "sources")
        python = _environment(tmp_path / "venv")
        options = ["--ignore-installed", "--verbose", "--editable"]
        environment["DECO_REQUIRE_EXTENSION"] = "0"  # CI demands it of its own build
        result = _pip("install", python, *options, sources, **environment)
        assert result.returncode == 0, result.stderr
        assert "installed without its C++ extension" in result.stdout + result.stderr
        found = _probe([str(python)], tmp_path)
        _assert_sound(found)
        assert "pip install" in found["extension"]

    def test_fails_where_the_extension_is_required(
        self, environment: dict[str, str], tmp_path: Path
    ) -> None:
        sources = _copy_of_the_sources(tmp_path / "sources")
        environment["DECO_REQUIRE_EXTENSION"] = "1"
        result = _pip("wheel", sys.executable, "--wheel-dir", tmp_path, sources, **environment)
        assert result.returncode != 0
        assert "installed without its C++ extension" in result.stdout + result.stderr
        assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
def test_mypy_knows_the_folder_as_deco_fast_kernels(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    client = tmp_path / "client.py"
    client.write_text(
        "from deco_fast.kernels.registry import backend_for\n"
        "from deco_fast import ops\n"
        "reveal_type(backend_for)\n"
        "ops.use_backend(3)\n"
    )
    result = _run([sys.executable, "-m", "mypy", str(client)], ROOT)
    assert "(op: str, device_type: str) -> str" in result.stdout.replace("builtins.", "")
    assert 'has incompatible type "int"; expected "str"' in result.stdout
