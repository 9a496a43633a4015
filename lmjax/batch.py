"""What a batch holds, from the rows of the data to the loss."""

import numpy as np

# name -> dtype of an array [B, T]. segment_ids: 1.. for the documents of a row, 0 on padding. positions: from 0 in
# each document. loss_mask: how much each target counts.
FIELDS: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in (
    ("tokens", np.int32), ("targets", np.int32), ("segment_ids", np.int32), ("positions", np.int32),
    ("loss_mask", np.float32))}
