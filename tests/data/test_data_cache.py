"""The cache of sets that are slow to read: what it gives is what reading would give."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evojax_suite.cli.main import main
from evojax_suite.data import cache, load
from evojax_suite.types import Dataset

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pictures(names, seed: int) -> dict[str, bytes]:
    """By path. BMP files of one size have one length, whatever is in them."""
    rng = np.random.default_rng(seed)
    found = {}
    for part, count in (("train", 4), ("test", 1)):
        for name in names:
            for number in range(count):
                stream = io.BytesIO()
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(stream, "BMP")
                found[f"{part}/{name}/{number}.bmp"] = stream.getvalue()
    return found


def batches(names, seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (10, 3072), np.uint8)
    data = b"".join(bytes([label]) + row.tobytes() for label, row in enumerate(pixels))
    return {
        f"{name}.bin": data for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")
    }


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The folder of a cache that keeps every set, also one that was just written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_SLOW_SECONDS", 0.0)
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -60.0)
    return tmp_path / "cache/evojax-suite/datasets"


@pytest.fixture
def never_read(monkeypatch):
    """A function after which no file of a set is read any more."""

    def forbid() -> None:
        def fail(*arguments):
            raise AssertionError("it was read")

        for reader in ("image_tree._decode_all", "archive._walk"):
            monkeypatch.setattr(f"evojax_suite.data.{reader}", fail)

    return forbid


def assert_same(found: Dataset, expected: Dataset) -> None:
    for part in ("train", "validation", "test"):
        for kind in ("images", "labels"):
            array, other = (getattr(getattr(s, part), kind) for s in (found, expected))
            np.testing.assert_array_equal(array, other)
            assert array.dtype == other.dtype
            assert array.flags.writeable == other.flags.writeable
    for name in ("name", "class_names", "mean", "std"):
        assert getattr(found, name) == getattr(expected, name)


SOURCES = {
    "archive": ("own.tar", write_tar, pictures, ["ünï ☃", os.fsdecode(b"\xff"), "a\nb"]),
    "archive of another version": ("cifar10_small.tar", write_tar, pictures, NAMES),
    "archive of batches": ("cifar10.tar", write_tar, batches, NAMES),
    "folder": ("own", write_folder, pictures, ["ünï ☃", os.fsdecode(b"\xff"), "c"]),
    "folder of a known set": ("cifar10", write_folder, pictures, NAMES),
}


@pytest.fixture
def source(request, tmp_path) -> SimpleNamespace:
    """A set on disk: its path, and functions that write it anew and load it."""
    name, write, make, names = SOURCES[request.param]
    path = tmp_path / "sets" / name
    arguments = ("cifar10", path.parent) if name.startswith("cifar10") else (path,)
    write(path, make(names, 0))

    def write_again(seed: int) -> None:
        time.sleep(0.02)  # as long as a file system's clock may stand still
        write(path, make(names, seed))

    return SimpleNamespace(
        path=path,
        write=write_again,
        load=lambda **options: load(*arguments, **options),
    )


EVERY_SOURCE = pytest.mark.parametrize("source", SOURCES, indirect=True)
AN_ARCHIVE = pytest.mark.parametrize("source", ["archive"], indirect=True)
A_FOLDER = pytest.mark.parametrize("source", ["folder"], indirect=True)


@EVERY_SOURCE
def test_what_was_kept_is_what_reading_gives(source, kept, never_read):
    expected = source.load(cache=False)
    assert not kept.exists()
    assert_same(source.load(), expected)
    never_read()
    assert_same(source.load(), expected)
    assert len([*kept.iterdir()]) == 1
    with pytest.raises(AssertionError, match="it was read"):
        source.load(cache=False)


@AN_ARCHIVE
def test_a_path_may_be_written_in_several_ways(source, kept, never_read, monkeypatch):
    expected = source.load()
    never_read()
    monkeypatch.chdir(source.path.parent)
    assert_same(load("own.tar"), expected)
    assert_same(load("../sets/./own.tar"), expected)
    (source.path.parent / "mine").mkdir()
    (source.path.parent / "mine/own.tar").symlink_to(source.path)
    assert_same(load("mine/own.tar"), expected)


@EVERY_SOURCE
@pytest.mark.parametrize("times", ["later", "as before"])
def test_other_bytes_of_the_same_size_are_read(source, kept, times):
    files = [path for path in (source.path, *source.path.rglob("*")) if path.is_file()]
    before = {path: path.stat() for path in files}
    first = source.load()
    source.write(1)
    if times == "as before":
        for path, status in before.items():
            assert path.stat().st_size == status.st_size
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = source.load()
    assert not np.array_equal(first.test.images, second.test.images)
    assert_same(second, source.load(cache=False))
    assert_same(source.load(), second)
    assert len([*kept.iterdir()]) == 1


@A_FOLDER
@pytest.mark.parametrize("change", ["one more", "one less", "one renamed", "an empty class"])
def test_other_files_in_a_folder_are_seen(source, kept, change):
    source.load()
    first = source.path / "train/c/0.bmp"
    match change:
        case "one more":
            (source.path / "train/c/9.bmp").write_bytes(first.read_bytes())
        case "one less":
            first.unlink()
        case "one renamed":
            first.rename(first.with_name("9.bmp"))
        case "an empty class":
            (source.path / "train/d").mkdir()
            with pytest.raises(ValueError, match="class folder train/d is empty"):
                source.load()
            return
    assert_same(source.load(), source.load(cache=False))


def damaged(entry: bytes) -> dict[str, bytes]:
    """What an entry may be after a damage."""
    length = len(entry)
    about = json.loads(entry[64:].split(b"\n")[0])
    head = len(json.dumps(about)) + 65
    found = {f"cut at {place}": entry[:place] for place in (0, 1, 63, 64, 65, 200, head, head + 1)}
    found |= {f"cut by {count}": entry[:-count] for count in (1, 2, 100, 3000)}
    places = [*range(0, head, 11), *range(head, length, length // 30), length - 1]
    for place in places:
        for mask in (1, 0x80):
            flipped = entry[:place] + bytes([entry[place] ^ mask]) + entry[place + 1 :]
            found[f"{mask} flipped at {place}"] = flipped
    found["longer"] = entry + b"x"
    found["garbage"] = bytes(range(256)) * 40
    found["zeros"] = bytes(length)
    for name, parts in (
        ("too large", {"train": [[[10**15, 8, 8, 3], "|u1"], [[10**15], "<i4"]]}),
        ("negative", {"train": [[[-1, 8, 8, 3], "|u1"], [[12], "<i4"]]}),
        ("objects", {"train": [[[1], "|O"], [[1], "|O"]]}),
        ("numbers", 3),
    ):
        line = json.dumps(about | {"parts": parts}).encode() + b"\n"
        found[name] = entry[:64] + line + pickle.dumps(["refused"]) * 50
    return found


@AN_ARCHIVE
def test_a_damaged_entry_is_as_if_it_were_not_there(source, kept, never_read):
    expected = source.load()
    (entry,) = kept.iterdir()
    whole = entry.read_bytes()
    wrong = damaged(whole)
    assert len(wrong) > 100
    for name, data in wrong.items():
        entry.write_bytes(data)
        assert_same(source.load(), expected)
        assert entry.read_bytes() == whole, name
    never_read()
    assert_same(source.load(), expected)


@AN_ARCHIVE
def test_an_entry_of_another_version_is_replaced(source, kept, monkeypatch):
    source.load()
    (entry,) = kept.iterdir()
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    before = entry.read_bytes()
    source.load()
    assert [*kept.iterdir()] == [entry]
    assert entry.read_bytes() != before


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@AN_ARCHIVE
def test_a_folder_that_cannot_be_written_is_one_line(source, kept, caplog):
    expected = source.load(cache=False)
    kept.parents[1].write_text("a file")
    assert_same(source.load(), expected)
    (said,) = warnings_of(caplog)
    assert said.startswith(f"{source.path} is not kept for the next time: ")
    assert "\n" not in said


@AN_ARCHIVE
def test_a_full_disk_is_one_line_and_leaves_nothing(source, small_disk, kept, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    (small_disk / "filler").write_bytes(bytes(64 * 1024))
    expected = source.load(cache=False)
    assert_same(source.load(), expected)
    (said,) = warnings_of(caplog)
    assert "No space left on device" in said
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["filler"]


@AN_ARCHIVE
def test_a_write_that_fails_leaves_the_entry_that_was_there(source, kept, caplog, monkeypatch):
    source.load()
    (entry,) = kept.iterdir()
    before = entry.read_bytes()
    source.write(1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert_same(source.load(), source.load(cache=False))
    assert [path.read_bytes() for path in kept.iterdir()] == [before]
    assert len(warnings_of(caplog)) == 1


@AN_ARCHIVE
def test_a_user_without_a_home_folder(source, kept, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folder", lambda: Path("~/.cache/evojax-suite/datasets"))
    monkeypatch.chdir(tmp_path)
    assert_same(source.load(), source.load(cache=False))
    assert len(warnings_of(caplog)) == 1
    assert not (tmp_path / "~").exists()


@AN_ARCHIVE
@pytest.mark.parametrize(("name", "value"), [("_SLOW_SECONDS", 60.0), ("_SETTLED_SECONDS", 2.0)])
def test_what_is_quickly_read_or_was_just_written_is_not_kept(
    source, kept, caplog, monkeypatch, name, value
):
    monkeypatch.setattr(cache, name, value)
    source.load()
    assert not kept.exists()
    assert not caplog.records


@AN_ARCHIVE
def test_what_changes_while_it_is_read_is_not_kept(source, kept, monkeypatch):
    from evojax_suite.data import local

    def read_and_change(*args):
        found = read(*args)
        source.write(1)
        return found

    read = local.read_archive
    monkeypatch.setattr(local, "read_archive", read_and_change)
    source.load()
    assert not kept.exists()


@AN_ARCHIVE
def test_only_what_is_needed_stays(source, kept, tmp_path):
    source.load()
    (entry,) = kept.iterdir()
    other = tmp_path / "sets/other.tar"
    write_tar(other, pictures("ab", 2))
    load(other)
    assert len([*kept.iterdir()]) == 2
    day_before = time.time() - 2 * 24 * 3600
    for name in ("old.partial", "new.partial", "mine.txt", "empty.dataset"):
        (kept / name).touch()
    os.utime(kept / "old.partial", (day_before, day_before))
    other.unlink()
    source.write(1)
    source.load()
    assert sorted(kept.iterdir()) == sorted([entry, kept / "new.partial", kept / "mine.txt"])


PROCESS = """
import sys
from pathlib import Path

import numpy as np

from evojax_suite.data import cache, load

cache._SLOW_SECONDS, cache._SETTLED_SECONDS = 0.0, -60.0
path, other = sys.argv[1:]
expected = [load(name, cache=False) for name in (path, other)]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    for name, wanted in zip((path, other), expected):
        found = load(name)
        assert np.array_equal(found.train.images, wanted.train.images), turn
        assert np.array_equal(found.test.labels, wanted.test.labels), turn
    for entry in cache.folder().glob("*.dataset"):
        if turn % 3 == 0:
            entry.unlink(missing_ok=True)
        elif turn % 3 == 1:
            try:
                entry.write_bytes(entry.read_bytes()[:1000])
            except FileNotFoundError:
                pass
"""


@AN_ARCHIVE
def test_two_processes_at_once(source, kept, tmp_path):
    """Both read, write, delete and damage the entries of two sets all the time."""
    other = tmp_path / "sets/other.tar"
    write_tar(other, pictures("ab", 2))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(source.path), str(other)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert said == ""
    assert not [*kept.glob("*.partial")]
    assert_same(source.load(), source.load(cache=False))


@pytest.mark.parametrize("source", ["archive of batches"], indirect=True)
def test_the_option_of_a_command(source, kept, capsys):
    arguments = ["doctor", "--data-dir", str(source.path.parent)]
    assert main([*arguments, "--no-cache-data"]) == 0
    assert "cache of datasets" not in capsys.readouterr().out
    assert not kept.exists()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"folder for the cache of datasets, {kept}: ok" in said
    assert "cifar10.tar: train 50, test 10" in said
    assert len([*kept.iterdir()]) == 1
