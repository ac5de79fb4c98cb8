// Thread blocks on a CPU: every CUDA thread is a fiber, and only barriers and warp instructions hand over.
//
// The order in which fibers run between two meeting points is random, from a seed, and one warp may run far ahead of
// the others: where a __syncthreads is missing, some order gives wrong numbers. One that arrives at a barrier and goes on may
// also fall behind: where it arrives too early, some order shows it. Shared memory starts as NaN. A block
// that cannot go on (a barrier that not all threads reach, lanes of a warp in different instructions) ends the launch
// with a message instead of hanging.
//
// The places where threads wait, for others or for copies, are noted as they are met, and one of them may be left out: tests
// see that numbers are wrong then. Work is counted: what takes time on a GPU that no result shows.
//
// Under AddressSanitizer every switch is announced to it, and each block's shared memory is an allocation of its own.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN 1
#else
#define EMULATION_ASAN 0
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarpSize = 32;
// Small under AddressSanitizer: it clears its notes on the whole stack at every switch.
constexpr size_t kStackBytes = (EMULATION_ASAN ? 16 : 64) * 1024;
// The low end, which no thread may reach: no guard page stops one that runs over.
constexpr size_t kUntouchedBytes = 4096;
constexpr char kStackPattern = 0x5a;

// One copy of 16 bytes from global to shared memory that may happen now or as late as the wait for its group.
struct AsyncCopy {
    void* destination;
    const void* source;
    int num_source_bytes;  // the rest of the 16 bytes becomes zero
    void perform() const;
};

struct Fiber {
    int thread = 0;  // within its block
    bool started = false, finished = false;
    std::vector<char> stack;
    ucontext_t context{};
    jmp_buf resume_point;
    void* asan_fake_stack = nullptr;
    std::vector<AsyncCopy> open_copies;
    std::vector<std::vector<AsyncCopy>> committed_copies;
    std::vector<size_t> unfenced_words;  // of shared memory, written since the last fence.proxy.async
};

// Threads that meet at a named barrier, or for what all threads of a warpgroup do together.
struct Gathering {
    int num_expected = 0;  // 0: nobody has come yet
    std::vector<int> arrived, waiting;
};

// Where the lanes of a warp meet for an instruction that all of them execute together.
struct Meeting {
    const char* instruction = nullptr;
    int num_arrived = 0;
    void* operands[kWarpSize] = {};
};

struct Warp {
    std::vector<int> runnable_threads;
    Meeting meeting;
};

// What kernels have done since the counts were last read.
struct Work {
    int64_t matrix_wavefronts = 0;  // of ldmatrix: accesses of 128 bytes to shared memory, more where banks conflict
    int64_t products = 0;           // mma, 16×8×16
    int64_t slow_results = 0;       // exponentials, logarithms and reciprocals of the multiplexed unit
};

class Scheduler {
   public:
    Work work;

    // Whether threads are to wait at this place of the source.
    bool waits_at(const char* file, int line) {
        const auto [found, is_new] = place_index_.try_emplace({file, line}, static_cast<int>(places_.size()));
        if (is_new) {
            const char* name = std::strrchr(file, '/');
            places_.push_back(std::string(name ? name + 1 : file) + ":" + std::to_string(line));
        }
        return found->second != left_out_;
    }
    const std::vector<std::string>& places() const { return places_; }
    void leave_out(int place) { left_out_ = place; }  // -1: none
    void forget_places() {
        places_.clear();
        place_index_.clear();
        left_out_ = -1;
    }

    static Scheduler& get() {
        static Scheduler scheduler;
        return scheduler;
    }

    // Runs `body` once for each thread of each block, blocks in random order. Throws runtime_error when stuck.
    void launch(dim3 grid, int num_threads, size_t shared_bytes, const std::function<void()>& body) {
        if (num_threads % kWarpSize) throw std::runtime_error("the block is not a whole number of warps");
        std::vector<dim3> blocks;
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
        for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_below(i)]);
        grid_ = grid;
        num_threads_ = num_threads;
        body_ = &body;
        for (const dim3& block : blocks) run_block(block, shared_bytes);
    }

    void seed(uint64_t value) { random_state_ = value; }
    uint64_t random_below(uint32_t bound) { return (random() >> 32) * bound >> 32; }
    bool coin() { return random() >> 63; }

    Fiber& current() { return *current_; }
    dim3 block() const { return block_; }
    dim3 grid() const { return grid_; }
    int num_threads() const { return num_threads_; }
    unsigned char* shared_memory() { return shared_; }
    bool is_shared(const void* address, size_t num_bytes) const {
        auto* at = static_cast<const unsigned char*>(address);
        return at >= shared_ && at + num_bytes <= shared_ + shared_bytes_;
    }

    // __syncthreads
    void block_barrier() {
        if (++num_at_barrier_ < num_threads_) {
            hand_over();
            return;
        }
        num_at_barrier_ = 0;
        for (int thread = 0; thread < num_threads_; ++thread)
            if (thread != current_->thread) make_runnable(thread);
    }

    // bar.sync (waits) and bar.arrive (does not) on barrier 1 to 15.
    void named_barrier(int barrier, int num_threads, bool waits) {
        if (barrier < 1 || barrier > 15) fail("named barriers are 1 to 15, not " + std::to_string(barrier));
        if (num_threads % kWarpSize || num_threads > num_threads_) fail("a barrier for part of a warp, or for too many");
        gather(barriers_[barrier], num_threads, waits, [] {});
        if (!waits) fall_behind();
    }

    // Where a thread goes on without waiting, all others may be faster: in half of the blocks, half of the times.
    void fall_behind() {
        if (!falls_behind_ || coin()) return;
        make_runnable(current_->thread);
        burst_ = 0;
        leaves_group_ = true;
        hand_over();
    }

    // The thread joins; if it waits, it goes on when `num_expected` have come. The last one to come runs `complete`.
    template <class Complete>
    void gather(Gathering& gathering, int num_expected, bool waits, Complete complete) {
        const int thread = current_->thread;
        if (gathering.num_expected == 0) gathering.num_expected = num_expected;
        if (gathering.num_expected != num_expected) fail("a barrier is used for two numbers of threads at a time");
        for (int other : gathering.arrived)
            if (other == thread) fail("a thread comes to a barrier twice before the others came once");
        gathering.arrived.push_back(thread);
        if (static_cast<int>(gathering.arrived.size()) < num_expected) {
            if (!waits) return;
            gathering.waiting.push_back(thread);
            hand_over();
            return;
        }
        complete();
        for (int other : gathering.waiting) make_runnable(other);
        gathering = Gathering{};
    }

    // The async proxy (wgmma) reads shared memory as it was at the writer's last fence.proxy.async. From here to the
    // block's end the emulation remembers who wrote each word without a fence.
    void track_async_proxy() {
        if (writers_.empty()) writers_.assign(shared_bytes_ / 4, -1);
    }
    void note_write(const void* address, size_t num_bytes) {
        if (writers_.empty()) return;
        const size_t first = (static_cast<const unsigned char*>(address) - shared_) / 4;
        for (size_t word = first; word < first + num_bytes / 4; ++word) {
            writers_[word] = static_cast<int16_t>(current_->thread);
            current_->unfenced_words.push_back(word);
        }
    }
    void fence_async_proxy() {
        for (size_t word : current_->unfenced_words)
            if (writers_[word] == current_->thread) writers_[word] = -1;
        current_->unfenced_words.clear();
    }
    // The thread that wrote at `offset` into shared memory and has not passed a fence since, or -1.
    int unfenced_writer(size_t offset) const { return writers_.empty() ? -1 : writers_[offset / 4]; }

    size_t shared_bytes() const { return shared_bytes_; }
    uint64_t blocks_begun() const { return blocks_begun_; }

    // All lanes of the warp bring `operands`; the last one runs `compute` on the operands of all, by lane.
    template <class Operands, class Compute>
    void warp_meeting(const char* instruction, Operands& operands, Compute compute) {
        Meeting& meeting = warps_[current_->thread / kWarpSize].meeting;
        if (meeting.num_arrived == 0) meeting.instruction = instruction;
        if (meeting.instruction != instruction && std::strcmp(meeting.instruction, instruction) != 0)
            fail(std::string("lanes of one warp are in ") + meeting.instruction + " and in " + instruction);
        meeting.operands[current_->thread % kWarpSize] = &operands;
        if (++meeting.num_arrived < kWarpSize) {
            hand_over();
            return;
        }
        meeting.num_arrived = 0;
        Operands* lanes[kWarpSize];
        for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane] = static_cast<Operands*>(meeting.operands[lane]);
        compute(lanes);
        int first_thread = current_->thread / kWarpSize * kWarpSize;
        for (int thread = first_thread; thread < first_thread + kWarpSize; ++thread)
            if (thread != current_->thread) make_runnable(thread);
    }

    // Ends the launch from within a fiber: it is never resumed.
    [[noreturn]] void fail(const std::string& message) {
        failure_ = message + " (thread " + std::to_string(current_->thread) + ")";
        hand_over();
        std::abort();
    }

   private:
    void run_block(dim3 block, size_t shared_bytes) {
        block_ = block;
        shared_bytes_ = shared_bytes;
        void* memory = nullptr;
        if (posix_memalign(&memory, 1024, shared_bytes ? shared_bytes : 16)) throw std::bad_alloc();
        shared_ = static_cast<unsigned char*>(memory);
        std::memset(shared_, 0xff, shared_bytes);  // NaN in every floating-point format
        fibers_.resize(num_threads_);
        warps_.assign(num_threads_ / kWarpSize, Warp{});
        for (Gathering& barrier : barriers_) barrier = Gathering{};
        writers_.clear();
        ++blocks_begun_;
        num_at_barrier_ = num_finished_ = burst_ = 0;
        falls_behind_ = coin();
        leaves_group_ = false;
        failure_.clear();
        for (int thread = 0; thread < num_threads_; ++thread) {
            Fiber& fiber = fibers_[thread];
            fiber.thread = thread;
            fiber.started = fiber.finished = false;
            fiber.stack.resize(kStackBytes);
            fiber.open_copies.clear();
            fiber.committed_copies.clear();
            fiber.unfenced_words.clear();
            make_runnable(thread);
        }
        while (goes_on() && (std::exchange(chosen_, false) || choose())) enter(*current_);
        for (const Fiber& fiber : fibers_) {
            const char* low = fiber.stack.data();  // equal to their neighbours, so all the same
            if (fiber.started && (low[0] != kStackPattern || std::memcmp(low, low + 1, kUntouchedBytes - 1)))
                throw std::runtime_error("a thread needs more than kStackBytes");
        }
        std::free(memory);
        shared_ = nullptr;
        if (!failure_.empty()) throw std::runtime_error(failure_);
        if (num_finished_ < num_threads_) throw std::runtime_error(describe_stuck());
    }

    bool goes_on() const { return num_finished_ < num_threads_ && failure_.empty(); }

    void make_runnable(int thread) { warps_[thread / kWarpSize].runnable_threads.push_back(thread); }

    // The next fiber: a random lane of a warp that stays the favourite for a burst of random length; then mostly another
    // of its warpgroup.
    bool choose() {
        if (burst_ == 0 || warps_[favourite_].runnable_threads.empty()) {
            std::vector<int> candidates, in_favourite_group;
            for (size_t warp = 0; warp < warps_.size(); ++warp) {
                if (warps_[warp].runnable_threads.empty()) continue;
                candidates.push_back(static_cast<int>(warp));
                if (static_cast<int>(warp) / 4 == favourite_ / 4) in_favourite_group.push_back(static_cast<int>(warp));
            }
            if (candidates.empty()) return false;
            // what a warpgroup does together it can only finish if all four of its warps are the favourites in turn
            if (!std::exchange(leaves_group_, false) && !in_favourite_group.empty() && random_below(64))
                candidates.swap(in_favourite_group);
            favourite_ = candidates[random_below(candidates.size())];
            static constexpr int kBursts[] = {1, 64, 4096, 1 << 20};
            burst_ = kBursts[random_below(4)];
        }
        --burst_;
        std::vector<int>& threads = warps_[favourite_].runnable_threads;
        size_t at = random_below(threads.size());
        current_ = &fibers_[threads[at]];
        threads[at] = threads.back();
        threads.pop_back();
        return true;
    }

    std::string describe_stuck() const {
        std::string text = "deadlock: " + std::to_string(num_at_barrier_) + " of " + std::to_string(num_threads_) +
                           " threads wait at __syncthreads, " + std::to_string(num_finished_) + " have returned";
        for (size_t barrier = 0; barrier < kNumBarriers; ++barrier)
            if (!barriers_[barrier].waiting.empty())
                text += "; barrier " + std::to_string(barrier) + ": " +
                        std::to_string(barriers_[barrier].arrived.size()) + " of " +
                        std::to_string(barriers_[barrier].num_expected) + " have come";
        for (size_t warp = 0; warp < warps_.size(); ++warp)
            if (warps_[warp].meeting.num_arrived)
                text += "; warp " + std::to_string(warp) + ": " + std::to_string(warps_[warp].meeting.num_arrived) +
                        " lanes wait in " + warps_[warp].meeting.instruction;
        return text;
    }

    static void entry() {
        Scheduler& scheduler = get();
#if EMULATION_ASAN
        __sanitizer_finish_switch_fiber(nullptr, &scheduler.asan_stack_, &scheduler.asan_stack_bytes_);
#endif
        (*scheduler.body_)();
        if (!scheduler.current_->open_copies.empty() || !scheduler.current_->committed_copies.empty())
            scheduler.fail("a thread ends with copies under way");
        scheduler.current_->finished = true;
        ++scheduler.num_finished_;
        scheduler.hand_over();
        std::abort();
    }

    // Two ways to switch: swapcontext, announced to AddressSanitizer; and setjmp/longjmp, which makes no system call
    // and goes straight to the next fiber (a warp instruction costs 32 switches, most of the emulation's time).
#if EMULATION_ASAN
    void enter(Fiber& fiber) {
        if (!fiber.started) begin(fiber);
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.data(), fiber.stack.size());
        swapcontext(&home_, &fiber.context);
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    }
    void hand_over() {
        Fiber& fiber = *current_;
        __sanitizer_start_switch_fiber(fiber.finished ? nullptr : &fiber.asan_fake_stack, asan_stack_,
                                       asan_stack_bytes_);
        swapcontext(&fiber.context, &home_);
        __sanitizer_finish_switch_fiber(fiber.asan_fake_stack, &asan_stack_, &asan_stack_bytes_);
    }
#else
    __attribute__((noinline)) void enter(Fiber& fiber) {
        if (_setjmp(home_point_)) return;
        if (fiber.started) _longjmp(fiber.resume_point, 1);
        begin(fiber);
        setcontext(&fiber.context);
    }
    __attribute__((noinline)) void hand_over() {
        Fiber& fiber = *current_;
        chosen_ = goes_on() && choose();
        if (_setjmp(fiber.resume_point)) return;
        if (!chosen_ || !current_->started) _longjmp(home_point_, 1);
        chosen_ = false;
        _longjmp(current_->resume_point, 1);
    }
#endif

    void begin(Fiber& fiber) {
        fiber.started = true;
        std::memset(fiber.stack.data(), kStackPattern, kUntouchedBytes);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Scheduler::entry, 0);
    }

    // SplitMix64 (Steele, Lea, Flood 2014): one draw for every switch, so it has to be quick.
    uint64_t random() {
        uint64_t value = random_state_ += 0x9e3779b97f4a7c15;
        value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
        value = (value ^ value >> 27) * 0x94d049bb133111eb;
        return value ^ value >> 31;
    }

    std::map<std::pair<const void*, int>, int> place_index_;
    std::vector<std::string> places_;
    int left_out_ = -1;
    uint64_t random_state_ = 0;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    const std::function<void()>* body_ = nullptr;
    Fiber* current_ = nullptr;
    dim3 block_, grid_;
    int num_threads_ = 0, num_at_barrier_ = 0, num_finished_ = 0, favourite_ = 0, burst_ = 0;
    bool falls_behind_ = false, leaves_group_ = false;
    unsigned char* shared_ = nullptr;
    size_t shared_bytes_ = 0;
    static constexpr size_t kNumBarriers = 16;
    Gathering barriers_[kNumBarriers];
    std::vector<int16_t> writers_;  // by word of shared memory; empty where no kernel uses the async proxy
    uint64_t blocks_begun_ = 0;
    bool chosen_ = false;  // current_ is whom to enter next
    std::string failure_;
    ucontext_t home_{};
    jmp_buf home_point_;
    const void* asan_stack_ = nullptr;
    size_t asan_stack_bytes_ = 0;
};

inline void AsyncCopy::perform() const {
    std::memset(destination, 0, 16);
    if (num_source_bytes > 0) std::memcpy(destination, source, num_source_bytes);
    Scheduler::get().note_write(destination, 16);
}

}  // namespace emulation
