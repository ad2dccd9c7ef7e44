//! Copies between the host's memory and a GPU's, through two buffers that the GPU reaches by itself (pinned): while it
//! copies one piece, the host copies the other. From memory that isn't pinned the driver does the same with pieces of its
//! own, one at a time.
//!
//! ```text
//!   GPU    ──piece 0─►│A│  ──piece 1─►│B│  ──piece 2─►│A│
//!   host                   A ──► out       B ──► out       A ──► out
//! ```

/// Two buffers of one size, and a queue of copies between them and one place in the GPU's memory.
pub(super) trait Lane {
    type Error;

    /// Waits until no copy reads or writes the buffer.
    fn buffer(&mut self, which: usize) -> Result<&mut [u8], Self::Error>;

    /// Queues a copy of `len` bytes from the GPU's memory, at `from`, to the beginning of the buffer. Nothing else is queued
    /// for it.
    fn fetch(&mut self, which: usize, from: usize, len: usize) -> Result<(), Self::Error>;

    /// Queues the copy the other way.
    fn deliver(&mut self, which: usize, to: usize, len: usize) -> Result<(), Self::Error>;
}

/// Fills `out` with what stands in the GPU's memory from `from` on.
pub(super) fn download<L: Lane>(lane: &mut L, from: usize, out: &mut [u8]) -> Result<(), L::Error> {
    let size = lane.buffer(0)?.len();
    // The second must be idle, too: an upload may still be reading it.
    lane.buffer(1)?;
    let pieces = out.len().div_ceil(size);
    let len = |piece: usize, whole: usize| size.min(whole - piece * size);
    let whole = out.len();
    if pieces > 0 {
        lane.fetch(0, from, len(0, whole))?;
    }
    for (piece, out) in out.chunks_mut(size).enumerate() {
        let next = piece + 1;
        if next < pieces {
            lane.fetch(next % 2, from + next * size, len(next, whole))?;
        }
        out.copy_from_slice(&lane.buffer(piece % 2)?[..out.len()]);
    }
    Ok(())
}

/// Writes `bytes` into the GPU's memory from `to` on. Returns once they are read; the last pieces may still be on their way.
pub(super) fn upload<L: Lane>(lane: &mut L, to: usize, bytes: &[u8]) -> Result<(), L::Error> {
    let size = lane.buffer(0)?.len();
    for (piece, bytes) in bytes.chunks(size).enumerate() {
        lane.buffer(piece % 2)?[..bytes.len()].copy_from_slice(bytes);
        lane.deliver(piece % 2, to + piece * size, bytes.len())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A GPU that does nothing before it is waited for, and then what it was asked, in order.
    struct Vectors {
        memory: Vec<u8>,
        buffers: [Vec<u8>; 2],
        queue: Vec<Copy>,
        /// Buffers waited for with the other one's copy still queued.
        overlaps: usize,
    }

    #[derive(Clone, Copy, PartialEq)]
    struct Copy {
        which: usize,
        at: usize,
        len: usize,
        is_fetch: bool,
    }

    impl Vectors {
        fn new(memory: Vec<u8>, size: usize) -> Self {
            Self { memory, buffers: [vec![0; size], vec![0; size]], queue: Vec::new(), overlaps: 0 }
        }

        fn queue(&mut self, copy: Copy) {
            assert!(copy.len <= self.buffers[copy.which].len() && copy.at + copy.len <= self.memory.len());
            assert!(self.queue.iter().all(|other| other.which != copy.which), "one copy a buffer");
            self.queue.push(copy);
        }

        fn perform(&mut self, Copy { which, at, len, is_fetch }: Copy) {
            let (memory, buffer) = (&mut self.memory[at..at + len], &mut self.buffers[which][..len]);
            match is_fetch {
                true => buffer.copy_from_slice(memory),
                false => memory.copy_from_slice(buffer),
            }
        }
    }

    impl Lane for Vectors {
        type Error = Infallible;

        fn buffer(&mut self, which: usize) -> Result<&mut [u8], Infallible> {
            if let Some(until) = self.queue.iter().position(|copy| copy.which == which) {
                let done: Vec<Copy> = self.queue.drain(..=until).collect();
                done.into_iter().for_each(|copy| self.perform(copy));
                self.overlaps += usize::from(!self.queue.is_empty());
            }
            Ok(&mut self.buffers[which])
        }

        fn fetch(&mut self, which: usize, at: usize, len: usize) -> Result<(), Infallible> {
            self.queue(Copy { which, at, len, is_fetch: true });
            Ok(())
        }

        fn deliver(&mut self, which: usize, at: usize, len: usize) -> Result<(), Infallible> {
            self.queue(Copy { which, at, len, is_fetch: false });
            Ok(())
        }
    }

    fn bytes(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|i| ((i * 31 + seed * 7) % 251) as u8).collect()
    }

    #[test]
    fn every_byte_arrives_whatever_the_pieces() {
        for len in [0, 1, 7, 8, 9, 16, 17, 40, 61] {
            for from in [0, 3] {
                let mut lane = Vectors::new(bytes(len + from, 1), 8);
                let mut out = vec![0; len];
                download(&mut lane, from, &mut out).unwrap();
                assert_eq!(out, lane.memory[from..], "{len} bytes down");
                assert!(lane.queue.is_empty(), "nothing is on its way any more");
                // The host copies every piece but the last while the next one comes.
                assert_eq!(lane.overlaps, len.div_ceil(8).saturating_sub(1));

                let sent = bytes(len, 2);
                upload(&mut lane, from, &sent).unwrap();
                // A download waits for what an upload has left.
                download(&mut lane, from, &mut out).unwrap();
                assert_eq!(out, sent, "{len} bytes up");
                assert_eq!(lane.memory[..from], bytes(len + from, 1)[..from], "and nowhere else");
            }
        }
    }

    #[test]
    fn uploads_in_a_row_do_not_overwrite_what_is_on_its_way() {
        let mut lane = Vectors::new(vec![0; 64], 8);
        let (first, second) = (bytes(20, 3), bytes(12, 4));
        upload(&mut lane, 0, &first).unwrap();
        upload(&mut lane, 20, &second).unwrap();
        let mut out = vec![0; 32];
        download(&mut lane, 0, &mut out).unwrap();
        assert_eq!(out, [first, second].concat());
    }
}
