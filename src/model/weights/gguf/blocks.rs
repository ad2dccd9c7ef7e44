//! GGUF's quantised blocks, as the codes, scales and offsets that they are made of.
//!
//! (ggml, ggml-common.h and ggml-quants.c. The values are those that candle computes of the same bytes,
//! to the bit: a code's product with its scale is exact in f32, so a weight is rounded once.)

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::kernels::{BLOCK, BlockRows, CodeBits};

/// How many bits a code has, of formats that are kept as they are; others become numbers when loaded.
pub(super) fn code_bits(format: GgmlDType) -> Option<CodeBits> {
    match format {
        GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => Some(CodeBits::Four),
        GgmlDType::Q8_0 => Some(CodeBits::Eight),
        _ => None,
    }
}

/// Takes a tensor of one of these formats apart; its bytes are whole blocks.
pub(super) fn read(format: GgmlDType, bytes: &[u8]) -> Option<BlockRows> {
    let mut rows =
        BlockRows { bits: code_bits(format)?, codes: Vec::new(), scales: Vec::new(), offsets: Vec::new() };
    let blocks = bytes.chunks_exact(format.type_size());
    match format {
        GgmlDType::Q4_0 => blocks.for_each(|block| {
            let scale = number(&block[..2]);
            push(&mut rows, scale, -8.0 * scale, nibbles(&block[2..]));
        }),
        GgmlDType::Q4_1 => blocks.for_each(|block| {
            push(&mut rows, number(&block[..2]), number(&block[2..4]), nibbles(&block[4..]));
        }),
        GgmlDType::Q8_0 => blocks.for_each(|block| {
            push(&mut rows, number(&block[..2]), 0.0, block[2..].iter().map(|&code| code as i8));
        }),
        GgmlDType::Q4K => blocks.for_each(|block| q4_k(&mut rows, block)),
        _ => return None,
    }
    Some(rows)
}

/// 256 weights: two f16, by which the six-bit scales and minima of eight blocks are multiplied.
fn q4_k(rows: &mut BlockRows, block: &[u8]) {
    let (scale, minimum) = (number(&block[..2]), number(&block[2..4]));
    let (packed, codes) = block[4..].split_at(12);
    for (pair, codes) in codes.chunks_exact(BLOCK).enumerate() {
        for half in 0..2 {
            let (short_scale, short_minimum) = six_bits(packed, 2 * pair + half);
            let codes = codes.iter().map(|byte| (byte >> (4 * half) & 15) as i8);
            push(rows, scale * f32::from(short_scale), -(minimum * f32::from(short_minimum)), codes);
        }
    }
}

/// Scale and minimum of one of eight blocks (`get_scale_min_k4`).
fn six_bits(packed: &[u8], block: usize) -> (u8, u8) {
    match block {
        0..4 => (packed[block] & 63, packed[block + 4] & 63),
        _ => {
            let (low, scale, minimum) = (packed[block + 4], packed[block - 4], packed[block]);
            (low & 15 | scale >> 6 << 4, low >> 4 | minimum >> 6 << 4)
        }
    }
}

fn push(rows: &mut BlockRows, scale: f32, offset: f32, codes: impl Iterator<Item = i8>) {
    rows.scales.push(scale);
    rows.offsets.push(offset);
    rows.codes.extend(codes);
}

/// The first 16 weights are the low halves of the bytes, the others the high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = i8> {
    let half = |shift: u32| bytes.iter().map(move |byte| (byte >> shift & 15) as i8);
    half(0).chain(half(4))
}

fn number(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, quantized::ggml_file::qtensor_from_ggml};

    use super::*;

    /// Bytes of whole blocks whose scales are finite.
    fn blocks(format: GgmlDType, count: usize) -> Vec<u8> {
        let mut state = 7u32;
        let mut bytes: Vec<u8> = (0..count * format.type_size())
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        for block in bytes.chunks_exact_mut(format.type_size()) {
            let numbers = if format == GgmlDType::Q8_0 || format == GgmlDType::Q4_0 { 1 } else { 2 };
            for high in (0..numbers).map(|number| 2 * number + 1) {
                // Exponents below that of infinity, of either sign.
                block[high] = block[high] & 0x80 | 0x20 | block[high] & 0x0f;
            }
        }
        bytes
    }

    #[test]
    fn weights_are_those_of_candle_to_the_bit() {
        for format in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q4K] {
            let bytes = blocks(format, 64);
            let rows = read(format, &bytes).unwrap();
            let weights = 64 * format.block_size();
            let theirs = qtensor_from_ggml(format, &bytes, vec![weights], &Device::Cpu)
                .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.to_vec1::<f32>())
                .unwrap();
            assert_eq!(rows.codes.len(), weights);
            // Equal as numbers: where candle multiplies 0 by a negative scale, it gets -0.
            assert!((0..weights).all(|index| rows.value(index) == theirs[index]), "{format:?}");
        }
    }

    #[test]
    fn other_formats_are_left_alone() {
        for format in [GgmlDType::F32, GgmlDType::Q6K, GgmlDType::Q5_0] {
            assert!(code_bits(format).is_none() && read(format, &[]).is_none());
        }
    }
}
