"""Reading a `torch.save` file without running, or importing, anything that it names.

`torch.load(weights_only=True)` refuses a Lightning file whose hyper-parameters hold objects of
foreign classes, and allowing their names is not enough: it still refuses dictionaries and lists
of foreign classes. Here *every* global in the pickle resolves to an inert class of this module,
torch's own included, so that the result is a tree of plain containers, tensor records and
placeholders. Tensor bytes are memory-mapped when they are asked for, and those not asked for
(an optimizer's, twice the size of the weights) are never touched.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from deco_fast.errors import UserError

# What malicious pickles call. The list can be incomplete: it makes the message, not the safety.
_RUNS_CODE = re.compile(
    r"(_pickle|_posixsubprocess|asyncio|bdb|cProfile|cloudpickle|code|codeop|commands|ctypes|dill"
    r"|doctest|ensurepip|http|imp|importlib|marshal|multiprocessing|nt|os|pdb|pickle|pip|popen2"
    r"|posix|profile|pty|pydoc|requests|runpy|shutil|smtplib|socket|subprocess|sys|timeit|trace"
    r"|urllib|venv|webbrowser)\..*"
    r"|(builtins|__builtin__)\.(__import__|apply|breakpoint|compile|delattr|eval|exec|execfile|file"
    r"|getattr|globals|input|locals|open|setattr|vars)"
    r"|_?io\.(FileIO|open|open_code)|types\.(Code|Function)Type|_?operator\.(attrgett|methodcall)er"
    r"|torch\.(load|hub\..*|serialization\.load|utils\.cpp_extension\..*)|numpy\..*runstring"
)


class CodeInPickleError(UserError):
    """A pickle names a function that runs programs or code."""


class StorageRecord(NamedTuple):
    """The bytes of one or several tensors: an entry of the archive."""

    key: str
    dtype: torch.dtype | None
    size: int


class TensorRecord(NamedTuple):
    """Where a tensor lies in the file; `TorchFile.read` makes it a tensor."""

    storage: StorageRecord
    dtype: torch.dtype | None
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Placeholder:
    """Stands for an object whose class is not imported; takes whatever a pickle does to it."""

    qualname = ""

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> Placeholder:
        return self

    # These also swallow what a pickle addresses to the class itself instead of an instance.
    def _ignore(*args: object) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


class _Mapping(dict):
    """A `collections.OrderedDict` of the file; an attribute such as `_metadata` is dropped."""

    def __setstate__(*args: object) -> None: ...


class _Rebuild:
    """A function of ours under a name of torch's; no pickle can change its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(*args: object) -> None: ...


def _rebuild_tensor(
    storage: StorageRecord,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: object = None,
    hooks: object = None,
    dtype: type[Placeholder] | object = None,
    *metadata: object,
) -> TensorRecord:
    named = _named_dtype(dtype)
    return TensorRecord(storage, named or storage.dtype, int(offset), tuple(shape), tuple(stride))


_BUILDERS: dict[str, Any] = {
    "collections.OrderedDict": _Mapping,
    "torch._utils._rebuild_tensor_v2": _Rebuild(lambda *args: _rebuild_tensor(*args[:6])),
    "torch._utils._rebuild_tensor_v3": _Rebuild(_rebuild_tensor),
    "torch._utils._rebuild_parameter": _Rebuild(lambda tensor, *args: tensor),
}

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _named_dtype(placeholder: object) -> torch.dtype | None:
    """The dtype that a placeholder for "torch.float32" and the like stands for."""
    module, _, name = getattr(placeholder, "qualname", "").rpartition(".")
    dtype = getattr(torch, name, None) if module == "torch" else None
    return dtype if isinstance(dtype, torch.dtype) else None


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._placeholders: dict[str, type[Placeholder]] = {}

    def find_class(self, module: str, name: str) -> Any:
        qualname = f"{module}.{name}"
        if _RUNS_CODE.fullmatch(qualname):
            raise CodeInPickleError(qualname)
        if qualname in _BUILDERS:
            return _BUILDERS[qualname]
        if qualname not in self._placeholders:
            self._placeholders[qualname] = type(name, (Placeholder,), {"qualname": qualname})
        return self._placeholders[qualname]

    def persistent_load(self, pid: Any) -> StorageRecord:
        kind, storage_type, key, _location, size = pid[:5]
        if kind != "storage":
            raise pickle.UnpicklingError(f"an unknown kind of record, {kind!r}")
        name = storage_type.qualname.rpartition(".")[2]
        return StorageRecord(str(key), _STORAGE_DTYPES.get(name), int(size))


def read_pickle(file: BinaryIO) -> Any:
    """The next pickle of the file, every object of a class in it replaced by a placeholder.

    Raises:
        CodeInPickleError: it names a function that runs programs or code. That is a diagnosis
            and not the protection: no function in a pickle is ever called.
        pickle.UnpicklingError: it is damaged.
    """
    try:
        return _InertUnpickler(file).load()
    except CodeInPickleError:
        raise
    except Exception as error:  # damaged bytes can raise anything: each opcode is an operation
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


class TorchFile:
    """A file of `torch.save` (the zip format, torch ≥ 1.6), opened but not read.

    Attributes:
        path: where it lies.
        content: what was saved, with a `TensorRecord` in place of every tensor and a
            `Placeholder` in place of every object of a foreign class.

    Raises:
        UserError: the file is damaged, compressed, or has code in its pickle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._entries = {
                    entry.filename.partition("/")[2]: entry for entry in archive.infolist()
                }
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise self._damaged(f"its table of contents is missing ({error})") from error
        with path.open("rb") as file:
            # Copy-on-write: a tensor may be changed in place, the file never is.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if "data.pkl" not in self._entries:
            raise UserError(f"{path} is a zip file but not one of torch.save: name a checkpoint")
        if self._entry("byteorder", default=sys.byteorder.encode()) != sys.byteorder.encode():
            raise UserError(
                f"{path} was written on a machine of the other byte order: "
                "save it again on a machine like this one"
            )
        try:
            self.content = read_pickle(io.BytesIO(self._entry("data.pkl")))
        except CodeInPickleError as error:
            raise UserError(code_message(path, error)) from error
        except pickle.UnpicklingError as error:
            raise self._damaged(str(error)) from error

    def read(self, record: TensorRecord) -> Tensor:
        """The tensor, on the CPU and as a view of the mapped file wherever that is possible.

        Raises:
            UserError: its bytes are not all there, or the file is damaged.
        """
        storage = record.storage
        if record.dtype is None:
            raise self._damaged("a tensor has a dtype that this version does not know")
        # An untyped storage (torch ≥ 2.1's _rebuild_tensor_v3) counts bytes, a typed one elements.
        count = storage.size if storage.dtype else storage.size // record.dtype.itemsize
        if prod(record.shape) > count:
            # It would be repeated in memory as often as the file says.
            raise self._damaged(f"tensor data/{storage.key} has fewer bytes than its shape")
        start, size = self._span(f"data/{storage.key}")
        if count * record.dtype.itemsize > size:
            raise self._damaged(f"the bytes of tensor data/{storage.key} are not all there")
        try:
            elements = torch.frombuffer(self._bytes, dtype=record.dtype, count=count, offset=start)
            tensor = elements.as_strided(record.shape, record.stride, record.offset)
        except (ValueError, RuntimeError, TypeError) as error:
            raise self._damaged(f"tensor data/{storage.key}: {error}") from error
        # A slice of a larger storage would keep all of it alive, and alias its neighbours.
        return tensor if prod(record.shape) == count else tensor.clone()

    def _span(self, name: str) -> tuple[int, int]:
        """Start and length of an entry's bytes in the file."""
        entry = self._entries.get(name)
        if entry is None:
            raise self._damaged(f"its entry {name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{self.path} is compressed, so it cannot be memory-mapped: save it with torch.save"
            )
        # The central directory does not tell how long the local header is.
        header = self._bytes[entry.header_offset : entry.header_offset + 30]
        if header[:4] != b"PK\x03\x04":
            raise self._damaged(f"its entry {name} is not where it should be")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + 30 + names
        if start + entry.file_size > len(self._bytes):
            raise self._damaged(f"the bytes of {name} are not all there")
        return start, entry.file_size

    def _entry(self, name: str, default: bytes | None = None) -> bytes:
        if default is not None and name not in self._entries:
            return default
        start, size = self._span(name)
        return self._bytes[start : start + size]

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self.path} is truncated or damaged: {reason}; download or copy it again"
        )


def code_message(path: Path, error: CodeInPickleError) -> str:
    """The line that refuses a file with code in its pickle."""
    return (
        f"{path} has code in its pickle ({error}), which was not run: "
        "do not trust the file, get the weights from another source"
    )
