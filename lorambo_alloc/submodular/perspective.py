"""A bound for coupled candidates: the dual of the perspective relaxation, at any point.

Let M = C + rho I and M >= diag(p) in the order of matrices, p > 0, so that R = M - diag(p) is
positive semidefinite. For every vector w, and every y that is 0 outside a set T,

    b^T y - 1/2 y^T M y <= 1/2 w^T R w + sum over T of (c_j y_j - 1/2 p_j y_j^2),   c = b - R w,

as y^T R y >= 2 w^T R y - w^T R w. So f(T) <= 1/2 w^T R w + sum over T of c_j^2 / (2 p_j), for all T
at once: a number, and a weight per element. w = 0 gives the bound by squared slopes over the least
eigenvalue, w = M^-1 b gives f of all candidates or less, and the best w is better than both.

References:
    Frangioni, Gentile, Perspective cuts for a class of convex 0-1 mixed integer programs,
    Mathematical Programming 106 (2006).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorambo_alloc.objectives import FloatArray
from lorambo_alloc.submodular.objectives import ROUNDING, Ceiling, Relaxation

STEPS = 60
_SHORTEST_STEP = 2.0**-24
_BLOCK = 256


@dataclass(frozen=True)
class Perspective:
    """The bound as a function of w, for one diagonal p.

    Attributes:
        C: n x n, symmetric and positive semidefinite.
        b: n slopes.
        rho: damping.
        p: n numbers > 0 with C + rho I >= diag(p).
    """

    C: FloatArray
    b: FloatArray
    rho: float
    p: FloatArray

    def image(self, w: FloatArray) -> FloatArray:
        """R w."""
        return self.C @ w + (self.rho - self.p) * w

    def weights(self, image: FloatArray) -> FloatArray:
        """The weight of each element, given R w."""
        slopes = self.b - image
        return slopes / (2 * self.p) * slopes

    def bound(self, w: FloatArray, image: FloatArray, within: Relaxation) -> float:
        """The bound over a constraint's sets, to rounding."""
        return 0.5 * float(w @ image) + within.heaviest(self.weights(image))

    def descend(self, starts: Sequence[FloatArray], within: Relaxation) -> FloatArray:
        """A w with a low bound, by subgradient steps from the best of some starting points.

        The bound is convex in w, with subgradient R (w - y) where y_j = z_j c_j / p_j for the
        heaviest (fractional) set z. The step goes towards y, as far as it lowers the bound.
        """
        images = [self.image(w) for w in starts]
        bounds = [self.bound(w, image, within) for w, image in zip(starts, images, strict=True)]
        best = int(np.argmin(bounds))
        w, image, bound = starts[best], images[best], bounds[best]
        for _ in range(STEPS):
            slopes = self.b - image
            aim = within.shares(self.weights(image)) * slopes / self.p - w
            aim_image = self.image(aim)
            step, found = 1.0, 0.0
            while step > _SHORTEST_STEP:
                tried = self.bound(w + step * aim, image + step * aim_image, within)
                if tried < bound:
                    bound, found = tried, step
                elif found:
                    break
                step /= 2
            if not found:
                break
            w, image = w + found * aim, image + found * aim_image
        return w

    def ceiling(self, w: FloatArray) -> Ceiling:
        """The bound's number and weights at w, each rounded up.

        R w is computed afresh; a sum of n products is within n u of the sum of their sizes.
        """
        image = self.image(w)
        size = (self.rho + self.p) * np.abs(w)
        for start in range(0, len(w), _BLOCK):  # no second matrix as large as C
            size[start : start + _BLOCK] += np.abs(self.C[start : start + _BLOCK]) @ np.abs(w)
        unit = (len(w) + 8) * ROUNDING
        error = 2 * unit * size + 2 * ROUNDING * np.abs(self.b)
        number = 0.5 * float(w @ image)
        number += float(np.abs(w) @ (error + 2 * unit * np.abs(image)))
        slopes = np.abs(self.b - image) + error
        weights = slopes / (2 * self.p) * slopes * (1 + 8 * ROUNDING)
        if not math.isfinite(number):
            return math.inf, np.zeros(len(w))
        # What underflows is far below 2^-1000; and `CoupledQuadratic` refuses gains all near it.
        return max(number, 0.0), weights + (2.0**-1000 if self.b.any() else 0.0)
