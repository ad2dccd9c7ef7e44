use std::sync::{Arc, PoisonError};

use crate::{
    gpu::{Array, Element, GpuError},
    model::{AdapterRows, LoraEntry, LoraLayout},
    types::LoraTarget,
};

use super::DeviceModel;

/// An adapter's values in the memory of a GPU, in T: what products read. The master weights stay
/// with the run's state, in f32.
pub struct DeviceAdapter {
    pub(super) layout: LoraLayout,
    pub(super) values: Array,
}

/// The matrices of one adapted linear layer.
pub(super) struct DeviceLowRank<'a> {
    /// `[rank, in]`
    pub a: Array,
    /// `[out, rank]`
    pub b: Array,
    pub rank: usize,
    pub scale: f32,
    pub entry: &'a LoraEntry,
}

impl DeviceModel {
    /// An adapter on the GPU: copied there the first time, and held as long as its values live.
    pub fn adapter(&self, adapter: AdapterRows<'_>) -> Result<Arc<DeviceAdapter>, GpuError> {
        let mut held = self.adapters.lock().unwrap_or_else(PoisonError::into_inner);
        let versions = held.len();
        held.retain(|(watch, _)| !watch.is_gone());
        if held.len() < versions {
            self.steps().forget_retired();
        }
        if let Some((_, found)) = held.iter().find(|(watch, _)| watch.is(adapter.values)) {
            return Ok(found.clone());
        }
        let values = self.gpu.upload(self.element, adapter.values)?;
        let on_device = Arc::new(DeviceAdapter { layout: adapter.layout.clone(), values });
        held.push((adapter.values.watch(), on_device.clone()));
        Ok(on_device)
    }

    /// Zeros for the gradient of an adapter, f32.
    pub fn gradient(&self, layout: &LoraLayout) -> Result<Array, GpuError> {
        self.gpu.zeros(Element::F32, layout.len())
    }
}

impl DeviceAdapter {
    /// The matrices of a layer's linear map, if it is adapted.
    pub(super) fn low_rank(&self, layer: usize, target: LoraTarget) -> Option<DeviceLowRank<'_>> {
        self.low_rank_of(self.layout.entries_of(layer, target).first()?)
    }

    pub(super) fn head_low_rank(&self) -> Option<DeviceLowRank<'_>> {
        self.low_rank_of(self.layout.head()?)
    }

    fn low_rank_of<'a>(&'a self, entry: &'a LoraEntry) -> Option<DeviceLowRank<'a>> {
        Some(DeviceLowRank {
            a: self.values.range(entry.a.clone()),
            b: self.values.range(entry.b.clone()),
            rank: self.layout.config.rank as usize,
            scale: self.layout.scale(),
            entry,
        })
    }
}
