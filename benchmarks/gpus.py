"""Published figures of GPUs: peaks that no kernel exceeds, and so the floor of its time.

Peaks are dense, at boost clock, of tensor cores that accumulate in float32; "fp32" is their TF32, which cuDNN takes for
float32 convolutions. Where a vendor gives the rate with 2:4 sparsity only, the dense one is half of it.
"""

from __future__ import annotations

from typing import NamedTuple

from resnet_fused.costs import Machine


class Gpu(NamedTuple):
    """One GPU model."""

    name: str
    arch: int  # compute capability times ten
    bandwidth: float  # of its memory, bytes a second
    peak: dict[str, float]  # FLOPs a second by dtype
    l2: int  # bytes
    multiprocessors: int

    def machine(self, dtype: str) -> Machine:
        """The peaks for one dtype, without what launches cost: the floor of kernels one after the other."""
        return Machine(self.name, self.bandwidth, self.peak[dtype], 0)


def _peaks(half: float, tf32: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "fp32": tf32}


MIB = 1 << 20
GPUS = {
    # 2039 GB/s, 312 and 156 TFLOP/s:
    #   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    # 40 MB of L2, 108 SMs:
    #   https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf
    "a100": Gpu("A100 SXM 80GB", 80, 2.039e12, _peaks(312e12, 156e12), 40 * MIB, 108),
    # 3.35 TB/s, 1979 and 989 TFLOP/s with sparsity: https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    # 989.4 and 494.7 dense, 50 MB of L2, 132 SMs: https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper
    "h100": Gpu("H100 SXM", 90, 3.35e12, _peaks(989.4e12, 494.7e12), 50 * MIB, 132),
    # 4.8 TB/s, the H100's tensor cores: https://www.nvidia.com/en-us/data-center/h200/
    # The H100's chip, so its L2 and SMs: https://docs.nvidia.com/cuda/hopper-tuning-guide/
    "h200": Gpu("H200 SXM", 90, 4.8e12, _peaks(989.4e12, 494.7e12), 50 * MIB, 132),
    # Eight have 64 TB/s and 72 PFLOP/s of sparse FP8, of which dense bf16 is a quarter and TF32 an eighth:
    #   https://www.nvidia.com/en-us/data-center/dgx-b200/
    # 126 MB of L2 and 148 SMs are what its driver reports (cudaDeviceProp): https://github.com/pytorch/ao/pull/4002,
    # which finds 7.67 TB/s from the bus width and clock; a floor takes the higher figure.
    "b200": Gpu("B200", 100, 8e12, _peaks(2250e12, 1125e12), 126 * MIB, 148),
    # 1008 GB/s, 165.2 TFLOP/s with float32 accumulation and 82.6 of TF32, 72 MB of L2, 128 SMs (appendix A):
    #   https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    "rtx4090": Gpu("RTX 4090", 89, 1.008e12, _peaks(165.2e12, 82.6e12), 72 * MIB, 128),
}


def find_gpu(name: str) -> Gpu:
    """By its key, however it is written. Raises ValueError."""
    key = "".join(c for c in name.lower() if c.isalnum())
    if key not in GPUS:
        raise ValueError(f"gpu is {name!r}, expected one of {', '.join(GPUS)}")
    return GPUS[key]


def recognise(device_name: str) -> Gpu | None:
    """Of what a driver calls a GPU, as "NVIDIA H100 80GB HBM3"; None where the table's figures are of another model,
    as those of PCIe and laptop cards."""
    words = device_name.upper().replace("RTX 4090", "RTX4090").replace("-", " ").split()
    if {"PCIE", "LAPTOP", "NVL", "40GB", "D"} & {*words} or "GH200" in words:
        return None
    return next((gpu for key, gpu in GPUS.items() if key.upper() in words), None)
