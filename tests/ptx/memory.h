// Memory with its checks: global buffers (bounds, sectors, races between CTAs) and a CTA's shared memory
// (bounds, initialisation, races between warps, bytes that an asynchronous copy has yet to fill).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

namespace ptx {

struct Options;
struct Warp;

// Generic addresses: global memory is the host's own; the other spaces have windows far above it.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56, kLocalWindow = uint64_t{2} << 56,
                   kParamWindow = uint64_t{3} << 56;
constexpr uint64_t kWindow = uint64_t{1} << 32;
constexpr uint32_t kSharedStart =
    1024;  // shared memory starts here: real GPUs keep the first KiB from sm_90 on
constexpr int kSector = 32;

enum class Access : uint8_t { read, write, rewrite, atomic };  // rewrite: of what is there already
enum class Proxy : uint8_t { generic, async };

struct Fault {
  std::string kind, what, kernel, text;
  int line = 0;
  std::array<uint32_t, 3> cta{}, thread{};
  uint64_t address = 0;
};

// Zeros that take memory only where they are touched: the shadow of a buffer may be larger than the
// machine's.
template <class T>
class Zeros {
 public:
  void resize(size_t n) {
    data_.reset(static_cast<T*>(std::calloc(n, sizeof(T))));
    if (!data_) throw std::bad_alloc();
    size_ = n;
  }
  explicit operator bool() const { return data_ != nullptr; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }
  const T* begin() const { return data_.get(); }
  const T* end() const { return data_.get() + size_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool read_only = false;
  // Made at the first access: most of what a process has allocated is never touched by a kernel.
  Zeros<std::atomic<uint8_t>> sectors;          // bit 0: read, bit 1: written
  Zeros<std::atomic<uint32_t>> writer, reader;  // per byte: 0, CTA + 1, or kMany
  std::once_flag made;
  Buffer(uintptr_t begin, uintptr_t end, std::string name);
};

class GlobalMemory {
 public:
  void add(uintptr_t begin, uint64_t bytes, const std::string& name, bool read_only = false);
  void seal(bool track_bytes);  // after the last add: sorts, and merges what overlaps
  // The buffer that holds all of the bytes, or null. `hint` speeds up the next look-up.
  Buffer* find(uintptr_t address, int bytes, size_t& hint);
  // Marks the bytes as accessed; false if another CTA's access is in conflict with this one.
  bool touch(Buffer& b, uintptr_t address, int bytes, Access access, uint32_t cta) const;
  std::string describe(uintptr_t address) const;  // "12 bytes past the end of buffer 'y'"
  const std::vector<std::unique_ptr<Buffer>>& buffers() const { return buffers_; }

 private:
  std::vector<std::unique_ptr<Buffer>> buffers_;
  bool track_bytes_ = false;
};

// Shared memory with the shadow of each byte: whether it was ever written, when each warp last read it and
// who wrote it last. Time is the vector clock of the warps: an access is ordered before another if the second
// warp has seen the first one's clock since.
class SharedMemory {
 public:
  void reset(uint32_t bytes, int warps, const Options& options);
  uint32_t size() const { return size_; }
  // Checks an access of a lane and returns the bytes.
  uint8_t* access(const Warp& w, int lane, uint32_t address, int bytes, int align, Access access);
  // Whether a write of `data` would change nothing, where that is no race.
  bool holds(uint64_t address, int bytes, const uint8_t* data) const;
  // Asynchronous writers: from start_copy to finish_copy nobody else may touch the bytes.
  void start_copy(const Warp& w, int lane, uint32_t address, int bytes);
  void finish_copy(const Warp& w, int lane, uint32_t address, int bytes, const uint8_t* data,
                   Proxy proxy = Proxy::generic);
  // Asynchronous readers (wgmma): nobody may write the bytes from hold to unhold, and what the generic proxy
  // wrote must have passed a proxy fence.
  uint8_t* hold(const Warp& w, int lane, uint32_t address, int bytes);
  void unhold(uint32_t address, int bytes);

 private:
  enum : uint8_t { kWritten = 1, kPending = 2, kAtomic = 4, kAsync = 8 };
  void check_bounds(const Warp& w, int lane, uint32_t address, int bytes, int align) const;
  void check_order(const Warp& w, int lane, uint32_t address, int bytes, Access access) const;
  void record(const Warp& w, uint32_t at, int bytes, Access access);

  uint32_t size_ = 0;
  int warps_ = 0;
  bool races_ = true, uninitialized_ = true, same_values_ = false;
  std::vector<uint8_t> data_, state_, held_;
  std::vector<uint8_t> writer_;       // the warp that wrote last
  std::vector<uint32_t> write_time_;  // its clock then
  std::vector<uint32_t> read_time_;   // [warps][size]: the warp's clock at its last read, + 1; 0: never
};

}  // namespace ptx
