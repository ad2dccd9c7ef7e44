//! Launches of the kernels in kernels/: shapes are checked here, arithmetic is there.
//!
//! Each operation names first what it reads. T is the element type of activations, f32 or bf16;
//! legend of shapes as in kernels/base.cu.

mod head;

#[cfg(test)]
pub(super) use head::CHUNK;
pub(crate) use head::{RowDraw, RowStatistics, TargetRows};

use super::{Array, Element, Gpu, GpuError, device::Argument};

/// Positions of a page of keys and values.
pub(crate) const PAGE: usize = 32;

/// Widest head that the kernels of attention have room for.
pub(crate) const MAX_HEAD_DIM: usize = 128;

/// Rows, query heads of a group times positions, of a tile of attention; so a group has at most as
/// many heads as a tile of the backward.
pub(crate) const FORWARD_ROWS: usize = 32;
pub(crate) const BACKWARD_ROWS: usize = 16;

/// Positions of a tile of keys in the backward.
pub(crate) const BACKWARD_KEYS: usize = 16;

/// Threads of a block; blocks that sum have a power of two.
const THREADS: usize = 256;

/// How many heads of which width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadShape {
    /// Query heads that share a key head.
    pub group: usize,
    pub keys: usize,
    pub dim: usize,
}

/// The rows of a batch by sequence, and cut into tiles: sequence and offset from its first row.
pub(crate) struct Spans {
    pub first_row: Array,
    pub rows: Array,
    pub start: Array,
    /// Tiles of [`FORWARD_ROWS`], [`BACKWARD_ROWS`] and [`BACKWARD_KEYS`].
    pub forward: [Array; 2],
    pub backward: [Array; 2],
    pub keys: [Array; 2],
}

/// Where keys and values lie: the addresses from which `table` counts, in elements.
#[derive(Clone)]
pub(crate) struct Pages {
    pub keys: u64,
    pub values: u64,
    /// `[sequences, per_sequence]`
    pub table: Array,
    pub per_sequence: usize,
}

/// What attention's backward reads and writes; all T but `lse`.
pub(crate) struct AttentionBackward<'a> {
    pub q: &'a Array,
    pub out: &'a Array,
    pub d_out: &'a Array,
    /// f32, `[r, query heads]`.
    pub lse: &'a Array,
    pub dq: &'a Array,
    pub dk: &'a Array,
    pub dv: &'a Array,
}

impl From<&Array> for Argument {
    fn from(array: &Array) -> Self {
        Self::U64(array.address())
    }
}

impl From<u32> for Argument {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<u64> for Argument {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}

/// The arguments of a kernel, in its order.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$(Argument::from($argument)),*] };
}
use arguments;

impl HeadShape {
    fn arguments(self) -> [Argument; 3] {
        [self.group, self.keys, self.dim].map(|size| Argument::U32(size as u32))
    }
}

impl Spans {
    fn arguments(&self, tiles: &[Array; 2]) -> [Argument; 5] {
        [&self.first_row, &self.rows, &self.start, &tiles[0], &tiles[1]].map(Argument::from)
    }
}

impl Pages {
    fn arguments(&self) -> [Argument; 4] {
        [self.keys.into(), self.values.into(), (&self.table).into(), (self.per_sequence as u32).into()]
    }
}

/// What T is, by an array of it.
fn named(kernel: &str, array: &Array) -> String {
    format!("{kernel}_{}", array.element().name())
}

/// Threads for a sum over `width` values.
fn threads_for(width: usize) -> usize {
    width.next_power_of_two().clamp(32, THREADS)
}

impl Gpu {
    /// One launch with a thread for each of `n` values; the last argument is their number.
    ///
    /// # Safety
    ///
    /// As of [`Gpu::launch`].
    unsafe fn each(&self, kernel: &str, n: usize, arguments: &[Argument]) -> Result<(), GpuError> {
        let arguments = [arguments, &[Argument::U64(n as u64)]].concat();
        // SAFETY: by the caller's promise.
        unsafe { self.launch(kernel, [n.div_ceil(THREADS), 1], THREADS, &arguments) }
    }

    /// `x[r, d]`, f32: the rows of `table` that the tokens name.
    pub(crate) fn embed(&self, table: &Array, tokens: &Array, width: usize) -> Result<Array, GpuError> {
        let x = self.array(Element::F32, tokens.len() * width)?;
        let arguments = arguments![table, tokens, &x, width as u32];
        // SAFETY: a row for each token; whoever calls has checked that tokens are in the table.
        unsafe { self.launch(&named("embed", table), [tokens.len(), 1], THREADS, arguments) }?;
        Ok(x)
    }

    /// The named rows of `from`, end to end.
    pub(crate) fn gather(&self, from: &Array, rows: &Array, width: usize) -> Result<Array, GpuError> {
        let to = self.array(from.element(), rows.len() * width)?;
        let arguments = arguments![from, rows, &to, width as u32];
        // SAFETY: a row for each index; whoever calls has checked that the rows exist.
        unsafe { self.launch(&named("gather", from), [rows.len(), 1], THREADS, arguments) }?;
        Ok(to)
    }

    /// Writes the rows of `from` to the named rows of `to`.
    pub(crate) fn scatter(
        &self,
        from: &Array,
        rows: &Array,
        to: &Array,
        width: usize,
    ) -> Result<(), GpuError> {
        assert_eq!((from.len(), from.element()), (rows.len() * width, to.element()));
        let arguments = arguments![from, rows, to, width as u32];
        // SAFETY: as in `gather`.
        unsafe { self.launch(&named("scatter", from), [rows.len(), 1], THREADS, arguments) }
    }

    /// f32 values as T; the same array if that is f32.
    pub(crate) fn rounded(&self, x: &Array, element: Element) -> Result<Array, GpuError> {
        assert_eq!(x.element(), Element::F32);
        if element == Element::F32 {
            return Ok(x.clone());
        }
        let y = self.array(element, x.len())?;
        // SAFETY: both have these values.
        unsafe { self.each(&named("round", &y), x.len(), arguments![x, &y]) }?;
        Ok(y)
    }

    /// `a + b`, f32, of `a` in f32 and `b` in T.
    pub(crate) fn sum(&self, a: &Array, b: &Array) -> Result<Array, GpuError> {
        assert_eq!((a.element(), a.len()), (Element::F32, b.len()));
        let sum = self.array(Element::F32, a.len())?;
        // SAFETY: all have these values.
        unsafe { self.each(&named("add", b), a.len(), arguments![a, b, &sum]) }?;
        Ok(sum)
    }

    /// Adds f32 `bias` to every row of `y`.
    pub(crate) fn add_bias(&self, bias: &Array, y: &Array) -> Result<(), GpuError> {
        assert!(y.len().is_multiple_of(bias.len()));
        // SAFETY: every index is taken modulo the bias's length.
        unsafe { self.each(&named("add_bias", y), y.len(), arguments![y, bias, bias.len() as u32]) }
    }

    /// The norm of each row of f32 `x`, in T.
    pub(crate) fn rms_norm(
        &self,
        x: &Array,
        weight: &Array,
        eps: f32,
        element: Element,
    ) -> Result<Array, GpuError> {
        assert_eq!(x.element(), Element::F32);
        let y = self.array(element, x.len())?;
        self.norm("rms_norm", x, weight, eps, y)
    }

    /// The norm of each head of `x`, T.
    pub(crate) fn head_norm(&self, x: &Array, weight: &Array, eps: f32) -> Result<Array, GpuError> {
        let y = self.array(x.element(), x.len())?;
        self.norm("head_norm", x, weight, eps, y)
    }

    fn norm(&self, kernel: &str, x: &Array, weight: &Array, eps: f32, y: Array) -> Result<Array, GpuError> {
        let width = weight.len();
        assert!(x.len().is_multiple_of(width));
        let arguments = arguments![x, weight, &y, width as u32, eps];
        // SAFETY: a block for each row of that width.
        unsafe { self.launch(&named(kernel, &y), [x.len() / width, 1], threads_for(width), arguments) }?;
        Ok(y)
    }

    /// Adds to f32 `dx` the gradient of [`rms_norm`](Self::rms_norm), given `dy` in T.
    pub(crate) fn rms_norm_backward(
        &self,
        x: &Array,
        weight: &Array,
        eps: f32,
        dy: &Array,
        dx: &Array,
    ) -> Result<(), GpuError> {
        assert_eq!([x.element(), dx.element()], [Element::F32; 2]);
        self.norm_backward("rms_norm_backward", [x, weight, dy, dx], eps, 1)
    }

    /// The gradient of [`head_norm`](Self::head_norm).
    pub(crate) fn head_norm_backward(
        &self,
        x: &Array,
        weight: &Array,
        eps: f32,
        dy: &Array,
    ) -> Result<Array, GpuError> {
        let dx = self.array(x.element(), x.len())?;
        self.norm_backward("head_norm_backward", [x, weight, dy, &dx], eps, 0)?;
        Ok(dx)
    }

    fn norm_backward(
        &self,
        kernel: &str,
        [x, weight, dy, dx]: [&Array; 4],
        eps: f32,
        accumulates: u32,
    ) -> Result<(), GpuError> {
        let width = weight.len();
        assert_eq!((x.len() % width, dy.len(), dx.len()), (0, x.len(), x.len()));
        let arguments = arguments![x, weight, dy, dx, width as u32, eps, accumulates];
        // SAFETY: a block for each row of that width.
        unsafe { self.launch(&named(kernel, dy), [x.len() / width, 1], threads_for(width), arguments) }
    }

    /// Turns each head of `x` in place; `sign` is 1, or −1 for a gradient on its way back. `cos_sin` are
    /// `[positions, half]`.
    pub(crate) fn rotary(
        &self,
        x: &Array,
        positions: &Array,
        [cosines, sines]: [&Array; 2],
        half: usize,
        sign: f32,
    ) -> Result<(), GpuError> {
        let heads = x.len() / (positions.len() * 2 * half).max(1);
        assert_eq!(x.len(), positions.len() * heads * 2 * half);
        let arguments = arguments![x, positions, cosines, sines, heads as u32, half as u32, sign];
        // SAFETY: a block for each row; whoever calls has made the tables long enough.
        unsafe { self.launch(&named("rotary", x), [positions.len(), 1], THREADS, arguments) }
    }

    /// `silu(gate) ∘ up`
    pub(crate) fn swiglu(&self, gate: &Array, up: &Array) -> Result<Array, GpuError> {
        assert_eq!(gate.len(), up.len());
        let y = self.array(gate.element(), gate.len())?;
        // SAFETY: all have these values.
        unsafe { self.each(&named("swiglu", gate), gate.len(), arguments![gate, up, &y]) }?;
        Ok(y)
    }

    /// The gradients of `gate` and `up`.
    pub(crate) fn swiglu_backward(
        &self,
        gate: &Array,
        up: &Array,
        dy: &Array,
    ) -> Result<[Array; 2], GpuError> {
        assert_eq!([up.len(), dy.len()], [gate.len(); 2]);
        let [d_gate, d_up] =
            [self.array(gate.element(), gate.len())?, self.array(gate.element(), gate.len())?];
        let arguments = arguments![gate, up, dy, &d_gate, &d_up];
        // SAFETY: all have these values.
        unsafe { self.each(&named("swiglu_backward", gate), gate.len(), arguments) }?;
        Ok([d_gate, d_up])
    }

    /// Causal attention of the rows of a batch: `[r, q]` in T, and f32 `[r, query heads]`, each row's
    /// logarithm of its sum of exponentials.
    pub(crate) fn attention(
        &self,
        heads: HeadShape,
        spans: &Spans,
        pages: &Pages,
        q: &Array,
    ) -> Result<[Array; 2], GpuError> {
        let (out, lse) = (self.array(q.element(), q.len())?, self.array(Element::F32, q.len() / heads.dim)?);
        let arguments = [
            arguments![q, &out, &lse],
            &spans.arguments(&spans.forward)[..],
            &pages.arguments(),
            &heads.arguments(),
        ];
        let grid = [spans.forward[0].len(), heads.keys];
        // SAFETY: spans and pages are of this batch.
        unsafe { self.launch(&named("attention", q), grid, THREADS, &arguments.concat()) }?;
        Ok([out, lse])
    }

    /// The gradients of queries, keys and values. No sequence has a past: `start` is 0.
    pub(crate) fn attention_backward(
        &self,
        heads: HeadShape,
        spans: &Spans,
        pages: &Pages,
        AttentionBackward { q, out, d_out, lse, dq, dk, dv }: AttentionBackward<'_>,
    ) -> Result<(), GpuError> {
        assert_eq!([out.len(), d_out.len(), dq.len(), heads.dim * lse.len()], [q.len(); 4]);
        assert_eq!([dk.len() * heads.group, dv.len() * heads.group], [q.len(); 2]);
        let delta = self.array(Element::F32, lse.len())?;
        let query_heads = heads.group * heads.keys;
        let arguments = arguments![out, d_out, &delta, query_heads as u32, heads.dim as u32];
        // SAFETY: a block for each row, `delta` has a value for each of its heads.
        unsafe {
            self.launch(&named("attention_delta", q), [lse.len() / query_heads, 1], 32, arguments)?;
        }
        let (pages, shape) = (pages.arguments(), heads.arguments());
        let dq_arguments =
            [arguments![q, d_out, lse, &delta, dq], &spans.arguments(&spans.backward)[..], &pages, &shape]
                .concat();
        let dkv_arguments =
            [arguments![q, d_out, lse, &delta, dk, dv], &spans.arguments(&spans.keys)[..], &pages, &shape]
                .concat();
        // SAFETY: spans and pages are of this batch.
        unsafe {
            let grid = |tiles: &[Array; 2]| [tiles[0].len(), heads.keys];
            self.launch(&named("attention_dq", q), grid(&spans.backward), THREADS, &dq_arguments)?;
            self.launch(&named("attention_dkv", q), grid(&spans.keys), THREADS, &dkv_arguments)
        }
    }

    /// Puts the rows' keys and values into pages: those of their sequences, at their positions.
    pub(crate) fn append(
        &self,
        k: &Array,
        v: &Array,
        sequence_of: &Array,
        positions: &Array,
        pages: &Pages,
    ) -> Result<(), GpuError> {
        let width = k.len() / positions.len().max(1);
        assert_eq!((v.len(), sequence_of.len()), (k.len(), positions.len()));
        let arguments =
            [arguments![k, v, sequence_of, positions], &pages.arguments()[..], arguments![width as u32]];
        // SAFETY: the pages have room for the rows, as whoever reserved them says.
        unsafe { self.launch(&named("append", k), [positions.len(), 1], THREADS, &arguments.concat()) }
    }
}
