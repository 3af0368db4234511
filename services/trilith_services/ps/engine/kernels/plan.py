"""What kernels know of a table: the columns of its `plan` (int64) and of its `segments` (int64[k, columns])."""

# plan
WORDS = 0  # 4-byte words of a row's weights
DIM = 1  # weights per row
STATE = 2  # float32 words of optimizer state per row
IMAGE = 3  # address of a fresh row: its weights, then its state
RANDOM = 4  # address of float32[2, dim] spans and upper bounds of uniform columns, 0 if there are none
SEED = 5  # mixed table seed, bit-cast
CODED = 6  # whether lookup goes through codecs
SERVING = 7  # whether rows are stored compressed
SEGMENTS = 8  # how many segments
PLAN_COLUMNS = 9

# segments
SEG_DIM = 0
SEG_WEIGHT = 1  # first weight
SEG_STATE = 2  # byte offset in the row's state
SEG_PARAMS = 3  # address of the optimizer's parameters
SEG_CODEC = 4
SEG_STORED = 5  # byte offset of the compressed weights in a serving row
SEG_CODEC_PARAMS = 6
SEGMENT_COLUMNS = 7
