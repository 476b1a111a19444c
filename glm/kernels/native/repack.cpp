// From the neutral layout that files have to the one in product.h, at about the speed at which memory is written.
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "export.h"
#include "pool.h"
#include "product.h"

namespace {

constexpr int64_t kTileBytes = 64;  // of a row: a cache line, so that each is fetched once
constexpr int64_t kTileWords = kTileBytes / 4;

struct Repacking {
    const Weight &weight;
    const uint8_t *values;
    const uint16_t *scales;
    uint8_t *out;
};

// 16 bytes, a group of a row: two neighbouring columns a byte, the even one high -> columns c and c + 16, the first low.
inline void regroup(const uint8_t *in, uint8_t *out) {
#ifdef __SSE2__
    const __m128i low = _mm_set1_epi8(0x0f), high = _mm_set1_epi8(-16);
    const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(in));
    const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(in + 8));
    const __m128i even = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(first, 4), low), _mm_and_si128(second, high));
    const __m128i odd = _mm_or_si128(_mm_and_si128(first, low), _mm_and_si128(_mm_slli_epi16(second, 4), high));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm_unpacklo_epi8(even, odd));
#else
    uint8_t columns[kGroup / 2];
    for (int j = 0; j < 8; ++j) {
        columns[2 * j] = uint8_t(in[j] >> 4 | (in[j + 8] & 0xf0));
        columns[2 * j + 1] = uint8_t((in[j] & 0x0f) | in[j + 8] << 4);
    }
    std::memcpy(out, columns, sizeof columns);
#endif
}

// A block of 32 rows, a tile of 64 bytes of each row at a time. What is missing at the edges counts as zeros.
template <int Bits>
void repack_block(void *context, int64_t block) {
    const Repacking &p = *static_cast<const Repacking *>(context);
    constexpr uint32_t offset = Bits == 4 ? 0x88888888 : 0x80808080;
    constexpr int64_t group_words = kGroup * Bits / 32;
    const Weight &w = p.weight;
    const int64_t groups = num_groups(w.columns), row_bytes = w.columns * Bits / 8;
    const int64_t first = block * kRows, count = std::min(kRows, w.rows - first);
    uint8_t *out = p.out + block * w.block_bytes();
    for (int64_t start = 0; start < row_bytes; start += kTileBytes) {
        alignas(64) uint32_t tile[kRows][kTileWords];
        const int64_t num_bytes = std::min(kTileBytes, row_bytes - start);
        if (count < kRows) std::memset(tile, 0, sizeof tile);
        for (int64_t r = 0; r < count; ++r) {
            const uint8_t *source = p.values + (first + r) * row_bytes + start;
            uint8_t edge[kTileBytes] = {};
            if (num_bytes < kTileBytes) source = static_cast<uint8_t *>(std::memcpy(edge, source, size_t(num_bytes)));
            uint8_t *row = reinterpret_cast<uint8_t *>(tile[r]);
            if (Bits == 8)
                std::memcpy(row, source, kTileBytes);
            else
                for (int64_t group = 0; group < kTileBytes; group += 16) regroup(source + group, row + group);
        }
        const int64_t first_group = start / 4 / group_words;
        for (int64_t g = 0; g < std::min(kTileWords / group_words, groups - first_group); ++g) {
            uint32_t *words = reinterpret_cast<uint32_t *>(out);
            for (int64_t word = g * group_words; word < (g + 1) * group_words; ++word)
                for (int64_t r = 0; r < kRows; ++r) *words++ = tile[r][word] ^ offset;
            uint16_t *scales = reinterpret_cast<uint16_t *>(words);
            if (p.scales)
                for (int64_t r = 0; r < kRows; ++r)
                    scales[r] = r < count ? p.scales[(first + r) * groups + first_group + g] : uint16_t(0);
            out += w.record_bytes();
        }
    }
}

}  // namespace

// Row-major integers of a QuantizedWeight (int8, or two int4 a byte, even column high), and where groups have scales,
// these in fp16 [rows, groups] -> the layout in product.h, into `out`. Of `w`, the values do not count.
EXPORTED void glm_pack(const Weight *w, const uint8_t *values, const uint16_t *scales, uint8_t *out, int num_threads) {
    Repacking repacking{*w, values, scales, out};
    run_chunks(w->bits == 4 ? &repack_block<4> : &repack_block<8>, &repacking, num_blocks(w->rows), num_threads);
}
