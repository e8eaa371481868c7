"""Pictures of every mode, range and byte order become the RGB that one would see, or an error that says why not."""

import io

import numpy as np
import pytest
from PIL import Image

from keeplora.data.images import Examples


def rgb_of(image, **options):
    """Return the pixels that a run would see of an image."""
    return np.asarray(Examples(("a",), (0,), lambda i: image, lambda i: "here", **options).image(0))


def reopened(image, kind):
    stored = io.BytesIO()
    image.save(stored, kind)
    return Image.open(io.BytesIO(stored.getvalue()))


def ramp(largest, dtype, least=0):
    return np.linspace(least, largest, 48).round().reshape(6, 8).astype(dtype)


WANTED = np.linspace(0, 255, 48).reshape(6, 8)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(("dtype", "kind"), [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF")])
def test_greys_of_every_range_and_byte_order_keep_their_brightness(bits, dtype, kind):
    greys = ramp(2**bits - 1, dtype)
    if dtype == ">u2":
        image = Image.frombytes("I;16B", (8, 6), greys.tobytes())
    else:
        image = reopened(Image.fromarray(greys), kind)
    seen = rgb_of(image)
    assert (np.ptp(seen, axis=2) == 0).all(), "grey"
    assert np.abs(seen[..., 0] - WANTED).max() <= 1.5


@pytest.mark.parametrize("greys", [ramp(1000, "<i4", least=-1000), ramp(2**20, "<i4"), ramp(1, "<f4")])
def test_greys_without_a_known_range_are_refused(greys):
    with pytest.raises(ValueError, match=r"here is not a readable image .*have no known range; save it with 8"):
        rgb_of(reopened(Image.fromarray(greys), "TIFF"))


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "La", "RGBa", "RGBX", "I"]
MODES += ["I;16", "I;16L", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_keeps_black_and_white(mode):
    colors = Image.new("RGB", (4, 2), "white")
    colors.paste("black", (0, 0, 2, 2))
    if mode.startswith("I;16"):
        greys = (np.asarray(colors.convert("L")).astype(">u2" if mode == "I;16B" else "<u2")) * 257
        image = Image.frombytes(mode, (4, 2), greys.tobytes())
    elif mode in ("La", "RGBa"):
        image = colors.convert(mode + "A" if mode == "L" else {"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "PA":
        image = colors.convert("RGBA").convert("PA")
    elif mode == "LA":
        image = colors.convert("L").convert("LA")
    else:
        image = colors.convert(mode)
    assert image.mode == mode
    seen = rgb_of(image).astype(int)
    assert seen[:, :2].max() <= 2
    assert seen[:, 2:].min() >= 253


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "P"])
def test_what_is_transparent_is_white(mode):
    if mode == "P":
        image = Image.new("P", (4, 2), 0)
        image.info["transparency"] = 0
    else:
        image = Image.new({"La": "LA", "RGBa": "RGBA"}.get(mode, mode), (4, 2), 0)
        image = image if image.mode == mode else image.convert(mode)
    assert rgb_of(image).min() == 255
