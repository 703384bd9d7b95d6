"""PTX text -> a program: instructions, labels, and one numbered register for each name, constant and parameter."""

import re
from dataclasses import dataclass, field

import numpy as np

from emulator.values import SIZES, UNSIGNED, Array, constant

POISON = {1: False, 2: 0x7FEA, 4: 0x7FC0DEAD, 8: 0x7FF8DEADDEADDEAD}
"""What a register holds before it is written: a NaN of its size; False for a predicate."""
SPECIAL = re.compile(r"%(?:(?:tid|ctaid|ntid|nctaid)\.[xyz]|laneid)")
SKIPPED = (".loc", ".file", ".pragma", ".version", ".target", ".address_size", ".local")


class Fault(Exception):
    """What a device would not survive, or no program may do."""


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        text: as written.
        parts: of the opcode, between dots.
        operands: as written; brackets and braces included.
        predicate: register of the guard @p; None without one. `negated`: @!p.
        target: index of the instruction that a branch goes to.
    """

    text: str
    parts: list[str]
    operands: list[str]
    predicate: int | None = None
    negated: bool = False
    target: int = -1

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)


@dataclass
class Program:
    """A kernel.

    Attributes:
        threads: of a block.
        parameters: their types, such as u64.
        initial: the value of every register in front of the first instruction, 32 lanes each: poison, constants; parameters and
            special registers are filled in by the launch and the warp.
        sizes: bytes of every register; 1 for predicates.
        special: register of %tid.x and its like, by name.
    """

    name: str
    threads: int
    parameters: list[str]
    instructions: list[Instruction] = field(default_factory=list)
    initial: list[Array] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    parameter_registers: list[int] = field(default_factory=list)
    _names: dict[str, int] = field(default_factory=dict)

    def new_register(self, size: int, bits: int | None = None) -> int:
        """Return a new register, poisoned or constant."""
        value = POISON[size] if bits is None else bits
        self.initial.append(np.full(32, value, bool if size == 1 else UNSIGNED[size]))
        self.sizes.append(size)
        return len(self.sizes) - 1

    def declare(self, name: str, size: int) -> None:
        self._names[name] = self.new_register(size)

    def register(self, text: str, size: int) -> int:
        """Return the register that an operand stands for; constants, special registers and symbols have one as well.

        Args:
            size: bytes that the instruction takes it for, which constants are made in. 1 for predicates.
        """
        text = text.strip()
        if text in self._names:
            return self._names[text]
        key = f"{text} of {size} bytes"
        if key not in self._names:
            if SPECIAL.fullmatch(text):
                self._names[key] = self.new_register(size)
                self.special[key] = self._names[key]
            elif text == "_":
                self._names[key] = self.new_register(size)
            elif shared := re.fullmatch(r"global_smem(?:\+(\d+))?", text):
                self._names[key] = self.new_register(size, int(shared[1] or 0))
            elif re.match(r"-?\d", text):
                self._names[key] = self.new_register(size, bool(int(text)) if size == 1 else constant(text, size))
            else:
                raise Fault(f"{text} is declared nowhere in {self.name}")
        return self._names[key]

    def address(self, text: str, size: int) -> tuple[int, int]:
        """Return register and offset in bytes of an operand such as [%rd1+16]."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text.strip())
        if not found:
            raise Fault(f"{text} is no address that is known here")
        return self.register(found[1], size), int(found[2] or "0", 0)

    def values_of(self, axes: dict[str, Array]) -> dict[int, Array]:
        """Return the special registers' values, given those of %tid.x and its like by name."""
        return {
            register: axes[key.split()[0]].astype(UNSIGNED[self.sizes[register]])
            for key, register in self.special.items()
        }


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of brackets and braces."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def statements(code: str) -> list[str]:
    """Return instructions, declarations and labels one by one, without comments and the braces of inline assembly."""
    found = []
    for line in re.sub(r"//.*", "", code).splitlines():
        stripped = line.strip()
        if not stripped.startswith(SKIPPED):
            found.append(re.sub(r"^([$\w.]+:)(?=\s|$)", r"\1;", stripped))
    parts = (part.strip() for part in "\n".join(found).split(";"))
    return [clean for part in parts if (clean := re.sub(r"^[{}\s]+(?=[@.$\w]|$)", "", part).strip())]


def parse(ptx: str) -> Program:
    """Return the program of a PTX text with one kernel.

    Raises:
        Fault: where the text has something that no kernel here has had.
    """
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{(.*)\n\s*\}", ptx, re.S)
    if not entry:
        raise Fault("no kernel in this text")
    name, parameters, directives, code = entry.groups()
    code = code.split("\n}")[0]
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", directives)
    program = Program(name, int(threads[1]) if threads else 32, re.findall(r"\.param\s+\.(\w+)", parameters))
    for kind in program.parameters:
        program.parameter_registers.append(program.new_register(SIZES[kind]))
    for symbol in re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", ptx):
        code = re.sub(rf"\b{symbol}\b", "global_smem", code)
    labels, targets = {}, []
    for statement in statements(code):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(program.instructions)
        elif statement.startswith(".reg"):
            declare_registers(program, statement)
        elif statement.startswith("."):
            raise Fault(f"{statement[:60]}: a directive that is not known here")
        else:
            instruction = read_instruction(program, statement)
            program.instructions.append(instruction)
            if instruction.parts[0] == "bra":
                targets.append(instruction)
    for branch in targets:
        branch.target = labels[branch.operands[0]]
    return program


def declare_registers(program: Program, statement: str) -> None:
    kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
    for name in names.split(","):
        many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
        for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
            program.declare(one, SIZES[kind])


def read_instruction(program: Program, statement: str) -> Instruction:
    guard, predicate, opcode, rest = re.fullmatch(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", statement, re.S).groups()
    register = None if predicate is None else program.register(predicate, 1)
    return Instruction(
        " ".join(statement.split()), opcode.split("."), split_operands(rest), register, negated=guard == "!"
    )
