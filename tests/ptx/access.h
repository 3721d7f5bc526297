// Loads and stores as the instructions see them: spaces resolved, lanes checked, requests counted.
#pragma once

#include "machine.h"

namespace ptx {

// The lanes' addresses: register + offset.
void addresses(Warp& w, const Instr& i, Mask m, uint64_t (&out)[kLanes]);

// The space of a generic address, and the address as that space counts it.
Space space_of(uint64_t address);
uint64_t within(Space space, uint64_t generic);

// Where the bytes of a lane's access are on the host, after all checks.
uint8_t* reach(Warp& w, int lane, Space space, uint64_t address, int bytes, int align, Access access,
               bool strong);

// Counts one warp request: 32-byte sectors of global memory, or wavefronts of shared memory.
void count_global(Warp& w, Mask m, const uint64_t (&address)[kLanes], int bytes, Access access);
void count_shared(Warp& w, Mask m, const uint64_t (&address)[kLanes], int bytes);

}  // namespace ptx
