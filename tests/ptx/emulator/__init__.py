"""Runs compiled PTX on the CPU and checks it: races, bounds, alignment, deadlock, programmatic dependent launch.

    program.py        PTX text -> instructions, registers, parameters
    values.py         types, constants, bfloat16 and float16
    memory.py         global and shared memory: buffers, bounds, alignment
    races.py          which accesses are ordered, by vector clocks
    warp.py           launches, blocks and warps: registers, masks, divergence
    decode.py         one function per instruction, from the files of these groups: arithmetic, conversions, transfers,
                      atomics, async_copies, warp_wide, tensor_cores, barriers
    machine.py        which warp runs next; when a launch starts and ends

A warp is 32 numpy lanes. Warps of all resident blocks, of launches that follow each other as well, interleave at random, by
a seed. Memory is sequentially consistent: what a weaker memory could do shows as a race, because two accesses of which one
writes must be ordered by barriers, by release and acquire, or by the end of a launch.

Not seen: mistakes of ptxas, time, limits of registers and shared memory, races between lanes of one warp (they run in
lockstep), the order in which tensor cores round, denormals that `ftz` flushes, the last bits of approximate functions, and
whether `fence.proxy.async` is where wgmma needs it. Accepted although PTX does not define it: warp-wide instructions under a
predicate of some lanes, `ld.global.nc` of what the launch itself has stored, unordered stores of equal bytes to shared
memory.
"""
