"""How pixels become a network's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE = 10_000  # images of a set that statistics are measured on, evenly spaced


@dataclass(frozen=True)
class Pixels:
    """(x / 255 - mean) / std.

    mean: float32 [C, 1, 1], or [C, H, W] with a mean for each pixel; of images of another size, its mean over the
    pixels is taken away. std: float32 [C, 1, 1]. colours: float32 [C, C], the principal axes of a pixel's colours in
    the training images as columns, each as long as its standard deviation; zeros where nothing was measured.
    """

    mean: Tensor
    std: Tensor
    colours: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., C, H, W], uint8 or 0 to 255 in another type -> float32."""
        return (x.float() / 255 - self._mean(x.shape)) / self.std

    def shifted(self, x: Tensor, amounts: Tensor) -> Tensor:
        """As a call, the colours of the images [N, C, H, W] moved along the axes by `amounts` [N, C] first.

        Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks" (2012), section 4.1.
        """
        shift = (amounts @ self.colours.T)[..., None, None]
        return (x.float() / 255 + shift - self._mean(x.shape)) / self.std

    def _mean(self, shape: torch.Size) -> Tensor:
        fits = self.mean.shape[-2:] in ((1, 1), shape[-2:])
        return self.mean if fits else self.mean.mean((1, 2), keepdim=True)

    @classmethod
    def given(cls, mean: Iterable[float], std: Iterable[float]) -> Pixels:
        """Of one number for each channel."""
        means, stds = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
        return cls(means, stds, torch.zeros(len(means), len(means)))

    @classmethod
    def measured(cls, batches: Callable[[], Iterable[Tensor]], per_pixel: bool) -> Pixels:
        """From images [n, C, H, W] of one size; twice over them, so that the variances lose nothing to the mean.

        With `per_pixel` a mean for each pixel and no division, else mean and standard deviation of each channel.
        """
        count, total = 0, torch.zeros((), dtype=torch.float64)
        for x in batches():
            total = total + (x.double() / 255).sum(0)
            count += len(x)
        mean = total / count  # [C, H, W]
        channel = mean.mean((1, 2))
        covariance = torch.zeros(len(channel), len(channel), dtype=torch.float64)
        pixels = 0
        for x in batches():
            centred = (x.double() / 255).movedim(1, 0).flatten(1) - channel[:, None]  # [C, n*H*W]
            covariance += centred @ centred.T
            pixels += centred.shape[1]
        covariance /= pixels
        variances, axes = torch.linalg.eigh(covariance)
        colours = axes * variances.clamp_min(0).sqrt()
        std = covariance.diagonal().sqrt().clamp_min(1e-3)  # a channel may be constant
        if per_pixel:
            std = torch.ones_like(std)
        else:
            mean = channel[:, None, None]
        return cls(mean.float(), std.view(-1, 1, 1).float(), colours.float())

    def tensors(self) -> dict[str, Tensor]:
        """For a file; `Pixels(**tensors)` is the inverse."""
        return {"mean": self.mean, "std": self.std, "colours": self.colours}
