"""Verification: do two photos show one person? Error rates and thresholds over the query x gallery pairs of a test.

Two photos are taken for one person if their distance is below a threshold. The false-match rate (FMR) is the share of
pairs of different persons below it, the true-match rate (TMR) the share of pairs of one person. At the equal error rate
(EER), FMR = 1 - TMR. Only pairs under different cameras count. The terms are those of ISO/IEC 19795-1.

Distances are counted in bins, so memory does not grow with the number of pairs. A bin holds the float32 numbers that
agree in their exponent and the first 12 bits of their mantissa: it is at most BIN_WIDTH of its distances wide, and no
range has to be known in advance. Thresholds are edges of bins, and the rates at them are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligned_reid.evaluation.kernels import BIN_SHIFT, NUM_BINS, compiled

BIN_WIDTH = 2.0 ** (BIN_SHIFT - 23)  # relative to the distance
ONE_IN = (100, 1_000, 10_000)  # false-match rates 1e-2, 1e-3, 1e-4
DECIDING_RATE = "0.001"  # the false-match rate whose threshold says whether two photos show one person
ROC_POINTS = 100
VERIFIED = ("global", "global_local")  # the distances that get a curve

Counts = NDArray[np.int64]  # [2, NUM_BINS], pairs of one person and of different persons by distance


def count_pairs(
    dist: NDArray[np.float32],
    query_ids: NDArray[Any],
    gallery_ids: NDArray[Any],
    query_cams: NDArray[Any],
    gallery_cams: NDArray[Any],
) -> Counts:
    """Count distances [B, G], none negative; persons and cameras [B] and [G], integers. Counts of blocks add up."""
    bits = np.require(dist, np.float32, ("C", "W")).view(np.int32)
    labels = (np.require(one, np.int64, ("C", "W")) for one in (query_ids, gallery_ids, query_cams, gallery_cams))
    counts = np.zeros((2, NUM_BINS), np.int64)
    compiled("count_pairs")(bits, *labels, counts)
    return counts


def verification_curve(counts: Counts) -> dict[str, Any]:
    """Rates and thresholds as in results.json; null for a false-match rate of which the pairs allow no single match.

    The EER is the mean of both errors at the threshold where they are closest. Each threshold of "at_fmr" is the
    largest one that keeps the rate. "roc" has the TMR at evenly spaced logarithms of the FMR.
    """
    num_same, num_different = (int(total) for total in counts.sum(axis=1))
    at_fmr: dict[str, Any] = {f"{1 / one_in:g}": None for one_in in ONE_IN}
    if not num_same or not num_different:
        return {"eer": None, "eer_threshold": None, "at_fmr": at_fmr, "roc": {"fmr": [], "tmr": []}}
    used = np.flatnonzero(counts.any(axis=0))
    first, end = int(used[0]), int(used[-1]) + 1
    thresholds = (np.arange(first, end + 1, dtype=np.int32) << BIN_SHIFT).view(np.float32)
    below = np.pad(counts[:, first:end].cumsum(axis=1), ((0, 0), (1, 0)))  # pairs nearer than each threshold
    tmr, fmr = below[0] / num_same, below[1] / num_different
    for rate, one_in in zip(at_fmr, ONE_IN, strict=True):
        if allowed := num_different // one_in:
            place = int(np.searchsorted(below[1], allowed, side="right")) - 1
            at_fmr[rate] = {"threshold": float(thresholds[place]), "tmr": float(tmr[place])}
    equal = int(np.abs(1 - tmr - fmr).argmin())
    places = np.unique(np.searchsorted(fmr, np.geomspace(1 / num_different, 1, ROC_POINTS), side="right") - 1)
    return {
        "eer": float(1 - tmr[equal] + fmr[equal]) / 2,
        "eer_threshold": float(thresholds[equal]),
        "at_fmr": at_fmr,
        "roc": {"fmr": fmr[places].tolist(), "tmr": tmr[places].tolist()},
    }


def verification_record(counts: Mapping[str, Counts], measured_on: str) -> dict[str, Any]:
    """The entry "verification" of results.json and of weight files. counts: by distance; "global" is one of them."""
    num_same, num_different = (int(total) for total in counts["global"].sum(axis=1))
    return {
        "measured_on": measured_on,
        "num_same": num_same,
        "num_different": num_different,
        "bin_width": BIN_WIDTH,
        **{name: verification_curve(counts[name]) if name in counts else None for name in VERIFIED},
    }


def describe_curve(curve: Mapping[str, Any]) -> str:
    """The curve's figures on one line, for the log."""
    if curve["eer"] is None:
        return "no verification: pairs of one person and of different persons are needed"
    rates = (
        f"{rate}: " + (f"{at['tmr']:.2%} below {at['threshold']:.4g}" if at else "too few pairs")
        for rate, at in curve["at_fmr"].items()
    )
    equal = f"EER {curve['eer']:.2%} at {curve['eer_threshold']:.4g}"
    return f"{equal}; true matches at false-match rate {', '.join(rates)}"
