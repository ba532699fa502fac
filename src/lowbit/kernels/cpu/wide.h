// A vector that is wider than the machine's registers, as two halves.
//
// GCC keeps a 64-byte vector extension in memory where registers have 32 bytes, and moves it there through general
// registers: with AVX2, products took two to nine times as long that way. Two halves stay in registers. Lane by
// lane they compute what one vector does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define LB_INLINE static inline __attribute__((always_inline))

namespace lowbit {
namespace LOWBIT_ISA {

#define LB_FRIEND friend inline __attribute__((always_inline))
#define LB_BINARY(op)                                                                                    \
  LB_FRIEND Two operator op(const Two& a, const Two& b) { return {a.low op b.low, a.high op b.high}; }   \
  LB_FRIEND Two operator op(const Two& a, E b) { return {a.low op b, a.high op b}; }                     \
  LB_FRIEND Two operator op(E a, const Two& b) { return {a op b.low, a op b.high}; }                     \
  LB_FRIEND Two& operator op##=(Two& a, const Two& b) { return a = a op b; }
#define LB_COMPARE(op)                                                                                   \
  LB_FRIEND auto operator op(const Two& a, const Two& b) { return mask(a.low op b.low, a.high op b.high); } \
  LB_FRIEND auto operator op(const Two& a, E b) { return mask(a.low op b, a.high op b); }

template <class Half, class E>  // E: a lane's type
struct Two {
  Half low, high;
  static constexpr int kLanes = sizeof(Half) / sizeof(E);

  inline __attribute__((always_inline)) E operator[](int i) const { return i < kLanes ? low[i] : high[i - kLanes]; }
  LB_BINARY(+)
  LB_BINARY(-)
  LB_BINARY(*)
  LB_BINARY(/)
  LB_BINARY(&)
  LB_BINARY(|)
  LB_BINARY(^)
  LB_BINARY(<<)
  LB_BINARY(>>)
  LB_COMPARE(>)
  LB_COMPARE(<)
  LB_COMPARE(<=)
  LB_COMPARE(==)
  LB_FRIEND Two operator-(const Two& a) { return {-a.low, -a.high}; }
  LB_FRIEND Two operator~(const Two& a) { return {~a.low, ~a.high}; }

 private:
  template <class M>
  static inline __attribute__((always_inline)) Two<M, int32_t> mask(M low, M high) {  // all bits or none, 32 a lane
    return {low, high};
  }
};
#undef LB_FRIEND
#undef LB_BINARY
#undef LB_COMPARE

template <class V>
constexpr bool kHalves = false;
template <class Half, class E>
constexpr bool kHalves<Two<Half, E>> = true;

template <class V>
LB_INLINE V load(const void* p) {
  if constexpr (kHalves<V>) {
    return {load<decltype(V::low)>(p), load<decltype(V::low)>((const char*)p + sizeof(V) / 2)};
  } else {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}
template <class V>
LB_INLINE void store(void* p, V v) {
  if constexpr (kHalves<V>) {
    store(p, v.low);
    store((char*)p + sizeof(V) / 2, v.high);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}
// The same bytes as another type.
template <class To, class From>
LB_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  if constexpr (kHalves<To> && kHalves<From>) {
    return {bits<decltype(To::low)>(v.low), bits<decltype(To::low)>(v.high)};
  } else {
    To t;
    std::memcpy(&t, &v, sizeof t);
    return t;
  }
}
// a where the mask's lane is set, else b.
template <class M, class V>
LB_INLINE V select(M mask, V a, V b) {
  if constexpr (kHalves<V>) {
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  } else {
    return mask ? a : b;
  }
}

}  // namespace LOWBIT_ISA
}  // namespace lowbit
