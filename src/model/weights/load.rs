//! A decoder's weights in memory, made of those that a [`Read`] gives one by one.

use super::{
    BaseWeights, ExpertsWeights, LayerWeight, LayerWeights, Mlp, MlpWeights, QkNorm, QkvBias, Stored,
    TensorSource, Weight, check,
};
use crate::{
    kernels::{Matrix, MatrixForm, WeightDtype},
    model::{ModelConfig, ModelError},
};

/// Where a decoder's weights come from: a model's files, or a file of packed ones.
pub(in crate::model) trait Read {
    /// What a matrix is held as.
    fn form(&self, weight: Weight) -> MatrixForm;

    /// A bias or norm.
    fn vector(&self, weight: Weight) -> Result<Vec<f32>, ModelError>;

    /// Any other weight.
    fn matrix(&self, weight: Weight) -> Result<Matrix, ModelError>;

    /// The head of a model whose head is its embedding.
    fn tied_head(&self, embed: &Matrix) -> Result<Matrix, ModelError> {
        Ok(embed.clone())
    }
}

/// The weights of a file format. Matrices have the values of `dtype`, and are held as the file has them if that is
/// the same.
pub(in crate::model) struct FromSource<'a, S> {
    config: &'a ModelConfig,
    source: S,
    dtype: WeightDtype,
}

/// Reads all weights of a decoder.
pub(in crate::model) fn assemble(config: &ModelConfig, from: &dyn Read) -> Result<BaseWeights, ModelError> {
    let embed = from.matrix(Weight::Embed)?;
    let head = match config.tie_word_embeddings {
        true => from.tied_head(&embed)?,
        false => from.matrix(Weight::Head)?,
    };
    let layers = (0..config.num_layers).map(|layer| block(config, from, layer)).collect::<Result<_, _>>()?;
    Ok(BaseWeights { embed, layers, final_norm: from.vector(Weight::FinalNorm)?, head })
}

fn block(config: &ModelConfig, from: &dyn Read, layer: usize) -> Result<LayerWeights, ModelError> {
    let vector = |weight| from.vector(Weight::Layer(layer, weight));
    let matrix = |weight| from.matrix(Weight::Layer(layer, weight));
    let mlp = |[gate, up, down]: [LayerWeight; 3]| -> Result<MlpWeights, ModelError> {
        Ok(MlpWeights { gate: matrix(gate)?, up: matrix(up)?, down: matrix(down)? })
    };
    Ok(LayerWeights {
        attn_norm: vector(LayerWeight::AttnNorm)?,
        q: matrix(LayerWeight::Q)?,
        k: matrix(LayerWeight::K)?,
        v: matrix(LayerWeight::V)?,
        o: matrix(LayerWeight::O)?,
        qkv_bias: match config.family.has_qkv_bias() {
            true => Some(QkvBias {
                q: vector(LayerWeight::QBias)?,
                k: vector(LayerWeight::KBias)?,
                v: vector(LayerWeight::VBias)?,
            }),
            false => None,
        },
        qk_norm: match config.family.has_qk_norm() {
            true => Some(QkNorm { q: vector(LayerWeight::QNorm)?, k: vector(LayerWeight::KNorm)? }),
            false => None,
        },
        mlp_norm: vector(LayerWeight::MlpNorm)?,
        mlp: match config.layer_experts(layer) {
            None => Mlp::Dense(mlp([LayerWeight::Gate, LayerWeight::Up, LayerWeight::Down])?),
            Some(experts) => Mlp::Experts(ExpertsWeights {
                per_row: experts.per_row,
                normalises: experts.normalises,
                router: matrix(LayerWeight::Router)?,
                experts: (0..experts.count)
                    .map(|i| {
                        let of_expert =
                            [LayerWeight::ExpertGate, LayerWeight::ExpertUp, LayerWeight::ExpertDown];
                        mlp(of_expert.map(|weight| weight(i)))
                    })
                    .collect::<Result<_, _>>()?,
            }),
        },
    })
}

/// Bytes that the weights take when they are read.
pub(in crate::model) fn loaded_bytes(config: &ModelConfig, from: &dyn Read) -> u64 {
    let bytes = |weight: Weight| match weight.shape(config)[..] {
        [outputs, inputs] => from.form(weight).bytes_of(outputs, inputs),
        ref vector => vector.iter().product::<usize>() * size_of::<f32>(),
    };
    Weight::all(config).map(|weight| bytes(weight) as u64).sum()
}

/// What each matrix is held as when it is read, `None` of a vector, in the order of [`Weight::all`].
pub(in crate::model) fn loaded_forms(config: &ModelConfig, from: &dyn Read) -> Vec<Option<MatrixForm>> {
    let form = |weight: Weight| (weight.shape(config).len() == 2).then(|| from.form(weight));
    Weight::all(config).map(form).collect()
}

impl<'a, S: TensorSource> FromSource<'a, S> {
    /// Refuses a source whose tensors aren't exactly those that `config` calls for.
    pub fn new(config: &'a ModelConfig, source: S, dtype: WeightDtype) -> Result<Self, ModelError> {
        check(config, &source)?;
        Ok(Self { config, source, dtype })
    }

    fn not_finite(&self, weight: Weight, index: usize) -> ModelError {
        let tensor = self.source.name(weight);
        ModelError::NotFinite { path: self.source.path_of(&tensor).to_owned(), tensor, index }
    }
}

impl<S: TensorSource> Read for FromSource<'_, S> {
    /// As the file has it where that is `dtype` to the last bit, else as `dtype`.
    fn form(&self, weight: Weight) -> MatrixForm {
        match (self.dtype, self.source.stored(weight)) {
            // Rounded scores would send rows to other experts, and the router is small.
            (WeightDtype::Bf16, _) if is_router(weight) => MatrixForm::Bf16,
            (WeightDtype::Bf16, _) => MatrixForm::RoundedBf16,
            (WeightDtype::F32, Stored::F32) => MatrixForm::F32,
            (WeightDtype::F32, Stored::Bf16) => MatrixForm::Bf16,
            (WeightDtype::F32, Stored::Blocks(bits)) => MatrixForm::Blocks(bits),
        }
    }

    fn vector(&self, weight: Weight) -> Result<Vec<f32>, ModelError> {
        let values = self.source.values(weight, self.config)?;
        debug_assert_eq!(values.len(), weight.shape(self.config).iter().product::<usize>());
        match values.iter().position(|value| !self.dtype.round(*value).is_finite()) {
            None => Ok(values),
            Some(index) => Err(self.not_finite(weight, index)),
        }
    }

    fn matrix(&self, weight: Weight) -> Result<Matrix, ModelError> {
        let shape = weight.shape(self.config);
        let (outputs, inputs) = (shape[0], shape[1]);
        let form = self.form(weight);
        if let MatrixForm::Blocks(_) = form
            && let Some(rows) = self.source.blocks(weight, self.config)?
        {
            let numbers = rows.scales.iter().zip(&rows.offsets);
            return match numbers.map(|(scale, offset)| scale * offset).position(|both| !both.is_finite()) {
                None => Ok(Matrix::from_blocks(outputs, inputs, &rows)),
                Some(run) => Err(self.not_finite(weight, run * rows.bits.run())),
            };
        }
        let values = self.vector(weight)?;
        Ok(match form {
            MatrixForm::Bf16 if self.dtype == WeightDtype::Bf16 => {
                let rounded: Vec<f32> = values.iter().map(|value| self.dtype.round(*value)).collect();
                Matrix::from_bf16(outputs, inputs, &rounded)
            }
            MatrixForm::Bf16 => Matrix::from_bf16(outputs, inputs, &values),
            _ => Matrix::with_dtype(self.dtype, outputs, inputs, &values),
        })
    }

    /// A head that is stored beside the embedding must be the same.
    fn tied_head(&self, embed: &Matrix) -> Result<Matrix, ModelError> {
        let tensor = self.source.name(Weight::Head);
        if self.source.names().any(|name| name == tensor) {
            let same_shape = self.source.shape(&tensor)? == Weight::Head.shape(self.config);
            if !same_shape || !holds(embed, &self.source.values(Weight::Head, self.config)?) {
                let problem = "is true, but the file holds another head than the embedding";
                let path = self.source.path_of(&tensor);
                return Err(ModelError::unsupported(path, "tie_word_embeddings", problem));
            }
        }
        Ok(embed.clone())
    }
}

fn is_router(weight: Weight) -> bool {
    matches!(weight, Weight::Layer(_, LayerWeight::Router))
}

/// Whether the matrix was made of `rows`, of which it may be the rounded values.
fn holds(matrix: &Matrix, rows: &[f32]) -> bool {
    let (mut row, dtype) = (vec![0.0; matrix.in_features()], matrix.dtype());
    rows.chunks_exact(matrix.in_features()).enumerate().all(|(output, expected)| {
        matrix.copy_row(output, &mut row);
        row.iter().zip(expected).all(|(row, expected)| row == expected || *row == dtype.round(*expected))
    })
}
