"""Image files: 16 bits, and those that cannot be read."""

import struct
import zlib

import numpy as np
import pytest
from image_folders import SIZE, classes_of, save_classes, save_image
from PIL import Image
from training_runs import TINY

from ssprop_fx.cli.app import main
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.datasets import create_datasets


def _datasets(root):
    return create_datasets(TrainConfig(data_dir=str(root)))


def _cut(path, size=256):
    """Save an image of this size, and cut the end of its file."""
    save_image(path, "cat", size)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_the_high_8(tmp_path, channels):
    """The values are spread over the whole range: PIL makes those above 255 white."""
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    save_classes(tmp_path / "train", cat=1, dog=1)
    save_classes(tmp_path / "val", cat=1)
    path = tmp_path / "train" / "cat" / "0.png"
    if channels == 1:
        Image.fromarray(values).save(path)
    else:
        path.write_bytes(_png_rgb16(values))
    image, _ = _datasets(tmp_path).train[0]
    assert image.mode == "RGB"
    for channel in range(3):
        assert (np.asarray(image)[..., channel] == values >> 8).all()


def _png_rgb16(values):
    """Return a PNG of 16 bits and three equal channels, which PIL does not write."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    height, width = values.shape
    rows = np.repeat(values[..., None], 3, axis=2).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def test_a_truncated_file_is_named_once_and_replaced(tmp_path, caplog):
    save_classes(tmp_path / "train", cat=3, dog=2)
    save_classes(tmp_path / "val", cat=1)
    _cut(tmp_path / "train" / "cat" / "1.png")
    datasets = _datasets(tmp_path)
    for _ in range(2):
        assert classes_of(datasets.train, datasets.classes) == {"cat": 3, "dog": 2}
    (record,) = caplog.records
    path = tmp_path / "train" / "cat" / "1.png"
    assert record.getMessage().startswith(f"{path} cannot be read, the next image replaces it: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_many_broken_files_in_a_row_end_the_run_with_one_line(tmp_path, capfd, workers):
    save_classes(tmp_path / "train", cat=12, dog=1)
    save_classes(tmp_path / "val", cat=1)
    for index in range(1, 12):
        _cut(tmp_path / "train" / "cat" / f"{index}.png")
    flags = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "runs"), "-b", "13"]
    flags += ["--schedule", "none", "--epochs", "1", "--workers", str(workers)]
    assert main([*TINY, *flags]) == 1
    *_, line = capfd.readouterr().err.splitlines()
    start = "ssprop-fx: error: 10 images in a row cannot be read, the last one is"
    assert line.startswith(f"{start} {tmp_path / 'train' / 'cat'}")
    assert "Traceback" not in line
