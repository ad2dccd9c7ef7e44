//! The reference values of one family, and what is compared with them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use lockstep::{
    gpu::Gpu,
    kernels::{self, Team, WeightDtype},
    model::{
        Adapter, AdapterRows, BaseModel, LoraLayout, MicroBatchOutput, Place, TrainState, Workspace,
        cut_micro_batches, device::DeviceModel, prepare, run_micro_batch,
    },
    types::{AdamParams, Datum, ForwardBackwardOutput, LoraConfig, LossSpec, TensorData, TensorValues},
};
use safetensors::{Dtype, SafeTensors};

/// Two engines that are 1e-7 apart round one number in some ten thousands to different neighbours, 4e-3 of it apart. On
/// the committed Llama that leaves logits where they are and gradients at most 2.3e-3 apart; rounding that is
/// left out, or stands elsewhere, shows as 3e-3 in logits and up to 1 in gradients of experts.
const BF16_SLACK: f64 = 100.0;

/// From a seed that nobody has looked at, four of which had logits up to 1.5e-3 apart. It only has to tell roundings from
/// mistakes; the committed seed's numbers, which are the same bits on every CPU without AMX, tell the rest.
const UNSEEN_BF16_SLACK: f64 = 1_000.0;

/// One family's model and reference values.
pub struct Golden {
    pub family: String,
    pub directory: PathBuf,
    /// Of `LOCKSTEP_GOLDENS`.
    is_fresh: bool,
    pub dtype: WeightDtype,
    pub model: BaseModel,
    pub file: GoldenFile,
    pub tensors: BTreeMap<String, TensorData>,
}

/// golden.json; make_goldens.py describes it.
#[derive(serde::Deserialize)]
pub struct GoldenFile {
    /// What the model's weights are held as.
    dtype: String,
    pub lora: LoraConfig,
    pub sequences: Vec<Vec<u32>>,
    pub generation: Generation,
    pub calls: BTreeMap<String, Call>,
    pub steps: Vec<Step>,
}

#[derive(serde::Deserialize)]
pub struct Generation {
    pub prompt: Vec<u32>,
    pub tokens: Vec<u32>,
    pub margin: f64,
}

#[derive(serde::Deserialize)]
pub struct Call {
    pub loss: LossSpec,
    pub data: Vec<Datum>,
    pub expected: Expected,
}

#[derive(serde::Deserialize)]
pub struct Expected {
    pub loss: f64,
    pub loss_size: f64,
    pub active: u64,
    pub metrics: BTreeMap<String, f64>,
}

#[derive(serde::Deserialize)]
pub struct Step {
    pub calls: Vec<String>,
    pub adam: AdamParams,
    pub grad_norm: f64,
}

/// The committed families, and those of `LOCKSTEP_GOLDENS`; without mixtures in bf16 where nobody has seen the bits, as a
/// rounding may send a token to another expert, which no tolerance covers.
pub fn goldens() -> impl Iterator<Item = Golden> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let fresh = std::env::var_os("LOCKSTEP_GOLDENS").map(PathBuf::from);
    let mut families = Vec::new();
    for (root, is_fresh) in [(Some(committed), false), (fresh, true)] {
        let Some(root) = root else { continue };
        let entries = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let paths = entries.map(|entry| entry.unwrap().path());
        let before = families.len();
        families.extend(paths.filter(|path| path.join("golden.json").is_file()).map(|path| (path, is_fresh)));
        assert!(families.len() > before, "no golden.json below {}", root.display());
    }
    families.sort();
    let goldens = families.into_iter().map(|(path, is_fresh)| Golden { is_fresh, ..Golden::load(&path) });
    goldens.filter(|golden| {
        let is_mixture = golden.model.config.experts.is_some();
        !(golden.is_unseen() && is_mixture)
    })
}

impl Golden {
    pub fn load(directory: &Path) -> Self {
        let family = directory.display().to_string();
        let json = std::fs::read(directory.join("golden.json")).unwrap();
        let file: GoldenFile = serde_json::from_slice(&json).unwrap_or_else(|e| panic!("{family}: {e}"));
        let dtype = file.dtype.parse().unwrap();
        let model =
            BaseModel::load_as(dtype, "golden", directory).unwrap_or_else(|e| panic!("{family}: {e}"));
        let bytes = std::fs::read(directory.join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = tensors.tensors().into_iter().map(|(name, view)| {
            let (values, dtype) = match view.dtype() {
                Dtype::F32 => {
                    let words = view.data().as_chunks::<4>().0.iter();
                    let values = words.map(|word| f32::from_le_bytes(*word)).collect();
                    (TensorValues::F32(values), lockstep::types::Dtype::Float32)
                }
                Dtype::I64 => {
                    let words = view.data().as_chunks::<8>().0.iter();
                    let values = words.map(|word| i64::from_le_bytes(*word)).collect();
                    (TensorValues::I64(values), lockstep::types::Dtype::Int64)
                }
                other => panic!("{name} is {other:?}"),
            };
            (name, TensorData::new(values, dtype, view.shape().to_vec()).unwrap())
        });
        let (directory, tensors) = (directory.to_owned(), tensors.collect());
        Self { family, directory, is_fresh: false, dtype, model, file, tensors }
    }

    /// The same with the model on a GPU, if that covers it. Families of bf16 weights are left out: there a GPU
    /// rounds activations, too, for which these tolerances are not made.
    pub fn on_gpu(mut self, gpu: &Gpu) -> Option<Self> {
        let config = &self.model.config;
        if self.dtype != WeightDtype::F32 || config.experts.is_some() {
            return None;
        }
        self.model.place = Place::Gpu(Box::new(DeviceModel::new(gpu, config, self.model.weights()).unwrap()));
        Some(self)
    }

    /// Whether these are bf16's bits, and other ones than those that the tolerances were made for.
    pub fn is_unseen(&self) -> bool {
        self.dtype == WeightDtype::Bf16 && self.is_fresh || kernels::numerics(self.dtype) == "amx_bf16"
    }

    /// How many times farther from the reference than in f32 numbers may be.
    pub fn slack(&self) -> f64 {
        match self.dtype {
            WeightDtype::F32 => 1.0,
            WeightDtype::Bf16 if self.is_unseen() => UNSEEN_BF16_SLACK,
            WeightDtype::Bf16 => BF16_SLACK,
        }
    }

    /// The golden's adapter at step 0.
    pub fn initial_state(&self) -> TrainState {
        let layout = Arc::new(LoraLayout::new(&self.model.config, &self.file.lora).unwrap());
        let mut values = vec![0.0; layout.len()];
        self.for_each_tensor(&layout, |tensor, range| {
            values[range].copy_from_slice(floats(&self.tensors[&format!("adapter.{tensor}")]));
        });
        TrainState::of_adapter(Adapter { layout, values: values.into() })
    }

    /// Every LoRA matrix's name in the golden, and its place in the flat vector.
    pub fn for_each_tensor(&self, layout: &LoraLayout, mut visit: impl FnMut(&str, std::ops::Range<usize>)) {
        for entry in &layout.entries {
            let [a, b] = entry.tensor_names();
            for (name, range) in [(a, entry.a.clone()), (b, entry.b.clone())] {
                visit(name.strip_prefix("base_model.model.").unwrap(), range);
            }
        }
    }

    /// What a rank does with a call: result, active positions, gradient of the sum.
    pub fn run(
        &self,
        state: &TrainState,
        call: &Call,
        budget: usize,
        with_gradient: bool,
    ) -> (ForwardBackwardOutput, u64, Vec<f32>) {
        let max_seq_len = self.model.config.max_position_embeddings;
        let examples = prepare(&self.model.config, max_seq_len, &call.loss, &call.data).unwrap();
        let adapter = AdapterRows { layout: &state.layout, values: &state.weights };
        let (mut workspace, team) = (Workspace::default(), Team::solo());
        let mut sum = vec![0.0; state.layout.len()];
        let mut whole = MicroBatchOutput::default();
        for range in cut_micro_batches(&examples, budget) {
            let examples = &examples[range];
            let mut gradient = vec![0.0; sum.len()];
            let wanted = with_gradient.then_some(gradient.as_mut_slice());
            let part =
                run_micro_batch(&self.model, adapter, &call.loss, examples, wanted, &mut workspace, &team);
            whole.merge(part.unwrap());
            sum.iter_mut().zip(&gradient).for_each(|(sum, more)| *sum += more);
        }
        let active = whole.active;
        (whole.finish(&call.loss), active, sum)
    }

    pub fn assert_near(&self, key: &str, found: &[f32], tolerance: f64) {
        let what = format!("{} {key}", self.family);
        let expected = self.tensors.get(key).unwrap_or_else(|| panic!("the golden has no {what}"));
        assert_near(&what, found, floats(expected), None, tolerance);
    }
}

pub fn floats(tensor: &TensorData) -> &[f32] {
    match tensor.values() {
        TensorValues::F32(values) => values,
        other => panic!("expected float32, got {other:?}"),
    }
}

/// `‖found − expected‖ / ‖expected − origin‖ ≤ tolerance`, NaN where NaN is expected.
pub fn assert_near(what: &str, found: &[f32], expected: &[f32], origin: Option<&[f32]>, tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let (mut distance, mut size, mut worst) = (0.0, 0.0, (0, -1.0));
    for (i, (&a, &b)) in found.iter().zip(expected).enumerate() {
        assert_eq!(a.is_nan(), b.is_nan(), "{what}[{i}]: {a} and {b}");
        if a.is_nan() {
            continue;
        }
        let error = (f64::from(a) - f64::from(b)).powi(2);
        distance += error;
        size += (f64::from(b) - origin.map_or(0.0, |origin| f64::from(origin[i]))).powi(2);
        if error > worst.1 {
            worst = (i, error);
        }
    }
    let (distance, size) = (distance.sqrt(), size.sqrt());
    let i = worst.0;
    assert!(
        distance <= tolerance * size,
        "{what}: {:.2e} away in the Frobenius norm, allowed {tolerance:.0e}; worst element {i}: found {:e}, \
         expected {:e}",
        distance / size,
        found[i],
        expected[i]
    );
}
