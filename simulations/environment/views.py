"""How the same data looks elsewhere: views, in five strengths, of normalised samples.

After Hendrycks and Dietterich (2019), whose corruptions of photographs come in five severities. The
amounts are our choice. A view is a function of samples
``[n, *shape]``, normalised as models see them, a strength of 1 to 5 and a generator; it returns new
samples of the same shape. Amounts are in standard deviations of the data set.

Images are ``[n, channels, y, x]``. Signals (vectors of features, log-mel spectrograms) have views
of their own: what turns a photograph would turn a spectrogram into another sound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

View = Callable[[Tensor, int, torch.Generator], Tensor]


def plain(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Leave samples as they are, whatever the strength."""
    return x


# Images


def brightness(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Darken: 0.4 standard deviations a strength."""
    return x - 0.4 * strength


def contrast(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Fade towards the sample's mean: by 17 % a strength."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (1 - 0.17 * strength) * (x - mean)


def negative(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Invert the brightest fifth of a sample's range for each strength; at 5, all of it."""
    low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    inverted = x - low >= (1 - strength / 5) * (high - low)
    return torch.where(inverted, low + high - x, x)


def blur(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Blur with a Gaussian, 2 % of the longer side a strength in standard deviation."""
    deviation = 0.02 * strength * max(x.shape[2:])
    reach = max(1, round(2 * deviation))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    weights = weights / weights.sum()
    for axis, kernel in ((3, weights.view(1, 1, 1, -1)), (2, weights.view(1, 1, -1, 1))):
        padding = (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach)
        flat = F.pad(x, padding, mode="replicate").flatten(0, 1)[:, None]
        x = F.conv2d(flat, kernel).view(*x.shape)
    return x


def pixelate(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Keep 1 / (1 + strength / 2) of the pixels in each direction."""
    height, width = (max(2, round(side / (1 + strength / 2))) for side in x.shape[2:])
    return F.interpolate(F.adaptive_avg_pool2d(x, (height, width)), size=x.shape[2:])


def noise(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise, 0.2 standard deviations a strength."""
    return x + 0.2 * strength * torch.randn(x.shape, generator=generator)


def rotation(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Turn by 18 degrees a strength; a sample's own mean fills the corners."""
    angle = torch.deg2rad(torch.tensor(18.0 * strength))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]])
    return _warped(x, turn)


def zoom(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Show the middle, 10 % of each side less a strength."""
    scale = 1 - 0.1 * strength
    return _warped(x, torch.tensor([[scale, 0, 0], [0, scale, 0]]))


def occlusion(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Hide a rectangle anywhere, 12 % of each side a strength, behind the sample's mean."""
    hidden = torch.ones(len(x), 1, 1, 1, dtype=torch.bool)
    for axis in (2, 3):
        side = x.shape[axis]
        size = max(1, round(0.12 * strength * side))
        first = torch.randint(0, side - size + 1, (len(x), 1, 1, 1), generator=generator)
        place = torch.arange(side).view([-1 if each == axis else 1 for each in range(4)])
        hidden = hidden & (place >= first) & (place < first + size)
    return torch.where(hidden, x.mean(dim=(1, 2, 3), keepdim=True), x)


def _warped(x: Tensor, matrix: Tensor) -> Tensor:
    """Look up each pixel where a ``[2, 3]`` matrix of relative coordinates says."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x - mean, grid, align_corners=False) + mean


# Signals


def gain(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Amplify: by 20 % a strength."""
    return x * (1 + 0.2 * strength)


def offset(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Move the zero: 0.3 standard deviations a strength."""
    return x + 0.3 * strength


def dropped(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
    """Lose every feature or band whose number, scrambled, falls in 8 % a strength: always these."""
    axis = x.ndim - 2 if x.ndim > 2 else 1
    size = x.shape[axis]
    scrambled = torch.arange(size) * 0.618034 % 1  # golden ratio: evenly spread, no generator
    lost = scrambled < 0.08 * strength
    return x * ~lost.view([size if each == axis else 1 for each in range(x.ndim)])


IMAGE_VIEWS: dict[str, View] = {
    "plain": plain,
    "negative": negative,
    "rotation": rotation,
    "noise": noise,
    "brightness": brightness,
    "contrast": contrast,
    "blur": blur,
    "pixelate": pixelate,
    "zoom": zoom,
    "occlusion": occlusion,
}
SIGNAL_VIEWS: dict[str, View] = {
    "plain": plain,
    "gain": gain,
    "offset": offset,
    "noise": noise,
    "dropped": dropped,
}


def one_after_another(views: Sequence[View]) -> View:
    """Return a view that is several, from first to last."""

    def view(x: Tensor, strength: int, generator: torch.Generator) -> Tensor:
        for each in views:
            x = each(x, strength, generator)
        return x

    return view
