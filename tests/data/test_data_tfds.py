"""TensorFlow Datasets without TensorFlow: prepared sets, and downloads from a local server."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import http.server
import io
import json
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evojax_suite.data import DataError, catalog, load

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


def prepare(folder: Path, set_name: str, version: str, parts: dict, class_names: list[str]) -> Path:
    """Prepare a set as array_record; images go in as PNG files, which needs no TensorFlow."""
    import tensorflow_datasets as tfds

    def png(image):
        stream = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(stream, "PNG")
        stream.seek(0)
        return stream

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version(version)

        def _info(self):
            shape = next(iter(parts.values()))[0].shape[1:]
            label = tfds.features.ClassLabel(names=class_names)
            features = {"image": tfds.features.Image(shape=shape), "label": label}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(*content) for part, content in parts.items()}

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": png(image), "label": int(label)}

    builder = Builder(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.fixture
def small(arrays):
    return arrays(50, 10, (5, 4, 1)), arrays(20, 10, (5, 4, 1), seed=1)


FASHION = list(catalog.find_known("fashion_mnist").class_names)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("place", ["data_dir", "TFDS_DATA_DIR", "itself", "by path"])
def test_prepared_sets(tmp_path, small, assert_holds, place):
    train, test = small
    parts = {"train": train, "test": test}
    folder = tmp_path / ("tfds" if place == "TFDS_DATA_DIR" else "own")
    prepared = prepare(folder, "fashion_mnist", "3.0.1", parts, FASHION)
    if place == "by path":
        dataset = load(prepared)
    else:
        data_dirs = {"data_dir": folder, "itself": prepared}
        dataset = load("fashion_mnist", data_dirs.get(place))
    assert_holds(dataset, train, test)
    assert dataset.class_names == tuple(FASHION)
    assert "tensorflow" not in sys.modules


def test_own_validation_part_and_newest_version(tmp_path, small, arrays):
    train, test = small
    held = arrays(10, 10, (5, 4, 1), seed=2)
    parts = {"train": train, "validation": held, "test": test}
    prepare(tmp_path, "fashion_mnist", "3.0.9", {"train": test, "test": test}, FASHION)
    prepare(tmp_path, "fashion_mnist", "3.0.10", parts, FASHION)
    dataset = load("fashion_mnist", tmp_path)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (50, 10, 20)


def test_prepared_set_of_another_name(tmp_path, small):
    train, test = small
    prepared = prepare(tmp_path, "other", "1.0.0", {"train": train, "test": test}, FASHION)
    with pytest.raises(DataError, match="holds the set other; needed: mnist"):
        load("mnist", prepared)


def change_info(**changes):
    def change(prepared: Path) -> None:
        path = prepared / "dataset_info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut_records(prepared: Path) -> None:
    path = next(prepared.glob("*train.array_record*"))
    path.write_bytes(path.read_bytes()[:100])


DAMAGE = {
    "tfrecord": change_info(fileFormat="tfrecord"),
    "no json": lambda prepared: (prepared / "dataset_info.json").write_text("x"),
    "records cut": cut_records,
    "records missing": lambda prepared: next(prepared.glob("*train.array_record*")).unlink(),
    "no features": lambda prepared: (prepared / "features.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_prepared_sets_that_cannot_be_read(tmp_path, small, damage):
    train, test = small
    prepared = prepare(tmp_path, "mnist", "3.0.1", {"train": train, "test": test}, FASHION)
    load("mnist", tmp_path)
    DAMAGE[damage](prepared)
    with pytest.raises(DataError, match=r"3\.0\.1: cannot be read .* array_record") as error:
        load("mnist", tmp_path)
    assert "\n" not in str(error.value)


def test_without_tensorflow_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"mnist is missing: .* pip install tensorflow_datasets"):
        load("mnist")


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/web; gives its address and a function that ends it."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def stop():
        httpd.shutdown()
        httpd.server_close()
        thread.join()

    yield f"http://127.0.0.1:{httpd.server_port}", stop
    if thread.is_alive():
        stop()


def serve_instead(monkeypatch, name: str, address: str) -> None:
    """Make `load` fetch the set's files, whose names stay, from `address`."""
    known = catalog.find_known(name)
    assert known is not None
    urls = tuple(f"{address}/{url.rsplit('/', 1)[1]}" for url in known.urls)
    monkeypatch.setitem(catalog._BY_PLAIN_NAME, name, dataclasses.replace(known, urls=urls))


def idx_file(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes())


def cifar_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.hstack([labels[:, None].astype(np.uint8), pixels]).tobytes()


def publish(folder: Path, name: str, train, test) -> None:
    """Write what the set's server has."""
    if name == "mnist":
        for stem, (images, labels) in (("train", train), ("t10k", test)):
            (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx_file(images[..., 0]))
            (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx_file(labels))
    elif name == "cifar10":
        size = len(train[1]) // 5
        parts = [slice(size * number, size * (number + 1)) for number in range(5)]
        files = {
            f"data_batch_{number + 1}.bin": cifar_batch(train[0][part], train[1][part])
            for number, part in enumerate(parts)
        } | {"test_batch.bin": cifar_batch(*test)}
        with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
            for file, data in files.items():
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        np.savez(folder / f"{name}.npz", train_images=train[0], train_labels=train[1],
                 val_images=test[0], val_labels=test[1],
                 test_images=test[0], test_labels=test[1])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "num_classes"),
    [("mnist", (5, 4, 1), 10), ("cifar10", (32, 32, 3), 10), ("octmnist", (6, 6, 1), 4)],
)
def test_downloads_are_read_and_kept(
    tmp_path, arrays, assert_holds, server, monkeypatch, name, shape, num_classes
):
    train, test = arrays(50, num_classes, shape), arrays(20, num_classes, shape, seed=1)
    address, stop = server
    publish(tmp_path / "web", name, train, test)
    serve_instead(monkeypatch, name, address)
    first = load(name)
    if name == "octmnist":
        np.testing.assert_array_equal(first.train.images, train[0])
        assert len(first.validation) == 20
    else:
        assert_holds(first, train, test)
    stop()
    again = load(name)  # from the files that the first download kept
    np.testing.assert_array_equal(again.train.images, first.train.images)
    assert "tensorflow" not in sys.modules


def assert_fails_fast(name: str, message: str, data_dir: Path | None = None) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=message) as error:
        load(name, data_dir)
    assert time.perf_counter() - start < 10
    assert "\n" not in str(error.value)
    for advice in (f"{name} is missing", "EVOJAX_SUITE_DATA"):
        assert advice in str(error.value)


def test_no_connection(server, tmp_path, monkeypatch):
    address, stop = server
    stop()
    serve_instead(monkeypatch, "mnist", address)
    assert_fails_fast("mnist", f"download failed .cannot reach {address}", tmp_path)


def test_unknown_host(monkeypatch):
    serve_instead(monkeypatch, "cifar10", "http://no-such-host.invalid")
    assert_fails_fast("cifar10", "cannot reach http://no-such-host.invalid")


def test_file_gone_from_the_server(server, monkeypatch):
    serve_instead(monkeypatch, "cifar10", server[0])
    assert_fails_fast("cifar10", "download failed .*404")


def test_wrong_content_from_the_server(tmp_path, server, monkeypatch):
    (tmp_path / "web" / "cifar-10-binary.tar.gz").write_text("<html>moved</html>")
    serve_instead(monkeypatch, "cifar10", server[0])
    assert_fails_fast("cifar10", "not a readable tar archive")
