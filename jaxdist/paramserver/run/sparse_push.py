"""Row-sparse pushes: the gradient of an embedding is zero but in the rows of the tokens that came up, and only they go.

Which leaves those are is seen in the values, so no model has to say it, and an embedding whose gradient is dense (one
that is tied to the output layer, say) goes as it is. The server adds up the same numbers either way.
"""

import numpy as np

from jaxdist.paramserver.protocol.messages import Piece, Rows

LEAST_ROWS = 16
"""Blocks of fewer rows are not looked at: an embedding has more."""
_SAMPLE = 64


def sparse(piece: np.ndarray, row: int) -> Piece:
    """Return the rows of a flat block that are not zero, of `row` elements each; all of it unless most rows are."""
    if row < 2 or piece.size < LEAST_ROWS * row:
        return piece
    rows = piece.reshape(-1, row)
    # A look at a few rows first: a dense block is not worth a pass over all of it.
    if 2 * np.count_nonzero(rows[:: max(len(rows) // _SAMPLE, 1)].any(axis=1)) > _SAMPLE:
        return piece
    ids = np.flatnonzero(rows.any(axis=1))
    return piece if 2 * len(ids) > len(rows) else Rows(ids, rows[ids])
