"""Hashed randomness, batch augmentation, and the photograph pipeline."""

from __future__ import annotations

import builtins
import math
import os
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.data import ImageFolder, ImageSamples, crop_flip, uniforms
from largebatch.data.folder import center_box, random_resized_box
from largebatch.data.images import normalize
from largebatch.data.photograph import read_image
from largebatch.data.sampler import SampleKeys
from largebatch.data.source import readable
from largebatch.errors import UserError


def keys(indices, epoch=0) -> SampleKeys:
    indices = np.asarray(indices, dtype=np.int64)
    return SampleKeys(np.full(len(indices), epoch, dtype=np.int64), indices)


# Hashed uniform numbers


def test_uniforms_are_uniform_and_independent():
    num = 20_000
    draws = uniforms(0, np.zeros(num, dtype=np.int64), np.arange(num), 4)
    assert draws.min() >= 0 and draws.max() < 1
    # Chi-squared over 64 equal cells has mean 63 and standard deviation sqrt(126) = 11.2: five of those on either side.
    for column in draws.T:
        counts = np.histogram(column, 64, (0, 1))[0]
        statistic = ((counts - num / 64) ** 2 / (num / 64)).sum()
        assert 63 - 56 < statistic < 63 + 56
    # A sample correlation of independent columns has standard deviation 1/sqrt(num).
    neighbours = np.column_stack([draws, np.roll(draws[:, 0], 1)])
    off_diagonal = np.corrcoef(neighbours.T) - np.eye(5)
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(num)


@pytest.mark.parametrize("what", ["seed", "epoch", "index"])
def test_uniforms_along_each_coordinate(what):
    num = 20_000
    walk, rest = np.arange(num), np.full(num, 3)
    if what == "seed":
        draws = np.concatenate([uniforms(seed, rest[:1], rest[:1], 1) for seed in range(2000)])[:, 0]
    else:
        draws = uniforms(7, *((walk, rest) if what == "epoch" else (rest, walk)), 1)[:, 0]
    # Mean 1/2 and variance 1/12 of a uniform number; the sample variance's own deviation is sqrt(1/180/num).
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(draws))
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(draws))
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 5 / math.sqrt(len(draws))


def test_coordinates_do_not_stand_in_for_each_other():
    seeds = range(-3, 12)
    grid = np.arange(12)
    epochs, indices = (side.ravel() for side in np.meshgrid(grid, grid))
    draws = np.concatenate([uniforms(seed, epochs, indices, 3).ravel() for seed in seeds])
    assert len(np.unique(draws)) == len(draws)


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 2**20))
def test_uniforms_do_not_depend_on_the_batch(seed, indices, epoch):
    batch = keys(indices, epoch)
    whole = uniforms(seed, batch.epochs, batch.indices, 3)
    for row, index in enumerate(indices):
        alone = keys([index], epoch)
        np.testing.assert_array_equal(uniforms(seed, alone.epochs, alone.indices, 3)[0], whole[row])
        np.testing.assert_array_equal(uniforms(seed, alone.epochs, alone.indices, 1)[0], whole[row, :1])


def test_uniforms_are_pinned():
    """A change of the hash would change every run's augmentation: make it on purpose."""
    # Recomputed by splitmix64's finaliser in Python's own integers.
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    seed, epoch, index = 5, 2, 1234
    state = mix((mix((mix((seed + golden) & mask) ^ epoch) + golden & mask) ^ index) + golden & mask)
    expected = [(mix((state + column * golden) & mask) >> 11) * 2.0**-53 for column in (1, 2)]
    assert uniforms(seed, np.array([epoch]), np.array([index]), 2)[0].tolist() == expected


# Batch augmentation


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_crop_flip_against_a_loop(seed, padding, channels, height, width):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, channels, height, width), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(0, 2 * padding + 1, (2, 6), generator=generator)
    flip = torch.rand(6, generator=generator) < 0.5
    got = crop_flip(images, top, left, flip, padding)
    for i in range(6):
        padded = np.pad(images[i].numpy(), ((0, 0), (padding, padding), (padding, padding)))
        cut = padded[:, top[i] : top[i] + height, left[i] : left[i] + width]
        np.testing.assert_array_equal(got[i].numpy(), cut[:, :, ::-1] if flip[i] else cut)


def image_samples(augment, seed=0, **options) -> ImageSamples:
    images = torch.arange(50 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(50, 3, 8, 8)
    return ImageSamples(images, torch.arange(50), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), augment, 2, seed=seed, **options)


def test_normalize_matches_its_formula():
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    got = normalize(images, mean, std)
    expected = images.double() / 255
    expected = (expected - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)  # float32, values up to 3


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_a_sample_does_not_depend_on_its_batch(augment):
    samples = image_samples(augment)
    whole, labels = samples.__getitems__(keys(range(50), epoch=3))
    assert torch.equal(labels, torch.arange(50))
    for index in (0, 17, 49):
        alone, _ = samples.__getitems__(keys([index], epoch=3))
        assert torch.equal(alone[0], whole[index])


def test_augmentation_follows_epoch_and_seed():
    first = image_samples("crop_flip").__getitems__(keys(range(50)))[0]
    assert torch.equal(first, image_samples("crop_flip").__getitems__(keys(range(50)))[0])
    assert not torch.equal(first, image_samples("crop_flip").__getitems__(keys(range(50), epoch=1))[0])
    assert not torch.equal(first, image_samples("crop_flip", seed=1).__getitems__(keys(range(50)))[0])
    plain = image_samples("none")
    assert torch.equal(*(plain.__getitems__(keys(range(50), epoch))[0] for epoch in (0, 1)))


def test_all_places_and_both_directions_occur_equally():
    images = torch.zeros(9000, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 1, 0] = 255  # left of the centre
    samples = ImageSamples(images, torch.zeros(9000), (0.0,), (1.0,), "crop_flip", crop_padding=1)
    pictures, _ = samples.__getitems__(keys(range(9000)))
    counts = pictures.sum(0)[0]
    # Each of the 18 (top, left, direction) takes 9000/18 = 500 images. Cut at left 0, 1, 2 the bright pixel comes to
    # column 1, to column 0, or is lost; mirrored, to column 1, to column 2, or is lost.
    expected = torch.tensor([[500.0, 1000, 500]] * 3)
    torch.testing.assert_close(counts, expected, rtol=0, atol=5 * math.sqrt(1000))


# Photographs


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 10**6))
def test_random_boxes_stay_inside_within_area_and_aspect(width, height, seed):
    left, top, right, bottom = random_resized_box(width, height, np.random.default_rng(seed).random(22))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) >= 100 and max(width, height) / min(width, height) <= 4 / 3:
        # Sides are rounded to whole pixels: half of one in (at least) 28 on each.
        assert 0.08 * 0.96 <= (right - left) * (bottom - top) / (width * height) <= 1
        assert 3 / 4 * 0.96 <= (right - left) / (bottom - top) <= 4 / 3 * 1.04


def test_the_area_and_aspect_of_boxes_follow_their_law():
    rng = np.random.default_rng(0)
    boxes = [random_resized_box(400, 400, rng.random(22)) for _ in range(4000)]
    widths, heights = np.array([(b[2] - b[0], b[3] - b[1]) for b in boxes], dtype=float).T
    logs = np.log(widths / heights)
    assert abs(logs.mean()) < 0.02 and abs(np.abs(logs).max() - math.log(4 / 3)) < 0.02
    areas = widths * heights / 400**2
    # Uniform on [0.08, 1] but for large areas drawn again where they do not fit: below 3/4 all aspects fit.
    below, above = ((areas > 0.08) & (areas < 0.4)).sum(), ((areas > 0.4) & (areas < 0.72)).sum()
    assert abs(below - above) < 5 * math.sqrt(below + above)


def test_a_strip_falls_back_to_its_centre():
    assert random_resized_box(1000, 10, np.full(22, 0.99)) == (493, 0, 506, 10)


def test_the_centre_box_is_resize_then_crop(tmp_path):
    from PIL import Image

    # A smooth picture: pixel grids shifted by a fraction of a pixel then agree.
    y, x = np.mgrid[0:300, 0:500]
    pixels = np.stack([x / 2, y / 1.5, (x + y) / 4], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels)
    got = np.asarray(image.resize((112, 112), Image.Resampling.BILINEAR, box=center_box(500, 300, 112)), dtype=int)
    resized = image.resize((round(500 * 128 / 300), 128), Image.Resampling.BILINEAR)
    left, top = (resized.width - 112) // 2, (128 - 112) // 2
    expected = np.asarray(resized.crop((left, top, left + 112, top + 112)), dtype=int)
    assert np.abs(got - expected).max() <= 2


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
