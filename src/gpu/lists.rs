use super::{Array, Element, Gpu, GpuError};

/// Lists of indices that go to a GPU end to end, in one copy: a copy takes as long as a small kernel, however few its bytes.
#[derive(Default)]
pub(crate) struct Lists {
    bytes: Vec<u8>,
}

/// Where a list is among the others.
#[derive(Clone, Copy)]
pub(crate) struct ListPlace {
    /// In bytes.
    from: usize,
    element: Element,
    len: usize,
}

impl Lists {
    pub(crate) fn u32s(&mut self, values: impl IntoIterator<Item = u32>) -> ListPlace {
        self.push(Element::U32, values.into_iter().map(u32::to_ne_bytes))
    }

    pub(crate) fn u64s(&mut self, values: impl IntoIterator<Item = u64>) -> ListPlace {
        self.push(Element::U64, values.into_iter().map(u64::to_ne_bytes))
    }

    fn push<const N: usize>(&mut self, element: Element, values: impl Iterator<Item = [u8; N]>) -> ListPlace {
        let from = self.bytes.len().next_multiple_of(N);
        self.bytes.resize(from, 0);
        values.for_each(|value| self.bytes.extend_from_slice(&value));
        ListPlace { from, element, len: (self.bytes.len() - from) / N }
    }
}

impl Gpu {
    /// An array for these lists, or others of the same lengths; nothing is in it yet.
    pub(crate) fn array_for(&self, lists: &Lists) -> Result<Array, GpuError> {
        self.array(Element::U32, lists.bytes.len() / Element::U32.bytes())
    }

    /// Brings the lists to an array for them, whatever is there.
    pub(crate) fn write_lists(&self, lists: &Lists, to: &Array) -> Result<(), GpuError> {
        self.overwrite(to, &lists.bytes)
    }

    /// The lists in an array of their own.
    pub(crate) fn upload_lists(&self, lists: &Lists) -> Result<Array, GpuError> {
        let array = self.array_for(lists)?;
        self.write_lists(lists, &array)?;
        Ok(array)
    }
}

impl Array {
    /// One of the lists that are here.
    pub(crate) fn list(&self, ListPlace { from, element, len }: ListPlace) -> Self {
        self.part(from, element, len)
    }
}
