// Which host memory torch has allocated: what a launched kernel may touch, as cudaMalloc would know it on a
// GPU.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

class Tracker : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* pointer, int64_t bytes, size_t, size_t, c10::Device device) override {
    if (!device.is_cpu()) return;
    if (bytes > 0)
      add(reinterpret_cast<uintptr_t>(pointer), bytes);
    else
      remove(reinterpret_cast<uintptr_t>(pointer));
  }
  bool memoryProfilingEnabled() const override { return true; }

  // A block from before the tracking may have been freed unseen: a new one replaces what it overlaps.
  void add(uintptr_t begin, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto first = blocks_.lower_bound(begin);
    if (first != blocks_.begin() && std::prev(first)->first + std::prev(first)->second > begin) --first;
    blocks_.erase(first, blocks_.lower_bound(begin + bytes));
    blocks_[begin] = bytes;
  }
  void remove(uintptr_t begin) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.erase(begin);
  }
  std::vector<std::pair<uintptr_t, uint64_t>> live() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {blocks_.begin(), blocks_.end()};
  }

 private:
  std::mutex mutex_;
  std::map<uintptr_t, uint64_t> blocks_;
};

}  // namespace

PYBIND11_MODULE(_allocations, m) {
  py::class_<Tracker, std::shared_ptr<Tracker>>(m, "Tracker")
      .def(py::init())
      .def("add", &Tracker::add)
      .def("live", &Tracker::live)
      .def("start",
           [](std::shared_ptr<Tracker> tracker) {
             c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, tracker);
           })
      .def("stop", [](Tracker&) { c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE); });
}
