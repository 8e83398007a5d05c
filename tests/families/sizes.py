"""The sizes and token ids that all tiny models share."""

ROWS = 2  # of a batch, with one image each
LAYERS, VOCAB, SIDE, PATCH = 3, 160, 16, 4
PATCHES = (SIDE // PATCH) ** 2
PAD, BOS, EOS, IMAGE, VIDEO, AUDIO, FIRST_MARK = 0, 1, 2, 100, 101, 102, 103
FIRST_WORD, LAST_WORD = 5, 90
# Image features that are tokens of the vocabulary; never used in text.
CODES, FIRST_CODE, LINE_END = 8, 91, 99
