"""CUDA C++ kernels: compiled by NVRTC at first use, kept on disk, launched on PyTorch's stream.

The sources include nothing, so that NVRTC alone compiles them, with or without a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.core.errors import KernelUnavailable, install_hint

try:
    from cuda.bindings import driver, nvrtc
except ImportError:  # `why_not` says so
    driver = nvrtc = None

ARENA_INTS = 1 << 20


@cache
def why_not() -> str | None:
    """Why no CUDA C++ kernel can be compiled here, or None."""
    missing = "cuda-bindings" if nvrtc is None else ""
    if nvrtc is not None:
        try:
            nvrtc_version()
        except RuntimeError as error:  # the bindings load the library at the first call
            missing = f"NVRTC ({type(error).__name__})"
    return f"needs {missing}: {install_hint('cuda')}" if missing else None


@dataclass(frozen=True)
class Source:
    """One device function with its compile-time constants.

    path     of the .cu file
    name     of the extern "C" function
    defines  macros, as sorted pairs; they are the constants a Triton kernel takes as constexpr
    before   .cu files that stand in front of it, in one text: what several kernels share
    """

    path: Path
    name: str
    defines: tuple[tuple[str, int], ...]
    before: tuple[Path, ...] = ()

    @classmethod
    def of(
        cls, path: Path, name: str, defines: Mapping[str, int], before: tuple[Path, ...] = ()
    ) -> Source:
        """From a mapping of macros."""
        return cls(path, name, tuple(sorted(defines.items())), before)

    def compile(self, arch: str) -> bytes:
        """The cubin for `arch`, "sm_90a". Raises RuntimeError with the compiler's log."""
        if reason := why_not():
            raise KernelUnavailable(f"{self.name}: {reason}")
        files = (*self.before, self.path)
        text = b"".join(b'#line 1 "%s"\n' % f.name.encode() + f.read_bytes() for f in files)
        options = [f"--gpu-architecture={arch}", "--std=c++17", "--fmad=true"]
        options += [f"-D{key}={value}" for key, value in self.defines]
        stamp = b"\0".join([text, *(o.encode() for o in options), repr(nvrtc_version()).encode()])
        kept = _cache_folder() / f"{self.name}-{hashlib.sha256(stamp).hexdigest()[:24]}.cubin"
        if kept.is_file():
            return kept.read_bytes()
        cubin = _compile(text, self.path.name, options)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(cubin)
        part.replace(kept)
        return cubin


class Kernel:
    """A device function loaded on one device."""

    def __init__(self, source: Source, device: torch.device, shared_bytes: int) -> None:
        major, minor = torch.cuda.get_device_capability(device)
        torch.cuda.current_stream(device).synchronize()  # makes the device's context
        cubin = source.compile(f"sm_{major}{minor}{'a' if major >= 9 else ''}")
        self.module = driver_call("cuModuleLoadData", cubin)
        self.function = driver_call("cuModuleGetFunction", self.module, source.name.encode())
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        driver_call("cuFuncSetAttribute", self.function, attribute, shared_bytes)
        self.shared_bytes, self.device = shared_bytes, device
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    @cache  # noqa: B019 (kernels live as long as the process)
    def resident_blocks(self, threads: int) -> int:
        """Blocks of `threads` that the whole device holds at once."""
        name = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        return self.num_sms * driver_call(name, self.function, threads, self.shared_bytes)

    @cache  # noqa: B019
    def resident_clusters(self, threads: int, cluster: int) -> int:
        """Clusters of `cluster` blocks of `threads` that the whole device holds at once."""
        config = self._config(False, cluster)
        config.gridDimX, config.blockDimX = cluster, threads
        return driver_call("cuOccupancyMaxActiveClusters", self.function, config)

    def launch(
        self, grid: int, threads: int, *args: Tensor | int | float | ctypes.Structure | None,
        overlaps: bool = False, cluster: int = 1,
    ) -> None:  # fmt: skip
        """Start `grid` blocks on the current stream. None is a null pointer, an int an int32; a
        structure stands alone, for device functions with one argument.

        overlaps  whether it may start while the kernel before it runs (griddepcontrol); it must
                  then wait for that one before it reads its results or writes anything
        cluster   how many blocks in a row are a cluster
        """
        config = self._config(overlaps, cluster)
        config.gridDimX, config.blockDimX = grid, threads
        config.hStream = torch.cuda.current_stream(self.device).cuda_stream
        if len(args) == 1 and isinstance(args[0], ctypes.Structure):
            pointer = ctypes.pointer(args[0])  # alive until the driver has copied the structure
            parameters: Any = ctypes.addressof(pointer)
        else:
            parameters = _values(args), tuple(_kind(x) for x in args)
        driver_call("cuLaunchKernelEx", config, self.function, parameters, 0)

    @cache  # noqa: B019
    def _config(self, overlaps: bool, cluster: int) -> Any:
        config, ids = driver.CUlaunchConfig(), driver.CUlaunchAttributeID
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes = self.shared_bytes
        attributes = []
        if overlaps:
            overlap = driver.CUlaunchAttribute()
            overlap.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            overlap.value.programmaticStreamSerializationAllowed = 1
            attributes.append(overlap)
        if cluster > 1:
            allowed = driver.CUfunction_attribute
            allowed = allowed.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            driver_call("cuFuncSetAttribute", self.function, allowed, 1)
            size = driver.CUlaunchAttribute()
            size.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dims = size.value.clusterDim
            dims.x, dims.y, dims.z = cluster, 1, 1
            attributes.append(size)
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        return config


@cache
def load(source: Source, device: torch.device, shared_bytes: int) -> Kernel:
    """The kernel on a device, compiled and loaded once. Must first happen outside a capture."""
    with torch.cuda.device(device):
        return Kernel(source, device, shared_bytes)


_arenas: dict[tuple[torch.device, int], Tensor] = {}
_used: dict[torch.device, int] = {}
_bases: dict[torch.device, int] = {}  # where the counters of graphs that share them begin


def zeroed_counters(device: torch.device, count: int) -> Tensor:
    """Int32 counters that are zero, for a kernel that leaves them zero.

    One set for each stream, and one more for each launch in a CUDA graph, so that no two launches
    that may overlap share any.
    """
    stream = torch.cuda.current_stream(device)
    is_capturing = torch.cuda.is_current_stream_capturing()
    if not is_capturing:
        key = device, stream.cuda_stream
        if key not in _arenas or len(_arenas[key]) < count:
            _arenas[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        if (device, -1) not in _arenas:  # for captures to come
            _arenas[device, -1] = torch.zeros(ARENA_INTS, dtype=torch.int32, device=device)
            stream.synchronize()
        return _arenas[key][:count]
    start = _used.get(device, 0)
    arena = _arenas.get((device, -1))
    if arena is None or start + count > len(arena):
        return torch.zeros(count, dtype=torch.int32, device=device)  # zeroed at every replay
    _used[device] = start + count
    return arena[start : start + count]


_kept: dict[tuple[torch.device, int, int, int], Tensor] = {}


def kept_memory(device: torch.device, count: int) -> Tensor:
    """Int32 memory in which a launch finds what the launch before has left; zeros for the first.

    One for each stream; for each stream of a capture another, zero again when a replay begins. So
    no two launches of a kernel that waits for those before it use the same at a time.
    """
    stream, capture = torch.cuda.current_stream(device).cuda_stream, 0
    if torch.cuda.is_current_stream_capturing():
        status, _, capture, *_ = driver.cuStreamGetCaptureInfo(stream)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuStreamGetCaptureInfo: {status}")
        for key in [k for k in _kept if k[0] == device and k[1] not in (0, int(capture))]:
            del _kept[key]  # a capture that has ended: its graph keeps the memory
    key = device, int(capture), stream, count
    if key not in _kept:
        _kept[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _kept[key]


@contextmanager
def shared_counters(device: torch.device) -> Iterator[None]:
    """Graphs captured in blocks of this use the same counters: they must not run side by side."""
    top = _used.get(device, 0)
    _used[device] = _bases.setdefault(device, top)
    try:
        yield
    finally:
        _used[device] = max(top, _used[device])


def magic(divisor: int) -> int:
    """M so that n // divisor is the upper half of n M; as int32, and 0 for 1, which has none.

    For n divisor < 2^32, or < 2^32 g where g divides both.
    """
    M = 2**32 // divisor + 1
    return 0 if divisor == 1 else M - 2**32 * (M >= 2**31)


def _values(args: tuple) -> tuple[int | float, ...]:
    return tuple(x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in args)


def _kind(value: Tensor | int | float | None) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p
    return ctypes.c_int if isinstance(value, int) else ctypes.c_float


def driver_call(name: str, *args: Any) -> Any:
    """A driver function; its result, or RuntimeError."""
    status, *results = getattr(driver, name)(*args)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name}: {status}")
    return results[0] if results else None


@cache
def nvrtc_version() -> tuple[int, int]:
    """Of the library that is found."""
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def _compile(text: bytes, name: str, options: list[str]) -> bytes:
    _, program = nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name}: {log.decode(errors='replace').strip()}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = b" " * size
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dsv4" / "cubin"
