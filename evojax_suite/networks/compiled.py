"""Convolutions of stride 1 and blocks of the ConvNet in C++, for CPUs (`compiled.cc`).

XLA's CPU back end calls a library for products and convolutions, which shares each among all cores,
and compiles the rest apart from it: a small network spends its time between the two. Here one pass
over an image does all of a block while its map is in the cache, and sums stay in registers. It is
for float32, and for as many filters as fill vector registers (`fits`). Under `vmap` members are
taken one after the other. These are the functions of the library as they are: `layers.convolve` and
`blocks.compiled_block` make them differentiable.

The source is compiled where it is used first, by the C++ compiler of the machine for the processor
at hand (three seconds), and kept in the user's cache folder. CXX names the compiler, by default
c++, g++ or clang++.

Results are those of the other lowerings up to rounding and do not depend on the number of threads;
tests/test_compiled.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs

from evojax_suite.types import Array

_SOURCE = Path(__file__).with_suffix(".cc")
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-w"]
_NAMES = ("convolution", "convolution_gradient", "block", "block_gradient")
_FILTERS = 16
"""Filters are a multiple of it."""


def compiler() -> list[str] | None:
    """The command of the C++ compiler, or None if there is none."""
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        return command if shutil.which(command[0]) else None
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in found if path), None)


@cache
def load() -> None:
    """Compile the source if that was not done before, and make its functions known to JAX. Raises
    ValueError, one line, where that fails."""
    command = compiler()
    if command is None:
        raise ValueError("convolution compiled needs a C++ compiler (c++ or CXX), there is none")
    try:
        library = ctypes.CDLL(str(_built(command)))
    except OSError as error:
        raise ValueError(f"what {command[0]} compiled cannot be loaded: {error}") from None
    for name in map("evojax_suite_{}".format, _NAMES):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")


def _built(command: list[str]) -> Path:
    """The library in the cache folder, compiled for this processor by this compiler, with the
    headers of this jaxlib."""
    about = [*command, *_FLAGS, version("jaxlib"), _processor()]
    digest = hashlib.sha256(_SOURCE.read_bytes() + "\n".join(about).encode()).hexdigest()
    folder = platformdirs.user_cache_path("evojax-suite", appauthor=False) / "compiled"
    path = folder / f"{digest[:20]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            built = Path(place) / "built.so"
            headers = f"-I{jax.ffi.include_dir()}"
            line = [*command, *_FLAGS, headers, str(_SOURCE), "-o", str(built)]
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["nothing said"])[0]
                raise ValueError(f"{command[0]} could not compile {_SOURCE.name}: {said}")
            built.replace(path)  # of several processes any one's
    return path


def _processor() -> str:
    """What tells processors apart for which -march=native compiles differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({x for x in lines if x.startswith(named)})])


def fits(images: Array, filters: int, padding: int = 0, size: int = 3, stride: int = 1) -> bool:
    """Whether a convolution of images (N, H, W, C) with a kernel (size, size, C, filters) is taken:
    float32, of stride 1, with a multiple of 16 filters, and of channels, if there are four or more.
    """
    channels = images.shape[-1]
    few = channels < 4
    return (
        (images.dtype == jnp.float32)
        and stride == 1
        and filters % _FILTERS == 0
        and (few or (channels % _FILTERS == 0 and padding < size))
    )


def _call(name: str, outputs: list[tuple[int, ...]], padding: int, *arrays: Array) -> list[Array]:
    """The outputs, of these shapes, of a function of the library."""
    load()
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs]
    call = jax.ffi.ffi_call(f"evojax_suite_{name}", shapes, vmap_method="sequential")
    divided = bool(jax.sharding.get_abstract_mesh().manual_axes)  # over devices that are cores
    return list(call(*arrays, padding=np.int64(padding), threads=not divided))


def _sides(images: Array, kernel: Array, padding: int) -> tuple[int, int]:
    """The sides of the map."""
    height, width = (side + 2 * padding - len(kernel) + 1 for side in images.shape[1:3])
    return height, width


def _shape_of_gradient(images: Array) -> tuple[int, ...]:
    """Returns the shape of the images, or of no images where they are few channels: data, mostly,
    whose gradient XLA computes where something asks for it."""
    return (0,) * images.ndim if images.shape[-1] < 4 else images.shape


def convolution(images: Array, kernel: Array, padding: int) -> Array:
    """Returns the cross-correlation (N, H', W', F) of images (N, H, W, C) that `fits` with a kernel
    (K, K, C, F)."""
    shape = (len(images), *_sides(images, kernel, padding), kernel.shape[-1])
    return _call("convolution", [shape], padding, images, kernel)[0]


def convolution_gradient(
    images: Array, kernel: Array, padding: int, gradient: Array
) -> tuple[Array | None, Array]:
    """Returns the gradients of `convolution` for the images, None where these are few channels, and
    for the kernel, from that of the outputs."""
    shapes = [_shape_of_gradient(images), kernel.shape]
    arrays = images, kernel, gradient
    to_images, to_kernel = _call("convolution_gradient", shapes, padding, *arrays)
    return to_images if to_images.size else None, to_kernel


def block(
    images: Array, kernel: Array, scale: Array, bias: Array, padding: int, keep: bool
) -> list[Array]:
    """Returns the outputs (N, H'/2, W'/2, F) of `blocks.block` for images (N, H, W, C) that `fits`
    and, to `keep`, the maps (N, H', W', F), whose sides are even, and their means and 1 / standard
    deviations (N, F)."""
    (height, width), filters = _sides(images, kernel, padding), kernel.shape[-1]
    kept = len(images) if keep else 0
    shapes: list[tuple[int, ...]] = [(len(images), height // 2, width // 2, filters)]
    shapes += [(kept, height, width, filters), (kept, filters), (kept, filters)]
    return _call("block", shapes, padding, images, kernel, scale, bias)


def block_gradient(
    images: Array, kernel: Array, scale: Array, bias: Array, padding: int, *others: Array
) -> tuple[Array | None, Array, Array, Array]:
    """Returns the gradients of `block` for the images, None where these are few channels, the
    kernel, scale and bias. others: what `block` kept, and the gradient of its outputs."""
    shapes = [_shape_of_gradient(images), kernel.shape, scale.shape, bias.shape]
    arrays = images, kernel, scale, bias, *others
    found = _call("block_gradient", shapes, padding, *arrays)
    to_images, to_kernel, to_scale, to_bias = found
    return to_images if to_images.size else None, to_kernel, to_scale, to_bias
