//! GGUF's quantised blocks, as the codes, scales and offsets that they are made of.
//!
//! (ggml, ggml-common.h and ggml-quants.c. The values are those that candle computes of the same bytes,
//! to the bit: a code's product with its scale is exact in f32, or nothing is added to it, so a weight is rounded
//! once.)

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::kernels::{BLOCK, BlockRows, CodeBits};

/// How many bits a code has, of formats that are kept as they are; others become numbers when loaded.
pub(super) fn code_bits(format: GgmlDType) -> Option<CodeBits> {
    match format {
        GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => Some(CodeBits::Four),
        GgmlDType::Q5_0 | GgmlDType::Q5_1 | GgmlDType::Q5K => Some(CodeBits::Five),
        GgmlDType::Q6K => Some(CodeBits::Six),
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
        GgmlDType::Q5_0 => blocks.for_each(|block| {
            let scale = number(&block[..2]);
            push(&mut rows, scale, -16.0 * scale, five_bits(&block[2..]));
        }),
        GgmlDType::Q5_1 => blocks.for_each(|block| {
            push(&mut rows, number(&block[..2]), number(&block[2..4]), five_bits(&block[4..]));
        }),
        GgmlDType::Q8_0 => blocks.for_each(|block| {
            push(&mut rows, number(&block[..2]), 0.0, block[2..].iter().map(|&code| code as i8));
        }),
        GgmlDType::Q4K => blocks.for_each(|block| q4_or_q5_k(&mut rows, &block[..16], &block[16..], &[])),
        GgmlDType::Q5K => {
            blocks.for_each(|block| q4_or_q5_k(&mut rows, &block[..16], &block[48..], &block[16..48]))
        }
        GgmlDType::Q6K => blocks.for_each(|block| q6_k(&mut rows, block)),
        _ => return None,
    }
    Some(rows)
}

/// 256 weights. `scales`: two f16, by which the six-bit scales and minima of eight blocks behind them are multiplied.
/// Of Q5_K, bit `n` of byte `i` of `fifth_bits` belongs to weight `i` of block `n`.
fn q4_or_q5_k(rows: &mut BlockRows, scales: &[u8], codes: &[u8], fifth_bits: &[u8]) {
    let (scale, minimum, packed) = (number(&scales[..2]), number(&scales[2..4]), &scales[4..]);
    for (pair, codes) in codes.chunks_exact(BLOCK).enumerate() {
        for half in 0..2 {
            let place = 2 * pair + half;
            let (short_scale, short_minimum) = six_bits(packed, place);
            let fifth = |i: usize| fifth_bits.get(i).map_or(0, |bits| bits >> place & 1);
            let codes = codes.iter().enumerate();
            let codes = codes.map(|(i, byte)| (byte >> (4 * half) & 15 | fifth(i) << 4) as i8);
            push(rows, scale * f32::from(short_scale), -(minimum * f32::from(short_minimum)), codes);
        }
    }
}

/// 256 weights: low halves of codes, their upper two bits, scales of 16 weights each, and the f16 by which those are
/// multiplied. Halves of 128 weights are quarters of 32, whose codes lie side by side in the bytes.
fn q6_k(rows: &mut BlockRows, block: &[u8]) {
    let (low, rest) = block.split_at(128);
    let (high, rest) = rest.split_at(64);
    let (short_scales, scale) = rest.split_at(16);
    let scale = number(scale);
    for (run, short_scale) in short_scales.iter().enumerate() {
        let codes = (16 * run..16 * run + 16).map(|weight| {
            let (half, quarter, i) = (weight / 128, weight % 128 / 32, weight % 32);
            let low = low[64 * half + 32 * (quarter % 2) + i] >> (4 * (quarter / 2)) & 15;
            let high = high[32 * half + i] >> (2 * quarter) & 3;
            (low | high << 4) as i8 - 32
        });
        push(rows, scale * f32::from(*short_scale as i8), 0.0, codes);
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

/// Four bytes of fifth bits, then [nibbles].
fn five_bits(bytes: &[u8]) -> impl Iterator<Item = i8> {
    let (fifth, low) = bytes.split_at(4);
    nibbles(low).enumerate().map(|(i, low)| low | ((fifth[i / 8] >> (i % 8) & 1) << 4) as i8)
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
            let places: &[usize] = match format {
                GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[1],
                GgmlDType::Q6K => &[209],
                _ => &[1, 3],
            };
            for &high in places {
                // Exponents below that of infinity, of either sign.
                block[high] = block[high] & 0x80 | 0x20 | block[high] & 0x0f;
            }
        }
        bytes
    }

    #[test]
    fn weights_are_those_of_candle_to_the_bit() {
        use GgmlDType::*;
        for format in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
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
        for format in [GgmlDType::F32, GgmlDType::Q3K, GgmlDType::Q8K] {
            assert!(code_bits(format).is_none() && read(format, &[]).is_none());
        }
    }
}
