"""How a convolution walks over its input; the kernels are compiled for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class Window:
    R: int = 1
    S: int = 1
    stride_h: int = 1
    stride_w: int = 1
    padding_h: int = 0
    padding_w: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @classmethod
    def of(cls, kernel_size: Sequence[int], geometry: Sequence[int]) -> Window:
        """geometry: as the ops take it."""
        return cls(*kernel_size, *geometry)

    @property
    def taps(self) -> int:
        return self.R * self.S

    @property
    def phases(self) -> int:
        """A strided dgrad falls into that many products, by the residue of its pixels."""
        return self.stride_h * self.stride_w

    @property
    def pads(self) -> bool:
        """Whether a tap may lie outside of the image."""
        return self.padding_h + self.padding_w > 0

    @property
    def identity(self) -> bool:
        """Whether pixel m of the output reads pixel m of the input and no other."""
        return self.taps * self.phases == 1 and not self.pads

    # In a phase taps are so many apart, and the pixels of dy that they read are so many apart.
    @property
    def tap_h(self) -> int:
        return self.stride_h // gcd(self.stride_h, self.dilation_h)

    @property
    def tap_w(self) -> int:
        return self.stride_w // gcd(self.stride_w, self.dilation_w)

    @property
    def back_h(self) -> int:
        return self.dilation_h // gcd(self.stride_h, self.dilation_h)

    @property
    def back_w(self) -> int:
        return self.dilation_w // gcd(self.stride_w, self.dilation_w)

    def outputs(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the output for an image of h by w."""
        return (
            (h + 2 * self.padding_h - self.dilation_h * (self.R - 1) - 1) // self.stride_h + 1,
            (w + 2 * self.padding_w - self.dilation_w * (self.S - 1) - 1) // self.stride_w + 1,
        )
