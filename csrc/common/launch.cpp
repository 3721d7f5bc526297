#include "common/launch.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#ifdef RESNET_FUSED_CUDA
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#endif

namespace resnet_fused {
namespace {

// A function's static: it must exist before the first KernelEntry, wherever the linker put that one.
std::unordered_map<std::string_view, const void*>& kernels() {
  static std::unordered_map<std::string_view, const void*> table;
  return table;
}

#ifdef RESNET_FUSED_CUDA
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Lets a kernel have more than 48 KB of shared memory on the current device. The limit only grows: a kernel
// whose launches differ in size would else lose its own to another thread's, between setting it and the
// launch.
cudaError_t allow_shared_memory(const void* function, uint32_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, uint32_t> allowed;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  uint32_t& most = allowed[{device, function}];
  if (bytes <= most) return cudaSuccess;
  const auto limit = static_cast<int>(bytes);
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess) most = bytes;
  return error;
}

int launch_on_cuda(const Launch* launch, void* stream) {
  const auto found = kernels().find(launch->symbol);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  if (launch->smem > 48 * 1024) {
    if (const cudaError_t error = allow_shared_memory(found->second, launch->smem)) return error;
  }
  void* arguments[] = {const_cast<void*>(launch->params)};
  const dim3 grid(launch->grid[0], launch->grid[1], launch->grid[2]);
  const dim3 block(launch->block[0], launch->block[1], launch->block[2]);
  return cudaLaunchKernel(found->second, grid, block, arguments, launch->smem,
                          static_cast<cudaStream_t>(stream));
}

// Looked up in the libtorch_cuda that torch has loaded: linking it would tie the extension to CUDA builds of
// torch.
void* current_stream(int device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0)
    throw std::runtime_error("resnet_fused: torch gave no current CUDA stream");
  return stream;
}

// The static runtime shares the device's primary context with torch's own.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

std::string describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#else
int launch_on_cuda(const Launch*, void*) {
  throw std::runtime_error("resnet_fused was built without CUDA kernels");
}
void* current_stream(int) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};
std::string describe(int error) { return "error " + std::to_string(error); }
#endif

thread_local int next_tile = 0;
Launcher launcher = launch_on_cuda;

void start(const Launch& launch, void* stream) {
  if (const int error = launcher(&launch, stream)) {
    throw std::runtime_error(
        "resnet_fused: kernel " + std::string(launch.symbol) + ": " +
        (launcher_replaced() ? "the launcher returned " + std::to_string(error) : describe(error)));
  }
}

void run_steps(const Plan& plan, void* stream) {
  for (int i = 0; i < plan.count; ++i) {
    const Step& s = plan.steps[i];
    start({s.symbol,
           {s.grid[0], s.grid[1], s.grid[2]},
           {s.block[0], s.block[1], s.block[2]},
           s.smem,
           s.params,
           s.params_size},
          stream);
  }
}

}  // namespace

KernelEntry::KernelEntry(const char* symbol, const void* function) { kernels().emplace(symbol, function); }

int wanted_tile() { return next_tile; }

bool launcher_replaced() { return launcher != launch_on_cuda; }

int device_arch(int device) {
#ifdef RESNET_FUSED_CUDA
  if (device != kHost) {
    int major = 0, minor = 0;  // the runtime caches attributes: this costs nanoseconds
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "cudaDeviceGetAttribute");
    return 10 * major + minor;
  }
#endif
  static_cast<void>(device);
  return 80;
}

void run(const Plan& plan, int device) {
  if (plan.reason[0] != '\0') throw std::runtime_error(plan.reason);
  if (device == kHost) return run_steps(plan, nullptr);
  const DeviceGuard guard(device);
  run_steps(plan, current_stream(device));
}

}  // namespace resnet_fused

void resnet_fused_set_launcher(resnet_fused::Launcher replacement) {
  resnet_fused::launcher = replacement ? replacement : resnet_fused::launch_on_cuda;
}

const char* resnet_fused_launch(const resnet_fused::Launch* launch, int device) {
  static thread_local std::string message;
  try {
    if (device == resnet_fused::kHost) {
      resnet_fused::start(*launch, nullptr);
    } else {
      const resnet_fused::DeviceGuard guard(device);
      resnet_fused::start(*launch, resnet_fused::current_stream(device));
    }
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

void resnet_fused_want_tile(int tile) { resnet_fused::next_tile = tile; }

int resnet_fused_has_cuda() {
#ifdef RESNET_FUSED_CUDA
  return 1;
#else
  return 0;
#endif
}
