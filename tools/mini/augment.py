"""Random composites in batches: drawings on backgrounds, silhouettes, inversion, grey, low resolution."""

import torch
from torch import Tensor
from torch.nn import functional

SIZE = 64
MEAN, STD = 0.5, 0.5


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return `[n, 1, 1, 1]` uniform numbers."""
    return torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low


def chance(n: int, p: float, generator: torch.Generator) -> Tensor:
    """Return `[n, 1, 1, 1] bool`, true with chance `p`."""
    return torch.rand(n, 1, 1, 1, generator=generator) < p


def place(rgba: Tensor, flip: Tensor, easy: Tensor, generator: torch.Generator) -> Tensor:
    """Return premultiplied `[n, 4, SIZE, SIZE]` drawings, randomly turned, scaled, stretched, sheared and moved.

    Rows that are `easy [n] bool` are moved a third as much.
    """
    n = len(rgba)
    strength = torch.where(easy, 0.33, 1.0)
    angle = torch.randn(n, generator=generator) * 0.22 * strength
    scale = 1 / (1.05 - torch.rand(n, generator=generator) * 0.45 * strength)
    stretch = torch.exp(torch.randn(n, generator=generator) * 0.1 * strength)
    shear = torch.randn(n, generator=generator) * 0.1 * strength
    mirror = torch.where((torch.rand(n, generator=generator) < 0.4) & flip, -1.0, 1.0)
    room = (scale - 0.92).clamp(min=0.06)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * stretch * mirror, (sin + shear) * mirror
    theta[:, 1, 0], theta[:, 1, 1] = -sin, cos / stretch
    theta[:, :, 2] = (torch.rand(n, 2, generator=generator) * 2 - 1) * room[:, None]
    grid = functional.affine_grid(theta, [n, 4, SIZE, SIZE], align_corners=False)
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    return functional.grid_sample(premultiplied, grid, align_corners=False)


class Pool:
    """Textures and noise, made once and reused: `smooth [n, 3, h, w]`, `fine [n, 1, h, w]`, `noise [n, 1, h, w]`."""

    def __init__(self, generator: torch.Generator, size: int = 768) -> None:
        """Draw the textures."""
        coarse = torch.rand(size, 3, 3, 3, generator=generator)
        self.smooth = functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=True)
        knots = torch.rand(size, 1, 10, 10, generator=generator)
        self.fine = functional.interpolate(knots, size=(SIZE, SIZE), mode="bilinear")
        self.noise = torch.randn(size, 1, SIZE, SIZE, generator=generator)

    def some(self, kind: str, n: int, generator: torch.Generator) -> Tensor:
        """Return `n` random entries of one kind."""
        every = getattr(self, kind)
        return every[torch.randint(len(every), (n,), generator=generator)]


def backgrounds(others: Tensor, pool: Pool, generator: torch.Generator) -> Tensor:
    """Return `[n, 3, SIZE, SIZE]`: white, black, flat, smooth, rough, or a stretch of another drawing."""
    n = len(others)
    bounds = torch.tensor([0.28, 0.48, 0.72, 0.82, 0.92])
    kind = torch.bucketize(torch.rand(n, generator=generator), bounds)
    result = torch.rand(n, 3, 1, 1, generator=generator).repeat(1, 1, SIZE, SIZE)
    result[kind == 0], result[kind == 1] = 1.0, 0.0
    for number in (3, 4):
        rows = (kind == number).nonzero()[:, 0]
        smooth = pool.some("smooth", len(rows), generator)
        if number == 4:
            smooth = smooth * 0.2 + result[rows] * 0.6 + (pool.some("fine", len(rows), generator) - 0.5) * 0.6
        result[rows] = smooth.clamp(0, 1)
    rows = (kind == 5).nonzero()[:, 0]
    cut = others[rows, :, 20:52, 20:52]
    cut = cut[:, :3] * cut[:, 3:] + result[rows, :, :32, :32] * (1 - cut[:, 3:])
    if len(rows):
        result[rows] = functional.interpolate(cut, size=(SIZE, SIZE), mode="bilinear") * 0.8 + 0.1
    return result


def paint(placed: Tensor, ink: Tensor, thing: Tensor, pool: Pool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return premultiplied colour `[n, 3, SIZE, SIZE]` and the mean brightness of the drawing `[n, 1, 1, 1]`.

    Black drawings (`ink`) mostly get a random colour; coloured ones are jittered, some become
    silhouettes; flags (neither `ink` nor `thing`) keep their colours.
    """
    n = len(placed)
    colour, alpha = placed[:, :3], placed[:, 3:]
    gain = torch.rand(n, 3, 1, 1, generator=generator) * 0.5 + 0.75
    colour = (colour * gain + alpha * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5) * 0.2).clamp(0, 1)
    tone = torch.rand(n, 3, 1, 1, generator=generator)
    tone = torch.where(chance(n, 0.35, generator), tone.mean(1, keepdim=True).expand(n, 3, 1, 1), tone)
    extreme = chance(n, 0.5, generator)
    tone = torch.where(extreme, torch.where(chance(n, 0.5, generator), 1.0, 0.0).expand(n, 3, 1, 1), tone)
    filled = (
        ((ink & chance(n, 0.8, generator)) | (thing & ~ink & chance(n, 0.14, generator))).reshape(-1).nonzero()[:, 0]
    )
    rough = 1 - pool.some("fine", len(filled), generator) * uniform(len(filled), 0, 0.5, generator) * chance(
        len(filled), 0.3, generator
    )
    colour[filled] = tone[filled] * alpha[filled] * rough
    colour = torch.minimum(colour, alpha.expand_as(colour))
    brightness = colour.sum((1, 2, 3), keepdim=True) / (3 * alpha.sum((1, 2, 3), keepdim=True) + 1e-3)
    return colour, brightness


def composites(
    rgba: Tensor, ink: Tensor, flip: Tensor, pool: Pool, generator: torch.Generator, *, hardness: float = 1.0
) -> Tensor:
    """Return normalised images `[n, 3, SIZE, SIZE]` of uint8 drawings `rgba [n, h, w, 4]`.

    `ink [n] bool`: black drawings; `flip [n] bool`: may be mirrored. A share 1 - `hardness` is easy: on plain white.
    """
    drawn = rgba.permute(0, 3, 1, 2).float().div_(255)
    n = len(drawn)
    easy = torch.rand(n, generator=generator) >= hardness
    placed = place(drawn, flip, easy, generator)
    behind = backgrounds(drawn.roll(1, 0), pool, generator)
    colour, brightness = paint(placed, ink[:, None, None, None], flip[:, None, None, None], pool, generator)
    clash = (behind.mean((1, 2, 3), keepdim=True) - brightness).abs() < 0.25
    behind = behind * torch.where(clash, 0.35, 1.0) + torch.where(clash & (brightness <= 0.5), 0.65, 0.0)
    image = colour + behind * (1 - placed[:, 3:])
    rows = (chance(n, 0.15, generator).reshape(-1) & (flip | ink)).nonzero()[:, 0]
    image[rows] = image[rows].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    sign = torch.where(chance(n, 0.06, generator), -1.0, 1.0)
    image = (image - 0.5) * sign + 0.5
    image = finish(image, pool, generator)
    image[easy] = placed[easy, :3] + 1 - placed[easy, 3:]
    return image.sub_(MEAN).div_(STD)


def finish(image: Tensor, pool: Pool, generator: torch.Generator) -> Tensor:
    """Return the images with some noise, a part of them blurred through a lower resolution."""
    n = len(image)
    edge = (10, 16, 28)[int(torch.randint(0, 3, (1,), generator=generator))]
    part = n // 7 if edge > 10 else n // 16
    small = functional.interpolate(image[:part], size=(edge, edge), mode="area")
    image[:part] = functional.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (image + pool.some("noise", n, generator) * uniform(n, -0.03, 0.04, generator).clamp(min=0)).clamp_(0, 1)
