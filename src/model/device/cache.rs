use std::sync::Arc;

use crate::{
    gpu::{Array, GpuError, PAGE, Pages},
    kernels::WeightDtype,
    model::ModelConfig,
};

use super::DeviceModel;

/// Keys and values of one sequence's past positions in the memory of a GPU, in pages that forks
/// share.
///
/// A page has PAGE positions of all layers: `[layers, 2, PAGE, k]` in T, keys before values.
#[derive(Clone, Default)]
pub struct DeviceCache {
    len: usize,
    /// Enough for `len` positions. A page that others share is copied before it is written to.
    pages: Vec<Arc<Array>>,
}

impl DeviceCache {
    /// Positions that are allocated, and shared between forks, together.
    pub const PAGE: usize = PAGE;

    /// Bytes that one position takes, over all layers, where products compute in `dtype`.
    pub fn bytes_per_position(config: &ModelConfig, dtype: WeightDtype) -> usize {
        2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.bytes()
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no position.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Another sequence with the same past.
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Makes room for `rows` more positions that are this cache's own.
    pub(super) fn reserve(&mut self, model: &DeviceModel, rows: usize) -> Result<(), GpuError> {
        let piece = PAGE * model.key_width();
        let pieces = 2 * model.config.num_layers;
        let own = self.len / PAGE;
        if let Some(page) = self.pages.get_mut(own)
            && Arc::get_mut(page).is_none()
        {
            let all: Vec<u32> = (0..pieces as u32).collect();
            *page = Arc::new(model.gpu.gather(page, &model.gpu.upload_u32(&all)?, piece)?);
        }
        while self.pages.len() < (self.len + rows).div_ceil(PAGE) {
            self.pages.push(Arc::new(model.gpu.array(model.element, pieces * piece)?));
        }
        Ok(())
    }

    /// The forward has appended `rows` positions to every layer.
    pub(super) fn advance(&mut self, rows: usize) {
        self.len += rows;
    }

    /// Where each page is, counted in elements from address 0.
    pub(super) fn places(&self) -> impl Iterator<Item = u64> {
        self.pages.iter().map(|page| page.address() / page.element().bytes() as u64)
    }
}

impl DeviceModel {
    /// Where one layer's keys and values are in the pages of caches.
    pub(super) fn cached_pages(&self, layer: usize, table: &Array, per_sequence: usize) -> Pages {
        let piece = (PAGE * self.key_width() * self.element.bytes()) as u64;
        let keys = 2 * layer as u64 * piece;
        Pages { keys, values: keys + piece, table: table.clone(), per_sequence }
    }
}
