"""What a process may use: memory maps and the programs that take them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from evojax_suite.runtime.program import forget_programs
from evojax_suite.runtime.resources import memory_maps_used


def test_memory_maps_are_counted(tmp_path):
    maps, most = tmp_path / "maps", tmp_path / "max_map_count"
    maps.write_text("7f00-7f01 r-xp\n7f01-7f02 r--p\n7f02-7f03 rw-p\n")
    most.write_text("12\n")
    assert memory_maps_used(maps, most) == 0.25
    assert memory_maps_used(tmp_path / "none", most) == 0.0


def test_programs_are_forgotten_when_maps_run_out():
    traced = []

    @jax.jit
    def program(x):
        traced.append(x.shape)
        return 2 * x

    for most, number in ((1.0, 1), (1.0, 1), (-1.0, 2)):
        forget_programs(most)
        assert program(jnp.ones(3)).tolist() == [2, 2, 2]
        assert len(traced) == number
