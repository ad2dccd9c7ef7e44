// What a GPU computes besides matrix products, forward and backward.
//
// The same source is compiled by NVRTC when a GPU is opened, and by g++ behind emulate.h, where
// tests run it thread by thread. So it includes nothing, and uses of CUDA only what that header
// has: the grid's coordinates, shared memory of fixed size, and barriers.
//
// T is what activations are stored as: float, or bfloat16 as its 16 bits. Sums are float, but for those
// that tokens are drawn by. Work is split over outputs and every sum has one order, so bits depend on
// neither the grid nor the clock; nothing is atomic.
//
// Legend of shapes: r rows, d hidden width, q query heads times head width, k key heads times
// head width, i intermediate width, v vocabulary, c rows whose logits are in memory.

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef unsigned int u32;
typedef unsigned long long u64;
struct bf16 { unsigned short bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Rounds to nearest, ties to even.
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) {
    u32 bits = __float_as_uint(x);
    bf16 rounded;
    if (x != x) rounded.bits = (unsigned short)((bits >> 16) | 64);
    else rounded.bits = (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    return rounded;
}

// Most threads of a block. Blocks that sum have a power of two.
#define THREADS 256

// The sum of the block's values, in a fixed tree, for each of its threads.
template <class S>
__device__ inline S block_sum(S value) {
    __shared__ S parts[THREADS];
    parts[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
    }
    S sum = parts[0];
    __syncthreads();
    return sum;
}

__device__ inline float block_max(float value) {
    __shared__ float parts[THREADS];
    parts[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] = fmaxf(parts[threadIdx.x], parts[threadIdx.x + half]);
        __syncthreads();
    }
    float largest = parts[0];
    __syncthreads();
    return largest;
}

__device__ inline u64 global_thread() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

