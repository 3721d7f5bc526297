#include "memory.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

constexpr uint32_t kMany = ~uint32_t{0};

std::string plural(int bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

}  // namespace

Buffer::Buffer(uintptr_t begin_, uintptr_t end_, std::string name_)
    : begin(begin_), end(end_), name(std::move(name_)) {}

void GlobalMemory::add(uintptr_t begin, uint64_t bytes, const std::string& name, bool read_only) {
  if (!bytes) return;
  buffers_.push_back(std::make_unique<Buffer>(begin, begin + bytes, name));
  buffers_.back()->read_only = read_only;
}

void GlobalMemory::seal(bool track_bytes) {
  std::sort(buffers_.begin(), buffers_.end(),
            [](auto& a, auto& b) { return a->begin != b->begin ? a->begin < b->begin : a->end > b->end; });
  std::vector<std::unique_ptr<Buffer>> merged;
  for (auto& b : buffers_) {
    if (!merged.empty() && b->begin < merged.back()->end) {
      Buffer& last = *merged.back();
      if (b->end > last.end || b->name != last.name)
        merged.back() =
            std::make_unique<Buffer>(last.begin, std::max(last.end, b->end), last.name + "/" + b->name);
    } else {
      merged.push_back(std::move(b));
    }
  }
  buffers_ = std::move(merged);
  track_bytes_ = track_bytes;
}

Buffer* GlobalMemory::find(uintptr_t address, int bytes, size_t& hint) {
  auto inside = [&](const Buffer& b) { return address >= b.begin && address + bytes <= b.end; };
  if (hint < buffers_.size() && inside(*buffers_[hint])) return buffers_[hint].get();
  auto after = std::upper_bound(buffers_.begin(), buffers_.end(), address,
                                [](uintptr_t a, const auto& b) { return a < b->begin; });
  if (after == buffers_.begin()) return nullptr;
  hint = after - buffers_.begin() - 1;
  return inside(*buffers_[hint]) ? buffers_[hint].get() : nullptr;
}

bool GlobalMemory::touch(Buffer& b, uintptr_t address, int bytes, Access access, uint32_t cta) const {
  std::call_once(b.made, [&] {
    b.sectors.resize((b.end - 1) / kSector - b.begin / kSector + 1);
    if (!track_bytes_) return;
    b.writer.resize(b.end - b.begin);
    b.reader.resize(b.end - b.begin);
  });
  const uint8_t mark = access == Access::read ? 1 : access == Access::write ? 2 : 3;
  for (uintptr_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s) {
    std::atomic<uint8_t>& sector = b.sectors[s - b.begin / kSector];
    if ((sector.load(std::memory_order_relaxed) & mark) != mark)
      sector.fetch_or(mark, std::memory_order_relaxed);
  }
  if (!b.writer) return true;
  // Each side marks first and looks second, so that of two racing accesses at least one sees the other.
  const uint32_t me = cta + 1;
  for (uintptr_t i = address - b.begin; i < address - b.begin + bytes; ++i) {
    uint32_t other = 0;
    if (access == Access::read) {
      uint32_t r = b.reader[i].load(std::memory_order_relaxed);
      if (r != me && r != kMany && !b.reader[i].compare_exchange_strong(r, r ? kMany : me))
        b.reader[i] = kMany;
      other = b.writer[i];
    } else if (access == Access::write) {
      uint32_t w = b.writer[i].load(std::memory_order_relaxed);
      other = w == me ? w : b.writer[i].exchange(me);
      if (!other || other == me || other == kMany) other = b.reader[i];
    } else if (!b.writer[i].load(std::memory_order_relaxed)) {
      b.writer[i].store(kMany, std::memory_order_relaxed);  // written, by an access that orders itself
    }
    const bool atomically_written = other == kMany && access == Access::read;
    if (other && other != me && !atomically_written) return false;
  }
  return true;
}

std::string GlobalMemory::describe(uintptr_t address) const {
  const Buffer* nearest = nullptr;
  uintptr_t best = ~uintptr_t{0};
  for (const auto& b : buffers_) {
    uintptr_t gap = address < b->begin ? b->begin - address : address >= b->end ? address - b->end : 0;
    if (gap < best) best = gap, nearest = b.get();
  }
  if (!nearest || best > (1 << 20)) return "no registered buffer is near it";
  std::string name =
      "buffer '" + nearest->name + "' of " + std::to_string(nearest->end - nearest->begin) + " bytes";
  if (address < nearest->begin) return std::to_string(best) + " bytes before the start of " + name;
  if (address >= nearest->end) return std::to_string(best) + " bytes past the end of " + name;
  return std::to_string(address - nearest->begin) + " bytes into " + name;
}

void SharedMemory::reset(uint32_t bytes, int warps, const Options& options) {
  size_ = bytes;
  warps_ = warps;
  races_ = options.race_check;
  uninitialized_ = options.check_uninitialized;
  same_values_ = options.allow_same_values;
  data_.assign(bytes + 16, 0xff);  // a NaN in every float format
  state_.assign(bytes, 0);
  held_.assign(bytes, 0);
  writer_.assign(bytes, 0);
  write_time_.assign(bytes, 0);
  read_time_.assign(races_ ? size_t{bytes} * warps : 0, 0);
}

void SharedMemory::check_bounds(const Warp& w, int lane, uint32_t address, int bytes, int align) const {
  if (address % align)
    fault(w, lane, "misaligned", "shared address is not a multiple of " + std::to_string(align), address);
  if (address < kSharedStart || uint64_t{address} + bytes > kSharedStart + uint64_t{size_})
    fault(w, lane, "out-of-bounds",
          plural(bytes) + " at shared offset " +
              std::to_string(static_cast<int64_t>(address) - kSharedStart) + ", of " + std::to_string(size_) +
              " bytes of shared memory",
          address);
}

void SharedMemory::check_order(const Warp& w, int lane, uint32_t address, int bytes, Access access) const {
  const uint32_t at = address - kSharedStart;
  for (uint32_t i = at; i < at + bytes; ++i) {
    if (state_[i] & kPending)
      fault(w, lane, "pending",
            "touches shared memory that an asynchronous copy not yet waited for will write", address);
    if (held_[i] && access != Access::read)
      fault(w, lane, "pending", "writes shared memory that an asynchronous instruction may still be reading",
            address);
    if (access == Access::read && uninitialized_ && !(state_[i] & kWritten))
      fault(w, lane, "uninitialized", "reads shared memory that was never written", address);
    if (!races_) continue;
    const int writer = writer_[i];
    const bool allowed = access == Access::rewrite || (access == Access::atomic && (state_[i] & kAtomic));
    if (write_time_[i] > w.clocks.seen[writer] && writer != w.index && !allowed)
      fault(w, lane, "race",
            std::string(access == Access::read ? "reads" : "writes") + " shared memory that warp " +
                std::to_string(writer) + " wrote, with no barrier in between",
            address);
  }
  if (!races_ || access == Access::read) return;
  for (int other = 0; other < warps_; ++other) {
    if (other == w.index) continue;
    const uint32_t* times = &read_time_[size_t(other) * size_ + at];
    uint32_t latest = 0;
    for (int i = 0; i < bytes; ++i) latest = std::max(latest, times[i]);
    if (latest > w.clocks.seen[other])
      fault(w, lane, "race",
            "writes shared memory that warp " + std::to_string(other) + " read, with no barrier in between",
            address);
  }
}

void SharedMemory::record(const Warp& w, uint32_t at, int bytes, Access access) {
  const uint32_t now = w.clocks.seen[w.index];
  if (access == Access::read) {
    if (races_) std::fill_n(&read_time_[size_t(w.index) * size_ + at], bytes, now);
    return;
  }
  std::fill_n(&state_[at], bytes, access == Access::atomic ? kWritten | kAtomic : kWritten);
  std::fill_n(&writer_[at], bytes, static_cast<uint8_t>(w.index));
  std::fill_n(&write_time_[at], bytes, now);
}

bool SharedMemory::holds(uint64_t address, int bytes, const uint8_t* data) const {
  return same_values_ && address >= kSharedStart && address - kSharedStart + bytes <= size_ &&
         std::memcmp(&data_[address - kSharedStart], data, bytes) == 0;
}

uint8_t* SharedMemory::access(const Warp& w, int lane, uint32_t address, int bytes, int align,
                              Access access) {
  check_bounds(w, lane, address, bytes, align);
  check_order(w, lane, address, bytes, access);
  if (access == Access::atomic && uninitialized_ && !(state_[address - kSharedStart] & kWritten))
    fault(w, lane, "uninitialized", "updates shared memory that was never written", address);
  record(w, address - kSharedStart, bytes, access);
  return &data_[address - kSharedStart];
}

void SharedMemory::start_copy(const Warp& w, int lane, uint32_t address, int bytes) {
  check_bounds(w, lane, address, bytes, bytes > 16 ? 16 : bytes);
  check_order(w, lane, address, bytes, Access::write);
  for (int i = 0; i < bytes; ++i) state_[address - kSharedStart + i] |= kPending;
}

void SharedMemory::finish_copy(const Warp& w, int lane, uint32_t address, int bytes, const uint8_t* data,
                               Proxy proxy) {
  const uint32_t at = address - kSharedStart;
  for (int i = 0; i < bytes; ++i) state_[at + i] &= ~kPending;
  check_order(w, lane, address, bytes, Access::write);
  record(w, at, bytes, Access::write);
  std::memcpy(&data_[at], data, bytes);
  if (proxy == Proxy::async)
    for (int i = 0; i < bytes; ++i) state_[at + i] |= kAsync;
}

uint8_t* SharedMemory::hold(const Warp& w, int lane, uint32_t address, int bytes) {
  uint8_t* p = access(w, lane, address, bytes, bytes, Access::read);
  for (uint32_t i = address - kSharedStart; races_ && i < address - kSharedStart + bytes; ++i)
    if (!(state_[i] & kAsync) && write_time_[i] > w.clocks.fenced[writer_[i]])
      fault(w, lane, "unfenced",
            "an asynchronous instruction reads what warp " + std::to_string(writer_[i]) +
                " wrote, with no fence.proxy.async in between",
            address);
  for (int i = 0; i < bytes; ++i) ++held_[address - kSharedStart + i];
  return p;
}

void SharedMemory::unhold(uint32_t address, int bytes) {
  for (int i = 0; i < bytes; ++i) --held_[address - kSharedStart + i];
}

}  // namespace ptx
