// The machine: decoded instructions, warps, thread blocks (CTAs) and the grid they belong to.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "memory.h"
#include "parse.h"
#include "values.h"

namespace ptx {

using Mask = uint32_t;
constexpr int kLanes = 32;
constexpr Mask kAll = ~Mask{0};
constexpr uint32_t kNone = ~uint32_t{0};

struct Warp;
struct Cta;
struct Instr;
using Handler = void (*)(Warp&, const Instr&, Mask);

enum class Category : uint8_t {
  integer,
  floating,
  half,
  convert,
  move,
  predicate,
  load_global,
  store_global,
  load_shared,
  store_shared,
  load_param,
  local,
  atomic,
  branch,
  barrier,
  warp,
  ldmatrix,
  mma,
  async_copy,
  fence,
  kCount
};
extern const char* const kCategoryNames[];

// Instr::flags of a branch.
enum Flow : uint8_t { kJumps, kCalls, kLeaves, kIndexed };

enum class Space : uint8_t { generic, global, shared, local, param, constant };

// One instruction, decoded once. d, e (destinations) and a, b, c (sources) are byte offsets into the warp's
// register file, where a register is 32 lanes of its width side by side; immediates and special registers
// live there too, so that every operand is read in the same way. A predicate register is one word with a bit
// for each lane.
struct Instr {
  Handler run = nullptr;
  uint32_t d = kNone, e = kNone, a = kNone, b = kNone, c = kNone;
  uint32_t guard = kNone;
  bool guard_negated = false;
  uint32_t target = kNone, join = kNone;  // of a branch: where it goes, and where its lanes meet again
  int64_t imm = 0, source_offset = 0;     // the latter of a copy
  Mask (*compare)(Warp&, const Instr&, Mask) = nullptr;  // of setp
  Mask (*compare_high)(Warp&, const Instr&,
                       Mask) = nullptr;  // and of packed halves, for the second predicate
  Handler inner = nullptr;               // what a handler wraps
  Space space = Space::generic;
  Type type = Type::none;
  Round round = Round::nearest_even;
  uint8_t bytes = 0;          // of one element in memory
  uint8_t element_width = 0;  // of the register that holds it
  uint8_t width = 0;          // of the register that holds the address, or the source
  uint8_t flags = 0;          // what they mean is the handler's business
  bool strong = false;        // volatile, relaxed or acquire/release: ordered by itself, so never a race
  Category category = Category::integer;
  std::vector<uint32_t> list;         // further operands, in order
  std::vector<uint32_t> registers;    // every register it names
  std::shared_ptr<const void> shape;  // of a matrix product
  int line = 0;
  bool ends_thread() const { return category == Category::branch && flags == kLeaves && guard == kNone; }
};

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  dynamic_smem_size,
  total_smem_size,
  zero,
  one
};

struct Kernel {
  std::string name;
  const Program* program = nullptr;
  std::vector<Instr> code;
  std::vector<uint8_t> registers;  // the register file of a fresh warp: constants, and poison
  std::vector<std::pair<Special, uint32_t>> specials;
  std::vector<Variable> params;
  std::vector<uint32_t> param_offsets;
  uint32_t param_bytes = 0, local_bytes = 0;
  uint32_t shared_static = 0, shared_align = 16,
           dynamic_start = 0;  // dynamic shared memory follows the static
  uint32_t required_threads = 0, max_threads = 0;
  bool uses_dynamic_shared = false;
};

class Module {
 public:
  explicit Module(const std::string& text);
  const Kernel& kernel(const std::string& name);
  std::vector<std::string> kernel_names() const;
  const Program& program() const { return program_; }
  // Where a .global or .const variable lives (host memory, for the life of the module).
  uintptr_t address_of(const std::string& name) const;
  void register_variables(GlobalMemory& memory) const;

 private:
  Program program_;
  std::map<std::string, std::vector<uint64_t>> storage_;
  std::map<std::string, Kernel> kernels_;
  std::mutex mutex_;
};

struct Options {
  uint64_t seed = 0;
  bool race_check = true;
  bool check_uninitialized = true;
  int threads = 2;
  uint64_t max_instructions = uint64_t{1} << 27;  // of the warps of one CTA
  bool allow_same_values = false;                 // written to shared memory by several warps
  std::vector<uint32_t> ctas;                     // their numbers in the grid; none: all
};

struct Counters {
  uint64_t flops = 0;
  uint64_t global_load_requests = 0, global_load_sectors = 0;
  uint64_t global_store_requests = 0, global_store_sectors = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0, shared_conflicts = 0;
  std::vector<uint64_t> executed;  // per instruction of the kernel, warp-wide
  void add(const Counters& other);
};

struct Grid {
  const Kernel& kernel;
  std::array<uint32_t, 3> grid, block;
  uint32_t dynamic_shared;
  std::vector<uint8_t> params;
  Options options;
  GlobalMemory memory;
  uint32_t shared_bytes() const {
    return dynamic_shared ? kernel.dynamic_start + dynamic_shared : kernel.shared_static;
  }
  std::mutex atomics;  // held around every read-modify-write of global memory
};
Counters launch(Grid& grid);

// One entry of a warp's reconvergence stack.
struct Frame {
  uint32_t pc, join;  // the lanes wait at `join` for the frame below
  Mask mask;
  const Instr* call = nullptr;  // of the frame that a call pushed: where it came from
};

// The cp.async of one warp instruction, until it lands.
struct AsyncCopy {
  Mask mask;
  uint32_t bytes;
  std::array<uint32_t, kLanes> to, group;
  uint8_t data[kLanes][16];
};

// A wgmma whose results have been computed but are not yet to be seen.
struct PendingProduct {
  uint32_t group;
  std::vector<uint32_t> registers;  // of the accumulator
  // shared memory that the tensor core may still be reading: address and bytes
  std::vector<std::pair<uint32_t, uint32_t>> reads;
};

// Vector clocks: up to which of its times each warp of the CTA is known, and known to have passed a proxy
// fence.
struct Clocks {
  std::array<uint32_t, 32> seen{}, fenced{};
  void join(const Clocks& other) {
    for (int i = 0; i < 32; ++i) {
      seen[i] = std::max(seen[i], other.seen[i]);
      fenced[i] = std::max(fenced[i], other.fenced[i]);
    }
  }
};

struct Warp {
  Cta* cta;
  int index;
  std::vector<Frame> stack;
  Mask live;
  enum State : uint8_t { ready, waiting, done } state = ready;
  int barrier = -1;
  bool polling = false;  // its last poll was in vain,
  bool yielded = false;  // and that was just now: let another one run
  const Instr* current = nullptr;
  Clocks clocks;
  Mask carry = 0;  // of add.cc

  std::vector<AsyncCopy> copies;
  std::array<uint32_t, kLanes> copy_group{};  // the group that the lane's next cp.async joins
  bool product_fence = false;                 // whether it has executed a wgmma.fence
  uint32_t product_group = 0;
  std::vector<PendingProduct> products;
  std::map<uint32_t, std::vector<uint8_t>> accumulators;  // what a wgmma will write to which register

  std::vector<uint8_t> file_storage;
  uint8_t* file = nullptr;
  std::vector<uint8_t> local;  // [lanes][kernel.local_bytes]
  size_t cached_buffer = 0;

  template <class T>
  T* at(uint32_t offset) {
    return reinterpret_cast<T*>(file + offset);
  }
  Mask predicate(uint32_t offset) { return *at<Mask>(offset); }
  void set_predicate(uint32_t offset, Mask lanes, Mask values) {
    Mask* p = at<Mask>(offset);
    *p = (*p & ~lanes) | (values & lanes);
  }
  // Registers of a width known only at run time.
  uint64_t get(uint32_t offset, int width, int lane) {
    uint64_t v = 0;
    std::memcpy(&v, file + offset + lane * width, width);
    return v;
  }
  void set(uint32_t offset, int width, int lane, uint64_t value) {
    std::memcpy(file + offset + lane * width, &value, width);
  }
  // Orders everything this warp did so far before whoever joins the returned clocks.
  Clocks release() {
    Clocks published = clocks;
    ++clocks.seen[index];
    return published;
  }
  // What this warp knows of is from now on visible to the async proxy (wgmma).
  void proxy_fence() {
    clocks.fenced = clocks.seen;
    ++clocks.seen[index];
  }
};

struct Barrier {
  uint32_t expected = 0, arrived = 0;  // in threads; expected 0: all of the CTA
  std::vector<int> waiting;            // warps
  Clocks clocks;
  uint32_t voters = 0, votes = 0;  // of bar.red: its threads, and those whose predicate is true
};

struct MBarrier {
  uint32_t expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // transactions still to come
  Clocks clocks, completed;
};

// What an mbarrier will be told when somebody polls it: that a bulk copy into shared memory has landed, or
// that the cp.async of these lanes have.
struct BulkCopy {
  uint32_t to, barrier;
  std::vector<uint8_t> data;
  int warp;
  Mask lanes;
};

struct Cta {
  Grid& grid;
  uint32_t id;
  std::array<uint32_t, 3> position;
  std::mt19937_64 random;
  SharedMemory shared;
  std::vector<Warp> warps;
  std::array<Barrier, 17> barriers;  // 16 of the CTA, and that of the cluster of one
  std::map<uint32_t, MBarrier> mbarriers;
  std::vector<BulkCopy> bulk_copies;
  Counters counters;
  uint64_t idle_polls = 0;  // polls in vain since the last that was not

  Cta(Grid& grid, uint32_t id);
  void run();
};

// Runs f(lane) for the lanes of a mask; the full warp is a loop that vectorises.
template <class F>
inline void each(Mask m, F f) {
  if (m == kAll) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (; m; m &= m - 1) f(__builtin_ctz(m));
  }
}

[[noreturn]] void fault(const Warp& w, int lane, const char* kind, const std::string& what,
                        uint64_t address = 0);

// Control flow, in control.cpp.
void leave_barriers(Cta& cta);  // after a warp has exited: who waited only for it goes on
void step(Warp& w, int quantum);

// Asynchronous results, in wgmma.cpp and async.cpp.
void check_pending_registers(Warp& w, const Instr& i);
void land_all(Warp& w, Mask m);

}  // namespace ptx
