// Three GPUs that do nothing but write down what is asked of them. csrc/common/launch.cpp is linked with this
// in the place of CUDA's runtime: what it does on a machine with several devices, streams and threads shows
// on one without. As with the real one, each thread has a current device, a stream belongs to its device, and
// a launch with more than 48 KB of shared memory needs a limit that was set before, for that kernel on that
// device.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "common/launch.h"

extern "C" void* fake_streams[3];  // of the library that stands in for libtorch_cuda.so: the current ones

namespace {

constexpr int kDevices = 3;
constexpr int kCapability[kDevices] = {80, 90, 120};
thread_local int current = 0;
thread_local bool quiet = false;
std::mutex mutex;
std::map<std::pair<int, const void*>, int> limits;

const char first_kernel[] = "first", second_kernel[] = "second";
const resnet_fused::KernelEntry first("first", first_kernel), second("second", second_kernel);

resnet_fused::Plan plan_of(const char* symbol, uint32_t smem, int count = 1) {
  resnet_fused::Plan plan{};
  plan.count = count;
  for (int i = 0; i < count; ++i) {
    resnet_fused::Step& step = plan.steps[i];
    std::snprintf(step.symbol, sizeof(step.symbol), "%s", symbol);
    step.grid[0] = 7, step.grid[1] = 2, step.grid[2] = 1;
    step.block[0] = 32, step.block[1] = 8, step.block[2] = 1;
    step.smem = smem;
    step.params_size = 4;
  }
  return plan;
}

void attempt(const char* what, const resnet_fused::Plan& plan, int device) {
  std::printf("%s\n", what);
  try {
    resnet_fused::run(plan, device);
  } catch (const std::exception& error) {
    std::printf("  error: %s\n", error.what());
  }
  std::printf("  current device %d\n", current);
}

// Launches of one kernel in two sizes from two threads.
void contend() {
  int failures[2] = {};
  auto work = [&](int which) {
    quiet = true;
    const resnet_fused::Plan plan = plan_of("second", which ? 100'000 : 160'000);
    for (int i = 0; i < 200; ++i) {
      try {
        resnet_fused::run(plan, 1);
      } catch (const std::exception&) {
        ++failures[which];
      }
    }
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  std::printf("contention: %d failures\n", failures[0] + failures[1]);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current = device;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice  ? "invalid device"
         : error == cudaErrorInvalidValue ? "invalid value"
                                          : "other";
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  const bool major = attribute == cudaDevAttrComputeCapabilityMajor;
  *value = major ? kCapability[device] / 10 : kCapability[device] % 10;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    limits[{current, function}] = value;
  }
  if (!quiet)
    std::printf("  limit of %s on device %d: %d\n", static_cast<const char*>(function), current, value);
  std::this_thread::yield();
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t smem,
                             cudaStream_t stream) {
  if (!quiet)
    std::printf("  %s on device %d, stream %s, %ux%u blocks of %ux%u\n", static_cast<const char*>(function),
                current, stream ? reinterpret_cast<const char*>(stream) : "default", grid.x, grid.y, block.x,
                block.y);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = limits.find({current, function});
  const int limit = found == limits.end() ? 48 * 1024 : found->second;
  return static_cast<int>(smem) <= limit ? cudaSuccess : cudaErrorInvalidValue;
}

}  // extern "C"

int main() {
  char names[kDevices][8] = {"a0", "b1", "c2"};
  for (int i = 0; i < kDevices; ++i) fake_streams[i] = names[i];
  attempt("the current device", plan_of("first", 0, 2), 0);
  attempt("another device", plan_of("first", 0), 2);
  std::strcpy(names[2], "side");
  attempt("its other stream", plan_of("first", 0), 2);
  attempt("shared memory", plan_of("first", 60'000), 1);
  attempt("less of it", plan_of("first", 50'000), 1);
  attempt("more of it", plan_of("first", 70'000), 1);
  attempt("on another device", plan_of("first", 60'000), 0);
  attempt("an unknown kernel", plan_of("third", 0), 1);
  attempt("a device that is not there", plan_of("first", 0), 5);
  cudaSetDevice(1);
  attempt("from another current device", plan_of("first", 0), 0);
  cudaSetDevice(0);
  fake_streams[0] = nullptr;
  attempt("the default stream", plan_of("first", 0), 0);
  for (int i = 0; i < kDevices; ++i) std::printf("arch of %d: %d\n", i, resnet_fused::device_arch(i));
  const resnet_fused::Launch launch{"first", {1, 1, 1}, {32, 1, 1}, 0, names, 4};
  std::printf("one launch\n");
  const char* message = resnet_fused_launch(&launch, 2);
  std::printf("  %s, current device %d\n", message ? message : "fine", current);
  message = resnet_fused_launch(&launch, 5);
  std::printf("  %s, current device %d\n", message ? message : "fine", current);
  contend();
}
