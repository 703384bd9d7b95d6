"""What the forwards of a model's modules read besides weights, as a tuple to compare: whatever was found out about a model
and kept holds as long as this is the same.

It is read off the live modules at every call, since a program may change any of it between two calls: a number on one module,
an activation, a module put in the place of another, a layer taken out, an entry of the configuration.
"""

from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

_SCALARS = frozenset({bool, int, float, str, type(None)})
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
# What torch keeps on every module; of these only the mode is read by forwards.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


def settings_of(root: nn.Module, *, leaves: bool) -> tuple:
    """The settings of a module and all modules below it. Two results are equal where nothing was changed in between.

    Holds classes, scalars and functions themselves, and of everything else an address, so that no model is kept alive.
    It takes about 0.2 ms for 30 layers without the leaves, 0.4 ms with them.

    Args:
        leaves: read modules that have no modules below them as well (linear layers, norms, activations, RoPE). Of these,
            what layers attend to and keep depends on the shapes of the weights alone, which are always read.
    """
    found: list[Any] = []
    configs: dict[int, Any] = {}
    todo = [root]
    while todo:
        module = todo.pop()
        state = module.__dict__
        children = state["_modules"]
        found.append(type(module))
        weight = state["_parameters"].get("weight")
        if weight is not None:
            found.append(weight.shape)
        if children or leaves:
            for name, value in state.items():
                if name not in _BOOKKEEPING:
                    found.append((name, value if type(value) in _SCALARS else _stand_in(value, configs)))
        todo.extend(child for child in children.values() if child is not None)
    found.extend(tuple(_content(config)) for config in configs.values())
    return tuple(found)


def _stand_in(value: Any, configs: dict[int, Any]) -> Any:
    if isinstance(value, PreTrainedConfig):
        configs[id(value)] = value
        return id(value)
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype
    if isinstance(value, (list, tuple)):
        return repr(value) if all(type(item) in _SCALARS for item in value) else id(value)
    return value if isinstance(value, _FUNCTIONS) else id(value)


def _content(config: PreTrainedConfig) -> list[Any]:
    return [
        (
            name,
            value if type(value) in _SCALARS else repr(value) if isinstance(value, (list, tuple, dict)) else id(value),
        )
        for name, value in vars(config).items()
    ]
