"""Evaluator of the parts of Vespa's schema and tensor language that the export uses, with NumPy.

It reads the written files: expressions, constants, feed and query. A tensor has named dimensions.
`x` is a dense one, the labels of every other one are strings, and a product has the labels that
both factors have.
"""

import ast
import functools
import json
import operator
import re
from dataclasses import dataclass

import numpy as np

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
AGGREGATORS = {"sum": np.sum, "max": np.max}


@dataclass
class Tensor:
    """Values with the labels of each axis, {dimension: labels}."""

    axes: dict
    values: np.ndarray

    def align(self, axes):
        """Returns the values with these axes, of length 1 where the tensor lacks one."""
        order = [name for name in axes if name in self.axes]
        values = np.transpose(self.values, [list(self.axes).index(name) for name in order])
        for axis, name in enumerate(order):
            places = [self.axes[name].index(label) for label in axes[name]]
            values = np.take(values, places, axis)
        return values.reshape([len(axes[n]) if n in self.axes else 1 for n in axes])

    def join(self, other, function):
        axes = dict(self.axes)
        for name, labels in other.axes.items():
            axes[name] = [x for x in axes[name] if x in labels] if name in axes else labels
        return Tensor(axes, function(self.align(axes), other.align(axes)))

    def reduce(self, aggregator, *names):
        names = names or tuple(self.axes)
        unknown = set(names) - set(self.axes)
        assert not unknown, f"reduce over {unknown}, which is none of {list(self.axes)}"
        places = tuple(list(self.axes).index(name) for name in names)
        rest = {name: labels for name, labels in self.axes.items() if name not in names}
        return Tensor(rest, AGGREGATORS[aggregator](self.values, axis=places))

    def rename(self, old, new):
        return Tensor({new if n == old else n: x for n, x in self.axes.items()}, self.values)


def read_block(text, start):
    """Returns the content of the braces that open at or after `start`, and the place after it."""
    opening = text.index("{", start)
    depth = 0
    for place in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[opening + 1 : place], place + 1
    raise AssertionError(f"a brace that opens at {opening} does not close")


def read_blocks(text, header):
    """Returns {name: content} of the blocks with a header, a pattern with one group."""
    matches = re.finditer(rf"^\s*{header}\s*\{{", text, re.MULTILINE)
    return {m[1]: read_block(text, m.end() - 1)[0] for m in matches}


def read_value(text, name):
    """Returns the rest of the line `name: ...`."""
    return re.search(rf"^\s*{name}: (.+)$", text, re.MULTILINE)[1]


class Profile:
    """The rank profile of an exported schema."""

    def __init__(self, application):
        schema = (application / "schemas/segment.sd").read_text("utf-8")
        assert schema.count("{") == schema.count("}")
        self.fields = {
            name: re.search(r"type (.+) \{", line)[1] if "{" in line else line
            for name, line in re.findall(r"field (\w+) (type .+ \{)$", schema, re.MULTILINE)
        }
        self.body = read_blocks(schema, r"rank-profile (\w+)")["xclip"]
        inputs = read_blocks(self.body, "(inputs)")["inputs"]
        self.inputs = dict(re.findall(r"query\((\w+)\) (.+)$", inputs, re.MULTILINE))
        blocks = read_blocks(self.body, r"function (\w+)\(\)")
        self.functions = {name: read_value(text, "expression") for name, text in blocks.items()}
        self.phases = read_blocks(self.body, r"(\w+)-phase")
        self.match_features = read_blocks(self.body, "(match-features)")["match-features"].split()
        self.constants = {
            name: self.read_constant(application / read_value(text, "file"), text)
            for name, text in read_blocks(schema, r"constant (\w+)").items()
        }

    def read_constant(self, path, text):
        cells = json.loads(path.read_text())["cells"]
        names = re.findall(r"(\w+)\{\}", read_value(text, "type"))
        axes = {name: sorted({cell["address"][name] for cell in cells}, key=int) for name in names}
        values = np.full([len(labels) for labels in axes.values()], np.nan)
        for cell in cells:
            values[tuple(axes[name].index(cell["address"][name]) for name in names)] = cell["value"]
        return Tensor(axes, values)

    def evaluate(self, phase, fields, query):
        """Returns the score of a phase for the fields of a document and the body of a query."""
        attributes = {name: read_field(value) for name, value in fields.items()}
        inputs = {name: read_input(query[f"input.query({name})"]) for name in self.inputs}
        scope = Scope(self.functions, attributes, inputs, self.constants)
        result = scope.parse(read_value(self.phases[phase], "expression"))
        assert result.axes == {}
        return float(result.values)


def dense(vectors):
    return list(range(len(vectors[0])))


def read_hex(text):
    return np.frombuffer(bytes.fromhex(text), ">f4").astype(float)


def read_field(value):
    """Returns a number or a tensor in Vespa's document JSON format."""
    if not isinstance(value, dict):
        return Tensor({}, np.array(value))
    if "values" in value:
        vector = read_hex(value["values"])
        return Tensor({"x": dense([vector])}, vector)
    vectors = list(map(read_hex, value.values()))
    return Tensor({"frame": list(value), "x": dense(vectors)}, np.stack(vectors))


def read_input(value):
    """Returns a tensor of a query."""
    if isinstance(value, list):
        return Tensor({"x": dense([value])}, np.array(value))
    vectors = list(value.values())
    return Tensor({"word": list(value), "x": dense(vectors)}, np.array(vectors))


class Scope:
    """Values that an expression can name. It has the syntax of a Python expression."""

    def __init__(self, functions, attributes, inputs, constants):
        self.functions = functions
        self.features = {"attribute": attributes, "query": inputs, "constant": constants}
        self.function = functools.cache(lambda name: self.parse(functions[name]))

    def parse(self, text):
        return self.walk(ast.parse(text, mode="eval").body)

    def walk(self, node):
        if isinstance(node, ast.Constant):
            return Tensor({}, np.array(float(node.value)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            zero = Tensor({}, np.array(0.0))
            return zero.join(self.walk(node.operand), operator.sub)
        if isinstance(node, ast.Name):
            return self.function(node.id)
        if isinstance(node, ast.BinOp):
            return self.walk(node.left).join(self.walk(node.right), OPERATORS[type(node.op)])
        assert isinstance(node, ast.Call), ast.dump(node)
        name, (first, *rest) = node.func.id, node.args
        words = [argument.id for argument in rest]
        if name in self.features:
            return self.features[name][first.id]
        if name == "exp":
            operand = self.walk(first)
            return Tensor(operand.axes, np.exp(operand.values))
        assert name in ("reduce", "rename"), f"{name} is not a function of Vespa that is known here"
        return getattr(self.walk(first), name)(*words)
