"""Images in class folders, on disk and in tars: round trips, class order, each kind of damage."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from evojax_suite.data import DataError, load

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Files = Mapping[str, bytes | None]


def encode(pixels: np.ndarray, form: str = "png") -> bytes:
    """A file that ends so; a TIFF or WebP without loss."""
    names = {"jpg": "JPEG", "tif": "TIFF"}
    return saved(Image.fromarray(pixels), names.get(form, form.upper()), lossless=True)


def saved(image: Image.Image, form: str, **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def tree(names, train, test, form="png", test_part="test") -> dict[str, bytes]:
    """File contents by path; class k is called names[k]."""
    return {
        f"{part}/{names[label]}/{number:04}.{form}": encode(image, form)
        for part, (images, labels) in (("train", train), (test_part, test))
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    }


def write_folder(folder: Path, files: Files) -> Path:
    """Write files, and folders where the content is None."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            (folder / name).mkdir(exist_ok=True)
        else:
            (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            if data is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def below(top: str, files: Files) -> dict[str, bytes | None]:
    return {f"{top}/{name}": data for name, data in files.items()}


FORMS = {
    "folder": write_folder,
    ".tar": lambda path, files: write_tar(path.with_name(path.name + ".tar"), files),
    ".tar.gz": lambda path, files: write_tar(path.with_name(path.name + ".tar.gz"), files),
    ".tgz": lambda path, files: write_tar(path.with_name(path.name + ".tgz"), files),
    "one top folder": lambda path, files: write_tar(
        path.with_name(path.name + ".tar"), {"any": None, **below("any", files)}
    ),
    "dot paths": lambda path, files: write_tar(
        path.with_name(path.name + ".tar"), below(".", files)
    ),
}  # fmt: skip
ON_DISK_AND_IN_TAR = pytest.mark.parametrize("write", [FORMS["folder"], FORMS[".tar"]])


@pytest.fixture
def small(arrays):
    return arrays(30, 3, (6, 5)), arrays(9, 3, (6, 5), seed=1)


@pytest.mark.parametrize("image_form", ["png", "bmp", "PNG", "tif", "tiff", "TIFF"])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip(tmp_path, small, assert_holds, form, image_form):
    files = tree(["ant", "bee", "cat"], *small, image_form)
    dataset = load(FORMS[form](tmp_path / "my.set", files))
    assert_holds(dataset, *small)
    assert dataset.name == "my.set"
    assert dataset.class_names == ("ant", "bee", "cat")
    assert dataset.image_shape == (6, 5, 1)


@pytest.mark.parametrize("form", FORMS)
def test_class_folders_without_parts_are_split(tmp_path, small, form):
    files = tree(["ant", "bee", "cat"], *small)
    training = {name: data for name, data in files.items() if name.startswith("train/")}
    alone = {name.removeprefix("train/"): data for name, data in training.items()}
    (tmp_path / "parts").mkdir()
    expected = load(FORMS[form](tmp_path / "parts" / "own", training))
    dataset = load(FORMS[form](tmp_path / "own", alone))
    assert dataset.class_names == ("ant", "bee", "cat")
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 30
    for part in ("train", "validation", "test"):
        own, other = getattr(dataset, part), getattr(expected, part)
        assert len(np.unique(own.labels)) == 3  # stratified
        np.testing.assert_array_equal(own.images, other.images)
        np.testing.assert_array_equal(own.labels, other.labels)


@ON_DISK_AND_IN_TAR
@pytest.mark.parametrize(
    ("modes", "says"),
    [
        (("L", "RGB"), "images of a are L, of b RGB, so that the mode tells the class"),
        (("RGB", "RGBA"), "images of a are RGB, of b RGBA"),
    ],
)
def test_a_mode_for_each_class_is_refused(tmp_path, write, modes, says):
    def images(of_class):
        return {
            f"train/{name}/{n}.png": saved(Image.new(mode, (5, 6), 40 * n), "PNG")
            for name, mode in zip("ab", of_class, strict=True)
            for n in range(5)
        }

    with pytest.raises(DataError, match=says):
        load(write(tmp_path / "own", images(modes)))
    other = {"train/a/more.png": saved(Image.new(modes[1], (5, 6)), "PNG")}
    assert len(load(write(tmp_path / "mixed", images(modes) | other)).class_names) == 2


@ON_DISK_AND_IN_TAR
@pytest.mark.parametrize("form", ["png", "bmp", "webp", "WEBP", "tif", "tiff"])
def test_colour_round_trip(tmp_path, arrays, assert_holds, write, form):
    train, test = arrays(30, 3, (6, 5, 3)), arrays(9, 3, (6, 5, 3), seed=1)
    assert_holds(load(write(tmp_path / "own", tree("abc", train, test, form))), train, test)


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"]
)
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_compressed_tiff(tmp_path, arrays, assert_holds, compression, shape):
    train, test = arrays(10, 2, shape), arrays(4, 2, shape, seed=1)
    files = {
        f"{part}/{'ab'[label]}/{number:04}.tif": saved(
            Image.fromarray(image), "TIFF", compression=compression
        )
        for part, (images, labels) in (("train", train), ("test", test))
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    }
    assert_holds(load(write_tar(tmp_path / "own.tar", files)), train, test)


@pytest.mark.parametrize("form", ["jpg", "jpeg", "webp", "tiff"])
def test_what_loses_some_is_close(tmp_path, form):
    plain = np.arange(0, 250, 25, dtype=np.uint8)
    images = np.broadcast_to(plain[:, None, None, None], (10, 8, 8, 3)).copy()
    labels = np.repeat([0, 1], 5)
    how = {"webp": {"quality": 90}, "tiff": {"compression": "jpeg"}}.get(form, {})
    files = {
        name: saved(Image.open(io.BytesIO(data)), {"jpg": "JPEG"}.get(form, form.upper()), **how)
        for name, data in tree("ab", (images, labels), (images, labels)).items()
    }
    files = {f"{name.removesuffix('png')}{form}": data for name, data in files.items()}
    dataset = load(write_tar(tmp_path / "own.tar", files))
    np.testing.assert_allclose(dataset.test.images.astype(int), images, atol=2)
    np.testing.assert_array_equal(dataset.test.labels, labels)


def test_named_set_in_canonical_class_order(tmp_path, arrays, assert_holds):
    """The label of "airplane" is 0 in CIFAR-10 in whatever order the archive has the folders."""
    train, test = arrays(50, 10, (32, 32, 3)), arrays(10, 10, (32, 32, 3), seed=1)
    files = tree(CIFAR10, train, test)
    write_tar(tmp_path / "cifar10.tar.gz", dict(reversed(list(files.items()))))
    dataset = load("cifar10", tmp_path)
    assert_holds(dataset, train, test)
    assert dataset.class_names == tuple(CIFAR10)
    assert dataset.name == "cifar10"


def test_canonical_order_that_is_not_alphabetical(tmp_path, arrays, assert_holds):
    names = ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]
    train, test = arrays(50, 10, (4, 4)), arrays(10, 10, (4, 4), seed=1)
    write_folder(tmp_path / "kmnist", tree(names, train, test))
    dataset = load("kmnist", tmp_path)
    assert_holds(dataset, train, test)
    assert dataset.class_names == tuple(names)


def test_numbered_folders_count_and_mean_the_known_classes(tmp_path, arrays, assert_holds):
    names = [str(number) for number in range(12)]
    train, test = arrays(60, 12, (4, 4)), arrays(12, 12, (4, 4), seed=1)
    dataset = load(write_folder(tmp_path / "own", tree(names, train, test)))
    assert_holds(dataset, train, test)
    assert dataset.class_names == tuple(names)
    train, test = arrays(50, 10, (4, 4)), arrays(10, 10, (4, 4), seed=1)
    write_folder(tmp_path / "fashion_mnist", tree(names, train, test))
    dataset = load("fashion_mnist", tmp_path)
    assert_holds(dataset, train, test)
    assert dataset.class_names[1] == "Trouser"


def test_named_set_with_other_names_or_counts(tmp_path, arrays):
    train, test = arrays(50, 10, (4, 4, 3)), arrays(10, 10, (4, 4, 3), seed=1)
    write_folder(tmp_path / "cifar10", tree("jihgfedcba", train, test))
    dataset = load("cifar10", tmp_path)
    assert dataset.class_names == tuple("abcdefghij")
    np.testing.assert_array_equal(dataset.test.labels, np.arange(10))
    np.testing.assert_array_equal(dataset.test.images, test[0][::-1])
    write_folder(tmp_path / "cifar100", tree("jihgfedcba", train, test))
    with pytest.raises(DataError, match="10 classes; cifar100 has 100"):
        load("cifar100", tmp_path)


def test_the_archives_name_shows_where_it_is_another_version(tmp_path, arrays):
    train, test = arrays(50, 10, (32, 32, 3)), arrays(10, 10, (32, 32, 3), seed=1)
    write_tar(tmp_path / "cifar10_jpeg.tar.gz", below("x", tree(CIFAR10, train, test, "jpg")))
    dataset = load("cifar10", tmp_path)
    assert dataset.name == "cifar10_jpeg"
    assert dataset.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("part", ["val", "valid", "validation"])
def test_own_validation_part_is_kept(tmp_path, small, part):
    train, held = small
    files = tree("abc", train, held) | tree("abc", train, held, test_part=part)
    dataset = load(write_folder(tmp_path, files))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (30, 9, 9)


def test_disk_and_tar_give_the_same_split(tmp_path, small):
    files = tree("abc", *small)
    reverse = dict(reversed(list(files.items())))
    one = load(write_folder(tmp_path / "x", files))
    other = load(write_tar(tmp_path / "x.tar", reverse))
    np.testing.assert_array_equal(one.validation.images, other.validation.images)
    np.testing.assert_array_equal(one.train.labels, other.train.labels)


def test_grey_images_join_colour_ones(tmp_path, arrays):
    colour, grey = arrays(10, 2, (4, 4, 3)), arrays(4, 2, (4, 4), seed=1)
    dataset = load(write_folder(tmp_path, tree("ab", colour, grey)))
    assert dataset.image_shape == (4, 4, 3)
    expected = np.repeat(grey[0][np.argsort(grey[1], kind="stable")][..., None], 3, axis=3)
    np.testing.assert_array_equal(dataset.test.images, expected)


def test_hidden_files_and_papers_beside_the_parts_are_skipped(tmp_path, small, assert_holds):
    files = tree("abc", *small) | {
        "README.md": b"x", "train/list.txt": b"x", ".DS_Store": b"x",
        "train/a/._0000.png": b"x", "__MACOSX/train/a/0000.png": b"x",
    }  # fmt: skip
    assert_holds(load(write_folder(tmp_path / "s", files)), *small)
    assert_holds(load(write_tar(tmp_path / "s.tar", files)), *small)


def picture(size=(6, 5)) -> bytes:
    return encode(np.zeros(size, np.uint8))


COLOUR = Image.fromarray(np.random.default_rng(2).integers(0, 256, (6, 5, 3), np.uint8))
GREY = COLOUR.convert("L")


def of_type(kind: type, form: str = "TIFF") -> bytes:
    """Grey, with pixels of another type."""
    return saved(Image.fromarray(np.zeros((6, 5), kind)), form)


def moving(form: str) -> bytes:
    return saved(COLOUR, form, save_all=True, append_images=[COLOUR.transpose(Image.ROTATE_180)])


def tiff(height: int, width: int, bits: int, data: bytes, **others: int) -> bytes:
    """A TIFF in colour whose tags say so."""
    tags = {256: width, 257: height, 259: 1, 262: 2, 273: 140, 277: 3, 278: height, 279: len(data)}
    entries = [(tag, 4, 1, value) for tag, value in tags.items()]
    entries = sorted([*entries, (258, 3, 3, 134)])
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return head.ljust(134, b"\0") + struct.pack("<3H", bits, bits, bits) + data


def deep_png() -> bytes:
    """In colour, with 16 bits per channel."""
    rows = zlib.compress(bytes(6 * (1 + 5 * 6)))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)),
        (b"IDAT", rows),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def webp(height: int, width: int) -> bytes:
    """A WebP whose header says so."""
    data = bytearray(encode(np.asarray(COLOUR), "webp"))
    assert data[12:16] == b"VP8L"
    struct.pack_into("<I", data, 21, (width - 1) | (height - 1) << 14)
    return bytes(data)


TURNED = TiffImagePlugin.ImageFileDirectory_v2()
TURNED[700] = b'<x tiff:Orientation="6"/>'
SIGNED = TiffImagePlugin.ImageFileDirectory_v2()
SIGNED[339] = 2

WRONG = {
    "truncated image": ({"train/a/x.png": picture()[:45]}, r"train/a/x\.png cannot be decoded"),
    "truncated jpeg": (
        {"train/a/x.jpg": encode(np.zeros((6, 5), np.uint8), "jpg")[:-20]}, "cannot be decoded"),
    "truncated webp": (
        {"train/a/x.webp": encode(np.zeros((6, 5, 3), np.uint8), "webp")[:-5]},
        "cannot be decoded"),
    "truncated tiff": ({"train/a/x.tif": encode(np.zeros((6, 5), np.uint8), "tif")[:-5]},
        r"train/a/x\.tif cannot be decoded"),
    "truncated lzw": (
        {"train/a/x.tiff": saved(COLOUR, "TIFF", compression="tiff_lzw")[:-8]},
        "cannot be decoded"),
    "not an image": ({"train/a/x.png": b"hello"}, "cannot be decoded"),
    "not a webp": ({"train/a/x.webp": b"RIFF\4\0\0\0WEBP"}, "cannot be decoded"),
    "not a tiff": ({"train/a/x.tif": b"II*\0\xff\xff\xff\xff"}, "cannot be decoded"),
    "webp of another size": ({"train/b/x.webp": saved(COLOUR.rotate(90, expand=True), "WEBP")},
        "is 5x6 .height x width., an earlier image 6x5"),
    "tiff that is turned": ({"train/b/x.tif": saved(GREY, "TIFF", tiffinfo=TURNED)},
        r"x\.tif is 5x6 .height x width., an earlier image 6x5"),
    "webp bomb": ({"train/a/0.webp": webp(16384, 16384)}, r"0\.webp cannot .* exceeds limit"),
    "half a webp bomb": ({"train/a/0.webp": webp(10_000, 10_000)}, "exceeds limit of 89478485"),
    "tiff bomb": ({"train/a/0.tif": tiff(60_000, 60_000, 8, b"x")}, r"0\.tif can.* exceeds limit"),
    "half a tiff bomb": ({"train/a/0.tif": tiff(9000, 10_000, 8, b"x")}, "exceeds limit of 8947"),
    "moving webp": ({"train/a/x.webp": moving("WEBP")}, "has several frames; allowed: one"),
    "moving png": ({"train/a/x.png": moving("PNG")}, "has several frames; allowed: one"),
    "several pages": ({"train/a/x.tif": moving("TIFF")}, r"x\.tif has several frames; all"),
    "another size": ({"train/b/x.png": picture((5, 6))},
        "is 5x6 .height x width., an earlier image 6x5"),
    "16 bits": ({"train/a/x.png": of_type(np.uint16, "PNG")}, "mode I;16; allowed: 8 bits"),
    "tiff of 16 bits": ({"train/a/x.tif": of_type(np.uint16)}, r"x\.tif has mode I;16; allowed: 8"),
    "tiff of 32 bits": ({"train/a/x.tif": of_type(np.int32)}, "mode I; allowed: 8 bits"),
    "tiff of floats": ({"train/a/x.tif": of_type(np.float32)}, "mode F; allowed: 8 bits"),
    "tiff in Lab": ({"train/a/x.tif": saved(Image.new("LAB", (5, 6)), "TIFF")}, "mode LAB; allow"),
    "signed tiff": ({"train/a/x.tif": saved(GREY, "TIFF", tiffinfo=SIGNED)}, "has signed pixels"),
    "16 bits in colour": ({"train/a/x.png": deep_png()}, "16 bits per channel; allowed: 8"),
    "tiff of 16 bits in colour": ({"train/a/x.tif": tiff(6, 5, 16, bytes(180))},
        r"x\.tif has 16 bits per channel; allowed: 8"),
    "empty class": ({"train/d": None}, "class folder train/d is empty"),
    "empty class in test": ({"test/d": None}, "class folder test/d is empty"),
    "empty part": ({"val": None}, r"\(validation\): the part has no images"),
    "class only in test": ({"test/d/x.png": picture()}, "class d is not among the train"),
    "text in a class folder": ({"train/a/x.txt": b"x"}, r"train/a/x\.txt is no image in a class"),
    "image in a part": ({"train/x.png": picture()}, r"train/x\.png is no image in a class folder"),
    "class beside the parts": ({"d/x.png": picture()}, r"image d/x\.png is out of place"),
    "image beside the parts": ({"x.png": picture()}, r"image x\.png is out of place"),
    "image in another part": ({"tst/a/x.png": picture()}, "is out of place"),
    "image too deep": ({"train/a/b/x.png": picture()}, "out of place|is no image in a class"),
    "two top folders": ({"more/train/a/x.png": picture()}, r"several folders: \(none\), more"),
}  # fmt: skip


@ON_DISK_AND_IN_TAR
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_trees(tmp_path, arrays, write, wrong, capfd, recwarn):
    change, message = WRONG[wrong]
    files = tree("abc", arrays(6, 3, (6, 5)), arrays(3, 3, (6, 5), seed=1))
    load(write(tmp_path / "good", files))
    path = write(tmp_path / "bad", files | change)
    with pytest.raises(DataError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert capfd.readouterr() == ("", "")  # also of the libraries in C
    assert not recwarn


def test_what_says_how_wrong_images_are_made_makes_right_ones_too(tmp_path):
    data = np.asarray(COLOUR).tobytes()
    files = {"train/a/0.tif": tiff(6, 5, 8, data), "train/b/0.webp": webp(6, 5)}
    files |= {"test/a/0.tif": tiff(6, 5, 8, data), "train/a/1.tif": tiff(6, 5, 8, data)}
    dataset = load(write_folder(tmp_path, files | {"train/b/1.webp": webp(6, 5)}))
    for part in (dataset.train, dataset.validation, dataset.test):
        assert (part.images == np.asarray(COLOUR)).all()


@pytest.mark.parametrize(
    ("form", "image", "expected"),
    [
        ("TIFF", COLOUR.convert("P"), "RGB"),
        ("TIFF", COLOUR.convert("CMYK"), "RGB"),
        ("TIFF", COLOUR.convert("RGBA"), "RGB"),
        ("TIFF", COLOUR.convert("YCbCr"), "RGB"),
        ("TIFF", GREY.convert("LA"), "L"),
        ("TIFF", GREY.convert("1"), "L"),
        ("WEBP", COLOUR.convert("RGBA"), "RGB"),
        ("WEBP", GREY, "RGB"),  # the format has no grey
        ("PNG", COLOUR.convert("P"), "RGB"),
    ],
)
def test_modes_that_are_read(tmp_path, form, image, expected):
    data = saved(image, form, lossless=True)
    names = [
        f"{part}/{name}/{n}.{form}" for part in ("train", "test") for name in "ab" for n in "01"
    ]
    dataset = load(write_folder(tmp_path, dict.fromkeys(names, data)))
    pixels = np.asarray(image.convert(expected)).reshape(dataset.image_shape)
    assert (dataset.test.images == pixels).all()


def test_a_photograph_with_a_preview_is_read(tmp_path):
    large = COLOUR.resize((40, 48))
    data = saved(large, "MPO", save_all=True, append_images=[large.resize((20, 24))])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
        assert image.n_frames == 2
    names = [f"{part}/{name}/{n}.jpg" for part in ("train", "test") for name in "ab" for n in "01"]
    assert load(write_folder(tmp_path, dict.fromkeys(names, data))).image_shape == (48, 40, 3)


@ON_DISK_AND_IN_TAR
def test_many_images_keep_their_order_and_errors_their_file(tmp_path, arrays, assert_holds, write):
    train, test = arrays(800, 3, (6, 5, 3)), arrays(9, 3, (6, 5, 3), seed=1)
    files = tree("abc", train, test, "bmp")
    assert_holds(load(write(tmp_path / "good", files)), train, test)
    torn = {
        name: data[:-9] for name, data in files.items() if name.endswith(("0747.bmp", "90.bmp"))
    }
    with pytest.raises(DataError, match=r"train/[abc]/\d+\.bmp cannot be decoded") as error:
        load(write(tmp_path / "bad", files | torn))
    assert any(name in str(error.value) for name in torn)


def test_the_threads_end_with_the_reading(tmp_path, small):
    before = threading.active_count()
    load(write_folder(tmp_path / "good", tree("abc", *small)))
    with pytest.raises(DataError):
        load(write_folder(tmp_path / "bad", tree("abc", *small) | {"train/a/x.png": b"x"}))
    assert threading.active_count() == before


@ON_DISK_AND_IN_TAR
def test_no_train_part(tmp_path, small, write):
    files = {name: data for name, data in tree("abc", *small).items() if name.startswith("test")}
    with pytest.raises(DataError, match="there is no train part"):
        load(write(tmp_path / "own", files))


@pytest.mark.parametrize("write", FORMS.values())
def test_nothing_to_read(tmp_path, write):
    with pytest.raises(DataError, match=r"no dataset in this folder|holds neither CIFAR"):
        load(write(tmp_path / "own", {"notes.txt": b"x"}))


def tar_bytes(tmp_path, small, suffix) -> tuple[Path, bytes]:
    path = write_tar(tmp_path / f"own{suffix}", tree("abc", *small))
    return path, path.read_bytes()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.6, 0.95])
def test_truncated_archive(tmp_path, small, suffix, kept):
    path, data = tar_bytes(tmp_path, small, suffix)
    # a tar ends with up to 10 KiB of zeros: what is cut must reach the files
    size = len(data.rstrip(b"\0"))
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * size)])
    with pytest.raises(DataError, match="not a readable tar archive") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("extra", [0, 1, 300, 512])
def test_archive_cut_at_and_after_a_members_end(tmp_path, small, extra):
    """tarfile alone takes these cuts for the end of the archive."""
    path, data = tar_bytes(tmp_path, small, ".tar")
    with tarfile.open(path) as tar:
        end = tar.getmembers()[20].offset
    path.write_bytes(data[: end + extra])
    with pytest.raises(DataError, match="not a readable tar archive"):
        load(path)


def test_damaged_header_in_the_middle(tmp_path, small):
    path, data = tar_bytes(tmp_path, small, ".tar")
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[20].offset
    path.write_bytes(data[:offset] + b"x" * 512 + data[offset + 512 :])
    with pytest.raises(DataError, match="not a readable tar archive"):
        load(path)


def test_a_text_file_is_no_archive(tmp_path):
    (tmp_path / "own.tar").write_text("hello " * 1000)
    with pytest.raises(DataError, match=r"own\.tar: not a readable tar archive"):
        load(tmp_path / "own.tar")


def test_nothing_is_written_by_an_archive_with_outside_paths(tmp_path, small):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    files = tree("abc", *small) | {"../../train/a/evil.png": picture()}
    before = set(tmp_path.rglob("*"))
    path = write_tar(inner / "own.tar", files)
    assert len(load(path).test) == 9
    assert set(tmp_path.rglob("*")) == before | {path}


def test_links_in_an_archive_are_not_followed(tmp_path, small, assert_holds):
    path = write_tar(tmp_path / "own.tar", tree("abc", *small))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("train/a/s.png", tarfile.SYMTYPE), ("train/b/h.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, os.devnull
            tar.addfile(member)
    assert_holds(load(path), *small)


@ON_DISK_AND_IN_TAR
def test_images_of_several_sizes_are_cut_to_the_square_in_their_middle(tmp_path, write):
    """Left and right of the squares images are black, so that only they are taken."""
    rng = np.random.default_rng(0)
    files = {}
    for name, level in (("dark", 60), ("bright", 200)):
        for number in range(10):
            side, margin = int(rng.integers(12, 40)), int(rng.integers(0, 20))
            pixels = np.zeros((side, side + 2 * margin), np.uint8)
            pixels[:, margin : margin + side] = level
            files[f"train/{name}/{number}.png"] = encode(pixels)
    path = write(tmp_path / "mine", files)
    with pytest.raises(DataError, match="all images must have one size, or image_size one to take"):
        load(path)
    for size in (8, 16):  # the cache keeps them apart
        dataset = load(path, image_size=size)
        assert dataset.image_shape == (size, size, 1)
        levels = np.where(dataset.train.labels == dataset.class_names.index("dark"), 60, 200)
        middle = dataset.train.images[:, 1:-1, 2:-2, 0].astype(int)
        assert np.abs(middle - levels[:, None, None]).max() <= 3


def test_only_class_folders_are_resized(tmp_path, small):
    with pytest.raises(DataError, match="image_size is for class folders of your own, got it"):
        load("digits", image_size=4)
    images, labels = np.zeros((20, 6, 6), np.uint8), np.arange(20) % 2
    images[::2] = 9
    np.savez(tmp_path / "mine.npz", train_images=images, train_labels=labels)
    with pytest.raises(DataError, match="resizes class folders alone; these images are 6x6"):
        load(tmp_path / "mine.npz", image_size=4)
