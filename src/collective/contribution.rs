//! What a rank says before its numbers: which call they belong to, and which nodes of the tree
//! they are. The same header stands in a shared-memory segment and in a frame over QUIC.
//!
//! ```text
//!   magic │ operation │ round │ run │ epoch │ generation │ seq │ incarnation │ leaves │ len │ count
//!   then `count` times: level u32 │ index u32                       (all others u64; little endian)
//! ```

use std::time::Instant;

use super::{CollectiveError, TreeError};
use crate::{
    protocol::{Epoch, Generation, OpToken, OperationSeq, RankIndex},
    types::RunId,
};

/// Which method of [`Collective`](super::Collective).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    AllReduce,
    AllGather,
}

/// One call, as its errors name it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub method: Method,
    pub token: OpToken,
    pub deadline: Instant,
}

/// What one rank contributes to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub method: Method,
    /// Counts the calls of this collective, from 1: tells the calls of one operation apart.
    pub round: u64,
    pub token: OpToken,
    pub leaves: u32,
    /// Values of a vector, or gathered bytes of this rank.
    pub len: u64,
    /// `(level, index)` of each partial sum that follows.
    pub nodes: Vec<(u32, u32)>,
}

const MAGIC: u64 = u64::from_le_bytes(*b"lkstcol1");

/// Bytes before the nodes.
pub(super) const FIXED_HEADER: usize = 11 * 8;

/// Partial sums of one rank in one call: a contiguous range has at most two a level (64); anything
/// up to a leaf each of the largest batch is taken.
const MAX_NODES: usize = 1 << 16;

/// Largest header in bytes.
pub(super) const MAX_HEADER: usize = FIXED_HEADER + MAX_NODES * 8;

/// Bytes of one rank in one `all_gather`.
pub(super) const MAX_GATHERED: u64 = 1 << 30;

impl Method {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
        }
    }

    fn number(self) -> u64 {
        match self {
            Self::AllReduce => 1,
            Self::AllGather => 2,
        }
    }
}

impl Call {
    pub(super) fn timed_out(&self, missing: RankIndex) -> CollectiveError {
        CollectiveError::Deadline { operation: self.method.name(), token: self.token, missing }
    }

    pub(super) fn lost(&self, missing: RankIndex, reason: impl ToString) -> CollectiveError {
        let reason = reason.to_string();
        CollectiveError::Lost { operation: self.method.name(), token: self.token, missing, reason }
    }

    pub(super) fn mismatch(&self, rank: RankIndex, problem: impl ToString) -> CollectiveError {
        let problem = problem.to_string();
        CollectiveError::Mismatch { operation: self.method.name(), token: self.token, rank, problem }
    }

    pub(super) fn no_tree(&self, error: TreeError) -> CollectiveError {
        CollectiveError::NoTree { operation: self.method.name(), token: self.token, error }
    }

    pub(super) fn aborted(&self) -> CollectiveError {
        CollectiveError::Aborted { operation: self.method.name(), token: self.token }
    }

    pub(super) fn used_up(&self) -> CollectiveError {
        CollectiveError::UsedUp { operation: self.method.name(), token: self.token }
    }

    pub(super) fn system(&self, problem: impl ToString) -> CollectiveError {
        let problem = problem.to_string();
        CollectiveError::System { operation: self.method.name(), token: self.token, problem }
    }
}

impl Header {
    /// Refuses what no reader would take.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, String> {
        self.check_bounds()?;
        let mut bytes = Vec::with_capacity(FIXED_HEADER + self.nodes.len() * 8);
        let OpToken { run, epoch, generation, seq, incarnation } = self.token;
        for word in [
            MAGIC,
            self.method.number(),
            self.round,
            run.0,
            epoch.0,
            generation.0.into(),
            seq.0,
            incarnation.into(),
            self.leaves.into(),
            self.len,
            self.nodes.len() as u64,
        ] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for (level, index) in &self.nodes {
            bytes.extend_from_slice(&level.to_le_bytes());
            bytes.extend_from_slice(&index.to_le_bytes());
        }
        Ok(bytes)
    }

    /// How many bytes of nodes follow the fixed part.
    pub(super) fn nodes_size(fixed: &[u8; FIXED_HEADER]) -> Result<usize, String> {
        match u64::from_le_bytes(fixed[FIXED_HEADER - 8..].try_into().expect("a slice of eight bytes")) {
            count if count <= MAX_NODES as u64 => Ok(count as usize * 8),
            count => Err(format!("{count} partial sums are over the limit of {MAX_NODES}")),
        }
    }

    /// Reads what [`Header::to_bytes`] wrote.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let fixed: &[u8; FIXED_HEADER] =
            bytes.first_chunk().ok_or_else(|| format!("a header of {} bytes is cut off", bytes.len()))?;
        let nodes = &bytes[FIXED_HEADER..];
        if nodes.len() != Self::nodes_size(fixed)? {
            return Err(format!("a header of {} bytes has the wrong size", bytes.len()));
        }
        let (words, _) = fixed.as_chunks::<8>();
        let word = |i: usize| u64::from_le_bytes(words[i]);
        let narrow =
            |i: usize| u32::try_from(word(i)).map_err(|_| format!("word {i} of a header is {}", word(i)));
        if word(0) != MAGIC {
            return Err("no header of a collective".into());
        }
        let method = [Method::AllReduce, Method::AllGather]
            .into_iter()
            .find(|method| method.number() == word(1))
            .ok_or_else(|| format!("unknown operation {}", word(1)))?;
        let header = Self {
            method,
            round: word(2),
            token: OpToken {
                run: RunId(word(3)),
                epoch: Epoch(word(4)),
                generation: Generation(narrow(5)?),
                seq: OperationSeq(word(6)),
                incarnation: narrow(7)?,
            },
            leaves: narrow(8)?,
            len: word(9),
            nodes: nodes
                .as_chunks::<4>()
                .0
                .chunks_exact(2)
                .map(|n| (u32::from_le_bytes(n[0]), u32::from_le_bytes(n[1])))
                .collect(),
        };
        header.check_bounds()?;
        Ok(header)
    }

    fn check_bounds(&self) -> Result<(), String> {
        if self.nodes.len() > MAX_NODES {
            return Err(format!("{} partial sums are over the limit of {MAX_NODES}", self.nodes.len()));
        }
        if self.method == Method::AllGather && self.len > MAX_GATHERED {
            return Err(format!("{} gathered bytes are over the limit of {MAX_GATHERED}", self.len));
        }
        Ok(())
    }

    /// Whether `theirs` belongs to the same call and vectors as `self`.
    pub(super) fn check_fits(&self, theirs: &Self) -> Result<(), String> {
        if theirs.token != self.token {
            return Err(format!("it is for {}", theirs.token));
        }
        if (theirs.method, theirs.round) != (self.method, self.round) {
            return Err(format!(
                "it is for call {} ({}) instead of call {} ({})",
                theirs.round,
                theirs.method.name(),
                self.round,
                self.method.name()
            ));
        }
        if self.method == Method::AllReduce && (theirs.leaves, theirs.len) != (self.leaves, self.len) {
            return Err(format!(
                "it has {} leaves of {} values instead of {} of {}",
                theirs.leaves, theirs.len, self.leaves, self.len
            ));
        }
        if self.method == Method::AllReduce && theirs.nodes.len() > self.leaves as usize {
            return Err(format!("it has {} partial sums of {} leaves", theirs.nodes.len(), self.leaves));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            method: Method::AllReduce,
            round: 7,
            token: OpToken {
                run: RunId(1),
                epoch: Epoch(2),
                generation: Generation(3),
                seq: OperationSeq(4),
                incarnation: 5,
            },
            leaves: 6,
            len: 5_000_000,
            nodes: vec![(1, 0), (0, 2)],
        }
    }

    #[test]
    fn a_header_reads_back() {
        for header in [header(), Header { method: Method::AllGather, nodes: vec![], ..header() }] {
            assert_eq!(Header::from_bytes(&header.to_bytes().unwrap()), Ok(header));
        }
    }

    #[test]
    fn every_cut_and_every_forged_field_is_refused() {
        let bytes = header().to_bytes().unwrap();
        for cut in 0..bytes.len() {
            Header::from_bytes(&bytes[..cut]).unwrap_err();
        }
        Header::from_bytes(&[&bytes[..], &[0]].concat()).unwrap_err();
        // Magic, operation, the high halves of generation, incarnation and leaves, count.
        for (at, value) in [(0, 9), (8, 3), (44, 1), (60, 1), (68, 1), (80, 3), (87, 1)] {
            let mut forged = bytes.clone();
            forged[at] = value;
            Header::from_bytes(&forged).unwrap_err();
        }
        let oversized = Header { method: Method::AllGather, len: MAX_GATHERED + 1, ..header() };
        oversized.to_bytes().unwrap_err();
    }

    #[test]
    fn another_call_or_shape_does_not_fit() {
        let mine = header();
        assert_eq!(mine.check_fits(&Header { nodes: vec![(0, 3)], ..header() }), Ok(()));
        let stale = OpToken { seq: OperationSeq(3), ..header().token };
        for theirs in [
            Header { token: stale, ..header() },
            Header { round: 6, ..header() },
            Header { method: Method::AllGather, ..header() },
            Header { leaves: 5, ..header() },
            Header { len: 4_999_999, ..header() },
            Header { nodes: vec![(0, 0); 7], ..header() },
        ] {
            mine.check_fits(&theirs).unwrap_err();
        }
    }
}
