//! One rank: micro-batches, reduce, prepare and commit, snapshot, publish.
