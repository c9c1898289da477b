"""Wrong input to every command and to the public functions: one line that names it and what is
allowed, exit code 2, and nothing half-written. Beside it names and texts that must work."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from evojax_suite import (
    EngineConfig,
    NetworkConfig,
    TrainingConfig,
    cest,
    de_nas,
    devs,
    ecomp,
    exports,
    ga_distillation,
    load,
    networks,
)
from evojax_suite.cli.main import main
from evojax_suite.distilled import DistilledDataset
from evojax_suite.reporting import plotting
from evojax_suite.systems.de_nas import artifact as searched
from evojax_suite.systems.ecomp import artifact as compressed, feed_forward

RUNS = ("ga-distillation", "devs", "coreset", "cest", "ecomp", "de-nas")
ORDINARY = 65534
"""The user that root becomes to meet what it may not read or write."""


def case(line: str, *says: str, name: str | None = None) -> Any:
    """A command line, in which {name} is a file of `files`, and what is said of it."""
    return pytest.param(line, says, id=name or line.replace("{", "").replace("}", ""))


def encoded(pixels: np.ndarray, form: str = "PNG", **how: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **how)
    return stream.getvalue()


def tarred(contents: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_all(folder: Path, contents: dict[str, bytes | None]) -> None:
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            path.mkdir()
        else:
            path.write_bytes(data)


RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (40, 8, 8), np.uint8)
LABELS = np.arange(40) % 2
PICTURE = encoded(PIXELS[0])
TREE = {
    f"{part}/{name}/{number}.png": PICTURE
    for part in ("train", "test")
    for name in ("ant", "bee")
    for number in range(3)
}
IDX = {
    f"{part}-{kind}-ubyte": struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    + array.astype(np.uint8).tobytes()
    for part in ("train", "t10k")
    for kind, array in (("images-idx3", PIXELS), ("labels-idx1", LABELS))
}
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
BATCH = {"data": RANDOM.integers(0, 256, (2, 3072), np.uint8), "labels": [0, 1]}
CIFAR = {name: pickle.dumps(BATCH, 2) for name in BATCHES}
FIRST = "train-images-idx3-ubyte"

WRONG_ARRAYS: dict[str, dict[str, Any]] = {
    "nan": {"train_images": np.where(PIXELS[3, 2, 1] == PIXELS, np.nan, PIXELS / 255)},
    "beyond": {"train_images": PIXELS / 100},
    "integers": {"train_images": PIXELS.astype(int)},
    "flat": {"train_images": PIXELS.reshape(40, 64)},
    "five_channels": {"train_images": np.zeros((40, 8, 8, 5), np.uint8)},
    "no_images": {"train_images": PIXELS[:0], "train_labels": LABELS[:0]},
    "counts": {"train_images": PIXELS[:39]},
    "real_labels": {"train_labels": LABELS.astype(float)},
    "text_labels": {"train_labels": LABELS.astype(str)},
    "time_labels": {"train_labels": LABELS.astype("m8[s]")},
    "negative_label": {"train_labels": LABELS - 1},
    "huge_label": {"train_labels": LABELS * 2**40},
    "empty_class": {"train_labels": LABELS * 2},
    "one_class": {"train_labels": LABELS * 0},
    "no_labels": {"train_labels": None},
    "objects": {"train_labels": LABELS.astype(object)},
    "few": {"train_images": PIXELS[:2], "train_labels": LABELS[:2]},
}

WRONG_SETS: dict[str, tuple[str, ...]] = {
    "nan.npz": ("nan.npz", "float images contain NaN; allowed: values in [0, 1]"),
    "beyond.npz": ("beyond.npz", "lie in [0, 2.55]; allowed: values in [0, 1]"),
    "integers.npz": ("integers.npz", "type int64; allowed: uint8"),
    "flat.npz": ("flat.npz", "(40, 64); allowed: (N, H, W)"),
    "five_channels.npz": ("five_channels.npz", "(40, 8, 8, 5)", "1 to 4 channels"),
    "no_images.npz": ("no_images.npz", "has no images; at least one is needed"),
    "counts.npz": ("counts.npz", "39 images but 40 labels"),
    "real_labels.npz": ("real_labels.npz", "type float64; allowed: (N,) or (N, 1) integers"),
    "text_labels.npz": ("text_labels.npz", "type <U21; allowed"),
    "time_labels.npz": ("time_labels.npz", "type timedelta64[s]; allowed"),
    "negative_label.npz": ("negative_label.npz", "label -1 is out of range; labels count from 0"),
    "huge_label.npz": ("huge_label.npz", "label 1099511627776 is out of range"),
    "empty_class.npz": ("empty_class.npz", "label 2 is out of range; allowed: 0..1"),
    "one_class.npz": ("one_class.npz", "1 class; at least 2 are needed"),
    "no_labels.npz": ("no_labels.npz", "only one of train_images and train_labels"),
    "objects.npz": ("objects.npz", "not a readable .npz"),
    "few.npz": ("few.npz", "too few train images"),
    "torn.npz": ("torn.npz", "not a readable .npz, it may be truncated"),
    "garbage.npz": ("garbage.npz", "not a readable .npz"),
    "nothing.npz": ("nothing.npz", "not a readable .npz"),
    "array.npz": ("array.npz", "it is a single array"),
    "torn.tar": ("torn.tar", "not a readable tar archive, it may be truncated"),
    "garbage.tar": ("garbage.tar", "not a readable tar archive"),
    "torn.tar.gz": ("torn.tar.gz", "not a readable tar archive"),
    "notes.tar": ("notes.tar", "holds neither CIFAR batches nor images"),
    "idx_cut": (FIRST, "truncated, 2559 bytes", "ask for 2560"),
    "idx_magic": (FIRST, "magic number 0x50000803; expected 0x00000803"),
    "idx_sizes": (FIRST, "0x4294967295x4294967295"),
    "idx_missing": ("idx_missing", f"missing {FIRST}"),
    "idx_gz": (FIRST, "may be truncated"),
    "cifar_cut": ("data_batch_3", "not a readable pickle"),
    "cifar_call": ("test_batch", "refused, the pickle asks for", "allowed: dicts"),
    "cifar_memory": ("data_batch_1", "not a readable pickle (536870911 things in"),
    "cifar_stack": ("data_batch_1", "not a readable pickle (it has too many tuples)"),
    "cifar_label": ("data_batch_2", "a label has more than 31 bits"),
    "tree_empty_class": ("class folder train/cat is empty; each needs an image",),
    "tree_torn": ("train/ant/1.png cannot be decoded",),
    "tree_torn_webp": ("train/ant/1.webp cannot be decoded",),
    "tree_torn_tiff": ("train/ant/1.tif cannot be decoded",),
    "tree_pages": ("train/ant/9.tiff has several frames; allowed: one",),
    "tree_deep": ("train/ant/9.tif has mode I;16; allowed: 8 bits per channel, grey or colour",),
    "tree_text": ("train/ant/notes.txt is no image in a class folder",),
    "tree_size": ("is 4x8 (height x width)", "all images must have one size"),
    "tree_bomb": ("train/ant/0.png cannot be decoded", "exceeds limit"),
    "tree_no_train": ("tree_no_train", "no train part; one is needed"),
    "tree_one_class": ("tree_one_class", "1 class; at least 2 are needed"),
    "empty_folder": ("empty_folder", "no dataset in this folder; allowed: train|val|test"),
    "notes.txt": ("notes.txt", "unknown file type; allowed: .npz"),
    "none/at/all": ("none/at/all", "no such file or folder"),
}  # fmt: skip


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says so."""
    data = bytearray(PICTURE)
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def wrong_sets(folder: Path) -> None:
    arrays = {"train_images": PIXELS, "train_labels": LABELS}
    np.savez(folder / "good.npz", **arrays)
    for name, change in WRONG_ARRAYS.items():
        kept = {key: value for key, value in (arrays | change).items() if value is not None}
        np.savez(folder / f"{name}.npz", **kept)
    np.save(folder / "array.npy", PIXELS)
    (folder / "array.npy").rename(folder / "array.npz")
    good, tar = (folder / "good.npz").read_bytes(), tarred(TREE)
    memory, stack = b"\x80\x02}r\xff\xff\xff\x1f.", b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s."
    (folder / "torn.npz").write_bytes(good[: len(good) // 2])
    write_all(
        folder,
        {
            "garbage.npz": bytes(range(256)),
            "nothing.npz": b"",
            "torn.tar": tar[: len(tar) // 3],
            "garbage.tar": b"x" * 2000,
            "torn.tar.gz": gzip.compress(tar)[:-30],
            "notes.tar": tarred({"notes.txt": b"x"}),
            "notes.txt": b"x",
            "empty_folder": None,
        },
    )
    trees: dict[str, tuple[dict[str, bytes], dict[str, bytes | None]]] = {
        "idx_cut": (IDX, {FIRST: IDX[FIRST][:-1]}),
        "idx_magic": (IDX, {FIRST: b"P" + IDX[FIRST][1:]}),
        "idx_sizes": (IDX, {FIRST: IDX[FIRST][:4] + struct.pack(">III", 0, 2**32 - 1, 2**32 - 1)}),
        "idx_gz": (IDX, {FIRST: gzip.compress(IDX[FIRST])[:-9]}),
        "cifar_cut": (CIFAR, {"data_batch_3": CIFAR["data_batch_3"][:-9]}),
        "cifar_call": (CIFAR, {"test_batch": b"cos\nsystem\n(S'true'\ntR."}),
        "cifar_memory": (CIFAR, {"data_batch_1": memory}),
        "cifar_stack": (CIFAR, {"data_batch_1": stack}),
        "cifar_label": (CIFAR, {"data_batch_2": pickle.dumps(BATCH | {"labels": [0, 2**70]}, 2)}),
        "tree_empty_class": (TREE, {"train/cat": None}),
        "tree_torn": (TREE, {"train/ant/1.png": PICTURE[:-40]}),
        "tree_torn_webp": (TREE, {"train/ant/1.webp": encoded(PIXELS[0], "WEBP")[:-4]}),
        "tree_torn_tiff": (
            TREE,
            {"train/ant/1.tif": encoded(PIXELS[0], "TIFF", compression="tiff_lzw")[:-8]},
        ),
        "tree_pages": (
            TREE,
            {
                "train/ant/9.tiff": encoded(
                    PIXELS[0], "TIFF", save_all=True, append_images=[Image.fromarray(PIXELS[1])]
                )
            },
        ),
        "tree_deep": (TREE, {"train/ant/9.tif": encoded(PIXELS[0].astype(np.uint16), "TIFF")}),
        "tree_text": (TREE, {"train/ant/notes.txt": b"x"}),
        "tree_size": (TREE, {"train/bee/9.png": encoded(PIXELS[0, :4])}),
        "tree_bomb": (TREE, {"train/ant/0.png": png_of(20_000, 20_000)}),
    }
    for name, (contents, change) in trees.items():
        write_all(folder / name, {**contents, **change})
    write_all(folder / "idx_missing", {k: v for k, v in IDX.items() if k != FIRST})
    write_all(folder / "tree_no_train", {k: v for k, v in TREE.items() if k.startswith("test")})
    write_all(folder / "tree_one_class", {k: v for k, v in TREE.items() if "ant" in k})


def dense(*sizes: int) -> dict[str, np.ndarray]:
    """A fully connected network as PyTorch names its arrays."""
    return {
        f"{place}.{kind}": np.ones(shape, np.float32)
        for place, (before, after) in enumerate(itertools.pairwise(sizes))
        for kind, shape in (("weight", (after, before)), ("bias", (after,)))
    }


PARENT = dense(64, 5, 5, 2)
WRONG_PARENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "classes.npz": (dense(64, 5, 5, 3), ("no chain of two or more layers", "2 classes")),
    "inputs.npz": (dense(63, 5, 2), ("no chain", "from 64 inputs")),
    "deep.npz": (dense(64, *[5] * 30, 3), ("no chain", "29 (5, 5)")),
    "mixed.npz": (
        dense(64, *RANDOM.integers(3, 6, 40).tolist(), 9),
        ("no chain of two or more layers",),
    ),
    "one_layer.npz": (dense(64, 2), ("two or more layers",)),
    "no_units.npz": (dense(64, 0, 2), ("weights of shape (0, 64)",)),
    "nan.safetensors": (PARENT | {"1.bias": np.full(5, np.nan, np.float32)}, ("5 NaN",)),
    "large.npz": (
        PARENT | {"1.bias": np.full(5, 1e300)},
        ("1.bias holds 5 NaN or infinite numbers",),
    ),
    "integers.safetensors": (PARENT | {"1.bias": np.ones(5, int)}, ("got int64",)),
    "bias.safetensors": (
        {name: array for name, array in PARENT.items() if name != "1.bias"},
        ("layer '1' needs a weight or kernel and a bias",),
    ),
    "scalar.npz": (PARENT | {"1.weight": np.float32(1)}, ("weights of shape ()",)),
    "even.npz": (PARENT | {"0.weight": np.ones((5, 1, 2, 2))}, ("odd size, got 2x2",)),
    "others.npz": (PARENT | {"norm.scale": np.ones(5)}, ("found 'norm.scale'",)),
    "torn.safetensors": (safetensors.numpy.save(PARENT)[:-9], ("Error while deserializing",)),
    "bfloat16.safetensors": (
        struct.pack("<Q", 62)
        + b'{"0.bias":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}  '
        + b"\0\0",
        ("type 'BF16'",),
    ),
    "garbage.safetensors": (b"\xff" * 50, ("header too large",)),
    "garbage.npz": (b"PK\x03\x04garbage", ("not a readable .npz",)),
    "array.npz": (b"\x93NUMPY", ("not a readable .npz",)),
    "parent.pth": (b"", ("expected a .safetensors or .npz file",)),
}


def distilled_set(**change: Any) -> DistilledDataset:
    found = DistilledDataset(
        images=RANDOM.normal(size=(10, 8, 8, 1)).astype(np.float32),
        labels=np.eye(10, dtype=np.float32),
        dataset="digits",
        class_names=tuple("0123456789"),
        mean=(0.3,),
        std=(0.4,),
        network=NetworkConfig(width=4, depth=1),
        training=TrainingConfig(num_epochs=1),
        seed=0,
        test_accuracies=(0.5, 0.5),
    )
    return dataclasses.replace(found, **change)


WRONG_RECIPES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "other_format": (lambda r: r.update(format="mine"), "its format is 'mine', allowed: 'evojax"),
    "no_network": (lambda r: r.pop("network"), "it has no 'network'"),
    "network_number": (lambda r: r.update(network=3), "network must be NetworkConfig, got 3"),
    "unknown_setting": (lambda r: r["network"].update(size=3), "there is no setting 'size'"),
    "text_width": (lambda r: r["network"].update(width="4"), "width must be int, got '4'"),
    "half_epoch": (
        lambda r: r["training"].update(num_epochs=0.5),
        "num_epochs must be int, got 0.5",
    ),
    "no_epochs": (lambda r: r["training"].update(num_epochs=-1), "num_epochs must be >= 0, got -1"),
    "optimizer": (
        lambda r: r["training"].update(optimizer="x"),
        "optimizer must be one of adam, sgd, got 'x'",
    ),
    "dtype": (lambda r: r["network"].update(compute_dtype="int9"), "got 'int9'"),
    "siamese": (lambda r: r["training"].update(siamese=["turn"]), "got 'turn'"),
    "two_means": (lambda r: r.update(mean=[0, 1]), "mean is [0.0, 1.0], allowed: 1 numbers"),
    "no_deviation": (lambda r: r.update(std=[0.0]), "std is [0.0], allowed: numbers above 0"),
    "nameless": (lambda r: r.update(class_names=[*range(10)]), "class_names must be"),
    "number": (lambda r: r.update(dataset=3), "dataset must be str, got 3"),
    "seed": (lambda r: r.update(seed=None), "seed must be int, got None"),
}


def wrong_distilled(folder: Path) -> dict[str, str]:
    """Files that are no distilled dataset, and what is said of each."""
    distilled_set().save(folder / "good.npz")
    with np.load(folder / "good.npz") as file:
        good = {name: file[name] for name in file.files}
    said = {}

    def put(name: str, says: str, **change: Any) -> None:
        np.savez(folder / f"{name}.npz", **(good | change))
        said[name] = says

    for name, (change, says) in WRONG_RECIPES.items():
        recipe = json.loads(str(good["recipe"]))
        change(recipe)
        put(name, says, recipe=np.array(json.dumps(recipe)))
    put("json", "Expecting", recipe=np.array("{"))
    put("nested", "recursion", recipe=np.array("[" * 10**5))
    put("numbers", "its recipe has type int64", recipe=np.arange(3))
    put("labels", "disagree", labels=good["labels"][:9])
    put("nan_images", "images hold NaN or infinite", images=good["images"] * np.nan)
    put("nan_labels", "labels hold NaN or infinite", labels=good["labels"] + np.inf)
    put("integers", "type int64, allowed: floats", images=good["images"].astype(int))
    put("none", "allowed: floats", images=good["images"][:0], labels=good["labels"][:0])
    put("objects", "not a readable .npz", images=np.array([None]))
    np.savez(folder / "no_images.npz", labels=good["labels"])
    np.savez(folder / "plain.npz", images=good["images"], labels=good["labels"])
    whole = (folder / "good.npz").read_bytes()
    (folder / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "garbage.npz").write_bytes(b"x" * 99)
    (folder / "empty.npz").write_bytes(b"")
    return said | {
        "no_images": "it has no 'images'",
        "plain": "it has no recipe; a plain file of arrays needs --dataset",
        "torn": "not a readable .npz",
        "garbage": "not a readable .npz",
        "empty": "not a readable .npz",
        "absent": "no such file",
    }


SUMMARY = {"system": "devs", "seed": 0, "dataset": "digits", "seconds": 1.0, "results": []}
SETTINGS = {"seed": 0, "dataset": "digits"}
FINISHED: dict[str, tuple[Any, Any, bytes | None]] = {
    "one": (SUMMARY, SETTINGS, None),
    "two": (SUMMARY | {"seed": 1}, SETTINGS, None),
    "same": (SUMMARY, SETTINGS, None),
    "begun": (None, SETTINGS, None),
    "unset": (SUMMARY, None, None),
    "torn": (b'{"system"', SETTINGS, None),
    "list": ([1], SETTINGS, None),
    "foreign": ({"system": "other"}, SETTINGS, None),
    "latin": (b"\xff", SETTINGS, None),
    "seedless": ({"system": "devs"}, SETTINGS, None),
    "text_seed": (SUMMARY | {"seed": "x"}, SETTINGS, None),
    "list_settings": (SUMMARY | {"seed": 2}, [1], None),
    "metrics": (SUMMARY | {"seed": 3}, SETTINGS, b"\xff\xfe\n"),
    "rows": (SUMMARY | {"seed": 4, "results": [{}]}, SETTINGS, None),
}


def finished_runs(folder: Path) -> None:
    for name, contents in FINISHED.items():
        for file, content in zip(("summary.json", "config.json", "metrics.jsonl"), contents,
                                 strict=True):  # fmt: skip
            (folder / name).mkdir(parents=True, exist_ok=True)
            if content is not None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                (folder / name / file).write_bytes(data)


CONFIGS = {
    "unknown": "widht: 3",
    "list": "- 1",
    "empty": "",
    "yaml": "a: [",
    "binary": "\0",
    "negative": "seed: -1",
    "text": "population_size: many",
    "half": "population_size: 4.5",
    "nan": "config: {training: {learning_rate: .nan}}",
    "code": "!!python/object/apply:os.system [true]",
    "endless": "a: &a {b: *a}",
    "deep": "[" * 3000,
    "folder": "runs_dir: null",
    "number": "seed: !!int x",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """Folders of wrong files: sets, parents, distilled, runs, configs."""
    folder = tmp_path_factory.mktemp("wrong")
    found = SimpleNamespace(
        **{name: folder / name for name in ("sets", "parents", "distilled", "runs", "configs")}
    )
    for place in vars(found).values():
        place.mkdir()
    wrong_sets(found.sets)
    for name, (content, _) in WRONG_PARENTS.items():
        path = found.parents / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".npz":
            np.savez(path, **content)
        else:
            safetensors.numpy.save_file(content, path)
    found.said_of_distilled = wrong_distilled(found.distilled)
    finished_runs(found.runs)
    for name, text in CONFIGS.items():
        (found.configs / f"{name}.yaml").write_text(text)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, in which a refused command leaves nothing; what would compute fails."""

    def began(*arguments, **more):
        raise AssertionError("it began")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVOJAX_SUITE_DATA", raising=False)
    monkeypatch.setattr("evojax_suite.runtime.loop.run", began)
    monkeypatch.setattr("evojax_suite.distilled.accuracies_on", began)
    return tmp_path


def in_code(said: str) -> str:
    """A line with the names of options as those of settings."""
    return re.sub(r"--([a-z][\w.-]*\w)", lambda m: m[1].rpartition(".")[2].replace("-", "_"), said)


@pytest.fixture
def refused(place, files, capsys) -> Callable[..., None]:
    """Checks that a command line is refused in one line that says some things, and leaves
    nothing."""

    def check(line: str, *says: str) -> None:
        texts = {name: str(path) for name, path in vars(files).items() if isinstance(path, Path)}
        arguments = [word.format(**texts, place=place) for word in shlex.split(line)]
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert said[0].startswith("evojax-suite: error: ")
        for part in says:
            text = part.format(**texts)
            assert text in said[0] or text in in_code(said[0])
        assert [*place.rglob("*")] == []

    return check


SMALL = "--network ConvNet --width 4 --depth 1"

COMMANDS = [
    case("distil", "distil", "ga-distillation"),
    case("ga-distillation digits", "digits"),
    *(
        case(f"{command} {options}", *says)
        for command in RUNS
        for options, says in (
            ("--seed -1", ("seed must be in 0..4294967295, got -1",)),
            ("--seed one", ("--seed", "'one'")),
            ("--no-such-option 3", ("--no-such-option",)),
            ("--checkpoint-seconds -1", ("checkpoint_seconds must be >= 0, got -1.0",)),
            ("--devices 0", ("devices must be >= 1 or one of auto, all, got 0",)),
            ("--log-format xml", ("xml", "text", "json")),
            ("--dataset fashon_mnist", ("'fashon_mnist'", "did you mean fashion_mnist?")),
            ("--dataset ''", ("unknown dataset ''",)),
            ("--dataset ~nobody-here/x", ("~nobody-here/x",)),
            ("--dataset mnist --data-dir {sets}/none", ("{sets}/none: no such folder",)),
            ("--dataset mnist --data-dir {sets}/good.npz", ("good.npz: no such folder",)),
            ("--dataset digits --runs-dir {sets}/good.npz", ("{sets}/good.npz",)),
            ("--config {configs}/none.yaml", ("none.yaml",)),
            ("--config {configs}", ("{configs}",)),
            ("--coordinator host:1", ("coordinator needs --distributed, got host:1",)),
            ("--seeds 3:1", ("0:10", "got 3:1")),
        )
    ),
    case("ga-distillation --seed 9223372036854775808", "seed", "9223372036854775808"),
    case("de-nas --seed 4294967296", "seed", "4294967296"),
    case("ecomp --dataset digits --parent-seed 18446744073709551616", "parent_seed"),
    case("evaluate {distilled}/good.npz --seed 4294967296", "seed", "4294967296"),
    case("cest --checkpoint-seconds nan", "checkpoint_seconds", "nan"),
    case("ga-distillation --name ..", "name", "'..'"),
    case("ga-distillation --config= --seed 1", "config"),
    case("ga-distillation --config ~nobody-here/x", "nobody-here"),
    case("ga-distillation --population-size 1", "population_size must be >= 2, got 1"),
    case("ga-distillation --images-per-class 999", "images_per_class is 999", "has only"),
    case("ga-distillation --survival-ratio nan", "survival_ratio must be in (0, 1), got nan"),
    case("ga-distillation --crossover-rate 1.5", "crossover_rate", "1.5"),
    case("ga-distillation --crossover-rate nan", "crossover_rate", "nan"),
    case("ga-distillation --laplace-scale 0", "laplace_scale", "0.0"),
    case("ga-distillation --laplace-location inf", "laplace_location", "inf"),
    case("ga-distillation --mutation-scale -1", "mutation_scale", "-1.0"),
    case("ga-distillation --strategy-std nan", "strategy_std must be > 0, got nan"),
    case("ga-distillation --levels 1", "levels must be in 2..256, got 1"),
    case("ga-distillation --strategy Adem", "'Adem'", "LaplaceGA"),
    case("ga-distillation --num-networks 0", "num_networks must be >= 1, got 0"),
    case("ga-distillation --strong-random-repeats -1", "strong_random_repeats must be >= 0"),
    case("ga-distillation --generations 1e3", "--generations", "'1e3'"),
    case("ga-distillation --width 0", "width must be >= 1, got 0"),
    case("ga-distillation --dropout 1", "dropout must be in [0, 1), got 1.0"),
    case("ga-distillation --network nowhere:Net", "'nowhere:Net' cannot be imported"),
    case("ga-distillation --network os:path", "'os:path'"),
    case("ga-distillation --learning-rate nan", "learning_rate must be > 0, got nan"),
    case("ga-distillation --learning-rate inf", "learning_rate", "inf"),
    case("ga-distillation --mixup-alpha inf", "mixup_alpha", "inf"),
    case("ga-distillation --momentum 1", "momentum must be in [0, 1), got 1.0"),
    case("ga-distillation --batch-size 0", "batch_size must be >= 1, got 0"),
    case("ga-distillation --siamese turn", "siamese must name some of color", "'turn'"),
    case("ga-distillation --dataset {sets}/good.npz --fitness-subset-size 99",
         "fitness_subset_size must be <= 6 on good, got 99"),
    case("devs --target-sizes", "target_sizes must name at least one, got ()"),
    case("devs --target-sizes 10 100", "target_sizes must fall, got 100 after 10"),
    case("devs --target-sizes 0", "target_sizes must be >= 1, got 0"),
    case("devs --dataset {sets}/good.npz", "target_sizes must be below", "32, got 500"),
    case("devs --reduction-factor nan", "reduction_factor must be > 1, got nan"),
    case("devs --num-images 99999", "num_images 99999", "1438 training images"),
    case("devs --label-weight inf", "label_weight", "inf"),
    case("coreset --network LeNet --initialization pytorch --dropout 0", "got LeNet"),
    case("devs --num-networks -1", "num_networks must be >= 0, got -1"),
    case("coreset --method", "method must name at least one of random, herding"),
    case("coreset --method best", "best", "herding"),
    case("coreset --num-samples 0", "num_samples must be in 1..1437, got 0"),
    case("coreset --dataset {sets}/good.npz", "num_samples must be in 1..31, got 500"),
    case("coreset --method gradient_matching --num-samples 15", "10 classes, got num_samples 15"),
    case("coreset --method kernel_inducing_points --num-samples 15", "classes, got num_samples 15"),
    case("ga-distillation --columns some", "some", "own", "all"),
    case("coreset --method kernel_inducing_points --kip.network.depth 9", "use a smaller depth"),
    case("coreset --kernel-iterations 0", "kernel_iterations must be >= 1, got 0"),
    case("coreset --kip.learning-rate 0", "learning_rate must be > 0, got 0"),
    case("coreset --probe-epochs 0", "probe_epochs must be >= 1, got 0"),
    case("coreset --labels soft", "soft", "hard", "teacher"),
    case("coreset --labels teacher --label-temperature nan", "label_temperature", "> 0, got nan"),
    case("devs --labels teacher --label-temperature inf", "label_temperature", "> 0, got inf"),
    case("devs --labels teacher --teacher-epochs 0", "teacher_epochs must be >= 1, got 0"),
    case("devs --labels hard", "hard", "own"),
    case("coreset --num-images 0", "num_images 0"),
    case("cest --fraction 0", "fraction must be in (0, 1], got 0.0"),
    case("cest --prey-population 3", "prey_population must be even and >= 2, got 3"),
    case("cest --crossover-rate nan", "crossover_rate must be in [0, 1], got nan"),
    case("cest --temperature -1", "temperature must be >= 0, got -1.0"),
    case("cest --selection infobatch --initial-epochs 0", "infobatch needs initial_epochs >= 1"),
    case("cest --selection craig --pass-fraction 0.5", "need pass_fraction 1"),
    case("cest --num-images 0", "num_images must be in 1..1077, got 0"),
    case(f"cest --dataset {{sets}}/good.npz {SMALL} --depth 9", "does not fit images of (8, 8, 1)"),
    case("ecomp --dataset digits --parent {parents}", "no file", "{parents}"),
    case("ecomp --dataset digits --parent {parents}/none.npz", "no file", "none.npz"),
    case("ecomp --dataset digits --perplexity nan", "perplexity must be finite, got nan"),
    case("ecomp --dataset digits --batch-size 3", "batch_size must be >= 4, got 3"),
    case("ecomp --dataset digits --num-images 150", "multiple of batch_size 100, got 150"),
    case("ecomp --dataset digits --most-compression 2", "most_compression 2.0"),
    case("ecomp --dataset digits --accuracy-weight nan", "accuracy_weight", "nan"),
    case("ecomp --dataset digits --similarity-weight inf", "similarity_weight"),
    case("ecomp --dataset digits --parent-units 0", "parent_units must be >= 1, got 0"),
    case("ecomp --dataset {sets}/good.npz", "batch_size 100"),
    case("de-nas --kernels 2", "kernels must be odd and >= 1, got 2"),
    case("de-nas --rungs 5 2", "rungs must rise within 1..9", "got (5, 2)"),
    case("de-nas --num-images 0", "num_images"),
    case("de-nas --num-validation-images 361", "num_validation_images must be in 1..360, got 361"),
    case("de-nas --finalists 0", "finalists must be >= 1, got 0"),
    case("de-nas --size-weight -1", "size_weight must be >= 0, got -1.0"),
    case("de-nas --max-features 9", "max_features must be >= ", "got 9"),
    case("de-nas --workers 0", "workers must be >= 1, got 0"),
    case("evaluate", "PATH"),
    case("evaluate {distilled}", "not a distilled dataset: a folder, in which is ", "good.npz"),
    case("evaluate {distilled}/good.npz --num-networks 0", "num_networks must be >= 1, got 0"),
    case("evaluate {distilled}/good.npz --num-epochs 0", "num_epochs must be >= 1, got 0"),
    case("evaluate {distilled}/good.npz --network VGG11", "VGG11 does not fit images of (8, 8, 1)"),
    case("evaluate {distilled}/good.npz --network VGG99", "VGG99", "VGG11"),
    case("evaluate {distilled}/good.npz --dataset {sets}/good.npz", "10 classes, good has"),
    case("evaluate {distilled}/good.npz --dataset {sets}/nan.npz", "nan.npz", "contain NaN"),
    case("evaluate {distilled}/plain.npz --dataset {sets}/good.npz", "do not fit 2 classes"),
    case("evaluate {distilled}/good.npz --protocol best", "best", "literature"),
    case(
        "evaluate {distilled}/good.npz --full-accuracy 1",
        "--full-accuracy needs --robust-scores",
    ),
    case("evaluate {distilled}/good.npz --robust-scores --full-accuracy 99", "in [0, 1], got 99.0"),
    case("evaluate {distilled}/good.npz --output {place}/no/where.json", "no/where.json"),
    case("evaluate {distilled}/good.npz --output {distilled}", "{distilled}"),
    case("compare", "runs must be two folders or more, got 0"),
    case("compare {runs}/one", "runs must be two folders or more, got 1"),
    case("compare {runs}/one {runs}/one", "{runs}/one is given twice"),
    case("compare {runs}/one {runs}/none", "{runs}/none", "summary.json is missing"),
    case("compare {runs}/one {runs}/begun", "{runs}/begun", "summary.json is missing"),
    case("compare {runs}/one {runs}/unset", "{runs}/unset", "config.json is missing"),
    case("compare {runs}/one {runs}/torn", "{runs}/torn holds no run"),
    case("compare {runs}/one {runs}/latin", "{runs}/latin holds no run"),
    case("compare {runs}/one {runs}/list", "{runs}/list", "ga_distillation"),
    case("compare {runs}/one {runs}/foreign", "{runs}/foreign", "ga_distillation"),
    case("compare {runs}/one {runs}/same", "same settings and seed 0"),
    case("compare {runs}/one {runs}/seedless", "{runs}/seedless", "seed"),
    case("compare {runs}/one {runs}/text_seed", "{runs}/text_seed"),
    case("compare {runs}/one {runs}/list_settings", "{runs}/list_settings"),
    case("compare {runs}/one {runs}/metrics", "{runs}/metrics"),
    case("compare {runs}/one {runs}/rows", "{runs}/rows"),
    case("compare {runs}/one {runs}/two --output {sets}/good.npz", "{sets}/good.npz"),
    case("export", "PATH"),
    case("export {distilled}/good.npz", "PATH"),
    case("export {distilled}/good.npz {parents}/torn.safetensors", "exists already"),
    case("export {distilled}/good.npz {sets}/good.npz/x.safetensors", "{sets}/good.npz"),
    case("export {distilled}/good.npz {sets} --format image_folder", "not an empty folder"),
    case("export {distilled}/good.npz new.png", "new.png ends in .png", ".safetensors"),
    case("export {distilled}/good.npz new", "new has no ending", ".safetensors"),
    case("ga-distillation --survival-ratio 5", "error: --survival-ratio must be in (0, 1), got 5"),
    case("cest --fraction 2", "error: --fraction must be in (0, 1], got 2.0", "cest --help"),
    case("coreset --kip.learning-rate 0", "error: --kip.learning-rate must be > 0"),
    case("cest --dataset mnist --data-dir {place}/none", "none: no such folder", "--data-dir"),
    case("ga-distillation --strategy snes", "'snes' (did you mean SNES?)"),
    case("ga-distillation --network convnet", "'convnet' (did you mean ConvNet?)"),
    case(
        "ga-distillation --recipe Recommended",
        "--recipe must be one of paper, recommended",
        "(did you mean recommended?)",
    ),
    case("ecomp --largest 3", "no option --largest (did you mean --search.largest?)"),
    case("ga-distillation --poplation-size=3", "(did you mean --population-size?)"),
    case("GA_distilation", "'GA_distilation' (did you mean ga-distillation?)"),
    case("de-nas --finalists two", "--finalists takes no value like 'two'", "de-nas --help"),
    case("ga-distillation --seeds 0:1000000000", "at most 10,000 numbers, got 0:1000000000"),
    case("ga-distillation --devices 500", "error: --devices must be in 1..", "got 500"),
    case("cest --coordinator me:1", "error: --coordinator needs --distributed, got me:1"),
    case("cest --config {place}", "--config cannot read ", "/config.json: No such file"),
    case("ga-distillation --shard 0/2", "--shard needs --seeds, got 0/2"),
    case("ga-distillation --seeds 0:4 --shard 4/4", "--shard must be such as 0/4", "got 4/4"),
    case("ga-distillation --seeds 0:4 --shard 1", "--shard must be such as 0/4", "got 1"),
    case("ga-distillation --seed-processes 2", "--seed-processes needs --seeds, got 2"),
    case("ga-distillation --seeds 0:4 --seed-processes 500", "the cores here, got 500"),
    case("ga-distillation --seeds 0:4 --seed-processes 2 --dry-run", "one of --seed-processes and"),
    case("ga-distillation --name none --resume", "is no run to go on with"),
    case("ga-distillation --resume --restart", "one of resume and restart"),
    case("export {distilled}/good.npz new --format tiff", "tiff", "safetensors"),
    case("doctor now", "now"),
    case("doctor --data-dir", "--data-dir"),
    case("doctor --no-such-option", "--no-such-option"),
    case("ga-distillation --config {configs}/unknown.yaml", "'widht' (did you mean width?)"),
    case("ga-distillation --config {configs}/list.yaml", "list.yaml must hold options", "['1']"),
    case("ga-distillation --config {configs}/empty.yaml", "empty.yaml must hold", "None"),
    case("ga-distillation --config {configs}/yaml.yaml", "yaml.yaml is neither YAML nor JSON"),
    case("ga-distillation --config {configs}/binary.yaml", "binary.yaml is neither YAML nor JSON"),
    case("ga-distillation --config {configs}/code.yaml", "code.yaml is neither YAML nor JSON"),
    case("ga-distillation --config {configs}/negative.yaml", "seed must be in 0..", "got -1"),
    case("ga-distillation --config {configs}/text.yaml", "population-size", "'many'"),
    case("ga-distillation --config {configs}/half.yaml", "population-size", "'4.5'"),
    case("ga-distillation --config {configs}/nan.yaml", "learning_rate must be > 0, got nan"),
    case("ga-distillation --config {configs}/endless.yaml", "endless.yaml"),
    case("ga-distillation --config {configs}/deep.yaml", "deep.yaml"),
    case("ga-distillation --config {configs}/folder.yaml", "runs_dir"),
    case("ga-distillation --config {configs}/number.yaml", "number.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), COMMANDS)
def test_a_wrong_option_is_one_line(refused, line, says):
    refused(line, *says)


@pytest.mark.parametrize("name", WRONG_SETS)
def test_a_wrong_set_is_one_line(files, name, place):
    with pytest.raises((ValueError, OSError)) as error:
        load(files.sets / name)
    said = str(error.value)
    assert "\n" not in said
    assert str(files.sets / name) in said
    for part in WRONG_SETS[name]:
        assert part in said


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize(
    "name", ["nan.npz", "real_labels.npz", "one_class.npz", "empty_class.npz", "torn.npz",
             "torn.tar", "idx_cut", "cifar_call", "tree_empty_class", "tree_torn", "tree_torn_tiff",
             "none/at/all"],
)  # fmt: skip
def test_no_command_begins_with_a_wrong_set(refused, command, name):
    refused(f"{command} --dataset {{sets}}/{name}", f"{{sets}}/{name}", *WRONG_SETS[name])


@pytest.mark.parametrize("name", WRONG_PARENTS)
def test_a_wrong_parent_is_one_line(refused, files, name):
    says = WRONG_PARENTS[name][1]
    with pytest.raises((ValueError, OSError)) as error:
        feed_forward.load(files.parents / name, (8, 8, 1), 2)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(str(files.parents / name))
    for part in says:
        assert part in said
    options = f"--dataset {{sets}}/good.npz --parent {{parents}}/{name} --batch-size 4"
    refused(f"ecomp {options} --perplexity 2", f"{{parents}}/{name}", *says)


@pytest.mark.parametrize(
    "name",
    [*WRONG_RECIPES, "json", "nested", "numbers", "labels", "nan_images", "nan_labels", "integers",
     "none", "objects", "no_images", "plain", "torn", "garbage", "empty", "absent"],
)  # fmt: skip
def test_what_is_no_distilled_set_is_one_line(refused, files, name):
    path, says = files.distilled / f"{name}.npz", files.said_of_distilled[name]
    with pytest.raises((ValueError, OSError)) as error:
        DistilledDataset.load(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)
    refused(f"evaluate {{distilled}}/{name}.npz", f"{{distilled}}/{name}.npz")
    refused(f"export {{distilled}}/{name}.npz new.safetensors", f"{{distilled}}/{name}.npz")


PLAIN = {"images": PIXELS[:2, ..., None], "labels": np.array([0, 1])}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": np.array([0, 2])}, "labels must be in 0..1"),
        ({"labels": np.array([0.0, 1.0])}, "labels (2,) do not fit 2 classes"),
        ({"labels": np.array([[1, 0]])}, "labels (1, 2) do not fit"),
        ({"labels": np.full((2, 2), np.nan)}, "labels hold NaN"),
        ({"labels": np.array([["a", "b"]] * 2)}, "labels are (2, 2) of type <U1"),
        ({"images": PIXELS[:2, ..., None].astype(int)}, "type int64, allowed: floats"),
        ({"images": np.full((2, 8, 8, 1), np.nan)}, "images hold NaN"),
        ({"images": np.full((2, 8, 8, 1), 1e300)}, "images hold NaN or infinite"),
        ({"images": PIXELS[:2]}, "images are (2, 8, 8), allowed"),
        ({"images": PIXELS[:0, ..., None], "labels": LABELS[:0]}, "allowed: floats"),
    ],
)
def test_a_wrong_set_of_ones_own_is_one_line(files, tmp_path, change, says):
    dataset = load(files.sets / "good.npz")
    np.savez(tmp_path / "plain.npz", **(PLAIN | change))
    with pytest.raises(ValueError, match="not a distilled dataset") as error:
        DistilledDataset.load(tmp_path / "plain.npz", dataset)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_set_of_ones_own_may_have_one_hot_integers(files, tmp_path):
    np.savez(tmp_path / "plain.npz", **(PLAIN | {"labels": np.eye(2, dtype=int)}))
    found = DistilledDataset.load(tmp_path / "plain.npz", load(files.sets / "good.npz"))
    assert found.labels.tolist() == [[1, 0], [0, 1]]


def test_an_accuracy_that_failed_comes_back_as_nan(tmp_path):
    distilled_set(test_accuracies=(float("nan"), 0.5)).save(tmp_path / "a.npz")
    found = DistilledDataset.load(tmp_path / "a.npz").test_accuracies
    assert np.isnan(found[0])
    assert found[1] == 0.5


COMPRESSED = {
    "layer_sizes": [64, 5, 5, 2], "pooling": "average", "image_shape": [8, 8, 1], "mean": [0.0],
    "std": [1.0], "class_names": ["a", "b"], "dataset": "own", "lineage": {},
}  # fmt: skip
SEARCHED = {
    "units": [{"kind": "convolution", "kernel": 3, "filters": 2}], "dropout": 0.5,
    "normalization": "none", "skip": False, "compute_dtype": "float32", "image_shape": [8, 8, 1],
    "mean": [0.5], "std": [0.25], "class_names": ["a", "b"], "dataset": "own",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "change", "says"),
    [
        (compressed, b"", "Expecting value"),
        (compressed, b"\xff", "codec can't decode"),
        (compressed, b"[1]", "list"),
        (compressed, b"[" * 10**5, "recursion"),
        (compressed, {"image_shape": [8, 8]}, "image_shape must be tuple[int, int, int]"),
        (compressed, {"image_shape": [-8, -8, 1]}, "image_shape must be >= 1, got -8"),
        (compressed, {"pooling": "sum"}, "pooling must be one of average, max, none, got 'sum'"),
        (compressed, {"mean": [0, 0]}, "mean is [0.0, 0.0], allowed: 1 numbers"),
        (compressed, {"std": [0]}, "std is [0.0], allowed: numbers above 0"),
        (compressed, {"class_names": "ab"}, "class_names must be tuple[str, ...], got 'ab'"),
        (compressed, {"class_names": ["a"]}, "no chain of two or more layers"),
        (compressed, {"dataset": None}, "dataset must be str, got None"),
        (searched, b"", "Expecting value"),
        (searched, b"\xff", "codec can't decode"),
        (searched, b"[1]", "list"),
        (searched, {"units": [{"kind": "sum"}]}, "kind must be one of convolution, "),
        (searched, {"units": 3}, "units must be tuple[Unit, ...], got 3"),
        (searched, {"units": [{"kind": "convolution", "kernel": "3"}]}, "kernel must be int"),
        (searched, {"dropout": 2}, "dropout must be in [0, 1), got 2"),
        (searched, {"normalization": "sum"}, "normalization must be", ),
        (searched, {"compute_dtype": "int8"}, "compute_dtype is 'int8'"),
        (searched, {"mean": [0, 0]}, "mean is [0.0, 0.0], allowed: 1 numbers"),
        (searched, {}, "'params/Dense_2/bias' is none, needed: float32 (2,)"),
    ],
)  # fmt: skip
def test_what_describes_no_network_is_one_line(tmp_path, module, change, says):
    about = COMPRESSED if module is compressed else SEARCHED
    content = change if isinstance(change, bytes) else json.dumps(about | change).encode()
    name = "network.json" if module is compressed else "architecture.json"
    (tmp_path / name).write_bytes(content)
    arrays = {f"layers.{key}": array for key, array in PARENT.items()}
    if module is searched:
        arrays = {
            f"params/{layer}/{kind}": np.ones(shape, np.float32)
            for layer, size in (("Conv_0", (3, 3, 1, 2)), ("Dense_0", (128, 64)),
                                ("Dense_1", (64, 32)))
            for kind, shape in (("kernel", size), ("bias", size[-1:]))
        }  # fmt: skip
    safetensors.numpy.save_file(arrays, tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}/") as error:
        module.load(tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", [compressed, searched])
def test_a_network_that_is_not_there(tmp_path, module):
    with pytest.raises(OSError, match=str(tmp_path / "none")):
        module.load(tmp_path / "none")


TINY_GA = ga_distillation.Config(population_size=4, network=NetworkConfig(width=4, depth=1))
TINY_CEST = cest.Config(network=NetworkConfig(width=4, depth=1))


def function(name: str, call: Callable[[], Any], *says: str) -> Any:
    return pytest.param(call, says, id=name)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        function("load nothing", lambda: load(""), "unknown dataset ''"),
        function("load None", lambda: load(None), "unknown dataset 'None'"),
        function("load a number", lambda: load(3), "unknown dataset '3'"),
        function("load a NUL", lambda: load("a\0b"), r"a\x00b"),
        function("load in a number", lambda: load("mnist", 3), "3 is no path"),
        function("width", lambda: NetworkConfig(width=0), "width must be >= 1, got 0"),
        function("dropout", lambda: NetworkConfig(dropout=np.nan), "[0, 1), got nan"),
        function("network", lambda: NetworkConfig(network="VGG99"), "ConvNet", "'VGG99'"),
        function("epochs", lambda: TrainingConfig(num_epochs=-1), "num_epochs must be >= 0"),
        function("rate", lambda: TrainingConfig(learning_rate=0), "learning_rate must be > 0"),
        function("siamese", lambda: TrainingConfig(siamese=("turn",)), "'turn'"),
        function("engine", lambda: EngineConfig(members_in_flight=0), "members_in_flight must"),
        function("population", lambda: ga_distillation.Config(population_size=1), "got 1"),
        function("holdout", lambda: ga_distillation.Config(holdout_ratio=np.nan), "[0, 1)"),
        function("sizes", lambda: devs.Config(target_sizes=(5, 5)), "must fall, got 5 after 5"),
        function(
            "no sizes", lambda: devs.Config(target_sizes=()), "target_sizes must name at least one"
        ),
        function("fraction", lambda: cest.Config(fraction=2), "(0, 1], got 2"),
        function("rate of cest", lambda: cest.Params(mutation_rate=-1).check(), "got -1"),
        function("odd", lambda: ecomp.Config(population_size=3), "even and >= 2, got 3"),
        function("known", lambda: de_nas.Config(num_known=99), "num_known must be <= "),
        function("weight", lambda: de_nas.Params(error_weight=np.nan).check(), "got nan"),
        function(
            "small images", lambda: ga_distillation.build(TINY_GA, 10, (1, 1, 1)), "(1, 1, 1)"
        ),
        function("too few pixels", lambda: de_nas.build(de_nas.Config(), 10, (2, 2, 1)), "4x4"),
        function("width text", lambda: NetworkConfig(width="4"), "width"),
        function("half a width", lambda: NetworkConfig(width=1.5), "width"),
        function("pooling", lambda: NetworkConfig(pooling="x"), "pooling"),
        function(
            "compute_dtype",
            lambda: networks.create(NetworkConfig(width=4, compute_dtype="float64"), 2, (8, 8, 1)),
            "compute_dtype",
        ),
        function("optimizer", lambda: TrainingConfig(optimizer="x"), "optimizer"),
        function("schedule", lambda: TrainingConfig(schedule="x"), "schedule"),
        function("clip", lambda: ga_distillation.Config(clip="x"), "clip"),
        function("average", lambda: devs.Config(average="x"), "average"),
        function("selection", lambda: cest.Config(selection="x"), "selection"),
        function("similarity", lambda: ecomp.Config(similarity="x"), "similarity"),
        function("method", lambda: de_nas.Config(method="x"), "method"),
        function("no classes", lambda: cest.build(TINY_CEST, 0, (8, 8, 1)), "0"),
        function("no channels", lambda: cest.build(TINY_CEST, 2, (8, 8, 0)), "0"),
        function(
            "classes of a search",
            lambda: de_nas.build(de_nas.Config(), 0, (8, 8, 1)),
            "0",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(place, call, says):
    with pytest.raises((ValueError, OSError)) as error:
        call()
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": np.zeros((10, 8, 8, 2), np.float32), "mean": (0, 0), "std": (1, 1)}, "have 2"),
        ({"class_names": ("a/b", *"123456789")}, "class 'a/b' cannot be the name of a folder"),
        ({"class_names": ("..", *"123456789")}, "class '..' cannot be"),
        ({"class_names": ("", *"123456789")}, "class '' cannot be"),
    ],
)
def test_what_is_no_image_folder_is_one_line(tmp_path, change, says):
    with pytest.raises(ValueError, match=r"PNG has|cannot be the name") as error:
        exports.save_image_folder(tmp_path / "new", distilled_set(**change))
    assert says in str(error.value)
    assert not (tmp_path / "new").exists()


def test_an_export_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        exports.save_safetensors(tmp_path / "none/a.safetensors", distilled_set())


def test_images_of_two_channels_are_drawn(files, tmp_path):
    np.savez(tmp_path / "two.npz", train_images=np.stack([PIXELS, PIXELS], -1), train_labels=LABELS)
    dataset = load(tmp_path / "two.npz")
    images = np.zeros((2, 8, 8, 2), np.float32)
    plotting.image_rows(tmp_path / "images.png", dataset, images, np.eye(2))


def test_names_with_dollars_are_drawn(files, tmp_path):
    names = (r"$\mouth$", r"$\mouse$")
    dataset = dataclasses.replace(load(files.sets / "good.npz"), class_names=names)
    images = np.zeros((2, 8, 8, 1), np.float32)
    plotting.image_rows(tmp_path / "rows.png", dataset, images, np.eye(2))
    plotting.soft_label_images(tmp_path / "labels.png", dataset, images, np.eye(2))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"{", "config.json"),
        pytest.param(b"\xff", "config.json"),
        pytest.param(b"[1]", "config.json"),
        pytest.param(b"{}", "was started with other"),
        (b'{"seed": 3, "num_generations": 1}', "was started with other options"),
        (None, "exists and is not a run"),
    ],
)
def test_a_run_that_cannot_go_on_is_one_line(place, capsys, content, says):
    run = place / "runs/run"
    run.mkdir(parents=True)
    (run / "config.json" if content is not None else run / "thesis.tex").write_bytes(content or b"")
    before = [*place.rglob("*")]
    assert main(["ga-distillation", "--name", "run", "--resume"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]
    assert [*place.rglob("*")] == before


MAIN = f"""
import contextlib, io, json, os, sys
from evojax_suite import distilled, load
from evojax_suite.cli.main import _commands, main
from evojax_suite.runtime import loop
_commands()
load("digits")  # what is imported late may lie where the other user cannot go
"".encode("cp437"), "".encode("utf-32-le")
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({ORDINARY})
    os.setuid({ORDINARY})
def began(*arguments, **more):
    raise AssertionError("it began")
loop.run = distilled.accuracies_on = began
found = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = main(arguments)
            except BaseException as error:
                code = repr(error)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""
ORDINARY_CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "npz": ("cest --dataset {place}/set.npz", ("set.npz", "Permission denied")),
    "tar": ("cest --dataset {place}/set.tar", ("set.tar", "Permission denied")),
    "IDX": ("cest --dataset {place}/idx", (FIRST, "Permission denied")),
    "class folder": ("cest --dataset {place}/tree", ("train/ant", "Permission denied")),
    "image": ("cest --dataset {place}/image", ("train/ant/0.png", "Permission denied")),
    "data folder": ("cest --dataset mnist --data-dir {place}/closed", ("closed", "Permission")),
    "config": ("cest --config {place}/config.yaml", ("config.yaml", "Permission denied")),
    "parent": ("ecomp --dataset digits --parent {place}/set.npz", ("set.npz", "Permission")),
    "evaluate": ("evaluate {place}/set.npz", ("set.npz", "Permission denied")),
    "export": ("export {place}/set.npz {place}/new.safetensors", ("set.npz", "Permission denied")),
    "compare": ("compare {runs}/one {place}/closed", ("closed", "Permission denied")),
    "write export": (
        "export {distilled}/good.npz {place}/sealed/a.safetensors",
        ("sealed", "Permission"),
    ),
    "write images": (
        "export {distilled}/good.npz {place}/sealed/new --format image_folder",
        ("sealed", "Permission denied"),
    ),
    "write compare": ("compare {runs}/one {runs}/two --output {place}/sealed/new", ("sealed",)),
    "write evaluate": ("evaluate {distilled}/good.npz --output {place}/sealed/a.json", ("sealed",)),
    **{
        f"write {command}": (
            f"{command} --dataset digits --runs-dir {{place}}/sealed",
            ("sealed", "Permission denied"),
        )
        for command in RUNS
    },
}


@pytest.fixture(scope="module")
def as_ordinary_user(files) -> Iterator[dict[str, list]]:
    """What an ordinary user meets in each of ORDINARY_CASES: exit code, output, errors."""
    place = Path(tempfile.mkdtemp(prefix="ordinary-"))
    closed = [
        place / name
        for name in ("set.npz", "set.tar", f"idx/{FIRST}", "config.yaml", "tree/train/ant",
                     "image/train/ant/0.png", "closed")
    ]  # fmt: skip
    try:
        np.savez(place / "set.npz", train_images=PIXELS, train_labels=LABELS)
        (place / "set.tar").write_bytes(tarred(TREE))
        (place / "config.yaml").write_text("seed: 1")
        for name, contents in (("idx", IDX), ("tree", TREE), ("image", TREE)):
            write_all(place / name, dict(contents))
        for name in ("closed", "sealed", "home", "files"):
            (place / name).mkdir()
        for name in ("runs", "distilled"):
            shutil.copytree(getattr(files, name), place / "files" / name)
        place.chmod(0o755)
        (place / "sealed").chmod(0o555)
        (place / "home").chmod(0o777)
        for path in closed:
            path.chmod(0)
        texts = {"place": place, **{name: place / "files" / name for name in ("runs", "distilled")}}
        lines = [
            [word.format(**texts) for word in shlex.split(line)]
            for line, _ in [*ORDINARY_CASES.values(), ("doctor --data-dir {place}/closed", ())]
        ]
        done = subprocess.run(
            [sys.executable, "-c", MAIN],
            input=json.dumps(lines),
            capture_output=True,
            text=True,
            cwd=place / "home",
            env=os.environ | {"HOME": str(place / "home"), "TMPDIR": str(place / "home"),
                              "PYTHONPATH": str(Path(__file__).parents[2]),
                              "MPLCONFIGDIR": str(place / "home"), "EVOJAX_SUITE_DATA": "",
                              "JAX_ENABLE_COMPILATION_CACHE": "false"},
        )  # fmt: skip
        if "Operation not permitted" in done.stderr:
            pytest.skip("root may not become another user here")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        left = sorted(path.name for path in (place / "sealed").iterdir())
        yield dict(zip([*ORDINARY_CASES, "doctor"], found, strict=True)) | {"left": left}
    finally:
        for path in closed:
            if path.exists():
                path.chmod(0o755)
        shutil.rmtree(place)


@pytest.mark.parametrize(
    "name",
    ORDINARY_CASES,
)
def test_what_may_not_be_read_or_written_is_one_line(as_ordinary_user, name):
    code, _, said = as_ordinary_user[name]
    assert code == 2, said
    assert len(said.strip().splitlines()) == 1
    for part in ORDINARY_CASES[name][1]:
        assert part in said
    assert as_ordinary_user["left"] == []


def test_the_doctor_tells_of_a_folder_that_may_not_be_read(as_ordinary_user):
    _, said, _ = as_ordinary_user["doctor"]
    assert "retinamnist" in said  # the last set
    assert "Permission denied" in said


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("none", "none: no such folder"),
        ("notes.txt", "notes.txt: no such folder"),
        ("", "mnist: not there"),
        pytest.param("~nobody-here", "~nobody-here: no such folder"),
    ],
)
def test_the_doctor_tells_of_a_folder_that_is_none(files, place, capsys, folder, says):
    where = folder if folder.startswith("~") else str(files.sets / folder)
    assert main(["doctor", "--data-dir", where]) == 0
    found = capsys.readouterr()
    assert found.err == ""
    assert says in found.out
    assert [*place.rglob("*")] == []


@pytest.fixture
def full(small_disk) -> Path:
    """A folder on a disk on which nothing has room."""
    with (small_disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return small_disk


@pytest.mark.parametrize(
    ("line", "names", "left"),
    [
        pytest.param("export {distilled}/good.npz {full}/new.safetensors", "new", ()),
        pytest.param(
            "export {distilled}/good.npz {full}/new --format image_folder",
            "new",
            (),
        ),
        pytest.param(
            "compare {runs}/one {runs}/two --output {full}/new",
            "comparison.json",
            ("new",),
        ),
        pytest.param(
            "ga-distillation --name run --runs-dir {full}",
            "config.json",
            (),
        ),
    ],
)
def test_a_full_disk_is_one_line(full, place, files, capsys, line, names, left):
    texts = {"full": full, "distilled": files.distilled, "runs": files.runs}
    assert main([word.format(**texts) for word in shlex.split(line)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "No space left" in said[0]
    assert {path.relative_to(full).as_posix() for path in full.rglob("*")} == {"filler", *left}
    assert names in said[0]


def test_nothing_half_written_is_left_on_a_full_disk(full):
    network = tuple(
        feed_forward.Layer(PARENT[f"{place}.weight"], PARENT[f"{place}.bias"]) for place in range(3)
    )
    for write in (
        lambda: distilled_set().save(full / "a.npz"),
        lambda: exports.save_safetensors(full / "a.safetensors", distilled_set()),
        lambda: feed_forward.save(full / "b.safetensors", network),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert [path.name for path in full.iterdir()] == ["filler"]


AT_ONCE = """
import sys, time
from pathlib import Path
from evojax_suite.runtime import results
write, seconds = results.write_json, float(sys.argv[1])
def slowly(path, value):
    time.sleep(seconds)
    write(path, value)
results.write_json = slowly
for folder in sys.argv[2:]:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        results.open_run(Path(folder), {"seed": 0}, resume="going" in folder)
    except (ValueError, OSError) as error:
        print(error, flush=True)
    else:
        print("began", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def at_once(tmp_path_factory) -> dict[str, list[str]]:
    """What two processes say that open a new run, and one to go on with, at the same time."""
    folder = tmp_path_factory.mktemp("at-once")
    (folder / "going").mkdir()
    (folder / "going/config.json").write_text('{"seed": 0}')
    names = ("new", "going")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, seconds, *(str(folder / name) for name in names)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for seconds in ("0.4", "0.8")
    ]

    def hear() -> list[str]:
        return [process.stdout.readline().strip() for process in processes if process.stdout]

    def tell() -> None:
        for process in processes:
            if process.stdin:
                process.stdin.write("\n")
                process.stdin.flush()

    found = {}
    for name in names:
        assert hear() == ["ready", "ready"]
        tell()
        found[name] = hear()
        tell()
    for process in processes:
        process.communicate(timeout=60)
    return found


@pytest.mark.parametrize("name", ["new", "going"])
def test_of_two_that_open_a_run_at_once_one_is_refused(at_once, name):
    assert at_once[name].count("began") == 1


def test_text_of_every_alphabet_in_names_and_paths(tmp_path, capsys, recwarn):
    place = tmp_path / "Ünï 日本 ☃ 'a'"
    classes = ("é", "日本", "ß c")
    write_all(
        place / "Sätze ☃",
        {
            f"{part}/{name}/{number}.png": encoded(PIXELS[number + 3 * index])
            for part in ("train", "val", "test")
            for index, name in enumerate(classes)
            for number in range(3)
        },
    )
    options = place / "öptions.yaml"
    options.write_text("population-size: 4\nwidth: 4\ndepth: 1\nnum_epochs: 1\nnum_networks: 2\n")
    runs, data = place / "läufe", place / "Sätze ☃"
    arguments = ["--config", str(options), "--runs-dir", str(runs), "--name", "läuft ☃"]
    arguments += ["--strong-random-repeats", "0", "--generations", "1", "--seeds", "0,1"]
    assert main(["ga-distillation", "--dataset", str(data), *arguments]) == 0
    found = [runs / f"läuft ☃-seed{seed}" for seed in range(2)]
    assert json.loads((found[0] / "summary.json").read_text())["dataset"] == "Sätze ☃"
    assert "Sätze ☃" in (found[0] / "report.html").read_text(encoding="utf-8")
    assert load(data).class_names == ("ß c", "é", "日本")
    small, output = found[0] / "distilled.npz", place / "är.json"
    assert DistilledDataset.load(small).class_names == ("ß c", "é", "日本")
    judged = ["--dataset", str(data), "--num-networks", "2", "--output", str(output)]
    assert main(["evaluate", str(small), *judged]) == 0
    assert len(json.loads(output.read_text())["test_accuracies"]["ConvNet"]) == 2
    assert main(["export", str(small), str(place / "ñ/é.safetensors")]) == 0
    assert main(["export", str(small), str(place / "ñ/é"), "--format", "image_folder"]) == 0
    assert sorted(path.name for path in (place / "ñ/é/train").iterdir()) == ["ß c", "é", "日本"]
    assert main(["compare", *map(str, found), "--output", str(place / "vergleich ☃")]) == 0
    assert "☃" in (place / "vergleich ☃/report.html").read_text(encoding="utf-8")
    assert "error" not in capsys.readouterr().err
    assert not [one.message for one in recwarn.list if one.category is UserWarning]


def test_names_that_are_no_text_become_text(tmp_path):
    raw = os.fsdecode(b"\xff")
    try:
        write_all(
            tmp_path / f"set{raw}",
            {name.replace("ant", f"ant{raw}"): data for name, data in TREE.items()},
        )
    except OSError:
        pytest.skip("the disk takes text alone")
    found = load(tmp_path / f"set{raw}")
    assert found.name == r"set\udcff"
    assert found.class_names == (r"ant\udcff", "bee")
