"""Gradients of layers, ours against other ways to write them: milliseconds of one call in a loop.

    python experiments/benchmarks/layers.py

Kernel gradients as a product a position, written out or in a loop, and of XLA's own; 2x2 pooling
forward and backward. Let nothing else run.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from jax import lax

from evojax_suite.networks.layers import _native, pool

REPEATS, CALLS = 5, 10


def milliseconds(function, *arrays) -> tuple[float, float]:
    """Milliseconds of a call, the fastest of a few turns, and seconds of its compilation."""

    def looped(*arrays):
        def body(_, total):
            first = arrays[0] * (1 + total * 1e-12)
            return total + jnp.sum(function(first, *arrays[1:])) * 1e-12

        return lax.fori_loop(0, CALLS, body, 0.0)

    start = time.perf_counter()
    compiled = jax.jit(looped).lower(*arrays).compile()
    compilation = time.perf_counter() - start
    turns = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        turns.append((time.perf_counter() - start) / CALLS)
    return 1e3 * min(turns[1:]), compilation


def written_out(images, gradient, size):
    flat, (_, height, width, filters) = gradient.reshape(-1, gradient.shape[-1]), gradient.shape
    padded = jnp.pad(images, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    views = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    products = [view.reshape(-1, images.shape[-1]).T @ flat for view in views]
    return jnp.stack(products).reshape(size, size, -1, filters)


def in_a_loop(images, gradient, size):
    flat, shape = gradient.reshape(-1, gradient.shape[-1]), (*gradient.shape[:3], images.shape[-1])
    padded = jnp.pad(images, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))

    def product(place):
        return lax.dynamic_slice(padded, (0, *place, 0), shape).reshape(-1, shape[-1]).T @ flat

    first = jnp.arange(size)
    products = lax.map(product, (jnp.repeat(first, size), jnp.tile(first, size)))
    return products.reshape(size, size, shape[-1], -1)


def automatic(images, gradient, size):
    kernel = jnp.zeros((size, size, images.shape[-1], gradient.shape[-1]))
    return jax.vjp(lambda kernel: _native(images, kernel, size // 2), kernel)[1](gradient)[0]


def stacked(kind, images):
    views = jnp.stack([images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    return views.max(0) if kind == "max" else views.mean(0)


def windows(kind, images):
    start, combine = (-jnp.inf, lax.max) if kind == "max" else (0.0, lax.add)
    pooled = lax.reduce_window(images, start, combine, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return pooled if kind == "max" else pooled / 4


def main() -> None:
    key = jax.random.key(0)
    print("| images, filters, kernel | written out (compilation, s) | in a loop | automatic |")
    print("|---|---|---|---|")
    for shape, filters, size in (
        ((10, 32, 32, 16), 16, 3),
        ((10, 16, 16, 32), 32, 3),
        ((64, 8, 8, 32), 32, 7),
        ((64, 28, 28, 32), 32, 3),
        ((64, 28, 28, 32), 32, 7),
    ):
        arrays = jax.random.normal(key, shape), jax.random.normal(key, (*shape[:3], filters))
        cells = []
        for way in (written_out, in_a_loop, automatic):
            taken = milliseconds(lambda a, b, way=way, size=size: way(a, b, size), *arrays)
            cells.append(f"{taken[0]:.2f} ms ({taken[1]:.2f})")
        print(f"| {shape}, {filters}, {size} | {' | '.join(cells)} |", flush=True)
    print("\n| images | pooling | ours | stacked slices | XLA's windows |\n" + "|---" * 5 + "|")
    for shape in ((10, 32, 32, 32), (64, 8, 8, 32), (64, 28, 28, 32)):
        images = jax.random.normal(key, shape)
        gradient = jax.random.normal(key, (shape[0], shape[1] // 2, shape[2] // 2, shape[3]))
        for kind in ("max", "average"):
            cells = []
            for way in (pool, stacked, windows):

                def both(images, gradient, way=way, kind=kind):
                    return jax.vjp(lambda images: way(kind, images), images)[1](gradient)[0] ** 2

                cells.append(f"{milliseconds(both, images, gradient)[0]:.2f} ms")
            print(f"| {shape} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
