// Enough of CUDA for the kernels on a CPU: a block's threads are fibres of one thread, which take
// turns at barriers; blocks come one after another. Slow, and exact about who waits for whom: a
// barrier that some threads of a block never reach ends the process with a message.
//
// g++ compiles this before the kernels, and emulate_end.h behind it.

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <utility>

struct Dim { unsigned x, y, z; };
static thread_local Dim threadIdx, blockIdx, blockDim;

#define __device__
#define __global__
// Blocks of one thread come one after another, and a launch stays on its thread.
#define __shared__ static thread_local

static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }

namespace emulation {

const size_t STACK = 64 * 1024;
const unsigned MOST = 256;

struct Fibre {
    ucontext_t start;
    jmp_buf at;
    char* stack;
    bool begun, done;
    unsigned barriers;
};

struct Block {
    Fibre fibres[MOST];
    ucontext_t home_start;
    jmp_buf home;
    unsigned running;
    void (*body)(void*);
    void* arguments;
};

static thread_local Block* block;

// Back to the scheduler, and on from here at the next turn. setjmp between stacks saves no signal
// mask, so a turn costs no system call.
inline void yield() {
    Fibre& fibre = block->fibres[block->running];
    if (!_setjmp(fibre.at)) _longjmp(block->home, 1);
}

inline void serve() {
    for (;;) {
        block->body(block->arguments);
        block->fibres[block->running].done = true;
        yield();
    }
}

inline void resume(unsigned thread) {
    Fibre& fibre = block->fibres[thread];
    block->running = thread;
    threadIdx = Dim { thread, 0, 0 };
    if (_setjmp(block->home)) return;
    if (fibre.begun) _longjmp(fibre.at, 1);
    fibre.begun = true;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack;
    fibre.start.uc_stack.ss_size = STACK;
    fibre.start.uc_link = 0;
    makecontext(&fibre.start, serve, 0);
    setcontext(&fibre.start);
}

// Runs the threads of one block to the end: each to its next barrier, then all from there on.
inline void run_block() {
    unsigned threads = blockDim.x;
    for (unsigned i = 0; i < threads; i++) block->fibres[i].done = false, block->fibres[i].barriers = 0;
    for (unsigned left = threads; left > 0;) {
        unsigned waiting = 0, ended = 0;
        for (unsigned i = 0; i < threads; i++) {
            if (block->fibres[i].done) continue;
            resume(i);
            block->fibres[i].done ? ended++ : waiting++;
        }
        left -= ended;
        // On a GPU threads that have ended no longer count at barriers; in between, all must meet.
        for (unsigned i = 0, first = MOST; i < threads && waiting; i++) {
            if (block->fibres[i].done) continue;
            if (first == MOST) first = i;
            if (block->fibres[i].barriers != block->fibres[first].barriers) {
                fprintf(stderr, "threads %u and %u of a block wait at different barriers\n", first, i);
                abort();
            }
        }
    }
}

inline void launch(Dim grid, Dim threads, void (*body)(void*), void* arguments) {
    if (threads.x > MOST) { fprintf(stderr, "%u threads in a block\n", threads.x); abort(); }
    if (!block) block = (Block*)calloc(1, sizeof(Block));
    block->body = body;
    block->arguments = arguments;
    blockDim = threads;
    for (unsigned i = 0; i < threads.x; i++)
        if (!block->fibres[i].stack) block->fibres[i].stack = (char*)malloc(STACK);
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) run_block();
}

// Calls a kernel with arguments given as the driver takes them: an address of each.
template <class... A, size_t... I>
inline void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}

}  // namespace emulation

static inline void __syncthreads() {
    emulation::block->fibres[emulation::block->running].barriers++;
    emulation::yield();
}

// What Rust finds by name.
#define EMULATE(NAME)                                                                                        \
    template <class... A> static void call_##NAME(void (*kernel)(A...), void** arguments) {                  \
        emulation::apply(kernel, arguments, std::index_sequence_for<A...>());                                \
    }                                                                                                        \
    extern "C" void emulate_##NAME(unsigned x, unsigned y, unsigned threads, void** arguments) {             \
        emulation::launch(Dim { x, y, 1 }, Dim { threads, 1, 1 },                                            \
                          [](void* a) { call_##NAME(NAME, (void**)a); }, arguments);                         \
    }
