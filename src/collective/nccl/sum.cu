// Adds up the partial sums of one tree, each thread its own places: the additions and their order are those
// of the host (plan.rs), so the bits are too. Additions alone: nothing here can be contracted.
//
// A word of the program is a move of a machine with a stack, and where its partial sum begins in `memory`:
//   0: push it     1: add it to the top     2: pop a right child and add it to the new top
// Compiled by NVRTC when a rank joins; nvcc is not needed.

typedef unsigned long long u64;

// A tree of 2^32 leaves has 33 levels.
#define DEPTH 34
#define PLACE ((1ULL << 62) - 1)

extern "C" __global__ void tree_sum(const u64 *program, u64 steps, float *memory, u64 out, u64 count) {
    u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        float stack[DEPTH];
        int height = 0;
        float top = 0.0f;
        for (u64 step = 0; step < steps; step++) {
            u64 word = program[step];
            unsigned int move = (unsigned int)(word >> 62);
            if (move == 2) {
                top = stack[--height] + top;
            } else if (move == 1) {
                top = top + memory[(word & PLACE) + i];
            } else {
                if (step > 0) stack[height++] = top;
                top = memory[(word & PLACE) + i];
            }
        }
        memory[out + i] = top;
    }
}
