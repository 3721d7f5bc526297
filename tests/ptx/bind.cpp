// The Python side of the emulator: Module and launch. The front end in __init__.py makes it comfortable.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;

namespace {

using BufferSpec =
    std::tuple<uintptr_t, uint64_t, std::string, bool>;  // address, bytes, name, must be written in full

py::dict describe(const ptx::Fault& f) {
  py::dict d;
  d["kind"] = f.kind, d["what"] = f.what, d["kernel"] = f.kernel, d["text"] = f.text, d["line"] = f.line;
  d["cta"] = f.cta, d["thread"] = f.thread, d["address"] = f.address;
  return d;
}

// The first byte of the buffers named in `outputs` that no thread wrote.
void check_written(const ptx::Grid& grid, const std::vector<BufferSpec>& specs) {
  for (const auto& [begin, bytes, name, must_write] : specs) {
    if (!must_write) continue;
    for (const auto& b : grid.memory.buffers()) {
      if (begin < b->begin || begin >= b->end) continue;
      for (uint64_t i = begin - b->begin; i < begin - b->begin + bytes; ++i) {
        if (b->writer && b->writer[i]) continue;
        ptx::Fault f;
        f.kind = "unwritten";
        f.kernel = grid.kernel.name;
        f.address = b->begin + i;
        f.what = "byte " + std::to_string(f.address - begin) + " of output '" + name + "' was never written";
        throw f;
      }
    }
  }
}

py::dict counters(const ptx::Grid& grid, const ptx::Counters& c) {
  py::dict d, buffers;
  d["flops"] = c.flops;
  d["global_load_requests"] = c.global_load_requests, d["global_load_sectors"] = c.global_load_sectors;
  d["global_store_requests"] = c.global_store_requests, d["global_store_sectors"] = c.global_store_sectors;
  d["shared_requests"] = c.shared_requests, d["shared_wavefronts"] = c.shared_wavefronts;
  d["shared_conflicts"] = c.shared_conflicts;
  for (const auto& b : grid.memory.buffers()) {
    uint64_t read = 0, written = 0;
    for (const auto& s : b->sectors) read += s & 1, written += s >> 1 & 1;
    if (b->sectors) buffers[py::str(b->name)] = py::make_tuple(read, written);
  }
  d["buffers"] = buffers;
  std::map<std::string, uint64_t> categories;
  std::map<int, uint64_t> lines;
  for (size_t i = 0; i < c.executed.size(); ++i) {
    if (!c.executed[i]) continue;
    const ptx::Instr& in = grid.kernel.code[i];
    categories[ptx::kCategoryNames[static_cast<int>(in.category)]] += c.executed[i];
    lines[in.line] += c.executed[i];
  }
  d["instructions"] = categories;
  d["lines"] = lines;
  return d;
}

py::object launch(ptx::Module& module, const std::string& symbol, std::array<uint32_t, 3> grid_size,
                  std::array<uint32_t, 3> block, uint32_t smem, py::bytes params,
                  const std::vector<BufferSpec>& buffers, uint64_t seed, bool race_check, bool uninitialized,
                  int threads, uint64_t limit, bool same_values, const std::vector<uint32_t>& ctas) {
  const std::string packed = params;
  ptx::Options options{seed, race_check, uninitialized, threads, limit, same_values, ctas};
  const ptx::Kernel& kernel = module.kernel(symbol);
  ptx::Grid grid{kernel, grid_size, block, smem, {packed.begin(), packed.end()}, options, {}, {}};
  bool must_write = false;
  for (const auto& [begin, bytes, name, must] : buffers)
    grid.memory.add(begin, bytes, name), must_write |= must;
  module.register_variables(grid.memory);
  grid.memory.seal(race_check || must_write);
  try {
    ptx::Counters c;
    {
      py::gil_scoped_release release;
      c = ptx::launch(grid);
      check_written(grid, buffers);
    }
    return py::make_tuple(py::none(), counters(grid, c));
  } catch (const ptx::Fault& f) {
    return py::make_tuple(describe(f), py::none());
  }
}

}  // namespace

PYBIND11_MODULE(_ptx, m) {
  py::register_exception<ptx::SyntaxError>(m, "SyntaxError", PyExc_ValueError);
  py::class_<ptx::Module>(m, "Module")
      .def(py::init<const std::string&>())
      .def("kernels", &ptx::Module::kernel_names)
      .def("target", [](const ptx::Module& module) { return module.program().target; })
      .def("params",  // (offset, bytes) of each parameter
           [](ptx::Module& module, const std::string& name) {
             const ptx::Kernel& k = module.kernel(name);
             std::vector<std::pair<uint32_t, uint64_t>> out;
             for (size_t i = 0; i < k.params.size(); ++i)
               out.emplace_back(k.param_offsets[i], k.params[i].size);
             return out;
           })
      .def("limits",  // .reqntid and .maxntid, 0 if not given; where dynamic shared memory would begin
           [](ptx::Module& module, const std::string& name) {
             const ptx::Kernel& k = module.kernel(name);
             return std::make_tuple(k.required_threads, k.max_threads, k.dynamic_start);
           })
      .def("launch", &launch);
}
