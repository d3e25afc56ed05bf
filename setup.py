"""What pyproject.toml cannot say: the folders that become packages, and the C++ extension."""

from __future__ import annotations

import glob
import os
import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup

# For `make sanitize`.
_SANITIZE = os.environ.get("DECO_SANITIZE", "0") not in ("", "0")
_SANITIZERS = ["-fsanitize=address,undefined"] if _SANITIZE else []
# Python's own flags bring -g, which makes the library twenty times larger.
_OPTIMISATION = ["-O1", "-g1", "-fno-omit-frame-pointer"] if _SANITIZE else ["-O3", "-g0"]
_FLAGS = [*_OPTIMISATION, *_SANITIZERS, "-fvisibility=hidden"]
# What at::parallel_for needs. Apple's compiler has no OpenMP of its own: one thread there.
_OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


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


# The kernels are compiled once for each of these, into the namespace of that name (the macro
# DECO_NAMESPACE), and csrc/instruction_set.cpp picks one at run time. They include no header of
# torch: the linker might keep the AVX-512 copy of an inline function for everybody.
_KERNELS = [
    "csrc/flow_matching_loss.cpp",
    "csrc/matmul.cpp",
    "csrc/packed_linear.cpp",
    "csrc/pixel_decoder.cpp",
]
# Vectors never cross the border of a compiled file, so how they would be passed does not matter.
_KERNEL_FLAGS = [*_FLAGS, "-std=c++20", "-fopenmp-simd", "-Wno-psabi"]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
]
_X86_FLAGS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def _instruction_sets() -> dict[str, list[str]]:
    """The compiler flags of every instruction set that the kernels are built for."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return _X86_FLAGS
    return {"baseline": []}


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

        def build_extension(self, ext: Extension) -> None:
            for name, flags in _instruction_sets().items():
                ext.extra_objects += self.compiler.compile(
                    _KERNELS,
                    output_dir=os.path.join(self.build_temp, name),
                    macros=[("DECO_NAMESPACE", name)],
                    extra_postargs=[*_KERNEL_FLAGS, *flags],
                    depends=ext.depends,
                )
            super().build_extension(ext)

    # By path: the package that this file is in may not be importable yet.
    sources = runpy.run_path("kernels/sources.py")["fingerprint"](Path("csrc"))
    if sources is None:
        _give_up("its sources, the folder csrc, are not here")
        return {}
    extension = CppExtension(
        "deco_fast._C",
        sources=[
            "csrc/extension.cpp",
            "csrc/flow_matching_loss_op.cpp",
            "csrc/instruction_set.cpp",
            "csrc/matmul_op.cpp",
            "csrc/packed_linear_op.cpp",
            "csrc/pixel_decoder_op.cpp",
        ],
        depends=sorted([*glob.glob("csrc/*.h"), *_KERNELS]),
        include_dirs=[pybind11.get_include()],
        define_macros=[("DECO_SOURCES", f"{sources:#x}ull")],
        extra_compile_args=[*_FLAGS, *_OPENMP],
        extra_link_args=[*_OPENMP, *_SANITIZERS],
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
        "deco_fast.configs": ["*.yaml", "suites/*.yaml"],
    },
    include_package_data=False,
    **_extension(),
)
