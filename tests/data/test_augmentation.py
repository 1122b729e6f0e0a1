"""Hashed randomness and batch augmentation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import keys

from largebatch.data import ImageSamples, crop_flip, uniforms
from largebatch.data.folder import center_box, random_resized_box
from largebatch.data.images import normalize

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
