"""What a compiled program does, read from its optimized HLO: collectives, and bytes of main memory.

Counted is what one device executes: the body of a loop as often as it runs, where that can be told
(XLA's own cost analysis counts it once), and of a conditional the branch that moves most. A collective
that the compiler spreads over several fusions, to overlap it with other work, counts once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
         "collective-permute", "collective-broadcast")
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# They name, group or forward values, and move nothing.
_FREE = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
                   "add-dependency", "opt-barrier", "partition-id", "replica-id", "get-dimension-size"})
_FREE_CALLS = frozenset({"AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding",
                         "AssumeGatherIndicesInBound"})
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective, once for each time that it runs the same way.

  Attributes:
    kind: One of `KINDS`.
    bytes: Of the whole array, as one device of a group has it before it is scattered or after it is
      gathered; for the other kinds, of what a device sends.
    groups: Which devices take part together, as positions in the mesh, flat; pairs of source and
      target for permutes.
    count: How often it runs.
  """

  kind: str
  bytes: int
  groups: tuple[tuple[int, ...], ...]
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Work:
  """What one run of a program does on one device.

  Attributes:
    traffic: Bytes that it reads from and writes to main memory, padding left out.
    collectives: In the order of the program.
    unknown_loops: Loops whose number of iterations cannot be told; their bodies count once.
  """

  traffic: int
  collectives: tuple[Collective, ...]
  unknown_loops: int = 0


def work(text: str) -> Work:
  """Reads the text of an optimized HLO module, as `compiled.as_text()` gives it.

  Example:
    >>> import jax
    >>> lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((1000,), "float32"))
    >>> work(lowered.compile().as_text()).traffic
    8000
  """
  return _Module(text).run()


def groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """The groups of a collective, from its attributes in any of the forms that XLA prints.

  Args:
    text: `replica_groups={{0,1},{2,3}}`, `replica_groups=[2,2]<=[4]T(0)`,
      `replica_groups=mesh['a'=2,'b'=2] {'b'}`, or `source_target_pairs={{0,1},{1,0}}`.
    devices: How many there are, for a collective that names none.

  Example:
    >>> groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> groups("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4)
    ((0, 1), (2, 3))
  """
  if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1]))
  if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, dims, order = (_ints(part) for part in match.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    return _rows(ids.transpose(order) if order else ids, shape[-1])
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
    return _mesh_groups(*match.groups())
  return (tuple(range(devices)),)


def _mesh_groups(mesh: str, chosen: str) -> tuple[tuple[int, ...], ...]:
  """Groups over some axes of a mesh; `'a':(2)4` is a part of an axis: 4 long, behind one of 2."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in re.findall(
    r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}
  dims, together = [], []
  for name, size in sizes.items():
    before, part = parts.get(name, (1, 1))
    together.append(len(dims) + 1)
    dims += [before, part, size // (before * part)]
  others = [d for d in range(len(dims)) if d not in together]
  ids = np.arange(math.prod(dims)).reshape(dims).transpose([*others, *together])
  return _rows(ids, math.prod(dims[d] for d in together))


def _rows(ids: np.ndarray, size: int) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(row) for row in ids.reshape(-1, size).tolist())


def _ints(text: str | None) -> tuple[int, ...]:
  return tuple(map(int, text.split(","))) if text else ()


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """A line of a computation; `type`, `inside` (what the parentheses hold) and `attributes` are text."""

  name: str
  type: str
  opcode: str
  inside: str
  attributes: str

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    return tuple(_NAME.findall(self.inside))

  def called(self, *keys: str) -> tuple[str, ...]:
    """Names of the computations under the first of these attributes that is there."""
    for key in keys:
      if match := re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes):
        return tuple(_NAME.findall(match[1]))
    return ()


class _Computation:
  """Instructions by name, in order; the root is the last, parameters are found by number."""

  def __init__(self, name: str):
    self.name, self.instructions, self.root = name, {}, None

  def add(self, instruction: _Instruction, root: bool) -> None:
    self.instructions[instruction.name] = instruction
    if root:
      self.root = instruction

  @functools.cached_property
  def parameters(self) -> dict[int, _Instruction]:
    return {int(i.inside): i for i in self.instructions.values() if i.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[_Instruction, int]]]:
    found = collections.defaultdict(list)
    for instruction in self.instructions.values():
      for position, operand in enumerate(instruction.operands):
        found[operand].append((instruction, position))
    return found

  def source(self, name: str) -> _Instruction | None:
    """Where a value comes from, behind copies of it."""
    instruction = self.instructions.get(name)
    while instruction and instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
      instruction = self.instructions.get(instruction.operands[0])
    return instruction


class _Module:
  """A module's computations, and what a run of the entry does."""

  def __init__(self, text: str):
    self.computations, self.entry = {}, None
    match = re.search(r"num_partitions=(\d+)", text)
    self.devices = int(match[1]) if match else 1
    current = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
      if match := _HEADER.match(line):
        current = self.computations[match[2]] = _Computation(match[2])
        self.entry = current if match[1] else self.entry
      elif line.startswith("}"):
        current = None
      elif current is not None and " = " in line:
        current.add(_instruction(line), line.lstrip().startswith("ROOT "))

  def run(self) -> Work:
    traffic, found, unknown = self._work(self.entry.name)
    counts = collections.Counter()
    for collective, times, _ in found:
      counts[collective] += times
    merged = tuple(dataclasses.replace(c, count=times) for c, times in counts.items() if times)
    return Work(traffic, merged, unknown)

  @functools.cache
  def _work(self, name: str) -> tuple[int, tuple, int]:
    """Traffic, `(collective, times, key)` of one run of a computation, and its unknown loops."""
    traffic, found, unknown = 0, [], 0
    computation = self.computations[name]
    for instruction in computation.instructions.values():
      more, inner, loops = self._instruction_work(computation, instruction)
      traffic, unknown = traffic + more, unknown + loops
      found += inner
    # One collective, spread over several fusions, has one key.
    spread, once = set(), []
    for collective, times, key in found:
      if key is None or key not in spread:
        once.append((collective, times, None))
      spread.add(key)
    return traffic, tuple(once), unknown

  def _instruction_work(self, computation, instruction) -> tuple[int, Sequence, int]:
    opcode = instruction.opcode
    if opcode == "while":
      trips, (body,) = self._trips(computation, instruction), instruction.called("body")
      traffic, found, unknown = self._work(body)
      times = 1 if trips is None else trips
      return (times * traffic, [(c, times * n, key) for c, n, key in found],
              unknown + (trips is None))
    if opcode == "conditional":
      names = instruction.called("branch_computations") or (
        instruction.called("true_computation") + instruction.called("false_computation"))
      return max((self._work(n) for n in names), key=lambda w: (
        w[0], sum(c.bytes * times for c, times, _ in w[1])))
    if opcode in ("call", "async-start"):
      (name,) = instruction.called("to_apply", "calls", "called_computations")
      return self._work(name)
    found = list(self._collectives(computation, instruction))
    if opcode == "fusion":
      (name,) = instruction.called("calls")
      for inner in self.computations[name].instructions.values():
        found += self._instruction_work(self.computations[name], inner)[1]
    return self._traffic(computation, instruction), found, 0

  def _collectives(self, computation, instruction) -> Iterator[tuple[Collective, int, str | None]]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      return
    members = groups(instruction.attributes, self.devices)
    size = sum(_bytes(self._type(computation, name)) for name in instruction.operands)
    if kind == "all-gather":
      size *= len(members[0])
    root = computation.root
    # A reduce-scatter of TPUs: all-reduce, then a slice, in one fusion.
    if kind == "all-reduce" and root.opcode == "dynamic-slice" and root.operands[0] == instruction.name:
      kind = "reduce-scatter"
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    spread = channel and "async_collective_fusion_config" in instruction.attributes
    if len(members[0]) > 1:
      yield Collective(kind, size, members), 1, channel[1] if spread else None

  def _type(self, computation: _Computation, name: str) -> str:
    return computation.instructions[name].type

  def _traffic(self, computation: _Computation, instruction: _Instruction) -> int:
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
      return 0
    if opcode == "custom-call" and any(f'"{t}"' in instruction.attributes for t in _FREE_CALLS):
      return 0
    if opcode == "copy-start":
      target, source = _arrays(instruction.type)[:2]
      return sum(_size(a) for a in (target, source) if _in_main_memory(a))
    types = [self._type(computation, name) for name in operands]
    if opcode == "fusion":
      (name,) = instruction.called("calls")
      reads = [self._read(name, i) for i in range(len(types))]
      writes = self._written(name)
    else:
      reads = [_operand_read(instruction, i, [_bytes(t) for t in types]) for i in range(len(types))]
      writes = [_bytes(types[1])] if opcode == "dynamic-update-slice" else None
    results = _arrays(instruction.type)
    writes = writes if writes and len(writes) == len(results) else [_size(a) for a in results]
    return (sum(n if len(_arrays(t)) == 1 else _main(t) for n, t in zip(reads, types) if _main(t))
            + sum(n for n, a in zip(writes, results) if _in_main_memory(a)))

  @functools.cache
  def _read(self, name: str, index: int) -> int:
    """Bytes that a fusion reads of its operand."""
    computation = self.computations[name]
    if index not in computation.parameters:
      return 0
    parameter = computation.parameters[index]
    return min(_bytes(parameter.type), self._used(computation, parameter.name))

  def _used(self, computation: _Computation, name: str) -> int:
    """Bytes that a computation uses of one of its values: all, or slices of it."""
    total = 0
    for user, position in computation.users[name]:
      if user.opcode == "bitcast":
        total += self._used(computation, user.name)
      elif user.opcode == "fusion":
        total += self._read(user.called("calls")[0], position)
      else:
        sizes = [_bytes(self._type(computation, n)) for n in user.operands]
        total += _operand_read(user, position, sizes)
    return total

  @functools.cache
  def _written(self, name: str) -> list[int]:
    """Bytes that a fusion writes of each array of its result."""
    computation = self.computations[name]
    root = computation.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    return [n for part in names for n in self._writes(computation, part)]

  def _writes(self, computation: _Computation, name: str) -> list[int]:
    instruction = computation.instructions[name]
    if instruction.opcode == "bitcast":
      return self._writes(computation, instruction.operands[0])
    if instruction.opcode == "fusion":
      return self._written(instruction.called("calls")[0])
    if instruction.opcode == "dynamic-update-slice":
      return [_bytes(self._type(computation, instruction.operands[1]))]
    return [_size(a) for a in _arrays(instruction.type)]

  def _trips(self, computation: _Computation, loop: _Instruction) -> int | None:
    """How often a loop runs; None where neither XLA says so nor a counter with constant bounds shows it."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
      return int(match[1])
    condition = self.computations[loop.called("condition")[0]]
    body = self.computations[loop.called("body")[0]]
    start = computation.source(loop.operands[0])
    test = condition.source(condition.root.name)
    if test.opcode != "compare" or body.root.opcode != "tuple" or not start or start.opcode != "tuple":
      return None
    counter, bound = (condition.source(n) for n in test.operands)
    if counter.opcode != "get-tuple-element":
      return None
    position = _index(counter)
    if bound.opcode == "get-tuple-element":
      bound = computation.source(start.operands[_index(bound)])
    first = computation.source(start.operands[position])
    change = body.source(body.root.operands[position])
    if change is None or change.opcode not in ("add", "subtract"):
      return None
    step = next((s for s in map(body.source, change.operands) if s and s.opcode == "constant"), None)
    values = [_integer(x) for x in (first, bound, step)]
    if None in values:
      return None
    first, bound, step = values
    return _iterations(first, bound, -step if change.opcode == "subtract" else step, test.attributes)


def _iterations(first: int, bound: int, step: int, attributes: str) -> int | None:
  direction = re.search(r"direction=(\w\w)", attributes)[1]
  beyond = {"LT": bound, "GT": bound, "NE": bound, "LE": bound + 1, "GE": bound - 1}.get(direction)
  if beyond is None or step == 0:
    return None
  return max(0, math.ceil((beyond - first) / step))


def _index(instruction: _Instruction) -> int:
  return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _integer(instruction: _Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "constant":
    return None
  return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None


def _instruction(line: str) -> _Instruction:
  name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
  kind, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
  opcode, paren, rest = rest.lstrip().partition("(")
  inside, attributes = _balanced(paren + rest)
  return _Instruction(name.removeprefix("%"), kind, opcode, inside[1:-1], attributes)


def _balanced(text: str) -> tuple[str, str]:
  """Splits a text behind the parenthesis that closes its first one."""
  depth = 0
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return text[:match.end()], text[match.end():]
  raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _operand_read(instruction: _Instruction, position: int, sizes: Sequence[int]) -> int:
  """Bytes that an instruction reads of an operand."""
  if instruction.opcode in _SLICES and position == 0:
    return _bytes(instruction.type)
  if instruction.opcode == "dynamic-update-slice" and position == 0:
    return 0
  return sizes[position]


def _arrays(kind: str) -> list[tuple[str, str, str]]:
  """`(type of element, dimensions, layout)` of every array of a type."""
  return _ARRAY.findall(kind)


def _size(array: tuple[str, str, str]) -> int:
  element, dims, _ = array
  count = math.prod(int(d.removeprefix("<=")) for d in dims.split(",") if d)
  bits = _BITS.get(element) if element in _BITS else int(re.search(r"\d+", element)[0])
  return math.ceil(count * bits / 8)


def _bytes(kind: str) -> int:
  return sum(map(_size, _arrays(kind)))


def _in_main_memory(array: tuple[str, str, str]) -> bool:
  """TPU layouts name other memories than HBM: S(1) is on the chip."""
  return "S(" not in array[2]


def _main(kind: str) -> int:
  return sum(_size(a) for a in _arrays(kind) if _in_main_memory(a))
