use super::{Array, Element, Gpu, GpuError};

/// `result = alpha · left · right + beta · result`, with sums in f32.
///
/// `left` is `[m, k]`, `right` `[k, n]`, `result` `[m, n]`, all row-major without gaps. The factors
/// have one element type; the result has it, too, or is f32.
pub(crate) struct Product<'a> {
    pub left: Factor<'a>,
    pub right: Factor<'a>,
    pub alpha: f32,
    pub beta: f32,
    pub result: &'a Array,
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// A factor as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Factor<'a> {
    Plain(&'a Array),
    /// Memory holds the transpose of the factor.
    Transposed(&'a Array),
}

/// A product as addresses, checked.
#[derive(Clone, Copy)]
pub(super) struct RawProduct {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub alpha: f32,
    pub a: RawFactor,
    pub b: RawFactor,
    pub beta: f32,
    pub c: u64,
    pub element: Element,
    pub result: Element,
}

#[derive(Clone, Copy)]
pub(super) struct RawFactor {
    pub address: u64,
    pub is_transposed: bool,
    /// Values of a row in memory.
    pub row: usize,
}

impl RawFactor {
    /// From row to row and from column to column of the factor, in elements.
    pub(super) fn strides(self) -> [u64; 2] {
        if self.is_transposed { [1, self.row as u64] } else { [self.row as u64, 1] }
    }
}

impl<'a> Factor<'a> {
    fn array(self) -> &'a Array {
        match self {
            Self::Plain(array) | Self::Transposed(array) => array,
        }
    }

    /// A factor of so many rows and columns.
    fn raw(self, rows: usize, columns: usize) -> RawFactor {
        let address = self.array().address();
        match self {
            Self::Plain(_) => RawFactor { address, is_transposed: false, row: columns },
            Self::Transposed(_) => RawFactor { address, is_transposed: true, row: rows },
        }
    }
}

impl Gpu {
    /// Computes a product; writes its result.
    ///
    /// # Panics
    ///
    /// If an array has another length or element type than the product says.
    pub(crate) fn product(&self, product: Product<'_>) -> Result<(), GpuError> {
        let Product { left, right, alpha, beta, result, m, n, k } = product;
        let (a, b) = (left.array(), right.array());
        assert_eq!((a.len(), b.len(), result.len()), (m * k, k * n, m * n), "lengths of a product");
        assert!(a.element().is_number() && a.element() == b.element(), "a product has one element type");
        assert!([a.element(), Element::F32].contains(&result.element()), "its result has that or f32");
        if m == 0 || n == 0 {
            return Ok(());
        }
        let product = RawProduct {
            m,
            n,
            k,
            alpha,
            a: left.raw(m, k),
            b: right.raw(k, n),
            beta,
            c: result.address(),
            element: a.element(),
            result: result.element(),
        };
        // SAFETY: the lengths were checked.
        unsafe { self.multiply(&product) }
    }
}
