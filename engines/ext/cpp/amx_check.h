// May this process use AMX, and does it compute what is documented? Asked once, before the first weight is packed for it.
#pragma once

#include "any_linear.h"

#if defined(CELERIAC_HAS_TILES) && defined(__linux__)
#include <cpuid.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace celeriac {

// engines/linear/amx.py has a sentence for each.
enum class AmxState : int64_t {
  ready = 0,
  not_compiled = 1,  // no x86-64, no FMA, no Linux
  no_amx = 2,        // the CPU has none with bfloat16, or its tiles are not those of palette 1
  no_system = 3,     // the operating system does not keep tiles when it switches threads
  refused = 4,       // the kernel gives no permission
  broken = 5,        // the self-check did not end by itself: a signal, or no process for it
  wrong = 6,         // the self-check ended with other bits than the documented ones
};

#if defined(CELERIAC_HAS_TILES) && defined(__linux__)

// Small products of every kind of block: one tile and two, a part of a panel, a part of a tile's depth.
struct AmxTrial {
  static constexpr int64_t kMostRows = 41, kNumIn = 72, kNumOut = kColumns + 5;
  static constexpr int64_t kDepth = (kNumIn + kTileDepth - 1) / kTileDepth * kTileDepth;
  static constexpr int64_t kRowCounts[] = {1, 2, 16, 17, 32, kMostRows};

  alignas(64) uint32_t panels[2 * kColumns * kDepth / 2];
  bf16 x[kMostRows * kNumIn];
  float expected[kMostRows * kNumOut], found[kMostRows * kNumOut];

  // Numbers of both signs over some powers of two, so that sums round; one in eight is a denormal or a zero. Every fourth
  // row and output is small, and the sums of both come near the smallest normal number.
  AmxTrial() {
    uint32_t state = 12345;
    const auto draw = [&state](int64_t row) {
      state = state * 1664525 + 1013904223;
      const uint32_t exponent = (state >> 8) % 8 ? (row % 4 == 3 ? 60 : 120) + (state >> 11) % 12 : 0;
      return bf16{static_cast<uint16_t>((state >> 31) << 15 | exponent << 7 | ((state >> 16) & 127))};
    };
    for (int64_t i = 0; i < kMostRows * kNumIn; i++) x[i] = draw(i / kNumIn);
    bf16 weight[kDepth * kNumOut];
    for (int64_t i = 0; i < kDepth * kNumOut; i++) weight[i] = i % kDepth < kNumIn ? draw(i / kDepth) : bf16{0};
    pack_weight(weight, kDepth, kNumOut, panels, 1);
  }

  template <typename Tiles>
  void compute(int64_t rows, float* out) const {
    const Weight weight{panels, nullptr, kNumIn, kNumOut, Kind::tiles, nullptr, kNumIn};
    linear_on_tiles<Tiles>(rows, weight, x, kNumIn, out, kNumOut);
  }

  bool is_equal() {
    for (int64_t rows : kRowCounts) {
      compute<AmxTiles>(rows, found);
      if (std::memcmp(found, expected, sizeof(float) * rows * kNumOut)) return false;
    }
    return true;
  }
};

inline bool amx_equals_emulation() {
  AmxTrial trial;
  trial.compute<EmulatedTiles>(AmxTrial::kMostRows, trial.expected);
  return trial.is_equal();
}

// The self-check in a child process: an instruction that the machine refuses after all ends the child, not the engine.
inline AmxState try_amx() {
  AmxTrial trial;
  trial.compute<EmulatedTiles>(AmxTrial::kMostRows, trial.expected);
  const pid_t child = fork();
  if (child < 0) return AmxState::broken;
  if (child == 0) {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGTRAP, SIGALRM}) signal(number, SIG_DFL);
    alarm(10);
    _exit(trial.is_equal() ? 0 : 1);
  }
  int status = 0;
  pid_t ended;
  do ended = waitpid(child, &status, 0);
  while (ended < 0 && errno == EINTR);
  if (ended != child || !WIFEXITED(status)) return AmxState::broken;
  return WEXITSTATUS(status) == 0 ? AmxState::ready : AmxState::wrong;
}

inline AmxState find_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 22 & 1)) return AmxState::no_amx;
  // Leaf 1DH, palette 1: eight names of sixteen rows of 64 bytes.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || (b >> 16) < 8 || (b & 0xffff) != kTileBytes ||
      (c & 0xffff) != kTileRows)
    return AmxState::no_amx;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return AmxState::no_system;  // OSXSAVE
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return AmxState::no_system;  // XTILECFG and XTILEDATA
  // For all threads of the process and its children; Documentation/arch/x86/xstate.rst of the kernel.
  constexpr long kAskPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kAskPermission, kTileData) != 0) return AmxState::refused;
  return try_amx();
}

#else

inline bool amx_equals_emulation() { return false; }

inline AmxState try_amx() { return AmxState::not_compiled; }

inline AmxState find_amx() { return AmxState::not_compiled; }

#endif

}  // namespace celeriac
