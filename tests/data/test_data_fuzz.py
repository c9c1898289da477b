"""Damaged files of every format: what comes back is sound, or one line says what is wrong."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import pickle
import signal
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from evojax_suite import NetworkConfig, TrainingConfig, load
from evojax_suite.distilled import DistilledDataset
from evojax_suite.systems.de_nas import artifact as searched
from evojax_suite.systems.de_nas.architectures import dense_units
from evojax_suite.systems.ecomp import artifact as compressed, feed_forward, graph as graphs
from evojax_suite.systems.ecomp.artifact import CompressedNetwork
from evojax_suite.types import Dataset, Split

Parts = dict[str, bytes]
Edit = tuple[str, int, bytes]

RANDOM = np.random.default_rng(0)
SECONDS = 20
"""More is a hang."""


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def zipped(parts: Parts, how: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as file:
        for name, data in parts.items():
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), data, how)
    return stream.getvalue()


def deflated(parts: Parts) -> bytes:
    return zipped(parts, zipfile.ZIP_DEFLATED)


def tarred(parts: Parts) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue().rstrip(b"\0") + bytes(2048)


def resealed(data: bytes) -> bytes:
    """A tar whose headers, wherever they now lie, have the sums that belong to them."""
    blocks = bytearray(data)
    for start in range(0, len(blocks) - 511, 512):
        if blocks[start + 257 : start + 262] == b"ustar":
            blocks[start + 148 : start + 156] = b" " * 8
            total = sum(blocks[start : start + 512])
            blocks[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(blocks)


def encoded(form: str, pixels: np.ndarray, **how: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **how)
    return stream.getvalue()


def with_sums(data: bytes) -> bytes:
    """A PNG whose chunks, as far as they can be told apart, have the sums that belong to them."""
    found, place = bytearray(data), 8
    while place + 12 <= len(found):
        (length,) = struct.unpack_from(">I", found, place)
        end = place + 8 + length
        if end + 4 > len(found):
            break
        struct.pack_into(">I", found, end, zlib.crc32(found[place + 4 : end]))
        place = end + 4
    return bytes(found)


@dataclass(frozen=True)
class Form:
    """A format: what is inside a valid file, how it is packed, and how a folder with it is read.

    `seal`: brings the sums of a damaged file in order, so that what is behind them is met.
    """

    parts: Parts
    file: str
    pack: Callable[[Parts], bytes]
    read: Callable[[Path], object]
    beside: Parts | None = None
    seal: Callable[[bytes], bytes] | None = None


def images(count: int, *shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, *shape), np.uint8)


def only(parts: Parts) -> bytes:
    (data,) = parts.values()
    return data


def read_set(name: str) -> Callable[[Path], Dataset]:
    return lambda folder: load(folder / name if name else folder)


LABELS = np.array([0, 1, 0, 1])
ARRAYS = {
    f"{part}_{kind}": array
    for part in ("train", "test")
    for kind, array in (("images", images(4, 4, 4)), ("labels", LABELS))
}
FLOATS = ARRAYS | {
    "train_images": RANDOM.uniform(size=(4, 4, 4, 1)).astype(np.float32),
    "test_images": RANDOM.uniform(size=(4, 4, 4, 1)).astype(np.float32),
}
IDX = {
    f"{part}-{kind}-ubyte": struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    + array.astype(np.uint8).tobytes()
    for part in ("train", "t10k")
    for kind, array in (("images-idx3", images(4, 4, 4)), ("labels-idx1", LABELS))
}
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
PLANES = images(2, 3072)


def batch(protocol: int) -> bytes:
    return pickle.dumps({b"data": PLANES, b"labels": [0, 1], b"filenames": ["a", "b"]}, protocol)


def cifar(encode: Callable[[], bytes], suffix: str = "") -> Parts:
    return {f"{name}{suffix}": encode() for name in BATCHES}


def binary() -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for label, row in enumerate(PLANES))


def python2() -> bytes:
    """As Python 2 wrote the official batches."""
    pixels = PLANES.tobytes()
    return b"".join([
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n",
        b"q\x04K\x00\x85q\x05U\x01bq\x06\x87q\x07Rq\x08(K\x01K\x02M\x00\x0c\x86q\x09cnumpy\ndtype\n",
        b"q\nU\x02u1K\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00",
        b"tq\rb\x89T" + struct.pack("<I", len(pixels)) + pixels + b"r\x0e\x00\x00\x00tb",
        b"U\x06labelsq\x0f]q\x10(K\x00K\x01eu.",
    ])  # fmt: skip


def tree(form: str, *shape: int, **how: object) -> Parts:
    return {
        f"{part}/{name}/{number}.{form.lower()}": encoded(form, images(1, *shape)[0], **how)
        for part in ("train", "test")
        for name in ("ant", "bee")
        for number in range(2)
    }


def parent_arrays() -> dict[str, np.ndarray]:
    sizes = (16, 3, 3, 2)
    return {
        f"{place}.{kind}": RANDOM.normal(size=shape).astype(np.float32)
        for place, (before, after) in enumerate(itertools.pairwise(sizes))
        for kind, shape in (("weight", (after, before)), ("bias", (after,)))
    }


def parent_network(folder: Path) -> feed_forward.Network:
    (file,) = folder.iterdir()
    return feed_forward.load(file, (4, 4, 1), 2)


def saved_distilled() -> Parts:
    """The members of the file that `save` writes."""
    path = Path("unwritten.npz")
    data = DistilledDataset(
        images=RANDOM.normal(size=(2, 4, 4, 1)).astype(np.float32),
        labels=np.eye(2, dtype=np.float32),
        dataset="digits",
        class_names=("a", "b"),
        mean=(0.3,),
        std=(0.4,),
        network=NetworkConfig(width=3),
        training=TrainingConfig(num_epochs=2, siamese=("crop",)),
        seed=1,
        test_accuracies=(0.5,),
    )
    written: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "evojax_suite.distilled.write_atomically", lambda path, content: written.append(content)
        )
        data.save(path)
    with zipfile.ZipFile(io.BytesIO(written[0])) as file:
        return {name.removesuffix(".npy"): file.read(name) for name in file.namelist()}


def recipe_text(parts: Parts) -> bytes:
    """Distilled, `parts["text"]` being the recipe's JSON."""
    others = {name: data for name, data in parts.items() if name != "text"}
    text = parts["text"].decode("latin1")
    return zipped(others | {"recipe": npy(np.array(text))})


def read_distilled(folder: Path) -> DistilledDataset:
    return DistilledDataset.load(folder / "set.npz")


OWN = Dataset(
    "own",
    *[Split(images(4, 4, 4, 1), LABELS.astype(np.int32))] * 3,
    class_names=("a", "b"),
    mean=(0.5,),
    std=(0.25,),
)


def read_plain(folder: Path) -> DistilledDataset:
    return DistilledDataset.load(folder / "set.npz", OWN)


def compressed_files(nodes: bool = True) -> Parts:
    """The files of a network, with its nodes or as a version that knew chains alone wrote them."""
    network = feed_forward.from_arrays(parent_arrays(), (4, 4, 1), 2)
    described = json.dumps(graphs.description(graphs.from_network(network)))
    about = {
        "layer_sizes": [16, 3, 3, 2], "pooling": "average", "image_shape": [4, 4, 1],
        "mean": [0.0], "std": [1.0], "class_names": ["a", "b"], "dataset": "own", "lineage": {},
    }  # fmt: skip
    arrays = {
        f"layers.{place}.{kind}": array
        for place, layer in enumerate(network)
        for kind, array in layer._asdict().items()
    }
    return {
        "network.json": json.dumps(about).encode(),
        "network.safetensors": safetensors.numpy.save(
            arrays, {"nodes": described} if nodes else None
        ),
    }


def searched_files() -> Parts:
    about = {
        "units": [{"kind": "convolution", "kernel": 3, "filters": 2}, {"kind": "max"}],
        "dropout": 0.5, "normalization": "none", "skip": False, "compute_dtype": "float32",
        "image_shape": [4, 4, 1], "mean": [0.5], "std": [0.25], "class_names": ["a", "b"],
        "dataset": "own",
    }  # fmt: skip
    shapes = {
        "Conv_0": ((3, 3, 1, 2), (2,)),
        **{
            f"Dense_{place}": (own, own[1:])
            for place, own in enumerate(itertools.pairwise(dense_units(8, 2)))
        },
    }
    arrays = {
        f"params/{layer}/{kind}": RANDOM.normal(size=shape).astype(np.float32)
        for layer, own in shapes.items()
        for kind, shape in zip(("kernel", "bias"), own, strict=True)
    }
    return {
        "architecture.json": json.dumps(about).encode(),
        "network.safetensors": safetensors.numpy.save(arrays),
    }


def one_of(files: Parts, name: str, read: Callable[[Path], object], seal=None) -> Form:
    """The file `name` of several that are not packed together."""
    return Form({name: files[name]}, name, only, read, files, seal)


def members(arrays: dict[str, np.ndarray]) -> Parts:
    return {name: npy(array) for name, array in arrays.items()}


FIRST = "train/ant/0"
FORMS: dict[str, Callable[[], Form]] = {
    "npz": lambda: Form(members(ARRAYS), "set.npz", zipped, read_set("set.npz")),
    "npz, floats, deflated": lambda: Form(
        members(FLOATS), "set.npz", deflated, read_set("set.npz")
    ),
    "IDX images": lambda: one_of(IDX, "train-images-idx3-ubyte", read_set("")),
    "IDX labels": lambda: one_of(IDX, "t10k-labels-idx1-ubyte", read_set("")),
    "IDX in gz": lambda: Form(
        {"": IDX["train-images-idx3-ubyte"]},
        "train-images-idx3-ubyte",
        lambda parts: gzip.compress(only(parts)),
        read_set(""),
        IDX,
    ),
    "CIFAR binary": lambda: one_of(cifar(binary, ".bin"), "data_batch_2.bin", read_set("")),
    "CIFAR pickle 2": lambda: one_of(cifar(lambda: batch(2)), "data_batch_2", read_set("")),
    "CIFAR pickle 4": lambda: one_of(cifar(lambda: batch(4)), "test_batch", read_set("")),
    "CIFAR pickle 5": lambda: one_of(cifar(lambda: batch(5)), "data_batch_1", read_set("")),
    "CIFAR Python 2": lambda: one_of(cifar(python2), "data_batch_1", read_set("")),
    "CIFAR tar": lambda: Form(
        cifar(binary, ".bin"), "cifar10.tar", tarred, read_set("cifar10.tar"), seal=resealed
    ),
    "PNG": lambda: one_of(tree("PNG", 4, 4), f"{FIRST}.png", read_set(""), with_sums),
    "PNG, colour": lambda: one_of(tree("PNG", 4, 4, 3), f"{FIRST}.png", read_set(""), with_sums),
    "JPEG": lambda: one_of(tree("JPEG", 4, 4, 3), f"{FIRST}.jpeg", read_set("")),
    "BMP": lambda: one_of(tree("BMP", 4, 4), f"{FIRST}.bmp", read_set("")),
    "WebP": lambda: one_of(tree("WEBP", 4, 4, 3), f"{FIRST}.webp", read_set("")),
    "WebP, lossless": lambda: one_of(
        tree("WEBP", 4, 4, 4, lossless=True), f"{FIRST}.webp", read_set("")
    ),
    "TIFF": lambda: one_of(tree("TIFF", 4, 4), f"{FIRST}.tiff", read_set("")),
    **{
        f"TIFF, {compression}": lambda how=compression: one_of(
            tree("TIFF", 4, 4, 3, compression=how), f"{FIRST}.tiff", read_set("")
        )
        for compression in ("tiff_lzw", "jpeg")
    },
    "tar": lambda: Form(
        tree("PNG", 4, 4), "set.tar", tarred, read_set("set.tar"), seal=resealed
    ),
    "tar in gz": lambda: Form(
        {"": tarred(tree("PNG", 4, 4))},
        "set.tar.gz",
        lambda parts: gzip.compress(only(parts)),
        read_set("set.tar.gz"),
    ),
    "distilled": lambda: Form(saved_distilled(), "set.npz", zipped, read_distilled),
    "distilled, recipe": lambda: Form(
        (kept := saved_distilled())
        | {"text": str(np.load(io.BytesIO(kept.pop("recipe")))).encode()},
        "set.npz",
        recipe_text,
        read_distilled,
    ),
    "distilled, plain": lambda: Form(
        members({"images": RANDOM.uniform(size=(2, 4, 4, 1)), "labels": np.array([0, 1])}),
        "set.npz",
        zipped,
        read_plain,
    ),
    "parent safetensors": lambda: Form(
        {"": safetensors.numpy.save(parent_arrays())}, "parent.safetensors", only, parent_network
    ),
    "parent npz": lambda: Form(members(parent_arrays()), "parent.npz", zipped, parent_network),
    "compressed, JSON": lambda: one_of(compressed_files(), "network.json", compressed.load),
    "compressed": lambda: one_of(compressed_files(), "network.safetensors", compressed.load),
    "compressed chain": lambda: one_of(
        compressed_files(nodes=False), "network.safetensors", compressed.load
    ),
    "searched, JSON": lambda: one_of(searched_files(), "architecture.json", searched.load),
    "searched": lambda: one_of(searched_files(), "network.safetensors", searched.load),
}  # fmt: skip


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """`data` after edits at a place: all from there on cut, a bit flipped (the payload's first byte
    says which), bytes put in or over others."""
    for kind, number, payload in edits:
        place = number % (len(data) + 1)
        match kind:
            case "cut":
                data = data[:place]
            case "flip" if data:
                place %= len(data)
                mask = 1 << payload[0] % 8
                data = data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
            case "insert":
                data = data[:place] + payload + data[place:]
            case "over":
                data = data[:place] + payload + data[place + len(payload) :]
    return data


def write(folder: Path, form: Form, edits: list[Edit], where: int, sealed: bool = False) -> None:
    """The file of `form`, damaged inside (the part number `where`, counted round) or as a whole."""
    parts = dict(form.parts)
    place = where % (len(parts) + 1)
    if place < len(parts):
        name = [*parts][place]
        parts[name] = edited(parts[name], edits)
        data = form.pack(parts)
    else:
        data = edited(form.pack(parts), edits)
    if sealed and form.seal:
        data = form.seal(data)
    for name, content in {**(form.beside or {}), form.file: data}.items():
        path = folder / name
        if name == form.file or not path.exists():  # the others are the same each time
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def check_set(found: Dataset) -> None:
    shape, num_channels = found.image_shape, found.image_shape[2]
    assert found.num_classes >= 2
    assert len(found.mean) == len(found.std) == num_channels
    assert np.isfinite(found.mean).all()
    assert min(found.std) > 0
    for part in (found.train, found.validation, found.test):
        assert len(part.images) == len(part.labels) > 0
        assert part.images.shape[1:] == shape
        assert part.labels.dtype == np.int32
        assert part.images.dtype == found.train.images.dtype
        assert part.images.dtype in (np.uint8, np.float32)
        assert part.labels.min() >= 0
        assert part.labels.max() < found.num_classes
        if part.images.dtype == np.float32:
            assert part.images.min() >= 0
            assert part.images.max() <= 1
    assert np.bincount(found.train.labels, minlength=found.num_classes).all()
    "".join((found.name, *found.class_names)).encode()


def check_constants(mean, std, channels: int) -> None:
    mean, std = np.asarray(mean, float), np.asarray(std, float)
    assert mean.shape == std.shape == (channels,)
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()
    assert std.min() > 0


def check_distilled(found: DistilledDataset) -> None:
    assert found.images.ndim == 4
    assert len(found.images) > 0
    assert found.images.dtype == found.labels.dtype == np.float32
    assert found.labels.shape == (len(found.images), len(found.class_names))
    assert np.isfinite(found.images).all()
    assert np.isfinite(found.labels).all()
    check_constants(found.mean, found.std, found.images.shape[3])
    assert all(isinstance(name, str) for name in (found.dataset, *found.class_names))
    assert isinstance(found.seed, int)
    assert np.asarray(found.test_accuracies, float).ndim == 1


def check_network(
    layers: Iterable[tuple[np.ndarray, np.ndarray]], inputs: int, outputs: int
) -> None:
    layers = list(layers)
    for weight, bias in layers:
        assert weight.shape == (len(bias), inputs)
        assert weight.dtype == bias.dtype == np.float32
        assert np.isfinite(weight).all()
        assert np.isfinite(bias).all()
        inputs = len(bias)
    assert len(layers) > 1
    assert inputs == outputs


def check_searched(found: searched.SearchedNetwork) -> None:
    check_constants(found.mean, found.std, found.image_shape[2])
    images = jax.ShapeDtypeStruct((1, *found.image_shape), np.float32)
    logits = jax.eval_shape(found.network.apply, found.variables, images)
    assert logits.shape == (1, len(found.class_names))


def check(found: object) -> None:
    """Hold what was read to what its type promises."""
    match found:
        case Dataset():
            check_set(found)
        case DistilledDataset():
            check_distilled(found)
        case CompressedNetwork():
            check_constants(found.mean, found.std, found.image_shape[2])
            inputs = int(np.prod(found.image_shape))
            if found.inputs_kept is not None:
                inputs = len(found.inputs_kept)
            layers = ((node.weight, node.bias) for node in found.network)
            check_network(layers, inputs, len(found.class_names))
            assert max(found.inputs_kept or (0,)) < np.prod(found.image_shape)
            images = jax.ShapeDtypeStruct((1, *found.image_shape), np.float32)
            logits = jax.eval_shape(found._forward, images)
            assert logits.shape == (1, len(found.class_names))
        case searched.SearchedNetwork():
            check_searched(found)
        case tuple():
            check_network(found, 16, 2)
        case _:
            raise AssertionError(f"nothing that a reader gives: {found!r}")


@contextlib.contextmanager
def soon() -> Iterator[None]:
    def late(number, frame):
        raise AssertionError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def holds(form: Form, folder: Path) -> str:
    """The property: what is in `folder` is sound or refused in one line. Returns that line."""
    with soon(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            check(form.read(folder))
            said = ""
        except (ValueError, OSError) as error:
            said = str(error)
            assert said.strip()
            assert "\n" not in said
            assert str(folder) in said
    unseen = (ResourceWarning, DeprecationWarning)
    noise = [str(w.message) for w in warned if not issubclass(w.category, unseen)]
    assert not noise
    return said


@pytest.fixture(scope="module")
def forms() -> dict[str, Form]:
    return {name: make() for name, make in FORMS.items()}


@pytest.mark.parametrize("name", FORMS)
def test_a_whole_file_is_sound(forms, name, tmp_path):
    write(tmp_path, forms[name], [], 0, sealed=True)
    assert holds(forms[name], tmp_path) == ""


def over_end(tail: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[: -len(tail)] + tail


def swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def swap(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return swap


IMAGE = f"{FIRST}.png"
FOUND: list[tuple[str, str, Callable[[bytes], bytes], str]] = [
    ("distilled", "images", swapped(b": (", b": (("), "not a readable .npz"),  # of tokenize
    ("parent npz", "0.weight", swapped(b"\x93NUMPY", b"?"), "'0.weight' is no array"),
    ("distilled, plain", "labels", swapped(b"\x93NUMPY", b"?"), "'labels' is no array"),
    ("distilled, plain", "images", swapped(b"\x93NUMPY", b"?"), "'images' is no array"),
    ("distilled", "images", over_end(b"\xff\xff\xff\x7f"), "images hold NaN"),
    ("distilled, plain", "images", over_end(b"\0\0\0\0\0\0\xf4\x7f"), "images hold NaN"),
    ("distilled", "labels", swapped(b"<f4", b"<i4"), "labels are (2, 2) of type int32, allowed"),
    ("distilled", "recipe", over_end(b"\xff\xff\xff\xff"), "utf-32"),  # no character
    ("distilled, recipe", "text", swapped(b'"seed": 1', b'"seed": .'), "Expecting value"),
    ("npz", "train_images", swapped(b"(4, 4, 4), }", b"(4L, 4, 4),}"), ""),  # as Python 2 wrote it
    ("compressed, JSON", "network.json", swapped(b"own", b"\xde"), "network.json"),
    ("compressed", "network.safetensors", swapped(b'source\\": 1', b'source\\": 7'), "node 1 does"),
    ("searched, JSON", "architecture.json", swapped(b"own", b"\xb2"), "architecture.json"),
    ("searched, JSON", "architecture.json", swapped(b"[0.5]", b"[]"), "allowed: 1 numbers"),
    ("searched", "network.safetensors", swapped(b"0/kernel", b"0/kennel"), "needed: none"),
    ("searched", "network.safetensors", swapped(b"F32", b"U32"), "uint32"),
    ("CIFAR pickle 4", "test_batch", swapped(b"nstruct", b"nst\nuct"), "refused, the pickle asks"),
    ("CIFAR pickle 2", "data_batch_2", swapped(b"}q\0", b"}r\xff\xff\xff\x1f"), "things in"),
    ("CIFAR pickle 5", "data_batch_1", swapped(struct.pack("<Q", 6144), struct.pack("<Q", 2**40)),
     "bytes in a bytearray8"),
    ("PNG", IMAGE, swapped(b"\0\0\0\4\0\0\0\4", b"\0\0\0\4\2\0\0\0"), "exceeds limit"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "change", "says"), FOUND)
def test_damage_that_was_not_found_once(forms, tmp_path, name, part, change, says):
    form = forms[name]
    damaged = {**form.parts, part: change(form.parts[part])}
    write(tmp_path, replace(form, parts=damaged), [], 0, sealed=True)
    said = holds(form, tmp_path)
    assert says in said
    assert bool(says) == bool(said)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(("cut", "flip", "insert", "over")),
        st.integers(0, 2**16),
        st.binary(min_size=1, max_size=8)
        | st.sampled_from((b"\xff" * 4, b"\0" * 8, b"9" * 12, b"-1", b"1e999", b"NaN", b"\n")),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", FORMS)
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=EDITS, where=st.integers(0, 8), sealed=st.booleans())
def test_damage_is_found_or_harmless(forms, tmp_path, name, edits, where, sealed):
    write(tmp_path, forms[name], edits, where, sealed)
    holds(forms[name], tmp_path)
