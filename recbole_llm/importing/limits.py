"""How much of a file is held at once: a small file must not ask for much memory, whatever it says about itself."""

# bytes that are read at once; 1 MiB took pyarrow 1.3 times as long
BLOCK_BYTES = 1 << 22
# bytes that are read at once to find the header
HEADER_BYTES = 1 << 16
# of JSON less: as Python objects a line takes up to forty times its size
JSON_BLOCK_BYTES = 1 << 20
# characters of a line and of a cell; a longer one is more likely an unclosed quote, or no text, than a description
MAX_RECORD = 1 << 22
# characters of a row of many lines: cells may hold line breaks
MAX_UNFINISHED = 1 << 24
# each column costs about a third of a millisecond for every batch of rows
MAX_COLUMNS = 4096
# characters of a column's name; a longer one is a row, and the header is missing
MAX_NAME = 500
# characters of an error's message; of a longer one the middle is left out
MAX_MESSAGE = 2000
# gzip makes texts 3 to 30 times smaller, and zeros 1,000 times
MAX_EXPANSION = 100
# bytes that may come out of a compressed file before its expansion is looked at
FREE_EXPANSION = 1 << 26
# rows of a Parquet file for each of its bytes, where it has more than FREE_ROWS
MAX_ROWS_PER_BYTE = 10
FREE_ROWS = 1_000_000
