// The copy kernel: every item of every row, between pages and slots. See device.rs for the tables.
//
// A warp copies one item at a time. Items have at most 4096 bytes, which is 16 bytes for each of 32 lanes, 8 times: all
// eight are asked for before the first one is written, because a read over the bus takes about a microsecond.
//
// kernel.ptx is made from this by .ci/ptx.py.

typedef unsigned long long u64;
typedef unsigned int u32;

struct Row {
    u64 page, slot;
};

struct Item {
    u64 page, slot, bytes;
};

// One whole vector per lane and round. The bytes behind the last whole round go one vector at a time.
template <typename Word>
__device__ __forceinline__ void copy_words(char *to, const char *from, u32 bytes, u32 lane) {
    const u32 count = bytes / sizeof(Word);
    Word *target = reinterpret_cast<Word *>(to);
    const Word *source = reinterpret_cast<const Word *>(from);
    u32 at = lane;
    for (; at + 7 * 32 < count; at += 8 * 32) {
        Word held[8];
#pragma unroll
        for (int i = 0; i < 8; i++) held[i] = source[at + i * 32];
#pragma unroll
        for (int i = 0; i < 8; i++) target[at + i * 32] = held[i];
    }
    for (; at < count; at += 32) target[at] = source[at];
    const u32 done = count * sizeof(Word);
    for (u32 byte = done + lane; byte < bytes; byte += 32) to[byte] = from[byte];
}

__device__ __forceinline__ void copy_item(char *to, const char *from, u32 bytes, u32 lane) {
    const u32 difference = static_cast<u32>(reinterpret_cast<u64>(to) ^ reinterpret_cast<u64>(from));
    const u32 word = difference & 1 ? 1 : difference & 2 ? 2 : difference & 4 ? 4 : difference & 8 ? 8 : 16;
    // Both sides lie equally far from a multiple of the word: the bytes up to it go first.
    u32 head = (word - static_cast<u32>(reinterpret_cast<u64>(to))) & (word - 1);
    head = head < bytes ? head : bytes;
    if (lane < head) to[lane] = from[lane];
    to += head;
    from += head;
    bytes -= head;
    switch (word) {
    case 16: copy_words<uint4>(to, from, bytes, lane); break;
    case 8: copy_words<u64>(to, from, bytes, lane); break;
    case 4: copy_words<u32>(to, from, bytes, lane); break;
    case 2: copy_words<unsigned short>(to, from, bytes, lane); break;
    default: copy_words<char>(to, from, bytes, lane); break;
    }
}

extern "C" __global__ void __launch_bounds__(256)
kvortex_copy(const Row *rows, u64 row_count, const Item *items, u64 item_count, u32 to_slots) {
    const u32 lane = threadIdx.x % 32;
    const u64 warps = static_cast<u64>(gridDim.x) * (blockDim.x / 32);
    const u64 first = static_cast<u64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const u64 row_step = warps / item_count, item_step = warps % item_count;
    u64 row = first / item_count, item = first % item_count;
    while (row < row_count) {
        const Row r = rows[row];
        const Item i = items[item];
        char *page = reinterpret_cast<char *>(r.page + i.page);
        char *slot = reinterpret_cast<char *>(r.slot + i.slot);
        const u32 bytes = static_cast<u32>(i.bytes);
        if (to_slots) {
            copy_item(slot, page, bytes, lane);
        } else {
            copy_item(page, slot, bytes, lane);
        }
        row += row_step;
        item += item_step;
        if (item >= item_count) {
            item -= item_count;
            row += 1;
        }
    }
}
