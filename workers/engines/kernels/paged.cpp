// Attention over a paged KV cache, and the small passes around it, for one step of the loop.
//
// Built by workers/engines/kernels/building.py for AVX-512, with or without its bfloat16 dot
// product; called through plain C functions. Every request meets its own keys only. A block of 64
// keys is laid out once for all query rows that share its key head, then met by four rows at a
// time; softmax is float32 and online, so that no row of scores is ever as long as the request.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace {

constexpr int kLanes = 16;   // 32-bit lanes of a register
constexpr int kBlock = 64;   // keys met at once
constexpr int kTile = 96;    // query rows that share a laid-out block, at most (see `tile_of`)
constexpr int kMostSize = 256;

struct Bf16 {
  uint16_t bits;
};

inline float widen(Bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline float widen(float x) { return x; }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, Bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // Round to nearest even; not-a-number stays one.
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load(const Bf16* from) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline __m256i rounded(__m512 x) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __m512i result = _mm512_srli_epi32(up, 16);
  __mmask16 bad = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(result, bad, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
inline void store(Bf16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(x));
}

// A "word" is what one lane holds: one float32, or two neighbouring bfloat16.
template <class T>
constexpr int kWords = 4 / sizeof(T);

template <class T>
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b);
template <>
inline __m512 multiply_add<float>(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
template <>
inline __m512 multiply_add<Bf16>(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                        _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                         _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
#endif
}

// 2^x for x <= 0: the whole part goes into the exponent, the rest into a polynomial (error 2e-7).
inline __m512 exp2_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 part = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.3333558e-3f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6181291e-3f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5504109e-2f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022651e-1f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314718e-1f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

// Sixteen rows of sixteen words, turned.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// What one thread works with; kept between calls.
struct Scratch {
  alignas(64) uint32_t query[kTile * kMostSize];   // [row][word]
  alignas(64) uint32_t key[kMostSize * kBlock];    // [word][key]
  alignas(64) uint32_t value[kBlock * kMostSize];  // [word of keys][size]
  alignas(64) float score[kTile * kBlock];         // [row][key]
  alignas(64) uint32_t weight[kTile * kBlock];     // [row][word of keys]
  alignas(64) float out[kTile * kMostSize];        // [row][size]
  alignas(64) float sum[kTile * kLanes];
  float most[kTile];
  float shrink[kTile];
};

Scratch& scratch() {
  static thread_local Scratch* mine = nullptr;
  if (!mine) {
    void* place = nullptr;
    if (posix_memalign(&place, 64, sizeof(Scratch))) std::abort();
    mine = static_cast<Scratch*>(place);
  }
  return *mine;
}

// Keys of a block into [word][key], `groups` of sixteen; absent ones are zero.
template <class T>
void lay_out_keys(Scratch& s, const T* const* keys, int count, int groups, int size) {
  const int words = size / kWords<T>;
  for (int group = 0; group < groups; group++) {
    for (int word = 0; word < words; word += kLanes) {
      const __mmask16 wanted = words - word >= kLanes ? 0xffff : (1 << (words - word)) - 1;
      __m512i rows[16];
      for (int i = 0; i < 16; i++) {
        const int key = group * 16 + i;
        rows[i] = key < count
                      ? _mm512_maskz_loadu_epi32(
                            wanted, reinterpret_cast<const uint32_t*>(keys[key]) + word)
                      : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int i = 0; i < std::min(kLanes, words - word); i++) {
        _mm512_store_si512(s.key + (word + i) * kBlock + group * 16, rows[i]);
      }
    }
  }
}

// Values of a block into [word of keys][size].
void lay_out_values(Scratch& s, const float* const* values, int count, int size) {
  for (int key = 0; key < count; key++) {
    std::memcpy(s.value + key * size, values[key], size * sizeof(float));
  }
}
void lay_out_values(Scratch& s, const Bf16* const* values, int count, int size) {
  for (int key = 0; key < count; key += 2) {
    for (int at = 0; at < size; at += kLanes) {
      auto half = [at](const Bf16* from) {
        return _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
      };
      __m512i first = half(values[key]);
      __m512i second = key + 1 < count ? half(values[key + 1]) : _mm512_setzero_si512();
      _mm512_storeu_si512(s.value + key / 2 * size + at,
                          _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }
}

// Scores of some rows with `Groups` times sixteen keys.
template <class T, int Rows, int Groups>
void score(Scratch& s, int row, int words) {
  __m512 sums[Rows][Groups];
  for (auto& of_row : sums) {
    for (auto& sum : of_row) sum = _mm512_setzero_ps();
  }
  const uint32_t* query = s.query + row * words;
  for (int word = 0; word < words; word++) {
    __m512i keys[Groups];
    for (int g = 0; g < Groups; g++) {
      keys[g] = _mm512_load_si512(s.key + word * kBlock + g * 16);
    }
    for (int r = 0; r < Rows; r++) {
      const __m512i mine = _mm512_set1_epi32(int(query[r * words + word]));
      for (int g = 0; g < Groups; g++) {
        sums[r][g] = multiply_add<T>(sums[r][g], mine, keys[g]);
      }
    }
  }
  for (int r = 0; r < Rows; r++) {
    for (int g = 0; g < Groups; g++) {
      _mm512_store_ps(s.score + (row + r) * kBlock + g * 16, sums[r][g]);
    }
  }
}

template <class T, int Rows>
void score(Scratch& s, int row, int words, int groups) {
  switch (groups) {
    case 1: return score<T, Rows, 1>(s, row, words);
    case 2: return score<T, Rows, 2>(s, row, words);
    case 3: return score<T, Rows, 3>(s, row, words);
    default: return score<T, Rows, 4>(s, row, words);
  }
}

inline void keep_weights(uint32_t* to, int group, __m512 weights, const float*) {
  _mm512_store_ps(reinterpret_cast<float*>(to) + group * 16, weights);
}
inline void keep_weights(uint32_t* to, int group, __m512 weights, const Bf16*) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + group * 8), rounded(weights));
}

// Weights of a row from its scores: the first `seen` keys count.
template <class T>
void weigh(Scratch& s, int row, int seen, int groups, float scale) {
  const float* scores = s.score + row * kBlock;
  uint32_t* weights = s.weight + row * kBlock;
  __m512 mine[kBlock / 16];
  __mmask16 counts[kBlock / 16];
  __m512 most = _mm512_set1_ps(s.most[row]);
  for (int g = 0; g < groups; g++) {
    const int left = std::clamp(seen - g * 16, 0, 16);
    counts[g] = left == 16 ? 0xffff : (1 << left) - 1;
    mine[g] = _mm512_mul_ps(_mm512_load_ps(scores + g * 16), _mm512_set1_ps(scale));
    most = _mm512_mask_max_ps(most, counts[g], most, mine[g]);
  }
  const float highest = _mm512_reduce_max_ps(most);
  most = _mm512_set1_ps(highest);
  __m512 shrink = exp2_of(_mm512_set1_ps(s.most[row] - highest));
  s.shrink[row] = _mm512_cvtss_f32(shrink);
  s.most[row] = highest;
  __m512 sum = _mm512_mul_ps(_mm512_load_ps(s.sum + row * kLanes), shrink);
  for (int g = 0; g < groups; g++) {
    __m512 weight = _mm512_maskz_mov_ps(counts[g], exp2_of(_mm512_sub_ps(mine[g], most)));
    sum = _mm512_add_ps(sum, weight);
    keep_weights(weights, g, weight, static_cast<const T*>(nullptr));
  }
  _mm512_store_ps(s.sum + row * kLanes, sum);
}

// Adds the weighted values of a block to some rows, `Parts` times sixteen numbers of each.
template <class T, int Rows, int Parts>
void gather(Scratch& s, int row, int at, int pairs, int size) {
  __m512 sums[Rows][Parts];
  for (int r = 0; r < Rows; r++) {
    const __m512 shrink = _mm512_set1_ps(s.shrink[row + r]);
    for (int p = 0; p < Parts; p++) {
      sums[r][p] = _mm512_mul_ps(_mm512_loadu_ps(s.out + (row + r) * size + at + p * 16), shrink);
    }
  }
  for (int pair = 0; pair < pairs; pair++) {
    __m512i values[Parts];
    for (int p = 0; p < Parts; p++) {
      values[p] = _mm512_loadu_si512(s.value + pair * size + at + p * 16);
    }
    for (int r = 0; r < Rows; r++) {
      const __m512i mine = _mm512_set1_epi32(int(s.weight[(row + r) * kBlock + pair]));
      for (int p = 0; p < Parts; p++) {
        sums[r][p] = multiply_add<T>(sums[r][p], mine, values[p]);
      }
    }
  }
  for (int r = 0; r < Rows; r++) {
    for (int p = 0; p < Parts; p++) {
      _mm512_storeu_ps(s.out + (row + r) * size + at + p * 16, sums[r][p]);
    }
  }
}

template <class T, int Rows>
void gather(Scratch& s, int row, int pairs, int size) {
  int at = 0;
  for (; size - at >= 64; at += 64) gather<T, Rows, 4>(s, row, at, pairs, size);
  for (; size - at >= 16; at += 16) gather<T, Rows, 1>(s, row, at, pairs, size);
}

// One call of `Step` for each group of four rows, and one for what is left.
template <class Step>
inline void by_four(int rows, Step step) {
  int row = 0;
  for (; rows - row >= 4; row += 4) step(row, std::integral_constant<int, 4>{});
  switch (rows - row) {
    case 3: step(row, std::integral_constant<int, 3>{}); break;
    case 2: step(row, std::integral_constant<int, 2>{}); break;
    case 1: step(row, std::integral_constant<int, 1>{}); break;
    default: break;
  }
}

}  // namespace

extern "C" {

// A model's layer, the same in all of its layers.
struct Shape {
  int32_t heads, kv_heads, size;
  int32_t bf16;  // else float32
  int32_t page_tokens;
  int32_t threads;
  int64_t block_stride;  // tokens from a block of the cache to the next
  float scale;           // of the scores
};

// What a request computes in a step.
struct Piece {
  int32_t start, queries, length;
  int32_t table;  // where its blocks begin in `tables`
};

struct Step {
  const void *cos, *sin;       // [token][size]
  const int64_t* write_index;  // [token]
  const Piece* pieces;
  const int32_t* tables;
  int32_t tokens, count;
};

}  // extern "C"

namespace {

int tile_of(const Shape& shape) {
  return std::max(1, kTile / (shape.heads / shape.kv_heads));
}

// Turns queries and keys of a token by its position, in place, and stores keys and values.
template <class T>
void turn(const Shape& shape, const Step& step, int token, T* qkv, T* keys, T* values) {
  const int size = shape.size, half = size / 2;
  const int turned = shape.heads + shape.kv_heads;
  const T* cos = static_cast<const T*>(step.cos) + int64_t(token) * size;
  const T* sin = static_cast<const T*>(step.sin) + int64_t(token) * size;
  T* row = qkv + int64_t(token) * (turned + shape.kv_heads) * size;
  for (int head = 0; head < turned; head++) {
    T* x = row + head * size;
    int i = 0;
    for (; half - i >= kLanes; i += kLanes) {
      const __m512 low = load(x + i), high = load(x + half + i);
      const __m512 new_low = _mm512_fnmadd_ps(high, load(sin + i), _mm512_mul_ps(low, load(cos + i)));
      const __m512 new_high = _mm512_fmadd_ps(low, load(sin + half + i),
                                              _mm512_mul_ps(high, load(cos + half + i)));
      store(x + i, new_low);
      store(x + half + i, new_high);
    }
    for (; i < half; i++) {
      const float low = widen(x[i]), high = widen(x[half + i]);
      narrow(low * widen(cos[i]) - high * widen(sin[i]), x + i);
      narrow(high * widen(cos[half + i]) + low * widen(sin[half + i]), x + half + i);
    }
  }
  const int64_t place = step.write_index[token] * shape.kv_heads * size;
  const size_t bytes = size_t(shape.kv_heads) * size * sizeof(T);
  std::memcpy(keys + place, row + shape.heads * size, bytes);
  std::memcpy(values + place, row + turned * size, bytes);
}

// Queries `first` to `last` of a request, all heads that share the key head `kv`.
template <class T>
void attend(const Shape& shape, const Step& step, const Piece& piece, int kv, int first, int last,
            const T* qkv, const T* keys, const T* values, T* out) {
  Scratch& s = scratch();
  const int size = shape.size, words = size / kWords<T>;
  const int shared = shape.heads / shape.kv_heads;
  const int rows = (last - first) * shared;
  const int64_t stride = int64_t(shape.heads + 2 * shape.kv_heads) * size;
  for (int row = 0; row < rows; row++) {
    const T* from = qkv + (piece.start + first + row / shared) * stride +
                    (kv * shared + row % shared) * size;
    std::memcpy(s.query + row * words, from, size * sizeof(T));
    s.most[row] = -1e30f;
  }
  std::memset(s.out, 0, sizeof(float) * rows * size);
  std::memset(s.sum, 0, sizeof(float) * rows * kLanes);

  const int past = piece.length - piece.queries;
  const int end = past + last;  // keys that the last row sees
  const int32_t* blocks = step.tables + piece.table;
  const float scale = shape.scale * 1.44269504f;
  for (int begin = 0; begin < end; begin += kBlock) {
    const int count = std::min(kBlock, end - begin);
    const int groups = (count + 15) / 16;
    const T *its_keys[kBlock], *its_values[kBlock];
    for (int i = 0; i < count; i++) {
      const int position = begin + i;
      const int64_t token = blocks[position / shape.page_tokens] * shape.block_stride +
                            position % shape.page_tokens;
      its_keys[i] = keys + (token * shape.kv_heads + kv) * size;
      its_values[i] = values + (token * shape.kv_heads + kv) * size;
    }
    lay_out_keys<T>(s, its_keys, count, groups, size);
    lay_out_values(s, its_values, count, size);
    by_four(rows, [&](int row, auto four) { score<T, four>(s, row, words, groups); });
    for (int row = 0; row < rows; row++) {
      weigh<T>(s, row, past + first + row / shared + 1 - begin, groups, scale);
    }
    const int pairs = (count + kWords<T> - 1) / kWords<T>;
    by_four(rows, [&](int row, auto four) { gather<T, four>(s, row, pairs, size); });
  }
  for (int row = 0; row < rows; row++) {
    const float total = _mm512_reduce_add_ps(_mm512_load_ps(s.sum + row * kLanes));
    const __m512 part = _mm512_set1_ps(1.0f / total);
    T* to = out + (int64_t(piece.start + first + row / shared) * shape.heads + kv * shared +
                   row % shared) * size;
    for (int at = 0; at < size; at += kLanes) {
      store(to + at, _mm512_mul_ps(_mm512_loadu_ps(s.out + row * size + at), part));
    }
  }
}

template <class T>
void layer(const Shape& shape, const Step& step, T* qkv, T* keys, T* values, T* out) {
  const int tile = tile_of(shape);
  int64_t items = 0;
  for (int i = 0; i < step.count; i++) {
    items += (step.pieces[i].queries + tile - 1) / tile * shape.kv_heads;
  }
#pragma omp parallel num_threads(shape.threads)
  {
#pragma omp for schedule(static)
    for (int token = 0; token < step.tokens; token++) turn(shape, step, token, qkv, keys, values);
    // Threads take the next item as they get done, and walk to it from their last.
    int piece = 0;
    int64_t before = 0;
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int64_t item = 0; item < items; item++) {
      for (;;) {
        const int64_t own = (step.pieces[piece].queries + tile - 1) / tile * shape.kv_heads;
        if (item < before + own) break;
        before += own;
        piece++;
      }
      const Piece& its = step.pieces[piece];
      const int kv = int((item - before) % shape.kv_heads);
      const int first = int((item - before) / shape.kv_heads) * tile;
      attend(shape, step, its, kv, first, std::min(first + tile, its.queries), qkv, keys, values,
             out);
    }
  }
}

template <class T>
void norm(const T* x, const T* weight, T* out, int64_t rows, int64_t columns, float eps,
          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 8)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * columns;
    T* to = out + row * columns;
    __m512 squares = _mm512_setzero_ps();
    float rest = 0;
    int64_t at = 0;
    for (; columns - at >= kLanes; at += kLanes) {
      const __m512 part = load(from + at);
      squares = _mm512_fmadd_ps(part, part, squares);
    }
    for (; at < columns; at++) rest += widen(from[at]) * widen(from[at]);
    const float mean = (_mm512_reduce_add_ps(squares) + rest) / float(columns);
    const float factor = 1.0f / std::sqrt(mean + eps);
    const __m512 factors = _mm512_set1_ps(factor);
    for (at = 0; columns - at >= kLanes; at += kLanes) {
      store(to + at, _mm512_mul_ps(_mm512_mul_ps(load(from + at), factors), load(weight + at)));
    }
    for (; at < columns; at++) narrow(widen(from[at]) * factor * widen(weight[at]), to + at);
  }
}

}  // namespace

extern "C" {

// Whether `fb_layer` can have this shape.
int fb_suits(const Shape* shape) {
  return shape->size % 16 == 0 && shape->size <= kMostSize && shape->kv_heads > 0 &&
         shape->heads % shape->kv_heads == 0 && shape->heads / shape->kv_heads <= kTile;
}

// Between the products of a layer: positions into queries and keys, keys and values into the
// cache, attention. `qkv` is [token][queries, keys, values][size] and is changed, `out` is
// [token][head][size], `keys` and `values` are the layer's part of the cache, [token][head][size].
void fb_layer(const Shape* shape, const Step* step, void* qkv, void* keys, void* values,
              void* out) {
  if (shape->bf16) {
    layer(*shape, *step, static_cast<Bf16*>(qkv), static_cast<Bf16*>(keys),
          static_cast<Bf16*>(values), static_cast<Bf16*>(out));
  } else {
    layer(*shape, *step, static_cast<float*>(qkv), static_cast<float*>(keys),
          static_cast<float*>(values), static_cast<float*>(out));
  }
}

// RMS norm of [row][column], each row by itself, times `weight`.
void fb_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t columns, float eps,
             int32_t bf16, int32_t threads) {
  if (bf16) {
    norm(static_cast<const Bf16*>(x), static_cast<const Bf16*>(weight), static_cast<Bf16*>(out),
         rows, columns, eps, threads);
  } else {
    norm(static_cast<const float*>(x), static_cast<const float*>(weight),
         static_cast<float*>(out), rows, columns, eps, threads);
  }
}

}  // extern "C"
