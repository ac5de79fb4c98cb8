// A matrix of bf16 in shared memory, rows of `kColumns`, and the addresses that ldmatrix wants from it.
//
// Rows are cut into units of 16 bytes; unit u of row r lies at u ^ (r % 8). Eight neighbouring rows of one column of
// units then fall into eight different groups of banks, so ldmatrix and the fragment stores meet no bank conflict.
//
// With kPanelRows, the number of its rows, the matrix lies as wgmma wants it too: panels of 64 columns, one after the other
// (primitives_hopper.cuh: Panels). The same swizzle, so ldmatrix still meets no conflict.
#pragma once

#include "primitives.cuh"

namespace hedgehog {

constexpr int kUnit = 8;    // bf16 in 16 bytes
constexpr int kChunk = 64;  // tokens that are worked on together

// A place in shared memory that wgmma may read: in the emulation, what is written there waits for fence.proxy.async.
template <class Value>
struct OperandPlace {
    Value* place;
    __device__ __forceinline__ operator Value() const { return *place; }
    __device__ __forceinline__ const OperandPlace& operator=(Value value) const {
        *place = value;
        note_operand(place, sizeof(Value));
        return *this;
    }
};

template <int kColumns, int kPanelRows = 0>
struct Tile {
    static_assert(kColumns % (8 * kUnit) == 0, "the swizzle needs eight units in a row");
    static constexpr int kUnits = kColumns / kUnit;
    uint16_t* data;

    static constexpr int bytes(int rows) { return rows * kColumns * 2; }

    __device__ __forceinline__ uint16_t* unit(int row, int unit) const {
        if constexpr (kPanelRows > 0)
            return data + ((unit / 8 * kPanelRows + row) * 8 + ((unit ^ row) & 7)) * kUnit;
        else
            return data + (row * kUnits + (unit ^ (row & 7))) * kUnit;
    }

    // Two bf16 at (row, column), column even.
    __device__ __forceinline__ decltype(auto) pair(int row, int column) const {
        return place<uint32_t>(unit(row, column / kUnit) + column % kUnit);
    }

    // Eight bf16, a unit.
    __device__ __forceinline__ decltype(auto) eight(int row, int column_unit) const {
        return place<uint4>(unit(row, column_unit));
    }

    // A operand, rows row…row+15 and k = k…k+15, from a tile whose rows are the operand's rows.
    __device__ __forceinline__ void load_a(uint32_t (&a)[4], int row, int k, int lane) const {
        ldmatrix_x4(a, unit(row + (lane & 15), k / kUnit + (lane >> 4)));
    }

    // A operand, rows row…row+15 and k = k…k+15, from a tile whose rows are k: the operand is the tile's transpose.
    // With a gap, its last eight rows are those that lie `gap` units after the first eight.
    __device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], int row, int k, int lane, int gap = 1) const {
        ldmatrix_x4_transposed(a, unit(k + (lane & 7) + ((lane >> 4) << 3), row / kUnit + ((lane >> 3) & 1) * gap));
    }

    // Two B operands, k = k…k+15, columns n…n+7 (b[0], b[1]) and n+8…n+15 (b[2], b[3]), from a tile whose rows are k.
    // With a gap, the second operand's columns are those that lie `gap` units after the first's.
    __device__ __forceinline__ void load_b(uint32_t (&b)[4], int k, int n, int lane, int gap = 1) const {
        ldmatrix_x4_transposed(b, unit(k + (lane & 15), n / kUnit + (lane >> 4) * gap));
    }

    // The same from a tile whose rows are the operand's columns: the operand is the tile's transpose.
    __device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], int k, int n, int lane) const {
        ldmatrix_x4(b, unit(n + (lane & 7) + ((lane >> 4) << 3), k / kUnit + ((lane >> 3) & 1)));
    }

    // Starts copying rows 0…kRows-1 from `source`, `row_stride` elements apart. Rows for which valid(row) is false
    // become zeros, and are not read.
    template <int kRows, int kThreads, class Valid>
    __device__ __forceinline__ void copy_rows(const uint16_t* source, int64_t row_stride, Valid valid) const {
        const int thread = thread_index();
        static_assert(kRows * kUnits % kThreads == 0, "every thread copies as much");
#pragma unroll 1
        for (int i = 0; i < kRows * kUnits / kThreads; ++i) {
            const int index = thread + i * kThreads;
            const int row = index / kUnits, column_unit = index % kUnits;
            const bool wanted = valid(row);
            copy_async(unit(row, column_unit), wanted ? source + row * row_stride + column_unit * kUnit : source,
                       wanted);
        }
    }

   private:
    template <class Value>
    __device__ __forceinline__ static decltype(auto) place(uint16_t* where) {
        if constexpr (kPanelRows > 0)
            return OperandPlace<Value>{reinterpret_cast<Value*>(where)};
        else
            return (*reinterpret_cast<Value*>(where));  // a reference
    }
};

}  // namespace hedgehog
