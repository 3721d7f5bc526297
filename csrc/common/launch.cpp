#include "common/launch.h"

#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

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

int launch_on_cuda(const Launch* launch, void* stream) {
  const auto found = kernels().find(launch->symbol);
  if (found == kernels().end()) return cudaErrorInvalidDeviceFunction;
  if (launch->smem > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(found->second, cudaFuncAttributeMaxDynamicSharedMemorySize, launch->smem);
    if (error != cudaSuccess) return error;
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

Launcher launcher = launch_on_cuda;

void run_steps(const Plan& plan, void* stream) {
  for (int i = 0; i < plan.count; ++i) {
    const Step& s = plan.steps[i];
    const Launch launch{s.symbol,
                        {s.grid[0], s.grid[1], s.grid[2]},
                        {s.block[0], s.block[1], s.block[2]},
                        s.smem,
                        s.params,
                        s.params_size};
    if (const int error = launcher(&launch, stream)) {
      throw std::runtime_error(
          "resnet_fused: kernel " + std::string(s.symbol) + ": " +
          (launcher_replaced() ? "the launcher returned " + std::to_string(error) : describe(error)));
    }
  }
}

}  // namespace

KernelEntry::KernelEntry(const char* symbol, const void* function) { kernels().emplace(symbol, function); }

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

int resnet_fused_has_cuda() {
#ifdef RESNET_FUSED_CUDA
  return 1;
#else
  return 0;
#endif
}
