"""What pyproject.toml cannot say: the folders that become packages, and the C++ extension."""

from __future__ import annotations

import os
import sys

from setuptools import find_namespace_packages, find_packages, setup


def _packages() -> list[str]:
    kernels = find_namespace_packages("kernels", exclude=["*__pycache__*"])
    return [
        *find_packages(include=["deco_fast", "deco_fast.*"]),
        "deco_fast.kernels",
        *(f"deco_fast.kernels.{name}" for name in kernels),
        "deco_fast.configs",
    ]


def _give_up(reason: object) -> None:
    """Go on without the extension, unless DECO_REQUIRE_EXTENSION asks for it."""
    message = f"deco_fast is installed without its C++ extension: {reason}"
    if os.environ.get("DECO_REQUIRE_EXTENSION", "0") not in ("", "0"):
        raise RuntimeError(message)
    print(f"warning: {message}", file=sys.stderr)


def _extension() -> dict[str, object]:
    """The keywords of setup() that build deco_fast._C, none where it cannot be built."""
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        _give_up(f"{error}; install torch, pybind11 and ninja, then use --no-build-isolation")
        return {}

    class OptionalBuildExtension(BuildExtension):
        """Without a working compiler the reference backend serves: warn and go on."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                _give_up(error)
                self.extensions = []  # else an editable install looks for the file to copy

    extension = CppExtension(
        "deco_fast._C",
        sources=["csrc/extension.cpp", "csrc/instruction_set.cpp"],
        depends=["csrc/instruction_set.h"],
        include_dirs=[pybind11.get_include()],
        # Python's own flags bring -g, which makes the library twenty times larger.
        extra_compile_args=[] if sys.platform == "win32" else ["-O3", "-g0", "-fvisibility=hidden"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuildExtension}}


setup(
    packages=_packages(),
    package_dir={
        "deco_fast": "deco_fast",
        "deco_fast.kernels": "kernels",
        "deco_fast.configs": "configs",
    },
    package_data={
        "deco_fast": ["py.typed", "*.pyi", "pretrained/**/*"],
        "deco_fast.configs": ["*.yaml"],
    },
    include_package_data=False,
    **_extension(),
)
