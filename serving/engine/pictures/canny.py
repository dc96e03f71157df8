"""Edges of a picture, as ControlNets for edges take them: Canny's method, in NumPy.

As OpenCV's `Canny(picture, 100, 200)`, which those networks' training pictures were made with: Sobel gradients of the
colour that changes most, thinned along their direction, weak edges kept where they touch a strong one. Source: Canny
1986. Shape suffixes: H, W of a picture; 3 its colours.
"""

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 100, 200  # of a gradient's size, |dx| + |dy| of values from 0 to 255
_TAN_22 = 0.41421356  # below it a gradient counts as level
_AROUND = ((0, 1), (1, -1), (1, 0), (1, 1))  # half of the eight neighbours: each pair is seen once


def canny(pixels_HW3: NDArray[np.uint8], low: float = LOW, high: float = HIGH) -> NDArray[np.uint8]:
    """White edges on black, uint8 [H, W, 3], of a picture uint8 [H, W, 3]."""
    across_HW, down_HW = _gradient(pixels_HW3)
    size_HW = np.abs(across_HW) + np.abs(down_HW)
    thin_HW = _ridges(across_HW, down_HW, size_HW)
    edges_HW = _connected(thin_HW & (size_HW > low), size_HW > high)
    return np.repeat((edges_HW * np.uint8(255))[:, :, None], 3, axis=2)


def _gradient(pixels_HW3: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sobel's gradient across and down, each [H, W], of the colour whose gradient is the largest."""
    wide = np.pad(pixels_HW3.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    across_HW3 = smooth[:, 2:] - smooth[:, :-2]
    smooth = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    down_HW3 = smooth[2:] - smooth[:-2]
    most_HW1 = (np.abs(across_HW3) + np.abs(down_HW3)).argmax(axis=2)[:, :, None]
    across, down = (np.take_along_axis(one, most_HW1, axis=2)[:, :, 0] for one in (across_HW3, down_HW3))
    return across, down


def _ridges(across_HW: NDArray[np.int32], down_HW: NDArray[np.int32], size_HW: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where the gradient is the largest along its own direction, of four."""
    wide = np.pad(size_HW, 1)
    height, width = size_HW.shape

    def beside(down: int, across: int) -> NDArray[np.int32]:
        return wide[1 + down : 1 + down + height, 1 + across : 1 + across + width]

    x, y = np.abs(across_HW), np.abs(down_HW)
    level, steep = y <= _TAN_22 * x, x <= _TAN_22 * y
    falls = (across_HW < 0) == (down_HW < 0)  # along the diagonal from the upper left
    found = np.zeros(size_HW.shape, bool)
    for chosen, (down, across) in (
        (level, (0, 1)),
        (steep & ~level, (1, 0)),
        (falls & ~level & ~steep, (1, 1)),
        (~falls & ~level & ~steep, (1, -1)),
    ):
        found |= chosen & (size_HW > beside(-down, -across)) & (size_HW >= beside(down, across))
    return found


def _connected(weak_HW: NDArray[np.bool_], strong_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The weak pixels that a path of weak pixels leads to from a strong one.

    Components by hooking and shortcutting (FastSV, Zhang et al. 2020): few rounds, however long the path is.
    """
    places = np.full(weak_HW.shape, -1)
    places[weak_HW] = np.arange(np.count_nonzero(weak_HW))
    ends = [_pairs(places, down, across) for down, across in _AROUND]
    first, second = (np.concatenate(one) for one in zip(*ends, strict=True))
    parents = np.arange(np.count_nonzero(weak_HW))
    while True:
        above = parents[parents]
        after = above.copy()
        for one, other in ((first, second), (second, first)):
            np.minimum.at(after, parents[one], above[other])
            np.minimum.at(after, one, above[other])
        if np.array_equal(after, parents):
            break
        parents = after
    kept = np.zeros(len(parents), bool)
    kept[parents[strong_HW[weak_HW]]] = True
    edges_HW = np.zeros(weak_HW.shape, bool)
    edges_HW[weak_HW] = kept[parents]
    return edges_HW


def _pairs(places_HW: NDArray[np.int64], down: int, across: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The neighbours in one direction that are both weak."""
    height, width = places_HW.shape
    one = places_HW[: height - down, max(0, -across) : width - max(0, across)]
    other = places_HW[down:, max(0, across) : width - max(0, -across)]
    both = (one >= 0) & (other >= 0)
    return one[both], other[both]
