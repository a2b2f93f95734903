// AMX on a CPU that has none: each instruction raises SIGILL, and the handler does what Intel documents.
//
// So the very instructions that cpp/amx.h assembles run: their encoding, the order of their operands, the bytes of the
// configuration, addresses and strides. Written from the manual alone, shares nothing with cpp/amx_emulation.h. Some
// microseconds for each instruction. An instruction that the manual refuses (#UD, #GP) ends the process.
#include <signal.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Tile {
  int rows = 0, row_bytes = 0;
  uint8_t bytes[16][64] = {};
};

thread_local Tile tiles[8];
thread_local bool is_configured = false;
int64_t num_trapped = 0;
bool is_in_other_order = false;  // what a CPU would do that does not add as documented

struct Instruction {
  int opcode, prefix, reg, vvvv, rm;
  bool has_memory;
  uint64_t address, index;
  int num_bytes;
};

uint64_t register_of(const mcontext_t& cpu, int number) {
  static const int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(cpu.gregs[order[number]]);
}

// False: not a three-byte VEX instruction of map 0F38 with L = W = 0. SDM volume 2, sections 2.1.5 and 2.3.5.
bool decode(const mcontext_t& cpu, Instruction* found) {
  const auto* begin = reinterpret_cast<const uint8_t*>(cpu.gregs[REG_RIP]);
  if (begin[0] != 0xc4 || (begin[1] & 31) != 2 || (begin[2] & 0x84)) return false;
  const int r = ~begin[1] >> 7 & 1, x = ~begin[1] >> 6 & 1, b = ~begin[1] >> 5 & 1;
  *found = {begin[3], begin[2] & 3, 0, ~begin[2] >> 3 & 15, 0, false, 0, 0, 0};
  const uint8_t* at = begin + 4;
  const int mod = *at >> 6, low = *at & 7;
  found->reg = r << 3 | (*at++ >> 3 & 7);
  found->rm = b << 3 | low;
  found->has_memory = mod != 3;
  if (mod != 3) {
    bool is_to_rip = mod == 0 && low == 5;
    uint64_t base = 0;
    int num_displaced = mod == 1 ? 1 : mod == 2 || is_to_rip ? 4 : 0;
    if (low == 4) {
      const int index = x << 3 | (*at >> 3 & 7), scale = *at >> 6, of_base = *at & 7;
      at++;
      if (index != 4) found->index = register_of(cpu, index) << scale;
      if (of_base == 5 && mod == 0)
        num_displaced = 4;
      else
        base = register_of(cpu, b << 3 | of_base);
    } else if (!is_to_rip) {
      base = register_of(cpu, found->rm);
    }
    int32_t displaced = 0;
    if (num_displaced == 1) displaced = static_cast<int8_t>(*at);
    if (num_displaced == 4) std::memcpy(&displaced, at, 4);
    at += num_displaced;
    if (is_to_rip) base = reinterpret_cast<uint64_t>(at);
    found->address = base + static_cast<int64_t>(displaced);
  }
  found->num_bytes = static_cast<int>(at - begin);
  return true;
}

// LDTILECFG: byte 0 palette, 1 start row, 16.. bytes of a row, 48.. rows; all else zero.
bool configure(const uint8_t* from) {
  if (from[0] != 1 || from[1] != 0) return false;
  for (int i = 2; i < 16; i++)
    if (from[i]) return false;
  for (int i = 32; i < 48; i++)
    if (from[i]) return false;
  for (int i = 56; i < 64; i++)
    if (from[i]) return false;
  for (int i = 0; i < 8; i++) {
    const int row_bytes = from[16 + 2 * i] | from[17 + 2 * i] << 8, rows = from[48 + i];
    if (row_bytes > 64 || rows > 16 || (row_bytes == 0) != (rows == 0)) return false;
    tiles[i] = Tile{};
    tiles[i].rows = rows, tiles[i].row_bytes = row_bytes;
  }
  is_configured = true;
  return true;
}

bool can_use(int tile) { return is_configured && tile < 8 && tiles[tile].rows > 0; }

float half(const uint8_t* pair, int which) {
  uint16_t bits;
  std::memcpy(&bits, pair + 2 * which, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

[[gnu::noinline]] float product(const Tile& x, const Tile& w, int m, int n, float before) {
  float chains[2] = {0, 0};
  for (int k = 0; k < w.rows; k++)
    for (int which = 0; which < 2; which++) {
      float& chain = chains[is_in_other_order ? 0 : which];
      chain = std::fma(half(x.bytes[m] + 4 * k, which), half(w.bytes[k] + 4 * n, which), chain);
    }
  return before + (chains[0] + chains[1]);
}

bool multiply(int sums, int x, int w) {
  if (!can_use(sums) || !can_use(x) || !can_use(w) || sums == x || sums == w || x == w) return false;
  if (tiles[x].row_bytes / 4 != tiles[w].rows || tiles[sums].rows != tiles[x].rows) return false;
  if (tiles[sums].row_bytes != tiles[w].row_bytes || tiles[w].row_bytes % 4 || tiles[x].row_bytes % 4) return false;
  _mm_setcsr(0x9fc0);  // for the handler only: it has a state of its own
  for (int m = 0; m < tiles[sums].rows; m++)
    for (int n = 0; n < tiles[sums].row_bytes / 4; n++) {
      float total;
      std::memcpy(&total, tiles[sums].bytes[m] + 4 * n, 4);
      total = product(tiles[x], tiles[w], m, n, total);
      std::memcpy(tiles[sums].bytes[m] + 4 * n, &total, 4);
    }
  return true;
}

bool move_rows(const Instruction& it, bool loads) {
  if (!it.has_memory || (it.rm & 7) != 4 || it.vvvv || !can_use(it.reg)) return false;
  Tile& tile = tiles[it.reg];
  if (loads) std::memset(tile.bytes, 0, sizeof tile.bytes);
  for (int r = 0; r < tile.rows; r++) {
    auto* memory = reinterpret_cast<uint8_t*>(it.address + r * it.index);
    if (loads)
      std::memcpy(tile.bytes[r], memory, tile.row_bytes);
    else
      std::memcpy(memory, tile.bytes[r], tile.row_bytes);
  }
  return true;
}

// Prefixes: 0 none, 1 66, 2 F3, 3 F2.
bool execute(const Instruction& it) {
  if (it.opcode == 0x49 && it.prefix == 0 && it.has_memory && it.reg == 0 && !it.vvvv)
    return configure(reinterpret_cast<const uint8_t*>(it.address));
  if (it.opcode == 0x49 && it.prefix == 0 && !it.has_memory && it.reg == 0 && it.rm == 0 && !it.vvvv) {
    is_configured = false;
    return true;
  }
  if (it.opcode == 0x49 && it.prefix == 3 && !it.has_memory && it.rm == 0 && !it.vvvv && can_use(it.reg)) {
    std::memset(tiles[it.reg].bytes, 0, sizeof tiles[it.reg].bytes);
    return true;
  }
  if (it.opcode == 0x4b && (it.prefix == 3 || it.prefix == 2)) return move_rows(it, it.prefix == 3);
  if (it.opcode == 0x5c && it.prefix == 2 && !it.has_memory) return multiply(it.reg, it.rm, it.vvvv);
  return false;
}

void on_illegal(int, siginfo_t*, void* context) {
  auto& cpu = static_cast<ucontext_t*>(context)->uc_mcontext;
  Instruction it;
  if (!decode(cpu, &it) || !execute(it)) {
    signal(SIGILL, SIG_DFL);  // met again on return
    return;
  }
  cpu.gregs[REG_RIP] += it.num_bytes;
  __atomic_add_fetch(&num_trapped, 1, __ATOMIC_RELAXED);
}

}  // namespace

extern "C" int install_trap() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr);
}

extern "C" int64_t count_trapped() { return __atomic_load_n(&num_trapped, __ATOMIC_RELAXED); }

extern "C" void add_in_other_order(int64_t is_other) { is_in_other_order = is_other != 0; }
