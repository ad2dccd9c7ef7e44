//! The source of the kernels, which one compiler after the other takes as one text.

/// What NVRTC compiles; it includes nothing.
pub(super) const KERNELS: &str = concat!(
    include_str!("kernels/base.cu"),
    include_str!("kernels/layers.cu"),
    include_str!("kernels/attention.cu"),
    include_str!("kernels/head.cu"),
    include_str!("kernels/entries.cu"),
);

/// What g++ compiles around it: before it what it takes for CUDA, behind it what calls each kernel.
pub(super) const EMULATION: [&str; 2] =
    [include_str!("kernels/emulate.h"), include_str!("kernels/emulate_end.h")];
