"""Row-sparse pushes: only those rows of the gradient of an embedding are sent whose tokens occur in the batch.

All other rows are zero. The values decide which leaves are sent in this way, so a model need not declare them. A dense
gradient, for example of an embedding that is tied to the output layer, is sent whole. The server adds the same numbers
in both cases.
"""

import numpy as np

from jaxdist.paramserver.protocol.messages import Piece, Rows

LEAST_ROWS = 16
"""Blocks with fewer rows are always sent whole: an embedding has more rows."""
_SAMPLE = 64


def sparse(piece: np.ndarray, row: int) -> Piece:
    """Return the nonzero rows of a flat block, of `row` elements each; the whole block unless most rows are zero."""
    if row < 2 or piece.size < LEAST_ROWS * row:
        return piece
    rows = piece.reshape(-1, row)
    # A sample of the rows first: for a dense block this saves a pass over all of it.
    if 2 * np.count_nonzero(rows[:: max(len(rows) // _SAMPLE, 1)].any(axis=1)) > _SAMPLE:
        return piece
    ids = np.flatnonzero(rows.any(axis=1))
    return piece if 2 * len(ids) > len(rows) else Rows(ids, rows[ids])
