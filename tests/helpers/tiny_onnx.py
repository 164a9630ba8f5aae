"""An ONNX classifier of a hundred bytes: its output is the mean of each channel, [1, 3], after more
operations.
"""

from __future__ import annotations


def tiny_classifier(*operations: str) -> bytes:
    """The file's content. `operations` follow the mean: "Sqrt" makes NaN of what is negative."""
    names = ["pixels", *(f"value{number}" for number in range(len(operations))), "scores"]
    axes = _text(1, "axes") + b"".join(_number(8, axis) for axis in (2, 3)) + _number(20, 7)
    keep = _text(1, "keepdims") + _number(3, 0) + _number(20, 2)
    nodes = [_node("ReduceMean", names[0], names[1]) + _field(5, axes) + _field(5, keep)]
    nodes += [_node(kind, *names[place : place + 2]) for place, kind in enumerate(operations, 1)]
    graph = b"".join(_field(1, node) for node in nodes) + _text(2, "tiny")
    graph += _field(11, _value(names[0], 4)) + _field(12, _value(names[-1], 2))
    return _number(1, 8) + _field(7, graph) + _field(8, _text(1, "") + _number(2, 13))


def _node(kind: str, source: str, target: str) -> bytes:
    return _text(1, source) + _text(2, target) + _text(4, kind)


def _value(name: str, dimensions: int) -> bytes:
    """A float tensor of so many dimensions, each of any size."""
    shape = b"".join(_field(1, _text(2, f"d{number}")) for number in range(dimensions))
    return _text(1, name) + _field(2, _field(1, _number(1, 1) + _field(2, shape)))


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _field(number: int, content: bytes) -> bytes:
    """Protobuf: a field of bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """Protobuf: a field with an integer."""
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
