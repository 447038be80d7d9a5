"""How many numbers the sketches of a layer's gradient take."""

from __future__ import annotations

from lorambo_adapters.spectra.sketch import PROBES, two_sided_widths


def is_summed_exactly(shape: tuple[int, int], width: int, passes: int) -> bool:
    """Whether a layer's gradient takes no more numbers than its sketch would."""
    return shape[0] * shape[1] <= sum(shape) * (2 * width if passes > 1 else width)


def gaussian_columns(width: int, passes: int) -> tuple[int, int]:
    """How many columns of Gaussian numbers are drawn for the inputs' and the outputs' side."""
    if passes == 1:
        columns = two_sided_widths(width)[1]
        return columns, columns
    if passes % 2 == 1:
        return 2 * width + PROBES, 0
    return 2 * width, PROBES


def sketch_numbers(shape: tuple[int, int], width: int, passes: int) -> list[int]:
    """How many numbers a layer's sketch holds in each pass, without a whitening.

    Those of a gradient that is summed exactly; else, of s = width: the sums of a two-sided sketch;
    or in each of several passes the 2 s sums, the basis of the pass before where there is one, and
    in the last pass the sums and test vectors with 8 columns more.
    """
    d, k = shape
    if is_summed_exactly(shape, width, passes):
        return [d * k] * passes
    if passes == 1:
        narrow, wide = two_sided_widths(width)
        return [max(shape) * narrow + min(shape) * wide]
    numbers: list[int] = []
    for number in range(1, passes + 1):
        tested, summed = (k, d) if number % 2 == 1 else (d, k)
        held = 2 * width * (summed + (tested if number > 1 else 0))
        if number == passes:
            held += (2 * width + PROBES) * tested + PROBES * summed
        numbers.append(held)
    return numbers
