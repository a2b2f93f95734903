// Copies and hashes cells of KV pages. A cell is one layer of one block: `layer_bytes` bytes, digest and copy in one pass.
//
// Whoever calls has checked nothing: every block and place is checked here before the first byte is touched.

#include <algorithm>

#include "xxh3.h"

using xxh3::Lanes;
using xxh3::Stripe;

constexpr int64_t PAGE_BYTES = 4096, TOUCH_BYTES = 16 * PAGE_BYTES;

extern "C" {

struct Pages {  // as in pages.py
    uint8_t* address;
    int64_t num_blocks, num_layers, layer_bytes;
};

struct Cells {  // per (place, layer): the block that was hashed for it, or -1, and its digest
    int64_t* sources;
    uint64_t* digests;
    int64_t num_places;
};

}  // extern "C"

namespace {

enum class Put { NONE, STORE, STREAM };  // STREAM passes by the caches: no read of what is overwritten

template <Put PUT>
inline void put(const Stripe& stripe, uint8_t* to) {
    if constexpr (PUT == Put::STORE) stripe.store(to);
    if constexpr (PUT == Put::STREAM) stripe.stream(to);
}

template <Put PUT>
uint64_t digest(const uint8_t* from, uint8_t* to, int64_t length) {
    using namespace xxh3;
    Lanes lanes;
    const int64_t num_blocks = (length - 1) / BLOCK;
    for (int64_t k = 0; k < num_blocks; ++k, from += BLOCK, to += BLOCK) {
        for (int64_t n = 0; n < STRIPES; ++n) {
            const Stripe stripe = Stripe::load(from + n * STRIPE);
            put<PUT>(stripe, to + n * STRIPE);
            lanes.take(stripe, SECRET + 8 * n);
        }
        lanes.stir(SECRET + SECRET_BYTES - STRIPE);
    }
    const int64_t left = length - num_blocks * BLOCK, num_stripes = (left - 1) / STRIPE;
    for (int64_t n = 0; n < num_stripes; ++n) {
        const Stripe stripe = Stripe::load(from + n * STRIPE);
        put<PUT>(stripe, to + n * STRIPE);
        lanes.take(stripe, SECRET + 8 * n);
    }
    const Stripe last = Stripe::load(from + left - STRIPE);
    if constexpr (PUT != Put::NONE) last.store(to + left - STRIPE);  // unaligned, where it overlaps the one before
    lanes.take(last, SECRET + SECRET_BYTES - STRIPE - 7);
    return finish(lanes, length);
}

void copy(const uint8_t* from, uint8_t* to, int64_t length, bool is_streaming) {
    using xxh3::STRIPE;
    if (!is_streaming) {
        std::memcpy(to, from, length);
        return;
    }
    int64_t n = 0;
    for (; n + STRIPE <= length; n += STRIPE) Stripe::load(from + n).stream(to + n);
    std::memcpy(to + n, from + n, length - n);
}

// One line of each page of the cells that come next: blocks lie anywhere, and the walk of page tables is a large part
// of what a small cell costs. More lines, or the target's pages too, gained nothing more; of long runs the prefetcher of
// the CPU knows the rest.
void touch(const uint8_t* from, int64_t length) {
    for (int64_t n = 0; n < std::min(length, TOUCH_BYTES); n += PAGE_BYTES) __builtin_prefetch(from + n);
}

bool are_below(const int64_t* blocks, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i)
        if (blocks[i] < 0 || blocks[i] >= limit) return false;
    return true;
}

bool is_range(int64_t lo, int64_t hi, int64_t limit) { return 0 <= lo && lo < hi && hi <= limit; }

}  // namespace

extern "C" {

// Layers [lo, hi) of own blocks sources[i] to peer blocks targets[i], which are places first + i of a transfer.
// `cells` may be null: nothing is hashed. Returns 0, or -1: out of bounds, nothing was done.
int copy_cells(const Pages* own, const Pages* peer, const int64_t* sources, const int64_t* targets, int64_t count,
               int64_t first, int64_t lo, int64_t hi, const Cells* cells, int is_streaming) {
    if (!are_below(sources, count, own->num_blocks) || !are_below(targets, count, peer->num_blocks) ||
        !is_range(lo, hi, own->num_layers) || own->num_layers != peer->num_layers ||
        own->layer_bytes != peer->layer_bytes || (cells && !is_range(first, first + count, cells->num_places)))
        return -1;
    const int64_t size = own->layer_bytes, layers = own->num_layers;
    is_streaming = is_streaming && size % xxh3::STRIPE == 0 && reinterpret_cast<uint64_t>(peer->address) % 64 == 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint8_t* from = own->address + (sources[i] * layers + lo) * size;
        uint8_t* to = peer->address + (targets[i] * layers + lo) * size;
        if (i + 1 < count) touch(own->address + (sources[i + 1] * layers + lo) * size, (hi - lo) * size);
        if (!cells) {
            copy(from, to, (hi - lo) * size, is_streaming);
            continue;
        }
        for (int64_t layer = lo; layer < hi; ++layer, from += size, to += size) {
            const int64_t cell = (first + i) * layers + layer;
            cells->digests[cell] =
                is_streaming ? digest<Put::STREAM>(from, to, size) : digest<Put::STORE>(from, to, size);
            cells->sources[cell] = sources[i];
        }
    }
    if (is_streaming) xxh3::fence();  // before anybody is told that the bytes are there
    return 0;
}

// Digests of layers [lo, hi) of blocks[i], which are places first + i. Returns as copy_cells.
int hash_cells(const Pages* own, const int64_t* blocks, int64_t count, int64_t first, int64_t lo, int64_t hi,
               const Cells* cells) {
    if (!are_below(blocks, count, own->num_blocks) || !is_range(lo, hi, own->num_layers) ||
        !is_range(first, first + count, cells->num_places))
        return -1;
    const int64_t size = own->layer_bytes, layers = own->num_layers;
    for (int64_t i = 0; i < count; ++i) {
        if (i + 1 < count) touch(own->address + (blocks[i + 1] * layers + lo) * size, (hi - lo) * size);
        for (int64_t layer = lo; layer < hi; ++layer) {
            const int64_t cell = (first + i) * layers + layer;
            cells->digests[cell] = digest<Put::NONE>(own->address + (blocks[i] * layers + layer) * size, nullptr, size);
            cells->sources[cell] = blocks[i];
        }
    }
    return 0;
}

// Of places 0..count - 1, which should hold blocks[i]: hash the cells whose digest is not of that block, from cell
// `start` on, until `max_bytes` were hashed. Returns the cell to go on with; count * num_layers: done; -1: as above.
int64_t fill_cells(const Pages* own, const int64_t* blocks, int64_t count, const Cells* cells, int64_t start,
                   int64_t max_bytes) {
    const int64_t layers = own->num_layers;
    if (count > cells->num_places || start < 0 || !are_below(blocks, count, own->num_blocks)) return -1;
    for (int64_t cell = start; cell < count * layers; ++cell) {
        const int64_t block = blocks[cell / layers];
        if (cells->sources[cell] == block) continue;
        if (max_bytes <= 0) return cell;
        hash_cells(own, &block, 1, cell / layers, cell % layers, cell % layers + 1, cells);
        max_bytes -= own->layer_bytes;
    }
    return count * layers;
}

}  // extern "C"
