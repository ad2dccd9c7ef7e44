//! Memory that kernels read and write: aligned to cache lines, and shared between threads by rule.

use std::ops::{Deref, DerefMut};

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
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0.0; LINE]); len.div_ceil(LINE)], len }
    }

    /// Sets the length. What the values are is not said: whoever asks writes before reading.
    pub(crate) fn resize(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(LINE);
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0.0; LINE]));
        }
        self.len = len;
        self
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: a Line is 16 f32 without padding, and `len` is at most 16 times the lines.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}
