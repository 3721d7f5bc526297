// Modules and launches: the variables of a module, the warps of a CTA in a seeded random order, CTAs on host
// threads.
#include <algorithm>
#include <exception>
#include <thread>

#include "decode.h"

namespace ptx {
namespace {

constexpr uint64_t kPollLimit =
    20000;  // polls in vain, with nobody at work, after which a CTA counts as stuck

uint32_t special_value(const Cta& cta, const Warp& w, Special s, int lane) {
  const Grid& g = cta.grid;
  const uint32_t thread = w.index * kLanes + lane, bit = 1u << lane;
  switch (s) {
    case Special::tid_x:
      return thread % g.block[0];
    case Special::tid_y:
      return thread / g.block[0] % g.block[1];
    case Special::tid_z:
      return thread / (g.block[0] * g.block[1]);
    case Special::ntid_x:
      return g.block[0];
    case Special::ntid_y:
      return g.block[1];
    case Special::ntid_z:
      return g.block[2];
    case Special::ctaid_x:
      return cta.position[0];
    case Special::ctaid_y:
      return cta.position[1];
    case Special::ctaid_z:
      return cta.position[2];
    case Special::nctaid_x:
      return g.grid[0];
    case Special::nctaid_y:
      return g.grid[1];
    case Special::nctaid_z:
      return g.grid[2];
    case Special::laneid:
      return lane;
    case Special::warpid:
      return w.index;
    case Special::nwarpid:
      return static_cast<uint32_t>(cta.warps.size());
    case Special::lanemask_eq:
      return bit;
    case Special::lanemask_lt:
      return bit - 1;
    case Special::lanemask_le:
      return bit | (bit - 1);
    case Special::lanemask_gt:
      return ~(bit | (bit - 1));
    case Special::lanemask_ge:
      return ~(bit - 1);
    case Special::dynamic_smem_size:
      return g.dynamic_shared;
    case Special::total_smem_size:
      return g.shared_bytes();
    case Special::zero:
      return 0;
    case Special::one:
      return 1;
  }
  return 0;
}

void start(Warp& w, Cta& cta, int index, uint32_t threads) {
  const Kernel& k = cta.grid.kernel;
  w.cta = &cta;
  w.index = index;
  const uint32_t lanes = std::min<uint32_t>(kLanes, threads - index * kLanes);
  w.live = lanes == kLanes ? kAll : (1u << lanes) - 1;
  w.stack.push_back({0, kNone, w.live});
  w.clocks.seen[index] = 1;
  w.file_storage.resize(k.registers.size() + 64);
  w.file = w.file_storage.data() + (64 - reinterpret_cast<uintptr_t>(w.file_storage.data()) % 64);
  std::memcpy(w.file, k.registers.data(), k.registers.size());
  for (auto& [special, offset] : k.specials)
    for (int lane = 0; lane < kLanes; ++lane)
      w.at<uint32_t>(offset)[lane] = special_value(cta, w, special, lane);
  w.local.assign(size_t{k.local_bytes} * kLanes, 0xff);
}

}  // namespace

void fault(const Warp& w, int lane, const char* kind, const std::string& what, uint64_t address) {
  Fault f;
  f.kind = kind;
  f.what = what;
  f.address = address;
  const Cta& cta = *w.cta;
  const auto& block = cta.grid.block;
  f.kernel = cta.grid.kernel.name;
  f.cta = cta.position;
  const uint32_t thread = w.index * kLanes + std::max(lane, 0);
  f.thread = {thread % block[0], thread / block[0] % block[1], thread / (block[0] * block[1])};
  if (w.current) {
    f.line = w.current->line;
    f.text = cta.grid.kernel.program->lines.at(f.line);
  }
  throw f;
}

void Counters::add(const Counters& o) {
  flops += o.flops;
  global_load_requests += o.global_load_requests;
  global_load_sectors += o.global_load_sectors;
  global_store_requests += o.global_store_requests;
  global_store_sectors += o.global_store_sectors;
  shared_requests += o.shared_requests;
  shared_wavefronts += o.shared_wavefronts;
  shared_conflicts += o.shared_conflicts;
  executed.resize(std::max(executed.size(), o.executed.size()));
  for (size_t i = 0; i < o.executed.size(); ++i) executed[i] += o.executed[i];
}

Module::Module(const std::string& text) : program_(parse(text)) {
  for (const Variable& v : program_.variables) {
    if (v.space == "shared") continue;
    std::vector<uint64_t>& words = storage_[v.name];
    words.assign(v.size / 8 + 3, 0);
    if (!v.data.empty()) std::memcpy(reinterpret_cast<void*>(address_of(v.name)), v.data.data(), v.size);
  }
}

uintptr_t Module::address_of(const std::string& name) const {
  return (reinterpret_cast<uintptr_t>(storage_.at(name).data()) + 15) / 16 * 16;
}

void Module::register_variables(GlobalMemory& memory) const {
  for (const Variable& v : program_.variables)
    if (v.space != "shared") memory.add(address_of(v.name), v.size, v.name, v.space == "const");
}

const Kernel& Module::kernel(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto k = kernels_.find(name);
  if (k == kernels_.end()) k = kernels_.emplace(name, KernelBuilder(*this, name).build()).first;
  return k->second;
}

std::vector<std::string> Module::kernel_names() const {
  std::vector<std::string> names;
  for (auto& [name, f] : program_.functions)
    if (f.entry) names.push_back(name);
  return names;
}

Cta::Cta(Grid& g, uint32_t id_) : grid(g), id(id_), random(g.options.seed * 0x9e3779b97f4a7c15ull + id_) {
  position = {id % g.grid[0], id / g.grid[0] % g.grid[1], id / (g.grid[0] * g.grid[1])};
  const uint32_t threads = g.block[0] * g.block[1] * g.block[2];
  warps.resize((threads + kLanes - 1) / kLanes);
  shared.reset(g.shared_bytes(), static_cast<int>(warps.size()), g.options);
  for (size_t i = 0; i < warps.size(); ++i) start(warps[i], *this, static_cast<int>(i), threads);
  counters.executed.resize(g.kernel.code.size());
}

void Cta::run() {
  uint64_t executed = 0;
  std::vector<Warp*> ready;
  for (;;) {
    ready.clear();
    Warp* stuck = nullptr;
    for (Warp& w : warps) {
      if (w.state == Warp::ready) ready.push_back(&w);
      if (w.state == Warp::waiting) stuck = &w;
    }
    if (ready.empty() && !stuck) return;
    if (ready.empty())
      fault(*stuck, -1, "deadlock",
            "waits at barrier " + std::to_string(stuck->barrier) + " for threads that never arrive");
    Warp& w = *ready[random() % ready.size()];
    const int quantum = 1 + static_cast<int>(random() % 64);
    step(w, quantum);
    executed += quantum;
    const bool working = std::any_of(ready.begin(), ready.end(), [](const Warp* r) { return !r->polling; });
    if (!working && idle_polls > kPollLimit)
      fault(w, -1, "deadlock", "polls for something that never happens");
    if (executed > grid.options.max_instructions)
      fault(w, -1, "limit", "the limit of instructions is passed");
  }
}

Counters launch(Grid& grid) {
  const std::vector<uint32_t>& chosen = grid.options.ctas;
  const uint32_t ctas =
      chosen.empty() ? grid.grid[0] * grid.grid[1] * grid.grid[2] : static_cast<uint32_t>(chosen.size());
  const int threads =
      static_cast<int>(std::min<uint32_t>(std::max(grid.options.threads, 1), std::max(ctas, 1u)));
  std::atomic<uint32_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  Counters total;
  total.executed.resize(grid.kernel.code.size());
  std::exception_ptr error;
  auto work = [&] {
    for (uint32_t id; !stop && (id = next++) < ctas;) {
      try {
        Cta cta(grid, chosen.empty() ? id : chosen[id]);
        cta.run();
        std::lock_guard<std::mutex> lock(mutex);
        total.add(cta.counters);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
        stop = true;
      }
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (std::thread& t : pool) t.join();
  if (error) std::rethrow_exception(error);
  return total;
}

}  // namespace ptx
