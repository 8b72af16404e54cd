"""How often does a halting rule that was certified break its bound?

    python benchmarks/reliability/certificates.py [--size 2000]

The synthetic worlds of `benchmarks/calibration.py`, in which the true risk is known, `--size` of each of its six kinds. A false certificate
is no fault as long as there are no more of them than delta promises: wrong is a kind whose rate is surely above delta, at 95 %.
"""

from __future__ import annotations

from campaign import Row, Tally, main
from scipy.stats import beta


def run(size: int, seed: int) -> Tally:
    """Calibrate so many worlds of each kind; the worlds are numbered, and need no seed."""
    from calibration import DELTA, KINDS, SIZES, measured  # the folder above is known once `campaign` is imported

    del seed
    tally, false = Tally(), 0
    for kind in KINDS:
        for queries in SIZES:
            found = measured(kind, queries, size)
            wrong = round(found["false_certified"] * size)
            at_least = float(beta.ppf(0.05, wrong, size - wrong + 1)) if wrong else 0.0  # Clopper and Pearson
            tally.check(at_least <= DELTA, f"{kind.name}, {queries} queries", f"{wrong} of {size} are false")
            tally.tried += size - 1
            false += wrong
            tally.measure(f"rate_{kind.name}_{queries}", wrong / size)
    tally.figures |= {"delta": DELTA, "false": false}
    return tally


ROW = Row(
    name="certificates",
    property="a certified halting rule breaks its bound in at most a share of delta of all calibrations",
    size=2_000,
    unit="worlds of each kind",
    run=run,
)

if __name__ == "__main__":
    main(ROW, __doc__)
