"""Every limit that decides a verdict. Held by: tests/audit/test_thresholds.py, each from both sides."""

NOISE_FLOOR = 1e-6  # relative; below this a float32 path's own order of summation is the noise
NOISE_FACTOR = 10.0  # the error of a right step is at most this many times the measured noise
RESIDUAL = {"float64": 1e-6, "float32": 2e-3, "bfloat16": 0.2}  # beyond this something else is in the step
WEIGHT = {"float64": 1e-6, "float32": 5e-3, "bfloat16": 0.15}  # of a weight; real faults start at 6e-2
STANDARD_ERRORS = 5.0  # that a weight may be off
KNOWN_FACTOR = 0.002  # relative: a constant this close to a known factor is that factor
CLOSE = 0.01  # relative: two lengths, rates or weights are the same
FIT_OF_CLIPPED_PARTS = 0.005  # relative error of a step that a clip of its parts predicts
ILL_CONDITIONED = 1e3  # beyond this single weights mean nothing
ADAMW_ERROR = 1e-2  # relative; entries whose gradient is noise move by a full step in a random direction
RANKS_EQUAL = 1e-6  # difference of a parameter between two ranks
RESTORED = 1e-6  # difference of a parameter before and after a checkpoint
LOSS = 0.02  # relative: a logged loss this far off could have shown the fault
EXPLAINED = 20.0  # an added column must shrink the residual by this factor
CLIPPED_SHARE = 0.01  # of the entries at the very largest value: a smooth gradient has one
UNMOVED = 1e-3  # of the gradient's norm: a tensor with more that does not move is not the optimizer's
SMALL_UPDATE = 2.0**-7  # of its parameter: what half of bfloat16's digits cannot hold
VISIBLE_UPDATE = 2.0**-20  # of its parameter: less is lost in float32 too
LOST_UPDATES = 0.01  # share of the visible updates: fewer lost ones are chance
LOST_ARE_SMALL, SMALL_ARE_LOST = 0.95, 0.3  # shares: the small ones are lost, and hardly anything else is
