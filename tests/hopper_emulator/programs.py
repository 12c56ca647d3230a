"""Makes Python functions of inline PTX: one for each `Op` and `Block`, once.

The text becomes Python source with a call for each instruction. Operands ``$0``, ``$1``, ... are
variables, or elements of local arrays; labels become numbers of the parts that a branch goes to.
"""

import re

from fusedattn.cuda.inline import Op
from hopper_emulator.instructions import TABLE, Call, find
from hopper_emulator.machine import Fault
from hopper_emulator.matrix import Registers

_STATEMENT = re.compile(
    r"(?:@(?P<not>!?)(?P<guard>\w+)\s+)?(?P<name>[\w.:]+)\s*(?P<operands>.*)", re.S
)
_LABEL = re.compile(r"\s*([A-Za-z_]\w*):(?!:)")


def split(text):
    """Split operands at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def statements(text):
    """Yield the statements and labels of a text; the braces around a scope are dropped."""
    for part in text.split(";"):
        rest = part.strip()
        while True:
            # A scope's braces stand before and behind statements, an operand's within.
            rest = rest.removeprefix("{").removeprefix("}").strip()
            label = _LABEL.match(rest)
            if label is None:
                break
            yield "label", label[1]
            rest = rest[label.end() :].strip()
        if rest:
            yield "statement", rest


class _Writer:
    """Writes the Python source of one function."""

    def __init__(self, op, tools):
        self._op, self._tools = op, tools
        self.space = {"special": tools.special, "Registers": Registers}
        self._scalar = isinstance(op, Op)
        if self._scalar:
            first = len(op.result)
            self.names = {f"${i}": f"v{i}" for i in range(first + len(op.arguments))}
            self.parameters = [f"v{first + i}" for i in range(len(op.arguments))]
            return
        arrays, scalars = op.operands(op.arrays, op.scalars)
        self.names = {
            name: f"array{index}[{i}]"
            for index, elements in enumerate(arrays)
            for i, name in enumerate(elements)
        } | {name: f"s{i}" for i, name in enumerate(scalars)}
        self.parameters = [f"array{i}" for i in range(len(arrays))]
        self.parameters += [f"s{i}" for i in range(len(scalars))]

    def operand(self, text):
        """Python for an operand's value."""
        if text[0] in "[{":
            return f"[{', '.join(map(self.operand, split(text[1:-1])))}]"
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", text) and text[0] in "-0123456789":
            return text
        if text[0] == "%":
            return f"special({text[1:]!r})"
        if "+" in text:
            return " + ".join(self.operand(part.strip()) for part in text.split("+"))
        if text[0] == "$":
            if text not in self.names:
                raise Fault(f"operand {text} is not there")
            return self.names[text]
        return f"_{text}"

    def registers(self, text):
        """Python for a list of elements that stand side by side in a local array."""
        if text[0] != "{":
            return self.operand(text)
        names = [self.operand(part) for part in split(text[1:-1])]
        array, _, first = names[0].rstrip("]").partition("[")
        if names != [f"{array}[{int(first) + i}]" for i in range(len(names))]:
            raise Fault("registers of a matrix are not side by side in an array")
        return f"Registers({array}, {first}, {len(names)})"

    def statement(self, text, labels):
        """Lines of Python for a statement."""
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise Fault(f"the emulator cannot read {text!r}")
        name, operands = match["name"], split(match["operands"])
        if name == ".reg":
            return []
        if name in ("bra", "bra.uni"):
            lines = [f"at = {labels[operands[0]]}", "continue"]
        else:
            # What it does may depend on whether it has one destination or several.
            several = name + " {}" if operands and operands[0][0] == "{" else name
            entry, rest = find(several if several in TABLE else name)
            self.space[f"f{len(self.space)}"] = entry.function
            self.space[f"c{len(self.space)}"] = Call(self._tools, rest)
            target = operands.pop(0) if entry.writes else None
            values = [
                self.registers(part) if i in entry.registers else self.operand(part)
                for i, part in enumerate(operands)
            ]
            count = len(self.space)
            call = f"f{count - 2}({', '.join([f'c{count - 1}', *values])})"
            lines = [call if target is None else f"{self.operand(target)} = {call}"]
        if match["guard"]:
            test = f"if {'not ' if match['not'] else ''}_{match['guard']}:"
            lines = [test, *(f"    {line}" for line in lines)]
        return lines

    def source(self):
        """The function, named ``op``."""
        parts = list(statements(self._op.text))
        names = [text for kind, text in parts if kind == "label"]
        labels = {name: number for number, name in enumerate(names, 1)}
        result = " v0" if self._scalar and self._op.result else ""
        lines = [f"def op({', '.join(self.parameters)}):"]
        if not labels:
            body = [line for _, text in parts for line in self.statement(text, labels)]
            return "\n".join([*lines, *(f"    {line}" for line in body), f"    return{result}"])
        lines += ["    at = 0", "    while True:", "        if at <= 0:", "            pass"]
        for kind, text in parts:
            if kind == "label":
                lines += [f"        if at <= {labels[text]}:", "            pass"]
            else:
                lines += [f"            {line}" for line in self.statement(text, labels)]
        return "\n".join([*lines, f"        return{result}"])


def compiled(op, tools):
    """Return the function of an `Op` or a `Block`: of its arguments, or its arrays and scalars."""
    writer = _Writer(op, tools)
    exec(compile(writer.source(), "<ptx>", "exec"), writer.space)
    return writer.space["op"]
