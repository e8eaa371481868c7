"""The same picture is found again after saving, resizing and recompressing; another one is not taken for it."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from keeplora.studies.doctor.image_fingerprints import BITS, PRINT, alike_images, equal_images, fingerprint


def picture(seed, size=96):
    """A few coloured shapes on a graded ground: simple, and unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(40, 215, (2, 2, 3)).astype(np.uint8)
    image = Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h = rng.uniform(0, 0.6 * size, 4)
        draw.ellipse((x, y, x + w + 8, y + h + 8), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    return image


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file).convert("RGB")


CHANGES = {
    "jpeg": lambda image: saved(image, "JPEG", quality=75),
    "webp": lambda image: saved(image, "WEBP", quality=70),
    "half": lambda image: image.resize((48, 48), Image.Resampling.BICUBIC),
    "double": lambda image: image.resize((192, 192), Image.Resampling.BICUBIC),
    "stretched": lambda image: image.resize((120, 90), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.04),
}


def distance(one, other):
    """Return in how many of 64 bits two perceptual hashes differ; unsure bits leave the others in proportion."""
    signs = [each["signs"].astype(float) for each in (one, other)]
    return 32 * (1 - signs[0] @ signs[1] / np.sqrt((signs[0] @ signs[0]) * (signs[1] @ signs[1])))


def prints_of(images):
    return np.array([fingerprint(image) for image in images], PRINT)


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_is_found_again_after_a_change_that_keeps_it(change):
    pictures = [picture(seed) for seed in range(30)]
    changed = [CHANGES[change](image) for image in pictures]
    assert alike_images(prints_of(changed), prints_of(pictures)).tolist() == list(range(30))
    distances = [distance(fingerprint(a), fingerprint(b)) for a, b in zip(pictures, changed, strict=True)]
    assert max(distances) <= BITS


def test_different_pictures_are_not_alike():
    first, second = prints_of(map(picture, range(40))), prints_of(map(picture, range(100, 140)))
    assert alike_images(first, second).tolist() == [-1] * 40


def test_flags_of_one_shape_and_other_colours_are_not_alike():
    def flag(*colors):
        image = Image.new("RGB", (60, 40))
        for i, color in enumerate(colors):
            image.paste(color, (20 * i, 0, 20 * i + 20, 40))
        return image

    france, italy = flag("#002395", "white", "#ED2939"), flag("#008C45", "white", "#CD212A")
    assert alike_images(prints_of([france]), prints_of([italy])).tolist() == [-1]
    assert alike_images(prints_of([saved(france, "JPEG")]), prints_of([italy, france])).tolist() == [1]


def test_two_images_without_a_shape_are_alike_to_nothing_but_equal_if_their_pixels_are():
    plain = prints_of([Image.new("RGB", (30, 30), color) for color in ("white", "#fefefe", "white")])
    assert not plain["signs"].any()
    assert alike_images(plain, plain).tolist() == [-1, -1, -1]
    assert equal_images(plain, plain).tolist() == [0, 1, 0]


def test_equal_means_pixel_by_pixel():
    image = picture(0)
    other = image.copy()
    other.putpixel((3, 3), (1, 2, 3))
    found = equal_images(prints_of([image, other, saved(image, "PNG")]), prints_of([picture(1), image]))
    assert found.tolist() == [1, -1, 1]


def test_the_same_bytes_in_another_shape_are_not_equal():
    wide, high = (Image.new("RGB", size, "red") for size in ((8, 2), (2, 8)))
    assert equal_images(prints_of([wide]), prints_of([high])).tolist() == [-1]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_find_what_comparing_pair_by_pair_finds(chunk):
    rng = np.random.default_rng(0)
    base = [picture(seed) for seed in range(6)]
    images = [CHANGES[list(CHANGES)[i % 6]](base[i % 6]) for i in range(11)]
    others = [base[i] for i in rng.permutation(6)] + [picture(50)]
    a, b = prints_of(images), prints_of(others)
    expected, least = [], 1 - 2 * BITS / 64
    for i in range(len(a)):
        best, place = 8.0, -1
        for j in range(len(b)):
            colors = float(np.abs(a["colors"][i].astype(float) - b["colors"][j]).mean())
            one, other = a["signs"][i].astype(float), b["signs"][j].astype(float)
            cosine = one @ other / np.sqrt((one @ one) * (other @ other))
            if cosine >= least and colors <= best and (colors < best or place < 0):
                best, place = colors, j
        expected.append(place)
    assert alike_images(a, b, chunk=chunk).tolist() == expected
    assert min(expected) > -1


def test_nothing_is_compared_with_nothing():
    assert alike_images(prints_of([]), prints_of([picture(0)])).tolist() == []
    assert alike_images(prints_of([picture(0)]), prints_of([])).tolist() == [-1]
