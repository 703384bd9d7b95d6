"""Runs kernels that a test writes out: their body in PTX, on numpy arrays."""

import numpy as np
from emulator.decode import decode
from emulator.machine import Machine
from emulator.memory import Buffer, GlobalMemory
from emulator.program import Fault
from emulator.warp import Launch

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
.reqntid {threads}
{{
    .reg .pred %p<32>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<96>;
    .reg .b64 %rd<64>;
{loads}
    mov.u32 %r90, %tid.x;
    mov.u32 %r91, %ctaid.x;
    mad.lo.s32 %r92, %r91, {threads}, %r90;
{body}
    ret;
}}
"""


def source(body: str, parameters: int, threads: int) -> str:
    """The PTX of a kernel: %rd40, %rd41... hold the addresses of its arrays; %r90 the thread, %r91 the block, %r92 both."""
    lines = ",\n".join(f"    .param .u64 kernel_param_{i}" for i in range(parameters))
    loads = "\n".join(f"    ld.param.b64 %rd{40 + i}, [kernel_param_{i}];" for i in range(parameters))
    return HEAD.format(parameters=lines, threads=threads, loads=loads, body=body)


class Device:
    """Global memory with arrays in it. `run` keeps the faults of the last run."""

    def __init__(self, *arrays: np.ndarray, writable: bool = True) -> None:
        self.arrays, self.memory = arrays, GlobalMemory()
        self.addresses = []
        for i, array in enumerate(arrays):
            base = (i + 1) << 20
            self.memory.add(Buffer(base, f"array {i}", array.reshape(-1).view(np.uint8), writable))
            self.addresses.append(base)

    def launch(self, body: str, *, blocks: int = 1, threads: int = 32, shared: int = 0, pdl: bool = False) -> Launch:
        kernel = decode(source(body, len(self.arrays), threads))
        return Launch(kernel, (blocks, 1, 1), list(self.addresses), shared, pdl, "kernel")

    def run(self, *launches: Launch, seed: int = 0, resident: int = 24) -> list[str]:
        """Return the races that were found."""
        for buffer in self.memory.buffers:
            buffer.forget()
        machine = Machine(self.memory, seed=seed, resident=resident, limit=200_000)
        machine.run(list(launches))
        return list(machine.faults)

    def faults(self, body: str, **options: int) -> list[str]:
        """Return the faults of a kernel, races and what stopped it alike."""
        try:
            return self.run(self.launch(body, **options))
        except Fault as fault:
            return [str(fault)]


def each_lane(body: str, *sources: np.ndarray, result: type) -> np.ndarray:
    """The result of 32 lanes: `body` computes %r0 (%rd0 or %rs0) of its `result` type from %r1, %r2... of the sources."""
    out = np.zeros(32, result)
    device = Device(*[np.ascontiguousarray(s) for s in sources], out)
    prefix, code = {2: "%rs", 4: "%r", 8: "%rd"}, []
    for i, array in enumerate(sources):
        size = array.dtype.itemsize
        code.append(f"mad.wide.u32 %rd51, %r90, {size}, %rd{40 + i};")
        code.append(f"ld.global.b{8 * size} {prefix[size]}{i + 1}, [%rd51];")
    size = out.dtype.itemsize
    code += [body, f"mad.wide.u32 %rd51, %r90, {size}, %rd{40 + len(sources)};"]
    code.append(f"st.global.b{8 * size} [%rd51], {prefix[size]}0;")
    assert device.run(device.launch("\n".join(code))) == []
    return out
