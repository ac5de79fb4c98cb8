// Checks of the emulation itself, against the PTX manual's tables written out by hand. `PROGRAM NAME` runs one check
// and exits with 1 and a line on stderr if it fails; without a name it lists them.
#include "primitives.cuh"

using namespace hedgehog;

#define EXPECT(condition)                                                                  \
    do {                                                                                   \
        if (!(condition)) throw std::runtime_error("line " + std::to_string(__LINE__) + ": " #condition); \
    } while (0)

namespace {

struct Nothing {};
struct Results {
    float* numbers;
    uint32_t* words;
};

template <class Arguments>
void run(void (*kernel)(const Arguments), int num_threads, int shared_bytes, Arguments arguments) {
    if (launch(kernel, dim3(1), num_threads, shared_bytes, nullptr, arguments) != cudaSuccess)
        throw std::runtime_error(cudaGetErrorString(cudaErrorLaunchFailure));
}

template <class Arguments>
std::string failure_of(void (*kernel)(const Arguments), int num_threads, int shared_bytes, Arguments arguments) {
    if (launch(kernel, dim3(1), num_threads, shared_bytes, nullptr, arguments) == cudaSuccess) return "";
    return cudaGetErrorString(cudaErrorLaunchFailure);
}

uint16_t bf16(float x) { return emulation::float_to_bf16(x); }

// ---- mma.m16n8k16, PTX ISA "Matrix Fragments for mma.m16n8k16 with floating point type" ----
// a0…a7: row = groupID for i = 0, 1, 4, 5, else groupID + 8; col = 2·tid + (i & 1), + 8 for i ≥ 4
// b0…b3: row = 2·tid + (i & 1), + 8 for i ≥ 2; col = groupID          c0…c3: row = groupID, + 8 for i ≥ 2; col = 2·tid + (i & 1)

float a_element(int row, int column) { return float((row * 7 + column * 3) % 17 - 8); }
float b_element(int row, int column) { return float((row * 5 + column * 11) % 13 - 6); }
float c_element(int row, int column) { return float(row * 8 + column); }

void mma_kernel(const Results results) {
    const int lane = threadIdx.x, group = lane >> 2, tid = lane % 4;
    uint16_t a_halves[8], b_halves[4];
    for (int i = 0; i < 8; ++i) {
        const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
        a_halves[i] = bf16(a_element(row, tid * 2 + (i & 1) + (i >= 4 ? 8 : 0)));
    }
    for (int i = 0; i < 4; ++i) b_halves[i] = bf16(b_element(tid * 2 + (i & 1) + (i >= 2 ? 8 : 0), group));
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; ++r) a[r] = a_halves[2 * r] | uint32_t(a_halves[2 * r + 1]) << 16;
    for (int r = 0; r < 2; ++r) b[r] = b_halves[2 * r] | uint32_t(b_halves[2 * r + 1]) << 16;
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = c_element(i < 2 ? group : group + 8, tid * 2 + (i & 1));
    mma(c, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) results.numbers[(i < 2 ? group : group + 8) * 8 + tid * 2 + (i & 1)] = c[i];
}

void check_mma() {
    std::vector<float> got(16 * 8);
    run(&mma_kernel, 32, 0, Results{got.data(), nullptr});
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float sum = c_element(row, column);
            for (int k = 0; k < 16; ++k) sum += a_element(row, k) * b_element(k, column);
            EXPECT(got[row * 8 + column] == sum);
        }
}

// One product at a time: lane, register and half named by hand.
void one_product_kernel(const Results results) {
    const int lane = threadIdx.x;
    const uint32_t two = bf16(2.0f), three = bf16(3.0f);
    uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
    if (lane == 22) a[3] = two << 16;    // group 5, tid 2: row 13, column 13
    if (lane == 30) b[1] = three << 16;  // group 7, tid 2: row 13, column 7
    if (lane == 1) a[0] = three;         // row 0, column 2
    if (lane == 1) b[0] = three;         // row 2, column 0
    float c[4] = {};
    mma(c, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) results.numbers[lane * 4 + i] = c[i];
}

void check_one_product() {
    std::vector<float> got(128);
    run(&one_product_kernel, 32, 0, Results{got.data(), nullptr});
    for (int at = 0; at < 128; ++at) {
        float expected = 0.0f;
        if (at == 23 * 4 + 3) expected = 6.0f;  // C row 13, column 7: group 5, tid 3, c3
        if (at == 0) expected = 9.0f;           // C row 0, column 0
        EXPECT(got[at] == expected);
    }
}

// ---- ldmatrix: threads 8i…8i+7 address the rows of matrix i; thread t gets row t/4, elements 2(t%4), 2(t%4)+1 ----

void ldmatrix_kernel(const Results results) {
    const int lane = threadIdx.x;
    auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared_memory());
    for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = uint16_t(lane * 100 + i);  // row `lane % 8` of matrix lane / 8
    __syncthreads();
    uint32_t straight[4], transposed[4];
    ldmatrix_x4(straight, shared + lane * 8);
    ldmatrix_x4_transposed(transposed, shared + lane * 8);
    for (int i = 0; i < 4; ++i) {
        results.words[lane * 8 + i] = straight[i];
        results.words[lane * 8 + 4 + i] = transposed[i];
    }
}

void check_ldmatrix() {
    std::vector<uint32_t> got(32 * 8);
    run(&ldmatrix_kernel, 32, 512, Results{nullptr, got.data()});
    EXPECT(got[0 * 8 + 0] == (0u | 1u << 16));        // thread 0: row 0, elements 0 and 1
    EXPECT(got[5 * 8 + 1] == (902u | 903u << 16));    // thread 5 of matrix 1: row 1 (thread 9's), elements 2 and 3
    EXPECT(got[31 * 8 + 3] == (3106u | 3107u << 16)); // thread 31 of matrix 3: row 7, elements 6 and 7
    EXPECT(got[0 * 8 + 4] == (0u | 100u << 16));      // transposed: rows 0 and 1 of column 0
    EXPECT(got[6 * 8 + 5] == (1201u | 1301u << 16));  // thread 6, matrix 1: column 1, rows 4 and 5
    EXPECT(got[31 * 8 + 7] == (3007u | 3107u << 16)); // thread 31, matrix 3: column 7, rows 6 and 7
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const unsigned row = 8 * i + lane / 4, first = 2 * (lane % 4);
            EXPECT(got[lane * 8 + i] == (row * 100 + first) + ((row * 100 + first + 1) << 16));
            EXPECT(got[lane * 8 + 4 + i] == ((8 * i + first) * 100 + lane / 4) +
                                                (((8 * i + first + 1) * 100 + lane / 4) << 16));
        }
}

void misaligned_kernel(const Nothing) {
    uint32_t r[4];
    ldmatrix_x4(r, dynamic_shared_memory() + 8);
}
void outside_kernel(const Nothing) {
    uint32_t r[4];
    ldmatrix_x4(r, dynamic_shared_memory() + 512);
}

void check_addresses() {
    EXPECT(failure_of(&misaligned_kernel, 32, 512, Nothing{}).find("not aligned") != std::string::npos);
    EXPECT(failure_of(&outside_kernel, 32, 512, Nothing{}).find("outside of shared memory") != std::string::npos);
}

// ---- bf16: nearest, ties to even ----

void check_rounding() {
    EXPECT(bf16(1.0f) == 0x3f80);
    EXPECT(bf16(1.0f + 0.00390625f) == 0x3f80);             // half a unit: to even, down
    EXPECT(bf16(1.0f + 3 * 0.00390625f) == 0x3f82);         // half a unit: to even, up
    EXPECT(bf16(1.0f + 0.00390625f + 1e-6f) == 0x3f81);     // just above half
    EXPECT(bf16(-2.5f) == 0xc020);
    EXPECT(bf16(3.4e38f) == 0x7f80);                        // beyond the largest: infinity
    EXPECT(bf16(INFINITY) == 0x7f80);
    EXPECT(bf16(emulation::bits_to_float(0x7f800001)) == 0x7fff);  // a NaN whose mantissa would be rounded away
    EXPECT(pack_bf16(1.0f, -2.5f) == 0xc0203f80u);
    EXPECT(low_bf16(0xc0203f80u) == 1.0f && high_bf16(0xc0203f80u) == -2.5f);
}

void shuffle_kernel(const Results results) {
    const int lane = threadIdx.x % 32;
    results.numbers[threadIdx.x] = shuffle_xor(float(threadIdx.x), 5);
    results.numbers[64 + threadIdx.x] = quad_sum(float(lane));
    results.numbers[128 + threadIdx.x] = quad_max(float(-lane));
}

void check_shuffle() {
    std::vector<float> got(192);
    run(&shuffle_kernel, 64, 0, Results{got.data(), nullptr});
    for (int thread = 0; thread < 64; ++thread) {
        const int quad = thread % 32 / 4 * 4;
        EXPECT(got[thread] == float(thread ^ 5));
        EXPECT(got[64 + thread] == float(4 * quad + 6));
        EXPECT(got[128 + thread] == float(-quad));
    }
}

// ---- cp.async: done at any time up to its wait; other groups may stay open ----

struct Copies {
    const uint32_t* source;
    uint32_t* early;
    uint32_t* late;
};

void copy_kernel(const Copies copies) {
    auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
    const int lane = threadIdx.x;
    copy_async(shared + 4 * lane, copies.source + 4 * lane, true);
    copy_async_commit();
    copy_async(shared + 128 + 4 * lane, copies.source, false);
    copy_async_commit();
    copies.early[lane] = shared[4 * lane];
    copy_async_wait<1>();
    copies.late[lane] = shared[4 * lane];
    copies.early[32 + lane] = shared[128 + 4 * lane];
    copy_async_wait<0>();
    copies.late[32 + lane] = shared[128 + 4 * lane];
}

void check_copies() {
    alignas(16) uint32_t source[128];
    for (uint32_t i = 0; i < 128; ++i) source[i] = i + 1;
    uint32_t early[64], late[64];
    run(&copy_kernel, 32, 1024, Copies{source, early, late});
    int num_old = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        EXPECT(late[lane] == 4 * lane + 1);
        EXPECT(late[32 + lane] == 0);
        for (int group = 0; group < 2; ++group) num_old += early[32 * group + lane] == 0xffffffffu;
    }
    EXPECT(num_old > 8 && num_old < 56);  // before the wait: some done, some not, and shared memory began as NaN
}

// ---- barriers ----

template <bool kBarrier>
void exchange_kernel(const Results results) {
    auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
    shared[threadIdx.x] = threadIdx.x;
    if (kBarrier) __syncthreads();
    results.words[threadIdx.x] = shared[threadIdx.x ^ 64];
}

template <bool kBarrier>
int num_wrong_exchanges() {
    int wrong = 0;
    for (uint64_t seed = 0; seed < 20; ++seed) {
        emulation::Scheduler::get().seed(seed);
        std::vector<uint32_t> got(128);
        run(&exchange_kernel<kBarrier>, 128, 512, Results{nullptr, got.data()});
        for (uint32_t thread = 0; thread < 128; ++thread) wrong += got[thread] != (thread ^ 64);
    }
    return wrong;
}

void check_missing_barrier() {
    EXPECT(num_wrong_exchanges<true>() == 0);
    EXPECT(num_wrong_exchanges<false>() > 0);
}

void lonely_barrier_kernel(const Nothing) {
    if (threadIdx.x < 32) __syncthreads();
}
void split_warp_kernel(const Nothing) {
    uint32_t a[4] = {};
    float c[4] = {};
    if (threadIdx.x < 16)
        mma(c, a, 0, 0);
    else
        shuffle_xor(1.0f, 1);
}
void half_warp_kernel(const Nothing) {
    if (threadIdx.x < 16) shuffle_xor(1.0f, 1);
}

void check_stuck() {
    EXPECT(failure_of(&lonely_barrier_kernel, 64, 0, Nothing{}).find("32 of 64 threads wait at __syncthreads") !=
           std::string::npos);
    EXPECT(failure_of(&split_warp_kernel, 32, 0, Nothing{}).find("lanes of one warp are in") != std::string::npos);
    EXPECT(failure_of(&half_warp_kernel, 32, 0, Nothing{}).find("16 lanes wait in shfl.xor") != std::string::npos);
}

void order_kernel(const Results results) {
    static int counter;
    if (threadIdx.x == 0) counter = 0;
    __syncthreads();
    results.words[threadIdx.x] = counter++;
}

void check_seed() {
    std::vector<uint32_t> first(64), again(64), other(64);
    for (auto [seed, words] : {std::pair{7, &first}, std::pair{7, &again}, std::pair{8, &other}}) {
        emulation::Scheduler::get().seed(seed);
        run(&order_kernel, 64, 0, Results{nullptr, words->data()});
    }
    EXPECT(first == again);
    EXPECT(first != other);
}

#ifdef __SANITIZE_ADDRESS__
void overrun_kernel(const Nothing) {
    volatile unsigned char* shared = dynamic_shared_memory();
    if (threadIdx.x == 31) shared[1024] = 1;
}
void check_overrun() { run(&overrun_kernel, 32, 1024, Nothing{}); }
#endif

}  // namespace

#include "warpgroup_checks.h"

namespace {

const std::pair<const char*, void (*)()> kChecks[] = {
    {"mma", check_mma},
    {"one_product", check_one_product},
    {"ldmatrix", check_ldmatrix},
    {"addresses", check_addresses},
    {"rounding", check_rounding},
    {"shuffle", check_shuffle},
    {"copies", check_copies},
    {"missing_barrier", check_missing_barrier},
    {"stuck", check_stuck},
    {"seed", check_seed},
    {"descriptors", check_descriptors},
    {"products", check_products},
    {"misuse", check_misuse},
    {"stmatrix", check_stmatrix},
    {"named_barriers", check_named_barriers},
#ifdef __SANITIZE_ADDRESS__
    {"overrun", check_overrun},
#endif
};

}  // namespace

int main(int count, char** arguments) {
    for (auto [name, check] : kChecks) {
        if (count < 2) std::printf("%s\n", name);
        if (count < 2 || std::string(name) != arguments[1]) continue;
        try {
            check();
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%s\n", error.what());
            return 1;
        }
        return 0;
    }
    return count < 2 ? 0 : 2;
}
