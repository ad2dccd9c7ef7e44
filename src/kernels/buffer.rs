//! Memory that kernels read and write: aligned to cache lines, and shared between threads by rule.

use std::{
    cell::Cell,
    marker::PhantomData,
    ops::{Deref, DerefMut, Range},
    slice,
};

/// Sixteen f32, one cache line and one AVX-512 register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;

/// A vector of f32 that starts on a cache line and keeps its memory when it shrinks.
///
/// A fresh allocation of some megabytes costs a page fault for every 4 KiB, which a
/// micro-batch would pay again and again; so buffers live in a workspace and only grow.
#[derive(Clone, Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
    len: usize,
}

impl Buffer {
    pub(crate) const fn new() -> Self {
        Self { lines: Vec::new(), len: 0 }
    }

    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0.0; LINE]); len.div_ceil(LINE)], len }
    }

    /// Sets the length. What the values are is not said: whoever asks writes before reading.
    pub(crate) fn resize(&mut self, len: usize) -> &mut [f32] {
        if len.div_ceil(LINE) > self.lines.len() {
            // Not grown in place, which would copy what nobody reads.
            *self = Self::new();
            *self = Self::zeroed(len);
        }
        self.len = len;
        self
    }
}

#[cfg(test)]
impl Buffer {
    /// Bytes of memory that it holds.
    pub(crate) fn allocated(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a Line is 16 f32 without padding, and `len` is at most 16 times the lines.
        unsafe { slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// A slice whose parts are written by several tasks at a time.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: it gives out memory only through `unsafe` functions, whose callers answer for races.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), borrowed: PhantomData }
    }

    /// Only to be read, by everyone, as long as any part of it is in use.
    pub(crate) fn read_only(values: &'a [f32]) -> Self {
        Self { start: values.as_ptr().cast_mut(), len: values.len(), borrowed: PhantomData }
    }

    /// A range of it, still shared.
    pub(crate) fn range(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len);
        Self { start: self.at(range.start), len: range.len(), borrowed: PhantomData }
    }

    /// The address of a value.
    pub(crate) fn at(self, index: usize) -> *mut f32 {
        assert!(index <= self.len);
        self.start.wrapping_add(index)
    }

    /// A part of the slice.
    ///
    /// # Safety
    ///
    /// As long as it is in use, nobody else may use any of its values; nor may they come from
    /// [`Shared::read_only`].
    pub(crate) unsafe fn part(self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice, as just checked; exclusive by the caller's promise.
        unsafe { slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Lends `len` values of the calling thread's own memory, whose content is not said.
///
/// Kernels pack operands there; it stays with the thread, so steady state allocates nothing.
pub(super) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        /// A stack: work inside other work finds the buffer that it found the last time.
        static SCRATCH: Cell<Vec<Buffer>> = const { Cell::new(Vec::new()) };
    }
    let pop = || {
        let mut buffers = SCRATCH.take();
        let buffer = buffers.pop().unwrap_or_default();
        SCRATCH.set(buffers);
        buffer
    };
    let push = |buffer| {
        let mut buffers = SCRATCH.take();
        buffers.push(buffer);
        SCRATCH.set(buffers);
    };
    let mut buffer = pop();
    let result = work(buffer.resize(len));
    push(buffer);
    result
}
