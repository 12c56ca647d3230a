"""What the CUDA kernels promise: see `fusedattn.testing.check_attention`."""

from fusedattn.testing import EVERYTHING

PORTABLE = EVERYTHING - {"full_range"}
# The matrix unit multiplies 0 by a NaN that another row sees, and takes weights in a half type.
HOPPER = (PORTABLE - {"hidden_nan"}) | {"half_weights"}
# The exact kernel takes plain problems; it splits its weights and rounds them to no half type.
FEATURES = {"mask", "bias", "alibi_slopes", "softcap", "sinks", "dropout_p", "seed"}
EXACT = HOPPER - FEATURES - {"score_mod", "score_mod_aux", "block_mask", "half_weights"}
