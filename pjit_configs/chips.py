"""What the chips can do, from their makers' data sheets: the one table for MFU and memory checks.

A chip is found by the exact `device_kind` that JAX reports. A part of a name would also match
slices (MIG) and variants with other peaks; an unknown device has no peak, never a guessed one.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX sees it.

    Attributes:
      device_kinds: values of `jax.Device.device_kind`.
      bf16_tflops: dense peak for bfloat16 with float32 sums (never the sparse figure), TFLOP/s;
        None where the chip has no such unit or no fixed peak.
      hbm_gib: memory of one device in GiB; None for a CPU.
    """

    device_kinds: tuple[str, ...]
    bf16_tflops: float | None
    hbm_gib: float | None

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s."""
        return None if self.bf16_tflops is None else self.bf16_tflops * 1e12

    @property
    def hbm_bytes(self) -> int | None:
        return None if self.hbm_gib is None else int(self.hbm_gib * GIB)


CHIPS: dict[str, Chip] = {
    "cpu": Chip(("cpu",), None, None),
    # NVIDIA: memory as the driver reports it.
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989.4, 79.6),
    "h100-pcie": Chip(("NVIDIA H100 PCIe",), 756.0, 79.6),
    "h200": Chip(("NVIDIA H200",), 989.4, 140.4),
    "a100-80": Chip(("NVIDIA A100-SXM4-80GB",), 312.0, 80.0),
    "a100-40": Chip(("NVIDIA A100-SXM4-40GB",), 312.0, 40.0),
    "l4": Chip(("NVIDIA L4",), 121.0, 22.5),
    "t4": Chip(("Tesla T4",), None, 15.0),  # tensor cores for float16 only
    # TPU: one device is one chip.
    "v4": Chip(("TPU v4",), 275.0, 32.0),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197.0, 16.0),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459.0, 95.0),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918.0, 32.0),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that reports `device_kind`, or None when it is not in the table."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip
    return None
