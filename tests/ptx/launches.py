"""Runs the project's own launchers in the emulator: their launches are recorded, compiled ahead of time and run as PTX.

    target = gpu(90)
    with Recording(90) as recording:
        skinny_gemm(x, weight, out, target=target, workspace=workspace, config=config)
    recording.run_seeds()               # out, workspace: as a device would leave them; a race or another fault raises

Tensors that are arguments are memory of the emulated device; those that a kernel reaches through a table of addresses are named
with `recording.know`.
"""

from collections.abc import Callable
from ctypes import POINTER, c_uint8, cast
from typing import Any, NamedTuple

import aot
import numpy as np
from emulator.decode import decode
from emulator.machine import Machine
from emulator.memory import Buffer, GlobalMemory
from emulator.program import Fault
from emulator.warp import Launch
from torch import Tensor

from latentmas_kernels.ops.triton.launch import LaunchTarget

Edit = Callable[[str, str], str]
"""Changes the PTX of a kernel, given its text and its name, to plant a fault."""

_compiled: dict[str, Any] = {}


def gpu(capability: int, multiprocessors: int = 4, *, enable_pdl: bool | None = None) -> LaunchTarget:
    """Return a device of few multiprocessors, so that small sizes use all that a launcher has: split-K, KV splits."""
    pdl = capability >= 90 if enable_pdl is None else enable_pdl
    return LaunchTarget("an emulated GPU", multiprocessors, enable_pdl=pdl)


def compiled(
    capability: int, kernel: Any, given: dict[str, Any], options: dict[str, Any]
) -> tuple[Any, dict[str, str]]:
    """Return a launch's kernel, compiled for these arguments, and the types of its parameters."""
    signature, constants, attributes = aot.describe(kernel, given)
    key = (
        f"{capability} {kernel.fn.__module__}.{kernel.__name__} {signature} {constants} {sorted(attributes)} {options}"
    )
    if key not in _compiled:
        _compiled[key] = aot.compile_for(capability, kernel, signature, constants, attributes, options)
    return _compiled[key], signature


class Recorded(NamedTuple):
    """A launch, compiled: kernel and number, PTX, grid, arguments by parameter of the PTX, bytes of shared memory, PDL."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    arguments: list[int | float]
    shared: int
    pdl: bool


class Recording:
    """The launches inside of `with`, in order. Tensors must live until `run`.

    Args:
        capability: 90 for sm_90.
    """

    READ_ONLY = (
        "weight_ptr",
        "norm_weight_ptr",
        "inv_freq_ptr",
        "embedding_ptr",
        "bias_ptr",
        "query_norm_ptr",
        "key_norm_ptr",
    )

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.memory = GlobalMemory()
        self.instructions = 0
        self.launches: list[Recorded] = []
        self._tensors: dict[int, Tensor] = {}
        self._context = aot.intercepted(self._add)

    def __enter__(self) -> "Recording":
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def know(self, name: str, tensor: Tensor, *, writable: bool = True) -> None:
        """Make a tensor's storage part of the device's memory. The address in a fault's text is counted from its begin."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in self._tensors:
            return
        self._tensors[storage.data_ptr()] = tensor
        pointer = cast(storage.data_ptr(), POINTER(c_uint8))
        data = np.ctypeslib.as_array(pointer, shape=(storage.nbytes(),))
        self.memory.add(Buffer(storage.data_ptr(), name, data, writable))

    def run(self, *, seed: int = 0, resident: int = 24, edit: Edit | None = None) -> list[str]:
        """Run the launches, once more where they ran before. Modifies the tensors.

        Args:
            edit: a fault to plant; it must change at least one kernel.

        Returns:
            The races that were found, only with `edit`.

        Raises:
            Fault: see `Machine.run`.
            AssertionError: for races, without `edit`.
        """
        launches, edited = [], False
        for name, text, grid, arguments, shared, pdl in self.launches:
            planted = text if edit is None else edit(text, name)
            edited |= planted != text
            launches.append(Launch(decode(planted), grid, arguments, shared, pdl, name))
        assert edit is None or edited, "the fault was planted nowhere"
        for buffer in self.memory.buffers:
            buffer.forget()
        machine = Machine(self.memory, seed=seed, resident=resident)
        try:
            machine.run(launches)
        finally:
            self.instructions += machine.instructions
        assert edit is not None or not machine.faults, "\n".join(machine.faults)
        return machine.faults

    def run_seeds(self, seeds: int = 3, *, resident: int = 24) -> None:
        """Run the launches with several seeds, each from the same memory. Every bit of it must come out the same.

        Raises:
            Fault, AssertionError: as `run`; and where an order of the warps shows in the results.
        """
        before = [(buffer, buffer.bytes.copy()) for buffer in self.memory.buffers if buffer.writable]
        first: list[np.ndarray] = []
        for seed in range(seeds):
            for buffer, data in before:
                buffer.bytes[:] = data
            self.run(seed=seed, resident=resident)
            after = [buffer.bytes.copy() for buffer, _ in before]
            for (buffer, _), mine, theirs in zip(before, after, first or after, strict=True):
                assert np.array_equal(mine, theirs), f"{buffer.name} differs between seed 0 and seed {seed}"
            first = first or after

    def _add(self, kernel: Any, grid: Any, given: dict[str, Any], options: dict[str, Any]) -> None:
        made, signature = compiled(self.capability, kernel, given, options)
        arguments: list[int | float] = []
        for parameter in kernel.params:
            value = given[parameter.name]
            if signature[parameter.name] == "constexpr":
                continue
            if isinstance(value, Tensor):
                self.know(parameter.name, value, writable=parameter.name not in self.READ_ONLY)
                arguments.append(value.data_ptr())
            else:
                arguments.append(value)
        shape = grid(given) if callable(grid) else grid
        name = f"{kernel.__name__} {len(self.launches)}"
        pdl = bool(options.get("launch_pdl"))
        padded = (*shape, 1, 1)[:3]
        self.launches.append(Recorded(name, made.asm["ptx"], padded, arguments, made.metadata.shared, pdl))


def faults_of(body: Callable[[], list[str]]) -> list[str]:
    """Return the faults of a run, races and what stopped it alike."""
    try:
        return body()
    except Fault as fault:
        return [str(fault)]
