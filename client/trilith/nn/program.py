"""Exported programs: a `torch.export` graph in JSON with safetensors weights, written and read without pickle.

`torch.export.save` cannot be used: its archives hold pickled sample inputs, which `torch.export.load` unpickles,
without restrictions if need be. The graph itself is JSON, and that alone is kept. It could still name any Python
function, and expressions that sympy would evaluate, so a graph is checked before it is loaded: operators of ATen,
integer arithmetic, and nothing else.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trilith.errors import CheckpointError, InvalidRequestError
from trilith.ops.jit import COMPILING
from trilith.runtime.extras import need
from trilith.serving.exports import SERVING_DEFAULT

__all__ = [
    "Program",
    "check_program",
    "current_weights",
    "export_program",
    "join_weights",
    "load_program",
    "only_inputs",
    "pack_weights",
    "set_parameters",
    "unpack_weights",
    "used_inputs",
    "weights_of",
]

log = logging.getLogger(__name__)

_WEIGHTS_PREFIX = "weights/"  # of parameters and buffers
_CONSTANTS_PREFIX = "constants/"

_BATCH = 3  # of the example inputs: torch.export makes 0 and 1 special

# Operators that touch files or other processes have no place in a model.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file|_from_file|save\b)\w+\.\w+"
    r"|_operator\.(?:getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(?:int|float|max|min|not|ite|sum)"
    r"|math\.(?:ceil|floor|trunc)"
)
_SIZE = "torch.ops.aten.sym_size.int"
_IN_PLACE = re.compile(r"torch\.ops\.aten\.\w+_\.\w+")
_END = 2**63 - 1  # of a slice, where it has none

# The same by a name of torch's, which takes arguments as the schema has them, and takes a third of the time.
_QUICK = {
    operator: getattr(torch, operator.name().removeprefix("aten::").partition(".")[0])
    for operator in (
        torch.ops.aten.add.Tensor,
        torch.ops.aten.div.Tensor,
        torch.ops.aten.flatten.using_ints,
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.relu.default,
        torch.ops.aten.select.int,
        torch.ops.aten.sigmoid.default,
        torch.ops.aten.square.default,
        torch.ops.aten.squeeze.dim,
        torch.ops.aten.sub.Tensor,
        torch.ops.aten.sum.dim_IntList,
    )
} | {torch.ops.aten.linear.default: torch.nn.functional.linear}

_NUMBERS = re.compile(
    r"(?:'(?:[su]\d+|zuf\d+)'|(?:[su]\d+|zuf\d+|Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv"
    r"|CleanDiv|floor|ceiling|Eq|Ne|Le|Lt|Ge|Gt|positive|nonnegative|integer|real|True|False|oo|int_oo)\b"
    r"|\d+|[-+*/(),.<>=!&|~ ])*"
)
_NAME = re.compile(r"[\w.]*")
_PLAIN = re.compile(r"[\w.,:+\-<> ]*")
_TREE = re.compile(
    r'(?:"(?:builtins\.(?:tuple|list|dict)|null|type|context|children_spec|\[\]|\w*)"|null|[\d\[\]{},: ])*'
)


class Program:
    """A loaded program: tensors in, tensors out. Thread-safe, as long as its weights are left alone."""

    def __init__(self, module: Callable[..., Any], outputs: Sequence[str]) -> None:
        """Wrap a graph module whose results have these names, in order."""
        self._module = module
        self.outputs = tuple(outputs)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run it; outputs by name."""
        with torch.inference_mode():
            results = self._module(*inputs)
        found = results if isinstance(results, tuple | list) else (results,)
        if len(found) != len(self.outputs):
            raise InvalidRequestError(f"the program gives {len(found)} tensors; its outputs are {list(self.outputs)}")
        return dict(zip(self.outputs, found, strict=True))


def export_program(module: nn.Module, shapes: Sequence[Sequence[int]]) -> tuple[bytes, dict[str, Tensor]]:
    """Trace a module into a program for batches of any size.

    Args:
        module: Takes float32 tensors whose first axis is the batch, returns one tensor or a tuple of them.
        shapes: Per input its shape without the batch.

    Returns:
        The graph as JSON, and the weights by name.

    Raises:
        InvalidRequestError: torch cannot export the module, or the graph would need more than `load_program` allows.
    """
    from torch._export.serde.serialize import serialize

    name = type(module).__name__
    batch = torch.export.Dim("batch", min=1)
    examples = tuple(torch.zeros(_BATCH, *shape) for shape in shapes)
    dynamic = _arranged(module, [{0: batch} for _ in examples])
    training = module.training
    module.eval()
    try:
        _check_results(name, module, examples)
        # torch.export replaces max, min and math.pow, for every thread, by functions that no kernel can call.
        with COMPILING:
            exported = _traced(module, examples, dynamic)
    except InvalidRequestError:
        raise
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidRequestError(
            f"{name} cannot be exported: torch.export cannot follow its forward for batches of every size: {why}"
        ) from error
    finally:
        module.train(training)
    graph = json.loads(serialize(exported).exported_program)
    _strip(graph)
    _check(graph, f"{type(module).__name__}: the exported graph", InvalidRequestError)
    weights = {f"{_WEIGHTS_PREFIX}{name}": value for name, value in exported.state_dict.items()}
    for name, value in exported.constants.items():
        if not isinstance(value, Tensor):
            raise InvalidRequestError(
                f"{type(module).__name__}: constant {name!r} is a {type(value).__name__}, no tensor"
            )
        weights[f"{_CONSTANTS_PREFIX}{name}"] = value
    # safetensors refuses tensors that share memory.
    return json.dumps(graph).encode(), {name: value.detach().clone().contiguous() for name, value in weights.items()}


def _traced(module: nn.Module, examples: tuple[Tensor, ...], dynamic: tuple[Any, ...]) -> Any:
    """What torch.export makes of a module.

    By default it runs `forward`, which costs less and follows more, but for `len(tensor)`: that is a plain number then,
    and no size of a batch. Strictly it reads the code instead.
    """
    try:
        return torch.export.export(module, examples, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # noqa: BLE001 - of what a user's forward does
        try:
            return torch.export.export(module, examples, dynamic_shapes=dynamic, strict=True)
        except Exception:  # noqa: BLE001 - what the first attempt met with says more
            raise error from None


def _arranged(module: nn.Module, each: Sequence[Any]) -> tuple[Any, ...]:
    """What is said of each input, as `forward` takes them: those that it takes as *inputs in a tuple of their own."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*each)
    except TypeError as error:
        raise InvalidRequestError(
            f"{type(module).__name__} cannot be exported: its forward{signature} does not take {len(each)} tensors, "
            f"one for each input in order: {error}"
        ) from None
    found: list[Any] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            found.append(tuple(each[len(found) :]))
            break
        if len(found) == len(each):
            break
        found.append(each[len(found)])
    return tuple(found)


def _check_results(name: str, module: nn.Module, examples: tuple[Tensor, ...]) -> None:
    """Refuse a module that does not take the inputs, or gives something else than tensors of a row per record."""
    shapes = ", ".join(f"float32[b{''.join(f', {size}' for size in each.shape[1:])}]" for each in examples)
    try:
        with torch.no_grad():
            results = module(*examples)
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidRequestError(
            f"{name} cannot be exported: it does not take its inputs, {shapes}: {type(error).__name__}: {why}"
        ) from error
    found = results if isinstance(results, tuple | list) else (results,)
    for each in found:
        if not isinstance(each, Tensor) or not each.ndim or each.shape[0] != _BATCH:
            what = f"a tensor {list(each.shape)}" if isinstance(each, Tensor) else f"a {type(each).__name__}"
            raise InvalidRequestError(
                f"{name} cannot be exported: for {_BATCH} records it gives {what}; it must give one tensor, or a tuple "
                f"of them, of a row for each record"
            )


def load_program(graph: bytes, weights: Mapping[str, Tensor], outputs: Sequence[str], *, where: str) -> Program:
    """Make a program of what `export_program` gave.

    Args:
        graph: JSON.
        weights: By name, as exported or of a later step.
        outputs: Names of the results, in order.
        where: Names the file, for messages.

    Raises:
        CheckpointError: The graph is damaged, names something that a model has no use for, or does not fit.
    """
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    try:
        content = json.loads(graph)
    except ValueError as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None
    _check(content, where, CheckpointError)
    artifact = SerializedArtifact(
        exported_program=graph,
        state_dict=_state(content, weights),  # type: ignore[arg-type]  # tensors instead of a pickle of them
        constants=_of(weights, _CONSTANTS_PREFIX),  # type: ignore[arg-type]
        example_inputs=b"",
    )
    try:
        module = deserialize(artifact).module(check_guards=False)
    except TypeError:
        module = deserialize(artifact).module()  # torch before guards
    except Exception as error:
        raise CheckpointError(f"{where}: torch {torch.__version__} cannot load it: {error}") from error
    return Program(_plain(module), outputs)


def check_program(
    graph: bytes,
    weights: Mapping[str, Tensor],
    outputs: Sequence[str],
    shapes: Sequence[Sequence[int]],
    *,
    where: str,
) -> None:
    """Load a program and run it once.

    Raises:
        InvalidRequestError: Its outputs are not as many as are named.
        CheckpointError: It does not load.
    """
    load_program(graph, weights, outputs, where=where)(*(torch.zeros(1, *shape) for shape in shapes))


def current_weights(module: nn.Module, exported: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an export of `module` made before, with the module's present parameters and buffers."""
    state = {f"{_WEIGHTS_PREFIX}{name}": value for name, value in module.state_dict().items()}
    return {
        name: state[name].detach().clone().contiguous() if name in state else value for name, value in exported.items()
    }


def set_parameters(module: nn.Module, values: Mapping[str, npt.NDArray[np.float32]], *, prefix: str = "dense/") -> None:
    """Give a module's parameters the values of dense variables, as `DenseOnPs` names them.

    Frozen parameters (`requires_grad` is False) are none of training's business: where there is no variable for one it
    keeps the module's value, and the log says so.

    Raises:
        CheckpointError: The variable of a parameter is missing or of another size.
    """
    kept = []
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = values.get(prefix + name)
            if value is None and not parameter.requires_grad:
                kept.append(name)
                continue
            if value is None or value.size != parameter.numel():
                size = "missing" if value is None else f"of {value.size} floats"
                raise CheckpointError(
                    f"dense variable {prefix + name!r} is {size}; {type(module).__name__} has {parameter.numel()}"
                )
            parameter.copy_(torch.from_numpy(np.array(value, np.float32)).view_as(parameter))
    if kept:
        log.warning("frozen parameters are in no checkpoint; they have the module's values", extra={"parameters": kept})


def used_inputs(graph: bytes) -> list[int]:
    """Which of a program's inputs its results depend on, beside how many records there are."""
    content = json.loads(graph)["graph_module"]
    specs = content["signature"]["input_specs"]
    inputs = [each["user_input"]["arg"]["as_tensor"]["name"] for each in specs if "user_input" in each]
    live = _values(content["graph"]["outputs"])
    for node in reversed(content["graph"]["nodes"]):
        target = node["target"]
        # What changes a tensor in place need not have a result that anybody takes.
        if target != _SIZE and (_IN_PLACE.fullmatch(target) or not live.isdisjoint(_values(node["outputs"]))):
            live |= _values([each["arg"] for each in node["inputs"]])
    return [place for place, name in enumerate(inputs) if name in live]


def _values(given: Any) -> set[str]:
    """Names of the tensors and numbers that arguments or results of a node are."""
    if isinstance(given, list):
        return set().union(*map(_values, given))
    if not isinstance(given, dict):
        return set()
    named = {each for key, each in given.items() if key in ("name", "as_name") and isinstance(each, str)}
    return named.union(*map(_values, given.values()))


@contextmanager
def only_inputs(module: nn.Module, shapes: Sequence[Sequence[int]], kept: Sequence[int]) -> Iterator[None]:
    """Have a module take some of its inputs only; the others are zeros.

    It stays the same module, so that its weights are called in its programs as they are in those with all inputs.

    Args:
        module: Whose `forward` is another one inside.
        shapes: Of all inputs, without the batch.
        kept: Which there are, at least one.
    """
    whole = module.forward

    def forward(*tensors: Tensor) -> Any:
        given = dict(zip(kept, tensors, strict=True))
        size = tensors[0].shape[0]
        return whole(
            *(given[i] if i in given else tensors[0].new_zeros((size, *shape)) for i, shape in enumerate(shapes))
        )

    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class has its own


def join_weights(first: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of several programs of one module, each once; `others` by signature."""
    found = dict(first)
    for signature, weights in others.items():
        for name, value in weights.items():
            found.setdefault(f"{signature}/{name}" if name.startswith(_CONSTANTS_PREFIX) else name, value)
    return found


def weights_of(signature: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `join_weights` for one program; the first one's constants are nobody's."""
    own = {name: value for name, value in weights.items() if name.startswith(_WEIGHTS_PREFIX)}
    prefix = f"{signature}/{_CONSTANTS_PREFIX}"
    plain = {name: value for name, value in weights.items() if name.startswith(_CONSTANTS_PREFIX)}
    named = {name.removeprefix(f"{signature}/"): value for name, value in weights.items() if name.startswith(prefix)}
    return own | (plain if signature == SERVING_DEFAULT else named)


def pack_weights(weights: Mapping[str, Tensor]) -> bytes:
    """As a safetensors file."""
    need("safetensors", extra="serving")
    from safetensors.torch import save

    return save(dict(weights))


def unpack_weights(content: bytes, *, where: str) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: It is none.
    """
    need("safetensors", extra="serving")
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None


def _plain(module: Any) -> Callable[..., Any]:
    """A loaded graph as a function of tensors that leaves out what costs time: a third, for a small model.

    That is the check of inputs (ours are as exported), packing and unpacking of nested arguments, slices that take
    everything, the search for weights in submodules, and the slower way of calling an operator by its schema.
    """
    from torch.fx.graph import CodeGen

    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr":
            weight = functools.reduce(getattr, node.target.split("."), module)
            node.target = f"kept_{node.name}"
            module.__dict__[node.target] = weight.detach()
        elif node.target is torch.ops.aten.slice.Tensor and node.args[2:] == (0, _END):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function":
            node.target = _QUICK.get(node.target, node.target)
    graph.set_codegen(CodeGen())
    module.recompile()
    return module.forward  # type: ignore[no-any-return]


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _state(graph: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers, told apart as the graph says."""
    specs = graph["graph_module"].get("signature", {}).get("input_specs", [])
    parameters = {spec["parameter"]["parameter_name"] for spec in specs if "parameter" in spec}
    return {
        name: nn.Parameter(value, requires_grad=False) if name in parameters else value
        for name, value in _of(weights, _WEIGHTS_PREFIX).items()
    }


def _strip(graph: dict[str, Any]) -> None:
    """Forget what only a debugger wants: stack traces name files of the machine that exported."""
    module = graph["graph_module"]
    module["metadata"] = {}
    module["module_call_graph"] = [each for each in module["module_call_graph"] if each["fqn"] == ""]
    graph["guards_code"] = []
    for node in module["graph"]["nodes"]:
        node["metadata"] = {}


def _check(graph: Any, where: str, error: type[CheckpointError | InvalidRequestError]) -> None:
    """Refuse a graph that could do anything but arithmetic."""
    if not isinstance(graph, dict) or not isinstance(graph.get("graph_module"), dict):
        raise error(f"{where}: no graph of torch.export")
    nodes = graph["graph_module"].get("graph", {}).get("nodes", [])
    if graph.get("guards_code"):
        raise error(f"{where}: holds code to be run on loading")
    for node in nodes:
        target = node.get("target") if isinstance(node, dict) else None
        if not isinstance(target, str) or not _OPERATOR.fullmatch(target):
            raise error(f"{where}: operator {target!r} is none that an exported model may use")
        if node.get("metadata"):
            raise error(f"{where}: operator {target!r} has metadata")
    _check_strings(graph, "", where, error)


def _check_strings(value: Any, key: str, where: str, error: type[CheckpointError | InvalidRequestError]) -> None:
    if isinstance(value, dict):
        for name, each in value.items():
            if not _NAME.fullmatch(name) and not _NUMBERS.fullmatch(name):
                raise error(f"{where}: {name!r} is no name")
            _check_strings(each, name, where, error)
    elif isinstance(value, list):
        for each in value:
            _check_strings(each, key, where, error)
    elif isinstance(value, str):
        allowed = {"expr_str": _NUMBERS, "name": _NAME, "in_spec": _TREE, "out_spec": _TREE}.get(key, _PLAIN)
        if not allowed.fullmatch(value):
            raise error(f"{where}: {key} {value!r} is nothing that an exported model may hold")
