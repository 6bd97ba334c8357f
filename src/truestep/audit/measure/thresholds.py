"""The limits that decide a verdict. Held by: tests/audit/test_thresholds.py, on both sides of each."""

NOISE_FLOOR = 1e-6  # relative; below this, the noise is the summation order of a float32 computation
NOISE_FACTOR = 10.0  # the error of a correct step is at most this many times the measured noise
RESIDUAL = {
    "float64": 1e-6,
    "float32": 1e-4,
    "bfloat16": 1e-4,
}  # beyond this the step contains something else
WEIGHT = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.02}  # error of a weight
CAST = 0.2  # relative error of a step whose losses are cast to a narrower dtype; weights tell more beyond it
STANDARD_ERRORS = 5.0  # by which a weight may be off
KNOWN_FACTOR = 0.002  # relative: a constant this close to a known factor is that factor
CLOSE = 0.01  # relative: two lengths, rates or weights this close are the same
FIT_OF_CLIPPED_PARTS = 0.005  # relative error of a step that a clip of its parts predicts
ILL_CONDITIONED = 1e3  # beyond this, individual weights are meaningless
ADAMW_ERROR = 1e-2  # relative; entries whose gradient is noise move by a full step in a random direction
RANKS_EQUAL = 1e-6  # difference of a parameter between two ranks
RESTORED = 1e-6  # difference of a parameter before and after a checkpoint
LOSS = 0.02  # relative: a logged loss this far off could have shown the fault
EXPLAINED = 20.0  # an added column must shrink the residual by this factor
CLIPPED_SHARE = 0.01  # share of entries at the largest value; a smooth gradient has one such entry
UNMOVED = 1e-3  # share of the gradient norm; a tensor above this that does not move is not in the optimizer
SMALL_UPDATE = 2.0**-7  # relative to its parameter; bfloat16 may lose an update this small
VISIBLE_UPDATE = 2.0**-20  # relative to its parameter; smaller updates are lost in float32 too
LOST_UPDATES = 0.01  # share of the visible updates; fewer lost updates may be chance
# Shares: of the lost updates, those that are small; of the small updates, those that are lost.
LOST_ARE_SMALL, SMALL_ARE_LOST = 0.95, 0.3
