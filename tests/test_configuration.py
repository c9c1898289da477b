"""What settings take, what they make of it, and what they say of the rest."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from annotated_types import Ge, Gt, Lt, MinLen, MultipleOf
from flax import struct
from pydantic import AllowInfNan, NonNegativeFloat, PositiveInt

from evojax_suite import NetworkConfig, TrainingConfig, ga_distillation as ga, load
from evojax_suite.configuration import Scalars, Share, configuration, from_json


@configuration
class Inner:
    width: PositiveInt = 8
    names: tuple[Literal["a", "b"], ...] = ()


@configuration
class Settings:
    ratio: Annotated[float, Gt(0), Lt(1)] = 0.5
    factor: Annotated[float, Gt(1), AllowInfNan()] = 2.0
    size: Annotated[int, Ge(2), MultipleOf(2)] | None = None
    sizes: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (1,)
    at_once: PositiveInt | Literal["auto"] = "auto"
    flip: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self):
        if self.flip and self.size:
            raise ValueError(f"flip needs no size, got {self.size}")


@configuration
class More(Settings):
    share: Share = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.share == self.ratio:
            raise ValueError(f"share must differ from ratio, got {self.share}")


@struct.dataclass
class Params(Scalars):
    rate: Share = 0.5
    scale: NonNegativeFloat = 1.0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ratio": 1.5}, "ratio must be in (0, 1), got 1.5"),
        ({"ratio": math.nan}, "ratio must be in (0, 1), got nan"),
        ({"ratio": "0.5"}, "ratio must be float, got '0.5'"),
        ({"factor": math.nan}, "factor must be > 1, got nan"),
        ({"size": 0}, "size must be even and >= 2, got 0"),
        ({"size": 3}, "size must be even and >= 2, got 3"),
        ({"size": True}, "size must be int, got True"),
        ({"size": 4.0}, "size must be int, got 4.0"),
        ({"sizes": ()}, "sizes must name at least one, got ()"),
        ({"sizes": (2, 0)}, "sizes must be >= 1, got 0"),
        ({"sizes": "12"}, "sizes must be tuple[int, ...], got '12'"),
        ({"at_once": 0}, "at_once must be >= 1 or auto, got 0"),
        ({"at_once": "all"}, "at_once must be int or auto, got 'all'"),
        ({"flip": 1}, "flip must be bool, got 1"),
        ({"flip": True, "size": 2}, "flip needs no size, got 2"),
        ({"inner": {"width": 3}}, "inner must be Inner, got {'width': 3}"),
        ({"width": 3}, "there is no setting 'width'"),
        ({"share": 2}, "share must be in [0, 1], got 2"),
        ({"share": 0.5}, "share must differ from ratio, got 0.5"),
    ],
)
def test_what_is_wrong_is_one_line(given, says):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        More(**given)
    assert str(error.value) == says
    with pytest.raises(ValueError) as error:  # noqa: PT011
        dataclasses.replace(More(), **given)
    assert str(error.value) == says


def test_a_value_without_its_name_is_named():
    with pytest.raises(ValueError, match=r"^ratio must be in \(0, 1\), got 2$"):
        Settings(2)
    with pytest.raises(ValueError, match=r"^names must be one of a, b, got 'c'$"):
        Inner(3, ("c",))


def test_numbers_become_those_of_python_and_lists_tuples():
    made = Settings(
        np.float32(0.25), math.inf, jnp.int32(4), [np.int64(3), 2], flip=np.bool_(False)
    )
    assert made == Settings(ratio=0.25, factor=math.inf, size=4, sizes=(3, 2))
    assert [type(value) for value in vars(made).values()][:4] == [float, float, int, tuple]
    assert type(made.sizes[0]) is int
    assert type(Settings(factor=2).factor) is float


def test_settings_are_values():
    one, other = TrainingConfig(batch_size=4), TrainingConfig(batch_size=4)
    assert one == other
    assert hash(one) == hash(other)
    assert one != NetworkConfig()
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == dataclasses.replace(one)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.batch_size = 5  # pyright: ignore[reportAttributeAccessIssue]
    traces = []

    def traced(config: TrainingConfig, number):
        traces.append(config)
        return number * config.batch_size

    compiled = jax.jit(traced, static_argnums=0)
    assert compiled(one, 2) == compiled(other, 2) == 8
    assert len(traces) == 1


def test_numbers_that_are_traced_are_not_judged():
    @jax.jit
    def scaled(rate):
        params = Params(rate=rate, scale=2)
        params.check()
        return params.rate * params.scale

    assert scaled(3.0) == 6
    Params(rate=jnp.float32(1), scale=np.float64(0)).check()
    for values, says in (
        ({"rate": jnp.float32(1.5)}, "rate must be in [0, 1], got 1.5"),
        ({"scale": math.inf}, "scale must be >= 0, got inf"),
        ({"scale": "1"}, "scale must be float, got '1'"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            Params(**values).check()
        assert str(error.value) == says
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 5.0"):
        Params(rate=5.0)


def test_settings_of_a_file():
    content = {"inner": {"width": 3, "names": ["a"]}, "sizes": [4], "ratio": 0.25, "other": None}
    found = from_json(Settings, content, ("inner", "sizes", "ratio"))
    assert Settings(**found) == Settings(0.25, sizes=(4,), inner=Inner(3, ("a",)))
    for change, says in (
        ({"inner": {"width": "3"}}, "width must be int, got '3'"),
        ({"inner": {"widht": 3}}, "there is no setting 'widht'"),
        ({"inner": 3}, "inner must be Inner, got 3"),
        ({"sizes": [0]}, "sizes must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            from_json(Settings, content | change, ("inner", "sizes"))
        assert str(error.value) == says


def test_settings_print_what_differs_from_their_defaults_as_python():
    assert repr(ga.Config()) == "Config()"
    config = ga.Config(population_size=8, network=NetworkConfig(width=16), levels=2)
    assert repr(config) == "Config(population_size=8, levels=2, network=NetworkConfig(width=16))"
    assert eval(repr(config), {"Config": ga.Config, "NetworkConfig": NetworkConfig}) == config


def test_datasets_and_algorithms_print_a_line():
    dataset = load("digits")
    assert repr(dataset) == (
        "Dataset('digits': 10 classes of 8x8x1 images; train 1,078, validation 360, test 359)"
    )
    assert repr(dataset.test) == "Split(359 images of 8x8x1, uint8)"
    algorithm = ga.build(ga.Config(population_size=8), 10, (8, 8, 1))
    name = "evojax_suite.systems.ga_distillation.algorithm"
    assert repr(algorithm) == f"Algorithm({name}, 8 members, 1 device)"
