"""The photograph pipeline."""

from __future__ import annotations

import builtins
import os
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from photos import keys

from largebatch.data import ImageFolder
from largebatch.data.photograph import read_image
from largebatch.data.source import readable
from largebatch.errors import UserError


@pytest.fixture
def photo_folder(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for half, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (40 + 10 * number, 50, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path


def test_image_folder(photo_folder):
    source = ImageFolder(path=str(photo_folder), image_size=16).load(seed=1)
    assert source.task.sample_shape == (3, 16, 16) and source.task.num_outputs == 2
    assert (len(source.train), len(source.val)) == (6, 4)
    inputs, labels = source.train.__getitems__(keys(range(6)))
    assert inputs.shape == (6, 3, 16, 16) and inputs.dtype == torch.float32
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert inputs[:3].mean() < inputs[3:].mean()  # dogs are brighter
    assert torch.equal(source.train.__getitems__(keys([4]))[0][0], inputs[4])
    assert not torch.equal(source.train.__getitems__(keys(range(6), epoch=1))[0], inputs)
    assert torch.equal(*(source.val.__getitems__(keys(range(4), epoch))[0] for epoch in (0, 1)))


def test_image_folder_without_augmentation_looks_at_the_centre(photo_folder):
    source = ImageFolder(path=str(photo_folder), image_size=16, augment=False).load(seed=1)
    assert torch.equal(*(source.train.__getitems__(keys(range(6), epoch))[0] for epoch in (0, 1)))


def test_linked_files_and_folders_count(photo_folder):
    (photo_folder / "train" / "fox").symlink_to(photo_folder / "train" / "dog")
    (photo_folder / "train" / "cat" / "again.JPG").symlink_to(photo_folder / "val" / "cat" / "0.jpg")
    source = ImageFolder(path=str(photo_folder), image_size=8).load(seed=0)
    assert len(source.train) == 10 and source.task.num_outputs == 3


def ramp(dtype, most):
    """A grey picture of 4 x 6 pixels from black to white, left to right and a little downwards."""
    return np.round((np.arange(6) * 4 + np.arange(4)[:, None]) / 23 * most).astype(dtype)


@pytest.mark.parametrize(
    "name", ["grey.png", "grey.tif", "big-endian.tif", "grey.pgm", "twelve bits.tif", "white is zero.tif"]
)
def test_sixteen_bits_of_grey_keep_their_values(name, tmp_path):
    """Within half of one in 255 of value / white, where the conversion to RGB alone gives white above 255."""
    from PIL import Image

    file, white = tmp_path / name, 2**16 - 1
    pixels = ramp(np.uint16, white)
    if name == "big-endian.tif":
        Image.frombytes("I;16B", (6, 4), pixels.astype(">u2").tobytes()).save(file)
    elif name == "grey.pgm":
        file.write_bytes(b"P5 6 4 65535\n" + pixels.astype(">u2").tobytes())
    elif name == "twelve bits.tif":
        white = 2**12 - 1
        pixels = ramp(np.uint16, white)
        pairs = pixels.reshape(-1, 2).astype(int)  # two values in three bytes
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        write_tiff(file, packed.astype(np.uint8).tobytes(), bits=12)
    elif name == "white is zero.tif":
        write_tiff(file, pixels.astype("<u2").tobytes(), bits=16, white_is_zero=True)
        pixels = white - pixels.astype(int)
    else:
        Image.fromarray(pixels).save(file)
    got = np.asarray(read_image(file))
    assert got.shape == (4, 6, 3) and (got == got[:, :, :1]).all()
    np.testing.assert_allclose(got[:, :, 0], pixels / white * 255, rtol=0, atol=0.5 + 1e-3)


def write_tiff(file, data, bits, white_is_zero=False):
    """Write a grey TIFF of 6 x 4 pixels by its specification."""
    tags = {
        256: 6,
        257: 4,
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        273: 8 + 2 + 9 * 12 + 4,
        277: 1,
        278: 4,
        279: len(data),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data)


@pytest.mark.parametrize(
    ("name", "pixels", "kind"),
    [
        ("floats.tif", ramp(np.float32, 1), "floating-point numbers"),
        ("floats to 255.tiff", ramp(np.float32, 255), "floating-point numbers"),
        ("integers.tif", ramp(np.int32, 70000), "32-bit integers"),
    ],
)
def test_pixels_without_a_white_of_their_own_are_refused_by_name(name, pixels, kind, tmp_path):
    from PIL import Image

    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(
        UserError, match=rf"image '.*{name}' cannot be read \(its pixels are {kind}.*save it with 8 or 16 bits"
    ):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P", "P with a transparent colour", "RGB with a transparent colour", "L with one"]
)
def test_transparent_pixels_come_out_on_white(mode, tmp_path):
    """Left of the middle dark and opaque, right of it transparent over black: what is seen, never what is hidden."""
    from PIL import Image

    file = tmp_path / "clear.png"
    alpha = np.zeros((4, 6), dtype=np.uint8)
    alpha[:, :3] = 255
    grey = np.where(alpha, 60, 0).astype(np.uint8)
    if mode == "RGBA":
        Image.fromarray(np.dstack([grey, grey, grey, alpha])).save(file)
    elif mode == "LA":
        Image.fromarray(np.dstack([grey, alpha])).save(file)
    elif mode.startswith("P"):
        image = Image.fromarray((alpha == 0).astype(np.uint8)).convert("P")
        image.putpalette([60, 60, 60, 0, 0, 0])
        image.save(file, transparency=1 if "colour" in mode else b"\xff\x00")
    else:
        image = Image.fromarray(grey if mode.startswith("L") else np.dstack([grey] * 3))
        image.save(file, transparency=0 if mode.startswith("L") else (0, 0, 0))
    expected = np.where(alpha, 60, 255)
    np.testing.assert_array_equal(np.asarray(read_image(file)), np.dstack([expected] * 3))


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    from PIL import Image

    Image.new("RGBA", (4, 4), (255, 0, 100, 51)).save(tmp_path / "clear.webp", lossless=True)
    got = np.asarray(read_image(tmp_path / "clear.webp"))[0, 0]
    np.testing.assert_allclose(got, [255, 255 * 0.8, 100 * 0.2 + 255 * 0.8], rtol=0, atol=1)


@pytest.mark.parametrize("name", ["cmyk.tif", "cmyk.jpg"])
def test_cmyk_comes_out_by_the_formula_without_a_profile(name, tmp_path):
    from PIL import Image

    Image.new("CMYK", (16, 16), (0, 255, 128, 51)).save(tmp_path / name, quality=100)
    got = np.asarray(read_image(tmp_path / name))[8, 8]
    ink = np.array([0, 255, 128]) / 255
    np.testing.assert_allclose(got, 255 * (1 - ink) * (1 - 51 / 255), rtol=0, atol=2)  # JPEG rounds


# Where, of the upright picture, the stored picture's first row and first column lie (EXIF 2.32, 4.6.4).
STORED = {1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
          5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_stand_upright(suffix, orientation, tmp_path):
    from PIL import Image

    upright = np.full((16, 32, 3), 200, dtype=np.uint8)
    upright[:8, :8], upright[:8, 24:] = 0, 90  # three corners differ
    row, column = STORED[orientation]
    stored = upright.swapaxes(0, 1) if row in ("left", "right") else upright
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    image = Image.fromarray(np.ascontiguousarray(stored))
    notes = Image.Exif()
    notes[0x0112] = orientation
    image.save(tmp_path / f"turned.{suffix}", exif=notes, quality=100)
    got = np.asarray(read_image(tmp_path / f"turned.{suffix}")).astype(int)
    assert got.shape == upright.shape
    assert np.abs(got - upright).mean() < 5  # JPEG and WebP blur edges


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_notes_do_not_break_a_photograph(tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16), (10, 20, 30)).save(tmp_path / "noted.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(tmp_path / "noted.png").getpixel((3, 3)) == (10, 20, 30)


def test_what_is_in_subfolders_of_a_class_counts(photo_folder):
    """In the order of torchvision's ImageFolder: a folder's own files, then those of its subfolders, by their paths."""
    cat = photo_folder / "train" / "cat"
    for name in ("b/2", "b", "a-c", "a/x"):
        (cat / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(cat / "0.jpg", cat / name / "y.jpg")
        shutil.copy(cat / "0.jpg", cat / name / "B.JPG")
    (cat / "a" / "notes").mkdir()
    (cat / ".thumbnails").mkdir()
    shutil.copy(cat / "0.jpg", cat / ".thumbnails" / "0.jpg")
    (cat / "b" / "up").symlink_to("..", target_is_directory=True)
    source = ImageFolder(path=str(photo_folder), image_size=8).load(seed=0)
    assert len(source.train) == 3 + 8 + 3 and source.notes == ()
    found = [os.fsdecode(name) for name in source.train.files[:11]]
    walk = sorted((root, sorted(names)) for root, _, names in os.walk(cat) if ".thumb" not in root)
    images = [os.path.join(root, name) for root, names in walk for name in names if name.lower().endswith(".jpg")]
    assert [str(photo_folder / "train" / name) for name in found] == images
    assert source.train.labels.tolist() == [0] * 11 + [1] * 3


def test_the_list_is_torchvisions(photo_folder):
    try:
        from torchvision.datasets import ImageFolder as Torchvisions
    except (ImportError, RuntimeError):
        pytest.skip("torchvision is not installed, or not for this torch")
    for name in ("b/2", "a-c", "a/x"):
        (photo_folder / "train" / "dog" / name).mkdir(parents=True)
        shutil.copy(photo_folder / "train" / "dog" / "0.jpg", photo_folder / "train" / "dog" / name / "y.jpg")
    train = ImageFolder(path=str(photo_folder), image_size=8).load(seed=0).train
    theirs = Torchvisions(str(photo_folder / "train")).samples
    ours = [str(photo_folder / "train" / os.fsdecode(name)) for name in train.files]
    assert list(zip(ours, train.labels.tolist(), strict=True)) == theirs


@pytest.mark.parametrize("harm", ["truncated", "not an image", "empty"])
def test_a_broken_image_is_named(photo_folder, harm):
    file = photo_folder / "train" / "cat" / "1.jpg"
    contents = file.read_bytes()
    file.write_bytes({"truncated": contents[: len(contents) // 2], "not an image": b"hello", "empty": b""}[harm])
    train = ImageFolder(path=str(photo_folder), image_size=8).load(seed=0).train
    inputs, labels, missing = train.__getitems__(keys(range(6)))
    assert list(missing) == [1] and re.search(r"image '.*cat/1\.jpg' cannot be read \(", missing[1])
    inputs, labels, _ = readable((inputs, labels, missing))
    assert inputs.shape == (5, 3, 8, 8) and labels.tolist() == [0, 0, 1, 1, 1]
    inputs, labels, missing = readable(train.__getitems__(keys([1, 1])))
    assert inputs.shape == (1, 3, 8, 8) and sorted(missing) == [0, 1]  # a stand-in


def test_wrong_folders(photo_folder):
    def load(path):
        return ImageFolder(path=str(path), image_size=8).load(seed=0)

    with pytest.raises(UserError, match=r"data\.path: nothing lies at"):
        load(photo_folder / "nowhere")
    with pytest.raises(UserError, match=r"data\.path: no folder 'train' in"):
        load(photo_folder / "val")
    (photo_folder / "val" / "wolf").mkdir()
    with pytest.raises(UserError, match=r"class 'wolf' of .* is not among the classes in train"):
        load(photo_folder)
    (photo_folder / "train" / "wolf").mkdir()
    with pytest.raises(UserError, match=r"class folder '.*wolf' has no images"):
        load(photo_folder)
    (photo_folder / "bare" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="has no folders, one for each class"):
        load(photo_folder / "bare")


def test_without_pillow_the_install_command_is_named(photo_folder, monkeypatch):
    real = builtins.__import__

    def without_pillow(name, *arguments, **options):
        if name.startswith("PIL"):
            raise ImportError("No module named 'PIL'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(UserError, match=r"pip install 'largebatch\[vision\]'"):
        ImageFolder(path=str(photo_folder)).load(seed=0)


def test_real_photographs(data_folder):
    if not (data_folder / "photos").is_dir():
        pytest.skip("no photos in LARGEBATCH_DATA")
    source = ImageFolder(path=str(data_folder / "photos"), image_size=64).load(seed=0)
    assert (len(source.train), len(source.val), source.task.num_outputs) == (240, 80, 10)
    inputs, _ = source.val.__getitems__(keys(range(0, 80, 10)))
    assert torch.isfinite(inputs).all() and inputs.std() > 0.3


def test_the_transparent_grey_of_a_16_bit_png_is_white(tmp_path):
    values = np.array([[0, 1000, 65535]], dtype=np.uint16)
    pytest.importorskip("PIL.Image").fromarray(values).save(tmp_path / "a.png", transparency=1000)
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 255]
