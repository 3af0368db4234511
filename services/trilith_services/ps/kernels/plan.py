"""What kernels know of a table: the columns of its `plan` (int64) and of its `segments` (int64[k, columns])."""

# plan
STRIDE = 0  # bytes from row to row
WORDS = 1  # 4-byte words in use per row
DIM = 2  # weights per row
STATE = 3  # float32 words of optimizer state per row; they follow the weights
IMAGE = 4  # address of a fresh row
RANDOM = 5  # address of float32[2, dim] spans and upper bounds of uniform columns, 0 if there are none
SEED = 6  # mixed table seed, bit-cast
CODED = 7  # whether lookup goes through codecs
SERVING = 8  # whether rows are stored compressed
SEGMENTS = 9  # how many segments
READ_WORDS = 10  # 4-byte words at the start of a row that a lookup reads
PLAN_COLUMNS = 11

# segments
SEG_DIM = 0
SEG_WEIGHT = 1  # first weight
SEG_STATE = 2  # byte offset of the state in the row
SEG_PARAMS = 3  # address of the optimizer's parameters
SEG_CODEC = 4
SEG_STORED = 5  # byte offset of the compressed weights in a serving row
SEG_CODEC_PARAMS = 6
SEGMENT_COLUMNS = 7
