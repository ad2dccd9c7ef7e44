//! Frames and raw bytes over either twin.
//!
//! ```text
//!   frame:  size u32 LE │ size bytes          raw:  bytes, whose number the reader knows
//! ```

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

use super::{TransportError, memory, quic};

/// A bidirectional stream, in two halves that may live in different tasks. Dropping an
/// unfinished `send` half resets the stream; dropping a `recv` half tells the other end that
/// nobody reads ([`TransportError::Stopped`] there).
pub struct Stream {
    pub send: SendHalf,
    pub recv: RecvHalf,
}

/// What this end writes.
///
/// A send that fails or is cancelled leaves the other end with half a frame, so the half can't be
/// written any more; drop it, which resets the stream.
pub struct SendHalf {
    wire: SendWire,
    state: SendState,
}

pub(super) enum SendWire {
    Quic(quic::Writer),
    Memory(memory::Writer),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SendState {
    /// Between frames.
    Open,
    /// Inside a write; stays when that fails or is cancelled.
    Writing,
    Finished,
}

/// What the other end writes. Its methods are cancel-safe: bytes that had arrived when a call was
/// dropped are there for the next call of the same kind.
pub struct RecvHalf {
    wire: RecvWire,
    /// Arrived, not yet asked for; the transport's flow control bounds it.
    pending: VecDeque<Bytes>,
    /// Of the header, frame or raw bytes being collected.
    partial: Vec<u8>,
    /// Size of the frame being collected, once its header has come.
    frame_size: Option<usize>,
}

pub(super) enum RecvWire {
    Quic(quic::Reader),
    Memory(memory::Reader),
}

/// Frames up to here are copied behind their header, so that both leave in one packet.
const COALESCED_FRAME: usize = 16 << 10;

const FRAME_HEADER: usize = size_of::<u32>();

impl Stream {
    pub(super) fn new(send: SendWire, recv: RecvWire) -> Self {
        Self {
            send: SendHalf { wire: send, state: SendState::Open },
            recv: RecvHalf { wire: recv, pending: VecDeque::new(), partial: Vec::new(), frame_size: None },
        }
    }
}

impl SendHalf {
    /// Sends one frame: a `u32` length, little endian, then the bytes.
    pub async fn send_frame(&mut self, frame: &[u8]) -> Result<(), TransportError> {
        let size = u32::try_from(frame.len())
            .map_err(|_| TransportError::FrameTooLarge { size: frame.len(), limit: u32::MAX as usize })?;
        self.begin()?;
        if frame.len() <= COALESCED_FRAME {
            let whole = [&size.to_le_bytes(), frame].concat();
            self.wire.write(&whole).await?;
        } else {
            self.wire.write(&size.to_le_bytes()).await?;
            self.wire.write(frame).await?;
        }
        self.state = SendState::Open;
        Ok(())
    }

    /// Sends raw bytes.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), TransportError> {
        self.begin()?;
        self.wire.write(bytes).await?;
        self.state = SendState::Open;
        Ok(())
    }

    /// Sends raw bytes that are shared: QUIC keeps them until they have arrived, and makes no copy.
    pub async fn send_shared(&mut self, bytes: Bytes) -> Result<(), TransportError> {
        self.begin()?;
        match &mut self.wire {
            SendWire::Quic(writer) => writer.write_shared(bytes).await?,
            SendWire::Memory(writer) => writer.write(&bytes).await?,
        }
        self.state = SendState::Open;
        Ok(())
    }

    /// Says that nothing follows, and waits until the other end's transport holds every byte (or
    /// its receiver was dropped, and needs none). What was sent is then read there even if this
    /// process closes the connection or exits. It does not say that the other end has *acted*
    /// on it: that takes an answer.
    pub async fn finish(&mut self) -> Result<(), TransportError> {
        self.begin()?;
        self.state = SendState::Finished;
        match &mut self.wire {
            SendWire::Quic(writer) => writer.finish().await,
            SendWire::Memory(writer) => writer.finish().await,
        }
    }

    /// Gives the stream up: the other end sees [`TransportError::Reset`] with `code`, which says why
    /// where dropping the half (code 0) would not.
    pub fn reset(mut self, code: u32) {
        self.wire.reset(code);
        self.state = SendState::Finished;
    }

    fn begin(&mut self) -> Result<(), TransportError> {
        let reason = match self.state {
            SendState::Open => {
                self.state = SendState::Writing;
                return Ok(());
            }
            SendState::Writing => "an earlier send failed or was cancelled half-way",
            SendState::Finished => "it was finished",
        };
        Err(TransportError::NotWritable { reason })
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        if self.state != SendState::Finished {
            self.wire.reset(0);
        }
    }
}

impl SendWire {
    async fn write(&mut self, bytes: &[u8]) -> Result<(), TransportError> {
        match self {
            Self::Quic(writer) => writer.write(bytes).await,
            Self::Memory(writer) => writer.write(bytes).await,
        }
    }

    fn reset(&mut self, code: u32) {
        match self {
            Self::Quic(writer) => writer.reset(code),
            Self::Memory(writer) => writer.reset(code),
        }
    }
}

impl RecvHalf {
    /// One frame of at most `limit` bytes; `None` when the other end has finished.
    pub async fn recv_frame(&mut self, limit: usize) -> Result<Option<Vec<u8>>, TransportError> {
        let size = match self.frame_size {
            Some(size) => size,
            None => {
                if !self.collect(FRAME_HEADER).await? {
                    return match self.partial.len() {
                        0 => Ok(None),
                        got => Err(truncated(got, FRAME_HEADER)),
                    };
                }
                let size = self.partial.as_slice().get_u32_le() as usize;
                self.partial.clear();
                *self.frame_size.insert(size)
            }
        };
        if size > limit {
            return Err(TransportError::FrameTooLarge { size, limit });
        }
        if !self.collect(size).await? {
            return Err(truncated(self.partial.len(), size));
        }
        self.frame_size = None;
        Ok(Some(std::mem::take(&mut self.partial)))
    }

    /// Exactly `size` raw bytes; grows its buffer as bytes arrive, so that a forged size
    /// allocates nothing.
    pub async fn recv_bytes(&mut self, size: u64) -> Result<Vec<u8>, TransportError> {
        let wanted = usize::try_from(size)
            .map_err(|_| TransportError::FrameTooLarge { size: usize::MAX, limit: isize::MAX as usize })?;
        if !self.collect(wanted).await? {
            return Err(truncated(self.partial.len(), wanted));
        }
        Ok(std::mem::take(&mut self.partial))
    }

    /// The next raw bytes, at most `limit` (which is not 0), as they arrive; `None` when the other
    /// end has finished. For what should not be held in memory whole.
    pub async fn recv_chunk(&mut self, limit: usize) -> Result<Option<Bytes>, TransportError> {
        if !self.arrive().await? {
            return Ok(None);
        }
        Ok(Some(self.take_pending(limit)))
    }

    /// Fills `partial` up to `size` bytes; `false` when the stream ends before that.
    async fn collect(&mut self, size: usize) -> Result<bool, TransportError> {
        while self.partial.len() < size {
            if !self.arrive().await? {
                return Ok(false);
            }
            let piece = self.take_pending(size - self.partial.len());
            self.partial.extend_from_slice(&piece);
        }
        Ok(true)
    }

    /// Waits until something is pending; `false` at the end of the stream.
    async fn arrive(&mut self) -> Result<bool, TransportError> {
        if !self.pending.is_empty() {
            return Ok(true);
        }
        match &mut self.wire {
            RecvWire::Quic(reader) => reader.read(&mut self.pending).await,
            RecvWire::Memory(reader) => reader.read(&mut self.pending).await,
        }
    }

    /// At most `limit` of the bytes at the front; empty when nothing is pending.
    fn take_pending(&mut self, limit: usize) -> Bytes {
        match self.pending.front_mut() {
            Some(front) if front.len() > limit => front.split_to(limit),
            _ => self.pending.pop_front().unwrap_or_default(),
        }
    }
}

fn truncated(got: usize, expected: usize) -> TransportError {
    TransportError::Truncated { got: got as u64, expected: expected as u64 }
}
