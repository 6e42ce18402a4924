"""PTX as a list of instructions."""

import re
from typing import NamedTuple

# operands: {lists}, [addresses] and single words
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]][^,{}\[\]]*")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", re.S)
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+?)<(\d+)>")
_SINGLE = re.compile(r"\.reg\s+\.(\w+)\s+([%\w, ]+)$")
SIZES = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "f32": 4, "u32": 4, "s32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}


class EmulationError(Exception):
    """Something that a GPU would not execute as meant, or that is not emulated."""


class Instruction(NamedTuple):
    """One statement."""

    predicate: str | None  # a register
    negated: bool
    parts: tuple[str, ...]  # of the operation, as add, rn, f32
    operands: tuple[str | tuple[str, ...], ...]  # lists are tuples; an address keeps its brackets
    text: str

    @property
    def name(self) -> str:
        """What stands before the first dot."""
        return self.parts[0]

    @property
    def type(self) -> str:
        """What stands behind the last dot."""
        return self.parts[-1]

    def words(self, place: int) -> tuple[str, ...]:
        """An operand as a list."""
        operand = self.operands[place]
        return operand if isinstance(operand, tuple) else (operand,)

    def word(self, place: int) -> str:
        """An operand that is no list."""
        operand = self.operands[place]
        assert isinstance(operand, str), self.text
        return operand


class Program(NamedTuple):
    """A kernel."""

    parameters: tuple[tuple[str, str], ...]  # (type, name)
    threads: int
    registers: dict[str, tuple[str, int]]  # prefix or name -> (type, how many)
    code: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Read the one kernel of a PTX module."""
    text = re.sub(r"//[^\n]*", "", ptx)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if threads is None:
        raise EmulationError("the module has no .reqntid: not a kernel of Triton")
    parameters = tuple((m[1], m[2]) for m in re.finditer(r"\.param\s+\.(\w+)[^\n]*?(\w+_param_\d+)", text))
    start = text.index("{", threads.end())
    body = text[start + 1 : text.index("$L__func_end", start)]
    registers: dict[str, tuple[str, int]] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(body):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif statement.startswith(".reg"):
            if declared := _DECLARED.match(statement):
                registers[declared[2]] = (declared[1], int(declared[3]))
            elif single := _SINGLE.match(statement):
                registers |= {name.strip(): (single[1], -1) for name in single[2].split(",")}
        elif not statement.startswith("."):
            code.append(_instruction(statement))
    return Program(parameters, int(threads[1]), registers, tuple(code), labels)


def _statements(body: str) -> list[str]:
    found = []
    for line in body.split("\n"):
        line = line.strip()
        if line.startswith((".loc", ".file", ".pragma", ".section")):
            continue
        if label := re.match(r"(\$\w+):", line):
            found.append(label[0])
            line = line[label.end() :]
        # the braces of a scope, but not of a list, stand alone
        found += [part.strip() for part in line.split(";") if part.strip(" \t{}")]
    return [re.sub(r"^[{}]\s*", "", part) for part in found]


def _instruction(statement: str) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise EmulationError(f"cannot read: {statement}")
    operands = []
    for operand in _OPERAND.findall(match[4]):
        word = operand.strip()
        operands.append(tuple(x.strip() for x in word[1:-1].split(",")) if word[0] == "{" else word)
    parts = tuple(match[3].replace("::", ":").split("."))
    return Instruction(match[2], match[1] == "!", parts, tuple(operands), " ".join(statement.split())[:90])
